"""A DiBA factorization as attributes and arrays of a file: format versions 1 to 3.

Format version 1, at the root or in a group of it:

* attributes ``format="diba_np"``, ``format_version``, ``m``, ``n``, ``k``, ``shift``,
  ``scale_bits``, ``scale``, ``bit_order="little"``, and the container's ``record`` and ``digest``;
* datasets ``b1`` and ``b2`` (uint8): the bits row after row as one stream, least significant bit
  first, with no padding at the row ends;
* datasets ``d1``, ``d2``, ``d3``: ``<f2`` or ``<f4``; d2 is to be multiplied by ``scale``
  (float64, a power of two);
* dataset ``bias`` (``<f4``), where the factorization carries one.

Format version 2, written only for coded diagonals, differs in the diagonals:

* attribute ``scale_bits``: three code widths; ``grids`` (3, 2) float32 in place of ``scale``: low
  and ratio of each grid, see `diba_np.matrix.diagonals.LogGrid.to_pair`;
* datasets ``d1``, ``d2``, ``d3`` (uint8): the codes as one stream, least significant bit first.

Format version 3, written only for several terms, has the parts of each term one after the other:

* attributes ``m``, ``n``, ``k`` (the sum), ``shift`` and ``bit_order`` as before; ``sizes`` (T,)
  int64, k of each term; ``scale_bits`` (T, 3) int64, 16 or 32 three times or code widths;
  ``scales`` (T,) float64 and ``grids`` (T, 3, 2) float32, zeros where a term has none of its kind;
* datasets ``b1``, ``b2``, ``d1``, ``d2``, ``d3`` (uint8): what a file of that term alone would hold
  under this name, as bytes, each term from a whole byte on; ``bias`` as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diba_np.errors import FormatError
from diba_np.files.container import Container, Layout, Reader
from diba_np.matrix.diagonals import (
    DIAGONALS,
    HALF,
    LEAST_CODE,
    MOST_CODE,
    SINGLE,
    LogGrid,
    half_scale,
    pack_codes,
    unpack_codes,
)
from diba_np.matrix.packed_bits import PackedBits

if TYPE_CHECKING:
    from diba_np.matrix.factors import DiBAFactors

PLAIN_VERSION, CODED_VERSION, TERMS_VERSION = 1, 2, 3
_BYTE = np.dtype("u1")

_DTYPES: dict[int, np.dtype[Any]] = {HALF: np.dtype("<f2"), SINGLE: np.dtype("<f4")}


def payload(factors: DiBAFactors) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the (attributes, arrays) that stand for a factorization in a file."""
    if len(factors.terms) > 1:
        return _sum_payload(factors)
    attributes: dict[str, Any] = {
        "m": factors.shape[0],
        "n": factors.shape[1],
        "k": factors.k,
        "shift": factors.shift,
        "bit_order": "little",
    }
    arrays: dict[str, NDArray[Any]] = {
        "b1": factors.b1.to_stream(),
        "b2": factors.b2.to_stream(),
    }
    bits = factors.scale_bits
    if factors.grids is not None:
        attributes["format_version"] = CODED_VERSION
        attributes["scale_bits"] = [grid.bits for grid in factors.grids]
        attributes["grids"] = np.array([grid.to_pair() for grid in factors.grids], np.float32)
        for name, grid in zip(DIAGONALS, factors.grids, strict=True):
            arrays[name] = pack_codes(grid.encode(getattr(factors, name)), grid.bits)
    elif isinstance(bits, int):
        scale = half_scale(factors.d2) if bits == HALF else 1.0
        attributes |= {"format_version": PLAIN_VERSION, "scale_bits": bits, "scale": scale}
        arrays["d1"] = factors.d1.astype(_DTYPES[bits])
        arrays["d2"] = (factors.d2.astype(np.float64) / scale).astype(_DTYPES[bits])
        arrays["d3"] = factors.d3.astype(_DTYPES[bits])
    if factors.bias is not None:
        arrays["bias"] = factors.bias.astype(_DTYPES[SINGLE])
    return attributes, arrays


