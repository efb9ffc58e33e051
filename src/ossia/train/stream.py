"""Batches of samples for as many epochs as wanted, in an order that a seed decides, resumed exactly anywhere.

Rows are read a block at a time (``buffer_rows``, or fewer where their samples are many tokens). A block is a pure
function of its place in the files: its samples are shuffled by (seed, epoch, block), packed, and the packs shuffled
again. So the state is the place where the block begins and how many of its packs are used, a few numbers whatever the
block's size; and resuming reads one block again.

All ranks of a job see the same order and take every ``world``-th pack of it: which samples a step trains does not
depend on the number of ranks, which may be another one when the job goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ossia.errors import InputError
from ossia.harmony import Tokenizer
from ossia.train.data import DataConfig, PairSample, ReadReport, Sample, SampleReader
from ossia.train.packing import plan
from ossia.train.rows import Json, RowStream, find_files, random_order

Pack = list[Sample] | list[PairSample]

# A block ends here even before it has all its rows: 8 bytes a token, so 64 MiB.
_MAX_BLOCK_TOKENS = 8 << 20


class _Block(NamedTuple):
    """Packs of one block of rows, where it begins, and what was read for it."""

    place: Json
    fraction: float
    packs: list[Any]
    report: ReadReport


class PackStream(Iterator[Pack]):
    """Lists of samples of at most ``max_tokens`` tokens together, or of pairs; ends after ``epochs`` (0 for never).

    ``state`` gives, after any pack, what a new stream over the same files and settings goes on from. The last packs of
    all, if they do not suffice for every rank, are repeated for the others with no weight, so that all ranks take the
    same number of steps. Raises InputError for files that hold no sample, and for a state of other data.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        config: DataConfig,
        tokenizer: Tokenizer,
        max_tokens: int,
        *,
        kind: Literal["samples", "pairs"] = "samples",
        epochs: int = 1,
        rank: int = 0,
        world: int = 1,
        state: Json | None = None,
    ) -> None:
        assert 0 <= rank < world
        # A batch holds at least one sample, or one pair.
        most = max_tokens // 2 if kind == "pairs" else max_tokens
        self._config = replace(config, max_tokens=min(config.max_tokens or most, most))
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._kind = kind
        self._epochs = epochs
        self._rank, self._world = rank, world
        self._files = find_files(path)
        self._print = _fingerprint(self._files, config, max_tokens, kind, tokenizer)
        # Reports of all blocks before the current one, and with it.
        self._before, self.report = ReadReport(), ReadReport()
        self._block: _Block | None = None
        self._used = 0
        self._num_packs = 0
        place: Json = {"epoch": 0, "block": 0, "at": None}
        skip = 0
        if state is not None:
            self._check(state)
            place, skip, self._num_packs = state["place"], state["used"], state["num_packs"]
            self._before = ReadReport(**state["report"])
            self.report = replace(self._before, problems=list(self._before.problems))
        self._place = place
        self._skip = skip
        self._worker = ThreadPoolExecutor(1, "ossia-data")
        self._blocks = self._read_blocks(place)
        self._ahead = self._worker.submit(next, self._blocks, None)

    @property
    def epoch(self) -> int:
        """The epoch of the latest pack, from 0."""
        return int(self._place["epoch"])

    @property
    def progress(self) -> float:
        """Epochs that are done, and about what part of the current one, up to the size of a block."""
        return self.epoch + (0.0 if self._block is None else self._block.fraction)

    @property
    def num_packs(self) -> int:
        """Packs that all ranks together have taken."""
        return self._num_packs

    def state(self) -> Json:
        """Where the stream is, as JSON values; the same on all ranks after the same number of packs."""
        return {
            "version": 1,
            "data": self._print,
            "place": self._place,
            "used": self._used if self._block is not None else self._skip,
            "num_packs": self._num_packs,
            "report": asdict(self._before),
        }

    def close(self) -> None:
        """Stop reading ahead."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._blocks.close()

    def __next__(self) -> Pack:
        own: Pack | None = None
        first: Pack | None = None
        for rank in range(self._world):
            pack = self._next_pack()
            if pack is None:
                if first is None:
                    self.close()
                    raise StopIteration
                own = _weightless(first) if own is None else own
                break
            first = pack if first is None else first
            own = pack if rank == self._rank else own
        assert own is not None
        return own

    def _next_pack(self) -> Pack | None:
        while self._block is None or self._used == len(self._block.packs):
            block: _Block | None = self._ahead.result()
            if block is None:
                return None
            if self._block is not None:
                self._before = self.report
            self.report = replace(self._before, problems=list(self._before.problems))
            self.report.add(block.report)
            self._used, self._skip = self._skip, 0
            self._block, self._place = block, block.place
            self._ahead = self._worker.submit(next, self._blocks, None)
        self._used += 1
        self._num_packs += 1
        return self._block.packs[self._used - 1]

    def _read_blocks(self, place: Json) -> Generator[_Block]:
        epoch, number, at = place["epoch"], place["block"], place["at"]
        reader = SampleReader(self._config, self._tokenizer)
        while not self._epochs or epoch < self._epochs:
            num_packs, report = 0, ReadReport()
            with closing(
                RowStream(self._files, seed=(self._config.seed, epoch) if self._config.shuffle else None)
            ) as rows:
                begins_midway = at is not None
                if at is not None:
                    rows.seek(at)
                while (block := self._read_block(rows, reader, epoch, number)) is not None:
                    num_packs += len(block.packs)
                    report.add(block.report)
                    number += 1
                    yield block
            if not num_packs and not begins_midway:
                raise InputError(self._nothing(report))
            epoch, number, at = epoch + 1, 0, None

    def _read_block(self, rows: RowStream, reader: SampleReader, epoch: int, number: int) -> _Block | None:
        place: Json = {"epoch": epoch, "block": number, "at": rows.position}
        fraction = rows.fraction
        read = reader.samples if self._kind == "samples" else reader.pairs
        report = reader.report = ReadReport()
        samples: list[Any] = []
        num_tokens = 0
        while report.rows < self._config.buffer_rows and num_tokens < _MAX_BLOCK_TOKENS:
            line = rows.next()
            if line is None:
                break
            for sample in read(line):
                samples.append(sample)
                num_tokens += len(sample)
        if not report.rows:
            return None
        if self._config.shuffle:
            samples = [samples[i] for i in random_order(len(samples), self._config.seed, epoch, number, 0)]
        packs = plan([len(one) for one in samples], self._max_tokens, self._config.packing)
        if self._config.shuffle:
            packs = [packs[i] for i in random_order(len(packs), self._config.seed, epoch, number, 1)]
        return _Block(place, fraction, [[samples[i] for i in indices] for indices in packs], report)

    def _nothing(self, report: ReadReport) -> str:
        names = ", ".join(str(file) for file in self._files[:3])
        if 0 < report.held_back == report.rows:
            share = f"validation_share is {self._config.validation_share}"
            which, remedy = ("none", "larger") if self._config.split == "validation" else ("each", "smaller")
            return f"{names}: {share}, by which {which} of the {report.rows} rows is held out; expected a {remedy} one"
        problems = "; ".join(report.problems[:3])
        return f"{names}: no row gave a sample" + (f"; such as {problems}" if problems else "")

    def _check(self, state: Json) -> None:
        if state.get("version") != 1:
            raise InputError(f"a state of the data of version {state.get('version')!r}; expected 1")
        changed = [name for name, value in self._print.items() if state["data"].get(name) != value]
        if changed:
            raise InputError(
                f"the data cannot go on where it stood: {', '.join(changed)} changed since; take back the change, or "
                "begin anew"
            )


def count_packs(
    path: str | Path | Sequence[str | Path],
    config: DataConfig,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    kind: Literal["samples", "pairs"] = "samples",
    epochs: int = 1,
) -> int:
    """Packs that a `PackStream` gives to all ranks together; reads all of the data for it, as many times as epochs."""
    stream = PackStream(path, config, tokenizer, max_tokens, kind=kind, epochs=epochs)
    return sum(1 for _ in stream)


def _weightless(pack: Pack) -> Pack:
    """The same tokens with nothing to be learnt from them."""
    return [_unweighted(one) for one in pack]  # type: ignore[return-value]  # a list of either kind stays one


def _unweighted(one: Sample | PairSample) -> Sample | PairSample:
    if isinstance(one, PairSample):
        return replace(one, chosen=_no_weights(one.chosen), rejected=_no_weights(one.rejected))
    return _no_weights(one)


def _no_weights(sample: Sample) -> Sample:
    return replace(sample, weights_L=np.zeros_like(sample.weights_L))


def _fingerprint(
    files: Sequence[Path], config: DataConfig, max_tokens: int, kind: str, tokenizer: Tokenizer
) -> dict[str, str]:
    """What must not change while a job goes on, each as a short digest."""
    heads = []
    for file in files:
        with file.open("rb") as opened:
            heads.append([file.name, file.stat().st_size, hashlib.blake2b(opened.read(65_536)).hexdigest()])
    special = sorted(tokenizer.special_tokens.items())
    parts: dict[str, Any] = {
        "the files": heads,
        "the settings of the data": asdict(config),
        "the number of tokens in a batch": [max_tokens, kind],
        "the vocabulary": [tokenizer.vocab_size, special],
    }
    return {name: hashlib.blake2b(repr(part).encode(), digest_size=8).hexdigest() for name, part in parts.items()}
