import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam, LayerGradientXActivation, Occlusion
from torch import nn
from torch.nn import functional
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.explain import maps as maps_room
from cspine_helpers.explain.maps import (
    METHODS,
    ON_PIXELS,
    STEPS,
    Grid,
    Maps,
    compute_maps,
    default_layer,
    grid_of,
    layers,
    map_sequences,
    watched,
)
from cspine_helpers.inference.prediction import predict
from cspine_helpers.model.classifier import FractureClassifier


class SmallCNN(nn.Module):
    """Two convolutions, their maps' mean, one logit; in-place activations, as timm's networks have them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, stride=2)
        self.act = nn.SiLU(inplace=True)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.last = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 1)

    def forward(self, images):
        maps = self.last(self.second(self.act(self.first(images))))
        return self.head(maps.mean((2, 3)) + maps.amax((2, 3))).squeeze(1)


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return SmallCNN().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 2, 16, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = FractureClassifier(tiny_model()).eval()
    return Run(tmp_path_factory.mktemp("run"), model, model.config, 0.5, {})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return read_cohort(make_toy_cohort(tmp_path_factory.mktemp("cohort"), studies=10))


def logit(output):
    return output


ORACLES = {  # captum's attributions, summed over features
    "grad_cam": lambda cnn, images: LayerGradCam(cnn, cnn.last).attribute(images),
    "hires_cam": lambda cnn, images: LayerGradientXActivation(cnn, cnn.last).attribute(images),
    "gradient_input": lambda cnn, images: InputXGradient(cnn).attribute(images).abs(),
    "integrated_gradients": lambda cnn, images: IntegratedGradients(cnn).attribute(
        images, n_steps=STEPS, method="gausslegendre"
    ),
    "occlusion": lambda cnn, images: Occlusion(cnn).attribute(images, (2, 4, 4), strides=(2, 2, 2)),
}


@pytest.mark.parametrize("method", ORACLES)
def test_maps_are_captums(cnn, images, method):
    expected = ORACLES[method](cnn, images.clone().requires_grad_())
    # captum's occlusion has one value for both channels of a window, and would count it twice
    expected = expected[:, 0] if method == "occlusion" else expected.sum(1)
    layer = None if method in ON_PIXELS else "last"
    found = compute_maps(cnn, images, logit, method=method, layer=layer)
    torch.testing.assert_close(found, expected.detach().float(), rtol=1e-4, atol=1e-6)


def test_mean_and_linear_have_the_closed_form(images):
    """Of convolution → mean → linear the gradient at cell (i, j) is w / (h · w), wherever the cell is."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 1)
    ).eval()
    with torch.no_grad():
        cells, weights = network[:2](images), network[4].weight[0]
    expected = torch.einsum("nkij,k->nij", cells, weights) / cells[0, 0].numel()
    for method in ("grad_cam", "hires_cam"):
        found = compute_maps(network, images, lambda output: output[:, 0], method=method, layer="1")
        torch.testing.assert_close(found, expected)
        bias = network[4].bias.item()  # nothing is lost: cells sum to the logit without its bias
        torch.testing.assert_close(found.sum((1, 2)), network(images)[:, 0].detach() - bias)
    positive = torch.einsum("nkij,k->nij", cells, weights.relu()) / cells[0, 0].numel()
    found = compute_maps(network, images, lambda output: output[:, 0], method="layer_cam", layer="1")
    torch.testing.assert_close(found, positive)


