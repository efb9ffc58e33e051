"""One model on several GPUs of a machine, a process for each: torchrun --nproc-per-node 2 -m ossia serve --backend gpu

    the first process   has the engine and all that is above it; before each pass it tells the others the batch
    every process       computes its share of each sublayer (`ossia.model.share`); what they add to x is summed over all
    at the end          the logits of all shares of the vocabulary come together

Batches travel over a local socket, at which the others wait for as long as there is nothing to do; activations over
NCCL on GPUs, over gloo on CPUs. Every process launches the same passes in the same order, recorded ones too. A pass
that fails in one process is one that the others cannot end: then all do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ossia.engine.config import EngineConfig
from ossia.engine.gpu_runner import (
    GpuRunner,
    card_memory,
    load_gpu_runner,
    load_onto_card,
    pass_tokens,
    run_joined,
)
from ossia.engine.request import Scored
from ossia.engine.sampler import Asked, Draw, Sampled
from ossia.errors import ConfigError, OssiaError, UnavailableError
from ossia.model.adapted import HeldAdapter
from ossia.model.adapter import Adapter
from ossia.model.share import Share, part
from ossia.model.transformer import Weights, hidden
from ossia.model.weights import Checkpoint
from ossia.ops import AdapterOps, Array, Batch
from ossia.ops.gpu import GpuOps

_log = logging.getLogger(__name__)

# One process may read its share from the disk for longer than another.
_LONGEST_WAIT = timedelta(hours=1)
# In which a process that has ended is seen to have.
_GRACE_S = 2.0


class _Pass(NamedTuple):
    """A batch, whose adapters are named by their keys."""

    batch: Batch
    # Adapters that no sequence goes through any more.
    dropped: tuple[bytes, ...]


class _Hold(NamedTuple):
    adapter: Adapter
    cache_key: bytes


_Message = _Pass | _Hold | None
"""What the first process tells the others; None: that was all."""


@dataclass(frozen=True)
class Team:
    """The processes that share a model, seen from one of them."""

    rank: int
    size: int
    # Of the first process one to each other one, in their order; of the others one to the first.
    links: tuple[Connection, ...]

    @classmethod
    def join(cls, device: torch.device) -> Team:
        """The team that torchrun made this process a part of, once all are there; alone, a team of one.

        Raises UnavailableError where there are fewer GPUs than processes, or several machines.
        """
        if not dist.is_torchelastic_launched():
            return cls(0, 1, ())
        is_card = device.type == "cuda"
        rank = dist.get_node_local_rank()
        if is_card:
            if rank >= torch.cuda.device_count():
                raise UnavailableError(
                    f"process {rank + 1} has no GPU: this machine shows {torch.cuda.device_count()}. Start as many "
                    "processes as there are GPUs."
                )
            torch.cuda.set_device(rank)
        own = torch.device("cuda", rank) if is_card else None
        dist.init_process_group("nccl" if is_card else "gloo", timeout=_LONGEST_WAIT, device_id=own)
        if dist.get_rank() != rank:
            raise UnavailableError("torchrun started processes on several machines; a model is shared on one alone")
        return cls(rank, dist.get_world_size(), _connect(rank, dist.get_world_size(), device))

    # What is said ---------------------------------------------------------------------------------------------------

    def tell(self, message: _Message) -> None:
        """Say something to all others, from the first process. Raises OSError if one has ended."""
        data = pickle.dumps(message)
        for link in self.links:
            link.send_bytes(data)

    def hear(self) -> _Message:
        """What the first process says next. Raises UnavailableError if that one has ended without a word."""
        try:
            message: _Message = self.links[0].recv()
        except (EOFError, OSError) as error:
            raise UnavailableError(
                f"{self._name(self.rank)}: {self._name(0)} has ended, and so does this one"
            ) from error
        return message

    def failure(self, error: Exception) -> UnavailableError:
        """What to raise where this process cannot go on: who was to blame. The team is at its end."""
        own = error.message if isinstance(error, OssiaError) else f"{type(error).__name__}: {error}"
        is_of_other = isinstance(error, dist.DistError | OSError) or "gloo" in own
        if not is_of_other and not isinstance(error, OssiaError):
            _log.error("%s failed", self._name(self.rank), exc_info=error)
        if self.rank:
            if is_of_other:
                own = "another process has ended, and so does this one; the first says which"
            else:
                with contextlib.suppress(OSError):
                    self.links[0].send(own)
            return UnavailableError(f"{self._name(self.rank)}: {own}")
        ended = wait(self.links, _GRACE_S)
        words = [(rank, _last_word(link)) for rank, link in enumerate(self.links, start=1) if link in ended]
        self.leave()
        if not words:
            return UnavailableError(f"{self._name(0)}: {own}")
        told = "; ".join(f"{self._name(rank)} has ended{': ' if word else ''}{word}" for rank, word in words)
        return UnavailableError(f"{told}. A model that is shared cannot go on without it: start the command again.")

    def is_dismissed(self) -> bool:
        """Whether the first process has said, amid a pass that it left, that this was all."""
        with contextlib.suppress(EOFError, OSError):
            return self.links[0].poll(_GRACE_S) and self.links[0].recv() is None
        return False

    def leave(self) -> None:
        """End this process's part: those that wait for it, amid a pass too, learn of it."""
        for link in self.links:
            link.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _name(self, rank: int) -> str:
        return f"process {rank + 1} of {self.size}"

    # What is computed -----------------------------------------------------------------------------------------------

    def add(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place of what each has."""
        dist.all_reduce(x)
        return x

    def gather(self, part_RV: Tensor, num_columns: int) -> Tensor:
        """The columns of all processes beside each other, for the first; for the others nothing of them."""
        if not len(part_RV):
            return part_RV.new_empty((0, num_columns))
        widest = -(-num_columns // self.size)
        padded_RV = torch.nn.functional.pad(part_RV, (0, widest - part_RV.shape[1]))
        all_NRV = padded_RV.new_empty((self.size, *padded_RV.shape))
        dist.all_gather_single(all_NRV.view(-1, widest), padded_RV)
        if self.rank:
            return part_RV[:, :0]
        parts = [part(num_columns, rank, self.size) for rank in range(self.size)]
        return torch.cat([all_NRV[rank, :, : one.stop - one.start] for rank, one in enumerate(parts)], dim=1)

    def least(self, value: int, device: torch.device) -> int:
        """The least of what all have."""
        least = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)


class TeamRunner(GpuRunner):
    """A share of a model on this process's card; on the first process, the runner of an engine."""

    def __init__(self, ops: GpuOps, share: Share, weights: Weights, options: EngineConfig, team: Team) -> None:
        # A block has one number everywhere.
        kv_memory = team.least(options.kv_memory_bytes, ops.device)
        super().__init__(ops, share.config, weights, replace(options, kv_memory_bytes=kv_memory))
        self._share = share
        self._team = team
        # Adapters are told from any thread.
        self._lock = threading.Lock()
        self._failed: UnavailableError | None = None
        # Of the first process: keys of adapters that are of no more use; of the others, all that they hold.
        self._dropped: list[bytes] = []
        self._adapters: dict[bytes, HeldAdapter] = {}

    # The first process ----------------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> Tensor:
        """As `Runner.run`, by all processes. Raises UnavailableError once one of them has failed."""
        self._tell(_Pass(replace(batch, adapters=tuple(one and one.cache_key for one in batch.adapters)), self._take()))
        with self._amid_a_pass():
            return super().run(batch)

    # Where the host first waits for a pass, a fault in it is seen.

    def sample(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[Sampled | Exception]:
        with self._amid_a_pass():
            return super().sample(logits_RV, draws)

    def score(self, logits_RV: Tensor, asked: Sequence[Asked]) -> list[Scored]:
        with self._amid_a_pass():
            return super().score(logits_RV, asked)

    def hold(self, adapter: Adapter) -> HeldAdapter:
        held = super().hold(self._share.adapter(adapter))
        # What it brings besides was looked at before.
        self._tell(_Hold(replace(adapter, base_copies={}), held.cache_key))
        weakref.finalize(held, self._dropped.append, held.cache_key)
        return held

    def close(self) -> None:
        """Tell the others that this was all."""
        with contextlib.suppress(OSError):
            self._team.tell(None)
        self._team.leave()

    @contextlib.contextmanager
    def _amid_a_pass(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = self._team.failure(error)
            raise self._failed from error
        except BaseException:
            # The others are amid the pass: there is no way back to the same place.
            self._failed = UnavailableError("a pass was interrupted; start the command again")
            raise

    def _tell(self, message: _Message) -> None:
        with self._lock:
            if self._failed is not None:
                raise UnavailableError(self._failed.message)
            try:
                self._team.tell(message)
            except OSError as error:
                self._failed = self._team.failure(error)
                raise self._failed from error

    def _take(self) -> tuple[bytes, ...]:
        return tuple(self._dropped.pop() for _ in range(len(self._dropped)))

    # The others -----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what the first process says until it says that this was all. Raises UnavailableError if one has failed."""
        while (message := self._team.hear()) is not None:
            try:
                self._obey(message)
            except Exception as error:
                if self._team.is_dismissed():
                    break
                raise self._team.failure(error) from error
        self._team.leave()

    def _obey(self, message: _Pass | _Hold) -> None:
        if isinstance(message, _Hold):
            self._adapters[message.cache_key] = super().hold(self._share.adapter(message.adapter))
            return
        for key in message.dropped:
            del self._adapters[key]
        named = message.batch.adapters
        super().run(replace(message.batch, adapters=tuple(key and self._adapters[key] for key in named)))

    # All ------------------------------------------------------------------------------------------------------------

    def _forward(self, ops: AdapterOps, weights: Weights, batch: Batch) -> Tensor:
        joins = self._can_join(ops, weights, batch)

        def run(layer: int, sublayer: Callable[..., Array], *arguments: Any) -> Array:
            own = run_joined(layer, sublayer, *arguments) if joins else sublayer(*arguments)
            return self._team.add(own)

        x_RD = hidden(ops, self.config, weights, batch, self._caches, run)
        return self._team.gather(ops.linear(x_RD, weights.unembedding), self.config.vocab_size)


def is_follower() -> bool:
    """Whether torchrun started this process beside a first one."""
    return dist.is_torchelastic_launched() and dist.get_node_local_rank() > 0


def load_team_runner(
    ops: AdapterOps, checkpoint: Checkpoint, options: EngineConfig, gpu_memory: int, num_processes: int
) -> GpuRunner:
    """As `load_gpu_runner`, with the processes that torchrun started: a `TeamRunner` where there are several.

    A card's passes are larger than ``options`` say where its memory allows.

    ``num_processes`` are those to be expected, 0 for any number. Raises ConfigError where there are others or where the
    model cannot be shared among them, UnavailableError where a process fails.
    """
    assert isinstance(ops, GpuOps)
    if ops.device.type == "cuda":
        tokens = pass_tokens(card_memory(ops.device).total, checkpoint.config, options)
        options = replace(options, max_batch_tokens=tokens)
    if num_processes > 1 and not dist.is_torchelastic_launched():
        raise ConfigError(
            f"tp is {num_processes}, and this process was started alone; start it as `torchrun --nproc-per-node "
            f"{num_processes} -m ossia ... --backend gpu --tp {num_processes}`",
            param="tp",
        )
    team = Team.join(ops.device)
    if num_processes not in (0, team.size):
        raise ConfigError(
            f"tp is {num_processes}, and torchrun started {team.size} process(es); give --nproc-per-node "
            f"{num_processes}",
            param="tp",
        )
    if team.size == 1:
        return load_gpu_runner(ops, checkpoint, options, gpu_memory)
    share = Share(checkpoint, team.rank, team.size)
    try:
        placed = load_onto_card(ops, share, options, gpu_memory)
        return TeamRunner(placed.ops, share, placed.weights, placed.options, team)
    except Exception as error:
        raise team.failure(error) from error


def _connect(rank: int, size: int, device: torch.device) -> tuple[Connection, ...]:
    """Local sockets between the first process and each other one."""
    if rank:
        told: list[Any] = [None, None]
        dist.broadcast_object_list(told, device=device)
        link = Client(told[0], authkey=told[1])
        link.send(rank)
        return (link,)
    key = os.urandom(32)
    with Listener(family="AF_UNIX", backlog=size, authkey=key) as listener:
        dist.broadcast_object_list([listener.address, key], device=device)
        links = [listener.accept() for _ in range(1, size)]
    by_rank = {int(link.recv()): link for link in links}
    return tuple(by_rank[other] for other in range(1, size))


def _last_word(link: Connection) -> str:
    """What a process that has ended said last, if anything."""
    try:
        return str(link.recv())
    except (EOFError, OSError):
        return ""
