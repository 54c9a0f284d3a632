"""The demo model for training: DeepSeek-V3 with one multi-token-prediction (MTP) layer, plain torch, CPU.

Module names are the released checkpoints' names (without the leading `model.`), except that the routed experts of a
layer are stacked into two tensors. Weights are float32; `compute_dtype` is what matrices are multiplied in.

The MTP layer at slot i gets the main model's hidden state h_i (after the final norm, which is what SGLang and vLLM
hand to the released MTP weights) and the next token t_(i+1), and predicts t_(i+2):
    eh_proj(concat(enorm(embed(t_(i+1))), hnorm(h_i)))  -> sparse decoder layer -> shared_head.norm -> tied head
Its rotary position is i.

Shape letters: B sequences, S positions, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.experts import Routing, SparseMLP
from moesaic.launch.demo.layers import MLP, Attention, Linear, RMSNorm, rotary_table

EMBEDDING_STD = 0.05
"""Initial scale of the embeddings: not so small that they drown in the first layers' outputs, and, as the head is tied
to them, not so large that every token first predicts itself."""


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm, each added to the residual stream."""

    def __init__(self, config: DemoConfig, layer_id: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp: SparseMLP | MLP = (
            SparseMLP(config) if layer_id >= config.first_k_dense_replace else MLP(hidden, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], routing: Routing) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        normed = self.post_attention_layernorm(x)
        out: Tensor = self.mlp(normed, routing) if isinstance(self.mlp, SparseMLP) else self.mlp(normed)
        return x + out


class MTPLayer(DecoderLayer):
    """The multi-token-prediction layer: see the module's docstring."""

    def __init__(self, config: DemoConfig, layer_id: int) -> None:
        super().__init__(config, layer_id)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden, eps)})

    def predict(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], routing: Routing) -> Tensor:
        """embedded (next tokens) and hidden (main model) [B, S, H] -> normed hidden states [B, S, H]."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        normed: Tensor = self.shared_head["norm"](self.forward(x, rotary, routing))
        return normed


class DemoModel(nn.Module):
    """The whole model. The head is tied to `embed_tokens`."""

    def __init__(self, config: DemoConfig, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=EMBEDDING_STD)
        main = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        extra = [MTPLayer(config, i) for i in range(config.num_hidden_layers, config.num_layers)]
        self.layers = nn.ModuleList([*main, *extra])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                nn.init.zeros_(parameter)  # every layer starts as the identity

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, S] -> [B, S, H] in the compute dtype."""
        return functional.embedding(token_ids, self.embed_tokens.weight).to(self.compute_dtype)

    def head(self) -> Tensor:
        """The output matrix [V, H] in the compute dtype."""
        return self.embed_tokens.weight.to(self.compute_dtype)

    def forward(self, token_ids: Tensor, routing: Routing | None = None) -> Tensor:
        """The main model: token_ids [B, S] -> hidden states after the final norm [B, S, H]."""
        routing = Routing() if routing is None else routing
        rotary = rotary_table(self.config, token_ids.shape[1])
        x = self.embed(token_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, rotary, routing)
        normed: Tensor = self.norm(x)
        return normed

    def draft(self, next_ids: Tensor, hidden: Tensor, routing: Routing | None = None) -> Tensor:
        """The MTP layer: next_ids [B, S] and the main model's states [B, S, H] -> states for the head [B, S, H]."""
        routing = Routing() if routing is None else routing
        layer = self.layers[self.config.num_hidden_layers]
        assert isinstance(layer, MTPLayer)
        return layer.predict(self.embed(next_ids), hidden, rotary_table(self.config, next_ids.shape[1]), routing)
