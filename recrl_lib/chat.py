"""A chat with the explainer: ask about a recommendation, and hear it before and after tuning.

``reply`` is all there is to generation; ``Chat`` only shows it, so a chat works without a browser.
"""

import html
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import ipywidgets as ipw
import torch
from torch import Tensor

from recrl_lib.data.tables import sanitise_text
from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import Settings, sample
from recrl_lib.params import TOP_K, Params
from recrl_lib.study import Study

Turn = dict[str, str]  # one message of a chat: role, content


def reply(explainer: Explainer, history: list[Turn], text: str, params: Params, seed: int) -> str:
    """The explainer's answer to ``text`` after the chat ``history``, as it is tuned now.

    With empty ``text`` the last message of ``history`` is answered. Chat-template tokens in
    ``text`` are removed. Of a chat too long for the model the oldest turns after the opening
    question go first. Equal arguments give equal answers. Raises ``ValueError`` if there is nothing
    to answer, or more than the model can read.
    """
    question = sanitise_text(text)
    chat = history + [{"role": "user", "content": question}] if question else history
    if not chat or chat[-1]["role"] != "user":
        raise ValueError("nothing to answer: type a question")
    tokens = params.max_new_tokens
    room = explainer.lm.config.max_position_embeddings - tokens
    opening = 1 + (chat[0]["role"] == "system")
    ids: list[int] = []
    for start in range(opening, max(opening + 1, len(chat) - 1), 2):  # a question and its answer
        ids = prompt_ids(explainer, chat[:opening] + chat[start:])
        if len(ids) <= room:
            generator = torch.Generator().manual_seed(seed)
            settings = Settings(tokens, params.temperature)
            return sample(explainer, [ids], settings, generator).texts[0]
    problem = f"{len(ids)} tokens with what it refers to, and {room} fit"
    raise ValueError(f"the question is too long: {problem}; shorten it")


@contextmanager
def tuned_as(
    explainer: Explainer, adapters: Mapping[str, dict[str, Tensor]], arm: str
) -> Iterator[None]:
    """Within: the explainer speaks as ``arm``: "base" (adapters off) or one of ``adapters``."""
    if arm not in ("base", *adapters):
        known = ", ".join(["base", *adapters])
        raise ValueError(f"no arm is called {arm!r}; choose one of {known}")
    if arm != "base":
        explainer.load_adapter(adapters[arm])
    with explainer.reference() if arm == "base" else nullcontext():
        yield


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
        self.history: list[Turn] = []
        self.user = ipw.Dropdown(options=[(f"user {u}", int(u)) for u in users], description="user")
        self.item = ipw.Dropdown(description=study.noun)
        arms = ["base", *adapters]
        self.arm = ipw.ToggleButtons(options=arms, value=arms[-1], description="explainer")
        self.log = ipw.HTML()
        self.text = ipw.Text(placeholder="Ask about the recommendation")
        self.button = ipw.Button(description="Ask", button_style="primary")
        self.why_not = ipw.Button(layout=ipw.Layout(width="auto"))
        self.lighter = ipw.Button(description="Something lighter?")
        asking = (self.text, self.button, self.why_not, self.lighter)
        choosing = ipw.HBox([self.user, self.item])
        self.box = ipw.VBox([choosing, self.arm, self.log, ipw.HBox(asking)])
        self.user.observe(self._new_user, "value")
        self.arm.observe(self.start, "value")
        self.button.on_click(lambda _: self.ask(self.text.value))
        for suggestion in (self.why_not, self.lighter):
            suggestion.on_click(lambda button: self.ask(button.description))
        with warnings.catch_warnings():
            # The advised way, observing the value, would also send when the field loses focus
            warnings.simplefilter("ignore", DeprecationWarning)
            self.text.on_submit(lambda text: self.ask(text.value))
        self._new_user()

    def _new_user(self, _=None) -> None:
        """Offer the chosen user's top 10, and start with its first item."""
        self.records = self.study.records([self.user.value] * TOP_K, range(1, TOP_K + 1))
        self.item.unobserve_all("value")  # it changes in several steps: start one chat, not three
        titles = [f"{r['position']}. {r['title']}" for r in self.records]
        self.item.options = list(zip(titles, range(1, TOP_K + 1)))
        self.item.value = 1
        self.item.observe(self.start, "value")
        self.start()

    def start(self, _=None) -> None:
        """A new chat: the opening question, answered."""
        other = self.records[1 if self.item.value == 1 else 0]
        self.why_not.description = f"Why not {other['title']}?"
        self.history = messages(self.records[self.item.value - 1])
        self.ask("")

    def ask(self, text: str) -> None:
        """Ask on, or with "" hear the opening question answered; what went wrong is shown too.

        Titles, questions and answers are untrusted: all are escaped.
        """
        if text := sanitise_text(text):
            self.text.value = ""
        inputs = (self.button, self.why_not, self.lighter, self.user, self.item, self.arm)
        problem = ""
        for widget in inputs:
            widget.disabled = True
        try:
            with tuned_as(self.explainer, self.adapters, self.arm.value):
                said = reply(self.explainer, self.history, text, self.params, self.params.seed)
            asked = [{"role": "user", "content": text}] if text else []
            self.history = [*self.history, *asked, {"role": "assistant", "content": said}]
        except Exception as error:  # raised in a callback it would vanish into the server's log
            words = html.escape(f"{type(error).__name__}: {error}")
            problem = f'<p role="alert"><b>error</b>: {words}</p>'
        finally:
            for widget in inputs:
                widget.disabled = False
        names = {"user": "you", "assistant": self.arm.value}
        turns = [(names[t["role"]], t["content"]) for t in self.history if t["role"] in names]
        lines = (f"<p><b>{html.escape(who)}</b>: {html.escape(said)}</p>" for who, said in turns)
        self.log.value = "".join(lines).replace("\n", "<br>") + problem
