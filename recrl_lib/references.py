"""Explanations composed from metadata alone: the ceiling to show beside a model's, and what a warm start imitates."""

from recrl_lib.claims import NOUNS, Record, real_genres

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
    what = f"{'an' if kind[:1] in tuple('aeiou') else 'a'} {kind} {noun}" if kind else f"{'an' if noun == 'item' else 'a'} {noun} in the same vein"
    if not history:
        return f"I recommend {film}, {what}."
    return _OPENINGS[(record["user"] + record["item"]) % len(_OPENINGS)].format(history=history, film=film, what=what, did=NOUNS[noun][1])
