"""Held-out measures of an explanation. None of them enters a reward, and this module never imports one.

Grounding and the guard against keyword lists share with the reward the finding of claims and of function
words (``recrl_lib.claims``): both must read a text alike. Retrieval, fluency and readability, two thirds of
``quality``, share nothing with it.

A measure that a text about something else would pass measures nothing, so ``shuffled`` gives each measure of a
text and its record again for the same texts permuted among the records. Retrieval comes in four forms, from easy
to hard: among ten random user-film pairs (a title or a history gives the pair away), the same with the record's
titles blanked in the text; among the ten films that the *same user* was recommended (the history is no help), and
that with titles blanked, where only genres and description are left. Chance is 10 % in all of them.

The first version of ``quality`` was beaten by a control: the copied prompt is all true, picks its own record, and is
fluent, because an LLM finds probable what it has just read. It got .88 where tuned texts had .71 (16 users of a
laptop run). Hence ``own_words``: what a text repeats word by word from its prompt explains nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recrl_lib.explainer.prompts import Record, check_records, messages, real_genres
from recrl_lib.ranker.metrics import lower_words
from recrl_lib.scoring.claims import Catalogue, distinct_share, words

CANDIDATES = 10  # a text's own card and nine others: chance is 10 %
TEMPERATURE = (
    0.05  # of the softmax over cosines; MiniLM's cosines of unrelated texts lie within about .1
)

_SENTENCE_END = re.compile(r"[.!?]+(?=\s|[\"”')]|\Z)")
_VOWELS = re.compile(r"[aeiouyà-öø-ÿ]+")


# --- grounding -------------------------------------------------------------------------------------


def grounding(record: Record, text: str, catalogue: Catalogue) -> tuple[float, float]:
    """(precision, recall) of what the text claims, against the metadata.

    Precision: share of its distinct claims (titles, genres, years, people) that the record supports;
    people are never supported, since the metadata names none. A text without claims has no precision
    (NaN, left out of means), and recall 0; report both, since few claims make precision cheap (Kabongo &
    Guigue, arXiv 2512.24366). Recall: share named of the film, each of its genres, and (as one fact) some
    own history title. The year is no part of it: a good explanation need not give it.
    """
    verdict = catalogue.verdict(record, text)
    claimed = verdict.supported + verdict.unsupported
    facts = 1 + verdict.all_genres + bool(verdict.all_history)
    told = verdict.title + min(verdict.genres, verdict.all_genres) + bool(verdict.history)
    return (verdict.supported / claimed if claimed else math.nan), told / facts


def f1(precision: float, recall: float) -> float:
    """Harmonic mean; 0 where there is no claim."""
    return (
        2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    )  # false for NaN


# --- features: FMR, FCR, DIV (Li, Zhang & Chen 2020) ------------------------------------------------------


def features(record: Record, text: str, catalogue: Catalogue) -> frozenset[str]:
    """The features that a text names: film titles and genres. A title that fits several films is the record's own
    film or history film if it can be, else the first of them by name."""
    said = catalogue.claims(text)
    near = (record["title"], *record["history_titles"])
    titles = {next((t for t in near if t in mention), min(mention)) for mention in said.titles}
    return frozenset(titles) | frozenset(said.genres)


def true_features(record: Record) -> frozenset[str]:
    """What a text on ``record`` should name: the film and its genres."""
    return frozenset([record["title"], *real_genres(record)])


def feature_coverage(records: Sequence[Record], named: Sequence[frozenset[str]]) -> float:
    """FCR: share of all the records' true features that some text names."""
    wanted = frozenset().union(*map(true_features, records))
    return len(wanted.intersection(*[frozenset().union(*named)])) / len(wanted)


def feature_diversity(named: Sequence[frozenset[str]]) -> float:
    """DIV: mean number of features that two texts share, over all pairs of texts. LOWER is more diverse; 0 for one text."""
    counts = Counter(feature for features_ in named for feature in features_)
    pairs = len(named) * (len(named) - 1) / 2
    return sum(c * (c - 1) / 2 for c in counts.values()) / pairs if pairs else 0.0


# --- own-item retrieval ------------------------------------------------------------------------------


