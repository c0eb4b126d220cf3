"""Documents and chunks, held against what zarr-python itself writes for the same array."""

import json
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from pipeline import zarr3
from pipeline.errors import DamagedStore

DTYPES = ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint16"]


@st.composite
def arrays(draw, dtypes=DTYPES, min_side=0):
    """An array and a chunk shape that need not divide it."""
    shape = draw(hnp.array_shapes(max_dims=3, min_side=min_side, max_side=9))
    chunks = tuple(draw(st.integers(1, 6)) for _ in shape)
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    values = st.nothing() if 0 in shape else None  # any bit pattern of the dtype, NaN included
    return draw(hnp.arrays(dtype, shape, elements=values)), chunks


def names(array: np.ndarray) -> tuple[str, ...]:
    return tuple("abc"[: array.ndim])


def write_ours(path, array, chunks, attributes=None):
    document = zarr3.array_document(array.shape, array.dtype, chunks, names(array), attributes or {})
    path.mkdir(parents=True)
    (path / "zarr.json").write_bytes(zarr3.to_json(document))
    for index, block in zarr3.split(array, chunks):
        (path / zarr3.chunk_key(index)).write_bytes(zarr3.encode(block))


def write_theirs(path, array, chunks, attributes=None):
    written = zarr.create_array(
        store=LocalStore(path),
        shape=array.shape,
        chunks=chunks,
        dtype=array.dtype,
        serializer=BytesCodec() if array.itemsize == 1 else BytesCodec(endian="little"),
        compressors=[
            BloscCodec(typesize=array.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle", blocksize=0),
            Crc32cCodec(),
        ],
        fill_value=zarr3.fill_value(array.dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=names(array),
        attributes=attributes or {},
        config={"write_empty_chunks": True},
    )
    written[...] = array


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@given(arrays())
@settings(max_examples=100, deadline=None)
def test_documents_and_chunks_are_those_of_zarr_python(tmp_path_factory, case):
    array, chunks = case
    folder = tmp_path_factory.mktemp("zarr")
    attributes = {"units": "1", "long_name": "λ", "names": ["a", "b"]}
    write_ours(folder / "ours", array, chunks, attributes)
    write_theirs(folder / "theirs", array, chunks, attributes)
    ours, theirs = ({p.name: p.read_bytes() for p in (folder / who).iterdir()} for who in ("ours", "theirs"))
    assert json.loads(ours.pop("zarr.json")) == json.loads(theirs.pop("zarr.json"))
    assert ours == theirs


@given(arrays())
@settings(max_examples=100, deadline=None)
def test_zarr_python_reads_back_every_bit(tmp_path_factory, case):
    array, chunks = case
    path = tmp_path_factory.mktemp("zarr") / "ours"
    write_ours(path, array, chunks)
    opened = zarr.open_array(path, mode="r")
    assert opened.chunks == chunks
    assert opened.metadata.dimension_names == names(array)
    assert same_bits(opened[...], array)


@given(arrays())
@settings(max_examples=200, deadline=None)
def test_decode_undoes_encode(case):
    array, chunks = case
    whole = np.full(array.shape, zarr3.fill_value(array.dtype), array.dtype)
    count = 0
    for index, block in zarr3.split(array, chunks):
        read = zarr3.decode(zarr3.encode(block), array.dtype, chunks)
        assert same_bits(read, block)
        region = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))
        inner = tuple(slice(n) for n in whole[region].shape)
        whole[region] = read[inner]
        count += 1
        outside = np.ones(chunks, bool)
        outside[inner] = False
        assert same_bits(read[outside], np.full(outside.sum(), zarr3.fill_value(array.dtype), array.dtype))
    assert same_bits(whole, array)
    assert count == len(list(zarr3.grid(array.shape, chunks))) == np.prod(-(-np.array(array.shape) // chunks))


@pytest.mark.parametrize("layout", ["big-endian", "Fortran order", "strided", "reversed"])
def test_what_lies_in_memory_otherwise_is_stored_the_same(layout):
    plain = np.arange(24, dtype="float32").reshape(4, 6)
    other = {
        "big-endian": plain.astype(">f4"),
        "Fortran order": np.asfortranarray(plain),
        "strided": np.repeat(plain, 2, axis=1)[:, ::2],
        "reversed": plain[::-1].copy()[::-1],
    }[layout]
    assert zarr3.encode(other) == zarr3.encode(plain)


ENCODE_OFTEN = """
import numpy as np
from pipeline import zarr3
chunk = np.random.default_rng(0).normal(size=(1, 2048, 2048)).astype("float32")
print(len({zarr3.encode(chunk) for _ in range(10)}))
"""


def test_a_large_chunk_has_the_same_bytes_each_time():
    """In a process of its own: importing zarr switches Blosc's threads off too."""
    command = [sys.executable, "-c", ENCODE_OFTEN]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


# --- damage ----------------------------------------------------------------------------------------------------------

CHUNK = np.arange(12, dtype="float32").reshape(3, 4)


def test_every_flipped_bit_and_every_truncation_is_refused():
    data = zarr3.encode(CHUNK)
    damaged = [data[:length] for length in range(len(data))]
    damaged += [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8)]
    damaged += [data + b"\0", data + data]
    for other in damaged:
        with pytest.raises(DamagedStore, match="checksum does not match"):
            zarr3.decode(other, CHUNK.dtype, CHUNK.shape)
    assert len(damaged) == 9 * len(data) + 2


def sealed(packed: bytes) -> bytes:
    """A chunk with the right checksum over wrong contents."""
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def test_a_chunk_of_another_size_is_refused_before_anything_is_allocated():
    packed = zarr3.encode(CHUNK)[:-4]
    forged = packed[:4] + (2**31 - 1).to_bytes(4, "little") + packed[8:]
    for other in (forged, packed + b"\0", packed[:-1]):
        with pytest.raises(DamagedStore, match="another size than the 48 bytes"):
            zarr3.decode(sealed(other), CHUNK.dtype, CHUNK.shape)
    with pytest.raises(DamagedStore, match="another size than the 96 bytes"):
        zarr3.decode(zarr3.encode(CHUNK), "float64", CHUNK.shape)


def test_forged_contents_give_an_error_or_other_numbers_but_no_crash():
    packed = zarr3.encode(np.zeros((64, 64), "float64"))[:-4]
    outcomes = set()
    for position in [*range(4), *range(8, 12), *range(16, len(packed))]:
        for value in (0, 1, 0x7F, 0xFF):
            forged = packed[:position] + bytes([value]) + packed[position + 1 :]
            try:
                outcomes.add(zarr3.decode(sealed(forged), "float64", (64, 64)).shape)
            except DamagedStore as error:
                outcomes.add(str(error).partition(":")[0])
    assert "chunk does not unpack" in outcomes


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "fill"), [("float32", "nan"), ("int64", "-1"), ("uint8", "0")])
def test_planned_cells_are_not_mistaken_for_numbers(dtype, fill):
    assert str(zarr3.fill_value(dtype)) == fill


