"""The judge's measure of faithfulness: how far a film falls without what its explanation cites.

Training sees neither this measure nor this reading of a text: titles are looked for word by word,
and what counts is places in the ranking of all films.
"""

import re
from collections.abc import Sequence

import numpy as np

from recrl_lib.explainer.prompts import Record
from recrl_lib.ranker.ranking import target_ranks
from recrl_lib.study import Study

DRAWS = 4  # random sets of shown films that a text's cited films are compared with


def cited(record: Record, text: str) -> list[int]:
    """Places in the history of the titles that stand in ``text``, the longest read first.

    What stands inside a longer title of the record, the recommended one included, is not cited.
    """
    titles = sorted({record["title"], *record["history_titles"]}, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(title)}(?!\w)" for title in titles)
    found = {match.lower() for match in re.findall(pattern, text, re.IGNORECASE)}
    named = enumerate(record["history_titles"])
    return [j for j, title in named if title.lower() in found - {record["title"].lower()}]


def rank_drop(
    study: Study, records: Sequence[Record], texts: Sequence[str], rng: np.random.Generator
) -> np.ndarray:
    """Places (n,) that each recommended film loses in the ranking of all films without the cited
    films, less the mean of ``DRAWS`` random sets of as many shown films; 0 where none is cited."""
    histories, items, texts_of = [], [], []
    for row, (record, text) in enumerate(zip(records, texts, strict=True)):
        if not (named := cited(record, text)):
            continue
        history, n = study.split.with_valid[record["user"]], len(record["history_titles"])
        draws = [rng.choice(n, len(named), replace=False) for _ in range(DRAWS)]
        for taken in (named, *draws):
            histories.append(np.delete(history, len(history) - n + np.asarray(taken)))
        items += [record["item"]] * (1 + DRAWS)
        texts_of.append(row)
    out = np.zeros(len(texts))
    if histories:
        ranks = target_ranks(study.ranker, histories, np.array(items), study.text)
        ranks = ranks.reshape(-1, 1 + DRAWS)
        out[texts_of] = ranks[:, 0] - ranks[:, 1:].mean(1)
    return out
