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
    from analysis.alignment import alignment
    from analysis.kernels import kernel, layers
    from analysis.load import open_run, open_sweep
    from analysis.matched import at_loss
    from analysis.phases import phase_summary, phases

__all__ = ["alignment", "at_loss", "kernel", "layers", "open_run", "open_sweep", "phase_summary", "phases"]

_HOMES = {
    "at_loss": "matched", "kernel": "kernels", "layers": "kernels", "open_run": "load", "open_sweep": "load",
    "phase_summary": "phases",
}  # fmt: skip


class _Package(ModuleType):
    """The package, its public functions as properties.

    `alignment` and `phases` are modules too, and importing a module binds it to its name in the package. A property
    keeps the function there; a module-level `__getattr__` is not asked once the name is bound.
    """


def _lazily(name: str) -> property:
    home = f"{__name__}.{_HOMES.get(name, name)}"
    return property(lambda package: getattr(import_module(home), name), lambda package, value: None)


for _name in __all__:
    setattr(_Package, _name, _lazily(_name))
sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*globals(), *__all__]