def test_json_is_canonical_and_never_nan():
    assert zarr3.to_json({"b": [1, 2.5, None], "a": {"d": "λ", "c": True}}) == (
        b'{"a":{"c":true,"d":"\\u03bb"},"b":[1,2.5,null]}'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        zarr3.to_json({"a": float("nan")})


@given(st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_consolidated_metadata_say_how_long_an_array_is(tmp_path_factory, committed):
    """What the store rests on: the document of an array has the planned length, the group's the committed one."""
    folder = tmp_path_factory.mktemp("zarr")
    values = np.arange(5.0)
    write_ours(folder / "g" / "x", values, (2,))
    node = zarr3.array_document((committed,), values.dtype, (2,), ("a",), {})
    nodes = {"g": zarr3.group_document({}), "g/x": node}
    (folder / "zarr.json").write_bytes(zarr3.to_json(zarr3.group_document({"title": "t"}, nodes)))
    (folder / "g" / "zarr.json").write_bytes(zarr3.to_json(zarr3.group_document({}, {"x": node})))
    root = zarr.open_group(folder, mode="r")
    assert root.attrs["title"] == "t"
    np.testing.assert_array_equal(root["g/x"][:], values[:committed])
    np.testing.assert_array_equal(xr.open_zarr(folder, group="g").x, values[:committed])
    np.testing.assert_array_equal(xr.open_zarr(folder / "g").x, values[:committed])
    assert xr.open_zarr(folder, group="g", consolidated=False).sizes == {"a": 5}


def test_consolidated_metadata_are_those_of_zarr_python(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    group = zarr.create_group(LocalStore(tmp_path / "theirs"), attributes={"title": "t"})
    group.create_group("g")
    write_theirs(tmp_path / "theirs" / "g" / "x", values, (1, 3))
    write_theirs(tmp_path / "theirs" / "g" / "y", values, (2, 2))
    with pytest.warns(UserWarning, match="not part in the Zarr format 3 specification"):
        zarr.consolidate_metadata(LocalStore(tmp_path / "theirs"))
    theirs = json.loads((tmp_path / "theirs" / "zarr.json").read_text())
    # zarr-python gives the groups below the root an empty consolidation of their own, which says nothing.
    empty = theirs["consolidated_metadata"]["metadata"]["g"].pop("consolidated_metadata", None)
    assert empty in (None, {"kind": "inline", "must_understand": False, "metadata": {}})
    nodes = {
        "g": zarr3.group_document({}),
        "g/x": zarr3.array_document((2, 3), "float64", (1, 3), ("a", "b"), {}),
        "g/y": zarr3.array_document((2, 3), "float64", (2, 2), ("a", "b"), {}),
    }
    assert zarr3.group_document({"title": "t"}, nodes) == theirs
