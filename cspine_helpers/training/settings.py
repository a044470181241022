"""The settings of a run in one JSON file, each documented once: where it is defined.

`{"model": {...}, "train": {...}, "split": {...}, "rule": {...}}`; what the file leaves out is the preset's.
"""

import inspect
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cspine_helpers.dataset.augment import AugmentConfig
from cspine_helpers.decisions.thresholds import Rule
from cspine_helpers.files.records import config_of, nearest, parse_json, written_by
from cspine_helpers.model.classifier import ModelConfig
from cspine_helpers.runs import FORMAT
from cspine_helpers.splits import SplitConfig, split_settings
from cspine_helpers.training.config import EQUAL, TrainConfig
from cspine_helpers.training.run import RULE

SECTIONS: dict[str, Any] = {"model": ModelConfig, "train": TrainConfig, "split": SplitConfig, "rule": Rule}


@dataclass(frozen=True)
class Settings:
    """All that a person chooses of a run.

    Attributes:
        model: what is trained.
        train: how.
        rule: by which threshold, on the validation split, epochs are compared and the run decides.
        split: how the cohort's patients are divided; None: as they are.

    Example:
        >>> settings = preset("builtin")
        >>> Settings(settings.model, settings.train, settings.rule) == settings
        True
    """

    model: ModelConfig
    train: TrainConfig
    rule: Rule
    split: SplitConfig | None = None

    def check_split(self, cohort_folder: str | Path) -> None:
        """Refuse a cohort whose patients were divided in another way than these settings say.

        Raises:
            ValueError: says both ways.
        """
        path = Path(cohort_folder) / "split.csv"
        if self.split is None or not path.is_file():  # reading the cohort says what to do
            return
        noted, asked = split_settings(path), json.loads(json.dumps(asdict(self.split)))
        if noted != asked:
            raise ValueError(
                f"The settings divide patients by {asked}, but {path} was made with "
                f"{noted or 'something that nobody noted'}. Leave split out to train on it as it is, or move "
                "it away and make another with notebook 02."
            )

    def text(self) -> str:
        """The settings as the text of a file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def preset(cohort: str) -> Settings:
    """Settings for a cohort: small for "builtin", one epoch of that for "quick", else RSNA-size.

    Example:
        >>> settings = preset("rsna2022")
        >>> settings.model.size, settings.train.batch_size, settings.rule.precision_floor
        (224, 8, 0.5)
    """
    if cohort == "builtin":
        return Settings(ModelConfig.small(), TrainConfig.small(), RULE)
    if cohort == "quick":  # 30 studies: too few for a weight of every vertebra, or for a real decision
        one_epoch = replace(TrainConfig.small(), epochs=1, slice_epochs=1, warmup_epochs=0.5)
        train = replace(one_epoch, vertebra_weights=EQUAL)
        return Settings(ModelConfig.small(), train, Rule(precision_floor=0.01))
    return Settings(ModelConfig.rsna(), TrainConfig.rsna(), RULE)


def settings_of(path: str | Path, *, cohort: str = "") -> Settings:
    """Settings of a JSON file that a person wrote, or of a run's `run.json`.

    Args:
        path: of the file.
        cohort: whose preset has the sections and fields that the file leaves out. Those that a `run.json`
            lacks came later than its run, and have the value that leaves a training as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON or of another format, or sections, fields or values are unknown or wrong;
            names each, with what is allowed.

    Example:
        >>> settings = settings_of(run_folder / "run.json")
        >>> settings.model.backbone, settings.train.epochs, settings.rule.precision_floor
        ('tf_efficientnetv2_b0', 8, 0.5)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No settings at {path}. Name a JSON file as `python -m cspine_helpers settings` describes, or a "
            "run.json."
        )
    found = parse_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: {', '.join(SECTIONS)}, each with names and values.")
    if found.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{path} holds settings of format {found['format']!r}; this version reads {FORMAT}. "
            f"{written_by(found)}"
        )
    is_record = "weights_sha256" in found
    made, problems = {}, []
    base = Settings(ModelConfig(), TrainConfig(), RULE) if is_record else preset(cohort)
    if not is_record:
        unknown = [name for name in found if name not in (*SECTIONS, "format")]
        problems += [f"{name} is unknown{nearest(name, list(SECTIONS))}" for name in unknown]
    for name, kind in SECTIONS.items():
        if found.get(name) is None:
            continue
        try:
            made[name] = _section(name, kind, found[name], getattr(base, name))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        said = f" {written_by(found)}" if is_record else ""
        raise ValueError(f"{path}: {' '.join(problems)}{said}")
    return replace(base, **made)


