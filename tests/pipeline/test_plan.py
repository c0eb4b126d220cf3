"""Rows, bytes, state and time of what `run` would do."""

import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_files import MINIMAL, assert_one_plain_line, fuzz, message, one

from pipeline.config import File, load_study
from pipeline.errors import InputError, MissingError, NtkEosError
from pipeline.plan import BASE_BYTES, START_SECONDS, Plan, plan_runs, plan_study, total
from pipeline.train import train


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float64", 8)])
def test_bytes_are_those_of_every_array(study, tmp_path, dtype, size):
    path = save(tmp_path / "xy.npz", x=np.zeros((9, 3, 2)), y=np.zeros((9, 2)))
    run = one(study, f"data.file={path}", "data.n=7", "model.width=5", "model.depth=1", "record.eigenpairs=4",
              "record.snapshots={every=5}", "record.spectra={every=2}", "stop.steps=20", f"compute.dtype={dtype}",
              "record.loss_levels=[0.1]")  # fmt: skip
    (planned,) = plan_runs([run], "nowhere")
    n, c, k, p = 7, 2, 4, (6 + 1) * 5 + (5 + 1) * 2
    assert (planned.samples, planned.outputs, planned.parameters) == (n, c, p)
    assert planned.rows == {"scalars": 21, "snapshots": 5 + 2, "spectra": 11 + 2, "train": 21}
    row = 4 * 8 + 16  # step, learning_rate, seed, loss, and the digest
    scalars = 4 * 8
    spectra = 2 * 8 * k + 8 + 4 * n * k + size * n * c
    kernels = 4 * n * n + size * p
    expected = (
        21 * (row + scalars) + 13 * (row + spectra) + 7 * (row + kernels + spectra + scalars) + 21 * (row + 10 * 8)
    )
    expected += 8 * n + size * (n * 6 + n * c)
    assert planned.nbytes == expected


def test_what_is_recorded_on_request_is_counted(study, tmp_path):
    path = save(tmp_path / "xy.npz", x=np.zeros((9, 3)), y=np.zeros((9, 2)))
    plain = [f"data.file={path}", "model.width=5", "model.depth=1", "record.eigenpairs=4", "stop.steps=20"]
    n, c, k, tensors = 9, 2, 4, 4
    asked = {
        "record.layers=true": ("snapshots", 4 * tensors * n * n),
        "record.ntk_full=true": ("snapshots", 4 * (n * c) ** 2),
        'record.kernels=["conjugate","ntk"]': ("snapshots", 4 * n * n + 2 * 8 * k + 8 + 4 * n * k + 4 * 8),
    }
    (bare,) = plan_runs([one(study, *plain)], "nowhere")
    for override, (group, row) in asked.items():
        (planned,) = plan_runs([one(study, *plain, override)], "nowhere")
        expected = planned.rows[group] * row
        if "kernels" in override:
            expected += planned.rows["spectra"] * (2 * 8 * k + 8 + 4 * n * k) + planned.rows["scalars"] * 4 * 8
        assert planned.nbytes - bare.nbytes == expected, override
    (planned,) = plan_runs([one(study, *plain, "record.hessian={every=5}", "record.hessian_eigenpairs=2")], "nowhere")
    assert planned.rows["hessian"] == 5 + 1
    assert planned.nbytes - bare.nbytes == 6 * (4 * 8 + 16 + 2 * 2 * 8 + 8)
    (adam,) = plan_runs(
        [one(study, *plain, "record.hessian={every=5}", "record.hessian_eigenpairs=2", "update.name=adam")], "nowhere"
    )
    assert adam.nbytes - planned.nbytes == 6 * 8
    (midpoint,) = plan_runs([one(study, *plain, "process=midpoint")], "nowhere")
    assert midpoint.nbytes - bare.nbytes == 21 * 8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["record.ntk_full=true"], "record.ntk_full = true: the data have one output"),
        (["record.hessian={}", "record.hessian_eigenpairs=9000"],
         "record.hessian_eigenpairs = 9000: must be at most p = 8385 parameters"),
        (["model.name=cnn"], "model.name = cnn: one example has shape (64,); must be (channels, height, width)"),
        (["update.name=sgd", "update.batch_size=301"], "update.batch_size = 301: must be at most n = 300"),
    ],
    ids=["one_output", "too_many", "no_images", "batch"],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is_written(study, overrides, said):
    assert said in message(lambda: plan_runs([one(study, *overrides)], "nowhere"), InputError)


