"""`TrellisLinear`: a linear trellis code as a layer, the scales of rows and columns trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.layers.linear import Layer, check_bias, check_float
from diba_np.matrix.diagonals import LogGrid, fit_grid
from diba_np.matrix.quality import retuned
from diba_np.methods.linear_trellis import LinearTrellis, Values
from diba_np.methods.trellis_fit import scales_of, turned, turned_back
from diba_np.training.moments import RIDGE, Moments, ridge_of

Array = NDArray[Any]

_SWEEPS = 5  # of the closed forms in a refit


class TrellisLinear(Layer):
    """``y = R_out^T (d1 * (V (d3 * (R_in x)))) + bias`` with gradients written by hand.

    V is what the paths stand for, (m, n), the rotations are those of the matrix; both are frozen.
    So is the part of low rank that some matrices have; its product is added.

    Parameters
    ----------
    matrix : LinearTrellis, (m, n)
        Where the paths come from and the scales start.
    bias : (m,) array_like, optional
    dtype : {float32, float64}
        Of the parameters and the arithmetic.

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``d1 (m,)`` and ``d3 (n,)``, those that the matrix has, or ``gain (1,)`` where it has
        neither; ``bias (m,)``. To be changed in place.
    matrix : LinearTrellis
        The start.

    Notes
    -----
    With ``z = R_in x``, ``t = V (d3 z)``, ``h = R_out g`` of an upstream gradient g and
    ``e = V^T (d1 h)``: ``g_d1 = sum(h t)``, ``g_d3 = sum(e z)``, ``g_x = R_in^T (d3 e)``,
    ``g_bias = sum(g)``.

    A forward keeps z and t of N samples: ``N (n + m)`` entries. Products of both directions come
    from the packed bits and hold a copy of them each.

    Examples
    --------
    >>> import numpy as np
    >>> from diba_np.methods import fit
    >>> layer = TrellisLinear(fit("linear-trellis", np.eye(32) + 1, 3.0))
    >>> y = layer.forward(np.ones((2, 32), np.float32))
    >>> layer.backward(np.ones_like(y)).shape, layer.gradients["bias"][:3]
    ((2, 32), array([2., 2., 2.], dtype=float32))
    """

    def __init__(
        self,
        matrix: LinearTrellis,
        bias: ArrayLike | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if not isinstance(matrix, LinearTrellis):
            raise TypeError(f"matrix must be a LinearTrellis, got {type(matrix).__name__}")
        kind = check_float(dtype)
        m, n = (int(size) for size in matrix.shape)
        coded = matrix.coded
        scales = {
            name: scales_of(stored, size).astype(np.float64)
            for name, stored, size in (("d1", coded.rows, m), ("d3", coded.columns, n))
            if stored is not None
        } or {"gain": np.ones(1)}
        self._first = next(iter(scales))  # holds the scale of the matrix too
        scales[self._first] *= matrix.scale
        parameters = {name: value.astype(kind) for name, value in scales.items()}
        self._start = {name: value.copy() for name, value in parameters.items()}
        parameters["bias"] = np.array(check_bias(bias, m), kind)
        super().__init__((m, n), parameters, kind)
        self.matrix, self._low = matrix, coded.low
        self._values = Values(matrix.modes, coded, (m, n))
        self._ones = {"d1": np.ones((1, 1), kind), "d3": np.ones((1, 1), kind)}

    def _scales(self, name: str) -> Array:
        """Return scales of rows or columns as a column; the gain stands for those of rows."""
        found = self.parameters.get(name)
        if found is None and name == "d1":
            found = self.parameters.get("gain")
        return self._ones[name] if found is None else found[:, None]

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        outputs, inputs = self.matrix.turns
        z = np.ascontiguousarray(samples.T)
        z = z if inputs is None else inputs.apply(z)
        t = self._values.multiply(self._scales("d3") * z)[0]
        y = self._scales("d1") * t
        y = y if outputs is None else outputs.apply_transposed(y)
        if self._low is not None:
            y = y + self._low.multiply(samples.T)
        turned_y = np.ascontiguousarray(y.T)
        turned_y += self.parameters["bias"]
        return turned_y, (z, t)

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        outputs, inputs = self.matrix.turns
        z, t = kept
        self.gradients["bias"] += g.sum(axis=0)
        h = np.ascontiguousarray(g.T)
        h = h if outputs is None else outputs.apply(h)
        if "d1" in self.gradients:
            self.gradients["d1"] += np.einsum("ij,ij->i", h, t)
        elif "gain" in self.gradients:
            self.gradients["gain"] += np.vdot(h, t)
        e = self._values.multiply_transposed(self._scales("d1") * h)
        if "d3" in self.gradients:
            self.gradients["d3"] += np.einsum("ij,ij->i", e, z)
        gx = self._scales("d3") * e
        gx = gx if inputs is None else inputs.apply_transposed(gx)
        if self._low is not None:
            gx = gx + self._low.multiply_transposed(g.T)
        return np.ascontiguousarray(gx.T)

    def _dense(self) -> Array:
        """Return the matrix (m, n) float64 with the present scales."""
        V = self.matrix.coded.values(self.matrix.modes, self.shape[0]).astype(np.float64)
        dense = turned_back(self._scales("d1") * V * self._scales("d3").T, *self.matrix.turns)
        return dense if self._low is None else dense + self._low.rows()

    def frozen(self) -> Callable[[ArrayLike], Array]:
        """Return what gives the outputs of many samples, until the parameters change."""
        turned_dense = np.ascontiguousarray(self._dense().T.astype(self.dtype))
        return self._through(turned_dense, self.parameters["bias"])

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, without bias, and what takes their gradient.

        Cost: 12 to 15 n sums a row; where outputs are rotated, a product with m entries a row.
        """
        outputs, inputs = self.matrix.turns
        flat = np.asarray(ids, np.intp).reshape(-1)
        h = None  # what the rows of the matrix are of those of V
        if outputs is None:
            values = self._values.rows(flat).astype(self.dtype).T
            at = flat if "d1" in self.parameters else np.zeros_like(flat)
            own = self._scales("d1")[at, 0]
            e = values * own
        else:
            picked = np.zeros((self.shape[0], len(flat)), self.dtype)
            picked[flat, np.arange(len(flat))] = 1
            h = outputs.apply(picked)
            e = self._values.multiply_transposed(self._scales("d1") * h)
        rows = self._scales("d3") * e
        rows = rows if inputs is None else inputs.apply_transposed(rows)
        if self._low is not None:
            rows = rows + self._low.rows(flat).T.astype(self.dtype)

        def back(gradient: Array) -> None:
            g = np.ascontiguousarray(gradient.reshape(len(flat), self.shape[1]).T)
            g = g if inputs is None else inputs.apply(g)
            if "d3" in self.gradients:
                self.gradients["d3"] += np.einsum("ij,ij->i", g, e)
            pulled = self._scales("d3") * g
            if h is not None:
                t = self._values.multiply(pulled)[0]
                if "gain" in self.gradients:
                    self.gradients["gain"] += np.vdot(h, t)
            elif "d1" in self.gradients:
                np.add.at(self.gradients["d1"], flat, np.einsum("ij,ij->j", pulled, values))
            elif "gain" in self.gradients:
                self.gradients["gain"] += np.vdot(pulled, values)

        return np.ascontiguousarray(rows.T).reshape(*np.shape(ids), self.shape[1]), back

    def refit(self, data: Moments) -> None:
        """Set the scales to their least-squares values on moments, and the bias by the means.

        Five sweeps of the closed forms, each ``O(m n^2 + n^3)``.
        """
        outputs, inputs = self.matrix.turns
        V = self.matrix.coded.values(self.matrix.modes, self.shape[0]).astype(np.float64)
        yx = data.yx if self._low is None else data.yx - self._low.rows() @ data.xx
        xx, yx = turned(data.xx, inputs, inputs), turned(yx, outputs, inputs)
        p = {name: value.astype(np.float64) for name, value in self.parameters.items()}
        d1, d3 = (p.get(name, np.ones(1)) for name in ("d1", "d3"))
        tiny = np.finfo(np.float64).tiny
        for _ in range(_SWEEPS):
            q = V * d3
            normal, right = np.einsum("ij,ij->i", q @ xx, q), np.einsum("ij,ij->i", q, yx)
            if "gain" in p:
                low = tiny + RIDGE * normal.sum()
                p["gain"][0] = (right.sum() + low * p["gain"][0]) / (normal.sum() + low)
                break
            if "d1" in p:
                low = tiny + RIDGE * float(normal.mean())
                d1 = (right + low * d1) / (normal + low)
            if "d3" in p:
                q = V * d1[:, None]
                normal, right = (q.T @ q) * xx, np.einsum("ij,ij->j", q, yx)
                low = np.float64(ridge_of(normal))
                normal[np.diag_indices_from(normal)] += low
                d3 = np.linalg.solve(normal, right + low * d3)
        for name, value in (("d1", d1), ("d3", d3), ("gain", p.get("gain"))):
            if name in p:
                self.parameters[name][...] = value
        self.parameters["bias"][...] = data.y_mean - self._dense() @ data.x_mean

    def rounded(self) -> TrellisLinear:
        """Return a new layer as it is after storing: scales as their codes hold them."""
        return TrellisLinear(self.to_matrix(), self.parameters["bias"], self.dtype)

    def to_matrix(self) -> LinearTrellis:
        """Return the matrix with the present scales, coded in as many bits as they had.

        On the grids of the start if they have not moved, on new ones if they have.
        """
        f = self.matrix
        moved = [
            n for n, value in self._start.items() if not np.array_equal(value, self.parameters[n])
        ]
        if not moved:
            return f
        scale = f.scale or 1.0
        changed: dict[str, tuple[LogGrid, Array]] = {}
        for name, stored in (("d1", f.coded.rows), ("d3", f.coded.columns)):
            if stored is not None and name in moved:
                values = self.parameters[name].astype(np.float64)
                values = values / scale if name == self._first else values
                grid = fit_grid(values, np.ones(values.size), stored[0].bits)
                changed["rows" if name == "d1" else "columns"] = (grid, grid.encode(values))
        if "gain" in self.parameters:
            scale = float(self.parameters["gain"][0])
        coded = dataclasses.replace(f.coded, **changed)  # type: ignore[arg-type]
        return type(f)(f.shape, coded, f.seed, scale, retuned(f.record))
