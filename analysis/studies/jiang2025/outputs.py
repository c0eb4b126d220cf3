"""Several outputs: the kernel summed over outputs and the kernel of all their pairs, side by side."""

from analysis.claims import Claim
from analysis.plots import columns, series
from analysis.studies.jiang2025.gains import gain_in, gain_rule
from analysis.studies.jiang2025.source import BEYOND

SUMMED = "K summed over outputs, against YYᵀ"
PAIRS = "the kernel of all pairs of outputs, against the targets as one vector"

MATCHED = """
with pairs as (
  select run_id, step, value as kta_full from measures where measure = 'kta_full'
), matched as (
  select run_id, min(step) as step from alignment join pairs using (run_id, step) where loss <= {level} group by run_id
), hessian as (
  select run_id, arg_max(value, step) as sharpness from measures where measure = 'hessian_sharpness' group by run_id
)
select learning_rate, seed, kta, kta_centred, kta_full, c5, c20, ntk_sharpness, sharpness, 2 / learning_rate as line
from matched join alignment using (run_id, step) join pairs using (run_id, step) join runs using (run_id)
     left join hessian using (run_id)
where status = 'complete' and study = {study}
order by learning_rate, seed
""".strip()

CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "summed_kta_gain",
            "With several outputs the final NTK, summed over outputs, is more aligned at the largest learning rate.",
            gain_rule(f"KTA of {SUMMED},"), BEYOND, MATCHED, gain_in("kta", "kta_centred"),
        ),
        Claim(
            "full_kta_gain",
            "With several outputs the final NTK of all pairs of outputs is more aligned at the largest learning rate.",
            gain_rule(f"KTA of {PAIRS},"), BEYOND, MATCHED, gain_in("kta_full"),
        ),
        Claim(
            "summed_c5_gain",
            "With several outputs, five leading eigenvectors of the summed NTK hold more of the targets.",
            gain_rule("C(5) of the summed kernel"), BEYOND, MATCHED, gain_in("c5", "c20"),
        ),
    )
}  # fmt: skip

HESSIAN = """
select printf('%g, seed %d', learning_rate, seed) as label, step, value as sharpness, value * learning_rate / 2 as ratio
from measures join runs using (run_id)
where measure = 'hessian_sharpness' and study = {study} and seed = (select min(seed) from runs)
order by learning_rate, step
""".strip()

FIGURES = {
    "hessian": series(
        "hessian",
        "The sharpness of the Hessian along training",
        "One line per learning rate, of the first seed: the largest eigenvalue of the Hessian of the loss, and the "
        "same over 2/η, which is 1 at the line of gradient descent.",
        HESSIAN,
        {"λ₁(H)": "sharpness", "λ₁(H) η / 2": "ratio"},
    ),
    "conventions": columns(
        "conventions",
        "Two conventions for several outputs",
        f"Each run at its first snapshot at or below the matched loss, over the learning rate, one mark per seed and a "
        f"line through the means. KTA of {SUMMED}; KTA of {PAIRS}; C(5) of the former; the largest eigenvalue of the "
        "Hessian at the end of the run, with the line 2/η of gradient descent.",
        MATCHED,
        {
            "KTA, K summed over outputs": ("kta",),
            "KTA, all pairs of outputs": ("kta_full",),
            "C(5), K summed over outputs": ("c5",),
            "Hessian sharpness": ("sharpness", "line"),
        },
    ),
}
