"""Vocabulary, first weights, the stages one after the other, and the exported model.

OUT/tokenizer.json            the vocabulary
OUT/start/                    random weights of the shape
OUT/STAGE/                    a run, as `ossia train` leaves it, with weights.safetensors when it is done
OUT/STAGE/start/              where a stage adds layers: what the next stage begins with
OUT/STAGE/bf16/, mxfp4/       its model, as a checkpoint
OUT/STAGE/measured-*.json     what it can do on held-out exercises
OUT/model/                    the model of the last stage
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ossia.errors import UnavailableError
from ossia.harmony import Effort, Tokenizer, render
from ossia.model.checkpoint_writer import write_json
from ossia.model.config import ModelConfig
from ossia.model.config_file import read_json
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.train.config import read_settings
from ossia.train.export import Format, export
from ossia.train.measure import Measured, measure, open_rollouts
from ossia.train.module import Model
from ossia.train.nano import recipe
from ossia.train.pretrain import PretrainConfig, pretrain
from ossia.train.result import WEIGHTS
from ossia.train.rl import rl
from ossia.train.rollout import RolloutConfig
from ossia.train.rollout_config import RlConfig
from ossia.train.shards import read_shards, write_tensors
from ossia.train.tasks import Task, gold_conversation, make_mix
from ossia.train.tasks import make as make_task
from ossia.train.tasks.language import draw_copy
from ossia.train.vocabulary import SPECIAL_TOKENS, train_vocabulary

Say = Callable[[str], None]

_STOPS = ("<|return|>", "<|endoftext|>", "<|call|>")
_KV_MEMORY = "256MiB"
# Of one exercise, sampled; gold transcripts have less.
_MOST_TOKENS = 600
# One exercise of so many is done again under the grammar, which only the format depends on.
_GRAMMAR_SHARE = 4


def make(out: Path, *, count: int, say: Say, processes: int = 1) -> Path:
    """All stages, then the model's folder; ``count`` exercises per task and effort are measured of each stage.

    Stages whose settings say ``replicate`` are trained by so many ``processes``, which share each step.
    Raises the errors of training, each saying what to do; what was made before stays.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(out / "tokenizer.json", say)
    make_start(out / "start", tokenizer)
    for stage in recipe.STAGES:
        if processes > 1 and stage.settings.get("replicate"):
            _run_together(stage.name, out, processes)
        else:
            run_stage(stage.name, out, say)
        for format in stage.measured:
            measure_stage(out / stage.name, start_of(stage.name, out), format, count, say)
    model = _exported(recipe.STAGES[-1], out)
    shutil.copytree(model, out / "model", dirs_exist_ok=True)
    say(f"the model is in {out / 'model'}")
    return out / "model"


def make_tokenizer(path: Path, say: Say) -> Tokenizer:
    """The vocabulary, of gold transcripts and of texts that are copied."""
    if not path.exists():
        text = train_vocabulary(
            vocabulary_texts(), recipe.VOCAB_SIZE, num_common_words=recipe.NUM_COMMON_WORDS
        ).to_tokenizer_json()
        path.write_text(text, encoding="utf-8")
        say(f"the vocabulary is in {path}")
    return Tokenizer.from_document(json.loads(path.read_text(encoding="utf-8")), str(path))


def vocabulary_texts() -> Iterator[str]:
    """What stands between special tokens in gold conversations, and texts of invented names."""
    mix = make_mix(recipe.mix(recipe.VOCABULARY_SHARES))
    # A vocabulary of bytes renders them, and spells the texts back.
    by_bytes = train_vocabulary(["ab"], 256 + len(SPECIAL_TOKENS), min_frequency=2)
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    for number in range(recipe.VOCABULARY_CONVERSATIONS):
        conversation = gold_conversation(mix.draw("train", 0, number))
        yield from filter(None, special.split(by_bytes.decode(render(conversation, by_bytes))))
    rng = random.Random(1)
    for _ in range(recipe.VOCABULARY_TEXTS):
        yield draw_copy(rng)


def make_start(folder: Path, tokenizer: Tokenizer) -> Path:
    """Random weights of the shape, such as learn well."""
    if not folder.exists():
        shape = replace(
            recipe.SHAPE,
            stop_token_ids=tuple(tokenizer.special(name) for name in _STOPS),
            pad_token_id=tokenizer.special("<|endoftext|>"),
        )
        _write_start(folder, shape, tokenizer.to_tokenizer_json(), lambda model: draw_weights(model, seed=0))
    return folder


