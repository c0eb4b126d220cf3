"""Zarr v3 on the writing side: metadata documents and encoded chunks, as plain JSON and bytes.

Readers use zarr-python or any other implementation. The writer makes the same bytes itself, because it must decide
when each file appears (`pipeline.store`) and because encoding a chunk directly halves the cost of a commit. The
tests hold every document and chunk against zarr-python's own.

Codecs of every array: little-endian bytes, Blosc (lz4, level 5, bit shuffle), crc32c. Chunk keys are `c.0.0`: the
separator `.` keeps an array in one directory.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Blosc, blosc
from numpy.typing import DTypeLike, NDArray

from pipeline.errors import DamagedStore

Document = dict[str, Any]

# A byte of LZ4 stands for at most 255 bytes: what claims more is made to fill somebody's memory.
MOST_EXPANSION = 255
OVERHEAD = 20  # bytes by which a chunk that does not compress grows: Blosc's header, and the checksum

# Blosc's own threads pack the blocks of a chunk in the order in which they finish: the same numbers would then give
# another file each time. They gain nothing here.
blosc.use_threads = False


def fill_value(dtype: DTypeLike) -> Any:
    """What a cell holds that was planned and not yet written: NaN, -1 or 0 by kind."""
    return {"f": np.nan, "i": -1, "u": 0}[np.dtype(dtype).kind]


def array_document(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    chunks: tuple[int, ...],
    dims: tuple[str, ...],
    attributes: Document,
) -> Document:
    """The `zarr.json` of an array; `dimension_names` let xarray open it."""
    kind = np.dtype(dtype)
    fill = fill_value(kind)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if kind.kind == "f" else fill,
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}} if kind.itemsize > 1 else {"name": "bytes"},
            {"name": "blosc", "configuration": {
                "typesize": kind.itemsize, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0,
            }},
            {"name": "crc32c"},
        ],
        "dimension_names": list(dims),
        "attributes": attributes,
        "storage_transformers": [],
    }  # fmt: skip


def group_document(attributes: Document, nodes: dict[str, Document] | None = None) -> Document:
    """The `zarr.json` of a group, with the documents of all nodes below it consolidated into it.

    Keys come out sorted when the document is written: zarr-python 3.1.6 drops arrays in silence when the children
    of a group do not stand together.
    """
    document: Document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    if nodes is not None:
        document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
    return document


def to_json(document: Document) -> bytes:
    """Canonical JSON: sorted keys, no white space, never NaN. Equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def as_stored(document: Document) -> Document:
    """The document as it will be read back; JSON turns keys that are numbers into text, which sorts otherwise."""
    return json.loads(to_json(document))


@cache
def _blosc(itemsize: int) -> Blosc:
    return Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, blocksize=0, typesize=itemsize)


def encode(chunk: NDArray[Any]) -> bytes:
    """One whole chunk as the bytes of its file."""
    little = np.ascontiguousarray(chunk, dtype=chunk.dtype.newbyteorder("<"))
    packed = bytes(_blosc(little.itemsize).encode(little.view(np.uint8).reshape(-1)))
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def decode(data: bytes, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """The chunk that `encode` made.

    Raises:
        DamagedStore: if the checksum or the size does not fit.
    """
    packed, checksum = data[:-4], data[-4:]
    if len(data) < 20 or google_crc32c.value(packed).to_bytes(4, "little") != checksum:
        raise DamagedStore("checksum does not match")
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # A Blosc header states the unpacked size in bytes 4 to 8 and the packed one in bytes 12 to 16; believing them
    # before looking would let a forged file make us allocate gigabytes or read past its end.
    sizes = int.from_bytes(packed[4:8], "little"), int.from_bytes(packed[12:16], "little")
    if sizes != (expected, len(packed)) or expected > MOST_EXPANSION * len(packed):
        raise DamagedStore(f"chunk unpacks to another size than the {expected} bytes of its shape")
    try:
        unpacked = _blosc(np.dtype(dtype).itemsize).decode(packed)
    except RuntimeError as error:
        raise DamagedStore(f"chunk does not unpack: {error}") from error
    return np.frombuffer(unpacked, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)


def chunk_key(index: tuple[int, ...]) -> str:
    """File name of a chunk inside its array's directory."""
    return ".".join(["c", *map(str, index)])


def grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of all chunks that an array of `shape` has."""
    return window([(0, size) for size in shape], chunks)


def window(bounds: Sequence[tuple[int, int]], chunks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks between bounds: of each axis the first index, and the one after the last."""
    if any(low == high for low, high in bounds):
        return iter(())
    axes = zip(bounds, chunks, strict=True)
    return product(*(range(low // size, -(-high // size)) for (low, high), size in axes))


def padded(block: NDArray[Any], chunks: tuple[int, ...]) -> NDArray[Any]:
    """`block` filled up to a whole chunk: an edge chunk is stored whole, like any other."""
    if block.shape == chunks:
        return block
    whole = np.full(chunks, fill_value(block.dtype), dtype=block.dtype)
    whole[tuple(slice(size) for size in block.shape)] = block
    return whole


def split(array: NDArray[Any], chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    """The whole chunks of an array, with their indices."""
    for index in grid(array.shape, chunks):
        region = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))
        yield index, padded(array[region], chunks)
