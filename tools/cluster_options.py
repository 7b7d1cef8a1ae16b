"""The options that say which Dask cluster works, shared by the commands that use one."""

from __future__ import annotations

from typing import Annotated

import typer

from dynams_stream.errors import UsageError

SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", help="Address of a running Dask scheduler, tcp://host:8786.")
]
SchedulerFileOption = Annotated[
    str | None, typer.Option("--scheduler-file", help="Its scheduler file (.json), waited for for a minute.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", help="Cluster to start (.toml): SLURM, Kubernetes, GPUs; see docs/clusters.md."),
]


def scheduler_source(scheduler: str | None, scheduler_file: str | None, cluster: str | None) -> str | None:
    """Where the scheduler comes from, as `pipeline.cluster.dask_client` takes it; None for a local cluster.

    Raises:
        UsageError: more than one was named, or a file that is not of its kind.
    """
    given = {"--scheduler": scheduler, "--scheduler-file": scheduler_file, "--cluster": cluster}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other; keep the one that says where the scheduler is")
    if scheduler is not None and scheduler.endswith((".json", ".toml")):
        flag = "--scheduler-file" if scheduler.endswith(".json") else "--cluster"
        raise UsageError(f"--scheduler takes an address such as tcp://host:8786; for this file use {flag} {scheduler}")
    if scheduler_file is not None and not scheduler_file.endswith(".json"):
        raise UsageError(f"--scheduler-file {scheduler_file}: the name of a scheduler file ends in .json")
    if cluster is not None and not cluster.endswith(".toml"):
        raise UsageError(f"--cluster {cluster}: the name of a cluster's description ends in .toml")
    return scheduler or scheduler_file or cluster
