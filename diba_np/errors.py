"""The two kinds of error that are the package's own; everything else is TypeError or ValueError."""

from __future__ import annotations


class FormatError(ValueError):
    """A file cannot be read as what it claims to be.

    The message names the path, the dataset or attribute, what was found and what was expected.
    """


class ConvergenceWarning(UserWarning):
    """A solver stopped at its limit of sweeps or time before its own end condition was met."""
