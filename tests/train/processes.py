"""Commands of several processes that torchrun starts, for tests of what these do together."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ossia


def launch(num_processes: int) -> list[str]:
    """What stands before a program, or ``-m`` and a module; one process is started without torchrun."""
    if num_processes == 1:
        return [sys.executable]
    # A port of its own that nobody else can have meanwhile.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]


def environment() -> dict[str, str]:
    """This checkout, a thread for each process, and addresses of this machine whatever its name resolves to."""
    source = {"PYTHONPATH": str(Path(ossia.__file__).parents[1])}
    return dict(os.environ) | source | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
