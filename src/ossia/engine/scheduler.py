"""Which sequences take part in the next step, and with how many tokens.

Every running sequence that has one token to compute (decode) takes part in every step that has memory for it. The rest
of the step's tokens go to prompts in order of arrival, in chunks; while others come behind it, a prompt takes at most
three quarters of what is left, so that a short one behind a long one is not held up. When memory is short the sequence
that came last gives up its blocks and waits; its tokens are computed again later, as far as they cannot be found again.
The sequence that came first can therefore always go on, and every sequence becomes the first one at some time: none
starves.

What the step has to spare then goes to drafts of what may come next: few tokens in all, since each costs a part of a
pass and may be for nothing.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from ossia.engine.batch import Scheduled
from ossia.engine.block_manager import BlockManager, PrefixHit
from ossia.engine.request import Sequence


@dataclass(slots=True)
class Totals:
    """What an engine has done since it was made."""

    num_steps: int = 0
    # Tokens of all prompts that were started, and how many of those did not have to be computed.
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    # Tokens that went through the model, those computed again after a preemption included.
    num_computed_tokens: int = 0
    num_sampled_tokens: int = 0
    # Tokens of drafts, which are computed too, and how many of them were then sampled.
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0


class Scheduler:
    """Holds the sequences under way; `waiting` and `running` are in order of arrival."""

    def __init__(
        self, blocks: BlockManager, max_batch_tokens: int, max_num_seqs: int, totals: Totals, draft_tokens: int = 0
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._totals = totals
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._draft_tokens = draft_tokens
        # Each running sequence can then decode in every step.
        self._max_num_running = min(max_num_seqs, max_batch_tokens)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._blocks.release(sequence.blocks, sequence.token_ids)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step; empty only if there is no sequence at all. Blocks for it are reserved."""
        budget = self._max_batch_tokens - sum(sequence.num_uncomputed == 1 for sequence in self.running)
        num_preemptions = self._totals.num_preemptions
        scheduled: list[Scheduled] = []
        # Memory goes by arrival; the tail of `running` may be preempted on the way.
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            is_decode = sequence.num_uncomputed == 1
            wanted = 1 if is_decode else self._share(sequence, budget)
            num_tokens = min(wanted, self._make_room(i)) if wanted else 0
            if num_tokens:
                self._blocks.reserve(sequence.blocks, num_tokens)
                scheduled.append(Scheduled(sequence, num_tokens))
                budget -= 0 if is_decode else num_tokens
            i += 1
        if num_preemptions == self._totals.num_preemptions:
            budget = self._admit(scheduled, budget)
        return self._draft(*self._spend(scheduled, budget))

    def _share(self, sequence: Sequence, budget: int) -> int:
        """The tokens of a prompt that may be computed now."""
        is_last = not self.waiting and not any(
            other.request_id > sequence.request_id and other.num_uncomputed > 1 for other in self.running
        )
        return min(sequence.num_uncomputed, budget if is_last else budget - budget // 4)

    def _make_room(self, index: int) -> int:
        """Tokens that memory allows the running sequence, after preempting later ones if it allows none."""
        sequence = self.running[index]
        while True:
            num_later = len(self.running) - 1 - index
            # A long prompt must not stop the decodes behind it, nor a short prompt that waits.
            num_spared = len(self.running) + self._blocks.num_to_start if self.waiting else num_later
            room = self._blocks.capacity(sequence.blocks, num_spared)
            if room < 1:
                room = min(self._blocks.capacity(sequence.blocks), self._blocks.block_size)
            if room >= 1 or not num_later:
                return max(room, 0)
            self._preempt(self.running.pop())

    def _preempt(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks, sequence.token_ids)
        insort(self.waiting, sequence, key=_arrival)
        self._totals.num_preemptions += 1

    def _admit(self, scheduled: list[Scheduled], budget: int) -> int:
        """Start waiting sequences as far as the step and memory allow; the budget that is left."""
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) >= self._max_num_running:
                break
            hit = self._blocks.match(sequence.blocks, sequence.token_ids[: sequence.num_reusable + 1])
            if self._is_being_computed(sequence, hit):
                continue
            if self.running and not self._blocks.can_admit(hit, len(sequence.token_ids) + 1, len(self.running)):
                break
            self._blocks.acquire(sequence.blocks, hit, len(sequence.token_ids))
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = hit.num_tokens
                self._totals.num_prompt_tokens += sequence.num_prompt_tokens
                self._totals.num_cached_tokens += hit.num_tokens
            self.waiting.remove(sequence)
            room = self._blocks.capacity(sequence.blocks, len(self.running))
            num_tokens = min(self._share(sequence, budget), room)
            assert num_tokens >= 1
            insort(self.running, sequence, key=_arrival)
            self._blocks.reserve(sequence.blocks, num_tokens)
            scheduled.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens
        return budget

    def _is_being_computed(self, sequence: Sequence, hit: PrefixHit) -> bool:
        """Whether a running sequence computes the very block that this one needs next: then waiting saves work."""
        size = self._blocks.block_size
        index = hit.num_tokens // size
        if index >= sequence.num_reusable // size:
            return False
        key = sequence.blocks.keys[index]
        for other in self.running:
            if other.num_uncomputed > 1 and index < len(other.token_ids) // size:
                keys = self._blocks.keys(other.blocks, other.token_ids, index + 1)
                if keys[index] == key and other.blocks.num_tokens < (index + 1) * size:
                    return True
        return False

    def _spend(self, scheduled: list[Scheduled], budget: int) -> tuple[list[Scheduled], int]:
        """Give what is left of the budget to the prompts in the step, first come first served."""
        for i, (sequence, num_tokens, _) in enumerate(scheduled):
            if budget < 1:
                break
            if num_tokens < sequence.num_uncomputed:
                room = self._blocks.capacity(sequence.blocks, len(self.running))
                total = min(sequence.num_uncomputed, num_tokens + budget, room)
                if total > num_tokens:
                    self._blocks.reserve(sequence.blocks, total)
                    scheduled[i] = Scheduled(sequence, total)
                    budget -= total - num_tokens
        return scheduled, budget

    def _draft(self, scheduled: list[Scheduled], budget: int) -> list[Scheduled]:
        """Add drafts where the next token is sampled, each sequence with its share."""
        num_sampled = sum(one.is_sampled for one in scheduled)
        # The more sequences there are, the less is gained: their own tokens have the weights read already.
        share = (self._draft_tokens + 1) // max(1, num_sampled) - 1
        if share < 1:
            return scheduled
        for i, one in enumerate(scheduled):
            sequence = one.sequence
            if one.is_sampled:
                room = self._blocks.capacity(sequence.blocks, len(self.running)) - one.num_tokens
                still_asked = sequence.max_tokens - sequence.num_output_tokens
                draft = sequence.drafts.propose(min(share, budget, room, still_asked - 1))
                if draft:
                    self._blocks.reserve(sequence.blocks, one.num_tokens + len(draft))
                    scheduled[i] = one._replace(draft=tuple(draft))
                    budget -= len(draft)
        return scheduled


def _arrival(sequence: Sequence) -> int:
    return sequence.request_id
