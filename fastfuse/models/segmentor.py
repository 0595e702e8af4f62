"""Whole segmentation models: a backbone, a head, an auxiliary head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.backends import accumulation_dtype
from fastfuse.models.evaluation import in_evaluation
from fastfuse.models.prediction import Prediction, check_prediction
from fastfuse.ops.checks import check_feature_map, check_tensor
from fastfuse.ops.layout import prefer_memory_format
from fastfuse.ops.upsample_cross_entropy import upsample_cross_entropy
from fastfuse.ops.upsample_equalize_concat import upsample_equalize_concat

__all__ = ["Segmentor", "feature_maps"]


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

    def forward(
        self, images: Tensor, targets: Tensor | None = None, *, upsample: bool = True
    ) -> Tensor:
        """Logits at the images' size; with targets the loss, a scalar: see :meth:`loss`.

        DistributedDataParallel, FSDP and ``compile()`` work in the call of a module: train with
        ``wrapped(images, targets)``. ``wrapped.module.loss`` goes past them, and every rank keeps
        the gradients of its own batch.

        Args:
            images: (N, 3, H, W).
            targets: see :meth:`loss`.
            upsample: False: logits of the head's own size, for :func:`fastfuse.upsample_argmax`.
        """
        if targets is not None:
            return self.loss(images, targets)
        check_feature_map("Segmentor", "images", images)
        logits = self.decode_head(self._features(images))
        return self._to_size(self.decode_head, logits, images) if upsample else logits

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
        self,
        images: Tensor,
        *,
        mode: str = "whole",
        threshold: float | None = None,
        crop: Sequence[int] | int | None = None,
        stride: Sequence[int] | int | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> Tensor:
        """The class of each pixel, (N, H, W) int64; in evaluation mode whatever the model's is.

        The model does not change, so that other threads may predict or train meanwhile. In
        training mode a copy of its modules runs, on the same parameters and buffers:
        :func:`fastfuse.models.evaluation.in_evaluation` says what it cannot copy.

        Args:
            images: (N, 3, H, W).
            mode: "whole": the images as they are, whose logits are never built at their size;
                "slide": windows, and the mean of the logits where they overlap.
            threshold: of one class alone: above which probability a pixel is 1. None: 0.5.
            crop: the window's (height, width) in pixels, or one number for both.
            stride: from one window to the next, in pixels; None: two thirds of crop.
            scales: by which images are resized beforehand, bilinearly and to multiples of 32, by 1
                too if there are others.
            flip: whether they are mirrored from left to right too. Of several scales, and of flips,
                the mean of the probabilities decides: the papers' multi-scale test is
                ``scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True``.

        Windows take memory for the head's logits of those rows of windows that overlap, and for two
        windows at full size; scales and flips take three maps of all classes at the images' size.

        Raises:
            TypeError: flip is no bool.
            ValueError: an unknown mode; a threshold outside (0, 1), or of several classes; a crop
                larger than the images, a stride larger than the crop; no scales.
            RuntimeError: a module in training mode that cannot be copied.
        """
        check_feature_map("Segmentor", "images", images)
        window, step = check_prediction("Segmentor", images, mode, crop, stride, scales, flip)
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"Segmentor: threshold must be between 0 and 1; got {threshold}")
        model = in_evaluation("Segmentor", self)

        def logits_of(images: Tensor) -> Tensor:
            logits: Tensor = model(images, upsample=False)
            if threshold is not None and logits.shape[1] > 1:
                raise ValueError(
                    f"Segmentor: threshold must be None for several classes, of which predict "
                    f"takes the likeliest; got {threshold} for {logits.shape[1]} classes"
                )
            return logits

        prediction = Prediction(
            logits_of,
            bool(getattr(self.decode_head, "align_corners", False)),
            0.5 if threshold is None else threshold,
            window,
            step,
            tuple(scales),
            flip,
        )
        return prediction.labels(images)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy at the images' size, with the auxiliary head's, a scalar.

        Of several classes the softmax's, of one class the sigmoid's (binary cross-entropy). The
        mean is over the pixels that count, of the whole batch; nan if there are none, as in
        ``torch.nn.functional.cross_entropy``. Full-size logits are not built, but of one class:
        see :func:`fastfuse.upsample_cross_entropy`. To train with several processes call the
        model: see :meth:`forward`.

        Args:
            images: (N, 3, H, W).
            targets: (N, H, W) int64, class of each pixel (0 or 1 for one class) or ignore_index.

        Raises:
            ValueError: targets of another shape or dtype; heads of different numbers of classes.
            RuntimeError: targets of other values (on GPUs when the device comes to it).
        """
        check_feature_map("Segmentor", "images", images)
        check_tensor("Segmentor", "targets", targets)
        expected = (images.shape[0], *images.shape[2:])
        if tuple(targets.shape) != expected or targets.dtype != torch.int64:
            raise ValueError(
                f"Segmentor: targets must be int64 of shape {expected}; "
                f"got {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
            )
        if self.auxiliary_head is None:
            logits = self.decode_head(self._features(images))
            self._check_targets(targets, logits)
            return self._cross_entropy(self.decode_head, logits, targets)
        features, auxiliary = self.training_features(images)
        logits = self.decode_head(features)
        auxiliary_logits = self.auxiliary_head([auxiliary])
        if logits.shape[1] != auxiliary_logits.shape[1]:
            raise ValueError(
                f"Segmentor: auxiliary_head must have the decode_head's {logits.shape[1]} classes; "
                f"got {auxiliary_logits.shape[1]}"
            )
        self._check_targets(targets, logits)
        loss = self._cross_entropy(self.decode_head, logits, targets)
        auxiliary_loss = self._cross_entropy(self.auxiliary_head, auxiliary_logits, targets)
        return loss + self.auxiliary_weight * auxiliary_loss

    def _check_targets(self, targets: Tensor, logits: Tensor) -> None:
        """Device and labels, without waiting for a GPU."""
        if targets.device != logits.device:
            raise ValueError(
                f"Segmentor: targets must be on the logits' device, {logits.device}; "
                f"got {targets.device}"
            )
        if logits.shape[1] > 1 and logits.device.type == "cpu":
            return  # the op looks at the labels, and names the pixel
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
        logits = prefer_memory_format(logits, False)
        if logits.shape[2:] == like.shape[-2:]:
            return logits
        align_corners = bool(getattr(head, "align_corners", False))
        size = (like.shape[-2], like.shape[-1])
        return upsample_equalize_concat([logits], size=size, align_corners=align_corners)

    def _cross_entropy(self, head: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over pixels that count, in float32 at least."""
        if logits.shape[1] > 1:
            return upsample_cross_entropy(
                logits,
                targets,
                ignore_index=self.ignore_index,
                align_corners=bool(getattr(head, "align_corners", False)),
            )
        upsampled = self._to_size(head, logits, targets)[:, 0]
        dtype = accumulation_dtype(upsampled.dtype)
        losses = F.binary_cross_entropy_with_logits(
            upsampled.to(dtype), (targets == 1).to(dtype), reduction="none"
        )
        counted = targets != self.ignore_index
        return losses.masked_fill(~counted, 0).sum() / counted.sum()
