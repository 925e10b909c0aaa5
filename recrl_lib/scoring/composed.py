"""Texts composed by rule: true explanations from metadata, and controls that must not win.

The reference lines are the ceiling to show beside a model's texts, and what a warm start imitates. The controls are
what a policy might drift to if a measure could be fooled: a tuned policy must beat each of them under the reward,
the judge and the simulated clicks.
"""

from collections.abc import Sequence

from recrl_lib.explainer.prompts import NOUNS, Record, real_genres

_OPENINGS = (
    "Because you liked {history}, I recommend {film}, {what}.",
    "I recommend {film} because you enjoyed {history}; it is {what}.",
    "You {did} {history}, so I think you will like {film}, {what}.",
)


def reference_line(record: Record) -> str:
    """An explanation composed from metadata alone: true by construction, as the ceiling to show beside a model's.

    It names the film, its year and genres, and the one or two history films that share most genres with it.
    """
    genres, noun = real_genres(record), record.get("noun", "film")
    shared = [len(set(genres) & set(g)) for g in record["history_genres"]]
    nearest = sorted(range(len(shared)), key=lambda i: (-shared[i], -i))[:2]
    history = " and ".join(dict.fromkeys(record["history_titles"][i] for i in nearest))
    film = record["title"] + (f" ({record['year']})" if record["year"] else "")
    listed = [g.lower().replace("film-noir", "film noir") for g in genres]
    kind = " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1] if listed else ""]))
    what = (
        f"{'an' if kind[:1] in tuple('aeiou') else 'a'} {kind} {noun}"
        if kind
        else f"{'an' if noun == 'item' else 'a'} {noun} in the same vein"
    )
    if not history:
        return f"I recommend {film}, {what}."
    return _OPENINGS[(record["user"] + record["item"]) % len(_OPENINGS)].format(
        history=history, film=film, what=what, did=NOUNS[noun][1]
    )


_PRAISE = (
    "This is a great film that you will surely love and enjoy with your friends and family tonight."
)
_RAMBLE = (
    "You will love it because it is the kind of thing that people who like such things tend to like, and the more you "
    "think of it the more it becomes clear that it is what you want to see when you come home and have the time"
)


def control_texts(records: Sequence[Record], prompts: Sequence[str]) -> dict[str, list[str]]:
    """The controls, one text a record each; ``prompts`` are the users' questions as the model meets them.

    ``empty``; ``constant``: one line of praise for everybody; ``longest``: fluent talk about nothing, about 120 words;
    ``keywords``: the true title, history and genres as a list; ``another_item``: the reference line of another record;
    ``copied_prompt``. Raises ``ValueError`` for fewer than two records.
    """
    if len(records) < 2 or len(records) != len(prompts):
        raise ValueError(
            f"controls: {len(records)} records and {len(prompts)} prompts; give two records or more, each with its prompt"
        )
    n = len(records)
    return {
        "empty": [""] * n,
        "constant": [_PRAISE] * n,
        "longest": [
            f"{_RAMBLE}, and {_RAMBLE[0].lower()}{_RAMBLE[1:]}, so {_RAMBLE[0].lower()}{_RAMBLE[1:]}."
        ]
        * n,
        "keywords": [
            " and ".join([r["title"], *dict.fromkeys(r["history_titles"]), *real_genres(r)]) + "."
            for r in records
        ],
        "another_item": [reference_line(records[(i + 1) % n]) for i in range(n)],
        "copied_prompt": list(prompts),
    }
