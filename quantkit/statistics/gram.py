"""Which products a layer's inputs have with each other: XᵀX, all that the error of a layer's output depends on."""

from collections.abc import Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CacheError, DataError

# Elements of the vectors that are multiplied at a time.
_PIECE = 1 << 19


class GramMatrix:
    """Σ x xᵀ, Σ x and count of the vectors x that a linear operator multiplies with its weight.

    With G = Σ x xᵀ a weight's change ΔW [N, K] changes the output by Σ ‖ΔW x‖² = tr(ΔW G ΔWᵀ), summed over every
    vector seen: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) need no activations beside it. Where a bias
    takes up the mean of the change, what is left is tr(ΔW C ΔWᵀ) / count, C the covariance.

    A convolution's vectors are its patches, K = channels per group · kernel size, one matrix for every group.
    Products and sums are float64: they merge by addition, to 1e-12 in any order. NaN and infinities stay in.

    Attributes:
        products: float64, shape (groups, K, K), symmetric.
        sums: float64, shape (groups, K).
        count: vectors seen, per group.
    """

    def __init__(self, size: int, groups: int = 1) -> None:
        self.count = 0
        self.products: NDArray[np.float64] = np.zeros((groups, size, size))
        self.sums: NDArray[np.float64] = np.zeros((groups, size))

    @property
    def groups(self) -> int:
        """Matrices: 1, or the groups of a convolution."""
        return int(self.sums.shape[0])

    @property
    def size(self) -> int:
        """K, the length of a vector."""
        return int(self.sums.shape[1])

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no infinity was met."""
        return bool(np.isfinite(self.sums).all() and np.isfinite(self.products).all())

    @property
    def mean(self) -> NDArray[np.float64]:
        """E[x], shape (groups, K)."""
        return self.sums / max(self.count, 1)

    @property
    def second_moment(self) -> NDArray[np.float64]:
        """E[x xᵀ], shape (groups, K, K)."""
        return self.products / max(self.count, 1)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """E[x xᵀ] − E[x] E[x]ᵀ, shape (groups, K, K)."""
        mean = self.mean
        return self.second_moment - mean[:, :, None] * mean[:, None, :]

    @property
    def importance(self) -> NDArray[np.float64]:
        """E[x²], the diagonal of the second moment: what an error of a weight alone counts for; (groups, K)."""
        return np.diagonal(self.products, axis1=1, axis2=2) / max(self.count, 1)

    def observe(self, rows: NDArray[np.generic]) -> None:
        """Take in vectors.

        Args:
            rows: shape (vectors, K), or (groups, vectors, K).

        Raises:
            DataError: they are not K long, or not of so many groups.
        """
        cube = rows[None] if rows.ndim == 2 else rows
        if cube.ndim != 3 or cube.shape[0] != self.groups or cube.shape[2] != self.size:
            raise DataError(
                f"Gram matrix: vectors of shape {rows.shape} where ({self.groups}, any, {self.size}) belongs; "
                "the channel axis must not vary between samples."
            )
        rows_at_once = _rows_at_once(self.size)
        for group, part in enumerate(cube):
            for start in range(0, len(part), rows_at_once):
                # float64 before the product: float32 sums would depend on how the vectors were batched.
                x = part[start : start + rows_at_once].astype(np.float64)
                with np.errstate(invalid="ignore", over="ignore"):
                    self.products[group] += x.T @ x
                    self.sums[group] += x.sum(axis=0)
        self.count += cube.shape[1]

    def merge(self, other: "GramMatrix") -> "GramMatrix":
        """Return the matrix of both together; neither operand changes.

        Raises:
            DataError: they are not of one size.
        """
        if self.sums.shape != other.sums.shape:
            raise DataError(
                f"Gram matrix: {self.sums.shape} and {other.sums.shape} (groups, size) differ; "
                "merge the same layer's."
            )
        merged = GramMatrix(self.size, self.groups)
        merged.count = self.count + other.count
        merged.products = self.products + other.products
        merged.sums = self.sums + other.sums
        return merged

    def divided(self, scale: NDArray[np.floating]) -> "GramMatrix":
        """Return the matrix of x / scale, as it is once the producer's channels are divided.

        Args:
            scale: > 0, of shape (K,) or (groups, K).
        """
        inverse = np.broadcast_to(1 / np.asarray(scale, np.float64), self.sums.shape)
        made = GramMatrix(self.size, self.groups)
        made.count = self.count
        made.products = self.products * inverse[:, :, None] * inverse[:, None, :]
        made.sums = self.sums * inverse
        return made

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the state as plain arrays; `from_arrays` reads them back."""
        return {"count": np.array([self.count], np.int64), "products": self.products, "sums": self.sums}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return the matrix that `to_arrays` wrote.

        Raises:
            CacheError: the arrays are not such a state.
        """
        try:
            sums, products = arrays["sums"].astype(np.float64), arrays["products"].astype(np.float64)
            made = cls(sums.shape[1], sums.shape[0])
            (made.count,) = (int(v) for v in arrays["count"])
            if products.shape != made.products.shape:
                raise ValueError("its shapes do not fit each other")
            made.products, made.sums = products, sums
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise CacheError(f"Gram matrix: damaged ({error}); collect it again.") from error
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GramMatrix):
            return NotImplemented
        mine, theirs = self.to_arrays(), other.to_arrays()
        return all(np.array_equal(mine[key], theirs[key], equal_nan=True) for key in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GramMatrix(size={self.size}, groups={self.groups}, count={self.count})"


def _rows_at_once(size: int) -> int:
    """How many vectors are multiplied at a time: as float64 a quarter of the matrix, or 4 MiB where that is more."""
    return max(_PIECE // max(size, 1), size // 4, 1)


def working_bytes(size: int) -> int:
    """Return the bytes that taking vectors in needs beside the matrix: a product, and the vectors as float64."""
    return 8 * size * (size + _rows_at_once(size))


def gram_bytes(size: int, groups: int = 1) -> int:
    """Return the bytes that a Gram matrix takes, in memory and in a file."""
    return 8 * groups * size * (size + 1) + 8
