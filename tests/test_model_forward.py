from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_model_classifier import build, sequences
from test_model_encoders import FAMILIES
from torch import nn
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.checkpoints import Run
from cspine_helpers.cohort import read_cohort
from cspine_helpers.explain import attention_table, without_attention
from cspine_helpers.inference import predict, predict_study
from cspine_helpers.labels import UID
from cspine_helpers.model.forward import folded, forward_pass
from cspine_helpers.training.config import TrainConfig
from cspine_helpers.training.run import RULE
from cspine_helpers.training.sequence_task import SequenceTask


def norms(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def lived(model):
    """The model with norms that are not those of the beginning."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.normal_(0, 0.3)
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feature_stride": 32, "pooling": "avg", "lstm_layers": 2},
        {"pooling": "avgmax_mask"},
        *({"backbone": name, "feature_stride": 8} for name in FAMILIES),
        *({"backbone": name, "feature_stride": 32} for name in ("resnet10t", "mobilenetv3_small_050")),
        {"backbone": "repvgg_a0", "feature_stride": 4},  # two first layers side by side
        {"backbone": "nf_regnet_b0", "feature_stride": 4},  # standardises its weights when it uses them
    ],
)
def test_folded_it_says_the_same_and_its_own_weights_stay(changes):
    model = lived(build(**changes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        twin, plain = folded(model)(sequences(seed=9)), model(sequences(seed=9))
    for one, other in zip(twin, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_is_folded_is_what_follows_a_convolution():
    for name in FAMILIES:
        model = build(backbone=name, feature_stride=8)
        left = norms(folded(model))
        if name != "densenet121":
            assert left == []
            continue
        inner = [each for each in norms(model.backbone) if each.endswith((".norm1", "transition1.norm",
                                                                          "transition2.norm"))]  # fmt: skip
        assert sorted(left) == sorted(f"backbone.{each}" for each in inner)


class Tangled(nn.Module):
    """Convolutions before norms that may not be folded, and one that may."""

    pretrained_cfg: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.branching, self.after_sum = nn.Conv2d(5, 32, 3, 4, 1), nn.BatchNorm2d(32)
        self.twice, self.shared = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.simple, self.foldable = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.also_used, self.first = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.other_name = self.foldable

    def set_grad_checkpointing(self, enable):
        assert not enable

    def forward_features(self, x):
        x = self.branching(x)
        x = self.after_sum(x + x.flip(2))
        x = self.shared(self.twice(self.shared(self.twice(x))))
        x = self.foldable(self.simple(x))
        y = self.also_used(x)
        return self.first(y) + y


def test_a_norm_is_folded_only_where_it_alone_gets_what_one_convolution_gives():
    model = build()
    model.backbone = Tangled()
    lived(model)
    with torch.inference_mode():
        twin = folded(model)
        for one, other in zip(twin(sequences()), model(sequences()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert norms(twin) == ["backbone.after_sum", "backbone.shared", "backbone.first"]


def test_the_pass_is_that_of_the_folded_model_and_leaves_torch_as_it_was():
    model = build().train()
    batches = [{"index": torch.tensor([n]), "sequence": sequences(1, seed=n), "vertebra": torch.tensor([0])}
               for n in range(2)]  # fmt: skip
    twin = folded(model)
    with torch.autocast("cpu", torch.bfloat16):
        for number, (index, output) in enumerate(forward_pass(model, batches)):
            assert not torch.is_inference_mode_enabled()  # between batches, the caller's code runs
            assert index.tolist() == [number]
            assert output.logit.dtype == torch.float32
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                assert torch.equal(output.logit, twin(batches[number]["sequence"]).logit)
            assert torch.equal(output.probability, output.logit.double().sigmoid())
    assert model.training


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_validation_prediction_and_attention_have_the_same_bits(tmp_path, accelerator):
    cohort = read_cohort(make_toy_cohort(tmp_path / "toy"))
    model = replace(tiny_model(), vertebra_embedding=2)
    config = TrainConfig(batch_size=4, workers=0, vertebra_weights="equal")
    task = SequenceTask(cohort, model, config, RULE, accelerator)
    network = accelerator.prepare(task.model)
    for _, batch in zip(range(3), task.stages[-1].loader(), strict=False):
        network(batch["sequence"], batch["vertebra"])  # running statistics of its own
    validated, (row, kept) = task.predict(network, "validation"), task.validate(network)
    run = Run(tmp_path, task.model, model, 0.5, {})
    samples = cohort.samples["validation"]

    table = predict(run, samples, cohort.packed, split="validation", batch_size=4)
    assert table["probability"].tolist() == validated.probability.tolist()
    assert kept["decision"]["cases"] == len(table)
    assert row["threshold"] in table["probability"].tolist()
    attention = attention_table(run, samples, cohort.packed, batch_size=4)
    assert attention["probability"][:: model.slices].tolist() == table["probability"].tolist()
    assert attention["attention"].tolist() == validated.attention.double().flatten().tolist()

    uid = samples[UID].iloc[0]
    study = predict_study(run, cohort.packed, uid)
    of_study = predict(run, samples[samples[UID] == uid], cohort.packed, split="validation", batch_size=7)
    assert list(study.probability.values()) == of_study["probability"].tolist()
    uniform = attention_table(without_attention(run), samples, cohort.packed, batch_size=4)
    assert (uniform["attention"] == torch.tensor(1 / model.slices).item()).all()
