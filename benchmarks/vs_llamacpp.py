"""ossia against llama.cpp on the same weights, threads and machine, in turn: A B A B, medians.

    python benchmarks/vs_llamacpp.py [--layers 4] [--rounds 3] [--llamacpp FOLDER] [--only LINES]

Makes under build/bench: a checkpoint of gpt-oss-20b's shape with random weights (`--layers 24` for all of it), the same
weights as GGUF with Q8_0 dense tensors, and llama.cpp from the source package of llama-cpp-python, built for this
machine (`--llamacpp` names a folder with its programs instead). Needs some 8 GB of disk for 4 layers, 25 for 24.

Both engines read 8-bit dense tensors and MXFP4 experts. Each line is one program run of either side after the other;
the tokens are random on both sides. Where both files do not stay in memory together (24 layers in 24 GiB), one engine
is measured after the other instead of in turn. Results go to benchmarks/results/<processor>-<instruction set>/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.train.export import export

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench"
PROMPT = "word " * 31
PORT = 18_765


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--llamacpp", type=Path, help="a folder with llama-bench, llama-batched-bench, llama-completion, llama-server"
    )
    parser.add_argument("--only", default="", help="a regular expression for the lines to run")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint that is there already")
    parser.add_argument("--gguf", type=Path, help="its GGUF file")
    arguments = parser.parse_args()

    WORK.mkdir(parents=True, exist_ok=True)
    llamacpp = arguments.llamacpp or build_llamacpp()
    checkpoint = arguments.checkpoint or WORK / f"shape-20b-{arguments.layers}"
    if not checkpoint.exists():
        write_random_checkpoint(checkpoint, "20b", num_layers=arguments.layers)
    gguf = arguments.gguf or checkpoint.with_suffix(".gguf")
    if not gguf.exists():
        export(checkpoint, gguf, "gguf", measure=False)

    sides = Sides(checkpoint, gguf, llamacpp, arguments.threads)
    asked = [entry for entry in plan(sides) if re.search(arguments.only, entry[0])]
    apart = not both_stay_in_memory(checkpoint, gguf)
    if apart:
        # Each engine would read its file from the disk again after every turn of the other.
        ours_of = {name: [ours() for _ in range(arguments.rounds)] for name, ours, _ in asked}
        theirs_of = {name: [theirs() for _ in range(arguments.rounds)] for name, _, theirs in asked}
    lines = []
    for name, ours, theirs in asked:
        if apart:
            pairs = list(zip(ours_of[name], theirs_of[name], strict=True))
        else:
            pairs = [(ours(), theirs()) for _ in range(arguments.rounds)]
        lines.append(line(name, pairs))
        print(
            f"{name:<28} ossia {lines[-1]['ossia']:8.2f}  llama.cpp {lines[-1]['llama.cpp']:8.2f} {unit(name):<9}"
            f" ratio {lines[-1]['ratio']:.2f}  {share(lines[-1], sides, name)}",
            flush=True,
        )
    result = {"layers": arguments.layers, "machine": sides.machine, "lines": lines, "load": os.getloadavg()}
    result["order"] = "one engine after the other" if apart else "in turn"
    print(f"written: {write_result(result)}")


def both_stay_in_memory(checkpoint: Path, gguf: Path) -> bool:
    size = gguf.stat().st_size + sum(file.stat().st_size for file in checkpoint.iterdir())
    return size < 0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Sides:
    """The two engines' programs, each run as a process that prints JSON."""

    def __init__(self, checkpoint: Path, gguf: Path, llamacpp: Path, threads: int) -> None:
        self.checkpoint, self.gguf, self.llamacpp, self.threads = checkpoint, gguf, llamacpp, threads
        self.machine: dict[str, Any] = self._bench()["machine"]
        self.shares: dict[str, list[tuple[float, float]]] = {}

    def ours(self, name: str, **options: str | int) -> float:
        """Tokens per second of the one line that ``options`` of `ossia bench` ask for."""
        report = self._bench(**options)
        self.machine = report["machine"]
        measured = report["measurements"][-1]
        seconds = measured["seconds_per_pass"]
        self.shares.setdefault(name, []).append(
            (
                measured["bytes_per_pass"] / seconds / self.machine["read_bytes_per_s"],
                measured["macs_per_pass"] / seconds / self.machine["integer_macs_per_s"],
            )
        )
        return float(measured["tokens_per_s"])

    def _bench(self, **options: str | int) -> dict[str, Any]:
        asked = {"prefill": "", "depth": "", "batch": ""} | options
        flags = [part for key, value in asked.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "ossia", "bench", "--json", "--model", str(self.checkpoint)]
        report: dict[str, Any] = json.loads(run([*command, "--threads", str(self.threads), *flags]))
        return report

    def theirs(self, *options: str | int) -> float:
        command = [self.llamacpp / "llama-bench", "-m", self.gguf, "-t", self.threads, "-r", 1, "-o", "json", *options]
        return float(json.loads(run(command))[-1]["avg_ts"])

    def theirs_together(self, num_seqs: int) -> float:
        command = [self.llamacpp / "llama-batched-bench", "-m", self.gguf, "-t", self.threads, "-c", 4096]
        command += ["-npp", 8, "-ntg", 16, "-npl", num_seqs, "--output-format", "jsonl"]
        lines = [text for text in run(command).splitlines() if text.startswith("{")]
        return float(json.loads(lines[-1])["speed_tg"])

    def our_first_token_s(self) -> float:
        started_s = time.perf_counter()
        # 32 tokens with the opening of the assistant's message: the prompt is given as it is, without a system message.
        program = (
            "import ossia; model = ossia.load({!r}, threads={}); "
            "next(model.complete(model.tokenizer.encode({!r})[:32], max_tokens=1, temperature=0), None)"
        ).format(str(self.checkpoint), self.threads, PROMPT + "word")
        run([sys.executable, "-c", program])
        return time.perf_counter() - started_s

    def their_first_token_s(self) -> float:
        started_s = time.perf_counter()
        command = [self.llamacpp / "llama-completion", "-m", self.gguf, "-t", self.threads, "-c", 8192, "-n", 1]
        run([*command, "--temp", 0, "-no-cnv", "--no-warmup", "-p", PROMPT + "word"])
        return time.perf_counter() - started_s

    def our_server(self, num_clients: int) -> float:
        command = [sys.executable, "-m", "ossia", "serve", "--model", self.checkpoint, "--threads", self.threads]
        return served([*command, "--port", PORT], num_clients)

    def their_server(self, num_clients: int) -> float:
        command = [self.llamacpp / "llama-server", "-m", self.gguf, "-t", self.threads, "-c", 8 * 2048, "-np", 8]
        return served([*command, "--port", PORT, "--no-webui"], num_clients)


