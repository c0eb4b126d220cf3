"""Where the statements come from."""

PAPER = "Jiang, Cohen, Li 2025 (arXiv 2507.12837)"
FLOW = "Cohen, Damian, Talwalkar, Kolter, Lee 2024 (arXiv 2410.24206), which Jiang, Cohen, Li 2025 build on"
LINEAR = f"two-layer linear networks, for which {PAPER} has a theorem; worked out here, as its text was not at hand"
BEYOND = f"this project, beyond {PAPER}"
