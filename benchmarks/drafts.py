"""What drafts gain: tokens/s of answers that repeat their prompts, and of one that does not, with drafts and without.

    python benchmarks/drafts.py [--model FOLDER | --shape 20b --layers 4] [--threads N] [--tokens 300] [--rounds 4]

Every answer is a text that is given: a constraint allows its tokens alone, so that any weights give it, and the time of
a token does not depend on what it is. With random weights neighbouring tokens go to experts that have nothing to do
with each other: those of a trained model have some in common, and a draft costs less there. Rounds with and without
drafts take turns, and ratios are medians over pairs of them.

edit        a source file in the prompt, the same with names changed
patch       the same file, and the change of it as a diff
quotation   a page in the prompt, and an answer that quotes five of its sentences
records     a JSON array of records with the same fields
prose       a text that is nowhere else: what the search for drafts costs
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import keep, machine

from ossia.engine import Engine, EngineConfig, Runner, SamplingParams
from ossia.harmony import Tokenizer
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import load

ROOT = Path(__file__).parent.parent


class Given:
    """Allows the tokens of one text, in turn."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids, self._place = token_ids, 0

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = 0
        token_id = self._token_ids[self._place]
        mask[token_id // 32] = np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> None:
        self._place += 1


def texts() -> dict[str, tuple[str, str]]:
    """Prompts and answers, of the project's own files."""
    code = (ROOT / "src/ossia/engine/sampler.py").read_text()
    renamed = re.sub(r"\bweights\b", "masses", re.sub(r"\bKept\b", "Remaining", code))
    diff = "".join(difflib.unified_diff(code.splitlines(True), renamed.splitlines(True), "a.py", "b.py"))
    page = (ROOT / "DESIGN.md").read_text()
    sentences = [one for one in re.split(r"(?<=\.)\s", page) if len(one) > 60][:40:8]
    quoted = " ".join(f"As the text says: “{one}” That bears on the question." for one in sentences)
    records = [{"identifier": i, "name": f"item {i * 37 % 101}", "price": i * 7 % 13, "in_stock": i % 3 > 0}
               for i in range(40)]  # fmt: skip
    ask = "Rename `weights` to `masses` and `Kept` to `Remaining` in this file:\n\n"
    return {
        "edit": (ask + code, renamed[renamed.index("class Sampled") :]),
        "patch": (ask + code, diff),
        "quotation": (f"{page}\n\nWhat does it say?", quoted),
        "records": ("Forty records, as JSON.", json.dumps(records)),
        "prose": ("Introduce yourself.", (ROOT / "USAGE_POLICY.md").read_text() + (ROOT / "STYLE.md").read_text()),
    }


def answer(runner: Runner, prompt: list[int], wanted: list[int]) -> tuple[float, float]:
    """Seconds per token behind the first one, and tokens per pass."""
    engine = Engine(runner)
    params = SamplingParams(constraint=Given(wanted), max_tokens=len(wanted), ignore_eos=True)
    engine.add_request(prompt, params)
    got: list[int] = []
    while not got:
        got += [output.token_id for output in engine.step()]
    num_first, num_steps = len(got), 0
    began = time.perf_counter()
    while engine.has_work:
        got += [output.token_id for output in engine.step()]
        num_steps += 1
    seconds = time.perf_counter() - began
    assert got == wanted
    return seconds / (len(got) - num_first), (len(got) - num_first) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="20b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--drafts", type=int, default=EngineConfig().draft_tokens)
    parser.add_argument("--only", default="", help="one of the answers")
    parser.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    tokenizer = Tokenizer.o200k_harmony()
    out: dict[str, Any] = {"machine": machine(), "draft_tokens": args.drafts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model
        if folder is None:
            folder = write_random_checkpoint(Path(temporary) / "model", args.shape, num_layers=args.layers)
        out["model"] = folder.name if args.model else f"{args.shape}, {args.layers} layers, random weights"
        checkpoint = Checkpoint.open(folder)
        ops = load("cpu", threads=args.threads)
        weights = load_weights(checkpoint, ops)
        runners = {
            drafts: Runner(ops, checkpoint.config, weights, EngineConfig(max_context=16_384, draft_tokens=drafts))
            for drafts in (0, args.drafts)
        }
        for name, (prompt, wanted) in texts().items():
            if args.only not in ("", name):
                continue
            prompt_ids, wanted_ids = tokenizer.encode(prompt), tokenizer.encode(wanted)[: args.tokens]
            spent: dict[int, list[float]] = {drafts: [] for drafts in runners}
            tokens_per_pass: dict[int, float] = {}
            for number in range(args.rounds):
                # A B B A: what slows down or speeds up meanwhile is fair to both.
                for drafts in sorted(runners, reverse=number % 2 > 0):
                    seconds, tokens_per_pass[drafts] = answer(runners[drafts], prompt_ids, wanted_ids)
                    spent[drafts].append(seconds)
            plain, drafting = spent[0], spent[args.drafts]
            out[name] = {
                "prompt_tokens": len(prompt_ids),
                "tokens_per_s_without": 1 / statistics.median(plain),
                "tokens_per_s": 1 / statistics.median(drafting),
                "ratio": statistics.median(a / b for a, b in zip(plain, drafting, strict=True)),
                "tokens_per_pass": tokens_per_pass[args.drafts],
            }
            print(name, ", ".join(f"{key} {value:.3g}" for key, value in out[name].items()), flush=True)
    if args.keep:
        print(keep("drafts", out))


if __name__ == "__main__":
    main()
