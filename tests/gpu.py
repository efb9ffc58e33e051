"""What tests of the GPU backend share: compiled on a card where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed: the kernels of the GPU backend are not tested")
