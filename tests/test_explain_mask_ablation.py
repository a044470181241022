"""Masks that are changed, and neighbours that are broken, against what is known by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from toy_cohort import SIZE, SLICES, make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.explain import mask_ablation as ablation
from cspine_helpers.explain.maps import map_sequences
from cspine_helpers.explain.sanity import rank_correlation
from cspine_helpers.inference.prediction import predict
from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier


@pytest.fixture(scope="module")
def toy(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("toy")
    cohort = read_cohort(make_toy_cohort(folder, studies=8))
    torch.manual_seed(0)
    model = FractureClassifier(tiny_model()).eval()
    samples = cohort.samples["train"]
    samples = samples[samples["vertebra"].isin(["C2", "C3"])].reset_index(drop=True)
    assert 0 < samples["label"].sum() < len(samples)
    return Run(folder, model, model.config, 0.5, {}), samples, cohort.packed


@pytest.fixture(scope="module")
def masks(toy):
    _, samples, packed = toy
    return ablation.own_masks(samples, packed, slices=SLICES, size=SIZE)


def test_changed_masks_by_hand(masks, toy):
    _, samples, _ = toy
    assert masks.shape == (len(samples), SLICES, SIZE, SIZE)
    assert (masks.sum(axis=(2, 3)) == 16 * 16).all()
    found = ablation.changed_masks(masks, samples, dilation=3)
    assert not found["zeroed"].any()
    assert (found["dilated"].sum(axis=(2, 3)) == 22 * 22).all()
    numbered = np.arange(len(samples), dtype=np.uint8)[:, None, None, None] * np.ones_like(masks)
    donors = samples.iloc[ablation.changed_masks(numbered, samples)["swapped"][:, 0, 0, 0]]
    assert (donors["vertebra"].to_numpy() == samples["vertebra"].to_numpy()).all()
    assert (donors[UID].to_numpy() != samples[UID].to_numpy()).all()
    assert donors[[UID, "vertebra"]].drop_duplicates().shape[0] == len(samples)  # each gives once
    with pytest.raises(ValueError, match=r"No other study has a mask of 'C2'"):
        ablation.changed_masks(masks[:1], samples[:1])
    with pytest.raises(ValueError, match="1 pixel or more; found 0"):
        ablation.changed_masks(masks, samples, dilation=0)


def test_the_own_mask_gives_the_runs_probabilities_and_maps_and_another_its_own(toy, masks):
    run, samples, packed = toy
    truth = np.zeros_like(masks)
    truth[:, 1:3, 10:22, 14:18] = 1
    given = {"same": masks, "zeroed": np.zeros_like(masks)}
    rows = ablation.ablate_masks(run, samples, packed, given, truth=truth, batch_size=5)
    assert rows["change"].unique().tolist() == ["own", "same", "zeroed"]
    own, same, zeroed = (
        rows[rows["change"] == name].reset_index(drop=True) for name in ("own", "same", "zeroed")
    )
    pd.testing.assert_frame_equal(own[[UID, "vertebra", "label"]], samples[[UID, "vertebra", "label"]])
    expected = predict(run, samples, packed, split="train")["probability"]
    np.testing.assert_allclose(own["probability"], expected, atol=1e-6)
    np.testing.assert_allclose(same["probability"], own["probability"], atol=1e-7)
    assert not np.allclose(zeroed["probability"], own["probability"], atol=1e-5)
    # maps of fractured vertebrae alone, those of `map_sequences`
    broken = samples["label"] == 1
    assert (own["similarity"].notna() == broken).all()
    assert own["similarity"][broken].tolist() == pytest.approx([1.0] * broken.sum())
    maps = map_sequences(run, samples[broken], packed)
    areas = [roc_auc_score(t.ravel(), m.ravel()) for t, m in zip(truth[broken], maps.pixels(), strict=True)]
    np.testing.assert_allclose(own["map_auroc"][broken], areas, atol=1e-3)
    # by another way: the backbone does not see the mask, so that maps change by the gradient's weights alone
    assert (zeroed["similarity"][broken] <= 1).all()
    assert not np.allclose(zeroed["similarity"][broken], 1)
    by_pixels = ablation.ablate_masks(run, samples, packed, {}, truth=truth, method="gradient_input")
    maps = map_sequences(run, samples[broken], packed, method="gradient_input")
    areas = [roc_auc_score(t.ravel(), m.ravel()) for t, m in zip(truth[broken], maps.values, strict=True)]
    np.testing.assert_allclose(by_pixels["map_auroc"][broken], areas, atol=1e-3)
    bare = ablation.ablate_masks(run, samples, packed, {"zeroed": given["zeroed"]}, method=None)
    assert bare["similarity"].isna().all()
    np.testing.assert_allclose(bare["probability"], [*own["probability"], *zeroed["probability"]], atol=1e-6)
    assert rank_correlation(maps.values, maps.values) == pytest.approx(1)


def test_masks_of_another_shape_are_refused(toy, masks):
    run, samples, packed = toy
    with pytest.raises(ValueError, match=r"found \{'short': \(.*, 4, 32, 32\)\}.* same samples"):
        ablation.ablate_masks(run, samples, packed, {"short": masks[:, :4]})
    with pytest.raises(ValueError, match="'the truth'"):
        ablation.ablate_masks(run, samples, packed, {}, truth=masks[..., :16])


def test_what_no_mask_and_no_neighbour_can_be_is_refused(toy, masks):
    _, samples, _ = toy
    for odd, says in ((masks[:1], "of .* samples; found"), (masks[:, 0], r"\(N, T, H, W\)")):
        with pytest.raises(ValueError, match=says):
            ablation.changed_masks(odd, samples)
    with pytest.raises(ValueError, match=r"whole pixels, 1 pixel or more; found 1\.5"):
        ablation.changed_masks(masks, samples, dilation=1.5)
    table = pd.DataFrame({UID: "1.1", "vertebra": ["C1", "C2"], "label": [0, 1], "probability": 0.5})
    for odd, says in (
        (table.assign(vertebra="image"), "Neighbours are vertebrae, C1 … C7; found 'image'"),
        (table.assign(label=[0, np.nan]), "Labels are 0 or 1; 1 are not: "),
        (table.assign(probability=[0.5, np.nan]), "1 of 2 probabilities are missing"),
    ):
        with pytest.raises(ValueError, match=says):
            ablation.neighbour_effect(odd, threshold=0.5)
    for threshold in (np.nan, 7):
        with pytest.raises(ValueError, match="A threshold must be in"):
            ablation.neighbour_effect(table, threshold=threshold)


def test_a_table_without_the_own_masks_is_refused():
    rows = rows_of("zeroed", [0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0])
    with pytest.raises(ValueError, match="0 samples with their own mask; not so 'zeroed'"):
        ablation.mask_ablation_table(rows)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) 'map_auroc'"):
        ablation.mask_ablation_table(rows.drop(columns="map_auroc"))


def rows_of(change, probability, labels, similarity=np.nan, map_auroc=np.nan):
    table = pd.DataFrame({UID: ["1.1", "1.2", "1.3", "1.4"], "vertebra": "C5", "label": labels})
    return table.assign(change=change, probability=probability, similarity=similarity, map_auroc=map_auroc)


def test_the_table_holds_differences_from_the_own_mask():
    labels = [1, 1, 0, 0]
    own = rows_of("own", [0.9, 0.6, 0.5, 0.1], labels, [1, 1, np.nan, np.nan], [0.9, 0.8, np.nan, np.nan])
    other = rows_of(
        "zeroed", [0.5, 0.4, 0.6, 0.1], labels, [0.5, 0.7, np.nan, np.nan], [0.6, 0.5, np.nan, np.nan]
    )
    table = ablation.mask_ablation_table(pd.concat([own, other])).set_index(["vertebra", "metric"])
    assert set(table["change"]) == {"zeroed"}
    for vertebra in ("all", "C5"):
        value = table.loc[vertebra]["value"]
        assert value["probability_fractured"] == pytest.approx(-0.3)
        assert value["probability_intact"] == pytest.approx(0.05)
        assert value["map_auroc"] == pytest.approx(-0.3)
        assert value["map_similarity"] == pytest.approx(-0.4)
        assert value["auroc"] == pytest.approx(0.5 - 1.0)
    assert table.loc[("C5", "probability_fractured"), ["own", "n"]].tolist() == [pytest.approx(0.75), 2]
    assert np.isnan(table.loc[("C4", "auroc"), "value"])
    assert table.loc[("C5", "map_auroc"), "low"] == pytest.approx(-0.3)  # both patients lose as much


def test_neighbours_are_those_next_to_it_in_the_same_study():
    table = pd.DataFrame(
        {UID: ["1.1"] * 7 + ["1.2"] * 7, "vertebra": [*VERTEBRAE, *VERTEBRAE[::-1]], "label": 0}
    )
    table.loc[[0, 3, 4], "label"] = 1  # C1, C4 and C5 of the first
    beside = pd.Series(ablation.broken_neighbour(table)).groupby(table[UID])
    assert [VERTEBRAE[n] for n in np.flatnonzero(beside.get_group("1.1"))] == ["C2", "C3", "C4", "C5", "C6"]
    assert not beside.get_group("1.2").any()
    mixed = table.sample(frac=1, random_state=0)
    np.testing.assert_array_equal(
        ablation.broken_neighbour(mixed), pd.Series(ablation.broken_neighbour(table))[mixed.index]
    )


def simulated(effect, patients=300, seed=0):
    """False alarms that are independent of all but a broken neighbour."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({UID: np.repeat([f"1.{n}" for n in range(patients)], 7),
                          "vertebra": [*VERTEBRAE] * patients})  # fmt: skip
    table["label"] = (rng.random(len(table)) < 0.08).astype(int)
    beside = ablation.broken_neighbour(table)
    alarm = rng.random(len(table)) < np.where(beside, 0.1 + effect, 0.1)
    return table.assign(probability=np.where(alarm, 0.9, 0.2)), beside


