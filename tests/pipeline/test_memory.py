"""What the system says of memory, and sizes as one writes them."""

import numpy as np
import psutil
import pytest

from pipeline import memory


def test_it_is_what_psutil_finds():
    assert memory.total() == psutil.virtual_memory().total
    assert memory.available() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert memory.held() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    before = memory.held()
    block = np.ones(2**24)
    assert memory.held() - before > 0.9 * block.nbytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("10 B", 10), ("800MiB", 800 * 2**20), ("1.5 GiB", 3 * 2**29), ("2TiB", 2**41), ("1KiB", 1024)],
)
def test_sizes_as_one_writes_them(text, size):
    assert memory.parsed(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1GB", "1e9", "1,5GiB", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"must be a number of bytes, such as 800MiB or 1\.5GiB"):
        memory.parsed(text)
