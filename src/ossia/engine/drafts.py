"""What may come next in a sequence, copied from what stands in it already: prompt lookup.

Answers repeat what they were given: code that is edited, a page that is quoted, the names of a tool's fields. Where the
last tokens of a sequence stand in it earlier as well, those that followed there are a draft of what follows here. A
pass computes a draft beside the token that it would compute anyway, each of its tokens at a fraction of a pass of its
own, since the weights are read once. What is sampled does not change: every token is drawn from its own logits, and the
draft only says for how many tokens these are known already.

Sources  the lookup: A. Saxena, https://github.com/apoorvumang/prompt-lookup-decoding; drafts that are verified in one
         pass: arXiv:2211.17192, where a token that was drawn is compared in place of probabilities.
"""

from __future__ import annotations

import numpy as np

# So many of the last tokens must stand earlier.
_MATCHED = 3
# A token's bits in a key of that many.
_BITS = 21


class Drafts:
    """Finds drafts in one sequence's tokens, of which it is told by their list alone: that only grows."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        # By the tokens before it, the place that last followed them.
        self._places: dict[int, int] = {}
        # Up to which place.
        self._end = _MATCHED

    def propose(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that may come next; the more, the longer the run that stands earlier."""
        token_ids, end = self._token_ids, len(self._token_ids)
        if limit < 1 or end < _MATCHED:
            return []
        self._note(end)
        place = self._places.get(_key(token_ids[end - _MATCHED :]))
        if place is None:
            return []
        matched = _MATCHED
        while (
            matched < limit + _MATCHED - 1 and matched < place and token_ids[place - matched - 1] == token_ids[~matched]
        ):
            matched += 1
        draft = token_ids[place : place + matched - _MATCHED + 1]
        # A place this near to the end is a circle: what follows is the draft again.
        while len(draft) < matched - _MATCHED + 1:
            draft.append(draft[place - end])
        return draft

    def _note(self, end: int) -> None:
        """Take in all places before the end."""
        first = self._end
        if end - first > 64:
            # A prompt, at once.
            tokens = np.array(self._token_ids[first - _MATCHED : end - 1], np.int64)
            keys = tokens[:-2] << 2 * _BITS | tokens[1:-1] << _BITS | tokens[2:]
            self._places.update(zip(keys.tolist(), range(first, end), strict=True))
        else:
            for place in range(first, end):
                self._places[_key(self._token_ids[place - _MATCHED : place])] = place
        self._end = max(first, end)


def _key(token_ids: list[int]) -> int:
    first, second, third = token_ids
    return first << 2 * _BITS | second << _BITS | third
