"""Which samples share a batch: no padding, documents that do not see each other, and few tokens of room to spare.

Samples are packed a buffer at a time. Best fit puts each sample, longest first, into the fullest pack that still has
room for it, which wastes about one pack in each buffer. Buckets put samples of like length together, so that ranks that
wait for each other have about as much attention to compute.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, Protocol, TypeVar

from ossia.errors import InputError


class Sized(Protocol):
    """Anything with a length in tokens."""

    def __len__(self) -> int: ...


S = TypeVar("S", bound=Sized)
Packing = Literal["best_fit", "buckets", "none"]


def pack(
    samples: Iterable[S], max_tokens: int, *, packing: Packing = "best_fit", buffer: int = 4096
) -> Iterator[list[S]]:
    """Lists of samples of at most ``max_tokens`` tokens together; every sample comes exactly once.

    ``buffer`` samples are held at once. Raises InputError for a sample that is longer than a pack.
    """
    source = iter(samples)
    while held := list(islice(source, buffer)):
        for indices in plan([len(one) for one in held], max_tokens, packing):
            yield [held[i] for i in indices]


def pack_evenly(samples: Sequence[S], max_tokens: int, multiple: int = 1) -> list[list[S]]:
    """As few lists as hold the samples, of about the same number of tokens each: the longest first, to the emptiest.

    Their number is a multiple of ``multiple``, where there are as many samples. Raises InputError for a sample that is
    longer than ``max_tokens``.
    """
    num_packs = len(plan([len(one) for one in samples], max_tokens))
    num_packs = min(-(-num_packs // multiple) * multiple, len(samples))
    while True:
        packs: list[list[S]] = [[] for _ in range(num_packs)]
        sizes = [0] * num_packs
        for one in sorted(samples, key=len, reverse=True):
            place = sizes.index(min(sizes))
            packs[place].append(one)
            sizes[place] += len(one)
        if max(sizes, default=0) <= max_tokens:
            return packs
        num_packs = min(num_packs + multiple, len(samples))


def plan(lengths: Sequence[int], max_tokens: int, packing: Packing = "best_fit") -> list[list[int]]:
    """The same for lengths alone: indices of each pack, packs in the order of their first samples."""
    too_long = [length for length in lengths if length > max_tokens]
    if too_long:
        raise InputError(
            f"a sample of {max(too_long)} tokens does not fit a batch of {max_tokens}; allow batches more tokens, or "
            "samples fewer"
        )
    if packing == "none":
        return [[i] for i in range(len(lengths))]
    packs = _buckets(lengths, max_tokens) if packing == "buckets" else _best_fit(lengths, max_tokens)
    return sorted(packs, key=lambda indices: indices[0])


def _best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Longest first, each into the fullest pack that still has room for it."""
    packs: list[list[int]] = []
    # (room, pack) of every pack with room, least room first.
    rooms: list[tuple[int, int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_right(rooms, (lengths[i], -1))
        if at < len(rooms):
            room, number = rooms.pop(at)
            packs[number].append(i)
        else:
            room, number = max_tokens, len(packs)
            packs.append([i])
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], number))
    return [sorted(indices) for indices in packs]


def _buckets(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    packs: list[list[int]] = []
    used = max_tokens
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if used + lengths[i] > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append(i)
        used += lengths[i]
    return [sorted(indices) for indices in packs]
