"""Where the time of a step goes, by kind of operation: torch.profiler over whole steps, self time on the device.

Kinds go by the names of torch's operations; a softmax or batched product over the prototypes is of the loss, not of
attention. Other operations that a loss is made of are counted as what they are: products, copies, subtractions.
Operations of torch.compile's own making are `compiled`. On CUDA the names are those of kernels, which say less: there,
products of attention written out are among the matrix products.
"""

import re
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Contender, Running, Unavailable
from benchmarks.options import Options
from benchmarks.step import contenders
from benchmarks.training_steps import StepWork, lightly, ours, plain

NAMES = ("baseline bf16", "lightly bf16", "ours fp32", "ours bf16", "ours bf16 compiled")
# The first kind whose expression is found in the operation's name.
KINDS = {
    "compiled": "compiledfxgraph|compiledfunction|torch-compiled|graph_|triton|inductor",
    "loss": "log_?softmax|cunn_softmax|logsumexp|exp(?!and)|log(?!ical)",  # cunn_softmax: of rows above 1,024
    "attention": "bmm|softmax|scaled_dot_product|flash|fmha",
    "matrix products": "addmm|::mm|matmul|linear|product|convolution|gemm|cutlass|nvjet|xmma",
    "optimizer and teacher": "adam|foreach|lerp|multi_tensor",
    "copies and casts": "copy|cat|clone|contiguous|memcpy|fill|zero|empty|memset",
    "GELU and LayerNorm": "gelu|layer_norm",
    "additions and other elementwise": "add|mul|div|sub|sum|norm|neg|bernoulli|elementwise",
}
OTHER = "other"


def measure(options: Options) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"backbone": "vit_s16", "out_dim": 65536, "num_local_views": 6, "batch": 16}
    names: tuple[str, ...] = NAMES
    if options.quick:
        settings = {"backbone": "vit_t16", "out_dim": 256, "num_local_views": 2, "batch": 2, "depth": 2}
        settings |= {"global_size": 32, "local_size": 16}
        names = ("baseline bf16", "ours bf16")
    shares = {}
    for contender in contenders(settings, names):
        make = contender.make.partition(":")[2]
        profiled = Contender(
            contender.name, "benchmarks.profiling:Profile", {"make": make, "settings": contender.settings}
        )
        process = Running(profiled, options.device)
        try:
            process.wait_until_ready()
            shares[contender.name] = process.ask("answer")[0]["answer"]
        except Unavailable:
            continue
        finally:
            process.end()
    kinds = [*KINDS, OTHER]
    rows = [[kind, *(f"{share['shares'].get(kind, 0.0):.1%}" for share in shares.values())] for kind in kinds]
    rows.append(["seconds a step, profiled", *(f"{share['seconds']:.3g}" for share in shares.values())])
    name = f"{settings['backbone']}, {settings['out_dim']:,} prototypes, batch {settings['batch']}"
    return [{"name": name, "columns": ["", *shares], "rows": rows, "operations": shares}]


class Profile:
    """Steps under the profiler; the answer is the share of each kind, with the operations that take most."""

    def __init__(self, device: torch.device, make: str, settings: dict[str, Any]) -> None:
        makers = {"ours": ours, "plain": plain, "lightly": lightly}
        self.work: StepWork = makers[make](device=device, **settings)
        self.on_cuda, self.out_dim = device.type == "cuda", settings["out_dim"]

    def __call__(self) -> None:
        self.work()

    def answer(self, steps: int = 2) -> dict[str, Any]:
        for _ in range(2):
            self.work()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_cuda
        with profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(steps):
                self.work()
        kinds: Counter[str] = Counter()
        operations: Counter[str] = Counter()
        for event in profiler.key_averages(group_by_input_shape=True):
            time = self._microseconds(event)
            over_prototypes = any(self.out_dim in shape for shape in event.input_shapes)
            kinds[kind_of(event.key, over_prototypes)] += time
            operations[event.key] += time
        total = kinds.total()
        return {
            "shares": {kind: time / total for kind, time in kinds.items()},
            "seconds": total / steps / 1e6,
            "largest": {name: round(time / total, 4) for name, time in operations.most_common(20)},
        }

    def _microseconds(self, event: Any) -> float:
        """Self time; on CUDA of the kernels alone, as their launchers carry the same time again."""
        if not self.on_cuda:
            return float(event.self_cpu_time_total)
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        return float(event.self_device_time_total) if is_kernel else 0.0


def kind_of(operation: str, over_prototypes: bool = False) -> str:
    """Of an operation of torch, or a kernel, by its name; `over_prototypes`: one side of its inputs is K."""
    found = (kind for kind, expression in KINDS.items() if re.search(expression, operation.lower()))
    kind = next(found, OTHER)
    return "loss" if kind == "attention" and over_prototypes else kind
