"""The errors and warnings that are the package's own; all else is TypeError or ValueError."""

from __future__ import annotations


class FormatError(ValueError):
    """A file cannot be read as what it claims to be.

    The message names the path, the dataset or attribute, what was found and what was expected.
    """


class BudgetError(ValueError):
    """A budget is too small for what is to be stored with it, or an SNR is not reached."""


class ConvergenceWarning(UserWarning):
    """A solver stopped at its limit of sweeps or time before its own end condition was met."""
