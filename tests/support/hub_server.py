"""A small Hub on 127.0.0.1 that speaks the protocol of huggingface_hub, and can refuse, or break off, any request.

    with HubServer() as hub:
        worker = Worker(hub.environment(tmp_path))  # HF_ENDPOINT is read at import, so clients are processes
        worker.run("model.push_to_hub('me/model')")
        hub.repos["me/model"].files()["config.json"]

Large files go up to, and come down from, `localhost`: for the client another host than `127.0.0.1`, as the storage of
the Hub is, so a token that is sent there is noticed. Xet is not spoken; its clients need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


WRITER, READER = "hf_" + "writer" * 6, "hf_" + "reader" * 6  # as long as real ones
USERS = {WRITER: "me", READER: "guest"}


@dataclass(frozen=True)
class Blob:
    """A file; a large one is known by its sha256, a small one by its git hash."""

    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: dict[str, Blob]
    changed: tuple[str, ...] = ()


@dataclass
class Repo:
    """Commits by hash, and the branches and pull requests that point at them."""

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})

    def commit(self, ref: str, message: str, changes: dict[str, Blob | None], base: str | None = None) -> Commit:
        """Add files, and remove those that come with None."""
        before, names = self.resolve(base or ref), tuple(sorted(changes))
        files = {name: blob for name, blob in ((before.files if before else {}) | changes).items() if blob}
        sha = hashlib.sha1(f"{self.id} {len(self.commits)} {message} {names}".encode()).hexdigest()
        commit = Commit(sha, message, files, names)
        self.commits[sha], self.refs[ref] = commit, sha
        return commit

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {name: blob.content for name, blob in self.resolve(revision).files.items()}

    def log(self) -> list[Commit]:
        """What was committed, without the commit that a new repository has."""
        return list(self.commits.values())[1:]


@dataclass
class Fault:
    """What happens to requests that match: a refusal, or an end of the connection."""

    method: str
    path: str
    status: int | None = None
    message: str = ""
    cut: int | str | None = None  # after so many bytes of the request, or "after" it was acted upon
    times: float = math.inf

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


class HubServer:
    """The repositories, the large files, the faults to come, and every request so far."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.leaked: list[str] = []  # requests to the storage that carried a token
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url, self.storage = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, status: int | None = None, **fault) -> None:
        """Refuse or break off the requests that match from now on."""
        self.faults.append(Fault(method, path, status, **fault))

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """The environment of a client that is logged in with `token`."""
        inherited = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and "proxy" not in k.lower()}
        inherited.pop("HF_TOKEN", None)
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return inherited | settings | ({"HF_TOKEN": token} if token else {})


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "list_refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<oid>\w+)", "store"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/verify", "verify"),
        ("GET", r"/storage/(?P<oid>\w+)", "fetch"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
    )

    def _serve(self):
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), url.path
        self.hub.requests.append((self.command, path))
        fault = next((fault for fault in self.hub.faults if fault.matches(self.command, path)), None)
        if fault:
            fault.times -= 1
        if fault and isinstance(fault.cut, int):
            self.rfile.read(min(fault.cut, int(self.headers.get("Content-Length", fault.cut))))
            return self._hang_up()
        body = self._body()
        try:
            if fault and fault.status:
                raise _Refused(fault.status, fault.message)
            status, headers, content = self._act(path, body)
        except _Refused as refused:
            status, content = refused.status, {"error": refused.message, "errors": [{"message": refused.message}]}
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
        if fault and fault.cut == "after":
            return self._hang_up()
        self._answer(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _act(self, path: str, body: bytes) -> tuple[int, dict, object]:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == method:
                # segments are taken apart first: the slash of a branch name comes quoted
                return getattr(self, name)(body, **{k: unquote(v) for k, v in match.groupdict().items() if v})
        raise _Refused(404, f"this Hub does not know {self.command} {path}")

    def _answer(self, status: int, headers: dict, content) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"X-Request-Id": "Root=1-test", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass

    # who asks, and for what

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repo(self, name: str, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(name)
        owner = name.split("/")[0] == user
        if repo is None or repo.private and not owner:
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise _Refused(401, "Invalid username or password.")
        if write and not owner:
            raise _Refused(403, f"Forbidden: you must have write access to the repo {name}")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # the endpoints

    def whoami(self, body):
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        return 200, {}, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_card(self, body):
        if re.match(r"---\n(.*?\n)?---", json.loads(body)["content"], re.DOTALL):
            return 200, {}, {"errors": [], "warnings": []}
        return 200, {}, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}

    def create(self, body):
        wanted, user = json.loads(body), self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        if name.split("/")[0] != user:
            raise _Refused(
                403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}"
            )
        status = 409 if name in self.hub.repos else 200
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repos.setdefault(name, Repo(name, bool(private)))
        return (
            status,
            {},
            {"url": f"{self.hub.url}/{name}", "name": name, "error": "You already created this model repo"},
        )

    def info(self, body, repo, revision="main"):
        repo = self._repo(repo)
        commit = self._commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in commit.files]
        return 200, {}, {"id": repo.id, "sha": commit.sha, "private": repo.private, "siblings": siblings, "tags": []}

    def list_refs(self, body, repo):
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in self._repo(repo).refs.items()
        ]
        return 200, {}, {"branches": branches, "converts": [], "tags": [], "pullRequests": []}

    def tree(self, body, repo, revision, folder="/"):
        files = self._commit_of(self._repo(repo), revision).files.items()
        below = [(n, b) for n, b in files if n.startswith(folder.strip("/"))]
        if folder != "/" and not below:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries = [{"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid} for name, blob in below]
        return 200, {}, entries

    def branch(self, body, repo, revision):
        repo = self._repo(repo, write=True)
        if revision in repo.refs:
            raise _Refused(409, "Reference already exists")
        repo.refs[revision] = repo.refs["main"]
        return 201, {}, {}

    def preupload(self, body, repo, revision):
        repo = self._repo(repo, write="create_pr" not in self.query)
        here = self._commit_of(repo, revision).files
        answers = []
        for file in json.loads(body)["files"]:
            large = b"\0" in base64.b64decode(file["sample"]) or file["path"].endswith(".safetensors")
            known = {"oid": here[file["path"]].oid} if file["path"] in here else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return 200, {}, {"files": answers}

    def batch(self, body, repo):
        self._repo(repo)
        answers = []
        for item in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.storage}/storage/{item['oid']}"}
            verify = {"href": f"{self.hub.url}/api/models/{repo}/verify"}
            new = {} if item["oid"] in self.hub.large else {"actions": {"upload": upload, "verify": verify}}
            answers.append({**item, **new})
        return 200, {}, {"transfer": "basic", "objects": answers}

    def store(self, body, oid):
        self._notice_token()
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content does not have the announced sha256")
        self.hub.large[oid] = body
        return 200, {"ETag": f'"{oid}"'}, b""

    def verify(self, body, repo):
        self._repo(repo)
        item = json.loads(body)
        if len(self.hub.large.get(item["oid"], b"")) != item["size"]:
            raise _Refused(422, "the object was not uploaded")
        return 200, {}, {}

    def commit(self, body, repo, revision):
        as_request = "create_pr" in self.query
        repo = self._repo(repo, write=not as_request)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        assert header["key"] == "header"
        if header["value"].get("parentCommit") not in (None, self._commit_of(repo, revision).sha):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        changes = dict(self._change(operation) for operation in operations)
        ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}" if as_request else revision
        commit = repo.commit(ref, header["value"]["summary"], changes, base=revision)
        pull_request = {"pullRequestUrl": f"{self.hub.url}/{repo.id}/discussions/{ref[8:]}"} if as_request else {}
        url = f"{self.hub.url}/{repo.id}/commit/{commit.sha}"
        return 200, {}, {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": "", **pull_request}

    def _change(self, operation: dict) -> tuple[str, Blob | None]:
        value = operation["value"]
        if operation["key"] == "deletedFile":
            return value["path"], None
        if operation["key"] == "file":
            return value["path"], Blob(base64.b64decode(value["content"]), False)
        if operation["key"] != "lfsFile" or value["oid"] not in self.hub.large:
            raise _Refused(400, f"{operation['key']} {value['path']}: not uploaded, or not known to this Hub")
        return value["path"], Blob(self.hub.large[value["oid"]], True)

    def resolve(self, body, repo, revision, file):
        commit = self._commit_of(self._repo(repo), revision)
        blob, headers = commit.files.get(file), {"X-Repo-Commit": commit.sha}
        if blob is None:
            raise _Refused(404, f"Entry not found: {file}", "EntryNotFound")
        if not blob.is_large:
            return 200, headers | {"ETag": f'"{blob.oid}"'}, blob.content
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return 302, headers | {"Location": f"{self.hub.storage}/storage/{blob.oid}"}, b""

    def fetch(self, body, oid):
        self._notice_token()
        if oid not in self.hub.large:
            raise _Refused(404, "no such object")
        return 200, {"ETag": f'"{oid}"'}, self.hub.large[oid]

    def _notice_token(self) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked.append(f"{self.command} {self.path}")


LOOP = """
import contextlib, io, json, sys
answers, sys.stdout = sys.stdout, sys.stderr
names = {"__name__": "worker"}
for line in sys.stdin:
    names["result"], printed, answer = None, io.StringIO(), {}
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), names)
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"result": names["result"], "printed": printed.getvalue()} | answer), file=answers, flush=True)
"""


class Worker:
    """A process that runs code with the environment of a client; its names stay from one piece of code to the next."""

    def __init__(self, environment: dict[str, str], log: Path):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def ask(self, code: str) -> dict:
        """Run `code`; `result` is what it bound to that name, `error` what it raised."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the worker died: {self.log.read_text()[-3000:]}"
        return json.loads(answer)

    def run(self, code: str):
        """Run `code`, which must not fail, and return what it bound to `result`."""
        answer = self.ask(code)
        assert "error" not in answer, f"{answer['error']}\n{self.log.read_text()[-3000:]}"
        return answer["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
