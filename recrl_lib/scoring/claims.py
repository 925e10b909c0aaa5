"""Finding what an explanation claims: film titles, genres, years and proper names.

Pure string work, shared by the reward and the judge. Both must agree on *what a text says*; how
they score it is their own business, and neither imports the other.

How a title is recognised (longest match first, left to right, over words; punctuation ignored):

* three or more words, at least two of them outside ``SMALL``: in any case ("the usual suspects");
* other titles of several words: capitalised as in the catalogue, ``SMALL`` words apart ("The Game", not "the game");
* one word: capitalised, alone (no capitalised neighbour: "Michael Bay" is not "Michael"), and not merely
  the first word of a sentence, unless what follows shows a title ("Fargo is", '"Heat"', "Twister (1996)").

Besides its full form a title answers to its form without a parenthesis, the parenthesis itself, the part
before a colon (two words or more) and the form without a leading article. A form that fits several titles
("Star Trek") means any of them; a genre word is never a title.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from recrl_lib.explainer.prompts import NO_GENRE, Record, real_genres

SMALL = (
    frozenset(  # function words: they open sentences and join titles, and alone they name nothing
        """a about after all also although an and another any are as at be because been before being both but by can
    could did do does each even every for from given had has have he her here hers him his how i if in into is it
    its just less let like may me might more most much my no nor not now of off on once one only or other our out
    over own perhaps plus she should since so some such than that the their them then there these they this those
    though through to too two under until up us very was we well were what when where whether which while who whom
    whose why will with without would yes yet you your""".split()
    )
)
FUNCTION_WORDS = 0.25  # running English has about 40 %, a list of keywords next to none
_NOT_NAMES = SMALL | frozenset(
    """actor actors actress assistant cast director film films genre genres great hello hi history movie movies
    rating recommend recommendation recommended recommending similar story system thanks title try user viewer
    watch watching year""".split()
)
# A capitalised word after one of these is a name even when it stands alone: "liked Palglone" invents a film.
_NAME_CUES = frozenset(
    "by starring director actor actress like liked love loved enjoy enjoyed watched recommend recommended".split()
)
_TITLE_FOLLOWERS = frozenset("is was has and s".split())
_ABBREVIATIONS = frozenset("mr mrs ms dr st jr vs".split())

GENRE_FORMS = {  # lower-case forms beside the name itself and its plural; only ones that state a genre
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

_TOKEN = re.compile(r"(\w+)")
_WORD = re.compile(r"\w+(?:['’.\-]\w+)*")
_YEAR = re.compile(r"(?:19|20)\d\d\Z")
_BREAK = re.compile(r"[.!?\n]")
_ARTICLE = re.compile(r"(?:the|an?)\s+(?=\w)", re.IGNORECASE)
_PAREN = re.compile(r"\s*\(([^)]*)\)")

_ANY_CASE, _CAPITALS, _ALONE, _GENRE = range(4)


class Claims(NamedTuple):
    """What a text says, each thing once, in order of first mention.

    titles: one set a mention: the catalogue titles it may mean.  genres: names as in the catalogue.
    years: four-digit years outside titles.  people: proper names that are no title: two capitalised words or more,
    or one after "by", "liked" and their like, or after a title and "and". People and invented titles both: the
    metadata supports neither.
    prose: how far the words outside titles and genres are running English, in [0, 1]: full if a quarter of them,
    and three different ones, are function words. A list of true keywords has 0.
    """

    titles: tuple[frozenset[str], ...] = ()
    genres: tuple[str, ...] = ()
    years: tuple[int, ...] = ()
    people: tuple[str, ...] = ()
    prose: float = 0.0


class Verdict(NamedTuple):
    """A text's claims held against its record. Counts are of distinct claims; ``all_…`` what the record offers."""

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
    grams = len(tokens) - n + 1
    return (
        len(set(zip(*[tokens[i:] for i in range(n)], strict=False))) / grams if grams > 0 else 1.0
    )


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
        self._trie: dict = {}
        self._last = ("", Claims())  # one text is asked about several times in a row
        self._record = None  # and one record
        genre_keys = {key: genre for genre in self.genres for key in _genre_keys(genre)}
        exact, alias = _title_keys(sorted(self.titles))
        for key, (spelt, named) in (alias | exact).items():
            if key not in genre_keys:
                self._insert(key, (*_title_rule(spelt), frozenset(named)))
        for key, genre in genre_keys.items():
            self._insert(key, (_GENRE, (), genre))

    def _insert(self, key: tuple[str, ...], hit: tuple) -> None:
        node = self._trie
        for token in key:
            node = node.setdefault(token, {})
        node[None] = hit

    def claims(self, text: str) -> Claims:
        """The claims of ``text``; see the module for the rules."""
        if text != self._last[0]:
            self._last = text, self._find(text)
        return self._last[1]

    def _find(self, text: str) -> Claims:
        tokens = _TOKEN.split(text.replace("_", " ").replace("&", " and ").replace("’", "'"))
        gaps, names = (
            tokens[::2],
            tokens[1::2],
        )  # gaps[i] stands before names[i], and one after the last
        lower = list(map(str.lower, names))
        forms, used = self._forms(gaps, names, lower)
        titles = dict.fromkeys([what for _, _, rule, what in forms if rule != _GENRE])
        genres = dict.fromkeys([what for _, _, rule, what in forms if rule == _GENRE])
        years = dict.fromkeys(
            int(w) for i, w in enumerate(names) if w[0] in "12" and not used[i] and _YEAR.match(w)
        )
        people = dict.fromkeys(
            [" ".join(names[a:b]) for a, b in _proper_names(gaps, names, lower, used)]
        )
        return Claims(
            tuple(titles), tuple(genres), tuple(years), tuple(people), _prose(lower, used)
        )

    def _forms(self, gaps, names, lower) -> tuple[list[tuple], bytearray]:
        """([(first word, one past the last, rule, titles it may mean or genre)], for each word 0 free 1 genre 2 title)."""
        n, free = len(names), 0  # words before ``free`` are part of a form found already
        forms, used = [], bytearray(n)
        for i, node in enumerate(map(self._trie.get, lower)):
            if node is None or i < free:
                continue
            j, end = i, 0
            while node is not None:
                j += 1
                if None in node and _accepts(node[None], gaps, names, lower, i):
                    end, found = j, node[None]
                node = node.get(lower[j]) if j < n else None
            if end:
                forms.append((i, end, found[0], found[2]))
                used[i:end] = (b"\1" if found[0] == _GENRE else b"\2") * (end - i)
                free = end
        return forms, used

    def marks(self, record: Record, text: str) -> list[tuple[int, int, bool]]:
        """What ``text`` claims, in its order: (first character, one past the last, supported by ``record``).

        The same claims that ``verdict`` counts, each of its mentions.
        """
        own, own_genres, genres_of, _ = self._facts(record)
        places = list(re.finditer(r"\w+|&", text.replace("_", " ")))
        names = ["and" if place[0] == "&" else place[0] for place in places]
        ends = [0, *(place.end() for place in places)]
        gaps = [
            text[a:b].replace("’", "'")
            for a, b in zip(ends, [*(p.start() for p in places), len(text)], strict=True)
        ]
        lower = list(map(str.lower, names))
        forms, used = self._forms(gaps, names, lower)
        named = {
            t
            for _, _, rule, what in forms
            if rule != _GENRE and own not in what
            for t in what
            if t in genres_of
        }
        right = own_genres.union(*[genres_of[t] for t in named])
        found = [
            (
                a,
                b,
                what in right if rule == _GENRE else own in what or not what.isdisjoint(genres_of),
            )
            for a, b, rule, what in forms
        ]
        found += [
            (i, i + 1, int(w) == record["year"])
            for i, w in enumerate(names)
            if not used[i] and _YEAR.match(w)
        ]
        found += [(a, b, False) for a, b in _proper_names(gaps, names, lower, used)]
        return [(places[a].start(), places[b - 1].end(), true) for a, b, true in sorted(found)]

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
        theirs = {g for t in named for g in genres_of[t]}.intersection(false) if false else ()
        right_year = record["year"] in said.years
        return Verdict(
            title=len(others) < len(said.titles),
            history=len(named),
            genres=len(said.genres) - len(false),
            history_genres=len(theirs),
            years=int(right_year),
            foreign_titles=sum([mention.isdisjoint(genres_of) for mention in others]),
            wrong_genres=len(false) - len(theirs),
            wrong_years=len(said.years) - right_year,
            people=len(said.people),
            all_history=len(genres_of),
            all_genres=all_genres,
        )

    def _facts(self, record: Record) -> tuple[str, set[str], dict[str, list[str]], int]:
        """(title, genres, genres by history title, number of real genres); kept: PPO samples a prompt several times."""
        if record is not self._record:
            own, genres_of = (
                record["title"],
                dict(zip(record["history_titles"], record["history_genres"], strict=True)),
            )
            for title in (own, *genres_of):
                if title not in self.titles:
                    raise ValueError(
                        f"record of user {record['user']}: title {title!r} is not in the catalogue; "
                        "build it from the same item table"
                    )
            self._record, self._known = (
                record,
                (own, set(record["genres"]), genres_of, len(real_genres(record))),
            )
        return self._known


