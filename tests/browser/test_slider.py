"""The slider of notebook 04 in a real JupyterLab, driven by keyboard in a browser: `make test-browser`."""

import io
import json
import os
import re
from base64 import b64decode
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import lab
from cspine_helpers.decisions.test_split import read_decision
from cspine_helpers.decisions.triage import evaluate_triage
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.figures.curves import LEVEL_NAMES
from cspine_helpers.metrics import confusion, rates
from cspine_helpers.predictions import read_predictions
from cspine_helpers.slider.picture import BARS, WIDTHS
from cspine_helpers.slider.widget import BUILTIN, PRACTICE

pytestmark = pytest.mark.browser
PICTURE, BOX = ".cspine-picture", ".cspine-threshold input"
CONTRAST = """selector => {  // [text, its contrast to what lies behind it] of all that is visible
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => parts(colour).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    return [...document.querySelectorAll(selector)].filter(found => found.offsetParent).map(found => {
        let behind = found;
        while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
        const both = [getComputedStyle(found).color, getComputedStyle(behind).backgroundColor].map(light);
        return [found.innerText || found.className, (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
    });
}"""  # Source: WCAG 2.2, relative luminance and contrast ratio
WATCH = """selector => {  // where the picture is in each frame, until the watch is stopped
    const picture = document.querySelector(selector), seen = window.seen = new Set();
    window.frames_seen = 0;
    window.watching = true;
    (function look() {
        const {x, y, width, height} = picture.getBoundingClientRect();
        seen.add(JSON.stringify([x, y, width, height, picture.isConnected]));
        window.frames_seen += 1;
        if (window.watching) requestAnimationFrame(look);
    })();
}"""
SEEN = "() => { window.watching = false; return [window.frames_seen, [...window.seen]]; }"
PLACES = """() => {  // edges of the notebook's panel, and of what is looked at while a hand drags
    const places = selector => [...document.querySelectorAll(selector)].map(found => {
        const {left, top, right, bottom} = found.getBoundingClientRect();
        return [left, top, right, bottom];
    });
    document.querySelector(".cspine-explorer").scrollIntoView({block: "start"});
    return [places(".jp-WindowedPanel-outer")[0], places(
        ".cspine-explorer .noUi-handle, .cspine-explorer input, .cspine-picture img, .cspine-numbers"
    ).filter(([left, _, right]) => right > left), places(".cspine-picture img")];
}"""
ZOOM = {"viewport": {"width": 1024, "height": 720}, "device_scale_factor": 1.25}  # 1280 × 900 pixels


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    """Where the pictures to look at go."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project."""
    folder = tmp_path_factory.mktemp("project")
    lab.copy_project(folder)
    return folder


@pytest.fixture(scope="module")
def explorer(project):
    """Its notebook 04, run."""
    with ExitStack() as stack:
        try:
            running = stack.enter_context(lab.browser())
        except FileNotFoundError as error:
            pytest.exit(str(error), returncode=1)
        yield lab.open_explorer(running, stack.enter_context(lab.jupyterlab(project)))


@pytest.fixture(autouse=True)
def on_the_slider(explorer):
    """Each test begins with the keyboard on the slider, and leaves a page without errors."""
    explorer.show()
    yield
    assert explorer.errors == []


@pytest.fixture(scope="module")
def validation(project):
    table = read_predictions(project / "checkpoints" / "builtin" / "predictions.csv")
    return table[table["split"] == "validation"]


def expected_words(validation, level, threshold):
    """The counts and rates that `metrics` gives, as they stand below the picture, without intervals."""
    rows = Cases.of(validation).of_unit(level).table()
    found = rates(confusion(rows["label"], rows["probability"], threshold)).iloc[0]
    counts = [f"{name} {int(found[name]):,}" for name in ("tp", "fp", "fn", "tn")]
    values = {name: "–" if np.isnan(found[name]) else f"{found[name]:.3f}" for name in BARS}
    return counts + [f"{label} {values[name]}" for name, (label, _) in BARS.items()]


def assert_is_metrics(words, validation, level="all"):
    name, threshold = re.match(r"(.+) at threshold ([\d.]+):", words).groups()
    by = ", by the max of the vertebrae," if level == "patient" else ""  # this model has no score of its own
    assert name == LEVEL_NAMES[level] + by
    for part in expected_words(validation, level, float(threshold)):
        assert re.search(rf"{re.escape(part)}(?!\d)", words), (part, words)
    return float(threshold)


