"""The CUDA route of composed ops on CPU tensors: its policy, and CPU stand-ins for what PyTorch and
the package have for CUDA tensors alone. Every call is recorded.

    with cuda_like() as calls:
        kernel.forward(...)
    assert calls.named("cudnn_convolution")

A mode does not see what is called within an op: kernels are called as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse.ops.policy import Machine, policy_of, use_policy

aten, ops = torch.ops.aten, torch.ops.fastfuse

# Of what allocates memory or looks at it in another way nothing is launched.
NO_LAUNCH = (
    "empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "promote_types",
)  # fmt: skip


class Calls(TorchDispatchMode):
    """What is called, in order: the op and its arguments, keywords too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Sequence[Any], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.found.append((func, args, kwargs))
        return _STAND_INS.get(func, func)(*args, **kwargs)

    def named(self, name: str) -> list[tuple[Sequence[Any], dict[str, Any]]]:
        """The arguments of the calls of an op."""
        return [(args, kwargs) for func, args, kwargs in self.found if func._opname == name]

    def launches(self) -> list[str]:
        """Names of the calls that launch something: once, but for some of this package's ops."""
        return [
            func._opname
            for func, *_ in self.found
            if func._opname not in NO_LAUNCH and not func.is_view
        ]


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    assert a.dtype == b.dtype in (torch.bfloat16, torch.float16)
    assert dtype == torch.float32
    return torch.mm(a.to(dtype), b.to(dtype))


def _mm_out(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert out.dtype == dtype
    return out.copy_(_mm(a, b, dtype))


def _convolution(
    x: Tensor, weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, *_: bool
) -> Tensor:
    assert x.dtype == weight.dtype
    return torch.conv2d(x, weight, None, stride, padding, dilation, groups)


def _transposed(
    x: Tensor, weight: Tensor, padding: Any, output_padding: Any, stride: Any, dilation: Any,
    groups: int, *_: bool,
) -> Tensor:  # fmt: skip
    assert x.dtype == weight.dtype
    return torch.conv_transpose2d(
        x, weight, None, stride, padding, output_padding, groups, dilation
    )


def _tap_sum_into(out: Tensor, taps: Sequence[Tensor], *arguments: Any) -> None:
    """As the Triton kernel: levels of any dtypes, sums in the accumulation dtype, rounded once."""
    if out.dtype == torch.float64:
        return ops.tap_sum_into(out, taps, *arguments)
    total = out.float()
    ops.tap_sum_into(total, [level.float() for level in taps], *arguments)
    out.copy_(total)


_STAND_INS: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype: _mm,
    aten.mm.dtype_out: _mm_out,
    aten.cudnn_convolution.default: _convolution,
    aten.cudnn_convolution_transpose.default: _transposed,
    ops.tap_sum_into.default: _tap_sum_into,
}


@contextmanager
def cuda_like(**changes: Any) -> Iterator[Calls]:
    """CPU tensors take the route of CUDA's, with some fields of its policy changed."""
    available = mock.patch("torch.backends.cudnn.is_available", return_value=True)
    with available, use_policy(policy_of("cuda"), machine=Machine(), **changes), Calls() as calls:
        yield calls
