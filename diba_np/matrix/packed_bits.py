"""`PackedBits`: a 0/1 matrix in little-endian 64-bit words."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diba_np.checks import as_real

WORD = 64

# rows a block in conversions; a multiple of 64 so that blocks end on words of the transpose
_BLOCK = 1024


class PackedBits:
    """A 0/1 matrix packed into words, immutable.

    Bit j of row i is ``(words[i, j // 64] >> (j % 64)) & 1``. Bits past the last column are zero.

    Parameters
    ----------
    bits : array_like, shape (rows, columns)
        bool, or any real dtype that holds zeros and ones only. Another `PackedBits` is taken as it
        is.

    Attributes
    ----------
    shape : (int, int)
        Rows and columns of the matrix.
    words : (rows, ceil(columns / 64)) uint64 array, C-order, read-only
    tiles : uint32 array
        The same bits in the layout that the product kernels read.
    nbytes : int
        Bytes held: words and tiles, as far as they were made.

    Raises
    ------
    TypeError
        `bits` is not an array of real numbers.
    ValueError
        `bits` is not two-dimensional, has no rows or no columns, or holds another value.

    Examples
    --------
    >>> import numpy as np
    >>> b = PackedBits(np.array([[1, 0, 1], [0, 0, 1]]))
    >>> b
    PackedBits(2 x 3, 3 ones)
    >>> b.words
    array([[5],
           [4]], dtype=uint64)
    >>> (b.T.to_dense() == b.to_dense().T).all()
    np.True_
    """

    __slots__ = ("__weakref__", "_tiles", "_transpose", "_words", "shape")

    _words: NDArray[np.uint64] | None  # None: a transpose whose words nobody asked for yet
    _tiles: NDArray[np.uint32] | None
    # what this was turned from is held, what was turned from this is not: no circle keeps either
    _transpose: PackedBits | weakref.ref[PackedBits] | None
    shape: tuple[int, int]

    def __init__(self, bits: ArrayLike | PackedBits) -> None:
        if isinstance(bits, PackedBits):
            self.shape, self._words, self._tiles = bits.shape, bits._words, bits._tiles
            self._transpose = bits.T
            return
        dense = np.asarray(as_real(bits, "bits", "be an array of 0 and 1"))
        if dense.ndim != 2:
            raise ValueError(f"bits must be 2-D, got shape {dense.shape}")
        if 0 in dense.shape:
            raise ValueError(f"bits must have rows and columns, got shape {dense.shape}")
        if dense.dtype != np.bool_:
            wrong = (dense != 0) & (dense != 1)
            if wrong.any():
                i, j = np.argwhere(wrong)[0]
                raise ValueError(f"bits must be 0 or 1, got {dense[i, j]} at ({i}, {j})")
        self._set(_pack_rows(dense), dense.shape)

    def _set(self, words: NDArray[np.uint64], shape: tuple[int, ...]) -> None:
        words.setflags(write=False)
        self._words = words
        self.shape = (int(shape[0]), int(shape[1]))
        self._transpose = None
        self._tiles = None

    @classmethod
    def from_words(cls, words: NDArray[np.uint64], columns: int) -> PackedBits:
        """Take words that are packed already.

        Parameters
        ----------
        words : (rows, ceil(columns / 64)) uint64
            Copied only if it is not C-order.
        columns : int
            Columns of the matrix.

        Raises
        ------
        TypeError
            `words` is not uint64.
        ValueError
            The number of words does not fit `columns`, or a bit past the last column is set.
        """
        words = np.asarray(words)
        if words.dtype != np.uint64:
            raise TypeError(f"words must be uint64, got {words.dtype}")
        need = -(-columns // WORD)
        if words.ndim != 2 or columns < 1 or words.shape[0] < 1 or words.shape[1] != need:
            raise ValueError(
                f"words must have shape (rows, {need}) for {columns} columns, got {words.shape}"
            )
        tail = columns % WORD
        if tail:
            stray = words[:, -1] >> np.uint64(tail)
            if stray.any():
                row = int(np.flatnonzero(stray)[0])
                raise ValueError(f"words has a bit set past column {columns - 1} in row {row}")
        self = cls.__new__(cls)
        # a view, so that freezing it leaves the caller's own array as it was
        self._set(np.ascontiguousarray(words).view(), (words.shape[0], columns))
        return self

    @property
    def words(self) -> NDArray[np.uint64]:
        """(rows, ceil(columns / 64)) uint64, C-order, read-only."""
        if self._words is None:
            turned = _turn(self.T)
            turned.setflags(write=False)
            self._words = turned
        return self._words

    @property
    def tiles(self) -> NDArray[np.uint32]:
        """(ceil(rows / 32), ceil(columns / 15), 16) uint32: the layout that products read.

        Made when first asked for, then kept; `diba_np.kernels.layout` describes it.
        """
        if self._tiles is None:
            from diba_np.kernels import layout

            self._tiles = self._write_tiles(layout.empty_tiles(*self.shape))
        return self._tiles

    def _write_tiles(self, tiles: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Write the tiles to an array of zeros and return it."""
        from diba_np.kernels import layout

        if self._tiles is not None:
            tiles[...] = self._tiles
        elif self._words is None:
            layout.tile_columns(self.T.words, tiles)
        else:
            layout.tile_rows(self._words, tiles)
        return tiles

    @property
    def nbytes(self) -> int:
        """Bytes held: words and tiles, as far as they were made; not those of the transpose."""
        return sum(part.nbytes for part in (self._words, self._tiles) if part is not None)

    def count(self) -> int:
        """Return the number of ones."""
        bits = self.words.view(np.uint8)
        return int(_POPCOUNT[bits].sum(dtype=np.int64))

    def to_dense(self) -> NDArray[np.uint8]:
        """Return the matrix as (rows, columns) uint8 zeros and ones."""
        return np.unpackbits(
            self.words.astype("<u8", copy=False).view(np.uint8),
            axis=1,
            count=self.shape[1],
            bitorder="little",
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a packed matrix cannot become an array without a copy")
        return self.to_dense().astype(dtype or np.uint8, copy=False)

    @property
    def T(self) -> PackedBits:
        """The transpose, packed; one object while it is in use, its words made when asked for."""
        other = self._transpose
        if isinstance(other, weakref.ref):
            other = other()
        if other is None:
            other = PackedBits.__new__(PackedBits)
            other.shape = self.shape[::-1]
            other._words = other._tiles = None
            other._transpose = self
            self._transpose = weakref.ref(other)
        return other

    def transpose(self) -> PackedBits:
        """Return the transpose, packed; the same object as `T`."""
        return self.T

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> PackedBits:
        """Return whole rows, by a slice (a view if its step is 1) or a vector of indices."""
        if not isinstance(rows, (slice, np.ndarray)) or (
            isinstance(rows, np.ndarray) and (rows.ndim != 1 or rows.dtype.kind not in "iu")
        ):
            raise TypeError(
                f"PackedBits takes slices or vectors of row indices, got {type(rows).__name__}"
            )
        picked = self.words[rows]
        if picked.shape[0] == 0:
            raise ValueError(f"none of the {self.shape[0]} rows is chosen")
        part = PackedBits.__new__(PackedBits)
        part._set(np.ascontiguousarray(picked), (picked.shape[0], self.shape[1]))
        return part

    def __len__(self) -> int:
        return self.shape[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedBits):
            return NotImplemented
        return self.shape == other.shape and bool(np.array_equal(self.words, other.words))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedBits.from_words, (self.words, self.shape[1])

    def __repr__(self) -> str:
        return f"PackedBits({self.shape[0]} x {self.shape[1]}, {self.count()} ones)"

    def to_stream(self) -> NDArray[np.uint8]:
        """Return the bits row after row as one stream of bytes, with no padding at the row ends.

        Least significant bit first; the last byte is padded with zeros. This is the form that
        files hold.
        """
        rows, columns = self.shape
        stream = np.empty(-(-rows * columns // 8), np.uint8)
        for start in range(0, rows, _BLOCK):  # 8 rows fill whole bytes whatever the columns
            part = np.packbits(self[start : start + _BLOCK].to_dense().ravel(), bitorder="little")
            at = start * columns // 8
            stream[at : at + part.size] = part
        return stream

    @classmethod
    def from_stream(cls, stream: NDArray[np.uint8], shape: tuple[int, int]) -> PackedBits:
        """Undo `to_stream`.

        Raises
        ------
        ValueError
            The stream's length does not fit `shape`, or a padding bit is set.
        """
        rows, columns = shape
        need = -(-rows * columns // 8)
        if stream.shape != (need,):
            raise ValueError(f"a {rows} x {columns} matrix takes {need} bytes, got {stream.size}")
        used = rows * columns % 8
        if used and int(stream[-1]) >> used:
            raise ValueError("a padding bit at the end of the stream is set")
        words = np.zeros((rows, -(-columns // WORD)), np.uint64)
        for start in range(0, rows, _BLOCK):
            stop = min(start + _BLOCK, rows)
            part = stream[start * columns // 8 : -(-stop * columns // 8)]
            dense = np.unpackbits(part, count=(stop - start) * columns, bitorder="little")
            words[start:stop] = _pack_rows(dense.reshape(stop - start, columns))
        return cls.from_words(words, columns)


def joined_tiles(parts: Sequence[PackedBits]) -> NDArray[np.uint32]:
    """Return the tiles of several packed matrices in one piece, of which each then holds its own.

    Parameters
    ----------
    parts : sequence of PackedBits

    Returns
    -------
    (units, 16) uint32
        One matrix after the other, from a cache line on.
    """
    from diba_np.kernels import layout

    shapes = [
        (-(-rows // layout.TILE_ROWS), -(-columns // layout.UNIT_COLUMNS))
        for rows, columns in (part.shape for part in parts)
    ]
    ends = np.cumsum([tiles * units for tiles, units in shapes]).tolist()
    flat: NDArray[np.uint32] = layout.empty_tiles(1, layout.UNIT_COLUMNS * ends[-1])[0]
    for part, shape, stop in zip(parts, shapes, ends, strict=True):
        start = stop - shape[0] * shape[1]
        part._tiles = part._write_tiles(flat[start:stop].reshape(*shape, 16))
    return flat


_POPCOUNT = np.array([bin(v).count("1") for v in range(256)], np.uint8)


def _pack_rows(dense: NDArray[Any]) -> NDArray[np.uint64]:
    """Pack (rows, columns) zeros and ones into (rows, ceil(columns / 64)) uint64."""
    rows, columns = dense.shape
    padded = np.zeros((rows, -(-columns // WORD) * 8), np.uint8)
    for start in range(0, rows, _BLOCK):
        part = dense[start : start + _BLOCK]
        packed = np.packbits(
            part if part.dtype == np.bool_ else part != 0, axis=1, bitorder="little"
        )
        padded[start : start + _BLOCK, : packed.shape[1]] = packed
    return padded.view("<u8").astype(np.uint64, copy=False)


def _turn(bits: PackedBits) -> NDArray[np.uint64]:
    """Return the words of the transpose."""
    rows, columns = bits.shape
    turned = np.zeros((columns, -(-rows // WORD) * 8), np.uint8)
    for start in range(0, rows, _BLOCK):
        part = bits[start : start + _BLOCK].to_dense()
        packed = np.packbits(part, axis=0, bitorder="little")
        turned[:, start // 8 : start // 8 + packed.shape[0]] = packed.T
    return turned.view("<u8").astype(np.uint64, copy=False)
