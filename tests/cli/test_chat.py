"""`ossia chat` as a person meets it: on a terminal, in a pipe, and its parts over scripted answers."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import resource
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console
from tests.responses.scripts import FINAL, REASONED, TOKENIZER, Scripted, model, tokens

from ossia.cli.chat_input import Joiner, PipeInput, joined, private_file
from ossia.cli.chat_loop import COMMANDS, PATCHES, ChatLoop
from ossia.cli.chat_screen import PlainScreen, RichScreen
from ossia.cli.chat_session import ChatSession
from ossia.cli.chat_text import MarkdownStream, harmless
from ossia.errors import ContextLengthError, InputError, NotFoundError
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.tools.apply_patch import ApplyPatch
from ossia.tools.patch_files import PatchFolder

ROOT = Path(__file__).parents[2]
HOSTILE = "<|channel|>final<|message|>\x1b[31mred\x1b]0;title\x07 \x9b5n \x7f &#27;[2J\r`\x1b[2J`\u202e<|return|>"
PATCH = "*** Begin Patch\n*** Add File: new.txt\n+hello\n*** End Patch"
PATCHING = f"<|channel|>commentary to=functions.apply_patch<|message|>{PATCH}<|call|>"


class Typed:
    """What somebody types, in tests of the loop."""

    def __init__(self, *texts: str, answers: str = "", is_interactive: bool = True) -> None:
        self.texts, self.answers, self.is_interactive = list(texts), list(answers), is_interactive

    def read(self, runner: asyncio.Runner) -> str | None:
        return self.texts.pop(0) if self.texts else None

    async def ask(self, question: str) -> str:
        return self.answers.pop(0) if self.answers else ""


class Chat:
    """A chat with a scripted engine; its output."""

    def __init__(
        self, engine: Scripted, *texts: str, answers: str = "", is_interactive: bool = True, **settings
    ) -> None:
        self.engine = engine
        when_full, tools = settings.pop("when_full", "ask"), settings.pop("tools", None)
        tools_on, file = settings.pop("tools_on", ()), settings.pop("file", None)
        self.session = ChatSession(model(engine=engine), **settings)
        self.source = Typed(*texts, answers=answers, is_interactive=is_interactive)
        self._out, self._notes = io.StringIO(), io.StringIO()
        screen = PlainScreen(self.session.meter, shows_reasoning=False, out=self._out, notes=self._notes)
        rest = {"when_full": when_full, "tools": tools, "tools_on": tools_on, "file": file}
        self.loop = ChatLoop(self.session, self.source, screen, **rest)
        self.code: int | None = None

    def run(self) -> Chat:
        self.code = self.loop.run()
        return self

    @property
    def out(self) -> str:
        return self._out.getvalue()

    @property
    def notes(self) -> str:
        return self._notes.getvalue()


def prompts(engine: Scripted) -> list[str]:
    return [TOKENIZER.decode(prompt) for prompt in engine.prompts]


def ask(session: ChatSession, question: str) -> str:
    return asyncio.run(session.ask(question, lambda event: None))


# The session ------------------------------------------------------------------------------------------------------


def test_the_next_prompt_repeats_the_sampled_tokens_and_leaves_the_thoughts_out():
    # "The" as two tokens, as no tokenizer would write it.
    odd = tokens("<|channel|>final<|message|>") + TOKENIZER.encode("T") + TOKENIZER.encode("he") + tokens("<|return|>")
    engine = Scripted(tokens(REASONED) + odd, FINAL)
    session = ChatSession(model(engine=engine))
    assert ask(session, "one") == ask(session, "two") == "completed"
    kept = odd[:-1] + tokens("<|end|>")
    second = engine.prompts[1]
    assert any(second[i : i + len(kept)] == kept for i in range(len(second)))
    assert "2 and 2 make 4" not in prompts(engine)[1]


def stop_after(session: ChatSession, question: str, num_events: int) -> str:
    async def run() -> str:
        seen = []

        def show(event) -> None:
            seen.append(event)
            if len(seen) == num_events:
                asyncio.current_task().cancel()

        return await session.ask(question, show)

    return asyncio.run(run())


def test_a_stopped_answer_stays_in_the_conversation_with_an_end():
    engine = Scripted("<|channel|>final<|message|>one two three four five six<|return|>", FINAL)
    session = ChatSession(model(engine=engine))
    assert stop_after(session, "count", 7) == "stopped"
    assert session.last.answer.startswith("one") and not session.last.answer.endswith("six")
    assert engine.num_open == 0
    ask(session, "go on")
    said = f"<|start|>assistant<|channel|>final<|message|>{session.turns[0].answer}<|end|>"
    assert said + "<|start|>user<|message|>go on<|end|>" in prompts(engine)[1]


def test_an_answer_that_was_stopped_before_a_word_leaves_nothing():
    engine = Scripted(FINAL)
    session = ChatSession(model(engine=engine))
    assert stop_after(session, "count", 1) == "stopped"
    assert not session.turns and session.take_back() == "count"


def test_to_ask_again_what_came_to_nothing_takes_no_earlier_turn_back():
    session = ChatSession(model(engine=Scripted(FINAL)))
    ask(session, "hi")
    assert stop_after(session, "hi", 1) == "stopped"
    assert session.take_back() == "hi" and len(session.turns) == 1
    ask(session, "hi")
    assert session.take_back() == "hi" and len(session.turns) == 1


def test_a_question_without_room_changes_nothing():
    session = ChatSession(model(engine=Scripted(FINAL, context=90)))
    with pytest.raises(ContextLengthError, match="90"):
        ask(session, "word " * 100)
    assert not session.turns and session.num_tokens > 0


def test_effort_system_and_date_stand_in_the_prompt():
    engine = Scripted(FINAL)
    session = ChatSession(model(engine=engine), effort="high", instructions="Be brief.", current_date="2001-02-03")
    ask(session, "hi")
    assert all(part in prompts(engine)[0] for part in ("Reasoning: high", "Be brief.", "Current date: 2001-02-03"))


def test_a_saved_conversation_goes_on_where_it_was(tmp_path):
    first = ChatSession(model(engine=Scripted(REASONED + FINAL)), effort="low", instructions="Be brief.")
    ask(first, "2+2? é\ud83d")
    first.save(tmp_path / "a.json")
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600
    engine = Scripted(FINAL)
    again = ChatSession(model(engine=engine))
    again.load(tmp_path / "a.json")
    assert (again.effort, again.instructions, again.last.answer) == ("low", "Be brief.", "The answer is 4.")
    ask(again, "sure?")
    assert "The answer is 4.<|end|><|start|>user<|message|>sure?" in prompts(engine)[0]


def test_a_save_replaces_nothing_unasked_and_nothing_by_half(tmp_path):
    session = ChatSession(model(FINAL))
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(InputError, match="already"):
        session.save(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "mine"
    session.save(tmp_path / "a.json", replaces=True)
    assert json.loads((tmp_path / "a.json").read_text())["turns"] == []
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_save_that_failed_leaves_nothing_in_the_way_of_the_next(tmp_path, replaces):
    session, path = ChatSession(model(FINAL)), tmp_path / "a.json"
    if replaces:
        path.write_text("mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError):
            session.save(path, replaces=replaces)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["mine"] * replaces
    session.save(path, replaces=replaces)
    assert json.loads(path.read_text())["turns"] == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"[]", b"{}", b'{"format": "ossia chat 1"}', b"[" * 100_000,
        b'{"format":"ossia chat 1","effort":"low","system":null,"date":null,"turns":[{"question":1,"items":[]}]}',
        b'{"format":"ossia chat 1","effort":"low","system":null,"date":null,"turns":[{"question":"q","items":[{"item":'
        b'{"type":"message"},"messages":[]}]}]}',
        b'{"format":"ossia chat 1","effort":"low","system":null,"date":null,"turns":[{"question":"q","items":[{"item":'
        b'{"type":"x"},"messages":[{"role":"wizard"}]}]}]}',
        b'{"format":"ossia chat 1","effort":"low","system":null,"date":null,"turns":[{"question":"q","items":[{"item":'
        b'{"type":"reasoning","content":"thought"},"messages":[]}]}]}',
        b'{"format":"ossia chat 1","effort":"low","system":null,"date":null,"turns":[{"question":"q","items":[{"item":'
        b'{"type":"x"},"messages":[{"role":"developer","content":[]}]}]}]}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_saved_conversation_is_refused_whole(tmp_path, content):
    session = ChatSession(model(FINAL))
    ask(session, "hi")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError):
        session.load(tmp_path / "a.json")
    assert session.last.question == "hi"
    with pytest.raises(NotFoundError):
        session.load(tmp_path / "b.json")


# Commands ---------------------------------------------------------------------------------------------------------


def test_every_command_is_in_the_help():
    out = Chat(Scripted(FINAL), "/help").run().out
    assert all(f"/{name}" in out for name in COMMANDS)


def test_effort_is_told_and_changed_and_a_wrong_one_refused():
    chat = Chat(Scripted(FINAL), "/effort", "/effort high", "/effort huge", "hi").run()
    assert "effort: medium" in chat.notes and "effort: high" in chat.notes and "'huge'; expected one of" in chat.notes
    assert "Reasoning: high" in prompts(chat.engine)[0]


def test_system_is_set_shown_and_taken_away():
    chat = Chat(Scripted(FINAL), "/system Be brief.", "hi", "/system", "/system -", "ho").run()
    assert chat.notes.count("system: Be brief.") == 2
    assert "Be brief." in prompts(chat.engine)[0] and "Be brief." not in prompts(chat.engine)[1]


def test_retry_asks_the_same_again_with_another_seed():
    chat = Chat(Scripted(FINAL), "/retry", "hi", "/retry", seed=5).run()
    assert "nothing was asked yet" in chat.notes
    assert chat.engine.prompts[0] == chat.engine.prompts[1] and len(chat.session.turns) == 1
    assert chat.engine.params[0].seed != chat.engine.params[1].seed


def test_save_load_and_clear(tmp_path):
    file = tmp_path / "a b.json"
    chat = Chat(Scripted(FINAL), "/save", "hi", f"/save {file}", "/clear", "/tokens", f'/load "{file}"', "/save").run()
    assert "where to?" in chat.notes and "turns: 0" in chat.out
    assert f"saved: {file}" in chat.notes and "loaded: 1 turns" in chat.notes
    assert json.loads(file.read_text())["turns"][0]["question"] == "hi"


def test_a_file_below_a_home_that_is_not_there_is_one_named_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = Chat(Scripted(FINAL), "hi", "/load ~nobody-at-all", "/save ~nobody-at-all.json", "ho").run()
    assert "~nobody-at-all: no such file" in chat.notes and "saved: ~nobody-at-all.json" in chat.notes
    assert (tmp_path / "~nobody-at-all.json").exists() and len(chat.session.turns) == 2


def test_save_asks_before_it_replaces_another_file(tmp_path):
    (tmp_path / "a.md").write_text("mine")
    chat = Chat(Scripted(FINAL), "hi", f"/save {tmp_path / 'a.md'}", answers="n").run()
    assert (tmp_path / "a.md").read_text() == "mine" and "left alone" in chat.notes
    Chat(Scripted(FINAL), "hi", f"/save {tmp_path / 'a.md'}", answers="y").run()
    assert "The answer is 4." in (tmp_path / "a.md").read_text()


def test_reasoning_is_folded_until_it_is_asked_for():
    chat = Chat(Scripted(REASONED + FINAL), "hi", "/reasoning", "/reasoning on", "ho", "/reasoning x").run()
    assert "2 and 2 make 4." in chat.notes and "reasoning is shown" in chat.notes and "met 'x'" in chat.notes
    assert chat.out == "The answer is 4.\n2 and 2 make 4.\n\nThe answer is 4.\n"


def test_tokens_counts_the_next_prompt_exactly():
    chat = Chat(Scripted(FINAL), "hi", "/tokens", "ho").run()
    told = int(re.search(r"context ([\d,]+) of", chat.out)[1].replace(",", ""))
    asked = len(tokens("<|start|>user<|message|>ho<|end|>"))
    assert told + asked == len(chat.engine.prompts[1])


def test_copy_needs_an_answer_and_a_terminal():
    notes = Chat(Scripted(FINAL), "/copy", "hi", "/copy").run().notes
    assert "no answer to copy" in notes and "no terminal" in notes


def test_drop_and_compact_make_room():
    summary = "<|channel|>final<|message|>They said hi.<|return|>"
    chat = Chat(
        Scripted(FINAL, FINAL, summary, FINAL), "/drop", "/compact", "hi", "ho", "/drop", "/compact", "hm"
    ).run()
    assert "no turn to forget" in chat.notes and "nothing to sum up" in chat.notes and "forgotten: hi" in chat.notes
    assert "They said hi." in prompts(chat.engine)[-1] and len(chat.session.turns) == 2


def test_what_the_chat_began_with_is_where_it_is_saved(tmp_path):
    file = tmp_path / "a.json"
    Chat(Scripted(FINAL), "hi", f"/save {file}").run()
    again = Chat(Scripted(FINAL), "ho", "/save", file=file)
    again.session.load(file)
    assert f"saved: {file}" in again.run().notes
    assert [turn["question"] for turn in json.loads(file.read_text())["turns"]] == ["hi", "ho"]


def test_a_summary_that_was_saved_and_loaded_is_no_question_to_ask_again(tmp_path):
    file = tmp_path / "a.json"
    summary = "<|channel|>final<|message|>They said hi.<|return|>"
    chat = Chat(
        Scripted(FINAL, summary, FINAL), "hi", "/compact", f"/save {file}", f"/load {file}", "/retry", "ho", "/retry"
    ).run()
    assert "loaded: 1 turns" in chat.notes and "last asked" not in chat.notes and "nothing was asked yet" in chat.notes
    assert all("They said hi." in prompt and "summed up" not in prompt for prompt in prompts(chat.engine)[2:])
    assert len(chat.engine.prompts) == 4 and len(chat.session.turns) == 2


def test_quit_leaves_and_an_unknown_command_is_named():
    chat = Chat(Scripted(FINAL), "/retri", "/xyzzy", "//slash", "/quit", "never").run()
    assert "did you mean /retry?" in chat.notes and "/help tells" in chat.notes
    assert chat.source.texts == ["never"] and chat.code == 0
    assert "<|message|>/slash<|end|>" in prompts(chat.engine)[0]


def test_tools_are_listed_switched_and_refused():
    chat = Chat(
        Scripted(FINAL),
        "/tools",
        "/tools apply_patch",
        "hi",
        "/tools off",
        "ho",
        "/tools x",
        tools={"apply_patch": PATCHES},
    ).run()
    assert "apply_patch  off" in chat.notes and "apply_patch  on" in chat.notes and "no tool 'x'" in chat.notes
    assert "apply_patch" in prompts(chat.engine)[0] and "apply_patch" not in prompts(chat.engine)[1]
    assert "no tools" in Chat(Scripted(FINAL), "/tools").run().notes


# Patches ----------------------------------------------------------------------------------------------------------


def patching(tmp_path, answers: str) -> Chat:
    chat = Chat(
        Scripted(PATCHING, FINAL), "add it", answers=answers, tools={"apply_patch": PATCHES}, tools_on=["apply_patch"]
    )
    chat.session.patcher = ApplyPatch(PatchFolder(tmp_path), approve=chat.loop.approve)
    return chat.run()


def test_a_patch_is_shown_and_applied_when_it_is_approved(tmp_path):
    chat = patching(tmp_path, "y")
    assert (tmp_path / "new.txt").read_text() == "hello\n"
    assert "+hello" in chat.notes and chat.out == "The answer is 4.\n"
    # What was sampled stands in the next prompt, behind it the answer of the tool.
    assert prompts(chat.engine)[1].startswith(prompts(chat.engine)[0] + PATCHING)


@pytest.mark.parametrize("answers", ["n", ""])
def test_a_patch_that_is_not_approved_changes_nothing(tmp_path, answers):
    chat = patching(tmp_path, answers)
    assert not list(tmp_path.iterdir()) and "declined this patch" in prompts(chat.engine)[1]


async def interrupted(question: str) -> str:
    raise asyncio.CancelledError


def test_ctrl_c_at_the_question_stops_the_turn_and_answers_the_call(tmp_path):
    engine = Scripted(PATCHING, FINAL)
    chat = Chat(engine, "add it", "go on", tools={"apply_patch": PATCHES}, tools_on=["apply_patch"])
    chat.source.ask = interrupted
    chat.session.patcher = ApplyPatch(PatchFolder(tmp_path), approve=chat.loop.approve)
    chat.run()
    assert not list(tmp_path.iterdir()) and "stopped" in chat.notes
    assert "the user has stopped this call.<|end|><|start|>user<|message|>go on" in prompts(engine)[1]


# The context is full ----------------------------------------------------------------------------------------------

LONG = "word " * 330


def full(answers: str, *, is_interactive: bool = True, when_full: str = "ask") -> Chat:
    scripts = (
        FINAL,
        FINAL,
        "<|channel|>final<|message|>Words.<|return|>" if when_full == "compact" or answers == "s" else FINAL,
        FINAL,
    )
    engine = Scripted(*scripts, context=1000)
    return Chat(engine, LONG, LONG, LONG, answers=answers, is_interactive=is_interactive, when_full=when_full).run()


def test_a_full_context_is_told_and_the_oldest_turns_go_when_chosen():
    chat = full("dd")
    assert "The context is full" in chat.notes and "forgotten: word" in chat.notes
    assert chat.out.count("The answer is 4.") == 3


def test_a_full_context_can_begin_a_new_conversation_or_drop_the_question():
    assert len(full("n").session.turns) == 1
    cancelled = full("c")
    assert "was not asked" in cancelled.notes and cancelled.out.count("The answer is 4.") == 2


def test_ctrl_c_at_any_other_question_leaves_all_as_it_was(tmp_path):
    (tmp_path / "a.md").write_text("mine")
    chat = Chat(Scripted(FINAL, context=1000), LONG, f"/save {tmp_path / 'a.md'}", LONG, LONG, "/tokens")
    chat.source.ask = interrupted
    assert chat.run().code == 0 and (tmp_path / "a.md").read_text() == "mine"
    assert "The context is full" in chat.notes and "turns: 2" in chat.out


def test_in_a_pipe_a_full_context_is_an_error_that_names_the_choices():
    chat = full("", is_interactive=False)
    assert chat.code == 1 and "--when-full drop" in chat.notes and chat.out.count("The answer is 4.") == 2


@pytest.mark.parametrize("when_full", ["drop", "compact"])
def test_the_choice_can_be_made_beforehand(when_full):
    chat = full("", is_interactive=False, when_full=when_full)
    assert chat.code == 0 and not {"drop": "forgotten", "compact": "summed up"}[when_full] not in chat.notes


@pytest.mark.parametrize(("context", "num_left_out"), [(2000, 0), (1300, 1), (800, 2)])
def test_what_there_was_no_room_to_sum_up_is_told(context, num_left_out):
    summary = "<|channel|>final<|message|>Words.<|return|>"
    chat = Chat(Scripted(FINAL, FINAL, summary, context=context), "ALPHA " + LONG, "BETA " + LONG, "/compact").run()
    read = prompts(chat.engine)[2]
    assert [name in read for name in ("ALPHA", "BETA")] == [num_left_out < 1, num_left_out < 2]
    assert ("nothing of the oldest turns" in chat.notes) == bool(num_left_out)
    assert not num_left_out or f"turns ({num_left_out})" in chat.notes


def test_a_question_that_never_fits_is_an_error_and_the_next_is_answered():
    chat = Chat(Scripted(FINAL, context=150), "word " * 500, "hi", is_interactive=False).run()
    assert chat.code == 1 and "does not fit" in chat.notes and chat.out == "The answer is 4.\n"


def test_an_answer_that_fills_the_context_says_so():
    endless = "<|channel|>final<|message|>" + "word " * 200
    chat = Chat(Scripted(endless, context=150), "hi").run()
    assert "the context is full" in chat.notes


# What is shown ----------------------------------------------------------------------------------------------------


def drawn(*scripts: str, shows_reasoning: bool = False, question: str = "hi", **console) -> str:
    out = io.StringIO()
    made = Console(file=out, force_terminal=True, width=70, height=20, highlight=False, **console)
    session = ChatSession(model(*scripts))
    screen = RichScreen(session.meter, shows_reasoning=shows_reasoning, console=made)
    ChatLoop(session, Typed(question), screen).run()
    return out.getvalue()


def shown(text: str) -> str:
    """What stands in the end: without sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


