"""`python -m aiorl play --versus A B …`: scripted players and trained policies against each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec

from aiorl.algos.selfplay import inner_spaces
from aiorl.cli.envs import spaces_text
from aiorl.cli.flags import field_value, show
from aiorl.cli.policies import environment, load_policy, primary_suite, without_import
from aiorl.cli.record import Film, Recorder, check_recording
from aiorl.cli.text import plural
from aiorl.cli.text import table as aligned
from aiorl.envs.games import Table, find_game
from aiorl.envs.spaces import Spaces, spaces_of
from aiorl.errors import CheckpointError, ConfigError
from aiorl.matches import WIDTH, Player, Scripted, Trained, one_player, play_match
from aiorl.metrics.matrix import draw, markdown, match_rows, matrix_rows
from aiorl.policy import LoadedPolicy
from aiorl.segments import Array
from aiorl.tournament import Matrix, Played, distinct, pairs

GAMES = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
SEED = Annotated[int, msgspec.Meta(ge=0)]
FILMED = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
DEFAULT_GAMES, DEFAULT_ENV = 100, "hockey"
SHAPE_SPACES = ("keep_mode", "discrete")
"""Arguments of the environment a policy was trained on that the game takes over: what it sees and does depends on them."""

Names = tuple[str, str]


def add_arguments(parser: Any) -> None:
    group = parser.add_argument_group("a tournament")
    group.add_argument(
        "--versus", nargs="+", metavar="PLAYER",
        help="two players or more, each against each: run directories, checkpoints, or bots of the game (hockey has weak, "
        "strong, random and still)",
    )  # fmt: skip
    group.add_argument(
        "--games", metavar="N", help=f"games of each two players, each seed on both seats (default: {DEFAULT_GAMES})"
    )
    group.add_argument("--save", metavar="DIR", help="write matrix.json, matrix.md and matrix.svg there")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout")


def main(given: Mapping[str, Any], record: Path | None, fps: float | None, frames: int) -> int:
    """Play what was asked for and report it. Raises ConfigError or EnvError."""
    if "run" in given:
        run = given["run"]
        what = f"`{run}` stands before --versus, expected all players after it"
        raise ConfigError(f"{what}\n  for example: play --versus {run} weak")
    if "suite" in given:
        raise ConfigError("--suite does not go with --versus\n  say what is different in this game: --env-kwargs KEY=VALUE")
    words: list[str] = given["versus"]
    if len(words) < 2:
        raise ConfigError(f"--versus {words[0]}: expected two players or more\n  for example: --versus {words[0]} strong")
    games = field_value("games", str(given.get("games", DEFAULT_GAMES)), GAMES)
    seed = field_value("seed", str(given.get("seed", 0)), SEED)
    filmed = field_value("episodes", str(given.get("episodes", 1)), FILMED)
    check_recording(record, captions=True)
    save = _directory(given["save"]) if "save" in given else None
    policies = {word: policy for word in words if (policy := _policy(word, given)) is not None}
    env, kwargs = _game(given, policies)
    with ExitStack() as stack:
        tables = [make() for make in _makers(env, kwargs, min(WIDTH, games), record is not None)]
        for table in tables:
            stack.callback(table.game.close)
        players = [_player(word, policies.get(word), tables[0]) for word in words]
        names = distinct([_name(word, policies.get(word)) for word in words])
        film = None
        if record is not None:
            recorder = stack.enter_context(Recorder(record, fps or tables[0].fps, frames))
            film = Film(recorder, tables[0].game.render, filmed)
        matrix = tournament(tables, players, names, games, seed, film)
        result = {"env": tables[0].name, "env_kwargs": kwargs, "games": games, "seed": seed, **matrix.to_dict()}
    _report(matrix, result, record, save, given.get("json", False))
    return 0


def _makers(env: str, kwargs: Mapping[str, Any], tables: int, drawn: bool) -> list[Callable[[], Table]]:
    """What opens each table; the game at the first one is `drawn`."""
    make = find_game(env, kwargs)
    first = find_game(env, {**kwargs, "render_mode": "rgb_array"}) if drawn else make
    return [first, *[make] * (tables - 1)]


def tournament(
    tables: Sequence[Table], players: Sequence[Player], names: Sequence[str], games: int, seed: int,
    film: Film | None = None,
) -> Matrix:  # fmt: skip
    """Each pair plays by itself, so what comes of it does not depend on who else takes part."""
    matches: dict[tuple[int, int], list[Played]] = {}
    on_frame = film.frame if film is not None else None
    for a, b in pairs(len(players)):
        if film is not None:
            film.match(names[a], names[b])
        tell = _teller(f"{names[a]} – {names[b]}", games)

        def on_end(index: int, game: Played, tell: Callable[[Played], None] = tell) -> None:
            tell(game)
            if film is not None:
                film.ended(index, game)

        sides = players[a], players[b]
        try:
            matches[a, b] = play_match([t.game for t in tables], sides, games, seed, on_end=on_end, on_frame=on_frame)
        except BaseException:
            if sys.stderr.isatty():
                print(file=sys.stderr)  # what went wrong gets a line of its own
            raise
    return Matrix(names, matches)


def _teller(match: str, games: int) -> Callable[[Played], None]:
    """Shows on stderr how a match stands: all the time on a terminal, else once, at its end."""
    ends = {1: 0, 0: 0, -1: 0}
    live = sys.stderr.isatty()

    def tell(game: Played) -> None:
        ends[game.outcome] += 1
        done = sum(ends.values())
        if not live and done < games:
            return
        line = f"{match}: {done}/{games} games, won {ends[1]}, tied {ends[0]}, lost {ends[-1]}"
        print(f"\r{line}\033[K" if live else line, end="\n" if done == games else "", file=sys.stderr, flush=True)

    return tell


# --- who plays what ---------------------------------------------------------------------------------------------------


def _policy(word: str, given: Mapping[str, Any]) -> LoadedPolicy | None:
    """The policy that a word names; None if it is not a directory, so that it may be the name of a bot."""
    if not Path(word).exists():
        return None
    return one_player(load_policy(word, given)[0])


def _game(given: Mapping[str, Any], policies: Mapping[str, LoadedPolicy]) -> tuple[str, dict[str, Any]]:
    """The game and its arguments: as given, else those of the first policy."""
    config = next(iter(policies.values())).config if policies else {"env": DEFAULT_ENV}
    recorded, taken = environment(config, primary_suite(config))
    env = given["env"] if "env" in given else without_import(recorded, "the policy was trained on")
    kwargs = {key: taken[key] for key in SHAPE_SPACES if key in taken} if env == recorded else {}
    return env, kwargs | field_value("env_kwargs", given.get("env_kwargs", []), dict[str, Any])


def _player(word: str, policy: LoadedPolicy | None, game: Table) -> Player:
    if policy is None:
        if word in game.bots:
            return Scripted(game.bots[word])
        known = ", ".join(game.bots) or "none"
        raise ConfigError(f"--versus {word}: there is no such run, and no such bot\n  bots of {game.name}: {known}")
    take = None if policy.spaces == game.spaces else _from_self_play(policy.spaces, game)
    if policy.spaces != game.spaces and take is None:
        raise CheckpointError(
            f"{word} was made for other spaces than {game.name} has\n"
            f"  saved: {spaces_text(policy.spaces)}\n  game:  {spaces_text(game.spaces)}"
        )
    _, measured_with = environment(policy.config, primary_suite(policy.config))
    return Trained(policy, int(measured_with.get("frame_skip", 1)), take)


def _from_self_play(spaces: Spaces, game: Table) -> Callable[[Array], Any] | None:
    """What makes actions for this game of those that self-play has; None if these are not its spaces there."""
    from aiorl.envs.twoplayer import SelfPlayEnv, taken

    try:
        env = SelfPlayEnv(game.game)
    except ConfigError:
        return None
    known = inner_spaces(spaces_of(env.observation_space, env.action_space))
    return partial(taken, game.game.action_space) if spaces == known else None


def _name(word: str, policy: LoadedPolicy | None) -> str:
    """What a player is called: a bot by its name, a policy by its run's directory."""
    if policy is None:
        return word
    path = Path(word).resolve()
    inside = path.name in ("best", "final") or path.parent.name == "checkpoints"
    run = path.parent if path.name in ("best", "final") else path.parent.parent
    return f"{run.name}/{path.name}" if inside else path.name


# --- what came of it --------------------------------------------------------------------------------------------------


def _directory(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--save {path}: expected a directory, there is a file of that name")
    return path


def _report(matrix: Matrix, result: dict[str, Any], record: Path | None, save: Path | None, as_json: bool) -> None:
    told = "".join(f", {key} = {show(value)}" for key, value in result["env_kwargs"].items())
    title = f"{result['env']}{told}, {plural(result['games'], 'game')} a match, seed {result['seed']}"
    if save is not None:
        files = {
            "matrix.json": msgspec.json.format(msgspec.json.encode(result)).decode() + "\n",
            "matrix.md": markdown(matrix), "matrix.svg": draw(matrix, title),
        }  # fmt: skip
        try:
            save.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (save / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--save {save}: cannot write there: {error.strerror}") from None
    if as_json:
        print(msgspec.json.encode(result).decode())
        return
    print(title, aligned(match_rows(matrix), frozenset({2, 6, 7})), sep="\n\n")
    if len(matrix.names) > 2:
        n = len(matrix.names)
        print("", aligned(matrix_rows(matrix), frozenset(range(1, n + 2))), sep="\n")
    for path in (record, save):
        if path is not None:
            print(path)
