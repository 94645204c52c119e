"""ONNX models: initializers and constants however their numbers are stored."""

import numpy as np
import pytest
from files_of_others import field

from diba_np.errors import FormatError
from diba_np.sources.opening import open_source


def read(path):
    return {entry.name: np.asarray(entry.read()) for entry in open_source(path)}


def tensor(name, kind, shape, *parts):
    sides = b"".join(field(1, side) for side in shape)
    return sides + field(2, kind) + field(8, name) + b"".join(parts)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.onnx"


def model(*parts):
    return field(1, 8) + field(7, b"".join(parts))


VALUES = np.arange(6, dtype="<f4")


def test_initializers_constants_and_what_is_no_number(path):
    raw = tensor(b"w", 1, (2, 3), field(9, VALUES.tobytes()))
    packed = field(1, bytes([6])) + field(2, 1) + field(8, b"c") + field(4, VALUES.tobytes())
    text = tensor(b"words", 8, (1,))
    node = field(2, b"out") + field(4, b"Constant") + field(5, field(1, b"v") + field(5, packed))
    path.write_bytes(model(field(5, raw), field(5, text), field(1, node)))
    entries = {entry.name: entry for entry in open_source(path)}
    assert list(entries) == ["w", "words", "out"]
    assert entries["words"].unfit == "text"
    assert entries["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert entries["out"].read().tolist() == VALUES.tolist()


def test_every_way_of_storing_numbers(path):
    halves = np.array([1.5, -2], "<f2")
    parts = [
        tensor(b"int32", 6, (2,), field(5, b"\x05\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")),
        tensor(b"int64", 7, (2,), field(7, 3), field(7, 300)),
        tensor(b"double", 11, (1,), field(10, np.array([2.5]).tobytes())),
        tensor(b"half", 10, (2,), field(5, b"\x80\x7c\x80\x80\x03")),
        tensor(b"bf16", 16, (2,), field(9, np.array([0x3F80, 0xC000], "<u2").tobytes())),
        tensor(b"fp8", 17, (2,), field(9, b"\x38\xfe")),
        tensor(b"bool", 9, (2,), field(9, b"\x01\x00")),
        tensor(b"scalar", 1, (), field(9, VALUES[1:2].tobytes())),
        tensor(b"none", 1, (0, 4)),
    ]
    path.write_bytes(model(*(field(5, part) for part in parts)))
    found = read(path)
    assert found["int32"].tolist() == [5, -1] and found["int64"].tolist() == [3, 300]
    assert found["double"].tolist() == [2.5] and found["scalar"].tolist() == 1.0
    assert halves.view("<u2").tolist() == [0x3E00, 0xC000]
    assert found["half"].view("<u2").tolist() == [0x3E00, 0xC000]
    assert found["bf16"].tolist() == [1, -2] and found["fp8"].tolist() == [1, -448]
    assert found["bool"].tolist() == [True, False] and found["none"].shape == (0, 4)


def external(name=b"w.data", offset=b"4"):
    return tensor(
        b"w",
        1,
        (2, 2),
        field(13, field(1, b"location") + field(2, name)),
        field(13, field(1, b"offset") + field(2, offset)),
        field(14, 1),
    )


def test_numbers_in_a_file_beside_the_model(path):
    path.write_bytes(model(field(5, external())))
    path.with_name("w.data").write_bytes(VALUES.tobytes())
    assert read(path)["w"].tolist() == [[1, 2], [3, 4]]
    for other, words in (
        (external(b"../w.data"), "expected a file of the model's folder"),
        (external(b"/etc/passwd"), "expected a file of the model's folder"),
        (external(b"gone"), "which is not there"),
        (external(offset=b"12"), "24 bytes, not 28"),
    ):
        path.write_bytes(model(field(5, other)))
        with pytest.raises(FormatError, match=words):
            read(path)


def test_damaged_files_are_refused(path):
    whole = model(field(5, tensor(b"w", 1, (2, 3), field(9, VALUES.tobytes()))))
    for cut in (1, 5, 30):
        path.write_bytes(whole[:-cut])
        with pytest.raises(FormatError, match="it ends within a"):
            read(path)
    path.write_bytes(model(field(5, tensor(b"w", 1, (2, 4), field(9, VALUES.tobytes())))))
    with pytest.raises(FormatError, match="6 numbers for shape"):
        read(path)
    path.write_bytes(b"\xff" * 30)
    with pytest.raises(FormatError):
        open_source(path)
