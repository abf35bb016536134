"""`python -m laws_cli train …` is `python -m aiorl train …`, and leaves `laws.txt` in the run directory: which laws the run
broke. It must be a recorded one."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

from aiorl.__main__ import main
from aiorl.session import Session
from aiorl.testing import violations

close = Session._close


async def closed(self: Session, status: str) -> None:
    await close(self, status)
    if self.made is not None:
        broken = [f"{v.law}: {v.what}" for v in violations(cast(Any, SimpleNamespace(_session=self)))]
        (self.made.checked.directory / "laws.txt").write_text("\n".join(broken))


if __name__ == "__main__":
    Session._close = closed  # type: ignore[method-assign]
    sys.exit(main())
