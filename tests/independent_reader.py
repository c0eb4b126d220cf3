"""Reads a run as docs/format.md says, with json, numpy and numcodecs alone: none of this project's code, and no zarr.

The order in which a digest takes the variables is read from that page, so the page cannot be wrong about it.
"""

import hashlib
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc

PAGE = Path(__file__).parents[1] / "docs" / "format.md"
BLOCK = re.search(r"^```order\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
ORDER = {name: words.split() for name, words in re.findall(r"^(\w+): (.*)$", BLOCK.group(1), re.MULTILINE)}


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


TABLE = [_entry(byte) for byte in range(256)]


def blake(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


class Run:
    """A run of a store.

    Attributes:
        attrs: attributes of the commit record.
        arrays: values of every array, by `group/name`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        document = json.loads((self.path / "zarr.json").read_text())
        self.attrs = document["attributes"]
        assert self.attrs["format_version"] == 1
        stated = self.attrs.pop("record")
        assert blake(canonical(document)).hex() == stated, "the record is not what was committed"
        nodes = document["consolidated_metadata"]["metadata"]
        self.arrays = {name: self._values(name, node) for name, node in nodes.items() if node["node_type"] == "array"}

    def _values(self, name: str, node: dict[str, Any]) -> np.ndarray:
        shape, chunks = node["shape"], node["chunk_grid"]["configuration"]["chunk_shape"]
        dtype = np.dtype(node["data_type"]).newbyteorder("<")
        whole = np.empty([-(-s // c) * c for s, c in zip(shape, chunks, strict=True)], dtype)
        for index in product(*(range(n // c) for n, c in zip(whole.shape, chunks, strict=True))):
            data = (self.path / name / ".".join(["c", *map(str, index)])).read_bytes()
            frame, checksum = data[:-4], int.from_bytes(data[-4:], "little")
            assert crc32c(frame) == checksum, "a chunk is damaged"
            place = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))
            whole[place] = np.frombuffer(Blosc().decode(frame), dtype).reshape(chunks)
        return whole[tuple(slice(s) for s in shape)]

    def names(self, group: str) -> list[str]:
        """The variables of a digest of a growing group, in its order."""
        here = [name.partition("/")[2] for name in self.arrays if name.startswith(f"{group}/")]
        known = [*ORDER["row"], *(name for name in ORDER[group] if name not in ORDER["row"])]
        own = [name for name in known if name in here]
        endings = sorted(ORDER["kernel"], key=len, reverse=True)
        others = {}
        for name in set(here) - set(own):
            for ending in endings:
                if name.endswith(f"_{ending}"):
                    others[name] = (name.removesuffix(f"_{ending}"), ORDER["kernel"].index(ending))
                    break
        return [*own, *sorted(others, key=others.get)]

    def digest(self, group: str, row: int) -> bytes:
        """The digest of a row, from its values."""
        return self._digest(group, {name: self.arrays[f"{group}/{name}"][row] for name in self.names(group)})

    @staticmethod
    def _digest(group: str, values: dict[str, np.ndarray]) -> bytes:
        parts = []
        for name, value in values.items():
            parts += [f"{group}\0{name}\0{value.dtype.name}\0{value.shape}\0".encode(), value.tobytes()]
        return blake(*parts)

    def seed_digest(self) -> bytes:
        probe = {name.partition("/")[2]: self.arrays[name] for name in sorted(self.arrays) if name.startswith("probe/")}
        return blake(canonical(self.attrs["identity"]), self._digest("probe", probe))

    def head(self) -> bytes:
        """The last link of the chain, from all values of the run."""
        rows = [
            (int(step), group, self.digest(group, row))
            for group in self.attrs["lengths"]
            for row, step in enumerate(self.arrays[f"{group}/step"])
        ]
        head = self.seed_digest()
        for _, _, digest in sorted(rows):
            head = blake(head, digest)
        return head
