"""Entropy-coded centroids: of every entry (FC+Q+H), and of what pruning leaves (Deep Compression).

`fit` makes one from a matrix; `scripts/mesa_pipelines.py` trains a network into these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from diba_np.matrix.base import Array, CompressedMatrix, take
from diba_np.methods.deep_compression_fit import choose_codes, choose_sparse, gap_symbols
from diba_np.methods.entropy_coding import decode, smallest
from diba_np.methods.fitting import check_problem, to_half
from diba_np.methods.mesa_layer import nothing_fits

if TYPE_CHECKING:
    from typing_extensions import Self


class HuffmanCoded(CompressedMatrix):
    """Every entry coded by the nearest of r shared centroids, the codes entropy-coded (FC+Q+H).

    Parameters
    ----------
    codes : (m, n) int64
        Indices of `centroids`.
    centroids : (r,) float16, increasing
    coder : {"huffman", "rans", "auto"}
    """

    method = "fcqh"
    dataset_kinds: ClassVar[dict[str, str]] = {
        "codes": "payload",
        "book": "codebook",
        "centroids": "codebook",
    }

    def __init__(
        self,
        codes: Array,
        centroids: Array,
        coder: str = "huffman",
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(codes.shape, scale, record)
        self.codes, self.centroids, self.coder = codes, centroids, coder

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        coder: str = "auto",
    ) -> Self:
        """Choose centroids (k-means, or an even grid) of least error within the budget.

        Inputs are checked and not used; `seed` is not used.
        """
        problem = check_problem(A, bits, inputs, seed)
        for codes, centroids in choose_codes(problem.W, problem.budget, coder != "huffman"):
            matrix = cls(codes, to_half(centroids), coder)
            if matrix.storage_bits() <= problem.budget:
                break
        else:
            raise nothing_fits(cls.method, bits, problem.shape)
        matrix.scale = problem.scale
        matrix.record = problem.record(
            levels=len(centroids), coder=matrix.to_datasets()[0]["coder"]
        )
        return matrix

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        return (self.centroids.astype(np.float64) * self.scale).astype(np.float32)[self.codes]

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        r = len(self.centroids)
        stream, book, coder = smallest(self.codes, r, self.coder)
        return {"r": r, "coder": coder}, {
            "codes": stream,
            "book": book,
            "centroids": self.centroids,
        }

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        m, n, r = (int(attrs[key]) for key in ("m", "n", "r"))
        codes = decode(arrays["codes"], arrays["book"], m * n, r, attrs["coder"]).reshape(m, n)
        return cls(codes, take(arrays, "centroids", "<f2", r), attrs["coder"], attrs["scale"])


class DeepCompression(CompressedMatrix):
    """Pruned weights: gaps to the next kept entry, centroid codes, both Huffman-coded.

    S. Han et al., arXiv 1510.00149. A gap is counted in pruned entries along the rows; the
    largest gap symbol means "that many pruned, none kept" and carries no code.
    """

    method = "deepc"
    dataset_kinds: ClassVar[dict[str, str]] = {
        "codes": "payload",
        "gaps": "index",
        "code_book": "codebook",
        "gap_book": "codebook",
        "centroids": "codebook",
    }

    def __init__(
        self,
        shape: tuple[int, int],
        positions: Array,
        codes: Array,
        centroids: Array,
        gap_bits: int = 5,
        coder: str = "huffman",
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, scale, record)
        self.positions, self.codes, self.centroids = positions, codes, centroids
        self.gap_bits, self.coder = gap_bits, coder

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        coder: str = "auto",
    ) -> Self:
        """Choose density and centroids of least error within the budget.

        Inputs are checked and not used; `seed` is not used. Nothing is retrained here: see
        `scripts/mesa_pipelines.py` for the whole of it.
        """
        problem = check_problem(A, bits, inputs, seed)
        for positions, codes, centroids, gap_bits in choose_sparse(
            problem.W, problem.budget, coder != "huffman"
        ):
            matrix = cls(problem.shape, positions, codes, to_half(centroids), gap_bits, coder)
            if matrix.storage_bits() <= problem.budget:
                break
        else:
            raise nothing_fits(cls.method, bits, problem.shape)
        matrix.scale = problem.scale
        matrix.record = problem.record(
            kept=len(positions), levels=len(centroids), gap_bits=gap_bits
        )
        return matrix

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        flat = np.zeros(self.shape[0] * self.shape[1], np.float32)
        flat[self.positions] = (self.centroids.astype(np.float64) * self.scale).astype(np.float32)[
            self.codes
        ]
        return flat.reshape(self.shape)

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        symbols = gap_symbols(self.positions, self.gap_bits)
        r = len(self.centroids)
        codes, code_book, coder = smallest(self.codes, r, self.coder)
        gaps, gap_book, gap_coder = smallest(symbols, 2**self.gap_bits, self.coder)
        arrays = {"codes": codes, "gaps": gaps, "code_book": code_book, "gap_book": gap_book}
        attrs = {"r": r, "kept": len(self.codes), "gap_bits": self.gap_bits, "n_gaps": len(symbols)}
        return {**attrs, "coder": coder, "gap_coder": gap_coder}, {
            **arrays,
            "centroids": self.centroids,
        }

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        m, n, r, count, gap_bits, n_gaps = (
            int(attrs[key]) for key in ("m", "n", "r", "kept", "gap_bits", "n_gaps")
        )
        if not 1 <= gap_bits <= 12 or not 0 <= count <= n_gaps <= m * n:
            raise ValueError(
                f"kept, n_gaps and gap_bits contradict the shape: {count}, {n_gaps}, {gap_bits}"
            )
        codes = decode(arrays["codes"], arrays["code_book"], count, r, attrs["coder"])
        symbols = decode(
            arrays["gaps"], arrays["gap_book"], n_gaps, 2**gap_bits, attrs["gap_coder"]
        )
        most = 2**gap_bits - 1
        ends = np.flatnonzero(symbols < most)
        positions = (np.cumsum(symbols)[ends] + np.arange(len(ends))).astype(np.int64)
        if len(ends) != count or (count and positions[-1] >= m * n):
            raise ValueError(f"gaps must place {count} entries inside {m * n}, found {len(ends)}")
        centroids = take(arrays, "centroids", "<f2", r)
        coder = attrs["coder"] if attrs["coder"] == attrs["gap_coder"] else "auto"
        return cls((m, n), positions, codes, centroids, gap_bits, coder, attrs["scale"])
