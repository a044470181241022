import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from toy_cohort import tiny_model

from cspine_helpers.labels import UID, VERTEBRAE
from cspine_helpers.model.classifier import ClassifierOutput, FractureClassifier
from cspine_helpers.training.config import TrainConfig, adamw, best_epoch, learning_rate
from cspine_helpers.training.losses import Loss, focal_loss, slice_loss
from cspine_helpers.training.slices import SliceClassifier

EMPTY = pd.DataFrame({"validation_average_precision": []})


def history(recalls, scores) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "epoch": range(1, len(recalls) + 1),
            "validation_objective": recalls,
            "validation_average_precision": scores,
        }
    )


@pytest.mark.parametrize(
    ("recalls", "scores", "expected"),
    [
        ([0.2, 0.7, 0.5], [0.9, 0.1, 0.9], 2),  # what the rule is for, such as recall
        ([0.7, 0.2, 0.7], [0.4, 0.9, 0.5], 3),  # ties: average precision
        ([0.7, 0.7, 0.7], [0.5, 0.5, 0.5], 1),  # then the earlier epoch
        ([math.nan] * 3, [0.2, 0.4, 0.3], 2),  # no threshold anywhere: average precision
        ([math.nan, 0.1, math.nan], [0.9, 0.2, 0.3], 2),  # a threshold beats none
        ([math.nan, -2.0, -1.5], [0.9, 0.2, 0.3], 3),  # also where it costs
    ],
)
def test_the_best_epoch_reaches_most_of_the_rules_objective_then_average_precision(recalls, scores, expected):
    assert best_epoch(history(recalls, scores)) == expected


def test_the_last_epoch_is_kept_where_that_is_asked():
    assert best_epoch(history([0.2, 0.7, 0.5], [0.9, 0.1, 0.9]), "last") == 3


def test_the_rate_rises_in_the_warm_up_and_falls_with_the_cosine():
    config = TrainConfig(epochs=11, warmup_epochs=1, learning_rate=0.1)
    rates = [learning_rate(config, position, EMPTY) for position in (0.25, 0.5, 1.0, 6.0, 11.0)]
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.1, 0.05, 0.0], atol=1e-12)
    falling = [learning_rate(config, position, EMPTY) for position in np.linspace(1, 11, 50)]
    assert (np.diff(falling) < 0).all()


def test_training_may_start_without_a_warm_up():
    assert learning_rate(TrainConfig(epochs=2, warmup_epochs=0, learning_rate=0.1), 0.0, EMPTY) == 0.1


@pytest.mark.parametrize(("patience", "factor"), [(3, 0.5), (2, 0.1), (1, 0.9)])
def test_the_plateau_schedule_lowers_the_rate_as_torch_does(patience, factor):
    settings = {"plateau_patience": patience, "plateau_factor": factor}
    config = TrainConfig(epochs=20, learning_rate=0.8, schedule="plateau", **settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    # torch counts the epochs that it still bears; it lowers the rate at the one after
    theirs = ReduceLROnPlateau(optimizer, "max", factor=factor, patience=patience - 1, threshold=0)
    scores = [0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.2, 0.2, 0.6, 0.5, 0.5, 0.5, 0.7, 0.1]
    for done, score in enumerate(scores, start=1):
        theirs.step(score)
        found = learning_rate(config, done, history([0.0] * done, scores[:done]))
        assert found == pytest.approx(optimizer.param_groups[0]["lr"])


def test_the_plateau_schedule_halves_the_rate_after_three_epochs_without_progress():
    config = TrainConfig(epochs=20, learning_rate=0.8, schedule="plateau")
    scores = [0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.2, 0.2, 0.6, 0.5]
    found = []
    for done in range(len(scores) + 1):
        done_rows = history([0.0] * done, scores[:done])
        found.append(learning_rate(config, max(done, 1), done_rows))
    assert found == [0.8] * 5 + [0.4] * 3 + [0.2] * 3


def samples(labels) -> pd.DataFrame:
    return pd.DataFrame({UID: "1", "vertebra": np.resize(VERTEBRAE, len(labels)), "label": labels})


def test_the_loss_takes_its_weights_from_the_training_split():
    labels = np.zeros(70, dtype=int)
    labels[:14] = 1  # two of ten at every vertebra
    labels[14:18] = 1  # three of ten at C1 … C4
    truth = np.zeros((70, 5))
    truth[:10, 0] = 1
    loss = Loss.of(samples(labels), truth, TrainConfig())
    assert loss.alpha == pytest.approx(1 - 18 / 70)
    assert loss.slice_alpha == pytest.approx(1 - 10 / 350)
    assert loss.vertebra_weights == pytest.approx((1, 1, 1, 1, 1.5, 1.5, 1.5))
    flat = Loss.of(samples(labels), truth, TrainConfig(vertebra_weights="equal", sampling="balanced"))
    assert flat.vertebra_weights == (1.0,) * 7
    assert (flat.alpha, flat.slice_alpha) == (0.5, pytest.approx(1 - 10 / 90 / 2))
    assert Loss.of(samples(labels), np.full((70, 5), np.nan), TrainConfig()).slice_alpha == 0.5


def test_the_loss_takes_its_weights_as_weighted_sampling_shows_the_samples():
    labels, truth = (np.arange(70) < 14).astype(int), np.full((70, 2), np.nan)
    labels[14:17] = 1  # three of ten at C1 … C3, two of ten elsewhere
    truth[0], truth[7], truth[69] = [1, 1], [1, 0], [0, 0]  # C1, C1, and C7 without a fracture
    loss = Loss.of(samples(labels), truth, TrainConfig(sampling="weighted"))
    assert (loss.alpha, loss.vertebra_weights) == (0.5, (1.0,) * 7)
    # drawn 1/3 as often as others of C1, and 1/8 as often as others of C7
    assert loss.slice_alpha == pytest.approx(1 - (3 / 3) / (4 / 3 + 2 / 8))


def test_weights_of_the_settings_take_the_place_of_the_training_splits():
    labels, own = np.array([1, 1, 0, 1, 1, 1, 1]), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5)
    config = TrainConfig(alpha=0.3, gamma=1.0, vertebra_weights=own)
    loss = Loss.of(samples(labels), np.full((7, 5), np.nan), config)
    assert (loss.alpha, loss.gamma, loss.vertebra_weights) == (0.3, 1.0, own)
    assert TrainConfig(vertebra_weights=list(own)) == replace(TrainConfig(), vertebra_weights=own)


