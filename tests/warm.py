"""A process that has its imports behind it and forks a child for each call, so that a SIGKILL costs no start.

    with Warm(__file__, "write") as warm:           # write(root, steps) of this file
        with warm.call(root, 600) as child:
            ...
            child.kill()

The process has one thread when it forks, BLAS and torch included, so a child is as good as one that was started. A
child that still runs at the end of its block is killed; none outlives the test. Children do not fsync: a SIGKILL takes
nothing from the page cache, and a disk that others use too would be what the tests wait for.

python tests/warm.py FILE FUNCTION [FIRST]     arguments as JSON, a call a line; prints each child's pid and exit code
"""

import ctypes
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from types import TracebackType
from typing import Any, Self

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PR_SET_PDEATHSIG = 1


class Child:
    """One call under way.

    Attributes:
        pid: of its process.
    """

    def __init__(self, answers: Any, pid: int) -> None:
        self._answers, self.pid, self._code = answers, pid, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._code is None and not select.select([self._answers], [], [], 0)[0]

    def wait(self) -> int:
        """Its exit code once it has ended; -9 after a SIGKILL."""
        if self._code is None:
            self._code = int(self._answers.readline())
        return self._code

    def kill(self) -> bool:
        """SIGKILL; whether that is what ended it."""
        if self.runs():
            os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL


class Warm:
    """The process that forks; one call at a time.

    Args:
        file: a Python file.
        function: one of its functions; it takes what JSON can say.
        first: arguments of a call before any fork, for what the function itself imports.
    """

    def __init__(self, file: str, function: str, *first: Any) -> None:
        self._command = [sys.executable, __file__, file, function, *([_json(first)] if first else [])]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, **ONE_THREAD}
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        assert self._process.wait() == 0
        self._process.stdout.close()

    def call(self, *arguments: Any) -> Child:
        """Fork a child that calls the function."""
        self._process.stdin.write(_json(arguments).encode() + b"\n")
        return Child(self._process.stdout, int(self._process.stdout.readline()))


def _json(arguments: tuple[Any, ...]) -> str:
    return json.dumps(arguments, default=os.fspath)


def end_with_parent() -> None:
    """SIGKILL for this process when its parent ends, where the kernel knows that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(file: str, name: str, *first: str) -> None:
    end_with_parent()
    os.fsync = lambda handle: None
    spec = importlib.util.spec_from_file_location("called", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    for line in first:
        function(*json.loads(line))
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, "a fork takes only the thread that makes it along"
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
            try:
                function(*json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
