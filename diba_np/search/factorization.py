"""`factorize`: from a matrix and a budget to a `DiBAFactors`."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_matrix, check_largest, check_number, digest
from diba_np.errors import BudgetError, ConvergenceWarning
from diba_np.files.atomic import PathLike
from diba_np.files.checkpoint import EVERY, Checkpoint
from diba_np.machine.blas import blas_problem
from diba_np.machine.thread_pool import ThreadPool
from diba_np.machine.versions import versions
from diba_np.matrix import budgets
from diba_np.matrix.diagonals import HALF, ScaleBits
from diba_np.matrix.factors import DiBAFactors
from diba_np.products.cpu import has_bfloat16
from diba_np.search.conversion import round_diagonals, sum_of
from diba_np.search.exact_steps import squared_error
from diba_np.search.leading import Leading, leading_terms
from diba_np.search.options import SearchOptions, takes_options
from diba_np.search.outcome import Outcome
from diba_np.search.progress import Run, SearchState, thinned
from diba_np.search.size import Size, least_bits
from diba_np.search.solver import Solver, finish
from diba_np.search.target import Target
from diba_np.search.terms import count_terms, spread_of, terms_within
from diba_np.search.weighted_target import Lost, WeightedTarget, reached_db, snr_facts
from diba_np.search.weights import Weights, as_weights

# whose versions may change the bits found
_DECIDING_PACKAGES = ("diba_np", "numpy", "scipy", "numba")

_ROUNDING_DB = 1e-6  # between the SNR of a matrix, and of what terms leave over beside theirs


@takes_options()
def factorize(
    A: ArrayLike,
    *,
    k: int | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    snr: float | None = None,
    inputs: ArrayLike | None = None,
    gram: ArrayLike | None = None,
    output_weight: ArrayLike | None = None,
    init: DiBAFactors | None = None,
    progress: bool = False,
    callback: Callable[[SearchState], Any] | None = None,
    checkpoint: PathLike | Checkpoint | None = None,
    checkpoint_every: float = EVERY,
    **options: Any,
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
    scale_bits : 16, 32, int from 2 to 8, three of them, or "auto", optional
        Bits of an entry of the diagonals: a float, or a code on a logarithmic grid fitted to each
        diagonal (three ints: d1, d2, d3), to which bits and diagonals then adapt. Codes leave more
        of the budget to k: +0.4 dB at 384x384 and 1 bit. "auto" chooses the widths; it is the
        default for the budgets `bits`, `ratio` and `snr`. With a given k, where codes have nothing
        to win, and for the greedy solver the default is 16; with `init` it is that of `init`.
    terms : int or "auto", default "auto"
        How many factorizations are summed, each with diagonals of its own and an equal share of k.
        "auto" takes several only where ``scale_bits="auto"`` leaves the diagonals open, from about
        1.7 bits on (2.7 for sides of 4:1, unless the rows of a wide matrix, columns of a tall one,
        differ much in size; 3.3 with inputs): +1.2 dB at 384x384 and 4 bits. For smooth matrices
        and small ones, under 64 components a term (96 with inputs), it also searches for one term,
        and keeps the better. At any rate a component that holds most of A, such as a mean or an
        outlier, is a term of its own. Of a result in several terms
        ``f.terms[0].d1`` and so on are read; with ``terms=1`` always ``f.d1``.
    solver : {"auto", "greedy"}
        "greedy" is DiBA-Greedy as published. "auto" finds signs by an ADMM with a balance penalty
        and polishes the bits with exact walks by single flips; it gains about 2.4 dB at 1 bit. From
        about 1.8 bits on it does so in stages, each fitted to what the earlier ones leave over.
    effort : {"fast", "balanced", "best"}
        65, 128 or 1000 iterations of the ADMM (of each stage), 1.4 times as many with inputs,
        and longer walks in the polish.
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
        The same seed gives the same bits for every number of threads, on one kind of CPU.
    max_sweeps : int, optional
        Iterations of the ADMM instead of those of `effort`, or rounds of the greedy solver
        (default 1000).
    tol : float, optional
        Relative decrease of the squared error in a round under which polishing (default 1e-5) or
        the greedy solver (default 0: only when no bit flips) ends.
    time_limit : float, optional
        Seconds, after which the search ends with the best found so far; what will be stored is
        rounded then, which takes some more. With a checkpoint the seconds of all runs count, up to
        the last write of each.
    threads : int, optional
        By default as many as the size is worth, of the processors that this process may use; a
        container's quota counts.
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
        and the SNR of the outputs. ``zero_rows`` and ``zero_columns`` count those that are not zero
        in A and came out as zero. ``blas`` is there where BLAS could not be held at one thread.

    Raises
    ------
    TypeError
        An argument is of the wrong kind, or not exactly one budget is given.
    ValueError
        A value or shape is out of range, A holds NaN or infinity, a budget cannot be met, or
        is more than the dense float32 matrix takes with a k above 1024, or `checkpoint` belongs to
        a run with another matrix, other arguments or another version.
    FormatError
        `checkpoint` is damaged, or a file of another kind.

    Warns
    -----
    ConvergenceWarning
        `max_sweeps` or `time_limit` ended the search before its own end condition.
    UserWarning
        `inputs` has fewer rows than channels, there are channels that are always zero, the
        checkpoint cannot be written, or rows or columns of A that are small beside the others are
        lost: nothing of them is right.

    Notes
    -----
    Time about ``iterations * (4 m n k + 6 k^2 (m + n))`` flops in float32, summed over the stages.
    Memory beside A: less than three float32 arrays of ``k (m + n)`` and of a block of rows where A
    is read in blocks; where it is not, ``12 m n`` bytes more, and as much again from the second
    stage on, or ``20 m n`` with weights. With inputs about ``48 n^2`` bytes and ``n^3`` flops more,
    with a matrix `output_weight` ``48 m^2`` and ``m^3``; A is then held whole in float64. Their
    Gram matrix is shrunk towards its diagonal, by the share ``n / (2 N)`` (at least 1 %, at most
    50 %; 1 % with `gram`), and 1e-4 of its own mean square is added to every channel: the units of
    channels do not count.

    At 384x384 (MiniLM attention) and 1 stored bit, strict, one thread:
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
    ((64, 48), 49, True)
    """
    how = SearchOptions.from_keywords(options, "factorize")
    name, value = budgets.chosen({"k": k, "bits": bits, "ratio": ratio, "snr": snr})
    matrix = as_matrix(A)
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    goal = check_number(value, "snr") if name == "snr" else None
    _check_init(init, goal)
    asked = how.scales_for(name)
    if init is not None and how.scale_bits is None:
        asked = init.scale_bits
    size = Size(name, value, shape, asked, goal)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")

    keeper = checkpoint
    if not isinstance(keeper, Checkpoint):
        keeper = None if keeper is None else Checkpoint(keeper, checkpoint_every)

    run = Run(progress, callback, how.time_limit)
    source: dict[str, Any] = {"shape": list(shape), "dtype": str(matrix.dtype)}
    flops = 2.0 * shape[0] * shape[1] * size.near
    with ThreadPool(how.threads, _entries(matrix, how.block_rows), flops) as pool:
        weights = as_weights(inputs, gram, output_weight, shape, pool)
        if keeper is not None:
            source["sha256"] = digest(matrix)
            settings = {
                **how.fingerprint(),
                name: size.k if name == "k" else float(value),
                "scale_bits": size.asked,
                "memory map": isinstance(matrix, np.memmap),
                "bfloat16": has_bfloat16(),
            }
            run.journal.keep_in(keeper, keeper.open(_fingerprint(settings, init, source, weights)))
        target = Target(matrix, pool) if weights is None else WeightedTarget(matrix, pool, weights)
        check_largest(target.largest, "A")
        plans = [Leading(target)]
        open_to_terms = size.auto and name != "k" and how.terms == "auto"
        if open_to_terms and not how.greedy and init is None:
            plans = _plans(target, how, size, goal, run)
        if how.terms not in ("auto", 1) and init is not None:
            raise ValueError(f"terms must be 1 with init=, got {how.terms}")
        if init is not None:
            _check_init_size(init, shape, size.k, how.shift)

        tried: list[tuple[Outcome, ScaleBits]] = []
        try:
            while plans and not (tried and run.stopped):
                plan = plans.pop(0)
                try:
                    tried.append(_search(target, plan, how, size, init, run))
                except BudgetError:  # an SNR that this plan does not reach
                    if not (plans or tried):
                        raise
        finally:
            run.close()
        if len(tried) > 1:  # to judge one takes a product for nothing
            tried.sort(key=lambda one: _cost(target, one[0], goal))
        outcome, scales = tried[0]
        outcome = replace(outcome, sweeps=sum(one.sweeps for one, _ in tried))
        outcome = run.journal.stage("finish", lambda: finish(target, outcome, run, scales))
        lost = Lost(shape)
        reached = snr_facts(target, *outcome.terms, lost=lost) | lost.counts()
    source = {"sha256": source.get("sha256") or digest(matrix), **source}
    record = _record(how, outcome, run, reached, source, weights)
    _warn(how, outcome, record, lost.sentence(plain=weights is None))
    if isinstance(checkpoint, Checkpoint):
        run.journal.keep_done()
    elif keeper is not None:
        keeper.remove()
    return sum_of(outcome.terms, target.unit, record)


