"""plain: models in PyTorch's own operations, held against the models themselves."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfuse
from fastfuse.conversion.plain_ops import Fusion, Winograd
from fastfuse.heads import ASPPHead, FCNHead, PSPHead, SepASPPHead, UPerHead
from fastfuse.ops.fusion_conv2d.reference import reference
from fastfuse.tolerances import relative_error

TOLERANCE = 1e-5  # of layers on layers, relative to the largest value; exporters' is 1e-4
WIDE = 128  # channels from which on convolutions are by Winograd's method


def pyramid(channels: list[int], size: int = 24) -> list[Tensor]:
    return [torch.randn(2, c, -(-size >> i), -(-size >> i)) for i, c in enumerate(channels)]


def with_statistics(model: nn.Module) -> nn.Module:
    """In evaluation, with statistics that were not just made."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, fastfuse.nn.ScaleEqualizer):
            nn.init.normal_(module.mean)
            nn.init.uniform_(module.std, 0.5, 2)
    return model.eval()


def check(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    """Results, names and operations of ``plain``."""
    model = with_statistics(model)
    with torch.no_grad():
        expected = model(*inputs)
        plain = fastfuse.plain(model, *inputs, **options)
        results = plain(*inputs)
    for result, value in zip(tensors(results), tensors(expected), strict=True):
        assert relative_error(result, value) < TOLERANCE
    assert dict(plain.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert plain.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert plain.get_parameter(name).data_ptr() == parameter.data_ptr()
    assert {target.namespace for target in targets(plain)} == {"aten"}
    return plain


def targets(plain: Any) -> list[torch._ops.OpOverload]:
    found = [n.target for n in plain.graph.nodes if n.op == "call_function"]
    return [target for target in found if target is not operator.getitem]


def tensors(output: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(output)


def operations(plain: Any) -> list[str]:
    return [target._opname for target in targets(plain)]


HEADS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "uper": lambda: (UPerHead([8, 12, 16], 16, 5), pyramid([8, 12, 16])),
    "uper, equalized, align_corners": lambda: (
        UPerHead([8, 12, 16], 16, 5, scale_equalizer=True, align_corners=True),
        pyramid([8, 12, 16], 21),
    ),
    "uper, wide": lambda: (UPerHead([WIDE] * 2, WIDE, 5), pyramid([WIDE] * 2, 18)),
    "psp": lambda: (PSPHead(32, 16, 5), [torch.randn(2, 32, 15, 17)]),
    "aspp": lambda: (ASPPHead(32, 16, 5), [torch.randn(2, 32, 15, 17)]),
    "sep_aspp": lambda: (SepASPPHead(32, 16, 5, c1_in_channels=8, c1_channels=4), pyramid([8, 32])),
    "fcn": lambda: (FCNHead(32, 16, 5), [torch.randn(2, 32, 15, 17)]),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    head, levels = HEADS[name]()
    plain = check(head, levels)
    assert "adaptive_avg_pool2d" not in operations(plain)


@pytest.mark.parametrize(
    ("conv", "is_products"),
    [
        (nn.Conv2d(WIDE, WIDE, 3, padding=1), True),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False), True),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1, stride=2), False),
        (nn.Conv2d(WIDE, WIDE, 3, padding=2, dilation=2), False),
        (nn.Conv2d(WIDE, WIDE, 3), False),
        (nn.Conv2d(WIDE, WIDE, 1), False),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1, groups=2), False),
        (nn.Conv2d(WIDE, 8, 3, padding=1), False),
    ],
    ids=str,
)
def test_convolutions(conv: nn.Conv2d, is_products: bool) -> None:
    model, x = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)), torch.randn(2, WIDE, 6, 9)
    assert ("conv2d" not in operations(check(model, x))) == is_products
    assert "conv2d" in operations(check(model, x, winograd=False))


def test_models() -> None:
    head = UPerHead([8, 12], 16, 5)
    images = torch.randn(1, 3, 32, 32)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = backbone, nn.Conv2d(8, 12, 2, 2)

        def forward(self, x: Tensor) -> list[Tensor]:
            fine = self.first(x)
            return [fine, self.second(fine)]

    check(fastfuse.models.Segmentor(Levels(), head), images)
    lr = fastfuse.nn.LRCEDBlock(8)
    check(nn.Sequential(fastfuse.nn.CEDBlock(8), lr, fastfuse.nn.DepthwiseConv2d(8, 5)),
          torch.randn(2, 8, 9, 10))  # fmt: skip


