import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_files import MINIMAL, assert_one_plain_line, message, one

from analysis.plots import FIGURES
from analysis.studies import paper
from pipeline.cadence import Cadence
from pipeline.config import (
    KERNELS,
    KINDS,
    MAX_BYTES,
    TABLES,
    CadenceTable,
    Digits,
    File,
    Heading,
    Imported,
    Mlp,
    Record,
    RunConfig,
    Stop,
    check_imports_allowed,
    config_of,
    load_parts,
    load_study,
    needs_import,
    shipped,
    sizes_of,
)
from pipeline.errors import MissingError, StudyError
from pipeline.plan import plan_runs

REPO = Path(__file__).parents[2]


# --- shipped studies -------------------------------------------------------------------------------------------------


def test_digits_is_the_study_that_was_agreed():
    study = load_study("digits")
    runs = study.runs()
    assert [(run.learning_rate, run.seed) for run in runs] == [
        (rate, seed) for rate in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4) for seed in (0, 1, 2)
    ]
    for run in runs:
        assert run.data == Digits(n=300, target="digit<5")
        assert run.model == Mlp(width=64, depth=2, activation="tanh")
        assert run.stop == Stop(loss=0.001, steps=10_000)
        assert run.record == Record(
            eigenpairs=20,
            loss_levels=(0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
            snapshots=Cadence(log=8),
            spectra=Cadence(every=10),
            scalars=Cadence(every=1),
        )
        assert run.axes == {"learning_rate": run.learning_rate, "seed": run.seed}
    assert (study.name, study.paper, len(study.claims)) == ("digits", "jiang2025", 5)
    assert {run.parameters for run in plan_runs(runs, "nowhere")} == {8385}


def test_ids_of_the_shipped_study_never_change():
    """A change here means that nobody's finished runs are found again."""
    (run,) = load_study("digits", ["learning_rate=0.1", "seed=0"]).runs()
    assert run.run_id == "lr-0.1_seed-0_b83a190d"
    assert run.family == "93b995a7"


def test_every_shipped_study_loads_and_plans():
    assert {"digits", "smoke"} <= set(shipped())
    for name in shipped():
        for size in sizes_of(name) or [None]:
            for study in load_parts(name, size=size):
                assert all(run.parameters for run in plan_runs(study.runs(), "nowhere"))


def test_every_shipped_study_names_claims_and_figures_of_its_paper_and_has_seeds_enough():
    for name in shipped():
        for size in sizes_of(name):
            for study in load_parts(name, size=size):
                module = paper(study.paper)
                assert study.claims
                assert set(study.claims) <= module.CLAIMS.keys()
                assert set(study.figures or ()) <= module.FIGURES.keys() | FIGURES.keys()
                seeds = len({run.seed for run in study.runs()})
                assert seeds >= {"smoke": 1, "quick": 3, "full": 5}[size]


def test_importing_it_is_light_and_loading_imports_nothing_of_the_users():
    code = (
        "import sys; from pipeline.config import load_study; from pipeline.plan import plan_runs; "
        "study = load_study('smoke', ['model.import=no_such_package.at_all:net']); plan_runs(study.runs(), 'nowhere'); "
        "print(sorted({'torch', 'xarray', 'zarr', 'pandas', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- the grid --------------------------------------------------------------------------------------------------------


def test_grid_order_is_learning_rate_then_seed_then_the_other_axes(study):
    runs = study(MINIMAL + '[grid]\n"model.width" = [8, 4]\nmodel.depth = [1, 2]\n').runs()
    expected = [(r, s, w, d) for r in (0.1, 0.2) for s in (0, 1) for w in (8, 4) for d in (1, 2)]
    assert [(run.learning_rate, run.seed, run.model.width, run.model.depth) for run in runs] == expected
    assert [tuple(run.axes.values()) for run in runs] == expected
    assert list(runs[0].axes) == ["learning_rate", "seed", "model.width", "model.depth"]
    assert len({run.run_id for run in runs}) == 16
    assert runs[0].run_id.startswith("lr-0.1_seed-0_width-8_depth-1_")


def test_whole_learning_rates_become_floats(study):
    (run,) = study(MINIMAL, "learning_rate=1", "seed=0").runs()
    assert run.axes == {"learning_rate": 1.0, "seed": 0}
    assert isinstance(run.axes["learning_rate"], float)
    assert run.run_id.startswith("lr-1.0_seed-0_")


def test_hundred_thousand_runs_are_the_limit(study):
    seeds = ",".join(map(str, range(501)))
    rates = ",".join(f"{i}e-3" for i in range(1, 201))
    text = message(lambda: study(MINIMAL, f"seed=[{seeds}]", f"learning_rate=[{rates}]"))
    assert "200 learning_rate x 501 seed" in text
    assert "100000" in text


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_set_values_narrow_axes_and_make_axes(study):
    run = one(study, "stop.loss=0.01", "model.activation=relu", "record.spectra={every=5}", "title=Other words")
    assert (run.stop.loss, run.model.activation, run.record.spectra) == (0.01, "relu", Cadence(every=5))
    wide = MINIMAL + '[grid]\n"model.width" = [8, 4]\n'
    assert {run.model.width for run in study(wide, "model.width=32").runs()} == {32}
    assert {run.axes["model.width"] for run in study(wide, "model.width=[1,2]").runs()} == {1, 2}
    assert {run.model.depth for run in study(MINIMAL, "grid.model.depth=[3,4]").runs()} == {3, 4}
    assert {run.model.depth for run in study(wide, "grid.model={depth=[3,4]}").runs()} == {3, 4}
    assert len(study(wide, "grid={model.depth=[3,4]}").runs()) == 16
    assert study(MINIMAL, "title=Other words").title == "Other words"


def test_narrowing_an_axis_keeps_the_ids(study):
    wide = MINIMAL + '[grid]\n"model.width" = [8, 4]\n'
    narrowed = {run.run_id for run in study(wide, "model.width=4").runs()}
    assert narrowed == {run.run_id for run in study(wide).runs() if run.model.width == 4}


@pytest.mark.parametrize("order", [1, -1])
def test_an_override_of_the_kind_starts_the_table_afresh_in_any_order(study, order, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = MINIMAL.replace('name = "digits"', 'name = "digits"\nn = 100\ntarget = "parity"')
    runs = study(text + '[grid]\n"data.n" = [50, 60]\n', *["data.file=xy.npz", "data.normalise=global"][::order]).runs()
    assert {run.data for run in runs} == {File(file=str(tmp_path / "xy.npz"), normalise="global")}
    (run, *_) = study(MINIMAL, *["model.import=a.b:net", "model.options.k=3"][::order]).runs()
    assert run.model == Imported.model_validate({"import": "a.b:net", "options": {"k": 3}})


def test_an_override_within_the_kind_keeps_the_other_keys(study):
    run = one(study, "data.name=digits", "data.target=parity", "data.n=30")
    assert run.data == Digits(n=30, target="parity")


def test_files_are_relative_to_where_they_are_written(study, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = MINIMAL.replace('name = "digits"', 'file = "sub/xy.npz"')
    assert study(text).runs()[0].data.file == str(tmp_path / "sub/xy.npz")
    assert study(text, "data.file=xy.npz").runs()[0].data.file == str(tmp_path / "elsewhere/xy.npz")
    axis = study(text + '[grid]\n"data.file" = ["a.npz", "../b.npz"]\n').runs()
    assert [run.data.file for run in axis[:2]] == [str(tmp_path / "a.npz"), str(tmp_path.parent / "b.npz")]
    assert [run.axes["data.file"] for run in axis[:2]] == ["a.npz", "b.npz"]


# --- identity --------------------------------------------------------------------------------------------------------


def test_identity_ignores_what_does_not_change_the_numbers(study):
    plain = one(study)
    same = ["stop.loss=0.5", "stop.steps=99", "compute.commit_seconds=1", "title=x", "claims=['a']", "paper=p"]
    assert one(study, *same).run_id == plain.run_id
    assert one(study, *same).identity() == plain.identity()


@pytest.mark.parametrize(
    "override",
    ["data.n=50", "data.target=parity", "data.shape=image", "model.width=63", "model.depth=3", "model.activation=relu",
     "record.eigenpairs=3", "record.loss_levels=[0.1]", "record.spectra={every=9}", "record.scalars={}",
     "record.snapshots={log=8,every=100}", "compute.threads=2", "compute.device=cuda:0", "compute.dtype=float64",
     "learning_rate=0.30000000000000004", "seed=3", "data.file=xy.npz", "model.import=a:b"],
)  # fmt: skip
def test_identity_holds_what_changes_the_numbers(study, override):
    assert study(MINIMAL, override).runs()[0].run_id[-8:] != one(study).run_id[-8:]


def test_identity_is_plain_json_without_paths_and_does_not_depend_on_the_machine(study):
    runs = [study(MINIMAL, f"data.file={folder}/xy.npz").runs()[0] for folder in ("/here", "/there/deep")]
    assert runs[0].data != runs[1].data
    assert runs[0].run_id == runs[1].run_id
    assert runs[0].identity()["data"] == {"name": "file", "file": "xy.npz", "normalise": "none"}
    assert json.loads(json.dumps(runs[0].identity())) == runs[0].identity()


def test_defaults_are_part_of_the_identity(study):
    spelled = one(study, "model.width=64", "data.n=300", "compute.threads=1", "record.scalars={every=1}")
    assert spelled.identity() == one(study).identity()
    assert spelled.identity()["model"] == {"name": "mlp", "width": 64, "depth": 2, "activation": "tanh"}


def test_family_is_shared_by_processes_only(study):
    run = one(study)
    assert run.model_copy(update={"process": "gradient_flow"}).family == run.family
    assert run.model_copy(update={"process": "gradient_flow"}).run_id != run.run_id
    assert one(study, "model.width=3").family != run.family


@pytest.mark.parametrize("update", ["update.name=adam", "update={name='sgd',batch_size=5}"])
def test_a_flow_is_one_of_gradient_descent_on_all_examples(study, update):
    for process in ("gradient_flow", "central_flow"):
        assert one(study, f"process={process}").process == process
        text = message(lambda process=process: study(MINIMAL, f"process={process}", update))
        assert f'--set process = "{process}": needs update.name = "gd", of which it is the flow, not "' in text
        assert_one_plain_line(text)


def test_loss_levels_are_sorted(study):
    assert one(study, "record.loss_levels=[0.1,0.5,0.2]").record.loss_levels == (0.5, 0.2, 0.1)


@given(st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.floats(-1, 1), max_size=8))
def test_run_ids_are_short_and_safe_as_file_names(options):
    axes = {f"model.options.{key}": value for key, value in options.items()}
    run = RunConfig(learning_rate=0.1, data=Digits(), model=Mlp(), stop=Stop(steps=1), axes=axes)
    assert len(run.run_id) <= 80
    assert set(run.run_id) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert run.run_id.startswith("lr-0.1_seed-0")


def test_a_run_survives_json_and_pickle(study, tmp_path):
    for run in (one(study, "record.spectra={every=3,log=2}"), one(study, "data.file=a.npz", "model.import=a.b:c")):
        assert pickle.loads(pickle.dumps(run)) == run
        assert RunConfig.model_validate(json.loads(json.dumps(run.model_dump(by_alias=True, mode="json")))) == run


# --- messages --------------------------------------------------------------------------------------------------------

SAID = [
    ("model.widht=64", '--set model.widht = 64: unknown key; did you mean "width"? (allowed: activation, bias, depth,'),
    ("width=64", "--set width = 64: unknown key; did you mean model.width? (allowed: claims, compute, data, figures,"),
    ("lerning_rate=1", '--set lerning_rate = 1: unknown key; did you mean "learning_rate"?'),
    ("record.spectra={evry=5}", '--set record.spectra.evry = 5: unknown key; did you mean "every"? (allowed: every,'),
    ("axes={a=1}", "axes: unknown key"),
    ("data.name=digit", '--set data.name = "digit": must be one of digits, cifar10, chebyshev, whitened_linear, '),
    ("data.name=digit", 'one_outlier, patterns1d, file; did you mean "digits"?'),
    ("data={}", "--set data.name: missing; must be one of digits, cifar10, chebyshev, "),
    ("data={name='digits',file='x.npz'}", 'with it, leave out data.name or say "file"'),
    ("data.file=x.csv", "must be the path of an .npz file with the arrays x and y"),
    ("data.n=1.5", "--set data.n = 1.5: must be a whole number"),
    ("data.n=1798", "--set data.n = 1798: must be at most 1797"),
    ("data.target=odd", '--set data.target = "odd": must be "digit<5", "parity", "ten" or a pair such as "3 vs 8"'),
    ("data.target='3 vs 3'", "or a pair such as"),
    ("data={name='digits',target='3 vs 8',n=358}", 'data.n = 358: must be at most 357, the examples of "3 vs 8"'),
    ("data={name='digits',shape='flat'}", '--set data.shape = "flat": must be one of image'),
    ("data={name='cifar10',n=1001}", "--set data.n = 1001: must be a multiple of data.classes = 2"),
    ("data={name='cifar10',classes=3}", "--set data.n = 1000: must be a multiple of data.classes = 3"),
    ("data={name='cifar10',n=10001,choice='first'}", "data.n = 10001: must be at most 10000, the images of 2 classes"),
    ("data={name='whitened_linear',n=49}", "--set data.d = 50: must be at most 49, data.n"),
    ("data={name='one_outlier',d=101}", "--set data.d = 101: must be at most 100, data.n"),
    ("data={name='patterns1d',classes=8}", "data.length = 32: must be at least 4 (data.classes + 1) = 36"),
    ("data.n=19", "record.eigenpairs = 20: must be at most data.n = 19"),
    ("model=3", "--set model = 3: must be a table"),
    ("model.width=0", "--set model.width = 0: must be at least 1"),
    ("model.width=true", "--set model.width = true: must be a whole number"),
    ("model.width=64.0", "--set model.width = 64.0: must be a whole number"),
    ("model.width='64'", '--set model.width = "64": must be a whole number'),
    ("model.width=[1,2]", 'to make it an axis: [grid] "model.width" = [...]'),
    ("model.activation=rleu", 'must be one of tanh, relu, elu, gelu, silu; did you mean "relu"?'),
    ("model.import=os.system", '--set model.import = "os.system": must be "package.module:callable"'),
    ("model.import=a:b()", 'must be "package.module:callable"'),
    ("learning_rate=-0.1", "--set learning_rate = -0.1: must be more than 0"),
    ("learning_rate=0", "--set learning_rate = 0: must be more than 0"),
    ("learning_rate=nan", "--set learning_rate = nan: must be a finite number"),
    ("learning_rate=[0.1,inf]", "--set learning_rate[1] = inf: must be a finite number"),
    ("learning_rate=fast", '--set learning_rate = "fast": must be a number'),
    ("learning_rate=true", "--set learning_rate = true: must be a number"),
    ("learning_rate=[]", "--set learning_rate = []: must be one value or a list of values"),
    ("learning_rate=[1,1.0]", "--set learning_rate = [1, 1.0]: has the same value twice"),
    ("learning_rate=[0.1,'a']", "the values of an axis must be of one type"),
    ("learning_rate=[[0.1]]", "--set learning_rate = [[0.1]]: must be one value or a list of values"),
    ("learning_rate=[0.1", "--set learning_rate=[0.1: not a TOML value"),
    ("learning_rate=1\nseed=2", "not a TOML value: more than one value"),
    ("learning_rate.x=1", '--set learning_rate.x: [0.1, 0.2] is a value, so it has no key "x"'),
    ("seed=-1", "--set seed = -1: must be at least 0"),
    ("seed=1.0", "--set seed = 1.0: must be a whole number"),
    ("seed=4294967296", "--set seed = 4294967296: must be at most 4294967295"),
    ("seed=99999999999999999999", "--set seed: the number has more than 64 bits"),
    ("process=adiabatic", '--set process = "adiabatic": must be one of discrete, midpoint, gradient_flow, cent'),
    ("paper=os.path", '--set paper = "os.path": must be a name of letters, digits and underscores'),
    ("claims=['a b']", '--set claims[0] = "a b": must be names of letters, digits and underscores'),
    ("claims=one", '--set claims = "one": must be a list'),
    ("title=3", "--set title = 3: must be text in quotes"),
    ("title=''", '--set title = "": must not be empty'),
    ("loss.name=entropy", '--set loss.name = "entropy": must be one of mse, cross_entropy; did you mean "cross_ent'),
    ("update.name=adm", '--set update.name = "adm": must be one of gd, sgd, heavy_ball, nesterov, rmsprop, adam; did'),
    ("update.name=sgd", "update.batch_size: missing"),
    ("update={name='sgd',batch_size=0}", "--set update.batch_size = 0: must be at least 1"),
    ("update={name='nesterov',momentum=1.0}", "--set update.momentum = 1.0: must be less than 1"),
    ("update={name='heavy_ball',momentum=-0.1}", "--set update.momentum = -0.1: must be at least 0"),
    ("update={name='rmsprop',epsilon=0.0}", "--set update.epsilon = 0.0: must be more than 0"),
    ("update={name='adam',momentum=0.9}", "--set update.momentum = 0.9: unknown key (allowed: beta1, beta2, epsilon,"),
    ("stop.steps=0", "--set stop.steps = 0: must be at least 1"),
    ("stop={}", "--set stop.steps: missing"),
    ("stop.steps.x=1", '--set stop.steps.x: 10 is a value, so it has no key "x"'),
    ("stop.loss=0.0", "--set stop.loss = 0.0: must be more than 0"),
    ("record.eigenpairs=301", "--set record.eigenpairs = 301: must be at most data.n = 300"),
    ("record.loss_levels=[0.1,0.1]", "--set record.loss_levels = [0.1, 0.1]: has the same level twice"),
    ("record.loss_levels=[0.1,-1]", "--set record.loss_levels[1] = -1: must be more than 0"),
    ("record.scalars={every=0}", "--set record.scalars.every = 0: must be at least 1"),
    ("record.scalars=5", "--set record.scalars = 5: must be a table"),
    ("compute.device=tpu", '--set compute.device = "tpu": must be cpu, cuda, mps or a numbered one such as cuda:0'),
    ("compute.dtype=float16", 'must be one of float32, float64; did you mean "float64"?'),
    ("model.options.when=1979-05-27", "no key takes a date or a time"),
    ("grid=3", "--set grid = 3: must be a table of axes"),
    ("grid.model.widht=[1]", '--set grid.model.widht = 1: unknown key; did you mean "width"?'),
    ("grid.stop.steps=[1,2]", "--set grid.stop.steps: does not tell runs apart, so it cannot be an axis"),
    ("grid.compute.commit_seconds=[1,2]", "does not tell runs apart"),
    ("grid.seed=[1,2]", "grid.seed: is a key at the top of the file, not an axis of [grid]"),
    ("grid.model.width=[]", "--set grid.model.width = []: must be one value or a list of values"),
    ("grid.model.width=[8,8]", "--set grid.model.width = [8, 8]: has the same value twice"),
    ("grid.record.spectra=[{every=1}]", "must be one value or a list of values"),
    ("grid={'model.width'=[1],model={width=[2]}}", "--set grid: an axis is given twice (axes: model.width,"),
    ("grid.seed.x=[1]", "is a value, so it has no key"),
    ("novalue", '--set "novalue": must be key=value, for example learning_rate=[0.1,0.2]'),
    ("=3", "must be key=value"),
    ("a..b=3", "must be key=value"),
    ("model.options.s=\udcff", "must be UTF-8 text"),
]  # fmt: skip


@pytest.mark.parametrize("table", ["loss", "update"])
def test_every_loss_and_rule_has_an_id_of_its_own_and_is_found_in_its_identity(study, table):
    more = {"sgd": ["update.batch_size=5"]}
    runs = [one(study, f"{table}.name={name}", *more.get(name, [])) for name in KINDS[table]]
    assert len({run.run_id for run in runs}) == len(runs)
    for run in runs:
        found = config_of(json.loads(json.dumps(run.identity())))
        assert found.identity() == run.identity()
        assert type(getattr(found, table)) is type(getattr(run, table))


def test_an_option_of_a_rule_can_be_an_axis(study):
    found = study(MINIMAL, "update.name=heavy_ball", "grid.update.momentum=[0.5,0.9]").runs()
    assert [run.update.momentum for run in found] == 4 * [0.5, 0.9]
    assert len({run.run_id for run in found}) == 8


@pytest.mark.parametrize(("override", "said"), SAID)
def test_messages_say_key_value_rule_and_spelling(study, override, said):
    text = message(lambda: study(MINIMAL, override))
    assert said in text
    assert_one_plain_line(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "[loss", "study.toml: not valid TOML: "),
        (MINIMAL + "width = ", "(at end of document)"),
        ("title = 't'\nlearning_rate = 0.1 0.2", "(at line 2, column 21)"),
        (b"title = '\xff'", "study.toml: not UTF-8 text (byte 9); save it as UTF-8"),
        (b"#" * (MAX_BYTES + 1), "more than 1048576 bytes"),
        ("a = " + "[" * 5000 + "]" * 5000, "study.toml: "),
        (MINIMAL + "[model.options]\n" + "a." * 40 + "a = 1", "more than 16 tables or lists inside one another"),
        (MINIMAL + "[model.options]\na = 0x" + "f" * 9000, "more than 64 bits"),
        ("learning_rate = 0.1", "study.toml: title: missing"),
        (MINIMAL.replace("learning_rate = [0.1, 0.2]", ""), "study.toml: learning_rate: missing"),
        (MINIMAL.replace('[model]\nname = "mlp"', ""), "study.toml: model: the table [model] is missing"),
        (MINIMAL.replace("[stop]\nsteps = 10", ""), "study.toml: stop: the table [stop] is missing"),
        (MINIMAL + "stepps = 3\nlos = 4", "study.toml: stop.stepps = 3: unknown key; did you mean"),
        (MINIMAL + "stepps = 3\nlos = 4", "(and 1 more)"),
        (MINIMAL + '"a\\nb\\u2028" = 3', "stop.a\\nb\\u2028 = 3: unknown key"),
    ],
)
def test_messages_about_files(study, text, said):
    found = message(lambda: study(text))
    assert said in found
    assert_one_plain_line(found)


def test_files_with_byte_order_mark_and_windows_line_ends(study):
    assert study(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()).runs() == study().runs()


@pytest.mark.parametrize(
    ("name", "said"),
    [("digts", 'digts: no such study; did you mean "digits"?'), ("nowhere/digits.toml", 'did you mean "digits"?'),
     ("qqqq", "(shipped: central_flow, "), ("qqqq", "path of a .toml")],
)  # fmt: skip
def test_a_study_that_is_not_there(name, said):
    text = message(lambda: load_study(name), MissingError)
    assert said in text
    assert_one_plain_line(text)


@pytest.mark.parametrize("name", [".", "x" * 5000, "a\0b"])
def test_a_study_that_cannot_be_read(name):
    assert "cannot be read: " in message(lambda: load_study(name))


def test_runs_with_one_id_are_refused(study, tmp_path):
    text = message(lambda: study(MINIMAL, "data.file=a.npz", "grid.data.file=['a/x.npz','b/x.npz']"))
    assert "two points have the id" in text


def test_imports_need_permission(study):
    builtin, imported = study(), study(MINIMAL, "model.import=mine.nets:small")
    assert not needs_import(builtin)
    assert needs_import(imported)
    check_imports_allowed(builtin, False)
    check_imports_allowed(imported, True)
    text = message(lambda: check_imports_allowed(imported, False))
    assert 'model.import = "mine.nets:small"' in text
    assert "--allow-imports" in text


# --- what is recorded on request -------------------------------------------------------------------------------------


def test_what_is_not_asked_for_is_no_part_of_the_identity(study):
    plain = one(study)
    assert set(plain.identity()["record"]) == {"eigenpairs", "loss_levels", "snapshots", "spectra", "scalars"}
    spelled = ['record.kernels=["ntk"]', "record.layers=false", "record.ntk_full=false"]
    assert one(study, *spelled).run_id == plain.run_id
    hessian = one(study, "record.hessian={every=3}")
    assert hessian.run_id != plain.run_id
    assert one(study, "record.hessian={every=3}", "record.hessian_eigenpairs=1").run_id == hessian.run_id
    assert hessian.record.cadences == {"hessian": Cadence(every=3), **plain.record.cadences}


def test_kernels_are_named_or_tables_in_any_order(study):
    one_way = one(study, 'record.kernels=["ntk", {name="nngp", depth=2}, "conjugate"]')
    other = one(study, 'record.kernels=["conjugate", {name="ntk"}, {depth=2, name="nngp", activation="relu"}]')
    assert one_way.run_id == other.run_id
    nngp = {"name": "nngp", "depth": 2, "activation": "relu", "weight_std": 1.0, "bias_std": 0.0}
    assert one_way.record.kernel_tables() == [{"name": "ntk"}, {"name": "conjugate"}, nngp]
    assert one(study).record.kernel_tables() == [{"name": "ntk"}]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('record.kernels=["conjugate"]', 'record.kernels = ["conjugate"]: must have "ntk" among them'),
        ('record.kernels=["ntk","ntk"]', "has the same kernel twice"),
        ('record.kernels=["ntk","conjugat"]', 'record.kernels[1] = "conjugat": must be one of ntk, conjugate, '),
        ('record.kernels=["ntk","conjugat"]', 'did you mean "conjugate"?'),
        ("record.kernels=[3]", "record.kernels[0] = 3: must be the name of a kernel, or a table"),
        ('record.kernels="ntk"', 'record.kernels = "ntk": must be a list'),
        ('record.kernels=["ntk",{name="nngp",dept=2}]', 'nngp has no option "dept"; did you mean "depth"?'),
        ('record.kernels=["ntk",{name="nngp"}]', "record.kernels[1].depth: missing"),
        ('record.kernels=["ntk",{name="nngp",depth=0}]', "record.kernels[1].depth = 0: must be at least 1"),
        ('record.kernels=["ntk",{name="weighted",weights={}}]', "record.kernels[1].weights = {}: must not be empty"),
        ('record.kernels=["ntk",{name="weighted",weights={a="x"}}]', 'weights.a = "x": must be a number'),
        ("record.layers=1", "record.layers = 1: must be true or false"),
        ("record.hessian={evry=1}", 'record.hessian.evry = 1: unknown key; did you mean "every"?'),
        ("record.hessian_eigenpairs=2", "record.hessian_eigenpairs = 2: needs record.hessian, the steps"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(study, override, said):
    text = message(lambda: one(study, override))
    assert said in text
    assert_one_plain_line(text)


def test_what_is_recorded_may_be_an_axis(study):
    runs = study(MINIMAL, "learning_rate=0.1", "seed=0", "grid.record.layers=[true,false]").runs()
    assert [run.axes["record.layers"] for run in runs] == [True, False]
    assert runs[1].identity() == one(study).identity()


# --- parts and sizes --------------------------------------------------------------------------------------------------

LAYERED = (
    MINIMAL
    + """
[parts.one]
learning_rate = 0.3
title = "one"
[parts.one.grid]
"model.width" = [4, 8]
[parts.two.data]
name = "file"
file = "xy.npz"
[sizes.quick]
stop = { loss = 0.5 }
[sizes.smoke]
seed = 7
[sizes.smoke.parts.two]
learning_rate = 1.5
"""
)


@pytest.fixture
def layered(tmp_path):
    path = tmp_path / "layered.toml"
    path.write_text(LAYERED)
    return path


def test_a_part_is_laid_over_the_file_and_a_size_over_the_part(layered):
    one, two = load_parts(layered)
    assert (one.size, one.title, one.label, two.title) == ("quick", "one", "layered/one", "t")
    assert [(run.learning_rate, run.seed, run.model.width) for run in one.runs()] == [
        (0.3, 0, 4), (0.3, 0, 8), (0.3, 1, 4), (0.3, 1, 8),
    ]  # fmt: skip
    assert {(run.stop.steps, run.stop.loss) for study in (one, two) for run in study.runs()} == {(10, 0.5)}
    assert two.runs()[0].data == File(file=str(layered.parent / "xy.npz"))  # afresh: no target of the digits


def test_overrides_come_last_and_a_size_may_change_one_part(layered):
    one, two = load_parts(layered, ["stop.steps=3", "model.width=2"], "smoke")
    assert {run.seed for run in (*one.runs(), *two.runs())} == {7}
    assert [run.learning_rate for run in two.runs()] == [1.5]
    assert {run.stop.steps for run in one.runs()} == {3}
    assert {run.model.width for run in two.runs()} == {2}


def test_a_file_without_parts_is_one_and_has_the_ids_it_had(study):
    (only,) = load_parts("smoke")
    assert (only.part, only.size) == (None, None)
    assert only.runs() == load_study("smoke").runs()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parts = 3", "parts = 3: must be tables"),
        ("[parts]\none = 3", "parts = .*: must be tables"),
        ("[parts.'../x']\n", "named by letters a-z"),
        ("[parts.runs]\n", "parts.runs: a folder of that name makes a store"),
        ("[sizes.big]\n", "sizes.big: must be one of smoke, quick, full"),
        ("[sizes.quick]\nparts = 3", r"sizes.quick.parts = 3: must be tables, \[sizes.quick.parts.NAME\]"),
        ("[sizes.quick.parts.cnn]\n", r"sizes.quick.parts.cnn: not a part of the study \(there are none\)"),
        ("[parts.a]\nwidth = 3", r"\(part a\): width = 3: unknown key; did you mean model.width"),
        ("[parts.a.model]\nname = 'cmn'", r"model.name = .cmn.: must be one of"),
        ("[sizes.full]\nseed = -1", r"\(full\): seed = -1: must be at least 0"),
    ],
)
def test_wrong_parts_and_sizes_are_refused(tmp_path, text, said):
    path = tmp_path / "wrong.toml"
    path.write_text(f"{text}\n{MINIMAL}" if text.startswith("parts") else MINIMAL + text)
    with pytest.raises(StudyError, match=said) as caught:
        load_parts(path)
    assert_one_plain_line(str(caught.value))


