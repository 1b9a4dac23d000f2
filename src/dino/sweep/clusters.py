"""The cluster of a sweep, built from what its manifest says."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from dino.config import build
from dino.sweep.cluster import Cluster
from dino.sweep.manifest import Manifest


def cluster_of(manifest: Manifest) -> Cluster:
    return built(manifest.cluster)


def built(settings: Mapping[str, Any]) -> Cluster:
    """Raises `ValueError` for settings that cannot be."""
    cluster: Cluster = build(OmegaConf.create({"cluster": dict(settings)}), "cluster")
    return cluster
