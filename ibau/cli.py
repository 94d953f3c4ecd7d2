"""The console command `ibau`: a thin layer over `ibau.reproduce`."""

import argparse
import signal
import sys
import time
from pathlib import Path

from ibau import __version__
from ibau import reproduce as runner


def _parser():
    parser = argparse.ArgumentParser(prog="ibau", description="Backdoor attacks and their removal by I-BAU.")
    parser.add_argument("--version", action="version", version=__version__)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "reproduce",
        help="run the notebooks in order; a second call goes on where the first stopped",
        description="Run the notebooks in order into runs/<profile>/notebooks; what is finished is kept.",
    )
    command.add_argument("--profile", default="quick", help="quick (default), desk or paper")
    command.add_argument("--dataset", default="", metavar="NAME", help="default: the profile's own")
    command.add_argument("--data", default="", metavar="DIR", help="folder of the data set's images")
    command.add_argument(
        "--download", action="store_true", help="fetch the data set into DIR first, where it is missing"
    )
    command.add_argument(
        "--only", action="append", default=[], metavar="NN", help="this notebook; repeatable"
    )
    command.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a notebook parameter; repeatable",
    )
    command.add_argument("--fresh", action="store_true", help="run also what an earlier call finished")
    command.add_argument(
        "--list", action="store_true", help="list the notebooks and their parameters, run nothing"
    )
    command.add_argument("--notebooks", metavar="DIR", help="default: the repository's notebooks/")
    return parser


def _list(notebooks):
    for notebook in notebooks:
        print(notebook.name)
        for name, default in notebook.defaults.items():
            print(f"    {name} = {default!r}")


def _reproduce(args):
    notebooks = runner.select(runner.find_notebooks(args.notebooks), args.only)
    if args.list:
        return _list(notebooks)
    if args.download:
        runner.fetch(args.profile, args.dataset, args.data)
    runner.check_options(args.profile, args.dataset, args.data)
    from ibau.experiments import runs_dir

    start = time.time()
    data_dir = str(Path(args.data).resolve()) if args.data else ""
    options = {"profile": args.profile, "dataset": args.dataset, "data_dir": data_dir}
    folder = runner.reproduce(notebooks, options, dict(args.p), runs_dir(), fresh=args.fresh)
    print(f"\n{runner.headline(runs_dir(), args.profile, since=start)}")
    print(f"\nThe executed notebooks are in {folder}")


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def main(argv=None):
    """Run the command line `argv` (default: the process's own) and return the exit status.

    0 done; 1 a notebook failed; 2 the call was wrong; 130 interrupted.
    """
    args = _parser().parse_args(argv)
    # A terminated run must end its notebook's process as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _reproduce(args)
    except runner.UsageError as error:
        print(f"ibau: {error}", file=sys.stderr)
        return 2
    except runner.NotebookFailed as error:
        print(f"FAILED\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on with the notebook that was running.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
