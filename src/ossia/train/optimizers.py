"""AdamW and Muon over named parameters, as one optimiser that is saved and restored by the parameters' names; and a
mean of the weights over a run's steps.

Only matrices decay: biases, norms and sinks are kept out of it by their names, since the biases of a layer's experts
have two dimensions as well.

Sources  AdamW, arXiv:1711.05101. Muon, https://kellerjordan.github.io/posts/muon, with the scale of arXiv:2502.16982
         that lets it share AdamW's learning rate and decay; the steps' polynomials as in arXiv:2505.16932.
         Means of weights, polynomial-decay averaging, arXiv:1212.1824.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.train.shards import is_sharded, local

if TYPE_CHECKING:
    from ossia.train.parallel import Team

_VECTORS = ("bias", "norm", "sinks")
MEAN = "/mean"
"""Behind a parameter's name, where its mean is saved."""
_NOT_INNER = ("embedding", "router")
"""Matrices that stay with AdamW: their rows are tokens or experts, which are no directions of one space."""


class Optimizer:
    """All parameters' optimisers as one. ``learning_rate`` is set before each step.

    Processes of ``team`` that have the whole model each do a part of Muon's work for all of them.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        *,
        kind: Literal["adamw", "muon"] = "adamw",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        momentum: float = 0.95,
        team: Team | None = None,
    ) -> None:
        self.named = dict(named)
        inner = [name for name, p in self.named.items() if kind == "muon" and is_inner_matrix(name, p)]
        matrices = [p for name, p in self.named.items() if name not in inner and is_matrix(name, p)]
        vectors = [p for name, p in self.named.items() if name not in inner and not is_matrix(name, p)]
        # Fused AdamW takes parameters that are sharded, or that are not, but no mixture.
        groups = [
            {"params": chosen, "weight_decay": decay}
            for members, decay in ((matrices, weight_decay), (vectors, 0.0))
            for sharded in (False, True)
            if (chosen := [p for p in members if is_sharded(p) == sharded])
        ]
        self._parts: list[torch.optim.Optimizer] = []
        if groups:
            self._parts.append(torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=True))
        if inner:
            matrices = [self.named[name] for name in inner]
            self._parts.append(Muon(matrices, momentum=momentum, weight_decay=weight_decay, team=team))

    def step(self, learning_rate: float) -> None:
        """Move every parameter that has a gradient."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients, and give their memory back."""
        for parameter in self.named.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """What the optimiser remembers of what this process holds: ``parameter name/what`` to a tensor."""
        return {
            f"{name}/{key}": local(value)
            for name, parameter in self.named.items()
            for part in self._parts
            for key, value in part.state.get(parameter, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. Raises CheckpointError for parameters that are not these."""
        unknown = {key.rpartition("/")[0] for key in state} - set(self.named)
        if unknown:
            raise CheckpointError(
                f"the checkpoint's optimiser remembers {min(unknown)}, which is not trained here; resume with the "
                "settings of the run"
            )
        for part in self._parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    part.state.pop(parameter, None)
        owners = {id(p): part for part in self._parts for group in part.param_groups for p in group["params"]}
        for key, value in state.items():
            name, _, what = key.rpartition("/")
            parameter = self.named[name]
            # Fused AdamW counts its steps where the parameter lies, and takes for granted that what it remembers of a
            # parameter has its strides.
            laid = value.to(parameter.device)
            if laid.shape == local(parameter).shape:
                laid = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                local(laid).copy_(value)
            owners[id(parameter)].state[parameter][what] = laid


class WeightMean:
    """The mean of named parameters over steps 1 to N, where step i counts about as i ** ``power``.

    The last 1 - 0.5 ** (1 / (power + 1)) of them have half of the weight.
    """

    def __init__(self, named: Mapping[str, Tensor], power: float) -> None:
        self._named = named
        self._power = power
        self._means = {name: torch.zeros_like(local(parameter)) for name, parameter in named.items()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the parameters as step ``step``, counted from 1, has left them."""
        share = (self._power + 1) / (self._power + step)
        for name, parameter in self._named.items():
            self._means[name].lerp_(local(parameter), share)

    @torch.no_grad()
    def exchange(self) -> None:
        """Parameters and means change places; a second time, back."""
        for name, parameter in self._named.items():
            before = local(parameter).clone()
            local(parameter).copy_(self._means[name])
            self._means[name].copy_(before)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are the means meanwhile."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def state(self) -> dict[str, Tensor]:
        """The means of what this process holds, as ``parameter name/mean``."""
        return {f"{name}{MEAN}": mean for name, mean in self._means.items()}

    def load(self, means: Mapping[str, Tensor]) -> None:
        """Go on from these, by the parameters' names."""
        for name, mean in self._means.items():
            mean.copy_(means[name])


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz steps. Parameters [..., O, I]: leading axes are many matrices."""

    def __init__(
        self, params: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.0, team: Team | None = None
    ) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self._team = team

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; ``closure`` is not used."""
        for group in self.param_groups:
            parameters: list[Tensor] = [one for one in group["params"] if one.grad is not None]
            moved = [self._moved(one, one.grad, group) for one in parameters if one.grad is not None]
            if self._team is not None and self._team.replicates:
                updates = self._team.divided(_orthogonalized, moved)
            else:
                updates = [_orthogonalized(one_OI) for one_OI in moved]
            for parameter, update_OI in zip(parameters, updates, strict=True):
                # An update of AdamW has a root mean square of about 0.2; an orthogonal one of 1 / sqrt(larger side).
                scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update_OI.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _moved(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The gradient with its momentum, as Nesterov has it."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        return torch.lerp(gradient, momentum, group["momentum"])


def _orthogonalized(moved_OI: Tensor) -> Tensor:
    """`orthogonalize`, of a sharded matrix as a whole: each process does it and keeps its rows."""
    if not is_sharded(moved_OI):
        return orthogonalize(moved_OI)
    # Imported here, as `Team.shard` does it.
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(moved_OI, DTensor)
    whole_OI: Any = orthogonalize(moved_OI.redistribute(placements=[Replicate()]))
    part_OI: Tensor = whole_OI.redistribute(placements=moved_OI.placements)
    return part_OI


# Each step draws the singular values that the one before it left, at first those from 0.003 to 1, as near to 1 as a
# polynomial x (a + b x^2 + c x^4) can; the last leaves them between 0.8 and 1.2.
_NEWTON_SCHULZ = (
    (8.3837, -24.7661, 18.3573),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)


def orthogonalize(g_OI: Tensor) -> Tensor:
    """U V^T of G = U S V^T, roughly: singular values come out between 0.8 and 1.2, which serves as well as 1.

    Those below 0.003 of the Frobenius norm come out smaller.
    """
    # bfloat16 is enough for the iteration, and fast where a GPU has units for it; a CPU gains nothing.
    x_BOI = g_OI.to(torch.bfloat16 if g_OI.is_cuda else torch.float32).reshape(-1, *g_OI.shape[-2:])
    is_tall = x_BOI.shape[-2] > x_BOI.shape[-1]
    if is_tall:
        x_BOI = x_BOI.mT
    x_BOI = x_BOI / (x_BOI.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in _NEWTON_SCHULZ:
        gram_BOO = x_BOI @ x_BOI.mT
        x_BOI = torch.baddbmm(x_BOI, torch.baddbmm(gram_BOO, gram_BOO, gram_BOO, beta=b, alpha=c), x_BOI, beta=a)
    return (x_BOI.mT if is_tall else x_BOI).reshape(g_OI.shape)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for this parameter."""
    return parameter.ndim >= 2 and not any(word in name for word in _VECTORS)


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for this parameter; "embedding" is also in the name of the unembedding."""
    return is_matrix(name, parameter) and not any(word in name for word in _NOT_INNER)
