"""Two keys on one server: what one of them stores is not there for the other."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import pytest
from tests.responses.scripts import FINAL, Scripted

from ossia.server.limits import Keys
from ossia.tools.containers import Containers

USER = {"role": "user", "content": "a secret"}


class NoSessions:
    """Python sessions of which none has begun."""

    def has_session(self, _container_id: str) -> bool:
        return False

    async def end_session(self, _container_id: str) -> None:
        pass


class Two:
    """A server with the keys alice and bob."""

    def __init__(self, serve: Any, **fields: Any) -> None:
        keys = Keys([(hashlib.sha256(name.encode()).hexdigest(), name) for name in ("alice", "bob")])
        self.served = serve(keys=keys, **fields)

    def ask(self, name: str, method: str, path: str, **fields: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {name}"}
        return self.served.http.request(method, f"/v1/{path}", headers=headers, **fields)

    def made(self, name: str, path: str, /, **body: Any) -> str:
        return str(self.ask(name, "POST", path, json=body).raise_for_status().json()["id"])

    def listed(self, name: str, path: str) -> list[str]:
        return [one["id"] for one in self.ask(name, "GET", path).raise_for_status().json()["data"]]


@pytest.fixture
def two(serve) -> Two:
    return Two(serve)


def make_chat(two: Two) -> tuple[str, list[tuple[str, str]]]:
    one = two.made("alice", "chat/completions", messages=[USER], store=True)
    return one, [("GET", ""), ("GET", "/messages"), ("POST", ""), ("DELETE", "")]


def make_file(two: Two) -> tuple[str, list[tuple[str, str]]]:
    upload = {"files": {"file": ("a.txt", b"a secret")}, "data": {"purpose": "user_data"}}
    made = two.ask("alice", "POST", "files", **upload).raise_for_status().json()
    return made["id"], [("GET", ""), ("GET", "/content"), ("DELETE", "")]


def make_container(two: Two) -> tuple[str, list[tuple[str, str]]]:
    two.served.service.tools.containers = Containers(NoSessions())  # type: ignore[arg-type]
    one = two.made("alice", "containers", name="mine")
    return one, [("GET", ""), ("GET", "/files"), ("POST", "/files"), ("GET", "/files/x"), ("DELETE", "")]


def make_conversation(two: Two) -> tuple[str, list[tuple[str, str]]]:
    one = two.made("alice", "conversations", items=[USER])
    rest = [("GET", ""), ("POST", ""), ("GET", "/items"), ("POST", "/items"), ("POST", "/fork"), ("DELETE", "")]
    return one, rest


LISTS = [
    ("chat/completions", make_chat),
    ("files", make_file),
    ("containers", make_container),
    ("conversations", make_conversation),
]


@pytest.mark.parametrize(("path", "make"), LISTS, ids=[path for path, _ in LISTS])
def test_what_a_key_stores_is_not_there_for_another(two, path, make):
    one, places = make(two)
    assert two.listed("alice", path) == [one]
    assert two.listed("bob", path) == []
    for method, rest in places:
        body = {"json": {"metadata": {}, "items": []}} if method == "POST" else {}
        assert two.ask("bob", method, f"{path}/{one}{rest}", **body).status_code == 404, (method, rest)
    assert two.ask("bob", "GET", f"{path}?after={one}").status_code == 404
    assert two.ask("alice", "GET", f"{path}/{one}").status_code == 200
    assert two.ask("alice", "DELETE", f"{path}/{one}").json()["deleted"]


def test_a_response_is_read_continued_and_referred_to_by_its_own_key_alone(two):
    named = {"type": "message", "id": "msg_1", **USER}
    one = two.made("alice", "responses", input=[named])
    for method, rest in (("GET", ""), ("GET", "?stream=true"), ("GET", "/input_items"), ("POST", "/cancel"),
                         ("DELETE", "")):  # fmt: skip
        assert two.ask("bob", method, f"responses/{one}{rest}").status_code == 404, (method, rest)
    reference = {"input": [{"type": "item_reference", "id": "msg_1"}]}
    assert two.ask("bob", "POST", "responses", json=reference).status_code == 404
    assert two.ask("bob", "POST", "responses", json={"input": "?", "previous_response_id": one}).status_code >= 400
    assert two.ask("alice", "POST", "responses", json=reference).status_code == 200
    assert two.ask("alice", "POST", "responses", json={"input": "?", "previous_response_id": one}).status_code == 200
    # An item of one's own is found beside another's of the same name.
    own = two.made("bob", "responses", input=[{**named, "content": "mine"}])
    again = two.made("bob", "responses", **reference)
    (told,) = two.ask("bob", "GET", f"responses/{again}/input_items").json()["data"]
    assert own and told["content"][0]["text"] == "mine"


def test_a_background_response_is_followed_and_cancelled_by_its_own_key_alone(serve):
    two = Two(serve, engine=Scripted(FINAL, delay_s=0.05))
    one = two.made("alice", "responses", input="?", background=True)
    for method, rest in (("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel"), ("DELETE", "")):
        assert two.ask("bob", method, f"responses/{one}{rest}").status_code == 404, (method, rest)
    told = two.ask("bob", "POST", "responses", json={"input": "?", "previous_response_id": one}).json()
    assert "not found" in told["error"]["message"]
    assert two.ask("alice", "POST", f"responses/{one}/cancel").json()["status"] == "cancelled"


def test_uploaded_files_are_for_the_containers_of_their_own_key(two):
    file_id, _ = make_file(two)
    make_container(two)
    made = two.ask("bob", "POST", "containers", json={"name": "x", "file_ids": [file_id]})
    assert made.status_code == 404
