"""Cross-entropy over all items: exact in bounded memory, or sampled for catalogues where even that is too much.

Both take the table of all items, (I+1, dim) with row 0 = padding, and never score padding.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = (
    2**18
)  # logits held at a time by ``full_softmax``: 1 MiB of float32, which stays in a core's cache


class _FullSoftmax(torch.autograd.Function):
    """The gradient of softmax cross-entropy is known with its value, so no logits are kept for a backward pass."""

    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        items = table[1:]  # a view: logits of items 1..I
        grad_states, grad_table = torch.empty_like(states), torch.zeros_like(table)
        total = states.new_zeros(())
        rows = max(1, BLOCK // len(items))
        for part, target, grad in zip(
            states.split(rows), (targets - 1).split(rows), grad_states.split(rows)
        ):
            logits = part @ items.T
            highest, own = logits.amax(1, keepdim=True), logits.gather(1, target[:, None])
            weights = logits.sub_(highest).exp_()
            sums = weights.sum(1, keepdim=True)
            total += (sums.log() + highest - own).sum()
            error = weights.div_(sums)  # softmax - one-hot, the gradient of the sum by the logits
            error[torch.arange(len(target), device=error.device), target] -= 1.0
            torch.mm(error, items, out=grad)
            grad_table[1:].addmm_(error.T, part)
        ctx.save_for_backward(grad_states, grad_table)
        return total / len(states)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_states, grad_table = ctx.saved_tensors
        scale = grad / len(grad_states)
        return grad_states * scale, grad_table * scale, None


def full_softmax(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of ``targets``, int64 (N,) in 1..I, under softmax(states @ table[1:].T); states (N, dim).

    Value and gradient equal ``F.cross_entropy`` on the whole (N, I) logits, of which ``BLOCK`` exist at a time.
    """
    return _FullSoftmax.apply(states, table, targets)


def sampled_softmax(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, log_expected: Tensor
) -> Tensor:
    """Mean cross-entropy with the sum over all items estimated from ``negatives``, int64 (n,), shared by all rows.

    ``log_expected`` (n,): log(n q_j), how often item j was expected in the draw; subtracting it from the logits (the
    logQ correction, Bengio & Senecal 2008) makes the estimate of the sum unbiased,
    E[exp(s_y) + sum_{j != y} exp(s_j) / (n q_j)] = sum_i exp(s_i), for any q > 0. The target is always in the sum and
    is not corrected; its accidental draws are left out.
    """
    own = (states * table[targets]).sum(1, keepdim=True)
    logits = states @ table[negatives].T - log_expected
    logits = logits.masked_fill(targets[:, None] == negatives, -torch.inf)
    return (torch.cat([own, logits], 1).logsumexp(1, keepdim=True) - own).mean()
