"""Several processes that train one model together: torchrun --nproc-per-node 2 -m ossia train sft ...

    passes      every process computes its own; gradients are added over all of them
    experts     each process holds a share of every layer's; tokens travel to their experts and back
    the rest    trained parameters are sharded (FSDP2): a sublayer's are gathered while it is computed; frozen weights
                lie in the mapped checkpoint, or on every device
    or nothing  a small model is whole in each process (`replicate`): only gradients travel, once a step
    files       the first process alone writes the log and the result; of a checkpoint each writes what it holds

Over gloo on CPUs, over NCCL on GPUs. A process that torchrun did not start is a team of one, in which nothing travels.
All processes must do the same in the same order: `Team.share` and `Team.first` see to that.

Source: FSDP2, `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ossia.errors import OssiaError, UnavailableError
from ossia.ops.autograd import Experts
from ossia.train.module import Model
from ossia.train.shards import Extent, is_sharded, local

T = TypeVar("T")
R = TypeVar("R")

# The others wait while the first process reads all data. One that has ended is told by torchrun, not by the clock.
_LONGEST_WAIT = timedelta(days=1)
_CPU = torch.device("cpu")


def end_process(status: int) -> None:
    """End a process of a run that torchrun started, without the interpreter's own end; any other goes on.

    torch keeps gloo's threads beyond `destroy_process_group` where a mesh holds the group, and what such a thread still
    has to give back may meet an interpreter that is being torn down: the process then aborts though its work is done.
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them. An `ossia.ops.autograd.Exchange`.

    As a context it waits for the others at its end, and names the process in an error.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    num_machines: int = 1
    mesh: DeviceMesh | None = None
    replicates: bool = False

    @classmethod
    def join(cls, device: torch.device = _CPU, *, replicates: bool = False) -> Team:
        """The team that torchrun made this process a part of; a team of one where it was started alone.

        ``replicates``: each process has the whole model.
        """
        if not dist.is_torchelastic_launched():
            return cls(device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        team = cls(dist.get_rank(), dist.get_world_size(), device, mesh=mesh, replicates=replicates)
        (num_machines,) = team.sums([dist.get_node_local_rank() == 0])
        return replace(team, num_machines=int(num_machines))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.mesh is None:
            return
        if error is None:
            dist.barrier()
            dist.destroy_process_group()
        elif self.size > 1 and isinstance(error, OssiaError):
            error.message = f"process {self.rank + 1} of {self.size}: {error.message}"
        elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise UnavailableError(
                f"process {self.rank + 1} of {self.size}: another process of the run has ended; it says why itself"
            ) from error

    @property
    def exchange(self) -> Team | None:
        """What a model that this team trains is opened with."""
        return self if self.size > 1 and not self.replicates else None

    # What is agreed upon ---------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all of them; its error ends them all. It must be picklable."""
        if self.size == 1:
            return make()
        told: list[Any] = [False, None]
        try:
            if self.rank == 0:
                told = [True, make()]
        finally:
            dist.broadcast_object_list(told, device=self.device)
        if not told[0]:
            raise UnavailableError("the first process has ended with an error; its own message says which")
        made: T = told[1]
        return made

    def each(self, value: T) -> list[T]:
        """What every process has, in their order, on all of them. It must be picklable."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def deal(self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """What ``do`` makes of all items, in order, on all processes, each of which does a block of them. It must be
        picklable.
        """
        if self.size == 1:
            return list(do(items))
        block = -(-len(items) // self.size)
        own = do(items[self.rank * block : (self.rank + 1) * block])
        return [one for made in self.each(list(own)) for one in made]

    # What travels ---------------------------------------------------------------------------------------------------

    def send(self, rows_SD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        to_others = counts_E.view(self.size, -1).contiguous()
        from_others = torch.empty_like(to_others)
        dist.all_to_all_single(from_others, to_others)
        splits = (to_others.sum(dim=1).tolist(), from_others.sum(dim=1).tolist())
        own = torch.arange(from_others.shape[1], device=counts_E.device).repeat(self.size)
        expert_R = own.repeat_interleave(from_others.reshape(-1))
        came_RD: Tensor = _Exchanged.apply(rows_SD, *splits)  # type: ignore[no-untyped-call]
        return came_RD, expert_R, splits

    def give_back(self, rows_RD: Tensor, sent: Any) -> Tensor:
        back_SD: Tensor = _Exchanged.apply(rows_RD, *reversed(sent))  # type: ignore[no-untyped-call]
        return back_SD

    def sums(self, values: Sequence[float]) -> list[float]:
        """Numbers added over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def share(self, passes: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's passes, and whether each counts: where they do not divide alike, one is computed for nothing.

        A pass that does not count must go through the model, forward and backward, with weights of 0: the others wait
        for it.
        """
        rounds = -(-len(passes) // self.size)
        mine = range(self.rank, rounds * self.size, self.size)
        return [(passes[i % len(passes)], i < len(passes)) for i in mine]

    # The model ------------------------------------------------------------------------------------------------------

    def shard(self, model: Model) -> None:
        """Spread the trained parameters of a model that was opened with this team as its ``exchange``.

        From then on its public methods gather what they need; `Model.state` gives each process its own part.
        """
        if self.exchange is None:
            return
        # Imported here: it takes a second, which one process alone does not need.
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        of_experts = {parameter for layer in model.weights.layers for parameter in layer.experts.parameters()}
        for layer in model.layers:
            for sublayer in layer.children():
                if any(parameter not in of_experts for parameter in sublayer.parameters()):
                    fully_shard(sublayer, mesh=self.mesh, ignored_params=of_experts)
        if any(parameter not in of_experts for parameter in model.parameters()):
            # By default what is left for the model itself would stay gathered after a forward pass without gradients.
            fully_shard(model, mesh=self.mesh, ignored_params=of_experts, reshard_after_forward=True)
            for name in ("hidden", "logprobs", "logprobs_of"):
                register_fsdp_forward_method(model, name)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A step's weight divides the loss: gradients are added, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """The norm of all gradients, of which a process holds a part, or all where it has the whole model; float64."""
        parts = [torch.linalg.vector_norm(local(gradient), dtype=torch.float64) for gradient in gradients]
        total = torch.stack(parts).square().sum() if parts else torch.zeros((), dtype=torch.float64, device=self.device)
        if self.exchange is not None:
            dist.all_reduce(total)
        return total.sqrt()

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Gradients added over all processes, where each has the whole model and computed its own passes."""
        if self.size == 1 or not self.replicates:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        together_N = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(together_N)
        for gradient, total_N in zip(gradients, _cut(together_N, gradients), strict=True):
            gradient.copy_(total_N.view_as(gradient))

    def divided(self, compute: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """``compute`` of each tensor, which gives one of its shape, each by one process and then on all of them."""
        work = [0] * self.size
        owners = []
        for one in inputs:
            owners.append(min(range(self.size), key=work.__getitem__))
            work[owners[-1]] += one.numel()
        outputs = [
            compute(one) if owner == self.rank else torch.empty_like(one)
            for one, owner in zip(inputs, owners, strict=True)
        ]
        for rank in set(owners) if self.size > 1 else ():
            own = [output for output, owner in zip(outputs, owners, strict=True) if owner == rank]
            together_N = torch.cat([output.reshape(-1) for output in own])
            dist.broadcast(together_N, rank)
            for output, part_N in zip(own, _cut(together_N, own), strict=True):
                output.copy_(part_N.view_as(output))
        return outputs

    def whole(self, tensors: Mapping[str, Tensor], held: Mapping[str, Extent]) -> dict[str, Tensor]:
        """Tensors put together from all processes, for the first one, on the CPU; for the others nothing.

        ``held`` are the extents of what this process has of them.
        """
        if self.size == 1:
            return dict(tensors)
        found = {}
        for name, tensor in tensors.items():
            gathered = tensor.detach()
            if is_sharded(gathered):
                gathered = gathered.full_tensor()  # type: ignore[attr-defined]
            elif gathered.shape != held[name].shape:
                # Experts, of which every process holds as many.
                gathered = gathered.new_empty(held[name].shape)
                dist.all_gather_into_tensor(gathered, tensor.detach().contiguous())
            if self.rank == 0:
                found[name] = gathered.to("cpu", copy=True)
        return found


def _cut(together_N: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that were laid end to end, flat."""
    return list(torch.split(together_N, [one.numel() for one in like]))


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, to_others: list[int], from_others: list[int]) -> Tensor:
        ctx.to_others, ctx.from_others = to_others, from_others
        return _exchange(rows, to_others, from_others)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(gradients[0], ctx.from_others, ctx.to_others), None, None


def _exchange(rows: Tensor, to_others: list[int], from_others: list[int]) -> Tensor:
    out = rows.new_empty((sum(from_others), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), from_others, to_others)
    return out


def extents(model: Model) -> dict[str, Extent]:
    """Of every trained tensor, by its name in `Model.state`: the rows that this process holds."""
    held: dict[str, Experts] = {f"layers.{i}.experts": layer.experts for i, layer in enumerate(model.weights.layers)}
    result = {}
    for name, parameter in model.state().items():
        num_rows = len(local(parameter))
        experts = held.get(".".join(name.split(".")[:3]))
        if experts is not None:
            result[name] = Extent(experts.first, num_rows, (experts.num_experts, *parameter.shape[1:]))
        elif is_sharded(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            # Rows are dealt out as torch.chunk does it.
            step = -(-parameter.shape[0] // mesh.size())
            result[name] = Extent(
                min(step * mesh.get_local_rank(), parameter.shape[0]), num_rows, tuple(parameter.shape)
            )
        else:
            result[name] = Extent(0, num_rows, tuple(parameter.shape))
    return result
