"""The scripts: their readers on files made here, and the vendored matrices as documented."""

import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import sources  # noqa: E402


def test_vendored_matrices_have_the_documented_hashes_and_shapes():
    rows = re.findall(r"`(\S+\.npy)` \| (\d+) × (\d+) .*`([0-9a-f]{64})`", _data_readme())
    assert len(rows) == len(list((ROOT / "data").glob("*.npy"))) == 3
    for name, m, n, digest in rows:
        path = ROOT / "data" / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        matrix = np.load(path, allow_pickle=False)
        assert (matrix.shape, matrix.dtype) == ((int(m), int(n)), np.float32)


def _data_readme():
    return (ROOT / "data" / "README.md").read_text()


def test_packages_are_documented_with_their_hashes():
    for package in (sources.MINILM, sources.RXNFP):
        assert package.sha256 in _data_readme()
        assert f"`{package.name}` {package.version}" in _data_readme()


def torch_file(offset=1, size=(2, 3), stride=(3, 1), values=7):
    """A minimal torch weights file in zip form, written opcode by opcode."""
    body = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
    body += b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    body += b"K" + bytes([values]) + b"tQ"
    body += b"K" + bytes([offset])
    body += b"(" + b"".join(b"K" + bytes([v]) for v in size) + b"t"
    body += b"(" + b"".join(b"K" + bytes([v]) for v in stride) + b"t"
    body += b"\x89}tRs."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/data.pkl", body)
        archive.writestr("model/data/0", np.arange(values, dtype="<f4").tobytes())
    return out.getvalue()


def test_read_torch_rebuilds_strided_tensors():
    found = sources.read_torch(torch_file())
    np.testing.assert_array_equal(found["w"], [[1, 2, 3], [4, 5, 6]])
    turned = sources.read_torch(torch_file(stride=(1, 2)))
    np.testing.assert_array_equal(turned["w"], [[1, 3, 5], [2, 4, 6]])


def test_read_torch_refuses_tensors_outside_their_storage():
    with pytest.raises(pickle.UnpicklingError, match="outside its storage"):
        sources.read_torch(torch_file(offset=2))


def test_read_torch_refuses_every_other_object():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/data.pkl", b"cos\nsystem\n(X\x04\x00\x00\x00truetR.")
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system is not a tensor; refused"):
        sources.read_torch(out.getvalue())


def run_script(name, *args):
    command = [sys.executable, str(ROOT / "scripts" / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_bench_data_smoke():
    (row,) = json.loads(run_script("bench_data.py", "--smoke", "--json"))
    assert row["bits_per_weight"] <= 1.0
    assert row["snr 0/1"] > 3
    assert row["k"] == 108
