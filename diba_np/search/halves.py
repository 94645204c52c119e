"""One binary factor in the ADMM: its projection, its dual and its regression."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diba_np.kernels import magnitudes
from diba_np.machine.thread_pool import ThreadPool
from diba_np.search.state import State
from diba_np.search.target import Target

Array = NDArray[np.float32]
Scales = tuple[NDArray[np.float64], NDArray[np.float64]]  # of d1 and d3

FEWEST = 16  # components that can balance
UNEVEN = 1.3  # largest size over their mean from which gauges are shared out anew


class Half:
    """One binary factor in the ADMM: its projection, its dual and its regression.

    Attributes
    ----------
    axis : int
        Of the matrix: 0 for the left factor, 1 for the right.
    Q : (rows, k) float32
        Stands for the projection ``Z = sign(Q) * outer(p, q)`` and the scaled dual ``Q - Z``.
    X : (rows, k) float32
        The regression; from `make_basis` on what the other half regresses on, with columns of norm
        one, until it is made anew.
    p : (rows,) float32, unit norm
    q : (k,) float32
    gauge : (k,) float32
        Signs by which the component enters the balance constraint.
    held : (rows,) float32, unit norm, or None
        What p stays at.
    norm : (k,) float32
        What `make_basis` divided the columns by.
    weighed : (rows, k) float32
        The last basis under the correlations of the rows, where they are coupled.
    lasting : tuple of str
        What the next iteration needs of this half beside Q, p, q and gauge.
    """

    def __init__(
        self,
        axis: int,
        rows: int,
        gauge: Array,
        rng: np.random.Generator,
        pool: ThreadPool,
        held: NDArray[np.float64] | None = None,
    ) -> None:
        k = gauge.size
        self.axis = axis
        self.pool = pool
        self.gauge = gauge
        self.held = None
        if held is not None:
            self.held = (np.abs(held) / np.linalg.norm(held)).astype(np.float32)
        self.p, self.q = np.zeros(rows, np.float32), np.ones(k, np.float32)
        self.Q = rng.standard_normal((rows, k), dtype=np.float32)
        self.X = np.zeros((rows, k), np.float32)
        self.norm = np.ones(k, np.float32)
        self.weighed = self.X
        self.lasting: tuple[str, ...] = ()
        self._parts = np.empty((-(-rows // magnitudes.BLOCK), k), np.float32)
        self.blend(slice(0, rows), self.X, 1.0)
        self.project(None)

        def sign(part: slice) -> None:
            self.Q[part] = self.X[part] = np.copysign(np.outer(self.p[part], self.q), self.Q[part])

        for block in self.row_blocks():
            self._in_chunks(block, sign)

    @property
    def Z(self) -> Array:
        """The projection, (rows, k) float32; made anew."""
        signed: Array = np.copysign(np.outer(self.p, self.q), self.Q)
        return signed

    def pack(self) -> dict[str, Array]:
        """Return what the next iteration needs of this half."""
        return {name: getattr(self, name) for name in ("Q", "p", "q", "gauge", *self.lasting)}

    def unpack(self, packed: dict[str, Array]) -> None:
        """Undo `pack`."""
        for name, array in packed.items():
            setattr(self, name, array)

    def _in_chunks(self, rows: slice, work: Callable[[slice], None]) -> None:
        """Call ``work(rows)`` side by side for runs of whole blocks of rows."""
        size = rows.stop - rows.start
        self.pool.by_chunks(
            (size, self.q.size),
            magnitudes.BLOCK,
            lambda part: work(slice(rows.start + part.start, rows.start + part.stop)),
        )

    def _sums(self, rows: slice) -> Array:
        """Return the partial sums over the blocks of some rows, a row for each."""
        return self._parts[rows.start // magnitudes.BLOCK : -(-rows.stop // magnitudes.BLOCK)]

    def row_blocks(self) -> list[slice]:
        """Return the rows in blocks that memory is spared by taking one after another."""
        return self.pool.row_blocks(*self.Q.shape)

    def point(self, rows: slice, rho: float | np.float32, Y: Array) -> Array:
        """Return ``rho (Z - dual) + Y`` for some rows."""
        out = np.empty_like(Y)
        magnitudes.regression_point(self.Q[rows], self.p[rows], self.q, np.float32(rho), Y, out)
        return out

    def blend(self, rows: slice, X: Array, damping: float) -> None:
        """Blend a block of a regression and of Z into Q; p and q then await `project`."""
        theta = np.float32(damping)

        def work(part: slice) -> None:
            own = X[part.start - rows.start : part.stop - rows.start]
            magnitudes.blend_magnitudes(
                own, self.Q[part], theta, self.q, self.p[part], self._sums(part)
            )

        self._in_chunks(rows, work)

    def project(self, pin: Array | None) -> None:
        """Make (p, q) the leading singular pair of ``|Q|``, by two warm-started power steps.

        The first is done by `blend`. Where p is held, q is the best for it. With `pin` (gauge
        products), q is rescaled on the two gauge classes so that tau vanishes.
        """
        if self.held is None:
            self._normalise()
            self._in_chunks(
                slice(0, len(self.Q)),
                lambda rows: magnitudes.power_magnitudes(
                    self.Q[rows], self.q, self.p[rows], self._sums(rows)
                ),
            )
            self._normalise()
        else:
            self.p[:] = self.held
            self.q = self.pool.matmul(np.abs(self.Q).T, self.held[:, None])[:, 0]
        if pin is not None:
            plus, minus = float(self.q[pin > 0].sum()), float(self.q[pin < 0].sum())
            if plus > 0 and minus > 0:
                ratio = np.float32(np.sqrt(minus / plus))
                self.q = np.where(pin > 0, self.q * ratio, self.q / ratio)

    def _normalise(self) -> None:
        norm = max(float(np.sqrt(self.p @ self.p)), 1e-30)
        self.p /= np.float32(norm)
        self.q = self._parts.sum(axis=0) / np.float32(norm)

    def make_basis(self, softness: float) -> Array:
        """Turn X into Z blended with X, its columns brought to norm one, and return it."""
        share = np.float32(softness)
        whole = slice(0, len(self.Q))
        self._in_chunks(
            whole,
            lambda rows: magnitudes.soften(
                self.Q[rows], self.p[rows], self.q, share, self.X[rows], self._sums(rows)
            ),
        )
        self.norm = np.maximum(np.sqrt(self._parts.sum(axis=0)), np.float32(1e-30))
        factor = np.float32(1.0) / self.norm

        def scale(rows: slice) -> None:
            self.X[rows] *= factor

        self._in_chunks(whole, scale)
        return self.X


def gauges(k: int) -> tuple[Array, Array]:
    """Return two sign vectors, each half -1 and their product half -1 (as nearly as k allows)."""
    index = np.arange(k)
    first = np.where(index % 4 < 2, 1.0, -1.0)
    second = np.where(index % 2 < 1, 1.0, -1.0)
    return first.astype(np.float32), second.astype(np.float32)


def are_uneven(first: Half, second: Half) -> bool:
    """Whether the sizes of the components are uneven, and there are enough that can balance.

    On weights of networks they are even (largest 1.1 to 1.2 times the mean, a quarter of the way
    into the search), on smooth matrices they are not.
    """
    size = first.q * second.q
    return size.size >= FEWEST and bool(size.max() > UNEVEN * size.mean())


def share_gauges(first: Half, second: Half) -> None:
    """Give neighbours in size opposite gauges, where the sizes of the components are uneven.

    Rows balance only if large components stand against others as large; by chance the largest of
    a smooth matrix fall on one side (-2 dB). An eighth of the way into the ramps is too early:
    while the ridge is high, one component may outgrow all others on its side (-1.5 dB).
    """
    if not are_uneven(first, second):
        return
    size = first.q * second.q
    order = np.argsort(-size, kind="stable")
    for half, pattern in ((first, (1, -1, -1, 1)), (second, (1, -1, 1, -1))):
        half.gauge = np.empty_like(half.gauge)
        half.gauge[order] = np.resize(np.array(pattern, np.float32), size.size)


def read_out(first: Half, second: Half, shift: float) -> State:
    """Turn signs into bits: ``S1 = sign(Z1) diag(ga)``, likewise S2; d2 is not exact for them."""
    bits1 = np.signbit(first.Q) == (first.gauge < 0)
    bits2 = np.signbit(second.Q) == (second.gauge < 0)
    return State(
        d1=first.p.astype(np.float64),
        b1=bits1.view(np.uint8),
        d2=4.0 * (first.gauge * second.gauge * second.q).astype(np.float64),
        b2=bits2.view(np.uint8),
        d3=second.p.astype(np.float64),
        shift=shift,
    )


def random_halves(
    target: Target, k: int, rng: np.random.Generator, held: Scales | None
) -> tuple[Half, Half]:
    """Return two halves of k components at random signs."""
    ga, gb = gauges(k)
    d1, d3 = held or (None, None)
    first = Half(0, target.shape[0], ga, rng, target.pool, d1)
    return first, Half(1, target.shape[1], gb, rng, target.pool, d3)
