"""A button that asks before it acts."""

from collections.abc import Callable
from html import escape

import ipywidgets

_COLOUR = "var(--jp-content-font-color1, inherit)"  # of text, in the light and the dark theme


def paragraph(words: str, *, role: str = "note") -> str:
    """Words as HTML in the theme's colour; with the role `status` screen readers say what changes."""
    return f'<div role="{role}" style="color: {_COLOUR}; line-height: 1.5">{escape(words)}</div>'


class ConfirmedButton:
    """A button, then a question with a second button, then what came of it.

    Args:
        label: of the first button.
        confirm: of the second.
        question: what is asked; a `ValueError` or `OSError` is shown in its place, and nothing is offered.
        act: what is done, returns what to say then; a `ValueError` or `OSError` is shown in its place.
        undo: undoes it, returns what to say then; has a button once something was done.

    Attributes:
        widget: to be shown.
    """

    def __init__(
        self,
        label: str,
        confirm: str,
        *,
        question: Callable[[], str],
        act: Callable[[], str],
        undo: Callable[[], str] | None = None,
    ) -> None:
        self._question, self._act, self._undo = question, act, undo
        self._done = False  # something that can be undone
        self._ask = ipywidgets.Button(description=label, layout={"width": "auto"})
        bold = {"font_weight": "bold"}  # in the theme's own colours, which are readable in each
        self._confirm = ipywidgets.Button(description=confirm, style=bold, layout={"width": "auto"})
        self._cancel = ipywidgets.Button(description="No", layout={"width": "auto"})
        self._back = ipywidgets.Button(description="Undo", layout={"width": "auto"})
        self._words = ipywidgets.HTML(layout={"flex": "1 1 300px"})
        self.widget = ipywidgets.HBox(layout={"flex_flow": "row wrap", "align_items": "center"})
        self._ask.on_click(lambda _: self.ask())
        self._confirm.on_click(lambda _: self.confirm())
        self._cancel.on_click(lambda _: self.withdraw())
        self._back.on_click(lambda _: self.undo())
        self._show("")

    @property
    def words(self) -> str:
        """The question, or what came of it; empty where nothing was asked."""
        return self._shown

    def ask(self) -> None:
        """Press the first button."""
        try:
            self._show(self._question(), asking=True)
        except (ValueError, OSError) as error:
            self._show(str(error))

    def confirm(self) -> None:
        """Press the second button; does nothing unless something was asked."""
        if self._confirm not in self.widget.children:
            return
        self._do(self._act, done=True)

    def undo(self) -> None:
        """Press the button that undoes; does nothing unless something was done."""
        if self._done and self._undo is not None:
            self._do(self._undo, done=False)

    def _do(self, what: Callable[[], str], *, done: bool) -> None:
        try:
            words = what()
        except (ValueError, OSError) as error:
            words = str(error)
        else:
            self._done = done and self._undo is not None
        self._show(words)

    def withdraw(self) -> None:
        """Take back the question, as what it was about has changed."""
        if self._shown:
            self._show("")

    def _show(self, words: str, *, asking: bool = False) -> None:
        self._shown = words
        self._words.value = paragraph(words, role="status") if words else ""
        buttons = [self._words, self._confirm, self._cancel] if asking else [self._ask, self._words]
        self.widget.children = buttons + [self._back] * (self._done and not asking)
