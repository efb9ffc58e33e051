"""What a suspicious user sends to every endpoint: each fault is told in the API's shape, and none is the server's."""

from __future__ import annotations

import json
import re
import socket

import httpx
import openai
import pytest

from ossia.errors import ForbiddenError
from ossia.server.limits import check_page

DEEP = 200_000
BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "two values": b"{} {}",
    "no object": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "no UTF-8": b'{"input": "\xff\xfe", "messages": [{"role": "user", "content": "\xff"}], "prompt": "\xff"}',
    "half characters": rb'{"input": "\ud800", "messages": [{"role": "user", "content": "\udfff"}], "prompt": "\ud800",'
    rb' "max_tokens": 4, "max_output_tokens": 4, "name": "\ud800", "items": [], "metadata": {"\ud800": "\ud800"}}',
    "no characters": rb'{"input": "\u0000", "messages": [{"role": "user", "content": "\u0000"}], "prompt": "\u0000",'
    rb' "max_tokens": 4, "max_output_tokens": 4, "name": "\u0000", "items": [], "metadata": {"\u0000": "\u0000"}}',
    "nested lists": b'{"input": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "nested objects": b'{"messages": [' + b'{"content":' * DEEP + b"1" + b"}" * DEEP + b"]}",
    "a long number": b'{"input": "x", "max_output_tokens": ' + b"9" * 10_000 + b"}",
    "wrong types": json.dumps(
        {"model": 7, "input": 7, "messages": "x", "prompt": {}, "items": "x", "name": [], "metadata": []}
    ).encode(),
    "not a number": b'{"input": "x", "messages": [{"role": "user", "content": "x"}], "prompt": "x",'
    b' "temperature": NaN, "top_p": -Infinity, "max_tokens": 4, "name": "x", "metadata": {"x": NaN}}',
    "negative": json.dumps(
        {"input": "x", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_output_tokens": -1}
        | {"max_tokens": -1, "temperature": -1, "n": -1, "top_logprobs": -1, "name": "x"}
    ).encode(),
    "empty lists": json.dumps(
        {"input": [], "messages": [], "prompt": [], "items": [], "tools": [], "stop": [], "include": [], "name": ""}
        | {"max_tokens": 4, "max_output_tokens": 4}
    ).encode(),
    "lists of nothing": json.dumps(
        {"input": [None], "messages": [None], "prompt": [None], "items": [None], "tools": [None], "name": None}
    ).encode(),
    "strange items": json.dumps(
        {"input": [{"type": "message", "role": "nobody", "content": [{"type": "video"}]}, {"type": 7}, {}]}
        | {"messages": [{"role": "nobody", "content": [[[]]]}], "prompt": [[1, -5], "x"], "max_tokens": 4}
        | {"items": [{"type": "function_call_output", "call_id": 7}], "name": "x" * 10_000}
    ).encode(),
    "unknown tokens": json.dumps(
        {"prompt": [10**9], "logit_bias": {"x": 5, "99999999": 1}, "max_tokens": 4, "messages": [{"role": "user"}]}
    ).encode(),
}


USER = {"role": "user", "content": "x"}
CHAT_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
# Endpoint, body, and the field that is at fault.
FAULTS = [
    ("responses", {"input": [{"role": "user", "content": [{"type": {}}]}]}, "input[0].content[0]"),
    ("responses", {"input": [{"role": "user", "content": [{"type": []}]}]}, "input[0].content[0]"),
    ("responses", {"input": [{"type": "computer_call", "call_id": [1]}]}, "input[0].call_id"),
    ("responses", {"input": [{"role": "user", "id": "\ud800", "content": "x"}]}, "input[0].id"),
    ("responses", {"input": [{"role": "user", "id": "a\0b", "content": "x"}]}, "input[0].id"),
    ("responses", {"input": [{"type": "computer_call", "id": [1]}]}, "input[0].id"),
    ("responses", {"input": [{"type": "input_text", "text": "x"}]}, "input[0].type"),
    ("responses", {"input": [{"type": "mesage", "role": "user", "content": "x"}]}, "input[0].type"),
    ("responses", {"input": [USER, {"type": "function_output", "call_id": "x", "output": "x"}]}, "input[1].type"),
    ("responses", {"messages": [USER]}, "input"),
    ("responses", {"input": "x", "text": {"format": CHAT_FORMAT}}, "text.format.json_schema"),
    ("conversations", {"items": [{"type": "message", "role": "user", "id": "\0", "content": "x"}]}, "input[0].id"),
    ("chat/completions", {"messages": [USER], "tools": [{"type": {}}]}, "tools[0].type"),
    ("chat/completions", {"messages": [USER], "logit_bias": {"9" * 5_000: 1}}, "logit_bias"),
    ("chat/completions", {"messages": [USER], "logit_bias": {"1": 101}}, "logit_bias"),
    ("completions", {"prompt": "x", "logit_bias": {"1": 1e308}}, "logit_bias"),
    ("completions", {"prompt": "x", "repetition_penalty": 1e308}, "repetition_penalty"),
    ("completions", {"prompt": "x", "stop": "\ud800"}, "stop"),
    ("completions", {"prompt": "x", "stop": ["a", "b\udfff"]}, "stop"),
]


@pytest.mark.parametrize(("path", "body", "param"), FAULTS, ids=str)
def test_a_malformed_field_is_named(served, path, body, param):
    headers = {"content-type": "application/json"}
    answer = served.http.post(f"/v1/{path}", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_what_was_sealed_as_something_else_is_no_thought(served):
    summed = served.http.post("/v1/responses/compact", json={"input": "x"}).json()["output"][-1]
    thought = {"type": "reasoning", "summary": [], "encrypted_content": summed["encrypted_content"]}
    made = served.http.post("/v1/responses", json={"input": [thought, USER]}).raise_for_status().json()
    assert made["input_transformations"][0]["action"] == "removed"


def test_an_item_that_does_not_concern_the_model_gets_an_id_if_it_has_none(served):
    made = served.http.post("/v1/responses", json={"input": [{"type": "web_search_call", "id": None}, USER]})
    listed = served.http.get(f"/v1/responses/{made.json()['id']}/input_items?order=asc").json()["data"]
    assert listed[0]["id"].startswith("item_")


def operations(served) -> list[tuple[str, str]]:
    document = served.http.get("/openapi.json").json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def check_shape(answer: httpx.Response, what: str) -> str:
    """The fault's words, in the shape of the API that was asked."""
    assert 400 <= answer.status_code < 500, f"{what}: {answer.status_code} {answer.text[:300]}"
    told = answer.json()
    if httpx.URL(answer.url).path.startswith("/v1/messages"):
        assert told["type"] == "error" and set(told["error"]) == {"type", "message"}, what
    else:
        assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}, what
    assert told["error"]["message"].strip() and "Traceback" not in answer.text, what
    message: str = told["error"]["message"]
    assert len(message) < 2_000, what
    return message


@pytest.mark.parametrize("name", BODIES)
def test_no_body_makes_a_fault_of_the_server(served, name):
    for method, path in operations(served):
        path = re.sub(r"{\w+}", "x", path)
        headers = {"content-type": "application/json"}
        answer = served.http.request(method, path, content=BODIES[name], headers=headers)
        assert answer.status_code < 500, f"{method} {path}: {answer.text[:300]}"
        if answer.status_code >= 400:
            check_shape(answer, f"{method} {path}")


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b"{", "application/json", r"the body is no JSON: .* at character 1"),
        (b"\xff", "application/json", r"the body cannot be read as JSON: .*utf-8"),
        (b"[" * DEEP, "application/json", r"the body cannot be read as JSON: .*recursion"),
        (b"", "application/json", r"no body; send a JSON object"),
        (b'{"input": "x"}', "application/x-www-form-urlencoded", r"'Content-Type: application/json'"),
        (b'{"input": "x"}', "text/plain", r"'Content-Type: application/json'"),
        (b'{"input": "x", "temperature": NaN}', "application/json", r"^temperature: "),
        (b'{"input": "x", "temperature": 7}', "application/json", r"^temperature: "),
        (b'{"input": "x", "max_output_tokens": -1}', "application/json", r"^max_output_tokens: "),
        (b'{"input": 7}', "application/json", r"^input: Input should be a valid string or .* list$"),
        (b'{"input": [7]}', "application/json", r"^input\[0\]: Input should be a valid dictionary$"),
        (b'{"input": "x", "reasoning": {"effort": 7}}', "application/json", r"^reasoning.effort: "),
        (b'{"input": "x", "metadata": {"a": 7}}', "application/json", r"^metadata.a: Input should be a valid string"),
        (b'{"input": "x", "model": "gpt-9"}', "application/json", r"'gpt-9' is not served here"),
        (b'{"input": "x", "previous_response_id": "resp_x"}', "application/json", r"'resp_x' not found"),
    ],
)
def test_what_is_wrong_with_a_body_is_told(served, body, kind, says):
    answer = served.http.post("/v1/responses", content=body, headers={"content-type": kind})
    assert re.search(says, check_shape(answer, says))


