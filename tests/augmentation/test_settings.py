"""Every setting that cannot be is refused, with a message that names key, value and what would be right."""

from typing import Any

import pytest

from dino.augmentation import MultiCrop

NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("global_size", 0, "a whole number of at least 1"),
        ("global_size", 22.5, "a whole number of at least 1"),
        ("local_size", -8, "a whole number of at least 1"),
        ("num_local_views", -1, "a whole number of at least 0"),
        ("num_local_views", True, "a whole number of at least 0"),
        ("channels", 0, "a whole number of at least 1"),
        ("global_scale", [0.0, 1.0], "0 < smallest <= largest <= 1"),
        ("global_scale", [0.9, 0.4], "0 < smallest <= largest <= 1"),
        ("global_scale", 0.4, "a list [smallest, largest]"),
        ("local_scale", [0.05, 1.2], "0 < smallest <= largest <= 1"),
        ("local_scale", [0.05], "a list [smallest, largest]"),
        ("ratio", [-1.0, 1.0], "0 < smallest <= largest"),
        ("ratio", ["a", 1.0], "a list [smallest, largest]"),
        ("flip_probability", 1.5, "a probability between 0 and 1"),
        ("jitter_probability", -0.1, "a probability between 0 and 1"),
        ("grayscale_probability", "often", "a probability between 0 and 1"),
        ("solarize_probability", NAN, "a probability between 0 and 1"),
        ("blur_probability", 0.5, "a list of 3 probabilities between 0 and 1: [global 0, global 1, local]"),
        ("blur_probability", [1.0, 0.1], "a list of 3 probabilities"),
        ("blur_probability", [1.0, 0.1, 2.0], "a list of 3 probabilities"),
        ("blur_sigma", [0.0, 2.0], "0 < smallest <= largest"),
        ("brightness", -0.4, "a number of at least 0"),
        ("contrast", None, "a number of at least 0"),
        ("saturation", -1, "a number of at least 0"),
        ("hue", 0.6, "a number between 0 and 0.5"),
        ("solarize_threshold", 300, "a number between 0 and 255"),
        ("mean", [0.5], "a list of 3 numbers, one for each channel"),
        ("mean", "auto", "a list of 3 numbers, one for each channel"),
        ("std", [0.2, 0.2, 0.0], "a list of 3 numbers above 0, one for each channel"),
        ("photometric_device", "gpu", "one of cpu, device"),
        ("interpolation", "nearest", "one of bicubic, bilinear"),
    ],
)
def test_bad_settings_are_named(key: str, value: Any, right: str) -> None:
    with pytest.raises(ValueError, match="augmentation") as caught:
        MultiCrop(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"augmentation.{key} is {value!r}; it must be ")
    assert right in message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_local_views": 0},
        {"global_scale": [1.0, 1.0], "ratio": (1, 1)},
        {"hue": 0, "brightness": 2, "blur_probability": [0, 0, 1]},
        {"channels": 1, "mean": [0], "std": [1]},
    ],
)
def test_settings_at_the_edge_are_accepted(settings: dict[str, Any]) -> None:
    assert MultiCrop(**settings).num_views >= 2
