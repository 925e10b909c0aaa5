"""Small real trainings for notebook 04: break the ranking on purpose, then forbid it.

The signal is the likelihood of given explanations (a supervised gradient, cheaper than PPO's); the
layers, prompts, item texts and the shield are those of the study.
"""

import torch
from torch import Tensor

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer, left_pad
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.shield.projection import Shield
from recrl_lib.shield.subspaces import Subspace


def targets(explainer: Explainer, study, explanations) -> tuple[Tensor, Tensor, Tensor]:
    """(trunk states (B, T, d), mask (B, T), ids (B, T)) of prompts followed by their explanations.

    ``explanations`` is a table with columns user, position and text. Tokens of the prompt carry no loss.
    """
    records = study.records(explanations["user"], explanations["position"])
    prompts = [prompt_ids(explainer, messages(r)) for r in records]
    answers = [
        explainer.tokenizer(t, add_special_tokens=False)["input_ids"] + [explainer.eos_id]
        for t in explanations["text"]
    ]
    ids, mask = left_pad(
        [p + a for p, a in zip(prompts, answers)], explainer.pad_id, explainer.device
    )
    labels = torch.full_like(ids, -100)
    for row, answer in enumerate(answers):
        labels[row, -len(answer) :] = ids[row, -len(answer) :]
    return explainer.trunk(ids, mask), mask, labels


def tune(
    explainer: Explainer,
    data: tuple[Tensor, Tensor, Tensor],
    steps: int,
    lr: float,
    guard: Shield | None = None,
) -> list[float]:
    """Adam on the explanations' likelihood from freshly reset adapters; the loss before each step and at the end."""
    states, mask, labels = data
    reset_adapters(explainer)
    optimizer = torch.optim.Adam(explainer.adapter_parameters(), lr=lr)
    if guard:
        guard.attach(optimizer)
    losses = []
    for step in range(steps + 1):
        logp = explainer.log_softmax(explainer.top(states, mask)[:, :-1], 1.0)
        loss = torch.nn.functional.nll_loss(
            logp.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    if guard:
        guard.detach()
    return losses


def reset_adapters(explainer: Explainer) -> None:
    """Back to the untrained adapters: B = 0 and A at the values it was created with."""
    initial = getattr(explainer, "initial_adapter", None)
    if initial is None:
        explainer.initial_adapter = explainer.adapter_state()
    else:
        explainer.load_adapter(initial)


def item_change(explainer: Explainer, items: ItemTexts, base: Tensor | None = None) -> float:
    """``‖T' - T‖ / ‖T‖`` (Frobenius) between the item vectors as tuned and the base model's."""
    base = items.base_vectors() if base is None else base
    return float((items.vectors() - base).norm() / base.norm())


@torch.no_grad()
def one_layer(
    explainer: Explainer,
    items: ItemTexts,
    prompts: list[list[int]],
    protected: dict[str, Subspace],
    n: int = 64,
) -> list[dict]:
    """How loudly the last layer's query adapter answers: ``‖s B A x‖ / ‖W x‖`` over item-text and prompt inputs.

    Inputs are what the base model feeds that layer, so this looks at the layer alone. Rows: name, value.
    """
    key, module = next(
        (key, m)
        for _, key, m in explainer.adapted_modules()
        if key == f"{explainer.n_layers - 1}.attention"
    )
    basis = protected[key].basis
    a, b, s = (
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        module.scaling["default"],
    )
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        with explainer.reference():
            for (_, ids), states in list(zip(items.batches, items.states()))[-2:]:
                explainer.top(
                    states.to(explainer.device), torch.ones_like(ids, device=explainer.device)
                )
            item_x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
            inputs.clear()
            ids, mask = left_pad(prompts[:n], explainer.pad_id, explainer.device)
            explainer.top(explainer.trunk(ids, mask), mask)
            prompt_x = inputs[0][mask]
    finally:
        hook.remove()
    q = basis.to(item_x)
    rows = {
        "item texts": item_x,
        "prompts": prompt_x,
        "prompts, part inside Q": prompt_x @ q @ q.T,
        "prompts, part outside Q": prompt_x - prompt_x @ q @ q.T,
    }
    return [
        {"name": name, "value": float((s * x @ a.T @ b.T).norm() / module.base_layer(x).norm())}
        for name, x in rows.items()
    ]
