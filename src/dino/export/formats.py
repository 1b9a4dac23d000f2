"""The layouts that backbones are written in, each read back by the library that owns it.

Shapes: N images, C channels, S x S pixels, D features.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dino.backbone import (
    ConvolutionalBackbone,
    TimmBackbone,
    VisionTransformer,
    from_original_names,
    original_names,
)
from dino.backbone.layouts import NETWORKS, State, to_hugging_face
from dino.backbone.weights import read_file
from dino.trained import Trained, load_trained


class Unsupported(ValueError):  # noqa: N818  reads as what it is
    """A backbone that a format has no place for."""


class Format(ABC):
    """A way to write a backbone, and to get features out of what was written."""

    name: ClassVar[str]
    library: ClassVar[str]  # the package that reads it
    needs: ClassVar[tuple[str, ...]] = ()  # packages that write it
    one_size: ClassVar[bool] = False  # whether a file is for one image size, that its position table is made for

    @abstractmethod
    def write(self, trained: Trained, stem: Path) -> Path:
        """Writes the backbone of `trained`, for images of `trained.image_size`; returns the file or folder.

        Args:
            stem: of the name, without an ending.

        Raises:
            Unsupported: the format has no place for this backbone.
        """

    @abstractmethod
    def features(self, trained: Trained, path: Path, images: Tensor) -> Tensor:
        """[N, C, S, S], normalised, -> [N, D]: what the library makes of the file."""

    @abstractmethod
    def usage(self, trained: Trained, path: Path) -> str:
        """How to load it, in one line of Python."""

    def version(self) -> str:
        return f"{self.library} {metadata.version(self.library)}"


class Safetensors(Format):
    """The backbone alone by its plain names; beside it a JSON file says what it is."""

    name = "safetensors"
    library = "safetensors"

    def write(self, trained: Trained, stem: Path) -> Path:
        from safetensors.torch import save_file

        path = Path(f"{stem}.safetensors")
        save_file(_plain(trained), path)
        return path

    def features(self, trained: Trained, path: Path, images: Tensor) -> Tensor:
        features: Tensor = load_trained(path).backbone(images)
        return features

    def usage(self, trained: Trained, path: Path) -> str:
        return f'dino.trained.load_trained(Path("{path}")).backbone'


class Original(Format):
    """A checkpoint as the original's training saves it: `student` and `teacher`, with heads where they are known."""

    name = "original"
    library = "torch"

    def write(self, trained: Trained, stem: Path) -> Path:
        if isinstance(trained.backbone, TimmBackbone):
            raise Unsupported("the original has no networks of timm")
        both = _student_and_teacher(trained.file)
        alone = {trained.network: {f"backbone.{name}": value for name, value in _plain(trained).items()}}
        networks = alone if both is None else original_names(both)
        path = Path(f"{stem}.pth")
        torch.save(networks, path)
        return path

    def features(self, trained: Trained, path: Path, images: Tensor) -> Tensor:
        features: Tensor = load_trained(path, network=trained.network).backbone(images)
        return features

    def usage(self, trained: Trained, path: Path) -> str:
        return f"python eval_knn.py --pretrained_weights {path} --checkpoint_key {trained.network}"


def _student_and_teacher(file: Path) -> State | None:
    """Both networks with their heads, by the names of `StudentTeacher`; None where the file has only one."""
    content = read_file(file)
    if isinstance(content, Mapping) and {"settings", "model"} <= content.keys():  # a checkpoint of ours
        return dict(content["model"])
    if isinstance(content, Mapping) and all(isinstance(content.get(network), Mapping) for network in NETWORKS):
        return from_original_names(content)
    return None


class Timm(Format):
    """A state dict for `timm.create_model(..., checkpoint_path=)`."""

    name = "timm"
    library = "timm"
    one_size = True

    def write(self, trained: Trained, stem: Path) -> Path:
        timm_arguments(trained)
        path = Path(f"{stem}.pth")
        torch.save(_plain(trained), path)
        return path

    def features(self, trained: Trained, path: Path, images: Tensor) -> Tensor:
        from timm import create_model

        network = create_model(**timm_arguments(trained), checkpoint_path=str(path)).eval()
        features: Tensor = network(images)
        return features

    def usage(self, trained: Trained, path: Path) -> str:
        words = ", ".join(f"{name}={value!r}" for name, value in timm_arguments(trained).items())
        return f'timm.create_model({words}, checkpoint_path="{path}")'


