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
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import Settings, sample
from recrl_lib.params import TOP_K, Params
from recrl_lib.study import Study

Turn = dict[str, str]  # one message of a chat: role, content


def reply(explainer: Explainer, history: list[Turn], text: str, params: Params, seed: int) -> str:
    """The explainer's answer to ``text`` after the chat ``history``, as it is tuned now.

    With empty ``text`` the last message of ``history`` is answered. Chat-template tokens in
    ``text`` are removed. Of a chat too long for the model the oldest turns after the opening
    question go first. Equal arguments give equal answers. Raises ``ValueError`` if there is
    nothing to answer.
    """
    chat = list(history)
    if question := sanitise_text(text):
        chat.append({"role": "user", "content": question})
    if not chat or chat[-1]["role"] != "user":
        raise ValueError("nothing to answer: type a question")
    tokens = params.max_new_tokens
    ids = _fitting(explainer, chat, tokens)
    generator = torch.Generator().manual_seed(seed)
    settings = Settings(tokens, params.temperature)
    return sample(explainer, [ids], settings, generator).texts[0]


def _fitting(explainer: Explainer, chat: list[Turn], max_new_tokens: int) -> list[int]:
    """Prompt ids of as much of the chat as fits: its opening, then the newest pairs of turns."""
    room = explainer.lm.config.max_position_embeddings - max_new_tokens
    opening = 1 + (chat[0]["role"] == "system")
    ids: list[int] = []
    for start in range(opening, max(opening + 1, len(chat) - 1), 2):
        ids = prompt_ids(explainer, chat[:opening] + chat[start:])
        if len(ids) <= room:
            return ids
    raise ValueError(
        f"the question is too long: {len(ids)} tokens with what it refers to, and {room} fit; "
        "shorten it"
    )


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
        raise ValueError(
            f"no arm is called {arm!r}; choose one of {', '.join(['base', *adapters])}"
        )


class Chat:
    """Choose a user, an item of their top 10 and an arm; ask, and ask on. Show ``box``.

    Args:
        study: as ``study.load`` gives it.
        explainer: with adapters.
        adapters: arm -> adapter tensors; "base" is always there.
        params: ``max_new_tokens``, ``temperature`` and ``seed`` of the run.
        users: those to choose from.

    A new user, item or arm starts a new chat. Whatever goes wrong while answering is shown.
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
        arms = ["base", *adapters]
        self.user = ipw.Dropdown(options=[(f"user {u}", int(u)) for u in users], description="user")
        self.item = ipw.Dropdown(description=study.noun)
        self.arm = ipw.ToggleButtons(options=arms, value=arms[-1], description="explainer")
        self.log = ipw.HTML()
        self.text = ipw.Text(placeholder="Ask about the recommendation")
        self.button = ipw.Button(description="Ask", button_style="primary")
        self.why_not = ipw.Button(layout=ipw.Layout(width="auto"))
        self.lighter = ipw.Button(description="Something lighter?")
        asking = ipw.HBox([self.text, self.button, self.why_not, self.lighter])
        self.box = ipw.VBox([ipw.HBox([self.user, self.item]), self.arm, self.log, asking])
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
        self.item.options = [
            (f"{r['position']}. {r['title']}", r["position"]) for r in self.records
        ]
        self.item.value = 1
        self.item.observe(self.start, "value")
        self.start()

    def start(self, _=None) -> None:
        """A new chat: the opening question, answered."""
        record = self.records[self.item.value - 1]
        other = next(r for r in self.records if r is not record)
        self.why_not.description = f"Why not {other['title']}?"
        self.history = messages(record)
        self._answer("")

    def ask(self, text: str) -> None:
        """Ask on; the answer, or what went wrong, is in the log."""
        self.text.value = ""
        self._answer(sanitise_text(text))

    def _answer(self, text: str) -> None:
        inputs = (self.button, self.why_not, self.lighter, self.user, self.item, self.arm)
        error = ""
        for widget in inputs:
            widget.disabled = True
        try:
            with tuned_as(self.explainer, self.adapters, self.arm.value):
                said = reply(self.explainer, self.history, text, self.params, self.params.seed)
            asked = [{"role": "user", "content": text}] if text else []
            self.history = [*self.history, *asked, {"role": "assistant", "content": said}]
        except Exception as problem:  # raised in a callback it would vanish into the server's log
            error = f"{type(problem).__name__}: {problem}"
        finally:
            for widget in inputs:
                widget.disabled = False
        self.log.value = self._log(error)

    def _log(self, error: str) -> str:
        """The chat as HTML. Titles, questions and answers are untrusted: all are escaped."""
        names = {"user": "you", "assistant": self.arm.value}
        turns = [(names[t["role"]], t["content"]) for t in self.history if t["role"] in names]
        shown = "".join(
            f"<p><b>{html.escape(who)}</b>: {html.escape(said)}</p>" for who, said in turns
        )
        problem = f'<p role="alert"><b>error</b>: {html.escape(error)}</p>' if error else ""
        return shown.replace("\n", "<br>") + problem
