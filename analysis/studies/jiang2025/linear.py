"""The two-layer linear network: exact recursions, the alignment theorem, the closed form of KTA."""

from collections.abc import Callable

import pandas as pd

from analysis.claims import Claim, Verdict, too_few
from analysis.plots import columns
from analysis.studies.jiang2025.gains import by_rate
from analysis.studies.jiang2025.source import LINEAR

ROUNDING = 1e-12
THEOREM = 1e-10
KTA_TOLERANCE = 0.01
LENGTH_TOLERANCE = 0.07
FLOW_TOLERANCE = 0.01

# The largest value of one measure of each run.
LARGEST = """
select learning_rate, seed, max(value) as largest, count(*) as steps
from measures join runs using (run_id)
where measure = '{measure}' and study = {{study}}
group by run_id, learning_rate, seed
order by learning_rate, seed
""".strip()

GAPS = """
select learning_rate, seed, max(abs(gap.value) / bound.value) as largest, count(*) as steps
from measures as gap join measures as bound using (run_id, step) join runs using (run_id)
where gap.measure = 'sharpness_gap' and bound.measure = 'gap_bound' and study = {study}
group by run_id, learning_rate, seed
order by learning_rate, seed
""".strip()

# The last row of each run that converged.
ENDS = """
with wide as (
  pivot (select run_id, step, measure, value from measures) on measure
    in ('squared_length', 'squared_length_predicted', 'kta_closed_form') using any_value(value) group by run_id, step
), last as (
  select run_id, max(step) as step from wide group by run_id
)
select learning_rate, seed, process, kta, kta as kta_measured, kta_closed_form, squared_length,
       squared_length_predicted, c3, c5
from last join wide using (run_id, step) join alignment using (run_id, step) join runs using (run_id)
where status = 'complete' and study = {study}
order by learning_rate, seed, process
""".strip()


def at_most(limit: float) -> Callable[[pd.DataFrame], Verdict]:
    """A rule: no run's largest value is above a limit. One run can carry it: it holds of every step, not in a mean."""

    def judge(frame: pd.DataFrame) -> Verdict:
        if frame.empty:
            return Verdict("underpowered", "no run has a value", 0)
        worst = frame["largest"].max()
        value = f"largest {worst:.2e} in {int(frame['steps'].sum())} rows"
        return Verdict("passed" if worst <= limit else "failed", value, len(frame))

    return judge


def agree(column: str, prediction: str, tolerance: float, name: str) -> Callable[[pd.DataFrame], Verdict]:
    """A rule: a column agrees with its prediction, relative to it, in every run."""

    def judge(frame: pd.DataFrame) -> Verdict:
        if reason := too_few(frame):
            return Verdict("underpowered", reason, len(frame))
        error = (frame[column] / frame[prediction] - 1).abs()
        rows = frame.assign(error=error)
        value = f"{name} off by at most {error.max():.2%}; mean at {by_rate(rows, 'error')}"
        return Verdict("passed" if error.max() <= tolerance else "failed", value, len(frame))

    return judge


def flow_ends_alike(frame: pd.DataFrame) -> Verdict:
    """KTA of gradient descent and of gradient flow agree at the end, per learning rate and seed."""
    table = frame.pivot(index=["learning_rate", "seed"], columns="process", values="kta")
    if not {"discrete", "gradient_flow"} <= set(table.columns):
        return Verdict("underpowered", "gradient descent and gradient flow are not both there", len(frame))
    pairs = table.dropna().reset_index()
    if reason := too_few(pairs):
        return Verdict("underpowered", reason, len(frame))
    error = (pairs["discrete"] / pairs["gradient_flow"] - 1).abs()
    value = f"KTA differs by at most {error.max():.2%}"
    return Verdict("passed" if error.max() <= FLOW_TOLERANCE else "failed", value, len(frame))


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "recursions_hold",
            "One step of gradient descent follows the exact recursions of r, s, K and Q.",
            f"The largest error of the four, relative to the size of what they give, is at most {ROUNDING:g} at every "
            "pair of neighbouring steps, computed in float64 from the stored parameters.",
            LINEAR, LARGEST.format(measure="recursion_error"), at_most(ROUNDING),
        ),
        Claim(
            "rank_one_stays",
            "Weights of the form W = a pᵀ keep it under gradient descent.",
            f"‖W - a pᵀ‖ / ‖W‖ is at most {ROUNDING:g} at every snapshot.",
            LINEAR, LARGEST.format(measure="rank_one_error"), at_most(ROUNDING),
        ),
        Claim(
            "gap_within_bound",
            "Hessian sharpness and NTK sharpness differ by no more than ‖Xᵀr‖/n.",
            "|λ_1(H) - λ_1(K)/n| over ‖Xᵀr‖/n is at most 1 + 1e-6 at every row that has both.",
            LINEAR, GAPS, at_most(1 + 1e-6),
        ),
        Claim(
            "shift_is_monotone",
            "C(k; s) of K(s) = s G + yyᵀ/s does not rise with s, for any k.",
            f"Between 60 growing values of s from ‖β_*‖/10 to 10 ‖β_*‖ no C(k; s) rises by more than {THEOREM:g}, for "
            "the data of every run.",
            LINEAR, LARGEST.format(measure="shift_violation"), at_most(THEOREM),
        ),
        Claim(
            "kta_closed_form",
            "The final KTA is that of the closed form at the measured s = ‖a‖².",
            f"At the last row of every run the two differ by at most {KTA_TOLERANCE:.0%}.",
            LINEAR, ENDS, agree("kta", "kta_closed_form", KTA_TOLERANCE, "KTA"),
        ),
        Claim(
            "length_predicted",
            "s ends at ‖β_*‖ below the edge, and above it at the largest root of S(s) = 2/η.",
            f"At the last row of every run s differs from that by at most {LENGTH_TOLERANCE:.0%}.",
            LINEAR, ENDS, agree("squared_length", "squared_length_predicted", LENGTH_TOLERANCE, "s"),
        ),
        Claim(
            "flow_ends_alike",
            "Learning rates below the edge end where gradient flow does.",
            f"The final KTA of gradient descent and that of gradient flow differ by at most {FLOW_TOLERANCE:.0%}, for "
            "each learning rate and seed.",
            LINEAR, ENDS, flow_ends_alike, unique=("learning_rate", "seed", "process"),
        ),
    )
}  # fmt: skip

FIGURES = {
    "linear": columns(
        "linear",
        "The end of training against the theory",
        "Each run's last row over the learning rate η, one mark per seed, a line through the means. What the theory "
        "says is dashed: KTA in closed form at the measured s, and s at the root of S(s) = 2/η. Below the edge nothing "
        "changes with η; above it s falls and the alignment rises. C(1) is left out: it belongs to the outlier.",
        ENDS,
        {
            "KTA": ("kta_measured", "kta_closed_form"),
            "s = ‖a‖²": ("squared_length", "squared_length_predicted"),
            "C(3)": ("c3",),
            "C(5)": ("c5",),
        },
    )
}
