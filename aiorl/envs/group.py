"""What a group of environments is: it fills segments, and can be brought back to where a cursor says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

from aiorl.envs.aborts import Aborts
from aiorl.envs.coroutines import AsFunctions
from aiorl.envs.cursor import GroupCursor, advance
from aiorl.envs.single import Acting, AsyncGroup, OnStep, SingleGroup
from aiorl.envs.spaces import Spaces
from aiorl.envs.spec import EnvSpec
from aiorl.envs.vector import VectorGroup
from aiorl.segments import Segment

if TYPE_CHECKING:
    from aiorl.algos.base import Policy

__all__ = ["AsyncGroup", "Group", "GroupCursor", "advance", "blocking_group", "make_group"]


class Group(Protocol):
    """A fixed set of environments that act as one batch."""

    envs: range
    """Global indices of its environments."""

    def open(self, cursor: GroupCursor | None, *, strict: bool = True) -> list[str]:
        """Make and reset the environments, or bring back the open episodes of `cursor` exactly.

        Raises EnvError if an environment cannot be made or breaks its contract, ReproductionError if one does not come back
        to where it was. Unless `strict` that one begins its next episode instead, the next segment says that its open
        episode is aborted, and what is returned says how it differed.
        """
        ...

    def collect(
        self, policy: Policy, segment: Segment, steps: int, on_step: Callable[[int], None] | None = None
    ) -> None:
        """Fill rows 0 to `steps` - 1 of `segment`; `policy.begin` has been called. `on_step(t)` follows each row.

        Raises EnvError if an environment raises or breaks its contract, TrainingError if the policy does. The group is
        of no use after an error.
        """
        ...

    async def fill(self, policy: Acting, segment: Segment, steps: int, on_step: OnStep | None = None) -> None:
        """As `collect`, for a policy whose `act` may have to wait."""
        ...

    def close(self) -> None:
        """Close the environments. May be called twice, and before `open`."""
        ...


def make_group(
    spec: EnvSpec, spaces: Spaces, envs: range, seed: int,
    limit: AbstractContextManager[Any] | AbstractAsyncContextManager[Any] | None = None, aborts: Aborts | None = None,
) -> Group | AsyncGroup:  # fmt: skip
    """A group for the global environment indices `envs`, to be opened. `spec` is that of a probe, `seed` the root.

    An AsyncGroup, whose methods are coroutines, where `spec.coroutines`. `limit` is held during each step and reset: with
    `async with` by an AsyncGroup, `with` by the others. `aborts` gives up episodes that are not finite instead of raising; a
    native vector environment cannot do that.
    """
    held: Any = limit
    if spec.coroutines:
        return AsyncGroup(spec, spaces, envs, seed, held, aborts)
    if spec.native:
        return VectorGroup(spec, spaces, envs, seed, held)
    return SingleGroup(spec, spaces, envs, seed, held, aborts)


def blocking_group(spec: EnvSpec, spaces: Spaces, envs: range, seed: int) -> Group:
    """As `make_group`; an AsyncGroup comes with a loop of its own, so that functions can use it. Close it."""
    group = make_group(spec, spaces, envs, seed)
    return cast(Group, AsFunctions(group)) if isinstance(group, AsyncGroup) else group
