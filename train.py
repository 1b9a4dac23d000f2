"""Trains one student and teacher: composes the config, builds everything, trains, evaluates.

python train.py                                              the quickstart: digits, a few minutes on a CPU
python train.py backbone=vit_s16 loss.teacher_temp=0.07      any key of conf/ is an override
python train.py -m loss.teacher_temp=0.04,0.07               one run after another
torchrun --nproc-per-node 2 train.py                         one run on two processes
"""

from dino import preemption

if __name__ == "__main__":
    preemption.listen()  # before the imports that take seconds: a signal is never lost

from omegaconf import DictConfig

from dino.config import save_config
from dino.launch import main, run_directory
from dino.processes import Processes
from dino.start_up import StartUp


@main
def train(config: DictConfig) -> None:
    start_up = StartUp()
    start_up.mark("settings")
    # Imported here, so that --help and a misspelt key do not wait for torch.
    from dino.ranks import from_main, process_group
    from dino.run import Run
    from dino.runtime import choose_device, provenance
    from dino.training import assemble, introduce, leaving_report, resume_or_start, summarise_run

    start_up.mark("imports")
    processes = Processes.from_environment()
    device = choose_device(config.trainer.device, processes.local_rank)
    with (
        leaving_report(run_directory(config), wanted=processes.is_main and config.monitor.report),
        process_group(processes, device),
        Run(from_main(run_directory(config)), provenance(), processes) as run,
    ):
        preemption.check()
        trainer = assemble(config, run, start_up)
        resume_or_start(trainer, config)
        run.begin(trainer.step)
        if processes.is_main and not (trainer.finished and (run.directory / "config.yaml").exists()):
            save_config(config, run.directory)  # nothing is trained with it otherwise
        introduce(trainer, config)
        trainer.fit()
        summarise_run(trainer)


if __name__ == "__main__":
    train()
