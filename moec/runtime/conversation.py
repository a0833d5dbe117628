"""A conversation: several turns on one cache.

Each turn fills the chat template with all messages, as one call with the whole text would. What the
cache holds already is not computed again. The text decides: where its tokens differ from those that
the cache holds, the cache forgets the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.runtime.cache import Cache, reserve, take_back
from moec.runtime.inputs.chat import MODEL, Message, checked, pictures
from moec.runtime.inputs.image_places import (
    IMAGE,
    Images,
    check_marks,
    cut_images,
    listed,
    place,
)
from moec.runtime.inputs.prompt import filled
from moec.runtime.inputs.text import Text, open_text
from moec.runtime.ranks.group import same_seed
from moec.runtime.sampling import chooser, ends
from moec.runtime.steps import steps
from moec.spec.errors import clear_errors, refuse

if TYPE_CHECKING:
    from moec.runtime.session import Session

Source = Artefact | Path
_REWRITTEN = "the chat template rewrote an earlier turn"
_RESPELLED = "the last reply, as the chat template writes it, has other tokens than the model chose"
_CUT_SHORT = "the last turn did not end"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said in one turn of a conversation.

    Attributes:
        text: the text, without special tokens.
        tokens: the token ids, with the token that ended the turn, if one did.
        prompt_tokens: the tokens of the whole conversation before the reply.
        fed: those of them that this turn computed; the cache held the others.
        anew: why tokens of earlier turns are among them; None if they are not.
        notes: what the user should know about the images of this turn.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    fed: int
    anew: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """A cache, the tokens in it, and how many of those were the last turn's prompt."""

    cache: Cache
    tokens: list[int]
    prompt: int


@dataclass(frozen=True, slots=True)
class _State:
    """All that turns leave behind; it changes as a whole, so that no interruption halves it.

    Attributes:
        messages: all messages, without the data of images.
        replies: the numbers of those that the model wrote here.
        grids: the rows and columns of tiles of each image.
        features: the features of all images, [tokens, dim] for each turn that had some.
        held: the cache; None before the first turn, and after one that did not end.
    """

    messages: tuple[Message, ...] = ()
    replies: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()
    features: tuple[Tensor, ...] = ()
    held: _Held | None = None


