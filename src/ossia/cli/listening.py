"""The address of a server."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from ossia.errors import UnavailableError

if TYPE_CHECKING:
    from ossia.config import Config


def take_address(settings: Config) -> tuple[socket.socket, str]:
    """A socket that has the settings' address, and the URL of what will answer there, with the port that 0 stood for.

    To be called before anything slow: nobody waits for a model to learn then that the port is not free. It does not
    listen before `listen`, so that clients are refused until there is somebody to answer. Raises UnavailableError.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    taken = socket.socket(family)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((settings.host, settings.port))
        # With it, a second server could take the same address until the first one listens.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        taken.close()
        raise UnavailableError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}. Stop what listens "
            "there (`ossia ps` lists your servers), or give another --host or --port; port 0 takes a free one"
        ) from None
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    return taken, f"http://{host}:{taken.getsockname()[1]}"


def listen(taken: socket.socket) -> None:
    """Let clients in."""
    # Linux looks at the address again when it is listened on, and each connection inherits the option: none that has
    # just ended may keep this server, or the next one, from the address.
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.listen()
