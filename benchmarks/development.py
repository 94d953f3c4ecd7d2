"""The development models of `zoo/converged`: how well Phi contracts, what each method leaves of the backdoor.

    python -m benchmarks.development --cifar10 DIR --gtsrb DIR --out DIR

Settings are chosen on what this measures, and no table of a defence shows these models. Held-out images
measure. Writes phi_step.csv and development.csv; `notebooks/appendix_tuning` shows those that lie in
`figures/data/tuning`. There the largest curvature was found by 30 steps of Lanczos' method, here by the
package's eight products.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from ibau.data.splits import load
from ibau.defences import DEFENCES
from ibau.hypergradient.implicit import implicit_hypergradient, kkt_hypergradient
from ibau.hypergradient.layers import exact_float32
from ibau.measure.rates import accuracy, attack_rates
from ibau.study import zoo
from ibau.study.cells import settings_for
from ibau.study.records import provenance
from ibau.unlearning.common import arranged, batches, prepare
from ibau.unlearning.ibau import IBAUSettings, InnerProblem, cross_entropy

MODELS = {
    "cifar10": ("cifar10-badnets-e5a14722102129df", 4000),
    "gtsrb": ("gtsrb-blend-349956564f4466e7", None),
}
STEPS = (None, 1.0, 1.5, 1.8, 2.0, 2.5)  # of Phi, over the curvature; None: 1, whatever the network


@torch.enable_grad()
@exact_float32()
def residuals(model, splits, inner_steps: int) -> list[dict]:
    """The residual and |implicit| / |direct| for each step of Phi, K terms, and for conjugate gradients."""
    settings = IBAUSettings(inner_steps=inner_steps)
    start = prepare(model, splits.clean.images, splits.clean.labels, 0.2, seed=0)
    sample = torch.randperm(len(start.images), generator=start.generator)[: settings.inner_images]
    inner = InnerProblem(start.model, start.images[sample], start.labels[sample], settings)
    found = inner.solve(start.generator)
    contracting = inner.eta / settings.phi_step
    x, y = next(batches(start.images, start.labels, settings.batch_size, start.generator))
    x, carries = arranged(x, start.model), torch.zeros(len(x), 1, 1, 1)
    carries[:2] = 1

    def outer(delta, params):
        theta = dict(zip(inner.names, params, strict=True))
        return cross_entropy(start.model, theta, x + carries * delta, y)

    rows, theta = [], inner.weights()
    for K in (1, 5, 20):
        for step in STEPS:
            inner.eta = step * contracting if step else torch.ones_like(contracting)
            h = implicit_hypergradient(outer, inner.phi, found.delta, theta, maxiter=K)
            rows.append({"solver": "fixed point", "phi_step": step, "K": K, "h": h})
        radius = {"radius": settings.radius, "maxiter": K}
        h = kkt_hypergradient(outer, inner.objective, found.delta, theta, **radius)
        rows.append({"solver": "cg", "phi_step": None, "K": K, "h": h})
    about = {"inner_steps": inner_steps, "sine": found.stationarity}
    return [
        {**about, **row, "residual": h.solution.residual, "ratio": h.ratio}
        for row in rows
        for h in [row.pop("h")]
    ]


def cleaned(victim, splits, name: str, K: int | None, seed: int) -> dict:
    """What one method leaves, on the held-out images."""
    settings = settings_for(name, "paper", splits.name)
    settings = settings if K is None else replace(settings, K=K)
    result = DEFENCES[name](victim.model, splits.clean, settings=settings, seed=seed)
    held, row = splits.heldout, {"defence": name if K is None else f"{name}, K = {K}", "seed": seed}
    for end, model in (("_before", victim.model), ("", result.model)):
        asr, _ = attack_rates(model, held.images, held.labels, *victim.attacks[0], len(splits.classes))
        row |= {f"acc{end}": accuracy(model, held.images, held.labels).value, f"asr{end}": asr.value}
    row |= {"asr_low": asr.low, "asr_high": asr.high, "asr_n": asr.n, "heldout_images": len(held)}
    return {**row, "clean_images": len(splits.clean), "seconds": result.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in (*MODELS, "out"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    args = parser.parse_args()
    steps, left = [], []
    runs = [("ibau", None, 0), ("ibau", None, 1), ("ibau", 0, 0), ("ibau", 0, 1), ("ibau_plus", None, 0)]
    runs += [("finetune", None, 0), ("high_rate", None, 0)]
    for dataset, (name, clean_size) in MODELS.items():
        victim = zoo.load(name, zoo.CONVERGED)
        settings = victim.record["settings"]
        splits = load(dataset, getattr(args, dataset), clean_size=clean_size, seed=settings["seed"])
        about = {"dataset": dataset, "attack": settings["attack"], "target": settings["target"]}
        about["victim_seed"] = settings["seed"]
        steps += [{**about, **row} for T in (5, 20, 100) for row in residuals(victim.model, splits, T)]
        left += [{**about, **cleaned(victim, splits, *run)} for run in runs]
    where = {key: value for key, value in provenance().items() if key != "ibau"}
    for file, rows in (("phi_step", steps), ("development", left)):
        pd.DataFrame(rows).assign(**where).to_csv(Path(args.out) / f"{file}.csv", index=False)


if __name__ == "__main__":
    main()
