"""Backbones, and whole models made of a backbone and heads."""

from fastfuse.models.checkpoint import load_checkpoint
from fastfuse.models.resnet import ResNetV1c
from fastfuse.models.segmentor import Segmentor, feature_maps

__all__ = ["ResNetV1c", "Segmentor", "feature_maps", "load_checkpoint"]
