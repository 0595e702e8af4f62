"""The scale equalizer of *Scale Equalization for Multi-Level Feature Fusion*."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.ops.checks import FLOAT32, check_ints

__all__ = ["ScaleEqualizer"]


class ScaleEqualizer(nn.Module):
    """``(x_i - mean[i]) / std[i]`` for every level i, with constants found by calibration.

    Bilinear upsampling lowers a level's variance (Theorem 3.2), and the gradient of a fusion
    convolution's weights is proportional to it (Proposition 3.1): levels upsampled more learn more
    slowly. Equalized levels have mean 0 and variance 1 over the training set.

    Args:
        num_levels: number of levels, at least 1.

    Attributes:
        mean, std: float32 buffers of shape (num_levels,); 0 and 1 until calibrated.

    Raises:
        TypeError: a number that is no int.
        ValueError: num_levels < 1, or statistics that are not finite or a std <= 0.

    >>> import torch, fastfuse
    >>> equalizer = fastfuse.nn.ScaleEqualizer(2)
    >>> equalizer.set_statistics(mean=[0.4, 0.4], std=[0.6, 0.5])
    >>> equalizer.calibrated
    True
    >>> [y.shape for y in equalizer([torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4)])]
    [torch.Size([1, 3, 4, 4]), torch.Size([1, 5, 4, 4])]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        check_ints("ScaleEqualizer", 1, num_levels=num_levels)
        self.num_levels = num_levels
        self.register_buffer("mean", torch.zeros(num_levels, dtype=torch.float32))
        self.register_buffer("std", torch.ones(num_levels, dtype=torch.float32))

    @property
    def calibrated(self) -> bool:
        """Whether the statistics differ from the identity's (reads the buffers)."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    @torch.no_grad()
    def set_statistics(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Writes mean and std, one value per level each, after checking them."""
        values = {
            name: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64, device="cpu")
            for name, v in (("mean", mean), ("std", std))
        }
        for name, value in values.items():
            if problem := self._problem(name, value):
                raise ValueError(f"ScaleEqualizer: {problem}")
        self.mean.copy_(values["mean"])
        self.std.copy_(values["std"])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Equalizes features that are already of one size, unfused; one tensor per level.

        ``upsample_equalize_concat`` does the same together with upsampling and concatenation.
        """
        if len(features) != self.num_levels:
            raise ValueError(
                f"ScaleEqualizer: expected {self.num_levels} levels; got {len(features)}"
            )
        return [(x - self.mean[i]) / self.std[i] for i, x in enumerate(features)]

    def extra_repr(self) -> str:
        return f"{self.num_levels}"  # not the values: reading them would wait for the device

    def _problem(self, name: str, value: Tensor) -> str | None:
        if tuple(value.shape) != (self.num_levels,):
            return (
                f"{name} must have one value per level, shape ({self.num_levels},); "
                f"got shape {tuple(value.shape)}"
            )
        if value.is_meta:
            return None
        stored = value.to(getattr(self, name).dtype)  # where a tiny value may become 0
        if not stored.isfinite().all():
            return f"{name} must be finite in {stored.dtype}; got {value.tolist()}"
        if name == "std" and not (stored >= FLOAT32.tiny).all():
            return (
                f"std must be positive (at least {FLOAT32.tiny:.2e}) in {stored.dtype}; "
                f"got {value.tolist()}"
            )
        return None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = [
            f"{prefix}{name}: ScaleEqualizer: {problem}"
            for name in ("mean", "std")
            if isinstance(value := state_dict.get(prefix + name), Tensor)
            and (problem := self._problem(name, value))
        ]
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
