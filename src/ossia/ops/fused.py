"""What training computes between matrix products, in one pass of a C++ kernel each: on CPUs, in float32 and bfloat16.

`ossia.ops.autograd` has the same operations in torch, for other devices and for float64. Shapes: see `ossia.ops`; S are
rows that belong to one expert, g is the gradient of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ossia import _kernels


class Fused:
    """The kernels over tensors in memory; gradients are the caller's."""

    def __init__(self, kernels: _kernels.Context) -> None:
        self._kernels = kernels

    def rms_norm(self, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        out_TD = _empty(x_TD)
        self._kernels.rms_norm(_array(x_TD), _array(_copy(scale_D)), eps, _array(out_TD))
        return out_TD

    def rms_norm_backward(self, g_TD: Tensor, x_TD: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(dx_TD, dscale_D)."""
        dx_TD, dscale_D = _empty(x_TD), _empty(scale_D)
        arrays = (_array(tensor) for tensor in (g_TD, dx_TD, dscale_D))
        self._kernels.rms_norm_backward(_array(x_TD), _array(_copy(scale_D)), eps, *arrays)
        return dx_TD, dscale_D

    def rope(self, x_TQH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        out_TQH = _empty(x_TQH)
        self._kernels.rope(_array(x_TQH), _array(cos_TP), _array(sin_TP), _array(out_TQH))
        return out_TQH

    def attention(
        self, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, sinks_Q: Tensor, starts: Sequence[int], window: int | None
    ) -> tuple[Tensor, Tensor]:
        """(out_TQH, the log-sum-exp of scores and sink, lse_TQ); computed in float32, whatever the dtype of q.

        Memory of a thread: 64 numbers for each token of the longest sequence, and six copies of a head's keys.
        """
        out_TQH = torch.empty(q_TQH.shape, dtype=torch.float32)
        lse_TQ = torch.empty(q_TQH.shape[:2], dtype=torch.float32)
        q, k, v, sinks = (_array(tensor.float()) for tensor in (q_TQH, k_TKH, v_TKH, _copy(sinks_Q)))
        places = (np.array(starts, np.int32), window or 0)
        self._kernels.training_attention(q, k, v, sinks, *places, _array(out_TQH), _array(lse_TQ))
        return out_TQH.to(q_TQH.dtype), lse_TQ

    def attention_backward(
        self,
        g_TQH: Tensor,
        q_TQH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_Q: Tensor,
        out_TQH: Tensor,
        lse_TQ: Tensor,
        starts: Sequence[int],
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dq_TQH, dk_TKH, dv_TKH, g . out of each head [T, Q])."""
        dq_TQH, dk_TKH, dv_TKH, dots_TQ = (
            torch.empty(like.shape, dtype=torch.float32) for like in (q_TQH, k_TKH, v_TKH, lse_TQ)
        )
        q, k, v, sinks, out, lse, g = (
            _array(tensor.float()) for tensor in (q_TQH, k_TKH, v_TKH, _copy(sinks_Q), out_TQH, lse_TQ, g_TQH)
        )
        places = (np.array(starts, np.int32), window or 0)
        dq, dk, dv, dots = (_array(tensor) for tensor in (dq_TQH, dk_TKH, dv_TKH, dots_TQ))
        self._kernels.training_attention(q, k, v, sinks, *places, out, lse, g, dq, dk, dv, dots)
        return dq_TQH.to(q_TQH.dtype), dk_TKH.to(k_TKH.dtype), dv_TKH.to(v_TKH.dtype), dots_TQ

    def swiglu(self, gate_up_SF: Tensor, limit: float) -> Tensor:
        """[S, F] of gate and up beside each other, [S, 2F]."""
        num_rows, width = gate_up_SF.shape
        inner_SF = gate_up_SF.new_empty((num_rows, width // 2))
        self._kernels.swiglu(_array(gate_up_SF), limit, _array(inner_SF))
        return inner_SF

    def swiglu_backward(
        self, gate_up_SF: Tensor, dinner_SF: Tensor, weights_S: Tensor, limit: float
    ) -> tuple[Tensor, Tensor]:
        """(the gradient of gate and up times weights_S, inner . dinner of each row in float32)."""
        dgate_up_SF = _empty(gate_up_SF)
        dots_S = torch.empty(len(gate_up_SF))
        self._kernels.swiglu_backward(
            _array(gate_up_SF), _array(dinner_SF), _array(weights_S), limit, _array(dgate_up_SF), _array(dots_S)
        )
        return dgate_up_SF, dots_S

    def take_rows(
        self, source_TD: Tensor, indices_S: Tensor, num_rows: int, dtype: torch.dtype, weights_S: Tensor | None = None
    ) -> Tensor:
        """Some rows, times ``weights_S``, and zeros behind them until there are ``num_rows``."""
        rows_SD = torch.empty((num_rows, source_TD.shape[1]), dtype=dtype)
        weights = None if weights_S is None else _array(weights_S)
        self._kernels.take_rows(_array(source_TD), _array(indices_S), weights, _array(rows_SD))
        return rows_SD

    def add_rows(self, out_TD: Tensor, indices_S: Tensor, rows_SD: Tensor, weights_S: Tensor | None = None) -> None:
        """Add rows, times ``weights_S``, to those of ``out_TD`` with these indices, no two of them the same.

        ``rows_SD`` may have more rows than there are indices.
        """
        assert out_TD.is_contiguous(), "a copy would get the sums"
        weights = None if weights_S is None else _array(weights_S)
        self._kernels.add_rows(_array(rows_SD), _array(indices_S), weights, _array(out_TD))


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _copy(parameter: Tensor) -> Tensor:
    """The same numbers elsewhere: after `Tensor.numpy` torch cannot free what it gathered from several processes."""
    return parameter.detach().clone()


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor, or of a contiguous copy; bfloat16 as uint16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
