"""Muon for matrices, AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found with a quintic
Newton-Schulz iteration. Stacked experts are orthogonalised as a batch, one matrix per expert. Embeddings, norms and
gates are AdamW's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """[..., rows, columns] -> the same shape in bfloat16, all singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


OUTPUT_RATE = 0.1
"""Factor on the learning rate of matrices that write into the residual stream. At the full rate their outputs outgrow
the small embeddings within a hundred steps, and the layers above no longer see which token they are at."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay. Parameters are [..., out, in]."""

    def __init__(self, parameters: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonalise(parameter.grad.lerp(momentum, MOMENTUM))
                scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, *, matrix_lr: float, other_lr: float, gate_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """[Muon over the matrices, AdamW over embeddings and norms and, more slowly, gates]."""
    matrices, outputs, gates, others = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            gates.append(parameter)
        elif parameter.ndim < 2 or name.startswith("embed_tokens"):
            others.append(parameter)
        elif name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
            outputs.append(parameter)
        else:
            matrices.append(parameter)
    muon_groups = [{"params": matrices, "lr": matrix_lr}, {"params": outputs, "lr": matrix_lr * OUTPUT_RATE}]
    groups = [{"params": others, "lr": other_lr}, {"params": gates, "lr": gate_lr}]
    return [
        Muon(muon_groups, lr=matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, foreach=True),
    ]
