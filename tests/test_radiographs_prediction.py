import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from radiograph_runs import LONG, SHORT, Runs, Stand, packed_cohort

from cspine_helpers.labels import UID
from cspine_helpers.predictions import read_predictions
from cspine_helpers.radiographs import prediction
from cspine_helpers.radiographs.blend import Blend, read_blend
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.masks import read_masks
from cspine_helpers.radiographs.model import RadiographConfig, RadiographOutput
from cspine_helpers.radiographs.prediction import (
    AS_IT_IS,
    VIEWS,
    Predictor,
    predict_radiographs,
    slide,
    view_probabilities,
)
from cspine_helpers.runs import member_folders, read_ensemble, write_record
from cspine_helpers.splits import read_split, write_split


def images_of(batch=3, height=LONG, width=SHORT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return packed_cohort(tmp_path_factory.mktemp("radiographs"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, cohort):
    """Makes a run folder of a stand-in, once a name."""
    runs = Runs(cohort, tmp_path_factory.mktemp("runs"))
    with runs.loaded():
        yield runs


# Views and windows.


def test_views_of_a_network_that_sees_no_place_say_what_one_says():
    network, images = Stand(), images_of()
    once, mask = view_probabilities(network, images, [AS_IT_IS])
    often, masks = view_probabilities(network, images, list(VIEWS))
    torch.testing.assert_close(often, once)
    torch.testing.assert_close(masks, mask)


@pytest.mark.parametrize("view", VIEWS)
def test_a_mask_is_turned_back_cell_by_cell(view):
    network, images = Stand(lean=1.0), images_of()
    _, found = view_probabilities(network, images, [view])
    turned = np.flip(images.numpy(), VIEWS[view]).copy()
    with torch.inference_mode():
        wanted = network(torch.from_numpy(turned)).mask_logit.sigmoid().numpy()
    np.testing.assert_allclose(found, np.flip(wanted, VIEWS[view]), rtol=1e-6)


def test_views_are_averaged_as_probabilities():
    network, images = Stand(lean=2.0), images_of()
    singles = [view_probabilities(network, images, [view]) for view in VIEWS]
    classes, masks = view_probabilities(network, images, list(VIEWS))
    torch.testing.assert_close(classes, torch.stack([one for one, _ in singles]).mean(0))
    torch.testing.assert_close(masks, torch.stack([one for _, one in singles]).mean(0))


@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 96), (160, 128), (64, 64), (32, 224)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_windows_are_exact_for_a_network_that_sees_pixels_one_by_one(height, width, overlap):
    network, images = Stand(), images_of(2, height, width)
    _, found = slide(network, images, 64, overlap=overlap)
    torch.testing.assert_close(found, view_probabilities(network, images, [AS_IT_IS])[1])


def test_windows_blend_without_a_seam_and_the_highest_says_whether_there_is_a_fracture():
    class Windows(Stand):
        """Says everywhere how bright its whole window is: where windows end, a plain mean would jump."""

        def forward(self, images):
            level = images.float().mean((1, 2)) / 60 - 2
            shape = (len(images), images.shape[1] // 4, images.shape[2] // 4)
            return RadiographOutput(level, level[:, None, None].expand(shape))

    image = torch.zeros(1, 64, 192, dtype=torch.uint8)
    image[:, :, 96:] = 240
    classes, mask = slide(Windows(), image, 64)
    jumps = mask[0, 8].diff().abs()
    assert jumps.max() < 0.15  # from 0.12 to 0.88 within 32 cells
    assert (mask[0, 8].diff() >= -1e-6).all()
    assert classes.item() == pytest.approx(torch.tensor(2.0).sigmoid().item())


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [64, 96, 128, 320, 384, 512])
@pytest.mark.parametrize("window", [32, 64, 256])
def test_windows_cover_a_side_from_end_to_end(size, window, overlap):
    window = min(window, size)
    starts = prediction._starts(size, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == size - window
    assert all(0 < step <= window for step in np.diff(starts))


def test_an_overlap_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\); found 1"):
        slide(Stand(), images_of(), 64, overlap=1)


# One image.


def test_an_image_of_any_size_gets_a_mask_of_its_own_size(made):
    image = np.zeros((300, 210), np.uint8)
    image[60:120, 50:100] = 255
    found = Predictor.of(made("one")).predict(image)
    assert found.mask.shape == image.shape
    overlap = (found.mask & (image > 0)).sum()
    assert 2 * overlap / (found.mask.sum() + (image > 0).sum()) > 0.85
    assert 0 < found.probability < 1


def test_what_members_say_is_blended_by_their_weights(made, tmp_path):
    folders = [made("one"), made("dim", bright=100.0)]
    predictor = Predictor.by(folders, tmp_path)
    image = images_of(1)[0].numpy()
    singles = [Predictor.of(folder) for folder in folders]
    frames = torch.from_numpy(image)[None]
    classes, masks = predictor.outputs(frames)
    for n, single in enumerate(singles):
        of_class, mask = single.outputs(frames)
        np.testing.assert_array_equal(classes[:, n], of_class[:, 0])
        np.testing.assert_array_equal(masks[:, n], mask[:, 0])
    wanted = Blend(weights=(0.5, 0.5)).probability(classes[0], masks[0])
    assert predictor.predict(image).probability == wanted


def test_a_run_of_patches_sees_through_a_window(made, monkeypatch):
    seen = []
    monkeypatch.setattr(
        prediction,
        "slide",
        lambda network, images, window: seen.append(window) or slide(network, images, window),
    )
    Predictor.of(made("patches", train={"patch": 32})).predict(images_of(1)[0].numpy())
    assert seen == [32]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No run at .*: run.json is missing"):
        Predictor.of(tmp_path / "nobody")


# A cohort.


def test_a_table_has_every_image_of_validation_and_test_with_its_group_and_mask(cohort, made, tmp_path):
    folder = made("table", folder=tmp_path)
    table = predict_radiographs([folder], cohort)
    images = read_radiograph_cohort(cohort).images.set_index("image")
    assert sorted(table[UID]) == sorted(images.index[images["split"] != "train"])
    for column in ("split", "label", "patient"):
        assert table[column].tolist() == images[column][table[UID]].tolist()
    assert (table["vertebra"] == "image").all()
    pd.testing.assert_frame_equal(read_predictions(folder / "predictions.csv"), table, check_dtype=False)
    masks, predictor = read_masks(folder), Predictor.of(folder)
    assert [*masks] == table[UID].tolist()
    for image, probability in zip(table[UID], table["probability"], strict=True):
        frame = np.load(cohort / "packed" / "images" / f"{image}.npy")
        size = images.loc[image, ["height", "width"]]
        classes, found = predictor.outputs(torch.from_numpy(frame)[None])
        answer = predictor.answer(classes[0], found[0], predictor.frame(*size))
        assert answer.probability == probability
        np.testing.assert_array_equal(masks[image], answer.mask)
    assert sum(mask.any() for mask in masks.values()) > 3


class Stop(Exception):
    """Stands for whatever ends a process."""


def test_a_stopped_prediction_resumes_with_the_same_bytes(cohort, made, tmp_path, monkeypatch):
    whole, folder = made("whole", folder=tmp_path), made("stopped", folder=tmp_path)
    predict_radiographs([whole], cohort, batch_size=2)
    real, calls = Predictor.outputs, []

    def outputs(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise Stop
        return real(self, images)

    monkeypatch.setattr(Predictor, "outputs", outputs)
    with pytest.raises(Stop):
        predict_radiographs([folder], cohort, batch_size=2)
    assert not (folder / "predictions.csv").exists()
    predict_radiographs([folder], cohort, batch_size=2)
    for name in ("predictions.csv", "masks.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert sum(calls) - 2 == len(read_predictions(folder / "predictions.csv"))


def test_a_table_that_is_there_is_replaced_only_when_asked(cohort, made, tmp_path):
    folder = made("kept", folder=tmp_path)
    predict_radiographs([folder], cohort, splits=["test"])
    with pytest.raises(FileExistsError, match=r"a decision may rest on it.*--replace"):
        predict_radiographs([folder], cohort)
    assert len(predict_radiographs([folder], cohort, replace=True)) > 5


def test_classifiers_write_no_masks(cohort, made, tmp_path):
    config = RadiographConfig(
        architecture="classifier",
        backbone="resnet18",
        pretrained=None,
        frozen_blocks=0,
        long=LONG,
        short=SHORT,
    )
    folder = made("classifier", folder=tmp_path, config=config)
    predict_radiographs([folder], cohort, splits=["test"])
    assert not (folder / "masks.csv").exists()
    with pytest.raises(FileNotFoundError, match="of a run that has a mask"):
        read_masks(folder)


def test_a_cohort_that_was_split_anew_is_refused(cohort, made, tmp_path):
    folder = made("elsewhere", folder=tmp_path)
    other = shutil.copytree(cohort, tmp_path / "cohort", symlinks=True)
    split = read_split(other / "split.csv")
    split["split"] = split["split"].replace({"test": "validation", "validation": "test"})
    for path in other.glob("split.csv*"):
        path.unlink()
    write_split(split, other / "split.csv")
    with pytest.raises(ValueError, match=r"not trained on the cohort at .*split_sha256 is"):
        predict_radiographs([folder], other)
    assert not (folder / "predictions.csv").exists()


def test_changed_masks_are_noticed(cohort, made, tmp_path):
    folder = made("changed", folder=tmp_path)
    predict_radiographs([folder], cohort, splits=["test"])
    (folder / "masks.csv").write_text((folder / "masks.csv").read_text().replace(" ", "  ", 1))
    with pytest.raises(ValueError, match=r"masks.csv is not the file that was written"):
        read_masks(folder)


# Blends and ensembles.


def test_a_blend_is_searched_on_validation_frozen_and_used(cohort, made, tmp_path):
    folder = made("blended", folder=tmp_path)
    table = predict_radiographs([folder], cohort, search=True, folds=2, tta=True)
    frozen = read_blend(folder)
    assert frozen.views == tuple(VIEWS)
    assert frozen.record["members"][0]["run"] == "blended"
    assert frozen.record["chosen_on"]["images"] == (table["split"] == "validation").sum()
    predictor = Predictor.of(folder)
    assert predictor.is_frozen
    assert predictor.blend == frozen.blend
    assert predictor.views == tuple(VIEWS)
    bytes_before = (folder / "predictions.csv").read_bytes()
    again = predict_radiographs([folder], cohort, replace=True)  # without a search: validation is computed
    pd.testing.assert_frame_equal(again, table)
    assert (folder / "predictions.csv").read_bytes() == bytes_before
    with pytest.raises(ValueError, match=r"chosen with other views .*predict --blend --replace"):
        predict_radiographs([folder], cohort, tta=False, replace=True)


def test_a_search_keeps_the_blend_that_is_there_unless_asked(cohort, made, tmp_path):
    folder = made("twice", folder=tmp_path)
    predict_radiographs([folder], cohort, search=True, folds=2, splits=["test"])
    before = (folder / "blend.json").read_bytes()
    (folder / "predictions.csv").unlink()
    predict_radiographs([folder], cohort, search=True, folds=2, splits=["test"])
    assert (folder / "blend.json").read_bytes() == before
    predict_radiographs([folder], cohort, search=True, folds=2, splits=["test"], replace=True, tta=True)
    assert read_blend(folder).views == tuple(VIEWS)


def test_test_images_have_no_say_in_the_blend(cohort, made, tmp_path, monkeypatch):
    seen = []
    real = prediction.search_blend
    monkeypatch.setattr(
        prediction, "search_blend", lambda outputs, folds: seen.append(outputs) or real(outputs, folds=folds)
    )
    predict_radiographs([made("shy", folder=tmp_path)], cohort, search=True, folds=2)
    images = read_radiograph_cohort(cohort).images
    assert sorted(seen[0].image) == sorted(images["image"][images["split"] == "validation"])


def test_an_ensemble_is_written_to_its_own_folder_and_predicts_by_its_name(cohort, made, tmp_path):
    members = [made("first", folder=tmp_path), made("second", folder=tmp_path, bright=150.0)]
    mean = tmp_path / "mean"
    table = predict_radiographs(members, cohort, mean, search=True, folds=2)
    record = read_ensemble(mean)
    assert [each["run"] for each in record["members"]] == ["first", "second"]
    assert record["blend_sha256"]
    assert [path.name for path in member_folders(mean)] == ["first", "second"]
    predictor = Predictor.of(mean)
    assert len(predictor.runs) == len(read_blend(mean).blend.weights) == 2
    assert len(read_masks(mean)) == len(table)
    shutil.move(tmp_path / "second", mean / "second")  # members may lie in it
    assert member_folders(mean) == [tmp_path / "first", mean / "second"]


def test_a_blend_of_other_weights_is_refused(cohort, made, tmp_path):
    folder = made("changing", folder=tmp_path)
    predict_radiographs([folder], cohort, search=True, folds=2, splits=["test"])
    (folder / "model.safetensors").write_text("other weights")
    record = json.loads((folder / "run.json").read_text())
    write_record(folder, {name: value for name, value in record.items() if name != "record_sha256"})
    with pytest.raises(ValueError, match=r"chosen with other runs: changing\.weights_sha256"):
        Predictor.of(folder)


def test_members_that_are_not_alike_are_refused(cohort, made, tmp_path):
    other = RadiographConfig(backbone="resnet18", pretrained=None, frozen_blocks=0, long=128, short=SHORT)
    with pytest.raises(ValueError, match=r"share labels, split, frame.*long is 128, not 96"):
        Predictor.by([made("one"), made("long", config=other)], tmp_path)


def test_an_ensemble_does_not_go_into_the_folder_of_a_run(cohort, made):
    with pytest.raises(FileExistsError, match="holds a run of its own"):
        predict_radiographs([made("one"), made("dim", bright=100.0)], cohort, made("one"))
