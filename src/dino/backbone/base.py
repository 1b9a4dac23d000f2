"""What every backbone is to the rest: images `[N, C, H, W]` to features `[N, D]`.

Shapes: N images, C channels, H x W pixels, D features.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from dino.backbone.transformer import Recompute


class Backbone(nn.Module, ABC):
    """A network from images to features; batches of several sizes at once are one pass."""

    recompute: Recompute = "nothing"  # of what the backward pass needs (`trainer.memory`)
    embed_dim: int  # D
    patch_size: int = 1  # both sides of an image must be multiples of it [pixels]
    depth: int = 0  # blocks, of a ViT
    num_heads: int = 0  # attention heads of a block, of a ViT

    @property
    def has_tokens(self) -> bool:
        """Whether it is a ViT with a class token, which has `intermediate_layers` and `last_attention`."""
        return False

    @abstractmethod
    def forward(self, *batches: Tensor) -> Tensor:
        """Batches `[N_i, C, H_i, W_i]` -> their features, one batch below the other, `[sum N_i, D]`."""

    def intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        """`[N, C, H, W]` -> outputs of the last `n` blocks after the final norm, `[N, T, D]` each, oldest first: the
        class token, then the patches row by row.

        Raises:
            ValueError: if there are no tokens, or not `n` blocks.
        """
        raise ValueError(f"{type(self).__name__} has no patch tokens: use a ViT")

    def last_attention(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, heads, T, T]`: the last block's attention after softmax, the class token first.

        Raises:
            ValueError: if there is none.
        """
        raise ValueError(f"{type(self).__name__} has no attention: use a ViT")

    def compile_parts(self) -> None:
        """Lets torch.compile at what is worth it: here the whole network."""
        self.compile()

    def published(self) -> nn.Module:
        """The module whose parameter names are those of published weights; a wrapper returns what it wraps."""
        return self

    def valid_size(self, size: int) -> bool:
        """Whether images may have a side of `size` pixels."""
        return size > 0 and size % self.patch_size == 0

    def check_size(self, height: int, width: int) -> None:
        """Raises `ValueError`, naming the nearest valid sizes, unless images of `height` x `width` pixels fit."""
        for size in (height, width):
            if not self.valid_size(size):
                nearest = " or ".join(str(valid) for valid in nearest_sizes(size, self.patch_size))
                raise ValueError(
                    f"an image of {height} x {width} pixels does not divide into patches of {self.patch_size}: "
                    f"instead of {size} use {nearest}"
                )

    def check_image_size(self, image_size: int) -> None:
        """As `check_size`, for the configured side of the global views."""
        if not self.valid_size(image_size):
            nearest = " or ".join(str(valid) for valid in nearest_sizes(image_size, self.patch_size))
            raise ValueError(
                f"backbone.image_size={image_size}: does not divide into patches of {self.patch_size}; use {nearest}"
            )


def nearest_sizes(size: int, patch_size: int) -> tuple[int, ...]:
    """The closest multiples of the patch below (where positive) and above `size` [pixels]."""
    below = size // patch_size * patch_size
    return tuple(valid for valid in (below, below + patch_size) if valid > 0)


def check_at_least(owner: str, minimum: int, **values: int) -> None:
    """Raises `ValueError` for the first of `values` below `minimum`; `owner` is the config group in the message."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{owner}.{name}={value}: must be at least {minimum}")
