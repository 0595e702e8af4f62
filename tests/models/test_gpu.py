"""Whole heads and models on CUDA devices, held against the CPU's reference in float64: training
steps, autocast, TF32, streams, devices, CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cednets import SMALL, cednet, randomized
from torch import Tensor, nn

import fastfuse
from fastfuse import heads
from fastfuse.models import Segmentor
from fastfuse.tolerances import relative_error

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CLASSES, IGNORED = 19, 255

HEADS: dict[str, Callable[[], nn.Module]] = {
    "UPerHead": lambda: heads.UPerHead(SMALL["channels"], 16, CLASSES, scale_equalizer=True),
    "PSPHead": lambda: heads.PSPHead(SMALL["channels"][-1], 16, CLASSES, scale_equalizer=True),
    "ASPPHead": lambda: heads.ASPPHead(SMALL["channels"][-1], 16, CLASSES, dilations=(1, 2, 3, 4)),
    "FCNHead": lambda: heads.FCNHead(SMALL["channels"][-1], 16, CLASSES),
}
every_head = pytest.mark.parametrize("head", HEADS)


def segmentor(head: str) -> Segmentor:
    """A small CEDNet below a head, without dropout, with all that is random drawn."""
    model = Segmentor(cednet("fpn"), HEADS[head]())
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
        if isinstance(module, fastfuse.nn.ScaleEqualizer):
            levels = module.num_levels
            module.set_statistics(torch.randn(levels), torch.rand(levels) + 0.5)
    return randomized(model).eval()


def batch() -> tuple[Tensor, Tensor]:
    targets = torch.randint(CLASSES, (2, 64, 96))
    targets[:, :9] = IGNORED
    return torch.randn(2, 3, 64, 96), targets


def step(model: Segmentor, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient."""
    loss = model.loss(images, targets)
    loss.backward()
    found = {"loss": loss.detach()}
    return found | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def exact_step(model: Segmentor, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    with fastfuse.backend("reference"):
        return step(copy.deepcopy(model).double(), images.double(), targets)


def on_device(model: Segmentor, *tensors: Tensor) -> tuple[Any, ...]:
    return copy.deepcopy(model).to(DEVICE), *(tensor.to(DEVICE) for tensor in tensors)


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        assert relative_error(found[key].cpu(), value) <= limit, key


@pytest.fixture
def plain_float32() -> Iterator[None]:
    """No TF32, whatever the process has."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@every_head
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_training_step(head: str, channels_last: bool, plain_float32: None) -> None:
    model, (images, targets) = segmentor(head), batch()
    exact = exact_step(model, images, targets)
    ours, x, y = on_device(model, images, targets)
    if channels_last:
        ours, x = (
            ours.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    assert_close(step(ours, x, y), exact, 1e-3)


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(head: str, dtype: torch.dtype) -> None:
    model, (images, targets) = segmentor(head), batch()
    exact = exact_step(model, images, targets)
    ours, x, y = on_device(model, images, targets)
    with torch.autocast(DEVICE, dtype):
        loss = ours.loss(x, y)
    assert relative_error(loss.detach().float().cpu(), exact["loss"]) <= 0.05
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@every_head
def test_predictions(head: str, plain_float32: None) -> None:
    """But where two classes are as good as equal."""
    model, (images, _) = segmentor(head), batch()
    with torch.no_grad(), fastfuse.backend("reference"):
        logits = copy.deepcopy(model).double()(images.double())
        large = nn.functional.interpolate(logits, images.shape[2:], mode="bilinear")
        best, second = large.topk(2, 1)[0].unbind(1)
    ours, x = on_device(model, images)
    found = ours.predict(x).cpu()
    with fastfuse.backend("reference"):
        expected = copy.deepcopy(model).double().predict(images.double())
    clear = best - second > 1e-3 * logits.abs().max()
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear], expected[clear])


@pytest.mark.parametrize("precise", [True, False], ids=["float32", "tf32"])
def test_tf32_is_that_of_matrix_products(precise: bool) -> None:
    """All levels of a fusion are as precise as a product, whatever convolutions are."""
    shapes = [(2, 64, 32, 32), (2, 64, 16, 16), (2, 64, 8, 8)]
    features = [torch.randn(shape) for shape in shapes]
    weight = torch.randn(64, 192, 3, 3) / 40
    with fastfuse.backend("reference"):
        exact = fastfuse.fusion_conv2d([f.double() for f in features], weight.double())
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = not precise
    try:
        found = fastfuse.fusion_conv2d([f.to(DEVICE) for f in features], weight.to(DEVICE))
    finally:
        matmul.allow_tf32 = before
    error = relative_error(found.cpu(), exact)
    assert error <= 1e-5 if precise else error <= 5e-3


def test_a_side_stream(plain_float32: None) -> None:
    """What is launched waits for what its stream has to do before, and for nothing else's."""
    model, (images, targets) = segmentor("UPerHead"), batch()
    exact = exact_step(model, images, targets)
    ours, x, y = on_device(model, images, targets)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what comes before: some ten milliseconds
        late = torch.zeros_like(x).add_(x)
        found = step(ours, late, y)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(found, exact, 1e-3)


def test_another_device_than_the_current_one(plain_float32: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model, (images, targets) = segmentor("UPerHead"), batch()
    exact = exact_step(model, images, targets)
    found = step(copy.deepcopy(model).to("cuda:1"), images.to("cuda:1"), targets.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_close(found, exact, 1e-3)


def _captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call's replay, after the warm-up that CUDA graphs ask for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@every_head
@pytest.mark.parametrize("training", [False, True], ids=["forward", "step"])
def test_cuda_graphs(head: str, training: bool) -> None:
    """What was captured gives, of other images, what a call gives (PyTorch's pooling and some of
    cuDNN's convolutions add in any order)."""
    model, (images, targets) = segmentor(head), batch()
    ours, x, y = on_device(model, images, targets)
    kept: dict[str, Tensor] = {}

    def call() -> None:
        if training:
            ours.zero_grad()
            kept.update(step(ours, x, y))
        else:
            with torch.no_grad():
                kept["logits"] = ours(x)

    replay = _captured(call)
    x.copy_(torch.randn_like(x))
    replay()
    replayed = {key: value.clone() for key, value in kept.items()}
    call()
    assert replayed.keys() == kept.keys()
    assert_close(replayed, {key: value.cpu() for key, value in kept.items()}, 1e-4)
