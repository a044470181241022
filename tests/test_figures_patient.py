"""What the page draws: words, places, shapes; a page made by hand."""

import io
import re
from dataclasses import replace
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from drawn import picture
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from cspine_helpers.figures.patient import (
    CUT_OFF,
    ICONS,
    TRUE,
    AxialSlice,
    Look,
    Page,
    Row,
    SideView,
    patient_picture,
    percent,
)
from cspine_helpers.figures.style import FRACTURED, INK, write_figure
from cspine_helpers.labels import VERTEBRAE

HEIGHTS = dict(zip(VERTEBRAE, (20.0, 36.0, 60.0, 78.0, 96.0, 114.0, 132.0), strict=True))


def look(name, called, *, truth=False):
    rng = np.random.default_rng(1)
    mask = np.zeros((60, 60), bool)
    mask[20:40, 20:40] = True
    boxes = ((22.0, 22.0, 9.0, 7.0),) if truth else ()
    captions = (
        f"{name} · z −101 mm · slice 7/15 · 21 %",
        "z −102 mm · 8/15 · 19 %",
        "z −103 mm · 9/15 · 15 %",
    )
    slices = tuple(
        AxialSlice(rng.normal(100, 300, mask.shape), mask, 1.0, caption, boxes) for caption in captions
    )
    attention = np.full(15, 0.79 / 14)
    attention[6] = 0.21
    title = f"{'▲' if called else '○'} {name}: {'called' if called else 'not called'}, 40 %"
    shown, broken = (6, 7, 8), (5, 6) if truth else ()
    return Look(title, slices, attention, shown, np.full(15, 1 / 15), broken)


def made_page(called=("C4", "C5"), *, missing=(), truth=None, patient=True):
    """A page on which some vertebrae are called, at 0.4, the others not, at 0.01; truth: who is fractured."""
    rng = np.random.default_rng(0)
    rows, labels = [], np.zeros((160, 140), np.uint8)
    for number, (name, height) in enumerate(HEIGHTS.items(), start=1):
        labels[round(height) - 6 : round(height) + 6, 40 + number : 60 + number] = number
        value, is_called = (0.4, True) if name in called else (0.01, False)
        value, is_called = (None, None) if name in missing else (value, is_called)
        true = None if truth is None else name in truth
        rug = rng.beta(1, 20, 60), rng.beta(5, 1, 8)
        rows.append(Row(name, value, 0.02, is_called, height, *rug, true))
    shown = truth is not None
    names = {name: 38.0 for name in HEIGHTS if name not in missing}
    side = SideView(
        plane=rng.normal(100, 100, labels.shape).astype(np.float32),
        labels=np.where(np.isin(labels, [VERTEBRAE.index(name) + 1 for name in names]), labels, 0),
        spacing_mm=(1.0, 0.8),
        height_mm=HEIGHTS,
        name_mm=names,
        ticks_mm={name: HEIGHTS[name] + 2 for name in called},
        lesions_mm=((40.0, 70.0, 12.0, 9.0),) if shown else (),
        note="CT in a bone window, cut along the middle of the spinal canal",
    )
    verdict = "undecided" if not patient else "called" if called else "not called"
    true = None if truth is None else bool(truth)
    return Page(
        verdict=verdict,
        headline=f"Fracture suspected: {', '.join(called)}" if called else "Not called (no all-clear)",
        subline="Probability that this patient has a fracture: 6.3 % (calibrated), called from 15 %",
        rule="Threshold: highest recall with precision at 70 % or more in validation; the patient's "
        "probability is the max of the vertebrae.",
        about=(
            "study 1.2.826.0.1.3680043.2022.259 · validation split",
            "149 slices · 1.00 × 0.78 × 0.78 mm",
            "synthetic phantom · research software",
        ),
        truth=f"{TRUE}: fracture of {', '.join(truth)}"
        if truth
        else f"{TRUE}: no fracture"
        if shown
        else None,
        scale="calibrated",
        rows=tuple(rows),
        patient=Row(
            "patient",
            0.063,
            0.15 if patient else None,
            bool(called) if patient else None,
            np.nan,
            rng.beta(1, 5, 40),
            rng.beta(5, 1, 30),
            true,
        ),
        side=side,
        looks=tuple(look(name, name in called, truth=shown) for name in (*called, "C1", "C2")[:2]),
        footer={
            "What a call is worth": (
                "Of 100 patients called here, 78 (62–88) have a fracture; where 7 % have one, 23 (15–40).",
                "It misses 6 (2–21) of 100 patients with a fracture.",
            ),
            "Read with care": ("Attention ranks slices; it marks no place within one.",),
            "This scan": tuple(f"Warning number {n} of packing, of some length." for n in range(12)),
        },
    )