@pytest.mark.parametrize(
    "identity", ["x", "%00", "%ff", "%2e%2e", "..%2f..%2fetc%2fpasswd", "é", "%ED%A0%80", "x" * 5_000, "'--", "a b"]
)
def test_no_id_makes_a_fault_of_the_server(served, identity):
    for method, path in operations(served):
        if "{" in path:
            answer = served.http.request(method, re.sub(r"{\w+}", identity, path), json={"items": [], "metadata": {}})
            check_shape(answer, f"{method} {path}")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=101", "after=%00", "order=up", "include=x", "starting_after=-1", "stream=2"]
)
def test_no_query_makes_a_fault_of_the_server(served, query):
    made = served.openai.responses.create(model="gpt-oss-20b", input="?")
    for path in ("", "/input_items"):
        answer = served.http.get(f"/v1/responses/{made.id}{path}?{query}")
        assert answer.status_code < 500
        if answer.status_code >= 400:
            check_shape(answer, query)


def test_a_wrong_method_is_told_the_right_ones(served):
    known: dict[str, set[str]] = {}
    for method, path in operations(served):
        known.setdefault(path, set()).add(method)
    for path, methods in known.items():
        for wrong in {"DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT", "BREW"} - methods:
            answer = served.http.request(wrong, path.replace("{", "").replace("}", ""))
            # Some paths with an id stand beside others: /v1/responses/compact is also the response "compact".
            if answer.status_code == 405:
                message = check_shape(answer, path)
                assert set(answer.headers["allow"].split(", ")) >= methods, path
                assert all(method in message for method in methods)
            else:
                assert answer.status_code in (400, 404), (wrong, path)
    assert served.http.put("/v1/responses").status_code == 405


