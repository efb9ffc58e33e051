"""The shape of a gpt-oss model and the frequencies of its rotary position embedding.

Sources: the published config.json files; YaRN, arXiv:2309.00071, sections 3.2 and 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding with YaRN; ``factor`` 1 is plain RoPE."""

    theta: float = 150_000.0
    factor: float = 32.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # Round the ends of the correction range to whole dimensions; the published models do not.
    truncate: bool = False

    @property
    def concentration(self) -> float:
        """What cos and sin are multiplied by: the square root of YaRN's attention temperature."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @lru_cache(maxsize=8)  # noqa: B019 - a frozen value, and few of them
    def inv_freq(self, head_dim: int) -> npt.NDArray[np.float32]:
        """Radians per position of each rotated pair, float32 [head_dim / 2].

        Fast pairs (more than beta_fast turns over the original context) keep their frequency, slow ones (fewer than
        beta_slow turns) are slowed down by the factor, those between are blended linearly.
        """
        pairs_P = np.arange(head_dim // 2, dtype=np.float64)
        fast_P = self.theta ** (-2 * pairs_P / head_dim)
        if self.factor <= 1:
            return fast_P.astype(np.float32)

        def pair_with_turns(turns: float) -> float:
            # Solves original_context * theta^(-2 p / head_dim) = 2 pi turns for p.
            ratio = self.original_context / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = pair_with_turns(self.beta_fast), pair_with_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # Equal ends would divide by zero; the smallest step keeps the ramp a step.
        slowed_P = np.clip((pairs_P - low) / max(high - low, 1e-3), 0, 1)
        return (fast_P * (1 - slowed_P) + fast_P / self.factor * slowed_P).astype(np.float32)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about a model that its weights do not say. The defaults are gpt-oss-20b's."""

    num_layers: int = 24
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 64
    vocab_size: int = 201_088
    num_experts: int = 32
    num_active_experts: int = 4
    sliding_window: int = 128
    # One of FULL_ATTENTION, SLIDING_ATTENTION per layer; empty means alternating, sliding first.
    layer_types: tuple[str, ...] = ()
    max_context: int = 131_072
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    rope: RopeConfig = RopeConfig()
    # Tokens that end a generation (return, call, endoftext in the published models), and the padding token.
    stop_token_ids: tuple[int, ...] = (200_002, 199_999, 200_012)
    pad_token_id: int | None = 199_999

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, None for full attention."""
        if self.layer_types:
            return self.sliding_window if self.layer_types[layer] == SLIDING_ATTENTION else None
        return self.sliding_window if layer % 2 == 0 else None
