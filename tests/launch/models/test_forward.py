"""The model's logits equal HF transformers' within 1e-4, chunk by chunk and token by token, on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from shared_windows import shared_windows
from tiny_models import VARIANTS, TinyModel
from torch import Tensor

from moesaic.attention.backend import KernelBackend
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, ExtendSequence, decode_buckets
from moesaic.launch.models.build import DeepseekV3Builder
from moesaic.launch.models.config import load_model_config
from moesaic.launch.models.deepseek_v3 import DeepseekV3, LoadObserver
from moesaic.launch.models.forward import ForwardInput
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.weights import CheckpointWeights
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan
from moesaic.overlap.operations import OperationError

Tiny = Callable[..., TinyModel]
PAGE, CPU = 4, torch.device("cpu")
TOKENS: list[int] = torch.randint(2, 256, (21,), generator=torch.Generator().manual_seed(1)).tolist()


class Driver:
    """One sequence on one rank, its pages in random order."""

    def __init__(
        self, tiny_model: TinyModel, *, a2a: str = "none", mode: DispatchMode = DispatchMode.NORMAL, **options: Any
    ) -> None:
        config = load_model_config(tiny_model.folder)
        build = BuildOptions(max_positions=config.max_position_embeddings, **options)
        weights = CheckpointWeights(tiny_model.folder)
        builder = DeepseekV3Builder(config, weights, ParallelContext(a2a_backend=a2a), KernelBackend(), build)
        self.model: DeepseekV3 = builder.build()
        self.pool = LatentKVPool(
            num_layers=config.num_hidden_layers,
            num_pages=48,
            page_size=PAGE,
            latent_dim=config.latent_dim,
            dtype=torch.float32,
            device=CPU,
        )
        self._mode = mode
        self._pages = torch.randperm(48, generator=torch.Generator().manual_seed(2))

    def extend(self, tokens: list[int], start: int, stop: int, observer: LoadObserver | None = None) -> Tensor:
        pages = self._pages[: -(-stop // PAGE)]
        extends = (ExtendSequence(start=0, length=stop - start, prefix_len=start, pages=pages),)
        return self._forward(tokens, start, stop, extends, observer)

    def decode(self, tokens: list[int], position: int) -> Tensor:
        return self._forward(tokens, position, position + 1, (), None)

    def idle(self) -> Tensor:
        return self._forward([], 0, 0, (), None)

    def _forward(
        self, tokens: list[int], start: int, stop: int, extends: tuple[ExtendSequence, ...], observer: LoadObserver | None
    ) -> Tensor:
        positions = torch.arange(start, stop)
        num_decode = 0 if extends else stop - start
        table = self._pages.numpy()[None].astype(np.int32)
        num_rows = stop - start
        metadata = AttentionMetadata(
            positions=positions,
            slots=self._pages[positions // PAGE] * PAGE + positions % PAGE,
            num_decode=num_decode,
            buckets=decode_buckets(table[:num_decode], np.array([stop] * num_decode, dtype=np.int64), PAGE, CPU),
            extends=extends,
        )
        inputs = ForwardInput(
            input_ids=torch.tensor(tokens[start:stop], dtype=torch.long),
            metadata=metadata,
            plan=DispatchPlan(mode=self._mode, num_tokens_per_rank=(num_rows,)),
            logit_rows=torch.arange(num_rows),
            num_logits_per_dp_rank=(num_rows,),
        )
        return self.model.forward(inputs, self.pool, observer)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("a2a", "mode"),
    [("none", DispatchMode.NORMAL), ("none", DispatchMode.LOW_LATENCY), ("torch", DispatchMode.NORMAL),
     ("torch", DispatchMode.LOW_LATENCY)],
)  # fmt: skip
def test_chunks_then_decode_give_the_oracles_logits(tiny: Tiny, variant: str, a2a: str, mode: DispatchMode) -> None:
    model = tiny(variant)
    driver = Driver(model, a2a=a2a, mode=mode)
    out = [driver.extend(TOKENS, 0, 11), driver.extend(TOKENS, 11, 18)]
    out += [driver.decode(TOKENS, position) for position in range(18, 21)]
    logits, expected = torch.cat(out), model.logits(TOKENS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_yarn_holds_past_the_original_context(tiny: Tiny) -> None:
    """150 tokens, where the context before stretching was 64."""
    tokens = torch.randint(2, 256, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    driver = Driver(tiny("yarn"))
    logits = torch.cat([driver.extend(tokens, 0, 100), driver.extend(tokens, 100, 149), driver.decode(tokens, 149)])
    torch.testing.assert_close(logits, tiny("yarn").logits(tokens), rtol=0, atol=1e-4)


def test_w8a8_arithmetic_stays_near_the_oracle_and_an_idle_step_of_it_runs(tiny: Tiny) -> None:
    driver = Driver(tiny("fp8"), fp8_activations=True)
    assert driver.idle().shape == (0, 256)
    logits, expected = driver.extend(TOKENS, 0, 21), tiny("fp8").logits(TOKENS)
    error = (logits - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.3, "rounded, and not wrong"


@pytest.mark.parametrize(("a2a", "mode"), [("none", DispatchMode.NORMAL), ("torch", DispatchMode.LOW_LATENCY)])
@pytest.mark.parametrize("inner", [128, 32])
def test_weights_that_stay_in_fp8_compute_what_the_simulation_does(tiny: Tiny, a2a: str, mode: DispatchMode, inner: int) -> None:
    """Near each other, and no farther from the oracle, which rounds no activation. Most sizes end inside a block."""
    model = tiny("fp8", moe_intermediate_size=inner, n_routed_experts=8, num_hidden_layers=2)
    simulated = Driver(model, a2a=a2a, mode=mode, fp8_activations=True)
    driver = Driver(model, a2a=a2a, mode=mode, fp8_activations=True, fp8_weights=True)
    logits, expected = (each.extend(TOKENS, 0, 21) for each in (driver, simulated))
    assert (logits - expected).norm() < 0.02 * expected.norm(), "a value between two FP8 steps may round either way"
    oracle = model.logits(TOKENS)
    assert (logits - oracle).norm() < 1.05 * (expected - oracle).norm()
    assert driver.idle().shape == (0, 256)
    assert {each.dtype for each in driver.model.experts[0].tensors} == {torch.float8_e4m3fn, torch.float32}


@pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: the interpreter is off")
def test_tritons_products_of_all_fp8_weights_give_the_logits_of_torchs(tiny: Tiny) -> None:
    model = tiny("fp8", n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, num_hidden_layers=2)
    by_triton, by_torch = (
        Driver(model, a2a="none", fp8_activations=True, fp8_weights=True, fp8_gemm_backends=(name,), expert_backends=(name,))
        for name in ("triton", "torch")
    )
    got, expected = (torch.cat([each.extend(TOKENS, 0, 3), each.decode(TOKENS, 3)]) for each in (by_triton, by_torch))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: the interpreter is off")
def test_low_latency_steps_over_shared_memory_compute_what_others_do(tiny: Tiny) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    model = tiny("fp8", **sizes, num_experts_per_tok=2, num_hidden_layers=2)
    options = {"mode": DispatchMode.LOW_LATENCY, "fp8_activations": True, "fp8_weights": True}
    by_memory = Driver(model, a2a="symm", max_dispatch_tokens=3, make_windows=shared_windows, **options)
    by_collectives = Driver(model, a2a="torch", **options)
    got, expected = (torch.cat([each.extend(TOKENS, 0, 3), each.decode(TOKENS, 3)]) for each in (by_memory, by_collectives))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert by_memory.idle().shape == (0, 256)


@pytest.mark.parametrize("a2a", ["none", "torch"])
@pytest.mark.parametrize("mode", DispatchMode)
def test_an_idle_step_gives_no_logits_and_leaves_the_kv_alone(tiny: Tiny, a2a: str, mode: DispatchMode) -> None:
    driver = Driver(tiny("plain"), a2a=a2a, mode=mode)
    assert driver.idle().shape == (0, 256)
    assert not driver.pool.pages(0).any()


def test_the_observer_sees_each_sparse_layers_choices_of_every_token(tiny: Tiny) -> None:
    seen: dict[int, Tensor] = {}
    Driver(tiny("plain")).extend(TOKENS, 0, 9, lambda layer, ids: seen.update({layer: ids}))
    assert sorted(seen) == [0, 1]
    for ids in seen.values():
        assert ids.shape == (9, 4)
        assert ((ids >= 0) & (ids < 16)).all()
        assert all(len(set(row)) == 4 for row in ids.tolist())


def test_only_the_rows_asked_for_get_logits(tiny: Tiny) -> None:
    driver = Driver(tiny("plain"))
    positions = torch.arange(9)
    pages = driver._pages[:3]
    inputs = ForwardInput(
        input_ids=torch.tensor(TOKENS[:9]),
        metadata=AttentionMetadata(
            positions=positions,
            slots=pages[positions // PAGE] * PAGE + positions % PAGE,
            num_decode=0,
            buckets=(),
            extends=(ExtendSequence(start=0, length=9, prefix_len=0, pages=pages),),
        ),
        plan=DispatchPlan(mode=DispatchMode.NORMAL, num_tokens_per_rank=(9,)),
        logit_rows=torch.tensor([8, 2]),
        num_logits_per_dp_rank=(2,),
    )
    logits = driver.model.forward(inputs, driver.pool)
    torch.testing.assert_close(logits, tiny("plain").logits(TOKENS[:9])[[8, 2]], rtol=0, atol=1e-4)


def test_a_failure_inside_a_layer_names_operation_layer_and_rank(tiny: Tiny) -> None:
    def refuse(layer: int, ids: Tensor) -> None:
        if layer == 1:
            raise RuntimeError("the observer is full")

    with pytest.raises(OperationError, match="operation gate of layer 2 failed on rank 0: the observer is full"):
        Driver(tiny("plain")).extend(TOKENS, 0, 3, refuse)
