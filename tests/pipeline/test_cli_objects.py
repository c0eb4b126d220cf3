"""The commands on a root that is a URL: the same numbers as in a folder, and only objects are written."""

import json
import re

import pytest
import xarray as xr
from bucket import URL, Bucket
from click.testing import CliRunner
from mock_store import mock_run
from study_files import MINIMAL, one

import analysis
from analysis import catalog
from pipeline import cli, objects
from pipeline.disk import door, location
from pipeline.errors import InputError, NtkEosError
from pipeline.store import check_root, find_run, list_runs, stores_of
from pipeline.train import train

GRID = ((0.1, 0), (1.2, 0))
SMALL = {"steps": 12, "n": 6, "k": 5}


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def bucket(patch, tmp_path_factory):
    """A store in a bucket; the catalogue goes to a cache of its own."""
    bucket = Bucket()
    patch.setattr(objects, "client", lambda name: bucket)
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for learning_rate, seed in GRID:
        mock_run(URL, learning_rate, seed, **SMALL)
    return bucket


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same store in a folder."""
    root = tmp_path_factory.mktemp("folder") / "store"
    for learning_rate, seed in GRID:
        mock_run(root, learning_rate, seed, **SMALL)
    return root


def call(*arguments):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(*arguments):
    return json.loads(call(*arguments, "--json"))["rows"]


def test_status_and_verify(folder):
    there, here = rows("status", URL), rows("status", folder)
    assert [(row["run"], row["status"], row["head"]) for row in there] == [
        (row["run"], row["status"], row["head"]) for row in here
    ]
    assert call("verify", URL, "--deep") == f"{URL}: nothing wrong was found\n"
    assert call("verify", URL, "lr-1.2") == f"{URL}: nothing wrong was found\n"


def test_results_are_put_once_and_removed_when_stale(bucket):
    summary = rows("analyze", URL)
    assert {row["state"] for row in summary} == {"computed"}
    kept = list(door(URL).list("analysis"))
    assert len(kept) == len(summary) > len(GRID)
    puts = bucket.requests["put"]
    assert {row["state"] for row in rows("analyze", URL)} == {"fresh"}
    assert bucket.requests["put"] == puts
    door(URL).put("analysis/modes/lr-0.1_seed-0.0000000000000000.zarr.zip", b"stale")
    call("analyze", URL)
    assert list(door(URL).list("analysis")) == kept


def test_sql_answers_as_in_a_folder_and_the_catalogue_is_a_local_file(folder, tmp_path, monkeypatch):
    query = "select run_id, step, kta, c5 from alignment order by all"
    assert rows("sql", URL, query) == rows("sql", folder, query)
    monkeypatch.delenv("NTK_EOS_CATALOG", raising=False)
    path = catalog.sync(URL)
    assert re.fullmatch(r".*/ntk-eos/[0-9a-f]{16}/catalog\.duckdb", str(path))
    assert not any("catalog" in key for key in door(URL).list(hidden=True))
    before = path.read_bytes()
    mine = tmp_path / "new" / "mine.duckdb"
    monkeypatch.setenv("NTK_EOS_CATALOG", "")  # so that what the command sets is undone
    assert rows("sql", URL, query, "--catalog", mine) == rows("sql", folder, query, "--catalog", tmp_path / "other")
    assert {file.name for file in mine.parent.iterdir()} == {".catalog-lock", "mine.duckdb"}
    assert catalog.query(URL, "select root from meta").rows == [(str(folder),)], "the option holds in this process"
    assert path.read_bytes() == before


def test_plot_report_and_claims(tmp_path):
    drawn = call("plot", URL, "kta", "--format", "svg").split()
    assert drawn == [f"{URL}/figures/kta.svg"]
    assert door(URL).get("figures/kta.svg").startswith(b"<?xml")
    (local,) = call("plot", URL, "kta", "--format", "svg", "--out", tmp_path).split()
    assert (tmp_path / "kta.svg").read_bytes() == door(URL).get("figures/kta.svg"), local
    assert call("report", URL, "-q") == f"{URL}/report.html\n"
    assert URL.encode() in door(URL).get("report.html")
    assert rows("claims", URL) == []


@pytest.mark.parametrize("kind", ["csv", "netcdf"])
def test_export_writes_local_files(bucket, folder, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(objects, "client", lambda name: bucket.store)  # zarr takes none but obstore's own
    for name, root in {"there": URL, "here": folder}.items():
        call("export", root, "--format", kind, "--out", tmp_path / name)
    assert len(list((tmp_path / "there").iterdir())) >= len(GRID)
    if kind == "netcdf":
        one, other = (
            xr.open_dataset(tmp_path / name / "lr-0.1_seed-0.nc", group="spectra") for name in ("there", "here")
        )
        assert one.identical(other)


def test_a_sweep_opens_with_the_values_of_a_folder(folder):
    there, here = (analysis.open_sweep(root, where="learning_rate < 1") for root in (URL, folder))
    xr.testing.assert_identical(there.compute(), here.compute())


def test_a_run_is_named_as_in_a_folder(bucket):
    names = cli._complete_run(type("Context", (), {"params": {"root": URL}}), None, "lr-0.1")
    assert names == ["lr-0.1_seed-0"]
    nothing = type("Context", (), {"params": {"root": f"{URL}-none"}})
    assert cli._complete_run(nothing, None, "") == []


def test_training_gives_the_head_of_a_folder_and_kernels_can_be_had_later(tmp_path, study):
    run = one(study)
    root = f"{URL}-trained"
    assert train(run, root) == train(run, str(tmp_path / "store"))
    assert find_run(root, run.run_id).head == find_run(tmp_path / "store", run.run_id).head
    (row,) = rows("kernel", root, "--probe", "train")
    assert row["path"].startswith(f"{root}/analysis/kernel/ntk-train-")
    assert rows("kernel", root, "--probe", "train") == [row]


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_study_with_parts_is_told_of_as_a_whole(tmp_path, monkeypatch, place):
    root = str(tmp_path / "parts") if place == "folder" else f"{URL}-parts"
    for number, part in enumerate(("deep", "wide")):
        mock_run(f"{root}/{part}", GRID[number][0], 0, **SMALL, attrs={"part": part})
    door(root).put("other/data", b"1")
    assert [str(store) for store in stores_of(root)] == [f"{root}/deep", f"{root}/wide"]
    assert stores_of(f"{root}/deep") == [location(f"{root}/deep")]
    assert [(row["part"], row["run"]) for row in rows("status", root)] == [
        ("deep", "lr-0.1_seed-0"), ("wide", "lr-1.2_seed-0"),
    ]  # fmt: skip
    with pytest.raises(InputError, match=rf"holds a store for each part of a study \(deep, wide\).* {root}/deep$"):
        list_runs(root)
    with pytest.raises(InputError, match="holds the stores of 2 parts of a study: choose another folder"):
        check_root(root)
    file = tmp_path / "mine.toml"
    file.write_text(MINIMAL + "[parts.deep]\nseed = 0\n[parts.wide]\nseed = 1\n")
    trained = []
    monkeypatch.setattr(cli, "_train", lambda study, root, *_: trained.append((study.part, root)) or 0)
    assert f"report: {root}/report.html" in call("study", file, "--out", root, "-q")
    assert trained == [("deep", f"{root}/deep"), ("wide", f"{root}/wide")]
    page = door(root).get("report.html").decode()
    assert "lr-0.1_seed-0" in page
    assert "lr-1.2_seed-0" in page


def test_a_store_that_does_not_answer_is_one_line(bucket, patch):
    def strike(number, verb, path):
        return "refused"

    bucket.strike = strike
    try:
        for command in ("status", "verify", "analyze"):
            result = CliRunner().invoke(cli.main, [command, URL])
            assert result.exit_code == NtkEosError.exit_code
            assert result.stderr.splitlines()[-1].startswith(f"error: list {URL}/")
    finally:
        bucket.strike = lambda *_: None


def test_progress_goes_on_without_a_heartbeat(bucket):
    class Bar:
        def update(self, share, note):
            self.said = share, note

    runs, bar = [type("Run", (), {"run_id": "lr-0.1_seed-0"})], Bar()
    bucket.strike = lambda *_: "refused"
    try:
        cli._Watch(runs, URL, bar).update()
    finally:
        bucket.strike = lambda *_: None
    assert bar.said == (0, "0/1 runs done, ")
