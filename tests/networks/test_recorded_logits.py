"""What transformers says of small random networks of every kind, recorded by check_networks.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from diba_np import networks

RECORD = Path(__file__).parents[2] / "data" / "network_logits.npz"
with np.load(RECORD) as file:
    ARRAYS = {name: file[name] for name in file.files}
NAMES = list(dict.fromkeys(name.split("/", 1)[0] for name in ARRAYS))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_are_those_of_transformers(name, dtype):
    start = f"{name}/tensor "
    tensors = {k.removeprefix(start): a for k, a in ARRAYS.items() if k.startswith(start)}
    net = networks.build(json.loads(str(ARRAYS[f"{name}/config"])), tensors, dtype=dtype)
    mask, expected = ARRAYS.get(f"{name}/mask"), ARRAYS[f"{name}/logits"]
    found = net.logits(ARRAYS[f"{name}/inputs"], mask)
    assert found.shape == expected.shape
    kept = np.ones(len(found), bool) if mask is None or found.ndim == 2 else mask
    assert np.allclose(found[kept], expected[kept], atol=5e-6 * np.abs(expected).max())


def test_the_record_holds_every_kind():
    from diba_np.networks.kind import KINDS

    kinds = {json.loads(str(ARRAYS[f"{name}/config"]))["model_type"] for name in NAMES}
    assert kinds == set(KINDS)