class SentenceEncoder:
    """all-MiniLM-L6-v2 from a local folder: mean pooling over real tokens, unit length.

    Raises ``RuntimeError`` if the folder does not hold the model.
    """

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu"):
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar in a stored notebook differs at every run
        if not (Path(folder) / "config.json").is_file():
            raise RuntimeError(
                f"{Path(folder).name}: no config.json in the sentence encoder's folder; "
                "get it with assets.minilm_folder()"
            )
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.model = (
            AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
            .to(self.device)
            .eval()
        )

        self._known: dict[
            str, np.ndarray
        ] = {}  # arms are judged on the same cards, and partly the same texts

    def encode(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """(n, 384) float32, rows of unit length, in the order of ``texts``; texts beyond 256 tokens are cut."""
        new = sorted(
            set(texts) - self._known.keys(), key=lambda t: (len(t), t)
        )  # like lengths pad little
        for start in range(0, len(new), batch):
            self._known.update(
                zip(
                    new[start : start + batch],
                    self._encode(new[start : start + batch]),
                    strict=True,
                )
            )
        width = self.model.config.hidden_size
        return (
            np.stack([self._known[t] for t in texts])
            if len(texts)
            else np.zeros((0, width), np.float32)
        )

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> np.ndarray:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
        ).to(self.device)
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def card(record: Record) -> str:
    """What a text is matched with: the recommended film and the viewer's history, in words."""
    year = f" ({record['year']})" if record["year"] else ""
    genres = f" Genres: {', '.join(real_genres(record))}." if real_genres(record) else ""
    history = (
        f" The viewer liked {', '.join(record['history_titles'])}."
        if record["history_titles"]
        else ""
    )
    return f"{record['title']}{year}.{genres}{history}"


def film_card(record: Record) -> str:
    """The recommended film alone, in words: what tells apart the films recommended to one user."""
    return card({**record, "history_titles": []})


def card_cosines(
    texts: Sequence[str],
    records: Sequence[Record],
    encoder,
    rng: np.random.Generator,
    n: int = CANDIDATES,
    mask_titles: bool = False,
    pool: Sequence[Record] | None = None,
) -> np.ndarray:
    """Cosines (texts, n) of each text with its own card (column 0) and n - 1 other records' cards.

    The others are drawn by ``rng`` from the cards of ``pool`` (default: ``records``; it must hold them), so arms that
    are judged with the same pool and equal generators face the same candidates, text by text, also where one of
    them has texts for the first few records only. ``mask_titles`` blanks the record's own titles in the text:
    what is left is matched by genre and description. Raises ``ValueError`` if there are fewer than n different cards.
    """
    check_records(records, texts)
    cards = np.unique([card(r) for r in (records if pool is None else pool)])
    own = np.searchsorted(cards, [card(r) for r in records])
    if len(cards) < n:
        raise ValueError(
            f"own-item retrieval among {n} needs as many different records, not {len(cards)}; raise eval_users"
        )
    others = np.stack([rng.choice(len(cards) - 1, n - 1, replace=False) for _ in own])
    others += others >= own[:, None]  # skip the own card
    if mask_titles:
        texts = [_mask(record, text) for record, text in zip(records, texts, strict=True)]
    text_vectors, card_vectors = encoder.encode(list(texts)), encoder.encode(list(map(str, cards)))
    return np.einsum("nd,nkd->nk", text_vectors, card_vectors[np.column_stack([own, others])])


def own_item_retrieval(
    texts: Sequence[str],
    records: Sequence[Record],
    encoder,
    rng: np.random.Generator,
    n: int = CANDIDATES,
    mask_titles: bool = False,
    pool: Sequence[Record] | None = None,
) -> np.ndarray:
    """bool (texts,): does the text's embedding pick its own card among ``n``? Ties count against it.

    Chance is 1/n: show it beside the same texts permuted among the records.
    """
    return _picked(texts, card_cosines(texts, records, encoder, rng, n, mask_titles, pool))


def own_film(
    texts: Sequence[str], rivals: Sequence[Sequence[Record]], encoder, mask_titles: bool = False
) -> np.ndarray:
    """bool (texts,): does the text pick its own film among the films recommended to the same user?

    ``rivals[i]``: the records of user i's recommended films, the text's own first, equally many for each text.
    Ties count against it; chance is one over their number.
    """
    if len(rivals) != len(texts) or len({len(r) for r in rivals}) > 1:
        raise ValueError("own_film: give each text as many rivals, its own record first")
    if mask_titles:
        texts = [_mask(r[0], text) for r, text in zip(rivals, texts, strict=True)]
    cards = encoder.encode([film_card(r) for row in rivals for r in row])
    cosines = np.einsum(
        "nd,nkd->nk", encoder.encode(list(texts)), cards.reshape(len(texts), -1, cards.shape[-1])
    )
    return _picked(texts, cosines)


