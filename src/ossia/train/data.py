"""What training reads: samples of tokens with a loss weight for each, pairs of them, and batches.

A sample is one stretch of a conversation as inference sees it: the prompt that the server would render, then what the
model is to sample. Nothing here needs torch; arrays are numpy's, and the trainer moves them.

Legend for shapes: see `ossia.ops`; L tokens of one sample.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ossia.errors import ConfigError, InputError
from ossia.harmony import DropAnalysis, Effort, Tokenizer, TokenSpan
from ossia.ops import Batch
from ossia.train.expansion import Expanded, TrainRules, expand
from ossia.train.formats import (
    FORMATS,
    Defaults,
    Dialogue,
    Format,
    checked_date,
    detect,
    read_dialogue,
    read_pair,
)
from ossia.train.rows import Line, RowStream, find_files, parse

KINDS = ("other", "analysis", "commentary", "final", "call")
"""What a trained token belongs to, as `TrainBatch.kinds_R` counts: thoughts, words on the way, the answer, a call."""


@dataclass(frozen=True)
class DataConfig:
    """How conversations become samples, and in which order they come."""

    # Format of the rows; auto looks at the first row of each file.
    format: Literal["auto", "harmony", "openai", "sharegpt"] = "auto"
    # What is trained: all, analysis, commentary, final, calls or calls:PATTERN, each with =WEIGHT; the last one holds.
    train: str = "all"
    # Which answers of a conversation become samples.
    turns: Literal["all", "last"] = "all"
    # Reasoning effort of rows that name none: one, or shares such as low=1,medium=2,high=1.
    effort: str = "medium"
    # Date that the model is told: YYYY-MM-DD, two of them with .. between for one of that range, or empty for none.
    current_date: str = "2025-01-01..2026-12-31"
    # Which thoughts of earlier turns a prompt leaves out, in the words of `ossia.harmony.DropAnalysis`.
    drop_analysis: DropAnalysis = "past_turns"
    # Most tokens of a sample, 0 for no bound.
    max_tokens: int = 4096
    # What becomes of a longer sample: an error, left out, or its oldest turns left out as the server does.
    overlong: Literal["refuse", "skip", "cut"] = "refuse"
    # Whether rows that cannot be used are counted and passed by; otherwise the first one is an error.
    skip_bad_rows: bool = False
    # Share of the rows, chosen by a hash of each, that is held back for validation.
    validation_share: float = 0.0
    # Which side of that division is read.
    split: Literal["all", "train", "validation"] = "all"
    # Rows that are held at once to be shuffled and packed.
    buffer_rows: int = 4096
    # Whether samples come in a seeded random order, other in each epoch; otherwise in the order of the files.
    shuffle: bool = True
    # How samples share a batch: whichever fill it best, those of like length, or each alone.
    packing: Literal["best_fit", "buckets", "none"] = "best_fit"
    # Seed of the order, of efforts and of dates.
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens of one sample; ``weights_L[i]`` is the loss weight of predicting token i from those before it.

    The first token is never trained, and the last one with a weight ends a message: return, call or end.
    """

    token_ids_L: npt.NDArray[np.int32]
    weights_L: npt.NDArray[np.float32]
    effort: Effort | None = None
    line: int | None = None
    origin: str = ""
    # Which message each token belongs to; () where that is not known.
    spans: tuple[TokenSpan, ...] = ()

    @property
    def num_trained(self) -> int:
        return int(np.count_nonzero(self.weights_L))

    def __len__(self) -> int:
        return len(self.token_ids_L)


@dataclass(frozen=True, eq=False)
class PairSample:
    """Two answers to one prompt, of which ``chosen`` is the better; both begin with the tokens of the prompt."""

    chosen: Sample
    rejected: Sample
    line: int | None = None
    origin: str = ""
    # What the pair's loss is multiplied by.
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class TrainBatch:
    """Samples as one batch without padding; the rows of ``logits_RV`` are those with something to predict."""

    batch: Batch
    targets_R: npt.NDArray[np.int64]
    weights_R: npt.NDArray[np.float32]
    # Which sample of the batch a row belongs to.
    samples_R: npt.NDArray[np.int32]
    # What the target belongs to, as an index into KINDS.
    kinds_R: npt.NDArray[np.uint8]
    # By pair, [S / 2]; none where the samples are no pairs.
    pair_weights_P: npt.NDArray[np.float32]
    num_tokens: int

    @property
    def num_samples(self) -> int:
        return len(self.batch.key_lengths_N)


