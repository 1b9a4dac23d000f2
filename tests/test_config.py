"""Everything in conf/ composes, builds and reaches a parameter; what of a config is saved, and what changes results."""

import copy
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

import dino.config
from dino import rules, validation
from dino.config import (
    CONF,
    TOP_LEVEL_KEYS,
    UNRELATED_TO_RESULTS,
    build,
    changes_results,
    compose,
    differences,
    fingerprint,
    fit_to_patch,
    raw_settings,
    resolve,
    result_settings,
    save_config,
)
from dino.messages import ConfigError
from dino.overrides import groups, options_of
from dino.presets import keys_of_option, leaves
from dino.targets import type_mismatch

REPOSITORY = Path(__file__).resolve().parents[1]
WHOLE_RUNS = ("dataset", "recipe", "experiment", "debug")  # options that are tried by building all of a run
OPTIONS = [(group, option) for group in groups() for option in options_of(group) if not group.startswith("hydra")]


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """With Hydra's node, checked for all that can be checked without data."""
    return validation.checked(overrides, paths=False)[0]


def choose(group: str, option: str) -> tuple[str, ...]:
    return (f"{group}=[{option}]",) if group == "evaluation" else (f"{group}={option}",)


def build_group(config: DictConfig, group: str) -> Any:
    """The objects of one group. Large networks go to the meta device, which has shapes but no memory."""
    with torch.device("meta"):
        if group == "augmentation":
            channels = config.dataset.channels
            return build(config, group, mean=[0.5] * channels, std=[0.5] * channels)
        if group == "head":
            return build(config, group, in_dim=64)
        if group == "optimizer":
            return build(config, group)([torch.nn.Parameter(torch.zeros(2, 2))])
        if group.startswith("schedule"):
            return build(config, group, epochs=config.trainer.epochs, steps_per_epoch=3)
        if group in ("evaluation", "logger"):
            return [build(config, f"{group}.{name}") for name in config[group]]
        return build(config, group)


# ---------------------------------------------------------------------- every file of conf/


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_builds(group: str, option: str) -> None:
    config = composed(*choose(group, option))
    resolve(config)
    object_group = group.split("/")[0] if group.startswith("loss/") else group.replace("/", ".")
    for built in (*validation.NEEDED, "evaluation", "logger") if group in WHOLE_RUNS else (object_group,):
        made = build_group(config, built)
        assert made, f"{built} is {made!r}"
        assert not isinstance(made, dict | functools.partial), f"{built} is {made!r}, not an object"