def _sum_payload(factors: DiBAFactors) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the (attributes, arrays) that stand for several terms in a file."""
    parts = [payload(term) for term in factors.terms]
    plain = [attributes["format_version"] == PLAIN_VERSION for attributes, _ in parts]
    widths = [np.resize(attributes["scale_bits"], 3) for attributes, _ in parts]
    grids = [attributes.get("grids", np.zeros((3, 2))) for attributes, _ in parts]
    attributes = {
        "format_version": TERMS_VERSION,
        "m": factors.shape[0],
        "n": factors.shape[1],
        "k": factors.k,
        "shift": factors.shift,
        "bit_order": "little",
        "sizes": np.array([term.k for term in factors.terms], np.int64),
        "scale_bits": np.array(widths, np.int64),
        "scales": np.array(
            [own["scale"] if kind else 0.0 for kind, (own, _) in zip(plain, parts, strict=True)]
        ),
        "grids": np.array(grids, np.float32),
    }
    arrays = {
        name: np.concatenate([np.ascontiguousarray(own[name]).view(_BYTE) for _, own in parts])
        for name in ("b1", "b2", *DIAGONALS)
    }
    if factors.bias is not None:
        arrays["bias"] = factors.bias.astype(_DTYPES[SINGLE])
    return attributes, arrays


def _sum_sizes(m: int, n: int, k: int, widths: list[int]) -> dict[str, int]:
    """Return the bytes that a term takes of each dataset."""
    lengths = zip(DIAGONALS, (m, k, n), widths, strict=True)
    sizes = {"b1": -(-m * k // 8), "b2": -(-k * n // 8)}
    return sizes | {name: -(-width * length // 8) for name, length, width in lengths}


def _sum_layout(reader: Reader, m: int, n: int, k: int) -> Layout:
    """Return `layout` of several terms."""
    count = np.size(reader.place.attrs.get("sizes", ()))
    sizes = reader.numbers("sizes", (count,), "i")
    if count < 2 or min(sizes) < 1 or sum(sizes) != k:
        raise reader.fail("attribute sizes", sizes, f"two or more sizes with the sum {k}")
    widths = reader.numbers("scale_bits", (count, 3), "i")
    reader.numbers("scales", (count,), "f")
    reader.numbers("grids", (count, 3, 2), "f")
    for own in widths:
        coded = all(LEAST_CODE <= width <= MOST_CODE for width in own)
        if not coded and own not in ([HALF] * 3, [SINGLE] * 3):
            raise reader.fail("attribute scale_bits", own, "three widths from 2 to 8, or 16 or 32")
    terms = [_sum_sizes(m, n, size, own) for size, own in zip(sizes, widths, strict=True)]
    return {name: (sum(term[name] for term in terms), _BYTE) for name in terms[0]}


def layout(reader: Reader) -> Layout | None:
    """Check the attributes of a DiBA factorization; return its datasets' sizes and dtypes.

    None for the matrices of other methods, which check their own.
    """
    version = reader.attribute("format_version", int)
    if version not in (PLAIN_VERSION, CODED_VERSION, TERMS_VERSION):
        raise reader.fail("attribute format_version", version, f"at most {TERMS_VERSION}")
    if "method" in reader.place.attrs:
        reader.attribute("method", str)
        return None
    m, n, k = (reader.attribute(name, int) for name in ("m", "n", "k"))
    if not 1 <= k < 2**31:
        raise reader.fail("attribute k", k, "a positive size")
    reader.attribute("shift", float)
    if reader.attribute("bit_order", str) != "little":
        raise reader.fail("attribute bit_order", reader.attribute("bit_order", str), "little")
    bias: Layout = {"bias": (m, _DTYPES[SINGLE])} if "bias" in reader.place else {}
    if version == TERMS_VERSION:
        return _sum_layout(reader, m, n, k) | bias
    bits = bias | {"b1": (-(-m * k // 8), _BYTE), "b2": (-(-k * n // 8), _BYTE)}
    sizes = dict(zip(DIAGONALS, (m, k, n), strict=True))
    if version == CODED_VERSION:
        widths = reader.numbers("scale_bits", (3,), "i")
        reader.numbers("grids", (3, 2), "f")
        if not all(LEAST_CODE <= width <= MOST_CODE for width in widths):
            raise reader.fail("attribute scale_bits", widths, "three widths from 2 to 8")
        coded = zip(sizes.items(), widths, strict=True)
        return bits | {name: (-(-width * size // 8), _BYTE) for (name, size), width in coded}
    reader.attribute("scale", float)
    width = reader.attribute("scale_bits", int)
    if width not in _DTYPES:
        raise reader.fail("attribute scale_bits", width, "16 or 32")
    return bits | {name: (size, _DTYPES[width]) for name, size in sizes.items()}


def rebuild(cls: type[DiBAFactors], contents: Container) -> DiBAFactors:
    """Build a factorization from what a file holds; `FormatError` if that is inconsistent."""
    attributes, arrays = contents.attributes, contents.arrays
    m, n, k = (attributes[name] for name in ("m", "n", "k"))
    rest = (attributes["shift"], contents.record)
    bias = arrays.get("bias")
    if attributes["format_version"] == TERMS_VERSION:
        return _rebuild_sum(cls, contents)
    try:
        bits1 = PackedBits.from_stream(arrays["b1"], (m, k))
        bits2 = PackedBits.from_stream(arrays["b2"], (k, n))
        if attributes["format_version"] == PLAIN_VERSION:
            d2 = arrays["d2"].astype(np.float64) * attributes["scale"]
            return cls(arrays["d1"], bits1, d2, bits2, arrays["d3"], *rest, bias=bias)
        pairs = zip(attributes["scale_bits"], attributes["grids"], strict=True)
        first, second, third = (LogGrid.from_pair(width, pair) for width, pair in pairs)
        grids = (first, second, third)
        d1, d2, d3 = (
            grid.decode(unpack_codes(arrays[name], grid.bits, size))
            for grid, name, size in zip(grids, DIAGONALS, (m, k, n), strict=True)
        )
        return cls(d1, bits1, d2, bits2, d3, *rest, grids=grids, bias=bias)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{contents.label}: {error}") from error


def _rebuild_sum(cls: type[DiBAFactors], contents: Container) -> DiBAFactors:
    """Build a sum of terms: each as a file of it alone would be, and their sum."""
    own, arrays = contents.attributes, contents.arrays
    m, n = own["m"], own["n"]
    begins = dict.fromkeys(("b1", "b2", *DIAGONALS), 0)
    terms = []
    columns = (own[name] for name in ("sizes", "scale_bits", "scales", "grids"))
    for i, (k, widths, scale, grids) in enumerate(zip(*columns, strict=True)):
        parts = {}
        for name, size in _sum_sizes(m, n, k, widths).items():
            parts[name] = arrays[name][begins[name] : begins[name] + size]
            begins[name] += size
        attributes = {"m": m, "n": n, "k": k, "shift": own["shift"]}
        if widths[0] in _DTYPES:
            parts |= {name: parts[name].view(_DTYPES[widths[0]]) for name in DIAGONALS}
            attributes |= {"format_version": PLAIN_VERSION, "scale": scale}
        else:
            attributes |= {"format_version": CODED_VERSION, "scale_bits": widths, "grids": grids}
        label = f"{contents.label}: term {i}"
        terms.append(rebuild(cls, Container(label, attributes, parts, {})))
    try:
        return cls.from_terms(terms, contents.record, bias=arrays.get("bias"))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{contents.label}: {error}") from error
