"""The committed notebooks: their form, and outputs that read well where nobody runs them."""

import ast
import builtins
import json
import re
import shutil
import statistics
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pandas as pd
import pytest
import run as runner
import torch
from conftest import RSNA, needs_rsna
from nbformat import NotebookNode
from test_evaluation_cases import toy, with_own

from cspine_helpers.decisions.test_split import evaluate_on_test, freeze
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.evaluation.cases import Aggregation
from cspine_helpers.figures import style
from cspine_helpers.labels import UID, VERTEBRAE, read_labels, write_labels
from cspine_helpers.model.classifier import FractureClassifier, ModelConfig
from cspine_helpers.patient_page.cases import TITLES
from cspine_helpers.predictions import read_predictions, write_predictions
from cspine_helpers.splits import adopt, split_hash, split_patients, write_split

ROOT = Path(__file__).parents[1]
SERIES = [
    "00_pack_ct",
    "01_label_prevalence",
    "02_split_and_expand",
    "03_train",
    "04_thresholds",
    "05_attention",
    "06_calibration",
    "07_guarantees",
    "08_one_patient",
    "09_explanations",
    "10_triage",
    "11_radiographs",
]
CT = SERIES[:-1]
LONGEST_CELL, MEDIAN_CELL = 15, 5
# Drawn only where the run failed in that way: a good one misses too few, one of one epoch calls everything.
FAILURES = {"05_missed", "05_missed_seen", "05_attention_elsewhere", "06_predictive_values"}
FAILURES |= {"08_neighbour_alarm", "08_miss"}


@cache
def read(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def nodes(notebook: NotebookNode) -> list[ast.AST]:
    return [node for cell in code(notebook) for node in ast.walk(ast.parse(cell.source))]


def assigned(cell: NotebookNode) -> dict[str, object]:
    body = ast.parse(cell.source).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)}


def saved_figures(notebook: NotebookNode) -> list[str]:
    """Names handed to `save_figure` in a notebook, but those made of a case's name."""
    calls = [node for node in nodes(notebook) if isinstance(node, ast.Call)]
    names = [call.args[1] for call in calls if ast.unparse(call.func).endswith("save_figure")]
    return [name.value for name in names if isinstance(name, ast.Constant)]


def sections(notebook: NotebookNode) -> list[str]:
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [title for text in texts for title in re.findall(r"^## (.+)$", text, re.MULTILINE)]


def solutions(name: str) -> list[str]:
    """The code of a notebook's folded solutions."""
    folded = r"<details><summary>Solution \d</summary>\n\n```python\n(.*?)```.*?</details>"
    return [found for cell in read(name).cells for found in re.findall(folded, cell.source, re.DOTALL)]


def names_of(sources: list[str]) -> tuple[set[str], set[str]]:
    """The names that some code makes, and those that it reads."""
    made: set[str] = set()
    used: set[str] = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.alias):
            made.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.arg):
            made.add(node.name if isinstance(node, ast.FunctionDef) else node.arg)
    return made, used


def test_the_pages_of_08_are_there_and_small():
    pages = {name: ROOT / "figures" / f"patient_{name}.png" for name in TITLES}
    there = {name: page.stat().st_size for name, page in pages.items() if page.is_file()}
    assert set(TITLES) - set(there) <= {"miss"}  # where validation has none
    assert [name for name, size in there.items() if not 0 < size < 300_000] == []


def test_the_series_is_complete():
    assert [path.stem for path in runner.series()] == SERIES


def test_code_cells_are_short_over_the_series():
    lengths = [len(cell.source.splitlines()) for name in SERIES for cell in code(read(name))]
    assert statistics.median(lengths) <= MEDIAN_CELL