def _picked(texts: Sequence[str], cosines: np.ndarray) -> np.ndarray:
    return (cosines[:, 0] > cosines[:, 1:].max(1)) & np.array([bool(words(t)) for t in texts], bool)


def _mask(record: Record, text: str) -> str:
    titles = sorted({record["title"], *record["history_titles"]}, key=len, reverse=True)
    return re.sub(
        "|".join(rf"(?<!\w){re.escape(t)}(?!\w)" for t in titles),
        "this film",
        text,
        flags=re.IGNORECASE,
    )


# --- language ----------------------------------------------------------------------------------------


def fluency(ref_logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """Geometric-mean token probability of each text under the frozen base LLM, in [0, 1]; 0 for no tokens.

    Args:
        ref_logprobs: for each text its tokens' natural-log probabilities.
    """
    out = np.zeros(len(ref_logprobs))
    for i, logp in enumerate(ref_logprobs):
        logp = np.asarray(logp, np.float64)
        if np.isnan(logp).any() or (logp > 1e-6).any():
            raise ValueError(f"ref_logprobs[{i}]: log-probabilities must be numbers <= 0")
        out[i] = math.exp(min(logp.mean(), 0.0)) if logp.size else 0.0
    return out


def syllables(word: str) -> int:
    """Vowel groups, a silent final e not counted; at least one."""
    word = word.lower()
    silent = (
        word.endswith("e")
        and not word.endswith(("le", "ee", "ye"))
        or word.endswith("es")
        and not word.endswith(("ses", "ies", "xes", "hes"))
    )
    return max(len(_VOWELS.findall(word)) - silent, 1)


def readability(text: str) -> float:
    """Flesch reading ease, 206.835 - 1.015 words/sentences - 84.6 syllables/words (Flesch 1948).

    About 100 is very easy, 0 very hard, both ends open; NaN for a text without words.
    """
    said = words(text)
    if not said:
        return math.nan
    sentences = max(len(_SENTENCE_END.findall(text)), 1)
    return 206.835 - 1.015 * len(said) / sentences - 84.6 * sum(map(syllables, said)) / len(said)


def language(text: str, fluency_: float) -> float:
    """Mean of fluency and of reading ease / 100 (clipped), times the share of distinct bigrams: a loop is
    probable under any LLM and easy to read. In [0, 1]; 0 for a text without words."""
    said = [w.lower() for w in words(text)]
    if not said:
        return 0.0
    return (fluency_ + min(max(readability(text) / 100, 0.0), 1.0)) / 2 * distinct_share(said, 2)


def own_words(record: Record, text: str) -> float:
    """How far the text is not copied from its prompt, in [0, 1]: full where at least half of its word 4-grams are not
    in the prompt, 0 where all are. (Naming titles and a year copies about an eighth of a good explanation.)"""
    prompt = [w.lower() for message in messages(record) for w in words(message["content"])]
    said = [w.lower() for w in words(text)]
    grams, known = (
        list(zip(*[said[i:] for i in range(4)])),
        set(zip(*[prompt[i:] for i in range(4)])),
    )
    return min(2 * sum(g not in known for g in grams) / len(grams), 1.0) if grams else 1.0


# --- all together --------------------------------------------------------------------------------------


def quality(
    grounding_f1, own_item_probability, language_, prose_=1.0, own_words_=1.0
) -> np.ndarray:
    """The judge's one number, in [0, 1], which the click model uses: the plain mean of the three parts, times
    how far the text is prose (a list of true keywords is no explanation) and not copied from its prompt."""
    parts = (
        np.asarray(grounding_f1) + np.asarray(own_item_probability) + np.asarray(language_)
    ) / 3
    return parts * np.asarray(prose_) * np.asarray(own_words_)


PAIRED = (
    "grounding_precision grounding_recall grounding_f1 feature_match own_item own_item_masked own_film own_film_masked"
).split()  # measures of a text and its record, which shuffling can spoil; own_film ones where rivals are given


def paired_measures(
    records: Sequence[Record],
    texts: Sequence[str],
    encoder,
    catalogue: Catalogue,
    seed: int,
    n: int = CANDIDATES,
    pool: Sequence[Record] | None = None,
    rivals: Sequence[Sequence[Record]] | None = None,
) -> pd.DataFrame:
    """One row a text: the measures ``PAIRED``, and own_item_probability. Equal seeds give the same candidates."""
    check_records(records, texts)
    cosines = card_cosines(texts, records, encoder, np.random.default_rng(seed), n, pool=pool)
    scaled = np.exp((cosines - cosines.max(1, keepdims=True)) / TEMPERATURE)
    frame = pd.DataFrame(
        [grounding(r, t, catalogue) for r, t in zip(records, texts, strict=True)],
        columns=["grounding_precision", "grounding_recall"],
    )
    frame["grounding_f1"] = [
        f1(p, r)
        for p, r in zip(frame["grounding_precision"], frame["grounding_recall"], strict=True)
    ]
    frame["feature_match"] = [
        bool(features(r, t, catalogue) & true_features(r))
        for r, t in zip(records, texts, strict=True)
    ]
    frame["own_item"] = _picked(texts, cosines)
    frame["own_item_probability"] = (
        scaled[:, 0] / scaled.sum(1) * np.array([bool(words(t)) for t in texts], bool)
    )
    # the masked texts face the same candidates
    frame["own_item_masked"] = own_item_retrieval(
        texts, records, encoder, np.random.default_rng(seed), n, True, pool
    )
    if rivals is not None:
        frame["own_film"] = own_film(texts, rivals, encoder)
        frame["own_film_masked"] = own_film(texts, rivals, encoder, mask_titles=True)
    return frame


def judge_texts(
    records: Sequence[Record],
    texts: Sequence[str],
    ref_logprobs: Sequence[np.ndarray],
    encoder,
    catalogue: Catalogue,
    rng: np.random.Generator,
    n: int = CANDIDATES,
    pool: Sequence[Record] | None = None,
    rivals: Sequence[Sequence[Record]] | None = None,
) -> pd.DataFrame:
    """One row a text: ``paired_measures`` (grounding_precision is NaN without claims), fluency readability words quality.

    ``own_item_probability`` is the softmax of the cosines / .05 at the own card: smoother than the yes or no.
    A text without words scores 0 everywhere. ``pool``: see ``card_cosines``; ``rivals``: see ``own_film``.
    """
    if len(ref_logprobs) != len(texts):
        raise ValueError(
            f"{len(texts)} texts but {len(ref_logprobs)} arrays of log-probabilities: give one a text"
        )
    frame = paired_measures(
        records, texts, encoder, catalogue, int(rng.integers(2**63)), n, pool, rivals
    )
    said = np.array([len(words(t)) for t in texts])
    frame["fluency"] = fluency(ref_logprobs) * (said > 0)
    frame["readability"] = [readability(t) for t in texts]
    frame["words"] = said
    languages = [language(t, f) for t, f in zip(texts, frame["fluency"], strict=True)]
    frame["quality"] = quality(
        frame["grounding_f1"],
        frame["own_item_probability"],
        languages,
        [catalogue.claims(t).prose for t in texts],
        [own_words(r, t) for r, t in zip(records, texts, strict=True)],
    )
    return frame


def shuffled(
    records: Sequence[Record],
    texts: Sequence[str],
    encoder,
    catalogue: Catalogue,
    rng: np.random.Generator,
    n: int = CANDIDATES,
    pool: Sequence[Record] | None = None,
    rivals: Sequence[Sequence[Record]] | None = None,
) -> pd.DataFrame:
    """``paired_measures`` of the same texts permuted among the records, no text on its own record."""
    order = rng.permutation(len(texts))
    others = np.empty_like(order)
    others[order] = np.roll(order, 1)  # one cycle through all: nobody keeps their own
    return paired_measures(
        records,
        [texts[i] for i in others],
        encoder,
        catalogue,
        int(rng.integers(2**63)),
        n,
        pool,
        rivals,
    )


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the corpus (Li et al. 2016), none across two texts; 0 if there are none."""
    if n < 1:
        raise ValueError(f"distinct_n: n={n} must be at least 1")
    grams = Counter(
        gram for text in texts for gram in zip(*(lower_words(text)[i:] for i in range(n)))
    )
    return len(grams) / max(grams.total(), 1)


def usr(texts: Iterable[str]) -> float:
    """Unique sentence ratio: different texts over texts (Li, Zhang & Chen 2020), compared word by word."""
    sequences = [tuple(lower_words(text)) for text in texts]
    if not sequences:
        raise ValueError("usr: no texts")
    return len(set(sequences)) / len(sequences)
