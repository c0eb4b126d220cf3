"""The Recorder against dense recomputation, and its resuming, continuing and diverging."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from pipeline import measure as measure_module
from pipeline import spectra
from pipeline.cadence import Cadence
from pipeline.errors import InputError
from pipeline.kernels import infinite_kernels
from pipeline.losses import mse
from pipeline.record import DEFAULT_CADENCES, Probe, Recorder
from pipeline.store import find_run, list_runs

N, STEPS = 12, 30


def task(outputs: int = 1, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    y = torch.sign(torch.randn(n, outputs, generator=generator))
    return x, y


def network(outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def loop(root, *, outputs=1, n=N, stop_after=None, learning_rate=0.1, crash_after=None, **options):
    """A user's own training loop; returns the recorded run."""
    x, y = task(outputs, n)
    model = network(outputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    options = {"steps": STEPS, "loss_levels": [0.4, 0.2], "eigenpairs": 4, "criterion": mse} | options
    recorder = Recorder(
        str(root), model, Probe(x, y), identity={"model": "mine"}, learning_rate=learning_rate, seed=0, **options
    )
    with recorder:
        for step in recorder:
            loss = 0.5 * ((model(x) - y) ** 2).sum(1).mean()
            if not recorder.record(step, loss=loss.item()):
                break
            if step == crash_after:
                raise RuntimeError("the user's loop has a bug")
            if step == stop_after:
                recorder.interrupt(step)
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return find_run(root, recorder.run_id)


def test_rows_stand_where_the_cadences_the_levels_and_the_ends_put_them(tmp_path):
    cadences = {"snapshots": Cadence(log=2), "spectra": Cadence(every=7), "scalars": Cadence(every=3)}
    run = loop(tmp_path, cadences=cadences)
    losses = run.read("train/loss")
    crossings = {int(np.argmax(losses <= level)) for level in (0.4, 0.2) if (losses <= level).any()}
    assert crossings - {0}, "the task must cross a level after the start, or this shows nothing"
    for group, cadence in cadences.items():
        expected = sorted({s for s in range(STEPS + 1) if cadence.due(s)} | crossings | {0, STEPS})
        assert run.read(f"{group}/step").tolist() == expected
    assert run.read("train/step").tolist() == list(range(STEPS + 1))
    assert run.attrs["stop_reason"] == "steps"


@pytest.mark.parametrize("outputs", [1, 3], ids=lambda c: f"outputs={c}")
def test_every_variable_equals_a_dense_recomputation_from_the_stored_parameters(tmp_path, outputs):
    run = loop(tmp_path, outputs=outputs, cadences={"snapshots": Cadence(every=10)})
    x, y = task(outputs)
    for row in range(run.lengths["snapshots"]):
        model = network(outputs)
        stored = torch.from_numpy(run.read("snapshots/parameter", row, row + 1)[0])
        nn.utils.vector_to_parameters(stored, model.parameters())
        model, inputs, target = model.double(), x.double(), y.double().numpy()
        jacobian = []
        for i in range(N):
            for c in range(outputs):
                gradients = torch.autograd.grad(model(inputs[i : i + 1])[0, c], list(model.parameters()))
                jacobian.append(torch.cat([g.reshape(-1) for g in gradients]).numpy())
        full = np.array(jacobian) @ np.array(jacobian).T
        kernel = np.einsum("icjc->ij", full.reshape(N, outputs, N, outputs))
        values = np.linalg.eigvalsh(kernel)[::-1][:4]

        def read(name, row=row):
            return run.read(f"snapshots/{name}", row, row + 1)[0]

        np.testing.assert_allclose(read("ntk"), kernel, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(read("eigenvalue"), values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(read("frobenius_norm"), np.linalg.norm(kernel), rtol=1e-6)
        np.testing.assert_allclose(read("trace"), np.trace(kernel), rtol=1e-6)
        np.testing.assert_allclose(read("target_energy"), np.trace(target.T @ kernel @ target), rtol=1e-6)
        np.testing.assert_allclose(read("ntk_sharpness"), np.linalg.eigvalsh(full)[-1] / N, rtol=1e-6)
        np.testing.assert_allclose(read("prediction"), model(inputs).detach().numpy(), rtol=1e-5, atol=1e-6)
        vectors = read("eigenvector").astype(np.float64)
        np.testing.assert_allclose(kernel @ vectors, vectors * values, atol=2e-5 * values[0])
        assert (vectors[np.abs(vectors).argmax(0), np.arange(4)] > 0).all()


def test_the_kernel_is_symmetric_and_the_probe_is_kept(tmp_path):
    run = loop(tmp_path)
    kernels = run.read("snapshots/ntk")
    np.testing.assert_array_equal(kernels, kernels.transpose(0, 2, 1))
    x, y = task()
    np.testing.assert_array_equal(run.read("probe/input"), x.numpy())
    np.testing.assert_array_equal(run.read("probe/target"), y.numpy())
    names, shapes = (run.node("snapshots/parameter")["attributes"][key] for key in ("names", "shapes"))
    assert dict(zip(names, shapes, strict=True)) == {k: list(v.shape) for k, v in network().named_parameters()}


@pytest.mark.parametrize("stops", [[0], [3, 4], [7, 15, 29]], ids=str)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stops):
    whole = loop(tmp_path / "whole")
    for stop in stops:
        assert loop(tmp_path / "parts", stop_after=stop).attrs["last_step"] == stop
    parts = loop(tmp_path / "parts")
    assert parts.head == whole.head
    assert parts.attrs["commits"] > whole.attrs["commits"]


def test_a_crash_loses_only_what_was_not_committed(tmp_path):
    whole = loop(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="has a bug"):
        loop(tmp_path / "parts", crash_after=9, commit_seconds=1e-9)
    run = list_runs(tmp_path / "parts")[0]
    assert run.status == "failed"
    assert "the user's loop has a bug" in run.heartbeat["error"]
    assert run.attrs["last_step"] == 9
    assert loop(tmp_path / "parts").head == whole.head


def test_how_often_rows_are_committed_changes_no_bit(tmp_path):
    assert loop(tmp_path / "a", commit_seconds=1e-9).head == loop(tmp_path / "b").head


def test_a_finished_run_is_left_alone_and_more_steps_continue_it(tmp_path):
    first = loop(tmp_path)
    again = loop(tmp_path)
    assert again.head == first.head
    assert again.attrs["commits"] == first.attrs["commits"]

    x, y = task()
    model = network()
    with Recorder(
        str(tmp_path), model, Probe(x, y), identity={"model": "mine"}, learning_rate=0.1, seed=0,
        steps=STEPS + 5, loss_levels=[0.4, 0.2], eigenpairs=4,
    ) as recorder:  # fmt: skip
        assert recorder.finished
        recorder.extend()
        steps = [step for step in recorder if recorder.record(step, loss=0.1)]
    assert steps == list(range(STEPS, STEPS + 5))
    run = list_runs(tmp_path)[0]
    assert run.status == "complete"
    assert run.attrs["last_step"] == STEPS + 5


@pytest.mark.parametrize("where", ["loss", "kernel"])
def test_a_diverged_run_keeps_its_rows_and_reaches_no_eigensolver(tmp_path, monkeypatch, where):
    real, finite = measure_module.eigenpairs, []

    def watched(kernel, k, **options):
        finite.append(bool(np.isfinite(kernel).all()))
        return real(kernel, k, **options)

    monkeypatch.setattr(measure_module, "eigenpairs", watched)
    x, y = task()
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    with Recorder(
        str(tmp_path), model, Probe(x, y), identity={}, learning_rate=9.0, seed=0, steps=STEPS,
        cadences={name: Cadence(every=1) for name in ("snapshots", "spectra", "scalars")}, eigenpairs=4,
    ) as recorder:  # fmt: skip
        for step in recorder:
            if step == 5 and where == "kernel":
                with torch.no_grad():
                    model[0].weight.fill_(1e25)
            go_on = recorder.record(step, loss=math.nan if step == 5 and where == "loss" else 1.0)
            if not go_on:
                break
    run = list_runs(tmp_path)[0]
    assert run.status == "diverged"
    assert run.lengths == dict.fromkeys(run.lengths, 5)
    assert finite == [True] * len(finite)
    for group in run.lengths:
        for name, node in run.arrays(group).items():
            assert node["data_type"].startswith(("int", "uint")) or np.isfinite(run.read(f"{group}/{name}")).all()


def test_a_diverged_run_stays_diverged(tmp_path):
    for _ in range(2):
        model = network()
        with Recorder(str(tmp_path), model, Probe(*task()), identity={}, learning_rate=1.0, seed=0, steps=9,
                      eigenpairs=2) as recorder:  # fmt: skip
            for step in recorder:
                recorder.record(step, loss=math.inf if step == 3 else 1.0)
        run = list_runs(tmp_path)[0]
        assert run.status == "diverged"
        assert run.lengths["train"] == 3


def test_extra_state_comes_back_with_the_model(tmp_path):
    model, momentum = network(), torch.zeros(3)
    options = {"identity": {}, "learning_rate": 0.1, "seed": 0, "steps": 9, "eigenpairs": 2}
    with Recorder(str(tmp_path), model, Probe(*task()), state=lambda: {"momentum": momentum}, **options) as recorder:
        for step in recorder:
            recorder.record(step, loss=1.0)
            momentum += 1
            with torch.no_grad():
                model[0].bias += 1
            if step == 4:
                recorder.record(step + 1, loss=1.0)
                recorder.interrupt(step + 1)
                break
    fresh = network()
    with Recorder(str(tmp_path), fresh, Probe(*task()), **options) as recorder:
        assert next(iter(recorder)) == 5
        torch.testing.assert_close(recorder.restored_state["momentum"], torch.full((3,), 5.0))
        torch.testing.assert_close(fresh[0].bias, model[0].bias, rtol=0, atol=0)


def test_tied_weights_are_checkpointed(tmp_path):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 1))
    with Recorder(str(tmp_path), model, Probe(*task()), identity={}, learning_rate=0.1, seed=0, steps=2,
                  eigenpairs=2) as recorder:  # fmt: skip
        for step in recorder:
            recorder.record(step, loss=1.0)
    assert list_runs(tmp_path)[0].status == "complete"


