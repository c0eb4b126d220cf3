"""How time, memory and bytes grow, each with a fitted exponent: `make scaling`, for docs/scaling.md.

Seconds are those of the processor, summed over processes and threads, so other work on the machine hardly shows in
them; a thing that is computed is the median of `REPEATS`, in a process of its own with one thread, and its memory the
most that this process had resident above what it had before. An exponent is the slope of a least-squares line through
the logarithms.
"""

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests share
REPEATS = 3
FEATURES = 64
COMMAND = Path(sys.executable).with_name("ntk-eos")
Point = dict[str, float]


def timed(work: Callable[[], Any], repeats: int = REPEATS) -> Point:
    """Median seconds of a call after a first one, and the memory that the calls took."""
    from resident import begin, peak

    before = begin()
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return {"seconds": statistics.median(times[1:]), "mib": (peak() - before) / 2**20}


def network(n: int, width: int, outputs: int) -> tuple[Any, Any]:
    """An MLP of two hidden layers, and examples."""
    import torch

    from pipeline.config import Mlp
    from pipeline.models import build_model

    torch.set_num_threads(1)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(n, FEATURES)).astype(np.float32))
    return build_model(Mlp(width=width, depth=2), (FEATURES,), outputs, 0, torch.float32), x


def kernel(n: int, width: int = 128, outputs: int = 1) -> Point:
    """The NTK of an MLP in memory."""
    from pipeline.kernels import KERNELS

    model, x = network(n, width, outputs)
    KERNELS["ntk"](x[:20])(model)  # loads what it needs
    ntk = KERNELS["ntk"](x)
    return timed(lambda: ntk(model)) | {"parameters": sum(p.numel() for p in model.parameters())}


