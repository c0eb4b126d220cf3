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

# What the paper fixes, as far as its abstract and the caption of its first figure say, and what is this project's own.
CHOICES = (
    ("network", "fully connected", "the paper's"),
    ("its layers, activation and initialisation", "as listed above", "ours"),
    ("data, labels, number of examples", "as listed above", "ours"),
    ("optimiser", "full-batch gradient descent", "the paper's"),
    ("learning rates", "as listed above; the paper's figure singles out 0.1", "ours"),
    ("comparison", "all learning rates trained to roughly the same loss", "the paper's"),
    ("that loss, and the limit on steps", "as the study file says; the smallest loss level listed above", "ours"),
    ("sharpness", "the top eigenvalue of the NTK", "the paper's"),
    ("its scale, and the line", "λ₁/n against 2/η, for L = (1/2n) ‖f - y‖²", "ours"),
    ("alignment", "KTA = yᵀKy / (‖K‖ ‖y‖²), and c_i of the top 20 eigenvectors", "the paper's"),
    ("eigenvalues", "divided by the Frobenius norm of the NTK", "the paper's"),
    ("several outputs", "K summed over outputs", "ours"),
    ("seeds, spread over them, and every threshold of the claims", "as listed here", "ours"),
)
