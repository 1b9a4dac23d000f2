"""Attention maps, masks, patch colours and correspondences: the original's numbers, and places that are known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from dino.backbone import ConvolutionalBackbone, VisionTransformer
from dino.evaluation.attend import Onlooker, attend_images, write_video
from dino.evaluation.attention import PatchColours, class_attention, correspondences, mass_mask, patch_features
from dino.trained import Trained, load_trained


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    return load_trained(tmp_path / "weights.pth")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """64 x 48 pixels: a bright square on noise."""
    pixels = np.random.default_rng(0).integers(0, 80, (48, 64, 3), dtype=np.uint8)
    pixels[8:24, 40:56] = 230
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


# ---------------------------------------------------------------------- numbers


def test_maps_are_the_row_of_the_class_token(reference: Callable[[str], dict[str, Any]]) -> None:
    data = reference("model.npz")
    backbone = VisionTransformer(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3).double()
    prefix = "state/backbone."
    backbone.load_state_dict({k.removeprefix(prefix): torch.from_numpy(v) for k, v in data.items() if prefix in k})
    for view in ("native", "local", "rect", "double"):
        images = torch.from_numpy(data[f"in/{view}"])
        with torch.no_grad():
            maps = class_attention(backbone, images)
        whole = torch.from_numpy(data[f"attention/{view}"])[:, :, 0]  # [N, heads, T]
        assert_close(whole.sum(dim=-1), torch.ones_like(whole[..., 0]), rtol=1e-12, atol=1e-12)
        assert maps.shape[-2:] == (images.shape[-2] // 8, images.shape[-1] // 8)
        assert_close(maps.flatten(-2), whole[..., 1:], rtol=1e-9, atol=1e-13)
        assert_close(maps.sum(dim=(-2, -1)) + whole[..., 0], torch.ones_like(whole[..., 0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.6, 0.95, 1.0])
def test_masks_are_the_fewest_patches_with_that_mass(threshold: float) -> None:
    attention = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for of_head, mask in zip(attention, mass_mask(attention, threshold), strict=True):
        shares = (of_head / of_head.sum()).flatten().sort(descending=True).values
        count = int(mask.sum())
        assert float(shares[:count].sum()) >= threshold - 1e-12
        assert float(shares[: count - 1].sum()) < threshold
        assert float(of_head[mask].min()) >= float(of_head[~mask].max() if count < 12 else 0)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="--threshold"):
        mass_mask(torch.ones(1, 2, 2), threshold)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (3, 1), (3, 4)])
def test_one_bright_patch_lands_where_it_is(row: int, column: int) -> None:
    """Query and key of the last block look at nothing but brightness, so attention is where the bright patch is."""
    backbone = VisionTransformer(image_size=32, patch_size=8, embed_dim=4, depth=1, num_heads=1, channels=1).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
        backbone.patch_embed.proj.weight[0] = 1.0  # feature 0 of a token is its brightness, the others are 0
        backbone.blocks[0].norm1.weight.fill_(1.0)
        backbone.blocks[0].attn.qkv.bias[0] = 10.0  # every query asks for feature 0
        backbone.blocks[0].attn.qkv.weight[4, 0] = 10.0  # every key answers with it
        images = torch.zeros(1, 1, 32, 40)
        images[..., row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 1.0
        found = class_attention(backbone, images)[0, 0]
        patches = patch_features(backbone, images)[0]
    assert found.shape == (4, 5) == patches.shape[:2]
    assert divmod(int(found.argmax()), 5) == (row, column)
    assert found[row, column] > 0.9


def test_patches_find_each_other_where_they_were_moved_to() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 5, 16, generator=generator)
    second = first.roll((1, 2), dims=(0, 1))
    pairs, similarities = correspondences(first, second)
    assert len(pairs) == 20
    assert_close(similarities, torch.ones(20))
    for row, column, other_row, other_column in pairs.tolist():
        assert ((row + 1) % 4, (column + 2) % 5) == (other_row, other_column)


def test_colours_tell_kinds_of_patches_apart() -> None:
    """Four kinds differ in three directions."""
    noise = 0.01 * torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0))
    patches = torch.eye(16)[:4][torch.arange(16).view(4, 4) % 4] + noise
    colours = PatchColours.fit(patches)(patches)
    assert colours.min() >= 0
    assert colours.max() <= 1
    by_kind = [colours.flatten(0, 1)[kind::4] for kind in range(4)]
    for kind, rows in enumerate(by_kind):
        other = by_kind[(kind + 1) % 4].mean(dim=0)
        assert float((rows - rows.mean(dim=0)).abs().max()) < 0.2 < float((rows.mean(dim=0) - other).abs().max())
    assert torch.equal(PatchColours.fit(patches[:1, :2])(patches).isnan().any(), torch.tensor(False))  # two patches


# ---------------------------------------------------------------------- pictures and videos


def test_an_image_becomes_pictures_and_a_page(trained: Trained, photo: Path, tmp_path: Path) -> None:
    onlooker = Onlooker(trained, 40, torch.device("cpu"))
    page = attend_images(onlooker, photo, tmp_path / "out", threshold=0.6, match=photo)
    names = {path.stem for path in (tmp_path / "out" / "photo").iterdir()}
    assert names == {"image", "attention_over_image", "attention_mean", "attention_head0", "mask_head0", "patches"}
    for path in (tmp_path / "out" / "photo").iterdir():
        with Image.open(path) as picture:
            assert picture.size == (48, 40)  # 64 x 48 brought to 53 x 40, of which whole patches are 48 x 40
    text = page.read_text()
    assert text.count("<img") == 7
    assert "30 patches are each other&#x27;s nearest" in text
    assert "<script" not in text


def test_a_folder_of_images_keeps_them_apart(trained: Trained, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("a/one.png", "b/one.png", "b/one.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo).convert("RGB").save(folder / name)
    attend_images(Onlooker(trained, 32, torch.device("cpu")), folder, tmp_path / "out")
    found = sorted(str(path.parent.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("image.png"))
    assert found == ["a/one", "b/one_jpg", "b/one_png"]


def test_a_video_becomes_a_video_of_as_many_frames(trained: Trained, tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.0, (64, 48))
    for place in range(5):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[10:30, 8 * place : 8 * place + 20] = 200
        writer.write(frame)
    writer.release()
    output = tmp_path / "out" / "in_attention.mp4"
    onlooker = Onlooker(trained, 48, torch.device("cpu"))
    assert write_video(onlooker, tmp_path / "in.avi", output) == 5
    video = cv2.VideoCapture(str(output))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert video.get(cv2.CAP_PROP_FPS) == 12
    there, frame = video.read()
    assert there
    assert frame.shape == (48, 128, 3)
    assert write_video(onlooker, tmp_path / "in.avi", output, max_frames=2) == 2
    (tmp_path / "none.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="no frame of it can be read"):
        write_video(onlooker, tmp_path / "none.mp4", output)


def test_what_cannot_be_shown_is_said(trained: Trained, photo: Path, tmp_path: Path) -> None:
    onlooker = Onlooker(trained, 32, torch.device("cpu"))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        attend_images(onlooker, tmp_path / "nothing.jpg", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in this folder"):
        attend_images(onlooker, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(ValueError, match=r"--image: .*broken\.jpg cannot be read as an image"):
        attend_images(onlooker, tmp_path / "broken.jpg", tmp_path / "out")
    with pytest.raises(ValueError, match="--size 4: use at least one patch of 8 pixels"):
        Onlooker(trained, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="ConvolutionalBackbone has no attention: use a ViT"):
        class_attention(ConvolutionalBackbone(architecture="resnet18"), torch.zeros(1, 3, 32, 32))


def test_untrained_weights_are_others_of_the_same_network(trained: Trained) -> None:
    fresh = trained.untrained(seed=7)
    assert [value.shape for value in fresh.backbone.state_dict().values()] == [
        value.shape for value in trained.backbone.state_dict().values()
    ]
    images: Tensor = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(fresh.backbone(images), trained.backbone(images))
        assert torch.equal(fresh.backbone(images), trained.untrained(seed=7).backbone(images))