def test_an_imported_model_is_planned_without_its_parameters(study):
    run = one(study)
    (imported,) = plan_runs([one(study, "model.import=a.b:c")], "nowhere")
    (known,) = plan_runs([run], "nowhere")
    assert imported.parameters is None
    assert imported.nbytes == known.nbytes - known.rows["snapshots"] * 4 * 8385


def test_plan_reads_nothing_but_headers_and_sums_up(study, tmp_path):
    # the arrays of this file are headers without values
    with zipfile.ZipFile(tmp_path / "xy.npz", "w") as archive:
        for name, shape in (("x", (10**6, 12)), ("y", (10**6,))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_2_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    planned = plan_runs(study(MINIMAL, f"data.file={tmp_path}/xy.npz").runs(), "nowhere")
    assert [(run.samples, run.outputs) for run in planned] == [(10**6, 1)] * 4


def test_plan_refuses_data_that_cannot_be_used(study, tmp_path):
    good = {"x": np.zeros((30, 2)), "y": np.zeros(30)}

    def said(error=InputError, *overrides, **arrays):
        path = save(tmp_path / "xy.npz", **arrays)
        text = message(lambda: plan_runs(study(MINIMAL, f"data.file={path}", *overrides).runs(), "nowhere"), error)
        assert_one_plain_line(text)
        return text

    assert len(plan_runs(study(MINIMAL, f"data.file={save(tmp_path / 'xy.npz', **good)}").runs(), "nowhere")) == 4
    assert "has no array y" in said(x=good["x"])
    assert "must be (n, features...)" in said(x=np.zeros(30), y=good["y"])
    assert "must be (n, features...)" in said(x=good["x"], y=np.zeros(29))
    assert "must be (n, features...)" in said(x=np.zeros((30, 0)), y=good["y"])
    assert "must be real numbers" in said(x=good["x"], y=np.zeros(30, complex))
    assert "must be real numbers" in said(x=good["x"], y=np.array([{}] * 30))
    assert "data.n = 31: must be at most 30" in said(InputError, "data.n=31", **good)
    assert "record.eigenpairs = 31: must be at most n = 30" in said(InputError, "record.eigenpairs=31", **good)
    text = message(
        lambda: plan_runs(study(MINIMAL, f"data.file={tmp_path}/absent.npz").runs(), "nowhere"), MissingError
    )
    assert "absent.npz: no such file" in text


@fuzz
@given(st.data())
def test_a_damaged_data_file_is_planned_or_one_line(tmp_path, data):
    path = save(tmp_path / "xy.npz", x=np.zeros((4, 2)), y=np.zeros(4))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        File(file=str(path)).shape()
    except NtkEosError as error:
        assert_one_plain_line(str(error))


def states(root, *overrides):
    return {run.config.run_id: run.state for run in plan_runs(load_study("smoke", overrides).runs(), str(root))}


def test_the_state_of_a_run_is_what_the_store_says(tmp_path):
    first, second = load_study("smoke", ["stop.steps=8"]).runs()
    asked = iter([False, False, True])
    train(first, str(tmp_path))
    train(second, str(tmp_path), should_stop=lambda: next(asked))
    assert states(tmp_path, "stop.steps=8") == {first.run_id: "done", second.run_id: "resume"}
    assert states(tmp_path, "stop.steps=9") == {first.run_id: "continue", second.run_id: "resume"}
    assert set(states(tmp_path / "elsewhere").values()) == {"new"}


def test_the_time_grows_with_the_steps_left(tmp_path):
    seconds = [plan_study(load_study("smoke", [f"stop.steps={n}"]), str(tmp_path), 1).seconds for n in (10**3, 10**6)]
    assert seconds[1] - START_SECONDS > 100 * (seconds[0] - START_SECONDS) > 0


def test_the_time_is_that_of_workers_who_take_the_next_run_when_they_are_free(tmp_path):
    runs = plan_runs(
        load_study("smoke", ["stop.steps=30", "seed=[0, 1, 2, 3, 4]", "learning_rate=0.1"]).runs(), "nowhere"
    )
    lengths = [10, 30, 20, 20, 10]
    planned = tuple(replace(run, steps_left=steps) for run, steps in zip(runs, lengths, strict=True))
    assert Plan(planned, 2, 0.1).seconds == pytest.approx(START_SECONDS + 5)  # 10 + 20 + 20 beside 30 + 10
    assert Plan(planned, 9, 0.1).seconds == pytest.approx(START_SECONDS + 3)
    assert [row["seconds"] for row in Plan(planned, 2, 0.1).rows()] == pytest.approx([1, 3, 2, 2, 1])
    assert total([Plan(planned, 2, 0.1)]) == {
        "runs": 5, "bytes": 5 * planned[0].nbytes, "seconds": pytest.approx(START_SECONDS + 5),
    }  # fmt: skip
    assert {row["seconds"] for row in Plan(planned, 2, None).rows()} == {None}


def test_what_is_done_costs_nothing(tmp_path):
    study = load_study("smoke", ["stop.steps=3", "learning_rate=0.1"])
    train(study.runs()[0], str(tmp_path))
    plan = plan_study(study, str(tmp_path), 1)
    assert total([plan]) == {"runs": 0, "bytes": 0, "seconds": 0.0}
    assert [row["seconds"] for row in plan.rows()] == [0.0]
    assert plan.summary() == "nothing to do: all 1 runs are done"


def test_a_study_that_imports_its_model_has_no_time():
    plan = plan_study(load_study("smoke", ["model.import=no_such_package:net"]), "nowhere", 1)
    assert plan.seconds is None
    assert "time unknown" in plan.summary()


def test_a_run_that_diverges_at_once_has_no_time():
    relu = ["model.activation=relu", "model.depth=2", "learning_rate=[1e30]"]
    plan = plan_study(load_study("smoke", relu), "nowhere", 1)
    assert plan.seconds is None


def test_steps_that_are_done_are_not_counted_again(tmp_path):
    first, second = load_study("smoke", ["stop.steps=8"]).runs()
    asked = iter([False] * 5 + [True])
    train(first, str(tmp_path), should_stop=lambda: next(asked))
    planned = plan_runs([first, second], str(tmp_path))
    assert [run.steps_left for run in planned] == [3, 8]


def test_other_data_under_the_same_name_are_not_done(study, tmp_path):
    rng = np.random.default_rng(0)
    path = save(tmp_path / "xy.npz", x=rng.normal(size=(8, 2)), y=rng.normal(size=8))
    run = one(study, f"data.file={path}", "record.eigenpairs=2", "stop.steps=3")
    train(run, str(tmp_path / "root"))
    assert plan_runs([run], str(tmp_path / "root"))[0].state == "done"
    save(path, x=rng.normal(size=(8, 2)), y=rng.normal(size=8))
    with pytest.raises(InputError, match="was recorded on other data"):
        plan_runs([run], str(tmp_path / "root"))


def test_a_kernel_that_no_memory_holds_is_refused_with_what_to_do(study, tmp_path, monkeypatch):
    path = save(tmp_path / "xy.npz", x=np.zeros((9, 3)), y=np.zeros((9, 2)))
    loaded = study(MINIMAL, f"data.file={path}", "record.eigenpairs=4")
    (planned, *_) = plan_runs(loaded.runs(), "nowhere")
    assert planned.memory == BASE_BYTES + 24 * 9**2 + 12 * 18**2
    assert planned.as_row()["memory"] == planned.memory
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=planned.memory - 1))
    with pytest.raises(InputError, match=r"its kernel of n = 9 examples takes 300\.0 MiB of memory, and this "
                                         r"machine has 300\.0 MiB: train on fewer \(data.n\)"):  # fmt: skip
        plan_study(loaded, "nowhere", 1)