def _split(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text.replace("_", " ").replace("&", " and ")))


def _lower(key: Iterable[str]) -> tuple[str, ...]:
    return tuple(word.lower() for word in key)


def _genre_keys(genre: str) -> set[tuple[str, ...]]:
    forms = (genre, genre + "s", *GENRE_FORMS.get(genre, ()))
    return {_lower(_split(form)) for form in forms} - {()}


def _title_keys(titles: list[str]) -> tuple[dict, dict]:
    """Lower-case forms -> (form as spelt, titles it may mean): the full forms, and the shorter ones."""
    exact: dict[tuple[str, ...], tuple] = {}
    alias: dict[tuple[str, ...], tuple] = {}
    for title in titles:
        plain = _PAREN.sub("", title)
        head = _split(plain.split(":")[0])
        shorter = [_split(inner) for inner in _PAREN.findall(title) if not inner.isdigit()] + [
            _split(_ARTICLE.sub("", plain, count=1))
        ]
        for forms, keys in (
            (exact, [_split(title), _split(plain)]),
            (alias, shorter + [head] * (len(head) > 1)),
        ):
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


def _accepts(hit: tuple, gaps, names, lower, i: int) -> bool:
    """Whether the words from ``i`` on, which spell a known form, are written as one."""
    rule, capitals, _ = hit
    for k in capitals:  # most known words are met in lower case
        if names[i + k][0].islower():
            return False
    return rule != _ALONE or _stands_alone(gaps, names, lower, i)


