"""Which blocks a sequence gets, keeps, finds again and gives back."""

from __future__ import annotations

import pytest

from ossia.engine.block_manager import BlockManager, SequenceBlocks, blocks_in_window

SIZE = 4
WINDOW = 8


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_full_blocks=20, num_window_blocks=12, block_size=SIZE, window=WINDOW)


def compute(manager: BlockManager, tokens: list[int], chunk: int = 1000) -> SequenceBlocks:
    """A sequence whose tokens have all been computed, in chunks, beginning with what could be found."""
    blocks = SequenceBlocks()
    manager.acquire(blocks, manager.match(blocks, tokens), len(tokens))
    while blocks.num_tokens < len(tokens):
        num_tokens = min(chunk, len(tokens) - blocks.num_tokens)
        manager.reserve(blocks, num_tokens)
        manager.commit(blocks, tokens, num_tokens)
    return blocks


def num_found(manager: BlockManager, tokens: list[int]) -> int:
    return manager.match(SequenceBlocks(), tokens).num_tokens


def test_a_prefix_is_found_up_to_the_first_different_token(manager):
    tokens = list(range(16))
    manager.release(compute(manager, tokens), tokens)
    assert num_found(manager, [*range(12), 99, 98, 97, 96, 95]) == 12
    assert num_found(manager, [*range(11), 99, 98, 97, 96, 95]) == 8
    assert num_found(manager, [99, *range(1, 16)]) == 0


def test_one_token_is_always_left_to_compute(manager):
    tokens = list(range(16))
    manager.release(compute(manager, tokens), tokens)
    assert num_found(manager, tokens) == 12
    assert num_found(manager, [*tokens, 99]) == 16


def test_the_same_tokens_in_another_place_are_not_found(manager):
    tokens = [1, 2, 3, 4, 1, 2, 3, 4, 5]
    manager.release(compute(manager, tokens), tokens)
    assert num_found(manager, [5, 5, 5, 5, 1, 2, 3, 4, 5]) == 0


def test_a_part_full_block_is_taken_over_by_the_next_turn(manager):
    tokens = list(range(10))
    manager.release(compute(manager, tokens), tokens)
    turn = [*tokens, 50, 51, 52]
    blocks = SequenceBlocks()
    hit = manager.match(blocks, turn)
    assert hit.num_tokens == 10
    manager.acquire(blocks, hit, len(turn))
    # It writes there now: no one else may find it.
    assert num_found(manager, turn) == 8
    manager.reserve(blocks, 3)
    manager.commit(blocks, turn, 3)
    assert num_found(manager, [*turn, 99]) == 12


def test_a_part_full_block_is_used_as_far_as_its_tokens_agree(manager):
    tokens = list(range(10))
    manager.release(compute(manager, tokens), tokens)
    assert num_found(manager, [*range(9), 77, 78]) == 9
    assert num_found(manager, [*range(8), 77, 78]) == 8


def test_of_two_part_full_blocks_with_one_prefix_the_later_is_found(manager):
    for last in (50, 60):
        tokens = [*range(8), last, last + 1]
        manager.release(compute(manager, tokens), tokens)
    assert num_found(manager, [*range(8), 60, 61, 99]) == 10
    assert num_found(manager, [*range(8), 50, 51, 99]) == 8
    assert manager.full_pool.num_free == 20


def test_shared_blocks_are_held_until_the_last_user_leaves(manager):
    tokens = list(range(9))
    first = compute(manager, tokens)
    second = compute(manager, tokens)
    assert first.full.blocks[:2].tolist() == second.full.blocks[:2].tolist()
    assert manager.full_pool.num_free == 20 - 4
    manager.release(first, tokens)
    assert manager.full_pool.num_free == 20 - 3
    manager.release(second, tokens)
    assert manager.full_pool.num_free == 20


def test_two_that_compute_the_same_block_at_once_keep_one_copy(manager):
    tokens = list(range(9))
    both = [SequenceBlocks(), SequenceBlocks()]
    for blocks in both:
        manager.reserve(blocks, 9)
    assert manager.full_pool.num_free == 20 - 6
    for blocks in both:
        manager.commit(blocks, tokens, 9)
    assert manager.full_pool.num_free == 20 - 4
    assert both[0].window.blocks[1] == both[1].window.blocks[1]


