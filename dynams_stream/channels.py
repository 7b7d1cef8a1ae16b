"""Where a model's channels lie in each value of its forward code, and where operations move them.

A slim network keeps the leading channels of each layer. `Channels` says which dimension of a tensor holds them and how
many of them stay; its methods are the operations that move that dimension. They raise `ChannelsLostError`, whose
message is the reason, when what stays would no longer be the leading part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import EllipsisType
from typing import Any

Blocks = tuple[tuple[int, int], ...]
"""Runs of channels as (how many the model has, how many leading ones of them stay)."""


class ChannelsLostError(Exception):
    """The channels cannot be followed through an operation; the message is the reason."""


class Other(Enum):
    """Values that hold no hidden channels."""

    TENSOR = auto()  # of the same size in the model and the slim network: the input, the head's output, buffers
    SHAPE = auto()  # x.shape
    BATCH = auto()  # x.size(0)
    NUMBER = auto()  # any other size


@dataclass(frozen=True)
class Weight:
    """A parameter that forward uses itself, not through a layer.

    Attributes:
        owner, name: the module that holds it, and its name there.
        shape: its shape, or that of a view of it in which the same dimensions mean the same.
    """

    owner: str
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Outputs:
    """What a layer returns that has several outputs."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Channels:
    """A tensor whose dimension `axis`, of `rank`, holds hidden channels: of each block the leading ones stay.

    Once flattened, that dimension holds each channel's values in turn.
    """

    blocks: Blocks
    axis: int
    rank: int
    flattened: bool = False

    @property
    def full(self) -> int:
        """Channels of the model."""
        return sum(full for full, _ in self.blocks)

    @property
    def slim(self) -> int:
        """Channels of the slim network."""
        return sum(slim for _, slim in self.blocks)

    @property
    def is_last(self) -> bool:
        """Whether the channels are the last dimension."""
        return self.axis == self.rank - 1

    def __str__(self) -> str:
        return f"{self.full} channels ({self.slim} slim)"

    def is_image(self, spatial: int) -> bool:
        """Whether it is (batch, channels, `spatial` dimensions)."""
        return self.axis == 1 and self.rank == 2 + spatial

    def times(self, values: int) -> Blocks:
        """The blocks of a dimension that holds `values` entries for each channel."""
        return tuple((full * values, slim * values) for full, slim in self.blocks)

    def dimension(self, dim: Any) -> int:
        """A dimension counted from the front."""
        if not isinstance(dim, int) or not -self.rank <= dim < self.rank:
            raise ChannelsLostError(f"dimension {dim} of a tensor of {self.rank} dimensions cannot be followed")
        return dim % self.rank

    # -- operations

    def permuted(self, dims: Sequence[Any]) -> Channels:
        """The tensor whose dimension i is this one's dims[i]."""
        order = [self.dimension(dim) for dim in dims]
        if sorted(order) != list(range(self.rank)):
            raise ChannelsLostError(f"it orders {len(dims)} dimensions of {self.rank}")
        return replace(self, axis=order.index(self.axis))

    def swapped(self, first: Any, second: Any) -> Channels:
        """Two dimensions swapped."""
        order = list(range(self.rank))
        one, other = self.dimension(first), self.dimension(second)
        order[one], order[other] = order[other], order[one]
        return self.permuted(order)

    def flatten(self, start: Any, end: Any) -> Channels:
        """Dimensions start … end made one."""
        first, last = self.dimension(start), self.dimension(end)
        merged = last - first
        if merged <= 0:
            return self
        if self.axis == first and not self.flattened:
            return replace(self, rank=self.rank - merged, flattened=True)
        if first <= self.axis <= last:
            raise ChannelsLostError(
                "only flattening from dimension 1, or of spatial dimensions alone, keeps a channel's values together"
            )
        return replace(self, rank=self.rank - merged, axis=self.axis - (merged if last < self.axis else 0))

    def without(self, dims: Sequence[Any], *, kept: bool) -> Channels:
        """Dimensions reduced away (`kept`: to size 1)."""
        if not dims or not all(isinstance(dim, int) for dim in dims):
            raise ChannelsLostError("it reduces over all dimensions; name the spatial ones with dim=…")
        dropped = {self.dimension(dim) for dim in dims}
        if dropped & {0, self.axis}:
            raise ChannelsLostError(f"it reduces over dimensions {tuple(dims)}, not over spatial ones alone")
        if kept:
            return self
        before = sum(dim < self.axis for dim in dropped)
        return replace(self, rank=self.rank - len(dropped), axis=self.axis - before)

    def indexed(self, index: Any) -> Channels:
        """`x[index]`: whole channels of some positions."""
        items = list(index) if isinstance(index, tuple) else [index]
        if any(item is None or not isinstance(item, int | slice | EllipsisType) for item in items):
            raise ChannelsLostError("only indexing by whole numbers and slices can be followed")
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = [slice(None)] * (self.rank - len(items) + 1)
        items += [slice(None)] * (self.rank - len(items))
        if items[self.axis] != slice(None):
            raise ChannelsLostError("it takes some channels and leaves others")
        dropped = [dim for dim, item in enumerate(items) if isinstance(item, int)]
        return self.without(dropped, kept=False) if dropped else self

    def beside(self, others: Sequence[Channels], dim: Any) -> Channels:
        """This tensor and others concatenated along a dimension."""
        if any((other.axis, other.rank) != (self.axis, self.rank) or other.flattened for other in (self, *others)):
            raise ChannelsLostError(
                f"it puts {', '.join(map(str, (self, *others)))} of different dimensions side by side"
            )
        if self.dimension(dim) == self.axis:
            return replace(self, blocks=tuple(block for one in (self, *others) for block in one.blocks))
        if any(other.blocks != self.blocks for other in others):
            raise ChannelsLostError(f"its operands differ: {', '.join(map(str, (self, *others)))}")
        return self


Value = Channels | Weight | Outputs | Other
