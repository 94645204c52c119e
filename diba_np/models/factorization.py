"""`factorize_model`: every matrix of a model within one budget of bits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from diba_np.checks import check_count, check_number
from diba_np.errors import FormatError
from diba_np.files.atomic import as_path, is_stream, target_of
from diba_np.files.parts import Parts
from diba_np.machine.processors import processors, resolve_threads
from diba_np.models.executors import Events, Runner, dask_executor
from diba_np.models.file import ModelFactors, is_model
from diba_np.models.grams import Grams
from diba_np.models.plan import (
    Scan,
    scan,
)
from diba_np.models.run import MOST_NAMED, ModelRun, Settings
from diba_np.search.options import SHARED, SearchOptions, takes_options
from diba_np.sources.opening import Source, open_source


@takes_options(*SHARED)
def factorize_model(
    source: Source,
    *,
    bits: float,
    method: str = "diba",
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
    method : {"diba", "linear-trellis", "best"}, default "diba"
        "best" takes for each matrix, at the bits that it gets, what short fits of a part of it say;
        where these are within half a decibel both are fitted and the better is taken.
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
    terms : int or "auto", default "auto"
        As for `diba_np.factorize`; a matrix whose share of the bits is too small for so many gets
        as many as fit.
    solver, effort, max_sweeps, tol
        As for `diba_np.factorize`. Like `shift` and `scale_bits` of DiBA's searches alone.
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

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> model = factorize_model(
    ...     {"a": rng.normal(size=(40, 30)), "b": rng.normal(size=(32, 48)), "bias": np.zeros(3)},
    ...     bits=2.0, jobs=1, effort="fast",
    ... )
    >>> sorted(model), model.bits_per_weight <= 2.0
    (['a', 'b', 'bias'], True)
    """
    settings = Settings(
        check_number(bits, "bits", above=0.0),
        allocation,
        SearchOptions.from_keywords(options, "factorize_model", SHARED),
        method,
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
    final = None if output is None else as_path(output, "output")
    log = None if json_log is None else as_path(json_log, "json_log")
    _check_written({"output": final, "json_log": log}, {"source": source, "grams": grams})

    with ExitStack() as exits:
        events = Events(progress, log, callback)
        exits.callback(events.close)
        try:
            entries = open_source(source)
            read_grams = Grams(grams)
            plan = scan(
                entries,
                _patterns(include),
                _patterns(exclude),
                min_size,
                weights,
                read_grams,
                relative=settings.allocation == "relative",
            )
            _warn_of_omitted(plan)
            run = ModelRun(settings, entries, plan, read_grams, each, events, bool(weights))
            if final is not None:
                run.parts = Parts(final, run.fingerprint(weights), restart)
                exits.callback(run.parts.close)
            if scheduler is not None:
                executor = exits.enter_context(dask_executor(scheduler))
            runner = exits.enter_context(Runner(max(1, min(jobs, len(plan.tasks))), each, executor))
            return run.all(runner, final)
        except KeyboardInterrupt:
            events.tell("interrupted")
            raise
        except Exception as error:
            events.tell("failed", error=str(error))
            raise


def _check_written(written: Mapping[str, Path | None], read: Mapping[str, Any]) -> None:
    """Complain before the work about a file that could not be written, is read, or has two uses."""
    final, log = written["output"], written["json_log"]
    if final is not None and is_stream(final):
        raise OSError(f"{final}: is no file; a model is written to one")
    if final is not None and log is not None and final.resolve() == log.resolve():
        raise ValueError(f"output and json_log must be two files, got {final} for both")
    for name, path in written.items():
        if path is None:
            continue
        place = target_of(path) if name == "output" else path
        for what, source in read.items():
            if not isinstance(source, (str, os.PathLike)):
                continue
            if not place.exists() or not Path(source).exists():
                continue
            if place.samefile(source):
                raise ValueError(f"{name} must not be the {what}, got {path}")
            inside = Path(source).is_dir() and place.resolve().is_relative_to(
                Path(source).resolve()
            )
            if name == "output" and inside and not is_model(place):
                raise ValueError(
                    f"output is in the folder that is read and may be a part of it, got {path}; "
                    "name another file, or delete this one"
                )


def _patterns(value: Sequence[str]) -> list[str]:
    patterns = [value] if isinstance(value, str) else list(value)
    wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
    if wrong:
        raise TypeError(f"patterns must be strings, got {wrong[0]!r}")
    return patterns


def _check_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping, got {type(weights).__name__}")
    return {
        str(name): check_number(value, f"weights {name!r}", above=0.0)
        for name, value in weights.items()
    }


def _warn_of_omitted(plan: Scan) -> None:
    """Name what the model's file will not hold, unless it was left out anyway.

    Raises
    ------
    FormatError
        Nothing is left.
    """
    lost = [each for each in plan.omitted if not each.why.startswith("left out")]
    if lost:
        shown = ", ".join(f"{each.name!r} ({each.why})" for each in lost[:MOST_NAMED])
        shown += ", ..." if len(lost) > MOST_NAMED else ""
        if not plan.matrices:
            raise FormatError(f"found no numbers in the source: {shown}")
        warnings.warn(
            f"not in the result, as they are no real numbers: {shown}", UserWarning, stacklevel=3
        )
