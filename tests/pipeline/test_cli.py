"""The command as its users meet it: output, errors of one line, exit codes, and what it leaves on the disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import duckdb
import numpy as np
import pytest
from command import call, refused, rows

from analysis.judge import CHANGES
from pipeline import cli
from pipeline.cli import _endings, main
from pipeline.store import list_runs, read_run
from pipeline.sweep import Outcome

COMMAND = Path(sys.executable).with_name("ntk-eos")
SMALL = [
    "data.n=40", "model.width=8", "stop.steps=60", "stop.loss=0.05", "learning_rate=[0.1, 0.4]", "seed=[0, 1]",
    "record.loss_levels=[0.45]", "record.eigenpairs=6",
]  # fmt: skip


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A small store of the digits study, made by the command itself."""
    root = tmp_path_factory.mktemp("cli") / "store"
    result = call("run", "digits", "--out", root, *sets(*SMALL))
    assert result.exit_code == 0, result.output
    return root


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", main.commands)
def test_every_command_has_help_with_an_example_that_parses(name):
    result = call(name, "--help")
    assert result.exit_code == 0
    examples = result.output.partition("Example:")[2].strip().splitlines()
    assert examples, f"{name} has no example"
    for example in examples:
        assert example.strip().startswith(f"ntk-eos {name}")


