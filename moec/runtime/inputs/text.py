"""Convert between text and tokens with the checkpoint's tokenizer and chat template."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from moec.artefact.artefact import Artefact
from moec.runtime.inputs.template import fill
from moec.runtime.inputs.tokenizer import Tokenizer, load_tokenizer
from moec.spec.bounded.limits import TEMPLATE
from moec.spec.bounded.read import read_bytes
from moec.spec.errors import refuse
from moec.spec.fields import read_json

#: finds the path of a file by its name; None if there is no such file
Find = Callable[[str], Path | None]
#: numbers of the streams of all tokenizers
_STREAMS = count()


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenizer and its chat template.

    `template` is the source of the Jinja template, or None. `find` finds further files beside the
    tokenizer.
    """

    tokenizer: Tokenizer
    template: str | None
    find: Find

    def encode(self, prompt: str) -> list[int]:
        """The token ids of `prompt`, with those that the tokenizer's post-processor adds."""
        return self.tokenizer.encode(prompt)

    def has(self, token: str) -> bool:
        """Whether `token` is in the vocabulary."""
        return self.tokenizer.token_to_id(token) is not None

    def render(self, message: str) -> str:
        """Put one message of the user into the chat template; return the text.

        Raises:
            MoecError: there is no chat template, or it cannot be filled: see `fill`.
        """
        if self.template is None:
            refuse(
                "--chat",
                "no chat template in the checkpoint",
                "chat_template.jinja, chat_template.json or a template in tokenizer_config.json",
                "leave --chat out; base models complete text",
            )
        return fill(self.template, message)

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
        MoecError: there is no tokenizer.json, or it is broken.
    """
    folder = source if isinstance(source, Path) else source.path
    find = partial(_beside, folder) if isinstance(source, Path) else source.companion
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
    return Text(load_tokenizer(path), _template(find), find)


def _beside(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_file() else None


def _template(find: Find) -> str | None:
    path = find("chat_template.jinja")
    if path:
        raw = read_bytes(path, TEMPLATE, "a chat template", "download the file again")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            refuse(path, error, "a chat template in UTF-8", "download the file again")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = find(name)
        template = read_json(path).get("chat_template") if path else None
        if isinstance(template, str):
            return template
    return None
