"""DINO as a textbook has it: the published algorithm in plain torch, without any of the means that make it fast.

It stands for the original implementation (facebookresearch/dino) in `make bench`, and follows its order of operations:
one forward pass per resolution, softmax attention written out, a double loop over pairs of views in the loss,
gradients clipped one parameter after another, AdamW as torch has it by default, the moving average in a loop.
Parameters have the names that this project's networks have, so the weights of one load into the other.
"""

from benchmarks.baseline.augmentation import multi_crop_transform
from benchmarks.baseline.loss import DINOLoss
from benchmarks.baseline.networks import Head, MultiCrop, VisionTransformer, prototypes_layer
from benchmarks.baseline.training import Training, clip_gradients, parameter_groups, update_teacher

__all__ = [
    "DINOLoss",
    "Head",
    "MultiCrop",
    "Training",
    "VisionTransformer",
    "clip_gradients",
    "multi_crop_transform",
    "parameter_groups",
    "prototypes_layer",
    "update_teacher",
]
