"""Which variant of the kernels a card gets, by its compute capability alone: a function without a card, or torch.

    Turing     7.5   float16, since it has no bfloat16; Triton 3.9 compiles its products without the matrix units
    Ampere     8.0   bfloat16; tiles that fit 99 KiB of shared memory also run on 8.6 and 8.9 (Ada)
    Hopper     9.0   larger prefill tiles
    Blackwell  10    leaves the unpacking of MXFP4 to Triton (`dot_scaled`)
               12    likewise, in tiles that fit 99 KiB

What the variants choose has been run in Triton's interpreter, and on no card: tile sizes are reasoned from the size of
shared memory and of the matrix instructions, and not measured.

Source: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ossia.errors import UnavailableError

Unpacking = Literal["registers", "sums", "dot_scaled"]


@dataclass(frozen=True, slots=True)
class Tiling:
    """The part of a product of sorted tokens with one expert's matrix that one program computes."""

    tokens: int
    outputs: int
    # Inputs that are read at a time; a multiple of MXFP4's 32.
    inputs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Variant:
    """How the kernels run on one kind of card."""

    name: str
    dtype: Literal["bfloat16", "float16", "float32"]
    # How MXFP4 becomes numbers: in registers with its scales, in registers with the scales on sums of 32 products, or
    # as Triton does it.
    unpacking: Unpacking
    decode: Tiling
    prefill: Tiling
    # Keys that attention reads at a time, and query rows (tokens times heads of a group) of one prefill program.
    attention_keys: int
    attention_rows: int
    # Programs that share the keys of one sequence and key head where that has a single token; a power of two.
    attention_splits: int

    def tiling(self, num_slots: int, num_experts: int) -> Tiling:
        """For so many pairs of token and expert: the wide tiles once an expert has enough tokens to fill a half."""
        return self.prefill if 2 * num_slots >= num_experts * self.prefill.tokens else self.decode


# 32 inputs at a time, so that a sum of products belongs to one scale.
_TURING = Variant("turing", "float16", "sums", Tiling(16, 64, 32, 4, 2), Tiling(64, 64, 32, 4, 2), 32, 64, 8)
_AMPERE = Variant("ampere", "bfloat16", "registers", Tiling(16, 32, 128, 4, 4), Tiling(64, 128, 64, 8, 3), 64, 64, 16)
_HOPPER = Variant("hopper", "bfloat16", "registers", Tiling(16, 32, 128, 4, 5), Tiling(128, 128, 64, 8, 4), 64, 128, 16)
_BLACKWELL = Variant(
    "blackwell", "bfloat16", "dot_scaled", Tiling(16, 32, 128, 4, 5), Tiling(128, 128, 64, 8, 3), 64, 128, 16
)
_BLACKWELL_RTX = replace(_BLACKWELL, name="blackwell-rtx", decode=_AMPERE.decode, prefill=_AMPERE.prefill)
# In numpy a program costs milliseconds, whatever it computes: small tiles that still take several steps of a loop.
INTERPRETED = Variant(
    "interpreter", "bfloat16", "registers", Tiling(16, 64, 128, 4, 2), Tiling(64, 64, 128, 4, 2), 64, 64, 4
)


def choose(capability: tuple[int, int]) -> Variant:
    """The variant for a card. Raises UnavailableError for one before Turing."""
    if capability >= (12, 0):
        return _BLACKWELL_RTX
    if capability >= (10, 0):
        return _BLACKWELL
    if capability >= (9, 0):
        return _HOPPER
    if capability >= (8, 0):
        return _AMPERE
    if capability >= (7, 5):
        return _TURING
    raise UnavailableError(
        f"this GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 7.5 (Turing, 2018) or "
        "later. Use --backend cpu."
    )