def _stands_alone(gaps, names, lower, i: int) -> bool:
    follows = i + 1 < len(names)
    if (
        follows
        and names[i + 1][0].isupper()
        and _joins(gaps[i + 1], lower[i])
        and lower[i + 1] not in _NOT_NAMES
    ):
        return False
    if _opens_sentence(gaps, lower, i):
        shown = follows and (
            lower[i + 1] in _TITLE_FOLLOWERS or any(c in gaps[i + 1] for c in '("”*,:')
        )
        return shown and lower[i] not in SMALL
    neighbour = (
        names[i - 1][0].isupper()
        and _joins(gaps[i], lower[i - 1])
        and lower[i - 1] not in _NOT_NAMES
    )
    return not neighbour or _opens_sentence(gaps, lower, i - 1)


def _opens_sentence(gaps, lower, i: int) -> bool:
    if i == 0:
        return True
    previous = lower[i - 1]
    return bool(_BREAK.search(gaps[i])) and previous not in _ABBREVIATIONS and len(previous) > 1


def _joins(gap: str, before: str) -> bool:
    """Whether two capitalised words with ``gap`` between them can be one name ("J. Smith", "O'Hara")."""
    return gap in (" ", "-", "'") or (
        gap in (". ", ".") and (len(before) == 1 or before in _ABBREVIATIONS)
    )


def _prose(lower: list[str], used: bytearray) -> float:
    free = [word for word, use in zip(lower, used, strict=True) if not use] if any(used) else lower
    function = list(filter(SMALL.__contains__, free))
    return (
        min(len(function) / (FUNCTION_WORDS * len(free)), len(set(function)) / 3, 1.0)
        if function
        else 0.0
    )


def _proper_names(gaps, names, lower, used) -> list[tuple[int, int]]:
    """(first word, one past the last) of each proper name that is no title."""
    found: list[tuple[int, int]] = []
    run: list[int] = []
    for i in [
        i for i, name in enumerate(names) if name != lower[i] and not used[i]
    ]:  # few have a capital at all
        if not names[i][0].isupper():
            continue
        # "The Matrix" inside a sentence: a capitalised article belongs to the name
        if lower[i] in _NOT_NAMES and (
            lower[i] != "the" or (run and run[-1] == i - 1) or _opens_sentence(gaps, lower, i)
        ):
            continue
        if run and not (run[-1] == i - 1 and _joins(gaps[i], lower[i - 1])):
            found += _name(run, gaps, names, lower, used)
            run = []
        run.append(i)
    return found + _name(run, gaps, names, lower, used)


def _name(run: list[int], gaps, names, lower, used) -> list[tuple[int, int]]:
    if len(run) > 1 or (run and _alone_but_cued(run[0], gaps, names, lower, used)):
        return [(run[0], run[-1] + 1)]
    return []


def _alone_but_cued(i: int, gaps, names, lower, used) -> bool:
    """Whether word ``i``, alone, is a name by what stands before it: a cue, or a title and "and"."""
    cut_off = (
        i == len(names) - 1 and not gaps[i + 1].strip()
    )  # the text's last word may be the first of a title
    if i == 0 or cut_off or len(names[i]) == 1 or lower[i] == "the":
        return False
    return lower[i - 1] in _NAME_CUES or (lower[i - 1] == "and" and i > 1 and used[i - 2] == 2)
