"""Texts composed by rule, true by construction, and controls that must not win.

A warm start imitates lines that cite films at random; those of the other rules are rivals. Controls
are what a policy might drift to if a measure could be fooled: it must beat each of them.
"""

from collections.abc import Sequence

import numpy as np

from recrl_lib.explainer.prompts import NOUNS, Record, real_genres
from recrl_lib.scoring import answers

_OPENINGS = (
    "Because you {did} {history}, I recommend {film}, {what}.",
    "I recommend {film} because you {did} {history}; it is {what}.",
    "You {did} {history}, so I think you will like {film}, {what}.",
)
_PRAISE = (
    "This is a great film that you will surely love and enjoy with your friends and family tonight."
)
_RAMBLE = (
    "ou will love it because it is the kind of thing that people who like such things tend to "
    "like, and the more you think of it the more it becomes clear that it is what you want to see "
    "when you come home and have the time"
)

# similar: to the recommended film, by the ranker's item vectors; oracle: what moved the ranker.
RULES = ("random", "recent", "genre", "similar", "oracle")


def _values(record: Record, rule: str) -> Sequence[float]:
    """What ``rule`` goes by, a number a history film."""
    genres, shown = set(real_genres(record)), range(len(record["history_titles"]))
    if rule == "random":
        return np.random.default_rng([record["user"], record["item"]]).random(len(shown)).tolist()
    if rule == "recent":
        return shown
    if rule == "genre":
        return [len(genres & set(own)) for own in record["history_genres"]]
    return record["history_similarity" if rule == "similar" else "history_weights"]


def cited_by(rule: str, record: Record) -> list[int]:
    """The one or two history films that a rule of ``RULES`` cites, as places in the history: those
    with the largest values, the later one of equals."""
    values = _values(record, rule)
    best = sorted(range(len(values)), key=lambda j: (-values[j], -j))[:2]
    # The oracle cites a second film only if it moved the ranker.
    return best[:1] if rule == "oracle" and values[best[-1]] <= 0 else best


def composed_line(record: Record, rule: str = "random") -> str:
    """An explanation that names the item, its year and genres, and what ``rule`` cites; a true
    answer to a follow-up."""
    if record.get("intent", "why") != "why":
        return answers.composed_answer(record)
    genres, noun = real_genres(record), record.get("noun", "film")
    titles = (record["history_titles"][j] for j in cited_by(rule, record))
    history = " and ".join(dict.fromkeys(titles))
    film = record["title"] + (f" ({record['year']})" if record["year"] else "")
    *most, last = [g.lower().replace("film-noir", "film noir") for g in genres] or [""]
    kind = " and ".join(filter(None, [", ".join(most), last]))
    what = f"{kind} {noun}" if kind else f"{noun} in the same vein"
    what = f"{'an' if what[0] in ('aeiou' if kind else 'i') else 'a'} {what}"
    if not history:
        return f"I recommend {film}, {what}."
    opening = _OPENINGS[(record["user"] + record["item"]) % len(_OPENINGS)]
    return opening.format(history=history, film=film, what=what, did=NOUNS[noun][1])


def control_texts(records: Sequence[Record], prompts: Sequence[str]) -> dict[str, list[str]]:
    """The controls, one text a record (of two or more); ``prompts`` are the users' questions."""
    n = len(records)
    said = [[r["title"], *dict.fromkeys(r["history_titles"]), *real_genres(r)] for r in records]
    return {
        "empty": [""] * n,
        "constant": [_PRAISE] * n,
        "longest": [f"Y{_RAMBLE}, and y{_RAMBLE}, so y{_RAMBLE}."] * n,  # about nothing
        "keywords": [" and ".join(true) + "." for true in said],
        "another_item": [composed_line(records[(i + 1) % n]) for i in range(n)],
        "copied_prompt": list(prompts),
    }
