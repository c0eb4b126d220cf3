"""Held-out examples: how the kernel aligns with their targets, and what regression with it says of them."""

import pandas as pd

from analysis.claims import Claim, Verdict, spread, too_few
from analysis.plots import columns
from analysis.studies.jiang2025.gains import by_rate, gain_in, gain_rule
from analysis.studies.jiang2025.source import BEYOND

AGREEMENT = 0.9

MEASURES = (
    "kta_test", "cumulative_alignment_test_5", "test_error_rate", "regression_error_rate", "regression_agreement",
    "regression_distance",
)  # fmt: skip
MATCHED = f"""
with held_out as (
  pivot (select run_id, step, measure, value from measures) on measure
    in ({", ".join(f"'{name}'" for name in MEASURES)}) using any_value(value) group by run_id, step
), matched as (
  select run_id, min(step) as step from alignment join held_out using (run_id, step)
  where loss <= {{level}} and kta_test is not null group by run_id
), untrained as (
  select run_id, regression_agreement as first_agreement, regression_error_rate as first_regression_error_rate
  from held_out where step = 0
)
select learning_rate, seed, kta, c5, kta_test, cumulative_alignment_test_5 as c5_test, test_error_rate,
       regression_error_rate, regression_agreement, regression_distance, first_agreement, first_regression_error_rate
from matched join held_out using (run_id, step) join alignment using (run_id, step) join runs using (run_id)
     left join untrained using (run_id)
where status = 'complete' and study = {{study}}
order by learning_rate, seed
""".strip()


def kernel_predicts(frame: pd.DataFrame) -> Verdict:
    """Regression with the final kernel gives the network's class nearly everywhere, at every learning rate."""
    if reason := too_few(frame):
        return Verdict("underpowered", reason, len(frame))
    means = frame.groupby("learning_rate")["regression_agreement"].mean()
    value = f"same class on a share of {by_rate(frame, 'regression_agreement')}"
    return Verdict("passed" if (means >= AGREEMENT).all() else "failed", value, len(frame))


def training_helps(frame: pd.DataFrame) -> Verdict:
    """Regression with the final kernel errs less than with the initial one, in the mean at every learning rate."""
    if reason := too_few(frame):
        return Verdict("underpowered", reason, len(frame))
    gain = frame["first_regression_error_rate"] - frame["regression_error_rate"]
    rows = frame.assign(gain=gain)
    value = (
        f"error rate of regression falls by {by_rate(rows, 'gain')}; of the network it is "
        f"{by_rate(frame, 'test_error_rate')}, of the initial kernel {spread(frame['first_regression_error_rate'])}"
    )
    everywhere = (rows.groupby("learning_rate")["gain"].mean() > 0).all()
    return Verdict("passed" if everywhere else "failed", value, len(frame))


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "held_out_kta_gain",
            "On held-out examples too the final NTK is more aligned with the target at the largest learning rate.",
            gain_rule("KTA of the kernel and the targets of held-out examples"),
            BEYOND, MATCHED, gain_in("kta_test", "kta"),
        ),
        Claim(
            "held_out_c5_gain",
            "Five leading eigenvectors of the final NTK on held-out examples hold more of their targets.",
            gain_rule("C(5) of the kernel and the targets of held-out examples"),
            BEYOND, MATCHED, gain_in("c5_test", "c5"),
        ),
        Claim(
            "kernel_predicts_the_network",
            "Regression with the final NTK says of held-out examples what the network says.",
            f"The class is the same on a share of at least {AGREEMENT:g} of them, in the mean over seeds at every "
            "learning rate, at the first row with loss <= level.",
            "Atanasov, Bordelon, Pehlevan 2021 (arXiv 2111.00034); " + BEYOND, MATCHED, kernel_predicts,
        ),
        Claim(
            "training_helps_the_kernel",
            "Regression with the final NTK errs less often than regression with the initial one.",
            "The error rate on held-out examples falls, in the mean over seeds at every learning rate.",
            BEYOND, MATCHED, training_helps,
        ),
    )
}  # fmt: skip

FIGURES = {
    "held_out": columns(
        "held_out",
        "The kernel on held-out examples",
        "Each run at its first snapshot at or below the matched loss, over the learning rate, one mark per seed and a "
        "line through the means: KTA and C(5) of the kernel on held-out examples beside those on training ones, the "
        "share of held-out examples that the network and that regression with the final kernel get wrong, and the "
        "share on which these two agree.",
        MATCHED,
        {
            "KTA": ("kta_test", "kta"),
            "C(5)": ("c5_test", "c5"),
            "error rate": ("test_error_rate", "regression_error_rate"),
            "agreement of network and kernel": ("regression_agreement",),
        },
    )
}
