"""The threshold slider, and its button that freezes what it shows, after a question and with a way back.

Other runs are compared with what the built-in run says. A threshold set on it is therefore frozen in a copy,
`checkpoints/practice`, whose `practice_of.sha256` lists the predictions that were copied there, latest last:
so the copy differs from a run that only has the same name.
"""

from base64 import b64encode
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from traitlets import Unicode

from cspine_helpers.decisions.guarantees import Guarantee
from cspine_helpers.decisions.test_split import DECISION, OPENINGS, freeze, read_openings
from cspine_helpers.decisions.thresholds import Decision
from cspine_helpers.evaluation.clinical_utility import SCREENING_PREVALENCE, check_prevalence
from cspine_helpers.figures.curves import level_name
from cspine_helpers.files.paths import atomic_path, inside, listing, seal_of, sha256_of
from cspine_helpers.predictions import read_predictions
from cspine_helpers.runs import RECORD
from cspine_helpers.slider.operating_point import (
    DECIMALS,
    OperatingPoint,
    OperatingPoints,
    Presets,
    TriagePoint,
    digits,
    rounded,
    weigh,
)
from cspine_helpers.slider.picture import (
    BARS,
    TRIAGE_BARS,
    WIDTHS,
    Panels,
    written,
)

STEP = 0.001  # of one press of an arrow key; Page Up and Down move five
BUILTIN, PRACTICE = "builtin", "practice"  # the run that comes with the project, and its copy to freeze in
PREDICTIONS = "predictions.csv"
MARKER = "practice_of.sha256"
_COPIED = (DECISION, OPENINGS, RECORD, seal_of(PREDICTIONS).name, PREDICTIONS)  # what counts comes last
_COLOUR = "var(--jp-content-font-color1, inherit)"  # of text, in the light and the dark theme
_WRAP = {"flex_flow": "row wrap", "align_items": "center"}  # rows break where the window is narrow
_FITTING = {"width": "auto"}
_LIMIT = "Cases with at least this probability are predicted fractured."
_SMALLEST, _LARGEST = 0.84, 1.2  # times its width: an image shrinks that far before the row breaks
_LOOKS = """<style>
body[data-jp-theme-light="false"] .cspine-picture img { filter: invert(0.93) hue-rotate(180deg); }
.jp-OutputArea-child:has(.cspine-rerun):has(+ * .cspine-explorer:not(.jupyter-widgets-disconnected)) {
    display: none;
}
</style>"""  # white paper is #121212 in a dark theme; nobody has to re-run a cell whose slider moves
_RERUN = (
    '<p class="cspine-rerun">No slider below, or one that does not move? Re-run this cell: the slider needs '
    "the running kernel.</p>"
)


class _Image(ipywidgets.Image):
    """A PNG with alternative text.

    It is the tooltip, as ipywidgets gives an image nothing else that is read aloud, and JupyterLab fails at
    the tooltip of what has no `description`.
    """

    description = Unicode("").tag(sync=True)


