"""FLOPs and bytes of a call, and the bytes that it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from variants import CHANNELS_LAST

__all__ = ["count_work", "kept_bytes", "work"]


class _Bytes(TorchDispatchMode):
    """Counts the bytes of every op's operands and results; views have none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, results))
            self.count += sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        return results


def count_work(build: Callable[[], Callable[[], Any]]) -> tuple[int, int]:
    """FLOPs of the call that ``build`` returns, by the formulas of its ops, and bytes that these
    read and write; nothing is computed. What is built before holds real tensors, and may.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as flops:
        call = build()
        with _Bytes() as moved:
            call()
    return flops.get_total_flops(), moved.count


def work(build: Callable[..., Any], name: str, cell: Any, device: str) -> tuple[int, int]:
    """FLOPs and bytes of a variant of a cell, a compiled one's as its eager one's."""
    name = name.replace("compiled", "eager")
    arguments = (name, CHANNELS_LAST, cell.shape, cell.dtype, cell.mode, device)
    return count_work(lambda: build(*arguments))


def kept_bytes(call: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that ``call`` keeps for backward: every storage once, and none of ``parameters``."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:  # which stays alive, so that no address is used twice
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(nbytes for address, nbytes in kept.items() if address not in known)
