"""Attacks on whoever opens a store: each is refused in one line, in little memory, without leaving the store."""

import json
import shutil
import zipfile
from io import BytesIO
from unittest.mock import patch

import duckdb
import numpy as np
import pytest
import resident
from mock_store import mock_run
from study_files import assert_one_plain_line

from analysis import catalog, results
from analysis.load import open_sweep
from pipeline import zarr3
from pipeline.errors import DamagedStore, InputError, NtkEosError
from pipeline.store import Writer, _record_digest, read_run, relabel, run_paths
from pipeline.verify import verify, verify_root

MEMORY = 256 * 2**20


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """These tests cut no power."""
    with patch("os.fsync", lambda handle: None):
        yield


@pytest.fixture(autouse=True)
def little_memory():
    """No attack may make us take much."""
    before = resident.begin()
    yield
    assert resident.peak() - before < MEMORY


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """One short run."""
    return mock_run(tmp_path_factory.mktemp("template"), 0.1, 0, steps=6, n=4, k=2)


@pytest.fixture
def path(template, tmp_path):
    """A copy to forge."""
    return shutil.copytree(template, tmp_path / "store" / "runs" / template.name)


def forge(path, change):
    """Change the record as one who knows the format."""
    document = json.loads((path / "zarr.json").read_bytes())
    change(document["attributes"], document["consolidated_metadata"]["metadata"])
    document["attributes"]["record"] = _record_digest(document)
    (path / "zarr.json").write_text(json.dumps(document))


def grow(group, rows, chunk=None):
    """Claim so many rows of a group, and chunks of so many rows."""

    def change(attrs, nodes):
        attrs["lengths"][group] = rows
        for name, node in nodes.items():
            if name.startswith(f"{group}/"):
                node["shape"][0] = rows
                node["chunk_grid"]["configuration"]["chunk_shape"][0] = (
                    chunk or node["chunk_grid"]["configuration"]["chunk_shape"][0]
                )

    return change


def put(*keys, value):
    """Replace one value of the attributes (0) or the nodes (1)."""

    def change(*parts):
        inner = parts[keys[0]]
        for key in keys[1:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
FORGED = {
    "1e18 rows": (grow("train", 10**18), "chunks: must be at most"),
    "a chunk of a terabyte": (grow("train", 8, 2**40), "a chunk of 8796093022208 bytes: must be at most"),
    "negative size": (grow("train", -5), "lengths"),
    "a kernel of another size": (put(1, "snapshots/ntk", "shape", 1, value=10**9), "must be at most"),
    "pickle codec": (put(1, "train/loss", "codecs", value=[{"name": "numcodecs.pickle"}]), "'codecs'"),
    "no checksum": (put(1, "train/loss", "codecs", value=[BYTES]), "'codecs'"),
    "objects": (put(1, "train/loss", "data_type", value="object"), "data_type = 'object': must be a number"),
    "run named out": (put(0, "run", value="../../out"), "run = '../../out': must be the name of a run"),
    "absolute run": (put(0, "run", value="/etc/x"), "must be the name of a run"),
    "look-alike run": (put(0, "run", value="lr-0.1_se\u0435d-0"), r"run = 'lr-0.1_se\u0435d-0'"),
    "encoded array": (put(1, "train/..%2f..%2fx", value={}), "does not know its variable"),
    "array named out": (put(1, "train/../../x", value={}), "does not know its variable"),
    "look-alike array": (put(1, "train/l\u043ess", value={}), r"'train/l\u043ess'"),
    "foreign group": (put(1, "/etc", value={"node_type": "group"}), "entry '/etc': must be of a group"),
    "checkpoint named out": (put(0, "checkpoint", "name", value="../../x"), "checkpoint"),
    "newer format": (put(0, "format_version", value=2), "install a newer one"),
}


@pytest.mark.parametrize(("change", "said"), FORGED.values(), ids=FORGED.keys())
def test_a_forged_record_is_refused(path, change, said):
    forge(path, change)
    for call in (lambda: read_run(path), lambda: open_sweep(path.parents[1]), lambda: catalog.sync(path.parents[1])):
        with pytest.raises(NtkEosError, match=r".") as caught:
            call()
        assert said in str(caught.value)
        assert_one_plain_line(str(caught.value))
    assert [problem.where for problem in verify_root(path.parents[1])] == [f"{path.stem}/zarr.json"]


def test_rows_without_files_take_no_memory(path):
    forge(path, grow("train", 2**26))
    with pytest.raises(DamagedStore, match=r"train/step: its files can hold \d+ bytes, not the 536870912"):
        open_sweep(path.parents[1], "train")


@pytest.mark.parametrize("packed", [16, 1000])
def test_a_chunk_that_would_expand_beyond_what_lz4_can_is_not_unpacked(packed):
    frame = zarr3.encode(np.zeros(4, "f4"))[:4] + (2**30).to_bytes(4, "little") + bytes(4)
    frame += packed.to_bytes(4, "little") + bytes(packed - 16)
    data = frame + zarr3.google_crc32c.value(frame).to_bytes(4, "little")
    with pytest.raises(DamagedStore, match="unpacks to another size"):
        zarr3.decode(data, "float32", (2**28,))


def test_what_does_compress_well_is_still_read():
    zeros = np.zeros(2**22, "float64")
    np.testing.assert_array_equal(zarr3.decode(zarr3.encode(zeros), "float64", zeros.shape), zeros)


def test_a_chunk_larger_than_its_array_is_not_read(path):
    with open(path / "train/loss/c.0", "ab") as file:
        file.truncate(2**40)  # a hole: it takes no room on disk
    with pytest.raises(DamagedStore, match="more than the 32788 allowed"):
        read_run(path).read("train/loss")


def link(path, target):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("key", ["", "train", "train/loss", "train/loss/c.0", "zarr.json", "run.json"])
def test_a_symbolic_link_in_a_store_is_not_followed(path, tmp_path, key):
    elsewhere = shutil.copytree(path, tmp_path / "elsewhere") / key
    link(path / key, elsewhere)
    if key == "run.json":
        assert read_run(path).heartbeat == {}
        return
    with pytest.raises(NtkEosError, match="is a symbolic link, which may lead out of the store"):
        open_sweep(path.parents[1], "train").compute(scheduler="sync")
    if key:
        problems = verify_root(path.parents[1])
        assert problems
        assert all(problem.damage for problem in problems)


@pytest.mark.parametrize("name", ["runs", "analysis"])
def test_a_folder_of_a_store_that_is_a_symbolic_link_is_not_followed(path, tmp_path, name):
    root = path.parents[1]
    results.analyze(root)
    shutil.move(root / name, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "alignment", ignore_errors=True)
    (root / name).symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("elsewhere/**/*"))
    with pytest.raises(DamagedStore, match="is a symbolic link"):
        results.analyze(root)
    assert sorted(tmp_path.rglob("elsewhere/**/*")) == before