class ThresholdExplorer:
    """A threshold slider over a predictions table, for all vertebrae, one of them, or patients; or images.

    It shows the confusion matrix, the point on the precision–recall curve, rates with 95 % bootstrap
    intervals (resampling patients), the recall of each vertebra, how many of 1,000 patients are missed or
    called back without a fracture, and whether the threshold is a guaranteed one. Rates and patients can be
    restated for another prevalence. Where no kernel runs, the notebook shows the picture it was saved with.

    With `defer` the slider has a second handle, and cases three answers: negative below the threshold,
    positive from the upper handle on, inconclusive between the two, where a reader decides. It then shows
    coverage, the recall with inconclusive fractures counted as found by the reader and as lost, and how many
    of 1,000 patients the reader has to decide about (see `decisions.triage`).

    Args:
        predictions: predictions table, of one split as a rule.
        decision: where the slider starts, at its level, marked as chosen there.
        threshold: where it starts without a decision; None: at the highest F1 of these data, and it says so.
        guarantees: of `guarantee_on_validation`, or of a frozen decision; marked at their levels.
        freeze: run folder in which a button freezes what the slider shows (of the built-in run in a copy),
            with a second one to undo it; or what the button calls instead, with the guarantee that covers it,
            if one does: `freeze(decision, guarantees=...)`. Only the threshold is frozen.
        defer: where the second handle starts; None: there is none.

    Example:
        >>> explorer = ThresholdExplorer(predictions, threshold=0.3, defer=0.6)
        >>> explorer.threshold, explorer.defer, explorer.level
        (0.3, 0.6, 'all')

    Raises:
        ValueError: the table breaks its schema, or holds one class only; see `Presets`; `defer` lies below
            the threshold to start at.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        decision: Decision | None = None,
        *,
        threshold: float | None = None,
        guarantees: Guarantee | Iterable[Guarantee] = (),
        freeze: str | Path | Callable[..., object] | None = None,
        defer: float | None = None,
    ) -> None:
        self._freeze, self._presets = freeze, Presets(predictions, decision, threshold, guarantees)
        self._threshold = self._presets.start
        self._upper = None if defer is None else self._above(defer)
        self._weights = weigh(self._presets.cases)
        self._operating: dict[str, OperatingPoints] = {}
        self._undo: Callable[[], None] = lambda: None
        self._panels: dict[str, Panels] = {}
        self._make_controls()
        share = ipywidgets.Label("% of patients fractured")
        rows = [[self._slider, *self._boxes, self._levels], [self._other, self._percent, share]]
        rows[1] += self._jumps.values()
        rows += [[self._freezer.widget]] if freeze is not None else []
        controls = [ipywidgets.HBox(row, layout=_WRAP) for row in rows]
        note = ipywidgets.HTML(_paragraph(self._presets.note))
        looks = ipywidgets.HTML(_LOOKS, layout={"display": "none"})
        self.widget = ipywidgets.VBox([*controls, note, self._picture, self._numbers, looks])
        self.widget.add_class("cspine-explorer")
        self._redraw()

    def _make_controls(self) -> None:
        style = {"description_width": "auto"}
        one = self._upper is None
        # ipywidgets gives a handle no name for screen readers, only its value; the boxes have their labels.
        self._slider = (ipywidgets.FloatSlider if one else ipywidgets.FloatRangeSlider)(
            value=self._steps(), min=0, max=1, step=STEP, readout=False,
            description="Threshold" if one else "Inconclusive", style={} if one else style,
            tooltip=_LIMIT if one else "Cases between the two are left to a reader.",
            layout={"flex": "1 1 360px"},
        )  # fmt: skip
        names = {"exactly": "190px"} if one else {"negative below": "210px", "positive from": "210px"}
        self._boxes = [
            ipywidgets.BoundedFloatText(
                value=value, min=0, max=1, step=10**-DECIMALS,
                description=name, style=style, layout={"width": width}, tooltip=_LIMIT,
            )
            for value, (name, width) in zip(self._handles(), names.items(), strict=True)
        ]  # fmt: skip
        self._box = self._boxes[0]
        self._levels = ipywidgets.Dropdown(
            options=[(level_name(self._presets.at_level(level)), level) for level in self._presets.levels],
            value=self._presets.level, description="Level", style=style, layout={"width": "200px"},
        )  # fmt: skip
        self._other = ipywidgets.Checkbox(description="Another prevalence:", indent=False, layout=_FITTING)
        self._percent = ipywidgets.FloatText(
            value=round(100 * SCREENING_PREVALENCE, 1), step=0.1, layout={"width": "80px"},
            tooltip="Percent of patients who are fractured",  # read aloud, as it has no description
        )  # fmt: skip
        self._jumps = {name: ipywidgets.Button(layout=_FITTING) for name in ("start", "chosen", "guaranteed")}
        self._freezer = _ConfirmedButton(
            "Freeze this decision …",
            "Really freeze",
            question=self._question,
            act=self._act,
            undo=None if self._run() is None else self._put_back,
        )
        self._images = {
            name: _Image(
                format="png",
                layout={
                    "flex": f"{width} 1 {_SMALLEST * width:.0f}px", "max_width": f"{_LARGEST * width:.0f}px",
                    "margin": "0", "min_width": "0",
                },
            )
            for name, width in WIDTHS.items()
        }  # fmt: skip
        self._picture = ipywidgets.HBox(
            [*self._images.values()], layout={"flex_flow": "row wrap", "align_items": "flex-start"}
        )
        self._numbers = ipywidgets.HTML()
        parts = {"threshold": self._box, "level": self._levels, "other": self._other}
        parts |= {"defer": self._boxes[-1]} if not one else {}
        for name, part in (parts | {"numbers": self._numbers, "picture": self._picture}).items():
            part.add_class(f"cspine-{name}")  # by which it is found on the page
        self._slider.observe(lambda change: self._slide(change["new"]), names="value")
        self._box.observe(lambda change: self._move(change["new"], self._upper), names="value")
        if not one:
            self._boxes[1].observe(lambda change: self._move(self._threshold, change["new"]), names="value")
        for control in (self._levels, self._other):
            control.observe(lambda _: self._redraw(), names="value")
        self._percent.observe(lambda change: self._restate(**change), names="value")
        for name, button in self._jumps.items():
            button.on_click(lambda _, name=name: self._move(self._presets.at(self.level)[name], self._upper))

    @property
    def threshold(self) -> float:
        """Where the slider is; set it to move it (to the fewest decimals that change no call).

        Beyond the second handle it takes that one along.
        """
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._move(self._presets.readable(value), self._upper)

    @property
    def defer(self) -> float | None:
        """Where the second handle is, up to which cases are inconclusive; None: there is none. Can be set."""
        return self._upper

    @defer.setter
    def defer(self, value: float) -> None:
        if self._upper is None:
            raise ValueError(
                "This slider has one handle. Make one with two: ThresholdExplorer(…, defer=0.6)."
            )
        self._move(self._threshold, self._above(value))

    def _above(self, value: float) -> float:
        """A place for the second handle in the fewest decimals.

        Raises:
            ValueError: it lies below the threshold, or is none.
        """
        if (upper := self._presets.readable(value)) < self._threshold:
            raise ValueError(
                f"Cases are inconclusive from the threshold, {digits(self._threshold)}, up to defer; found "
                f"{digits(upper)}, which lies below it. Give one that does not, or lower the threshold."
            )
        return upper

    @property
    def level(self) -> str:
        """One of `LEVELS`; set it to change the level."""
        return self._levels.value

    @level.setter
    def level(self, value: str) -> None:
        if value not in self._presets.levels:
            offered = ", ".join(self._presets.levels)
            raise ValueError(f"Level {value!r} is not offered: these data allow {offered}.")
        self._levels.value = value

    @property
    def prevalence(self) -> float | None:
        """Share of fractured patients that the rates are restated for; None: as observed."""
        return self._percent.value / 100 if self._other.value and self._both_kinds() else None

    @prevalence.setter
    def prevalence(self, value: float | None) -> None:
        if value is not None:
            self._percent.value = 100 * float(check_prevalence(value))
        self._other.value = value is not None

    @property
    def decision(self) -> Decision:
        """What the slider shows: the decision it was given, or where it was moved, a stated one."""
        return self._presets.decision(self.level, self.threshold)

    def summary(self) -> dict[str, Any]:
        """What the picture shows, NaN where undefined.

        Level, threshold, prevalence (None: as observed), counts, and each rate, `missed_per_1000`,
        `called_back_per_1000` and the recall of each vertebra (`recall_C1` …) with `_low` and `_high`.

        With a second handle also `defer`, `inconclusive_per_1000`, and `recall_lost_C1` … beside `recall_C1`
        …, which takes inconclusive fractures as found; the rates are those of `evaluate_triage`, and the
        predictive value of negative answers, `npv`.
        """
        point = self._point()
        shown: dict[str, Any] = {"level": self.level, "threshold": self.threshold}
        recalls = {f"recall_{name}": found for name, found in point.low.recalls.items()}
        patients = {"missed_per_1000": point.low.missed, "called_back_per_1000": point.high.called_back}
        if isinstance(point, TriagePoint):
            shown |= {"defer": self.defer}
            patients = {"inconclusive_per_1000": point.workload} | patients
            recalls |= {f"recall_lost_{name}": found for name, found in point.high.recalls.items()}
        shown |= {"prevalence": self.prevalence, **point.counts}
        for name, (value, low, high) in (point.rates | patients | recalls).items():
            shown |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return shown

    def _handles(self) -> list[float]:
        return [self._threshold] if self._upper is None else [self._threshold, self._upper]

    def _steps(self) -> Any:
        """The handles' places, as the slider takes them: it knows its steps only."""
        steps = tuple(map(_nearest_step, self._handles()))
        return steps if len(steps) > 1 else steps[0]

    def _slide(self, value: float | tuple[float, float]) -> None:
        """Follow the slider, which reports its steps also when it is first shown: those move nothing."""
        steps = [_nearest_step(each) for each in np.atleast_1d(value)]
        places = zip(steps, self._handles(), strict=True)
        self._move(*(step if step != _nearest_step(place) else place for step, place in places))

    def _move(self, threshold: float, upper: float | None = None) -> None:
        """Place the handles, the upper at least as high as the lower."""
        places = threshold, None if upper is None else max(threshold, upper)
        moved = places != (self._threshold, self._upper)
        self._threshold, self._upper = places
        steps = np.atleast_1d(self._slider.value).tolist()
        if [_nearest_step(each) for each in steps] != np.atleast_1d(self._steps()).tolist():
            self._slider.value = self._steps()  # else it would tug at the hand
        for box, place in zip(self._boxes, self._handles(), strict=True):
            box.value = place
        if moved:
            self._redraw()

    def _at_level(self) -> OperatingPoints:
        if self.level not in self._operating:
            cases = self._presets.at_level(self.level)
            self._operating[self.level] = OperatingPoints(cases, self._presets.cases, self._weights)
        return self._operating[self.level]

    def _both_kinds(self) -> bool:
        return 0 < self._at_level().prevalence < 1

    def _point(self) -> OperatingPoint | TriagePoint:
        if self._upper is None:
            return self._at_level().at(self.threshold, self.prevalence)
        return self._at_level().triage(self.threshold, self._upper, self.prevalence)

    def _restate(self, old: float, new: float, **_: object) -> None:
        """Follow the box of the prevalence, or put back what it held and say why."""
        if 0 < new < 100:
            return self._redraw()
        self._percent.value = old
        refused = f"A prevalence lies between 0 and 100 %; found {new:.4g} %. It stays at {old:.4g} %."
        self._numbers.value = _paragraph(f"{refused} {self._words(self._point())}", role="status")
        return None

    def _place(self) -> str:
        if self.prevalence is None:
            return f"as observed: {self._at_level().prevalence:.1%} of patients fractured"
        return f"restated: {100 * self.prevalence:.4g}% of patients fractured"

    def _redraw(self) -> None:
        level, marks = self.level, self._presets.at(self.level)
        if level not in self._panels:
            self._panels[level] = Panels(self._at_level(), marks, triage=self._upper is not None)
        self._other.disabled = not self._both_kinds()
        for name, button in self._jumps.items():
            button.layout.display = None if name in marks else "none"
            button.description = f"{name} {rounded(marks[name])}" if name in marks else ""
        point, restated = self._point(), self.prevalence is not None
        for name, png in self._panels[level].pngs(point, self._place(), restated=restated).items():
            self._images[name].value = png
        for name, words in self._alternatives(point).items():
            self._images[name].tooltip = words
        self._numbers.value = _paragraph(self._words(point), role="status")
        self._freezer.withdraw()

    def _words(self, point: OperatingPoint | TriagePoint) -> str:
        """The picture in words."""
        made = self._at_level().cases.aggregation
        by = f", by {made.phrase}," if made else ""
        bars, deferred, where = BARS, "", f"at threshold {digits(point.low.threshold)}"
        if isinstance(point, TriagePoint):
            bars, deferred = TRIAGE_BARS, f"inconclusive {written(point.workload, 1)}, "
            ends = digits(point.low.threshold), digits(point.high.threshold)
            where = f"negative below {ends[0]}, positive from {ends[1]}, inconclusive between"
        counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in point.counts.items())
        rates = ", ".join(f"{label} {written(point.rates[name])}" for name, (label, _) in bars.items())
        words = (
            f"{level_name(self._at_level().cases)}{by} {where}: {counts}. "
            f"{self._place().capitalize()}: {rates}; of 1,000 patients {deferred}missed "
            f"{written(point.low.missed, 1)}, called back without fracture "
            f"{written(point.high.called_back, 1)}."
        )
        standing = self._presets.standing(self.level, self.threshold)
        if isinstance(point, TriagePoint) and self._presets.guarantee(self.level, self.threshold):
            standing += " Recall is guaranteed with what is inconclusive counted as found."
        return f"{words} {standing}".rstrip()

    def _alternatives(self, point: OperatingPoint | TriagePoint) -> dict[str, str]:
        """Alternative texts of the images; what they leave out stands below in words."""
        counted, several = "Confusion matrix", isinstance(point, TriagePoint)
        for each, fate in ((point.low, "found"), (point.high, "lost"))[: 1 + several]:
            recalls = ", ".join(f"{name} {written(found)}" for name, found in each.recalls.items())
            counted += f"; recall{f', deferred {fate}' if several else ''}: {recalls}" if recalls else ""
        level = level_name(self._at_level().cases)
        return {
            "curve": f"Precision–recall curve, {level}, with the point that the threshold gives",
            "counts": counted,
            "rates": "Rates, and how many of 1,000 patients, with 95 % intervals",
        }

    def _question(self) -> str:
        """What the freezing button asks."""
        level, run = self.decision.rule.level, self._run()
        words = [f"Freeze threshold {digits(self.threshold)} at {level} level?"]
        if self._presets.guarantee(self.level, self.threshold):
            words.append("The guarantee holds for it.")
        if self._upper is not None:
            words.append("What is inconclusive above it is not frozen with it.")
        if run is None:
            return " ".join([*words, "The test split is then opened with it; choose no other after that."])
        if run != Path(str(self._freeze)):
            words.append(
                f'The built-in run stays as it is: this goes to a copy, the run "{run.name}". Set RUN = '
                f'"{run.name}" to use that one.'
            )
        there = _frozen_upon(str(self._freeze))  # the copy is made when it is needed
        if there != run and (run / PREDICTIONS).is_file():
            words.append(
                "The copy there is of earlier predictions: it is replaced, and what was done there is lost."
            )
        if (there / DECISION).is_file():
            words.append(f"It replaces what {run.name}/{DECISION} holds for that level.")
        opened = len(read_openings(there))
        once = {0: "not been opened yet", 1: "been opened once before"}
        times = once.get(opened, f"been opened {opened} times before")
        words.append(f"With this run's predictions the test split has {times}.")
        return " ".join([*words, "It is then opened with this one; choose no other after that."])

    def _run(self) -> Path | None:
        """Run folder that is frozen in; None: something else is called."""
        return _practice_folder(self._freeze) if isinstance(self._freeze, str | Path) else None

    def _act(self) -> str:
        """What it does then."""
        decision, promise = self.decision, self._presets.guarantee(self.level, self.threshold)
        guarantees = [promise] if promise else []
        if not isinstance(self._freeze, str | Path):
            assert self._freeze is not None, "without it there is no button"
            self._freeze(decision, guarantees=guarantees)
            return f"Frozen: threshold {digits(self.threshold)} at {decision.rule.level} level."
        folder = practise(self._freeze)
        predictions = read_predictions(folder / PREDICTIONS)
        path = folder / DECISION
        before, opened = path.read_bytes() if path.is_file() else None, len(read_openings(folder))
        freeze(folder, decision, predictions, guarantees=guarantees, replace=True)
        after = path.read_bytes()
        self._undo = partial(_put_back, folder, before, after=after, openings=opened)
        where = "" if folder == Path(self._freeze) else f" in the copy {folder.name!r}"
        return f"Frozen{where}: threshold {digits(self.threshold)} at {decision.rule.level} level."

    def _put_back(self) -> str:
        """What undoes that."""
        self._undo()
        return f"Undone: {DECISION} is as it was before."

    def _ipython_display_(self) -> None:
        """Show it under a line that says what to do where no kernel holds it; hidden while one does."""
        display(HTML(_RERUN))
        display(self._repr_mimebundle_(), raw=True)

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, Any]:
        """The live widget for front ends with a kernel, its picture as PNG for all others."""
        point, restated = self._point(), self.prevalence is not None
        png = self._panels[self.level].png(point, self._place(), restated=restated)
        return {
            **self.widget._repr_mimebundle_(),
            "image/png": b64encode(png).decode(),
            "text/plain": self._words(point),
        }


