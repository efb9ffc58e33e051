"""The two sides of every comparison: our tokenizer, and openai-harmony over the same vocabulary."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from ossia.harmony import Tokenizer
from ossia.harmony.tokenizer import _o200k_tokens


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="session")
def published_vocabulary() -> bytes:
    """The vocabulary in the text form in which it was published: base64, blank, rank, for each token a line."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_o200k_tokens()))


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory, published_vocabulary: bytes) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("encodings")
    (folder / "o200k_base.tiktoken").write_bytes(published_vocabulary)
    openai_harmony = pytest.importorskip("openai_harmony")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield openai_harmony.load_harmony_encoding("HarmonyGptOss")