def test_04_needs_few_imports():
    imports = [node for node in nodes(read("04_thresholds")) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert sum(node.end_lineno - node.lineno + 1 for node in imports) <= 5


def test_the_picture_of_the_network_in_03_has_the_shapes_of_the_network():
    table = next(cell.source for cell in read("03_train").cells if "| step |" in cell.source)
    rows = re.findall(r"^\| `?([\w ]+)`? \|.*\| ([\d, ]+) \|$", table, re.MULTILINE)
    said = {name: tuple(map(int, shape.split(","))) for name, shape in rows}
    model = FractureClassifier(ModelConfig.small()).eval()
    found = {}
    for name, part in model.named_children():
        part.register_forward_hook(lambda _, given, made, name=name: found.update({name: (given, made)}))
    sequences = torch.zeros(said["input"], dtype=torch.uint8)
    with torch.inference_mode():
        maps = model.backbone.forward_features(sequences.flatten(0, 1)[:, :5].float())
        output = model(sequences)
    plain = ("mask_encoder", "slice_head", "attention", "head")
    shapes = {name: tuple(found[name][1].shape) for name in plain}
    shapes = {name: shape[:-1] if shape[-1] == 1 else shape for name, shape in shapes.items()}
    shapes |= {"lstm": tuple(found["lstm"][1][0].shape), "features": tuple(found["lstm"][0][0].shape)}
    shapes |= {"backbone": tuple(maps.shape), "weighted sum": tuple(found["head"][0][0].shape)}
    assert {name: said[name] for name in shapes} == shapes
    assert said["slice_head"] == output.slice_logit.shape
    assert len(said) == len(shapes) + 3  # the input, unstacked, and pooled


@pytest.mark.parametrize("name", ["series", "network"])
def test_what_is_drawn_by_hand_is_small_said_in_words_and_in_the_colours_of_the_project(name):
    path = ROOT / "figures" / f"{name}.svg"
    drawn = path.read_text()
    assert len(drawn.encode()) < 12_000
    root = ElementTree.fromstring(drawn)
    assert {part.tag.rpartition("}")[2] for part in root.iter()}.isdisjoint({"script", "image", "use"})
    assert re.findall(r"@import|@font-face|\bon\w+=|href|url\((?!#)", drawn) == []
    for part in ("title", "desc"):
        said = root.find(f"{{*}}{part}")
        assert said.text.strip()
        assert said.get("id") in root.get("aria-labelledby").split()
    known = {colour for colour in vars(style).values() if isinstance(colour, str)} | {"#fff"}
    assert set(re.findall(r"#[0-9A-Fa-f]{3,8}\b", drawn)) <= known
    linked = rf"!\[[^\]]{{100,}}\]\((?:\.\./)?figures/{name}\.svg\)"  # with words for who cannot see it
    where = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
    found = [each.name for each in where if re.search(linked, each.read_text())]
    assert found == (["README.md", "00_pack_ct.ipynb"] if name == "series" else ["03_train.ipynb"])


def drawn_texts(name: str) -> list[str]:
    """Each text of a drawing, and each of its parts in bold."""
    root = ElementTree.parse(ROOT / "figures" / f"{name}.svg").getroot()
    parts = [part for part in root.iter() if part.tag.endswith(("}text", "}tspan"))]
    return ["".join(part.itertext()) for part in parts]


def test_the_drawing_of_the_series_names_each_notebook_and_file_of_a_run():
    texts = drawn_texts("series")
    assert sorted(text for text in texts if re.fullmatch(r"\d\d", text)) == [name[:2] for name in SERIES]
    run = ["run.json", "model.safetensors", "predictions.csv", "decision.json", "triage.json"]
    assert {*run, "train.csv", "split.csv", "packed/", "MODEL_CARD.md"} <= set(texts)
    assert [name for name in run if not (ROOT / "checkpoints" / "builtin" / name).is_file()] == []


def test_the_drawing_of_the_network_has_each_step_and_shape_of_the_table_in_03():
    table = next(cell.source for cell in read("03_train").cells if "| step |" in cell.source)
    rows = re.findall(r"^\| `?([\w ]+)`? \|.*\| ([^|]+) \| [\d, ]+ \|$", table, re.MULTILINE)
    assert len(rows) == 11
    assert {part for row in rows for part in row} - set(drawn_texts("network")) == set()


@pytest.mark.parametrize("name", SERIES)
class TestForm:
    def test_opening_cell_says_title_reads_writes_and_time(self, name):
        first = read(name).cells[0]
        assert first.cell_type == "markdown"
        assert first.source.startswith("# ")
        for word in ("Reads", "Writes", r"\b(seconds?|minutes?|min|s)\b"):
            assert re.search(word, first.source), word

    def test_shared_imports_come_first_and_parameters_second(self, name):
        notebook = read(name)
        cells = code(notebook)
        assert {type(node) for node in ast.parse(cells[0].source).body} <= {ast.Import, ast.ImportFrom}
        assert notebook.cells[runner.parameters_cell(notebook)] is cells[1]
        expected = {"COHORT": "builtin"} if name in CT else {"COHORT": "fracatlas_sample", "RETRAIN": False}
        if name == "00_pack_ct":
            expected |= {"PHANTOMS": 4, "WORKERS": -1}
        if name >= "03":
            expected["RUN"] = None if name in CT else "fracatlas"
        if name == "03_train":
            expected |= {"RETRAIN": False, "SKIP_UNUSABLE": False}
        if name in ("02_split_and_expand", "03_train"):
            expected["SETTINGS"] = None
        assert assigned(cells[1]) == expected

    def test_code_cells_are_short_and_define_no_classes(self, name):
        notebook = read(name)
        assert [c.source for c in code(notebook) if len(c.source.splitlines()) > LONGEST_CELL] == []
        assert not any(isinstance(node, ast.ClassDef) for node in nodes(notebook))
        assert sum(isinstance(node, ast.FunctionDef) for node in nodes(notebook)) <= 2

    def test_no_three_code_cells_stand_together_without_prose(self, name):
        kinds = [cell.cell_type[0] for cell in read(name).cells]
        start = [i for i, kind in enumerate(kinds) if kind == "c"][2]  # after imports and parameters
        assert "ccc" not in "".join(kinds[start:])

    def test_at_least_two_figures_are_saved_under_the_notebooks_number(self, name):
        figures = saved_figures(read(name))
        assert len(set(figures)) == len(figures) >= 2
        assert [figure for figure in figures if not figure.startswith(f"{name[:2]}_")] == []
        folder = ROOT / "figures" if name in CT else ROOT / "figures" / "fracatlas"
        missing = {figure for figure in figures if not (folder / f"{figure}.png").is_file()}
        assert missing <= FAILURES

    def test_only_03_trains_and_only_when_asked(self, name):
        notebook = read(name)
        training = [
            node
            for node in nodes(notebook)
            if isinstance(node, ast.ImportFrom | ast.Import) and "training" in ast.unparse(node)
        ]
        assert bool(training) == (name == "03_train")
        calls = [c.source for c in code(notebook) if re.search(r"(?<!\w)(training\.)?train\(", c.source)]
        assert len(calls) == (name == "03_train")
        assert all("if RETRAIN" in source for source in calls)

    def test_opening_says_what_is_read_and_written_and_a_time_that_the_runner_corrects(self, name):
        opening = read(name).cells[0].source
        said = re.findall(r"^\*(Reads|Writes|Time)\* ", opening, re.MULTILINE)
        assert said == ["Reads", "Writes", "Time"]
        assert runner.SAID.search(opening)

    def test_contents_link_to_every_section_in_order(self, name):
        notebook = read(name)
        links = re.findall(r"\[[^\]]+\]\(#([^)]+)\)", notebook.cells[0].source.partition("*Contents*")[2])
        assert links == [title.replace(" ", "-") for title in sections(notebook)]  # as JupyterLab names them

    def test_exercises_have_solutions_that_know_every_name(self, name):
        assert 2 <= len(solutions(name)) <= 3
        known, _ = names_of([cell.source for cell in code(read(name))])
        for solution in solutions(name):
            made, used = names_of([solution])
            assert used - made - known - set(dir(builtins)) == set()

    def test_the_last_code_cell_prints_the_versions(self, name):
        assert code(read(name))[-1].source.splitlines()[-1] == "print(versions())"

    def test_closing_cell_has_lesson_limits_and_the_way_on(self, name):
        last = read(name).cells[-1]
        assert last.cell_type == "markdown"
        assert re.search(r"^## What ", last.source, re.MULTILINE)
        assert re.search(r"[Ll]imit", last.source)
        following = SERIES[SERIES.index(name) + 1 :]
        assert not following or f"]({following[0]}.ipynb)" in last.source

    def test_links_lead_to_files(self, name):
        text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", link)]
        assert [link for link in links if not (ROOT / "notebooks" / link).exists()] == []


@pytest.mark.parametrize("name", SERIES)
class TestOutputs:
    def test_executed_once_in_order_from_a_fresh_kernel(self, name):
        counts = [cell.execution_count for cell in code(read(name))]
        assert counts == list(range(1, len(counts) + 1))

    def test_nothing_on_stderr_no_error_no_widget_no_injected_parameter(self, name):
        notebook = read(name)
        outputs = [output for cell in code(notebook) for output in cell.outputs]
        assert runner.complaints(notebook) == []
        assert [output for output in outputs if output.output_type == "error"] == []
        assert [output for output in outputs if runner.WIDGET in output.get("data", {})] == []
        assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)

    def test_nothing_that_differs_between_machines_and_runs(self, name):
        notebook = read(name)
        assert notebook.metadata == runner.METADATA
        assert [cell.metadata for cell in notebook.cells if set(cell.metadata) - {"tags"}] == []
        outputs = [deepcopy(output) for cell in code(notebook) for output in cell.outputs]
        for output in outputs:
            output.get("data", {}).pop("image/png", None)
        texts = json.dumps(outputs)
        assert re.findall(r" at 0x[0-9a-f]+", texts) == []
        assert re.findall(r"(?<![\w.])/(?:home|Users|root|tmp|work)/[^\" ]*", texts) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "01_label_prevalence",
        "02_split_and_expand",
        "04_thresholds",
        "06_calibration",
        "07_guarantees",
        "10_triage",
    ],
)
def test_what_needs_no_model_imports_no_torch(name):
    imports = [node for node in nodes(read(name)) if isinstance(node, ast.Import | ast.ImportFrom)]
    source = "\n".join(map(ast.unparse, imports))
    probe = f"{source}\nimport sys\nprint('torch' in sys.modules)"
    command = [sys.executable, "-c", probe]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_importing_the_package_imports_no_library():
    probe = (
        "import sys\nbefore = set(sys.modules)\nimport cspine_helpers\nprint(*(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", probe]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "cspine_helpers"
    ]


