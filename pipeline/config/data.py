"""[data]: one table per dataset, each telling its shapes without loading it."""

import zipfile
import zlib
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pipeline.config.tables import Table
from pipeline.errors import InputError, MissingError, line


def _npz(path: str) -> str:
    if not path.endswith(".npz"):
        raise PydanticCustomError("npz", "must be the path of an .npz file with the arrays x and y")
    return path


class Digits(Table):
    """Scikit-learn's handwritten digits as a two-class task with one output."""

    name: Literal["digits"] = "digits"
    n: Annotated[int, Field(ge=2, le=1797)] = 300
    target: Literal["digit<5", "parity"] = "digit<5"

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (64,), 1


class File(Table):
    """Arrays x (n, features...) and y (n,) or (n, c) of an .npz file."""

    name: Literal["file"] = "file"
    file: Annotated[str, AfterValidator(_npz)]
    n: Annotated[int, Field(ge=2, le=10**9)] | None = None
    normalise: Literal["none", "global"] = "none"

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c), from the headers of the file alone.

        Raises:
            MissingError: if there is no such file.
            InputError: if it cannot be used, or holds fewer than `n` examples.
        """
        where = line(self.file)
        x, y = _npz_shape(where, self.file, "x"), _npz_shape(where, self.file, "y")
        if len(x) < 2 or len(y) not in (1, 2) or x[0] != y[0] or min(x + y) < 1:
            raise InputError(f"{where}: x {x} and y {y}: must be (n, features...) and (n,) or (n, c), not empty")
        if self.n is not None and self.n > x[0]:
            raise InputError(f"data.n = {self.n}: must be at most {x[0]}, the examples in {where}")
        return self.n or x[0], x[1:], y[1] if len(y) == 2 else 1


def _npz_shape(where: str, file: str, name: str) -> tuple[int, ...]:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    except FileNotFoundError:
        raise MissingError(f"{where}: no such file (data.file)") from None
    except KeyError:
        raise InputError(f"{where}: has no array {name}; save it with numpy.savez(file, x=..., y=...)") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(line(f"{where}: not an .npz file that numpy.savez wrote: {error}")) from None
    if dtype.kind not in "fiub":
        raise InputError(line(f"{where}: {name} has dtype {dtype}; must be real numbers"))
    return tuple(shape)