def test_grad_cam_plus_plus_is_the_papers_formula(cnn, images):
    """Alpha from the second and third derivatives of exp(logit), taken by autograd, not by a shortcut."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 16 * 12, 1))
    torch.manual_seed(0)
    nn.init.normal_(network[1].weight)
    both = nn.Sequential(nn.Conv2d(2, 2, 1), network[0], network[1]).eval()
    found = compute_maps(both, images, lambda out: out[:, 0], method="grad_cam_plus_plus", layer="0")
    cells = both[0](images).detach().double()
    weight = network[1].weight.detach().double().reshape(2, 16, 12)
    expected = torch.zeros(3, 16, 12, dtype=torch.float64)
    for n in range(3):
        # the logit is linear in the cells, so that the k-th derivative of exp(logit) is exp(logit) w^k
        for k in range(2):
            first, second, third = weight[k], weight[k] ** 2, weight[k] ** 3
            alpha = second / (2 * second + (cells[n, k] * third).sum())
            expected[n] += (alpha * first.relu()).sum() * cells[n, k]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stride", [2, 6])  # more cells than features, and fewer
def test_eigen_cam_is_the_first_principal_component(images, stride):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 9, 3, stride=stride), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 1)
    ).eval()
    found = compute_maps(network, images, lambda output: output[:, 0], method="eigen_cam", layer="0").numpy()
    cells = network[0](images).detach().numpy()
    for own, its in zip(found, cells, strict=True):
        table = its.reshape(len(its), -1).T
        _, _, vectors = np.linalg.svd(table, full_matrices=False)
        np.testing.assert_allclose(np.abs(own.ravel()), np.abs(table @ vectors[0]), rtol=1e-3, atol=1e-5)
        assert own.sum() >= 0


def test_integrated_gradients_sum_to_what_the_image_adds(cnn, images):
    found = compute_maps(cnn, images, logit, method="integrated_gradients")
    with torch.no_grad():
        expected = cnn(images) - cnn(torch.zeros_like(images))
    assert (found.sum((1, 2)) - expected).abs().max() < 0.03 * expected.abs().max()  # as `STEPS` says


def test_slices_are_occluded_one_at_a_time(run, monkeypatch):
    """The classifier encodes a slice once; that gives what occluding it in its whole sequence gives."""
    monkeypatch.setattr(maps_room, "OCCLUDED", 2)  # nine patches
    rng = np.random.default_rng(0)
    sequences = torch.from_numpy(rng.integers(0, 256, (2, 5, 6, 32, 32), dtype=np.uint8))

    class Plain(nn.Module):  # not known as a classifier, and so without the shortcut
        def __init__(self):
            super().__init__()
            self.inner = run.model

        def forward(self, given):
            return self.inner(given)

    own = compute_maps(run.model, sequences, lambda output: output.logit, method="occlusion")
    slow = compute_maps(Plain().eval(), sequences, lambda output: output.logit, method="occlusion")
    torch.testing.assert_close(own, slow, rtol=1e-3, atol=1e-5)
    assert own.abs().max() > 1e-4


def test_each_slice_gets_the_gradient_of_its_own_sequence(run, cohort):
    """Whatever else is in the batch; and the gradient runs through the LSTM and attention."""
    samples = cohort.samples["test"]
    both = map_sequences(run, samples.head(3), cohort.packed, batch_size=3)
    alone = map_sequences(run, samples.iloc[[1]], cohort.packed)
    np.testing.assert_allclose(both.values[1], alone.values[0], rtol=1e-3, atol=1e-7)
    # by finite differences: a cell's feature moved a little moves the logit by its gradient
    network = run.model
    sequence = torch.randint(0, 256, (1, 5, 6, 32, 32), dtype=torch.uint8)
    with watched(network, "backbone.blocks") as seen:
        gradient = seen.gradient(network(sequence).logit)
    place, step, logits = (3, 7, 4, 2), 0.05, []
    for sign in (1, -1):

        def moved(cells, sign=sign):
            cells = cells.clone()
            cells[place] += sign * step
            return cells

        with torch.no_grad(), watched(network, "backbone.blocks", change=moved):
            logits.append(network(sequence).logit.item())
    assert gradient[place].item() == pytest.approx((logits[0] - logits[1]) / (2 * step), rel=0.02, abs=1e-6)


def test_maps_come_with_the_tables_probability_and_are_weighed_by_attention(run, cohort):
    samples = cohort.samples["test"].head(9)
    maps = map_sequences(run, samples, cohort.packed)
    table = predict(run, samples, cohort.packed, split="test")
    np.testing.assert_allclose(maps.probability, table["probability"], rtol=0, atol=1e-6)
    assert map_sequences(run, samples, cohort.packed, predictions=table).probability.tolist() == (
        table["probability"].tolist()
    )
    with pytest.raises(ValueError, match="predictions are not this run's"):
        map_sequences(run, samples, cohort.packed, predictions=table.assign(probability=0.123))
    plain = map_sequences(run, samples, cohort.packed, weigh_by_attention=False)
    np.testing.assert_allclose(maps.values, plain.values * maps.attention[:, :, None, None], rtol=1e-5)
    assert (maps.layer, maps.size, maps.values.shape) == ("backbone.blocks", (32, 32), (9, 5, 8, 8))
    assert maps.pixels().shape == (9, 5, 32, 32)
    assert maps.values.min() < 0 < maps.values.max()  # signed
    np.testing.assert_allclose(maps.attention.sum(1), 1, rtol=1e-6)


def test_cells_lie_where_they_look(run):
    """By gradients: the pixels that a cell depends on lie evenly about where the grid puts it."""
    resnet = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)).eval()
    cases = [  # halvings padded at the end, as TensorFlow does, and on both sides
        (run.model.backbone, "blocks", (64, 32)),
        (run.model.backbone, "conv_stem", (33, 64)),
        (resnet, "layer1", (96, 64)),
        (resnet, "layer2", (128, 96)),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 4, stride=4)), "1", (32, 32)),
    ]
    for network, layer, size in cases:
        module = next(each for each in network.modules() if isinstance(each, nn.Conv2d))
        image = torch.randn(1, module.in_channels, *size, requires_grad=True)
        grid = grid_of(network, layer, image)
        found = []
        hook = network.get_submodule(layer).register_forward_hook(
            lambda *its, found=found: found.append(its[2])
        )
        network(image)
        hook.remove()
        cell = [side // 2 for side in found[0].shape[2:]]
        (gradient,) = torch.autograd.grad(found[0][0, :, cell[0], cell[1]].sum(), image)
        for axis, seen in enumerate((gradient.abs().sum((0, 1, 3)) > 0, gradient.abs().sum((0, 1, 2)) > 0)):
            first, last = seen.nonzero().flatten()[[0, -1]].tolist()
            assert 0 < first < last < size[axis] - 1  # the image's edge cuts nothing off
            assert grid.first[axis] + cell[axis] * grid.step[axis] == (first + last) / 2


def test_pixels_are_linear_between_the_cells_centres():
    values = np.zeros((1, 1, 4, 4), np.float32)
    values[0, 0, 1, 2] = 1.0
    even = Grid((1.5, 1.5), (4.0, 4.0))
    expected = functional.interpolate(torch.from_numpy(values), (16, 16), mode="bilinear")
    np.testing.assert_allclose(even.on_pixels(values, (16, 16)), expected, atol=1e-6)
    maps = Maps(values, "grad_cam", "x", Grid((3.0, 3.0), (4.0, 4.0)), (16, 16), np.zeros(1), np.ones((1, 1)))
    pixels = maps.pixels()[0, 0]
    assert np.argwhere(pixels == 1).tolist() == [[7, 11]]
    assert pixels[8, 11] == pytest.approx(0.75)
    own = Grid((0.0, 0.0), (1.0, 1.0)).on_pixels(values, (4, 4))
    np.testing.assert_array_equal(own, values)


def test_every_method_maps_a_frozen_network_and_leaves_no_hook(run, cohort):
    network = copy.deepcopy(run.model).requires_grad_(False)
    sequences = torch.zeros(2, 5, 6, 32, 32, dtype=torch.uint8)
    for method in METHODS:
        maps = compute_maps(network, sequences, lambda output: output.logit, method=method)
        side = 32 if method in ON_PIXELS else 8
        assert maps.shape == (10, side, side)
        assert maps.isfinite().all()
    assert not network.lstm.training
    with pytest.raises(ZeroDivisionError), watched(network, "backbone.blocks"):
        raise ZeroDivisionError
    hooks = [
        each
        for module in network.modules()
        for each in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert hooks == []


def test_layers_are_listed_in_order_with_their_maps(cnn, images, run):
    assert layers(cnn, images).to_numpy().tolist() == [
        ["act", 6, 8, 6],  # in place: the first convolution's maps, activated
        ["last", 4, 8, 6],
    ]
    assert default_layer(cnn, images) == "last"
    assert default_layer(run.model) == "backbone.blocks"


def test_a_layer_that_is_not_there_names_those_most_alike(run):
    sequences = torch.zeros(1, 5, 6, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"no layer 'backbone.block'\. Names most alike: 'backbone.blocks'"):
        compute_maps(run.model, sequences, lambda output: output.logit, layer="backbone.block")


@pytest.mark.parametrize(
    ("layer", "method"), [("head", "grad_cam"), ("lstm", "hires_cam"), ("vertebra", "layer_cam")]
)
def test_a_layer_without_maps_is_refused(run, layer, method):
    sequences = torch.zeros(1, 5, 6, 32, 32, dtype=torch.uint8)
    says = r"no feature maps .*, from the deepest: '.*'backbone\.blocks'|no layer 'vertebra'"
    with pytest.raises(ValueError, match=says):
        compute_maps(run.model, sequences, lambda output: output.logit, layer=layer, method=method)
    with pytest.raises(ValueError, match=says):
        grid_of(run.model, layer, sequences)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_feature_maps_is_refused(method):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 1)).eval()
    with pytest.raises(ValueError, match=r"no layer that gives feature maps|no convolution"):
        compute_maps(network, torch.zeros(2, 3, 4, 4), lambda output: output[:, 0], method=method)


def test_unusable_calls_are_refused(cnn, images):
    with pytest.raises(ValueError, match=r"no method 'gradcam'.*'grad_cam'"):
        compute_maps(cnn, images, logit, method="gradcam")
    with pytest.raises(ValueError, match="half precision"):
        compute_maps(copy.deepcopy(cnn).half(), images.half(), logit)
    with pytest.raises(ValueError, match=r"half precision .* its inputs are float16"):
        compute_maps(cnn, images.half(), logit, method="eigen_cam")
    with pytest.raises(ValueError, match="one input or more; found none"):
        compute_maps(cnn, (), logit)
    with pytest.raises(ValueError, match="no layer 3"):
        compute_maps(cnn, images, logit, layer=3)
    for target, found in (
        (lambda out: out[:, None], "shape"),
        (lambda out: out.sum(), "shape"),
        (repr, "str"),
    ):
        with pytest.raises(ValueError, match=f"fracture logit of each sample, .* found {found}"):
            compute_maps(cnn, images, target)
    with pytest.raises(ValueError, match="takes no layer; found 'last'"):
        compute_maps(cnn, images, logit, method="gradient_input", layer="last")
    with pytest.raises(ValueError, match="training mode"):
        compute_maps(copy.deepcopy(cnn).train(), images, logit)


def test_predictions_that_do_not_name_each_sample_once_are_refused(run, cohort):
    samples = cohort.samples["test"]
    table = samples.assign(probability=0.5)
    for bad, says in (
        (table.drop(columns="vertebra"), r"table of predictions lacks the column\(s\) 'vertebra'"),
        (table.iloc[[0, *range(len(table))]], f"hold 1 samples twice: '{samples.iloc[0, 0]} C1'"),
    ):
        with pytest.raises(ValueError, match=says):
            map_sequences(run, samples, cohort.packed, method="gradient_input", predictions=bad)


@pytest.mark.parametrize("method", ["grad_cam", "occlusion"])
def test_a_run_in_half_precision_is_not_mapped_on_a_cpu(run, cohort, method):
    half = replace(run, model=copy.deepcopy(run.model).half())
    with pytest.raises(ValueError, match=r"half precision are not computed on a CPU; the network's weights"):
        map_sequences(half, cohort.samples["test"], cohort.packed, method=method)
