"""The class of each pixel of upsampled logits, which are never built."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastfuse.backends import select
from fastfuse.ops.autocast import without_autocast
from fastfuse.ops.checks import check_feature_map, check_size
from fastfuse.ops.define import Operation
from fastfuse.ops.upsample_argmax.autograd import labels, labels_and_confidence
from fastfuse.ops.upsample_argmax.reference import reference
from fastfuse.ops.upsample_argmax.samples import samples

__all__ = ["OPERATION", "upsample_argmax"]

NAME = "upsample_argmax"


def upsample_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of each pixel of logits that are upsampled: ``argmax_c UP(logits)[c]``.

    UP is bilinear interpolation as in ``torch.nn.functional.interpolate`` (any ratio, up or down;
    the identity where sizes agree). Upsampled logits are never stored: a pixel's classes are
    interpolated in registers and compared at once. Ties take the lowest class, and the first NaN
    is larger than anything, as in ``torch.argmax``.

    Args:
        logits: (N, C, h, w), float64, float32, bfloat16 or float16 (interpolated in float32, or
            float64 for float64), C at least 1, any strides.
        size: (H, W) of the result in pixels.
        align_corners: as in ``interpolate``.
        return_confidence: whether to return the winners' probabilities too.

    Returns:
        (N, H, W) int64; with ``return_confidence`` a pair, and the second the softmax probability
        of each pixel's class, (N, H, W), float32 (float64 for float64). No gradient flows.

    Raises:
        TypeError: logits is not a tensor.
        ValueError: shapes, dtypes or size that do not fit.
        BackendError: a backend was asked for by name and cannot run.

    Autocast changes nothing: what decides is the logits' own dtype. Source: the last step of every
    segmentation network.

    >>> import torch, fastfuse
    >>> logits = torch.randn(1, 19, 16, 32)
    >>> fastfuse.upsample_argmax(logits, (64, 128)).shape
    torch.Size([1, 64, 128])
    """
    check_feature_map(NAME, "logits", logits)
    if logits.shape[1] < 1:
        raise ValueError(
            f"{NAME}: logits must have at least 1 class; got shape {tuple(logits.shape)}"
        )
    height, width = check_size(NAME, size, like=logits)
    logits = logits.detach()
    backend = select(OPERATION, logits)
    if backend == "reference":
        with without_autocast(logits.device.type):
            return reference(logits, (height, width), align_corners, return_confidence)
    op = labels_and_confidence if return_confidence else labels
    return op[backend](logits, height, width, align_corners)


OPERATION = Operation(
    labels, reference, samples, differentiable=False, autocasts=False, takes_size=True
)
