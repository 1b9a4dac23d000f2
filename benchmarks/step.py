"""Whole training steps on random views: teacher, student, loss, backward pass, clipping, AdamW, moving average.

`of products` is the share of the rate at which oneDNN (on CUDA, torch), in the same rounds, multiplies matrices of the
shapes of the ViT, in the contender's precision: the floating-point operations of the step's products, counted by
torch.utils.flop_counter on the baseline, by its time. Memory is the largest that the process held while it worked, on a
CPU with the libraries that it imported: lightly's has lightly and timm beside torch.

lightly has torch's fused attention, as timm chooses it; `unfused attention` shows how much of a ratio that is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Contender, compare
from benchmarks.options import Options
from benchmarks.training_steps import baseline_networks, compose_step, list_of_views, random_views
from dino.linear import product

REFERENCES = ("baseline fp32", "baseline bf16")
# Few at a time, so that nobody has to give memory back while others have their turn.
FLOAT32 = ("baseline fp32", "lightly fp32", "ours fp32", "ours bf16")
UNFUSED = "lightly bf16 unfused attention"
MAIN = ("baseline bf16", "lightly bf16", "ours bf16")
BF16 = (*MAIN, UNFUSED, "ours bf16 compiled")
MEMORY = ("baseline bf16", "ours bf16", "ours bf16 balanced", "ours bf16 low")


@dataclass(frozen=True)
class Case:
    """One network with its number of prototypes and views."""

    title: str
    backbone: str
    out_dim: int
    num_local_views: int
    batch: int = 16
    contenders: Sequence[str] = MAIN
    rounds: int = 5  # at most, see `Sampling.budget_s`
    generations: int = 1


CASES = (
    Case("ViT-S/16", "vit_s16", 65536, 6, contenders=BF16, rounds=9, generations=3),
    Case("ViT-S/16, float32", "vit_s16", 65536, 6, contenders=FLOAT32, rounds=3),
    Case("ViT-S/16, memory", "vit_s16", 65536, 6, contenders=MEMORY),
    Case("ViT-Ti/16", "vit_t16", 4096, 6, contenders=BF16, rounds=9, generations=3),
    Case("ViT-Ti/16, float32", "vit_t16", 4096, 6, contenders=FLOAT32),
    Case("ViT-S/16", "vit_s16", 4096, 6),
    Case("ViT-Ti/16", "vit_t16", 65536, 6),
    Case("ViT-S/16", "vit_s16", 65536, 8),
    Case("ViT-S/16", "vit_s16", 65536, 6, batch=8),
)
QUICK_CASE = Case("ViT-Ti/16, 32 px", "vit_t16", 256, 2, batch=2)


def contenders(settings: dict[str, Any], names: Sequence[str] | None = None) -> list[Contender]:
    """Those that make steps; `settings` are arguments of `compose_step`."""
    bf16 = "trainer.precision=bf16"
    ours = {
        "ours fp32": ["trainer.precision=fp32"],
        "ours bf16": [bf16],
        "ours bf16 compiled": [bf16, "trainer.compile=true"],
        "ours bf16 balanced": [bf16, "trainer.memory=balanced"],
        "ours bf16 low": [bf16, "trainer.memory=low"],
    }
    steps = "benchmarks.training_steps"
    made = [
        Contender(f"{name} {precision}", f"{steps}:{function}", {**settings, "precision": precision})
        for name, function in (("baseline", "plain"), ("lightly", "lightly"))
        for precision in ("fp32", "bf16")
    ]
    unfused = {**settings, "precision": "bf16", "fused_attention": False}
    made.append(Contender(UNFUSED, f"{steps}:lightly", unfused))
    made += [Contender(name, f"{steps}:ours", {**settings, "overrides": overrides}) for name, overrides in ours.items()]
    return [contender for contender in made if names is None or contender.name in names]


def measure(options: Options) -> Iterator[dict[str, Any]]:
    return (measure_case(case, options) for case in ([QUICK_CASE] if options.quick else CASES))


def measure_case(case: Case, options: Options) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "backbone": case.backbone,
        "out_dim": case.out_dim,
        "num_local_views": case.num_local_views,
        "batch": case.batch,
    }
    if options.quick:
        settings |= {"global_size": 32, "local_size": 16, "drop_path": 0.0, "depth": 2}
    products = [
        Contender(f"products {precision}", "benchmarks.step:Products", {"precision": precision, "settings": settings})
        for precision in ("fp32", "bf16")
    ]
    result = compare(
        f"{case.title}, {case.out_dim:,} prototypes, 2 + {case.num_local_views} views, batch {case.batch}",
        [*contenders(settings, case.contenders), *products],
        replace(options.sampling(rounds=case.rounds), generations=case.generations),
        per=case.batch,
        unit="images/s",
        references=REFERENCES,
        facts=settings,
    )
    add_share_of_products(result, settings)
    return result


def add_share_of_products(result: dict[str, Any], settings: dict[str, Any]) -> None:
    """Takes the products out of the contenders, and puts what they were measured for beside each of the others."""
    rates = {}
    for name in [name for name in result["contenders"] if name.startswith("products ")]:
        figures = result["contenders"].pop(name)
        rates[name.removeprefix("products ")] = products_flops(settings) / figures["seconds"]["median"]
    flops = step_flops(settings)
    for name, figures in result["contenders"].items():
        rate = rates["fp32" if "fp32" in name else "bf16"]
        figures["of products"] = flops / figures["seconds"]["median"] / rate
    result["facts"] |= {
        "gflop_per_image": round(flops / settings["batch"] / 1e9, 2),
        "products_gflop_per_s": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
    }


def step_flops(settings: dict[str, Any]) -> int:
    """Of the products of one step: both forward passes and the backward pass."""
    config, meta = compose_step(**settings), torch.device("meta")
    views = list_of_views(random_views(config, meta))
    student, teacher = baseline_networks(config, meta)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher(views[:2])
        student(views).sum().backward()
    return int(counter.get_total_flops())


class Products:
    """The four products of one block on the tokens of the global views, forward only."""

    def __init__(self, device: torch.device, precision: str, settings: dict[str, Any]) -> None:
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        self.pairs = [
            (torch.randn(rows, k, device=device).to(kind), torch.randn(columns, k, device=device).to(kind))
            for rows, k, columns in product_shapes(settings)
        ]

    @torch.inference_mode()
    def __call__(self) -> None:
        for rows, weight in self.pairs:
            product(rows, weight)

    def answer(self) -> None:
        return None


def product_shapes(settings: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(tokens, inputs, outputs) of qkv, projection and MLP."""
    config = compose_step(**settings)
    dim = config.backbone.embed_dim
    tokens = 2 * settings["batch"] * (1 + (config.augmentation.global_size // config.backbone.patch_size) ** 2)
    return [(tokens, dim, 3 * dim), (tokens, dim, dim), (tokens, dim, 4 * dim), (tokens, 4 * dim, dim)]


def products_flops(settings: dict[str, Any]) -> int:
    return sum(2 * rows * k * columns for rows, k, columns in product_shapes(settings))
