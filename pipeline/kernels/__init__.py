"""Kernels of a model on examples: the empirical neural tangent kernel, exactly, of any module that keeps examples apart.

`NTK` evaluates the kernel of a model that changes on examples that do not; `empirical_ntk` does it once.
"""

from pipeline.kernels.empirical import NTK, empirical_ntk

__all__ = ["NTK", "empirical_ntk"]
