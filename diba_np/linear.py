"""`DiBALinear`: a factorization as a layer whose diagonals and bias can be trained."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.factors import DiBAFactors
from diba_np.products import Product
from diba_np.scales import round_diagonals, round_half

Array = NDArray[Any]

DIAGONALS = ("d1", "d2", "d3")


class DiBALinear:
    """``y = d1 * (B1 (d2 * (B2 (d3 * x)))) + bias`` with gradients written by hand.

    The binary matrices are frozen (DiBARD, arXiv 2605.05994). For a network of one's own: call
    `forward`, then `backward` with the loss's gradient; gradients add up until `zero_grad`.

    Parameters
    ----------
    factors : DiBAFactors
        Where the bits come from and the diagonals start.
    bias : (m,) array_like, optional
        Start of the bias; by default that of `factors`, or zero.
    dtype : {float32, float64}
        Of the parameters and the arithmetic.

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``d1 (m,)``, ``d2 (k,)``, ``d3 (n,)``, ``bias (m,)``; to be changed in place.
    gradients : dict of str to ndarray
        The same shapes; sums over all samples since the last `zero_grad`.

    Notes
    -----
    With ``u = d3 x``, ``v = B2 u``, ``t = B1 (d2 v)`` and upstream gradient g (METHODS 1.6):
    ``g_d1 = sum(g t)``, ``r = B1^T (d1 g)``, ``g_d2 = sum(r v)``, ``e = B2^T (d2 r)``,
    ``g_d3 = sum(e x)``, ``g_x = d3 e``, ``g_bias = sum(g)``.

    Examples
    --------
    >>> import numpy as np, diba_np as dn
    >>> layer = DiBALinear(dn.factorize(np.eye(3) + 1, k=3))
    >>> y = layer.forward(np.ones((2, 3), np.float32))
    >>> layer.backward(np.ones_like(y)).shape, layer.gradients["bias"]
    ((2, 3), array([2., 2., 2.], dtype=float32))
    """

    def __init__(
        self, factors: DiBAFactors, bias: ArrayLike | None = None, dtype: DTypeLike = np.float32
    ) -> None:
        if not isinstance(factors, DiBAFactors):
            raise TypeError(f"factors must be a DiBAFactors, got {type(factors).__name__}")
        kind = np.dtype(dtype)
        if kind not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype must be float32 or float64, got {kind}")
        m = factors.shape[0]
        start = factors.bias if bias is None else np.asarray(bias)
        start = np.zeros(m) if start is None else start
        if start.shape != (m,):
            raise ValueError(f"bias must have shape ({m},), got {start.shape}")
        self.factors = factors
        self.dtype = kind
        self.parameters: dict[str, Array] = {
            name: np.array(getattr(factors, name), kind) for name in DIAGONALS
        }
        self.parameters["bias"] = np.array(start, kind)
        self.gradients = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        self._seen: tuple[Array, Array, Array] | None = None
        sides = {"b1": factors.b1, "b2": factors.b2, "b1.T": factors.b1.T, "b2.T": factors.b2.T}
        self._mixing = {name: Product(bits, alpha=factors.shift) for name, bits in sides.items()}

    def _mix(self, side: str, samples: Array) -> Array:
        """Return ``samples (B - shift)^T`` for samples in rows."""
        return self._mixing[side].matrix(samples.T).T

    def zero_grad(self) -> None:
        """Set the accumulated gradients to zero."""
        for gradient in self.gradients.values():
            gradient[...] = 0

    def forward(self, x: ArrayLike) -> Array:
        """Return the outputs of (..., n) samples, (..., m), and keep what `backward` needs."""
        x = np.asarray(x, self.dtype)
        m, n = self.factors.shape
        if x.ndim == 0 or x.shape[-1] != n:
            raise ValueError(f"x must have shape (..., {n}), got {x.shape}")
        samples = x.reshape(-1, n)
        p = self.parameters
        v = self._mix("b2", p["d3"] * samples)
        t = self._mix("b1", p["d2"] * v)
        self._seen = samples, v, t
        return (p["d1"] * t + p["bias"]).reshape(*x.shape[:-1], m)

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
        gy = np.asarray(gy, self.dtype)
        if self._seen is None:
            raise ValueError("backward needs a forward before it")
        samples, v, t = self._seen
        m, n = self.factors.shape
        g = gy.reshape(-1, m)
        if len(g) != len(samples):
            raise ValueError(f"gy must hold {len(samples)} samples as x did, got {len(g)}")
        p = self.parameters
        r = self._mix("b1.T", p["d1"] * g)
        e = self._mix("b2.T", p["d2"] * r)
        self.gradients["d1"] += np.einsum("ij,ij->j", g, t)
        self.gradients["d2"] += np.einsum("ij,ij->j", r, v)
        self.gradients["d3"] += np.einsum("ij,ij->j", e, samples)
        self.gradients["bias"] += g.sum(axis=0)
        return (p["d3"] * e).reshape(*gy.shape[:-1], n)

    def to_factors(self, record: dict[str, Any] | None = None) -> DiBAFactors:
        """Return the factorization with the present diagonals and bias, rounded to 16 bits.

        A bias of zeros is left out. The record is that of the start unless another is given.
        """
        f, p = self.factors, self.parameters
        d1, d2, d3 = round_diagonals(p["d1"], p["d2"], p["d3"])
        return DiBAFactors(
            d1,
            f.b1,
            d2,
            f.b2,
            d3,
            f.shift,
            f.record if record is None else record,
            bias=round_half(p["bias"]) if p["bias"].any() else None,
        )
