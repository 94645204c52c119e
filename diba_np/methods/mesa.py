"""MESA as a stored matrix: diagonal blocks, k-means codes, cyclic deltas, entropy coding.

Y.-J. Hsu et al., "On Minimizing Diagonal Block-wise Differences for Neural Network
Compression".  `fit` makes one from a single matrix (layer mode); blocks that a network trains are
`diba_np.layers.mesa_linear`, the whole pipeline of the source is `scripts/mesa_pipelines.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from diba_np.matrix.base import Array, CompressedMatrix, take
from diba_np.methods.entropy_coding import at_least, decode, smallest
from diba_np.methods.fitting import Problem, check_problem, to_half
from diba_np.methods.mesa_layer import (
    SortedEntries,
    choose_blocks,
    fit_blocks,
    member_means,
    nothing_fits,
)
from diba_np.methods.streams import pack_digits, packed_bytes, unpack_digits

if TYPE_CHECKING:
    from typing_extensions import Self


def cyclic_delta(previous: Array, current: Array, r: int) -> Array:
    """Return the signed distance ``((cur - prev + r//2) mod r) - r//2``, in [-r//2, r - r//2).

    The paper's Algorithm 3 takes the magnitude, which cannot be undone; the sign is kept.
    """
    return (current - previous + r // 2) % r - r // 2


def cyclic_decode(previous: Array, delta: Array, r: int) -> Array:
    """Return ``(prev + d) mod r``, the inverse of `cyclic_delta`."""
    return (previous + delta) % r


def block_layout(shape: tuple[int, int], p: float) -> tuple[int, int, int]:
    """Return ``(count, rows, columns)`` of the diagonal blocks for the keep rate p.

    ``floor(1 / p)`` blocks of ``floor(m p) x floor(n p)``; what no block covers is pruned.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"p must lie in (0, 1], got {p}")
    count, rows, columns = (int(np.floor(v + 1e-9)) for v in (1.0 / p, shape[0] * p, shape[1] * p))
    if rows < 1 or columns < 1:
        raise ValueError(f"p must leave blocks of at least 1 x 1 in shape {shape}, got {p}")
    return count, rows, columns


def stride_order(count: int, width: int) -> Array:
    """Return the input order that deals the columns out to the blocks in turn, (count * width,).

    Block j takes columns j, j + count, j + 2 count, ...: known from the sizes, so it costs
    no bits, and it lets the units of every block below reach every block above.
    """
    return (np.arange(width)[None, :] * count + np.arange(count)[:, None]).ravel()


def block_orders(order: str | tuple[Array, Array], layout: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the rows and columns of every block, (count, rows) and (count, columns) int.

    Parameters
    ----------
    order : {"natural", "stride"} or (row order, column order)
        See `MESA`.
    layout : (count, rows, columns)
    """
    count, rows, columns = layout
    if isinstance(order, str):
        row_order = np.arange(count * rows)
        natural = order == "natural"
        column_order = np.arange(count * columns) if natural else stride_order(count, columns)
    else:
        row_order, column_order = order
    return np.asarray(row_order).reshape(count, rows), np.asarray(column_order).reshape(
        count, columns
    )


class MESA(CompressedMatrix):
    """A block-diagonal matrix whose blocks are coded as differences to the block before.

    Parameters
    ----------
    shape : (m, n)
    blocks : (count, rows, columns)
        int64 codes into `centroids`, or float32 weights where `centroids` is None (MPDC).
    centroids : (r,) float16, increasing, or None
        Sorted: neighbouring codes must mean neighbouring values.
    deltas : bool
        True codes blocks 2 ... as cyclic deltas with a book of their own; False codes all
        blocks with one book (M+Q+H).
    order : {"natural", "stride"} or (row order, column order)
        Which rows and columns the blocks touch.  "stride": see `stride_order`. Two arrays
        (MPDC) are stored and counted.
    coder : {"huffman", "rans", "auto"}

    Notes
    -----
    A product costs ``2 count rows columns`` operations. Without retraining, pruning a
    matrix to its diagonal blocks destroys a layer: layer mode keeps no more than the block
    part of A can say.
    """

    method = "mesa"
    uses_inputs = True
    dataset_kinds: ClassVar[dict[str, str]] = {
        "first": "payload",
        "deltas": "payload",
        "values": "payload",
        "first_book": "codebook",
        "delta_book": "codebook",
        "centroids": "codebook",
        "order": "index",
    }

    def __init__(
        self,
        shape: tuple[int, int],
        blocks: Array,
        centroids: Array | None,
        deltas: bool = True,
        order: str | tuple[Array, Array] = "natural",
        coder: str = "huffman",
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, scale, record)
        self.blocks, self.centroids, self.deltas = blocks, centroids, deltas
        self.order, self.coder = order, coder

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        alpha: float | None = None,
        coder: str = "auto",
    ) -> Self:
        """Choose blocks, coupling and centroids of least output error within the budget.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight of A (pruned ones included).
        inputs : (N, n) array_like, optional
            The blocks are fitted to the outputs on these inputs; none means white inputs.
        seed : int
            Not used.
        alpha : float, optional
            Weight of the block differences; None tries 0, 0.01, 0.1, 1 and 10.
        coder : {"auto", "huffman", "rans"}
        """
        problem = check_problem(A, bits, inputs, seed)
        alphas = (0.0, 0.01, 0.1, 1.0, 10.0) if alpha is None else (alpha,)
        candidates = cls._candidates(problem, alphas, coder)
        _, best = min(candidates, key=lambda found: found[0], default=(np.inf, None))
        if best is None:
            raise nothing_fits(cls.method, bits, problem.shape)
        best.scale = problem.scale
        best.record = problem.record(**best.record)
        return best

    @classmethod
    def _candidates(
        cls, problem: Problem, alphas: tuple[float, ...], coder: str
    ) -> Iterator[tuple[float, Self]]:
        """Yield error and matrix of every layout, order and alpha for which some levels fit."""
        for layout in choose_blocks(problem.shape, problem.budget):
            for order, alpha in itertools.product(("natural", "stride"), alphas):
                orders = block_orders(order, layout)
                blocks, error_of = fit_blocks(problem, *orders, layout[0], alpha)
                made = cls._finest(problem, blocks, order, coder)
                if made is not None:
                    made.record |= {"alpha": alpha, "order": order}
                    yield error_of(made._values()), made

    @classmethod
    def _finest(cls, problem: Problem, blocks: Array, order: str, coder: str) -> Self | None:
        """Return blocks on the most levels that the budget holds, or None."""
        deltas, entries = len(blocks) > 1, SortedEntries(blocks)
        for r in (128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2):
            if blocks.size < 2 * r or packed_bytes(blocks.size, 2) > problem.budget:
                continue
            centroids = to_half(even_grid(entries, r))
            codes = entries.nearest(centroids.astype(np.float64))
            if _at_least(codes, r, deltas) > problem.budget:
                continue
            made = cls(problem.shape, codes, centroids, deltas, order, coder)
            if made.storage_bits() <= problem.budget:
                made.record = {"count": len(blocks), "levels": r}
                return made
        return None

    def _orders(self) -> tuple[Array, Array]:
        return block_orders(self.order, self.blocks.shape)

    def _values(self) -> Array:
        if self.centroids is None:
            return self.blocks.astype(np.float64) * self.scale
        return (self.centroids.astype(np.float64) * self.scale)[self.blocks]

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        result = np.zeros(self.shape, np.float32)
        rows, columns = self._orders()
        for values, r, c in zip(self._values(), rows, columns, strict=True):
            result[np.ix_(r, c)] = values
        return result

    @functools.cached_property
    def _parts(self) -> tuple[Array, Array, Array]:
        """The blocks (count, rows, columns) float32, and the rows and columns of each."""
        return (self._values().astype(np.float32), *self._orders())

    def _apply(self, X: Array) -> Array:
        if not np.isfinite(X).all():  # that meets the zeros outside the blocks too
            return super()._apply(X)
        values, rows, columns = self._parts
        out = np.zeros((self.shape[0], X.shape[1]), np.result_type(np.float32, X))
        out[rows.ravel()] = np.matmul(values, X[columns]).reshape(rows.size, -1)
        return out

    def _apply_transposed(self, Y: Array) -> Array:
        if not np.isfinite(Y).all():
            return super()._apply_transposed(Y)
        values, rows, columns = self._parts
        out = np.zeros((self.shape[1], Y.shape[1]), np.result_type(np.float32, Y))
        out[columns.ravel()] = np.matmul(values.transpose(0, 2, 1), Y[rows]).reshape(
            columns.size, -1
        )
        return out

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        count, rows, columns = self.blocks.shape
        empty = np.zeros(0, np.uint8)
        arrays = dict.fromkeys(("first", "deltas", "first_book", "delta_book", "order"), empty)
        arrays |= {"values": np.zeros(0, "<f4"), "centroids": np.zeros(0, "<f2")}
        attrs: dict[str, Any] = {
            "count": count,
            "rows": rows,
            "columns": columns,
            "delta": int(self.deltas),
            "r": 0,
        }
        attrs |= {"block_order": "stored", "coder": "", "delta_coder": ""}
        if isinstance(self.order, str):
            attrs["block_order"] = self.order
        else:
            row_order, column_order = self.order
            pieces = (
                pack_digits(row_order, _levels(self.shape[0])),
                pack_digits(column_order, _levels(self.shape[1])),
            )
            arrays["order"] = np.concatenate(pieces)
        if self.centroids is None:
            arrays["values"] = self.blocks.astype("<f4").ravel()
            return attrs, arrays
        r = len(self.centroids)
        attrs["r"], arrays["centroids"] = r, self.centroids
        head = self.blocks[:1] if self.deltas else self.blocks
        arrays["first"], arrays["first_book"], attrs["coder"] = smallest(head, r, self.coder)
        if self.deltas:
            # against the coded block before, never against a block already replaced by its delta
            delta = cyclic_delta(self.blocks[:-1], self.blocks[1:], r) + r // 2
            arrays["deltas"], arrays["delta_book"], attrs["delta_coder"] = smallest(
                delta, r, self.coder
            )
        return attrs, arrays

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        m, n, count, rows, columns, r = (
            int(attrs[key]) for key in ("m", "n", "count", "rows", "columns", "r")
        )
        if min(count, rows, columns) < 1 or count * rows > m or count * columns > n:
            raise ValueError(f"{count} blocks of {rows} x {columns} must fit shape {(m, n)}")
        # "order" in earlier files; a model's file has an attribute of that name for its own
        order = attrs["block_order"] if "block_order" in attrs else attrs["order"]
        if order == "stored":
            first = packed_bytes(count * rows, _levels(m))
            stream = arrays["order"]
            order = (
                unpack_digits(stream[:first], count * rows, _levels(m)),
                unpack_digits(stream[first:], count * columns, _levels(n)),
            )
            if any(
                len(np.unique(o)) != len(o) or o.max() >= size
                for o, size in zip(order, (m, n), strict=True)
            ):
                raise ValueError("order must name every row and column at most once")
        elif order not in ("natural", "stride"):
            raise ValueError(f"order must be natural, stride or stored, found {order!r}")
        if r == 0:
            values = take(arrays, "values", "<f4", count * rows * columns)
            return cls(
                (m, n),
                values.reshape(count, rows, columns),
                None,
                False,
                order,
                scale=attrs["scale"],
            )
        size = rows * columns
        deltas = bool(attrs["delta"])
        head = 1 if deltas else count
        codes = np.empty((count, size), np.int64)
        symbols = decode(arrays["first"], arrays["first_book"], head * size, r, attrs["coder"])
        codes[:head] = symbols.reshape(head, size)
        if deltas and count > 1:
            delta = decode(
                arrays["deltas"], arrays["delta_book"], (count - 1) * size, r, attrs["delta_coder"]
            )
            for j, step in enumerate(delta.reshape(count - 1, size), 1):
                codes[j] = cyclic_decode(codes[j - 1], step - r // 2, r)
        centroids = take(arrays, "centroids", "<f2", r)
        coder = attrs["coder"] if attrs["delta_coder"] in ("", attrs["coder"]) else "auto"
        return cls(
            (m, n),
            codes.reshape(count, rows, columns),
            centroids,
            deltas,
            order,
            coder,
            attrs["scale"],
        )


def even_grid(entries: SortedEntries, r: int) -> Array:
    """Return r evenly spaced centroids over the bulk of entries, then means of their members."""
    low, high = entries.bulk
    grid = np.linspace(low, high, r) if high > low else low + np.arange(r) * 1e-3
    return np.sort(member_means(entries.values, entries.nearest(grid), grid))


def _at_least(codes: Array, r: int, deltas: bool) -> float:
    """Return bits that the codes take at least; much sooner told than by coding them."""
    parts = (codes[:1], cyclic_delta(codes[:-1], codes[1:], r)) if deltas else (codes,)
    return sum(at_least(part) for part in parts)


def _levels(size: int) -> int:
    """Smallest power of two that is at least `size`: an index costs whole bits."""
    return 1 << max(int(size) - 1, 1).bit_length()
