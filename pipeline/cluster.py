"""The way to a Dask scheduler: a client of it, or one line that says why there is none.

distributed sends pickles both ways, so whoever reaches a scheduler can run code on its workers and on those who connect
to it: a scheduler is trusted like one's own account.
"""

import asyncio
import logging
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.disk import Directory, Location, door
from pipeline.errors import InputError, NtkEosError

if TYPE_CHECKING:
    from distributed import Client

ADDRESS = r"(tcp|tls|ucx|wss?)://\S+:\d+"
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
WORKER_SECONDS = 60.0
# How often long work looks at the workers, and how long it goes on without any: a queue may take its time to replace
# those whose hours are over.
LOOK_SECONDS, ALONE_SECONDS = 10.0, 600.0
GPU = {"GPU": 1}  # what a worker offers by `--resources GPU=1`
NO_GPU = "no worker offers a GPU: start one per GPU by `dask worker ADDRESS --nthreads 1 --resources GPU=1`"
NO_WORKER = "the scheduler has no worker: start one by `dask worker ADDRESS`"
# With other versions of these the workers would give other bits, or none.
TRAINING = ("ntk-eos", "distributed", "numpy", "torch", "zarr")
ANALYSIS = ("ntk-eos", "distributed", "numpy", "xarray", "zarr")

Answer = TypeVar("Answer")