CROWDED = {"called": VERTEBRAE, "truth": VERTEBRAE}


@pytest.fixture(scope="module")
def figure():
    return patient_picture(made_page())


def words(figure):
    """All that is written, and where (pixels)."""
    figure.draw_without_rendering()
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def said(figure):
    return [text.get_text() for text in words(figure)]


def test_words_of_each_row_say_probability_and_call(figure):
    texts = said(figure)
    assert texts.count("40 % called") == 2
    assert texts.count("1.0 % not called") == 5
    assert texts.count("6.3 % called") == 1
    assert "▲ Fracture suspected: C4, C5" in texts
    assert [text for text in texts if text.startswith("called from")] == [
        "called from 2.0 %",
        "called from 15 %",
    ]


def test_rows_are_at_their_vertebras_height_in_the_side_view(figure):
    side, dots = figure.axes[:2]
    assert side.get_ylim() == dots.get_ylim()
    assert [axes.get_position().y0 for axes in (side, dots)] == [side.get_position().y0] * 2
    assert side.get_position().height == dots.get_position().height
    markers = [line for line in dots.lines if line.get_marker() in ("^", "o")]
    assert [line.get_ydata()[0] for line in markers[:7]] == list(HEIGHTS.values())
    named = [text for text in side.texts if text.get_text().removeprefix("▲ ") in VERTEBRAE]
    assert [text.get_position()[1] for text in named[:7]] == list(HEIGHTS.values())
    assert [line.get_marker() for line in markers] == list("ooo^^oo^")


def test_outlines_differ_in_more_than_colour(figure):
    contours = figure.axes[0].collections
    styles = [(found.get_linewidths()[0], found.get_linestyle()[0][1] is None) for found in contours]
    assert styles == [(0.9, False)] * 3 + [(2.0, True)] * 2 + [(0.9, False)] * 2


def test_a_missing_vertebra_is_hatched_and_said(figure):
    page = made_page(missing=("C3", "C7"))
    cut = [replace(row, absent=CUT_OFF) if row.name == "C7" else row for row in page.rows]
    drawn = patient_picture(replace(page, rows=tuple(cut)))
    dots = drawn.axes[1]
    hatched = [patch for patch in dots.patches if patch.get_hatch()]
    for patch, name in zip(hatched, ("C3", "C7"), strict=True):
        assert patch.get_y() < HEIGHTS[name] < patch.get_y() + patch.get_height()
    assert {"not packed", "C3: not packed", "not in the scan", "C7: not in the scan"} <= {*said(drawn)}
    assert not any(patch.get_hatch() for patch in figure.axes[1].patches)


def test_without_a_patient_threshold_nothing_is_called_and_no_line_drawn_for_the_patient():
    texts = said(patient_picture(made_page(patient=False)))
    assert "6.3 %" in texts
    assert [text for text in texts if text.startswith("called from")] == ["called from 2.0 %"]
    assert any(text.startswith(ICONS["undecided"][0]) for text in texts)


def pdf(page):
    """The words that the drawing's PDF holds."""
    buffer = io.BytesIO()
    figure = patient_picture(page)
    with matplotlib.rc_context({"pdf.compression": 0}):
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    strings = re.findall(rb"\[([^]]*)\]\s*TJ|(\([^)]*\))\s*Tj", buffer.getvalue())  # kerned, or in one piece
    return b"\n".join(b"".join(re.findall(rb"\(([^)]*)\)", each[0] or each[1])) for each in strings)


