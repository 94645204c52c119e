"""BiTAT with one-bit inputs: signs multiply signs, by XNOR and popcount.

G. Park et al., arXiv 2207.01394 quantizes activations to one bit as well; how is decided here:
``sign(x - t)`` with a threshold for each input and one scale for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from diba_np.checks import as_samples
from diba_np.kernels.signs import multiply_signs, pack_sides
from diba_np.matrix.base import Array, take
from diba_np.methods.bitat import BiTAT
from diba_np.methods.fitting import check_problem, half_of, too_small
from diba_np.methods.scalar import ScalarQuantized

if TYPE_CHECKING:
    from typing_extensions import Self


_TILE_WORDS = 2048  # 16 KiB


def sign_tiles(rows: Array) -> Array:
    """Return packed rows (m, n_words) in the tiles of `multiply_signs`, whole vectors wide."""
    m, n_words = rows.shape
    width = max(min(_TILE_WORDS // n_words, m) // 8 * 8, 64)
    if width >= m:
        width = -(-m // 8) * 8
    padded = np.zeros((-(-m // width) * width, n_words), np.uint64)
    padded[:m] = rows
    return np.ascontiguousarray(padded.reshape(-1, width, n_words).transpose(0, 2, 1))


class SignProduct:
    """``y = scales * (S sign(x - t)) + bias`` on packed signs, S = +-1; as `frozen` of a layer.

    Parameters
    ----------
    signs : (m, n) array
        Above 0 is +1, the rest -1.
    thresholds : (n,) array_like
    scales, bias : (m,) array_like

    Notes
    -----
    Holds m n bits. N samples take ``N m n / 64`` steps of XNOR and popcount, and N n comparisons.
    """

    def __init__(
        self, signs: Array, thresholds: ArrayLike, scales: ArrayLike, bias: ArrayLike
    ) -> None:
        m, n = signs.shape
        rows = np.empty((m, -(-n // 64)), np.uint64)
        pack_sides((signs > 0).astype(np.float32), np.ones(n, np.float32), rows)
        self._tiles = sign_tiles(rows)
        self.shape = (m, n)
        self._thresholds = np.array(thresholds, np.float32)
        self._scales, self._bias = np.array(scales, np.float32), np.array(bias, np.float32)

    def __call__(self, x: ArrayLike) -> Array:
        """Return the outputs (..., m) of (..., n) samples, float32."""
        m, n = self.shape
        values = np.asarray(x)
        flat = np.ascontiguousarray(values.reshape(-1, n), np.float32)
        sides = np.empty((len(flat), self._tiles.shape[1]), np.uint64)
        out = np.empty((len(flat), m), np.float32)
        pack_sides(flat, self._thresholds, sides)
        multiply_signs(sides, self._tiles, n, self._scales, self._bias, out)
        return out.reshape(*values.shape[:-1], m)


def one_bit_inputs(X: Array) -> tuple[Array, float]:
    """Return thresholds (n,) and one scale for signs in the place of samples (N, n).

    Thresholds are the means, and the scale is the mean distance from them: with ``b = sign(x - t)``
    it is that of least squares for ``x - t ~ scale b``.
    """
    halves, unit = half_of(X.mean(axis=0, dtype=np.float64), 1.0)
    thresholds = halves.astype(np.float64) * unit
    return thresholds, float(np.mean(np.abs(X - thresholds))) or 1.0


class BinaryBiTAT(BiTAT):
    """`BiTAT` of what reads one bit of each input: ``y = A_hat (scale sign(x - t))``.

    Products as of a `LinearOperator` are those of ``A_hat = scale * diag(alpha) S`` with what they
    are given; `outputs` reads signs. Bits: ``m n + 16 m`` and 16 for each threshold; the scale of
    the inputs is a number of the header, as that of the matrix is.

    Parameters
    ----------
    parts, named
        What `ScalarQuantized` takes, with 2 levels and a scale a row.
    thresholds : (nk,) float16
        Of the inputs of the kept columns; one that lies on its threshold is +1.
    input_scale : float
    """

    method = "bitat-binary"
    dataset_kinds: ClassVar[dict[str, str]] = {
        **ScalarQuantized.dataset_kinds,
        "thresholds": "scales",
        "unit_thresholds": "scales",
    }
    optional_datasets: ClassVar[frozenset[str]] = frozenset({"thresholds", "unit_thresholds"})

    def __init__(
        self, *parts: Any, thresholds: Array | None = None, input_scale: float = 1.0, **named: Any
    ) -> None:
        super().__init__(*parts, **named)
        self.threshold_unit = 1.0
        size = self.codes.shape[1]
        self.thresholds = np.zeros(size, "<f2") if thresholds is None else thresholds
        self.input_scale = float(input_scale)
        if self.levels != 2 or self.scales.shape[1] != 1:
            shape = self.scales.shape
            raise ValueError(f"levels must be 2 with a scale a row, got {self.levels}, {shape}")
        if self.thresholds.shape != (size,):
            raise ValueError(f"thresholds must have shape ({size},), got {self.thresholds.shape}")

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        order: str = "descending",
        flips: bool = True,
        ridge: float = 0.01,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Binarize `A` for the signs of the inputs it will meet.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight, thresholds included.
        inputs : (N, n) array_like, optional
            Thresholds are their means; without, they are zeros and the signs white.
        seed, order, flips, ridge, sample_weight
            As of `BiTAT.fit`.
        """
        problem = check_problem(A, bits, inputs, seed)
        m, n = problem.shape
        thresholds, size, signs = np.zeros(n), 1.0, None
        if problem.X is not None:
            thresholds, size = one_bit_inputs(problem.X)
            signs = np.where(problem.X >= thresholds, size, -size)
        least = cls.least_bits(problem.shape)
        if problem.bits * m * n < least:
            raise too_small(cls.method, problem.bits, least, problem.shape)
        f = BiTAT.fit(A, problem.bits - 16 / m, signs, seed, order, flips, ridge, sample_weight)
        made = cls.of(f, thresholds, size)
        made.record = {**f.record, "bits": float(bits)}
        return made

    @classmethod
    def least_bits(cls, shape: tuple[int, int]) -> int:
        """Return the bits of the fewest columns, and of thresholds of all."""
        return super().least_bits(shape) + 16 * shape[1]

    @classmethod
    def of(
        cls, matrix: BiTAT, thresholds: ArrayLike | None = None, input_scale: float = 1.0
    ) -> Self:
        """Return a matrix of signs as one that reads signs.

        Parameters
        ----------
        matrix : BiTAT, (m, n)
        thresholds : (n,) array_like, optional
            Zeros by default.
        input_scale : float
        """
        if not isinstance(matrix, BiTAT):
            raise TypeError(f"matrix must be a BiTAT, got {type(matrix).__name__}")
        given = np.zeros(matrix.shape[1]) if thresholds is None else np.asarray(thresholds, float)
        if given.shape != (matrix.shape[1],):
            raise ValueError(f"thresholds must have shape ({matrix.shape[1]},), got {given.shape}")
        f = matrix
        made = cls(
            f.shape, f.codes, f.levels, f.group, f.scales, f.kept, f.table, f.scale, f.record
        )
        made.thresholds, made.threshold_unit = half_of(given[f.kept], 1.0)
        made.input_scale = float(input_scale)
        return made

    def sides(self) -> Array:
        """Return the thresholds (nk,), float64."""
        return self.thresholds.astype(np.float64) * self.threshold_unit

    def product(self, bias: ArrayLike | None = None) -> SignProduct:
        """Return what computes `outputs` with a bias, packed once."""
        size = 0.5 * self.input_scale * self.scale  # the table holds halves
        return SignProduct(
            self.codes,
            self.sides(),
            size * self.scales[:, 0].astype(np.float64),
            np.zeros(self.shape[0]) if bias is None else bias,
        )

    def outputs(self, X: ArrayLike) -> Array:
        """Return ``A_hat (input_scale sign(x - t))`` of (N, n) samples, (N, m) float32.

        By XNOR and popcount.
        """
        return self.product()(as_samples(X, "X", self.shape[1])[:, self.kept])

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        attrs, arrays = super().to_datasets()
        attrs["input_scale"] = self.input_scale
        if self.threshold_unit == 1.0:
            arrays["thresholds"] = self.thresholds
        else:  # another name: what knows no units finds none
            attrs["threshold_unit"] = self.threshold_unit
            arrays["unit_thresholds"] = self.thresholds
        return attrs, arrays

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        made = super().from_datasets(attrs, arrays)
        size = float(attrs["input_scale"])
        if not np.isfinite(size):
            raise ValueError(f"input_scale must be finite, found {size}")
        name = "thresholds" if "thresholds" in arrays else "unit_thresholds"
        made.thresholds = take(arrays, name, "<f2", made.codes.shape[1])
        made.threshold_unit = 1.0 if name == "thresholds" else float(attrs["threshold_unit"])
        if not 0 < made.threshold_unit < np.inf:
            raise ValueError(
                f"threshold_unit must be finite and above 0, found {made.threshold_unit}"
            )
        made.input_scale = size
        return made
