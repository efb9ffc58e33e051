"""Cost of a turn's grammar: time to compile, time per mask, and tokens/s of an engine with and without masks.

    python benchmarks/masks.py [--model FOLDER | --shape 20b --layers 2] [--backend cpu] [--tokens 200] [--keep]

masks   a turn with reasoning, a preamble, a call and a JSON answer is fed token by token to a fresh constraint of a
        grammar that is known, as every request but the first of its kind meets it. Times are the medians over all
        tokens, of the processor's clock, which other programs on the machine do not slow.
engine  one token of the same prompt without a constraint, one in free text, one in a JSON array of numbers, and so on
        (A B C A B C ...), so that a busy machine slows all; ratios of tokens/s are medians over neighbouring tokens.
        Without a ``--model`` a checkpoint with random weights is written to a temporary folder first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import keep, machine

from ossia.engine import Engine, EngineConfig, Runner, SamplingParams
from ossia.engine.masks import GrammarCompiler, TurnConstraint
from ossia.harmony import Tokenizer, ToolNamespace
from ossia.harmony.grammar import Schema, Tool, ToolChoice, TurnGrammar, turn_grammar
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import load

WEATHER = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "description": "City and country"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "hours": {"type": "array", "items": {"type": "number"}, "maxItems": 24},
        "note": {"type": ["string", "null"], "maxLength": 200},
    },
    "required": ["location", "unit", "days", "hours", "note"],
    "additionalProperties": False,
}
REPORT = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "sections": {"type": "array", "items": {"$ref": "#/$defs/section"}},
    },
    "required": ["title", "date", "sections"],
    "additionalProperties": False,
    "$defs": {
        "section": {
            "type": "object",
            "properties": {
                "heading": {"type": "string"},
                "text": {"type": "string"},
                "parts": {"type": "array", "items": {"$ref": "#/$defs/section"}},
            },
            "required": ["heading", "text", "parts"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    Tool.function("get_weather", WEATHER),
    *(Tool.function(f"tool_{i}", {"type": "object", "properties": {"x": {"type": "string"}}}) for i in range(20)),
    Tool.custom("apply_patch"),
    *Tool.builtin(ToolNamespace.browser()),
    *Tool.builtin(ToolNamespace.python()),
]
PROSE = "The user asks for the weather in Zürich over the next days; a tool can tell. I look it up, then I answer. " * 4
TURNS = {
    "reasoning and a call": "<|channel|>analysis<|message|>" + PROSE + "<|end|><|start|>assistant<|channel|>commentary"
    "<|message|>Let me look that up.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    "<|constrain|>json<|message|>"
    + json.dumps(
        {
            "location": "Zürich, Switzerland",
            "unit": "celsius",
            "days": 5,
            "hours": [6.5, 12, 18],
            "note": "No rain? " * 9,
        },
        ensure_ascii=False,
    )
    + "<|call|>",
    "a JSON answer": "<|channel|>final<|message|>"
    + json.dumps(
        {
            "title": "Weather in Zürich",
            "date": "2025-08-05",
            "sections": [{"heading": f"Day {i}", "text": PROSE[:120], "parts": []} for i in range(4)],
        },
        ensure_ascii=False,
    )
    + "<|return|>",
    "a text answer": "<|channel|>final<|message|>" + PROSE + "<|return|>",
}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    out: list[int] = []
    for i, piece in enumerate(text.replace("|>", "<|").split("<|")):
        out += [tokenizer.special(f"<|{piece}|>")] if i % 2 else tokenizer.encode(piece)
    return out


def feed(constraint: TurnConstraint, token_ids: list[int], mask: np.ndarray) -> tuple[list[float], list[float]]:
    """Microseconds of each fill and of each accept."""
    fills, accepts = [], []
    for token_id in token_ids:
        began = time.thread_time_ns()
        constraint.fill(mask)
        filled = time.thread_time_ns()
        assert mask[token_id // 32] >> np.uint32(token_id % 32) & 1
        checked = time.thread_time_ns()
        constraint.accept(token_id)
        accepts.append((time.thread_time_ns() - checked) / 1000)
        fills.append((filled - began) / 1000)
    assert constraint.is_complete
    return fills, accepts


def masks(tokenizer: Tokenizer, rounds: int) -> dict[str, Any]:
    began = time.perf_counter()
    compiler = GrammarCompiler(tokenizer)
    out: dict[str, Any] = {"build_vocabulary_s": time.perf_counter() - began}
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    everything: list[float] = []
    for name, text in TURNS.items():
        grammar = turn_grammar(TOOLS, output=Schema(REPORT) if "JSON" in name else None)
        token_ids = ids(tokenizer, text)
        began = time.thread_time()
        constraint = compiler.constraint(grammar)
        compile_s = time.thread_time() - began
        first, _ = feed(constraint, token_ids, mask)
        fills, accepts = [], []
        for _ in range(rounds):
            one_fills, one_accepts = feed(compiler.constraint(grammar), token_ids, mask)
            fills += one_fills
            accepts += one_accepts
        everything += fills
        out[name] = {
            "tokens": len(token_ids),
            "compile_ms": compile_s * 1e3,
            "first_mean_us": statistics.mean(first),
            "median_us": statistics.median(fills),
            "mean_us": statistics.mean(fills),
            "p99_us": float(np.percentile(fills, 99)),
            "accept_median_us": statistics.median(accepts),
        }
    out["median_us"] = statistics.median(everything)
    return out


def engine(tokenizer: Tokenizer, folder: Path, backend: str, num_tokens: int) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    ops = load(backend)  # type: ignore[arg-type]
    weights = load_weights(checkpoint, ops)
    compiler = GrammarCompiler(tokenizer)
    numbers = Schema({"type": "array", "items": {"type": "number"}, "minItems": 10_000})
    grammars: dict[str, TurnGrammar | None] = {
        "none": None,
        "text": turn_grammar(tool_choice=ToolChoice("none")),
        "json": turn_grammar(output=numbers, reasoning=False),
    }
    prompt = ids(tokenizer, "<|start|>user<|message|>" + PROSE + "<|end|><|start|>assistant")
    # Stops are unlikely among 200,000 tokens, and out of the question here.
    never = tuple(tokenizer.special(stop) for stop in ("<|return|>", "<|call|>", "<|end|>"))
    engines = {}
    for name, grammar in grammars.items():
        engines[name] = Engine(Runner(ops, checkpoint.config, weights, EngineConfig(max_context=2_048, draft_tokens=0)))
        constraint = None if grammar is None else compiler.constraint(grammar)
        params = SamplingParams(
            seed=1, constraint=constraint, max_tokens=num_tokens + 8, ignore_eos=True, banned_token_ids=never
        )
        engines[name].add_request(prompt, params)
        for _ in range(8):
            engines[name].step()
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(num_tokens):
        for name, one in engines.items():
            began = time.perf_counter()
            (output,) = one.step()
            spent[name].append(time.perf_counter() - began)
            assert output.error is None
    return {
        "ms_per_token": {name: statistics.median(times) * 1e3 for name, times in spent.items()},
        "tokens_per_s": {name: 1 / statistics.median(times) for name, times in spent.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(spent["none"], spent[name], strict=True))
            for name in ("text", "json")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="20b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--only", choices=["masks", "engine"])
    args = parser.parse_args()
    tokenizer = Tokenizer.o200k_harmony()
    out: dict[str, Any] = {"machine": machine()}
    if args.only != "engine":
        out["masks"] = masks(tokenizer, args.rounds)
    if args.only != "masks":
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.model
            if folder is None:
                folder = write_random_checkpoint(Path(temporary) / "model", args.shape, num_layers=args.layers)
            out["model"] = folder.name if args.model else f"{args.shape}, {args.layers} layers, random weights"
            out["engine"] = engine(tokenizer, folder, args.backend, args.tokens)
    if args.keep:
        keep("masks", out)
    if args.json:
        print(json.dumps(out, indent=2))
        return
    for name, values in out.get("masks", {}).items():
        line = ", ".join(f"{key} {value:.1f}" for key, value in values.items()) if isinstance(values, dict) else values
        print(f"{name}: {line if isinstance(line, str) else round(line, 2)}")
    for name, values in out.get("engine", {}).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
