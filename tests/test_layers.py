"""Imports point one way: a module may import only what stands in a line above its own, here.

A new module fails until it has a place. A package stands where its name stands; inside it imports are free. Imports
within functions and those for type checkers count like any other: they are dependencies too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = {
    "pipeline": [
        "__init__ errors",
        "schema cadence seeds zarr3 console provenance images objects",
        "disk guard",
        "cluster",
        "store",
        "config verify",
        "repair",
        "data models losses",
        "kernels operators spectra optim gradient",
        "flows",
        "measure processes matrix_free",
        "record",
        "train",
        "plan sweep rebuild request",
        "tiles single",
        "forecast remote remote_tiles",
        "replay",
        "cli",
    ],
    "analysis": [
        "rows tables claims compute",
        "load",
        "linalg kernels",
        "spectra",
        "alignment complexity distance eigenspace energy sharpness specialisation",
        "matched phases generalisation linear",
        "__init__",
        "evolution",
        "results",
        "catalog",
        "plots export",
        "studies",
        "judge",
        "report verdicts",
    ],
}
SHARED = {"errors", "schema", "disk", "store", "cluster"}  # what the analysis may know of the training stage
# These know no store and no study file.
PURE = {"data", "models", "losses", "kernels", "operators", "spectra", "optim", "gradient", "measure", "processes"}
PURE |= {"flows", "matrix_free"}
PURE_MAY_IMPORT = {"errors", "schema", "cadence", "seeds", "images"} | PURE
TORCH_FREE = {"errors", "schema", "cadence", "seeds", "zarr3", "console", "provenance", "objects", "disk", "store"}
TORCH_FREE |= {"config", "verify", "repair", "guard", "cli", "images", "cluster"}
# These may import what a string names.
BY_NAME = {"pipeline.models.imported", "analysis.__init__", "analysis.studies.__init__"}
TRAINING_ONLY = {"clarabel", "torch", "pooch", "safetensors", "sklearn", "scipy"}  # the extra `train`

Unit = tuple[str, str]  # package and the name that has a place in it, such as ("analysis", "studies")


def files() -> dict[str, Path]:
    """Dotted name -> file, for every module of both packages."""
    found = {}
    for package in LAYERS:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def row(unit: Unit) -> int | None:
    """Line of `LAYERS` in which a unit stands."""
    package, name = unit
    return next((i for i, names in enumerate(LAYERS[package]) if name in names.split()), None)


def unit_of(dotted: str) -> Unit:
    """`analysis.studies.jiang2025` -> ("analysis", "studies"); a name that a package itself defines -> its __init__."""
    package, _, rest = dotted.partition(".")
    name = rest.partition(".")[0] or "__init__"
    is_module = (ROOT / package / name).is_dir() or (ROOT / package / f"{name}.py").is_file()
    return package, name if is_module or row((package, name)) is not None else "__init__"


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, int, bool]]:
    """Each import as (absolute dotted name, line, whether importing the module performs it)."""
    todo: list[tuple[ast.AST, bool]] = [(tree, True)]
    while todo:
        node, eager = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # In `a.b`, one dot is `a`; in `a/__init__.py`, named a.__init__ here, it is `a` as well.
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((f"{origin}.{alias.name}", node.lineno, eager) for alias in node.names)
        for name, value in ast.iter_fields(node):
            typing_only = isinstance(node, ast.If) and name == "body" and "TYPE_CHECKING" in ast.unparse(node.test)
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or typing_only
            children = value if isinstance(value, list) else [value]
            todo.extend((child, eager and not lazy) for child in children if isinstance(child, ast.AST))


def violations(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one module."""
    package, name = importer = tuple(module.split(".")[:2])
    place = row(importer)
    if place is None:
        return [f"{module} has no place: add {name!r} to LAYERS[{package!r}] in tests/test_layers.py"]
    found = []
    for dotted, line, eager in imports(ast.parse(source), module):
        where = f"{module}:{line} imports {dotted}"
        top = dotted.partition(".")[0]
        if top in TRAINING_ONLY and (package == "analysis" or name in TORCH_FREE):
            found.append(f"{where}, which only training may need")
        if dotted in ("importlib", "importlib.import_module") and module not in BY_NAME:
            found.append(f"{where}; what a string names cannot be checked here, so BY_NAME lists who may")
        if top not in LAYERS:
            continue
        target = unit_of(dotted)
        if target == importer:
            continue
        target_place = row(target)
        if top != package:
            if package == "analysis" and target[1] not in SHARED:
                found.append(f"{where}; the analysis may import only {sorted(SHARED)} from pipeline")
            elif package == "pipeline" and name != "cli":
                found.append(f"{where}; of pipeline only cli knows the analysis")
            elif package == "pipeline" and eager:
                found.append(f"{where} at the top; the command loads the analysis inside the function that needs it")
        elif target_place is None:
            found.append(f"{where}, which has no place: add {target[1]!r} to LAYERS in tests/test_layers.py")
        elif target_place >= place:
            found.append(f"{where}, which does not stand above it in LAYERS of tests/test_layers.py")
        elif package == "pipeline" and name in PURE and target[1] not in PURE_MAY_IMPORT:
            found.append(f"{where}; {name} computes and may import only {sorted(PURE_MAY_IMPORT)}")
    return found


