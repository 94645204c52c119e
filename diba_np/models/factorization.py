"""`factorize_model`: every matrix of a model within one budget of bits."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import check_count, check_number
from diba_np.errors import FormatError
from diba_np.files.atomic import is_stream, target_of
from diba_np.files.checkpoint import Checkpoint
from diba_np.files.parts import Parts
from diba_np.machine.processors import processors, resolve_threads
from diba_np.machine.versions import versions
from diba_np.matrix import quality
from diba_np.matrix.diagonals import ScaleBits
from diba_np.matrix.factors import DiBAFactors
from diba_np.matrix.row_blocks import stack
from diba_np.matrix.stored_array import StoredArray
from diba_np.models.executors import Events, Runner, dask_executor
from diba_np.models.file import Alias, Item, Made, ModelFactors, open_model, write_model
from diba_np.models.grams import Grams
from diba_np.models.plan import (
    ALLOCATIONS,
    Curve,
    Scan,
    Task,
    allocate,
    sample_curve,
    scan,
)
from diba_np.models.shapes import matrix_view
from diba_np.search.factorization import factorize
from diba_np.search.options import SearchOptions, takes_options
from diba_np.sources.entry import Entry
from diba_np.sources.opening import Source, open_source

CHECKPOINT = "checkpoint"  # suffix of the file with a search's state
CHECKPOINT_EVERY = 20.0  # seconds

_LOST = 1.0  # dB under which next to nothing of a matrix is left

_MOST_NAMED = 3  # arrays in a message
_MOST_RECORDED = 20  # kept or omitted arrays in the record: an attribute has its limits

_MOST_TOLD = 40  # characters of a name in a line of progress


# of a search: what has a meaning for many matrices
_OPTIONS = ("shift", "scale_bits", "solver", "effort", "seed", "max_sweeps", "tol")


@takes_options(*_OPTIONS)
def factorize_model(
    source: Source,
    *,
    bits: float,
    output: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_size: int = 16,
    allocation: str = "shared",
    weights: Mapping[str, float] | None = None,
    grams: Mapping[str, ArrayLike] | str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    executor: futures.Executor | None = None,
    scheduler: str | None = None,
    restart: bool = False,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    json_log: str | os.PathLike[str] | None = None,
    **options: Any,
) -> ModelFactors:
    """Factorize every matrix of a model; `bits` is for the whole of it.

    Parameters
    ----------
    source : path-like or mapping of str to array_like
        A folder of .npy or of a Hugging Face model, a file of NumPy, safetensors, HDF5, GGUF, ONNX
        or torch, the index of shards, or arrays by name.
    bits : float
        Stored bits per weight over all arrays but those that `include` and `exclude` leave out.
        Everything counts, also biases and other arrays that are kept as they are.
    output : path-like, optional
        The .h5 to write. Finished parts lie in ``OUTPUT.parts`` beside it until it is written: the
        same call goes on from them after an interruption. Without it the result stays in memory.
    include, exclude : sequence of str
        Glob patterns of names (``*.query.weight``): only these, all but these are factorized.
    min_size : int, default 16
        Matrices with fewer rows or columns are kept as they are, as are integers and vectors.
    allocation : {"shared", "relative", "uniform"}
        "shared" gives each matrix the rate at which the sum of all weighted squared errors is
        least, from short searches on a part of each: matrices of small entries get few bits.
        "relative" takes each matrix's error relative to its own energy, times its number of
        entries: for networks whose layers differ in size, where there are no `grams` or `weights`.
        "uniform" gives all the same.
    weights : mapping of str to float, optional
        Sensitivities: of the squared error of the arrays whose name fits the glob pattern, the
        first that does. 1 for all others.
    grams : mapping of str to (n, n) array_like, or a source of such, optional
        ``X^T X / N`` of the inputs of the array of that name: its error is that of the outputs.
        For experts (e, m, n) also (e, n, n). One that is all zero is not used, with a warning.
    shift : float, default 0.0
        0 for strict 0/1 (DiBA), 0.5 for the +-1 alphabet.
    scale_bits : 16, 32, int from 2 to 8, three of them, or "auto", optional
        Bits of an entry of the diagonals, as for `diba_np.factorize`; "auto" by default.
    solver, effort, max_sweeps, tol
        As for `diba_np.factorize`.
    seed : int, default 0
        Of every search.
    jobs : int, optional
        Processes (spawned); by default one for each processor, never more. 1 stays in this one.
    threads : int, optional
        Of each process; by default, and at most, processors over `jobs`. On an executor 1.
    executor : concurrent.futures.Executor, optional
        Runs the searches instead: a pool of threads or processes, ``Client.get_executor()`` of
        Dask, ``MPIPoolExecutor`` of mpi4py.
    scheduler : str, optional
        Address of a running Dask scheduler, ``tcp://host:8786``; extra ``distributed``.
    restart : bool, default False
        Drop the parts of an earlier run with other settings or another source, which are otherwise
        an error.
    progress : bool, default False
        Show matrices done, bits so far and the time left on standard error.
    callback : callable, optional
        Called with each event, a dict (`diba_np.models.executors.Events`).
    json_log : path-like, optional
        Each event is appended to it as a JSON object, one a line.

    Returns
    -------
    ModelFactors
        A mapping of name to factors; of a file they are read when asked for.

    Raises
    ------
    TypeError, ValueError
        An argument or an array is of the wrong kind, shape or value; the budget is too small; the
        parts are those of another run.
    FormatError
        The source cannot be read.
    OSError
        The output cannot be written, or another run writes to it now; processes kept ending
        (`ChildProcessError`).

    Warns
    -----
    UserWarning
        Arrays are no real numbers (they are not in the result); a Gram matrix is all zero; little
        is left of a matrix.

    Notes
    -----
    Experts (e, m, n) are factorized one by one. An array under two names is factorized, stored and
    counted once.

    The bits found are the same for every number of jobs and every executor. Tall matrices of more
    than two million entries (embeddings) are cut into row blocks of at least sixteen times as many
    rows as columns, each a task of its own; the shape alone decides. Memory: beside what
    `factorize` takes, a task's rows for each process.

    Processes are spawned: a script that does not pass ``jobs=1`` has to stand under
    ``if __name__ == "__main__":``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> model = factorize_model(
    ...     {"a": rng.normal(size=(40, 30)), "b": rng.normal(size=(32, 48)), "bias": np.zeros(3)},
    ...     bits=2.0, jobs=1, effort="fast",
    ... )
    >>> sorted(model), model.bits_per_weight <= 2.0
    (['a', 'b', 'bias'], True)
    """
    settings = _Settings(
        check_number(bits, "bits", above=0.0),
        allocation,
        SearchOptions.from_keywords(options, "factorize_model", _OPTIONS),
    )
    min_size = check_count(min_size, "min_size")
    weights = _check_weights(weights)
    cores = processors()
    own = executor is None and scheduler is None
    if not own and jobs is not None:
        raise ValueError("jobs is for processes of our own, give no executor or scheduler with it")
    if executor is not None and scheduler is not None:
        raise ValueError("give one of executor and scheduler")
    if executor is not None and not isinstance(executor, futures.Executor):
        raise TypeError(
            f"executor must be a concurrent.futures.Executor, got {type(executor).__name__}"
        )
    jobs = min(cores, cores if jobs is None else check_count(jobs, "jobs"))
    each = min(resolve_threads(None), max(1, cores // jobs)) if own else 1
    if threads is not None:
        asked = check_count(threads, "threads")
        each = min(asked, each) if own else asked
    final = None if output is None else Path(output)
    if final is not None:
        _check_output(final, source)

    with ExitStack() as exits:
        log = None if json_log is None else Path(json_log)
        events = Events(progress, log, callback)
        exits.callback(events.close)
        try:
            entries = open_source(source)
            read_grams = Grams(grams)
            found = scan(
                entries,
                _patterns(include),
                _patterns(exclude),
                min_size,
                weights,
                read_grams,
                relative=settings.allocation == "relative",
            )
            _warn_of_omitted(found)
            run = _Run(settings, entries, found, read_grams, each, events, bool(weights))
            if final is not None:
                run.parts = Parts(final, run.fingerprint(weights), restart)
                exits.callback(run.parts.close)
            if scheduler is not None:
                executor = exits.enter_context(dask_executor(scheduler))
            runner = exits.enter_context(
                Runner(max(1, min(jobs, len(found.tasks))), each, executor)
            )
            return run.all(runner, final)
        except KeyboardInterrupt:
            events.tell("interrupted")
            raise
        except Exception as error:
            events.tell("failed", error=str(error))
            raise


def _check_output(final: Path, source: Source) -> None:
    """Complain before the work about an output that could not be written, or that is the source."""
    if is_stream(final):
        raise OSError(f"{final}: is no file; a model is written to one")
    found = target_of(final)
    if isinstance(source, (str, os.PathLike)) and found.exists() and Path(source).exists():
        if found.samefile(source):
            raise ValueError(f"output must not be the source, got {final}")


@dataclass(frozen=True)
class _Settings:
    """The checked arguments that decide about the result."""

    bits: float
    allocation: str
    search: SearchOptions

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            known = ", ".join(ALLOCATIONS)
            raise ValueError(f"allocation must be one of {known}, got {self.allocation!r}")

    def facts(self) -> dict[str, Any]:
        """Return all of it as JSON holds it."""
        used = self.search.as_used()
        return (
            {"bits": self.bits, "allocation": self.allocation}
            | {name: used[name] for name in _OPTIONS}
            | {"scale_bits": self.search.scales_for("bits")}
        )

    @property
    def counted_scale_bits(self) -> ScaleBits:
        """What the plan counts with: under "auto" the most that a choice can be."""
        asked: ScaleBits | str = self.search.scales_for("bits")
        return 16 if isinstance(asked, str) else asked


def _patterns(value: Sequence[str]) -> list[str]:
    found = [value] if isinstance(value, str) else list(value)
    wrong = [pattern for pattern in found if not isinstance(pattern, str)]
    if wrong:
        raise TypeError(f"patterns must be strings, got {wrong[0]!r}")
    return found


def _check_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping, got {type(weights).__name__}")
    return {
        str(name): check_number(value, f"weights {name!r}", above=0.0)
        for name, value in weights.items()
    }


def _warn_of_omitted(found: Scan) -> None:
    """Name what the model's file will not hold, unless it was left out anyway.

    Raises
    ------
    FormatError
        Nothing is left.
    """
    lost = [each for each in found.omitted if not each.why.startswith("left out")]
    if lost:
        shown = ", ".join(f"{each.name!r} ({each.why})" for each in lost[:_MOST_NAMED])
        shown += ", ..." if len(lost) > _MOST_NAMED else ""
        if not found.matrices:
            raise FormatError(f"found no numbers in the source: {shown}")
        warnings.warn(
            f"not in the result, as they are no real numbers: {shown}", UserWarning, stacklevel=3
        )


class _Run:
    """One run: reads rows, has them factorized, keeps parts, writes the result."""

    def __init__(
        self,
        settings: _Settings,
        entries: Sequence[Entry],
        found: Scan,
        grams: Grams,
        threads: int,
        events: Events,
        weighted: bool,
    ) -> None:
        self.weighted = weighted  # whether the caller told what errors count
        self.settings, self.matrices, self.tasks = settings, found.matrices, found.tasks
        self.omitted = found.omitted
        self.shapes = {matrix.name: matrix.shape for matrix in found.matrices}
        self.entries = {entry.name: entry for entry in entries}
        self.grams, self.threads, self.events = grams, threads, events
        self.parts: Parts | None = None
        self.made: dict[int, DiBAFactors] = {}
        self.started = time.monotonic()

    def fingerprint(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """Return what the result depends on."""
        arrays = [[m.name, list(m.shape), m.dtype, m.kept, m.sha256] for m in self.matrices]
        grams = {
            name: hashlib.sha256(np.ascontiguousarray(gram).data).hexdigest()
            for name, gram in self.grams.given.items()
        }
        grams |= dict.fromkeys(self.grams.nothing, "zero")
        return {
            **self.settings.facts(),
            "arrays": arrays,
            "weights": dict(weights),
            "grams": grams,
        } | versions()

    def rows(self, task: Task) -> NDArray[Any]:
        """Return what a task factorizes."""
        # a plain array, as a process gets it: the sums over a memory map are cut otherwise
        return np.asarray(matrix_view(self.entries[task.name].read())[task.start : task.stop])

    def gram(self, task: Task) -> NDArray[Any] | None:
        """Return the Gram matrix of what a task's rows read, if there is one."""
        return self.grams.of(task.name, task.start, self.shapes[task.name])

    def _plan(self, size: int, kept: int) -> tuple[int, ScaleBits]:
        """Return the bits for the matrices; ValueError where they do not pay for one component."""
        budget = math.floor(self.settings.bits * size) - kept
        counted_scale_bits = self.settings.counted_scale_bits
        try:
            allocate(self.tasks, None, budget, counted_scale_bits)  # is it enough at all?
        except ValueError as error:
            if not kept:
                raise
            named = ", ".join(
                f"{name!r} {tuple(shape)} {why} {bits} bits"
                for name, shape, why, bits in self._largest_kept()[:_MOST_NAMED]
            )
            raise ValueError(
                f"{error}; kept: {named}; leave them out by their names (exclude)"
            ) from error
        return budget, counted_scale_bits

    def _largest_kept(self) -> list[list[Any]]:
        """Return (name, shape, why, bits) of what is kept and counts, the largest first."""
        kept = [m for m in self.matrices if m.kept and m.counted and m.alias_of is None]
        kept.sort(key=lambda matrix: (-matrix.kept_bits, matrix.name))
        return [[m.name, list(m.shape), m.kept, m.kept_bits] for m in kept[:_MOST_RECORDED]]

    def all(self, runner: Runner, final: Path | None) -> ModelFactors:
        """Run everything."""
        counted = [m for m in self.matrices if m.counted and m.alias_of is None]
        kept = sum(matrix.kept_bits for matrix in counted if matrix.kept)
        size = sum(matrix.size for matrix in counted)
        budget, counted_scale_bits = self._plan(size, kept)
        self.events.tell(
            "start",
            arrays=len(self.matrices),
            matrices=len({task.name for task in self.tasks}),
            tasks=len(self.tasks),
            weights=size,
            kept_bits=kept,
            budget_bits=budget,
            kept=self._largest_kept(),
            omitted=[[each.name, each.why] for each in self.omitted[:_MOST_RECORDED]],
        )
        curves = self._curves(runner) if self.settings.allocation != "uniform" else None
        shares = allocate(self.tasks, curves, budget, counted_scale_bits)
        self.events.tell("budget", bits=sum(shares))
        self._solve(runner, shares)
        self._warn_of_losses()
        record = self._record(size, kept)
        if final is None:
            model = ModelFactors.of(self._items(), record)
        else:
            write_model(final, self._items(), record)
            if self.parts is not None:
                self.parts.finish()
            model = open_model(final)
        self.events.tell("done", **{k: v for k, v in record.items() if np.isscalar(v)})
        return model

    def _curves(self, runner: Runner) -> list[Curve]:
        """Return the curve of every task, those of an earlier run included."""
        known = self.parts.read("curves") if self.parts is not None else None
        found = {} if known is None else {int(number): Curve(*map(tuple, c)) for number, c in known}

        def arguments(task: Task) -> tuple[Any, ...]:
            gram = self.gram(task)
            threads = self.threads
            return (
                self.rows(task),
                gram,
                self.settings.search.shift,
                self.settings.search.seed,
                threads,
            )

        missing = [task for task in self.tasks if task.number not in found]
        for task, curve in runner.run(sample_curve, missing, arguments):
            found[task.number] = curve
            self.events.tell("curve", name=task.name, row=task.start, errors=curve.errors)
            self.events.show(0, len(self.tasks), f"planning {len(found)} of {len(self.tasks)}")
        if self.parts is not None and missing:
            points = [[number, [c.rates, c.errors]] for number, c in sorted(found.items())]
            self.parts.write("curves", points)
        return [found[task.number] for task in self.tasks]

    def _solve(self, runner: Runner, shares: Sequence[int]) -> None:
        """Factorize every task that is not yet, the longest first."""
        work = {task.number: _work(task, shares[task.number]) for task in self.tasks}
        left = {name: 0 for name in (task.name for task in self.tasks)}
        for task in self.tasks:
            left[task.name] += 1
        self.bits = 0
        missing = []
        for task in self.tasks:
            kept = None if self.parts is None else self._finished(task)
            if kept is None:
                missing.append(task)
            else:
                self._take(task, kept, left, None, resumed=True)
        missing.sort(key=lambda task: (-work[task.number], task.number))
        self.events.expect(sum(work[task.number] for task in missing))

        def arguments(task: Task) -> tuple[Any, ...]:
            # half a bit keeps the division from costing a component
            rate = (shares[task.number] + 0.5) / math.prod(task.shape)
            options = {
                **{name: getattr(self.settings.search, name) for name in _OPTIONS},
                "threads": self.threads,
            }
            # other machines may not see the folder
            near = self.parts is not None and not runner.foreign
            path = str(self.parts.path(task.number, CHECKPOINT)) if near and self.parts else None
            return (self.rows(task), rate, self.gram(task), options, path)

        for task, factors in runner.run(factorize_rows, missing, arguments):
            if self.parts is not None:
                factors.save(self.parts.path(task.number))
                self.parts.path(task.number, CHECKPOINT).unlink(missing_ok=True)
            self._take(task, factors, left, self.events.advance(work[task.number]))

    def _take(
        self,
        task: Task,
        factors: DiBAFactors,
        left: dict[str, int],
        seconds_left: float | None,
        resumed: bool = False,
    ) -> None:
        """Count a task as done and tell about it."""
        if self.parts is None:
            self.made[task.number] = factors
        left[task.name] -= 1
        self.bits += factors.storage_bits()
        done = sum(not count for count in left.values())
        facts = {
            "name": task.name,
            "row": task.start,
            "shape": task.shape,
            "k": factors.k,
            "bits": factors.storage_bits(),
            "snr_db": factors.record["snr_db"],
            "search_seconds": factors.record["seconds"],
            "resumed": resumed,
            "seconds_left": None if seconds_left is None else round(seconds_left, 1),
        }
        self.events.tell("part" if left[task.name] else "matrix", **facts, matrices_done=done)
        snr = facts["snr_db"]
        text = f"...{task.name[-_MOST_TOLD:]}" if len(task.name) > _MOST_TOLD else task.name
        text += "" if task.whole else f" rows {task.start} to {task.stop - 1}"
        text += ": exact" if snr is None else f": {snr:.2f} dB"
        eta = "" if seconds_left is None else f", {seconds_left:.0f} s left"
        self.events.show(done, len(left), f"{self.bits / 1e6:.2f} Mbit{eta}; {text}")

    def _finished(self, task: Task) -> DiBAFactors | None:
        """Return what an earlier run kept of a task; None if that is nothing, or not whole."""
        if self.parts is None:
            return None
        try:
            return DiBAFactors.load(self.parts.path(task.number))
        except (FileNotFoundError, FormatError):
            return None

    def _factors(self, task: Task) -> DiBAFactors:
        found = self.made.get(task.number) if self.parts is None else self._finished(task)
        if found is None:
            raise OSError(f"the finished part of {task.name} is gone")
        return found

    def _items(self) -> Iterator[Item]:
        by_name: dict[str, list[Task]] = {}
        for task in self.tasks:
            by_name.setdefault(task.name, []).append(task)
        for matrix in self.matrices:
            made: Made | Alias
            if matrix.alias_of is not None:
                yield matrix.name, matrix.shape, matrix.dtype, Alias(matrix.alias_of)
                continue
            dtype = matrix.dtype
            if matrix.kept:
                array = self.entries[matrix.name].read()
                made = stored = StoredArray.of(array, matrix.dtype, {"kept": matrix.kept})
                dtype = stored.array_dtype
            else:
                tasks = by_name[matrix.name]
                blocks = [self._factors(task) for task in tasks]
                made = blocks[0] if tasks[0].whole else stack(blocks, [t.energy for t in tasks])
                made.record["source"] = {
                    **blocks[0].record["source"],
                    "shape": list(made.shape),
                    "sha256": matrix.sha256,
                }
            yield matrix.name, matrix.shape, dtype, made

    def _warn_of_losses(self) -> None:
        """Warn of matrices that a shared budget leaves next to nothing of."""
        if self.settings.allocation != "shared" or self.grams.given or self.weighted:
            return
        reached, lost = set(), []
        for task in self.tasks:
            factors = self._factors(task)
            snr, few = factors.record["snr_db"], factors.bits_per_weight < self.settings.bits / 2
            if few and snr is not None and snr < _LOST and task.name not in lost:
                lost.append(task.name)
            reached.add(task.name)
        if lost:
            warnings.warn(
                f"{len(lost)} of {len(reached)} matrices keep less than {_LOST:g} dB, the first "
                f"{lost[0]!r}: their entries are small beside those of others, which get the bits; "
                'allocation="relative" counts errors relative to each matrix',
                UserWarning,
                stacklevel=4,
            )

    def _record(self, size: int, kept: int) -> dict[str, Any]:
        noise = 0.0
        seconds = 0.0
        for task in self.tasks:
            record = self._factors(task).record
            reached = record.get("output_snr_db", record["snr_db"])
            noise += 0.0 if reached is None else task.energy / 10 ** (reached / 10)
            seconds += record["seconds"]
        snr = quality.decibels(sum(task.energy for task in self.tasks), noise)
        return {
            **self.settings.facts(),
            "factorized": len({task.name for task in self.tasks}),
            "kept": sum(bool(matrix.kept) for matrix in self.matrices),
            "kept_arrays": self._largest_kept(),
            "shared": sum(matrix.alias_of is not None for matrix in self.matrices),
            "omitted": [[each.name, each.why[:200]] for each in self.omitted[:_MOST_RECORDED]],
            "counted_weights": size,
            "counted_bits": self.bits + kept,
            "weighted_error": noise,
            "snr_db": snr if math.isfinite(snr) else None,
            "search_seconds": round(seconds, 3),
            "wall_seconds": round(time.monotonic() - self.started, 3),
            "versions": versions(),
        }


def _work(task: Task, bits: int) -> float:
    """Return about how long a search takes, in flops of a fixed number of iterations."""
    m, n = task.shape
    k = bits / (m + n)
    return m * n * k + 1.5 * k * k * (m + n)


def factorize_rows(
    A: NDArray[Any],
    bits: float,
    gram: NDArray[Any] | None,
    options: dict[str, Any],
    checkpoint: str | None = None,
) -> DiBAFactors:
    """Factorize one task's rows; what an executor is given."""
    if checkpoint is None:
        return factorize(A, bits=bits, gram=gram, **options)
    keeper = Checkpoint(checkpoint, CHECKPOINT_EVERY)
    try:
        return factorize(A, bits=bits, gram=gram, **options, checkpoint=keeper)
    except FormatError:
        keeper.remove()  # damaged: the search begins anew, with the same result
        return factorize(A, bits=bits, gram=gram, **options, checkpoint=keeper)
