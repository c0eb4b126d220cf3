"""A store does what a dictionary of rows says, whatever is done to it in whatever order.

Hypothesis makes up the life of a store: runs are created, written, killed at any file of a commit, taken up again,
finished, extended, verified, repaired, copied and damaged. Beside it stands the model, a list of rows per run; every
reader must see these rows and no others. Values differ at every attempt, so that what a killed writer left behind is
never what was committed later.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import xarray as xr
from bucket import Bucket
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from independent_reader import Run as IndependentRun
from sizes import sizes
from zarr.storage import ObjectStore, StorePath

from pipeline import objects, zarr3
from pipeline.disk import Directory, door, location
from pipeline.errors import InputError, RunLocked, UnreachableStore
from pipeline.repair import repair_root
from pipeline.store import HEARTBEAT, LEASE, RECORD, NonFiniteRow, Writer, list_runs, read_run, run_path
from pipeline.verify import verify_root

RUNS = ("one", "two")
N = 3
GROUPS = {"spectra": ["prediction"], "train": ["loss"]}  # rows with chunks of their own, and rows that share them
PROBE = {
    "sample_index": np.arange(N),
    "input": np.ones((N, 2), np.float32),
    "target": np.ones((N, 1), np.float32),
}  # fmt: skip
KILLS = st.none() | st.integers(0, 30)  # after so many files
DAMAGE = ("flip", "cut", "delete")


class Killed(BaseException):
    """What stands for a SIGKILL: nothing cleans up after it."""


def rows_at(step: int, salt: int, groups: set[str]) -> dict[str, dict[str, Any]]:
    """The rows of a step at one attempt."""
    rng = np.random.default_rng([step, salt])
    own = {"prediction": rng.normal(size=(N, 1))}
    row = {"step": step, "learning_rate": 0.1, "seed": 0, "loss": rng.normal()}
    return {group: row | {name: own[name] for name in GROUPS[group] if name in own} for group in sorted(groups)}


@dataclass
class Model:
    """What a run must hold."""

    rows: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    waiting: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    status: str = "running"
    commits: int = 0
    checkpoint: bytes | None = None

    def last_step(self) -> int | None:
        """Step of the newest row, waiting or not."""
        return max((row["step"] for rows in (*self.rows, *self.waiting) for row in rows.values()), default=None)

    def of(self, group: str) -> list[dict[str, Any]]:
        """Committed rows of a group."""
        return [rows[group] for rows in self.rows if group in rows]


class Store(RuleBasedStateMachine):
    """The life of a store in a folder."""

    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.base, self.copies = Path(tempfile.mkdtemp(prefix="ntk-eos-model-")), count(1)
        self.root: Any = self.first_root()
        self.models: dict[str, Model] = {}
        self.writers: dict[str, Writer] = {}

    # --- what differs between a folder and a bucket -------------------------------------------------------------------

    def first_root(self) -> Any:
        return self.base / "0"

    @contextmanager
    def dying_after(self, puts: int) -> Iterator[None]:
        """The process is killed at this many files, the last of them half written."""
        put, numbers = Directory.put, count()

        def dying(self, key, data, **options):
            if next(numbers) >= puts:
                folder = (self.path / key).parent
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".tmp-dead").write_bytes(data[: len(data) // 2])
                raise Killed
            put(self, key, data, **options)

        with patch.object(Directory, "put", dying):
            yield

    def bury(self, run: str) -> None:
        """What the system does when a writer has been killed: its lock is free."""
        if run in self.writers:
            self.writers.pop(run).close()

    def repair_anything(self) -> None:
        repair_root(self.root, apply=True)

    def copied(self) -> Any:
        copy = self.base / str(next(self.copies))
        shutil.copytree(self.root, copy)
        return copy

    def plainly(self, path: Any) -> Any:
        return path

    # --- what the store does, and what the model says -----------------------------------------------------------------

    def path(self, run: str) -> Any:
        return run_path(self.root, run)

    def open(self, run: str) -> Writer:
        return Writer.open(
            self.root,
            run,
            identity={"model": run},
            attrs={"title": run, "learning_rate": 0.1, "seed": 0},
            dims={"sample": N, "output": 1},
            groups=GROUPS,
            capacity=dict.fromkeys(GROUPS, 2),
            probe=PROBE,
            dtype="float32",
        )

    def gets_through(self, run: str, puts: int | None, action: Callable[[], Any]) -> bool:
        """Do something that is killed after so many files; whether it came to its end before."""
        self.happened[action.__name__] += 1
        if puts is None:
            action()
            return True
        try:
            with self.dying_after(puts):
                action()
        except (Killed, UnreachableStore):
            self.bury(run)
            self.happened["kills"] += 1
            return False
        return True

    @initialize()
    def begin(self):
        self.open_or_create(RUNS[0], None)

    @rule(run=st.sampled_from(RUNS), puts=KILLS)
    def open_or_create(self, run, puts):
        if run in self.writers:
            with pytest.raises(RunLocked, match="is being written by"):
                self.open(run)
            return

        def opening():
            self.writers[run] = self.open(run)

        through = self.gets_through(run, puts, opening)
        if door(self.path(run)).size(RECORD) is not None:
            self.models.setdefault(run, Model())
        assert (run in self.models) or not through
        if through:
            writer, model = self.writers[run], self.models[run]
            assert (writer.status, writer.last_step, writer.checkpoint()) == (
                model.status, model.last_step(), model.checkpoint
            )  # fmt: skip

    def has_rows(self) -> bool:
        return any(model.rows for model in self.models.values())

    def growing(self) -> list[str]:
        return sorted(run for run in self.writers if self.models[run].status == "running")

    @precondition(lambda self: self.growing())
    @rule(
        data=st.data(), salt=st.integers(0, 10**6), bad=st.sampled_from([None, None, np.nan]), then_commit=st.booleans()
    )
    def append(self, data, salt, bad, then_commit):
        """Rows of some groups at some steps; a row that is not finite is refused and leaves no trace."""
        run = data.draw(st.sampled_from(self.growing()))
        writer, model = self.writers[run], self.models[run]
        some = st.sets(st.sampled_from(sorted(GROUPS)), min_size=1)
        for skip, groups in data.draw(st.lists(st.tuples(st.integers(1, 3), some), min_size=1, max_size=5)):
            last = model.last_step()
            rows = rows_at(0 if last is None else last + skip, salt, groups)
            if bad is not None:
                group = min(groups)
                with pytest.raises(NonFiniteRow, match="is not finite"):
                    writer.append(rows[group]["step"], {**rows, group: {**rows[group], "loss": bad}})
            writer.append(rows[min(groups)]["step"], rows)
            model.waiting.append(rows)
        if then_commit:
            self.committed(run, data.draw(st.binary(min_size=1, max_size=20)), data.draw(KILLS))

    @precondition(lambda self: any(self.models[run].waiting for run in self.writers))
    @rule(data=st.data(), puts=KILLS)
    def commit(self, data, puts):
        run = data.draw(st.sampled_from(sorted(run for run in self.writers if self.models[run].waiting)))
        self.committed(run, b"at last", puts)

    def committed(self, run: str, checkpoint: bytes, puts: int | None) -> None:
        """A commit is there whole or not at all, and there if it returned."""
        model = self.models[run]

        def committing():
            self.writers[run].commit(checkpoint)

        through = self.gets_through(run, puts, committing)
        commits = read_run(self.path(run)).attrs["commits"]
        assert commits in ((model.commits + 1,) if through else (model.commits, model.commits + 1))
        if commits > model.commits:
            model.rows, model.checkpoint, model.commits = model.rows + model.waiting, checkpoint, commits
        model.waiting = []

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), status=st.sampled_from(["complete", "diverged"]), puts=KILLS)
    def finish(self, data, status, puts):
        run = data.draw(st.sampled_from(sorted(self.writers)))
        model = self.models[run]
        if model.waiting:
            with pytest.raises(ValueError, match="rows are waiting"):
                self.writers[run].finish(status, "because")
            return

        def finishing():
            self.writers[run].finish(status, "because")

        self.becomes(run, status, self.gets_through(run, puts, finishing))

    @precondition(lambda self: set(self.writers) - set(self.growing()))
    @rule(data=st.data(), puts=KILLS)
    def extend(self, data, puts):
        run = data.draw(st.sampled_from(sorted(set(self.writers) - set(self.growing()))))

        def extending():
            self.writers[run].reopen(dict.fromkeys(GROUPS, 3))

        self.becomes(run, "running", self.gets_through(run, puts, extending))

    def becomes(self, run: str, status: str, through: bool) -> None:
        found = read_run(self.path(run)).attrs["status"]
        assert found in ((status,) if through else (status, self.models[run].status))
        self.models[run].status = found

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), killed=st.booleans())
    def end(self, data, killed):
        run = data.draw(st.sampled_from(sorted(self.writers)))
        if killed:
            self.bury(run)
        else:
            self.writers.pop(run).close()
        self.models[run].waiting = []

    # --- what every reader must see -----------------------------------------------------------------------------------

    @invariant()
    def the_record_is_that_of_the_model(self):
        for run, model in self.models.items():
            found = read_run(self.path(run))
            assert found.lengths == {group: len(model.of(group)) for group in GROUPS}
            assert (found.attrs["status"], found.attrs["commits"]) == (model.status, model.commits)

    @precondition(lambda self: self.has_rows())
    @rule()
    def read_it_all(self):
        self.look(self.root)

    def look(self, root: Any) -> None:
        """Verify every run, and read it in two ways."""
        assert [run.run_id for run in list_runs(root)] == sorted(self.models)
        assert [problem for problem in verify_root(root, deep=True) if problem.damage] == []
        for run in self.models:
            path = run_path(root, run)
            ours = read_run(path)
            theirs = self.independent(path)
            for name, expected in self.expected(run).items():
                np.testing.assert_array_equal(ours.read(name), expected)
                np.testing.assert_array_equal(theirs.arrays[name], expected)
            self.happened["rows read"] += sum(ours.lengths.values())
            assert theirs.head().hex() == ours.head

    def expected(self, run: str) -> dict[str, Any]:
        """The values of every array, but for the digests."""
        found, arrays = read_run(self.path(run)), {}
        for group in GROUPS:
            for name, node in found.arrays(group).items():
                if name != "digest":
                    values = [np.asarray(row[name]).astype(node["data_type"]) for row in self.models[run].of(group)]
                    arrays[f"{group}/{name}"] = np.reshape(values, node["shape"])
        return arrays

    @precondition(lambda self: self.has_rows())
    @rule(run=st.sampled_from(RUNS))
    def read_it_with_xarray(self, run):
        if run in self.models:
            with xr.open_datatree(self.plainly(self.path(run)), engine="zarr") as tree:
                for name, expected in self.expected(run).items():
                    np.testing.assert_array_equal(tree[name].values, expected)

    def independent(self, path: Any) -> IndependentRun:
        return IndependentRun(path)

    # --- what else may happen to it -----------------------------------------------------------------------------------

    @precondition(lambda self: self.models)
    @rule()
    def repair(self):
        def files():
            return {file: file.stat().st_size for file in self.root.rglob("*") if file.is_file()}

        def listed(found):
            return sorted((str(debris.path), debris.size) for debris in found)

        before = files()
        shown = repair_root(self.root)
        assert files() == before, "a dry run changed something"
        assert listed(repair_root(self.root, apply=True)) == listed(shown)
        left = [debris for debris in repair_root(self.root) if debris.size is not None]
        assert left == []
        assert {debris.path.stem for debris in shown if debris.size is None} == set(self.writers)
        self.happened["repairs"] += 1
        self.happened["debris removed"] += sum(debris.size is not None for debris in shown)

    @precondition(lambda self: self.has_rows())
    @rule(move=st.booleans())
    def copy(self, move):
        copy = self.copied()
        self.look(copy)
        self.happened["copies"] += 1
        if move and not self.writers:
            self.root = copy

    def at_rest(self) -> list[str]:
        return sorted(set(self.models) - set(self.writers))

    @precondition(lambda self: self.has_rows() and self.at_rest())
    @rule(data=st.data(), how=st.sampled_from(DAMAGE), mend=st.booleans())
    def damage(self, data, how, mend):
        """One file goes wrong; it is named, nothing that repair does makes it worse, and a copy of it cures it."""
        run = data.draw(st.sampled_from(self.at_rest()))
        directory, record = door(self.path(run)), read_run(self.path(run))
        # A run of a bucket that has neither a record nor a heartbeat is one that is being made.
        keys = {RECORD: f"{run}/{RECORD}"} if directory.size(HEARTBEAT) or how != "delete" else {}
        if record.attrs["checkpoint"]:
            keys[record.attrs["checkpoint"]["name"]] = f"{run}/{record.attrs['checkpoint']['name']}"
        for group in ("probe", *GROUPS):
            for name, node in record.arrays(group).items():
                chunks = tuple(node["chunk_grid"]["configuration"]["chunk_shape"])
                for index in zarr3.grid(tuple(node["shape"]), chunks):
                    keys[f"{group}/{name}/{zarr3.chunk_key(index)}"] = f"{run}/{group}/{name}"
        key = data.draw(st.sampled_from(sorted(keys)))
        whole = directory.get(key)
        place = data.draw(st.integers(0, len(whole) - 1))
        if how == "delete":
            directory.delete(key)
        else:
            directory.put(
                key, whole[:place] + (b"" if how == "cut" else bytes([whole[place] ^ 1]) + whole[place + 1 :])
            )
        found = [problem.where for problem in verify_root(self.root, deep=True) if problem.damage]
        assert any(where.startswith(keys[key]) for where in found), (key, how, found)
        if mend:
            self.repair_anything()
        directory.put(key, whole)
        assert [problem for problem in verify_root(self.root, deep=True) if problem.damage] == []
        self.happened["damages named"] += 1

    def teardown(self) -> None:
        for run in list(self.writers):
            self.bury(run)
        shutil.rmtree(self.base)


class StoreInABucket(Store):
    """The same on an object store, whose requests are all refused from some PUT on when a writer is killed."""

    happened: ClassVar[Counter[str]] = Counter()

    def first_root(self) -> Any:
        self.bucket, self.patched = Bucket(), ExitStack()
        self.patched.enter_context(patch.object(objects, "client", lambda name: self.bucket))
        self.patched.enter_context(patch.object(objects, "PUTS_AT_ONCE", 1))  # so that the k-th PUT is always the same
        return location("memory://bucket/0")

    @contextmanager
    def dying_after(self, puts: int) -> Iterator[None]:
        numbers, dead = count(), False

        def strike(number, verb, path):
            nonlocal dead
            dead = dead or (verb == "put" and next(numbers) >= puts)
            return "refused" if dead else None

        self.bucket.strike = strike
        try:
            yield
        finally:
            self.bucket.strike = lambda *_: None

    def bury(self, run: str) -> None:
        """Its lease would run out in a minute; whoever knows that the writer is dead may delete it."""
        with self.dying_after(0):
            super().bury(run)
        door(self.path(run)).delete(LEASE)

    def copied(self) -> Any:
        copy = location(f"memory://bucket/{next(self.copies)}")
        for key in door(self.root).list(hidden=True):
            door(copy).put(key, door(self.root).get(key))
        return copy

    def plainly(self, path: Any) -> Any:
        return StorePath(ObjectStore(self.bucket.store, read_only=True), path.prefix)

    def independent(self, path: Any) -> IndependentRun:
        plain = self.base / "plain"
        shutil.rmtree(plain, ignore_errors=True)
        for key in door(path).list():
            file = plain / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(door(path).get(key))
        return IndependentRun(plain)

    def repair_anything(self) -> None:
        """There is no repair of a bucket."""

    @precondition(lambda self: self.models)
    @rule()
    def repair(self):
        with pytest.raises(InputError, match="is on an object store, of which repair removes nothing"):
            repair_root(self.root, apply=True)

    def teardown(self) -> None:
        super().teardown()
        self.patched.close()


@sizes("examples", short=6, full=200, soak=2000)
@pytest.mark.parametrize("machine", [Store, StoreInABucket], ids=["folder", "bucket"])
def test_a_store_is_what_a_dictionary_of_rows_says(machine, measured, examples):
    machine.happened.clear()
    chosen = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    # Few rows to a chunk, so that shared chunks come to be uncommitted too; nobody waits for a lock that is held.
    with patch("os.fsync"), patch("time.sleep"), patch("pipeline.schema.TRAIN_ROWS", 3):
        run_state_machine_as_test(machine, settings=chosen)
    assert machine.happened["rows read"] >= examples
    measured(
        "R25",
        f"life of a store against a dictionary, {'folder' if machine is Store else 'bucket in memory'}",
        examples=examples,
        failures=0,
        **{name.replace(" ", "_"): machine.happened[name] for name in sorted(machine.happened)},
    )
