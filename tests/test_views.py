import matplotlib
import numpy as np
import pytest

from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.rendering import Study, render_study
from cspine_helpers.views import study_views

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def study() -> Study:
    return render_study(1, 3, {**dict.fromkeys(VERTEBRAE, 0), "C5": 1})


def test_every_vertebra_has_its_slice_and_broken_ones_say_so(study):
    maps = (study.volume_hu, study.label_map, study.spacing_mm)
    figure = study_views(*maps, fracture_map=study.fracture_map, title=study.uid)
    sagittal, _, *axial = figure.axes
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in axial]
    assert titles == [name + " fractured" * (name == "C5") for name in VERTEBRAE]
    assert [text.get_text() for text in sagittal.texts] == list(VERTEBRAE)
    heights = [text.get_position()[1] for text in sagittal.texts]
    assert heights == sorted(heights)
    assert figure._repr_png_()


def test_vertebrae_that_are_not_there_are_left_out(study):
    label_map = np.where(np.isin(study.label_map, (4, 5)), study.label_map, 0)
    figure = study_views(study.volume_hu, label_map, study.spacing_mm)
    assert len(figure.axes) == 2 + 2
