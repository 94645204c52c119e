"""`Stack`: several factorizations with the same input, multiplied by one vector in one call.

A call of a compiled function from Python takes 1 to 3 µs, as long as the product of a small matrix.
The arithmetic is in ``kernels/stack_*.py``; matrices so large that calls do not count, and all
other operands, go through the factorizations' own products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.kernels import _stack, stack_neon, stack_simd
from diba_np.products.cpu import kernel_path
from diba_np.products.parallel import Real
from diba_np.products.product import Bits, operand

_SINGLE = np.dtype(np.float32)
_SMALL = 2_000_000  # weights of the largest matrix, up to which calls count and one thread is best
_KERNELS = {
    "avx2": stack_simd.stack_avx2,
    "avx512": stack_simd.stack_avx512,
    "neon": stack_neon.stack_neon,
}


class Factorization(Protocol):
    """What a stack reads of ``D1 (B1 - shift) D2 (B2 - shift) D3``: `DiBAFactors`."""

    shape: tuple[int, int]
    shift: float

    @property
    def b1(self) -> Bits: ...
    @property
    def b2(self) -> Bits: ...
    @property
    def d1(self) -> NDArray[np.float32]: ...
    @property
    def d2(self) -> NDArray[np.float32]: ...
    @property
    def d3(self) -> NDArray[np.float32]: ...
    def __matmul__(self, x: Any) -> Any: ...


class Stack:
    """Several factorizations with the same input, one below the other, as one operator.

    ``stack(x)`` is the concatenation of ``f @ x`` for every f, to the last bit, in one compiled
    call: what a token of a network needs of its query, key and value matrices, or of gate and up.

    Parameters
    ----------
    factors : sequence of DiBAFactors
        At least one, (m_i, n) each; they are kept and share their bits with the stack.
    bias : array_like, optional
        (m_1 + m_2 + ...,), real; added to the results.

    Attributes
    ----------
    shape : (int, int)
        (m, n) with m the sum of all m_i.
    factors : tuple of DiBAFactors
    rows : tuple of slice
        Which rows of the result belong to which of the factors.

    Raises
    ------
    TypeError
        A factor is no factorization, or the bias does not hold real numbers.
    ValueError
        There are no factors, their numbers of columns differ, the bias does not have m entries, or
        ``DIBA_NP_KERNEL`` is no path of this CPU.

    Notes
    -----
    Factors that have equal d3 and follow each other share their tables of x. Time k (m + n) / 42
    cycles each (AVX-512) and 2 µs a call, on one thread; where one of the matrices is worth more
    threads (over two million weights), and on the portable path, each has a call of its own. A
    stack may be used by several threads at once.

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

    def __init__(self, factors: Sequence[Factorization], bias: ArrayLike | None = None) -> None:
        self.factors = tuple(factors)
        if not self.factors:
            raise ValueError("factors must hold at least one factorization, got none")
        for f in self.factors:
            missing = [name for name in ("b1", "b2", "d1", "d2", "d3") if not hasattr(f, name)]
            if missing:
                raise TypeError(f"factors must be DiBAFactors, got {type(f).__name__}")
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
        self._bias = None if bias is None else self._checked_bias(bias)
        self._terms = [(i, term) for i, f in enumerate(self.factors) for term in _terms(f)]
        largest = max(term.b1.shape[1] * sum(term.shape) for _, term in self._terms)
        self._kernel = _KERNELS.get(kernel_path()) if largest < _SMALL else None
        self._plan: NDArray[np.int64] | None = None
        self._free: list[NDArray[np.float32]] = []  # workspaces that no call is using

    def _checked_bias(self, bias: ArrayLike) -> NDArray[np.float32]:
        values = np.asarray(bias)
        if values.dtype.kind not in "buif":
            raise TypeError(f"bias must hold real numbers, got dtype {values.dtype}")
        if values.shape != self._out_shape:
            raise ValueError(f"bias must have shape {self._out_shape}, got {values.shape}")
        return values.astype(np.float32, order="C")

    def __repr__(self) -> str:
        return f"<Stack of {len(self.factors)}, {self.shape[0]}x{self.shape[1]}>"

    @property
    def nbytes(self) -> int:
        """Bytes of the diagonals and workspaces kept here; bits are the factors'."""
        arrays = [self._bias, self._plan, *self._free]
        return sum(array.nbytes for array in arrays if array is not None)

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
            plan = self._plan if self._plan is not None else self._prepared()
            try:
                work = self._free.pop()
            except IndexError:  # the first call, or one beside another
                work = self._parts.workspace()
            rest = self._none if added is None else added
            total = self._kernel(x, plan, work, rest, out)
            self._free.append(work)
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
            added = np.asarray(added)
            if added.dtype.kind not in "buif":
                raise TypeError(f"added must hold real numbers, got dtype {added.dtype}")
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
        if self._bias is not None:
            result += self._bias if x.ndim == 1 else self._bias[:, np.newaxis]
        if added is not None:
            result += added
        if out is None:
            return result
        out[...] = result
        return out

    def _prepared(self) -> NDArray[np.int64]:
        """Return the plan, see ``kernels/_stack.py``; made at the first product."""
        parts = _Parts()
        plan = np.zeros((len(self._terms), _stack.COLUMNS), np.int64)
        matrix = -1
        for row, (i, term) in zip(plan, self._terms, strict=True):
            first, second = term.b2.tiles, term.b1.tiles
            row[_stack.TILES_1] = first.ctypes.data
            row[_stack.N_TILES_1], row[_stack.N_UNITS_1] = first.shape[:2]
            row[_stack.TILES_2] = second.ctypes.data
            row[_stack.N_TILES_2], row[_stack.N_UNITS_2] = second.shape[:2]
            row[_stack.D3], row[_stack.D2] = parts.constant(term.d3), parts.constant(term.d2)
            row[_stack.D1] = parts.constant(term.d1)
            row[_stack.ALPHA] = parts.constant([term.shift])
            row[_stack.BIAS] = -1
            if self._bias is not None and i != matrix:
                row[_stack.BIAS] = parts.constant(self._bias[self.rows[i]])
            row[_stack.K], row[_stack.ROWS] = term.b2.shape[0], term.shape[0]
            row[_stack.OUT], row[_stack.ADDS] = self.rows[i].start, i == matrix
            matrix = i
        plan[:, _stack.INPUTS] = parts.room(15 * int(plan[0, _stack.N_UNITS_1]))
        plan[:, _stack.TABLES] = parts.room(stack_simd.TABLE_FLOATS)
        plan[:, _stack.TOTALS] = parts.room(len(plan))
        for row in plan:
            row[_stack.SUMS_1] = parts.room(32 * int(row[_stack.N_TILES_1]))
            # as many as the second stage reads, or the first one writes
            size = max(15 * int(row[_stack.N_UNITS_2]), int(row[_stack.K]))
            row[_stack.INNER] = parts.room(size)
            row[_stack.SUMS_2] = parts.room(32 * int(row[_stack.N_TILES_2]))
        self._parts = parts
        self._plan = plan
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return {"factors": self.factors, "bias": self._bias}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["factors"], state["bias"])  # type: ignore[misc]


