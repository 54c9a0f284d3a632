"""Reads an exported checkpoint back, dequantised: as the training model, or under transformers' names."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.model import DemoModel
from moesaic.launch.demo.quantization import dequantize


def dequantized_tensors(folder: Path) -> dict[str, Tensor]:
    """Name on disk -> float32 weight, scales applied."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        stored |= load_file(folder / file)
    scales = {name.removesuffix("_scale_inv"): t for name, t in stored.items() if name.endswith("_scale_inv")}
    return {
        name: dequantize(tensor, scales[name]) if name in scales else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def stack_experts(tensors: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Replaces `experts.N.*` by stacked `experts.gate_up_proj` and `experts.down_proj`."""
    result = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for prefix in sorted({n.partition(".mlp.experts.")[0] for n in tensors if ".mlp.experts." in n}):
        experts = [f"{prefix}.mlp.experts.{i}" for i in range(num_experts)]
        result[f"{prefix}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat((tensors[f"{e}.gate_proj.weight"], tensors[f"{e}.up_proj.weight"])) for e in experts]
        )
        result[f"{prefix}.mlp.experts.down_proj"] = torch.stack([tensors[f"{e}.down_proj.weight"] for e in experts])
    return result


def load_config(folder: Path) -> DemoConfig:
    """The shapes in config.json."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return DemoConfig(**{name: content[name] for name in DemoConfig.__dataclass_fields__})


def load_model(folder: Path, compute_dtype: torch.dtype = torch.bfloat16) -> DemoModel:
    """The checkpoint as the training model, MTP layer included, with dequantised weights."""
    config = load_config(folder)
    model = DemoModel(config, compute_dtype)
    tensors = stack_experts(dequantized_tensors(folder), config.n_routed_experts)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    return model.eval()


def hf_state_dict(folder: Path) -> dict[str, Tensor]:
    """The main model's weights as transformers' `DeepseekV3ForCausalLM` names them (it has no MTP layer)."""
    config = load_config(folder)
    tensors = stack_experts(dequantized_tensors(folder), config.n_routed_experts)
    mtp = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers, config.num_layers))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(mtp)}
    return {**kept, "lm_head.weight": kept["model.embed_tokens.weight"]}
