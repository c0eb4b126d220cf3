"""The handwritten digits against scikit-learn's own."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.config import Digits
from pipeline.config.data import DIGIT_COUNTS
from pipeline.data import load_data
from pipeline.errors import InputError


def digits(n=300, target="digit<5", layout=None):
    return SimpleNamespace(name="digits", n=n, target=target, layout=layout)


def test_digits_are_centred_per_pixel_and_have_one_deviation():
    data = load_data(digits(), seed=0)
    assert (data.x.shape, data.y.shape, data.x.dtype, data.y.dtype) == ((300, 64), (300, 1), np.float64, np.float64)
    np.testing.assert_allclose(data.x.mean(axis=0), 0, atol=1e-12)
    assert data.x.std() == pytest.approx(1)
    assert data.x.std(axis=0).max() > 1.5  # pixels keep their own spread


@pytest.mark.parametrize(("target", "rule"), [("digit<5", lambda d: d < 5), ("parity", lambda d: d % 2 == 0)])
def test_digits_keep_the_example_and_the_label_of_their_index(target, rule):
    pixels, digit = load_digits(return_X_y=True)
    data = load_data(digits(100, target), seed=3)
    chosen = pixels[data.sample_index]
    centred = chosen - chosen.mean(axis=0)
    np.testing.assert_allclose(data.x, centred / centred.std(), atol=1e-12)
    np.testing.assert_array_equal(data.y[:, 0] == 1, rule(digit[data.sample_index]))
    assert data.labels
    assert set(np.unique(data.y)) == {-1.0, 1.0}


def test_digits_are_drawn_without_replacement_by_the_seed():
    first, again, other = (load_data(digits(), seed) for seed in (0, 0, 1))
    assert len(set(first.sample_index)) == 300
    np.testing.assert_array_equal(first.sample_index, again.sample_index)
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert set(first.sample_index) != set(other.sample_index)


def test_fewer_digits_are_the_first_of_more():
    few, many = load_data(digits(50), 7), load_data(digits(200), 7)
    np.testing.assert_array_equal(few.sample_index, many.sample_index[:50])


def test_more_digits_than_there_are_is_an_error():
    with pytest.raises(InputError, match=r"data\.n = 2000: the dataset has 1797 examples"):
        load_data(digits(2000), 0)


def test_one_example_cannot_be_normalised():
    with pytest.raises(InputError, match="all equal"):
        load_data(digits(1), 0)


def test_the_rest_of_the_digits_is_seen_as_the_chosen_ones_are():
    pixels, digit = load_digits(return_X_y=True)
    chosen, rest = load_data(digits(100), 3), load_data(digits(100), 3, rest=True)
    assert sorted([*chosen.sample_index, *rest.sample_index]) == list(range(1797))
    assert list(rest.sample_index) == sorted(rest.sample_index)
    known = pixels[chosen.sample_index]
    mean = known.mean(axis=0)
    np.testing.assert_allclose(rest.x, (pixels[rest.sample_index] - mean) / (known - mean).std(), atol=1e-12)
    np.testing.assert_array_equal(rest.y[:, 0] == 1, digit[rest.sample_index] < 5)


def test_if_all_digits_were_chosen_there_is_no_rest():
    with pytest.raises(InputError, match="all 1797 examples were chosen, so none is left: give others"):
        load_data(digits(1797), 0, rest=True)


@pytest.mark.parametrize(("first", "second"), [(3, 8), (8, 3), (0, 1)])
@pytest.mark.parametrize("rest", [False, True])
def test_a_pair_has_these_two_digits_alone(first, second, rest):
    pixels, digit = load_digits(return_X_y=True)
    target = f"{first} vs {second}"
    data = load_data(digits(100, target), 4, rest)
    of = digit[data.sample_index]
    assert set(of) == {first, second}
    np.testing.assert_array_equal(data.y[:, 0], (of == first) * 1 - (of == second) * 1)
    assert len(of) == (np.isin(digit, [first, second]).sum() - 100 if rest else 100)
    known = pixels[load_data(digits(100, target), 4).sample_index]
    scaled = (pixels[data.sample_index] - known.mean(0)) / (known - known.mean(0)).std()
    np.testing.assert_allclose(data.x, scaled, atol=1e-12)


def test_ten_classes_are_one_hot_and_draw_the_same_examples():
    _, digit = load_digits(return_X_y=True)
    two, ten = load_data(digits(50), 2), load_data(digits(50, "ten"), 2)
    np.testing.assert_array_equal(ten.x, two.x)
    np.testing.assert_array_equal(ten.y.argmax(1), digit[ten.sample_index])
    np.testing.assert_array_equal(np.sort(ten.y, axis=1), [[0] * 9 + [1]] * 50)


def test_images_have_the_pixels_in_their_places():
    pictures = load_digits().images
    data = load_data(digits(50, layout="image"), 2)
    chosen = pictures[data.sample_index]
    np.testing.assert_allclose(data.x[:, 0], (chosen - chosen.mean(0)) / (chosen - chosen.mean(0)).std(), atol=1e-12)


def test_the_counts_that_a_study_is_checked_against():
    assert tuple(np.bincount(load_digits().target)) == DIGIT_COUNTS
    assert len(load_data(Digits(n=351, target="2 vs 8"), 0).x) == 351
