"""What is to be done with a model: which arrays are factorized, in which parts, at which rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.arrays import row_blocks
from diba_np.checks import as_matrix, check_magnitude, digest
from diba_np.errors import BudgetError, FormatError
from diba_np.matrix.budgets import DENSE_BITS, lower_hull, storage_bits
from diba_np.matrix.diagonals import ScaleBits
from diba_np.matrix.small_floats import word_type
from diba_np.methods.weighted import most_rate, part_of, pilot
from diba_np.models.grams import Grams
from diba_np.models.patterns import matches
from diba_np.models.shapes import is_experts, matrix_shape, matrix_view, row_parts
from diba_np.sources.entry import Entry, unfit_reason

Shape = tuple[int, int]

ALLOCATIONS = ("shared", "relative", "uniform")

# of the short searches that a curve is made of: bits of the binaries per weight
RATES = (0.5, 1.0, 2.0)
_MOST_RATE = 8.0


@dataclass(frozen=True)
class Matrix:
    """One array of the model.

    Attributes
    ----------
    name : str
    shape : tuple of int
        Of the array.
    dtype : str
        Of the array in its source.
    kept : str
        Why it is stored as it is; empty if it is factorized.
    counted : bool
        Whether it takes part in the budget: all but what the user left out.
    sha256 : str
        Of the matrix or, where it is kept, of the array.
    alias_of : str or None
        Name of the array that is the same one, and stored for both.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: str
    counted: bool
    sha256: str
    alias_of: str | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def kept_bits(self) -> int:
        """Bits that the array takes as it is."""
        return self.size * 8 * word_type(self.dtype).itemsize


@dataclass(frozen=True)
class Omitted:
    """An array of the source that the model's file does not hold.

    Attributes
    ----------
    name : str
    why : str
    """

    name: str
    why: str


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    Attributes
    ----------
    matrices : list of Matrix
        Every array that the model's file will hold.
    tasks : list of Task
    omitted : list of Omitted
        Those that it will not: text, complex numbers, what was left out and cannot be read.
    """

    matrices: list[Matrix]
    tasks: list[Task]
    omitted: list[Omitted]


@dataclass(frozen=True)
class Task:
    """Rows of a matrix that are factorized by themselves.

    Attributes
    ----------
    number : int
        Among all tasks of the model.
    name : str
        Of the array.
    start, stop : int
        Rows of the matrix.
    shape : (int, int)
    whole : bool
        Whether these are all rows.
    energy : float
        Sum of the squares, or ``tr(A H A^T)`` with a Gram matrix H, times the weight; where errors
        count relative to it, its share of the matrix's number of entries.
    squares : float
        Sum of the squares alone.
    """

    number: int
    name: str
    start: int
    stop: int
    shape: Shape
    whole: bool
    energy: float
    squares: float

    def bits(self, k: int, scale_bits: ScaleBits) -> int:
        """Return what k components take."""
        return storage_bits(*self.shape, k, scale_bits)

    def unit(self, scale_bits: ScaleBits) -> int:
        """Return the bits of one component more, its entry of d2 included."""
        return self.bits(2, scale_bits) - self.bits(1, scale_bits)


def scan(
    entries: Sequence[Entry],
    include: Sequence[str],
    exclude: Sequence[str],
    min_size: int,
    weights: Mapping[str, float],
    grams: Grams,
    relative: bool = False,
) -> Scan:
    """Read every array once: check it, decide about it, take its digest and its energy.

    With `relative` the energy of a matrix is its number of entries, times its weight: what counts
    is its error relative to its own energy. Of arrays that the patterns leave out nothing is
    checked, and none of them ends the run.

    Raises
    ------
    TypeError, ValueError
        An array is not real or not finite; a pattern, weight or Gram matrix fits no array.
    FormatError
        An array cannot be read.
    """
    names = [entry.name for entry in entries]
    included = _matched("include", include, names) if include else set(names)
    chosen = included - _matched("exclude", exclude, names)
    own_weights = _weights_by_name(weights, names)
    grams.check_names(names)
    matrices: list[Matrix] = []
    omitted: list[Omitted] = []
    first_names: dict[tuple[Any, ...], str] = {}  # of equal arrays, that of the first
    all_names: dict[str, list[str]] = {}  # of equal arrays, by that
    tasks: dict[str, list[Task]] = {}  # of equal arrays, by that
    for entry in entries:
        counted = entry.name in chosen
        array, why = _readable(entry, counted)
        if array is None:
            omitted.append(Omitted(entry.name, why))
            continue
        matrix, A = _described(entry, array, counted, min_size)
        first = first_names.setdefault(_identity(matrix), entry.name)
        is_alias = first != entry.name
        matrices.append(replace(matrix, alias_of=first) if is_alias else matrix)
        if matrix.kept:
            continue
        grams.check_shape(entry.name, array.shape)
        sharing = all_names.setdefault(first, [])
        weight_before = _weight_of(sharing, own_weights)
        sharing.append(entry.name)
        weight = _weight_of(sharing, own_weights)
        inputs_changed = is_alias and grams.share(first, entry.name)
        if is_alias and not inputs_changed and weight == weight_before:
            continue
        tasks.pop(first, None)  # those made for fewer names; the new ones come last
        tasks[first] = _tasks(first, A, array.shape, weight, grams, relative)
    numbered = enumerate(task for parts in tasks.values() for task in parts)
    return Scan(matrices, [replace(task, number=i) for i, task in numbered], omitted)


def _matched(argument: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the names that some patterns stand for; ValueError of one that stands for none."""
    found: set[str] = set()
    for pattern in patterns:
        own = matches(pattern, names)
        if not own:
            raise ValueError(f"{argument} {pattern!r} matches none of the {len(names)} arrays")
        found |= own
    return found


