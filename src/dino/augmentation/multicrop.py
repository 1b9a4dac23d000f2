"""Multi-crop: two global and some local views of every image (paper, section 3.1; main_dino.py, DataAugmentationDINO).

Shapes: B images in the batch, G = 2 global views, L local views, V = G + L, C channels, H x W image size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.augmentation import draws, validation
from dino.augmentation.crop import Interpolation, crop, random_boxes, scale_boxes
from dino.augmentation.photometric import JitterForm, PhotometricSettings, apply_photometric
from dino.augmentation.randomness import uniforms
from dino.augmentation.views import JITTER_ORDERS, PhotometricParameters, ViewBatch

if TYPE_CHECKING:
    from dino.dataset.source import Source

NUM_GLOBAL_VIEWS: Final = 2
REDUCTIONS: Final = (1, 2, 4, 8)  # of an image that is decoded smaller; what JPEG decoders can do

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(kw_only=True, eq=False)
class MultiCrop:
    """Draws, crops and colours views; the defaults are the original's for photographs.

    A view is a function of (seed, epoch, sample index, view number) alone; the views are numbered global 0, global 1,
    local 0, ..., local L-1. Cropping gives uint8 views and happens where the images are read. The photometric
    operations follow there too (`colour`), or batched on whichever device the views lie (`photometric`), which
    normalises in both cases.

    Saturation, hue and grayscale need three channels; for other images they are left out and `notices` says so.

    Args:
        global_size: side of a global view in pixels.
        local_size: side of a local view in pixels.
        num_local_views: L; 0 is allowed.
        global_scale: smallest and largest area of a global crop, as a fraction of the image.
        local_scale: the same of a local crop.
        ratio: smallest and largest width / height of a crop.
        flip_probability: of mirroring left to right.
        jitter_probability: of brightness, contrast, saturation and hue together, in random order.
        brightness: factor uniform in [max(0, 1 - x), 1 + x]; likewise `contrast` and `saturation`.
        hue: shift uniform in [-x, x], in turns of the colour circle; at most 0.5.
        jitter_form: "exact": one operation after another, each clipped, the hue turned in HSV; "matrix": all in one
            affine map of the colours, the hue turned in YIQ, clipped once.
        grayscale_probability: of making the view gray.
        blur_probability: of Gaussian blur in global view 0, global view 1 and each local view.
        blur_sigma: smallest and largest standard deviation of the blur in pixels.
        solarize_probability: of inverting bright values, in global view 1 only.
        solarize_threshold: values from here on are inverted, in 0..255.
        channels: of the images.
        mean, std: of each channel, for values in [0, 1].
        photometric_device: "cpu": in the workers, on uint8 views; "device": on the training device.
        interpolation: of the crops, always antialiased.

    Raises:
        ValueError: for a setting that cannot be, naming its key.
    """

    global_size: int = 224
    local_size: int = 96
    num_local_views: int = 8
    global_scale: Sequence[float] = (0.4, 1.0)
    local_scale: Sequence[float] = (0.05, 0.4)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_form: JitterForm = "exact"
    grayscale_probability: float = 0.2
    blur_probability: Sequence[float] = (1.0, 0.1, 0.5)
    blur_sigma: Sequence[float] = (0.1, 2.0)
    solarize_probability: float = 0.2
    solarize_threshold: float = 128
    channels: int = 3
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    photometric_device: Literal["cpu", "device"] = "device"
    interpolation: Interpolation = "bicubic"
    notices: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        self.notices = self._left_out()

    @property
    def num_views(self) -> int:
        """V."""
        return NUM_GLOBAL_VIEWS + self.num_local_views

    def __call__(self, source: "Source", indices: Ints, *, seed: int, epoch: int) -> ViewBatch:
        """Reads the images of `indices` [B], each once, and returns their uint8 views with parameters and labels."""
        if source.images is not None:
            images: Tensor | list[Tensor] = source.images[torch.from_numpy(indices)]
        else:
            images = [source.read(int(index)) for index in indices]
        labels = None if source.labels is None else torch.from_numpy(source.labels[indices])
        return self.views(images, indices, seed, epoch, labels=labels)

    def views(
        self,
        images: Tensor | Sequence[Tensor],
        indices: Ints,
        seed: int,
        epoch: int,
        *,
        labels: Tensor | None = None,
        bad: tuple[int, ...] = (),
        sizes: Ints | None = None,
    ) -> ViewBatch:
        """The views of images that are already read.

        Args:
            images: uint8 [B, C, H, W], or B images [C, H, W] of different sizes.
            indices: [B] sample indices, which decide the random numbers.
            labels: [B] int64, handed through.
            bad: indices of samples whose image is another's, handed through.
            sizes: [B, 2] height and width before the images were read smaller (`reduction`); None: they were not.

        Returns:
            uint8 views with their photometric parameters.

        Raises:
            ValueError: if the images have another number of channels than was set.
        """
        assert len(images) == len(indices) > 0
        # A set in memory has one shape, and looking at each of its images would cost as much as cropping them.
        shapes = [images.shape[1:]] * len(images) if isinstance(images, Tensor) else [image.shape for image in images]
        num_channels = {shape[0] for shape in shapes}
        if num_channels != {self.channels}:
            found = " and ".join(str(number) for number in sorted(num_channels))
            raise ValueError(
                f"augmentation.channels is {self.channels}, but the images have {found}; set dataset.channels"
            )
        read = np.array([shape[-2:] for shape in shapes], dtype=np.int64)
        heights, widths = (read if sizes is None else sizes).T
        boxes, flips, parameters = self.draw(indices, heights, widths, seed=seed, epoch=epoch)
        if sizes is not None:
            boxes = scale_boxes(boxes, sizes, read)
        views = [
            crop(images, boxes[which], flips[which], size, self.interpolation)
            for which, size in (
                (slice(None, NUM_GLOBAL_VIEWS), self.global_size),
                (slice(NUM_GLOBAL_VIEWS, None), self.local_size),
            )
            if len(boxes[which])
        ]
        return ViewBatch(
            global_views=views[0],
            local_views=views[1] if self.num_local_views else None,
            indices=torch.from_numpy(np.asarray(indices, dtype=np.int64)),
            labels=labels,
            parameters=parameters,
            bad=bad,
        )

    def draw(
        self, indices: Ints, heights: Ints, widths: Ints, *, seed: int, epoch: int
    ) -> tuple[Ints, Bools, PhotometricParameters]:
        """Everything that is random about the views of samples `indices` [B] of image sizes `heights`, `widths` [B].

        Returns:
            boxes [V, B, 4] (top, left, height, width), flips [V, B], and the photometric parameters, each [V, B].
        """
        u = self._uniforms(indices, seed, epoch)
        flips = draws.chance(u, draws.FLIP, self.flip_probability)
        return self._draw_boxes(u, heights, widths), flips, self._draw_photometric(u)

    def reduction(self, index: int, size: tuple[int, int], *, seed: int, epoch: int) -> int:
        """How many times smaller the image of a sample may be decoded: 1, 2, 4 or 8.

        It is the largest at which every box drawn for the sample is as large as its view, but for the rounding of its
        edges: no view is enlarged that would not be enlarged from the whole image.

        Args:
            size: height and width of the image.
        """
        u = self._uniforms(np.array([index]), seed, epoch)
        boxes = self._draw_boxes(u, np.array([size[0]]), np.array([size[1]]))[:, 0]  # [V, 4]
        sizes = np.array([self.global_size] * NUM_GLOBAL_VIEWS + [self.local_size] * self.num_local_views)
        room = (boxes[:, 2:].min(axis=1) / sizes).min()
        return max((reduction for reduction in REDUCTIONS if reduction <= room), default=1)

    def _uniforms(self, indices: Ints, seed: int, epoch: int) -> draws.Floats:
        """[V, B, NUM_DRAWS]."""
        view = np.repeat(np.arange(self.num_views), len(indices))
        flat = uniforms(seed, epoch, np.tile(indices, self.num_views), view, draws.NUM_DRAWS)
        return flat.reshape(self.num_views, len(indices), draws.NUM_DRAWS)

    def _draw_boxes(self, u: draws.Floats, heights: Ints, widths: Ints) -> Ints:
        """[V, B, 4] from u [V, B, NUM_DRAWS]."""
        in_global = random_boxes(u[:NUM_GLOBAL_VIEWS], heights, widths, self.global_scale, self.ratio)
        in_local = random_boxes(u[NUM_GLOBAL_VIEWS:], heights, widths, self.local_scale, self.ratio)
        return np.concatenate([in_global, in_local])

    def colour(self, batch: ViewBatch) -> ViewBatch:
        """Applies the batch's parameters on the host, rounding to uint8: the part of `photometric` that workers do."""
        from dino.augmentation.photometric_cpu import colour  # here: OpenCV takes a tenth of a second

        assert batch.parameters is not None, "the photometric operations have run already"
        return self._on_views(batch, colour)

    def photometric(self, batch: ViewBatch) -> ViewBatch:
        """Applies the batch's parameters, if it still has some, and normalises, where its views lie; float32 views."""
        assert batch.global_views.dtype == torch.uint8, "the views are normalised already"
        return self._on_views(batch, apply_photometric)

    def _on_views(self, batch: ViewBatch, operation: Callable[[Tensor, Any, PhotometricSettings], Tensor]) -> ViewBatch:
        settings = PhotometricSettings(
            self.mean, self.std, self.solarize_threshold, self.blur_sigma[1], self.jitter_form
        )

        def on(views: Tensor, first: int, last: int) -> Tensor:
            of_views = None if batch.parameters is None else batch.parameters.of_views(first, last).flat()
            flat = operation(views.flatten(0, 1), of_views, settings)
            return flat.view(*views.shape[:2], *flat.shape[1:])

        local = batch.local_views
        return dataclasses.replace(
            batch,
            global_views=on(batch.global_views, 0, NUM_GLOBAL_VIEWS),
            local_views=None if local is None else on(local, NUM_GLOBAL_VIEWS, self.num_views),
            parameters=None,
        )

    def _draw_photometric(self, u: draws.Floats) -> PhotometricParameters:
        """The photometric parameters [V, B] from u [V, B, NUM_DRAWS]."""
        jitter = draws.chance(u, draws.JITTER, self.jitter_probability)
        in_colour = self.channels == 3
        first, second, local = self.blur_probability
        blur = draws.chance(u, draws.BLUR, np.array([[first], [second], *[[local]] * self.num_local_views]))
        solarize = draws.chance(u, draws.SOLARIZE, self.solarize_probability)
        solarize[np.arange(self.num_views) != 1] = False

        def factor(slot: int, strength: float) -> Tensor:
            drawn = draws.between(u, slot, max(0.0, 1 - strength), 1 + strength)
            return torch.from_numpy(np.where(jitter, drawn, 1.0).astype(np.float32))

        hue = np.where(jitter, draws.between(u, draws.HUE, -self.hue, self.hue), 0.0) * in_colour
        sigma = np.where(blur, draws.between(u, draws.BLUR_SIGMA, *self.blur_sigma), 0.0)
        return PhotometricParameters(
            order=torch.from_numpy(draws.below(u, draws.JITTER_ORDER, len(JITTER_ORDERS))),
            brightness=factor(draws.BRIGHTNESS, self.brightness),
            contrast=factor(draws.CONTRAST, self.contrast),
            saturation=factor(draws.SATURATION, self.saturation if in_colour else 0.0),
            hue=torch.from_numpy(hue.astype(np.float32)),
            grayscale=torch.from_numpy(draws.chance(u, draws.GRAYSCALE, self.grayscale_probability) & in_colour),
            blur_sigma=torch.from_numpy(sigma.astype(np.float32)),
            solarize=torch.from_numpy(solarize),
        )

    def _left_out(self) -> list[str]:
        asked = {
            "saturation": self.jitter_probability > 0 and self.saturation > 0,
            "hue": self.jitter_probability > 0 and self.hue > 0,
            "grayscale": self.grayscale_probability > 0,
        }
        names = [name for name, wanted in asked.items() if wanted]
        if self.channels == 3 or not names:
            return []
        channels = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        return [f"augmentation: {', '.join(names)} left out, as they need 3 channels and the images have {channels}"]

    def _check(self) -> None:
        for key, smallest in (("global_size", 1), ("local_size", 1), ("num_local_views", 0), ("channels", 1)):
            validation.check_count(key, getattr(self, key), smallest)
        validation.check_range("global_scale", self.global_scale, high=1)
        validation.check_range("local_scale", self.local_scale, high=1)
        validation.check_range("ratio", self.ratio)
        for name in ("flip", "jitter", "grayscale", "solarize"):
            validation.check_probability(f"{name}_probability", getattr(self, f"{name}_probability"))
        for key in ("brightness", "contrast", "saturation"):
            validation.check_number(key, getattr(self, key), 0, float("inf"))
        validation.check_number("hue", self.hue, 0, 0.5)
        validation.check_probabilities("blur_probability", self.blur_probability, ("global 0", "global 1", "local"))
        validation.check_range("blur_sigma", self.blur_sigma)
        validation.check_number("solarize_threshold", self.solarize_threshold, 0, 255)
        validation.check_per_channel("mean", self.mean, self.channels, positive=False)
        validation.check_per_channel("std", self.std, self.channels, positive=True)
        validation.check_choice("photometric_device", self.photometric_device, ("cpu", "device"))
        validation.check_choice("jitter_form", self.jitter_form, ("exact", "matrix"))
        validation.check_choice("interpolation", self.interpolation, ("bicubic", "bilinear"))