def _plans(
    target: Target, how: SearchOptions, size: Size, goal: float | None, run: Run
) -> list[Leading]:
    """Return the leading terms to begin with; none too where it is in doubt which is better."""
    leading = leading_terms(
        target,
        how.shift,
        size.stored(),
        math.inf if goal is None else goal,
        least_bits(target.shape, "auto"),
    )
    if leading.is_doubtful and not run.time_limit:
        return [leading, Leading(target)]
    return [leading]


def _cost(target: Target, outcome: Outcome, goal: float | None) -> tuple[float, float]:
    """Return what is to be least: the bits of what reaches an SNR, else the squared error."""
    error = squared_error(target, *outcome.terms)
    if goal is None or reached_db(target, *outcome.terms) < goal - _ROUNDING_DB:
        return math.inf, error
    return sum_of(outcome.terms, target.unit, {}).storage_bits(), error


def _search(
    target: Target,
    leading: Leading,
    how: SearchOptions,
    size: Size,
    init: DiBAFactors | None,
    run: Run,
) -> tuple[Outcome, ScaleBits]:
    """Search for what leading terms leave over.

    Returns
    -------
    outcome : Outcome
        All terms, in units of `target`; of several each on what is stored.
    scale_bits : int or (int, int, int)
        What a single term is to be rounded to.
    """
    if leading.enough:
        run.step("rank one", 1, 1, len(leading.states), 10 ** (-leading.reached / 10))
        return leading.outcome(), leading.widths[0]
    rest, size = leading.rest, size.less(leading.bits, leading.reached)
    count = more = 1
    if not how.greedy and init is None:
        count, more = _counts(how, size, rest)
    if size.auto and count == 1:
        size.choose_widths(rest, how)
    solver = Solver(rest, how, size.scales, init, run, leading)
    if count > 1:
        solver.set_terms(count, size.auto, size.name, size.value, more)
    outcome = run.journal.stage(
        "search",
        lambda: solver.at(size.k) if size.k else solver.reaching(float(size.value)),
    )
    if count > 1 and size.auto and not (outcome.others or outcome.state.grids):
        size.scales = HALF  # a single term was better, and no code fine enough for it
    if leading.states:
        if not outcome.others:
            round_diagonals(rest, outcome.state, size.scales)
        outcome = leading.followed_by(outcome, target)
    return outcome, size.scales


