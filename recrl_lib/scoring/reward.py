"""The training reward: length, relevance and coherence, each in [0, 1], weighted .5, .3 and .2.

The three parts and their use are those of Shielded RecRL (arXiv 2601.03608); always scored on the
response alone, never on the prompt. Two variants:

``paper``     what the published account rewards: words up to 40, hits of the title's words and the
              genres up to three, complete sentences up to two. Length alone earns half of it.
``grounded``  the default: length in a band, claims held against the metadata (true ones earn, false
              ones cost), and form. Keyword lists, loops, copied prompts and texts about
              another item must not win; the tests hold it to that.

The judge never enters here, and this module never imports it.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from recrl_lib.explainer.prompts import Record, check_records, real_genres
from recrl_lib.params import Params, choices
from recrl_lib.scoring.claims import SMALL, Catalogue, distinct_share, words

Part = Callable[[Record, str, Catalogue], float]
PARTS = ("length", "relevance", "coherence")
WEIGHTS = (0.5, 0.3, 0.2)
PAPER_WORDS, PAPER_HITS, PAPER_SENTENCES = 40, 3, 2
# Words: full marks from 14 (24 new tokens hold about 17) to 45, none at 0 and from 90 on.
FULL_FROM, FULL_TO, TOO_LONG = 14, 45, 90
# What true mentions earn (they sum to 1) and what each false one costs.
TITLE, HISTORY, GENRES = 0.4, 0.3, 0.3
FOREIGN_TITLE, NAME, WRONG_GENRE, WRONG_YEAR = 0.25, 0.2, 0.15, 0.15

_SENTENCE = re.compile(r"[^.!?\n]+")
_OPENING = re.compile(r"""["“'(]?[A-ZÀ-Þ0-9]""")
_LABELS = (
    "system|user|assistant|human|question|answer|titles?|genres?|history|year|prompt|films?"
    "|movies?|watched|recommended|recommendations?|explanation|output|input"
)
# A prompt's text, not an explanation's: chat-template tokens, role and field labels, orders.
# Searched in lower case, each with what any match contains: looking for that first is many times
# as fast, and so is a pattern that opens with plain letters (hence the word boundary behind "you").
_RESIDUES = tuple(
    (needle, re.compile(pattern))
    for needle, pattern in (
        ("<", r"<\|?\w+\|?>"),
        ("inst]", r"\[/?inst\]"),
        (":", rf"\b(?:{_LABELS})\s*:"),
        ("explain", r"\bexplain\s+(?:each|why|the|this|your)\b"),
        ("sentence", r"\bin\s+one\s+(?:or\s+two\s+)?(?:short\s+)?sentences?\b"),
        (
            "you",
            r"you(?<=\byou)\s+(?:recommend|are\s+an?\s+(?:\w+\s+)?(?:assistant|recommender))\b",
        ),
    )
)
_LIST_MARKER = re.compile(r"\s*(?:#|[-*]\s|\d+[.)]\s)")


def score(
    record: Record, text: str, catalogue: Catalogue, variant: str = "grounded"
) -> dict[str, float]:
    """The three parts of one explanation's reward, each in [0, 1]."""
    return {part: f(record, text, catalogue) for part, f in zip(PARTS, _parts(variant))}


