"""The conversation of `ossia chat`, without a terminal: turns asked and answered, kept, saved and loaded.

Each answer is a `Run`, as every API of the server makes it; what was sampled is kept with its tokens, so that the next
prompt repeats them. A turn that was stopped keeps what had been said, each message properly ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ossia.engine.request import NO_TOKEN, SamplingParams, TokenOutput
from ossia.errors import ContextLengthError, InputError, NotFoundError, OssiaError
from ossia.harmony import Message, Role
from ossia.responses.convert import Entry, History, Reader, Spoken
from ossia.responses.events import Event
from ossia.responses.loop import Extras, Model, Run, TokenSource, prepare
from ossia.responses.schema import Json, Reasoning, ResponseRequest
from ossia.responses.toolbox import Toolboxes
from ossia.responses.tools import Toolbox
from ossia.tools.base import Tool

EFFORTS = ("low", "medium", "high")
_FORMAT = "ossia chat 1"
_MAX_FILE_BYTES = 64 << 20
# An answer needs this much room, or the share of a small context, before it is begun.
_MIN_ROOM_TOKENS = 256
_MIN_ROOM_SHARE = 16
_INCLUDE = ["code_interpreter_call.outputs", "web_search_call.action.sources"]

Ending = Literal["completed", "stopped", "cut", "failed"]


class Compacted(NamedTuple):
    """How summing up has ended, and of how many of the oldest turns there was no room for in it."""

    ending: Ending
    num_left_out: int = 0


class Meter:
    """An engine whose tokens are counted and timed: a `TokenSource` over another."""

    def __init__(self, engine: TokenSource) -> None:
        self._engine = engine
        self.reset()

    def reset(self) -> None:
        """A new answer begins."""
        self.started_s = time.perf_counter()
        # Prompt and answer of the latest generation.
        self.num_context_tokens = 0
        # Of all generations of the answer.
        self.num_tokens = 0
        self.first_token_s = 0.0
        self._num_timed = 0
        self._timed_s = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Speed of the tokens behind the first of each generation."""
        return self._num_timed / self._timed_s if self._timed_s > 0 else 0.0

    @property
    def max_context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self._engine.check([0], SamplingParams()) + 1

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> int:
        return self._engine.check(token_ids, params)

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        source = self._engine.generate(token_ids, params)
        self.num_context_tokens = len(token_ids)
        return self._count(source)

    async def _count(self, source: AsyncGenerator[TokenOutput, None]) -> AsyncGenerator[TokenOutput, None]:
        last_s = 0.0
        async with aclosing(source):
            async for output in source:
                now_s = time.perf_counter()
                if output.token_id != NO_TOKEN:
                    if not self.num_tokens:
                        self.first_token_s = now_s - self.started_s
                    if last_s:
                        self._num_timed += 1
                        self._timed_s += now_s - last_s
                    last_s = now_s
                    self.num_tokens += 1
                    self.num_context_tokens += 1
                yield output


