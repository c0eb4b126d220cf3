"""How much memory there is, from the kernel of the system."""

import os
import re
import sys
from pathlib import Path

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def total() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available() -> int:
    """Bytes that can be had without swapping; where the system does not say, all of the machine's."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", info.read_text()) if info.exists() else None
    return 1024 * int(found[1]) if found else total()


def held() -> int:
    """Bytes that this process holds now; where the system does not say, the most that it ever held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return os.sysconf("SC_PAGE_SIZE") * int(statm.read_text().split()[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def parsed(text: str) -> int:
    """Bytes of a text such as 1GiB, 1.5 GiB, 800MiB or 4096.

    Raises:
        ValueError: if it is not one.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?) *([KMGT]iB|B|)", text.strip())
    if not found:
        raise ValueError(f"{text!r}: must be a number of bytes, such as 800MiB or 1.5GiB")
    return int(float(found[1]) * UNITS[found[2]])
