"""Texts composed by rule.

Reference lines, true by construction, are the ceiling to show beside a model's texts, and what a
warm start imitates. Controls are what a policy might drift to if a measure could be fooled: it must
beat each of them under the reward, the judge and the simulated clicks.
"""

from collections.abc import Sequence

from recrl_lib.explainer.prompts import NOUNS, Record, real_genres

_OPENINGS = (
    "Because you liked {history}, I recommend {film}, {what}.",
    "I recommend {film} because you enjoyed {history}; it is {what}.",
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


def reference_line(record: Record) -> str:
    """An explanation from metadata alone: the item, its year and genres, and the one or two history
    titles that share most genres with it, the latest first."""
    genres, noun = real_genres(record), record.get("noun", "film")
    shared = [len(set(genres) & set(g)) for g in record["history_genres"]]
    nearest = sorted(range(len(shared)), key=lambda i: (-shared[i], -i))[:2]
    history = " and ".join(dict.fromkeys(record["history_titles"][i] for i in nearest))
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
        "another_item": [reference_line(records[(i + 1) % n]) for i in range(n)],
        "copied_prompt": list(prompts),
    }
