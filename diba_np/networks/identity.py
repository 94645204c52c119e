"""What tells one network from another: a digest of all that it computes with."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from diba_np.checks import digest
from diba_np.networks.network import Network


def network_digest(net: Network) -> str:
    """Return a SHA-256 of a network's configuration, type, weights, biases, norms and tables.

    Parameters
    ----------
    net : Network

    Notes
    -----
    Reads every array once; dense layers are forgotten again.
    """
    sha = hashlib.sha256(json.dumps(dict(net.config.source), sort_keys=True).encode())
    sha.update(str(net.dtype).encode())
    for name in net.layers:
        with net.released():
            layer = net.layers[name]
            matrix = layer.to_matrix().to_dense()
            bias = layer.parameters["bias"]
        sha.update(f"{name} {digest(matrix)} {digest(bias[None])}".encode())
    for owner, block in net.blocks.items():
        for what, value in block.parameters.items():
            sha.update(f"{owner}.{what} {digest(np.reshape(value, (1, -1)))}".encode())
    return sha.hexdigest()
