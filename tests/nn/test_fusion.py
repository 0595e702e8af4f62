"""ScaleEqualizer, ConvUnit and MultiLevelFusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastfuse import backend
from fastfuse.nn import Conv2d, ConvUnit, MultiLevelFusion, ScaleEqualizer, SeparableFusion
from fastfuse.tolerances import relative_error, tolerance


def levels() -> list[Tensor]:
    return [torch.randn(2, 4, 12, 16), torch.randn(2, 6, 6, 8), torch.randn(2, 2, 3, 4)]


# ---- ScaleEqualizer -----------------------------------------------------------------------------


def test_equalizer_starts_as_the_identity() -> None:
    equalizer = ScaleEqualizer(2)
    assert dict(equalizer.state_dict()).keys() == {"mean", "std"}
    assert not equalizer.calibrated
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    for before, after in zip((x, y), equalizer([x, y]), strict=True):
        assert torch.equal(before, after)


def test_equalizer_equalizes_and_round_trips() -> None:
    equalizer = ScaleEqualizer(2)
    equalizer.set_statistics([0.5, -1.0], torch.tensor([2.0, 4.0]))
    assert equalizer.calibrated
    copy = ScaleEqualizer(2)
    copy.load_state_dict(equalizer.state_dict())
    x = torch.randn(1, 1, 2, 2)
    torch.testing.assert_close(copy([x, x])[1], (x + 1.0) / 4.0)
    assert repr(copy) == "ScaleEqualizer(2)"


def test_equalizer_on_meta() -> None:
    """Modules may be built without memory, printed, and given their values later."""
    with torch.device("meta"):
        equalizer = ScaleEqualizer(2)
    assert repr(equalizer) == "ScaleEqualizer(2)"
    real = ScaleEqualizer(2)
    real.set_statistics([1.0, 2.0], [3.0, 4.0])
    equalizer.load_state_dict(real.state_dict(), assign=True)
    assert equalizer.std.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0], [1.0, 1.0], r"mean must have one value per level, shape \(2,\); got shape \(1,\)"),
        ([0.0, 0.0], [1.0, 0.0], r"std must be positive .*; got \[1.0, 0.0\]"),
        ([0.0, 0.0], [1.0, -2.0], r"std must be positive"),
        ([0.0, 0.0], [1.0, 1e-46], r"std must be positive .* in torch.float32"),
        ([1e39, 0.0], [1.0, 1.0], r"mean must be finite in torch.float32"),
        ([0.0, 0.0], [1.0, float("nan")], r"std must be finite"),
        ([float("inf"), 0.0], [1.0, 1.0], r"mean must be finite"),
    ],
)
def test_bad_statistics(mean: list[float], std: list[float], message: str) -> None:
    """Refused where they are written, by hand or from a checkpoint; nothing is half-loaded."""
    equalizer = ScaleEqualizer(2)
    with pytest.raises(ValueError, match=f"ScaleEqualizer: {message}"):
        equalizer.set_statistics(mean, std)
    fusion = MultiLevelFusion([4, 6], 8, scale_equalizer=True)
    state = fusion.state_dict()
    bad = {"equalizer.mean": mean, "equalizer.std": std}
    state |= {name: torch.tensor(value, dtype=torch.float64) for name, value in bad.items()}
    with pytest.raises(RuntimeError, match=rf"equalizer\.\w+: ScaleEqualizer: {message}"):
        fusion.load_state_dict(state)
    assert fusion.equalizer is not None
    for module in (equalizer, fusion.equalizer):
        assert not module.calibrated


def test_equalizer_counts_levels() -> None:
    with pytest.raises(ValueError, match="num_levels must be at least 1; got 0"):
        ScaleEqualizer(0)
    with pytest.raises(ValueError, match="expected 2 levels; got 1"):
        ScaleEqualizer(2)([torch.zeros(1, 1, 2, 2)])


# ---- ConvUnit -----------------------------------------------------------------------------------


def test_conv_unit() -> None:
    unit = ConvUnit(4, 6, 3, dilation=2, groups=2, activation=nn.GELU)
    assert {k.split(".")[0] for k in unit.state_dict()} == {"conv", "bn"}
    assert unit.conv.bias is None
    x = torch.randn(2, 4, 9, 7)
    expected = F.gelu(unit.bn(F.conv2d(x, unit.conv.weight, padding=2, dilation=2, groups=2)))
    torch.testing.assert_close(unit(x), expected)
    with pytest.raises(ValueError, match="ConvUnit: kernel_size must be odd and positive; got 4"):
        ConvUnit(4, 6, 4)


# ---- MultiLevelFusion ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("equalized", [False, True])
def test_fusion_equals_its_plain_composition(kernel_size: int, equalized: bool) -> None:
    fusion = MultiLevelFusion([4, 6, 2], 8, kernel_size, scale_equalizer=equalized).double()
    mean, std = [0.1, 0.2, 0.3], [0.5, 2.0, 3.0]
    if fusion.equalizer is not None:
        fusion.equalizer.set_statistics(mean, std)
        mean, std = fusion.equalizer.mean.tolist(), fusion.equalizer.std.tolist()
    else:
        mean, std = [0.0] * 3, [1.0] * 3

    def plain(features: list[Tensor], size: tuple[int, int]) -> Tensor:
        up = [F.interpolate(f, size=size, mode="bilinear") for f in features]
        fused = torch.cat([(u - m) / s for u, m, s in zip(up, mean, std, strict=True)], dim=1)
        conv = F.conv2d(fused, fusion.conv.weight, padding=kernel_size // 2)
        return F.relu(fusion.bn(conv))

    for size in (None, (10, 9)):
        results = []
        for function in (fusion, plain):
            torch.manual_seed(0)
            features = [f.double().requires_grad_() for f in levels()]
            output = function(features, size or ((12, 16) if function is plain else None))
            parameters = [*features, *fusion.parameters()]
            results.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_fusion_keys() -> None:
    plain = MultiLevelFusion([4, 6], 8)
    equalized = MultiLevelFusion([4, 6], 8, scale_equalizer=True)
    extra = set(equalized.state_dict()) - set(plain.state_dict())
    assert extra == {"equalizer.mean", "equalizer.std"}
    assert tuple(plain.conv.weight.shape) == (8, 10, 3, 3)


def test_fusion_compiles_and_deep_copies() -> None:
    import copy

    torch._dynamo.reset()
    fusion = MultiLevelFusion([4, 6, 2], 8, scale_equalizer=True).eval()
    twin = copy.deepcopy(fusion)
    features = levels()
    with torch.no_grad():
        compiled = torch.compile(fusion, fullgraph=True)(features)
        torch.testing.assert_close(compiled, twin(features), rtol=1e-4, atol=1e-5)
        with backend("reference"):
            torch.testing.assert_close(compiled, twin(features), rtol=1e-4, atol=1e-5)


def test_fusion_names_what_does_not_fit() -> None:
    fusion = MultiLevelFusion([4, 6], 8)
    with pytest.raises(ValueError, match=r"levels with \(4, 6\) channels; got \(4, 6, 2\)"):
        fusion(levels())
    with pytest.raises(ValueError, match=r"in_channels must be positive.*; got \[4, 0\]"):
        MultiLevelFusion([4, 0], 8)
    for wrong in ([], 4):
        with pytest.raises(ValueError, match=r"in_channels must be positive"):
            MultiLevelFusion(wrong, 8)
    with pytest.raises(TypeError, match="features must be a sequence of tensors"):
        fusion(levels()[0])
    with pytest.raises(TypeError, match=r"features\[1\] must be a tensor; got int"):
        fusion([levels()[0], 3])
    with pytest.raises(ValueError, match=r"features\[1\] must have 4 dimensions"):
        fusion([levels()[0], torch.zeros(3)])


# ---- Conv2d -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": (1, 2)},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": (3, 5), "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 128},
        {"kernel_size": 5, "padding": "same", "groups": 128},
        {"kernel_size": 5, "padding": 1, "groups": 128},
    ],
    ids=str,
)
def test_conv2d_is_pytorchs(options: dict[str, Any]) -> None:
    ours = Conv2d(128, 128, **options)
    theirs = nn.Conv2d(128, 128, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 128, 34, 33, requires_grad=True)
    results = []
    for conv in (ours, theirs.double()):
        y = conv(x.to(conv.weight.dtype))
        (gradient,) = torch.autograd.grad(y.sin().sum(), x)
        results.append((y, gradient))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


# N, channels in and out, height, width
REAL_SIZES = {
    torch.float64: (2, 128, 160, 37, 42),
    torch.float32: (2, 256, 192, 45, 42),
    torch.float16: (2, 192, 256, 45, 42),
    torch.bfloat16: (1, 384, 400, 93, 98),
}


@pytest.mark.parametrize("dtype", REAL_SIZES, ids=str)
def test_conv2d_by_winograd(dtype: torch.dtype) -> None:
    """At sizes for which the rule chooses it; half precision is rounded once."""
    batch, channels, outputs, height, width = REAL_SIZES[dtype]
    conv = Conv2d(channels, outputs, 3, padding=1).to(dtype)
    x = torch.randn(batch, channels, height, width).to(dtype).requires_grad_()
    cotangent = torch.randn(batch, outputs, height, width).to(dtype)
    leaves = [x, conv.weight, conv.bias]
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        y = conv(x)
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        gradients = torch.autograd.grad(y, leaves, cotangent)
    for run, kernels in (
        (forward, {"winograd_input", "winograd_product"}),
        (backward, {"winograd_product", "winograd_output_adjoint", "winograd_gradient"}),
    ):
        ran = {event.key.removeprefix("fastfuse::") for event in run.key_averages()}
        assert kernels <= ran
        assert not any("convolution" in name for name in ran)

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = F.conv2d(*doubles, padding=1)
    exact_gradients = torch.autograd.grad(exact, doubles, cotangent.double())
    pixels = batch * height * width
    for result, expected, reduction in zip(
        (y, *gradients),
        (exact, *exact_gradients),
        (9 * channels, 9 * outputs, pixels, pixels),
        strict=True,
    ):
        assert result.dtype == dtype
        limit = tolerance(dtype, reduction=reduction if dtype.itemsize > 2 else 1)
        assert relative_error(result.detach(), expected.detach()) <= limit


def test_conv2d_of_other_inputs() -> None:
    """No batch; attributes overwritten; channels that do not fit are PyTorch's to refuse."""
    conv = Conv2d(128, 128, 3, padding=1)
    x = torch.randn(128, 34, 33)
    torch.testing.assert_close(conv(x), conv(x[None])[0], rtol=1e-4, atol=1e-4)
    conv.padding = 0
    assert conv(x[None]).shape == (1, 128, 32, 31)
    with pytest.raises(RuntimeError, match="channels"):
        conv(x[None, :5])


