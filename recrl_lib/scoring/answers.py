"""Answers to follow-up questions: a true one composed by rule, and what is true in a text.

A place, genre, year or comparison in a text is about the nearest film named before it, or else the
first one. A negation shortly before denies it.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from recrl_lib.explainer.prompts import NOUNS, Record
from recrl_lib.scoring.claims import Catalogue, Reading
from recrl_lib.scoring.intents import Film, decade_of, described, films, has

NEGATIONS = frozenset("no not none nothing never isn aren t".split())
PROPERTIES = ("genre", "year", "decade")
WORDS = {
    "above": "above", "higher": "above", "below": "below", "lower": "below",
    "already": "already", "list": "listed", "ten": "listed",
}  # fmt: skip
_CARDINALS = "one two three four five six seven eight nine ten".split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
NUMBERS = {w: n for words in (_CARDINALS, _ORDINALS) for n, w in enumerate(words, 1)}
BEFORE_PLACES = {"number", "place", "position", "rank", "ranked", "ranks"}


class Claim(NamedTuple):
    """Something that a text says of a film."""

    kind: str  # genre, year, decade, place, above, below, already or listed
    value: Any
    title: str
    other: str  # above, below: the film that it is compared with
    denied: bool


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


def fitting(record: Record, known: dict[str, Film]) -> list[str]:
    """The listed titles that are what was asked for instead, best first; ``known``: ``films``."""
    listed = [film["title"] for film in record["listed"]]
    return [t for t in listed if t != record["title"] and has(known[t], record["asked"])]


def composed_answer(record: Record) -> str:
    """A true answer, composed from list and metadata."""
    known, noun, own = films(record), record.get("noun", "film"), record["title"]
    if record["intent"] == "instead":
        asked = record["asked"]
        if not (found := fitting(record, known)):
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
        where = f"is number {b.place} on it" if b.place else "is not on it either"
        return f"{one} is not on your list, and {two} {where}."
    if record["intent"] == "compare":
        return f"{one} is number {a.place}, above {two} at number {b.place} on your list."
    return f"{one} is number {a.place} on your list, and {two} is number {b.place}."


def _differing(a: Film, b: Film) -> str:
    """A property of ``a`` that ``b`` lacks, where there is one."""
    own = [genre.lower() for genre in a.genres if genre not in b.genres]
    if not own and a.year and a.year != b.year:
        return str(a.year)
    return (own or [genre.lower() for genre in a.genres] or ["genre unknown"])[0]


def _found(said: Reading, inside: set[int]) -> Iterator[tuple[int, str, Any]]:
    """(place of a word, kind, value) of all claims outside titles."""
    yield from ((i, "genre", genre) for i, _, genre in said.genres)
    yield from ((i, "year", int(said.words[i])) for i in said.years)
    for i, word in enumerate(said.lower):
        if i in inside:
            continue
        if word in WORDS:
            yield i, WORDS[word], None
        if year := decade_of(word):
            yield i, "decade", year
        ordinal = re.fullmatch(r"(\d+)(?:st|nd|rd|th)", word)
        if ordinal:
            yield i, "place", int(ordinal[1])
        elif i and said.lower[i - 1] in BEFORE_PLACES and (word.isdecimal() or word in NUMBERS):
            yield i, "place", NUMBERS.get(word) or int(word)


def _claims(said: Reading, titles: list[tuple[int, int, str]], pair: list[str]) -> Iterator[Claim]:
    """All that a text says of its films; ``titles`` are not empty."""
    inside = {i for start, end, _ in titles for i in range(start, end)}
    for i, kind, value in sorted(_found(said, inside), key=lambda found: found[0]):
        end, title = max(((end, t) for _, end, t in titles if end <= i), default=(0, titles[0][2]))
        later = [t for start, _, t in titles if start > i and t != title]
        other = later[0] if later else pair[title == pair[0]]
        yield Claim(kind, value, title, other, _denied(said, max(end, i - 6), i))


def _denied(said: Reading, start: int, end: int) -> bool:
    """Whether a negation from word ``start`` on denies word ``end``: in the same clause."""
    for i in range(end - 1, max(start, 0) - 1, -1):
        if said.lower[i] in ("and", "but", "or") or re.search(r"[,;:.()]", said.gaps[i + 1]):
            return False
        if said.lower[i] in NEGATIONS:
            return True
    return False


def _holds(claim: Claim, film: Film, other: Film) -> bool:
    """Whether ``film`` is what a claim says, or is not, if the claim denies it."""
    place, rival = film.place or 99, other.place or 99
    return claim.denied != {
        "genre": claim.value in film.genres, "year": claim.value == film.year,
        "decade": claim.value == film.year // 10 * 10, "place": claim.value == film.place,
        "above": place < rival, "below": place > rival, "already": film.seen,
        "listed": bool(film.place),
    }[claim.kind]  # fmt: skip


def judge(record: Record, text: str, catalogue: Catalogue) -> Answer:
    """``text`` held against a follow-up. What it must say, of which ``Answer.met`` is the share:

    ``why_not``: both films; the place of the one asked about, that it was watched already or that
    it is not on the list; a genre or year that tells the two apart, if there is one.
    ``instead``: another film of the list that is what was asked for; that none is, if so.
    ``compare``: a genre or year of each film; which of them is higher.
    """
    known, said, own = films(record), catalogue.reading(text), record["title"]
    titles = [(a, b, min(what & known.keys())) for a, b, what in said.titles if what & known.keys()]
    foreign = {what for _, _, what in said.titles if what.isdisjoint(known)}
    pair = [*record["about"], own, own][:2]
    claims = list(_claims(said, titles, pair)) if titles else []
    claims = [c for c in claims if known[c.title].year or c.kind not in ("year", "decade")]
    true = [c for c in claims if _holds(c, known[c.title], known[c.other])]
    false = [c.kind in PROPERTIES for c in claims if c not in true]
    properties = sum(false)
    if record["intent"] == "instead":
        ends = [0, *(end for _, end, _ in titles)]
        named = {t for (a, _, t), end in zip(titles, ends) if not _denied(said, max(end, a - 6), a)}
        fit, suggested = (
            {*fitting(record, known)},
            named & {f["title"] for f in record["listed"]} - {own},
        )
        needed = [bool(suggested), bool(suggested & fit)]
        if not fit:
            needed = [not suggested and _none_is(said, record["asked"])]
        properties += len(suggested - fit)
    else:
        needed = _pair_needs(record["intent"], pair, known, true, {t for _, _, t in titles})
    places = len(false) - sum(false)
    return Answer(sum(needed) / len(needed), len(foreign) + len(said.names), places, properties)


def _none_is(said: Reading, asked: str) -> bool:
    """Whether a text says that nothing on the list is what was asked for."""
    kind, value = asked.split(" ", 1)
    if kind == "genre":
        named = value in {genre for _, _, genre in said.genres}
    elif kind == "decade":
        named = int(value) in map(decade_of, said.lower)
    else:
        named = {"after": "newer", "before": "older"}[kind] in said.lower
    lists = [i for i, word in enumerate(said.lower) if word in ("list", "ten")]
    return named and ("none" in said.lower or any(_denied(said, i - 6, i) for i in lists))


def _pair_needs(intent: str, pair: list, known: dict, true: list[Claim], named: set) -> list[bool]:
    """What an answer about two films must hold, and whether its ``true`` claims do."""
    a, b = (known[title] for title in pair)
    # Places and orders count when said, "listed" when denied.
    said = {(c.kind, c.title) for c in true if c.denied == (c.kind == "listed")}
    properties = [c for c in true if c.kind in PROPERTIES and c.title in pair]
    if intent == "compare":
        unlisted = [t for t, film in zip(pair, (a, b)) if not film.place]
        order = {(kind, t) for kind in ("above", "below") for t in pair} | {
            (kind, t) for kind in ("listed", "already") for t in unlisted
        }
        each = [any(c.title == t and not c.denied for c in properties) for t in pair]
        return [*each, bool(said & order)]
    place = "place" if a.place else "already" if a.seen else "listed"
    apart = any(not _holds(c, b if c.title == pair[0] else a, a) for c in properties)
    alike = set(a.genres) == set(b.genres) and a.year == b.year
    return [pair[0] in named, pair[1] in named, (place, pair[0]) in said, apart or alike]
