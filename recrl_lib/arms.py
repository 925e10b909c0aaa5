"""One arm of the study, from the base model to its final adapter: warm start, merge, Shielded PPO.

An arm is stored as one adapter on the *base* model (``load_tuned``), whatever happened on the way, so
that its leak, its item vectors and its KL are all measured against the same model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recrl_lib import explainer as ex
from recrl_lib import ppo, warmstart
from recrl_lib.config import Params
from recrl_lib.explainer import Explainer
from recrl_lib.shield import Shield, Subspace, leak
from recrl_lib.study import Study

TRAINED = ("unshielded", "shielded")


@dataclass
class Arm:
    """What training left: ``adapter`` for ``load_tuned``, a row per PPO iteration, a row per warm-start step."""

    name: str
    adapter: dict[str, Tensor]
    curve: list[dict]
    warm_curve: list[dict]
    leak: float          # of the whole update, against the subspaces given, shielded or not
    frozen_intact: bool  # training itself never touched a frozen weight


def train(
    name: str, world: Study, params: Params, protected: dict[str, Subspace], reward, seeds: dict[str, int],
    device: torch.device | str = "cpu",
) -> Arm:
    """Tune arm ``name``, ``unshielded`` or ``shielded``. ``seeds``: lora, warm, ppo; equal seeds make arms comparable."""
    if name not in TRAINED:
        raise ValueError(f"arm {name!r}: only {', '.join(TRAINED)} are trained")
    explainer = ex.load_for(params, seeds["lora"], device)
    records = world.training_records()

    def guard() -> Shield | None:
        return Shield(explainer, protected, params.shield_mode) if name == "shielded" else None

    before = ex.weights_sha256(explainer)
    first, warm_curve, intact = None, [], True
    if params.warm_start:
        fresh = explainer.adapter_state()
        warm_curve = warmstart.fit(
            explainer, records, params.warm_steps, params.warm_batch, params.warm_lr, seeds["warm"], guard(), f"warm start, {name}"
        )
        intact = ex.weights_sha256(explainer) == before
        first = warmstart.merge(explainer, fresh)
        before = ex.weights_sha256(explainer)
    curve = ppo.PPO(explainer, reward, records, params, seeds["ppo"], guard()).train(params.ppo_steps, f"ppo, {name}")
    intact = intact and ex.weights_sha256(explainer) == before
    second = explainer.adapter_state()
    adapter = warmstart.stack(first, second) if first else second
    del explainer
    return Arm(name, adapter, curve, warm_curve, leak(load_tuned(params, adapter, device), protected), intact)


def load_tuned(params: Params, adapter: dict[str, Tensor] | None = None, device: torch.device | str = "cpu") -> Explainer:
    """The base model with adapters of an arm's final shape: rank 2r after a warm start, else r. B = 0 without ``adapter``."""
    parts = 2 if params.warm_start else 1
    explainer = ex.load(params.llm, device).add_lora(params.lora_rank * parts, params.lora_alpha * parts, params.lora_layers, seed=0)
    if adapter is not None:
        explainer.load_adapter(adapter)
    return explainer
