"""A chat with the explainer: ask about a recommendation, and hear it before and after tuning.

``reply`` is all there is to generation; ``Chat`` only shows it, so a chat works without a browser.
Nothing that is said reaches the ranker: the list of ten was computed before.
"""

import html
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

HELP = (
    "I can say why I recommend this {noun} or why not another one, look for a genre or a decade "
    "among your ten, or compare two {noun}s."
)


def reply(
    explainer: Explainer,
    record: Record,
    params: Params,
    seed: int,
    heard: Callable[[str], None] | None = None,
) -> str:
    """The explainer's answer to the last question about ``record``, as it is tuned now.

    Of a chat too long for the model the oldest follow-ups go, with their answers. ``heard`` is
    called with the answer so far after every token. Equal arguments give equal answers.
    ``ValueError``: the question alone is more than the model can read.
    """
    room = explainer.lm.config.max_position_embeddings - params.max_new_tokens
    record = {**record, "chat": list(record.get("chat", ()))}
    while len(ids := prompt_ids(explainer, messages(record))) > room and len(record["chat"]) > 3:
        del record["chat"][1:3]
    if len(ids) > room:
        problem = f"{len(ids)} tokens with what it refers to, and {room} fit"
        raise ValueError(f"the question is too long: {problem}; shorten it")
    settings = Settings(params.max_new_tokens, params.temperature)
    generator = torch.Generator().manual_seed(seed)
    return sample(explainer, [ids], settings, generator, heard=heard).texts[0]


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
        wide = ipw.Layout(width="auto")
        self.suggestions = [ipw.Button(layout=wide) for _ in range(4)]
        asking = ipw.HBox([self.text, self.button]), ipw.HBox(self.suggestions)
        self.box = ipw.VBox([ipw.HBox([self.user, self.item]), self.arm, self.log, *asking])
        self.user.observe(self._new_user, "value")
        self.item.observe(self.start, "value")
        self.arm.observe(self.start, "value")
        self.button.on_click(lambda _: self.ask(self.text.value))
        for suggestion in self.suggestions:
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
        record = self.item.value
        first, second = [r["title"] for _, r in self.item.options if r != record][:2]
        kinds = "Something lighter?", "Something from the eighties?"
        questions = f"Why not {first}?", *kinds, f"Compare {first} and {second}."
        for button, question in zip(self.suggestions, questions):
            button.description = question
        self.record, self.turns = record, [("you", messages(record)[-1]["content"])]
        self._answer(self.record)

    def ask(self, text: str) -> None:
        """Ask on; what cannot be asked, and what goes wrong, is said too."""
        if not (question := sanitise_text(text)):
            self._show("<i>Type a question.</i>")
            return
        self.text.value = ""
        self.turns.append(("you", question))
        if "listed" not in self.record:  # the opening question's answer failed
            self.start()
        elif asked := self.study.asked(self.record, question):
            self._answer(asked)
        else:
            self._show(html.escape(HELP.format(noun=self.study.noun)))

    def _answer(self, record: Record) -> None:
        """Answer the last question of ``record``, and show the answer as it comes."""
        inputs = (self.button, *self.suggestions, self.user, self.item, self.arm)
        for widget in inputs:
            widget.disabled = True
        who, said, note = self.arm.value, "", ""
        turns = self.turns

        def heard(so_far: str) -> None:
            self.turns = [*turns, (who, so_far)]
            self._show("…")

        try:
            self._show("…")
            with tuned_as(self.explainer, self.adapters, who):
                said = reply(self.explainer, record, self.params, self.params.seed, heard)
            self.record, self.turns = self.study.heard(record, said), [*turns, (who, said)]
        except Exception as error:  # raised in a callback it would vanish into the server's log
            self.turns = turns
            words = html.escape(f"{type(error).__name__}: {error}")
            note = f'<span role="alert"><b>error</b>: {words}</span>'
        for widget in inputs:
            widget.disabled = False
        self._show(note)

    def _show(self, note: str) -> None:
        """The chat so far, then ``note``, which is HTML. Titles, questions and answers are
        untrusted: all are escaped."""
        lines = [f"<p><b>{who}</b>: {html.escape(said)}</p>" for who, said in self.turns]
        self.log.value = "".join(lines).replace("\n", "<br>") + (f"<p>{note}</p>" if note else "")