def _write_start(
    folder: Path, shape: ModelConfig, tokenizer_json: str, weights: Callable[[Model], Mapping[str, Tensor]]
) -> None:
    """A checkpoint of the shape; ``weights`` are given a model of it."""
    noise = folder.with_name("noise")
    shutil.rmtree(noise, ignore_errors=True)
    write_random_checkpoint(noise, shape, layout="hf-bf16", tokenizer_json=tokenizer_json)
    write_tensors(noise / WEIGHTS, weights(Model.open(noise, trainable="full")))
    export(noise, folder, "bf16", weights=noise / WEIGHTS, measure=False)
    sampling = folder / "generation_config.json"
    write_json(sampling, {**read_json(sampling), "temperature": recipe.TEMPERATURE})
    shutil.rmtree(noise)


def draw_weights(model: Model, seed: int) -> dict[str, Parameter]:
    """First weights: what adds to the residual stream is small, routers and answers hardly know a preference."""
    generator = torch.Generator().manual_seed(seed)
    num_sublayers = 2 * model.config.num_layers
    with torch.no_grad():
        for name, weight in model.state().items():
            fan_in = weight.shape[-1]
            if "norm" in name:
                weight.fill_(1)
            elif "bias" in name or "sinks" in name:
                weight.zero_()
            elif "router" in name or name.startswith("unembedding"):
                weight.normal_(0, 0.02, generator=generator)
            elif name.startswith("embedding"):
                weight.normal_(0, 0.5, generator=generator)
            elif name.endswith((".o.weight", "experts.down")):
                weight.normal_(0, 0.5 / math.sqrt(fan_in * num_sublayers), generator=generator)
            else:
                weight.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
    return model.state()


def run_stage(name: str, out: Path, say: Say) -> None:
    """Train a stage, or go on training; nothing where it is done. The stages before it are there."""
    stage, folder = recipe.named(name), out / name
    earlier = recipe.before(stage)
    if (folder / WEIGHTS).exists():
        return
    say(f"stage {name}")
    start = start_of(name, out)
    if stage.method == "deepen":
        assert earlier is not None
        model = Model.open(_exported(earlier, out), trainable="full")
        shape, weights = deepen(model, stage.settings["layers"])
        shutil.rmtree(start, ignore_errors=True)
        _write_start(start, shape, (out / "tokenizer.json").read_text(encoding="utf-8"), lambda _: weights)
        write_tensors(folder / WEIGHTS, weights)
        return
    if stage.method == "average":
        folder.mkdir(exist_ok=True)
        write_tensors(folder / WEIGHTS, average(out, stage.settings))
        return
    kind = PretrainConfig if stage.method == "pretrain" else RlConfig
    known = {one.name for one in fields(kind)}
    base = {key: value for key, value in recipe.BASE.items() if key in known}
    # Each has exercises of its own.
    seed = zlib.crc32(name.encode())
    settings: dict[str, Any] = {**base, "seed": seed, **stage.settings, "out": str(folder), "model": str(start)}
    resume = (folder / "settings.json").exists()
    if earlier is not None and earlier.method == "average":
        settings["model"] = str(_exported(earlier, out))
    elif earlier is not None and earlier.method != "deepen":
        settings["begin_with"] = str(out / earlier.name)
    if "teacher" in settings:
        settings["teacher"] = str(_exported(recipe.named(settings["teacher"]), out))
    if stage.method == "pretrain":
        outcome, _ = pretrain(read_settings(PretrainConfig, None, settings), resume=resume, say=say)
    else:
        outcome = rl(read_settings(RlConfig, None, settings), resume=resume, say=say)
    if outcome.is_interrupted:
        raise UnavailableError(f"stage {name} was interrupted; the same command goes on with it")


def start_of(name: str, out: Path) -> Path:
    """The checkpoint that has the shape of a stage's model: the first weights, or those of layers that were added."""
    deeper = [stage.name for stage in recipe.lineage(recipe.named(name)) if stage.method == "deepen"]
    return out / deeper[-1] / "start" if deeper else out / "start"


