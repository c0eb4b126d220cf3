"""The door to an object store, with the operations of `pipeline.disk.Directory`: S3, its kin, and one in memory.

An object appears and is replaced whole, by one PUT that is durable once it is answered; there is no rename and no
lock. So a folder counts as there once its mark, which is put last, is there, and the right to write is an object too:

    lease      PUT if absent, or over exactly the version that was seen to be given back or not renewed in time
    fence      whoever holds a lease replaces only versions that it has seen: of two writers one is refused

The lease keeps two writers from meeting, the fence makes it harmless if they do: a machine that slept, or whose clock
is wrong, loses its turn and never somebody else's rows. A PUT whose answer got lost is told from one that was refused
by reading back what is there.

Credentials and endpoint come from the environment, in the names that each provider's own tools use.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Self

from pipeline.errors import InputError, MissingError, NtkEosError, RunLocked, UnreachableStore

SCHEMES = ("s3", "gs", "az", "memory")
# A lease that was not renewed for so long belongs to nobody; it is renewed three times in that time.
LEASE_SECONDS = 60.0
PUTS_AT_ONCE = 8

Version = Mapping[str, str]


@dataclass(frozen=True)
class Url:
    """Where something lies on an object store, with as much of a `pathlib.Path` as the rest of the code needs."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __fspath__(self) -> str:
        return self.text

    def __truediv__(self, key: str | os.PathLike[str]) -> "Url":
        return Url(f"{self.text.rstrip('/')}/{os.fspath(key)}")

    @property
    def name(self) -> str:
        """Last part."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Last part, without its suffix."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> "Url":
        """Everything but the last part."""
        return Url(self.text.rstrip("/").rpartition("/")[0])

    @property
    def bucket(self) -> str:
        """Scheme and bucket, `s3://bucket`."""
        return "/".join(self.text.split("/")[:3])

    @property
    def prefix(self) -> str:
        """What every key below begins with, inside the bucket."""
        return self.text.removeprefix(self.bucket).strip("/")


def parse_url(text: str) -> Url:
    """The URL of a root.

    Raises:
        InputError: for an unknown scheme, a missing bucket, or a key that steps out of it.
    """
    scheme, _, rest = text.partition("://")
    parts = rest.rstrip("/").split("/")
    if scheme not in SCHEMES or any(part in ("", ".", "..") or "\0" in part for part in parts):
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(f"{text}: must be a folder, or BUCKET/FOLDER after one of {allowed}")
    return Url(f"{scheme}://{'/'.join(parts)}")


@dataclass(frozen=True)
class Entry:
    """A file or an object.

    Attributes:
        key: where, relative to the door.
        size: bytes.
        modified: seconds since 1970, by the clock of whoever keeps it.
    """

    key: str
    size: int
    modified: float


@cache
def client(bucket: str) -> Any:
    """The connection to a bucket, one per process; that of memory:// is the bucket itself.

    Raises:
        NtkEosError: if the extra `cloud` is not installed.
        InputError: if the environment does not describe it.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise NtkEosError(
            f"{bucket} needs the extra `cloud`: pip install '.[cloud]' in the folder of ntk-eos"
        ) from error
    try:
        return from_url(bucket if not bucket.startswith("memory:") else "memory://")
    except (BaseError, ValueError) as error:
        raise InputError(f"{bucket} cannot be used: {_said(error)}") from error


class Conflict(NtkEosError):
    """Another version is there than the one that was to be replaced."""


