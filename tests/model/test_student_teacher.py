"""Student and teacher: one pass per resolution, a teacher that is a copy, and an error for every wrong wire."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dino.backbone import Backbone, ConvolutionalBackbone, TimmBackbone, VisionTransformer
from dino.model import (
    DINOHead,
    MultiCropModel,
    SharedStorageError,
    StudentFrozenError,
    StudentTeacher,
    TeacherDiffersError,
    TeacherDropPathError,
    TeacherOptimizedError,
    TeacherTrainableError,
)
from dino.model.wiring import stochastic_modules


def make_student(drop_path_rate: float = 0.0, backbone: Backbone | None = None) -> MultiCropModel:
    backbone = backbone or VisionTransformer(
        image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, drop_path_rate=drop_path_rate
    )
    return MultiCropModel(backbone, DINOHead(in_dim=backbone.embed_dim, out_dim=12, hidden_dim=16, bottleneck_dim=8))


def make_views(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(2, batch, 3, 16, 16), torch.randn(4, batch, 3, 8, 8)


def test_rows_are_view_major() -> None:
    student = make_student()
    global_views, local_views = make_views()
    projection, features = student(global_views, local_views)
    logits = projection.logits()
    expected = torch.cat([student.backbone(view) for views in (global_views, local_views) for view in views])
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, student.head(expected).logits())
    assert logits.shape == (6 * 3, 12)


def test_without_local_views() -> None:
    student = make_student()
    global_views, local_views = make_views()
    both, _ = student(global_views, local_views)
    only, _ = student(global_views, None)
    torch.testing.assert_close(only.rows, both.rows[: 2 * 3])


def test_one_backbone_pass_per_resolution_and_one_head_pass() -> None:
    student = make_student()
    batches: dict[str, list[tuple[int, ...]]] = {"backbone": [], "head": []}
    for name, seen in batches.items():
        getattr(student, name).register_forward_pre_hook(lambda _, x, seen=seen: seen.extend(tuple(y.shape) for y in x))
    student(*make_views())
    assert batches == {"backbone": [(6, 3, 16, 16), (12, 3, 8, 8)], "head": [(18, 16)]}
    student(torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 16, 16))
    assert batches["backbone"][2:] == [(18, 3, 16, 16)]


def test_views_of_one_resolution_are_one_batch_of_the_batch_norm() -> None:
    torch.manual_seed(0)
    backbone = ConvolutionalBackbone(architecture="resnet18", stem="small")
    model = make_student(backbone=backbone)
    global_views, local_views = make_views()
    first = copy.deepcopy(backbone.bn1)
    for views in (global_views, local_views):
        first(backbone.conv1(views.flatten(0, 1)))
    model(global_views, local_views)
    assert backbone.bn1.num_batches_tracked.item() == 2
    torch.testing.assert_close(backbone.bn1.running_mean, first.running_mean)
    torch.testing.assert_close(backbone.bn1.running_var, first.running_var)


def test_a_head_for_other_features_is_refused() -> None:
    backbone = VisionTransformer(image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"the backbone gives 16 features, but head\.in_dim=32"):
        MultiCropModel(backbone, DINOHead(in_dim=32, out_dim=4))


def test_the_teacher_starts_as_the_student_and_never_gets_gradients() -> None:
    model = StudentTeacher(make_student())
    global_views, local_views = make_views()
    projection, features = model.student_forward(global_views, local_views)
    logits, teacher_logits = projection.logits(), model.teacher_forward(global_views).logits()
    assert torch.equal(teacher_logits, logits[: 2 * 3])
    assert not teacher_logits.requires_grad
    assert features.requires_grad
    logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert model.teacher.training, "its batch norms use the statistics of the batch, as in the original"
    model.check_wiring(torch.optim.SGD(model.student.parameters(), lr=1.0))


def timm_vit() -> Backbone:
    return TimmBackbone(model_name="test_vit", image_size=32, patch_size=16, drop_path_rate=0.5)


def torchvision_efficientnet() -> Backbone:
    return ConvolutionalBackbone(architecture="efficientnet_b0", drop_path_rate=0.5)


def our_vit() -> Backbone:
    return VisionTransformer(image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.5)


@pytest.mark.parametrize("make", [our_vit, timm_vit, torchvision_efficientnet])
def test_only_the_student_drops_paths(make: Callable[[], Backbone]) -> None:
    torch.manual_seed(0)
    model = StudentTeacher(make_student(backbone=make()))
    rates = [getattr(module, attribute) for _, module, attribute in stochastic_modules(model.student)]
    assert max(rates) == pytest.approx(0.5, rel=0.1)
    assert {getattr(module, attribute) for _, module, attribute in stochastic_modules(model.teacher)} == {0.0}
    model.check_wiring()
    views = torch.randn(2, 8, 3, 32, 32)
    assert torch.equal(model.teacher_forward(views).rows, model.teacher_forward(views).rows)
    assert not torch.equal(model.student_forward(views, None)[0].rows, model.student_forward(views, None)[0].rows)


def share_a_parameter(model: StudentTeacher) -> None:
    model.teacher.backbone.norm = model.student.backbone.norm


def share_memory(model: StudentTeacher) -> None:
    model.teacher.backbone.pos_embed.data = model.student.backbone.pos_embed.data[:]


def share_all(model: StudentTeacher) -> None:
    model.teacher = model.student


def change_a_value(model: StudentTeacher) -> None:
    with torch.no_grad():
        model.teacher.head.last_layer.weight_v[3, 2] += 1e-6


def change_the_shape(model: StudentTeacher) -> None:
    model.teacher.backbone.blocks = nn.ModuleList(model.teacher.backbone.blocks[:1])


def train_the_teacher(model: StudentTeacher) -> None:
    model.teacher.backbone.cls_token.requires_grad_(True)


def leave_a_gradient(model: StudentTeacher) -> None:
    model.teacher.backbone.cls_token.grad = torch.zeros(1, 1, 16)


def freeze_the_student(model: StudentTeacher) -> None:
    model.student.backbone.requires_grad_(False)


def drop_paths_in_the_teacher(model: StudentTeacher) -> None:
    model.teacher.backbone.blocks[1].drop_path.drop_prob = 0.1


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (share_a_parameter, SharedStorageError, "teacher.backbone.norm.weight lies in the memory of student.backbone"),
        (share_memory, SharedStorageError, r"teacher.backbone.pos_embed lies in the memory of student.backbone.pos_e"),
        (share_all, SharedStorageError, "teacher.backbone.cls_token"),
        (change_a_value, TeacherDiffersError, "teacher.head.last_layer.weight_v does not start equal"),
        (change_the_shape, TeacherDiffersError, r"backbone.blocks.1.\S+ is only in the student"),
        (train_the_teacher, TeacherTrainableError, "teacher.backbone.cls_token gets gradients"),
        (leave_a_gradient, TeacherTrainableError, "teacher.backbone.cls_token gets gradients"),
        (freeze_the_student, StudentFrozenError, "no parameter of student.backbone gets gradients"),
        (
            drop_paths_in_the_teacher,
            TeacherDropPathError,
            r"teacher.backbone.blocks.1.drop_path \(DropPath\) is active",
        ),
    ],
)
def test_every_wrong_wire_has_its_error(
    damage: Callable[[StudentTeacher], None], error: type[Exception], message: str
) -> None:
    model = StudentTeacher(make_student())
    model.check_wiring()
    damage(model)
    with pytest.raises(error, match=message):
        model.check_wiring()


def test_an_optimizer_over_the_teacher_is_an_error() -> None:
    model = StudentTeacher(make_student())
    with pytest.raises(TeacherOptimizedError, match=r"the optimizer holds teacher\.backbone.cls_token"):
        model.check_wiring(torch.optim.SGD(model.parameters(), lr=1.0))


def test_state_names_are_those_of_both_networks() -> None:
    model = StudentTeacher(make_student())
    inner = list(model.student.state_dict())
    assert list(model.state_dict()) == [f"{side}.{name}" for side in ("student", "teacher") for name in inner]
