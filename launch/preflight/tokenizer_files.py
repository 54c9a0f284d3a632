"""Whether text can be served: the tokenizer's files, read before any weight is. Node 0 alone needs them."""

from __future__ import annotations

from pathlib import Path

from moesaic.launch.config import ServerConfig
from moesaic.launch.http.tokenizer import load_tokenizer
from moesaic.launch.preflight.findings import Finding, fail, ok, warn


def check_tokenizer(config: ServerConfig) -> Finding:
    """A server without a tokenizer works on token ids; one that was asked for and is not there is a failure."""
    folder = config.tokenizer_path or config.model_path
    if config.node_rank > 0:
        return ok("tokenizer", "node 0 reads it")
    if not Path(folder).is_dir():
        return fail("tokenizer", f"{folder} is no folder", "give --tokenizer-path a folder with tokenizer.json, or leave it out")
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        return fail("tokenizer", str(error), "copy it again, or name another folder with --tokenizer-path")
    if tokenizer is None:
        remedy = "text in requests is refused: send token ids, or name a folder that has one with --tokenizer-path"
        return warn("tokenizer", f"{folder} has no tokenizer.json", remedy)
    template = "a chat template" if tokenizer.chat_template else "no chat template (/v1/chat/completions is refused)"
    return ok("tokenizer", f"{folder}: {tokenizer.vocab_size:,} tokens, {template}")
