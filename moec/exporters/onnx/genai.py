"""Write the folder that onnxruntime-genai opens: its configuration and tokenizer files."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from moec.artefact.manifest import Manifest
from moec.exporters.builder import Companion
from moec.spec import names
from moec.spec.model import ModelSpec

#: the folder in an artefact; its graph; its configuration
FOLDER, PART, CONFIG = "genai", "genai/model", "genai_config.json"
#: the session option that names the folder of weights, relative to the graph's folder
WEIGHTS = "session.model_external_initializers_file_folder_path"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: the positions for which genai allocates its buffers, unless its caller asks for fewer
CONTEXT = 131_072


def write_genai(folder: Path, final: Path, manifest: Manifest, companion: Companion) -> None:
    """Write genai's configuration and copies of the tokenizer files to `folder`.

    The build later renames `folder` to `final`. If the weights lie in `final`, its graph names them
    and no option does: with the option, ONNX Runtime refuses weights that are links to another
    folder, as in a download cache. genai appends the option's path to its own folder, so that the
    path must be relative.
    """
    entries, weights = dict(manifest.presets["lean"].entries), manifest.weights
    if weights.data_folder(PART) != FOLDER:
        root = Path(weights.folder or final.parent)
        entries[WEIGHTS] = os.path.relpath(root.resolve(), final.resolve())
    config = genai_config(manifest.spec, manifest.compute, entries)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(spelled(config))
    for name in _TOKENIZER:
        source = companion(name)
        if source:
            shutil.copyfile(source, folder / name)


def spelled(config: dict[str, Any]) -> bytes:
    """`config` as genai's parser takes it: in UTF-8, with control characters as they are.

    The parser refuses every escape by number. JSON wants them only for control characters.
    """
    text = json.dumps(config, indent=2, ensure_ascii=False)
    escape = re.compile(r"\\(?:u(....)|.)")
    return escape.sub(lambda each: chr(int(each[1], 16)) if each[1] else each[0], text).encode()


def genai_config(spec: ModelSpec, precision: str, entries: dict[str, str]) -> dict[str, Any]:
    """The contents of `genai_config.json`.

    The type is "decoder" with shared buffers, because genai's own types name other models.
    `entries` are session options of ONNX Runtime.
    """
    text, tokens, sampling = spec.text, spec.tokens, spec.sampling
    pad, penalty = tokens.padding, spec.repetition_penalty
    return {
        "model": {
            "type": "decoder",
            "context_length": min(text.max_positions, CONTEXT),
            "vocab_size": text.vocab,
            "bos_token_id": tokens.bos if tokens.bos is not None else pad,
            "eos_token_id": list(tokens.eos) or [pad],
            "pad_token_id": pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {
                    "provider_options": [{"cuda": {}}] if precision == "bf16" else [],
                    "log_severity_level": 3,
                    **entries,
                },
                "hidden_size": text.dim,
                "head_size": text.head_dim,
                "num_attention_heads": text.heads,
                "num_key_value_heads": text.kv_heads,
                "num_hidden_layers": text.layers,
                "inputs": {
                    "input_ids": names.INPUT_IDS,
                    "attention_mask": names.ATTENTION_MASK,
                    "past_key_names": names.past("%d", "key"),
                    "past_value_names": names.past("%d", "value"),
                },
                "outputs": {
                    "logits": names.LOGITS,
                    "present_key_names": names.present("%d", "key"),
                    "present_value_names": names.present("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": sampling is not None,
            # genai has no min_p, and refuses fields that it does not know
            **(sampling.model_dump(exclude_none=True, exclude={"min_p"}) if sampling else {}),
            **({} if spec.repetition_penalty == 1 else {"repetition_penalty": penalty}),
            "max_length": min(text.max_positions, CONTEXT),
            "past_present_share_buffer": True,
        },
    }
