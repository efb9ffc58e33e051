"""What a file of training data holds: how many samples and tokens, what is trained of them, and what is wrong.

Everything is read as training would read it, but nothing is an error: bad rows are listed, and samples that are too
long are counted.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ossia.errors import InputError
from ossia.harmony import Channel, Role, Tokenizer, TokenSpan
from ossia.train.data import DataConfig, PairSample, Sample, SampleReader, kind_of
from ossia.train.formats import Dialogue, is_pair
from ossia.train.packing import plan
from ossia.train.rows import Line, RowStream, find_files, parse, random_order


class Run(NamedTuple):
    """Tokens in a row that belong to one message and have one weight."""

    # Who speaks, and for the assistant on which channel or to whom: "user", "analysis", "call functions.f".
    speaker: str
    weight: float
    token_ids: list[int]


class Shown(NamedTuple):
    """One sample, to be looked at."""

    file: str
    line: int
    # "2 of 3" of its row, or chosen and rejected.
    which: str
    effort: str | None
    num_tokens: int
    num_trained: int
    runs: list[Run]


class Packed(NamedTuple):
    """How samples fill batches of ``max_tokens`` tokens."""

    max_tokens: int
    packs: int
    # Share of the room of all packs that is filled.
    efficiency: float


@dataclass
class Inspection:
    """What was found; every count is of samples where nothing else is said."""

    files: list[str]
    formats: dict[str, int] = field(default_factory=dict)
    kind: str = "samples"
    rows: int = 0
    bad_rows: int = 0
    held_back_rows: int = 0
    untrained_rows: int = 0
    duplicate_rows: int = 0
    samples: int = 0
    max_tokens: int = 0
    too_long: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    # Tokens by who speaks: those that are trained, and the others.
    trained: dict[str, int] = field(default_factory=dict)
    untrained: dict[str, int] = field(default_factory=dict)
    # Shortest, median, 95th and 99th percentile, longest.
    length_percentiles: dict[str, int] = field(default_factory=dict)
    # Samples of at most so many tokens, and more than the bound before.
    length_histogram: dict[int, int] = field(default_factory=dict)
    packing: Packed | None = None
    efforts: dict[str, int] = field(default_factory=dict)
    # Rows that declare a tool, and calls of it.
    tools_declared: dict[str, int] = field(default_factory=dict)
    tools_called: dict[str, int] = field(default_factory=dict)
    # Fields of messages that say nothing to the model, by how often they occur.
    unread_fields: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)


def inspect_data(
    path: str | Path | Sequence[str | Path],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_tokens: int = 0,
    num_shown_rows: int = 1,
    line: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Inspection:
    """Read all of it. ``line`` shows the samples of that line of the first file, instead of those of the first rows.

    ``batch_tokens`` is how many tokens a batch holds, ``config.max_tokens`` where it is 0. ``progress`` is told the
    share that is read. Raises NotFoundError and InputError for files that are not there.
    """
    files = find_files(path)
    made = Inspection([str(file) for file in files], max_tokens=config.max_tokens)
    counts = _Counts()
    # Longer samples are counted here, with their lengths.
    reading = replace(config, skip_bad_rows=True, max_tokens=0)
    reader = SampleReader(reading, tokenizer, watch=counts.watch)
    stream = RowStream(files)
    pairs: dict[str, bool] = {}
    rows_shown = 0
    for number, one in enumerate(stream):
        if one.file not in pairs:
            pairs[one.file] = _holds_pairs(one)
            made.kind = "pairs" if pairs[one.file] else made.kind
        counts.hashes.append(int.from_bytes(blake2b(one.data, digest_size=8).digest(), "little"))
        samples = reader.pairs(one) if pairs[one.file] else reader.samples(one)
        counts.add(samples)
        is_wanted = rows_shown < num_shown_rows if line is None else (one.file, one.number) == (made.files[0], line)
        if samples and is_wanted:
            rows_shown += 1
            made.shown += _shown(samples)
        if progress is not None and number % 256 == 0:
            progress(stream.fraction)
    report = reader.report
    for name in ("rows", "bad_rows", "samples", "tokens", "trained_tokens", "untrained_rows", "problems"):
        setattr(made, name, getattr(report, name))
    made.held_back_rows = report.held_back
    made.formats = _formats(reader, made.files)
    counts.tell(made, batch_tokens or config.max_tokens, config)
    return made


class _Counts:
    """What is counted on the way; a few bytes for each row and sample."""

    def __init__(self) -> None:
        self.hashes = array("Q")
        self.lengths = array("I")
        # Lengths of what is packed: samples, or pairs.
        self.units = array("I")
        self.efforts: Counter[str] = Counter()
        self.trained: Counter[str] = Counter()
        self.untrained: Counter[str] = Counter()
        self.declared: Counter[str] = Counter()
        self.called: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.undeclared: Counter[str] = Counter()
        self.num_unclean_arguments = 0
        self.num_think_tags = 0
        self.num_unanswered = 0

    def watch(self, dialogue: Dialogue) -> None:
        self.declared.update(set(dialogue.tools))
        self.unread.update(dialogue.unread)
        for message in dialogue.messages:
            if message.role is not Role.ASSISTANT:
                continue
            if message.recipient is not None:
                self.called[message.recipient] += 1
                if message.recipient not in dialogue.tools:
                    self.undeclared[message.recipient] += 1
                if (message.content_type or "").endswith("json") and not _is_object(message.text):
                    self.num_unclean_arguments += 1
            elif message.channel == Channel.FINAL and "</think>" in message.text:
                self.num_think_tags += 1
        if dialogue.messages[-1].role is not Role.ASSISTANT:
            self.num_unanswered += 1

    def add(self, samples: Sequence[Sample | PairSample]) -> None:
        for unit in samples:
            self.units.append(len(unit))
            for sample in [unit] if isinstance(unit, Sample) else [unit.chosen, unit.rejected]:
                self.lengths.append(len(sample))
                self.efforts[str(sample.effort or "none")] += 1
                for span in sample.spans:
                    weights = sample.weights_L[span.start : span.end]
                    num_trained = int(np.count_nonzero(weights))
                    if num_trained:
                        self.trained[kind_of(span)] += num_trained
                    if num_trained < len(weights):
                        self.untrained[str(span.role)] += len(weights) - num_trained

    def tell(self, made: Inspection, batch_tokens: int, config: DataConfig) -> None:
        made.duplicate_rows = len(self.hashes) - len(np.unique(np.frombuffer(self.hashes, np.uint64)))
        made.efforts, made.trained, made.untrained = (
            dict(counter.most_common()) for counter in (self.efforts, self.trained, self.untrained)
        )
        made.tools_declared, made.tools_called = dict(self.declared.most_common()), dict(self.called.most_common())
        made.unread_fields = dict(self.unread.most_common())
        if self.lengths:
            lengths = np.frombuffer(self.lengths, np.uint32)
            for name, share in (("shortest", 0), ("median", 50), ("95 %", 95), ("99 %", 99), ("longest", 100)):
                made.length_percentiles[name] = int(np.percentile(lengths, share, method="higher"))
            bounds = np.maximum(np.ceil(np.log2(lengths)), 4).astype(np.int64)
            found, numbers = np.unique(bounds, return_counts=True)
            made.length_histogram = {1 << int(bound): int(num) for bound, num in zip(found, numbers, strict=True)}
            made.too_long = int((lengths > config.max_tokens).sum()) if config.max_tokens else 0
        if batch_tokens:
            made.packing = _packed(self.units, batch_tokens, config)
        made.warnings = self._warnings(made)

    def _warnings(self, made: Inspection) -> list[str]:
        out = []
        if self.undeclared:
            names = ", ".join(name for name, _ in self.undeclared.most_common(5))
            out.append(f"{sum(self.undeclared.values())} calls of tools that their rows do not declare: {names}")
        if self.num_unclean_arguments:
            out.append(f"{self.num_unclean_arguments} calls whose arguments are no JSON object")
        if self.num_think_tags:
            out.append(
                f"{self.num_think_tags} answers with </think>; the model would say it to users: give thoughts in the "
                "field 'reasoning'"
            )
        if self.num_unanswered:
            out.append(f"{self.num_unanswered} rows end in a message that no answer follows")
        if made.unread_fields:
            names = ", ".join(f"{name} ({num})" for name, num in list(made.unread_fields.items())[:8])
            out.append(f"fields that are not read: {names}")
        if made.samples and "analysis" not in made.trained and "final" in made.trained:
            out.append("no thoughts are trained; the model may unlearn to think")
        return out


def _packed(units: Sequence[int], batch_tokens: int, config: DataConfig) -> Packed | None:
    fitting = [length for length in units if length <= batch_tokens]
    if not fitting:
        return None
    if config.shuffle:
        fitting = [fitting[i] for i in random_order(len(fitting), config.seed)]
    step = config.buffer_rows
    num = sum(len(plan(fitting[i : i + step], batch_tokens, config.packing)) for i in range(0, len(fitting), step))
    return Packed(batch_tokens, num, sum(fitting) / (num * batch_tokens))


def _holds_pairs(line: Line) -> bool:
    try:
        return is_pair(parse(line))
    except InputError:
        return False


def _formats(reader: SampleReader, files: Sequence[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for file in files:
        try:
            found[reader.format_of(file)] += 1
        except InputError:
            found["none"] += 1
    return dict(found)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# -- samples to look at --------------------------------------------------------------------------------------------


def _shown(samples: Sequence[Sample | PairSample]) -> list[Shown]:
    named: list[tuple[str, Sample]] = []
    for i, one in enumerate(samples):
        if isinstance(one, PairSample):
            named += [("chosen", one.chosen), ("rejected", one.rejected)]
        else:
            named.append((f"{i + 1} of {len(samples)}", one))
    return [
        Shown(
            sample.origin,
            sample.line or 0,
            which,
            sample.effort and str(sample.effort),
            len(sample),
            sample.num_trained,
            runs(sample),
        )
        for which, sample in named
    ]


def runs(sample: Sample) -> list[Run]:
    """A sample cut where the message or the weight changes."""
    out: list[Run] = []
    before: TokenSpan | None = None
    for span in sample.spans:
        weights = sample.weights_L[span.start : span.end]
        cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
        for begin, end in pairwise(cuts):
            token_ids = sample.token_ids_L[span.start + begin : span.start + end].tolist()
            run = Run(_speaker(span), float(weights[begin]), token_ids)
            if begin == 0 and before is not None and out[-1].weight == run.weight and _is_one_message(before, span):
                out[-1].token_ids.extend(token_ids)
            else:
                out.append(run)
        before = span
    return out


def _is_one_message(span: TokenSpan, following: TokenSpan) -> bool:
    """Whether a span goes on with the message of the one before: its opening, what is sampled, an end that is not."""
    if span.role is not Role.ASSISTANT or following.role is not Role.ASSISTANT or span.sampled == following.sampled:
        return False
    return following.sampled or following.end - following.start == 1


def _speaker(span: TokenSpan) -> str:
    if span.role is not Role.ASSISTANT:
        return str(span.role)
    return f"call {span.recipient}" if span.recipient is not None else str(span.channel or "assistant")
