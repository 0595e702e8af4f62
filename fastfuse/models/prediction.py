"""Labels of whole images: at once, by a sliding window, and averaged over scales and flips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfuse.backends import accumulation_dtype
from fastfuse.ops.checks import is_int
from fastfuse.ops.upsample_argmax import upsample_argmax
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

__all__ = ["Prediction", "check_prediction", "window_starts"]

MODES = ("whole", "slide")
_DIVISOR = 32  # scaled images are made multiples of it, as backbones want them

Region = tuple[slice, slice, Tensor, Tensor]


@dataclass(frozen=True)
class Prediction:
    """How labels are found.

    Attributes:
        logits: images -> (N, C, h, w), of any size.
        align_corners: of their upsampling.
        threshold: of one class: above which probability a pixel is 1.
        crop, stride: of the window, (height, width); None: the whole image.
        scales: by which images are resized beforehand.
        flip: whether they are mirrored too.
    """

    logits: Callable[[Tensor], Tensor]
    align_corners: bool = False
    threshold: float = 0.5
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False

    def labels(self, images: Tensor) -> Tensor:
        """(N, H, W) int64.

        Beside the model's own maps windows take the logits of those rows of windows that overlap,
        at their own size, and two windows' at full size. Scales and flips take three maps of all
        classes at full size.
        """
        if self.flip or tuple(self.scales) != (1.0,):
            return self._best(self._mean_probabilities(images), self.threshold)
        above = math.log(self.threshold / (1 - self.threshold))
        if self.crop is None:
            logits = self.logits(images)
            if logits.shape[1] > 1:
                size = (images.shape[2], images.shape[3])
                labels = upsample_argmax(logits, size, align_corners=self.align_corners)
                assert isinstance(labels, Tensor)
                return labels
            return self._best(self._upsampled(logits, images.shape[2:]), above)
        labels = images.new_empty((images.shape[0], *images.shape[2:]), dtype=torch.int64)
        for rows, columns, sums, counts in self._windows(images):  # a mean has the same largest
            labels[:, rows, columns] = self._best(sums, above * counts)
        return labels

    @staticmethod
    def _best(values: Tensor, above: float | Tensor) -> Tensor:
        return values.argmax(1) if values.shape[1] > 1 else (values[:, 0] > above).long()

    def _upsampled(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        height, width = size
        return upsample_equalize_concat(
            [logits], size=(height, width), align_corners=self.align_corners
        )

    # ---- scales and flips ------------------------------------------------------------------------

    def _mean_probabilities(self, images: Tensor) -> Tensor:
        """Of softmax, or of the sigmoid of one class, over all scales and flips."""
        height, width = images.shape[2:]
        total: Tensor | None = None
        for scale in self.scales:
            size = (height, width)
            if tuple(self.scales) != (1.0,):
                size = (_scaled(height, scale), _scaled(width, scale))
            resized = images
            if size != (height, width):
                resized = F.interpolate(images, size, mode="bilinear", align_corners=False)
            for mirrored in (False, True) if self.flip else (False,):
                logits = self._full(resized.flip(3) if mirrored else resized, (height, width))
                logits = logits.to(accumulation_dtype(logits.dtype))
                found = logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()
                found = found.flip(3) if mirrored else found
                total = found if total is None else total.add_(found)
        assert total is not None
        return total.div_(len(self.scales) * (2 if self.flip else 1))

    def _full(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits of all classes, at a size."""
        if self.crop is None:
            return self._upsampled(self.logits(images), size)
        logits: Tensor | None = None
        for rows, columns, sums, counts in self._windows(images):
            if logits is None:
                logits = sums.new_empty(*sums.shape[:2], *images.shape[2:])
            torch.div(sums, counts, out=logits[:, :, rows, columns])
        assert logits is not None
        if tuple(logits.shape[2:]) == size:
            return logits
        return self._upsampled(logits, size)

    # ---- windows ---------------------------------------------------------------------------------

    def _windows(self, images: Tensor) -> Iterator[Region]:
        """Every pixel once, in rectangles: rows, columns, the sum of the logits of all windows that
        see it, in memory that is used again, and their number.

        Windows stand in rows. A rectangle lies between two starts of rows and two of columns, and
        is finished when the last window that begins before it has been seen.
        """
        assert self.crop is not None
        assert self.stride is not None
        height, width = images.shape[2:]
        crop = (min(self.crop[0], height), min(self.crop[1], width))
        ys, xs = (
            window_starts(n, c, s)
            for n, c, s in zip((height, width), crop, self.stride, strict=True)
        )
        seen: dict[int, list[Tensor]] = {}  # rows of windows, by where they begin
        for i, top in enumerate(ys):
            bottom = ys[i + 1] if i + 1 < len(ys) else height
            seen = {y: row for y, row in seen.items() if y + crop[0] > top}
            seen[top] = []
            sums: Tensor | None = None  # of a window's columns
            for j, left in enumerate(xs):
                right = xs[j + 1] if j + 1 < len(xs) else width
                window = images[:, :, top : top + crop[0], left : left + crop[1]]
                logits = self.logits(window.contiguous())
                seen[top].append(logits)
                if sums is None:
                    # Of many windows: narrow dtypes would round each partial sum.
                    dtype = accumulation_dtype(logits.dtype)
                    shape = (*logits.shape[:2], bottom - top, crop[1])
                    sums = torch.zeros(shape, dtype=dtype, device=logits.device)
                else:  # on to the next window's columns, of which earlier ones have left their part
                    step = left - xs[j - 1]
                    sums[..., : crop[1] - step] = sums[..., step:].clone()
                    sums[..., crop[1] - step :] = 0
                for y, row in seen.items():
                    last = min(y + crop[0], bottom) - top  # of the rows that it sees
                    full = self._upsampled(row[j], crop)
                    sums[:, :, :last] += full[:, :, top - y : top - y + last]
                    del full
                counts = _counts(ys, crop[0], top, bottom)[:, None] * _counts(
                    xs, crop[1], left, right
                )
                yield (
                    slice(top, bottom),
                    slice(left, right),
                    sums[..., : right - left],
                    counts.to(sums),
                )


