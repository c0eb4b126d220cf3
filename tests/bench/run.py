"""Costs as ratios, each pair measured in turn within this run: `make bench`.

A ratio of two medians taken side by side says more than a time does, but it is not free of the load of the machine: on
busy cores one of these ratios was seen to go from 10 to 18. Compare what was measured on idle ones. One thread per
process throughout, as in a sweep: the Makefile sets BLAS's, the runs set torch's.
"""

import argparse
import copy
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import xarray as xr
from distributed import LocalCluster

import analysis
from analysis import catalog, results
from analysis.alignment import centred_alignment
from pipeline import schema
from pipeline.config import File, Mlp, RunConfig, Stop, load_study
from pipeline.data import load_data
from pipeline.losses import LOSSES
from pipeline.models import build_model
from pipeline.operators import HessianOperator
from pipeline.optim import UPDATES, GradientDescent
from pipeline.processes import PROCESSES, Problem, Process
from pipeline.remote import sweep_on
from pipeline.replay import replay
from pipeline.spectra import lanczos
from pipeline.store import Writer, list_runs, run_path
from pipeline.train import train

Row = tuple[str, str, str, str]


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken A B A B so that both meet the same noise."""
    times = [[timed(work) for work in works] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def bare_training(run: RunConfig) -> None:
    """The same gradient descent with nothing recorded."""
    torch.set_num_threads(1)
    data = load_data(run.data, run.seed)
    x, y = (torch.as_tensor(array, dtype=torch.float32) for array in (data.x, data.y))
    model = build_model(run.model, x.shape[1:], y.shape[1], run.seed, torch.float32)
    parameters, rule = list(model.parameters()), UPDATES[run.update.name](**run.update.model_dump(exclude={"name"}))
    state = rule.init(parameters)
    for _ in range(run.stop.steps + 1):
        loss = LOSSES[run.loss.name](model(x), y)
        gradients = torch.autograd.grad(loss, parameters)
        loss.item()
        moved, state = rule.step(parameters, gradients, state, run.learning_rate)
        with torch.no_grad():
            for parameter, new in zip(parameters, moved, strict=True):
                parameter.copy_(new)


def fresh(folder: Path) -> str:
    """An empty place for a store."""
    shutil.rmtree(folder, ignore_errors=True)
    return str(folder)


def recording(folder: Path, steps: int, repeats: int) -> Iterator[Row]:
    """What recording adds to bare training, for the digits study as shipped and with sparser scalars."""
    for label, more in (("as shipped", ()), ("scalars every 10", ("record.scalars={every=10}",))):
        study = load_study("digits", ["learning_rate=0.1", "seed=0", f"stop.steps={steps}", "stop.loss=1e-9", *more])
        (run,) = study.runs()
        bare, recorded = in_turn(
            repeats, lambda run=run: bare_training(run), lambda run=run: train(run, fresh(folder / "recording"))
        )
        yield (f"recording, digits {label}", f"{1e3 * recorded / steps:.2f} ms a step",
               f"{1e3 * bare / steps:.2f} ms a bare step", f"{recorded / bare:.2f} x bare training")  # fmt: skip
        if not more:
            yield from shares(folder / "recording", recorded)


def shares(root: Path, total: float) -> Iterator[Row]:
    """What the parts of a recorded run's rows took, as the store has it, of the whole run."""
    (recorded,) = list_runs(root)
    for name in schema.TRAIN:
        if name.startswith("seconds_") and (seconds := float(recorded.read(f"train/{name}").sum())):
            part = name.removeprefix("seconds_").replace("_", " ")
            yield (f"  of it, {part}", f"{seconds:.3f} s", f"{total:.2f} s of the run", f"{seconds / total:.2f} of it")


def analysing(folder: Path, steps: int, repeats: int) -> Iterator[Row]:
    """Asking the store against training again, and bringing the catalogue up to date."""
    rates = ["learning_rate=[0.1, 0.2, 0.3]", "seed=0", f"stop.steps={steps}", "stop.loss=1e-9"]
    runs = load_study("digits", rates).runs()
    root = fresh(folder / "sweep")
    retrain = timed(lambda: [train(run, root) for run in runs])

    def analyse() -> None:
        shutil.rmtree(Path(root, "analysis"), ignore_errors=True)
        results.analyze(root)

    def build() -> None:
        Path(root, "catalog.duckdb").unlink(missing_ok=True)
        catalog.sync(root)

    query = "select learning_rate, step, avg(kta) from alignment join runs using (run_id) group by 1, 2"
    analysis, rebuild, sync, ask = in_turn(
        repeats, analyse, build, lambda: catalog.sync(root), lambda: catalog.query(root, query)
    )
    rows = len(catalog.query(root, "select 1 from alignment").rows)
    yield ("every measure of a stored sweep", f"{analysis:.2f} s", f"{retrain:.2f} s to train it again",
           f"{retrain / analysis:.1f} x faster")  # fmt: skip
    yield ("catalogue built from the stores", f"{rebuild:.2f} s for {rows} rows", f"{retrain:.2f} s to train",
           f"{rebuild / retrain:.3f} of training")  # fmt: skip
    yield ("catalogue sync, nothing new", f"{1e3 * sync:.0f} ms", f"{rebuild:.2f} s to build",
           f"{sync / rebuild:.2f} of building")  # fmt: skip
    yield ("figure (a) by SQL", f"{1e3 * ask:.0f} ms", f"{retrain:.2f} s to train", f"{retrain / ask:.0f} x faster")


