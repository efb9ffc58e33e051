"""Packs come in an order that the seed decides, go on exactly after any, and are dealt to any number of ranks."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest
from tests.train.scripts import write_rows

from ossia.errors import InputError
from ossia.harmony import Tokenizer
from ossia.train.data import DataConfig, PairSample
from ossia.train.stream import PackStream, count_packs

CONFIG = DataConfig(current_date="2025-06-28", buffer_rows=16, max_tokens=200)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of 70 rows, one of them compressed."""
    folder = tmp_path_factory.mktemp("rows")
    for name, num, begin in (("a", 40, 0), ("b", 20, 100), ("c", 10, 200)):
        write_rows(folder / f"{name}.jsonl", [row(begin + i) for i in range(num)])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    (folder / "b.jsonl").unlink()
    return folder


def row(i: int) -> dict:
    said = [{"role": "user", "content": f"number {i} " + "x " * (i % 7 * 5)}, {"role": "assistant", "content": f"{i}"}]
    return {"messages": said * (1 + i % 3)}


def keys(pack) -> list:
    return [(one.origin[-10:], one.line, len(one), one.num_trained) for one in pack]


def test_an_epoch_holds_every_sample_once(folder, tokenizer):
    for config in (CONFIG, DataConfig(max_tokens=0), DataConfig(shuffle=False, packing="none", buffer_rows=3)):
        packs = list(PackStream(folder, config, tokenizer, 512))
        found = [(one.origin, one.line) for pack in packs for one in pack]
        assert len(found) == sum(1 + i % 3 for i in [*range(40), *range(100, 120), *range(200, 210)])
        assert len(set(found)) == 70
        assert all(sum(map(len, pack)) <= 512 for pack in packs)


def test_the_order_is_the_seeds_and_another_one_in_each_epoch(folder, tokenizer):
    def order(seed, epochs=1):
        config = DataConfig(current_date="2025-06-28", seed=seed, max_tokens=0)
        return [keys(pack) for pack in PackStream(folder, config, tokenizer, 512, epochs=epochs)]

    first = order(1)
    assert first == order(1) and first != order(2)
    both = order(1, epochs=2)
    assert both[: len(first)] == first and sorted(map(str, both[len(first) :])) != sorted(map(str, first))
    flat = sorted(str(one) for pack in first for one in pack)
    assert sorted(str(one) for pack in both for one in pack) == sorted(flat * 2)


def test_without_shuffling_samples_come_in_the_order_of_the_files(folder, tokenizer):
    config = DataConfig(shuffle=False, packing="none", max_tokens=0)
    lines = [(pack[0].origin, pack[0].line) for pack in PackStream(folder, config, tokenizer, 512)]
    assert lines == sorted(lines)


@pytest.mark.parametrize("world", [1, 3])
def test_a_stream_goes_on_exactly_from_every_state(folder, tokenizer, world):
    def stream(state=None):
        return PackStream(folder, CONFIG, tokenizer, 512, epochs=2, rank=world - 1, world=world, state=state)

    whole = stream()
    packs, states, reports = [], [whole.state()], []
    for pack in whole:
        packs.append(keys(pack))
        states.append(json.loads(json.dumps(whole.state())))
        reports.append(whole.report)
    assert len(packs) > 20 // world
    assert len(json.dumps(states[-1])) < 1000
    for i, state in enumerate(states):
        again = stream(state)
        assert [keys(pack) for pack in again] == packs[i:]
        if i < len(packs):
            assert again.report == reports[-1] and again.state() == states[-1]


