"""Environments: what their spaces are, how they are found and made, and groups of them that fill segments.

spaces     Leaf, Spaces: observations and actions as plain arrays, without gymnasium
spec       EnvSpec: which environment, found by name
families   what goes around games of Atari, MinAtar and MiniGrid
stacking   environments that show their newest observations as one
make       making environments; Probe: what a look at one tells
contract   checks on everything an environment returns
cursor     GroupCursor: where a group's open episodes are; seeds of episodes
coroutines AsyncEnv: environments whose reset and step are coroutines
checked    environments whose answers are checked, stepped one by one or side by side
single     a group of single environments, sync or async
aborts     giving up episodes that are not finite
vector     a group that is one native vector environment, whatever its autoreset mode
state      a native vector environment's state as bytes
group      the protocol of groups and the choice between the two
episodes   whole episodes, for evaluation and play
hockey/    a game for two players, of aiorl's own
"""
