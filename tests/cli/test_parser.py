"""How the command line talks: every help page, suggestions, completion, standard output."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from diba_np import load
from diba_np.cli.main import EXAMPLES, build_parser, main
from diba_np.cli.parser import SHELLS, completion
from diba_np.layers import dibard
from diba_np.methods import LABELS
from diba_np.models.plan import ALLOCATIONS
from diba_np.models.run import METHODS
from diba_np.networks import compression
from diba_np.training.losses import LOSSES
from diba_np.training.optimisers import SCHEDULES

COMMANDS = sorted(build_parser().subparsers())


def test_every_example_of_every_help_page_parses():
    assert {""} | set(COMMANDS) == set(EXAMPLES)
    for name, lines in EXAMPLES.items():
        assert lines, name
        for line in lines:
            program, *words = shlex.split(line.partition(" > ")[0])
            assert program == "diba-np"
            if "--help" not in words:
                args = build_parser().parse_args(words)
                assert name in ("", args.command)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_pages_show_examples_and_explain_every_argument(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "examples:\n  diba-np" in out
    command = build_parser().subparsers()[name]
    assert command.description in out
    assert [action.dest for action in command._actions if not action.help] == []
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "required: COMMAND; diba-np --help lists them"),
        ("factorise A.npy --k 2", "did you mean factorize?"),
        ("factorize A.npy --bist 1", "unknown option --bist; did you mean --bits?"),
        ("factorize A.npy --k 2 --timelimit=3", "unknown option --timelimit; did you mean"),
        ("factorize A.npy --k 2 --solver gredy", "did you mean greedy?"),
        ("apply A.h5 X.npy --outptu Y.npy", "did you mean --output?"),
        ("verify A.h5 --qqqq", "unknown option --qqqq\n"),
        ("info A.h5 --quiet", "unknown option --quiet\n"),
        ("compare A.npy --bits 1 --effort fast", "unknown option --effort\n"),
        ("compare A.npy --bits 1 --methods dba", "did you mean diba?\n"),
        ("generate A.h5 a --top-p 0", "must lie in (0, 1], got 0"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_help_names_the_default_of_each_option():
    for name, command in build_parser().subparsers().items():
        entries = command.format_help().split("\n  -")
        for option, action in command.options().items():
            if action.nargs != 0 and action.default not in (None, [], "==SUPPRESS=="):
                (own,) = (e for e in entries if re.search(rf"(^|, -){option[1:]}\s", e))
                assert "default: " in " ".join(own.split()), (name, option)
    assert (
        "how long to search (default: fast)" in build_parser().subparsers()["sweep"].format_help()
    )


def test_abbreviations_still_work():
    args = build_parser().parse_args(["factorize", "A.npy", "--bits", "1", "--max", "3"])
    assert args.max_sweeps == 3


def test_choices_are_those_of_the_functions():
    # the parser imports nothing heavy, and so has to repeat them
    commands = build_parser().subparsers()
    known = {
        ("model", "--allocation"): ALLOCATIONS,
        ("retune", "--loss"): tuple(LOSSES),
        ("retune", "--method"): dibard.RETUNE_METHODS,
        ("retune", "--schedule"): SCHEDULES,
    }
    for (name, option), choices in known.items():
        assert commands[name].options()[option].choices == choices
    assert commands["compare"].options()["--methods"].choices == ("all", *LABELS)
    methods = commands["model"].options()["--method"].choices
    assert methods[: len(METHODS)] == METHODS
    assert sorted(methods) == sorted({*METHODS, *compression.NETWORK_METHODS})


def test_completion_names_every_subcommand_and_option():
    parser = build_parser()
    for shell in SHELLS:
        text = completion(parser, shell)
        for name, command in parser.subparsers().items():
            assert name in text
            for option in command.options():
                assert option in text or f" -l {option[2:]}" in text


def completed(*words):
    """What bash offers after these words."""
    script = completion(build_parser(), "bash")
    line = " ".join(shlex.quote(w) for w in words)
    script += (
        f'\nCOMP_WORDS=({line})\nCOMP_CWORD={len(words) - 1}\n_diba_np\necho "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_completion_in_bash():
    assert completed("diba-np", "fac") == ["factorize"]
    assert {"info", "verify", "--version"} <= set(completed("diba-np", ""))
    assert completed("diba-np", "factorize", "A.npy", "--bi") == ["--bits"]
    assert completed("diba-np", "factorize", "--solver", "gr") == ["greedy"]
    assert completed("diba-np", "completion", "") == list(SHELLS)
    assert completed("diba-np", "factorize", "A.n") == []  # readline completes files


@pytest.mark.parametrize(("shell", "check"), [("zsh", "-n"), ("fish", "--no-execute")])
def test_completion_is_valid_in_other_shells(shell, check, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(completion(build_parser(), shell))
    subprocess.run([shell, check, tmp_path / "script"], check=True)


@pytest.fixture
def stored(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    np.save("A.npy", rng.normal(size=(20, 15)))
    assert main("factorize A.npy --k 6 -o A.h5 --quiet --max-sweeps 5".split()) == 0
    return load("A.h5")


def test_a_dash_sends_the_result_to_standard_output(stored, capfdbinary):
    capfdbinary.readouterr()
    code = "from diba_np.cli.main import main; raise SystemExit(main())"
    np.save("X.npy", np.ones((3, 15), np.float32))
    for line, expected in [
        ("reconstruct A.h5 -o - --json", stored.to_dense()),
        ("apply A.h5 X.npy -o - --json", np.ones((3, 15)) @ stored.to_dense().T),
    ]:
        command = [sys.executable, "-c", code, *line.split()]
        done = subprocess.run(command, capture_output=True, check=True)
        np.testing.assert_allclose(np.load(io.BytesIO(done.stdout)), expected, atol=1e-4)
        report = json.loads(done.stderr)
        assert (report["output"], report["file_bytes"]) == ("-", len(done.stdout))


def test_a_terminal_is_not_filled_with_bytes(stored, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["reconstruct", "A.h5", "-o", "-"]) == 1
    out, err = capsys.readouterr()
    assert (out, "standard output is a terminal" in err) == ("", True)


@pytest.mark.parametrize(
    "line",
    [
        "verify --json A.h5 A.npy --group g",
        "verify A.h5 --json A.npy --group g",
        "verify A.h5 --json --group g A.npy",
    ],
)
def test_a_matrix_may_stand_behind_options(line):
    args = build_parser().parse_args(line.split())
    assert (args.file, args.matrix, args.group, args.json) == ("A.h5", "A.npy", "g", True)


@pytest.mark.parametrize("line", ["verify A.h5 --json A.npy B.npy", "info A.h5 --json A.npy"])
def test_a_word_too_many_is_refused(line, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(line.split())
    assert f"unrecognized arguments: {line.split()[-1]}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["factorize", "A.npy", "--k", "2", "-o", ""],
        ["factorize", "A.npy", "--k", "2", "--inputs", ""],
        ["factorize", "A.npy", "--k", "2", "--checkpoint="],
        ["model", "m.npz", "--bits", "2", "-o", "m.h5", "--weights", ""],
        ["info", "A.h5", "--group", ""],
    ],
)
def test_an_option_that_is_empty_is_not_left_out(words, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(words)
    assert ended.value.code == 2
    assert "must not be empty" in capsys.readouterr().err
