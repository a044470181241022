import re
from dataclasses import replace

import pytest
import timm
import torch
from test_model_classifier import CONFIG, build, sequences
from torch import nn

from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.model.encoders import feature_maps

# The smallest of each family, and how its feature maps lie.
FAMILIES = {
    "tf_efficientnetv2_b0": (2, 4, 8, 16, 32),
    "efficientnet_b0": (2, 4, 8, 16, 32),
    "tf_efficientnet_lite0": (2, 4, 8, 16, 32),
    "resnet10t": (2, 4, 8, 16, 32),
    "convnext_atto": (4, 8, 16, 32),
    "regnety_002": (2, 4, 8, 16, 32),
    "mobilenetv3_small_050": (2, 4, 8, 16, 32),
    "mobilenetv4_conv_small_035": (2, 4, 8, 16, 32),
    "densenet121": (2, 4, 8, 16, 32),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_have_every_stride_of_the_family_and_deeper_blocks_are_not_built(name):
    assert tuple(feature_maps(name)) == FAMILIES[name]
    sizes = {}
    with torch.device("meta"):
        for stride, features in feature_maps(name).items():
            network = FractureClassifier(replace(CONFIG, backbone=name, feature_stride=stride)).backbone
            maps = network.eval().forward_features(torch.zeros(1, 5, 64, 64))
            assert maps.shape == (1, features, 64 // stride, 64 // stride)
            sizes[stride] = sum(value.numel() for value in network.parameters())
    assert list(sizes.values()) == sorted(set(sizes.values()))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_timms_own_and_every_weight_learns(name):
    model = build(backbone=name, feature_stride=8).eval()
    whole = timm.create_model(name, in_chans=5).eval()
    assert whole.load_state_dict(model.backbone.state_dict(), strict=False).unexpected_keys == []
    image, stage = torch.randn(2, 5, 64, 64), FAMILIES[name].index(8)
    (wanted,) = whole.forward_intermediates(image, indices=[stage], intermediates_only=True)
    torch.testing.assert_close(model.backbone.forward_features(image), wanted)
    model.train()(sequences()).logit.sum().backward()
    assert [each for each, value in model.backbone.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_deepest_stride_no_weight_is_left_that_does_not_learn(name):
    model = build(backbone=name, feature_stride=32, pooling="avg")
    model(sequences()).logit.sum().backward()
    assert [each for each, value in model.backbone.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = build(backbone=name, feature_stride=8, dropout=0.0).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        model(sequences()).logit.sum().backward()
        gradients.append({each: value.grad.clone() for each, value in model.named_parameters()
                          if value.grad is not None})  # fmt: skip
        model.checkpoint_gradients()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_is_refused_where_timm_has_none():
    with torch.device("meta"):
        model = FractureClassifier(ModelConfig(backbone="cs3darknet_focus_s"))
    with pytest.raises(ValueError, match="timm has no gradient checkpointing for cs3darknet_focus_s"):
        model.checkpoint_gradients()


@pytest.mark.parametrize(
    "name",
    [
        *("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s16_224"),  # no maps, or of one size
        *("hrnet_w18_small", "efficientvim_m1"),  # maps of all strides at once
        *("no_such_model", "tf_efficientnetv2_s.no_such_weights", "", 7),
    ],
)
def test_a_backbone_without_feature_maps_is_refused(name):
    message = (
        rf"cannot have backbone = {re.escape(repr(name))} \(a CNN of timm that gives feature maps, such as"
    )
    with pytest.raises(ValueError, match=message):
        ModelConfig(backbone=name)


def test_a_stride_that_the_backbone_does_not_have_is_refused_with_those_that_it_has():
    message = "feature_stride = 2 with backbone = 'convnext_atto', which gives feature maps at 4, 8, 16, 32"
    with pytest.raises(ValueError, match=message):
        ModelConfig(backbone="convnext_atto", feature_stride=2)


def test_the_deepest_features_are_those_that_timms_classifier_sees():
    for name in ("tf_efficientnetv2_b0", "convnext_atto"):
        model = build(backbone=name, feature_stride=32).eval()
        whole = timm.create_model(name, in_chans=5).eval()
        whole.load_state_dict(model.backbone.state_dict(), strict=False)
        image = torch.randn(1, 5, 64, 64)
        torch.testing.assert_close(model.backbone.forward_features(image), whole.forward_features(image))
    assert isinstance(model.backbone.head, nn.Identity)  # ConvNeXt's has a norm that nothing here would train
