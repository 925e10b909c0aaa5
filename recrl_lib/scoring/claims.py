"""Finding what an explanation claims: titles, genres, years and proper names.

The reward and the judge agree on *what a text says*, and score it each their way.

How a title is recognised (longest match first, left to right, over words; punctuation ignored):

* three or more words, at least two of them outside ``SMALL``: in any case ("the usual suspects");
* other titles of several words: capitalised as in the catalogue, ``SMALL`` words apart
  ("The Game", not "the game");
* one word: capitalised, alone (no capitalised neighbour: "Michael Bay" is not "Michael"), and not
  merely the first word of a sentence, unless what follows shows a title ("Fargo is", '"Heat"').

A title answers to its form without a parenthesis, the parenthesis itself, the part before a colon
(two words or more) and the form without a leading article, too. A form that fits several titles
("Star Trek") means any of them; a genre word is never a title.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from recrl_lib.explainer.prompts import NO_GENRE, Record, real_genres

# Function words: they open sentences and join titles, and alone they name nothing.
SMALL = frozenset(
    """a about after all also although an and another any are as at be because been before being
    both but by can could did do does each even every for from given had has have he her
    here hers him his how i if in into is it its just less let like may me might more most
    much my no nor not now of off on once one only or other our out over own perhaps plus
    she should since so some such than that the their them then there these they this those
    though through to too two under until up us very was we well were what when where
    whether which while who whom whose why will with without would yes yet you your""".split()
)
FUNCTION_WORDS = 0.25  # running English has about 40 %, a list of keywords next to none
_NOT_NAMES = SMALL.union(
    """actor actors actress assistant cast director film films genre genres great hello hi history
    movie movies rating recommend recommendation recommended recommending similar story system
    thanks title try user viewer watch watching year""".split()
)
# After one of these a capitalised word is a name even alone: "liked Palglone" invents a film.
_NAME_CUES = {"by", "starring", "director", "actor", "actress", "like", "liked", "love", "loved"}
_NAME_CUES |= {"enjoy", "enjoyed", "watched", "recommend", "recommended"}
_TITLE_FOLLOWERS = {"is", "was", "has", "and", "s"}
_ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "jr", "vs"}
GENRE_FORMS = {  # lower-case forms that state a genre, beside its name and the name's plural
    "Animation": ["animated", "animations", "cartoon", "cartoons"], "Fantasy": ["fantasies"],
    "Children's": ["children", "childrens"], "Comedy": ["comedies", "comedic"],
    "Documentary": ["documentaries"], "Film-Noir": ["film noir", "films noir", "noir"],
    "Mystery": ["mysteries"], "Romance": ["romantic", "romances"],
    "Sci-Fi": ["scifi", "science fiction"],
}  # fmt: skip

_TOKEN = re.compile(r"(\w+|&)")
_WORD = re.compile(r"\w+(?:['’.\-]\w+)*")
_YEAR = re.compile(r"(?:19|20)\d\d\Z")
_BREAK = re.compile(r"[.!?\n]")
_ARTICLE = re.compile(r"(?:the|an?)\s+(?=\w)", re.IGNORECASE)
_PAREN = re.compile(r"\s*\(([^)]*)\)")


class Claims(NamedTuple):
    """What a text says, each thing once, in order of first mention."""

    titles: tuple[frozenset[str], ...]  # a mention: the catalogue titles that it may mean
    genres: tuple[str, ...]  # named as in the catalogue
    years: tuple[int, ...]  # four-digit years outside titles
    # Names that are no title, people and invented titles alike: two capitalised words or more, or
    # one after "by", "liked" and their like, or after a title and "and".
    people: tuple[str, ...]
    # How far the words outside titles and genres are running English: 1 if a quarter of them, and
    # three different ones, are function words. A list of true keywords has 0.
    prose: float


class Verdict(NamedTuple):
    """A text's claims held against its record: counts of distinct claims."""

    title: bool  # names the recommended film
    history: int  # own history titles named
    genres: int  # genres of the recommended film named
    foreign_titles: int  # catalogue titles that are neither the film nor in the history
    wrong_genres: int
    wrong_years: int
    people: int
    all_history: int  # different history titles of the record
    all_genres: int  # its genres, placeholders apart
    supported: int  # all true claims; a genre may be that of a history film that the text names
    unsupported: int


