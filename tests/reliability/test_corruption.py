"""Bytes go wrong in every way we know, anywhere in a store: a deep look finds each, and nothing in a clean one."""

import json
import shutil
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from sizes import sizes
from writer_loop import RUN, advance, open_writer, write_run

from pipeline.disk import Directory
from pipeline.errors import NtkEosError
from pipeline.store import read_run, run_path
from pipeline.verify import verify_root


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A finished run, what its files were three commits before, and a run of other numbers."""
    root = tmp_path_factory.mktemp("corruption")
    with open_writer(root / "store") as writer:
        advance(writer, 6, 3)
        shutil.copytree(root / "store", root / "older")
        advance(writer, 16, 4)
        writer.finish("complete", "steps")
    write_run(root / "other", 16, identity={"model": "another"})
    return root


def flip(data, dice, files):
    data[dice.integers(len(data))] ^= 1 << int(dice.integers(8))


def truncate(data, dice, files):
    del data[dice.integers(len(data)) :]


def zero_the_tail(data, dice, files):
    start = int(dice.integers(len(data)))
    data[start:] = bytes(len(data) - start)


def swap(data, dice, files):
    data[:] = files[int(dice.integers(len(files)))]


KINDS = {"flip": flip, "truncation": truncate, "zeroed tail": zero_the_tail, "swap": swap, "deletion": None,
         "substitution": None, "stale": None}  # fmt: skip


def corrupt(stores, key, how, dice):
    """Other bytes for one file, or None to delete it."""
    path = run_path(stores / "store", RUN)
    data = bytearray((path / key).read_bytes())
    if how == "deletion":
        return None
    if how in ("substitution", "stale"):
        other = run_path(stores / ("other" if how == "substitution" else "older"), RUN) / key
        return other.read_bytes() if other.exists() else bytes(data)
    beside = [file.read_bytes() for file in sorted((path / key).parent.iterdir()) if file.is_file()]
    KINDS[how](data, dice, beside)
    return bytes(data)


def readable(path, key):
    """Whether plain reads take the file."""
    try:
        run = read_run(path)
        if key.rpartition("/")[2].startswith("c."):
            run.read(key.rpartition("/")[0])
    except NtkEosError:
        return False
    return True


@sizes("each", short=25, full=200, soak=1000)
def test_every_damage_is_found_and_none_where_there_is_none(stores, each, measured):
    root, path = stores / "store", run_path(stores / "store", RUN)
    dice = np.random.default_rng(each)
    # Not the heartbeat and the lease, which decide nothing; nor times, which no digest covers.
    volatile = ("run.json", "LEASE", "train/wall_time/c.0", "checkpoint-0.safetensors", "checkpoint-1.safetensors")
    keys = [key for key in Directory(path).list() if key not in volatile and "/seconds_" not in key]
    keys.append(read_run(path).attrs["checkpoint"]["name"])
    done, missed, read = Counter(), [], []
    assert verify_root(root, deep=True) == []
    for how in KINDS:
        while done[how] < each:
            key = keys[int(dice.integers(len(keys)))]
            before, after = (path / key).read_bytes(), corrupt(stores, key, how, dice)
            if after == before or same_document(before, after):
                continue
            done[how] += 1
            (path / key).unlink() if after is None else (path / key).write_bytes(after)
            if not [problem for problem in verify_root(root, deep=True) if problem.damage]:
                missed.append((how, key))
            if how in ("flip", "truncation") and is_plain(key) and readable(path, key):
                read.append((how, key))
            (path / key).write_bytes(before)
    assert verify_root(root, deep=True) == []
    assert missed == []
    assert read == []
    measured("R10", "damage of 7 kinds to chunks, records and metadata", damaged=sum(done.values()), kinds=len(KINDS),
             missed_by_verify_deep=0, flips_and_truncations_read=0)  # fmt: skip


def is_plain(key):
    """Files that every read takes: the record and the chunks. Copies of metadata and checkpoints are read by others."""
    return key == "zarr.json" or key.rpartition("/")[2].startswith("c.")


def same_document(before, after):
    """Whether two texts say the same, such as 1e-05 and 1E-05."""
    try:
        return json.loads(before) == json.loads(after)
    except (TypeError, ValueError):
        return False


@sizes("count", short=3, full=100)
def test_no_clean_store_is_called_damaged(tmp_path, count, measured):
    dice = np.random.default_rng(count)
    for number in range(count):
        steps, every, status = int(dice.integers(1, 20)), int(dice.integers(1, 6)), [None, "complete"][number % 2]
        write_run(tmp_path / str(number), steps, every=every, status=status)
        assert verify_root(tmp_path / str(number), deep=True) == []
    measured("R10", "clean stores", stores=count, alarms=0)
