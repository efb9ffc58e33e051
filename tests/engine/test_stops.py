"""Where an answer ends, by tokens and by text."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from ossia.engine.stops import StopMatcher
from ossia.errors import InputError


def feed(pieces: list[bytes], stops: list[str]):
    """Tokens 0, 1, 2, ... that stand for these pieces of text; the first stop, its place, and what was held before."""
    matcher = StopMatcher((), (), stops, pieces.__getitem__)
    held = []
    for i in range(len(pieces)):
        stop = matcher.feed(i)
        if stop is not None:
            return stop, held
        held.append(matcher.held_bytes)
    return None, held


def cuts(text: bytes, rng: random.Random) -> list[bytes]:
    ends = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, len(text))))
    return [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]


def test_a_stop_string_is_found_across_tokens_and_cut_exactly():
    stop, held = feed([b"Hello wo", b"rld\nOb", b"serv", b"ation: x"], ["\nObservation:"])
    assert stop == ("\nObservation:", 1, 11)
    assert held == [0, 3, 7]


def test_what_was_held_back_is_let_go_when_the_text_goes_on_otherwise():
    assert feed([b"a<", b"/", b"b"], ["</s>"]) == (None, [1, 2, 0])


def test_where_tokens_are_cut_makes_no_difference():
    rng = random.Random(0)
    for _ in range(500):
        text = bytes(rng.choices(b"ab", k=20))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        by_bytes, _ = feed([text[i : i + 1] for i in range(20)], stops)
        ends = [(text.find(s.encode()) + len(s), text.find(s.encode()), s) for s in stops if s.encode() in text]
        assert (by_bytes is None) == (not ends)
        pieces = cuts(text, rng)
        stop, held = feed(pieces, stops)
        if by_bytes is None:
            assert stop is None
            continue
        assert (stop.match, stop.num_bytes) == (by_bytes.match, by_bytes.num_bytes) == (min(ends)[2], min(ends)[1])
        assert sum(map(len, pieces[: stop.num_tokens])) <= stop.num_bytes
        assert stop.num_tokens == len(pieces) or sum(map(len, pieces[: stop.num_tokens + 1])) > stop.num_bytes
        # Nothing that belongs to the stop was shown before.
        shown = [sum(map(len, pieces[: i + 1])) - one for i, one in enumerate(held)]
        assert all(one <= stop.num_bytes for one in shown)


def test_a_split_character_is_matched_by_its_bytes():
    euro = "€".encode()
    stop, held = feed([b"5" + euro[:1], euro[1:2], euro[2:]], ["€"])
    assert stop == ("€", 0, 1)
    assert held == [1, 2]


def test_a_stop_token_counts_before_the_text_that_it_completes():
    matcher = StopMatcher([7], (), ["ab"], lambda token_id: b"b" if token_id == 7 else b"a")
    assert matcher.feed(1) is None
    assert matcher.feed(7) == ((7,), 1, 1)


def test_a_run_of_tokens_ends_an_answer_and_the_longest_counts():
    matcher = StopMatcher((), ((2, 3), (1, 2, 3)), (), None)
    assert [matcher.feed(token_id) for token_id in (5, 1, 2)] == [None, None, None]
    assert matcher.feed(3) == ((1, 2, 3), 1, None)


def test_stop_strings_need_the_bytes_of_tokens():
    with pytest.raises(InputError, match="token_bytes"):
        StopMatcher((), (), ["x"], None)


def test_a_long_stop_string_takes_no_longer_than_a_short_one():
    matcher = StopMatcher((), (), ["a" * 100_000 + "b"], lambda token_id: b"abc ")
    began_s = time.process_time()
    assert not any(matcher.feed(0) for _ in range(10_000))
    # Each token had been compared with all of the answer so far: a minute.
    assert time.process_time() - began_s < 5
