"""Reading images: colour, gray, 16-bit, many channels, broken ones."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.dataset import FileSource, StackedSource, SubsetSource, UnreadableImage


def source_of(*paths: Path, channels: int = 3) -> FileSource:
    return FileSource(np.array([str(path) for path in paths]), None, channels)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_pil_mode_reads_as_pil_converts_it(tmp_path: Path, write_image: Callable[..., Path], mode: str) -> None:
    original = Image.open(write_image(tmp_path / "original.png"))
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    original.convert(mode).save(path)
    for channels, name in ((3, "RGB"), (1, "L")):
        expected = np.atleast_3d(np.asarray(Image.open(path).convert(name)))
        image = source_of(path, channels=channels).read(0)
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert source_of(tmp_path / "turned.jpg").read(0).shape == (3, 20, 30)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_images_are_windowed_by_the_range_of_their_type(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}")
    expected = torch.tensor([[0, 0, 1, 1], [127, 128, 255, 255]], dtype=torch.uint8)  # value / 257, rounded
    for channels in (1, 3):
        image = source_of(tmp_path / f"deep{suffix}", channels=channels).read(0)
        assert torch.equal(image, expected.expand(channels, 2, 4))


def test_arrays_of_any_channels(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (6, 7, 5), dtype=np.uint16)
    np.save(tmp_path / "deep.npy", deep)
    image = source_of(tmp_path / "deep.npy", channels=5).read(0)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.rint(deep / 257).astype(np.uint8))
    np.save(tmp_path / "gray.npy", deep[..., 0].astype(np.uint8))
    assert source_of(tmp_path / "gray.npy", channels=1).read(0).shape == (1, 6, 7)
    colour = source_of(tmp_path / "gray.npy", channels=3).read(0)
    assert torch.equal(colour[0], colour[2])


def test_luminance_of_an_array_is_pils(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    np.save(tmp_path / "colour.npy", pixels)
    image = source_of(tmp_path / "colour.npy", channels=1).read(0)
    np.testing.assert_array_equal(image[0].numpy(), np.asarray(Image.fromarray(pixels).convert("L")))


def test_four_channels_from_a_file_that_has_four(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "four.png")
    assert source_of(tmp_path / "four.png", channels=4).read(0)[:, 0, 0].tolist() == [1, 2, 3, 4]


def test_what_cannot_be_read_says_which_and_why(
    tmp_path: Path, write_image: Callable[..., Path], truncate: Callable[[Path], None]
) -> None:
    truncate(write_image(tmp_path / "cut.jpg", 64, 64))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    np.save(tmp_path / "float.npy", np.zeros((4, 4, 3), dtype=np.float32))
    np.save(tmp_path / "five.npy", np.zeros((4, 4, 5), dtype=np.uint8))
    np.save(tmp_path / "objects.npy", np.array([object()], dtype=object), allow_pickle=True)
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    reasons = {
        "cut.jpg": "truncated",
        "text.png": "PIL does not know",
        "empty.jpg": "PIL does not know",
        "float.npy": "float32 pixels",
        "five.npy": "5 channels",
        "objects.npy": "allow_pickle",
        "float.tif": "mode F",
        "missing.jpg": "does not exist",
    }
    for name, reason in reasons.items():
        source = source_of(tmp_path / name)
        with pytest.raises(UnreadableImage, match=reason) as caught:
            source.read(0)
        assert caught.value.name == str(tmp_path / name) == source.name(0)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (copy.name, copy.cause) == (caught.value.name, caught.value.cause)


def test_names_that_are_not_ascii_or_not_even_text(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "größe 1.png")
    odd = "caf\udce9.png"  # a Latin-1 byte, as os.listdir gives it
    (tmp_path / odd).write_bytes((tmp_path / "größe 1.png").read_bytes())
    source = FileSource(np.array(["größe 1.png", odd]), None, 3, root=tmp_path)
    assert torch.equal(source.read(0), source.read(1))


def test_a_subset_is_its_images_in_its_order() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    whole = StackedSource(images, np.arange(5) % 2, "set")
    part = SubsetSource(SubsetSource(whole, np.array([4, 1, 0])), np.array([1, 0]))
    assert part.images is not None
    assert part.images.flatten().tolist() == [1, 4]
    assert [part.name(i) for i in range(len(part))] == ["set[1]", "set[4]"]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    assert part.read(1).item() == 4
    assert part.fingerprint() != SubsetSource(whole, np.array([4, 1])).fingerprint()
