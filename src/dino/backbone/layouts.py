"""The ways in which weights of the field are named, and how each is turned into the names of our backbones.

A state is a flat dictionary from parameter names to tensors. Ours, the original's, timm's and torchvision's agree
inside the backbone; they differ in what is around it. Hugging Face's ViTModel splits query, key and value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
NETWORKS = ("student", "teacher")
# What sits on top of a backbone, in this project, the original, timm, torchvision and Hugging Face.
TOPS = ("head.", "fc.", "classifier.", "pooler.", "embeddings.mask_token")
# Wrappers of DistributedDataParallel and torch.compile.
WRAPPERS = ("module.", "_orig_mod.")

HUGGING_FACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
HUGGING_FACE_BLOCK = {
    "layernorm_before": "norm1",
    "attention.attention.qkv": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@dataclass(frozen=True)
class Found:
    """The backbone in a file: its tensors by our names, the names left aside, and what the file was."""

    state: State
    ignored: tuple[str, ...]
    layout: str
    both_possible: bool = False  # whether the layout is one that has student and teacher


def find_backbone(content: object, network: str) -> Found:
    """The backbone in the content of a weight file, whatever its layout.

    Args:
        content: what the file holds.
        network: `student` or `teacher`, for files that have both.

    Raises:
        ValueError: if there are no tensors, or the wanted network is not there.
    """
    if network not in NETWORKS:
        raise ValueError(f"network={network}: use {' or '.join(NETWORKS)}")
    content = _descend(content)
    if any(name in content for name in NETWORKS):
        layout, chosen = f"original DINO, {network}", content.get(network)
    elif any(str(name).startswith(("student.", "teacher.")) for name in content):
        prefix = f"{network}."
        layout = f"this project, {network}"
        chosen = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    else:
        layout, chosen = "backbone only", content
    both_possible = chosen is not content
    if both_possible and not chosen:
        raise ValueError(f"there is no {network} in it, only the other network")
    state = {_unwrap(name): value for name, value in dict(chosen or {}).items() if isinstance(value, Tensor)}
    if not state:
        some = ", ".join(map(str, list(content)[:5]))
        raise ValueError(f"it holds no tensors by name{f', only what is called {some}' if some else ''}")

    ignored: list[str] = []
    if any(name.startswith("backbone.") for name in state):
        # Everything beside `backbone.` is named in full and stays unexpected, except the projection head.
        ignored = [name for name in state if name.startswith("head.")]
        state = {name.removeprefix("backbone."): value for name, value in state.items() if name not in ignored}
    if all(name.startswith("network.") for name in state):  # `TimmBackbone` wraps its network
        state = {name.removeprefix("network."): value for name, value in state.items()}
    if any("embeddings.patch_embeddings.projection" in name for name in state):
        layout = "Hugging Face ViTModel"
        state = from_hugging_face(state)
    return Found(state, tuple(ignored), layout, both_possible)


def _descend(content: object) -> dict[str, Any]:
    """The dictionary that has the names: below `model` (ours, DeiT) or `state_dict` (timm) where there is one."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), None)
        if inner is None or any(name in content for name in NETWORKS):
            return dict(content)
        content = inner
    raise ValueError(f"it holds a {type(content).__name__}, not parameters by name")


def _unwrap(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")


def from_hugging_face(state: State) -> State:
    """Hugging Face's ViTModel (also inside ViTForImageClassification) by our names; unknown names stay as they are."""
    state = {name.removeprefix("vit."): value for name, value in state.items()}
    for name in [name for name in state if ".attention.attention.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in state for part in parts):
            state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    return {_hugging_face_name(name): value for name, value in state.items()}


def to_hugging_face(state: Mapping[str, Tensor]) -> State:
    """The inverse: a ViT of ours by the names of Hugging Face's ViTModel."""
    names = {ours: theirs for theirs, ours in HUGGING_FACE.items()}
    block_names = {ours: theirs for theirs, ours in HUGGING_FACE_BLOCK.items()}
    renamed: State = {}
    for name, value in state.items():
        if name in names:
            renamed[names[name]] = value
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            theirs = f"encoder.layer.{match[1]}.{block_names[match[2]]}.{match[3]}"
            parts = ("query", "key", "value") if ".qkv." in theirs else ()
            for part, third in zip(parts, value.chunk(3), strict=False):
                renamed[theirs.replace(".qkv.", f".{part}.")] = third.contiguous()
            if not parts:
                renamed[theirs] = value
        else:
            module, _, parameter = name.rpartition(".")
            renamed[f"{names[module]}.{parameter}"] = value
    return renamed


def _hugging_face_name(name: str) -> str:
    table, prefix, stem = HUGGING_FACE, "", name
    if match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name):
        table, prefix, stem = HUGGING_FACE_BLOCK, f"blocks.{match[1]}.", match[2]
    if stem in table:
        return prefix + table[stem]
    module, _, parameter = stem.rpartition(".")
    return f"{prefix}{table[module]}.{parameter}" if module in table else name


def original_names(state: Mapping[str, Tensor]) -> dict[str, State]:
    """A `StudentTeacher.state_dict()` as the original saves it: `student` and `teacher`, by the original's names.

    The original's student is always inside DistributedDataParallel (`module.`), its teacher only with batch norm
    (main_dino.py, train_dino). Below that, the names of `MultiCropModel` are the original's own.

    Raises:
        ValueError: for a name that is neither the student's nor the teacher's.
    """
    has_batch_norm = any(name.endswith("running_mean") for name in state)
    wrappers = {"student": "module.", "teacher": "module." if has_batch_norm else ""}
    renamed: dict[str, State] = {network: {} for network in NETWORKS}
    for name, value in state.items():
        network, _, inner = name.partition(".")
        if network not in renamed:
            raise ValueError(f"{name} belongs neither to a student nor to a teacher")
        renamed[network][wrappers[network] + inner] = value
    return renamed


def from_original_names(content: Mapping[str, Mapping[str, Tensor]]) -> State:
    """The inverse of `original_names`: `student` and `teacher` of an original checkpoint as one state of ours.

    Raises:
        ValueError: if one of the two is missing.
    """
    absent = [network for network in NETWORKS if network not in content]
    if absent:
        raise ValueError(f"the original checkpoint has no {' and no '.join(absent)}")
    return {
        f"{network}.{name.removeprefix('module.')}": value
        for network in NETWORKS
        for name, value in content[network].items()
    }