def _scaled(extent: int, scale: float) -> int:
    return max(_DIVISOR, round(extent * scale / _DIVISOR) * _DIVISOR)


def window_starts(extent: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along an axis: at multiples of the stride, the last one at the end.

    >>> window_starts(10, 4, 3)
    [0, 3, 6]
    >>> window_starts(10, 4, 4)
    [0, 4, 6]
    """
    count = max(-(-(extent - crop) // stride), 0) + 1
    return [min(i * stride, extent - crop) for i in range(count)]


def _counts(starts: Sequence[int], crop: int, begin: int, end: int) -> Tensor:
    """How many windows along an axis see each position from begin to end."""
    positions = torch.arange(begin, end)
    return sum(((positions >= s) & (positions < s + crop)).long() for s in starts)  # type: ignore[return-value]


def check_prediction(
    op: str,
    images: Tensor,
    mode: str,
    crop: Sequence[int] | int | None,
    stride: Sequence[int] | int | None,
    scales: Sequence[float],
    flip: bool,
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Crop and stride as pairs; None of the whole image."""
    if not isinstance(flip, bool):
        raise TypeError(f"{op}: flip must be a bool; got {type(flip).__name__}")
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(MODES)}; got {mode!r}")
    if (
        not isinstance(scales, Sequence)
        or not scales
        or not all(
            isinstance(s, (int, float)) and not isinstance(s, bool) and 0 < s < math.inf
            for s in scales
        )
    ):
        raise ValueError(f"{op}: scales must be positive numbers, one at least; got {scales!r}")
    if mode == "whole":
        if crop is not None or stride is not None:
            raise ValueError(f"{op}: crop and stride are of mode 'slide'; got mode 'whole'")
        return None, None
    if crop is None:
        raise ValueError(f"{op}: mode 'slide' needs crop, the window's (height, width); got None")
    window = _pair(op, "crop", crop)
    if window[0] > images.shape[2] or window[1] > images.shape[3]:
        raise ValueError(
            f"{op}: crop must not be larger than the images, {images.shape[2]} x "
            f"{images.shape[3]}; got {window[0]} x {window[1]}"
        )
    step = tuple(-(-2 * n // 3) for n in window) if stride is None else _pair(op, "stride", stride)
    if step[0] > window[0] or step[1] > window[1]:
        raise ValueError(
            f"{op}: stride must not be larger than crop, {window[0]} x {window[1]}, or pixels are "
            f"left out; got {step[0]} x {step[1]}"
        )
    return window, (step[0], step[1])


def _pair(op: str, argument: str, value: Sequence[int] | int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(is_int(n) and n >= 1 for n in pair):
        raise ValueError(
            f"{op}: {argument} must be a positive int or two (height, width); got {value!r}"
        )
    return int(pair[0]), int(pair[1])