def _section(name: str, kind: Any, found: Any, base: Any) -> Any:
    if name == "train" and isinstance(found, dict) and found.get("augment") is not None:
        augment = config_of(AugmentConfig, found["augment"], base=base.augment, what="train.augment")
        found = found | {"augment": augment}
    if name == "rule":  # settings of one objective do not belong to another
        base = (
            base
            if isinstance(found, dict) and found.get("objective", base.objective) == base.objective
            else None
        )
    if isinstance(found, dict):
        for other, theirs in SECTIONS.items():
            names = {each.name for each in fields(theirs)} - {each.name for each in fields(kind)}
            if moved := [field for field in found if field in names]:
                raise ValueError(f"{name}: {', '.join(moved)} belongs to {other}. Move it there.")
    return config_of(kind, found, base=base, what=name)


_GUIDE = """# Settings of a run

One JSON file holds all that is chosen of a run, in four sections. What it leaves out is the preset's of its
cohort. The same file is for `python -m cspine_helpers train --settings`, for `make train SETTINGS=`, and for
`SETTINGS` in notebooks 02 and 03. A run's `run.json` holds its exact settings, and is such a file, too. A
short one:

```json
{
  "train": {"epochs": 30, "sampling": "weighted", "augment": {"flip": 0}},
  "rule": {"objective": "max_f1"}
}
```

`python -m cspine_helpers settings --json --cohort rsna2022` prints a cohort's preset as such a file, to be
changed. `"augment": null` leaves training sequences as they are; without `"split"`, patients are divided as
`split.csv` says. Below, the defaults are those of RSNA 2022, and after a semicolon those of the built-in
cohort where it has others; `null` is None.

`python -m cspine_helpers settings` prints this page from where each setting is defined.
"""


_OF_TRAINING = (
    "A training chooses a threshold for vertebrae: `level` and `aggregation` keep their defaults, and no\n"
    "threshold is `stated`. Patients have thresholds of their own, frozen in notebook 04."
)


def guide() -> str:
    """Every setting with its defaults, what it may be and what it means, as Markdown.

    Example:
        >>> guide().splitlines()[0]
        '# Settings of a run'
    """
    large, small = (replace(preset(name), split=SplitConfig()) for name in ("rsna2022", "builtin"))
    parts = [(name, getattr(large, name), getattr(small, name)) for name in SECTIONS]
    parts.insert(2, ("train.augment", large.train.augment, small.train.augment))
    lines = [_GUIDE]
    for name, usual, builtin in parts:
        meanings = _meanings(type(usual))
        lines += [f"## {name}", "", inspect.getdoc(type(usual)).partition("\n")[0], ""]  # type: ignore[union-attr]
        if name == "rule":
            lines += [_OF_TRAINING, ""]
        lines += ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
        for each in fields(usual):
            if each.name == "augment":
                continue
            values = dict.fromkeys(json.dumps(getattr(config, each.name)) for config in (usual, builtin))
            allowed = each.metadata["check"].words
            lines.append(f"| `{each.name}` | {'; '.join(values)} | {allowed} | {meanings[each.name]} |")
        lines.append("")
    return "\n".join(lines)


def _meanings(kind: type) -> dict[str, str]:
    """What the docstring of a config says of each of its fields."""
    _, _, text = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}
