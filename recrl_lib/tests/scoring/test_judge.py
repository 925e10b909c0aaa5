import math

import numpy as np
import pytest

from recrl_lib.explainer.prompts import messages
from recrl_lib.scoring import claims, judge
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.scoring.composed import control_texts, reference_line

TITLES = [
    f"{a} {b}"
    for a in ("Lost", "Golden", "Silent", "Broken")
    for b in ("River", "Castle", "Island", "Engine")
]
GENRES = ["Action", "Comedy", "Drama", "Horror", "Western"]
CATALOGUE = Catalogue(TITLES, GENRES)
N = len(TITLES)
RECORDS = [
    dict(
        user=i,
        item=i + 1,
        position=1,
        title=TITLES[i],
        year=1980 + i,
        genres=[GENRES[i % 5], GENRES[(i + 1) % 5]],
        history_titles=[TITLES[(i + 3) % N], TITLES[(i + 7) % N]],
        history_genres=[[GENRES[i % 5]], [GENRES[(i + 3) % 5]]],
    )
    for i in range(N)
]
REFERENCES = [reference_line(r) for r in RECORDS]
LOGPROBS = [np.log(np.full(8, 0.25))] * N
RECORD = RECORDS[
    0
]  # Lost River (1980), Action and Comedy; liked Lost Engine (Action) and Golden Engine (Horror)


class BagOfWords:
    """A real, tiny encoder: unit vectors of word counts. MiniLM itself is too large for a unit test."""

    def encode(self, texts, batch=64):
        vocabulary = {
            w: i
            for i, w in enumerate(
                sorted({w for t in TITLES for w in t.lower().split()} | set(map(str.lower, GENRES)))
            )
        }
        counts = np.zeros((len(texts), len(vocabulary) + 1), np.float32)
        for row, text in zip(counts, texts, strict=True):
            for word in claims.words(text.lower()):
                row[vocabulary.get(word, -1)] += word in vocabulary
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize(
    "text, precision, recall",
    [
        (
            "Because you liked Lost Engine, try Lost River (1980), an action comedy.",
            1,
            1,
        ),  # the year is no fact to recall
        ("Lost River is an action film by John Smith.", 2 / 3, 2 / 4),
        ("Golden Castle is a western.", 0, 0),
        (
            "You liked Golden Engine, a horror film of 1990.",
            2 / 3,
            1 / 4,
        ),  # true of the history; the year is not known to be
        ("A very good film.", math.nan, 0),
        ("", math.nan, 0),
    ],
)
def test_grounding_by_hand(text, precision, recall):
    assert judge.grounding(RECORD, text, CATALOGUE) == pytest.approx(
        (precision, recall), nan_ok=True
    )


def test_f1():
    assert judge.f1(1, 1) == 1
    assert judge.f1(0.5, 0.25) == pytest.approx(1 / 3)
    assert judge.f1(math.nan, 0) == judge.f1(0, 0) == 0


def test_every_reference_line_is_true_and_complete():
    for record, line in zip(RECORDS, REFERENCES, strict=True):
        assert judge.grounding(record, line, CATALOGUE) == (1, 1), line
    assert len({line.split()[0] for line in REFERENCES}) == 3  # more than one opening


@pytest.mark.parametrize(
    "changed, line",
    [
        (
            dict(genres=["unknown"], year=0),
            "Because you liked Golden Engine and Lost Engine, I recommend Lost River, a film in the same vein.",
        ),
        (
            dict(genres=["Comedy"], history_titles=[], history_genres=[]),
            "I recommend Lost River (1980), a comedy film.",
        ),
        (
            dict(
                genres=["Action", "Comedy", "Film-Noir"],
                history_titles=["Lost Engine"],
                history_genres=[[]],
            ),
            "Because you liked Lost Engine, I recommend Lost River (1980), an action, comedy and film noir film.",
        ),
    ],
)
def test_reference_line_with_parts_missing(changed, line):
    assert (
        reference_line(RECORD | changed | dict(user=2)) == line
    )  # user + item = 3: the first opening


