"""`QSWDLinear` and `LatentQSWDLinear`: ``C Z`` as a layer, scales alone or all of it trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.sparse import csr_matrix

from diba_np.layers.linear import Layer, check_bias, check_float
from diba_np.layers.straight_through import check_weight, inward, rounded_codes
from diba_np.matrix.quality import retuned
from diba_np.methods.fitting import half_of
from diba_np.methods.qswd import QSWD
from diba_np.methods.qswd_fit import cut, pursue
from diba_np.training.moments import Moments, ridge_of

Array = NDArray[Any]

SUPPORTS = ("free", "fixed", "auto")

_MOST_FREE = 1 << 23  # entries of Z up to which "auto" searches its nonzeros at every step
_PASSES = 2  # over the slots of a column, from its codes at the start


class QSWDLinear(Layer):
    """``y = x A_hat^T + bias``, A_hat of bands ``C Z``; scales of C's columns and the bias train.

    Parameters
    ----------
    matrix : QSWD, (m, n)
    bias : (m,) array_like, optional
    dtype : {float32, float64}

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``scales (r,)``, ``bias (m,)``; to be changed in place.
    matrix : QSWD
        The start.

    Notes
    -----
    A forward of N samples makes the dense matrix, ``m n s`` steps, and takes ``m n N`` more; so
    does a backward, which makes its gradient (m, n) on the way.
    """

    def __init__(
        self, matrix: QSWD, bias: ArrayLike | None = None, dtype: DTypeLike = np.float32
    ) -> None:
        if not isinstance(matrix, QSWD):
            raise TypeError(f"matrix must be a QSWD, got {type(matrix).__name__}")
        kind = check_float(dtype)
        m, n = (int(size) for size in matrix.shape)
        scales = matrix.c_scale.astype(np.float64) * matrix.scale
        parameters = {"scales": scales.astype(kind), "bias": np.array(check_bias(bias, m), kind)}
        super().__init__((m, n), parameters, kind)
        self.matrix = matrix

    def _projected(self) -> tuple[Array, Array, Array]:
        """Return the codes of C (d, r), and support and values of Z's columns (p, s), ints."""
        return self.matrix.c, self.matrix.sets, self.matrix.values

    def _decoded(self) -> tuple[Array, Array, Array, Array]:
        """Return what `_projected` does and the dense matrix (m, n)."""
        parts = self._projected()
        return *parts, self._dense(*parts)

    def _dense(self, codes: Array, sets: Array, values: Array) -> Array:
        """Return the matrix (m, n) of codes with the present scales."""
        st = self.matrix.setting
        atoms = np.ascontiguousarray((codes * self.parameters["scales"]).T, self.dtype)  # (r, d)
        if st.full:
            V = values.astype(self.dtype) @ atoms
        else:
            V = np.zeros((st.p, st.d), self.dtype)
            for slot in range(st.s):
                part = atoms[sets[:, slot]]
                part *= values[:, slot, None].astype(self.dtype)
                V += part
        m, n = self.shape
        rows: Array = V.reshape(st.bands, n, st.d).transpose(0, 2, 1).reshape(-1, n)[:m]
        return rows

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        *parts, weights = self._decoded()
        return samples @ weights.T + self.parameters["bias"], (parts, weights)

    def frozen(self) -> Callable[[ArrayLike], Array]:
        """Return what gives the outputs of many samples, until the parameters change."""
        turned = np.ascontiguousarray(self._decoded()[-1].T)
        return self._through(turned, self.parameters["bias"].copy())

    def _pull(self, gradient: Array, parts: list[Array]) -> tuple[Array, Array]:
        """Add the gradient (m, n) of the matrix to that of the scales.

        Returns the gradients of the bands' columns, (p, d), and of C's transpose, (r, d).
        """
        codes, sets, values = parts
        st = self.matrix.setting
        wide = np.zeros((st.bands * st.d, self.shape[1]), self.dtype)
        wide[: len(gradient)] = gradient
        columns = np.ascontiguousarray(
            wide.reshape(st.bands, st.d, -1).transpose(0, 2, 1).reshape(-1, st.d)
        )
        Z = self._sparse(sets, values)
        atoms = np.asarray(Z.T @ columns)
        self.gradients["scales"] += np.einsum("jd,dj->j", atoms, codes.astype(self.dtype))
        return columns, atoms

    def _sparse(self, sets: Array, values: Array) -> csr_matrix:
        """Return the transpose of Z, (p, r)."""
        st = self.matrix.setting
        start = np.arange(0, st.p * st.s + 1, st.s)
        return csr_matrix((values.ravel().astype(self.dtype), sets.ravel(), start), (st.p, st.r))

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        parts, weights = kept
        self.gradients["bias"] += g.sum(axis=0)
        self._pull(g.T @ samples, parts)
        gx: Array = g @ weights
        return gx

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, without bias, and what takes their gradient.

        The whole matrix is made, and its gradient in turn.
        """
        *parts, weights = self._decoded()

        def back(gradient: Array) -> None:
            whole = np.zeros_like(weights)
            flat = np.asarray(ids, np.intp).reshape(-1)
            np.add.at(whole, flat, gradient.reshape(len(flat), self.shape[1]))
            self._pull(whole, parts)

        return weights[np.asarray(ids, np.intp)], back

    def refit(self, data: Moments) -> None:
        """Set the scales to their least-squares values on moments, and the bias by the means.

        The codes stay as they are. Cost: ``n r (n s + d) + n r^2 s`` a band, and a system of order
        r.
        """
        self._refit(data, *self._projected())

    def _refit(self, data: Moments, codes: Array, sets: Array, values: Array) -> None:
        st, n = self.matrix.setting, self.shape[1]
        C, Z = codes.astype(np.float64), self._sparse(sets, values).astype(np.float64)
        normal, right = np.zeros((st.r, st.r)), np.zeros(st.r)
        for band in range(st.bands):
            own = Z[band * n : (band + 1) * n]  # (n, r)
            targets = data.yx[band * st.d : (band + 1) * st.d]
            used = C[: len(targets)]  # the last band may be filled up with zero rows
            normal += (used.T @ used) * np.asarray(own.T @ np.asarray(data.xx @ own))
            right += np.sum(used * np.asarray(targets @ own), axis=0)
        low = np.float64(ridge_of(normal))
        normal[np.diag_indices(st.r)] += low
        scales = self.parameters["scales"]
        scales[...] = np.linalg.solve(normal, right + low * scales)
        self.parameters["bias"][...] = data.y_mean - self._dense(codes, sets, values) @ data.x_mean

    def rounded(self) -> QSWDLinear:
        """Return a new layer as it is after storing: scales rounded to 16 bits."""
        return type(self)(self.to_matrix(), self.parameters["bias"], self.dtype)

    def to_matrix(self) -> QSWD:
        """Return the matrix with the present codes and scales, these rounded to 16 bits."""
        f = self.matrix
        codes, sets, values = self._projected()
        scales = self.parameters["scales"].astype(np.float64)
        half, top = half_of(scales, f.scale, f.c_scale)
        same = np.array_equal(half, f.c_scale) and np.array_equal(codes, f.c)
        # slots of a support may stand in any order
        same = same and (self._sparse(sets, values) != self._sparse(f.sets, f.values)).nnz == 0
        record = f.record if same else retuned(f.record)
        return QSWD(f.setting, codes, half, sets, values, top, record)


class LatentQSWDLinear(QSWDLinear):
    """``y = x (C Z)^T + bias`` where both factors train too, by latent values under their codes.

    The matrix of a forward is that of the latent values projected: entries of C to their grid, and
    of Z, where its support trains, the codes whose ``C Z`` is nearest to latent weights, found slot
    by slot from those of the start (with one nonzero a column the nearest of all). The gradient
    passes straight through: a latent value gets that of the number it is projected to, latent
    weights that of the matrix. Where a latent value lies beyond its grid and would move further, it
    gets none.

    Parameters
    ----------
    matrix : QSWD, (m, n)
    bias : (m,) array_like, optional
    dtype : {float32, float64}
    weight : (m, n) array_like, optional
        Dense weights, where the latent ones start if that leaves the codes of their column as they
        are. By default they start at the matrix.
    support : {"auto", "free", "fixed"}
        "free" trains which s entries of a column of Z are not zero, and with them their values;
        "fixed" the values of those s alone. "auto" is free for a Z of up to 2^23 entries. A full
        support has nothing to choose.

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``c (d, r)`` in units of the codes; ``weights (p, d)``, the latent columns of the bands, or
        where the support is fixed or full ``z (p, s)`` in units of the codes; ``scales (r,)``,
        ``bias (m,)``.
    free : bool
        Whether the support trains.
    matrix : QSWD
        The start.

    Notes
    -----
    With the gradient G (p, d) of the bands' columns: ``g_weights = G``, ``g_Z = G C``,
    ``g_C = G^T Z``, ``g_scales = sum(g_C codes)``. A step costs what that of a dense layer does,
    and ``p r (d + 4 s)`` (free) or ``m n s`` more.

    Latent values of all r entries of Z instead of latent weights do not pay: Z is projected in the
    metric of ``C^T C``, and what is largest of Z is not what is nearest to W.
    """

    def __init__(
        self,
        matrix: QSWD,
        bias: ArrayLike | None = None,
        dtype: DTypeLike = np.float32,
        weight: ArrayLike | None = None,
        support: str = "auto",
    ) -> None:
        super().__init__(matrix, bias, dtype)
        if support not in SUPPORTS:
            raise ValueError(f"support must be one of {', '.join(SUPPORTS)}, got {support!r}")
        dense = None if weight is None else check_weight(weight, self.shape)
        st = matrix.setting
        free = support == "free" or (support == "auto" and st.p * st.r <= _MOST_FREE)
        self.free = free and st.s < st.r
        own = {"c": matrix.c.astype(self.dtype)}
        if self.free:
            start = matrix.to_dense() if dense is None else dense
            own["weights"] = cut(start, st.d).astype(self.dtype)
        else:
            own["z"] = matrix.values.astype(self.dtype)
        self.parameters |= own
        self.gradients |= {name: np.zeros_like(value) for name, value in own.items()}
        self._start = matrix.sets, matrix.values
        if self.free:
            self._keep_codes()

    def _keep_codes(self) -> None:
        """Move the latent weights of columns that would change their codes to what these decode to.

        The codes are those of the start; scales decide too which are the nearest.
        """
        sets, values = self._start
        before = self._sparse(sets, values)
        changed = (self._sparse(*self._columns()) != before).getnnz(axis=1) > 0
        codes = rounded_codes(self.parameters["c"], self._most)
        C = codes * self.parameters["scales"].astype(np.float64)
        self.parameters["weights"][changed] = before[changed] @ C.T

    @property
    def _most(self) -> int:
        """The largest code of C."""
        bits = self.matrix.setting.c_bits
        return int(2 ** (bits - 1) - 1)

    def _columns(self) -> tuple[Array, Array]:
        """Return support and values of the columns of Z, (p, s), that latent values stand for."""
        st, p = self.matrix.setting, self.parameters
        if self.free:
            return self._nearest(p["weights"])
        z = p["z"]
        if st.full:
            return self.matrix.sets, rounded_codes(z, st.z_max)
        if st.z_max == 0:
            return self.matrix.sets, np.ones(z.shape, np.int64)
        size = np.maximum(rounded_codes(np.abs(z), st.z_max), 1)
        return self.matrix.sets, np.where(z < 0, -size, size)

    def _nearest(self, weights: Array) -> tuple[Array, Array]:
        """Return the codes (p, s) near to columns (p, d), searched from those of the start."""
        st = self.matrix.setting
        codes = rounded_codes(self.parameters["c"], self._most)
        sets, values = (np.array(codes, np.int64, order="C") for codes in self._start)
        pursue(weights, codes * self.parameters["scales"], st.z_max, _PASSES, sets, values)
        return sets, values

    def _projected(self) -> tuple[Array, Array, Array]:
        return rounded_codes(self.parameters["c"], self._most), *self._columns()

    def _pull(self, gradient: Array, parts: list[Array]) -> tuple[Array, Array]:
        columns, atoms = super()._pull(gradient, parts)
        codes, sets, _ = parts
        st, p, scales = self.matrix.setting, self.parameters, self.parameters["scales"]
        self.gradients["c"] += inward((atoms * scales[:, None]).T, p["c"], self._most)
        if self.free:
            self.gradients["weights"] += columns
            return columns, atoms
        C = (codes * scales).astype(self.dtype)
        if st.full:
            own = columns @ C
        else:
            own = np.stack(
                [np.einsum("pd,pd->p", columns, C.T[sets[:, slot]]) for slot in range(st.s)], axis=1
            )
        self.gradients["z"] += inward(own, p["z"], max(st.z_max, 1))
        return columns, atoms

    def refit(self, data: Moments) -> None:
        """Set the scales and the bias, see `QSWDLinear.refit`; the codes stay as they are."""
        parts = self._projected()
        self._refit(data, *parts)
        if self.free:
            self._start = parts[1:]
            self._keep_codes()

    def rounded(self) -> LatentQSWDLinear:
        """Return a new layer as it is after storing; its latent values start at the codes."""
        support = "free" if self.free else "fixed"
        return LatentQSWDLinear(
            self.to_matrix(), self.parameters["bias"], self.dtype, support=support
        )