def test_every_module_is_seen():
    assert {"pipeline.__init__", "pipeline.store", "analysis.studies.jiang2025.edge"} <= files().keys()


@pytest.mark.parametrize("module", files())
def test_imports_point_one_way(module):
    assert violations(files()[module].read_text(), module) == []


PLANTED = {
    "upward": ("pipeline.store", "from pipeline.train import train", "does not stand above it"),
    "upward_by_name": ("pipeline.store", "from pipeline import schema, sweep", "imports pipeline.sweep"),
    "upward_relative": ("pipeline.store", "from .train import train", "imports pipeline.train.train"),
    "upward_relative_name": ("pipeline.store", "from . import train", "imports pipeline.train,"),
    "upward_from_a_package": ("analysis.linalg", "import analysis.studies.jiang2025", "does not stand above it"),
    "upward_two_dots": ("pipeline.data.digits", "from ..record import Recorder", "pipeline.record.Recorder"),
    "upward_in_a_function": ("pipeline.disk", "def f():\n    import pipeline.store", "disk:2 imports"),
    "sideways": ("pipeline.models", "import pipeline.losses", "does not stand above it"),
    "init_from_below": ("analysis.load", "from analysis import open_run", "does not stand above it"),
    "pipeline_init_is_empty": ("pipeline.__init__", "from .schema import GROUPS", "does not stand above it"),
    "nobody_imports_the_command": ("pipeline.sweep", "from pipeline.cli import main", "does not stand above it"),
    "unplaced_importer": ("pipeline.helpers", "", "pipeline.helpers has no place: add 'helpers'"),
    "analysis_in_pipeline": ("pipeline.sweep", "def f():\n    import analysis", "only cli knows the analysis"),
    "analysis_at_the_top": ("pipeline.cli", "from analysis import plots", "inside the function that needs it"),
    "train_in_analysis": ("analysis.load", "from pipeline.config import Study", "may import only ['cluster',"),
    "command_in_analysis": ("analysis.report", "from pipeline import cli", "may import only ['cluster',"),
    "pipeline_init_in_analysis": ("analysis.load", "from pipeline import VERSION", "may import only ['cluster',"),
    "torch_in_analysis": ("analysis.load", "def f():\n    import torch.linalg", "only training may need"),
    "scipy_in_analysis": ("analysis.linalg", "from scipy.linalg import eigh", "only training may need"),
    "by_name": ("pipeline.sweep", "from importlib import import_module", "what a string names cannot be checked"),
    "torch_in_config": ("pipeline.config", "from torch import nn", "only training may need"),
    "store_in_kernels": ("pipeline.kernels", "from pipeline.store import Writer", "kernels computes"),
}


@pytest.mark.parametrize(("module", "source", "message"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_caught(module, source, message):
    (found,) = violations(source, module)
    assert message in found


ALLOWED = {
    "downward": ("pipeline.store", "from pipeline import schema\nfrom .disk import Lease"),
    "lazy_analysis": ("pipeline.cli", "def f():\n    from analysis.catalog import sync"),
    "typing_only": ("pipeline.cli", "if TYPE_CHECKING:\n    from analysis.judge import Judgement"),
    "shared": ("analysis.load", "from pipeline.store import list_runs\nfrom pipeline import schema"),
    "inside_a_package": ("analysis.studies.__init__", "from . import jiang2025"),
    "public_names": ("analysis.__init__", "from .load import open_run\nfrom analysis.phases import phases"),
    "other_people": ("analysis.catalog", "import duckdb, xarray.testing"),
    "metadata": ("analysis.catalog", "from importlib import metadata"),
    "torch_where_it_belongs": ("pipeline.kernels", "import torch\nfrom .errors import InputError"),
}


@pytest.mark.parametrize(("module", "source"), ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_passes(module, source):
    assert violations(source, module) == []


def test_an_import_of_a_name_without_a_place_is_caught(monkeypatch):
    monkeypatch.setitem(LAYERS, "pipeline", [names for names in LAYERS["pipeline"] if names != "store"])
    (found,) = violations("import pipeline.store", "pipeline.cli")
    assert found.endswith("add 'store' to LAYERS in tests/test_layers.py")


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (sorted(TORCH_FREE - {"cli"}), {"torch", "sklearn", "analysis"}),
        (["cli"], {"torch", "sklearn", "analysis", "xarray", "zarr", "pandas", "duckdb", "matplotlib", "pydantic"}),
    ],
    ids=["contract", "command"],
)
def test_an_import_stays_light(modules, heavy):
    """The check above cannot see what other people's packages import in turn."""
    present = [f"pipeline.{name}" for name in modules if f"pipeline.{name}" in files()]
    code = f"import sys, {', '.join(present)}; print(*sorted({heavy!r} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
