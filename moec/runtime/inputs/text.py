"""Convert between text and tokens with the checkpoint's tokenizer and chat template."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from moec.artefact.artefact import Artefact
from moec.artefact.placement import TEMPLATES
from moec.runtime.inputs.chat import Message
from moec.runtime.inputs.template import fill
from moec.runtime.inputs.tokenizer import Tokenizer, load_tokenizer
from moec.spec.bounded.limits import TEMPLATE
from moec.spec.bounded.own import find_own
from moec.spec.bounded.read import read_bytes
from moec.spec.errors import refuse
from moec.spec.fields import read_json
from moec.spec.hf.forms import checkpoint_folder

#: finds the path of a file by its name; None if there is no such file
Find = Callable[[str], Path | None]
#: numbers of the streams of all tokenizers
_STREAMS = count()


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenizer and its chat templates.

    `templates` are the sources of Jinja templates by name; a single one is "default". `special` is
    the text of special tokens by the name that templates use, such as "bos_token". `find` finds
    further files beside the tokenizer.
    """

    tokenizer: Tokenizer
    templates: Mapping[str, str]
    special: Mapping[str, str]
    find: Find

    def encode(self, prompt: str) -> list[int]:
        """The token ids of `prompt`, with those that the tokenizer's post-processor adds."""
        return self.tokenizer.encode(prompt)

    def has(self, token: str) -> bool:
        """Whether `token` is in the vocabulary."""
        return self.tokenizer.token_to_id(token) is not None

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Put messages into the chat template, and return the text.

        With `tools`, a template that is named "tool_use" comes first, as in transformers.

        Raises:
            MoecError: there is no chat template, or it cannot be filled: see `fill`.
        """
        wanted = ("tool_use", "default") if tools else ("default",)
        name = next((each for each in wanted if each in self.templates), None)
        if name is None:
            refuse(
                "--chat",
                f"no chat template {' or '.join(wanted)} in the checkpoint"
                + (f", but {', '.join(self.templates)}" if self.templates else ""),
                "chat_template.jinja, chat_template.json or a template in tokenizer_config.json",
                "leave --chat out; base models complete text",
            )
        return fill(self.templates[name], messages, self.special, tools)

    def stream(self) -> Generator[str, int, None]:
        """A coroutine that decodes a stream of tokens.

        Send it a token id; it yields the new text that later tokens cannot change.
        """
        number, text = next(_STREAMS), ""
        while True:
            token = yield text
            text = self.tokenizer.decode_next(number, token)


def open_text(source: Artefact | Path) -> Text:
    """Open the tokenizer of an artefact or of a checkpoint folder.

    The tokenizer of an artefact is beside its model or in its checkpoint.

    Raises:
        MoecError: there is no tokenizer.json, or it is broken, or further files have added tokens
            that it lacks; or one of the files is a link that leads out of its folder.
    """
    folder = (checkpoint_folder(source) or source) if isinstance(source, Path) else source.path
    find = partial(find_own, folder) if isinstance(source, Path) else source.companion
    path = find("tokenizer.json")
    if path is None:
        refuse(
            folder,
            "no tokenizer.json",
            "a tokenizer.json beside the model or in the checkpoint",
            "copy the checkpoint's there, or generate from token ids: --ids 1,2,3"
            if isinstance(source, Path) or source.manifest.checkpoint is None or source.checkpoint
            else f"if you trust its checkpoint: --weights-from {source.manifest.checkpoint}",
        )
    tokenizer = load_tokenizer(path)
    for name, tokens in _added(find):
        if tokens and (missing := tokenizer.unknown(tokens)) is not None:
            refuse(
                folder / name,
                f"the token {missing[:80]!r}, which tokenizer.json does not have",
                "added tokens that are in tokenizer.json too",
                "write them there: transformers.AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR)",
            )
    return Text(tokenizer, _templates(find), _special(find), find)


def _added(find: Find) -> Iterator[tuple[str, list[str]]]:
    """The added tokens that further files have, by file; transformers adds them to its own."""
    for name in ("tokenizer_config.json", "added_tokens.json"):
        path = find(name)
        found = read_json(path) if path else {}
        if name == "added_tokens.json":
            yield name, list(found)
            continue
        given = found.get("added_tokens_decoder")
        rows = given.values() if isinstance(given, dict) else ()
        tokens = (each.get("content") for each in rows if isinstance(each, dict))
        yield name, [each for each in tokens if isinstance(each, str)]


def _templates(find: Find) -> dict[str, str]:
    alone = {name: path for name, file in TEMPLATES.items() if (path := find(file))}
    if alone:
        return {name: _template(path) for name, path in alone.items()}
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = find(name)
        found = read_json(path).get("chat_template") if path else None
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if _is_named(each)}
            if named:
                return named
    return {}


def _template(path: Path) -> str:
    raw = read_bytes(path, TEMPLATE, "a chat template", "download the file again")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        refuse(path, error, "a chat template in UTF-8", "download the file again")


def _is_named(each: object) -> bool:
    return isinstance(each, dict) and all(
        isinstance(each.get(key), str) for key in ("name", "template")
    )


def _special(find: Find) -> dict[str, str]:
    """The fields NAME_token of the tokenizer's files; a token is its text, or has it as content."""
    found = dict[str, str]()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = find(name)
        for key, token in (read_json(path) if path else {}).items():
            text = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found
