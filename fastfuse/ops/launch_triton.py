"""Launches of Triton kernels, with little host time.

Triton binds and inspects every argument of a launch, 12 to 24 us, to find what it compiled. But all
that is no tensor follows from shapes: an op's launcher plans it once for each (``planned``), as
:class:`Launch`, and what is left to ask is each tensor's dtype and alignment.

Kernels take tensors first, then integers, then constants. Sizes that tell the compiler nothing are
``do_not_specialize``: Triton compiles anew for an argument that is 1, or the first multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = [
    "Launch", "OnDevice", "cdiv", "forget_plans", "memory_format", "planned", "power_of_two",
]  # fmt: skip

PLANS = 1024  # kept of each launcher, the latest used ones

_Plan = TypeVar("_Plan")
_forget: list[Callable[[], None]] = []


def planned(plan: Callable[..., _Plan]) -> Callable[..., _Plan]:
    """Keeps what a function of shapes, strides, dtypes, devices and numbers returned."""
    kept = lru_cache(PLANS)(plan)
    _forget.append(kept.cache_clear)
    return kept


def forget_plans() -> None:
    """After a change of what plans are made from."""
    for forget in _forget:
        forget()


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def cdiv(n: int, divisor: int) -> int:
    return -(-n // divisor)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


class OnDevice:
    """What a device's current stream runs: called with tensors, wherever the host is."""

    __slots__ = ("device",)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, *tensors: Any) -> None:
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self._launch(tensors)
        else:
            self._launch(tensors)

    def _launch(self, tensors: tuple[Any, ...]) -> None:
        raise NotImplementedError


class Launch(OnDevice):
    """A launch of a kernel but for its tensors, with which it is called.

    Args:
        kernel: of ``triton.jit``; the device's current stream runs it.
        programs: how many.
        integers: what follows the tensors.
        constants: by name, the kernel's constants and the options of its compilation.
    """

    __slots__ = ("_compiled", "constants", "integers", "kernel", "programs", "values")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        integers: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        super().__init__(device)
        self.kernel, self.programs = kernel, programs
        self.integers, self.constants = integers, {"enable_fp_fusion": True, **constants}
        names = [name for name in kernel.arg_names if name in constants]
        self.values = (*integers, *[constants[name] for name in names])
        self._compiled: dict[Any, tuple[CompiledKernel, Any, Any]] = {}

    def _launch(self, tensors: tuple[Any, ...]) -> None:
        kinds = tuple([_kind(tensor) for tensor in tensors])
        found = self._compiled.get(kinds)
        if found is None:
            compiled = self.kernel[(self.programs,)](*tensors, *self.integers, **self.constants)
            if isinstance(compiled, CompiledKernel):  # the interpreter has none
                self._compiled[kinds] = compiled, compiled.run, compiled.function
        elif _is_watched():
            found[0][(self.programs, 1, 1)](*tensors, *self.values)
        else:
            compiled, run, function = found
            stream = driver.active.get_current_stream(self.device.index or 0)
            run(
                self.programs, 1, 1, stream, function, compiled.packed_metadata, None, None, None,
                *tensors, *self.values,
            )  # fmt: skip


def _is_watched() -> bool:
    """Whether somebody, such as a profiler, has asked Triton to be told of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _kind(value: Any) -> Any:
    """What Triton compiles for of a tensor, or of what a tuple has."""
    if value is None or type(value) is int:  # one that is no tensor's, such as a stride in a tuple
        return value
    if type(value) is tuple:
        return tuple([_kind(part) for part in value])
    tensor: Tensor = value
    return tensor.dtype, tensor.data_ptr() % 16 == 0
