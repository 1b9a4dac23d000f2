"""What a cluster is to a sweep: somewhere that trials are handed to, watched and cancelled."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dino.sweep.manifest import Manifest, Trial


@dataclass(frozen=True, kw_only=True)
class Live:
    """A trial that the cluster holds or runs now.

    Attributes:
        job: as squeue shows it; None without a scheduler.
        reason: why it waits, in the scheduler's words.
    """

    state: Literal["pending", "running"]
    job: str | None = None
    host: str | None = None
    reason: str | None = None


class Cluster(ABC):
    """An option of conf/cluster."""

    @abstractmethod
    def check(self) -> None:
        """Raises `ValueError` if trials cannot be handed over from this machine."""

    @abstractmethod
    def submit(self, manifest: Manifest, trials: Sequence[Trial], snapshot: int) -> None:
        """Hands the trials over and returns at once; called inside `manifest.locked()`.

        Each submission is written to the manifest before its trials are handed over, and again with their jobs.

        Raises:
            ValueError: the cluster refuses them; what was handed over before stays.
        """

    @abstractmethod
    def live(self, manifest: Manifest) -> Mapping[str, Live] | None:
        """Trial id -> what the cluster holds or runs now; None if it cannot be asked from here."""

    def ended(self, manifest: Manifest) -> Mapping[str, str]:
        """Trial id -> the scheduler's word on a job that has ended, such as `OUT_OF_MEMORY`, while it remembers it."""
        return {}

    @abstractmethod
    def cancel(self, manifest: Manifest, trials: Sequence[Trial]) -> None:
        """Stops these trials, those that wait and those that run; they are marked as cancelled already."""

    @abstractmethod
    def scripts(self, manifest: Manifest, trials: Sequence[Trial]) -> list[str]:
        """The exact scripts or commands that `submit` would hand over, for `--dry-run`."""
