"""What the server costs: streamed tokens per second, overhead over the engine, time added to the first token.

    python benchmarks/server.py                     all parts, each of --seconds at most
    python benchmarks/server.py --only scripted     tokens from a script, as fast as they are taken
    python benchmarks/server.py --only "8 streams" [--model FOLDER | --shape 20b --layers 4]

scripted    a source that says the same words in every answer; the server is held to one core where the machine lets
            it, and the client, this process, to the others. Best of the rounds.
N streams   the same prompts at temperature 0 under the same grammar, so the same tokens: by `Engine.step` in the
            server's own process, with nothing beside it, and over HTTP to this process, which shares the machine's
            cores. Turns are short and take turns: each over HTTP is compared with the mean of the engine's before and
            behind it, so that a drift of the machine's speed does not count. Median, 95 % bootstrap interval. The
            client reads a stream's first text and then its end, since it shares the cores and is not measured;
            ``--client-reads`` lets it read every event as it comes.
first       what HTTP adds to the time until the token of the first text is there, likewise.

Without a ``--model`` a checkpoint with random weights is written to a temporary folder first. Prints JSON, and keeps it
in benchmarks/results/ with ``--keep``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import selectors
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from machine import keep, machine

from ossia.engine.request import SamplingParams, TokenOutput
from ossia.harmony import Delta, StreamParser, Tokenizer

PROMPT = "Tell a story of a fox and a dog. " * 8
ENDPOINTS = {
    "responses": ("/v1/responses", {"stream": True, "store": False}),
    "responses, stored": ("/v1/responses", {"stream": True}),
    "chat": ("/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": True}}),
}
# What only an event with text holds.
DELTAS = (b'_text.delta"', b'{"reasoning":"', b'{"content":"')


class Source:
    """Says the same words in every answer."""

    def __init__(self, num_tokens: int) -> None:
        tokenizer = Tokenizer.o200k_harmony()
        special = tokenizer.special
        head = [special("<|channel|>"), *tokenizer.encode("final"), special("<|message|>")]
        words = tokenizer.encode(" the quick brown fox jumps over the lazy dog") * (num_tokens // 9 + 1)
        self.script = [*[*head, *words][: num_tokens - 1], special("<|return|>")]

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> int:
        return len(self.script)

    async def generate(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        for i, token_id in enumerate(self.script):
            # Every token is waited for, as an engine's is.
            await asyncio.sleep(0)
            yield TokenOutput(0, token_id, finish_reason="stop" if i + 1 == len(self.script) else None)


def body(name: str, text: str, num_tokens: int | None = None) -> tuple[str, bytes]:
    """Path and body of a request."""
    path, fields = ENDPOINTS[name]
    fields = {**fields, "temperature": 0}
    if path.endswith("responses"):
        fields = {**fields, "input": text, "max_output_tokens": num_tokens}
    else:
        fields = {**fields, "messages": [{"role": "user", "content": text}], "max_tokens": num_tokens}
    return path, json.dumps(fields).encode()


# The server's process --------------------------------------------------------------------------------------------


def serve_scripted(port: int, num_tokens: int) -> None:
    from ossia.responses.loop import Model
    from ossia.server.service import Service
    from ossia.server.store import Store

    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {0})
    _run(Service(Model("scripted", Source(num_tokens), Tokenizer.o200k_harmony()), Store("sqlite://")), port)


def serve_engine(port: int, folder: str, pipe: Connection) -> None:
    from ossia.config import Config
    from ossia.engine import AsyncEngine
    from ossia.engine.masks import GrammarCompiler
    from ossia.local import LocalModel
    from ossia.responses.constrain import Grammars
    from ossia.responses.loop import Model
    from ossia.server.service import Service
    from ossia.server.store import Store

    local = LocalModel.open(Config(model=folder, max_context=2_048, draft_tokens=0))
    constrain = Grammars(GrammarCompiler(local.tokenizer))
    made = Model("model", AsyncEngine(local.engine), local.tokenizer, constrain=constrain)
    threading.Thread(target=_obey, args=(pipe, made, local.engine), daemon=True).start()
    _run(Service(made, Store("sqlite://")), port)


def _run(service: Any, port: int) -> None:
    import uvicorn

    from ossia.server.app import create_app

    uvicorn.run(create_app(service), port=port, log_level="error", loop="uvloop", http="httptools", access_log=False)


def _obey(pipe: Connection, made: Any, engine: Any) -> None:
    """Step the engine alone, for as many answers at once as are asked for, while nobody asks over HTTP."""
    from ossia.responses.constrain import Turn
    from ossia.responses.convert import History
    from ossia.responses.loop import prepare
    from ossia.responses.schema import ResponseRequest

    def asked(text: str, num_tokens: int) -> tuple[list[int], SamplingParams]:
        request = ResponseRequest(input=text)
        read = prepare(request, made, History())
        turn = Turn(read.tools, read.choice, request.format)
        constraint = made.constrain(turn)
        return read.prompt.token_ids, SamplingParams(temperature=0, max_tokens=num_tokens, constraint=constraint)

    def all_of_them(texts: list[str], num_tokens: int) -> dict[str, float]:
        given = [asked(text, num_tokens) for text in texts]
        begin = time.perf_counter()
        sampled: dict[int, list[tuple[float, int]]] = {engine.add_request(*each): [] for each in given}
        while engine.has_work:
            for output in engine.step():
                sampled[output.request_id].append((time.perf_counter(), output.token_id))
        times = [times_of_text(one) for one in sampled.values()]
        streams = [(len(one), one[0], sampled[i][-1][0]) for i, one in zip(sampled, times, strict=True)]
        return {"tokens_per_s": rate(streams), "first_s": statistics.median(one[0] - begin for one in times)}

    def times_of_text(sampled: list[tuple[float, int]]) -> list[float]:
        """When the tokens came of which the server makes an event."""
        parser = StreamParser(made.tokenizer)
        return [at for at, token_id in sampled if any(type(event) is Delta for event in parser.feed(token_id))]

    with suppress(EOFError):
        while True:
            pipe.send(all_of_them(*pipe.recv()))


def rate(streams: list[tuple[int, float, float]]) -> float:
    """Tokens per second of streams together, each from its first text to its end: how many tokens, begin, end.

    What comes before is the time to the first token, which is told apart.
    """
    return sum((num_tokens - 1) / max(end - begin, 1e-6) for num_tokens, begin, end in streams)


# The client ------------------------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far: what a core of its own would have taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def streamed(port: int, requests: list[tuple[str, bytes]], *, reads: bool = True) -> dict[str, float]:
    """Read streams together, by bare sockets: on a machine of few cores a client that computes slows the engine.

    A client that does not read all is woken by the first text and the end.
    """
    ready = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in requests]
    begin = time.perf_counter()
    for one, (path, payload) in zip(sockets, requests, strict=True):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        one.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        ready.register(one, selectors.EVENT_READ)
    times: dict[socket.socket, list[float]] = {one: [] for one in sockets}
    pieces: dict[socket.socket, bytes] = dict.fromkeys(sockets, b"")
    ends: dict[socket.socket, float] = {}
    while ready.get_map():
        for key, _ in ready.select():
            one = key.fileobj
            assert isinstance(one, socket.socket)
            data = one.recv(1 << 20)
            now = time.perf_counter()
            if not data:
                assert b"data: [DONE]" in tails[one][-40:], f"the server closed the stream: {tails.get(one)!r}"
                ready.unregister(one)
                continue
            *events, pieces[one] = (pieces[one] + data).split(b"\n\n")
            begun = bool(times[one])
            times[one] += [now for event in events if any(delta in event for delta in DELTAS)]
            ends[one] = now
            if times[one] and not begun and not reads:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 << 20)
            tails[one] = (tails.get(one, b"") + data)[-20_000:]
    elapsed = time.perf_counter() - begin
    for one in sockets:
        one.close()
    used = [re.findall(rb'"(?:output|completion)_tokens":(\d+)', tail) for tail in tails.values()]
    whole = sum(int(found[-1]) for found in used) / elapsed
    return {
        "tokens_per_s": rate([(len(times[one]), times[one][0], ends[one]) for one in sockets]),
        "whole": whole,
        "first_s": statistics.median(one[0] - begin for one in times.values()),
    }


def started(target: Any, *args: Any) -> tuple[multiprocessing.process.BaseProcess, int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=target, args=(port, *args), daemon=True)
    server.start()
    for _ in range(1_200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, port
        time.sleep(0.05)
    raise SystemExit("the server did not start")


def scripted(num_tokens: int, rounds: int) -> dict[str, Any]:
    server, port = started(serve_scripted, num_tokens)
    everywhere = os.sched_getaffinity(0)
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, everywhere - {0} or {0})
    out: dict[str, Any] = {"tokens_per_answer": num_tokens}
    for num_streams in (1, 8, 64):
        for name in ENDPOINTS:
            best: dict[str, float] = {}
            for _ in range(rounds):
                used_s = cpu_s(server.pid or 0)
                run = streamed(port, [body(name, "Hi")] * num_streams)
                speed = {
                    "tokens_per_s": round(run["whole"]),
                    "tokens_per_cpu_s": round(num_streams * num_tokens / max(cpu_s(server.pid or 0) - used_s, 0.01)),
                }
                best = max(best, speed, key=lambda one: one.get("tokens_per_s", 0))
            out[f"{name}, {num_streams} streams"] = best
    server.terminate()
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, everywhere)
    return out


class Compared:
    """One server with an engine, asked by HTTP and without."""

    def __init__(self, folder: Path, *, client_reads: bool) -> None:
        self._client_reads = client_reads
        self._pipe, other = multiprocessing.get_context("spawn").Pipe()
        self._server, self._port = started(serve_engine, str(folder), other)

    def turn(self, how: str, texts: list[str], num_tokens: int) -> dict[str, float]:
        if how == "engine":
            self._pipe.send((texts, num_tokens))
            found: dict[str, float] = self._pipe.recv()
            return found
        requests = [body(how, text, num_tokens) for text in texts]
        return streamed(self._port, requests, reads=self._client_reads)

    def pairs(
        self, texts: list[str], num_tokens: int, seconds: float
    ) -> Iterator[tuple[str, dict[str, float], dict[str, float], dict[str, float]]]:
        """A turn over HTTP, and the engine's before and behind it, until the time is over; the first ones warm up."""
        for how in ("engine", "responses", "chat"):
            self.turn(how, texts, num_tokens)
        end_s = time.monotonic() + seconds
        before = self.turn("engine", texts, num_tokens)
        while time.monotonic() < end_s:
            for how in ("responses", "chat"):
                over_http = self.turn(how, texts, num_tokens)
                behind = self.turn("engine", texts, num_tokens)
                yield how, over_http, before, behind
                before = behind

    def close(self) -> None:
        self._server.terminate()
        self._server.join()


