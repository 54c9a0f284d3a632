"""An MLA layer equals HF's DeepseekV3Attention however a sequence is cut into chunks and decode steps, alone or in a batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import YARN, TinyModel
from torch import Tensor, nn

from moesaic.attention.backend import KernelBackend, make_backend
from moesaic.attention.config import MLAConfig
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, ExtendSequence, decode_buckets
from moesaic.attention.mla import MLAWeights, MultiHeadLatentAttention
from moesaic.kernels.quant import round_to_fp8
from moesaic.kernels.rope import rope_table
from moesaic.kernels.rope_config import RopeConfig

PAGE, PAGES_PER_SEQUENCE, CPU = 4, 8, torch.device("cpu")
NUM_SEQUENCES = 3
YARN_ROPE = RopeConfig(dim=16, theta=10000.0, factor=4.0, original_max_position=64, mscale=1.0, mscale_all_dim=1.0)

Tiny = Callable[..., TinyModel]


class Layer:
    """Layer 0 of a tiny model in both implementations; ours with a pool and pages for a few sequences."""

    def __init__(self, model: TinyModel, *, fp8_activations: bool = False) -> None:
        self._oracle = model.oracle.model
        hf = self._oracle.layers[0].self_attn
        config = model.oracle.config
        self.hidden_size = config.hidden_size
        sizes = {name: getattr(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")}
        self.config = MLAConfig(
            num_heads=config.num_attention_heads,
            softmax_scale=hf.scaling,
            rms_norm_eps=hf.kv_a_layernorm.variance_epsilon,
            fp8_activations=fp8_activations,
            **sizes,
        )
        yarn = config.rope_parameters["rope_type"] == "yarn"
        rope = YARN_ROPE if yarn else RopeConfig(dim=16, theta=10000.0)
        self.mla = MultiHeadLatentAttention(self.config, _weights(hf, self.config), 0, rope_table(rope, 128))
        self.pool = LatentKVPool(
            num_layers=1,
            num_pages=NUM_SEQUENCES * PAGES_PER_SEQUENCE,
            page_size=PAGE,
            latent_dim=self.config.latent_dim,
            dtype=torch.float32,
            device=CPU,
        )
        shuffled = torch.randperm(self.pool.num_pages, generator=torch.Generator().manual_seed(0))
        self._pages = shuffled.view(NUM_SEQUENCES, PAGES_PER_SEQUENCE)

    @torch.inference_mode()
    def expected(self, hidden: Tensor) -> Tensor:
        """HF's layer over a whole sequence [T, H]."""
        length = len(hidden)
        position = self._oracle.rotary_emb(hidden, torch.arange(length).unsqueeze(0))
        mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        out: Tensor = self._oracle.layers[0].self_attn(hidden.unsqueeze(0), position, mask)[0][0]
        return out

    def step(self, decode: list[tuple[int, int]], extend: list[tuple[int, int, int]], hidden: list[Tensor]) -> Tensor:
        """One step: decode rows (sequence, position), then chunks (sequence, start, stop); hidden [T, H] per sequence."""
        spans = [(seq, position, position + 1) for seq, position in decode] + extend
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in spans])
        slots = torch.cat([self._slots(seq, start, stop) for seq, start, stop in spans])
        rows = torch.cat([hidden[seq][start:stop] for seq, start, stop in spans])
        extends, first = [], len(decode)
        for seq, start, stop in extend:
            pages = self._pages[seq, : -(-stop // PAGE)]
            extends.append(ExtendSequence(start=first, length=stop - start, prefix_len=start, pages=pages))
            first += stop - start
        table = np.array([self._pages[seq].tolist() for seq, _ in decode], dtype=np.int32).reshape(-1, PAGES_PER_SEQUENCE)
        lengths = np.array([position + 1 for _, position in decode], dtype=np.int64)
        metadata = AttentionMetadata(
            positions=positions,
            slots=slots,
            num_decode=len(decode),
            buckets=decode_buckets(table, lengths, PAGE, CPU),
            extends=tuple(extends),
        )
        return self._run(rows, metadata)

    @torch.inference_mode()
    def _run(self, rows: Tensor, metadata: AttentionMetadata) -> Tensor:
        queries = self.mla.prepare(rows, metadata, self.pool)
        return self.mla.output(self.mla.core(queries, metadata, self.pool, KernelBackend()))

    def idle(self) -> Tensor:
        """A step without rows."""
        nothing = torch.empty(0, dtype=torch.long)
        metadata = AttentionMetadata(positions=nothing, slots=nothing, num_decode=0, buckets=(), extends=())
        return self._run(torch.empty(0, self.hidden_size), metadata)

    def _slots(self, seq: int, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop)
        return self._pages[seq][positions // PAGE] * PAGE + positions % PAGE


def _weights(hf: nn.Module, config: MLAConfig) -> MLAWeights:
    state = {name: value.detach() for name, value in hf.named_parameters()}
    kv_up = state["kv_b_proj.weight"].view(config.num_heads, -1, config.kv_lora_rank)
    key, value = kv_up.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    query_down = state.get("q_a_proj.weight", state.get("q_proj.weight"))
    assert query_down is not None
    return MLAWeights(
        down=torch.cat([query_down, state["kv_a_proj_with_mqa.weight"]]),
        q_norm=state.get("q_a_layernorm.weight"),
        q_up=state.get("q_b_proj.weight"),
        kv_norm=state["kv_a_layernorm.weight"],
        kv_up_key=key.contiguous(),
        kv_up_value=value.contiguous(),
        output=state["o_proj.weight"],
    )


def _hidden(layer: Layer, length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, layer.hidden_size, generator=torch.Generator().manual_seed(seed))


def _close(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "q_full", "yarn"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut_into_chunks_and_decode_steps_equals_transformers(tiny: Tiny, variant: str, data: st.DataObject) -> None:
    layer = Layer(tiny(variant))
    hidden = _hidden(layer, 27)
    cuts = sorted({0, 27, *data.draw(st.sets(st.integers(1, 26), max_size=12), label="cuts")})
    out = []
    for start, stop in pairwise(cuts):
        as_decode = stop - start == 1 and start > 0 and data.draw(st.booleans(), label="decode")
        out.append(layer.step([(0, start)], [], [hidden]) if as_decode else layer.step([], [(0, start, stop)], [hidden]))
    _close(torch.cat(out), layer.expected(hidden))


@pytest.mark.parametrize("variant", ["plain", "q_full", "yarn"])
def test_decode_after_prefill_equals_transformers(tiny: Tiny, variant: str) -> None:
    layer = Layer(tiny(variant))
    hidden = _hidden(layer, 20)
    expected = layer.expected(hidden)
    _close(layer.step([], [(0, 0, 13)], [hidden]), expected[:13])
    for position in range(13, 20):
        _close(layer.step([(0, position)], [], [hidden]), expected[position : position + 1])


def test_strangers_in_one_step_do_not_see_each_other(tiny: Tiny) -> None:
    """One sequence decodes while another extends a cached prefix and a third begins."""
    layer = Layer(tiny("plain"))
    hidden = [_hidden(layer, length, seed) for seed, length in enumerate((12, 30, 5))]
    expected = [layer.expected(rows) for rows in hidden]
    layer.step([], [(1, 0, 9), (0, 0, 11)], hidden)
    out = layer.step([(0, 11)], [(1, 9, 30), (2, 0, 5)], hidden)
    _close(out, torch.cat([expected[0][11:], expected[1][9:], expected[2]]))
    both = layer.step([(2, 4), (1, 29), (0, 11)], [], hidden)
    _close(both, torch.cat([expected[2][4:], expected[1][29:], expected[0][11:]]))


def test_an_idle_step_gives_no_rows_and_writes_nothing(tiny: Tiny) -> None:
    for fp8 in (False, True):
        layer = Layer(tiny("plain"), fp8_activations=fp8)
        assert layer.idle().shape == (0, layer.hidden_size)
        assert not layer.pool.pages(0).any()


def test_the_heads_of_two_ranks_add_up_to_the_whole_layer(tiny: Tiny) -> None:
    layer = Layer(tiny("plain"))
    hidden = _hidden(layer, 9)
    whole, config = layer.mla, layer.config
    state = layer._oracle.layers[0].self_attn
    full = _weights(state, config)
    total = torch.zeros(9, layer.hidden_size)
    for rank in (0, 1):
        heads = slice(2 * rank, 2 * rank + 2)
        assert full.q_up is not None
        weights = MLAWeights(
            down=full.down,
            q_norm=full.q_norm,
            q_up=full.q_up.view(4, config.qk_head_dim, -1)[heads].flatten(0, 1),
            kv_norm=full.kv_norm,
            kv_up_key=full.kv_up_key[heads],
            kv_up_value=full.kv_up_value[heads],
            output=full.output.view(-1, 4, config.v_head_dim)[:, heads].flatten(1),
        )
        half = MLAConfig(**{**vars(config), "num_heads": 2})
        layer.mla = MultiHeadLatentAttention(half, weights, 0, whole._rope_table)
        total += layer.step([], [(0, 0, 9)], [hidden])
    _close(total, layer.expected(hidden))


def test_fp8_activations_round_what_enters_the_projections(tiny: Tiny) -> None:
    exact, rounding = Layer(tiny("q_full")), Layer(tiny("q_full"), fp8_activations=True)
    hidden = _hidden(exact, 6)
    exact.step([], [(0, 0, 6)], [round_to_fp8(hidden)])
    rounding.step([], [(0, 0, 6)], [hidden])
    assert (hidden - round_to_fp8(hidden)).abs().max() > 1e-3
    _close(rounding.pool.pages(0), exact.pool.pages(0))
    attended = torch.randn(4, 4 * exact.config.v_head_dim, generator=torch.Generator().manual_seed(1))
    _close(rounding.mla.output(attended), exact.mla.output(round_to_fp8(attended)))
    assert (rounding.mla.output(attended) - exact.mla.output(attended)).abs().max() > 1e-3, "rounding shows"


def test_the_softmax_scale_and_yarn_matter_to_the_answer(tiny: Tiny) -> None:
    """Guards the tests above: HF's YaRN layer differs from the plain one on the same input."""
    assert YARN["factor"] == YARN_ROPE.factor
    plain, yarn = Layer(tiny("plain")), Layer(tiny("yarn"))
    hidden = _hidden(plain, 20)
    assert (plain.expected(hidden) - yarn.expected(hidden)).abs().max() > 1e-3


def test_an_unknown_backend_is_refused_by_name() -> None:
    assert isinstance(make_backend(), KernelBackend)
    with pytest.raises(ValueError, match="'flashmla' is not built; choose 'own'"):
        make_backend("flashmla")
