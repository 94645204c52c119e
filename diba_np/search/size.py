"""`Size`: the widths of the diagonals, and the k that a budget leaves beside them."""

from __future__ import annotations

import copy
import math
from typing import Any

from diba_np.errors import BudgetError
from diba_np.matrix import budgets
from diba_np.matrix.diagonals import HALF, ScaleBits
from diba_np.search.options import SearchOptions
from diba_np.search.pilot import USUAL_WIDTHS, choose_widths
from diba_np.search.target import Target


def least_bits(shape: tuple[int, int], scale_bits: ScaleBits | str) -> int:
    """Return the stored bits of one component, which a budget has to hold."""
    choices = (USUAL_WIDTHS, HALF) if isinstance(scale_bits, str) else (scale_bits,)
    return min(budgets.storage_bits(*shape, 1, scales) for scales in choices)


class Size:
    """The widths of the diagonals, and the k that a budget leaves beside them.

    Under "auto" the widths are chosen at about the right k, and then k for these widths.

    Attributes
    ----------
    asked : int, (int, int, int) or "auto"
        Widths, as they decide about the result.
    auto : bool
        Whether they are to be chosen.
    scales : int or (int, int, int)
        Those that are taken so far.
    k : int
        0 while an SNR is to be reached.
    near : int
        About what k will be.
    """

    def __init__(
        self,
        name: str,
        value: Any,
        shape: tuple[int, int],
        asked: ScaleBits | str,
        goal: float | None,
    ) -> None:
        self.name, self.value, self.shape = name, value, shape
        self.asked, self.auto = asked, asked == "auto"
        self.scales: ScaleBits = USUAL_WIDTHS if isinstance(asked, str) else asked
        self.k = 0 if goal is not None else self._first_k()
        self.near = self.k or budgets.usual_k(goal or 0.0, shape)

    def stored(self) -> float:
        """Return how many bits may be stored; infinitely many for an SNR or a k."""
        if self.name not in ("bits", "ratio"):
            return math.inf
        return budgets.bits_within(*self.shape, budgets.rate_of(self.name, self.value))

    def less(self, stored: int, reached: float) -> Size:
        """Return what is left of the budget after terms of so many bits that reach so many dB."""
        if not stored:
            return copy.copy(self)
        if self.name == "snr":
            return Size("snr", self.value, self.shape, self.asked, float(self.value) - reached)
        left = (self.stored() - stored) / math.prod(self.shape)
        return Size("bits", left, self.shape, self.asked, None)

    def _largest_k(self, scales: ScaleBits) -> int:
        return budgets.intermediate_dimension(self.name, self.value, self.shape, scales)

    def _first_k(self) -> int:
        try:
            return self._largest_k(self.scales)
        except BudgetError:
            usual = budgets.storage_bits(*self.shape, 1, self.scales)
            if not self.auto or least_bits(self.shape, self.asked) == usual:
                raise
        # a handful of entries, for which the grids of codes take more than floats do
        self.asked, self.auto, self.scales = HALF, False, HALF
        return self._largest_k(HALF)

    def choose_widths(self, target: Target, how: SearchOptions) -> None:
        """Take the widths that a pilot finds best, and the k for them."""
        chosen = choose_widths(target, self.near, how.shift, how.seed)
        if self.k:
            try:
                self.k = self._largest_k(chosen)
            except BudgetError:  # the usual ones hold a component, as was seen above
                return
        self.scales = chosen
