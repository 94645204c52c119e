"""`MESALinear`: diagonal blocks as a layer, trained as numbers first and as shared values then.

Y.-J. Hsu et al., "On Minimizing Diagonal Block-wise Differences for Neural Network Compression".
`diba_np.layers.block_training` has the steps of the method for any network that holds such layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from diba_np.checks import as_matrix, check_count, check_number
from diba_np.layers.linear import Layer, check_bias, check_float
from diba_np.matrix.quality import retuned
from diba_np.methods.fitting import half_of, to_half
from diba_np.methods.mesa import MESA, block_layout, block_orders
from diba_np.methods.mesa_layer import difference_penalty, kmeans, nearest
from diba_np.training.moments import Moments, ridge_of
from diba_np.training.optimisers import root_mean_square

Array = NDArray[Any]

LEVELS = (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2)  # tried for a budget


class MESALinear(Layer):
    """``y = x A_hat^T + bias`` where A_hat is zero but for diagonal blocks.

    A matrix whose blocks are float32 numbers has them as parameters: the first training, under
    `penalise`. A matrix of codes has its centroids, the values that the weights share: the
    retraining. `quantized` makes the second layer of the first.

    Parameters
    ----------
    matrix : MESA, (m, n)
    bias : (m,) array_like, optional
    dtype : {float32, float64}

    Attributes
    ----------
    parameters : dict of str to ndarray
        ``blocks (count, rows, columns)`` or ``centroids (r,)``, and ``bias (m,)``; to be changed
        in place.
    matrix : MESA
        The start.

    Notes
    -----
    The gradient of a centroid is the sum over the weights that share it. Products of N samples
    take ``2 N count rows columns`` flops in either direction.

    Examples
    --------
    >>> import numpy as np
    >>> layer = MESALinear.cut(np.ones((4, 6)), 0.5)
    >>> layer.parameters["blocks"].shape, layer.quantized(levels=2).parameters["centroids"].shape
    ((2, 2, 3), (2,))
    """

    def __init__(
        self, matrix: MESA, bias: ArrayLike | None = None, dtype: DTypeLike = np.float32
    ) -> None:
        if not isinstance(matrix, MESA):
            raise TypeError(f"matrix must be a MESA, got {type(matrix).__name__}")
        kind = check_float(dtype)
        m, n = (int(size) for size in matrix.shape)
        self.matrix = matrix
        self.rows, self.columns = block_orders(matrix.order, matrix.blocks.shape)
        coded = matrix.centroids is not None
        own = matrix.centroids if coded else matrix.blocks
        parameters = {
            "centroids" if coded else "blocks": np.array(
                np.asarray(own, np.float64) * matrix.scale, kind
            ),
            "bias": np.array(check_bias(bias, m), kind),
        }
        super().__init__((m, n), parameters, kind)

    @classmethod
    def cut(
        cls,
        A: ArrayLike,
        p: float,
        bias: ArrayLike | None = None,
        order: str | tuple[Array, Array] = "natural",
        dtype: DTypeLike = np.float32,
    ) -> MESALinear:
        """Return the layer that keeps the diagonal blocks of a dense matrix, as numbers.

        Parameters
        ----------
        A : (m, n) array_like, real
        p : float
            Share of the weights that is kept, in (0, 1]: ``floor(1 / p)`` blocks of
            ``floor(m p) x floor(n p)``.
        bias : (m,) array_like, optional
        order : {"natural", "stride"} or (row order, column order)
            Which rows and columns the blocks touch, see `MESA`.
        dtype : {float32, float64}

        Raises
        ------
        TypeError, ValueError
            `A` is no finite real matrix; `p` leaves no block of a weight.
        """
        A = as_matrix(A, "A")
        if isinstance(order, str) and order not in ("natural", "stride"):
            raise ValueError(f"order must be natural, stride or two arrays, got {order!r}")
        layout = block_layout(A.shape, check_number(p, "p"))
        rows, columns = block_orders(order, layout)
        blocks = A[rows[:, :, None], columns[:, None, :]].astype(np.float32)
        return cls(MESA(A.shape, blocks, None, False, order), bias, dtype)

    @property
    def coded(self) -> bool:
        """Whether the weights share values."""
        return "centroids" in self.parameters

    def values(self) -> Array:
        """Return the blocks (count, rows, columns) with the present parameters."""
        if self.coded:
            shared: Array = self.parameters["centroids"][self.matrix.blocks]
            return shared
        return self.parameters["blocks"]

    def uncoded(self) -> MESALinear:
        """Return a new layer with the same blocks and bias, its blocks numbers of their own."""
        blocks = self.values().astype(np.float32)
        matrix = MESA(self.shape, blocks, None, False, self.matrix.order)
        return MESALinear(matrix, self.parameters["bias"], self.dtype)

    def quantized(
        self,
        levels: int | None = None,
        *,
        bits: float | None = None,
        deltas: bool = True,
    ) -> MESALinear:
        """Return a new layer whose weights share so many values, by k-means.

        Parameters
        ----------
        levels : int, optional
            Centroids, ``2**q`` of the paper; fewer where there are fewer weights.
        bits : float, optional
            Instead of `levels`: the most of `LEVELS` whose stored bits are at most so many for each
            weight of the whole matrix.
        deltas : bool, default True
            Whether blocks are coded as cyclic differences to the block before.

        Raises
        ------
        TypeError, ValueError
            Both or none of `levels` and `bits` are given; no number of levels fits `bits`.
        """
        if (levels is None) == (bits is None):
            raise TypeError("exactly one of levels and bits must be given")
        wide = self.values().astype(np.float64)
        if bits is None:
            return self._shared(wide, check_count(levels, "levels"), deltas)
        budget = check_number(bits, "bits", above=0.0) * self.shape[0] * self.shape[1]
        for each in LEVELS:
            layer = self._shared(wide, each, deltas)
            if layer.matrix.storage_bits() <= budget:
                return layer
        raise ValueError(
            f"bits must be at least {layer.matrix.bits_per_weight:.3g} for these blocks, "
            f"got {bits:g}; keep a smaller share p"
        )

    def _shared(self, wide: Array, levels: int, deltas: bool) -> MESALinear:
        # a power of two changes no digit of what 16 bits hold
        unit = 2.0 ** round(math.log2(root_mean_square(wide) or 1.0))
        wide = wide / unit
        centroids = to_half(kmeans(wide, min(levels, wide.size)))
        centroids = np.unique(centroids)  # some may have become equal in 16 bits
        codes = nearest(wide, centroids.astype(np.float64))
        several = deltas and len(codes) > 1
        matrix = MESA(self.shape, codes, centroids, several, self.matrix.order, "auto", unit)
        return MESALinear(matrix, self.parameters["bias"], self.dtype)

    def penalise(self, weight: float) -> float:
        """Return the penalty on block differences, and add its gradient to that of the blocks.

        ``weight / (count - 1) sum_j |B_{j+1} - B_j|^2``; 0 where there is one block or blocks are
        codes, whose differences are what they are.
        """
        if self.coded or len(self.rows) == 1:
            return 0.0
        value, gradient = difference_penalty(self.parameters["blocks"], weight)
        self.gradients["blocks"] += gradient
        return value

    def _taken(self, samples: Array) -> Array:
        """Return what each block reads, (count, N, columns)."""
        count, width = self.columns.shape
        flat: Any = slice(0, count * width) if self._in_order() else self.columns.ravel()
        taken: Array = samples[:, flat].reshape(len(samples), count, width).transpose(1, 0, 2)
        return taken

    def _in_order(self) -> bool:
        return isinstance(self.matrix.order, str) and self.matrix.order == "natural"

    def _put(self, parts: Array, size: int, where: Array) -> Array:
        """Return (N, size) zeros with parts (count, N, width) in the columns `where`."""
        whole = np.zeros((parts.shape[1], size), self.dtype)
        whole[:, where.ravel()] = parts.transpose(1, 0, 2).reshape(parts.shape[1], where.size)
        return whole

    def _product(self, taken: Array, values: Array) -> Array:
        """Return the outputs (N, m), without bias, of what each block reads."""
        return self._put(np.matmul(taken, values.transpose(0, 2, 1)), self.shape[0], self.rows)

    def _forward(self, samples: Array) -> tuple[Array, Any]:
        values, taken = self.values(), self._taken(samples)
        y = self._product(taken, values)
        y += self.parameters["bias"]
        return y, (taken, values)

    def _backward(self, g: Array, samples: Array, kept: Any) -> Array:
        taken, values = kept
        count, height = self.rows.shape
        self.gradients["bias"] += g.sum(axis=0)
        own = g[:, self.rows.ravel()].reshape(len(g), count, height).transpose(1, 0, 2)
        self._pull(np.matmul(own.transpose(0, 2, 1), taken))
        return self._put(np.matmul(own, values), self.shape[1], self.columns)

    def _pull(self, gradient: Array) -> None:
        """Add the gradient of the blocks to that of the parameters."""
        if not self.coded:
            self.gradients["blocks"] += gradient
            return
        codes = self.matrix.blocks.ravel()
        sums = np.bincount(codes, gradient.ravel(), len(self.parameters["centroids"]))
        self.gradients["centroids"] += sums.astype(self.dtype)

    def lookup(self, ids: Array) -> tuple[Array, Callable[[Array], None]]:
        """Return rows of the matrix, and what takes their gradient; see `Layer.lookup`."""
        flat = np.asarray(ids, np.intp).reshape(-1)
        where = np.full(self.shape[0], -1, np.intp)
        where[self.rows.ravel()] = np.arange(self.rows.size)
        held = np.flatnonzero(where[flat] >= 0)  # rows that no block covers are zeros
        block, row = np.divmod(where[flat[held]], self.rows.shape[1])
        rows = np.zeros((len(flat), self.shape[1]), self.dtype)
        at = (held[:, None], self.columns[block])
        rows[at] = self.values()[block, row]

        def back(gradient: Array) -> None:
            pulled = np.zeros(self.matrix.blocks.shape, self.dtype)
            np.add.at(pulled, (block, row), gradient.reshape(rows.shape)[at])
            self._pull(pulled)

        return rows.reshape(*np.shape(ids), self.shape[1]), back

    def refit(self, data: Moments) -> None:
        """Set blocks or centroids to their least-squares values on moments, the bias by the means.

        Cost: a solve of order `columns` for each block; for centroids ``r columns^2`` flops a row
        and a system of the r centroids.
        """
        if self.coded:
            self._refit_centroids(data)
        else:
            for j, (r, c) in enumerate(zip(self.rows, self.columns, strict=True)):
                normal = data.xx[np.ix_(c, c)].copy()
                low = ridge_of(normal)
                normal[np.diag_indices_from(normal)] += low
                right = data.yx[np.ix_(r, c)] + low * self.parameters["blocks"][j]
                self.parameters["blocks"][j] = np.linalg.solve(normal, right.T).T
        mean = self._product(self._taken(data.x_mean[None].astype(self.dtype)), self.values())
        self.parameters["bias"][...] = data.y_mean - mean[0]

    def _refit_centroids(self, data: Moments) -> None:
        centroids = self.parameters["centroids"]
        r = len(centroids)
        normal, right = np.zeros((r, r)), np.zeros(r)
        for codes, rows, columns in zip(self.matrix.blocks, self.rows, self.columns, strict=True):
            H, c = data.xx[np.ix_(columns, columns)], data.yx[np.ix_(rows, columns)]
            right += np.bincount(codes.ravel(), c.ravel(), r)
            for row in codes:
                member = np.zeros((len(row), r))
                member[np.arange(len(row)), row] = 1.0
                normal += member.T @ (H @ member)
        low = ridge_of(normal)
        normal[np.diag_indices_from(normal)] += low
        centroids[...] = np.linalg.solve(normal, right + low * centroids)

    def to_matrix(self) -> MESA:
        """Return the blocks as they are stored: centroids in 16 bits, increasing.

        Centroids that changed places or became equal have their codes renamed, so that the stored
        bits may differ a little from those of the start.
        """
        f = self.matrix
        if not self.coded:
            blocks = self.parameters["blocks"].astype(np.float32)
            return MESA(f.shape, blocks, None, False, f.order)
        centroids, before = self.parameters["centroids"].astype(np.float64), f.centroids
        present, scale = half_of(centroids, f.scale, before)
        if before is not None and np.array_equal(present, before):
            return f
        centroids, renamed = np.unique(present, return_inverse=True)
        record = retuned(f.record) | {"levels": len(centroids)}
        codes = renamed.ravel()[f.blocks]
        return MESA(f.shape, codes, centroids, f.deltas, f.order, f.coder, scale, record)

    def rounded(self) -> MESALinear:
        """Return a new layer as it is after storing: centroids rounded to 16 bits."""
        return MESALinear(self.to_matrix(), self.parameters["bias"], self.dtype)


def penalise(layers: Collection[MESALinear], alpha: float) -> float:
    """Return MESA's loss of distance over some layers, and add its gradient to theirs.

    ``alpha / layers sum_i sum_j |B_{j+1} - B_j|^2 / (count_i - 1)``.
    """
    return sum(layer.penalise(alpha / len(layers)) for layer in layers)
