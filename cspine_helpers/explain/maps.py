"""Which cells of an image a network's fracture logit comes from: class activation maps, gradients, occlusion.

Every method explains the fracture logit, also of a vertebra that is called intact, and gives raw, signed
values: more is more evidence of a fracture. Class activation maps lie on the grid of a layer's feature maps,
the others on the image's own. Shapes: B samples, N images that a layer sees (B radiographs, or the B · T
slices of B sequences), h × w cells.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn

from cspine_helpers.checkpoints import Run
from cspine_helpers.dataset.sequence import SequenceDataset, make_loader
from cspine_helpers.explain.attention import stored_probability
from cspine_helpers.files.paths import listing
from cspine_helpers.model.classifier import FractureClassifier
from cspine_helpers.model.forward import as_on_a_cpu, folded
from cspine_helpers.packed import CHANNELS

Method = Literal[
    "grad_cam",
    "grad_cam_plus_plus",
    "hires_cam",
    "layer_cam",
    "eigen_cam",
    "gradient_input",
    "integrated_gradients",
    "occlusion",
]
METHODS: tuple[Method, ...] = get_args(Method)
ON_PIXELS: tuple[Method, ...] = ("gradient_input", "integrated_gradients", "occlusion")  # no layer's cells
STEPS = 12  # of integrated gradients; measured: they then sum to the logit's change within 3 %
OCCLUDED = 4  # patches to an image's longer side
Target = Callable[[Any], Tensor]  # a network's output → the fracture logit, (B,)


# ------------------------------------------------------------------------------------------------ layers


def _probe(network: nn.Module, example: Sequence[Tensor], hooks: Sequence[Any]) -> None:
    """Run a network once for what its hooks note, and remove them."""
    try:
        with torch.no_grad():
            network(*example)
    finally:
        for hook in hooks:
            hook.remove()


def layers(network: nn.Module, *example: Tensor) -> pd.DataFrame:
    """The layers of a network that give feature maps, in the order in which they compute them.

    Args:
        network: any; in eval mode.
        example: what it is called with.

    Returns:
        name, features, height, width. A container that hands on its last layer's maps is one row, by the
        container's name; each of its parts can be named, too.

    Raises:
        ValueError: it gives no feature maps.

    Example:
        >>> found = layers(run.model, torch.zeros(1, 5, 6, 32, 32, dtype=torch.uint8))
        >>> found.loc[found["name"] == "backbone.blocks", ["features", "height"]].values.tolist()
        [[32, 8]]
    """
    rows: dict[int, tuple[str, int, int, int]] = {}
    kept: list[Tensor] = []  # so that no two maps have one id

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, result: Any) -> None:
            if _is_map(result) and not isinstance(module, nn.Identity):
                kept.append(result)
                rows[id(result)] = (name, *result.shape[1:])

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in network.named_modules() if name]
    _probe(network, example, hooks)
    if not rows:
        raise ValueError(
            f"{type(network).__name__} has no layer that gives feature maps (images, features, height, "
            "width), so that nothing can be mapped. Choose a CNN."
        )
    return pd.DataFrame(list(rows.values()), columns=["name", "features", "height", "width"])


def default_layer(network: nn.Module, *example: Tensor) -> str:
    """The deepest layer that gives feature maps: of its backbone, where a network has one.

    Args:
        network: any; in eval mode.
        example: what it is called with; may be left out for a `FractureClassifier`.

    Raises:
        ValueError: it gives no feature maps.

    Example:
        >>> default_layer(run.model)
        'backbone.blocks'
    """
    if not example and isinstance(network, FractureClassifier):
        example = _blank(network)
    names = layers(network, *example)["name"]
    deepest = names[names.str.startswith("backbone.")]
    return str((deepest if len(deepest) else names).iloc[-1])


def _blank(network: FractureClassifier) -> tuple[Tensor, Tensor]:
    """One sequence and vertebra that the classifier takes."""
    config, device = network.config, next(network.parameters()).device
    shape = (1, config.slices, CHANNELS, config.size, config.size)
    return torch.zeros(shape, dtype=torch.uint8, device=device), torch.zeros(
        1, dtype=torch.int64, device=device
    )


def _is_map(result: object) -> bool:
    return isinstance(result, Tensor) and result.ndim == 4 and min(result.shape[2:]) > 1


class Grid(NamedTuple):
    """Where the cells of a map lie in the image: cell (i, j) about pixel first + (i, j) · step.

    Attributes:
        first: row and column about which the first cell's receptive field lies; pixels, 0 the first one's.
        step: pixels from cell to cell.
    """

    first: tuple[float, float]
    step: tuple[float, float]

    def on_pixels(self, values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
        """Maps (…, h, w) on the image's pixels (…, H, W), linear between the cells' centres."""
        for axis, first, step, pixels in zip((-2, -1), self.first, self.step, size, strict=True):
            cells = values.shape[axis]
            at = np.clip((np.arange(pixels) - first) / step, 0, cells - 1)
            below = np.minimum(at.astype(int), max(cells - 2, 0))
            share = (at - below).astype(np.float32).reshape((-1, 1) if axis == -2 else (-1,))
            low, high = (values.take(np.minimum(below + more, cells - 1), axis) for more in (0, 1))
            values = low + share * (high - low)
        return values


def grid_of(network: nn.Module, layer: str | None, *example: Tensor) -> Grid:
    """Where in the image the cells of a layer's maps lie, by the centres of their receptive fields.

    These are seldom the middles of the blocks of pixels that a map of h × w cells divides an image into: by
    the padding of each halving, a cell looks up to half a cell up and to the left, or down and to the right.

    Args:
        network: any; in eval mode.
        layer: as in `watched`.
        example: what it is called with.

    Source:
        Araujo, Norris and Sim, Computing receptive fields of convolutional neural networks, Distill 2019.

    Example:
        >>> grid_of(run.model, "backbone.blocks", torch.zeros(1, 5, 6, 32, 32, dtype=torch.uint8))
        Grid(first=(3.0, 3.0), step=(4.0, 4.0))
    """
    if layer is None:
        return Grid((0.0, 0.0), (1.0, 1.0))
    image: tuple[int, int] | None = None
    size: tuple[int, int] = (0, 0)  # of the maps whose grid is known
    found: Grid | None = None
    ended: list[Grid] = []

    def follow(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal image, size, found
        before, after = ((int(each.shape[2]), int(each.shape[3])) for each in (given[0], result))
        image = image or before
        if before == image:  # also where another branch begins
            size, found = before, Grid((0.0, 0.0), (1.0, 1.0))
        if before != size or after == size or found is None:
            return  # a second way to the same halving, or maps as large as before, which lie as before
        first, step = [], []
        for axis in (0, 1):
            kernel, stride, dilation = (_both(getattr(module, name, 1))[axis] for name in _SHAPE)
            reach = dilation * (kernel - 1)
            pad: Any = module.padding
            if isinstance(module, Conv2dSame | MaxPool2dSame) or pad == "same":
                pad = max((math.ceil(before[axis] / stride) - 1) * stride + reach + 1 - before[axis], 0) // 2
            else:
                pad = 0 if pad == "valid" else _both(pad)[axis]
            first.append(found.first[axis] + (reach / 2 - pad) * found.step[axis])
            step.append(found.step[axis] * stride)
        size, found = after, Grid((first[0], first[1]), (step[0], step[1]))

    def end(module: nn.Module, given: Any, result: Any) -> None:
        if image and found and _is_map(result):
            sides = int(result.shape[2]), int(result.shape[3])
            even = tuple(pixels / cells for pixels, cells in zip(image, sides, strict=True))
            spread = Grid(((even[0] - 1) / 2, (even[1] - 1) / 2), (even[0], even[1]))
            ended.append(found if sides == size else spread)  # maps that were enlarged cover it evenly

    ways = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    hooks = [each.register_forward_hook(follow) for each in network.modules() if isinstance(each, ways)]
    hooks.append(_module(network, layer).register_forward_hook(end))
    _probe(network, example, hooks)
    if not ended:
        raise _without_maps(network, layer, example)
    return ended[0]


_SHAPE = ("kernel_size", "stride", "dilation")


def _both(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class Watched:
    """What a layer gave in the last forward pass.

    Attributes:
        name: of the layer.
        activation: (N, features, h, w), where the graph of gradients begins.
        calls: of the layer in all passes.
    """

    activation: Tensor

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, 0

    def gradient(self, logit: Tensor) -> Tensor:
        """Gradient of logits (B,) with respect to the activation, of the same shape; 0 where it has no say.

        Raises:
            ValueError: the layer runs where no gradients are kept.
        """
        if not self.activation.requires_grad:
            raise ValueError(
                f"No gradient reaches {self.name}: the network runs that part without. Name a deeper layer, "
                "or let it run with gradients (radiographs: RadiographModel.folded(gradients=True))."
            )
        if not logit.requires_grad:
            return torch.zeros_like(self.activation)
        total = logit.sum()
        return torch.autograd.grad(total, self.activation, allow_unused=True, materialize_grads=True)[0]


@contextmanager
def watched(
    network: nn.Module, layer: str | None, *, change: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Watched]:
    """Watch a layer's feature maps while the network runs; its hooks are gone afterwards, whatever happens.

    Args:
        network: stays as it is.
        layer: name of a module; None: what the first convolution is given, the normalised image.
        change: what the layer gave → what the network sees instead.

    Raises:
        ValueError: there is no such layer; names those most alike.

    Example:
        >>> with watched(run.model, "backbone.conv_stem") as seen:
        ...     output = run.model(torch.zeros(1, 5, 6, 32, 32, dtype=torch.uint8))
        >>> seen.activation.shape
        torch.Size([5, 32, 16, 16])
    """
    seen = Watched("the image" if layer is None else layer)

    def keep(result: Tensor) -> Tensor:
        given = result.detach() if change is None else change(result.detach())
        seen.activation = given.requires_grad_(torch.is_grad_enabled())
        seen.calls += 1
        return seen.activation.clone()  # what follows may work in place

    def after(module: nn.Module, given: Any, result: Any) -> Any:
        return keep(result) if _is_map(result) else None

    def before(module: nn.Module, given: tuple[Tensor, ...]) -> Any:
        first.append(module)
        return (keep(given[0]), *given[1:]) if module is first[0] else None

    first: list[nn.Module] = []
    if layer is None:
        hooks = [
            each.register_forward_pre_hook(before)
            for each in network.modules()
            if isinstance(each, nn.Conv2d)
        ]
    else:
        hooks = [_module(network, layer).register_forward_hook(after)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _module(network: nn.Module, name: str) -> nn.Module:
    known = dict(network.named_modules())
    if not name or name not in known:
        near = difflib.get_close_matches(str(name), [each for each in known if each], n=5, cutoff=0.3)
        hint = f" Names most alike: {listing(near)}." if near else ""
        raise ValueError(
            f"{type(network).__name__} has no layer {name!r}.{hint} maps.layers(network, example) lists all "
            "that give feature maps."
        )
    return known[name]


# ------------------------------------------------------------------------------------------------ methods


def compute_maps(
    network: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    target: Target,
    *,
    method: Method = "grad_cam",
    layer: str | None = None,
) -> Tensor:
    """Maps of the evidence that a network sees in each image.

    With features' maps A, and G the logit's gradient with respect to them, a cell's value is, summed over
    features: "grad_cam" mean(G) · A; "grad_cam_plus_plus" the same with the sum of positive G, weighed by
    the paper's α, in place of the mean; "hires_cam" G · A; "layer_cam" positive G · A. "eigen_cam" is A's
    first principal component, whatever the logit is. Of the image x, as the network normalises it:
    "gradient_input" is |gradient · x|, summed over channels; "integrated_gradients" x times the mean
    gradient on the way from 0 to x; "occlusion" how far the logit falls where a patch (a quarter of the
    longer side, half a patch apart) of this image alone is 0, the mean of the patches over a pixel. 0 is
    mid-grey, or the mean of the images that the network was pretrained on.

    Args:
        network: in eval mode; stays as it is.
        inputs: what it is called with.
        target: its output → the fracture logit, (B,); samples do not mix in it.
        method: of `METHODS`.
        layer: name of the layer whose cells are mapped; None: the `default_layer`. Methods `ON_PIXELS` map
            the image that the first convolution is given, and take none.

    Returns:
        float32 (N, h, w), raw and signed.

    Raises:
        ValueError: the method or the layer is unknown; the layer gives no feature maps, runs several times,
            or without gradients; half precision is asked for on a CPU; the network is in training mode.

    Source:
        Class activation maps are without their final ReLU. Grad-CAM: Selvaraju et al., ICCV 2017.
        Grad-CAM++: Chattopadhyay et al., WACV 2018, eq. 19. HiResCAM: Draelos and Carin, 2020. LayerCAM:
        Jiang et al., IEEE TIP 2021. Eigen-CAM: Muhammad and Yeasin, IJCNN 2020, its sign made positive.
        Integrated gradients: Sundararajan, Taly and Yan, ICML 2017, by Gauss and Legendre's quadrature.
        Occlusion: Zeiler and Fergus, ECCV 2014.

    Example:
        >>> sequences = torch.zeros(2, 5, 6, 32, 32, dtype=torch.uint8)
        >>> compute_maps(run.model, sequences, lambda output: output.logit).shape
        torch.Size([10, 8, 8])
    """
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    _check(network, method, layer, given)
    target = partial(_one_a_sample, target)
    if method not in ON_PIXELS and layer is None:
        layer = default_layer(network, *given)
    with as_on_a_cpu(given[0].device, gradients=method not in _WITHOUT_GRADIENTS), _recurrent(network):
        if method in _WHOLE:
            return _WHOLE[method](network, given, target).float()
        with watched(network, layer) as seen:
            logit = target(network(*given))
            _has_seen(seen, network, layer, given)
            activation = seen.activation.detach()
            return _MAPS[method](activation, lambda: seen.gradient(logit)).float()


def _check(network: nn.Module, method: str, layer: str | None, given: Sequence[Tensor]) -> None:
    if not given:
        raise ValueError("A network is called with one input or more; found none. Pass its images.")
    if method not in METHODS:
        raise ValueError(f"There is no method {method!r} to map with. Choose one of {listing(METHODS)}.")
    if layer is not None and method in ON_PIXELS:
        raise ValueError(
            f"{method} maps the image's pixels and takes no layer; found {layer!r}. Leave it out."
        )
    if network.training:
        raise ValueError(
            "The network is in training mode, where dropout changes every map. Call eval() first."
        )
    check_precision(network, *given)


def check_precision(network: nn.Module, *given: Tensor) -> None:
    """Refuse half precision on a CPU, of a network's weights or of what it is called with."""
    for what, tensors in (("the network's weights", network.parameters()), ("its inputs", given)):
        if any(each.dtype in _HALVES and each.device.type == "cpu" for each in tensors):
            raise ValueError(
                f"Maps in half precision are not computed on a CPU; {what} are float16 or bfloat16. Make "
                "them float32 with .float(), or move network and inputs to a GPU."
            )


