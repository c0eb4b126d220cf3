"""The registry of measures: what holds of every entry, the page that lists them, and their place in the catalogue."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import xarray as xr
from mock_store import CADENCES, mock_store

import analysis
from analysis import evolution, join, open_sweep, results
from analysis.catalog import query
from analysis.evolution import MEASURES
from analysis.tables import LEADING
from pipeline.cadence import Cadence
from pipeline.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "measures.md"
RUN = "lr-0.1_seed-0"
# Either is enough.
SUBSTITUTES = {"target_energy": ["ntk"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two runs that recorded all that there is, at cadences that differ."""
    folder = tmp_path_factory.mktemp("evolution")
    return mock_store(folder, seeds=[0], n=6, c=2, k=4, steps=12, layers=True, full=True, test=4,
                      cadences={**CADENCES, "scalars": Cadence(every=2)})  # fmt: skip


@pytest.fixture(scope="module")
def ds(root):
    """The snapshots, with the Hessian beside them."""
    return join(open_sweep(root), open_sweep(root, "hessian"))


@pytest.fixture(scope="module")
def analysed(root):
    with patch("os.fsync"):
        results.analyze(root, ["evolution", "modes"])
    return root


def arrays(found):
    return found.data_vars if isinstance(found, xr.Dataset) else {"": found}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_is_lazy_described_and_keeps_its_coordinates(ds, name, no_compute):
    for label, array in arrays(getattr(analysis, name)(ds)).items():
        assert array.chunks is not None, label
        assert array.attrs.keys() >= {"long_name", "units", "description"}, label
        assert array.attrs["description"].endswith("."), label
        own = array.coords.to_dataset().drop_vars(["layer", "other_step"], errors="ignore")
        xr.testing.assert_identical(own, ds.coords.to_dataset().drop_attrs(deep=False))


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_gives_the_same_from_numpy(ds, name):
    measure = getattr(analysis, name)
    xr.testing.assert_allclose(measure(ds).compute(), measure(ds.compute()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "needed"), [(name, one) for name, entry in MEASURES.items() for one in entry.needs])
def test_what_a_measure_needs_is_named(ds, name, needed):
    without = ds.reset_index("snapshot").drop_vars([needed, *SUBSTITUTES.get(needed, [])])
    with pytest.raises(InputError, match=f"needs `{needed}`"):
        getattr(analysis, name)(without)


@pytest.mark.parametrize("name", MEASURES)
def test_an_entry_is_complete(ds, name):
    entry = MEASURES[name]
    assert name in analysis.__all__
    assert bool(entry.groups) == bool(entry.columns)
    found = getattr(analysis, name)(ds)
    assert set(entry.columns) <= ({*found.data_vars} if isinstance(found, xr.Dataset) else {name})


def test_the_page_lists_the_measures_as_they_are():
    _, marker, listed = PAGE.read_text().partition("<!-- measures -->\n\n")
    assert marker
    assert listed.strip() == evolution.reference(), "run `python -m analysis.evolution` and paste it below the marker"


def test_the_page_names_every_public_function():
    text = PAGE.read_text()
    assert [name for name in analysis.__all__ if f"`{name}`" not in text] == []


# --- results and catalogue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in MEASURES.items() if entry.groups])
def test_the_result_of_a_run_has_every_column_at_the_rows_of_its_groups(analysed, name):
    entry = MEASURES[name]
    kept = results.result(analysed, "evolution", RUN)
    ds = open_sweep(analysed, entry.groups[0], where=f"run_id = '{RUN}'")
    for group in entry.groups[1:]:
        ds = join(ds, open_sweep(analysed, group, where=f"run_id = '{RUN}'"))
    found = getattr(analysis, name)(ds).compute()
    for column in entry.columns:
        array = found[column] if isinstance(found, xr.Dataset) else found
        if array.ndim == 1:
            expected = {column: array}
        elif "eig" in array.dims:
            expected = {f"{column}_{k}": array[:, k - 1] for k in LEADING if k <= 4}
        else:
            labels = ["W", "A"] if "layer" in array.dims else [1, 2]
            expected = {f"{column}_{label}": array[:, i] for i, label in enumerate(labels)}
        for label, values in expected.items():
            np.testing.assert_allclose(kept[label].sel(step=ds.step.values), values, rtol=1e-12, err_msg=label)
            assert kept[label].notnull().sum() == values.notnull().sum(), label


def test_the_catalogue_has_them_in_long_form_where_they_are_defined(analysed):
    kept = results.result(analysed, "evolution", RUN)
    modes = results.result(analysed, "modes", RUN)
    rows = query(analysed, f"select step, measure, value from measures where run_id = '{RUN}'").rows
    found = {(step, measure): value for step, measure, value in rows}
    assert len(found) == len(rows) == sum(int(ds.notnull().sum().to_dataarray().sum()) for ds in (kept, modes))
    for name in ("radius", "kta_layer_W", "specialisation_2", "overlap_first_3", "energy", "sharpness_gap"):
        known = kept[name].dropna("step")
        assert [found[step, name] for step in known.step.values] == known.values.tolist(), name
    assert (12, "kernel_velocity") not in found, "nothing follows the last row"


def test_a_run_of_one_group_has_what_that_group_allows(tmp_path):
    cadences = {"scalars": Cadence(every=1)}
    mock_store(tmp_path, learning_rates=[0.1], seeds=[0], steps=2, n=4, k=2, cadences=cadences)
    assert set(results.result(tmp_path, "evolution", RUN).data_vars) == {"energy"}
