"""How far training went: in the parameters, and in the outputs as the kernel measures it.

    distance(t) = ‖θ_t - θ_0‖,        length(t) = Σ_{u<t} ‖θ_{u+1} - θ_u‖ sqrt(tr K_u)

The second one is the complexity of Baratin et al.: to first order a step dθ changes the outputs by J dθ, whose length
is at most ‖dθ‖ ‖J‖, and ‖J‖² = tr K. Rows are neighbours where they follow one another in the store, so at a cadence
sparser than every step both are those of the recorded path, which is shorter than the path itself.

Source: Baratin et al. 2021.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from analysis.rows import described, require, runs_of, taken


def complexity(ds: xr.Dataset) -> xr.Dataset:
    """Distance from the first row of each run, and the length of the path since then.

    Unchanged by an orthogonal change of basis of the parameters, and by the order of the examples; the length grows as
    sqrt(tr K) does.

    Args:
        ds: `parameter` and `trace`, rows along `snapshot` or `step`.

    Returns:
        `parameter_distance` in the unit of θ and `path_length` in that of θ sqrt(tr K), (row); 0 at the first row of a
        run, NaN from a row on whose kernel or parameters are missing.

    Raises:
        InputError: if a variable is missing, or there are no rows.
    """
    require(ds, "complexity", "parameter", "trace")
    runs, parameter = runs_of(ds), ds["parameter"].astype("float64")
    following, _ = runs.followers()
    # 0 at the last row of a run, which has no step to add
    strides = _length(taken(parameter, runs.dim, following) - parameter) * ds["trace"] ** 0.5
    travelled = xr.apply_ufunc(
        _travelled,
        strides,
        kwargs={"rows_of_runs": runs.rows},
        input_core_dims=[[runs.dim]],
        output_core_dims=[[runs.dim]],
        dask="parallelized",
        output_dtypes=[np.float64],
        dask_gufunc_kwargs={"allow_rechunk": True},
    )
    return xr.Dataset(
        {
            "parameter_distance": described(
                _length(parameter - taken(parameter, runs.dim, runs.ends(0))),
                "distance of the parameters from the start",
                "‖θ_t - θ_0‖₂, from the first row of the run.",
            ),
            "path_length": described(
                travelled,
                "length of the path of the outputs",
                "Σ_{u<t} ‖θ_{u+1} - θ_u‖₂ sqrt(tr K_u) over the recorded rows of the run.",
            ),
        },
        attrs=ds.attrs,
    )


def _length(vectors: xr.DataArray) -> xr.DataArray:
    return (vectors**2).sum("parameter_index", skipna=False) ** 0.5


def _travelled(strides: NDArray[np.float64], *, rows_of_runs: Sequence[NDArray[np.intp]]) -> NDArray[np.float64]:
    """Sum of the strides (..., s) before each row of its run."""
    lengths = np.zeros_like(strides)
    for rows in rows_of_runs:
        lengths[..., rows[1:]] = strides[..., rows[:-1]].cumsum(axis=-1)
    return lengths