def test_sizes_that_are_not_there(layered):
    assert sizes_of(layered) == ["smoke", "quick"]
    with pytest.raises(StudyError, match='size = "full": the study has the sizes quick, smoke'):
        load_parts(layered, size="full")
    with pytest.raises(StudyError, match="comes in one size"):
        load_parts("digits", size="quick")
    with pytest.raises(StudyError, match="has 2 parts"):
        load_study(layered)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["bias=true", "parametrisation=pytorch", "init_scale=1.0", "output_scale=1"])
def test_what_a_model_does_by_default_is_no_part_of_the_identity(study, key):
    assert one(study, f"model.{key}").run_id == one(study).run_id
    assert set(one(study).identity()["model"]) == {"name", "width", "depth", "activation"}


@pytest.mark.parametrize(
    "key", ["bias=false", "parametrisation=ntk", "init=lecun_normal", "init_scale=2.0", "output_scale=0.5"]
)
def test_what_a_model_does_otherwise_tells_runs_apart(study, key):
    assert one(study, f"model.{key}").run_id != one(study).run_id


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=mpl"], "must be one of mlp, two_layer_linear, deep_linear, cnn, vit, resnet, import"),
        (["model.parametrisation=ntk", "model.init=he_normal"], 'model.init = "he_normal": leave it out: with this'),
        (["model.init_scale=0"], "model.init_scale = 0: must be more than 0"),
        (["model.name=vit", "model.dim=30"], "model.heads = 4: must divide model.dim = 30"),
        (
            ["model.name=vit", "model.dim=6", "model.heads=2"],
            'model.position = "sincos": needs a multiple of 4 as model.',
        ),
        (["model.name=cnn", "model.channels=[]"], "model.channels = []: must not be empty"),
        (["model.name=cnn", "model.channels=8"], "model.channels = 8: must be a list"),
        (["model.name=cnn", "model.channels=[8,0]"], "model.channels[1] = 0: must be at least 1"),
        (["model.name=two_layer_linear", "model.init_scale=2.0"], "model.init_scale = 2.0: unknown key"),
    ],
)
def test_a_model_that_cannot_be_is_one_line(study, overrides, said):
    text = message(lambda: one(study, *overrides))
    assert said in text
    assert_one_plain_line(text)


