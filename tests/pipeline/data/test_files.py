"""The user's own arrays: how they are taken, and what a file may not be."""

import io
import pickle
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import load_data, read_arrays
from pipeline.errors import InputError, MissingError


def arrays(path, n=None, normalise="none"):
    return SimpleNamespace(name="file", file=str(path), n=n, normalise=normalise)


@pytest.fixture
def npz(tmp_path):
    """A function that writes arrays to a file and returns its path."""

    def write(**named):
        path = tmp_path / "xy.npz"
        np.savez(path, **named)
        return path

    return write


def test_a_file_is_taken_as_it_is(npz):
    x, y = np.arange(24.0).reshape(4, 2, 3), np.array([1, 2, 3, 4])
    data = load_data(arrays(npz(x=x, y=y)), 0)
    np.testing.assert_array_equal(data.x, x)
    np.testing.assert_array_equal(data.y, [[1.0], [2.0], [3.0], [4.0]])
    np.testing.assert_array_equal(data.sample_index, [0, 1, 2, 3])
    assert (data.x.dtype, data.y.dtype, data.labels) == (np.float64, np.float64, False)


def test_a_file_can_be_drawn_from_and_normalised(npz):
    x, y = np.random.default_rng(0).normal(3, [1, 100], (50, 2)), np.arange(50.0)
    data = load_data(arrays(npz(x=x, y=y), n=20, normalise="global"), 5)
    np.testing.assert_array_equal(data.y[:, 0], data.sample_index)
    assert len(set(data.sample_index)) == 20
    centred = x[data.sample_index] - x[data.sample_index].mean(axis=0)
    np.testing.assert_allclose(data.x, centred / np.sqrt(np.mean(centred**2)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingError, match=r"data\.file = .*none\.npz: there is no such file"):
        load_data(arrays(tmp_path / "none.npz"), 0)


X, Y = np.zeros((3, 2)), np.zeros(3)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"x": X}, r"no array y, only \['x'\]"),
        ({"a": X}, "no array x and y"),
        ({"x": X, "y": np.zeros(4)}, r"x \(3, 2\) and y \(4,\)"),
        ({"x": np.zeros(3), "y": Y}, r"x \(3,\) and y \(3,\): must be \(n, features"),
        ({"x": X, "y": np.zeros((3, 1, 1))}, r"y \(3, 1, 1\)"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "not empty"),
        ({"x": np.zeros((3, 0)), "y": Y}, "not empty"),
        ({"x": X, "y": np.array(["a", "b", "c"])}, "y has dtype <U1; it must hold real numbers"),
        ({"x": X + 1j, "y": Y}, "x has dtype complex128"),
        ({"x": np.array([[0, np.nan], [np.inf, 0], [0, 0]]), "y": Y}, "x has 2 values that are not finite"),
        ({"x": X, "y": np.array([{}, 1, 2], dtype=object)}, r"not an \.npz file of plain arrays"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_a_file_that_cannot_be_used(npz, named, message):
    with pytest.raises(InputError, match=message):
        load_data(arrays(npz(**named)), 0)


def test_more_examples_than_a_file_has(npz):
    with pytest.raises(InputError, match=r"data\.n = 4: the dataset has 3 examples"):
        load_data(arrays(npz(x=X, y=Y), n=4), 0)


def test_a_single_array_is_no_archive(tmp_path):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(InputError, match=r"a single array; save both with numpy\.savez"):
        load_data(arrays(tmp_path / "x.npy"), 0)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def array_of(thing):
    buffer = io.BytesIO()
    np.save(buffer, np.array([thing], dtype=object), allow_pickle=True)
    return buffer.getvalue()


HOSTILE = {
    "nothing": lambda bomb: b"",
    "text": lambda bomb: b"x,y\n1,2\n",
    "a pickle": pickle.dumps,
    "no zip": lambda bomb: b"PK\x03\x04broken",
    "a zip of pickles": lambda bomb: zipped(x=pickle.dumps(bomb), y=pickle.dumps(bomb)),
    "arrays of objects": lambda bomb: zipped(x=array_of(bomb), y=array_of(bomb)),
    "a broken header": lambda bomb: zipped(x=b"\x93NUMPY\x01\x00" + bytes(20), y=b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_of_other_content_is_refused_and_never_unpickled(tmp_path, name):
    path = tmp_path / "xy.npz"
    path.write_bytes(HOSTILE[name](Bomb(tmp_path / "exploded")))
    with pytest.raises(InputError, match=r"data\.file = .*xy\.npz"):
        load_data(arrays(path), 0)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="plain arrays"):
        load_data(arrays(tmp_path), 0)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(data, tmp_path_factory):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(40.0).reshape(20, 2), y=np.arange(20.0))
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        loaded = load_data(arrays(path), 0)
    except InputError:
        return
    assert loaded.x.shape == (20, 2)


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", ["none", "global"])
def test_the_rest_of_a_file(npz, normalise):
    x, y = np.random.default_rng(0).normal(3, [1, 100], (50, 2)), np.arange(50.0)
    path = npz(x=x, y=y)
    chosen, rest = (load_data(arrays(path, n=20, normalise=normalise), 5, rest=rest) for rest in (False, True))
    assert sorted([*chosen.y[:, 0], *rest.y[:, 0]]) == list(range(50))
    np.testing.assert_array_equal(rest.y[:, 0], rest.sample_index)
    known = x[chosen.sample_index]
    scale = {"none": 1, "global": (known - known.mean(axis=0)).std()}[normalise]
    shift = {"none": 0, "global": known.mean(axis=0)}[normalise]
    np.testing.assert_allclose(rest.x, (x[rest.sample_index] - shift) / scale)


def test_if_all_were_chosen_there_is_no_rest(npz):
    path = npz(x=np.ones((4, 2)), y=np.ones(4))
    with pytest.raises(InputError, match="all 4 examples were chosen, so none is left: give others in a file"):
        load_data(arrays(path), 0, rest=True)


def test_examples_may_come_without_targets(npz):
    found = read_arrays(npz(x=np.ones((4, 2))), "--probe", ("x",))
    assert found.keys() == {"x"}
    with pytest.raises(InputError, match=r"--probe = .*: no array y, only \['x'\]"):
        read_arrays(npz(x=np.ones((4, 2))), "--probe", ("x", "y"))
