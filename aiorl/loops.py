"""Three of the four coroutines of a run. Each can be read by itself; `session.py` wires them together.

    collect   grants credits to the workers whenever the pacer allows it
    drain     takes what they deliver, makes up rollouts, hands them on
    train     one update after the other on the learner thread; publishes the new weights

The fourth one evaluates snapshots (`evaluation.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from aiorl.channel import Channel, Gate
from aiorl.faultpoints import fault_point
from aiorl.inference import Inference
from aiorl.learning import Outcome, Trainer
from aiorl.offload import OffloadThread
from aiorl.pacing import Pacer, RolloutPlan
from aiorl.workers.pool import Workers
from aiorl.workers.weights import WeightStore


@dataclass
class Parts:
    """What the coroutines share. All of it belongs to the event loop's thread."""

    pacer: Pacer
    workers: Workers
    weights: WeightStore
    learner_thread: OffloadThread
    trainer: Trainer
    gate: Gate
    rollouts: Channel[RolloutPlan]
    inference: Inference | None = None  # None: the workers compute the network themselves
    waiting_s: dict[str, float] = field(default_factory=lambda: {"train": 0.0})
    updating: bool = False
    waiting_for_gap: int = 0

    def hold(self, held: bool) -> None:
        """Let everybody pause between two environment steps and between two gradient steps, or go on."""
        self.pacer.paused = held
        self.workers.hold(held)
        self._set_brake()
        self.gate.wake()

    def stop(self) -> None:
        """Begin no more updates; one that is under way goes on to its end."""
        self.pacer.stopped = True
        self._set_brake()
        self.gate.wake()

    def _set_brake(self) -> None:
        """In a paused run an update stands in its middle, unless somebody waits for its end."""
        if self.pacer.paused and not self.pacer.stopped and not self.waiting_for_gap:
            self.learner_thread.brake.hold()
        else:
            self.learner_thread.brake.release()

    @contextlib.asynccontextmanager
    async def between_updates(self) -> AsyncIterator[None]:
        """No update is under way, and none begins meanwhile. One that is held goes on to its end first."""
        self.waiting_for_gap += 1  # else the next one may begin at once, and the next
        self._set_brake()
        try:
            await self.gate.wait_for(lambda: not self.updating)
            yield
        finally:
            self.waiting_for_gap -= 1
            self._set_brake()
            self.gate.wake()

    @property
    def may_update(self) -> bool:
        return len(self.rollouts) > 0 and not self.pacer.paused and not self.waiting_for_gap

    @property
    def still(self) -> bool:
        """No environment steps, no update goes on, and none will while all are held. For any thread."""
        learns = self.updating and not self.learner_thread.brake.stands
        return not learns and (not self.pacer.in_flight or self.workers.stands_still())


async def collect(parts: Parts) -> None:
    """Grant every group what the pacer allows, then wait until something has changed."""
    while True:
        grant_credits(parts)
        await parts.gate.wait()


def grant_credits(parts: Parts) -> None:
    """Hand out every credit that the pacer allows now."""
    for group in range(parts.pacer.groups):
        while (grant := parts.pacer.grant(group)) is not None:
            fault_point("credit.before")
            parts.workers.collect(grant, parts.weights.acquire(grant.version))


async def drain(parts: Parts) -> None:
    """Take arrivals, give their weights back, and pass complete rollouts on in order."""
    async for arrival in parts.workers.arrivals:
        fault_point("arrival")
        parts.weights.release(arrival.buffer)
        for plan in parts.pacer.arrived(arrival.group, arrival.slot, arrival.env_steps):
            await parts.rollouts.put(plan)
        parts.gate.wake()


Booked = Callable[[RolloutPlan, Outcome, float], Awaitable[None]]


async def train(parts: Parts, booked: Booked) -> None:
    """Update until the budget is used up or the run is stopped. `booked` is awaited after each update."""
    pacer, gate = parts.pacer, parts.gate
    while True:
        begun = time.perf_counter()
        await gate.wait_for(lambda: pacer.stopped or pacer.finished or parts.may_update)
        if pacer.stopped or pacer.finished:
            return
        waited_s = time.perf_counter() - begun
        parts.waiting_s["train"] += waited_s
        plan = await parts.rollouts.get()
        pacer.begin_update(plan)
        parts.updating = True
        segments = tuple(parts.workers.segment(part.group, part.slot) for part in plan.parts)
        buffer = parts.weights.claim()
        fault_point("update.before")
        outcome = await parts.learner_thread.run(_update_and_write, parts, plan, segments, buffer)
        fault_point("publish.before")
        parts.weights.publish(buffer, pacer.commits + 1)
        fault_point("publish.after")
        pacer.commit()
        parts.weights.retire(pacer.oldest_needed_version)
        grant_credits(parts)  # before the next update competes for the interpreter: the workers wait for this
        await booked(plan, outcome, waited_s)
        parts.updating = False
        gate.wake()


def _update_and_write(parts: Parts, plan: RolloutPlan, segments: tuple[object, ...], buffer: int) -> Outcome:
    """On the learner thread: learn, then copy the new weights into the claimed buffer."""
    outcome = parts.trainer.update(plan, segments)  # type: ignore[arg-type]
    parts.weights.write(buffer, outcome.weights)
    return outcome
