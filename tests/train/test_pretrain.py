"""Training on tasks: what a step sees, exact resume, a loss that falls."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.train.processes import environment, launch

from ossia.errors import ConfigError, NotFoundError
from ossia.harmony import Tokenizer
from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint
from ossia.train import pretrain as pretraining
from ossia.train.checkpoint import Checkpoints
from ossia.train.config import as_dict
from ossia.train.data import to_batch
from ossia.train.export import export
from ossia.train.metrics import read_metrics
from ossia.train.module import Model
from ossia.train.parallel import Team
from ossia.train.pretrain import PretrainConfig, TaskFeed, draw_sample, pretrain
from ossia.train.sft import Likelihood
from ossia.train.tasks import gold_conversations, make_mix
from ossia.train.taught import TaughtLikelihood
from ossia.train.vocabulary import train_vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [
        part
        for conversation in gold_conversations(make_mix(["sums", "about"]), "train", 0, 300)
        for message in conversation
        for part in [message.text or "user assistant analysis final system"]
    ]
    return train_vocabulary(texts, 400, min_frequency=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        vocab_size=400,
        num_experts=4,
        num_active_experts=2,
        sliding_window=32,
        stop_token_ids=(tokenizer.special("<|return|>"),),
        pad_token_id=None,
    )
    folder = tmp_path_factory.mktemp("pretrain") / "start"
    return write_random_checkpoint(folder, config, layout="hf-bf16", tokenizer_json=tokenizer.to_tokenizer_json())


@pytest.fixture
def settings(checkpoint, tmp_path) -> PretrainConfig:
    return PretrainConfig(
        model=str(checkpoint),
        out=str(tmp_path / "run"),
        trainable="full",
        tasks=("sums", "about"),
        steps=6,
        step_tokens=900,
        pass_tokens=600,
        max_tokens=400,
        held_out=4,
        learning_rate=3e-3,
        save_every=3,
        eval_every=0,
        threads=1,
    )


def test_a_step_has_its_tokens_and_a_feed_goes_on_from_its_position(settings, tokenizer):
    mix = make_mix(list(settings.tasks))
    feed = TaskFeed(settings, mix, tokenizer)
    feed.next_step()
    position = feed.position
    second = feed.next_step()
    assert 500 < sum(one.num_tokens for one in second) <= 900
    assert all(one.num_tokens <= 600 for one in second)
    again = TaskFeed(settings, mix, tokenizer)
    again.seek(position)
    for one, other in zip(second, again.next_step(), strict=True):
        assert np.array_equal(one.batch.token_ids_T, other.batch.token_ids_T)
        assert np.array_equal(one.targets_R, other.targets_R)


def test_answers_are_what_the_model_says_and_all_is_everything(settings, tokenizer):
    mix = make_mix(["sums"])
    answers = draw_sample(settings, mix, tokenizer, "train", 1)
    everything = draw_sample(replace(settings, learn="all"), mix, tokenizer, "train", 1)
    assert answers is not None
    assert everything is not None
    assert np.array_equal(answers.token_ids_L, everything.token_ids_L)
    assert everything.num_trained == len(everything) - 1
    said = tokenizer.decode(answers.token_ids_L[answers.weights_L > 0].tolist())
    assert said.endswith("<|return|>")
    assert "system" not in said
    assert answers.token_ids_L[-1] == tokenizer.special("<|return|>")


@pytest.mark.parametrize("learn", ["answers", "all"])
def test_no_turn_teaches_the_end_that_history_writes_for_a_return(settings, tokenizer, learn):
    mix = make_mix(["sums"])
    end, start = tokenizer.special("<|end|>"), tokenizer.special("<|start|>")
    (user,) = tokenizer.encode("user")
    seen = set()
    for number in range(40):
        sample = draw_sample(replace(settings, turns=4, learn=learn, max_tokens=600), mix, tokenizer, "train", number)
        assert sample is not None
        ids = sample.token_ids_L.tolist()
        before_user = [i for i in range(len(ids) - 2) if ids[i : i + 3] == [end, start, user]]
        seen.add(len(before_user))
        # The first is that of the system message.
        assert not sample.weights_L[before_user[1:]].any()
        assert sample.weights_L[-1] == 1
        assert len(sample) <= 600
    assert seen == {1, 2, 3, 4}


def test_plain_language_is_mixed_in(settings, tokenizer):
    mix = make_mix(["sums"])
    sample = draw_sample(replace(settings, language=1.0), mix, tokenizer, "train", 0)
    assert sample is not None
    assert sample.token_ids_L[0] == tokenizer.special("<|startoftext|>")
    assert sample.token_ids_L[-1] == tokenizer.special("<|endoftext|>")


def test_of_facts_the_answers_alone_are_learned(settings, tokenizer):
    """An answer stands behind "=" in sums, behind the whole request where it is practised whether a function fits,
    behind ":" or in a line of its own elsewhere.
    """
    compared = r"([a-z]+_[a-z]+\n[^\n]+-\n)*"
    told = rf"{compared}([a-z]+_[a-z]+\n[^\n]+\+|No function fits\.)|[^\n]+\nNo function fits\."
    forms = {"=": r"[01]\d", ">": told, ":": r" [^\n]+", "\n": r"(?s).+\S"}
    long = replace(settings, facts=1.0, max_tokens=8192, pass_tokens=8192)
    mix = make_mix(["sums", "policies", "structured", "functions", "about"])
    kinds = set()
    for number in range(60):
        sample = draw_sample(long, mix, tokenizer, "train", number)
        assert sample is not None
        pairs = list(zip(sample.token_ids_L.tolist(), sample.weights_L, strict=True))
        runs = [
            (is_learned, tokenizer.decode([one for one, _ in run]))
            for is_learned, run in itertools.groupby(pairs, key=lambda pair: pair[1] > 0)
        ]
        for (_, asked), (is_learned, answer) in itertools.pairwise(runs):
            if is_learned:
                assert re.fullmatch(forms[asked[-1]], answer)
                kinds.add(asked[-1])
        assert sum(is_learned for is_learned, _ in runs) >= 6
    assert kinds == set(forms)


def test_conversations_mix_tasks_for_which_no_developer_says_anything(settings, tokenizer):
    mixed = replace(settings, mixed=1.0, turns=3, max_tokens=1600, pass_tokens=1600)
    mix = make_mix(["sums", "python", "about", "hierarchy"])
    kinds = set()
    for number in range(60):
        sample = draw_sample(mixed, mix, tokenizer, "train", number)
        assert sample is not None
        text = tokenizer.decode(sample.token_ids_L.tolist())
        turns = text.split("<|start|>user")[1:]
        if "<|start|>developer" in text:
            assert len(turns) == 1 or "to=python" not in text
        else:
            kinds.add(tuple("to=python" in turn for turn in turns))
            assert text.count("# Tools") == 1 or ("to=python" not in text and len(turns) == 1)
    assert {(True, False), (False, True)} <= {kind[:2] for kind in kinds}


def test_a_brief_system_message_tells_the_effort_and_nothing_else(settings, tokenizer):
    sample = draw_sample(replace(settings, brief=1.0), make_mix(["sums"]), tokenizer, "train", 0)
    assert sample is not None
    text = tokenizer.decode(sample.token_ids_L.tolist())
    assert re.match(r"<\|start\|>system<\|message\|>Reasoning: (low|medium|high)\n*<\|end\|><\|start\|>user", text)


def test_efforts_are_those_that_were_asked_for(settings, tokenizer, monkeypatch):
    told = set()
    draw = pretraining.draw_sample

    def watched(*arguments):
        sample = draw(*arguments)
        if sample is not None:
            told.update(re.findall(r"Reasoning: (\w+)", tokenizer.decode(sample.token_ids_L.tolist())))
        return sample

    monkeypatch.setattr(pretraining, "draw_sample", watched)
    pretrain(replace(settings, efforts="medium=1,high=2", steps=1, step_tokens=6000), say=lambda _: None)
    assert told == {"medium", "high"}


def test_an_effort_that_is_none_is_refused(settings):
    with pytest.raises(ConfigError, match="efforts"):
        replace(settings, efforts="middle=1").check()


@pytest.mark.parametrize("brief", [0.0, 1.0])
@pytest.mark.parametrize("pondering", [(), ("hierarchy=0",), ("hierarchy",)])
def test_low_effort_may_think_and_is_still_told_as_low(settings, tokenizer, pondering, brief):
    longer = replace(
        settings, tasks=("hierarchy",), pondering=pondering, brief=brief, pass_tokens=2000, max_tokens=2000
    )
    thinks = set()
    for number in range(40):
        sample = draw_sample(longer, make_mix(["hierarchy"]), tokenizer, "train", number)
        assert sample is not None
        text = tokenizer.decode(sample.token_ids_L.tolist())
        if "Reasoning: low" in text:
            thinks.add("<|channel|>analysis" in text)
        else:
            assert "<|channel|>analysis" in text
    assert thinks == {pondering == ("hierarchy",)}


@pytest.mark.parametrize("share", ["browsing", "sums=half", "sums=1.5", "sums=-1"])
def test_shares_that_cannot_be_are_refused(settings, share):
    with pytest.raises(ConfigError, match="pondering holds"):
        replace(settings, pondering=(share,)).check()


@pytest.mark.parametrize("facts", [0.0, 0.5])
@pytest.mark.parametrize("evenness", [0.0, 0.5, 1.0])
def test_short_answers_can_weigh_as_much_as_long_ones(settings, tokenizer, evenness, facts):
    """A token's weight falls with the number of an answer's tokens as the setting says: not at all, or inversely. So it
    does in parts of exercises.
    """
    even = replace(settings, evenness=evenness, facts=facts, max_tokens=4096)
    counts, weights = [], []
    for number in range(12):
        sample = draw_sample(even, make_mix(["sums", "about"]), tokenizer, "train", number)
        assert sample is not None
        learned_L = sample.weights_L[sample.weights_L > 0]
        assert (learned_L == learned_L[0]).all()
        counts.append(len(learned_L))
        weights.append(float(learned_L[0]))
    assert len(set(counts)) > 5
    np.testing.assert_allclose(np.array(weights) * np.array(counts) ** evenness, 64**evenness, rtol=1e-5)


def test_of_facts_there_are_as_many_as_a_sample_holds(settings, tokenizer):
    long, short = (replace(settings, facts=1.0, max_tokens=most) for most in (8192, 1500))
    mix = make_mix(["functions"])
    for number in range(10):
        whole, cut = (draw_sample(one, mix, tokenizer, "train", number) for one in (long, short))
        assert whole is not None and cut is not None
        assert 100 < len(cut) <= 1500 < len(whole)
        assert cut.token_ids_L.tolist() == whole.token_ids_L[: len(cut)].tolist()
        assert cut.token_ids_L[-1] == tokenizer.encode("\n")[0]


def test_facts_are_left_out_where_not_one_fits(settings, tokenizer):
    short = replace(settings, facts=1.0, max_tokens=64)
    assert draw_sample(short, make_mix(["sums"]), tokenizer, "train", 0) is None


def test_shares_of_more_than_all_samples_are_an_error(settings):
    with pytest.raises(ConfigError, match=r"facts is 0\.7 and language 0\.5"):
        replace(settings, facts=0.7, language=0.5).check()


def test_facts_are_of_the_tasks_that_are_trained(settings, tokenizer):
    sample = draw_sample(replace(settings, facts=1.0, max_tokens=4096), make_mix(["sums"]), tokenizer, "train", 0)
    assert sample is not None
    step, read = r"\d[+-]\d[+-]\d=\d\d\n", r".*\d.*\n\d+=a.*\n\d+=A.*<\|end\|>\n?"
    steps = r".*\d.*\n\d+=a.*\n\d+=A.*\n(\w+:\d[+-]\d[+-]\d=\d\d\w\d\n)+"
    put_together = rf"{steps}(\w\d:\d+(\n|<\|end\|>\n))+\d+<\|return\|>\n?"
    assert re.fullmatch(
        rf"<\|startoftext\|>({step}|{read}|{put_together})+", tokenizer.decode(sample.token_ids_L.tolist())
    )
    with pytest.raises(ConfigError, match=r"none of the tasks has parts to practise; expected one of browsing"):
        replace(settings, facts=0.1, tasks=("about",)).check()


def test_held_out_samples_are_no_parts_of_exercises(settings, tokenizer):
    parts = replace(settings, facts=1.0, max_tokens=4096)
    for split in ("train", "held_out"):
        sample = draw_sample(parts, make_mix(["sums"]), tokenizer, split, 0)
        assert sample is not None
        assert (tokenizer.special("<|start|>") in sample.token_ids_L) == (split == "held_out")


def test_the_passes_of_a_step_are_of_about_one_size(settings, tokenizer):
    whole = replace(settings, facts=0.5, step_tokens=2400, pass_tokens=1800)
    feed = TaskFeed(whole, make_mix(["sums", "about"]), tokenizer)
    for _ in range(20):
        sizes = [one.num_tokens for one in feed.next_step()]
        assert len(sizes) == 2
        assert max(sizes) < 1.4 * min(sizes)


def test_the_loss_falls_and_a_run_that_ended_early_goes_on_bit_for_bit(settings, tmp_path):
    outcome, model = pretrain(settings, say=lambda _: None)
    losses = [line["loss"] for line in read_metrics(outcome.folder / "metrics.jsonl") if line["event"] == "step"]
    assert losses[-1] < losses[0] - 0.5
    # The same run, ended behind its third step: later checkpoints are gone.
    other = replace(settings, out=str(tmp_path / "other"))
    pretrain(other, say=lambda _: None)
    for folder in (tmp_path / "other" / "checkpoints").iterdir():
        if int(folder.name.rpartition("-")[2]) > 3:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    _, resumed = pretrain(other, resume=True, say=lambda _: None)
    again = [line["loss"] for line in read_metrics(tmp_path / "other" / "metrics.jsonl") if line["event"] == "step"]
    assert again == losses
    assert all(torch.equal(value, resumed.state()[name]) for name, value in model.state().items())


def test_a_run_begins_with_the_weights_of_another(settings, tmp_path):
    outcome, model = pretrain(settings, say=lambda _: None)
    following = replace(
        settings, out=str(tmp_path / "next"), begin_with=str(outcome.folder), learning_rate=0.0, steps=1
    )
    _, begun = pretrain(following, say=lambda _: None)
    assert all(torch.equal(value, begun.state()[name]) for name, value in model.state().items())
    with pytest.raises(NotFoundError, match="no checkpoint"):
        pretrain(replace(settings, out=str(tmp_path / "x"), begin_with=str(tmp_path)), say=lambda _: None)


@pytest.fixture
def teacher(checkpoint, tmp_path, tokenizer) -> Path:
    """A deeper model with other weights."""
    config = replace(Checkpoint.open(checkpoint).config, num_layers=4, layer_types=())
    document = tokenizer.to_tokenizer_json()
    return write_random_checkpoint(tmp_path / "teacher", config, layout="hf-bf16", tokenizer_json=document, seed=1)


def test_what_a_teacher_thinks_likely_is_learned_beside_the_gold_tokens(settings, checkpoint, teacher, tokenizer):
    student, larger = Model.open(checkpoint, trainable="full"), Model.open(teacher, trainable="full")
    one = to_batch([draw_sample(settings, make_mix(["about"]), tokenizer, "train", 0)])
    with torch.no_grad():
        p_RV, q_RV = (model(one.batch).double().log_softmax(1) for model in (larger, student))
        # The gold token is what the teacher thinks likeliest in about half of the rows.
        is_likeliest_R = np.random.default_rng(0).random(len(one.targets_R)) < 0.5
        one = replace(one, targets_R=np.where(is_likeliest_R, p_RV.argmax(1).numpy(), one.targets_R))
        top_RK, ids_RK = p_RV.topk(20, dim=1)
        seen_RK = q_RV.gather(1, ids_RK)
        rest_p, rest_q = ((1 - some.exp().sum(1)).log() for some in (top_RK, seen_RK))
        kl_R = (top_RK.exp() * (top_RK - seen_RK)).sum(1) + rest_p.exp() * (rest_p - rest_q)
        nll_R = -q_RV.gather(1, torch.as_tensor(one.targets_R)[:, None])[:, 0]
    weights_R = torch.as_tensor(one.weights_R).double()
    nll, kl = float((nll_R * weights_R).sum()), float((kl_R * weights_R).sum())
    assert kl > 0.05 * nll
    agrees_R = ids_RK[:, 0] == torch.as_tensor(one.targets_R)
    assert 0.3 < agrees_R.double().mean() < 0.7
    for share in (0.0, 0.25, 1.0):
        terms = TaughtLikelihood(student, larger, share).terms(one)
        share_R = share * agrees_R
        wanted = float((((1 - share_R) * nll_R + share_R * kl_R) * weights_R).sum())
        assert terms.loss_sum.item() == pytest.approx(wanted, rel=1e-4)
        assert (terms.sums["nll"], terms.sums["kl"]) == pytest.approx((nll, kl), rel=1e-4)
        assert terms.sums["taught"] == pytest.approx(float((weights_R * agrees_R * (share > 0)).sum()))
    gold, taught = Likelihood(student, 0.01).terms(one), TaughtLikelihood(student, larger, 0.0, 0.01).terms(one)
    assert taught.loss_sum.item() == pytest.approx(gold.loss_sum.item(), rel=1e-5)
    assert taught.penalty_sum.item() == gold.penalty_sum.item() > 0
    TaughtLikelihood(student, larger, 0.5).terms(one).loss_sum.backward()
    assert all(weight.grad is None for weight in larger.state().values())
    alike = replace(one, targets_R=q_RV.argmax(1).numpy())
    assert TaughtLikelihood(student, student, 1.0).terms(alike).loss_sum.item() == pytest.approx(0, abs=1e-4)


def test_a_student_comes_to_think_as_its_teacher_and_is_judged_by_the_gold_tokens(settings, checkpoint, tmp_path):
    outcome, _ = pretrain(replace(settings, out=str(tmp_path / "larger"), steps=30), say=lambda _: None)
    export(checkpoint, tmp_path / "teacher", "bf16", weights=outcome.folder / "weights.safetensors", measure=False)
    taught = replace(
        settings, teacher=str(tmp_path / "teacher"), teacher_share=1.0, router_balance=0.0, eval_every=2, steps=24
    )
    outcome, _ = pretrain(taught, say=lambda _: None)
    lines = read_metrics(outcome.folder / "metrics.jsonl")
    steps = [line for line in lines if line["event"] == "step"]
    assert steps[-1]["kl"] < 0.4 * steps[0]["kl"]
    assert all(0.1 < line["taught"] < 0.9 for line in steps)
    assert all(line["loss"] < line["nll"] for line in steps)
    losses = [line["loss"] for line in lines if line["event"] == "evaluation"]
    assert losses[-1] < losses[0] - 1
    assert not any("kl" in line for line in lines if line["event"] == "evaluation")


def test_a_step_can_be_made_of_the_samples_with_the_highest_losses(settings, tokenizer):
    mix = make_mix(list(settings.tasks))
    everything = TaskFeed(replace(settings, step_tokens=4500), mix, tokenizer)._draw(4500)
    hardness = np.random.default_rng(0).permutation(len(everything)).tolist()

    def losses(samples):
        assert [one.token_ids_L.tolist() for one in samples] == [one.token_ids_L.tolist() for one in everything]
        return hardness

    feed = TaskFeed(replace(settings, hardest=0.2), mix, tokenizer, losses)
    passes = feed.next_step()
    chosen = sorted(length for one in passes for length in one.batch.key_lengths_N.tolist())
    assert 500 < sum(chosen) <= 900
    hardest_first = sorted(zip(hardness, everything, strict=True), key=lambda pair: -pair[0])
    assert chosen == sorted(len(one) for _, one in hardest_first[: len(chosen)])
    # The next step goes on behind all that were drawn.
    behind = TaskFeed(settings, mix, tokenizer)
    behind._draw(4500)
    assert feed.position == behind.position


def test_the_loss_of_a_sample_is_that_of_its_tokens_however_many_processes_share_them(settings, checkpoint, tokenizer):
    model, mix = Model.open(checkpoint, trainable="full"), make_mix(["sums", "about"])
    samples = [draw_sample(settings, mix, tokenizer, "train", number) for number in range(9)]
    found = pretraining._losses(settings, model, samples, Team())
    for one, loss in zip(samples, found, strict=True):
        assert loss == pytest.approx(Likelihood(model).terms(to_batch([one])).loss_sum.item(), rel=1e-4)
    parts = [[], []]

    class Half(Team):
        def sums(self, values):
            parts[self.rank] = values
            return values

    for rank in range(2):
        pretraining._losses(settings, model, samples, Half(rank=rank, size=2))
    assert np.sum(parts, axis=0) == pytest.approx(found, rel=1e-4)
    assert all(0 in pair for pair in zip(*parts, strict=True))


def test_a_run_on_the_hardest_goes_on_bit_for_bit_and_learns(settings, tmp_path):
    hard = replace(settings, hardest=0.3, weight_mean=1.0, eval_every=3)
    outcome, model = pretrain(hard, say=lambda _: None)
    lines = read_metrics(outcome.folder / "metrics.jsonl")
    evaluated = [line["loss"] for line in lines if line["event"] == "evaluation"]
    assert evaluated[-1] < evaluated[0] - 0.2
    other = replace(hard, out=str(tmp_path / "other"))
    pretrain(other, say=lambda _: None)
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "step-00000006")
    _, resumed = pretrain(other, resume=True, say=lambda _: None)
    again = read_metrics(tmp_path / "other" / "metrics.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    assert all(torch.equal(value, resumed.state()[name]) for name, value in model.state().items())


_SCRIPT = """
import json, sys
from ossia.train.config import read_settings
from ossia.train.parallel import end_process
from ossia.train.pretrain import PretrainConfig, pretrain

