"""How an engine is set up: its memory and the size of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from ossia.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine; ConfigError names a field that cannot be."""

    # Bytes that the keys and values of all layers may take together; never exceeded.
    kv_memory_bytes: int = 1 << 30
    # Tokens whose keys and values share one block of memory.
    block_size: int = 32
    # Tokens of prompts and running sequences together that one step may compute.
    max_batch_tokens: int = 512
    # Sequences that may be under way in one step; others wait.
    max_num_seqs: int = 64
    # Tokens of prompt and answer together that a request may have; None: what the model was made for.
    max_context: int | None = None
    # Bytes that all adapters may take together; one that would not fit is refused.
    adapter_memory_bytes: int = 2 << 30
    # Tokens that a step may compute ahead for all sequences together, where what comes next seems to stand earlier in
    # them (`ossia.engine.drafts`); 0: none. What is sampled is the same.
    draft_tokens: int = 15
    # Whether the experts that each token goes to are kept beside its keys and values, for requests that ask for them.
    record_routing: bool = False

    def __post_init__(self) -> None:
        for name in ("kv_memory_bytes", "block_size", "max_batch_tokens", "max_num_seqs", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1", param=name)
        for name in ("adapter_memory_bytes", "draft_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0", param=name)
