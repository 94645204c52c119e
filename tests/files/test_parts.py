"""Parts of a run that was cut off: what is kept, what is refused, what is never removed."""

import json

import pytest

from diba_np import FormatError
from diba_np.files.parts import Parts


@pytest.fixture
def output(tmp_path):
    """A run with one part, ended before the whole was written."""
    parts = Parts(tmp_path / "m.h5", {"a": 1})
    parts.path(0).write_bytes(b"of a task")
    parts.close()
    return tmp_path / "m.h5"


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_parts_of_which_it_cannot_be_told_whose_they_are_stay(output, text):
    folder = output.with_name("m.h5.parts")
    (folder / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"run\.json: not readable .* ask for a restart"):
        Parts(output, {"a": 1})
    assert (folder / "0.h5").read_bytes() == b"of a task"
    Parts(output, {"a": 1}, restart=True).close()
    assert not folder.exists()


def test_an_error_of_the_disk_removes_nothing(output, monkeypatch):
    def fail(path, *_, **__):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_text", fail)
        with pytest.raises(OSError, match="Input/output error"):
            Parts(output, {"a": 1})
    parts = Parts(output, {"a": 1})
    assert parts.path(0).read_bytes() == b"of a task"
    parts.close()


def test_a_setting_that_is_gone_is_a_difference(output):
    path = output.with_name("m.h5.parts") / "run.json"
    path.write_text(json.dumps({"a": 1, "gone": [2]}))
    with pytest.raises(ValueError, match=r"another run \(gone was \[2\] and is now null\)"):
        Parts(output, {"a": 1})


def test_what_is_too_long_to_show_is_not_the_same(output):
    path = output.with_name("m.h5.parts") / "run.json"
    path.write_text(json.dumps({"texts": "0" * 64, "bits": 1}))
    told = r"another run \(bits was 1 and is now 2, not the same texts\); finish that one"
    with pytest.raises(ValueError, match=told):
        Parts(output, {"texts": "0" * 63 + "1", "bits": 2})


def test_folders_are_of_another_kind_of_run_and_stay(output):
    folder = output.with_name("m.h5.parts")
    (folder / "run.json").unlink()
    (folder / "network.parts").mkdir()
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"holds network\.parts, which is of another kind"):
            Parts(output, {"a": 1}, restart)
    assert (folder / "0.h5").read_bytes() == b"of a task"


@pytest.mark.parametrize("damage", [b"", b"[]", b"3", b'{"value": [[0.5, 2]]}', b"[" * 200_000])
def test_a_value_that_is_damaged_is_none(output, damage):
    parts = Parts(output, {"a": 1})
    value = [[0.1, 1 / 3], {"b": None}]
    parts.write("plan", value)
    assert parts.read("plan") == value
    path = parts.folder / "plan.json"
    flipped = path.read_bytes().replace(b"0.1", b"0.3")
    for text in (damage, flipped):
        path.write_bytes(text)
        assert parts.read("plan") is None
    parts.close()
