import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recrl_lib.scoring.claims import Catalogue

TITLES = """The Rock|Heat|Con Air|The Usual Suspects|The Game|Fear|Fargo|Michael|M*A*S*H|In & Out
Face/Off|Seven (Se7en)|Star Trek: First Contact|Star Trek: The Motion Picture|Schindler's List
Terminator 2: Judgment Day|True Romance|2001: A Space Odyssey|Les Misérables|Aiqing wansui
The Prophecy (1995)|The War|The Godfather|The Godfather: Part II""".replace("\n", "|").split("|")
GENRES = ["Action", "Thriller", "Comedy", "Sci-Fi", "Film-Noir", "Romance", "War", "Children's"]
GENRES += ["Animation", "unknown"]
CATALOGUE = Catalogue(TITLES, GENRES)


def titles(text):
    return [sorted(mention) for mention in CATALOGUE.claims(text).titles]


@pytest.mark.parametrize("title", TITLES)
def test_every_title_is_found_in_a_sentence_and_claims_nothing_else(title):
    said = CATALOGUE.claims(f"You should see {title} tonight.")
    assert len(said.titles) == 1 and title in said.titles[0]
    assert (said.genres, said.years, said.people) == ((), (), ())


@pytest.mark.parametrize(
    "text, found",
    [
        # distinctive: in any case, and once
        ("i loved THE USUAL SUSPECTS and the usual suspects", [["The Usual Suspects"]]),
        ("It is part of the game, and in and out of fear.", []),  # common words
        ("You like The Game and In and Out.", [["The Game"], ["In & Out"]]),
        ("Fear drives this film. Heat rises.", []),  # the first word of a sentence shows nothing
        ("Fargo is dark. Heat (1995) too.", [["Fargo"], ["Heat"]]),  # unless followed like a title
        ("directed by Michael Bay", []),  # part of a name
        ("You saw Michael.", [["Michael"]]),
        ("The Rock's action", [["The Rock"]]),
        ("Terminator 2 is loud", [["Terminator 2: Judgment Day"]]),
        # either of two; the longest first; an exact title is not an alias of its sequel
        ("classic Star Trek", [["Star Trek: First Contact", "Star Trek: The Motion Picture"]]),
        ("Star Trek: First Contact", [["Star Trek: First Contact"]]),
        ("you liked The Godfather", [["The Godfather"]]),
        ("Se7en and Seven were", [["Seven (Se7en)"]]),
        ("a film of 1995", []),  # a year in a title's parenthesis is no title
        ("", []),
    ],
)
def test_titles(text, found):
    assert titles(text) == found


def test_genres_in_their_forms_and_not_inside_titles_and_years_outside_titles():
    said = CATALOGUE.claims(
        "Comedies, thrillers, science fiction, films noir, an animated romantic story "
        "for children. Drama, War."
    )
    named = "Comedy Thriller Sci-Fi Film-Noir Animation Romance Children's War"
    assert said.genres == tuple(named.split())
    assert CATALOGUE.claims("You saw True Romance, of unknown origin, a thrill").genres == ()
    dated = "From 1994, not the 1990s, 12345 or 2001: A Space Odyssey; 1994 again."
    assert CATALOGUE.claims(dated).years == (1994,)


NAMED = "directed by Michael Bay, starring DiCaprio, with Tom Hanks"


@pytest.mark.parametrize(
    "text, found",
    [
        (NAMED, ("Michael Bay", "DiCaprio", "Tom Hanks")),
        ("Because Tom Hanks acts", ("Tom Hanks",)),
        ("by J. K. Rowling and Jean-Luc Godard", ("J K Rowling", "Jean Luc Godard")),
        ("like The Matrix", ("The Matrix",)),  # a film that is in no catalogue
        ("Because you liked Palglone and Heat, try it", ("Palglone",)),  # invented, of one word
        ("Because you liked Heat and Palglone, try it", ("Palglone",)),
        ("a drama and American story, in English and French", ()),  # "and" after a genre
        ("I think you will like Palgl", ()),  # cut off: it may have become a title
        ("I think you will like Palgl.", ("Palgl",)),
        ("I recommend Heat. You will love Con Air. The story is American.", ()),
        ("Action Comedy", ()),
    ],
)
def test_proper_names(text, found):
    assert CATALOGUE.claims(text).people == found


