"""What the site adds to the pages of `docs`: the texts of the repository's root, model cards, figures and result files.

The pages link to other files of the repository by relative paths, which work wherever the repository is browsed. Here the
links to files that the site has are turned to them, and those to other files, such as modules, become plain text. A link to
nothing is a warning, which `mkdocs build --strict` makes an error.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


LOG = logging.getLogger("mkdocs.plugins.site_hooks")
ROOT = Path(__file__).parent.parent
# a text of the root -> its page
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "ARCHITECTURE.md": "contributing/architecture.md",
    "CHANGELOG.md": "contributing/changelog.md",
    "SECURITY.md": "contributing/security.md",
}
ASSETS = {"scripts/reproduce/figures": "results/figures", "scripts/reproduce/results": "results/files"}
CARDS = "model_cards"  # with their pictures
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def places() -> dict[str, str]:
    """Where the site has a file of the repository: its path there by its path in the repository."""
    found = dict(PAGES)
    for folder, target in ASSETS.items():
        found |= {f"{folder}/{path.name}": f"{target}/{path.name}" for path in sorted((ROOT / folder).iterdir())}
    for path in sorted((ROOT / CARDS).rglob("*.png")):
        found[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / CARDS).glob("*/README.md")):
        found[path.relative_to(ROOT).as_posix()] = f"{CARDS}/{path.parent.name}/index.md"
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the root, the model cards, the figures and the result files."""
    for source, target in places().items():
        path = ROOT / source
        if target.endswith(".md"):
            files.append(File.generated(config, target, content=path.read_text()))
        else:
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links out of `docs` to what the site has."""
    if page.file.src_uri in ("index.md", "faq.md"):
        page.meta["hide"] = ["navigation"]  # it would hold nothing but the page itself
    here = {target: source for source, target in places().items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = CODE.split(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda m: _turn(m, here, page), part) for part in parts
    )


def _turn(link: re.Match, here: str, page: Page) -> str:
    image, text, url, anchor = link[1], link[2], link[3], link[4] or ""
    if re.match(r"[a-z]+:", url):
        return link[0]
    source = posixpath.normpath(posixpath.join(posixpath.dirname(here), url))
    target = places().get(source) or (source.removeprefix("docs/") if source.startswith("docs/") else None)
    if target is not None and target.endswith(".ipynb"):
        target = f"{target.removesuffix('.ipynb')}.md"  # its page, which `site_notebooks.py` makes
    if target is not None:
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return _figure(text, relative, source) if image else f"[{text}]({relative}{anchor})"
    if not (ROOT / source).exists():
        LOG.warning("%s links to %s, which does not exist", here, url)
    return text


def _figure(text: str, target: str, source: str) -> str:
    """A figure, which opens in its full size; with a dark twin, the one that fits the colours of the page."""
    dark = f"{source.removesuffix('.png')}_dark.png"
    if dark not in places():
        return f"[![{text}]({target})]({target})"
    looks = {"only-light": target, "only-dark": f"{target.removesuffix('.png')}_dark.png"}
    return " ".join(f"[![{text}]({path}#{look})]({path})" for look, path in looks.items())
