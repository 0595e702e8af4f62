"""What *Scale Equalization for Multi-Level Feature Fusion* (Kim & Kim) claims, with its hypotheses.

UP_r is ``fastfuse.upsample_equalize_concat`` of one level. Variances are biased and over a whole
tensor, as in the paper. Where a claim holds only under a hypothesis, a counterexample stands beside
it.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastfuse

MEAN_AFTER_RELU = 1 / math.sqrt(2 * math.pi)  # Eq. 6
VARIANCE_AFTER_RELU = (math.pi - 1) / (2 * math.pi)  # Eq. 7


def up(x: Tensor, height: int, width: int, *, align_corners: bool = False) -> Tensor:
    return fastfuse.upsample_equalize_concat([x], size=(height, width), align_corners=align_corners)


def up_r(x: Tensor, r: int, *, align_corners: bool = False) -> Tensor:
    return up(x, r * x.shape[2], r * x.shape[3], align_corners=align_corners)


def variance(x: Tensor) -> float:
    """In two passes: ``Tensor.var`` is 7e-12 off on one thread."""
    return (x - x.mean()).square().mean().item()


def image(*rows: list[float]) -> Tensor:
    """One image of one channel."""
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- Theorem 3.2 -----------------------------------------------------------------------------


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """Images of whole numbers: if they are not constant, they are so by far more than rounding."""
    shape = draw(st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(1, 9)] * 2))
    count = math.prod(shape)
    values = draw(st.lists(st.integers(-8, 8), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(x=images(), r=st.integers(2, 9))
def test_upsampling_lowers_the_variance_and_keeps_the_mean(x: Tensor, r: int) -> None:
    """Theorem 3.2: Var[UP_r(X)] < Var[X], E[UP_r(X)] = E[X]; r > 1 whole, a plane not constant."""
    assume((x.amin(dim=(2, 3)) < x.amax(dim=(2, 3))).any())
    result = up_r(x, r)
    assert variance(result) < variance(x) * (1 - 1e-9)
    assert result.mean().item() == pytest.approx(x.mean().item(), abs=1e-13)


@pytest.mark.parametrize("r", [2, 3, 8])
def test_upsampling_a_constant_keeps_the_variance(r: int) -> None:
    """Theorem 3.2 needs a plane that is not constant: channels may differ and nothing changes."""
    x = torch.arange(4, dtype=torch.float64).reshape(2, 2, 1, 1).expand(2, 2, 5, 6)
    assert variance(up_r(x, r)) == pytest.approx(variance(x), rel=1e-14)


def test_upsampling_with_align_corners_may_raise_the_variance() -> None:
    """Theorem 3.2 needs align_corners=False: with it, borders weigh less and variance may rise."""
    bump = torch.tensor([1, 3, 4, 5, 5, 4, 3, 1], dtype=torch.float64)
    wave = torch.tensor([1, 3, 3, 1, -1, -3, -3, -1], dtype=torch.float64)
    x = torch.outer(bump, wave)[None, None]
    for r in (2, 4, 8):
        assert 1 < variance(up_r(x, r, align_corners=True)) / variance(x) < 1.11
        assert variance(up_r(x, r)) < variance(x)


def test_upsampling_with_align_corners_moves_the_mean() -> None:
    """The mean is kept with align_corners=False only: [0, 1, 0] to 6 pixels, 1/3 becomes 2/5."""
    x = image([0, 1, 0])
    assert up(x, 1, 6).mean().item() == pytest.approx(1 / 3, abs=1e-15)
    assert up(x, 1, 6, align_corners=True).mean().item() == pytest.approx(2 / 5, abs=1e-15)


def test_upsampling_by_a_ratio_that_is_not_whole_moves_the_mean() -> None:
    """The mean is kept at whole ratios only: [0, 1, 0] to 4 pixels, 1/3 becomes 5/16."""
    result = up(image([0, 1, 0]), 1, 4)
    torch.testing.assert_close(result, image([0, 5 / 8, 5 / 8, 0]), rtol=0, atol=1e-15)
    assert result.mean().item() == 5 / 16


# ---- Figure 3 --------------------------------------------------------------------------------


def variance_ratio(r: int, source_size: float = math.inf) -> float:
    """Var[UP_r(X)] / Var[X] of square maps of independent values.

    An output is (1 - w) a + w b along an axis, of variance ((1 - w)^2 + w^2) Var[X]. The r outputs
    between two source positions have w = (j + 1/2) / r (r even) or j / r (r odd), j < r, over which
    that averages (4 r^2 - 1) / (6 r^2), or (2 r^2 + 1) / (3 r^2). At the border, r of all outputs
    copy one source position. Two axes: the square.
    """
    inner = (4 * r * r - 1) / (6 * r * r) if r % 2 == 0 else (2 * r * r + 1) / (3 * r * r)
    return (inner + (1 - inner) / source_size) ** 2


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 8])
def test_variance_ratio_of_the_weights(r: int) -> None:
    """The closed form is the average of (1 - w)^2 + w^2 over the outputs of both axes."""
    weights = up_r(torch.eye(12, dtype=torch.float64)[None, :, None, :], r)[0, :, 0, :]
    along_an_axis = weights.square().sum(dim=0).mean().item()
    assert along_an_axis**2 == pytest.approx(variance_ratio(r, 12), rel=1e-12)


@pytest.mark.parametrize("r", [2, 4, 8])
def test_figure_3(r: int) -> None:
    """Figure 3: X ~ N(1/sqrt(2 pi), s^2), 0 < s^2 < 1: variance falls to a fixed share of s^2.

    For large maps the share is 0.391, 0.431, 0.441 for r = 2, 4, 8, and 4/9 in the limit: every
    ratio lowers the variance, and r = 2 lowers it most.
    """
    size = 64
    noise = normal(2, 32, size, size)  # 16 x 256 x 128 x 128 in the paper
    # Five standard errors of the variance of n normal values; that neighbours are correlated once
    # upsampled adds less than a tenth to each.
    error = 5 * 1.1 * math.sqrt(2 / noise.numel())
    shares = []
    for s2 in (0.1, 0.5, 0.9):
        x = MEAN_AFTER_RELU + math.sqrt(s2) * noise
        result = up_r(x, r)
        assert variance(result) < variance(x)
        assert result.mean().item() == pytest.approx(x.mean().item(), abs=1e-12)
        shares.append(variance(result) / s2)
    assert shares == pytest.approx([variance_ratio(r, size)] * 3, rel=error)
    assert shares == pytest.approx([shares[0]] * 3, rel=1e-9)  # proportional to s^2


# ---- Equations 6 and 7 -----------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_conv_bn_relu_fixes_mean_and_variance(kernel_size: int) -> None:
    """Eqs. 6, 7: normal convolution, BN in training: mean 1/sqrt(2 pi), variance (pi-1)/(2 pi)."""
    torch.manual_seed(0)
    unit = fastfuse.nn.ConvUnit(32, 64, kernel_size).double().train()
    x = 3 + 5 * normal(4, 32, 64, 64)  # BN takes any scale away
    with torch.no_grad():
        unit.conv.padding = 0  # at a zero-padded border, values have another mean and variance
        y = unit(x)
    # 10^6 values: five standard errors of their mean are 0.003, and BN leaves even less.
    assert y.mean().item() == pytest.approx(MEAN_AFTER_RELU, abs=0.003)
    assert variance(y) == pytest.approx(VARIANCE_AFTER_RELU, abs=0.003)


def test_conv_bn_relu_in_evaluation_mode_does_not() -> None:
    """Eqs. 6 and 7 need batch statistics: fresh running ones (0 and 1) let the scale through."""
    torch.manual_seed(0)
    unit = fastfuse.nn.ConvUnit(32, 64, 1).double().eval()
    with torch.no_grad():
        y = unit(5 * normal(2, 32, 32, 32))
    assert y.mean().item() > 2 * MEAN_AFTER_RELU
    assert variance(y) > 2 * VARIANCE_AFTER_RELU


# ---- Proposition 3.1 and scale equilibrium ---------------------------------------------------

CHANNELS = 24
SIZES = (32, 16, 8, 4)  # r = 1, 2, 4, 8
Levels = list[Tensor]


@pytest.fixture(scope="module")
def training_set() -> list[Levels]:
    """Batches of levels as a decoder makes them: Conv-BN-ReLU at each size, BN in training mode."""
    torch.manual_seed(0)
    units = [fastfuse.nn.ConvUnit(16, CHANNELS, 1).double().train() for _ in SIZES]
    with torch.no_grad():
        return [
            [
                unit(normal(8, 16, size, size, seed=100 * batch + size))
                for unit, size in zip(units, SIZES, strict=True)
            ]
            for batch in range(3)
        ]


def algorithm_1(batches: list[Levels]) -> fastfuse.nn.ScaleEqualizer:
    """Means of x and of x^2 of every image, averaged over the set: mu = m1, s^2 = m2 - mu^2."""
    m1, m2 = torch.zeros(len(SIZES)).double(), torch.zeros(len(SIZES)).double()
    count = 0
    for levels in batches:
        for i, level in enumerate(levels):
            upsampled = up(level, *[max(SIZES)] * 2)
            m1[i] += upsampled.mean(dim=(1, 2, 3)).sum()
            m2[i] += upsampled.square().mean(dim=(1, 2, 3)).sum()
        count += levels[0].shape[0]
    equalizer = fastfuse.nn.ScaleEqualizer(len(SIZES)).double()
    equalizer.set_statistics(m1 / count, (m2 / count - (m1 / count) ** 2).sqrt())
    return equalizer


def fusion(out_channels: int, kernel_size: int = 1) -> fastfuse.nn.MultiLevelFusion:
    """The fusion's convolution alone: y of the proposition."""
    return fastfuse.nn.MultiLevelFusion(
        [CHANNELS] * len(SIZES),
        out_channels,
        kernel_size,
        scale_equalizer=True,
        norm=lambda _: nn.Identity(),
        activation=nn.Identity,
    ).double()


