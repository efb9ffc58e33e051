"""Several processes that train one model together: torchrun --nproc-per-node 2 ...

    passes      every process computes its own; gradients are added over all of them
    experts     each process holds a share of every layer's; tokens travel to their experts and back
    the rest    trained parameters are sharded (FSDP2): a sublayer's are gathered while it is computed; frozen weights
                lie in the mapped checkpoint, or on every device
    checkpoint  each process writes what it holds; any number of processes reads it

Over gloo on CPUs, over NCCL on GPUs. All processes must compute the same number of passes: `Team.share` sees to that.

Source: FSDP2, `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ossia.errors import CheckpointError
from ossia.model.safetensors_file import DTYPES, header_bytes, map_file, read_header
from ossia.ops.autograd import Experts
from ossia.train.module import Model

B = TypeVar("B")


class Extent(NamedTuple):
    """Which rows of a whole tensor a process holds."""

    first: int
    shape: tuple[int, ...]  # of the whole


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them. An `ossia.ops.autograd.Exchange`."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @classmethod
    def join(cls, device: str = "cpu") -> Team | None:
        """The team that torchrun made this process a part of; None where it was started alone."""
        if not dist.is_torchelastic_launched():
            return None
        if device == "cuda":
            torch.cuda.set_device(dist.get_node_local_rank())
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(device), mesh)

    def leave(self) -> None:
        """Wait for the others and part."""
        dist.barrier()
        dist.destroy_process_group()

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
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def share(self, passes: Sequence[B]) -> list[tuple[B, bool]]:
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
        of_experts = {parameter for layer in model.weights.layers for parameter in layer.experts.parameters()}
        for layer in model.layers:
            for sublayer in layer.children():
                if any(parameter not in of_experts for parameter in sublayer.parameters()):
                    fully_shard(sublayer, mesh=self.mesh, ignored_params=of_experts)
        if any(parameter not in of_experts for parameter in model.parameters()):
            fully_shard(model, mesh=self.mesh, ignored_params=of_experts)
            for name in ("hidden", "logprobs", "logprobs_of"):
                register_fsdp_forward_method(model, name)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A step's weight divides the loss: gradients are added, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """The norm of all gradients of all processes, of which each holds a part."""
        parts = [local(gradient).double().square().sum() for gradient in gradients]
        total = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.sqrt()


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


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# Checkpoints that any number of processes reads -----------------------------------------------------------------------


def extents(model: Model) -> dict[str, Extent]:
    """Of every trained tensor, by its name in `Model.state`: the rows that this process holds."""
    held: dict[str, Experts] = {f"layers.{i}.experts": layer.experts for i, layer in enumerate(model.weights.layers)}
    result = {}
    for name, parameter in model.state().items():
        experts = held.get(".".join(name.split(".")[:3]))
        if experts is not None:
            result[name] = Extent(experts.first, (experts.num_experts, *parameter.shape[1:]))
        elif isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            # Rows are dealt out as torch.chunk does it.
            step = -(-parameter.shape[0] // mesh.size())
            first = min(step * mesh.get_local_rank(), parameter.shape[0])
            result[name] = Extent(first, tuple(parameter.shape))
        else:
            result[name] = Extent(0, tuple(parameter.shape))
    return result


def write_shard(folder: Path, name: str, tensors: Mapping[str, Tensor], held: Mapping[str, Extent], team: Team) -> Path:
    """Write what this process holds of some tensors as ``folder``/NAME-00001-of-00002.safetensors.

    ``held`` tells the rows of each; those that every process holds whole are written by the first alone.
    """
    path = folder / f"{name}-{team.rank + 1:05}-of-{team.size:05}.safetensors"
    own = {}
    for key, tensor in tensors.items():
        part, extent = local(tensor.detach()), held[key]
        is_whole = tuple(part.shape) == extent.shape
        if part.numel() and (not is_whole or team.rank == 0):
            own[key] = (part.to("cpu").contiguous(), extent)
    whole = {key: list(extent.shape) for key, (_, extent) in own.items()}
    first = {key: extent.first for key, (_, extent) in own.items()}
    ordered = dict(sorted(own.items(), key=lambda item: -item[1][0].element_size()))
    with open(path, "wb") as file:
        file.write(header_bytes({key: (_NAMES[part.dtype], tuple(part.shape)) for key, (part, _) in ordered.items()}))
        for part, _ in ordered.values():
            file.write(part.numpy().tobytes())
    index = {"files": team.size, "first": first, "shape": whole}
    path.with_suffix(".json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    return path


def read_shards(folder: Path, name: str, into: Mapping[str, Tensor], held: Mapping[str, Extent]) -> None:
    """Fill what this process holds of some tensors, whatever the number of processes that wrote them.

    Raises CheckpointError when files are missing or a tensor is not whole.
    """
    paths = sorted(folder.glob(f"{name}-*-of-*.json"))
    indices = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not paths or any(index["files"] != len(paths) for index in indices):
        expected = indices[0]["files"] if indices else "some"
        raise CheckpointError(f"{folder} holds {len(paths)} shards of {name}; expected {expected}. Copy it again.")
    files = [path.with_suffix(".safetensors") for path in paths]
    opened = [(index, read_header(file), map_file(file)) for index, file in zip(indices, files, strict=True)]
    with torch.no_grad():
        for key, tensor in into.items():
            part, extent = local(tensor), held[key]
            if not part.numel():
                continue
            end = extent.first + part.shape[0]
            filled = 0
            for index, header, mapped in opened:
                if key not in header:
                    continue
                if tuple(index["shape"][key]) != extent.shape:
                    raise CheckpointError(f"{folder}: {key} has shape {index['shape'][key]}; expected {extent.shape}.")
                entry = header[key]
                values = mapped[entry.offset : entry.offset + entry.size_bytes].view(DTYPES[entry.dtype])
                first = index["first"][key]
                low, high = max(first, extent.first), min(first + entry.shape[0], end)
                if low < high:
                    rows = torch.from_numpy(np.array(values.reshape(entry.shape)[low - first : high - first]))
                    part[low - extent.first : high - extent.first] = rows.to(part.device, part.dtype)
                    filled += high - low
            if filled != part.shape[0]:
                raise CheckpointError(f"{folder}: {filled} of {part.shape[0]} rows of {key} are there. Copy it again.")


_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
