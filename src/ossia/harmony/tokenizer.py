"""Text to token ids and back, for any byte-pair vocabulary that has harmony's special tokens.

A vocabulary is bytes <-> id for the ordinary tokens, name <-> id for the special ones. No id is written down here:
special tokens are asked for by name.

Text is always encoded as ordinary text. ``encode("<|end|>")`` gives the five tokens that spell those
characters; the only way to a special id is ``special("<|end|>")``, so no user, file or tool text can become one.

Sources  tiktoken (Apache-2.0 vocabulary ``o200k_base``, sha256 in tests/harmony/test_tokenizer.py);
         the ``tokenizer.json`` of Hugging Face tokenizers, model "BPE" over byte-level characters (the GPT-2 alphabet).
"""

from __future__ import annotations

import codecs
import hashlib
import heapq
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from importlib import resources
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import regex  # type: ignore[import-untyped]
import tiktoken

from ossia.errors import CheckpointError, NotFoundError

# The splitting patterns in wide use, all of which match every character of every text. Source: tiktoken_ext, GPT-2.
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TOTAL_PATTERNS = frozenset({O200K_PATTERN, CL100K_PATTERN, GPT2_PATTERN})

O200K_NUM_ORDINARY = 199_998
O200K_HARMONY_VOCAB_SIZE = 201_088
_O200K_HARMONY_NAMED = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
# Digest of o200k as a tokenizer.json spells it: tokens in order of id, then merges as "left right", a line for each.
# A file that has it needs no further proof that ranks alone give its ids, whatever it says of ignore_merges: every
# token of o200k is reachable by merges.
_O200K_SHA256 = "78eb66dd69e92c26a7c293e991384ca6743f943c6dfa188adf495b02f7149279"
# Digests of whole files of that vocabulary: the one of openai/gpt-oss-*, and what `to_tokenizer_json` writes for it. A
# digest takes some hundredths of a second; reading the half a million merges takes more than one.
_O200K_HARMONY_FILES = frozenset(
    {
        "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
        "53b119577cbbcd63d3b8cc1efad90dd3031f8792e2747fd8a30e79c8f4852963",
    }
)

REPLACEMENT = "\ufffd"
_REPLACEMENT_BYTES = REPLACEMENT.encode()

# tiktoken's regular expressions give up (and abort) on whitespace runs of some 300,000 characters.
_LONG_WHITESPACE = 65_536


class _BytesOfId(dict[int, bytes]):
    """Bytes of a token id; an id that the vocabulary does not know decodes to U+FFFD, so decoding cannot fail."""

    def __missing__(self, token_id: int) -> bytes:
        return _REPLACEMENT_BYTES


class _Merges(NamedTuple):
    """An explicit merge list: pairs of token bytes in order of priority, and whether whole pieces bypass it."""

    pairs: Sequence[tuple[bytes, bytes]]
    ignore_merges: bool