def streams(compared: Compared, num_streams: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    texts = [f"{i}. {PROMPT}" for i in range(num_streams)]
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for how, over_http, before, behind in compared.pairs(texts, num_tokens, seconds):
        bare = (before["tokens_per_s"] + behind["tokens_per_s"]) / 2
        rates.setdefault("engine", []).append(bare)
        rates.setdefault(how, []).append(over_http["tokens_per_s"])
        ratios.setdefault(how, []).append(over_http["tokens_per_s"] / bare)
    found: dict[str, Any] = {"tokens_per_answer": num_tokens}
    found |= {f"{how}_tokens_per_s": round(statistics.median(all_of_them), 2) for how, all_of_them in rates.items()}
    return found | {f"{how}_ratio": typical(all_of_them, 4) for how, all_of_them in ratios.items()}


def first(compared: Compared, seconds: float) -> dict[str, Any]:
    added: dict[str, list[float]] = {}
    for how, over_http, before, behind in compared.pairs([f"0. {PROMPT}"], 8, seconds):
        bare = (before["first_s"] + behind["first_s"]) / 2
        added.setdefault(how, []).append(1e3 * (over_http["first_s"] - bare))
    return {f"{how}_added_ms": typical(all_of_them, 2) for how, all_of_them in added.items()}


def typical(values: list[float], digits: int) -> dict[str, Any]:
    """The median, with its 95 % interval by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2_000))
    interval = [round(medians[50], digits), round(medians[-51], digits)]
    return {"median": round(statistics.median(values), digits), "interval": interval, "pairs": len(values)}


PARTS = ("scripted", "1 streams", "8 streams", "first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="20b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client-reads", action="store_true")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    parts = [part for part in PARTS if part in args.only]
    out: dict[str, Any] = {"machine": machine()}
    if "scripted" in parts:
        out["scripted"] = scripted(4_000, args.rounds)
        parts.remove("scripted")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model
        if parts and folder is None:
            from ossia.model.random_checkpoint import write_random_checkpoint

            folder = write_random_checkpoint(Path(temporary) / "model", args.shape, num_layers=args.layers)
        if parts:
            out["model"] = args.model.name if args.model else f"{args.shape}, {args.layers} layers, random weights"
            compared = Compared(folder, client_reads=args.client_reads)
        for part in parts:
            if part == "first":
                out[part] = first(compared, args.seconds)
            else:
                name = f"{part}, client reads" if args.client_reads else part
                out[name] = streams(compared, int(part.split()[0]), args.tokens, args.seconds)
        if parts:
            compared.close()
    print(json.dumps(out, indent=1))
    if args.keep:
        keep("server", out)


if __name__ == "__main__":
    main()