def test_conv2d_where_something_else_was_meant() -> None:
    """Subclasses, other dtypes, graphs that are traced, sizes that stay open."""

    class Nothing(Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, 0 * weight, None)

    x = torch.randn(2, 128, 34, 33)
    assert not Nothing(128, 128, 3, padding=1)(x).any()
    depthwise = Conv2d(4, 4, 3, padding=1, groups=4, dtype=torch.complex64)
    assert depthwise(torch.randn(1, 4, 5, 5, dtype=torch.complex64)).is_complex()
    conv = Conv2d(128, 128, 3, padding=1).eval()
    conv.padding = (1,)  # type: ignore[assignment]
    assert conv(x).shape == x.shape
    traced = torch.fx.symbolic_trace(ConvUnit(128, 128, 3).eval())
    assert traced(x).shape == x.shape

    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    unit = ConvUnit(128, 128, 3).eval()
    with torch.no_grad():
        exported = torch.export.export(unit, (x[..., :16, :16],), dynamic_shapes=sizes).module()
        more = torch.randn(9, 128, 16, 16)
        torch.testing.assert_close(exported(more), unit(more), rtol=1e-4, atol=1e-4)


def test_activations_of_the_users_stay_as_they_are() -> None:
    mine = nn.ReLU()
    assert not ConvUnit(4, 4, 3, activation=lambda: mine).activation.inplace
    assert ConvUnit(4, 4, 3).activation.inplace
    assert not ConvUnit(4, 4, 3, norm=nn.Identity).activation.inplace


