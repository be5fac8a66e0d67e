"""A product with a weight of four bits, as kernels and models of time see it."""

from dataclasses import dataclass

from quantkit.kernels.heuristics import Problem
from quantkit.kernels.w4.form import Layout4

SCALE_BYTES = {"none": 0, "bfloat16": 2, "float16": 2, "float32": 4, "e4m3": 1, "e8m0": 1, "uint8": 1}
EIGHT_BITS = frozenset({"int8", "float8_e4m3fn"})


@dataclass(frozen=True, kw_only=True)
class W4Problem:
    """D[m, n] = A[m, k] @ W[n, k].T, W of four bits.

    activations: bfloat16, float16, int8 or float8_e4m3fn. output: D's type. codes, group, scales, zeros, deep: as in
    `form.Layout4`.
    """

    m: int
    n: int
    k: int
    activations: str
    output: str
    codes: str
    group: int | None
    scales: str
    zeros: bool
    deep: bool = False

    @classmethod
    def of(cls, layout: Layout4, *, m: int, activations: str, output: str) -> "W4Problem":
        """Return the product of m rows with a packed weight."""
        return cls(
            m=m, n=layout.n, k=layout.k, activations=activations, output=output, codes=layout.codes,
            group=layout.group, scales=layout.scales, zeros=layout.zeros, deep=layout.deep,
        )  # fmt: skip

    @property
    def slab(self) -> int:
        """Columns of a slab: 128 bytes of activations."""
        return 128 if self.activations in EIGHT_BITS else 64

    @property
    def slabs(self) -> int:
        """Slabs along K."""
        return -(-self.k // self.slab)

    @property
    def blocks(self) -> int:
        """Blocks of 64 rows of W."""
        return -(-self.n // 64)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the packed weight."""
        groups = 1 if self.group is None else -(-self.k // self.group)
        per_row = self.k / 2 + groups * (SCALE_BYTES[self.scales] + (0.5 if self.zeros else 0)) + 4
        return self.n * per_row

    @property
    def activation_bytes(self) -> int:
        """Bytes of A."""
        return 128 // self.slab * self.m * self.k

    @property
    def known_as(self) -> Problem:
        """The problem under whose name the timing cache keeps it."""
        words = [self.codes, str(self.group or "row"), self.scales, self.activations]
        name = "-".join(words + (["zeros"] if self.zeros else []) + (["deep"] if self.deep else []))
        return Problem(m=self.m, n=self.n, k=self.k, format=name, output=self.output)
