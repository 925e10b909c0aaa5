"""The judge's measure of faithfulness: how far a film falls without what its explanation cites.

Training sees neither this measure nor this reading of a text: titles are looked for word by word,
and what counts is places in the ranking of all unseen films.
"""

import re
from collections.abc import Sequence

import numpy as np

from recrl_lib.explainer.prompts import Record
from recrl_lib.ranker.ranking import ranks_of, score_chunks
from recrl_lib.scoring.claims import title_pattern
from recrl_lib.study import Study

DRAWS = 4  # random sets of shown films that a text's cited films are compared with


def cited(record: Record, text: str) -> list[int]:
    """Places in the history of the titles that stand in ``text``, the longest read first.

    Titles of one word must have their capital. What stands inside a longer title of the record, the
    recommended one included, is not cited.
    """

    def form(title: str) -> str:
        return f"(?i:{re.escape(title)})" if " " in title else re.escape(title)

    titles = title_pattern({record["title"], *record["history_titles"]}, form)
    found = re.findall(titles, text)
    named = {match.lower() for match in found} - {record["title"].lower()}
    return [j for j, title in enumerate(record["history_titles"]) if title.lower() in named]


def rank_drop(
    study: Study, records: Sequence[Record], texts: Sequence[str], seed: int
) -> np.ndarray:
    """Places (n,) that each recommended film loses in the ranking without the films that its text
    cites, less the mean of ``DRAWS`` random sets of as many shown films; 0 where none is cited.

    Ranked are the films that the user has not seen: those taken out of the history stay out. A
    record's random sets depend on ``seed``, user and item alone, so that arms share them.
    """
    seen, read, items, about = [], [], [], []
    for row, (record, text) in enumerate(zip(records, texts, strict=True)):
        if not (named := cited(record, text)):
            continue
        history, n = study.split.with_valid[record["user"]], len(record["history_titles"])
        rng = np.random.default_rng([seed, record["user"], record["item"]])
        draws = (rng.choice(n, len(named), replace=False) for _ in range(DRAWS))
        for taken in (named, *draws):
            seen.append(history)
            read.append(np.delete(history, len(history) - n + np.asarray(taken)))
        items += [record["item"]] * (1 + DRAWS)
        about.append(row)
    out = np.zeros(len(texts))
    if about:
        scored = score_chunks(study.ranker, read, study.text)
        ranks = ranks_of(scored, seen, np.array(items)).reshape(-1, 1 + DRAWS)
        out[about] = ranks[:, 0] - ranks[:, 1:].mean(1)
    return out
