"""What is wrong with a request, in the words of the form of the API that it came in.

Chat Completions and Messages are read as requests of the Responses API, Completions as those of the engine: a place in
one of those is told as a place in what the client sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ossia.errors import OssiaError

_ITEM = re.compile(r"input\[(\d+)\]")


@contextmanager
def named_as(fields: Sequence[tuple[str, str]], items: Callable[[], Sequence[str]] = tuple) -> Iterator[None]:
    """Rename the place that an error from inside names, in its ``param`` and at the beginning of its message.

    ``items`` gives the places of the input's items. Of the ``fields``, patterns and what stands for them, the first
    that matches counts.
    """
    try:
        yield
    except OssiaError as error:
        places = items()
        error.message = _renamed(error.message, fields, places)
        error.param = None if error.param is None else _renamed(error.param, fields, places)
        error.args = (error.message,)
        raise


def _renamed(text: str, fields: Sequence[tuple[str, str]], places: Sequence[str]) -> str:
    item = _ITEM.match(text)
    if item is not None and int(item[1]) < len(places):
        text = places[int(item[1])] + text[item.end() :]
    for pattern, instead in fields:
        # Not in the midst of a word.
        if found := re.match(rf"{pattern}(?!\w)", text):
            return found.expand(instead) + text[found.end() :]
    return text
