"""The memory plan: equal to what is really loaded, right for DeepSeek-V3 on real GPUs, and of use where it doesn't fit."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepseek_v3 import DEEPSEEK_V3
from rich.console import Console
from tiny_models import TinyModel
from torch import Tensor

from moesaic.attention.backend import KernelBackend
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import SlotOptions
from moesaic.kernels.peer_exchange import PeerLayout, PeerWindow
from moesaic.launch.config import ResolvedConfig, ServerConfig
from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.engine.memory import DeviceMemory, plan_num_host_pages
from moesaic.launch.engine.model_runner import ModelRunner, RunnerConfig
from moesaic.launch.engine.process_groups import make_parallel_context
from moesaic.launch.errors import ConfigError
from moesaic.launch.gpus import parse_gpus
from moesaic.launch.hardware import Hardware
from moesaic.launch.memory_advice import advice, refuse_memory
from moesaic.launch.memory_parts import (
    MemoryInputs,
    MemoryItem,
    expert_bytes,
    rope_table_bytes,
    staging_bytes,
    weight_bytes,
    window_bytes,
)
from moesaic.launch.memory_plan import memory_choice, memory_rows, plan_memory, render_memory
from moesaic.launch.models.build import DeepseekV3Builder
from moesaic.launch.models.config import ModelConfig, load_model_config, parse_model_config
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.tensors import FP8_KINDS, KINDS, model_tensors
from moesaic.launch.models.weights import CheckpointWeights, DummyWeights, Shard
from moesaic.launch.resolution import resolve
from moesaic.launch.startup import make_plan, model_shape
from moesaic.launch.topology import Topology
from moesaic.moe.deepep_config import ExchangeShape
from moesaic.moe.deepep_memory import low_latency_bytes
from moesaic.moe.symm_windows import NUM_WINDOWS, windows_in

GB = 10**9


def settled(model: ModelConfig, *, hardware: Hardware | None = None, **flags: Any) -> MemoryInputs:
    """What a server with these flags would plan with."""
    config = ServerConfig(model_path="m", **flags)
    resolution = resolve(config, model_shape(model), hardware or Hardware(num_cores=8))
    return MemoryInputs(
        model=model,
        topology=resolution.topology,
        config=resolution.config,
        num_slots=model.n_routed_experts + config.ep_num_redundant_experts,
        experts_move=config.enable_eplb,
    )


class Tally:
    """A source of dummy weights that counts the bytes of each kind that it gives out."""

    def __init__(self, model: ModelConfig) -> None:
        self.kinds = {spec.name: spec for spec in model_tensors(model)}
        self.num_bytes: Counter[str] = Counter()

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, shard: Shard | None = None) -> Tensor:
        assert shape == self.kinds[name].shape, name
        value = DummyWeights().tensor(name, shape, dtype, shard)
        self.num_bytes[self.kinds[name].kind] += value.nbytes
        return value

    def quantized(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> tuple[Tensor, Tensor]:
        assert shape == self.kinds[name].shape, name
        values, scales = DummyWeights().quantized(name, shape, shard)
        self.num_bytes[self.kinds[name].kind] += values.nbytes + scales.nbytes
        return values, scales


def tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part, seen)
    elif type(value).__module__.startswith("moesaic.") and hasattr(value, "__dict__"):
        yield from tensors_in(vars(value), seen)


LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tensor parallel": {"tp_size": 4},
    "experts shared by pairs": {"tp_size": 4, "ep_size": 2},
    "DP attention": {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "ep_size": 4, "moe_dense_tp_size": 1},
    "all-to-all, attention shared by pairs": {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": "torch"},
    "DP head, redundant experts": {
        "tp_size": 4,
        "dp_size": 4,
        "enable_dp_attention": True,
        "enable_dp_lm_head": True,
        "ep_size": 4,
        "ep_num_redundant_experts": 8,
    },
}


@pytest.mark.parametrize("variant", ["plain", "fp8", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_planned_weights_are_those_that_a_rank_holds(tiny: Callable[..., TinyModel], variant: str, layout: str) -> None:
    model = load_model_config(tiny(variant).folder)
    inputs = settled(model, **LAYOUTS[layout])
    last = inputs.topology.place(inputs.topology.world_size - 1)
    parallel = make_parallel_context(
        inputs.topology,
        last,
        a2a_backend=inputs.config.moe_a2a_backend,
        dp_lm_head=inputs.config.enable_dp_lm_head,
        new_group=lambda ranks, purpose: dist.ProcessGroup(0, 1),  # nothing communicates while a rank is built
    )
    slots = SlotOptions()
    if inputs.num_slots > model.n_routed_experts:
        ep, num_layers = inputs.topology.ep_size, len(model.sparse_layers)
        slots = SlotOptions(
            location=ExpertLocation.trivial(
                num_layers=num_layers, num_experts=model.n_routed_experts, num_slots=inputs.num_slots, ep_size=ep
            )
        )
    source = Tally(model)

    built = DeepseekV3Builder(
        model, source, parallel, KernelBackend(), BuildOptions(max_positions=inputs.config.context_length, slots=slots)
    ).build()

    assert source.num_bytes == {kind: size for kind, size in weight_bytes(inputs).items() if size}
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors_in(built, set())}
    held = sum(storages.values()) - sum(each.nbytes for each in tensors_in(built.replicas, set()))
    assert held == sum(weight_bytes(inputs).values()) + rope_table_bytes(inputs)


@pytest.mark.parametrize(
    "sizes",
    [
        {"moe_intermediate_size": 128, "intermediate_size": 256},
        pytest.param({"q_lora_rank": 144, "n_shared_experts": 2}, id="ragged"),
        pytest.param({"q_lora_rank": None}, id="full queries"),
    ],
)
def test_weights_that_stay_fp8_are_planned_with_their_scales(tiny: Callable[..., TinyModel], sizes: dict[str, Any]) -> None:
    folder = tiny("fp8", n_routed_experts=8, num_hidden_layers=2, **sizes).folder
    model = load_model_config(folder)
    inputs = replace(settled(model), fp8=FP8_KINDS)

    options, source = BuildOptions(max_positions=64, fp8_weights=True), Tally(model)
    built = DeepseekV3Builder(model, source, ParallelContext(), KernelBackend(), options).build()

    planned = weight_bytes(inputs)
    for kind in ("attention", "dense layers", "shared experts"):
        assert source.num_bytes[kind] == planned[kind] < max(1, weight_bytes(settled(model))[kind])
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors_in(built, set())}
    assert sum(storages.values()) == sum(planned.values()) + 64 * model.qk_rope_head_dim * 4
    assert sum(each.nbytes for each in tensors_in(built.experts, set())) == planned["routed experts"]


def test_deepseek_v3_takes_671_gb_in_fp8_and_what_its_checkpoint_holds_plain() -> None:
    model = parse_model_config(DEEPSEEK_V3)
    inputs = settled(model, hardware=Hardware(num_cores=64, num_cuda_devices=8), tp_size=8)
    on_all = 8 * sum(weight_bytes(replace(inputs, fp8=FP8_KINDS)).values())
    assert 671 * GB < on_all < 700 * GB, "some tensors are on every rank"
    assert on_all < 0.53 * 8 * sum(weight_bytes(inputs).values())


def test_symmetric_windows_are_planned_as_large_as_a_rank_makes_them(tiny: Callable[..., TinyModel]) -> None:
    folder = tiny("fp8", moe_intermediate_size=128, intermediate_size=256, hidden_size=256).folder
    model = load_model_config(folder)
    inputs = settled(model)
    inputs = replace(inputs, config=replace(inputs.config, moe_a2a_backend="symm", max_dispatch_tokens_per_rank=48))
    made: list[int] = []

    def make_windows(layout: PeerLayout, rank: int, group: dist.ProcessGroup | None, device: str) -> list[PeerWindow]:
        memory = torch.zeros(NUM_WINDOWS * layout.num_bytes, dtype=torch.uint8)
        made.append(memory.nbytes)
        return windows_in(memory, layout, rank, [memory.data_ptr()])

    options = BuildOptions(max_positions=64, fp8_weights=True, max_dispatch_tokens=48, make_windows=make_windows)
    source = CheckpointWeights(folder)
    DeepseekV3Builder(model, source, ParallelContext(a2a_backend="symm"), KernelBackend(), options).build()

    assert made == [window_bytes(inputs)]
    (item,) = [item for item in plan_memory(inputs, None).buffers if item.name == "symmetric windows"]
    assert item.num_bytes == made[0] and window_bytes(settled(model)) == 0


@pytest.mark.parametrize("max_total_tokens", [None, 1000])
def test_the_demo_model_loads_what_was_planned(max_total_tokens: int | None) -> None:
    config = ServerConfig(model_path=str(CHECKPOINT_DIR), device="cpu", max_total_tokens=max_total_tokens)
    plan = make_plan(config).memory
    resolved = make_plan(config).resolution.config
    runner = ModelRunner(
        RunnerConfig(model_path=config.model_path, context_length=resolved.context_length, page_size=resolved.page_size),
        load_model_config(config.model_path),
        ParallelContext(),
    )
    assert plan.kv_tokens is not None
    runner.allocate_kv(plan.kv_tokens // resolved.page_size)

    assert runner.weight_bytes == sum(item.num_bytes for item in plan.weights)
    assert runner.kv_bytes_per_token == plan.kv_bytes_per_token
    assert sum(pages.nbytes for pages in runner.kv_pages()) == plan.kv_bytes == memory_rows(plan)["kv_bytes"]
    if max_total_tokens is not None:
        assert plan.kv_tokens == 992  # whole pages of 16


def test_deepseek_v3_has_its_published_number_of_parameters() -> None:
    parameters = sum(torch.Size(spec.shape).numel() for spec in model_tensors(parse_model_config(DEEPSEEK_V3)))

    # "671B total parameters" (the report's abstract): the released checkpoint's tensors without its MTP layer.
    assert parameters == 671_026_419_200


def test_staging_holds_one_layer_and_only_where_experts_move() -> None:
    flags: dict[str, Any] = {**LAYOUTS["all-to-all, attention shared by pairs"], "ep_num_redundant_experts": 4}
    demo = load_model_config(CHECKPOINT_DIR)
    still, moving = settled(demo, **flags), settled(demo, **flags, enable_eplb=True)

    assert staging_bytes(still) == 0
    assert staging_bytes(moving) == 9 * expert_bytes(moving) == 9 * 3 * 256 * 64 * 4


def low_latency_buffers(config: ResolvedConfig, topology: Topology) -> tuple[MemoryItem, ...]:
    """What DeepEP's low-latency mode would need here (its backend itself is refused without GPUs)."""
    shape = ExchangeShape(num_ranks=topology.ep_size, ranks_per_node=8, num_slots=288, hidden_size=7168, topk=8)
    size = low_latency_bytes(config.max_dispatch_tokens_per_rank, shape)
    return (MemoryItem(name="DeepEP buffers", num_bytes=size, basis="low-latency mode"),)


