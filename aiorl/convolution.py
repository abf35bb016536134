"""Where the image in an encoded observation is, and which convolutions go over it: what acting and learning agree on.

Images are channels-last inside, so that what leaves the last convolution is flat without a copy. Parameter names under a
network's name: `conv.{i}.weight` [filters, kernel, kernel, channels], `conv.{i}.bias` [filters], and `dense.…`, an MLP over
the flat result and the rest of the observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from msgspec import Meta

from aiorl.envs.spaces import Leaf, Spaces
from aiorl.errors import ConfigError

Network = Literal["auto", "mlp", "small", "light", "nature"]
NETWORK = Meta(
    description="what sees an image before the hidden layers do: nature, three convolutions; light, two, in half the time; "
    "small, one of 16 3x3 filters; mlp, none; auto, nature from 36x36 up, small from 5x5 up"
)


class Layer(NamedTuple):
    """A convolution without padding; a ReLU follows. `kernel` and `stride` are the same both ways."""

    filters: int
    kernel: int
    stride: int


LAYERS: dict[str, tuple[Layer, ...]] = {
    "small": (Layer(16, 3, 1),),  # Young and Tian 2019, arXiv 1903.03176
    "light": (Layer(16, 8, 4), Layer(32, 4, 2)),  # Mnih et al. 2013, arXiv 1312.5602
    "nature": (Layer(32, 8, 4), Layer(64, 4, 2), Layer(64, 3, 1)),  # Mnih et al. 2015
}


def least_side(layers: tuple[Layer, ...]) -> int:
    """The shortest side of an image that leaves the last of these layers something."""
    side = 1
    for _, kernel, stride in reversed(layers):
        side = (side - 1) * stride + kernel
    return side


SMALL_FROM, NATURE_FROM = 5, least_side(LAYERS["nature"])  # shortest sides for which auto takes them


class Frame(NamedTuple):
    """How an image lies in its leaf: [before, height, width, after]. Its channels are those before and those after."""

    before: int
    height: int
    width: int
    after: int

    @property
    def side(self) -> int:
        return min(self.height, self.width)


@dataclass(frozen=True)
class Convolutions:
    """Convolutions over the features `start` to `stop` of an encoded observation of `features` numbers."""

    frame: Frame
    layers: tuple[Layer, ...]
    start: int
    stop: int
    features: int

    def images(self, x: Any) -> Any:
        """[N, features] to [N, height, width, channels]; arrays or tensors, a view where that is possible."""
        before, height, width, after = self.frame
        image = x[:, self.start : self.stop].reshape(len(x), before, height * width, after)
        return image.swapaxes(1, 2).reshape(len(x), height, width, before * after)

    def rest(self, x: Any) -> list[Any]:
        """The features that are no image, in up to two parts [N, …]."""
        parts = x[:, : self.start], x[:, self.stop :]
        return [part for part in parts if part.shape[1]]

    @property
    def channels(self) -> tuple[int, ...]:
        """Those that each layer sees."""
        return (self.frame.before * self.frame.after, *(layer.filters for layer in self.layers[:-1]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """What the last layer gives: (height, width, filters)."""
        sides = [self.frame.height, self.frame.width]
        for _, kernel, stride in self.layers:
            sides = [(side - kernel) // stride + 1 for side in sides]
        return sides[0], sides[1], self.layers[-1].filters

    @property
    def flat(self) -> int:
        height, width, filters = self.shape
        return height * width * filters

    @property
    def dense_features(self) -> int:
        """What the layers behind see."""
        return self.flat + self.features - (self.stop - self.start)


def convolutions_of(spaces: Spaces, network: Network) -> Convolutions | None:
    """The convolutions that `network` asks for; None for an MLP. Raises ConfigError if it does not fit the observations.

    There are none without an image, and none in "auto" with several.
    """
    if network == "mlp":
        return None
    frames = [frame_of(leaf) for leaf in spaces.observation]
    found = [i for i, frame in enumerate(frames) if frame is not None]
    frame = frames[found[0]] if len(found) == 1 else None
    if network == "auto":
        if frame is None or frame.side < SMALL_FROM:
            return None
        network = "nature" if frame.side >= NATURE_FROM else "small"
    least = least_side(LAYERS[network])
    if frame is None or frame.side < least:
        shapes = ", ".join(f"{leaf.name} {leaf.dtype}{list(leaf.shape)}" for leaf in spaces.observation)
        raise ConfigError(
            f'network = "{network}" needs one image of at least {least} x {least}, the observation is {shapes}\n'
            '  use network = "auto", or "mlp"'
        )
    starts = list(accumulate((leaf.features for leaf in spaces.observation), initial=0))
    return Convolutions(frame, LAYERS[network], starts[found[0]], starts[found[0] + 1], spaces.features)


def frame_of(leaf: Leaf) -> Frame | None:
    """How the image in a leaf lies, None if it is not one.

    An image is an array of three axes, or one of two that holds bytes or bools. Its channels are on the axis beside two
    of the same length, else on the shorter of the first and last; a stack is channels, too.
    """
    if leaf.kind not in ("box", "multi_binary"):
        return None
    stack, shape = (leaf.stack, leaf.shape[1:]) if leaf.stack > 1 else (1, leaf.shape)
    if len(shape) == 2 and leaf.dtype in ("uint8", "int8", "bool"):
        return Frame(stack, *shape, 1)
    if len(shape) != 3:
        return None
    first, middle, last = shape
    ahead = first < last if (first == middle) == (middle == last) else middle == last
    return Frame(stack * first, middle, last, 1) if ahead else Frame(stack, *shape)
