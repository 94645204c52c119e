"""QSWD: quantized sparse weight decomposition, ``W ~ C Z`` with Z sparse, both on grids.

A. Kuzmin et al., arXiv 2207.11048 (the abstract names projected gradient descent; grids,
annealing, support coding and the choice of settings are decided here).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix

from diba_np.matrix.base import Array, CompressedMatrix, take
from diba_np.matrix.operator import real_product, with_total
from diba_np.methods.fitting import check_problem, to_half
from diba_np.methods.qswd_fit import Setting, choose_setting, decompose, next_bits
from diba_np.methods.streams import pack_digits, pack_sets, unpack_digits, unpack_sets

if TYPE_CHECKING:
    from typing_extensions import Self


class QSWD(CompressedMatrix):
    """``A ~ scale * C Z`` band by band: C (d, r) on a grid a column, Z (r, p) sparse integers.

    Special cases: full support and 16 bits is the truncated SVD; one nonzero that is always
    1 is vector quantization; full bands with few nonzeros is a sparse PCA.

    Notes
    -----
    Bits: ``d r c_bits + 16 r + p s z_bits + p log2 C(r, s)``, support by its rank among all
    (enumerative), or ``p r`` bits, a bitmap, where s is above 64. A product costs one sparse
    product with Z and one with C.
    """

    method = "qswd"
    dataset_kinds: ClassVar[dict[str, str]] = {
        "c": "payload",
        "z": "payload",
        "c_scale": "scales",
        "support": "index",
    }

    def __init__(
        self,
        setting: Setting,
        c: Array,
        c_scale: Array,
        sets: Array,
        values: Array,
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(setting.shape, scale, record)
        self.setting, self.c, self.c_scale = setting, c, c_scale
        self.sets, self.values = sets, values

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        setting: tuple[int, int, int, int, int] | None = None,
        sweeps: int = 16,
    ) -> Self:
        """Choose band height, rank, support and widths of least error within the budget.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight.
        inputs : (N, n) array_like, optional
            Checked and not used.
        seed : int
            Seeds the first dictionary.
        setting : tuple (d, r, s, c_bits, z_bits), optional
            Fix the sizes instead of choosing: d and r at least 1, s in [1, r], c_bits in [2, 16],
            z_bits in [0, 16].
        sweeps : int
            Rounds of (Z, C) for the chosen setting.

        Raises
        ------
        ValueError
            If no setting fits, or the given one does not or is none.

        Notes
        -----
        Settings are tried on at most 16384 columns of the bands (8 r if that is more) for a few
        sweeps; the best is then fitted to everything. O(sweeps p s r).
        """
        problem = check_problem(A, bits, inputs, seed)
        if setting is not None:
            chosen = Setting(problem.shape, *setting)
            if chosen.bits() > problem.budget:
                raise ValueError(f"setting must fit {problem.budget} bits, got {chosen.bits()}")
        else:
            chosen = choose_setting(problem)
        codes, steps, sets, values = decompose(problem.W, chosen, problem.rng, sweeps)
        top = float(steps.max()) if steps.max() > 0 else 1.0
        matrix = cls(chosen, codes, to_half(steps / top), sets, values, top * problem.scale)
        names = ("d", "r", "s", "c_bits", "z_bits")
        matrix.record = problem.record(
            **{name: getattr(chosen, name) for name in names}, sweeps=sweeps
        )
        return matrix

    @classmethod
    def least_bits(cls, shape: tuple[int, int]) -> int:
        """Return the bits of the smallest setting."""
        return next_bits(shape, 0)

    def _sparse(self) -> csr_matrix:
        """Return Z by bands: (bands * r, n) csr_matrix of float32."""
        st = self.setting
        n = st.shape[1]
        column = np.repeat(np.arange(st.p), st.s)
        row = (column // n) * st.r + self.sets.ravel()
        shape = (st.bands * st.r, n)
        return csr_matrix((self.values.ravel().astype(np.float32), (row, column % n)), shape)

    def _dictionary(self) -> Array:
        return self.c.astype(np.float32) * self.c_scale.astype(np.float32)

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        st = self.setting
        Z = self._sparse().toarray().reshape(st.bands, st.r, st.shape[1])
        bands = np.matmul(self._dictionary(), Z).reshape(-1, st.shape[1])
        result: Array = (bands[: st.shape[0]] * self.scale).astype(np.float32)
        return result

    @functools.cached_property
    def _parts(self) -> tuple[Array, csr_matrix, csr_matrix]:
        """The dictionary, Z and its transpose."""
        Z = self._sparse()
        return self._dictionary(), Z, Z.T.tocsr()

    def _apply(self, X: Array) -> Array:
        return real_product(X, self._multiply, lambda x: self._dense() @ x)

    def _apply_transposed(self, Y: Array) -> Array:
        return real_product(Y, self._multiply_transposed, lambda y: self._dense().T @ y)

    def _multiply(self, x: Array) -> tuple[Array, float]:
        st = self.setting
        C, Z, _ = self._parts
        hidden = (Z @ x).reshape(st.bands, st.r, -1)
        y = np.matmul(C, hidden).reshape(st.bands * st.d, -1)[: st.shape[0]]
        return with_total(y * y.dtype.type(self.scale))

    def _multiply_transposed(self, y: Array) -> tuple[Array, float]:
        st = self.setting
        C, _, Zt = self._parts
        padded = np.zeros((st.bands * st.d, y.shape[1]), y.dtype)
        padded[: st.shape[0]] = y
        hidden = np.matmul(C.T, padded.reshape(st.bands, st.d, -1)).reshape(st.bands * st.r, -1)
        return with_total((Zt @ hidden) * y.dtype.type(self.scale))

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        st = self.setting
        order = np.argsort(self.sets, axis=1)
        sets = np.take_along_axis(self.sets, order, axis=1)
        values = np.take_along_axis(self.values, order, axis=1)
        if st.full:
            codes = values + st.z_max
        elif st.z_max == 0:
            codes = np.zeros_like(values)
        else:
            # -max ... -1, 1 ... max  ->  0 ... 2 max - 1
            codes = np.where(values < 0, values + st.z_max, values + st.z_max - 1)
        how, _ = st.index_coding()
        if how == "sets":
            support = pack_sets(sets, st.r)
        elif how == "bitmap":
            bitmap = np.zeros((st.p, st.r), np.uint8)
            np.put_along_axis(bitmap, sets, 1, axis=1)
            support = np.packbits(bitmap.ravel(), bitorder="little")
        else:
            support = np.zeros(0, np.uint8)
        arrays = {
            "c": pack_digits(self.c.ravel() + 2 ** (st.c_bits - 1), 2**st.c_bits),
            "c_scale": self.c_scale,
            "z": pack_digits(codes.ravel(), st.z_levels),
            "support": support,
        }
        return {name: getattr(st, name) for name in ("d", "r", "s", "c_bits", "z_bits")}, arrays

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        shape = (int(attrs["m"]), int(attrs["n"]))
        d, r, s, c_bits, z_bits = (int(attrs[name]) for name in ("d", "r", "s", "c_bits", "z_bits"))
        st = Setting(shape, d, r, s, c_bits, z_bits)
        c = unpack_digits(arrays["c"], st.d * st.r, 2**st.c_bits).reshape(st.d, st.r) - 2 ** (
            st.c_bits - 1
        )
        c_scale = take(arrays, "c_scale", "<f2", st.r)
        how, _ = st.index_coding()
        if how == "sets":
            sets = unpack_sets(arrays["support"], st.p, st.r, st.s)
        elif how == "bitmap":
            need = -(-st.p * st.r // 8)
            bits = np.unpackbits(
                take(arrays, "support", "u1", need), count=st.p * st.r, bitorder="little"
            )
            if not (bits.reshape(st.p, st.r).sum(axis=1) == st.s).all():
                raise ValueError(f"support must mark {st.s} rows in every column")
            sets = (np.flatnonzero(bits) % st.r).reshape(st.p, st.s)
        else:
            sets = np.tile(np.arange(st.r), (st.p, 1))
        codes = unpack_digits(arrays["z"], st.p * st.s, st.z_levels).reshape(st.p, st.s)
        if st.full:
            values = codes - st.z_max
        elif st.z_max == 0:
            values = codes + 1
        else:
            values = np.where(codes < st.z_max, codes - st.z_max, codes - st.z_max + 1)
        return cls(st, c, c_scale, sets, values, attrs["scale"])
