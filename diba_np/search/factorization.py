"""`factorize`: from a matrix and a budget to a `DiBAFactors`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix, check_count, check_number, check_shift, digest
from diba_np.errors import ConvergenceWarning
from diba_np.files.atomic import PathLike
from diba_np.files.checkpoint import EVERY, Checkpoint
from diba_np.machine.pool import workers
from diba_np.machine.versions import versions
from diba_np.matrix import budgets
from diba_np.matrix.diagonals import ScaleBits, Widths, check_scale_bits
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.quality import decibels
from diba_np.search.greedy import settle, solve_greedy
from diba_np.search.pilot import choose_widths, estimate_k
from diba_np.search.polish import polish
from diba_np.search.progress import Monitor, SearchState
from diba_np.search.rank_one import rank_one, widened
from diba_np.search.refit import factors_of, round_diagonals, state_of
from diba_np.search.relaxation import EFFORTS, Effort
from diba_np.search.stages import relax_staged
from diba_np.search.state import State, sort_components, squared_error
from diba_np.search.target import Target
from diba_np.search.weighted_target import WeightedTarget, reached_db, snr_facts
from diba_np.search.weights import Weights, as_weights

SOLVERS = ("auto", "greedy")

# of d1, d2 and d3; best or nearly so on trained weights from 1 to 2 bits
_USUAL_WIDTHS: Widths = (4, 3, 4)

# a rank-one fit this good needs no search for bits
_EXACT_DB = 100.0


@dataclass(frozen=True)
class _Plan:
    """What one search needs beside the target and k."""

    solver: str
    shift: float
    seed: int
    effort: Effort
    effort_name: str | None  # None where it has no meaning
    max_sweeps: int
    capped: bool  # whether the caller gave `max_sweeps`
    tol: float
    scale_bits: ScaleBits
    init: DiBAFactors | None

    @property
    def widths(self) -> Widths | None:
        """Code widths of the diagonals, where they are coded."""
        return self.scale_bits if isinstance(self.scale_bits, tuple) else None


def factorize(
    A: ArrayLike,
    *,
    k: int | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    snr: float | None = None,
    shift: float = 0.0,
    scale_bits: int | tuple[int, int, int] | str = 16,
    solver: str = "auto",
    effort: str = "balanced",
    inputs: ArrayLike | None = None,
    gram: ArrayLike | None = None,
    output_weight: ArrayLike | None = None,
    init: DiBAFactors | None = None,
    seed: int = 0,
    max_sweeps: int | None = None,
    tol: float | None = None,
    time_limit: float | None = None,
    threads: int | None = None,
    progress: bool = False,
    callback: Callable[[SearchState], Any] | None = None,
    checkpoint: PathLike | Checkpoint | None = None,
    checkpoint_every: float = EVERY,
    block_rows: int | None = None,
) -> DiBAFactors:
    """Factorize a dense matrix into three diagonals and two 0/1 matrices.

    Minimises ``|A - D1 (B1 - shift) D2 (B2 - shift) D3|_F``. Exactly one of the four budgets is
    given; `bits` and `ratio` count everything stored, the diagonals with `scale_bits`.

    Parameters
    ----------
    A : (m, n) array_like
        Any real matrix. A `numpy.memmap` is read in row blocks and never copied whole.
    k : int, optional
        Budget: intermediate dimension.
    bits : float, optional
        Budget: stored bits per weight.
    ratio : float, optional
        Budget: storage as a share of the dense float32 matrix; ``bits / 32``.
    snr : float, optional
        Budget: dB; the smallest k that reaches it is searched for (a full search for each k tried).
        With inputs, of the outputs for them.
    shift : float, default 0.0
        0 for strict 0/1 (DiBA), 0.5 for the +-1 alphabet; a bit b stands for ``b - shift``.
    scale_bits : 16, 32, int from 2 to 8, three of them, or "auto"
        Bits of an entry of the diagonals: a float, or a code on a logarithmic grid fitted to each
        diagonal (three ints: d1, d2, d3), to which bits and diagonals then adapt. Codes leave more
        of the budget to k: +0.4 dB at 384x384 and 1 bit. "auto" chooses the widths.
    solver : {"auto", "greedy"}
        "greedy" is DiBA-Greedy as published. "auto" finds signs by an ADMM with a balance penalty
        and polishes the bits with exact walks by single flips; it gains about 2.4 dB at 1 bit. From
        about 1.8 bits on it does so in stages, each fitted to what the earlier ones leave over.
    effort : {"fast", "balanced", "best"}
        65, 128 or 1000 iterations of the ADMM (of each stage), and longer walks in the polish.
        Where components come out of uneven size, as for smooth matrices, "balanced" takes 320, and
        "best" searches that way too (unless there is a `time_limit`) and keeps the better. Of no
        meaning for the greedy solver. See Notes for what it buys.
    inputs : (N, n) array_like, optional
        What the matrix will be multiplied with, one sample a row: the error of the outputs,
        ``|(A - A_hat) X^T|_F``, is minimised instead. A memory map is read in row blocks.
    gram : (n, n) array_like, optional
        ``X^T X`` in the place of `inputs`, times any constant.
    output_weight : (m,) or (m, m) array_like, optional
        Weights of the squared errors of the outputs, not negative; alone or with one of the above.
        As a matrix W, symmetric and positive semidefinite, the weights of their products:
        ``tr(W E H E^T)`` of the error E, with H of the inputs, is minimised. The mean product of
        the gradients of an objective with respect to the outputs is such a matrix.
    init : DiBAFactors, optional
        Start from this factorization of the same shape and k, and only improve it.
    seed : int, default 0
        The same seed gives the same bits for every number of threads.
    max_sweeps : int, optional
        Iterations of the ADMM instead of those of `effort`, or rounds of the greedy solver
        (default 1000).
    tol : float, optional
        Relative decrease of the squared error in a round under which polishing (default 1e-5) or
        the greedy solver (default 0: only when no bit flips) ends.
    time_limit : float, optional
        Seconds, after which the best found so far is returned. With a checkpoint the seconds of all
        runs count, up to the last write of each.
    threads : int, optional
        By default every processor that this process may use.
    progress : bool, default False
        Show progress on standard error.
    callback : callable, optional
        Called with a `SearchState` after every step; a true return value ends the search.
    checkpoint : path-like or Checkpoint, optional
        A file that keeps the state of the search. If it is there, the search goes on from it, and
        ends with the same bits as if it had never been interrupted; the file is removed on return.
        A `diba_np.files.checkpoint.Checkpoint` is left for the caller to remove when the result
        is safe.
    checkpoint_every : float, default 60
        Seconds, at least, between two writes of that file.
    block_rows : int, optional
        Rows of A that are read and converted at a time, rounded up to a multiple of 64; A is then
        never held whole in another precision, whatever it is. By default only memory maps are read
        so, 1/16 of the rows at a time, with 2 to 8 million entries. The number of rows decides
        about last digits, and so about bits of large matrices.

    Returns
    -------
    DiBAFactors
        Its diagonals are rounded to what a file holds (`scale_bits`). Its `record` tells solver,
        effort, seed, sweeps, components of each stage, seconds, SNR, the history of the relative
        squared error, the SHA-256 of A and versions; with inputs also their SHA-256, number of rows
        and the SNR of the outputs.

    Raises
    ------
    TypeError
        An argument is of the wrong kind, or not exactly one budget is given.
    ValueError
        A value or shape is out of range, A holds NaN or infinity, a budget cannot be met, or
        `checkpoint` belongs to a run with another matrix, other arguments or another version.
    FormatError
        `checkpoint` is damaged, or a file of another kind.

    Warns
    -----
    ConvergenceWarning
        `max_sweeps` or `time_limit` ended the search before its own end condition.
    UserWarning
        `inputs` has fewer rows than channels, there are channels that are always zero, or the
        checkpoint cannot be written.

    Notes
    -----
    Time about ``iterations * (4 m n k + 6 k^2 (m + n))`` flops in float32, summed over the stages.
    Memory beside A: less than three float32 arrays of ``k (m + n)`` and of a block of rows where A
    is read in blocks; where it is not, ``12 m n`` bytes more, and as much again from the second
    stage on, or ``20 m n`` with weights. With inputs about ``48 n^2`` bytes and ``n^3`` flops more,
    with a matrix `output_weight` ``48 m^2`` and ``m^3``; A is then held whole in float64. Their
    Gram matrix is shrunk towards its diagonal, by the share ``n / (2 N)`` (at least 1 %, at most
    50 %; 1 % with `gram`), and 1e-4 of the mean of its diagonal is added to every channel.

    At 384x384 (MiniLM attention) and 1 stored bit with ``scale_bits="auto"``, strict, one thread:
    "fast" 6.21 dB (0.8 s), "balanced" 6.30 dB (1.3 s), "best" 6.44 dB (6.9 s); double binary
    factorization 5.98 dB (1.4 s).

    References
    ----------
    .. [1] N. Ono, "DiBA: Diagonal and Binary Matrix Approximation for Neural Network Weight
       Compression", arXiv 2605.05994.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((64, 48))
    >>> f = factorize(A, bits=2.0)
    >>> f.shape, f.k, f.bits_per_weight <= 2.0
    ((64, 48), 34, True)
    """
    name, value = budgets.chosen({"k": k, "bits": bits, "ratio": ratio, "snr": snr})
    matrix = as_matrix(A)
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    goal = check_number(value, "snr") if name == "snr" else None
    auto = isinstance(scale_bits, str)
    if auto and scale_bits != "auto":
        raise ValueError(f'scale_bits must be a number of bits or "auto", got {scale_bits!r}')
    # under "auto" the widths are chosen at about the right k, and then k for these widths
    stored = _USUAL_WIDTHS if auto else check_scale_bits(scale_bits)
    size = 0 if goal is not None else budgets.intermediate_dimension(name, value, shape, stored)
    plan = _plan(solver, effort, shift, seed, max_sweeps, tol, stored, _check_init(init, goal))
    if time_limit is not None:
        time_limit = check_number(time_limit, "time_limit", above=0.0)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")

    keeper = checkpoint
    if not isinstance(keeper, Checkpoint):
        keeper = None if keeper is None else Checkpoint(keeper, checkpoint_every)

    monitor = Monitor(progress, callback, time_limit)
    source: dict[str, Any] = {"shape": list(shape), "dtype": str(matrix.dtype)}
    with workers(threads, _entries(matrix, block_rows)) as pool:
        weights = as_weights(inputs, gram, output_weight, shape, pool)
        if keeper is not None:
            source["sha256"] = digest(matrix)
            settings = {
                name: size if name == "k" else float(value),
                "scale_bits": scale_bits,
                "effort": plan.effort_name,
                "time_limit": time_limit,
                "block_rows": block_rows,
                "memory map": isinstance(matrix, np.memmap),
            }
            monitor.keep_in(keeper, keeper.open(_fingerprint(plan, settings, source, weights)))
        target = Target(matrix, pool) if weights is None else WeightedTarget(matrix, pool, weights)
        if auto:
            near = size or budgets.usual_k(goal or 0.0, shape)
            stored = choose_widths(target, near, plan.shift, plan.seed)
            plan = replace(plan, scale_bits=stored)
            if goal is None:
                size = budgets.intermediate_dimension(name, value, shape, stored)
        if plan.init is not None:
            _check_init_size(plan.init, shape, size, plan.shift)
        try:
            state = monitor.stage(
                "search",
                lambda: (
                    _search(target, size, plan, monitor)
                    if goal is None
                    else _search_snr(target, goal, plan, monitor)
                ),
            )
        finally:
            monitor.close()
        state = monitor.stage("finish", lambda: _finish(target, state, monitor, plan.scale_bits))
        told = snr_facts(target, state)
    source = {"sha256": source.get("sha256") or digest(matrix), **source}
    record = _record(plan, monitor, told, source, weights)
    if not record["converged"]:
        why = monitor.stopped or f"max_sweeps={plan.max_sweeps}"
        warnings.warn(
            f"the {solver} solver was ended by {why} before its own end condition",
            ConvergenceWarning,
            stacklevel=2,
        )
    if isinstance(checkpoint, Checkpoint):
        monitor.keep_done()
    elif keeper is not None:
        keeper.remove()
    return factors_of(state, target.unit, record)


def _plan(
    solver: str,
    effort: str,
    shift: float,
    seed: int,
    max_sweeps: int | None,
    tol: float | None,
    scale_bits: ScaleBits,
    init: DiBAFactors | None,
) -> _Plan:
    """Return what the arguments of `factorize` say, checked and with their defaults."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    greedy = solver == "greedy"
    return _Plan(
        solver=solver,
        shift=check_shift(shift),
        seed=check_count(seed, "seed", least=0),
        effort=EFFORTS[effort],
        effort_name=None if greedy else effort,
        max_sweeps=(1000 if greedy else EFFORTS[effort].iterations)
        if max_sweeps is None
        else check_count(max_sweeps, "max_sweeps"),
        capped=max_sweeps is not None,
        tol=(0.0 if greedy else 1e-5) if tol is None else _check_tol(tol),
        scale_bits=scale_bits,
        init=init,
    )


