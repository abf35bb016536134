"""Finding out that two threads are at work on what belongs to one."""

from __future__ import annotations

from types import TracebackType

from aiorl.errors import InvariantError


class Turn:
    """One caller at a time may be within `with turn.of(…)`; no lock, for there is nobody to wait for."""

    def __init__(self, owner: str) -> None:
        self._owner, self._within = owner, ""
        self._free = [True]  # who is at work holds what is in it

    def of(self, what: str) -> Turn:
        """Take the turn for doing `what`. Raises InvariantError if it is taken."""
        try:
            self._free.pop()  # atomic
        except IndexError:
            raise InvariantError(
                f"{self._owner}: `{what}` was called while another thread is in `{self._within}`\n"
                "  only the learner may, within its update"
            ) from None
        self._within = what
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._free.append(True)
