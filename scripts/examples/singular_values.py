"""Singular values and eigenvalues of a compressed matrix with SciPy's iterative solvers.

A factorization is a `scipy.sparse.linalg.LinearOperator`: svds, eigsh and lobpcg take it as it is
and never see the dense matrix.

    python scripts/examples/singular_values.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.sparse.linalg import eigsh, lobpcg, svds

import diba_np as dn

DATA = Path(__file__).resolve().parents[2] / "data"


def main() -> None:
    A = np.load(DATA / "rxnfp_query_256x256.npy")
    f = dn.factorize(A, bits=2.0, effort="fast")
    count = 4
    exact = np.linalg.svd(A, compute_uv=False)[:count]
    start = np.random.default_rng(0).normal(size=A.shape[1])

    found = svds(f, count, v0=start, return_singular_vectors=False)[::-1]
    gram = f.T @ f  # still an operator: two products a step
    lanczos = np.sqrt(eigsh(gram, count, v0=start, return_eigenvectors=False)[::-1])
    block = np.random.default_rng(0).normal(size=(A.shape[1], count))
    values, _ = lobpcg(gram, block, largest=True, tol=1e-4, maxiter=200)
    conjugate = np.sqrt(np.sort(values)[::-1])

    print(f"{f}, SNR {f.snr(A):.2f} dB")
    print("largest singular values   " + "".join(f"{i + 1:9d}" for i in range(count)))
    for name, row in (
        ("dense matrix, LAPACK", exact),
        ("compressed, svds", found),
        ("compressed, eigsh", lanczos),
        ("compressed, lobpcg", conjugate),
    ):
        print(f"{name:<26}" + "".join(f"{value:9.4f}" for value in row))
    print(
        f"largest relative difference to the dense matrix: {np.max(np.abs(found / exact - 1)):.1%}"
    )


if __name__ == "__main__":
    main()
