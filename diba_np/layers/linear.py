"""`DiBALinear`: a factorization as a layer whose diagonals and bias can be trained.

`Layer` is what all trained layers have in common; `diba_np.layers.coded_linear` has the one of
the integer codes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.checks import as_real
from diba_np.matrix.diagonals import (
    DIAGONALS,
    SINGLE,
    fit_grid,
    half_diagonals,
    warn_of_zeros,
)
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.quality import retuned
from diba_np.matrix.terms import diagonal_names
from diba_np.products.product import Product
from diba_np.training.moments import LeastSquares, Moments

Array = NDArray[Any]
Own = TypeVar("Own", bound="Layer")

# In float32, on one thread, BLAS on an unpacked copy of the bits is the faster way for few bits,
# k (m + n) up to this over the root of the samples (the packed kernels' calls cost more than their
# work), and for a small k, up to this times their fifth root (tables cost more than they save).
_FEW_BITS, _SMALL_K = 1 << 16, 35
_MOST_UNPACKED = 1 << 20
_MOST_DOUBLE = 1 << 21  # float64 has the portable kernels only

_SWEEPS = 10  # of the closed forms in a refit


class Layer:
    """A linear layer with a bias: parameters that are trained in place, and their gradients.

    Parameters
    ----------
    shape : (int, int)
        (m, n): n inputs, m outputs.
    parameters : dict of str to ndarray
        Kept by reference; ``"bias"`` is one of them.
    dtype : {float32, float64}
        Of the arithmetic.

    Attributes
    ----------
    parameters : dict of str to ndarray
        To be changed in place.
    gradients : dict of str to ndarray
        The same shapes; sums over all samples since the last `zero_grad`.
    reads_signs : bool
        Whether of each input only the side of a threshold on which it lies counts.
    """

    reads_signs = False

    def __init__(
        self, shape: tuple[int, int], parameters: dict[str, Array], dtype: DTypeLike
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.parameters = parameters
        self.gradients = {name: np.zeros_like(value) for name, value in parameters.items()}
        self._seen: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: all but the last `forward`'s batch."""
        return {**self.__dict__, "_seen": None}

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        """Return the outputs (N, m) of (N, n) samples, and what `_backward` needs beside them."""
        raise NotImplementedError

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        """Add to the gradients; return the one (N, n) with respect to the samples."""
        raise NotImplementedError

    def to_matrix(self) -> Any:
        """Return the compressed matrix, its numbers rounded to 16 bits, without the bias."""
        raise NotImplementedError

    def rounded(self: Own) -> Own:
        """Return a new layer as it is after storing: all but the bias rounded to 16 bits."""
        raise NotImplementedError

    def refit(self, data: Moments) -> None:
        """Solve for the parameters by least squares on moments; the bias follows from the means."""
        raise NotImplementedError

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, without bias, and what takes their gradient.

        For embeddings: a layer that serves as the head at the same time gets the gradients of both.

        Parameters
        ----------
        ids : (...) int array
            Rows.

        Returns
        -------
        rows : (..., n) ndarray
        back : callable
            Takes the gradient with respect to the rows and adds to those of the parameters.
        """
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Set the accumulated gradients to zero."""
        for gradient in self.gradients.values():
            gradient[...] = 0

    def _real(self, values: ArrayLike, name: str) -> Array:
        """Return real numbers in the dtype of the arithmetic."""
        array = np.asarray(as_real(values, name, "hold real numbers"))
        return array.astype(self.dtype, copy=False)

    def twin(self: Own) -> Own:
        """Return a layer of the same parameters and gradients that remembers its own `forward`.

        For a layer that is applied several times in one pass: one twin for each place.
        """
        return copy.copy(self)

    def forward(self, x: ArrayLike) -> Array:
        """Return the outputs of (..., n) samples, (..., m), and keep what `backward` needs."""
        x = self._real(x, "x")
        m, n = self.shape
        if x.ndim == 0 or x.shape[-1] != n:
            raise ValueError(f"x must have shape (..., {n}), got {x.shape}")
        samples = x.reshape(-1, n)
        y, kept = self._forward(samples)
        self._seen = samples, kept
        return y.reshape(*x.shape[:-1], m)

    def __call__(self, x: ArrayLike) -> Array:
        """Return the outputs as `forward` does, and keep nothing."""
        before, self._seen = self._seen, None
        try:
            return self.forward(x)
        finally:
            self._seen = before

    def frozen(self) -> Callable[[ArrayLike], Array]:
        """Return what gives the outputs of many samples, until the parameters change.

        It goes through the dense matrix, ``m n`` entries, where that takes fewer operations.
        """
        return self

    def _through(self, turned: Array, bias: Array) -> Callable[[ArrayLike], Array]:
        """Return what gives ``x turned + bias``, turned (n, m)."""

        def apply(x: ArrayLike) -> Array:
            y: Array = self._real(x, "x") @ turned
            y += bias
            return y

        return apply

    def backward(self, gy: ArrayLike) -> Array:
        """Add to the gradients and return the one with respect to x.

        Parameters
        ----------
        gy : (..., m) array_like
            Gradient of the loss with respect to the last output of `forward`.

        Returns
        -------
        (..., n) ndarray
        """
        gy = self._real(gy, "gy")
        if self._seen is None:
            raise ValueError("backward needs a forward before it")
        m, n = self.shape
        if gy.ndim == 0 or gy.shape[-1] != m:
            raise ValueError(f"gy must have shape (..., {m}), got {gy.shape}")
        samples, kept = self._seen
        g = gy.reshape(-1, m)
        if len(g) != len(samples):
            raise ValueError(f"gy must hold {len(samples)} samples as x did, got {len(g)}")
        return self._backward(g, samples, kept).reshape(*gy.shape[:-1], n)


