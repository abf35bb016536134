"""What a worker process does: serve credits until told to stop. `Station` does the work; here its groups get their turn.

One after the other, or side by side: then each group has a lane of its own, a thread, or a task where environments are
coroutines or ask for central inference. What a group collects does not depend on it, and a doorbell rings as soon as its
credit is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiorl.envs.checked import at_once
from aiorl.offload import BACKGROUND_NICENESS, OffloadThread
from aiorl.workers.control import Control, Stopped
from aiorl.workers.hold import Rest
from aiorl.workers.questions import Asking
from aiorl.workers.records import READ_BYTES, RECORD_BYTES, Kind, Record, unpack
from aiorl.workers.station import Station, StationSetup

CLOSE_WITHIN_S = 0.3  # lanes that are not closed by then are left in the middle of what they do

Inbox = asyncio.Queue[Record | None]
Ring = Callable[[Record], None]


@dataclass(frozen=True)
class Pipes:
    """A worker's ends of its two pipes, and of the one that all share for being held, as descriptors on their way into the
    process."""

    credits: Any
    doorbell: Any
    hold: Any


def prepare(log_path: str | None) -> None:
    """First thing in a worker process: own log, no interest in the terminal's Ctrl-C, an end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process decides when a worker stops
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was blocked for the start
    os.nice(BACKGROUND_NICENESS)
    log = os.open(log_path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _keep_to_itself()
    faulthandler.enable(2)
    threading.Thread(target=_end_with_parent, name="aiorl-parent-watch", daemon=True).start()


def _keep_to_itself() -> None:
    """What came from the training process, its pipes and shared memory, is not for programs that an environment starts:
    they may outlive the run, and would keep it open. Descriptors that are sent arrive as inheritable ones."""
    from multiprocessing import forkserver, resource_tracker

    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    for fd in (server._forkserver_alive_fd, tracker._fd, *(server._inherited_fds or ())):
        if fd is not None:
            os.set_inheritable(fd, False)


def _end_with_parent() -> None:
    """Wait for the training process to be gone (also by SIGKILL), then end at once. PR_SET_PDEATHSIG would not do: under
    a fork server the parent that started this process is the server."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


async def main(setups: Sequence[StationSetup], pipes: Pipes) -> None:
    """Serve the stations with credits from the pipe until STOP, or until the parent's end of the pipe is closed."""
    credits_fd, doorbell_fd = pipes.credits.detach(), pipes.doorbell.detach()
    loop = asyncio.get_running_loop()
    inbox: Inbox = asyncio.Queue()  # bounded by the credits outstanding

    def receive() -> None:
        data = os.read(credits_fd, READ_BYTES)
        for record in unpack(data):
            if record.kind is Kind.ANSWER:
                asking.answered(record)
            else:
                inbox.put_nowait(record if record.kind is not Kind.STOP else None)
        if len(data) < RECORD_BYTES:
            loop.remove_reader(credits_fd)
            inbox.put_nowait(None)  # no more credits will come, as after STOP

    def ring(record: Record) -> None:
        os.write(doorbell_fd, record.pack())

    asking = Asking(ring, threads=setups[0].stepping == "threads")
    loop.add_reader(credits_fd, receive)
    try:
        places = _places(setups[0])
        rest = Rest(pipes.hold.detach(), ring, blocks=setups[0].stepping == "threads")
        stations = [Station(setup, places, tell=_into_log, ask=asking.ask, standing=rest.wait) for setup in setups]
        if setups[0].has_lanes:
            await _serve_side_by_side(stations, inbox, ring, asking)
        else:
            await _serve_in_turn(stations, inbox, ring)
    except BrokenPipeError:
        pass  # the training process has gone on without this worker
    except BaseException as error:
        Control(setups[0].block, setups[0].groups).put_error(error)  # unless a station has said it better
        ring(Record(Kind.FAILED))
        raise SystemExit(1) from error


def _places(setup: StationSetup) -> threading.Semaphore | asyncio.Semaphore | None:
    """For as many environment steps as may run at the same time."""
    if setup.steps_at_once is None or not (setup.env.coroutines or setup.stepping == "threads"):
        return None
    return (asyncio.Semaphore if setup.env.coroutines else threading.Semaphore)(setup.steps_at_once)


def _into_log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell_ready(stations: Sequence[Station], ring: Ring) -> None:
    for station in stations:
        station.ready()
    ring(Record(Kind.READY, value=os.getpid()))


async def _serve_in_turn(stations: Sequence[Station], inbox: Inbox, ring: Ring) -> None:
    """One credit after the other. Ordinary environments never give the loop a turn."""
    of = {group: station for station in stations for group in station.groups}
    for station in stations:
        await station.open_all()
    _tell_ready(stations, ring)
    with contextlib.suppress(Stopped):
        while (credit := await inbox.get()) is not None:
            ring(await of.get(credit.group, stations[0]).answer(credit))
    for station in stations:
        await station.close_all()


class Lane(NamedTuple):
    """How one group is opened, collects and is closed while others do the same."""

    station: Station
    open: Callable[[], Awaitable[None]]
    collect: Callable[[Record], Awaitable[Record]]
    close: Callable[[], Awaitable[None]]


def _thread_lane(station: Station, group: int) -> Lane:
    """All of it on one thread, for some simulators know only the thread that made them."""
    thread = OffloadThread(f"aiorl-group-{group}")
    return Lane(
        station,
        lambda: thread.run(lambda: at_once(station.open_group(group))),
        lambda credit: thread.run(lambda: at_once(station.collect(credit))),
        lambda: thread.run(lambda: at_once(station.close_group(group))),
    )


def _task_lane(station: Station, group: int) -> Lane:
    return Lane(station, lambda: station.open_group(group), station.collect, lambda: station.close_group(group))


async def _serve_side_by_side(stations: Sequence[Station], inbox: Inbox, ring: Ring, asking: Asking) -> None:
    lanes: dict[int, Lane] = {}
    for station in stations:
        make = _thread_lane if station.threads else _task_lane
        lanes |= {group: make(station, group) for group in station.groups}
    await asyncio.gather(*(lane.open() for lane in lanes.values()))
    _tell_ready(stations, ring)
    queues: dict[int, asyncio.Queue[Record]] = {group: asyncio.Queue() for group in lanes}
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_serve_lane(lane, queues[index], ring)) for index, lane in lanes.items()]
            while (credit := await inbox.get()) is not None:
                queues[credit.group].put_nowait(credit)
            asking.close()
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    await _close(lanes)


async def _serve_lane(lane: Lane, credits: asyncio.Queue[Record], ring: Ring) -> None:
    while True:
        credit = await credits.get()
        try:
            doorbell = await lane.collect(credit)
        except Stopped:
            return
        except Exception as error:
            lane.station.fail(error, credit)
            raise
        ring(doorbell)


async def _close(lanes: Mapping[int, Lane]) -> None:
    """Close every group that can be. One may never be through with its step: then the process ends here."""
    closing = [asyncio.ensure_future(lane.close()) for lane in lanes.values()]
    done, late = await asyncio.wait(closing, timeout=CLOSE_WITHIN_S)
    if late:
        os._exit(0)
    for task in done:
        with contextlib.suppress(Stopped):
            task.result()
