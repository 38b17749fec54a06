"""Start a script, a command or a worker on several processes of this machine, joined by gloo."""

import inspect
import os
import socket
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parents[1]
SCRIPTS = TESTS.parent / "scripts"


def run_script(name, *arguments, processes=1, timeout=300):
    """Run `scripts/name` in `processes` processes and return the finished process with its output."""
    return launch(SCRIPTS / name, *arguments, processes=processes, timeout=timeout)


# a thread of gloo may abort an interpreter that shuts down in an orderly way
ENDING = """
import os, sys, torch
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


def run_workers(code, folder, processes, timeout=300, succeeds=True):
    """Run the source `code` in `processes` processes, with the folder that it is written to as its argument."""
    path = Path(folder, "worker.py")
    path.write_text(code + ENDING)
    return launch(path, folder, processes=processes, timeout=timeout, succeeds=succeeds)


WORKER = """
import os, runpy, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
runpy.run_path({path!r})[{name!r}](Path(sys.argv[1]))
"""


def run_function(function, folder, processes, **options):
    """Run a function of a test module in `processes` processes, with the folder as its argument."""
    code = WORKER.format(path=inspect.getfile(function), name=function.__name__)
    return run_workers(code, folder, processes, **options)


def run_command(name, *arguments, processes=1, timeout=300):
    """Run the module of `hf-rezero name`, as torchrun wants it, in `processes` processes."""
    return launch(f"hf_rezero.commands.{name}", *arguments, processes=processes, timeout=timeout)


def free_port():
    """A port that no one listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(program, *arguments, processes, timeout, succeeds=True):
    """Run a file, or a module by its dotted name; the helpers of the tests can be imported there."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    module = ["-m"] if isinstance(program, str) else []
    command = [*launcher, *module, str(program), *map(str, arguments)]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert (done.returncode == 0) == succeeds, f"{program} exited with {done.returncode}:\n{done.stderr[-5000:]}"
    return done