def _record(
    plan: _Plan,
    monitor: Monitor,
    told: dict[str, Any],
    source: dict[str, Any],
    weights: Weights | None,
) -> dict[str, Any]:
    """Return what a factorization tells about its making; `told` of its SNR, `source` of A."""
    return {
        "solver": plan.solver,
        "effort": plan.effort_name,
        "seed": plan.seed,
        "sweeps": monitor.sweeps,
        "stages": monitor.stages or None,
        "max_sweeps": plan.max_sweeps,
        "tol": plan.tol,
        "converged": monitor.converged and not monitor.stopped,
        "stopped": monitor.stopped or None,
        "improving_flips_left": 0 if monitor.settled else None,
        "seconds": round(monitor.seconds, 3),
        **told,
        "objective_history": monitor.thinned_history(),
        "source": source,
        **({} if weights is None else {"activations": weights.facts}),
        "versions": versions(),
    }


def _fingerprint(
    plan: _Plan, settings: dict[str, Any], source: dict[str, Any], weights: Weights | None
) -> dict[str, Any]:
    """Return all that decides about the bits of the result, for a checkpoint."""
    names = ("solver", "shift", "seed", "max_sweeps", "tol")
    init = None
    if plan.init is not None:
        sha = hashlib.sha256(repr((plan.init.k, plan.init.grids)).encode())
        for name in ("d1", "d2", "d3"):
            sha.update(getattr(plan.init, name).data)
        for bits in (plan.init.b1, plan.init.b2):
            sha.update(bits.words.data)
        init = sha.hexdigest()
    found = versions()
    return {
        **{f"{name} of A": value for name, value in source.items()},
        **settings,
        **{name: getattr(plan, name) for name in names},
        "init": init,
        **{f"{k} of the activations": v for k, v in (weights.facts if weights else {}).items()},
        **{f"version of {name}": found[name] for name in ("diba_np", "numpy", "scipy", "numba")},
    }


