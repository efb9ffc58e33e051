from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import stat

import pytest

from ossia.errors import UnavailableError
from ossia.harmony import ToolNamespace
from ossia.tools.audit import AuditLog, redact, run_logged
from ossia.tools.base import ToolOutput


class Echo:
    namespace = ToolNamespace("echo", "Says it again.")

    async def run(self, name, arguments):
        if arguments == "wait":
            await asyncio.sleep(60)
        return ToolOutput(arguments, is_error=arguments == "bad")

    async def close(self): ...


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_call_is_one_line_without_its_contents(tmp_path):
    log = AuditLog(tmp_path / "new" / "audit.jsonl")
    output = asyncio.run(log.run(Echo(), "", "secret text", tool_name="echo", response="resp_1", call="call_1"))
    assert output.text == "secret text"
    asyncio.run(log.run(Echo(), "", "bad", tool_name="echo"))
    first, second = lines(log.path)
    assert first["arguments_sha256"] == hashlib.sha256(b"secret text").hexdigest()
    assert (first["response"], first["call"], first["tool"], first["outcome"]) == ("resp_1", "call_1", "echo", "ok")
    assert first["arguments_chars"] == first["output_chars"] == 11 and first["duration_s"] >= 0
    assert second["outcome"] == "error"
    assert "secret text" not in log.path.read_text()


def test_a_cancelled_call_is_logged_as_such(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")

    async def cancel():
        task = asyncio.create_task(log.run(Echo(), "", "wait", tool_name="echo"))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert [line["outcome"] for line in lines(log.path)] == ["cancelled"]


def test_without_a_log_a_call_just_runs():
    assert asyncio.run(run_logged(None, Echo(), "", "x", tool_name="echo")).text == "x"


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ('{"api_key": "abc123", "q": "weather"}', "abc123"),
        ("password=hunter2&user=me", "hunter2"),
        ("Authorization: Bearer abcdefghij", "abcdefghij"),
        ("curl -H 'X-Auth-Token: t0ps3cret'", "t0ps3cret"),
        ("https://user:pa55@example.com/x", "pa55"),
        ("sk-proj-abcdefghijklmnop1234", "sk-proj-abcdefghijklmnop1234"),
        ("ghp_abcdefghijklmnopqrstuvwxyz", "ghp_abcdef"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.sig", "eyJhbGci"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE", "MIIE"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(tmp_path, text, gone):
    assert gone not in redact(text)
    log = AuditLog(tmp_path / "audit.jsonl", with_contents=True)
    asyncio.run(log.run(Echo(), "", text, tool_name="echo"))
    log.record("echo", "{}", "refused", details={"why": text, "tier": "A", "approved": False})
    logged, refused = lines(log.path)
    assert gone not in log.path.read_text()
    assert logged["arguments"] == logged["output"] == redact(text)
    assert refused["tier"] == "A" and refused["approved"] is False


def test_ordinary_text_is_kept():
    for text in ("the weather in Oslo", "def tokenize(text): ...", "https://example.com/a?q=1", "sk-1"):
        assert redact(text) == text


def test_long_contents_are_shortened_and_a_line_stays_a_line(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", with_contents=True)
    asyncio.run(log.run(Echo(), "", "x\n\u2028" * 100_000, tool_name="echo"))
    [line] = lines(log.path)
    assert "left out" in line["arguments"] and len(line["arguments"]) < 5_000
    assert line["arguments_chars"] == 300_000


def test_only_its_owner_may_read_the_log(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text("")
    path.chmod(0o644)
    AuditLog(path)
    AuditLog(tmp_path / "new.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "new.jsonl").stat().st_mode) == 0o600


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "link", tmp_path / "pipe"):
        with pytest.raises(UnavailableError, match=str(path)):
            AuditLog(path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_log_begins_anew_and_the_oldest_goes(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=600, num_old_files=2)
    for i in range(20):
        log.record("echo", str(i), "ok")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.lock"]
    kept = [line for name in ("audit.jsonl.2", "audit.jsonl.1", "audit.jsonl") for line in lines(tmp_path / name)]
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20)]
    assert [line["arguments_sha256"] for line in kept] == hashes[-len(kept) :]
    assert all((tmp_path / name).stat().st_size <= 600 for name in names)
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600 for name in names)


def test_a_log_that_was_moved_away_is_made_again(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record("echo", "1", "ok")
    log.path.rename(tmp_path / "old")
    log.record("echo", "2", "ok")
    assert len(lines(log.path)) == len(lines(tmp_path / "old")) == 1


def _write_many(path, name):
    log = AuditLog(path, max_bytes=20_000, num_old_files=50, with_contents=True)
    for _ in range(100):
        log.record(name, name * 300, "ok")


def test_lines_of_several_processes_do_not_mix_and_none_is_lost(tmp_path):
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(path, name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = [line for file in tmp_path.glob("audit.jsonl*") if file.suffix != ".lock" for line in lines(file)]
    assert sorted(line["tool"] for line in found) == ["a"] * 100 + ["b"] * 100 + ["c"] * 100
    assert all(line["arguments"] == line["tool"] * 300 for line in found)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")
    monkeypatch.setattr(os, "write", lambda fd, data: 3)
    with pytest.raises(UnavailableError, match="No space left"):
        log.record("echo", "1", "ok")
