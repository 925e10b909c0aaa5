"""The projection on a tiny random model: modes, optimizers, and what they may not do."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.shield import Shield, Subspace, leak, protect
from recrl_lib.shield.subspaces import item_grams
from recrl_lib.tests.shield.toy import make, moved, train, train_shielded
from recrl_lib.tests.tiny import tiny_explainer

SEALED = 1e-6  # rounding of float32 adapters
OPTIMIZERS = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw, decay": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "sign of the gradient": (torch.optim.Rprop, {"lr": 0.003}),
}


def optimizer_of(explainer, name: str = "adam") -> torch.optim.Optimizer:
    kind, settings = OPTIMIZERS[name]
    return kind(explainer.adapter_parameters(), **settings)


def parameters(explainer, part: str) -> list[torch.Tensor]:
    return [p for name, p in explainer.lm.named_parameters() if part in name]


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), layers=st.sampled_from([0, 1, 2]), energy=st.floats(0.3, 0.99))
def test_mode_update_seals_the_subspace_under_any_optimizer(name, seed, layers, energy):
    explainer, _, grams = make(layers, seed)
    protected = protect(grams, energy=energy)
    optimizer = optimizer_of(explainer, name)
    Shield(explainer, protected).attach(optimizer)
    for step in range(3):
        train(explainer, optimizer, 1, seed + step)
        assert leak(explainer, protected) <= SEALED
    assert any(b.abs().max() > 0 for b in parameters(explainer, "lora_B"))  # it did learn


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99), name=st.sampled_from(["momentum", "adam", "adamw, decay"]))
def test_state_of_an_unshielded_optimizer_does_not_leak(seed, name):
    explainer, _, grams = make(2, seed)
    protected = protect(grams, energy=0.9)
    optimizer = optimizer_of(explainer, name)
    train(explainer, optimizer, 3, seed)  # its momentum points anywhere
    assert leak(explainer, protected) > 0.05
    again, _, _ = make(2, seed)
    again.load_adapter(explainer.adapter_state())
    resumed = optimizer_of(again, name)
    shield = Shield(again, protected).attach(resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, resumed, 2, seed + 1)
    assert leak(again, protected) <= SEALED
    shield.detach()
    train(again, resumed, 3)
    assert leak(again, protected) > 1e-3  # a detached shield does nothing


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99), energy=st.floats(0.5, 0.99))
def test_bf16_adapters_leak_no_more_than_their_rounding(seed, energy):
    """A is rounded to 8 bits once a step: at most 2^-8 an entry, about 4e-3 in ||A Q|| / ||A||."""
    explainer = tiny_explainer(seed, lora_layers=2, dtype=torch.bfloat16)
    items = ItemTexts(explainer, ["good film", "the red film and a blue film", "short and long"])
    protected = protect(item_grams(explainer, items)[0], energy=energy)
    for parameter in explainer.adapter_parameters():  # PEFT keeps them in float32
        parameter.data = parameter.data.bfloat16()
    train_shielded(explainer, protected)
    assert 0 < leak(explainer, protected) < 8e-3


@pytest.mark.parametrize(
    "mode, sealed", [("gradient", False), ("update", True), ("frozen_a", True)]
)
def test_modes_leak_as_they_say_while_attached(mode, sealed):
    explainer, _, grams = make()
    protected = protect(grams, energy=0.9)
    shield = train_shielded(explainer, protected, 5, mode)
    assert (leak(explainer, protected) <= SEALED) == sealed
    assert all(a.requires_grad == (mode != "frozen_a") for a in parameters(explainer, "lora_A"))
    shield.detach()
    assert all(a.requires_grad for a in parameters(explainer, "lora_A"))


def test_a_projected_gradient_seals_where_the_step_is_the_gradient():
    explainer, _, grams = make()
    protected = protect(grams, energy=0.9)
    optimizer = torch.optim.SGD(explainer.adapter_parameters(), lr=0.05)
    Shield(explainer, protected, "gradient").attach(optimizer)
    before = explainer.adapter_state()
    train(explainer, optimizer, 5)
    moved_a = [k for k, v in explainer.adapter_state().items() if not torch.equal(v, before[k])]
    assert len(moved_a) == len(before) and leak(explainer, protected) <= SEALED


def test_a_wrong_basis_does_not_protect():
    explainer, _, grams = make()
    protected = protect(grams, energy=0.9)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(7)).double()
    wrong = protect(dict.fromkeys(grams, x.T @ x), rank=protected["2.output"].rank)
    train_shielded(explainer, wrong, 5)
    assert leak(explainer, wrong) <= SEALED < 0.1 < leak(explainer, protected)


def test_with_the_whole_span_protected_items_do_not_move_and_other_texts_do():
    explainer = tiny_explainer(lora_layers=2)
    items = ItemTexts(explainer, ["good film", "bad"])  # three tokens span 3 of 32 directions
    train_shielded(explainer, protect(item_grams(explainer, items)[0], rank=3), 10)
    others = ItemTexts(explainer, ["you watched the green"])
    assert moved(items, items.base_vectors()) < 1e-5
    assert moved(others, others.base_vectors()) > 1e-3


NARROW = Subspace(torch.eye(5, 2, dtype=torch.float64), torch.ones(5))
STRANGE = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("input of width 32, basis of width 5", lambda e, p: Shield(e, dict.fromkeys(p, NARROW))),
        ("'0.attention' matches no adapter", lambda e, p: Shield(e, p | {"0.attention": NARROW})),
        ("no protected subspace for layer 1 q_proj", lambda e, p: Shield(e, {})),
        ("shield_penalty above 0", lambda e, p: Shield(e, p, "penalty")),
        ("shield_penalty above 0", lambda e, p: Shield(e, p).run_replay(1)),
        ("no LoRA layers", lambda e, p: Shield(tiny_explainer(), p)),
        ("choose one of gradient, update", lambda e, p: Shield(e, p, "magic")),
        ("lacks 8 .*, the first is layer 1 k_proj", lambda e, p: Shield(e, p).attach(STRANGE)),
    ],
)
def test_bad_input_is_named(message, wrong):
    explainer, _, grams = make()
    with pytest.raises(ValueError, match=message):
        wrong(explainer, protect(grams, energy=0.9))
