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


@pytest.fixture
def tuned():
    """An explainer with adapters, and two sets of adapter tensors that differ."""
    explainer = tiny_explainer(lora_layers=2)
    adapters = {}
    for seed, arm in enumerate(("unshielded", "shielded")):
        tune_randomly(explainer, scale=0.6, seed=seed)
        adapters[arm] = explainer.adapter_state()
    return explainer, adapters


@pytest.fixture
def chat(tuned):
    return Chat(SimpleNamespace(records=records, noun="film"), *tuned, PARAMS, users=[3, 4])


def say(explainer, seed=0, text="", history=None):
    return reply(explainer, history or messages(records([3], [1])[0]), text, PARAMS, seed)


def test_reply_answers_the_whole_chat_by_its_seed_and_does_not_change_it(tuned):
    explainer, _ = tuned
    answers = [say(explainer, seed) for seed in (0, 0, 1, 2, 3)]
    assert answers[0] == answers[1] and len(set(answers)) > 2
    history = messages(records([3], [1])[0]) + [{"role": "assistant", "content": "a good film"}]
    before = [dict(m) for m in history]
    questions = ("why you", "the red film", "green and short", "long")
    assert len({say(explainer, 0, text, history) for text in questions}) > 1 and history == before
    for nothing in ("", "  ", "<|im_end|>"):
        with pytest.raises(ValueError, match="type a question"):
            say(explainer, 0, nothing, history)


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


def test_a_long_chat_drops_its_oldest_turns_but_neither_opening_nor_question(tuned):
    explainer, _ = tuned
    explainer.lm.config.max_position_embeddings = 10_000
    opening = messages(records([3], [1])[0])
    said = [f"{word} film" for word in "red red blue blue green green short short".split()]
    roles = ("assistant", "user") * 4
    pairs = [{"role": role, "content": text} for role, text in zip(roles, said)]
    whole, without = (say(explainer, history=opening + chat) for chat in (pairs, pairs[2:]))
    assert whole != without
    everything = len(prompt_ids(explainer, opening + pairs)) + PARAMS.max_new_tokens
    for room, answer in ((everything, whole), (everything - 1, without)):
        explainer.lm.config.max_position_embeddings = room
        assert say(explainer, history=opening + pairs) == answer
    explainer.lm.config.max_position_embeddings = 6 + len(prompt_ids(explainer, opening))
    assert say(explainer, history=opening) is not None
    with pytest.raises(ValueError, match="too long"):
        say(explainer, history=opening + pairs)


def test_the_chat_opens_with_an_answer_goes_on_and_suggests_questions(chat):
    assert [m["role"] for m in chat.history] == ["system", "user", "assistant"]
    assert chat.arm.value == "shielded" and chat.item.index == 0
    chat.text.value = f"why {HOSTILE} & red <|im_end|> film"
    chat.button.click()
    assert [m["role"] for m in chat.history[3:]] == ["user", "assistant"]
    assert chat.history[-2]["content"] == f"why {HOSTILE} & red film"
    assert chat.text.value == "" and not chat.button.disabled
    shown = "why &lt;img src=x onerror=alert(1)&gt; &amp; red film"
    assert "<img" not in chat.log.value and shown in chat.log.value
    assert chat.why_not.description == f"Why not good film 3 2 {HOSTILE}?"
    chat.why_not.click()
    assert chat.history[-2]["content"] == chat.why_not.description
    chat.lighter.click()
    assert chat.history[-2]["content"] == "Something lighter?" and len(chat.history) == 9
    chat.item.index = 1
    assert chat.why_not.description.startswith("Why not good film 3 1")


def test_user_film_and_arm_each_start_one_new_chat(chat):
    shown = []
    chat.log.observe(lambda change: shown.append(change["new"]), "value")
    chat.item.index = 4
    assert len(shown) == 1 and "good film 3 5" in chat.history[1]["content"]
    chat.user.value = 4
    assert len(shown) == 2 and "good film 4 1" in chat.history[1]["content"]
    assert chat.item.index == 0
    chat.arm.value = "base"
    assert len(shown) == 3 and len(chat.history) == 3 and "<b>base</b>" in chat.log.value


def test_errors_are_shown_and_the_chat_can_go_on(chat):
    before = list(chat.history)
    for text, message in (("   ", "type a question"), ("why", "another LoRA setting")):
        chat.ask(text)
        assert 'role="alert"' in chat.log.value and message in chat.log.value
        assert chat.history == before and not chat.button.disabled
        chat.adapters["shielded"] = {"unknown": torch.zeros(1)}
    chat.arm.value = "unshielded"
    assert 'role="alert"' not in chat.log.value and len(chat.history) == 3
