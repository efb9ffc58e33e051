"""A small byte-pair vocabulary with harmony's special tokens, made from texts.

    tokenizer = train_vocabulary(texts, vocab_size=2048)
    (folder / "tokenizer.json").write_text(tokenizer.to_tokenizer_json())

What differs from o200k lets a small model copy, which is to give the same token again. Digits are single tokens. The
most common words of the texts are pieces of their own; every other word, an invented name above all, is cut into
syllables. A blank joins the word behind it only if that word hardly ever stands without one: all others have the same
tokens after a blank, an underscore, a quote or a line break.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from ossia.errors import ConfigError
from ossia.harmony import Tokenizer

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
# A syllable is what stands before a vowel, and the vowel; what is left at the end is one more piece.
_REST_OF_PATTERN = (
    r"[A-Za-z][^\W\d_aeiouA-Z]*[aeiou]|[A-Z]+(?![a-z])|[A-Za-z][^\W\d_aeiouA-Z]*|[0-9]| ?[^\sA-Za-z0-9]+|\s+"
)
_WORD = re.compile(r"( ?)(?<![A-Za-z])([A-Za-z][a-z]*)(?![A-Za-z])")
# Share of a word's places that are behind a blank, from which on the blank is part of it.
_JOINED_SHARE = 0.95


def train_vocabulary(
    texts: Iterable[str], vocab_size: int, *, num_common_words: int = 400, min_frequency: int = 4
) -> Tokenizer:
    """A vocabulary of exactly ``vocab_size`` ids: 256 bytes, merges, and the special tokens as the last ids.

    Merges come from the most frequent pairs of ``texts`` (library `tokenizers`); nothing is merged across the ends of a
    text. Raises ConfigError if the texts do not have enough pairs, or if there is no room for bytes and special tokens.
    """
    # Imported here: an extra of training, not needed by anything that runs a model.
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as LibraryTokenizer

    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 256:
        raise ConfigError(f"{vocab_size} ids have no room for 256 bytes and {len(SPECIAL_TOKENS)} special tokens")
    texts = list(texts)
    pattern = splitting_pattern(texts, num_common_words)
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=min_frequency,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(texts, trainer)
    document = json.loads(library.to_str())
    if (found := len(document["model"]["vocab"])) < room:
        raise ConfigError(f"the texts give {found} tokens of {room} that were asked for; give more texts or fewer ids")
    document["added_tokens"] = [{"id": room + i, "content": name} for i, name in enumerate(SPECIAL_TOKENS)]
    return Tokenizer.from_document(document, "vocabulary")


def splitting_pattern(texts: Iterable[str], num_common_words: int) -> str:
    """The regular expression that cuts a text into the pieces within which tokens are merged."""
    counts, joined_counts = Counter[str](), Counter[str]()
    for text in texts:
        for blank, word in _WORD.findall(text):
            counts[word] += 1
            joined_counts[word] += blank == " "
    common = sorted(word for word, _ in counts.most_common(num_common_words))
    if not common:
        return _REST_OF_PATTERN
    joined = [word for word in common if joined_counts[word] >= _JOINED_SHARE * counts[word]]
    behind_blank = rf" (?:{'|'.join(joined)})(?![A-Za-z])|" if joined else ""
    return rf"{behind_blank}(?<![A-Za-z])(?:{'|'.join(common)})(?![A-Za-z])|{_REST_OF_PATTERN}"
