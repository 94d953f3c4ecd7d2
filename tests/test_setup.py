"""The set-up files agree with one another and with the code."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

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


def ranges(project, *extras):
    """Package name -> range, of the package and these extras, each with the extras it names itself."""
    found = {}
    for line in sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"]):
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            found |= ranges(project, *requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement.specifier
    return found


@pytest.fixture(scope="module")
def declared(project):
    """Package name -> range, of all that `make` installs."""
    return ranges(project, "test")


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


def test_the_test_extra_is_everything(project, declared):
    assert ranges(project, *project["optional-dependencies"]) == declared


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


@pytest.mark.parametrize("kind", ["ibau", "benchmarks", "notebooks", "tests"])
def test_every_imported_package_is_declared(root, project, kind):
    modules = set()
    for statement in (s for source in sources(root, kind) for s in ast.walk(ast.parse(source))):
        if isinstance(statement, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
            modules.add(statement.module.split(".")[0])
    ours = {
        "ibau": {"ibau"},
        "notebooks": {"ibau"},
        "benchmarks": {"ibau", "benchmarks"},
        "tests": {"ibau", "benchmarks", *(path.stem for path in (root / "tests").glob("*.py"))},
    }[kind]
    # Dask is imported where it is used, which says what to install where it is missing.
    allowed = ranges(project, *(["test"] if kind == "tests" else ["notebooks", "study", "cluster"])).keys()
    homes = packages_distributions()
    for module in modules - sys.stdlib_module_names - ours:
        names = {canonicalize_name(name) for name in homes.get(module, [module])}
        assert names & allowed, f"{kind} imports {module}, which pyproject.toml does not declare"


def closure(names):
    """These packages and all they require, of those installed here."""
    found, waiting = set(), {canonicalize_name(name) for name in names}
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            needs = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        needed = {
            canonicalize_name(r.name) for r in needs if not r.marker or r.marker.evaluate({"extra": ""})
        }
        waiting |= needed - found
    return found


BARE_INSTALL = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in sys.argv[2:] else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare

import torch, ibau

torch.manual_seed(0)
layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ELU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
model = torch.nn.Sequential(*layers)
images, labels = torch.rand(60, 3, 8, 8), torch.arange(60) % 2
images[labels == 1] *= 0.5
result = getattr(ibau, sys.argv[1])(model, images, labels)
assert torch.isfinite(result.model(images)).all()
"""


@pytest.mark.parametrize("algorithm", ["unlearn", "clean"])
def test_a_bare_install_is_enough_to_clean_a_model(root, project, algorithm):
    """With every package out of reach that `pip install ibau` does not bring."""
    bare = closure(ranges(project))
    homes = packages_distributions()
    blocked = [m for m, names in homes.items() if not bare & {canonicalize_name(name) for name in names}]
    blocked = sorted(set(blocked) - {"ibau", "benchmarks"})
    assert {"pandas", "scipy", "sklearn", "matplotlib", "seaborn", "mlxtend", "opacus"} <= set(blocked)
    assert {"jupyterlab", "jupyter_client", "nbformat", "IPython", "papermill", "yaml"} <= set(blocked)
    command = [sys.executable, "-W", "ignore", "-c", BARE_INSTALL, algorithm, *blocked]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_folder_with_code_is_a_package(root):
    """Otherwise it stays out of the built package."""
    folders = {path.parent for path in (root / "ibau").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


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