class Tokenizer:
    """A byte-pair vocabulary with special tokens.

    ``ordinary`` maps token bytes to id, ``special_tokens`` name to id. Without ``merges`` the id of an ordinary token
    is its merge priority (tiktoken's rule); with them the list decides (Hugging Face's rule).
    Instances are immutable and may be shared between threads.
    """

    def __init__(
        self,
        ordinary: dict[bytes, int],
        special_tokens: dict[str, int],
        *,
        pattern: str = O200K_PATTERN,
        merges: _Merges | None = None,
        name: str = "byte-pair",
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.special_tokens = dict(special_tokens)
        self._ordinary = ordinary
        self._merges = merges
        self._bytes_of = _BytesOfId(zip(ordinary.values(), ordinary.keys(), strict=True))
        self._bytes_of.update((i, text.encode()) for text, i in special_tokens.items())
        self.special_ids = frozenset(special_tokens.values())
        self.vocab_size = max(self._bytes_of, default=-1) + 1

    @classmethod
    def o200k_harmony(cls) -> Tokenizer:
        """gpt-oss's own vocabulary, from inside the package. Built once per process; nothing is downloaded."""
        return _o200k_harmony()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """A checkpoint's ``tokenizer.json`` (or the folder that holds one); same ids as the tokenizers library.

        Raises NotFoundError without such a file, CheckpointError when it is damaged or no byte-level BPE.
        """
        return _read_tokenizer_json(Path(path))

    @classmethod
    def from_document(cls, document: dict[str, Any], where: str) -> Tokenizer:
        """What a ``tokenizer.json`` holds; ``where`` names it in errors.

        Raises CheckpointError when it is damaged or no byte-level BPE.
        """
        try:
            return _from_document(document, where)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{where} is not a byte-level BPE tokenizer.json: {type(error).__name__}: {error}"
            ) from error

    # -- text to ids -------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as ordinary text, whatever it spells. Lone surrogates are encoded as U+FFFD."""
        if len(text) > _LONG_WHITESPACE and _may_have_long_whitespace(text):
            return [i for part in _cut_long_whitespace(text) for i in self._encode(part)]
        return self._encode(text)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        # Built at the first encode: a process that only decodes does not pay some 0.2 s for it.
        if self._merges is None:
            return tiktoken.Encoding(
                self.name, pat_str=self.pattern, mergeable_ranks=self._ordinary, special_tokens={}
            ).encode_ordinary
        return _MergeEncoder(self._ordinary, self._merges, self.pattern).encode

    def special(self, name: str) -> int:
        """Id of the special token ``name``, for example ``"<|start|>"``."""
        try:
            return self.special_tokens[name]
        except KeyError:
            known = ", ".join(sorted(n for n in self.special_tokens if "reserved" not in n)) or "none"
            raise CheckpointError(
                f"tokenizer {self.name!r} has no special token {name!r}; it has {known}. "
                "Harmony needs a gpt-oss vocabulary (o200k_harmony)."
            ) from None

    @cached_property
    def stop_ids(self) -> tuple[int, int]:
        """Where generation of an assistant turn stops: ``<|return|>`` (done) and ``<|call|>`` (a tool is to run)."""
        return self.special("<|return|>"), self.special("<|call|>")

    # -- ids to text -------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; a special token's are its name, an unknown id's are U+FFFD's."""
        return self._bytes_of[token_id]

    def token_of(self, spelling: bytes) -> int | None:
        """The ordinary token of exactly these bytes, if there is one."""
        return self._ordinary.get(spelling)

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(map(self._bytes_of.__getitem__, token_ids))

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(token_ids).decode("utf-8", "replace")

    @cached_property
    def whole_text(self) -> dict[int, str]:
        """Memo of ordinary tokens whose bytes are UTF-8 by themselves; filled by whoever streams (see parser.py)."""
        return {}

    # -- tokenizer.json ----------------------------------------------------------------------------

    def to_tokenizer_json(self) -> str:
        """The vocabulary as the text of a ``tokenizer.json`` that tokenizers and transformers load, with equal ids."""
        spelled = {i: token.decode("latin-1").translate(_BYTE_TO_CHAR) for token, i in self._ordinary.items()}
        vocab = {spelled[i]: i for i in sorted(spelled)}
        if self._merges is None:
            pairs, ignore_merges = _all_splits(vocab), True
        else:
            pairs = [
                (
                    left.decode("latin-1").translate(_BYTE_TO_CHAR),
                    right.decode("latin-1").translate(_BYTE_TO_CHAR),
                )
                for left, right in self._merges.pairs
            ]
            ignore_merges = self._merges.ignore_merges
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **flags}
                for name, i in sorted(self.special_tokens.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": {**byte_level, "trim_offsets": False, "use_regex": True},
            "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": ignore_merges,
                "vocab": vocab,
                "merges": pairs,
            },
        }
        return json.dumps(document, ensure_ascii=False)


class StreamDecoder:
    """Tokens to text as they come: an incomplete UTF-8 character is held back until its last byte is there.

    The pieces of ``feed`` and the rest from ``finish`` join to exactly ``tokenizer.decode`` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer._bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of[token_id])

    def finish(self) -> str:
        """What was held back; the decoder may be used again afterwards."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    @property
    def pending(self) -> bool:
        """Whether bytes are held back."""
        return bool(self._utf8.getstate()[0])


# -- the vocabulary in the package -----------------------------------------------------------------