def gradients(module: fastfuse.nn.MultiLevelFusion, levels: Levels, upstream: Tensor) -> Levels:
    """The weights' gradient for a given gradient of y, split into the levels' parts."""
    (gradient,) = torch.autograd.grad(module(levels), module.conv.weight, upstream)
    return list(gradient.split(CHANNELS, dim=1))


@pytest.mark.parametrize("equalize", [False, True])
def test_weight_gradients_have_the_variance_of_their_inputs(
    training_set: list[Levels], equalize: bool
) -> None:
    """Proposition 3.1: Var[dy/dw_i] = Var[x_i], over all outputs y."""
    levels = [level[:1] for level in training_set[0]]
    pixels = max(SIZES) ** 2
    module = fusion(out_channels=pixels)
    if equalize:
        module.equalizer = algorithm_1(training_set)
    # Output channel p asks for pixel p alone: its weights' gradient is dy(p)/dw.
    one_pixel_each = torch.eye(pixels, dtype=torch.float64).reshape(1, pixels, *[max(SIZES)] * 2)
    assert module.equalizer is not None
    inputs = module.equalizer([up(level, *[max(SIZES)] * 2) for level in levels])
    for gradient, x in zip(gradients(module, levels, one_pixel_each), inputs, strict=True):
        assert variance(gradient) == pytest.approx(variance(x), rel=1e-12)


