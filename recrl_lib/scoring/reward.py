"""The training reward of an explanation, in [0, 1]: of the response alone, and never by the judge.

``faithful``  the default: does the text name what moved the ranker? A gate lets through a finished
              sentence of 8 to 45 words that names the recommended film once and claims nothing
              false; of these, ``form`` is 1 and ``faithfulness`` that of the history films that the
              text cites (``attribution.faithfulness``). Of an answer to a follow-up the part
              ``faithfulness`` is the share of what it has to say (``answers.judge``), less one
              half for each false claim; invented titles and names fail the gate.
``grounded``  length in a band, claims held against the metadata (true ones earn, false ones cost),
              and form. What a composed template says is already its best.
``paper``     what the published account rewards (Shielded RecRL, arXiv 2601.03608): words up to 40,
              hits of the title's words and the genres up to three, complete sentences up to two.

Keyword lists, loops, copied prompts and texts about another item must not win; the tests hold the
first two variants to that.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from recrl_lib.explainer.prompts import Record, check_records, real_genres
from recrl_lib.params import Params
from recrl_lib.scoring import answers
from recrl_lib.scoring.attribution import faithfulness
from recrl_lib.scoring.claims import SMALL, Catalogue, Verdict, distinct_share, words

Parts = tuple[float, ...]  # of one text, in the order of the variant's PARTS
# Names of each variant's parts, and their weights (of ``faithful``: the parameters' defaults).
_THREE = {"length": 0.5, "relevance": 0.3, "coherence": 0.2}
PARTS = {
    "faithful": {"form": 0.2, "faithfulness": 0.8}, "grounded": _THREE, "paper": _THREE,
}  # fmt: skip
SHORTEST, LONGEST = 8, 45  # words of a text that passes the gate
PROSE, DISTINCT = 0.5, 0.8  # and its least share of running English and of distinct trigrams
PAPER_WORDS, PAPER_HITS, PAPER_SENTENCES = 40, 3, 2
# Words: full marks from 14 (24 new tokens hold about 17) to 45, none at 0 and from 90 on.
FULL_FROM, FULL_TO, TOO_LONG = 14, 45, 90
# What true mentions earn (they sum to 1) and what each false one costs.
TITLE, HISTORY, GENRES = 0.4, 0.3, 0.3
FOREIGN_TITLE, NAME, WRONG_GENRE, WRONG_YEAR = 0.25, 0.2, 0.15, 0.15

_SENTENCE = re.compile(r"[^.!?\n]+")
_OPENING = re.compile(r"""["“'(]?[A-ZÀ-Þ0-9]""")
# A prompt's text, not an explanation's: chat-template tokens, role and field labels, orders.
_RESIDUE = re.compile(
    r"""<\|?\w+\|?> | \[/?inst\]
    | \b(?:system|user|assistant|human|question|answer|titles?|genres?|history|year|prompt|films?
        |movies?|watched|recommended|recommendations?|explanation|output|input)\s*:
    | \bexplain\s+(?:each|why|the|this|your)\b
    | \bin\s+one\s+(?:or\s+two\s+)?(?:short\s+)?sentences?\b
    | \byou\s+(?:recommend|are\s+an?\s+(?:\w+\s+)?(?:assistant|recommender))\b""",
    re.VERBOSE,
)
_LIST_MARKER = re.compile(r"\s*(?:#|[-*]\s|\d+[.)]\s)")


