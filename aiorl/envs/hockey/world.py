"""The bodies of a game in Box2D: two rackets, a puck, the boards and two goals.

A new Box2D world is built for every game: solver caches and the order of contacts carry over otherwise, and the same actions
would lead elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import Box2D as b2

from aiorl.envs.hockey import rules
from aiorl.envs.hockey.rules import PIXELS

Corners = Sequence[tuple[float, float]]

VELOCITY_ITERATIONS, POSITION_ITERATIONS = 180, 60



def _units(*corners: tuple[float, float], scale: float = 1.0) -> Corners:
    return [(scale * x / PIXELS, scale * y / PIXELS) for x, y in corners]


RACKET = _units((-10, 20), (5, 20), (5, -20), (-10, -20), (-18, -10), (-21, 0), (-18, 10), scale=1.2)
"""Corners of player 1's racket; player 2's is mirrored in x."""
PUCK_RADIUS = 13 / PIXELS
# The long boards' inner faces are 200 pixels from the centre, the short boards' 235; those open towards the goals.
LONG_BOARD = _units((-250, 200), (250, 200), (250, 220), (-250, 220))
SHORT_BOARD = _units((235, 82), (255, 75), (255, 215), (235, 215))
GOAL = _units((245, -75), (265, -75), (265, 75), (245, 75))

SIDES = (1.0, -1.0)
"""What turns the field's frame into a player's own."""

_PUCK, _BOARD, _RACKET, _GOAL = 1, 2, 4, 8  # collision categories
_PUCK_LABEL = ("puck", 0)


def _polygon(corners: Corners, x: float, y: float, **properties: Any) -> Any:
    shape = b2.b2PolygonShape(vertices=[(x * a, y * b) for a, b in corners])
    return b2.b2FixtureDef(shape=shape, **properties)


def _field() -> list[Any]:
    board = {"friction": 0.1, "categoryBits": _BOARD, "maskBits": _PUCK | _RACKET}
    mouth = {"friction": 0.1, "categoryBits": _GOAL, "maskBits": _RACKET}
    goal = {"isSensor": True, "categoryBits": _GOAL, "maskBits": _PUCK}
    fixtures: list[Any] = []
    for i, side in enumerate(SIDES):
        fixtures += [
            _polygon(LONG_BOARD, 1, side, **board),
            _polygon(SHORT_BOARD, side, 1, **board),
            _polygon(SHORT_BOARD, side, -1, **board),
            _polygon(GOAL, side, 1, **mouth),  # keeps rackets out of the goals; the puck does not feel it
            _polygon(GOAL, side, 1, **goal, userData=("goal", 1 - i)),
        ]
    return fixtures


def _rackets() -> list[Any]:
    properties = {"density": 200 / 1.2, "friction": 1.0, "restitution": 0.0, "categoryBits": _RACKET, "maskBits": 15}
    return [_polygon(RACKET, side, 1, **properties, userData=("racket", i)) for i, side in enumerate(SIDES)]


def _disc() -> Any:
    return b2.b2FixtureDef(
        shape=b2.b2CircleShape(radius=PUCK_RADIUS), density=7.0, friction=0.1, restitution=0.95,
        categoryBits=_PUCK, maskBits=_RACKET | _BOARD | _GOAL, userData=_PUCK_LABEL,
    )  # fmt: skip


# Made once: Box2D copies them into each world, and a polygon made from a list of corners is never wholly freed.
_FIELD, _RACKETS, _DISC = _field(), _rackets(), _disc()


class _Contacts(b2.b2ContactListener):
    """What the puck began to touch since `begun` was emptied, with the puck's x velocity before it bounced.

    Holds no body: bodies die with their world, which lives shorter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[str, int, float]] = []

    def BeginContact(self, contact: Any) -> None:
        a, b = contact.fixtureA, contact.fixtureB
        first, second = a.userData, b.userData
        if first == _PUCK_LABEL:
            if second is not None:
                self.begun.append((*second, a.body.linearVelocity.x))
        elif second == _PUCK_LABEL and first is not None:
            self.begun.append((*first, b.body.linearVelocity.x))


class World:
    """One game's bodies, from `place` to `place`. After each step `rackets`, `puck` and `touched` say how things are.

    `rackets[i]` is (x, y, angle, vx, vy, angular velocity) and `puck` (x, y, vx, vy), in the field's frame. `touched` lists
    what the puck ran into: ("racket", i, puck's vx before) or ("goal", i, …), where goal i is the one player i defends.
    """

    def __init__(self) -> None:
        self.rackets: list[tuple[float, ...]] = []
        self.puck: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
        self._contacts = _Contacts()
        self.touched = self._contacts.begun

    def place(self, rackets: Sequence[tuple[float, float]], puck: tuple[float, float], impulse: tuple[float, float]) -> None:
        """Begin anew with everything at rest at these positions, the puck pushed by `impulse` in the first step."""
        self._world = world = b2.b2World(gravity=(0, 0), contactListener=self._contacts)
        for fixture in _FIELD:
            world.CreateStaticBody().CreateFixture(fixture)
        self._bodies = [_moving(world, at, fixture) for at, fixture in zip(rackets, _RACKETS, strict=True)]
        self._puck = _moving(world, puck, _DISC)
        self._mass = self._bodies[0].mass
        self._puck.ApplyForceToCenter((impulse[0] / rules.STEP_S, impulse[1] / rules.STEP_S), True)
        self.touched.clear()
        self._read()

    def push(self, i: int, x: float, y: float, turn: float) -> None:
        """Racket i's forces for the coming step, in its own frame; each in [-1, 1]."""
        body, side = self._bodies[i], SIDES[i]
        at_x, _, angle, vx, vy, spin = self.rackets[i]
        fx, fy, damping = rules.thrust(side * at_x, side * vx, side * vy, x, y, self._mass)
        body.linearDamping = damping
        body.ApplyForceToCenter((side * fx, side * fy), True)
        torque, body.angularDamping = rules.twist(angle, spin, turn, self._mass)
        body.ApplyTorque(torque, True)

    def hold(self, i: int) -> None:
        """The puck goes with racket i."""
        x, y, _, vx, vy, _ = self.rackets[i]
        self._puck.position = (x, y)
        self._puck.linearVelocity = (vx, vy)
        self.puck = (x, y, vx, vy)

    def shoot(self, i: int) -> None:
        """The puck leaves in the direction that racket i points to."""
        angle, force = self.rackets[i][2], SIDES[i] * rules.SHOT / rules.STEP_S
        self._puck.ApplyForceToCenter((force * math.cos(angle), force * math.sin(angle)), True)

    def step(self) -> None:
        _, _, vx, vy = self.puck
        self._puck.linearDamping = 10.0 if math.hypot(vx, vy) > rules.MAX_PUCK_SPEED else 0.05
        self.touched.clear()
        self._world.Step(rules.STEP_S, VELOCITY_ITERATIONS, POSITION_ITERATIONS)
        self._world.ClearForces()
        self._read()

    def _read(self) -> None:
        rackets: list[tuple[float, ...]] = []
        for body in self._bodies:
            at, v = body.position, body.linearVelocity
            rackets.append((at.x, at.y, body.angle, v.x, v.y, body.angularVelocity))
        self.rackets = rackets
        at, v = self._puck.position, self._puck.linearVelocity
        self.puck = (at.x, at.y, v.x, v.y)


def _moving(world: Any, position: tuple[float, float], fixture: Any) -> Any:
    body = world.CreateDynamicBody(position=position)
    body.CreateFixture(fixture)
    return body