def to_batch(samples: Sequence[Sample | PairSample]) -> TrainBatch:
    """One batch of the samples, in order; of a pair first the chosen one, then the rejected one."""
    flat: list[Sample] = []
    for one in samples:
        flat += [one] if isinstance(one, Sample) else [one.chosen, one.rejected]
    assert flat, "a batch of no samples"
    lengths_N = np.array([len(sample) for sample in flat], np.int32)
    starts_N1 = np.concatenate(([0], np.cumsum(lengths_N))).astype(np.int32)
    num_tokens = int(starts_N1[-1])
    token_ids_T = np.concatenate([sample.token_ids_L for sample in flat]).astype(np.int32, copy=False)
    weights_T = np.concatenate([sample.weights_L for sample in flat]).astype(np.float32, copy=False)
    assert not weights_T[starts_N1[:-1]].any(), "the first token of a sample has nothing before it to be predicted from"
    documents_T = np.repeat(np.arange(len(flat), dtype=np.int32), lengths_N)
    targets_at = np.flatnonzero(weights_T)
    no_blocks_NB = np.empty((len(flat), 0), np.int32)
    batch = Batch(
        token_ids_T=token_ids_T,
        positions_T=np.arange(num_tokens, dtype=np.int32) - starts_N1[documents_T],
        query_starts_N1=starts_N1,
        key_lengths_N=lengths_N,
        full_table_NB=no_blocks_NB,
        window_table_NB=no_blocks_NB,
        logit_rows_R=(targets_at - 1).astype(np.int32),
    )
    return TrainBatch(
        batch,
        targets_R=token_ids_T[targets_at].astype(np.int64),
        weights_R=weights_T[targets_at],
        samples_R=documents_T[targets_at],
        kinds_R=np.concatenate([_kinds(sample) for sample in flat])[targets_at],
        pair_weights_P=np.array([one.weight for one in samples if isinstance(one, PairSample)], np.float32),
        num_tokens=num_tokens,
    )


def kind_of(span: TokenSpan) -> str:
    """Which of KINDS the tokens of a span are, once they are trained."""
    if not span.sampled:
        return "other"
    if span.recipient is not None:
        return "call"
    return span.channel if span.channel in KINDS else "other"


