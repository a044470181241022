"""The notebook runner on notebooks of two cells."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import run as runner


@pytest.fixture
def notebook(tmp_path):
    def write(*sources: str, name: str = "01_tiny.ipynb") -> Path:
        cells = [nbformat.v4.new_code_cell('COHORT = "builtin"', id="p", metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
        path = tmp_path / name
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write


def texts(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [output.get("text", "") for cell in cells for output in cell.outputs]


@pytest.mark.slow
def test_rendering_in_place_twice_gives_the_same_bytes(notebook):
    path = notebook("print('once')\nprint('more')", "from pathlib import Path\nprint(Path.cwd().name)")
    ballast = np.ones((600, 1024, 1024), dtype=np.uint8)  # MiB of this process, which forks the kernel
    run = runner.execute(path)
    del ballast
    first = path.read_bytes()
    runner.execute(path)
    assert path.read_bytes() == first
    assert texts(path) == ["once\nmore\n", f"{path.parent.name}\n"]
    assert run.name == "01_tiny"
    assert 10 < run.peak_mib < 500
    assert 0 < run.cpu_seconds < 60
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.execution_count for cell in cells] == [1, 2, 3]
    assert [cell.id for cell in cells] == ["p", "c0", "c1"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.1, 10), (25.0, 10), (31.0, 35), (2.0, 5), (400.2, 405)], ids=str
)
def test_the_time_an_opening_says_is_corrected_where_it_is_far_off(seconds, said):
    opening = nbformat.v4.new_markdown_cell(
        "*Reads* a.  \n*Time* about 10 seconds on 2 CPU cores; 20 before."
    )
    runner.say_time(nbformat.v4.new_notebook(cells=[opening]), seconds)
    assert opening.source == f"*Reads* a.  \n*Time* about {said} seconds on 2 CPU cores; 20 before."


@pytest.mark.slow
def test_parameters_are_injected_into_the_copy_only(notebook, tmp_path):
    path = notebook("print(COHORT, 'RETRAIN' in globals())")
    before = path.read_bytes()
    out = tmp_path / "rendered" / "quick" / path.name
    runner.execute(path, {"COHORT": "quick", "RETRAIN": True}, out=out)
    assert path.read_bytes() == before
    assert texts(out) == ["quick False\n"]
    assert nbformat.read(out, as_version=4).cells[0].source == 'COHORT = "builtin"'


def test_links_of_a_copy_lead_where_those_of_the_notebook_do(tmp_path):
    folder, copies = tmp_path / "notebooks", tmp_path / "notebooks" / "rendered" / "quick" / "mine"
    source = "![Drawn](../figures/series.svg) and [next](01_tiny.ipynb)"
    cells = [nbformat.v4.new_markdown_cell(source), nbformat.v4.new_code_cell("'](../figures'")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    runner.relink(notebook, folder, folder)
    assert notebook.cells[0].source == source
    runner.relink(notebook, folder, copies)
    assert notebook.cells[0].source == source.replace("../", "../../../../")
    assert notebook.cells[1].source == "'](../figures'"


@pytest.mark.slow
def test_prints_stay_where_they_are_between_pictures(notebook):
    path = notebook("print('a')\nprint('b', flush=True)\ndisplay(1)\nprint('c')")
    runner.execute(path)
    outputs = nbformat.read(path, as_version=4).cells[1].outputs
    assert [output.get("text") for output in outputs] == ["a\nb\n", None, "c\n"]


@pytest.mark.slow
def test_bars_and_widget_views_go_and_pictures_stay(notebook):
    both = {runner.WIDGET: {"model_id": "1"}, "image/png": "aGk=", "text/plain": "x"}
    path = notebook(
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass",
        f"from IPython.display import publish_display_data\npublish_display_data({both})",
    )
    runner.execute(path)
    result = nbformat.read(path, as_version=4)
    assert [len(cell.outputs) for cell in result.cells] == [0, 0, 1]
    assert set(result.cells[2].outputs[0].data) == {"image/png", "text/plain"}
    assert "widgets" not in result.metadata


@pytest.mark.slow
def test_a_warning_stops_the_run_and_leaves_the_notebook_alone(notebook):
    path = notebook("import warnings\nwarnings.warn('look here')")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"01_tiny wrote on stderr(?s:.)*cell 2: .*look here"):
        runner.execute(path)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_an_error_names_the_notebook_the_cell_and_the_sentence(notebook):
    path = notebook("1", "raise FileNotFoundError('No cohort here. Run `make cohort`.')")
    with pytest.raises(
        RuntimeError, match=r"01_tiny, cell 3: FileNotFoundError: No cohort here\. Run `make cohort`\."
    ):
        runner.execute(path)


@pytest.mark.slow
def test_a_dead_kernel_is_said(notebook):
    with pytest.raises(RuntimeError, match="01_tiny: the kernel died"):
        runner.execute(notebook("import os\nos._exit(1)"))


def test_one_parameters_cell_is_asked_for():
    with pytest.raises(ValueError, match="0 cells are tagged"):
        runner.parameters_cell(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]))


def test_series_is_in_order_and_names_unknown_numbers(notebook, tmp_path):
    names = ["02_b.ipynb", "01_a.ipynb"]
    for name in names:
        notebook(name=name)
    assert [path.name for path in runner.series(tmp_path)] == sorted(names)
    assert [path.name for path in runner.series(tmp_path, ["02"])] == ["02_b.ipynb"]
    with pytest.raises(FileNotFoundError, match=r"numbered 07, 08 in .*found 01_a, 02_b"):
        runner.series(tmp_path, ["08", "02", "07"])


def test_command_line_prints_a_table_and_stops_with_one_sentence(tmp_path, monkeypatch, capsys):
    calls = []

    def execute(path, parameters, *, out):
        if path.stem == "02_bad":
            raise RuntimeError("02_bad, cell 2: ValueError: no")
        calls.append((path.name, parameters, out.relative_to(tmp_path).as_posix()))
        return runner.Run(path.stem, 1.0, 0.5, 100.0)

    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr(runner, "series", lambda numbers: [tmp_path / f"{name}.ipynb" for name in numbers])
    monkeypatch.setattr(runner, "execute", execute)
    assert runner.main(["01_tiny"]) == 0
    assert "01_tiny" in capsys.readouterr().out.splitlines()[-2]
    assert runner.main(["--cohort", "quick", "--retrain", "01_tiny", "02_bad", "03_later"]) == 1
    assert capsys.readouterr().err == "02_bad, cell 2: ValueError: no\n"
    assert runner.main(["--run", "mine", "03_three"]) == 0
    assert runner.main(["--cohort", "quick", "--run", "mine", "03_three"]) == 0
    assert calls == [
        ("01_tiny.ipynb", {}, "01_tiny.ipynb"),
        ("01_tiny.ipynb", {"COHORT": "quick", "RETRAIN": True}, "rendered/quick/01_tiny.ipynb"),
        ("03_three.ipynb", {"RUN": "mine"}, "rendered/builtin/mine/03_three.ipynb"),
        ("03_three.ipynb", {"COHORT": "quick", "RUN": "mine"}, "rendered/quick/mine/03_three.ipynb"),
    ]


@pytest.mark.parametrize("option", ["--run", "--cohort"])
@pytest.mark.parametrize("name", ["../x", "/x", "a b"])
def test_names_that_are_no_folder_here_are_refused_before_a_notebook_runs(option, name, monkeypatch, capsys):
    monkeypatch.setattr(runner, "execute", lambda *_, **__: pytest.fail("a notebook was run"))
    assert runner.main([option, name, "01"]) == 1
    assert f"found {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("holds", "options", "first"),
    [
        ("train_images", (), "00_pack_ct"),
        ("cohort.json", (), "00_pack_ct"),
        ("packed", (), "01_labels"),
        ("packed", ("00",), "00_pack_ct"),
    ],
)
def test_a_cohort_without_ct_starts_at_01_unless_asked(tmp_path, monkeypatch, capsys, holds, options, first):
    ran = []

    def execute(path, *_, **__):
        ran.append(path.stem)
        return runner.Run(path.stem, 1.0, 1.0, 100.0)

    (tmp_path / "data" / "mine" / holds).mkdir(parents=True)
    if holds == "cohort.json":
        (tmp_path / "data" / "mine" / holds).rmdir()
        (tmp_path / "data" / "mine" / holds).write_text("{}")
    for name in ("00_pack_ct", "01_labels"):
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setenv("CSPINE_ROOT", str(tmp_path))
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    series = runner.series
    monkeypatch.setattr(runner, "series", lambda numbers: series(tmp_path, numbers))
    monkeypatch.setattr(runner, "execute", execute)
    assert runner.main(["--cohort", "mine", *options]) == 0
    assert ran[0] == first
    assert ("00_pack_ct is skipped" in capsys.readouterr().out) == (first == "01_labels")
