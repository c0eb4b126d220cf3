"""Both doors give the same answers: those of a dictionary."""

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from bucket import URL, Bucket
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import objects
from pipeline.disk import Directory, Objects, door, location
from pipeline.errors import InputError, MissingError

NAMES = ("a", "b", ".h", "ab")
KEYS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
STEPS = st.lists(st.tuples(st.sampled_from(["put", "put", "delete"]), KEYS, st.binary(max_size=3)), max_size=12)


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, monkeypatch):
    """A door to an empty place of each kind."""
    bucket = Bucket()
    monkeypatch.setattr(objects, "client", lambda name: bucket)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return door(tmp_path if request.param == "folder" else URL)


def below(key, prefix):
    return key == prefix or key.startswith(f"{prefix}/")


@settings(max_examples=50)
@given(STEPS)
def test_what_is_there_is_what_a_dictionary_says(steps):
    bucket = Bucket()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(objects, "client", lambda name: bucket),
        patch.object(os, "fsync"),
    ):
        for place in (Directory(folder), Objects(location(URL))):
            there = {}
            for verb, key, data in steps:
                if verb == "delete":
                    place.delete(key)
                    there = {name: value for name, value in there.items() if not below(name, key)}
                elif not any(name != key and (below(name, key) or below(key, name)) for name in there):
                    place.put(key, data)  # not a file where a folder is, nor below one: only buckets allow that
                    there[key] = data
            assert {key: place.get(key) for key in place.list(hidden=True)} == there
            seen = {key: len(data) for key, data in there.items() if not any(p.startswith(".") for p in key.split("/"))}
            assert {entry.key: entry.size for entry in place.entries()} == seen
            assert {key: place.size(key) for key in seen} == seen
            assert all(place.exists(key) and place.exists(key.partition("/")[0]) for key in there)
            assert not place.exists("b/never")
            assert set(place.list("ab")) == {key for key in seen if key.startswith("ab/")}


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a/", "a\0b"])
@pytest.mark.parametrize("operation", ["put", "get", "exists", "size", "delete", "lease", "leased"])
def test_a_key_that_could_leave_the_place_is_refused(place, operation, key):
    further = {"put": [b"x"], "lease": [b"x"]}.get(operation, [])
    with pytest.raises(InputError, match="must be a relative path"):
        getattr(place, operation)(key, *further)
    assert list(place.list(hidden=True)) == []


def test_get_says_what_it_cannot_read(place):
    place.put("a", b"12345")
    with pytest.raises(MissingError, match="b does not exist"):
        place.get("b")
    with pytest.raises(InputError, match="has 5 bytes, more than the 4 allowed"):
        place.get("a", limit=4)
    assert place.get("a", limit=5) == b"12345"


def test_entries_are_dated(place):
    place.put("first", b"1")
    os.utime(place.path / "first", (1, 1)) if isinstance(place.path, Path) else None
    place.put("second", b"2")
    dates = {entry.key: entry.modified for entry in place.entries()}
    assert dates["first"] < dates["second"]


def test_folders_are_those_that_are_whole(place):
    for key in ("b/mark", "a/other", ".h/mark", "file"):
        place.put(key, b"")
    whole = ["a", "b"] if isinstance(place, Directory) else ["b"]
    assert list(place.folders(("mark",))) == whole
    assert list(place.folders(("none", "other", "mark"))) == ["a", "b"]
    place.put("c/below/file", b"")
    assert "c" in place.folders(("below",))


def test_a_place_is_there_once_something_is(place):
    below = door(place.path / "x")
    assert not below.is_there()
    below.put("a", b"")
    assert below.is_there()


def test_a_folder_is_claimed_by_one_at_a_time_and_built_once(place):
    def build(folder):
        folder.put("data", b"1")
        folder.put("mark", b"")

    options = {"marks": ("mark",), "lease": "LEASE", "note": b"me"}
    place.make()
    folder, lease, new = place.claim("run", build, **options)
    assert new
    assert folder.path == place.path / "run"
    assert sorted(folder.list()) == ["LEASE", "data", "mark"]
    folder.put("data", b"22")
    folder.sync()
    lease.release()
    again, lease, new = place.claim("run", build, **options)
    assert not new
    assert again.get("data") == b"22"
    lease.release()


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "http://host/x", "s3://bucket/../x", "s3://bucket//x"])
def test_a_url_that_is_none_of_ours_is_refused(url):
    with pytest.raises(InputError, match="must be a folder, or BUCKET/FOLDER after one of s3://"):
        location(url)


def test_a_url_has_the_parts_of_a_path():
    url = location("s3://bucket/a/b.c.zarr/")
    assert (str(url), url.name, url.stem, os.fspath(url.parent)) == (
        "s3://bucket/a/b.c.zarr", "b.c.zarr", "b.c", "s3://bucket/a",
    )  # fmt: skip
    assert (url.bucket, url.prefix, str(url / Path("x", "y"))) == (
        "s3://bucket", "a/b.c.zarr", "s3://bucket/a/b.c.zarr/x/y",
    )  # fmt: skip
    assert location("plain/folder") == Path("plain/folder")