def _entries(matrix: NDArray[Any], block_rows: int | None) -> int | None:
    """Return the entries of a row block; None where the matrix is not read in blocks."""
    if block_rows is not None:
        rows = check_count(block_rows, "block_rows")
        return -(-rows // 64) * 64 * int(matrix.shape[1])
    if isinstance(matrix, np.memmap):
        return int(min(max(matrix.size // 16, 1 << 21), 1 << 23))
    return None


def _check_tol(tol: Any) -> float:
    value = check_number(tol, "tol")
    if value < 0:
        raise ValueError(f"tol must not be negative, got {value:g}")
    return value


def _check_init(init: Any, goal: float | None) -> DiBAFactors | None:
    if init is None:
        return None
    if not isinstance(init, DiBAFactors):
        raise TypeError(f"init must be a DiBAFactors, got {type(init).__name__}")
    if goal is not None:
        raise ValueError("init cannot be used with snr=, which tries several k")
    return init


def _check_init_size(init: DiBAFactors, shape: tuple[int, int], k: int, shift: float) -> None:
    if init.shape != shape or init.k != k or init.shift != shift:
        raise ValueError(
            f"init must have shape {shape}, k={k}, shift={shift:g}, "
            f"got shape {init.shape}, k={init.k}, shift={init.shift:g}"
        )


def _search(target: Target, k: int, plan: _Plan, monitor: Monitor) -> State:
    """Run the chosen solver at one k."""
    rng = np.random.default_rng(plan.seed)
    monitor.begin(k, target.energy, rng)
    start = None if plan.init is None else state_of(plan.init, target.unit, plan.widths)
    if plan.solver == "greedy":
        return solve_greedy(
            target,
            k,
            shift=plan.shift,
            rng=rng,
            max_sweeps=plan.max_sweeps,
            tol=plan.tol,
            monitor=monitor,
            start=start,
        )

    def polished(state: State) -> State:
        polish(target, state, monitor, plan.tol, plan.effort, plan.widths)
        return state

    if start is not None:
        return monitor.stage("polish", lambda: polished(start))
    simple = rank_one(target, plan.shift)
    floor = squared_error(target, simple)
    if decibels(target.energy, floor) >= _EXACT_DB:
        monitor.step("rank one", 1, 1, floor)
        monitor.converged = True
        return widened(simple, k)

    def between(state: State) -> None:
        polish(target, state, monitor, plan.tol, replace(plan.effort, rounds=1))

    def searched(iterations: int, longer: int) -> State:
        found = relax_staged(
            target,
            k,
            shift=plan.shift,
            seed=plan.seed,
            iterations=iterations,
            uneven=longer,
            monitor=monitor,
            polish=between,
        )
        if not monitor.stopped:
            relaxed = found
            found = monitor.stage("polish", lambda: polished(relaxed))
        return found

    state = searched(plan.max_sweeps, 0 if plan.capped else plan.effort.uneven)
    also = EFFORTS.get(plan.effort.also)
    if monitor.uneven and also and not (plan.capped or monitor.stopped or monitor.time_limit):
        told, monitor.history = monitor.history, []
        other = searched(also.iterations, also.uneven)
        if squared_error(target, other) < squared_error(target, state):
            state = other
        else:
            monitor.history = told
    return widened(simple, k) if floor < squared_error(target, state) else state


def _search_snr(target: Target, goal: float, plan: _Plan, monitor: Monitor) -> State:
    """Run the solver at the smallest k that reaches `goal` dB."""
    best: dict[int, State] = {}

    def rounded(k: int) -> State:
        state = _search(target, k, plan, monitor)
        round_diagonals(target, state, plan.scale_bits)
        return state

    def reach(k: int) -> float:
        best[k] = monitor.stage(f"k={k}", lambda: rounded(k))
        if monitor.stopped:
            raise _Ended
        return reached_db(target, best[k])

    first, slope = estimate_k(target, goal, plan.shift, plan.seed)
    try:
        return best[budgets.smallest_k(reach, goal, target.shape, first, slope)]
    except _Ended:
        reached = {k: reached_db(target, state) for k, state in best.items()}
        enough = [k for k in best if reached[k] >= goal]
        return best[min(enough) if enough else max(best, key=lambda k: reached[k])]


class _Ended(Exception):
    """The time limit or the callback has ended the search for the smallest k."""


def _finish(target: Target, state: State, monitor: Monitor, scale_bits: ScaleBits) -> State:
    """Round what will be stored and flip what still improves, unless the time is up."""
    round_diagonals(target, state, scale_bits)
    monitor.settled = not monitor.stopped and settle(target, state, monitor)
    sort_components(target, state)
    return state