EP32_PREFILL: dict[str, Any] = {
    "tp_size": 32,
    "dp_size": 32,
    "enable_dp_attention": True,
    "enable_dp_lm_head": True,
    "moe_dense_tp_size": 1,
    "moe_a2a_backend": "torch",
    "deepep_mode": "normal",
    "ep_num_redundant_experts": 32,
    "enable_eplb": True,
    "context_length": 8192,
    "chunked_prefill_size": 32 * 8192,
    "max_running_requests": 32 * 64,
    "nnodes": 4,
    "dist_init_addr": "h:1",
}
EP72_DECODE: dict[str, Any] = {
    "tp_size": 72,
    "dp_size": 72,
    "enable_dp_attention": True,
    "enable_dp_lm_head": True,
    "moe_dense_tp_size": 1,
    "moe_a2a_backend": "torch",
    "deepep_mode": "low_latency",
    "ep_num_redundant_experts": 32,
    "enable_eplb": True,
    "context_length": 8192,
    "chunked_prefill_size": 72,
    "max_running_requests": 72 * 255,
    "nnodes": 9,
    "dist_init_addr": "h:1",
    "deepep_max_dispatch_tokens_per_rank": 256,
}


WEIGHTS_GB = {
    "attention": 12.4,  # all of it on every GPU, kv_b_proj (2.0) in bfloat16
    "dense layers": 1.2,
    "shared experts": 2.6,
    "gates and norms": 0.4,
    "embedding and head": 3.7,
}


