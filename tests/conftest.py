"""What must hold before any test is imported."""

from __future__ import annotations

import os
from pathlib import Path

# Triton reads it when it is first imported, which transformers may do long before a test of the GPU backend runs.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Where every core has its process of tests, threads of a library would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
