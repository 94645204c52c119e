"""`Stack`: several packed matrices with the same input, multiplied by one vector in one call.

A call of a compiled function from Python takes 1 to 3 µs, as long as the product of a small matrix.
The arithmetic is in ``kernels/stack_*.py``; matrices so large that calls do not count, and all
other operands, go through the factorizations' own products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_real, single_vector
from diba_np.products.cpu import vector_path
from diba_np.products.parallel import Real
from diba_np.products.plan import KERNELS, Chain, Plan
from diba_np.products.product import operand

_SINGLE = np.dtype(np.float32)
_SMALL = 2_000_000  # weights of the largest matrix, up to which calls count and one thread is best


class Factorization(Protocol):
    """What a stack reads of one term ``D1 (B1 - shift) D2 (B2 - shift) D3`` or of several."""

    shape: tuple[int, int]

    @property
    def terms(self) -> tuple[Any, ...]: ...
    def __matmul__(self, x: Any) -> Any: ...


class Filtered(Protocol):
    """What a stack reads of a linear trellis."""

    shape: tuple[int, int]
    packed_weights: int | None

    def chain(self, start: int, bias: ArrayLike | None) -> Chain: ...
    def __matmul__(self, x: Any) -> Any: ...


def _packed_weights(f: Any) -> float:
    """Return how many packed weights a call multiplies with; infinity if no plan can hold them.

    Raises
    ------
    TypeError
        It is neither a factorization nor a linear trellis.
    """
    if hasattr(f, "packed_weights"):
        return math.inf if f.packed_weights is None else float(f.packed_weights)
    names = ("b1", "b2", "d1", "d2", "d3", "shift")
    terms = getattr(f, "terms", (f,))
    if not terms or not all(hasattr(term, name) for term in terms for name in names):
        raise TypeError(f"factors must be DiBAFactors or linear trellises, got {type(f).__name__}")
    return float(sum(term.b1.shape[1] for term in terms) * sum(f.shape))


class Stack:
    """Several packed matrices with the same input, one below the other, as one operator.

    ``stack(x)`` is the concatenation of ``f @ x`` for every f in one compiled call: what a token
    of a network needs of its query, key and value matrices, or of gate and up. It is so to the last
    bit where there is neither a bias nor ``added=``; with them to the last but one or two.

    Parameters
    ----------
    factors : sequence of DiBAFactors or LinearTrellis
        At least one, (m_i, n) each; they are kept and share their bits with the stack.
    bias : array_like, optional
        (m_1 + m_2 + ...,), real; added to the results.

    Attributes
    ----------
    shape : (int, int)
        (m, n) with m the sum of all m_i.
    factors : tuple of DiBAFactors or LinearTrellis
    rows : tuple of slice
        Which rows of the result belong to which of the factors.

    Raises
    ------
    TypeError
        A factor is of another kind, or the bias does not hold real numbers.
    ValueError
        There are no factors, their numbers of columns differ, the bias does not have m entries that
        are finite in float32, or ``DIBA_NP_KERNEL`` is no path of this CPU.

    Notes
    -----
    Terms that have equal d3 and follow each other share their tables of x. Time k (m + n) / 42
    cycles each (AVX-512) and 2 µs a call, on one thread; where one of the matrices is worth more
    threads (over two million weights), where a trellis keeps what is of low rank apart, and on the
    portable path, each has a call of its own. A stack may be used by several threads at once.

    Examples
    --------
    >>> import numpy as np
    >>> import diba_np as dn
    >>> from diba_np.products import Stack
    >>> rng = np.random.default_rng(0)
    >>> query, key = (dn.factorize(rng.normal(size=(m, 24)), k=9, effort="fast") for m in (24, 8))
    >>> stack = Stack([query, key])
    >>> x = np.ones(24, np.float32)
    >>> q, k = stack.split(stack(x))
    >>> np.array_equal(q, query @ x), np.array_equal(k, key @ x)
    (True, True)
    """

    def __init__(
        self, factors: Sequence[Factorization | Filtered], bias: ArrayLike | None = None
    ) -> None:
        if not isinstance(factors, Iterable) or hasattr(factors, "terms"):
            kind = type(factors).__name__
            raise TypeError(f"factors must be a sequence of DiBAFactors, got {kind}")
        self.factors = tuple(factors)
        if not self.factors:
            raise ValueError("factors must hold at least one factorization, got none")
        largest = max(map(_packed_weights, self.factors))
        widths = sorted({f.shape[1] for f in self.factors})
        if len(widths) > 1:
            raise ValueError(
                f"factors must have the same number of columns, got {', '.join(map(str, widths))}"
            )
        ends = np.cumsum([0, *(f.shape[0] for f in self.factors)]).tolist()
        self.rows = tuple(slice(a, b) for a, b in itertools.pairwise(ends))
        self.shape = (ends[-1], widths[0])
        self._out_shape, self._in_shape = (self.shape[0],), (self.shape[1],)
        self._none = np.empty(0, np.float32)
        self._bias = None if bias is None else single_vector(bias, "bias", self.shape[0])
        self._kernel = KERNELS.get(vector_path()) if largest < _SMALL else None
        self._plan: Plan | None = None

    def __repr__(self) -> str:
        return f"<Stack of {len(self.factors)}, {self.shape[0]}x{self.shape[1]}>"

    @property
    def nbytes(self) -> int:
        """Bytes of the diagonals kept here; bits are the factors'."""
        return sum(part.nbytes for part in (self._bias, self._plan) if part is not None)

    def split(self, y: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Return views of the results of each of the factors.

        Parameters
        ----------
        y : ndarray
            (m,) or (m, b), as the call returns it.

        Returns
        -------
        tuple of ndarray
            (m_i,) or (m_i, b) each.

        Raises
        ------
        ValueError
            y does not have m rows.
        """
        if y.ndim == 0 or len(y) != self.shape[0]:
            raise ValueError(f"y must have {self.shape[0]} rows, got shape {y.shape}")
        return tuple(y[rows] for rows in self.rows)

    def __matmul__(self, x: ArrayLike) -> Real:
        return self(x)

    def __call__(
        self, x: ArrayLike, *, added: NDArray[Any] | None = None, out: NDArray[Any] | None = None
    ) -> Real:
        """Return all products with x, and what is to be added to them.

        Parameters
        ----------
        x : array_like
            (n,) or (n, b), real. Float32, and what it holds without loss, is computed in float32,
            others in float64.
        added : ndarray, optional
            (m,) or (m, b): added to the result, the residual of a network for one. It may be `out`.
        out : ndarray, optional
            Where to write the result, of its shape and dtype, C-order; nothing of the result's size
            is allocated then. It may be x.

        Returns
        -------
        ndarray
            (m,) or (m, b), float32 or float64; `out` if it is given.

        Raises
        ------
        TypeError
            An operand does not hold real numbers, or `out` is no array of the result's dtype.
        ValueError
            A shape does not fit, `out` is not contiguous or read-only, or `added` shares a part of
            its memory with `out`.

        Notes
        -----
        NaN, infinity and sums out of the range of float32 as in ``f @ x``.
        """
        # after a product the caches are empty, and every step here counts twice
        if (
            self._kernel is not None
            and type(x) is np.ndarray
            and x.dtype == _SINGLE
            and x.shape == self._in_shape
            and x.flags.carray
            and (added is None or self._is_plain(added))
            and (out is None or out is added or self._is_plain(out))
        ):
            if out is None:
                out = np.empty(self._out_shape, _SINGLE)
            elif added is not None and added is not out:
                _check_apart(added, out)
            plan = self._plan or self._prepared()
            total = plan.run(self._kernel, x, self._none if added is None else added, out)
            if math.isfinite(total):
                return out
        return self._one_by_one(x, added, out)

    def _is_plain(self, array: Any) -> bool:
        """Tell whether kernels can take an array (m,) as it is."""
        return (
            type(array) is np.ndarray
            and array.dtype == _SINGLE
            and array.shape == self._out_shape
            and array.flags.carray
        )

    def _one_by_one(
        self, x: ArrayLike, added: NDArray[Any] | None, out: NDArray[Any] | None
    ) -> Real:
        """Do what the call does by a product for each of the factors."""
        x = operand(x)
        if x.ndim not in (1, 2) or len(x) != self.shape[1]:
            n = self.shape[1]
            raise ValueError(f"x must have shape ({n},) or ({n}, b), got {x.shape}")
        shape = (self.shape[0], *x.shape[1:])
        if added is not None:
            added = as_real(added, "added", "hold real numbers")
            if added.shape != shape:
                raise ValueError(f"added must have shape {shape}, got {added.shape}")
        if out is not None:
            if not isinstance(out, np.ndarray) or out.dtype != x.dtype:
                kind = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
                raise TypeError(f"out must be an array of {x.dtype}, got {kind}")
            if out.shape != shape or not out.flags.carray:
                raise ValueError(
                    f"out must be a writeable array in C-order of shape {shape}, got {out.shape}"
                )
            if added is not None and added is not out:
                _check_apart(added, out)
        result = np.concatenate([f @ x for f in self.factors])
        with np.errstate(over="ignore", invalid="ignore"):  # as in the compiled call
            if self._bias is not None:
                result += self._bias if x.ndim == 1 else self._bias[:, np.newaxis]
            if added is not None:
                result += added
        if out is None:
            return result
        out[...] = result
        return out

    def _prepared(self) -> Plan:
        """Return the plan, made at the first product."""
        chains = []
        for f, rows in zip(self.factors, self.rows, strict=True):
            bias = None if self._bias is None else self._bias[rows]
            if hasattr(f, "chain"):
                chains.append(f.chain(rows.start, bias))
                continue
            for term in f.terms:
                tiles = term.b2.tiles, term.b1.tiles
                diagonals = term.d3, term.d2, term.d1
                chains.append(Chain(*tiles, *diagonals, term.shift, rows.start, bias))
                bias = None
        self._plan = Plan(chains)
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        return {"factors": self.factors, "bias": self._bias}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["factors"], state["bias"])  # type: ignore[misc]


def _check_apart(added: NDArray[Any], out: NDArray[Any]) -> None:
    if np.may_share_memory(added, out):
        raise ValueError("added must be out itself or share no memory with it")
