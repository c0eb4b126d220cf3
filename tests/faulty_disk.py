"""What the tests of disks that fail, are full or lose power share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from writer_loop import record

from pipeline import disk
from pipeline.errors import NtkEosError


def attempt(root: Path, groups: Mapping[str, list[str]], committed: list[int]) -> str:
    """What `record` failed with, if it did."""
    try:
        record(root, groups, committed)
    except (OSError, NtkEosError) as error:
        return str(error)
    return ""


@contextmanager
def no_fsync() -> Iterator[None]:
    """They are called, and not done: this is not about power cuts."""
    with patch("os.fsync", lambda handle: None):
        yield


def opening_with(opened: Callable[..., Any]) -> AbstractContextManager[Any]:
    """`pipeline.disk` opens files that it writes with this."""
    return patch.object(disk, "open", opened, create=True)


class OtherWrite:
    """A file with another way to write."""

    def __init__(self, file: Any, write: Callable[[bytes], Any]) -> None:
        self.file, self.write = file, write
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> "OtherWrite":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
