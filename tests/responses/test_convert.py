"""What is remembered of turns that wait for a tool's answer."""

from __future__ import annotations

import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

from ossia.harmony import Channel, Message, Role
from ossia.responses.convert import Spoken, TurnMemory


def turn(number: int, num_tokens: int = 30) -> tuple[Spoken, ...]:
    thought = Message(Role.ASSISTANT, f"Thought {number}. " + "é" * num_tokens, channel=Channel.ANALYSIS)
    call = Message(Role.ASSISTANT, "{}", channel=Channel.COMMENTARY, recipient="functions.f", content_type="json")
    return Spoken(thought, tuple(range(1_000, 1_000 + num_tokens))), Spoken(call, (200_003, 12_606, 200_012))


def test_a_turn_is_recalled_as_it_was_sampled():
    memory = TurnMemory()
    memory.keep("a", turn(1))
    assert memory.recall("a") == turn(1) and memory.recall("b") == ()


def test_the_latest_turns_stay_within_the_memory_that_is_given():
    memory = TurnMemory(max_bytes=1 << 20)
    tracemalloc.start()
    try:
        for number in range(4_000):
            memory.keep(f"call_{number}", turn(number, number % 200))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert memory.recall("call_0") == () and memory.recall("call_3999") == turn(3_999, 199)
    # Near the bound: neither more than was given, nor a pittance of it.
    assert 0.5 * (1 << 20) < held < 1.15 * (1 << 20)


def test_short_turns_are_bounded_as_long_ones_are():
    memory = TurnMemory(max_bytes=1 << 20)
    for number in range(4_000):
        memory.keep(f"call_{number}", turn(number, 0))
    assert 100 < len(memory) < 1_000


def test_a_call_id_that_comes_again_takes_its_own_place():
    memory = TurnMemory(max_bytes=40_000)
    memory.keep("other", turn(0))
    for number in range(1_000):
        memory.keep("same", turn(number))
    assert memory.recall("same") == turn(999) and memory.recall("other") == turn(0)


def test_a_turn_larger_than_all_the_memory_is_let_go():
    memory = TurnMemory(max_bytes=1_000)
    memory.keep("large", turn(0, 10_000))
    assert memory.recall("large") == () and len(memory) == 0


def test_a_turn_that_was_used_outlives_one_that_was_not():
    memory = TurnMemory(max_bytes=10_000)
    memory.keep("a", turn(0)), memory.keep("b", turn(0))
    memory.recall("a")
    for number in range(20):
        memory.keep(f"more_{number}", turn(number))
        memory.recall("a")
    assert memory.recall("a") == turn(0) and memory.recall("b") == ()


def test_turns_are_kept_and_recalled_in_many_threads():
    memory, one = TurnMemory(max_bytes=3_000), turn(0, 0)

    def use(number: int) -> None:
        for i in range(10_000):
            if number % 2:
                memory.keep(f"call_{i % 3}", one)
            else:
                memory.recall(f"call_{i % 3}")

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(use, range(4)))
    finally:
        sys.setswitchinterval(interval_s)
    assert len(memory) == 1