@lru_cache(maxsize=1)
def _o200k_harmony() -> Tokenizer:
    tokens = _o200k_tokens()
    # The published files name two ids differently in places; every id that has no name of its own is reserved.
    taken = {i: name for name, i in _O200K_HARMONY_NAMED.items()}
    special = {taken.get(i, f"<|reserved_{i}|>"): i for i in range(O200K_NUM_ORDINARY, O200K_HARMONY_VOCAB_SIZE)}
    return Tokenizer(dict(zip(tokens, range(len(tokens)), strict=True)), special, name="o200k_harmony")


def _o200k_tokens() -> list[bytes]:
    """Token bytes in order of id.

    The file is zlib over one length byte for each token, then all tokens' bytes end to end: 1.0 MB and some 80 ms to
    open, where the published base64 text is 3.6 MB and some 330 ms. (xz is 0.8 MB, and 50 ms slower.)
    """
    packed = resources.files("ossia.harmony").joinpath("data/o200k_base.zlib").read_bytes()
    data = zlib.decompress(packed)
    tokens = []
    end = O200K_NUM_ORDINARY
    for length in data[:O200K_NUM_ORDINARY]:
        start, end = end, end + length
        tokens.append(data[start:end])
    return tokens


# -- long whitespace -------------------------------------------------------------------------------


