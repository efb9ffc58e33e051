"""What a command does in the processes that torchrun started beside the first."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ossia.config import Config


def follows(settings: Config) -> bool:
    """Whether this process is not the first of a team. It has then computed its share until the first one ended."""
    from ossia.local import open_share

    runner = open_share(settings)
    if runner is None:
        return False
    # Ctrl-C reaches all processes at once; the first one ends in good order, and then says so.
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    runner.follow()
    return True
