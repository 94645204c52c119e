"""DiBARD where codes are trained too: by latent values, or as blocks of numbers first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diba_np.layers.block_training import RETRAINING
from diba_np.layers.linear import Layer
from diba_np.layers.mesa_linear import MESALinear, penalise
from diba_np.layers.registry import LATENT, as_layer
from diba_np.networks.calibration import Calibration
from diba_np.networks.distillation import distil
from diba_np.networks.network import Network

ALPHA = 1e-3  # weight of MESA's block differences
CODE_TRAINED = (*LATENT, "mesa")


def distil_with_codes(
    student: Network,
    teacher: Network,
    data: Calibration,
    bits: Mapping[str, float],
    *,
    rate: float,
    path: Path,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    **how: Any,
) -> Network:
    """Train a compressed network end to end, codes of its layers included where they can be.

    Those of `diba_np.layers.registry.LATENT` move by latent values with straight-through gradients.
    Blocks of MESA are trained as numbers under the penalty on their differences, come to share
    values, and these are trained in a second pass, as in `diba_np.layers.block_training`.

    Parameters
    ----------
    student, teacher, data
        As of `diba_np.networks.distillation.distil`.
    bits : mapping of str to float
        Stored bits a weight of each layer of MESA at most.
    rate, path, callback, how
        As of `distil`; the second pass has a file of its own beside `path`.

    Returns
    -------
    Network
        With layers as they are stored.
    """
    layers = student.compressed
    latent = {name: layer for name, layer in layers.items() if _method(layer) in LATENT}
    blocks = {name: layer for name, layer in layers.items() if isinstance(layer, MESALinear)}
    trained: dict[str, Layer] = {name: layer.uncoded() for name, layer in blocks.items()}
    for name, layer in latent.items():
        matrix, bias = layer.to_matrix(), layer.parameters["bias"]
        weight = teacher.layers[name].to_matrix().to_dense()
        trained[name] = as_layer(matrix, bias, student.dtype, name, latent=True, weight=weight)
    student = student.replaced(trained)
    if not blocks:
        return distil(student, teacher, data, rate=rate, path=path, callback=callback, **how)

    def penalty() -> float:
        own = [layer for layer in student.compressed.values() if isinstance(layer, MESALinear)]
        return penalise(own, ALPHA)

    first = distil(
        student, teacher, data, rate=rate, path=path, callback=callback, penalty=penalty, **how
    )
    shared = {
        name: layer.quantized(bits=bits[name])
        for name, layer in first.compressed.items()
        if isinstance(layer, MESALinear)
    }
    second = path.with_name(f"{path.stem}-shared{path.suffix}")
    return distil(
        first.replaced(shared),
        teacher,
        data,
        rate=RETRAINING * rate,
        path=second,
        callback=callback,
        **how,
    )


def _method(layer: Layer) -> str:
    """Return the method of a layer's matrix."""
    return str(getattr(layer.to_matrix(), "method", ""))
