# pyright: basic, reportMissingImports=false
"""What comparisons of gradient steps with Stable-Baselines3 share: both libraries in one process, on the same batches."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiorl.buffers.batch import Batch
from bench.peers import lineup


def use_sb3(description: str | None) -> None:
    """Read the command line, PEERS_DIR, and make Stable-Baselines3 there importable, behind what is installed here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers_dir", type=Path)
    venv = parser.parse_args().peers_dir / lineup.VENVS["sb3"]
    found = [str(path) for path in venv.glob("lib/python*/site-packages")]
    if not found:
        parser.error(f"no Stable-Baselines3 in {venv}: python -m bench.against_sb3 --setup installs it")
    sys.path += found
    torch.set_num_threads(1)


def samples(given: Batch) -> Any:
    """A batch as Stable-Baselines3 has it."""
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    column = [np.asarray(x, np.float32)[:, None] for x in (given.discounts == 0, given.returns)]
    arrays = (given.obs["obs"], given.action.reshape(len(given.action), -1), given.next_obs["obs"], *column)
    return ReplayBufferSamples(*(torch.from_numpy(x) for x in arrays))
