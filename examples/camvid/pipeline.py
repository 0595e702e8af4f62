"""Loss and prediction: the package's, and the same in PyTorch's own operations."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfuse
from examples.camvid.config import DIVISOR
from fastfuse.models import Segmentor
from fastfuse.models.evaluation import in_evaluation

__all__ = ["Objective", "predict", "running"]


def running(pipeline: str) -> AbstractContextManager[object]:
    """Every op on its fastest backend, or ("plain") on the reference, which is plain PyTorch."""
    return fastfuse.backend("reference") if pipeline == "plain" else contextlib.nullcontext()


class Objective(nn.Module):
    """Images and targets to the loss, for DistributedDataParallel to wrap."""

    def __init__(self, model: Segmentor, pipeline: str) -> None:
        super().__init__()
        self.model = model
        self.pipeline = pipeline

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.pipeline == "plain":
            return _plain_loss(self.model, images, targets)
        return self.model(images, targets)


def predict(model: Segmentor, pipeline: str, images: Tensor) -> Tensor:
    """The class of each pixel, (N, H, W), of images of any size: they are padded to a multiple of
    the coarsest stride, with what normalized images have as their mean."""
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % DIVISOR, 0, -height % DIVISOR))
    labels = model.predict(padded) if pipeline == "fused" else _plain_predict(model, padded)
    return labels[:, :height, :width]


def _plain_loss(model: Segmentor, images: Tensor, targets: Tensor) -> Tensor:
    features, auxiliary = model.training_features(images)
    assert model.auxiliary_head is not None
    logits = [model.decode_head(features), model.auxiliary_head([auxiliary])]
    main, second = (
        F.cross_entropy(
            F.interpolate(x, targets.shape[1:], mode="bilinear").float(),
            targets,
            ignore_index=model.ignore_index,
        )
        for x in logits
    )
    return main + model.auxiliary_weight * second


@torch.no_grad()
def _plain_predict(model: Segmentor, images: Tensor) -> Tensor:
    logits = in_evaluation("predict", model)(images, upsample=False)
    return F.interpolate(logits, images.shape[2:], mode="bilinear").argmax(1)