def test_card():
    assert (
        judge.card(RECORD)
        == "Lost River (1980). Genres: Action, Comedy. The viewer liked Lost Engine, Golden Engine."
    )
    assert judge.card(RECORD | dict(year=0, genres=[], history_titles=[])) == "Lost River."


def test_retrieval_finds_its_own_card_and_shuffled_texts_do_not():
    texts, rounds = REFERENCES, 40
    own = np.mean(
        [
            judge.own_item_retrieval(texts, RECORDS, BagOfWords(), np.random.default_rng(s)).mean()
            for s in range(rounds)
        ]
    )
    rng = np.random.default_rng(0)
    shuffled = np.mean(
        [
            judge.own_item_retrieval(
                [texts[i] for i in rng.permutation(N)],
                RECORDS,
                BagOfWords(),
                np.random.default_rng(s),
            ).mean()
            for s in range(rounds)
        ]
    )
    assert own > 0.95
    assert shuffled == pytest.approx(0.1, abs=0.06)


def test_retrieval_counts_ties_and_empty_texts_against_the_text():
    rng = np.random.default_rng(0)
    assert not judge.own_item_retrieval([""] * N, RECORDS, BagOfWords(), rng).any()
    assert not judge.own_item_retrieval(
        ["same words for all"] * N, RECORDS, BagOfWords(), rng
    ).any()


def test_masking_removes_the_titles_only():
    assert (
        judge._mask(RECORD, "Lost River, lost engine: action, not Lost Rivers")
        == "this film, this film: action, not Lost Rivers"
    )
    plain = [
        f"I recommend {r['title']} after {' and '.join(r['history_titles'])}." for r in RECORDS
    ]
    assert (
        judge.own_item_retrieval(plain, RECORDS, BagOfWords(), np.random.default_rng(0)).mean()
        > 0.5
    )
    assert not judge.own_item_retrieval(
        plain, RECORDS, BagOfWords(), np.random.default_rng(0), mask_titles=True
    ).any()


def test_candidates_are_other_cards_and_the_same_in_every_arm():
    repeated = RECORDS + RECORDS  # two samples of each prompt: a text's twin is no distractor
    a = judge.card_cosines(REFERENCES * 2, repeated, BagOfWords(), np.random.default_rng(5))
    b = judge.card_cosines(REFERENCES * 2, repeated, BagOfWords(), np.random.default_rng(5))
    assert a.shape == (2 * N, 10) and np.array_equal(a, b)
    own = np.array(
        [
            float(
                BagOfWords().encode([t, judge.card(r)])[0]
                @ BagOfWords().encode([t, judge.card(r)])[1]
            )
            for t, r in zip(REFERENCES, RECORDS, strict=True)
        ]
    )
    assert a[:N, 0] == pytest.approx(own)
    all_others = judge.card_cosines(
        REFERENCES, RECORDS, BagOfWords(), np.random.default_rng(0), n=N
    )
    full = BagOfWords().encode(REFERENCES) @ BagOfWords().encode([judge.card(r) for r in RECORDS]).T
    assert np.sort(all_others, 1) == pytest.approx(
        np.sort(full, 1), abs=1e-6
    )  # each other card once, none twice
    with pytest.raises(ValueError, match="raise eval_users"):
        judge.card_cosines(REFERENCES[:3], RECORDS[:3], BagOfWords(), np.random.default_rng(0))


RIVALS = [[RECORDS[i], *(RECORDS[j] for j in range(N) if j != i)][:10] for i in range(N)]


def test_features_by_hand():
    text = "Because you liked Lost Engine, try Lost River, an action film unlike Golden Castle."
    assert judge.features(RECORD, text, CATALOGUE) == {
        "Lost Engine",
        "Lost River",
        "Golden Castle",
        "Action",
    }
    assert judge.true_features(RECORD) == {"Lost River", "Action", "Comedy"}
    named = [frozenset({"Lost River", "Action"}), frozenset({"Action", "Horror"}), frozenset()]
    # wanted of the two records: Lost River, Action, Comedy, and Lost Castle, Comedy, Drama
    assert judge.feature_coverage(RECORDS[:2], named) == pytest.approx(2 / 5)
    assert judge.feature_diversity(named) == pytest.approx(
        1 / 3
    )  # one pair of three shares one feature
    twin = [len(a & b) for i, a in enumerate(named) for b in named[i + 1 :]]
    assert (
        judge.feature_diversity(named) == np.mean(twin) and judge.feature_diversity(named[:1]) == 0
    )
    assert judge.feature_diversity([frozenset({"a", "b"})] * 4) == 2