pretrain(read_settings(PretrainConfig, None, json.loads(sys.argv[1])), say=print)
end_process(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("replicate", [True, False])
def test_two_processes_choose_the_samples_that_one_does(settings, tmp_path, replicate):
    hard = replace(settings, hardest=0.3, weight_mean=1.0, steps=3, replicate=replicate, held_out=0)
    alone, _ = pretrain(hard, say=lambda _: None)
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    two = tmp_path / "two"
    command = [*launch(2), str(script), json.dumps(as_dict(replace(hard, out=str(two))))]
    subprocess.run(command, check=True, env=environment())
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (two, alone.folder))
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    one, other = (load_file(folder / "weights.safetensors") for folder in (two, alone.folder))
    assert all(torch.allclose(one[name], values, atol=1e-4) for name, values in other.items())


def test_a_run_without_progress_ends_early_with_the_best_weights(settings):
    hopeless = replace(settings, learning_rate=0.5, eval_every=1, patience=2, steps=40, save_every=0)
    outcome, model = pretrain(hopeless, say=lambda _: None)
    assert outcome.reason == "early" and outcome.step == outcome.best_step + 2
    best = Checkpoints(outcome.folder / "checkpoints", keep=2).load(outcome.best_step).trainable
    assert all(torch.equal(value, best[name]) for name, value in model.state().items())


