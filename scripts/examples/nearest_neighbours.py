"""Nearest neighbours on a compressed table of embeddings.

One product scores every row of the table against a query; `f[rows]` gives the few best rows
without expanding the rest.

    python scripts/examples/nearest_neighbours.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import diba_np as dn

DATA = Path(__file__).resolve().parents[2] / "data"


def main() -> None:
    table = np.load(DATA / "minilm_intermediate_1536x384.npy")[:512]
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    picked = rng.choice(len(table), 100, replace=False)
    noise = rng.normal(size=(100, table.shape[1])) / np.sqrt(table.shape[1])
    queries = (table[picked] + 0.8 * noise).astype(np.float32)

    best = np.argsort(-(queries @ table.T), axis=1)[:, :10]
    print(f"{len(table)} embeddings of {table.shape[1]} numbers, 100 queries")
    for bits in (1.0, 2.0):
        f = dn.factorize(table, bits=bits, effort="fast")
        scores = f.matmat(queries.T).T
        found = np.argsort(-scores, axis=1)[:, :10]
        hit = np.mean(found[:, 0] == picked)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(best, found, strict=True)])
        print(
            f"  {f.bits_per_weight:.2f} bits, 1/{1 / f.storage_ratio():.0f} of the size: "
            f"right row first {hit:.0%}, {recall:.0%} of the ten nearest"
        )
    rows = f[found[0]]
    print(f"the ten rows nearest to the first query: {rows.shape}, {rows.dtype}")


if __name__ == "__main__":
    main()
