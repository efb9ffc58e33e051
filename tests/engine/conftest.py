"""A tiny model with random weights, a runner without a model, and what tests of the engine do again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ossia.engine import Engine, EngineConfig, Runner, SamplingParams, TokenOutput
from ossia.engine.runner import NumBlocks
from ossia.model.adapted import HeldAdapter
from ossia.model.adapter import Adapter
from ossia.model.config import ModelConfig, RopeConfig
from ossia.model.transformer import Layer, Weights
from ossia.ops import Batch, ExpertArrays, Ops, load

TINY = ModelConfig(
    num_layers=3,
    hidden_size=32,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=97,
    num_experts=4,
    num_active_experts=2,
    sliding_window=8,
    max_context=256,
    rope=RopeConfig(original_context=64, factor=4.0),
    stop_token_ids=(1,),
)


class FakeRunner(Runner):
    """Its memory holds token ids where others hold keys and values; its logits are a hash of what it finds there.

    A block that is lost, mixed up or overwritten too early changes the answer or fails an assertion.
    """

    takes_drafts = True

    def __init__(self, num_blocks: NumBlocks, options: EngineConfig, window: int | None = 8, vocab_size: int = 64):
        layer_types = () if window else ("full_attention",) * 2
        self.config = ModelConfig(
            num_layers=2,
            vocab_size=vocab_size,
            sliding_window=window or 8,
            layer_types=layer_types,
            max_context=512,
            stop_token_ids=(1,),
        )
        self.options, self.num_blocks, self.window = options, num_blocks, window
        self.full_BS = np.full((num_blocks.full, options.block_size), -1, np.int32)
        self.window_BS = np.full((num_blocks.window, options.block_size), -1, np.int32)
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> np.ndarray:
        self.batches.append(batch)
        # What a token leaves in memory depends on the adapter that it went through.
        offsets = [0 if one is None else one.size_bytes for one in batch.adapters or [None] * len(batch.key_lengths_N)]
        rows, written = [], set()
        for n, length in enumerate(batch.key_lengths_N):
            own = slice(batch.query_starts_N1[n], batch.query_starts_N1[n + 1])
            positions = batch.positions_T[own]
            first = max(0, positions[0] - (self.window or 10**6) + 1)
            full, full_slots = self._place(batch.full_table_NB[n], np.arange(length))
            window, window_slots = self._place(batch.window_table_NB[n], np.arange(first, length))
            for name, slots in (("full", full_slots), ("window", window_slots)):
                new = {(name, *slot) for slot in slots[len(slots) - len(positions) :].tolist()}
                assert not new & written, "two sequences write to one slot"
                written |= new
            own_full, own_window = slice(positions[0], None), slice(positions[0] - first, None)
            self.full_BS[full[own_full], full_slots[own_full, 1]] = batch.token_ids_T[own] + offsets[n]
            self.window_BS[window[own_window], window_slots[own_window, 1]] = batch.token_ids_T[own] + offsets[n]
            tokens = self.full_BS[full, full_slots[:, 1]]
            assert (tokens[first:] == self.window_BS[window, window_slots[:, 1]]).all()
            assert (tokens // 1000 == offsets[n] // 1000).all(), "a key was computed through another adapter"
            for row in batch.logit_rows_R:
                if batch.query_starts_N1[n] <= row < batch.query_starts_N1[n + 1]:
                    seen = tokens[: batch.positions_T[row] + 1]
                    digest = hashlib.shake_128(seen.tobytes()).digest(2 * self.config.vocab_size)
                    rows.append(np.frombuffer(digest, np.uint16).astype(np.float32) / 8192)
        return np.array(rows, np.float32).reshape(len(rows), self.config.vocab_size)

    def hold(self, adapter: Adapter) -> HeldAdapter:
        # A size of whole thousands tells the adapters of these tests apart.
        return HeldAdapter(adapter.name, {}, size_bytes=1000 * adapter.rank, cache_key=adapter.name.encode())

    def close(self) -> None:
        pass

    def _place(self, table_B: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = self.options.block_size
        blocks = table_B[positions // size]
        assert (blocks >= 0).all(), "a key that is needed has no block"
        return blocks, np.stack([blocks, positions % size], axis=1)


@pytest.fixture(scope="session")
def fake() -> Callable[..., Engine]:
    """An engine over a `FakeRunner`: fake(full=…, window_blocks=…, window=…, **settings of EngineConfig)."""

    def make(full: int = 64, window_blocks: int = 64, window: int | None = 8, **settings: int) -> Engine:
        options = EngineConfig(**({"block_size": 4, "max_batch_tokens": 32, "max_num_seqs": 8} | settings))
        runner = FakeRunner(NumBlocks(full, window_blocks), options, window)
        return Engine(runner, token_bytes=lambda token_id: bytes([97 + token_id % 26]) * (1 + token_id % 3))

    return make


@pytest.fixture(scope="session", params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    # In float64 the last bits, which depend on the shape of a BLAS call, do not reach the sampled tokens.
    return load("reference", dtype=np.float64) if request.param == "reference" else load(request.param)


@pytest.fixture(scope="session")
def tiny(ops: Ops) -> Callable[..., Engine]:
    """An engine over a tiny model with random weights: tiny(**settings of EngineConfig)."""
    weights = tiny_weights(ops, TINY)

    def make(**settings: int) -> Engine:
        defaults = {"block_size": 4, "max_batch_tokens": 32, "max_num_seqs": 8, "kv_memory_bytes": 1 << 20}
        return Engine(Runner(ops, TINY, weights, EngineConfig(**(defaults | settings))))

    return make


@pytest.fixture(scope="session")
def tiny_runner() -> Callable[..., Runner]:
    """A runner of the tiny model over any backend: tiny_runner(ops, **settings of EngineConfig)."""
    return lambda ops, **settings: Runner(ops, TINY, tiny_weights(ops, TINY), EngineConfig(**settings))


def tiny_weights(ops: Ops, config: ModelConfig) -> Weights:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    experts, inner, vocab = config.num_experts, config.intermediate_size, config.vocab_size

    def linear(rows: int, columns: int) -> object:
        return ops.linear_weights(normal(rows, columns), normal(rows))

    def layer() -> Layer:
        return Layer(
            attention_norm_D=ops.vector(1 + normal(width)),
            q=linear(heads * config.head_dim, width),
            k=linear(kv_heads * config.head_dim, width),
            v=linear(kv_heads * config.head_dim, width),
            o=linear(width, heads * config.head_dim),
            sinks_Q=ops.vector(normal(heads)),
            moe_norm_D=ops.vector(1 + normal(width)),
            router=linear(experts, width),
            experts=ops.experts(
                ExpertArrays(
                    normal(experts, inner, width),
                    normal(experts, inner, width),
                    normal(experts, width, inner),
                    normal(experts, inner),
                    normal(experts, inner),
                    normal(experts, width),
                )
            ),
        )

    return Weights(
        embedding=ops.embedding(rng.standard_normal((vocab, width)).astype(np.float32)),
        layers=tuple(layer() for _ in range(config.num_layers)),
        final_norm_D=ops.vector(1 + normal(width)),
        unembedding=ops.linear_weights(3 * normal(vocab, width)),
    )


Request = tuple[Sequence[int], SamplingParams]


@pytest.fixture(scope="session")
def finish() -> Callable[[Engine], dict[int, list[TokenOutput]]]:
    """Step until nothing is left; the outputs of each request."""

    def run(engine: Engine) -> dict[int, list[TokenOutput]]:
        outputs: dict[int, list[TokenOutput]] = {}
        while engine.has_work:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        return outputs

    return run


@pytest.fixture(scope="session")
def answer(finish) -> Callable[..., list[list[int]]]:
    """The tokens of each request, all queued at once."""

    def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
        ids = [engine.add_request(*request) for request in requests]
        outputs = finish(engine)
        return [[output.token_id for output in outputs[i]] for i in ids]

    return run


@pytest.fixture(scope="session")
def assert_all_free() -> Callable[[Engine], None]:
    def check(engine: Engine) -> None:
        stats = engine.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_full_blocks == stats.num_full_blocks
        assert stats.num_free_window_blocks == stats.num_window_blocks

    return check
