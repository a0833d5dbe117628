"""How a build runs: stages that are timed and told to the caller, and no garbage collection."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moec.artefact.placement import Progress


@dataclass(slots=True)
class Stages:
    """Times each stage of a build and tells the caller."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block as stage `name`."""
        start = time.perf_counter()
        self.progress(name, 0, 1)
        yield
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, 1, 1)


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: a build makes many objects and drops few.

    Walking all of them again and again took a third of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
