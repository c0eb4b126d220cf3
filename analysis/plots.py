"""Figures of a store: how the kernel aligns with the target, in which modes, and what happens at the edge.

A `Drawing` is a figure that any store can have drawn: its words, the query behind its numbers and the function that
draws it. Each function of a root reads its numbers (`kta_curves`, `mode_shares`, `edge_run`) and hands them to a
pure one (`plot_kta`, `plot_modes`, `plot_edge`) that also takes numbers from elsewhere.
"""

import os
import textwrap
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
