"""Binary quadratic quantization: sums of products of 0/1 matrices, constants instead of scales.

After arXiv 2510.18650: ``A ~ sum_t (r_t Y_t Z_t + s_t Y_t 1 + t_t 1 Z_t) + u``, Y_t and Z_t 0/1.
The source anneals a mean field; here its format is searched as this toolkit searches its own, by
alternating projections to ±1 and flips afterwards: of the two that was the stronger one on the
format with diagonals (384 x 384 at 1 bit: 6.48 dB against 4.9 to 5.3).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg.lapack import spotrf, spotrs

from diba_np.kernels.pursuit import descend_bits
from diba_np.machine.blas import single_threaded_blas
from diba_np.matrix.base import Array, CompressedMatrix, take
from diba_np.matrix.operator import real_product, with_total
from diba_np.matrix.packed_bits import PackedBits
from diba_np.methods.fitting import Problem, check_problem, too_small
from diba_np.products.product import Product

if TYPE_CHECKING:
    from typing_extensions import Self

# the most bits a weight that one term is given; more of them make up the rest
_TERM_BITS = 1.25

_CONSTANTS = 3  # of a term; one more for all
_PADDING = 14  # bits at most that fill up the last bytes of zeros and ones

# of the relaxation: first penalty, ridge, share of the new point
_FIRST, _RIDGE, _THETA = 0.2, 0.03, 0.8


class BQQ(CompressedMatrix):
    """A sum of products of 0/1 matrices with three constants each.

    Parameters
    ----------
    shape : (int, int)
    Y : PackedBits, (m, K)
    Z : PackedBits, (K, n)
        All terms side by side.
    ranks : sequence of int
        Columns of Y of each term; their sum is K.
    constants : (3 T + 1,) float32
        r, s, t of each term, then u.
    """

    method = "bqq"
    dataset_kinds: ClassVar[dict[str, str]] = {
        "y": "payload",
        "z": "payload",
        "ranks": "index",
        "constants": "scales",
    }

    def __init__(
        self,
        shape: tuple[int, int],
        Y: PackedBits,
        Z: PackedBits,
        ranks: Any,
        constants: Array,
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, scale, record)
        self.Y, self.Z = Y, Z
        self.ranks = [int(rank) for rank in ranks]
        self.constants = np.asarray(constants, np.float32)

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        iterations: int = 200,
        rounds: int = 8,
    ) -> Self:
        """Relax term after term on what is left over, then flip bits and refit the constants.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight.
        inputs : (N, n) array_like, optional
            Checked and not used.
        seed : int
            Of the starts.
        iterations : int
            Of the relaxation of a term.
        rounds : int
            Of flips over all terms.

        Returns
        -------
        Self

        Raises
        ------
        TypeError, ValueError
            Naming the argument, the rule and the value.
        """
        problem = check_problem(A, bits, inputs, seed)
        m, n = problem.shape
        terms = max(1, round(bits / _TERM_BITS))
        while terms > 1 and _total_rank(problem, terms) < terms:
            terms -= 1
        total = _total_rank(problem, terms)
        if total < 1:
            raise too_small("bqq", bits, cls.least_bits(problem.shape), problem.shape)
        # more ranks than entries gain nothing
        total = min(total, 4 * min(m, n) * terms)
        ranks = [total // terms + (at < total % terms) for at in range(terms)]
        with single_threaded_blas():  # its last digits decide about bits
            parts, constants = _searched(problem, ranks, iterations, rounds)
        Y, Z = (np.concatenate([part[side] for part in parts], 1) for side in (0, 1))
        record = problem.record(terms=terms, rank=total, iterations=iterations)
        packed = PackedBits(Y), PackedBits(Z).T
        return cls(problem.shape, *packed, ranks, constants, problem.scale, record)

    def _component_constants(self) -> Array:
        """Return r, s and t of each of the K components, (3, K) float32."""
        by_term = self.constants[:-1].reshape(-1, _CONSTANTS)
        return np.repeat(by_term, self.ranks, axis=0).T

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        r, s, t = self._component_constants()
        Y, Z = (bits.to_dense().astype(np.float32) for bits in (self.Y, self.Z))
        dense: Array = (Y * r) @ Z
        dense += (Y @ s)[:, None]
        dense += t @ Z + self.constants[-1]
        dense *= np.float32(self.scale)
        return dense

    # ---- products ----------------------------------------------------------------------
    @functools.cached_property
    def _halves(self) -> tuple[Product, Product, Array, Array]:
        """The products with Y diag(r) Z and its transpose, the row and the column constants."""
        r, s, t = self._component_constants()
        forward = Product(self.Z, self.Y, d_mid=r)
        back = Product(self.Y.T, self.Z.T, d_mid=r)
        rows = Product(self.Y).vector(s) + self.constants[-1]
        return forward, back, rows[:, None], Product(self.Z.T).vector(t)[:, None]

    def _apply(self, X: Array) -> Array:
        forward, _, rows, columns = self._halves

        def fast(x: Array) -> tuple[Array, float]:
            return with_total(self._multiply(x, forward, rows, columns))

        return real_product(X, fast, lambda x: self._dense() @ x)

    def _apply_transposed(self, Y: Array) -> Array:
        _, back, rows, columns = self._halves

        def fast(y: Array) -> tuple[Array, float]:
            return with_total(self._multiply(y, back, columns, rows))

        return real_product(Y, fast, lambda y: self._dense().T @ y)

    def _multiply(self, x: Array, product: Product, out: Array, into: Array) -> Array:
        result = product.matrix(x)
        result += out.astype(x.dtype) * x.sum(axis=0) + into.T.astype(x.dtype) @ x
        result *= x.dtype.type(self.scale)
        return result

    # ---- file --------------------------------------------------------------------------
    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        arrays = {
            "y": self.Y.to_stream(),
            "z": self.Z.to_stream(),
            "ranks": np.array(self.ranks, "<u4"),
            "constants": self.constants.astype("<f4"),
        }
        return {"terms": len(self.ranks)}, arrays

    @classmethod
    def least_bits(cls, shape: tuple[int, int]) -> int:
        """Return the bits of one term of rank one."""
        return sum(shape) + _PADDING + _overhead(1)

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        m, n, terms = (int(attrs[key]) for key in ("m", "n", "terms"))
        if terms < 1:
            raise ValueError(f"terms must be at least 1, found {terms}")
        ranks = take(arrays, "ranks", "<u4", terms)
        constants = take(arrays, "constants", "<f4", _CONSTANTS * terms + 1)
        if not ranks.all():
            raise ValueError("every term must have a rank of at least 1")
        K = int(ranks.sum(dtype=np.int64))
        Y = PackedBits.from_stream(arrays["y"], (m, K))
        Z = PackedBits.from_stream(arrays["z"], (K, n))
        return cls((m, n), Y, Z, ranks, constants, attrs["scale"])


def _searched(
    problem: Problem, ranks: list[int], iterations: int, rounds: int
) -> tuple[list[tuple[Array, Array]], Array]:
    """Return Y (m, k), Z (n, k) of each term, and all constants."""
    left = problem.W.copy()
    parts: list[tuple[Array, Array]] = []
    for rank in ranks:
        Y, Z = _relaxed(left, rank, iterations, problem.rng)
        parts.append((Y, Z))
        constants = _fit_constants(left, [(Y, Z)])
        left -= _value(Y, Z, *constants[:3]) + constants[3]
    constants = _fit_constants(problem.W, parts)
    for _ in range(rounds):
        changed = sum(_flip(problem.W, parts, constants, at) for at in range(len(parts)))
        constants = _fit_constants(problem.W, parts)
        if not changed:
            break
    return parts, constants


def _overhead(terms: int) -> int:
    """Return the bits of a matrix of `terms` terms beside its zeros and ones."""
    return 32 * (_CONSTANTS * terms + 1) + 32 * terms


def _total_rank(problem: Problem, terms: int) -> int:
    """Return how many columns of Y and rows of Z the budget holds."""
    return int((problem.budget - _overhead(terms) - _PADDING) // sum(problem.shape))


def _value(Y: Array, Z: Array, r: float, s: float, t: float) -> Array:
    """Return ``r Y Z^T + s Y 1 + t 1 Z^T`` for Y (m, k), Z (n, k) of zeros and ones."""
    value: Array = Y.astype(np.float32) @ (np.float32(r) * Z.T.astype(np.float32))
    value += np.float32(s) * Y.sum(1, dtype=np.float32)[:, None]
    value += np.float32(t) * Z.sum(1, dtype=np.float32)
    return value.astype(np.float64)


def _relaxed(W: Array, k: int, iterations: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return zeros and ones Y (m, k), Z (n, k) whose ±1 forms multiply to about W.

    Alternating directions: each side solves least squares given the other, pulled ever harder
    towards signs of one magnitude.
    """
    goal = (W / (np.sqrt(np.mean(W**2)) or 1.0)).astype(np.float32)
    sides = [np.sign(rng.standard_normal((size, k))).astype(np.float32) for size in W.shape]
    duals = [np.zeros_like(side) for side in sides]
    targets = (goal, np.ascontiguousarray(goal.T))
    unit = np.eye(k, dtype=np.float32)
    for i in range(iterations):
        share = min(1.0, _FIRST + (1.0 - _FIRST) * i / max(iterations - 3, 1))
        for at in (0, 1):
            other = sides[1 - at]
            N = other / np.maximum(np.linalg.norm(other, axis=0), 1e-20)
            G = N.T @ N + np.float32(_RIDGE) * unit
            right = targets[at] @ N
            for penalty in (np.float32(share**3), np.float32(1.0)):
                pulled = right + penalty * (sides[at] - duals[at])
                upper, _ = spotrf(G + penalty * unit, clean=False)
                X = spotrs(upper, pulled.T)[0].T
                Q = np.float32(_THETA) * X + np.float32(1.0 - _THETA) * sides[at] + duals[at]
                sides[at] = np.where(Q >= 0, 1.0, -1.0).astype(np.float32) * np.mean(np.abs(Q))
                duals[at] = Q - sides[at]
    return (sides[0] > 0).astype(np.uint8), (sides[1] > 0).astype(np.uint8)


