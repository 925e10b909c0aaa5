"""Answers to follow-up questions: a true one composed by rule, and what is true in a text.

A place, genre, year or comparison in a text is about the nearest film named before it, or else the
first one; a negation shortly before denies it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from recrl_lib.explainer.prompts import NOUNS, Record
from recrl_lib.scoring.claims import Catalogue, Reading
from recrl_lib.scoring.intents import Film, described, films, has

NEGATIONS = frozenset("no not none nothing never isn aren t".split())
PROPERTIES = ("genre", "not genre", "year")
WORDS = {
    "above": "above", "higher": "above", "below": "below", "lower": "below",
    "already": "already", "list": "listed", "ten": "listed",
}  # fmt: skip


class Answer(NamedTuple):
    """A text held against the question."""

    met: float  # share of what an answer must say: see ``judge``
    invented: int  # titles that are not in the chat, and other names
    wrong_places: int  # places, which of two is higher, "already", "not on the list"
    wrong_properties: int  # genres and years

    @property
    def truly(self) -> bool:
        """It answers what was asked, and nothing in it is false."""
        return self.met == 1 and not sum(self[1:])


def fitting(record: Record) -> list[str]:
    """The listed titles that are what was asked for instead, best first."""
    known = films(record)
    listed = [film["title"] for film in record["listed"]]
    return [t for t in listed if t != record["title"] and has(known[t], record["asked"])]


def composed_answer(record: Record) -> str:
    """A true answer, composed from list and metadata."""
    known, noun, own = films(record), record.get("noun", "film"), record["title"]
    if record["intent"] == "instead":
        asked = record["asked"]
        if not (found := fitting(record)):
            return f"None of the ten {noun}s on your list is {described(asked, noun)}, I am sorry."
        film, what = known[found[0]], asked.split()[1].lower()
        kind = f"{what} {noun}" if asked.startswith("genre") else f"{noun} from {film.year}"
        article = "an" if kind[0] in "aeiou" else "a"
        return f"How about number {film.place} on your list, {found[0]}, {article} {kind}?"
    first, second = record["about"] if record["intent"] == "compare" else (*record["about"], own)
    if record["intent"] == "compare" and known[first].place > known[second].place:
        first, second = second, first
    a, b = known[first], known[second]
    one, two = f"{first} ({_differing(a, b)})", f"{second} ({_differing(b, a)})"
    if a.seen:
        return f"You {NOUNS[noun][1]} {one} already, and {two} is number {b.place} on your list."
    if not a.place:
        return f"{one} is not on your list, and {two} is number {b.place} on it."
    if record["intent"] == "compare":
        return f"{one} is number {a.place}, above {two} at number {b.place} on your list."
    return f"{one} is number {a.place} on your list, and {two} is number {b.place}."


def _differing(a: Film, b: Film) -> str:
    """A property of ``a`` that ``b`` lacks, where there is one."""
    own = [genre.lower() for genre in a.genres if genre not in b.genres]
    if not own and a.year and a.year != b.year:
        return str(a.year)
    return (own or [genre.lower() for genre in a.genres] or ["genre unknown"])[0]


def _claims(said: Reading, titles: list[tuple[int, int, str]]) -> Iterator[tuple[str, Any, str]]:
    """(kind, value, title) of all that a text says of its films; ``titles`` are not empty."""
    inside = {i for start, end, _ in titles for i in range(start, end)}
    free = [(i, word) for i, word in enumerate(said.lower) if i not in inside]
    found = [(i, "genre", genre) for i, _, genre in said.genres]
    found += [(i, "year", int(said.words[i])) for i in said.years]
    found += [(i, WORDS[word], 0) for i, word in free if word in WORDS]
    found += [
        (i, "place", int(word))
        for i, word in free
        if said.lower[i - 1] == "number" and word.isdigit()
    ]
    for i, kind, value in sorted(found):
        end, title = max(((end, t) for _, end, t in titles if end <= i), default=(0, titles[0][2]))
        denied = not NEGATIONS.isdisjoint(said.lower[max(end, i - 6) : i])
        if kind == "listed" and not denied:
            continue  # "on your list" alone says nothing that its place does not
        yield f"not {kind}" if denied and kind in ("genre", "listed") else kind, value, title


def _holds(kind: str, value: Any, film: Film, other: Film) -> bool:
    """Whether a claim about ``film`` is true; ``other`` is what it is compared with."""
    place, rival = film.place or 99, other.place or 99
    return {
        "genre": value in film.genres, "not genre": value not in film.genres,
        "year": value == film.year, "place": value == film.place, "above": place < rival,
        "below": place > rival, "already": film.seen, "not listed": not film.place,
    }[kind]  # fmt: skip


def judge(record: Record, text: str, catalogue: Catalogue) -> Answer:
    """Hold ``text`` against a follow-up. What must be in it, for ``Answer.met``:

    ``why_not``: both films; the place of the one asked about, that it was watched already or that
    it is not on the list; a genre or year that tells the two apart, if there is one.
    ``instead``: another film of the list that is what was asked for; that none is, if so.
    ``compare``: a genre or year of each film; which of them is higher.
    """
    known, said, own = films(record), catalogue.reading(text), record["title"]
    titles = [(a, b, min(what & known.keys())) for a, b, what in said.titles if what & known.keys()]
    foreign = {what for _, _, what in said.titles if what.isdisjoint(known)}
    pair, named = [*record["about"], own][:2], {title for _, _, title in titles}
    claims = list(_claims(said, titles)) if titles else []
    rival = {title: pair[title == pair[0]] if len(pair) > 1 else title for title in named}
    true = [c for c in claims if _holds(*c[:2], known[c[2]], known[rival[c[2]]])]
    false = [kind for kind, *_ in claims]
    for kind, *_ in true:
        false.remove(kind)
    properties, places = (
        sum(k in PROPERTIES for k in false),
        sum(k not in PROPERTIES for k in false),
    )
    if record["intent"] == "instead":
        fit, suggested = {*fitting(record)}, named & {f["title"] for f in record["listed"]} - {own}
        needed = [bool(suggested), bool(suggested & fit)]
        if not fit:
            needed = [not suggested and not NEGATIONS.isdisjoint(said.lower)]
        properties += len(suggested - fit)
    else:
        needed = _pair_needs(record["intent"], pair, known, true, named)
    return Answer(sum(needed) / len(needed), len(foreign) + len(said.names), places, properties)


def _pair_needs(intent: str, pair: list, known: dict, true: list, named: set) -> list[bool]:
    """What an answer about two films must hold, and whether its ``true`` claims do."""
    a, b = (known[title] for title in pair)
    said = {(kind, title) for kind, _, title in true}
    properties = [(k, v, title) for k, v, title in true if k in PROPERTIES and title in pair]
    if intent == "compare":
        each = [any(title == one for *_, title in properties) for one in pair]
        return [*each, bool({kind for kind, _ in said} & {"above", "below"})]
    place = "place" if a.place else "already" if a.seen else "not listed"
    apart = any(not _holds(k, v, b if title == pair[0] else a, a) for k, v, title in properties)
    alike = set(a.genres) == set(b.genres) and a.year == b.year
    return [pair[0] in named, pair[1] in named, (place, pair[0]) in said, apart or alike]
