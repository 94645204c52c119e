"""Trellis-coded rounding: every weight is looked up by the last 12 bits of a path down its column.

After QTIP (A. Tseng et al., arXiv 2406.11235): a bit-shift trellis with a table of normal numbers,
its paths found by Viterbi, weights rotated at random, errors fed back under the input statistics.
Beyond it: scales of rows within the path, and bits given to the columns by what their errors cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from diba_np.arrays import row_blocks
from diba_np.checks import check_count
from diba_np.machine.thread_pool import ThreadPool
from diba_np.matrix.base import Array, CompressedMatrix, take
from diba_np.matrix.diagonals import LEAST_CODE, MOST_CODE, LogGrid, pack_codes, unpack_codes
from diba_np.methods.fitting import check_problem
from diba_np.methods.low_rank import LowRank
from diba_np.methods.streams import pack_digits, unpack_digits
from diba_np.methods.trellis_fit import (
    ROTATIONS,
    Coded,
    fewest_bits,
    fit_coded,
    rotations,
    scales_of,
    turned_back,
)
from diba_np.methods.trellis_modes import LOOKUP_MODES, Mode
from diba_np.search.weights import as_weights

if TYPE_CHECKING:
    from typing_extensions import Self


class Trellis(CompressedMatrix):
    """A matrix as a path through a trellis for each column, with scales of rows and columns.

    ``A_hat = scale * R_out^T (d1_i * v_ij * d3_j) R_in`` where column j of v is what its path
    stands for: step t of mode (b, V) appends b bits, and the last 12 bits of the path look up V
    weights. A path is closed, its first steps look back to its last ones, so that no state is
    stored. To it is added what was taken out before it was coded, if anything was: components of
    low rank in bytes.

    Parameters
    ----------
    shape : (int, int)
    coded : diba_np.methods.trellis_fit.Coded
    seed : int
        Of the rotations.
    """

    method = "trellis"
    uses_inputs = True
    modes: ClassVar[tuple[Mode, ...]] = LOOKUP_MODES
    dataset_kinds: ClassVar[dict[str, str]] = {
        "codes": "payload",
        "d1": "scales",
        "d3": "scales",
        "grids": "scales",
        "chosen": "index",
        "used": "index",
        "low": "payload",
    }
    optional_datasets = frozenset({"low"})

    def __init__(
        self,
        shape: tuple[int, int],
        coded: Coded,
        seed: int,
        scale: float = 1.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, scale, record)
        self.coded, self.seed = coded, seed

    @classmethod
    def fit(
        cls,
        A: ArrayLike,
        bits: float,
        inputs: ArrayLike | None = None,
        seed: int = 0,
        gram: ArrayLike | None = None,
        output_weight: ArrayLike | None = None,
        rotation: str | Sequence[str] = "auto",
        scale_bits: int = LEAST_CODE,
        threads: int | None = None,
    ) -> Self:
        """Code the columns one after another, each error fed back into those that follow.

        Parameters
        ----------
        A : (m, n) array_like, real
        bits : float
            Budget in bits per weight.
        inputs : (N, n) array_like, optional
            Cached inputs, one sample a row.
        seed : int
            Seed of the rotations.
        gram : (n, n) array_like, optional
            ``X^T X / N`` instead of `inputs`.
        output_weight : (m,) array_like, optional
            What an error of each output costs; not negative.
        rotation : {"auto", "none", "inputs", "outputs", "both"}, or several of them
            Which sides are rotated at random; of several the best on some of the rows, or of the
            two best where these are near; "auto" tries all.
        scale_bits : int, default 2
            Fewest bits of a scale's code, up to 8: with 8 they can be trained without loss.
        threads : int, optional
            For the columns; with inputs they go one after another. No result depends on it.

        Returns
        -------
        Self

        Raises
        ------
        TypeError, ValueError
            Naming the argument, the rule and the value.
        """
        problem = check_problem(A, bits, None, seed)
        names = (rotation,) if isinstance(rotation, str) else tuple(rotation)
        wrong = [name for name in names if name not in ROTATIONS and rotation != "auto"]
        if wrong or not names:
            rule = f"rotation must be one of auto, {', '.join(ROTATIONS)}"
            raise ValueError(f"{rule}, got {wrong[0] if wrong else names!r}")
        if not LEAST_CODE <= check_count(scale_bits, "scale_bits") <= MOST_CODE:
            raise ValueError(
                f"scale_bits must lie in [{LEAST_CODE}, {MOST_CODE}], got {scale_bits}"
            )
        with ThreadPool(threads) as pool:
            weights = as_weights(inputs, gram, output_weight, problem.shape, pool)
        H = outputs = None
        if weights is not None:
            if weights.output_gram is not None:
                raise ValueError("output_weight must be one weight an output, got a matrix")
            H, outputs = weights.regularised(), weights.outputs
        number = int(problem.rng.integers(2**32))
        is_zero = not problem.W.any()
        if is_zero:
            problem.W = np.ones(problem.shape)
        coded = fit_coded(problem, cls.modes, H, number, rotation, threads, outputs, scale_bits)
        scale = 0.0 if is_zero else problem.scale * coded.gain
        if is_zero:
            coded.low = None
        elif coded.low is not None:
            coded.low = dataclasses.replace(coded.low, scale=problem.scale)
        facts = {} if weights is None else {"weights": weights.facts}
        rows = None if weights is None else weights.facts.get("rows")
        record = problem.record(rotation=coded.rotation, inputs=rows, **facts)
        return cls(problem.shape, coded, number, scale, record)

    @classmethod
    def least_bits(
        cls,
        shape: tuple[int, int],
        rotation: str | Sequence[str] = "auto",
        weighed: bool = False,
        scale_bits: int = LEAST_CODE,
    ) -> int:
        """Return the bits of one column, or of all at the lowest rate, with scales of few bits.

        With scales of 8 bits a fit takes no more than that, of fewer they may need more.
        """
        return fewest_bits(cls.modes, shape, rotation, weighed, scale_bits)

    def to_dense(self) -> Array:
        """Return the matrix as (m, n) float32."""
        m, n = self.shape
        values = self.coded.values(self.modes, m)
        values *= (self.scale * scales_of(self.coded.rows, m))[:, None]
        values *= scales_of(self.coded.columns, n)
        dense = turned_back(values, *rotations(self.coded.rotation, (m, n), self.seed))
        if self.coded.low is not None:
            for rows in row_blocks(self.shape):
                dense[rows] += self.coded.low.rows(rows)
        return dense

    def to_datasets(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(attrs, arrays)``; see `CompressedMatrix.to_datasets`."""
        coded = self.coded
        streams = [
            pack_codes(codes.ravel(), self.modes[number - 1].bits)
            for number, codes in zip(coded.used, coded.codes, strict=True)
            if number
        ]
        grids: list[float] = []
        attrs: dict[str, Any] = {"rotation": coded.rotation, "seed": self.seed}
        arrays: dict[str, Array] = {"codes": np.concatenate(streams)}
        for name, scales in (("d1", coded.rows), ("d3", coded.columns)):
            attrs[f"{name}_bits"] = 0 if scales is None else scales[0].bits
            arrays[name] = np.zeros(0, np.uint8)
            if scales is not None:
                arrays[name] = pack_codes(scales[1], scales[0].bits)
                grids += scales[0].to_pair()
        if coded.low is not None:
            attrs["low_scale"] = coded.low.scale
            arrays["low"] = np.concatenate([coded.low.u.ravel(), coded.low.v.ravel()])
            grids += coded.low.steps.tolist()
        arrays["grids"] = np.array(grids, "<f4")
        arrays["chosen"] = pack_digits(coded.chosen, len(coded.used))
        numbers = [self.modes[at - 1].number if at else 0 for at in coded.used]
        arrays["used"] = np.array(numbers, np.uint8)
        return attrs, arrays

    @classmethod
    def from_datasets(cls, attrs: dict[str, Any], arrays: dict[str, Array]) -> Self:
        """Build the matrix again from `to_datasets`."""
        m, n, seed = (int(attrs[key]) for key in ("m", "n", "seed"))
        rotation = attrs["rotation"]
        if rotation not in ROTATIONS or not 0 <= seed < 2**32:
            raise ValueError(f"rotation {rotation!r} of seed {seed} is not known")
        positions = {0: 0} | {mode.number: at for at, mode in enumerate(cls.modes, 1)}
        numbers = arrays["used"].tolist()
        used = [positions.get(number, -1) for number in numbers]
        if used != sorted(set(used)) or not any(used) or min(used) < 0:
            raise ValueError(f"used must name each known mode once, one at least, found {numbers}")
        chosen = unpack_digits(arrays["chosen"], n, len(used)).astype(np.uint8)
        codes, at = [], 0
        for position, number in enumerate(used):
            columns = int(np.count_nonzero(chosen == position))
            if not number:
                codes.append(np.empty((columns, 0), np.uint8))
                continue
            mode = cls.modes[number - 1]
            size = columns * mode.steps(m)
            stream = arrays["codes"][at : at + -(-size * mode.bits // 8)]
            at += -(-size * mode.bits // 8)
            if 8 * stream.size < size * mode.bits:
                raise ValueError(f"codes must hold {at} bytes and more, found {stream.size}")
            codes.append(unpack_codes(stream, mode.bits, size).reshape(columns, -1))
        if at != arrays["codes"].size:
            raise ValueError(f"codes must hold {at} bytes, found {arrays['codes'].size}")
        widths = [int(attrs["d1_bits"]), int(attrs["d3_bits"])]
        rank = arrays["low"].size // (m + n) if "low" in arrays else 0
        grids = take(arrays, "grids", "<f4", 2 * sum(width > 0 for width in widths) + rank)
        scales: list[tuple[LogGrid, Array] | None] = []
        for name, width, size in zip(("d1", "d3"), widths, (m, n), strict=True):
            stream = take(arrays, name, "u1", -(-width * size // 8))
            if width:
                grid = LogGrid.from_pair(width, grids[:2])
                scales.append((grid, unpack_codes(stream, width, size)))
                grids = grids[2:]
            else:
                scales.append(None)
        coded = Coded(rotation, used, chosen, codes, scales[0], scales[1])
        if "low" in arrays:
            u, v = np.split(take(arrays, "low", "i1", rank * (m + n)).reshape(-1, rank), [m])
            coded.low = LowRank(u, v, grids, float(attrs["low_scale"]))
        return cls((m, n), coded, seed, attrs["scale"])