class Conversation:
    """Talk to a model in turns; `Session.conversation` starts one.

    A turn that is refused or interrupted leaves the messages as they were before it.
    """

    def __init__(
        self,
        session: "Session",
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        source = session.artefact or session.checkpoint
        if source is None:
            refuse(
                "conversation",
                "a session without a folder",
                "a session on an artefact or a checkpoint, whose tokenizer it needs",
                "open it with moec.open_session",
            )
        self._session, self._source, self._tools = session, source, deepcopy(tools)
        self._words = open_text(source)
        first = [] if system is None else checked([{"role": "system", "content": system}])
        self._state = _State(tuple(first))

    @property
    def messages(self) -> list[dict[str, object]]:
        """All messages so far, replies included, without the data of images."""
        return [dict(each) for each in deepcopy(self._state.messages)]

    @clear_errors
    def say(
        self,
        text: str | Sequence[Message],
        images: Images = (),
        max_new_tokens: int = 64,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[int] | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> Reply:
        """Say something, and return what the model replies.

        The reply has the tokens that `Session.generate` gives for the whole conversation, up to
        ties that rounding decides. The vision tower sees each image once.

        Args:
            text: what the user says, or messages, such as the results of tools.
            images: images of this turn, as in `moec.encode`.
            max_new_tokens: the most tokens of the reply.
            temperature: this and the next five are as in `Session.generate`.
            top_k: see there.
            top_p: see there.
            seed: see there.
            repetition_penalty: see there.
            stop: see there.
            stream: called with each piece of the reply's text as it comes.

        Raises:
            MoecError: as `moec.encode` and `Session.generate`; or the conversation and the reply
                have more tokens than the model is made for. Nothing has been computed then.
        """
        session, spec, state = self._session, self._session.spec, self._state
        asked = (temperature, top_k, top_p, same_seed(seed, self._session.rank), repetition_penalty)
        choose_after = chooser(spec, max_new_tokens, *asked)
        ending = ends(stop, spec.tokens.eos)
        words = self._words = _alive(self._words, self._source)
        images = listed(images)
        said, images = pictures(checked(_spoken(text, len(images))), images)
        messages = (*state.messages, *deepcopy(said))
        whole, ids = filled(words, messages, self._tools, state.replies)
        check_marks(whole, len(state.grids) + len(images))
        cut = cut_images(words, spec, images)
        grids = (*state.grids, *cut.grids)
        row = place(words, spec, whole, ids, grids)
        cache = self._room(len(row), max_new_tokens)
        features = state.features
        if cut.tiles is not None:
            features = (*features, session.image_features(cut.tiles))

        self._state = replace(state, held=None)  # if an error comes, the cache is half done
        start, anew = self._go_on(state, cache, row)
        new = torch.tensor([row[start:]])
        seen = _after(row[:start], spec.tokens.image, features)
        logits = session.extend(new, torch.tensor([new.shape[1]]), cache, seen)
        tokens, pieces, decoder = list[int](), list[str](), words.stream()
        next(decoder)
        for (token,) in steps(session, logits, cache, max_new_tokens, choose_after([row]), ending):
            assert token is not None  # there is one sequence, and its end is the last step
            tokens.append(token)
            pieces.append(decoder.send(token))
            if stream:
                stream(pieces[-1])
        # A GPU may have run the last token; the template may write another end of the turn.
        count = take_back(cache, len(row) + len(tokens) - 1, spec.text)
        reply = {"role": MODEL, "content": "".join(pieces)}
        self._state = _State(
            (*messages, reply),
            (*state.replies, len(messages)),
            grids,
            features,
            _Held(cache, [*row, *tokens][:count], len(row)),
        )
        return Reply(reply["content"], tokens, len(row), len(row) - start, anew, cut.notes)

    def _room(self, prompt: int, most: int) -> Cache:
        """The cache, with room for a prompt and `most` new tokens.

        Raises:
            MoecError: the model is made for fewer tokens, or there is too little memory.
        """
        session, text = self._session, self._session.spec.text
        limit = min(text.max_positions, session.limits.context or text.max_positions)
        capacity, fits = prompt + most - 1, limit - prompt + 1  # the last new token is not run
        if most < 1 or capacity > limit:
            refuse(
                f"max_new_tokens {most:,}",
                f"a conversation of {prompt:,} tokens before the reply",
                f"1 to {fits:,} new tokens, for {limit:,} positions in all"
                if fits > 0
                else f"at most {limit:,} tokens and a reply",
                "ask for fewer new tokens" if fits > 0 else "start another conversation",
            )
        held = self._state.held
        if held is None:
            return session.new_cache(1, capacity, prompt)
        reserve(session.own, held.cache, capacity, prompt, session.limits.layout)
        return held.cache

    def _go_on(self, state: _State, cache: Cache, row: list[int]) -> tuple[int, str | None]:
        """How many tokens of `row` the cache keeps, after it has forgotten the rest, and why."""
        if state.held is None:
            return 0, _CUT_SHORT if state.replies else None
        held = state.held.tokens
        common = sum(takewhile(bool, map(eq, held, row[:-1])))  # one must run, for its logits
        start = take_back(cache, common, self._session.spec.text)
        if start == len(held):
            return start, None
        return start, _REWRITTEN if common < state.held.prompt else _RESPELLED


def _alive(words: Text, source: Source) -> Text:
    """The tokenizer; opened again if an interruption has ended its process."""
    return words if words.tokenizer.worker.alive else open_text(source)


def _spoken(text: str | Sequence[Message], images: int) -> object:
    """`text` as messages: a string is a user's, with parts for its `images`."""
    if not isinstance(text, str):
        return text
    if not images:
        return [{"role": "user", "content": text}]
    first, *rest = (text if IMAGE in text else IMAGE * images + text).split(IMAGE)
    parts = [{"type": "text", "text": first}]
    for each in rest:
        parts += [{"type": "image"}, {"type": "text", "text": each}]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def _after(row: list[int], image: int | None, features: Sequence[Tensor]) -> Tensor | None:
    """The features of the image tokens after those of `row`; None if there are none."""
    if not features or image is None:
        return None
    rest = torch.cat(list(features))[row.count(image) :]
    return rest if len(rest) else None
