import math
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn import functional

from cspine_helpers.radiographs.losses import (
    LossConfig,
    RadiographLoss,
    dice_loss,
    highest_cells,
    pixel_loss,
    presence_loss,
    share_of_cells,
)
from cspine_helpers.radiographs.model import RadiographOutput

LN2 = math.log(2)
ALL = torch.tensor([True, True])


def batch_of(size=4, *, seed=0, dtype=torch.float32):
    """An output and a batch: fractured and outlined, intact, fractured nobody knows where, intact."""
    generator = torch.Generator().manual_seed(seed)
    logit = torch.randn(size, generator=generator, dtype=dtype, requires_grad=True)
    mask_logit = torch.randn(size, 4, 3, generator=generator, dtype=dtype, requires_grad=True)
    mask = torch.zeros(size, 4, 3, dtype=torch.uint8)
    mask[0, 1:3, :2] = torch.tensor([[255, 51], [102, 255]], dtype=torch.uint8)
    batch = {
        "label": torch.tensor([1.0, 0.0, 1.0, 0.0])[:size],
        "mask": mask,
        "annotated": torch.tensor([True, True, False, True])[:size],
    }
    return RadiographOutput(logit, mask_logit), batch


def loss_of(output, batch, **settings):
    off = {"presence": 0.0, "pixels": 0.0, "dice": 0.0, "evidence": 0.0}
    return RadiographLoss(LossConfig(**off | settings), batch["label"].numpy())(output, batch)


def test_presence_by_hand():
    logit, label = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    entropy = math.log(1 + math.exp(-2))
    assert presence_loss(logit, label).item() == pytest.approx((2 * LN2 + entropy) / 3)
    weighted = presence_loss(logit, label, positive_weight=4.0)
    assert weighted.item() == pytest.approx((4 * LN2 + LN2 + 4 * entropy) / 3)
    smooth = presence_loss(logit, label, smoothing=0.02)
    assert smooth.item() == pytest.approx((2 * LN2 + entropy + 0.02 * 2) / 3)  # ln(1+e^2) = entropy + 2


def test_presence_is_torchs_with_its_positive_weight():
    output, batch = batch_of()
    for weight in (0.3, 1.0, 7.0):
        expected = functional.binary_cross_entropy_with_logits(
            output.logit, batch["label"], pos_weight=torch.tensor(weight)
        )
        torch.testing.assert_close(
            presence_loss(output.logit, batch["label"], positive_weight=weight), expected
        )


def test_a_smoothed_presence_is_best_at_its_smoothed_label():
    logit = torch.tensor([math.log(0.98 / 0.02), -math.log(0.98 / 0.02)], requires_grad=True)
    presence_loss(logit, torch.tensor([1.0, 0.0]), positive_weight=5.0, smoothing=0.02).backward()
    torch.testing.assert_close(logit.grad, torch.zeros(2), atol=1e-6, rtol=0)


def test_cells_are_as_full_as_their_pixels():
    mask = torch.zeros(2, 8, 12, dtype=torch.uint8)
    mask[0, 3, 1:11] = 255  # a line of one pixel
    mask[1, 4:8, 8:12] = 255
    share = share_of_cells(mask, torch.zeros(2, 2, 3))
    assert share.tolist() == [
        [[3 / 16, 4 / 16, 3 / 16], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 1]],
    ]
    assert 16 * share.sum() == (mask > 0).sum()
    assert torch.equal(share_of_cells(mask, torch.zeros(2, 8, 12)), mask.float() / 255)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.zeros(2, 8, 12), "float32 of shape (2, 8, 12)"),
        (torch.zeros(2, 8, 12, dtype=torch.bool), "bool of shape (2, 8, 12)"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "uint8 of shape (2, 8, 8)"),
        (torch.zeros(1, 8, 12, dtype=torch.uint8), "uint8 of shape (1, 8, 12)"),
        (torch.zeros(2, 1, 1, dtype=torch.uint8), "uint8 of shape (2, 1, 1)"),
        (torch.zeros(2, 1, 8, 12, dtype=torch.uint8), "uint8 of shape (2, 1, 8, 12)"),
    ],
)
def test_other_masks_are_refused(mask, found):
    with pytest.raises(ValueError, match=re.escape(f"found {found} for (2, 2, 3).")):
        share_of_cells(mask, torch.zeros(2, 2, 3))


