"""One run over a model: its settings, its searches, the parts that are kept, the result."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import BudgetError, FormatError
from diba_np.files.parts import Parts
from diba_np.machine.versions import versions
from diba_np.matrix import quality
from diba_np.matrix.base import CompressedMatrix
from diba_np.matrix.budgets import bits_within
from diba_np.matrix.diagonals import ScaleBits
from diba_np.matrix.files import load
from diba_np.matrix.row_blocks import stack
from diba_np.matrix.stored_array import StoredArray
from diba_np.methods.weighted import BEST, CHOICES, nearest, rate_of
from diba_np.models.executors import Events, Runner
from diba_np.models.file import Alias, Item, ModelFactors, open_model, write_model
from diba_np.models.fit_rows import CHECKPOINT_EVERY, factorize_rows
from diba_np.models.grams import Grams
from diba_np.models.plan import ALLOCATIONS, Curve, Scan, Task, allocate, least, sample_curves
from diba_np.models.shapes import matrix_view
from diba_np.search.options import SHARED, SearchOptions
from diba_np.search.pilot import USUAL_WIDTHS
from diba_np.sources.entry import Entry

CHECKPOINT = "checkpoint"  # suffix of the file with a search's state

MOST_NAMED = 3  # arrays in a message

_LOST = 1.0  # dB under which next to nothing of a matrix is left
_MOST_RECORDED = 20  # kept or omitted arrays in the record: an attribute has its limits
_MOST_TOLD = 40  # characters of a name in a line of progress

# of a model's matrices
METHODS = (*CHOICES, BEST)


@dataclass(frozen=True)
class Settings:
    """The checked arguments that decide about the result."""

    bits: float
    allocation: str
    search: SearchOptions
    method: str = "diba"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.allocation not in ALLOCATIONS:
            known = ", ".join(ALLOCATIONS)
            raise ValueError(f"allocation must be one of {known}, got {self.allocation!r}")

    def facts(self) -> dict[str, Any]:
        """Return all of it as JSON holds it."""
        used = self.search.as_used()
        return (
            {"bits": self.bits, "allocation": self.allocation, "method": self.method}
            | {name: used[name] for name in SHARED}
            | {"scale_bits": self.search.scales_for("bits")}
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that matrices are fitted by."""
        return CHOICES if self.method == BEST else (self.method,)

    @property
    def counted_scale_bits(self) -> tuple[ScaleBits, ...]:
        """What the plan counts with, the first that the budget pays for.

        Under "auto" that is the most that a choice can be, and then about the least.
        """
        asked: ScaleBits | str = self.search.scales_for("bits")
        return (16, USUAL_WIDTHS) if isinstance(asked, str) else (asked,)


