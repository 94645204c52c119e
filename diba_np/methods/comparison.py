"""Many methods on one matrix at equal bits: what each reaches, in one table."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np import methods
from diba_np.checks import as_matrix, as_samples, check_count
from diba_np.machine.process_pool import ProcessPool
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.quality import snr_db
from diba_np.methods import LABELS
from diba_np.methods.dbf import dbf
from diba_np.methods.fitting import check_problem
from diba_np.search.factorization import factorize

HELD_OUT = 0.25  # share of the inputs that no method is fitted on

_TRIES = 2  # of a fit whose process is killed
_REPEATS = 25  # of a product that is timed

# what one process works on: matrix, inputs to fit on, inputs to judge on, seed
_Shared = tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None, int]


def _fit_diba(A: ArrayLike, bits: float, inputs: ArrayLike | None, seed: int) -> Any:
    options: dict[str, Any] = {} if inputs is None else {"inputs": inputs}
    return factorize(A, bits=bits, scale_bits="auto", seed=seed, **options)


def _fit_dbf(A: ArrayLike, bits: float, inputs: ArrayLike | None, seed: int) -> Any:
    return dbf(A, bits=bits, inputs=inputs, seed=seed)


# label -> fit(A, bits, inputs, seed) of the methods that make a DiBAFactors; our own first
_OWN: dict[str, Callable[..., Any]] = {"diba": _fit_diba, "dbf": _fit_dbf}


@dataclasses.dataclass
class Row:
    """What one method reached at one rate.

    Attributes
    ----------
    method : str
    target_bits : float
        Budget, bits per weight.
    bits_per_weight : float
        Stored, everything counted.
    snr : float
        dB, on the weights.
    output_snr : float
        dB, on inputs that were not used for fitting; NaN without inputs.
    fit_seconds : float
    matvec_us : float
        Median time of one product with a float32 vector, microseconds, after one call that is not
        timed (methods without a product of their own decode then).
    multiplies : bool
        Whether products work on the stored parts, with nothing decoded to a dense matrix.
    without_inputs : bool
        Whether there were inputs and the method, which knows nothing of any, was fitted to the
        weights alone.
    error : str
        Why there is no result; empty otherwise.
    record : dict
        The settings that the method chose.
    """

    method: str
    target_bits: float
    bits_per_weight: float = np.nan
    snr: float = np.nan
    output_snr: float = np.nan
    fit_seconds: float = np.nan
    matvec_us: float = np.nan
    multiplies: bool = False
    without_inputs: bool = False
    error: str = ""
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


def compare(
    A: ArrayLike,
    bits: float | Sequence[float] = (1.0, 2.0, 4.0),
    methods: str | Iterable[str] = "all",
    inputs: ArrayLike | None = None,
    jobs: int = 1,
    seed: int = 0,
    callback: Callable[[Row], Any] | None = None,
) -> list[Row]:
    """Fit every method at every rate; a method that fails is a row with its error.

    Parameters
    ----------
    A : (m, n) array_like, real
    bits : float or sequence of float
        Budgets in bits per weight; everything a method stores counts.
    methods : "all" or iterable of str
        Labels of `diba_np.methods.LABELS`.
    inputs : (N, n) array_like, optional
        Cached inputs, one sample a row. The methods are fitted on the first three quarters,
        `output_snr` is taken on the rest.
    jobs : int
        Processes (spawned, one numerical thread each). With more than one, times are those of a
        shared machine.
    seed : int
    callback : callable, optional
        Called with each row as it is there.

    Returns
    -------
    list of Row
        In the order of `methods`, then `bits`.

    Raises
    ------
    TypeError, ValueError
        For arguments that no method could take.

    Examples
    --------
    >>> A = np.random.default_rng(0).standard_normal((40, 30))
    >>> [row.method for row in compare(A, bits=2.0, methods=["rtn", "svd16"])]
    ['rtn', 'svd16']
    """
    rates: list[Any] = list(np.atleast_1d(np.asarray(bits, object)))
    if not rates:
        raise ValueError("bits must hold at least one rate, got none")
    if isinstance(methods, str):
        methods = LABELS if methods == "all" else (methods,)
    try:
        methods = tuple(methods)
    except TypeError:
        kind = type(methods).__name__
        raise TypeError(f'methods must be "all" or labels of methods, got {kind}') from None
    if not methods:
        raise ValueError("methods must hold at least one label, got none")
    unknown = [label for label in methods if label not in LABELS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(LABELS)}, got {unknown[0]!r}")
    jobs = check_count(jobs, "jobs")
    check_count(seed, "seed", least=0)
    for rate in rates:
        check_problem(A, rate, inputs, seed)
    matrix = as_matrix(A)
    train = test = None
    if inputs is not None:
        samples = as_samples(inputs, "inputs", matrix.shape[1])
        if len(samples) < 4:
            raise ValueError(
                f"inputs must have at least 4 rows to hold some out, got {len(samples)}"
            )
        cut = len(samples) - max(int(HELD_OUT * len(samples)), 1)
        train, test = samples[:cut], samples[cut:]
    shared = (matrix, train, test, seed)
    tasks = [(label, float(rate)) for label in methods for rate in rates]
    results: Generator[Row, None, None] = (_one(*shared, label, rate) for label, rate in tasks)
    if jobs > 1 and len(tasks) > 1:
        results = _spread(shared, tasks, min(jobs, len(tasks)))
    rows = {}
    with contextlib.closing(results):
        for row in results:
            rows[row.method, row.target_bits] = row
            if callback is not None:
                callback(row)
    return [rows[task] for task in tasks]


def _one(
    A: NDArray[Any],
    train: NDArray[Any] | None,
    test: NDArray[Any] | None,
    seed: int,
    label: str,
    rate: float,
) -> Row:
    """Fit one method at one rate; never raises an Exception."""
    row = Row(label, rate)
    start = time.perf_counter()
    try:
        if label in _OWN:
            matrix = _OWN[label](A, rate, train, seed)
        else:
            matrix = methods.fit(label, A, rate, train, seed)
        row.fit_seconds = time.perf_counter() - start
        row.bits_per_weight = float(matrix.bits_per_weight)
        row.snr = matrix.snr(A)
        row.without_inputs = train is not None and not type(matrix).uses_inputs
        if test is not None:
            X = np.asarray(test, np.float64)
            ours = X @ matrix.to_dense().T.astype(np.float64)
            row.output_snr = snr_db(X @ np.asarray(A, np.float64).T, ours)
        row.multiplies = multiplies_packed(matrix)
        row.matvec_us = _time_product(matrix, A.shape[1])
        row.record = {name: value for name, value in matrix.record.items() if np.ndim(value) == 0}
    except Exception as error:  # one method must not end the comparison
        row.error = f"{type(error).__name__}: {error}"
    return row


def multiplies_packed(matrix: Any) -> bool:
    """Tell whether the class has a product of its own; the one of the base decodes."""
    own = type(matrix)
    return own._apply is not CompressedMatrix._apply or own._matmat is not CompressedMatrix._matmat


def _time_product(matrix: Any, n: int) -> float:
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    matrix @ x
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        matrix @ x
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times))


def _spread(
    shared: _Shared, tasks: list[tuple[str, float]], jobs: int
) -> Generator[Row, None, None]:
    """Run the tasks in processes, rows as they come; one whose processes die is an error row."""
    pool = ProcessPool(jobs, 1, shared, _TRIES)
    # high rates take longest: first in, so that none is left alone at the end
    order = sorted(tasks, key=lambda task: -task[1])
    try:
        for _, row in pool.run(_one, order, lambda task: task, _row_of_error):
            yield row
    finally:
        pool.end()


def _row_of_error(task: tuple[str, float], error: Exception) -> Row:
    return Row(*task, error=f"{type(error).__name__}: {error}")


def recommend(rows: Sequence[Row]) -> list[str]:
    """Return one line for each rate: which method wins, by how much, and how it multiplies.

    Parameters
    ----------
    rows : sequence of Row
        Of `compare`. Where inputs were given the outputs decide, else the weights.

    Returns
    -------
    list of str
        In the order of the rates; if the winner has to be decoded before it multiplies, the line
        also names the best that does not.

    Examples
    --------
    >>> rows = [Row("a", 2.0, 2.0, 9.0), Row("b", 2.0, 2.0, 8.5, multiplies=True)]
    >>> recommend(rows)
    ['2 bits: a, 9.00 dB, 0.50 dB above b; decodes first; without decoding: b, 8.50 dB']
    """
    output = any(np.isfinite(row.output_snr) for row in rows)

    def quality(row: Row) -> float:
        return row.output_snr if output else row.snr

    lines = []
    for rate in dict.fromkeys(row.target_bits for row in rows):
        label = f"{rate:g} bit{'s' if rate != 1 else ''}"
        # an exact copy has no error, and infinite decibels
        fitted = [
            r for r in rows if r.target_bits == rate and not r.error and not np.isnan(quality(r))
        ]
        if not fitted:
            lines.append(f"{label}: no method")
            continue
        # of equal ones first what multiplies from its bits, then what takes fewer
        fitted.sort(key=lambda r: (-quality(r), not r.multiplies, r.bits_per_weight))
        best = fitted[0]
        line = f"{label}: {best.method}, {_decibels(quality(best))}"
        if len(fitted) > 1:
            second = fitted[1]
            if quality(second) == quality(best):
                line += f", as {second.method}"
            else:
                line += f", {_decibels(quality(best) - quality(second))} above {second.method}"
        line += "; multiplies from its bits" if best.multiplies else "; decodes first"
        direct = next((row for row in fitted if row.multiplies), None)
        if direct is not None and direct is not best:
            line += f"; without decoding: {direct.method}, {_decibels(quality(direct))}"
        lines.append(line)
    return lines


def _decibels(value: float) -> str:
    return "exact" if value == np.inf else f"{value:.2f} dB"


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a text table, one line a row, and which methods knew no inputs."""
    inputs = any(np.isfinite(row.output_snr) for row in rows)
    width = max(8, *(len(row.method) for row in rows)) if rows else 8
    head = f"{'method':{width}s} {'target':>6s} {'bits/w':>7s} {'SNR dB':>7s}"
    head += f" {'out dB':>7s}" if inputs else ""
    lines = [head + f" {'fit s':>7s} {'matvec us':>9s}"]
    for row in rows:
        line = f"{row.method:{width}s} {row.target_bits:6.3g}"
        if row.error:
            lines.append(f"{line}   {row.error}")
            continue
        line += f" {row.bits_per_weight:7.4f} {row.snr:7.2f}"
        line += f" {row.output_snr:7.2f}" if inputs else ""
        lines.append(line + f" {row.fit_seconds:7.2f} {row.matvec_us:9.1f}")
    blind = dict.fromkeys(row.method for row in rows if row.without_inputs)
    if blind:
        lines.append(f"fitted without the inputs: {', '.join(blind)}")
    return "\n".join(lines)
