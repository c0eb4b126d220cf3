"""The catalogue: a DuckDB file of tables derived from the runs of a store and from the results of its measures.

It is an index, not the truth: `sync` reads the runs that changed since the last time into a private copy and publishes
that by one rename; everybody else opens the file read-only. Deleting it loses nothing. For a store that may not be
written, and has none that is up to date, and for one on an object store, it is built in the user's cache; the
environment variable NTK_EOS_CATALOG names another file. Its tables are those of `analysis.tables`. Missing is NULL,
never NaN.

What it has seen is also a witness: a run that holds less than the catalogue has rows of is an older copy. Its rows stay
as they are until the run has come as far again, and `behind` names it.
"""

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from analysis import results, tables
from analysis.tables import TABLES, one_line
from pipeline import schema
from pipeline.disk import Directory, Location, door, location
from pipeline.errors import DamagedStore, InputError, MissingError, RunLocked
from pipeline.store import (
    FINAL,
    RECORD,
    RECORD_LIMIT,
    SUFFIX,
    Run,
    find_path,
    read_run,
    run_path,
    run_paths,
    runs_directory,
)

if TYPE_CHECKING:  # imported when a run is read: a query of an up-to-date catalogue takes neither
    import pandas as pd
    import xarray as xr

NAME = "catalog.duckdb"
COPY = ".catalog-next.duckdb"
LOCK = ".catalog-lock"
CHOSEN = "NTK_EOS_CATALOG"

TRAIN_ROWS = 2000
QUERY_SECONDS = 60.0
QUERY_ROWS = 1_000_000
QUERY_MEMORY = "1GB"
READING = ("SELECT", "EXPLAIN", "PRAGMA", "CALL", "MULTI")  # MULTI: what DuckDB makes of PIVOT

DERIVED = ("alignment", "phase", "measures")

# What a catalogue was made by: another digest means other tables.
LAYOUT = hashlib.blake2b(tables.reference().encode(), digest_size=8).hexdigest()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """What a query gives.

    Attributes:
        columns: names, each once: a name that was there before gets a number, as in DuckDB's data frames.
        types: DuckDB's types.
        rows: one tuple per row; NULL is None.
    """

    columns: list[str]
    types: list[str]
    rows: list[tuple[Any, ...]]


def sync(root: str | os.PathLike[str]) -> Path:
    """Bring the catalogue up to date with the runs and their results.

    Only runs whose record, status or results changed are read. If another process is at it, the catalogue is left as
    it was, with a note in the log.

    Returns:
        Path of the catalogue.

    Raises:
        MissingError: if the root does not exist.
        InputError: if it is not a store, or cannot be written.
        DamagedStore: if the record of a run is damaged.
    """
    path = _file(root)
    known = _known(path)
    if _fingerprints(root, known or {}) != known:
        with _writing(path.parent, wait=known is None) as mine:
            if mine:
                _update(root, path)
    return path


def query(root: str | os.PathLike[str], sql: str, sync: bool = True) -> Table:
    """Ask the catalogue: read-only, without access to files or the network.

    Args:
        root: folder of the store.
        sql: one statement that reads.
        sync: bring the catalogue up to date first; it is built in any case if there is none that can be used.

    Raises:
        MissingError: if the root does not exist.
        InputError: if DuckDB refuses the statement, it writes, or it takes too long or gives too much.
    """
    path = _file(root)
    if sync or _known(path) is None:
        path = _sync(root)
    with _open(path) as connection:
        timer = threading.Timer(QUERY_SECONDS, connection.interrupt)
        timer.start()
        try:
            table = _ask(connection, sql)
            _note_what_is_missing(root, connection, sql)
            return table
        except duckdb.InterruptException as error:
            raise InputError(f"sql: stopped after {QUERY_SECONDS:g} s; ask for less at a time") from error
        except duckdb.Error as error:
            raise InputError(f"sql: {_explained(error)}") from error
        finally:
            timer.cancel()


_sync = sync  # `query` has a parameter of that name


def derived(sql: str) -> bool:
    """Whether a query names a table that results are computed for; a mention anywhere in its text counts."""
    return any(name in sql.lower() for name in DERIVED)


def behind(root: str | os.PathLike[str], run_ids: Iterable[str] = ()) -> dict[str, str]:
    """Runs that are older than the catalogue has seen them: a copy of earlier days was put in their place.

    The catalogue is taken as it is. A run that was deleted and recorded again is another one, by the time of its
    creation.

    Args:
        root: folder of the store.
        run_ids: names of runs or unique beginnings of them; all runs by default.

    Returns:
        What was found, by run; nothing where there is no catalogue that can be used.
    """
    file = _file(root)
    seen = {} if _known(file) is None else _seen(file)
    found = {}
    for path in [find_path(root, run_id) for run_id in run_ids] or run_paths(root):
        with suppress(MissingError, InputError, DamagedStore):  # of a record that cannot be read there is more to say
            run = read_run(path)
            if what := _behind(run, seen):
                found[run.run_id] = what
    return found


