"""A worker of the kernel benchmark: one process that prepares a method, runs it when told, and times itself.

One JSON document a line. The driver sends {"do": "prepare", "name", ...spec}, then {"do": "first", "name", "save"} for
the peak of memory and the result, then {"do": "run", "name"} as often as it likes, in turn with other processes. Every
line is answered by one: what was measured, or {"error": ...}. It needs numpy and the standard library alone, so that
every environment can run it.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# A quick method that has waited longer than this runs once before it is timed.
IDLE_SECONDS = 5.0

Spec = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Work(NamedTuple):
    """A prepared method.

    Attributes:
        run: one computation from beginning to end; it returns when the result is there.
        to_numpy: the result as an array, outside the measured time.
        blas: what computes the products.
    """

    run: Callable[[], Any]
    to_numpy: Callable[[Any], np.ndarray]
    blas: str


Prepare = Callable[[Spec, Arrays], Work]


_last: dict[str, tuple[float, float]] = {}  # when each method ended, and what it took


def serve(prepare: Prepare) -> None:
    """Answer the driver until it closes the pipe; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    works: dict[str, Work] = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), works, prepare)
        except Exception as error:  # a peer may fail in any way, and the table says how
            said = (str(error).strip() or "no message").splitlines()[0]
            answer = {"error": f"{type(error).__name__}: {said}"}
        print(json.dumps(answer), file=answers, flush=True)


def openblas() -> str:
    """The OpenBLAS kernels that this process has chosen, as `OpenBLAS SkylakeX`; several if its copies differ."""
    import threadpoolctl

    found = {info["architecture"] for info in threadpoolctl.threadpool_info() if info["internal_api"] == "openblas"}
    return " + ".join(f"OpenBLAS {name}" for name in sorted(found)) or "no OpenBLAS"


def _answer(message: Spec, works: dict[str, Work], prepare: Prepare) -> Spec:
    name = message["name"]
    if message["do"] == "prepare":
        with np.load(message["inputs"]) as archive:
            arrays = dict(archive)
        works[name] = prepare(message, arrays)
        gc.freeze()  # so that a collection passes over the libraries, which takes longer than some methods
        return {"blas": works[name].blas}
    gc.collect()
    if message["do"] == "run":
        ended, took = _last.get(name, (time.perf_counter(), 0.0))
        if time.perf_counter() - ended > IDLE_SECONDS and took < IDLE_SECONDS:
            works[name].run()  # its memory may have been reclaimed while slower methods had their turn
        measured, _ = _timed(works[name].run)
        _last[name] = time.perf_counter(), measured["wall"]
        return measured
    before = _reset_peak()
    measured, result = _timed(works[name].run)
    _last[name] = time.perf_counter(), measured["wall"]
    peak = _memory("VmHWM")
    np.save(message["save"], works[name].to_numpy(result))
    return {**measured, "peak": None if before is None or peak is None else max(peak - before, 0)}


def _timed(run: Callable[[], Any]) -> tuple[Spec, Any]:
    """Seconds by the clock, and seconds of all the threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def _reset_peak() -> int | None:
    """Make the high-water mark of resident memory start again from what is held now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS")


def _memory(field: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where the system has none."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))
