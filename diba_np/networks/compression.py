"""`compress`: a whole network, layer by layer on what the compressed prefix gives, then DiBARD."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from diba_np.checks import check_count, check_number
from diba_np.files.parts import Parts
from diba_np.layers.registry import LAYERS
from diba_np.machine.processors import processors
from diba_np.methods.weighted import BEST
from diba_np.models.executors import Events, Runner
from diba_np.models.patterns import matches
from diba_np.networks.calibration import calibration
from diba_np.networks.compression_run import CompressionRun, Settings, Training
from diba_np.networks.network import Network
from diba_np.networks.texts import LENGTH, Texts
from diba_np.search.options import EFFORTS

Array = NDArray[Any]

# those whose matrices a layer can hold and train
NETWORK_METHODS = (*LAYERS, "random")

# tokens of a batch: what the way back keeps of all layers is the largest thing in memory
_BATCH = 512


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
    dense_folder: str | Path | None = None,
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
        Processes that fit the layers of a group side by side, no more than there are processors.
    threads : int or None, default 1
        Of each fit.
    executor : concurrent.futures.Executor, optional
        Runs the fits of a group instead: a pool, ``Client.get_executor()`` of Dask. Its processes
        must see `folder`, which must then be given, and `dense_folder`.
    folder : path, optional
        Where everything finished is kept. The same call goes on where an earlier one was killed and
        ends with the same bits. Nothing removes it.
    dense_folder : path, optional
        Where of that is kept what the dense network and the texts give alone: weights of tokens and
        outputs, hidden states that teach. Calls with other bits or methods, also at the same time,
        then make it once for all. By default `folder`.
    progress : bool, default False
        Show progress on standard error.
    callback : callable, optional
        Called with a dict for each matrix: ``event`` "matrix", ``name``, ``bits_per_weight``,
        ``output_snr_db``, ``bits_so_far`` and ``left`` (seconds, about; None of
        what an earlier call finished); and for each ten steps of
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

    Warns
    -----
    UserWarning
        `texts` hold fewer tokens than a layer has channels, so that they tell little of others.

    Notes
    -----
    Cost at 1 bit and "fast": some 25 processor seconds for a layer of 576 x 1536, four forward
    passes over the calibration for each block, and about six passes a row for an epoch of DiBARD.
    Memory: dense weights of one layer and the tables of tokens, moments of one group of layers (up
    to ``16 n (m + 4 n)`` bytes each), one batch; the compressed network, and for DiBARD what of it
    stays dense. On disk: states between two blocks, weights of the outputs (``4 m^2`` bytes for up
    to 1024 of them), and of DiBARD ``16 width`` bytes a token.
    """
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, as networks.load gives it, got {type(net)}")
    if method not in (*NETWORK_METHODS, BEST):
        raise ValueError(
            f"method must be one of {', '.join(NETWORK_METHODS)}, {BEST}, got {method!r}"
        )
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    bits, rate = check_number(bits, "bits", above=0.0), check_number(rate, "rate", above=0.0)
    epochs, seed = check_count(epochs, "epochs", least=0), check_count(seed, "seed", least=0)
    jobs = check_count(jobs, "jobs")
    names = chosen_layers(net, include)
    calibrate = None if calibrate is None else check_count(calibrate, "calibrate")
    taught = None if taught is None else check_count(taught, "taught")
    if executor is not None and (jobs != 1 or folder is None):
        raise ValueError(
            "executor= takes the place of jobs=, and needs a folder= that its processes see"
        )
    rows = calibration(net, texts, length, _BATCH, seed)
    settings = Settings(
        bits=bits,
        method=method,
        effort=effort,
        include=list(include),
        embeddings=bool(embeddings),
        feedback=bool(feedback),
        activations=bool(activations),
        calibrate=calibrate,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as space:
        home = Path(space) if folder is None else Path(folder).resolve()
        events = Events(progress, None, callback)
        try:
            runner = Runner(min(jobs, processors()), threads or 1, executor)
            training = Training(epochs, rate, codes, rows.drawn(taught, seed + 1))
            shared = home if dense_folder is None else Path(dense_folder).resolve()
            run = CompressionRun(
                net, names, rows, settings, home, shared, events, runner, threads, training
            )
            run.check_budget()  # before anything is written
            run.check_states()
            run.warn_of_few()
            home.mkdir(parents=True, exist_ok=True)
            run.check_stages()
            parts = Parts(home / "network", run.fingerprint, whole=home)
            try:
                run.remove_states()
                parts.write("matrices", list(run.shapes))
                return run.result()
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
    layer_of = {name: name for name in net.weights}
    layer_of |= {f"{name}.weight": name for name in net.weights}
    matched = {
        pattern: {layer_of[name] for name in matches(pattern, layer_of)} for pattern in include
    }
    for pattern, names in matched.items():
        if not names:
            raise ValueError(f"include must match linear layers, {pattern!r} matches none")
    chosen = set().union(*matched.values()) if matched else set(net.weights)
    return [name for name in net.weights if name in chosen]
