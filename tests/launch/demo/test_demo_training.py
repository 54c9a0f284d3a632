"""A run can be repeated, resumed and shortened, and it learns."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.data import WindowStream
from moesaic.launch.demo.evaluate import WINDOW, windows_of
from moesaic.launch.demo.trainer import Trainer, TrainingConfig

TINY = DemoConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
RUN = TrainingConfig(steps=12, batch_tokens=256, sequence_length=32, final_sequence_length=64, warmup_steps=2)


def stream() -> WindowStream:
    """Counting, with a different stride in each document: easy to learn."""
    documents = [np.arange(300, dtype=np.uint16) * stride % 60 + 3 for stride in range(1, 12)]
    return WindowStream(documents, seed=0)


def losses(trainer: Trainer, num_steps: int) -> list[tuple[float, float]]:
    reports = [trainer.step() for _ in range(num_steps)]
    return [(r.loss, r.mtp_loss) for r in reports]


def test_the_same_seed_gives_the_same_losses_and_they_fall() -> None:
    first, second = losses(Trainer(TINY, RUN, stream()), 12), losses(Trainer(TINY, RUN, stream()), 12)
    assert first == second
    assert first[-1][0] < 0.8 * first[0][0] and first[-1][1] < first[0][1]


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    whole = Trainer(TINY, RUN, stream())
    expected = losses(whole, 10)[6:]
    stopped = Trainer(TINY, RUN, stream())
    losses(stopped, 6)
    stopped.save(tmp_path / "snapshot.pt")
    resumed = Trainer(TINY, RUN, stream())
    resumed.load(tmp_path / "snapshot.pt")
    assert losses(resumed, 4) == expected


def test_a_late_run_may_be_shortened_before_its_decay_only(tmp_path: Path) -> None:
    trainer = Trainer(TINY, dataclasses.replace(RUN, steps=100), stream())
    losses(trainer, 6)
    trainer.save(tmp_path / "snapshot.pt")
    Trainer(TINY, dataclasses.replace(RUN, steps=8), stream()).load(tmp_path / "snapshot.pt")
    with pytest.raises(ValueError, match="after the decay began at step 3"):
        Trainer(TINY, dataclasses.replace(RUN, steps=4), stream()).load(tmp_path / "snapshot.pt")
    with pytest.raises(ValueError, match="other settings"):
        Trainer(TINY, dataclasses.replace(RUN, seed=1), stream()).load(tmp_path / "snapshot.pt")


def test_the_bias_of_busy_experts_falls() -> None:
    trainer = Trainer(TINY, RUN, stream())
    trainer.step()
    for name, bias in trainer.model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            assert bias.min() < 0 < bias.max()


def test_an_epoch_is_every_window_once() -> None:
    source = WindowStream([np.arange(start, start + 700, dtype=np.uint16) for start in (0, 700, 1400)], seed=0)
    per_epoch = (2100 - 2) // 32
    first, second = (source.batch(epoch * per_epoch * 32, per_epoch * 32, 32) for epoch in range(2))
    assert len(first) == per_epoch and first[:, :32].unique().numel() == per_epoch * 32
    assert not torch.equal(first, second)


def test_every_held_out_token_is_scored_once() -> None:
    for length in (2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 7):
        document = np.arange(length, dtype=np.uint16)
        scored = np.concatenate([window[first:] for window, first in windows_of([document])])
        assert scored.tolist() == list(range(1, length))
