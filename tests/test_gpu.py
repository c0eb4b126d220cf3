"""Runs on a GPU against the same on a CPU, in float64; left out where torch finds no GPU."""

import numpy as np
import pytest
import torch
from distributed import LocalCluster

from pipeline import schema
from pipeline.config import RunConfig, load_study
from pipeline.remote import sweep_on
from pipeline.replay import replay
from pipeline.store import Run, list_runs, read_run, run_path
from pipeline.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Each machine's own: digests, and what an eigensolver leaves open.
OWN = ("digest", "eigenvector", "iterations", "residual")
IMAGES = "data.shape=image"
CASES = {
    "mlp": ["record.hessian={every=10}", "record.ntk_full=true", "record.layers=true", "data.target=ten"],
    "cnn": ["model={name='cnn',channels=[4,4],pooling='max'}", IMAGES],
    "resnet": ["model={name='resnet',width=4,blocks=[1]}", IMAGES],
    "vit": ["model={name='vit',dim=8,depth=1,heads=2,patch=4}", IMAGES],
    "deep_linear": ["model={name='deep_linear',width=6,depth=2}", "learning_rate=0.01"],
    "two_layer_linear": ["model={name='two_layer_linear',width=6}", "learning_rate=0.01"],
    "kernels": ["record.kernels=['ntk','conjugate',{name='nngp',depth=2},{name='infinite_ntk',depth=2}]"],
    "weighted": ["record.kernels=['ntk',{name='weighted',weights={'0.weight'=2.0}}]"],
    "held out": ["record.test=20"],
    "sgd": ["update={name='sgd',batch_size=16}"],
    "cross_entropy": ["loss={name='cross_entropy'}"],
    **{
        rule: [f"update={{name='{rule}'}}", "learning_rate=0.01"]
        for rule in ("heavy_ball", "nesterov", "adam", "rmsprop")
    },
    **{process: [f"process={process}"] for process in ("midpoint", "gradient_flow", "central_flow")},
}


def configured(device: str, *overrides: str) -> RunConfig:
    small = ["data.n=40", "model.width=8", "learning_rate=0.3", "stop={steps=20}", "record.eigenpairs=4",
             "record.loss_levels=[]", "compute.dtype=float64"]  # fmt: skip
    if any(one.startswith("model=") for one in overrides):
        small.remove("model.width=8")
    (run,) = load_study("smoke", [*small, *overrides, f"compute.device={device}"]).runs()
    return run


def trained(root, *overrides: str, device: str = "cuda") -> Run:
    run = configured(device, *overrides)
    assert train(run, str(root)) == "complete"
    return read_run(run_path(root, run.run_id))


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_gpu_holds_what_one_on_a_cpu_holds(tmp_path, name):
    here = trained(tmp_path / "cpu", *CASES[name], device="cpu")
    there = trained(tmp_path / "gpu", *CASES[name])
    for group in schema.GROUPS:
        for variable in here.arrays(group):
            if variable.endswith(OWN) or variable.startswith(("seconds", "wall")):
                continue
            expected, found = (run.read(f"{group}/{variable}") for run in (here, there))
            close = {"rtol": 1e-6, "atol": 1e-6 * np.abs(expected).max(), "err_msg": f"{group}/{variable}"}
            np.testing.assert_allclose(found, expected, **close)


@pytest.mark.parametrize("name", CASES)
def test_it_has_the_same_bits_again_and_when_it_was_stopped_on_the_way(tmp_path, name):
    whole = trained(tmp_path / "whole", *CASES[name], "compute.dtype=float32")
    run, asked = configured("cuda", *CASES[name], "compute.dtype=float32"), iter([False] * 7 + [True])
    assert train(run, str(tmp_path / "parts"), should_stop=lambda: next(asked)) == "interrupted"
    assert train(run, str(tmp_path / "parts")) == "complete"
    assert read_run(run_path(tmp_path / "parts", run.run_id)).head == whole.head


@pytest.mark.parametrize("tiled", [False, True])
def test_a_replayed_kernel_is_that_of_a_cpu(tmp_path, monkeypatch, tiled):
    if tiled:
        monkeypatch.setattr(schema, "TILED", 1)
        monkeypatch.setattr(schema, "TILE", 50)
    paths = [replay(trained(tmp_path / one, device=one).path, probe="test") for one in ("cpu", "cuda")]
    expected, found = (read_run(path) for path in paths)
    for variable in ("ntk", "ntk_train_cross", "frobenius_norm", "eigenvalue", "prediction", "ntk_sharpness"):
        values = expected.read(f"snapshots/{variable}")
        close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(values).max(), "err_msg": variable}
        np.testing.assert_allclose(found.read(f"snapshots/{variable}"), values, **close)


def test_a_stored_kernel_is_replayed_to_the_bit(tmp_path):
    run = trained(tmp_path)
    found = read_run(replay(run.path, probe="train", at="all"))
    np.testing.assert_array_equal(found.read("snapshots/ntk"), run.read("snapshots/ntk"))


def test_eigenpairs_without_a_kernel(tmp_path):
    runs = [trained(tmp_path / one, device=one) for one in ("cpu", "cuda")]
    found = [read_run(replay(run.path, probe="test", matrix_free=1e-8)) for run in runs]
    np.testing.assert_allclose(*(run.read("snapshots/eigenvalue") for run in found), rtol=1e-7)


def test_a_worker_that_offers_the_gpu_trains_there(tmp_path):
    alone = trained(tmp_path / "alone")
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0", resources={"GPU": 1}
    ) as local:
        (outcome,) = sweep_on(local.scheduler_address, [configured("cuda")], str(tmp_path / "sweep"))
    assert outcome.status == "complete"
    (run,) = list_runs(tmp_path / "sweep")
    assert run.head == alone.head
    assert run.attrs["provenance"]["device"].startswith("cuda")