# Sequences that rich itself writes: colours, the cursor's line, its visibility, erasing a line.
_OURS = re.compile(r"\x1b\[(?:[0-9;]*m|\d*A|2K|\?25[hl]|1A)|\r")


@pytest.mark.parametrize("shows_reasoning", [True, False])
def test_no_text_of_a_model_can_steer_the_terminal(shows_reasoning):
    hostile = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])) + "\x1b]52;c;aGk=\x07"
    thought = f"<|channel|>analysis<|message|>{hostile}<|end|><|start|>assistant"
    text = drawn(thought + HOSTILE.replace("<|return|>", hostile + "<|return|>"), shows_reasoning=shows_reasoning)
    rest = _OURS.sub("", text)
    assert "red" in rest
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", rest), re.findall(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f]..", rest
    )
    # Colours come from the theme: what the model wrote is there to be read.
    assert "\u241b[31mred" in rest


def test_plain_text_for_a_terminal_is_harmless_too(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    session, out = ChatSession(model(HOSTILE)), Terminal()
    ChatLoop(session, Typed("hi"), PlainScreen(session.meter, shows_reasoning=True, out=out, notes=out)).run()
    assert "red" in out.getvalue() and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out.getvalue())


def test_markdown_is_drawn_and_thoughts_are_one_line():
    text = shown(drawn(REASONED + "<|channel|>final<|message|># Title\n\n**bold**\n\n- a\n- b\n\n`x`<|return|>"))
    assert "2 and 2" not in text and re.search(r"thought for \d+\.\d s, \d+ tokens", text)
    assert "Title" in text and "**" not in text and "• a" in text
    assert "2 and 2 make 4." in shown(drawn(REASONED + FINAL, shows_reasoning=True))


