import json
import re
from dataclasses import asdict, replace

import pytest
import timm
import torch
from radiograph_runs import TINY
from safetensors.torch import save_file
from test_model_encoders import FAMILIES
from test_model_forward import lived, norms
from torch import nn
from torchvision.models.segmentation import deeplabv3_resnet50

from cspine_helpers.files.records import config_of
from cspine_helpers.radiographs.model import RadiographConfig, RadiographModel

NO_ENCODER = {"backbone": None, "pretrained": None, "frozen_blocks": 0}
ARCHITECTURES = {
    "decoder": {},
    "classifier": {"head_features": 8},
    "deeplabv3": {"backbone": "resnet10t"},
    "simple_cnn": NO_ENCODER,
}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return RadiographModel(replace(TINY, **changes))


def radiographs(batch=2, height=96, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return {"architecture": request.param, **ARCHITECTURES[request.param]}


def test_every_architecture_scores_frames_of_either_orientation_and_every_weight_learns(architecture):
    model = build(**architecture)
    for height, width in ((96, 64), (64, 96), (128, 128)):
        logit, mask_logit = model(radiographs(height=height, width=width))
        assert logit.shape == (2,)
        if mask_logit is not None:
            assert mask_logit.shape == (2, height // 4, width // 4)
            (mask_logit * torch.randn_like(mask_logit)).sum().backward(retain_graph=True)
        logit.sum().backward()
    assert (mask_logit is None) == (architecture["architecture"] in ("classifier", "simple_cnn"))
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_a_radiograph_is_scored_alike_alone_in_a_batch_with_gradients_and_folded(architecture):
    model, images = lived(build(**architecture)), radiographs(batch=4)
    with torch.inference_mode():
        together, folded = model(images), model.folded()(images)
        alone = [model(images[n : n + 1]) for n in range(4)]
    for found in (model(images), folded, type(together)(*map(joined, zip(*alone, strict=True)))):
        torch.testing.assert_close(found.logit, together.logit, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mask_logit, together.mask_logit, rtol=1e-4, atol=1e-5)
    assert torch.equal(together.probability, together.logit.double().sigmoid())


def joined(tensors):
    return None if tensors[0] is None else torch.cat(tensors)


def test_folding_leaves_no_norm_and_the_model_as_it_was(architecture):
    model = lived(build(**architecture))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = model.folded()
    assert norms(twin) == []
    assert not any(value.requires_grad for value in twin.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_timms_own_of_three_equal_normalised_channels_with_and_without_frozen_blocks(name, tmp_path):
    torch.manual_seed(0)
    whole = lived(timm.create_model(name))
    save_file(whole.state_dict(), path := tmp_path / "weights.safetensors")
    config = replace(TINY, backbone=name, pretrained=str(path))
    images, cfg = radiographs(), timm.get_pretrained_cfg(name)
    grey = images[:, None].float().expand(-1, 3, -1, -1) / 255
    image = (grey - torch.tensor(cfg.mean).view(-1, 1, 1)) / torch.tensor(cfg.std).view(-1, 1, 1)
    with torch.no_grad():
        wanted = whole.forward_intermediates(image, intermediates_only=True)[-4:]
    for blocks in (0, 2):
        model = RadiographModel(replace(config, frozen_blocks=blocks)).eval()
        seen = inputs_of(model.decoder, lambda model=model: model(images))
        for found, expected in zip(seen, wanted, strict=True):
            if name == "densenet121" and expected is not wanted[-1]:  # timm's come after the next norm
                continue
            atol = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


def inputs_of(module, run):
    """What a module is given while `run` runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run()
    handle.remove()
    (given,) = seen
    return given


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A model whose stem and first two blocks are frozen, and whose weights come from a file."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(lived(timm.create_model(TINY.backbone)).state_dict(), path)
    return lambda: RadiographModel(replace(TINY, pretrained=str(path), frozen_blocks=2))


def test_frozen_blocks_stay_bit_for_bit_and_compute_as_in_inference_whatever_is_asked(frozen):
    model = frozen().train()
    model.backbone.requires_grad_(True)  # as the trainer does after epochs with the whole encoder frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    output = model(radiographs())
    (output.logit.sum() + output.mask_logit.sum()).backward()
    optimizer.step()
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    stays = ("backbone.conv_stem.", "backbone.blocks.0.", "backbone.blocks.1.")
    assert [name for name in before if name.startswith(stays)] == same
    assert not any("running" in name for name in same)  # folded
    in_training = inputs_of(model.backbone.blocks[2], lambda: model.train()(radiographs()))
    in_inference = inputs_of(model.backbone.blocks[2], lambda: model.eval()(radiographs()[:1]))
    torch.testing.assert_close(in_training[:1], in_inference)


def test_an_unfolded_norm_of_frozen_blocks_stays_in_inference_mode():
    with torch.device("meta"):
        model = RadiographModel(
            replace(TINY, backbone="densenet121", pretrained="hub", frozen_blocks=1), load_pretrained=False
        ).train()
    in_training = {name for name in norms(model) if model.get_submodule(name).training}
    assert "backbone.features.denseblock2.denselayer1.norm1" in in_training
    assert not any("denseblock1" in name or "transition1" in name for name in in_training)


def test_frozen_blocks_keep_nothing_for_gradients(frozen):
    model = frozen().train()
    assert not inputs_of(model.backbone.blocks[2], lambda: model(radiographs())).requires_grad
    learning = {name.split(".")[2] for name, _ in model.named_parameters() if "backbone.blocks" in name}
    assert learning == {"2", "3", "4", "5"}


def test_a_run_is_built_on_shapes_alone_with_the_same_tensors(frozen):
    model = frozen()
    with torch.device("meta"):
        shapes = RadiographModel(model.config, load_pretrained=False)
    found, wanted = shapes.state_dict(), model.state_dict()
    assert [(name, each.shape) for name, each in found.items()] == [
        (name, each.shape) for name, each in wanted.items()
    ]
    shapes.load_state_dict(wanted, assign=True)
    assert not any(value.is_meta for value in [*shapes.parameters(), *shapes.buffers()])
    with torch.no_grad():
        assert torch.equal(shapes.eval()(radiographs()).logit, model.eval()(radiographs()).logit)
    assert (model.pretrained["source"], shapes.pretrained) == ("file", None)


def test_presence_is_pooled_maps_and_the_highest_cells_of_the_mask():
    model, images = lived(build(mask_cells=7, mask_evidence=0.5)), radiographs()
    maps = inputs_of(model.decoder, lambda: model(images))
    with torch.no_grad():
        mask, coarse = model.decoder(maps)
        pooled = [maps[-1].mean((2, 3)), maps[-1].amax((2, 3)), coarse.amax((2, 3))]
        highest = mask.flatten(1).sort(descending=True).values[:, :7].mean(1)
        wanted = model.head[-1](torch.cat(pooled, 1))[:, 0] + 0.5 * highest
        torch.testing.assert_close(model(images).logit, wanted)
        assert coarse.shape == (2, 10, 6, 4)


def test_at_first_no_cell_shows_a_fracture_and_presence_is_about_even():
    output = build()(radiographs(batch=8))
    assert output.mask_logit.sigmoid().mean().item() == pytest.approx(0.018, abs=0.01)
    assert output.logit.detach().mean().abs() < 0.5


def test_a_single_image_trains_every_architecture(architecture):
    model = build(**architecture).train()
    output = model(radiographs(batch=1))
    assert output.logit.shape == (1,)
    assert output.mask_logit is None or output.mask_logit.shape == (1, 24, 16)
    (output.logit.sum() + (0 if output.mask_logit is None else output.mask_logit.sum())).backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.slow
def test_deeplabv3_is_torchvisions():
    torch.manual_seed(0)
    model = lived(build(architecture="deeplabv3", backbone="resnet50"))
    peer = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=1).eval()
    tensors = model.backbone.state_dict()
    tensors["conv1.weight"] = tensors["conv1.weight"].expand(-1, 3, -1, -1) / 3  # three equal channels
    peer.backbone.load_state_dict(tensors)
    peer.classifier.load_state_dict(model.decoder.state_dict())
    images = radiographs(height=96, width=128)
    with torch.no_grad():
        pixels = images[:, None].float().expand(-1, 3, -1, -1) / 127.5 - 1
        found = model(images).mask_logit
        cells = peer.classifier(peer.backbone(pixels)["out"])  # at stride 8, where both are computed
        expected = nn.functional.interpolate(cells, scale_factor=2, mode="bilinear").squeeze(1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_simple_cnn_has_the_features_of_its_source_at_224_pixels():
    model = build(architecture="simple_cnn", **NO_ENCODER).eval()
    assert [type(each).__name__ for each in model.backbone] == ["Conv2d", "ReLU", "MaxPool2d"] * 2
    assert [each.in_features for each in model.head if isinstance(each, nn.Linear)] == [100_352, 128]
    images = radiographs(height=224, width=224)
    with torch.no_grad():
        flat = model.backbone(images[:, None].float() / 127.5 - 1).flatten(1)
        torch.testing.assert_close(model(images).logit, model.head[2:](flat).squeeze(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"architecture": "deeplabv3", "backbone": "resnet10t"}])
def test_gradient_checkpointing_gives_the_same_gradients(given):
    model = build(dropout=0.0, **given).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        model(radiographs()).logit.sum().backward()
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters()
                          if value.grad is not None})  # fmt: skip
        model.checkpoint_gradients()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_it_learns_which_radiograph_has_a_bright_square_and_where():
    model = build(dropout=0.0).train()
    images, label = radiographs(batch=8) // 4, torch.tensor([1.0, 0.0] * 4)
    images[::2, 32:48, 16:32] = 255
    mask = torch.zeros(8, 24, 16)
    mask[::2, 8:12, 4:8] = 1
    optimizer, loss_of = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.BCEWithLogitsLoss()
    for _ in range(40):
        output = model(images)
        loss = loss_of(output.logit, label) + 5 * loss_of(output.mask_logit, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((output.logit > 0) == label.bool()).all()
    found = output.mask_logit > 0
    assert 2 * (found & mask.bool()).sum() / (found.sum() + mask.sum()) > 0.9


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (radiographs().float(), "float32 of shape (2, 96, 64)"),
        (radiographs()[0], "uint8 of shape (96, 64)"),
        (radiographs(height=80), "uint8 of shape (2, 80, 64)"),
        (radiographs(width=0), "uint8 of shape (2, 96, 0)"),
    ],
)
def test_other_frames_are_refused(wrong, found):
    message = f"uint8 of shape (B, H, W), H and W multiples of 32; found {found}."
    with pytest.raises(ValueError, match=re.escape(message)):
        build()(wrong)


def test_every_wrong_setting_is_named_at_once():
    wrong = {
        "architecture": "unet",
        "backbone": "no_such_net",
        "pretrained": "weights.pth",
        "long": 100,
        "short": True,
        "frozen_blocks": -1,
        "decoder_channels": (96, 96, 64),
        "dropout": 1.0,
        "mask_cells": 0,
        "mask_evidence": -0.1,
        "head_features": 0.5,
    }
    assert set(wrong) == set(asdict(TINY))
    with pytest.raises(ValueError, match="RadiographConfig cannot have") as error:
        RadiographConfig(**wrong)
    assert [name for name in wrong if f"{name} = " not in str(error.value)] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long": 64, "short": 96}, "short = 96 and long = 64. Exchange them"),
        ({"backbone": None}, "no backbone with architecture = 'decoder'. Name a CNN of timm"),
        ({"frozen_blocks": 1}, "frozen_blocks = 1 with pretrained = None: they would stay random"),
        ({"pretrained": "package"}, "there are weight packages for 'tf_efficientnet_lite0', "),
        ({"architecture": "simple_cnn"}, "which has no encoder. Set them to none, none and 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"RadiographConfig cannot have .*{re.escape(message)}"):
        replace(TINY, **changes)


def test_a_decoder_is_refused_where_the_encoder_lacks_a_stride(monkeypatch):
    monkeypatch.setattr("cspine_helpers.radiographs.model.feature_maps", lambda name: {8: 4, 16: 8})
    with pytest.raises(
        ValueError, match=r"needs maps at strides 4, 8, 16, 32; it has none at 4, 32\. Choose"
    ):
        replace(TINY, dropout=0.1)
    assert replace(TINY, architecture="classifier").architecture == "classifier"


def test_more_frozen_blocks_than_there_are_is_refused():
    config = replace(TINY, pretrained="hub", frozen_blocks=9)
    with pytest.raises(
        ValueError, match="mobilenetv3_small_050 has 6 blocks; frozen_blocks = 9 are too many"
    ):
        RadiographModel(config, load_pretrained=False)


def test_an_encoder_that_is_no_chain_of_blocks_is_refused():
    class Forked(nn.Sequential):
        def forward(self, image):
            return self[1](self[0](image) + 1)

    from cspine_helpers.radiographs import model

    with pytest.raises(ValueError, match="Forked is no chain of blocks, as radiographs need it"):
        model._trace(Forked(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)), 1)


def test_settings_survive_json():
    config = RadiographConfig()
    assert config_of(RadiographConfig, json.loads(json.dumps(asdict(config))), whole=True) == config
    assert (config.long, config.short, config.frozen_blocks) == (448, 384, 3)
    assert config.decoder_channels == (96, 96, 64, 32)
