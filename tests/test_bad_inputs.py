"""What people type wrongly, at the real command line: one sentence each, exit code 2, nothing left behind."""

import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import REPOSITORY, run

# Command line -> a part of each sentence that it must give, in order.
CASES: dict[str, list[str]] = {
    # keys
    "loss.teacher_tmp=0.05": ["loss.teacher_tmp: there is no such key; did you mean loss.teacher_temp?"],
    "lr=0.1": ["lr: there is no such key; did you mean optimizer.lr?"],
    "epochs=5": ["epochs: there is no such key; did you mean trainer.epochs?"],
    "bakbone=vit_s16": ["bakbone: there is no such key; did you mean backbone?"],
    "hydra.swep.dir=x": ["hydra.swep.dir: there is no such key; did you mean hydra.sweep.dir"],
    "+colour=red": ["colour: there is no such key"],
    "~loss.foo": ["~loss.foo: there is no loss.foo to leave out"],
    "+trainer.epochs=5": ["write trainer.epochs=5 without the +"],
    # options of groups
    "backbone=vit_s17": ["backbone=vit_s17: no such option; there are vit_s16, vit_s8"],
    "dataset=mnist": ["dataset=mnist: no such option; there are fashion_mnist"],
    "loss/centering=sinkhron": ["loss/centering=sinkhron: no such option; there are sinkhorn, ema"],
    "loss/centring=sinkhorn": ["loss/centring: there is no such group; did you mean loss/centering?"],
    "evaluation=[knn,linaer]": ["evaluation=linaer: no such option; there are"],
    "experiment=dino_vits16": ["experiment=dino_vits16: no such option; there are dino_vits"],
    "head=null": ["head=null: no such option; there are dino"],
    "loss.centering=3": ["loss.centering is a group of settings; set one of its keys, or choose loss/centering=ema"],
    "logger.console=false": ["logger.console=false", "to leave it out write ~logger.console"],
    # syntax
    "trainer.epochs": ["trainer.epochs: write a setting as key=value"],
    "trainer.epochs = 5": ["trainer.epochs = 5: write trainer.epochs=5, without spaces"],
    "--config-dir mine": ["--config-dir: configs are read from"],
    "--epochs 5": ["--epochs: no such option; settings are written key=value without dashes, such as trainer.epochs="],
    "dataset.root=/data/a=b": ["the value cannot be read as it stands; quote it"],
    "loss.teacher_temp=0.04,0.07": ["several values; add -m"],
    # types and ranges
    "trainer.epochs=ten": ["trainer.epochs=ten: use a whole number of at least 1"],
    "trainer.epochs=0": ["trainer.epochs=0: use a whole number of at least 1"],
    "trainer.epochs=1.5": ["trainer.epochs=1.5: use a whole number"],
    "loss.student_temp=0": ["loss.student_temp=0: use a number above 0"],
    "loss.teacher_temp=-0.04": ["loss.teacher_temp=-0.04: use a number above 0"],
    "ema.momentum=1.2": ["ema.momentum=1.2: use a number from 0 to 1"],
    "loss.center_momentum=-1": ["loss.center_momentum=-1: use a number from 0 to 1"],
    "optimizer.lr=0": ["optimizer.lr=0: use a number above 0"],
    "augmentation.flip_probability=2": ["augmentation.flip_probability=2: use a number from 0 to 1"],
    "augmentation.global_scale=[0.5,0.4]": ["augmentation.global_scale=[0.5,0.4]: use a list of two ascending numbers"],
    "augmentation.num_local_views=-1": ["augmentation.num_local_views=-1: use a whole number of at least 0"],
    "augmentation.jitter_form=fast": ["augmentation.jitter_form=fast: use exact or matrix"],
    "dataset=imagenet dataset.root=. dataset.scaled_decoding=2": ["dataset.scaled_decoding=2: use true or false"],
    "trainer.precision=bf17": ["trainer.precision=bf17: use auto or fp32 or tf32 or bf16 or fp16"],
    "seed=x trainer.epochs=0 loss.teacher_tmp=1": ["loss.teacher_tmp", "seed=x", "trainer.epochs=0"],
    # keys against one another
    "loss.warmup_teacher_temp_epochs=5000": [
        "loss.warmup_teacher_temp_epochs=5000: the warm-up is longer than the run"
    ],
    "trainer.epochs=2": ["the warm-up is longer than the run", "use schedule.lr.warmup_epochs=2 or less"],
    "augmentation.local_size=95": ["augmentation.local_size=95: not a multiple", "nearest valid: 92 and 96"],
    "dataset.global_size=21": ["dataset.global_size=21: not a multiple", "nearest valid: 20 and 24"],
    "backbone.num_heads=5": ["backbone.num_heads=5: backbone.embed_dim=64 must be a multiple of it"],
    "trainer.accumulate_steps=2 loss.koleo_weight=0 loss/centering=sinkhorn": [
        "trainer.accumulate_steps=2: loss/centering=sinkhorn"
    ],
    "trainer.accumulate_steps=2 loss.koleo_weight=0.3": ["trainer.accumulate_steps=2: loss.koleo_weight=0.3"],
    "dataset=imagenet dataset.root=. dataset.evaluation_size=200": ["nearest valid: 192 and 208"],
    "dataset.mean=[0.1,0.2]": ["dataset.mean=[0.1,0.2]: one number for each of dataset.channels=1 is needed, or auto"],
    "trainer.precision=fp16 trainer.device=cpu": ["trainer.precision=fp16: for GPUs only"],
    "trainer.precision=tf32 trainer.device=cpu": ["trainer.precision=tf32: for GPUs only"],
    # paths
    "dataset=folder": ["dataset.root=null: say where the images are"],
    "dataset=cifar10": ["dataset.root=data: there is no such file or folder", "dataset.download=true"],
    "dataset=folder 'dataset.root=/mine (old)/images'": [
        "dataset.root=/mine (old)/images: the value cannot be read as it stands; quote it, twice"
    ],
    "dataset=folder dataset.root=/no/such/place": ["dataset.root=/no/such/place: there is no such file or folder"],
    "resume=no_such_checkpoint.pt": ["resume=no_such_checkpoint.pt: there is no such checkpoint"],
    "backbone.weights=no_such_file.pt": ["backbone.weights=no_such_file.pt: there is no such file"],
    # multiruns: all points are looked at before the first starts
    "-m loss.student_temp=0.1,0.0": ["loss.student_temp=0.0: use a number above 0"],
    "-m loss.student_tmp=0.1,0.2": ["loss.student_tmp: there is no such key; did you mean loss.student_temp?"],
    "-m trainer.epochs = 5 seed=0,1": ["trainer.epochs = 5: write trainer.epochs=5, without spaces"],
    "run_dir=/etc/passwd/run": ["run_dir=/etc/passwd/run: /etc/passwd is not a folder"],
    "run_dir=/proc/run": ["run_dir=/proc/run: /proc is not a folder that can be written to"],  # whoever asks
    "run_dir=": ["run_dir=: it is empty; give the folder"],
    "--cfg job loss.techer_temp=0.07": ["loss.techer_temp: there is no such key; did you mean loss.teacher_temp?"],
    "name=../elsewhere": ["name=../elsewhere: it is a part of the run's path"],
    "name=": ["name=: it is a part of the run's path; give one that is not empty"],
    "trainer.device=tpu": ["trainer.device=tpu: use auto or cpu or cuda"],
    "-m run_dir=here seed=0,1": ["run_dir with -m: every point needs a directory of its own"],
    # surviving
    "trainer.on_save_error=maybe": ["trainer.on_save_error=maybe: use warn or stop"],
    "trainer.max_skipped_steps=-1": ["trainer.max_skipped_steps=-1: use a whole number of at least 0"],
    "monitor.early_stopping.mode=up": ["monitor.early_stopping.mode=up: use auto or max or min"],
    "monitor.early_stopping.patience=0": [
        "monitor.early_stopping.patience=0: use a whole number of at least 1 or null"
    ],
    "resume_changes=loss": ["resume_changes=loss: use a list of texts"],
    # targets
    "loss._target_=os.system": ["loss._target_=os.system: only names in dino., torch., torchvision., timm. are built"],
    "loss._target_=dino.loss.DINOLos": [
        "loss._target_=dino.loss.DINOLos: dino.loss has no DINOLos; did you mean DINOLoss?"
    ],
    "loss._target_=dino.los.DINOLoss": ["loss._target_=dino.los.DINOLoss"],
    "loss._target_=torch.os.system": ["loss._target_=torch.os.system: that is posix.system"],
    "+loss.student_tmp=0.1": [
        "loss.student_tmp: dino.loss.DINOLoss takes no student_tmp; did you mean loss.student_temp?"
    ],
    "optimizer.fused=yes_please": ["optimizer.fused=yes_please: use true or false"],
    "loss/centering=sinkhorn loss.center_momentum=0.5": ["loss.center_momentum: has no effect with these options"],
}
NUM_PROBLEMS = {"seed=x trainer.epochs=0 loss.teacher_tmp=1": 3}


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str
    left_behind: list[str]


def run_train(line: str, directory: Path) -> Outcome:
    command = [sys.executable, str(REPOSITORY / "train.py"), *shlex.split(line)]
    done = run(command, cwd=directory)
    return Outcome(done.returncode, done.stdout, done.stderr, [path.name for path in directory.iterdir()])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {line: pool.submit(run_train, line, tmp_path_factory.mktemp("empty")) for line in CASES}


@pytest.mark.parametrize("line", CASES)
def test_bad_input_is_answered_in_one_sentence(line: str, outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes[line].result()
    output = outcome.stdout + outcome.stderr
    assert outcome.exit_code == 2, output
    for sentence in CASES[line]:
        assert sentence in outcome.stderr
    lines = outcome.stderr.splitlines()
    assert len(lines) == NUM_PROBLEMS.get(line, 1), output
    assert all(text.startswith("error: ") for text in lines)
    assert outcome.stdout == ""
    assert "Traceback" not in output
    assert "HYDRA_FULL_ERROR" not in output
    assert outcome.left_behind == []
