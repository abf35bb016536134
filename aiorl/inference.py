"""Central inference: the acting network computed here, in batches, for the groups of all workers.

Outputs do not depend on who asks at the same time. A forward pass at another batch size, or of a row at another place,
differs in its last bits; so there is one batch with fixed rows for each group, computed as a whole every time. The rows of
those who have not asked are computed in vain.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiorl.algos.base import Forward
from aiorl.errors import TrainingError
from aiorl.lazy import LazyModule
from aiorl.offload import OffloadThread, set_torch_threads
from aiorl.segments import Array
from aiorl.workers.pool import ProcessWorkers
from aiorl.workers.questions import Question, Questions

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

Arrays = Callable[[int], Mapping[str, Array]]
"""The weights in a held buffer (see `WeightStore.arrays`)."""


class Network:
    """The one batch and the versions of the weights. Use it on one thread.

    `keep` is how many versions may act at the same time, `threads` the number of torch's for this thread.
    """

    def __init__(
        self, forward: Forward, groups: int, group_size: int, arrays: Arrays, keep: int, device: str, threads: int
    ) -> None:
        self._forward, self._arrays, self._keep, self._device = forward, arrays, keep, device
        self._groups, self._group_size, self._threads = groups, group_size, threads
        self._weights: dict[int, dict[str, torch.Tensor]] = {}  # by version
        self._batch: torch.Tensor | None = None

    def compute(self, questions: Sequence[Question]) -> list[Array]:
        """The outputs [N, K] that each question asks for. Raises TrainingError."""
        batch, size = self._get_batch(), self._group_size
        host = batch.numpy()
        for asked in questions:
            host[asked.record.group * size :][:size] = asked.features
        found = {version: self._apply(version, questions, batch) for version in {q.version for q in questions}}
        return [found[asked.version][asked.record.group * size :][:size] for asked in questions]

    def _get_batch(self) -> torch.Tensor:
        if self._batch is None:
            if torch.get_num_threads() != self._threads:
                set_torch_threads(self._threads)
            shape = self._groups * self._group_size, self._forward.features
            self._batch = torch.zeros(shape, pin_memory=self._device != "cpu")
        return self._batch

    def _apply(self, version: int, questions: Sequence[Question], batch: torch.Tensor) -> Array:
        """The outputs of the whole batch by one version."""
        try:
            with torch.no_grad():
                weights = self._load(version, next(q.record.buffer for q in questions if q.version == version))
                outputs = self._forward.apply(weights, batch.to(self._device))
                found = outputs.cpu().numpy()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise TrainingError(f"central inference with version {version} failed: {reason}") from error
        expected = len(batch), self._forward.outputs
        if found.shape != expected or found.dtype.name != "float32":
            raise TrainingError(
                f"central inference: forward().apply returned {list(found.shape)} {found.dtype}, expected {list(expected)} "
                "float32"
            )
        return found

    def _load(self, version: int, buffer: int) -> dict[str, torch.Tensor]:
        """A version's weights on the device; on the CPU they are where they are. The question's credit holds the buffer."""
        if version not in self._weights:
            if len(self._weights) == self._keep:
                del self._weights[min(self._weights)]
            arrays = self._arrays(buffer)
            self._weights[version] = {name: torch.from_numpy(a).to(self._device) for name, a in arrays.items()}
        return self._weights[version]

    def close(self) -> None:
        """Let go of all weights."""
        self._weights.clear()


@dataclass
class InferenceBooks:
    """What was computed; `wait_s` is the sum over all questions of the time until they were answered."""

    forwards: int = 0
    questions: int = 0
    wait_s: float = 0.0
    idle_s: float = 0.0  # without a question, or waiting for more

    def summary(self) -> dict[str, float]:
        mean = self.questions / max(1, self.forwards)
        wait_ms = 1e3 * self.wait_s / max(1, self.questions)
        return {
            "forwards": self.forwards, "questions_per_forward": round(mean, 3), "answered_in_ms": round(wait_ms, 3),
        }  # fmt: skip


class Inference:
    """Answers what the workers ask, on a thread of its own: as soon as all groups that collect have asked, or `wait_s` after
    the first question."""

    def __init__(self, network: Network, workers: ProcessWorkers, thread: OffloadThread, wait_s: float) -> None:
        self.books = InferenceBooks()
        self._network, self._workers, self._thread, self._wait_s = network, workers, thread, wait_s
        self._computing = 0

    async def run(self) -> None:
        """Until cancelled. Raises TrainingError."""
        loop, questions = asyncio.get_running_loop(), self._workers.questions
        while True:
            begun_s = loop.time()
            await self._gather(questions)
            self.books.idle_s += loop.time() - begun_s
            asked = questions.take()
            self._computing = len(asked)
            answers = await self._thread.run(self._network.compute, asked)
            self._computing = 0
            for question, outputs in zip(asked, answers, strict=True):
                self._workers.answer(question, outputs)
            now_s = loop.time()
            self.books.forwards += len({question.version for question in asked})
            self.books.questions += len(asked)
            self.books.wait_s += sum(now_s - question.heard_s for question in asked)

    async def _gather(self, questions: Questions) -> None:
        """Return when it is time to compute what has been asked."""
        await questions.gate.wait_for(lambda: len(questions) > 0)
        if not questions.all_asked():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(questions.first_s + self._wait_s):
                    await questions.gate.wait_for(questions.all_asked)

    def describe(self) -> tuple[str, int | None]:
        """What it does, and the thread that does it; for any thread."""
        questions = self._workers.questions
        if self._computing:
            return f"computes the outputs of {self._computing} groups", self._thread.ident
        return f"waits for questions; {len(questions)} of {questions.collecting} groups have asked", None

    async def aclose(self, timeout_s: float) -> None:
        """End the thread, as far as it will, and let go of the weights. Nobody may be in `run` any more."""
        await self._thread.aclose(timeout_s)
        self._network.close()