def descent(width: int) -> Point:
    """A step of gradient descent, n = 500."""
    import torch

    model, x = network(500, width, 1)
    parameters = list(model.parameters())

    def step() -> None:
        gradients = torch.autograd.grad(model(x).square().mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 1e-3 * gradient

    return timed(lambda: [step() for _ in range(5)]) | {"parameters": sum(p.numel() for p in parameters)}


def pairs(n: int) -> Point:
    """The 20 leading eigenpairs of a kernel in memory."""
    from pipeline.kernels import KERNELS
    from pipeline.spectra import eigenpairs

    model, x = network(n, 128, 1)
    matrix = KERNELS["ntk"](x)(model).numpy()
    return timed(lambda: eigenpairs(matrix, 20))


def tiles(n: int) -> Point:
    """The NTK in tiles and its 20 leading eigenpairs, by the command, within 1 GiB."""
    from large_kernel import command, trained, watched

    with tempfile.TemporaryDirectory() as folder:
        run, probe = trained(Path(folder), n)
        start = of_children()
        path, most = watched(command(run, probe, "--memory", "1GiB"))
        return {"seconds": of_children() - start, "mib": most / 2**20, "bytes": size_of(path)[0]}


def sweep(runs: int) -> Point:
    """Runs of 20 steps of the study smoke: trained, opened, analysed, catalogued."""
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/store"
        sets = [f"seed={list(range(runs))}", "learning_rate=0.1", "stop.steps=20", "record.spectra={every=10}"]
        start = of_children()
        ntk_eos("run", "smoke", "--out", root, "-q", *(word for key in sets for word in ("--set", key)))
        trained = of_children() - start
        nbytes, files = size_of(Path(root))
        point = {"seconds": trained, "bytes": nbytes, "files": files}
        start = of_children()
        ntk_eos("analyze", root, "-q")
        return point | {"analyse": of_children() - start} | child("opened", root)


def opened(root: str) -> Point:
    """A sweep opened, and its KTA computed from the scalars."""
    import analysis

    return {
        "open": timed(lambda: analysis.open_sweep(root, "scalars"))["seconds"],
        "kta": timed(lambda: analysis.alignment(analysis.open_sweep(root, "scalars")).kta.compute())["seconds"],
    }


def catalogue(runs: int) -> Point:
    """The catalogue of runs that hold little: built, brought up to date when nothing is new, and asked."""
    from analysis import catalog
    from pipeline.store import Writer

    with tempfile.TemporaryDirectory() as root, patch("os.fsync"):
        row = {"learning_rate": 0.1, "seed": 0, "loss": 0.5, "grad_norm": 1.0, "wall_time": 0.0}
        probe = {"sample_index": np.arange(2), "input": np.ones((2, 1), "f4"), "target": np.ones((2, 1), "f4")}
        for number in range(runs):
            with Writer.open(
                root, f"run-{number:06d}", identity={"seed": number}, attrs={"learning_rate": 0.1, "seed": number},
                dims={"sample": 2, "output": 1}, groups={"train": ["loss", "grad_norm", "wall_time"]},
                capacity={"train": 2}, probe=probe, dtype="float32",
            ) as writer:  # fmt: skip
                for step in range(2):
                    writer.append(step, {"train": row | {"step": step}})
                writer.commit(b"")
                writer.finish("complete", "steps")
        start = time.process_time()
        catalog.sync(root)
        built = time.process_time() - start
        again = timed(lambda: catalog.sync(root))
        asked = timed(lambda: catalog.query(root, "select learning_rate, count(*) from runs group by 1"))
        return {
            "seconds": built, "sync": again["seconds"], "query": asked["seconds"], "mib": again["mib"],
            "bytes": Path(root, "catalog.duckdb").stat().st_size,
        }  # fmt: skip


def of_children() -> float:
    """Seconds of the processor that ended processes below this one took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ntk_eos(*words: str) -> None:
    subprocess.run([COMMAND, *words], check=True, stdout=subprocess.DEVNULL)


def size_of(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files below a folder."""
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


# What is varied, and the measured columns: name, unit, factor.
SECONDS, MEMORY = ("seconds", "s", 1.0), ("mib", "MiB", 1.0)
DISK, FILES = ("bytes", "MiB on disk", 2**-20), ("files", "files", 1.0)
TABLES: dict[str, tuple[str, Callable[..., Point], list[int], list[int], list[tuple[str, str, float]]]] = {
    "kernel": ("NTK in memory, n", kernel, [500, 1000, 2000, 4000, 8000], [50, 100], [SECONDS, MEMORY]),
    "pairs": ("20 eigenpairs in memory, n", pairs, [1000, 2000, 4000, 8000], [100, 200], [SECONDS, MEMORY]),
    "tiles": ("NTK in tiles with 20 eigenpairs, n", tiles, [10_000, 14_000, 20_000], [], [SECONDS, MEMORY, DISK]),
    "width": ("NTK in memory at n = 1000, width", lambda width: kernel(1000, width), [64, 128, 256, 512, 1024],
              [8, 16], [("parameters", "parameters", 1.0), SECONDS, MEMORY]),
    "descent": ("five GD steps at n = 500, width", descent, [64, 128, 256, 512, 1024], [8, 16],
                [("parameters", "parameters", 1.0), SECONDS, MEMORY]),
    "outputs": ("NTK in memory at n = 1000, outputs", lambda c: kernel(1000, 128, c), [1, 2, 5, 10, 20], [1, 2],
                [SECONDS, MEMORY]),
    "sweep": ("runs of a sweep", sweep, [10, 100, 1000], [2, 4],
              [SECONDS, ("analyse", "s to analyse", 1.0), ("open", "s to open", 1.0), ("kta", "s for all KTA", 1.0),
               DISK, FILES]),
    "catalogue": ("runs in the catalogue", catalogue, [100, 1000, 10_000], [2, 4],
                  [SECONDS, ("sync", "s, nothing new", 1.0), ("query", "s to ask", 1.0), DISK, MEMORY]),
}  # fmt: skip


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms; NaN where a value is not above 0."""
    if min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def child(case: str, argument: int | str) -> Point:
    """A point, measured in a process of its own."""
    command = [sys.executable, __file__, "--point", case, str(argument)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def table(name: str, quick: bool) -> str:
    """A table in markdown, its last line the exponents."""
    what, _, sizes, few, columns = TABLES[name]
    sizes = few if quick else sizes
    points = [child(name, size) for size in sizes]
    lines = [f"| {what} | " + " | ".join(unit for _, unit, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for size, point in zip(sizes, points, strict=True):
        lines.append(f"| {size:,} | " + " | ".join(f"{point[key] * factor:,.3g}" for key, _, factor in columns) + " |")
    slopes = [exponent(sizes, [point[key] for point in points]) for key, _, _ in columns]
    lines.append("| **exponent** | " + " | ".join(f"**{slope:.2f}**" for slope in slopes) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables as they are measured, or one point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--point", nargs=2, metavar=("TABLE", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        name, argument = options.point
        print(json.dumps(opened(argument) if name == "opened" else TABLES[name][1](int(argument))))
        return
    print(f"seconds of one core ({platform.processor() or platform.machine()}), medians of {REPEATS}\n")
    for name in options.tables or TABLES:
        if TABLES[name][3] or not options.quick:
            print(table(name, options.quick), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