class ModelRun:
    """One run: reads rows, has them factorized, keeps parts, writes the result."""

    def __init__(
        self,
        settings: Settings,
        entries: Sequence[Entry],
        plan: Scan,
        grams: Grams,
        threads: int,
        events: Events,
        weighted: bool,
    ) -> None:
        self.weighted = weighted  # whether the caller told what errors count
        self.settings, self.matrices, self.tasks = settings, plan.matrices, plan.tasks
        self.omitted = plan.omitted
        self.shapes = {matrix.name: matrix.shape for matrix in plan.matrices}
        self.entries = {entry.name: entry for entry in entries}
        self.grams, self.threads, self.events = grams, threads, events
        self.parts: Parts | None = None
        self.made: dict[int, CompressedMatrix] = {}  # where there are no parts
        # of each task that is done: record and bits a weight
        self.reached: dict[int, tuple[dict[str, Any], float]] = {}
        self._last: tuple[str, NDArray[Any]] | None = None  # the array read last, by name
        self.bits = 0
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
            "max_sweeps": self.settings.search.max_sweeps,  # None is not the effort's own number
            "arrays": arrays,
            "weights": dict(weights),
            "grams": grams,
        } | versions()

    def rows(self, task: Task) -> NDArray[Any]:
        """Return what a task factorizes."""
        if self._last is None or self._last[0] != task.name:  # its blocks follow each other
            self._last = None
            self._last = task.name, matrix_view(self.entries[task.name].read())
        # a plain array, as a process gets it: the sums over a memory map are cut otherwise
        return np.asarray(self._last[1][task.start : task.stop])

    def gram(self, task: Task) -> NDArray[Any] | None:
        """Return the Gram matrix of what a task's rows read, if there is one."""
        return self.grams.of(task.name, task.start, self.shapes[task.name])

    def _budget(self, size: int, kept_bits: int) -> int:
        """Return the bits for the matrices; BudgetError where they do not pay for one component."""
        budget = bits_within(1, size, self.settings.bits) - kept_bits
        try:
            self._shares(None, budget)
        except BudgetError as error:
            if not kept_bits:
                raise
            named = ", ".join(
                f"{name!r} {tuple(shape)} {why} {bits} bits"
                for name, shape, why, bits in self._largest_kept()[:MOST_NAMED]
            )
            raise BudgetError(
                f"{error}; kept: {named}; leave them out by their names (exclude)"
            ) from error
        return budget

    def _shares(self, curves: Sequence[Curve] | None, budget: int) -> list[int]:
        """Return the bits of each task; without curves, and as far as it goes, the same rate."""
        *roomy, least_scales = self.settings.counted_scale_bits
        for scales in roomy:
            with suppress(BudgetError):
                return allocate(self.tasks, curves, budget, scales)
        return allocate(self.tasks, curves, budget, least_scales)

    def _largest_kept(self) -> list[list[Any]]:
        """Return (name, shape, why, bits) of what is kept and counts, the largest first."""
        matrices = [m for m in self.matrices if m.kept and m.counted and m.alias_of is None]
        matrices.sort(key=lambda matrix: (-matrix.kept_bits, matrix.name))
        return [[m.name, list(m.shape), m.kept, m.kept_bits] for m in matrices[:_MOST_RECORDED]]

    def all(self, runner: Runner, final: Path | None) -> ModelFactors:
        """Run everything."""
        counted = [m for m in self.matrices if m.counted and m.alias_of is None]
        kept_bits = sum(matrix.kept_bits for matrix in counted if matrix.kept)
        size = sum(matrix.size for matrix in counted)
        budget = self._budget(size, kept_bits)
        self.events.tell(
            "start",
            arrays=len(self.matrices),
            matrices=len({task.name for task in self.tasks}),
            tasks=len(self.tasks),
            weights=size,
            kept_bits=kept_bits,
            budget_bits=budget,
            kept=self._largest_kept(),
            omitted=[[each.name, each.why] for each in self.omitted[:_MOST_RECORDED]],
        )
        methods, even = self.settings.methods, self.settings.allocation == "uniform"
        curves = None if even and len(methods) == 1 else self._curves(runner)
        known = None if curves is None or even else [least([*each.values()]) for each in curves]
        shares = self._shares(known, budget)
        self.events.tell("budget", bits=sum(shares))
        chosen = [methods] * len(self.tasks)
        if len(methods) > 1 and curves is not None:
            chosen = [
                tuple(nearest(_errors(task, share, own)))
                for task, share, own in zip(self.tasks, shares, curves, strict=True)
            ]
        self._solve(runner, shares, chosen)
        self._warn_of_losses()
        record = self._record(size, kept_bits)
        if final is None:
            model = ModelFactors.of(self._items(), record)
        else:
            write_model(final, self._items(), record)
            if self.parts is not None:
                self.parts.finish()
            model = open_model(final)
        self.events.tell("done", **{k: v for k, v in record.items() if np.isscalar(v)})
        return model

    def _curves(self, runner: Runner) -> list[dict[str, Curve]]:
        """Return the curves of every task, by method, those of an earlier run included."""
        known = self.parts.read("curves") if self.parts is not None else None
        planned = {
            int(number): {method: Curve(*map(tuple, curve)) for method, curve in curves.items()}
            for number, curves in known or ()
        }

        def arguments(task: Task) -> tuple[Any, ...]:
            search = self.settings.search
            return (
                self.rows(task),
                self.gram(task),
                search.shift,
                search.seed,
                self.threads,
                self.settings.methods,
            )

        missing = [task for task in self.tasks if task.number not in planned]
        written = time.monotonic()
        try:
            for task, curves in runner.run(sample_curves, missing, arguments):
                planned[task.number] = curves
                errors = least([*curves.values()]).errors
                self.events.tell("curve", name=task.name, row=task.start, errors=errors)
                text = f"planning {len(planned)} of {len(self.tasks)}"
                self.events.show(0, len(self.tasks), text)
                if time.monotonic() - written > CHECKPOINT_EVERY:
                    self._keep_curves(planned)
                    written = time.monotonic()
        finally:  # also where it is interrupted
            self._last = None
            if missing:
                self._keep_curves(planned)
        return [planned[task.number] for task in self.tasks]

    def _keep_curves(self, planned: Mapping[int, Mapping[str, Curve]]) -> None:
        if self.parts is not None:
            points = [
                [number, {method: [c.rates, c.errors] for method, c in curves.items()}]
                for number, curves in sorted(planned.items())
            ]
            self.parts.write("curves", points)

    def _solve(
        self, runner: Runner, shares: Sequence[int], methods: Sequence[Sequence[str]]
    ) -> None:
        """Fit every task that is not yet, by the best of some methods, the longest first."""
        work = {task.number: _work(task, shares[task.number]) for task in self.tasks}
        left = Counter(task.name for task in self.tasks)
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
                **{name: getattr(self.settings.search, name) for name in SHARED},
                "threads": self.threads,
            }
            path = None
            if self.parts is not None and not runner.foreign:  # other machines may not see it
                path = str(self.parts.path(task.number, CHECKPOINT))
            return (self.rows(task), rate, self.gram(task), options, path, methods[task.number])

        for task, factors in runner.run(factorize_rows, missing, arguments):
            if self.parts is not None:
                factors.save(self.parts.path(task.number))
                self.parts.path(task.number, CHECKPOINT).unlink(missing_ok=True)
            self._take(task, factors, left, self.events.advance(work[task.number]))

    def _take(
        self,
        task: Task,
        factors: CompressedMatrix,
        left: Counter[str],
        seconds_left: float | None,
        resumed: bool = False,
    ) -> None:
        """Count a task as done and tell about it."""
        if self.parts is None:
            self.made[task.number] = factors
        self.reached[task.number] = (factors.record, factors.bits_per_weight)
        left[task.name] -= 1
        self.bits += factors.storage_bits()
        done = sum(not count for count in left.values())
        facts = {
            "name": task.name,
            "row": task.start,
            "shape": task.shape,
            "method": factors.method,
            "k": sum(term.k for term in factors.terms),
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

    def _finished(self, task: Task) -> CompressedMatrix | None:
        """Return what an earlier run kept of a task; None if that is nothing, or not whole."""
        if self.parts is None:
            return None
        try:
            made: CompressedMatrix = load(self.parts.path(task.number))
            return made
        except (FileNotFoundError, FormatError):
            return None

    def _factors(self, task: Task) -> CompressedMatrix:
        factors = self.made.get(task.number) if self.parts is None else self._finished(task)
        if factors is None:
            raise OSError(f"the finished part of {task.name} is gone")
        return factors

    def _items(self) -> Iterator[Item]:
        by_name: dict[str, list[Task]] = {}
        for task in self.tasks:
            by_name.setdefault(task.name, []).append(task)
        for matrix in self.matrices:
            content: CompressedMatrix | Alias
            if matrix.alias_of is not None:
                yield matrix.name, matrix.shape, matrix.dtype, Alias(matrix.alias_of)
                continue
            dtype = matrix.dtype
            if matrix.kept:
                array = self.entries[matrix.name].read()
                content = stored = StoredArray.of(array, matrix.dtype, {"kept": matrix.kept})
                dtype = stored.array_dtype
            else:
                tasks = by_name[matrix.name]
                blocks = [self._factors(task) for task in tasks]
                content = blocks[0]
                if not tasks[0].whole:
                    content = stack(blocks, [t.squares for t in tasks], [t.energy for t in tasks])
                content.record["source"] = {
                    **blocks[0].record["source"],
                    "shape": list(content.shape),
                    "sha256": matrix.sha256,
                }
            yield matrix.name, matrix.shape, dtype, content

    def _warn_of_losses(self) -> None:
        """Warn of matrices that a shared budget leaves next to nothing of."""
        if self.settings.allocation != "shared" or self.grams.given or self.weighted:
            return
        lost = []
        for task in self.tasks:
            record, rate = self.reached[task.number]
            snr, few = record["snr_db"], rate < self.settings.bits / 2
            if few and snr is not None and snr < _LOST and task.name not in lost:
                lost.append(task.name)
        if lost:
            count = len({task.name for task in self.tasks})
            warnings.warn(
                f"{len(lost)} of {count} matrices keep less than {_LOST:g} dB, the first "
                f"{lost[0]!r}: their entries are small beside those of others, which get the bits; "
                'allocation="relative" counts errors relative to each matrix',
                UserWarning,
                stacklevel=4,
            )

    def _record(self, size: int, kept_bits: int) -> dict[str, Any]:
        noise = 0.0
        seconds = 0.0
        for task in self.tasks:
            record, _ = self.reached[task.number]
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
            "omitted_arrays": len(self.omitted),
            "counted_weights": size,
            "counted_bits": self.bits + kept_bits,
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


def _errors(task: Task, bits: int, curves: Mapping[str, Curve]) -> dict[str, float]:
    """Return the error of each method at a share of the bits."""
    rate = np.array([rate_of(bits / math.prod(task.shape), task.shape)])
    return {method: float(curve.at(rate)[0]) for method, curve in curves.items()}
