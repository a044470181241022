from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cspine_helpers import checkpoints, packed, runs
from cspine_helpers.explain import attention as explain
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.packed import MANIFEST_COLUMNS, write_manifest

CONFIG = replace(
    ModelConfig.small(), slices=3, size=32, feature_stride=4, lstm_hidden=4, vertebra_embedding=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    checkpoints.save_weights(folder, FractureClassifier(CONFIG))
    record = {"model": asdict(CONFIG), "classes": list(VERTEBRAE), "decision": {"threshold": 0.5}}
    runs.write_record(folder, record)
    return checkpoints.load_run(folder)


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({UID: ["1.1", "1.1", "1.2"], "vertebra": ["C2", "C7", "C5"], "label": [1, 0, 1]})
    for uid, vertebra in zip(table[UID], table["vertebra"], strict=True):
        array = rng.integers(0, 256, (3, 32, 32, 6), dtype=np.uint8)
        packed.write_sequence(tmp_path, uid, vertebra, array)
    return table.set_axis([7, 3, 9])  # any index does


def write_truths(folder, samples, truths):
    numbers = dict.fromkeys(MANIFEST_COLUMNS[2:-1], 1.0)
    table = samples[[UID, "vertebra"]].assign(**numbers, slice_truth=truths)
    write_manifest(table, folder)


def test_each_slice_has_the_models_own_attention_and_probability(run, samples, tmp_path):
    write_truths(tmp_path, samples, [".x.", "...", None])
    table = explain.attention_table(run, samples, tmp_path, batch_size=2)
    assert list(table.columns) == list(explain.COLUMNS)
    assert table["slice"].tolist() == [0, 1, 2] * 3
    np.testing.assert_array_equal(table["fractured"], [0, 1, 0, 0, 0, 0, np.nan, np.nan, np.nan])
    for number, (uid, vertebra, label) in enumerate(samples.itertuples(index=False)):
        array = packed.open_sequence(packed.sequence_path(tmp_path, uid, vertebra))
        sequence = torch.from_numpy(array.transpose(0, 3, 1, 2).copy())[None]
        with torch.inference_mode():
            output = run.model(sequence, torch.tensor([VERTEBRAE.index(vertebra)]))
        rows = table.iloc[3 * number : 3 * number + 3]
        assert rows[[UID, "vertebra", "label"]].drop_duplicates().to_numpy().tolist() == [
            [uid, vertebra, label]
        ]
        np.testing.assert_allclose(rows["probability"], output.logit.sigmoid().item(), rtol=1e-5)
        np.testing.assert_allclose(rows["attention"], output.attention[0], rtol=1e-4)


def test_the_probabilities_are_those_of_the_runs_table_where_it_is_given(run, samples, tmp_path):
    found = explain.attention_table(run, samples, tmp_path)
    computed = found["probability"][::3].to_numpy()
    stored = samples.assign(split="validation", probability=computed - 4e-8).sample(frac=1, random_state=0)
    table = explain.attention_table(run, samples, tmp_path, predictions=stored)
    assert table["probability"][::3].tolist() == (computed - 4e-8).tolist()
    pd.testing.assert_frame_equal(table.drop(columns="probability"), found.drop(columns="probability"))
    for other in (stored[1:], stored.assign(probability=[0.0, *stored["probability"][1:]])):
        with pytest.raises(
            ValueError, match=r"not this run's: 1 of 3 samples are missing, or differ .* again"
        ):
            explain.attention_table(run, samples, tmp_path, predictions=other)


def test_without_a_manifest_the_truth_is_unknown(run, samples, tmp_path):
    table = explain.attention_table(run, samples, tmp_path)
    assert table["fractured"].isna().all()
    assert list(explain.sequence_scores(table).columns) == list(explain.SCORES)
    assert explain.sequence_scores(table).empty
    with pytest.raises(ValueError, match="No sequence has both fractured and intact slices"):
        explain.attention_scores(table)


def test_a_run_without_attention_weighs_all_slices_alike_and_leaves_the_run_alone(run, samples, tmp_path):
    before = explain.attention_table(run, samples, tmp_path)
    found = explain.attention_table(explain.without_attention(run), samples, tmp_path)
    np.testing.assert_allclose(found["attention"], 1 / 3)
    assert not np.allclose(found["probability"], before["probability"], rtol=1e-6)
    pd.testing.assert_frame_equal(explain.attention_table(run, samples, tmp_path), before)


def slices(uid, attention, fractured, *, label=1):
    return pd.DataFrame(
        {
            UID: uid,
            "vertebra": "C3",
            "label": label,
            "probability": 0.7,
            "slice": range(len(attention)),
            "attention": attention,
            "fractured": np.array(fractured, dtype=float),
        }
    )


def test_scores_by_hand():
    # one fractured slice above two of three intact ones (a tie counts half), and one at the top
    table = pd.concat(
        [
            slices("1", [0.1, 0.3, 0.2, 0.4], [0, 1, 0, 0]),
            slices("2", [0.6, 0.2, 0.1, 0.1], [1, 0, 0, 1]),
            slices("3", [0.25] * 4, [0] * 4, label=0),
            slices("4", [0.25] * 4, [1] * 4),
            slices("5", [0.25] * 4, [np.nan] * 4),
        ]
    )
    each = explain.sequence_scores(table)
    assert each[UID].tolist() == ["1", "2"]
    np.testing.assert_allclose(each["auroc"], [2 / 3, (2 + 0.5) / 4])
    np.testing.assert_allclose(each["share"], [0.3, 0.7])
    np.testing.assert_allclose(each["uniform_share"], [0.25, 0.5])
    np.testing.assert_allclose(each["top1"], [0, 1])
    scores = explain.attention_scores(table)
    np.testing.assert_allclose(scores["attention"].iloc[[0, 2, 3]], [each["auroc"].mean(), 0.5, 0.5])
    np.testing.assert_allclose(scores["uniform"], [0.5, 0.5, 0.375, 0.375])
    assert scores["sequences"].tolist() == [2] * 4


def of_level(rows, vertebra):
    return rows.assign(vertebra=vertebra)


def test_the_null_is_where_attention_goes_in_intact_vertebrae_of_the_level():
    usual = [0.1, 0.6, 0.2, 0.1]
    table = pd.concat(
        [
            slices("1", usual, [0, 1, 0, 0]),  # looks where it always looks, and the fracture is there
            slices("2", [0.1, 0.1, 0.2, 0.6], [0, 0, 0, 1]),  # follows the fracture
            slices("3", [0.2, 0.5, 0.2, 0.1], [0] * 4, label=0),
            slices("4", [0.0, 0.7, 0.2, 0.1], [np.nan] * 4, label=0),
            of_level(slices("5", [0.7, 0.1, 0.1, 0.1], [0] * 4, label=0), "C7"),  # another level
        ],
        ignore_index=True,
    )
    np.testing.assert_allclose(explain.intact_profile(table)[:4], usual)
    np.testing.assert_allclose(explain.intact_profile(table)[-4:], [0.7, 0.1, 0.1, 0.1])
    each = explain.sequence_scores(table)
    np.testing.assert_allclose(each["profile_auroc"], [1, 0.5 / 3])
    np.testing.assert_allclose(each["profile_share"], [0.6, 0.1])
    np.testing.assert_allclose(each["profile_top1"], [1, 0])
    scores = explain.attention_scores(table)
    np.testing.assert_allclose(scores["profile"].iloc[[0, 2, 3]], [(1 + 0.5 / 3) / 2, 0.35, 0.5])
    np.testing.assert_allclose(scores["difference"], scores["attention"] - scores["profile"])


def test_a_model_that_always_looks_at_one_place_beats_uniform_weights_and_not_the_null():
    rng = np.random.default_rng(1)
    tables = []
    for uid in range(60):
        broken = uid % 2 == 0
        weight = np.exp(-((np.arange(9) - 4) ** 2) / 3) * rng.uniform(0.8, 1.2, 9)
        truth = (np.abs(np.arange(9) - 4 - rng.integers(-1, 2)) <= 1) & broken
        tables.append(slices(str(uid), weight / weight.sum(), truth, label=int(broken)))
    scores = explain.attention_scores(pd.concat(tables)).set_index("score")
    for row in ("AUROC, mean of sequences", "weight on fractured slices"):
        assert scores.loc[row, "attention"] > scores.loc[row, "uniform"] + 0.2
        assert scores.loc[row, "low"] < 0 < scores.loc[row, "high"]
    assert scores.loc["AUROC, all slices together", "low"] < scores.loc["AUROC, all slices together", "high"]


def test_a_level_without_intact_vertebrae_has_the_profile_of_all_and_none_intact_no_null():
    intact = of_level(slices("1", [0.1, 0.2, 0.3, 0.4], [0] * 4, label=0), "C1")
    broken = slices("2", [0.4, 0.3, 0.2, 0.1], [1, 0, 0, 0])
    np.testing.assert_allclose(explain.intact_profile(pd.concat([broken, intact]))[:4], [0.1, 0.2, 0.3, 0.4])
    scores = explain.attention_scores(broken)
    assert scores[["profile", "difference", "low", "high"]].isna().all(axis=None)
    assert scores["attention"].notna().all()


def test_scores_equal_scikit_learns():
    rng = np.random.default_rng(3)
    tables = []
    for uid in range(30):
        truth = rng.permutation(np.arange(15) < rng.integers(1, 15))
        tables.append(slices(str(uid), rng.dirichlet(np.ones(15)).round(2), truth))
    table = pd.concat(tables)
    each = explain.sequence_scores(table)
    wanted = [roc_auc_score(one["fractured"], one["attention"]) for one in tables]
    np.testing.assert_allclose(each["auroc"], wanted)
    pooled = roc_auc_score(table["fractured"], table["attention"])
    np.testing.assert_allclose(explain.attention_scores(table)["attention"].iloc[1], pooled)


@pytest.mark.slow
def test_intervals_of_all_slices_together_are_those_of_resampled_patients():
    rng = np.random.default_rng(5)
    tables = []
    for uid in range(40):
        for vertebra in ("C2", "C5"):
            truth = np.arange(8) < rng.integers(2, 6)
            skill = uid / 40  # a patient's sequences are alike
            weight = rng.dirichlet(np.ones(8)) + 0.2 * skill * truth
            tables.append(of_level(slices(f"1.{uid}", weight / weight.sum(), truth), vertebra))
        tables.append(slices(f"1.{uid}", rng.dirichlet(np.ones(8)), [0] * 8, label=0).assign(vertebra="C7"))
    table = pd.concat(tables, ignore_index=True)
    found = explain.attention_scores(table).set_index("score").loc["AUROC, all slices together"]
    broken = table.assign(profile=explain.intact_profile(table)).query("label == 1")
    by_patient = [part for _, part in broken.groupby(UID)]
    draws = []
    for _ in range(150):
        drawn = pd.concat([by_patient[n] for n in rng.integers(40, size=40)])
        own, null = (roc_auc_score(drawn["fractured"], drawn[name]) for name in ("attention", "profile"))
        draws.append((own, own - null))
    wanted = np.quantile(draws, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(
        found[["attention_low", "attention_high"]].astype(float), wanted[:, 0], atol=0.015
    )
    np.testing.assert_allclose(found[["low", "high"]].astype(float), wanted[:, 1], atol=0.03)


def test_every_row_has_the_interval_of_its_value_and_one_patient_shows_none():
    tables = [slices(str(n), [0.1, 0.5 + n / 50, 0.2, 0.2 - n / 50], [0, 1, 0, n % 2]) for n in range(10)]
    tables.append(slices("20", [0.1, 0.2, 0.3, 0.4], [0] * 4, label=0))
    scores = explain.attention_scores(pd.concat(tables))
    assert (scores["attention_low"] < scores["attention"]).all()
    assert (scores["attention"] <= scores["attention_high"]).all()
    assert ((scores["low"] <= scores["difference"]) & (scores["difference"] <= scores["high"])).all()
    alone = explain.attention_scores(pd.concat([tables[0], tables[-1]]))
    assert alone[["attention_low", "attention_high", "low", "high"]].isna().all(axis=None)
    assert alone[["attention", "difference"]].notna().all(axis=None)


def test_uniform_attention_scores_what_uniform_says():
    table = pd.concat([slices("1", [0.25] * 4, [0, 1, 0, 0]), slices("2", [0.25] * 4, [1, 1, 0, 1])])
    scores = explain.attention_scores(table).iloc[:3]
    np.testing.assert_allclose(scores["attention"], scores["uniform"])


def test_a_table_without_its_columns_is_refused():
    with pytest.raises(ValueError, match="fractured"):
        explain.sequence_scores(slices("1", [1.0], [1]).drop(columns="fractured"))
