"""This project's kernels, eigenpairs and recording side by side with peers, in one run: `make bench-kernels`.

Every method has a process of its own, which is told when to run: A B A B across all the methods of a row, so that all
meet the same noise, and a ratio of medians survives a busy machine. Every process gets the same number of threads and
of CPUs. One thread is compared by CPU seconds, several by the clock.

- Peak memory: the first call, caches and result included, above what the process held before it. Libraries are loaded
  and functions compiled by then.
- Error: the relative Frobenius distance to this project's result. Beyond `TOLERANCE` the peer is WRONG, and no ratio is
  taken to it.
- Floor: the fewest float32 operations for the row (below) at the rate of a large product in the same run; the share
  is how much of the time those would need.

The operations: with T positions, d inputs and e outputs of each layer, n examples and c outputs, the forward pass takes
2 n T d e and the backward pass c times as much, up to the first layer. Half a Gram matrix then takes n² T² (d + 1 + c e)
by inputs and gradients (trace; n² T² (d + 1) + (n c)² T² e for all pairs of outputs), or 2 n c T d e + n² c (d + 1) e by
examples' gradients (c² for c), whichever is less. The last layer's gradients are constant, and where the Gram matrix
of the examples is kept, the first layer needs none.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from peers import networks

from pipeline.kernels import empirical_ntk

ROOT = Path(__file__).parents[2]
PEERS = Path(__file__).with_name("peers")
TOLERANCE = 1e-5
SLOW_SECONDS = 20  # a method that takes longer for all its repetitions makes fewer of them, but at least three

Arrays = dict[str, np.ndarray]


# --- what is compared ------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """One way to the result of a row: its name in the table, the script that has it, and what that script is told."""

    label: str
    script: str
    spec: Mapping[str, str]

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.label.startswith("this project")


def in_torch(label: str, method: str) -> Method:
    """A method that runs in the project's own environment."""
    return Method(label, "with_torch.py", {"method": method})


CACHED = in_torch("this project, inputs' Gram matrix kept", "cached")
UNCACHED = in_torch("this project", "uncached")
FORMULA = in_torch("layer formula in torch.mm", "layer formula")
TUTORIAL = in_torch("PyTorch tutorial, vmap(jacrev) + einsum", "tutorial")
CHUNKED = in_torch("vmap(jacrev) in chunks + matmul", "chunked")
ONE_BY_ONE = in_torch("one backward pass per example", "one by one")
NNGEOMETRY = Method("nngeometry", "with_nngeometry.py", {})
STRUCTURED = Method(
    "neural-tangents, structured", "with_neural_tangents.py", {"implementation": "structured derivatives"}
)
CONTRACTION = Method(
    "neural-tangents, Jacobian", "with_neural_tangents.py", {"implementation": "Jacobian contraction"}
)
ENVIRONMENTS = {"with_nngeometry.py": ".venv-nngeometry", "with_neural_tangents.py": ".venv-neural-tangents"}


@dataclass(frozen=True)
class Row:
    """One result and the methods that make it.

    Attributes:
        name: key, for goals and `--rows`.
        inputs: row -> what every method is given.
        n: examples.
        methods: this project's first.
        model: mlp, cnn or vit; empty if the result is no kernel.
        c: outputs.
        outputs: trace or full.
        steps: of gradient descent, where the row trains.
        quick_n: examples in `--quick`.
        absent: methods that are not run here, and why.
        by_clock: compare wall time at one thread as well, because waiting for the disk is part of it.
    """

    name: str
    inputs: Callable[["Row"], Arrays]
    n: int
    methods: tuple[Method, ...]
    model: str = ""
    c: int = 1
    outputs: str = "trace"
    steps: int = 0
    quick_n: int = 16
    absent: Mapping[str, str] = field(default_factory=dict)
    by_clock: bool = False

    @property
    def title(self) -> str:
        """What it is, with its size."""
        outputs = f", {self.c} outputs, {self.outputs}" if self.c > 1 else ""
        return f"{TITLES.get(self.model, TITLES.get(self.name, self.name))}, n = {self.n}{outputs}"

    @property
    def kernel_bytes(self) -> int:
        """Size of the kernel in float32."""
        return 4 * self.n**2 * (self.c**2 if self.outputs == "full" else 1)


