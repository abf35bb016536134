"""Which environment a run uses: found and checked without making it, and sent to workers by name."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from aiorl.envs.contract import CRASHES, crashed
from aiorl.errors import ConfigError

# Where an environment's own package is an extra of aiorl: module prefix of its entry point -> (module it needs, extra).
_NEEDS = {
    "gymnasium.envs.box2d": ("Box2D", "box2d"),
    "gymnasium.envs.mujoco": ("mujoco", "mujoco"),
    "aiorl.envs.hockey": ("Box2D", "hockey"),
}
_EXTRAS = {
    "Box2D": "box2d", "mujoco": "mujoco", "ale_py": "atari", "cv2": "atari", "minatar": "minatar", "minigrid": "minigrid",
    "pygame": "classic-control",
}  # fmt: skip
_LICENCES = {"atari": "ale-py is GPL-2.0", "minatar": "MinAtar is GPL-3.0"}


class _Family(NamedTuple):
    """Ids that appear once `needs[0]` is imported or `register` called; `maker` (see `families`) makes what they name."""

    extra: str
    needs: tuple[str, ...]
    register: str = ""
    maker: str = ""


_FAMILIES = {  # by how the ids begin
    "ALE/": _Family("atari", ("ale_py", "cv2"), maker="aiorl.envs.families:atari"),
    "MinAtar/": _Family("minatar", ("minatar",), "minatar.gym:register_envs", "aiorl.envs.families:minatar"),
    "MiniGrid-": _Family("minigrid", ("minigrid",), maker="aiorl.envs.families:minigrid"),
    "BabyAI-": _Family("minigrid", ("minigrid",), maker="aiorl.envs.families:minigrid"),
    "aiorl/": _Family("hockey", ("aiorl.envs.hockey",)),
}
# How entry points begin whose modules may be imported before a fork. Not MuJoCo's: with MUJOCO_GL=egl it starts a thread.
_FORKABLE = (
    "gymnasium.envs.classic_control", "gymnasium.envs.toy_text", "gymnasium.envs.box2d", "ale_py", "minatar", "minigrid",
    "aiorl.envs",
)  # fmt: skip
_OWN = {"hockey": "aiorl/Hockey-v0"}  # short names of aiorl's own environments


@dataclass(frozen=True)
class EnvSpec:
    """A resolved environment. Pickled into workers, which need nothing else to make it.

    `name` is what `config.toml` records. `registration` is gymnasium's record for a registered id; otherwise `target`
    is `module:callable`, or the callable itself where everything runs in one process. With both, `target` is a maker of
    `aiorl.envs.families`. `native`: groups use a vector environment. `vector_only`: there is no single environment.
    `coroutines`: it is an `AsyncEnv`; known to a probe only. `stack` observations are shown as one.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    target: str | Callable[..., Any] | None = None
    registration: Any = None
    native: bool = False
    vector_only: bool = False
    coroutines: bool = False
    stack: int = 1

    @property
    def modules(self) -> tuple[str, ...]:
        """What making it imports and a process can import before it forks: of aiorl and packages that it knows.

        None of a user's own: what starts threads or opens devices when it is imported would not survive a fork.
        """
        entry = getattr(self.registration, "entry_point", None)
        if not isinstance(entry, str) or not entry.replace(":", ".").startswith(tuple(f"{name}." for name in _FORKABLE)):
            return ()
        family = next((family for prefix, family in _FAMILIES.items() if self.registration.id.startswith(prefix)), None)
        own = () if family is None else (*family.needs, family.maker)
        return tuple(dict.fromkeys(name.partition(":")[0] for name in (*own, entry) if name))

    def with_kwargs(self, **kwargs: Any) -> EnvSpec:
        """The same environment with other keyword arguments on top, e.g. `render_mode="rgb_array"`."""
        return replace(self, kwargs={**self.kwargs, **kwargs})


