"""What library code must never do, and what no file of the repository may mention. Each rule is shown to bite."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted(path for package in ("pipeline", "analysis") for path in (ROOT / package).rglob("*.py"))

UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = set(
    "torch.load torch.save torch.hub.load pandas.read_pickle pd.read_pickle "
    "yaml.load yaml.load_all yaml.full_load yaml.unsafe_load".split()
)
CODE_FROM_TEXT = {name for base in ("eval", "exec", "compile") for name in (base, f"builtins.{base}")}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def imported(node: ast.AST) -> set[str]:
    """Dotted names that an import statement brings in."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def used(node: ast.AST) -> set[str]:
    """The dotted name that a name, an attribute or an import stands for; calling it is not needed to break a rule."""
    return {ast.unparse(node)} if isinstance(node, ast.Name | ast.Attribute) else imported(node)


def sets(node: ast.AST, argument: str) -> bool:
    """Whether a call passes this argument with anything but a literal False."""
    return isinstance(node, ast.keyword) and node.arg == argument and getattr(node.value, "value", None) is not False


RULES: dict[str, Callable[[ast.AST], bool]] = {
    "loads or writes pickles": lambda node: (
        bool({name.partition(".")[0] for name in imported(node)} & UNSAFE_MODULES)
        or bool(used(node) & UNSAFE_CALLS)
        or (isinstance(node, ast.Attribute) and node.attr == "to_pickle")
        or sets(node, "allow_pickle")
    ),
    "runs text as code": lambda node: bool(used(node) & CODE_FROM_TEXT),
    "hands a string to a shell": lambda node: bool(used(node) & SHELLS) or sets(node, "shell"),
    "checks with assert, which python -O removes": lambda node: isinstance(node, ast.Assert),
}


def offences(source: str) -> Iterator[str]:
    """Every line that breaks a rule."""
    for node in ast.walk(ast.parse(source)):
        yield from (f"line {getattr(node, 'lineno', 0)} {rule}" for rule, broken in RULES.items() if broken(node))


def test_library_code_is_safe(measured):
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text())) for path in LIBRARY}
    assert {path: lines for path, lines in found.items() if lines} == {}
    measured("R18", "every module of pipeline and analysis", modules=len(found), rules=len(RULES), uses=0)


PLANTED = {
    "loads or writes pickles": """
        import pickle
        import joblib.memory
        from marshal import loads
        def f(): import shelve, json
        torch.load(path)
        loader = torch.load
        from torch import load
        torch.save(state, path)
        np.load(path, allow_pickle=True)
        np.load(path, allow_pickle=flag)
        pd.read_pickle(path)
        frame.to_pickle(path)
        yaml.load(text)
        from yaml import unsafe_load
    """,
    "runs text as code": """
        eval(text)
        exec(text)
        compile(text, "", "exec")
        f = eval
        builtins.eval(text)
    """,
    "hands a string to a shell": """
        os.system("ls")
        from os import popen
        subprocess.run(command, shell=True)
        run(command, shell=flag)
    """,
    "checks with assert, which python -O removes": """
        def f(n): assert n > 0
    """,
}


def lines(block: str) -> list[str]:
    return [line.strip() for line in block.strip().splitlines()]


@pytest.mark.parametrize(("rule", "source"), [(rule, s) for rule, block in PLANTED.items() for s in lines(block)])
def test_a_planted_offence_is_caught(rule, source):
    found = list(offences(source))
    assert found
    assert all(offence.endswith(rule) for offence in found)


def test_every_rule_has_a_planted_offence():
    assert PLANTED.keys() == RULES.keys()


HARMLESS = """
    model.eval()
    re.compile(pattern)
    np.load(path, allow_pickle=False)
    from safetensors.torch import load
    subprocess.run(["git", "status"], shell=False)
    json.load(file)
    evaluate(model)
    dataset.load()
"""


@pytest.mark.parametrize("source", lines(HARMLESS))
def test_what_is_harmless_passes(source):
    assert list(offences(source)) == []


# A path of one person's machine, or a host that only one network knows. What precedes the path decides: data/work/x and
# https://host/work/x pass.
MACHINE_PATH = re.compile(
    r"(?<![\w.~})*-])/(?:work/|root/|home/\w|Users/\w|tmp/w\b|opt/(?:wheels|pypi))|\b[A-Z]:\\Users\\"
)
PRIVATE_HOST = re.compile(
    r"\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}\b"
    r"|\b(?:https?|ssh|git|tcp|ftp)://(?:[^\s/@]+@)?[\w.-]+\.(?:internal|corp|intranet|lan|local|home)\b"
)


def private(text: str) -> list[str]:
    """What in a text only one machine or one network understands."""
    return [match.group() for pattern in (MACHINE_PATH, PRIVATE_HOST) for match in pattern.finditer(text)]


def test_no_file_mentions_a_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    texts = {}
    for name in sorted({*names} - {"", Path(__file__).relative_to(ROOT).as_posix()}):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            texts[name] = data.decode(errors="replace")
    assert "pyproject.toml" in texts
    assert {name: found for name, text in texts.items() if (found := private(text))} == {}


MENTIONS = r"""
    see /work/notes.md
    "/root/x"
    cd /home/ada/ntk
    open(/tmp/w/a)
    /Users/ada
    C:\Users\ada
    file:///opt/wheels
    10.1.2.3
    192.168.0.7:8786
    172.20.1.1
    https://pypi.internal/simple
    tcp://node7.corp:8786
    http://ada@wheels.local/x
"""


@pytest.mark.parametrize("text", lines(MENTIONS))
def test_a_planted_mention_is_caught(text):
    assert private(text)


PUBLIC = """
    data/work/x
    https://example.org/home/page
    ntk-eos demo --out /tmp/digits
    $HOME/work/x
    ~/work/x
    {root}/root/x
    s3://bucket/runs
    tcp://127.0.0.1:8786
    http://localhost:8787
    https://arxiv.org/abs/2507.12837
    version 10.1.2
    threading.local()
"""


@pytest.mark.parametrize("text", lines(PUBLIC))
def test_a_public_mention_passes(text):
    assert private(text) == []
