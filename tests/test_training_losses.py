import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import RSNA, needs_rsna
from torchvision.ops import sigmoid_focal_loss

from cspine_helpers.labels import VERTEBRAE, expand, read_labels
from cspine_helpers.training import losses


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_focal_loss_and_its_gradient_equal_torchvisions(alpha, gamma):
    generator = torch.Generator().manual_seed(1)
    logit = (6 * torch.randn(200, generator=generator)).requires_grad_()
    label = (torch.rand(200, generator=generator) < 0.3).float()
    expected = sigmoid_focal_loss(logit, label, alpha=alpha, gamma=gamma, reduction="mean")
    (wanted,) = torch.autograd.grad(expected, logit)
    found = losses.focal_loss(logit, label, alpha=alpha, gamma=gamma)
    (gradient,) = torch.autograd.grad(found, logit)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, wanted)


def test_focal_loss_by_hand():
    # p = 0.5 for a positive and a negative: cross-entropy ln 2, factor 0.5² = 0.25
    found = losses.focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), alpha=0.8, gamma=2)
    assert found.item() == pytest.approx((0.8 + 0.2) / 2 * 0.25 * math.log(2))


def test_weights_multiply_each_example_and_are_not_normalised_away():
    logit, label = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    one, other = (losses.focal_loss(logit[i : i + 1], label[i : i + 1], alpha=0.7) for i in (0, 1))
    found = losses.focal_loss(logit, label, alpha=0.7, weight=torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(found, (3 * one + 5 * other) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [torch.uint8, torch.int64, torch.bool])
def test_half_precision_and_whole_labels_are_taken_as_float32(dtype, whole):
    logit = torch.linspace(-9, 9, 64).to(dtype)
    label = torch.arange(64) % 3 == 0
    expected = losses.focal_loss(logit.double().float(), label.float(), alpha=0.3)
    torch.testing.assert_close(losses.focal_loss(logit, label.to(whole), alpha=0.3), expected, rtol=0, atol=0)


def test_focal_loss_stays_finite_at_extreme_logits():
    logit = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = losses.focal_loss(logit, torch.tensor([1.0, 0.0, 0.0, 1.0]), alpha=0.9)
    loss.backward()
    assert loss.isfinite()
    assert logit.grad is not None
    assert logit.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2,), (3,)), {"alpha": 0.5}, r"found \[\(2,\), \(3,\)\]"),
        (((0,), (0,)), {"alpha": 0.5}, "not empty"),
        (((2,), (2,)), {"alpha": 1.0}, "found alpha = 1.0"),
        (((2,), (2,)), {"alpha": 0.0}, "found alpha = 0.0"),
        (((2,), (2,)), {"alpha": 0.5, "gamma": -1}, "gamma = -1"),
        (((2,), (2,)), {"alpha": 0.5, "weight": torch.ones(1)}, r"found \[\(1,\), \(2,\)\]"),
    ],
)
def test_focal_loss_refuses(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        losses.focal_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), **options)


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 3.5}, {"alpha": 0.1}, {}])
def test_slice_loss_is_the_focal_loss_of_known_slices_with_the_options_given(options):
    generator = torch.Generator().manual_seed(2)
    logit, truth = (
        torch.randn(4, 6, generator=generator),
        (torch.rand(4, 6, generator=generator) < 0.4).float(),
    )
    expected = sigmoid_focal_loss(logit, truth, **{"alpha": 0.5, "gamma": 2.0} | options, reduction="mean")
    torch.testing.assert_close(losses.slice_loss(logit, truth, **options), expected)


def test_slice_loss_counts_only_known_slices():
    logit = torch.tensor([[0.5, -1.0, 9.0], [2.0, 3.0, -4.0]], requires_grad=True)
    truth = torch.tensor([[1.0, 0.0, math.nan], [math.nan] * 3])
    loss = losses.slice_loss(logit, truth, alpha=0.6)
    torch.testing.assert_close(loss, losses.focal_loss(logit[0, :2], truth[0, :2], alpha=0.6))
    loss.backward()
    assert logit.grad is not None
    assert (logit.grad != 0).tolist() == [[True, True, False], [False] * 3]


def test_slice_loss_without_truth_is_zero_with_a_gradient():
    logit = torch.randn(2, 3, requires_grad=True)
    loss = losses.slice_loss(logit, torch.full((2, 3), math.nan))
    loss.backward()
    assert loss.item() == 0
    assert logit.grad is not None
    assert logit.grad.tolist() == torch.zeros(2, 3).tolist()


def test_slice_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        losses.slice_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_alpha_is_one_minus_prevalence_of_the_known():
    assert losses.balanced_alpha(np.array([1, 0, 0, 0])) == 0.75
    assert losses.balanced_alpha(np.array([1, 0, np.nan, 0, 0])) == 0.75
    assert losses.balanced_alpha(pd.Series([0, 1])) == 0.5
    assert losses.balanced_alpha(pd.Series([0, None, 1, 0, 0], dtype=object)) == 0.75


@pytest.mark.parametrize("labels", [[0, 0], [1], [0, 1, 2], []])
def test_alpha_is_refused_where_it_is_undefined(labels):
    with pytest.raises(ValueError, match="needs both labels"):
        losses.balanced_alpha(np.array(labels, dtype=float))


def test_a_vertebra_half_as_often_fractured_weighs_twice():
    samples = pd.DataFrame({"vertebra": np.repeat(VERTEBRAE, 4), "label": [1, 0, 0, 0] * 6 + [1, 1, 0, 0]})
    assert losses.vertebra_weights(samples) == dict.fromkeys(VERTEBRAE[:6], 2.0) | {"C7": 1.0}


def test_vertebrae_without_fractures_are_named():
    samples = pd.DataFrame(
        {"vertebra": np.repeat(VERTEBRAE[:6], 2), "label": [1, 0] * 2 + [0, 0] + [1, 0] * 3}
    )
    with pytest.raises(ValueError, match="samples of C3, C7"):
        losses.vertebra_weights(samples)


@needs_rsna
def test_vertebra_weights_of_the_rsna_table():
    table = read_labels(RSNA / "train.csv")
    found = losses.vertebra_weights(expand(table, list(table["StudyInstanceUID"])))
    assert [round(weight, 2) for weight in found.values()] == [2.69, 1.38, 5.38, 3.64, 2.43, 1.42, 1.0]
