"""SIGKILL while the catalogue is brought up to date, or built: the old file is whole, and no table ever differs."""

import random
import shutil
import time
from unittest.mock import patch

import duckdb
import pytest
from mock_store import mock_run
from sizes import sizes
from warm import Warm

from analysis import catalog, results
from analysis.tables import TABLES


def sync(root):
    """What is killed."""
    catalog.sync(root)


def tables(root):
    """Every row of every table of the catalogue as it is; when it was built is a fact of the file, not of the store."""
    with duckdb.connect(root / catalog.NAME, read_only=True) as connection:
        names = {name: [column.name for column in TABLES[name].columns if column.name != "built_at"] for name in TABLES}
        return {
            name: connection.execute(f"select {', '.join(columns)} from {name} order by all").fetchall()
            for name, columns in names.items()
        }


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A store with its catalogue, and the same store later, that has another run and more rows of a first one."""
    before, after = tmp_path_factory.mktemp("before") / "store", tmp_path_factory.mktemp("after") / "store"
    with patch("os.fsync", lambda handle: None):
        for seed in range(3):
            mock_run(before, 0.1, seed, steps=20, n=6, k=2, end=None if seed == 0 else "complete")
        results.analyze(before)
        shutil.copytree(before, after)
        catalog.sync(before)
        mock_run(after, 0.1, 0, steps=40, n=6, k=2)
        mock_run(after, 0.2, 0, steps=20, n=6, k=2)
        results.analyze(after)
    return before, after


@sizes("kills", full=30, soak=500)
@pytest.mark.parametrize("there", ["an older catalogue", "none"])
def test_a_kill_leaves_the_old_catalogue_whole(states, tmp_path, measured, there, kills):
    before, after = states
    old = (before / catalog.NAME).read_bytes()
    root, dice, killed, published = tmp_path / "store", random.Random(kills), 0, 0
    shutil.copytree(after, root)
    with patch("os.fsync", lambda handle: None):
        catalog.sync(root)
    wanted = tables(root) | {"meta": None}
    with Warm(__file__, "sync", before) as warm:
        started = time.monotonic()
        restore(root, there, before)
        with warm.call(root) as child:
            assert child.wait() == 0
        takes = time.monotonic() - started
        while killed < kills:
            restore(root, there, before)
            with warm.call(root) as child:
                time.sleep(dice.uniform(0, takes))
                if not child.kill():
                    continue
            killed += 1
            file = root / catalog.NAME
            if not file.exists():
                assert there == "none"
            elif file.read_bytes() != old or there == "none":
                assert tables(root) | {"meta": None} == wanted  # it was published just before
                published += 1
        with warm.call(root) as child:
            assert child.wait() == 0
    assert tables(root) | {"meta": None} == wanted
    assert not (root / catalog.COPY).exists()
    measured("R20", f"SIGKILL while it is written; there was {there}", kills=killed, old_file_whole=killed - published,
             new_file_whole=published, differing_tables=0)  # fmt: skip


def restore(root, there, before):
    """The catalogue as it was before the store went on, or none."""
    if there == "none":
        (root / catalog.NAME).unlink(missing_ok=True)
    else:
        shutil.copyfile(before / catalog.NAME, root / catalog.NAME)


@pytest.mark.reliability
def test_deleted_and_built_again_it_has_the_same_tables(states, tmp_path, measured):
    root = shutil.copytree(states[0], tmp_path / "store")
    shutil.copytree(states[1], root, dirs_exist_ok=True)
    catalog.sync(root)  # in two steps: this file had been there before the store went on
    built = tables(root)
    assert all(built[name] for name in built.keys() - {"claims"})
    (root / catalog.NAME).unlink()
    catalog.sync(root)
    again = tables(root)
    assert again == built
    measured(
        "R20", "deleted and built again", tables=len(again), rows=sum(map(len, again.values())), differing_tables=0
    )