def words(text: str) -> list[str]:
    """Words of ``text`` as written; "Sci-Fi", "don't" and "U.S" are one word each."""
    return _WORD.findall(text.replace("_", " "))


def n_grams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """Runs of ``n`` tokens."""
    return list(zip(*(tokens[i:] for i in range(n))))


def distinct_share(tokens: list[str], n: int) -> float:
    """Share of the n-grams of ``tokens`` that are distinct; 1 where there are none."""
    grams = n_grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def title_pattern(titles: Iterable[str], form: Callable[[str], str] = re.escape) -> str:
    """A pattern of ``titles`` as whole words, the longest first, each in ``form``."""
    longest = sorted(titles, key=len, reverse=True)
    return "|".join(rf"(?<!\w){form(title)}(?!\w)" for title in longest)


class Catalogue:
    """The titles and genres a text can name, as in the item table ("The Rock", "Sci-Fi")."""

    def __init__(self, titles: Iterable[str], genres: Iterable[str]):
        self.titles = frozenset(t for t in titles if t.strip())
        if not self.titles:
            raise ValueError("catalogue: no titles; give the item table's title column")
        # lower-case words -> (numbers of those that need a capital, titles they may mean or genre)
        self.forms = _title_forms(sorted(self.titles))
        for genre in sorted({g for g in genres if g.lower() not in NO_GENRE}):
            for form in (genre, genre + "s", *GENRE_FORMS.get(genre, ())):
                self.forms[tuple(map(str.lower, _split(form)))] = ((), genre)
        self.forms.pop((), None)
        # first word -> lengths of its forms, longest first (a dict's keys, for each but once)
        self.lengths: dict[str, dict[int, None]] = {}
        for key in sorted(self.forms, key=len, reverse=True):
            self.lengths.setdefault(key[0], {})[len(key)] = None
        self._last = "", Reading("", self)  # a text is asked about several times in a row

    def reading(self, text: str) -> "Reading":
        """What is found in ``text``, with its place."""
        if text != self._last[0]:
            self._last = text, Reading(text, self)
        return self._last[1]

    def claims(self, text: str) -> Claims:
        """The claims of ``text``; see the module for the rules."""
        return self.reading(text).claims

    def marks(self, record: Record, text: str) -> list[tuple[int, int, bool]]:
        """Every mention of the claims that ``verdict`` counts, in the order of the text.

        Returns (first character, one past the last, supported by ``record``).
        """
        said = self.reading(text)
        titles, genres, _ = self._truth(record, said.claims)
        found = [(a, b, False) for a, b in said.names]
        found += [(i, i + 1, int(said.words[i]) == record["year"]) for i in said.years]
        found += [(a, b, not what.isdisjoint(titles)) for a, b, what in said.titles]
        found += [(a, b, what in genres) for a, b, what in said.genres]
        return [(said.spans[a][0], said.spans[b - 1][1], true) for a, b, true in sorted(found)]

    def cited(self, record: Record, text: str) -> list[int]:
        """The history films that a text names, as places in ``history_titles``, in their order."""
        _, _, named = self._truth(record, self.claims(text))
        return [j for j, title in enumerate(record["history_titles"]) if title in named]

    def mentions(self, record: Record, text: str) -> int:
        """How often a text names the recommended film."""
        return sum(record["title"] in what for _, _, what in self.reading(text).titles)

    def verdict(self, record: Record, text: str) -> Verdict:
        """Hold the claims of ``text`` against ``record``.

        A genre is right if the recommended film has it, or a history film that the text names.
        Raises ``ValueError`` if the record's titles are not in the catalogue.
        """
        said = self.claims(text)
        titles, genres, named = self._truth(record, said)
        title = any(record["title"] in mention for mention in said.titles)
        foreign = sum(mention.isdisjoint(titles) for mention in said.titles)
        right_year, right_genres = record["year"] in said.years, len(genres & set(said.genres))
        wrong_years, wrong_genres = len(said.years) - right_year, len(said.genres) - right_genres
        return Verdict(
            title=title, history=len(named), genres=len({*record["genres"]} & {*said.genres}),
            foreign_titles=foreign, wrong_genres=wrong_genres, wrong_years=wrong_years,
            people=len(said.people), all_history=len(set(record["history_titles"])),
            all_genres=len(real_genres(record)),
            supported=title + len(named) + right_genres + right_year,
            unsupported=foreign + wrong_genres + wrong_years + len(said.people),
        )  # fmt: skip

    def _truth(self, record: Record, said: Claims) -> tuple[set[str], set[str], set[str]]:
        """The titles and the genres that are right in ``said``, and the history titles it names."""
        genres_of = dict(zip(record["history_titles"], record["history_genres"], strict=True))
        own = record["title"]
        titles = {own, *genres_of}
        for title in titles - self.titles:
            remedy = "is not in the catalogue; build it from the same item table"
            raise ValueError(f"record of user {record['user']}: title {title!r} {remedy}")
        mentions = (mention for mention in said.titles if own not in mention)
        named = {title for mention in mentions for title in mention if title in genres_of}
        return titles, set(record["genres"]).union(*(genres_of[t] for t in named)), named