class _Parts:
    """The parts of a workspace, each from a cache line on; equal constants lie there once."""

    def __init__(self) -> None:
        self._constants: list[tuple[int, NDArray[np.float32]]] = []
        self._starts: dict[bytes, int] = {}
        self.size = 0

    def room(self, size: int) -> int:
        """Return where a part of so many float32 begins."""
        start = self.size
        self.size += -(-size // _stack.LANES) * _stack.LANES
        return start

    def constant(self, values: ArrayLike) -> int:
        """Return where a vector begins."""
        vector = np.asarray(values, np.float32)
        key = vector.tobytes()
        if key not in self._starts:
            self._starts[key] = self.room(vector.size)
            self._constants.append((self._starts[key], vector))
        return self._starts[key]

    def workspace(self) -> NDArray[np.float32]:
        """Return a new workspace: constants, and zeros in the rest."""
        memory = np.zeros(self.size + _stack.LANES, np.float32)
        skip = -memory.ctypes.data % 64 // 4
        work = memory[skip : skip + self.size]
        for start, vector in self._constants:
            work[start : start + vector.size] = vector
        return work


def _terms(f: Any) -> Iterator[Any]:
    """Yield the one-term factorizations whose sum f is: itself, unless it has several."""
    terms = getattr(f, "terms", ())
    if len(terms) > 1:
        yield from terms
    else:
        yield f


def _check_apart(added: NDArray[Any], out: NDArray[Any]) -> None:
    if np.may_share_memory(added, out):
        raise ValueError("added must be out itself or share no memory with it")
