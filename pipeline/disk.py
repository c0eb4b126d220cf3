"""The one door to the disk: every file of a store is written, listed, locked and deleted here.

`door(path)` is a `Directory`, or for the URL of an object store `pipeline.objects.Objects`, with the same operations.

A file is complete or absent. `put` writes a hidden temporary file, fsyncs it and only then renames it over the
old one: a rename before the fsync can leave a committed name pointing at bytes that a power cut took. `sync`
fsyncs the directories touched since the last call, which makes the renames themselves durable; a commit calls it
before it writes the one file that publishes the rest.
"""

import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from pipeline.errors import DamagedStore, InputError, MissingError, RunLocked
from pipeline.objects import Entry, ObjectLease, Objects, Url, parse_url

__all__ = ["Directory", "Door", "Lease", "Location", "Objects", "door", "location", "refuse_link"]

TEMPORARY = ".tmp-"
NEW = ".new-"
CREATING = ".lock"  # held while a folder is built under a hidden name

Location = Path | Url


def location(path: str | os.PathLike[str]) -> Location:
    """A path, or a URL if it looks like one.

    Raises:
        InputError: for the URL of something else than an object store.
    """
    text = os.fspath(path)
    return parse_url(text) if "://" in text else Path(text)


def door(path: str | os.PathLike[str]) -> "Door":
    """What reads and writes below a folder or a URL; nothing is created or asked for."""
    place = location(path)
    return Objects(place) if isinstance(place, Url) else Directory(place)


def refuse_link(path: str | os.PathLike[str]) -> None:
    """Raise DamagedStore for a symbolic link: inside a store it may lead out of it, to be read or written there.

    No bucket has any, so a URL is none.
    """
    if os.path.islink(path):
        raise DamagedStore(f"{path} is a symbolic link, which may lead out of the store: put what it points to there")


