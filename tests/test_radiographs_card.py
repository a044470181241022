import re
import shutil
from pathlib import Path

import pytest
from radiograph_runs import Runs, packed_cohort
from test_model_card import tables_of

from cspine_helpers.decisions.test_split import evaluate_on_test, freeze
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.model_card import results
from cspine_helpers.model_card.results import number
from cspine_helpers.radiographs import card as room
from cspine_helpers.radiographs.blend import read_blend
from cspine_helpers.radiographs.card import write_radiograph_card
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.evaluation import evaluate, shortcut, study_metrics, study_scores, subgroups
from cspine_helpers.radiographs.image_table import read_regions
from cspine_helpers.radiographs.mask_cases import MaskCases, judged_images
from cspine_helpers.radiographs.masks import read_masks
from cspine_helpers.radiographs.prediction import predict_radiographs

FEW = 60  # resamples: enough for these tests


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "RESAMPLES", FEW)
        patch.setattr(results, "RESAMPLES", FEW)
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a cohort and two stand-in runs: `one`, and `mean` of two with a blend and a decision."""
    root = tmp_path_factory.mktemp("project")
    packed_cohort(root / "made").rename(root / "limbs")
    (root / "data").mkdir()
    (root / "limbs").rename(cohort := root / "data" / "limbs")
    runs = Runs(cohort, root / "checkpoints")
    members = [runs("one"), runs("two", bright=150.0)]
    with runs.loaded():
        predict_radiographs(members[:1], cohort)
        mean = root / "checkpoints" / "mean"
        table = predict_radiographs(members, cohort, mean, search=True, folds=2, tta=True)
    freeze(mean, choose_decision(table, Rule("max_youden")), table)
    return root


@pytest.fixture
def root(project, monkeypatch) -> Path:
    monkeypatch.setenv("CSPINE_ROOT", str(project))
    return project


def text_of(folder: Path) -> str:
    text = write_radiograph_card(folder).read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf|None|NaN|TODO)\b", text)
    assert not re.search(r"[{}]|<[a-z]", text)
    assert str(folder.parent) not in text
    assert "\n\n\n" not in text
    tables_of(text)
    return text


def cases_of(root, run, split="validation"):
    cohort = read_radiograph_cohort(root / "data" / "limbs")
    from cspine_helpers.predictions import read_predictions

    table = read_predictions(root / "checkpoints" / run / "predictions.csv")
    rows = judged_images(table, cohort.images, split=split)
    masks = read_masks(root / "checkpoints" / run)
    return MaskCases.of(rows, truth=read_regions(cohort.folder), predicted=masks)


def test_it_attributes_the_images_and_says_what_it_is_not(root):
    text = text_of(root / "checkpoints" / "one")
    assert "Research software, not a medical device" in text
    assert "CC BY 4.0" in text
    assert "10.1038/s41597-023-02432-4" in text
    assert "RSNA" not in text
    assert "vertebra" not in text.lower()
    assert "C1" not in text
    assert "Apache-2.0" in text


def test_an_ensemble_is_attributed_by_its_members_and_its_blend_is_told(root):
    text = text_of(root / "checkpoints" / "mean")
    assert "CC BY 4.0" in text
    assert "10.1038/s41597-023-02432-4" in text
    frozen = read_blend(root / "checkpoints" / "mean")
    assert f"Weights of the members: one {number(frozen.blend.weights[0])}, two" in text
    rows = tables_of(text)["Model", "blend", "AUROC"]
    for row, score in zip(rows, frozen.record["scores"], strict=True):
        assert row["blend"] == score["blend"]
        assert row["AUROC"] == number(score["auroc"])
    assert "both exchanged" in text


def test_masks_subgroups_and_metal_are_those_of_the_evaluation(root):
    text = text_of(root / "checkpoints" / "mean")
    tables, cases = tables_of(text), cases_of(root, "mean")
    threshold = float(re.search(r"\| threshold \| ([\d.e-]+) ?;", text)[1])
    found = evaluate(cases, threshold=threshold, resamples=FEW, keep_undefined=True).set_index("metric")
    masks = tables["Results on validation", "mask", "value (95 % interval)"]
    assert masks[0]["value (95 % interval)"].split(" ")[0] == number(found.loc["dice_pos", "value"])
    assert masks[0]["of"] == f"{found.loc['dice_pos', 'n']} {found.loc['dice_pos', 'of']}"
    parts = subgroups(cases, threshold=threshold, resamples=FEW)
    shown = {row["subgroup"]: row for row in tables["Results on validation", "subgroup", "images"]}
    assert [*shown] == list(dict.fromkeys(parts["subgroup"]))
    for name, row in shown.items():
        assert row["images"] == str(parts[parts["subgroup"] == name]["images"].iloc[0])


def test_metal_is_a_limit_where_it_is_at_hand(root, monkeypatch):
    real = room.judged_images

    def judged(*arguments, **options):
        rows = real(*arguments, **options)
        return rows.assign(hardware=[1, *[0] * (len(rows) - 1)])

    monkeypatch.setattr(room, "judged_images", judged)
    text = text_of(root / "checkpoints" / "one")
    cases = cases_of(root, "one")
    cases = MaskCases(
        cases.images.assign(hardware=[1, *[0] * (len(cases) - 1)]), cases.lesions, cases.marks, cases.rule
    )
    value = shortcut(cases, resamples=FEW).set_index("what").loc["without", "value"]
    rows = {
        row["AUROC of"]: row
        for row in tables_of(text)["Results on validation", "sign", "AUROC of"]
        if row["sign"] == "with hardware"
    }
    assert rows["without"]["value (95 % interval)"].split(" ")[0] == number(value)
    assert re.search(r"- On validation, [01] of 1 images with hardware are fractured, and \d+ of the", text)


def test_studies_of_several_views_have_results_of_their_own(root, monkeypatch):
    real = room.judged_images

    def judged(*arguments, **options):
        """Two views a study, each study a patient."""
        rows = real(*arguments, **options)
        pairs = rows.groupby("label").cumcount() // 2
        study = rows["label"].astype(str) + "-" + pairs.astype(str)
        return rows.assign(study=study, patient=study)

    assert "### Studies" not in text_of(root / "checkpoints" / "mean")  # one view each
    monkeypatch.setattr(room, "judged_images", judged)
    text = text_of(root / "checkpoints" / "mean")
    threshold = float(re.search(r"\| threshold \| ([\d.e-]+) ?;", text)[1])
    shown = tables_of(text)["Results on validation", "views", "metric"]
    cases = cases_of(root, "mean")
    pairs = cases.images.groupby("label").cumcount() // 2
    study = cases.images["label"].astype(str) + "-" + pairs.astype(str)
    for how in ("mean", "max"):
        scores = study_scores(cases.images.assign(study=study, patient=study), how)
        found = study_metrics(scores, threshold=threshold, resamples=FEW).set_index("metric")
        rows = {row["metric"]: row for row in shown if row["views"] == how}
        for metric, title in (("auroc", "AUROC"), ("kappa", "Cohen's kappa")):
            assert rows[title]["value (95 % interval)"].split(" ")[0] == number(found.loc[metric, "value"])
            assert rows[title]["studies"] == str(len(scores))


def test_nothing_of_the_test_split_is_shown_before_it_is_opened(root):
    folder = shutil.copytree(root / "checkpoints" / "mean", root / "checkpoints" / "opened")
    assert "Results on test" not in text_of(folder)
    from cspine_helpers.predictions import read_predictions

    evaluate_on_test(folder, read_predictions(folder / "predictions.csv"))
    text = text_of(folder)
    rows = tables_of(text)["Results on test", "mask", "value (95 % interval)"]
    assert len(rows) == 8
    shutil.rmtree(folder)


def test_without_its_cohort_it_says_what_is_not_shown(root, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    text = text_of(root / "checkpoints" / "one")
    assert "No subgroup is reported, and nothing of the masks: the cohort `limbs` was not at hand." in text
    assert "### Masks" not in text


def test_without_its_cohort_it_says_what_was_measured_and_kept_and_of_no_other_predictions(
    root, tmp_path, monkeypatch
):
    run = shutil.copytree(root / "checkpoints" / "one", tmp_path / "checkpoints" / "one")
    with_cohort = text_of(root / "checkpoints" / "one")
    cases_of(root, "one").write(run / "measured" / "validation")
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert text_of(run) == with_cohort
    shutil.rmtree(run / "measured")
    cases_of(root, "mean").write(run / "measured" / "validation")
    with pytest.raises(ValueError, match="was measured of other predictions"):
        write_radiograph_card(run)


def test_where_nobody_outlined_anything_nothing_is_said_of_masks(root, monkeypatch):
    regions = {name: [] for name in read_regions(root / "data" / "limbs")}
    monkeypatch.setattr(room, "read_regions", lambda folder: regions)
    text = text_of(root / "checkpoints" / "one")
    assert "Nobody outlined anything in these images, so nothing is said of the masks." in text
    assert "### Masks" not in text
    assert "### Subgroups" in text


def test_of_a_cohort_that_changed_nothing_is_measured(root, tmp_path, monkeypatch):
    other = shutil.copytree(root / "data", tmp_path / "data", symlinks=True)
    path = other / "limbs" / "annotations.json"
    path.write_text(path.read_text() + " ")
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert "the cohort `limbs` is not as it was in training" in text_of(root / "checkpoints" / "one")


def test_the_same_files_give_the_same_card(root):
    folder = root / "checkpoints" / "mean"
    assert text_of(folder) == text_of(folder)


def test_the_command_line_writes_it(root, capsys):
    from cspine_helpers.__main__ import main

    (root / "checkpoints" / "mean" / "MODEL_CARD.md").unlink(missing_ok=True)
    assert main(["card", "--run", "mean"]) == 0
    assert "MODEL_CARD.md" in capsys.readouterr().out
    text = (root / "checkpoints" / "mean" / "MODEL_CARD.md").read_text()
    assert "### Subgroups" in text
