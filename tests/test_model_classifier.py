import re
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

from cspine_helpers.model.classifier import POOLINGS, FractureClassifier, ModelConfig

CONFIG = replace(ModelConfig.small(), slices=3, size=32, feature_stride=4, lstm_hidden=4)


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return FractureClassifier(replace(CONFIG, **changes))


def sequences(batch=2, slices=3, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, slices, 6, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_shapes_and_gradients_at_every_stride_and_pooling(stride, pooling):
    model = build(feature_stride=stride, pooling=pooling)
    output = model(sequences())
    assert [tuple(tensor.shape) for tensor in output] == [(2,), (2, 3), (2, 3)]
    torch.testing.assert_close(output.attention.sum(1), torch.ones(2))
    assert (output.attention >= 0).all()
    (output.logit.sum() + output.slice_logit.sum()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_the_default_is_the_rsna_size():
    config = ModelConfig()
    assert (config.backbone, config.slices, config.size) == ("tf_efficientnetv2_s.in21k_ft_in1k", 15, 224)
    model = FractureClassifier(config)
    assert model.lstm.input_size == 1280 + 64
    assert (model.lstm.hidden_size, model.lstm.num_layers, model.lstm.bidirectional) == (256, 2, True)


def test_pixels_reach_the_backbone_between_minus_one_and_one():
    model, seen = build().eval(), []
    handle = model.backbone.conv_stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.zeros(1, 3, 6, 32, 32, dtype=torch.uint8)
    pixels[:, 1] = 51
    pixels[:, 2] = 255
    model(pixels)
    handle.remove()
    torch.testing.assert_close(seen[0][:, :, 0, 0], torch.tensor([[-1.0], [-0.6], [1.0]]).expand(3, 5))


def test_the_mask_is_binary_from_128():
    model, pixels = build().eval(), sequences()
    outputs = []
    for low, high in ((0, 255), (127, 128), (0, 127)):
        pixels[:, :, 5] = low
        pixels[:, :, 5, 8:20, 8:20] = high
        outputs.append(model(pixels).logit)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_a_sequence_is_scored_alike_alone_and_in_a_batch():
    model, pixels = build().eval(), sequences(batch=4)
    together = model(pixels)
    for number in range(4):
        alone = model(pixels[number : number + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[number], rtol=1e-4, atol=1e-5)


def test_the_order_of_slices_matters():
    model, pixels = build().eval(), sequences()
    assert not torch.allclose(model(pixels).logit, model(pixels[:, [1, 0, 2]]).logit)


def test_the_vertebra_matters_only_with_an_embedding():
    pixels, first, last = sequences(), torch.tensor([0, 0]), torch.tensor([6, 6])
    plain, embedded = build().eval(), build(vertebra_embedding=4).eval()
    assert torch.equal(plain(pixels, first).logit, plain(pixels).logit)
    assert not torch.allclose(embedded(pixels, first).logit, embedded(pixels, last).logit)


def test_the_seed_decides_the_weights():
    first, same, other = build(1).state_dict(), build(1).state_dict(), build(2).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["backbone.conv_stem.weight"], other["backbone.conv_stem.weight"])


@pytest.mark.parametrize("pooling", ["avg", "avgmax"])
def test_features_of_a_slice_are_its_pooled_maps_and_those_of_its_mask(pooling):
    model, pixels = build(pooling=pooling).eval(), sequences()[0]
    with torch.no_grad():
        maps = model.backbone.forward_features(pixels[:, :5].float() / 127.5 - 1).flatten(2)  # (N, D, cells)
        parts = [maps.mean(2), maps.amax(2)] if pooling == "avgmax" else [maps.mean(2)]
        parts.append(model.mask_encoder((pixels[:, 5:] >= 128).float()))
        torch.testing.assert_close(model.encode(pixels), torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def pooled_by_hand(maps, mask):
    """Mean and maximum inside the mask of one slice, dilated by a cell: loops over cells of 4 × 4 pixels."""
    cells, weight = range(maps.shape[1]), torch.zeros(maps.shape[1:])
    for y, x in product(cells, cells):
        share = mask[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()
        for near_y, near_x in product((y - 1, y, y + 1), (x - 1, x, x + 1)):
            if near_y in cells and near_x in cells:
                weight[near_y, near_x] = max(weight[near_y, near_x], share)
    if not weight.any():
        weight = torch.ones_like(weight)
    return (maps * weight).sum((1, 2)) / weight.sum(), maps[:, weight > 0].amax(1)


@pytest.mark.parametrize("pooling", ["avgmax_mask", "avgmax_inside"])
def test_features_are_pooled_inside_the_mask_and_over_the_whole_slice_where_it_is_empty(pooling):
    model, pixels = build(pooling=pooling).eval(), sequences()[0]
    pixels[:, 5] = 0
    pixels[0, 5, 3:9, 14:21] = 255
    pixels[1, 5, 28:, 30:] = 128  # slice 2 shows nothing of it
    with torch.no_grad():
        features = model.encode(pixels)
        maps = model.backbone.forward_features(pixels[:, :5].float() / 127.5 - 1)  # (N, D, 8, 8)
    inside = [pooled_by_hand(*each) for each in zip(maps, (pixels[:, 5] > 127).float(), strict=True)]
    expected = torch.cat([torch.stack(each) for each in zip(*inside, strict=True)], 1)
    whole = maps.shape[1] * (2 if pooling == "avgmax_mask" else 0)
    torch.testing.assert_close(features[:, whole : whole + expected.shape[1]], expected, rtol=1e-4, atol=1e-5)


def test_what_lies_outside_the_mask_is_not_pooled_inside_it():
    model, pixels = build(pooling="avgmax_inside", backbone="resnet10t").eval(), sequences()[0]
    pixels[:, 5] = 0
    pixels[:, 5, :4, :4] = 255
    far = pixels.clone()
    far[:, :5, 24:, 24:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model.encode(far), model.encode(pixels))


def inputs_of(module, run):
    """What a module is given while `run` runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    run()
    handle.remove()
    return seen


def test_a_share_of_features_is_dropped_before_the_lstm_and_before_the_head_in_training_alone():
    model, pixels = build(dropout=0.4, lstm_hidden=128), sequences(batch=4)
    for module in (model.lstm, model.head):
        (training,) = inputs_of(module, lambda: model.train()(pixels))
        assert (training == 0).float().mean().item() == pytest.approx(0.4, abs=0.06)
        (inference,) = inputs_of(module, lambda: model.eval()(pixels))
        assert (inference != 0).all()
    for module in (model.attention, model.slice_head):  # which see everything
        (training,) = inputs_of(module, lambda: model.train()(pixels))
        assert (training != 0).all()


@pytest.mark.parametrize(("layers", "share"), [(1, 0.0), (2, 0.4)])
def test_a_share_is_dropped_between_the_lstms_layers(layers, share):
    assert build(dropout=0.4, lstm_layers=layers).lstm.dropout == share


@pytest.mark.parametrize("vertebra_embedding", [0, 4])
@pytest.mark.parametrize("name", ["logit", "slice_logit"])
def test_both_heads_teach_both_encoders(name, vertebra_embedding):
    model = build(vertebra_embedding=vertebra_embedding)
    output = getattr(model(sequences(), torch.tensor([1, 4])), name)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for encoder in (model.backbone, model.mask_encoder):
        gradients = {parameter: value.grad for parameter, value in encoder.named_parameters()}
        assert [each for each, value in gradients.items() if value is None or not value.any()] == []


def test_the_summary_is_the_mean_of_the_states_weighted_by_attention():
    model, pixels = build().eval(), sequences()
    with torch.no_grad():
        (states,) = inputs_of(model.attention, lambda: model(pixels))
        (summary,) = inputs_of(model.head, lambda: model(pixels))
        attention = model(pixels).attention
    torch.testing.assert_close(summary, torch.einsum("bt,bth->bh", attention, states))


def test_slice_evidence_adds_the_slices_own_logits_as_attention_weighs_them():
    alone, joined = build().eval(), build(slice_evidence=True).eval()
    joined.load_state_dict(alone.state_dict())
    with torch.no_grad():
        before, after = alone(sequences()), joined(sequences())
    expected = before.logit + (before.attention * before.slice_logit).sum(1)
    torch.testing.assert_close(after.logit, expected)
    assert not torch.allclose(after.logit, before.logit)


@pytest.mark.parametrize("vertebra_embedding", [0, 4])
def test_in_mixed_precision_the_lstm_attention_and_its_weights_stay_float32(vertebra_embedding):
    model, pixels = build(vertebra_embedding=vertebra_embedding).eval(), sequences()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = []
        (features,) = inputs_of(model.lstm, lambda: outputs.append(model(pixels, torch.tensor([0, 6]))))
        (states,) = inputs_of(model.attention, lambda: model(pixels, torch.tensor([0, 6])))
    assert (features.dtype, states.dtype, outputs[0].attention.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(outputs[0].attention.sum(1), torch.ones(2))


def test_it_learns_to_find_bright_squares():
    model = build(dropout=0.0, lstm_hidden=32)
    pixels = sequences(batch=8) // 4
    truth = torch.zeros(8, 3)
    truth[:4, 1] = 1
    pixels[:4, 1, :5, 10:18, 10:18] = 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    for _ in range(25):
        output = model(pixels)
        loss = loss_of(output.logit, truth.amax(1)) + loss_of(output.slice_logit, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (sequences().float(), "float32 of shape (2, 3, 6, 32, 32)"),
        (sequences()[0], "uint8 of shape (3, 6, 32, 32)"),
        (sequences(slices=4), "uint8 of shape (2, 4, 6, 32, 32)"),
        (sequences()[:, :, :5], "uint8 of shape (2, 3, 5, 32, 32)"),
        (sequences().permute(0, 1, 3, 4, 2), "uint8 of shape (2, 3, 32, 32, 6)"),
        (sequences(size=64), "uint8 of shape (2, 3, 6, 64, 64)"),
    ],
)
def test_other_sequences_are_refused(wrong, found):
    message = f"uint8 of shape (B, 3, 6, 32, 32) for this model; found {found}"
    with pytest.raises(ValueError, match=re.escape(message)):
        build()(wrong)


@pytest.mark.parametrize(
    ("wrong", "found"), [(None, "none"), (torch.zeros(3, dtype=torch.int64), r"shape \(3,\)")]
)
def test_an_embedding_needs_a_vertebra_for_each_sequence(wrong, found):
    with pytest.raises(ValueError, match=f"found {found}"):
        build(vertebra_embedding=4)(sequences(), wrong)


def test_every_wrong_setting_is_named_at_once():
    wrong = {
        "backbone": "no_such_net",
        "pretrained": "weights.pth",
        "slices": 0,
        "size": 31,
        "feature_stride": 3,
        "pooling": "max",
        "mask_features": 0,
        "lstm_hidden": 2.5,
        "lstm_layers": True,
        "dropout": 1.0,
        "vertebra_embedding": -1,
        "slice_evidence": 1,
    }
    assert set(wrong) == set(asdict(CONFIG))
    with pytest.raises(ValueError, match="ModelConfig cannot have") as error:
        ModelConfig(**wrong)
    assert [name for name in wrong if f"{name} = " not in str(error.value)] == []
