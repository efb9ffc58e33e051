"""What comes before any task: copying, recalling, and plain sentences. Texts for pretraining, not conversations.

Copying at short distance first is what makes a small model find the heads that copy (Olsson et al., *In-context
Learning and Induction Heads*, 2022).
"""

from __future__ import annotations

import random

from ossia.train.tasks import words


def draw_copy(rng: random.Random, held_out: bool = False, most: int = 9) -> str:
    """A run of invented words and numbers, two to eight times; ``most`` words are in the run at most.

    Runs of one word are copied by what was said before at all; from there it is a small step to the heads that copy
    what followed. Of longer runs from the start little is learned for long.
    """
    parts = [_token(rng, held_out) for _ in range(rng.randint(1, most))]
    run = rng.choice((" ", ", ", "\n", "_", '","')).join(parts)
    return rng.choice((" | ", "\n", " = ", " ; ")).join([run] * rng.randint(2, 8))


def draw_recall(rng: random.Random, held_out: bool = False) -> str:
    """Pairs of a key and a value, then some of the keys again with their values."""
    joint = rng.choice((": ", " = ", " is ", '":"', "->"))
    pairs = list({_token(rng, held_out): _token(rng, held_out) for _ in range(rng.randint(3, 8))}.items())
    asked = rng.choices(pairs, k=rng.randint(2, 5))
    return "\n".join(f"{key}{joint}{value}" for key, value in [*pairs, *asked])


def _token(rng: random.Random, held_out: bool) -> str:
    match rng.randrange(7):
        case 0 | 1:
            return str(words.number_of_digits(rng, rng.randint(1, 10)))
        case 2:
            return words.person(rng, held_out)
        case 3:
            return words.place(rng, held_out)
        case 4:
            return f"{rng.choice(words.VERBS)}_{words.invented_word(rng, held_out)}"
        case 5:
            # Of pieces that stand in no word.
            return words.invented_word(rng, held_out)[::-1]
        case _:
            return words.invented_word(rng, held_out)
