"""What holds for every dataset, and for what it gives."""

import numpy as np
import pytest

from pipeline.config import KINDS, Chebyshev, Cifar10, Digits, File, OneOutlier, Patterns1d, WhitenedLinear
from pipeline.data import DATASETS, Data, is_labels, load_data

TABLES = {
    "digits": [Digits(n=20), Digits(n=20, target="3 vs 8", shape="image"), Digits(n=20, target="ten")],
    "cifar10": [Cifar10(n=20), Cifar10(n=20, classes=4), Cifar10(n=20, classes=10, choice="first", normalise="pixel")],
    "chebyshev": [Chebyshev()],
    "whitened_linear": [WhitenedLinear(n=12, d=5)],
    "one_outlier": [OneOutlier(), OneOutlier(data_seed=1)],
    "patterns1d": [Patterns1d(n=20), Patterns1d(n=20, classes=3, length=17)],
    "file": [File(file="xy.npz", n=4)],
}
EVERY = [pytest.param(table, id=f"{name}{i}") for name, tables in TABLES.items() for i, table in enumerate(tables)]


@pytest.fixture(autouse=True)
def present(images, tmp_path, monkeypatch):
    """Whatever a table of `EVERY` reads."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("xy.npz", x=rng.normal(size=(9, 2, 3)), y=rng.normal(size=(9, 2)))


def test_every_dataset_has_a_table_and_is_tried_here():
    assert DATASETS.keys() == KINDS["data"].keys() == TABLES.keys()


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("table", EVERY)
def test_the_table_tells_the_shapes_and_the_arrays_keep_the_contract(table, rest):
    n, features, outputs = table.shape()
    data = load_data(table, 0, rest)
    assert (data.x.shape[1:], data.y.shape[1:]) == (features, (outputs,))
    assert len(data.x) == len(data.y) == len(data.sample_index)
    assert rest or len(data.x) == n
    assert (data.x.dtype, data.y.dtype, data.sample_index.dtype) == (np.float64, np.float64, np.int64)
    assert np.isfinite(data.x).all()
    assert np.isfinite(data.y).all()
    assert len(set(data.sample_index)) == len(data.sample_index)
    assert data.labels == is_labels(data.y)


@pytest.mark.parametrize("table", EVERY)
def test_the_rest_is_none_of_what_was_chosen(table):
    chosen, rest = load_data(table, 3), load_data(table, 3, rest=True)
    assert not set(chosen.sample_index) & set(rest.sample_index)
    examples = [{tuple(example) for example in data.x.reshape(len(data.x), -1)} for data in (chosen, rest)]
    assert not examples[0] & examples[1]


@pytest.mark.parametrize("table", EVERY)
def test_the_seed_decides(table):
    fixed = table.name in ("cifar10", "chebyshev") or getattr(table, "data_seed", None) is not None
    assert load_data(table, 0).digest == load_data(table, 0).digest
    assert (load_data(table, 0).digest == load_data(table, 1).digest) == fixed


def test_the_digest_covers_every_array_its_shape_and_its_dtype():
    x, y, index = np.arange(6.0).reshape(3, 2), np.ones((3, 1)), np.arange(3)
    variants = [
        Data(x, y, index, True),
        Data(x + 1, y, index, True),
        Data(x, y + 1, index, True),
        Data(x, y, index + 1, True),
        Data(x.reshape(2, 3), y, index, True),
        Data(x.view(np.int64), y, index, True),
    ]
    digests = [variant.digest for variant in variants]
    assert len(set(digests)) == len(variants)
    assert all(len(digest) == 32 for digest in digests)
    assert Data(np.asfortranarray(x), y, index, True).digest == digests[0]
    assert Data(x.astype(">f8"), y, index, True).digest == digests[0]


@pytest.mark.parametrize(
    ("y", "labels"),
    [
        ([[1], [-1]], True),
        ([[1], [1]], True),
        ([[1], [0]], False),
        ([[1, 0], [0, 1]], True),
        ([[1, 1], [0, 1]], False),
        ([[0, 0], [0, 1]], False),
        ([[0.5, 0.5], [0, 1]], False),
        ([[2, -1], [0, 1]], False),
    ],
    ids=str,
)
def test_labels_are_signs_or_one_hot_rows(y, labels):
    assert is_labels(np.array(y, dtype=float)) is labels