def test_finished_blocks_are_printed_once_however_the_text_is_cut():
    text = "# A\n\npara\nmore\n\n- a\n- b\n\n```\nx\n\n# no\n```\nend\n***bold*** and\n\n"
    text += "| a | b |\n|---|---|\n| 1 | 2 |\n\nlast"
    for size in (1, 2, 3, 7, 1000):
        stream, blocks = MarkdownStream(), []
        for i in range(0, len(text), size):
            blocks += stream.feed(text[i : i + size])
        blocks += stream.finish()
        assert "".join(blocks) == text
        if size < 8:
            assert [block.strip().split("\n")[0] for block in blocks] == [
                "# A",
                "para",
                "- a",
                "```",
                "end",
                "| a | b |",
            ]


def test_a_lone_return_ends_no_line():
    text = "10 %\r\r20 %\r\n\r\nthat was\rit\n\nlast\n"
    stream, blocks = MarkdownStream(), []
    for letter in text:
        blocks += stream.feed(letter)
    assert [*blocks, *stream.finish()] == ["10 %\r\r20 %\r\n\r\n", "that was\rit\n\n", "last\n"]
    assert "20 %␍" in shown(drawn("<|channel|>final<|message|>10 %\r\r20 %\r\r\n\nlast\n<|return|>"))