def resolve_env(
    env: str | Callable[..., Any], kwargs: Mapping[str, Any] | None = None, *, in_process: bool, native: bool = True,
    frame_stack: int = 1,
) -> EnvSpec:  # fmt: skip
    """Find an environment: a gymnasium id, `module:callable`, `module:EnvId`, or a callable.

    `in_process`: the environments run in this process, so any callable will do; workers need one that they can import.
    `native`: use an environment's own vector implementation if it has one. Raises ConfigError, before anything is made.
    """
    return replace(_find(env, dict(kwargs or {}), in_process, native), stack=frame_stack)


def _find(env: str | Callable[..., Any], kwargs: dict[str, Any], in_process: bool, native: bool) -> EnvSpec:
    if not isinstance(env, str):
        if not callable(env):
            raise ConfigError(f"env = {env!r} is a {type(env).__name__}\n  {_FORMS}")
        return _from_callable(env, kwargs, in_process, native)
    env = full_id(env)
    if ":" in env:
        module, _, attribute = env.partition(":")
        found = _import(module, env)
        if not _is_registered(attribute):
            return _from_name(env, found, attribute, kwargs, native)
    return _from_id(env, kwargs, in_process, native)


def full_id(env: str) -> str:
    """The id that a short name stands for; any other name as it is."""
    return _OWN.get(env, env)


_FORMS = 'give a gymnasium id ("CartPole-v1"), "module:callable", or a callable that makes an environment'


# --- gymnasium ids ----------------------------------------------------------------------------------------------------


def _is_registered(name: str) -> bool:
    import gymnasium

    return name in gymnasium.registry


def _from_id(env: str, kwargs: dict[str, Any], in_process: bool, native: bool) -> EnvSpec:
    import gymnasium

    name = env.rpartition(":")[2]
    prefix = next((prefix for prefix in _FAMILIES if name.startswith(prefix)), "")
    family = _FAMILIES.get(prefix)
    if family is not None:
        _register(env, prefix, family)
    registration = gymnasium.registry.get(name)
    if registration is None or (name == env and _superseded(registration)):
        raise ConfigError(_unknown_id(env))
    _check_packages(env, registration)
    entry, vector_entry = registration.entry_point, registration.vector_entry_point
    known = {"max_episode_steps", "render_mode"}
    if family is not None and family.maker and entry is not None:
        own = inspect.signature(_load(env, family.maker)).parameters
        known |= own.keys() - {"registration", "num_envs"}
        # A vector is used if it is asked for: it does not show just what the wrappers around a single environment do.
        wants_vector = "num_envs" in own and bool(kwargs.pop("vector", False)) and native
        _check_kwargs(env, _load(env, entry), {**registration.kwargs, **kwargs}, known)
        return EnvSpec(env, kwargs, family.maker, registration, native=wants_vector, vector_only=wants_vector)
    if entry is not None:
        _check_kwargs(env, _load(env, entry), {**registration.kwargs, **kwargs}, known)
    for target in (entry, vector_entry):
        if callable(target) and not in_process:
            _check_importable(target, f"{env}, registered as ")
    limit = kwargs.get("max_episode_steps", 1)
    counts = isinstance(limit, int) and limit > 0  # -1 means no limit to gymnasium.make, and to a vector -1 steps
    return EnvSpec(
        env, kwargs, registration=registration,
        native=vector_entry is not None and (entry is None or (native and counts)), vector_only=entry is None,
    )  # fmt: skip


def _register(env: str, prefix: str, family: _Family) -> None:
    """Have the ids of a family registered. Raises ConfigError for what is not installed."""
    import gymnasium

    for module in family.needs:
        if importlib.util.find_spec(module) is None:
            raise _missing(env, module, family.extra)
    if any(known.startswith(prefix) for known in gymnasium.registry):
        return
    _import(family.needs[0], env)
    if family.register:
        _load(env, family.register)()


def installed() -> Mapping[str, Any]:
    """gymnasium's registry with the families whose packages are there, without the older ids of Atari games."""
    for prefix, family in _FAMILIES.items():
        with contextlib.suppress(ConfigError):
            _register(prefix, prefix, family)
    return _registered()


