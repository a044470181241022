"""The one forward pass: validation, prediction and attention run it, and so say the same."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import tee
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cspine_helpers.model.classifier import ClassifierOutput, FractureClassifier
from cspine_helpers.model.encoders import INTENSITIES, PROBE

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # not their subclasses, which change the weights before they use them
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def forward_pass(
    model: FractureClassifier, batches: Iterable[dict[str, Tensor]]
) -> Iterator[tuple[Tensor, ClassifierOutput]]:
    """Score batches with the folded model, on its device, in float32 whatever it was trained in.

    Args:
        model: stays as it is.
        batches: of a `SequenceDataset`, as its loader makes them.

    Yields:
        Rows of the batch's samples in the data set, int64 `(B,)`, and what the model says of them.
    """
    network, device = folded(model), next(model.parameters()).device
    for batch in batches:
        given = (batch[name].to(device, non_blocking=True) for name in ("sequence", "vertebra"))
        with as_on_a_cpu(device):
            output = network(*given)
        yield batch["index"], output


@contextmanager
def as_on_a_cpu(device: torch.device, *, gradients: bool = False) -> Iterator[None]:
    """Compute in float32, whatever a network was trained in, and without gradients unless they are wanted."""
    with (
        torch.inference_mode(not gradients),
        torch.set_grad_enabled(gradients),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield


def mean_probability(
    models: Sequence[FractureClassifier], batches: Iterable[dict[str, Tensor]], *, flip: bool = False
) -> Iterator[Tensor]:
    """Mean probability of several models, each by its own forward pass over the same loaded batches.

    Args:
        models: on one device.
        batches: of a `SequenceDataset`, as its loader makes them.
        flip: each model also sees the sequence with left and right exchanged, and both count alike.

    Yields:
        Probability of a fracture, float64 `(B,)`.
    """
    device = next(models[0].parameters()).device
    views = (dict, flipped) if flip else (dict,)
    moved = (
        view({**batch, "sequence": batch["sequence"].to(device, non_blocking=True)})
        for batch in batches
        for view in views
    )
    # In step with each other, so that a batch is held only until the last of them has seen it.
    passes = [forward_pass(model, own) for model, own in zip(models, tee(moved, len(models)), strict=True)]
    outputs = zip(*passes, strict=True)
    for of_batch in zip(*[outputs] * len(views), strict=True):
        found = [output.probability for of_view in of_batch for _, output in of_view]
        yield torch.stack(found).mean(dim=0)


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with left and right exchanged, the mask with the image, as `AugmentConfig.flip` does it."""
    return {**batch, "sequence": batch["sequence"].flip(-1)}


@torch.inference_mode(False)  # tensors made in that mode can have no gradients, which `_pairs` looks at
@torch.no_grad()
def folded(model: FractureClassifier) -> FractureClassifier:
    """A copy for inference: each BatchNorm is folded into the weights of the convolution before it.

    The same function up to rounding, without a pass over the maps for each norm. The backbone is handed
    the mask as well, with weight 0: all bytes become floats in one go, a part of each pixel's would not.
    """
    twin = copy.deepcopy(model).eval()
    vars(twin).pop("forward", None)  # where Accelerate trains it: a wrapper for mixed precision
    twin.backbone.set_grad_checkpointing(False)
    fold_norms(
        twin,
        (twin.backbone.forward_features, torch.zeros(1, INTENSITIES, PROBE, PROBE)),
        (twin.mask_encoder, torch.zeros(1, 1, PROBE, PROBE)),
    )
    _see_mask(twin)
    twin.lstm.flatten_parameters()  # copied one by one, they lie apart, which cuDNN does not like
    return twin.requires_grad_(False)


@torch.inference_mode(False)
@torch.no_grad()
def fold_norms(twin: nn.Module, *passes: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    """Fold, in place, each BatchNorm into the weights of the convolution whose result it alone gets.

    Args:
        twin: a network in eval mode.
        passes: parts of it, each with an input that runs through all of its layers.
    """
    after: dict[nn.Module, nn.Module] = {}
    for encode, image in passes:
        for convolution, norm in _pairs(twin, encode, image):
            statistics: Any = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
            convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
            convolution.bias = bias
            # timm's norms carry their activation
            rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
            after[norm] = nn.Sequential(*rest)
    for name, module in list(twin.named_modules(remove_duplicate=False)):
        if module in after:
            twin.set_submodule(name, after[module])


def _pairs(
    model: nn.Module, encode: Callable[[Tensor], Tensor], image: Tensor
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose result goes into a BatchNorm and nowhere else, with that norm.

    The order of a network's layers does not say so: in DenseNet a norm comes before its convolution,
    elsewhere a sum lies between them, or a layer serves twice. The graph of gradients of a forward pass does.
    """
    # 1. Each call of such a layer: what it was given, and what it gave, as nodes of the graph.
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        calls.setdefault(module, []).append((given[0].grad_fn, result.grad_fn))

    layers = [each for each in model.modules() if type(each) in (*_CONVOLUTIONS, *_NORMS)]
    hooks = [each.register_forward_hook(note) for each in layers]
    device = next(model.requires_grad_(True).parameters()).device
    shapes_alone = device.type == "meta"  # where there is no mixed precision
    with torch.enable_grad(), nullcontext() if shapes_alone else torch.autocast(device.type, enabled=False):
        end = encode(image.to(device)).grad_fn
    for hook in hooks:
        hook.remove()
    # 2. How many nodes use each node's result.
    users: Counter[Any] = Counter()
    waiting: list[Any] = [end]
    seen = set(waiting)
    while waiting:
        used = [node for node, _ in waiting.pop().next_functions if node is not None]
        users.update(used)
        waiting += (new := set(used) - seen)
        seen |= new
    # 3. What is called once, and used once.
    once = [(module, *found[0]) for module, found in calls.items() if len(found) == 1]
    given_by = {gave: each for each, _, gave in once if isinstance(each, nn.Conv2d) and users[gave] == 1}
    return [
        (given_by[given], each)
        for each, given, _ in once
        if isinstance(each, nn.BatchNorm2d) and each.running_mean is not None and given in given_by
    ]


def _see_mask(model: FractureClassifier) -> None:
    """Hand the backbone the mask as a sixth channel of weight 0, where its first layer allows that."""
    network: Any = model.backbone
    names = network.pretrained_cfg.get("first_conv") or ()
    first = [network.get_submodule(name) for name in ([names] if isinstance(names, str) else names)]
    if not first or any(type(each) not in _CONVOLUTIONS or each.in_channels != INTENSITIES for each in first):
        return
    for each in first:
        padded = nn.functional.pad(each.weight, (0, 0, 0, 0, 0, 1))  # (features, 6, height, width)
        each.weight = nn.Parameter(padded.contiguous(memory_format=torch.channels_last))
        each.in_channels += 1
    model.set_channels(INTENSITIES + 1)
    model.to(first[0].weight.device)
