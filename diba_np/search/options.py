"""`SearchOptions`: how a search is done, each option in one place.

`factorize`, `sweep`, `factorize_model`, the command line, the record of a factorization and the
fingerprint of a checkpoint read the fields here. A new option is one field, and one line in the
docstring of `factorize`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

SOLVERS = ("auto", "greedy")


@dataclass(frozen=True)
class Effort:
    """How much work a search may do.

    Attributes
    ----------
    iterations : int
        Of the ADMM.
    rounds : int
        Most rounds of the polish.
    moves, patience : int
        Of the walk over one row's bits in a round, see `sweep_tabu`.
    uneven : int
        Iterations where the components are of uneven size, see `halves.are_uneven`.
    also : str
        The effort whose iterations a second search then has; the better of both is taken. Such
        components grow apart in a long search, and balance badly at its end.
    """

    iterations: int
    rounds: int
    moves: int
    patience: int
    uneven: int
    also: str = ""


EFFORTS = {
    "fast": Effort(65, 8, 200, 50, 65),
    "balanced": Effort(128, 12, 200, 50, 320),
    "best": Effort(1000, 20, 1000, 300, 1000, "balanced"),
}

COUPLED = 1.4  # iterations with inputs over those without

_GREEDY_ROUNDS = 1000  # of the greedy solver, unless told otherwise
_TOLERANCE = 1e-5  # of the polish, likewise


def _option(
    default: Any,
    text: str,
    *,
    kind: type | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    decides: bool = True,
    recorded: bool = True,
) -> Any:
    """Return a field: its help on the command line, its rule, and who reads it.

    `decides` tells whether the bits found depend on it, `recorded` whether a factorization's
    record carries it (others are in the file already, or of no interest later).
    """
    rule = {"kind": kind, "least": least, "most": most, "above": above, "choices": choices}
    who = {"decides": decides, "recorded": recorded}
    return field(default=default, metadata={"help": text, "metavar": metavar, **rule, **who})


@dataclass(frozen=True)
class SearchOptions:
    """How a search is done; checked when made.

    Attributes
    ----------
    shift, scale_bits, terms, solver, effort, seed, max_sweeps, tol, time_limit, threads, block_rows
        As `diba_np.factorize` documents them. ``scale_bits=None`` stands for "auto" where the
        budget counts bits, and for 16 with a given k.

    Raises
    ------
    TypeError, ValueError
        An option is of the wrong kind or value; the message names it.
    """

    shift: float = _option(
        0.0, "0: bits are 0/1; 0.5: +-1/2", kind=float, least=0.0, most=1.0, recorded=False
    )
    scale_bits: Any = _option(
        None,
        "bits of a diagonal's entry: 16, 32, a code of 2 to 8, three codes as 4,3,4, or auto; "
        "default: auto, 16 with a given k and of greedy",
        metavar="BITS",
        recorded=False,
    )
    terms: Any = _option(
        "auto",
        "how many terms are summed, each with diagonals of its own; auto: as many as pay",
        metavar="T",
        recorded=False,
    )
    solver: str = _option("auto", "auto, or greedy as published", choices=SOLVERS)
    effort: str = _option("balanced", "how long to search", choices=tuple(EFFORTS))
    seed: int = _option(0, "of the random start", kind=int, least=0)
    max_sweeps: int | None = _option(
        None, "iterations of the search; default: by effort", kind=int, least=1, metavar="N"
    )
    tol: float | None = _option(
        None,
        "relative decrease in a round that ends the polish; default: 1e-5, of greedy 0",
        kind=float,
        least=0.0,
    )
    time_limit: float | None = _option(
        None,
        "end the search after this long with the best found so far; rounding what will be stored "
        "and writing it take some more",
        kind=float,
        above=0.0,
        metavar="SECONDS",
        recorded=False,
    )
    threads: int | None = _option(
        None, "default: what the size is worth", kind=int, least=1, metavar="N",
        decides=False, recorded=False,
    )  # fmt: skip
    block_rows: int | None = _option(
        None,
        "map A.npy and read N rows at a time, for matrices as large as the memory",
        kind=int,
        least=1,
        metavar="N",
        recorded=False,
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))
        if self.greedy and self.terms not in ("auto", 1):
            raise ValueError(f'terms must be 1 with solver="greedy", got {self.terms}')

    @classmethod
    def from_keywords(
        cls, keywords: dict[str, Any], caller: str, names: tuple[str, ...] = ()
    ) -> SearchOptions:
        """Return the options that keyword arguments of `caller` name.

        TypeError of one that is none, or none of `names`, where these are given.
        """
        unknown = keywords.keys() - set(names or (one.name for one in fields(cls)))
        if unknown:
            raise TypeError(f"{caller}() got an unexpected keyword argument {min(unknown)!r}")
        return cls(**keywords)

    @property
    def greedy(self) -> bool:
        """Whether the published solver is asked for."""
        return self.solver == "greedy"

    @property
    def work(self) -> Effort:
        """What the effort allows."""
        return EFFORTS[self.effort]

    @property
    def sweeps(self) -> int:
        """Iterations of the ADMM, or most rounds of the greedy solver."""
        if self.max_sweeps is not None:
            return self.max_sweeps
        return _GREEDY_ROUNDS if self.greedy else self.work.iterations

    def iterations(self, coupled: bool) -> int:
        """Return the iterations of the ADMM, where weights couple rows or columns and where not."""
        if coupled and self.max_sweeps is None:
            return round(COUPLED * self.sweeps)
        return self.sweeps

    @property
    def tolerance(self) -> float:
        """Relative decrease of the squared error in a round under which a solver ends."""
        if self.tol is not None:
            return self.tol
        return 0.0 if self.greedy else _TOLERANCE

    def scales_for(self, budget: str) -> Any:
        """Return `scale_bits`; the default depends on the budget: codes pay where bits count."""
        if self.scale_bits is not None:
            return self.scale_bits
        return 16 if budget == "k" or self.greedy else "auto"

    def as_used(self) -> dict[str, Any]:
        """Return all options by name, defaults put in and what has no meaning None."""
        return {
            **asdict(self),
            "effort": None if self.greedy else self.effort,
            "max_sweeps": self.sweeps,
            "tol": self.tolerance,
        }

    def record(self) -> dict[str, Any]:
        """Return what a factorization's record tells of its options."""
        return self._chosen("recorded")

    def fingerprint(self) -> dict[str, Any]:
        """Return the options that decide about the bits of the result.

        None for `max_sweeps` by effort: the same number, given, allows fewer of some kinds.
        """
        return self._chosen("decides") | {"max_sweeps": self.max_sweeps}

    def _chosen(self, mark: str) -> dict[str, Any]:
        used = self.as_used()
        return {one.name: used[one.name] for one in fields(self) if one.metadata[mark]}


