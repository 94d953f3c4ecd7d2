"""Stored notebooks are complete: found by `ibau reproduce`, executed in order, clean, with parameters."""

import ast
import importlib
from pathlib import Path

import nbformat
import pytest

from ibau.reproduce import NOTEBOOKS, find_notebooks, parameter_defaults

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
COMMON = {"profile": "quick", "dataset": "", "data_dir": "", "seed": 0}  # every notebook has these parameters


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def node(path):
    return nbformat.read(path, as_version=4)


def code_cells(node):
    return [cell for cell in node.cells if cell.cell_type == "code"]


def text_of(output):
    """Everything readable in an output: a stream's text, or the text forms of a displayed value."""
    data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
    return output.get("text", "") + str(data)


def missing_names(node):
    """What a notebook's code imports from the package, or asks one of its modules for, and is not there."""
    trees = [ast.parse(cell.source) for cell in code_cells(node)]
    steps = [step for tree in trees for step in ast.walk(tree)]
    known, missing = {}, []  # names in the notebook -> what they stand for
    for step in steps:
        if isinstance(step, ast.Import):
            for one in step.names:
                if one.name.split(".")[0] == "ibau":
                    missing += [] if is_module(one.name) else [one.name]
                    known[one.asname or "ibau"] = one.name if one.asname else "ibau"
        elif isinstance(step, ast.ImportFrom) and (step.module or "").split(".")[0] == "ibau":
            for one in step.names:
                whole = f"{step.module}.{one.name}"
                missing += [] if resolves(step.module, one.name) else [whole]
                known[one.asname or one.name] = whole
    own = {step.id for step in steps if isinstance(step, ast.Name) and isinstance(step.ctx, ast.Store)}
    for step in steps:
        if isinstance(step, ast.Attribute) and isinstance(step.value, ast.Name):
            module = known.get(step.value.id)
            if module and step.value.id not in own and is_module(module) and not resolves(module, step.attr):
                missing.append(f"{module}.{step.attr}")
    return sorted(set(missing))


def resolves(module, name):
    """Can `from module import name` be done?"""
    return is_module(module) and (
        hasattr(importlib.import_module(module), name) or is_module(f"{module}.{name}")
    )


def is_module(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # the module is there, and what it imports is not
            raise
        return False
    return True


def test_there_are_notebooks_and_reproduce_runs_them_all():
    assert PATHS
    assert [notebook.path for notebook in find_notebooks()] == PATHS


def test_begins_with_a_title(node):
    assert node.cells[0].cell_type == "markdown"
    assert node.cells[0].source.startswith("# ")


def test_is_executed_in_order_from_one(node):
    counts = [cell.execution_count for cell in code_cells(node)]
    assert counts == list(range(1, len(counts) + 1))
    assert all(cell.source.strip() for cell in code_cells(node)), "an empty code cell"


def test_is_free_of_errors_and_stderr(node):
    outputs = [output for cell in code_cells(node) for output in cell.outputs]
    assert [o.evalue for o in outputs if o.output_type == "error"] == []
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []


def test_has_one_parameters_cell_of_plain_scalars_and_then_a_check(node):
    tagged = [i for i, cell in enumerate(node.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert node.cells[tagged[0] + 1].cell_type == "code", "the next cell checks the parameters"
    defaults = parameter_defaults(node)
    assert {name: defaults.get(name) for name in COMMON} == COMMON
    assert all(isinstance(value, str | int | float | None) for value in defaults.values())


def test_imports_only_what_the_package_has(node):
    assert missing_names(node) == []


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("from ibau.report import tables\ntables.rates_table", []),
        ("from ibau.report import tablets", ["ibau.report.tablets"]),
        ("from ibau.report import tables\ntables.no_such_table", ["ibau.report.tables.no_such_table"]),
        ("from ibau import unlearning as u\nu.no_such_name", ["ibau.unlearning.no_such_name"]),
        ("import ibau.no_such_module", ["ibau.no_such_module"]),
        ("from ibau.metrics import Rate", ["ibau.metrics.Rate"]),
        ("import ibau\nibau.unlearn, ibau.no_such_name", ["ibau.no_such_name"]),
    ],
)
def test_a_name_that_was_renamed_is_found(code, missing):
    assert missing_names(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])) == missing


def test_stored_outputs_are_those_of_the_defaults(node):
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in node.cells)


def test_has_a_checked_cell_with_an_output(node):
    marked = [cell for cell in code_cells(node) if "# NBVAL_CHECK_OUTPUT" in cell.source.splitlines()]
    assert marked
    assert all(cell.outputs for cell in marked), "a check of nothing"


def test_stored_outputs_name_no_folder_of_the_machine(node, root):
    text = "".join(text_of(output) for cell in code_cells(node) for output in cell.outputs)
    assert str(root) not in text
    assert f"{Path.home()}/" not in text


def test_is_listed_in_the_readme(path, root):
    assert f"notebooks/{path.name}" in (root / "README.md").read_text(encoding="utf-8")
