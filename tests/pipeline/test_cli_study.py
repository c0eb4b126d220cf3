"""`ntk-eos study` as its users meet it: one command for all parts of a study, each a store of its own."""

import pytest
from command import call, refused, rows

from pipeline.store import list_runs

PARTS = """
title = "Two widths"
paper = "jiang2025"
claims = ["kta_gain"]
figures = ["kta"]
learning_rate = [0.1, 0.2]
[data]
name = "digits"
n = 20
[model]
name = "mlp"
width = 4
[stop]
steps = 10
[record]
loss_levels = [0.6]
[parts.narrow]
title = "Narrow"
[parts.wide]
title = "Wide"
[parts.wide.model]
width = 6
[sizes.smoke]
seed = 0
[sizes.quick]
seed = [0, 1]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "widths.toml"
    path.write_text(PARTS)
    return path


@pytest.fixture(scope="module")
def done(study):
    """The study, done by the command; and what it printed."""
    root = study.parent / "stores"
    return root, call("study", study, "--size", "smoke", "--out", root, "-q")


def test_one_command_trains_judges_and_reports_all_parts(done):
    root, result = done
    assert result.exit_code == 0, result.output
    assert [len(list_runs(root / part)) for part in ("narrow", "wide")] == [2, 2]
    assert f"report: {root}/report.html" in result.stdout
    assert result.stdout.count("kta_gain") == 4, "in the table and below it, for each part"
    assert "the size smoke only tries the machinery" in result.stdout
    report = (root / "report.html").read_text()
    assert 'id="narrow"' in report
    assert 'id="wide-claims"' in report
    assert "Claims of all parts" in report


def test_the_same_again_trains_nothing_and_one_part_leaves_the_others(done, study):
    root, _ = done
    heads = {run.head for part in ("narrow", "wide") for run in list_runs(root / part)}
    again = call("study", study, "--size", "smoke", "--part", "wide", "--out", root, "--json")
    assert again.exit_code == 0, again.output
    assert "nothing to do: all 2 runs of widths/wide" in again.stderr
    assert '"part": "wide"' in again.stdout
    assert '"part": "narrow"' not in again.stdout
    assert {run.head for part in ("narrow", "wide") for run in list_runs(root / part)} == heads


def test_commands_on_all_parts_and_on_one(done):
    root, _ = done
    assert [row["part"] for row in rows("status", root)] == ["narrow"] * 2 + ["wide"] * 2
    assert {row["part"] for row in rows("claims", root)} == {"narrow", "wide"}
    assert len(rows("analyze", root)) == 2 * len(rows("analyze", root / "wide"))
    line = refused(2, "sql", root, "select 1")
    assert "holds a store for each part of a study (narrow, wide): give one" in line
    assert rows("sql", root / "wide", "select distinct part, size from runs") == [{"part": "wide", "size": "smoke"}]


def test_a_plan_of_parts(study, tmp_path):
    planned = rows("plan", study, "--out", tmp_path / "new", "--part", "wide")
    assert [(row["part"], row["learning_rate"], row["seed"]) for row in planned] == [
        ("wide", 0.1, 0), ("wide", 0.1, 1), ("wide", 0.2, 0), ("wide", 0.2, 1),
    ]  # fmt: skip


def test_what_cannot_be_done_is_one_line(study, tmp_path):
    assert "--part deep: not a part of widths; its parts are narrow, wide" in refused(
        2, "study", study, "--part", "deep"
    )
    assert 'size = "full": the study has the sizes smoke, quick' in refused(2, "run", study, "--size", "full")
    assert "--part x: not a part of digits; it has none" in refused(2, "plan", "digits", "--part", "x")
    (tmp_path / "wide" / "runs").mkdir(parents=True)
    assert "holds the stores of 1 parts of a study" in refused(2, "run", "smoke", "--out", tmp_path)
    assert call("study").exit_code == 2


def test_the_list_of_shipped_studies_has_source_parts_and_sizes():
    listed = {row["study"]: row for row in rows("study", "--list")}
    assert listed["digits"]["runs"] == "18"
    assert "arXiv 2507.12837" in listed["paper_architectures"]["source"]
    assert listed["paper_architectures"]["parts"] == "linear, cnn, vit"
    assert listed["paper_architectures"]["runs"].startswith("smoke ")
    assert all(size in listed["central_flow"]["runs"] for size in ("smoke", "quick", "full"))
