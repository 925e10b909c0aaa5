"""Held-out measures of an explanation. None of them enters a reward, and this module imports none.

Grounding and the discount for keyword lists read a text's claims as the reward does. Retrieval,
fluency and readability, two thirds of ``quality``, share nothing with it.

A measure that a text about something else would pass measures nothing: ``Judge.shuffled`` measures
the same texts permuted among the records. Retrieval has four forms:
``specificity`` among ten random user-film pairs, ``specificity_same_user`` among ten films of one
user, and both ``_masked``, with the record's titles blanked in the text. Chance is 10 % in all.

What a text repeats word by word from its prompt counts for nothing (``own_words``): the copied
prompt is all true, picks its own record, and is fluent, since a model expects what it has read.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax

from recrl_lib.explainer.prompts import Record, messages, real_genres
from recrl_lib.params import TOP_K
from recrl_lib.scoring.claims import Catalogue, distinct_share, n_grams, title_pattern, words

# Of the softmax over cosines: MiniLM's cosines of unrelated texts lie within about .1.
TEMPERATURE = 0.05
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|[\"”')]|\Z)")
_VOWELS = re.compile(r"[aeiouyà-öø-ÿ]+")

# Measures of a text and its record, which shuffling can spoil.
PAIRED = (
    "grounding_precision", "grounding_recall", "grounding_f1", "feature_match", "specificity",
    "specificity_masked", "specificity_same_user", "specificity_same_user_masked",
)  # fmt: skip
JUDGED = (*PAIRED, "fluency", "readability", "words", "quality")  # one value a text


def grounding(record: Record, text: str, catalogue: Catalogue) -> tuple[float, float]:
    """(precision, recall) of what the text claims, against the metadata.

    Precision: share of its distinct claims that the record supports; NaN without claims. Recall:
    share named of the film, each of its genres, and (as one fact) some history title. Report both,
    since few claims make precision cheap (Kabongo & Guigue, arXiv 2512.24366).
    """
    verdict = catalogue.verdict(record, text)
    claimed = verdict.supported + verdict.unsupported
    facts = 1 + verdict.all_genres + bool(verdict.all_history)
    named = verdict.title + min(verdict.genres, verdict.all_genres) + bool(verdict.history)
    return (verdict.supported / claimed if claimed else math.nan), named / facts


def features(record: Record, text: str, catalogue: Catalogue) -> set[str]:
    """Film titles and genres that a text names. A title that fits several films is the record's
    own film or history film if it can be, else the first of them by name."""
    claims = catalogue.claims(text)
    near = (record["title"], *record["history_titles"])
    titles = [next((t for t in near if t in mention), min(mention)) for mention in claims.titles]
    return {*titles, *claims.genres}


def true_features(record: Record) -> set[str]:
    """What a text on ``record`` should name: the film and its genres."""
    return {record["title"], *real_genres(record)}


class SentenceEncoder:
    """all-MiniLM-L6-v2 from ``folder``, else ``RuntimeError``. It keeps what it has encoded, since
    arms share cards."""

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu"):
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar in a stored notebook differs at every run
        if not (Path(folder) / "modules.json").is_file():
            raise RuntimeError(f"{folder}: no sentence encoder; get it with assets.minilm_folder()")
        self.model = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
        self.model.max_seq_length = 256
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, 384) float32, rows of unit length; texts beyond 256 tokens are cut."""
        if new := sorted(set(texts) - self._known.keys()):
            vectors = self.model.encode(new, normalize_embeddings=True, show_progress_bar=False)
            self._known.update(zip(new, vectors, strict=True))
        return np.stack([self._known[text] for text in texts])


def card(record: Record, history: bool = True) -> str:
    """What a text is matched with: the film and, with ``history``, films that the user liked."""
    parts = [record["title"] + (f" ({record['year']})" if record["year"] else "") + "."]
    if genres := real_genres(record):
        parts.append(f"Genres: {', '.join(genres)}.")
    if history and record["history_titles"]:
        parts.append(f"The viewer liked {', '.join(record['history_titles'])}.")
    return " ".join(parts)


