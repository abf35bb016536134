"""How many threads torch uses, where it is asked in another thread than the test's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def in_a_new_thread(function: Callable[..., Any], *args: Any) -> Any:
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(function, *args).result()


def threads_of_a_new_thread() -> int:
    """What torch would use in one that has not used it yet."""
    return in_a_new_thread(torch.get_num_threads)