def predictions_of(folder: Path, table: pd.DataFrame) -> None:
    """A run folder that holds nothing but predictions."""
    folder.mkdir(parents=True)
    write_predictions(table, folder / "predictions.csv")


@pytest.mark.series
@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("another decision", "holds another decision: Highest F1"),
        ("other predictions", "was frozen with other predictions"),
        ("no test split", "have no test split"),
    ],
)
def test_04_leaves_a_run_as_it_is_and_says_so(state, sentence, project, capsys):
    folder = project / "checkpoints" / "theirs"
    table = toy(150) if state == "no test split" else pd.concat([toy(150), toy(80, seed=7, split="test")])
    predictions_of(folder, table)
    if state != "no test split":
        patient = {"level": "patient", "aggregation": Aggregation("noisy_or")}
        chosen = [choose_decision(table, Rule("max_f1", **where)) for where in (patient, {})]
        freeze(folder, chosen, table)
        evaluate_on_test(folder, table)
    if state == "other predictions":
        write_predictions(table.assign(probability=table["probability"] / 2), folder / "predictions.csv")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run_cells("04_thresholds", RUN="theirs")
    assert sentence in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    figures = project / "figures" / "builtin" / "theirs"
    assert (figures / "04_test.png").is_file() == (state == "another decision")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, where notebooks' cells are run in this process."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_cells(name: str, many: int | None = None, **parameters: object) -> dict[str, object]:
    """Run the first code cells of a notebook, or all of them, here; returns what they have defined."""
    names: dict[str, object] = {"display": lambda _: None}
    for place, cell in enumerate(code(read(name))[:many]):
        exec(compile(cell.source, f"{name}, cell {place}", "exec"), names)
        names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
    return names


