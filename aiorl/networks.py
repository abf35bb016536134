"""Networks of the learning half, their parameters as one vector, and Adam on it. Only the learner imports this module.

Parameter names are those that `acting` looks up: `{name}.{i}.weight` [out, in], `{name}.{i}.bias` [out].

The modules work with autograd as usual. The learners go another way: `trace` keeps what a forward pass saw, and `backward`
sets the gradients from it (sets, not adds). For networks this small the graph costs more than the arithmetic. What comes
after the last layer is computed in NumPy unless it is on a GPU, for the same reason (`losses.near`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aiorl.acting import LOG_2PI
from aiorl.envs.spaces import Leaf
from aiorl.losses import Values, library_of, near, tensor
from aiorl.segments import Array
from aiorl.trees import check_tree


class MLP(nn.ModuleList):
    """Linear layers of the given sizes; the activation follows each but the last (or each one, if `activate_last`).

    Weights are orthogonal with gain sqrt(2), the last layer's with `last_gain`; biases are 0. `rng` is the only source of
    randomness.
    """

    def __init__(
        self, sizes: Sequence[int], activation: str, rng: torch.Generator, *, last_gain: float, activate_last: bool = False
    ) -> None:
        super().__init__()
        self._layers: list[tuple[nn.Parameter, nn.Parameter]] = []  # reading a module's attribute takes a microsecond
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            layer: Any = nn.utils.skip_init(nn.Linear, inputs, outputs)
            gain = last_gain if i == len(sizes) - 2 else math.sqrt(2)
            nn.init.orthogonal_(layer.weight, gain, generator=rng)
            nn.init.zeros_(layer.bias)
            self._layers.append((layer.weight, layer.bias))
            self.append(layer)
        self._activation = activation
        self._activated = len(self) - (0 if activate_last else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        activate = torch.tanh if self._activation == "tanh" else torch.relu
        for i, (weight, bias) in enumerate(self._layers):
            x = F.linear(x, weight, bias)
            if i < self._activated:
                x = activate(x)
        return x

    def trace(self, x: Tensor) -> list[Tensor]:
        """What goes into each layer, and the output last. To be called without gradients."""
        seen = [x]
        for i, (weight, bias) in enumerate(self._layers):
            x = F.linear(x, weight, bias)
            if i < self._activated:
                _activate_(x, self._activation)
            seen.append(x)
        return seen

    def backward(self, seen: Sequence[Tensor], grad: Tensor, *, to_input: bool = False) -> Tensor | None:
        """Set the parameters' gradients from the output's [N, out]; returns the input's [N, in] if asked for."""
        for i in reversed(range(len(self._layers))):
            (weight, bias), x = self._layers[i], seen[i]
            if i < self._activated:
                grad = _activation_backward(grad, seen[i + 1], self._activation)
            torch.sum(grad, 0, out=bias.grad)
            # The narrow matrix goes first, which MKL multiplies up to four times as fast.
            if grad.shape[1] <= x.shape[1]:
                torch.mm(grad.t(), x, out=weight.grad)
            else:
                _grad(weight).copy_((x.t() @ grad).t())
            if i > 0 or to_input:
                grad = grad @ weight
        return grad if to_input else None


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "the module's parameters belong to no FlatParameters"
    return parameter.grad


def _activate_(x: Tensor, activation: str) -> None:
    """In place. NumPy's float32 tanh is several times as fast as torch's, and the same that acting uses."""
    if activation == "relu":
        x.relu_()
    elif x.is_cuda:
        x.tanh_()
    else:
        array = x.numpy()
        np.tanh(array, out=array)


