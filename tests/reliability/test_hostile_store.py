"""Stores from strangers: whatever their metadata say, there is an answer or one line, and no path out of the store.

The stranger knows the format: after each change the digest of the record is made right again.
"""

import json
import shutil
from contextlib import contextmanager
from copy import deepcopy
from unittest.mock import patch

import pytest
import resident
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_store import mock_run
from sizes import sizes
from study_files import assert_one_plain_line

from analysis import catalog, results
from analysis.load import open_runs
from analysis.tables import run_row
from pipeline import store
from pipeline.cli import _status_row
from pipeline.console import show
from pipeline.errors import NtkEosError
from pipeline.repair import repair_root
from pipeline.store import read_run, run_paths
from pipeline.verify import verify

SIZES = {"short": 40, "full": 1000, "soak": 20000}
MEMORY = 256 * 2**20

ODD = st.sampled_from([
    None, True, False, 0, -1, 1, 7, 2**31, 2**62, 2**63, 10**30, 0.5, -0.0, 1e300, "", "0", "a", "ntk", "complete",
    "../../x", "/etc/passwd", "..%2f..%2fx", "runs/../..", "snapshots/ntk", "s\u0430mple", "\u202egnp", "x\x1b[2J\ny",
    "\ud800", "x" * 5000, "2026-01-02", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "pickle",
    [], [0], [None], [[]], ["x", 1], [10**9] * 3, [1] * 40, {}, {"a": 1}, {"name": "../x", "digest": "0" * 32},
    {"a": {"b": []}},
])  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


@pytest.fixture(scope="module", params=["complete", "growing"])
def path(request, tmp_path_factory):
    """A run with every kind of variable."""
    end = "complete" if request.param == "complete" else None
    root = tmp_path_factory.mktemp("hostile")
    mock_run(root, 0.1, 1, steps=4, n=4, c=2, k=2)
    return mock_run(
        root, 0.1, 0, steps=6, n=4, c=2, k=2, conjugate=True, layers=True, end=end, attrs={"overrides": ["a=1"]}
    )


def places(document, prefix=()):
    """Every path to a value of a document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs:
        yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from places(value, (*prefix, key))


def changed(document, data):
    """A document with one or two values replaced, removed or renamed, half of them attributes."""
    document = deepcopy(document)
    for _ in range(data.draw(st.integers(1, 2))):
        within = ("attributes",) if data.draw(st.booleans()) else ()
        every = list(places(document["attributes"] if within else document, within))
        *outer, last = every[data.draw(st.integers(0, len(every) - 1))]
        inner = document
        for key in outer:
            inner = inner[key]
        how = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if how == "replace" or isinstance(inner, list):
            inner[last] = data.draw(ODD)
        elif how == "remove":
            del inner[last]
        else:
            inner[data.draw(ODD.filter(lambda odd: isinstance(odd, str)))] = inner.pop(last)
        if not isinstance(document.get("attributes"), dict) or not document["attributes"]:
            break
    return document


def sealed(document):
    """The document with the digest that a stranger would give it."""
    if isinstance(document.get("attributes"), dict):
        document["attributes"]["record"] = store._record_digest(document)
    return json.dumps(document).encode()


@contextmanager
def in_place_of(path, data):
    """Other bytes in a file, for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def everything(path, number):
    """All that a reader may do with a run; each call answers or gives one line. Whether the run could be read."""
    root = path.parents[1]
    calls = [
        lambda: verify(read_run(path), deep=True),
        lambda: _status_row(path),
        lambda: repair_root(root, [path.stem]),
    ]
    tried = [attempt(call) for call in calls]
    if not tried[0]:
        return False
    run = read_run(path)
    assert run_paths(root)
    group = sorted(run.lengths)[number % len(run.lengths)] if run.lengths else "train"
    attempt(lambda: open_runs([run], group).compute(scheduler="sync"))
    attempt(lambda: run_row(run))
    if number % 25 == 0:  # it costs a second
        attempt(lambda: results.analyze(root))
        attempt(lambda: catalog.query(root, "select * from runs"))
    return True


def attempt(call):
    """Whether a call answered."""
    try:
        call()
    except NtkEosError as error:
        assert_one_plain_line(str(error))
        return False
    return True


