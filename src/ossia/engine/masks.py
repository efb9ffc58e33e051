"""The grammar of a turn as token masks: what may come next, one bit for each token.

    compiler = GrammarCompiler(tokenizer)                  once for a vocabulary: some seconds
    constraint = compiler.constraint(grammar)              once for a request: microseconds when the grammar is known
    SamplingParams(constraint=constraint, ...)             the engine fills masks beside the forward pass

Shapes   V tokens of the vocabulary; a mask is uint32 [ceil(V / 32)], bit i % 32 of word i // 32 for token i.
Sources  llguidance (Earley parser over a lexer of regex derivatives, walked along the vocabulary's trie).
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import llguidance
import numpy as np
import numpy.typing as npt

from ossia.errors import InputError, OssiaError
from ossia.harmony.grammar import Part, TurnGrammar
from ossia.harmony.strict_schema import subschemas

# What the masks of one generation may cost, in seconds of a processor. A mask takes some 30 microseconds; only patterns
# that are made to be slow come near, and others wait for them.
_MASK_BUDGET_S = 2.0
_MASK_BUDGET_PER_TOKEN_S = 0.01
# What llguidance says of a token that its mask does not hold.
_NOT_ALLOWED = "doesn't satisfy the grammar"
# What llguidance says when an automaton holds as many states as it may. A state is about half a kilobyte.
_IS_FULL = "too many states"
_MAX_STATES = 50_000
# A turn that fills an automaton by itself, sooner than this after it was begun, is too much for one.
_MIN_TOKENS_BETWEEN = 50
# How long the place of a fault in a schema is looked for.
_SEARCH_S = 1.0


class Vocabulary(Protocol):
    """What a compiler needs to know of tokens; harmony's Tokenizer is one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_of(self, spelling: bytes) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the latest. May be used from any thread.

    Compiling takes some milliseconds, and for the largest schemas that are accepted up to about a second, without the
    interpreter's lock: call it beside an event loop, not in it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        max_grammars: int = 256,
        max_grammar_chars: int = 16_000_000,
        max_states: int = _MAX_STATES,
    ) -> None:
        self._special = {name: vocabulary.special_tokens[name] for name in _FRAME if name in vocabulary.special_tokens}
        if missing := [name for name in _FRAME if name not in self._special]:
            raise InputError(f"the vocabulary lacks {', '.join(missing)}; a turn's grammar needs a harmony vocabulary")
        self._vocabulary = vocabulary
        wrapped = _Wrapped(vocabulary)
        self._longest = max(map(len, wrapped.tokens))
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(wrapped))
        self._opening = [self._special["<|start|>"], *vocabulary.encode("assistant")]
        self._max_grammars = max_grammars
        self._max_grammar_chars = max_grammar_chars
        self._max_states = max_states
        self._lock = threading.Lock()
        # Text of a grammar -> a matcher at its beginning, latest last. Copies share its automaton, which grows.
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._num_chars = 0

    def constraint(self, grammar: TurnGrammar, *, max_reasoning_tokens: int | None = None) -> TurnConstraint:
        """A constraint for one generation behind ``<|start|>assistant``.

        After ``max_reasoning_tokens`` of analysis, in all of its messages, the analysis is closed, no other may
        follow, and the turn goes on to its call or answer. Raises InputError with the ``param`` of the schema or
        grammar that cannot be compiled.
        """
        if max_reasoning_tokens is not None and max_reasoning_tokens < 0:
            raise InputError(f"max_reasoning_tokens is {max_reasoning_tokens}; expected 0 or more")
        cap = max_reasoning_tokens
        if cap is None:
            return self._constraint(self._walk(grammar, grammar.text))
        if cap == 0:
            return self._constraint(self._walk(grammar, grammar.rest, self._opening))
        return self._constraint(self._walk(grammar, grammar.text), cap, self._walk(grammar, grammar.rest))

    def _constraint(self, walk: _Walk, cap: int | None = None, rest: _Walk | None = None) -> TurnConstraint:
        return TurnConstraint(walk, self._vocabulary, self._longest, self._special, cap, rest)

    def _walk(self, grammar: TurnGrammar, text: str, opening: Sequence[int] = ()) -> _Walk:
        def begin(is_worn: bool) -> llguidance.LLMatcher:
            if is_worn:
                with self._lock:
                    self._forget(text)
            return self._matcher(grammar, text)

        return _Walk(begin, opening)

    def _matcher(self, grammar: TurnGrammar, text: str) -> llguidance.LLMatcher:
        with self._lock:
            known = self._compiled.get(text)
            if known is not None:
                self._compiled.move_to_end(text)
                return known.deep_copy()
        matcher = self._compile(text)
        if matcher.is_error():
            raise self._fault(grammar, matcher.get_error())
        with self._lock:
            if text not in self._compiled:
                self._compiled[text] = matcher
                self._num_chars += len(text)
            while len(self._compiled) > self._max_grammars or self._num_chars > self._max_grammar_chars:
                self._forget(next(iter(self._compiled)))
        return matcher.deep_copy()

    def _forget(self, text: str) -> None:
        if self._compiled.pop(text, None) is not None:
            self._num_chars -= len(text)

    def _compile(self, text: str) -> llguidance.LLMatcher:
        limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=self._max_states)
        return llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)

    # -- which part is at fault --------------------------------------------------------------------

    def _fault(self, grammar: TurnGrammar, error: str) -> InputError:
        for part in grammar.parts:
            own = self._error_of(part.source)
            if own is None:
                continue
            where, own = self._place(part, own)
            return InputError(f"{where}cannot be enforced while sampling: {_reason(own)}", param=part.param)
        return InputError(
            f"the tools and formats together cannot be enforced while sampling: {_reason(error)}; "
            "declare fewer or smaller ones",
            param="tools",
        )

    def _error_of(self, source: Mapping[str, Any]) -> str | None:
        matcher = self._compile(json.dumps({"grammars": [source]}))
        return matcher.get_error() if matcher.is_error() else None

    def _place(self, part: Part, error: str) -> tuple[str, str]:
        """Where the fault stands, as deep inside a schema as it can be reproduced alone, and its error there."""
        name = f"{part.param}: " if part.param else ""
        schema = part.source.get("json_schema")
        if schema is None:
            return f"{name}the grammar ", error
        path, around = "#", {key: schema[key] for key in ("x-guidance", "$defs") if key in schema}
        deadline = time.monotonic() + _SEARCH_S
        seen = {path}
        searching = True
        while searching:
            searching = False
            for inner_path, inner in subschemas(schema, path):
                if inner_path in seen or isinstance(inner, bool) or time.monotonic() > deadline:
                    continue
                seen.add(inner_path)
                own = self._error_of({"json_schema": {**around, **inner}})
                if own is not None:
                    path, schema, error, searching = inner_path, inner, own, True
                    break
        return f"{name}the schema at {path} ", error