def bare(page):
    """The same page with all truth taken out by hand."""
    return replace(
        page,
        truth=None,
        rows=tuple(replace(row, true=None) for row in page.rows),
        patient=replace(page.patient, true=None),
        side=replace(page.side, lesions_mm=()),
        looks=tuple(
            replace(its, fractured=(), slices=tuple(replace(one, boxes=()) for one in its.slices))
            for its in page.looks
        ),
    )


@pytest.mark.slow
def test_truth_is_drawn_where_it_is_asked_for_and_nowhere_else():
    page = made_page(truth=("C4",))
    shown, hidden = (patient_picture(each) for each in (page, bare(page)))
    marked = shown.findobj(lambda artist: artist.get_gid() == "truth")
    # the line of the header; rows C4 and patient; two slices below each look; boxes: side view, 2 × 3 slices
    assert len(marked) == 1 + 2 + 4 + 7
    assert hidden.findobj(lambda artist: artist.get_gid() == "truth") == []
    assert not any("true" in text or "◆" in text for text in said(hidden))
    assert np.array_equal(picture(hidden), picture(patient_picture(made_page())))
    assert b"true" in pdf(page)
    assert b"true" not in pdf(bare(page))
    assert b"not called" in pdf(bare(page))


@pytest.mark.slow
@pytest.mark.parametrize("options", [CROWDED, {"called": (), "missing": ("C1", "C7")}, {"patient": False}])
def test_all_is_legible_nothing_overlaps_and_nothing_is_cut_off(options):
    drawn = patient_picture(made_page(**options))
    texts = words(drawn)
    assert min(text.get_fontsize() for text in texts) >= 7
    picture(drawn)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = drawn.bbox.size
    assert [t for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height] == []
    over = [
        (a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.padded(-1).overlaps(other.padded(-1))
    ]
    assert over == []


def luminance(colour):
    """Relative luminance. Source: Web Content Accessibility Guidelines 2.1."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)
    ]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_words_stay_readable_in_greyscale():
    for colour, least in [(INK, 7), *((colour, 3) for _, colour in ICONS.values())]:  # large letters: 3
        assert 1.05 / (luminance(colour) + 0.05) > least
    assert len({icon for icon, _ in ICONS.values()}) == len(ICONS)


def test_the_png_has_a_palette_and_is_the_same_again(figure, tmp_path):
    one, two = (write_figure(figure, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two
    assert one[25] == 3  # colour type of the header: indexed
    pixels = picture(figure)
    assert (pixels == 255).all(axis=-1).mean() > 0.4  # the paper stays white
    assert (np.abs(pixels - 255 * np.array(to_rgb(FRACTURED))).max(axis=-1) < 6).sum() > 500


@pytest.mark.parametrize(
    ("share", "apart", "text"),
    [
        (0.0004, None, "<0.1 %"),
        (0.0206, None, "2.1 %"),
        (0.0206, 0.0212, "2.06 %"),
        (0.0212, 0.0206, "2.12 %"),
        (0.5, 0.9, "50 %"),
        (0.9951, None, ">99 %"),
    ],
)
def test_a_share_is_written_apart_from_its_threshold(share, apart, text):
    assert percent(share, apart=apart) == text


def test_axial_slices_have_a_scale_bar_where_their_pixels_are_known():
    page = made_page()
    known = replace(
        page,
        looks=tuple(
            replace(its, slices=tuple(replace(one, pixel_mm=0.8) for one in its.slices)) for its in page.looks
        ),
    )
    bars = [line for axes in patient_picture(known).axes for line in axes.lines if line.get_gid() == "scale"]
    assert len(bars) == sum(len(its.slices) for its in page.looks) == 6
    assert [np.ptp(bar.get_xdata()) * 0.8 for bar in bars] == pytest.approx([10] * 6)
    without = (line for axes in patient_picture(page).axes for line in axes.lines)
    assert not any(line.get_gid() == "scale" for line in without)
