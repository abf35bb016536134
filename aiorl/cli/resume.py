"""`python -m aiorl resume RUN`: goes on from the newest checkpoint of a run, or from the checkpoint that is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiorl.cli.parse import read_resume
from aiorl.config import Config
from aiorl.errors import CheckpointError, ConfigError
from aiorl.structs import merge


def main(argv: Sequence[str]) -> int:
    request = read_resume(argv)
    if isinstance(request, str):
        print(request, end="")
        return 0
    run, changes, progress = request
    config = prepare(Path(run), changes)
    from aiorl.cli.session import carry_out

    return carry_out(config, progress, resume=Path(run))


def prepare(run: Path, changes: dict[str, Any]) -> Config:
    """The configuration to go on with. Raises ConfigError when there is nothing left to do."""
    from aiorl.checkpoint import load_manifest
    from aiorl.policy import find
    from aiorl.resuming import resumed_config, with_older

    checkpoint = find(run, "latest")
    try:
        manifest = load_manifest(checkpoint)
    except CheckpointError as error:
        raise with_older(error, checkpoint) from None
    if "learner.json" not in manifest.files:
        raise CheckpointError(
            f"{checkpoint} holds a policy, but not what learning goes on from\n"
            f"  resume the run: python -m aiorl resume {checkpoint.parent}"
        )
    config = resumed_config(run, **{name: value for name, value in changes.items() if "." not in name})
    for key, text in changes.items():
        if "." in key:
            config = _with_setting(config, key, text, run)
    done, total = manifest.env_steps, config.total_steps
    if done >= total:
        while total <= done:
            total *= 2
        raise ConfigError(
            f"{run} is finished: its checkpoint has {done:,} env steps, {config.total_steps:,} were asked for\n"
            f"  to train longer, give a larger total: --steps {total}"
        )
    return config


def _with_setting(config: Config, key: str, text: str, run: Path) -> Config:
    """With a setting of its algorithm, "dqn.storage", or of one within that changed. Raises ConfigError."""
    own = config.algorithm.name
    path = key.split(".")
    if path[0] != own:
        raise ConfigError(f"--{key}: {run} was made with {own}\n  its own settings are called --{own}.{path[-1]}")
    table: Any = text
    for name in reversed(path):
        table = {name: table}
    return Config.from_dict(merge(config.to_dict(), table), str(run))