def test_equalized_levels_have_mean_0_and_variance_1(training_set: list[Levels]) -> None:
    """The scale equalizer with mu and s by Algorithm 1: mean 0, variance 1 over the set."""
    equalizer = algorithm_1(training_set)
    batches = [
        fastfuse.upsample_equalize_concat(levels, mean=equalizer.mean, std=equalizer.std)
        for levels in training_set
    ]
    for level in torch.cat(batches).split(CHANNELS, dim=1):
        assert level.mean().item() == pytest.approx(0, abs=1e-12)
        assert variance(level) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_equalized_levels_are_in_equilibrium(training_set: list[Levels], kernel_size: int) -> None:
    """Scale equilibrium: equalized levels' gradients have equal variances, plain ones have not.

    With an upstream gradient of independent values of variance 1, a weight's gradient has the
    variance E[x_i^2] times the number of outputs: where x_i is equalized, that number alone.
    """
    levels = [torch.cat(batches) for batches in zip(*training_set, strict=True)]
    images, height, out_channels = levels[0].shape[0], max(SIZES), 128
    upstream = normal(images, out_channels, height, height, seed=1)
    # Of `height` outputs in a row, a tap t pixels off the centre sees the inside |t| times less.
    reach = kernel_size // 2
    inside = height - sum(abs(t) for t in range(-reach, reach + 1)) / kernel_size
    outputs = images * inside**2
    # Five standard errors of a variance of 128 x 24 independent values.
    error = 5 * math.sqrt(2 / (out_channels * CHANNELS))

    module = fusion(out_channels, kernel_size)
    plain = [variance(g) / outputs for g in gradients(module, levels, upstream)]
    squares = [up(level, height, height).square().mean().item() for level in levels]
    assert plain == pytest.approx(squares, rel=error)
    assert plain[0] > 1.35 * max(plain[1:])  # r = 1 learns faster than what was upsampled

    module.equalizer = algorithm_1(training_set)
    equalized = [variance(g) / outputs for g in gradients(module, levels, upstream)]
    assert equalized == pytest.approx([1.0] * len(SIZES), rel=error)
