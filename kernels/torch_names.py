"""Functions that torch renamed between the releases that moesaic runs with, under one name. Calls none of them."""

from __future__ import annotations

import torch.distributed as dist

# torch 2.13 renamed all_gather_into_tensor; earlier releases know only the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
