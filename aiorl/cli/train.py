"""`python -m aiorl train ENV`"""

from __future__ import annotations

from collections.abc import Sequence

from aiorl.cli.parse import read_train


def main(argv: Sequence[str]) -> int:
    request = read_train(argv)
    if isinstance(request, str):
        print(request, end="")
        return 0
    if request.dry_run:
        from aiorl.preflight import check

        print(check(request.config, write=False).config.to_toml(), end="")
        return 0
    from aiorl.cli.session import carry_out

    return carry_out(request.config, request.progress, preset=request.preset)
