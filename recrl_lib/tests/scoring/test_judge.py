import math
import re

import numpy as np
import pytest

from recrl_lib.explainer.prompts import messages
from recrl_lib.scoring import claims, judge
from recrl_lib.scoring.claims import Catalogue
from recrl_lib.scoring.composed import composed_line, control_texts
from recrl_lib.scoring.judge import Judge

NOUNS = ("River", "Castle", "Island", "Engine")
TITLES = [f"{a} {b}" for a in ("Lost", "Golden", "Silent", "Broken") for b in NOUNS]
GENRES = ["Action", "Comedy", "Drama", "Horror", "Western"]
CATALOGUE = Catalogue(TITLES, GENRES)
N = len(TITLES)
RECORDS = [
    dict(
        user=i, item=i + 1, position=1, title=TITLES[i], year=1980 + i,
        genres=[GENRES[i % 5], GENRES[(i + 1) % 5]],
        history_titles=[TITLES[(i + 3) % N], TITLES[(i + 7) % N]],
        history_genres=[[GENRES[i % 5]], [GENRES[(i + 3) % 5]]],
    )
    for i in range(N)
]  # fmt: skip
# Lost River (1980), Action and Comedy; liked Lost Engine (Action) and Golden Engine (Horror).
RECORD = RECORDS[0]
REFERENCES = [composed_line(r) for r in RECORDS]
LOGPROBS = [np.log(np.full(8, 0.25))] * N
SAME_USER = [[RECORDS[i], *(RECORDS[j] for j in range(N) if j != i)][:10] for i in range(N)]