# options with a meaning for many matrices
SHARED = ("shift", "scale_bits", "terms", "solver", "effort", "seed", "max_sweeps", "tol")


def _checked(one: Any, value: Any) -> Any:
    """Return the value of a field, checked by its rule; None where that is the default."""
    from diba_np.checks import check_count, check_number

    name, rule = one.name, one.metadata
    if value is None and one.default is None:
        return None
    if name == "scale_bits":
        return check_scales(value)
    if name == "terms":
        return value if value == "auto" else check_count(value, "terms")
    if rule["choices"]:
        if value not in rule["choices"]:
            raise ValueError(f"{name} must be one of {', '.join(rule['choices'])}, got {value!r}")
        return value
    least, most = rule["least"], rule["most"]
    if rule["kind"] is int:
        return check_count(value, name, least=int(least))
    number = check_number(
        value, name, **({} if rule["above"] is None else {"above": rule["above"]})
    )
    if most is not None and not least <= number <= most:
        raise ValueError(f"{name} must lie in [{least:g}, {most:g}], got {number:g}")
    if least is not None and number < least:
        raise ValueError(f"{name} must not be negative, got {number:g}")
    return number


def check_scales(scale_bits: Any) -> Any:
    """Return `scale_bits` checked: "auto", 16, 32 or three code widths.

    Raises
    ------
    TypeError, ValueError
    """
    from diba_np.matrix.diagonals import check_scale_bits

    if isinstance(scale_bits, str):
        if scale_bits != "auto":
            raise ValueError(f'scale_bits must be a number of bits or "auto", got {scale_bits!r}')
        return scale_bits
    return check_scale_bits(scale_bits)


def takes_options(*names: str, **defaults: Any) -> Callable[[Function], Function]:
    """Return a decorator that shows the fields in the signature of a function of ``**options``.

    Parameters
    ----------
    names : str
        The fields; all without any.
    defaults
        Where the function's differ from the fields'.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(one.name, one.default),
                annotation=one.type,
            )
            for one in fields(SearchOptions)
            if not names or one.name in names
        ]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate
