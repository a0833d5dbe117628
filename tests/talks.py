"""A conversation of five turns with an image in the third, beside one call with the whole text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import moec
from moec.runtime.session import Session
from tests.conftest import ROOT

#: in the form of Llama 4's own: a content is text, or parts
TEMPLATE = (
    "{{- bos_token }}{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|end_of_text|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PHOTO = ROOT / "examples" / "astronaut.jpg"
SYSTEM = "You write Python."
#: with replies of 10 tokens, past two borders of attention chunks
SAID = (
    "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    parser.add_argument('-v')\n"
    "    args = parser.parse_args(argv)\n    print(args)",
    "import os, sys\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n",
    "What is in this picture?\n    for line in self.lines:\n        if not line.strip(): continue",
    "def close(self):\n    self.file.close()\n    return None\n\ndef open(self):\n    return self"
    "\n\ndef read(self, size=-1):\n    return self.file.read(size)",
    "try:\n    import foo\nexcept ImportError:\n    foo = None\n",
)
LENGTH = 10


def with_template(
    checkpoint: Path, folder: Path, template: Any = TEMPLATE, weights: bool = True
) -> Path:
    """A copy of `checkpoint` with a chat template, and perhaps without its weights."""
    left_out = shutil.ignore_patterns("*.safetensors") if not weights else None
    shutil.copytree(checkpoint, folder, ignore=left_out)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return folder


def check_five_turns(session: Session, folder: Path, noise: float = 0.0) -> None:
    """Compare each turn with one call; count what is fed, and the tiles that the tower sees.

    `folder` is what the session runs. `noise` is the relative error of logits that rounding makes
    if a prompt is computed in other pieces: tokens may part where two are as near as that.
    """
    fed, seen = list[int](), list[int]()
    run, tower = session.run, session.vision
    assert tower is not None

    def counted(feeds: Any) -> Any:
        fed.append(feeds["input_ids"].shape[1])
        return run(feeds)

    def shown(feeds: Any) -> Any:
        seen.append(len(feeds["pixel_values"]))
        return tower()(feeds)

    watched = replace(session, run=counted, vision=lambda: shown)
    talk, images, held = watched.conversation(system=SYSTEM), list[Path](), 0
    for turn, text in enumerate(SAID):
        new = [PHOTO] if turn == 2 else []
        images += new
        fed.clear()
        reply = talk.say(text, new, LENGTH, temperature=0, stop=())
        prompt = moec.encode(folder, talk.messages[:-1], images)
        assert reply.prompt_tokens == len(prompt.input_ids) and len(reply.tokens) == LENGTH
        if noise and reply.anew:  # a reply of two pieces of a token, which are one in the text
            assert reply.anew.startswith("the last reply")
        else:
            assert (reply.fed, reply.anew) == (reply.prompt_tokens - held, None)
        assert sum(fed) == reply.fed + LENGTH - 1
        held = reply.prompt_tokens + LENGTH - 1
        whole = session.generate(
            [prompt.input_ids], prompt.pixel_values, LENGTH, temperature=0, stop=()
        )[0, reply.prompt_tokens :].tolist()
        if noise:
            assert_tied(session, prompt, reply.tokens, whole, noise)
        else:
            assert reply.tokens == whole, f"turn {turn}: {reply.text!r}"
    assert held > 2 * 128, "past two borders of attention chunks, so that rings are reused"
    assert seen == [1], "the tower sees the image's one tile once"


def assert_tied(
    session: Session, prompt: moec.Prompt, found: list[int], expected: list[int], noise: float
) -> None:
    """Only a near tie may part `found` from `expected`; until then they are one text."""
    pairs = zip(found, expected, strict=True)
    parted = [at for at, (mine, other) in enumerate(pairs) if mine != other]
    for at in parted[:1]:
        row = [*prompt.input_ids, *expected[:at]]
        scores = np.asarray(session.logits([row], prompt.pixel_values))[0, -1]
        gap = float(scores[expected[at]] - scores[found[at]])
        assert gap < 4 * noise * float(scores.std()), (at, gap)
