"""How a job learns that it shall stop: SIGTERM becomes an exception of the main thread."""

from __future__ import annotations


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that everything is closed in order.

    A scoring job lets the parts that run finish first, for a while (`pipeline.part_runs`); a second one ends that.
    """
