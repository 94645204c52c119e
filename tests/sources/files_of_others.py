"""Small files of other programs' formats, written byte by byte."""

import io
import json
import struct
import zipfile

import numpy as np


def safetensors(header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, (dict, list)) else header
    return len(text).to_bytes(8, "little") + text + data


def safetensors_of(arrays, kinds=None):
    """A file of arrays, given as words; `kinds` names the types."""
    header, data = {}, b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        kind = (kinds or {}).get(name) or {"f4": "F32", "f2": "F16", "i8": "I64"}[
            array.dtype.str[1:]
        ]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return safetensors(header, data)


def torch_zip(body, storages=None, prefix="model/"):
    """A torch file in zip form: the pickle's body and raw storages by key."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{prefix}data.pkl", body)
        for key, raw in (storages or {}).items():
            archive.writestr(f"{prefix}data/{key}", raw)
    return out.getvalue()


def pickled_text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def pickled_tensor(key, kind, count, offset, size, stride, dtype=None):
    """The opcodes of one tensor; with `dtype` those of the form that names its type."""
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    function = "_rebuild_tensor_v3" if dtype else "_rebuild_tensor_v2"

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    body = f"ctorch._utils\n{function}\n".encode() + b"("
    body += b"(" + pickled_text("storage") + f"c{module}\n{kind}\n".encode()
    body += pickled_text(key) + pickled_text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"
    body += b"J" + struct.pack("<i", offset) + numbers(size) + numbers(stride)
    body += b"\x89" + b"ccollections\nOrderedDict\n)R"
    body += f"ctorch\n{dtype}\n".encode() if dtype else b""
    return body + b"tR"


def pickled_dict(items):
    """The opcodes of a dictionary of name to opcodes."""
    return b"}(" + b"".join(pickled_text(name) + body for name, body in items.items()) + b"u"


def field(number, payload):
    """A field of a protocol buffer: an int, or bytes."""

    def varint(value):
        out = bytearray()
        while True:
            value, low = value >> 7, value & 127
            out.append(low | (128 if value else 0))
            if not value:
                return bytes(out)

    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def gguf_file(tensors, metadata=(), version=3, alignment=32):
    """A GGUF file of (name, shape rows first, ggml's type, raw bytes)."""

    def text(value):
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, kind, raw in metadata:
        head += text(key) + struct.pack("<I", kind) + raw
    data = b""
    for name, shape, kind, raw in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", side) for side in shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % alignment) + data
