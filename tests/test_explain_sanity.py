"""Randomised layers, against networks that depend on their weights, and filters that do not."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import sobel
from scipy.stats import spearmanr
from test_model_classifier import build
from torch import nn

from cspine_helpers.explain import sanity
from cspine_helpers.explain.maps import compute_maps


def pictures(n=6, size=16, seed=0):
    """Noise with one bright square each, and where it is."""
    rng = np.random.default_rng(seed)
    images, truth = rng.normal(0, 1, (n, 2, size, size)), np.zeros((n, size, size), np.uint8)
    for image, true in zip(images, truth, strict=True):
        y, x = rng.integers(2, size - 5, 2)
        image[0, y : y + 3, x : x + 3] += 4
        image[1] -= 2 * np.eye(size)  # an edge that means nothing
        true[y : y + 3, x : x + 3] = 1
    return torch.from_numpy(images).float(), truth


def finder():
    """Sees the first channel, and nothing of the second."""
    network = nn.Sequential()
    network.backbone = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.ReLU())
    network.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    with torch.no_grad():
        network.backbone[0].weight[:, 0] = torch.linspace(-1, 1, 8)[:, None, None] / 9
        network.backbone[0].weight[:, 1] = 0.0
        network.head[2].weight[:] = torch.linspace(-1, 1, 8)
    return network.eval()


IMAGES, TRUTH = pictures()
PATIENTS = list("aabbcd")


def grad_cam(network):
    return compute_maps(
        network, IMAGES, lambda out: out[:, 0], layer="backbone.0", method="layer_cam"
    ).numpy()


def edges(network):
    return np.hypot(*(sobel(IMAGES[:, 0].numpy(), axis) for axis in (-2, -1)))


@pytest.fixture(scope="module")
def rows():
    return sanity.cascade(
        finder(),
        {"grad_cam": grad_cam, "edges": edges},
        truth=TRUTH,
        seeds=range(4),
        steps=["head", "backbone"],
    )


def test_parts_run_from_the_head_down_and_have_weights():
    found = sanity.parts(build())
    assert found[0] == "head"
    assert found[-1] == "backbone.conv_stem"
    assert found.index("lstm") < found.index("backbone.blocks.1") < found.index("backbone.blocks.0")
    assert "dropout" not in found
    model, seen = build(), set()
    for name in found:
        seen |= {id(each) for each in model.get_submodule(name).parameters()}
    assert seen == {id(each) for each in model.parameters()}  # nothing is left as it was


def test_a_part_keeps_its_values_in_another_order_and_the_rest_stays():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = sanity.randomised(model, ["head", "backbone.blocks.0"], seed=3).state_dict()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        touched = name.startswith(("head", "backbone.blocks.0"))
        assert torch.equal(after[name].flatten().sort().values, value.flatten().sort().values)
        if value.unique().numel() > 8:
            assert torch.equal(after[name], value) != touched
    alone = sanity.randomised(model, ["head"], seed=3).state_dict()
    torch.testing.assert_close(alone["head.weight"], after["head.weight"], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"FractureClassifier has no part 'haed'\. sanity\.parts"):
        sanity.randomised(model, ["haed"])


def test_what_depends_on_the_weights_passes_and_an_edge_filter_fails(rows):
    found = sanity.passes(rows, PATIENTS).set_index("method")
    assert found["passes"].to_dict() == {"grad_cam": True, "edges": False}
    assert found.loc["edges", ["similarity", "lost", "lost_low"]].tolist() == pytest.approx([1, 0, 0])
    assert found.loc["grad_cam", "auroc"] > 0.9
    # similarity alone does not do: what keeps its knowledge has not forgotten, whatever the limit
    assert not sanity.passes(rows, PATIENTS, limit=1.0).set_index("method").loc["edges", "passes"]
    assert not sanity.passes(rows, PATIENTS, limit=0.0)["passes"].any()


def test_the_table_averages_seeds_within_a_case_and_counts_patients(rows):
    table = sanity.sanity_table(rows, PATIENTS).set_index(["method", "step"])
    assert table.loc[("grad_cam", 0), ["layer", "similarity"]].tolist() == ["trained", pytest.approx(1)]
    assert table.loc[("edges", 2), "layer"] == "backbone"
    its = rows[(rows["method"] == "grad_cam") & (rows["step"] == 1)]
    assert table.loc[("grad_cam", 1), "similarity"] == pytest.approx(its["similarity"].mean())
    assert (table["cases"] == 6).all()
    low, high = table["auroc_low"], table["auroc_high"]
    assert ((low <= table["auroc"]) & (table["auroc"] <= high)).all()


def test_without_truth_the_auroc_is_unknown_and_similarity_decides():
    rows = sanity.cascade(finder(), {"edges": edges}, steps=["head"], seeds=[0])
    assert rows["auroc"].isna().all()
    assert not sanity.passes(rows, PATIENTS)["passes"].any()
    with pytest.raises(ValueError, match="'edges' are of one step"):
        sanity.passes(rows[rows["step"] == 0], PATIENTS)
    with pytest.raises(ValueError, match=r"between 0 and 1; found 1\.5"):
        sanity.passes(rows, PATIENTS, limit=1.5)


def test_rank_correlation_is_scipys_and_none_of_a_constant():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (2, 4, 3, 6, 6)).astype(np.float32)  # many ties
    second[3] = 0.25
    found = sanity.rank_correlation(first, second)
    expected = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first[:3], second[:3], strict=True)]
    np.testing.assert_allclose(found, [*expected, 0], atol=1e-12)
    with pytest.raises(ValueError, match=r"cell by cell.*\(4, 3, 6, 6\) and \(3, 3, 6, 6\)"):
        sanity.rank_correlation(first, second[:3])


def test_agreement_is_measured_on_the_coarsest_grid():
    rng = np.random.default_rng(1)
    coarse = rng.random((3, 2, 4, 4)).astype(np.float32)
    fine = coarse.repeat(4, axis=2).repeat(4, axis=3)
    fine[..., ::2, :] += 0.125  # averages out, alike in each cell
    fine[..., 1::2, :] -= 0.125
    table = sanity.agreement_table(
        sanity.agreement(
            {"coarse": coarse, "fine": fine, "reversed": -coarse, "zero": 0 * coarse}, top=0.125
        ),
        ["a", "b", "c"],
    ).set_index(["first", "second"])
    assert table.loc[("coarse", "fine"), ["value", "iou"]].tolist() == pytest.approx([1, 1])
    assert table.loc[("coarse", "reversed"), ["value", "iou"]].tolist() == pytest.approx([-1, 0])
    assert table.loc[("coarse", "zero"), ["value", "iou"]].tolist() == [0, 0]
    assert len(table) == 6


def test_iou_of_tops_by_hand():
    first, second = np.arange(20.0).reshape(1, 1, 4, 5), np.roll(np.arange(20.0), 2).reshape(1, 1, 4, 5)
    rows = sanity.agreement({"first": first, "second": second}, top=0.2)  # 16–19 and 18, 19, 0, 1 → places
    assert rows["iou"].tolist() == pytest.approx([len({16, 17, 18, 19} & {18, 19, 0, 1}) / 6])


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"one": np.zeros((2, 1, 4, 4))}, "Two maps or more"),
        ({"one": np.zeros((2, 1, 4, 4)), "other": np.zeros((3, 1, 4, 4))}, r"\(3, 1, 4, 4\).* same samples"),
        ({"one": np.zeros((2, 1, 4, 4)), "other": np.zeros((2, 1, 6, 6))}, "do not divide"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        sanity.agreement(maps)
    with pytest.raises(ValueError, match=r"between 0 and 1; found 0\."):
        sanity.agreement(maps, top=0.0)


def test_maps_that_are_no_numbers_have_forgotten_nothing():
    """A network that overflows when its weights are shuffled must not pass for one that depends on them."""
    maps = np.random.default_rng(0).random((2, 1, 4, 4))
    broken = iter([maps, maps * np.nan])
    with pytest.raises(ValueError, match="NaN or infinite values, which have no rank"):
        sanity.cascade(finder(), {"odd": lambda network: next(broken)}, steps=["head"], seeds=[0])
    with pytest.raises(ValueError, match="have no rank"):
        sanity.agreement({"a": maps, "b": maps * np.inf})


def test_tables_of_other_cases_or_none_are_refused(rows):
    with pytest.raises(ValueError, match="A cascade needs a method or more; found none"):
        sanity.cascade(finder(), {})
    each = sanity.agreement({name: np.random.default_rng(0).random((2, 1, 4, 4)) for name in "ab"})
    for measured, table in (
        (sanity.sanity_table, rows),
        (sanity.passes, rows),
        (sanity.agreement_table, each),
    ):
        with pytest.raises(ValueError, match=r"Each case has a patient; found \d+ cases, .* shape \(1,\)"):
            measured(table, ["p"])
        with pytest.raises(ValueError, match="The table of cases lacks the column"):
            measured(pd.DataFrame(), [])


def test_an_interval_of_a_mean_needs_two_patients():
    rows = pd.DataFrame({"first": "a", "second": "b", "case": [0, 1], "spearman": [0.2, 0.4], "iou": 0.5})
    alone = sanity.agreement_table(rows, ["p", "p"]).iloc[0]
    assert alone["value"] == pytest.approx(0.3)
    assert np.isnan(alone["low"])
