"""What must hold before any test is imported."""

from __future__ import annotations

import os
from pathlib import Path

# Triton reads it when it is first imported, which transformers may do long before a test of the GPU backend runs.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
