"""What the server costs: streamed tokens per second, overhead over the engine, time added to the first token.

    python benchmarks/server.py                     both parts
    python benchmarks/server.py --only scripted     tokens from a script, as fast as they are taken
    python benchmarks/server.py --only engine [--model FOLDER | --shape 20b --layers 2] [--tokens 96]

scripted  a source that says the same words in every answer; the server is held to one core where the machine lets it,
          and the client, this process, to the others. Best of the rounds.
engine    the same prompts at temperature 0, so the same tokens: read from the engine in the server's own process,
          and over HTTP, in turn (A B A B ...). Ratios are medians over the pairs. The time added to the first token is
          from the moment that the engine alone, asked for the same answer, has the token of the first text.
          Without a ``--model`` a checkpoint with random weights is written to a temporary folder first.

Prints JSON, and keeps it in benchmarks/results/ with ``--keep``.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import os
import re
import selectors
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ossia.engine.request import SamplingParams, TokenOutput
from ossia.harmony import Tokenizer

ROOT = Path(__file__).parents[1]
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

    local = LocalModel.open(Config(model=folder, max_context=2_048))
    constrain = Grammars(GrammarCompiler(local.tokenizer))
    made = Model("model", AsyncEngine(local.engine), local.tokenizer, constrain=constrain)
    threading.Thread(target=_obey, args=(pipe, made), daemon=True).start()
    _run(Service(made, Store("sqlite://")), port)


def _run(service: Any, port: int) -> None:
    import uvicorn

    from ossia.server.app import create_app

    uvicorn.run(create_app(service), port=port, log_level="error", loop="uvloop", http="httptools", access_log=False)


def _obey(pipe: Connection, made: Any) -> None:
    """Read answers from the engine alone, as many at once as are asked for, while nobody asks over HTTP."""
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

    async def one(prompt: list[int], params: SamplingParams) -> tuple[list[float], float]:
        times, messages, first = [], 0, 0.0
        message = made.tokenizer.special("<|message|>")
        async for output in made.engine.generate(prompt, params):
            times.append(time.perf_counter())
            if not first and messages:
                first = times[-1]
            messages += output.token_id == message
        return times, first

    async def all_of_them(texts: list[str], num_tokens: int) -> dict[str, float]:
        given = [asked(text, num_tokens) for text in texts]
        begin = time.perf_counter()
        done = await asyncio.gather(*(one(*each) for each in given))
        firsts = [first - begin for _, first in done]
        return {"tokens_per_s": rate([times for times, _ in done]), "first_s": statistics.median(firsts)}

    with suppress(EOFError):
        while True:
            pipe.send(asyncio.run(all_of_them(*pipe.recv())))


def rate(streams: list[list[float]]) -> float:
    """Tokens per second of streams together, from when all have begun until one has ended; the times of their tokens.

    What comes before is the time to the first token, which is told apart.
    """
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    return sum(begin < moment <= end for times in streams for moment in times) / (end - begin)


# The client ------------------------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far: what a core of its own would have taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def streamed(port: int, requests: list[tuple[str, bytes]]) -> dict[str, float]:
    """Read streams together, by bare sockets: on a machine of few cores a client that computes slows the engine."""
    ready = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    firsts: list[float] = []
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in requests]
    begin = time.perf_counter()
    for one, (path, payload) in zip(sockets, requests, strict=True):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        one.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        ready.register(one, selectors.EVENT_READ)
    # An event is a token, but for a few at both ends.
    times: dict[socket.socket, list[float]] = {one: [] for one in sockets}
    while ready.get_map():
        for key, _ in ready.select():
            one = key.fileobj
            assert isinstance(one, socket.socket)
            data = one.recv(1 << 18)
            assert data, f"the server closed the stream: {tails.get(one)!r}"
            now = time.perf_counter()
            if times[one]:
                times[one] += [now] * data.count(b"\n\n")
            elif any(delta in data for delta in DELTAS):
                times[one].append(now)
                firsts.append(now - begin)
            tails[one] = (tails.get(one, b"") + data)[-20_000:]
            if b"data: [DONE]" in tails[one][-40:]:
                ready.unregister(one)
    elapsed = time.perf_counter() - begin
    for one in sockets:
        one.close()
    used = [re.findall(rb'"(?:output|completion)_tokens":(\d+)', tail) for tail in tails.values()]
    whole = sum(int(found[-1]) for found in used) / elapsed
    return {"tokens_per_s": rate([*times.values()]), "whole": whole, "first_s": statistics.median(firsts)}


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


def engine(folder: Path, num_tokens: int, rounds: int) -> dict[str, Any]:
    pipe, other = multiprocessing.get_context("spawn").Pipe()
    server, port = started(serve_engine, str(folder), other)
    out: dict[str, Any] = {"tokens_per_answer": num_tokens}

    def alone(texts: list[str], num: int) -> dict[str, float]:
        pipe.send((texts, num))
        found: dict[str, float] = pipe.recv()
        return found

    for num_streams in (1, 8):
        texts = [f"{i}. {PROMPT}" for i in range(num_streams)]
        alone(texts, 4)
        rates: dict[str, list[float]] = {}
        for _ in range(rounds):
            rates.setdefault("engine", []).append(alone(texts, num_tokens)["tokens_per_s"])
            for name in ("responses", "chat"):
                run = streamed(port, [body(name, text, num_tokens) for text in texts])
                rates.setdefault(name, []).append(run["tokens_per_s"])
        found: dict[str, Any] = {f"{name}_tokens_per_s": round(statistics.median(r), 2) for name, r in rates.items()}
        for name in ("responses", "chat"):
            ratios = [a / b for a, b in zip(rates[name], rates["engine"], strict=True)]
            found[f"{name}_ratio"] = round(statistics.median(ratios), 4)
            found[f"{name}_ratios"] = [round(ratio, 3) for ratio in ratios]
        out[f"{num_streams} streams"] = found
    text = f"0. {PROMPT}"
    for name in ("responses", "chat"):
        added = []
        for _ in range(rounds * 3):
            bare = alone([text], 8)["first_s"]
            added.append(1e3 * (streamed(port, [body(name, text, 8)])["first_s"] - bare))
        out[f"{name}, added to the first token"] = {"median_ms": round(statistics.median(added), 2)}
    server.terminate()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["scripted", "engine"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="20b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    out: dict[str, Any] = {"machine": {"processor": processor(), "cores": os.cpu_count()}}
    if args.only != "engine":
        out["scripted"] = scripted(4_000, min(args.rounds, 3))
    if args.only != "scripted":
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.model
            if folder is None:
                from ossia.model.random_checkpoint import write_random_checkpoint

                folder = write_random_checkpoint(Path(temporary) / "model", args.shape, num_layers=args.layers)
                out["machine"] |= {"shape": args.shape, "layers": args.layers}
            out["engine"] = engine(folder, args.tokens, args.rounds)
    print(json.dumps(out, indent=1))
    if args.keep:
        name = re.sub(r"\W+", "-", out["machine"]["processor"]).strip("-").lower()
        kept = ROOT / "benchmarks" / "results" / name / f"{datetime.date.today().isoformat()}-server.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            out = json.loads(kept.read_text()) | out
        kept.write_text(json.dumps(out, indent=1) + "\n")


def processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


if __name__ == "__main__":
    main()
