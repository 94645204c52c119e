"""Kinds of moves over the bits of one side: each knows its kernel for rows and for coupled columns.

All arguments but the move's own settings are those of the kernels (`diba_np.kernels.flips`,
`diba_np.kernels.flips_gram`): blocks of rows, which may run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from diba_np.kernels import flips, flips_gram


class Move(Protocol):
    """What `diba_np.search.exact_steps.sweep` makes of the bits of a side."""

    def rows(self, bits: Any, h: Any, G: Any, C: Any, scale: Any, slack: Any, count: Any) -> None:
        """Move a block of independent rows."""

    def columns(
        self, bits: Any, h: Any, P: Any, R: Any, H: Any, scale: Any, slack: Any, count: Any
    ) -> None:
        """Move a block of rows that a Gram matrix couples, one after another."""


@dataclass(frozen=True)
class FixedFlips:
    """Single flips that lower the error at the scales as they are."""

    passes: int

    def rows(self, bits: Any, h: Any, G: Any, C: Any, scale: Any, slack: Any, count: Any) -> None:
        flips.sweep_fixed(bits, h, G, C, scale, slack, self.passes, count)

    def columns(
        self, bits: Any, h: Any, P: Any, R: Any, H: Any, scale: Any, slack: Any, count: Any
    ) -> None:
        flips_gram.sweep_columns_fixed(bits, h, P, R, H, scale, slack, self.passes, count)


@dataclass(frozen=True)
class JointFlips:
    """Single flips that lower the error at the best scale of the row, before and after."""

    passes: int
    shift: float

    def rows(self, bits: Any, h: Any, G: Any, C: Any, scale: Any, slack: Any, count: Any) -> None:
        flips.sweep_joint(bits, h, G, C, scale, slack, self.passes, count, self.shift)

    def columns(
        self, bits: Any, h: Any, P: Any, R: Any, H: Any, scale: Any, slack: Any, count: Any
    ) -> None:
        flips_gram.sweep_columns_joint(
            bits, h, P, R, H, scale, slack, self.passes, count, self.shift
        )


@dataclass(frozen=True)
class Walks:
    """Tabu walks: the best flip, uphill too, the best bits met are kept."""

    moves: int
    patience: int
    shift: float

    def rows(self, bits: Any, h: Any, G: Any, C: Any, scale: Any, slack: Any, count: Any) -> None:
        flips.sweep_tabu(bits, h, G, C, scale, slack, self.moves, count, self.patience)

    def columns(
        self, bits: Any, h: Any, P: Any, R: Any, H: Any, scale: Any, slack: Any, count: Any
    ) -> None:
        flips_gram.tabu_columns(
            bits, h, P, R, H, scale, slack, self.moves, count, self.shift, self.patience
        )