@dataclass
class Turn:
    """What was asked, and all that was said to it."""

    question: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The final answer, or what there is of it."""
        said = [e.item for e in self.entries if e.item.get("type") == "message" and e.item.get("role") == "assistant"]
        return "".join(part["text"] for item in said if item.get("phase") != "commentary" for part in item["content"])

    @property
    def is_summary(self) -> bool:
        """Whether it stands for the turns before: its question is a label that nobody asked."""
        return any(entry.item.get("type") == "compaction" for entry in self.entries)

    @property
    def reasoning(self) -> str:
        thoughts = [entry.item for entry in self.entries if entry.item.get("type") == "reasoning"]
        return "\n\n".join("".join(part["text"] for part in item.get("content") or ()) for item in thoughts)


class ChatSession:
    """One conversation. Its settings may be changed between turns."""

    def __init__(
        self,
        model: Model,
        *,
        effort: str = "medium",
        instructions: str | None = None,
        max_tokens: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        seed: int | None = None,
        patcher: Tool | None = None,
        boxes: Toolboxes | None = None,
        current_date: str | None = None,
    ) -> None:
        """``patcher`` is `ApplyPatch`, which the model may call when it is declared; ``boxes`` has the other tools."""
        self.meter = Meter(model.engine)
        self._model = replace(model, engine=self.meter)
        self.effort = effort
        self.instructions = instructions
        # Declarations of tools that ossia runs, as a request of the Responses API has them.
        self.tools: list[Json] = []
        self.turns: list[Turn] = []
        # What was asked last, also if nothing came of it, and the turn that was begun for it.
        self.question: str | None = None
        self._asked: Turn | None = None
        # Why the last answer failed.
        self.error: OssiaError | None = None
        self.patcher = patcher
        self.boxes = boxes
        # Asks a person for a call of an MCP server; without it no such call is made.
        self.approve: Callable[[Json], Awaitable[bool]] | None = None
        # Of the latest response, and what it has left for the next one: pages, and the python that goes on.
        self._toolbox: Toolbox | None = None
        self._tool_state: Json | None = None
        self._max_tokens = max_tokens
        self._sampling = dict(sampling or {})
        self._seed = seed
        self._num_asked = 0
        # A date that changed in the middle would change every token behind it.
        self._date = self._given_date = current_date

    @property
    def name(self) -> str:
        return self._model.name

    # Asking ----------------------------------------------------------------------------------------------------------

    async def ask(self, question: str, show: Callable[[Event], None]) -> Ending:
        """Answer ``question``, telling each event; being cancelled, stop and keep what was said.

        Raises InputError for what cannot be asked; ContextLengthError if there is no room, and nothing has changed
        then. Another failure is told by the ending and `error`.
        """
        self.question, self._asked = question, None
        self.error = None
        run = await self._begin([{"type": "message", "role": "user", "content": question}])
        room = max(
            1, min(_MIN_ROOM_TOKENS, self.meter.max_context // _MIN_ROOM_SHARE, self._max_tokens or _MIN_ROOM_TOKENS)
        )
        if run.num_prompt_tokens + room > self.meter.max_context:
            raise ContextLengthError(
                f"the conversation has {run.num_prompt_tokens:,} tokens of the {self.meter.max_context:,} that the "
                "context holds, which leaves no room for an answer"
            )
        self.meter.reset()
        self._num_asked += 1
        turn = self._asked = Turn(question)
        self.turns.append(turn)
        try:
            return await self._answer(turn, run, show)
        finally:
            # A question to which nothing was said is not kept: the next one would follow it unanswered.
            if not any(_is_said(entry) for entry in turn.entries):
                self.turns.remove(turn)

    async def _answer(self, turn: Turn, run: Run, show: Callable[[Event], None]) -> Ending:
        while True:
            is_stopped = await _stopped(self._show_all(run, show))
            if is_stopped:
                for event in run.cancel():
                    show(event)
            if run.toolbox is not None:
                self._tool_state = run.toolbox.state()
                await run.toolbox.close()
            turn.entries += [*run.input, *run.output]
            turn.entries += self._half_said(run)
            if is_stopped:
                return "stopped"
            if run.error is not None:
                self.error = run.error
                return "failed"
            if run.response["status"] == "incomplete":
                return "cut"
            if not run.is_pending:
                return "completed"
            pending = run.output[-1].item
            if pending["type"] == "mcp_approval_request":
                outputs, is_stopped = await self._ask_approval(pending)
            else:
                outputs, is_stopped = await self._run_patch(pending)
            if is_stopped:
                turn.entries += self._read(outputs)
                return "stopped"
            try:
                run = await self._begin(outputs)
            except OssiaError as error:
                turn.entries += self._read(outputs)
                self.error = error
                return "failed"

    async def _show_all(self, run: Run, show: Callable[[Event], None]) -> None:
        async with aclosing(run.events()) as events:
            async for event in events:
                show(event)

    async def _ask_approval(self, request: Json) -> tuple[list[Json], bool]:
        """A person's answer to a call that must be approved, and whether the user has stopped meanwhile."""
        answers: list[bool] = []

        async def ask() -> None:
            if self.approve is not None:
                answers.append(await self.approve(request))

        is_stopped = await _stopped(ask())
        answer = {"approval_request_id": request["id"], "approve": answers == [True]}
        return [{"type": "mcp_approval_response", **answer}], is_stopped

    async def _run_patch(self, call: Json) -> tuple[list[Json], bool]:
        """The output of a call of apply_patch, and whether the user has stopped meanwhile."""
        assert self.patcher is not None
        text = "Error: the user has stopped this call."
        done: list[str] = []

        async def run() -> None:
            assert self.patcher is not None
            done.append((await self.patcher.run(call["name"], call["input"])).text)

        is_stopped = await _stopped(run())
        output = done[0] if done else text
        return [{"type": "custom_tool_call_output", "call_id": call["call_id"], "output": output}], is_stopped

    async def _begin(self, items: list[Json]) -> Run:
        extras = dict(self._sampling)
        if self._seed is not None:
            # Asked again, the same question gets another answer.
            extras["seed"] = self._seed + self._num_asked
        request, history = self._request(items), self._history()
        self._toolbox = await self._open_toolbox(request, history)
        return Run(request, self._model, history, extras=Extras(sampling=extras), toolbox=self._toolbox)

    async def set_tools(self, declarations: Sequence[Json]) -> None:
        """Let the model call these, as a request of the Responses API declares them."""
        self.tools = list(declarations)
        self._toolbox = await self._open_toolbox(self._request([]), self._history())

    async def _open_toolbox(self, request: ResponseRequest, history: History) -> Toolbox | None:
        if self.boxes is None or not (request.tools or self._tool_state):
            return None
        items = [entry.item for entry in history.entries] + request.input_items
        # Also from a pipe: where nobody can be asked the answer is no, and the python goes on all the same.
        return await self.boxes.open(request, items, self._tool_state)

    def _request(self, items: list[Json]) -> ResponseRequest:
        reasoning = Reasoning(effort=self.effort)  # type: ignore[arg-type]
        return ResponseRequest(
            input=items,
            instructions=self.instructions,
            reasoning=reasoning,
            tools=list(self.tools),
            max_output_tokens=self._max_tokens,
            include=_INCLUDE,
            store=False,
        )

    def _history(self) -> History:
        if self._date is None:
            self._date = self._model.today()
        return History([entry for turn in self.turns for entry in turn.entries], current_date=self._date)

    def _half_said(self, run: Run) -> list[Entry]:
        """Messages that were cut off, as they stay in the conversation: half a call is not said again."""
        known = {entry.item.get("id") for entry in run.output}
        half = [
            item
            for item in run.response["output"]
            if item["id"] not in known and item["type"] in ("message", "reasoning") and _text_of(item).strip()
        ]
        return self._read(half)

    def _read(self, items: list[Json]) -> list[Entry]:
        return Reader(self._history(), self._model.seal, self._model.memory).read(items)

    # Room ------------------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation as the next prompt has it."""
        request = self._request([])
        return len(prepare(request, self._model, self._history(), None, self._toolbox).prompt.token_ids)

    def drop_oldest(self) -> bool:
        """Forget the oldest turn; False if there is none."""
        if self.turns:
            del self.turns[0]
        return bool(self.turns)

    async def compact(self) -> Compacted:
        """Let the model sum up the conversation, which the summary then stands for. Raises InputError without one."""
        if not self.turns:
            raise InputError("there is nothing to sum up yet")
        self.meter.reset()
        run = await self._begin([{"type": "compaction_trigger"}])
        if await _stopped(self._show_all(run, lambda _event: None)):
            return Compacted("stopped")
        if run.error is not None:
            raise run.error
        self.turns = [Turn("(the conversation so far, summed up)", list(run.output))]
        return Compacted("completed", run.num_left_out)

    # Turns -----------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        self.turns = []
        self.question = self._asked = self._tool_state = None
        self._date = self._given_date

    def take_back(self) -> str:
        """Forget the last turn; its question. Raises InputError if there is none."""
        if self.question is None:
            raise InputError("nothing was asked yet")
        if self.keeps_last_asked:
            self.turns.pop()
        return self.question

    @property
    def keeps_last_asked(self) -> bool:
        """Whether the last turn is that of what was asked last, and not an earlier one."""
        return bool(self.turns) and self.turns[-1] is self._asked

    @property
    def last(self) -> Turn | None:
        return self.turns[-1] if self.turns else None

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: Path, *, replaces: bool = False) -> None:
        """Write the conversation as JSON, or as Markdown to read if the name ends in .md; for its owner alone.

        Raises InputError if there is a file already, unless ``replaces``. What fails leaves nothing behind.
        """
        text = self._markdown() if path.suffix == ".md" else json.dumps(self._to_dict(), ensure_ascii=False, indent=1)
        data = text.encode("utf-8", "replace")
        # The old file stays until the new one is whole.
        new = path.with_name(f".{path.name}.{os.getpid()}") if replaces else path
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise InputError(f"{new}: there is such a file already") from None
        try:
            with open(fd, "wb") as file:
                file.write(data)
            if replaces:
                os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> None:
        """Go on with a saved conversation. Raises NotFoundError, or InputError if it is none; nothing has changed
        then."""
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such file") from None
        if len(data) > _MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than the {_MAX_FILE_BYTES >> 20} MiB that a saved conversation may have")
        try:
            read = json.loads(data)
        except (ValueError, RecursionError):
            raise InputError(f"{path}: not JSON; expected a file that /save has written") from None
        if not isinstance(read, dict) or read.get("format") != _FORMAT:
            raise InputError(f"{path}: not a conversation of ossia chat; expected a file that /save has written")
        try:
            effort, instructions, date = read["effort"], read["system"], read["date"]
            turns = [_read_turn(turn, f"{path}: turns[{i}]") for i, turn in enumerate(read["turns"])]
            if effort not in EFFORTS or not all(isinstance(one, str | None) for one in (instructions, date)):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: a field is missing, or is not what /save writes") from None
        self.effort, self.instructions, self._date, self.turns = effort, instructions, date, turns
        # Pages and variables are not saved: they begin anew.
        self._tool_state = None
        self._asked = turns[-1] if turns and not turns[-1].is_summary else None
        self.question = self._asked.question if self._asked is not None else None

    def _to_dict(self) -> Json:
        turns = [
            {
                "question": turn.question,
                "items": [
                    {"item": entry.item, "messages": [one.message.to_dict() for one in entry.spoken]}
                    for entry in turn.entries
                ],
            }
            for turn in self.turns
        ]
        return {
            "format": _FORMAT,
            "model": self.name,
            "effort": self.effort,
            "system": self.instructions,
            "date": self._date,
            "turns": turns,
        }

    def _markdown(self) -> str:
        parts = [f"# A conversation with {self.name}\n"]
        if self.instructions:
            parts.append(f"## System\n\n{self.instructions}\n")
        for turn in self.turns:
            parts += [f"## You\n\n{turn.question}\n", f"## {self.name}\n\n{turn.answer}\n"]
        return "\n".join(parts)


async def _stopped(work: Any) -> bool:
    """Await ``work``; True if the task was cancelled meanwhile, which then counts as dealt with."""
    try:
        await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return True
    return False


def _is_said(entry: Entry) -> bool:
    return entry.item.get("role") != "user" and bool(entry.spoken)


def _text_of(item: Json) -> str:
    return "".join(part.get("text", "") for part in item.get("content") or ())


def _read_turn(raw: Any, where: str) -> Turn:
    entries = []
    for i, one in enumerate(raw["items"]):
        messages = [Message.from_dict(message, f"{where}.items[{i}]") for message in one["messages"]]
        item = one["item"]
        is_said = all(message.role is not Role.SYSTEM and message.content for message in messages)
        if not isinstance(item.get("type"), str) or not is_said:
            raise TypeError
        if item["type"] == "message":
            item["role"], _ = item["role"], [part["text"] + "" for part in item["content"]]
        entries.append(Entry(item, tuple(Spoken(message) for message in messages)))
    turn = Turn(raw["question"] + "", entries)
    # What they are made of is there, and is text.
    _ = turn.answer, turn.reasoning
    return turn
