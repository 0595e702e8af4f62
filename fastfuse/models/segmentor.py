"""Whole segmentation models: a backbone, a head, an auxiliary head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfuse.backends import is_transformed
from fastfuse.models.evaluation import in_evaluation
from fastfuse.ops.checks import check_image, check_tensor
from fastfuse.ops.layout import to_layout
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

__all__ = ["Segmentor", "feature_maps"]

_MODES = ("whole",)


def feature_maps(output: Any, name: str = "Segmentor") -> list[Tensor]:
    """What a backbone returned, as a list of feature maps; ``name``: whose backbone, for errors.

    Sequences (timm's ``features_only``), mappings (torchvision's feature extractors), objects with
    ``feature_maps`` (transformers' backbones), and a tensor alone.

    Raises:
        TypeError: anything else.

    >>> import torch
    >>> from fastfuse.models import feature_maps
    >>> len(feature_maps({"0": torch.zeros(1, 2, 4, 4), "1": torch.zeros(1, 4, 2, 2)}))
    2
    """
    if isinstance(output, Tensor):
        return [output]
    maps = list(output.values()) if isinstance(output, Mapping) else output
    if not _are_maps(maps):
        maps = getattr(output, "feature_maps", None)
    if _are_maps(maps):
        return list(maps)
    raise TypeError(
        f"{name}: expected a sequence or mapping of tensors from the backbone, finest first, or an "
        f"object with feature_maps; got {type(output).__name__}"
    )


def _are_maps(maps: Any) -> bool:
    return isinstance(maps, Sequence) and bool(maps) and all(isinstance(m, Tensor) for m in maps)


class Segmentor(nn.Module):
    """Images to logits, labels or a loss; keys ``backbone.*``, ``decode_head.*``,
    ``auxiliary_head.*``, as MMSegmentation's models.

    Args:
        backbone: images -> features, finest first: see :func:`feature_maps`.
        decode_head: features -> logits, e.g. one of ``fastfuse.heads``.
        auxiliary_head: for training only; gets a sequence of one feature.
        auxiliary_index: which feature that is.
        auxiliary_weight: of its cross-entropy in the loss.
        ignore_index: the label of pixels that count neither in the loss nor as a class.

    Heads of one class give one logit for each pixel, of a sigmoid: that it is 1 and not 0.

    Shape: images (N, 3, H, W) -> logits (N, num_classes, H, W); with targets, see :meth:`loss`.

    >>> import torch, fastfuse
    >>> model = fastfuse.models.Segmentor(
    ...     fastfuse.models.ResNetV1c(50),
    ...     fastfuse.heads.PSPHead(2048, channels=16, num_classes=5),
    ...     fastfuse.heads.FCNHead(1024, 16, 5, num_convs=1, concat_input=False))
    >>> images, targets = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    >>> model(images, targets).backward()
    >>> model.eval().predict(images).shape
    torch.Size([2, 64, 64])
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None = None,
        *,
        auxiliary_index: int = -2,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.auxiliary_index = auxiliary_index
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits at the images' size; with targets the loss, a scalar: see :meth:`loss`.

        DistributedDataParallel, FSDP and ``compile()`` work in the call of a module: train with
        ``wrapped(images, targets)``. ``wrapped.module.loss`` goes past them, and every rank keeps
        the gradients of its own batch.
        """
        if targets is not None:
            return self.loss(images, targets)
        check_image("Segmentor", "images", images)
        logits = self._logits(self.decode_head, self._features(images))
        return self._to_size(self.decode_head, logits, images)

    def training_features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The decode head's features, and the one that the auxiliary head reads."""
        features = self._features(images)
        return features, features[self.auxiliary_index]

    def _features(self, images: Tensor) -> list[Tensor]:
        features = feature_maps(self.backbone(images))
        count = len(features)
        if self.auxiliary_head is not None and not -count <= self.auxiliary_index < count:
            raise ValueError(
                f"Segmentor: auxiliary_index must be below the backbone's {count} features; "
                f"got {self.auxiliary_index}"
            )
        return features

    @torch.no_grad()
    def predict(
        self, images: Tensor, *, mode: str = "whole", threshold: float | None = None
    ) -> Tensor:
        """The class of each pixel, (N, H, W) int64; in evaluation mode whatever the model's is.

        The model does not change, so that other threads may predict or train meanwhile. In
        training mode a copy of its modules runs, on the same parameters and buffers:
        :func:`fastfuse.models.evaluation.in_evaluation` says what it cannot copy.

        Args:
            images: (N, 3, H, W).
            mode: "whole": the images as they are.
            threshold: of one class alone: above which probability a pixel is 1. None: 0.5.

        Raises:
            ValueError: an unknown mode; a threshold outside (0, 1), or of several classes.
            RuntimeError: a module in training mode that cannot be copied.
        """
        if mode not in _MODES:
            raise ValueError(f"Segmentor: mode must be one of {', '.join(_MODES)}; got {mode!r}")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"Segmentor: threshold must be between 0 and 1; got {threshold}")
        logits = in_evaluation("Segmentor", self)(images)
        if logits.shape[1] > 1:
            if threshold is not None:
                raise ValueError(
                    f"Segmentor: threshold must be None for several classes, of which predict "
                    f"takes the likeliest; got {threshold} for {logits.shape[1]} classes"
                )
            return logits.argmax(1)
        above = 0.0 if threshold is None else math.log(threshold / (1 - threshold))
        return (logits[:, 0] > above).long()

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy at the images' size, with the auxiliary head's, a scalar.

        Of several classes the softmax's, of one class the sigmoid's (binary cross-entropy). The
        mean is over the pixels that count, of the whole batch; nan if there are none, as in
        ``torch.nn.functional.cross_entropy``. Full-size logits are held of one image at a time, and
        not kept for backward. To train with several processes call the model: see :meth:`forward`.

        Args:
            images: (N, 3, H, W).
            targets: (N, H, W) int64, class of each pixel (0 or 1 for one class) or ignore_index.

        Raises:
            ValueError: targets of another shape or dtype; heads of different numbers of classes.
            RuntimeError: targets of other values (on GPUs when the device comes to it).
        """
        check_image("Segmentor", "images", images)
        check_tensor("Segmentor", "targets", targets)
        expected = (images.shape[0], *images.shape[2:])
        if tuple(targets.shape) != expected or targets.dtype != torch.int64:
            raise ValueError(
                f"Segmentor: targets must be int64 of shape {expected}; "
                f"got {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
            )
        if self.auxiliary_head is None:
            logits = self._logits(self.decode_head, self._features(images))
            self._check_targets(targets, logits)
            return self._cross_entropy(self.decode_head, logits, targets)
        features, auxiliary = self.training_features(images)
        logits = self._logits(self.decode_head, features)
        auxiliary_logits = self._logits(self.auxiliary_head, [auxiliary])
        if logits.shape[1] != auxiliary_logits.shape[1]:
            raise ValueError(
                f"Segmentor: auxiliary_head must have the decode_head's {logits.shape[1]} classes; "
                f"got {auxiliary_logits.shape[1]}"
            )
        self._check_targets(targets, logits)
        loss = self._cross_entropy(self.decode_head, logits, targets)
        auxiliary_loss = self._cross_entropy(self.auxiliary_head, auxiliary_logits, targets)
        return loss + self.auxiliary_weight * auxiliary_loss

    @staticmethod
    def _logits(head: nn.Module, features: Sequence[Tensor]) -> Tensor:
        """At the head's own size, contiguous."""
        return to_layout(head(features), False)

    def _check_targets(self, targets: Tensor, logits: Tensor) -> None:
        """Device and labels, without waiting for a GPU."""
        if targets.device != logits.device:
            raise ValueError(
                f"Segmentor: targets must be on the logits' device, {logits.device}; "
                f"got {targets.device}"
            )
        last = max(logits.shape[1] - 1, 1)
        fits = ((targets >= 0) & (targets <= last)) | (targets == self.ignore_index)
        one = ", for num_classes is 1," if logits.shape[1] == 1 else ""
        torch._assert_async(
            fits.all(),
            f"Segmentor: targets must be classes from 0 to {last}{one} or ignore_index = "
            f"{self.ignore_index}; targets.unique() tells which are not",
        )

    def _to_size(self, head: nn.Module, logits: Tensor, like: Tensor) -> Tensor:
        """A head's logits, contiguous, at the height and width of ``like``."""
        if logits.shape[2:] == like.shape[-2:]:
            return logits
        align_corners = bool(getattr(head, "align_corners", False))
        size = (like.shape[-2], like.shape[-1])
        return upsample_equalize_concat([logits], size=size, align_corners=align_corners)

    def _cross_entropy(self, head: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over pixels that count, in float32 at least, an image at a time: its full-size
        logits are more than all features, and are computed again for backward."""

        def of_image(logits: Tensor, target: Tensor) -> Tensor:
            upsampled = self._to_size(head, logits, target)
            dtype = torch.promote_types(upsampled.dtype, torch.float32)
            if upsampled.shape[1] == 1:
                losses = F.binary_cross_entropy_with_logits(
                    upsampled[:, 0].to(dtype), (target == 1).to(dtype), reduction="none"
                ).masked_fill(target == self.ignore_index, 0)
            else:
                losses = F.cross_entropy(
                    upsampled, target, ignore_index=self.ignore_index, reduction="none"
                )
            return losses.sum(dtype=dtype)

        def recomputed(logits: Tensor, target: Tensor) -> Tensor:
            return checkpoint(
                of_image, logits, target, use_reentrant=False, preserve_rng_state=False
            )

        run = of_image if is_transformed() else recomputed  # torch.func does not recompute
        losses = list(map(run, logits.split(1), targets.split(1)))
        return torch.stack(losses).sum() / (targets != self.ignore_index).sum()
