"""The catalogue: a DuckDB file of tables derived from the runs of a store and from the results of its measures.

It is an index, not the truth: `sync` reads the runs that changed since the last time into a private copy and publishes
that by one rename; everybody else opens the file read-only. Deleting it loses nothing. Its tables are those of
`analysis.tables`. Missing is NULL, never NaN.
"""

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from analysis import results, tables
from analysis.tables import TABLES, one_line
from pipeline import schema
from pipeline.disk import Directory
from pipeline.errors import InputError, MissingError, RunLocked
from pipeline.store import FINAL, RECORD, SUFFIX, Run, read_run, runs_directory

if TYPE_CHECKING:  # imported when a run is read: a query of an up-to-date catalogue takes neither
    import pandas as pd
    import xarray as xr

NAME = "catalog.duckdb"
COPY = ".catalog-next.duckdb"
LOCK = ".catalog-lock"

TRAIN_ROWS = 2000
QUERY_SECONDS = 60.0
QUERY_ROWS = 1_000_000
QUERY_MEMORY = "1GB"
READING = ("SELECT", "EXPLAIN", "PRAGMA", "CALL", "MULTI")  # MULTI: what DuckDB makes of PIVOT

# What a catalogue was made by: another digest means other tables.
LAYOUT = hashlib.blake2b(tables.reference().encode(), digest_size=8).hexdigest()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """What a query gives.

    Attributes:
        columns: names.
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
    path = Path(root, NAME)
    if _fingerprints(root, known := _known(path)) != known:
        with _writing(root, wait=not path.exists()) as mine:
            if mine:
                _update(root)
    return path


def query(root: str | os.PathLike[str], sql: str, sync: bool = True) -> Table:
    """Ask the catalogue: read-only, without access to files or the network.

    Args:
        root: folder of the store.
        sql: one statement that reads.
        sync: bring the catalogue up to date first; it is built in any case if there is none.

    Raises:
        MissingError: if the root does not exist.
        InputError: if DuckDB refuses the statement, it writes, or it takes too long or gives too much.
    """
    path = Path(root, NAME)
    if sync or not path.exists():
        path = _sync(root)
    with _open(path) as connection:
        timer = threading.Timer(QUERY_SECONDS, connection.interrupt)
        timer.start()
        try:
            return _ask(connection, sql)
        except duckdb.InterruptException as error:
            raise InputError(f"sql: stopped after {QUERY_SECONDS:g} s; ask for less at a time") from error
        except duckdb.Error as error:
            raise InputError(f"sql: {one_line(error)}") from error
        finally:
            timer.cancel()


_sync = sync  # `query` has a parameter of that name


def copy_table(root: str | os.PathLike[str], table: str, path: str | os.PathLike[str]) -> None:
    """Write a whole table to a file.

    Args:
        root: folder of the store, its catalogue up to date.
        table: one of `TABLES`.
        path: the file; Parquet if its name has the suffix .parquet, else CSV.
    """
    if table not in TABLES:
        raise MissingError(f"table {table!r} is not one of {', '.join(TABLES)}")
    with duckdb.connect(Path(root, NAME), read_only=True) as connection:
        relation = connection.table(table)
        if ".parquet" in Path(path).suffixes:
            relation.write_parquet(str(path))
        else:
            relation.write_csv(str(path), header=True)


def write_claims(root: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the table `claims`; the verdicts stay until a run changes.

    Args:
        root: folder of the store.
        rows: by column of the table.
    """
    if not Path(root, NAME).exists():
        sync(root)
    frame = tables.frame_of("claims", list(rows))
    with _writing(root, wait=True), _next(root) as connection:
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
            "python_enable_replacements": False,
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
    return Table([column[0] for column in cursor.description], [str(column[1]) for column in cursor.description], rows)


# --- writing ----------------------------------------------------------------------------------------------------------


def _known(path: Path) -> dict[str, str]:
    """Fingerprint of each run that the catalogue has; empty if it has to be built anew."""
    try:
        with _open(path) as connection:
            if connection.execute("select layout from meta").fetchall() != [(LAYOUT,)]:
                return {}
            return dict(connection.execute("select run_id, fingerprint from sync").fetchall())
    except duckdb.Error:
        return {}


def _fingerprints(root: str | os.PathLike[str], known: Mapping[str, str]) -> dict[str, str]:
    """What the rows of each run depend on. The record of a finished run is not opened if its file did not change."""
    derived = results.files(root)
    found = {}
    for folder in sorted(runs_directory(root).path.glob(f"[!.]*{SUFFIX}")):
        if folder.is_dir():
            run_id = folder.name.removesuffix(SUFFIX)
            found[run_id] = _fingerprint(folder, derived.get(run_id, {}), known.get(run_id, ""))
    return found


def _fingerprint(folder: Path, derived: Mapping[str, Path], known: str) -> str:
    # A record is replaced by a rename, so its file is another one, with another inode, after each commit.
    stat = (folder / RECORD).stat()
    record = f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}"
    final = next((status for status in FINAL if known.startswith(f"{record} {status} ")), None)
    status = final or read_run(folder).status
    return f"{record} {status} {' '.join(path.name for path in derived.values())}"


@contextmanager
def _writing(root: str | os.PathLike[str], *, wait: bool) -> Iterator[bool]:
    """Be the only writer of the catalogue; False if another process is, and `wait` is not asked for."""
    note = f"process {os.getpid()}".encode()
    try:
        lease = Directory(root).lease(LOCK, note, wait=wait)
    except RunLocked:
        log.warning("the catalogue of %s is being written by another process: using the previous version", root)
        yield False
        return
    except OSError as error:
        raise InputError(f"{root} cannot be written: {error.strerror}; choose a store that you may write") from error
    with lease:
        yield True


@contextmanager
def _next(root: str | os.PathLike[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A private copy of the catalogue, in one transaction; published when the block ends without an error."""
    directory, path, copy = Directory(root), Path(root, NAME), Path(root, COPY)
    for left in (COPY, f"{COPY}.wal"):  # of a writer that was killed
        directory.delete(left)
    fresh = not _known(path) 
    if not fresh:
        shutil.copyfile(path, copy)
    with duckdb.connect(copy) as connection:
        connection.begin()
        if fresh:
            for name in TABLES:
                tables.create_table(connection, name)
        yield connection
        connection.execute("delete from meta")
        tables.insert(connection, "meta", tables.frame_of("meta", [_meta(root)]))
        connection.commit()
    directory.publish(Directory(copy), NAME)


def _meta(root: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        version = metadata.version("ntk-eos")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "format_version": schema.FORMAT_VERSION,
        "layout": LAYOUT,
        "root": str(Path(root).resolve()),
        "built_at": datetime.now(UTC).replace(tzinfo=None),
        "package_version": version,
    }