def test_every_file_of_conf_is_an_option_that_was_tried() -> None:
    files = {path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml")}
    tried = {f"{group}/{option}" for group, option in OPTIONS}
    assert {file for file in files - tried if not file.startswith("hydra/")} == {"train"}


def test_every_dataset_has_a_recipe() -> None:
    assert options_of("recipe") == options_of("dataset")


def test_default_run_is_the_digits_experiment() -> None:
    assert fingerprint(compose([])) == fingerprint(compose(["experiment=digits"]))


def test_what_the_recipe_chooses_can_be_overridden() -> None:
    config = compose(["dataset=imagenet"])
    assert (config.augmentation.global_size, config.augmentation.local_size) == (224, 96)
    assert config.backbone.patch_size == 16
    experiment = "experiment=dino_resnet50_imagenet"
    assert compose([experiment]).backbone.architecture == "resnet50"
    assert compose([experiment, "backbone=vit_b8"]).backbone.patch_size == 8
    assert compose(["dataset=cifar10", "head.out_dim=99"]).head.out_dim == 99


def test_keys_without_a_target_are_the_declared_ones() -> None:
    settings = yaml.safe_load((CONF / "train.yaml").read_text())
    assert set(settings) - {"defaults"} == {*TOP_LEVEL_KEYS, "evaluation", "logger"}


def test_every_rule_fits_some_key() -> None:
    keys: set[str] = set()
    for choice in (("experiment", "dino_resnet50_imagenet"), ("loss/centering", "sinkhorn"), *OPTIONS):
        if choice[0] not in ("recipe", "debug"):
            keys |= set(leaves(raw_settings(composed(*choose(*choice)))))
    used = {id(rules.rule_for(key)) for key in keys}
    unused = [
        name
        for name, rule in rules.RULES.items()
        if name not in keys and not any(rules.fnmatch.fnmatchcase(key, name) for key in keys)
    ]
    assert unused == []
    assert used


# ---------------------------------------------------------------------- dead keys


@pytest.fixture
def copied_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of conf/ that a test may spoil."""
    copy = tmp_path / "conf"
    shutil.copytree(CONF, copy)
    monkeypatch.setattr(dino.config, "CONF", copy)
    dino.config.read_keys_of_conf.cache_clear()
    yield copy
    dino.config.read_keys_of_conf.cache_clear()


@pytest.mark.parametrize(
    ("file", "name", "key"),
    [
        ("head/dino.yaml", "dead_key", "head.dead_key"),
        ("loss/centering/ema.yaml", "dead_key", "loss.centering.dead_key"),
        ("trainer/default.yaml", "dead_key", "trainer.dead_key"),
        ("evaluation/knn.yaml", "dead_key", "evaluation.knn.dead_key"),
        ("train.yaml", "dead_key", "dead_key"),
    ],
)
def test_a_dead_key_is_named(copied_conf: Path, file: str, name: str, key: str) -> None:
    validation.checked([])
    with (copied_conf / file).open("a") as text:
        text.write(f"\n{name}: 1\n")
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: "):
        validation.checked([])


def test_a_file_that_is_no_yaml_of_ours_is_named_with_its_line(copied_conf: Path) -> None:
    experiments = copied_conf / "experiment"
    (experiments / "broken.yaml").write_text("# @package _global_\nloss:\n  teacher_temp: [0.04, 0.07\nname: }\n")
    (experiments / "latin1.yaml").write_bytes(b"# f\xfcr mich\nseed: 1\n")
    (experiments / "no_package.yaml").write_text("loss:\n  teacher_temp: 0.07\n")
    validation.checked([])  # what is not chosen disturbs nobody
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(experiments))}/broken\.yaml, line 4: "):
        validation.checked(["experiment=broken"])
    with pytest.raises(ConfigError, match=r"/latin1\.yaml: it is not text in UTF-8"):
        validation.checked(["experiment=latin1"])
    with pytest.raises(ConfigError, match=r"^experiment: its file in conf/experiment must begin with"):
        validation.checked(["experiment=no_package"])


def test_a_key_that_only_other_keys_read_is_not_dead_and_not_passed_on(copied_conf: Path) -> None:
    (copied_conf / "ema" / "default.yaml").write_text(
        "_target_: dino.optimizer.EMA\nmomentum: 0.5\nshare: 0.25\nbuffers: own\n"
    )
    with (copied_conf / "head" / "dino.yaml").open("a") as text:
        text.write("\nbatch_norm: ${ema.share}\n")
    text = (copied_conf / "head" / "dino.yaml").read_text().replace("batch_norm: false", "")
    (copied_conf / "head" / "dino.yaml").write_text(text)
    config = validation.checked([])[0]
    assert config.head.batch_norm == 0.25
    build(config, "ema")


# ---------------------------------------------------------------------- recipes


def test_what_a_preset_sets_is_dropped_where_the_option_does_not_have_it(copied_conf: Path) -> None:
    (copied_conf / "recipe" / "digits.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /augmentation: digits\n  - /backbone: vit_micro4\n  - _self_\n"
        "schedule:\n  lr:\n    warmup_epochs: 4\n    final: 1e-5\nevaluation:\n  knn:\n    every_epochs: 3\n"
    )
    assert compose([]).schedule.lr.final == 1e-5
    assert "final" not in validation.checked(["schedule/lr=constant"])[0].schedule.lr
    assert "warmup_epochs" not in validation.checked(["schedule/lr=three_phase", "debug=smoke"])[0].schedule.lr
    assert set(validation.checked(["evaluation=[validation_loss]"])[0].evaluation) == {"validation_loss"}
    with pytest.raises(ConfigError, match=r"schedule\.lr\.final: dino\.schedule\.Constant takes no final"):
        validation.checked(["schedule/lr=constant", "schedule.lr.final=1e-4"])


@pytest.mark.parametrize("recipe", options_of("recipe"))
def test_a_recipe_leaves_what_it_chooses_as_it_is(recipe: str) -> None:
    """Otherwise `recipe=digits` would also change the depth of `backbone=vit_s16`."""
    chosen = ("augmentation.", "backbone.")
    assert not [key for key in keys_of_option(CONF, "recipe", recipe) if key.startswith(chosen)]


# ---------------------------------------------------------------------- what is saved, and the fingerprint


def test_saved_config_has_no_interpolation_and_knows_where_it_lies(tmp_path: Path) -> None:
    config = compose(["seed=3"])
    path = save_config(config, tmp_path)
    text = path.read_text()
    assert "${" not in text
    assert "???" not in text
    saved = yaml.safe_load(text)
    assert saved.pop("fingerprint") == fingerprint(config)
    assert saved.pop("run_dir") == str(tmp_path)
    expected = resolve(config)
    expected.pop("run_dir")
    assert OmegaConf.to_container(OmegaConf.create(saved)) == expected
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprint_changes_exactly_with_keys_that_change_results() -> None:
    config = compose([])
    before = fingerprint(config)
    tried = {True: 0, False: 0}
    for key, value in leaves(raw_settings(config)).items():
        if (isinstance(value, (bool, int, float, str)) and not validation.is_interpolated(value)) or value is None:
            changed = copy.deepcopy(config)
            other = (not value) if isinstance(value, bool) else 7.5 if isinstance(value, (int, float)) else "other"
            OmegaConf.update(changed, key, other)
            assert (fingerprint(changed) != before) == changes_results(key), key
            tried[changes_results(key)] += 1
    assert min(tried.values()) > 8


def test_differences_name_both_values() -> None:
    old = result_settings(compose(["loss.teacher_temp=0.05"]))
    new = result_settings(compose(["loss.teacher_temp=0.06", "run_dir=elsewhere", "trainer.num_threads=3"]))
    assert differences(old, new) == ["loss.teacher_temp: 0.05 -> 0.06", "schedule.teacher_temp.base: 0.05 -> 0.06"]
    assert differences(new, new) == []


def commented_as_unrelated() -> set[str]:
    """Keys of conf/ whose comment says `changes results: no`."""
    keys = set()
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        header = re.match(r"# @package (\S+)", text)
        group = header[1] if header else ".".join(path.relative_to(CONF).parts[:-1])
        package = "" if group in ("", "_global_") else f"{group}."
        keys |= {package + key for key in re.findall(r"^(\w+):.*changes results: no", text, re.MULTILINE)}
    return keys


def test_comments_and_list_agree_on_what_leaves_results_alone() -> None:
    commented = commented_as_unrelated()
    assert {key for key in commented if changes_results(key)} == set()
    patterns = [
        pattern
        for pattern in UNRELATED_TO_RESULTS
        if pattern not in (*TOP_LEVEL_KEYS, "logger.*", "cluster.*", "sweep.*")
    ]
    for pattern in patterns:
        assert any(rules.fnmatch.fnmatchcase(key, pattern) for key in commented), pattern


def test_two_starts_have_two_run_directories() -> None:
    def run_dir(_: int) -> str:
        command = [sys.executable, str(REPOSITORY / "train.py"), "--cfg", "job", "--resolve", "--package", "run_dir"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    with ThreadPoolExecutor(max_workers=2) as pool:
        first, second = pool.map(run_dir, range(2))
    assert first != second
    assert re.fullmatch(r"outputs/digits/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{6}", first)
    assert compose([]).run_dir == compose([]).run_dir  # within one process it stays


# ---------------------------------------------------------------------- building


def config_of(node: dict[str, Any], **top: Any) -> DictConfig:
    return OmegaConf.create({"node": node, "allowed_targets": [], **top})


def test_build_gives_plain_containers_and_runtime_wins() -> None:
    config = config_of(
        {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": "${rate}", "betas": [0.8, 0.9]}, rate=0.25
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    partial = build(config, "node")
    assert type(partial.keywords["betas"]) is list
    assert partial([parameter]).defaults["lr"] == 0.25
    assert build(config, "node", params=[parameter], lr=0.5).defaults["lr"] == 0.5


def test_nested_objects_are_built() -> None:
    linear = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    wrapper = build(config_of({"_target_": "torch.nn.Flatten", "start_dim": 2}), "node")
    assert wrapper.start_dim == 2
    modules = build(config_of({"_target_": "torch.nn.ModuleList", "modules": [linear, linear]}), "node")
    assert [module.out_features for module in modules] == [3, 3]


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"_target_": "os.system", "command": "true"}, "only names in dino., torch., torchvision., timm. are built"),
        ({"_target_": "torch.os.system", "command": "true"}, "that is posix.system"),
        ({"_target_": "torch.nn.Linaer"}, "torch.nn has no Linaer; did you mean Linear?"),
        ({"_target_": "torch.nn"}, "neither a class nor a function"),
        ({"_target_": "torch.nn.Flatten", "start_dmi": 1}, "takes no start_dmi; did you mean node.start_dim?"),
        ({"_target_": "torch.nn.Flatten", "start_dim": "one"}, "node.start_dim=one: use a whole number"),
        ({"_target_": "broken_package.Thing"}, "No module named 'module_that_is_missing'"),
    ],
)
def test_build_refuses(node: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text(
        "try:\n    import module_that_is_missing\nexcept ImportError as e:\n    raise RuntimeError('deep') from e\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of(node)
    config.allowed_targets = ["broken_package"]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        build(config, "node")


@pytest.mark.parametrize(
    ("annotation", "value", "needed"),
    [
        (int, 3, None),
        (int, True, "a whole number"),
        (int, 3.0, "a whole number"),
        (float, 3, None),
        (float, "3", "a number"),
        (bool, 1, "true or false"),
        (str, None, "text"),
        (int | None, None, None),
        (int | None, "x", "a whole number or null"),
        (list[float], [1, 2.5], None),
        (list[float], [1, "x"], "a list, each a number"),
        (list[float], 1.0, "a list, each a number"),
        (tuple[float, float], [0.1, 0.2], None),
        (tuple[float, float], [0.1], "a list of 2: a number, a number"),
        (Path, "here", None),
        (Path, 3, "Path"),
        (torch.nn.Module, {"_target_": "torch.nn.Flatten"}, None),
    ],
)
def test_type_mismatch(annotation: Any, value: Any, needed: str | None) -> None:
    assert type_mismatch(annotation, value) == needed


def test_a_wrong_config_is_refused_without_importing_torch() -> None:
    code = (
        "import sys; from dino.validation import checked; from dino.messages import ConfigError\n"
        "try: checked(['loss.student_temp=0', 'loss.teacher_tmp=1'])\n"
        "except ConfigError as error: print(len(error.problems), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2 False\n"


# ---------------------------------------------------------------------- sizes and warnings


@pytest.mark.parametrize(
    ("size", "patch", "fitted"), [(224, 16, 224), (16, 16, 16), (8, 16, 16), (95, 16, 96), (20, 16, 16), (24, 16, 32)]
)
def test_fit_to_patch(size: int, patch: int, fitted: int) -> None:
    assert fit_to_patch(size, patch) == fitted


def test_sizes_of_the_dataset_are_fitted_and_those_of_a_person_are_not(copied_conf: Path) -> None:
    config = composed("backbone=vit_s16")
    assert config.augmentation.global_size % 16 == 0
    assert config.augmentation.local_size % 16 == 0
    (copied_conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /backbone: vit_s16\n  - _self_\ndataset:\n  global_size: 20\n"
    )
    with pytest.raises(ConfigError, match=r"dataset\.global_size=20: not a multiple of backbone\.patch_size=16"):
        validation.checked(["experiment=mine"])


@pytest.mark.parametrize(
    ("overrides", "num_warnings"),
    [([], 0), (["head.batch_norm=true"], 1), (["backbone=resnet18"], 1), (["backbone=efficientnet_b0"], 1)],
)
def test_micro_batches_for_batch_norm_are_a_warning(overrides: list[str], num_warnings: int) -> None:
    _, warnings = validation.checked(["loss.koleo_weight=0", "trainer.accumulate_steps=2", *overrides])
    assert len(warnings) == num_warnings
    assert all(warning.startswith("trainer.accumulate_steps=2: batch norm sees") for warning in warnings)
    assert validation.checked(overrides)[1] == []


def test_a_teacher_that_is_not_sharper_is_a_warning() -> None:
    _, warnings = validation.checked(["loss.student_temp=0.04", "loss.teacher_temp=0.04"])
    assert len(warnings) == 1
    assert warnings[0].startswith("loss.student_temp=0.04 is not above loss.teacher_temp=0.04")
    assert validation.checked([])[1] == []
