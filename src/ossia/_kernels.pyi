"""The compiled kernels; see csrc/bindings.cc. Arrays are C-contiguous, results written in place."""

from collections.abc import Sequence
from typing import Any

def best_isa() -> str: ...
def has_isa(isa: str) -> bool: ...

class Matrix:
    rows: int
    cols: int
    def __init__(
        self,
        format: int,
        rows: int,
        cols: int,
        data: int,
        scales: int = 0,
        stack_stride: int = 0,
        row_stride: int = 0,
        block_stride: int = 0,
        scale_stack_stride: int = 0,
        scale_row_stride: int = 0,
        scale_block_stride: int = 0,
    ) -> None: ...

class Experts:
    def __init__(
        self, num_experts: int, gate: Matrix, up: Matrix, down: Matrix, gate_bias: int, up_bias: int, down_bias: int
    ) -> None: ...

class Lora:
    def __init__(self, a: Matrix, rows: int, b: int, b_stack_stride: int, scale: float) -> None: ...

class ExpertLora:
    def __init__(self, gate: Lora | None, up: Lora | None, down: Lora | None) -> None: ...

class Cache:
    def __init__(
        self,
        format: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        keys: int,
        values: int,
        key_scales: int = 0,
        value_scales: int = 0,
    ) -> None: ...

class Context:
    isa: str
    tile_rows: int
    num_threads: int
    def __init__(self, isa: str, num_threads: int) -> None: ...
    def embed(self, table: Matrix, ids_T: Any, out_TD: Any) -> None: ...
    def rms_norm(self, x_TD: Any, scale_D: Any, eps: float, out_TD: Any) -> None: ...
    def rope(self, x_TQH: Any, cos_TP: Any, sin_TP: Any, out_TQH: Any) -> None: ...
    def rope_angles(
        self, positions_T: Any, inv_freq_P: Any, concentration: float, cos_TP: Any, sin_TP: Any
    ) -> None: ...
    def linear(
        self,
        x_TI: Any,
        weight: Matrix,
        bias_O: Any,
        out_TO: Any,
        loras: Sequence[Lora | None] | None = None,
        lora_T: Any = None,
    ) -> None: ...
    def route(self, logits_TE: Any, experts_TA: Any, weights_TA: Any) -> None: ...
    def moe(
        self,
        x_TD: Any,
        experts_TA: Any,
        weights_TA: Any,
        experts: Experts,
        limit: float,
        out_TD: Any,
        loras: Sequence[ExpertLora | None] | None = None,
        lora_T: Any = None,
    ) -> None: ...
    def attention(
        self,
        q_TQH: Any,
        k_TKH: Any,
        v_TKH: Any,
        sinks_Q: Any,
        cache: Cache | None,
        positions_T: Any,
        query_starts_N1: Any,
        key_lengths_N: Any,
        table_NB: Any,
        window: int,
        out_TQH: Any,
    ) -> None: ...
    def pack_q8(self, source: Matrix, first_row: int, data: Any, scales: Any) -> None: ...
    def dequantize(self, stack: Matrix, index: int, out_OI: Any) -> None: ...
    def rms_norm_backward(self, x_TD: Any, scale_D: Any, eps: float, g_TD: Any, dx_TD: Any, dscale_D: Any) -> None: ...
    def swiglu(self, gate_up_NF: Any, limit: float, inner_NF: Any) -> None: ...
    def swiglu_backward(
        self, gate_up_NF: Any, dinner_NF: Any, weights_N: Any, limit: float, dpre_NF: Any, dots_N: Any
    ) -> None: ...
    def take_rows(self, source_TD: Any, indices_N: Any, weights_N: Any, out_MD: Any) -> None: ...
    def add_rows(self, rows_MD: Any, indices_N: Any, weights_N: Any, out_TD: Any) -> None: ...
    def round_mxfp4(self, x_N: Any, out_N: Any) -> None: ...
    def training_attention(
        self,
        q_TQH: Any,
        k_TKH: Any,
        v_TKH: Any,
        sinks_Q: Any,
        starts_N1: Any,
        window: int,
        out_TQH: Any,
        lse_TQ: Any,
        g_TQH: Any = None,
        dq_TQH: Any = None,
        dk_TKH: Any = None,
        dv_TKH: Any = None,
        dots_TQ: Any = None,
    ) -> None: ...
    def read_bandwidth(self, num_bytes: int, num_rounds: int) -> float: ...
    def integer_peak(self, num_rounds: int) -> float: ...