def test_a_huge_block_is_shown_without_being_read_again_and_again():
    stream = MarkdownStream()
    blocks = [block for _ in range(300) for block in stream.feed("word " * 200 + "\n")] + stream.finish()
    assert len("".join(blocks)) == 300 * 1001 and len(blocks) > 1


def test_without_colour_nothing_is_coloured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = drawn(REASONED + "<|channel|>final<|message|>```python\nx = 1\n```\n`code`<|return|>")
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?(?:3[0-9]|4[0-9]|9[0-7])m", text) and "x = 1" in shown(text)


def test_text_from_a_model_keeps_what_is_harmless():
    assert harmless("é 日本 \t\n👍🏽 שלום") == "é 日本 \t\n👍🏽 שלום"
    assert harmless("a\r\nb\rc") == "a\nb\u240dc"


# What is typed ----------------------------------------------------------------------------------------------------


def test_lines_are_joined_by_backslash_and_quotes():
    assert joined("a\\\nb") == ("a\nb", False)
    assert joined('"""a\nb\n"""') == ("a\nb", False)
    assert joined('"""one"""') == ("one", False)
    assert joined("a\\")[1] and joined('"""a\nb')[1] and not joined("a\nb")[1]
    joiner = Joiner()
    assert [joiner.feed(line) for line in ("x", '"""', "", "y", '"""')] == ["x", None, None, None, "\ny"]


