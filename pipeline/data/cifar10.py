"""CIFAR-10 in its binary format."""

import hashlib
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.examples import Data, class_targets
from pipeline.errors import InputError, MissingError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ARCHIVE = Path("data/downloads/cifar-10-binary.tar.gz")  # in the current folder, as the stores are
FOLDER = "NTK_EOS_CIFAR10"  # an environment variable: the same study has other folders on other machines

TRAINING = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = "test_batch.bin"
PIXELS = 3 * 32 * 32
CLASSES = 10


def load(options: Any, rng: np.random.Generator, rest: bool = False) -> Data:
    """The first images of CIFAR-10: 50,000 for training and 10,000 for tests, of 32 x 32 pixels in red, green and blue.

    It is read from the folder that the environment variable `NTK_EOS_CIFAR10` names, where the files may hold fewer
    images, or else from the official archive, which is downloaded once to `data/downloads`, and checked.

    Args:
        options: `classes`, c: the first c of the ten; `n`, how many images of them; `choice`, "per_class" for the first
            n/c of each, class after class, or "first" for the first n in the order of the files; `normalise`,
            "channel" or "pixel": what is centred and divided by its deviation, over all training images there are.
        rng: not used: nothing is random.
        rest: give the test images of these classes, in the order of their file, numbered on from the training images.

    Returns:
        x (n, 3, 32, 32) and y (n, 1) of -1 and +1 for two classes, else one-hot (n, c).

    Raises:
        MissingError: if a file is not there.
        InputError: if a file cannot be used or downloaded, or holds fewer images than are asked for.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009). "per_class" with "channel" is the
    preparation of Cohen et al. (2024), arXiv 2410.24206; "first" with "pixel" that of Cohen et al. (2021), arXiv
    2103.00065.
    """
    training = [_records(*one) for one in _read(TRAINING)]
    mean, deviation = _moments([records[:, 1:] for records in training], options.normalise)
    images, before = np.concatenate(training), 0
    if rest:
        before, images = len(images), _records(*_read((TEST,))[0])
        taken = np.flatnonzero(images[:, 0] < options.classes)
    else:
        taken = _first(images[:, 0], options)
    x = ((images[taken, 1:] - mean) / deviation).reshape(-1, 3, 32, 32)
    return Data(x, class_targets(images[taken, 0].astype(np.int64), options.classes), before + taken, labels=True)


def is_here() -> bool:
    """Whether nothing needs to be downloaded; a folder that was named is not looked into."""
    return bool(os.environ.get(FOLDER)) or ARCHIVE.exists()


def _first(label: np.ndarray, options: Any) -> np.ndarray:
    """Rows of the images that are chosen."""
    if options.choice == "first":
        taken = np.flatnonzero(label < options.classes)[: options.n]
    else:
        each = options.n // options.classes
        taken = np.concatenate([np.flatnonzero(label == one)[:each] for one in range(options.classes)])
    if len(taken) < options.n:
        raise InputError(
            f"data.n = {options.n}: the files give {len(taken)} images of the first {options.classes} classes; "
            "choose at most so many"
        )
    return taken


def _moments(batches: list[np.ndarray], of: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (3072,) over images in uint8, for each pixel or, repeated, for each channel.

    Both come from sums of whole numbers, which are exact and need no copy of 50,000 images in floating point.
    """
    total = np.sum([batch.sum(0, dtype=np.int64) for batch in batches], 0)
    square = np.sum([np.square(batch, dtype=np.uint32).sum(0, dtype=np.int64) for batch in batches], 0)
    count = float(sum(map(len, batches)))
    if of == "channel":
        total, square = (np.repeat(one.reshape(3, -1).sum(1), PIXELS // 3) for one in (total, square))
        count *= PIXELS // 3
    spread = count * square - total.astype(np.float64) ** 2
    if not np.all(spread > 0):
        raise InputError(f"data.normalise = {of}: a {of} is the same in all training images; choose another one")
    return total / count, np.sqrt(spread) / count


def _records(where: str, content: bytes) -> np.ndarray:
    """The images of one file (n, 3073) in uint8: a byte of label, then the red, the green and the blue pixels."""
    size = 1 + PIXELS
    if not content or len(content) % size:
        raise InputError(f"{where}: {len(content)} bytes are not whole records of {size}: it was cut off; get it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    wrong = np.flatnonzero(records[:, 0] >= CLASSES)
    if len(wrong):
        raise InputError(
            f"{where}: record {wrong[0]} has label {records[wrong[0], 0]}, must be 0 to {CLASSES - 1}: it is not of "
            "the binary version of CIFAR-10, or damaged; get it again"
        )
    return records


# --- where the bytes are ---------------------------------------------------------------------------------------------


def _read(names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Each file's place, for messages, and its content."""
    folder = os.environ.get(FOLDER)
    place = Path(folder) if folder else _archive()
    try:
        found = _of_folder(place, names) if folder else _of_archive(place, names)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{place}: cannot be read ({error}); get it again") from error
    absent = [name for name in names if name not in found]
    if absent:
        said = f"{FOLDER} = {folder}" if folder else str(place)
        raise MissingError(f"{said}: there is no {absent[0]}; it must have {', '.join((*TRAINING, TEST))}")
    return [(f"{place}/{name}", found[name]) for name in names]


def _of_folder(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def _of_archive(archive: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read in place and in one pass: nothing is unpacked to a path that the archive chooses."""
    with tarfile.open(archive) as opened:
        return {
            Path(member.name).name: content.read()
            for member in opened
            if Path(member.name).name in names and (content := opened.extractfile(member))
        }


def _archive() -> Path:
    """The official archive, fetched if it is not here, and only if its hash is the published one."""
    if not ARCHIVE.exists():
        _download()
    with ARCHIVE.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise InputError(
            f"{ARCHIVE}: its SHA-256 is {digest[:16]}..., not {SHA256[:16]}...: remove it, to have it fetched"
        )
    return ARCHIVE


def _download() -> None:
    import pooch  # brings an HTTP client along, and only this dataset needs it

    try:
        pooch.retrieve(URL, f"sha256:{SHA256}", fname=ARCHIVE.name, path=ARCHIVE.parent)
    except (OSError, ValueError) as error:  # no connection, no disk; another hash
        reason = " ".join(str(error).split())
        raise InputError(
            f"CIFAR-10 cannot be fetched from {URL}: {reason}; put the archive at {ARCHIVE}, or name a folder with its "
            f"files in {FOLDER}"
        ) from error
