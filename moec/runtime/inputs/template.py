"""Fill a chat template in a child process, with limits of memory and time.

Jinja's sandbox keeps a template from the machine. It does not keep a template from looping or from
building endless text; the process does.
"""

from importlib.util import find_spec
from typing import Any

from moec.spec.bounded.limits import RENDERED
from moec.spec.bounded.worker import shared
from moec.spec.errors import refuse

_AGAIN = "download the chat template again"


def fill(template: str, message: str) -> str:
    """Put one message of the user into the chat template `template`; return the text.

    Raises:
        MoecError: the template is broken, or takes too much memory or time; or jinja2 is missing
            (exit code 3).
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
        f"{__name__}:render",
        {"template": template, "message": message},
        where="--chat",
        what="fill the chat template",
        next_step=_AGAIN,
    )
    return text.decode()


def render(_: bytes, template: str, message: str) -> tuple[Any, bytes]:
    """What `fill` runs in the child process: the text, as bytes."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        found = environment.from_string(template).render(
            messages=[{"role": "user", "content": message}],
            add_generation_prompt=True,
            bos_token="",
        )
        text = found.encode()
    except MemoryError:
        raise
    except Exception as error:  # a template can do all that raises: 1 / 0, [][0], 'a' + 1, ...
        refuse("--chat", f"a broken chat template: {error}", "a Jinja template", _AGAIN)
    if len(text) > RENDERED:
        found = f"a chat template that makes {len(text):,} bytes"
        refuse("--chat", found, f"at most {RENDERED:,} bytes", _AGAIN)
    return None, text
