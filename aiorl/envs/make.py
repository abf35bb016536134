"""Making environments, and the look at one that settles how a run uses them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from aiorl.envs.contract import CRASHES, crashed
from aiorl.envs.coroutines import AsFunctions, AsyncEnv, is_async
from aiorl.envs.spaces import Bounds, Spaces, bounds_of, spaces_of
from aiorl.envs.spec import EnvSpec
from aiorl.envs.state import StateCapture, reproduces
from aiorl.errors import ConfigError, EnvError

if TYPE_CHECKING:
    import gymnasium


NEXT_STEP, SAME_STEP, DISABLED = "NEXT_STEP", "SAME_STEP", "DISABLED"
STATISTICS = {
    "NormalizeObservation": "normalise_obs instead, whose statistics go with the weights",
    "NormalizeReward": "normalise_rewards or reward_scale instead, which leave returns as they are",
}
"""gymnasium's wrappers that keep statistics over episodes, and what to use."""


def autoreset_mode(env: Any) -> str:
    """When a vector environment resets: "NEXT_STEP", "SAME_STEP" or "DISABLED". Raises EnvError if it does not tell."""
    mode = env.metadata.get("autoreset_mode")
    name = getattr(mode, "name", mode)
    if name not in (NEXT_STEP, SAME_STEP, DISABLED):
        raise EnvError(
            f"the vector environment {type(env.unwrapped).__name__} does not say when it resets: "
            f"autoreset_mode is {mode!r}"
            '\n  set metadata["autoreset_mode"] to a gymnasium.vector.AutoresetMode'
        )
    return name


def make_env(spec: EnvSpec) -> gymnasium.Env[Any, Any]:
    """A new single environment, without gymnasium's own checker. Raises EnvError.

    An async one is made usable like any other; it then needs to be closed.
    """
    made = _stacked(spec, _single(spec, _make(spec, None)))
    return cast("Any", AsFunctions(made)) if is_async(made) else made


def make_async_env(spec: EnvSpec) -> AsyncEnv:
    """A new async environment. Raises EnvError."""
    made = _stacked(spec, _single(spec, _make(spec, None)))
    if not is_async(made):
        raise EnvError(f"{spec.name} made an environment with coroutines when it was looked at, and now one without")
    return made


def _single(spec: EnvSpec, made: Any) -> Any:
    """What was made, if it is a single environment; an async one is freed from what gymnasium.make puts around it."""
    import gymnasium

    if inspect.iscoroutine(made):
        made.close()
        raise EnvError(f"{spec.name} is an `async def`\n  make the environment in a plain function, connect in its reset()")
    if isinstance(made, gymnasium.Wrapper) and is_async(made.unwrapped):
        while type(made).__name__ in ("OrderEnforcing", "PassiveEnvChecker"):
            made = cast("Any", made).env
        if not is_async(made):
            raise EnvError(
                f"{spec.name}: the wrapper {type(made).__name__} cannot be put around an environment with `async def step`\n"
                "  leave it out (max_episode_steps, too), and let the environment do what it does"
            )
    if not _is_env(made) and not is_async(made):
        raise EnvError(f"{spec.name} made a {type(made).__name__}, expected a gymnasium.Env\n  {_advice(made)}")
    return made


def make_vector(spec: EnvSpec, n: int) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """A new vector environment of `n`. Raises EnvError."""
    made = _make(spec, n)
    if not _is_vector(made):
        raise EnvError(f"{spec.name} made a {type(made).__name__}, expected a gymnasium.vector.VectorEnv")
    if made.num_envs != n:
        _close(spec, made)
        raise EnvError(
            f"{spec.name} made a vector of {made.num_envs} environments, expected {n}\n"
            "  let it take the keyword num_envs"
        )
    if spec.stack == 1:
        return made
    from aiorl.envs.stacking import VectorStacked

    return VectorStacked(made, spec.stack, autoreset_mode(made))


def _stacked(spec: EnvSpec, made: Any) -> Any:
    if spec.stack == 1:
        return made
    from aiorl.envs.stacking import stacked

    return stacked(made, spec.stack)


def own_stack(made: Any) -> int:
    """How many observations of its own an environment shows as one, in the way that `frame_stack` does; 1 if none.

    gymnasium's FrameStackObservation does, if it repeats the first one and nothing around it changes observations.
    """
    from gymnasium import wrappers

    harmless = (
        wrappers.OrderEnforcing, wrappers.PassiveEnvChecker, wrappers.RecordEpisodeStatistics, wrappers.TimeLimit,
        wrappers.TransformReward,
    )  # fmt: skip
    while isinstance(made, harmless):
        made = cast("Any", made).env
    if not isinstance(made, wrappers.FrameStackObservation) or made.padding_type != "reset":
        return 1
    return int(made.stack_size)


