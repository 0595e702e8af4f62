"""Decode heads whose fusions run on the package's ops; keys and shapes as MMSegmentation's."""

from fastfuse.heads.aspp import ASPPHead
from fastfuse.heads.decode_head import DecodeHead
from fastfuse.heads.fcn import FCNHead
from fastfuse.heads.psp import PSPHead
from fastfuse.heads.segformer import SegformerHead
from fastfuse.heads.sep_aspp import SepASPPHead
from fastfuse.heads.uper import UPerHead

__all__ = [
    "ASPPHead",
    "DecodeHead",
    "FCNHead",
    "PSPHead",
    "SegformerHead",
    "SepASPPHead",
    "UPerHead",
]
