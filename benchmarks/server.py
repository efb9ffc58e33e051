"""What the server costs: streamed tokens per second, overhead over the source alone, time added to the first token.

    python benchmarks/server.py                    scripted tokens, as fast as they are taken
    python benchmarks/server.py --pace-s 0.01      as an engine gives them: one every 10 ms for each stream

The server runs in a process of its own, on one core where the machine lets it; this process is the client. The bare
source is read in this process by as many tasks as there are streams. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from ossia.engine.request import SamplingParams, TokenOutput
from ossia.harmony import Tokenizer

NUM_TOKENS = 4_000


class Source:
    """Says the same words in every answer, one every ``pace_s``."""

    def __init__(self, num_tokens: int, pace_s: float) -> None:
        tokenizer = Tokenizer.o200k_harmony()
        special = tokenizer.special
        head = [special("<|channel|>"), *tokenizer.encode("final"), special("<|message|>")]
        words = tokenizer.encode(" the quick brown fox jumps over the lazy dog") * (num_tokens // 9 + 1)
        self.script = [*[*head, *words][: num_tokens - 1], special("<|return|>")]
        self.pace_s = pace_s

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> int:
        return len(self.script)

    async def generate(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        begin = time.perf_counter()
        for i, token_id in enumerate(self.script):
            # Every token is waited for, as an engine's is.
            await asyncio.sleep(max(0.0, begin + i * self.pace_s - time.perf_counter()) if self.pace_s else 0)
            yield TokenOutput(0, token_id, finish_reason="stop" if i + 1 == len(self.script) else None)


def serve(port: int, num_tokens: int, pace_s: float) -> None:
    import uvicorn

    from ossia.responses.loop import Model
    from ossia.server.app import create_app
    from ossia.server.service import Service
    from ossia.server.store import Store

    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, {0})
    made = Model("scripted", Source(num_tokens, pace_s), Tokenizer.o200k_harmony())
    uvicorn.run(
        create_app(Service(made, Store("sqlite://"))), port=port, log_level="error", loop="uvloop", http="httptools"
    )


async def bare(source: Source, num_streams: int) -> float:
    """Tokens per second of the source alone."""

    async def read() -> None:
        async for _ in source.generate([], SamplingParams()):
            pass

    begin = time.perf_counter()
    await asyncio.gather(*(read() for _ in range(num_streams)))
    return num_streams * len(source.script) / (time.perf_counter() - begin)


def cpu_s(pid: int) -> float:
    """Processor time that a process has used so far: what a core of its own would have taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def streamed(
    port: int, pid: int, path: str, body: dict[str, object], num_streams: int, num_tokens: int
) -> dict[str, float]:
    """Tokens per second over the wire and the time to the first delta; raw sockets cost this client little."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )

    async def one() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begin = time.perf_counter()
        writer.write(head.encode() + payload)
        first, tail = 0.0, b""
        while b"[DONE]" not in tail:
            data = await reader.read(1 << 18)
            assert data, "the server closed the stream"
            if not first and (b"delta" in data):
                first = time.perf_counter() - begin
            tail = (tail + data)[-64:]
        writer.close()
        return first

    begin, used_s = time.perf_counter(), cpu_s(pid)
    firsts = await asyncio.gather(*(one() for _ in range(num_streams)))
    elapsed = time.perf_counter() - begin
    num = num_streams * num_tokens
    return {
        "tokens_per_s": num / elapsed,
        "tokens_per_core_s": num / max(cpu_s(pid) - used_s, 0.01),
        "first_token_ms": 1e3 * sorted(firsts)[num_streams // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pace-s", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(port, args.tokens, args.pace_s), daemon=True
    )
    server.start()
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, set(range(os.cpu_count() or 1)) - {0} or {0})
    source = Source(args.tokens, args.pace_s)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    forms = {
        "responses": ("/v1/responses", {"input": "Hi", "stream": True, "store": False}),
        "responses, stored": ("/v1/responses", {"input": "Hi", "stream": True}),
        "chat": ("/v1/chat/completions", chat),
    }
    out: dict[str, object] = {"machine": platform.processor() or platform.machine(), "pace_s": args.pace_s}
    for num_streams in (1, 8):
        alone = max(asyncio.run(bare(source, num_streams)) for _ in range(args.repeats))
        out[f"source alone, {num_streams} streams"] = {"tokens_per_s": round(alone)}
        for name, (path, body) in forms.items():
            runs = [
                asyncio.run(streamed(port, server.pid or 0, path, body, num_streams, args.tokens))
                for _ in range(args.repeats)
            ]
            best = max(runs, key=lambda run: run["tokens_per_s"])
            out[f"{name}, {num_streams} streams"] = {
                "tokens_per_s": round(best["tokens_per_s"]),
                "tokens_per_core_s": round(max(run["tokens_per_core_s"] for run in runs)),
                "of_source": round(best["tokens_per_s"] / alone, 4),
                "first_token_ms": round(min(run["first_token_ms"] for run in runs), 2),
            }
    print(json.dumps(out, indent=1))
    server.terminate()


if __name__ == "__main__":
    main()
