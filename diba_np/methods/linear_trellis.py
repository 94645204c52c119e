"""A trellis code whose values are sums of taps, so that its bits multiply as they are stored."""

from __future__ import annotations

from diba_np.methods.trellis import Trellis
from diba_np.methods.trellis_modes import LINEAR_MODES


class LinearTrellis(Trellis):
    """As `Trellis`, with a tap for each bit of the state instead of a look-up."""

    method = "linear-trellis"
    modes = LINEAR_MODES
