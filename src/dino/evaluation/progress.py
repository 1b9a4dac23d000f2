"""Lines about what takes long, in which nothing else is seen: features of a large dataset, probes on them."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dino.messages import clock_time

log = logging.getLogger("dino")

EVERY_S = 30.0

Item = TypeVar("Item")


def telling_progress(
    items: Iterable[Item], total: int, what: str, count: Callable[[Item], int] = lambda _: 1
) -> Iterator[Item]:
    """The items, and every 30 s a line in the log: `evaluating  9,600 of 50,000 images, left 00:02:06`.

    Args:
        total: of what `count` counts.
        what: is counted, in the plural.
        count: of one item.
    """
    started = told = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += count(item)
        now = time.monotonic()
        if now - told >= EVERY_S and done < total:
            told = now
            left = (now - started) / done * (total - done)
            log.info("evaluating  %s of %s %s, left %s", f"{done:,}", f"{total:,}", what, clock_time(left))
