"""fusion_conv2d's convolutions on CUDA devices: their settings, and the weight's gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_like import Calls, cuda_like
from inputs import images
from torch import Tensor

from fastfuse.ops.fusion_conv2d import cudnn
from fastfuse.tolerances import relative_error, tolerance

# batch, channels in and out, height, width
IMAGES = [(2, 3, 4, 5, 7), (1, 8, 1, 6, 4), (3, 1, 2, 1, 1), (1, 2, 3, 9, 1), (0, 3, 4, 5, 7)]
KERNELS = [(k, p) for k in (1, 3, 5) for p in range(k + 1)]


def convolved(
    shape: tuple[int, ...], k: int, padding: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """An image, a weight and the gradient of the convolution's result, channels_last."""
    batch, channels, out_channels, height, width = shape
    margin = 2 * padding - (k - 1)
    if min(height, width) + margin < 1:
        pytest.skip("leaves no pixel")
    x, weight, grad_output = images(
        (batch, channels, height, width), (out_channels, channels, k, k),
        (batch, out_channels, height + margin, width + margin), dtype=dtype, channels_last=True,
    )  # fmt: skip
    return x, weight, grad_output


def expected_gradients(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> Sequence[Tensor]:
    return torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), None, [1, 1], [padding] * 2, [1, 1], False,
        [0, 0], 1, [True, True, False],
    )[:2]  # fmt: skip


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize(("k", "padding"), KERNELS)
def test_the_weights_gradient(shape: tuple[int, ...], k: int, padding: int, poisoned: None) -> None:
    x, weight, grad_output = convolved(shape, k, padding)
    taps = cudnn.weight_gradient(grad_output, x, k, padding)
    _, expected = expected_gradients(grad_output, x, weight, padding)
    found = taps.view(k, k, *taps.shape[1:]).permute(2, 3, 0, 1)
    assert relative_error(found, expected) <= tolerance(torch.float64, reduction=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_gradient_is_wide(dtype: torch.dtype) -> None:
    x, weight, grad_output = convolved((2, 5, 3, 40, 50), 3, 1, dtype)
    with cuda_like() as calls:
        taps = cudnn.weight_gradient(grad_output, x, 3, 1)
    assert taps.dtype == torch.float32
    assert len(calls.named("mm")) == 9
    _, expected = expected_gradients(grad_output, x, weight, 1)
    found = taps.view(3, 3, *taps.shape[1:]).permute(2, 3, 0, 1)
    assert relative_error(found, expected) <= tolerance(torch.float32, reduction=4000)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize(("k", "padding"), KERNELS)
def test_convolutions(shape: tuple[int, ...], k: int, padding: int, enabled: bool) -> None:
    """Where cuDNN is disabled too, whose calls then there are none of."""
    x, weight, grad_output = convolved(shape, k, padding)
    with cuda_like() as calls, torch.backends.cudnn.flags(enabled=enabled):
        bias = torch.randn(weight.shape[0], dtype=x.dtype)
        out = cudnn.convolve(x, weight, bias, padding)
        gradient = cudnn.input_gradient(grad_output, weight, padding)
    limit = tolerance(torch.float64, reduction=100)
    assert relative_error(out, torch.conv2d(x, weight, bias, padding=padding)) <= limit
    assert relative_error(gradient, expected_gradients(grad_output, x, weight, padding)[0]) <= limit
    used = enabled and shape[0] > 0
    assert len(calls.named("cudnn_convolution")) == used
    by_product = k == 1 and padding == 0
    assert len(calls.named("cudnn_convolution_transpose")) == (used and not by_product)


@contextmanager
def precision(setting: Callable[[], None]) -> Iterator[None]:
    """A setting of matrix products, by whichever API, and PyTorch's default after it."""
    setting()
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"


def _set(target: Any, **values: Any) -> Callable[[], None]:
    def setting() -> None:
        for name, value in values.items():
            setattr(target, name, value)

    return setting


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
SETTINGS = {
    "default": (lambda: None, False),
    "of products": (_set(MATMUL, fp32_precision="tf32"), True),
    "of products, before 2.9": (_set(MATMUL, allow_tf32=True), True),
    "of products, by name": (lambda: torch.set_float32_matmul_precision("high"), True),
    "of all": (_set(torch.backends, fp32_precision="tf32"), True),
    "of all but products": (
        lambda: (_set(torch.backends, fp32_precision="tf32")(),
                 _set(MATMUL, fp32_precision="ieee")()),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_precision(setting: str) -> None:
    """That of matrix products, of which asking warns of nothing."""
    setter, expected = SETTINGS[setting]
    x, weight, grad_output = convolved((2, 3, 4, 5, 7), 3, 1, torch.float32)
    with precision(setter), cuda_like() as calls:  # type: ignore[arg-type]
        assert calls is not None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cudnn.convolve(x, weight, None, 1)
            cudnn.input_gradient(grad_output, weight, 1)
    for name in ("cudnn_convolution", "cudnn_convolution_transpose"):
        ((arguments, _),) = calls.named(name)
        assert arguments[-1] is expected


@pytest.mark.parametrize("timed", [False, True])
def test_settings_of_the_call(timed: bool) -> None:
    """Deterministic, timed if the user times, and nothing of the process's changed."""
    x, weight, grad_output = convolved((2, 3, 4, 5, 7), 3, 1, torch.float32)

    class Watch(Calls):
        def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
            assert not torch.backends.cudnn.deterministic
            return super().__torch_dispatch__(*args, **kwargs)

    flags = torch.backends.cudnn.flags(enabled=True, benchmark=timed)
    with flags, cuda_like(), Watch() as calls:
        cudnn.convolve(x, weight, None, 1)
        cudnn.input_gradient(grad_output, weight, 1)
        cudnn.weight_gradient(grad_output, x, 3, 1)
    ((arguments, _),) = calls.named("cudnn_convolution")
    assert arguments[2:8] == ([1, 1], [1, 1], [1, 1], 1, timed, True)
    ((arguments, _),) = calls.named("cudnn_convolution_transpose")
    assert arguments[2:9] == ([1, 1], [0, 0], [1, 1], [1, 1], 1, timed, True)
    assert not calls.named("convolution_backward")
