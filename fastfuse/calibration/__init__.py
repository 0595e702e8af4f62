"""Algorithm 1 of *Scale Equalization for Multi-Level Feature Fusion*: every branch's statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfuse.calibration.equalizers import (
    find_equalizers,
    identity_equalizers,
    kept_statistics,
    unwrap,
)
from fastfuse.calibration.moments import Moments, image_moments
from fastfuse.calibration.observed_pass import FusionInput, run_observed
from fastfuse.nn import ScaleEqualizer
from fastfuse.ops.checks import FLOAT32

__all__ = ["BranchStatistics", "calibrate"]

T = TypeVar("T")


@dataclass(frozen=True)
class BranchStatistics:
    """What calibration found before one equalizer; one entry per level each.

    Attributes:
        mean: over images, channels and positions of the upsampled level; each image weighs 1.
        std: its standard deviation, sqrt(E[x²] - mean²) over the same.
        count: images counted (times the uses in one forward).

    >>> import fastfuse
    >>> fastfuse.BranchStatistics(mean=(0.4, 0.4), std=(0.6, 0.5), count=(32, 32)).std
    (0.6, 0.5)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: tuple[int, ...]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    encoder: str | nn.Module | None = "backbone",
    max_batches: int | None = None,
    progress: bool = True,
) -> dict[str, BranchStatistics]:
    """Gives every :class:`fastfuse.nn.ScaleEqualizer` of ``model`` the statistics of its branches.

    Algorithm 1 of *Scale Equalization for Multi-Level Feature Fusion*: one pass over images with
    every equalizer at the identity; mean and standard deviation of each branch as it is
    concatenated, that is upsampled, averaged over images, each of weight 1 whatever its size. In
    float64, from each image's mean and centred variance, so that nothing cancels, and without
    building the upsampled branches.

    The encoder runs in evaluation mode. Every BatchNorm outside it runs on the statistics of its
    batch (at initialization its running ones mean nothing), dropout and all else in evaluation
    mode. Afterwards modes, running statistics, all other buffers and the random state are as they
    were, and after an exception the equalizers too.

    What holds afterwards: on the same batches every branch has mean 0 and variance 1, if no
    equalized fusion comes before it. A fusion that reads another's output (UPerHead's
    ``fpn_bottleneck`` after its pyramid pooling) is calibrated for an inner fusion that is not yet
    equalized, since there is one pass: its branch is near 0 and 1, not exactly there.

    Under ``torch.distributed`` each rank passes its own share of the batches, possibly none, and
    all write the same statistics; SyncBatchNorm then normalizes each batch by itself, as in one
    process. Whatever fails on one rank raises on all.

    Args:
        model: with equalizers (``scale_equalizer=True``); DataParallel and ``torch.compile``
            wrappers are looked through.
        batches: yields images, or tuples or lists that begin with them: (N, C, H, W), floating
            point, on the model's device, N at least 2 and better 16 (see Raises).
        encoder: what stays in evaluation mode: an attribute's (dotted) name, a module, or None.
        max_batches: stop after as many.
        progress: show a bar where stderr is a terminal.

    Returns:
        Statistics by the equalizer's name in the model, such as "decode_head.bottleneck.equalizer".

    Raises:
        TypeError: a batch that does not hold images.
        ValueError: a model without equalizers or without the encoder, no batches, a batch of fewer
            than 2 images (BatchNorm cannot normalize a globally pooled branch of one image), a
            fusion that the forward pass did not reach, a branch whose variance is 0 or not finite.
        RuntimeError: calibration failed on another rank.

    >>> import torch, fastfuse
    >>> fusion = fastfuse.nn.MultiLevelFusion([3, 3], 4, scale_equalizer=True)
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fusion = fusion
    ...     def forward(self, images):
    ...         return self.fusion([images, torch.nn.functional.avg_pool2d(images, 4)])
    >>> batches = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    >>> statistics = fastfuse.calibrate(Model(), batches, encoder=None)
    >>> statistics["fusion.equalizer"].count
    (12, 12)
    >>> fusion.equalizer.calibrated
    True
    """
    model = unwrap(model)
    modules = find_equalizers(model)

    def observe() -> dict[str, list[Moments]]:
        if not modules:
            raise ValueError(
                "calibrate: the model has no scale equalizers; build its fusions or heads with "
                "scale_equalizer=True"
            )
        found = MomentsObserver(modules)
        count = run_observed(
            "calibrate",
            model,
            batches,
            found.observe,
            encoder=encoder,
            max_batches=max_batches,
            progress=progress,
        )
        return found.result() if count else {}

    levels = {name: module.num_levels for name, module in modules.items()}

    def settle() -> dict[str, BranchStatistics]:
        statistics = combined_statistics("calibrate", ranks, levels)
        write_statistics(modules, statistics)
        return statistics

    with identity_equalizers(modules.values()):
        ranks = _on_all_ranks(observe)
        return _on_all_ranks(settle)[0]