def kernel_inputs(row: Row) -> Arrays:
    """Weights in torch's initialisation and standard normal images."""
    model = networks.build(row.model, row.c)
    return {"x": torch.randn(row.n, *networks.IMAGE).numpy(), **networks.exported(model)}


def labelled(n: int) -> Arrays:
    """Images whose covariance decays like a power law, as that of natural ones does, and labels -1 and +1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, int(np.prod(networks.IMAGE)))) / np.sqrt(np.arange(1, 1 + np.prod(networks.IMAGE)))
    y = np.sign(x @ rng.normal(size=(x.shape[1], 1)))
    return {"x": x.reshape(n, *networks.IMAGE).astype(np.float32), "y": y.astype(np.float32)}


def drifted_kernels(row: Row) -> Arrays:
    """The MLP's kernel at two steps of gradient descent, as one snapshot and the next find it."""
    data = labelled(row.n)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    model = networks.build("mlp", 1)
    # λ_1 / n is the Gauss-Newton sharpness, and 2 / sharpness the largest stable step.
    rate = 0.7 * row.n / float(torch.linalg.matrix_norm(empirical_ntk(model, x), ord=2))
    kernels = []
    for steps in (2 * row.steps, row.steps):
        networks.descend(model, x, y, rate, steps)
        kernels.append(empirical_ntk(model, x).numpy().astype(np.float32))
    return {"before": kernels[0], "after": kernels[1]}


def training_inputs(row: Row) -> Arrays:
    """The MLP and its data."""
    return {**labelled(row.n), **networks.exported(networks.build("mlp", 1)), "steps": np.array(row.steps)}


def matrix_inputs(row: Row) -> Arrays:
    """One large matrix."""
    return {"x": np.random.default_rng(0).normal(size=(row.n, row.n)).astype(np.float32)}


def j_bytes(n: int, c: int, p: int) -> str:
    """Why a method that forms the Jacobian is left out."""
    return f"not run: its Jacobian alone takes {4 * n * c * p / 1e9:.0f} GB"


MLP_P, MLP10_P = 655_001, 656_810
FORMS_J = (CONTRACTION, TUTORIAL, CHUNKED)
TITLES = {
    "mlp": "MLP 3072-200-200",
    "cnn": "CNN",
    "vit": "ViT",
    "pairs": "20 leading eigenpairs of the MLP's kernel",
    "recording": "gradient descent on the MLP, a snapshot every 10 steps",
}
ROWS = (
    Row("mlp-1000", kernel_inputs, 1000, (CACHED, UNCACHED, STRUCTURED, FORMULA, NNGEOMETRY, TUTORIAL, CHUNKED), "mlp",
        absent={CONTRACTION.label: "not run: seconds and gigabytes already at n = 200"}),
    Row("mlp-5000", kernel_inputs, 5000, (CACHED, UNCACHED, STRUCTURED, FORMULA, NNGEOMETRY), "mlp",
        absent={method.label: j_bytes(5000, 1, MLP_P) for method in FORMS_J}),
    *(Row(f"cnn-{n}", kernel_inputs, n,
          (CACHED, UNCACHED, CHUNKED, TUTORIAL, ONE_BY_ONE, STRUCTURED, CONTRACTION, NNGEOMETRY), "cnn")
      for n in (500, 1000)),
    Row("vit-500", kernel_inputs, 500, (CACHED, UNCACHED, TUTORIAL, CHUNKED, STRUCTURED, CONTRACTION, NNGEOMETRY), "vit"),
    Row("mlp10-trace-1000", kernel_inputs, 1000, (CACHED, UNCACHED, STRUCTURED, NNGEOMETRY), "mlp", c=10,
        absent={method.label: j_bytes(1000, 10, MLP10_P) for method in FORMS_J}),
    Row("mlp10-full-1000", kernel_inputs, 1000, (CACHED, UNCACHED, STRUCTURED), "mlp", c=10, outputs="full",
        absent={method.label: j_bytes(1000, 10, MLP10_P) for method in FORMS_J}
        | {NNGEOMETRY.label: "not run: c² backward passes; see n = 100"}),
    Row("mlp10-full-100", kernel_inputs, 100, (CACHED, UNCACHED, STRUCTURED, NNGEOMETRY, TUTORIAL), "mlp", c=10,
        outputs="full", quick_n=4, absent={CONTRACTION.label: "not run: half a minute and 7 GB"}),
    Row("pairs", drifted_kernels, 2000,
        (in_torch("this project", "pairs"), in_torch("ARPACK, cold", "pairs arpack"),
         in_torch("torch.linalg.eigh, float64", "pairs eigh")), steps=50, quick_n=48),
    Row("recording", training_inputs, 1000,
        (in_torch("this project, recorded", "recorded"), in_torch("bare training", "bare")), steps=100, quick_n=24, by_clock=True),
)  # fmt: skip
RATE = Row("rate", matrix_inputs, 2048, (in_torch("numpy", "numpy"), in_torch("torch", "torch")), quick_n=64)


