"""A diverged run is a result, for every update rule and every kernel: it ends at its first bad step, rows before stay.

Learning rates go from below the line to far beyond it, so that what overflows first is the loss, the gradient, a kernel
or only what float32 can hold of it. No eigensolver, of whatever library, may see a value that is not finite.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import scipy.linalg
import torch
from command import call
from sizes import sizes
from torch import nn

from pipeline.cadence import Cadence
from pipeline.config import load_study
from pipeline.kernels import KERNELS
from pipeline.optim import UPDATES
from pipeline.record import Probe, Recorder
from pipeline.store import list_runs
from pipeline.train import train
from pipeline.verify import verify

EIGENSOLVERS = [
    *((np.linalg, name) for name in ("eigh", "eigvalsh", "eig", "eigvals", "svd", "cholesky")),
    *((scipy.linalg, name) for name in ("eigh", "eigvalsh", "eigh_tridiagonal", "svd", "cholesky")),
    *((torch.linalg, name) for name in ("eigh", "eigvalsh", "svd", "cholesky")),
]
OPTIONS = {
    "gd": {}, "sgd": {"batch_size": 7}, "heavy_ball": {"momentum": 0.9}, "nesterov": {"momentum": 0.9}, "rmsprop": {},
    "adam": {},
}  # fmt: skip
# From below the line on, to where one step leaves the numbers that float32 has.
RATES = (1e-2, 3.0, 1e3, 1e8, 1e18, 1e37)
OTHERS = [
    "ntk", "conjugate", {"name": "weighted", "weights": {"0.weight": 2.0}}, {"name": "nngp", "depth": 1},
    {"name": "infinite_ntk", "depth": 1},
]  # fmt: skip


@contextmanager
def watched():
    """Every eigensolver refuses what is not finite; yields how often one was called."""
    calls = []

    def watching(solve):
        def called(*arrays, **options):
            matrices = [np.asarray(array) for array in arrays if np.ndim(array) > 0]
            assert all(np.isfinite(matrix).all() for matrix in matrices), f"{solve.__name__} met what is not finite"
            calls.append(solve.__name__)
            return solve(*arrays, **options)

        return called

    with ExitStack() as stack:
        for owner, name in EIGENSOLVERS:
            stack.enter_context(patch.object(owner, name, watching(getattr(owner, name))))
        yield calls


def assert_it_is_a_result(run):
    """Finite values alone, each row digested, nothing damaged."""
    for group in run.lengths:
        for name, node in run.arrays(group).items():
            if node["data_type"].startswith("float"):
                assert np.isfinite(run.read(f"{group}/{name}")).all(), f"{group}/{name}"
    steps = run.read("train/step")
    np.testing.assert_array_equal(steps, np.arange(len(steps)))
    assert run.attrs["last_step"] == (steps[-1] if len(steps) else None)
    assert verify(run, deep=True) == []


@sizes("steps,rates", short=(6, RATES[4:5]), full=(60, RATES))
def test_every_update_rule_diverges_as_a_result(tmp_path, monkeypatch, measured, steps, rates):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    ends, reasons, calls = {"complete": 0, "diverged": 0}, set(), 0
    assert OPTIONS.keys() == UPDATES.keys()
    for rule, options in OPTIONS.items():
        overrides = [
            f"learning_rate={list(rates)}", f"update.name={rule}", *(f"update.{key}={options[key]}" for key in options),
            "data.n=12", "model.width=5", 'model.activation="relu"', f"stop.steps={steps}", "stop.loss=1e-12",
            "record.eigenpairs=3", "record.snapshots={every=5}", "record.spectra={every=2}", "record.hessian={every=3}",
            "record.loss_levels=[]", 'record.kernels=["ntk", "conjugate"]',
        ]  # fmt: skip
        for config in load_study("smoke", overrides).runs():
            with watched() as solved:
                assert train(config, str(tmp_path / rule)) in ends
            calls += len(solved)
        for run in list_runs(tmp_path / rule):
            assert_it_is_a_result(run)
            ends[run.status] += 1
            if run.status == "diverged":
                reasons.add(run.attrs["stop_reason"].partition(" at ")[0].partition(" has ")[0])
                assert len(run.read("train/step")) <= steps
    assert ends["diverged"] >= len(UPDATES)
    assert ends["complete"] >= len(UPDATES) or len(rates) == 1
    assert calls > 0
    measured(
        "R13", "update rules at learning rates across the line", rules=len(UPDATES), runs=sum(ends.values()), **ends,
        values_not_finite=0, eigensolvers_called=calls, eigensolvers_called_on_one=0, reasons=len(reasons),
    )  # fmt: skip


def spoilt(make, bad, at):
    """A kernel of the registry that has one bad pair of entries from its evaluation number `at` on."""

    def entry(*examples, **options):
        kernel, evaluated = make(*examples, **options), []

        def evaluate(model):
            evaluated.append(None)
            values = kernel(model)
            if len(evaluated) > at:
                values = values.clone()
                values[0, 1] = values[1, 0] = bad
            return values

        return evaluate

    return entry


@pytest.mark.parametrize("kernel", OTHERS, ids=lambda kernel: kernel if isinstance(kernel, str) else kernel["name"])
def test_every_kernel_diverges_as_a_result(tmp_path, monkeypatch, measured, kernel):
    """One pair of entries is enough; of 50 examples, where LAPACK would answer with numbers."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    name = kernel if isinstance(kernel, str) else kernel["name"]
    at = 0 if name in ("nngp", "infinite_ntk") else 3  # a kernel that does not change is evaluated once
    make, x, calls = KERNELS[name], torch.linspace(-1, 1, 150, dtype=torch.float64).reshape(50, 3).sin(), 0
    bad_values = (np.nan, np.inf, 1e39)  # the last one is finite until it is stored in float32
    for bad in bad_values:
        monkeypatch.setitem(KERNELS, name, spoilt(make, bad, at))
        recorder = Recorder(
            str(tmp_path / str(bad)), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
            Probe(x, x[:, :1].sign()), identity={}, learning_rate=0.1, seed=0, steps=8, eigenpairs=3,
            kernels=["ntk"] if name == "ntk" else ["ntk", kernel],
            cadences={group: Cadence(every=1) for group in ("snapshots", "spectra", "scalars")},
        )  # fmt: skip
        with watched() as solved, recorder:
            for step in recorder:
                recorder.record(step, loss=1.0)
        (run,) = list_runs(tmp_path / str(bad))
        assert run.status == "diverged"
        assert run.lengths == dict.fromkeys(run.lengths, at)
        assert_it_is_a_result(run)
        calls += len(solved)
    measured(
        "R13", f"one pair of NaN, infinite or too large for float32 in a kernel: {name}", runs=len(bad_values),
        rows_before=at, rows_kept=at, eigensolvers_called=calls, eigensolvers_called_on_one=0,
    )  # fmt: skip


def test_every_kernel_is_among_them():
    assert {kernel if isinstance(kernel, str) else kernel["name"] for kernel in OTHERS} == KERNELS.keys()


@pytest.mark.reliability
def test_the_command_ends_with_0(tmp_path):
    overrides = ("learning_rate=1e8", "data.n=12", "stop.steps=30", "model.activation=relu")
    done = call("run", "smoke", "--out", tmp_path, "-q", *(word for key in overrides for word in ("--set", key)))
    assert done.exit_code == 0, done.output
    assert [run.status for run in list_runs(tmp_path)] == ["diverged"]
