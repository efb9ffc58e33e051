"""Lines come whole and in order from any position on, and what cannot be read says why."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from ossia.errors import InputError, NotFoundError
from ossia.train import rows
from ossia.train.rows import RowStream, find_files, parse


def lines(path: Path, seed=None) -> list[tuple[int, bytes, str]]:
    return [(line.number, line.data, line.fault) for line in RowStream(find_files(path), seed=seed)]


def numbered(path: Path, num: int, begin: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"n": begin + i}) + "\n" for i in range(num)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_a_mark_of_utf8_line_ends_of_windows_and_blank_lines_are_no_part_of_a_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"b": 2}\r\n{"c": 3}')
    assert lines(path) == [(1, b'{"a": 1}', ""), (4, b'{"b": 2}', ""), (5, b'{"c": 3}', "")]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_a_fault(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    ((_, _, fault),) = lines(path)
    assert "the file is empty" in fault


def test_another_encoding_is_named_with_what_converts_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "ü"}\n'.encode("utf-16"))
    ((_, _, fault),) = lines(path)
    assert "UTF-16" in fault and "iconv -f UTF-16 -t utf-8" in fault
    path.write_bytes('{"a": "ü"}\n'.encode("latin-1"))
    (line,) = RowStream([path])
    with pytest.raises(InputError, match="byte 0xfc at position 7 is no UTF-8"):
        parse(line)


def test_a_huge_line_is_a_fault_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 1000 + b'\n{"b": 2}\n' + b"y" * 100 + b"\n" + b"z" * 101)
    got = lines(path)
    assert [number for number, _, _ in got] == [1, 2, 3, 4, 5]
    assert [fault for _, _, fault in got if fault] == [
        "a line of 1001 bytes; at most 100 are read",
        "a line of 101 bytes; at most 100 are read",
    ]
    assert got[2][1] == b'{"b": 2}' and got[3][1] == b"y" * 100


def test_damaged_compressed_data_is_a_fault_after_the_last_whole_line(tmp_path):
    path = numbered(tmp_path / "a.jsonl.gz", 2000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    got = lines(path)
    assert len(got) > 10 and "damaged after this line" in got[-1][2]
    assert [json.loads(data)["n"] for _, data, _ in got[:-1]] == list(range(len(got) - 1))


def test_what_is_compressed_is_known_by_its_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert lines(path) == [(1, b'{"a": 1}', "")]


def test_a_folder_stands_for_all_its_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.ndjson", ".hidden.jsonl", ".cache/d.jsonl", "notes.txt"):
        numbered(tmp_path / name, 2)
    assert [path.name for path in find_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "c.ndjson"]
    assert len(find_files([tmp_path, tmp_path / "notes.txt"])) == 4
    with pytest.raises(NotFoundError, match="no such file"):
        find_files(tmp_path / "other")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        find_files(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file in this folder ends in .*\.jsonl"):
        find_files(tmp_path / "empty")


@pytest.mark.parametrize("seed", [None, [3]])
def test_reading_goes_on_from_every_position_with_the_same_lines(tmp_path, seed):
    for i, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl")):
        numbered(tmp_path / name, 5 + 10 * i, 100 * i)
    files = find_files(tmp_path)
    whole = list(RowStream(files, seed=seed))
    assert len(whole) == 45
    stream = RowStream(files, seed=seed)
    for i in range(46):
        again = RowStream(files, seed=seed)
        again.seek(json.loads(json.dumps(stream.position)))
        assert list(again) == whole[i:]
        stream.next()


def test_files_are_read_side_by_side_in_proportion_to_their_sizes(tmp_path):
    numbered(tmp_path / "a.jsonl", 900, 1000)
    numbered(tmp_path / "b.jsonl", 90, 100)
    numbers = [json.loads(data)["n"] for _, data, _ in lines(tmp_path, seed=[0])]
    assert len(numbers) == 990
    for part in range(9):
        assert 8 <= sum(n < 1000 for n in numbers[110 * part : 110 * part + 110]) <= 12


def test_more_files_than_are_open_at_once_are_read_in_groups(tmp_path):
    for i in range(150):
        numbered(tmp_path / f"{i:03}.jsonl", 2, 2 * i)
    stream = RowStream(find_files(tmp_path), seed=[1])
    numbers, fractions = [], []
    while (line := stream.next()) is not None:
        numbers.append(json.loads(line.data)["n"])
        fractions.append(stream.fraction)
    assert sorted(numbers) == list(range(300)) and numbers != sorted(numbers)
    assert fractions == sorted(fractions) and 0 < fractions[0] < 0.01 and fractions[-1] > 0.99


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        ('{"a": Infinity}', "Infinity is no JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "no clean JSON"),
        ("[", r"no JSON: .*jq -c '\.\[\]'"),
        ('"messages": [', "over several lines"),
        ('{"a": 1} {"b": 2}', "no JSON: Extra data at character 10"),
        ('{"a": ["\\ud83d x"]}', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
    ],
)
def test_what_is_no_clean_json_says_why(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    (line,) = RowStream([path])
    with pytest.raises(InputError, match=message):
        parse(line)


def test_whole_characters_in_two_escapes_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}')
    (line,) = RowStream([path])
    assert parse(line) == {"a": "😀"}
