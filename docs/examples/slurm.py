"""Train a study on SLURM: python slurm.py STUDY ROOT [--dry-run].

Each job is one worker that takes eight runs at a time; `--dry-run` prints its script and submits nothing. The scheduler
lives in this process, so start it where it may run for days: on a login node in tmux, or in a small job of its own.
"""

import argparse
import signal
import subprocess
import sys

from dask_jobqueue import SLURMCluster

JOBS = 4


def main() -> None:
    """Start the workers, train, and end them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("root", help="a folder on the file system of all nodes, or s3://bucket/folder")
    parser.add_argument("--dry-run", action="store_true", help="only print the job script")
    options = parser.parse_args()
    with SLURMCluster(
        queue="cpu",
        account="my-project",
        walltime="12:00:00",
        cores=8,  # runs at a time; with compute.threads = 2 in the study: cores=4, job_cpu=8
        processes=1,
        memory="32GB",
        # Before SLURM kills it a worker lets its runs commit, and leaves; the next job takes its place.
        worker_extra_args=["--lifetime", "700m", "--lifetime-stagger", "10m"],
        scheduler_options={"dashboard_address": ":0"},
    ) as cluster:
        print(cluster.job_script())
        if options.dry_run:
            return
        cluster.adapt(minimum_jobs=1, maximum_jobs=JOBS)
        with cluster.get_client() as client:
            client.wait_for_workers(1)  # as long as the queue takes
        # Ctrl-C is for the command: it lets its runs commit, and then all of this ends.
        signal.signal(signal.SIGINT, lambda *_: None)
        command = ["ntk-eos", "run", options.study, "--out", options.root, "--scheduler", cluster.scheduler_address]
        code = subprocess.run(command).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
