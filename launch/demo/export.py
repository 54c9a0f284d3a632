"""Writes the trained model in the released checkpoints' on-disk format.

Attention projections, dense, shared and routed feed-forward matrices and `eh_proj` are block FP8; embeddings, norms
and gates are bfloat16, the correction bias is float32. The head is tied, so neither `lm_head` nor the MTP layer's own
`embed_tokens` and `shared_head.head` are stored.

`python -m moesaic.launch.demo.export` exports the snapshot of a run that may still be going on.
"""

import argparse
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from moesaic.launch.demo import CHECKPOINT_DIR, DEFAULT_WORK_DIR
from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.model import DemoModel
from moesaic.launch.demo.quantization import BLOCK, quantize
from moesaic.launch.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, tokenizer_config

NUM_SHARDS = 2
KEPT_WIDE = ("embed_tokens.weight", "norm.weight", "layernorm.weight", "mlp.gate.weight")


def export(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config, shards, index, tokenizer files and the licence of the text into `folder`. No model card."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    write_shards(dict(on_disk_tensors(model)), folder)
    length = model.config.max_position_embeddings
    ids: dict[str, object] = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    write_json(folder / "config.json", {**model.config.to_hf(), **ids, "quantization_config": quantization})
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    write_json(folder / "tokenizer_config.json", tokenizer_config(length))
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", folder / "LICENSE-PSF.txt")


def write_json(path: Path, content: dict[str, object]) -> None:
    """Indented JSON with a final line end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unstacked(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, weight) of the whole model, routed experts one by one."""
    inner = model.config.moe_intermediate_size
    for name, tensor in model.state_dict().items():
        prefix, _, leaf = f"model.{name}".rpartition(".")
        if not prefix.endswith(".experts"):
            yield f"{prefix}.{leaf}", tensor
            continue
        for index, matrix in enumerate(tensor):
            if leaf == "down_proj":
                yield f"{prefix}.{index}.down_proj.weight", matrix
            else:
                yield f"{prefix}.{index}.gate_proj.weight", matrix[:inner]
                yield f"{prefix}.{index}.up_proj.weight", matrix[inner:]


def on_disk_tensors(model: DemoModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that is stored, in storage order."""
    for name, tensor in unstacked(model):
        if name.endswith("e_score_correction_bias"):
            yield name, tensor.float().clone()
        elif name.endswith(KEPT_WIDE) or name.endswith(("enorm.weight", "hnorm.weight")):
            yield name, tensor.to(torch.bfloat16).contiguous()
        else:
            values, scale_inv = quantize(tensor)
            yield name, values
            yield f"{name}_scale_inv", scale_inv


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Splits by size into NUM_SHARDS safetensors files (a weight and its scale stay together) and writes the index."""
    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shard = min(NUM_SHARDS - 1, written * NUM_SHARDS // total)
        if name.endswith("_scale_inv"):
            shard = next(i for i, s in enumerate(shards) if name.removesuffix("_scale_inv") in s)
        shards[shard][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for index, shard_tensors in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file(shard_tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard_tensors, file)
    index_content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index_content)


def main() -> None:
    """Exports a snapshot."""
    parser = argparse.ArgumentParser(description="Export a snapshot of a demo training run.")
    parser.add_argument("--work-dir", type=Path, default=DEFAULT_WORK_DIR)
    parser.add_argument("--output", type=Path, default=CHECKPOINT_DIR)
    arguments = parser.parse_args()
    model = DemoModel(DemoConfig())
    model.load_state_dict(torch.load(arguments.work_dir / "snapshot.pt", weights_only=True)["model"])
    export(model, Tokenizer.from_file(str(arguments.work_dir / "tokenizer.json")), arguments.output)


if __name__ == "__main__":
    main()
