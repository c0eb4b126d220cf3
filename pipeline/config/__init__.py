"""Study files: TOML -> validated keys -> a grid of runs.

A study file is the whole description of an experiment; `docs/studies.md` lists every key. This package reads it without
importing torch or xarray, and without importing or opening anything that the file names: a study that asks for a
user's own model is only described here.

A run is identified by what determines its numbers. `[stop]` and `compute.commit_seconds` are left out, so that a
smaller loss or more steps continues a run. Of `data.file` only the name is taken, so that an identity is the same on
every machine; what stands in the file goes into the store, whose digest chain begins with the examples, so that a run
is never continued on other data.

A new key must default to None, which means "as before it existed": absent keys are not part of the identity, so the
ids of earlier runs stay.
"""

from pipeline.config.data import Digits, File
from pipeline.config.models import Imported, Mlp
from pipeline.config.record import KERNELS, CadenceTable, Record, kernel_table
from pipeline.config.run import KINDS, TABLES, Heading, RunConfig, config_of
from pipeline.config.study import (
    MAX_BYTES,
    Study,
    check_imports_allowed,
    load_study,
    needs_import,
    shipped,
    studies_dir,
)
from pipeline.config.training import Compute, GradientDescent, Mse, StochasticGradientDescent, Stop

__all__ = [
    "KERNELS", "KINDS", "MAX_BYTES", "TABLES", "CadenceTable", "Compute", "Digits", "File", "GradientDescent",
    "Heading", "Imported", "Mlp", "Mse", "Record", "RunConfig", "StochasticGradientDescent", "Stop", "Study",
    "check_imports_allowed", "config_of", "kernel_table", "load_study", "needs_import", "shipped", "studies_dir",
]  # fmt: skip