def _registered() -> Mapping[str, Any]:
    import gymnasium

    return {name: found for name, found in list(gymnasium.registry.items()) if not _superseded(found)}


def _superseded(registration: Any) -> bool:
    """An id of gym's time, such as "Pong-v4" or "PongNoFrameskip-v4", by which ale_py makes the raw game."""
    return str(registration.entry_point).startswith("ale_py") and bool(_atari_id(registration.id))


def _atari_id(name: str) -> str:
    """Today's id of the Atari game that gym had as `name`; "" if it had none, or ale_py is not installed."""
    import gymnasium

    old = re.fullmatch(r"(\w+?)(-ram)?(Deterministic|NoFrameskip)?(-v[045])?", name)
    if old is None:
        return ""
    with contextlib.suppress(ConfigError):
        _register(name, "ALE/", _FAMILIES["ALE/"])
    today = f"ALE/{old[1]}-v5"
    return today if today in gymnasium.registry else ""


def _unknown_id(env: str) -> str:
    """Why an id is not there, and which one may have been meant."""
    registry = list(_registered())
    base, _, version = env.rpartition("-v")
    family = base if version.isdigit() else env
    versions = [i for i in registry if i.rpartition("-v")[0] == family]
    if versions:
        newest = max(versions, key=lambda i: int(i.rpartition("-v")[2]))
        seen = f"{env} has no version" if family == env else f"there is no version {version} of {family}"
        return f"{seen} — did you mean {newest}?\n  installed: {', '.join(versions)}"
    today = _atari_id(env)
    same = [today] if today else [i for i in registry if i.lower() == env.lower()]
    near = same or difflib.get_close_matches(env, [*_OWN, *registry], 1, 0.6)
    near = near or [i for i in registry if i.lower().startswith(env.lower())][-1:]
    hint = f" — did you mean {near[0]}?" if near else ""
    return f'unknown environment {env!r}{hint}\n  an environment of your own: "module:callable"'


def _check_packages(env: str, registration: Any) -> None:
    entry = registration.entry_point
    for prefix, (module, extra) in _NEEDS.items():
        if isinstance(entry, str) and entry.startswith(prefix) and importlib.util.find_spec(module) is None:
            raise _missing(env, module, extra)


def _load(env: str, entry: str | Callable[..., Any]) -> Callable[..., Any]:
    """The callable behind an entry point."""
    if callable(entry):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(_import(module, env), attribute)


def _missing(env: str, module: str, extra: str) -> ConfigError:
    note = f" ({_LICENCES[extra]})" if extra in _LICENCES else ""
    return ConfigError(f'{env} needs {module}, which is not installed\n  pip install "aiorl[{extra}]"{note}')


# --- callables --------------------------------------------------------------------------------------------------------


def _from_name(env: str, module: Any, attribute: str, kwargs: dict[str, Any], native: bool) -> EnvSpec:
    """`module:callable`; dots in the name lead into classes."""
    target = module
    for part in attribute.split("."):
        if not part.isidentifier() or not hasattr(target, part):
            import gymnasium

            names = [n for n in vars(target) if not n.startswith("_")]
            near = difflib.get_close_matches(part, [*names, *gymnasium.registry], 1)
            hint = f" — did you mean {env.partition(':')[0]}:{near[0]}?" if near else ""
            raise ConfigError(f"module {module.__name__} has no {attribute!r}{hint}\n  {_FORMS}")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(f"{env} is a {type(target).__name__}, not callable\n  {_FORMS}")
    return _checked(EnvSpec(env, kwargs, env), target, native)


def _from_callable(env: Callable[..., Any], kwargs: dict[str, Any], in_process: bool, native: bool) -> EnvSpec:
    plain: Callable[..., Any] = env
    merged = kwargs
    while isinstance(plain, functools.partial) and not plain.args:
        merged = {**plain.keywords, **merged}
        plain = plain.func
    if in_process:
        name = f"{getattr(plain, '__module__', '?')}:{getattr(plain, '__qualname__', type(plain).__qualname__)}"
        return _checked(EnvSpec(_import_name(plain) or name, kwargs, env), env, native)
    name = _check_importable(plain, "")
    return _checked(EnvSpec(name, merged, name), plain, native)


