"""What rounding costs: next-token distributions against the float32 reference, for ossia and for llama.cpp.

    python benchmarks/quality.py CHECKPOINT [--gguf FILE --llamacpp FOLDER] [--positions 200]

All see the same random tokens and the same weights; the reference computes in float32 with numpy from the checkpoint's
own numbers. Printed for each: the mean Kullback-Leibler divergence KL(reference || it) in nats per position, and how
often the likeliest token is the same. FOLDER holds llama.cpp's libraries, and the Python package llama_cpp must be
importable (its source is enough: PYTHONPATH).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ossia import ops as backends
from ossia.model.transformer import forward
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llamacpp", type=Path)
    parser.add_argument("--positions", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()

    checkpoint = Checkpoint.open(arguments.checkpoint)
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, checkpoint.config.vocab_size, arguments.positions).astype(np.int32)
    reference = log_softmax(logits(checkpoint, token_ids, "reference"))
    rows = []
    for options in ({"dense": "bf16"}, {"dense": "q8"}, {"dense": "q8", "kv": "q8"}):
        name = "ossia, " + ", ".join(f"{key} {value}" for key, value in options.items())
        rows.append(compare(name, reference, logits(checkpoint, token_ids, "cpu", **options)))
    if arguments.gguf and arguments.llamacpp:
        theirs = llamacpp_logits(arguments.gguf, arguments.llamacpp, token_ids)
        rows.append(compare(f"llama.cpp, {arguments.gguf.name}", reference, theirs))
    for row in rows:
        print(f"{row['name']:<32} KL {row['kl_nats']:.3e} nats   same likeliest token {row['same_argmax']:.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def logits(checkpoint: Checkpoint, token_ids: np.ndarray, backend: str, **options: Any) -> np.ndarray:
    """logits_TV of one pass over all tokens. Keys and values go through a cache, in its own precision."""
    ops = backends.load(backend, **options)
    config, length, size = checkpoint.config, len(token_ids), 32
    weights = load_weights(checkpoint, ops)
    num_blocks = -(-length // size)
    caches = [ops.kv_cache(num_blocks, size, config.num_kv_heads, config.head_dim) for _ in range(config.num_layers)]
    table = np.arange(num_blocks, dtype=np.int32)[None]
    positions = np.arange(length, dtype=np.int32)
    starts, ends = np.array([0, length], np.int32), np.array([length], np.int32)
    batch = Batch(token_ids, positions, starts, ends, table, table, positions)
    return np.asarray(forward(ops, config, weights, batch, caches), np.float32)


def llamacpp_logits(gguf: Path, libraries: Path, token_ids: np.ndarray) -> np.ndarray:
    program = """
import sys, numpy
from llama_cpp import Llama
token_ids = numpy.load(sys.argv[2])
llama = Llama(sys.argv[1], n_ctx=len(token_ids) + 8, n_batch=512, logits_all=True, verbose=False)
llama.eval(token_ids.tolist())
numpy.save(sys.argv[3], llama.scores[: len(token_ids)])
"""
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(tokens, token_ids)
        environ = os.environ | {"LLAMA_CPP_LIB_PATH": str(libraries)}
        subprocess.run([sys.executable, "-c", program, str(gguf), str(tokens), str(out)], check=True, env=environ)
        return np.asarray(np.load(out), np.float32)


def compare(name: str, reference_TV: np.ndarray, logits_TV: np.ndarray) -> dict[str, Any]:
    other_TV = log_softmax(logits_TV)
    kl_T = (np.exp(reference_TV) * (reference_TV - other_TV)).sum(axis=-1)
    same = (reference_TV.argmax(axis=-1) == other_TV.argmax(axis=-1)).mean()
    return {"name": name, "kl_nats": float(kl_T.mean()), "same_argmax": float(same)}


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV.astype(np.float64) - logits_TV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