def _nearest_step(threshold: float) -> float:
    """The slider's step for a threshold; its own steps add up to 0.41600000000000004."""
    return round(round(threshold / STEP) * STEP, DECIMALS)


def _paragraph(words: str, *, role: str = "note") -> str:
    """Words as HTML in the theme's colour; with the role `status` screen readers say what changes."""
    return f'<div role="{role}" style="color: {_COLOUR}; line-height: 1.5">{escape(words)}</div>'


class _ConfirmedButton:
    """A button, then a question with a second button, then what came of it.

    Args:
        label: of the first button.
        confirm: of the second.
        question: what is asked; nothing is offered where it fails.
        act: what is done; returns what to say then. What a `ValueError` or `OSError` says is shown instead.
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
        self._ask, self._confirm, self._cancel, self._back = (
            ipywidgets.Button(description=each, layout=_FITTING) for each in (label, confirm, "No", "Undo")
        )
        self._confirm.style.font_weight = "bold"  # in the theme's own colours, which are readable in each
        self._words = ipywidgets.HTML(layout={"flex": "1 1 300px"})
        self.widget = ipywidgets.HBox(layout=_WRAP)
        self._ask.on_click(lambda _: self.ask())
        self._confirm.on_click(lambda _: self.confirm())
        self._cancel.on_click(lambda _: self.withdraw())
        self._back.on_click(lambda _: self.undo())
        self._show("")

    @property
    def words(self) -> str:
        """The question, or its result; empty where nothing was asked."""
        return self._shown

    def ask(self) -> None:
        """Press the first button."""
        try:
            self._show(self._question(), asking=True)
        except (ValueError, OSError) as error:
            self._show(str(error))

    def confirm(self) -> None:
        """Press the second button; does nothing unless something was asked."""
        if self._confirm in self.widget.children:
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
        self._words.value = _paragraph(words, role="status") if words else ""
        buttons = [self._words, self._confirm, self._cancel] if asking else [self._ask, self._words]
        self.widget.children = buttons + [self._back] * (self._done and not asking)


def _practice_folder(run_folder: str | Path) -> Path:
    """Where a threshold that was set by hand is frozen: in the run, but of the built-in run in a copy."""
    folder = Path(run_folder).resolve()
    return folder.with_name(PRACTICE) if folder.name == BUILTIN else Path(run_folder)


def _frozen_upon(run_folder: str | Path) -> Path:
    """Folder whose decision and openings freezing would start from; writes nothing.

    It is the `_practice_folder`, or the run where a copy is yet to be made, or replaced as the run's
    predictions have changed.

    Raises:
        FileNotFoundError: the built-in run has no predictions.
        ValueError: what is in the copy's place is no folder, or none of ours: it may not be overwritten.
    """
    folder, copy = Path(run_folder), _practice_folder(run_folder)
    if copy == folder:
        return folder
    predictions, mine, marker = folder / PREDICTIONS, copy / PREDICTIONS, copy / MARKER
    if not predictions.is_file():
        raise FileNotFoundError(f"{predictions} is missing. Predict with the run (notebook 03), then freeze.")
    if copy.resolve() != copy or (copy.exists() and not copy.is_dir()):
        raise ValueError(
            f"Decisions that try out the built-in run are frozen in a copy of it, and {copy} is no folder of "
            "its own, but a link or a file. Rename it, and freeze again."
        )
    held = {path.name for path in copy.glob("[!.]*")}
    own = sorted(held - {*_COPIED, MARKER})
    known = inside(marker).read_text(encoding="utf-8").split() if marker.is_file() else []
    stands = inside(mine).is_file()
    ours = bool(known) and (not stands or sha256_of(mine) in known)
    if stands and mine.read_bytes() == predictions.read_bytes() and (ours or not own):
        return copy
    if not held or (ours and not own):
        return folder
    found = listing(own or sorted(held))
    raise ValueError(
        f"{PRACTICE!r} is where decisions that try out the built-in run are frozen, and {copy} is no copy "
        f"that may be overwritten: it holds {found}. Rename that folder, and freeze again."
    )


def practise(run_folder: str | Path) -> Path:
    """The `_practice_folder`, with what a decision rests on: predictions, record, what is frozen, openings.

    A copy stays as it is, with what was frozen there, while its predictions are those of the run; else it is
    replaced.

    Raises:
        FileNotFoundError, ValueError: see `_frozen_upon`.
        OSError: the copy cannot be written.
    """
    folder, copy = Path(run_folder), _practice_folder(run_folder)
    if _frozen_upon(folder) == copy:
        return copy
    marker = copy / MARKER  # written first: stopped at any moment, the copy is known as ours
    known = marker.read_text(encoding="utf-8") if marker.is_file() else ""
    with atomic_path(marker) as temporary:
        temporary.write_text(f"{known}{sha256_of(folder / PREDICTIONS)}\n", encoding="utf-8")
    for name in _COPIED:
        source, place = folder / name, inside(copy / name)
        if source.is_file():
            with atomic_path(place) as temporary:
                temporary.write_bytes(source.read_bytes())
        else:
            place.unlink(missing_ok=True)
    return copy


def _put_back(run_folder: str | Path, before: bytes | None, *, after: bytes, openings: int) -> None:
    """Undo a freezing: `decision.json` as it was, unless something was done with the run since.

    Args:
        run_folder: `checkpoints/<run>`.
        before: what `decision.json` held; None: there was none.
        after: what it holds since the freezing.
        openings: how often the test split had been opened.

    Raises:
        ValueError: it was opened since, or `decision.json` is gone or was changed since.
        OSError: the file cannot be written.
    """
    path = inside(Path(run_folder) / DECISION)
    named = f"{path.parent.name}/{DECISION}"
    if not path.is_file():
        raise ValueError(f"{named} is gone, so there is nothing to undo.")
    if (now := len(read_openings(path.parent))) > openings:
        raise ValueError(
            f"The test split was opened since, {now} time(s) by now, and what it was opened with stays on "
            "record. Freeze another decision; the record says that it came after."
        )
    if path.read_bytes() != after:
        raise ValueError(f"{named} was changed since. Freeze what you want it to say.")
    if before is None:
        path.unlink()
        return
    with atomic_path(path) as temporary:
        temporary.write_bytes(before)
