"""The store on SQLite and on a real PostgreSQL: the same tests, and a server that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from ossia.errors import ConfigError, InputError, NotFoundError, PreviousResponseError
from ossia.harmony import Message
from ossia.responses.convert import Entry, Spoken
from ossia.server.store import Store, Stored

_POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    """The URL of a PostgreSQL server that lives as long as these tests."""
    found = shutil.which("postgres")
    binaries = Path(found).parent if found else _POSTGRES
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: its tests did not run")
    folder = tmp_path_factory.mktemp("postgres")
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root.
        as_user = {"user": "nobody", "group": "nogroup"}
        temporary = Path(tempfile.gettempdir())
        for path in (folder, *(parent for parent in folder.parents if temporary in parent.parents)):
            path.chmod(0o755)
        shutil.chown(folder, "nobody")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **as_user, "cwd": "/"}
    subprocess.run(
        [binaries / "initdb", "-D", folder / "db", "-U", "ossia", "-A", "trust", "--no-sync"], check=True, **quiet
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["-D", folder / "db", "-p", str(port), "-k", "", "-h", "127.0.0.1", "-F"]
    server = subprocess.Popen([binaries / "postgres", *arguments], **quiet)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"postgresql+psycopg://ossia@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


@pytest.fixture(params=["sqlite", "memory", "postgres"])
def url(request, tmp_path) -> str:
    if request.param == "postgres":
        return request.getfixturevalue("postgres")
    return "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def store(url) -> Iterator[Store]:
    opened = Store(url, server="me")
    yield opened
    opened.close()


def response(number: int, previous: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"id": f"resp_{number}_{os.urandom(4).hex()}", "created_at": number, "status": "completed",
            "previous_response_id": previous, "text": "ä\0🎼", **fields}  # fmt: skip


def entry(text: str) -> Entry:
    spoken = Spoken(Message("user", text), (1, 2, 200_005))
    return Entry({"id": f"msg_{os.urandom(4).hex()}", "type": "message", "text": text}, (spoken,))


def test_what_was_saved_comes_back(store):
    one = response(1)
    store.save(Stored(one, [entry("in")], [entry("out")], "2025-06-28", b"event: x\n\n"))
    assert store.response(one["id"]) == one
    assert store.events(one["id"]) == b"event: x\n\n"
    assert [e.item["text"] for e in store.input_entries(one["id"])] == ["in"]
    history = store.history(one["id"])
    assert [e.item["text"] for e in history.entries] == ["in", "out"]
    assert history.entries[0].spoken == entry("in").spoken and history.current_date == "2025-06-28"
    reference = history.entries[1].item["id"]
    assert store.references([reference, "gone", "a\0b"])[reference] == history.entries[1]


def test_a_chain_is_walked_from_its_beginning(store):
    previous = None
    for number in range(5):
        one = response(number, previous)
        store.save(Stored(one, [entry(f"in {number}")], [entry(f"out {number}")]))
        previous = one["id"]
    told = [e.item["text"] for e in store.history(previous).entries]
    assert told == [f"{kind} {number}" for number in range(5) for kind in ("in", "out")]


def test_what_is_deleted_is_gone_with_its_items(store):
    one = response(1)
    kept = entry("in")
    store.save(Stored(one, [kept]))
    store.delete_response(one["id"])
    assert store.references([kept.item["id"]]) == {}
    for method in (store.response, store.events, store.input_entries, store.delete_response):
        with pytest.raises(NotFoundError):
            method(one["id"])
    with pytest.raises(PreviousResponseError):
        store.history(one["id"])


def test_a_running_response_cannot_be_continued_and_fails_with_its_server(store):
    one = response(1, status="in_progress")
    store.save(Stored(one))
    with pytest.raises(InputError):
        store.history(one["id"])
    assert store.fail_orphans() == 1
    assert store.response(one["id"])["status"] == "failed"
    assert store.fail_orphans() == 0


def test_a_new_state_replaces_the_old(store):
    one = response(1, status="queued")
    store.save(Stored(one, [entry("in")]))
    store.save(Stored(one | {"status": "completed"}, [entry("in")], [entry("out")]))
    assert store.response(one["id"])["status"] == "completed"
    assert len(store.history(one["id"]).entries) == 2


def test_conversations_keep_the_order_of_what_was_added(store):
    made = store.create_conversation({"a": "b"}, [entry("0")])
    store.save(Stored(response(1), [entry("1")], [entry("2")], conversation_id=made["id"]))
    store.append_items(made["id"], [entry("3")])
    assert [e.item["text"] for e in store.conversation_entries(made["id"])] == list("0123")
    assert [e.item["text"] for e in store.conversation_history(made["id"]).entries] == list("0123")
    first = store.conversation_entries(made["id"])[0].item["id"]
    assert store.delete_item(made["id"], first) == made
    with pytest.raises(NotFoundError):
        store.delete_item(made["id"], first)
    assert store.update_conversation(made["id"], {})["metadata"] == store.conversation(made["id"])["metadata"] == {}
    store.delete_conversation(made["id"])
    with pytest.raises(NotFoundError):
        store.append_items(made["id"], [])


def test_nothing_is_kept_in_a_conversation_that_was_deleted(store):
    made = store.create_conversation({}, [entry("0")])
    store.delete_conversation(made["id"])
    one, said = response(1), entry("1")
    with pytest.raises(NotFoundError):
        store.save(Stored(one, [said], conversation_id=made["id"], tool_state={"pages": []}))
    assert store.references([said.item["id"]]) == {} and store.tool_state(made["id"]) is None
    with pytest.raises(NotFoundError):
        store.response(one["id"])


def test_a_chain_that_leaves_a_conversation_knows_what_was_said_before(store):
    made = store.create_conversation({}, [entry("0")])
    inside = [response(number, conversation={"id": made["id"]}) for number in (1, 2, 3)]
    for number, one in enumerate(inside):
        store.save(Stored(one, [entry(f"in {number}")], [entry(f"out {number}")], conversation_id=made["id"]))
    after = response(4, inside[1]["id"], conversation=None)
    store.save(Stored(after, [entry("in 3")]))
    texts = [e.item["text"] for e in store.history(after["id"]).entries]
    assert texts == ["0", "in 0", "out 0", "in 1", "out 1", "in 3"]
    store.delete_conversation(made["id"])
    assert [e.item["text"] for e in store.history(after["id"]).entries] == ["in 1", "out 1", "in 3"]


def test_responses_that_end_together_do_not_lose_each_others_items(store):
    made = store.create_conversation({}, [])
    work = [lambda i=i: store.append_items(made["id"], [entry(f"{i}")]) for i in range(8)]
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads if not str(store._db.url).endswith("//") else ():
        thread.start()
    for thread in threads if threads[0].ident else ():
        thread.join()
    expected = 8 if threads[0].ident else 0
    assert len(store.conversation_entries(made["id"])) == expected


def test_what_has_expired_is_swept_and_what_is_continued_lives_on(url, monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr("ossia.server.store.time", SimpleNamespace(time=lambda: now[0]))
    store = Store(url, ttl_s=40)
    old, chained = response(1), response(2)
    store.save(Stored(old, [entry("in")]))
    store.save(Stored(chained))
    gone = store.create_conversation({}, [])
    now[0] += 30
    store.history(chained["id"])
    now[0] += 20
    store.sweep()
    assert store.response(chained["id"])
    for method, one in ((store.response, old["id"]), (store.conversation, gone["id"])):
        with pytest.raises(NotFoundError):
            method(one)
    store.close()


def test_the_oldest_go_when_all_together_are_too_large(url):
    store = Store(url, max_bytes=40_000)
    ids = []
    for number in range(8):
        one = response(number, text="x" * 10_000)
        store.save(Stored(one))
        ids.append(one["id"])
    store.sweep()
    kept = []
    for one in ids:
        with suppress(NotFoundError):
            kept.append(store.response(one)["id"])
    assert kept and kept == ids[-len(kept) :] and len(kept) <= 3
    store.close()


def test_conversations_are_within_the_bounds_too(url):
    store = Store(url, max_bytes=40_000)
    made = []
    for number in range(8):
        item = Entry({"id": f"msg_{number}", "type": "message", "text": "x" * 10_000})
        made.append(store.create_conversation({}, [item])["id"])
        time.sleep(0.002)
    store.sweep()
    kept = []
    for one in made:
        with suppress(NotFoundError):
            kept.append(store.conversation(one)["id"])
    assert kept and kept == made[-len(kept) :] and len(kept) <= 3
    store.close()


def chat(number: int, text: str = "") -> dict[str, Any]:
    return {"id": f"chatcmpl-{number}_{os.urandom(4).hex()}", "model": "m", "metadata": {"n": str(number % 2)},
            "text": text}  # fmt: skip


def test_chat_completions_are_kept_and_paged_in_the_order_they_were_made(store):
    made = [chat(number) for number in range(6)]
    for one in made:
        store.save_chat(one, [{"role": "user", "content": "ä\0\ud800"}])
    ids = [one["id"] for one in made]
    assert [one["id"] for one in store.chats(3, None, "asc", "m", {})][-3:] == ids[:3]
    assert [one["id"] for one in store.chats(9, ids[2], "asc", None, {})] == ids[3:]
    assert [one["id"] for one in store.chats(2, ids[2], "desc", None, {})] == ids[1::-1]
    assert [one["id"] for one in store.chats(2, ids[0], "asc", None, {"n": "1"})] == ids[1:4:2]
    assert store.chats(2, None, "asc", "x\0", {}) == store.chats(2, None, "asc", None, {"n": "7"}) == []
    assert store.chat_messages(ids[0]) == [{"role": "user", "content": "ä\0?"}]
    assert store.update_chat(ids[0], {"x": "y"}) == store.chat(ids[0]) == made[0] | {"metadata": {"x": "y"}}
    for one in ids:
        store.delete_chat(one)
        for method in (store.chat, store.chat_messages, store.delete_chat):
            with pytest.raises(NotFoundError):
                method(one)


def test_chat_completions_are_within_the_bounds_too(url):
    store = Store(url, max_bytes=40_000)
    made = [chat(number, "x" * 10_000) for number in range(8)]
    for one in made:
        store.save_chat(one, [])
    store.sweep()
    left = [one["id"] for one in store.chats(9, None, "asc", None, {})]
    assert left == [one["id"] for one in made[-3:]]
    store._ttl_s = -1
    store.save_chat(gone := chat(9), [])
    store.sweep()
    with pytest.raises(NotFoundError):
        store.chat(gone["id"])
    for one in left:
        store.delete_chat(one)
    store.close()


def test_what_is_stored_is_its_owners(store):
    one, kept = response(1), entry("in")
    store.save(Stored(one, [kept], owner="alice"))
    conversation = store.create_conversation({}, [kept], "alice")["id"]
    store.save_chat(made := chat(1), [], "alice")
    file = store.save_file("a", "user_data", b"x", owner="alice")["id"]
    for owner in ("bob", ""):
        for method, named in (
            (store.response, one["id"]), (store.events, one["id"]),
            (store.input_entries, one["id"]), (store.delete_response, one["id"]), (store.conversation, conversation),
            (store.delete_conversation, conversation), (store.chat, made["id"]), (store.chat_messages, made["id"]),
            (store.delete_chat, made["id"]), (store.file, file), (store.file_content, file), (store.delete_file, file),
        ):  # fmt: skip
            with pytest.raises(NotFoundError):
                method(named, owner)
        with pytest.raises(PreviousResponseError):
            store.history(one["id"], owner)
        assert not any(e["id"] == made["id"] for e in store.chats(99, None, "asc", None, {}, owner))
        assert not any(e["id"] == file for e in store.files(owner=owner))
        assert store.references([kept.item["id"]], owner) == {}
    assert store.references([kept.item["id"]], "alice")[kept.item["id"]] == kept
    assert store.history(one["id"], "alice").entries == [kept]
    assert [e["id"] for e in store.chats(99, None, "asc", None, {}, "alice")] == [made["id"]]
    assert [e["id"] for e in store.files(owner="alice")] == [file]
    # A second state of a response has the owner of the first.
    store.save(Stored(one, [kept], owner="alice"))
    for delete, named in (
        (store.delete_response, one["id"]), (store.delete_conversation, conversation), (store.delete_chat, made["id"]),
        (store.delete_file, file),
    ):  # fmt: skip
        delete(named, "alice")
    assert store.files(owner="alice") == store.chats(9, None, "asc", None, {}, "alice") == []


def test_what_was_stored_without_a_key_is_open_to_whoever_has_its_id_and_listed_without_one(store):
    one, kept = response(1), entry("in")
    store.save(Stored(one, [kept]))
    store.save_chat(made := chat(1), [])
    for _ in range(2):
        assert store.history(one["id"], "alice").entries == [kept]
        assert store.chat(made["id"], "alice")["id"] == made["id"]
        assert store.references([kept.item["id"]], "alice") == {}
        assert store.references([kept.item["id"]])[kept.item["id"]] == kept
        assert any(e["id"] == made["id"] for e in store.chats(999, None, "asc", None, {}))
        # As a store is that was written before all that is stored had owners.
        with store._db.begin() as db:
            db.execute(sa.text("DELETE FROM conversation_owners"))


@pytest.mark.parametrize("wrong", ["nonsense", "sqlite:////proc/none/x.db", "mysql+none://x"])
def test_a_store_that_cannot_be_opened_says_so(wrong):
    with pytest.raises(ConfigError, match="cannot be opened"):
        Store(wrong)


def test_the_file_is_for_its_owner_alone(tmp_path):
    Store(f"sqlite:///{tmp_path / 'x.db'}").close()
    assert (tmp_path / "x.db").stat().st_mode & 0o777 == 0o600


_SERVER = """
import sys, uvicorn
from ossia.server.app import create_app
from ossia.server.service import Service
from ossia.server.store import Store
from tests.responses.scripts import FINAL, REASONED, model
uvicorn.run(create_app(Service(model(REASONED + FINAL), Store(sys.argv[1]))), port=int(sys.argv[2]), log_level="error")
"""


@pytest.mark.parametrize("backend", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def test_a_server_that_is_killed_loses_no_response_that_was_acknowledged(backend, tmp_path, request):
    url = request.getfixturevalue("postgres") if backend == "postgres" else f"sqlite:///{tmp_path / 'killed.db'}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    acknowledged: list[str] = []

    def ask(kind: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while True:
                try:
                    if kind == 0:
                        acknowledged.append(client.post("/v1/responses", json={"input": "?"}).json()["id"])
                    elif kind == 1:
                        body = {"input": "?", "background": True}
                        acknowledged.append(client.post("/v1/responses", json=body).json()["id"])
                    else:
                        with client.stream("POST", "/v1/responses", json={"input": "?", "stream": True}) as stream:
                            for line in stream.iter_lines():
                                if line.startswith("data: {") and '"response.completed"' in line:
                                    acknowledged.append(json.loads(line[6:])["response"]["id"])
                except (httpx.HTTPError, json.JSONDecodeError):
                    return

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", _SERVER, url, str(port)])
        for _ in range(300):
            try:
                httpx.get(f"http://127.0.0.1:{port}/ready").raise_for_status()
                return process
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError("the server did not start")

    process = start()
    threads = [threading.Thread(target=ask, args=(kind,)) for kind in range(3)]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 40:
        time.sleep(0.02)
    process.kill()
    process.wait()
    for thread in threads:
        thread.join()
    process = start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            for one in acknowledged:
                assert client.get(f"/v1/responses/{one}").json()["status"] in ("completed", "failed")
    finally:
        process.kill()
        process.wait()
