"""How much one sandbox may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one sandbox; those of time are for each call."""

    # What the model was told in training.
    timeout_s: float = 120.0
    # All processes together; a single one that asks for more gets a MemoryError.
    memory_bytes: int = 1 << 30
    # /mnt/data, and the largest file.
    data_bytes: int = 256 << 20
    # /tmp, and /dev/shm again as much.
    scratch_bytes: int = 64 << 20
    # Files and folders in each of these places.
    num_files: int = 20_000
    # Processes and threads.
    num_processes: int = 128
    # Cores that the code may use at once.
    num_cpus: int = 2
    # What is kept of print: half from the beginning, half from the end.
    output_bytes: int = 1 << 20
    # What of it the model is given, in characters, in the same halves.
    output_chars: int = 20_000
    # Pictures and other rich output of one call.
    display_bytes: int = 16 << 20
