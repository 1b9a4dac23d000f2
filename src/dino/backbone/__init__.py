"""Backbones: images `[N, C, H, W]` to features `[N, D]`, and how weights get into them."""

from dino.backbone.base import Backbone
from dino.backbone.convolutional import ConvolutionalBackbone
from dino.backbone.layouts import from_original_names, original_names
from dino.backbone.timm_models import TimmBackbone
from dino.backbone.transformer import Recompute
from dino.backbone.vision_transformer import VisionTransformer
from dino.backbone.weights import LoadReport, load_weights

__all__ = [
    "Backbone",
    "ConvolutionalBackbone",
    "LoadReport",
    "Recompute",
    "TimmBackbone",
    "VisionTransformer",
    "from_original_names",
    "load_weights",
    "original_names",
]
