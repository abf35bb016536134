"""The command line: finds the verb, runs its module, turns errors into one cause, one fix and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad usage or configuration (nothing was started), 130 Ctrl-C, 143 SIGTERM.
A verb is a module with `main(argv) -> int`, imported when it is used, so that help is quick.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """A subcommand: the module that has its `main`, what it does, an example; `debugs`: it knows `--debug` itself."""

    module: str
    summary: str
    example: str
    debugs: bool = False


VERBS = {
    "train": Verb("aiorl.cli.train", "train an agent", "train CartPole-v1 --steps 200k --seed 1", debugs=True),
    "resume": Verb("aiorl.cli.resume", "go on with a run", "resume runs/CartPole-v1-ppo-0 --steps 400k", debugs=True),
    "replay": Verb("aiorl.cli.replay", "repeat a run bit for bit from its record", "replay runs/CartPole-v1-ppo-0"),
    "eval": Verb("aiorl.cli.evaluate", "measure a trained policy", "eval runs/CartPole-v1-ppo-0 --episodes 100"),
    "play": Verb("aiorl.cli.play", "watch, record or match policies", "play runs/CartPole-v1-ppo-0 --record pole.gif"),
    "plot": Verb("aiorl.cli.plot", "draw learning curves of one or more runs", "plot runs/* --out curves.svg"),
    "runs": Verb("aiorl.cli.runs", "list the runs in a directory", "runs"),
    "envs": Verb("aiorl.cli.envs", "list environments and what they need", "envs lunar"),
    "algos": Verb("aiorl.cli.algos", "list algorithms and what they can do", "algos"),
    "bench": Verb("aiorl.cli.bench", "measure what bounds the speed of a training", "bench CartPole-v1 --workers 2"),
    "doctor": Verb("aiorl.cli.doctor", "check this machine, an environment or a run", "doctor my_package.envs:MyEnv"),
}  # fmt: skip

ABOUT = "Asynchronous reinforcement learning: exact, bounded, never silently stuck."

DONE, FAILED, BAD_USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return DONE
    if words[0] in ("-V", "--version", "version"):
        from aiorl import __version__

        print(f"aiorl {__version__}")
        return DONE
    verb = VERBS.get(words[0])
    if verb is None:
        return _complain(unknown_verb(words[0]), BAD_USAGE)
    return _guarded(verb, words[1:])


def overview() -> str:
    """What `python -m aiorl` prints: every verb with an example."""
    width = max(map(len, VERBS))
    lines = ["usage: python -m aiorl VERB …", "", ABOUT, ""]
    for name, verb in VERBS.items():
        lines += [f"  {name:<{width}}  {verb.summary}", f"  {'':<{width}}    python -m aiorl {verb.example}"]
    lines += ["", "`python -m aiorl VERB --help` explains a verb; `--debug` shows tracebacks."]
    return "\n".join(lines)


def unknown_verb(word: str) -> str:
    if word.startswith("-"):
        return f"unknown flag `{word}` before the verb\n  the verb comes first: python -m aiorl train {word} …"
    near = difflib.get_close_matches(word, list(VERBS), 1)
    if near:
        return f"unknown verb `{word}`\n  did you mean `{near[0]}`?"
    if "-v" in word or ":" in word:
        return f"unknown verb `{word}`\n  to train on it: python -m aiorl train {word}"
    return f"unknown verb `{word}`\n  verbs: {', '.join(VERBS)}"


def _guarded(verb: Verb, words: list[str]) -> int:
    """Run a verb; whatever it raises becomes a short message and an exit code."""
    from aiorl.errors import AiorlError, ConfigError

    debug = "--debug" in words
    try:
        code = importlib.import_module(verb.module).main([w for w in words if w != "--debug" or verb.debugs])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has gone (`… | head`): there is nobody to hear more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, ConfigError):
            return _complain(str(error), BAD_USAGE)
        if isinstance(error, AiorlError):
            return _complain(str(error), FAILED, getattr(error, "log", None))
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = getattr(error, "log", None) or (None if debug else "run again with --debug to see the traceback")
        return _complain(what, FAILED, hint)


def _complain(message: str, code: int, hint: object = None) -> int:
    """At most three lines on stderr: the message, and where to read more if that leaves room for it."""
    lines = [line for line in message.strip().splitlines() if line.strip()][:3]
    lines = [line if len(line) <= 400 else line[:399] + "…" for line in lines]
    if hint and len(lines) < 3:
        lines.append(f"  {hint}")
    print("error: " + "\n".join(lines), file=sys.stderr)
    return code
