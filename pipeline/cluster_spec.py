"""The file behind `--cluster`: which Dask cluster a job starts for itself, and ends.

    kind = "slurm"
    workers = 8

    [slurm]
    queue = "gpu"
    cores = 8
    memory = "32GB"
    walltime = "04:00:00"
    job_extra_directives = ["--gres=gpu:1"]

The table is named after the kind; its keys are those of the package that starts the cluster (`docs/clusters.md`).
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import pydantic

from dynams_stream.errors import UsageError

Kind = Literal["local", "cuda", "slurm", "kubernetes"]


class _Strict(pydantic.BaseModel):
    """A table that refuses keys it does not know."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class LocalOptions(_Strict):
    """`[local]`: processes on this machine.

    Attributes:
        cores: cores of the machine to use, shared among the workers; by default all that this process may use.
        memory_limit, local_directory: as for `distributed.LocalCluster`.
    """

    cores: int | None = pydantic.Field(None, ge=1)
    memory_limit: str | None = None
    local_directory: str | None = None


class CudaOptions(_Strict):
    """`[cuda]`: one process for each GPU of this machine, bound to the cores near it; as for `LocalCUDACluster`.

    Attributes:
        visible_devices: the GPUs to use, such as "0,1,2,3"; by default all.
        memory_limit, device_memory_limit, local_directory: passed on.
    """

    visible_devices: str | None = None
    memory_limit: str | None = None
    device_memory_limit: str | None = None
    local_directory: str | None = None


class SlurmOptions(_Strict):
    """`[slurm]`: one batch job for each worker (for `processes` workers); as for `dask_jobqueue.SLURMCluster`.

    Attributes:
        cores: CPU cores of a job. Its worker processes share them, one part at a time in each.
        memory: memory of a job, such as "32GB".
        processes: worker processes in a job.
        queue, account, walltime, interface, log_directory, local_directory, python, shebang, job_name, death_timeout,
            job_script_prologue, job_extra_directives, job_directives_skip, worker_extra_args, scheduler_options:
            passed on.
    """

    cores: int = pydantic.Field(ge=1)
    memory: str
    processes: int = pydantic.Field(1, ge=1)
    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    interface: str | None = None
    log_directory: str | None = None
    local_directory: str | None = None
    python: str | None = None
    shebang: str | None = None
    job_name: str | None = None
    death_timeout: int | None = None
    job_script_prologue: tuple[str, ...] = ()
    job_extra_directives: tuple[str, ...] = ()
    job_directives_skip: tuple[str, ...] = ()
    worker_extra_args: tuple[str, ...] = ()
    scheduler_options: dict[str, Any] = {}


class KubernetesOptions(_Strict):
    """`[kubernetes]`: pods of the Dask operator; as for `dask_kubernetes.operator.KubeCluster`.

    Attributes:
        manifest: YAML file of a `DaskCluster` resource, beside this file; `workers` becomes its number of replicas.
        namespace, resource_timeout, port_forward_cluster_ip: passed on.
    """

    manifest: Path
    namespace: str | None = None
    resource_timeout: int | None = None
    port_forward_cluster_ip: bool | None = None


class ClusterSpec(_Strict):
    """A cluster to start.

    Attributes:
        kind: what starts it.
        workers: how many worker processes; on this machine by default one for each core or GPU.
        first_worker_seconds: how long to wait for the first one, and for another when all have gone. The others may
            come later.
        local, cuda, slurm, kubernetes: the options of the kind.
    """

    kind: Kind
    workers: int | None = pydantic.Field(None, ge=1)
    first_worker_seconds: float = pydantic.Field(600, gt=0)
    local: LocalOptions | None = None
    cuda: CudaOptions | None = None
    slurm: SlurmOptions | None = None
    kubernetes: KubernetesOptions | None = None

    @pydantic.model_validator(mode="after")
    def _table_of_its_kind(self) -> ClusterSpec:
        tables = [name for name in ("local", "cuda", "slurm", "kubernetes") if getattr(self, name) is not None]
        if others := [name for name in tables if name != self.kind]:
            raise ValueError(f"kind is {self.kind!r}, but there is a table [{others[0]}]; remove it or change the kind")
        if self.kind in ("slurm", "kubernetes"):
            if self.kind not in tables:
                raise ValueError(f"kind {self.kind!r} needs a table [{self.kind}]")
            if self.workers is None:
                raise ValueError(f"kind {self.kind!r} needs workers = N")
        return self


def read_cluster_spec(path: str | os.PathLike[str]) -> ClusterSpec:
    """Read and check a cluster's description.

    Args:
        path: a TOML file. Paths in it are relative to its folder.

    Raises:
        UsageError: names the file, the key and what is wrong with it.
    """
    file = Path(path)
    try:
        values = tomllib.loads(file.read_text())
        options = values.get("kubernetes")
        if isinstance(options, dict) and isinstance(options.get("manifest"), str):
            options["manifest"] = str((file.parent / options["manifest"]).resolve())
        spec = ClusterSpec(**values)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; docs/clusters.md tells what a cluster's description holds") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: {error}") from error
    except pydantic.ValidationError as error:
        raise UsageError(f"{path}:\n" + "\n".join(f"  {_in_words(item)}" for item in error.errors())) from error
    if spec.kubernetes is not None and not spec.kubernetes.manifest.is_file():
        raise UsageError(f"{path}: kubernetes.manifest: {spec.kubernetes.manifest}: no such file")
    return spec


def _in_words(item: Any) -> str:
    place = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"{place}: no such key; docs/clusters.md lists them"
    return ": ".join(filter(None, [place, item["msg"].removeprefix("Value error, ")]))
