import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.ranker import softmax

N, ITEMS, DIM = 7, 11, 4


def drawn(seed=0, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, DIM, generator=generator, dtype=dtype, requires_grad=True)
    table = torch.randn(ITEMS + 1, DIM, generator=generator, dtype=dtype)
    table[0] = 50.0  # padding must never be scored
    targets = torch.randint(1, ITEMS + 1, (n,), generator=generator)
    return states, table.requires_grad_(), targets


def plain(states, table, targets):
    return F.cross_entropy(states @ table[1:].T, targets - 1)


@given(block=st.integers(1, 100), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_full_softmax_is_exact_in_blocks_of_any_size(block, seed):
    before, softmax.BLOCK = softmax.BLOCK, block
    try:
        inputs = drawn(seed)
        ours, theirs = (
            torch.autograd.grad(3.0 * f(*inputs), inputs[:2]) for f in (softmax.full_softmax, plain)
        )
        assert softmax.full_softmax(*inputs).item() == pytest.approx(
            plain(*inputs).item(), rel=1e-12
        )
    finally:
        softmax.BLOCK = before
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert ours[1][0].abs().max() == 0  # padding learns nothing


def test_full_softmax_gradient_by_finite_differences():
    states, table, targets = drawn()
    assert torch.autograd.gradcheck(
        lambda s, t: softmax.full_softmax(s, t, targets), (states, table)
    )


def test_full_softmax_stands_large_scores():
    states, table, targets = drawn(dtype=torch.float32)
    loss = softmax.full_softmax(states * 1e4, table, targets)
    assert loss.isfinite() and all(
        g.isfinite().all() for g in torch.autograd.grad(loss, (states, table))
    )


def estimated_sums(states, table, targets, noise, n, draws, seed=0):
    """exp(loss + own score), the estimate of the sum over all items, of one row under many draws."""
    generator = torch.Generator().manual_seed(seed)
    own = (states[0] @ table[targets[0]]).item()
    out = []
    for _ in range(draws):
        negatives = torch.multinomial(noise, n, replacement=True, generator=generator)
        loss = softmax.sampled_softmax(
            states[:1], table, targets[:1], negatives, (n * noise[negatives]).log()
        )
        out.append(torch.exp(loss.detach() + own))
    return torch.stack(out)


def test_sampled_sum_is_unbiased_whatever_the_noise():
    states, table, targets = drawn(n=1)
    noise = torch.cat([torch.zeros(1), torch.arange(1, ITEMS + 1)]).double()
    noise /= noise.sum()
    exact = (states[0] @ table[1:].T).exp().sum().item()
    estimates = estimated_sums(states, table, targets, noise, n=5, draws=4000)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - exact) < 4 * error and error < 0.1 * exact
    # Without the correction the same draws miss by far more: the test can fail.
    uncorrected = torch.full_like(noise, 1 / ITEMS)
    uncorrected[0] = 0
    generator = torch.Generator().manual_seed(0)
    negatives = torch.multinomial(noise, 4000, replacement=True, generator=generator)
    loss = softmax.sampled_softmax(
        states, table, targets, negatives, (4000 * uncorrected[negatives]).log()
    )
    wrong = torch.exp(loss + states[0] @ table[targets[0]]).item()
    assert abs(wrong - exact) > 8 * error


def test_sampled_gradient_nears_the_full_one_with_more_negatives():
    states, table, targets = drawn()
    noise = torch.cat([torch.zeros(1), torch.ones(ITEMS)]).double() / ITEMS
    full = torch.cat(
        [g.flatten() for g in torch.autograd.grad(plain(states, table, targets), (states, table))]
    )
    cosines = []
    for n in (4, 64, 4096):
        negatives = torch.multinomial(
            noise, n, replacement=True, generator=torch.Generator().manual_seed(1)
        )
        loss = softmax.sampled_softmax(
            states, table, targets, negatives, (n * noise[negatives]).log()
        )
        sampled = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (states, table))])
        cosines.append(F.cosine_similarity(sampled, full, dim=0).item())
    assert 0.5 < cosines[0] < cosines[1] < cosines[2] and cosines[2] > 0.995


def test_every_item_drawn_once_gives_the_full_softmax():
    states, table, targets = drawn()
    everything, none_repeated = torch.arange(1, ITEMS + 1), torch.zeros(ITEMS, dtype=torch.float64)
    ours = softmax.sampled_softmax(states, table, targets, everything, none_repeated)
    assert ours.item() == pytest.approx(plain(states, table, targets).item(), rel=1e-12)