def deepen(model: Model, layers: Sequence[int]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The shape and the weights of a deeper model that computes the same: behind the last of ``layers`` stand copies of
    them that add nothing to the residual stream.

    Source: Wu et al., *LLaMA Pro: Progressive LLaMA with Block Expansion*, arXiv:2401.02415.
    """
    config, end = model.config, max(layers) + 1
    order = [*range(end), *layers, *range(end, config.num_layers)]
    types = config.layer_types and tuple(config.layer_types[i] for i in order)
    state = model.state()
    weights: dict[str, Tensor] = {name: one for name, one in state.items() if not name.startswith("layers.")}
    for place, source in enumerate(order):
        is_new = end <= place < end + len(layers)
        prefix = f"layers.{source}."
        for name, one in state.items():
            if name.startswith(prefix):
                part = name.removeprefix(prefix)
                adds = part.startswith(("o.", "experts.down"))
                weights[f"layers.{place}.{part}"] = torch.zeros_like(one) if is_new and adds else one
    return replace(config, num_layers=len(order), layer_types=types), weights


def average(out: Path, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """The weights of stages, each number the sum of theirs by their shares.

    Source: Wortsman et al., arXiv:2203.05482.
    """
    sums: dict[str, Tensor] = {}
    for name, share in shares.items():
        for key, tensor in read_shards(out / name, Path(WEIGHTS).stem, {}).items():
            sums[key] = share * tensor + sums.get(key, 0)
    return sums


def _run_together(name: str, out: Path, processes: int) -> None:
    """`run_stage` in several processes, which say what goes on themselves. Ctrl-C reaches them as well: they save."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    together = subprocess.Popen([sys.executable, *launch, "-m", "ossia.train.nano", str(out), "--stage", name])
    is_interrupted = False
    while together.returncode is None:
        try:
            together.wait()
        except KeyboardInterrupt:
            is_interrupted = True
    if is_interrupted:
        raise UnavailableError(f"stage {name} was interrupted; the same command goes on with it")
    if together.returncode:
        raise UnavailableError(f"stage {name} did not end; when what its processes said is mended, start it again")


def export_stage(folder: Path, start: Path, format: Format) -> Path:
    """A stage's weights as a checkpoint."""
    out = folder / format
    if not out.exists():
        export(start, out, format, weights=folder / WEIGHTS, measure=False)
    return out


def _exported(stage: recipe.Stage, out: Path) -> Path:
    return export_stage(out / stage.name, start_of(stage.name, out), "mxfp4")


def measured_tasks() -> dict[str, Task]:
    """What is measured, by name: every task; sums of each size; policies with rules seen and unseen."""
    tasks = {name: make_task(name) for name in recipe.ALL if name not in ("sums", "policies")}
    tasks |= {f"sums of {n} digits": make_task("sums", {"digits": n, "exact": True}) for n in range(2, 7)}
    tasks["policies, seen rules"] = make_task("policies", {"combinations": False})
    tasks["policies, unseen combinations"] = make_task("policies", {"combinations": True})
    return tasks


def measure_stage(folder: Path, start: Path, format: Format, count: int, say: Say) -> Path:
    """Held-out exercises of each task at each effort, without and, at the end, with the grammar."""
    path = folder / f"measured-{format}.json"
    if path.exists():
        return path
    model = export_stage(folder, start, format)
    lines: list[dict[str, Any]] = []
    for grammar in (False, True):
        config = RolloutConfig(temperature=0, max_tokens=_MOST_TOKENS, grammar=grammar)
        with open_rollouts(model, config, threads=1, dense="bf16", kv_memory=_KV_MEMORY) as rollouts:
            for name, task in measured_tasks().items():
                is_whole = not grammar or name in recipe.ENFORCED
                num_exercises = count if is_whole else max(1, count // _GRAMMAR_SHARE)
                for effort in task.efforts:
                    found: Measured = measure(rollouts, task, Effort(effort), num_exercises)
                    lines.append({**found._asdict(), "task": name, "grammar": grammar})
                    shares = f"{found.exact:.3f}, valid {found.valid:.4f}, unfinished {found.unfinished:.4f}"
                    say(f"{folder.name} {format} {name} {effort}: {shares}")
    path.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return path
