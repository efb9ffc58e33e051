"""What the python tool adds to the code's own time: the first call, later calls, and a notebook after a restart.

    python benchmarks/python_tool.py [--rounds 20] [--sandbox auto]

cold      a sandbox is started by the call itself: from asking to the answer of `1`
warm      one was kept ready
later     a call in a running notebook, less the time that the same code takes by its own clock inside
restart   from the end of a call that killed its worker to the answer of the next
proof     the self-test, once for each start of ossia
Medians, and the largest; milliseconds of the whole way, from the tool's `run` to the text for the model.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from ossia.tools.python import PythonSessions

LATER = {
    "1": "1",
    "print": "print('hello')",
    "loop": "import time\nt = time.perf_counter()\nsum(range(200_000))\nprint(time.perf_counter() - t)",
    "100 kB of output": "import time\nt = time.perf_counter()\nprint('x' * 100_000)\nprint(time.perf_counter() - t)",
}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sandbox", default="auto")
    arguments = parser.parse_args()
    started = time.perf_counter()
    async with PythonSessions(arguments.sandbox, num_warm=0, max_sessions=1000) as sessions:
        tier = await sessions.check()
        print(f"{tier}: proof {1e3 * (time.perf_counter() - started):.1f} ms")
        cold = []
        for i in range(arguments.rounds):
            cold.append(await timed(sessions, f"cold{i}", "1"))
            await sessions.end_session(f"cold{i}")
        tell("cold", cold)
        for name, code in LATER.items():
            times = []
            await sessions.tool("later").run("", "0")
            for _ in range(arguments.rounds * 5):
                took = time.perf_counter()
                text = (await sessions.tool("later").run("", code)).text
                took = time.perf_counter() - took
                own_s = float(text.split("\n")[-1]) if "perf_counter" in code else 0.0
                times.append(1e3 * (took - own_s))
            tell(f"later: {name}", times)
        restarts = []
        for _ in range(arguments.rounds):
            await sessions.tool("later").run("", "import os\nos._exit(1)")
            restarts.append(await timed(sessions, "later", "1"))
        tell("restart", restarts)
    async with PythonSessions(arguments.sandbox, num_warm=1, max_sessions=1000) as sessions:
        await sessions.check()
        warm = []
        for i in range(arguments.rounds):
            await asyncio.sleep(0.3)
            warm.append(await timed(sessions, f"warm{i}", "1"))
            await sessions.end_session(f"warm{i}")
        tell("warm", warm)


async def timed(sessions: PythonSessions, key: str, code: str) -> float:
    started = time.perf_counter()
    text = (await sessions.tool(key).run("", code)).text
    assert text.endswith("1"), text
    return 1e3 * (time.perf_counter() - started)


def tell(name: str, times_ms: list[float]) -> None:
    print(f"{name:<26} median {statistics.median(times_ms):7.2f} ms   largest {max(times_ms):7.2f} ms")


asyncio.run(main())