def _check_importable(target: Callable[..., Any], prefix: str) -> str:
    """The name that workers import `target` by. Raises ConfigError if they cannot."""
    name = _import_name(target)
    if name is None:
        raise ConfigError(
            f"workers cannot import {prefix}{_described(target)}\n  put it at the top level of a module and use "
            "env='module:callable', or set workers = 0"
        )
    if target.__module__ == "__main__" and not main_is_guarded():
        raise ConfigError(
            f"workers cannot import {prefix}{name.partition(':')[2]} from this program: they would run it again\n"
            "  start the training under `if __name__ == \"__main__\":`, or give env='module:callable', or workers = 0"
        )
    return name


def _import_name(target: Any) -> str | None:
    """`module:qualname` if that leads back to `target`, else None."""
    module, qualname = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        return None
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is None or (found is not target and found != target):
        return None
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if module == "__main__" and spec is not None:  # python -m package.module
        module = spec.name
    return f"{module}:{qualname}"


def _described(target: Any) -> str:
    qualname = getattr(target, "__qualname__", "")
    if qualname.endswith("<lambda>"):
        return "a lambda"
    if "<locals>" in qualname:
        return f"{qualname.rpartition('.')[2]}, which is defined inside a function"
    return f"{qualname or repr(target)[:80]}"


def main_is_guarded() -> bool:
    """Whether workers can import the main program without running it: a script with an `if __name__ == …` block."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:
        return False
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return False
    tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    return any("__name__" in test and "__main__" in test for test in tests)


def _checked(spec: EnvSpec, target: Callable[..., Any], native: bool) -> EnvSpec:
    parameters = _check_kwargs(spec.name, target, spec.kwargs, {"num_envs"})
    return replace(spec, native=native and "num_envs" in parameters)


def _check_kwargs(
    env: str, target: Callable[..., Any], kwargs: Mapping[str, Any], known: set[str]
) -> Mapping[str, Any]:
    """Refuse keyword arguments that `target` does not take; returns its parameters."""
    try:
        parameters = inspect.signature(target).parameters
    except (ValueError, TypeError):
        return {}
    kinds = inspect.Parameter
    named = {n for n, p in parameters.items() if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)}
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    for key in kwargs:
        if key not in named | known and not takes_any:
            near = difflib.get_close_matches(key, named, 1)
            hint = f" — did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{env} takes no argument {key!r}{hint}\n  it takes: {', '.join(sorted(named)) or 'none'}"
            )
    for name, parameter in parameters.items():
        required = parameter.default is kinds.empty and parameter.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
        if required and name not in kwargs and name not in known:
            raise ConfigError(f"{env} needs the argument {name!r}\n  give it in env_kwargs")
    return parameters


def _import(module: str, env: str) -> Any:
    """Import a module that an environment names. Raises ConfigError saying what is missing."""
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"{env}: {module!r} is not the name of a module\n  {_FORMS}")
    try:
        return importlib.import_module(module)
    except CRASHES as error:
        missing = _missing_module(error)
        if missing is not None and (missing == module or module.startswith(f"{missing}.")):
            raise ConfigError(
                f"{env}: there is no module {missing!r} on the import path\n  run in its directory or install it"
            ) from None
        if missing in _EXTRAS:
            raise _missing(env, missing, _EXTRAS[missing]) from None
        text = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{env}: importing {module} failed\n  {text[:300]}", detail=crashed(env, "import", error).detail
        ) from error


def _missing_module(error: BaseException | None) -> str | None:
    """The top-level package whose absence caused `error`, also through a `raise … from`."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0] if error.name.partition(".")[0] in _EXTRAS else error.name
        error = error.__cause__ or error.__context__
    return None
