"""CEDNet: a cascade of encoder-decoders at 1/8, 1/16 and 1/32 of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfuse.backends import is_transformed
from fastfuse.models.cednet_blocks import Blocks, activation_of, norm_of
from fastfuse.models.cednet_settings import Settings, settings
from fastfuse.nn import Conv2d, LayerNorm2d
from fastfuse.nn.batch_norm import NormedSequential
from fastfuse.nn.ced_block import TokenMixer
from fastfuse.nn.initialize import kaiming_normal_linear
from fastfuse.ops.checks import check_feature_map
from fastfuse.ops.layout import prefer_memory_format
from fastfuse.ops.upsample_add import upsample_add

__all__ = ["CEDNet", "StageOutput", "norm_after"]

T = TypeVar("T")

STRIDE = 32  # of c5: what height and width must be multiples of
_STEM = 32


class StageOutput(NamedTuple):
    """The maps of one stage, (N, C, H / stride, W / stride).

    c3, c4 and c5 (strides 8, 16, 32) are the encoder's; decoded_c3 and decoded_c4 the decoder's,
    None without one; c2 (stride 4) is the stem's, in the first stage's output alone.
    """

    c3: Tensor
    c4: Tensor
    c5: Tensor
    decoded_c3: Tensor | None
    decoded_c4: Tensor | None
    c2: Tensor | None = None


def norm_after(conv: nn.Conv2d, norm: Callable[[int], nn.Module] = LayerNorm2d) -> nn.Sequential:
    """A convolution and the norm of its channels, keys ``conv``, ``norm``."""
    sequence = NormedSequential()
    sequence.add_module("conv", conv)
    sequence.add_module("norm", norm(conv.out_channels))
    return sequence


def _halved(config: Settings, level: int) -> nn.Sequential:
    """From a level, 0 to 3 for c2 to c5, to the next."""
    fine, coarse = config.channels[level : level + 2]
    return norm_after(Conv2d(fine, coarse, 2, stride=2), norm_of(config.block))


class Decoder(nn.Module):
    """Coarse to fine: each map joined with the coarser one's 1x1 convolution, upsampled.

    Keys, of 1/16 and 1/8 in this order: ``lateral.i`` (hourglass), ``reduce.i``, ``norm.i``,
    ``blocks.i.j`` (UNet and hourglass).
    """

    def __init__(self, config: Settings, depths: Sequence[int], make: Blocks) -> None:
        super().__init__()
        _, c3, c4, c5 = config.channels
        joined, norm = (2, 1), norm_of(config.block)
        self.lateral = nn.ModuleList(map(make.one, joined)) if config.style == "hourglass" else None
        # Before the upsampling, where the pixels are a quarter as many.
        self.reduce = nn.ModuleList((Conv2d(c5, c4, 1), Conv2d(c4, c3, 1)))
        self.norm = nn.ModuleList((norm(c4), norm(c3)))
        self.blocks = nn.ModuleList(map(make, joined, depths))

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor]:
        decoded_c4 = self._join(0, c5, c4)
        return self._join(1, decoded_c4, c3), decoded_c4

    def _join(self, i: int, coarser: Tensor, skip: Tensor) -> Tensor:
        if self.lateral is not None:
            skip = self.lateral[i](skip)
        return self.blocks[i](self.norm[i](upsample_add(self.reduce[i](coarser), skip)))


class Stage(nn.Module):
    """Keys: ``encoder.i.j`` for 1/8, 1/16, 1/32, ``downsample.i.conv|norm``, ``decoder.*``."""

    def __init__(
        self, config: Settings, depths: Sequence[int], make: Blocks, *, decodes: bool
    ) -> None:
        super().__init__()
        encoder, decoder = config.split(depths)
        self.encoder = nn.ModuleList(map(make, (1, 2, 3), encoder))
        self.downsample = nn.ModuleList((_halved(config, 1), _halved(config, 2)))
        self.decoder = Decoder(config, decoder, make) if decodes else None

    def forward(self, x: Tensor) -> StageOutput:
        c3 = self.encoder[0](x)
        c4 = self.encoder[1](self.downsample[0](c3))
        c5 = self.encoder[2](self.downsample[1](c4))
        decoded = (None, None) if self.decoder is None else self.decoder(c3, c4, c5)
        return StageOutput(c3, c4, c5, *decoded)


def _check_images(images: Tensor) -> None:
    check_feature_map("CEDNet", "images", images, channels=3)
    height, width = images.shape[2:]
    if height % STRIDE or width % STRIDE:
        down, right = -height % STRIDE, -width % STRIDE
        raise ValueError(
            f"CEDNet: images must be multiples of {STRIDE} high and wide; got {height} x {width}. "
            f"The next ones are {height + down} x {width + right}: "
            f"torch.nn.functional.pad(images, (0, {right}, 0, {down}))"
        )


for _name in ("_check_images", "prefer_memory_format", "upsample_add"):
    torch.fx.wrap(_name)  # recorded, not looked into


class CEDNet(nn.Module):
    """The backbone of *CEDNet*: a stem, and stages that encode and decode again and again.

    Every stage takes the map at 1/8 and fuses its three levels, so that most of the parameters come
    after a first fusion. Keys: ``stem.*``, ``blocks.i`` (at 1/4), ``downsample.conv|norm``,
    ``stages.i.encoder|downsample|decoder.*``. The authors' checkpoints load by
    ``fastfuse.models.load_published_cednet``.

    Args:
        variant: "tiny", "small" or "base": of channels, depths and stages. Of other blocks than
            "next" there is "tiny" alone.
        style: how a stage decodes. "fpn": nothing but the fusion; "unet": half of the blocks at 1/8
            and 1/16 come after it; "hourglass": as unet, with a block on each skip connection.
        block: "next", CED blocks; "resnet", with batch norms and ReLUs throughout; "swin"; "cswin":
            see ``fastfuse.nn.CEDBlock``, ``ResNetBlock``, ``SwinBlock``, ``CSwinBlock``.
        last_decoder: whether the last stage decodes. None: in style fpn no, else yes, as in the
            paper's tables.
        drop_path: the last block's rate of stochastic depth, in [0, 1); that of others rises
            linearly from 0. The paper's, for tiny, small, base: 0.1, 0.4, 0.5 in classification,
            0.2, 0.3, 0.4 in dense prediction.
        layer_scale: initial value of every block's; None: there is none. The paper's: 1e-6, in
            segmentation 1. Blocks but "next" have none.
        lr_blocks: whether blocks at 1/32 are long-range ones: LR CED blocks, or those of other
            blocks; of "cswin" those whose tokens see all of their image.
        channels: of c2, c3, c4 and c5, instead of the variant's.
        depths: numbers of blocks, instead of the variant's: (n0, n1, n2, n3), at 1/4 in the stem
            and at 1/8, 1/16, 1/32 in every stage; or (n0, [(n1, n2, n3), ...]), stage by stage.
        stages: number of stages, instead of the variant's.
        token_mixer: channels -> a module that keeps (N, C, H, W), its dtype and its device, e.g.
            ``fastfuse.nn.conv3x3`` or window attention, instead of every block's depthwise 7x7
            convolution but the dilated one of LR CED blocks. It must take any H and W (windows pad
            for themselves), and may return any memory format. Of block "next" alone.
        checkpoint: whether training keeps no more than the maps between stages, and computes the
            rest again in backward.
        recompute: whether it keeps no more than the maps between blocks; if not, what blocks
            compute again otherwise is kept (docs/cednet.md has speed and memory). Of
            attention nothing is computed again, of "resnet" ReLUs' results are in any case.

    Attributes:
        channels: of the four maps.
        block: as given.

    Shape: images (N, 3, H, W), H and W multiples of 32 -> maps c2, c3, c4, c5 of strides 4, 8, 16,
    32, channels_last; of the last stage's decoder, if it has one, else of its encoder.

    Raises:
        ValueError: an unknown block, variant or style; channels, depths or stages that do not fit;
            a token_mixer beside another block than "next"; images of another size or number of
            channels.

    Source: *CEDNet: A Cascade Encoder-Decoder Network for Dense Prediction*, section 3; of the
    blocks table 5.

    >>> import torch, fastfuse
    >>> backbone = fastfuse.models.CEDNet("tiny", "unet", depths=(1, 2, 2, 1), stages=2).eval()
    >>> [tuple(c.shape[1:]) for c in backbone(torch.randn(1, 3, 64, 96))]
    [(96, 16, 24), (192, 8, 12), (352, 4, 6), (512, 2, 3)]
    """

    def __init__(
        self,
        variant: str = "tiny",
        style: str = "fpn",
        *,
        block: str = "next",
        last_decoder: bool | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
        lr_blocks: bool = True,
        channels: Sequence[int] | None = None,
        depths: Sequence[int | Sequence[Sequence[int]]] | None = None,
        stages: int | None = None,
        token_mixer: TokenMixer | None = None,
        checkpoint: bool = False,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        config = settings(
            variant,
            style,
            block=block,
            channels=channels,
            depths=depths,
            stages=stages,
            last_decoder=last_decoder,
            drop_path=drop_path,
            layer_scale=layer_scale,
            lr_blocks=lr_blocks,
            token_mixer=token_mixer,
            recompute=recompute,
        )
        self.channels = config.channels
        self.block = block
        self.checkpoint = checkpoint
        c2, norm, activation = config.channels[0], norm_of(block), activation_of(block)
        make = Blocks(config, iter(config.drop_rates()))
        self.stem = NormedSequential(
            Conv2d(3, _STEM, 3, stride=2, padding=1),
            norm(_STEM),
            activation(),
            Conv2d(_STEM, c2, 3, stride=2, padding=1),
            norm(c2),
            activation(),
        )
        self.blocks = make(0, config.stem_depth)
        self.downsample = _halved(config, 0)
        last = len(config.stage_depths) - 1
        self.stages = nn.ModuleList(
            Stage(config, depths, make, decodes=i < last or config.last_decoder)
            for i, depths in enumerate(config.stage_depths)
        )
        kaiming_normal_linear(self)

    def forward(
        self, images: Tensor, *, stages: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | list[StageOutput]:
        """c2, c3, c4 and c5; or, of auxiliary heads, the maps of every stage.

        Both come of a call of the module, in which hooks, wrappers and ``compile()`` work.

        Args:
            images: (N, 3, H, W).
            stages: whether to return a :class:`StageOutput` for each stage, the first with c2.
        """
        outputs = self._stages(images)
        # Of the root, torch.fx passes a proxy.
        return outputs if stages is True else self.last_maps(outputs)

    def forward_stages(self, images: Tensor) -> list[StageOutput]:
        """As ``self(images, stages=True)``."""
        return cast("list[StageOutput]", self(images, stages=True))

    def _stages(self, images: Tensor) -> list[StageOutput]:
        _check_images(images)
        images = prefer_memory_format(images, True)  # every op below is at its best there
        c2 = self._run(self._stem, images)
        x = self.downsample(c2)
        outputs: list[StageOutput] = []
        for stage in self.stages:
            output = self._run(stage, x)
            outputs.append(output)
            x = output.c3 if output.decoded_c3 is None else output.decoded_c3
        outputs[0] = outputs[0]._replace(c2=c2)
        return outputs

    @staticmethod
    def last_maps(outputs: Sequence[StageOutput]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c2, c3, c4 and c5, as ``forward`` gives them, of all stages' outputs."""
        c2, last = outputs[0].c2, outputs[-1]
        assert c2 is not None
        if last.decoded_c3 is None or last.decoded_c4 is None:
            return c2, last.c3, last.c4, last.c5
        return c2, last.decoded_c3, last.decoded_c4, last.c5

    def _stem(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))

    def _run(self, part: Callable[[Tensor], T], x: Tensor) -> T:
        recomputes = self.checkpoint and self.training and torch.is_grad_enabled()
        if recomputes and not is_transformed():
            return checkpoint(part, x, use_reentrant=False)
        return part(x)