def published(flags: dict[str, Any], **changes: Any) -> MemoryInputs:
    """DeepSeek-V3 with FP8 weights as stored, on nodes of 8 GPUs."""
    hardware = Hardware(num_cores=64, num_cuda_devices=8)
    inputs = settled(parse_model_config(DEEPSEEK_V3), hardware=hardware, **flags)
    return replace(inputs, **{"fp8": frozenset(KINDS)} | changes)


@pytest.mark.parametrize(
    ("flags", "gpu_gb", "experts_gb", "kv_tokens"),
    [
        # Routed experts: 9 (4) slots of 44 MB in each of 58 layers. A token's KV is 61 x 576 x 2 bytes.
        (EP32_PREFILL, 80, 23.0, 335_936),
        (EP32_PREFILL, 141, 23.0, 1_073_792),
        (EP72_DECODE, 80, 10.2, 456_640),
        (EP72_DECODE, 141, 10.2, 1_194_496),
    ],
)
def test_deepseek_v3_fits_in_the_published_layouts(flags: dict[str, Any], gpu_gb: int, experts_gb: float, kv_tokens: int) -> None:
    inputs = published(flags)
    if flags is EP72_DECODE:
        inputs = replace(inputs, communication=low_latency_buffers, graph_batch_sizes=(1, 64, 128, 255))

    plan = plan_memory(inputs, DeviceMemory(total=gpu_gb * GB, free=gpu_gb * GB))

    weights = {item.name.removeprefix("weights: "): round(item.num_bytes / GB, 1) for item in plan.weights}
    assert weights == WEIGHTS_GB | {"routed experts": experts_gb}
    assert plan.fits and plan.kv_tokens == kv_tokens and plan.kv_bytes_per_token == 61 * 576 * 2
    taken = plan.fixed_bytes + plan.kv_bytes + plan.momentary_bytes
    assert taken + plan.headroom_bytes == gpu_gb * GB
    # Weights, buffers and KV have the share that --mem-fraction-static gives them (0.85), but for a part of a page.
    assert 0 <= 0.85 * gpu_gb * GB - plan.fixed_bytes - plan.kv_bytes < 64 * plan.kv_bytes_per_token + 1


