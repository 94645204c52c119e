"""Factorize the matrices in ``data/`` at several rates and print a table.

python scripts/bench_data.py            # the README's table
python scripts/bench_data.py --smoke    # one small case, for the tests
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import diba_np as dn

DATA = Path(__file__).resolve().parent.parent / "data"


def sign_snr(A: np.ndarray) -> float:
    """SNR in dB of the sign of each weight with the best scale a row: the 1-bit yardstick."""
    return dn.snr_db(A, np.sign(A) * np.abs(A).mean(axis=1, keepdims=True))


def measure(path: Path, bits: float, **how: object) -> dict:
    """Factorize one matrix at one rate, both alphabets; time the search without compilation."""
    A = np.load(path, allow_pickle=False)
    row = {"matrix": path.stem, "bits": bits}
    for name, shift in (("0/1", 0.0), ("+-1", 0.5)):
        started = time.perf_counter()
        f = dn.factorize(A, bits=bits, shift=shift, **how)
        row[f"seconds {name}"] = time.perf_counter() - started
        row[f"snr {name}"] = f.snr(A)
    with tempfile.TemporaryDirectory() as folder:
        row["file_bytes"] = f.save(Path(folder) / "f.h5")
    row |= {"k": f.k, "bits_per_weight": f.bits_per_weight, "dense_bytes": A.nbytes}
    row["sign"] = sign_snr(A)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--scale-bits", default=16, type=lambda t: t if t == "auto" else int(t))
    parser.add_argument("--smoke", action="store_true", help="one small case, few sweeps")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    paths = sorted(DATA.glob("*.npy"))
    if args.smoke:
        paths, args.bits = [p for p in paths if "256x256" in p.name], [1.0]
    sweeps = 5 if args.smoke else None
    dn.factorize(np.eye(64) + 1, k=8, max_sweeps=2)  # compile
    how = {"threads": args.threads, "scale_bits": args.scale_bits, "max_sweeps": sweeps}
    rows = [measure(p, bits, **how) for p in paths for bits in args.bits]
    if args.json:
        print(json.dumps(rows))
        return 0
    print(
        "| matrix | stored bits a weight | k | SNR 0/1 (s) | SNR ±1 (s) | sign × row scale | file |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        share = row["dense_bytes"] / row["file_bytes"]
        cells = [f"{row[f'snr {a}']:.2f} dB ({row[f'seconds {a}']:.1f})" for a in ("0/1", "+-1")]
        sign = f"{row['sign']:.2f} dB" if row["bits"] == 1.0 else ""
        print(
            f"| {row['matrix']} | {row['bits_per_weight']:.3f} | {row['k']} | {cells[0]} | "
            f"{cells[1]} | {sign} | {row['file_bytes']} bytes, 1/{share:.1f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
