"""`CodedLinear`: integer codes as a layer whose scales and bias alone are trained.

The comparison of the DiBA paper: the same retuning, of what an integer code has to retune.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.layers.linear import Layer, check_bias, check_float
from diba_np.matrix.quality import retuned
from diba_np.methods.fitting import half_of
from diba_np.methods.scalar import ScalarQuantized, group_index, group_starts
from diba_np.training.moments import Moments, ridge_of

Array = NDArray[Any]


class CodedLinear(Layer):
    """``y = x A_hat^T + bias`` where ``A_hat_ij = s_ig table[code_ij]`` and only s, bias train.

    Parameters
    ----------
    coded : ScalarQuantized, (m, n)
        Of `diba_np.methods`: "rtn", "nf", "gptq", "sign" or "bitat".
    bias : (m,) array_like, optional
    dtype : {float32, float64}

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``scales (m, groups)``, ``bias (m,)``; to be changed in place.
    coded : ScalarQuantized
        The start.

    Notes
    -----
    Holds the values of the codes unpacked, m n entries of `dtype`; a forward makes as many where
    rows have several scales.
    """

    def __init__(
        self, coded: ScalarQuantized, bias: ArrayLike | None = None, dtype: DTypeLike = np.float32
    ) -> None:
        if not isinstance(coded, ScalarQuantized):
            raise TypeError(f"coded must be a ScalarQuantized, got {type(coded).__name__}")
        kind = check_float(dtype)
        m, n = (int(size) for size in coded.shape)
        self.coded = coded
        values = np.asarray(coded.table, np.float64)[coded.codes]
        self._values = values.astype(kind)
        kept = self._values.shape[1]
        self._kept: Any = slice(None) if coded.kept.all() else coded.kept  # a slice makes no copy
        self._starts = group_starts(kept, coded.group)[: coded.scales.shape[1]]
        self._group = group_index(kept, coded.group)
        scales = coded.scales.astype(np.float64) * coded.scale
        parameters = {"scales": scales.astype(kind), "bias": np.array(check_bias(bias, m), kind)}
        super().__init__((m, n), parameters, kind)

    def _weights(self) -> Array:
        """Return the matrix of the kept columns."""
        weights: Array = self._values * self.parameters["scales"][:, self._group]
        return weights

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        x, scales = samples[:, self._kept], self.parameters["scales"]
        if scales.shape[1] == 1:  # a scale a row is a diagonal: nothing of size m n is made
            t = x @ self._values.T
            return t * scales[:, 0] + self.parameters["bias"], t
        weights = self._weights()
        return x @ weights.T + self.parameters["bias"], (x, weights)

    def frozen(self) -> Callable[[ArrayLike], Array]:
        """Return what gives the outputs of many samples, until the parameters change."""
        turned = np.zeros(self.shape[::-1], self.dtype)
        turned[self._kept] = self._weights().T
        return self._through(turned, self.parameters["bias"])

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        scales = self.parameters["scales"]
        self.gradients["bias"] += g.sum(axis=0)
        gx = np.zeros_like(samples)
        if scales.shape[1] == 1:
            self.gradients["scales"][:, 0] += np.einsum("ij,ij->j", g, kept)
            gx[:, self._kept] = (g * scales[:, 0]) @ self._values
            return gx
        x, weights = kept
        if self._starts.size:
            pulled = (g.T @ x) * self._values
            self.gradients["scales"] += np.add.reduceat(pulled, self._starts, axis=1)
        gx[:, self._kept] = g @ weights
        return gx

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, without bias, and what takes their gradient."""
        flat = np.asarray(ids, np.intp).reshape(-1)
        values, scales = self._values[flat], self.parameters["scales"]
        rows = np.zeros((len(flat), self.shape[1]), self.dtype)
        rows[:, self._kept] = values * scales[flat][:, self._group]

        def back(gradient: Array) -> None:
            if self._starts.size:
                pulled = gradient.reshape(rows.shape)[:, self._kept] * values
                sums = np.add.reduceat(pulled, self._starts, axis=1)
                np.add.at(self.gradients["scales"], flat, sums)

        return rows.reshape(*np.shape(ids), self.shape[1]), back

    def refit(self, data: Moments) -> None:
        """Set the scales to their least-squares values on moments, and the bias by the means.

        Cost: ``m n^2`` flops, and a system of the groups for each row.
        """
        values, kept = self._values.astype(np.float64), self.coded.kept
        if self._starts.size:
            H, c = data.xx[np.ix_(kept, kept)], data.yx[:, kept]
            right = np.add.reduceat(c * values, self._starts, axis=1)
            scales = self.parameters["scales"]
            member = self._group == np.arange(scales.shape[1])[:, None]
            for i, row in enumerate(values):
                grouped = member * row
                normal = grouped @ H @ grouped.T
                low = np.float64(ridge_of(normal))
                normal[np.diag_indices_from(normal)] += low
                scales[i] = np.linalg.solve(normal, right[i] + low * scales[i])
        mean = self._weights().astype(np.float64) @ data.x_mean[kept]
        self.parameters["bias"][...] = data.y_mean - mean

    def rounded(self) -> CodedLinear:
        """Return a new layer as it is after storing: scales rounded to 16 bits."""
        return CodedLinear(self.to_matrix(), self.parameters["bias"], self.dtype)

    def to_matrix(self) -> ScalarQuantized:
        """Return the coded matrix with the present scales, rounded to 16 bits."""
        f = self.coded
        scales, scale = half_of(self.parameters["scales"].astype(np.float64), f.scale, f.scales)
        moved = not np.array_equal(scales, f.scales)
        record = retuned(f.record) if moved else f.record
        return type(f)(f.shape, f.codes, f.levels, f.group, scales, f.kept, f.table, scale, record)
