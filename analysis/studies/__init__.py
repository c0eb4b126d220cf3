"""One module per paper: its `CLAIMS`, its `FIGURES`, and in `CHOICES` which settings are the paper's and which ours.

A study file names its paper; the module is imported when a store of that study is first asked about it.
"""

import os
from importlib import import_module
from types import ModuleType

from analysis.plots import FIGURES, Drawing
from pipeline.errors import InputError
from pipeline.store import list_runs

PAPERS = {"jiang2025": "analysis.studies.jiang2025"}


def paper(name: str) -> ModuleType:
    """The module of a paper.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in PAPERS:
        raise InputError(f"paper {name!r} has no module in analysis.studies; known: {', '.join(PAPERS)}")
    return import_module(PAPERS[name])


def papers(root: str | os.PathLike[str]) -> list[ModuleType]:
    """The modules of the papers that the runs of a store name, each once.

    Raises:
        InputError: if a run names one that is not known here.
    """
    named = dict.fromkeys(run.attrs["paper"] for run in list_runs(root) if run.attrs.get("paper"))
    return [paper(name) for name in named]


def figures(root: str | os.PathLike[str]) -> dict[str, Drawing]:
    """The figures of a store by name: those that its studies ask for, in their order, or else what every store has.

    A figure of a paper stands in the place of the one of that name that every store has.

    Raises:
        InputError: if a study asks for one that its paper does not have.
    """
    known = FIGURES | {name: figure for module in papers(root) for name, figure in module.FIGURES.items()}
    asked = [run.attrs.get("figures") for run in list_runs(root)] or [None]
    names = dict.fromkeys(name for figures in asked for name in (FIGURES if figures is None else figures))
    for name in names:
        if name not in known:
            raise InputError(f"figure {name!r}: not one of {', '.join(known)}; see `figures` in the study")
    return {name: known[name] for name in names}