def _wrappers(made: Any) -> Iterator[tuple[str, Any]]:
    """Those of gymnasium, the outermost first; of a vector of single environments also those of its first one."""
    import gymnasium

    vector = gymnasium.vector.SyncVectorEnv
    while isinstance(made, (gymnasium.Wrapper, gymnasium.vector.VectorWrapper, vector)):
        for kind in type(made).__mro__:
            if kind.__module__.startswith("gymnasium.wrappers."):
                yield kind.__name__, made
        made = cast("Any", made.envs[0] if isinstance(made, vector) else made.env)


def _statistics(made: Any) -> list[str]:
    """Wrappers that keep statistics over episodes, unless these stand still."""
    return sorted({name for name, wrapper in _wrappers(made) if name in STATISTICS and wrapper.update_running_mean})


def _doubts(spec: EnvSpec, made: Any) -> Iterator[str]:
    """What trains, but hardly as it is meant."""
    for name in _statistics(made):
        yield f"the statistics of {name} are each environment's own, and evaluations have others: use {STATISTICS[name]}"
    for name, wrapper in _wrappers(made):
        if name == "FrameStackObservation" and own_stack(made) == 1:
            k = wrapper.stack_size
            yield f"each frame is kept {k} times: use frame_stack = {k} instead of this FrameStackObservation"
    if spec.stack == 1 and getattr(spec.registration, "id", "").startswith("ALE/"):
        yield f"{spec.name} shows single frames, which tell nothing of motion: frame_stack = 4 is usual"


def _make(spec: EnvSpec, n: int | None) -> Any:
    """What the environment's maker returns; `n` asks for a vector."""
    import gymnasium

    try:
        if spec.target is not None:
            target = spec.target if callable(spec.target) else _named(spec.target)
            sized = {} if n is None or "num_envs" not in _parameters(target) else {"num_envs": n}
            about = () if spec.registration is None else (spec.registration,)
            return target(*about, **{**spec.kwargs, **sized})
        if n is None:
            return gymnasium.make(spec.registration, disable_env_checker=True, **spec.kwargs)
        mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
        return gymnasium.make_vec(spec.registration, n, vectorization_mode=mode, **spec.kwargs)
    except CRASHES as error:
        raise crashed(spec.name, "making the environment", error) from error


def _named(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (ValueError, TypeError):
        return {}


def _is_env(made: Any) -> bool:
    import gymnasium

    return isinstance(made, gymnasium.Env)


def _is_vector(made: Any) -> bool:
    import gymnasium

    return isinstance(made, gymnasium.vector.VectorEnv)


def _advice(made: Any) -> str:
    if _is_vector(made):
        return "a vector environment can train, but not stand in for a single one"
    if any(c.__module__.partition(".")[0] == "gym" for c in type(made).__mro__):
        return "it is made for gym, the predecessor of gymnasium: update it, or wrap it with shimmy"
    return "let it be, or return, a subclass of gymnasium.Env, or write reset and step with `async def`"


@dataclass(frozen=True)
class Probe:
    """What making one environment tells.

    `spec` is settled on native or single environments: make groups from it. `why_single` says why a vector
    implementation that exists is not used. `exact`: as far as a look can tell, open episodes can be brought back
    exactly (a single environment shows that when it is done); else `why_inexact`. `state_bytes` is room for the state
    of a native group of the probed size. `bounds` are those of the observations' boxes. `bots` are the scripted players of
    a game for two by name, None where the environment has no word for them. `warnings` say what trains, but hardly as it
    is meant.
    """

    spec: EnvSpec
    spaces: Spaces
    autoreset_mode: str | None = None
    why_single: str = ""
    why_inexact: str = ""
    state_bytes: int = 0
    reward_threshold: float | None = None
    max_episode_steps: int | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict[str, Bounds])
    bots: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        return self.spec.native

    @property
    def exact(self) -> bool:
        return not self.why_inexact


def probe(spec: EnvSpec, group_size: int = 1) -> Probe:
    """Make an environment (and a vector of `group_size` where there is one), read its spaces and close it.

    A vector implementation is used if its spaces are those of the single environment and its state can be captured, or
    if there is no other. Runs the environment's own code, so call it in a thread. Raises ConfigError.
    """
    try:
        single = None if spec.vector_only else _probe_single(spec)
        if single is not None and (single.spec.coroutines or not spec.native):
            return single
        try:
            vector = _probe_vector(spec, group_size)
        except EnvError as error:
            if single is None:
                raise
            return replace(single, why_single=str(error).partition("\n")[0])
        return vector if single is None else _choose(single, vector)
    except EnvError as error:
        raise ConfigError(str(error), detail=error.detail) from error