@pytest.mark.parametrize(
    "text, prose",
    [
        ("Because you liked Heat and The Rock, I recommend Con Air (1997), an action thriller.", 1),
        ("Con Air, The Rock, The Game, In & Out, action, thriller.", 0),  # titles' own words
        ("Heat and Fargo and Con Air and The Rock and action and comedy", 1 / 3),
    ],
)
def test_prose_tells_sentences_from_lists(text, prose):
    assert CATALOGUE.claims(text).prose == pytest.approx(prose)


RECORD = dict(user=3, item=3, position=1, title="Con Air", year=1997, genres=["Action", "Thriller"])
RECORD |= dict(history_titles=["Heat", "Fargo"], history_genres=[["Action"], ["Comedy"]])


def test_verdict_by_hand():
    text = "Like the comedy Fargo, Con Air (1996) is an action romance by John Woo, "
    v = CATALOGUE.verdict(RECORD, text + "not The Rock or Fear.")
    assert (v.title, v.history, v.genres) == (True, 1, 1)
    assert (v.foreign_titles, v.wrong_genres, v.wrong_years, v.people) == (2, 1, 1, 1)
    assert (v.supported, v.unsupported) == (4, 5)


def test_marks_by_hand():
    text = "Like the _ comedy Fargo & Heat, Con Air (1996) is an action romance by John Woo."
    marked = [(text[a:b], true) for a, b, true in CATALOGUE.marks(RECORD, text)]
    true, false = ["comedy", "Fargo", "Heat", "Con Air", "action"], ["1996", "romance", "John Woo"]
    assert [word for word, right in marked if right] == true
    assert [word for word, right in marked if not right] == false
    assert CATALOGUE.marks(RECORD, "") == []


TOKENS = "Con Air Heat Fargo The Rock & action comedy 1997 1990 by John Woo , . is a’s _".split()


@settings(deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=14).map(" ".join) | st.text(max_size=80))
@example("Con Rock by Rock Con Air")  # one word as a title and as a name: two claims
@example("by Con _")  # cut off, and no name: "_" is a space to both
def test_marks_are_the_claims_that_the_verdict_counts(text):
    assert 0 <= CATALOGUE.claims(text).prose <= 1
    marked = CATALOGUE.marks(RECORD, text)
    verdict = CATALOGUE.verdict(RECORD, text)
    for counted, wanted in ((verdict.unsupported, False), (verdict.supported, True)):
        said = [text[a:b] for a, b, true in marked if true == wanted]
        assert bool(said) == (counted > 0) and len(said) >= counted
    assert all(a < b <= c for (a, b, _), (c, _, _) in zip(marked, [*marked[1:], (len(text), 0, 0)]))


def test_a_history_genre_needs_its_film_and_an_ambiguous_mention_is_read_kindly():
    assert CATALOGUE.verdict(RECORD, "Con Air is a comedy like Heat.").wrong_genres == 1
    assert CATALOGUE.verdict(RECORD, "Con Air is a comedy like Fargo.").wrong_genres == 0
    record = RECORD | dict(title="Star Trek: First Contact", genres=["Sci-Fi"])
    assert CATALOGUE.verdict(record, "You will enjoy Star Trek.").title


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="not in the catalogue; build it from the same item table"):
        CATALOGUE.verdict(RECORD | {"title": "Nowhere Known"}, "x")
    with pytest.raises(ValueError, match="no titles; give the item table's title column"):
        Catalogue([], GENRES)
