"""The layers of one ViT-S/16 block on the tokens of the global views, forward and backward, on the CPU: ours, torch's.

Ours are `dino.linear` and `dino.backbone.attention`; torch's are `F.linear`, and products and softmax under autograd.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Contender, compare
from benchmarks.options import Options
from benchmarks.step import product_shapes
from benchmarks.training_steps import compose_step
from dino.backbone.attention import Attention, Sequences
from dino.linear import linear, type_of_products
from dino.runtime import Precision, reuse_freed_memory

PARTS = {"Linear": "Its four linear layers", "Mixing": "Its attention, from queries, keys and values on"}


def measure(options: Options) -> Iterator[dict[str, Any]]:
    size: dict[str, Any] = {"backbone": "vit_s16", "batch": 16}
    if options.quick:
        size = {"backbone": "vit_t16", "batch": 1, "global_size": 32}
    for part, title in PARTS.items():
        for precision in ("fp32", "bf16"):
            settings = {"size": size, "precision": precision}
            yield compare(
                f"{title}, {precision}",
                [
                    Contender(name, f"benchmarks.layers:{part}", {**settings, "ours": name == "ours"})
                    for name in ("torch", "ours")
                ],
                options.sampling(rounds=9, device="cpu"),
                references=("torch",),
            )


class Layers(ABC):
    """One forward and backward pass; the answer is the sum of the magnitudes of outputs and gradients."""

    def __init__(self, device: torch.device, size: dict[str, Any], precision: str, ours: bool) -> None:
        reuse_freed_memory()
        torch.manual_seed(0)
        self.ours, self.autocast, self.device = ours, Precision(precision, device).autocast, device
        self.magnitude = 0.0
        self.tensors: list[Tensor] = []  # that get gradients
        self.make(size)

    def __call__(self) -> None:
        with self.autocast():
            outputs = self.outputs()
        torch.autograd.backward(outputs, [output.detach() for output in outputs])
        if not self.magnitude:
            gradients = [tensor.grad for tensor in self.tensors if tensor.grad is not None]
            self.magnitude = sum(float(tensor.detach().abs().sum()) for tensor in (*outputs, *gradients))
        for tensor in self.tensors:
            tensor.grad = None

    def answer(self) -> float:
        return self.magnitude

    @abstractmethod
    def make(self, size: dict[str, Any]) -> None: ...

    @abstractmethod
    def outputs(self) -> list[Tensor]: ...


class Linear(Layers):
    """qkv, projection and MLP."""

    def make(self, size: dict[str, Any]) -> None:
        shapes = product_shapes({**size, "out_dim": 2, "num_local_views": 0})
        self.layers = [
            [torch.randn(one, device=self.device, requires_grad=True) for one in ((rows, k), (out, k), (out,))]
            for rows, k, out in shapes
        ]
        self.tensors = [tensor for tensors in self.layers for tensor in tensors]

    def outputs(self) -> list[Tensor]:
        function = linear if self.ours else F.linear
        return [function(*tensors) for tensors in self.layers]


class Mixing(Layers):
    """softmax(q k^T / sqrt(d)) v, on tokens `[N, T, 3 D]`."""

    def make(self, size: dict[str, Any]) -> None:
        config = compose_step(**size)
        dim, self.num_heads = config.backbone.embed_dim, config.backbone.num_heads
        self.sequences = Sequences(
            2 * size["batch"], 1 + (config.augmentation.global_size // config.backbone.patch_size) ** 2
        )
        self.attention = Attention(dim, self.num_heads)
        with self.autocast():
            kind = type_of_products(torch.zeros(1))
        self.qkv = torch.randn(self.sequences.num_images * self.sequences.length, 3 * dim, device=self.device).to(kind)
        self.tensors = [self.qkv.requires_grad_()]

    def outputs(self) -> list[Tensor]:
        if self.ours:
            return [self.attention.mix(self.qkv, [self.sequences])]
        split = self.qkv.view(*self.sequences, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)
        return [(weights @ value).transpose(1, 2).flatten(2).flatten(0, 1)]
