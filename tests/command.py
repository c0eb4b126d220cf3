"""The command as tests call it: in this process, with its output, its exit code and its refusals."""

import json

from click.testing import CliRunner, Result

from pipeline.cli import main


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(code: int, *arguments: object) -> str:
    """The one line with which a call is refused; nothing else may be printed."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def rows(*arguments: object) -> list[dict]:
    """What a call with --json gives."""
    result = call(*arguments, "--json")
    printed = json.loads(result.stdout)
    assert printed["schema"] == 1
    return printed["rows"]
