"""A random study of 20 users and 30 films with a 3-layer language model: for unit tests only."""

import numpy as np
import pandas as pd

from recrl_lib import study
from recrl_lib.data.splits import Split
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.model import Explainer
from recrl_lib.ranker import sasrec
from recrl_lib.ranker.ranking import top_k
from recrl_lib.tests.tiny import WORDS, tiny_explainer

USERS, ITEMS = 20, 30


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def toy_study() -> tuple[study.Study, Explainer]:
    """Users 0-5 are PPO's, 6-17 held out, 18-19 for validation; a fifth of the films is new."""
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3, replace=False)).title() for _ in range(ITEMS)]
    facts = {"title": titles, "year": 1990, "genres": "Drama|Comedy"}
    items = pd.DataFrame({"item": np.arange(1, ITEMS + 1), **facts})
    items["text"] = items["title"].str.lower()
    histories = [rng.permutation(np.arange(1, ITEMS + 1))[:10] for _ in range(USERS)]
    last, test = (np.array([h[i] for h in histories]) for i in (-2, -1))
    split = Split([h[:-2] for h in histories], last, test)
    explainer = tiny_explainer(lora_layers=1)
    text = ItemTexts(explainer, items["text"].tolist()).base_vectors()
    model = sasrec.SASRec(ITEMS, 16, 1, 2, 10, 0.0, text_dim=text.shape[1])
    model.fit_text(text)
    sasrec.freeze(model)
    users = pd.DataFrame({"user": range(USERS), "gender": ["F", "M"] * (USERS // 2), "age": 30})
    top = top_k(model, split.with_valid, text, 10)
    ppo, heldout, validation = np.split(np.arange(USERS), [6, 18])
    groups = {"ppo_users": ppo, "heldout_users": heldout, "validation_users": validation}
    made = study.Study(
        items=items, users=users, split=split, heldout_items=study.held_out(ITEMS, 0.2, 0),
        ranker=model, text=text, top=top, catalogue=study.catalogue_of(items), history_length=3,
        **groups,
    )  # fmt: skip
    return made, explainer
