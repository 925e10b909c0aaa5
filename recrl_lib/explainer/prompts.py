"""What the explainer is asked: records, and the chat messages and token ids made from them."""

from collections.abc import Iterable, Mapping
from typing import Any

from recrl_lib.explainer.model import Explainer

Record = Mapping[str, Any]  # see ``recrl_lib.__init__``
NOUNS = {
    "film": ("viewer", "watched"),
    "book": ("reader", "read"),
    "game": ("player", "played"),
    "item": ("customer", "chose"),
}
RECORD_FIELDS = (
    "user",
    "item",
    "position",
    "title",
    "year",
    "genres",
    "history_titles",
    "history_genres",
)
NO_GENRE = frozenset({"", "unknown"})


def real_genres(record: Record) -> list[str]:
    """The recommended film's genres without the placeholders of the data."""
    return [g for g in record["genres"] if g.lower() not in NO_GENRE]


def check_records(records: Iterable[Record], texts: Iterable[str]) -> None:
    """Raise ``ValueError`` unless there is one text a record and each record has its fields."""
    records, texts = list(records), list(texts)
    if len(records) != len(texts):
        raise ValueError(f"{len(records)} records but {len(texts)} texts: give one text a record")
    for i, record in enumerate(records):
        if missing := [f for f in RECORD_FIELDS if f not in record]:
            raise ValueError(
                f"record {i} lacks {', '.join(missing)}: see the record in recrl_lib/__init__.py"
            )


SYSTEM = (
    "You recommend {noun}s. Explain each recommendation in one or two short sentences: "
    "name the {noun}, and link it to {noun}s the {person} {did} and to its genres."
)


# --- what it is asked ---------------------------------------------------------------------------


def build_records(
    items, sequences, top, users, positions, history_length: int, noun: str = "film"
) -> list[dict]:
    """One record a user (see ``recrl_lib``): the item at 1-based rank ``positions[i]`` of ``top[user]`` (U, k)."""
    title, year = items["title"].to_numpy(), items["year"].to_numpy()
    genres = [g.split("|") if g else [] for g in items["genres"]]
    records = []
    for user, position in zip(users, positions):
        item = int(top[user, position - 1])
        history = [int(i) for i in sequences[user][-history_length:]]
        records.append(
            {
                "user": int(user),
                "item": item,
                "position": int(position),
                "title": str(title[item - 1]),
                "year": int(year[item - 1]),
                "genres": genres[item - 1],
                "noun": noun,
                "history_titles": [str(title[i - 1]) for i in history],
                "history_genres": [genres[i - 1] for i in history],
            }
        )
    return records


def describe(record: dict) -> str:
    year = f" ({record['year']})" if record["year"] else ""
    genres = f", genres {', '.join(record['genres'])}" if record["genres"] else ""
    return f"{record['title']}{year}{genres}"


def messages(record: dict) -> list[dict]:
    """The chat that asks for one explanation."""
    noun = record.get("noun", "film")
    person, did = NOUNS[noun]
    question = (
        f"I {did}: {'; '.join(record['history_titles'])}.\nWhy do you recommend {describe(record)}?"
    )
    return [
        {"role": "system", "content": SYSTEM.format(noun=noun, person=person, did=did)},
        {"role": "user", "content": question},
    ]


def prompt_ids(explainer: Explainer, chat: list[dict]) -> list[int]:
    text = explainer.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return explainer.tokenizer(text, add_special_tokens=False)["input_ids"]
