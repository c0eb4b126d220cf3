"""Every error that a user can meet, as one small tree with the exit code of the command.

    NtkEosError                 1   anything that failed for a reason we can name
    |-- InputError              2   a value, an option, a query or a file that we were given
    |   `-- StudyError          2   a key of a study file
    |-- MissingError            4   a root, a run, a row or a table that is not there
    |-- RunLocked               5   a run that another process is writing
    |-- DamagedStore            1   bytes of a store that are not what was committed
    `-- UnreachableStore        1   an object store that does not answer, or refuses

A message says what was wrong, the value got, what is allowed and how to mend it, on one line.
"""


def line(message: str) -> str:
    """One printable line, whatever it quotes: no text of a stranger's can move the cursor or add a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message)


class NtkEosError(Exception):
    """Base of all errors that the command prints as one line instead of a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return line(super().__str__())


class InputError(NtkEosError):
    """The caller gave something that cannot be used."""

    exit_code = 2


class StudyError(InputError):
    """A study file has a key or a value that cannot be used."""


class MissingError(NtkEosError):
    """Something that was asked for does not exist."""

    exit_code = 4


class RunLocked(NtkEosError):
    """Another process is writing this run."""

    exit_code = 5


class DamagedStore(NtkEosError):
    """A store holds bytes that are not what was committed."""


class UnreachableStore(NtkEosError):
    """An object store did not answer, or refused the request."""
