"""Runs of radiographs without training: a network that is a plain function of the pixels, and its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from radiograph_folders import radiograph_cohort
from torch import nn
from torch.nn import functional as F

from cspine_helpers.checkpoints import Run
from cspine_helpers.decisions.thresholds import Rule, choose_threshold
from cspine_helpers.radiographs import prediction
from cspine_helpers.radiographs.cohort import read_radiograph_cohort
from cspine_helpers.radiographs.model import RadiographConfig, RadiographOutput
from cspine_helpers.radiographs.packing import ImagePackConfig, pack_images
from cspine_helpers.runs import RADIOGRAPHS, read_record, write_record

LONG, SHORT = 96, 64
CONFIG = RadiographConfig(backbone="resnet18", pretrained=None, frozen_blocks=0, long=LONG, short=SHORT)
TINY = RadiographConfig(
    backbone="mobilenetv3_small_050",
    pretrained=None,
    frozen_blocks=0,
    long=LONG,
    short=SHORT,
    decoder_channels=(12, 10, 8, 6),
)


class Stand(nn.Module):
    """A network that marks bright cells, its answer a plain function of the pixels.

    Args:
        lean: how much it sees a cell's place, too, which a mirrored view then changes; 0: not at all.
        bright: grey value from which a cell is marked.
    """

    def __init__(self, config=CONFIG, lean=0.0, bright=200.0):
        super().__init__()
        self.config, self.lean = config, lean
        self.bright = nn.Parameter(torch.tensor(bright))

    def folded(self):
        return self

    def forward(self, images):
        cells = F.avg_pool2d(images[:, None].float(), 4)[:, 0]
        place = torch.linspace(-1, 1, cells.shape[-1]) + torch.linspace(0, 2, cells.shape[-2])[:, None]
        mask = (cells - self.bright) / 20 + self.lean * place
        return RadiographOutput(
            mask.flatten(1).mean(1) / 4, mask if self.config.architecture == "decoder" else None
        )


def packed_cohort(folder: Path) -> Path:
    """A cohort of 36 drawn radiographs, packed in the stand-in's frame."""
    cohort = radiograph_cohort(folder, images=36, fractured=12)
    pack_images(cohort, ImagePackConfig(long=LONG, short=SHORT))
    return cohort


class Runs:
    """Makes run folders of stand-ins, whose weights are kept here.

    Args:
        cohort: that they claim to be trained on.
        root: where they lie, unless another folder is named.
    """

    def __init__(self, cohort: Path, root: Path) -> None:
        self._cohort, self._root = cohort, root
        self._networks: dict[str, Stand] = {}

    def __call__(
        self, name: str, *, folder: Path | None = None, config=CONFIG, train=None, **network
    ) -> Path:
        """The folder of the run of this name, made once."""
        folder = (folder or self._root) / name
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_text(f"weights of {name}: the stand-in has its own")
            data = read_radiograph_cohort(self._cohort).fingerprint()
            facts = read_radiograph_cohort(self._cohort).facts()
            record = {"task": RADIOGRAPHS, "data": data, "cohort": facts, "train": train or {}}
            rule = Rule("max_youden", level="image")
            decision = choose_threshold([0, 1], [0.25, 0.5], rule).record()
            write_record(folder, record | {"rule": asdict(rule), "decision": decision})
        self._networks[name] = Stand(config, **network)
        return folder

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Within the block, loading a run gives its stand-in."""

        def load(folder: str | Path) -> Run:
            network, record = self._networks[Path(folder).name], read_record(folder)
            return Run(Path(folder), network, network.config, record["decision"]["threshold"], record)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prediction, "load_radiograph_run", load)
            yield
