"""The numbers and formulas of hockey, without physics: field, limits, forces, rewards. Lengths in units, seconds, kg.

Everything a player does, sees or is paid for is worked out in its *own frame*: the origin is the centre of the field, the
own goal is at negative x and the other player's at positive x. Player 2's own frame is the field turned by 180 degrees, so
positions, velocities and forces change sign while angles, angular velocities and torques do not.
"""

from __future__ import annotations

import math

PIXELS = 60.0  # pixels of a drawn field in a unit; the geometry was laid out in pixels
WIDTH, HEIGHT = 10.0, 8.0
FPS = 50
STEP_S = 1 / FPS
MODES = {"NORMAL": 250, "TRAIN_SHOOTING": 80, "TRAIN_DEFENSE": 80}  # and how many steps a game lasts at most

GOAL_HALF = 75 / PIXELS
MAX_ANGLE = math.pi / 3
MAX_SPEED = 10.0
ZONE = WIDTH / 20  # players stay this far from the centre line
FORCE, TORQUE, SHOT = 6000.0, 400.0, 60.0
SHOOT_ABOVE = 0.5
HOLD_STEPS = 15
MAX_PUCK_SPEED = 25.0

WIN_REWARD = 10.0
_CLOSENESS_WEIGHT, _CLOSENESS_LENGTH = 30.0, 250 / PIXELS

DISCRETE_ACTIONS = (
    (0.0, 0.0, 0.0, 0.0),
    (-1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0),
    (0.0, -1.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, -1.0, 0.0), (0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 1.0),
)  # fmt: skip
"""What the index of a discrete action stands for: nothing, x, y, angle in both directions, shoot."""


def thrust(x: float, vx: float, vy: float, push_x: float, push_y: float, mass: float) -> tuple[float, float, float]:
    """(force x, force y, linear damping) of a racket in its own frame; pushes in [-1, 1]."""
    fx, fy = push_x * FORCE, push_y * FORCE
    if x > -ZONE:  # near the centre line it bounces back whatever the push, and moves out of there with a little help
        return -(2 * max(vx, 0.0) + x * vx) * mass / STEP_S, fy, 20.0
    speed = math.hypot(vx, vy)
    if speed < MAX_SPEED:
        return fx, fy, 5.0
    gain = STEP_S / mass
    if math.hypot(vx + fx * gain, vy + fy * gain) >= speed:
        fx = fy = 0.0
    return fx, fy, 20.0


def twist(angle: float, spin: float, turn: float, mass: float) -> tuple[float, float]:
    """(torque, angular damping) of a racket; `turn` in [-1, 1]."""
    if abs(angle) <= MAX_ANGLE:
        return turn * TORQUE, 2.0
    outwards = spin if spin * angle > 0 else 0.0
    return -0.1 * (outwards + angle) * mass / STEP_S, 10.0


def closeness(x: float, y: float, puck_x: float, puck_y: float, puck_vx: float, limit: int) -> float:
    """The cost (<= 0) of being away from a puck in the own half that is not leaving it, in a game of `limit` steps."""
    if puck_x >= 0 or puck_vx > 0:
        return 0.0
    return -math.hypot(x - puck_x, y - puck_y) * _CLOSENESS_WEIGHT / (_CLOSENESS_LENGTH * limit / 2)


def puck_direction(puck_vx: float, limit: int) -> float:
    """A small number with the sign of the puck's way: positive towards the other player's goal."""
    return puck_vx / (limit * MAX_PUCK_SPEED)
