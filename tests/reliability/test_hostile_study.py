"""Study files from strangers: whatever a file or the options hold, it is a study or one line."""

import json
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import sizes
from study_files import MINIMAL, assert_one_plain_line, fuzz

from pipeline.config import KERNELS, KINDS, TABLES, CadenceTable, Heading, RunConfig
from pipeline.errors import StudyError


def toml(value):
    """A TOML value; tables are written inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


KEYS = sorted({key for group in [Heading, RunConfig, CadenceTable, *TABLES.values()] for key in group.model_fields}
              | {key for kinds in KINDS.values() for kind in kinds.values() for key in kind.model_fields}
              | {key for kernel in KERNELS.values() for key in kernel.model_fields}
              | {"grid", "import", "model.width", "record.kernels", "data.n", "record.spectra.every"})  # fmt: skip
WORDS = [
    "ntk",
    "nngp",
    "weighted",
    "digits",
    "file",
    "mlp",
    "mse",
    "gd",
    "import",
    "x.npz",
    "a:b",
    "tanh",
    "parity",
    "float64",
    "cuda:0",
    "",
]
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
leaves = st.sampled_from([*WORDS, 0, 1, 2, 20, -1, 0.1, 0.5, True, 2**62, float("nan"), float("inf")]) | text
keys = st.sampled_from(KEYS) | text
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)


def a_study_or_one_line(call):
    try:
        study = call()
    except StudyError as error:
        assert_one_plain_line(str(error))
    else:
        for run in study.runs():
            assert RunConfig.model_validate(run.model_dump(by_alias=True)) == run


def table_of_study(study, case):
    changes, merge = case
    raw = tomllib.loads(MINIMAL)
    for key, value in changes.items():
        table = raw.get(key)
        raw[key] = table | value if merge and isinstance(table, dict) and isinstance(value, dict) else value
    # json escapes DEL and surrogate pairs otherwise than TOML wants them: such a file may be invalid, never a traceback
    return study("\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in raw.items()))


def overrides_of_study(study, pairs):
    return study(MINIMAL, *[f"{key}={value}" for key, value in pairs])


def bytes_in_study(study, case):
    junk, at = case
    content = MINIMAL.encode()
    return study(content[:at] + junk + content[at:])


dotted = st.lists(keys, min_size=1, max_size=3).map(".".join)
HOSTILE = {
    "tables": (table_of_study, st.tuples(st.dictionaries(keys, values, max_size=5), st.booleans())),
    "overrides": (overrides_of_study, st.lists(st.tuples(dotted, values.map(toml) | text), max_size=3)),
    "bytes": (bytes_in_study, st.tuples(st.binary(max_size=40) | text.map(str.encode), st.integers(0, len(MINIMAL)))),
}


@sizes("cases", short=100, full=2000, soak=20000)
@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_a_study_file_holds_it_is_a_study_or_one_line(study, what, cases, tmp_path, measured):
    load, strategy = HOSTILE[what]

    @settings(fuzz, max_examples=cases)
    @given(strategy)
    def check(case):
        a_study_or_one_line(lambda: load(study, case))

    check()
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]
    measured("R16", f"hostile {what} of a study file", cases=cases, tracebacks=0, paths_outside=0)
