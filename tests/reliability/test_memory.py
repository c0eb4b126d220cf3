"""An analysis takes memory by the size of its blocks, not by the size of the store.

Dask reads kernels in blocks of `analysis.load.BLOCK_BYTES`, and each thread works on one at a time, with a copy in
float64 for some measures. The budget is twenty blocks for each of two threads, with what the allocator keeps and the
graph of tasks, which alone grows with the store: by some 0.15 MB per block of the alignment.
"""

import shutil
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import peak_memory
from sizes import sizes

from pipeline.store import Writer

BLOCKS = 20 * peak_memory.THREADS
MIB = 2**20


def write(root, n, rows):
    """A run of so many kernels (n, n); few of them differ, which costs a reader the same."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, n, n))
    kernels = np.round(64 * features @ features.swapaxes(1, 2) / n) / 64
    vectors = np.linalg.qr(rng.normal(size=(n, 5)))[0]
    probe = {
        "sample_index": np.arange(n),
        "input": np.ones((n, 1), np.float32),
        "target": rng.choice([-1.0, 1.0], (n, 1)).astype(np.float32),
    }
    about = {"learning_rate": 0.1, "seed": 0}
    with patch("os.fsync", lambda handle: None), Writer.open(
        root, "run", identity={}, attrs=about, dims={"sample": n, "sample2": n, "output": 1, "eig": 5},
        groups={"snapshots": ["ntk", "eigenvector"]}, capacity={"snapshots": rows}, probe=probe, dtype="float32",
    ) as writer:  # fmt: skip
        for step in range(rows):
            row = {**about, "loss": 1.0, "ntk": kernels[step % 4], "eigenvector": vectors}
            writer.append(step, {"snapshots": row})
            if writer.pending_bytes > 64 * MIB or step == rows - 1:
                writer.commit(b"")
        writer.finish("complete", "steps")


@sizes("n,block_bytes", full=(512, 8 * MIB), soak=(512, 16 * MIB))
def test_an_analysis_of_a_store_ten_times_its_budget_stays_within_it(tmp_path, measured, n, block_bytes):
    budget = BLOCKS * block_bytes
    rows = -(-10 * budget // (4 * n * n))
    write(tmp_path, n, rows)
    # All pairs and all eigenvalues of that many kernels take too long; what they take of memory shows in fewer.
    parts = dict.fromkeys(peak_memory.ANALYSES, 1) | {"effective_rank": 16, "kernel_distance": 8}
    for name, part in parts.items():
        command = [sys.executable, peak_memory.__file__, tmp_path, name, rows // part, block_bytes]
        peak = int(subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout)
        assert peak < budget, f"{name} took {peak / MIB:.0f} MiB"
        measured(
            "R22",
            f"{name} of kernels of {n} examples, blocks of {block_bytes // MIB} MiB, {peak_memory.THREADS} threads",
            peak_MiB=round(peak / MIB), budget_MiB=budget // MIB, kernels_MiB=4 * n * n * (rows // part) // MIB,
        )  # fmt: skip
    shutil.rmtree(tmp_path)  # gigabytes that pytest would keep
