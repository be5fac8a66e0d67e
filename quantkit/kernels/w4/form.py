"""What a packed weight of four bits is made of."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # rows


@dataclass(frozen=True, kw_only=True)
class Layout4:
    """What a packed weight is made of.

    Attributes:
        n, k: rows, and columns along which products are summed.
        codes: int4 (stored as q + 8), uint4 or fp4_e2m1.
        group: columns that share a scale, a power of two from 16 on; None where a row has one.
        scales: none (a row has one, kept apart), bfloat16, float16, float32, e4m3, e8m0, or uint8 for int8 activations.
        zeros: whether there are zero points.
        activation_bits: 16; 8 for int8 or e4m3 activations.
        promoted: of integers with activations of eight bits, whether these are e4m3: scales then multiply sums.
        deep: of fp4_e2m1 by e4m3 activations, whether some weights are subnormals of e4m3.
    """

    n: int
    k: int
    codes: str
    group: int | None
    scales: str
    zeros: bool
    activation_bits: int = 16
    promoted: bool = False
    deep: bool = False

    @property
    def activations(self) -> tuple[str, ...]:
        """The types of activations that it is multiplied by."""
        if self.activation_bits == 16:
            return ("bfloat16", "float16")
        return ("float8_e4m3fn",) if self.codes == "fp4_e2m1" or self.promoted else ("int8",)

    @property
    def slab(self) -> int:
        """Columns of a slab."""
        return 1024 // self.activation_bits

    @property
    def slabs(self) -> int:
        """Slabs of K."""
        return -(-self.k // self.slab)

    @property
    def planes(self) -> int:
        """Runs of 64 columns, of which a slab has one, or two."""
        return -(-self.k // 64)

    @property
    def blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.n // BLOCK)

    @property
    def groups_in_slab(self) -> int:
        """Scales that a row has in a slab."""
        return 1 if self.group is None else max(1, self.slab // self.group)

    @property
    def sides(self) -> int:
        """Runs of scales along K: one a slab, or one a group of several slabs."""
        return 1 if self.group is None else -(-self.k // max(self.slab, self.group))


@dataclass(frozen=True, kw_only=True)
class Packed4:
    """A weight as the kernel reads it, on the host.

    Attributes:
        codes: uint8 [planes, blocks, 2048].
        scales: uint8 [sides, blocks, 32 pairs of rows, 2 rows · scales in a slab · bytes of one]; None without groups.
        zeros: uint8 [sides, blocks, 32, scales in a slab], the upper row's in the low nibble; None without.
        channel_scale: float32 [n], what the sums of a row are multiplied by.
    """

    layout: Layout4
    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8] | None
    zeros: NDArray[np.uint8] | None
    channel_scale: NDArray[np.float32]

    @property
    def size_bytes(self) -> int:
        """All bytes together."""
        return sum(
            part.nbytes
            for part in (self.codes, self.scales, self.zeros, self.channel_scale)
            if part is not None
        )