_HALVES = (torch.float16, torch.bfloat16)


def _one_a_sample(target: Target, output: Any) -> Tensor:
    """The target's logits; refuses what is no logit of each sample."""
    logit = target(output)
    if not isinstance(logit, Tensor) or logit.ndim != 1:
        found = f"shape {tuple(logit.shape)}" if isinstance(logit, Tensor) else type(logit).__name__
        raise ValueError(
            f"A target gives the fracture logit of each sample, (B,); found {found}. Choose one column, such "
            "as lambda output: output.logit."
        )
    return logit


def _has_seen(seen: Watched, network: nn.Module, layer: str | None, given: Sequence[Tensor]) -> None:
    """Refuse what gave no maps, or several in one pass."""
    if seen.calls > 1:
        raise ValueError(
            f"{type(network).__name__} runs {seen.name} {seen.calls} times in a forward pass, so that no map "
            "is all of it. Give one image at a time, or name another layer."
        )
    if seen.calls:
        return
    raise _without_maps(network, layer, given)


def _without_maps(network: nn.Module, layer: str | None, given: Sequence[Tensor]) -> ValueError:
    its = type(network).__name__
    if layer is None:
        return ValueError(
            f"{its} has no convolution that is given an image, to map its pixels. Choose a CNN."
        )
    return ValueError(
        f"{its} gives no feature maps (images, features, height, width) at {layer!r}. Choose one that does, "
        f"from the deepest: {listing(layers(network, *given)['name'][::-1])}."
    )


