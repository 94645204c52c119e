"""Solve equations with a compressed matrix: as the operator of lsqr, and as a preconditioner.

The compressed inverse of one matrix speeds up gmres for its neighbours, and cg where the matrix
is symmetric: the preconditioner takes 2 bits an entry, and the answer stays exact.

    python scripts/examples/least_squares.py
"""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg, gmres, lsqr

import diba_np as dn


def steps_of(solver, A, b, M, **options):
    """Solve to a relative residual of 1e-8; return (steps, relative residual)."""
    steps = []
    x, _ = solver(A, b, M=M, rtol=1e-8, maxiter=2000, callback=lambda _: steps.append(1), **options)
    return len(steps), np.linalg.norm(A @ x - b) / np.linalg.norm(b)


def main() -> None:
    rng = np.random.default_rng(0)
    n = 140

    # lsqr with the factorization as the operator: what noise in the data hides anyway
    truth = rng.normal(size=n)
    A = rng.normal(size=(3 * n, n)) / np.sqrt(n)
    f = dn.factorize(A, bits=4.0, shift=0.5, effort="fast")
    b = A @ truth + rng.normal(size=3 * n) * 0.1
    x, y = lsqr(f, b)[0], np.linalg.lstsq(A, b, rcond=None)[0]
    print(f"lsqr, {f}")
    for name, solution in (("dense", y), ("compressed", x)):
        error = np.linalg.norm(solution - truth) / np.linalg.norm(truth)
        print(f"  error of the solution, {name:<10} {error:.3f}")

    # gmres and cg with the compressed inverse of a neighbour as the preconditioner
    lines = np.linspace(0, 1, n)
    kernel = np.exp(-np.abs(lines[:, None] - lines) / 0.3)
    drift = kernel + 0.02 * rng.normal(size=(n, n)) / np.sqrt(n) + 0.01 * np.eye(n)
    spd = kernel + 0.01 * np.eye(n)
    right = rng.normal(size=n)
    for name, solver, matrix, base in (
        ("gmres", gmres, drift, spd),
        ("cg", cg, spd + 0.01 * np.diag(lines), spd),
    ):
        inverse = dn.factorize(np.linalg.inv(base), bits=4.0, shift=0.5, effort="fast")
        # symmetric by construction, as cg asks; the +identity keeps it positive definite
        symmetric = LinearOperator(
            (n, n), matvec=lambda v, P=inverse: 0.5 * (P @ v + P.T @ v) + v, dtype=np.float64
        )
        options = {"restart": n, "callback_type": "pr_norm"} if solver is gmres else {}
        plain, _ = steps_of(solver, matrix, right, None, **options)
        helped, residual = steps_of(solver, matrix, right, symmetric, **options)
        print(
            f"{name}: {plain} steps, with the compressed inverse {helped}; residual {residual:.0e}"
        )


if __name__ == "__main__":
    main()
