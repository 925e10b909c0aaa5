"""Follow-up questions of a chat: what is asked, in whose words, and what the explainer is told.

After the opening question ``why`` a viewer may ask ``why_not`` another film, for something
``instead``, or to ``compare`` two films. A follow-up is a record with these fields more:

intent, question  one of ``FOLLOW_UPS``; the viewer's words
chat, listed      as in ``recrl_lib/__init__.py``; this question is the last message
about             why_not, compare: the titles asked about
others            films asked about so far that are not listed: title, year, genres, seen
asked             instead: "genre Comedy", "decade 1980", "after 1990" or "before 1990"
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recrl_lib.explainer.prompts import NOUNS, Record, real_genres, shown
from recrl_lib.scoring.claims import Catalogue, title_pattern

FOLLOW_UPS = ("why_not", "instead", "compare")
HELD_OUT = 2  # the last wordings of each intent, which training never sees
WORDINGS = {
    "why_not": (
        "Why not {0}?", "Why didn't you recommend {0}?", "What about {0}?", "And {0}?",
        "How come {0} is not your choice?", "I expected {0}. Why not that one?",
        "Is {0} not a better choice?", "Why is {0} not recommended?",
    ),
    "instead": (
        "I would like {0} instead.", "Do you have {0}?", "Can you suggest {0} instead?",
        "Is there {0} on my list?", "Not that one, {0} please.", "Show me {0}.",
        "I am in the mood for {0}.", "How about {0}?",
    ),
    "compare": (
        "Which is better for me, {0} or {1}?", "Compare {0} and {1}.", "{0} or {1}?",
        "How do {0} and {1} differ?", "What is the difference between {0} and {1}?",
        "Should I choose {0} or {1}?",
        "Is {0} higher on my list than {1}?", "{0} against {1}: which one?",
    ),
}  # fmt: skip
_TENS = "twenties thirties forties fifties sixties seventies eighties nineties".split()
DECADES: dict[str, int] = dict(zip(_TENS, range(1920, 2000, 10)))
MOODS = {
    "lighter": "Comedy", "funny": "Comedy", "funnier": "Comedy", "scary": "Horror",
    "romantic": "Romance", "exciting": "Action", "serious": "Drama",
}  # fmt: skip


class Film(NamedTuple):
    """What the chat knows of a film."""

    place: int  # in the list, from 1; 0: not in it
    year: int  # 0: unknown
    genres: tuple[str, ...]
    seen: bool


def films(record: Record) -> dict[str, Film]:
    """The films that an answer may name, by title."""
    genres = zip(record["history_titles"], map(tuple, record["history_genres"]))
    known = {title: Film(0, 0, own, True) for title, own in genres}
    for film in record["others"]:
        known[film["title"]] = Film(0, film["year"], tuple(real_genres(film)), film["seen"])
    for place, film in enumerate(record["listed"], 1):
        known[film["title"]] = Film(place, film["year"], tuple(real_genres(film)), False)
    return known


def decade_of(word: str) -> int:
    """The first year of a decade that a lower-case word names ("eighties", "80s"); else 0."""
    if found := re.fullmatch(r"(\d\d)?(\d0)s", word):
        return int(f"{found[1] or 19}{found[2]}")
    return DECADES.get(word, 0)


def has(film: Film, asked: str) -> bool:
    """Whether a film is what the viewer ``asked`` for."""
    kind, value = asked.split(" ", 1)
    if kind == "genre":
        return value in film.genres
    if kind == "decade":
        return film.year // 10 * 10 == int(value)
    return bool(film.year) and (
        film.year > int(value) if kind == "after" else film.year < int(value)
    )


def described(asked: str, noun: str) -> str:
    """What was ``asked`` for, in words: "a comedy film", "something from the eighties"."""
    kind, value = asked.split(" ", 1)
    if kind == "decade":
        words = {year: word for word, year in DECADES.items()}
        return f"something from the {words.get(int(value), f'{value}s')}"
    if kind == "genre":
        return f"{'an' if value[0] in 'AEIOU' else 'a'} {value.lower()} {noun}"
    return f"a newer {noun}" if kind == "after" else f"an older {noun}"


def ask(
    record: Record,
    intent: str,
    question: str,
    about: Sequence[str] = (),
    others: Sequence[Mapping] = (),
    asked: str = "",
) -> dict[str, Any]:
    """The follow-up to ``record``, which has ``listed``, and a ``chat`` that ends in an answer.

    Before the question stand the facts that an honest answer needs: the films asked about with
    place, year and genres, best first; for ``instead`` the ten.
    """
    did, named = NOUNS[record.get("noun", "film")][1], {*about, record["title"]}
    ten = [(i, film) for i, film in enumerate(record["listed"], 1)]
    told = [f"{i}. {shown(f)}" for i, f in ten if intent == "instead" or f["title"] in named]
    facts = [f"On your list: {'; '.join(told)}."] if intent != "why" else []
    facts += [f"{'I ' + did if f['seen'] else 'Not on it'}: {shown(f)}." for f in others]
    chat = [*record["chat"], {"role": "user", "content": "\n".join([*facts, question])}]
    more = {"about": list(about), "others": [*record["others"], *others], "asked": asked}
    return {**record, "intent": intent, "question": question, "chat": chat, **more}


def draw(
    record: Record,
    outside: Sequence[Mapping],
    intent: str,
    rng: np.random.Generator,
    held_out: bool = False,
) -> dict[str, Any]:
    """A random follow-up of ``intent``, about the list or the two films ``outside`` of it.

    ``held_out``: in the wordings, and with the kind of property (a decade), kept from training.
    """
    rest = [film for film in record["listed"] if film["title"] != record["title"]]
    wordings = WORDINGS[intent][-HELD_OUT:] if held_out else WORDINGS[intent][:-HELD_OUT]
    wording, chance = wordings[rng.integers(len(wordings))], rng.random()
    film = rest[rng.integers(len(rest))]
    if intent == "compare":
        pair = [film["title"], record["title"]][:: 1 if chance < 0.5 else -1]
        return ask(record, intent, wording.format(*pair), pair)
    others = [] if chance < 0.5 else [outside[int(chance < 0.75)]]
    film = others[0] if others else film
    if intent == "why_not":
        return ask(record, intent, wording.format(film["title"]), [film["title"]], others)
    kinds = [f"genre {genre}" for genre in real_genres(film)]
    if held_out:  # a decade that few listed films are of, so that no constant answer is often true
        of_list = [f["year"] // 10 * 10 for f in rest]
        every = {*of_list, *(f["year"] // 10 * 10 for f in outside)} - {0}
        few = [decade for decade in sorted(every) if of_list.count(decade) <= 3]
        kinds = [f"decade {decade}" for decade in few] or kinds
    elif film["year"] and record["year"]:
        later = film["year"] > record["year"]
        kinds.append(f"{'after' if later else 'before'} {record['year']}")
    asked = kinds[rng.integers(len(kinds))] if kinds else "genre Drama"
    said = wording.format(described(asked, record.get("noun", "film")))
    return ask(record, intent, said, asked=asked)


def understand(text: str, record: Record, catalogue: Catalogue) -> tuple[str, list[str], str]:
    """(intent, titles asked about, property asked for) of a viewer's own words.

    By rule: two films are compared, another film is "why not", a genre, mood, decade, "newer" or
    "older" is "instead", "why" is "why"; the intent is "" if nothing of this fits.
    """
    lower, said, known = text.lower(), catalogue.reading(text), films(record)
    by_lower = {title.lower(): title for title in known}
    pattern = re.compile(title_pattern(by_lower))
    found = list(pattern.finditer(lower))
    places = {by_lower[m[0]]: m.start() for m in found}
    for start, _, what in said.titles:
        at = said.spans[start][0]
        if not any(m.start() <= at < m.end() for m in found):
            places.setdefault(min(what), at)
    rest = pattern.sub(" ", lower)
    titles, words = sorted(places, key=places.__getitem__), set(re.findall(r"\w+", rest))
    others = [title for title in titles if title != record["title"]]
    if len(titles) > 1 or others and words & {"compare", "versus", "than"}:
        pair = titles if len(titles) > 1 else [*others, record["title"]]
        return "compare", pair[:2], ""
    like = re.search(r"\b(?:more|something|anything) like\b", rest)
    if others and not like:
        return "why_not", others, ""
    genres = [genre for _, _, genre in said.genres] + [MOODS[w] for w in MOODS if w in words]
    genres += [known[t].genres[0] for t in others if t in known and known[t].genres]
    if decade := max(map(decade_of, words), default=0):
        return "instead", [], f"decade {decade}"
    if genres:
        return "instead", [], f"genre {genres[0]}"
    for word, kind in (("newer", "after"), ("older", "before")):
        if word in words and record["year"]:
            return "instead", [], f"{kind} {record['year']}"
    return ("why" if "why" in words else ""), [], ""
