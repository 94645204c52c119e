"""One run of `compress`: its budget, its stages in turn, what it tells of them."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import BudgetError
from diba_np.files.lock import FileLock
from diba_np.files.parts import OtherRunError
from diba_np.layers.linear import Layer
from diba_np.layers.registry import as_layer
from diba_np.machine.versions import versions
from diba_np.matrix.budgets import check_most
from diba_np.matrix.files import load
from diba_np.methods.fitting import too_small
from diba_np.methods.weighted import BEST
from diba_np.models.executors import Events, Runner
from diba_np.networks.calibration import Calibration, iterate_batches
from diba_np.networks.code_training import CODE_TRAINED, distil_with_codes
from diba_np.networks.distillation import distil
from diba_np.networks.finished_layers import FinishedLayers
from diba_np.networks.identity import network_digest
from diba_np.networks.importance import KeptImportance, bounded_weights, importance
from diba_np.networks.layerwise import compress_layers
from diba_np.networks.matrix_fit import COUPLED, Fit
from diba_np.networks.network import Network
from diba_np.networks.shares import check_budget, shares
from diba_np.networks.stages import layer_by_layer, remove_states, states_folder
from diba_np.networks.tasks import SENTENCES, task_of
from diba_np.networks.tensors import Lazy
from diba_np.networks.texts import pooled
from diba_np.networks.token_tables import table_moments

Array = NDArray[Any]

# tokens from whose gradients a decoder's weights of outputs are; all its tokens count alike but for
# their sizes, so that many more can be fitted to
_JUDGED = 8192

# of `compress_layers`: batches that choose how far the target goes from the dense weights
HOLD_OUT = 0.125
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# what a run leaves in its folder, stage by stage
STAGES = ("importance-*", "table-*.h5", "layers", "alone", "teacher-*", "training-*")

# methods whose bits a weight are any number
_SHARED = ("diba", "linear-trellis", BEST)


@dataclass(frozen=True)
class Settings:
    """What the bits of a run depend on, beside its network and its texts; as of `compress`."""

    bits: float
    method: str
    effort: str
    include: list[str]
    embeddings: bool
    feedback: bool
    activations: bool
    calibrate: int | None
    seed: int


class Training(NamedTuple):
    """What `compress` was asked for of DiBARD."""

    epochs: int
    rate: float
    codes: bool
    rows: Calibration


class CompressionRun:
    """One call of `compress`.

    Parameters
    ----------
    net : Network
    names : list of str
        The trunk's linear layers that are compressed.
    texts : Calibration
    settings : Settings
    home : Path
        Where finished stages are kept.
    dense_home : Path
        Where those are kept that depend on the dense network and the texts alone; runs share it.
    events : Events
    runner : Runner
        What fits the layers of a group side by side.
    threads : int or None
        Of each fit.
    training : Training
    """

    def __init__(
        self,
        net: Network,
        names: list[str],
        texts: Calibration,
        settings: Settings,
        home: Path,
        dense_home: Path,
        events: Events,
        runner: Runner,
        threads: int | None,
        training: Training,
    ) -> None:
        self.net, self.names, self.settings = net, names, settings
        self.home, self.dense_home, self.events = home, dense_home, events
        self.runner, self.training = runner, training
        # but for the bits and the weights of the outputs
        self.fit = Fit(settings.method, settings.effort, settings.seed, threads, {}, None)
        self.texts, self.fitted = texts, texts.drawn(settings.calibrate, settings.seed)
        self.weighed = self.fitted
        if net.kind.decoder:
            most = min(settings.calibrate or _JUDGED, _JUDGED)
            self.weighed = texts.drawn(most, settings.seed)
        self.tables = self._tables()
        self.weights = Lazy(self.names, net.weights.__getitem__)
        self.shapes: dict[str, tuple[int, int]] = {
            name: net.layers[name].shape for name in self.tables
        } | {name: (len(A), A.shape[1]) for name, A in self.weights.items()}
        self.stored = self.counted = self.done = 0
        self.resumed: set[str] = set()  # matrices that an earlier run finished

    @cached_property
    def network_digest(self) -> str:
        """The dense network's `diba_np.networks.identity.network_digest`."""
        return network_digest(self.net)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a folder of finished stages is recognised by."""
        data = {"texts": self.texts.digest(), "network": self.network_digest}
        return asdict(self.settings) | data | versions()

    def check_stages(self) -> None:
        """Refuse a folder with stages of which it is not told whose they are."""
        if (self.home / "network.parts" / "run.json").exists():
            return
        found = sorted(path for pattern in STAGES for path in self.home.glob(pattern))
        if found:
            raise OtherRunError(
                f"{self.home} holds {found[0].name} of a run that it does not name; "
                "give another folder, or delete this one to begin anew"
            )

    def remove_states(self) -> None:
        """Remove the states between layers that a run left here which was killed."""
        remove_states(self.home)

    def _tables(self) -> list[str]:
        """Return the table of tokens and the head, those that there are and are compressed."""
        if not self.settings.embeddings:
            return []
        found = (self.net.token_name, self.net.head_name)
        return list(dict.fromkeys(name for name in found if name is not None))

    @property
    def record(self) -> dict[str, Any]:
        """How the network is made, as its file keeps it."""
        epochs, rate, codes, rows = self.training
        trained: dict[str, Any] = {"epochs": epochs, "rate": rate, "codes": codes}
        counted = {"fitted_tokens": int(self.fitted.lengths.sum())}
        if epochs:
            counted["taught_tokens"] = int(rows.lengths.sum())
        return asdict(self.settings) | trained | counted | versions()

    def result(self) -> Network:
        """Run all stages and return the compressed network."""
        small = self._after_all_stages()
        small.record = self.record
        return small

    def _after_all_stages(self) -> Network:
        """Return the network that they make."""
        matters = self._importance() if self.settings.activations else None
        bits = self._shares(matters)
        fit = replace(self.fit, bits=bits, outputs=matters)
        self.resumed = {name for name in self.shapes if self._is_kept(name)}
        missing = self.shapes.keys() - self.resumed
        self.events.expect(sum(_work(self.shapes[name]) for name in missing))
        replaced = {name: self._table(name, fit) for name in self.tables}
        small = self.net.replaced(replaced)
        if matters is not None:
            replaced |= self._layers(small, matters, fit)
        else:
            for name in self.names:
                replaced[name] = self._alone(name, fit)
        if not self.training.epochs:
            return self.net.replaced(replaced)
        # what was compressed before is the teacher's: the student trains copies
        before = self.net.compressed
        own = {name: deepcopy(before[name]) for name in before if name not in replaced}
        return self._trained(self.net.replaced(own | replaced), bits)

    def _trained(self, small: Network, bits: dict[str, float]) -> Network:
        """Return the network after DiBARD."""
        epochs, rate, codes, rows = self.training
        read, kind = rows.digest()[:8], "-codes" if codes else ""
        options: dict[str, Any] = {
            "epochs": epochs,
            "rate": rate,
            "states": self._dense_path("teacher", rows),
            "scratch": self.home,
            "path": self.home / f"training-{read}-{epochs}-{rate!r}{kind}.checkpoint",
            "seed": self.settings.seed,
            "teacher_digest": self.network_digest,
            "callback": lambda facts: self.events.tell("training", **facts),
        }
        if codes and self.settings.method in CODE_TRAINED:
            return distil_with_codes(small, self.net, rows, bits, **options)
        return distil(small, self.net, rows, **options)

    def _importance(self) -> KeptImportance:
        """Return how much tokens and outputs matter, as it is kept: every run sees the same."""
        net, seed = self.net, self.settings.seed
        found = KeptImportance(self._dense_path("importance", self.weighed), list(net.weights))
        # another run that shares it makes it for both
        with FileLock(found.folder / "lock", wait=math.inf, needed=False):
            if not found.complete:
                # only decoders have shares by it
                for name, each in importance(
                    net, self.weighed, seed, self.home, COUPLED, energies=net.kind.decoder
                ):
                    found.write(name, each)
                found.finish()
        return found

    def _dense_path(self, what: str, rows: Calibration) -> Path:
        """Return where something is kept that some rows give in the dense network."""
        made_of = [self.network_digest, rows.digest(), self.settings.seed, versions()]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return self.dense_home / f"{what}-{digest[:12]}"

    def _shares(self, matters: KeptImportance | None) -> dict[str, float]:
        """Return the bits a weight of every matrix; the tables get the mean."""
        bits = float(self.settings.bits)
        even = dict.fromkeys(self.shapes, bits)
        if matters is None or not self._is_uneven:
            return even
        energies = {n: energy for n, energy in matters.energies().items() if n in self.shapes}
        sizes, smallest = self._sizes(energies)
        rates = shares(energies, sizes, bits, smallest)
        # a rounded quotient may be too small
        floors = {name: smallest[name] / sizes[name] * (1 + 1e-12) for name in rates}
        return even | {name: max(rate, floors[name]) for name, rate in rates.items()}

    @property
    def _is_uneven(self) -> bool:
        """Whether matrices get unequal shares of the budget."""
        own = self.settings.method in _SHARED and self.settings.activations
        return own and self.net.kind.decoder

    def _sizes(self, names: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the weights of some matrices, and the fewest stored bits of each."""
        sizes = {name: math.prod(self.shapes[name]) for name in names}
        smallest = {
            name: replace(self.fit, looked_up=name in self.tables).least_bits(
                self.shapes[name], self.settings.activations
            )
            for name in sizes
        }
        return sizes, smallest

    def check_budget(self) -> None:
        """Refuse bits too few for all that share them or for one by itself, and too many."""
        bits, method = self.settings.bits, self.settings.method
        alone = [*self.names, *self.tables]
        if self._is_uneven:
            sizes, smallest = self._sizes(self.names)
            check_budget(sizes, bits, smallest, method)
            alone = self.tables
        sizes, smallest = self._sizes(alone)
        for name, least in smallest.items():
            if method == "diba":
                check_budget(sizes, bits, {name: least})
            elif least > bits * sizes[name] * (1 + 1e-12):
                raise BudgetError(f"{name}: {too_small(method, bits, least, self.shapes[name])}")
        if method in ("diba", "random", BEST):
            for shape in self.shapes.values():
                check_most("bits", bits, shape)

    def check_states(self) -> None:
        """Refuse what cannot be measured: hidden states that overflow, vectors of another kind."""
        if not (self.settings.activations or self.training.epochs):
            return
        if task_of(self.net) is SENTENCES:
            pooled(np.ones((1, 1), bool), self.net.config.pooling)
        _, inputs, mask = next(iter(iterate_batches(self.fitted)))
        begun = self.net.begin(inputs[:1], None if mask is None else mask[:1])
        with np.errstate(over="ignore", invalid="ignore"), states_folder(None) as space:
            for *_, state in layer_by_layer(self.net, [begun], lambda *_: space / "state.npy"):
                x = state["x"]
            x = self.net.ended(x)[0]
        if not np.isfinite(x if mask is None else x[mask[:1]]).all():
            raise ValueError(
                f"{self.net.tensors.label}: the hidden states of the first text are not finite in "
                f"{self.net.dtype}; look at the sizes of the weights"
            )

    def warn_of_few(self) -> None:
        """Warn where fewer tokens are fitted to than a layer has channels."""
        tokens = int(self.fitted.lengths.sum())
        most = max((self.shapes[name][1] for name in self.names), default=0)
        if self.settings.activations and tokens < most:
            warnings.warn(
                f"texts hold {tokens} tokens for layers of up to {most} channels: too few to tell "
                "all their correlations, so the network may fit these texts better than others",
                UserWarning,
                stacklevel=3,
            )

    # -- matrices ----------------------------------------------------------------------------------

    def _table_path(self, name: str) -> Path:
        return self.home / f"table-{self.tables.index(name)}.h5"

    def _alone_path(self, name: str) -> Path:
        return self.home / "alone" / f"{self.names.index(name)}.h5"

    def _is_kept(self, name: str) -> bool:
        """Tell whether an earlier run finished a matrix."""
        if name in self.tables:
            return self._table_path(name).exists()
        if self.settings.activations:
            return FinishedLayers(self.home / "layers").has(name)
        return self._alone_path(name).exists()

    def _table(self, name: str, fit: Fit) -> Layer:
        """Return the table of tokens or the head, fitted to what it reads and gives."""
        layer: Any = self.net.layers[name]
        A = np.asarray(layer.to_matrix().to_dense(), np.float32)

        def fitted() -> Any:
            gram, weights = None, None
            if self.settings.activations:
                gram, weights = table_moments(self.net, name, A, self.fitted, self.home)
            return replace(fit, outputs=None, rows=weights, looked_up=True)(name, A, gram)

        return self._kept(self._table_path(name), name, A, fitted)

    def _alone(self, name: str, fit: Fit) -> Layer:
        """Return a layer fitted to its weights alone."""
        A, path = self.net.weights[name], self._alone_path(name)
        path.parent.mkdir(exist_ok=True)
        return self._kept(path, name, A, lambda: fit(name, A, None))

    def _kept(self, path: Path, name: str, A: Array, fitted: Callable[[], Any]) -> Layer:
        """Return the matrix of a file, or fit and write it, as a layer with the dense bias."""
        if path.exists():
            made: Any = load(path)
        else:
            made = fitted()
            made.save(path)
        self._tell({"name": name, "snr_db": made.snr(A), "output_snr_db": None}, made)
        return as_layer(made, self.net.biases.get(name), self.net.dtype, name)

    def _layers(self, small: Network, matters: KeptImportance, fit: Fit) -> dict[str, Layer]:
        """Return the layers of the trunk, fitted one after another."""
        net, rows = self.net, self.fitted
        tokens: dict[str, list[Array]] = {}
        if not net.kind.decoder:
            tokens = {name: matters.tokens(name) for name in matters.names()}

        def states(of: Network) -> Callable[[], Iterator[Any]]:
            def first() -> Iterator[Any]:
                for at, inputs, mask in iterate_batches(rows):
                    state = of.start(of.begin(inputs, mask), of.plain)[0]
                    yield {**state, "at": np.array(at)}

            return first

        dense = ExitStack()  # layers that stay dense, of the stage that runs
        entered: Callable[[Any, Any], Any] | None = None

        def weighed(stage: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            def run(state: Any, linear: Any) -> Any:
                nonlocal entered
                if entered is not stage:
                    dense.close()
                    dense.enter_context(net.released())
                    entered = stage

                def call(name: str, x: Array, keep: Any = None, added: Any = None) -> Array:
                    if name in tokens:
                        weights = tokens[name][int(state["at"])]
                    else:
                        weights = bounded_weights(x, added) * state["mask"]
                    y: Array = linear(name, x, keep=weights, added=added)
                    return y

                return stage(state, call)

            return run

        with self.runner as runner, dense:
            found = compress_layers(
                [weighed(stage) for stage in net.stages(self.names)[1:]],
                self.weights,
                states(net),
                fit,
                biases={name: b for name, b in net.biases.items() if name in self.weights},
                ridge=RIDGES,
                refit=False,  # it knows nothing of the outputs' weights
                hold_out=HOLD_OUT,
                feedback=self.settings.feedback,
                compressed_batches=states(small),
                runner=runner,
                folder=self.home / "layers",
                scratch=self.home,
                callback=self._tell,
            )
        if net.dtype == np.float32:
            return dict(found.layers)
        return {
            name: as_layer(layer.to_matrix(), layer.parameters["bias"], net.dtype, name)
            for name, layer in found.layers.items()
        }

    def _tell(self, facts: Mapping[str, Any], made: Any = None) -> None:
        """Report a matrix that is finished."""
        shape = self.shapes[facts["name"]]
        size = math.prod(shape)
        rate = facts["bits_per_weight"] if made is None else made.bits_per_weight
        self.done += 1
        self.stored += rate * size
        self.counted += size
        name = facts["name"]
        left = None if name in self.resumed else self.events.advance(_work(shape))
        report = dict(facts) | {"bits_per_weight": rate, "bits_so_far": self.stored / self.counted}
        self.events.tell("matrix", **report, left=left)
        decibels = facts["output_snr_db"] if facts["output_snr_db"] is not None else facts["snr_db"]
        text = f"{facts['name'][-40:]} {decibels:.1f} dB, {report['bits_so_far']:.2f} bits a weight"
        self.events.show(self.done, len(self.shapes), text)


def _work(shape: tuple[int, int]) -> float:
    """Return what the fit of a matrix costs, in some unit."""
    return math.prod(shape) * float(min(shape))
