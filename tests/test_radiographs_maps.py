from dataclasses import replace

import numpy as np
import pytest
import torch
from radiograph_runs import TINY, packed_cohort
from toy_cohort import tiny_model

from cspine_helpers.checkpoints import Run
from cspine_helpers.explain.maps import METHODS, ON_PIXELS, compute_maps, map_sequences
from cspine_helpers.model import FractureClassifier
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.images import Frame
from cspine_helpers.radiographs.maps import framed, map_radiographs
from cspine_helpers.radiographs.model import RadiographModel


def run_of(config, folder, **record):
    torch.manual_seed(0)
    model = RadiographModel(config).eval()
    return Run(folder, model, config, 0.5, record)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(TINY, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 96, 64), dtype=np.uint8)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_maps_each_radiograph_alone(run, images, method):
    maps = map_radiographs(run, images, method=method)
    assert maps.values.shape == ((2, 96, 64) if method in ON_PIXELS else (2, 3, 2))
    assert maps.values.dtype == np.float32
    alone = map_radiographs(run, images[1:], method=method)
    np.testing.assert_array_equal(maps.values[1], alone.values[0])
    with torch.inference_mode():
        expected = run.model(torch.from_numpy(images)).probability
    np.testing.assert_allclose(maps.probability, expected, atol=1e-5)
    assert maps.pixels().shape == (2, 96, 64)


def test_the_mask_is_the_networks_own(run, images):
    maps = map_radiographs(run, images, method="mask")
    with torch.inference_mode():
        expected = run.model(torch.from_numpy(images)).mask_logit.sigmoid()
    np.testing.assert_allclose(maps.values, expected, atol=1e-5)


def test_gradients_run_through_what_was_frozen(tmp_path, images):
    """The same weights, frozen and not, give one gradient of the image; frozen alone would give none."""
    free = run_of(TINY, tmp_path)
    frozen = run_of(TINY, tmp_path)
    frozen.model._frozen = len(frozen.model._steps) - 2  # as `frozen_blocks` leaves it, without pretraining
    first, second = (map_radiographs(its, images, method="gradient_input").values for its in (free, frozen))
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-8)
    assert first.max() > 0
    network = frozen.model.folded()
    with pytest.raises(ValueError, match=r"No gradient reaches backbone.conv_stem.*gradients=True"):
        compute_maps(
            network, torch.from_numpy(images[:1]), lambda output: output.logit, layer="backbone.conv_stem"
        )
    with pytest.raises(ValueError, match=r"runs backbone.conv_stem 2 times.*one image at a time"):
        compute_maps(
            network,
            torch.from_numpy(images),
            lambda output: output.logit,
            method="eigen_cam",
            layer="backbone.conv_stem",
        )


def test_a_layer_that_the_answer_does_not_depend_on_has_an_empty_map(tmp_path, images):
    run = run_of(replace(TINY, mask_evidence=0.0), tmp_path)
    maps = map_radiographs(run, images, layer="decoder.mask", method="hires_cam")
    assert (maps.values == 0).all()


def test_maps_lie_on_the_radiographs_own_pixels(run):
    """A bright spot of the mask, back in the radiograph, is where it is in the frame."""
    image = np.zeros((150, 60), np.uint8)
    image[30:40, 20:30] = 255
    frame = Frame.of(150, 60, long=96, short=64)
    maps = map_radiographs(run, frame.pixels(image)[None], method="gradient_input")
    spot = replace(maps, values=frame.pixels(image)[None].astype(np.float32))
    back = spot.on_radiograph(0, 150, 60)
    assert back.shape == (150, 60)
    rows, columns = np.nonzero(back > 200)
    assert (rows.mean(), columns.mean()) == pytest.approx((34.5, 24.5), abs=0.75)


def test_a_cohort_comes_by_the_shape_of_its_frames(tmp_path):
    cohort = read_radiograph_cohort(packed_cohort(tmp_path / "cohort"))
    parts = framed(cohort, cohort.images)
    assert sum(len(part.rows) for part in parts) == len(cohort.images)
    assert {part.pixels.shape[1:] for part in parts} <= {(96, 64), (64, 96)}
    for part in parts:
        assert part.pixels.shape == part.truth.shape == (len(part.rows), *part.pixels.shape[1:])
        assert set(np.unique(part.truth)) <= {0, 1}
        assert (part.truth.any((1, 2)) == (part.rows["label"] == 1)).all()
        for number in (0, len(part.rows) - 1):
            packed = cohort.packed / "images" / f"{part.rows['image'][number]}.npy"
            np.testing.assert_array_equal(part.pixels[number], np.load(packed))


def test_unusable_calls_are_refused(run, images, tmp_path):
    with pytest.raises(ValueError, match=r"no method 'saliency'.*'mask'"):
        map_radiographs(run, images, method="saliency")
    with pytest.raises(ValueError, match=r"one or more in frames of one shape; found \(96, 64\)"):
        map_radiographs(run, images[0])
    with pytest.raises(ValueError, match="mask takes no layer"):
        map_radiographs(run, images, method="mask", layer="backbone.blocks.0")
    with pytest.raises(ValueError, match=r"no layer 'backbone\.block'"):
        map_radiographs(run, images, layer="backbone.block")
    with pytest.raises(ValueError, match="patches of 64 pixels"):
        map_radiographs(run_of(TINY, tmp_path, train={"patch": 64}), images)
    config = tiny_model()
    other = Run(tmp_path, FractureClassifier(config).eval(), config, 0.5, {})
    with pytest.raises(ValueError, match="is of sequences, not of radiographs"):
        map_radiographs(other, images)
    with pytest.raises(ValueError, match="is of a RadiographModel, not of sequences"):
        map_sequences(run, None, tmp_path)
    half = run_of(TINY, tmp_path)
    half = replace(half, model=half.model.half())
    for method in ("mask", "layer_cam"):
        with pytest.raises(ValueError, match="half precision are not computed on a CPU"):
            map_radiographs(half, images, method=method)
    classifier = run_of(replace(TINY, architecture="classifier"), tmp_path)
    with pytest.raises(ValueError, match="A classifier has no mask"):
        map_radiographs(classifier, images, method="mask")