def _split(text: str) -> list[str]:
    return ["and" if w == "&" else w for w in _TOKEN.findall(text.replace("_", " "))]


def _title_forms(titles: list[str]) -> dict[tuple[str, ...], tuple]:
    """Lower-case forms of the titles; a full form has precedence over a shorter one."""
    exact: dict[tuple[str, ...], tuple] = {}
    alias: dict[tuple[str, ...], tuple] = {}
    for title in titles:
        plain = _PAREN.sub("", title)
        head = _split(plain.split(":")[0])
        shorter = [_split(inner) for inner in _PAREN.findall(title) if not inner.isdigit()]
        shorter += [_split(_ARTICLE.sub("", plain, count=1)), head if len(head) > 1 else []]
        for forms, spellings in ((exact, [_split(title), _split(plain)]), (alias, shorter)):
            for spelt in spellings:
                key = tuple(map(str.lower, spelt))
                forms.setdefault(key, (_capitals(spelt), set()))[1].add(title)
    return {key: (needed, frozenset(named)) for key, (needed, named) in (alias | exact).items()}


def _capitals(spelt: list[str]) -> tuple[int, ...]:
    """The words of a title that need their capital."""
    if len(spelt) == 1:
        return (0,)
    large = [k for k, word in enumerate(spelt) if word.lower() not in SMALL]
    if len(spelt) > 2 and len(large) > 1:
        return ()
    return tuple(k for k in large or range(len(spelt)) if spelt[k][0].isupper())


def _joins(gap: str, before: str) -> bool:
    """Whether ``gap`` after the word ``before`` can stand inside a name ("J. Smith", "O'Hara")."""
    initial = len(before) == 1 or before in _ABBREVIATIONS
    return gap in (" ", "-", "'") or (gap in (". ", ".") and initial)


