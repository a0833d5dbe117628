"""Between text and tokens, by the checkpoint's own tokenizer and chat template."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from moec.exporters.artefact import Artefact
from moec.spec.errors import MoecError
from moec.spec.fields import read_json


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenizer, and the chat template's source where there is one."""

    tokenizer: Tokenizer
    template: str | None

    def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, as the tokenizer's post-processor makes them."""
        return list(self.tokenizer.encode(prompt).ids)

    def chat(self, message: str) -> list[int]:
        """Token ids of one user message in the chat template, ready for the model's answer."""
        return self.encode(self.render(message))

    def render(self, message: str) -> str:
        """One user message in the chat template, as text."""
        if self.template is None:
            raise MoecError(
                "--chat", "no chat template in the checkpoint",
                "chat_template.jinja, chat_template.json or a template in tokenizer_config.json",
                "leave --chat out; base models complete text",
            )  # fmt: skip
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise MoecError(
                "--chat",
                "jinja2 is not installed",
                "jinja2",
                "pip install 'moec[chat]'",
                exit_code=3,
            ) from None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.template).render(
                messages=[{"role": "user", "content": message}],
                add_generation_prompt=True,
                bos_token="",
            )
        except TemplateError as error:
            raise MoecError(
                "--chat", f"a broken chat template: {error}", "a Jinja template", "fetch it again"
            ) from None

    def stream(self) -> Iterator[str]:
        """A coroutine: send it a token id, it yields the text that has become certain."""
        decoder = DecodeStream(skip_special_tokens=True)
        text = ""
        while True:
            token = yield text
            text = decoder.step(self.tokenizer, token) or ""


def open_text(artefact: Artefact) -> Text:
    """The tokenizer of `artefact`, beside its model or in its checkpoint.

    Raises:
        MoecError: there is no tokenizer.json, or it is broken.
    """
    path = artefact.companion("tokenizer.json")
    if path is None:
        raise MoecError(
            artefact.path, "no tokenizer.json", "one beside the model or in the checkpoint",
            "give token ids with --ids 1,2,3",
        )  # fmt: skip
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise MoecError(path, str(error), "a tokenizers file", "fetch it again") from None
    return Text(tokenizer, _template(artefact))


def _template(artefact: Artefact) -> str | None:
    path = artefact.companion("chat_template.jinja")
    if path:
        return Path(path).read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = artefact.companion(name)
        template = read_json(path).get("chat_template") if path else None
        if isinstance(template, str):
            return template
    return None