@contextmanager
def connect(address: str, packages: Sequence[str], *, worker_seconds: float = WORKER_SECONDS) -> Iterator["Client"]:
    """A client of a scheduler. Dask does not compute there by itself: clients may come and go in any order.

    Args:
        address: such as `tcp://host:8786`.
        packages: what must have one version on all workers and here, beside Python: `TRAINING` or `ANALYSIS`.
        worker_seconds: how long to wait for the first worker.

    Raises:
        InputError: for something that is no address.
        NtkEosError: if the extra `distributed` is not installed, nothing answers there, there is no worker, or one has
            other versions.
    """
    try:
        from distributed import Client
        from distributed.versions import VersionMismatchWarning
    except ImportError as error:
        raise NtkEosError(
            "a Dask scheduler needs the extra `distributed`: pip install '.[distributed]' in the folder of ntk-eos"
        ) from error
    if not re.fullmatch(ADDRESS, address):
        raise InputError(f"scheduler {address!r}: must be an address such as tcp://host:8786")
    # What it would warn of is an error here if it matters.
    warnings.simplefilter("ignore", VersionMismatchWarning)
    with _quiet():
        try:
            client = within(2 * CONNECT_SECONDS, lambda: Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except OSError as error:
            raise NtkEosError(
                f"no Dask scheduler answers at {address}: start one with `dask scheduler`, or correct the address"
            ) from error
        try:
            _wait_for_worker(client, address, worker_seconds)
            check_versions(client, packages)
            yield client
        finally:
            client.close(timeout=CONNECT_SECONDS)


def workers(client: "Client") -> dict[str, Mapping[str, Any]]:
    """What the scheduler knows of each worker, by address: `host`, `nthreads`, `resources` and more.

    Raises:
        NtkEosError: if the scheduler does not answer.
    """
    return _asked(client, lambda: client.scheduler_info(n_workers=-1))["workers"]


def ask_workers(client: "Client", function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What `function` returns on each worker, or the exception that it raises there, without waiting for their tasks.

    A worker that is lost meanwhile is left out.

    Raises:
        NtkEosError: if the scheduler does not answer.
    """
    answers = _asked(client, lambda: client.run(function, *arguments, on_error="return"))
    return {worker: answer for worker, answer in answers.items() if not isinstance(answer, OSError)}


def processing(client: "Client") -> set[str]:
    """Names of the tasks that workers have now, whoever waits for them.

    Raises:
        NtkEosError: if the scheduler does not answer.
    """
    return {key for keys in _asked(client, client.processing).values() for key in keys}


def within(seconds: float, work: Callable[[], Answer]) -> Answer:
    """What `work` returns, unless that takes too long; it is then left alone, in its thread.

    A peer that accepts a connection and says nothing would be waited for without end.

    Raises:
        TimeoutError: after so many seconds.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True, name="asking a Dask scheduler").start()
    return answer.result(seconds)


def _asked(client: "Client", question: Callable[[], Answer]) -> Answer:
    gone = NtkEosError("the Dask scheduler is gone, or does not answer any more")
    try:
        answer = within(ANSWER_SECONDS, question)
    except (OSError, RuntimeError, AttributeError) as error:  # closed, or just being closed
        raise gone from error
    if client.status != "running":  # then the answer was that of an earlier time
        raise gone
    return answer


def _wait_for_worker(client: "Client", address: str, seconds: float) -> None:
    patience = time.monotonic() + seconds
    while not workers(client):
        if time.monotonic() > patience:
            raise NtkEosError(
                f"the scheduler at {address} had no worker for {seconds:.0f} s: start one with `dask worker {address}`"
            )
        time.sleep(0.2)


def versions(packages: Sequence[str]) -> Callable[[], dict[str, str]]:
    """A function that gives the versions where it is called.

    It is defined in here, so that it travels as a whole: a worker may not have this package at all.
    """
    names = tuple(packages)

    def found() -> dict[str, str]:
        import platform
        from importlib import metadata

        there = {"python": platform.python_version()}
        for name in names:
            try:
                there[name] = metadata.version(name).partition("+")[0]  # +cpu, +cu126: one version, other devices
            except metadata.PackageNotFoundError:
                there[name] = "none"
        return there

    return found


def check_versions(client: "Client", packages: Sequence[str]) -> None:
    """Refuse workers with other versions than here.

    Raises:
        NtkEosError: naming the first such worker.
    """
    here = versions(packages)()
    for worker, there in ask_workers(client, versions(packages)).items():
        if isinstance(there, Exception):
            raise NtkEosError(f"worker {worker} cannot say what is installed there: {there!r}") from there
        other = [f"{name} {there[name]} (here {here[name]})" for name in here if there[name] != here[name]]
        if other:
            raise NtkEosError(
                f"worker {worker} has {', '.join(other)}: install the same versions on every worker and here"
            )


def check_reach(client: "Client", folder: Location) -> None:
    """Refuse workers that do not find in a folder of the store what is put there here.

    Raises:
        NtkEosError: naming the first such worker.
    """
    here, key = door(folder), f".tmp-sweep-{uuid.uuid4().hex}"
    here.put(key, b"is it the same store?", durable=False)
    try:
        answers = ask_workers(client, finds, str(folder), key)
    finally:
        here.delete(key)
    for worker, problem in answers.items():
        if problem:
            raise NtkEosError(
                f"worker {worker} does not reach {folder.parent} as it is here ({problem}): give a folder that all "
                "machines share, or the URL of an object store with its credentials in each worker's environment"
            )


async def finds(folder: str, key: str) -> str | None:
    """Why a worker cannot read what was put into a store; None if it can."""
    try:
        await asyncio.wait_for(asyncio.to_thread(door(folder).get, key), ANSWER_SECONDS / 2)
    except NtkEosError as error:
        return str(error)
    except TimeoutError:
        return f"no answer for {ANSWER_SECONDS / 2:.0f} s"
    return None


def go_elsewhere_unless_fit(expected: Mapping[str, str], folder: str) -> None:
    """In a task: leave a worker that came after its command last looked, if it is not like the others.

    When the command looks again, it says what is wrong there.

    Args:
        expected: the versions of the command.
        folder: in the store, which must be there.
    """
    from distributed import Reschedule

    store = door(folder)
    if versions(TRAINING)() != expected or (isinstance(store, Directory) and not store.is_there()):
        time.sleep(LOOK_SECONDS)
        raise Reschedule


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of distributed on stderr: what matters of it becomes an error of ours."""
    loggers = [logging.getLogger(name) for name in ("distributed.client", "distributed.core", "distributed.comm")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
