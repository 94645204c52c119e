"""Put a compressed matrix together with scipy.sparse and PyLops operators.

A sparse correction plus a compressed matrix; a regularized system of two blocks; the same blocks
stacked by PyLops, if it is installed.

    python scripts/examples/stacked.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator, lsqr

import diba_np as dn

DATA = Path(__file__).resolve().parents[2] / "data"


def stack(top: LinearOperator, below: LinearOperator) -> LinearOperator:
    """Return ``[top; below]`` for two operators of as many columns."""
    rows = top.shape[0]
    return LinearOperator(
        (rows + below.shape[0], top.shape[1]),
        matvec=lambda x: np.concatenate([top @ x, below @ x]),
        rmatvec=lambda y: top.T @ y[:rows] + below.T @ y[rows:],
        dtype=np.float64,
    )


def main() -> None:
    A = np.load(DATA / "rxnfp_query_256x256.npy").astype(np.float64)
    n = A.shape[1]
    f = dn.factorize(A, bits=2.0, effort="fast")
    print(f"{f}: SNR {f.snr(A):.2f} dB")

    # the largest 2 % of the errors, kept exactly in a sparse matrix beside the bits
    error = A - f.to_dense()
    error[np.abs(error) < np.quantile(np.abs(error), 0.98)] = 0
    both = f + aslinearoperator(sparse.csr_array(error))
    print(f"plus 2 % of sparse corrections: {dn.snr_db(A, both @ np.eye(n)):.2f} dB")

    # smooth solutions: a second difference below the matrix, weighted
    curve = np.sin(np.linspace(0, 6, n))
    b = A @ curve + np.random.default_rng(0).normal(size=n) * 0.3
    second = sparse.diags_array([1.0, -2.0, 1.0], offsets=[0, 1, 2], shape=(n - 2, n))
    weight = 30.0
    right = np.concatenate([b, np.zeros(n - 2)])
    plain = lsqr(f, b, iter_lim=200)[0]
    smooth = lsqr(stack(f, aslinearoperator(weight * second)), right, iter_lim=1000)[0]
    for name, found in (("alone", plain), ("with a smoothness block", smooth)):
        print(
            f"error of lsqr {name:<24} {np.linalg.norm(found - curve) / np.linalg.norm(curve):.2f}"
        )

    try:
        import pylops
    except ImportError:
        print("PyLops is not installed; the stack with PyLops is left out")
        return
    tall = pylops.VStack([pylops.aslinearoperator(f), weight * pylops.MatrixMult(second.toarray())])
    again = lsqr(tall, right, iter_lim=1000)[0]
    print(f"the same stacked by PyLops: largest difference {np.abs(again - smooth).max():.0e}")


if __name__ == "__main__":
    main()
