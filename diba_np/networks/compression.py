"""`compress`: a whole network, layer by layer on what the compressed prefix gives, then DiBARD."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diba_np.checks import check_count, check_number, digest
from diba_np.files.parts import Parts
from diba_np.layers.linear import Layer
from diba_np.layers.registry import LAYERS, as_layer
from diba_np.matrix.budgets import storage_bits
from diba_np.matrix.files import load
from diba_np.methods.weighted import BEST
from diba_np.models.executors import Events, Runner
from diba_np.networks.calibration import Calibration, calibration, iterate_batches
from diba_np.networks.code_training import METHODS as CODED
from diba_np.networks.code_training import distil_with_codes
from diba_np.networks.distillation import distil
from diba_np.networks.importance import KeptImportance, bounded_weights, importance
from diba_np.networks.layerwise import compress_layers
from diba_np.networks.matrix_fit import SCALE_BITS, Fit
from diba_np.networks.network import Network
from diba_np.networks.shares import check_budget, shares
from diba_np.networks.tensors import Lazy
from diba_np.networks.texts import LENGTH, Texts
from diba_np.search.options import EFFORTS

Array = NDArray[Any]

# those whose matrices a layer can hold and train
METHODS = (*LAYERS, "random")

# tokens of a batch: what the way back keeps of all layers is the largest thing in memory
_BATCH = 512

# tokens from whose gradients a decoder's weights of outputs are; all its tokens count alike but for
# their sizes, so that many more can be fitted to
_JUDGED = 8192

# of `compress_layers`: batches that choose how far the target goes from the dense weights
HOLD_OUT = 0.125
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# methods whose bits a weight are any number
_SHARED = ("diba", "linear-trellis", BEST)


def compress(
    net: Network,
    texts: Texts,
    *,
    bits: float = 1.0,
    method: str = "diba",
    effort: str = "fast",
    include: Sequence[str] = (),
    embeddings: bool = True,
    feedback: bool = True,
    activations: bool = True,
    codes: bool = False,
    epochs: int = 1,
    rate: float = 2e-3,
    length: int = LENGTH,
    calibrate: int | None = 32768,
    taught: int | None = None,
    jobs: int = 1,
    threads: int | None = 1,
    executor: futures.Executor | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    seed: int = 0,
) -> Network:
    """Compress a network: its linear layers, its table of tokens and its head.

    First the table, then layer after layer, each fitted to what it gives in the dense network from
    what it reads in the compressed one (`diba_np.networks.layerwise.compress_layers`), tokens and
    outputs weighed by gradients (`diba_np.networks.importance.importance`). Then diagonals, norms
    and biases are trained end to end, taught by the dense network
    (`diba_np.networks.distillation.distil`).

    Parameters
    ----------
    net : Network
        The dense network; it stays as it is.
    texts : str, sequence of str, sequence of sequences of int, or array
        What it is fitted to: texts, token ids, or the arrays that patches are cut from; see
        `diba_np.networks.calibration.calibration`. What it is judged by should be other texts.
    bits : float, default 1.0
        Stored bits a weight of everything compressed together. Layers of a decoder get more or less
        than that by what they matter; those of an encoder, and integer codes, the same each.
    method : str, default "diba"
        One that a layer trains, of `diba_np.layers.registry.LAYERS`, or "random", the control:
        random bits, their diagonals fitted; or "best", which takes for every matrix, at its bits,
        "diba" or "linear-trellis" by short fits of a part of it; where these are within half a
        decibel both are fitted, and the better is taken.
    effort : {"fast", "balanced", "best"}
        Of `diba_np.factorize`.
    include : sequence of str
        Patterns ("*.attention.*") of the linear layers that are compressed; the others stay dense.
        By default all.
    embeddings : bool, default True
        Whether the table of tokens and the head over them are compressed too: one factorization
        where they are the same.
    feedback : bool, default True
        False fits all layers to the dense network's activations, which makes them independent of
        each other: `jobs` of them run at once. What earlier layers lose is then left to DiBARD.
    activations : bool, default True
        False fits matrices to the weights alone, without activations: what a study compares with.
    codes : bool, default False
        Whether DiBARD trains codes too where a method's can be: of "qswd", "bitat", "mesa", see
        `diba_np.networks.code_training.distil_with_codes`.
    epochs : int, default 1
        Passes of DiBARD over `texts`; 0 leaves it out.
    rate : float, default 2e-3
        Its learning rate.
    length : int, default 128
        Most tokens of a row made of texts.
    calibrate : int or None, default 32768
        Tokens that layers are fitted to, rows drawn from all; None takes all.
    taught : int, optional
        Tokens that DiBARD reads in an epoch, rows drawn from all; by default all.
    jobs : int, default 1
        Processes that fit the layers of a group side by side.
    threads : int or None, default 1
        Of each fit.
    executor : concurrent.futures.Executor, optional
        Runs the fits of a group instead: a pool, ``Client.get_executor()`` of Dask. Its processes
        must see `folder`, which must then be given.
    folder : path, optional
        Where everything finished is kept. The same call goes on where an earlier one was killed and
        ends with the same bits. Nothing removes it.
    progress : bool, default False
        Show progress on standard error.
    callback : callable, optional
        Called with a dict for each matrix: ``event`` "matrix", ``name``, ``bits_per_weight``,
        ``output_snr_db``, ``bits_so_far`` and ``left`` (seconds, about); and for each ten steps of
        DiBARD: ``event`` "training", ``step``, ``steps``, ``divergence``, ``hidden``.
    seed : int, default 0

    Returns
    -------
    Network
        `net` with compressed layers, its own norms.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind or value; the budget is too small; `folder` holds another
        run.
    OSError
        Another run writes to `folder` now.

    Notes
    -----
    Cost at 1 bit and "fast": some 25 processor seconds for a layer of 576 x 1536, four forward
    passes over the calibration for each block, and about six passes a row for an epoch of DiBARD.
    Memory: the dense network, moments of one group of layers (``16 n (m + 4 n)`` bytes each), one
    batch. On disk: states between two blocks, and of DiBARD ``16 width`` bytes a token.
    """
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, as networks.load gives it, got {type(net)}")
    if method not in (*METHODS, BEST):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, {BEST}, got {method!r}")
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    check_number(bits, "bits", above=0.0)
    check_count(epochs, "epochs", least=0)
    check_number(rate, "rate", above=0.0)
    check_count(jobs, "jobs")
    check_count(seed, "seed", least=0)
    names = chosen_layers(net, include)
    for name, tokens in (("calibrate", calibrate), ("taught", taught)):
        if tokens is not None:
            check_count(tokens, name)
    if executor is not None and (jobs != 1 or folder is None):
        raise ValueError(
            "executor= takes the place of jobs=, and needs a folder= that its processes see"
        )
    data = calibration(net, texts, length, _BATCH, seed)
    settings: dict[str, Any] = {
        "bits": bits,
        "method": method,
        "effort": effort,
        "include": list(include),
        "embeddings": bool(embeddings),
        "feedback": bool(feedback),
        "activations": bool(activations),
        "calibrate": calibrate,
        "seed": seed,
        "texts": data.digest(),
        "network": _digest(net),
    }
    with tempfile.TemporaryDirectory() as space:
        home = Path(space) if folder is None else Path(folder)
        events = Events(progress, None, callback)
        try:
            runner = Runner(jobs, threads or 1, executor)
            training = _Training(epochs, rate, codes, data.drawn(taught, seed + 1))
            run = _Run(net, names, data, settings, home, events, runner, threads, training)
            run.check_budget()  # before anything is written
            run.check_states()
            home.mkdir(parents=True, exist_ok=True)
            parts = Parts(home / "network", settings)
            try:
                parts.write("matrices", list(run.shapes))
                return run.all()
            finally:
                parts.close()
        finally:
            events.close()


def chosen_layers(net: Network, include: Sequence[str]) -> list[str]:
    """Return the names of the trunk's linear layers that match one of some patterns; () for all.

    Raises
    ------
    TypeError
        `include` is no sequence of str.
    ValueError
        A pattern matches no layer.
    """
    if isinstance(include, str) or not all(isinstance(pattern, str) for pattern in include):
        raise TypeError(f"include must be a sequence of patterns, got {include!r}")
    full = {name: (name, f"{name}.weight") for name in net.weights}
    matched = {
        pattern: {name for name, both in full.items() if any(fnmatchcase(n, pattern) for n in both)}
        for pattern in include
    }
    for pattern, names in matched.items():
        if not names:
            raise ValueError(f"include must match linear layers, {pattern!r} matches none")
    chosen = set().union(*matched.values()) if matched else set(net.weights)
    return [name for name in net.weights if name in chosen]


def _digest(net: Network) -> str:
    """Return a SHA-256 of the trunk's weights."""
    return digest(np.array([list(bytes.fromhex(digest(A))) for A in net.weights.values()], float))


