"""`python -m aiorl resume RUN`: goes on from the newest checkpoint of a run, or from the checkpoint that is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiorl.cli.parse import read_resume
from aiorl.config import Config
from aiorl.errors import CheckpointError, ConfigError


def main(argv: Sequence[str]) -> int:
    request = read_resume(argv)
    if isinstance(request, str):
        print(request, end="")
        return 0
    run, changes, progress = request
    config, checkpoint = prepare(Path(run), changes)
    from aiorl.cli.session import carry_out

    return carry_out(config, progress, resume=checkpoint)


def prepare(run: Path, changes: dict[str, Any]) -> tuple[Config, Path]:
    """The configuration to go on with and the checkpoint. Raises ConfigError when there is nothing left to do."""
    from aiorl.checkpoint import load_manifest
    from aiorl.policy import find
    from aiorl.resuming import resumed_config

    checkpoint = find(run, "latest")
    manifest = load_manifest(checkpoint)
    if "learner.json" not in manifest.files:
        raise CheckpointError(
            f"{checkpoint} holds a policy, but not what learning goes on from\n"
            f"  resume the run: python -m aiorl resume {checkpoint.parent}"
        )
    config = resumed_config(run, **changes)
    if manifest.env_steps >= config.total_steps:
        raise ConfigError(
            f"{run} is finished: its checkpoint has {manifest.env_steps:,} of {config.total_steps:,} env steps\n"
            f"  to train longer, give a larger total: --steps {2 * config.total_steps}"
        )
    return config, checkpoint
