"""One rank that `moec.runtime.ranks.start` has started: it runs the calls that its parent sends.

All ranks get the same calls and run them in the same order. Messages are pickles between processes
of one program. A call is (numbers, folder, object, name, arguments, named arguments): the method
`name` of an object that the ranks hold, or a function of `FUNCTIONS`. Sessions, caches and
conversations stay in the ranks, and the parent has a `Held` for each; they are numbered in the same
way in all ranks. The numbers are of those that the ranks forget first, because the parent has let
them go. The folder is the parent's current one, in which ranks look for files too.

A reply is (kind, value): "done" with what the call gave and the state of its caches; "refused" with
a `MoecError`; "lost" with one after which ranks may be out of step; or "failed" with the text of
another error. Rank 0 also sends "part" for what a call gives piece by piece, and "note" for a
warning. Every rank sends "alive" each second, with the number of calls of its engine so far.
"""

import os
import pickle
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from moec.artefact.targets import imported
from moec.runtime.cache import Cache
from moec.runtime.conversation import Conversation
from moec.runtime.ranks import group
from moec.runtime.session import Session
from moec.spec.errors import MoecError, understood

#: seconds between two signs of life
BEAT = 1.0
#: functions that the parent calls by name, and where they are; sessions may not import proofs
FUNCTIONS = {
    "open_session": "moec.runtime.open:open_session",
    "validate": "moec.runtime.proof.validate:validate",
}
_KEPT = (Session, Cache, Conversation)


@dataclass(frozen=True, slots=True)
class Held:
    """Stands for an object that the ranks hold."""

    number: int


@dataclass(frozen=True, slots=True)
class Part:
    """Stands for a function that sends its arguments to the parent."""


class Channel:
    """What a rank sends to its parent, from the thread of calls and that of signs of life."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.lock = connection, threading.Lock()

    def send(self, kind: str, value: object = None) -> None:
        """Send a message; without a parent the process ends, whatever its GPU waits for."""
        data = pickle.dumps((kind, value))
        try:
            with self.lock:
                self.connection.send_bytes(data)
        except OSError:
            os._exit(1)


def main(number: int) -> None:
    """Answer the calls that come on file descriptor `number`, until the parent closes it."""
    os.set_inheritable(number, False)
    connection = Connection(number)
    channel, first = Channel(connection), group.started_as().index == 0
    threading.Thread(target=_beat, args=(channel,), daemon=True).start()
    warnings.showwarning = lambda text, *_, **__: channel.send("note", str(text)) if first else None
    held: dict[int, Any] = {}
    while True:
        try:
            dropped, folder, *call = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        for each in dropped:
            held.pop(each, None)
        if folder is not None:  # the program may have changed its own
            with suppress(OSError):
                os.chdir(folder)
        channel.send(*_answer(call, held, channel, first))


def _answer(
    call: list[Any], held: dict[int, Any], channel: Channel, first: bool
) -> tuple[str, object]:
    """Run a call; return the reply. Nothing of the call outlives it here but what is `held`."""
    owner, name, given, named = call
    caches = [each.number for each in (*given, *named.values()) if isinstance(each, Held)]
    try:
        arguments = [_own(each, held, channel, first) for each in given]
        by_name = {key: _own(each, held, channel, first) for key, each in named.items()}
        found = imported(FUNCTIONS[name]) if owner is None else getattr(held[owner], name)
        value = found(*arguments, **by_name) if callable(found) else found
        result = _kept(value, held)
        states = {each: _state(held[each]) for each in caches}
        return "done", (result, states) if first else None
    except group.LostError as error:
        return "lost", MoecError(
            error.where, error.found, error.expected, error.next_step, error.exit_code
        )
    except MoecError as error:
        return "refused", error
    except BaseException as error:
        traceback.print_exc()
        clear = understood(error, name)
        said = next(iter(str(error).strip().splitlines()), "")
        return ("lost", clear) if clear else ("failed", f"{type(error).__name__}: {said}")


def _beat(channel: Channel) -> None:
    while True:
        channel.send("alive", group.calls)
        time.sleep(BEAT)


def _own(value: Any, held: dict[int, Any], channel: Channel, first: bool) -> Any:
    """An argument as this rank uses it."""
    if isinstance(value, Held):
        return held[value.number]
    if isinstance(value, Part):
        return lambda *part: channel.send("part", part) if first else None
    return value


def _kept(value: Any, held: dict[int, Any]) -> Any:
    """A result as the parent gets it: tensors on the host, and a `Held` for what stays here."""
    if isinstance(value, tuple):
        return tuple(_kept(each, held) for each in value)
    if isinstance(value, Tensor):
        return value.cpu()
    if not isinstance(value, _KEPT):
        return value
    number = max(held, default=-1) + 1
    held[number] = value
    return Held(number), _state(value)


def _state(value: Any) -> dict[str, Any]:
    """What the parent knows of an object that the ranks hold."""
    if isinstance(value, Cache):
        return {"lengths": value.lengths, "capacity": value.capacity, "most": value.most}
    if isinstance(value, Session):
        shown = ("spec", "precision", "engine", "limits", "device")
        return {name: getattr(value, name) for name in shown}
    return {}


if __name__ == "__main__":
    from moec.runtime.ranks.rank import main as run  # pickle finds classes by this module's name

    run(int(sys.argv[1]))
