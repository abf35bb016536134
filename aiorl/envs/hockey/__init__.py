"""Laser hockey: two rackets, a puck, two goals. Importing this package registers `aiorl/Hockey-v0` with gymnasium.

rules      the field, the limits, forces and rewards, without physics
world      the bodies in Box2D
game       a game between two players
bots       players that follow a script
env        HockeyEnv: gymnasium, one player against a bot
parallel   HockeyParallelEnv: PettingZoo, both players
render     drawing a game

Needs the extra `hockey`. docs/hockey.md describes the game.
"""

from __future__ import annotations

import gymnasium

ID = "aiorl/Hockey-v0"

# No max_episode_steps: how long a game lasts depends on its mode, and the game itself says that its time is over.
gymnasium.register(ID, entry_point="aiorl.envs.hockey.env:HockeyEnv")
