"""The examples for SLURM and Kubernetes: what they would submit, and that it does what the page says."""

import os
import re
import shlex
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.store import list_runs

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "cluster.md").read_text()
SLURM = DOCS / "examples" / "slurm.py"
SCRIPTS = Path(sys.executable).parent
# A job that starts at once on this machine: what `sbatch SCRIPT` and `scancel ID` are to dask-jobqueue.
SBATCH = '#!/bin/sh\ncp "$1" job.sh\nsetsid bash job.sh > job.log 2>&1 &\necho "Submitted batch job $!"\n'
SCANCEL = '#!/bin/sh\nfor job; do kill -TERM -- -"$job"; done\n'

# Its import alone would change what SIGINT does in this process.
needs_jobqueue = pytest.mark.skipif(find_spec("dask_jobqueue") is None, reason="the extra `dev` has dask-jobqueue")


@pytest.fixture
def documents() -> dict[tuple[str, str], dict[str, Any]]:
    """The manifests by kind and name."""
    loaded = yaml.safe_load_all((DOCS / "examples" / "kubernetes.yaml").read_text())
    return {(document["kind"], document["metadata"]["name"]): document for document in loaded}


def container(document: dict[str, Any]) -> dict[str, Any]:
    (found,) = document["spec"]["template"]["spec"]["containers"]
    return found


def environment(*first: Path) -> dict[str, str]:
    """With the commands of these folders, and of this Python."""
    return os.environ | {"PATH": os.pathsep.join([*map(str, first), str(SCRIPTS), os.environ["PATH"]])}


# --- SLURM ------------------------------------------------------------------------------------------------------------


@needs_jobqueue
def test_the_slurm_example_prints_a_job_script_that_bash_and_dask_take():
    command = [sys.executable, SLURM, "digits", "/shared/digits", "--dry-run"]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert script.startswith("#!/usr/bin/env bash")
    assert {"#SBATCH -p cpu", "#SBATCH -A my-project", "#SBATCH --cpus-per-task=8", "#SBATCH -t 12:00:00"} <= set(
        script.splitlines()
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (worker,) = (line for line in script.splitlines() if "dask_worker" in line)
    words = shlex.split(worker)
    assert words[words.index("--nthreads") + 1] == "8"
    # Click refuses options that it does not know before it looks at --help.
    done = subprocess.run([*words, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_jobqueue
@pytest.mark.reliability
def test_the_slurm_example_trains_a_study(tmp_path):
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, SLURM, "smoke", tmp_path / "s"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {run.status for run in list_runs(tmp_path / "s")} == {"complete"}


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def test_the_manifests_fit_together(documents):
    assert sorted(documents) == [
        ("Deployment", "dask-scheduler"),
        ("Deployment", "dask-worker"),
        ("Job", "ntk-eos"),
        ("Service", "dask-scheduler"),
    ]
    versions = {"Deployment": "apps/v1", "Service": "v1", "Job": "batch/v1"}
    for (kind, name), document in documents.items():
        assert document["apiVersion"] == versions[kind]
        if kind == "Deployment":
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert document["spec"]["selector"]["matchLabels"] == labels == {"app": name}
    service, scheduler = documents["Service", "dask-scheduler"], documents["Deployment", "dask-scheduler"]
    assert service["spec"]["selector"] == scheduler["spec"]["selector"]["matchLabels"]
    (port,) = service["spec"]["ports"]
    assert [one["containerPort"] for one in container(scheduler)["ports"]] == [port["port"]]
    assert str(port["port"]) in container(scheduler)["command"]
    address = f"tcp://{service['metadata']['name']}:{port['port']}"
    worker, job = documents["Deployment", "dask-worker"], documents["Job", "ntk-eos"]
    assert address in container(worker)["command"]
    assert container(job)["command"][-1] == address
    assert container(worker)["envFrom"] == container(job)["envFrom"], "both reach the store"
    words = container(worker)["command"]
    assert container(worker)["resources"]["limits"]["cpu"] == words[words.index("--nthreads") + 1]


def test_the_page_shows_the_workers_command(documents):
    shown = re.findall(r"^dask worker tcp://dask-scheduler.*$", PAGE, re.MULTILINE)
    assert shown == [shlex.join(container(documents["Deployment", "dask-worker"])["command"])]


@pytest.mark.reliability
def test_the_commands_of_the_manifests_train_a_study(documents, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"8786": port, "tcp://dask-scheduler:8786": f"tcp://127.0.0.1:{port}", "digits": "smoke",
            "s3://my-bucket/digits": str(tmp_path / "s")}  # fmt: skip

    def start(kind: str, name: str, *more: str) -> subprocess.Popen:
        words = [here.get(word, word) for word in container(documents[kind, name])["command"]]
        return subprocess.Popen([*words, *more], env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)

    with start("Deployment", "dask-scheduler") as scheduler, start("Deployment", "dask-worker") as worker:
        try:
            assert start("Job", "ntk-eos", "--set", "stop.steps=5").wait(300) == 0
        finally:
            for process in (worker, scheduler):
                process.terminate()
                assert process.wait(60) == 0
    assert {run.status for run in list_runs(tmp_path / "s")} == {"complete"}


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []
