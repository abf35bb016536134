"""Events, errors and lazy modules: the plain records at the bottom."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

import aiorl
from aiorl import errors, events
from aiorl.events import AnyEvent, Event, Progress, Status
from aiorl.lazy import LazyModule

KINDS: tuple[type[Event], ...] = get_args(AnyEvent)
PLAIN: dict[Any, Any] = {int: 3, float: 0.5, str: "x", bool: True}


def example(kind: Any) -> Any:
    """Some value of a type."""
    if kind in PLAIN:
        return PLAIN[kind]
    text = str(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{field.name: example(field.type) for field in msgspec.structs.fields(kind)})
    if "None" in text:
        return None
    return {} if "dict" in text else ()


def test_every_event_is_listed_exported_and_has_a_name_of_its_own() -> None:
    defined = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)} - {Event}
    assert set(KINDS) == defined
    assert defined <= {getattr(aiorl, name) for name in aiorl.__all__}
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_event_survives_json_and_cannot_be_changed(kind: type[Event]) -> None:
    event = example(kind)
    data = event.to_dict()
    assert data["event"] == kind.__struct_config__.tag
    assert {"seconds", "version", "env_steps"} <= data.keys()
    assert msgspec.json.decode(json.dumps(data).encode(), type=AnyEvent) == event
    assert msgspec.json.decode(msgspec.json.encode(event), type=AnyEvent) == event
    with pytest.raises(AttributeError):
        event.version = 4


def test_frequent_events_are_the_two_that_come_with_time() -> None:
    assert {kind.__name__ for kind in KINDS if not kind.important} == {"Updated", "Progress"}


def test_status_travels_inside_progress() -> None:
    status = example(Status)
    assert Progress(seconds=0, version=0, env_steps=0, status=status).to_dict()["status"]["state"] == "x"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_one_tree_of_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, errors.AiorlError) for kind in kinds)
    assert all(getattr(aiorl, kind.__name__) is kind for kind in kinds)
    assert issubclass(errors.CheckpointError, errors.ConfigError), "refused before anything starts"


def test_an_error_carries_a_long_text_aside() -> None:
    error = errors.WorkerError("worker 3 died", detail="Traceback …")
    assert (str(error), error.detail) == ("worker 3 died", "Traceback …")
    assert errors.EnvError("x").detail == ""
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.detail) == ("worker 3 died", "Traceback …")


# -- lazy modules ------------------------------------------------------------------------------------------------------


def test_a_lazy_module_is_imported_when_it_is_first_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazily_made.py").write_text("imports = []\nimports.append(1)\nanswer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    lazy = LazyModule("lazily_made")
    assert "lazily_made" not in sys.modules
    assert lazy.answer == 42
    assert lazy.imports == [1]
    monkeypatch.setattr(sys.modules["lazily_made"], "answer", 43)
    assert lazy.answer == 42, "the second look costs no import"
    with pytest.raises(AttributeError, match="nothing"):
        _ = lazy.nothing
    with pytest.raises(ModuleNotFoundError):
        _ = LazyModule("no_such_module_anywhere").x
    del sys.modules["lazily_made"]


def test_importing_the_package_is_cheap() -> None:
    program = "import sys, aiorl; print({'torch', 'gymnasium', 'numpy', 'asyncio', 'msgspec'} & set(sys.modules) or 'none')"
    root = Path(aiorl.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "none", done.stderr
