"""A session whose model is shared by ranks: each method runs in all of them.

It has the methods of `moec.runtime.session.Session`. Caches and conversations stay in the ranks.
"""

import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.runtime.cache import Cache
from moec.runtime.conversation import Conversation
from moec.runtime.inputs.arrays import Ids, Pixels
from moec.runtime.ranks.rank import Held, Part
from moec.runtime.ranks.start import Ranks
from moec.runtime.session import Session
from moec.spec.errors import refuse


@dataclass(slots=True, weakref_slot=True)
class SharedCache(Cache):
    """A cache in the ranks; it has no tensors here."""

    held: Held = field(default_factory=lambda: Held(-1))
    ranks: Ranks | None = None


class SharedSession(Session):
    """A session on the GPUs of one host. `close` ends the ranks; so does the end of the program."""

    __slots__ = ("held", "ranks")
    ranks: Ranks
    held: Held

    @classmethod
    def open(cls, count: int, path: Path, artefact: Artefact, **named: Any) -> "SharedSession":
        """Start `count` ranks, and open a session on `path` in each, as `open_session` does.

        Raises:
            MoecError: as `open_session`; or a rank failed (exit code 3).
        """
        ranks = Ranks(count)
        try:
            (held, state), _ = ranks.call(None, "open_session", path, **named)
        except BaseException:
            ranks.close()
            raise
        session = cls(run=_run_there, artefact=artefact, **state)
        object.__setattr__(session, "ranks", ranks)
        object.__setattr__(session, "held", held)
        return session

    def close(self) -> None:
        """End the ranks."""
        self.ranks.close()

    def logits(self, input_ids: Any, pixel_values: Any = None, *, lengths: Any = None) -> Any:
        """As `Session.logits`."""
        return self._call("logits", input_ids, pixel_values, lengths=lengths)

    def trace(
        self, ids: Tensor, lengths: Tensor, names: Sequence[str], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `Session.trace`."""
        found: dict[str, Tensor] = self._call("trace", ids, lengths, names, features)
        return found

    def new_cache(self, batch: int, capacity: int, prompt: int | None = None) -> Cache:
        """As `Session.new_cache`; the cache is in the ranks."""
        return self._cache(self._call("new_cache", batch, capacity, prompt))

    def prefill(
        self,
        input_ids: Ids,
        pixel_values: Pixels | None = None,
        *,
        lengths: Ids | None = None,
        capacity: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """As `Session.prefill`; the cache is in the ranks."""
        logits, made = self._call(
            "prefill", input_ids, pixel_values, lengths=lengths, capacity=capacity
        )
        return logits, self._cache(made)

    def image_features(self, pixel_values: Pixels) -> Tensor:
        """As `Session.image_features`."""
        found: Tensor = self._call("image_features", pixel_values)
        return found

    def decode(self, tokens: Ids, cache: Cache) -> Tensor:
        """As `Session.decode`; the logits come to the host."""
        found: Tensor = self._call("decode", tokens, cache)
        return found

    def likeliest(self, tokens: Ids, cache: Cache) -> Tensor:
        """As `Session.likeliest`; the tokens come to the host."""
        found: Tensor = self._call("likeliest", tokens, cache)
        return found

    def extend(
        self, ids: Tensor, lengths: Tensor, cache: Cache, features: Tensor | None = None
    ) -> Tensor:
        """As `Session.extend`."""
        found: Tensor = self._call("extend", ids, lengths, cache, features)
        return found

    def generate(self, input_ids: Any, *given: Any, **named: Any) -> Any:
        """As `Session.generate`; all steps run in the ranks."""
        stream = _called(named.pop("stream", None))
        return self._call("generate", input_ids, *given, part=stream, **_seeded(named))

    def conversation(
        self, *, system: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Conversation:
        """As `Session.conversation`; it stays in the ranks."""
        held, _ = self._call("conversation", system=system, tools=tools)
        found: Any = SharedConversation(self, held)
        return found  # type: ignore[no-any-return]

    def _call(
        self, name: str, *given: Any, part: Callable[..., None] | None = None, **named: Any
    ) -> Any:
        return self._of(self.held, name, *given, part=part, **named)

    def _of(
        self,
        owner: Held,
        method: str,
        *given: Any,
        part: Callable[..., None] | None = None,
        **named: Any,
    ) -> Any:
        for each in given:
            if isinstance(each, Cache) and getattr(each, "ranks", None) is not self.ranks:
                other = "a cache of another session"
                refuse("cache", other, "a cache of this session", "Session.prefill makes one")
        kind = Session if owner == self.held else Conversation
        found = getattr(kind, method)
        if callable(found):  # a wrong argument is the caller's error, and no rank hears of it
            signature(found).bind(None, *given, **named)
        caches = [each for each in given if isinstance(each, SharedCache)]
        sent = [each.held if isinstance(each, SharedCache) else each for each in given]
        if part:
            named["stream"] = Part()
        value, states = self.ranks.call(owner.number, method, *sent, part=part, **named)
        for each in caches:
            for name, now in states[each.held.number].items():
                setattr(each, name, now)
        return value

    def _cache(self, made: tuple[Held, dict[str, Any]]) -> SharedCache:
        held, state = made
        cache = SharedCache(tensors={}, held=held, ranks=self.ranks, **state)
        weakref.finalize(cache, self.ranks.drop, held.number)
        return cache


class SharedConversation:
    """A conversation in the ranks, with the methods of `Conversation`."""

    def __init__(self, session: SharedSession, held: Held) -> None:
        self._session, self._held = session, held
        weakref.finalize(self, session.ranks.drop, held.number)

    @property
    def messages(self) -> list[dict[str, object]]:
        """As `Conversation.messages`."""
        found: list[dict[str, object]] = self._session._of(self._held, "messages")
        return found

    def say(self, *given: Any, **named: Any) -> Any:
        """As `Conversation.say`."""
        stream = _called(named.pop("stream", None))
        return self._session._of(self._held, "say", *given, part=stream, **_seeded(named))


def _called(stream: Any) -> Any:
    """`stream`, if it can be called; an error in the middle of a call would end the ranks."""
    if stream is not None and not callable(stream):
        refuse("stream", repr(stream)[:200], "a function, or None", "correct the call")
    return stream


def _seeded(named: dict[str, Any]) -> dict[str, Any]:
    """Arguments with a seed, so that all ranks draw the same."""
    return named | {"seed": secrets.randbits(62) if named.get("seed") is None else named["seed"]}


def _run_there(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    refuse(
        "session on several GPUs",
        "one call of the graph",
        "a method of the session, which runs in all ranks",
        "use prefill, decode or generate",
    )