def _warn(how: SearchOptions, outcome: Outcome, record: dict[str, Any], losses: str | None) -> None:
    """Tell the caller of `factorize` of an end before the search's own, and of lost rows."""
    if not record["converged"]:
        why = record["stopped"] or f"max_sweeps={how.sweeps}"
        warnings.warn(
            f"the {how.solver} solver was ended by {why} before its own end condition"
            + outcome.missing(),
            ConvergenceWarning,
            stacklevel=3,
        )
    if losses:
        warnings.warn(losses, UserWarning, stacklevel=3)


def _counts(how: SearchOptions, size: Size, target: Target) -> tuple[int, int]:
    """Return how many terms to search for, and how many where components come out uneven."""
    if how.terms != "auto":
        if size.name == "k" and how.terms > size.k:
            raise ValueError(f"terms must be at most k, got terms={how.terms} for k={size.k}")
        return int(how.terms), int(how.terms)
    if not size.auto:  # with the diagonals as given a single term is what was asked for
        return 1, 1
    shape, spread = size.shape, spread_of(target)
    rate = size.near * sum(shape) / math.prod(shape)
    even, uneven = (
        count_terms(rate, shape, spread, target.is_coupled, uneven) for uneven in (False, True)
    )
    if even == 1 or size.name == "snr":
        return even, uneven
    bits = budgets.rate_of(size.name, size.value)
    fitting = partial(
        terms_within, bits=bits, shape=shape, scale_bits="auto", coupled=target.is_coupled
    )
    return fitting(even), fitting(uneven)


