"""Copies of a store for other tools: netCDF per run, Parquet or CSV per table of the catalogue."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import xarray as xr
from zarr.storage import ObjectStore, StorePath

from analysis import catalog
from pipeline.disk import Objects, door
from pipeline.errors import InputError, NtkEosError
from pipeline.store import Run, list_runs


def export_store(
    root: str | os.PathLike[str],
    kind: str,
    folder: str | os.PathLike[str],
    progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> Iterator[Path]:
    """Write copies of a store and yield their paths; each appears under its name when it is whole.

    Args:
        root: folder of the store.
        kind: netcdf (one file per run, groups kept), parquet or csv (one file per table of the catalogue).
        folder: where to; created if absent.
        progress: told the share done and what comes next.

    Raises:
        InputError: if the folder cannot be created.
        NtkEosError: for netcdf, if the extra `netcdf` is not installed.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {target}: {error.strerror}; choose a folder you may write") from error
    if kind == "netcdf":
        runs = list_runs(root)
        for number, run in enumerate(runs):
            progress(number / len(runs), run.run_id)
            yield _whole(target / f"{run.run_id}.nc", partial(_netcdf, run))
    else:
        for number, table in enumerate(catalog.TABLES):
            progress(number / len(catalog.TABLES), table)
            yield _whole(target / f"{table}.{kind}", partial(catalog.copy_table, root, table))


def _whole(path: Path, write: Callable[[Path], None]) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _netcdf(run: Run, path: Path) -> None:
    """The committed rows of a run, read lazily; netCDF attributes know no nesting, so those become JSON text."""
    source: Any = run.path
    place = door(source)
    if isinstance(place, Objects):
        source = StorePath(ObjectStore(place.client, read_only=True), source.prefix)
    tree = xr.open_datatree(source, engine="zarr", chunks={})

    def flat(dataset: xr.Dataset) -> xr.Dataset:
        dataset = dataset.assign_attrs({name: _text(value) for name, value in dataset.attrs.items()})
        for variable in dataset.variables.values():
            variable.attrs = {name: _text(value) for name, value in variable.attrs.items()}
        return dataset

    try:
        xr.map_over_datasets(flat, tree).to_netcdf(path, engine="h5netcdf")
    except (ImportError, ValueError) as error:
        if "h5netcdf" not in str(error):
            raise
        raise NtkEosError(
            "netCDF needs the extra `netcdf`: pip install '.[netcdf]' in the folder of ntk-eos"
        ) from error


def _text(value: object) -> object:
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)
