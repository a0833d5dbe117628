"""What the child process of a chat template runs: Jinja, with what transformers gives a template.

Source of names and settings: transformers' `apply_chat_template`, whose templates these are.
"""

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moec.spec.bounded.limits import RENDERED
from moec.spec.errors import refuse

_AGAIN = "download the chat template again"


class _RefusalError(TemplateError):
    """What a template raises with `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}`, which marks text of the model for training: here its content alone."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to say it

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_content")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        text: str = caller()
        return text


def _raise(message: object) -> NoReturn:
    raise _RefusalError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _json(value: object, ensure_ascii: bool = False, **settings: Any) -> str:
    """JSON as it is: Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def render(
    _: bytes,
    template: str,
    messages: list[dict[str, Any]],
    tokens: dict[str, str],
    tools: list[dict[str, Any]] | None,
) -> tuple[Any, bytes]:
    """What `template.fill` runs in the child process: the text, as bytes."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
    }
    given = {**tokens, "messages": messages, "tools": tools, "documents": None}
    try:
        found = environment.from_string(template).render(given, add_generation_prompt=True)
        text = found.encode()
    except MemoryError:
        raise
    except _RefusalError as error:
        refuse(
            "--chat",
            f"the chat template refuses these messages: {error}",
            "messages that the template takes",
            "change the messages",
        )
    except Exception as error:  # a template can do all that raises: 1 / 0, [][0], 'a' + 1, ...
        refuse("--chat", f"a broken chat template: {error}", "a Jinja template", _AGAIN)
    if len(text) > RENDERED:
        found = f"a chat template that makes {len(text):,} bytes"
        refuse("--chat", found, f"at most {RENDERED:,} bytes", _AGAIN)
    return None, text