def _weights_by_name(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the weights of those names that have one, each by the first pattern for it."""
    found: dict[str, float] = {}
    for pattern, weight in weights.items():
        for name in _matched("weights", [pattern], names):
            found.setdefault(name, weight)
    return found


def _described(
    entry: Entry, array: NDArray[Any], counted: bool, min_size: int
) -> tuple[Matrix, NDArray[Any]]:
    """Return what is to be known of an array, and it as a matrix, checked if it is factorized."""
    dtype = entry.dtype or array.dtype.str
    kept = _why_kept(array.shape, array.dtype.kind, min_size) if counted else "left out"
    if kept:
        A = array.reshape(1, -1) if array.size else np.zeros((1, 1))
    else:
        A = as_matrix(matrix_view(array), entry.name)
        check_magnitude(A, entry.name)
    return Matrix(entry.name, array.shape, dtype, kept, counted, digest(A)), A


def _identity(matrix: Matrix) -> tuple[Any, ...]:
    """Return what makes two arrays one, which is stored once."""
    if len(matrix.shape) < 2 or not matrix.size:  # vectors of zeros or ones are equal by chance
        return (matrix.name,)
    return (matrix.sha256, matrix.shape, matrix.dtype, matrix.kept)


def _weight_of(names: Sequence[str], own_weights: Mapping[str, float]) -> float:
    """Return the largest weight of an array's names."""
    return max((own_weights[name] for name in names if name in own_weights), default=1.0)


def _readable(entry: Entry, counted: bool) -> tuple[NDArray[Any] | None, str]:
    """Return an array that a model's file can hold, or None and why it cannot be had."""
    if entry.unfit:
        return None, entry.unfit if counted else f"left out, {entry.unfit}"
    try:
        array = entry.read()
    except (FormatError, TypeError, ValueError, OSError, LookupError, ImportError) as error:
        if counted:
            raise
        return None, f"left out, and not readable ({error})"
    why = unfit_reason(array.dtype)
    if why:
        return None, why if counted else f"left out, {why}"
    return array, ""


def _tasks(
    name: str,
    A: NDArray[Any],
    shape: tuple[int, ...],
    weight: float,
    grams: Grams,
    relative: bool,
) -> list[Task]:
    """Return the tasks of one matrix; their numbers come later."""
    parts = row_parts(shape)
    squares = [_energy(A[a:b], None) for a, b in parts]
    energies = squares
    if name in grams.given:
        own_grams = [grams.of(name, a, shape) for a, _ in parts]
        energies = [
            _energy(A[a:b], gram) if gram is not None else grams.unit * own
            for (a, b), gram, own in zip(parts, own_grams, squares, strict=True)
        ]
    if name in grams.nothing and not relative:  # relative errors have no unit
        weight *= grams.unit
    unit = weight * (A.size / (sum(energies) or 1.0) if relative else 1.0)
    return [
        Task(0, name, a, b, (b - a, A.shape[1]), len(parts) == 1, unit * energy, own)
        for (a, b), energy, own in zip(parts, energies, squares, strict=True)
    ]


def _why_kept(shape: tuple[int, ...], kind: str, min_size: int) -> str:
    if kind != "f":
        return "integers"
    if len(shape) < 2:
        return f"{len(shape)}-D"
    if 0 in shape:
        return "empty"
    m, n = shape[1:] if is_experts(shape) else matrix_shape(shape)
    return "small" if min(m, n) < min_size else ""


def _energy(A: NDArray[Any], gram: NDArray[Any] | None) -> float:
    total = 0.0
    for rows in row_blocks((A.shape[0], A.shape[1])):
        part = A[rows].astype(np.float64)
        total += float(np.vdot(part, part if gram is None else part @ gram))
    return total


# -- the budget ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What a matrix's error is at a few rates, relative to its energy.

    Attributes
    ----------
    rates : tuple of float
        Bits of the binaries per weight, rising.
    errors : tuple of float
        ``|A - A_hat|^2 / |A|^2`` there.
    """

    rates: tuple[float, ...]
    errors: tuple[float, ...]

    def at(self, rates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the errors at other rates: their logarithm is linear between those known.

        Beyond the last a bit buys what it bought before it.
        """
        logs = np.minimum.accumulate(np.log(np.maximum((1.0, *self.errors), 1e-12)))
        known = np.array((0.0, *self.rates))
        slope = (logs[-1] - logs[-2]) / (known[-1] - known[-2])
        beyond = np.maximum(rates - known[-1], 0.0)
        errors: NDArray[np.float64] = np.exp(np.interp(rates, known, logs) + slope * beyond)
        return errors


def sample_curves(
    A: NDArray[Any],
    gram: NDArray[Any] | None,
    shift: float,
    seed: int,
    threads: int | None,
    methods: Sequence[str],
) -> dict[str, Curve]:
    """Return a matrix's curve for each of some methods, from short fits of a part of it.

    The part is at most 256 rows and columns: those of the largest share in the energy, and others
    evenly spaced that stand for the rest. Short searches end above a full one, by much the same
    factor for every matrix, which does not move the shares. It is what an executor is given.
    """
    part, inner = part_of(A, gram)
    return {method: _curve(part, inner, shift, seed, threads, method) for method in methods}


def _curve(
    part: NDArray[Any],
    gram: NDArray[Any] | None,
    shift: float,
    seed: int,
    threads: int | None,
    method: str,
) -> Curve:
    rates: list[float] = []
    errors: list[float] = []
    for asked in RATES:
        if method == "diba":  # a part of few entries has few rates
            m, n = part.shape
            k = max(1, round(asked * m * n / (m + n)))
            if rates and k * (m + n) / (m * n) <= rates[-1]:
                continue
        rate, error = pilot(method, part, gram, asked, seed, threads, shift)
        if not rates or rate > rates[-1]:
            rates.append(rate)
            errors.append(error)
    curve = Curve(tuple(rates), tuple(errors))
    most = most_rate(method)
    if not rates[-1] < most < _MOST_RATE:
        return curve
    floor = float(curve.at(np.array([most]))[0])
    return Curve((*rates, most, _MOST_RATE), (*errors, floor, floor))


def least(curves: Sequence[Curve]) -> Curve:
    """Return the curve of the best of several methods at each rate."""
    if len(curves) == 1:
        return curves[0]
    rates = np.unique([rate for curve in curves for rate in curve.rates])
    errors = np.min([curve.at(rates) for curve in curves], axis=0)
    return Curve(tuple(rates.tolist()), tuple(errors.tolist()))


def _largest_k(task: Task) -> int:
    m, n = task.shape
    return max(2, int(_MOST_RATE * m * n / (m + n)))


def allocate(
    tasks: Sequence[Task],
    curves: Sequence[Curve] | None,
    budget: int,
    scale_bits: ScaleBits = 16,
) -> list[int]:
    """Share a budget of bits among tasks so that the sum of their errors is least.

    Each task's error over its bits is brought to its lower convex hull; the steepest pieces of all
    hulls are bought until the budget is used (the Lagrangian solution), the last one in part.

    Parameters
    ----------
    tasks : sequence of Task
    curves : sequence of Curve, or None
        None for the same rate everywhere.
    budget : int
        Bits.
    scale_bits : int or (int, int, int)
        Bits of the diagonals' entries.

    Returns
    -------
    list of int
        Bits of each task; their sum is at most the budget.

    Raises
    ------
    BudgetError
        The budget does not pay for one component of each.
    """
    if not tasks:
        if budget < 0:
            raise BudgetError("bits is too small for what is stored as it is")
        return []
    floors = [task.bits(1, scale_bits) for task in tasks]
    if sum(floors) > budget:
        size = sum(math.prod(task.shape) for task in tasks)
        raise BudgetError(
            f"bits is too small: k=1 of every matrix takes {sum(floors) / size:.4g} bits a weight "
            f"of the factorized ones, what is kept as it is leaves {max(budget, 0) / size:.4g}"
        )
    if curves is None:
        return _uniform(tasks, floors, budget)
    counts = [1] * len(tasks)
    units = [task.unit(scale_bits) for task in tasks]
    left = budget - sum(floors)
    pieces = []
    for i, (task, curve) in enumerate(zip(tasks, curves, strict=True)):
        ks = np.unique(np.geomspace(1, _largest_k(task), 160).astype(int))
        rates = ks * (sum(task.shape) / math.prod(task.shape))
        errors = task.energy * curve.at(rates)
        for a, b in pairwise(lower_hull(ks, errors)):
            steps = int(ks[b] - ks[a])
            pieces.append((float(errors[b] - errors[a]) / (steps * units[i]), i, steps))
    for _, i, steps in sorted(pieces):
        bought = min(steps, left // units[i])
        counts[i] += bought
        left -= bought * units[i]
    return [
        floor + (count - 1) * unit for floor, count, unit in zip(floors, counts, units, strict=True)
    ]


def _uniform(tasks: Sequence[Task], floors: list[int], budget: int) -> list[int]:
    """Return the same bits per weight for all, as far as one component allows."""
    sizes = [math.prod(task.shape) for task in tasks]
    low, high = 0.0, budget / min(sizes)
    for _ in range(100):
        rate = (low + high) / 2
        used = sum(max(f, int(rate * s)) for f, s in zip(floors, sizes, strict=True))
        low, high = (rate, high) if used <= budget else (low, rate)
    low = min(low, DENSE_BITS)  # what is left over buys nothing
    return [max(f, int(low * s)) for f, s in zip(floors, sizes, strict=True)]
