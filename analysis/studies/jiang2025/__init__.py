"""Jiang, Cohen, Li 2025 (arXiv 2507.12837): how the neural tangent kernel evolves at the Edge of Stability.

Gradient descent with step size η drives the top NTK eigenvalue over n up to 2/η and keeps it there. Larger η holds it
lower, and at equal loss the kernel that comes out is more aligned with the target: KTA and the share of the target
in the leading eigenvectors rise. The gain comes while the sharpness falls.

The paper's text was not at hand when this was written, only its abstract, the caption of its first figure and what
others wrote of it; settings, rules and thresholds here are this project's own.
"""

from dataclasses import replace

from analysis import plots
from analysis.studies.jiang2025 import edge, flow, heldout, linear, outputs
from analysis.studies.jiang2025.source import PAPER as SOURCE

__all__ = ["CHOICES", "CLAIMS", "FIGURES", "SOURCE"]

CLAIMS = edge.CLAIMS | linear.CLAIMS | flow.CLAIMS | outputs.CLAIMS | heldout.CLAIMS

FIGURES = {
    **{
        name: replace(plots.FIGURES[name], title=f"{plots.FIGURES[name].title} (the paper's figure 1{column})")
        for name, column in (("kta", "a"), ("modes", "b"), ("phases", "c"))
    },
    **linear.FIGURES,
    **flow.FIGURES,
    **outputs.FIGURES,
    **heldout.FIGURES,
}

# What the paper fixes, as far as its abstract, the caption of its first figure and what others wrote of it say, and
# what is this project's own.
CHOICES = (
    ("networks", "fully connected, two-layer linear, vision transformer", "the paper's"),
    ("convolutional network", "as listed above", "ours"),
    ("their layers, activations and initialisation", "as listed above", "ours"),
    ("data, labels, number of examples", "as listed above; the paper's several are not known", "ours"),
    ("optimiser", "full-batch gradient descent", "the paper's"),
    ("mini-batches", "that the observations carry over is said of the paper; batch sizes are not known", "ours"),
    ("learning rates", "as listed above; the paper's figure singles out 0.1", "ours"),
    ("comparison", "all learning rates trained to roughly the same loss", "the paper's"),
    ("that loss, and the limit on steps", "as the study file says; the smallest loss level listed above", "ours"),
    ("sharpness", "the top eigenvalue of the NTK", "the paper's"),
    ("its scale, and the line", "λ₁/n against 2/η, for L = (1/2n) ‖f - y‖²", "ours"),
    ("alignment", "KTA = yᵀKy / (‖K‖ ‖y‖²), and c_i of the top 20 eigenvectors", "the paper's"),
    ("eigenvalues", "divided by the Frobenius norm of the NTK", "the paper's"),
    ("several outputs", "K summed over outputs, and the kernel of all their pairs where it is recorded", "ours"),
    ("two-layer linear networks", "the paper has a theorem; the statements judged here are derived here", "ours"),
    ("central flow", "that it explains the kernel's evolution", "the paper's"),
    ("its equations and discretisation", "those of Cohen et al. 2024 (arXiv 2410.24206)", "ours"),
    ("cross-entropy, ten classes, held-out examples", "beyond what was seen of the paper", "ours"),
    ("seeds, spread over them, and every threshold of the claims", "as listed here", "ours"),
)
