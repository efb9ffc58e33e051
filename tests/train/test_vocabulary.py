"""Vocabularies made from texts: names that copy, exact sizes, the same ids in the tokenizers library."""

from __future__ import annotations

import random

import pytest

from ossia.errors import ConfigError
from ossia.harmony import Tokenizer
from ossia.train.tasks.language import draw_copy, draw_recall
from ossia.train.vocabulary import SPECIAL_TOKENS, train_vocabulary


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    plain = ["the name is of the town and the year", "set the thing in the town"] * 50
    return [draw(rng) for draw in (draw_copy, draw_recall) for _ in range(300)] + plain


@pytest.fixture(scope="module")
def vocabulary(texts) -> Tokenizer:
    return train_vocabulary(texts, 600, num_common_words=30)


def test_it_has_exactly_the_ids_that_were_asked_for(vocabulary):
    assert vocabulary.vocab_size == 600
    assert [vocabulary.special(name) for name in SPECIAL_TOKENS] == list(range(591, 600))


def test_a_name_has_the_same_tokens_wherever_it_stands(vocabulary):
    for name in ("zorvek", "Brasas", "Tolimand"):
        alone = vocabulary.encode(name)
        for before in (" ", "_", '"', "\n", "=", "."):
            assert vocabulary.encode(before + name)[-len(alone) :] == alone


def test_a_word_that_is_always_behind_a_blank_takes_it_along(vocabulary):
    assert len(vocabulary.encode(" town")) == 1


def test_a_common_word_that_also_stands_alone_is_the_same_token_everywhere(vocabulary):
    (the,) = vocabulary.encode("the")
    for before in (" ", '"', "\n", "_"):
        assert vocabulary.encode(f"{before}the")[-1] == the


def test_digits_stand_alone(vocabulary):
    assert [vocabulary.decode([one]) for one in vocabulary.encode("12345")] == list("12345")


def test_every_text_comes_back(vocabulary, texts):
    for text in [*texts[:50], "héllo ✓ \x00\n\n  end", "\U0001f600"]:
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_the_tokenizers_library_gives_the_same_ids(vocabulary, texts, tmp_path):
    library = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(vocabulary.to_tokenizer_json())
    other = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(tmp_path)
    for text in [*texts[:100], "Hello, the WORLD!  été\n\tx", " the theory"]:
        assert other.encode(text, add_special_tokens=False).ids == vocabulary.encode(text) == again.encode(text)


def test_too_few_texts_or_ids_are_refused(texts):
    with pytest.raises(ConfigError, match="give more texts"):
        train_vocabulary(["abc abc abc abc abc"], 600)
    with pytest.raises(ConfigError, match="no room"):
        train_vocabulary(texts, 200)
