"""A captured forward gives, bit by bit, what the same forward gives operation by operation. On a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_jobs import EngineSettings
from tiny_models import TinyModel

from moesaic.launch.engine.cuda_graphs import CudaGraphs
from moesaic.launch.engine.device_copies import to_device
from moesaic.launch.engine.graph_plan import GraphPlan, GraphStep
from moesaic.launch.engine.model_runner import ModelRunner, RunnerConfig
from moesaic.launch.engine.synthetic_batch import PoolShape, decode_batch
from moesaic.launch.models.config import load_model_config
from moesaic.launch.models.forward import ForwardInput
from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_equal_the_forward_itself(tiny: Callable[..., TinyModel]) -> None:
    settings = EngineSettings(model_path=str(tiny("plain").folder), page_size=64, num_pages=32)
    config = RunnerConfig(
        model_path=settings.model_path, dtype=torch.bfloat16, device="cuda", context_length=256, page_size=settings.page_size
    )
    runner = ModelRunner(config, load_model_config(settings.model_path), ParallelContext())
    runner.allocate_kv(settings.num_pages)
    runner.capture_graphs(GraphPlan(rows=(4, 8), widths=(4,), split_from=None), CudaGraphs(), lambda done, total: None)
    pool = PoolShape(num_pages=settings.num_pages, page_size=settings.page_size, context_length=256)
    for num_tokens in (8, 3, 4, 8):
        batch = decode_batch(num_tokens, torch.randint(2, 256, (num_tokens,)), pool)
        inputs = ForwardInput(
            input_ids=batch.input_ids,
            metadata=batch.metadata,
            plan=DispatchPlan(mode=DispatchMode.LOW_LATENCY, num_tokens_per_rank=(num_tokens,)),
            logit_rows=batch.logit_rows,
            num_logits_per_dp_rank=(num_tokens,),
        )
        wanted = runner.forward(to_device(inputs, torch.device("cuda")))

        logits = runner.forward(inputs, graph=GraphStep(num_rows=4 if num_tokens <= 4 else 8, splits=False))

        assert torch.equal(logits[:num_tokens], wanted)