def test_another_environment_warns_and_is_noted(tmp_path, monkeypatch):
    loop(tmp_path, stop_after=3)
    monkeypatch.setattr("pipeline.provenance._cpu", lambda: "another processor")
    with pytest.warns(UserWarning, match="another environment .*another processor"):
        run = loop(tmp_path)
    assert any("another processor" in change for change in run.attrs["environment_changes"])


def test_provenance_says_where_the_numbers_come_from(tmp_path):
    provenance = loop(tmp_path).attrs["provenance"]
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["threads"] == torch.get_num_threads()
    assert provenance["device"] == "cpu"
    assert len(provenance["dataset_digest"]) == 32
    assert provenance["command"]


def test_other_data_under_the_same_name_are_refused(tmp_path):
    loop(tmp_path, stop_after=3)
    x, y = task()
    recorder = Recorder(
        str(tmp_path), network(), Probe(x + 1, y), identity={"model": "mine"}, learning_rate=0.1, seed=0, steps=STEPS,
        eigenpairs=4, loss_levels=[0.4, 0.2],
    )  # fmt: skip
    with pytest.raises(InputError, match="was recorded on other data"):
        recorder.__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eigenpairs": N + 1}, f"eigenpairs = {N + 1}: must be from 1 to n = {N}"),
        ({"cadences": {"kernels": Cadence(every=1)}}, "cadence of 'kernels': groups are snapshots, spectra, scalars"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        loop(tmp_path, **options)


def test_a_recorder_that_is_not_open_says_so(tmp_path):
    recorder = Recorder(str(tmp_path), network(), Probe(*task()), identity={}, learning_rate=0.1, seed=0, steps=9,
                        eigenpairs=2)  # fmt: skip
    with pytest.raises(InputError, match="use it as `with recorder"):
        recorder.record(0, loss=1.0)


def test_a_run_reads_with_plain_xarray_while_it_grows(tmp_path):
    run = loop(tmp_path, stop_after=11)
    with xr.open_datatree(run.path, engine="zarr") as tree:
        assert tree["train"].step.values.tolist() == list(range(12))
        assert tree["scalars"].ntk_sharpness.notnull().all()


def test_a_loop_that_dies_early_starts_again_from_its_first_weights(tmp_path):
    whole = loop(tmp_path / "whole")
    x, y = task()
    model = network()
    options = {"identity": {"model": "mine"}, "learning_rate": 0.1, "seed": 0, "steps": STEPS,
               "loss_levels": [0.4, 0.2], "eigenpairs": 4}  # fmt: skip

    def attempt(crash: bool) -> None:
        """The same cell of a notebook, run twice on the same model."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Recorder(str(tmp_path / "cell"), model, Probe(x, y), **options) as recorder:
            for step in recorder:
                loss = 0.5 * ((model(x) - y) ** 2).sum(1).mean()
                recorder.record(step, loss=loss.item())
                if crash and step == 5:
                    raise RuntimeError("stopped early")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    with pytest.raises(RuntimeError, match="stopped early"):
        attempt(crash=True)
    attempt(crash=False)
    assert list_runs(tmp_path / "cell")[0].head == whole.head


def test_a_run_beyond_the_steps_now_asked_for_is_closed_where_it_stands(tmp_path):
    loop(tmp_path, stop_after=12)
    run = loop(tmp_path, steps=7)
    assert run.status == "complete"
    assert run.attrs["last_step"] == 12


def test_the_lease_is_given_back_whatever_happens_on_leaving(tmp_path, monkeypatch):
    recorder = Recorder(str(tmp_path), network(), Probe(*task()), identity={}, learning_rate=0.1, seed=0, steps=9,
                        eigenpairs=2)  # fmt: skip

    def full(*_, **__):
        raise OSError("disk full")

    recorder.__enter__()
    recorder.record(0, loss=1.0)
    monkeypatch.setattr("pipeline.store.Writer.heartbeat", full)
    with pytest.raises(OSError, match="disk full"):
        recorder.__exit__(None, None, None)
    assert list_runs(tmp_path)[0].status != "running"


def test_parameters_of_any_layout_are_checkpointed(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    model[0].weight = nn.Parameter(torch.randn(3, 5).T)
    with Recorder(str(tmp_path), model, Probe(*task()), identity={}, learning_rate=0.1, seed=0, steps=1,
                  eigenpairs=2) as recorder:  # fmt: skip
        for step in recorder:
            recorder.record(step, loss=1.0)
    assert list_runs(tmp_path)[0].status == "complete"


def test_attributes_follow_the_study_when_a_run_goes_on(tmp_path):
    loop(tmp_path, stop_after=3, attrs={"title": "old"})
    assert loop(tmp_path, attrs={"title": "new"}).attrs["title"] == "new"


@pytest.mark.parametrize(
    ("train", "given", "message"),
    [
        (("loss", "val_loss"), {}, r"train = 'val_loss': the group train has loss, accuracy, grad_norm"),
        (("loss", "accuracy"), {}, r"values beside the loss at step 0: got none, declared by train= were accuracy"),
        (("loss",), {"accuracy": 1.0}, r"got accuracy, declared by train= were none"),
    ],
)
def test_values_that_were_not_declared_or_not_given_are_named(tmp_path, train, given, message):
    def record() -> None:
        with Recorder(str(tmp_path), network(), Probe(*task()), identity={}, learning_rate=0.1, seed=0, steps=1,
                      eigenpairs=2, train=train) as recorder:  # fmt: skip
            recorder.record(0, loss=1.0, **given)

    with pytest.raises(InputError, match=message):
        record()


def test_a_probe_needs_two_dimensional_targets(tmp_path):
    x, y = task()
    with pytest.raises(InputError, match=r"probe of shapes \(12, 3\) and \(12,\): must be"):
        Recorder(
            str(tmp_path), network(), Probe(x, y[:, 0]), identity={}, learning_rate=0.1, seed=0, steps=1, eigenpairs=2
        )


# --- what is recorded on request -------------------------------------------------------------------------------------

EVERYTHING = {
    "kernels": ["ntk", "conjugate", {"name": "weighted", "weights": {"0": 2.0}}, {"name": "nngp", "depth": 2}],
    "layers": True,
    "cadences": {**DEFAULT_CADENCES, "snapshots": Cadence(every=10), "hessian": Cadence(every=4)},
    "hessian_eigenpairs": 2,
}


def jacobian(run, row: int, outputs: int) -> tuple[dict[str, np.ndarray], nn.Module]:
    """∂f/∂θ_l (n, c, p_l) of each tensor at a stored snapshot, in float64, example by example."""
    model = network(outputs)
    stored = torch.from_numpy(run.read("snapshots/parameter", row, row + 1)[0])
    nn.utils.vector_to_parameters(stored, model.parameters())
    model = model.double()
    found = {name: [] for name, _ in model.named_parameters()}
    for example in task(outputs)[0].double():
        for c in range(outputs):
            gradients = torch.autograd.grad(model(example[None])[0, c], list(model.parameters()))
            for name, gradient in zip(found, gradients, strict=True):
                found[name].append(gradient.reshape(-1).numpy())
    return {name: np.array(rows).reshape(N, outputs, -1) for name, rows in found.items()}, model


@pytest.mark.parametrize("outputs", [1, 3], ids=lambda c: f"outputs={c}")
def test_kernels_and_parts_equal_a_dense_recomputation(tmp_path, outputs):
    run = loop(tmp_path, outputs=outputs, ntk_full=outputs > 1, **EVERYTHING)
    x, y = task(outputs)
    for row in range(run.lengths["snapshots"]):
        jacobians, model = jacobian(run, row, outputs)

        def read(name, row=row):
            return run.read(f"snapshots/{name}", row, row + 1)[0]

        parts = {name: np.einsum("icp,jcp->ij", j, j) for name, j in jacobians.items()}
        features = model[:2](x.double()).detach().numpy()
        weighted = sum(part * (4.0 if name.startswith("0.") else 1.0) for name, part in parts.items())
        infinite = infinite_kernels(x, depth=2).nngp.numpy()
        for name, kernel in {"conjugate": features @ features.T, "weighted": weighted, "nngp": infinite}.items():
            np.testing.assert_allclose(read(f"{name}_ntk"), kernel, rtol=2e-5, atol=2e-6)
            values = np.linalg.eigvalsh(kernel)[::-1][:4]
            np.testing.assert_allclose(read(f"{name}_eigenvalue"), values, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(read(f"{name}_ntk_sharpness"), values[0] / N, rtol=1e-5)
            np.testing.assert_allclose(read(f"{name}_trace"), np.trace(kernel), rtol=1e-5)
            np.testing.assert_allclose(read(f"{name}_frobenius_norm"), np.linalg.norm(kernel), rtol=1e-5)
            energy = np.trace(y.numpy().T @ kernel @ y.numpy())
            np.testing.assert_allclose(read(f"{name}_target_energy"), energy, rtol=1e-4)
            vectors = read(f"{name}_eigenvector").astype(np.float64)
            np.testing.assert_allclose(kernel @ vectors, vectors * values, atol=3e-5 * values[0])
        names = run.node("snapshots/ntk_layer")["attributes"]["names"]
        for name, layer in zip(names, read("ntk_layer"), strict=True):
            np.testing.assert_allclose(layer, parts[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(read("ntk_layer").sum(0), read("ntk"), rtol=1e-5, atol=1e-6)
        if outputs > 1:
            whole = np.concatenate(list(jacobians.values()), axis=2)
            full = np.einsum("iap,jbp->iajb", whole, whole)
            np.testing.assert_allclose(read("ntk_full"), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 2], ids=lambda c: f"outputs={c}")
def test_the_hessian_is_that_of_the_loss(tmp_path, outputs):
    cadences = {**DEFAULT_CADENCES, "snapshots": Cadence(every=5), "hessian": Cadence(every=5)}
    run = loop(tmp_path, outputs=outputs, cadences=cadences, hessian_eigenpairs=2)
    assert run.read("hessian/step").tolist() == run.read("snapshots/step").tolist()
    x, y = (tensor.double() for tensor in task(outputs))
    for row in range(run.lengths["hessian"]):
        _, model = jacobian(run, row, outputs)
        shapes = {name: tensor.shape for name, tensor in model.named_parameters()}

        def loss(flat, model=model, shapes=shapes):
            parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
            values = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
            return mse(torch.func.functional_call(model, values, x), y)

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in model.parameters()])
        dense = np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat).numpy())[::-1][:2]
        np.testing.assert_allclose(run.read("hessian/hessian_eigenvalue")[row], dense, rtol=1e-3)
        assert (run.read("hessian/hessian_residual")[row] <= 1e-3 * dense[0]).all()
    products = run.read("hessian/hessian_products")
    assert (products > 0).all()


def test_hessian_and_ntk_sharpness_agree_where_the_residual_is_small(tmp_path):
    """At a target that is the network's own output, the Hessian is JᵀJ / n."""
    x, model = task()[0], network()
    with torch.no_grad():
        y = model(x)
    groups = dict.fromkeys(("scalars", "hessian"), Cadence())
    with Recorder(str(tmp_path), model, Probe(x, y), identity={}, learning_rate=0.1, seed=0, steps=1, eigenpairs=2,
                  cadences=groups, criterion=mse) as recorder:  # fmt: skip
        recorder.record(0, loss=0.0)
        recorder.record(1, loss=0.0)
    run = list_runs(tmp_path)[0]
    np.testing.assert_allclose(
        run.read("hessian/hessian_eigenvalue")[:, 0], run.read("scalars/ntk_sharpness"), rtol=1e-5
    )
    # The first vector, from the NTK, is the eigenvector itself.
    assert run.read("hessian/hessian_products")[0] <= 2


@pytest.mark.parametrize("stops", [[0], [3, 4], [6, 15, 29]], ids=str)
def test_a_resumed_run_goes_on_with_the_vectors_of_its_eigensolvers(tmp_path, monkeypatch, stops):
    for name, value in {"DENSE": 40, "GUARDS": 3}.items():
        monkeypatch.setattr(spectra, name, value)  # so that eighty examples are many
    options = EVERYTHING | {"eigenpairs": 2, "n": 80}
    whole = loop(tmp_path / "whole", **options)
    assert (whole.read("spectra/solver_iterations") > 0).any(), "LAPACK has no start to go on with"
    assert whole.read("spectra/eigenvalue_residual").max() <= 1e-8 * whole.read("spectra/eigenvalue").max()
    for stop in stops:
        loop(tmp_path / "parts", stop_after=stop, **options)
    assert loop(tmp_path / "parts", **options).head == whole.head
    # The test can fail: without the vectors the bits are others.
    monkeypatch.setattr(measure_module.Measure, "restore", lambda self, state: None)
    for stop in stops:
        loop(tmp_path / "cold", stop_after=stop, **options)
    assert loop(tmp_path / "cold", **options).head != whole.head


def test_the_cost_of_each_part_is_kept_and_not_part_of_the_head(tmp_path, monkeypatch):
    run = loop(tmp_path / "a", commit_seconds=1e-9, **EVERYTHING)
    cost = {name: run.read(f"train/{name}") for name in run.arrays("train") if name.startswith("seconds_")}
    due = dict.fromkeys(("kernel", "scalars", "other_kernels"), "scalars") | {"hessian": "hessian"}
    for part, group in due.items():
        measured = run.read("train/step")[cost[f"seconds_{part}"] > 0]
        assert measured.tolist() == run.read(f"{group}/step").tolist(), part
    assert (cost["seconds_eigenpairs"] > 0).all()
    # Of the commit before the row, so the first row has none.
    assert (cost["seconds_commit"] > 0).tolist() == [False] + [True] * STEPS
    assert loop(tmp_path / "b", **EVERYTHING).head == run.head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": ["conjugate"]}, r"kernels = \['conjugate'\]: must have 'ntk' among them"),
        ({"kernels": ["ntk", "conjugate", "conjugate"]}, "each at most once"),
        ({"kernels": ["ntk", "unknown"]}, "kernel 'unknown': must be one of ntk, weighted, conjugate"),
        ({"ntk_full": True}, "ntk_full: a network of one output"),
        ({"cadences": {"hessian": Cadence()}, "criterion": None}, "cadence of 'hessian': needs the loss"),
        ({"hessian_eigenpairs": 0, "cadences": {"hessian": Cadence()}}, "hessian_eigenpairs = 0: must be"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        loop(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_what_is_not_asked_for_names_no_run_anew(tmp_path):
    plain = loop(tmp_path)
    assert set(plain.attrs["identity"]["record"]) == {"eigenpairs", "loss_levels", "snapshots", "spectra", "scalars"}
    assert "hessian" not in plain.lengths
    asked = loop(tmp_path, **EVERYTHING)
    assert asked.run_id != plain.run_id
