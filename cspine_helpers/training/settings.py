"""The settings of a run in one JSON file, each documented once: where it is defined.

`{"model": {...}, "train": {...}, "split": {...}, "rule": {...}}`; what the file leaves out is the preset's.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from cspine_helpers.decisions.thresholds import Rule
from cspine_helpers.files.records import config_of, nearest, parse_json, written_by
from cspine_helpers.model.classifier import ModelConfig
from cspine_helpers.runs import FORMAT, SEQUENCES, check_task
from cspine_helpers.splits import SplitConfig, split_settings
from cspine_helpers.training.config import EQUAL, TrainConfig
from cspine_helpers.training.run import RULE

Model = TypeVar("Model")
Train = TypeVar("Train")
SECTIONS: dict[str, Any] = {"model": ModelConfig, "train": TrainConfig, "split": SplitConfig, "rule": Rule}


@dataclass(frozen=True)
class Settings(Generic[Model, Train]):
    """All that a person chooses of a run, of whatever task.

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

    model: Model
    train: Train
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
        sections = {name: section for name, section in asdict(self).items() if section is not None}
        return json.dumps({"format": FORMAT, **sections}, indent=2, ensure_ascii=False) + "\n"


def preset(cohort: str) -> Settings[ModelConfig, TrainConfig]:
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


def settings_of(path: str | Path, *, cohort: str = "") -> Settings[ModelConfig, TrainConfig]:
    """Settings of a JSON file that a person wrote, or of a run's `run.json`; of sequences.

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
    found, is_record = found_in(path, SECTIONS, task=SEQUENCES)
    base = Settings(ModelConfig(), TrainConfig(), RULE) if is_record else preset(cohort)
    return chosen(path, found, base, SECTIONS)


def found_in(path: str | Path, sections: Mapping[str, Any], *, task: str) -> tuple[dict[str, Any], bool]:
    """What a settings file, or a run's record, holds; and whether it is a record.

    Args:
        path: of the file.
        sections: those that there are.
        task: for which a record must be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON of names and values, of another format, or a record of another task.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No settings at {path}. Name a JSON file as `python -m cspine_helpers settings` describes, or a "
            "run.json."
        )
    found = parse_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: {', '.join(sections)}, each with names and values.")
    if found.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{path} holds settings of format {found['format']!r}; this version reads {FORMAT}. "
            f"{written_by(found)}"
        )
    if is_record := "weights_sha256" in found:
        check_task(found, task, path.parent)
    return found, is_record


def chosen(
    path: str | Path,
    found: Mapping[str, Any],
    base: Settings[Model, Train],
    sections: Mapping[str, Any],
    *,
    others: Sequence[str] = (),
) -> Settings[Model, Train]:
    """The base with what a file says otherwise.

    Args:
        path: of the file, for errors.
        found: what it holds, see `found_in`.
        base: has the sections and fields that the file leaves out.
        sections: name → class of settings.
        others: names that a file may have besides.

    Raises:
        ValueError: sections, fields or values are unknown or wrong; names each, with what is allowed.
    """
    made, problems = {}, []
    if not (is_record := "weights_sha256" in found):
        known = [*sections, *others]
        unknown = [name for name in found if name not in (*known, "format")]
        problems += [f"{name} is unknown{nearest(name, known)}" for name in unknown]
    for name, kind in sections.items():
        if found.get(name) is None:
            continue
        try:
            made[name] = _section(name, kind, found[name], getattr(base, name), sections)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        said = f" {written_by(found)}" if is_record else ""
        raise ValueError(f"{path}: {' '.join(problems)}{said}")
    return replace(base, **made)


def _section(name: str, kind: Any, found: Any, base: Any, sections: Mapping[str, Any]) -> Any:
    if name == "rule":  # settings of one objective do not belong to another
        base = (
            base
            if isinstance(found, dict) and found.get("objective", base.objective) == base.objective
            else None
        )
    if isinstance(found, dict):
        for other, theirs in sections.items():
            names = {each.name for each in fields(theirs)} - {each.name for each in fields(kind)}
            if moved := [field for field in found if field in names]:
                raise ValueError(f"{name}: {', '.join(moved)} belongs to {other}. Move it there.")
        for part, inner in inner_configs(kind).items():
            if found.get(part) is not None:
                made = config_of(inner, found[part], base=getattr(base, part), what=f"{name}.{part}")
                found = {**found, part: made}
    return config_of(kind, found, base=base, what=name)


def inner_configs(kind: Any) -> dict[str, Any]:
    """Settings of a class that are made of settings themselves, such as `augment`, with their class."""
    hints = get_type_hints(kind)
    parts = {each.name: hints[each.name] for each in fields(kind) if "check" not in each.metadata}
    return {
        name: next(each for each in (hint, *get_args(hint)) if is_dataclass(each))
        for name, hint in parts.items()
    }


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
    """Every setting of sequences with its defaults, what it may be and what it means, as Markdown.

    Example:
        >>> guide().splitlines()[0]
        '# Settings of a run'
    """
    large, small = (replace(preset(name), split=SplitConfig()) for name in ("rsna2022", "builtin"))
    return "\n".join([_GUIDE, *described([large, small], SECTIONS, notes={"rule": _OF_TRAINING})])


def described(
    settings: Sequence[Settings[Any, Any]],
    sections: Mapping[str, Any],
    *,
    notes: Mapping[str, str],
    title: str = "",
) -> list[str]:
    """Lines of a Markdown table for each section, and for each of its settings that is made of others.

    Args:
        settings: whose values are shown, each value once.
        sections: name → class of settings.
        notes: section → what is said of it above its table.
        title: stands before the sections' names.
    """
    lines = []
    for section in sections:
        configs = [getattr(each, section) for each in settings]
        inner = inner_configs(type(configs[0]))
        tables = {section: configs}
        tables |= {f"{section}.{name}": [getattr(each, name) for each in configs] for name in inner}
        for name, shown in tables.items():
            kind = type(shown[0])
            meanings = _meanings(kind)
            lines += [f"## {title}{name}", "", inspect.getdoc(kind).partition("\n")[0], ""]  # type: ignore[union-attr]
            lines += [notes[name], ""] if name in notes else []
            lines += ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
            for each in fields(kind):
                if each.name in inner_configs(kind):
                    continue
                values = dict.fromkeys(json.dumps(getattr(config, each.name)) for config in shown)
                allowed = each.metadata["check"].words
                lines.append(f"| `{each.name}` | {'; '.join(values)} | {allowed} | {meanings[each.name]} |")
            lines.append("")
    return lines


def _meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a config, and of those that it builds on, say of each of its fields."""
    meanings: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, text = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        found = re.findall(r"^ {4}([\w, ]+): (.+(?:\n {8}.+)*)", text, re.MULTILINE)
        meanings |= {name: " ".join(words.split()) for names, words in found for name in names.split(", ")}
    return meanings
