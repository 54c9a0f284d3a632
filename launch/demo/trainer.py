"""The training loop: schedule, losses, balancing, resumable snapshots. Knows nothing of files in the repository.

The learning rate is warmup-stable-decay: constant until the last quarter of the run, then linear to zero. A run that
is late can therefore be resumed with fewer steps, as long as its decay has not begun. With the decay, sequences become
twice as long and the weight of the MTP loss falls, as in the paper.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.data import WindowStream
from moesaic.launch.demo.experts import Gate, Routing
from moesaic.launch.demo.functions import chunked_cross_entropy
from moesaic.launch.demo.model import DemoModel
from moesaic.launch.demo.optimizer import make_optimizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides the weights, next to the model's config and the corpus."""

    steps: int
    seed: int = 0
    batch_tokens: int = 8192
    sequence_length: int = 512
    final_sequence_length: int = 1024
    warmup_steps: int = 40
    decay_share: float = 0.25
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    gate_lr: float = 5e-4
    weight_decay: float = 0.05
    mtp_weight: float = 0.3
    final_mtp_weight: float = 0.1
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3
    gradient_clip: float = 1.0

    @property
    def decay_start(self) -> int:
        """The first step of the decay."""
        return int(self.steps * (1 - self.decay_share))

    def rate(self, step: int) -> float:
        """The factor on both learning rates and on the bias update rate."""
        remaining = (self.steps - step) / max(1, self.steps - self.decay_start)
        return min(1.0, (step + 1) / self.warmup_steps, remaining)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step measured: losses in nats per token, the load violation of the step's batch."""

    step: int
    loss: float
    mtp_loss: float
    violation: float


class Trainer:
    """Owns model, optimizers and position; `step` runs one step, `save` and `load` move it between processes."""

    def __init__(self, model_config: DemoConfig, config: TrainingConfig, stream: WindowStream) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.stream = stream
        self.model = DemoModel(model_config)
        self.optimizers = make_optimizers(
            self.model,
            matrix_lr=config.matrix_lr,
            other_lr=config.other_lr,
            gate_lr=config.gate_lr,
            weight_decay=config.weight_decay,
        )
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.next_step = 0
        self.seconds = 0.0

    def step(self) -> StepReport:
        """Forward, backward, update of weights and correction biases."""
        config, step = self.config, self.next_step
        decaying = step >= config.decay_start
        length = config.final_sequence_length if decaying else config.sequence_length
        window = self.stream.batch(step * config.batch_tokens, config.batch_tokens, length)
        routing = Routing()
        loss, mtp_loss = self.losses(window, routing)
        balance = torch.stack(routing.balance_losses).sum()
        mtp_weight = config.final_mtp_weight if decaying else config.mtp_weight
        (loss + mtp_weight * mtp_loss + config.balance_weight * balance).backward()  # type: ignore[no-untyped-call]
        self.update(config.rate(step))
        violation = self.balance(routing, config.bias_rate * config.rate(step))
        self.next_step += 1
        return StepReport(step=step, loss=loss.item(), mtp_loss=mtp_loss.item(), violation=violation)

    def losses(self, window: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """window [B, S + 2] -> mean cross entropy of the main model and of the MTP layer."""
        head = self.model.head()
        hidden = self.model(window[:, :-2], routing)
        drafted = self.model.draft(window[:, 1:-1], hidden, routing)
        loss = chunked_cross_entropy(hidden.flatten(0, 1), head, window[:, 1:-1].flatten())
        return loss, chunked_cross_entropy(drafted.flatten(0, 1), head, window[:, 2:].flatten())

    def update(self, rate: float) -> None:
        """One optimizer step at `rate` times the base learning rates; clears gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def balance(self, routing: Routing, rate: float) -> float:
        """Auxiliary-loss-free balancing: the bias of overloaded experts falls by `rate`, of others rises.

        Returns the batch's maximum violation, averaged over sparse layers (MTP included).
        """
        gates = [module for module in self.model.modules() if isinstance(module, Gate)]
        violations = []
        for gate, counts in zip(gates, routing.counts, strict=True):
            load = counts.float()
            gate.e_score_correction_bias += rate * (load.mean() - load).sign()
            violations.append(load.max() / load.mean() - 1)
        return float(torch.stack(violations).mean())

    def save(self, path: Path) -> None:
        """Writes a snapshot, never leaving a half-written one."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "next_step": self.next_step,
            "seconds": self.seconds,
            "config": dataclasses.asdict(self.config),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continues from a snapshot. Only `steps` may differ from it, and only before both runs' decay."""
        state = torch.load(path, weights_only=True)
        theirs, ours = state["config"], dataclasses.asdict(self.config)
        different = [key for key in ours if key != "steps" and theirs[key] != ours[key]]
        if different:
            raise ValueError(f"{path} was trained with other settings ({', '.join(different)}): use another --work-dir")
        changed = theirs["steps"] != self.config.steps
        earliest = min(self.config.decay_start, int(theirs["steps"] * (1 - self.config.decay_share)))
        if changed and state["next_step"] > earliest:
            raise ValueError(
                f"{path} is at step {state['next_step']}, after the decay began at step {earliest}: "
                f"continue with --steps {theirs['steps']}, or use another --work-dir"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.next_step, self.seconds = state["next_step"], state["seconds"]
