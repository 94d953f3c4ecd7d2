"""Run the notebooks in order, headless, and go on where an interrupted call stopped.

Each notebook is executed by papermill into `runs/<profile>/notebooks/`. A finished output carries a stamp in
its metadata: hashes of the source notebook and of this package, and the parameters. A later call keeps every
output whose stamp still holds and runs the rest.
"""

import ast
import hashlib
import json
import logging
import os
import re
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import nbformat

PACKAGE = Path(__file__).resolve().parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
NOTEBOOK_NAME = re.compile(r"(\d\d|appendix)_\w+")
OWN_OPTIONS = {"profile": "--profile", "dataset": "--dataset", "data_dir": "--data"}


class UsageError(Exception):
    """The call names something that does not exist or cannot be; the message lists what does."""


class NotebookFailed(Exception):
    """A notebook stopped with an error; the message names notebook, cell and error.

    failed  the notebook as far as it went
    error   the error's type and text, as the notebook raised it; two empty strings where its process died
    """

    def __init__(self, message, failed, error):
        super().__init__(message)
        self.failed, self.error = failed, error


@dataclass(frozen=True)
class Notebook:
    """A source notebook: its file, its content, and the defaults of its `parameters` cell."""

    path: Path
    node: nbformat.NotebookNode
    defaults: dict

    @property
    def name(self):
        return self.path.stem


def find_notebooks(folder=None):
    """The notebooks `NN_name.ipynb`, then `appendix_name.ipynb`, of `folder` (default: the repository's).

    Raises UsageError where the folder holds none, or holds one that cannot be read.
    """
    folder = Path(folder or NOTEBOOKS)
    paths = [p for p in sorted(folder.glob("*.ipynb")) if NOTEBOOK_NAME.fullmatch(p.stem)]
    if not paths:
        raise UsageError(f"no notebook NN_name.ipynb in {folder}; give a clone's folder with --notebooks DIR")
    return [_read(path) for path in paths]


def _read(path):
    try:
        node = nbformat.read(path, as_version=4)
        return Notebook(path, node, parameter_defaults(node))
    except (ValueError, AttributeError, SyntaxError, OSError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} cannot be read as a notebook: {reason}") from error


def parameter_defaults(node):
    """Name -> default of every plain value assigned in the cell tagged `parameters`; {} without such a cell.

    Papermill's own inspection goes line by line and loses a parameter whose comment holds a second `=`.
    """
    cells = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    defaults = {}
    for statement in ast.parse(cells[0].source).body if cells else []:
        try:
            defaults[statement.targets[0].id] = ast.literal_eval(statement.value)
        except (ValueError, AttributeError):
            text = ast.unparse(statement)
            raise ValueError(f"its parameters cell should hold `name = plain value`, not {text!r}") from None
    return defaults


def select(notebooks, only):
    """Those of `notebooks` that `only` names by number ("04", "4") or name ("04_ibau"); all if it's empty."""
    chosen = set()
    for wanted in only:
        found = [n for n in notebooks if wanted.zfill(2) in (n.name, n.path.name, n.name[:2])]
        if not found:
            raise UsageError(f"no notebook {wanted!r}; there are {', '.join(n.name for n in notebooks)}")
        chosen.update(n.name for n in found)
    return [n for n in notebooks if not only or n.name in chosen]


def parse_value(name, text, default):
    """`text` from the command line, read as the type of the parameter's `default`.

    Raises UsageError where it cannot be: a word for a number, a fraction for a whole number.
    """
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if type(default) is float and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        kind = type(default).__name__
        raise UsageError(f"parameter {name} is of type {kind} (default {default!r}); {text!r} is not")
    return value


def given_parameters(notebook, options, parameters):
    """What to pass to `notebook`: those of `options` (already typed) and `parameters` (texts) that it has."""
    given = {name: value for name, value in options.items() if value and name in notebook.defaults}
    for name, text in parameters.items():
        if name in notebook.defaults:
            given[name] = parse_value(name, text, notebook.defaults[name])
    return given


def check_parameters(notebooks, parameters):
    """Raise UsageError for a parameter that none of `notebooks` has, or that has an option of its own."""
    known = sorted({name for n in notebooks for name in n.defaults} - OWN_OPTIONS.keys())
    for name in parameters:
        if name in OWN_OPTIONS:
            raise UsageError(f"give {name} as {OWN_OPTIONS[name]}, not as a parameter")
        if name not in known:
            raise UsageError(f"no selected notebook has a parameter {name!r}; there are {', '.join(known)}")


def check_options(profile, dataset, data_dir, download=False):
    """Raise UsageError for an unknown profile or data set, and for images that cannot be read or fetched."""
    from ibau.data.images import DataError
    from ibau.data.splits import load
    from ibau.study import settings

    try:
        load(settings.profile(profile, dataset).dataset, data_dir, download=download)
    except (DataError, ValueError) as error:
        raise UsageError(str(error).replace(" data_dir", " --data")) from None