def sweeping(steps: int, runs: int) -> Iterator[Row]:
    """Runs per second of a sweep on two workers of a Dask scheduler over one; each run is a process of its own."""
    seeds = f"seed={list(range(runs))}"
    study = load_study("digits", ["learning_rate=0.1", seeds, f"stop.steps={steps}", "stop.loss=1e-9"])

    def on(workers: int) -> None:
        with (
            tempfile.TemporaryDirectory() as root,
            LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0",
                silence_logs=logging.ERROR,
            ) as local,
        ):  # fmt: skip
            list(sweep_on(local.scheduler_address, study.runs(), root))

    two, one = in_turn(1, lambda: on(2), lambda: on(1))
    yield (f"sweep of {runs} runs on 2 Dask workers", f"{runs / two:.2f} runs a second",
           f"{runs / one:.2f} a second on one", f"{one / two:.2f} x one's throughput")  # fmt: skip


def curvature(steps: int, repeats: int) -> Iterator[Row]:
    """A step of the central flow and a search for the sharpness, against gradient descent on digits at the edge."""
    torch.set_num_threads(1)
    (run,) = load_study("digits", ["learning_rate=0.4", "seed=0"]).runs()
    data, criterion = load_data(run.data, run.seed), LOSSES[run.loss.name]
    x, y = (torch.as_tensor(array, dtype=torch.float32) for array in (data.x, data.y))

    def begun(name: str, model: torch.nn.Module) -> Process:
        return PROCESSES[name](Problem(model, criterion, x, y, GradientDescent(), run.learning_rate, run.seed))

    def follow(process: Process, times: int = 1) -> None:
        for step in range(times):
            process.row()
            process.advance(step)

    model = build_model(run.model, x.shape[1:], y.shape[1], run.seed, torch.float32)
    descent = begun("discrete", model)
    follow(descent, steps)
    flow = begun("central_flow", copy.deepcopy(model))
    follow(flow, 10)
    critical = flow.row().columns["critical"]
    bare, central = in_turn(5 * repeats, lambda: follow(descent), lambda: follow(flow))
    yield (f"central flow, {critical} critical", f"{1e3 * central:.1f} ms a step", f"{1e3 * bare:.2f} ms a bare step",
           f"{central / bare:.1f} x a bare step")  # fmt: skip
    start = lanczos(HessianOperator(model, criterion, x, y)).vectors
    follow(descent)
    for label, where in (("warm", start), ("cold", None)):
        search, step = in_turn(
            5 * repeats,
            lambda where=where: lanczos(HessianOperator(model, criterion, x, y), start=where),
            lambda: descent.batch.gradient(descent.parameters),
        )
        yield (f"sharpness, {label}", f"{1e3 * search:.1f} ms", f"{1e3 * step:.2f} ms a gradient",
               f"{search / step:.1f} x a gradient")  # fmt: skip


