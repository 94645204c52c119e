"""Torch's files: tensors of every type and form; any other object refused without being built."""

import io
import pickle

import numpy as np
import pytest
from files_of_others import pickled_dict, pickled_tensor, pickled_text, torch_zip

from diba_np.errors import FormatError
from diba_np.matrix.small_floats import decode
from diba_np.sources.opening import open_source

SEVEN = np.arange(7, dtype="<f4").tobytes()


def read(path):
    return {entry.name: np.asarray(entry.read()) for entry in open_source(path)}


def state(offset=1, size=(2, 3), stride=(3, 1)):
    tensor = pickled_tensor("0", "FloatStorage", 7, offset, size, stride)
    return b"\x80\x02" + pickled_dict({"w": tensor}) + b"."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def test_strided_tensors(path):
    path.write_bytes(torch_zip(state(), {"0": SEVEN}))
    np.testing.assert_array_equal(read(path)["w"], [[1, 2, 3], [4, 5, 6]])
    path.write_bytes(torch_zip(state(stride=(1, 2)), {"0": SEVEN}))
    np.testing.assert_array_equal(read(path)["w"], [[1, 3, 5], [2, 4, 6]])
    np.testing.assert_array_equal(read(path.parent)["w"], [[1, 3, 5], [2, 4, 6]])


def test_numbers_are_those_of_the_checksum(path):
    data = bytearray(torch_zip(state(), {"0": SEVEN}))
    data[data.index(SEVEN) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="Bad CRC-32 for file 'model/data/0'"):
        read(path)


def test_nested_containers_types_and_parameters(path):
    words = np.array([0x3F80, 0xC000], "<u2")
    codes = np.array([0x38, 0xFE], "u1")
    parameter = (
        b"ctorch._utils\n_rebuild_parameter\n("
        + pickled_tensor("0", "DoubleStorage", 2, 0, (2,), (1,))
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    inner = {
        "bf": pickled_tensor("1", "BFloat16Storage", 2, 0, (2,), (1,)),
        "f8": pickled_tensor("2", "UntypedStorage", 2, 0, (2,), (1,), "float8_e4m3fn"),
        "p": parameter,
        "c": pickled_tensor("3", "ComplexFloatStorage", 1, 0, (1,), (1,)),
        "tied": pickled_tensor("1", "BFloat16Storage", 2, 0, (2,), (1,)),
    }
    body = pickled_dict({"step": b"K\x07", "name": pickled_text("x"), "model": pickled_dict(inner)})
    storages = {
        "0": np.array([1.5, 2.5]).tobytes(),
        "1": words.tobytes(),
        "2": codes.tobytes(),
        "3": bytes(8),
    }
    path.write_bytes(torch_zip(b"\x80\x02" + body + b".", storages))
    entries = {entry.name: entry for entry in open_source(path)}
    assert list(entries) == ["model.bf", "model.f8", "model.p", "model.c", "model.tied"]
    assert [e.dtype for e in entries.values()][:3] == ["bfloat16", "float8_e4m3fn", "<f8"]
    assert entries["model.bf"].read().tolist() == entries["model.tied"].read().tolist() == [1, -2]
    assert entries["model.f8"].read().tolist() == decode(codes, "float8_e4m3fn").tolist()
    assert entries["model.p"].read().tolist() == [1.5, 2.5]
    assert entries["model.c"].unfit == "complex numbers"


def test_the_older_stream_of_pickles(path):
    one = pickled_tensor("k", "FloatStorage", 7, 1, (2,), (3,))
    tensor = b"\x80\x02" + pickled_dict({"w": one})
    head = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {}))
    data = (7).to_bytes(8, "little") + SEVEN
    path.write_bytes(head + tensor + b"." + pickle.dumps(["k"], 2) + data)
    assert read(path)["w"].tolist() == [1.0, 4.0]
    path.write_bytes(head + tensor + b"." + pickle.dumps(["k"], 2) + data[:-1])
    with pytest.raises(FormatError, match="not 7"):
        read(path)


def test_tensors_outside_their_storage(path):
    path.write_bytes(torch_zip(state(offset=2), {"0": SEVEN}))
    with pytest.raises(FormatError, match="outside its storage"):
        read(path)
    path.write_bytes(torch_zip(state(), {"0": SEVEN[:-1]}))
    with pytest.raises(FormatError, match="27 bytes, not 28"):
        read(path)
    path.write_bytes(torch_zip(state(), {}))
    with pytest.raises(FormatError, match="not readable as a torch file"):
        read(path)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00truetR.", r"os\.system is not a tensor; refused"),
        (b"cbuiltins\neval\n(X\x06\x00\x00\x001 // 0tR.", r"builtins\.eval is not a tensor"),
        (b"cnumpy\nload\n(X\x01\x00\x00\x00xtR.", r"numpy\.load is not a tensor"),
        (b"ctorch._utils\n_rebuild_tensor\n.", "_rebuild_tensor is not a tensor"),
        (b"(X\x07\x00\x00\x00storageX\x03\x00\x00\x00abctQ.", "not enough"),
        (
            b"(X\x07\x00\x00\x00storageX\x03\x00\x00\x00abcX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            b"K\x01tQ.",
            "storage of abc is not a storage; refused",
        ),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nK\x01)NtR.",
         "of another kind; refused"),
    ],
)  # fmt: skip
def test_hostile_pickles_are_refused_in_both_forms(body, words, path):
    for data in (torch_zip(body, {"0": bytes(8)}), body):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=words):
            open_source(path)


def test_what_torch_itself_writes(path):
    torch = pytest.importorskip("torch", reason="the package torch")
    w = torch.arange(6.0).reshape(2, 3)
    out = io.BytesIO()
    torch.save({"w": w, "t": w.T.to(torch.bfloat16)}, out)
    path.write_bytes(out.getvalue())
    found = read(path)
    assert found["w"].tolist() == w.tolist() and found["t"].tolist() == w.T.tolist()
