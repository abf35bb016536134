"""Asynchronous reinforcement learning that is exact, bounded and never silently stuck.

Layers. A module imports only lower ones, or its own without a cycle (tests/test_layering.py reads this table):

    errors  events  faultpoints  lazy  seeding  structs
        segments  seals  trees  frames                      records, errors, sources of chance  0
    envs/  buffers/  returns  losses  layers  networks
        acting  convolution  continuous  normalise  pacing
        tuning  ledger  league  tournament                  synchronous: no clock, no loop      1
    algos/  checkpoint                                      one file per algorithm, their files 2
    config  presets  policy  channel  offload
        filelock  alarms  learning  report  record
        degree  metrics/  matches                           what a run is made from             3
    workers/                                                processes and shared memory         4
    resuming  preflight  assembly  checkpointing  loops
        evaluation  inference  watchdog                                checks, set-up, the four coroutines 5
    session  telling  run  replay                           wires and owns everything           6
    __main__  cli/  testing/                                the edge: programs, the test kit    -
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "aiorl.config": ["Config", "EvalSuite"],
    "aiorl.run": ["Result", "Run", "train"],
    "aiorl.policy": ["LoadedPolicy", "load"],
    "aiorl.algos.ppo": ["PPO"],
    "aiorl.algos.dqn": ["DQN"],
    "aiorl.algos.qrdqn": ["QRDQN"],
    "aiorl.algos.sac": ["SAC"],
    "aiorl.algos.selfplay": ["SelfPlay"],
    "aiorl.algos.td3": ["TD3"],
    "aiorl.envs.coroutines": ["AsyncEnv"],
    "aiorl.algos.base": ["Algorithm", "Learner", "LearnerContext", "Policy"],
    "aiorl.errors": [
        "AbandonedError", "AiorlError", "CheckpointError", "ConfigError", "EnvError", "InvariantError", "NonFiniteError",
        "ReproductionError", "TrainingError", "StalledError", "WorkerError",
    ],
    "aiorl.events": [
        "AnyEvent", "CheckpointFailed", "Checkpointed", "DegreeChanged", "EpisodeAborted", "Evaluated",
        "EvaluationSkipped", "Event", "Finished", "Lagged", "Paused", "Progress", "Reevaluated", "Resumed",
        "SettingsChanged", "Stalled", "Standings", "Started", "Status", "Updated", "Warned", "WorkerGivenUp",
        "WorkerRestarted",
    ],
}  # fmt: skip
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "DQN", "PPO", "QRDQN", "SAC", "TD3", "AbandonedError", "AiorlError", "Algorithm", "AnyEvent", "AsyncEnv",
    "CheckpointError", "CheckpointFailed", "Checkpointed", "Config", "ConfigError", "DegreeChanged", "EnvError",
    "EpisodeAborted", "EvalSuite", "Evaluated", "EvaluationSkipped", "Event", "Finished", "InvariantError", "Lagged",
    "Learner", "LearnerContext", "LoadedPolicy", "NonFiniteError", "Paused", "Policy", "Progress", "Reevaluated",
    "ReproductionError", "Result", "Resumed", "Run", "SelfPlay", "SettingsChanged", "Stalled", "StalledError",
    "Standings", "Started", "Status", "TrainingError", "Updated", "Warned", "WorkerError", "WorkerGivenUp",
    "WorkerRestarted", "load", "train",
]  # fmt: skip

if TYPE_CHECKING:
    from aiorl.algos.base import Algorithm, Learner, LearnerContext, Policy
    from aiorl.algos.dqn import DQN
    from aiorl.algos.ppo import PPO
    from aiorl.algos.qrdqn import QRDQN
    from aiorl.algos.sac import SAC
    from aiorl.algos.selfplay import SelfPlay
    from aiorl.algos.td3 import TD3
    from aiorl.config import Config, EvalSuite
    from aiorl.envs.coroutines import AsyncEnv
    from aiorl.errors import (
        AbandonedError,
        AiorlError,
        CheckpointError,
        ConfigError,
        EnvError,
        InvariantError,
        NonFiniteError,
        ReproductionError,
        StalledError,
        TrainingError,
        WorkerError,
    )
    from aiorl.events import (
        AnyEvent,
        Checkpointed,
        CheckpointFailed,
        DegreeChanged,
        EpisodeAborted,
        Evaluated,
        EvaluationSkipped,
        Event,
        Finished,
        Lagged,
        Paused,
        Progress,
        Reevaluated,
        Resumed,
        SettingsChanged,
        Stalled,
        Standings,
        Started,
        Status,
        Updated,
        Warned,
        WorkerGivenUp,
        WorkerRestarted,
    )
    from aiorl.policy import LoadedPolicy, load
    from aiorl.run import Result, Run, train


def __getattr__(name: str) -> Any:
    """Import public names at first use, so that `import aiorl` stays cheap."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'aiorl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