# --- what is asked of it ---------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """A bound on a figure of one row.

    Attributes:
        row: key of the row.
        threads: the table it is read from.
        bound: the least of a speed, the most of anything else.
        ours: the method of this project.
        against: labels of the peers; the best of all that ran, if empty.
        figure: speed (times as fast), peak (in kernels of float32) or added (time beyond the peer's).
        stretch: wished for, not asked for.
    """

    row: str
    threads: int
    bound: float
    ours: Method = CACHED
    against: tuple[str, ...] = ()
    figure: str = "speed"
    stretch: bool = False


GOALS = (
    Goal("mlp-1000", 1, 3),
    Goal("mlp-1000", 1, 1.7, UNCACHED),
    Goal("mlp-1000", 1, 300, UNCACHED, (TUTORIAL.label, CHUNKED.label)),
    Goal("mlp-5000", 1, 7),
    Goal("cnn-500", 1, 1.25),
    Goal("cnn-1000", 1, 1.25),
    Goal("cnn-500", 1, 1.8, stretch=True),
    Goal("cnn-1000", 1, 1.8, stretch=True),
    Goal("vit-500", 1, 2.4),
    Goal("mlp10-full-1000", 1, 6),
    Goal("mlp10-full-1000", 1, 1.2, figure="peak"),
    Goal("pairs", 1, 80, in_torch("this project", "pairs"), ("torch.linalg.eigh, float64",)),
    Goal("recording", 1, 0.3, in_torch("this project, recorded", "recorded"), figure="added"),
    Goal("mlp-1000", 2, 1.8),
    Goal("mlp-5000", 2, 5.5),
    Goal("cnn-500", 2, 1.1),
    Goal("cnn-1000", 2, 1.1),
    Goal("vit-500", 2, 1.5),
    *(Goal(name, 2, 1) for name in ("mlp10-trace-1000", "mlp10-full-1000", "mlp10-full-100")),
)


# --- the fewest operations -------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A Linear, or a convolution as one on patches: T positions, d inputs, e outputs."""

    positions: int
    inputs: int
    outputs: int


BLOCK = (Layer(16, 64, 192), Layer(16, 64, 64), Layer(16, 64, 128), Layer(16, 128, 64))
LAYERS = {
    "mlp": (Layer(1, 3072, 200), Layer(1, 200, 200)),
    "cnn": (Layer(1024, 27, 32), Layer(256, 288, 32)),
    "vit": (Layer(16, 192, 64), *BLOCK, *BLOCK),
}
HEADS = {"mlp": 200, "cnn": 2048, "vit": 64}


def operations(row: Row, kept: bool) -> float:
    """The floor's operations; `kept` leaves out the Gram matrix of the examples where the first layer uses one."""
    n, c, full = row.n, row.c, row.outputs == "full"
    total = n**2 * (HEADS[row.model] + 1) + 2 * n * HEADS[row.model] * c
    for index, (t, d, e) in enumerate(LAYERS[row.model]):
        passed = 2 * n * t * d * e
        grams = 0 if kept and index == 0 and t == 1 else n**2 * t**2 * (d + 1)
        by_grams = grams + n**2 * t**2 * e * (c**2 if full else c)
        by_gradients = c * passed + n**2 * (d + 1) * e * (c**2 if full else c)
        total += passed * (1 if index == 0 else 1 + c) + min(by_grams, by_gradients)
    return total


# --- running ---------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A method gave no result, and this is why."""


class Worker:
    """A process of one environment that answers line by line.

    Args:
        script: file in `peers`.
        threads: of every pool, and CPUs of the process.
        log: what it prints goes here.
    """

    def __init__(self, script: str, threads: int, log: IO[str]) -> None:
        self._log = log
        counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
        self._process = subprocess.Popen(
            [interpreter(script), PEERS / script],
            env={**os.environ, **counts, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        # Some libraries take all the CPUs they see, whatever the environment says.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[-threads:])

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send one message and wait for its answer.

        Raises:
            Failed: if the answer is an error, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = Path(self._log.name).read_text().strip().rpartition("\n")[2]
            raise Failed(f"its process ended with status {self._process.wait()}: {said or 'out of memory?'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """Let the process end."""
        with self._process:
            pass


def interpreter(script: str) -> str:
    """Python of the environment that a script needs.

    Raises:
        Failed: if the environment is not there.
    """
    if script not in ENVIRONMENTS:
        return sys.executable
    environment = ROOT / ENVIRONMENTS[script]
    if (environment / ".stamp").exists():
        return str(environment / "bin" / "python")
    log = environment / "error.txt"
    errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR")] if log.exists() else []
    why = errors[-1] if errors else "`make bench-kernels` builds it"
    raise Failed(f"not run: no environment {environment.name} ({why})")


@dataclass
class Measured:
    """What one method of a row gave."""

    method: Method
    failed: str = ""
    blas: str = ""
    peak: int | None = None
    error: float = 0.0
    runs: list[dict[str, float]] = field(default_factory=list)
    repeats: int = 0

    def median(self, clock: str) -> float:
        """Median seconds, `wall` or `cpu`."""
        return statistics.median(run[clock] for run in self.runs)

    @property
    def right(self) -> bool:
        """Whether its times may be compared."""
        return not self.failed and self.error <= TOLERANCE


class Bench:
    """Measures rows at one number of threads.

    Args:
        folder: for inputs and results.
        threads: of every process.
        repeats: of a method that is not slow.
        quick: one process for all methods, and no foreign environments.
    """

    def __init__(self, folder: Path, threads: int, repeats: int, quick: bool) -> None:
        self._folder, self._threads, self._repeats, self._quick = folder, threads, repeats, quick
        self._workers: dict[str, Worker] = {}

    def measure(self, row: Row) -> list[Measured]:
        """All methods of a row, in turn."""
        np.savez(self._folder / "inputs.npz", **row.inputs(row))
        results = [Measured(method) for method in row.methods]
        reference: Path | None = None
        for result in results:
            saved = self._folder / f"result-{results.index(result)}.npy"
            self._attempt(result, self._first, row, saved)
            if result.failed:
                continue
            if reference is None:
                reference = saved
                continue
            result.error = distance(saved, reference)
            saved.unlink()
        for turn in range(self._repeats):
            for result in results:
                if not result.failed and turn < result.repeats:
                    self._attempt(result, self._again, row)
        if not self._quick:
            self.close()
        return results

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _attempt(self, result: Measured, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(result, *arguments)
        except Failed as failure:
            result.failed = str(failure)

    def _first(self, result: Measured, row: Row, saved: Path) -> None:
        """Prepare a method and run it for its memory and its result."""
        spec = {"model": row.model, "c": row.c, "outputs": row.outputs, "threads": self._threads, **result.method.spec}
        worker, name = self._worker(result.method), result.method.label
        inputs = str(self._folder / "inputs.npz")
        result.blas = worker.ask(do="prepare", name=name, inputs=inputs, **spec)["blas"]
        first = worker.ask(do="first", name=name, save=str(saved))
        result.peak = first["peak"]
        result.repeats = max(3, min(self._repeats, int(SLOW_SECONDS / first["wall"])))

    def _again(self, result: Measured, row: Row) -> None:
        result.runs.append(self._worker(result.method).ask(do="run", name=result.method.label))

    def _worker(self, method: Method) -> Worker:
        """The process of a method, started if need be."""
        if self._quick and method.script in ENVIRONMENTS:
            raise Failed("not run: --quick leaves other environments out")
        key = method.script if self._quick else method.label
        if key not in self._workers:
            with open(self._folder / f"log-{len(self._workers)}.txt", "w") as log:
                self._workers[key] = Worker(method.script, self._threads, log)
        return self._workers[key]


def distance(one: Path, other: Path) -> float:
    """Relative Frobenius distance of two stored arrays, row by row: some are large."""
    a, b = np.load(one, mmap_mode="r"), np.load(other, mmap_mode="r")
    if a.shape != b.shape:
        return float("inf")
    squares = [(np.square(x - y.astype(np.float64)).sum(), np.square(y, dtype=np.float64).sum()) for x, y in zip(a, b)]
    apart, whole = np.sum(squares, axis=0)
    return float(np.sqrt(apart / whole))


# --- the table -------------------------------------------------------------------------------------------------------

HEADINGS = ("method", "wall ms", "CPU ms", "peak MiB", "time / first", "floor", "error", "runs", "BLAS")


def clock(row: Row, threads: int) -> str:
    """What is compared: CPU seconds at one thread, unless waiting counts, else wall time."""
    return "cpu" if threads == 1 and not row.by_clock else "wall"


def lines(row: Row, results: Sequence[Measured], threads: int, rate: float) -> Iterator[tuple[str, ...]]:
    """The cells of a row's methods; one that has no figures says why in the last cell."""
    base = next((result.median(clock(row, threads)) for result in results if not result.failed), float("nan"))
    for result in results:
        if result.failed:
            yield (result.method.label, *[""] * (len(HEADINGS) - 2), result.failed)
            continue
        time = result.median(clock(row, threads))
        floor = ""
        if row.model:
            floor = f"{operations(row, kept=result.method is CACHED) / rate / time:.0%}"
        peak = "" if result.peak is None else f"{result.peak / 2**20:.0f}"
        error = f"{result.error:.0e}" if result.right else f"WRONG {result.error:.0e}"
        yield (result.method.label, f"{1e3 * result.median('wall'):.4g}", f"{1e3 * result.median('cpu'):.4g}", peak,
               f"{time / base:.3g}", floor, error, str(len(result.runs)), result.blas)  # fmt: skip
    for label, why in row.absent.items():
        yield (label, *[""] * (len(HEADINGS) - 2), why)


def judged(goal: Goal, row: Row, results: Sequence[Measured]) -> tuple[str, ...]:
    """The cells of one goal: what, bound, measured, met or missed."""
    what = f"{row.title}, {goal.threads} thread{'s' * (goal.threads > 1)}: {goal.ours.label}"
    kind = " (stretch)" if goal.stretch else ""
    bound = f"at {'least' if goal.figure == 'speed' else 'most'} {goal.bound:g}{kind}"
    ours = next((result for result in results if result.method == goal.ours and result.right), None)
    peers = [
        result
        for result in results
        if result.right and not result.method.ours and (not goal.against or result.method.label in goal.against)
    ]
    if ours is None or not (peers or goal.figure == "peak"):
        return (what, bound, "nothing to compare", "not judged")
    if goal.figure == "peak":
        value = float("nan") if ours.peak is None else ours.peak / row.kernel_bytes
        return (what, bound, f"peak of {value:.2f} kernels", "met" if value <= goal.bound else "missed")
    measure = clock(row, goal.threads)
    best = min(peers, key=lambda result: result.median(measure))
    ratio = best.median(measure) / ours.median(measure)
    if goal.figure == "added":
        value = 1 / ratio - 1
        return (what, bound, f"{value:.2f} on top of {best.method.label}", "met" if value <= goal.bound else "missed")
    return (what, bound, f"{ratio:.3g} x {best.method.label}", "met" if ratio >= goal.bound else "missed")


def conditions(repeats: int) -> Iterator[str]:
    """What the figures depend on beside the code."""
    chosen = os.environ.get("OPENBLAS_CORETYPE")
    yield (
        f"medians of up to {repeats} runs in turn; torch {torch.__version__}, numpy {np.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} CPUs"
    )
    yield (
        f"OPENBLAS_CORETYPE = {chosen}: `env -u OPENBLAS_CORETYPE make bench-kernels` lets OpenBLAS choose"
        if chosen
        else "OPENBLAS_CORETYPE is not set: OpenBLAS chooses its kernels by the processor"
    )


class Table:
    """Prints blocks of cells as they come and keeps them as Markdown."""

    def __init__(self) -> None:
        self.markdown: list[str] = []

    def say(self, line: str, heading: str = "") -> None:
        """A line of its own."""
        print(f"\n{line}" if heading else line, flush=True)
        self.markdown += ["", f"{heading} {line}" if heading else line, ""]

    def block(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Columns as wide as they need to be; the last one is not filled up."""
        cells = [tuple(headings), *map(tuple, rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            print("  " + "  ".join(padded).rstrip(), flush=True)
        ruled = [cells[0], ("---",) * len(widths), *cells[1:]]
        self.markdown += ["| " + " | ".join(row) + " |" for row in ruled]


def rate_of(row: Row, results: Sequence[Measured], threads: int) -> tuple[float, str]:
    """Operations a second of the fastest large product, and a sentence about all of them."""
    rates = {
        result.method.label: 2 * row.n**3 / result.median(clock(row, threads))
        for result in results
        if not result.failed
    }
    said = ", ".join(f"{rate / 1e9:.0f} by {name}" for name, rate in rates.items())
    return max(rates.values()), f"large float32 products, GFLOP/s: {said}; floors are taken at the faster one"


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no peers from elsewhere, to see that it runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there as well")
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=[row.name for row in ROWS], help="only these")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each method (default: 7)")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    counts = (1,) if options.quick else (1, 2)
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    rate_row = RATE
    if options.quick:
        rows, rate_row = [replace(row, n=row.quick_n, steps=row.steps // 10) for row in rows], replace(RATE, n=RATE.quick_n)
    table = Table()
    for line in conditions(repeats):
        table.say(line)
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in counts:
            bench = Bench(Path(folder), threads, repeats, options.quick)
            rate, said = rate_of(rate_row, bench.measure(rate_row), threads)
            table.say(f"{threads} thread{'s' * (threads > 1)}", heading="##")
            table.say(said)
            for row in rows:
                results = bench.measure(row)
                table.say(row.title, heading="###")
                table.block(HEADINGS, lines(row, results, threads, rate))
                goals = [goal for goal in GOALS if (goal.row, goal.threads) == (row.name, threads)]
                verdicts += [judged(goal, row, results) for goal in goals]
            bench.close()
    table.say("Goals", heading="##")
    table.block(("what", "goal", "measured", "verdict"), verdicts)
    if options.markdown:
        options.markdown.write_text("\n".join(table.markdown).strip() + "\n")


if __name__ == "__main__":
    main()
