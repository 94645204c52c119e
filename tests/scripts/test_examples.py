"""Every example runs by itself and prints a result worth printing."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


def printed(name, *args, monkeypatch):
    """Run one example in this process (its kernels are compiled already); return its output."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", [name, *args])
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return out.getvalue()


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, f"{pattern} not in:\n{text}"
    return float(found[1])


def test_all_examples_are_tested():
    source = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'printed("{path.stem}"' in source, path.name


def test_singular_values(monkeypatch):
    out = printed("singular_values", monkeypatch=monkeypatch)
    rows = [line.split()[-4:] for line in out.splitlines() if line.startswith("compressed")]
    assert len(rows) == 3
    for row in rows[1:]:
        assert [float(v) for v in row] == pytest.approx([float(v) for v in rows[0]], rel=1e-3)
    assert number(r"to the dense matrix: ([\d.]+)%", out) < 5


def test_least_squares(monkeypatch):
    out = printed("least_squares", monkeypatch=monkeypatch)
    assert number(r"error of the solution, compressed ([\d.]+)", out) < 0.3
    for solver in ("gmres", "cg"):
        plain = number(rf"{solver}: (\d+) steps", out)
        assert number(rf"{solver}: .*compressed inverse (\d+);", out) < plain


def test_stacked(monkeypatch):
    out = printed("stacked", monkeypatch=monkeypatch)
    alone = number(r"SNR ([\d.]+) dB", out)
    assert number(r"sparse corrections: ([\d.]+) dB", out) > alone + 0.3
    assert number(r"with a smoothness block +([\d.]+)", out) < 0.5
    if "PyLops is not installed" in out:
        pytest.skip("PyLops is not installed")
    assert number(r"by PyLops: largest difference ([\d.e-]+)", out) < 1e-2


def test_kernel_matrix(monkeypatch):
    out = printed("kernel_matrix", monkeypatch=monkeypatch)
    dense = number(r"dense .* rms error ([\d.]+)", out)
    assert number(r"shift=0.5 .* rms error ([\d.]+)", out) < 1.5 * dense


def test_image(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the example saves a picture with matplotlib")
    out = printed("image", str(tmp_path / "out.png"), monkeypatch=monkeypatch)
    for bits in ("1.0", "2.0"):
        _, zero_one, plus_minus, svd = map(
            float, re.search(rf"^ *{bits} .*$", out, re.M)[0].split()
        )
        assert min(zero_one, plus_minus) > svd
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_transformer(monkeypatch):
    out = printed("transformer", monkeypatch=monkeypatch)
    dense = number(r"48 components, dense +([\d.]+)", out)
    assert number(r"nearest centre, compressed +([\d.]+)", out) > dense - 0.05


def test_nearest_neighbours(monkeypatch):
    out = printed("nearest_neighbours", monkeypatch=monkeypatch)
    shares = [int(v) for v in re.findall(r"right row first (\d+)%", out)]
    assert shares[0] >= 90
    assert shares[1] >= 95
    assert "(10, 384), float32" in out