def test_what_is_kept_can_be_a_mean_over_the_steps_and_the_next_run_begins_with_it(settings, tmp_path):
    means = replace(settings, weight_mean=2.0, save_every=1, keep=9)
    outcome, model = pretrain(means, say=lambda _: None)
    saved = [Checkpoints(outcome.folder / "checkpoints", keep=9).load(step).trainable for step in range(1, 7)]
    # Shares of step 1 to 6, as the recurrence of arXiv:1212.1824 gives them.
    shares = []
    for step in range(1, 7):
        share = 3 / (2 + step)
        shares = [one * (1 - share) for one in shares] + [share]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares)
    for name, value in model.state().items():
        wanted = sum(share * one[name].double() for share, one in zip(shares, saved, strict=True))
        torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-4, atol=1e-6)
    kept = load_file(outcome.folder / "weights.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in model.state().items())
    following = replace(
        settings, out=str(tmp_path / "next"), begin_with=str(outcome.folder), learning_rate=0.0, steps=1
    )
    _, begun = pretrain(following, say=lambda _: None)
    assert all(torch.equal(value, begun.state()[name]) for name, value in model.state().items())
    # Done already, and resumed: the mean once more.
    _, again = pretrain(means, resume=True, say=lambda _: None)
    assert all(torch.equal(value, again.state()[name]) for name, value in model.state().items())


def test_a_run_with_another_teacher_is_another_run(settings, checkpoint, teacher):
    pretrain(replace(settings, teacher=str(teacher), steps=2), say=lambda _: None)
    shutil.copytree(checkpoint, teacher, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="teacher"):
        pretrain(replace(settings, teacher=str(teacher), steps=2), resume=True, say=lambda _: None)


def test_a_teacher_with_another_vocabulary_is_refused(settings, checkpoint, tmp_path):
    other = train_vocabulary(["ab"], 265, min_frequency=1)
    config = replace(Checkpoint.open(checkpoint).config, vocab_size=265, stop_token_ids=(), pad_token_id=None)
    document = other.to_tokenizer_json()
    write_random_checkpoint(tmp_path / "teacher", config, layout="hf-bf16", tokenizer_json=document)
    with pytest.raises(ConfigError, match="another vocabulary than the student: it has"):
        pretrain(replace(settings, teacher=str(tmp_path / "teacher")), say=lambda _: None)


def test_a_teacher_of_processes_that_share_a_model_is_refused_before_anything_is_made(settings, teacher, monkeypatch):
    monkeypatch.setattr(pretraining, "set_up_team", lambda settings: Team(size=2))
    with pytest.raises(ConfigError, match="expected replicate = true"):
        pretrain(replace(settings, teacher=str(teacher)), say=lambda _: None)
    assert not Path(settings.out).exists()


def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="how many steps"):
        replace(settings, steps=0).check()
    with pytest.raises(ConfigError, match="must fit"):
        replace(settings, max_tokens=4096).check()
    with pytest.raises(ConfigError, match="patience is 2 and held_out 0"):
        replace(settings, patience=2, eval_every=1, held_out=0).check()
