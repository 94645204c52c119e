"""A model on two Dask workers, one of which is killed in mid-run: the bits of a serial run?

python scripts/torture_cluster.py                # a LocalCluster, and a scheduler from the shell
python scripts/torture_cluster.py shell --smoke  # small matrices, for the tests

Takes the extra `distributed`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import diba_np as dn

# how the run is told where to go, and the process ids of the workers
Cluster = tuple[dict[str, Any], list[int]]


@contextmanager
def local() -> Iterator[Cluster]:
    """Give a LocalCluster of two worker processes, through its client's executor."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())
        yield {"executor": client.get_executor()}, pids


@contextmanager
def shell() -> Iterator[Cluster]:
    """Give the address of a scheduler started from the shell, with two workers."""
    from distributed import Client

    with tempfile.TemporaryDirectory() as folder, ExitStack() as exits:
        file = str(Path(folder) / "scheduler.json")

        def start(*args: str) -> subprocess.Popen:
            command = [sys.executable, "-m", "dask", *args, "--scheduler-file", file]
            made = subprocess.Popen([*command, "--no-dashboard"], stderr=subprocess.DEVNULL)
            exits.callback(made.wait)
            exits.callback(made.kill)
            return made

        start("scheduler", "--port", "0", "--host", "127.0.0.1")
        options = ("--nthreads", "1", "--no-nanny", "--local-directory", folder)
        workers = [start("worker", *options) for _ in range(2)]
        while not Path(file).exists():
            time.sleep(0.05)
        with Client(scheduler_file=file) as client:
            client.wait_for_workers(2)
            address = client.scheduler.address
        yield {"scheduler": address}, [worker.pid for worker in workers]


def run(kind: str, arrays: dict[str, np.ndarray], bits: float) -> dict[str, Any]:
    """Factorize on a cluster, kill a worker when the searches begin, compare with a serial run."""
    killed: list[int] = []
    with {"local": local, "shell": shell}[kind]() as (where, pids):

        def kill_one(event: dict[str, Any]) -> None:
            first = event["event"] in ("part", "matrix") and not killed
            if first:
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)

        started = time.perf_counter()
        made = dn.factorize_model(arrays, bits=bits, effort="fast", callback=kill_one, **where)
        seconds = time.perf_counter() - started
    serial = dn.factorize_model(arrays, bits=bits, effort="fast", jobs=1, threads=1)
    same = [np.array_equal(made[n].to_dense(), serial[n].to_dense()) for n in serial]
    return {
        "cluster": kind,
        "workers": len(pids),
        "killed": len(killed),
        "arrays": len(arrays),
        "same": sum(same),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=["local", "shell"], metavar="local|shell")
    parser.add_argument("--smoke", action="store_true", help="small matrices")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    side = 60 if args.smoke else 300
    arrays = {f"w{i}": rng.normal(size=(side, side + 8 * i)) for i in range(6)}
    rows = [run(kind, arrays, bits=3.0) for kind in args.kinds]
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()))
    return 0 if all(row["same"] == row["arrays"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