def test_shares_with_and_without_a_broken_neighbour_are_those_of_the_rows():
    table, beside = simulated(0.3)
    found = ablation.neighbour_effect(table, threshold=0.5).set_index(["vertebra", "neighbour"])
    intact, alarm = (table["label"] == 0).to_numpy(), (table["probability"] >= 0.5).to_numpy()
    for name, group in (("broken", beside), ("intact", ~beside)):
        row = found.loc[("all", name)]
        assert row["value"] == pytest.approx(alarm[intact & group].mean())
        assert (row["n"], row["alarms"]) == ((intact & group).sum(), (alarm & intact & group).sum())
        assert row["low"] < row["value"] < row["high"]
    at_c4 = intact & (table["vertebra"] == "C4").to_numpy()
    assert found.loc[("C4", "broken"), "value"] == pytest.approx(alarm[at_c4 & beside].mean())
    assert len(found) == 8 * 3


@pytest.mark.parametrize("effect", [0.0, 0.3])
def test_the_interval_of_the_difference_holds_the_true_effect(effect):
    tables = [simulated(effect, patients=150, seed=seed)[0] for seed in range(20)]
    found = [ablation.neighbour_effect(table, threshold=0.5).iloc[2] for table in tables]
    assert {(row["vertebra"], row["neighbour"]) for row in found} == {("all", "difference")}
    held = sum(row["low"] <= effect <= row["high"] for row in found)
    assert held >= 17  # of 20; 19 are expected
    assert sum(row["low"] > 0 for row in found) == (20 if effect else pytest.approx(0.5, abs=1.5))


def test_who_counts_as_exposed_may_be_given():
    table, beside = simulated(0.3, patients=40)
    given = ablation.neighbour_effect(table, threshold=0.5, exposed=~beside).set_index(
        ["vertebra", "neighbour"]
    )
    own = ablation.neighbour_effect(table, threshold=0.5).set_index(["vertebra", "neighbour"])
    assert given.loc[("all", "broken"), "value"] == own.loc[("all", "intact"), "value"]
    none = ablation.neighbour_effect(table, threshold=0.5, exposed=np.zeros(len(table), bool))
    assert none[none["neighbour"] == "broken"]["value"].isna().all()
    with pytest.raises(ValueError, match=r"one value a row, 280; found \(3,\)"):
        ablation.neighbour_effect(table, threshold=0.5, exposed=[True, False, True])
    with pytest.raises(ValueError, match="probability"):
        ablation.neighbour_effect(table.drop(columns="probability"), threshold=0.5)
