"""[data]: one table per dataset, each telling its shapes without loading it."""

import re
import zipfile
import zlib
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pipeline.config.tables import Positive, Table
from pipeline.errors import InputError, MissingError, line

# Scikit-learn's examples of each digit; known here, so that a study is checked without loading them.
DIGIT_COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)

Generated = Annotated[int, Field(ge=2, le=10**5)]


def _outputs(classes: int) -> int:
    return 1 if classes == 2 else classes


def _digit_target(target: str) -> str:
    pair = re.fullmatch("([0-9]) vs ([0-9])", target)
    if target not in ("digit<5", "parity", "ten") and not (pair and pair[1] != pair[2]):
        raise PydanticCustomError("target", 'must be "digit<5", "parity", "ten" or a pair such as "3 vs 8"')
    return target


def _at_most(n: int, has: int, what: str) -> None:
    if n > has:
        raise PydanticCustomError("too_many", "must be at most {has}, {what}", {"has": has, "what": what})


def _fits_n(d: int, info: ValidationInfo) -> int:
    _at_most(d, info.data.get("n", d), "data.n")
    return d


def _npz(path: str) -> str:
    if not path.endswith(".npz"):
        raise PydanticCustomError("npz", "must be the path of an .npz file with the arrays x and y")
    return path


class Digits(Table):
    """Scikit-learn's handwritten digits: two classes with one output, or all ten, one-hot."""

    name: Literal["digits"] = "digits"
    target: Annotated[str, AfterValidator(_digit_target)] = "digit<5"
    n: Annotated[int, Field(ge=2, le=1797)] = 300
    layout: Literal["image"] | None = Field(default=None, alias="shape")  # shape() is what every table tells

    @field_validator("n")
    @classmethod
    def _pair_has_so_many(cls, n: int, info: ValidationInfo) -> int:
        target = info.data.get("target", "")
        if " vs " in target:
            has = sum(DIGIT_COUNTS[int(digit)] for digit in target.split(" vs "))
            _at_most(n, has, f'the examples of "{target}"')
        return n

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (1, 8, 8) if self.layout == "image" else (64,), 10 if self.target == "ten" else 1


class Cifar10(Table):
    """The first images of CIFAR-10, of its first `classes` classes: two with one output, or more, one-hot."""

    name: Literal["cifar10"] = "cifar10"
    classes: Annotated[int, Field(ge=2, le=10)] = 2
    choice: Literal["per_class", "first"] = "per_class"
    n: Annotated[int, Field(ge=2, le=50_000, validate_default=True)] = 1000
    normalise: Literal["channel", "pixel"] = "channel"

    @field_validator("n")
    @classmethod
    def _classes_have_so_many(cls, n: int, info: ValidationInfo) -> int:
        classes = info.data.get("classes", 10)
        _at_most(n, 5000 * classes, f"the images of {classes} classes")
        if info.data.get("choice") == "per_class" and n % classes:
            raise PydanticCustomError("multiple", "must be a multiple of data.classes = {c}", {"c": classes})
        return n

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (3, 32, 32), _outputs(self.classes)


class Chebyshev(Table):
    """The Chebyshev polynomial of a degree, on `n` evenly spaced points of [-1, 1]."""

    name: Literal["chebyshev"] = "chebyshev"
    n: Generated = 20
    degree: Annotated[int, Field(ge=0, le=1000)] = 4

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (1,), 1


class WhitenedLinear(Table):
    """A random linear map of `d` outputs, of `n` whitened inputs."""

    name: Literal["whitened_linear"] = "whitened_linear"
    n: Generated = 50
    d: Annotated[int, Field(ge=1, le=10**4, validate_default=True), AfterValidator(_fits_n)] = 50

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (self.d,), self.d


class OneOutlier(Table):
    """A linear map with one output, of `n` inputs whose covariance has one large eigenvalue, `outlier` squared."""

    name: Literal["one_outlier"] = "one_outlier"
    n: Generated = 100
    d: Annotated[int, Field(ge=2, le=10**4, validate_default=True), AfterValidator(_fits_n)] = 20
    outlier: Positive = 3.0
    overlap: float = 0.3
    data_seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (self.d,), 1


class Patterns1d(Table):
    """Noisy signals of `length` samples with a motif somewhere, which says the class."""

    name: Literal["patterns1d"] = "patterns1d"
    n: Generated = 200
    classes: Annotated[int, Field(ge=2, le=10)] = 2
    length: Annotated[int, Field(ge=12, le=10**5, validate_default=True)] = 32
    noise: Annotated[float, Field(ge=0)] = 0.3

    @field_validator("length")
    @classmethod
    def _motifs_differ(cls, length: int, info: ValidationInfo) -> int:
        least = 4 * (info.data.get("classes", 2) + 1)
        if length < least:
            raise PydanticCustomError("length", "must be at least 4 (data.classes + 1) = {least}", {"least": least})
        return length

    def shape(self) -> tuple[int, tuple[int, ...], int]:
        """(n, shape of one input, c)."""
        return self.n, (1, self.length), _outputs(self.classes)


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
