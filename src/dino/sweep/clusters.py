"""The cluster of a sweep, built from what its manifest says."""

from omegaconf import OmegaConf

from dino.config import build
from dino.sweep.cluster import Cluster
from dino.sweep.manifest import Manifest


def cluster_of(manifest: Manifest) -> Cluster:
    cluster: Cluster = build(OmegaConf.create({"cluster": manifest.cluster}), "cluster")
    return cluster
