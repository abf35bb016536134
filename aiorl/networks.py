"""Networks of the learning half, their parameters as one vector, and Adam on it. Only the learner imports this module.

Parameter names are those that `acting` looks up: `{name}.{i}.weight` [out, in], `{name}.{i}.bias` [out].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aiorl.acting import LOG_2PI
from aiorl.envs.spaces import Leaf
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
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
            gain = last_gain if i == len(sizes) - 2 else math.sqrt(2)
            nn.init.orthogonal_(layer.weight, gain, generator=rng)
            nn.init.zeros_(layer.bias)
            self.append(layer)
        self._activation = activation
        self._activated = len(self) - (0 if activate_last else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        if x.is_cuda:
            return self.layer_by_layer(x)
        parameters = [p for layer in self for p in (layer.weight, layer.bias)]
        return _MLPOnCPU.apply(x, self._activation, self._activated, *parameters)

    def layer_by_layer(self, x: Tensor) -> Tensor:
        """The same, one operation at a time."""
        activate = torch.tanh if self._activation == "tanh" else torch.relu
        for i, layer in enumerate(self):
            x = F.linear(x, layer.weight, layer.bias)
            if i < self._activated:
                x = activate(x)
        return x


class _MLPOnCPU(torch.autograd.Function):
    """A whole MLP as one node of the graph: for networks this small, most of a gradient step is the cost of the nodes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, activated: int, *parameters: Tensor) -> Tensor:
        layers = len(parameters) // 2
        seen = [x]
        for i in range(layers):
            x = torch.addmm(parameters[2 * i + 1], x, parameters[2 * i].t())
            if i < activated:
                _activate_(x, activation)
            seen.append(x)
        ctx.save_for_backward(*seen, *parameters[::2])
        ctx.activation, ctx.activated, ctx.layers = activation, activated, layers
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        seen, weights = ctx.saved_tensors[: ctx.layers + 1], ctx.saved_tensors[ctx.layers + 1 :]
        grads: list[Tensor | None] = []
        for i in range(ctx.layers - 1, -1, -1):
            if i < ctx.activated:
                grad = _activation_backward(grad, seen[i + 1], ctx.activation)
            grads += [grad.sum(0), _outer(grad, seen[i])]
            if i > 0 or ctx.needs_input_grad[0]:
                grad = grad @ weights[i]
        return grad if ctx.needs_input_grad[0] else None, None, None, *reversed(grads)


def _activate_(x: Tensor, activation: str) -> None:
    """In place. NumPy's float32 tanh is several times as fast as torch's, and the same that acting uses."""
    if activation == "tanh":
        array = x.numpy()
        np.tanh(array, out=array)
    else:
        x.relu_()


def _activation_backward(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(grad, y)
    return torch.ops.aten.threshold_backward(grad, y, 0)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x; the narrow matrix goes first, which MKL multiplies up to four times as fast."""
    return grad.t() @ x if grad.shape[1] <= x.shape[1] else (x.t() @ grad).t()


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

    def value(self, obs: Tensor) -> Tensor:
        """[N, features] to [N]."""
        return self.critic(obs).squeeze(1)

    def log_prob_and_entropy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (density) of `actions`, as stored, and entropy of the distribution they came from, each [N]."""
        outputs = self.actor(obs)
        if self.log_std is not None:
            return gaussian(outputs, self.log_std, actions)
        if len(self._nvec) == 1:
            return categorical(outputs, actions.reshape(-1))
        parts = [categorical(o, a) for o, a in zip(outputs.split(self._nvec, 1), actions.unbind(1), strict=True)]
        return torch.stack([p[0] for p in parts]).sum(0), torch.stack([p[1] for p in parts]).sum(0)


def categorical(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities of int64 actions [N], entropies [N]) of logits [N, A]."""
    log_probs = F.log_softmax(logits, 1)
    chosen = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
    return chosen, -(log_probs.exp() * log_probs).sum(1)


def gaussian(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """(log-densities of actions [N, k], entropies [N]) for means [N, k] and log_std [k]."""
    z = (actions - mean) * (-log_std).exp()
    size, total = mean.shape[1], log_std.sum()
    log_prob = -0.5 * (z * z).sum(1) - (total + 0.5 * LOG_2PI * size)
    return log_prob, (total + 0.5 * (1 + LOG_2PI) * size).expand(len(mean))


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
        advantage = self.advantage(x)
        if self.state_value is None:
            return advantage
        return self.state_value(x) + advantage - advantage.mean(1, keepdim=True)


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

    def clip_grad(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` if it is longer, and return the norm that it had."""
        norm = torch.linalg.vector_norm(self.grad)
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
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

    def step(self, learning_rate: float) -> None:
        """Move the parameters along their gradient."""
        self.steps += 1
        (beta1, beta2), grad = self._betas, self._parameters.grad
        self._mean.lerp_(grad, 1 - beta1)
        self._square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        divisor = self._square.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(self._eps)
        self._parameters.vector.addcdiv_(self._mean, divisor, value=-learning_rate / (1 - beta1**self.steps))

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
