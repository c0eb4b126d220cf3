import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import schema
from pipeline.schema import Variable, chunk_shape, row_variables


@pytest.mark.parametrize("group", schema.GROUPS)
def test_a_row_is_its_coordinates_its_variables_and_its_digest(group):
    names = [variable.name for variable in row_variables(group)]
    own = [name for name in schema.GROUPS[group] if name not in schema.ROW]
    assert names == ["step", "learning_rate", "seed", "loss", *own, "digest"]
    assert all(variable.dims[0] == "step" for variable in row_variables(group))


def test_snapshots_answer_what_the_finer_groups_answer():
    assert schema.GROUPS["snapshots"].keys() > schema.GROUPS["spectra"].keys() | schema.GROUPS["scalars"].keys()


def test_a_row_can_be_restricted_and_keeps_the_order_of_the_schema():
    names = [variable.name for variable in row_variables("snapshots", ["trace", "ntk"])]
    assert names == ["step", "learning_rate", "seed", "loss", "ntk", "trace", "digest"]


def test_another_kernel_has_the_variables_of_the_ntk_with_its_name_in_front():
    names = schema.recorded(["infinite_ntk", "conjugate"])
    for group in ("scalars", "spectra", "snapshots"):
        found = [variable.name for variable in row_variables(group, reversed(names[group]))]
        own = [name for name in schema.GROUPS[group] if name not in ("parameter", "prediction")]
        assert found[4:-1] == [
            *schema.GROUPS[group], *(f"{kernel}_{name}" for kernel in ("conjugate", "infinite_ntk") for name in own)
        ]  # fmt: skip
    ours, theirs = (
        schema.variables_of("spectra")["eigenvalue"],
        schema.variables_of("spectra", ["conjugate_eigenvalue"]),
    )
    assert (theirs["conjugate_eigenvalue"].dims, theirs["conjugate_eigenvalue"].dtype) == (ours.dims, ours.dtype)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("conjugate_ntk", "conjugate"), ("infinite_ntk_ntk", "infinite_ntk"), ("x_ntk_sharpness", "x"),
     ("x_eigenvalue_residual", "x"), ("ntk", None), ("ntk_sharpness", None), ("loss", None), ("wall_time", None)],
)  # fmt: skip
def test_the_name_of_a_variable_tells_its_kernel(name, kernel):
    assert schema.kernel_of(name) == kernel


def test_what_is_on_request_is_in_no_row_unless_it_is_named():
    for group, more in schema.MORE.items():
        assert not more.keys() & schema.GROUPS[group].keys()
    names = schema.recorded(layers=True, full=True)["snapshots"]
    assert {"ntk_layer", "ntk_full"} <= {variable.name for variable in row_variables("snapshots", names)}
    assert schema.recorded()["snapshots"] == list(schema.GROUPS["snapshots"])
    names = schema.recorded(preconditioned=True)["hessian"]
    assert [variable.name for variable in row_variables("hessian", names)][-2:] == [
        "preconditioned_sharpness",
        "digest",
    ]
    assert schema.recorded()["hessian"] == list(schema.HESSIAN)


def test_what_a_process_gives_is_described():
    assert {name for given in schema.GIVEN_BY.values() for name in given} <= schema.OF_PROCESS.keys()


def test_times_and_digests_are_not_part_of_the_identity_and_all_else_is():
    every = [variable for group in schema.GROUPS for variable in row_variables(group)]
    costs = {name for name in schema.TRAIN if name.startswith("seconds_")}
    assert costs
    assert {variable.name for variable in every if variable.volatile} == {"wall_time", "digest"} | costs


def test_every_variable_says_what_it_is():
    more = [variable for group in schema.MORE.values() for variable in group.values()]
    for variable in [*schema.PROBE.values(), *more, *(v for group in schema.GROUPS for v in row_variables(group))]:
        assert variable.units
        assert variable.long_name
        assert variable.description.endswith(".")
        assert variable.dtype == "model" or np.dtype(variable.dtype).kind in "fiu"


OWN = Variable("v", ("step",), "float32", "1", "", "", rows_per_chunk=None)
SHARED = Variable("v", ("step",), "float32", "1", "", "", rows_per_chunk=64)


@given(st.lists(st.integers(1, 5000), max_size=3), st.sampled_from([1, 4, 8]))
def test_shared_chunks_hold_whole_rows(row, itemsize):
    assert chunk_shape(SHARED, (1, *row), itemsize) == (64, *row)


@given(st.lists(st.integers(1, 9999), min_size=1, max_size=3), st.sampled_from([4, 8]))
def test_own_chunks_are_bands_of_whole_lines_no_larger_than_needed_or_allowed(row, itemsize):
    one, lines, *rest = chunk_shape(OWN, (1, *row), itemsize)
    line = itemsize * int(np.prod(row[1:], dtype=object))
    assert (one, *rest) == (1, *row[1:])
    assert 1 <= lines <= row[0]
    assert lines == 1 or lines * line <= schema.BAND_BYTES
    assert lines == row[0] or (lines + 1) * line > schema.BAND_BYTES


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((1, 1000, 1000), (1, 1000, 1000)),
        ((1, 9999, 9999), (1, 419, 9999)),
        ((1, 10_000, 10_000), (1, 2048, 2048)),
        ((1, 10_000, 9_999), (1, 419, 9_999)),
        ((1, 5_000_000), (1, 4_194_304)),
    ],
)
def test_chunks_of_float32_matrices(shape, chunks):
    assert chunk_shape(OWN, shape, 4) == chunks
