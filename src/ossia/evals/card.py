"""What the model card reports (arXiv:2508.10925, tables 2 and 3), and what others have measured of the same weights.

Accuracies in percent at low, medium and high effort. Reproductions lie a few points apart from the card and from each
other, for AIME 2025 of the 20b at high effort six to eight below it: a score is to be compared with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

EFFORTS = ("low", "medium", "high")


class Reported(NamedTuple):
    """Scores at low, medium and high effort; None where nothing was reported.

    By the card, by vLLM's recipes for gpt-oss, and by PyTorch's tests on eight H100s.
    """

    by: str
    scores: tuple[float | None, float | None, float | None]


# By benchmark, with or without the python tool, and the size of the model.
REPORTED: Mapping[tuple[str, bool, str], tuple[Reported, ...]] = {
    ("aime24", False, "20b"): (Reported("card", (42.1, 80.0, 92.1)),),
    ("aime24", True, "20b"): (Reported("card", (61.2, 86.0, 96.0)),),
    ("aime25", False, "20b"): (
        Reported("card", (37.1, 72.1, 91.7)),
        Reported("vLLM", (38.8, 75.0, 85.8)),
        Reported("PyTorch", (34.2, 73.7, 84.2)),
    ),
    ("aime25", True, "20b"): (Reported("card", (57.5, 90.4, 98.7)),),
    ("gpqa", False, "20b"): (
        Reported("card", (56.8, 66.0, 71.5)),
        Reported("vLLM", (56.8, 67.5, 70.9)),
        Reported("PyTorch", (58.0, 67.0, 73.5)),
    ),
    ("gpqa", True, "20b"): (Reported("card", (58.0, 67.1, 74.2)),),
    ("mmlu", False, "20b"): (Reported("card", (80.4, 84.0, 85.3)),),
    ("mmmlu", False, "20b"): (Reported("card", (67.0, 73.5, 75.7)),),
    ("hle", False, "20b"): (Reported("card", (4.2, 7.0, 10.9)),),
    ("hle", True, "20b"): (Reported("card", (6.3, 8.8, 17.3)),),
    ("healthbench", False, "20b"): (Reported("card", (40.4, 41.8, 42.5)),),
    ("healthbench-hard", False, "20b"): (Reported("card", (9.0, 12.9, 10.8)),),
    ("healthbench-consensus", False, "20b"): (Reported("card", (84.9, 83.0, 82.6)),),
    ("aime24", False, "120b"): (Reported("card", (56.3, 80.4, 95.8)),),
    ("aime24", True, "120b"): (Reported("card", (75.4, 87.9, 96.6)),),
    ("aime25", False, "120b"): (
        Reported("card", (50.4, 80.0, 92.5)),
        Reported("vLLM", (51.2, 79.6, 93.0)),
    ),
    ("aime25", True, "120b"): (Reported("card", (72.9, 91.6, 97.9)),),
    ("gpqa", False, "120b"): (
        Reported("card", (67.1, 73.1, 80.1)),
        Reported("vLLM", (65.3, 72.4, 79.4)),
        Reported("PyTorch", (65.4, None, None)),
    ),
    ("gpqa", True, "120b"): (Reported("card", (68.1, 73.5, 80.9)),),
    ("mmlu", False, "120b"): (Reported("card", (85.9, 88.0, 90.0)),),
    ("mmmlu", False, "120b"): (Reported("card", (74.1, 79.3, 81.3)),),
    ("hle", False, "120b"): (Reported("card", (5.2, 8.6, 14.9)),),
    ("hle", True, "120b"): (Reported("card", (9.1, 11.3, 19.0)),),
    ("healthbench", False, "120b"): (Reported("card", (53.0, 55.9, 57.6)),),
    ("healthbench-hard", False, "120b"): (Reported("card", (22.8, 26.9, 30.0)),),
    ("healthbench-consensus", False, "120b"): (Reported("card", (90.6, 90.8, 89.9)),),
}


def size_of(model: str) -> str | None:
    """ "20b" or "120b" for a name of one of the published models; None for another's."""
    return next((size for size in ("120b", "20b") if f"gpt-oss-{size}" in model or f"gpt-oss:{size}" in model), None)