def test_dice_by_hand_over_outlined_images_alone():
    # p = 1/2 in four cells, one of them fracture: Dice = (2 · 1/2 + 1) / (2 + 1 + 1) = 1/2
    truth = torch.zeros(2, 2, 2)
    truth[0, 0, 0] = 1
    logit = torch.zeros(2, 2, 2)
    assert dice_loss(logit, truth, ALL).item() == pytest.approx(1 / 2)
    assert dice_loss(logit, truth, ALL, power=2.0).item() == pytest.approx(1 / 4)
    assert dice_loss(logit, truth, ALL, power=0.75).item() == pytest.approx(0.5**0.75)
    truth[1, 0] = 1  # two of four: (2 · 1 + 1) / (2 + 2 + 1) = 3/5
    assert dice_loss(logit, truth, ALL).item() == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert dice_loss(logit, truth, torch.tensor([True, False])).item() == pytest.approx(1 / 2)
    certain = torch.where(truth > 0, 50.0, -50.0)
    assert dice_loss(certain, truth, ALL).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0, 2.0])
def test_dice_has_finite_gradients_where_it_is_perfect_and_where_it_is_nought(power):
    truth = torch.zeros(2, 2, 2)
    truth[:, 0, 0] = 1
    for sign in (1, -1):
        logit = (sign * torch.where(truth > 0, 200.0, -200.0)).requires_grad_()
        dice_loss(logit, truth, ALL, power=power).backward()
        assert logit.grad.isfinite().all()


def test_pixels_are_the_cross_entropy_of_known_images():
    output, batch = batch_of()
    truth, known = batch["mask"].float() / 255, batch["annotated"]
    found = pixel_loss(output.mask_logit, truth, known)
    terms = functional.softplus(output.mask_logit) - truth * output.mask_logit  # −t ln p − (1−t) ln(1−p)
    torch.testing.assert_close(found, terms[[0, 1, 3]].mean())
    found.backward()
    assert output.mask_logit.grad[2].abs().max() == 0
    assert (output.mask_logit.grad[[0, 1, 3]] != 0).all()


