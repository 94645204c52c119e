"""A network run in pieces: stages with a choice of layers, their inputs, states kept on disk."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.arrays import float_type
from diba_np.checks import as_matrix, as_real
from diba_np.files.atomic import atomic_path, naming
from diba_np.layers.linear import Layer

if TYPE_CHECKING:
    from diba_np.networks.network import Network

Array = NDArray[Any]
StageState = Any  # an array, or a tuple or dict of arrays
StageLinear = Callable[..., Array]
Stage = Callable[[StageState, StageLinear], StageState]
Batches = Iterable[StageState] | Callable[[], Iterable[StageState]]


class DenseWeights(Mapping[str, Array]):
    """Dense weights (m, n) by name, each checked once, then read when asked for.

    Parameters
    ----------
    weights : mapping of str to (m, n) array_like

    Attributes
    ----------
    shapes : dict of str to (int, int)

    Raises
    ------
    TypeError, ValueError
        One is no matrix of finite real numbers.
    """

    def __init__(self, weights: Mapping[str, ArrayLike]) -> None:
        self._weights = weights
        self._held: dict[str, Array] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in weights:
            self.shapes[name] = self[name].shape
            self.release()

    def __getitem__(self, name: str) -> Array:
        if name not in self._held:
            self._held[name] = as_matrix(self._weights[name], f"weights[{name!r}]")
        return self._held[name]

    def release(self) -> None:
        """Hold none any longer."""
        self._held.clear()

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Reached(BaseException):
    """Ends a stage at the layer that is waited for; no `except Exception` stops it."""


@dataclass
class Read:
    """What a layer reads in one network, row by row.

    Attributes
    ----------
    x : (N, n) array
    keep : (N,) bool or float, or None
        Which rows count, or how much each does.
    added : (N, m) array or None
        What the network adds to the outputs.
    chosen : bool array or None
        Which rows of all that were given these are; None for all.
    """

    x: Array
    keep: Array | None
    added: Array | None
    chosen: Array | None = None


def as_floats(x: ArrayLike) -> Array:
    """Return float32 or float64 as they are, float32 for what it holds without loss, else float64.

    Raises
    ------
    TypeError
        `x` does not hold real numbers.
    """
    x = np.asarray(as_real(x, "what a layer reads", "be real numbers"))
    return x.astype(float_type(x.dtype), copy=False)


def read_rows(x: ArrayLike, keep: ArrayLike | None, added: ArrayLike | None = None) -> Read:
    """Return the arguments of a call row by row, rows that count for nothing left out."""
    x = as_floats(x)
    rows = x.reshape(-1, x.shape[-1])
    more = None if added is None else np.asarray(added)
    if more is not None:
        more = more.reshape(-1, more.shape[-1])
    if keep is None:
        return Read(rows, None, more)
    weights = np.asarray(keep)
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"keep must have shape {x.shape[:-1]}, got {weights.shape}")
    weights = weights.reshape(-1)
    if weights.dtype != bool and not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("keep must be a mask, or finite weights that are not negative")
    chosen = weights != 0
    left = None if weights.dtype == bool else weights[chosen]
    return Read(rows[chosen], left, None if more is None else more[chosen], chosen)


def check_finite(name: str, batch: int, read: Read, network: str) -> None:
    """Check that a layer reads finite numbers; ValueError that names it, the batch and the row."""
    for array, what in ((read.x, "reads"), (read.added, "is added to")):
        if array is None or np.isfinite(array).all():
            continue
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        kind = "NaN" if np.isnan(array).any() else "infinity"
        raise ValueError(
            f"{name!r} {what} {kind} in batch {batch} of the {network} network, in row {row} of "
            "those that count; states must be finite"
        )


def dense_linear(dense: Mapping[str, Array], biases: Mapping[str, Array]) -> StageLinear:
    """Return what a stage calls in the dense network."""

    def linear(
        name: str, x: ArrayLike, keep: ArrayLike | None = None, added: ArrayLike | None = None
    ) -> Array:
        if name not in dense:
            raise KeyError(f"weights has no {name!r}, which a stage calls")
        x = as_floats(x)
        if x.shape[-1] != dense[name].shape[1]:
            raise ValueError(f"{name!r} reads {dense[name].shape[1]} channels, got {x.shape}")
        y: Array = x @ dense[name].T.astype(x.dtype, copy=False)
        if name in biases:
            y = y + biases[name].astype(x.dtype, copy=False)
        if added is None:
            return y
        more = np.asarray(added)
        if more.shape != y.shape:
            raise ValueError(f"added must have shape {y.shape}, got {more.shape}")
        y = y + more
        return y

    return linear


def layers_linear(
    dense: Mapping[str, Array], biases: Mapping[str, Array], layers: Mapping[str, Layer]
) -> StageLinear:
    """Return what a stage calls in the compressed network; layers not compressed yet are dense."""
    plain, frozen = dense_linear(dense, biases), {}

    def linear(
        name: str, x: ArrayLike, keep: ArrayLike | None = None, added: ArrayLike | None = None
    ) -> Array:
        if name not in layers:
            return plain(name, x, keep, added)
        if name not in frozen:
            frozen[name] = layers[name].frozen()
        y: Array = frozen[name](x)
        return y if added is None else y + np.asarray(added)

    return linear


def groups_of(
    stage: Stage, state: StageState, dense: Mapping[str, Array], biases: Mapping[str, Array]
) -> list[list[str]]:
    """Return the names of a stage in the order of their calls, those with one input together."""
    plain, groups, last = dense_linear(dense, biases), [], None

    def linear(
        name: str, x: ArrayLike, keep: ArrayLike | None = None, added: ArrayLike | None = None
    ) -> Array:
        nonlocal last
        y = plain(name, x, keep, added)
        if x is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
        return y

    stage(state, linear)
    names = [name for group in groups for name in group]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"each layer must be called once, {name!r} is called again")
    return groups


def read_inputs(
    stage: Stage, state: StageState, names: Collection[str], through: StageLinear
) -> dict[str, Read]:
    """Run a stage until layers of one group have been called; return what they read there."""
    seen: dict[str, Read] = {}

    def linear(
        called: str, x: ArrayLike, keep: ArrayLike | None = None, added: ArrayLike | None = None
    ) -> Array:
        if called in names:
            seen[called] = read_rows(x, keep, added)
            if len(seen) == len(names):
                raise _Reached
        return through(called, x, keep, added)

    try:
        stage(state, linear)
    except _Reached:
        pass
    for name in names:
        if name not in seen:
            raise ValueError(f"{name!r} must be called for every batch, as for the first")
    return seen


# -- states on disk --------------------------------------------------------------------------------


def file_name(name: str) -> str:
    """Return a layer's name as that of a file."""
    return "".join(c if c.isalnum() or c in "._-" else f"%{ord(c):x}" for c in name)