def _choose(single: Probe, vector: Probe) -> Probe:
    if vector.spaces != single.spaces:
        return replace(single, why_single="the vector implementation has other spaces than the single environment")
    if not vector.exact:
        return replace(single, why_single=vector.why_inexact)
    return replace(
        vector, spec=replace(vector.spec, vector_only=False),
        reward_threshold=single.reward_threshold, max_episode_steps=single.max_episode_steps,
        warnings=tuple(dict.fromkeys((*single.warnings, *vector.warnings))),
    )  # fmt: skip


def _probe_single(spec: EnvSpec) -> Probe | None:
    """None if the maker only makes vector environments."""
    if spec.registration is None and _needs_num_envs(spec):
        return None
    made = _make(spec, None)
    if _is_vector(made):
        _close(spec, made)
        return None
    made = _single(spec, made)
    coroutines = is_async(made)
    try:
        own, made = own_stack(made), _stacked(spec, made)
        if own > 1 and spec.stack > 1:
            raise ConfigError(f"{spec.name} stacks {own} observations already\n  leave out frame_stack = {spec.stack}")
        spaces = _spaces(spec, made, "observation_space", "action_space", max(own, spec.stack))
        known = getattr(made, "spec", None)
        bots = getattr(getattr(made, "unwrapped", made), "bots", None)
        kept, doubts = _statistics(made), tuple(_doubts(spec, made))
    finally:
        _close(spec, AsFunctions(made) if coroutines else made)
    return Probe(
        replace(spec, native=False, coroutines=coroutines), spaces, bounds=bounds_of(made.observation_space, spaces),
        why_single="one is taken if env_kwargs has vector = true" if _may_be_vector(spec) else "",
        warnings=doubts, why_inexact=f"the statistics of {' and '.join(kept)} last over episodes" if kept else "",
        bots=tuple(map(str, cast("Mapping[Any, Any]", bots))) if isinstance(bots, Mapping) else None,
        reward_threshold=getattr(known, "reward_threshold", None),
        max_episode_steps=getattr(known, "max_episode_steps", None),
    )  # fmt: skip


def _may_be_vector(spec: EnvSpec) -> bool:
    """Whether the maker of a family makes vectors, too."""
    return spec.registration is not None and isinstance(spec.target, str) and "num_envs" in _parameters(_named(spec.target))


def _needs_num_envs(spec: EnvSpec) -> bool:
    target = spec.target if callable(spec.target) else _named(cast("str", spec.target))
    parameter = _parameters(target).get("num_envs")
    return parameter is not None and parameter.default is inspect.Parameter.empty and "num_envs" not in spec.kwargs


def _probe_vector(spec: EnvSpec, n: int) -> Probe:
    made = make_vector(spec, n)
    try:
        spaces = _spaces(spec, made, "single_observation_space", "single_action_space", spec.stack)
        mode, doubts = autoreset_mode(made), tuple(_doubts(spec, made))
        known = made.spec
    finally:
        _close(spec, made)
    why_inexact = reproduces(lambda: make_vector(spec, n), spaces, n)
    return Probe(
        replace(spec, native=True, vector_only=True), spaces, autoreset_mode=mode, why_inexact=why_inexact,
        state_bytes=0 if why_inexact else _state_bytes(spec, n),
        bounds=bounds_of(made.single_observation_space, spaces), warnings=doubts,
        reward_threshold=getattr(known, "reward_threshold", None),
        max_episode_steps=getattr(known, "max_episode_steps", None),
    )  # fmt: skip


def _state_bytes(spec: EnvSpec, n: int) -> int:
    """Room for a captured state: numbers and generators take a few bytes more or less from step to step."""
    env = make_vector(spec, n)
    try:
        env.reset(seed=0)
        return len(StateCapture(env).capture()) * 5 // 4 + 4096
    finally:
        _close(spec, env)


def _close(spec: EnvSpec, made: Any) -> None:
    """Close an environment that was only looked at. Raises EnvError."""
    try:
        made.close()
    except CRASHES as error:
        raise crashed(spec.name, "closing it", error) from error


def _spaces(spec: EnvSpec, made: Any, observation: str, action: str, stack: int) -> Spaces:
    try:
        return spaces_of(getattr(made, observation), getattr(made, action)).with_stack(stack)
    except AttributeError as error:
        raise EnvError(f"{spec.name} has no {error.name}\n  set it in __init__") from None
    except ConfigError as error:
        raise ConfigError(f"{spec.name}: {error}") from None

