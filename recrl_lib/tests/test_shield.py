import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib import shield as sh
from recrl_lib.explainer import ItemTexts
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly

TEXTS = ["good film", "the red film and a blue film", "bad", "good film of the long", "a green film", "short and long"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw, decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.fixture
def setting():
    return make(2)


def make(layers: int, seed: int = 0):
    explainer = tiny_explainer(seed, lora_layers=layers)
    items = ItemTexts(explainer, TEXTS)
    return explainer, items, sh.item_grams(explainer, items)[0]


def train(explainer, optimizer, steps: int, seed: int = 0) -> None:
    """Likelihood of random sequences: a gradient with nothing in common with the item texts."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(3, 20, (4, 10), generator=generator)
        mask = torch.ones_like(ids)
        logp = explainer.log_softmax(explainer.top(explainer.trunk(ids, mask), mask), 1.0)
        optimizer.zero_grad()
        (-logp[:, :-1].gather(-1, ids[:, 1:, None]).mean()).backward()
        optimizer.step()


def test_gram_is_the_sum_of_outer_products(setting):
    explainer, items, grams = setting
    inputs = []
    hook = explainer.lm.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    for text in TEXTS:
        ids = torch.tensor([explainer.tokenizer(text, add_special_tokens=False)["input_ids"]])
        explainer.lm(input_ids=ids)
    hook.remove()
    x = torch.cat([i.reshape(-1, 32) for i in inputs]).double()
    torch.testing.assert_close(grams["1.attention"], sum(torch.outer(v, v) for v in x), atol=1e-4, rtol=1e-5)


def test_gram_ignores_padding_and_tuning(setting):
    explainer, _, _ = setting
    both, tokens = sh.prompt_grams(explainer, [[4, 5, 6, 7], [8, 9]])
    alone = [sh.prompt_grams(explainer, [p])[0] for p in ([4, 5, 6, 7], [8, 9])]
    assert tokens == 6
    for name in both:
        torch.testing.assert_close(both[name], alone[0][name] + alone[1][name], atol=1e-4, rtol=1e-5)
    tune_randomly(explainer)
    assert torch.equal(sh.prompt_grams(explainer, [[4, 5, 6, 7], [8, 9]])[0]["2.output"], both["2.output"])


def test_held_out_items_stay_out_of_the_gram(setting):
    explainer, items, grams = setting
    some, tokens = sh.item_grams(explainer, items, only={1, 3})
    rest, others = sh.item_grams(explainer, items, only={2, 4, 5, 6})
    assert tokens == 3 and others == sum(len(t.split()) for t in TEXTS) - 3
    torch.testing.assert_close(some["2.attention"] + rest["2.attention"], grams["2.attention"], atol=1e-4, rtol=1e-5)


def test_subspaces_hold_the_energy_asked_for_with_the_fewest_directions():
    gram = torch.diag(torch.tensor([1.0, 6.0, 0.0, 3.0], dtype=torch.float64))
    found = sh.subspaces({"x": gram}, energy=0.9)["x"]
    assert found.rank == 2 and found.energy == pytest.approx(0.9)
    assert sh.subspaces({"x": gram}, energy=0.59)["x"].rank == 1
    assert sh.subspaces({"x": gram}, energy=0.61)["x"].rank == 2
    assert sh.subspaces({"x": gram}, energy=0.0)["x"].rank == 0
    assert sh.subspaces({"x": gram}, energy=0.0, rank=3)["x"].rank == 3
    assert found.holds(gram) == pytest.approx(0.9)
    assert found.holds(torch.eye(4, dtype=torch.float64)) == pytest.approx(0.5)


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(ValueError, match="nothing to learn"):
        sh.subspaces({"x": torch.eye(4, dtype=torch.float64)}, energy=0.5, rank=4)
    with pytest.raises(ValueError, match="not finite"):
        sh.subspaces({"x": torch.full((2, 2), float("nan"), dtype=torch.float64)}, energy=0.5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), layers=st.sampled_from([0, 1, 2]), energy=st.floats(0.3, 0.99))
def test_update_mode_seals_the_subspace_under_any_optimizer(name, seed, layers, energy):
    explainer, _, grams = make(layers, seed)
    protected = sh.subspaces(grams, energy)
    optimizer = OPTIMIZERS[name](explainer.adapter_parameters())
    sh.Shield(explainer, protected).attach(optimizer)
    for step in range(3):
        train(explainer, optimizer, 1, seed + step)
        assert sh.leak(explainer, protected) <= 1e-6
    assert any(p.abs().max() > 0 for t in sh._targets(explainer, protected) for p in [t.b])  # it did learn


def test_gradient_mode_leaks_under_adam_and_a_wrong_basis_does_not_protect(setting):
    explainer, _, grams = setting
    protected = sh.subspaces(grams, 0.9)
    optimizer = OPTIMIZERS["adam"](explainer.adapter_parameters())
    sh.Shield(explainer, protected, "gradient").attach(optimizer)
    train(explainer, optimizer, 5)
    assert sh.leak(explainer, protected) > 1e-3

    explainer, _, _ = make(2)
    generator = torch.Generator().manual_seed(0)
    wrong = {
        n: sh.Subspace(torch.linalg.qr(torch.randn(s.width, s.rank, generator=generator, dtype=torch.float64))[0], s.spectrum)
        for n, s in protected.items()
    }
    optimizer = OPTIMIZERS["adam"](explainer.adapter_parameters())
    sh.Shield(explainer, wrong).attach(optimizer)
    train(explainer, optimizer, 5)
    assert sh.leak(explainer, wrong) <= 1e-6 < 0.1 < sh.leak(explainer, protected)


def test_unshielded_leaks_and_moves_items_more_than_shielded(setting):
    def moved(shielded: bool) -> tuple[float, float]:
        explainer, items, grams = make(2)
        protected, base = sh.subspaces(grams, 0.999), items.base_vectors()
        optimizer = OPTIMIZERS["adam"](explainer.adapter_parameters())
        if shielded:
            sh.Shield(explainer, protected).attach(optimizer)
        train(explainer, optimizer, 10)
        return sh.leak(explainer, protected), float((items.vectors() - base).norm() / base.norm())

    free, sealed = moved(False), moved(True)
    assert free[0] > 0.3 and sealed[0] <= 1e-6
    assert sealed[1] < 0.5 * free[1]


def test_with_the_whole_span_protected_item_vectors_do_not_move():
    explainer = tiny_explainer(lora_layers=2)
    items = ItemTexts(explainer, ["good film", "bad"])  # three tokens: their inputs span at most 3 of 32 directions
    protected = sh.subspaces(sh.item_grams(explainer, items)[0], 0.0, rank=3)
    base = items.base_vectors()
    optimizer = OPTIMIZERS["adam"](explainer.adapter_parameters())
    sh.Shield(explainer, protected).attach(optimizer)
    train(explainer, optimizer, 10)
    ids = torch.tensor([[4, 5, 6, 9]])
    with_adapter = explainer.top(explainer.trunk(ids, torch.ones_like(ids)), torch.ones_like(ids))
    with explainer.reference():
        without = explainer.top(explainer.trunk(ids, torch.ones_like(ids)), torch.ones_like(ids))
    assert (with_adapter - without).abs().max() > 1e-3  # the model did change elsewhere
    assert (items.vectors() - base).norm() / base.norm() < 1e-5


def test_frozen_a_trains_b_only_and_detach_gives_a_back(setting):
    explainer, _, grams = setting
    protected = sh.subspaces(grams, 0.9)
    optimizer = OPTIMIZERS["adam"](explainer.adapter_parameters())
    shield = sh.Shield(explainer, protected, "frozen_a").attach(optimizer)
    before = [t.a.clone() for t in sh._targets(explainer, protected)]
    train(explainer, optimizer, 3)
    assert all(torch.equal(t.a, a) for t, a in zip(sh._targets(explainer, protected), before))
    assert sh.leak(explainer, protected) <= 1e-6
    shield.detach()
    assert all(t.a.requires_grad for t in sh._targets(explainer, protected))


def test_stale_optimizer_state_does_not_leak(setting):
    explainer, _, grams = setting
    protected = sh.subspaces(grams, 0.9)
    optimizer = OPTIMIZERS["adam"](explainer.adapter_parameters())
    train(explainer, optimizer, 5)  # momentum from before the shield points into the protected subspace
    assert sh.leak(explainer, protected) > 0.1
    sh.Shield(explainer, protected).attach(optimizer)
    train(explainer, optimizer, 1)
    assert sh.leak(explainer, protected) <= 1e-6


def test_detached_shield_does_nothing(setting):
    explainer, _, grams = setting
    protected = sh.subspaces(grams, 0.9)
    optimizer = OPTIMIZERS["adam"](explainer.adapter_parameters())
    shield = sh.Shield(explainer, protected).attach(optimizer)
    train(explainer, optimizer, 1)
    shield.detach()
    train(explainer, optimizer, 3)
    assert sh.leak(explainer, protected) > 1e-3


def test_attaches_to_the_optimizer_inside_accelerate(setting):
    from accelerate import Accelerator

    explainer, _, grams = setting
    protected = sh.subspaces(grams, 0.9)
    optimizer = Accelerator(cpu=True).prepare(OPTIMIZERS["adam"](explainer.adapter_parameters()))
    sh.Shield(explainer, protected).attach(optimizer)
    train(explainer, optimizer, 2)
    assert sh.leak(explainer, protected) <= 1e-6


def test_clear_errors(setting):
    explainer, _, grams = setting
    protected = sh.subspaces(grams, 0.9)
    with pytest.raises(ValueError, match="does not hold"):
        sh.Shield(explainer, protected).attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(ValueError, match="has width 32, its basis has width 5"):
        sh.Shield(explainer, {n: sh.Subspace(torch.eye(5, 2, dtype=torch.float64), torch.ones(5)) for n in protected})
    with pytest.raises(ValueError, match="another LoRA setting"):
        sh.Shield(explainer, {"0.attention": protected["1.attention"]})
    with pytest.raises(ValueError, match="call add_lora"):
        sh.Shield(tiny_explainer(), protected)
    with pytest.raises(ValueError, match="choose one of"):
        sh.Shield(explainer, protected, "magic")
    shield = sh.Shield(explainer, protected).attach(OPTIMIZERS["sgd"](explainer.adapter_parameters()))
    with pytest.raises(RuntimeError, match="attached already"):
        shield.attach(OPTIMIZERS["sgd"](explainer.adapter_parameters()))


def test_tensor_round_trip_keeps_layer_order(setting):
    _, _, grams = setting
    protected = sh.subspaces(grams, 0.9)
    again = sh.from_tensors(sh.to_tensors(protected))
    assert list(again) == ["1.attention", "1.output", "2.attention", "2.output"]
    assert all(torch.equal(again[n].basis, protected[n].basis) for n in protected)
