"""Paged keys and values: allocate blocks, find them again by prefix, give them back.

Two pools. Layers with full attention keep every block of a sequence. Sliding-window layers need only the last
``window - 1`` tokens before the next one: blocks behind those go back to their pool at once.

A block that is full is *published* under a key, the hash of its tokens and of the key before it, so a key stands for
the whole prefix. What stands before the first block belongs to it: what was computed through an adapter is found by
sequences of that adapter alone. Given back, a published block stays findable until its memory is needed; the block that
was given back longest ago goes first. The last block of a sequence, part full, is published when the sequence gives it
back: the next turn of the same conversation takes it over and fills it up, so that it computes nothing twice.

A prefix of p tokens can be reused if the full-attention blocks of all p tokens are still there, and the window blocks
that hold tokens p - window + 1 to p - 1. The longest such p counts; one token is always left to compute, since
sampling needs its logits.

A window block that a sequence leaves behind in passing is therefore worth little and goes first, save where another
sequence is likely to begin: before the end of a prompt (the next turn of a conversation may drop what was thought in
between), and where a prefix was found or would have been found but for its window.

Shapes   S slots (tokens) in a block.
Sources  PagedAttention, arXiv:2309.06180; automatic prefix caching as in vLLM.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Makes the key of a part-full block from the key before it; no hash has this length.
_TAIL = b"tail"


class BlockPool:
    """Blocks of one kind of layer: users are counted, free blocks stay findable until they are needed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_users = [0] * num_blocks
        # Free blocks in which nothing can be found.
        self._empty = list(range(num_blocks - 1, -1, -1))
        # Free blocks that can be found, given back longest ago first.
        self._findable: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._findable)

    @property
    def num_findable(self) -> int:
        """Free blocks whose content can still be reused."""
        return len(self._findable)

    def find(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def is_free(self, block: int) -> bool:
        return self._num_users[block] == 0

    def allocate(self) -> int:
        """A block for new content; there must be a free one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._findable.popitem(last=False)
            self._forget(block)
        self._num_users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a published block."""
        if self.is_free(block):
            del self._findable[block]
        self._num_users[block] += 1

    def take_over(self, block: int) -> None:
        """Become the only user of a free, published block, to write in it."""
        assert self.is_free(block)
        self.share(block)
        self._forget(block)

    def release(self, block: int, *, goes_first: bool = False) -> None:
        """One user less. A block that goes first is the next one to be used for other content."""
        self._num_users[block] -= 1
        assert self._num_users[block] >= 0
        if self.is_free(block):
            if block in self._key_of:
                self._findable[block] = None
                self._findable.move_to_end(block, last=not goes_first)
            else:
                self._empty.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Let ``block`` be found under ``key``, in place of another that may have been."""
        other = self._block_of.get(key)
        if other is not None:
            self._forget(other)
            if self.is_free(other):
                del self._findable[other]
                self._empty.append(other)
        self._block_of[key] = block
        self._key_of[block] = key

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]


class BlockTable:
    """The blocks of one sequence in one pool: those with index ``start`` to ``end - 1``; -1 elsewhere."""

    __slots__ = ("blocks", "end", "start")

    def __init__(self) -> None:
        self.blocks: npt.NDArray[np.int32] = np.full(16, -1, np.int32)
        self.start = 0
        self.end = 0

    def append(self, block: int) -> None:
        if self.end == len(self.blocks):
            self.blocks = np.concatenate([self.blocks, np.full(self.end, -1, np.int32)])
        self.blocks[self.end] = block
        self.end += 1

    def skip(self, num_blocks: int) -> None:
        """Leave out the first blocks of an empty table."""
        for _ in range(num_blocks):
            self.append(-1)
        self.start = self.end

    def pop_first(self) -> int:
        block = int(self.blocks[self.start])
        self.blocks[self.start] = -1
        self.start += 1
        return block

    def pop_last(self) -> int:
        self.end -= 1
        block = int(self.blocks[self.end])
        self.blocks[self.end] = -1
        return block


class SequenceBlocks:
    """What one sequence holds: keys and values of its first ``num_tokens`` tokens."""

    __slots__ = ("full", "kept_windows", "keys", "num_tokens", "root", "window")

    def __init__(self, root: bytes = b"") -> None:
        self.num_tokens = 0
        # What stands before the first block: the same tokens are the same prefix only behind the same root.
        self.root = root
        self.full = BlockTable()
        self.window = BlockTable()
        # Keys of its full blocks as far as they were needed; they outlive the blocks.
        self.keys: list[bytes] = []
        # Indices of window blocks that do not go first when they are left behind.
        self.kept_windows: frozenset[int] = frozenset()


class PrefixHit(NamedTuple):
    """The blocks that hold the first ``num_tokens`` tokens of a sequence; its window blocks start at an index.

    ``num_full_found`` blocks would have been used but for their windows.
    """

    num_tokens: int
    full: list[int]
    window: list[int]
    window_start: int
    num_full_found: int


class BlockManager:
    """Both pools, and what every sequence holds of them.

    ``window`` None: no layer has a window, and the window pool mirrors the full one (its blocks take no memory).
    """

    def __init__(self, num_full_blocks: int, num_window_blocks: int, block_size: int, window: int | None) -> None:
        self.full_pool = BlockPool(num_full_blocks)
        self.window_pool = BlockPool(num_window_blocks)
        self.block_size = block_size
        self._window = window
        # Token ids of part-full blocks, by block of the full pool and of the window pool.
        self._full_tails: dict[int, list[int]] = {}
        self._window_tails: dict[int, list[int]] = {}

    # Finding a prefix ------------------------------------------------------------------------------------------------

    def match(self, blocks: SequenceBlocks, token_ids: Sequence[int]) -> PrefixHit:
        """The longest prefix of ``token_ids`` that can be reused, of at most all tokens but one."""
        limit = len(token_ids) - 1
        keys = self.keys(blocks, token_ids, limit // self.block_size)
        full: list[int] = []
        for key in keys[: limit // self.block_size]:
            block = self.full_pool.find(key)
            if block is None:
                break
            full.append(block)
        num_full_found = len(full)
        window = self._window_before(keys, num_full_found)
        del full[window.end :]
        num_tokens = len(full) * self.block_size
        tail = self._tail_after(keys[len(full) - 1] if full else blocks.root, token_ids[num_tokens:limit])
        if tail is not None:
            full.append(tail.full_block)
            window.blocks.append(tail.window_block)
            num_tokens += tail.num_tokens
        # With a part-full block the window may have moved on.
        window_start = self._first_window_block(num_tokens)
        return PrefixHit(num_tokens, full, window.blocks[window_start - window.start :], window_start, num_full_found)

    def keys(self, blocks: SequenceBlocks, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """The keys of at least the first ``num_blocks`` blocks, kept with the sequence."""
        keys, size = blocks.keys, self.block_size
        for i in range(len(keys), num_blocks):
            tokens = array("i", token_ids[i * size : (i + 1) * size]).tobytes()
            keys.append(hashlib.blake2b((keys[-1] if keys else blocks.root) + tokens, digest_size=32).digest())
        return keys

    def _window_before(self, keys: list[bytes], end: int) -> _WindowRun:
        """The window blocks for the longest prefix of at most ``end`` blocks for which all of them are there."""
        while True:
            start = self._first_window_block(end * self.block_size)
            found: list[int] = []
            for i in range(end - 1, start - 1, -1):
                block = self.window_pool.find(keys[i])
                if block is None:
                    # Every longer prefix that reaches back to this hole lacks it as well.
                    end = i
                    break
                found.append(block)
            else:
                return _WindowRun(start, end, found[::-1])

    def _tail_after(self, key: bytes, token_ids: Sequence[int]) -> _Tail | None:
        full_block, window_block = self.full_pool.find(key + _TAIL), self.window_pool.find(key + _TAIL)
        if full_block is None or window_block is None:
            return None
        num_tokens = 0
        for token_id, in_full, in_window in zip(
            token_ids, self._full_tails[full_block], self._window_tails[window_block], strict=False
        ):
            if not token_id == in_full == in_window:
                break
            num_tokens += 1
        return _Tail(full_block, window_block, num_tokens) if num_tokens else None

    # Holding blocks --------------------------------------------------------------------------------------------------

    def acquire(self, blocks: SequenceBlocks, hit: PrefixHit, num_known_tokens: int) -> None:
        """Give a sequence of that many tokens, which holds nothing, the blocks of a prefix."""
        assert blocks.num_tokens == blocks.full.end == blocks.window.end == 0
        blocks.num_tokens = hit.num_tokens
        blocks.kept_windows = frozenset(
            index
            for end in (len(hit.full), hit.num_full_found, num_known_tokens // self.block_size)
            for index in range(self._first_window_block(end * self.block_size), end)
        )
        blocks.window.skip(hit.window_start)
        part_full = hit.num_tokens % self.block_size > 0
        for pool, table, ids in (
            (self.full_pool, blocks.full, hit.full),
            (self.window_pool, blocks.window, hit.window),
        ):
            for i, block in enumerate(ids):
                if part_full and i == len(ids) - 1:
                    pool.take_over(block)
                else:
                    pool.share(block)
                table.append(block)

    def capacity(self, blocks: SequenceBlocks, num_spared: int = 0) -> int:
        """How many more tokens of this sequence could be computed if all but some free blocks were its own."""
        num_full = blocks.full.end + max(0, self.full_pool.num_free - num_spared)
        num_window = blocks.window.end + max(0, self.window_pool.num_free - num_spared)
        return min(num_full, num_window) * self.block_size - blocks.num_tokens

    def can_admit(self, hit: PrefixHit, num_tokens: int, num_spared: int) -> bool:
        """Whether a sequence of that many tokens can be held beside others, some free blocks left for those."""
        num_blocks = -(-num_tokens // self.block_size)
        at_once = num_blocks if self._window is None else min(num_blocks, self.num_to_start)
        free_full = self.full_pool.num_free - num_spared - sum(map(self.full_pool.is_free, hit.full))
        free_window = self.window_pool.num_free - num_spared - sum(map(self.window_pool.is_free, hit.window))
        return num_blocks - len(hit.full) <= free_full and at_once - len(hit.window) <= free_window

    def reserve(self, blocks: SequenceBlocks, num_tokens: int) -> None:
        """Make room for the next tokens; their number must be within the capacity."""
        end = -(-(blocks.num_tokens + num_tokens) // self.block_size)
        for pool, table in ((self.full_pool, blocks.full), (self.window_pool, blocks.window)):
            while table.end < end:
                table.append(pool.allocate())

    def commit(self, blocks: SequenceBlocks, token_ids: Sequence[int], num_tokens: int) -> None:
        """The next tokens have been computed: publish the blocks that they filled, let go what the window left."""
        first = blocks.num_tokens // self.block_size
        blocks.num_tokens += num_tokens
        end = blocks.num_tokens // self.block_size
        if end > first:
            keys = self.keys(blocks, token_ids, end)
            for i in range(first, end):
                _publish_or_share(self.full_pool, blocks.full, i, keys[i])
                _publish_or_share(self.window_pool, blocks.window, i, keys[i])
        while blocks.window.start < self._first_window_block(blocks.num_tokens):
            goes_first = blocks.window.start not in blocks.kept_windows
            self.window_pool.release(blocks.window.pop_first(), goes_first=goes_first)

    def release(self, blocks: SequenceBlocks, token_ids: Sequence[int]) -> None:
        """Take everything back from a sequence; what is published stays findable."""
        num_blocks = blocks.num_tokens // self.block_size
        tail = list(token_ids[num_blocks * self.block_size : blocks.num_tokens])
        if tail:
            key = (self.keys(blocks, token_ids, num_blocks)[num_blocks - 1] if num_blocks else blocks.root) + _TAIL
            for pool, table, tails in (
                (self.full_pool, blocks.full, self._full_tails),
                (self.window_pool, blocks.window, self._window_tails),
            ):
                block = int(table.blocks[num_blocks])
                pool.publish(block, key)
                tails[block] = tail
        # The last block goes first: without the blocks before it, it could not be used.
        for pool, table in ((self.full_pool, blocks.full), (self.window_pool, blocks.window)):
            while table.end > table.start:
                pool.release(table.pop_last())
            table.start = table.end = 0
        blocks.num_tokens = 0

    @property
    def num_to_start(self) -> int:
        """Window blocks that must be free for a sequence to start, however long it is."""
        return 0 if self._window is None else blocks_in_window(self._window, self.block_size)

    def _first_window_block(self, num_tokens: int) -> int:
        """The index of the first block that holds a token which the next token may see in a window layer."""
        return 0 if self._window is None else max(0, num_tokens - self._window + 1) // self.block_size


def blocks_in_window(window: int, block_size: int) -> int:
    """The most blocks that so many tokens in a row can touch."""
    return 1 if window == 1 else (window - 2) // block_size + 2


class _WindowRun(NamedTuple):
    start: int
    end: int
    blocks: list[int]


class _Tail(NamedTuple):
    full_block: int
    window_block: int
    num_tokens: int


def _publish_or_share(pool: BlockPool, table: BlockTable, index: int, key: bytes) -> None:
    block, other = int(table.blocks[index]), pool.find(key)
    if other is None:
        pool.publish(block, key)
    elif other != block:
        # Two sequences computed the same prefix at the same time: one copy is enough.
        pool.share(other)
        pool.release(block)
        table.blocks[index] = other
