"""BiTAT: signs with a scale a row, binarized in the order of importance of the inputs.

G. Park et al., arXiv 2207.01394 (the abstract names an input-dependent rotation, an
importance vector and progressive layer-wise quantization; the procedure is decided here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from diba_np.kernels.signs import flip_signs
from diba_np.matrix.base import Array
from diba_np.methods.feedback import output_error, sequential_rounding
from diba_np.methods.fitting import check_problem, gram, to_half, too_small
from diba_np.methods.rounding import sign_columns
from diba_np.methods.scalar import ScalarQuantized, least_bits, uniform_values

if TYPE_CHECKING:
    from typing_extensions import Self


PAIR_LIMIT = 1 << 31  # pairs of signs are tried while m n^2 stays under this
ORDERS = ("plain", "ascending", "natural", "descending")


def row_scales(S: Array, W: Array, H: Array) -> Array:
    """Return ``alpha_i = s_i^T H w_i / s_i^T H s_i``, (m,) float64."""
    top = np.sum((S @ H) * W, axis=1)
    bottom = np.sum((S @ H) * S, axis=1)
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), 0.0)


def binarize(
    W: Array,
    H: Array,
    order: str = "descending",
    flips: bool = True,
    rounds: int = 4,
    passes: int = 8,
    kept: Array | None = None,
) -> tuple[Array, Array]:
    """Return signs and row scales of W under the Gram matrix H.

    Parameters
    ----------
    W : (m, n) float64
    H : (n, n) float64, positive definite
    order : {"plain", "ascending", "natural", "descending"}
        "plain" takes the signs as they are; the others binarize column after column in
        the order of their importance, spreading each error over those still to come.
    flips : bool
        Repeat exact flip passes (single signs, and pairs where m n^2 <= 2^31) with joint
        scales, and the scales, up to `rounds` times.
    passes : int
        Flip passes in a round.
    kept : (n,) bool, optional
        Columns that are stored; the others are zeroed first.

    Returns
    -------
    S : (m, n) float64
        -1 and 1; 0 in a column that is not stored.
    alpha : (m,) float64

    Notes
    -----
    O(m n^2). Scales during the sequential pass are ``mean |w|`` of the row. The importance of a
    column is the diagonal entry of H: ``sum_k V_jk^2 s_k^2`` where ``H = V diag(s^2) V^T``.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    n = W.shape[1]
    kept = np.ones(n, bool) if kept is None else kept
    alpha = np.mean(np.abs(W[:, kept]), axis=1)
    importance = np.diagonal(H)
    if order == "plain":
        S = np.where(W >= 0, 1.0, -1.0) * kept
    else:
        if order == "natural":
            columns = np.arange(n)
        else:
            falling = order == "descending"
            columns = np.argsort(-importance if falling else importance, kind="stable")
        columns = np.concatenate([columns[~kept[columns]], columns[kept[columns]]])

        def quantize(position: int, rest: Array) -> Array:
            if not kept[columns[position]]:
                return np.zeros(len(alpha))
            values: Array = np.where(rest[0] >= 0, alpha, -alpha)
            return values

        S = np.where(sequential_rounding(W, H, columns, quantize) >= 0, 1.0, -1.0) * kept
        S[alpha == 0] = np.where(W[alpha == 0] >= 0, 1.0, -1.0) * kept
    if order != "plain" or flips:
        alpha = row_scales(S, W, H)
    if flips:
        C = np.ascontiguousarray(W @ H)
        visit = np.argsort(-importance, kind="stable")
        gain = np.empty(len(W))
        pairs = W.size * n <= PAIR_LIMIT
        H = np.ascontiguousarray(H)
        for _ in range(rounds):
            # a negative scale is the same row with all signs turned
            turned = alpha < 0
            S[turned] *= -1.0
            made = flip_signs(H, C, visit, passes, pairs, S, gain)
            alpha = row_scales(S, W, H)
            if made == 0:
                break
    return S, alpha


class BiTAT(ScalarQuantized):
    """``A_hat = scale * diag(alpha) S`` with S = +-1: one bit a weight, one scale a row.

    Bits: ``m n + 16 m``. Under that budget the least important columns are dropped and
    their error is spread over the others; above it nothing is gained.
    """

    method = "bitat"
    uses_inputs = True

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
        """Binarize `A` for the inputs it will meet.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight.
        inputs : (N, n) array_like, optional
            Inputs through the already compressed layers; none means white inputs.
        seed : int
            Not used.
        order : {"descending", "natural", "ascending", "plain"}
            See `binarize`.
        flips : bool
        ridge : float
            Added to H, in units of its mean diagonal entry.
        sample_weight : (N,) array_like, optional
            Weight of every sample, such as the squared loss gradient at the output.
        """
        problem = check_problem(A, bits, inputs, seed)
        n = problem.shape[1]
        if sample_weight is not None:
            sample_weight = np.asarray(sample_weight, np.float64)
            if problem.X is None or sample_weight.shape != (len(problem.X),):
                raise ValueError(
                    "sample_weight must have one entry per row of inputs, "
                    f"got shape {sample_weight.shape}"
                )
            if not (
                np.isfinite(sample_weight).all()
                and (sample_weight >= 0).all()
                and sample_weight.sum() > 0
            ):
                raise ValueError("sample_weight must be finite, at least 0, and not all 0")
        n_kept = sign_columns(problem.shape, problem.budget)
        if n_kept < 1:
            raise too_small(cls.method, bits, cls.least_bits(problem.shape), problem.shape)
        H = gram(problem.X, n, ridge, sample_weight)
        energy = np.sum(problem.W**2, axis=0) * np.diagonal(H)
        kept = np.zeros(n, bool)
        kept[np.argsort(-energy, kind="stable")[:n_kept]] = True
        S, alpha = binarize(problem.W, H, order, flips, kept=kept)
        codes = (S[:, kept] > 0).astype(np.uint8)
        scales = to_half(2.0 * alpha[:, None])
        made = cls(problem.shape, codes, 2, 0, scales, kept, uniform_values(2), problem.scale)
        loss = output_error(problem.W - S * alpha[:, None], H)
        made.record = problem.record(kept=n_kept, order=order, flips=flips, ridge=ridge, loss=loss)
        return made

    @classmethod
    def least_bits(cls, shape: tuple[int, int]) -> int:
        """Return the bits of one column, or of all without a mask."""
        return least_bits(shape)
