"""Gram matrices of layer inputs and the directions chosen from them, against plain formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from recrl_lib.explainer.model import left_pad
from recrl_lib.shield import leak, protect, subspaces
from recrl_lib.tests.shield.toy import TEXTS, make, train_shielded
from recrl_lib.tests.tiny import tune_randomly


def prompt_grams(explainer, prompts: list[list[int]]):
    ids, mask = left_pad(prompts, explainer.pad_id, "cpu")
    return subspaces.state_grams(explainer, [(explainer.trunk(ids, mask), mask)])


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("only, n_tokens", [(None, 21), ({1, 3}, 3)])
def test_a_gram_is_the_sum_of_outer_products_of_the_items_asked_for(only, n_tokens):
    explainer, items, _ = make()
    inputs = []
    layer = explainer.lm.model.layers[1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda m, a: inputs.append(a[0][0].double()))
    for number, text in enumerate(TEXTS.split("|"), 1):
        if only is None or number in only:
            ids = explainer.tokenizer(text, add_special_tokens=False)["input_ids"]
            explainer.lm(input_ids=torch.tensor([ids]))
    hook.remove()
    grams, tokens = subspaces.item_grams(explainer, items, only)
    expected = sum(x.T @ x for x in inputs)
    torch.testing.assert_close(grams["1.attention"], expected, atol=1e-4, rtol=1e-5)
    assert tokens == n_tokens


def test_grams_ignore_padding_and_tuning():
    explainer, _, _ = make()
    prompts = [[4, 5, 6, 7], [8, 9]]
    both, tokens = prompt_grams(explainer, prompts)
    alone = [prompt_grams(explainer, [p])[0] for p in prompts]
    assert tokens == 6
    for name, gram in both.items():
        torch.testing.assert_close(gram, alone[0][name] + alone[1][name], atol=1e-4, rtol=1e-5)
    tune_randomly(explainer)
    again = prompt_grams(explainer, prompts)[0]
    assert torch.equal(again["2.output"], both["2.output"])


@pytest.mark.parametrize(
    "energy, rank, k", [(0.9, 0, 2), (0.59, 0, 1), (0.61, 0, 2), (0.0, 0, 0), (0.0, 3, 3)]
)
def test_the_fewest_directions_hold_the_energy_asked_for(energy, rank, k):
    gram = diagonal(1, 6, 0, 3)
    found = protect({"x": gram}, energy=energy, rank=rank)["x"]
    assert found.rank == k and found.width == 4 and found.energy >= energy - 1e-12
    assert found.holds(gram) == pytest.approx(found.energy)
    assert found.holds(torch.eye(4)) == pytest.approx(k / 4)


@pytest.mark.parametrize(
    "message, grams, rank",
    [
        ("nothing to learn", torch.eye(4).double(), 4),
        ("not finite", torch.full((2, 2), float("nan")).double(), 0),
    ],
)
def test_bad_input_is_named(message, grams, rank):
    with pytest.raises(ValueError, match=message):
        protect({"x": grams}, 0.5, rank)


@pytest.mark.parametrize("contrastive", [False, True])
def test_every_basis_is_a_frame_that_seals(contrastive):
    explainer, _, grams = make()
    prompts = prompt_grams(explainer, [[4, 5, 6, 7], [12, 13, 1, 2], [15, 16, 17, 18]])[0]
    protected = protect(grams, 0.5, 9, prompts if contrastive else None)
    protected = subspaces.from_tensors(subspaces.to_tensors(protected))
    for name, space in protected.items():
        eye = space.basis.T @ space.basis
        torch.testing.assert_close(eye, torch.eye(9).double(), atol=1e-9, rtol=0)
        assert space.energy == pytest.approx(space.holds(grams[name])), name
        assert float(space.spectrum.sum()) == pytest.approx(float(grams[name].trace()))
    train_shielded(explainer, protected)
    assert leak(explainer, protected) <= 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), free=st.integers(1, 12))
def test_contrastive_frees_the_space_whose_worst_direction_is_the_best(seed, free):
    """Courant and Fischer: no other m directions have a larger least ratio of the energies."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, -2, 24, dtype=torch.float64).exp()  # items and explanations alike
    x, y = torch.randn(2, 100, 24, generator=generator, dtype=torch.float64) * spread
    items, prompts = x.T @ x, y.T @ y
    ridged = items + 1e-3 * items.trace() / 24 * torch.eye(24, dtype=torch.float64)

    def worst(space: torch.Tensor) -> float:
        ratio = [(space.T @ gram @ space).numpy() for gram in (prompts, ridged)]
        return eigh(*ratio, eigvals_only=True)[0]

    rival = torch.linalg.qr(torch.randn(24, free, generator=generator, dtype=torch.float64))[0]
    best = worst(subspaces.contrastive_frame(prompts, items)[:, -free:])
    for other in (rival, torch.linalg.eigh(items)[1][:, :free]):
        assert best >= worst(other) - 1e-9
    assert best == pytest.approx(eigh(prompts.numpy(), ridged.numpy(), eigvals_only=True)[-free])