def test_the_film_is_picked_among_the_same_users_films():
    plain = [f"I recommend {r['title']}, {' and '.join(r['genres'])}." for r in RECORDS]
    assert judge.own_film(plain, RIVALS, BagOfWords()).all()
    by_history = [f"You liked {' and '.join(r['history_titles'])}, so try it." for r in RECORDS]
    assert (
        judge.own_film(by_history, RIVALS, BagOfWords()).mean() < 0.4
    )  # the history gives nothing away
    assert not judge.own_film(["the same for all"] * N, RIVALS, BagOfWords()).any()
    with pytest.raises(ValueError, match="as many rivals"):
        judge.own_film(REFERENCES, RIVALS[1:], BagOfWords())


def test_candidates_from_a_pool_are_the_same_for_the_first_few():
    whole = judge.card_cosines(REFERENCES, RECORDS, BagOfWords(), np.random.default_rng(5))
    few = judge.card_cosines(
        REFERENCES[:4], RECORDS[:4], BagOfWords(), np.random.default_rng(5), pool=RECORDS
    )
    assert np.array_equal(whole[:4], few)


def test_shuffled_texts_are_never_their_own():
    for seed in range(5):
        frame = judge.shuffled(
            RECORDS, REFERENCES, BagOfWords(), CATALOGUE, np.random.default_rng(seed), rivals=RIVALS
        )
        assert list(frame.drop(columns="own_item_probability")) == list(judge.PAIRED)
        assert frame["grounding_precision"].max() < 1 and frame["own_item"].mean() < 0.3


def test_own_words_by_hand():
    question = messages(RECORD)[1]["content"]
    assert judge.own_words(RECORD, question) == 0 and judge.own_words(RECORD, "") == 1
    assert judge.own_words(RECORD, REFERENCES[0]) == 1
    # 4-grams: 6 copied of "why do you recommend lost river 1980 genres action"[:9], 3 with the two words after it
    copied = "why do you recommend Lost River (1980), genres Action so good"
    assert judge.own_words(RECORD, copied) == pytest.approx(2 * 2 / 8)


def test_controls_are_about_their_records_as_they_should():
    texts = control_texts(RECORDS, [f"prompt {i}" for i in range(N)])
    assert {name: len(said) for name, said in texts.items()} == dict.fromkeys(texts, N) and len(
        texts
    ) == 6
    assert set(texts["empty"]) == {""} and len(set(texts["constant"])) == 1
    assert all(len(claims.words(t)) > 90 for t in texts["longest"])
    assert (
        texts["another_item"] == REFERENCES[1:] + REFERENCES[:1]
        and texts["copied_prompt"][3] == "prompt 3"
    )
    assert [
        judge.grounding(r, t, CATALOGUE) for r, t in zip(RECORDS, texts["keywords"], strict=True)
    ] == [(1, 1)] * N
    with pytest.raises(ValueError, match="two records"):
        control_texts(RECORDS[:1], ["p"])


def test_fluency_by_hand():
    out = judge.fluency([np.log([0.5, 0.125]), np.zeros(3), np.array([])])
    assert out == pytest.approx([0.25, 1, 0])
    for bad in ([0.1], [np.nan]):
        with pytest.raises(ValueError, match=r"ref_logprobs\[0\]"):
            judge.fluency([np.array(bad)])


@pytest.mark.parametrize(
    "word, n",
    [
        ("film", 1),
        ("like", 1),
        ("action", 2),
        ("comedy", 3),
        ("the", 1),
        ("table", 2),
        ("movies", 2),
        ("boxes", 2),
        ("makes", 1),
        ("hmm", 1),
    ],
)
def test_syllables(word, n):
    assert judge.syllables(word) == n