def test_help_imports_nothing_heavy():
    heavy = ["torch", "xarray", "zarr", "duckdb", "pandas", "matplotlib", "dask", "numpy", "rich", "pydantic"]
    code = f"""
import sys
from click.testing import CliRunner
from pipeline.cli import main
assert CliRunner().invoke(main, ["--help"]).exit_code == 0
assert CliRunner().invoke(main, ["run", "--help"]).exit_code == 0
loaded = [name for name in {heavy} if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_is_found_beside_a_users_own_analysis_module(tmp_path):
    (tmp_path / "analysis.py").write_text("raise RuntimeError('the wrong analysis')\n")
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('the wrong pipeline')\n")
    result = subprocess.run([COMMAND, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Train once, ask anything later" in result.stdout


def test_completion_offers_studies_stores_and_runs(store, tmp_path):
    def complete(words: str) -> list[str]:
        variables = {"_NTK_EOS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([COMMAND], env=os.environ | variables, capture_output=True, text=True, cwd=tmp_path)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert {"digits", "smoke"} <= set(complete("ntk-eos run "))
    assert sorted(complete(f"ntk-eos verify {store} ")) == [run.run_id for run in list_runs(store)]
    (tmp_path / "data" / "stores" / "mine").mkdir(parents=True)
    assert "mine" in complete("ntk-eos status ")
    assert sorted(complete(f"ntk-eos kernel {store} ")) == [run.run_id for run in list_runs(store)]
    assert {"test", "train"} <= set(complete(f"ntk-eos kernel {store} --probe "))
    assert complete(f"ntk-eos kernel {store} --kernel inf") == ["infinite_ntk"]
    assert complete(f"ntk-eos plot {store} ") == ["kta", "modes", "phases"]
    assert complete(f"ntk-eos plot {store} kta p") == ["phases"]


# --- the main path ---------------------------------------------------------------------------------------------------


def test_plan_counts_the_grid_and_writes_nothing(tmp_path):
    result = call("plan", "smoke", "--out", tmp_path / "s", "--json")
    planned = json.loads(result.stdout)["rows"]
    assert [(row["learning_rate"], row["state"]) for row in planned] == [(0.05, "new"), (0.3, "new")]
    assert "2 of 2 runs to do" in result.stderr
    assert not (tmp_path / "s").exists()
    total = json.loads(result.stdout)["total"]
    assert total["runs"] == 2
    assert total["bytes"] == sum(row["bytes"] for row in planned)
    assert total["seconds"] > max(row["seconds"] for row in planned) > 0
    lines = call("plan", "smoke", "--out", tmp_path / "s", "-q").output.splitlines()
    assert "2 of 2 runs to do" in lines[0], "before the table, of which a reader may take the first lines"
    assert lines[1].startswith("run")


def test_run_fills_the_store_and_does_nothing_the_second_time(store):
    before = {run.run_id: (run.head, run.attrs["commits"]) for run in list_runs(store)}
    assert len(before) == 4
    assert call("run", "digits", "--out", store, *sets(*SMALL)).exit_code == 0
    assert {run.run_id: (run.head, run.attrs["commits"]) for run in list_runs(store)} == before
    planned = rows("plan", "digits", "--out", store, *sets(*SMALL))
    assert {row["state"] for row in planned} == {"done"}


def test_the_last_line_of_a_run_says_how_its_runs_ended(tmp_path):
    overrides = sets("learning_rate=[0.1, 1e30]", "stop.steps=4", "model.activation=relu")
    result = call("run", "smoke", "--out", tmp_path / "s", *overrides)
    assert result.exit_code == 0
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"training 2 runs of smoke: 1 complete, 1 diverged \(.* at step \d+ is .*\) in \d+ s", last), (
        last
    )


def test_runs_are_counted_by_their_ends(store):
    outcomes = [Outcome(f"run-{i}", status) for i, status in enumerate(["complete", "failed", "complete"])]
    assert _endings(outcomes, str(store)) == "2 complete, 1 failed"


def test_status_lists_every_run(store):
    listed = rows("status", store)
    assert [row["run"] for row in listed] == [run.run_id for run in list_runs(store)]
    assert {row["status"] for row in listed} == {"complete"}
    table = call("status", store).stdout.splitlines()
    assert len(table) == 5
    assert "\x1b" not in "".join(table), "colours go to terminals only"
    assert {row["head"] for row in listed} == {run.head for run in list_runs(store)}
    assert table[0].split()[-1] == "seconds", "heads and errors that no run has are left to --json"


def test_a_store_in_its_usual_place_is_found_by_the_name_of_its_study(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/stores").mkdir(parents=True)
    Path("data/stores/mine").symlink_to(store)
    assert len(rows("status", "mine")) == 4


def test_sql_gives_figure_a(store):
    query = (
        "select learning_rate, step, avg(kta), stddev(kta), count(*) from alignment join runs using (run_id) "
        "group by 1, 2 order by 1, 2"
    )
    table = rows("sql", store, query)
    runs = {run.run_id: run for run in list_runs(store) if run.attrs["learning_rate"] == 0.1}
    first = [
        run.read("scalars/target_energy")[0]
        / run.read("scalars/frobenius_norm")[0]
        / np.sum(run.read("probe/target") ** 2)
        for run in runs.values()
    ]
    assert table[0]["learning_rate"] == 0.1
    assert table[0]["step"] == 0
    assert table[0]["count_star()"] == 2
    np.testing.assert_allclose(table[0]["avg(kta)"], np.mean(first), rtol=1e-12)
    assert call("sql", store, "select 1 as a, 'x' as b", "--csv").stdout.splitlines() == ["a,b", "1,x"]
    both = call("sql", store, "select 1", "--csv", "--json")
    assert (both.exit_code, both.stdout) == (2, "")
    assert "--csv and --json" in both.stderr


def test_missing_values_are_null_in_json(store):
    (row,) = rows("sql", store, "select cast(null as double) as a, 'nan'::double as b")
    assert row == {"a": None, "b": None}


def test_analyze_computes_once(store):
    call("analyze", store)
    again = call("analyze", store, "--json")
    assert {row["state"] for row in json.loads(again.stdout)["rows"]} == {"fresh"}
    assert again.stderr == "", "nothing was computed, so nothing is said to be done"


def test_claims_are_judged_and_too_few_seeds_are_underpowered(store):
    result = call("claims", store, "--json")
    judged = json.loads(result.stdout)["rows"]
    assert {row["claim"] for row in judged} >= {"kta_rises_with_learning_rate", "c5_rises"}
    assert {row["verdict"] for row in judged} == {"underpowered"}
    assert result.exit_code == 0
    text = call("claims", store).stdout
    header, *table = text.partition("\n\n")[0].splitlines()
    assert header.split() == ["claim", "verdict", "runs", "measured"]
    assert [line.split()[:2] for line in table] == [[row["claim"], "underpowered"] for row in judged]
    assert all(len(line) < 120 for line in table)
    assert "rule:" in text
    assert all(change in text for change in CHANGES)
    stored = rows("sql", store, "select claim, verdict from claims")
    assert {(row["claim"], row["verdict"]) for row in stored} == {(row["claim"], row["verdict"]) for row in judged}


def test_plot_and_report_write_what_they_print(store, tmp_path):
    paths = [
        Path(row["path"]) for row in rows("plot", store, "kta", "--x", "time", "--out", tmp_path, "--format", "png")
    ]
    assert [path.suffix for path in paths] == [".png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    result = call("report", store, "--out", tmp_path / "report.html")
    assert result.stdout.strip() == str(tmp_path / "report.html")
    assert "kta_rises_with_learning_rate" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("active", [True, False], ids=["active", "not_active"])
def test_demo_ends_with_commands_that_can_be_pasted(store, tmp_path, monkeypatch, active):
    (tmp_path / "my venv" / "bin").mkdir(parents=True)
    (tmp_path / "my venv" / "bin" / "activate").touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path / "my venv"))
    monkeypatch.setattr("pipeline.cli.shutil.which", lambda name: "/usr/bin/ntk-eos" if active else None)
    monkeypatch.setattr("pipeline.cli._write_report", lambda root, out, quiet: Path("report.html"))
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda study, overrides, root, *rest: load(study, SMALL, root, *rest))
    result = call("demo", "--out", store)
    assert result.exit_code == 0, result.output
    commands = result.stdout.partition("is retrained):")[2].strip().splitlines()
    assert commands[0].strip().startswith("ntk-eos sql" if active else f"source '{tmp_path}/my venv/bin/activate'")
    series = commands[-1].strip().replace("0.001", "0.45")  # this store has that level
    monkeypatch.undo()
    done = subprocess.run(series.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:-1]] == [run.run_id for run in list_runs(store)]


def test_verify_finds_nothing_in_a_clean_store_and_damage_in_a_damaged_one(store, tmp_path):
    assert rows("verify", store, "--deep") == []
    shutil.copytree(store, tmp_path / "copy")
    chunk = next((tmp_path / "copy").glob("runs/lr-0.1_seed-0*/snapshots/ntk/c.2.0.0"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    result = call("verify", tmp_path / "copy", "lr-0.1_seed-0", "--deep", "--json")
    assert result.exit_code == 1
    assert "snapshots/ntk" in json.loads(result.stdout)["rows"][0]["where"]
    assert call("verify", tmp_path / "copy", "lr-0.4_seed-0", "--deep").exit_code == 0


@pytest.mark.parametrize(("kind", "count"), [("netcdf", 4), ("parquet", None), ("csv", None)])
def test_export_writes_files_that_other_tools_read(store, tmp_path, kind, count):
    result = call("export", store, "--format", kind, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert all(path.stat().st_size > 0 for path in paths)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    if kind == "netcdf":
        import xarray as xr

        assert len(paths) == count
        run = next(run for run in list_runs(store) if run.run_id == paths[0].stem)
        with xr.open_datatree(paths[0], engine="h5netcdf") as tree:
            np.testing.assert_array_equal(tree["snapshots"].ntk.values, run.read("snapshots/ntk"))
            assert json.loads(tree.attrs["identity"]) == run.attrs["identity"]
    else:
        table = next(path for path in paths if path.stem == "alignment")
        (expected,) = rows("sql", store, "select count(*) as n, sum(kta) as total from alignment")
        got = duckdb.sql(f"select count(*), sum(kta) from '{table}'").fetchall()[0]
        assert got == (expected["n"], pytest.approx(expected["total"], rel=1e-12))


# --- kernels of stored parameters ------------------------------------------------------------------------------------


@pytest.fixture
def copy(store, tmp_path) -> Path:
    """A store of two runs that may be written to."""
    for run in list_runs(store)[:2]:
        shutil.copytree(run.path, tmp_path / "copy" / "runs" / run.path.name)
    return tmp_path / "copy"


def test_kernel_computes_on_other_examples_and_prints_the_alignment(copy):
    import analysis

    result = call("kernel", copy, "--probe", "test", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)["rows"]
    runs = list_runs(copy)
    assert [row["run"] for row in printed] == [run.run_id for run in runs]
    (root,) = {Path(row["path"]).parent.parent for row in printed}
    measured = analysis.alignment(analysis.open_sweep(root)).compute()
    for name in ("kta", "kta_centred"):
        np.testing.assert_allclose(sorted(row[name] for row in printed), sorted(measured[name].values), rtol=1e-12)
    assert [row["step"] for row in printed] == [run.attrs["last_step"] for run in runs]
    assert "done in" in result.stderr
    assert call("kernel", copy, "--probe", "test", "-q").stdout.count(str(root)) == 2
    assert rows("verify", copy, "--deep") == []
    assert len(rows("status", copy)) == 2


def test_kernel_takes_one_run_by_its_folder_or_by_its_name(copy):
    run = list_runs(copy)[1]
    by_folder = rows("kernel", run.path, "--probe", "train", "--at", "0,1", "--layers")
    by_name = rows("kernel", copy, run.run_id, "--probe", "train", "--at", "1,0", "--layers")
    assert by_folder == by_name
    (row,) = by_name
    assert (row["run"], row["step"]) == (run.run_id, 1)
    assert read_run(row["path"]).read("snapshots/ntk_layer").shape == (2, 6, 40, 40)


def test_kernel_takes_options_in_toml(copy, tmp_path):
    np.savez(tmp_path / "new.npz", x=np.random.default_rng(0).normal(size=(5, 64)))
    table = call(
        "kernel", copy, "lr-0.1_seed-0", "--probe", tmp_path / "new.npz", "--kernel", '{name="nngp", depth=2}', "-q"
    )
    header, line = table.stdout.splitlines()
    assert header.split() == ["run", "step", "kta", "kta_centred", "path"]
    assert line.split()[2:4] == ["-", "-"], "a file without y has no alignment"
    assert "analysis/kernel/nngp-new-" in line


def test_kernel_plans_without_writing(copy):
    (planned,) = rows("kernel", copy, "lr-0.1_seed-0", "--probe", "train", "--plan", "--memory", "64GiB")
    assert list(planned) == ["run", "n", "rows", "tiles", "bytes", "memory", "seconds"]
    assert (planned["n"], planned["rows"], planned["tiles"]) == (40, 1, 1)
    assert planned["seconds"] > 0
    assert not (copy / "analysis").exists()
    call("kernel", copy, "lr-0.1_seed-0", "--probe", "train")
    (done,) = rows("kernel", copy, "lr-0.1_seed-0", "--probe", "train", "--plan")
    assert (done["rows"], done["seconds"]) == (0, None)


def test_a_kernel_that_is_not_formed_has_the_alignment_of_one_that_is(copy):
    (formed,) = rows("kernel", copy, "lr-0.1_seed-0", "--probe", "train")
    (free,) = rows("kernel", copy, "lr-0.1_seed-0", "--probe", "train", "--matrix-free", "--tolerance", "1e-6")
    assert free["path"] != formed["path"]
    assert free["kta_centred"] is None
    assert free["kta"] == pytest.approx(formed["kta"], rel=0.05)


@pytest.mark.parametrize(
    ("code", "options", "said"),
    [
        (2, ["--probe", "train", "--tolerance", "0.1"], "--tolerance: of --matrix-free only"),
        (2, ["--probe", "train", "--matrix-free", "--tolerance", "2"], "tolerance = 2.0: must be above 0 and below 1"),
        (
            2,
            ["--probe", "train", "--memory", "1MiB"],
            "of memory are needed, with workers = 1, and 1.0 MiB",
        ),
        (
            2,
            ["--probe", "train", "--memory", "much"],
            "memory = much: must be a number of bytes above 0, such as",
        ),
        (4, ["--probe", "absent.npz"], "absent.npz: there is no such file"),
        (4, ["--probe", "train", "--at", "61"], "no snapshot at step 61; the nearest are at"),
        (2, ["--probe", "train", "--at", "soon"], "--at soon: must be final, all or steps"),
        (2, ["--probe", "train", "--kernel", "ntc"], 'kernel = "ntc": must be one of ntk, conjugate'),
        (2, ["--probe", "train", "--kernel", "nngp"], "kernel.depth"),
        (2, ["--probe", "train", "--kernel", '{name="nngp", depth=0}'], "kernel.depth = 0: must be at least 1"),
        (2, ["--probe", "train", "--kernel", "{name="], "not a TOML value"),
        (2, ["--probe", "train", "--kernel", "conjugate", "--layers"], "layers: of the kernel ntk only"),
        (2, ["--probe", "WRONG"], "features of shape (5,)"),
    ],
    ids=("tolerance large memory bytes file step at kernel option value toml layers features".split()),
)
def test_kernel_refuses_in_one_line_and_writes_nothing(copy, tmp_path, code, options, said):
    np.savez(tmp_path / "wrong.npz", x=np.ones((3, 5)))
    options = [str(tmp_path / "wrong.npz") if option == "WRONG" else option for option in options]
    assert said in refused(code, "kernel", list_runs(copy)[0].path, *options, "-q")
    assert not (copy / "analysis").exists()


def test_kernel_goes_on_after_a_run_that_fails_and_exits_3(copy):
    broken, whole = list_runs(copy)
    (broken.path / "snapshots" / "parameter" / "c.0.0").unlink()
    (broken.path / "probe" / "input" / "c.0.0").unlink()
    result = call("kernel", copy, "--probe", "train", "--json", "-q")
    assert result.exit_code == 3
    assert [row["run"] for row in json.loads(result.stdout)["rows"]] == [whole.run_id]
    assert broken.run_id in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_kernel_of_a_model_by_import_path_needs_permission(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\n\ndef build(input_shape, outputs):\n    return nn.Linear(*input_shape, outputs)\n"
    )
    arguments = ["smoke", "--out", "s", *sets('model={import="theirs:build"}', "stop.steps=2", "learning_rate=0.01")]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([COMMAND, *words, "-q"], cwd=tmp_path, capture_output=True, text=True)

    assert run("run", *arguments, "--allow-imports").returncode == 0
    refusal = run("kernel", "s", "--probe", "test")
    assert refusal.returncode == 2
    assert "--allow-imports" in refusal.stderr
    assert run("kernel", "s", "--probe", "test", "--allow-imports").returncode == 0


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_the_nearest_spelling(tmp_path):
    line = refused(2, "run", "digits", "--out", tmp_path / "s", "--set", "model.widht=32")
    assert "model.widht" in line
    assert '"width"' in line or "'width'" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.width=wide", ["model.width", "wide"]),
        ("learning_rate=-0.1", ["learning_rate", "-0.1"]),
        ("learning_rate=[0.1, nan]", ["learning_rate", "nan"]),
        ("stop.steps=0", ["stop.steps", "0"]),
        ("seed", ["seed"]),
    ],
)
def test_a_bad_value_is_named_with_its_key(tmp_path, override, parts):
    line = refused(2, "run", "digits", "--out", tmp_path / "s", "--set", override)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "s").exists()


def test_a_missing_study_or_dataset_is_not_found(tmp_path):
    assert "digits" in refused(4, "run", "digit", "--out", tmp_path / "s")
    missing = f"data.file={tmp_path / 'missing.npz'}"
    assert "missing.npz" in refused(4, "run", "digits", "--out", tmp_path / "s", "--set", missing)
    assert not (tmp_path / "s").exists()


def test_a_model_by_import_path_needs_permission(tmp_path):
    line = refused(2, "run", "smoke", "--out", tmp_path / "s", "--set", 'model={import="os:getcwd"}')
    assert "--allow-imports" in line
    assert not (tmp_path / "s").exists()


def test_a_users_own_model_and_data_train(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build(input_shape, outputs, hidden):\n"
        "    return nn.Sequential(nn.Linear(*input_shape, hidden), nn.SELU(), nn.Linear(hidden, outputs))\n"
    )
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "xy.npz", x=rng.normal(size=(12, 3)), y=rng.choice([-1.0, 1.0], 12))
    overrides = [
        "data.file=xy.npz", 'model={import="mine:build", options={hidden=4}}', "stop.steps=5", "record.eigenpairs=3",
        "learning_rate=0.1",
    ]  # fmt: skip
    result = subprocess.run(
        [COMMAND, "run", "smoke", "--out", "s", "--allow-imports", *sets(*overrides)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (run,) = list_runs(tmp_path / "s")
    assert run.read("snapshots/ntk").shape[1:] == (12, 12)


def test_a_root_that_cannot_be_written_or_is_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused(2, "run", "smoke", "--out", tmp_path / "file" / "s", "-q")
    assert "cannot create" in line
    assert "is a file" in line
    assert refused(2, "plan", "smoke", "--out", tmp_path / "file" / "s") == line
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("mine")
    for command in ("run", "plan"):
        assert "is not a store" in refused(2, command, "smoke", "--out", tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize("command", [["status"], ["analyze", "-q"], ["sql", "-q"], ["plot", "-q"], ["report", "-q"],
                                     ["claims", "-q"], ["verify", "-q"]], ids=lambda c: c[0])  # fmt: skip
def test_a_root_that_is_no_store_is_refused_and_left_alone(tmp_path, command):
    name, *options = command
    query = ["select 1"] if name == "sql" else []
    assert "does not exist" in refused(4, name, tmp_path / "nowhere", *query, *options)
    (tmp_path / "photos").mkdir()
    assert "is not a store" in refused(2, name, tmp_path / "photos", *query, *options)
    assert list((tmp_path / "photos").iterdir()) == []


@pytest.mark.parametrize(
    "query",
    ["selekt 1", "select * from no_such_table", "drop table runs", "insert into meta select * from meta",
     "copy runs to 'out.csv'", "select * from read_csv('/etc/passwd')", "attach 'other.db'", ""],
    ids=["syntax", "table", "drop", "insert", "copy", "file", "attach", "empty"],
)  # fmt: skip
def test_bad_or_writing_sql_is_one_line_and_changes_nothing(store, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = rows("sql", store, "select count(*) as n from runs")
    refused(2, "sql", store, query, "-q")
    assert rows("sql", store, "select count(*) as n from runs") == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_one_line(tmp_path, monkeypatch, device):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = refused(2, "run", "smoke", "--out", tmp_path / "s", *sets(f"compute.device={device}"))
    assert "torch finds no such device" in line
    assert not (tmp_path / "s").exists()


def test_a_model_that_cannot_be_imported_is_one_line(tmp_path):
    override = 'model={import="no_such_module:build"}'
    line = refused(2, "run", "smoke", "--out", tmp_path / "s", "--allow-imports", "--set", override)
    assert "importing no_such_module failed" in line
    assert not (tmp_path / "s").exists()


def test_an_interrupt_before_anything_was_measured_says_so(tmp_path, monkeypatch):
    def stopped(runs, root, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return iter([Outcome(run.run_id, "interrupted") for run in runs])

    monkeypatch.setattr("pipeline.sweep.sweep", stopped)
    result = call("run", "smoke", "--out", tmp_path / "s")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; nothing was measured yet"
    assert "done" not in result.stderr


def test_an_edited_title_and_claims_reach_runs_that_are_done(tmp_path):
    overrides = sets("stop.steps=3", "learning_rate=0.1")
    call("run", "smoke", "--out", tmp_path / "s", *overrides)
    head = list_runs(tmp_path / "s")[0].head
    result = call("run", "smoke", "--out", tmp_path / "s", *overrides, *sets("title=another"))
    assert result.exit_code == 0
    assert "nothing to do" in result.stderr
    (run,) = list_runs(tmp_path / "s")
    assert run.attrs["title"] == "another"
    assert run.head == head
    assert rows("verify", tmp_path / "s", "--deep") == []


def test_status_names_a_run_that_cannot_be_read_and_goes_on(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    record = next((tmp_path / "copy").glob("runs/lr-0.1_seed-0*/zarr.json"))
    record.write_text("{}")
    listed = rows("status", tmp_path / "copy")
    assert [row["status"] for row in listed] == ["unreadable", "complete", "complete", "complete"]
    assert "zarr.json" in listed[0]["error"]


@pytest.mark.parametrize("command", ["plan", "run"])
def test_without_the_packages_for_training_the_extra_is_named(tmp_path, monkeypatch, command):
    monkeypatch.setattr("pipeline.cli.find_spec", lambda name: None)
    assert "pip install '.[train]' in the folder of ntk-eos" in refused(
        1, command, "smoke", "--out", tmp_path / "s", "-q"
    )


def test_an_unknown_run_is_not_found(store):
    assert "lr-9" in refused(4, "verify", store, "lr-9", "-q")


def test_a_run_that_somebody_else_writes_is_locked(tmp_path):
    arguments = [
        "run",
        "smoke",
        "--out",
        tmp_path / "s",
        *sets("learning_rate=0.05", "stop.steps=1000000", "stop.loss=1e-12"),
    ]
    with subprocess.Popen([COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True) as writer:
        patience = time.monotonic() + 60
        while not any((tmp_path / "s").glob("runs/*.zarr/run.json")) and time.monotonic() < patience:
            time.sleep(0.05)
        line = refused(5, *arguments)
        writer.send_signal(signal.SIGINT)
        said = writer.communicate(timeout=60)[1]
    assert "is being written by process" in line
    assert line.count("lr-0.05_seed-0") == 1
    assert writer.returncode == 130
    assert "done in" not in said
    assert "what was measured is saved" in said
    assert [row["status"] for row in rows("status", tmp_path / "s")] == ["interrupted"]


def test_a_failed_claim_exits_1(store, monkeypatch):
    from analysis import judge
    from analysis.claims import Verdict

    judged = judge.judge_store(store)
    failed = [type(judged[0])(**{**vars(judged[0]), "verdict": Verdict("failed", "0 of 1", 1)})]
    monkeypatch.setattr(judge, "judge_store", lambda root: failed)
    result = call("claims", store)
    assert result.exit_code == 1
    assert "failed" in result.stdout


def test_usage_errors_exit_2():
    assert call("run").exit_code == 2
    assert call("frobnicate").exit_code == 2
    assert call("plot", "x", "--x", "colour").exit_code == 2


def test_exit_codes_in_the_help_are_those_of_the_errors():
    from pipeline import errors

    text = click.unstyle(call("--help").output)
    codes = {
        error.exit_code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)
    }
    assert codes == {1, 2, 4, 5}
    assert all(f"{code} " in text.partition("Exit codes:")[2] for code in codes)