def picture(explorer):
    """The picture as the browser shows it, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(explorer.page.locator(PICTURE).screenshot())).convert("RGB"))


def test_it_starts_at_the_threshold_the_notebook_chose(explorer, validation):
    chosen = float(explorer.ask("print(slider._presets.start)"))
    start = assert_is_metrics(explorer.words(), validation)
    assert start == chosen
    assert (
        float(explorer.page.locator(BOX).input_value())
        == start
        == float(explorer.ask("print(slider.threshold)"))
    )


def test_keys_move_the_slider_and_the_numbers_are_those_of_metrics(explorer, validation):
    explorer.page.locator(lab.HANDLE).click()  # as a hand does; the notebook is in command mode then
    cell = explorer.page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex")
    threshold = round(assert_is_metrics(explorer.words(), validation), 3)
    steps = {"ArrowRight": 1, "ArrowUp": 1, "PageUp": 5, "ArrowLeft": -1, "ArrowDown": -1, "PageDown": -5}
    for key, step in [*steps.items()] * 3:
        before = picture(explorer)
        moved = assert_is_metrics(explorer.press(key), validation)
        threshold = round(threshold + step / 1000, 3)
        assert moved == threshold
        assert (picture(explorer) != before).any()
    assert float(explorer.page.locator(BOX).input_value()) == threshold
    assert explorer.page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex") == cell
    summary = json.loads(explorer.ask("import json; print(json.dumps(slider.summary()))"))
    found = rates(confusion(validation["label"], validation["probability"], threshold)).iloc[0]
    assert {name: summary[name] for name in found.index} == pytest.approx(found.to_dict())


def test_the_number_box_takes_a_threshold_exactly(explorer, validation):
    explorer.page.locator(BOX).fill("0.123456")
    explorer.page.locator(BOX).press("Enter")
    explorer.page.wait_for_function(
        "document.querySelector('.cspine-numbers').innerText.includes('0.123456')", timeout=10_000
    )
    assert assert_is_metrics(explorer.words(), validation) == 0.123456
    assert float(explorer.ask("print(slider.threshold)")) == 0.123456
    explorer.page.locator(lab.HANDLE).focus()
    assert assert_is_metrics(explorer.press("ArrowRight"), validation) == 0.124


def test_level_and_prevalence_are_chosen_by_keyboard(explorer, validation):
    levels, other = (
        explorer.page.locator(".cspine-level select"),
        explorer.page.locator(".cspine-other input"),
    )
    for level in ("C2", "patient"):
        levels.select_option(label=LEVEL_NAMES[level])
        explorer.page.wait_for_function(
            "name => document.querySelector('.cspine-numbers').innerText.startsWith(name)",
            arg=LEVEL_NAMES[level],
        )
        assert_is_metrics(explorer.words(), validation, level)
    other.focus()
    assert "Restated: 7% of patients fractured" in explorer.press("Space")
    assert "As observed" in explorer.press("Space")
    levels.select_option(label=LEVEL_NAMES["all"])
    explorer.page.wait_for_function("document.querySelector('.cspine-numbers').innerText.startsWith('All')")


@contextmanager
def watched(explorer):
    """Meanwhile the picture keeps its place and size, and no frame that the compositor shows lacks it.

    `naturalWidth` would not tell: it is 0 while the next picture loads, and the last one is still shown.
    """
    shown, page = [], explorer.page
    session = page.context.new_cdp_session(page)

    def keep(frame):
        shown.append(frame["data"])
        session.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

    session.on("Page.screencastFrame", keep)
    session.send("Page.startScreencast", {"format": "jpeg", "quality": 80, "maxWidth": 640, "maxHeight": 450})
    page.evaluate(WATCH, PICTURE)
    yield
    page.wait_for_timeout(500)  # the last frames arrive
    frames, places = page.evaluate(SEEN)
    session.send("Page.stopScreencast")
    session.detach()

    assert frames > 60
    assert len(places) == 1, f"the picture went, moved or changed its size: {places}"
    x, y, width, height, connected = json.loads(places[0])
    assert connected
    pictures = [Image.open(io.BytesIO(b64decode(data))).convert("L") for data in shown]
    scale = pictures[0].width / page.viewport_size["width"]
    cut = [round(scale * edge) for edge in (x, y, x + width, min(y + height, 860))]
    pictures = [np.asarray(picture.crop(cut)) for picture in pictures]
    different = len({picture.tobytes() for picture in pictures})
    inked = np.array([(picture < 200).mean() for picture in pictures])
    print(f"{frames} frames, {len(pictures)} kept, {different} different, ink {inked.min()} to {inked.max()}")
    assert different > 3, "the compositor showed too few different pictures"
    assert inked.min() > 0.7 * np.median(inked), "a frame was blank, or half of it"


def test_the_picture_never_flickers_while_a_key_is_held(explorer):
    with watched(explorer):
        for key in ["ArrowRight"] * 40 + ["ArrowLeft"] * 40:
            explorer.page.keyboard.press(key)
            explorer.page.wait_for_timeout(33)  # as a held key repeats


def sizes(explorer):
    """What could grow: nodes and memory of the page, memory of the kernel, widgets, outputs, the notebook."""
    session = explorer.page.context.new_cdp_session(explorer.page)
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    session.detach()
    kernel = explorer.ask(
        "import gc, ipywidgets, psutil; gc.collect()\n"
        "print(psutil.Process().memory_info().rss, len(ipywidgets.widgets.widget._instances))"
    )
    memory, widgets = map(int, kernel.split())
    outputs, characters = explorer.page.evaluate("""() => {
        const cells = jupyterapp.shell.currentWidget.content.model.toJSON().cells;
        const outputs = cells.flatMap(cell => cell.outputs || []);
        return [outputs.length, JSON.stringify(cells).length];
    }""")
    return {
        "nodes": metrics["Nodes"], "listeners": metrics["JSEventListeners"],
        "page MiB": metrics["JSHeapUsedSize"] / 2**20, "kernel MiB": memory / 2**20,
        "widgets": widgets, "outputs": outputs, "characters": characters,
    }  # fmt: skip


def test_nothing_grows_or_flickers_over_500_moves(explorer):
    for key in ["ArrowRight"] * 20 + ["ArrowLeft"] * 20:
        explorer.press(key)
    before = sizes(explorer)
    with watched(explorer):
        for key in ["ArrowRight"] * 250 + ["ArrowLeft"] * 250:
            explorer.press(key)
    grown = {name: size - before[name] for name, size in sizes(explorer).items()}
    print(before, grown, sep="\n")
    assert explorer.page.locator(PICTURE).count() == 1
    assert [grown[name] for name in ("widgets", "outputs", "characters")] == [0, 0, 0]
    assert grown["nodes"] < 100
    assert grown["listeners"] < 100
    assert grown["page MiB"] < 10
    assert grown["kernel MiB"] < 10  # 500 pictures are 1,000 MiB as pixels, 30 MiB as files


def readable(explorer):
    """Contrast of all words of the slider; 4.5 is what WCAG asks for."""
    words = "label, button, .widget-html-content div, .widget-label, input, select"
    found = explorer.page.evaluate(
        CONTRAST, ", ".join(f".cspine-explorer {part}" for part in words.split(", "))
    )
    assert len(found) > 8
    return {name: round(contrast, 1) for name, contrast in found if contrast < 4.5}


def test_readable_in_the_light_and_in_the_dark_theme(explorer, screenshots):
    page = explorer.page
    page.screenshot(path=screenshots / "light.png")
    assert readable(explorer) == {}
    light = picture(explorer)
    explorer.run("apputils:change-theme", theme="JupyterLab Dark")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "dark.png")
    assert readable(explorer) == {}
    dark = picture(explorer)
    assert np.median(light, axis=(0, 1)).tolist() == [255] * 3
    theme = page.locator(".jp-Notebook").first.evaluate("found => getComputedStyle(found).backgroundColor")
    paper = [int(part) for part in re.findall(r"\d+", theme)[:3]]
    assert np.abs(np.median(dark, axis=(0, 1)) - paper).max() <= 3
    assert (dark.mean(axis=2) < 60).mean() > 0.6
    assert dark.mean(axis=2).max() > 190  # letters
    explorer.run("apputils:change-theme", theme="JupyterLab Light")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'true'")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def press_button(explorer, name):
    explorer.page.get_by_role("button", name=name).press("Enter")


def test_the_freezing_question_is_readable(explorer, screenshots):
    press_button(explorer, "Freeze this decision")
    explorer.page.get_by_text("Freeze threshold").wait_for()
    explorer.page.screenshot(path=screenshots / "asking.png")
    assert readable(explorer) == {}


def test_a_decision_is_frozen_only_when_asked_twice_and_in_a_copy_of_the_built_in_run(explorer, project):
    question, run = explorer.page.get_by_text("Freeze threshold"), project / "checkpoints" / BUILTIN
    practice = run.with_name(PRACTICE)
    before = contents(run)
    explorer.press("ArrowRight")  # which takes back what was asked
    press_button(explorer, "Freeze this decision")
    question.wait_for()
    press_button(explorer, "No")
    question.wait_for(state="detached")
    assert not practice.exists()
    press_button(explorer, "Freeze this decision")
    press_button(explorer, "Really freeze")
    explorer.page.get_by_text("Frozen in the copy").wait_for()
    threshold = float(explorer.ask("print(slider.threshold)"))
    assert read_decision(practice).decisions["vertebra"].threshold == threshold
    press_button(explorer, "Undo")
    explorer.page.get_by_text("Undone").wait_for()
    assert read_decision(practice).decisions == read_decision(run).decisions
    assert contents(run) == before


def test_readable_at_125_percent(explorer, screenshots):
    """Also, a window opened anew shows the slider of the running kernel."""
    explorer.run("docmanager:save")
    browser = explorer.page.context.browser
    page = lab.open_explorer(browser, explorer.address, run=False, **ZOOM).page
    page.screenshot(path=screenshots / "zoom_125.png")
    cell = page.locator(".cspine-explorer").bounding_box()
    for image in page.locator(f"{PICTURE} img").all():
        box = image.bounding_box()
        assert box["x"] + box["width"] <= cell["x"] + cell["width"] + 1  # nothing is cut off
        natural = image.evaluate("image => image.naturalWidth")
        smallest = 8.5 * 100 / 72 * box["width"] / natural * 1.25  # pixels of the smallest letters' size
        assert smallest > 9
    for control in page.locator(".cspine-explorer :is(input, select, button, .noUi-base)").all():
        if control.is_visible():
            place = control.bounding_box()
            assert place["x"] + place["width"] <= cell["x"] + cell["width"] + 1
    page.locator(".cspine-numbers").scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "zoom_125_below.png")
    page.close()


@contextmanager
def window(explorer, width, height=900):
    """As wide and high, without the list of files where that would leave no room."""
    narrow, before = width < 1000, explorer.page.viewport_size
    if narrow:
        explorer.run("application:toggle-left-area")
    explorer.page.set_viewport_size({"width": width, "height": height})
    explorer.show()
    yield
    if narrow:
        explorer.run("application:toggle-left-area")
    explorer.page.set_viewport_size(before)


def assert_all_is_in_view(explorer, screenshot):
    """Slider, boxes, picture and numbers together, the picture in one row."""
    panel, shown, images = explorer.page.evaluate(PLACES)
    explorer.page.screenshot(path=screenshot)
    assert len(images) == 3
    assert len({round(top) for _, top, _, _ in images}) == 1
    for left, top, right, bottom in shown:
        assert panel[0] <= left < right <= panel[2]
        assert panel[1] <= top < bottom <= panel[3], f"{bottom - panel[3]:.0f} pixels lie below the fold"


@pytest.mark.parametrize("level", ["all", "patient"])
def test_at_1400_by_900_nothing_lies_below_the_fold(explorer, screenshots, level):
    with window(explorer, 1400):
        explorer.ask(f"slider.level = {level!r}")
        explorer.page.wait_for_timeout(500)
        assert_all_is_in_view(explorer, screenshots / f"wide_{level}.png")
    explorer.ask("slider.level = 'all'")


@pytest.mark.parametrize(("width", "rows"), [(700, 2), (480, 3)])
def test_in_a_narrow_window_the_images_stand_below_one_another(explorer, screenshots, width, rows):
    with window(explorer, width, 2000):
        panel, shown, images = explorer.page.evaluate(PLACES)
        explorer.page.screenshot(path=screenshots / f"narrow_{width}.png")
        assert len({round(top) for _, top, _, _ in images}) == rows
        for (left, _, right, _), natural in zip(images, WIDTHS.values(), strict=True):
            assert right - left > 0.84 * natural
        assert all(panel[0] <= left < right <= panel[2] for left, _, right, _ in shown)


def test_images_have_alternative_texts_and_a_live_slider_no_line_to_re_run_it(explorer):
    read_aloud = [image.get_attribute("title") for image in explorer.page.locator(f"{PICTURE} img").all()]
    assert read_aloud == json.loads(
        explorer.ask("import json; print(json.dumps([one.tooltip for one in slider._images.values()]))")
    )
    assert "C7 " in read_aloud[1]
    assert explorer.page.locator(".cspine-explorer [title=null]:visible").count() == 0
    assert not explorer.page.locator(".cspine-rerun").is_visible()


TWO_HANDLES = """from cspine_helpers.slider import ThresholdExplorer