def served(command: list[Any], num_clients: int) -> float:
    """Tokens per second of all clients together, each asking for three completions of 48 tokens one after the other."""
    # What random weights say runs in circles: drafts would be right as they never are.
    environ = os.environ | {"OSSIA_DRAFT_TOKENS": "0"}
    command = [str(part) for part in command]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
    try:
        wait_until_healthy(server)
        complete("warm", 0)
        started_s = time.perf_counter()
        with ThreadPoolExecutor(num_clients) as clients:
            asked = [(client, turn) for turn in range(3) for client in range(num_clients)]
            num_tokens = sum(clients.map(lambda ask: complete(*ask), asked))
        return num_tokens / (time.perf_counter() - started_s)
    finally:
        server.terminate()
        server.wait()


def wait_until_healthy(server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.perf_counter() + 120
    while time.perf_counter() < deadline_s and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    sys.exit(f"{server.args!r} did not answer on port {PORT}")


def complete(client: object, turn: int) -> int:
    """One completion of a prompt that no other client or turn has; the number of its tokens."""
    prompt = f"{client} {turn} " + PROMPT
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


Line = tuple[str, Callable[[], float], Callable[[], float]]


def plan(sides: Sides) -> list[Line]:
    lines: list[Line] = []
    for depth in (0, 4096, 16384):
        name = f"decode at depth {depth}"
        lines.append(
            (
                name,
                lambda name=name, depth=depth: sides.ours(name, depth=depth),
                lambda depth=depth: sides.theirs("-p", 0, "-n", 16 if depth == 0 else 8, "-d", depth),
            )
        )
    for length in (512, 4096):
        name = f"prefill {length}"
        lines.append(
            (
                name,
                lambda name=name, length=length: sides.ours(name, prefill=length, repeats=1),
                lambda length=length: sides.theirs("-p", length, "-n", 0),
            )
        )
    for num_seqs in (2, 4, 8, 16):
        name = f"decode, {num_seqs} sequences"
        lines.append(
            (
                name,
                lambda name=name, num_seqs=num_seqs: sides.ours(name, batch=num_seqs),
                lambda num_seqs=num_seqs: sides.theirs_together(num_seqs),
            )
        )
    for num_clients in (1, 4, 8):
        name = f"server, {num_clients} clients"
        lines.append(
            (
                name,
                lambda num_clients=num_clients: sides.our_server(num_clients),
                lambda num_clients=num_clients: sides.their_server(num_clients),
            )
        )
    lines.append(("start to first token", sides.our_first_token_s, sides.their_first_token_s))
    return lines


def line(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both sides, and the median of the pairs' ratios."""
    ours, theirs = zip(*pairs, strict=True)
    return {
        "name": name,
        "unit": unit(name),
        "ossia": statistics.median(ours),
        "llama.cpp": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "pairs": pairs,
    }


def share(entry: dict[str, Any], sides: Sides, name: str) -> str:
    if name not in sides.shares:
        return ""
    entry["share_of_bandwidth"] = statistics.median(memory for memory, _ in sides.shares[name])
    entry["share_of_arithmetic"] = statistics.median(arithmetic for _, arithmetic in sides.shares[name])
    return f"{entry['share_of_bandwidth']:.0%} of memory, {entry['share_of_arithmetic']:.0%} of arithmetic"


def unit(name: str) -> str:
    return "s" if name.startswith("start") else "tokens/s"


def build_llamacpp() -> Path:
    """The folder with llama.cpp's programs, built once from the source package of llama-cpp-python."""
    source = WORK / "llamacpp"
    if not source.exists():
        package = WORK / "package"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        run([*command, "--dest", package, "llama-cpp-python"])
        with tarfile.open(next(package.glob("*.tar.gz"))) as archive:
            archive.extractall(package, filter="data")
        next(package.glob("*/vendor/llama.cpp")).rename(source)
    build = source / "build"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
    run(["cmake", "-S", source, "-B", build, *options])
    targets = ["llama-bench", "llama-batched-bench", "llama-completion", "llama-server"]
    run(["cmake", "--build", build, "--parallel", os.cpu_count() or 1, "--target", *targets])
    return build / "bin"


def run(command: list[Any]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def write_result(result: dict[str, Any]) -> Path:
    machine = result["machine"]
    processor = re.sub(r"\W+", "-", f"{machine['processor']} {machine['isa']}").strip("-").lower()
    folder = ROOT / "benchmarks" / "results" / processor
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today().isoformat()}-vs-llamacpp-{result['layers']}-layers.json"
    if path.exists():
        # Lines of an earlier run of the day that this one did not repeat.
        new = {entry["name"] for entry in result["lines"]}
        result["lines"] += [entry for entry in json.loads(path.read_text())["lines"] if entry["name"] not in new]
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
