"""The same configuration gives the same bits; another seed gives others; another number of threads, last bits."""

import numpy as np
from sizes import sizes

from pipeline import schema
from pipeline.config import load_study
from pipeline.store import list_runs
from pipeline.train import train

STUDY = [
    "model.width=32", "compute.dtype=float64", "stop.loss=1e-300", "learning_rate=0.05", "record.loss_levels=[]",
    "record.snapshots={every=5}", "record.spectra={every=5}", "record.scalars={every=1}", "record.hessian={every=5}",
]  # fmt: skip
# Of the largest value in a row's array, by the dtype that it is stored in: a last bit of float32 is 6e-8. Gradient
# descent is stable here; at the edge of stability rounding errors grow with every step, and no number holds for long.
TOLERANCE = {"float32": 1e-6, "float64": 1e-10}


def trained(root, *overrides):
    """The run of a study that is trained on its own."""
    (run,) = load_study("smoke", [*STUDY, *overrides]).runs()
    train(run, str(root))
    return list_runs(root)[0]


def differences(one, other):
    """Largest difference of the values of two runs, relative to the largest value in its row, by dtype."""
    assert one.lengths == other.lengths
    found = dict.fromkeys(TOLERANCE, 0.0)
    for group in one.lengths:
        for variable in schema.row_variables(group, one.arrays(group)):
            name = f"{group}/{variable.name}"
            # A residual is rounding and nothing else.
            if variable.volatile or variable.name.endswith("residual") or one.node(name)["data_type"] not in TOLERANCE:
                continue
            a, b = (run.read(name).reshape(run.lengths[group], -1) for run in (one, other))
            largest = np.abs(a).max(axis=1, keepdims=True)
            relative = np.abs(a - b) / np.where(largest > 0, largest, 1)
            found[a.dtype.name] = max(found[a.dtype.name], float(relative.max()))
    return found


@sizes("n, steps", full=(200, 20))
def test_what_changes_the_bits_and_what_does_not(tmp_path, measured, n, steps):
    size = [f"data.n={n}", f"stop.steps={steps}"]
    one, again = trained(tmp_path / "one", *size), trained(tmp_path / "again", *size)
    other = trained(tmp_path / "other", *size, "seed=1")
    threads = trained(tmp_path / "threads", *size, "compute.threads=2")
    assert one.head == again.head
    assert one.head != other.head
    assert (one.attrs["provenance"]["threads"], threads.attrs["provenance"]["threads"]) == (1, 2)
    assert differences(one, again) == dict.fromkeys(TOLERANCE, 0.0)
    assert all(value > 100 * TOLERANCE[kind] for kind, value in differences(one, other).items())
    found = differences(one, threads)
    assert all(found[kind] <= most for kind, most in TOLERANCE.items()), found
    measured("R6", "the same configuration twice, and another seed", n=n, steps=steps, equal_heads=1, other_heads=1)
    shown = {f"largest_relative_difference_{kind}": f"{value:.0e}" for kind, value in found.items()}
    limits = {f"tolerance_{kind}": f"{value:.0e}" for kind, value in TOLERANCE.items()}
    measured("R6", "1 thread and 2", n=n, steps=steps, **shown, **limits)
