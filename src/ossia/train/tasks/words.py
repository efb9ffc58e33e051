"""Words of an invented world: names of people, places and things, and the plain English that goes with them.

Nothing here names a real person or place. Names are built from syllables, so that there is no end of them, and a name
belongs to the training side or to the held-out side by the hash of its letters alone (`is_held_out`): what a test asks
for was never seen, whatever was trained.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

_ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "sk",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "y",
    "z",
    "b",
    "d",
    "k",
    "l",
    "m",
    "n",
    "r",
    "s",
    "t",
    "v",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o"]
_ENDINGS = ["", "", "", "n", "r", "l", "s", "k", "m", "t", "nd", "rk", "st", "x"]
_PLACE_ENDINGS = ["ton", "ford", "mouth", "field", "haven", "dale", "wick", "burg", "holm", "mere", "port", "stead"]

HELD_OUT_SHARE = 8
"""One name, form or instance of so many is held out."""

COLORS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "orange", "purple", "pink", "silver"]
ANIMALS = [
    "cat",
    "dog",
    "horse",
    "owl",
    "fox",
    "bear",
    "frog",
    "hen",
    "goat",
    "wolf",
    "mouse",
    "duck",
    "crow",
    "seal",
    "deer",
    "hare",
]
FOODS = [
    "bread",
    "rice",
    "soup",
    "cheese",
    "apple",
    "pear",
    "plum",
    "fish",
    "salad",
    "cake",
    "honey",
    "beans",
    "egg",
    "milk",
    "tea",
    "jam",
]
THINGS = [
    "lamp",
    "table",
    "chair",
    "clock",
    "book",
    "key",
    "bag",
    "bell",
    "box",
    "cup",
    "knife",
    "map",
    "pen",
    "ring",
    "rope",
    "tent",
    "wheel",
    "coat",
    "boat",
    "drum",
]
MATERIALS = ["wood", "iron", "glass", "stone", "paper", "wool", "clay", "gold", "copper", "leather"]
JOBS = [
    "baker",
    "farmer",
    "doctor",
    "teacher",
    "painter",
    "sailor",
    "smith",
    "judge",
    "pilot",
    "tailor",
    "miner",
    "nurse",
    "cook",
    "writer",
    "guard",
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
VERBS = [
    "get",
    "set",
    "find",
    "list",
    "add",
    "remove",
    "check",
    "count",
    "send",
    "open",
    "close",
    "read",
    "save",
    "start",
    "stop",
    "book",
    "order",
    "show",
]
ADJECTIVES = [
    "small",
    "large",
    "old",
    "new",
    "quick",
    "slow",
    "quiet",
    "bright",
    "heavy",
    "light",
    "round",
    "flat",
    "warm",
    "cold",
    "soft",
    "hard",
]


def hash_of(text: str) -> int:
    """64 bits that depend on the text alone, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_held_out(text: str) -> bool:
    """Whether what this text spells belongs to the held-out side."""
    return hash_of(text) % HELD_OUT_SHARE == 0


def invented_word(rng: random.Random, held_out: bool = False, syllables: Sequence[int] = (2, 2, 3)) -> str:
    """A word in small letters that no language has, of the asked side."""
    while True:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice(syllables)))
        word += rng.choice(_ENDINGS)
        if 4 <= len(word) <= 9 and is_held_out(word) == held_out:
            return word


def person(rng: random.Random, held_out: bool = False) -> str:
    """A first and a last name."""
    return f"{invented_word(rng, held_out, (1, 2, 2)).title()} {invented_word(rng, held_out).title()}"


def first_name(rng: random.Random, held_out: bool = False) -> str:
    return invented_word(rng, held_out, (1, 2, 2)).title()


def place(rng: random.Random, held_out: bool = False) -> str:
    """A town, river or island."""
    has_ending = rng.random() < 0.4
    while True:
        word = invented_word(rng, held_out)
        # Behind a consonant an ending would make pieces that the vocabulary has for one name in a thousand.
        if not has_ending:
            return word.title()
        name = word + rng.choice(_PLACE_ENDINGS)
        if word[-1] in _VOWELS and len(name) <= 12:
            return name.title()


def product(rng: random.Random, held_out: bool = False) -> str:
    """The name of a thing that is sold: "Velkor 300" or "Bramis"."""
    name = invented_word(rng, held_out).title()
    return f"{name} {rng.choice((1, 2, 3, 5, 7, 10, 20, 50, 100, 300))}" if rng.random() < 0.3 else name


def number_made_of(rng: random.Random, digits: Sequence[str], size: int) -> int:
    """A number of that many digits, each one of ``digits``; zeros in front are no part of it."""
    return int("".join(rng.choices(digits, k=size)))


def number_of_digits(rng: random.Random, digits: int) -> int:
    """A number with exactly so many digits."""
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
