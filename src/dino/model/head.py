"""The projection head of DINO (original: vision_transformer.py, DINOHead; paper, section 3.1 and appendix C).

Shapes: N rows, D features, K prototypes, b bottleneck.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.backbone.base import check_at_least
from dino.linear import Linear, type_of_products
from dino.model.projection import Projection


class DINOHead(nn.Module):
    """MLP to the bottleneck, L2 normalisation, then the prototypes: features `[N, D]` to logits `[N, K]`.

    With the gain of the prototypes at 1 (`norm_last_layer`) every logit is a cosine.

    Args:
        in_dim: D.
        out_dim: K.
        hidden_dim: width between the MLP's layers.
        bottleneck_dim: b, width of the MLP's output.
        num_layers: linear layers of the MLP; 1 is a single one without GELU.
        batch_norm: batch norm before each GELU.
        norm_last_layer: keep the gain of every prototype at 1; otherwise it is learned.

    Raises:
        ValueError: for a width or a number of layers that is not positive.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        check_at_least("head", 1, in_dim=in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        check_at_least("head", 1, num_layers=num_layers)
        check_at_least("head", 2, out_dim=out_dim)  # over one prototype every distribution is the same
        self.in_dim = in_dim
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, num_layers, batch_norm)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, learn_gain=not norm_last_layer)
        self.initialize()

    def initialize(self) -> None:
        """Overwrites every parameter: normal (0.02) matrices and zero biases in the MLP, then the prototypes."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()
        self.last_layer.initialize()

    def forward(self, features: Tensor) -> Projection:
        """`[N, D]` -> rows `[N, b]` and prototypes, whose products are the logits `[N, K]`."""
        hidden = self.mlp(features)
        # In half precision the norm would lose digits, and its guard against zero would be zero itself.
        rows = F.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)
        projection: Projection = self.last_layer(rows)
        return projection


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are `weight_g * weight_v / |weight_v|`.

    Names, values and gradients are those of the original's `torch.nn.utils.weight_norm`, which keeps the product as a
    plain attribute that `copy.deepcopy` refuses; here it is computed in the forward pass, so a teacher can be copied.

    Args:
        in_dim: b.
        out_dim: K.
        learn_gain: whether `weight_g` is learned; it starts at 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, learn_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1), requires_grad=learn_gain)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.initialize()

    def initialize(self) -> None:
        """Gain 1, and the uniform distribution of `nn.Linear`, U(-1/sqrt(b), 1/sqrt(b)), as the original leaves it."""
        nn.init.ones_(self.weight_g)
        bound = 1 / math.sqrt(self.weight_v.shape[1])
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, rows: Tensor) -> Projection:
        """`[N, b]` -> the rows, in the type of autocast, with the prototypes: their products are `[N, K]`."""
        rows = rows.to(type_of_products(rows))
        # Views, since DistributedDataParallel finds parameters only behind a tensor that was made from them.
        return Projection(rows, self.weight_v.view_as(self.weight_v), self.weight_g.view_as(self.weight_g))


def _mlp(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, batch_norm: bool) -> nn.Module:
    """Named as the original's: `mlp.0, 2, 4` for three layers, `mlp.0, 3, 6` with batch norm, `mlp` for one."""
    if num_layers == 1:
        return Linear(in_dim, out_dim)
    layers: list[nn.Module] = []
    for width in [in_dim, *[hidden_dim] * (num_layers - 2)]:
        layers.append(Linear(width, hidden_dim))
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, Linear(hidden_dim, out_dim))