def test_head_answers_as_get_without_a_body(served):
    for path in ("/health", "/ready", "/v1/models", "/docs"):
        answer = served.http.head(path)
        assert answer.status_code == 200 and answer.content == b"" and int(answer.headers["content-length"]) > 10
    assert served.http.head("/v1/responses").status_code == 405


def test_a_slash_too_many_is_no_other_place(served):
    for path in ("//v1//models", "/v1/models/", "/v1/models"):
        assert httpx.get(f"{served.url}{path}").json()["object"] == "list"
    made = httpx.post(f"{served.url}//v1/responses//", json={"input": "?", "store": False})
    assert made.status_code == 200


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda api: api.embeddings.create(model="m", input="x"), "no embeddings"),
        (lambda api: api.moderations.create(input="x"), "no moderations"),
        (lambda api: api.uploads.cancel("upload_1"), "no uploads in parts: send the whole file to /v1/files"),
        (lambda api: api.images.generate(prompt="x"), "no images"),
        (lambda api: api.audio.speech.create(input="x", model="m", voice="alloy"), "no speech"),
        (lambda api: api.batches.list(), "no batches"),
        (lambda api: api.fine_tuning.jobs.list(), "no fine-tuning"),
        (lambda api: api.vector_stores.list(), "no vector stores"),
        (lambda api: api.beta.assistants.list(), "no Assistants"),
        (lambda api: api.beta.threads.create(), "no Assistants"),
        (lambda api: api.get("/nonsense", cast_to=object), "not offered by ossia"),
    ],
)
def test_what_openai_has_and_ossia_has_not_says_what_there_is_instead(served, ask, says):
    # With retries: a status that is asked for again would be seen in the log as many lines.
    with pytest.raises(openai.NotFoundError, match=says) as raised:
        ask(served.openai.with_options(max_retries=2))
    assert raised.value.code in ("unsupported_endpoint", "unknown_url")
    assert "it offers Responses" in raised.value.message and raised.value.response.headers["x-request-id"]


