"""A chat with the explainer: ask about a recommendation, and hear it before and after tuning.

``reply`` is all there is to generation; ``Chat`` only shows it, so a chat works without a browser.
"""

import html
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ipywidgets as ipw
import torch
from torch import Tensor

from recrl_lib.data.tables import sanitise_text
from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import Record, messages, prompt_ids
from recrl_lib.explainer.sampling import Settings, sample
from recrl_lib.params import TOP_K, Params
from recrl_lib.study import Study

Turn = dict[str, str]  # one message of a chat: role, content


def reply(explainer: Explainer, history: list[Turn], text: str, params: Params, seed: int) -> str:
    """The explainer's answer to ``text`` after the chat ``history``, as it is tuned now.

    With empty ``text`` the last message of ``history`` is answered. Chat-template tokens in
    ``text`` are removed. Of a chat too long for the model the oldest turns after the opening
    question go. Equal arguments give equal answers. Raises ``ValueError`` if there is nothing to
    answer, or more than the model can read.
    """
    question = sanitise_text(text)
    chat = history + [{"role": "user", "content": question}] if question else list(history)
    if not chat or chat[-1]["role"] != "user":
        raise ValueError("nothing to answer: type a question")
    room = explainer.lm.config.max_position_embeddings - params.max_new_tokens
    opening = 1 + (chat[0]["role"] == "system")
    ids = prompt_ids(explainer, chat)
    while len(ids) > room and len(chat) > opening + 2:
        del chat[opening : opening + 2]  # an answer and the question after it
        ids = prompt_ids(explainer, chat)
    if len(ids) > room:
        problem = f"{len(ids)} tokens with what it refers to, and {room} fit"
        raise ValueError(f"the question is too long: {problem}; shorten it")
    settings = Settings(params.max_new_tokens, params.temperature)
    return sample(explainer, [ids], settings, torch.Generator().manual_seed(seed)).texts[0]


@contextmanager
def tuned_as(
    explainer: Explainer, adapters: Mapping[str, dict[str, Tensor]], arm: str
) -> Iterator[None]:
    """Within: the explainer speaks as ``arm``: "base" (adapters off) or one of ``adapters``."""
    if arm == "base":
        with explainer.reference():
            yield
    elif arm in adapters:
        explainer.load_adapter(adapters[arm])
        yield
    else:
        known = ", ".join(["base", *adapters])
        raise ValueError(f"no arm is called {arm!r}; choose one of {known}")


class Chat:
    """Choose a user, an item of their top 10 and an arm; ask, and ask on. Show ``box``.

    ``adapters`` holds the tensors of each arm; "base" is always there. A new user, item or arm
    starts a new chat.
    """

    def __init__(
        self,
        study: Study,
        explainer: Explainer,
        adapters: Mapping[str, dict[str, Tensor]],
        params: Params,
        users: Sequence[int],
    ):
        self.study, self.explainer, self.adapters, self.params = study, explainer, adapters, params
        self.user = ipw.Dropdown(options=[(f"user {u}", int(u)) for u in users], description="user")
        self.item = ipw.Dropdown(options=self._top(), description=study.noun)
        arms = ["base", *adapters]
        self.arm = ipw.ToggleButtons(options=arms, value=arms[-1], description="explainer")
        self.log = ipw.HTML()
        self.text = ipw.Text(placeholder="Ask about the recommendation")
        self.button = ipw.Button(description="Ask", button_style="primary")
        self.why_not = ipw.Button(layout=ipw.Layout(width="auto"))
        self.lighter = ipw.Button(description="Something lighter?")
        asking = ipw.HBox([self.text, self.button, self.why_not, self.lighter])
        self.box = ipw.VBox([ipw.HBox([self.user, self.item]), self.arm, self.log, asking])
        self.user.observe(self._new_user, "value")
        self.item.observe(self.start, "value")
        self.arm.observe(self.start, "value")
        self.button.on_click(lambda _: self.ask(self.text.value))
        for suggestion in (self.why_not, self.lighter):
            suggestion.on_click(lambda button: self.ask(button.description))
        with warnings.catch_warnings():
            # The advised way, observing the value, would also send when the field loses focus
            warnings.simplefilter("ignore", DeprecationWarning)
            self.text.on_submit(lambda text: self.ask(text.value))
        self.start()

    def _top(self) -> list[tuple[str, Record]]:
        """The chosen user's top 10."""
        records = self.study.records([self.user.value] * TOP_K, range(1, TOP_K + 1))
        return [(f"{r['position']}. {r['title']}", r) for r in records]

    def _new_user(self, _) -> None:
        self.item.options = self._top()  # chooses the first, which starts a chat

    def start(self, _=None) -> None:
        """A new chat: the opening question, answered."""
        other = next(r for _, r in self.item.options if r != self.item.value)
        self.why_not.description = f"Why not {other['title']}?"
        self.history = messages(self.item.value)
        self.ask("")

    def ask(self, text: str) -> None:
        """Ask on, or with "" hear the opening question answered; what went wrong is shown too.

        Titles, questions and answers are untrusted: all are escaped.
        """
        inputs = (self.button, self.why_not, self.lighter, self.user, self.item, self.arm)
        for widget in inputs:
            widget.disabled = True
        chat, problem = self.history, ""
        if text := sanitise_text(text):
            self.text.value = ""
            chat = [*chat, {"role": "user", "content": text}]
        try:
            with tuned_as(self.explainer, self.adapters, self.arm.value):
                said = reply(self.explainer, chat, "", self.params, self.params.seed)
            self.history = [*chat, {"role": "assistant", "content": said}]
        except Exception as error:  # raised in a callback it would vanish into the server's log
            words = html.escape(f"{type(error).__name__}: {error}")
            problem = f'<p role="alert"><b>error</b>: {words}</p>'
        for widget in inputs:
            widget.disabled = False
        names = {"user": "you", "assistant": self.arm.value}
        turns = [(names[t["role"]], t["content"]) for t in self.history if t["role"] in names]
        lines = (f"<p><b>{html.escape(who)}</b>: {html.escape(said)}</p>" for who, said in turns)
        self.log.value = "".join(lines).replace("\n", "<br>") + problem
