"""What tests of the GPU backend share: compiled on a card where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads it when the kernels are first imported, which nothing does before a backend is asked for.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed: the kernels of the GPU backend are not tested")