# --- the page --------------------------------------------------------------------------------------------------------


def tables_of_the_page():
    """The tables of keys on the page, each a list of (key, default, allowed)."""
    for block in (REPO / "docs/studies.md").read_text().split("\n\n"):
        rows = [line.split("|") for line in block.splitlines() if line.startswith("| `")]
        yield [(key.strip().strip("`"), default.strip(), allowed) for _, key, _, default, allowed, *_ in rows]


def test_the_page_describes_every_key_with_its_default_and_its_values():
    page = list(tables_of_the_page())
    tables = [("", Heading), ("", RunConfig), ("", CadenceTable)]
    tables += [(f"{name}.", kind) for name, kinds in KINDS.items() for kind in kinds.values()]
    tables += [(f"{name}.", table) for name, table in TABLES.items()]
    tables += [("", kind) for kind in dict.fromkeys(KERNELS.values())]
    described = {row for rows in page for row in rows if row[0] in ("grid", "parts", "sizes")}
    for prefix, table in tables:
        # A kind has a table of its own, which says its name, and may share those that say none.
        names = [[allowed for key, _, allowed in rows if key == f"{prefix}name"] for rows in page]
        kind = table.model_fields["name"].default if "name" in table.model_fields else None
        own = [
            rows
            for rows, said in zip(page, names, strict=True)
            if not said or any(f'`"{kind}"`' in one for one in said)
        ]
        for name, info in table.model_fields.items():
            key = prefix + (info.alias or name)
            if key in {*KINDS, *TABLES, "axes", "name"}:
                continue
            values = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
            needed = name == "name" and key.split(".")[0] in KINDS and kind not in ("file", "import", "mse", "gd")
            if info.is_required() or needed:
                defaults = {"required"}
            elif info.default is None:
                defaults = {"none", "all"}
            elif isinstance(info.default, Cadence):
                pairs = [f"{k} = {v}" for k, v in vars(info.default).items() if v]
                defaults = {f"`{{ {', '.join(pairs)} }}`"}
            else:
                defaults = {f"`{json.dumps(info.default)}`"}
            found = [
                row for rows in own for row in rows
                if row[0] == key and row[1] in defaults and all(f'`"{value}"`' in row[2] for value in values)
            ]  # fmt: skip
            assert len(found) == 1, f"{key} of {kind} with default {defaults} and values {values}"
            described.update(found)
    assert {row for rows in page for row in rows} == described


def test_parts_and_sizes_of_the_page(tmp_path):
    page = (REPO / "docs/studies.md").read_text().split("```toml\n")
    path = tmp_path / "width.toml"
    example, layers = (text.split("```")[0] for text in page[1:3])
    path.write_text(example.split("\n[grid]")[0] + example[example.index("\n[data]") :] + layers)
    narrow, wide = load_parts(path, size="full")
    assert (narrow.part, wide.part) == ("narrow", "wide")
    assert {run.seed for run in wide.runs()} == set(range(5))
    assert [study.runs()[0].stop.steps for study in (narrow, wide)] == [5000, 20_000]
    assert [study.runs()[0].model.width for study in (narrow, wide)] == [16, 256]
    assert (narrow.claims, wide.claims) == ((), ("c5_rises",))


def test_the_example_of_the_page_is_a_study(study):
    page = (REPO / "docs/studies.md").read_text()
    runs = study(page.split("```toml\n")[1].split("```")[0]).runs()
    assert len(runs) == 8
    assert {run.model.width for run in runs} == {32, 64}
