"""Networks of the learning half, their parameters as one vector, and Adam on it. Only the learner imports this module.

They go without autograd, as their layers do (`layers`). What comes after the last layer is computed in NumPy unless it is on
a GPU, for the same reason (`losses.near`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from aiorl.acting import LOG_2PI
from aiorl.convolution import Convolutions
from aiorl.envs.spaces import Leaf
from aiorl.layers import MLP, apply_mlp, apply_network, draw_uniformly, grad_of, make_network
from aiorl.losses import Values, module_of, near, tensor
from aiorl.segments import Array
from aiorl.trees import check_tree

T = TypeVar("T")
R = TypeVar("R")

__all__ = [
    "MLP", "ActorCritic", "Adam", "Categorical", "Evaluation", "FlatParameters", "Gaussian", "MultiCategorical", "QNetwork",
    "apply_mlp", "apply_network", "make_network", "torch_rng",
]  # fmt: skip

# -- policies ----------------------------------------------------------------------------------------------------------


class Categorical:
    """Log-probabilities and entropies [N] of logits [N, A] and int64 actions [N], all tensors or all arrays."""

    def __init__(self, logits: Values, actions: Values) -> None:
        module = module_of(logits)
        # Each action's numbers in a row: sums over rows are quick.
        columns = logits.t().contiguous() if module is torch else logits.T.copy()
        shifted = columns - module.amax(columns, 0)
        exps = module.exp(shifted)
        total = exps.sum(0)
        self._log_probs, self._probs = shifted - module.log(total), exps / total
        self._at = actions * len(logits) + module.arange(len(logits), **_place(logits))
        self.log_prob = module.take(self._log_probs, self._at)
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
        return module_of(d_log_prob).concatenate(parts, 1)


class Gaussian:
    """Log-densities and entropies [N] of means [N, k], log standard deviations [k] and actions [N, k]."""

    def __init__(self, mean: Values, log_std: Values, actions: Values) -> None:
        module = module_of(mean)
        self._inverse_std = module.exp(-log_std)
        self._z = (actions - mean) * self._inverse_std
        constant = log_std.sum() + 0.5 * LOG_2PI * mean.shape[1]
        self.log_prob = -0.5 * (self._z * self._z).sum(1) - constant
        self.entropy = module.broadcast_to(constant + 0.5 * mean.shape[1], self.log_prob.shape)
        self.d_log_std: Values = None

    def backward(self, d_log_prob: Values, d_entropy: float) -> Values:
        """Gradient of the means; leaves that of the log standard deviations in `d_log_std`."""
        weighted = self._z * d_log_prob[:, None]
        self.d_log_std = (weighted * self._z).sum(0) + (d_entropy * len(weighted) - d_log_prob.sum())
        return weighted * self._inverse_std


class ActorCritic(nn.Module):
    """Separate networks for the policy and the value. `log_std` exists for Box actions only."""

    def __init__(
        self, features: int, action: Leaf, hidden: Sequence[int], activation: str, rng: torch.Generator,
        log_std: float = 0.0, plan: Convolutions | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        outputs = action.size if action.kind == "box" else sum(action.nvec)
        self.actor = make_network(features, [*hidden, outputs], activation, rng, last_gain=0.01, plan=plan)
        self.critic = make_network(features, [*hidden, 1], activation, rng, last_gain=1.0, plan=plan)
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
            grad_of(self.net.log_std).copy_(tensor(self.distribution.d_log_std))
        self.net.critic.backward(self.critic, tensor(d_value[:, None]))


# -- action values -----------------------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """Action values of a discrete space; with `dueling`, as state value plus advantage (Wang et al. 2016, 1511.06581).

    The last hidden layer is then there twice, once for each: on layers shared to the end, both together would be one linear
    layer. With a single hidden layer all that they share is the convolutions, if there are any.
    """

    def __init__(
        self, features: int, actions: int, hidden: Sequence[int], activation: str, rng: torch.Generator, *, dueling: bool,
        plan: Convolutions | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        shared, gain = len(hidden) - dueling, math.sqrt(2)
        self.torso = make_network(features, hidden[:shared], activation, rng, last_gain=gain, activate_last=True, plan=plan)
        own = [plan.dense_features if plan else features, *hidden][shared:]
        self.advantage = MLP([*own, actions], activation, rng, last_gain=1.0)
        self.state_value = MLP([*own, 1], activation, rng, last_gain=1.0) if dueling else None
        # As Mnih et al. 2015 do (torch's default). What large orthogonal weights say at first is long bootstrapped from: in
        # MinAtar's Asterix DQN then began to learn at twice as many env steps.
        draw_uniformly(self, rng)

    def forward(self, obs: Tensor) -> Tensor:
        """[N, features] to [N, actions]."""
        x = self.torso(obs)
        return self._combine(self.advantage(x), None if self.state_value is None else self.state_value(x))

    def trace(self, obs: Tensor) -> list[Tensor]:
        """The torso's trace, the hidden layers of the streams if they have any, advantage first, and the action values."""
        torso = self.torso.trace(obs)
        _, *own, advantage = self.advantage.trace(torso[-1])
        if self.state_value is None:
            return [*torso, *own, advantage]
        _, *values_own, value = self.state_value.trace(torso[-1])
        return [*torso, *own, *values_own, self._combine(advantage, value)]

    def _combine(self, advantage: Tensor, value: Tensor | None) -> Tensor:
        return advantage if value is None else value + advantage - advantage.mean(1, keepdim=True)

    def backward(self, seen: Sequence[Tensor], grad: Tensor) -> None:
        """Set the parameters' gradients from the action values' [N, actions]."""
        if self.state_value is None:
            *torso, _ = seen
            d_x = self.advantage.backward(torso[-1:], grad, to_input=True)
        else:
            *torso, advantage, value, _ = seen
            total = grad.sum(1, keepdim=True)
            d_x = self.advantage.backward([torso[-1], advantage], grad - total / grad.shape[1], to_input=True)
            d_x = d_x + self.state_value.backward([torso[-1], value], total, to_input=True)  # type: ignore[operator]
        self.torso.backward(torso, d_x)  # type: ignore[arg-type]


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

    def mean_grad(self, parts: Sequence[T], gradient: Callable[[T], R]) -> list[R]:
        """Call `gradient`, which sets the gradient, for each part, and leave the mean of them all."""
        if len(parts) == 1:
            return [gradient(parts[0])]
        total, found = torch.zeros_like(self.grad), list[R]()
        for part in parts:
            found.append(gradient(part))
            total.add_(self.grad, alpha=1 / len(parts))
        self.grad.copy_(total)
        return found

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


FLUSH_EVERY = 32  # steps
TINY = float(torch.finfo(torch.float32).tiny)


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on a parameter vector, with its state in the open.

    The mean of a gradient that stays zero (of a unit that is dead, of an input that is never on) would fall until it is
    subnormal and stay there, and a processor takes a hundred times as long for such numbers. What is about to get there is
    set to zero, in its place, which moves no parameter: it is far below `eps`.
    """

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
        if self.steps % FLUSH_EVERY == 0:
            for state, beta in ((self._mean, beta1), (self._square, beta2)):
                state.masked_fill_(state.abs() < TINY / max(beta, 0.5) ** FLUSH_EVERY, 0.0)

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
