"""Sums over data-parallel processes, and means over the tokens of a mask on all of them."""

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """(rank of this process, number of processes) of a data-parallel training."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def total(x: Tensor, largest: bool = False) -> Tensor:
    """Sum (or maximum) of ``x`` over the processes, in place; with one process, ``x``."""
    if processes()[1] > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return x


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked entries of all processes."""
    return total((x * mask).sum()) / total(mask.sum())


def variance(x: Tensor, mask: Tensor) -> Tensor:
    return mean((x - mean(x, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked entries of all processes; 0 elsewhere."""
    return (x - mean(x, mask)) * torch.rsqrt(variance(x, mask) + 1e-8) * mask