class _Walk:
    """A matcher on its way through one generation.

    Its automaton is shared by all generations of the grammar and grows with what they meet. One that is full is left to
    them, and the walk is repeated in a new one: what others have sampled is no fault of this generation.
    """

    def __init__(self, begin: Callable[[bool], llguidance.LLMatcher], opening: Sequence[int] = ()) -> None:
        """``begin`` gives a matcher at its beginning, of a new automaton if the known one is worn."""
        self._begin = begin
        self._taken = [*opening]
        # Tokens that were taken when it was last begun anew.
        self._renewed_at: int | None = None
        self._matcher = begin(False)
        self._repeat()

    def compute_mask(self, mask: npt.NDArray[np.uint32], num_words: int) -> str | None:
        """Write the mask; an error for what cannot be followed."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, num_words * 4)
        if not self._matcher.is_error():
            return None
        error = self._matcher.get_error()
        return self.compute_mask(mask, num_words) if self._is_renewed(error) else error

    def certain(self) -> bytes:
        """What has to come next, whatever is chosen; empty where there is a choice."""
        forced: bytes = self._matcher.compute_ff_bytes()
        return forced

    def consume(self, token_id: int) -> str | None:
        """Go on by a token; an error for one that cannot be followed."""
        if self._matcher.consume_token(token_id):
            self._taken.append(token_id)
            return None
        error = self._matcher.get_error()
        return self.consume(token_id) if self._is_renewed(error) else error

    def _is_renewed(self, error: str) -> bool:
        soonest = 0 if self._renewed_at is None else self._renewed_at + _MIN_TOKENS_BETWEEN
        # A token that needs a state too many is also said not to be allowed.
        if (_IS_FULL not in error and _NOT_ALLOWED not in error) or len(self._taken) < soonest:
            return False
        self._renewed_at = len(self._taken)
        self._matcher = self._begin(True)
        return self._repeat()

    def _repeat(self) -> bool:
        return not self._taken or self._matcher.consume_tokens(self._taken)


class TurnConstraint:
    """What may come next in one generation: the engine's Constraint for the grammar of a turn.

    ``is_complete`` is whether the turn has reached its end; where it is not when a generation ends (at max_tokens, at a
    stop string, by abort), the open message is a piece of one and must not be shown as whole.
    ``num_reasoning_tokens`` counts the content of analysis messages so far.
    """

    def __init__(
        self,
        walk: _Walk,
        vocabulary: Vocabulary,
        longest: int,
        special: Mapping[str, int],
        max_reasoning_tokens: int | None = None,
        rest: _Walk | None = None,
    ) -> None:
        self.is_complete = False
        self.num_reasoning_tokens = 0
        self._walk = walk
        self._num_words = -(-vocabulary.vocab_size // 32)
        self._vocabulary = vocabulary
        # Bytes of the longest token.
        self._longest = longest
        self._special = special
        self._special_ids = frozenset(special.values())
        self._stop_ids = (special["<|return|>"], special["<|call|>"])
        self._end_id = special["<|end|>"]
        self._max_reasoning_tokens = max_reasoning_tokens
        self._rest = rest
        # Text of the header that is being emitted; None in content.
        self._header: bytes | None = b""
        self._in_reasoning = False
        self._budget_s = _MASK_BUDGET_S

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        """Write what may come next; see `Constraint.fill`.

        Raises InputError if the client's grammar leaves nothing here, or takes more work than is given to one token.
        """
        if len(mask) < self._num_words:
            raise OssiaError(f"a mask of {len(mask)} words came; this vocabulary needs {self._num_words}")
        if self.is_complete:
            _allow(mask, self._stop_ids)
            return
        mask[self._num_words :] = 0
        began_s = time.thread_time()
        if error := self._walk.compute_mask(mask, self._num_words):
            raise self._too_complex(error)
        self._allow_other_spellings(mask)
        self._budget_s -= time.thread_time() - began_s - _MASK_BUDGET_PER_TOKEN_S
        if self._budget_s < 0:
            raise self._too_complex("its masks take too long")
        if self._ends_reasoning and mask[self._end_id // 32] >> np.uint32(self._end_id % 32) & 1:
            # Not inside of a character: there the grammar asks for its last bytes first.
            _allow(mask, (self._end_id,))
        elif not mask.any():
            raise InputError("nothing can satisfy the tools' or format's grammar at this place; make it wider")

    def accept(self, token_id: int) -> None:
        """Take note of a token. Raises OssiaError for one that ``fill`` has not allowed."""
        if self.is_complete:
            return
        if error := self._walk.consume(token_id):
            if _NOT_ALLOWED not in error:
                raise self._too_complex(error)
            raise OssiaError(f"token {token_id} is not allowed here; only what the mask allows may be accepted")
        if token_id not in self._special_ids:
            if self._in_reasoning:
                self.num_reasoning_tokens += 1
            elif self._header is not None:
                self._header += self._vocabulary.token_bytes(token_id)
        elif token_id in self._stop_ids:
            self.is_complete = True
        elif token_id == self._special["<|message|>"]:
            self._in_reasoning = self._header in (b"analysis", b"assistantanalysis")
            self._header = None
        elif token_id == self._end_id:
            if self._ends_reasoning:
                assert self._rest is not None
                self._walk, self._rest = self._rest, None
            self._in_reasoning = False
            self._header = b""

    def _allow_other_spellings(self, mask: npt.NDArray[np.uint32]) -> None:
        """Add all tokens that a certain text begins with, among which is what the model has learned to write.

        llguidance allows one: it spells the text anew from the last token on, which need not be as it is spelled as a
        whole ("is" behind "alys" as in "analysis", but not in "alysis").
        """
        # Special tokens begin with a byte that no text has.
        certain = self._walk.certain().partition(b"\xff")[0]
        for length in range(1, min(len(certain), self._longest) + 1):
            token_id = self._vocabulary.token_of(certain[:length])
            if token_id is not None:
                mask[token_id // 32] |= np.uint32(1 << token_id % 32)

    @property
    def _ends_reasoning(self) -> bool:
        """Whether the open analysis is to be closed now."""
        return (
            self._in_reasoning
            and self._rest is not None
            and self._max_reasoning_tokens is not None
            and self.num_reasoning_tokens >= self._max_reasoning_tokens
        )

    def _too_complex(self, error: str) -> InputError:
        # Only a client's part can be too much for one token: the frame around it is always the same.
        return InputError(f"the tools' or format's grammar cannot be followed here: {_reason(error)}; make it simpler")


# -- the vocabulary --------------------------------------------------------------------------------

_FRAME = ("<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")


class _Wrapped:
    """A vocabulary in the shape that llguidance asks for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        special = vocabulary.special_tokens
        # A token that may follow where the whole grammar has been met: at the turn's end, where nothing is asked.
        self.eos_token_id = special.get("<|endoftext|>", special["<|return|>"])
        self.bos_token_id = None
        self.tokens: Sequence[bytes] = [vocabulary.token_bytes(i) for i in range(vocabulary.vocab_size)]
        self.special_token_ids = sorted(special.values())
        self._encode = vocabulary.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace"))


def _allow(mask: npt.NDArray[np.uint32], token_ids: Sequence[int]) -> None:
    mask[:] = 0
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)


def _reason(error: str) -> str:
    """What llguidance says, in a line: of its errors in regular expressions the last line says it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (said or lines or ["no reason was given"])[0]
    if "coerce_one_of" in reason:
        return "it is not clear that the options of oneOf exclude each other; say anyOf, or give each a constant"
    return reason[:200]
