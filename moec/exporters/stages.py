"""Run a build in timed stages, and without garbage collection."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moec.artefact.placement import Progress


@dataclass(slots=True)
class Stages:
    """Measures the time of each stage of a build, and reports it as progress."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a block as stage `name`."""
        start = time.perf_counter()
        self.progress(name, 0, 1)
        yield
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, 1, 1)


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn the garbage collector off for a block.

    A build makes many objects and drops few. The collector, which visits all of them again and
    again, took a third of a build's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
