"""Finding what an explanation claims: titles, genres, years and proper names.

Shared by the reward and the judge, which must agree on *what a text says* and score it each in
their own way; neither imports the other.

How a title is recognised (longest match first, left to right, over words; punctuation ignored):

* three or more words, at least two of them outside ``SMALL``: in any case ("the usual suspects");
* other titles of several words: capitalised as in the catalogue, ``SMALL`` words apart
  ("The Game", not "the game");
* one word: capitalised, alone (no capitalised neighbour: "Michael Bay" is not "Michael"), and not
  merely the first word of a sentence, unless what follows shows a title ("Fargo is", '"Heat"',
  "Twister (1996)").

Besides its full form a title answers to its form without a parenthesis, the parenthesis itself, the
part before a colon (two words or more) and the form without a leading article. A form that fits
several titles ("Star Trek") means any of them; a genre word is never a title.
"""

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from recrl_lib.explainer.prompts import NO_GENRE, Record, real_genres


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Function words: they open sentences and join titles, and alone they name nothing.
SMALL = _words(
    """a about after all also although an and another any are as at be because been before being
    both but by can could did do does each even every for from given had has have he her here
    hers him his how i if in into is it its just less let like may me might more most much my
    no nor not now of off on once one only or other our out over own perhaps plus she should
    since so some such than that the their them then there these they this those though
    through to too two under until up us very was we well were what when where whether which
    while who whom whose why will with without would yes yet you your"""
)
FUNCTION_WORDS = 0.25  # running English has about 40 %, a list of keywords next to none
_NOT_NAMES = SMALL | _words(
    """actor actors actress assistant cast director film films genre genres great hello hi history
    movie movies rating recommend recommendation recommended recommending similar story system
    thanks title try user viewer watch watching year"""
)
# After one of these a capitalised word is a name even alone: "liked Palglone" invents a film.
_NAME_CUES = _words(
    """by starring director actor actress like liked love loved enjoy enjoyed watched recommend
    recommended"""
)
_TITLE_FOLLOWERS = _words("is was has and s")
_ABBREVIATIONS = _words("mr mrs ms dr st jr vs")
GENRE_FORMS = {  # lower-case forms that state a genre, beside its name and the name's plural
    "Animation": ("animated", "animations", "cartoon", "cartoons"),
    "Children's": ("children", "childrens"),
    "Comedy": ("comedies", "comedic"),
    "Documentary": ("documentaries",),
    "Fantasy": ("fantasies",),
    "Film-Noir": ("film noir", "films noir", "noir"),
    "Mystery": ("mysteries",),
    "Romance": ("romantic", "romances"),
    "Sci-Fi": ("scifi", "science fiction"),
}

_TOKEN = re.compile(r"(\w+|&)")
_WORD = re.compile(r"\w+(?:['’.\-]\w+)*")
_YEAR = re.compile(r"(?:19|20)\d\d\Z")
_BREAK = re.compile(r"[.!?\n]")
_ARTICLE = re.compile(r"(?:the|an?)\s+(?=\w)", re.IGNORECASE)
_PAREN = re.compile(r"\s*\(([^)]*)\)")
_ANY_CASE, _CAPITALS, _ALONE, _GENRE = range(4)  # rules by which a known form is accepted


class Claims(NamedTuple):
    """What a text says, each thing once, in order of first mention."""

    titles: tuple[frozenset[str], ...] = ()  # a mention: the catalogue titles that it may mean
    genres: tuple[str, ...] = ()  # named as in the catalogue
    years: tuple[int, ...] = ()  # four-digit years outside titles
    # Proper names that are no title, people and invented titles alike: two capitalised words or
    # more, or one after "by", "liked" and their like, or after a title and "and".
    people: tuple[str, ...] = ()
    # How far the words outside titles and genres are running English, in [0, 1]: 1 if a quarter of
    # them, and three different ones, are function words. A list of true keywords has 0.
    prose: float = 0.0