def _fit_constants(W: Array, parts: list[tuple[Array, Array]]) -> Array:
    """Return the least-squares constants, (3 T + 1,) float32, as they are stored."""
    size = _CONSTANTS * len(parts) + 1
    normal, right = np.zeros((size, size)), np.zeros(size)
    for start in range(0, len(W), 256):
        rows = slice(start, start + 256)
        features = []
        for Y, Z in parts:
            y = Y[rows].astype(np.float32)
            features.append(y @ Z.T.astype(np.float32))
            features.append(np.broadcast_to(y.sum(1)[:, None], features[0].shape))
            features.append(np.broadcast_to(Z.sum(1, dtype=np.float32), features[0].shape))
        features.append(np.ones_like(features[0]))
        flat = np.stack(features).reshape(size, -1).astype(np.float64)
        normal += flat @ flat.T
        right += flat @ W[rows].ravel()
    return np.linalg.lstsq(normal, right, rcond=1e-12)[0].astype(np.float32)


def _flip(W: Array, parts: list[tuple[Array, Array]], constants: Array, at: int) -> int:
    """Flip bits of term `at`, both sides in turn, given the rest; return how many."""
    left = W - float(constants[-1])
    for other, (Y, Z) in enumerate(parts):
        if other != at:
            left -= _value(Y, Z, *constants[_CONSTANTS * other :][:_CONSTANTS])
    r, s, t = (float(v) for v in constants[_CONSTANTS * at :][:_CONSTANTS])
    changed = 0
    for side, own, across in ((0, s, t), (1, t, s)):
        bits, other_bits = parts[at][side], parts[at][1 - side].astype(np.float64)
        goal = left if side == 0 else left.T
        # given the other side, a row is a sum over its ones
        basis = r * other_bits + own
        G = basis.T @ basis
        B = (goal - across * other_bits.sum(1)) @ basis
        changed += descend_bits(G, np.ascontiguousarray(B), 4, bits)
    return changed