def kernels(n: int, count: int) -> np.ndarray:
    """Kernels as a run leaves them, (count, n, n) float32: what is stored is never random noise."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 256)).astype(np.float32) / np.arange(1, 257, dtype=np.float32)
    steps = [features + 0.01 * i * rng.normal(size=features.shape).astype(np.float32) for i in range(count)]
    return np.stack([step @ step.T for step in steps])


def throughput(folder: Path, n: int, count: int, repeats: int) -> Iterator[Row]:
    """The store against a plain .npy file: writing with and without making it durable, and reading it all."""
    data = kernels(n, count)
    mib = data.nbytes / 2**20
    path = folder / "kernels.npy"

    def write_store() -> None:
        rows = {"learning_rate": 0.1, "seed": 0, "loss": 1.0, "ntk": None, "parameter": np.zeros(1, np.float32)}
        with Writer.open(
            fresh(folder / "store"),
            "run",
            identity={},
            attrs={},
            dims={"sample": n, "sample2": n, "parameter_index": 1},
            groups={"snapshots": ["ntk", "parameter"]},
            capacity={"snapshots": count},
            probe={
                "sample_index": np.arange(n),
                "input": np.ones((n, 1), np.float32),
                "target": np.ones((n, 1), np.float32),
            },
            dtype="float32",
        ) as writer:
            for step, kernel in enumerate(data):
                writer.append(step, {"snapshots": {**rows, "step": step, "ntk": kernel}})
            writer.commit(b"")
            writer.finish("complete", "steps")

    def write_npy(durable: bool) -> None:
        with open(path, "wb") as file:
            np.save(file, data)
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def read_store() -> None:
        xr.open_zarr(folder / "store" / "runs" / "run.zarr", group="snapshots", chunks=None).ntk.load()

    def read_npy() -> None:
        np.array(np.load(path, mmap_mode="r"))

    mine, durable, plain = in_turn(repeats, write_store, lambda: write_npy(True), lambda: write_npy(False))
    yield (f"writing {mib:.0f} MiB of kernels, n = {n}", f"{mib / mine:.0f} MiB/s",
           f"{mib / durable:.0f} MiB/s numpy.save and fsync ({mib / plain:.0f} without)",
           f"{durable / mine:.2f} of numpy.save's speed")  # fmt: skip
    store, mapped = in_turn(repeats, read_store, read_npy)
    size = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file()) / 2**20
    yield ("reading them, checksums included", f"{mib / store:.0f} MiB/s", f"{mib / mapped:.0f} MiB/s memory-mapped",
           f"{mapped / store:.2f} of its speed, {size / mib:.2f} of its bytes")  # fmt: skip


def anywhere(folder: Path, repeats: int) -> Iterator[Row]:
    """The centred KTA of the kernels that `throughput` wrote: on threads and on a cluster, against a loop in numpy."""
    root = folder / "store"
    kernels = xr.open_zarr(root / "runs" / "run.zarr", group="snapshots", chunks=None).ntk
    y = np.ones(kernels.sizes["sample"])
    y[::2] = -1

    def loop() -> None:
        for index in range(kernels.sizes["step"]):
            kernel = kernels[index].values.astype(np.float64)
            kernel -= kernel.mean(axis=0)
            kernel -= kernel.mean(axis=1, keepdims=True)
            y @ kernel @ y / (np.linalg.norm(kernel) * (y @ y))

    def measured() -> None:
        ds = analysis.open_sweep(root)
        target = xr.zeros_like(ds.target).variable + xr.Variable("sample", y)
        centred_alignment(ds.assign(target=target)).compute()

    size = kernels.nbytes / 2**20
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL") as cluster:

        def on_threads() -> None:
            with analysis.computing():
                measured()

        plain, threads = in_turn(repeats, loop, on_threads)
        with analysis.computing(cluster.scheduler_address):
            again, workers = in_turn(repeats, loop, measured)
    yield ("centred KTA on threads", f"{size / threads:.0f} MiB/s", f"{size / plain:.0f} MiB/s in a loop of numpy",
           f"{plain / threads:.2f} x its speed")  # fmt: skip
    yield ("centred KTA on a cluster of 2", f"{size / workers:.0f} MiB/s", f"{size / again:.0f} MiB/s in the loop",
           f"{again / workers:.2f} x its speed")  # fmt: skip


def in_tiles(folder: Path, n: int, repeats: int) -> Iterator[Row]:
    """A kernel that fits into memory, computed and stored whole and tile by tile, with its eigenpairs and digests."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 256)) / np.sqrt(np.arange(1, 257))
    np.savez(folder / "probe.npz", x=x, y=np.sign(x[:, :1] * x[:, 1:2]))
    np.savez(folder / "train.npz", x=x[:50], y=np.sign(x[:50, :1]))
    run = RunConfig(
        learning_rate=0.1, data=File(file=str(folder / "train.npz")), model=Mlp(width=200, depth=2), stop=Stop(steps=1)
    )
    root = fresh(folder / "tiles")
    train(run, root)

    def computed(tiled: int) -> None:
        shutil.rmtree(Path(root, "analysis"), ignore_errors=True)
        with patch.object(schema, "TILED", tiled):
            replay(run_path(root, run.run_id), probe=folder / "probe.npz")

    whole, tiles = in_turn(repeats, lambda: computed(n + 1), lambda: computed(1))
    yield (
        f"kernel in tiles, n = {n}",
        f"{tiles:.1f} s",
        f"{whole:.1f} s in memory",
        f"{tiles / whole:.2f} x in memory",
    )


def measure(folder: Path, quick: bool) -> Iterator[Row]:
    """All rows of the table."""
    steps, repeats, n, count = (20, 1, 100, 4) if quick else (400, 5, 1000, 20)
    yield from recording(folder, steps, repeats)
    yield from analysing(folder, steps, repeats)
    yield from sweeping(steps, 2 if quick else 12)
    yield from curvature(steps, repeats)
    yield from throughput(folder, n, count, repeats)
    yield from anywhere(folder, repeats)
    yield from in_tiles(folder, 50 if quick else 6000, min(repeats, 3))


def main() -> None:
    """Print the table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    quick = parser.parse_args().quick
    print(f"medians, one thread per process, {os.cpu_count()} cores, {len(schema.GROUPS)} groups recorded\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, figure, peer, ratio in measure(Path(folder), quick):
            print(f"{name:<36} {figure:<24} against {peer:<50} {ratio}", flush=True)


if __name__ == "__main__":
    main()
