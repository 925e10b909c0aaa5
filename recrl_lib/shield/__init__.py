"""The gradient shield: tune LoRA adapters without changing what the model computes for given texts.

It works alone, on any PEFT model with LoRA layers and any ``torch.optim.Optimizer``. ``texts``
below are the inputs that the tuning must not change: mappings for ``model(**batch)``, with
``input_ids`` and, where rows are padded, ``attention_mask``, both (B, T).

A plain training loop::

    protected = protect(collect_grams(model, texts), energy=0.99)
    shield = Shield(model, protected).attach(optimizer)  # before the first optimizer.step()
    ...  # the loop, unchanged
    print(leak(model, protected))  # share of the update that the texts can feel: rounding only

A trainer of TRL or transformers::

    protected = protect(collect_grams(model, texts), energy=0.99)
    trainer.add_callback(Shield(model, protected).callback())
    trainer.train()

``energy`` is the share of the texts' activation energy to protect: more of it moves them less and
leaves less room to learn. ``projection`` has the theorem and the modes, ``subspaces`` the ways to
choose directions, ``replay`` a penalty that may stand beside the projection.

May import: explainer, and what it imports; nothing of them while it is being imported itself.
"""

from recrl_lib.shield.projection import MODES, Shield, leak
from recrl_lib.shield.replay import Replay
from recrl_lib.shield.subspaces import Subspace, collect_grams, protect

__all__ = ["MODES", "Replay", "Shield", "Subspace", "collect_grams", "leak", "protect"]