def test_a_base_url_that_is_a_little_wrong_is_put_right(served):
    assert "let the base URL end in /v1" in check_shape(served.http.post("/responses", json={}), "/responses")
    assert "ends before it" in check_shape(served.http.post("/v1/v1/messages", json={}), "/v1/v1/messages")


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer wrong", "Basic eDp5", "bearer\tx", "Bearer " + "x" * 20_000]
)
def test_a_wrong_key_is_refused_in_the_apis_shape(serve, tmp_path, authorization):
    from ossia.server.limits import Keys

    Keys.make(tmp_path / "keys", "me")
    served = serve(keys=Keys.read(tmp_path / "keys"))
    for path in ("/v1/responses", "/v1/messages", "/v1/nowhere", "/docs", "/openapi.json", "/metrics"):
        answer = served.http.get(path, headers={"authorization": authorization})
        assert answer.status_code == 401
        check_shape(answer, path)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_harms_nobody(served, sent):
    said = raw(served, sent)
    assert said[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    if said:
        assert set(json.loads(said.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert served.http.get("/health").status_code == 200


def raw(served, *sent: bytes, patience_s: float = 5) -> bytes:
    """What the server answers to bytes, to the end of the connection."""
    port = served.server.servers[0].sockets[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as one:
        said = b""
        try:
            for part in sent:
                one.sendall(part)
            while data := one.recv(4_096):
                said += data
        except ConnectionError:
            # Refused in the middle of the sending.
            pass
    return said


def test_a_head_without_an_end_takes_no_memory(served):
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    said = raw(served, head, *(b"X-%d: %b\r\n" % (number, b"y" * 1_000) for number in range(100_000)))
    assert said[:12] in (b"", b"HTTP/1.1 431")
    said = raw(served, head, b"X: ", *(b"y" * 1_000 for _ in range(100_000)))
    assert said[:12] in (b"", b"HTTP/1.1 431")


def test_a_head_that_does_not_come_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr("ossia.server.protocol.HEAD_S", 0.2)
    assert raw(served) == b""
    assert raw(served, b"GET /health HTTP/1.1\r\nHost") == b""
    # What is in time is answered, and a connection that is used again has its time again.
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    assert raw(served, whole, b"GET /hea").count(b"HTTP/1.1 200") == 1


def test_a_long_body_is_no_long_head(served):
    body = json.dumps({"input": "x " * 200_000, "max_output_tokens": 4}).encode()
    head = "POST /v1/responses/input_tokens HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close"
    said = raw(served, f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert said.startswith(b"HTTP/1.1 200")


def test_an_upgrade_to_a_websocket_is_refused_in_words(served):
    head = (
        b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert raw(served, head).startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000", "192.168.1.7", "tower", "tower.local:8000",
     "api.localhost", "host.docker.internal:8000", None],
)  # fmt: skip
def test_a_server_without_keys_answers_to_names_of_this_machine(host):
    check_page(host, None)
    check_page(host, "http://localhost:3000")
    check_page(host, "vscode-webview://x")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("example.org", None), ("127.0.0.1.example.org:8000", None), ("[", None), ("localhost.", None),
        ("localhost", "https://example.org"), ("localhost", "null"), ("127.0.0.1", "http://x.example.org:8000"),
        ("127.0.0.1", "http://["),
    ],
)  # fmt: skip
def test_a_server_without_keys_does_nothing_for_pages_from_elsewhere(host, origin):
    with pytest.raises(ForbiddenError, match="--key-file"):
        check_page(host, origin)


def test_a_page_from_elsewhere_is_refused_in_the_apis_shape(serve):
    served = serve(refuses_pages=True)
    assert served.openai.models.list().data
    for headers in ({"host": "example.org"}, {"origin": "https://example.org"}):
        answer = served.http.get("/v1/models", headers=headers)
        assert answer.status_code == 403
        assert "asks for no key" in check_shape(answer, str(headers))
    assert served.http.get("/health", headers={"host": "example.org"}).status_code == 200
