"""Processes that tests fork and kill, from one that has imported everything already."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed import TCPStore

_SECONDS = 120
"""For a program to end."""

ZYGOTE = """
import json, os, sys, traceback
import torch
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel
import hypothesis, pytest, timm.layers
from bla.runs import run
from bla.training import cache
torch.set_num_threads(1)
cache.BATCH, cache.CHUNK = 4, 8
for line in sys.stdin:  # processes a line, without importing everything each time
    world, port, program = json.loads(line)
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                     "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
            os.environ.update({name: str(value) for name, value in place.items()})
            try:
                exec(program, {"rank": rank, "world": world})
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Starter:
    """Runs a program in so many processes, which know of one another as under torchrun."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ZYGOTE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __call__(self, world: int, program: str, kill: Callable[[], bool] | None = None) -> list[int]:
        """Exit codes; with ``kill``, all are killed when it says so, the last one first."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's: no port to guess
        print(json.dumps([world, meeting.port, textwrap.dedent(program)]), file=self.process.stdin, flush=True)
        children = json.loads(self.process.stdout.readline())
        deadline = time.monotonic() + _SECONDS
        while kill is not None and not kill() and time.monotonic() < deadline:
            time.sleep(0.001)
        if kill is not None or not select.select([self.process.stdout], [], [], _SECONDS)[0]:
            for child in reversed(children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        codes = list(json.loads(self.process.stdout.readline()))
        assert time.monotonic() < deadline, f"expected {world} processes to end within {_SECONDS} s; killed: {codes}"
        return codes

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
