"""Keys, rates, sizes, admission, metrics, shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message
from tests.responses.lint import lint, read_sse
from tests.responses.scripts import FINAL, REASONED, TOKENIZER, Scripted

from ossia.errors import AuthError, ConfigError, LimitError
from ossia.server.limits import Admission, Keys, Rates, check_bind
from ossia.server.stream import EventStream


def test_a_key_is_known_by_its_hash_alone(tmp_path):
    path = tmp_path / "keys"
    key = Keys.make(path, "my  laptop")
    assert key not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    path.write_text(path.read_text() + "\n# a note\n")
    keys = Keys.read(path)
    assert keys.check(f"Bearer {key}") == keys.check(None, key) == "my laptop"
    for header in (None, "", "Bearer", "Bearer x", f"Basic {key}", f"Bearer {key}x", "Bearer é\udcff"):
        with pytest.raises(AuthError):
            keys.check(header)
    assert Keys().check(None) is None


@pytest.mark.parametrize("text", ["", "sk-plain-text", "# only a note", None])
def test_a_file_without_a_usable_key_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError):
        Keys.read(tmp_path / "keys")


def test_a_key_file_that_has_changed_is_read_again(tmp_path, caplog):
    path = tmp_path / "keys"
    first = Keys.make(path, "first")
    keys = Keys.read(path)
    second = Keys.make(path, "second")
    assert (keys.check(f"Bearer {first}"), keys.check(f"Bearer {second}")) == ("first", "second")
    path.write_text(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(AuthError, match="not known"):
        keys.check(f"Bearer {first}")
    assert keys.check(f"Bearer {second}") == "second"
    # Half written: as it was, and told once.
    path.write_text(path.read_text()[:30])
    assert keys.check(f"Bearer {second}") == keys.check(f"Bearer {second}") == "second"
    assert (
        caplog.text.count("is no SHA-256; make a key with `ossia serve --new-key NAME`; the keys stay as they were")
        == 1
    )
    # Without any key nobody may ask, and not everybody.
    path.write_text("")
    for header in (None, f"Bearer {second}"):
        with pytest.raises(AuthError):
            keys.check(header)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_an_address_that_others_reach_needs_a_key_or_a_word(host):
    with pytest.raises(ConfigError, match="--open-to-all"):
        check_bind(host, Keys(), is_open_allowed=False)
    check_bind(host, Keys(), is_open_allowed=True)
    check_bind(host, Keys([("0" * 64, "x")]), is_open_allowed=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_an_address_of_this_machine_alone_needs_none(host):
    check_bind(host, Keys(), is_open_allowed=False)


def test_rates_are_counted_for_each_caller(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    rates = Rates(2)
    rates.take("a"), rates.take("a"), rates.take("b")
    with pytest.raises(LimitError) as raised:
        rates.take("a")
    assert raised.value.retry_after_s == 60
    now[0] = 61
    rates.take("a")
    Rates(0).take("a")


def test_turns_are_given_in_order_and_no_more_wait_than_may():
    async def go() -> list[int]:
        admission, order = Admission(1, 2), []

        async def work(number: int) -> None:
            async with admission.slot():
                order.append(number)
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(work(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert (admission.num_running, admission.num_queued) == (1, 2)
        with pytest.raises(LimitError) as raised:
            await work(3)
        assert raised.value.retry_after_s >= 1
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert admission.num_running == admission.num_queued == 0
        return order

    assert asyncio.run(go()) == [0, 2]


def test_a_turn_given_to_a_caller_who_leaves_goes_on():
    async def go() -> None:
        admission = Admission(1, 2)
        async with admission.slot():
            waiting = asyncio.create_task(admission.slot().__aenter__())
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert admission.num_running == 0

    asyncio.run(go())


def test_those_who_leave_the_queue_at_once_leave_nothing_behind():
    async def go() -> list[BaseException | bool | None]:
        admission = Admission(1, 4)
        async with admission.slot():
            waiting = [asyncio.create_task(admission.slot().__aenter__()) for _ in range(3)]
            await asyncio.sleep(0)
            # Their tasks wake when the turn was given on already.
            for task in waiting:
                task.cancel()
        left = await asyncio.gather(*waiting, return_exceptions=True)
        assert admission.num_running == admission.num_queued == 0
        async with admission.slot():
            return left

    assert [type(one) for one in asyncio.run(go())] == [asyncio.CancelledError] * 3


def test_a_reserved_turn_is_taken_or_given_back():
    async def go() -> None:
        admission = Admission(1, 1)
        first, second = admission.reserve(), admission.reserve()
        with pytest.raises(LimitError):
            admission.reserve()
        admission.give_back(first)
        assert second.done() and admission.num_running == 1
        async with admission.slot(second):
            unused = admission.reserve()
            admission.give_back(unused)
            assert (admission.num_running, admission.num_queued) == (1, 0)
        assert admission.num_running == 0

    asyncio.run(go())


def test_a_burst_of_background_requests_is_refused_before_it_is_taken(serve):
    served = serve(engine=Scripted(REASONED + FINAL, delay_s=0.01), admission=Admission(1, 2))

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            body = {"input": "?", "background": True}
            return await asyncio.gather(*(client.post("/v1/responses", json=body) for _ in range(12)))

    answers = asyncio.run(burst())
    taken = [answer.json()["id"] for answer in answers if answer.status_code == 200]
    assert {answer.status_code for answer in answers} == {200, 429} and len(taken) >= 3
    for response_id in taken:
        ended = served.http.get(f"/v1/responses/{response_id}?stream=true").text
        assert "response.completed" in ended
    served.until_idle()


def test_a_queue_that_is_cancelled_together_is_cancelled(serve):
    served = serve(engine=Scripted(REASONED + FINAL, delay_s=0.05), admission=Admission(1, 8))

    async def cancel_all() -> list[str]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            made = [await client.post("/v1/responses", json={"input": "?", "background": True}) for _ in range(6)]
            ids = [one.json()["id"] for one in made]
            ended = await asyncio.gather(*(client.post(f"/v1/responses/{one}/cancel") for one in ids))
            return [one.json()["status"] for one in ended]

    for _ in range(3):
        assert set(asyncio.run(cancel_all())) <= {"cancelled", "completed"}
    served.until_idle()


def test_a_response_that_is_being_stored_is_not_cancelled_any_more(serve, monkeypatch):
    served = serve(REASONED + FINAL)
    store = served.service.store
    save, is_saving = store.save, threading.Event()

    def slow(stored: Any) -> None:
        if stored.response["status"] == "completed":
            is_saving.set()
            time.sleep(0.3)
        save(stored)

    monkeypatch.setattr(store, "save", slow)
    conversation = served.openai.conversations.create()
    made = served.openai.responses.create(model="gpt-oss-20b", input="?", background=True, conversation=conversation.id)
    assert is_saving.wait(20)
    assert served.openai.responses.cancel(made.id).status == "completed"
    kept = served.openai.responses.retrieve(made.id)
    assert kept.status == "completed" and kept.output_text
    events = read_sse(served.http.get(f"/v1/responses/{made.id}?stream=true").text)
    assert lint(events)["status"] == "completed"
    assert len(served.openai.conversations.items.list(conversation.id).data) == 3


def test_without_the_key_nothing_but_health_is_told(serve, tmp_path):
    key = Keys.make(tmp_path / "keys", "me")
    served = serve(keys=Keys.read(tmp_path / "keys"))
    with pytest.raises(openai.AuthenticationError):
        served.openai.models.list()
    assert served.openai.with_options(api_key=key).models.list().data
    assert served.http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    assert [served.http.get(path).status_code for path in ("/health", "/ready", "/metrics", "/docs")] == [
        200,
        200,
        401,
        401,
    ]
    assert served.http.get("/v1/models").headers["www-authenticate"] == "Bearer"


def test_what_is_too_large_is_not_read(serve):
    served = serve(max_request_bytes=1_000)
    answer = served.http.post("/v1/responses", json={"input": "x" * 2_000})
    assert answer.status_code == 413

    def chunks():
        yield b'{"input": "'
        for _ in range(100):
            yield b"x" * 100
        yield b'"}'

    headers = {"content-type": "application/json"}
    assert served.http.post("/v1/responses", content=chunks(), headers=headers).status_code == 413
    assert served.http.post("/v1/responses", json={"input": "x"}).status_code == 200


def test_more_than_may_wait_are_told_when_to_come_back(serve):
    served = serve(engine=Scripted(REASONED + FINAL, delay_s=0.05), admission=Admission(1, 1))
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{served.url}/v1/responses", json={"input": "?", "store": False}, timeout=30))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("streams", [False, True])
def test_choices_of_a_request_share_its_turn_however_many_they_are(serve, streams):
    served = serve(admission=Admission(1, 1))
    asked = {"n": 8, "stream": streams}
    made = served.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "?"}], **asked})
    assert made.status_code == 200
    raw = served.http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 3, **asked})
    assert raw.status_code == 200
    if streams:
        for answer, num in ((made, 8), (raw, 24)):
            assert answer.text.endswith("data: [DONE]\n\n") and answer.text.count('"finish_reason":"') == num
    else:
        assert (len(made.json()["choices"]), len(raw.json()["choices"])) == (8, 24)
    served.until_idle()


@pytest.mark.parametrize("is_background", [False, True])
def test_a_response_that_cannot_be_stored_has_failed(serve, monkeypatch, is_background):
    served = serve(REASONED + FINAL)
    store = served.service.store
    save = store.save

    def full(stored: Any) -> None:
        if stored.response["status"] == "completed":
            raise OSError("the disk is full")
        save(stored)

    monkeypatch.setattr(store, "save", full)
    body = {"input": "?", "stream": True, "background": is_background}
    events = [
        json.loads(line[6:])
        for line in served.http.post("/v1/responses", json=body).text.splitlines()
        if line.startswith("data: {")
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    failed = events[-1]["response"]
    assert [event["type"] for event in events if event.get("response", {}).get("status") == "failed"] == [
        "response.failed"
    ]
    assert (events[-1]["type"], failed["status"], failed["completed_at"]) == ("response.failed", "failed", None)
    assert "could not be stored" in failed["error"]["message"]
    assert served.http.get(f"/v1/responses/{failed['id']}").json() == failed
    assert served.http.post("/v1/responses", json={"input": "?"}).status_code == 500


def test_a_chat_completion_that_cannot_be_stored_ends_with_an_error(serve, monkeypatch):
    served = serve()
    monkeypatch.setattr(served.service.store, "save_chat", lambda *_: 1 / 0)
    body = {"messages": [{"role": "user", "content": "?"}], "store": True}
    told = served.http.post("/v1/chat/completions", json={**body, "stream": True}).text
    assert "could not be stored" in told and '"finish_reason":"stop"' not in told
    assert served.http.post("/v1/chat/completions", json=body).status_code == 500


def test_a_stream_that_breaks_does_not_end_as_if_it_were_complete():
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise ZeroDivisionError

    async def go() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            await asyncio.sleep(9)
            return {"type": "http.disconnect"}

        with pytest.raises(ZeroDivisionError):
            await EventStream(chunks())({"type": "http"}, receive, send)
        return sent

    sent = asyncio.run(go())
    assert sent[1]["body"] == b"data: 1\n\n"
    assert all(message.get("more_body", True) for message in sent)


def test_requests_of_one_address_are_limited(serve):
    served = serve(rates=Rates(2))
    codes = [served.http.post("/v1/responses/input_tokens", json={"input": "?"}).status_code for _ in range(3)]
    assert codes == [200, 200, 429]


@contextmanager
def deaf(served) -> Iterator[None]:
    """A client that asks for a stream and takes next to nothing of it."""
    body = json.dumps({"input": "?", "stream": True, "store": False}).encode()
    head = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        one.connect(("127.0.0.1", served.server.servers[0].sockets[0].getsockname()[1]))
        one.sendall(head.encode() + b"\r\n\r\n" + body)
        assert one.recv(12) == b"HTTP/1.1 200"
        yield


LONG = "<|channel|>final<|message|>" + "word " * 50_000 + "<|return|>"


def test_a_slow_client_does_not_hold_others_up_and_frees_its_turn_when_it_leaves(serve):
    served = serve(LONG, FINAL)
    with deaf(served):
        assert served.openai.responses.create(model="gpt-oss-20b", input="?").output_text
        time.sleep(0.5)
        assert served.engine.num_open == served.service.admission.num_running == 1
    served.until_idle()


def test_a_client_that_takes_nothing_is_taken_for_gone(serve, monkeypatch):
    monkeypatch.setattr("ossia.server.stream.STALL_S", 0.3)
    served = serve(LONG)
    with deaf(served):
        served.until_idle()


def test_a_request_id_of_the_clients_is_kept_if_a_log_can_hold_it(served):
    def answered(given: str) -> str:
        return served.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]

    assert answered("trace-1:a.b_C") == "trace-1:a.b_C"
    for wrong in ("", "a b", "x" * 129, "a=b"):
        assert answered(wrong).startswith("req_")


def test_metrics_and_the_log_line_tell_of_each_request(serve, caplog):
    served = serve()
    with caplog.at_level(logging.INFO, logger="ossia.requests"):
        made = served.http.post("/v1/responses", json={"input": "?", "stream": True})
        served.http.get("/v1/nowhere")
        time.sleep(0.05)
    line = next(record.message for record in caplog.records if "/v1/responses" in record.message)
    assert made.headers["x-request-id"] in line
    for part in ("method=POST", "status=200", "prompt_tokens=", "cached=7", "output_tokens=24", "ttft_s=", "seconds="):
        assert part in line
    told = served.http.get("/metrics").text
    for name in (
        'ossia_requests_total{route="/v1/responses",status="200"} 1.0', "ossia_time_to_first_token_seconds_count 1.0",
        "ossia_inter_token_seconds_count 1.0", "ossia_cached_tokens_total 7.0", "ossia_queued 0.0", "ossia_running 0.0",
        'route="none",status="404"',
    ):  # fmt: skip
        assert name in told


def test_a_server_that_stops_lets_its_streams_finish(serve):
    served = serve(engine=Scripted(REASONED + FINAL, delay_s=0.03))
    with served.http.stream("POST", "/v1/responses", json={"input": "?", "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        served.server.should_exit = True
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_a_silent_stream_is_kept_open_by_comments(serve, monkeypatch):
    monkeypatch.setattr("ossia.server.stream.KEEPALIVE_S", 0.02)
    served = serve(engine=Scripted(FINAL, delay_s=0.1))
    assert ": keepalive\n\n" in served.http.post("/v1/responses", json={"input": "?", "stream": True}).text


def _long_requests(text: str) -> list[tuple[str, dict[str, Any]]]:
    message = {"role": "user", "content": text}
    parts = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
    return [
        ("responses", {"input": text}),
        ("responses", {"input": [message]}),
        ("responses", {"input": parts}),
        ("responses", {"input": "?", "instructions": text}),
        ("responses/input_tokens", {"input": parts}),
        ("chat/completions", {"messages": [message]}),
        ("messages", {"messages": [message], "max_tokens": 9}),
        ("completions", {"prompt": text}),
        ("completions", {"prompt": ["a", text]}),
    ]


@pytest.mark.parametrize("case", range(9))
def test_long_texts_become_tokens_beside_the_event_loop(served, monkeypatch, case):
    path, body = _long_requests("word " * 20_000)[case]
    encode, threads = TOKENIZER._encode, []

    def watched(text: str) -> list[int]:
        if len(text) > 50_000:
            threads.append(threading.current_thread())
        return encode(text)

    monkeypatch.setattr(TOKENIZER, "_encode", watched)
    made = served.http.post(f"/v1/{path}", json=body).raise_for_status().json()
    if path == "responses":
        served.http.post("/v1/responses", json={"input": "?", "previous_response_id": made["id"]}).raise_for_status()
        served.http.post("/v1/responses/compact", json={"input": body["input"]}).raise_for_status()
    assert threads and served.thread not in threads
