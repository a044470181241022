import subprocess
import sys

import pytest
from drawn import labels_to_draw

from cspine_helpers import labels
from cspine_helpers.figures import cohorts, style
from cspine_helpers.labels import VERTEBRAE


@pytest.fixture(scope="module")
def table():
    return labels_to_draw()


def test_a_saved_figure_has_the_same_bytes_every_time_and_no_version(table, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    prevalence = labels.prevalence(table)
    first = style.save_figure(cohorts.prevalence_bars(prevalence), "01_prevalence")
    assert first == tmp_path / "figures" / "01_prevalence.png"
    second = style.save_figure(cohorts.prevalence_bars(prevalence), "01_prevalence", cohort="rsna2022")
    assert second == tmp_path / "figures" / "rsna2022" / "01_prevalence.png"
    assert first.read_bytes() == second.read_bytes() == cohorts.prevalence_bars(prevalence)._repr_png_()
    assert b"Matplotlib" not in first.read_bytes()


def test_a_pdf_lies_beside_the_png_where_it_is_asked_for_with_the_same_bytes_every_time(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    written = []
    for _ in range(2):
        figure = style.Picture(figsize=(2, 1))
        figure.text(0.1, 0.5, "C4")
        written.append(style.save_figure(figure, "patient", pdf=True).with_suffix(".pdf").read_bytes())
    assert written[0] == written[1]
    assert b"Matplotlib" not in written[0]
    style.save_figure(figure, "alone")
    assert not (tmp_path / "figures" / "alone.pdf").exists()


def test_a_figure_is_written_anywhere_in_one_step(table, tmp_path):
    figure = cohorts.fractures_per_patient(table)
    path = tmp_path / "new" / "1.2.3.png"
    assert style.write_figure(figure, path) == path
    assert path.read_bytes() == figure._repr_png_()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(table, tmp_path, monkeypatch):
    path = tmp_path / "1.2.3.png"
    path.write_bytes(b"old")
    figure = cohorts.fractures_per_patient(table)

    def fail(*_, **__):
        raise ValueError("no ink")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(ValueError, match="no ink"):
        style.write_figure(figure, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: b"old"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".."])
def test_a_figure_name_that_is_a_path_is_refused(name, table, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="figure name is up to 64 letters"):
        style.save_figure(cohorts.fractures_per_patient(table), name)


def test_each_vertebra_and_split_has_its_own_colour():
    assert len({*style.VERTEBRA_COLOURS.values()}) == len(VERTEBRAE)
    assert len({*style.SPLIT_COLOURS.values()}) == len(labels.SPLITS)


def test_figures_need_neither_torch_nor_pyplot():
    code = "import sys, cspine_helpers.figures; print({'torch', 'matplotlib.pyplot'} & {*sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "set()"
