"""What the explainer is asked: records, and the chat messages and token ids made from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from recrl_lib.explainer.model import Explainer

Record = Mapping[str, Any]  # what one explanation is about; its fields are in recrl_lib/__init__.py
RECORD_FIELDS = "user item position title year genres history_titles history_genres".split()
NOUNS = {  # what the data set's items are called -> (who chooses them, what that person did)
    "film": ("viewer", "watched"), "book": ("reader", "read"),
    "game": ("player", "played"), "item": ("customer", "chose"),
}  # fmt: skip
NO_GENRE = frozenset({"", "unknown"})  # placeholders of the data sets
SYSTEM = (
    "You recommend {noun}s. Explain each recommendation in one or two short sentences: "
    "name the {noun}, and link it to {noun}s the {person} {did} and to its genres."
)


def real_genres(record: Record) -> list[str]:
    """The recommended item's genres without the placeholders of the data."""
    return [g for g in record["genres"] if g.lower() not in NO_GENRE]


def check_records(records: Iterable[Record], texts: Iterable[str]) -> None:
    """Raise ``ValueError`` unless there is one text a record and each record has its fields."""
    records, n = list(records), len(list(texts))
    if len(records) != n:
        raise ValueError(f"{len(records)} records but {n} texts: give one text a record")
    for i, record in enumerate(records):
        if missing := ", ".join(f for f in RECORD_FIELDS if f not in record):
            raise ValueError(f"record {i} lacks {missing}: see 'record' in recrl_lib/__init__.py")


def build_records(
    items: pd.DataFrame,
    sequences: Sequence[np.ndarray],
    top: np.ndarray,
    asked: Iterable[tuple[int, int]],
    history_length: int,
    noun: str = "film",
) -> list[dict]:
    """One record for each (user, position in the user's list, from 1) in ``asked``.

    Of ``sequences`` the last ``history_length`` items are named. ``top`` (users, k): items, best
    first. ``noun``: one of ``NOUNS``.
    """
    titles, years = items["title"].to_list(), items["year"].to_list()
    genres = [g.split("|") if g else [] for g in items["genres"]]
    records = []
    for user, position in asked:
        row = int(top[user, position - 1]) - 1
        history = [int(item) - 1 for item in sequences[user][-history_length:]]
        record = {"user": int(user), "item": row + 1, "position": int(position)}
        record |= {"title": titles[row], "year": years[row], "genres": genres[row], "noun": noun}
        record["history_titles"] = [titles[i] for i in history]
        record["history_genres"] = [genres[i] for i in history]
        records.append(record)
    return records


def shown(film: Mapping) -> str:
    """A film as follow-ups show it: title, year and genres."""
    genres = ", ".join(map(str.lower, real_genres(film))) or "genre unknown"
    return f"{film['title']} ({film['year'] or 'year unknown'}, {genres})"


def messages(record: Record) -> list[dict[str, str]]:
    """The chat that asks for one explanation, or on after it: the record's ``chat``.

    The record's ``evidence`` of what moved the ranker: ``none``, the ``order`` of the history, or
    the two films that moved it most ``named``.
    """
    noun, titles = record.get("noun", "film"), record["history_titles"]
    person, did = NOUNS[noun]
    watched, evidence = f"I {did}: {'; '.join(titles)}.\n", record.get("evidence", "none")
    if evidence != "none":
        ranked = sorted(zip(record["history_weights"], titles), key=lambda pair: -pair[0])
        if evidence == "order":
            ordered = "; ".join(title for _, title in ranked)
            watched = f"I {did}, what counted most first: {ordered}.\n"
        elif named := [title for weight, title in ranked[:2] if weight > 0]:
            watched += f"What counted most: {' and '.join(named)}.\n"
    year = f" ({record['year']})" if record["year"] else ""
    genres = f", genres {', '.join(record['genres'])}" if record["genres"] else ""
    question = f"{watched}Why do you recommend {record['title']}{year}{genres}?"
    return [
        {"role": "system", "content": SYSTEM.format(noun=noun, person=person, did=did)},
        {"role": "user", "content": question},
        *record.get("chat", ()),
    ]


def prompt_ids(explainer: Explainer, chat: list[dict[str, str]]) -> list[int]:
    """Token ids of the chat in the model's own template, up to where its answer begins."""
    text = explainer.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return explainer.tokenizer(text, add_special_tokens=False)["input_ids"]
