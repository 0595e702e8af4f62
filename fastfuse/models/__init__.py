"""Backbones, and whole models made of a backbone and heads."""

from fastfuse.models.cednet import CEDNet, StageOutput
from fastfuse.models.cednet_checkpoint import load_published_cednet
from fastfuse.models.cednet_classifier import CEDNetClassifier
from fastfuse.models.cednet_upernet import (
    cednet_upernet_base,
    cednet_upernet_small,
    cednet_upernet_tiny,
)
from fastfuse.models.checkpoint import load_checkpoint
from fastfuse.models.detection import (
    DetectionFeatures,
    RetinaHead,
    RetinaNet,
    cednet_retinanet_base,
    cednet_retinanet_small,
    cednet_retinanet_tiny,
)
from fastfuse.models.resnet import ResNetV1c
from fastfuse.models.segmentor import Segmentor, feature_maps

__all__ = [
    "CEDNet",
    "CEDNetClassifier",
    "DetectionFeatures",
    "ResNetV1c",
    "RetinaHead",
    "RetinaNet",
    "Segmentor",
    "StageOutput",
    "cednet_retinanet_base",
    "cednet_retinanet_small",
    "cednet_retinanet_tiny",
    "cednet_upernet_base",
    "cednet_upernet_small",
    "cednet_upernet_tiny",
    "feature_maps",
    "load_checkpoint",
    "load_published_cednet",
]
