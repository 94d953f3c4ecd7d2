"""The set-up files agree with one another and with the code."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import ibau

CONDA_NAMES = {"pytorch": "torch"}  # conda-forge's name: the package index's


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def declared(project):
    """Package name -> range, of the package and its `test` extra."""
    lines = project["dependencies"] + project["optional-dependencies"]["test"]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r.specifier for r in requirements}


@pytest.fixture(scope="module")
def pinned(root):
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_conda_has_the_same_packages_and_ranges(root, project, declared):
    lines = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert lines.pop() == {"pip": ["-e ."]}
    requirements = [Requirement(line) for line in lines]
    conda = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in requirements}
    assert conda.pop("pip") == SpecifierSet()
    assert conda.pop("python") == SpecifierSet(project["requires-python"])
    assert conda == declared


def test_the_lock_is_exact_and_names_no_source(pinned):
    assert pinned
    assert [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_the_lock_lies_inside_every_range(pinned, declared):
    versions = {canonicalize_name(name): Version(v) for name, v in (line.split("==") for line in pinned)}
    assert declared.keys() <= versions.keys()
    assert [name for name, wanted in declared.items() if versions[name] not in wanted] == []


def sources(root, kind):
    if kind != "notebooks":
        return [path.read_text(encoding="utf-8") for path in sorted((root / kind).rglob("*.py"))]
    nodes = [nbformat.read(path, as_version=4) for path in sorted((root / kind).glob("*.ipynb"))]
    cells = [cell.source for node in nodes for cell in node.cells if cell.cell_type == "code"]
    return [re.sub(r"(?m)^\s*[%!].*$", "", source) for source in cells]


@pytest.mark.parametrize("kind", ["ibau", "notebooks", "tests"])
def test_every_imported_package_is_declared(root, project, declared, kind):
    modules = set()
    for statement in (s for source in sources(root, kind) for s in ast.walk(ast.parse(source))):
        if isinstance(statement, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
            modules.add(statement.module.split(".")[0])
    homes = packages_distributions()
    extras = project["optional-dependencies"]
    test_only = {canonicalize_name(Requirement(r).name) for r in extras["test"]}
    allowed = declared.keys() if kind == "tests" else declared.keys() - test_only
    if kind == "ibau":  # imports Dask where it is used, and says what to install where it is missing
        allowed |= {canonicalize_name(Requirement(r).name) for r in extras["cluster"]}
    for module in modules - sys.stdlib_module_names - {"ibau", "conftest"}:
        names = {canonicalize_name(name) for name in homes.get(module, [module])}
        assert names & allowed, f"{kind} imports {module}, which pyproject.toml does not declare"


def test_make_help_lists_every_target(root):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    listed = subprocess.check_output(["make", "--no-print-directory", "help"], cwd=root, text=True)
    assert [line.split()[1] for line in listed.splitlines()] == targets
    assert set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) == set(targets)


def test_ci_runs_the_command_that_the_readme_gives(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"
    assert "make test" in (root / "README.md").read_text(encoding="utf-8")


def test_citation_names_this_version_and_the_paper(root, project):
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == ibau.__version__
    assert citation["license"] == project["license"] == "MIT"
    [paper] = citation["references"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Zeng", "Chen", "Park", "Mao", "Jin", "Jia"]


def test_public_names_exist():
    assert all(hasattr(ibau, name) for name in ibau.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ibau.no_such_name