def test_a_vertebra_without_fractures_is_named_unless_weights_are_off():
    labels = np.array([1, 1, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="C3"):
        Loss.of(samples(labels), np.full((7, 5), np.nan), TrainConfig())
    Loss.of(samples(labels), np.full((7, 5), np.nan), TrainConfig(vertebra_weights="equal"))


@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_the_loss_is_the_focal_loss_plus_the_weighted_slice_term(gamma):
    generator = torch.Generator().manual_seed(0)
    logit, slices = torch.randn(4, generator=generator), torch.randn(4, 5, generator=generator)
    batch = {
        "label": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "vertebra": torch.tensor([0, 6, 2, 2]),
        "slice_truth": torch.tensor([[0, 1, 1, 0, 0], [0] * 5, [torch.nan] * 5, [torch.nan] * 5]),
    }
    settings = {"alpha": 0.9, "slice_alpha": 0.8, "slice_weight": 0.5, "gamma": gamma}
    loss = Loss(**settings, vertebra_weights=(1, 2, 3, 4, 5, 6, 7))
    output = ClassifierOutput(logit, torch.full((4, 5), 0.2), slices)
    weight = torch.tensor([1.0, 7.0, 3.0, 3.0])
    vertebrae = focal_loss(logit, batch["label"], alpha=0.9, gamma=gamma, weight=weight)
    expected = vertebrae + 0.5 * slice_loss(slices, batch["slice_truth"], alpha=0.8, gamma=gamma)
    assert loss(output, batch) == pytest.approx(expected.item())
    assert replace(loss, slice_weight=0.0)(output, batch) == pytest.approx(vertebrae.item())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"warmup_epochs": 20},
        {"schedule": "step"},
        {"accumulate": 0},
        {"clip_norm": 0.0},
        {"mixed_precision": "int8"},
        {"patience": 0},
        {"slice_weight": -0.1},
        {"sampling": "all"},
        {"seed": -1},
        {"workers": -1},
        {"gamma": -0.5},
        {"alpha": 1.0},
        {"vertebra_weights": "rare"},
        {"vertebra_weights": (1.0,) * 6},
        {"vertebra_weights": (1.0,) * 6 + (0.0,)},
        {"plateau_patience": 0},
        {"plateau_factor": 1.0},
        {"freeze_epochs": -1},
        {"freeze_epochs": 21},
        {"backbone_rate": 0.0},
        {"ema": 1.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_impossible_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        TrainConfig(**wrong)


def test_all_impossible_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"epochs = 0 .*seed = -1"):
        TrainConfig(epochs=0, seed=-1, warmup_epochs=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slice_epochs": -1},
        {"slice_epochs": 1.5},
        {"slice_batch_size": 0},
        {"slice_learning_rate": math.inf},
        {"learning_rate": math.inf},
        {"epochs": 2.5},
        {"gradient_checkpointing": 1},
    ],
)
def test_settings_of_either_stage_that_cannot_work_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_weight_decay_spares_biases_and_norms():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    decayed, spared = adamw(layer, 0.1, 0.5).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)


def test_parameter_groups_partition_the_parameters():
    model = FractureClassifier(tiny_model())
    for network in (model, SliceClassifier(model)):
        groups = adamw(network, 0.1, 0.5, backbone=model.backbone, backbone_rate=0.2).param_groups
        grouped = [parameter for group in groups for parameter in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == set(network.parameters())
        slow = {parameter for group in groups if group["share"] == 0.2 for parameter in group["params"]}
        assert slow == set(model.backbone.parameters())
        assert {group["share"] for group in groups} == {0.2, 1.0}
        decayed = {parameter for group in groups if group["weight_decay"] for parameter in group["params"]}
        assert decayed == {parameter for parameter in network.parameters() if parameter.ndim > 1}


def test_a_slice_term_of_no_weight_still_reaches_the_slice_head():
    slices = torch.zeros(1, 2, requires_grad=True)
    loss = Loss(alpha=0.5, slice_alpha=0.5, slice_weight=0.0, vertebra_weights=(1.0,) * 7)
    batch = {"label": torch.ones(1), "vertebra": torch.tensor([0]), "slice_truth": torch.ones(1, 2)}
    loss(
        ClassifierOutput(torch.zeros(1, requires_grad=True), torch.full((1, 2), 0.5), slices), batch
    ).backward()
    assert slices.grad is not None
    assert (slices.grad == 0).all()


@pytest.mark.parametrize("wrong", [{"seed": 2**63}, {"seed": 10**30}, {"workers": -1}, {"batch_size": 0},
                                   {"learning_rate": "fast"}, {"seed": None}, {"epochs": [1]}])  # fmt: skip
def test_what_torch_would_stumble_over_later_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match=f"TrainConfig cannot have .*{next(iter(wrong))}"):
        TrainConfig(**wrong)
    torch.manual_seed(TrainConfig(seed=2**63 - 1).seed)
