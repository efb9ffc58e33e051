"""Many ways to say one thing, from few lines.

    Phrases("[Please |]add {a} [and|to] {b}[.|]").pick(rng, held_out=False) -> "Please add {a} to {b}."

``[x|y]`` is a choice, ``{name}`` a place to be filled by `str.format`. Every form that the choices can make belongs to
the training side or to the held-out side by its hash.
"""

from __future__ import annotations

import itertools
import random
import re

from ossia.train.tasks.words import is_held_out

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


class Phrases:
    """All forms of some patterns, sorted into two sides. Every pattern is equally likely, then every form of it.

    Raises ValueError for a pattern that training would never see: none of its forms could be learned.
    """

    def __init__(self, *patterns: str) -> None:
        self._sides: tuple[list[list[str]], list[list[str]]] = ([], [])
        for pattern in patterns:
            forms = expand(pattern)
            for held_out, side in enumerate(self._sides):
                if chosen := [form for form in forms if is_held_out(form) == bool(held_out)]:
                    side.append(chosen)
                elif not held_out:
                    raise ValueError(f"all forms of {pattern!r} are held out; give it another wording")
        self._held_out_forms = [form for forms in self._sides[True] for form in forms]

    def pick(self, rng: random.Random, held_out: bool = False, **fields: object) -> str:
        """One form of the asked side, filled. Of few forms none may be held out: then it is one of the others."""
        if held_out and self._held_out_forms:
            return rng.choice(self._held_out_forms).format(**fields)
        form = rng.choice(rng.choice(self._sides[False]))
        return form.format(**fields)

    def forms(self, held_out: bool) -> list[str]:
        """All forms of one side, not filled."""
        return [form for forms in self._sides[held_out] for form in forms]


def expand(pattern: str) -> list[str]:
    """All forms of a pattern, in order. Choices do not nest."""
    parts = _CHOICE.split(pattern)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]
