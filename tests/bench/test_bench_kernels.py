"""The kernel benchmark runs, its methods agree, and its verdicts follow from its figures, which are not judged."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    import kernels

    return kernels


def test_methods_agree_and_nothing_is_missing_without_a_word(bench, tmp_path):
    command = [sys.executable, HERE / "kernels.py", "--quick", "--markdown", tmp_path / "table.md"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "WRONG" not in printed
    assert "Error" not in printed
    tables = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    methods = [cells for cells in tables if len(cells) == 9 and cells[0] not in ("| method", "| ---")]
    measured = [cells for cells in methods if cells[1]]
    assert len({cells[0] for cells in measured}) == 13
    assert all("OpenBLAS" in cells[-1] for cells in measured)
    assert all(cells[-1].startswith("not run: ") for cells in methods if not cells[1])
    verdicts = [cells[-1].removesuffix(" |") for cells in tables if len(cells) == 4][2:]
    assert len(verdicts) == sum(goal.threads == 1 for goal in bench.GOALS)
    assert set(verdicts) <= {"met", "missed", "not judged"}


def made(bench, method, seconds, error=0.0, peak=0):
    return bench.Measured(
        method, peak=peak, error=error, tolerance=1e-5, runs=[{"wall": 9 * seconds, "cpu": seconds}], repeats=1
    )


@pytest.mark.parametrize(
    ("ours", "peer", "error", "verdict"),
    [(1, 4, 0, "met"), (1, 2, 0, "missed"), (1, 4, 1e-4, "not judged"), (1, 4, float("nan"), "not judged")],
)
def test_a_goal_compares_with_the_best_peer_that_is_right(bench, ours, peer, error, verdict):
    row = next(row for row in bench.ROWS if row.name == "mlp-1000")
    goal = bench.Goal("mlp-1000", 1, bound=3)
    slow = bench.Measured(row.methods[3], failed="not run")
    results = [made(bench, bench.CACHED, ours), made(bench, row.methods[2], peer, error), slow]
    *_, found = bench.judged(goal, row, results)
    assert found == verdict


def test_peaks_and_added_time_are_bounded_from_above(bench):
    row = next(row for row in bench.ROWS if row.name == "mlp10-full-1000")
    assert row.kernel_bytes == 4 * 10**8
    goal = bench.Goal(row.name, 1, 1.2, figure="peak")
    assert bench.judged(goal, row, [made(bench, bench.CACHED, 1, peak=int(4.4e8))])[2:] == (
        "peak of 1.10 kernels",
        "met",
    )
    assert bench.judged(goal, row, [made(bench, bench.CACHED, 1, peak=int(5e8))])[-1] == "missed"
    recording = next(row for row in bench.ROWS if row.name == "recording")
    ours, bare = recording.methods
    results = [made(bench, ours, 1.25), made(bench, bare, 1)]
    assert bench.judged(bench.Goal(row.name, 1, 0.3, ours, figure="added"), recording, results)[-1] == "met"
    assert bench.judged(bench.Goal(row.name, 1, 0.2, ours, figure="added"), recording, results)[-1] == "missed"


@pytest.mark.parametrize("model", ["mlp", "cnn", "vit"])
def test_the_layers_of_the_floor_are_those_of_the_network(bench, model):
    from peers import networks
    from rows import HEADS, LAYERS

    network = networks.build(model, 1)
    weighted = [m for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    layers = [*LAYERS[model], (1, HEADS[model], 1)]
    assert sum((d + 1) * e for _, d, e in layers) == sum(p.numel() for m in weighted for p in m.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *networks.IMAGE))
    attention = 2 * 2 * 2 * 16 * 16 * 64 if model == "vit" else 0  # two products in two blocks, without weights
    assert sum(2 * t * d * e for t, d, e in layers) == counter.get_total_flops() - attention


def test_the_floor_of_the_mlp_by_hand(bench):
    from rows import operations

    row = next(row for row in bench.ROWS if row.name == "mlp-1000")
    forward = 2 * 1000 * (3072 * 200 + 200 * 200 + 200)
    backward = 2 * 1000 * 200 * 200
    grams = 1000**2 * (3073 + 200 + 201 + 200 + 201)
    assert operations(row, kept=False) == forward + backward + grams
    assert operations(row, kept=True) == forward + backward + grams - 1000**2 * 3073


def test_distance_is_relative_and_of_equal_shapes(bench, tmp_path):
    a = np.random.default_rng(0).normal(size=(3, 5, 2))
    for name, array in {"a": a, "b": a * 1.01, "c": a[:2]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    assert bench.distance(tmp_path / "b.npy", tmp_path / "a.npy") == pytest.approx(0.01)
    assert bench.distance(tmp_path / "c.npy", tmp_path / "a.npy") == float("inf")


def test_an_environment_that_could_not_be_installed_says_why(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(bench.Failed, match=r"no environment \.venv-nngeometry .*make bench-kernels"):
        bench.interpreter("with_nngeometry.py")
    (tmp_path / ".venv-nngeometry").mkdir()
    (tmp_path / ".venv-nngeometry" / "error.txt").write_text("WARNING: x\nERROR: No matching distribution for jaxlib\n")
    with pytest.raises(bench.Failed, match="ERROR: No matching distribution for jaxlib"):
        bench.interpreter("with_nngeometry.py")


def test_a_process_that_dies_is_a_failure_with_its_last_words(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PEERS", tmp_path)
    (tmp_path / "dies.py").write_text("import sys; input(); print('out of luck', file=sys.stderr); sys.exit(3)")
    with open(tmp_path / "log", "w") as log:
        worker = bench.Worker("dies.py", 1, log)
    with pytest.raises(bench.Failed, match="status 3: out of luck"):
        worker.ask(do="run", name="x")
    worker.close()