class MomentsObserver:
    """Observes the moments of every branch before the given equalizers (or fusions), by name."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self._names = {id(module): name for name, module in modules.items()}
        self._images: dict[str, list[list[tuple[Tensor, Tensor]]]] = {n: [] for n in modules}

    def observe(self, given: FusionInput) -> None:
        keys = (given.module, getattr(given.module, "equalizer", None))
        names = [self._names[id(key)] for key in keys if id(key) in self._names]
        for name in names[:1]:
            align = given.align_corners
            levels = [image_moments(f, given.size, align_corners=align) for f in given.features]
            self._images[name].append(levels)

    def result(self) -> dict[str, list[Moments]]:
        """One entry per level; an empty list for what was never used."""
        moments: dict[str, list[Moments]] = {}
        for name, uses in self._images.items():
            moments[name] = []
            for level in zip(*uses, strict=True):
                total = Moments()
                # Read here and not during the pass, which would wait for the device each time.
                for means, variances in level:
                    for mean, variance in zip(means.tolist(), variances.tolist(), strict=True):
                        total += Moments.of_image(mean, variance)
                moments[name].append(total)
        return moments


def combined_statistics(
    caller: str, ranks: list[dict[str, list[Moments]]], levels: dict[str, int]
) -> dict[str, BranchStatistics]:
    """Statistics of all ranks' moments, once they are known to be usable."""
    if not any(ranks):
        raise ValueError(f"{caller}: no batches; give at least one batch of 2 images, better of 16")
    statistics, problems = {}, []
    for name, num_levels in levels.items():
        branches = [Moments()] * num_levels
        for rank, moments in enumerate(ranks):
            if moments and set(moments) != set(levels):
                raise ValueError(f"{caller}: rank {rank} has other equalizers: {sorted(moments)}")
            if of_rank := moments.get(name):
                branches = [a + b for a, b in zip(branches, of_rank, strict=True)]
        if not branches[0].count:
            problems.append(f"{name} was never reached in the forward pass")
            continue
        for i, branch in enumerate(branches):
            if problem := _problem(branch):
                problems.append(f"{name}, branch {i}: {problem}")
        statistics[name] = BranchStatistics(
            tuple(b.mean for b in branches),
            tuple(math.sqrt(b.variance) if b.variance >= 0 else math.nan for b in branches),
            tuple(b.count for b in branches),
        )
    if problems:
        raise ValueError(f"{caller}: " + "; ".join(problems))
    return statistics


def _problem(branch: Moments) -> str | None:
    expected = "expected a branch that varies, with finite values"
    if not (math.isfinite(branch.mean) and math.isfinite(branch.variance)):
        return f"{expected}; got mean {branch.mean} and variance {branch.variance}"
    # A constant's variance is what rounding its mean leaves of it.
    if math.sqrt(branch.variance) <= max(1e-12 * abs(branch.mean), FLOAT32.tiny):
        return f"{expected}; got variance {branch.variance:.3g} (mean {branch.mean:.6g})"
    return None


def write_statistics(
    modules: dict[str, ScaleEqualizer], statistics: dict[str, BranchStatistics]
) -> None:
    """Writes statistics to all equalizers, or to none if one refuses its own."""
    with kept_statistics(modules.values()):
        for name, module in modules.items():
            module.set_statistics(statistics[name].mean, statistics[name].std)


def _on_all_ranks(action: Callable[[], T]) -> list[T]:
    """What ``action`` returns on every rank, in their order; all raise if it fails on one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return [action()]
    value, error = None, None
    try:
        value = action()
    except Exception as exception:
        error = exception
    report = None if error is None else f"{type(error).__name__}: {error}"
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (value, report))
    if error is not None:
        raise error
    for rank, (_, report) in enumerate(gathered):
        if report is not None:
            raise RuntimeError(f"calibrate: rank {rank} failed: {report}")
    return [value for value, _ in gathered]
