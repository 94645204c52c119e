"""What is shown of the progress, with tqdm and without it."""

import importlib.util

import pytest

from diba_np.machine.display import Display


@pytest.fixture
def without_tqdm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_lines(without_tqdm, capsys):
    display = Display("matrices")
    display.show(1, 3, text="w0")
    display.show(2, 3, "polish")
    display.close()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "1/3 matrices, w0\npolish: 2/3 matrices\n")


def test_names_that_others_chose_are_escaped(without_tqdm, capsys):
    Display("matrices").show(1, 3, "a\rb", "\x1b[31mred\nnew: 9 dB")
    assert capsys.readouterr().err == "a\\rb: 1/3 matrices, \\x1b[31mred\\nnew: 9 dB\n"


def test_lines_keep_their_distance(without_tqdm, capsys):
    display = Display(pause=3600.0)
    for step in range(5):
        display.show(step, 5, "relaxation k=3")
    assert capsys.readouterr().err == ""


def test_bars(capsys):
    pytest.importorskip("tqdm", reason="shows lines without it")
    display = Display()
    display.show(1, 4, "relaxation")
    display.show(4, 4, "relaxation", "error 0.1")
    display.show(4, 10, "relaxation")
    display.show(10, 10, "relaxation")
    display.show(2, 2, "polish")
    display.close()
    out, err = capsys.readouterr()
    assert out == "" and "relaxation" in err and "polish" in err and "10/10" in err