def printed(source: str) -> str:
    """The Python that a page prints for readers to copy."""
    return re.search(r"```python\n(.*?)```", source, re.DOTALL)[1]


@needs_rsna
def test_what_04_prints_about_predictions_from_another_model_runs_as_printed(project):
    table = read_labels(RSNA / "train.csv")
    write_split(split_patients(table), project / "split.csv")
    shutil.copy(RSNA / "train.csv", project / "train.csv")
    shutil.copy(RSNA / "oof_predictions.csv", project / "oof.csv")
    exec(printed(read("04_thresholds").cells[-1].source), {})
    assert len(read_predictions(project / "checkpoints" / "theirs" / "predictions.csv")) == 2018 * 8


def foreign(project: Path, patients: int = 40) -> pd.DataFrame:
    """`train.csv` and `split.csv` of simulated patients, and a wide table of their predictions."""
    rows = toy(patients)
    wide = rows.pivot_table("probability", UID, "vertebra").reset_index()
    truth = rows.pivot_table("label", UID, "vertebra").astype(int).reset_index()
    write_labels(truth.assign(patient_overall=truth[list(VERTEBRAE)].max(axis=1)), project / "train.csv")
    write_split(split_patients(read_labels(project / "train.csv")), project / "split.csv")
    return wide.assign(Overall=wide[list(VERTEBRAE)].mean(axis=1))