def _may_have_long_whitespace(text: str) -> bool:
    # A long run covers two neighbours of a half-as-long raster, so prose is cleared by a few dozen looks.
    raster = (text[i].isspace() for i in range(0, len(text), _LONG_WHITESPACE // 2))
    return any(a and b for a, b in pairwise(raster))


def _cut_long_whitespace(text: str) -> Iterator[str]:
    start = 0
    for run in _WHITESPACE.finditer(text):
        for cut in range(run.start() + _LONG_WHITESPACE, run.end(), _LONG_WHITESPACE):
            yield text[start:cut]
            start = cut
    yield text[start:]


_WHITESPACE = re.compile(r"\s+")


# -- explicit merges -------------------------------------------------------------------------------


class _MergeEncoder:
    """Byte-pair encoding by an explicit merge list: the best-ranked pair first, leftmost among equals.

    Slower than tiktoken; used where ranks alone would not give the ids of the tokenizers library.
    """

    def __init__(self, ordinary: dict[bytes, int], merges: _Merges, pattern: str) -> None:
        self._ordinary = ordinary
        self._ignore_merges = merges.ignore_merges
        self._merge = {
            (ordinary[left], ordinary[right]): (rank, ordinary[left + right])
            for rank, (left, right) in enumerate(merges.pairs)
        }
        self._find_pieces = regex.compile(pattern).finditer
        self._encode_piece = lru_cache(maxsize=65_536)(self._merge_piece)

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self._encode_piece(piece)
        return ids

    def _pieces(self, text: str) -> Iterable[str]:
        end = 0
        for match in self._find_pieces(text):
            if match.start() > end:  # What the pattern skips is a piece of its own.
                yield text[end : match.start()]
            if match.end() > match.start():
                yield match.group()
            end = match.end()
        if end < len(text):
            yield text[end:]

    def _merge_piece(self, piece: str) -> tuple[int, ...]:
        data = piece.encode()
        if self._ignore_merges and data in self._ordinary:
            return (self._ordinary[data],)
        # Bytes outside the vocabulary vanish, as they do in the tokenizers library without an unknown token.
        ids = [self._ordinary[b] for b in (data[i : i + 1] for i in range(len(data))) if b in self._ordinary]
        num = len(ids)
        following = list(range(1, num + 1))
        previous = list(range(-1, num - 1))
        alive = [True] * num
        heap = [(self._merge[p][0], i, p) for i, p in enumerate(pairwise(ids)) if p in self._merge]
        heapq.heapify(heap)
        while heap:
            _, i, (left, right) = heapq.heappop(heap)
            j = following[i]
            if not alive[i] or j >= num or (ids[i], ids[j]) != (left, right):
                continue  # One of the two has been merged into another since.
            ids[i] = self._merge[left, right][1]
            alive[j] = False
            following[i] = following[j]
            if following[j] < num:
                previous[following[j]] = i
            for a, b in ((previous[i], i), (i, following[i])):
                if a >= 0 and b < num and (pair := (ids[a], ids[b])) in self._merge:
                    heapq.heappush(heap, (self._merge[pair][0], a, pair))
        return tuple(token for token, living in zip(ids, alive, strict=True) if living)


# -- tokenizer.json --------------------------------------------------------------------------------


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest moves to U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(moved)}


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {ord(c): chr(b) for b, c in _BYTE_TO_CHAR.items()}


def _all_splits(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merge list that says the same as ranks: each token may come from every two tokens that spell it.

    Order as in the published file: by the token that results, then by the ids of its halves.
    """
    merges = []
    for token in vocab:
        splits = [
            (vocab[left], vocab[right], left, right)
            for cut in range(1, len(token))
            if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab
        ]
        splits.sort()
        merges += [(left, right) for _, _, left, right in splits]
    return merges


def _read_tokenizer_json(path: Path) -> Tokenizer:
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"no tokenizer at {path}; expected a Hugging Face tokenizer.json") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(text).hexdigest() in _O200K_HARMONY_FILES:
        return Tokenizer.o200k_harmony()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); expected a Hugging Face tokenizer.json") from error
    return Tokenizer.from_document(document, str(path))


def _from_document(document: dict[str, Any], where: str) -> Tokenizer:
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{where}: model type {model['type']!r}; expected 'BPE'")
    if document.get("normalizer") is not None:
        raise CheckpointError(f"{where}: has a normalizer; a byte-level vocabulary encodes text as it is")
    pattern = _split_pattern(document.get("pre_tokenizer"), where)
    special = {str(t["content"]): int(t["id"]) for t in document.get("added_tokens", ())}
    vocab: dict[str, int] = {token: i for token, i in model["vocab"].items() if token not in special}
    if pattern == O200K_PATTERN and _is_o200k(vocab, model["merges"]):
        return Tokenizer(Tokenizer.o200k_harmony()._ordinary, special, pattern=pattern, name=where)
    pairs = [_merge_pair(merge) for merge in model["merges"]]
    ordinary = {token.translate(_CHAR_TO_BYTE).encode("latin-1"): i for token, i in vocab.items()}
    ignore_merges = bool(model.get("ignore_merges", False))
    if pattern in _TOTAL_PATTERNS and ignore_merges and _ranks_suffice(vocab, ordinary, pairs):
        return Tokenizer(ordinary, special, pattern=pattern, name=where)
    as_bytes = [
        (left.translate(_CHAR_TO_BYTE).encode("latin-1"), right.translate(_CHAR_TO_BYTE).encode("latin-1"))
        for left, right in pairs
    ]
    if unknown := next((a + b for a, b in as_bytes if not {a, b, a + b} <= ordinary.keys()), None):
        raise CheckpointError(f"{where}: the merge that makes {unknown!r} names tokens outside the vocabulary")
    return Tokenizer(ordinary, special, pattern=pattern, merges=_Merges(as_bytes, ignore_merges), name=where)


def _merge_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _is_o200k(vocab: dict[str, int], merges: list[str] | list[list[str]]) -> bool:
    if list(vocab.values()) != list(range(O200K_NUM_ORDINARY)):
        return False
    lines = chain(vocab, (merge if isinstance(merge, str) else " ".join(merge) for merge in merges))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() == _O200K_SHA256


def _ranks_suffice(vocab: dict[str, int], ordinary: dict[bytes, int], pairs: list[tuple[str, str]]) -> bool:
    """Whether tiktoken's rule (the id is the priority) gives the ids that the merge list gives."""
    in_id_order = dict(sorted(vocab.items(), key=lambda item: item[1]))
    return all(bytes([b]) in ordinary for b in range(256)) and pairs == _all_splits(in_id_order)


def _split_pattern(pre_tokenizer: dict[str, Any] | None, where: str) -> str:
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    *splits, byte_level = steps or [{"type": "nothing"}]
    if byte_level["type"] == "ByteLevel" and not byte_level.get("add_prefix_space", False):
        if not splits and byte_level.get("use_regex", True):
            return GPT2_PATTERN
        if len(splits) == 1 and splits[0]["type"] == "Split" and not byte_level.get("use_regex", True):
            how = splits[0]["behavior"], splits[0].get("invert", False)
            if how in {("Isolated", False), ("Removed", True)}:
                return str(splits[0]["pattern"]["Regex"])
    raise CheckpointError(
        f"{where}: pre_tokenizer {json.dumps(pre_tokenizer)[:200]} is not understood; expected one Split by a Regex "
        "and then ByteLevel, as gpt-oss has"
    )
