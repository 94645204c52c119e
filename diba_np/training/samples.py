"""Pairs of inputs and targets: whole arrays, memory maps, or batches that are iterated again.

Both kinds hold out a share of the samples and give the rest, or the share, in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_samples, check_dense

Array = NDArray[Any]
Pair = tuple[Array, Array]
Source = Iterable[tuple[ArrayLike, ArrayLike]] | Callable[[], Iterable[tuple[ArrayLike, ArrayLike]]]


class Samples:
    """Samples of which some judge.

    Attributes
    ----------
    count, held_count : int
        Samples in all, and how many of them are held out (0: all judge, all are fitted).
    fit_count : int
        Samples that are fitted.
    steps : int
        Batches of a pass over the fitted samples.
    """

    count: int
    held_count: int
    steps: int

    @property
    def fit_count(self) -> int:
        return self.count - self.held_count

    def fitted(self, rng: np.random.Generator | None = None) -> Iterator[Pair]:
        """Yield (x, y) of the fitted samples, x float32; mixed by `rng` where rows can be."""
        raise NotImplementedError

    def judging(self) -> Iterator[Pair]:
        """Yield (x, y) of the samples that judge."""
        raise NotImplementedError


def open_samples(
    X: Any,
    Y: ArrayLike | None,
    shape: tuple[int, int],
    labels: bool,
    validation: float,
    batch_size: int,
    seed: int,
) -> Samples:
    """Check what `retune` was given as samples; see there."""
    if Y is not None:
        return _Arrays(*_check_pair(X, Y, shape, labels), validation, batch_size, seed)
    if isinstance(X, np.ndarray) or not (callable(X) or isinstance(X, Iterable)):
        raise TypeError(
            "Y must be given, or X must yield (x, y) batches: an iterable, or a callable that "
            f"returns an iterator; got X of type {type(X).__name__}"
        )
    if isinstance(X, Iterator):
        raise TypeError(
            "X must yield its batches again at every pass: pass a list, an object with __iter__, "
            f"or a callable that returns an iterator, got a {type(X).__name__}"
        )
    return _Batches(X, shape, labels, validation, seed)


def _check_pair(X: ArrayLike, Y: ArrayLike, shape: tuple[int, int], labels: bool) -> Pair:
    """Check kinds, shapes and finiteness; labels also against the outputs."""
    m, n = shape
    inputs = as_samples(X, "X", n)
    check_dense(Y, "Y")
    leading, targets = np.shape(X)[:-1], np.asanyarray(Y)
    given = targets.shape
    if labels and given and (targets.ndim == 1 or given == leading):
        if targets.dtype.kind not in "iu":
            raise TypeError(f"Y must hold class labels as ints, got dtype {targets.dtype}")
        targets = targets.reshape(-1)
        if len(targets) and not 0 <= targets.min() <= targets.max() < m:
            raise ValueError(
                f"Y must hold labels in [0, {m}), got {targets.min()}..{targets.max()}"
            )
    else:
        targets, given = as_samples(targets, "Y", m), given[:-1]
        if labels and len(targets) and targets.min() < 0:
            raise ValueError(f"Y must hold probabilities, got {targets.min():g}")
    if len(targets) != len(inputs):
        raise ValueError(f"X and Y must hold as many samples, got {len(inputs)} and {len(targets)}")
    if len(leading) > 1 and len(given) > 1 and given != leading:
        raise ValueError(f"X and Y must have the same leading axes, got {leading} and {given}")
    return inputs, targets


def _taken(x: Array, y: Array, rows: Any) -> Pair:
    """Return some rows, in float32; labels as they are."""
    return x[rows].astype(np.float32), y[rows] if y.ndim == 1 else y[rows].astype(np.float32)


class _Arrays(Samples):
    """Arrays, or memory maps of which only a batch is in memory."""

    def __init__(self, x: Array, y: Array, validation: float, batch_size: int, seed: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size
        self.count = len(x)
        order = np.random.default_rng(seed).permutation(self.count)
        least = 1 if validation and self.count > 1 else 0
        self.held_count = min(max(round(validation * self.count), least), self.count - 1)
        held, fit = order[: self.held_count], order[self.held_count :]
        self._fit = np.sort(fit)
        self._held = np.sort(held) if self.held_count else self._fit
        self.steps = -(-len(self._fit) // batch_size)

    def _blocks(self, rows: NDArray[np.intp]) -> Iterator[Pair]:
        for start in range(0, len(rows), self.batch_size):
            # ascending, for the sake of a memory map
            yield _taken(self.x, self.y, np.sort(rows[start : start + self.batch_size]))

    def fitted(self, rng: np.random.Generator | None = None) -> Iterator[Pair]:
        return self._blocks(self._fit if rng is None else rng.permutation(self._fit))

    def judging(self) -> Iterator[Pair]:
        return self._blocks(self._held)


class _Batches(Samples):
    """Batches from a source that is iterated anew at every pass; none is kept.

    Each sample draws a number in [0, 1), the same at every pass. Below the limit it is held out.
    """

    def __init__(
        self, source: Any, shape: tuple[int, int], labels: bool, validation: float, seed: int
    ) -> None:
        self.source, self.shape, self.labels = source, shape, labels
        self.seed = seed
        self.count = 0  # until the first pass has counted them
        batches = [drawn for _, _, drawn in self._pass()]
        self.count = sum(len(drawn) for drawn in batches)
        if self.count == 0:
            raise ValueError("X must yield at least one batch, got none")
        self._limit = _limit(np.concatenate(batches), validation)
        held = [int((drawn < self._limit).sum()) for drawn in batches]
        self.held_count = sum(held)
        self.steps = sum(count < len(drawn) for count, drawn in zip(held, batches, strict=True))

    def _pass(self) -> Iterator[tuple[Array, Array, NDArray[np.float64]]]:
        """Yield (x, y, the number that each row draws)."""
        seen = 0
        for at, pair in enumerate(self.source() if callable(self.source) else self.source):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"X must yield pairs (x, y), got a {type(pair).__name__}")
            inputs, targets = pair
            x, y = _check_pair(inputs, targets, self.shape, self.labels)
            drawn = np.random.default_rng([self.seed, at]).random(len(x))
            seen += len(x)
            yield x, y, drawn
        if self.count and seen != self.count:
            raise ValueError(
                f"X must yield the same samples at every pass, got {self.count} and then {seen}"
            )

    def _rows(self, held: bool) -> Iterator[Pair]:
        """Yield (x, y) of the samples that are held out, or of all others."""
        for x, y, drawn in self._pass():
            rows = (drawn < self._limit) == held
            if rows.any():
                yield _taken(x, y, rows)

    def fitted(self, rng: np.random.Generator | None = None) -> Iterator[Pair]:
        return self._rows(held=False)

    def judging(self) -> Iterator[Pair]:
        return self._rows(held=self.held_count > 0)


def _limit(drawn: NDArray[np.float64], validation: float) -> float:
    """Return below which of the drawn numbers samples are held out, for a share of them.

    That is at least one of two or more, and never all.
    """
    if not validation or len(drawn) == 1:
        return 0.0
    return float(min(max(validation, np.nextafter(drawn.min(), 1.0)), drawn.max()))