def _activation_backward(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(grad, y)
    return torch.ops.aten.threshold_backward(grad, y, 0)


def apply_mlp(
    weights: Mapping[str, Tensor], name: str, activation: str, x: Tensor, *, activate_last: bool = False
) -> Tensor:
    """As an `MLP` of that name whose parameters are in `weights`. To be called without gradients."""
    depth = sum(key.startswith(f"{name}.") for key in weights) // 2
    for i in range(depth):
        x = F.linear(x, weights[f"{name}.{i}.weight"], weights[f"{name}.{i}.bias"])
        if i < depth - (not activate_last):
            _activate_(x, activation)
    return x


# -- policies ----------------------------------------------------------------------------------------------------------


class Categorical:
    """Log-probabilities and entropies [N] of logits [N, A] and int64 actions [N], all tensors or all arrays."""

    def __init__(self, logits: Values, actions: Values) -> None:
        library = library_of(logits)
        # Each action's numbers in a row: sums over rows are quick.
        columns = logits.t().contiguous() if library is torch else logits.T.copy()
        shifted = columns - library.amax(columns, 0)
        exps = library.exp(shifted)
        total = exps.sum(0)
        self._log_probs, self._probs = shifted - library.log(total), exps / total
        self._at = actions * len(logits) + library.arange(len(logits), **_place(logits))
        self.log_prob = library.take(self._log_probs, self._at)
        self.entropy = -(self._probs * self._log_probs).sum(0)

    def backward(self, d_log_prob: Values, d_entropy: float) -> Values:
        """Gradient of the logits, given those of each log-probability [N] and of each entropy (the same for all)."""
        inner = -d_log_prob
        if d_entropy:
            inner = inner - d_entropy * (self._log_probs + self.entropy)
        columns = self._probs * inner
        columns.reshape(-1)[self._at] += d_log_prob
        return columns.T


def _place(like: Values) -> dict[str, Any]:
    return {"device": like.device} if isinstance(like, Tensor) else {}


class MultiCategorical:
    """The same for several choices: logits [N, sum(nvec)], actions [N, k]; log-probabilities and entropies are sums."""

    def __init__(self, logits: Values, actions: Values, nvec: Sequence[int]) -> None:
        ends = np.cumsum(nvec).tolist()
        blocks = [slice(end - n, end) for n, end in zip(nvec, ends, strict=True)]
        self._parts = [Categorical(logits[:, block], actions[:, i]) for i, block in enumerate(blocks)]
        self.log_prob: Values = sum(part.log_prob for part in self._parts)
        self.entropy: Values = sum(part.entropy for part in self._parts)

    def backward(self, d_log_prob: Values, d_entropy: float) -> Values:
        parts = [part.backward(d_log_prob, d_entropy) for part in self._parts]
        return library_of(d_log_prob).concatenate(parts, 1)


class Gaussian:
    """Log-densities and entropies [N] of means [N, k], log standard deviations [k] and actions [N, k]."""

    def __init__(self, mean: Values, log_std: Values, actions: Values) -> None:
        library = library_of(mean)
        self._inverse_std = library.exp(-log_std)
        self._z = (actions - mean) * self._inverse_std
        constant = log_std.sum() + 0.5 * LOG_2PI * mean.shape[1]
        self.log_prob = -0.5 * (self._z * self._z).sum(1) - constant
        self.entropy = library.broadcast_to(constant + 0.5 * mean.shape[1], self.log_prob.shape)
        self.d_log_std: Values = None

    def backward(self, d_log_prob: Values, d_entropy: float) -> Values:
        """Gradient of the means; leaves that of the log standard deviations in `d_log_std`."""
        weighted = self._z * d_log_prob[:, None]
        self.d_log_std = (weighted * self._z).sum(0) + (d_entropy * len(weighted) - d_log_prob.sum())
        return weighted * self._inverse_std


class ActorCritic(nn.Module):
    """Separate networks for the policy and the value. `log_std` exists for Box actions only."""

    def __init__(
        self, features: int, action: Leaf, hidden: Sequence[int], activation: str, rng: torch.Generator, log_std: float = 0.0
    ) -> None:
        super().__init__()
        outputs = action.size if action.kind == "box" else sum(action.nvec)
        self.actor = MLP([features, *hidden, outputs], activation, rng, last_gain=0.01)
        self.critic = MLP([features, *hidden, 1], activation, rng, last_gain=1.0)
        self.log_std = nn.Parameter(torch.full((action.size,), log_std)) if action.kind == "box" else None
        self._nvec = action.nvec

    def distribution(self, outputs: Values, actions: Values) -> Categorical | MultiCategorical | Gaussian:
        """What the actor's outputs [N, out] say about `actions`, stored flat: [N, k]."""
        if self.log_std is not None:
            log_std = self.log_std if isinstance(outputs, Tensor) else self.log_std.detach().numpy()
            return Gaussian(outputs, log_std, actions)
        if len(self._nvec) == 1:
            return Categorical(outputs, actions[:, 0])
        return MultiCategorical(outputs, actions, self._nvec)

    def evaluate(self, obs: Tensor, actions: Values) -> Evaluation:
        """Log-probabilities of stored actions [N, k], entropies and values for observations [N, features].

        They are tensors or arrays, as the actions are.
        """
        actor, critic = self.actor.trace(obs), self.critic.trace(obs)
        outputs, values = (x[-1] if isinstance(actions, Tensor) else near(x[-1]) for x in (actor, critic))
        return Evaluation(self, actor, critic, self.distribution(outputs, actions), values[:, 0])


@dataclass
class Evaluation:
    """What an `ActorCritic` makes of a batch, and the way back to its gradients."""

    net: ActorCritic
    actor: list[Tensor]
    critic: list[Tensor]
    distribution: Categorical | MultiCategorical | Gaussian
    value: Values

    def backward(self, d_log_prob: Values, d_entropy: float, d_value: Values) -> None:
        """Set the gradients of all parameters, given those of each log-probability, entropy and value."""
        self.net.actor.backward(self.actor, tensor(self.distribution.backward(d_log_prob, d_entropy)))
        if isinstance(self.distribution, Gaussian):
            assert self.net.log_std is not None
            _grad(self.net.log_std).copy_(tensor(self.distribution.d_log_std))
        self.net.critic.backward(self.critic, tensor(d_value[:, None]))


# -- action values -----------------------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """Action values of a discrete space; with `dueling`, as state value plus advantage (Wang et al. 2016, 1511.06581)."""

    def __init__(
        self, features: int, actions: int, hidden: Sequence[int], activation: str, rng: torch.Generator, *, dueling: bool
    ) -> None:
        super().__init__()
        self.torso = MLP([features, *hidden], activation, rng, last_gain=math.sqrt(2), activate_last=True)
        self.advantage = MLP([hidden[-1], actions], activation, rng, last_gain=1.0)
        self.state_value = MLP([hidden[-1], 1], activation, rng, last_gain=1.0) if dueling else None

    def forward(self, obs: Tensor) -> Tensor:
        """[N, features] to [N, actions]."""
        x = self.torso(obs)
        return self._combine(self.advantage(x), None if self.state_value is None else self.state_value(x))

    def trace(self, obs: Tensor) -> list[Tensor]:
        """What goes into each layer of the torso, what comes out of it, and the action values last."""
        seen = self.torso.trace(obs)
        value = None if self.state_value is None else self.state_value.trace(seen[-1])[-1]
        return [*seen, self._combine(self.advantage.trace(seen[-1])[-1], value)]

    def _combine(self, advantage: Tensor, value: Tensor | None) -> Tensor:
        return advantage if value is None else value + advantage - advantage.mean(1, keepdim=True)

    def backward(self, seen: Sequence[Tensor], grad: Tensor) -> None:
        """Set the parameters' gradients from the action values' [N, actions]."""
        x = seen[-2]
        if self.state_value is None:
            d_x = self.advantage.backward([x], grad, to_input=True)
        else:
            total = grad.sum(1, keepdim=True)
            d_x = self.advantage.backward([x], grad - total / grad.shape[1], to_input=True)
            d_x = d_x + self.state_value.backward([x], total, to_input=True)  # type: ignore[operator]
        self.torso.backward(seen[:-1], d_x)  # type: ignore[arg-type]


# -- parameters --------------------------------------------------------------------------------------------------------


class FlatParameters:
    """All parameters of a module as one vector, and their gradients as another: the module's become views of them.

    So clipping, Adam, target updates and snapshots are one operation each instead of one for each parameter.
    """

    def __init__(self, module: nn.Module, device: str = "cpu") -> None:
        named = dict(module.named_parameters())
        self.vector = torch.cat([p.detach().reshape(-1) for p in named.values()]).to(device)
        self.grad = torch.zeros_like(self.vector)
        self._shapes = {name: p.shape for name, p in named.items()}
        for (name, view), grad in zip(self.split(self.vector).items(), self.split(self.grad).values(), strict=True):
            named[name].data = view
            named[name].grad = grad

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector laid out like this one, by parameter name."""
        parts = vector.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def is_finite(self) -> bool:
        """Whether all parameters are (the sum tells, unless it overflows)."""
        return math.isfinite(float(self.vector.sum())) or bool(torch.isfinite(self.vector).all())

    def clip_grad(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` if it is longer, and return the norm that it had."""
        norm = torch.linalg.vector_norm(self.grad)
        if not self.grad.is_cpu:
            self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        elif not (length := float(norm) + 1e-6) <= max_norm:  # also NaN
            self.grad.mul_(max_norm / length)
        return norm

    def arrays(self, vector: Tensor | None = None, *, copy: bool = True) -> dict[str, Array]:
        """`vector` (default: the parameters) by name, as NumPy arrays; without `copy` they are views when on the CPU."""
        host = (self.vector if vector is None else vector).detach().cpu()
        return {name: part.numpy() for name, part in self.split(host.clone() if copy else host).items()}

    def load(self, arrays: Mapping[str, Array], path: str = "parameters", into: Tensor | None = None) -> None:
        """Copy arrays by name into the parameters or a vector like them. Raises ValueError naming the first mismatch."""
        target = self.vector if into is None else into
        check_tree(arrays, self.arrays(target), path)
        for name, view in self.split(target).items():
            view.copy_(torch.from_numpy(np.array(arrays[name])))


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on a parameter vector, with its state in the open."""

    def __init__(self, parameters: FlatParameters, *, eps: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self._parameters, self._eps, self._betas = parameters, eps, betas
        self.steps = 0
        self._mean = torch.zeros_like(parameters.vector)
        self._square = torch.zeros_like(parameters.vector)
        self._step = torch.zeros((), device=parameters.vector.device)

    def step(self, learning_rate: float) -> None:
        """Move the parameters along their gradient."""
        self.steps += 1
        parameters, (beta1, beta2) = self._parameters, self._betas
        # What torch.optim.Adam(fused=True) calls, whose own Python would take longer: one pass over all numbers.
        torch._fused_adam_(  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateUsage]
            [parameters.vector], [parameters.grad], [self._mean], [self._square], [], [self._step.fill_(self.steps)],
            lr=learning_rate, beta1=beta1, beta2=beta2, eps=self._eps, weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip

    def undo(self) -> Callable[[], None]:
        """What takes the parameters and this state back to where they are now."""
        steps, kept = self.steps, [(v, v.clone()) for v in (self._parameters.vector, self._mean, self._square)]

        def take_back() -> None:
            self.steps = steps
            for vector, before in kept:
                vector.copy_(before)

        return take_back

    def state_dict(self) -> dict[str, Any]:
        arrays = self._parameters.arrays
        return {"steps": self.steps, "mean": arrays(self._mean), "square": arrays(self._square)}

    def load_state_dict(self, state: Mapping[str, Any], path: str = "optimizer") -> None:
        """Raises ValueError naming the first mismatch."""
        check_tree(state, self.state_dict(), path)
        self.steps = int(state["steps"])
        self._parameters.load(state["mean"], f"{path}.mean", self._mean)
        self._parameters.load(state["square"], f"{path}.square", self._square)


def torch_rng(rng: np.random.Generator) -> torch.Generator:
    """A torch generator seeded from a NumPy one; torch's global generator is left alone."""
    return torch.Generator().manual_seed(int(rng.integers(2**63)))