def timm_arguments(trained: Trained) -> dict[str, Any]:
    """What `timm.create_model` is given for this backbone.

    Raises:
        Unsupported: timm has no such network by these names.
    """
    backbone, settings = trained.backbone, trained.settings
    shape = {"num_classes": 0, "in_chans": settings.get("channels", 3)}
    if isinstance(backbone, TimmBackbone):
        size = {"img_size": trained.image_size} if backbone.has_tokens else {}
        return {"model_name": backbone.model_name, **shape, **size}
    if isinstance(backbone, VisionTransformer):
        return {
            "model_name": "vit_small_patch16_224",
            **shape,
            "img_size": trained.image_size,
            "patch_size": backbone.patch_size,
            "embed_dim": backbone.embed_dim,
            "depth": backbone.depth,
            "num_heads": backbone.num_heads,
            "mlp_ratio": settings.get("mlp_ratio", 4.0),
        }
    if isinstance(backbone, ConvolutionalBackbone):
        if settings["architecture"].startswith("resnet") and settings.get("stem", "imagenet") == "imagenet":
            return {"model_name": settings["architecture"], **shape}
        raise Unsupported("timm has no such network by torchvision's names; use safetensors or onnx")
    raise Unsupported(f"timm does not know {type(backbone).__name__}")


class HuggingFace(Format):
    """A folder for `AutoModel.from_pretrained`: weights, configuration, and how images are prepared."""

    name = "huggingface"
    library = "transformers"
    one_size = True

    def write(self, trained: Trained, stem: Path) -> Path:
        from safetensors.torch import save_file

        backbone, size = trained.backbone, trained.image_size
        if not isinstance(backbone, VisionTransformer):
            raise Unsupported("only ViTs are written for Hugging Face's ViTModel")
        stem.mkdir(parents=True, exist_ok=True)
        save_file(to_hugging_face(_plain(trained)), stem / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": backbone.embed_dim,
            "num_hidden_layers": backbone.depth,
            "num_attention_heads": backbone.num_heads,
            "intermediate_size": int(backbone.embed_dim * trained.settings.get("mlp_ratio", 4.0)),
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": 1e-6,
            "image_size": size,
            "patch_size": backbone.patch_size,
            "num_channels": trained.settings.get("channels", 3),
            "qkv_bias": True,
        }
        prepared = trained.preparation
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": prepared.mean,
            "image_std": prepared.std,
        }
        for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
            (stem / name).write_text(json.dumps(content, indent=1) + "\n")
        return stem

    def features(self, trained: Trained, path: Path, images: Tensor) -> Tensor:
        from transformers import AutoModel, logging

        # ViTModel has a pooler, which no DINO has; it says so at length.
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        network = AutoModel.from_pretrained(path, local_files_only=True).eval()
        features: Tensor = network(pixel_values=images).last_hidden_state[:, 0]
        return features

    def usage(self, trained: Trained, path: Path) -> str:
        return f'transformers.AutoModel.from_pretrained("{path}")'


class ONNX(Format):
    """A graph from `images` [N, C, S, S] to `features` [N, D], for any N."""

    name = "onnx"
    library = "onnxruntime"
    needs = ("onnx", "onnxscript")
    one_size = True

    def write(self, trained: Trained, stem: Path) -> Path:
        path = Path(f"{stem}.onnx")
        images = torch.zeros(2, trained.settings.get("channels", 3), trained.image_size, trained.image_size)
        program = torch.onnx.export(
            _OneBatch(trained.backbone).eval(),
            (images,),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(path)
        return path

    def features(self, trained: Trained, path: Path, images: Tensor) -> Tensor:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    def usage(self, trained: Trained, path: Path) -> str:
        return f'onnxruntime.InferenceSession("{path}").run(["features"], {{"images": images}})'


class _OneBatch(nn.Module):
    """A backbone takes any number of batches; a graph has one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images)
        return features


def _plain(trained: Trained) -> State:
    """The tensors of the backbone by the names under which its weights are published."""
    return {name: value.contiguous() for name, value in trained.backbone.published().state_dict().items()}


FORMATS: dict[str, Format] = {each.name: each for each in (Safetensors(), Original(), Timm(), HuggingFace(), ONNX())}