class Reading:
    """One text's words and what was found in them; places are numbers of words."""

    def __init__(self, text: str, catalogue: Catalogue):
        text = text.replace("_", " ").replace("’", "'")
        self.spans = [word.span() for word in _TOKEN.finditer(text)]
        self.gaps = _TOKEN.split(text)[::2]  # gaps[i] stands before word i, and one after the last
        self.words = _split(text)
        self.lower = [word.lower() for word in self.words]
        forms = self._find_forms(catalogue)
        # each (first word, one past the last, meaning)
        self.genres = [form for form in forms if isinstance(form[2], str)]
        self.titles = [form for form in forms if not isinstance(form[2], str)]
        used = {i for start, end, _ in forms for i in range(start, end)}
        free = [i for i in range(len(self.words)) if i not in used]
        self.years = [i for i in free if _YEAR.match(self.words[i])]
        self.names = self._find_names(free)  # (first word, one past the last)
        function = [self.lower[i] for i in free if self.lower[i] in SMALL]
        share = len(function) / (FUNCTION_WORDS * max(len(free), 1))
        self.claims = Claims(
            titles=tuple(dict.fromkeys(what for _, _, what in self.titles)),
            genres=tuple(dict.fromkeys(what for _, _, what in self.genres)),
            years=tuple(dict.fromkeys(int(self.words[i]) for i in self.years)),
            people=tuple(dict.fromkeys(" ".join(self.words[a:b]) for a, b in self.names)),
            prose=min(share, len(set(function)) / 3, 1.0),
        )

    def _find_forms(self, catalogue: Catalogue) -> list[tuple]:
        """The longest known forms from left to right."""
        forms, end = [], 0
        for i, word in enumerate(self.lower):
            for length in catalogue.lengths.get(word, ()) if i >= end else ():
                key = tuple(self.lower[i : i + length])
                needed, what = catalogue.forms.get(key, (None, ""))
                if needed is None or any(self.words[i + k][0].islower() for k in needed):
                    continue
                if len(key) > 1 or isinstance(what, str) or self._stands_alone(i):
                    end = i + len(key)
                    forms.append((i, end, what))
                    break
        return forms

    def _stands_alone(self, i: int) -> bool:
        after, follower = self.gaps[i + 1], "".join(self.words[i + 1 : i + 2])
        joined = follower[:1].isupper() and _joins(after, self.lower[i])
        if joined and follower.lower() not in _NOT_NAMES:
            return False
        if self._opens_sentence(i):
            shown = follower and any(c in after for c in '("”*,:')
            shown = shown or follower.lower() in _TITLE_FOLLOWERS
            return bool(shown) and self.lower[i] not in SMALL
        before = self.lower[i - 1]
        neighbour = self.words[i - 1][0].isupper() and _joins(self.gaps[i], before)
        return not neighbour or before in _NOT_NAMES or self._opens_sentence(i - 1)

    def _opens_sentence(self, i: int) -> bool:
        before = self.lower[i - 1]
        ends = bool(_BREAK.search(self.gaps[i]))
        return i == 0 or ends and before not in _ABBREVIATIONS and len(before) > 1

    def _find_names(self, free: list[int]) -> list[tuple[int, int]]:
        """Proper names that are no title."""
        runs: list[list[int]] = []  # capitalised words that follow one another
        for i in free:
            if not self.words[i][0].isupper():
                continue
            follows = bool(runs) and runs[-1][-1] == i - 1
            # "The Matrix" inside a sentence: a capitalised article belongs to the name
            article = self.lower[i] == "the" and not self._opens_sentence(i)
            if self.lower[i] in _NOT_NAMES and (follows or not article):
                continue
            if follows and _joins(self.gaps[i], self.lower[i - 1]):
                runs[-1].append(i)
            else:
                runs.append([i])
        return [(r[0], r[-1] + 1) for r in runs if len(r) > 1 or self._is_cued(r[0])]

    def _is_cued(self, i: int) -> bool:
        """Whether word ``i``, alone, is a name: after a cue, or after a title and "and"."""
        # The text's last word may be the first of a title that was cut off
        cut_off = i == len(self.words) - 1 and not self.gaps[i + 1].strip()
        if i == 0 or cut_off or len(self.words[i]) == 1 or self.lower[i] == "the":
            return False
        after_title = self.lower[i - 1] == "and" and any(end == i - 1 for _, end, _ in self.titles)
        return self.lower[i - 1] in _NAME_CUES or after_title
