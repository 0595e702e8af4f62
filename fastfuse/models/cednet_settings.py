"""What a CEDNet is made of: variants, styles, depths, and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastfuse.nn.ced_block import TokenMixer
from fastfuse.ops.checks import check_ints, is_int

__all__ = ["BLOCKS", "STYLES", "VARIANTS", "Settings", "settings"]

Depths = tuple[int, int, int]  # blocks at 1/8, 1/16 and 1/32

STYLES = ("fpn", "unet", "hourglass")
# channels at 1/4 to 1/32, blocks in the stem, blocks of a stage, number of stages
Variant = tuple[tuple[int, int, int, int], int, Depths, int]
VARIANTS: dict[str, Variant] = {
    "tiny": ((96, 192, 352, 512), 3, (2, 4, 2), 3),
    "small": ((96, 192, 352, 512), 3, (2, 7, 2), 4),
    "base": ((128, 256, 448, 704), 3, (2, 7, 2), 4),
}
BLOCKS: dict[str, dict[str, Variant]] = {  # of the paper's table 5, all tiny but the usual ones
    "next": VARIANTS,
    "resnet": {"tiny": ((64, 128, 256, 384), 3, (1, 4, 2), 3)},
    "swin": {"tiny": ((96, 160, 288, 416), 3, (2, 4, 2), 3)},
    "cswin": {"tiny": ((64, 128, 256, 320), 3, (2, 8, 1), 3)},
}
# Blocks on the skip connections are paid for with channels; the paper has this for tiny alone.
HOURGLASS_CHANNELS = {"tiny": (96, 160, 320, 512)}


@dataclass(frozen=True)
class Settings:
    block: str
    style: str
    channels: tuple[int, int, int, int]
    stem_depth: int
    stage_depths: tuple[Depths, ...]
    last_decoder: bool
    drop_path: float
    layer_scale: float | None
    lr_blocks: bool
    token_mixer: TokenMixer | None
    recompute: bool

    def split(self, depths: Sequence[int]) -> tuple[Depths, tuple[int, int]]:
        """Blocks of the encoder (at 1/8, 1/16, 1/32) and of the decoder (at 1/16, 1/8)."""
        n3, n4, n5 = depths
        if self.style == "fpn":
            return (n3, n4, n5), (0, 0)
        return (n3 // 2, n4 // 2, n5), (n4 - n4 // 2, n3 - n3 // 2)

    def drop_rates(self) -> list[float]:
        """Of every block that has a rate, from the stem to the last stage."""
        count = self.stem_depth + sum(map(sum, self.stage_depths))
        return torch.linspace(0, self.drop_path, count, dtype=torch.float64, device="cpu").tolist()


def settings(
    variant: str,
    style: str,
    *,
    block: str,
    channels: Sequence[int] | None,
    depths: Sequence[Any] | None,
    stages: int | None,
    last_decoder: bool | None,
    **rest: Any,
) -> Settings:
    """A variant in a style, with what is not None in place of the variant's."""
    _check_choice("block", block, BLOCKS)
    of_block = "" if block == "next" else f" of block {block}"
    _check_choice(f"variant{of_block}", variant, BLOCKS[block])
    _check_choice("style", style, STYLES)
    if block != "next" and rest["token_mixer"] is not None:
        raise ValueError(f"CEDNet: token_mixer is for block next; got block {block}")
    own_channels, stem_depth, own_depths, own_stages = BLOCKS[block][variant]
    if style == "hourglass" and block == "next":
        own_channels = HOURGLASS_CHANNELS.get(variant, own_channels)
    if channels is not None and not (_ints(channels, 4) and min(channels) >= 1):
        raise ValueError(
            f"CEDNet: channels must be 4 ints of at least 1, at 1/4 to 1/32; got {channels!r}"
        )
    if stages is not None:
        check_ints("CEDNet", 1, stages=stages)
    if depths is None:
        stage_depths = (own_depths,) * (stages or own_stages)
    else:
        stem_depth, stage_depths = _depths(depths, stages, own_stages)
    _check_fit(style, stem_depth, stage_depths)
    if not 0 <= rest["drop_path"] < 1:
        raise ValueError(f"CEDNet: drop_path must be in [0, 1); got {rest['drop_path']}")
    return Settings(
        block=block,
        style=style,
        channels=own_channels if channels is None else tuple(channels),  # type: ignore[arg-type]
        stem_depth=stem_depth,
        stage_depths=stage_depths,
        last_decoder=style != "fpn" if last_decoder is None else last_decoder,
        **rest,
    )


def _check_choice(argument: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        listed = ", ".join(allowed)
        raise ValueError(f"CEDNet: {argument} must be one of {listed}; got {value!r}")


def _ints(value: Any, count: int) -> bool:
    return isinstance(value, Sequence) and len(value) == count and all(is_int(n) for n in value)


def _depths(depths: Any, stages: int | None, own_stages: int) -> tuple[int, tuple[Depths, ...]]:
    if _ints(depths, 4):
        return depths[0], (tuple(depths[1:]),) * (stages or own_stages)
    if isinstance(depths, Sequence) and len(depths) == 2 and _ints(depths[:1], 1):
        stem, listed = depths
        if isinstance(listed, Sequence) and listed and all(_ints(n, 3) for n in listed):
            if stages not in (None, len(listed)):
                raise ValueError(
                    f"CEDNet: depths must have one (n1, n2, n3) for each of {stages} stages; "
                    f"got {len(listed)}"
                )
            return stem, tuple(tuple(n) for n in listed)
    raise ValueError(
        "CEDNet: depths must be (n0, n1, n2, n3), or (n0, [(n1, n2, n3), ...]) with a triple for "
        f"each stage; got {depths!r}"
    )


def _check_fit(style: str, stem: int, stages: Sequence[Depths]) -> None:
    """Every level of every part of a stage has a block to work with."""
    if stem < 0:
        raise ValueError(f"CEDNet: depths must have n0 of at least 0; got {stem}")
    least = (1, 1, 1) if style == "fpn" else (2, 2, 1)
    for i, depths in enumerate(stages):
        if any(n < minimum for n, minimum in zip(depths, least, strict=True)):
            shared = "" if style == "fpn" else ", shared by encoder and decoder at 1/8 and 1/16"
            raise ValueError(
                f"CEDNet: depths of style {style} must be at least {least}{shared}; "
                f"got {tuple(depths)} in stage {i}"
            )
