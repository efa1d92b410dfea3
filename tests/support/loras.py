"""LoRA files with random weights, made by peft and written by the pipeline's own ``save_lora_weights``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

RANK, ALPHA = 2, 4  # a file of scale 1 adds ALPHA / RANK times up @ down
OF_TRANSFORMER, OF_TEXT_ENCODER = ["to_q", "to_v"], ["q_proj", "fc1"]


def save_lora(
    pipe: Any, folder: Path, *components: str, seed: int = 0, name: str | None = None, targets: Sequence[str] = ()
) -> Path:
    """The file, of layers in each of the components; by default in the transformer. The pipeline stays as it is.

    Args:
        targets: How the layers' names end, in place of those above.
    """
    layers, told = {}, {}
    for component in components or ("transformer",):
        adapted = copy.deepcopy(getattr(pipe, component))
        usual = OF_TRANSFORMER if component == "transformer" else OF_TEXT_ENCODER
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets or usual), init_lora_weights=False)
        torch.manual_seed(seed)
        adapted.add_adapter(config, adapter_name="default")
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(adapted, adapter_name="default")
        told[f"{component}_lora_adapter_metadata"] = config.to_dict()
    kind = type(pipe)
    kind.save_lora_weights(folder, **layers, **told, weight_name=name)
    return folder / (name or "pytorch_lora_weights.safetensors")
