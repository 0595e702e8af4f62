"""What a report says of a branch of a fusion."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BranchReport", "BranchScale"]


@dataclass(frozen=True)
class BranchScale:
    """Of one branch as it is concatenated.

    Attributes:
        mean, variance: over images (of weight 1 each), channels and positions.
        gradient: RMS of the gradient of the branch's part of the fusion's weight, for an upstream
            gradient of independent N(0, 1) values divided by the root of their number per channel
            (Proposition 3.1: its square is about mean² + variance).
    """

    mean: float
    variance: float
    gradient: float


@dataclass(frozen=True)
class BranchReport:
    """One branch of one fusion: where it comes from, and its scale before and after calibration."""

    fusion: str
    level: int
    channels: int
    size: tuple[int, int]
    target: tuple[int, int]
    before: BranchScale
    after: BranchScale

    @property
    def label(self) -> str:
        """Such as "level 2 (512 ch, x8)"."""
        return f"level {self.level} ({self.channels} ch, {self.ratio})"

    @property
    def ratio(self) -> str:
        """Of the upsampling: "x8", or "x5.3x8" where height and width differ."""
        ratios = [f"x{t / s:.3g}" for s, t in zip(self.size, self.target, strict=True)]
        return ratios[0] if ratios[0] == ratios[1] else "".join(ratios)