def reproduce(notebooks, options, parameters, runs_dir, *, fresh=False):
    """Run `notebooks` into `<runs_dir>/<profile>/notebooks/`, printing a line for each.

    `options` holds profile, dataset and data_dir ("" for the default); `parameters` maps further names to the
    texts given for them; `fresh` runs also what an earlier call finished. Returns the folder of the outputs.
    Raises UsageError before anything runs, NotebookFailed at the first notebook that ends with an error.
    """
    check_parameters(notebooks, parameters)
    given = [given_parameters(notebook, options, parameters) for notebook in notebooks]
    folder = Path(runs_dir).resolve() / options["profile"] / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["IBAU_RUNS"] = str(Path(runs_dir).resolve())  # the notebooks run in another folder than we do
    code = package_hash()
    for number, (notebook, values) in enumerate(zip(notebooks, given, strict=True), start=1):
        print(f"[{number}/{len(notebooks)}] {notebook.name} ... ", end="", flush=True)
        stamp = {"source": source_hash(notebook.node), "code": code, "parameters": values}
        output = folder / notebook.path.name
        kept = nbformat.read(output, as_version=4).metadata if output.exists() and not fresh else {}
        if kept.get("ibau") == stamp:
            print("kept from an earlier run", flush=True)
            continue
        start = time.monotonic()
        execute(notebook, output, values, stamp)
        print(f"done in {timedelta(seconds=round(time.monotonic() - start))}", flush=True)
    return folder


def execute(notebook, output, values, stamp):
    """Run one notebook into `output`, which appears only once complete and then carries `stamp`.

    Until then the cells executed so far are in `NN_name.partial.ipynb`; a notebook that ends with an error
    leaves them in `NN_name.failed.ipynb` and raises NotebookFailed.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    partial, failed = output.with_suffix(".partial.ipynb"), output.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it logs, the raised error says
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else each kernel warns about its debugger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            node = papermill.execute_notebook(
                notebook.path,
                partial,
                values,
                kernel_name="python3",
                language="python",
                kernel_manager_class=_this_python(),
                shutdown_kernel="immediate",
                start_timeout=120,
                progress_bar=False,
                cwd=notebook.path.parent,
            )
        node.metadata["ibau"] = stamp
        nbformat.write(node, partial)
        os.replace(partial, output)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        os.replace(partial, failed)
        cause = getattr(error, "ename", ""), getattr(error, "evalue", "")
        raise NotebookFailed(_failure(notebook, failed, cause), failed, cause) from None
    finally:
        partial.unlink(missing_ok=True)


def as_html(page):
    """Write an executed notebook as HTML too, and return that file."""
    from nbconvert import HTMLExporter

    from ibau.data.files import whole_file

    text, _ = HTMLExporter().from_filename(str(page))
    with whole_file(page.with_suffix(".html"), like=page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page.with_suffix(".html")


def _this_python():
    """A kernel manager that starts the running interpreter, whatever the user registered as `python3`."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):
        transport_encryption = "auto"  # a kernel warns, notebook after notebook, where it has none

        @property
        def kernel_spec(self):
            return KernelSpec(**get_kernel_dict())

    return ThisPython


def _failure(notebook, failed, cause):
    cells = nbformat.read(failed, as_version=4).cells
    started = [c for c in cells if c.cell_type == "code" and c.metadata.papermill["start_time"]]
    lines = started[-1].source.strip().splitlines() if started else []
    error = ": ".join(cause) if any(cause) else "its process died, often for want of memory"
    message = "\n    ".join(error.splitlines()[:10])
    return (  # the number is the one that JupyterLab shows in front of the cell
        f"notebook {notebook.name} failed in cell [{len(started)}], which begins\n    {''.join(lines[:1])}\n"
        f"with\n    {message}\nIt can be read as far as it went in {failed}"
    )


def source_hash(node):
    """Hash of what a notebook does: its cells' kind, text and tags, not their stored outputs."""
    cells = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in node.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def package_hash(folder=PACKAGE):
    """Hash of every Python file below `folder`: any change of the package makes old outputs stale."""
    files = [(str(path.relative_to(folder)), path.read_text("utf-8")) for path in Path(folder).rglob("*.py")]
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:16]


def headline(runs_dir, profile, since=0.0):
    """The main result as a small table, from `<runs_dir>/<profile>/headline.json`, which notebook 04 writes.

    `since` is a time in seconds since the epoch: an older file is called the result of an earlier run.
    """
    path = Path(runs_dir).resolve() / profile / "headline.json"
    if not path.exists():
        return "No headline yet: notebook 04 has not run to its end at this profile."
    found = json.loads(path.read_text(encoding="utf-8"))
    seeds = f"{found['n_seeds']} seed" + "s" * (found["n_seeds"] != 1)
    age = "" if path.stat().st_mtime >= since else ", from an earlier run"
    rows = [f"{found['attack']} on {found['dataset']}, {seeds}{age}", f"{'':6}{'before':>9}{'after':>9}"]
    for measure in ("acc", "asr"):
        before, after = (found[f"{measure}_{when}"] for when in ("before", "after"))
        rows.append(f"{measure.upper():6}{before:>9.1%}{after:>9.1%}")
    return "\n".join(rows)
