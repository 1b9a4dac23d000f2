"""Where the time of a step goes, by kind of operation: torch.profiler over whole steps, self time on the device.

Kinds go by the names of torch's operations. A fused loss is counted by the operations that it is made of; operations of
torch.compile's own making are `compiled`.
"""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Contender, Running, Unavailable
from benchmarks.options import Options
from benchmarks.step import contenders
from benchmarks.training_steps import StepWork, lightly, ours, plain

NAMES = ("baseline bf16", "lightly bf16", "ours fp32", "ours bf16", "ours bf16 compiled")
# The first kind whose words one of is in the operation's name.
KINDS = {
    "attention": ("bmm", "softmax_backward", "_softmax", "scaled_dot_product", "flash", "fmha"),
    "matrix products": ("addmm", "::mm", "matmul", "linear", "convolution", "gemm", "cutlass", "nvjet", "xmma"),
    "optimizer and teacher": ("adam", "foreach", "lerp", "multi_tensor"),
    "compiled": ("compiledfxgraph", "compiledfunction", "torch-compiled", "graph_", "triton", "inductor"),
    "copies and casts": ("copy", "cat", "clone", "contiguous", "memcpy", "fill", "zero", "empty", "memset"),
    "loss and softmax": ("logsumexp", "exp", "log"),
    "GELU and LayerNorm": ("gelu", "layer_norm"),
    "additions and other elementwise": ("add", "mul", "div", "sub", "sum", "norm", "neg", "bernoulli", "elementwise"),
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
        self.on_cuda = device.type == "cuda"

    def __call__(self) -> None:
        self.work()

    def answer(self, steps: int = 2) -> dict[str, Any]:
        for _ in range(2):
            self.work()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_cuda
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                self.work()
        microseconds = self._microseconds(profiler.key_averages())
        total = sum(microseconds.values())
        shares: dict[str, float] = {}
        for name, time in microseconds.items():
            shares[kind_of(name)] = shares.get(kind_of(name), 0.0) + time / total
        largest = sorted(microseconds, key=lambda name: -microseconds[name])[:20]
        return {
            "shares": shares,
            "seconds": total / steps / 1e6,
            "largest": {name: round(microseconds[name] / total, 4) for name in largest},
        }

    def _microseconds(self, events: Any) -> dict[str, float]:
        """Self time by operation; on CUDA of the kernels alone, as their launchers carry the same time again."""
        if self.on_cuda:
            kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
            return {event.key: float(event.self_device_time_total) for event in kernels}
        return {event.key: float(event.self_cpu_time_total) for event in events}


def kind_of(operation: str) -> str:
    """Of an operation of torch, or a kernel, by its name."""
    lowered = operation.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lowered for word in words)), OTHER)
