"""The channels of a grouped operator: which groups a part of the result's channels lies in."""

from __future__ import annotations

from dataclasses import dataclass

from passes.tile_rules.base import Part, Untileable


@dataclass(frozen=True)
class GroupRange:
    """The groups [first, last) that hold the channels [start, stop) of the result, `per_group` to a group, `groups` in all."""

    first: int
    last: int
    start: int
    stop: int
    per_group: int
    groups: int

    @property
    def single(self) -> bool:
        """All in one group: no other channel of the result need be computed."""
        return self.last - self.first == 1

    @property
    def computed(self) -> tuple[int, int]:
        """The channels of the result that are computed: those wanted, or where they lie in several groups all of these."""
        return (self.start, self.stop) if self.single else (self.first * self.per_group, self.last * self.per_group)

    def inputs(self, dim: int, per_group: int) -> Part | None:
        """The channels that these groups read, `per_group` to a group, as a part of dimension `dim`; None: all."""
        if self.last - self.first == self.groups:
            return None
        return Part(dim, self.first * per_group, self.last * per_group)


def group_range(part: Part, per_group: int, groups: int) -> GroupRange:
    """The groups that a part of the result's channels lies in.

    Raises:
        Untileable: the part is smaller than the result and yet lies in all of several groups, all of which it would compute.
    """
    first, last = part.start // per_group, -(-part.stop // per_group)
    found = GroupRange(first, last, part.start, part.stop, per_group, groups)
    if groups > 1 and last - first == groups and part.size < per_group * groups:
        raise Untileable(f"cannot compute channels {part.start} to {part.stop} without all of its {groups} groups")
    return found