def iterate(batches: Batches) -> Iterator[StageState]:
    """Return an iterator over batches that are an iterable or a callable."""
    return iter(batches() if callable(batches) else batches)


_PREFIX = "states-"  # of temporary folders
_TEMPORARY = re.compile(_PREFIX + "[a-z0-9_]{8}")


@contextmanager
def states_folder(home: Path | None) -> Iterator[Path]:
    """Yield a temporary folder for the states between two layers, made in `home`."""
    with tempfile.TemporaryDirectory(dir=home, prefix=_PREFIX) as space:
        yield Path(space)


def remove_states(home: Path) -> None:
    """Remove what processes that were killed left of such folders in `home`."""
    for path in home.glob(f"{_PREFIX}*"):
        # of the names that tempfile gives, and with nothing but states in it
        if _TEMPORARY.fullmatch(path.name) and path.is_dir():
            if all(".npy" in each.name for each in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)


def layer_by_layer(
    net: Network, batches: Iterable[StageState], path: Callable[[int, int], Path]
) -> Iterator[tuple[int, int, StageState]]:
    """Run a network layer by layer, all batches through a layer before the next.

    Dense weights of one layer and the state of one batch are in memory.

    Parameters
    ----------
    net : Network
    batches : iterable
        States as `Network.begin` returns them.
    path : callable
        File of the state before a layer (0 the first) of a batch; that of the layer before may be
        overwritten.

    Yields
    ------
    layer, batch : int
        From 0, the embedding; then after each layer.
    state : dict of str to array
    """
    count = 0
    for at, begun in enumerate(batches):
        state = net.start(begun, net.plain)[0]
        save_state(path(0, at), state)
        count += 1
        yield 0, at, state
    for number, steps in enumerate(net.layer_steps()):
        with net.released():
            for at in range(count):
                state = load_state(path(number, at))
                for step in steps:
                    state = step(state, net.plain)[0]
                save_state(path(number + 1, at), state)
                yield number + 1, at, state


