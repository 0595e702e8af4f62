"""Launches of Triton kernels on CPU tensors, run on a device: what they see is copied there and
back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


def install(device: str = "cuda") -> None:
    """From here on all launches of this process."""
    run_there = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> None:
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # storages' bytes, here and there

        def there(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(there, value))
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in copies:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                copies[storage.data_ptr()] = here, here.to(device, copy=True)
            copy = copies[storage.data_ptr()][1].untyped_storage()
            view = torch.empty(0, dtype=value.dtype, device=device)
            return view.set_(copy, value.storage_offset(), value.shape, value.stride())

        arguments = {name: there(value) for name, value in kwargs.items()}
        run_there(kernel, *map(there, args), grid=grid, warmup=warmup, **arguments)
        for here, copy in copies.values():
            here.copy_(copy)

    JITFunction.run = run