def test_the_block_given_back_longest_ago_is_reused_first(manager):
    old, new = list(range(100, 109)), list(range(200, 209))
    manager.release(compute(manager, old), old)
    manager.release(compute(manager, new), new)
    # 14 full blocks hold nothing; two more are taken from what was given back, the end of it first.
    compute(manager, list(range(300, 364)), chunk=8)
    assert num_found(manager, [*old, 1]) == 4
    assert num_found(manager, [*new, 1]) == 9


def test_a_long_prompt_does_not_push_out_the_windows_of_others():
    manager = BlockManager(num_full_blocks=400, num_window_blocks=16, block_size=SIZE, window=WINDOW)
    short = [list(range(start, start + 16)) for start in (1000, 2000, 3000)]
    for tokens in short:
        manager.release(compute(manager, tokens), tokens)
    long = list(range(800))
    manager.release(compute(manager, long, chunk=4), long)
    assert [num_found(manager, [*tokens, 1]) for tokens in [*short, long]] == [16, 16, 16, 800]


def test_the_end_of_a_prompt_can_be_found_after_a_long_answer():
    manager = BlockManager(num_full_blocks=400, num_window_blocks=10, block_size=SIZE, window=WINDOW)
    prompt, answer = list(range(42)), list(range(1000, 1100))
    blocks = SequenceBlocks()
    manager.acquire(blocks, manager.match(blocks, prompt), len(prompt))
    for _ in prompt + answer:
        manager.reserve(blocks, 1)
        manager.commit(blocks, prompt + answer, 1)
    manager.release(blocks, prompt + answer)
    assert num_found(manager, [*prompt, 7, 8, 9]) == 40
    assert num_found(manager, [*prompt, *answer, 7]) == 142


def test_where_prompts_part_is_kept_from_the_second_one_on():
    manager = BlockManager(num_full_blocks=400, num_window_blocks=12, block_size=SIZE, window=WINDOW)
    common = list(range(40))
    found = []
    for user in range(4):
        tokens = [*common, *range(1000 * user + 1000, 1000 * user + 1040)]
        found.append(num_found(manager, tokens))
        manager.release(compute(manager, tokens, chunk=8), tokens)
    assert found[0] == 0 and found[1] < 40
    assert found[2:] == [40, 40]


def test_a_window_layer_holds_only_its_window(manager):
    tokens = list(range(70))
    blocks = SequenceBlocks()
    for _ in tokens:
        manager.reserve(blocks, 1)
        held = blocks.window.end - blocks.window.start
        assert held <= blocks_in_window(WINDOW, SIZE) == 3
        assert (blocks.window.blocks[: blocks.window.start] == -1).all()
        manager.commit(blocks, tokens, 1)
    assert blocks.full.end == 18


def test_a_prefix_whose_window_is_gone_is_used_only_up_to_where_one_is_left(manager):
    tokens = list(range(40))
    manager.release(compute(manager, tokens, chunk=4), tokens)
    assert num_found(manager, [*tokens, 99]) == 40
    assert num_found(manager, [*tokens[:20], 99]) == 20
    # Block 8 of the window pool is lost: prefixes of 9 and 10 blocks need it, one of 8 does not.
    pool = manager.window_pool
    lost = pool.find(manager.keys(SequenceBlocks(), tokens, 10)[8])
    pool.take_over(lost)
    assert num_found(manager, [*tokens, 99]) == 32


def test_a_block_given_back_unfilled_cannot_be_found(manager):
    tokens = list(range(12))
    blocks = SequenceBlocks()
    manager.reserve(blocks, 12)
    manager.release(blocks, tokens)
    assert num_found(manager, tokens) == 0
    assert manager.full_pool.num_findable == manager.window_pool.num_findable == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 32])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 31, 32, 33, 128])
def test_blocks_in_window_is_the_most_that_a_window_can_touch(window, size):
    touched = max((last // size) - ((last - window + 1) // size) + 1 for last in range(window, window + 3 * size))
    assert blocks_in_window(window, size) == touched
