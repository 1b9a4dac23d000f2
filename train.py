"""Trains one student and teacher: composes the config, builds everything, trains, evaluates.

python train.py                                              the quickstart: digits, a few minutes on a CPU
python train.py backbone=vit_s16 loss.teacher_temp=0.07      any key of conf/ is an override
python train.py -m loss.teacher_temp=0.04,0.07               one run after another
"""

from omegaconf import DictConfig

from dino.config import save_config
from dino.launch import main, run_directory


@main
def train(config: DictConfig) -> None:
    # Imported here, so that --help and a misspelt key do not wait for torch.
    from dino.run import Run
    from dino.runtime import provenance
    from dino.training import assemble, introduce, resume_or_start, summarise_run

    with Run(run_directory(config), provenance()) as run:
        trainer = assemble(config, run)
        resume_or_start(trainer, config)
        run.begin(trainer.step)
        save_config(config, run.directory)
        introduce(trainer, config)
        trainer.fit()
        summarise_run(trainer)


if __name__ == "__main__":
    train()
