"""Inputs and parametrizations that the tests of ops share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfuse import _extension
from fastfuse.backends import DTYPES
from fastfuse.ops.policy import policy_of, use_policy

ISAS = _extension.module.supported_isas() if _extension.module else []
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
both_corners = pytest.mark.parametrize("align_corners", [False, True], ids=["half", "corners"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype."""
    return torch.promote_types(dtype, torch.float32)


def alternating(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Parameters for all pairs, half of them slow; the others have every value of either."""
    return [
        pytest.param(a, b, marks=[pytest.mark.slow] if (i + j) % 2 else [])
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def slowly(*values: Any) -> Any:
    """A case of a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def fast_and_slow(
    names: str,
    fast: Iterable[tuple[Any, ...]],
    slow: Iterable[tuple[Any, ...]],
    ids: Callable[[Any], str] | None = None,
) -> pytest.MarkDecorator:
    """Parametrizes with both; those of ``slow`` that are not among ``fast`` are slow tests."""
    fast = dict.fromkeys(fast)
    rest = (values for values in dict.fromkeys(slow) if values not in fast)
    return pytest.mark.parametrize(names.split(), [*fast, *(slowly(*v) for v in rest)], ids=ids)


def images(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(s).to(dtype).contiguous(memory_format=memory_format) for s in shapes]


def pyramid(**options: Any) -> list[Tensor]:
    return images((2, 20, 12, 16), (2, 17, 6, 8), (2, 5, 3, 4), **options)


STRIDES = ["contiguous", "channels_last", "sliced"]


def of_strides(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A random image of one of ``STRIDES``."""
    if layout == "sliced":
        n, c, h, w = shape
        return torch.randn(n, c + 3, h + 2, 2 * w).to(dtype)[:, 1:-2, 2:, ::2]
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """So small that no sum of some of their products is rounded before its end."""
    return torch.randint(-8, 9, shape).to(dtype)


@contextmanager
def streaming_from(nbytes: int) -> Iterator[None]:
    """CPU kernels write outputs of so many bytes past the caches, and none that are smaller."""
    policy = policy_of("cpu")
    assert policy.kernels is not None
    with use_policy(policy, kernels=dataclasses.replace(policy.kernels, stream_bytes=nbytes)):
        yield
