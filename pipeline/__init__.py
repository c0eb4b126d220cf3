"""The training stage: trains networks and records their neural tangent kernels into Zarr stores."""