@contextmanager
def _recurrent(network: nn.Module) -> Iterator[None]:
    """Let cuDNN keep what the gradients of an LSTM need: it does so in training mode only."""
    found = [(each, each.dropout) for each in network.modules() if isinstance(each, nn.RNNBase)]
    for module, _ in found:
        module.training, module.dropout = True, 0.0
    try:
        yield
    finally:
        for module, dropout in found:
            module.training, module.dropout = False, dropout


# Of a layer: its maps (N, features, h, w), and what computes the gradients.


def _weighed(activation: Tensor, weights: Tensor) -> Tensor:
    return (weights * activation).sum(1)


def _grad_cam(activation: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
    return _weighed(activation, gradient().mean((2, 3), keepdim=True))


def _grad_cam_plus_plus(activation: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
    slope = gradient()
    below = 2 * slope**2 + (activation * slope**3).sum((2, 3), keepdim=True)
    alpha = torch.where(below != 0, slope**2 / below, 0.0)
    return _weighed(activation, (alpha * slope.relu()).sum((2, 3), keepdim=True))


def _hires_cam(activation: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
    return _weighed(activation, gradient())


def _layer_cam(activation: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
    return _weighed(activation, gradient().relu())


def _eigen_cam(activation: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
    cells = activation.flatten(2).transpose(1, 2)  # (N, h · w, features)
    turned = cells.transpose(1, 2)
    if cells.shape[1] < cells.shape[2]:  # the same component, from the smaller of two matrices
        values, vectors = torch.linalg.eigh(cells @ turned)  # ascending
        found = vectors[:, :, -1:] * values[:, -1:, None].clamp(min=0).sqrt()
    else:
        found = cells @ torch.linalg.eigh(turned @ cells).eigenvectors[:, :, -1:]
    sign = torch.where(found.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return (sign * found).squeeze(2).unflatten(1, activation.shape[2:])


def _gradient_input(image: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
    return (gradient() * image).abs().sum(1)


# Of the whole network, which runs many times on changed images.


def _integrated_gradients(network: nn.Module, given: Sequence[Tensor], target: Target) -> Tensor:
    places, weights = np.polynomial.legendre.leggauss(STEPS)  # on -1 … 1
    image = _image(network, given)
    total = torch.zeros_like(image)
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        with watched(network, None, change=partial(torch.mul, other=place)) as seen:
            total += seen.gradient(target(network(*given))) * weight
    return (image * total).sum(1)


def _occlusion(network: nn.Module, given: Sequence[Tensor], target: Target) -> Tensor:
    image, whole = _image(network, given), target(network(*given))
    _, _, height, width = image.shape
    patch = max(2, max(height, width) // OCCLUDED)
    logits_of = _one_changed(network, given, target, image, len(whole))
    whole = whole.repeat_interleave(len(image) // len(whole))
    total, times = (torch.zeros(len(image), height, width, device=image.device) for _ in range(2))
    for top in _starts(height, patch):
        for left in _starts(width, patch):
            rows, columns = slice(top, top + patch), slice(left, left + patch)
            hidden = image.clone()
            hidden[:, :, rows, columns] = 0
            total[:, rows, columns] += (whole - logits_of(hidden))[:, None, None]
            times[:, rows, columns] += 1
    return total / times


def _starts(size: int, patch: int) -> list[int]:
    """Where patches begin along a side, half a patch apart, the last one at its end."""
    return sorted({*range(0, max(size - patch, 0), max(1, patch // 2)), max(size - patch, 0)})


def _one_changed(
    network: nn.Module, given: Sequence[Tensor], target: Target, image: Tensor, samples: int
) -> Callable[[Tensor], Tensor]:
    """What gives logits (N,): of each image changed, the others of its sample as they were."""
    each = len(image) // samples
    if isinstance(network, FractureClassifier):  # a changed slice is encoded once
        sequences, *vertebrae = given
        vertebrae = [numbers.repeat_interleave(each) for numbers in vertebrae]
        plain = _encoded(network, sequences, image).unflatten(0, (samples, each)).repeat_interleave(each, 0)
        own = torch.arange(len(image), device=image.device)

        def of_slices(changed: Tensor) -> Tensor:
            rows = plain.clone()  # (N, T, D)
            rows[own, own % each] = _encoded(network, sequences, changed)
            return target(network.score(rows, *vertebrae))

        return of_slices

    def of_images(changed: Tensor) -> Tensor:
        logits = []
        for number in range(each):
            one = image.clone()
            one[number::each] = changed[number::each]
            with watched(network, None, change=lambda _, one=one: one):  # type: ignore[misc]
                logits.append(target(network(*given)))
        return torch.stack(logits, dim=1).flatten()

    return of_images


def _encoded(network: FractureClassifier, sequences: Tensor, image: Tensor) -> Tensor:
    """Features (N, D) of slices that the backbone sees as `image`."""
    with watched(network, None, change=lambda _: image):
        return network.encode(sequences.flatten(0, 1))


def _image(network: nn.Module, given: Sequence[Tensor]) -> Tensor:
    """What the first convolution is given, (N, channels, H, W)."""
    with torch.no_grad(), watched(network, None) as seen:
        network(*given)
    _has_seen(seen, network, None, given)
    return seen.activation


_MAPS: dict[str, Callable[[Tensor, Callable[[], Tensor]], Tensor]] = {
    "grad_cam": _grad_cam,
    "grad_cam_plus_plus": _grad_cam_plus_plus,
    "hires_cam": _hires_cam,
    "layer_cam": _layer_cam,
    "eigen_cam": _eigen_cam,
    "gradient_input": _gradient_input,
}
_WHOLE: dict[str, Callable[[nn.Module, Sequence[Tensor], Target], Tensor]] = {
    "integrated_gradients": _integrated_gradients,
    "occlusion": _occlusion,
}
_WITHOUT_GRADIENTS = ("eigen_cam", "occlusion")


# ---------------------------------------------------------------------------------------------- sequences


@dataclass(frozen=True)
class Maps:
    """One map of each slice of N samples.

    Attributes:
        values: float32 (N, T, h, w), raw and signed, on the map's own grid.
        method: of `METHODS`.
        layer: whose cells they are; None: of the image.
        grid: where in a slice its cells lie.
        size: (H, W) of a slice, pixels.
        probability: (N,), of a fracture.
        attention: (N, T), share of each slice in its sequence's features.
    """

    values: NDArray[np.float32]
    method: str
    layer: str | None
    grid: Grid
    size: tuple[int, int]
    probability: NDArray[np.float64]
    attention: NDArray[np.float64]

    def pixels(self) -> NDArray[np.float32]:
        """The maps on the slices' pixels, float32 (N, T, H, W): linear between the centres of their cells."""
        return self.grid.on_pixels(self.values, self.size)


def map_sequences(
    run: Run,
    samples: pd.DataFrame,
    packed_dir: str | Path,
    *,
    method: Method = "grad_cam",
    layer: str | None = None,
    weigh_by_attention: bool = True,
    batch_size: int = 8,
    predictions: pd.DataFrame | None = None,
) -> Maps:
    """One map of each slice of some samples, by the network that predicts: folded, in float32.

    Args:
        run: of `checkpoints.load_run`.
        samples: StudyInstanceUID, vertebra and label, as `labels.expand` makes them.
        packed_dir: the cohort's `packed` folder.
        method: of `METHODS`.
        layer: whose cells are mapped; None: the backbone's deepest. See `compute_maps`.
        weigh_by_attention: a slice's map counts as much as the network attends to the slice.
        batch_size: sequences at a time.
        predictions: the run's table, to show its probabilities; see `attention_table`.

    Raises:
        ValueError: as in `compute_maps`; the predictions lack samples, or are not this run's.

    Example:
        >>> maps = map_sequences(run, cohort.samples["test"], cohort.packed, method="gradient_input")
        >>> maps.values.shape[1:]
        (5, 32, 32)
    """
    if not isinstance(run.model, FractureClassifier):
        raise ValueError(
            f"The run {run.folder.name} is of a {type(run.model).__name__}, not of sequences. Radiographs "
            "are mapped by radiographs.maps.map_radiographs(...)."
        )
    check_precision(run.model)
    config, network = run.config, folded(run.model)
    device = next(network.parameters()).device
    dataset = SequenceDataset(samples, packed_dir, slices=config.slices, size=config.size)
    if layer is None and method not in ON_PIXELS:
        layer = default_layer(network)
    grid = grid_of(network, layer, *_blank(network))
    values, outputs = [], []
    for batch in make_loader(dataset, batch_size=batch_size):
        given = [batch[name].to(device) for name in ("sequence", "vertebra")]
        with as_on_a_cpu(device):
            outputs.append(network(*given))
        maps = compute_maps(network, given, lambda output: output.logit, method=method, layer=layer)
        values.append(maps.unflatten(0, (-1, config.slices)).cpu())
    probability, attention = (
        torch.cat([getattr(output, name) for output in outputs]).double().cpu().numpy()
        for name in ("probability", "attention")
    )
    found = torch.cat(values).numpy()
    if weigh_by_attention:
        found = found * attention[:, :, None, None].astype(np.float32)
    if predictions is not None:
        probability = stored_probability(predictions, samples, probability)
    return Maps(found, method, layer, grid, (config.size, config.size), probability, attention)
