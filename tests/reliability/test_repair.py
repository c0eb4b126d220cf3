"""Writers are killed at any file of any commit, and repair sweeps up after them: no committed byte goes."""

from itertools import count
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import sizes
from writer_loop import RUN, advance, open_writer, write_run

from pipeline import zarr3
from pipeline.disk import Directory
from pipeline.repair import repair_root
from pipeline.store import find_run, read_run
from pipeline.verify import verify

GROUPS = {"snapshots": ["ntk", "trace"], "train": ["loss"]}
STEPS = 11


class Killed(BaseException):
    """What stands for a SIGKILL: nothing cleans up after it."""


def dying_after(puts):
    """Writers die at this many files, the last of them half written."""
    put, numbers = Directory.put, count(1)

    def dying(self, key, data, **options):
        if next(numbers) > puts:
            folder = (self.path / key).parent
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".tmp-dead").write_bytes(data[: len(data) // 2])
            raise Killed
        put(self, key, data, **options)

    return patch.object(Directory, "put", dying)


def committed(run):
    """Every file that a reader of the last commit may need, and its bytes."""
    keys = [key for key in Directory(run.path).list() if key.endswith(("zarr.json", "run.json"))]
    keys += [run.attrs["checkpoint"]["name"]] if run.attrs["checkpoint"] else []
    for group in ("probe", *run.lengths):
        for name, node in run.arrays(group).items():
            chunks = tuple(node["chunk_grid"]["configuration"]["chunk_shape"])
            keys += [f"{group}/{name}/{zarr3.chunk_key(index)}" for index in zarr3.grid(tuple(node["shape"]), chunks)]
    return {key: (run.path / key).read_bytes() for key in keys}


@sizes("stores", short=12, full=100)
def test_every_committed_byte_survives_and_no_debris_does(stores, tmp_path_factory, measured):
    removed = kept = 0

    @settings(max_examples=stores, deadline=None)
    @given(every=st.integers(1, 4), puts=st.integers(0, 90), again=st.integers(0, 90), finish=st.booleans())
    def check(every, puts, again, finish):
        nonlocal removed, kept
        root = tmp_path_factory.mktemp("store")
        with patch("pipeline.schema.TRAIN_ROWS", 3):  # so that shared chunks come to be uncommitted too
            for limit in (puts, again):
                try:
                    with dying_after(limit), open_writer(root, groups=GROUPS) as writer:
                        advance(writer, STEPS - 3, every, tuple(GROUPS))
                        if finish:
                            writer.finish("complete", "steps")
                except Killed:
                    pass
            runs = [read_run(path) for path in (root / "runs").glob("[!.]*")]
            before = [committed(run) for run in runs]
            everything = {path for path in root.rglob("*") if path.is_file()}
            shown = repair_root(root)
            assert {path for path in root.rglob("*") if path.is_file()} == everything, "a dry run removed something"
            assert repair_root(root, apply=True) == shown
            assert repair_root(root) == []
            assert [committed(run) for run in runs] == before
            removed, kept = removed + len(shown), kept + sum(map(len, before))
            assert [problem for run in runs for problem in verify(run, deep=True)] == []
            assert not [path for path in root.rglob("*") if path.name.startswith((".tmp-", ".new-"))]
            with open_writer(root, groups=GROUPS) as writer:
                if writer.status == "complete":
                    writer.reopen(dict.fromkeys(GROUPS, 3))
                advance(writer, STEPS, every, tuple(GROUPS))
                head = writer.attrs["head"]
            assert head == write_run(root / "whole", STEPS, groups=GROUPS).head
            assert verify(find_run(root, RUN), deep=True) == []

    with patch("os.fsync"):
        check()
    assert removed > stores / 2
    measured("R3", "repair after a writer died twice", stores=stores, files_removed=removed, committed_files=kept,
             committed_files_changed=0)  # fmt: skip
