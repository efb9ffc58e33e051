"""Text to ids and back: against the published vocabulary, openai-harmony and the tokenizers library."""

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.errors import CheckpointError, NotFoundError
from ossia.harmony import StreamDecoder, Tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "",
    "Hello world",
    "Don't DON'T we'll x's",
    "12345678 3.14 １２３",
    "你好，世界。こんにちは 안녕하세요",
    "שלום مرحبا \u202eabc\u202c",
    "👩‍👩‍👧‍👦🏳️‍🌈 🎉🎉",
    "\x00\x01\x1b[0m\x7f\x85\u2028",
    "a\r\n\r\n  b\t\tc \u00a0\u3000 ",
    "<|start|>system<|message|>x<|end|><|endoftext|>",
    "e\u0301\u0327 ǅ ß ﬃ",
    "def f(x):\n    return x**2  # ok\n",
    "/path/to//file\n\n\n",
]

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def written(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tokenizer.json"
    # With one byte more the file is not known by its digest, and is read.
    path.write_text(tokenizer.to_tokenizer_json() + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def read_back(written: Path) -> Tokenizer:
    return Tokenizer.from_file(written.parent)


@pytest.fixture(scope="module")
def library(written: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(written))


def test_vocabulary_in_the_package_is_the_published_one(published_vocabulary: bytes) -> None:
    digest = hashlib.sha256(published_vocabulary).hexdigest()
    assert digest == "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def test_special_tokens_have_the_published_ids(tokenizer: Tokenizer) -> None:
    names = ["startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message", "call"]
    ids = [199998, 199999, 200002, 200003, 200005, 200006, 200007, 200008, 200012]
    assert [tokenizer.special(f"<|{name}|>") for name in names] == ids
    assert tokenizer.special("<|reserved_201087|>") == 201087
    assert tokenizer.vocab_size == 201088
    assert tokenizer.stop_ids == (200002, 200012)


def test_vocabulary_is_built_once() -> None:
    assert Tokenizer.o200k_harmony() is Tokenizer.o200k_harmony()


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_ids(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, derandomize=True, deadline=None)
@given(text=any_text)
def test_ids_are_those_of_the_oracle(tokenizer: Tokenizer, oracle: Any, text: str) -> None:
    assert tokenizer.encode(text) == oracle.encode(text, disallowed_special=())


def test_no_text_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    text = "".join(tokenizer.special_tokens)
    assert not tokenizer.special_ids & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("text", "read"), [("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("\ud83d\ude00", "😀")])
def test_lone_surrogates_are_replaced(tokenizer: Tokenizer, text: str, read: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == read


@pytest.mark.parametrize("around", ["", "x"])
@pytest.mark.parametrize("blank", [" ", "\n", "\t ", "\u3000"])
def test_very_long_whitespace_is_encoded(tokenizer: Tokenizer, blank: str, around: str) -> None:
    text = around + blank * 400_000 + around
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_many_long_runs_of_whitespace_take_linear_time(tokenizer: Tokenizer) -> None:
    text = (" " * 65_000 + "x") * 6
    begin = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - begin < 5  # Seconds; a search that starts anew at each blank takes a minute.


def test_unknown_ids_decode_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, 201088, 2**40]) == "\ufffd" * 3
    assert tokenizer.token_bytes(10**9) == "\ufffd".encode()


def test_special_ids_decode_to_their_names(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([200006, *tokenizer.encode("user"), 200008]) == "<|start|>user<|message|>"


def test_missing_special_token_is_told_with_those_there_are() -> None:
    plain = Tokenizer({bytes([b]): b for b in range(256)}, {"<|end|>": 256}, name="tiny")
    assert plain.vocab_size == 257
    assert plain.encode("hi") == [104, 105]
    with pytest.raises(CheckpointError, match=r"'tiny' has no special token '<\|start\|>'; it has <\|end\|>"):
        plain.special("<|start|>")


def test_streamed_text_is_the_text_of_one_decode(tokenizer: Tokenizer) -> None:
    chance = random.Random(7)
    hard = [i for i in range(3000) if tokenizer.token_bytes(i)[:1] >= b"\x80"]
    for _ in range(300):
        ids = [chance.choice(hard) if chance.random() < 0.6 else chance.randrange(201_200) for _ in range(12)]
        ids += tokenizer.encode(chance.choice(TEXTS))[: chance.randrange(20)]
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.feed(i) for i in ids]
        assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)
        assert not decoder.pending


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🫨")
    decoder = StreamDecoder(tokenizer)
    assert len(ids) > 1
    assert [decoder.feed(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.pending
    assert decoder.feed(ids[-1]) == "🫨"


def test_written_tokenizer_has_the_same_ids_in_the_tokenizers_library(tokenizer: Tokenizer, library: Any) -> None:
    assert library.get_vocab_size() == 201088
    for text in TEXTS:
        if "<|" not in text:
            assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text
    chance = random.Random(1)
    for _ in range(200):
        text = tokenizer.decode(chance.randrange(199_998) for _ in range(20)).replace("<|", "")
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text
    assert library.encode("<|start|>user", add_special_tokens=False).ids == [200006, 1428]
    assert library.decode(tokenizer.encode("Grüße, 你好!")) == "Grüße, 你好!"


def test_written_tokenizer_loads_in_transformers(written: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(written))
    assert loaded.encode("Hello, wörld", add_special_tokens=False) == tokenizer.encode("Hello, wörld")


def test_tokenizer_read_from_a_checkpoint_has_the_same_ids(tokenizer: Tokenizer, read_back: Tokenizer) -> None:
    assert read_back.special_tokens == tokenizer.special_tokens
    for text in TEXTS:
        assert read_back.encode(text) == tokenizer.encode(text)
        assert read_back.decode(tokenizer.encode(text)) == text


def test_merges_may_be_spelled_as_texts_and_be_needed(written: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    document = json.loads(written.read_text(encoding="utf-8"))
    document["model"]["ignore_merges"] = False
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    read = Tokenizer.from_file(path)
    assert read._merges is None  # Known by its digest: read by tiktoken, not by the slower merge list.
    assert read.encode("Hello world") == tokenizer.encode("Hello world")


def trained(pre_tokenizer: Any, num: int, **options: Any) -> Any:
    """A small vocabulary from the tokenizers library's own trainer: one merge for each token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    model.pre_tokenizer = pre_tokenizer
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
    )
    model.train_from_iterator([t for t in TEXTS if "<|" not in t] * 3 + ["the thin then other athens hello"], trainer)
    return model


def split_by(pattern: str) -> Any:
    pre = tokenizers.pre_tokenizers
    return pre.Sequence(
        [pre.Split(tokenizers.Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        lambda: tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        lambda: split_by(r"\p{L}+| ?\d"),
        lambda: split_by(r"\s+"),
    ],
    ids=["gpt2", "letters", "blanks"],
)
def test_any_byte_pair_vocabulary_has_the_ids_of_the_tokenizers_library(
    tmp_path: Path, pre_tokenizer: Callable[[], Any], ignore_merges: bool
) -> None:
    model = trained(pre_tokenizer(), 420)
    document = json.loads(model.to_str())
    document["model"]["ignore_merges"] = ignore_merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    model = tokenizers.Tokenizer.from_str(json.dumps(document))
    ours = Tokenizer.from_file(tmp_path)
    (tmp_path / "again.json").write_text(ours.to_tokenizer_json(), encoding="utf-8")
    again = Tokenizer.from_file(tmp_path / "again.json")
    chance = random.Random(3)
    texts = [t for t in TEXTS if "<|" not in t]
    texts += ["".join(chance.choices("the anilor\n 1é你", k=40)) for _ in range(200)]
    for text in texts:
        ids = model.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, text
        assert again.encode(text) == ids, text
        assert ours.decode(ids) == text
    assert ours.special("<|start|>") == model.token_to_id("<|start|>")
    assert ours.encode("a\ud800") == ours.encode("a\ufffd")


def test_ranks_are_used_where_every_split_is_a_merge(tmp_path: Path) -> None:
    ordinary = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    small = Tokenizer(ordinary, {"<|end|>": 259})
    path = tmp_path / "tokenizer.json"
    path.write_text(small.to_tokenizer_json(), encoding="utf-8")
    assert Tokenizer.from_file(path)._merges is None
    assert Tokenizer.from_file(path).encode("abcab") == [258, 256]


def broken(change: Callable[[dict[str, Any]], Any]) -> str:
    document: dict[str, Any] = json.loads(Tokenizer({bytes([b]): b for b in range(256)}, {}).to_tokenizer_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "not a byte-level BPE"),
        ("{}", "not a byte-level BPE"),
        (broken(lambda d: d["model"].update(type="WordPiece")), "expected 'BPE'"),
        (broken(lambda d: d.update(normalizer={"type": "NFC"})), "normalizer"),
        (broken(lambda d: d.update(pre_tokenizer=None)), "pre_tokenizer null is not understood"),
        (broken(lambda d: d.update(pre_tokenizer={"type": "Whitespace"})), "is not understood"),
        (broken(lambda d: d["model"].update(merges=[["a", "b"]])), "makes b'ab' names tokens outside"),
        (broken(lambda d: d["model"].update(merges=["a b c"])), "not a byte-level BPE"),
        (broken(lambda d: d["model"]["vocab"].update({"€": 300})), "not a byte-level BPE"),
    ],
)
def test_damaged_tokenizer_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as told:
        Tokenizer.from_file(path)
    assert str(path) in told.value.message


def test_absent_tokenizer_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        (tmp_path / "tokenizer.json").mkdir()
        Tokenizer.from_file(tmp_path)


def test_a_file_that_is_known_by_its_digest_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(Tokenizer.o200k_harmony().to_tokenizer_json(), encoding="utf-8")
    assert Tokenizer.from_file(tmp_path) is Tokenizer.o200k_harmony()
