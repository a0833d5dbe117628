"""Run Hugging Face transformers on an artefact's checkpoint, for comparison in `bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.runtime.bench.torchvision_ops import declare_torchvision_ops
from moec.spec.errors import refuse
from moec.spec.files import read_spec
from moec.spec.hf.forms import for_others
from moec.weights.name_map import read_model
from moec.weights.view import TORCH_DTYPES

#: eager PyTorch, and the same model through torch.compile
ENGINES = ("transformers", "transformers, compiled")


@dataclass(slots=True)
class _Cache:
    """The cache of transformers, and the position of the next token."""

    states: Any
    position: int


@dataclass(frozen=True, slots=True)
class Transformers:
    """A model of transformers.

    `step` is its forward function for one token of each sequence, compiled or not.
    """

    model: Any
    step: Any
    device: str

    @torch.inference_mode()
    def prefill(self, ids: Tensor, *, capacity: int) -> tuple[Tensor, _Cache]:
        """Run ids [B, S]; return the logits of each last token [B, vocab], and the cache."""
        from transformers import StaticCache

        states = StaticCache(config=self.model.config.get_text_config(), max_cache_len=capacity)
        out = self.model(
            ids.to(self.device), past_key_values=states, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1], _Cache(states, ids.shape[1])

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: _Cache) -> Tensor:
        """Run one more token of each sequence, [B]; return its logits [B, vocab]."""
        at = torch.full((len(tokens), 1), cache.position, device=self.device)
        out = self.step(
            tokens[:, None].to(self.device),
            past_key_values=cache.states,
            use_cache=True,
            position_ids=at,
        )
        cache.position += 1
        return out.logits[:, -1]  # type: ignore[no-any-return]


def open_transformers(checkpoint: str | Path, engine: str, dtype: str, device: str) -> Transformers:
    """Open the text model of `checkpoint`, which computes in `dtype`.

    `engine` is one of `ENGINES`.

    Raises:
        MoecError: transformers would read more there than the weights, or is not installed (exit
            code 3).
    """
    folder = for_others(checkpoint)
    read_model(Path(folder))  # refuses an index and links that lead out of the folder, and pipes
    declare_torchvision_ops()
    try:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError as error:
        refuse(
            "transformers",
            error,
            "transformers 5 or newer, for the comparison",
            "pip install transformers",
            exit_code=3,
        )
    images = read_spec(checkpoint).vision is not None
    kind: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model: Any = kind.from_pretrained(
        folder,
        dtype=TORCH_DTYPES[dtype],
        use_safetensors=True,  # other files of weights are pickles
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="sdpa",  # whatever the config names, which may be code of the Hub
        return_dict=True,
    )
    model = model.to(device).eval()
    step = torch.compile(model) if engine == ENGINES[1] else model
    return Transformers(model, step, device)
