"""The console command `ibau`: a thin layer over `ibau.reproduce`, `ibau.study.grid` and notebook 13."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from ibau import __version__
from ibau import reproduce as runner


def _folder(text):
    """A folder's absolute name, as the notebooks and the workers run in other folders; "" stays as it is."""
    return str(Path(text).expanduser().resolve()) if text else ""


def _parser():
    parser = argparse.ArgumentParser(prog="ibau", description="Backdoor attacks and their removal.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    data, notebooks = (argparse.ArgumentParser(add_help=False) for _ in range(2))  # options of two commands
    data.add_argument("--profile", default="quick", help="quick (default), desk or paper")
    data.add_argument("--dataset", default="", metavar="NAME", help="default: the profile's own")
    data.add_argument("--data", default="", type=_folder, metavar="DIR", help="folder of the images")
    notebooks.add_argument("--notebooks", metavar="DIR", help="default: the repository's notebooks/")
    _add_reproduce(commands, [data, notebooks])
    _add_grid(commands, [data])
    _add_clean(commands, [notebooks])
    return parser


def _add_reproduce(commands, parents):
    command = commands.add_parser(
        "reproduce",
        parents=parents,
        help="run the notebooks in order; a second call goes on where the first stopped",
        description="Run the notebooks in order into runs/<profile>/notebooks; what is finished is kept.",
    )
    option = command.add_argument
    option("--download", action="store_true", help="fetch the data set into DIR first, where it is missing")
    option("--only", action="append", default=[], metavar="NN", help="this notebook; repeatable")
    parameter = ("NAME", "VALUE")
    option("-p", nargs=2, action="append", default=[], metavar=parameter, help="set a parameter; repeatable")
    option("--fresh", action="store_true", help="run also what an earlier call finished")
    option("--list", action="store_true", help="list the notebooks and their parameters, run nothing")
    after = "The same command goes on with the notebook that was running."
    command.set_defaults(run=_reproduce, after_interrupt=after)


def _add_grid(commands, parents):
    command = commands.add_parser(
        "grid",
        parents=parents,
        help="compute the records of the sweeps; a second call goes on where the first stopped",
        description="Compute the records of the sweeps into runs/records; what is there is kept.",
    )
    option = command.add_argument
    option("--sweep", nargs="+", default=[], metavar="NAME", help="default: all of them")
    option("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default 1)")
    option("--attack", nargs="+", default=[], metavar="NAME", help="only these")
    option("--defence", nargs="+", default=[], metavar="NAME", help="only these")
    option("--ratio", nargs="+", type=float, default=[], metavar="SHARE", help="only these poisoned shares")
    option("--size", nargs="+", type=int, default=[], metavar="N", help="only with so many clean images")
    where = command.add_mutually_exclusive_group().add_argument
    where("--jobs", type=int, metavar="N", help="N cells at a time, each in a process of its own")
    where("--scheduler", default="", metavar="tcp://...", help="compute on this Dask scheduler's workers")
    option("--gpu", action="store_true", help="a cell takes one GPU of a Dask worker")
    option("--dry-run", action="store_true", help="say what would run, and run nothing")
    option("--publish", action="store_true", help="then copy the records to figures/data")
    command.set_defaults(run=_grid, after_interrupt="The same command goes on; what is finished is kept.")


CLEAN = {  # parameters of notebook 13, in order -> what they are; the first three have to be given
    "checkpoint": "the model's weights: safetensors, or a .pth of plain tensors",
    "architecture": "small_vgg, preact_resnet18, torchvision:<name> or module:callable; options as in "
    "torchvision:vit_b_16?image_size=64",
    "clean_dir": "clean images, a folder a class; class i is the i-th folder in sorted order",
    "normalize": "mean/std of the model's input, such as 0.5,0.5,0.5/0.5,0.5,0.5, or imagenet; default none",
    "image_size": "pixels the images are cut and resized to; default: the images' own, if all have one",
    "triggered_dir": "images with the trigger, in the folder of their true class: measures ASR",
    "target": "the attacker's class; default: the most common wrong answer to triggered images",
    "out": "the cleaned model; default <name>.cleaned<suffix> beside the checkpoint; never the checkpoint",
    "held_out": "share of the clean images that is kept for the comparison (default 0.3)",
    "search": "of I-BAU+: alternating (default), or class-targeted: one class after another, slower",
    "radius": "l2 ball of the additive perturbation, pixels in [0, 1]; default: from the inspection",
    "rounds": "of I-BAU+; default: as many as ibau.clean takes, class-targeted at least two a class",
    "seed": "of everything drawn at random (default 0)",
}
CLEAN_PATHS = ("checkpoint", "clean_dir", "triggered_dir", "out")


def _add_clean(commands, parents):
    command = commands.add_parser(
        "clean",
        parents=parents,
        help="inspect a model that you were given, clean it by I-BAU+, and compare",
        description="Run notebook 13 on a model that you were given. The cleaned model is written beside it, "
        "together with the page (ipynb and html) and the measured values (json).",
    )
    for name, what in CLEAN.items():
        required = name in list(CLEAN)[:3]
        command.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", required=required, help=what)
    command.set_defaults(run=_clean, after_interrupt="Nothing was saved unless the cleaned model is there.")


def _reproduce(args):
    notebooks = runner.select(runner.find_notebooks(args.notebooks), args.only)
    if args.list:
        for notebook in notebooks:
            print(notebook.name)
            for name, default in notebook.defaults.items():
                print(f"    {name} = {default!r}")
        return
    runner.check_options(args.profile, args.dataset, args.data, args.download)
    from ibau.study.records import runs_dir

    start = time.time()
    options = {"profile": args.profile, "dataset": args.dataset, "data_dir": args.data}
    folder = runner.reproduce(notebooks, options, dict(args.p), runs_dir(), fresh=args.fresh)
    print(f"\n{runner.headline(runs_dir(), args.profile, since=start)}")
    print(f"\nThe executed notebooks are in {folder}")


def _grid(args):
    from ibau.data.images import DataError
    from ibau.study import grid
    from ibau.study.cells import choose

    runner.check_options(args.profile, args.dataset, args.data)
    filters = {"attacks": args.attack, "only": args.defence, "ratios": args.ratio, "sizes": args.size}
    try:
        cells = choose(args.sweep, args.profile, args.dataset, args.seeds, **filters)
        if args.dry_run:
            print(grid.overview(cells, args.data))
            return 0
        with grid.executor(args.jobs, args.scheduler, gpu=args.gpu) as executor:
            counts = grid.run(cells, executor, data_dir=args.data, progress=True)
        if args.publish:
            print(f"{grid.publish(cells, args.data)} records are in figures/data")
    except (DataError, grid.GridError) as error:
        raise runner.UsageError(str(error)) from None
    print(", ".join(f"{counts[state]} {state}" for state in ("there", "done", "failed")))
    return 1 if counts["failed"] else 0


def _clean(args):
    from ibau.networks.checkpoints import ModelError
    from ibau.own_model.load import out_path

    (notebook,) = runner.select(runner.find_notebooks(args.notebooks), ["13"])
    given = {name: getattr(args, name) for name in CLEAN if getattr(args, name)}
    given |= {name: str(Path(text).absolute()) for name, text in given.items() if name in CLEAN_PATHS}
    values = runner.given_parameters(notebook, {}, given)
    # `module:callable` may lie in the folder we were called in; the notebook runs in another
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        saved = out_path(values["checkpoint"], values.get("out", ""))
    except ModelError as error:
        raise runner.UsageError(str(error)) from None
    page = saved.with_suffix(".ipynb")
    try:
        runner.execute(notebook, page, values, {"parameters": values})
    except runner.NotebookFailed as failure:
        kind, text = failure.error
        if kind not in ("ModelError", "DataError", "UnlearningError"):  # unforeseen: the page may explain it
            raise
        failure.failed.unlink(missing_ok=True)
        raise runner.UsageError(" ".join(text.split())) from None
    print(f"The cleaned model is {saved}\nWhat was found: {runner.as_html(page)}")


def main(argv=None):
    """Run the command line `argv` (default: the process's own) and return the exit status.

    0 done; 1 a notebook or a cell failed; 2 the call was wrong; 130 interrupted.
    """
    args = _parser().parse_args(argv)
    # A terminated run must end the processes it started as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return args.run(args) or 0
    except runner.UsageError as error:
        print(f"ibau: {error}", file=sys.stderr)
        return 2
    except runner.NotebookFailed as error:
        print(f"FAILED\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. {args.after_interrupt}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
