"""CEDNet as a classifier, as it is trained before dense prediction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.models.cednet import CEDNet, norm_after
from fastfuse.nn import Conv2d
from fastfuse.nn.initialize import kaiming_normal_linear
from fastfuse.ops.checks import check_ints, check_tensor

__all__ = ["CEDNetClassifier"]

_WIDTH = 2048


class ClassificationHead(nn.Module):
    """1x1 convolution, LN and GELU, average over the pixels, LN, linear."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.expand = norm_after(Conv2d(in_channels, _WIDTH, 1))
        self.norm = nn.LayerNorm(_WIDTH, eps=1e-6)
        self.linear = nn.Linear(_WIDTH, num_classes)

    def forward(self, c5: Tensor) -> Tensor:
        return self.linear(self.norm(F.gelu(self.expand(c5)).mean((2, 3))))


class CEDNetClassifier(nn.Module):
    """Logits of c5; in training of every stage's c5, each by a head of its own.

    Keys: ``backbone.*``, and for each stage that has a head ``heads.i.expand|norm|linear``, i
    counting stages; without auxiliary heads there is the last stage's alone, ``heads.0``.

    Args:
        variant: of :class:`CEDNet`.
        num_classes: at least 1.
        auxiliary_heads: whether the stages before the last have heads, for training.
        cednet: of :class:`CEDNet`; last_decoder is False, for nothing comes after the last c5.

    Shape: images (N, 3, H, W), H and W multiples of 32 -> logits of the last head,
    (N, num_classes); with targets the loss, a scalar.

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument out of its range; what :class:`CEDNet` raises.

    Source: CEDNet, section 4.1.

    >>> import torch, fastfuse
    >>> model = fastfuse.models.CEDNetClassifier("tiny", 10, depths=(1, 1, 1, 1))
    >>> images, targets = torch.randn(2, 3, 32, 32), torch.randint(10, (2,))
    >>> model(images, targets).backward()
    >>> model.eval()(images).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        variant: str = "tiny",
        num_classes: int = 1000,
        *,
        auxiliary_heads: bool = True,
        **cednet: Any,
    ) -> None:
        super().__init__()
        check_ints("CEDNetClassifier", 1, num_classes=num_classes)
        self.backbone = CEDNet(variant, **{"last_decoder": False, **cednet})
        count = len(self.backbone.stages) if auxiliary_heads else 1
        self.heads = nn.ModuleList(
            ClassificationHead(self.backbone.channels[-1], num_classes) for _ in range(count)
        )
        kaiming_normal_linear(self.heads)

    def forward(
        self, images: Tensor, targets: Tensor | None = None, *, label_smoothing: float = 0.0
    ) -> Tensor:
        """Logits of the last head, (N, num_classes); with targets the loss: see :meth:`loss`.

        Under DistributedDataParallel or FSDP train with ``wrapped(images, targets)``, as
        :meth:`fastfuse.models.Segmentor.forward` says.
        """
        if targets is not None:
            return self.loss(images, targets, label_smoothing=label_smoothing)
        *_, c5 = self.backbone(images)
        return self.heads[-1](c5)

    def forward_heads(self, images: Tensor) -> list[Tensor]:
        """Logits of every head, in the order of the stages."""
        outputs = self.backbone(images, stages=True)[-len(self.heads) :]
        return [head(output.c5) for head, output in zip(self.heads, outputs, strict=True)]

    def loss(self, images: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, averaged over images and heads, a scalar.

        Args:
            images: (N, 3, H, W).
            targets: (N,) int64 classes, or (N, num_classes) probabilities in the logits' dtype.
            label_smoothing: in [0, 1].

        Raises:
            ValueError: targets of another shape or dtype; a model of one class.
        """
        logits = self.forward_heads(images)
        self._check(targets, logits[0])
        losses = [F.cross_entropy(x, targets, label_smoothing=label_smoothing) for x in logits]
        return torch.stack(losses).mean()

    def _check(self, targets: Tensor, logits: Tensor) -> None:
        check_tensor("CEDNetClassifier", "targets", targets)
        if logits.shape[1] < 2:
            raise ValueError(
                "CEDNetClassifier: loss needs num_classes of at least 2, for the softmax of one "
                "class is 1 whatever its logit; got 1. Use 2 classes, or a loss of your own, as "
                "torch.nn.functional.binary_cross_entropy_with_logits, on forward_heads(images)"
            )
        classes = tuple(targets.shape) == tuple(logits.shape[:1]) and targets.dtype == torch.int64
        probabilities = targets.shape == logits.shape and targets.is_floating_point()
        if not (classes or probabilities):
            raise ValueError(
                f"CEDNetClassifier: targets must be int64 classes of shape ({logits.shape[0]},) or "
                f"probabilities of shape {tuple(logits.shape)}; "
                f"got {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
            )
