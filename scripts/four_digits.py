"""The digits of the study of the four systems: a cell is a network, a method, bits, a seed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import numpy as np
from digits import Classifier, Digits
from mlp import MLP, Augment

import diba_np as dn
from diba_np.layers.linear import Layer
from diba_np.layers.mesa_linear import MESALinear
from diba_np.layers.progressive import train_progressively
from diba_np.layers.registry import as_layer
from diba_np.matrix.base import CompressedMatrix
from diba_np.methods import fit as fit_by_label
from diba_np.networks.layerwise import compress_layers

STAGES = ("replaced", "layer-wise", "end to end")
BITS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Network:
    """A network that is trained here.

    Attributes
    ----------
    sizes : tuple of int
    augment : callable
        Makes inputs of 28×28 images, moved.
    view : callable
        Makes inputs of them as they are.
    decay : float
        Weight decay of its training.
    """

    sizes: tuple[int, ...]
    augment: Augment
    view: Callable[[np.ndarray], np.ndarray]
    decay: float = 0.0


NETWORKS = {
    "MLP": Network((196, 256, 256, 256, 10), digits.pooled_shift, digits.pooled),
    "LeNet": Network(
        (784, 300, 100, 10), functools.partial(digits.shift, share=1.0), np.asarray, decay=0.5
    ),
}
SMALL = {"MLP": Network((196, 32, 10), digits.pooled_shift, digits.pooled)}


# -- methods ---------------------------------------------------------------------------------------


def by_diba(A: np.ndarray, bits: float, gram: np.ndarray | None) -> CompressedMatrix:
    return dn.factorize(A, bits=bits, gram=gram, threads=1)


def by_codes(A: np.ndarray, bits: float, gram: np.ndarray | None) -> CompressedMatrix:
    """Round to nearest, or with compensation where inputs are known."""
    if gram is None:
        return fit_by_label("rtn", A, bits)
    return fit_by_label("gptq", A, bits, inputs=inputs_of(gram))


def by_label(label: str, A: np.ndarray, bits: float, gram: np.ndarray | None) -> CompressedMatrix:
    inputs = None if gram is None else inputs_of(gram)
    return fit_by_label(label, A, bits, inputs=inputs)


def inputs_of(gram: np.ndarray) -> np.ndarray:
    """Return n rows that have this Gram matrix; they stand for the inputs."""
    n = len(gram)
    return np.linalg.cholesky(gram + 1e-6 * np.trace(gram) / n * np.eye(n)).T


@dataclass(frozen=True)
class Method:
    """One system: how a matrix is compressed, and what is trained of it end to end.

    Attributes
    ----------
    fit : callable
        ``fit(A, bits, gram or None)`` gives a matrix of at most so many stored bits a weight.
    bits : tuple of float
        Stored bits a weight that it can use; 0 is its own point.
    rate : float
        Of Adam end to end, relative to the size of each array.
    temperature : float
        Of the probabilities that the dense network teaches.
    progressive : bool
        Whether its codes are trained too, by latent values, layer after layer from the bottom.
    one_bit : bool
        Whether layers read one bit of each input; the first reads the image as it is.
    """

    fit: Callable[[np.ndarray, float, np.ndarray | None], CompressedMatrix]
    bits: tuple[float, ...] = BITS
    rate: float = 5e-3
    temperature: float = 1.0
    progressive: bool = False
    one_bit: bool = False


by_bitat = functools.partial(by_label, "bitat")
# Where codes train, rates and temperatures are those of least divergence on the validation digits
# (MLP, first seed); the others train scales or blocks, and were not searched.
METHODS = {
    "DiBA": Method(by_diba),
    "QSWD": Method(functools.partial(by_label, "qswd"), temperature=4.0, progressive=True),
    "MESA": Method(functools.partial(by_label, "mesa"), bits=(0.0, *BITS), rate=1e-2),
    "BiTAT": Method(by_bitat, bits=(0.5, 1.0, 0.0), rate=2e-2, temperature=4.0, progressive=True),
    "BiTAT, one-bit inputs": Method(
        by_bitat, bits=(0.0,), rate=2e-2, temperature=4.0, progressive=True, one_bit=True
    ),
    "integer codes": Method(by_codes),
}

EPOCHS_A_LAYER = 3  # of progressive training
WHOLE = 32.0  # bits for BiTAT to keep every sign

MESA_SHARE, MESA_LEVELS, MESA_ALPHA = 0.1, 32, 0.004  # p, 2^q and alpha of its own point
ALPHA = 1e-4  # of its other points, whose bits are given


# -- one cell --------------------------------------------------------------------------------------


def parts_of(network: Network, images: Mapping[str, Digits]) -> dict[str, Digits]:
    """Return the digits as the network reads them."""
    return {name: (network.view(X), y) for name, (X, y) in images.items()}


def dense_of(
    network: Network,
    images: Mapping[str, Digits],
    seed: int,
    epochs: int,
    path: Path,
    temperature: float,
) -> Classifier:
    """Return the dense network of a seed, trained when it is first asked for."""
    mlp = MLP(network.sizes, np.random.default_rng(0))
    if path.is_file():
        with np.load(path, allow_pickle=False) as held:
            count = len(mlp.weights)
            mlp.weights = [held[f"W{i}"] for i in range(count)]
            mlp.biases = [held[f"b{i}"] for i in range(count)]
        return Classifier(mlp, temperature)
    mlp = digits.dense_mlp(
        images["fit"], network.sizes, network.augment, epochs, seed, network.decay
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"W{i}": W for i, W in enumerate(mlp.weights)}
    arrays |= {f"b{i}": b for i, b in enumerate(mlp.biases)}
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)
    return Classifier(mlp, temperature)


def measure(
    network: Network,
    images: Mapping[str, Digits],
    dense: Classifier,
    name: str,
    bits: float,
    epochs: int,
) -> dict[str, Any]:
    """Return what the stages of a cell come to: accuracy, changed answers, seconds, bits, times.

    Seconds are those of the processor. `bits` of 0 is the method's own point.
    """
    method, parts = METHODS[name], parts_of(network, images)
    row: dict[str, Any] = {"accuracy": {}, "changed": {}, "seconds": {}}
    mixed = np.random.default_rng(0).permutation(len(parts["fit"][0]))  # they come by digit
    batches = np.array_split(parts["fit"][0][mixed], 10)
    started = time.process_time()

    def done(stage: str, layers: Mapping[str, Layer]) -> None:
        nonlocal started
        row["seconds"][stage] = time.process_time() - started
        row["accuracy"][stage] = dense.accuracy(layers, parts["test"])
        row["changed"][stage] = dense.changed(layers, parts["test"])
        started = time.process_time()

    def compressed(at: str, A: np.ndarray, gram: np.ndarray | None) -> CompressedMatrix:
        if name == "MESA" and not bits:
            return own_blocks(A, at == dense.names[0])
        return method.fit(A, bits or WHOLE, gram)

    def progressive(each: int, last: int) -> dict[str, Layer]:
        trained = train_progressively(
            dense.dense,
            parts["fit"][0],
            compressed,
            names=dense.names,
            one_bit=dense.names[1:] if method.one_bit else (),
            loss=dense.objective,
            epochs=each,
            last_epochs=last,
            batches=digits.mixed_batches(images["fit"][0], network.augment),
            steps_per_epoch=-(-len(images["fit"][0]) // digits.BATCH),
            validation=parts["validation"][0],
            learning_rate=method.rate,
        )
        return {at: trained.layers[at] for at in dense.names}

    if not method.one_bit:  # which is nothing without inputs
        replaced = {
            at: as_layer(compressed(at, A, None), dense.biases[at])
            for at, A in dense.weights.items()
        }
        done("replaced", replaced)
    if method.progressive:
        done("layer-wise", progressive(0, 0))
        final = progressive(min(EPOCHS_A_LAYER, epochs), epochs)
    else:
        fitted = compress_layers(
            dense.stages, dense.weights, batches, compressed, biases=dense.biases
        ).layers
        done("layer-wise", fitted)
        final = end_to_end(
            method, bits, dense, fitted, parts["validation"][0], images, network, epochs
        )
    done("end to end", final)
    matrices = {at: layer.to_matrix() for at, layer in final.items()}
    row["stored"] = {
        kind: sum(f.storage_breakdown().get(kind, 0) for f in matrices.values())
        for kind in ("payload", "scales", "index", "codebook")
    }
    row["weights"] = sum(A.size for A in dense.weights.values())
    row["us"], row["dense_us"] = product_times(matrices, dense.weights)
    return row


def own_blocks(A: np.ndarray, first: bool) -> CompressedMatrix:
    """Return MESA's blocks of its paper's share of weights, with as many values.

    The first layer reads strips of the image, the others from all blocks below.
    """
    layer = MESALinear.cut(A, MESA_SHARE, order="natural" if first else "stride")
    return layer.quantized(MESA_LEVELS).to_matrix()


def end_to_end(
    method: Method,
    bits: float,
    dense: Classifier,
    fitted: Mapping[str, Layer],
    validation: np.ndarray,
    images: Mapping[str, Digits],
    network: Network,
    epochs: int,
) -> dict[str, Layer]:
    """Return the layers trained through the whole network, as they are stored."""
    rows = images["fit"][0]
    blocks = {at: layer for at, layer in fitted.items() if isinstance(layer, MESALinear)}
    if blocks:
        how: dict[str, Any] = {"alpha": ALPHA, "bits": bits} if bits else {}
        trained = digits.train_blocks_end_to_end(
            dense,
            blocks,
            rows,
            network.augment,
            epochs=epochs,
            retrain=max(epochs // 4, 1),
            learning_rate=method.rate,
            **(how or {"alpha": MESA_ALPHA, "levels": MESA_LEVELS}),
        )
        return dict(trained)
    layers = dict(fitted)
    digits.train_end_to_end(dense, layers, validation, rows, network.augment, epochs, method.rate)
    return {at: layer.rounded() for at, layer in layers.items()}


def product_times(
    matrices: Mapping[str, CompressedMatrix], weights: Mapping[str, np.ndarray], repeats: int = 100
) -> tuple[float, float]:
    """Return microseconds of the products with one vector, all matrices: compressed, and dense.

    Medians, the two in turns, after one call that is not timed.
    """
    totals = np.zeros(2)
    for at, f in matrices.items():
        x = np.random.default_rng(0).normal(size=f.shape[1]).astype(np.float32)
        W = np.ascontiguousarray(weights[at], np.float32)
        times = np.empty((2, repeats))
        f @ x
        for i in range(repeats):
            for side, A in enumerate((f, W)):
                started = time.perf_counter()
                A @ x
                times[side, i] = time.perf_counter() - started
        totals += np.median(times, axis=1)
    return float(1e6 * totals[0]), float(1e6 * totals[1])