def copy_table(root: str | os.PathLike[str], table: str, path: str | os.PathLike[str]) -> None:
    """Write a whole table to a file.

    Args:
        root: folder of the store; its catalogue is taken as it is, and built if there is none.
        table: one of `TABLES`.
        path: the file; Parquet if its name has the suffix .parquet, else CSV.
    """
    if table not in TABLES:
        raise MissingError(f"table {table!r} is not one of {', '.join(TABLES)}")
    catalogue = _file(root)
    if _known(catalogue) is None:
        sync(root)
    with duckdb.connect(catalogue, read_only=True) as connection:
        relation = connection.table(table)
        if ".parquet" in Path(path).suffixes:
            relation.write_parquet(str(path))
        else:
            relation.write_csv(str(path), header=True)


def write_claims(root: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the table `claims`; the verdicts stay until a run changes.

    Where the catalogue cannot be written, it stays as it was, with a note in the log.

    Args:
        root: folder of the store.
        rows: by column of the table.
    """
    path = _file(root)
    if _known(path) is None:
        sync(root)
    if not _writable(path.parent):
        log.warning("%s cannot be written: the verdicts are not kept in its catalogue", path.parent)
        return
    frame = tables.frame_of("claims", list(rows))
    with _writing(path.parent, wait=True), _next(root, path) as connection:
        connection.execute("delete from claims")
        tables.insert(connection, "claims", frame)


# --- reading ----------------------------------------------------------------------------------------------------------


def _open(path: Path) -> duckdb.DuckDBPyConnection:
    """A connection for somebody else's SQL."""
    return duckdb.connect(
        path,
        read_only=True,
        config={
            "enable_external_access": False,
            "memory_limit": QUERY_MEMORY,
            "temp_directory": "",
            "lock_configuration": True,
        },
    )


def _ask(connection: duckdb.DuckDBPyConnection, sql: str) -> Table:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise InputError(f"sql: must be one statement, got {len(statements)}")
    kind = statements[0].type.name
    if kind not in READING:
        raise InputError(f"sql: {kind} is refused, the catalogue is read-only; give one SELECT")
    cursor = connection.execute(statements[0])
    rows = cursor.fetchmany(QUERY_ROWS + 1)
    if len(rows) > QUERY_ROWS:
        raise InputError(f"sql: more than {QUERY_ROWS} rows; add a limit, or write tables to files with `export`")
    columns = _distinct(column[0] for column in cursor.description)
    return Table(columns, [str(column[1]) for column in cursor.description], rows)


def _distinct(names: Iterable[str]) -> list[str]:
    """Names, each once: `run_id`, `run_id_1`, `run_id_2`. To DuckDB, names that differ in case only are the same."""
    found: dict[str, str] = {}
    for name in names:
        numbered = (f"{name}_{i}" for i in count(1))
        free = next(one for one in chain([name], numbered) if one.lower() not in found)
        found[free.lower()] = free
    return list(found.values())


def _explained(error: duckdb.Error) -> str:
    said = one_line(error)
    if "Table with name" not in said:
        return said
    # DuckDB goes on to guess among its own system tables.
    return f"{said.partition(';')[0]} Tables are {', '.join(TABLES)}"


def _note_what_is_missing(root: str | os.PathLike[str], connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Say so if the answer may lack rows because results were not computed yet."""
    if derived(sql):
        ((missing,),) = connection.execute("select count(*) from sync where not analyzed").fetchall()
        if missing:
            log.warning("%d run(s) are not analysed as they stand now: `ntk-eos analyze %s` does that", missing, root)


# What the catalogue has last seen of a run: when it was created, its newest step, its head.
Seen = tuple[datetime | None, int | None, str]


def _seen(path: Path) -> dict[str, Seen]:
    """What the catalogue has seen of each run."""
    with _open(path) as connection:
        rows = connection.execute("select run_id, created_at, steps, head from runs").fetchall()
    return {run_id: (created_at, steps, head) for run_id, created_at, steps, head in rows}


def _behind(run: Run, seen: Mapping[str, Seen]) -> str | None:
    """In which way a run is older than it was seen; None if it is not."""
    created_at, steps, head = seen.get(run.run_id, (None, None, run.head))
    last = run.attrs["last_step"]
    if run.head == head or tables.utc(run.attrs.get("created_at")) != created_at:
        return None
    if last is not None and (steps is None or last > steps):
        return None  # it went on
    return (
        f"the record ends at step {last}, head {run.head}, but the catalogue has seen step {steps}, head {head}: an "
        "older or foreign copy of the run was put here"
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def _file(root: str | os.PathLike[str]) -> Path:
    """Where the catalogue of a store lies: in the store, or in the user's cache if it cannot be brought up to date."""
    store = runs_directory(root).path.parent
    if chosen := os.environ.get(CHOSEN):
        Directory(Path(chosen).parent).make()
        return Path(chosen)
    if isinstance(store, Path):
        if _writable(store):
            return store / NAME
        known = _known(store / NAME)
        if known is not None and known == _fingerprints(root, known):
            return store / NAME
        store = store.resolve()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "ntk-eos" / hashlib.blake2b(os.fsencode(store), digest_size=8).hexdigest()
    if not folder.is_dir():
        if isinstance(store, Path):
            log.warning("%s cannot be written: its catalogue is kept in %s", root, folder)
        Directory(folder).make()
    return folder / NAME


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _known(path: Path) -> dict[str, str] | None:
    """Fingerprint of each run that the catalogue has; None if it has to be built anew."""
    try:
        with _open(path) as connection:
            # We make no views: one that a stranger made might read the user's files when the table is exported.
            views = connection.execute("select view_name from duckdb_views() where not internal").fetchall()
            if not views and connection.execute("select layout from meta").fetchall() == [(LAYOUT,)]:
                return dict(connection.execute("select run_id, fingerprint from sync").fetchall())
    except duckdb.Error:
        pass
    return None


def _fingerprints(root: str | os.PathLike[str], known: Mapping[str, str]) -> dict[str, str]:
    """What the rows of each run depend on. The record of a finished run is not parsed if its bytes did not change."""
    derived = results.files(root)
    ids = {path.name.removesuffix(SUFFIX): path for path in run_paths(root)}
    return {run_id: _fingerprint(ids[run_id], derived.get(run_id, {}), known.get(run_id, "")) for run_id in sorted(ids)}


def _fingerprint(folder: Location, derived: Mapping[str, Location], known: str) -> str:
    # Its bytes and nothing about its file: a copy of a store is as fresh as the store was.
    try:
        data = door(folder).get(RECORD, limit=RECORD_LIMIT)
    except MissingError as error:
        raise MissingError(f"{folder} is not a run: it has no {RECORD}") from error
    record = hashlib.blake2b(data, digest_size=16).hexdigest()
    final = next((status for status in FINAL if known.startswith(f"{record} {status} ")), None)
    status = final or read_run(folder).status
    return f"{record} {status} {' '.join(path.name for path in derived.values())}"


def _update(root: str | os.PathLike[str], path: Path) -> None:
    """Replace the rows of all runs that changed."""
    import pandas as pd

    known = _known(path)
    now = _fingerprints(root, known or {})
    changed = [run_id for run_id in now if known is None or now[run_id] != known.get(run_id)]
    replaced = [*changed, *(known or {}).keys() - now.keys()]
    if known is not None and not replaced:
        return  # another process did it while this one waited
    derived = results.files(root)
    seen = {} if known is None else _seen(path)
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for run_id in changed:
        run = read_run(run_path(root, run_id))
        if run.run_id != run_id:
            raise InputError(f"{run.path} holds the run {run.run_id}: give its folder that name again")
        if what := _behind(run, seen):
            log.warning("%s: %s; its rows in the catalogue stay as they were", run_id, what)
            replaced.remove(run_id)
            continue
        try:
            rows = _rows(run, derived.get(run_id, {}))
        except DamagedStore as error:
            # Without a row in `sync`, so that it is tried again until somebody has mended it.
            log.warning("%s is left out of the catalogue: %s", run_id, error)
            continue
        for name, frame in rows.items():
            if len(frame):
                frames[name].append(frame)
        synced = {"run_id": run_id, "fingerprint": now[run_id], "analyzed": results.is_fresh(root, run)}
        frames["sync"].append(tables.frame_of("sync", [synced]))
    if known is not None and not replaced:
        return
    with _next(root, path) as connection:
        connection.execute("delete from claims")  # verdicts on numbers that have changed
        for name, layout in TABLES.items():
            if layout.columns[0] == tables.RUN_ID:
                connection.execute(f"delete from {name} where run_id in (select unnest(?))", [replaced])
            if frames[name]:
                tables.insert(connection, name, pd.concat(frames[name], ignore_index=True))


@contextmanager
def _writing(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Be the only writer of the catalogue; False if another process is, and `wait` is not asked for."""
    note = f"process {os.getpid()}".encode()
    try:
        lease = Directory(folder).lease(LOCK, note, wait=wait)
    except RunLocked:
        log.warning("the catalogue in %s is being written by another process: using the previous version", folder)
        yield False
        return
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; choose a store that you may write") from error
    with lease:
        yield True


@contextmanager
def _next(root: str | os.PathLike[str], path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A private copy of the catalogue, in one transaction; published when the block ends without an error."""
    directory, copy = Directory(path.parent), path.with_name(COPY)
    fresh = _known(path) is None
    _discard(directory)  # of a writer that was killed
    try:
        if not fresh:
            shutil.copyfile(path, copy)
        with duckdb.connect(copy, config={"enable_external_access": False}) as connection:
            connection.begin()
            if fresh:
                for name in TABLES:
                    tables.create_table(connection, name)
            yield connection
            connection.execute("delete from meta")
            tables.insert(connection, "meta", tables.frame_of("meta", [_meta(root)]))
            connection.commit()
        directory.publish(Directory(copy), path.name)
    finally:
        _discard(directory)


def _discard(directory: Directory) -> None:
    for name in (COPY, f"{COPY}.wal"):
        directory.delete(name)


def _meta(root: str | os.PathLike[str]) -> dict[str, Any]:
    place = location(root)
    try:
        version = metadata.version("ntk-eos")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "format_version": schema.FORMAT_VERSION,
        "layout": LAYOUT,
        "root": os.fspath(place.resolve() if isinstance(place, Path) else place),
        "built_at": datetime.now(UTC).replace(tzinfo=None),
        "package_version": version,
    }


# --- the rows of a run ------------------------------------------------------------------------------------------------


def _rows(run: Run, derived: Mapping[str, Location]) -> "dict[str, pd.DataFrame]":
    """All that the catalogue says of a run, by table."""
    import pandas as pd

    long = []
    rows = {
        "runs": tables.frame_of("runs", [tables.run_row(run)]),
        "snapshots": _stored(run, "snapshots", range(run.lengths.get("snapshots", 0))),
        "train": _stored(run, "train", thinned(run.lengths.get("train", 0), TRAIN_ROWS)),
    }
    for measure, path in derived.items():
        try:
            ds = results.read(path)
        except MissingError:
            continue  # replaced a moment ago: the next sync sees another fingerprint
        if measure == "alignment":
            rows["alignment"] = _columns(run, "alignment", ds)
        elif measure == "phases":
            rows["phases"] = _columns(run, "phases", ds.assign(phase=_named(ds["phase"])))
            rows["phase_changes"] = _phase_changes(run, ds)
        else:
            long.append(_long(run, ds))
    if long:
        rows["measures"] = pd.concat(long, ignore_index=True)
    return rows


def thinned(length: int, most: int) -> list[int]:
    """At most so many positions, evenly spread, with the first and the last."""
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _stored(run: Run, name: str, positions: Sequence[int]) -> "pd.DataFrame":
    """Rows of a group of the store, as the table of its name has them."""
    import pandas as pd

    stored = run.arrays(name)
    wanted = [column.name for column in TABLES[name].columns if column.name in stored]
    columns = {column: run.read(f"{name}/{column}")[positions] for column in wanted}
    where = {"position": positions} if name == "snapshots" else {}
    return pd.DataFrame({"run_id": run.run_id, **where, **columns}, index=range(len(positions)))


def _columns(run: Run, name: str, ds: "xr.Dataset") -> "pd.DataFrame":
    """A result along `step`, as the table has it."""
    import pandas as pd

    wanted = [column.name for column in TABLES[name].columns if column.name in ds.variables]
    return pd.DataFrame({"run_id": run.run_id, **{column: ds[column].values for column in wanted}})


def _named(flags: "xr.DataArray") -> "xr.DataArray":
    """The words that the numbers of a CF flag variable stand for."""
    import numpy as np

    return flags.copy(data=np.array(flags.attrs["flag_meanings"].split(), dtype=object)[flags.values])


def _phase_changes(run: Run, ds: "xr.Dataset") -> "pd.DataFrame":
    row: dict[str, Any] = {str(name): array.item() for name, array in ds.data_vars.items() if array.ndim == 0}
    if not row["crossed"]:
        row["crossing_step"] = None
    return tables.frame_of("phase_changes", [{**row, "run_id": run.run_id}])


def _long(run: Run, ds: "xr.Dataset") -> "pd.DataFrame":
    """Every value of a result that is not missing as a row; the i-th of several per step is called name_i, from 1."""
    import pandas as pd

    series = {}
    for name, array in ds.data_vars.items():
        if array.dims == ("step",):
            series[name] = array.values
        else:
            series |= {f"{name}_{i + 1}": values for i, values in enumerate(array.values.T)}
    frame = pd.DataFrame({"run_id": run.run_id, "step": ds["step"].values, **series})
    return frame.melt(["run_id", "step"], var_name="measure", value_name="value").dropna(subset="value")