validation = predictions[predictions["split"] == "validation"]
explorer = ThresholdExplorer(validation, threshold=0.2, defer=0.6)
explorer"""


def test_both_handles_move_by_keyboard_and_defer_what_lies_between(explorer, validation, screenshots):
    explorer.replace(TWO_HANDLES)
    page, handles = explorer.page, explorer.page.locator(lab.HANDLE)
    assert handles.count() == 2
    places, words = [0.2, 0.6], explorer.words()
    for handle, keys in enumerate(({"ArrowRight": 1, "PageDown": -5}, {"ArrowLeft": -1, "PageUp": 5})):
        handles.nth(handle).focus()
        for key, step in [*keys.items()] * 3:
            before = picture(explorer)
            words = explorer.press(key)
            places[handle] = round(places[handle] + step / 1000, 3)
            assert f"negative below {places[0]:.4f}, positive from {places[1]:.4f}" in words
            assert (picture(explorer) != before).any()
    cases = Cases.of(validation)
    below, up_to = (cases.probability < place for place in places)
    found = evaluate_triage(cases, np.select([below, up_to], ["negative", "inconclusive"], "positive"))
    shown = {"inconclusive_rate": "inconclusive", "coverage": "coverage"}
    shown |= {f"recall_deferred_{fate}": f"recall, deferred {fate}" for fate in ("found", "lost")}
    for name, value in found.set_index("metric")["value"][list(shown)].items():
        assert f"{shown[name]} {value:.3f}" in words

    box = page.locator(".cspine-defer input")
    box.fill("0.123456")  # below the other handle, so that it ends there
    box.press("Enter")
    page.wait_for_function(
        "end => document.querySelector('.cspine-numbers').innerText.includes(end)",
        arg=f"positive from {places[0]:.4f}",
    )
    assert float(box.input_value()) == float(page.locator(BOX).input_value()) == places[0]
    assert "coverage 1.000" in explorer.words()
    handles.nth(1).focus()
    explorer.press("End")
    assert "positive from 1.0000" in explorer.words()
    explorer.ask("slider.defer = 0.6")
    page.wait_for_function("document.querySelector('.cspine-numbers').innerText.includes('from 0.6000')")
    page.screenshot(path=screenshots / "two_handles.png")
    assert readable(explorer) == {}
    with window(explorer, 1400):
        assert_all_is_in_view(explorer, screenshots / "wide_two_handles.png")


def test_where_the_kernel_no_longer_holds_the_slider_a_line_says_to_re_run_the_cell(explorer, screenshots):
    """Comes last: the kernel starts again."""
    page, line = explorer.page, explorer.page.locator(".cspine-rerun")
    explorer.run("docmanager:save")
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    line.wait_for()  # above a slider that is dead
    page.screenshot(path=screenshots / "restarted.png")
    page.goto(explorer.address)
    line.wait_for(state="attached")
    line.scroll_into_view_if_needed()
    line.wait_for()
    page.screenshot(path=screenshots / "reloaded.png")
    assert page.locator(".cspine-explorer").count() == 0
    page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'")
    assert explorer.run("notebook:run-all-cells")
    explorer.show()
    assert not line.is_visible()