def _kinds(sample: Sample) -> npt.NDArray[np.uint8]:
    kinds_L = np.zeros(len(sample), np.uint8)
    for span in sample.spans:
        kinds_L[span.start : span.end] = KINDS.index(kind_of(span))
    return kinds_L


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass
class ReadReport:
    """What was read so far, and what was passed by."""

    rows: int = 0
    # Rows of the other side of the split.
    held_back: int = 0
    bad_rows: int = 0
    # Rows under whose rules nothing is trained.
    untrained_rows: int = 0
    # Fields that nothing reads: misspelt ones, perhaps.
    unread_fields: int = 0
    samples: int = 0
    too_long: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    # The first bad rows, samples that were too long and fields that are not read: place, and what is wrong.
    problems: list[str] = field(default_factory=list)

    def add(self, other: ReadReport) -> None:
        for name, value in asdict(other).items():
            if name != "problems":
                setattr(self, name, getattr(self, name) + value)
        self.problems += other.problems[: MAX_PROBLEMS - len(self.problems)]

    def note(self, problem: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


MAX_PROBLEMS = 100


class SampleReader:
    """Lines to samples, under one configuration; ``report`` counts, and may be replaced at any time.

    ``watch`` is called with what each row says, before it becomes samples.

    Raises InputError, with file and line, for a row or a sample that cannot be used, unless the configuration says to
    pass it by; and ConfigError for a setting that is no setting.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, watch: Callable[[Dialogue], None] | None = None
    ) -> None:
        self.config = config
        self.report = ReadReport()
        self._watch = watch
        self._tokenizer = tokenizer
        self._rules = TrainRules(config.train)
        self._efforts = _read_efforts(config.effort)
        self._dates = _read_dates(config.current_date)
        self._formats: dict[str, Format] = {}

    def samples(self, line: Line) -> list[Sample]:
        """The samples of one row."""
        if not self._is_wanted(line):
            return []
        try:
            row, form = self._row(line)
            dialogue = read_dialogue(row, form, self._defaults(line.data))
            if not any(dialogue.weights):
                raise InputError("a row with nothing of the assistant's to train on")
            if self._watch is not None:
                self._watch(dialogue)
            expanded = list(self._expand(dialogue, self.config.max_tokens))
        except InputError as error:
            return self._bad(line, error)
        except RecursionError:
            return self._bad(line, InputError("a row that is nested too deeply"))
        self.report.untrained_rows += not expanded
        self._unread(line, dialogue)
        made = []
        for one in expanded:
            if one.num_too_many:
                self._too_long(line, one.num_too_many)
            else:
                made.append(self._sample(one, dialogue, line))
        return made

    def pairs(self, line: Line) -> list[PairSample]:
        """The pair of one row, if any."""
        if not self._is_wanted(line):
            return []
        try:
            row, form = self._row(line)
            pair = read_pair(row, form, self._defaults(line.data))
            if self._watch is not None:
                self._watch(pair.chosen)
            sides = [self._turn("chosen", pair.chosen), self._turn("rejected", pair.rejected)]
            prompts = [one.token_ids_L[: one.num_prompt].tolist() for one in sides]
            if prompts[0] != prompts[1]:
                raise InputError("chosen and rejected answer different prompts; expected the same messages before both")
        except InputError as error:
            return self._bad(line, error)
        except RecursionError:
            return self._bad(line, InputError("a row that is nested too deeply"))
        self._unread(line, pair.chosen)
        lengths = [len(one.token_ids_L) for one in sides]
        bound, longest = self.config.max_tokens, max(lengths)
        if bound and longest > bound:
            # Either has to lose as many tokens, and so loses the same turns.
            bounds = [max(1, bound - (longest - length)) for length in lengths]
            sides = [next(self._expand(*side)) for side in zip(pair[:2], bounds, strict=True)]
            if any(one.num_too_many for one in sides):
                self._too_long(line, longest)
                return []
        chosen, rejected = (self._sample(*side, line) for side in zip(sides, pair[:2], strict=True))
        return [PairSample(chosen, rejected, line.number, line.file, pair.weight)]

    def format_of(self, file: str) -> Format:
        """The format of a file: the configured one, or that of its first row that has one. Raises InputError."""
        if self.config.format != "auto":
            return self.config.format
        if file not in self._formats:
            self._formats[file] = _detect_file(file)
        return self._formats[file]

    def _is_wanted(self, line: Line) -> bool:
        self.report.rows += 1
        if self.config.split == "all" or line.fault:
            return True
        is_validation = _unit(line.data, b"split") < self.config.validation_share
        is_wanted = is_validation == (self.config.split == "validation")
        self.report.held_back += not is_wanted
        return is_wanted

    def _row(self, line: Line) -> tuple[Any, Format]:
        row = parse(line)
        form = self.format_of(line.file)
        found = detect(row) if self.config.format == "auto" else form
        # A row without an answer has no channel that would tell.
        if found != form and (found, form) != ("openai", "harmony"):
            raise InputError(
                f"a row of the format {found} in a file whose first row is of the format {form}; name the file's "
                "format, or part it"
            )
        return row, form

    def _turn(self, name: str, dialogue: Dialogue) -> Expanded:
        """The only turn of one side of a pair, however long."""
        expanded = list(self._expand(dialogue, 0))
        if len(expanded) != 1:
            met = "nothing that is trained" if not expanded else f"{len(expanded)} turns"
            raise InputError(f"{name} has {met}; expected one turn of the assistant")
        return expanded[0]

    def _expand(self, dialogue: Dialogue, max_tokens: int) -> Iterator[Expanded]:
        return expand(
            dialogue,
            self._tokenizer,
            self._rules,
            drop_analysis=self.config.drop_analysis,
            turns=self.config.turns,
            max_tokens=max_tokens,
            cut=self.config.overlong == "cut",
        )

    def _sample(self, one: Expanded, dialogue: Dialogue, line: Line) -> Sample:
        sample = Sample(one.token_ids_L, one.weights_L, dialogue.effort, line.number, line.file, one.spans)
        self.report.samples += 1
        self.report.tokens += len(sample)
        self.report.trained_tokens += sample.num_trained
        return sample

    def _defaults(self, data: bytes) -> Defaults:
        seed = self.config.seed.to_bytes(8, "little")
        effort = self._efforts[0][1]
        if len(self._efforts) > 1:
            drawn = _unit(data, b"effort", seed)
            effort = next(effort for bound, effort in self._efforts if drawn < bound)
        if self._dates is None:
            return Defaults(effort, None)
        first, num = self._dates
        day = first + datetime.timedelta(days=int(_unit(data, b"date", seed) * num)) if num > 1 else first
        return Defaults(effort, day.isoformat())

    def _bad(self, line: Line, error: InputError) -> list[Any]:
        problem = f"{line.where}: {error.message}"
        if not self.config.skip_bad_rows:
            raise InputError(f"{problem} (skip_bad_rows passes such rows by)", param=error.param) from error
        self.report.bad_rows += 1
        self.report.note(problem)
        return []

    def _unread(self, line: Line, dialogue: Dialogue) -> None:
        for name in dialogue.unread:
            self.report.unread_fields += 1
            self.report.note(f"{line.where}: the field {name} is not read")

    def _too_long(self, line: Line, num_tokens: int) -> None:
        problem = f"{line.where}: a sample of {num_tokens} tokens; at most {self.config.max_tokens} are allowed"
        if self.config.overlong == "refuse":
            raise InputError(f"{problem} (max_tokens allows more; overlong = skip or cut says what else to do)")
        self.report.too_long += 1
        self.report.note(problem)


def read_samples(
    path: str | Path | Sequence[str | Path],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    rank: int = 0,
    world: int = 1,
    report: ReadReport | None = None,
) -> Iterator[Sample]:
    """The samples of a file or folder, in its order, once; of ``world`` readers each gets rows that no other gets.

    ``report`` is filled as reading goes on. Raises as `SampleReader` does.
    """
    reader = SampleReader(config, tokenizer)
    reader.report = reader.report if report is None else report
    for line in _lines(path, rank, world):
        yield from reader.samples(line)


def read_pairs(
    path: str | Path | Sequence[str | Path],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    rank: int = 0,
    world: int = 1,
    report: ReadReport | None = None,
) -> Iterator[PairSample]:
    """The same for rows with a chosen and a rejected answer."""
    reader = SampleReader(config, tokenizer)
    reader.report = reader.report if report is None else report
    for line in _lines(path, rank, world):
        yield from reader.pairs(line)


def _lines(path: str | Path | Sequence[str | Path], rank: int, world: int) -> Iterator[Line]:
    assert 0 <= rank < world
    stream = RowStream(find_files(path))
    try:
        for i, line in enumerate(stream):
            if i % world == rank:
                yield line
    finally:
        stream.close()


def _detect_file(file: str) -> Format:
    """The format of the first row that can be read, within the first hundred."""
    fault = f"{file}: no row"
    stream = RowStream([Path(file)])
    try:
        for _ in range(100):
            line = stream.next()
            if line is None:
                break
            try:
                return detect(parse(line))
            except InputError as error:
                fault = error.message
    finally:
        stream.close()
    raise InputError(fault)


# -- settings ------------------------------------------------------------------------------------------------------


def _check(config: DataConfig) -> None:
    choices = {
        "format": ("auto", *FORMATS),
        "turns": ("all", "last"),
        "drop_analysis": ("harmony", "past_turns", "never"),
        "overlong": ("refuse", "skip", "cut"),
        "split": ("all", "train", "validation"),
        "packing": ("best_fit", "buckets", "none"),
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; expected one of: {', '.join(known)}", param=name)
    if not 0 <= config.validation_share < 1:
        raise ConfigError(f"validation_share is {config.validation_share}; expected 0 or more, and less than 1")
    if config.split == "validation" and not config.validation_share:
        raise ConfigError("split is validation and validation_share is 0; expected a share")
    for name, least in (("max_tokens", 0), ("buffer_rows", 1), ("seed", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}; expected {least} or more", param=name)
    TrainRules(config.train)
    _read_efforts(config.effort)
    _read_dates(config.current_date)


def _read_efforts(text: str) -> list[tuple[float, Effort]]:
    """Efforts with the upper bounds of their shares of [0, 1)."""
    efforts, shares = [], []
    for part in text.split(","):
        name, has_share, share = part.strip().partition("=")
        try:
            efforts.append(Effort(name))
            shares.append(float(share) if has_share else 1.0)
            is_usable = 0 <= shares[-1] < np.inf
        except ValueError:
            is_usable = False
        if not is_usable:
            raise ConfigError(
                f"effort is {text!r}; expected one of {', '.join(Effort)}, or shares such as low=1,medium=2,high=1",
                param="effort",
            )
    if not sum(shares):
        raise ConfigError(f"effort is {text!r}, whose shares are all 0; expected one that is not", param="effort")
    bounds = list(accumulate(share / sum(shares) for share in shares))
    bounds[-1] = 1.0
    found = [(bound, effort) for bound, effort, share in zip(bounds, efforts, shares, strict=True) if share]
    return [*found[:-1], (1.0, found[-1][1])]


def _read_dates(text: str) -> tuple[datetime.date, int] | None:
    """The first date and the number of days; None for no date."""
    if not text:
        return None
    first, is_range, last = text.partition("..")
    try:
        begin = datetime.date.fromisoformat(checked_date(first, "current_date"))
        end = datetime.date.fromisoformat(checked_date(last, "current_date")) if is_range else begin
    except InputError as error:
        raise ConfigError(f"{error.message}, or two of them with .. between", param="current_date") from None
    if end < begin:
        raise ConfigError(f"current_date is {text!r}, which ends before it begins", param="current_date")
    return begin, (end - begin).days + 1


def _unit(data: bytes, purpose: bytes, seed: bytes = b"") -> float:
    """A number of [0, 1) that a row has for ever, another one for each purpose."""
    digest = hashlib.blake2b(data, digest_size=8, person=purpose, salt=seed).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