def candidate_cards(
    records: Sequence[Record], rng: np.random.Generator, n: int = TOP_K
) -> list[list[str]]:
    """For each record its own card and n - 1 different cards of other records, drawn by ``rng``.

    Raises ``ValueError`` if there are fewer than n different cards.
    """
    cards = sorted({card(r) for r in records})
    if len(cards) < n:
        raise ValueError(f"retrieval needs {n} records, not {len(cards)}; raise eval_users")
    rows = []
    for own in map(card, records):
        others = rng.choice([c for c in cards if c != own], n - 1, replace=False)
        rows.append([own, *map(str, others)])
    return rows


def card_cosines(texts: Sequence[str], cards: Sequence[Sequence[str]], encoder: Any) -> np.ndarray:
    """Cosines (texts, n) of each text with its n cards, its own in column 0."""
    vectors = np.stack([encoder.encode(row) for row in cards])
    return np.einsum("nd,nkd->nk", encoder.encode(texts), vectors)


def mask_titles(record: Record, text: str) -> str:
    """``text`` with the record's own titles, in any case, replaced by "this film"."""
    titles = title_pattern({record["title"], *record["history_titles"]})
    return re.sub(titles, "this film", text, flags=re.IGNORECASE)


def fluency(ref_logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """Geometric-mean token probability (texts,) under the frozen base model, from each text's
    natural-log probabilities; 0 for no tokens."""
    means = [np.mean(logp, dtype=float) if len(logp) else -math.inf for logp in ref_logprobs]
    return np.exp(np.minimum(means, 0.0))


def syllables(word: str) -> int:
    """Vowel groups, a silent final e not counted; at least one. (textstat needs the internet.)"""
    word = word.lower()
    silent = word.endswith("e") and not word.endswith(("le", "ee", "ye"))
    silent |= word.endswith("es") and not word.endswith(("ses", "ies", "xes", "hes"))
    return max(len(_VOWELS.findall(word)) - silent, 1)


def readability(text: str) -> float:
    """Flesch reading ease, 206.835 - 1.015 words/sentences - 84.6 syllables/words (Flesch 1948):
    about 100 is very easy, 0 very hard, both ends open. NaN for a text without words."""
    said = words(text)
    if not said:
        return math.nan
    sentences = max(len(_SENTENCE_END.findall(text)), 1)
    return 206.835 - 1.015 * len(said) / sentences - 84.6 * sum(map(syllables, said)) / len(said)


def language(text: str, fluency_: float) -> float:
    """Mean of fluency and of reading ease / 100 (clipped), times the share of distinct bigrams: a
    loop is probable under any language model and easy to read. In [0, 1]; 0 without words."""
    said = lower_words(text)
    ease = min(max(readability(text) / 100, 0.0), 1.0)
    return (fluency_ + ease) / 2 * distinct_share(said, 2) if said else 0.0


def own_words(record: Record, text: str) -> float:
    """How far the text is not copied from its prompt, in [0, 1]: 1 where at least half of its word
    4-grams are not in the prompt, 0 where all are. (Naming titles and a year copies about an eighth
    of a good explanation.)"""
    prompt = " ".join(message["content"] for message in messages(record))
    grams, known = n_grams(lower_words(text), 4), set(n_grams(lower_words(prompt), 4))
    return min(2 * sum(g not in known for g in grams) / len(grams), 1.0) if grams else 1.0


def lower_words(text: str) -> list[str]:
    """Words of ``text`` (``claims.words``) in lower case."""
    return [w.lower() for w in words(text)]


class Judge:
    """Judges texts on ``records``, or on the first few of them: every arm has the same candidates.

    ``same_user``: for each record, itself and equally many of other films recommended to that user.
    ``encoder``: as ``SentenceEncoder``. ``seed``: of the candidates and of the shuffling.
    """

    def __init__(
        self,
        records: Sequence[Record],
        same_user: Sequence[Sequence[Record]],
        catalogue: Catalogue,
        encoder: Any,
        seed: int,
    ):
        self.records, self.catalogue, self.encoder, self.seed = records, catalogue, encoder, seed
        self.cards = {
            "specificity": candidate_cards(records, np.random.default_rng(seed)),
            "specificity_same_user": [[card(r, False) for r in row] for row in same_user],
        }

    def paired(self, texts: Sequence[str]) -> pd.DataFrame:
        """One row a text: the measures ``PAIRED``, and specificity_probability, the softmax of
        cosines / ``TEMPERATURE`` at the own card: smoother than the yes or no. Ties and texts
        without words count against a text."""
        pairs = list(zip(self.records[: len(texts)], texts, strict=True))
        grounded = [grounding(r, t, self.catalogue) for r, t in pairs]
        frame = pd.DataFrame(grounded, columns=["grounding_precision", "grounding_recall"])
        precision, recall = frame["grounding_precision"], frame["grounding_recall"]
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        frame["grounding_f1"] = f1.fillna(0.0)  # no claim
        named = [features(r, t, self.catalogue) & true_features(r) for r, t in pairs]
        frame["feature_match"] = [bool(found) for found in named]
        said = np.array([bool(words(t)) for t in texts])
        for suffix, read in (("", texts), ("_masked", [mask_titles(r, t) for r, t in pairs])):
            for name, cards in self.cards.items():
                cosines = card_cosines(read, cards[: len(texts)], self.encoder)
                frame[name + suffix] = (cosines[:, 0] > cosines[:, 1:].max(1)) & said
                if name + suffix == "specificity":
                    shares = softmax(cosines / TEMPERATURE, axis=1)
                    frame["specificity_probability"] = shares[:, 0] * said
        return frame

    def score(self, texts: Sequence[str], ref_logprobs: Sequence[np.ndarray]) -> pd.DataFrame:
        """One row a text: ``paired``, and fluency, readability, words, quality.

        Quality, in [0, 1], is the mean of grounding_f1, specificity_probability and ``language``,
        times how far the text is prose, no list of keywords, and not copied from its prompt.
        """
        frame = self.paired(texts)
        frame["words"] = [len(words(t)) for t in texts]
        frame["fluency"] = fluency(ref_logprobs) * (frame["words"] > 0)
        frame["readability"] = [readability(t) for t in texts]
        spoken = np.array([language(t, f) for t, f in zip(texts, frame["fluency"])])
        prose = np.array([self.catalogue.claims(t).prose for t in texts])
        own = np.array([own_words(r, t) for r, t in zip(self.records, texts)])
        parts = frame["grounding_f1"] + frame["specificity_probability"] + spoken
        return frame.assign(quality=parts / 3 * prose * own)

    def shuffled(self, texts: Sequence[str]) -> pd.DataFrame:
        """``paired`` of the same texts permuted among the records, no text on its own record."""
        order = np.random.default_rng(self.seed).permutation(len(texts))
        others = np.roll(order, 1)[np.argsort(order)]  # one cycle: nobody keeps their own
        return self.paired([texts[int(i)] for i in others])

    def corpus(self, texts: Sequence[str]) -> dict[str, float]:
        """Measures of the texts as a whole: share that claims anything; FCR, DIV and USR of Li,
        Zhang & Chen 2020 (share of the records' features that some text names; features that two
        texts share, LOWER is more diverse; unique texts); distinct n-grams (Li et al. 2016)."""
        pairs, n = list(zip(self.records, texts)), len(texts)
        named = Counter(f for r, t in pairs for f in features(r, t, self.catalogue))
        wanted = set().union(*(true_features(r) for r, _ in pairs))
        claims = [grounding(r, t, self.catalogue)[0] for r, t in pairs]
        shared = sum(math.comb(count, 2) for count in named.values())
        said = [lower_words(t) for t in texts]
        found = {
            "claiming_share": 1 - float(np.isnan(claims).mean()),
            "feature_coverage": len(wanted & named.keys()) / len(wanted),
            "feature_diversity": shared / max(math.comb(n, 2), 1),
        }
        for k in (1, 2):
            grams = [gram for tokens in said for gram in n_grams(tokens, k)]
            found[f"distinct_{k}"] = len(set(grams)) / max(len(grams), 1)
        return found | {"unique_texts": len(set(map(tuple, said))) / n}
