"""What reading from object stores may cost: requests, bytes, memory and patience."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dynams_stream.errors import UsageError


@dataclass(frozen=True)
class RemoteOptions:
    """How one process reads shards that lie in an object store.

    Over-reading a gap between two wanted samples costs gap / bandwidth seconds; a request of its own costs one of the
    `in_flight` places for `latency` seconds, that is latency / in_flight of the whole. So neighbours are asked for
    together over gaps of up to latency · bandwidth / in_flight bytes, unless `gap` says otherwise.

    Attributes:
        in_flight: requests under way at a time; an object store that asks for fewer gets fewer for a while.
        latency: seconds until the first byte of an answer.
        bandwidth: bytes a second that the process can receive in all.
        gap: neighbours are asked for together when at most so many bytes lie between them; None for the largest gap
            that is cheaper to read than to leave out. A large one saves requests where they cost money.
        longest: bytes of one request at most, so that several share the way.
        read_ahead: bytes that are fetched or held ahead of the training loop, in each process.
        timeout: seconds that one request may take.
        deadline: seconds after which a range that could not be had, however often it was tried, is an error.
    """

    in_flight: int = 64
    latency: float = 0.03
    bandwidth: float = 100e6
    gap: int | None = None
    longest: int = 8 << 20
    read_ahead: int = 64 << 20
    timeout: float = 30.0
    deadline: float = 120.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "gap":
                if value is not None and not value >= 0:
                    raise UsageError(f"gap has to be 0 or more bytes, or None; got {value!r}")
            elif not value > 0:
                raise UsageError(f"{field.name} has to be above 0; got {value!r}")

    @property
    def gap_bytes(self) -> int:
        """The largest gap, in bytes, that is read rather than left out."""
        return int(self.latency * self.bandwidth / self.in_flight) if self.gap is None else self.gap
