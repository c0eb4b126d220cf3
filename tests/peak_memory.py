"""Analyses a store in a process of its own and prints the bytes that this took at its peak beyond the imports.

python tests/peak_memory.py ROOT ANALYSIS ROWS BLOCK_BYTES
"""

import sys

import dask
import resident

import analysis
from analysis import load

THREADS = 2

ANALYSES = {
    "alignment": lambda ds: analysis.alignment(ds)[["kta", "kta_centred", "cumulative_alignment"]],
    "effective_rank": lambda ds: analysis.alignment(ds)[["effective_rank"]],
    "kernel_velocity": analysis.kernel_velocity,
    "polar": analysis.polar,
    "kernel_distance": analysis.kernel_distance,
}


def main(root: str, name: str, rows: str, block_bytes: str) -> None:
    load.BLOCK_BYTES = int(block_bytes)
    ds = analysis.open_sweep(root).isel(snapshot=slice(int(rows)))
    ANALYSES[name](ds.isel(snapshot=slice(2))).compute()  # whatever is imported late is imported now
    before = resident.begin()
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        ANALYSES[name](ds).compute()
    print(resident.peak() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
