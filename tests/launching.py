"""Runs programs on one or several processes as `torchrun` does, forked from one that has imported the libraries.

A process that imports them itself takes ten seconds and more to begin.
"""

import faulthandler
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing import connection, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from test_sharding import environment

SECONDS = 300
"""A launch may take."""
SETTINGS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
processes_from = get_context("forkserver")
processes_from.set_forkserver_preload(["cocoa.pipeline", "cocoa.evaluation", "cocoa.corpus_embedding", "pytest"])


def launch(processes, program, *arguments, split=False):
    """Run a Python program on so many processes; what they printed, one after the other.

    Args:
        processes: how many.
        program: a file.
        *arguments: its arguments.
        split: under FSDP2, as `recipes/accelerate/fsdp2.yaml` says: the model is split over the processes.
    """
    settings = SETTINGS | (environment("fsdp2.yaml") if split else {})
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        settings |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(processes)]
        started = []
        for rank, log in enumerate(logs):
            own = settings | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            begin = (str(program), [str(argument) for argument in arguments], own, log)
            started.append(processes_from.Process(target=run, args=begin))
            started[-1].start()
        wait(started)
        said = [log.with_suffix(".err").read_text()[-3000:] for log in logs]
        assert [process.exitcode for process in started] == [0] * processes, "\n".join(said)
        return "".join(log.with_suffix(".out").read_text() for log in logs)


def run(program, arguments, settings, log):
    """What `python program *arguments` does, in this process, which prints into files."""
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), descriptor)
    faulthandler.enable()  # a process that aborts says where
    os.environ.update(settings)
    sys.argv, sys.path[:0] = [program, *arguments], [str(Path(program).parent)]
    runpy.run_path(program, run_name="__main__")


def wait(started):
    """Wait for all of them; one that fails, or that takes too long, takes the others with it."""
    until = time.monotonic() + SECONDS
    while any(process.exitcode is None for process in started):
        connection.wait([process.sentinel for process in started if process.exitcode is None], until - time.monotonic())
        if any(process.exitcode for process in started) or time.monotonic() > until:
            for process in started:
                process.kill()
    for process in started:
        process.join()


def torchrun(processes, program, *arguments):
    """Run a Python program on so many processes by `torchrun` itself; how it ended, with what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(processes), str(program), *(str(argument) for argument in arguments)]
    settings = os.environ | SETTINGS
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=SECONDS)