class Reward:
    """The reward of a batch of explanations.

    Args:
        variant: ``grounded`` or ``paper``.
        catalogue: titles and genres of the item table.
        weights: of length, relevance and coherence. 0 removes a part; the weights are rescaled to
            sum to 1, so that a reward without one part has the same range.

    Raises:
        ValueError: unknown variant, or weights that are not three numbers >= 0, one above 0.
    """

    def __init__(self, variant: str, catalogue: Catalogue, weights: Sequence[float] = WEIGHTS):
        self.parts = _parts(variant)
        self.variant, self.catalogue = variant, catalogue
        valid = len(weights) == len(PARTS) and all(0 <= w < np.inf for w in weights)
        if not valid or not sum(weights):
            raise ValueError(
                f"reward weights {weights!r}: give three non-negative numbers, "
                f"for {', '.join(PARTS)}, not all 0"
            )
        self.weights = tuple(w / sum(weights) for w in weights)

    @classmethod
    def of(cls, params: Params, catalogue: Catalogue) -> "Reward":
        """The reward of a run."""
        weights = (params.weight_length, params.weight_relevance, params.weight_coherence)
        return cls(params.reward, catalogue, weights)

    def __call__(
        self, records: Sequence[Record], texts: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Total reward, float32 (n,), and each unweighted part, float32 (n,)."""
        check_records(records, texts)
        rows = [[f(r, text, self.catalogue) for f in self.parts] for r, text in zip(records, texts)]
        columns = np.array(rows, np.float32).reshape(-1, len(PARTS)).T
        total = sum(w * column for w, column in zip(self.weights, columns))
        return np.asarray(total, np.float32), dict(zip(PARTS, columns))

    def as_trl(self) -> list[Callable[..., list[float]]]:
        """The parts as TRL reward functions; pass ``reward_weights=list(reward.weights)`` too.

        The data set's columns must be the record's fields. Completions may be strings or chats.
        """
        return [self._trl_function(name, f) for name, f in zip(PARTS, self.parts)]

    def _trl_function(self, name: str, part: Part) -> Callable[..., list[float]]:
        def function(prompts, completions, completion_ids=None, **columns) -> list[float]:
            n = len(completions)
            # TRL adds entries of its own that are no columns
            usable = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == n}
            records = [{k: v[i] for k, v in usable.items()} for i in range(n)]
            texts = [
                c if isinstance(c, str) else "".join(m["content"] for m in c) for c in completions
            ]
            check_records(records, texts)
            return [part(r, text, self.catalogue) for r, text in zip(records, texts)]

        function.__name__ = f"reward_{name}"  # TRL logs it under this name
        return function


# --- paper ----------------------------------------------------------------------------------------


def _paper_length(record: Record, text: str, catalogue: Catalogue) -> float:
    return min(len(text.split()) / PAPER_WORDS, 1.0)


def _paper_relevance(record: Record, text: str, catalogue: Catalogue) -> float:
    """Distinct keywords hit, of the title's words (not function words) and genres, over three."""
    title = {w for w in map(str.lower, words(record["title"])) if w not in SMALL}
    keywords = title | {g.lower() for g in real_genres(record)}
    said = set(map(str.lower, words(text)))
    return min(len(keywords & said) / min(PAPER_HITS, max(len(keywords), 1)), 1.0)


def _paper_coherence(record: Record, text: str, catalogue: Catalogue) -> float:
    sentences = sum(len(s.split()) >= 3 for s in _SENTENCE.findall(text))
    return min(sentences / PAPER_SENTENCES, 1.0)


# --- grounded -------------------------------------------------------------------------------------


def _band_length(record: Record, text: str, catalogue: Catalogue) -> float:
    """Trapezoid in words: 0 at 0, full from 14 to 45, 0 again from 90."""
    n = len(_said(text))
    return max(min(n / FULL_FROM, (TOO_LONG - n) / (TOO_LONG - FULL_TO), 1.0), 0.0)


def _grounded_relevance(record: Record, text: str, catalogue: Catalogue) -> float:
    """True mentions (title, up to two history titles, up to two genres), less false ones.

    What the record cannot offer (no history, no genres) leaves the scale, so that 1 can be reached.
    Mentions count only in running English, not in a keyword list or a copied prompt.
    """
    verdict = catalogue.verdict(record, text)
    earned = scale = 0.0
    for weight, named, most in (
        (TITLE, verdict.title, 1),
        (HISTORY, verdict.history, min(2, verdict.all_history)),
        (GENRES, verdict.genres, min(2, verdict.all_genres)),
    ):
        if most:
            earned += weight * min(named / most, 1)
            scale += weight
    charged = (
        FOREIGN_TITLE * verdict.foreign_titles
        + NAME * verdict.people
        + WRONG_GENRE * verdict.wrong_genres
        + WRONG_YEAR * verdict.wrong_years
    )
    return max(earned / scale * _prose(text, catalogue) - charged, 0.0)


def _form(record: Record, text: str, catalogue: Catalogue) -> float:
    """Opens like a sentence, ends like one (not cut off) and is made of words, a third each.

    Times how far the text is prose, and the share of distinct trigrams.
    """
    if not (share := _prose(text, catalogue)):
        return 0.0
    checks = (
        bool(_OPENING.match(text.lstrip())),
        text.rstrip().rstrip("\"”')").endswith((".", "!", "?")),
        _sane(text),
    )
    return sum(checks) / len(checks) * share * distinct_share(_said(text), 3)


@lru_cache(maxsize=1)  # the parts ask in turn about the same text
def _said(text: str) -> list[str]:
    return words(text.lower())


def _prose(text: str, catalogue: Catalogue) -> float:
    """How far the text is running English (see ``Claims``); 0 for a prompt's text."""
    return 0.0 if _residue(text) else catalogue.claims(text).prose


@lru_cache(maxsize=1)
def _residue(text: str) -> bool:
    """Whether the text has marks of a prompt, a chat template or a list."""
    lower = text.lower()
    if any(needle in lower and pattern.search(lower) for needle, pattern in _RESIDUES):
        return True
    return any(map(_LIST_MARKER.match, text.split("\n")))


def _sane(text: str) -> bool:
    """Mostly Latin letters, in words of ordinary length."""
    lengths = list(map(len, _said(text)))
    shown = "".join(text.split())
    return (
        sum(map(str.isalpha, shown)) >= 0.8 * len(shown)
        and len(shown.encode("ascii", "ignore")) / len(shown) >= 0.9
        and 2.5 <= sum(lengths) / len(lengths) <= 8
        and max(lengths) <= 24
    )


_VARIANTS: dict[str, tuple[Part, ...]] = {
    "grounded": (_band_length, _grounded_relevance, _form),
    "paper": (_paper_length, _paper_relevance, _paper_coherence),
}
VARIANTS = choices("reward")


def _parts(variant: str) -> tuple[Part, ...]:
    """The functions of a variant, in the order of ``PARTS``."""
    if variant not in VARIANTS:
        raise ValueError(f"reward={variant!r}: choose one of {', '.join(VARIANTS)}")
    return _VARIANTS[variant]