def test_a_pipe_gives_lines_and_passes_by_what_is_no_text():
    source = PipeInput(io.BytesIO(b'one\r\n\xff\xfe\n\ntwo\\\nthree\n"""\na\nb\n"""\nrest\\'))
    got = []
    with asyncio.Runner() as runner:
        while True:
            try:
                text = source.read(runner)
            except InputError as error:
                got.append(error.message[:22])
                continue
            if text is None:
                break
            got.append(text)
    assert got == ["one", "line 2 is not UTF-8 te", "", "two\nthree", "a\nb", "rest"]


def test_a_line_without_end_is_passed_by():
    source = PipeInput(io.BytesIO(b"x" * (9 << 20) + b"\nnext\n"))
    with asyncio.Runner() as runner:
        with pytest.raises(InputError, match="line 1 is longer"):
            source.read(runner)
        assert source.read(runner) == "next"


def test_the_history_is_private_and_never_a_link(tmp_path):
    path = tmp_path / "new" / "chat_history"
    assert private_file(path) == path and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert private_file(path) == path and stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "fifo")
    assert private_file(tmp_path / "link") is None and private_file(tmp_path / "fifo") is None
    assert private_file(Path("/proc/nothing/here")) is None


# The process ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("chat") / "tiny", "tiny")