def check_bias(bias: ArrayLike | None, m: int) -> Array:
    """Return the start of a bias of m outputs, zeros for None."""
    start = np.zeros(m) if bias is None else np.asarray(as_real(bias, "bias", "hold real numbers"))
    if start.shape != (m,):
        raise ValueError(f"bias must have shape ({m},), got {start.shape}")
    if not np.isfinite(start).all():
        raise ValueError("bias must hold finite real numbers")
    return start


def check_float(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the dtype of a layer's arithmetic, float32 or float64."""
    kind = np.dtype(dtype)
    if kind not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype must be float32 or float64, got {kind}")
    return kind


class DiBALinear(Layer):
    """``y = d1 * (B1 (d2 * (B2 (d3 * x)))) + bias`` with gradients written by hand.

    Of a factorization of several terms, the sum of that over its terms. The binary matrices are
    frozen (DiBARD, arXiv 2605.05994). For a network of one's own: call
    `forward`, then `backward` with the loss's gradient; gradients add up until `zero_grad`.
    `diba_np.training.optimisers` has an optimiser and a loop.

    Parameters
    ----------
    factors : DiBAFactors
        Where the bits come from and the diagonals start.
    bias : (m,) array_like, optional
        Start of the bias; by default that of `factors`, or zero.
    dtype : {float32, float64}
        Of the parameters and the arithmetic.
    unpack : bool or "auto"
        Whether products go through BLAS on an unpacked copy of the binaries, which takes
        ``k (m + n)`` entries of `dtype`, instead of through the packed kernels. "auto" unpacks
        where that is faster for a batch of N samples: in float32 where
        ``k (m + n) <= 2^16 / sqrt(N)`` or ``k <= 35 N^(1/5)``, up to 2^20 bits; in float64 up to
        2^21 bits. The copy is made when first used and takes at most 4 MiB, 16 MiB in float64.

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``d1 (m,)``, ``d2 (k,)``, ``d3 (n,)``, ``bias (m,)``; to be changed in place. Of several
        terms ``d1.0`` to ``d3.0``, ``d1.1`` and so on.
    gradients : dict of str to ndarray
        The same shapes; sums over all samples since the last `zero_grad`.
    factors : DiBAFactors
        The start.

    Notes
    -----
    With ``u = d3 x``, ``v = B2 u``, ``t = B1 (d2 v)`` and upstream gradient g:
    ``g_d1 = sum(g t)``, ``r = B1^T (d1 g)``, ``g_d2 = sum(r v)``, ``e = B2^T (d2 r)``,
    ``g_d3 = sum(e x)``, ``g_x = d3 e``, ``g_bias = sum(g)``.

    A forward keeps x, v and t of N samples: ``N (n + k + m)`` entries. Packed products of both
    directions hold two copies of the bits.

    Examples
    --------
    >>> import numpy as np, diba_np as dn
    >>> layer = DiBALinear(dn.factorize(np.eye(3) + 1, k=3))
    >>> y = layer.forward(np.ones((2, 3), np.float32))
    >>> layer.backward(np.ones_like(y)).shape, layer.gradients["bias"]
    ((2, 3), array([2., 2., 2.], dtype=float32))
    """

    def __init__(
        self,
        factors: DiBAFactors,
        bias: ArrayLike | None = None,
        dtype: DTypeLike = np.float32,
        unpack: bool | str = "auto",
    ) -> None:
        if not isinstance(factors, DiBAFactors):
            raise TypeError(f"factors must be a DiBAFactors, got {type(factors).__name__}")
        if unpack not in (True, False, "auto"):
            raise ValueError(f'unpack must be True, False or "auto", got {unpack!r}')
        kind = check_float(dtype)
        m, n = factors.shape
        self._names = diagonal_names(factors)
        parameters = {
            own: np.array(getattr(term, name), kind)
            for term, names in zip(factors.terms, self._names, strict=True)
            for name, own in names.items()
        }
        parameters["bias"] = np.array(check_bias(factors.bias if bias is None else bias, m), kind)
        super().__init__((m, n), parameters, kind)
        self.factors = factors
        self._unpack = unpack
        self._mixing: dict[tuple[int, str, bool], Any] = {}

    def unpacks(self, samples: int) -> bool:
        """Tell whether a batch of so many samples goes through BLAS."""
        if self._unpack != "auto":
            return bool(self._unpack)
        k = self.factors.k
        size, samples = k * sum(self.shape), max(samples, 1)
        if self.dtype == np.dtype(np.float64):
            return size <= _MOST_DOUBLE
        few, small = _FEW_BITS / math.sqrt(samples), _SMALL_K * samples**0.2
        return size <= _MOST_UNPACKED and (size <= few or k <= small)

    def _mix(self, term: int, side: str, samples: Array) -> Array:
        """Return ``samples (B - shift)^T`` for samples in rows; "b1.T" is the transpose of B1."""
        unpack = self.unpacks(len(samples))
        if (term, side, unpack) not in self._mixing:
            own = side[:2]
            bits = getattr(self.factors.terms[term], own)
            if unpack:
                values = bits.to_dense().astype(self.dtype)
                values -= self.factors.shift
                self._mixing[term, own, True] = values.T
                self._mixing[term, f"{own}.T", True] = values
            else:
                turned = bits.T if side.endswith(".T") else bits
                self._mixing[term, side, False] = Product(turned, shift=self.factors.shift)
        mixing = self._mixing[term, side, unpack]
        if unpack:
            product: Array = samples @ mixing
            return product
        rows: Array = mixing.rows(samples)
        return rows

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        p, kept = self.parameters, []
        y: Any = None
        for i, d in enumerate(self._names):
            v = self._mix(i, "b2", p[d["d3"]] * samples)
            t = self._mix(i, "b1", p[d["d2"]] * v)
            part = p[d["d1"]] * t
            y = part if y is None else y + part
            kept.append((v, t))
        y += p["bias"]
        return y, kept

    def frozen(self) -> Callable[[ArrayLike], Array]:
        """Return what gives the outputs of many samples, until the parameters change.

        Above a bit a weight, ``k (m + n) > m n``, it goes through the dense matrix: ``m n`` entries
        that are made in ``O(k m n)``.
        """
        f = self.factors
        if f.k * sum(self.shape) <= math.prod(self.shape):
            return self
        turned: Any = 0
        for term, names in zip(f.terms, self._names, strict=True):
            d1, d2, d3 = (self.parameters[names[name]] for name in DIAGONALS)
            b1, b2 = ((bits.to_dense() - f.shift).astype(self.dtype) for bits in (term.b1, term.b2))
            turned = turned + d3[:, None] * (b2.T @ (d2[:, None] * b1.T)) * d1
        return self._through(turned, self.parameters["bias"])

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        p = self.parameters
        self.gradients["bias"] += g.sum(axis=0)
        gx: Any = None
        for i, (d, (v, t)) in enumerate(zip(self._names, kept, strict=True)):
            r = self._mix(i, "b1.T", p[d["d1"]] * g)
            e = self._mix(i, "b2.T", p[d["d2"]] * r)
            self.gradients[d["d1"]] += np.einsum("ij,ij->j", g, t)
            self.gradients[d["d2"]] += np.einsum("ij,ij->j", r, v)
            self.gradients[d["d3"]] += np.einsum("ij,ij->j", e, samples)
            e *= p[d["d3"]]
            gx = e if gx is None else gx + e
        result: Array = gx
        return result

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, without bias, and what takes their gradient.

        Cost: ``2 k n`` flops a row on unpacked bits where there are few, else a packed product.
        """
        p, flat = self.parameters, np.asarray(ids, np.intp).reshape(-1)
        if not flat.size:
            return np.zeros((*np.shape(ids), self.shape[1]), self.dtype), lambda gradient: None
        parts = []
        for i, (term, d) in enumerate(zip(self.factors.terms, self._names, strict=True)):
            rows = term.b1[flat].to_dense().astype(self.dtype)
            rows -= self.factors.shift
            parts.append((rows, self._mix(i, "b2.T", rows * p[d["d1"]][flat, None] * p[d["d2"]])))

        def back(gradient: Array) -> None:
            for i, (d, (rows, w)) in enumerate(zip(self._names, parts, strict=True)):
                g, scale = gradient.reshape(w.shape), p[d["d1"]][flat, None]
                self.gradients[d["d3"]] += np.einsum("ij,ij->j", g, w)
                r = self._mix(i, "b2", g * p[d["d3"]]) * rows
                self.gradients[d["d2"]] += np.einsum("ij,ij->j", r, np.broadcast_to(scale, r.shape))
                np.add.at(self.gradients[d["d1"]], flat, r @ p[d["d2"]])

        values = [w * p[d["d3"]] for (_, w), d in zip(parts, self._names, strict=True)]
        vectors: Array = sum(values[1:], start=values[0])
        return vectors.reshape(*np.shape(ids), -1), back

    def refit(self, data: Moments) -> None:
        """Solve for the diagonals by least squares on moments; the bias follows from the means.

        Ten sweeps of the closed forms, each ``O((m + n) (k + n)^2 + k^3)``.
        """
        solver = LeastSquares(self.factors, data)
        solver.d = {name: self.parameters[name].astype(np.float64) for name in solver.d}
        for _ in range(_SWEEPS):
            solver.sweep()
        for name, values in solver.d.items():
            self.parameters[name][...] = values
        self.parameters["bias"][...] = data.y_mean - solver.apply(data.x_mean)

    def rounded(self) -> DiBALinear:
        """Return a new layer as it is after storing: diagonals rounded to 16 bits."""
        return DiBALinear(self.to_factors(), dtype=self.dtype, unpack=self._unpack)

    def to_matrix(self) -> DiBAFactors:
        """Return the factorization with the present diagonals, rounded to 16 bits, without bias.

        Where one has moved the record keeps no figures of the start.
        """
        f, p = self.factors, self.parameters
        now = [{name: p[own] for name, own in names.items()} for names in self._names]
        made = list(map(_rounded_term, f.terms, now))
        moved = any(_moved(term, vars(other)) for term, other in zip(f.terms, made, strict=True))
        return DiBAFactors.from_terms(made, retuned(f.record) if moved else f.record)

    def to_factors(self, record: dict[str, Any] | None = None) -> DiBAFactors:
        """Return the factorization with the present diagonals, rounded to 16 bits, and bias.

        Where the start's diagonals are codes of a few bits these are too: on its grids if they have
        not moved, on new ones of the same widths if they have. A bias of zeros is left out. The
        record is that of `to_matrix` unless another is given.
        """
        bias, stored = self.parameters["bias"], self.to_matrix()
        if record is not None:
            stored = stored.with_record(record)
        return stored.with_bias(bias.astype(np.float32) if bias.any() else None)


def _moved(f: DiBAFactors, d: Mapping[str, Array]) -> bool:
    """Tell whether diagonals are others than those of a term."""
    return any(not np.array_equal(d[name], getattr(f, name)) for name in DIAGONALS)


def _rounded_term(f: DiBAFactors, d: dict[str, Array]) -> DiBAFactors:
    """Return a term with other diagonals, of as many bits as it had: 16, 32 or codes."""
    grids = f.grids
    if grids is None and f.scale_bits == SINGLE:
        d1, d2, d3 = (d[name].astype(np.float32) for name in DIAGONALS)
    elif grids is None:
        d1, d2, d3 = half_diagonals(d["d1"], d["d2"], d["d3"])
    else:
        if _moved(f, d):
            g1, g2, g3 = (
                fit_grid(d[name], np.ones(d[name].size), grid.bits)
                for name, grid in zip(DIAGONALS, grids, strict=True)
            )
            grids = g1, g2, g3
        d1, d2, d3 = (grid.round(d[name]) for name, grid in zip(DIAGONALS, grids, strict=True))
    for name, rounded in (("d1", d1), ("d3", d3)):
        warn_of_zeros(name, d[name], rounded)
    return DiBAFactors(d1, f.b1, d2, f.b2, d3, f.shift, grids=grids)
