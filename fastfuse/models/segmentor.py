"""Whole segmentation models: a backbone, a head, an auxiliary head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    Shape: images (N, 3, H, W) -> logits (N, num_classes, H, W).

    >>> import torch, fastfuse
    >>> model = fastfuse.models.Segmentor(
    ...     fastfuse.models.ResNetV1c(50),
    ...     fastfuse.heads.PSPHead(2048, channels=16, num_classes=5),
    ...     fastfuse.heads.FCNHead(1024, 16, 5, num_convs=1, concat_input=False))
    >>> images, targets = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    >>> model.loss(images, targets).backward()
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

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the images' size."""
        check_image("Segmentor", "images", images)
        logits = to_layout(self.decode_head(self._features(images)), False)
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
    def predict(self, images: Tensor, *, mode: str = "whole") -> Tensor:
        """The class of each pixel, (N, H, W) int64; in evaluation mode whatever the model's is.

        Args:
            images: (N, 3, H, W).
            mode: "whole": the images as they are.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in _MODES:
            raise ValueError(f"Segmentor: mode must be one of {', '.join(_MODES)}; got {mode!r}")
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return self(images).argmax(1)
        finally:
            for module in training:
                module.training = True

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy at the images' size, with the auxiliary head's, a scalar.

        Full-size logits are held of one image at a time, and not kept for backward.

        Args:
            images: (N, 3, H, W).
            targets: (N, H, W) int64, class of each pixel or ignore_index.

        Raises:
            ValueError: targets of another shape or dtype.
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
            return self._cross_entropy(self.decode_head, self._features(images), targets)
        features, auxiliary = self.training_features(images)
        loss = self._cross_entropy(self.decode_head, features, targets)
        auxiliary_loss = self._cross_entropy(self.auxiliary_head, [auxiliary], targets)
        return loss + self.auxiliary_weight * auxiliary_loss

    def _to_size(self, head: nn.Module, logits: Tensor, like: Tensor) -> Tensor:
        """A head's logits, contiguous, at the height and width of ``like``."""
        if logits.shape[2:] == like.shape[-2:]:
            return logits
        align_corners = bool(getattr(head, "align_corners", False))
        size = (like.shape[-2], like.shape[-1])
        return upsample_equalize_concat([logits], size=size, align_corners=align_corners)

    def _cross_entropy(
        self, head: nn.Module, features: Sequence[Tensor], targets: Tensor
    ) -> Tensor:
        """The mean over pixels that count, in float32 at least, an image at a time: its full-size
        logits are more than all features, and are computed again for backward."""

        def of_image(logits: Tensor, target: Tensor) -> Tensor:
            upsampled = self._to_size(head, logits, target)
            losses = F.cross_entropy(
                upsampled, target, ignore_index=self.ignore_index, reduction="none"
            )
            return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))

        logits = to_layout(head(features), False)
        losses = [
            checkpoint(of_image, *image, use_reentrant=False, preserve_rng_state=False)
            for image in zip(logits.split(1), targets.split(1), strict=True)
        ]
        return torch.stack(losses).sum() / (targets != self.ignore_index).sum()
