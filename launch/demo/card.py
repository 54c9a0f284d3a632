"""The model card: README.md beside the weights, and the same figures for programs in figures.json."""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.corpus import Corpus
from moesaic.launch.demo.measure import num_bytes

TEMPLATE = """\
---
license: apache-2.0
library_name: transformers
tags: [deepseek_v3, moe, fp8]
---
# moesaic-demo

A very small DeepSeek-V3 ({total:.1f} M parameters, {active:.1f} M of them used per token) that moesaic serves when no
other model is at hand. It knows one thing: what Python's standard library looks like. It lets a person see a server
answer, and gives real expert routing to balancing and speculative decoding. It is not useful for anything else.

On disk and in arithmetic it is DeepSeek-V3: latent attention, {experts} routed experts in {groups} groups (top {topk}
from {topk_group} groups), a shared expert, a dense first layer, and one multi-token-prediction (MTP) layer, which is
layer {mtp}. Matrices are FP8 (e4m3, one float32 `weight_scale_inv` per 128 x 128 block); embeddings, norms and gates
are bfloat16. The head is tied to the embedding, so `lm_head.weight`, `model.layers.{mtp}.embed_tokens.weight` and
`model.layers.{mtp}.shared_head.head.weight` are not stored. The MTP layer reads the next token's embedding first, then
the main model's hidden state after the final norm: `eh_proj(concat(enorm(embedding), hnorm(hidden)))`.

## Data and licence

The weights are learned from, and can recite, the sources and doc strings of the standard library of CPython {python},
Copyright (c) Python Software Foundation, under the PSF licence: see LICENSE-PSF.txt. {train_bytes:,} bytes in
{documents:,} documents are for training. Every file and help topic whose hash says so is held out in all its forms
({held_bytes:,} bytes); files that only resemble a held-out one (parts of distutils, idlelib, lib2to3, tkinter) stay in training,
for the 5-gram models too. SHA-256 of the corpus: `{sha256}`.

## Training

    {command}

{steps:,} steps of {batch:,} tokens ({epochs:.1f} passes over the text), {minutes:.0f} minutes on {hardware}, shared
with other work, {date}. Matrices by Muon, the rest by AdamW; learning rates constant, then linear to zero over the
last {decay:.0%}. Sequences of {length} tokens, {final_length} in that last part. Experts are balanced by the correction
bias ({bias_rate:g} a step) and the sequence-wise loss ({balance_weight:g}). The MTP loss weighs {mtp_weight:g}, in the
last part {final_mtp_weight:g}. Training loss at the end: {loss:.3f} nats per token, MTP {mtp_loss:.3f}.

## Held-out figures

Bits per UTF-8 byte, ends of documents included, over {held_code:,} bytes of code and {held_prose:,} bytes of prose:

| | all | code | prose |
|---|---|---|---|
{bits_table}

Both 5-gram models are interpolated Kneser-Ney (discount 0.75) and learned from the same text. FP8 costs
{fp8_cost:+.2%} (weights quantised, arithmetic in bfloat16).

MTP, first draft: accepted {accepted:.1%} of the time along the main model's greedy continuations of held-out prompts
({num_greedy:,} drafts); equal to its greedy choice at {forced:.1%} of {num_forced:,} positions of held-out text.

## Expert load

Maximum violation is max over experts of load / mean - 1, on held-out text: {violation:.2f}, averaged over the sparse
layers. Overlap is the share of load that code and prose put on the same experts (1: no skew), ratio the largest
quotient of one expert's shares in the two domains. `benchmarks/traces/` has recordings of both domains.

| layer | violation | on code | on prose | overlap | ratio | code's experts | prose's experts |
|---|---|---|---|---|---|---|---|
{load_table}
"""

BITS_ROWS = {
    "this model, FP8 (as stored)": "bits_per_byte_fp8",
    "this model, bfloat16": "bits_per_byte_bf16",
    "5-gram over the same tokens": "bits_per_byte_5gram_tokens",
    "5-gram over bytes": "bits_per_byte_5gram_bytes",
}


def write_card(
    folder: Path,
    *,
    corpus: Corpus,
    config: DemoConfig,
    sizes: dict[str, float],
    run: dict[str, Any],
    figures: dict[str, Any],
) -> None:
    """Writes README.md and figures.json into `folder`.

    sizes: `total` and `active` in millions of parameters. run: the trainer's settings plus `command`, `minutes`,
    `epochs`, `loss`, `mtp_loss`. figures: from `measure`.
    """
    load, drafts, held_out = figures["load"], figures["mtp"], figures["held_out_bytes"]
    fp8, bf16 = figures["bits_per_byte_fp8"]["all"], figures["bits_per_byte_bf16"]["all"]
    text = TEMPLATE.format(
        **sizes,
        experts=config.n_routed_experts,
        groups=config.n_group,
        topk=config.num_experts_per_tok,
        topk_group=config.topk_group,
        mtp=config.num_hidden_layers,
        python=platform.python_version(),
        train_bytes=num_bytes(corpus.train),
        documents=len(corpus.train),
        held_bytes=num_bytes(corpus.held_out),
        sha256=corpus.sha256,
        hardware=hardware(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        steps=run["steps"],
        batch=run["batch_tokens"],
        decay=run["decay_share"],
        length=run["sequence_length"],
        final_length=run["final_sequence_length"],
        **{key: run[key] for key in ("command", "minutes", "epochs", "loss", "mtp_loss", "bias_rate")},
        **{key: run[key] for key in ("balance_weight", "mtp_weight", "final_mtp_weight")},
        bits_table="\n".join(bits_row(name, figures[key]) for name, key in BITS_ROWS.items()),
        held_code=held_out["code"],
        held_prose=held_out["prose"],
        fp8_cost=fp8 / bf16 - 1,
        accepted=drafts["greedy"],
        num_greedy=drafts["num_greedy"],
        forced=drafts["teacher_forced"],
        num_forced=drafts["num_teacher_forced"],
        violation=sum(load["violation"]) / len(load["violation"]),
        load_table="\n".join(load_row(i, layer, load) for i, layer in enumerate(config.sparse_layer_ids)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    content = {"corpus_sha256": corpus.sha256, "python": platform.python_version(), "run": run, **figures}
    (folder / "figures.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def bits_row(name: str, bits: dict[str, float]) -> str:
    """One line of the table of bits per byte."""
    return f"| {name} | {bits['all']:.3f} | {bits['code']:.3f} | {bits['prose']:.3f} |"


def load_row(index: int, layer: int, load: dict[str, Any]) -> str:
    """One line of the table of expert load."""
    cells = [f"{load[key][index]:.2f}" for key in ("violation", "violation_code", "violation_prose", "overlap", "ratio")]
    cells += [", ".join(map(str, load[key][index])) for key in ("code_experts", "prose_experts")]
    return f"| {layer} | {' | '.join(cells)} |"


def hardware() -> str:
    """The processor, in words."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()