class Objects:
    """Keys and their bytes below one prefix of a bucket.

    From `lease` on, PUTs run beside each other until `sync`, and each replaces only the version that this door has
    seen.

    Attributes:
        path: the URL.
        beat_seconds: as of a directory; here each beat is a request that is paid for.
    """

    beat_seconds = 10.0

    def __init__(self, path: Url) -> None:
        self.path = path
        self._versions: dict[str, Version] | None = None
        self._puts: dict[str, Future[None]] = {}

    def __repr__(self) -> str:
        return f"Objects({str(self.path)!r})"

    @property
    def client(self) -> Any:
        """The connection to the bucket, as obstore has it."""
        return client(self.path.bucket)

    @contextmanager
    def _asking(self, verb: str, where: Url) -> Iterator[Any]:
        """The client, for requests about `where`; what it raises becomes an error of ours."""
        bucket = self.client
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            yield bucket
        except FileNotFoundError as error:
            raise MissingError(f"{where} does not exist") from error
        except (AlreadyExistsError, PreconditionError) as error:
            raise Conflict(f"{where} has another version than expected") from error
        except (BaseError, OSError) as error:
            raise UnreachableStore(f"{verb} {where} failed: {_said(error)}") from error

    def _at(self, key: str) -> Url:
        if any(part in ("", ".", "..") or "\0" in part for part in key.split("/")):
            raise InputError(f"key {key!r}: must be a relative path without '..'")
        return self.path / key

    # --- objects ----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """Write a whole object at once; readers see the old bytes or the new ones.

        Args:
            key: where, relative to the prefix.
            data: the new bytes.
            durable: False for what nothing depends on (a heartbeat): it replaces whatever is there.

        Raises:
            RunLocked: under a lease, here or from `sync`, if another process has replaced the object.
            UnreachableStore: if the request fails, also from `sync`.
        """
        where = self._at(key)
        if self._versions is None or not durable:
            with self._asking("put", where) as bucket:
                bucket.put(where.prefix, data, use_multipart=False)
        elif PUTS_AT_ONCE > 1:
            if key in self._puts:
                self._puts.pop(key).result()  # two PUTs of one object could end in either order
            self._puts[key] = _pool().submit(self._put_seen, self._versions, key, data)
        else:
            self._put_seen(self._versions, key, data)

    def _put_seen(self, versions: dict[str, Version], key: str, data: bytes) -> None:
        version = self.swap(key, data, versions.get(key))
        if version is None:
            raise RunLocked(f"{self.path / key} was replaced by another process, which writes here now: this one stops")
        versions[key] = version

    def swap(self, key: str, data: bytes, seen: Version | None) -> Version | None:
        """PUT over the version `seen` only, or only if nothing is there; the new version, or None if refused."""
        where = self._at(key)
        try:
            with self._asking("put", where) as bucket:
                return _version(bucket.put(where.prefix, data, mode=seen or "create", use_multipart=False))
        except (Conflict, MissingError):
            # Refused, or done before and its answer lost: then what is there is what we sent.
            try:
                found, meta = self._read(where)
            except MissingError:
                return None
            return _version(meta) if found == data else None

    def _read(self, where: Url, limit: int | None = None) -> tuple[bytes, Any]:
        with self._asking("get", where) as bucket:
            answer = bucket.get(where.prefix)
            size = answer.meta["size"]
            if limit is not None and size > limit:
                raise InputError(f"{where} has {size} bytes, more than the {limit} allowed here")
            return bytes(answer.bytes()), answer.meta

    def sync(self) -> None:
        """Wait until all PUTs are answered; the first failure among them is raised."""
        for failure in self.settle():
            raise failure

    def settle(self) -> Sequence[BaseException]:
        """Wait until all PUTs are answered, however; gives the failures among them."""
        puts, self._puts = self._puts, {}
        return [failure for put in puts.values() if (failure := put.exception()) is not None]

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The bytes of an object.

        Args:
            key: which object.
            limit: refuse to read more bytes than this.

        Raises:
            MissingError: if there is no such object.
            InputError: if it is larger than `limit`.
            UnreachableStore: if the request fails.
        """
        return self._read(self._at(key), limit)[0]

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        where = self._at(key)
        try:
            with self._asking("head", where) as bucket:
                return bucket.head(where.prefix)["size"]
        except MissingError:
            return None

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key, or one below it."""
        return self.size(key) is not None or Objects(self._at(key)).is_there()

    def is_there(self) -> bool:
        """Whether there is anything below the prefix."""
        return next(self._listed(self.path), None) is not None

    def entries(self, prefix: str = "", *, hidden: bool = False) -> Iterator[Entry]:
        """All objects below `prefix`; hidden names only if asked for."""
        for key, meta in self._listed(self._at(prefix) if prefix else self.path):
            if hidden or not any(part.startswith(".") for part in key.split("/")):
                yield Entry(key, meta["size"], meta["last_modified"].timestamp())

    def _listed(self, where: Url) -> Iterator[tuple[str, Any]]:
        with self._asking("list", where) as bucket:
            for batch in bucket.list(where.prefix):
                for meta in batch:
                    yield meta["path"].removeprefix(self.path.prefix).strip("/"), meta

    def list(self, prefix: str = "", *, hidden: bool = False) -> Iterator[str]:
        """Keys of all objects below `prefix`; hidden names only if asked for."""
        return (entry.key for entry in self.entries(prefix, hidden=hidden))

    def folders(self, marks: tuple[str, ...]) -> Sequence[str]:
        """Names of the folders directly below with one of `marks`, file or folder: one without is still being made."""
        with self._asking("list", self.path) as bucket:
            found = bucket.list_with_delimiter(self.path.prefix)["common_prefixes"]
        names = sorted(name for path in found if not (name := Url(path).name).startswith("."))
        return [name for name in names if any(self.exists(f"{name}/{mark}") for mark in marks)]

    def delete(self, key: str) -> None:
        """Remove an object, and all below it; one that is not there is fine."""
        where = self._at(key)
        gone = [key, *self.list(key, hidden=True)]
        with suppress(MissingError), self._asking("delete", where) as bucket:
            bucket.delete([(self.path / one).prefix for one in gone])
        for one in gone:
            (self._versions or {}).pop(one, None)

    # --- what only a directory needs --------------------------------------------------------------------------------

    def make(self) -> None:
        """There are no folders to create."""

    def check_writable(self) -> None:
        """Only a PUT can tell; what is asked here is whether the bucket answers."""
        self.is_there()

    def sweep(self) -> None:
        """A killed writer leaves no temporary objects."""

    # --- the right to write -----------------------------------------------------------------------------------------

    def claim(
        self, name: str, build: "Callable[[Objects], None]", *, marks: tuple[str, ...], lease: str, note: bytes
    ) -> tuple["Objects", "ObjectLease", bool]:
        """Become the single writer of the folder `name`, which is built first if it has none of its marks.

        Args:
            name: which folder.
            build: puts all that belongs to a new folder, a mark last.
            marks: what a folder that is there has one of.
            lease: key of the lease in the folder.
            note: who asks.

        Returns:
            The folder, the lease, and whether it is new.

        Raises:
            RunLocked: if another process holds the lease.
        """
        folder = Objects(self.path / name)
        held = folder.lease(lease, note)
        try:
            new = not any(mark in (folder._versions or {}) for mark in marks)
            if new:
                build(folder)
                folder.sync()
        except BaseException:
            held.release()
            raise
        return folder, held, new

    def lease(self, key: str, note: bytes) -> "ObjectLease":
        """Become the single writer below this prefix, and learn the version of every object that is there.

        Args:
            key: the object that stands for the right to write.
            note: who holds it.

        Raises:
            RunLocked: if another process holds it and renewed it within `LEASE_SECONDS`; the message carries its note.
        """
        holder, left, seen = self._holder(key)
        if left > 0:
            raise RunLocked(
                f"{self.path.name} is being written by {holder or 'another process'}; wait for it or stop it "
                f"(its lease ends in {left:.0f} s unless it is renewed)"
            )
        body = note + b"\n" + uuid.uuid4().hex.encode()
        version = self.swap(key, body, seen)
        if version is None:
            raise RunLocked(f"{self.path.name} is being written by another process; wait for it or stop it")
        lease = ObjectLease(self, key, body, version)
        try:
            self._versions = {name: _version(meta) for name, meta in self._listed(self.path)}
        except BaseException:
            lease.release()
            raise
        return lease

    def leased(self, key: str) -> bool:
        """Whether some process holds the lease of `key` now."""
        return self._holder(key)[1] > 0

    def _holder(self, key: str) -> tuple[str, float, Version | None]:
        """Who holds a lease, for how many seconds more, and the version of the object that says so."""
        try:
            body, meta = self._read(self._at(key))
        except MissingError:
            return "", 0.0, None
        left = LEASE_SECONDS - (_now() - meta["last_modified"]).total_seconds() if body else 0.0
        return body.decode("utf-8", "replace").partition("\n")[0], left, _version(meta)


class ObjectLease:
    """The right to write below a prefix, renewed by a thread until `release`.

    Attributes:
        token: tells this lease from any other; None where the kernel keeps the lease.
    """

    def __init__(self, objects: Objects, key: str, body: bytes, version: Version) -> None:
        self.token = body.partition(b"\n")[2].decode()
        self._objects, self._key, self._body = objects, key, body
        self._version: Version | None = version
        self._renewed = time.monotonic()
        self._turn, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep, name=f"lease of {objects.path}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._over.wait(LEASE_SECONDS / 3):
            with suppress(NtkEosError):  # another try comes; `still_held` asks before anything depends on it
                self._renew()

    def _renew(self) -> None:
        with self._turn:
            if self._version is not None:
                self._version = self._objects.swap(self._key, self._body, self._version)
                self._renewed = time.monotonic()

    def still_held(self) -> bool:
        """Whether nobody has taken the lease over; asks the store if the last renewal is too long ago to know.

        Raises:
            UnreachableStore: if the store does not answer.
        """
        if time.monotonic() - self._renewed > LEASE_SECONDS / 2:
            self._renew()
        return self._version is not None

    def release(self) -> None:
        """Give the lease back; a second call does nothing. If that fails it ends by itself in a while."""
        self._over.set()
        self._objects.settle()
        with self._turn:
            version, self._version = self._version, None
            if version is not None:
                with suppress(NtkEosError):
                    self._objects.swap(self._key, b"", version)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(PUTS_AT_ONCE, "put")


def _version(answer: Mapping[str, Any]) -> Version:
    """What a later PUT names to replace exactly this version."""
    return {name: answer[name] for name in ("e_tag", "version") if answer.get(name)}


def _now() -> datetime:
    return datetime.now(UTC)


def _said(error: BaseException) -> str:
    """The first line of a message; the rest is for those who debug the client."""
    return str(error).partition("\n")[0]
