"""How many cores there are to use."""

from __future__ import annotations

from dask.system import cpu_count


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has in a container or a batch job.

    The least of its CPU affinity and of the quota of its control group, as Dask tells it.
    """
    return cpu_count()
