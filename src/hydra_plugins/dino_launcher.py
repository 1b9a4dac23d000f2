"""Hydra looks for its plugins in this package alone; these are `hydra/launcher=slurm` and `hydra/launcher=local`."""

from dino.sweep.launcher import LocalPool, SlurmArrays


class SlurmLauncher(SlurmArrays):
    """`conf/hydra/launcher/slurm.yaml`"""


class LocalLauncher(LocalPool):
    """`conf/hydra/launcher/local.yaml`"""
