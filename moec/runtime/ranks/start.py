"""Start the ranks that share a model, send them calls, and end them all when one fails.

The program that calls moec is no rank: it survives what ends a rank. Each rank is a process of its
own, `moec.runtime.ranks.rank`. A rank that dies, raises, or shows no sign of life ends all of them,
at once and by their process ids, since a GPU may wait for a peer that no longer comes.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

from moec.runtime.ranks.group import LOCAL, RANK, STORE, WORLD
from moec.runtime.ranks.sockets import SOCKETS, pairs
from moec.spec.errors import MoecError, refuse

_ROOT = Path(__file__).parents[3]
_COMMAND = (sys.executable, "-P", "-m", f"{__package__}.rank")
#: the variable that says on which network NCCL meets
_NETWORK = "NCCL_SOCKET_IFNAME"
#: seconds without a sign of life after which a rank counts as hung, and for the first sign, which
#: waits for imports
SILENCE, STARTUP = 20.0, 300.0
#: seconds in which no rank finishes a call of its engine, or gives anything, before a call has hung
PATIENCE = 3600.0
#: seconds to wait for a process that was killed
KILLED = 10.0
#: seconds to wait for a better reason once a rank has failed
GRACE = 2.0


class Ranks:
    """Processes that share a model. One thread at a time may call them.

    Raises:
        MoecError: fewer than two ranks.
    """

    def __init__(self, count: int) -> None:
        if count < 2:
            refuse("ranks", count, "2 or more", "leave gpus out to use one GPU")
        self.count = count
        self._folder = tempfile.TemporaryDirectory(prefix="moec-ranks-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._dropped: list[int] = []
        self._busy = False
        self._heard: set[int] = set()
        self._end = weakref.finalize(self, _kill, self._processes, self._pipes, self._folder)
        folder, cores = Path(self._folder.name), os.cpu_count() or 1
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        shared = {
            WORLD: str(count),
            STORE: str(folder / "store"),
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
        }
        if Path("/sys/class/net/lo").exists():  # one host: nothing listens on its network
            shared[_NETWORK] = os.environ.get(_NETWORK, "lo")
        try:
            with pairs(count) as ends:
                for index in range(count):
                    self._start(index, folder, shared, ends[index])
        except BaseException:
            self.close()
            raise

    def _start(self, index: int, folder: Path, shared: dict[str, str], ends: list[int]) -> None:
        own = {RANK: str(index), LOCAL: str(index), SOCKETS: ",".join(map(str, ends))}
        ours, theirs = Pipe()
        self._pipes.append(ours)
        with theirs, (folder / f"{index}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    (*_COMMAND, str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C goes to this process, which ends them
                    pass_fds=(theirs.fileno(), *ends),
                    env=os.environ | shared | own,
                )
            )

    def close(self) -> None:
        """End all ranks; nothing of them stays on the GPUs."""
        self._end()

    @property
    def alive(self) -> bool:
        """Whether the ranks still run."""
        return bool(self._end.alive)

    def call(
        self,
        owner: int | None,
        name: str,
        *given: Any,
        part: Callable[..., None] | None = None,
        **named: Any,
    ) -> tuple[Any, dict[int, dict[str, Any]]]:
        """Run a call in all ranks; return what rank 0 gives, and the states of caches.

        `owner` and `name` are as in `moec.runtime.ranks.rank`. `part` is called with each piece
        that comes before the end.

        Raises:
            MoecError: all ranks refused the call, and are as before; or a rank failed, and all have
                ended (exit code 3).
        """
        if not self.alive:
            refuse("ranks", "processes that have ended", "ranks that run", "open the session again")
        if self._busy:
            refuse(
                f"{name} on {self.count} ranks",
                "a call within a call, such as from a stream",
                "one call at a time",
                "make it when the first one has returned",
            )
        dropped, self._dropped = self._dropped, []
        try:
            message = pickle.dumps((dropped, _here(), owner, name, given, named))
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            self._dropped += dropped
            expected = "numbers, text, lists, arrays, tensors: what other processes can get"
            refuse(name, f"{error}"[:200], expected, "convert the argument")
        self._busy = True
        try:
            for index, pipe in enumerate(self._pipes):
                try:
                    pipe.send_bytes(message)
                except OSError:
                    self._died(index)
            return self._answers(part)
        except _RefusedError as refusal:  # by all ranks, which wait for the next call
            raise refusal.error from None
        except BaseException:  # Ctrl-C, or an error in `part`: the ranks are within a call
            self.close()
            raise
        finally:
            self._busy = False

    def drop(self, number: int) -> None:
        """Let the ranks forget an object that they hold, before the next call.

        The garbage collector may call this at any moment, also while a call is sent. The ranks
        number what they hold, so that all of them must forget it between the same calls.
        """
        self._dropped.append(number)

    def _answers(self, part: Callable[..., None] | None) -> tuple[Any, dict[int, dict[str, Any]]]:
        now = time.monotonic()
        seen, moved = dict.fromkeys(self._pipes, now), now
        done: dict[int, Any] = {}
        refused: dict[int, MoecError] = {}
        failed: dict[int, str] = {}
        lost: set[int] = set()
        steps: dict[int, int] = {}
        since: float | None = None
        while len(done) + len(refused) + len(failed) < self.count:
            for pipe in wait(self._pipes, 0.5):
                assert isinstance(pipe, Connection)
                index = self._pipes.index(pipe)
                seen[pipe] = time.monotonic()
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    self._died(index)
                self._heard.add(index)
                if kind == "alive" and steps.get(index) == value:
                    continue
                moved = seen[pipe]
                if kind == "alive":
                    steps[index] = value
                if kind == "part" and part:
                    part(*value)
                elif kind == "note":
                    warnings.warn(value, stacklevel=4)
                elif kind == "done":
                    done[index] = value
                elif kind in ("refused", "lost"):
                    refused[index] = value
                    lost |= {index} if kind == "lost" else set()
                elif kind == "failed":
                    failed[index] = value
            now = time.monotonic()
            if (refused or failed) and since is None:
                since = now
            if since is not None and now - since > GRACE:
                break
            for index, pipe in enumerate(self._pipes):
                # what came during a slow `part` has not been read yet
                limit = SILENCE if index in self._heard else STARTUP
                silent = now - seen[pipe] > limit and not pipe.poll()
                if silent and index not in {*done, *refused, *failed}:
                    self._fail(index, f"no sign of life for {limit:.0f} s")
            if now - moved > PATIENCE:
                self._fail(
                    min(set(range(self.count)) - set(done)), f"no answer in {PATIENCE:.0f} s"
                )
        if refused:
            index = min(refused)
            error = refused[index]
            if len(refused) < self.count:  # the others may wait for those that refused
                self.close()
                where = f"rank {index} of {self.count}: {error.where}"
                parts = error.found, error.expected, error.next_step
                refuse(where, *parts, exit_code=error.exit_code)
            if lost:
                self.close()
                raise error
            raise _RefusedError(error)
        if failed:
            index, said = next(iter(failed.items()))
            self._fail(index, said)
        result: tuple[Any, dict[int, dict[str, Any]]] = done[0]
        return result

    def _died(self, index: int) -> NoReturn:
        process = self._processes[index]
        try:
            code = process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            code = 0
        found = f"its process ended with code {code}"
        if code < 0:
            found = f"its process was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                found += ", as the system does when memory is full"
        self._fail(index, found)

    def _fail(self, index: int, found: str) -> NoReturn:
        """End all ranks, and say what happened to one."""
        log = Path(self._folder.name) / f"{index}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        if lines and lines[-1] not in found:
            found = f"{found}; it wrote last: {lines[-1]}"
        self.close()
        refuse(
            f"rank {index} of {self.count}",
            found,
            "a rank that answers",
            "run it again; moec plan --gpus prints the memory that each rank needs",
            exit_code=3,
        )


class _RefusedError(Exception):
    """All ranks refused a call, and are as they were before."""

    def __init__(self, error: MoecError) -> None:
        super().__init__(error)
        self.error = error


def _here() -> str | None:
    """The current folder, in which ranks look for files too; None if it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _kill(
    processes: list["subprocess.Popen[bytes]"],
    pipes: list[Connection],
    folder: "tempfile.TemporaryDirectory[str]",
) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for long
            process.wait(timeout=KILLED)
    for pipe in pipes:
        pipe.close()
    folder.cleanup()
