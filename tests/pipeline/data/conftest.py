import numpy as np
import pytest

from pipeline.data import cifar10


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Six files of CIFAR-10's format, small, where `NTK_EOS_CIFAR10` says: their folder, labels and images."""
    rng = np.random.default_rng(0)
    label = rng.permuted(np.tile(np.arange(10, dtype=np.uint8), (6, 3)), axis=1)
    image = rng.integers(0, [200, 230, 256], (6, 30, 32, 32, 3), dtype=np.uint8).transpose(0, 1, 4, 2, 3)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, labels, pixels in zip((*cifar10.TRAINING, cifar10.TEST), label, image, strict=True):
        records = (bytes([one]) + red_green_blue.tobytes() for one, red_green_blue in zip(labels, pixels, strict=True))
        (folder / name).write_bytes(b"".join(records))
    monkeypatch.setenv("NTK_EOS_CIFAR10", str(folder))
    return folder, label, image