def test_what_is_printed_about_predictions_from_another_model_runs_as_printed(project):
    wide = foreign(project)
    wide.to_csv("oof.csv", index=False)
    long = wide.rename(columns={"Overall": "patient_overall"}).melt(
        UID, var_name="vertebra", value_name="fractured"
    )
    long.insert(0, "row_id", long[UID] + "_" + long["vertebra"])
    long[["row_id", "fractured"]].to_csv("submission.csv", index=False)
    path = project / "checkpoints" / "theirs" / "predictions.csv"
    exec(printed(read("04_thresholds").cells[-1].source), {})
    assert read_predictions(path)["split"].nunique() == 3
    exec(printed((ROOT / "checkpoints" / "README.md").read_text()), {})
    assert len(read_predictions(path)) == 40 * 8


TABLES = {
    "no C7": lambda table: table[table["vertebra"] != "C7"],
    "only C2": lambda table: table[table["vertebra"] == "C2"],
    "one study with all seven": lambda table: table[(table["vertebra"] != "C7") | (table[UID] == "1.0.3")],
    "own scores": lambda table: with_own(table, "median"),
    "own scores, two scans of each patient": lambda table: with_own(table, "median").assign(
        patient=lambda rows: rows[UID].str.replace(r"[13579]$", "0", regex=True)
    ),
}


@pytest.mark.series
@pytest.mark.parametrize("case", TABLES)
def test_06_runs_whatever_vertebrae_and_patient_scores_there_are(case, project, capsys):
    folder = project / "checkpoints" / "theirs"
    predictions_of(folder, TABLES[case](toy(240)))
    names = run_cells("06_calibration", RUN="theirs")
    text = capsys.readouterr().out
    assert (f"patients by {'own score' if 'own' in case else 'max'}") in text
    assert ("The loss needs all seven vertebrae" in text) == ("own" not in case)
    if "own" in case:
        assert "as predicted, patients by own score" in names["losses"]
        assert names["losses"]["as predicted, patients by own score"].tolist() != (
            names["losses"]["as predicted, patients by max"].tolist()
        )
    assert (folder / "MODEL_CARD.md").is_file()


@pytest.mark.series
def test_04_decides_about_patients_by_their_own_score_where_there_is_one(project, capsys):
    table = with_own(pd.concat([toy(150), toy(80, seed=7, split="test")]), "median")
    predictions_of(project / "checkpoints" / "theirs", table)
    assert run_cells("04_thresholds", RUN="theirs")["own"].rule.aggregation == Aggregation("own")
    assert "A patient's probability is the model's own score." in capsys.readouterr().out


@pytest.mark.series
@pytest.mark.parametrize("scans", [1, 2])
def test_07_guarantees_own_scores_and_says_why_there_is_no_guarantee(scans, project, capsys):
    table = with_own(toy(150), "median")
    if scans == 2:
        first = toy(150).assign(patient=lambda rows: rows[UID])
        table = pd.concat([first, first.assign(**{UID: first[UID] + ".9"})])
    predictions_of(project / "checkpoints" / "theirs", table)
    names = run_cells("07_guarantees", RUN="theirs")
    text = capsys.readouterr().out
    assert ("takes one study of each; found several studies of 150" in text) == (scans == 2)
    if scans == 1:
        assert names["own"].rule.aggregation == names["guarantee"].target.aggregation == Aggregation("own")


def test_02_keeps_a_split_of_ones_own_and_names_the_call_that_takes_it(project, capsys):
    foreign(project)
    folder = project / "data" / "mine"
    folder.mkdir(parents=True)
    shutil.move(project / "train.csv", folder / "train.csv")
    own = split_patients(read_labels(folder / "train.csv"), seed=9)
    own.to_csv(folder / "split.csv", index=False)
    before = (folder / "split.csv").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"take it with splits\.adopt\(path, table\)"):
        run_cells("02_split_and_expand", 4, COHORT="mine")
    adopt(folder / "split.csv")
    names = run_cells("02_split_and_expand", 4, COHORT="mine")
    assert split_hash(names["split"]) == split_hash(own)
    assert "mine/split.csv is kept as it is: another split is there already" in capsys.readouterr().out
    assert (folder / "split.csv").read_bytes() == before