class Verdict(NamedTuple):
    """A text's claims held against its record: counts of distinct claims."""

    title: bool  # names the recommended film
    history: int  # own history titles named
    genres: int  # genres of the recommended film named
    history_genres: int  # further genres, each true of a history film that the text names
    years: int  # the film's year named
    foreign_titles: int  # catalogue titles that are neither the film nor in the history
    wrong_genres: int
    wrong_years: int
    people: int
    all_history: int  # different history titles of the record
    all_genres: int  # its genres, placeholders apart

    @property
    def supported(self) -> int:
        return self.title + self.history + self.genres + self.history_genres + self.years

    @property
    def unsupported(self) -> int:
        return self.foreign_titles + self.wrong_genres + self.wrong_years + self.people


def words(text: str) -> list[str]:
    """Words of ``text`` as written; "Sci-Fi", "don't" and "U.S" are one word each."""
    return _WORD.findall(text.replace("_", " "))


def distinct_share(tokens: list[str], n: int) -> float:
    """Share of the n-grams of ``tokens`` that are distinct; 1 where there are none."""
    grams = list(zip(*[tokens[i:] for i in range(n)], strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


class Catalogue:
    """The titles and genres a text can name.

    Args:
        titles: every title of the item table, article first ("The Rock").
        genres: genre names ("Sci-Fi"); forms such as "comedies" or "science fiction" are known.
    """

    def __init__(self, titles: Iterable[str], genres: Iterable[str]):
        self.titles = frozenset(t for t in titles if t.strip())
        self.genres = tuple(sorted({g for g in genres if g.lower() not in NO_GENRE}))
        if not self.titles:
            raise ValueError("catalogue: no titles; give the item table's title column")
        self._forms: dict = {}  # word -> the words that may follow; None -> (rule, capitals, what)
        genre_keys = {key: genre for genre in self.genres for key in _genre_keys(genre)}
        exact, alias = _title_keys(sorted(self.titles))
        for key, (spelt, named) in (alias | exact).items():
            if key not in genre_keys:
                self._insert(key, (*_title_rule(spelt), frozenset(named)))
        for key, genre in genre_keys.items():
            self._insert(key, (_GENRE, (), genre))
        self._last = "", _Reading("", self._forms)  # a text is asked about several times in a row
        self._record: Record | None = None  # and so is a record

    def _insert(self, key: tuple[str, ...], hit: tuple) -> None:
        node = self._forms
        for token in key:
            node = node.setdefault(token, {})
        node[None] = hit

    def _read(self, text: str) -> "_Reading":
        if text != self._last[0]:
            self._last = text, _Reading(text, self._forms)
        return self._last[1]

    def claims(self, text: str) -> Claims:
        """The claims of ``text``; see the module for the rules."""
        return self._read(text).claims

    def marks(self, record: Record, text: str) -> list[tuple[int, int, bool]]:
        """Every mention of the claims that ``verdict`` counts, in the order of the text.

        Returns (first character, one past the last, supported by ``record``).
        """
        own, own_genres, genres_of, _ = self._facts(record)
        said = self._read(text)
        others = [what for _, _, rule, what in said.forms if rule != _GENRE and own not in what]
        right = own_genres.union(*[genres_of[t] for what in others for t in what if t in genres_of])
        found = [(a, b, False) for a, b in said.names]
        found += [(i, i + 1, int(said.words[i]) == record["year"]) for i in said.years]
        for a, b, rule, what in said.forms:
            is_genre = rule == _GENRE
            known = own in what or not what.isdisjoint(genres_of) if not is_genre else what in right
            found.append((a, b, known))
        ends = list(accumulate(map(len, said.tokens)))  # of gap 0, word 0, gap 1, word 1, ...
        return [(ends[2 * a], ends[2 * b - 1], true) for a, b, true in sorted(found)]

    def verdict(self, record: Record, text: str) -> Verdict:
        """Hold the claims of ``text`` against ``record``.

        A genre is right if the recommended film has it, or a history film that the text names.
        Raises ``ValueError`` if the record's titles are not in the catalogue.
        """
        own, own_genres, genres_of, all_genres = self._facts(record)
        said = self.claims(text)
        others = [mention for mention in said.titles if own not in mention]
        named = {t for mention in others for t in mention if t in genres_of}
        false = [g for g in said.genres if g not in own_genres]
        theirs = {g for t in named for g in genres_of[t]}.intersection(false)
        right_year = record["year"] in said.years
        return Verdict(
            title=len(others) < len(said.titles),
            history=len(named),
            genres=len(said.genres) - len(false),
            history_genres=len(theirs),
            years=int(right_year),
            foreign_titles=sum(mention.isdisjoint(genres_of) for mention in others),
            wrong_genres=len(false) - len(theirs),
            wrong_years=len(said.years) - right_year,
            people=len(said.people),
            all_history=len(genres_of),
            all_genres=all_genres,
        )

    def _facts(self, record: Record) -> tuple[str, set[str], dict[str, list[str]], int]:
        """The record's (title, genres, genres by history title, number of real genres)."""
        if record is not self._record:
            own, titles = record["title"], record["history_titles"]
            genres_of = dict(zip(titles, record["history_genres"], strict=True))
            for title in (own, *genres_of):
                if title not in self.titles:
                    raise ValueError(
                        f"record of user {record['user']}: title {title!r} is not in the "
                        "catalogue; build it from the same item table"
                    )
            self._record = record
            self._known = own, set(record["genres"]), genres_of, len(real_genres(record))
        return self._known


def _split(text: str) -> tuple[str, ...]:
    return tuple("and" if w == "&" else w for w in _TOKEN.findall(text.replace("_", " ")))


def _lower(key: Iterable[str]) -> tuple[str, ...]:
    return tuple(word.lower() for word in key)


def _genre_keys(genre: str) -> set[tuple[str, ...]]:
    forms = (genre, genre + "s", *GENRE_FORMS.get(genre, ()))
    return {_lower(_split(form)) for form in forms} - {()}


def _title_keys(titles: list[str]) -> tuple[dict, dict]:
    """Lower-case forms -> (form as spelt, titles it may mean): full forms, and shorter ones."""
    exact: dict[tuple[str, ...], tuple] = {}
    alias: dict[tuple[str, ...], tuple] = {}
    for title in titles:
        plain = _PAREN.sub("", title)
        head = _split(plain.split(":")[0])
        shorter = [_split(inner) for inner in _PAREN.findall(title) if not inner.isdigit()]
        shorter += [_split(_ARTICLE.sub("", plain, count=1)), head if len(head) > 1 else ()]
        for forms, keys in ((exact, [_split(title), _split(plain)]), (alias, shorter)):
            for key in filter(None, keys):
                forms.setdefault(_lower(key), (key, set()))[1].add(title)
    return exact, alias


def _title_rule(spelt: tuple[str, ...]) -> tuple[int, tuple[int, ...]]:
    """How a form must be written to count, and which of its words need their capital."""
    small = [word.lower() in SMALL for word in spelt]
    if len(spelt) == 1:
        return _ALONE, (0,)
    if len(spelt) > 2 and small.count(False) > 1:
        return _ANY_CASE, ()
    needed = range(len(spelt)) if all(small) else [k for k, s in enumerate(small) if not s]
    return _CAPITALS, tuple(k for k in needed if spelt[k][0].isupper())


def _joins(gap: str, before: str) -> bool:
    """Whether ``gap`` after the word ``before`` can stand inside a name ("J. Smith", "O'Hara")."""
    initial = len(before) == 1 or before in _ABBREVIATIONS
    return gap in (" ", "-", "'") or (gap in (". ", ".") and initial)


class _Reading:
    """One text's words and what was found in them; places are numbers of words.

    Args:
        text: as written; "&" counts as the word "and", "_" as a space.
        known: the catalogue's forms (``Catalogue._forms``).
    """

    def __init__(self, text: str, known: dict):
        self.tokens = _TOKEN.split(text.replace("_", " ").replace("’", "'"))
        self.gaps = self.tokens[::2]  # gaps[i] stands before word i, and one after the last word
        self.words = ["and" if token == "&" else token for token in self.tokens[1::2]]
        self.lower = [word.lower() for word in self.words]
        self.used = bytearray(len(self.words))  # for each word 0 free, 1 genre, 2 title
        # (first word, one past the last, rule, titles it may mean or the genre)
        self.forms = self._find_forms(known)
        free = [i for i, use in enumerate(self.used) if not use]
        self.years = [i for i in free if _YEAR.match(self.words[i])]
        self.names = self._find_names(free)  # (first word, one past the last)
        titles = [what for _, _, rule, what in self.forms if rule != _GENRE]
        genres = [what for _, _, rule, what in self.forms if rule == _GENRE]
        years = [int(self.words[i]) for i in self.years]
        people = [" ".join(self.words[a:b]) for a, b in self.names]
        once = (tuple(dict.fromkeys(found)) for found in (titles, genres, years, people))
        self.claims = Claims(*once, self._prose(free))

    def _find_forms(self, known: dict) -> list[tuple]:
        """The longest known forms from left to right; marks their words as used."""
        n, lower, free = len(self.words), self.lower, 0
        forms = []
        for i, node in enumerate(map(known.get, lower)):
            if node is None or i < free:
                continue
            j, end, found = i, 0, None
            while node is not None:
                j += 1
                if None in node and self._accepts(node[None], i):
                    end, found = j, node[None]
                node = node.get(lower[j]) if j < n else None
            if found:
                forms.append((i, end, found[0], found[2]))
                self.used[i:end] = (b"\1" if found[0] == _GENRE else b"\2") * (end - i)
                free = end
        return forms

    def _accepts(self, hit: tuple, i: int) -> bool:
        """Whether the words from ``i`` on, which spell a known form, are written as one."""
        rule, capitals, _ = hit
        for k in capitals:  # most known words are met in lower case
            if self.words[i + k][0].islower():
                return False
        return rule != _ALONE or self._stands_alone(i)

    def _stands_alone(self, i: int) -> bool:
        follows = i + 1 < len(self.words)
        if follows and self._may_be_one_name(i) and self.lower[i + 1] not in _NOT_NAMES:
            return False
        if self._opens_sentence(i):
            after = self.gaps[i + 1] if follows else ""
            shown = any(c in after for c in '("”*,:')
            shown = shown or (follows and self.lower[i + 1] in _TITLE_FOLLOWERS)
            return shown and self.lower[i] not in SMALL
        before = self.words[i - 1][0].isupper() and _joins(self.gaps[i], self.lower[i - 1])
        neighbour = before and self.lower[i - 1] not in _NOT_NAMES
        return not neighbour or self._opens_sentence(i - 1)

    def _may_be_one_name(self, i: int) -> bool:
        """Whether word ``i`` and a capitalised one after it can be parts of one name."""
        return self.words[i + 1][0].isupper() and _joins(self.gaps[i + 1], self.lower[i])

    def _opens_sentence(self, i: int) -> bool:
        if i == 0:
            return True
        before = self.lower[i - 1]
        ends = bool(_BREAK.search(self.gaps[i]))
        return ends and before not in _ABBREVIATIONS and len(before) > 1

    def _prose(self, free: list[int]) -> float:
        function = [self.lower[i] for i in free if self.lower[i] in SMALL]
        if not function:
            return 0.0
        share = len(function) / (FUNCTION_WORDS * len(free))
        return min(share, len(set(function)) / 3, 1.0)

    def _find_names(self, free: list[int]) -> list[tuple[int, int]]:
        """Proper names that are no title."""
        runs: list[list[int]] = []  # capitalised words that follow one another
        for i in free:
            if not self.words[i][0].isupper():
                continue
            follows = bool(runs) and runs[-1][-1] == i - 1
            if self.lower[i] in _NOT_NAMES:
                # "The Matrix" inside a sentence: a capitalised article belongs to the name
                article = self.lower[i] == "the" and not self._opens_sentence(i)
                if follows or not article:
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
        after_title = self.lower[i - 1] == "and" and i > 1 and self.used[i - 2] == 2
        return self.lower[i - 1] in _NAME_CUES or after_title