@pytest.fixture
def environ(tmp_path):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OSSIA_") and key != "NO_COLOR"}
    path = os.pathsep.join([str(ROOT), *filter(None, [clean.get("PYTHONPATH")])])
    here = {"XDG_CONFIG_HOME": "/nonexistent", "XDG_DATA_HOME": str(tmp_path / "data"), "TERM": "xterm-256color"}
    return clean | here | {"PYTHONPATH": path}


def piped(environ, checkpoint, stdin: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ossia", "chat", "--model", str(checkpoint), "--seed", "3", "--max-tokens", "12"]
    return subprocess.run([*command, *arguments], input=stdin, capture_output=True, timeout=120, env=environ)


def test_each_line_of_a_pipe_is_answered_and_a_bad_one_told_by_the_exit_code(environ, checkpoint):
    done = piped(environ, checkpoint, b"hi\n\n\xff\n/tokens\nho")
    assert done.returncode == 1 and b"line 3 is not UTF-8" in done.stderr and b"random" in done.stderr
    assert b"context " in done.stdout and b"\x1b" not in done.stdout
    assert b"> " not in done.stdout + done.stderr
    assert piped(environ, checkpoint, b"").returncode == 0
    assert piped(environ, checkpoint, b"hi", "--tools", "apply_patch").returncode == 1
    assert piped(environ, checkpoint, b"hi", "--date", "tomorrow").returncode == 1
    cut = piped(environ, "nano", b"What is 1234 + 5678?", "--max-tokens", "3")
    assert cut.returncode == 1 and b"cut off" in cut.stderr


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self.text = ""
        self._fd, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (30, 100))
        # Its size is what the terminal says; processes that share tests are told one of their own.
        environ = {key: value for key, value in environ.items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode("utf-8", "surrogateescape"))

    def until(self, pattern: str, timeout_s: float = 60) -> str:
        """Read until what is new matches; that is taken away."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            self._read(end, pattern)
        taken, self.text = self.text[: found.end()], self.text[found.end() :]
        return taken

    def leave(self) -> int:
        code = None
        end = time.monotonic() + 60
        while code is None:
            code = self.process.poll()
            if select.select([self._fd], [], [], 0.05)[0]:
                try:
                    self.text += os.read(self._fd, 65536).decode("utf-8", "replace")
                except OSError:
                    code = self.process.wait(30)
            assert time.monotonic() < end, self.text
        os.close(self._fd)
        return code

    def _read(self, end: float, wanted: str) -> None:
        assert select.select([self._fd], [], [], max(0, end - time.monotonic()))[0], f"no {wanted!r} in {self.text!r}"
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            raise AssertionError(f"ended without {wanted!r}: {self.text!r}") from None
        # Some programs ask where the cursor is before they draw.
        if b"\x1b[6n" in data:
            os.write(self._fd, b"\x1b[1;1R")
        self.text += data.decode("utf-8", "replace")


PROGRAM = """
import sys
from pathlib import Path
from tests.responses.scripts import FINAL, REASONED, Scripted, model
from ossia.cli.chat import converse
COUNT = "<|channel|>final<|message|>" + " ".join(map(str, range(3000))) + "<|return|>"
engine = Scripted(REASONED + COUNT, FINAL, delay_s=0.005)
code = converse(model(engine=engine), data_folder=Path(sys.argv[1]))
print("left", code, len(engine.prompts), "<|end|><|start|>user<|message|>again" in
      __import__("tests.responses.scripts").responses.scripts.TOKENIZER.decode(engine.prompts[-1]))