def test_readability_by_hand():
    # 6 words, 2 sentences, 7 syllables (action has two)
    assert judge.readability("I like this film. Good action!") == pytest.approx(
        206.835 - 1.015 * 3 - 84.6 * 7 / 6
    )
    assert math.isnan(judge.readability(""))
    assert judge.readability("Extraordinarily complicated considerations notwithstanding") < 0


def test_language_discounts_loops():
    once, loop = "It is a good film for you.", "It is a good film for you. " * 5
    assert judge.language(once, 0.2) == pytest.approx(
        (0.2 + 1) / 2
    )  # reading ease above 100 counts as 100
    assert judge.language(loop, 0.9) < judge.language(once, 0.2) / 2
    assert judge.language("", 1.0) == 0


def test_quality_orders_texts_and_the_controls_do_not_win():
    def judged(texts):
        return judge.judge_texts(
            RECORDS, texts, LOGPROBS, BagOfWords(), CATALOGUE, np.random.default_rng(0)
        )

    honest = judged(REFERENCES)
    paired = [m for m in judge.PAIRED if not m.startswith("own_film")]  # no rivals given
    assert set(honest) == {
        *paired,
        "own_item_probability",
        "fluency",
        "readability",
        "words",
        "quality",
    }
    assert honest["quality"].between(0, 1).all() and honest["fluency"].to_numpy() == pytest.approx(
        0.25
    )
    row = honest.iloc[0]
    language = judge.language(REFERENCES[0], 0.25)
    assert row["quality"] == pytest.approx(
        (row["grounding_f1"] + row["own_item_probability"] + language) / 3
    )
    controls = {
        "empty": [""] * N,
        "constant": ["This is a great film that you will love to see with your friends."] * N,
        "longest": [
            "It is the one that you want to see when you come home and it is what it is and so on. "
            * 6
        ]
        * N,
        "keywords": [", ".join([r["title"], *r["history_titles"], *r["genres"]]) for r in RECORDS],
        "another item": REFERENCES[1:] + REFERENCES[:1],
        "copied prompt": [messages(r)[1]["content"] for r in RECORDS],
    }
    for name, texts in controls.items():
        assert judged(texts)["quality"].mean() < honest["quality"].mean() - 0.2, name
    assert (judged(controls["empty"])["quality"] == 0).all()


def test_probability_is_the_softmax_at_the_own_card():
    frame = judge.judge_texts(
        RECORDS, REFERENCES, LOGPROBS, BagOfWords(), CATALOGUE, np.random.default_rng(3)
    )
    seed = int(np.random.default_rng(3).integers(2**63))
    cosines = judge.card_cosines(
        REFERENCES, RECORDS, BagOfWords(), np.random.default_rng(seed)
    ).astype(float)
    twin = [math.exp(c[0] / 0.05) / sum(math.exp(x / 0.05) for x in c) for c in cosines]
    assert frame["own_item_probability"].to_numpy() == pytest.approx(twin, rel=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="arrays of log-probabilities"):
        judge.judge_texts(
            RECORDS, REFERENCES, LOGPROBS[1:], BagOfWords(), CATALOGUE, np.random.default_rng(0)
        )
    with pytest.raises(RuntimeError, match="minilm_folder"):
        judge.SentenceEncoder("nowhere")


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A random two-layer BERT on disk: exercises loading, pooling and order, without a download."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"a good film about the river".split(),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=300,
    )
    BertModel(BertConfig(**size)).save_pretrained(folder)
    return judge.SentenceEncoder(folder)


def test_encoder_pools_over_real_tokens(tiny_encoder):
    import torch

    texts = ["a good film about the river", "film", "a good film", "the river " * 20, "film"]
    vectors = tiny_encoder.encode(texts, batch=2)
    assert vectors.shape == (5, 16) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert np.array_equal(vectors[1], vectors[4])
    for text, vector in zip(texts, vectors, strict=True):  # alone, without padding, so a plain mean
        with torch.no_grad():
            alone = (
                tiny_encoder.model(**tiny_encoder.tokenizer([text], return_tensors="pt"))
                .last_hidden_state[0]
                .mean(0)
            )
        assert vector == pytest.approx((alone / alone.norm()).numpy(), abs=1e-5)
    assert abs(vectors[0] - vectors[1]).max() > 1e-2
