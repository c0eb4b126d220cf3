"""This project's kernels, eigenpairs and recording side by side with peers, in one run: `make bench-kernels`.

Every method has a process of its own, which is told when to run: A B A B across all the methods of a row, so that all
meet the same noise, and a ratio of medians survives a busy machine. Every process gets the same number of threads and
of CPUs. One thread is compared by CPU seconds, several by the clock.

- Peak memory: the first call, caches and result included, above what the process held before it. Libraries are loaded
  and functions compiled by then.
- Error: the relative Frobenius distance to this project's result. Beyond the row's tolerance the peer is WRONG,
  and no ratio is taken to it.
- Floor: the fewest operations that give the row's result (`rows.py`) at the rate of a large product in the same run;
  the share is how much of the time those would need.
- BLAS: what computed the products, with the kernels that OpenBLAS chose. OPENBLAS_CORETYPE overrides its choice:
  `env -u OPENBLAS_CORETYPE make bench-kernels` measures without.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rows import CACHED, ENVIRONMENTS, GOALS, RATE, ROWS, Goal, Method, Row, operations

ROOT = Path(__file__).parents[2]
PEERS = Path(__file__).with_name("peers")
PART = 2**22  # numbers compared at once
SLOW_SECONDS = 20  # a method that takes longer for all its repetitions makes fewer of them, but at least three


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
    tolerance: float = 0.0
    runs: list[dict[str, float]] = field(default_factory=list)
    repeats: int = 0

    def median(self, clock: str) -> float:
        """Median seconds, `wall` or `cpu`."""
        return statistics.median(run[clock] for run in self.runs)

    @property
    def right(self) -> bool:
        """Whether its times may be compared."""
        return not self.failed and self.error <= self.tolerance


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
        results = [Measured(method, tolerance=row.tolerance) for method in row.methods]
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
    """Relative Frobenius distance of two stored arrays, a part at a time: some are large."""
    a, b = np.load(one, mmap_mode="r"), np.load(other, mmap_mode="r")
    if a.shape != b.shape:
        return float("inf")
    apart = whole = 0.0
    for start in range(0, a.size, PART):
        x, y = (array.reshape(-1)[start : start + PART].astype(np.float64) for array in (a, b))
        apart, whole = apart + np.square(x - y).sum(), whole + np.square(y).sum()
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
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no other environments, to see that it runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there as well")
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=[row.name for row in ROWS], help="only these")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each method (default: 7)")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    counts = (1,) if options.quick else (1, 2)
    rate_row, *rows = [row for row in (RATE, *ROWS) if row is RATE or not options.rows or row.name in options.rows]
    if options.quick:
        rate_row, *rows = [replace(row, n=row.quick_n, steps=row.steps // 10) for row in (rate_row, *rows)]
    table = Table()
    for line in conditions(repeats):
        table.say(line)
    verdicts, wrong = [], 0
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
                wrong += sum(not result.failed and not result.right for result in results)
            bench.close()
    table.say("Goals", heading="##")
    table.block(("what", "goal", "measured", "verdict"), verdicts)
    if options.markdown:
        options.markdown.write_text("\n".join(table.markdown).strip() + "\n")
    if wrong:
        sys.exit(f"{wrong} result(s) are not this project's: see WRONG above")


if __name__ == "__main__":
    main()
