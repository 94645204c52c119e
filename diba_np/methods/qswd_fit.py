"""How QSWD is fitted: exact steps on grids, annealed supports, settings within a budget."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix

from diba_np.kernels.pursuit import descend_grid, pursue_columns
from diba_np.matrix.base import Array
from diba_np.methods.fitting import Problem, to_half, too_small
from diba_np.methods.streams import packed_bytes, sets_bytes

_CORRELATIONS = 1 << 15  # of columns with atoms, made at once: they fit into a cache

_ANNEALING = 24  # steps in which a support shrinks

# of the choice of a setting: columns tried on, and settings that are tried for longer
_MOST_COLUMNS, _FINALISTS = 16384, 3

# a row of settings ends where errors are so many times the least of the row, and of all
_RISEN, _FAR = 10**0.05, 10**0.1


def project_columns(Z: Array, s: int, scale: float, max_code: int) -> Array:
    """Project each column on {at most s nonzeros} and the grid ``scale * [-max_code, max_code]``.

    Exact: with ``q = scale clip(rint(z / scale))`` a kept entry gains ``z^2 - (z - q)^2``;
    the s largest gains stay.

    Parameters
    ----------
    Z : (r, p) float64
    s : int
    scale : float
    max_code : int

    Returns
    -------
    (r, p) float64

    Notes
    -----
    O(r p).
    """
    q = scale * np.clip(np.rint(Z / scale), -max_code, max_code)
    if s >= Z.shape[0]:
        return q
    gain = Z**2 - (Z - q) ** 2
    keep = np.argpartition(-gain, s - 1, axis=0)[:s]
    result = np.zeros_like(q)
    np.put_along_axis(result, keep, np.take_along_axis(q, keep, axis=0), axis=0)
    return result


class Setting:
    """Sizes of one decomposition of an (m, n) matrix, and what they cost.

    Rows are cut into ``ceil(m / d)`` bands of d rows, laid side by side: Wm is (d, p) with
    ``p = ceil(m / d) n``, the last band filled up with zero rows.
    """

    def __init__(
        self, shape: tuple[int, int], d: int, r: int, s: int, c_bits: int, z_bits: int
    ) -> None:
        fits = min(d, r) >= 1 and 1 <= s <= r and 2 <= c_bits <= 16 and 0 <= z_bits <= 16
        if not fits:
            raise ValueError(
                "setting (d, r, s, c_bits, z_bits) must have d and r of at least 1, s in [1, r], "
                f"c_bits in [2, 16] and z_bits in [0, 16], got {(d, r, s, c_bits, z_bits)}"
            )
        self.shape, self.d, self.r, self.s = shape, d, r, s
        self.c_bits, self.z_bits = c_bits, z_bits
        self.bands = -(-shape[0] // d)
        self.p = self.bands * shape[1]

    @property
    def z_levels(self) -> int:
        """Levels of a stored value: zero is one of them only where the support is full."""
        return int(2**self.z_bits)

    @property
    def z_max(self) -> int:
        """Largest magnitude of a value; 0 stands for "always +1"."""
        if self.s == self.r and self.z_bits > 1:
            return int(2 ** (self.z_bits - 1) - 1)
        return int(2**self.z_bits // 2)

    @property
    def full(self) -> bool:
        """True where every entry of Z is stored and may be zero."""
        return self.s == self.r and self.z_bits > 1

    def index_coding(self) -> tuple[str, int]:
        """Return ("none" | "sets" | "bitmap", bytes): how the support is written.

        Ranks of sets above 64 would take long to work out: a bitmap, though it may be longer.
        """
        if self.s == self.r:
            return "none", 0
        if self.s > 64:
            return "bitmap", -(-self.p * self.r // 8)
        return "sets", sets_bytes(self.p, self.r, self.s)

    def bits(self) -> int:
        """Stored bits, to the byte."""
        c = 8 * packed_bytes(self.d * self.r, 2**self.c_bits) + 16 * self.r
        return c + 8 * packed_bytes(self.p * self.s, self.z_levels) + 8 * self.index_coding()[1]


# ---- fitting ------------------------------------------------------------------------------
def cut(W: Array, d: int) -> Array:
    """Return the columns of the bands of W (m, n), (p, d); row ``b n + j``: band b, column j."""
    m, n = W.shape
    bands = -(-m // d)
    padded = np.zeros((bands * d, n))
    padded[:m] = W
    return np.ascontiguousarray(padded.reshape(bands, d, n).transpose(0, 2, 1).reshape(-1, d))


def decompose(
    W: Array, st: Setting, rng: np.random.Generator, sweeps: int = 12
) -> tuple[Array, Array, Array, Array]:
    """Fit one setting by alternating exact steps for Z and C; keep the best sweep.

    Parameters
    ----------
    W : (m, n) float64
    st : Setting
    rng : numpy.random.Generator
    sweeps : int
        It ends earlier where a sweep gains less than 1e-4 of the error.

    Returns
    -------
    codes : (d, r) int64
        C in units of `steps`.
    steps : (r,) float64
    sets, values : (p, s) int64
        Support and values of the columns of Z.
    """
    return alternate(cut(W, st.d), st, rng, sweeps)[0]


def alternate(
    V: Array, st: Setting, rng: np.random.Generator, sweeps: int
) -> tuple[tuple[Array, Array, Array, Array], float]:
    """As `decompose`, on the rows of V (p, d); also return the squared error."""
    C = _first_dictionary(V, st, rng)
    best: Any = None
    best_error = np.inf
    sets: Any = None
    values: Any = None
    energy = float(np.sum(V**2))
    for sweep in range(sweeps):
        if st.full:
            sets, values, C = _full_support(V, C, st)
        elif sets is None and st.s > 8:
            sets, values, C = _anneal_support(V, C, st)
            pursue(V, C, st.z_max, 1, sets, values)
        elif sets is None:
            sets, values = (np.zeros((len(V), st.s), np.int64) for _ in range(2))
            pursue(V, C, st.z_max, 2, sets, values, fresh=True)
        else:
            pursue(V, C, st.z_max, 2, sets, values)
        codes, steps, error = _dictionary_step(V, st, sets, values, energy)
        better, much = error < best_error, error < best_error * (1 - 1e-4)
        if better:
            best, best_error = (codes, steps, sets.copy(), values.copy()), error
        if best_error <= 1e-12 * energy or (not much and (better or sweep > 3)):
            break
        C = codes * steps
    return best, best_error


def _first_dictionary(V: Array, st: Setting, rng: np.random.Generator) -> Array:
    """Left singular vectors where they suffice, then columns of V drawn by their energy."""
    p, d = V.shape
    if st.r <= d and (st.s > 8 or st.full):
        values, vectors = np.linalg.eigh(V.T @ V)
        order = np.argsort(values)[::-1][: st.r]
        return np.ascontiguousarray(vectors[:, order])
    energy = np.sum(V**2, axis=1)
    total = energy.sum()
    share = energy / total if total > 0 else np.full(p, 1.0 / p)
    share = 0.5 * share + 0.5 / p
    chosen = rng.choice(p, size=st.r, replace=p < st.r, p=share)
    C = V[chosen].T.copy()
    C += 1e-3 * np.sqrt(total / max(V.size, 1)) * rng.standard_normal(C.shape)
    # a value of up to z_max multiplies an atom; s atoms share a column
    result: Array = C / max(np.sqrt(st.s), 1.0) / max(0.5 * st.z_max, 1.0)
    return result


def _full_support(V: Array, C: Array, st: Setting) -> tuple[Array, Array, Array]:
    """Least squares for Z, a step that fills the grid, then exact one-entry descent."""
    G = C.T @ C
    G[np.diag_indices(st.r)] += 1e-12 * max(float(np.trace(G)), 1e-300)
    Z = np.ascontiguousarray(cho_solve(cho_factor(G), C.T @ V.T).T)
    peak = np.abs(Z).max(axis=0)
    if st.z_bits < 8:
        peak = np.minimum(peak, 3.0 * np.sqrt(np.mean(Z**2, axis=0)))
    unit = np.where(peak > 0, peak / st.z_max, 1.0)
    codes = np.clip(np.rint(Z / unit), -st.z_max, st.z_max).astype(np.int64)
    descend_grid(np.ascontiguousarray(G), np.ascontiguousarray(V @ C), unit, st.z_max, 4, codes)
    return np.tile(np.arange(st.r), (len(V), 1)), codes, C * unit


def _anneal_support(V: Array, C: Array, st: Setting) -> tuple[Array, Array, Array]:
    """Projected gradient on a latent Z while support (r -> s) and bits (8 -> target) shrink.

    The gradient is taken at the projected point and applied to the latent one; C follows by
    least squares. Returns a starting (sets, values, C).
    """
    G = C.T @ C
    Z = np.linalg.lstsq(C, V.T, rcond=None)[0]
    for i in range(_ANNEALING):
        share = (i + 1) / _ANNEALING
        s = round(st.r * (st.s / st.r) ** share)
        z_max = max(round(128 * (max(st.z_max, 1) / 128) ** share), 1)
        large = np.partition(np.abs(Z), st.r - s, axis=0)[st.r - s :]
        unit = max(2.0 * float(np.sqrt(np.mean(large**2))) / z_max, 1e-300)
        P = project_columns(Z, s, unit, z_max)
        top = float(np.linalg.eigvalsh(G)[-1])
        Z = Z - C.T @ (C @ P - V.T) / max(top, 1e-300)
        gram_z = P @ P.T
        gram_z[np.diag_indices(st.r)] += 1e-6 * max(float(np.trace(gram_z)) / st.r, 1e-300)
        C = cho_solve(cho_factor(gram_z), P @ V).T
        norms = np.linalg.norm(C, axis=0)
        norms = np.where(norms > 0, norms, 1.0)
        C, Z = C / norms, Z * norms[:, None]
        G = C.T @ C
    P = project_columns(Z, st.s, unit, max(st.z_max, 1))
    C = C * unit
    # slots that the projection left empty are taken by the largest latent entries
    order = np.argsort(-(np.abs(P) * 1e6 + np.abs(Z)), axis=0)
    sets = np.sort(np.ascontiguousarray(order[: st.s].T), axis=1)
    codes = np.rint(np.take_along_axis(P.T, sets, axis=1) / unit).astype(np.int64)
    latent = np.take_along_axis(Z.T, sets, axis=1)
    values = np.where(codes == 0, np.where(latent < 0, -1, 1), codes)
    return sets, values, C


def pursue(
    V: Array, C: Array, z_max: int, passes: int, sets: Array, values: Array, fresh: bool = False
) -> None:
    """Search slot by slot for the z of least ``|v - C z|``, in place.

    Parameters
    ----------
    V : (p, d)
        A row for each column of Z.
    C : (d, r)
    z_max : int
        See `Setting.z_max`.
    passes : int
        Rounds over the slots; of one slot the first finds the best of all.
    sets, values : (p, s) int64
        The start, and the result.
    fresh : bool
        Whether slots are filled first, whatever they hold.

    Notes
    -----
    ``O(p r (d + s))`` a pass, in float32.
    """
    unit = float(np.abs(C).max()) or 1.0
    V, C = (V / unit).astype(np.float32), (C / unit).astype(np.float32)
    G = np.ascontiguousarray(C.T @ C)
    rows = max(_CORRELATIONS // C.shape[1], 1)
    for start in range(0, len(V), rows):
        part = slice(start, start + rows)
        pursue_columns(G, V[part] @ C, z_max, passes, fresh, sets[part], values[part])


def _dictionary_step(
    V: Array, st: Setting, sets: Array, values: Array, energy: float
) -> tuple[Array, Array, float]:
    """Least squares for C, a grid a column, then exact one-entry descent on that grid.

    Returns the codes and steps of C, and the squared error: ``|V|^2`` is `energy`.
    """
    start = np.arange(0, sets.size + 1, st.s)
    Z = csr_matrix((values.ravel().astype(np.float64), sets.ravel(), start), (len(V), st.r))
    G = (Z.T @ Z).toarray()
    T = Z.T @ V  # (r, d)
    unused = np.diagonal(G) == 0
    ridge = 0.25**st.c_bits * max(float(np.trace(G)) / st.r, 1e-300)
    if st.s == 1:  # G is diagonal
        C = T / (np.diagonal(G) + ridge)[:, None]
    else:
        C = cho_solve(cho_factor(G + ridge * np.eye(st.r)), T)
    C = np.ascontiguousarray(C.T)
    if unused.any():
        # an atom nobody uses starts again from a column that is badly served
        residual = V - np.asarray(Z @ C.T)
        worst = np.argsort(-np.sum(residual**2, axis=1), kind="stable")[: int(unused.sum())]
        fill = residual[worst]
        if len(fill) < unused.sum():
            fill = np.vstack([fill, np.zeros((int(unused.sum()) - len(fill), st.d))])
        C[:, unused] = fill.T
    max_code = 2 ** (st.c_bits - 1) - 1
    peak = np.abs(C).max(axis=0)
    if st.c_bits < 6:
        peak = np.minimum(peak, (1.2 + 0.4 * st.c_bits) * np.sqrt(np.mean(C**2, axis=0)))
    steps = peak / max_code
    top = float(steps.max()) if steps.max() > 0 else 1.0
    steps = to_half(steps / top).astype(np.float64) * top
    unit = np.where(steps > 0, steps, 1.0)
    codes = np.clip(np.rint(C / unit), -max_code, max_code).astype(np.int64)
    codes[:, steps == 0] = 0
    descend_grid(G, np.ascontiguousarray(T.T), steps, max_code, 16, codes)
    C = codes * steps
    return codes, steps, max(energy + float(np.sum((C @ G - 2.0 * T.T) * C)), 0.0)


# ---- settings within a budget ----------------------------------------------------------
def _families(shape: tuple[int, int]) -> Iterator[list[_Family]]:
    """Yield the kinds of settings worth trying; only r is open, and chosen to fill the budget.

    Along a list the error mostly falls, then rises.
    """
    m, n = shape

    def bands(s: int, z_bits: int) -> list[_Family]:
        heights = (d for d in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32) if d <= m)
        return [_Family(shape, d, s, 8 if d < 5 else 6, z_bits, most=1024) for d in heights]

    yield bands(1, 1)
    yield bands(1, 0)
    whole = ((None, 4, 4), (12, 4, 2), (None, 6, 6), (None, 8, 8))
    yield [_Family(shape, m, s, c_bits, z_bits, most=min(m, n)) for s, c_bits, z_bits in whole]
    yield bands(2, 1)
    yield bands(2, 0)


class _Family:
    """Settings that differ in r alone; s = None keeps every entry of Z (s = r)."""

    def __init__(
        self, shape: tuple[int, int], d: int, s: int | None, c_bits: int, z_bits: int, most: int
    ) -> None:
        self.shape, self.d, self.s, self.c_bits, self.z_bits = shape, d, s, c_bits, z_bits
        self.least = 1 if s is None else s
        self.most = min(most, -(-shape[0] // d) * shape[1])

    def made(self, r: int) -> Setting:
        s = r if self.s is None else self.s
        return Setting(self.shape, self.d, r, s, self.c_bits, self.z_bits)

    def largest(self, budget: int) -> int:
        """Return the largest r within the budget; below `least` if none is."""
        if self.made(self.least).bits() > budget:
            return self.least - 1
        low, high = self.least, self.most
        while low < high:
            middle = (low + high + 1) // 2
            if self.made(middle).bits() <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def within(self, budget: int) -> Setting | None:
        """Return the setting of largest r within the budget, None if it would leave much over."""
        r = self.largest(budget)
        if r < self.least:
            return None
        # far under the budget: a finer or taller setting of the list serves better
        setting = self.made(r)
        return setting if self.s is None or setting.bits() >= 0.8 * budget else None


def settings(shape: tuple[int, int], budget: int) -> list[list[Setting]]:
    """List the settings worth trying within `budget` bits, dictionaries filled to it."""
    candidates = ([family.within(budget) for family in row] for row in _families(shape))
    return [[setting for setting in row if setting is not None] for row in candidates]


def next_bits(shape: tuple[int, int], budget: int) -> int:
    """Return the least number of bits above `budget` that a setting fills."""
    larger = (
        (family, max(family.largest(budget) + 1, family.least))
        for family in chain.from_iterable(_families(shape))
    )
    return min(family.made(r).bits() for family, r in larger if r <= max(family.most, family.least))


def choose_setting(problem: Problem) -> Setting:
    """Try settings on some of the columns; return the best.

    Each row of `settings` is followed until the error rises, half a decibel above the least of
    the row (less may be the luck of a start) and one above that of all. Errors are compared on
    the columns the fit has seen; that flatters large dictionaries on few columns, so at least
    eight columns an atom are drawn where there are as many.
    """
    candidates = settings(problem.shape, problem.budget)
    if not any(candidates):
        least = next_bits(problem.shape, problem.budget)
        raise too_small("qswd", problem.bits, least, problem.shape)

    def trial(st: Setting, sweeps: int) -> float:
        V = cut(problem.W, st.d)
        total = len(V)
        most = max(_MOST_COLUMNS, 8 * st.r)
        if total > most:
            V = V[np.sort(np.random.default_rng(0).choice(total, most, replace=False))]
        error = alternate(V, st, np.random.default_rng(0), sweeps)[1]
        return error * total / len(V)

    tried: dict[Setting, float] = {}
    for row in candidates:
        errors: list[float] = []
        for st in row:
            tried[st] = trial(st, 2)
            errors.append(tried[st])
            if errors[-1] > max(_RISEN * min(errors), _FAR * min(tried.values())):
                break
    ranked = sorted(tried, key=lambda st: tried[st])[:_FINALISTS]
    return min(ranked, key=lambda st: trial(st, 6))