class States:
    """The states of the dense and of the compressed network before a stage, batch by batch.

    Parameters
    ----------
    folder : Path
        Where those before the next stage lie.
    batches : iterable or callable
    dense_folder : Path, optional
        Where those of the dense network stay, for others that pass the same batches through it.
    compressed_batches : iterable or callable, optional
        First states of the compressed network, where they are others.
    both : bool, default True
        Whether the compressed network is run at all; else its states are those of the dense one.
    """

    def __init__(
        self,
        folder: Path,
        batches: Batches,
        dense_folder: Path | None = None,
        compressed_batches: Batches | None = None,
        both: bool = True,
    ) -> None:
        for name, each in (("", batches), ("compressed_", compressed_batches)):
            if isinstance(each, Iterator):
                raise TypeError(
                    f"{name}batches must be iterable again, or a callable that returns an "
                    f"iterator; got a {type(each).__name__}"
                )
        self.folder, self.batches, self.dense_folder = folder, batches, dense_folder
        self.compressed_batches, self.both = compressed_batches, both
        if dense_folder is not None:
            dense_folder.mkdir(parents=True, exist_ok=True)
        self.stage = 0
        self.count = sum(1 for _ in iterate(batches))
        if not self.count:
            raise ValueError("batches must hold at least one batch, got none")

    def first(self) -> StageState:
        """Return the dense network's state of the first batch."""
        return next(iter(self))[0]

    def __iter__(self) -> Iterator[tuple[StageState, StageState]]:
        if self.stage == 0:
            if self.both and self.compressed_batches is not None:
                yield from zip(iterate(self.batches), iterate(self.compressed_batches), strict=True)
                return
            for state in iterate(self.batches):
                yield state, state
            return
        for at in range(self.count):
            one = load_state(self._path(at, "dense"))
            yield one, load_state(self._path(at, "compressed")) if self.both else one

    def _path(self, at: int, kind: str, stage: int | None = None) -> Path:
        home = (self.dense_folder or self.folder) if kind == "dense" else self.folder
        return home / f"{self.stage if stage is None else stage}-{at}-{kind}.npy"

    def advance(self, stage: Stage, dense: StageLinear, compressed: StageLinear) -> None:
        """Replace every state by what a stage makes of it.

        Raises
        ------
        ValueError
            The first or the last state kept of the dense network is not what it gives.
        """
        for at, (one, other) in enumerate(self):
            path = self._path(at, "dense", self.stage + 1)
            # some are made again, to tell whether what is kept is of this network
            if self.dense_folder is None or not path.exists() or at in (0, self.count - 1):
                self._put(path, stage(one, dense))
            if self.both:
                save_state(self._path(at, "compressed", self.stage + 1), stage(other, compressed))
            if self.stage:
                self._path(at, "compressed").unlink(missing_ok=True)
                if self.dense_folder is None:
                    self._path(at, "dense").unlink()
        self.stage += 1

    def _put(self, path: Path, state: StageState) -> None:
        """Write a state of the dense network, or compare it with the one that was kept."""
        if self.dense_folder is None:
            save_state(path, state)
        elif not path.exists():
            with atomic_path(path) as part:
                save_state(part, state)
        elif not _alike(_named(state), _named(load_state(path))):
            raise ValueError(
                f"dense_states must be of this network and these batches, {path} is of others"
            )


def _alike(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Tell whether two states are the same but for rounding."""
    return one.keys() == other.keys() and all(
        value.shape == other[name].shape
        and np.allclose(
            value, other[name], rtol=1e-3, atol=1e-3 * float(np.abs(value).max(initial=0))
        )
        for name, value in one.items()
    )


def _named(state: StageState) -> dict[str, Array]:
    """Return the arrays of a state by names that tell of which kind it is."""
    if isinstance(state, dict):
        named = {f"key {name}": value for name, value in state.items()}
    elif isinstance(state, (tuple, list)):
        named = {f"item {i}": value for i, value in enumerate(state)}
    else:
        named = {"array": state}
    return {name: np.asarray(value) for name, value in named.items()}


def save_state(path: Path, state: StageState) -> None:
    """Write a state to a file; not atomically, for a temporary folder."""
    arrays = {
        name: as_real(array, f"a state's {name}", "hold numbers")
        for name, array in _named(state).items()
    }
    # one array after the other: an .npz would sum them up too
    with naming(path), open(path, "wb") as file:
        for array in (np.array(list(arrays)), *arrays.values()):
            np.save(file, array, allow_pickle=False)


def load_state(path: Path) -> StageState:
    """Return a state as `save_state` wrote it."""
    with open(path, "rb") as file:
        names = np.load(file, allow_pickle=False)
        arrays = {str(name): np.load(file, allow_pickle=False) for name in names}
    if "array" in arrays:
        return arrays["array"]
    if next(iter(arrays)).startswith("item "):
        return tuple(arrays[f"item {i}"] for i in range(len(arrays)))
    return {name.removeprefix("key "): value for name, value in arrays.items()}
