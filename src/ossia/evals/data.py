"""The questions of a benchmark: from a file, or downloaded once from where they are published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx

from ossia.config import data_folder
from ossia.errors import InputError, UnavailableError
from ossia.evals.asking import Question
from ossia.evals.benchmarks import Benchmark


def read_questions(benchmark: Benchmark, files: Sequence[Path] = (), *, folder: Path | None = None) -> list[Question]:
    """All questions of a benchmark, of ``files`` if any are given; else of its downloads in ``folder``.

    Raises InputError for a file of something else, UnavailableError when it cannot be downloaded.
    """
    if benchmark.made is not None and not files:
        found = benchmark.made()
    elif files:
        found = benchmark.questions([path.read_bytes() for path in files])
    elif not benchmark.urls:
        raise InputError(
            f"the questions of {benchmark.title} are given only to those who agree to their terms; get them from "
            "https://huggingface.co/datasets/cais/hle and give their file with --data (docs/evaluation.md says how)"
        )
    else:
        folder = folder or data_folder() / "evals"
        places = [folder / f"{benchmark.name}-{i}" for i in range(1, len(benchmark.urls) + 1)]
        found = benchmark.questions([_downloaded(*one) for one in zip(benchmark.urls, places, strict=True)])
    if not found:
        raise InputError(f"there is no question of {benchmark.title} here; expected {benchmark.num_questions:,}")
    # A question may stand there twice, and is then asked twice.
    times: Counter[str] = Counter()
    numbered = []
    for one in found:
        times[one.key] += 1
        numbered.append(one if times[one.key] == 1 else one._replace(key=f"{one.key}-{times[one.key]}"))
    return numbered


def _downloaded(url: str, path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    try:
        answer = httpx.get(url, follow_redirects=True, timeout=60).raise_for_status()
    except httpx.HTTPError as error:
        met = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
        raise UnavailableError(f"{url} cannot be downloaded ({met}); give the file with --data") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(answer.content)
    partial.rename(path)
    return answer.content