def test_without_a_known_mask_its_terms_are_zero_with_a_gradient():
    output, batch = batch_of()
    batch["annotated"][:] = False
    loss = loss_of(output, batch, pixels=5.0, dice=1.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(output.mask_logit.grad, torch.zeros(4, 4, 3))


def test_the_highest_cells_by_hand():
    logit = torch.tensor([[[1.0, 5.0], [3.0, -2.0]], [[0.0, 0.0], [-1.0, -9.0]]])
    assert highest_cells(logit, 1).tolist() == [5.0, 0.0]
    assert highest_cells(logit, 3).tolist() == [3.0, pytest.approx(-1 / 3)]
    assert highest_cells(logit, 99).tolist() == [1.75, -2.5]


def test_evidence_lifts_a_fractures_highest_cells_and_lowers_an_intact_images():
    output, batch = batch_of()
    loss_of(output, batch, evidence=1.0, evidence_cells=2).backward()
    gradient = output.mask_logit.grad.flatten(1)
    assert (gradient != 0).sum(1).tolist() == [2] * 4
    highest = output.mask_logit.flatten(1).topk(2).indices
    assert gradient.gather(1, highest).sign().tolist() == [[-1, -1], [1, 1], [-1, -1], [1, 1]]


def test_the_loss_is_the_weighted_sum_of_its_terms():
    output, batch = batch_of()
    truth, known = batch["mask"].float() / 255, batch["annotated"]
    weights = {"presence": 0.5, "pixels": 3.0, "dice": 2.0, "evidence": 0.25}
    found = loss_of(
        output, batch, **weights, positive_weight=2.0, label_smoothing=0.1, dice_power=0.75, evidence_cells=3
    )
    options = {"positive_weight": 2.0, "smoothing": 0.1}
    expected = (
        0.5 * presence_loss(output.logit, batch["label"], **options)
        + 3 * pixel_loss(output.mask_logit, truth, known)
        + 2 * dice_loss(output.mask_logit, truth, known, power=0.75)
        + 0.25 * presence_loss(highest_cells(output.mask_logit, 3), batch["label"], **options)
    )
    torch.testing.assert_close(found, expected)
    fine = {**batch, "mask": batch["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2)}
    torch.testing.assert_close(loss_of(output, fine, **weights), loss_of(output, batch, **weights))


@pytest.mark.parametrize("term", ["presence", "pixels", "dice", "evidence"])
def test_a_weight_of_zero_turns_a_term_off(term):
    output, batch = batch_of()
    weights = {"presence": 1.0, "pixels": 5.0, "dice": 1.0, "evidence": 1.0}
    whole, alone = loss_of(output, batch, **weights), loss_of(output, batch, **{term: weights[term]})
    torch.testing.assert_close(loss_of(output, batch, **weights | {term: 0.0}), whole - alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"presence": 1.0, "positive_weight": 3.0},
        {"pixels": 5.0},
        {"dice": 1.0},
        {"dice": 1.0, "dice_power": 0.75},
        {"dice": 1.0, "dice_power": 2.0},
        {"evidence": 1.0, "evidence_cells": 4},
    ],
)
def test_gradients_are_those_of_finite_differences(settings, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # differences need its precision
    output, batch = batch_of(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: loss_of(RadiographOutput(*tensors), batch, **settings), tuple(output)
    )


def test_half_precision_is_taken_as_float32():
    output, batch = batch_of()
    weights = {"presence": 1.0, "pixels": 5.0, "dice": 1.0, "evidence": 1.0}
    half = RadiographOutput(*(each.to(torch.bfloat16) for each in output))
    found = loss_of(half, batch, **weights)
    assert found.dtype == torch.float32
    assert (
        found.item() == loss_of(RadiographOutput(*(each.float() for each in half)), batch, **weights).item()
    )


def test_a_network_without_a_mask_learns_presence():
    output, batch = batch_of()
    loss = loss_of(RadiographOutput(output.logit, None), batch, presence=2.0, pixels=5.0, label_smoothing=0.0)
    torch.testing.assert_close(loss, 2 * presence_loss(output.logit, batch["label"]))


def test_the_positive_weight_balances_the_labels_where_that_is_asked():
    labels = np.array([1, 0, 0, 0, 0, 1, 0], dtype=np.float32)
    assert RadiographLoss(LossConfig(positive_weight=None), labels).positive_weight == 2.5
    assert RadiographLoss(LossConfig(positive_weight=4.0), labels).positive_weight == 4.0
    for alone in (np.zeros(3), np.ones(3)):
        with pytest.raises(
            ValueError, match=f"found {int(alone.sum())} fractured of 3 images. Name a number"
        ):
            RadiographLoss(LossConfig(positive_weight=None), alone)


def test_presence_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"found \(2,\) and \(3,\)"):
        presence_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"not empty; found \(0,\) and \(0,\)"):
        presence_loss(torch.zeros(0), torch.zeros(0))


def test_every_wrong_setting_is_named_at_once():
    wrong = {
        "presence": -1.0,
        "positive_weight": 0.0,
        "label_smoothing": 0.5,
        "pixels": math.inf,
        "dice": True,
        "dice_power": 0,
        "evidence": "on",
        "evidence_cells": 0,
    }
    assert set(wrong) == set(asdict(LossConfig()))
    with pytest.raises(ValueError, match="LossConfig cannot have") as error:
        LossConfig(**wrong)
    assert [name for name in wrong if f"{name} = " not in str(error.value)] == []
    with pytest.raises(ValueError, match="all weights 0: nothing would be learned"):
        LossConfig(presence=0.0, pixels=0.0, dice=0.0)