"""


# The line of status below the prompt, which is drawn with it.
_PROMPT = r"context [\d,]+ of [\d,]+ \(\d+%\)(?: · [\d.]+ tokens/s)? · /help"


def test_a_history_that_cannot_be_written_any_more_keeps_no_question_from_being_asked(environ, tmp_path):
    terminal = Terminal([sys.executable, "-c", PROGRAM, str(tmp_path / "data")], environ)
    terminal.until(_PROMPT)
    # A folder in its place is as good as a full disk.
    (tmp_path / "data" / "chat_history").unlink()
    (tmp_path / "data" / "chat_history").mkdir()
    time.sleep(0.3)
    terminal.type("count\r")
    told = terminal.until("20 21 22")
    assert "Exception" not in told and "Press ENTER" not in told
    terminal.type("\x03")
    terminal.until(_PROMPT)
    time.sleep(0.3)
    terminal.type("\x04")
    assert terminal.leave() == 0


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(environ, tmp_path, term):
    terminal = Terminal([sys.executable, "-c", PROGRAM, str(tmp_path / "data")], environ | {"TERM": term})
    prompt, enter = ("> ", "\n") if term == "dumb" else (_PROMPT, "\r")
    terminal.until(prompt)
    time.sleep(0.3)
    terminal.type("count" + enter)
    terminal.until("20 21 22")
    terminal.type("\x03")
    terminal.until("stopped; what was said is kept")
    terminal.until(prompt)
    time.sleep(0.3)
    # At the prompt it drops what was typed.
    terminal.type("nothing\x03")
    terminal.until(prompt)
    time.sleep(0.3)
    terminal.type("again" + enter)
    terminal.until("The answer is 4.")
    terminal.until(prompt)
    time.sleep(0.3)
    terminal.type("\x04")
    terminal.until("left 0 2 True")
    assert terminal.leave() == 0
    if term == "dumb":
        assert "\x1b" not in terminal.text
    else:
        kept = tmp_path / "data" / "chat_history"
        assert "+again" in kept.read_text() and stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_the_command_on_a_terminal_with_a_random_model(environ, checkpoint, tmp_path):
    command = [sys.executable, "-m", "ossia", "chat", "--model", str(checkpoint), "--seed", "3", "--max-tokens", "30"]
    terminal = Terminal(command, environ)
    terminal.until(_PROMPT)
    time.sleep(0.3)
    terminal.type("hi\r")
    told = terminal.until("30 tokens, [0-9.]+ tokens/s.*?context [0-9,]+ of")
    assert not re.search("[\x80-\x9f]", told)
    time.sleep(0.3)
    terminal.type("/quit\r")
    assert terminal.leave() == 0


def test_a_pipe_that_is_interrupted_ends_with_130(environ, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
    )
    process.stdin.write(b"count\n")
    process.stdin.flush()
    told = b""
    while b"5 6 7" not in told:
        told += os.read(process.stdout.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert b"left 130" in out