def test_a_lease_that_is_a_symbolic_link_is_not_written_through(path, tmp_path):
    (tmp_path / "precious").write_text("mine")
    link(path / "LEASE", tmp_path / "precious")
    with pytest.raises(DamagedStore, match="is a symbolic link"):
        relabel(read_run(path), {"title": "another"})
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_run_can_only_be_created_inside_its_root(tmp_path):
    for name in ("../x", "/x", "a/b", "", ".x", "-x", "x\0", "x" * 201, "\u0430", "a\nb"):
        with pytest.raises(InputError, match=r"run id .*: must be 1 to 200 printable ASCII characters"):
            Writer.open(tmp_path / "root", name, identity={}, attrs={}, dims={}, groups={}, capacity={}, probe={},
                        dtype="float32")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# --- derived results and the catalogue --------------------------------------------------------------------------------


@pytest.fixture
def result(path):
    """The file of a derived result."""
    results.analyze(path.parents[1], ["alignment"])
    (file,) = (path.parents[1] / "analysis" / "alignment").iterdir()
    return file


def rezipped(result, change, kind=zipfile.ZIP_STORED):
    """Change the files of a result."""
    with zipfile.ZipFile(result) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    result.write_bytes(buffer.getvalue())


def array(**changes):
    def change(files):
        files["kta/zarr.json"] = json.dumps(json.loads(files["kta/zarr.json"]) | changes).encode()

    return change


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda files: files.update(bomb=bytes(2**24)), zipfile.ZIP_DEFLATED, "it would unpack to more than it is"),
        (array(shape=[10**17]), zipfile.ZIP_STORED, "kta/zarr.json has 800000000000000000 bytes"),
        (array(codecs=[{"name": "numcodecs.pickle"}]), zipfile.ZIP_STORED, r"codecs \['numcodecs.pickle'\]"),
        (array(data_type="no"), zipfile.ZIP_STORED, "no"),
        (array(shape="x"), zipfile.ZIP_STORED, "."),
        (lambda files: files.update({"zarr.json": b"[" * 10**5}), zipfile.ZIP_STORED, "."),
    ],
    ids=["bomb", "1e17 values", "pickle", "dtype", "shape", "nested"],
)
def test_a_forged_result_is_refused(result, change, kind, said):
    rezipped(result, change, kind)
    with pytest.raises(DamagedStore, match=said) as caught:
        results.read(result)
    assert_one_plain_line(str(caught.value))
    assert "analyze` computes it again" in str(caught.value)


def test_a_catalogue_with_a_view_is_built_anew(path, tmp_path):
    """A view that reads the user's files would be executed when the table of its name is exported."""
    root = path.parents[1]
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    file = catalog.sync(root)
    with duckdb.connect(file) as connection:
        connection.execute("drop table claims")
        connection.execute(f"create view claims as select * from read_csv('{tmp_path}/secret.csv')")
    catalog.copy_table(root, "claims", tmp_path / "out.csv")
    assert "secret" not in (tmp_path / "out.csv").read_text()


def test_a_hostile_store_is_still_listed_and_its_other_runs_verified(path):
    mock_run(path.parents[1], 0.2, 0, steps=2, n=4, k=2)
    forge(path, grow("train", 10**18))
    assert len(run_paths(path.parents[1])) == 2
    assert [problem.where for problem in verify_root(path.parents[1], deep=True)] == [f"{path.stem}/zarr.json"]
    assert verify(read_run(next(p for p in run_paths(path.parents[1]) if p != path)), deep=True) == []
