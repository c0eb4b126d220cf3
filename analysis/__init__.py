"""The analysis stage: reads the stores that `pipeline` wrote; never trains and never imports torch.

    import analysis
    ds = analysis.open_sweep("data/stores/digits")
    analysis.at_loss(analysis.alignment(ds), 0.01).kta.values

Importing the package is light: what a name needs is imported when the name is used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.alignment import alignment, full_alignment, layer_alignment
    from analysis.complexity import complexity
    from analysis.compute import computing
    from analysis.distance import cka, kernel_distance, kernel_velocity, polar
    from analysis.eigenspace import eigenspace, eigenspace_overlap
    from analysis.energy import energy
    from analysis.generalisation import held_out, held_out_alignment, held_out_error, kernel_regression
    from analysis.kernels import kernel, layers
    from analysis.load import open_run, open_sweep
    from analysis.matched import at_loss
    from analysis.phases import phase_summary, phases
    from analysis.rows import join
    from analysis.sharpness import gap_bound, sharpness_gap
    from analysis.specialisation import specialisation
    from analysis.spectra import top_mass, trace_ratio

_HOMES = {
    "alignment": ["alignment", "full_alignment", "layer_alignment"],
    "complexity": ["complexity"],
    "compute": ["computing"],
    "distance": ["cka", "kernel_distance", "kernel_velocity", "polar"],
    "eigenspace": ["eigenspace", "eigenspace_overlap"],
    "energy": ["energy"],
    "generalisation": ["held_out", "held_out_alignment", "held_out_error", "kernel_regression"],
    "kernels": ["kernel", "layers"],
    "load": ["open_run", "open_sweep"],
    "matched": ["at_loss"],
    "phases": ["phase_summary", "phases"],
    "rows": ["join"],
    "sharpness": ["gap_bound", "sharpness_gap"],
    "specialisation": ["specialisation"],
    "spectra": ["top_mass", "trace_ratio"],
}

__all__ = [
    "alignment", "at_loss", "cka", "complexity", "computing", "eigenspace", "eigenspace_overlap", "energy",
    "full_alignment", "gap_bound", "held_out", "held_out_alignment", "held_out_error", "join", "kernel",
    "kernel_distance", "kernel_regression", "kernel_velocity", "layer_alignment", "layers", "open_run", "open_sweep",
    "phase_summary", "phases", "polar", "sharpness_gap", "specialisation", "top_mass", "trace_ratio",
]  # fmt: skip


class _Package(ModuleType):
    """The package, its public functions as properties.

    `alignment` and `phases` are modules too, and importing a module binds it to its name in the package. A property
    keeps the function there; a module-level `__getattr__` is not asked once the name is bound.
    """


def _lazily(home: str, name: str) -> property:
    return property(lambda package: getattr(import_module(f"{__name__}.{home}"), name), lambda package, value: None)


for _home, _names in _HOMES.items():
    for _name in _names:
        setattr(_Package, _name, _lazily(_home, _name))
sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*globals(), *__all__]