def _record(
    how: SearchOptions,
    outcome: Outcome,
    run: Run,
    reached: dict[str, Any],
    source: dict[str, Any],
    weights: Weights | None,
) -> dict[str, Any]:
    """Return what a factorization tells about its making.

    `reached` are its SNRs, `source` says which matrix it is of.
    """
    problem = blas_problem()
    return {
        **how.record(),
        "sweeps": outcome.sweeps,
        "stages": outcome.stages or None,
        "converged": outcome.converged and not run.stopped,
        "stopped": run.stopped or None,
        "improving_flips_left": 0 if outcome.settled else None,
        "seconds": round(run.seconds, 3),
        **reached,
        "objective_history": thinned(outcome.history),
        "source": source,
        **({} if weights is None else {"activations": weights.facts}),
        **({"blas": problem} if problem else {}),
        "versions": versions(),
    }


def _fingerprint(
    settings: dict[str, Any],
    init: DiBAFactors | None,
    source: dict[str, Any],
    weights: Weights | None,
) -> dict[str, Any]:
    """Return all that decides about the bits of the result, for a checkpoint."""
    start = None
    if init is not None:
        sha = hashlib.sha256(repr((init.k, init.grids)).encode())
        for name in ("d1", "d2", "d3"):
            sha.update(getattr(init, name).data)
        for bits in (init.b1, init.b2):
            sha.update(bits.words.data)
        start = sha.hexdigest()
    installed = versions()
    return {
        **{f"{name} of A": value for name, value in source.items()},
        **settings,
        "init": start,
        **{f"{k} of the activations": v for k, v in (weights.facts if weights else {}).items()},
        **{f"version of {name}": installed[name] for name in _DECIDING_PACKAGES},
    }


def _entries(matrix: NDArray[Any], block_rows: int | None) -> int | None:
    """Return the entries of a row block; None where the matrix is not read in blocks."""
    if block_rows is not None:
        return -(-block_rows // 64) * 64 * int(matrix.shape[1])
    if isinstance(matrix, np.memmap):
        return int(min(max(matrix.size // 16, 1 << 21), 1 << 23))
    return None


def _check_init(init: Any, goal: float | None) -> None:
    if init is not None and not isinstance(init, DiBAFactors):
        raise TypeError(f"init must be a DiBAFactors, got {type(init).__name__}")
    if init is not None and len(init.terms) > 1:
        raise ValueError(f"init must be of a single term, got a sum of {len(init.terms)}")
    if init is not None and goal is not None:
        raise ValueError("init cannot be used with snr=, which tries several k")


def _check_init_size(init: DiBAFactors, shape: tuple[int, int], k: int, shift: float) -> None:
    if init.shape != shape or init.k != k or init.shift != shift:
        raise ValueError(
            f"init must have shape {shape}, k={k}, shift={shift:g}, "
            f"got shape {init.shape}, k={init.k}, shift={init.shift:g}"
        )
