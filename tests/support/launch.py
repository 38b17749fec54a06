"""Start a script, a command or a worker on several processes of this machine, joined by gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path


SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_script(name, *arguments, processes=1, timeout=300):
    """Run `scripts/name` in `processes` processes and return the finished process with its output."""
    return launch(SCRIPTS / name, *arguments, processes=processes, timeout=timeout)


def run_workers(code, folder, processes, timeout=300):
    """Run the source `code` in `processes` processes, with the folder that it is written to as its argument."""
    path = Path(folder, "worker.py")
    path.write_text(code)
    return launch(path, folder, processes=processes, timeout=timeout)


def run_command(name, *arguments, processes=1, timeout=300):
    """Run the module of `hf-rezero name`, as torchrun wants it, in `processes` processes."""
    return launch(f"hf_rezero.commands.{name}", *arguments, processes=processes, timeout=timeout)


def launch(program, *arguments, processes, timeout):
    """Run a file, or a module by its dotted name."""
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    module = ["-m"] if isinstance(program, str) else []
    command = [*launcher, *module, str(program), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert done.returncode == 0, f"{program} exited with {done.returncode}:\n{done.stderr[-5000:]}"
    return done
