"""The layouts that backbones are written in, each read back by the library that owns it.

Shapes: N images, C channels, H x W pixels, D features.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dino.backbone import (
    Backbone,
    ConvolutionalBackbone,
    TimmBackbone,
    VisionTransformer,
    from_original_names,
    original_names,
)
from dino.backbone.layouts import NETWORKS, State, to_hugging_face
from dino.backbone.weights import read_file
from dino.trained import Trained, load_trained

Size = tuple[int, int]  # H, W [pixels]


# Features, blocks and heads of the networks in the original's vision_transformer.py.
ORIGINAL_VITS = {(192, 12, 3): "vit_tiny", (384, 12, 6): "vit_small", (768, 12, 12): "vit_base"}


class Unsupported(ValueError):  # noqa: N818  reads as what it is
    """A backbone that a format has no place for."""


class Format(ABC):
    """A way to write a backbone, and to get features out of what was written."""

    name: ClassVar[str]
    library: ClassVar[str]  # the package that reads it
    needs: ClassVar[tuple[str, ...]] = ()  # packages that write it
    one_size: ClassVar[bool] = False  # whether a file is for one image size
    squares: ClassVar[bool] = True  # whether that must be a square, whose position table the file holds

    def check(self, trained: Trained, sizes: Sequence[Size]) -> None:
        """Raises `Unsupported` where the format has no place for this backbone or for one of the sizes."""
        oblong = [f"{height}x{width}" for height, width in sizes if height != width]
        if self.one_size and self.squares and oblong:
            raise Unsupported(f"position tables are square, so not for --size {oblong[0]}; onnx has any")

    @abstractmethod
    def write(self, trained: Trained, stem: Path, size: Size) -> Path:
        """Writes the backbone of `trained`, which `check` has let pass; returns the file or folder.

        Args:
            stem: of the name, without an ending.
            size: of the images, for formats of one size.
        """

    @abstractmethod
    def features(self, trained: Trained, path: Path, images: Tensor) -> Tensor:
        """[N, C, H, W], normalised, -> [N, D]: what the library makes of the file."""

    @abstractmethod
    def usage(self, trained: Trained, path: Path) -> str:
        """How to load it, in one line of Python."""

    def version(self) -> str:
        """Who has read it back."""
        return f"{self.library} {metadata.version(self.library)}"


class Safetensors(Format):
    """The backbone alone by its plain names; beside it a JSON file says what it is."""

    name = "safetensors"
    library = "safetensors"

    def write(self, trained: Trained, stem: Path, size: Size) -> Path:
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
    """A checkpoint as the original's training saves it: `student` and `teacher`, with heads where they are known.

    The original is no package: what is written is read back by its names, by our loader. Its scripts build their
    networks by name, for 224 pixels and three channels; files of other networks have its layout, for code of one's own.
    """

    name = "original"
    library = "torch"

    def check(self, trained: Trained, sizes: Sequence[Size]) -> None:
        super().check(trained, sizes)
        if isinstance(trained.backbone, TimmBackbone):
            raise Unsupported("the original has no networks of timm")

    def write(self, trained: Trained, stem: Path, size: Size) -> Path:
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
        words = original_arguments(trained.backbone, trained.settings)
        if words is None:
            return f'torch.load("{path}")["{trained.network}"]: the original\'s scripts build no network of this shape'
        return f"python eval_knn.py {words} --pretrained_weights {path} --checkpoint_key {trained.network}"

    def version(self) -> str:
        return "by the original's names"


def original_arguments(backbone: Backbone, settings: Mapping[str, Any]) -> str | None:
    """The arguments of the original's scripts (eval_knn.py) that make them build this network; None: there are none."""
    if settings.get("channels", 3) != 3:
        return None
    if isinstance(backbone, ConvolutionalBackbone):
        imagenet = settings.get("stem", "imagenet") == "imagenet"
        return f"--arch {settings['architecture']}" if imagenet else None
    if not isinstance(backbone, VisionTransformer):
        return None
    name = ORIGINAL_VITS.get((backbone.embed_dim, backbone.depth, backbone.num_heads))
    at_home = settings.get("image_size") == 224 and settings.get("mlp_ratio", 4.0) == 4
    return f"--arch {name} --patch_size {backbone.patch_size}" if name and at_home else None


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

    def check(self, trained: Trained, sizes: Sequence[Size]) -> None:
        super().check(trained, sizes)
        timm_arguments(trained)

    def write(self, trained: Trained, stem: Path, size: Size) -> Path:
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
        size = {"img_size": trained.image_size} if backbone.takes_image_size else {}
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

    def check(self, trained: Trained, sizes: Sequence[Size]) -> None:
        super().check(trained, sizes)
        if not isinstance(trained.backbone, VisionTransformer):
            raise Unsupported("only ViTs are written for Hugging Face's ViTModel")

    def write(self, trained: Trained, stem: Path, size: Size) -> Path:
        from safetensors.torch import save_file

        backbone = trained.backbone
        assert isinstance(backbone, VisionTransformer)
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
            "image_size": trained.image_size,
            "patch_size": backbone.patch_size,
            "num_channels": trained.settings.get("channels", 3),
            "qkv_bias": True,
        }
        prepared = trained.preparation
        processor = {
            "image_processor_type": "BitImageProcessor",  # ViTImageProcessor squeezes images into squares
            "do_convert_rgb": trained.settings.get("channels", 3) == 3,
            "do_resize": True,
            "size": {"shortest_edge": prepared.resize},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": prepared.size, "width": prepared.size},
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

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        network = AutoModel.from_pretrained(path, add_pooling_layer=False, local_files_only=True).eval()
        features: Tensor = network(pixel_values=images).last_hidden_state[:, 0]
        return features

    def usage(self, trained: Trained, path: Path) -> str:
        network = f'transformers.AutoModel.from_pretrained("{path}", add_pooling_layer=False)'  # no DINO has a pooler
        return f"{network}(images).last_hidden_state[:, 0]"


class ONNX(Format):
    """A graph from `images` [N, C, H, W] to `features` [N, D], for any N."""

    name = "onnx"
    library = "onnxruntime"
    needs = ("onnx", "onnxscript")
    one_size = True
    squares = False

    def write(self, trained: Trained, stem: Path, size: Size) -> Path:
        path = Path(f"{stem}.onnx")
        images = torch.zeros(2, trained.settings.get("channels", 3), *size)
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
