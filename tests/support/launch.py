"""Start a script on several processes of this machine, joined by gloo."""

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


def launch(path, *arguments, processes, timeout):
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [*launcher, str(path), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert done.returncode == 0, f"{path.name} exited with {done.returncode}:\n{done.stderr[-5000:]}"
    return done
