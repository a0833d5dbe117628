"""Fill a chat template in a child process, with limits of memory and time.

Jinja's sandbox keeps a template from the machine. It does not keep a template from looping or from
building endless text; the process does. `template_process` says what a template finds there.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from moec.spec.bounded.worker import shared
from moec.spec.errors import refuse

_CALL = "moec.runtime.inputs.template_process:render"
_NEXT = "use messages that the template takes, or download the chat template again"


def fill(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Put messages into the chat template `template`, and return the text.

    Args:
        template: the source of a Jinja template.
        messages: dicts with "role" and "content", as JSON has them.
        tokens: the text of special tokens by name, such as "bos_token".
        tools: the tools that the model may call, in the form that the template takes.

    Raises:
        MoecError: the template is broken or refuses the messages, or takes too much memory or time;
            or jinja2 is missing (exit code 3).
    """
    if find_spec("jinja2") is None:
        refuse(
            "--chat",
            "jinja2 is not installed",
            "the package jinja2, which fills chat templates",
            "pip install 'moec[chat]'",
            exit_code=3,
        )
    _, text = shared().ask(
        _CALL,
        {
            "template": template,
            "messages": list(messages),
            "tokens": dict(tokens or {}),
            "tools": None if tools is None else list(tools),
        },
        where="--chat",
        what="fill the chat template",
        next_step=_NEXT,
    )
    return text.decode()
