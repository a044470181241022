"""A dropdown of patients and their pages: look first, then ask for the truth."""

from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets


class CaseChooser:
    """A dropdown of cases, a box that shows the truth, and the page of what is chosen.

    A page is asked for when it is first looked at, and kept. Where no kernel runs, the notebook shows the
    first one, without truth.

    Args:
        titles: case → what the dropdown calls it; a title need not give the answer away.
        page: PNG of a case's page, without and with the truth: `page(case, truth)`.

    Example:
        >>> chooser = CaseChooser({"a": "patient 1", "b": "patient 2"}, lambda case, truth: case.encode())
        >>> chooser.case = "b"
        >>> bytes(chooser.png)
        b'b'
    """

    def __init__(self, titles: Mapping[str, str], page: Callable[[str, bool], bytes]) -> None:
        self._page, self._kept = page, dict[tuple[str, bool], bytes]()
        self._cases = ipywidgets.Dropdown(
            options=[(title, case) for case, title in titles.items()], description="Patient",
            style={"description_width": "auto"},
        )  # fmt: skip
        self._truth = ipywidgets.Checkbox(
            description="Show the truth", indent=False, layout={"width": "auto"}
        )
        self._image = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        row = ipywidgets.HBox([self._cases, self._truth], layout={"align_items": "center"})
        self.widget = ipywidgets.VBox([row, self._image])
        self._cases.observe(self._another, names="value")
        self._truth.observe(lambda _: self._show(), names="value")
        self._show()

    @property
    def case(self) -> str:
        """The one that is shown; set it to show another, without its truth."""
        return self._cases.value

    @case.setter
    def case(self, value: str) -> None:
        self._cases.value = value

    @property
    def truth(self) -> bool:
        """Whether the truth is shown."""
        return self._truth.value

    @truth.setter
    def truth(self, value: bool) -> None:
        self._truth.value = value

    @property
    def png(self) -> bytes:
        """The page that is shown."""
        return bytes(self._image.value)

    def _another(self, _: object) -> None:
        """A new patient is a new guess."""
        self._truth.value = False
        self._show()

    def _show(self) -> None:
        key = (self.case, self.truth)
        if key not in self._kept:
            self._kept[key] = self._page(*key)
        self._image.value = self._kept[key]

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, Any]:
        """The live widget for front ends with a kernel, its picture as PNG for all others."""
        shown = dict(self._cases.options)
        title = next(name for name, case in shown.items() if case == self.case)
        words = f"The page of {title}, {'with' if self.truth else 'without'} the truth."
        return {
            **self.widget._repr_mimebundle_(),
            "image/png": b64encode(self.png).decode(),
            "text/plain": words,
        }
