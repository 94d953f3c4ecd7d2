"""`ibau reproduce`: order, resuming, errors, on throwaway notebooks that run in about a second each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from ibau import cli
from ibau import reproduce as runner

PARAMETERS = 'profile = "quick"\ndataset = ""\ndata_dir = ""\nseed = 0\nlog = ""'
LOG = "with open(log, 'a') as f: f.write(f'{name} {seed}\\n')"  # so that a test sees what really ran


@pytest.fixture
def book(tmp_path, monkeypatch, write_notebook):
    """A folder with two notebooks, a log of what ran, and `run(...)`: the command on that folder."""

    class Book:
        notebooks, runs, log = tmp_path / "notebooks", tmp_path / "runs", tmp_path / "log.txt"

        def write(self, name, *sources, parameters=PARAMETERS):
            return write_notebook(self.notebooks, name, parameters, f"name = '{name}'\n{LOG}", *sources)

        def arguments(self, *arguments):
            return ["reproduce", "--notebooks", str(self.notebooks), "-p", "log", str(self.log), *arguments]

        def run(self, *arguments):
            return cli.main(self.arguments(*arguments))

        def ran(self):
            return self.log.read_text().split("\n")[:-1] if self.log.exists() else []

        def output(self, name):
            return self.runs / "quick" / "notebooks" / f"{name}.ipynb"

    monkeypatch.setenv("IBAU_RUNS", str(tmp_path / "runs"))
    handler = signal.getsignal(signal.SIGTERM)
    book = Book()
    book.write("01_second", parameters=PARAMETERS + "\nrate = 0.5  # so that a = b\nflag = False")
    book.write("00_first")
    yield book
    signal.signal(signal.SIGTERM, handler)


def test_runs_in_order_and_a_second_call_keeps_everything(book, capfd):
    assert book.run() == 0
    assert book.ran() == ["00_first 0", "01_second 0"]
    out, err = capfd.readouterr()
    assert err == ""
    assert "[1/2] 00_first ... done in" in out and "[2/2] 01_second ... done in" in out
    assert "No headline yet" in out and str(book.output("00_first").parent) in out
    assert sorted(p.name for p in book.output("x").parent.iterdir()) == ["00_first.ipynb", "01_second.ipynb"]

    assert book.run() == 0
    assert len(book.ran()) == 2
    assert "[2/2] 01_second ... kept from an earlier run" in capfd.readouterr().out


def test_what_changed_runs_again_and_the_rest_is_kept(book, monkeypatch):
    book.run()
    book.write("00_first", "1 + 1")
    book.run()
    assert book.ran()[2:] == ["00_first 0"]
    book.run("-p", "seed", "3")
    assert book.ran()[3:] == ["00_first 3", "01_second 3"]
    book.run("-p", "seed", "3", "-p", "rate", "1", "--only", "1")  # a whole number does for a rate
    assert book.ran()[5:] == ["01_second 3"]
    book.run("-p", "seed", "3", "--only", "00", "--fresh")
    assert book.ran()[6:] == ["00_first 3"]
    monkeypatch.setattr(runner, "package_hash", lambda: "another")
    book.run("-p", "seed", "3", "--only", "00_first")
    assert book.ran()[7:] == ["00_first 3"]


def test_stored_outputs_do_not_count_as_a_change(book):
    book.run("--only", "00")
    path = book.notebooks / "00_first.ipynb"
    node = nbformat.read(path, as_version=4)
    node.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(node, path)
    book.run("--only", "00")
    assert len(book.ran()) == 1


def test_package_hash_sees_every_module(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("a = 1")
    before = runner.package_hash(tmp_path)
    assert before == runner.package_hash(tmp_path)
    (tmp_path / "deep" / "a.py").write_text("a = 2")
    assert runner.package_hash(tmp_path) != before


def test_a_notebook_runs_in_its_own_folder_with_this_python(book):
    book.write("00_first", "import os, sys\nprint(os.getcwd(), sys.executable, os.environ['IBAU_RUNS'])")
    assert book.run("--only", "0") == 0
    [output] = nbformat.read(book.output("00_first"), as_version=4).cells[-1].outputs
    assert output.text.split() == [str(book.notebooks), sys.executable, str(book.runs)]


def test_a_failing_notebook_is_named_with_its_cell_and_error(book, capfd):
    book.write("00_first", "print('so far')\nraise ValueError('ratio is 2; it lies in [0, 1]')")
    assert book.run() == 1
    err = capfd.readouterr().err
    for part in ("00_first", "cell [4]", "print('so far')", "ValueError: ratio is 2; it lies in [0, 1]"):
        assert part in err
    assert "Traceback" not in err
    assert not book.output("00_first").exists()
    assert "so far" in book.output("00_first").with_suffix(".failed.ipynb").read_text()
    assert book.ran() == ["00_first 0"], "nothing runs after a failure"

    book.write("00_first")
    assert book.run() == 0
    assert [p.name for p in sorted(book.output("x").parent.iterdir())] == [
        "00_first.ipynb",
        "01_second.ipynb",
    ]


def test_a_notebook_whose_process_dies_is_named(book, capfd):
    book.write("00_first", "import os\nos._exit(9)")
    assert book.run() == 1
    err = capfd.readouterr().err
    assert "00_first" in err and "cell [4]" in err and "import os" in err and "died" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--profile", "fast"], ["'fast'", "quick", "desk", "paper"]),
        (["--dataset", "imagenet"], ["'imagenet'", "mnist5k", "cifar10", "gtsrb", "folder"]),
        (["--only", "07"], ["'07'", "00_first", "01_second"]),
        (["-p", "sed", "1"], ["'sed'", "seed", "rate", "flag"]),
        (["-p", "rate", "1", "--only", "00"], ["'rate'", "seed"]),
        (["-p", "seed", "one"], ["seed", "int", "'one'"]),
        (["-p", "seed", "1.5"], ["seed", "int", "'1.5'"]),
        (["-p", "rate", "True"], ["rate", "float", "'True'"]),
        (["-p", "flag", "1"], ["flag", "bool", "'1'"]),
        (["-p", "dataset", "gtsrb"], ["dataset", "--dataset"]),
        (["--profile", "desk"], ["cifar10", "--data"]),
        (["--dataset", "gtsrb"], ["gtsrb", "--data"]),
        (["--dataset", "gtsrb", "--data", "nowhere"], ["nowhere", "not found", "--data"]),
        (["--data", "."], ["mnist5k", "--data"]),
        (["--notebooks", "nowhere"], ["nowhere", "--notebooks"]),
    ],
)
def test_a_wrong_call_lists_what_is_right_and_runs_nothing(book, capsys, monkeypatch, arguments, named):
    monkeypatch.setenv("IBAU_CACHE", str(book.runs))
    assert book.run(*arguments) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in named), err
    assert book.ran() == []


@pytest.mark.parametrize("text", ["not json", "{}", "[]"])
def test_a_broken_notebook_is_named(book, capsys, text):
    (book.notebooks / "02_broken.ipynb").write_text(text)
    assert book.run() == 2
    assert "02_broken.ipynb" in capsys.readouterr().err


def test_a_parameters_cell_holds_plain_values_only(book, capsys):
    book.write("00_first", parameters="seed = 3 * 4")
    assert book.run() == 2
    assert "seed = 3 * 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [("3", 0, 3), ("-3", 0, -3), ("1e-3", 0.1, 0.001), ("2", 0.1, 2.0), ("True", False, True)]
    + [("5000", "", "5000"), ("None", None, None), ("7", None, 7), ("all-to-all", None, "all-to-all")],
)
def test_values_take_the_type_of_the_default(text, default, value):
    parsed = runner.parse_value("name", text, default)
    assert parsed == value and type(parsed) is type(value)


def test_list_shows_notebooks_and_parameters(book, capsys):
    assert book.run("--list") == 0
    out = capsys.readouterr().out
    assert out.index("00_first") < out.index("01_second") < out.index("rate = 0.5")
    assert book.ran() == []


def test_headline_shows_before_and_after(tmp_path):
    found = dict(dataset="mnist5k", attack="badnets", n_seeds=3)
    found |= dict(acc_before=0.971, acc_after=0.958, asr_before=1.0, asr_after=0.042)
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "headline.json").write_text(json.dumps(found))
    lines = runner.headline(tmp_path, "quick").splitlines()
    assert lines[0] == "badnets on mnist5k, 3 seeds"
    assert [line.split() for line in lines[2:]] == [["ACC", "97.1%", "95.8%"], ["ASR", "100.0%", "4.2%"]]
    assert len({len(line) for line in lines[1:]}) == 1
    assert "earlier run" in runner.headline(tmp_path, "quick", since=time.time() + 60)


def start(book):
    """The command as a process group of its own, in a terminal's place."""
    command = [sys.executable, "-m", "ibau.cli", *book.arguments()]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # what was started in the background of a shell hands on that it ignores SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid):
    """Whether the process runs; one that has ended but was not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def slow(book):
    """`book` with a third notebook, and a second that writes its process id and hangs until `go` exists."""
    pid, go = book.runs.parent / "pid", book.runs.parent / "go"
    waits = f"import os, time, pathlib\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    waits += f"\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)"
    book.write("01_second", waits)
    book.write("02_third")
    book.pid, book.go = pid, go
    return book


def test_a_killed_run_goes_on_without_redoing_what_was_done(slow, capfd):
    process = start(slow)
    wait_for(lambda: slow.pid.exists() and slow.pid.read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert slow.output("00_first").exists() and not slow.output("01_second").exists()

    slow.go.touch()
    assert slow.run() == 0
    assert slow.ran() == ["00_first 0", "01_second 0", "01_second 0", "02_third 0"]
    out = capfd.readouterr().out
    assert "00_first ... kept from an earlier run" in out and "[3/3] 02_third ... done in" in out
    wait_for(lambda: not alive(int(slow.pid.read_text())))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_says_how_to_go_on(slow, number):
    process = start(slow)
    wait_for(lambda: slow.pid.exists() and slow.pid.read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip() == "Interrupted. The same command goes on with the notebook that was running."
    assert not alive(int(slow.pid.read_text()))
    assert [p.name for p in slow.output("x").parent.iterdir()] == ["00_first.ipynb"]
