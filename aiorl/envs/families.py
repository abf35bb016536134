"""Environments of other packages that need something around them before they can be learned from.

Each maker takes gymnasium's record of the id and keyword arguments, which are `env_kwargs`. The wrappers are gymnasium's and
the packages' own.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import wrappers

from aiorl.errors import ConfigError


def atari(
    registration: Any, *, num_envs: int | None = None, raw: bool = False, threads: int = 1, noop_max: int = 30,
    frame_skip: int = 4, screen_size: int = 84, grayscale_obs: bool = True, terminal_on_life_loss: bool = False,
    clip_rewards: bool = False, repeat_action_probability: float = 0.25, full_action_space: bool = False,
    **game: Any,
) -> Any:  # fmt: skip
    """An Atari game: by gymnasium's AtariPreprocessing, or with `num_envs` by ale-py's own vector environment.

    Observations are uint8 [84, 84]; stacking them is left to `frame_stack`. `raw` leaves out all preprocessing, also the
    frame skip: uint8 [210, 160, 3]. `threads` are those of the vector. `game` goes on to ale-py.
    """
    common = {"repeat_action_probability": repeat_action_probability, "full_action_space": full_action_space}
    if num_envs is not None:
        if raw:
            raise ConfigError("raw = true: the vector of ale-py always preprocesses\n  leave out raw, or vector")
        from ale_py.vector_env import AtariVectorEnv

        vector: Any = AtariVectorEnv(
            registration.kwargs["game"], num_envs, num_threads=threads, img_height=screen_size, img_width=screen_size,
            grayscale=grayscale_obs, stack_num=1, frameskip=frame_skip, noop_max=noop_max,
            episodic_life=terminal_on_life_loss, reward_clipping=clip_rewards, use_fire_reset=False, **common, **game,
        )  # fmt: skip
        return _Unstacked(vector)
    env = gymnasium.make(registration, disable_env_checker=True, frameskip=1, **common, **game)
    if not raw:
        env = wrappers.AtariPreprocessing(
            env, noop_max, frame_skip, screen_size, terminal_on_life_loss, grayscale_obs, grayscale_newaxis=False
        )
    return wrappers.ClipReward(env, -1, 1) if clip_rewards else env


class _Unstacked(gymnasium.vector.VectorWrapper[Any, Any, Any]):
    """Without the axis of a stack of one."""

    def __init__(self, env: gymnasium.vector.VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        box: Any = env.single_observation_space
        self.single_observation_space = gymnasium.spaces.Box(box.low[0], box.high[0], dtype=box.dtype)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        seeds: Any = np.array(seed) if isinstance(seed, list) else seed
        obs, info = self.env.reset(seed=seeds, options=options)
        return obs[:, 0], info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, *rest = self.env.step(actions)
        return (obs[:, 0], *rest)  # type: ignore[return-value]


def minatar(registration: Any, **game: Any) -> Any:
    """A MinAtar game: bool [10, 10, channels]. An action never sticks beyond the end of its episode."""
    return _Forgetful(gymnasium.make(registration, disable_env_checker=True, **game))


class _Forgetful(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The game remembers its last action over a reset, so that an episode would depend on the one before it."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        game: Any = self.unwrapped
        game.game.last_action = 0
        return super().reset(seed=seed, options=options)


def minigrid(registration: Any, **game: Any) -> Any:
    """A MiniGrid task as the grid alone, int [7, 7, 3]: object, colour and state of what is seen, none above 10.

    The mission, a text, is left out.
    """
    from minigrid.wrappers import ImgObsWrapper

    env: Any = ImgObsWrapper(gymnasium.make(registration, disable_env_checker=True, **game))
    grid = gymnasium.spaces.Box(0, 10, env.observation_space.shape, np.uint8)
    return wrappers.TransformObservation(env, np.asarray, grid)
