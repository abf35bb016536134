"""Whether this machine can carry a training: what there is, what is missing, what will be slow."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aiorl.config import usable_cores
from aiorl.testing.child import Child, tell
from aiorl.testing.findings import Finding, error, info, sort, warning
from aiorl.workers.launch import Launcher
from aiorl.workers.memory import SharedBlock, available_bytes

PACKAGES = ("torch", "numpy", "gymnasium", "aiomultiprocess", "msgspec", "safetensors", "uvloop")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK = 2 * GIB, 2 * GIB
SLOW_START_S, SLOW_DISK_S = 3.0, 1.0
PATIENCE_S = 60.0
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def check_machine(directory: str | Path = "runs") -> list[Finding]:
    """Look at this machine as a run would find it; `directory` is where runs go. Takes some seconds, most for torch."""
    found: list[Finding] = []
    for check in (_python, _packages, _device, _cores, _threads, _memory, _descriptors, _clock, _processes):
        found += _guarded(check)
    return sort([*found, *_guarded(lambda: _disk(Path(directory)))])


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as failure:
        name = getattr(check, "__name__", "disk").strip("_<>")
        return [error(name, f"could not be looked at: {type(failure).__name__}: {failure}")]


def _python() -> Iterator[Finding]:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform == "win32":
        yield error("python", f"{text}", "workers need POSIX: use WSL")
    elif sys.platform != "linux":
        yield warning("python", f"{text}", "only Linux is tested")
    else:
        yield info("python", text)


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in PACKAGES}
    yield info("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    if missing := [name for name, version in versions.items() if version is None]:
        yield error("packages", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield info(
            "device", f"CUDA: {torch.cuda.get_device_name(0)}; small networks are often faster with --device cpu"
        )
    elif torch.version.cuda is not None:
        yield info(
            "device", f"torch is built for CUDA {torch.version.cuda} but finds no device: the learner uses the CPU"
        )
    else:
        yield info("device", "torch is built for the CPU alone")


def _cores() -> Iterator[Finding]:
    cores, quota = usable_cores(), _cpu_quota()
    if quota is not None and quota < cores:
        yield warning(
            "cores",
            f"{cores} cores can be seen, but the control group allows the time of {quota:g}: processes will be held up",
            f"use --workers {max(1, int(quota))}, or raise the limit of the container",
        )
    elif cores == 1:
        yield warning(
            "cores", "one core: acting and learning take turns, so asynchrony gains little", "use --workers 0 or 1"
        )
    else:
        yield info("cores", f"{cores} cores for this process; --workers auto uses them all")
    load = os.getloadavg()[0]
    if load > 2 * cores:
        yield warning(
            "load",
            f"the load is {load:.1f} on {cores} cores: others compute here, and times will vary",
            "use fewer workers",
        )


def _cpu_quota() -> float | None:
    """Cores' worth of time that the control group allows, None for no limit."""
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _threads() -> Iterator[Finding]:
    given = {name: os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name, "1") != "1"}
    if given:
        settings = ", ".join(f"{name}={value}" for name, value in given.items())
        yield warning(
            "threads",
            f"{settings}: with --workers 0 acting may round differently from workers, which always use 1",
            "unset it, or set 1",
        )
    else:
        yield info("threads", "BLAS uses one thread where it acts, as it must; the learner's are --torch-threads")


def _memory() -> Iterator[Finding]:
    available = available_bytes()
    if available is None:
        yield info("memory", "this platform does not say how much memory is free; set --memory-gb")
    elif available < LITTLE_MEMORY:
        yield warning(
            "memory",
            f"{available / GIB:.1f} GiB of memory are free; each worker takes about 0.1",
            "use fewer workers and environments",
        )
    else:
        yield info("memory", f"{available / GIB:.1f} GiB of memory are free")
    block = SharedBlock(1 << 20)
    block.buffer[-1] = 1
    block.close()
    kind = "anonymous memory" if hasattr(os, "memfd_create") else "unlinked temporary files"
    yield info("shared-memory", f"shared through {kind}: the size of /dev/shm does not matter")


def _descriptors() -> Iterator[Finding]:
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 8 * (usable_cores() + 1) + 64
    if need > soft:
        yield error(
            "open-files",
            f"at most {soft} open files, a run with all cores needs about {need}",
            f"ulimit -n {need} (up to {hard})",
        )
    else:
        yield info("open-files", f"up to {soft:,} open files; a run with all cores needs about {need}")


def _clock() -> Iterator[Finding]:
    resolution = time.get_clock_info("monotonic").resolution
    if resolution > 1e-3:
        yield warning("clock", f"the clock only moves every {resolution * 1e3:g} ms: measured times are coarse")
    else:
        yield info("clock", f"monotonic, in steps of {resolution * 1e9:g} ns")


async def greet(fd: int, output: str) -> None:
    """Program of a worker that is only to come up."""
    tell(fd, here=True)


def _processes() -> Iterator[Finding]:
    launcher = Launcher()
    try:
        with tempfile.TemporaryDirectory(prefix="aiorl-check-") as directory:
            times = [_start_one(launcher, Path(directory)) for _ in range(2)]
    except TimeoutError:
        yield error(
            "workers",
            f"a worker process did not come up within {PATIENCE_S:g} s",
            "look for a security module or a stuck disk",
        )
        return
    finally:
        launcher.close()
    text = f"the first worker is up after {times[0]:.2f} s, each further one after {times[1] * 1e3:.0f} ms"
    if times[0] > SLOW_START_S:
        yield warning("workers", f"{text}", "imports are slow: is Python on a network disk? A local one helps")
    else:
        yield info("workers", text)


def _start_one(launcher: Launcher, directory: Path) -> float:
    begun = time.perf_counter()
    with Child(launcher, greet, directory) as child:
        if not list(child.messages(PATIENCE_S)):
            raise RuntimeError(f"a worker process ended {child.how_it_ended()}: {child.last_words()}")
        return time.perf_counter() - begun


def _disk(directory: Path) -> Iterator[Finding]:
    place = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    begun = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        yield error(
            "run-directory", f"{directory} cannot be written: {failure.strerror}", "run elsewhere, or give --out"
        )
        return
    took_s, free = time.perf_counter() - begun, shutil.disk_usage(place).free
    text = f"{directory} can be written; 1 MiB is safe after {took_s * 1e3:.0f} ms, {free / GIB:.1f} GiB are free"
    if free < LITTLE_DISK:
        yield warning(
            "run-directory", f"{text}", "make room: a run whose disk is full goes on, but its checkpoints fail"
        )
    elif took_s > SLOW_DISK_S:
        yield warning("run-directory", f"{text}", "checkpoints will be slow: give --out on a local disk")
    else:
        yield info("run-directory", text)
