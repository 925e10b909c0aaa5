"""The chat, headless: answers follow the adapters and the seed, and everything shown is escaped."""

from types import SimpleNamespace

import pytest
import torch

from recrl_lib.chat import Chat, reply, tuned_as
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.params import Params
from recrl_lib.tests.tiny import tiny_explainer, tune_randomly

PARAMS = Params(max_new_tokens=6, temperature=1.0)
HOSTILE = "<img src=x onerror=alert(1)>"


def records(users, positions) -> list[dict]:
    same = dict(year=1990, genres=["red"], history_titles=["bad film"], history_genres=[["blue"]])
    return [
        dict(user=u, item=10 * u + p, position=p, title=f"good film {u} {p} {HOSTILE}", **same)
        for u, p in zip(users, positions)
    ]


def heard(record: dict, said: str) -> dict:
    chat = [*record.get("chat", ()), {"role": "assistant", "content": said}]
    return {**record, "chat": chat, "listed": records([record["user"]] * 10, range(1, 11))}


def asked(record: dict, question: str) -> dict | None:
    chat = [*record["chat"], {"role": "user", "content": question}]
    return None if "weather" in question else {**record, "chat": chat}


@pytest.fixture
def tuned():
    """An explainer with adapters, and two sets of adapter tensors that differ."""
    explainer = tiny_explainer(lora_layers=2)
    explainer.lm.config.max_position_embeddings = 10_000
    adapters = {}
    for seed, arm in enumerate(("unshielded", "shielded")):
        tune_randomly(explainer, scale=0.6, seed=seed)
        adapters[arm] = explainer.adapter_state()
    return explainer, adapters


@pytest.fixture
def chat(tuned):
    study = SimpleNamespace(records=records, noun="film", heard=heard, asked=asked)
    return Chat(study, *tuned, PARAMS, users=[3, 4])


def say(explainer, seed=0, record=None, heard=None):
    return reply(explainer, record or records([3], [1])[0], PARAMS, seed, heard)


def talk(*said: str) -> dict:
    """A chat of answers and questions in turn."""
    roles = ("assistant", "user") * len(said)
    chat = [{"role": role, "content": text} for role, text in zip(roles, said)]
    return {**heard(records([3], [1])[0], ""), "chat": chat}


def test_reply_answers_the_whole_chat_by_its_seed_and_is_heard_as_it_comes(tuned):
    explainer, _ = tuned
    answers = [say(explainer, seed) for seed in (0, 0, 1, 2, 3)]
    assert answers[0] == answers[1] and len(set(answers)) > 2
    chats = [talk("a good film", q) for q in ("why you", "the red film", "green and short", "long")]
    assert len({say(explainer, 0, chat) for chat in chats}) > 1
    assert chats[0] == talk("a good film", "why you")
    parts: list[str] = []
    whole = say(explainer, 0, chats[0], parts.append)
    assert len(parts) == PARAMS.max_new_tokens and parts[-1] == whole
    assert all(whole.startswith(part) for part in parts)


def test_arms_speak_with_their_own_adapters(tuned):
    explainer, adapters = tuned
    spoken = {}
    for arm in ("base", "unshielded", "shielded"):
        with tuned_as(explainer, adapters, arm):
            spoken[arm] = tuple(say(explainer, seed) for seed in range(4))
    assert len(set(spoken.values())) == 3
    untouched = tiny_explainer()
    assert spoken["base"] == tuple(say(untouched, seed) for seed in range(4))
    wrong = "no arm is called 'none'; choose one of base, unshielded, shielded"
    with pytest.raises(ValueError, match=wrong), tuned_as(explainer, adapters, "none"):
        pass


def test_a_long_chat_drops_its_oldest_follow_ups(tuned):
    explainer, _ = tuned
    said = [f"{word} film" for word in "red red blue blue green green short short".split()]
    long, cut = talk(*said), talk(*said[:1], *said[3:])
    whole, without = say(explainer, 0, long), say(explainer, 0, cut)
    assert whole != without
    everything = len(prompt_ids(explainer, messages(long))) + PARAMS.max_new_tokens
    for room, answer in ((everything, whole), (everything - 1, without)):
        explainer.lm.config.max_position_embeddings = room
        assert say(explainer, 0, long) == answer
    explainer.lm.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match="too long"):
        say(explainer, 0, long)


def roles(chat: Chat) -> list[str]:
    return [m["role"] for m in chat.record["chat"]]


def test_the_chat_opens_with_an_answer_goes_on_and_suggests_questions(chat):
    assert roles(chat) == ["assistant"] and chat.arm.value == "shielded" and chat.item.index == 0
    chat.text.value = f"why {HOSTILE} & red <|im_end|> film"
    chat.button.click()
    assert roles(chat) == ["assistant", "user", "assistant"]
    assert chat.record["chat"][1]["content"] == f"why {HOSTILE} & red film"
    assert chat.text.value == "" and not chat.button.disabled
    shown = "why &lt;img src=x onerror=alert(1)&gt; &amp; red film"
    assert "<img" not in chat.log.value and shown in chat.log.value
    first, lighter, *_, compare = (button.description for button in chat.suggestions)
    assert first == f"Why not good film 3 2 {HOSTILE}?" and lighter == "Something lighter?"
    assert compare.startswith("Compare good film 3 2")
    for button in chat.suggestions:
        button.click()
        assert chat.record["chat"][-2]["content"] == button.description
    assert len(chat.turns) == 12 and "<img" not in chat.log.value
    chat.item.index = 1
    assert chat.suggestions[0].description.startswith("Why not good film 3 1")


def test_what_cannot_be_asked_gets_a_line_that_says_what_can(chat):
    before = list(chat.record["chat"])
    chat.ask("how is the weather?")
    assert "I can say why I recommend this film" in chat.log.value
    chat.ask("   ")
    assert "Type a question" in chat.log.value and chat.record["chat"] == before


def test_an_answer_is_shown_as_it_comes(chat):
    shown = []
    chat.log.observe(lambda change: shown.append(change["new"]), "value")
    chat.ask("the red film")
    assert len(shown) > 3 and all("the red film" in log for log in shown)
    assert "…" in shown[0] and "…" not in shown[-1]


def test_user_film_and_arm_each_start_one_new_chat(chat):
    for choose, title in (
        (lambda: setattr(chat.item, "index", 4), "good film 3 5"),
        (lambda: setattr(chat.user, "value", 4), "good film 4 1"),
    ):
        chat.ask("the red film")
        choose()
        assert len(chat.turns) == 2 and title in chat.turns[0][1] and roles(chat) == ["assistant"]
    assert chat.item.index == 0
    chat.arm.value = "base"
    assert len(chat.turns) == 2 and "<b>base</b>" in chat.log.value


def test_errors_are_shown_and_the_chat_can_go_on(chat):
    before = list(chat.record["chat"])
    chat.adapters["shielded"] = {"unknown": torch.zeros(1)}
    chat.ask("why")
    assert 'role="alert"' in chat.log.value and "another LoRA setting" in chat.log.value
    assert chat.record["chat"] == before and not chat.button.disabled
    chat.arm.value = "unshielded"
    assert 'role="alert"' not in chat.log.value and len(chat.turns) == 2
