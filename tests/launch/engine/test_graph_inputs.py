"""A step's rows reach a captured forward's addresses in one copy, and blank rows are blank whatever was there before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moesaic.attention.kv_pool import LatentKVPool
from moesaic.launch.engine.graph_inputs import GraphInputs
from moesaic.launch.engine.synthetic_batch import PoolShape, decode_batch
from moesaic.launch.models.forward import ForwardInput
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan

CPU = torch.device("cpu")
PAGE_SIZE, NUM_PAGES = 4, 12
PLAN = DispatchPlan(mode=DispatchMode.LOW_LATENCY, num_tokens_per_rank=(1,))


def _step(num_rows: int, context: int) -> ForwardInput:
    shape = PoolShape(num_pages=NUM_PAGES, page_size=PAGE_SIZE, context_length=40)
    batch = decode_batch(num_rows, torch.arange(num_rows) + 50, shape, context_tokens=context)
    return ForwardInput(
        input_ids=batch.input_ids,
        metadata=batch.metadata,
        plan=PLAN,
        logit_rows=batch.logit_rows,
        num_logits_per_dp_rank=(num_rows,),
    )


@pytest.fixture
def pool() -> LatentKVPool:
    return LatentKVPool(num_layers=1, num_pages=NUM_PAGES, page_size=PAGE_SIZE, latent_dim=8, dtype=torch.float32, device=CPU)


class CopiesInto(TorchFunctionMode):
    """Counts the calls that write into the memory of `target`."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._address = target.untyped_storage().data_ptr()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__
        is_write = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        if is_write and args[0].untyped_storage().data_ptr() == self._address:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("num_rows", "width"), [(4, 3), (4, 10), (3, 3), (1, 10)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_rows_are_there_and_the_others_are_blank(num_rows: int, width: int, count: int, pool: LatentKVPool) -> None:
    if count > num_rows:
        return
    inputs = GraphInputs(most_rows=4, widths=(3, 10), pool=pool, device=CPU)
    inputs.load(_step(4, 40), 4, 10)  # what was there before
    step, there = _step(count, 9) if count else None, inputs.view(num_rows, width, PLAN, 1)

    if step is None:
        inputs.blank(num_rows, width)
    else:
        inputs.load(step, num_rows, width)

    (bucket,) = there.metadata.buckets
    blank = num_rows - count
    assert there.valid is not None
    assert there.valid.tolist() == [True] * count + [False] * blank
    assert there.input_ids.tolist() == [50 + row for row in range(count)] + [0] * blank
    assert there.metadata.slots[count:].tolist() == [pool.scratch_slot] * blank
    assert there.metadata.positions[count:].tolist() == [0] * blank
    assert bucket.seq_lens.tolist() == [9] * count + [1] * blank
    assert bucket.page_table[count:, 0].tolist() == [pool.scratch_page] * blank
    assert ((bucket.page_table >= 0) & (bucket.page_table <= pool.scratch_page)).all(), "any entry may be read"
    if step is not None:
        (own,) = step.metadata.buckets
        assert torch.equal(there.metadata.positions[:count], step.metadata.positions)
        assert torch.equal(there.metadata.slots[:count], step.metadata.slots)
        assert torch.equal(bucket.page_table[:count, : own.page_table.shape[1]], own.page_table)


def test_a_step_is_one_copy_besides_its_ids(pool: LatentKVPool) -> None:
    inputs = GraphInputs(most_rows=4, widths=(3, 10), pool=pool, device=CPU)
    with CopiesInto(inputs.view(4, 10, PLAN, 1).input_ids) as copies:
        inputs.load(_step(3, 9), 4, 10)
    assert copies.names == ["copy_", "copy_"]


def test_views_begin_where_kernels_load_many_bytes_at_once(pool: LatentKVPool) -> None:
    inputs = GraphInputs(most_rows=5, widths=(3,), pool=pool, device=CPU)
    for num_rows in (1, 3, 5):
        there = inputs.view(num_rows, 3, PLAN, 1)
        starts = there.input_ids, there.metadata.positions, there.metadata.slots, there.metadata.buckets[0].page_table
        assert all(tensor.data_ptr() % 16 == 0 for tensor in starts)
