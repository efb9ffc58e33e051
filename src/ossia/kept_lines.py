"""What a long run has made so far, in a file: JSON lines behind one that tells how they were made.

    {"how": {"model": "nano", "seed": 0}}
    {"number": 0, "right": true}

A run that was broken off reads them and makes the rest; a last line that was broken off with it is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ossia.errors import ConfigError


class KeptLines:
    """One such file. ``lines`` are those that were there."""

    def __init__(self, path: Path, how: Mapping[str, Any], what: str) -> None:
        """Open or begin; ``what`` names its lines in errors.

        Raises ConfigError for a file of something else, which is left as it is, and for lines that were made otherwise.
        """
        self._path = path
        data = path.read_bytes() if path.exists() else b""
        # Not splitlines: a text may hold other line ends.
        *lines, rest = data.split(b"\n")
        try:
            made = [json.loads(line) for line in lines]
            before = dict(made[0]["how"]) if data else dict(how)
        except (ValueError, LookupError, TypeError):
            raise ConfigError(f"{path} is no file of {what}; give another name") from None
        changed = [name for name in sorted({*before, *how}) if before.get(name) != how.get(name)]
        if changed:
            told = ", ".join(f"{name} was {before.get(name)!r}, now {how.get(name)!r}" for name in changed)
            raise ConfigError(f"{path} holds {what} that were made otherwise: {told}; give another name")
        self.lines: list[dict[str, Any]] = made[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        if rest:
            os.truncate(path, len(data) - len(rest))
        elif not data:
            self.add([{"how": dict(how)}])

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Keep more of them."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
