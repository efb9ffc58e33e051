"""The safetensors reader: equal to the library's on sound files, clear on every kind of damage."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ossia.errors import CheckpointError
from ossia.model.safetensors_file import header_bytes, map_file, read_header


def file_of(header: Any, data_bytes: int = 16, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data_bytes)


def tensor(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_the_safetensors_package_writes_is_read(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "a": random.standard_normal((3, 5)).astype(np.float32),
        "b": random.integers(0, 256, (7,), np.uint8),
        "c": random.standard_normal((2, 1, 2)).astype(np.float16),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert entries.keys() == tensors.keys()
    mapped = map_file(tmp_path / "x.safetensors")
    for name, (_, _, shape, offset, size_bytes) in entries.items():
        values = mapped[offset : offset + size_bytes].view(tensors[name].dtype).reshape(shape)
        np.testing.assert_array_equal(values, tensors[name])


def test_a_written_header_is_aligned_and_read_back(tmp_path):
    header = header_bytes({"a": ("BF16", (3, 2)), "b": ("U8", (5,))})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(17))
    entries = read_header(path)
    assert entries["a"] == (path, "BF16", (3, 2), len(header), 12)
    assert entries["b"] == (path, "U8", (5,), len(header) + 12, 5)


DAMAGE = {
    "empty": (b"", "0 bytes, too few"),
    "a few bytes": (b"abc", "3 bytes, too few"),
    "an absurd header length": (file_of({}, length=2**63), "header of 9,223,372,036,854,775,808 bytes"),
    "text": (b"<html>404 Not Found</html>" * 9, "not a safetensors file"),
    "cut off in the header": (file_of({"a": tensor()}, 0, length=5000), "is cut off: its header needs 5,008"),
    "cut off in the data": (file_of({"a": tensor()}, 15), "is cut off: tensor a ends at byte"),
    "bytes at the end": (file_of({"a": tensor()}, 20), "has 4 bytes after tensor a"),
    "no JSON": (file_of(b"{nope}"), "not valid JSON"),
    "no UTF-8": (file_of(b"\xff\xfe\xfd"), "not valid JSON"),
    "endless nesting": (file_of(b"[" * 100_000), "not valid JSON"),
    "no object": (file_of([]), "not a JSON object"),
    "a name twice": (file_of(b'{"a": 1, "a": 2}'), "occurs twice"),
    "no dtype": (file_of({"a": {"shape": [4], "data_offsets": [0, 16]}}), "tensor a is described by"),
    "no object as tensor": (file_of({"a": 3}), "tensor a is described by 3"),
    "a negative shape": (file_of({"a": tensor(shape=(-2, 2))}), "tensor a is described by"),
    "one offset": (file_of({"a": tensor(offsets=[0])}), "tensor a is described by"),
    "a fraction as offset": (file_of({"a": tensor(offsets=[0, 16.5])}), "tensor a is described by"),
    "an unknown dtype": (file_of({"a": tensor("Q7")}), "unknown dtype 'Q7'"),
    "a list as dtype": (file_of({"a": tensor(["F32"])}), "tensor a is described by"),
    "a size that contradicts the shape": (file_of({"a": tensor(shape=(3, 2))}), "16 bytes, expected 24 for F32 (3, 2)"),
    "offsets backwards": (file_of({"a": tensor(offsets=[16, 0])}), "-16 bytes, expected 16"),
    "overlapping tensors": (
        file_of({"a": tensor(), "b": tensor(shape=(2,), offsets=(8, 16))}),
        "tensor b begins at byte",
    ),
    "a gap": (file_of({"a": tensor(shape=(2,), offsets=(8, 16))}), "leaves a gap after the header"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_gives_one_error_that_names_the_file(damage, tmp_path):
    data, words = DAMAGE[damage]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert words in caught.value.message


@given(st.binary(max_size=300))
def test_no_bytes_whatever_make_the_reader_fail_otherwise(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 20) | st.floats() | st.sampled_from(["F32", "U8", "a"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "b"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3))
def test_no_header_whatever_makes_the_reader_fail_otherwise(tmp_path_factory, header):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(file_of(header, 1))
    with pytest.raises(CheckpointError):
        read_header(path)
