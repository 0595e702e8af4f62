"""Variants held against each other before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from variants import Variant, tensors

from fastfuse.verify import MismatchError

__all__ = ["Agreement", "check_agreement", "relative_error"]


@dataclass
class Agreement:
    """What ``check_agreement`` found, by the variants' titles."""

    usable: list[Variant]
    left_out: dict[str, str] = field(default_factory=dict)  # why it cannot run
    wrong: dict[str, str] = field(default_factory=dict)  # tensors, and how far they are off
    seconds: dict[str, float] = field(default_factory=dict)  # of the call that was checked


def check_agreement(
    variants: Sequence[Variant],
    tolerances: Mapping[str, float],
    exact: Callable[[], Any] | None = None,
    compared: Callable[[Any], Any] | None = None,
) -> Agreement:
    """Runs every variant once and holds its tensors against the first variant's.

    Tensors beyond ``tolerances`` (gradients of a rival's own parameters) are not compared. Where a
    rival differs, ``exact`` decides: ours must be within the tolerance of it, and what is wrong
    with the rival is recorded.

    Args:
        tolerances: largest relative error of each compared tensor of a result, by its name.
        exact: computes the same in float64, of the same inputs.
        compared: what of a result is compared, if not all of it as it is.

    Raises:
        MismatchError: with what differs and by how much; or when nothing could be compared.
    """
    ours, found = variants[0], Agreement([variants[0]])

    def seen(result: Any) -> list[Tensor]:
        return tensors(compared(result) if compared else result)

    def run(variant: Variant) -> list[Tensor]:
        begin = time.perf_counter()
        result = variant.call()
        found.seconds[variant.title] = time.perf_counter() - begin
        return seen(result)

    judge = _Judge(ours, run(ours), tolerances, None if exact is None else lambda: seen(exact()))
    agreeing = 0
    for variant in variants[1:]:
        try:
            results = run(variant)
        except Exception as reason:
            if not variant.optional:
                raise
            first_line = str(reason).partition("\n")[0]
            found.left_out[variant.title] = f"{type(reason).__name__}: {first_line[:200]}"
            continue
        if wrong := judge.wrong(variant, results):
            found.wrong[variant.title] = "; ".join(wrong)
        agreeing += variant.rival and not variant.differs
        found.usable.append(variant)
    if not agreeing:
        raise MismatchError(f"{ours.title}: no variant computes the same, so nothing was checked")
    return found


class _Judge:
    """Holds tensors of variants against ours, and where a rival differs, both against float64.

    Args:
        expected: our tensors.
        exact: computes them in float64; called once, when a rival first differs.
    """

    def __init__(
        self,
        ours: Variant,
        expected: Sequence[Tensor],
        tolerances: Mapping[str, float],
        exact: Callable[[], list[Tensor]] | None,
    ) -> None:
        self.ours, self.expected, self.tolerances = ours, expected, tolerances
        self.exact = None if exact is None else cache(exact)

    def wrong(self, variant: Variant, results: Sequence[Tensor]) -> list[str]:
        """What of a rival's tensors is wrong, and how far off; MismatchError if ours is."""
        found = []
        for i, (name, tolerance) in enumerate(self.tolerances.items()):
            theirs, ours = results[i], self.expected[i]
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                raise MismatchError(
                    f"{variant.title}: {name} is {theirs.dtype} {tuple(theirs.shape)}; "
                    f"{self.ours.title} has {ours.dtype} {tuple(ours.shape)}"
                )
            if variant.differs or (error := relative_error(theirs, ours)) <= tolerance:
                continue
            if self.exact is None or not variant.rival:
                raise MismatchError(
                    f"{variant.title} and {self.ours.title} differ in {name}: relative error "
                    f"{error:.2e} > {tolerance:.2e}"
                )
            truth = self.exact()[i]
            our_error, their_error = relative_error(ours, truth), relative_error(theirs, truth)
            if not our_error <= tolerance:
                raise MismatchError(
                    f"{self.ours.title}: {name} is {our_error:.2e} > {tolerance:.2e} off float64, "
                    f"{variant.title} {their_error:.2e}"
                )
            if not their_error <= tolerance:
                found.append(
                    f"wrong {name}, {their_error:.1e} off float64 and fastfuse {our_error:.1e}"
                )
        return found


def relative_error(result: Tensor, expected: Tensor) -> float:
    """As in ``fastfuse.tolerances``, one image and a few channels at a time to stay small."""
    difference, scale = 0.0, 1e-30
    dtype = torch.promote_types(result.dtype, expected.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    result, expected = torch.atleast_1d(result), torch.atleast_1d(expected)
    axis = min(1, result.ndim - 1)
    for a, b in zip(result.split(64, axis), expected.split(64, axis), strict=True):
        error = (a.to(dtype) - b.to(dtype)).abs_().max().item()
        if error != error:  # NaN
            return float("inf")
        difference, scale = max(difference, error), max(scale, b.abs().max().item())
    return difference / scale
