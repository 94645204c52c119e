"""The README and the pages: blocks run or parse, links lead somewhere, fields are as told."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from diba_np.cli.main import build_parser, main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "diba_np" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^(<!--[^\n]*-->\n)?```(\w*)\n(.*?)^```$", re.S | re.M)


def blocks(page, language):
    """The fenced blocks of a page in one language, without those marked as not run."""
    for mark, found, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if found == language and "not run" not in mark:
            yield text


def commands(page):
    """The lines that call our program, as lists of words."""
    for text in blocks(page, ""):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "diba-np":
                yield words[1:]


@pytest.fixture
def clone(tmp_path, monkeypatch, rng):
    """A folder like a clone's, in which blocks may write."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WITH_PYTHON = [page for page in PAGES if any(blocks(page, "python"))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_blocks_run_and_print_what_they_say(page, clone, capsys):
    names = {}
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), names)
        # a comment after a print is what it prints
        told = re.findall(r"^print\(.*\)  # (.*)$", text, re.M)
        out = capsys.readouterr().out
        assert [line for line in told if line not in out] == []


def test_every_command_of_every_page_parses():
    seen = 0
    for page in PAGES:
        for words in commands(page):
            build_parser().parse_args(words)
            seen += 1
    assert seen > 20


@pytest.fixture
def matrices(clone, rng):
    np.save("A.npy", rng.normal(size=(60, 50)))
    np.save("X.npy", rng.normal(size=(80, 50)))
    np.save("Y.npy", rng.normal(size=(80, 60)))
    return clone


PASTED = [ROOT / "README.md", DOCS / "command-line.md"]


@pytest.mark.parametrize("page", PASTED, ids=lambda page: page.stem)
def test_commands_run(page, matrices, capsys):
    pytest.importorskip("matplotlib", reason="plot and report need matplotlib")
    for words in commands(page):
        fresh = ["--force"] if {"-o", "--output"} & set(words) else []
        assert main([*words, *fresh]) == 0, (words, capsys.readouterr().err)
        if words[0] == "apply":  # what the page's next command takes as targets
            assert np.load(words[words.index("-o") + 1]).shape == (80, 60)


def names_in(text):
    return set(re.findall(r"`(\w+)`", text))


def documented():
    """Command -> fields: those always there, those that may be, those of its rows or groups."""
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    (sizes,) = re.findall(r'"sizes" stands for (.*?)\n\n', text, re.S)
    sizes = names_in(re.sub(r"\(.*?\)", "", sizes, flags=re.S))
    table = {}
    for names, fields in re.findall(r"^\| (`[a-z].*?) \| (.*) \|$", text, re.M):
        first = fields.partition("; of a file")[0]
        may = set(re.findall(r"\[`(\w+)`:", first))
        outer = re.sub(r"\[.*?\]", "", first)
        inner = re.search(r"`(?:rows|groups)` of (.*)", outer)
        inner = inner[1] if inner else ""
        always = names_in(re.sub(r"(`(?:rows|groups|pictures)`) of `.*", r"\1", outer))
        inside = names_in(inner) | (sizes if "sizes" in inner else set())
        always |= sizes if "sizes" in outer and not inner else set()
        for name in names.replace("`", "").split(", "):
            table[name] = (may, always, inside)
    may, always, inside = table["info of a model"]
    table["info of a model"] = (may, always - {"model"} | table["model"][1], inside)
    return table


def check_fields(label, out):
    """Hold the fields of a JSON object to the table; return the object."""
    may, always, inside = documented()[label]
    assert out.count("\n") == 1
    report = json.loads(out)
    assert always <= set(report) <= always | may, label
    for row in report.get("rows", report.get("groups", [])) if inside else []:
        some = {"group", "k", "shift", "scale_bits", "terms"}  # of a file, of factorizations
        assert inside - some <= set(row) <= inside | some | may, label
    return report


def test_json_fields_are_the_documented_ones(matrices, capsys):
    pytest.importorskip("matplotlib", reason="plot and report need matplotlib")
    silent = {"completion"}  # a script
    assert set(documented()) | silent >= set(build_parser().subparsers())
    np.savez("w.npz", a=np.load("A.npy"), b=np.ones(3))
    for words in [
        "factorize A.npy --k 6 -o A.h5 --quiet",
        "factorize A.npy --k 6 -o B.h5 --quiet --inputs X.npy",
        "info A.h5",
        "retune A.h5 --inputs X.npy --targets Y.npy -o C.h5",
        "reconstruct A.h5 -o R.npy",
        "apply A.h5 X.npy -o Z.npy",
        "verify A.h5",
        "verify A.h5 A.npy",
        "compare A.npy --bits 2 --methods diba rtn",
        "sweep A.npy --bits 2 -o curve.h5",
        "sweep A.npy --bits 2 --inputs X.npy --max-sweeps 1",
        "plot A.h5",
        "report A.h5",
        "model w.npz --bits 4 --jobs 1 -o m.h5 --quiet",
        "info m.h5 of a model",
        "verify m.h5 of a model or network",
        "verify m.h5 w.npz of a model or network",
        "export m.h5 -o dense",
        "doctor",
    ]:
        line, of, kind = words.partition(" of ")
        command = line.split()[0]
        status = main([*line.split(), "--json"])
        out, err = capsys.readouterr()
        assert status == 0 or command == "doctor", err
        found = set(check_fields(command + of + kind, out))
        if "--inputs" in line and command == "factorize":
            assert "output_snr_db" in found
        if command == "verify" and len(line.split()) == 3:
            may, always, _ = documented()[command + of + kind]
            assert found == always | may


def test_json_fields_of_networks_are_the_documented_ones(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tokenizers", reason="texts need the extra networks")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "networks"))
    from small_networks import network
    from test_texts import packed, words

    scores = network("bert", "score", dtype=np.float32)
    packed(scores).save(tmp_path / "scores.h5")
    scores.save(tmp_path / "dense.h5")
    net = packed(network("llama", dtype=np.float32))
    net.tokenizer = words()
    monkeypatch.chdir(tmp_path)
    net.save("small.h5")
    np.save("ids.npy", [[3, 4, 5]])
    np.save("y.npy", [0.5])
    Path("t.txt").write_text("a b c d\n")
    for command in [
        "export small.h5 -o dense",
        "info small.h5 of a network",
        "verify small.h5 dense of a model or network",
        "evaluate small.h5 --texts t.txt",
        "evaluate small.h5 --texts t.txt --against dense",
        "evaluate scores.h5 --texts ids.npy --labels y.npy --against dense.h5",
        "generate small.h5 a --tokens 2",
        "embed small.h5 ids.npy -o E.npy",
    ]:
        line, of, kind = command.partition(" of ")
        assert main([*line.split(), "--json"]) == 0
        check_fields(line.split()[0] + of + kind, capsys.readouterr().out)


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            path, _, heading = target.partition("#")
            aim = page if not path else (page.parent / path).resolve()
            assert aim.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", aim.read_text(encoding="utf-8"), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
                assert heading in slugs, f"{page.name}: {target}"


def test_every_page_is_in_the_map():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"](diba_np/docs/{page.name})" in text, page.name


def test_pages_speak_of_the_project_alone():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/tmp/|/home/|/root/|\blocalhost:", text), page.name
