"""Train a layer of multi-token prediction: `python -m tests.trained.train_mtp FOLDER [SECONDS]`.

FOLDER is that of a model of `tests.trained.train` whose config allows for such a layer. The model
stays as it is; the layer is added to its file, on the same text. It takes some minutes on one core.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.trained.train import LENGTH, RATE, ROWS, balance, held_out, tokens  # isort: skip
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

SECONDS = 240.0


def logits_of(model: torch.nn.Module, layer: MtpModel, rows: Tensor) -> Tensor:
    """What the layer predicts after each token of rows [B, S] but the first and the last."""
    with torch.no_grad():
        hidden = model.model(input_ids=rows[:, :-2], use_cache=False).last_hidden_state
    at = torch.arange(1, rows.shape[1] - 1)[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    out = layer.forward_layer(0, hidden, at, cache, input_ids=rows[:, 1:-1])
    return layer.shared_head(out)


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float([*sys.argv, SECONDS][2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.config.num_mtp_layers = 1
    layer = MtpModel(model, 1).train()
    last = model.model.layers[-1].state_dict()
    layer.layers[0].mtp_block.load_state_dict(last)
    layer.layers.requires_grad_(True)
    layer.layers[0].mtp_block.mlp.gate.register_forward_hook(balance)
    own, held = tokens(), held_out()
    optimizer = torch.optim.AdamW(layer.layers.parameters(), lr=RATE, betas=(0.9, 0.95))
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 50) * (1 - done) + 1e-5
        rows = own[torch.randint(len(own) - LENGTH, (ROWS, 1)) + torch.arange(LENGTH + 1)]
        loss = cross_entropy(logits_of(model, layer, rows).flatten(0, 1), rows[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.layers.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(step, f"{done:.2f}", f"{loss.item():.3f}", flush=True)
    layer.eval()
    with torch.inference_mode():
        found = logits_of(model, layer, held).argmax(-1)
        chosen = model(input_ids=held[:, :-1]).logits[:, 1:].argmax(-1)
    right = (found == chosen).float().mean().item()
    _write(folder, layer.layers[0].state_dict(), config)
    print(f"{step} steps; {100 * right:.1f} % of drafts are the model's own choice, held out")


def _write(folder: Path, state: dict[str, Tensor], config: dict[str, object]) -> None:
    """Add the layer to the file of the model, with the keys that DeepSeek publishes."""
    at, found = f"model.layers.{config['num_hidden_layers']}.", dict[str, Tensor]()
    for name, each in state.items():
        name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        block, _, part = name.rpartition(".")
        if block != "mlp.experts":
            found[at + name] = each.bfloat16().contiguous()
            continue
        for expert, whole in enumerate(each.bfloat16()):
            for one, matrix in zip(parts[part], whole.chunk(len(parts[part])), strict=True):
                found[f"{at}{block}.{expert}.{one}.weight"] = matrix.clone()
    file = folder / "model.safetensors"
    save_file(load_file(file) | found, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