# ---- SeparableFusion ----------------------------------------------------------------------------


@pytest.mark.parametrize("equalized", [False, True])
def test_separable_fusion_equals_its_plain_composition(equalized: bool) -> None:
    fusion = SeparableFusion([4, 6, 2], 8, scale_equalizer=equalized).double()
    mean, std = [0.0] * 3, [1.0] * 3
    if fusion.equalizer is not None:
        mean, std = [0.5, 0.25, 2.0], [0.5, 2.0, 4.0]
        fusion.equalizer.set_statistics(mean, std)
    features = [f.double() for f in levels()]
    up = [F.interpolate(f, size=(12, 16), mode="bilinear") for f in features]
    x = torch.cat([(u - m) / s for u, m, s in zip(up, mean, std, strict=True)], dim=1)
    for unit, groups in ((fusion.depthwise_conv, 12), (fusion.pointwise_conv, 1)):
        padding = unit.conv.weight.shape[2] // 2
        x = F.relu(unit.bn(F.conv2d(x, unit.conv.weight, padding=padding, groups=groups)))
    torch.testing.assert_close(fusion(features), x)
    extra = {key for key in fusion.state_dict() if key.startswith("equalizer")}
    assert extra == ({"equalizer.mean", "equalizer.std"} if equalized else set())
    with pytest.raises(ValueError, match=r"SeparableFusion: expected levels with \(4, 6, 2\)"):
        fusion(features[:2])
    with pytest.raises(ValueError, match="SeparableFusion: in_channels must be positive"):
        SeparableFusion([4, 0], 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_reads_a_parametrized_weight_once(stride: int, dtype: torch.dtype) -> None:
    """A power iteration of spectral_norm runs whenever the weight is read."""
    spectral_norm = torch.nn.utils.parametrizations.spectral_norm
    ours, plain = (
        spectral_norm(make(8, 8, 3, stride=stride, padding=1).to(dtype))
        for make in (Conv2d, nn.Conv2d)
    )
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 8, 9, 9).to(dtype)
    for module in (ours, plain):
        module(x)
    assert torch.equal(ours.parametrizations.weight[0]._u, plain.parametrizations.weight[0]._u)


@pytest.mark.parametrize("size", [8, 64])
def test_a_convolution_of_mixed_dtypes_is_refused_at_every_size(size: int) -> None:
    conv = Conv2d(128, 128, 3, padding=1)
    conv.weight.data = conv.weight.data.bfloat16()
    x = torch.randn(1, 128, size, size, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bias type"):
        conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
