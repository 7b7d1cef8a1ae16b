"""Dask clusters on other machines: batch jobs of SLURM by dask-jobqueue, pods of Kubernetes by dask-kubernetes."""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any

import dask
import yaml
from distributed.deploy import Cluster

from dynams_stream.errors import MissingExtraError, ScoringError, UsageError
from pipeline.cluster_spec import ClusterSpec, KubernetesOptions, SlurmOptions
from pipeline.local_cluster import WORKER_SETTINGS

# The settings of a worker's process, as its environment takes them.
WORKER_ENVIRONMENT = {
    f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
    for key, value in WORKER_SETTINGS.items()
    if ".worker." in key
}


def slurm_cluster(spec: ClusterSpec) -> Cluster:
    """A scheduler in this process that knows how to submit jobs, and has submitted none yet.

    Raises:
        MissingExtraError: dask-jobqueue is not installed.
        UsageError: it refuses the options.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise MissingExtraError("kind 'slurm' needs dask-jobqueue: pip install 'dynams-stream[slurm]'") from error
    dask.config.set(WORKER_SETTINGS)
    try:
        return SLURMCluster(**slurm_arguments(spec.slurm))  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise UsageError(f"dask-jobqueue refuses the table [slurm]: {error}") from error


def slurm_arguments(options: SlurmOptions) -> dict[str, Any]:
    """What `SLURMCluster` is called with.

    Dask's `cores` are threads: one for each process, which scores one part at a time and uses all of its CPU cores for
    it. The CPU cores that a job books are `job_cpu`. The processes of a job share the GPUs that it sees; a job of one
    process has them for itself, so that seeing other jobs' is an error.
    """
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in options if value}
    exported = {
        "DYNAMS_CORES": str(max(1, options.cores // options.processes)),
        "DYNAMS_SHARED_GPUS": str(int(options.processes > 1)),
        **WORKER_ENVIRONMENT,
    }
    return given | {
        "cores": options.processes,
        "job_cpu": options.cores,
        "processes": options.processes,
        "job_script_prologue": [f"export {name}={value}" for name, value in exported.items()]
        + list(options.job_script_prologue),
        "scheduler_options": {"dashboard_address": ":0"} | options.scheduler_options,
    }


def start_slurm(spec: ClusterSpec) -> Cluster:
    """The scheduler, and the jobs of its workers submitted.

    Raises:
        ScoringError: `sbatch` refused a job, or is not there.
    """
    cluster = slurm_cluster(spec)
    try:
        keep_jobs(cluster, spec)
    except Exception as error:
        with suppress(AssertionError):  # closing cancels what was submitted, then complains of what was not
            cluster.close()
        raise ScoringError(f"the batch jobs could not be submitted: {' '.join(str(error).split())}") from error
    return cluster


def keep_jobs(cluster: Cluster, spec: ClusterSpec) -> None:
    """Submit a job for each worker that has none: at first for all, later for those whose jobs ended.

    Raises:
        Exception: what `sbatch` said, when it refused one.
    """

    async def submitted() -> None:
        cluster.scale(spec.workers)
        await cluster  # `scale` alone submits in the background, where what sbatch says is lost

    cluster.sync(submitted)


def start_kubernetes(spec: ClusterSpec) -> Cluster:
    """A `DaskCluster` resource, made and deleted by this process.

    Raises:
        MissingExtraError: dask-kubernetes is not installed.
        UsageError: the manifest is none.
    """
    options = spec.kubernetes
    assert options is not None
    manifest = dask_cluster_manifest(options, spec.workers, uuid.uuid4().hex[:8])
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as error:
        raise MissingExtraError(
            "kind 'kubernetes' needs dask-kubernetes: pip install 'dynams-stream[kubernetes]'"
        ) from error
    given = {name: value for name, value in options if value is not None and name != "manifest"}
    return KubeCluster(custom_cluster_spec=manifest, shutdown_on_close=True, quiet=True, **given)


def dask_cluster_manifest(options: KubernetesOptions, workers: int | None, suffix: str) -> dict[str, Any]:
    """The manifest with the number of workers put in, and a name of its own.

    Two jobs with the same file must not share a cluster: the first one that ends would delete it under the other.

    Args:
        options: names the file.
        workers: the number of worker pods.
        suffix: what is put behind the name.

    Raises:
        UsageError: the file is not one YAML document of a `DaskCluster` with scheduler and workers.
    """
    try:
        manifest = yaml.safe_load(options.manifest.read_text())
        if manifest["kind"] != "DaskCluster":
            raise UsageError(f"{options.manifest}: kind is {manifest['kind']!r}; a DaskCluster is needed")
        name = f"{manifest['metadata']['name']}-{suffix}"
        manifest["metadata"]["name"] = name
        manifest["spec"]["worker"]["replicas"] = workers
        manifest["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] = name
    except yaml.YAMLError as error:
        raise UsageError(f"{options.manifest}: not one YAML document: {error}") from error
    except (KeyError, TypeError) as error:
        raise UsageError(f"{options.manifest}: not a DaskCluster: {error} is missing") from error
    return manifest  # type: ignore[no-any-return]
