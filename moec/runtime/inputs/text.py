"""Convert between text and tokens with the checkpoint's tokenizer and chat template."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from moec.artefact.artefact import Artefact
from moec.spec.errors import refuse
from moec.spec.fields import read_json

#: finds the path of a file by its name; None if there is no such file
Find = Callable[[str], Path | None]


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
        return list(self.tokenizer.encode(prompt).ids)

    def has(self, token: str) -> bool:
        """Whether `token` is in the vocabulary."""
        return self.tokenizer.token_to_id(token) is not None

    def render(self, message: str) -> str:
        """Put one message of the user into the chat template; return the text.

        Raises:
            MoecError: there is no chat template, it is broken, or jinja2 is missing (exit code 3).
        """
        if self.template is None:
            refuse(
                "--chat",
                "no chat template in the checkpoint",
                "chat_template.jinja, chat_template.json or a template in tokenizer_config.json",
                "leave --chat out; base models complete text",
            )
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            refuse(
                "--chat",
                "jinja2 is not installed",
                "the package jinja2, which fills chat templates",
                "pip install 'moec[chat]'",
                exit_code=3,
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.template).render(
                messages=[{"role": "user", "content": message}],
                add_generation_prompt=True,
                bos_token="",
            )
        except TemplateError as error:
            refuse(
                "--chat",
                f"a broken chat template: {error}",
                "a Jinja template",
                "download the chat template again",
            )

    def stream(self) -> Iterator[str]:
        """A coroutine that decodes a stream of tokens.

        Send it a token id; it yields the new text that later tokens cannot change.
        """
        decoder = DecodeStream(skip_special_tokens=True)
        text = ""
        while True:
            token = yield text
            text = decoder.step(self.tokenizer, token) or ""


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
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise a bare Exception
        refuse(path, str(error), "a file of the tokenizers library", "download the file again")
    return Text(tokenizer, _template(find), find)


def _beside(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_file() else None


def _template(find: Find) -> str | None:
    path = find("chat_template.jinja")
    if path:
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = find(name)
        template = read_json(path).get("chat_template") if path else None
        if isinstance(template, str):
            return template
    return None