class Reward:
    """The reward of a batch of explanations, by ``variant``: one of ``PARTS``.

    ``weights`` of the variant's parts, not all 0; they are rescaled to sum to 1. 0 removes a part.
    """

    def __init__(self, variant: str, catalogue: Catalogue, weights: Sequence[float] | None = None):
        weights = list(PARTS[variant].values()) if weights is None else weights
        self.catalogue, self.names, self._parts = catalogue, [*PARTS[variant]], VARIANTS[variant]
        self.weights = tuple(w / sum(weights) for w in weights)

    @classmethod
    def of(cls, params: Params, catalogue: Catalogue) -> "Reward":
        """The reward of a run."""
        chosen = (params.weight_form, params.weight_faithfulness)
        return cls(params.reward, catalogue, chosen if params.reward == "faithful" else None)

    def __call__(
        self, records: Sequence[Record], texts: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Total reward, float32 (n,), and each unweighted part, float32 (n,)."""
        check_records(records, texts)
        if self._parts is _faithful and any("history_weights" not in r for r in records):
            raise ValueError("reward='faithful': a record lacks history_weights; see Study.records")
        rows = [self._parts(r, text, self.catalogue) for r, text in zip(records, texts)]
        columns = np.array(rows, np.float32).reshape(-1, len(self.names)).T
        total = sum(w * column for w, column in zip(self.weights, columns))
        return np.asarray(total, np.float32), dict(zip(self.names, columns))

    def as_trl(self) -> list[Callable[..., list[float]]]:
        """The parts as TRL reward functions; pass ``reward_weights=list(reward.weights)`` too.

        The data set's columns must be the record's fields. Completions may be strings or chats.
        """

        def as_function(name: str) -> Callable[..., list[float]]:
            def function(prompts, completions, completion_ids=None, **columns) -> list[float]:
                n = len(completions)
                # TRL adds entries of its own that are no columns
                usable = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == n}
                # columns of follow-ups are None in the rows of first questions
                pairs = [[(k, v[i]) for k, v in usable.items()] for i in range(n)]
                records = [{k: v for k, v in pair if v is not None} for pair in pairs]
                texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
                return self(records, texts)[1][name].tolist()

            function.__name__ = f"reward_{name}"  # TRL logs it under this name
            return function

        return [as_function(name) for name in self.names]


def _paper(record: Record, text: str, catalogue: Catalogue) -> Parts:
    """Relevance: distinct keywords hit, of the title's words (not function words) and genres."""
    keywords = set(map(str.lower, words(record["title"]))) - SMALL
    keywords |= {g.lower() for g in real_genres(record)}
    hits = len(keywords.intersection(map(str.lower, words(text))))
    sentences = sum(len(s.split()) >= 3 for s in _SENTENCE.findall(text))
    return (
        min(len(text.split()) / PAPER_WORDS, 1.0),
        min(hits / min(PAPER_HITS, max(len(keywords), 1)), 1.0),
        min(sentences / PAPER_SENTENCES, 1.0),
    )


def _grounded(record: Record, text: str, catalogue: Catalogue) -> Parts:
    """Length: a trapezoid in words. Relevance: true mentions, in running English, less false ones.

    Coherence: opens like a sentence, ends like one (not cut off) and is made of words, a third
    each, times how far the text is prose, and the share of distinct trigrams.
    """
    said = words(text.lower())
    n, prose = len(said), 0.0 if _is_residue(text) else catalogue.claims(text).prose
    length = max(min(n / FULL_FROM, (TOO_LONG - n) / (TOO_LONG - FULL_TO), 1.0), 0.0)
    earned, charged = _mentions(catalogue.verdict(record, text))
    relevance = max(earned * prose - charged, 0.0)
    form = sum(_form(text, said)) / 3 * distinct_share(said, 3) if prose else 0.0
    return length, relevance, form * prose


def _faithful(record: Record, text: str, catalogue: Catalogue) -> Parts:
    """(1 if the text passes the gate, its faithfulness then); both 0 if it does not."""
    said, follow_up = words(text.lower()), record.get("intent", "why") != "why"
    if not SHORTEST <= len(said) <= LONGEST or _is_residue(text):
        return 0.0, 0.0
    if not all(_form(text, said, digits=follow_up)):  # years and places are an answer's substance
        return 0.0, 0.0
    if catalogue.claims(text).prose < PROSE or distinct_share(said, 3) < DISTINCT:
        return 0.0, 0.0
    if follow_up:
        answer = answers.judge(record, text, catalogue)
        return float(not answer.invented), max(answer.met - sum(answer[1:]) / 2, 0.0)
    if catalogue.mentions(record, text) != 1 or catalogue.verdict(record, text).unsupported:
        return 0.0, 0.0
    return 1.0, faithfulness(record["history_weights"], catalogue.cited(record, text))


def _form(text: str, said: list[str], digits: bool = False) -> tuple[bool, bool, bool]:
    """Whether a text opens like a sentence, ends like one (not cut off), and is made of words."""
    opens = bool(_OPENING.match(text.lstrip()))
    ends = text.rstrip().rstrip("\"”')").endswith((".", "!", "?"))
    return opens, ends, _is_latin(text, said, digits)


def _mentions(said: Verdict) -> tuple[float, float]:
    """What the title, up to two history titles and up to two genres earn; what false ones cost.

    What the record cannot offer (no history, no genres) leaves the scale, so that 1 can be reached.
    """
    offered = (
        (TITLE, said.title, 1),
        (HISTORY, said.history, min(2, said.all_history)),
        (GENRES, said.genres, min(2, said.all_genres)),
    )
    earned = sum(weight * min(named / most, 1) for weight, named, most in offered if most)
    charged = FOREIGN_TITLE * said.foreign_titles + NAME * said.people
    charged = charged + WRONG_GENRE * said.wrong_genres + WRONG_YEAR * said.wrong_years
    return earned / sum(weight for weight, _, most in offered if most), charged


def _is_residue(text: str) -> bool:
    """Whether the text has marks of a prompt, a chat template or a list."""
    return bool(_RESIDUE.search(text.lower())) or any(map(_LIST_MARKER.match, text.split("\n")))


def _is_latin(text: str, said: list[str], digits: bool) -> bool:
    """Mostly Latin letters (or ``digits``), in words of ordinary length."""
    lengths, shown = list(map(len, said)), "".join(text.split())
    return (
        sum(map(str.isalnum if digits else str.isalpha, shown)) >= 0.8 * len(shown)
        and len(shown.encode("ascii", "ignore")) / len(shown) >= 0.9
        and 2.5 <= sum(lengths) / len(lengths) <= 8
        and max(lengths) <= 24
    )


VARIANTS = {"faithful": _faithful, "grounded": _grounded, "paper": _paper}