@pytest.mark.parametrize(
    ("flags", "changes", "wanted"),
    [
        # Dequantised at load, EP32 is too much for 80 GB.
        (
            EP32_PREFILL,
            {"fp8": frozenset()},
            ("weights: routed experts 42.", "--quantization fp8 frees 34.93 GiB; that is enough"),
        ),
        (EP32_PREFILL | {"chunked_prefill_size": 32 * 16384}, {}, ("--chunked-prefill-size 262144 frees", "that is enough")),
        (EP32_PREFILL | {"context_length": 163840}, {}, ("--context-length 81920 frees",)),
        (
            EP32_PREFILL | {"max_total_tokens": 400_000},
            {},
            ("--max-total-tokens 335936 frees 4.1", "--kv-cache-dtype fp8_e4m3 frees 13.0", "that is enough"),
        ),
        (EP72_DECODE, {"communication": low_latency_buffers, "num_slots": 72 * 20}, ("--ep-num-redundant-experts 0 frees",)),
    ],
)
def test_what_does_not_fit_is_refused_with_what_each_flag_frees(
    flags: dict[str, Any], changes: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    inputs = published(flags, **changes)
    plan = plan_memory(inputs, DeviceMemory(total=80 * GB, free=80 * GB))

    with pytest.raises(ConfigError) as caught:
        refuse_memory(inputs, plan)

    message = str(caught.value)
    assert all(text in message for text in wanted), message
    no_fp8 = replace(inputs, fp8_fits=False)
    assert not [words for words in advice(no_fp8, plan_memory(no_fp8, plan.memory)) if "--quantization" in words]


def test_a_larger_share_is_proposed_where_the_pool_is_too_small_and_memory_is_left() -> None:
    inputs = settled(load_model_config(CHECKPOINT_DIR), mem_fraction_static=0.01)
    memory = DeviceMemory(total=256 << 20, free=256 << 20)

    (words,) = [words for words in advice(inputs, plan_memory(inputs, memory)) if "--mem-fraction-static" in words]

    fraction = float(words.split()[1])
    assert words.endswith("more; that is enough")
    assert plan_memory(replace(inputs, config=replace(inputs.config, mem_fraction_static=fraction)), memory).fits


def test_host_memory_for_retracted_requests_is_as_large_as_a_rank_makes_it_and_refused_where_there_is_less() -> None:
    inputs = published(EP72_DECODE, host_kv_gb=8.0)
    gpu = DeviceMemory(total=80 * GB, free=80 * GB)
    plan = plan_memory(inputs, gpu, host_free=30 * GB)
    tokens = plan_num_host_pages(inputs.config, 8.0, plan.kv_bytes_per_token, 1 << 30) * inputs.config.page_size

    refuse_memory(inputs, plan)
    assert plan.host_bytes == tokens * plan.kv_bytes_per_token and 7.99 * GB < plan.host_bytes <= 8 * GB
    assert plan.fixed_bytes == plan_memory(replace(inputs, host_kv_gb=0.0), gpu).fixed_bytes, "none of it is on the GPU"
    assert "7.4" in memory_choice(plan).chosen and memory_rows(plan)["host_items"][0]["num_bytes"] == plan.host_bytes
    with pytest.raises(ConfigError, match=r"gb 8: each rank would keep up to 7\.4.* 5\.59 GiB; use .*-host-kv-gb 6, or 0"):
        refuse_memory(inputs, plan_memory(inputs, gpu, host_free=6 * GB))


def test_on_a_cpu_host_memory_is_what_the_plan_leaves_over() -> None:
    inputs = replace(settled(load_model_config(CHECKPOINT_DIR), mem_fraction_static=0.6), host_kv_gb=4.0)
    memory = DeviceMemory(total=3 * GB, free=3 * GB)
    plan = plan_memory(inputs, memory)

    assert plan.fits and plan.host_bytes == plan.kv_bytes, "all that the pool can hold"
    with pytest.raises(ConfigError, match="free on this machine beside what the server computes with"):
        refuse_memory(inputs, plan)
    less = plan_memory(replace(inputs, host_kv_gb=0.5), memory)
    refuse_memory(inputs, less)
    assert less.host_room_bytes == less.headroom_bytes
    unasked = plan_memory(replace(inputs, host_kv_gb=None), memory)
    refuse_memory(inputs, unasked)
    assert 0.45 * unasked.headroom_bytes < unasked.host_bytes <= 0.5 * unasked.headroom_bytes, "half of what is left"


def test_where_memory_is_not_known_nothing_is_refused_and_the_table_says_so() -> None:
    inputs = published(EP32_PREFILL)
    plan = plan_memory(inputs, None)

    refuse_memory(inputs, plan)

    assert memory_rows(plan)["kv_tokens"] is None and "the ranks will see" in memory_choice(plan).chosen
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_memory(plan))
    assert "what the ranks find free" in console.export_text()


def test_gpus_are_read_from_what_nvidia_smi_prints() -> None:
    first, second = parse_gpus("0, NVIDIA H200, 143771, 143167, 570.133.20\n1, NVIDIA H200, 143771, 12, 570.133.20\n")

    assert (first.name, first.driver, second.index) == ("NVIDIA H200", "570.133.20", 1)
    assert (first.total, second.free) == (143771 << 20, 12 << 20)
    with pytest.raises(OSError, match="which is not index, name"):
        parse_gpus("0, NVIDIA H200, [N/A], 12, 570.1\n")
