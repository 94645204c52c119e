"""`BiTATLinear`: signs trained by latent values; inputs as they are, or one bit of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.layers.linear import Layer, check_bias, check_float
from diba_np.layers.straight_through import check_weight, inward
from diba_np.matrix.quality import retuned
from diba_np.methods.binary_bitat import BinaryBiTAT, SignProduct
from diba_np.methods.bitat import BiTAT
from diba_np.methods.fitting import half_of
from diba_np.training.moments import RIDGE, Moments

Array = NDArray[Any]

# Latent values are in units of their row's scale, where weights are of size 1 on the average. Those
# further out would take too long to come back.
BOUND = 2.0
_LEAST = 0.02  # a latent value starts no nearer to a change of sign


class BiTATLinear(Layer):
    """``y = scales * (sign(v) x) + bias`` where the latent values v, scales and bias train.

    With a `BinaryBiTAT` the inputs too are signs, ``b = sign(x - t)``, and y is
    ``scales * input_scale * (sign(v) b) + bias`` with thresholds t and their scale trained.

    Gradients pass straight through signs. A latent value gets the gradient of ``scale_i v_ij`` in
    place of ``scale_i sign(v_ij)``, none where it lies beyond `BOUND` and would move further. An
    input and its threshold get the one of ``clip(x - t, -input_scale, input_scale)`` in place of
    ``input_scale sign(x - t)``. Those of scales and bias are exact.

    Parameters
    ----------
    matrix : BiTAT or BinaryBiTAT, (m, n)
        Columns that are not stored stay zeros.
    bias : (m,) array_like, optional
    dtype : {float32, float64}
    weight : (m, n) array_like, optional
        Dense weights: a latent value starts as large as its weight is against the scale of its row,
        with the sign that the matrix has. By default all start at a half.

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``signs (m, nk)``, the latent values of the nk stored columns, ``scales (m,)``,
        ``bias (m,)``; with one-bit inputs ``thresholds (nk,)`` and ``input_scale (1,)``.
    matrix : BiTAT
        The start.
    reads_signs : bool
        Whether inputs are one bit each.

    Notes
    -----
    A forward or backward takes what a dense layer does. `frozen` multiplies one-bit inputs by XNOR
    and popcount, 64 weights a step.
    """

    def __init__(
        self,
        matrix: BiTAT,
        bias: ArrayLike | None = None,
        dtype: DTypeLike = np.float32,
        weight: ArrayLike | None = None,
    ) -> None:
        if not isinstance(matrix, BiTAT):
            raise TypeError(f"matrix must be a BiTAT, got {type(matrix).__name__}")
        kind = check_float(dtype)
        m, n = (int(size) for size in matrix.shape)
        scales = 0.5 * matrix.scales[:, 0].astype(np.float64) * matrix.scale
        signs = np.where(matrix.codes > 0, 1.0, -1.0)
        size = np.full(signs.shape, 0.5)
        if weight is not None:
            row = np.where(scales != 0, np.abs(scales), 1.0)[:, None]
            size = np.abs(check_weight(weight, (m, n))[:, matrix.kept]) / row
        signs *= np.clip(size, _LEAST, BOUND)
        own = {"signs": signs, "scales": scales, "bias": check_bias(bias, m)}
        if isinstance(matrix, BinaryBiTAT):
            own["thresholds"] = matrix.sides()
            own["input_scale"] = np.array([matrix.input_scale])
        super().__init__((m, n), {name: np.array(a, kind) for name, a in own.items()}, kind)
        self.matrix = matrix
        self._one: Any = kind.type(1)
        self.reads_signs = isinstance(matrix, BinaryBiTAT)
        self._kept: Any = slice(None) if matrix.kept.all() else matrix.kept

    def _signs(self) -> Array:
        """Return the signs of the latent values, +1 for 0."""
        signs: Array = np.where(self.parameters["signs"] >= 0, self._one, -self._one)
        return signs

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        p, x, size = self.parameters, samples[:, self._kept], self._one
        if self.reads_signs:
            x = np.where(x >= p["thresholds"], self._one, -self._one)
            size = p["input_scale"][0]
        signs = self._signs()
        t = x @ signs.T
        return t * (p["scales"] * size) + p["bias"], (x, signs, t)

    def frozen(self) -> Callable[[ArrayLike], Array]:
        """Return what gives the outputs of many samples, until the parameters change.

        With one-bit inputs it multiplies packed signs, in float32.
        """
        p = self.parameters
        if not self.reads_signs:
            turned = np.zeros(self.shape[::-1], self.dtype)
            turned[self._kept] = (self._signs() * p["scales"][:, None]).T
            return self._through(turned, p["bias"].copy())
        scales = p["scales"] * p["input_scale"]
        product = SignProduct(self._signs(), p["thresholds"], scales, p["bias"])
        return lambda x: product(self._real(x, "x")[..., self._kept])

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        x, signs, t = kept
        p, gradients = self.parameters, self.gradients
        size = p["input_scale"][0] if self.reads_signs else self._one
        gradients["bias"] += g.sum(axis=0)
        pulled = np.einsum("ij,ij->j", g, t)
        gradients["scales"] += pulled * size
        turned = g * p["scales"]
        gradients["signs"] += inward((turned.T @ x) * size, p["signs"], BOUND)
        back = turned @ signs
        gx = np.zeros_like(samples)
        if self.reads_signs:
            gradients["input_scale"] += pulled @ p["scales"]
            back *= np.abs(samples[:, self._kept] - p["thresholds"]) <= np.abs(size)
            gradients["thresholds"] -= back.sum(axis=0)
        gx[:, self._kept] = back
        return gx

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, and what takes their gradient; see `Layer.lookup`."""
        p, flat = self.parameters, np.asarray(ids, np.intp).reshape(-1)
        signs, scales = self._signs()[flat], p["scales"][flat, None]
        rows = np.zeros((len(flat), self.shape[1]), self.dtype)
        rows[:, self._kept] = signs * scales

        def back(gradient: Array) -> None:
            own = gradient.reshape(rows.shape)[:, self._kept]
            np.add.at(self.gradients["scales"], flat, np.einsum("ij,ij->i", own, signs))
            np.add.at(self.gradients["signs"], flat, inward(own * scales, p["signs"][flat], BOUND))

        return rows.reshape(*np.shape(ids), self.shape[1]), back

    def refit(self, data: Moments) -> None:
        """Set the scales to their least-squares values on moments, and the bias by the means.

        Of a layer with one-bit inputs the moments are those of ``input_scale sign(x - t)``. Cost:
        ``m n^2`` flops.
        """
        kept, signs = self.matrix.kept, self._signs().astype(np.float64)
        xx, scales = data.xx[np.ix_(kept, kept)], self.parameters["scales"]
        top = np.einsum("ij,ij->i", signs, data.yx[:, kept])
        bottom = np.einsum("ij,ij->i", signs @ xx, signs)
        low = RIDGE * float(bottom.mean()) + np.finfo(np.float64).tiny
        scales[...] = (top + low * scales) / (bottom + low)
        mean = (signs @ data.x_mean[kept]) * scales
        self.parameters["bias"][...] = data.y_mean - mean

    def rounded(self) -> BiTATLinear:
        """Return a new layer as it is after storing, scales and thresholds rounded to 16 bits.

        Its latent values are those of this one, as far as signs go alone a file keeps them.
        """
        other = BiTATLinear(self.to_matrix(), self.parameters["bias"], self.dtype)
        other.parameters["signs"][...] = self.parameters["signs"]
        return other

    def to_matrix(self) -> BiTAT:
        """Return the matrix with the present signs and scales, these rounded to 16 bits."""
        f, p = self.matrix, self.parameters
        codes = (p["signs"] >= 0).astype(np.uint8)
        scales, scale = half_of(2.0 * p["scales"].astype(np.float64), f.scale, f.scales[:, 0])
        same = np.array_equal(codes, f.codes) and np.array_equal(scales, f.scales[:, 0])
        record = f.record if same else retuned(f.record)
        made = type(f)(
            f.shape, codes, f.levels, f.group, scales[:, None], f.kept, f.table, scale, record
        )
        if isinstance(made, BinaryBiTAT):
            own = p["thresholds"].astype(np.float64)
            made.thresholds, made.threshold_unit = half_of(own, f.threshold_unit, f.thresholds)
            made.input_scale = float(p["input_scale"][0])
        return made
