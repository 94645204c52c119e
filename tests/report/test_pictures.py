"""Pictures and the HTML page: what they say is true, and a browser shows them."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from diba_np import DiBAFactors, factorize, load
from diba_np.cli.main import main
from diba_np.matrix.stored_array import StoredArray
from diba_np.report.page import html_report
from diba_np.report.pictures import cell_means, panels_of, plot_factors

Figure = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib").Figure

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def pair():
    A = np.random.default_rng(3).normal(size=(30, 20)) * np.linspace(0.1, 2, 30)[:, None]
    return A, factorize(A, k=12, max_sweeps=5)


@pytest.mark.parametrize(("shape", "most"), [((7, 5), 512), ((70, 50), 16), ((9, 40), 10)])
def test_cell_means_are_means_of_whole_cells(shape, most, rng):
    A = rng.normal(size=shape)
    found = cell_means(shape, A.__getitem__, most)
    edges = [[s * i // min(s, most) for i in range(min(s, most) + 1)] for s in shape]
    assert found.shape == (len(edges[0]) - 1, len(edges[1]) - 1)
    for i, (top, below) in enumerate(zip(edges[0], edges[0][1:], strict=False)):
        for j, (left, right) in enumerate(zip(edges[1], edges[1][1:], strict=False)):
            assert found[i, j] == pytest.approx(A[top:below, left:right].mean())


def test_the_texts_say_what_the_matrices_say(pair):
    A, f = pair
    told = {p.name: p.text for p in panels_of(f, A)}
    assert list(told) == [
        "matrix", "error", "spectrum", "b1", "b2", "diagonals", "convergence", "storage",
    ]  # fmt: skip
    assert f"SNR {f.snr(A):.2f} dB" in told["error"]
    error = np.abs(A - f.to_dense()) / np.sqrt(np.mean(A**2)) * 100
    assert f"from {error.min():.0f} to {error.max():.0f} %" in told["error"]
    lost = np.linalg.svd(A - f.to_dense(), compute_uv=False)[0]
    above = np.count_nonzero(np.linalg.svd(A, compute_uv=False) > lost)
    assert f"{above} of 20 stand above the largest of the error, {lost:.3g}" in told["spectrum"]
    assert f"{100 * f.b1.count() / (30 * 12):.1f} % of the bits" in told["b1"]
    assert f"{f.bits_per_weight:.3f} bits a weight" in told["storage"]
    assert f"to {f.record['snr_db']:.2f} dB" in told["convergence"]
    with pytest.raises(ValueError, match=r"A must have shape \(30, 20\), got \(20, 30\)"):
        panels_of(f, A.T)


def test_what_is_drawn_is_a_matrix_of_real_numbers():
    A = np.random.default_rng(5).normal(size=(16, 16))
    f = factorize(A, k=8, max_sweeps=5)
    whole = [p.text for p in panels_of(f, A)]
    with pytest.warns(PendingDeprecationWarning):
        odd = np.matrix(A)  # whose products are those of matrices
    assert [p.text for p in panels_of(f, odd)] == whole
    assert [p.text for p in panels_of(f, A.tolist())] == whole
    A[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"A contains 1 non-finite entry; first at \(3, 2\)"):
        panels_of(f, A)
    with pytest.raises(TypeError, match="A must be an array of real numbers"):
        panels_of(f, 1j * np.ones((16, 16)))


def test_without_the_matrix_or_a_record_there_are_fewer_pictures(pair):
    _, f = pair
    bare = DiBAFactors(f.d1, f.b1, f.d2, f.b2, f.d3)
    names = [p.name for p in panels_of(bare)]
    assert names == ["matrix", "spectrum", "b1", "b2", "diagonals", "storage"]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_plot_factors_writes_every_kind(pair, tmp_path, kind):
    A, f = pair
    plot_factors(f, tmp_path / f"a.{kind}", A)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind]
    assert (tmp_path / f"a.{kind}").read_bytes().startswith(start)


def test_degenerate_matrices_are_drawn(tmp_path):
    for A in (np.zeros((3, 4)), np.ones((1, 5)), np.full((4, 1), 1e30)):
        for panel in plot_factors(factorize(A, k=1), tmp_path / "a.png", A):
            axes = Figure().subplots()
            panel.draw(axes)
            colours = [image.get_clim() for image in axes.images]
            ranges = np.array([axes.get_xlim(), axes.get_ylim(), *colours])
            assert np.isfinite(ranges).all() and np.ptp(ranges, axis=1).all(), panel.name


def test_of_an_empty_array_there_is_nothing_to_draw(tmp_path):
    empty = StoredArray.of(np.zeros((0, 3), np.float32))
    for draw in (lambda: plot_factors(empty, tmp_path / "a.png"), lambda: html_report(empty)):
        with pytest.raises(ValueError, match="nothing to draw of an empty array"):
            draw()


class Page(HTMLParser):
    """Collects the tags of a page, and those that stay open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(pair):
    A, f = pair
    text = html_report(f, A, title="<A & B>")
    page = Page(text)
    assert page.open == []
    assert "&lt;A &amp; B&gt;" in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 8
    assert all(len(a["alt"]) > 40 and a["src"].startswith("data:image/png") for a in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in re.sub(r"base64,[^']*", "", text)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids) == 8


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_every_picture(pair, tmp_path):
    A, f = pair
    # a script of the test's own counts what the browser has decoded
    counted = (
        "<script>addEventListener('load', () => { document.body.dataset.seen = [...document.images]"
        ".filter(i => i.complete && i.naturalWidth > 300).length })</script>"
    )
    (tmp_path / "a.html").write_text(html_report(f, A) + counted, encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "a.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 'data-seen="8"' in done.stdout
    assert "SNR of the weights" in done.stdout


def test_plot_and_report_on_the_command_line(pair, tmp_path, monkeypatch, capsys):
    A, f = pair
    monkeypatch.chdir(tmp_path)
    np.save("A.npy", A)
    f.save("A.h5")
    assert main(["plot", "A.h5", "A.npy", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["output"], len(report["pictures"])) == ("A.png", 8)
    assert report["file_bytes"] == (tmp_path / "A.png").stat().st_size
    assert main(["report", "A.h5", "-o", "r.html"]) == 0
    assert "stored bits a weight" in (tmp_path / "r.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["report", "A.h5", "-o", "r.html"]) == 1
    assert "pass --force" in capsys.readouterr().err
    np.save("B.npy", A.T)
    assert main(["plot", "A.h5", "B.npy", "-o", "b.png"]) == 1
    assert "B.npy: found shape (20, 30), expected (30, 20)" in capsys.readouterr().err
    assert main(["plot", "none.h5", "-o", "b.png"]) == 1
    assert not (tmp_path / "b.png").exists()


def test_other_methods_are_drawn_too(pair, tmp_path):
    from diba_np import methods

    A, _ = pair
    made = methods.fit("rtn", A, 2.0)
    made.save(tmp_path / "a.h5")
    names = [p.name for p in panels_of(load(tmp_path / "a.h5"), A)]
    assert names == ["matrix", "error", "spectrum", "storage"]


def test_sums_of_terms_are_drawn(pair):
    A, f = pair
    both = type(f).from_terms([f, f.truncate(1)], f.record)
    told = {p.name: p for p in panels_of(both, A)}
    assert told["b1"].title == f"B1: {A.shape[0]} × {f.k + 1} bits"
    assert told["diagonals"].title == "The three diagonals of 2 terms"
    assert f"{f.k + 1} in 2 terms of {f.k}, 1" in html_report(both, A)