class _Training(NamedTuple):
    """What `compress` was asked for of DiBARD."""

    epochs: int
    rate: float
    codes: bool
    rows: Calibration


class _Run:
    """One call of `compress`."""

    def __init__(
        self,
        net: Network,
        names: list[str],
        data: Calibration,
        settings: Mapping[str, Any],
        home: Path,
        events: Events,
        runner: Runner,
        threads: int | None,
        training: _Training,
    ) -> None:
        self.net, self.names, self.data, self.settings = net, names, data, settings
        self.home, self.events = home, events
        self.runner, self.threads, self.training = runner, threads, training
        self.fitted = data.drawn(settings["calibrate"], settings["seed"])
        self.weighed = self.fitted
        if net.kind.decoder:
            most = min(settings["calibrate"] or _JUDGED, _JUDGED)
            self.weighed = data.drawn(most, settings["seed"])
        self.tables = self._tables()
        self.weights = Lazy(self.names, net.weights.__getitem__)
        self.shapes: dict[str, tuple[int, int]] = {
            name: net.layers[name].shape for name in self.tables
        } | {name: (len(A), A.shape[1]) for name, A in self.weights.items()}
        self.stored = self.counted = self.done = 0

    def _tables(self) -> list[str]:
        """Return the table of tokens and the head, those that there are and are compressed."""
        if not self.settings["embeddings"]:
            return []
        found = (self.net.token_name, self.net.head_name)
        return list(dict.fromkeys(name for name in found if name is not None))

    def all(self) -> Network:
        """Run all stages."""
        matters = self._importance() if self.settings["activations"] else None
        bits = self._shares(matters)
        how = (self.settings["method"], self.settings["effort"], self.settings["seed"])
        fit = Fit(*how, self.threads, bits, matters)
        self.events.expect(sum(map(_work, self.shapes.values())))
        replaced = {name: self._table(name, fit) for name in self.tables}
        small = self.net.replaced(replaced)
        if matters is not None:
            replaced |= self._layers(small, matters, fit)
        else:
            for name in self.names:
                replaced[name] = self._alone(name, fit)
        small = self.net.replaced(replaced)
        epochs, rate, codes, rows = self.training
        if not epochs:
            return small
        read, kind = rows.digest()[:8], "-codes" if codes else ""
        options: dict[str, Any] = {
            "epochs": epochs,
            "rate": rate,
            "states": self.home / f"teacher-{read}",
            "path": self.home / f"training-{read}-{epochs}-{rate:g}{kind}.checkpoint",
            "seed": self.settings["seed"],
            "callback": lambda facts: self.events.tell("training", **facts),
        }
        if codes and self.settings["method"] in CODED:
            return distil_with_codes(small, self.net, rows, bits, **options)
        return distil(small, self.net, rows, **options)

    def _importance(self) -> KeptImportance:
        """Return how much tokens and outputs matter, as it is kept: every run sees the same."""
        found = KeptImportance(self.home / "importance", list(self.net.weights))
        if not found.complete:
            seed = self.settings["seed"]
            for name, each in importance(self.net, self.weighed, seed, self.home):
                found.write(name, each)
            found.finish()
        return found

    def _shares(self, matters: KeptImportance | None) -> dict[str, float]:
        """Return the bits a weight of every matrix; the tables get the mean."""
        bits = float(self.settings["bits"])
        even = dict.fromkeys(self.shapes, bits)
        if matters is None or not self._is_uneven:
            return even
        energies = {n: energy for n, energy in matters.energies().items() if n in self.shapes}
        sizes, smallest = self._sizes(energies)
        return even | shares(energies, sizes, bits, smallest)

    @property
    def _is_uneven(self) -> bool:
        """Whether matrices get unequal shares of the budget."""
        own = self.settings["method"] in _SHARED and self.settings["activations"]
        return own and self.net.kind.decoder

    def _sizes(self, names: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the weights of some matrices, and the stored bits of each with k=1."""
        codes = (SCALE_BITS, SCALE_BITS, SCALE_BITS)  # with their grids
        shapes = {name: self.shapes[name] for name in names}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        return sizes, {name: storage_bits(*shape, 1, codes) for name, shape in shapes.items()}

    def check_budget(self) -> None:
        """Refuse a budget that does not hold k=1 of all matrices that share it, or of one alone."""
        sizes, smallest = self._sizes(n for n in self.shapes if n not in self.tables)
        if self._is_uneven:
            check_budget(sizes, self.settings["bits"], smallest)
        elif self.settings["method"] == "diba":
            for name, least in smallest.items():
                check_budget(sizes, self.settings["bits"], {name: least})

    def check_states(self) -> None:
        """Refuse a network whose hidden states overflow on the first text."""
        if not (self.settings["activations"] or self.training.epochs):
            return
        _, inputs, mask = next(iter(iterate_batches(self.fitted)))
        with np.errstate(over="ignore", invalid="ignore"):
            x = self.net.last_hidden(inputs[:1], None if mask is None else mask[:1])
        if not np.isfinite(x if mask is None else x[mask[:1]]).all():
            raise ValueError(
                f"{self.net.tensors.label}: the hidden states of the first text are not finite in "
                f"{self.net.dtype}; look at the sizes of the weights"
            )

    # -- matrices ----------------------------------------------------------------------------------

    def _table(self, name: str, fit: Fit) -> Layer:
        """Return the table of tokens or the head, fitted to what the dense network reads and gives.

        A token's row counts as often as it is read, and as much as it is predicted; the columns go
        by the last hidden states where the matrix is the head.
        """
        path = self.home / f"table-{self.tables.index(name)}.h5"
        layer: Any = self.net.layers[name]
        A = np.asarray(layer.to_matrix().to_dense(), np.float32)
        if path.exists():
            made: Any = load(path)
        else:
            gram, weights = None, None
            if self.settings["activations"]:
                gram, weights = self._table_moments(name, A)
            made = replace(fit, outputs=None, rows=weights, looked_up=True)(name, A, gram)
            made.save(path)
        return self._told(name, A, made)

    def _table_moments(self, name: str, A: Array) -> tuple[Array, Array]:
        """Return the Gram matrix (width, width) and the weights of the rows of a table."""
        net, n = self.net, A.shape[1]
        gram, used, predicted = np.zeros((n, n)), np.zeros(len(A)), np.zeros(len(A))
        for _, inputs, mask in iterate_batches(self.fitted):
            at = np.ones(inputs.shape, bool) if mask is None else mask
            if name == net.token_name:
                used += np.bincount(inputs[at], minlength=len(A))
            if name == net.head_name and net.kind.decoder:
                x = net.last_hidden(inputs, mask)
                for row, some in zip(x, at, strict=True):
                    z = row[some] @ A.T
                    z -= z.max(axis=1, keepdims=True)
                    np.exp(z, out=z)
                    z /= z.sum(axis=1, keepdims=True)
                    predicted += z.sum(axis=0, dtype=np.float64)
                    gram += row[some].T @ row[some]
        even = np.eye(n)
        trace = float(np.trace(gram))
        if trace:
            even = 0.5 * even + 0.5 * gram * (n / trace)
        weights = np.full(len(A), 0.2)
        for part in (used, predicted):
            weights += 0.4 * part / (float(part.mean()) or 1.0)
        return even, weights

    def _alone(self, name: str, fit: Fit) -> Layer:
        """Return a layer fitted to its weights alone."""
        folder = self.home / "alone"
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.names.index(name)}.h5"
        A = self.net.weights[name]
        made: Any = load(path) if path.exists() else fit(name, A, None)
        if not path.exists():
            made.save(path)
        return self._told(name, A, made)

    def _told(self, name: str, A: Array, made: Any) -> Layer:
        """Return a matrix as a layer with the dense network's bias; tell of it."""
        bias = self.net.biases[name] if name in self.net.biases else None
        self._tell({"name": name, "snr_db": made.snr(A), "output_snr_db": None}, made)
        return as_layer(made, bias, self.net.dtype, name)

    def _layers(self, small: Network, matters: KeptImportance, fit: Fit) -> dict[str, Layer]:
        """Return the layers of the trunk, fitted one after another."""
        net, rows = self.net, self.fitted
        tokens: dict[str, list[Array]] = {}
        if not net.kind.decoder:
            tokens = {name: matters.tokens(name) for name in matters.energies()}

        def states(of: Network) -> Callable[[], Iterator[Any]]:
            def first() -> Iterator[Any]:
                for at, inputs, mask in iterate_batches(rows):
                    state = of.start(of.begin(inputs, mask), of.plain)[0]
                    yield {**state, "at": np.array(at)}

            return first

        def weighed(stage: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            def run(state: Any, linear: Any) -> Any:
                def call(name: str, x: Array, keep: Any = None, added: Any = None) -> Array:
                    if name in tokens:
                        weights = tokens[name][int(state["at"])]
                    else:
                        weights = bounded_weights(x, added) * state["mask"]
                    y: Array = linear(name, x, keep=weights, added=added)
                    return y

                return stage(state, call)

            return run

        with self.runner as runner:
            found = compress_layers(
                [weighed(stage) for stage in net.stages(self.names)[1:]],
                self.weights,
                states(net),
                fit,
                biases={name: b for name, b in net.biases.items() if name in self.weights},
                ridge=RIDGES,
                refit=False,  # it knows nothing of the outputs' weights
                hold_out=HOLD_OUT,
                feedback=self.settings["feedback"],
                compressed_batches=states(small),
                runner=runner,
                folder=self.home / "layers",
                scratch=self.home,
                callback=self._tell,
            )
        return dict(found.layers)

    def _tell(self, facts: Mapping[str, Any], made: Any = None) -> None:
        """Report a matrix that is finished."""
        shape = self.shapes[facts["name"]]
        size = math.prod(shape)
        rate = facts["bits_per_weight"] if made is None else made.bits_per_weight
        self.done += 1
        self.stored += rate * size
        self.counted += size
        left = self.events.advance(_work(shape))
        told = dict(facts) | {"bits_per_weight": rate, "bits_so_far": self.stored / self.counted}
        self.events.tell("matrix", **told, left=left)
        decibels = facts["output_snr_db"] if facts["output_snr_db"] is not None else facts["snr_db"]
        text = f"{facts['name'][-40:]} {decibels:.1f} dB, {told['bits_so_far']:.2f} bits a weight"
        self.events.show(self.done, len(self.shapes), text)


def _work(shape: tuple[int, int]) -> float:
    """Return what the fit of a matrix costs, in some unit."""
    return math.prod(shape) * float(min(shape))
