"""The chat page in a real Chromium: as people use it, on a desk and on a phone."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.responses.scripts import FINAL, REASONED, Scripted, model, tokens
from tests.responses.tool_scripts import browser, final, make_boxes, python
from tests.server.conftest import Served
from tests.server.test_adapters import of_shelf, write_shelf
from tests.server.test_adapters import serve as serve_adapters

from ossia.server.limits import Keys
from ossia.server.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

DESK, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
THOUGHT = "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant"
RICH = final(
    "The river is **70 kilometres** long【1†L12】.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n\\[ x^2 \\]\n\n"
    '```python\nprint(1)\n```\n\n<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> '
    "[evil](javascript:window.hacked=1) ![spy](https://elsewhere.example/spy.png)"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Iterator[Any]:
    """A server with python and a browser over a folder."""
    folder = tmp_path_factory.mktemp("page")
    served = Served(
        model(engine=Scripted(FINAL)),
        Store(f"sqlite:///{folder / 'db'}"),
        tools=make_boxes(folder),
        context=131_072,
    )
    yield served
    served.stop()


class Opened:
    """A tab, and what went wrong in it."""

    def __init__(self, chromium: Any, served: Served, viewport: dict[str, int]) -> None:
        self.context = chromium.new_context(viewport=viewport, accept_downloads=True)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.served = served
        self.page.goto(f"{served.url}/")
        self.page.wait_for_selector("#compose")

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.served.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def ask(self, text: str) -> None:
        self.page.fill("#compose", text)
        self.page.press("#compose", "Enter")

    def until(self, expression: str) -> None:
        """Until an expression is true there; the own wait of Playwright needs eval, which the policy forbids."""
        for _ in range(300):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never came true: {expression}")

    def wait(self) -> None:
        """Until the answer is there."""
        self.page.wait_for_selector(".numbers")


@pytest.fixture
def tab(chromium) -> Iterator[Any]:
    opened: list[Opened] = []

    def open_tab(served: Served, viewport: dict[str, int] = DESK) -> Opened:
        opened.append(Opened(chromium, served, viewport))
        return opened[-1]

    yield open_tab
    for one in opened:
        one.context.close()
        assert one.errors == []
        assert one.elsewhere == [], "the page asked something of another server"


def needs_python(served: Served) -> None:
    if "python" not in served.http.get("/v1/served").json()["tools"]:
        pytest.skip("this machine proves no sandbox")


def test_an_answer_streams_and_its_thoughts_are_behind_a_toggle(tab, served):
    opened = tab(served)
    opened.ask("What is 2 + 2?")
    opened.wait()
    page = opened.page
    assert page.inner_text(".answered .prose") == "The answer is 4."
    assert not page.is_visible(".thoughts")
    page.click(".reasoning summary")
    assert page.inner_text(".thoughts") == "2 and 2 make 4."
    assert "tokens/s" in page.inner_text(".numbers")
    assert page.inner_text("h1") == "What is 2 + 2?"


def test_each_thought_tells_its_time_and_its_exact_tokens_also_after_a_reload(tab, served):
    served.play(REASONED + THOUGHT + FINAL)
    opened = tab(served)
    opened.ask("What is 2 + 2?")
    opened.wait()
    page = opened.page
    counts = [len(tokens(thought.removesuffix("<|start|>assistant"))) for thought in (REASONED, THOUGHT)]
    counts[1] += len(tokens("<|start|>assistant"))
    told = page.locator(".reasoning summary").all_inner_texts()
    shapes = [rf"Thoughts · \d+\.\d s · {count} tokens" for count in counts]
    assert len(told) == 2 and all(map(re.fullmatch, shapes, told)), told
    assert f"{sum(counts)} of them thought" in page.inner_text(".numbers")
    page.reload()
    page.wait_for_selector(".answered")
    assert page.locator(".reasoning summary").all_inner_texts() == told


def test_what_a_model_writes_is_shown_and_never_run(tab, served):
    served.play(RICH)
    opened = tab(served)
    opened.ask("Show me everything")
    opened.wait()
    page = opened.page
    assert page.evaluate("window.hacked") is None
    assert page.locator(".prose script, .prose img, .prose [onerror], .prose a[href^='javascript']").count() == 0
    assert page.locator(".prose table td").count() == 2
    assert page.locator(".prose .katex").count() == 1
    assert page.locator(".prose .hljs-built_in").count() == 1
    assert page.get_attribute(".prose a", "href") == "https://elsewhere.example/spy.png"


def test_the_policy_lets_no_script_run_but_the_pages_own(served):
    answer = served.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert served.http.get("/web/../app.py").status_code == 404
    again = served.http.get("/web/app.js", headers={"if-none-match": served.http.get("/web/app.js").headers["etag"]})
    assert again.status_code == 304


def test_calls_show_code_output_and_pictures_and_citations_open_their_lines(tab, tools):
    needs_python(tools)
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()\n6 * 7"
    tools.play(THOUGHT + browser("search", query="river number 7"), browser("open", id=0), THOUGHT + python(code), RICH)
    opened = tab(tools)
    opened.ask("How long is river number 7?")
    opened.wait()
    page = opened.page
    assert page.inner_text(".call >> nth=0") == "Searched for “river number 7”"
    assert page.get_attribute(".figure", "src").startswith("data:image/png;base64,")
    assert page.inner_text(".logs").strip() == "42"
    page.click(".cite")
    assert "rivers.html" in page.inner_text("dialog")
    assert "kilometres long and flows slowly." in page.inner_text("dialog blockquote")
    page.keyboard.press("Escape")
    opened.until("!document.querySelector('dialog')")


def choose(page: Any) -> None:
    page.set_input_files("input[type=file]", {"name": "numbers.txt", "mimeType": "text/plain", "buffer": b"1 2 3"})


HELD = """() => {
    const held = new DataTransfer();
    held.items.add(new File(["1 2 3"], "numbers.txt", {type: "text/plain"}));
    return held;
}"""


def drop(page: Any) -> None:
    # Beside the message field, where a hand may let go.
    event = {"dataTransfer": page.evaluate_handle(HELD)}
    page.dispatch_event(".messages", "dragover", event)
    page.wait_for_selector(".composer.over")
    page.dispatch_event(".messages", "drop", event)
    page.wait_for_selector(".composer:not(.over)")


@pytest.mark.parametrize("give", [choose, drop])
def test_files_are_put_where_python_finds_them(tab, tools, give: Callable[[Any], None]):
    needs_python(tools)
    tools.play(python("print(open('/mnt/data/numbers.txt').read())"), final("Done."))
    opened = tab(tools)
    page = opened.page
    page.wait_for_selector("input[type=file]", state="attached")
    give(page)
    page.wait_for_selector(".files .file")
    opened.ask("Read it")
    opened.wait()
    assert "/mnt/data/numbers.txt" in page.inner_text(".bubble")
    page.click(".call summary")
    assert page.inner_text(".logs").strip() == "1 2 3"


def test_files_that_are_dropped_one_after_the_other_lie_together_under_their_names(tab, tools):
    needs_python(tools)
    tools.play(python("import os; print(sorted(os.listdir('/mnt/data')))"), final("Done."))
    opened = tab(tools)
    page = opened.page
    page.wait_for_selector("input[type=file]", state="attached")
    page.evaluate(
        """names => names.forEach(name => {
            const held = new DataTransfer();
            held.items.add(new File(["1"], name));
            const event = new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true});
            document.querySelector(".messages").dispatchEvent(event);
        })""",
        ["a.txt", 'the "best".txt'],
    )
    opened.until("document.querySelectorAll('.files .file').length === 2")
    opened.ask("List them")
    opened.wait()
    page.click(".call summary")
    listed = ast.literal_eval(page.inner_text(".logs").strip())
    assert len(listed) == 2
    assert page.inner_text(".bubble").endswith(f"Files: {', '.join(f'/mnt/data/{name}' for name in listed)}")
    assert page.inner_text("h1") == "Files"


def test_files_belong_to_the_conversation_that_they_were_given_in(tab, tools):
    needs_python(tools)
    tools.play(final("Done."))
    opened = tab(tools)
    page = opened.page
    opened.ask("Without files")
    opened.wait()
    page.click("text=New chat")
    held: list[Any] = []
    page.route("**/v1/containers/*/files", lambda route: held.append(route))
    choose(page)
    for _ in range(300):
        if held:
            break
        page.wait_for_timeout(50)
    page.click(".sidebar .title >> text=Without files >> nth=0")
    page.wait_for_selector(".bubble")
    held[0].continue_()
    page.wait_for_selector(".files", state="detached")
    assert page.inner_text("h1") == "Without files"


def test_a_conversation_goes_on_when_its_files_have_ended(tab, tools):
    needs_python(tools)
    tools.play(final("Done."))
    opened = tab(tools)
    page = opened.page
    choose(page)
    page.wait_for_selector(".files .file")
    opened.ask("Read it")
    opened.wait()
    conversation = tools.http.get(f"/v1/conversations/{page.evaluate('location.hash.slice(1)')}").json()
    tools.http.delete(f"/v1/containers/{conversation['metadata']['container']}")
    opened.ask("Go on")
    opened.until("document.querySelectorAll('.answered').length === 2")
    assert "The files of this conversation are gone" in page.inner_text("[role=alert]")
    choose(page)
    page.wait_for_selector(".files .file")


def test_where_no_files_are_taken_a_dropped_one_is_left_alone_and_the_page_stays(tab, served):
    page = tab(served).page
    page.wait_for_selector("text=gpt-oss-20b >> nth=0")
    fired = f"""kind => document.querySelector(".messages").dispatchEvent(
        new DragEvent(kind, {{dataTransfer: ({HELD})(), bubbles: true, cancelable: true}}))"""
    # False: what the browser would do, which is to show the file instead of the page, is prevented.
    assert [page.evaluate(fired, kind) for kind in ("dragover", "drop")] == [False, False]
    assert page.locator(".files, .composer.over").count() == 0


def test_a_stopped_answer_stays_and_the_next_turn_knows_it(tab, served):
    served.play("<|channel|>final<|message|>" + "word " * 400 + "<|return|>", REASONED + FINAL, delay_s=0.02)
    opened = tab(served)
    page = opened.page
    opened.ask("Tell me a lot")
    opened.until("document.querySelector('.answered .prose')?.innerText.length > 40")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=stopped")
    served.until_idle()
    served.engine.delay_s = 0
    opened.ask("Go on")
    opened.wait()
    prompt = served.service.model.tokenizer.decode(served.engine.prompts[-1])
    assert "Tell me a lot" in prompt
    assert "word word word" in prompt
    assert prompt.rstrip().endswith("Go on<|end|><|start|>assistant")


@pytest.mark.parametrize("thoughts", ["", REASONED + THOUGHT])
def test_what_was_asked_before_and_after_a_stop_can_be_edited(tab, serve, thoughts):
    served = serve(REASONED + FINAL)
    opened = tab(served)
    page = opened.page
    opened.ask("First")
    opened.wait()
    served.play(thoughts + "<|channel|>final<|message|>" + "word " * 400 + "<|return|>", FINAL, delay_s=0.02)
    opened.ask("Tell me a lot")
    opened.until("document.querySelectorAll('.answered .prose')[1]?.innerText.length > 40")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=stopped")
    served.until_idle()
    served.engine.delay_s = 0
    opened.ask("Go on")
    opened.wait()
    for asked, left in (("Go on", ["First", "Tell me a lot"]), ("Tell me a lot", ["First"])):
        opened.until("!document.querySelector('.bubble + .actions :disabled')")
        page.locator(".asked >> text=Edit").last.click()
        opened.until(f"document.querySelector('#compose').value === {asked!r}")
        assert page.locator(".bubble").all_inner_texts() == left
    assert not page.locator("[role=alert]").count()


def test_conversations_are_listed_searched_renamed_forked_and_deleted(tab, serve):
    served = serve(REASONED + FINAL)
    opened = tab(served)
    page = opened.page
    for text in ("First apples", "Then pears"):
        opened.ask(text)
        opened.wait()
        page.click("text=New chat")
    titles = ".sidebar .title"
    opened.until(f"document.querySelectorAll('{titles}').length === 2")
    page.fill("#search", "APPLES first")
    opened.until(f"document.querySelectorAll('{titles}').length === 1")
    page.click(titles)
    page.wait_for_selector(".answered")
    page.fill("#search", "")
    opened.until(f"document.querySelectorAll('{titles}').length === 2")
    page.click("text=Fork")
    opened.until(f"document.querySelectorAll('{titles}').length === 3")
    assert page.inner_text("h1") == "First apples (copy)"
    page.click("[aria-label='Rename First apples (copy)']")
    page.fill(".sidebar li input", "Plums")
    page.keyboard.press("Enter")
    opened.until("document.querySelector('h1').innerText === 'Plums'")
    page.reload()
    page.wait_for_selector(".answered")
    assert page.inner_text("h1") == "Plums"
    page.click("[aria-label='Delete Plums']")
    page.click(".doomed >> text=Delete >> nth=-1")
    opened.until(f"document.querySelectorAll('{titles}').length === 2")
    opened.until("document.querySelector('h1').innerText === 'New chat'")


def test_what_more_has_shown_stays_where_an_answer_is_given(tab, serve):
    served = serve()
    for number in range(65):
        made = served.http.post("/v1/conversations", json={"metadata": {"title": f"Kept {number}"}})
        assert made.status_code == 200
    opened = tab(served)
    titles = "document.querySelectorAll('.sidebar .title').length"
    opened.until(f"{titles} === 30")
    opened.page.click("text=More")
    opened.until(f"{titles} === 60")
    opened.ask("First apples")
    opened.wait()
    opened.until("document.querySelector('.sidebar .title').innerText === 'First apples'")
    assert opened.page.evaluate(titles) in (60, 61)
    opened.page.click("text=More")
    opened.until(f"{titles} === 66")
    assert opened.page.query_selector("text=More") is None
    opened.page.fill("#search", "Kept")
    opened.until(f"{titles} === 30")


def test_a_question_can_be_edited_which_leaves_the_old_answer_where_it_was(tab, serve):
    served = serve(REASONED + FINAL)
    opened = tab(served)
    page = opened.page
    for text in ("One", "Two"):
        opened.ask(text)
        opened.until(f"document.querySelectorAll('.answered').length === {1 if text == 'One' else 2}")
        page.wait_for_selector("button.send >> text=Send")
    page.locator(".asked >> text=Edit").last.click()
    opened.until("document.querySelector('#compose').value === 'Two'")
    assert page.locator(".asked").count() == 1
    opened.until("document.querySelectorAll('.sidebar .title').length === 2")


def test_a_conversation_is_exported_for_people_and_for_programs(tab, served):
    opened = tab(served)
    opened.ask("What is 2 + 2?")
    opened.wait()
    page = opened.page
    saved = {}
    for button in ("Markdown", "JSON"):
        page.click("header >> text=Export")
        with page.expect_download() as download:
            page.click(f"dialog >> text={button}")
        saved[button] = (download.value.suggested_filename, download.value.path().read_text())
    name, text = saved["Markdown"]
    assert name == "What is 2  2.md"
    assert "# What is 2 + 2?" in text
    assert "The answer is 4." in text
    items = json.loads(saved["JSON"][1])["items"]
    assert [item["type"] for item in items] == ["message", "reasoning", "message"]


def test_developers_see_the_exact_tokens_and_their_probabilities(tab, served):
    opened = tab(served)
    page = opened.page
    page.click("[aria-label=Settings]")
    page.check("dialog input[type=checkbox]")
    page.keyboard.press("Escape")
    opened.ask("What is 2 + 2?")
    opened.wait()
    page.click("header >> text=Tokens")
    page.wait_for_selector(".tokens .final")
    shown = "".join(page.locator(".tokens .token").all_inner_texts())
    assert "<|start|>assistant<|channel|>analysis<|message|>2 and 2 make 4.<|end|>" in shown
    assert page.locator(".tokens .user").count() > 0
    hover = page.locator(".tokens .final").first.get_attribute("title")
    assert "probability 60.7 %" in hover
    assert page.locator("dialog .hint").count() == 0


def test_developers_are_told_where_no_probabilities_were_kept(tab, served):
    opened = tab(served)
    page = opened.page
    opened.ask("What is 2 + 2?")
    opened.wait()
    page.click("[aria-label=Settings]")
    page.check("dialog input[type=checkbox]")
    page.keyboard.press("Escape")
    page.click("header >> text=Tokens")
    page.wait_for_selector("dialog .hint >> text=The answers here have no probabilities")
    titles = {kind: page.locator(f".tokens .{kind}").last.get_attribute("title") for kind in ("final", "analysis")}
    assert "probability was not kept" in titles["final"]
    assert "not of an answer" in titles["analysis"]
    page.keyboard.press("Escape")
    opened.ask("And again?")
    opened.wait()
    page.click("header >> text=Tokens")
    page.wait_for_selector("dialog .hint >> text=Some answers here have no probabilities")
    assert "probability 60.7 %" in page.locator(".tokens .final").last.get_attribute("title")


def test_a_server_with_keys_asks_for_one(tab, serve):
    served = serve(REASONED + FINAL, keys=Keys([(hashlib.sha256(b"a secret of some length").hexdigest(), "alice")]))
    opened = tab(served)
    page = opened.page
    page.wait_for_selector("text=This server asks for a key")
    page.fill("dialog input", "wrong")
    page.click("text=Use it")
    page.wait_for_selector("text=The server does not know this key.")
    page.fill("dialog input", "a secret of some length")
    page.click("text=Use it")
    page.wait_for_selector("dialog", state="detached")
    opened.ask("What is 2 + 2?")
    opened.wait()
    assert page.inner_text(".answered .prose") == "The answer is 4."


def test_a_fault_is_told_and_what_was_written_stays(tab, served):
    opened = tab(served)
    page = opened.page
    page.route("**/v1/responses", lambda route: route.abort())
    opened.ask("Hello?")
    page.wait_for_selector("[role=alert]")
    assert "cannot be reached" in page.inner_text("[role=alert]")
    assert page.inner_text(".bubble") == "Hello?"


def test_a_question_that_could_not_be_asked_is_not_lost(tab, serve):
    opened = tab(serve(REASONED + FINAL))
    page = opened.page
    page.route("**/v1/conversations", lambda route: route.abort())
    opened.ask("Long and careful")
    page.wait_for_selector("[role=alert]")
    opened.until("document.querySelector('#compose').value === 'Long and careful'")
    page.unroute("**/v1/conversations")
    page.press("#compose", "Enter")
    opened.wait()
    assert page.inner_text(".bubble") == "Long and careful"


def test_the_keyboard_is_enough(tab, served):
    opened = tab(served)
    page = opened.page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    opened.until("document.activeElement.id === 'compose' || location.hash === '#compose'")
    page.focus("#compose")
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    opened.wait()
    assert page.inner_text(".bubble") == "two\nlines"
    page.keyboard.press("Control+k")
    opened.until("document.activeElement.id === 'search'")
    page.keyboard.press("Control+Shift+O")
    opened.until("document.querySelector('h1').innerText === 'New chat'")


def test_pictures_on_buttons_are_drawn_and_need_no_font(tab, tools):
    opened = tab(tools)
    page = opened.page
    opened.ask("What is 2 + 2?")
    opened.wait()
    for button in page.locator("button.icon:visible").all():
        assert button.get_attribute("aria-label")
        assert button.text_content() == ""
        assert button.locator("svg[aria-hidden=true]").bounding_box()["width"] == 16
    labels = [one.get_attribute("aria-label").split()[0] for one in page.locator("button.icon:visible").all()]
    assert {"Conversations", "Settings", "Rename", "Delete"} < set(labels)


def test_an_answer_is_copied_also_where_the_browser_has_no_clipboard_for_pages(tab, served):
    opened = tab(served)
    page = opened.page
    opened.ask("What is 2 + 2?")
    opened.wait()
    # As on a page that came by plain HTTP from another machine.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
    page.click(".answered >> text=Copy")
    page.wait_for_selector("text=Copied")
    page.evaluate("delete navigator.clipboard")
    assert page.evaluate("navigator.clipboard.readText()") == "The answer is 4."


def test_on_a_phone_escape_puts_the_conversations_away(tab, served):
    page = tab(served, PHONE).page
    page.click("[aria-label=Conversations]")
    page.wait_for_selector(".sidebar")
    page.keyboard.press("Escape")
    page.wait_for_selector(".sidebar", state="detached")


class Held:
    """Requests of a tab that wait until they are let go, and the order in which those and answers came."""

    def __init__(self, page: Any) -> None:
        self.page, self.routes, self.order = page, [], []
        self.is_holding = True
        page.route("**/v1/conversations/*/items?*", self._take)
        page.on("requestfinished", lambda request: "/items?" in request.url and self.order.append("filed"))
        page.on("request", lambda request: request.url.endswith("/v1/responses") and self.order.append("asked"))

    def wait(self) -> None:
        for _ in range(300):
            if self.routes:
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("nothing was asked for")

    def _take(self, route: Any) -> None:
        self.routes.append(route) if self.is_holding else route.continue_()

    def let_go(self) -> None:
        self.is_holding = False
        for route in self.routes:
            route.continue_()


def test_another_chat_begins_at_once_while_the_last_answer_is_still_being_filed(tab, serve):
    served = serve(REASONED + FINAL)
    opened = tab(served)
    page = opened.page
    opened.ask("First")
    opened.wait()
    page.click("text=New chat")
    held = Held(page)
    opened.ask("Second")
    opened.wait()
    held.wait()
    page.keyboard.press("Control+Shift+O")
    opened.until("document.querySelector('h1').innerText === 'New chat'")
    page.click(".sidebar .title >> text=First")
    page.click("text=New chat")
    held.let_go()
    with page.expect_response("**/v1/conversations?*"):
        pass
    assert page.inner_text("h1") == "New chat"
    assert page.locator(".bubble").count() == 0
    page.click(".sidebar .title >> text=First")
    opened.until("document.querySelector('.bubble')?.innerText === 'First'")


def test_a_question_waits_until_the_answer_before_it_is_filed(tab, serve):
    served = serve(REASONED + FINAL)
    opened = tab(served)
    page = opened.page
    held = Held(page)
    opened.ask("First")
    opened.wait()
    held.wait()
    opened.ask("Second")
    page.wait_for_selector("button.send >> text=Stop")
    page.wait_for_timeout(200)
    held.let_go()
    opened.wait()
    assert held.order[:3] == ["asked", "filed", "asked"]
    page.locator(".asked >> text=Edit").last.click()
    opened.until("document.querySelector('#compose').value === 'Second'")
    assert page.locator(".bubble").all_inner_texts() == ["First"]


def test_a_question_before_the_page_knows_its_server_stays_in_view(tab, served):
    opened = tab(served)
    page = opened.page
    held: list[Any] = []
    page.route("**/v1/served", lambda route: held.append(route))
    page.reload()
    opened.ask("What is 2 + 2?")
    opened.wait()
    with page.expect_response("**/v1/conversations?*"):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert page.is_visible(".numbers")


def test_a_fault_amid_an_answer_stays_in_view(tab, serve):
    served = serve("<|channel|>final<|message|>Half of <|return|>")
    opened = tab(served)
    page = opened.page
    events = [
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {"id": "m", "type": "message", "role": "assistant", "content": []},
        },
        {
            "type": "response.content_part.added",
            "output_index": 0,
            "content_index": 0,
            "part": {"type": "output_text", "text": ""},
        },
        {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "Half of"},
        {"type": "error", "message": "The engine has ended."},
    ]
    told = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/v1/responses", lambda route: route.fulfill(content_type="text/event-stream", body=told))
    with page.expect_response("**/items"):
        opened.ask("Tell me")
    assert "The engine has ended." in page.inner_text("[role=alert]")
    assert page.inner_text(".answered .prose") == "Half of"


def test_conversations_are_listed_by_key_alone(serve):
    served = serve(keys=Keys([(hashlib.sha256(name.encode()).hexdigest(), name) for name in ("alice", "bob")]))

    def ask(name: str, method: str, path: str, **fields: Any) -> Any:
        return served.http.request(method, path, headers={"authorization": f"Bearer {name}"}, **fields)

    ids = [
        ask("alice", "POST", "/v1/conversations", json={"metadata": {"title": f"t{i}"}}).json()["id"] for i in range(3)
    ]
    assert [one["id"] for one in ask("alice", "GET", "/v1/conversations").json()["data"]] == ids[::-1]
    assert ask("bob", "GET", "/v1/conversations").json()["data"] == []
    page = ask("alice", "GET", "/v1/conversations?limit=2").json()
    assert page["has_more"]
    rest = ask("alice", "GET", f"/v1/conversations?limit=2&after={page['last_id']}").json()
    assert [one["id"] for one in rest["data"]] == ids[:1]
    assert not rest["has_more"]
    assert [one["id"] for one in ask("alice", "GET", "/v1/conversations?query=T1").json()["data"]] == [ids[1]]
    ask("alice", "DELETE", f"/v1/conversations/{ids[1]}")
    assert ask("alice", "GET", "/v1/conversations?query=T1").json()["data"] == []


def test_a_fork_goes_on_from_the_exact_tokens_and_leaves_the_original_alone(serve):
    served = serve(REASONED + FINAL)
    conversation = served.openai.conversations.create(metadata={"title": "one"})
    for text in ("first", "second"):
        served.openai.responses.create(model="gpt-oss-20b", input=text, conversation=conversation.id)
    items = served.http.get(f"/v1/conversations/{conversation.id}/items?order=asc").json()["data"]
    body = {"item_id": items[2]["id"], "metadata": {"title": "two"}}
    fork = served.http.post(f"/v1/conversations/{conversation.id}/fork", json=body).json()
    assert fork["id"] != conversation.id
    assert fork["metadata"] == {"title": "two"}
    served.openai.responses.create(model="gpt-oss-20b", input="second", conversation=fork["id"])
    assert served.engine.prompts[-1] == served.engine.prompts[-2]
    assert len(served.http.get(f"/v1/conversations/{conversation.id}/items").json()["data"]) == len(items)
    missing = served.http.post(f"/v1/conversations/{conversation.id}/fork", json={"item_id": "msg_of_nobody"})
    assert missing.status_code == 404


def test_the_tokens_of_a_request_are_those_that_the_model_reads(served):
    conversation = served.openai.conversations.create()
    served.openai.responses.create(model="gpt-oss-20b", input="first", conversation=conversation.id)
    asked = {"input": "second", "conversation": conversation.id}
    told = served.http.post("/v1/responses/tokens", json=asked).json()["data"]
    served.openai.responses.create(model="gpt-oss-20b", **asked)
    assert [one["id"] for one in told] == served.engine.prompts[-1]
    assert told[0] == {"id": told[0]["id"], "text": "<|start|>", "is_special": True}


@pytest.fixture
def adapted(tmp_path) -> Iterator[Served]:
    """A small model with the adapters polite and terse."""
    folder = write_shelf(tmp_path)
    served, engine = serve_adapters(folder / "tiny", of_shelf(folder), folder / "shelf", max_context=512)
    yield served
    served.stop()
    engine.close()


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_an_adapter_is_chosen_where_the_server_has_some(tab, adapted, viewport):
    opened = tab(adapted, viewport)
    page = opened.page
    choice = page.locator("select[aria-label=Model]")
    choice.wait_for()
    assert choice.locator("option").all_inner_texts() == ["tiny", "polite", "terse"]
    choice.select_option("polite")
    assert page.get_attribute("#compose", "placeholder") == "Ask polite"
    with page.expect_request("**/v1/responses") as asked:
        opened.ask("Hello")
    assert asked.value.post_data_json["model"] == "polite"
    page.reload()
    choice.wait_for()
    assert choice.input_value() == "polite"
    # One that has gone meanwhile is no choice any more.
    adapted.http.post("/v1/unload_lora_adapter", json={"lora_name": "polite"})
    page.reload()
    choice.wait_for()
    assert choice.input_value() == "tiny"


def test_the_page_tells_what_should_be_known_of_the_model(tab, serve):
    page = tab(serve(REASONED + FINAL, notice="the model is a small demonstration")).page
    page.wait_for_selector(".welcome >> text=the model is a small demonstration")


def test_where_there_are_no_adapters_there_is_no_choice(tab, served):
    page = tab(served).page
    page.wait_for_selector("text=gpt-oss-20b >> nth=0")
    assert page.locator("header select").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_stands_in_the_way_of_those_who_cannot_see_or_point(tab, served, viewport, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    served.play(REASONED + RICH)
    opened = tab(served, viewport)
    page = opened.page
    page.emulate_media(color_scheme=scheme)
    opened.ask("Show me everything")
    opened.wait()
    page.click(".reasoning summary")
    if viewport is PHONE:
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        page.click("[aria-label=Conversations]")
        found = [axe.Axe().run(page).response["violations"]]
        page.click(".sidebar [aria-label=Close]")
    else:
        page.click("[aria-label=Settings]")
        found = [axe.Axe().run(page).response["violations"]]
        page.keyboard.press("Escape")
    found.append(axe.Axe().run(page).response["violations"])
    faults = [f"{one['id']}: {node['html'][:200]}" for part in found for one in part for node in one["nodes"]]
    assert faults == []
