"""Tools of ours through every form of the API, on a real port: streamed, not streamed, background, chat."""

from __future__ import annotations

import contextlib
import glob
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.responses.lint import lint, read_sse
from tests.responses.scripts import CALL, FINAL, REASONED, TOKENIZER, Scripted, model
from tests.responses.test_loop import ADD
from tests.responses.test_toolbox import sleepers
from tests.responses.tool_scripts import (
    BROWSER_LOOP,
    INTERPRETER,
    NOTES,
    NOTES_LOOP,
    PYTHON_LOOP,
    SEARCH,
    browser,
    final,
    make_boxes,
    python,
)
from tests.server.conftest import Served

from ossia.server.store import Store

CITED = "Rivers are long【1†L8-L9】🌊, lakes stand【6†L3】."
FORMS = ["whole", "stream", "background", "chat", "chat stream"]
LOOPS = {
    "python": (PYTHON_LOOP, "The sum is 66.", INTERPRETER),
    "browser": (BROWSER_LOOP, CITED, SEARCH),
    "mcp": (NOTES_LOOP, "It is 10.", NOTES),
}


@pytest.fixture(scope="module")
def tooled(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tools")
    served = Served(model(engine=Scripted(FINAL)), Store(f"sqlite:///{folder / 'ossia.db'}"), tools=make_boxes(folder))
    yield served
    served.stop()


def needs_python(served: Served) -> None:
    if served.service.tools.python is None:
        pytest.skip(f"no sandbox works on this machine: {served.service.tools.off['python']}")


def ask(served: Served, form: str, **fields: Any) -> dict[str, Any]:
    """What came of a request in one of the forms: items, the text and its annotations."""
    given = {"include": ["web_search_call.action.sources", "code_interpreter_call.outputs"], **fields}
    if form.startswith("chat"):
        return _ask_chat(served, form == "chat stream", fields)
    if form == "whole":
        response = served.http.post("/v1/responses", json={"input": "What?", **given}).raise_for_status().json()
    elif form == "stream":
        response = lint(read_sse(served.http.post("/v1/responses", json={"input": "?", "stream": True, **given}).text))
    else:
        made = served.http.post("/v1/responses", json={"input": "?", "background": True, **given}).json()
        response = lint(read_sse(served.http.get(f"/v1/responses/{made['id']}?stream=true").text))
    kept = served.http.get(f"/v1/responses/{response['id']}").json()
    assert kept["output"] == response["output"]
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    return {
        "items": response["output"],
        "text": "".join(part["text"] for part in parts),
        "cited": [one for part in parts for one in part["annotations"]],
        "response": response,
    }


def _ask_chat(served: Served, streams: bool, fields: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What?"}]
    tools = [{key: value for key, value in tool.items() if key != "container"} for tool in fields["tools"]]
    if not streams:
        made = served.openai.chat.completions.create(model="gpt-oss-20b", messages=messages, tools=tools)
        message = made.choices[0].message
        assert made.choices[0].finish_reason == "stop"
        cited = [one.url_citation.model_dump() for one in message.annotations or ()]
        return {"items": None, "text": message.content, "cited": cited}
    text, cited = "", []
    for chunk in served.openai.chat.completions.create(
        model="gpt-oss-20b", messages=messages, tools=tools, stream=True
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            cited += [one["url_citation"] for one in (choice.delta.model_extra or {}).get("annotations") or ()]
    return {"items": None, "text": text, "cited": cited}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_of_many_calls_runs_in_every_form(tooled, kind, form):
    if kind == "python":
        needs_python(tooled)
    scripts, said, tool = LOOPS[kind]
    tooled.play(*scripts, REASONED + final(said))
    got = ask(tooled, form, tools=[tool])
    tooled.until_idle()
    assert len(tooled.engine.prompts) == len(scripts) + 1
    types = {"python": "code_interpreter_call", "browser": "web_search_call", "mcp": "mcp_call"}
    if got["items"] is not None:
        calls = [item for item in got["items"] if item["type"] == types[kind]]
        assert [call["status"] for call in calls] == ["completed"] * len(scripts)
    if kind != "browser":
        assert got["text"] == said
        return
    assert "【" not in got["text"]
    assert [one["url"] for one in got["cited"]] == ["local://docs/rivers.html", "local://docs/lakes.html"]
    for one in got["cited"]:
        link = got["text"][one["start_index"] : one["end_index"]]
        assert link.startswith("([") and one["url"] in link


def test_the_packages_helper_streams_an_answer_that_cites_twice(tooled):
    tooled.play(*BROWSER_LOOP, REASONED + final(CITED))
    messages: Any = [{"role": "user", "content": "What?"}]
    with tooled.openai.chat.completions.stream(
        model="gpt-oss-20b", messages=messages, extra_body={"web_search_options": {}}
    ) as stream:
        made = stream.get_final_completion()
    assert len(made.choices[0].message.model_dump()["annotations"]) == 2


def test_all_tools_work_beside_each_other_and_beside_a_function(tooled):
    needs_python(tooled)
    tooled.play(PYTHON_LOOP[0], BROWSER_LOOP[0], NOTES_LOOP[0], CALL)
    got = ask(tooled, "stream", tools=[INTERPRETER, SEARCH, NOTES, ADD])
    kinds = [item["type"] for item in got["items"]]
    assert kinds == ["mcp_list_tools", "code_interpreter_call", "web_search_call", "mcp_call", "function_call"]
    call_id = got["items"][-1]["call_id"]
    tooled.play(python("1"), FINAL)
    output = {"type": "function_call_output", "call_id": call_id, "output": "4"}
    previous = got["response"]["id"]
    again = ask(tooled, "whole", tools=[INTERPRETER, SEARCH, NOTES, ADD], previous_response_id=previous, input=[output])
    # The server's tools are known already.
    assert [item["type"] for item in again["items"]] == ["code_interpreter_call", "message"]
    assert again["items"][0]["container_id"] == got["items"][1]["container_id"]


@pytest.mark.parametrize("keeps", ["previous_response_id", "conversation"])
def test_a_follow_up_cites_and_scrolls_an_earlier_page(tooled, keeps):
    conversation = {"conversation": tooled.openai.conversations.create().id} if keeps == "conversation" else {}
    tooled.play(*BROWSER_LOOP[:2], FINAL)
    first = ask(tooled, "whole", tools=[SEARCH], **conversation)
    tooled.play(browser("open", cursor=1, loc=60), final("As said 【1†L8】."))
    going_on = conversation or {"previous_response_id": first["response"]["id"]}
    got = ask(tooled, "stream", tools=[SEARCH], **going_on)
    assert got["items"][0]["call"] == {
        "name": "open",
        "arguments": {"id": None, "cursor": 1, "loc": 60, "num_lines": None, "view_source": False},
        "cursor": 2,
    }
    assert got["cited"][0]["url"] == "local://docs/rivers.html" and got["cited"][0]["cursor"] == 1


def test_pages_of_one_conversation_are_not_another_ones(tooled):
    tooled.play(*BROWSER_LOOP[:2], FINAL)
    ask(tooled, "whole", tools=[SEARCH])
    tooled.play(browser("open", cursor=0), final("【0†L1】"))
    got = ask(tooled, "whole", tools=[SEARCH])
    assert got["items"][0]["status"] == "failed" and not got["cited"]


def test_files_of_a_container_are_uploaded_listed_fetched_and_deleted(tooled):
    needs_python(tooled)
    client = tooled.openai.containers
    container = client.create(name="mine")
    put = client.files.create(container.id, file=("numbers.csv", b"1\n2\n"))
    assert (put.path, put.bytes, put.source) == ("/mnt/data/numbers.csv", 4, "user")
    code = "open('/mnt/data/out.txt', 'w').write(open('/mnt/data/numbers.csv').read() * 2)"
    tooled.play(python(code), FINAL)
    got = ask(tooled, "whole", tools=[{"type": "code_interpreter", "container": container.id}])
    assert got["items"][0]["container_id"] == container.id
    files = {file.path: file for file in client.files.list(container.id)}
    assert set(files) == {"/mnt/data/numbers.csv", "/mnt/data/out.txt"}
    assert files["/mnt/data/out.txt"].source == "assistant"
    fetched = client.files.content.retrieve(files["/mnt/data/out.txt"].id, container_id=container.id)
    assert fetched.read() == b"1\n2\n1\n2\n"
    named = client.files.create(container.id, file=("日本 é.csv", b"1"))
    told = tooled.http.get(f"/v1/containers/{container.id}/files/{named.id}/content").headers["content-disposition"]
    assert told == """attachment; filename="__ _.csv"; filename*=UTF-8''%E6%97%A5%E6%9C%AC%20%C3%A9.csv"""
    client.files.delete(named.id, container_id=container.id)
    client.files.delete(put.id, container_id=container.id)
    assert [file.path for file in client.files.list(container.id)] == ["/mnt/data/out.txt"]
    assert container.id in [one.id for one in client.list()]
    client.delete(container.id)
    with pytest.raises(openai.NotFoundError):
        client.retrieve(container.id)
    with pytest.raises(openai.NotFoundError, match="is not there"):
        tooled.openai.responses.create(
            model="gpt-oss-20b", input="x", tools=[{"type": "code_interpreter", "container": container.id}]
        )


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "..", "a/../../b"])
def test_an_uploaded_file_stays_in_its_folder(tooled, name):
    needs_python(tooled)
    container = tooled.openai.containers.create(name="x")
    answer = tooled.http.post(f"/v1/containers/{container.id}/files", files={"file": (name, b"x")})
    if name == "..":
        assert answer.status_code == 400
    else:
        assert answer.json()["path"] == "/mnt/data/" + name.rpartition("/")[2]
    tooled.openai.containers.delete(container.id)


@pytest.mark.parametrize(
    ("tool", "status", "said"),
    [
        ({"type": "code_interpreter", "container": "cntr_0"}, 404, "is not there"),
        (
            {"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["file-1"]}},
            404,
            "file 'file-1' not found",
        ),
        (
            {"type": "code_interpreter", "container": {"type": "auto", "file_ids": 3}},
            400,
            "container.file_ids: expected",
        ),
        ({"type": "code_interpreter", "container": 3}, 400, "expected an id"),
        ({"type": "web_search", "filters": {"allowed_domains": "x"}}, 400, "lists of names"),
        ({"type": "mcp", "server_label": "nobody"}, 404, "no server is named 'nobody' here"),
        ({"type": "mcp", "server_label": "x", "server_url": "ftp://x"}, 400, "https://"),
        ({"type": "mcp", "server_label": "python"}, 400, "is a name of the format"),
    ],
)
def test_a_declaration_that_cannot_be_used_is_refused(tooled, tool, status, said):
    if tool["type"] == "code_interpreter":
        needs_python(tooled)
    answer = tooled.http.post("/v1/responses", json={"input": "x", "tools": [tool]})
    assert answer.status_code == status and said in answer.json()["error"]["message"]


def test_tools_that_are_not_offered_are_passed_by_and_named(served):
    answer = served.http.post("/v1/responses", json={"input": "x", "tools": [SEARCH, INTERPRETER]})
    assert answer.headers["x-ossia-ignored-tools"] == "web_search, code_interpreter"
    assert served.http.get("/v1/containers").status_code == 404


MAKES = "open('/mnt/data/täble 1.csv', 'w').write('a,b')"
NAMES = "It is [here](sandbox:/mnt/data/t%C3%A4ble%201.csv), not in /mnt/data/other.csv."


@pytest.mark.parametrize("form", ["whole", "stream", "background"])
def test_a_file_that_the_answer_names_is_cited_and_can_be_fetched(tooled, form):
    needs_python(tooled)
    tooled.play(python(MAKES), final(NAMES))
    got = ask(tooled, form, tools=[INTERPRETER])
    (cited,) = got["cited"]
    assert cited["type"] == "container_file_citation" and cited["filename"] == "täble 1.csv"
    assert got["text"][cited["start_index"] : cited["end_index"]] == "sandbox:/mnt/data/t%C3%A4ble%201.csv"
    content = tooled.openai.containers.files.content.retrieve(cited["file_id"], container_id=cited["container_id"])
    assert content.read() == b"a,b"
    # A later turn that runs no code names it too.
    tooled.play(final(NAMES))
    again = ask(tooled, form, tools=[INTERPRETER], previous_response_id=got["response"]["id"])
    assert [one["file_id"] for one in again["cited"]] == [cited["file_id"]]


def test_a_chat_completion_whose_files_are_gone_cites_none(tooled):
    needs_python(tooled)
    tooled.play(python(MAKES), final(NAMES))
    assert ask(tooled, "chat", tools=[INTERPRETER])["cited"] == []


def test_uploaded_files_are_put_into_containers_by_their_ids(tooled):
    needs_python(tooled)
    client = tooled.openai
    kept = client.files.create(file=("table.csv", b"1,2"), purpose="user_data")
    assert (kept.filename, kept.bytes, kept.object) == ("table.csv", 3, "file")
    assert client.files.retrieve(kept.id) == kept and kept.id in [one.id for one in client.files.list()]
    assert client.files.list(purpose="batch").data == [] and client.files.content(kept.id).read() == b"1,2"
    # Into the container of a response, which needs it only when code runs.
    given = {"type": "code_interpreter", "container": {"type": "auto", "file_ids": [kept.id]}}
    reads = "open('/mnt/data/table.csv', 'a+').seek(0); print(open('/mnt/data/table.csv').read())"
    tooled.play(python(reads), final("/mnt/data/table.csv"))
    got = ask(tooled, "whole", tools=[given])
    assert got["items"][0]["outputs"][0]["logs"] == "1,2\n"
    container_id = got["items"][0]["container_id"]
    (file,) = client.containers.files.list(container_id)
    assert (file.path, file.source) == ("/mnt/data/table.csv", "user")
    # The next turn keeps what the code has made of it.
    tooled.play(python("open('/mnt/data/table.csv', 'w').write('mine')"), python(reads), FINAL)
    again = ask(tooled, "whole", tools=[given], previous_response_id=got["response"]["id"])
    assert again["items"][1]["outputs"][0]["logs"] == "mine\n" and again["items"][1]["container_id"] == container_id
    # Into one that is made beforehand, and into one that is there.
    made = client.containers.create(name="x", file_ids=[kept.id])
    assert [one.path for one in client.containers.files.list(made.id)] == ["/mnt/data/table.csv"]
    other = client.containers.create(name="y")
    copied = client.containers.files.create(other.id, file_id=kept.id)
    assert client.containers.files.content.retrieve(copied.id, container_id=other.id).read() == b"1,2"
    assert client.files.delete(kept.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(kept.id)
    with pytest.raises(openai.NotFoundError, match="file"):
        client.responses.create(model="gpt-oss-20b", input="x", tools=[given])
    for one in (made, other):
        client.containers.delete(one.id)


def test_a_container_that_has_gone_gets_its_files_again(tooled):
    needs_python(tooled)
    kept = tooled.openai.files.create(file=("table.csv", b"1,2"), purpose="user_data")
    given = {"type": "code_interpreter", "container": {"type": "auto", "file_ids": [kept.id]}}
    reads = "print(open('/mnt/data/table.csv').read())"
    tooled.play(python("open('/mnt/data/table.csv', 'w').write('mine')"), FINAL)
    first = ask(tooled, "whole", tools=[given])
    tooled.openai.containers.delete(first["items"][0]["container_id"])
    tooled.play(python(reads), FINAL)
    again = ask(tooled, "whole", tools=[given], previous_response_id=first["response"]["id"])
    assert again["items"][0]["outputs"][0]["logs"].endswith("1,2\n")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data": {"purpose": "user_data"}}, "no file"),
        ({"files": {"file": ("a", b"x")}}, "purpose is 'None'"),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fun"}}, "purpose is 'fun'"),
        ({"files": {"file": ("..", b"x")}, "data": {"purpose": "user_data"}}, "no name of a file"),
        (
            {"files": {"file": ("a", b"x")}, "data": {"purpose": "user_data", "expires_after[seconds]": "1"}},
            "expires_after.seconds is '1'; expected 3600 to 2592000",
        ),
    ],
)
def test_an_upload_that_cannot_be_is_refused(tooled, fields, said):
    fields.setdefault("files", {"other": ("a", b"x")})
    answer = tooled.http.post("/v1/files", **fields)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_results_of_a_search_are_told_if_they_are_asked_for(tooled):
    tooled.play(browser("search", query="standing water"), browser("open", id=0), FINAL)
    wanted = ["web_search_call.results", "web_search_call.action.sources"]
    made = tooled.http.post("/v1/responses", json={"input": "?", "tools": [SEARCH], "include": wanted}).json()
    search, opened, _ = made["output"]
    assert search["results"][0]["title"] == "Lakes" and "standing water" in search["results"][0]["text"]
    assert [one["url"] for one in search["results"]] == [one["url"] for one in search["action"]["sources"]]
    assert opened["results"] == [] and opened["action"]["url"] == search["results"][0]["url"]
    path = f"/v1/responses/{made['id']}"
    assert tooled.http.get(f"{path}?include[]={wanted[0]}").json()["output"][0]["results"] == search["results"]
    tooled.play(browser("search", query="standing water"), FINAL)
    bare = tooled.http.post("/v1/responses", json={"input": "?", "tools": [SEARCH]}).json()["output"][0]
    assert "results" not in bare and "sources" not in bare["action"]


@pytest.mark.parametrize("form", ["stream", "whole", "background", "chat"])
def test_a_client_that_leaves_stops_the_code_it_waited_for(tooled, form):
    needs_python(tooled)
    mark = f"77{FORMS.index(form)}.5"
    tooled.play(python(f"import subprocess\nsubprocess.run(['sleep', '{mark}'])"), FINAL)
    path = "/v1/chat/completions" if form == "chat" else "/v1/responses"
    body: dict[str, Any] = {"tools": [{"type": "code_interpreter"}], "stream": form == "stream"}
    body |= {"messages": [{"role": "user", "content": "x"}]} if form == "chat" else {"input": "x"}
    if form == "background":
        made = tooled.http.post(path, json={**body, "background": True}).json()
        _until(lambda: sleepers(mark))
        assert tooled.http.post(f"/v1/responses/{made['id']}/cancel").json()["status"] == "cancelled"
    else:
        connection = http.client.HTTPConnection(tooled.url.removeprefix("http://"), timeout=20)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        _until(lambda: sleepers(mark))
        connection.close()
    _until(lambda: not sleepers(mark))
    tooled.until_idle()


def _until(holds: Any) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def _soak(folder: Any, length_s: float, num_clients: int = 8) -> int:
    """Loops at once, for a time; the number of responses."""
    boxes = make_boxes(folder)
    engine = _Looping()
    served = Served(model(engine=engine), Store(f"sqlite:///{folder / 'soak.db'}"), tools=boxes)
    faults: list[str] = []
    num_done = [0] * num_clients
    until_s = time.monotonic() + length_s

    def work(number: int) -> None:
        with httpx.Client(base_url=served.url, timeout=120) as http:
            previous = None
            turn = 0
            # One turn at least, however slow the machine is.
            while turn == 0 or time.monotonic() < until_s:
                turn += 1
                body = {"input": f"client {number}", "tools": [INTERPRETER, SEARCH, NOTES], "stream": turn % 2 == 0}
                answer = http.post("/v1/responses", json={**body, "previous_response_id": previous})
                response = lint(read_sse(answer.text)) if body["stream"] else answer.json()
                if response.get("status") != "completed":
                    faults.append(str(response)[:500])
                    return
                num_done[number] += 1
                previous = response["id"] if turn % 5 else None

    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        served.stop()
    assert not faults
    assert all(num_done)
    return sum(num_done)


class _Looping(Scripted):
    """Says a call of each tool in turn and then answers, for each prompt as far as it has come."""

    SAID = (PYTHON_LOOP[1], BROWSER_LOOP[0], NOTES_LOOP[0], PYTHON_LOOP[2], BROWSER_LOOP[1])

    def __init__(self) -> None:
        super().__init__(*self.SAID, FINAL, context=1_000_000)
        self.call, self.start = TOKENIZER.special("<|call|>"), TOKENIZER.special("<|start|>")
        self.user = TOKENIZER.encode("user")[0]

    async def _read(self, prompt: list[int], params: Any) -> Any:
        asked = max(i for i in range(1, len(prompt)) if prompt[i - 1 : i + 1] == [self.start, self.user])
        script = self.scripts[min(prompt[asked:].count(self.call), len(self.SAID))]
        async for output in Scripted(script, context=self.context)._read(prompt, params):
            yield output


def _children() -> set[int]:
    found = set()
    for path in glob.glob("/proc/self/task/*/children"):
        # A thread may end meanwhile.
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            found |= {int(word) for word in file.read().split()}
    return found


def _held() -> dict[str, Any]:
    """What this process has open and running, and the memory that it takes."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    with open("/proc/self/status") as file:
        resident = next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmRSS"))
    return {
        "processes": len(_children()),
        "descriptors": len(links),
        "ports": sum(link.startswith("socket:") for link in links),
        "threads": threading.active_count(),
        "resident MiB": resident,
    }


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_concurrent_loops_leak_no_process_file_or_port(tmp_path, capsys):
    _soak(tmp_path / "warm", 1.0)
    children, before = _children(), _held()
    length_s = float(os.environ.get("SOAK_SECONDS", "20"))
    resident: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(length_s / 40):
            resident.append(_held()["resident MiB"])

    watching = threading.Thread(target=watch)
    watching.start()
    num_done = _soak(tmp_path / "soak", length_s)
    is_over.set()
    watching.join()
    counted = ("processes", "descriptors", "ports", "threads")
    for _ in range(200):
        after = _held()
        if all(after[name] <= before[name] for name in counted):
            break
        time.sleep(0.05)
    with capsys.disabled():
        print(json.dumps({"responses": num_done, "before": before, "after": after, "resident MiB": resident}))
    assert _children() - children == set()
    assert all(after[name] <= before[name] for name in counted), (before, after)
    if length_s >= 60:
        # Caches have filled by half time; what still grows would be a leak.
        half, last = resident[len(resident) // 2 :][:5], resident[-5:]
        assert sum(last) / 5 < sum(half) / 5 * 1.1 + 16, resident


def test_pages_outlive_the_server_and_go_with_their_response(serve, tmp_path):
    url = f"sqlite:///{tmp_path / 'kept.db'}"
    first = serve(*BROWSER_LOOP[:2], FINAL, store=Store(url), tools=make_boxes(tmp_path, python=None, mcp_pool=None))
    made = ask(first, "whole", tools=[SEARCH])
    first.stop()
    boxes = make_boxes(tmp_path, python=None, mcp_pool=None)
    second = serve(final("Read 【1†L8】."), store=Store(url), tools=boxes)
    response_id = made["response"]["id"]
    got = ask(second, "whole", tools=[SEARCH], previous_response_id=response_id)
    assert got["cited"][0]["quote"].startswith("Fact")
    assert second.service.store.tool_state(response_id)["browser"]["views"]
    second.http.delete(f"/v1/responses/{response_id}").raise_for_status()
    assert second.service.store.tool_state(response_id) is None
