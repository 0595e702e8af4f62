"""One process, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import (
    all_reduce,
    barrier,
    broadcast,
    destroy_process_group,
    init_process_group,
)
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def sum(self, values: Tensor) -> Tensor:
        """Over all; in place."""
        if self.world > 1:
            all_reduce(values)
        return values

    def wait(self) -> None:
        """For all others."""
        if self.world > 1:
            barrier()

    def normalize(self, model: nn.Module, device: torch.device) -> None:
        """BatchNorm over the batches of all where PyTorch can: SyncBatchNorm is CUDA's."""
        if self.world > 1 and device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def share_buffers(self, model: nn.Module) -> None:
        """The first one's running statistics to all, as DistributedDataParallel does in forward."""
        if self.world > 1:
            for buffer in model.buffers():
                broadcast(buffer, 0)

    def wrapped(self, objective: nn.Module) -> nn.Module:
        return DistributedDataParallel(objective) if self.world > 1 else objective


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Joined for as long as the body runs, as torchrun's environment says."""
    if "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        group = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
        yield group
        group.wait()  # gloo aborts a process whose peers have left it
    finally:
        destroy_process_group()
