"""`Coder`: the best path of a trellis code, exactly (Viterbi), open or closed on itself."""

from __future__ import annotations

import threading

import numpy as np

from diba_np.kernels.viterbi import trellis_states, viterbi
from diba_np.matrix.base import Array
from diba_np.methods.trellis_modes import Mode

# steps before and after the seam of a closed path from which its state is found
_SEAM = 64

# bits of a closed path up to which all of them are tried; and its steps up to which its seam is
# moved to several places: 1 to 3 dB at 6 steps, 0.1 dB at 30
_TRIED = 14
_SHORT = 32
_CUTS = 4
_PASSES = 8  # most of all places
_MEMORY = 5  # of a path: what it knows of its past, in widths of a state


class Coder:
    """Paths of one mode; keeps what Viterbi works in, for each thread.

    Parameters
    ----------
    mode : Mode
    """

    def __init__(self, mode: Mode) -> None:
        self.mode, self.table = mode, mode.table
        self._scratch = threading.local()
        self._all_paths: dict[int, tuple[Array, Array]] = {}  # by their steps

    def _buffers(self, steps: int) -> tuple[Array, Array, Array]:
        size = self.table.shape[1]
        held: tuple[Array, Array, Array] | None = getattr(self._scratch, "arrays", None)
        if held is None or len(held[2]) < steps:
            groups = size >> self.mode.bits
            held = (
                np.empty(size, np.float32),
                np.empty(groups, np.float32),
                np.empty((steps, groups), np.uint8),
            )
            self._scratch.arrays = held
        return held

    def _search(self, x: Array, scale: Array, end: int) -> tuple[int, Array]:
        codes = np.empty(len(x), np.uint8)
        arguments = (x, scale, self.table, self.mode.bits, end, end, *self._buffers(len(x)))
        return viterbi(*arguments, codes), codes

    def encode(self, x: Array, scale: Array, closed: bool = True) -> tuple[Array, int]:
        """Return the codes of a path, and the state before it.

        Parameters
        ----------
        x, scale : (size,) float
            What the column should be, and the factor of the table at each weight.
        closed : bool
            Whether the state before the path is the state after it, so that it need not be kept.

        Returns
        -------
        codes : (steps,) uint8
        start : int

        Notes
        -----
        The state at the seam of a closed path is that of the best open path over 64 steps on both
        sides of it; given that state the path is the best. Of a short path, which leaves a state
        little freedom, the seam is tried at several places, and of up to 14 bits every path.
        """
        mode = self.mode
        steps = mode.steps(len(x))
        padded = np.zeros((2, steps * mode.weights), np.float32)
        padded[0, : len(x)], padded[1, : len(x)] = x, scale
        goal, factor = padded.reshape(2, steps, mode.weights)
        if not closed:
            start, codes = self._search(goal, factor, -1)
            return codes, start
        if steps * mode.bits <= _TRIED:
            codes = self._best_of_all(goal, factor)
        elif steps <= _SHORT:
            codes = self._best_seam(goal, factor)
        else:
            around = np.arange(-_SEAM, _SEAM) % steps
            seam = int(self._states_around(goal[around], factor[around])[_SEAM - 1])
            return self._search(goal, factor, seam)[1], seam
        return codes, closing_state(mode, codes)

    def _states_around(self, goal: Array, factor: Array) -> Array:
        """Return the state after each step of the best open path."""
        start, codes = self._search(goal, factor, -1)
        states = np.empty(len(codes), np.int64)
        trellis_states(codes, self.mode.bits, start, self.mode.width, states)
        return states

    def _best_of_all(self, goal: Array, factor: Array) -> Array:
        """Return the closed path of least error, all of them tried."""
        paths, values = self._closed_paths(len(goal))
        x, scale = goal.ravel().astype(np.float64), factor.ravel().astype(np.float64)
        errors = (values * values) @ (scale * scale) - 2.0 * (values @ (scale * x))
        best: Array = paths[np.argmin(errors)]
        return best

    def _closed_paths(self, steps: int) -> tuple[Array, Array]:
        """Return the codes (P, T) uint8 of all closed paths and their values (P, T V) float64."""
        if steps not in self._all_paths:
            mode = self.mode
            shifts = mode.bits * np.arange(steps)
            paths = (np.arange(1 << mode.bits * steps)[:, None] >> shifts) & ((1 << mode.bits) - 1)
            states = np.zeros(paths.shape, np.int64)
            for lag in range(-(-mode.width // mode.bits)):
                states |= np.roll(paths, lag, axis=1) << mode.bits * lag
            values = mode.table[:, states & ((1 << mode.width) - 1)].transpose(1, 2, 0)
            own = paths.astype(np.uint8), values.reshape(len(paths), -1).astype(np.float64)
            self._all_paths[steps] = own
        return self._all_paths[steps]

    def _best_seam(self, goal: Array, factor: Array) -> Array:
        """Return a closed path that is the best given its state at any of several steps.

        The open path over the column and what lies around it tells the state at each place of the
        seam. Of what these lead to the best; then, from place to place, the best path of the state
        that it has there, until none is better.
        """
        mode, steps = self.mode, len(goal)
        beyond = min(_MEMORY * mode.width // mode.bits, _SEAM)
        around = np.arange(-beyond, steps + beyond) % steps
        states = self._states_around(goal[around], factor[around])
        cuts = sorted({i * steps // _CUTS for i in range(_CUTS)})

        found: dict[tuple[int, int], Array] = {}  # by seam and state: most are asked for again

        def closed_at(cut: int, state: int) -> Array:
            if (cut, state) not in found:
                ahead, scale = (_rotated(a, cut) for a in (goal, factor))
                found[cut, state] = _rotated(self._search(ahead, scale, state)[1], steps - cut)
            return found[cut, state]

        def error(codes: Array) -> float:
            values = decode(mode, codes, closing_state(mode, codes), goal.size)
            return float(np.sum((goal.ravel() - factor.ravel() * values) ** 2, dtype=np.float64))

        best = min((closed_at(cut, int(states[beyond - 1 + cut])) for cut in cuts), key=error)
        kept = 0
        for cut in cuts * _PASSES:
            codes = closed_at(cut, closing_state(mode, _rotated(best, cut)))
            kept = kept + 1 if np.array_equal(codes, best) else 0
            best = codes  # no worse: the old path has that state there too
            if kept == len(cuts):
                break
        return best


def _rotated(steps: Array, cut: int) -> Array:
    """Return the steps of a closed path from one of them on, C-order."""
    return np.concatenate([steps[cut:], steps[:cut]])


def closing_state(mode: Mode, codes: Array) -> int:
    """Return the state after a closed path, which is the one before it."""
    last = codes[: -1 - -(-mode.width // mode.bits) : -1]  # newest first
    if len(last) * mode.bits < mode.width:  # it goes round more than once
        last = np.resize(last, -(-mode.width // mode.bits))
    state: int = sum(code << mode.bits * lag for lag, code in enumerate(last.tolist()))
    return state & ((1 << mode.width) - 1)


def decode(mode: Mode, codes: Array, start: int, size: int) -> Array:
    """Return the `size` values that a path (steps,) stands for, float32."""
    states = np.empty(codes.size, np.int64)
    trellis_states(codes, mode.bits, start, mode.width, states)
    values: Array = mode.table[:, states].T.ravel()[:size]
    return values
