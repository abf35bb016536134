"""Configurations to check before a run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toys import Toy

from aiorl.config import Config
from aiorl.errors import ConfigError
from aiorl.preflight import check


def make(**changes: Any) -> Config:
    fields: dict[str, Any] = {"env": "run_envs:Counting", "algo": Toy(), "envs": 8, "group_size": 2, "workers": 2}
    return Config(**{**fields, "out": "run", **changes})


def refused(*words: str, resume: str | Path | None = None, **changes: Any) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError) as caught:
        check(make(**changes), resume)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert len(text.splitlines()) <= 3
    assert sorted(Path().rglob("*")) == before, "a refused run left something behind"
    return text
