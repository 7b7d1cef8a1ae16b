"""The process that owns a Dask cluster: `python -m pipeline.cluster_process '{"spec": {…}, "device": "cpu"}'`.

Prints one JSON line, the scheduler's address or an error, then lives until its standard input ends, which it does
however the parent ends. So a cluster, its batch jobs and pods included, never outlives the job that it was started for.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

from distributed.deploy import Cluster

from dynams_stream.errors import DynamsError, ScoringError
from pipeline.cluster_spec import ClusterSpec
from pipeline.local_cluster import start_cuda, start_local
from pipeline.remote_cluster import keep_jobs, slurm_cluster, start_kubernetes, start_slurm

logger = logging.getLogger(__name__)

RESUBMIT_SECONDS = 30
"""How often jobs that ended (walltime, a lost node) are replaced."""

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Do what the command line asks for: a cluster, or the script of one of its jobs."""
    request = json.loads(sys.argv[1])
    spec, say = ClusterSpec(**request["spec"]), _answer_line()
    logging.getLogger("tornado.application").setLevel(logging.CRITICAL)  # tracebacks of what is raised here, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if request.get("job_script"):
            with slurm_cluster(spec) as cluster:
                say({"job_script": cluster.job_script()})
        else:
            _own(spec, request["device"], say)
    except DynamsError as error:
        say({"error": type(error).__name__, "message": str(error)})
    except Exception as error:  # noqa: BLE001 - whatever sbatch, Kubernetes or Dask raise; the parent tells it
        message = f"the cluster of kind {spec.kind!r} failed: {type(error).__name__}: {error}"
        say({"error": ScoringError.__name__, "message": message})


def _own(spec: ClusterSpec, device: str, say: Say) -> None:
    """Start the cluster, say where it is, keep it until the parent is done with it."""
    with _start(spec, device) as cluster:
        say({"address": cluster.scheduler_address})
        while not _parent_is_done(RESUBMIT_SECONDS):
            if spec.kind == "slurm":
                try:
                    keep_jobs(cluster, spec)
                except Exception as error:  # noqa: BLE001 - the workers that are left go on
                    logger.warning(f"a job that ended could not be replaced: {' '.join(str(error).split())}")


def _start(spec: ClusterSpec, device: str) -> Cluster:
    if spec.kind == "slurm":
        return start_slurm(spec)
    if spec.kind == "kubernetes":
        return start_kubernetes(spec)
    return start_cuda(spec) if spec.kind == "cuda" else start_local(spec, device)


def _parent_is_done(seconds: float) -> bool:
    """Whether standard input has ended, after waiting for that."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


def _answer_line() -> Say:
    """Writes the one line that the parent reads; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    said: list[dict[str, Any]] = []

    def say(answer: dict[str, Any]) -> None:
        if said:  # the cluster was up: what happened since is no answer to the parent's question
            logger.warning(answer.get("message", answer))
            return
        said.append(answer)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    return say


if __name__ == "__main__":
    main()
