"""ResNets and EfficientNet-B0 of torchvision as backbones, by torchvision's parameter names.

Shapes: N images, C channels, H x W pixels, D features.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dino.backbone.base import check_at_least
from dino.backbone.layouts import State
from dino.backbone.one_size import OneSizeBackbone
from dino.backbone.weights import load_initial_weights

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
ARCHITECTURES = (*RESNETS, "efficientnet_b0")


class ConvolutionalBackbone(OneSizeBackbone):
    """A torchvision network without its classifier; its feature is the last map, averaged over positions.

    Any image size goes (`patch_size` 1). The original takes torchvision's networks too, but leaves EfficientNet's
    stochastic depth on in the teacher (main_dino.py, train_dino); here `StudentTeacher` removes it.

    Args:
        architecture: one of `ARCHITECTURES`.
        stem: `imagenet` (7 x 7 with stride 2, max-pool) or, for ResNets, `small` (3 x 3 with stride 1, no max-pool:
            the habit for 32-pixel images, e.g. SimCLR, appendix B.9).
        channels: C.
        drop_path_rate: stochastic depth of the last block, EfficientNet only; grows linearly from 0.
        weights: file to start from (`load_weights`), teacher's weights where it has both.
        pretrained: start from torchvision's ImageNet weights (supervised), downloaded.

    Raises:
        ValueError: for a value that is not among those above, naming it.
    """

    def __init__(
        self,
        *,
        architecture: str,
        stem: Literal["imagenet", "small"] = "imagenet",
        channels: int = 3,
        drop_path_rate: float = 0.0,
        weights: str | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self._check(architecture, stem, drop_path_rate, pretrained)
        check_at_least("backbone", 1, channels=channels)
        import torchvision.models  # late: 7 s

        is_resnet = architecture in RESNETS
        options: dict[str, Any] = {} if is_resnet else {"stochastic_depth_prob": drop_path_rate}
        network = torchvision.models.get_model(architecture, weights=None, **options)
        classifier = network.fc if is_resnet else network.classifier[-1]
        self.embed_dim = classifier.in_features
        if is_resnet:
            network.conv1 = _first_convolution(network.conv1, channels, small=stem == "small")
            if stem == "small":
                network.maxpool = nn.Identity()
        else:
            network.features[0][0] = _first_convolution(network.features[0][0], channels, small=False)
        # torchvision registers its parts in the order of the forward pass; so they run in `forward`.
        for name, part in network.named_children():
            if name not in ("fc", "classifier"):
                self.add_module(name, part)

        def published_weights() -> State:
            return dict(torchvision.models.get_model_weights(architecture).DEFAULT.get_state_dict(progress=False))

        load_initial_weights(self, weights, published_weights if pretrained else None)
        self.to(memory_format=torch.channels_last)  # the faster one of convolutions, on CPUs and tensor cores

    def features_of(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, D]`."""
        images = images.contiguous(memory_format=torch.channels_last)
        for part in self.children():
            images = part(images)
        return images.flatten(1)

    @staticmethod
    def _check(architecture: str, stem: str, drop_path_rate: float, pretrained: bool) -> None:
        if architecture not in ARCHITECTURES:
            raise ValueError(f"backbone.architecture={architecture}: use {', '.join(ARCHITECTURES)}, or backbone=timm")
        if stem not in ("imagenet", "small"):
            raise ValueError(f"backbone.stem={stem}: use imagenet or small")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"backbone.drop_path_rate={drop_path_rate}: must be at least 0 and below 1")
        if stem == "small" and architecture not in RESNETS:
            raise ValueError(f"backbone.stem=small is for ResNets; {architecture} has only imagenet")
        if drop_path_rate > 0 and architecture in RESNETS:
            raise ValueError(f"backbone.drop_path_rate={drop_path_rate}: {architecture} has no drop path; use 0")
        if pretrained and stem == "small":
            raise ValueError("backbone.pretrained=true needs backbone.stem=imagenet: the small stem has no weights")


def _first_convolution(convolution: nn.Conv2d, channels: int, *, small: bool) -> nn.Conv2d:
    """`convolution`, or one for `channels` channels or small images in its place."""
    if channels == convolution.in_channels and not small:
        return convolution
    shape: dict[str, Any] = {
        "kernel_size": 3 if small else convolution.kernel_size,
        "stride": 1 if small else convolution.stride,
        "padding": 1 if small else convolution.padding,
    }
    changed = nn.Conv2d(channels, convolution.out_channels, **shape, bias=False)
    nn.init.kaiming_normal_(changed.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    return changed