class Lease:
    """The right to write one run, held until `release` or the end of the process, however it ends.

    Attributes:
        token: as in `pipeline.objects.ObjectLease`; None, for the kernel gives the lock to one process only.
    """

    token = None

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def still_held(self) -> bool:
        """Whether it was not given back; nobody can take it."""
        return self._handle is not None

    def release(self) -> None:
        """Give the lease back; a second call does nothing."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            # Closing alone would leave the lock to any child process that was forked meanwhile.
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


class Directory:
    """Keys (relative paths with `/`) and their bytes below one folder of a local POSIX file system.

    Attributes:
        path: the folder.
        beat_seconds: a heartbeat is due so often; more would cost more than it tells.
    """

    beat_seconds = 1.0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._touched: set[Path] = set()

    def __repr__(self) -> str:
        return f"Directory({str(self.path)!r})"

    def _file(self, key: str) -> Path:
        parts = key.split("/")
        if not key or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise InputError(f"key {key!r}: must be a relative path without '..'")
        path = str(self.path)
        for part in parts:
            path = os.path.join(path, part)
            refuse_link(path)
        return Path(path)

    def make(self) -> None:
        """Create the folder and its parents; a folder that is there already is fine.

        Raises:
            InputError: if the file system refuses.
        """
        try:
            self._make(self.path)
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}; choose a folder you may write") from error

    def _make(self, folder: Path) -> None:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._touched.update(path.parent for path in new)

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """Write a whole file at once: readers see the old bytes or the new ones.

        Args:
            key: where, relative to the folder.
            data: the new bytes.
            durable: fsync the bytes before the rename; only a file that nothing depends on (a heartbeat) goes without.
        """
        target = self._file(key)
        self._make(target.parent)
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            self._touched.add(target.parent)

    def sync(self) -> None:
        """Make all renames and creations since the last call durable."""
        for folder in sorted(self._touched, reverse=True):
            if folder.is_dir():
                _fsync_directory(folder)
        self._touched.clear()

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The bytes of a file.

        Args:
            key: which file.
            limit: refuse to read more bytes than this.

        Raises:
            MissingError: if there is no such file.
            InputError: if it is larger than `limit`, or cannot be read.
        """
        file = self._file(key)
        try:
            # A pipe or a device would make us wait, or read, for ever.
            if not stat.S_ISREG(file.stat().st_mode):
                raise InputError(f"{file} is not a file")
            if limit is not None and file.stat().st_size > limit:
                raise InputError(f"{file} has {file.stat().st_size} bytes, more than the {limit} allowed here")
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError(f"{file} does not exist") from error
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error

    def exists(self, key: str) -> bool:
        """Whether a file or folder of that key is there."""
        return self._file(key).exists()

    def is_there(self) -> bool:
        """Whether the folder itself is there."""
        return self.path.is_dir()

    def check_writable(self) -> None:
        """Refuse a folder that could not be created or written; nothing is created.

        Raises:
            InputError: saying which of its parents is in the way.
        """
        there = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise InputError(f"cannot create {self.path}: {there} is a file; choose a folder you may write")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"cannot create {self.path}: {there} cannot be written; choose a folder you may write")

    def size(self, key: str) -> int | None:
        """Bytes of a file; None if there is none."""
        try:
            return self._file(key).stat().st_size
        except OSError:
            return None

    def entries(self, prefix: str = "", *, hidden: bool = False) -> Iterator[Entry]:
        """All files below `prefix`, sorted; hidden names (temporary files) only if asked for.

        Raises:
            DamagedStore: if one of them is a symbolic link.
        """
        for key in self.list(prefix, hidden=hidden):
            file = self.path / key
            refuse_link(file)
            try:
                facts = file.stat()
            except FileNotFoundError:
                continue  # deleted since it was listed
            yield Entry(key, facts.st_size, facts.st_mtime)

    def list(self, prefix: str = "", *, hidden: bool = False) -> Iterator[str]:
        """Keys of all files below `prefix`, sorted; hidden names (temporary files) only if asked for."""
        start = self._file(prefix) if prefix else self.path
        for folder, folders, files in os.walk(start):
            folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
            for name in sorted(files):
                if hidden or not name.startswith("."):
                    yield Path(folder, name).relative_to(self.path).as_posix()

    def folders(self, marks: tuple[str, ...]) -> Sequence[str]:
        """Names of the visible folders directly below; each came with its mark, by one rename."""
        return sorted(path.name for path in self.path.glob("[!.]*") if path.is_dir())

    def delete(self, key: str) -> None:
        """Remove a file or a whole folder; one that is not there is fine."""
        target = self._file(key)
        with suppress(FileNotFoundError, NotADirectoryError):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()

    def sweep(self) -> None:
        """Remove the temporary files that killed writers left behind. Only the holder of the lease may call this."""
        for folder, _, files in os.walk(self.path):
            for name in files:
                if name.startswith(TEMPORARY):
                    Path(folder, name).unlink(missing_ok=True)

    def publish(self, built: "Directory", name: str) -> None:
        """Rename a folder that was built under a hidden name to `name` here, all its files at once."""
        for folder, _, _ in os.walk(built.path, topdown=False):
            _fsync_directory(Path(folder))
        os.rename(built.path, self._file(name))
        self._touched.add(self.path)
        self.sync()

    def claim(
        self, name: str, build: "Callable[[Directory], None]", *, marks: tuple[str, ...], lease: str, note: bytes
    ) -> tuple["Directory", Lease, bool]:
        """Become the single writer of the folder `name`, which is built first if it is not there.

        It is built under a hidden name and renamed in. The lease is taken in the hidden folder and travels with it, so
        the folder is never visible without a writer.

        Args:
            name: which folder.
            build: writes all files of a new folder.
            marks: what a folder that is there has one of; here the rename says so.
            lease: file of the lease in the folder.
            note: who asks.

        Returns:
            The folder, the lease, and whether it is new.

        Raises:
            RunLocked: if another process holds the lease.
        """
        folder = Directory(self.path / name)
        with self.lease(CREATING, note, wait=True):
            # Nobody else creates now, so half-made folders are a killed writer's.
            for left in self.path.glob(f"{NEW}*"):
                with suppress(OSError):  # in nobody's way
                    self.delete(left.name)
            if not self.exists(name):
                hidden = Directory(self.path / f"{NEW}{uuid.uuid4().hex}-{name}")
                hidden.make()
                held = hidden.lease(lease, note)
                try:
                    build(hidden)
                    self.publish(hidden, name)
                except BaseException:
                    held.release()
                    raise
                return folder, held, True
        return folder, folder.lease(lease, note), False

    def lease(self, key: str, note: bytes, *, wait: bool = False) -> Lease:
        """Become the single writer: lock the file `key` and leave `note` in it for whoever is refused.

        The lock belongs to the open file, so the kernel frees it when the process ends, also by SIGKILL.

        Args:
            key: the file that stands for the right to write.
            note: who holds it.
            wait: wait for the holder instead of refusing.

        Raises:
            RunLocked: if another process holds it; the message carries its note.
        """
        handle = os.open(self._file(key), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if wait:
                fcntl.flock(handle, fcntl.LOCK_EX)
            else:
                _lock_now(handle, self.path.name)
            os.ftruncate(handle, 0)
            os.pwrite(handle, note, 0)
        except BaseException:
            os.close(handle)
            raise
        return Lease(handle)

    def leased(self, key: str) -> bool:
        """Whether some process holds the lease of `key` now."""
        try:
            handle = os.open(self._file(key), os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False


Door = Directory | Objects
AnyLease = Lease | ObjectLease


def _lock_now(handle: int, name: str) -> None:
    for _ in range(5):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A reader that asks `leased` holds a shared lock for an instant; a writer holds its own for long.
            time.sleep(0.02)
    holder = os.pread(handle, 4096, 0).decode("utf-8", "replace").strip()
    raise RunLocked(f"{name} is being written by {holder or 'another process'}; wait for it or stop it")


def _fsync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
