"""Other kernels in the place of the NTK, so that every measure works on them.

    alignment(kernel(ds, "conjugate"))      alignment of another kernel that was recorded
    alignment(layers(ds))                   alignment of the part of each trained tensor, along `layer`

A measure looks for `ntk`, `eigenvalue`, `frobenius_norm` and so on by name; here these names are given to others.
"""

import xarray as xr

from analysis.rows import require
from pipeline.errors import InputError
from pipeline.schema import OF_A_KERNEL, ON_REQUEST, TEST_KERNELS, kernel_of


def kernel(ds: xr.Dataset, name: str) -> xr.Dataset:
    """The dataset with another recorded kernel in the place of the NTK; lazy.

    Args:
        ds: a sweep, a run, or rows chosen from one.
        name: a kernel that the study recorded, such as "conjugate"; "ntk" gives the dataset as it is.

    Returns:
        What does not belong to a kernel as it was; of kernels this one alone, under the names of the NTK's variables,
        and its name as the attribute `kernel`.

    Raises:
        InputError: if the dataset does not have that kernel.
    """
    if name == "ntk":
        return ds
    # Variables, not arrays: the coordinates are those of the dataset.
    taken = {base: ds[f"{name}_{base}"].variable for base in OF_A_KERNEL if f"{name}_{base}" in ds.data_vars}
    if not taken:
        others = sorted({other for variable in ds.data_vars if (other := kernel_of(str(variable)))})
        raise InputError(
            f"kernel {name!r}: this dataset has {', '.join(['ntk', *others])}; name others in record.kernels of the "
            "study, or compute them from the stored parameters: `ntk-eos kernel RUN --kernel NAME`"
        )
    return _without_kernels(ds).assign(taken).assign_attrs(kernel=name)


def layers(ds: xr.Dataset) -> xr.Dataset:
    """The dataset with the parts of the NTK by trained tensor in its place, along `layer`; lazy.

    Args:
        ds: a sweep, a run, or rows chosen from one, with `ntk_layer`.

    Returns:
        What does not belong to a kernel as it was, and `ntk` (row, layer, sample, sample2); the names of the tensors
        are the coordinate `layer`. Measures that need eigenpairs or scalars find none.

    Raises:
        InputError: if the parts were not recorded.
    """
    require(ds, "the kernel by layer", "ntk_layer")
    parts = ds["ntk_layer"].variable
    names = ("layer", list(parts.attrs["names"]), {"long_name": "trained tensor"})
    return _without_kernels(ds).assign(ntk=parts).assign_coords(layer=names).assign_attrs(kernel="ntk_layer")


def _without_kernels(ds: xr.Dataset) -> xr.Dataset:
    """The dataset without what belongs to a kernel."""
    own = {*OF_A_KERNEL, *ON_REQUEST, *TEST_KERNELS}
    return ds.drop_vars([name for name in map(str, ds.data_vars) if name in own or kernel_of(name)])
