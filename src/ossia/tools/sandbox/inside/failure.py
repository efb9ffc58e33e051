"""An exception as a notebook shows it: cells by number, a few lines around each place, no colours, no frame of ours."""

from __future__ import annotations

import linecache
import traceback
import types

_RULE = "-" * 75
_AROUND = 2
_MAX_FRAMES = 40
_MAX_MESSAGE = 4000
# Names of the code that runs cells; see `supervisor` and its bootstrap.
OWN_PREFIX = "<ossia"
_CELL_PREFIX = "<ipython-input-"


def cell_name(number: int) -> str:
    return f"{_CELL_PREFIX}{number}>"


def describe(error: BaseException) -> str:
    """The whole text, causes first."""
    if isinstance(error, SyntaxError) and (error.filename or "").startswith(_CELL_PREFIX) and not _frames(error):
        return _describe_syntax(error)
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    link = ""
    while current is not None and id(current) not in seen and len(seen) < 10:
        seen.add(id(current))
        parts.append(_describe_one(current) + link)
        if current.__cause__ is not None:
            link = "\n\nThe above exception was the direct cause of the following exception:\n"
            current = current.__cause__
        elif current.__context__ is not None and not current.__suppress_context__:
            link = "\n\nDuring handling of the above exception, another exception occurred:\n"
            current = current.__context__
        else:
            current = None
    return "\n".join(reversed(parts))


def _describe_one(error: BaseException) -> str:
    name = type(error).__name__
    title = f"{name:<42}Traceback (most recent call last)"
    frames = [_describe_frame(code, line) for code, line in _frames(error)]
    if len(frames) > _MAX_FRAMES:
        num_left_out = len(frames) - _MAX_FRAMES
        half = _MAX_FRAMES // 2
        frames = [*frames[:half], f"    [... skipping {num_left_out} frames]", *frames[-half:]]
    blocks = [*_without_repeats(frames), _last_line(error)]
    return f"{_RULE}\n{title}\n" + "\n\n".join(blocks)


def _frames(error: BaseException) -> list[tuple[types.CodeType, int]]:
    """From the cell on; what called the cell is nobody's business."""
    found = []
    place = error.__traceback__
    while place is not None:
        found.append((place.tb_frame.f_code, place.tb_lineno))
        place = place.tb_next
    while found and not found[0][0].co_filename.startswith(_CELL_PREFIX):
        del found[0]
    return [one for one in found if not one[0].co_filename.startswith(OWN_PREFIX)]


def _describe_frame(code: types.CodeType, line: int) -> str:
    name = code.co_filename
    number = name[len(_CELL_PREFIX) : -1]
    where = f"Cell In[{number}], line {line}" if name.startswith(_CELL_PREFIX) else f"File {name}:{line}"
    if code.co_name != "<module>":
        where += f", in {code.co_name}({', '.join(code.co_varnames[: code.co_argcount])})"
    lines = linecache.getlines(name)
    first = max(1, line - _AROUND)
    shown = []
    for i in range(first, min(len(lines), line + _AROUND) + 1):
        mark = f"{'-' * max(1, 5 - len(str(i)))}> {i}" if i == line else f"{i:>7}"
        shown.append(f"{mark} {lines[i - 1].rstrip()[:400]}")
    return "\n".join([where, *shown])


def _without_repeats(frames: list[str]) -> list[str]:
    kept: list[str] = []
    repeats = 0
    for frame in [*frames, ""]:
        if kept and frame == kept[-1]:
            repeats += 1
            continue
        if repeats:
            kept.append(f"    [... skipping similar frames: the last one {repeats} more times]")
        repeats = 0
        kept.append(frame)
    return kept[:-1]


def _last_line(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception_only(type(error), error)).rstrip()
    # str() of the model's own class may do anything.
    except Exception:
        text = f"{type(error).__name__}: <exception str() failed>"
    text = text.replace("__main__.", "", 1) if text.startswith("__main__.") else text
    return (
        text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + f"... [{len(text) - _MAX_MESSAGE} characters more]"
    )


def _describe_syntax(error: SyntaxError) -> str:
    number = (error.filename or "")[len(_CELL_PREFIX) : -1]
    line = (error.text or "").rstrip("\n")
    stripped = line.lstrip()
    shown = [f"  Cell In[{number}], line {error.lineno}", f"    {stripped[:400]}"]
    if error.offset and error.offset > 0:
        shown.append(" " * (4 + max(0, error.offset - 1 - (len(line) - len(stripped)))) + "^")
    return "\n".join([*shown, f"{type(error).__name__}: {error.msg}"])