def files(root):
    return {path for path in root.rglob("*") if path.name not in ("analysis", "catalog.duckdb", ".catalog-lock")}


@sizes("cases", **SIZES)
def test_any_record_is_read_or_refused_in_one_line(path, cases, measured):
    document = json.loads((path / "zarr.json").read_bytes())
    outside, read = files(path.parents[2]), 0

    @settings(max_examples=cases // 2, deadline=None)
    @given(st.data())
    def check(data):
        nonlocal read
        try:
            forged = sealed(changed(document, data))
        except ValueError:
            return
        with in_place_of(path / "zarr.json", forged):
            read += everything(path, read)

    before = resident.begin()
    try:
        check()
    finally:
        shutil.rmtree(path.parents[1] / "analysis", ignore_errors=True)
        (path.parents[1] / "catalog.duckdb").unlink(missing_ok=True)
    assert files(path.parents[2]) == outside
    grown = resident.peak() - before
    assert grown < MEMORY
    of = "a finished" if document["attributes"]["status"] == "complete" else "a growing"
    measured("R15", f"a forged zarr.json of {of} run", cases=cases // 2, read=read, tracebacks=0, paths_outside=0,
             grown_MiB=grown // 2**20)  # fmt: skip


SAYS = st.sampled_from(["run", "status", "head", "last_step", "commits", "elapsed", "error", "loss", "time"])
NESTED = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SAYS, inner, max_size=3))
SAID = (
    st.dictionaries(SAYS, ODD).map(json.dumps)
    | NESTED.map(json.dumps)
    | st.text(max_size=20)
    | st.just("[" * 10**5)
)  # fmt: skip


@sizes("cases", **SIZES)
def test_any_heartbeat_is_read_or_counts_as_none(path, cases, measured):
    @settings(max_examples=cases // 2, deadline=None)
    @given(SAID)
    def check(text):
        with in_place_of(path / "run.json", text.encode("utf-8", "replace")):
            run = read_run(path)
            assert run.status in ("complete", "stale", "interrupted", "failed")
            assert attempt(lambda: verify(run))
            show([_status_row(path)], as_json=True)
            show([_status_row(path)], as_json=False)

    check()
    of = "a finished" if read_run(path).attrs["status"] == "complete" else "a growing"
    measured("R15", f"a forged run.json of {of} run", cases=cases // 2, tracebacks=0)


def header(document):
    """A safetensors file whose header this is."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text


TENSOR = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F64", "X"]) | ODD, "shape": ODD, "data_offsets": ODD})
HEADERS = st.dictionaries(st.sampled_from(["__metadata__", "model.0.weight", "state.x", "measure.ntk"]), TENSOR | ODD)
CHECKPOINTS = HEADERS.map(header) | st.binary(max_size=30).map(header) | st.binary(max_size=30)


@sizes("cases", **SIZES)
def test_any_checkpoint_is_refused_in_one_line(cases, tmp_path_factory, measured):
    torch = pytest.importorskip("torch")
    from pipeline.record import Probe, Recorder

    root = tmp_path_factory.mktemp("checkpoints")
    model = torch.nn.Linear(2, 1)

    def recorder():
        probe = Probe(torch.eye(2), torch.ones(2, 1))
        about = {"identity": {}, "learning_rate": 0.1, "seed": 0, "steps": 3, "run_id": "one"}
        return Recorder(root, model, probe, eigenpairs=1, **about)

    with recorder() as one:
        one.record(0, loss=1.0)
    path = root / "runs" / "one.zarr"
    document = json.loads((path / "zarr.json").read_bytes())
    name = document["attributes"]["checkpoint"]["name"]

    def resume():
        with recorder():
            pass

    @settings(max_examples=cases // 2, deadline=None)
    @given(CHECKPOINTS)
    def check(data):
        document["attributes"]["checkpoint"]["digest"] = store.blake(data).hex()
        with in_place_of(path / name, data), in_place_of(path / "zarr.json", sealed(document)):
            assert not attempt(resume)

    check()
    measured("R15", "a forged checkpoint", cases=cases // 2, refused_in_one_line=cases // 2)