class Calls(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


def test_ops() -> None:
    x, skip = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 11, 12)
    check(Calls(fastfuse.upsample_add), x, skip)
    check(Calls(lambda *levels: fastfuse.upsample_equalize_concat(levels, std=[2.0, 3.0])), x, skip)
    check(Calls(lambda x: fastfuse.upsample_argmax(x, (9, 11))), x)
    check(Calls(lambda x: fastfuse.upsample_argmax(x, (9, 11), return_confidence=True)), x)
    weight = torch.randn(WIDE, 16, 3, 3)  # of a size that is an op, whatever runs small ones
    levels = [torch.randn(1, 8, 96, 96), torch.randn(1, 8, 12, 12)]
    check(Calls(lambda *x: fastfuse.fusion_conv2d(x, weight)), *levels)
    taps = torch.randn(2, 36, 5, 6)
    check(Calls(lambda x: fastfuse.tap_sum(x, (11, 12), kernel_size=3)), taps)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_fusion_against_the_definition(kernel: int, padding: int, align_corners: bool) -> None:
    """Levels coarser than, of, and finer than the target, and of one pixel."""
    size = (13, 18)
    levels = [torch.randn(2, 6, h, w) for h, w in ((4, 9), size, (1, 1), (7, 5), (20, 30))]
    weight, bias = torch.randn(4, 30, kernel, kernel), torch.randn(4)
    mean, std = torch.randn(5), torch.rand(5) + 0.5
    arguments = (levels, weight, bias, size, mean, std, padding, align_corners)
    module = Fusion([x.shape for x in levels], weight.shape, size, padding, align_corners,
                    torch.float64, winograd=False).double()  # fmt: skip
    double = [x.double() for x in levels]
    constants = [x.double() for x in (weight, bias, mean, std)]
    result = module(double, *constants)
    assert module.coarse == [0, 2, 3] or kernel == 1
    assert relative_error(result, reference(*arguments)) < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (12, 9)], ids=str)
def test_winograd(size: tuple[int, int]) -> None:
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    weight = torch.randn(7, 8, 3, 3, dtype=torch.float64)
    result = Winograd(size, torch.float64)(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
    torch.testing.assert_close(result, nn.functional.conv2d(x, weight, padding=1))


@pytest.mark.parametrize(
    ("size", "pooled", "operation"),
    [((12, 18), (6, 6), "avg_pool2d"), ((7, 18), (3, 6), "matmul"), ((5, 4), (7, 1), "matmul")],
)
def test_adaptive_pooling(size: tuple[int, ...], pooled: tuple[int, ...], operation: str) -> None:
    plain = check(nn.AdaptiveAvgPool2d(pooled), torch.randn(2, 3, *size))
    assert operation in operations(plain)


def test_the_model_is_left_as_it_was() -> None:
    head, levels = HEADS["psp"]()
    head.train()
    before = copy.deepcopy(head.state_dict())
    plain = fastfuse.plain(head, levels)
    assert head.training
    assert "forward" not in head.__dict__
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])
    first = plain(levels)
    assert torch.equal(plain.train()(levels), first)  # nothing in it has a mode
    with torch.no_grad():
        head.conv_seg.bias += 1
    torch.testing.assert_close(plain(levels), first + 1)  # the same parameters


def test_errors() -> None:
    x = torch.randn(2, 8, 9, 9)
    with pytest.raises(TypeError, match=r"plain: model must be an nn.Module; got int"):
        fastfuse.plain(3, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plain: inputs must be what the model is called with"):
        fastfuse.plain(nn.ReLU())
    with pytest.raises(ValueError, match=r"does not take inputs of shapes \(2, 8, 9, 9\): .*3"):
        fastfuse.plain(nn.Conv2d(3, 3, 3), x)
    with pytest.raises(ValueError, match=r"torch\.export does not take the model"):
        fastfuse.plain(Calls(lambda x: x if x.sum() > 0 else -x), x)
    with pytest.raises(ValueError, match=r"batch norm without running statistics, of an input"):
        fastfuse.plain(nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False)), x)
    target = torch.zeros(2, 18, 18, dtype=torch.int64)
    with pytest.raises(ValueError, match="a model that returns no loss in evaluation; got one"):
        fastfuse.plain(Calls(fastfuse.upsample_cross_entropy), x, target)


def test_an_op_without_operations_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules[fastfuse.plain.__module__]._PLAIN, "tap_sum")
    model = Calls(lambda x: fastfuse.tap_sum(x, (9, 9), kernel_size=1))
    with pytest.raises(ValueError, match="no operations of PyTorch are known for fastfuse::tap_su"):
        fastfuse.plain(model, torch.ones(1, 1, 4, 4))


def small() -> tuple[nn.Module, list[Tensor]]:
    head = with_statistics(UPerHead([WIDE, 16, 16], WIDE, 5))
    return head, [torch.randn(1, c, 24 >> i, 24 >> i) for i, c in enumerate((WIDE, 16, 16))]


def test_onnx_runtime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    head, levels = small()
    path = str(tmp_path / "head.onnx")
    torch.onnx.export(fastfuse.plain(head, levels), (levels,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, {n: x.numpy() for n, x in zip(names, levels, strict=True)})
    assert relative_error(torch.from_numpy(result), head(levels)) < 1e-4


def test_openvino() -> None:
    openvino = pytest.importorskip("openvino")
    head, levels = small()
    program = torch.export.export(fastfuse.plain(head, levels), (levels,))
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU", options)
    (result,) = compiled([x.numpy() for x in levels]).values()
    assert relative_error(torch.from_numpy(result), head(levels)) < 1e-4