def test_a_process_that_was_killed_goes_on_with_the_same_packs(folder, tokenizer, tmp_path):
    program = f"""
import json, os, signal, sys
from ossia.harmony import Tokenizer
from ossia.train.stream import PackStream
from tests.train.test_stream import CONFIG, keys
saved = {str(tmp_path / "state.json")!r}
state = json.load(open(saved)) if os.path.exists(saved) else None
stream = PackStream({str(folder)!r}, CONFIG, Tokenizer.o200k_harmony(), 512, state=state)
for i, pack in enumerate(stream):
    print(json.dumps(keys(pack)), flush=True)
    with open(saved + ".new", "w") as file:
        json.dump(stream.state(), file)
    os.replace(saved + ".new", saved)
    if i == 6:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    seen, ends = [], []
    for _ in range(20):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        seen += [json.loads(line) for line in done.stdout.splitlines()]
        ends.append(done.returncode)
        if done.returncode != -9:
            break
    assert ends[-1] == 0 and ends.count(-9) >= 2, done.stderr
    expected = [[list(one) for one in keys(p)] for p in PackStream(folder, CONFIG, tokenizer, 512)]
    assert seen == expected


@pytest.mark.parametrize("world", [2, 3, 7, 40])
def test_ranks_share_the_packs_of_one_and_take_the_same_number_of_steps(folder, tokenizer, world):
    alone = list(PackStream(folder, CONFIG, tokenizer, 512))
    ranks = [list(PackStream(folder, CONFIG, tokenizer, 512, rank=rank, world=world)) for rank in range(world)]
    assert {len(packs) for packs in ranks} == {-(-len(alone) // world)}
    dealt = [ranks[i % world][i // world] for i in range(len(alone))]
    assert [keys(pack) for pack in dealt] == [keys(pack) for pack in alone]
    # What fills the last step up trains nothing.
    extra = [ranks[i % world][i // world] for i in range(len(alone), len(ranks[0]) * world)]
    assert all(not one.weights_L.any() for pack in extra for one in pack)


def test_another_number_of_ranks_goes_on_where_the_first_stood(folder, tokenizer):
    alone = [keys(pack) for pack in PackStream(folder, CONFIG, tokenizer, 512)]
    two = [PackStream(folder, CONFIG, tokenizer, 512, rank=rank, world=2) for rank in range(2)]
    done = [keys(next(stream)) for _ in range(3) for stream in two]
    assert two[0].state() == two[1].state()
    rest = PackStream(folder, CONFIG, tokenizer, 512, state=two[0].state())
    assert done + [keys(pack) for pack in rest] == alone


@pytest.mark.parametrize("what", ["the files", "the settings of the data", "the number of tokens in a batch"])
def test_a_state_of_other_data_is_refused_by_name(tmp_path, tokenizer, what):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(5)])
    stream = PackStream(path, CONFIG, tokenizer, 512)
    next(stream)
    state = stream.state()
    config, max_tokens = CONFIG, 512
    if what == "the files":
        write_rows(path, [row(i) for i in range(6)])
    elif what == "the number of tokens in a batch":
        max_tokens = 600
    else:
        config = DataConfig(current_date="2025-06-29", buffer_rows=16, max_tokens=200)
    with pytest.raises(InputError, match=what):
        PackStream(path, config, tokenizer, max_tokens, state=state)
    with pytest.raises(InputError, match="version 7"):
        PackStream(path, config, tokenizer, max_tokens, state={**state, "version": 7})


def test_files_without_a_sample_are_an_error_and_no_endless_loop(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n{}\n")
    with pytest.raises(InputError, match=r"no row gave a sample; such as .*a\.jsonl:1"):
        next(PackStream(path, DataConfig(skip_bad_rows=True), tokenizer, 512, epochs=0))
    path.write_text("")
    with pytest.raises(InputError, match=r"a\.jsonl:0: the file is empty"):
        next(PackStream(path, DataConfig(), tokenizer, 512, epochs=0))


def test_a_share_that_leaves_one_side_without_rows_is_named_with_what_would_do(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(3)])
    small = DataConfig(validation_share=0.01, split="validation")
    with pytest.raises(InputError, match=r"a\.jsonl: validation_share is 0\.01, by which none of the 3 rows .* larger"):
        next(PackStream(path, small, tokenizer, 4096))
    large = DataConfig(validation_share=0.99, split="train")
    with pytest.raises(InputError, match=r"validation_share is 0\.99, by which each of the 3 rows .* smaller"):
        next(PackStream(path, large, tokenizer, 4096))


def test_an_error_comes_with_the_block_that_has_the_row(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [*(row(i) for i in range(40)), {"messages": 3}])
    stream = PackStream(path, CONFIG, tokenizer, 512)
    assert next(stream)
    with pytest.raises(InputError, match=r"a\.jsonl:41"):
        list(stream)


def test_a_stream_without_end_goes_on_and_tells_how_far_it_is(folder, tokenizer):
    stream = PackStream(folder, CONFIG, tokenizer, 512, epochs=0)
    seen = []
    while stream.epoch < 3:
        next(stream)
        seen.append(stream.progress)
    stream.close()
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 3
    assert stream.report.rows > 210


def test_samples_that_do_not_fit_a_batch_are_too_long(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [row(6)])
    with pytest.raises(InputError, match="at most 60 are allowed"):
        next(PackStream(path, DataConfig(max_tokens=0), tokenizer, 60))


def test_pairs_are_packed_whole(tmp_path, tokenizer):
    pairs = [{"prompt": f"{i}", "chosen": "yes " * (1 + i), "rejected": "no"} for i in range(20)]
    path = write_rows(tmp_path / "a.jsonl", pairs)
    packs = list(PackStream(path, CONFIG, tokenizer, 512, kind="pairs"))
    assert all(isinstance(one, PairSample) for pack in packs for one in pack)
    assert sorted(one.line for pack in packs for one in pack) == list(range(1, 21))
    assert max(sum(map(len, pack)) for pack in packs) <= 512
    extra = list(PackStream(path, CONFIG, tokenizer, 512, kind="pairs", rank=12, world=13))
    assert any(not one.chosen.weights_L.any() for one in extra[-1])


def test_packs_can_be_counted_before(folder, tokenizer):
    counted = count_packs(folder, CONFIG, tokenizer, 512, epochs=2)
    assert counted == len(list(PackStream(folder, CONFIG, tokenizer, 512, epochs=2)))


def test_data_is_read_without_torch(folder):
    program = f"""
import sys
sys.modules["torch"] = None
from ossia.harmony import Tokenizer
from ossia.train import inspect
from ossia.train.data import DataConfig, to_batch
from ossia.train.stream import PackStream
print(to_batch(next(PackStream({str(folder)!r}, DataConfig(), Tokenizer.o200k_harmony(), 512))).num_tokens)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 400, done.stderr
