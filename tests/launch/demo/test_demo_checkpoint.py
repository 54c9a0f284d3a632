"""The checkpoint in the repository is what its card says, in the released format, and transformers agrees with it."""

import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.demo.corpus import ASSISTANT, USER, Document, read_sources
from moesaic.launch.demo.data import encode
from moesaic.launch.demo.evaluate import greedy, score
from moesaic.launch.demo.measure import SLICE
from moesaic.launch.demo.model import DemoModel
from moesaic.launch.demo.quantization import dequantize, quantize
from moesaic.launch.demo.restore import hf_state_dict, load_model
from moesaic.launch.demo.tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, USER_ID

TRACES = Path(__file__).parents[3] / "benchmarks" / "traces"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(json.loads((CHECKPOINT_DIR / "config.json").read_text()))


@pytest.fixture(scope="module")
def index() -> dict[str, str]:
    return dict(json.loads((CHECKPOINT_DIR / "model.safetensors.index.json").read_text())["weight_map"])


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return dict(json.loads((CHECKPOINT_DIR / "figures.json").read_text()))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> DemoModel:
    return load_model(CHECKPOINT_DIR, torch.float32)


def headers(index: dict[str, str]) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of every stored tensor, from the shard that the index names."""
    for file in sorted(set(index.values())):
        with safe_open(CHECKPOINT_DIR / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert index[name] == file
                view = shard.get_slice(name)
                yield name, view.get_dtype(), view.get_shape()


def test_it_fits_the_repository() -> None:
    assert sum(f.stat().st_size for f in CHECKPOINT_DIR.iterdir()) <= 16 * 2**20
    assert len(list(CHECKPOINT_DIR.glob("*.safetensors"))) >= 2


def test_it_is_stored_as_the_released_checkpoints_are(config: dict[str, Any], index: dict[str, str]) -> None:
    stored = {name: (dtype, shape) for name, dtype, shape in headers(index)}
    assert stored.keys() == index.keys()
    for name, (dtype, shape) in stored.items():
        if f"{name}_scale_inv" in stored:
            assert dtype == "F8_E4M3"
            blocks = [math.ceil(size / 128) for size in shape]
            assert stored[f"{name}_scale_inv"] == ("F32", blocks)
        else:
            wide = name.endswith(("_scale_inv", "e_score_correction_bias"))
            assert dtype == ("F32" if wide else "BF16"), name
    quantized = {name for name in stored if f"{name}_scale_inv" in stored}
    assert "model.layers.0.mlp.down_proj.weight" in quantized
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_it_has_every_layer_under_the_released_names(config: dict[str, Any], index: dict[str, str]) -> None:
    mtp = config["num_hidden_layers"]
    for layer in range(config["first_k_dense_replace"], mtp + 1):
        experts = {n.split(".experts.")[1].split(".")[0] for n in index if f"layers.{layer}.mlp.experts." in n}
        assert experts == {str(i) for i in range(config["n_routed_experts"])}
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "mlp.gate", "self_attn.kv_a_proj_with_mqa"):
        assert f"model.layers.{mtp}.{name}.weight" in index


def test_quantising_keeps_three_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(160, 300) * torch.logspace(-6, 2, 300)
    values, scale_inv = quantize(weight)
    assert values.dtype == torch.float8_e4m3fn and scale_inv.shape == (2, 3)
    block = weight[:128, :128]
    error = (dequantize(values, scale_inv) - weight)[:128, :128].abs()
    assert (error <= torch.maximum(block.abs() * 2**-4, block.abs().max() / 448 * 2**-9)).all()


def test_transformers_agrees_token_for_token(config: dict[str, Any], model: DemoModel, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    hf_config = transformers.DeepseekV3Config(**plain)
    hf_config._attn_implementation = hf_config._experts_implementation = "eager"
    oracle = transformers.DeepseekV3ForCausalLM(hf_config).eval()
    oracle.load_state_dict(hf_state_dict(CHECKPOINT_DIR))
    for prompt in ("import os\n\n\ndef walk(path):\n", f"{USER}What does os.walk do?{ASSISTANT}"):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.inference_mode():
            logits = oracle(ids).logits
            torch.testing.assert_close(model(ids) @ model.head().t(), logits, atol=1e-3, rtol=1e-3)
            theirs = oracle.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=-1)
        assert torch.equal(greedy(model, ids, 16), theirs)


def test_it_scores_as_its_card_says(figures: dict[str, Any], tokenizer: Tokenizer) -> None:
    if platform.python_version() != figures["python"]:
        pytest.skip(f"the card's text is the standard library of Python {figures['python']}")
    text = dict(read_sources())[SLICE]
    bits = score(load_model(CHECKPOINT_DIR), encode(tokenizer, [Document(origin=SLICE, kind="code", text=text)])).bits
    assert bits / len(text.encode()) == pytest.approx(figures["bits_per_byte_slice"], rel=0.01)


def test_its_card_meets_the_targets(figures: dict[str, Any]) -> None:
    fp8, bf16 = figures["bits_per_byte_fp8"]["all"], figures["bits_per_byte_bf16"]["all"]
    assert fp8 <= 1.5 and fp8 <= 1.01 * bf16
    assert fp8 < 0.9 * figures["bits_per_byte_5gram_tokens"]["all"]
    assert figures["mtp"]["greedy"] >= 0.55
    violation = figures["load"]["violation"]
    assert sum(violation) / len(violation) <= 1.0
    assert "PSF licence" in (CHECKPOINT_DIR / "README.md").read_text()


@given(st.text())
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{USER}hello{ASSISTANT}").ids
    assert ids[:2] == [BOS_ID, USER_ID] and ids[-1] == ASSISTANT_ID
    assert tokenizer.token_to_id("<|eos|>") == EOS_ID


@pytest.mark.parametrize("domain", ["code", "prose"])
def test_traces_hold_what_the_recorder_writes(config: dict[str, Any], domain: str) -> None:
    trace = np.load(TRACES / f"{domain}.npz")
    counts = trace["logical_count"]
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    assert counts.dtype == np.int32 and counts.shape[1:] == (layers, config["n_routed_experts"])
    assert (counts.sum(-1) == trace["num_tokens"][:, None] * config["num_experts_per_tok"]).all()
    assert str(trace["domain"]) == domain and len(trace["layer_ids"]) == layers