class WordCounts:
    """A tiny encoder: unit vectors of counts of the titles' and genres' words."""

    words = sorted({w for t in TITLES for w in t.lower().split()} | {g.lower() for g in GENRES})

    def encode(self, texts):
        said = [re.findall(r"\w+", text.lower()) for text in texts]
        counts = np.array([[t.count(w) for w in self.words] for t in said], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def judge_of(seed: int = 0) -> Judge:
    return Judge(RECORDS, SAME_USER, CATALOGUE, WordCounts(), seed)


@pytest.mark.parametrize(
    "text, precision, recall",
    [  # the year is no fact to recall; "1990" of the history is not known to be true
        ("Because you liked Lost Engine, try Lost River (1980), an action comedy.", 1, 1),
        ("Lost River is an action film by John Smith.", 2 / 3, 2 / 4),
        ("Golden Castle is a western.", 0, 0),
        ("You liked Golden Engine, a horror film of 1990.", 2 / 3, 1 / 4),
        ("A very good film.", math.nan, 0),
        ("", math.nan, 0),
    ],
)
def test_grounding_by_hand(text, precision, recall):
    found = judge.grounding(RECORD, text, CATALOGUE)
    assert found == pytest.approx((precision, recall), nan_ok=True)


def test_features_and_cards_by_hand():
    text = "Because you liked Lost Engine, try Lost River, an action film unlike Golden Castle."
    wanted = {"Lost Engine", "Lost River", "Golden Castle", "Action"}
    assert judge.features(RECORD, text, CATALOGUE) == wanted
    assert judge.true_features(RECORD) == {"Lost River", "Action", "Comedy"}
    card = "Lost River (1980). Genres: Action, Comedy."
    assert judge.card(RECORD) == f"{card} The viewer liked Lost Engine, Golden Engine."
    assert judge.card(RECORD, history=False) == card
    assert judge.card(RECORD | dict(year=0, genres=[], history_titles=[])) == "Lost River."


def test_candidates_are_the_own_card_first_and_different_others():
    twice = RECORDS + RECORDS  # two samples of each prompt: a text's twin is no distractor
    cards = judge.candidate_cards(twice, np.random.default_rng(5))
    assert [row[0] for row in cards] == [judge.card(r) for r in twice]
    assert all(len(set(row)) == 10 for row in cards)
    everything = judge.candidate_cards(RECORDS, np.random.default_rng(5), n=N)
    assert all(set(row) == {judge.card(r) for r in RECORDS} for row in everything)
    with pytest.raises(ValueError, match="not 3; raise eval_users"):
        judge.candidate_cards(RECORDS[:3], np.random.default_rng(0))


def test_texts_pick_their_own_record_and_shuffled_ones_do_not():
    judges = [judge_of(seed) for seed in range(20)]
    own, other = ([read(j, REFERENCES) for j in judges] for read in (Judge.paired, Judge.shuffled))
    assert np.mean([table["specificity"].mean() for table in own]) > 0.95
    assert np.mean([table["specificity"].mean() for table in other]) < 0.2  # chance is .1
    assert all(table["grounding_precision"].max() < 1 for table in other)  # nobody keeps their own
    assert set(other[0]) == {*judge.PAIRED, "specificity_probability"}


@pytest.mark.parametrize("text", ["", "same words for all"])
def test_ties_and_empty_texts_count_against_a_text(text):
    found = judge_of().paired([text] * N)
    assert not found[[m for m in judge.PAIRED if m.startswith("specificity")]].any(axis=None)


def test_a_text_without_titles_meets_the_same_rivals_masked_and_plain():
    texts = [f"{' and '.join(r['genres'])} films" for r in RECORDS]
    assert len(set(texts)) == 5  # so that some rivals have an equal card and others have not
    for made in map(judge_of, range(10)):
        found = made.paired(texts)
        for name in ("specificity", "specificity_same_user"):
            assert found[name].equals(found[f"{name}_masked"])


def test_titles_and_history_give_away_no_more_than_they_should():
    titled = [f"I say {r['title']} after {' and '.join(r['history_titles'])}." for r in RECORDS]
    by_titles = judge_of().paired(titled)
    assert by_titles["specificity"].mean() > 0.5 and not by_titles["specificity_masked"].any()
    by_history = judge_of().paired([f"You liked {r['history_titles'][0]}." for r in RECORDS])
    assert by_history["specificity_same_user"].mean() < 0.4
    plain = judge_of().paired([f"{r['title']}, {' and '.join(r['genres'])}." for r in RECORDS])
    assert plain["specificity_same_user"].all()
    masked = judge.mask_titles(RECORD, "Lost River, lost engine: action, not Lost Rivers")
    assert masked == "this film, this film: action, not Lost Rivers"


def test_probability_is_the_softmax_at_the_own_card():
    made = judge_of(3)
    cosines = judge.card_cosines(REFERENCES, made.cards["specificity"], WordCounts()).astype(float)
    wanted = [math.exp(c[0] / 0.05) / sum(math.exp(x / 0.05) for x in c) for c in cosines]
    found = made.paired(REFERENCES)["specificity_probability"]
    assert found.tolist() == pytest.approx(wanted, 1e-4)
    assert made.paired(REFERENCES[:4])["specificity_probability"].equals(found[:4])


def test_own_words_by_hand():
    question = messages(RECORD)[1]["content"]
    assert judge.own_words(RECORD, question) == 0 and judge.own_words(RECORD, "") == 1
    assert judge.own_words(RECORD, REFERENCES[0]) == 1
    # of 8 4-grams 6 are copied, 2 hold the words after them
    copied = "why do you recommend Lost River (1980), genres Action so good"
    assert judge.own_words(RECORD, copied) == pytest.approx(2 * 2 / 8)


def test_fluency_readability_and_language_by_hand():
    out = judge.fluency([np.log([0.5, 0.125]), np.zeros(3), np.array([])])
    assert out == pytest.approx([0.25, 1, 0])
    words = dict(film=1, like=1, action=2, comedy=3, the=1, table=2, movies=2, boxes=2, makes=1)
    assert {word: judge.syllables(word) for word in words} == words
    wanted = 206.835 - 1.015 * 3 - 84.6 * 7 / 6  # 6 words, 2 sentences, 7 syllables
    assert judge.readability("I like this film. Good action!") == pytest.approx(wanted)
    assert math.isnan(judge.readability(""))
    assert judge.readability("Extraordinarily complicated considerations notwithstanding") < 0
    # language is the mean of both, and discounts loops
    once = "It is a good film for you."
    assert judge.language(once, 0.2) == pytest.approx((0.2 + 1) / 2)  # reading ease is cut at 100
    assert judge.language(" ".join([once] * 5), 0.9) < judge.language(once, 0.2) / 2
    assert judge.language("", 1.0) == 0


def test_measures_of_a_corpus_by_hand():
    texts = ["Lost River, an action film.", "Action, horror", "action Horror"]
    # the three records' features: Lost River, Lost Castle, Lost Island; Action, ..., Horror
    assert judge_of().corpus(texts) == pytest.approx({
        "claiming_share": 1, "feature_coverage": 3 / 7, "feature_diversity": 4 / 3,
        "distinct_1": 6 / 9, "distinct_2": 5 / 6, "unique_texts": 2 / 3,
    })  # fmt: skip
    assert judge_of().corpus(["it's sci-fi"])["distinct_1"] == 1  # two words, not four
    alone = judge_of().corpus(["a"])
    assert alone["distinct_2"] == alone["feature_diversity"] == alone["claiming_share"] == 0


def test_quality_is_the_mean_of_its_parts_and_no_control_wins():
    made = judge_of()
    honest = made.score(REFERENCES, LOGPROBS)
    assert set(honest) == {*judge.JUDGED, "specificity_probability"}
    assert honest["quality"].between(0, 1).all()
    assert honest["fluency"].to_numpy() == pytest.approx(0.25)
    language = [judge.language(text, 0.25) for text in REFERENCES]
    parts = honest["grounding_f1"] + honest["specificity_probability"] + language
    assert honest["quality"][0] == pytest.approx(parts[0] / 3)
    texts = control_texts(RECORDS, [messages(r)[1]["content"] for r in RECORDS])
    assert len(texts) == 6
    for name, said in texts.items():
        quality = made.score(said, LOGPROBS)["quality"]
        assert quality.mean() < honest["quality"].mean() - 0.2, name
        assert name != "empty" or (quality == 0).all()


def test_controls_and_composed_lines_are_about_their_records_as_they_should():
    texts = control_texts(RECORDS, [f"prompt {i}" for i in range(N)])
    assert set(texts["empty"]) == {""} and len(set(texts["constant"])) == 1
    assert all(len(claims.words(t)) > 90 for t in texts["longest"])
    assert texts["another_item"] == REFERENCES[1:] + REFERENCES[:1]
    assert texts["copied_prompt"][3] == "prompt 3"
    for record, *said in zip(RECORDS, texts["keywords"], REFERENCES, strict=True):
        assert all(judge.grounding(record, text, CATALOGUE) == (1, 1) for text in said)


def test_the_encoder_reads_a_local_folder(tmp_path):
    """A random two-layer BERT on disk: texts alone and together get the same unit vectors."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a good film about the river".split()]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(tmp_path / "bert")
    layers = [Transformer(str(tmp_path / "bert")), Pooling(16)]
    SentenceTransformer(modules=layers).save(str(tmp_path / "encoder"))

    texts = ["a good film about the river", "film", "the river " * 200, "film"]
    vectors = judge.SentenceEncoder(tmp_path / "encoder").encode(texts)
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    alone = [judge.SentenceEncoder(tmp_path / "encoder").encode([t])[0] for t in texts]
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert abs(vectors[0] - vectors[1]).max() > 1e-2
    with pytest.raises(RuntimeError, match="minilm_folder"):
        judge.SentenceEncoder("nowhere")
