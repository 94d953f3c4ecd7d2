"""The paper's claims C1 to C9 beside what was measured: verdicts follow from `figures/data` by stated rules.

`make figures` writes the table into README.md. A claim's function takes the `Evidence` and returns a verdict
and what it rests on; its docstring is the rule. The verdicts are on I-BAU, the paper's algorithm. What the
same rules find for I-BAU+, ours, stands beside them in numbers and is no verdict on the paper.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
from scipy import stats

from ibau.data.splits import CLEAN_SIZE
from ibau.report.frame import (
    BASELINES,
    CONTROL,
    IBAU,
    IBAU_PLUS,
    SIGHTED,
    over_seeds,
    published,
    recorded,
    which,
)
from ibau.report.tables import LEAST, NEAR, beside_best, ratios
from ibau.study.cells import REAL, SWEEPS
from ibau.study.records import figures_dir
from ibau.study.settings import VictimSettings

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold"
UNDECIDED = "not decided"  # the interval is wider than the difference that matters
UNMEASURED = "not measured"
NOTHING = UNMEASURED, "–"
MANY = 5  # attacks of the nine, on each data set, before a comparison over attacks holds
CONFIDENCE = 0.95
MATTERS = 1.0  # points of ASR or ACC; a smaller difference counts as none


@dataclass(frozen=True)
class Evidence:
    """What the claims are judged by.

    theory    `figures/data/theory.csv`, a row a check of notebook 03: claim, case, n, measured, bound, whole
    implicit  `figures/data/implicit_runs.csv`, a row a run of notebook 12
    cells     what is `recorded` of SWEEPS on real images, with a column `sweep`
    algorithm the label of the one that is judged by its cells
    """

    theory: pd.DataFrame
    implicit: pd.DataFrame
    cells: pd.DataFrame
    algorithm: str = IBAU

    def on_ours(self) -> "Evidence":
        """The same for I-BAU+: its cells alone, for theory and implicit are about the paper's algorithm."""
        nothing = {"theory": self.theory[:0], "implicit": self.implicit[:0]}
        return replace(self, **nothing, algorithm=IBAU_PLUS)

    def rows(self, *names: str) -> pd.DataFrame:
        """The cells of these sweeps."""
        return self.cells[self.cells["sweep"].isin(names)]

    def of(self, *names: str) -> pd.DataFrame:
        """The cells of these sweeps, seeds together, as `over_seeds` gives them."""
        return over_seeds(self.rows(*names))


def gather() -> Evidence:
    """The evidence in `figures/data`."""
    folder, among = figures_dir() / "data", published()
    cells = [
        recorded(name, profile, dataset, among=among).assign(sweep=name)
        for name in SWEEPS
        for profile in ("desk", "paper")  # which are meant for real images
        for dataset in REAL
    ]
    theory, implicit = (pd.read_csv(folder / name) for name in ("theory.csv", "implicit_runs.csv"))
    return Evidence(theory, implicit, pd.concat(cells, ignore_index=True))


# ---- the claims


def c1(found: Evidence) -> tuple[str, str]:
    """Holds where the algorithm meets the goal on 9 of 10 attacked models, in part from half of them on.

    The goal: ACC down by 2 points at most, ASR 10% at most. Models of the single-target and multi-target
    sweeps on real images.
    """
    own = found.of("single-target", "multi-target")
    own = own[(own["defence"] == found.algorithm) & own["run"] & (own["attack"] != "clean")]
    good, n = int(own["good"].sum()), len(own)
    if not n:
        return NOTHING
    said = f"{good} of {n} attacked models at the goal; mean ASR {own['asr'].mean():.1f}%"
    return (HOLDS if good / n >= 0.9 else PARTLY if good / n >= 0.5 else FAILS), said


def c2(found: Evidence) -> tuple[str, str]:
    """Holds where every defence, with all its terms, takes the formula's outer step on the toy.

    To the recorded tolerance. In part where one was shown without some of its terms; not if a step differs.
    """
    checks = found.theory[found.theory["claim"] == "C2"]
    if checks.empty:
        return NOTHING
    same, whole = checks["measured"] <= checks["bound"], checks["whole"].astype(bool)
    said = f"{same.sum()} of {len(checks)} defences take the formula's step"
    said += f", {(same & whole).sum()} with all terms"
    if not same.all():
        return FAILS, said
    return (HOLDS if whole.all() else PARTLY), said


def c3(found: Evidence) -> tuple[str, str]:
    """Two parts, each by the 95% interval of a mean difference over at least 3 victims that both methods met.

    The implicit term helps: `fp5` less `direct` is below 0 in ASR or above 0 in ACC. The naive heuristic is
    unstable: `naive` less `fp5` is above 0 in the mean rise of ASR or fall of ACC between rounds. A mean of
    less than a point counts as none. Holds with both, in part with one. Not decided where an interval reaches
    to a difference of a point or more, so that the part can neither be shown nor excluded.
    """
    asr, acc = (_difference(found.implicit, value, "fp5", "direct") for value in ("asr_after", "acc_after"))
    rise, fall = (_difference(found.implicit, value, "naive", "fp5") for value in ("asr_rise", "acc_fall"))
    if asr is None or rise is None:
        return NOTHING
    helps = [_shown((-asr[0], -asr[2], -asr[1])), _shown(acc)]
    unstable = [_shown(rise), _shown(fall)]
    said = f"ASR with the term less without {_interval(asr)}; rise of ASR, naive less with {_interval(rise)}"
    said += f" points ({CONFIDENCE:.0%} intervals)"
    parts = [True if True in part else None if None in part else False for part in (helps, unstable)]
    if True in parts:
        return (HOLDS if all(parts) else PARTLY), said
    return (UNDECIDED if None in parts else FAILS), said


def c4(found: Evidence) -> tuple[str, str]:
    """Holds where the bounds hold at every step on the toy, and on networks the series contracts in each run.

    In part where only the bounds hold, for they rest on a contraction. Runs: `fp5` of notebook 12.
    """
    checks = found.theory[found.theory["claim"] == "C4"]
    if checks.empty:
        return NOTHING
    held = checks["measured"] <= checks["bound"]
    said = f"the bounds hold in {held.sum()} of {len(checks)} runs on the toy"
    runs = found.implicit[found.implicit["method"] == "fp5"]
    if not held.all():
        return FAILS, said
    if runs.empty:
        return PARTLY, f"{said}; on networks not measured"
    shrinks = runs["contraction"] < 1
    said += f"; on networks the series contracts in {shrinks.sum()} of {len(runs)}"
    said += f", residual after 5 terms {runs['residual'].mean():.2f}"
    return (HOLDS if shrinks.all() else PARTLY), said


def c5(found: Evidence) -> tuple[str, str]:
    """Holds where every gap is under its bound, and for each kind of model some bound is below 1.

    A bound of 1 or more says nothing, as no loss exceeds 1: in part where a kind of model has no better one.
    """
    checks = found.theory[found.theory["claim"] == "C5"]
    if checks.empty:
        return NOTHING
    groups = checks.groupby("case", sort=False)
    said = "; ".join(
        f"{row.case}: gap {row.measured:.3f}, bound {row.bound:.2f} at {row.n:,.0f} images"
        for row in checks.loc[groups["n"].idxmax()].itertuples()
    )
    if (checks["measured"] > checks["bound"]).any():
        return FAILS, said
    return (HOLDS if (groups["bound"].min() < 1).all() else PARTLY), said


def c6(found: Evidence) -> tuple[str, str]:
    """By DER, on models with the algorithm and at least 3 of the six baselines, beside the best of these.

    Holds where it is comparable, no more than 2 points lower, on 9 of 10 models, and higher on more than
    half, with 5 of the 9 attacks or more on each data set; in part where it is comparable on at least half.
    """
    pairs = beside_best(found.rows("single-target", "multi-target"), found.algorithm)
    if pairs.empty:
        return NOTHING
    near, higher = pairs["own"] >= pairs["best"] - NEAR, pairs["own"] > pairs["best"]
    run, asked = pairs["baselines"].sum(), len(pairs) * len(BASELINES)
    said = f"DER comparable to the best baseline's on {near.sum()} of the {len(pairs)} models with baselines"
    said += f", higher on {higher.sum()} ({run} of {asked} baseline cells run)"
    attacks = pairs.groupby("dataset")["attack"].nunique().reindex(REAL, fill_value=0)
    if near.mean() >= 0.9 and higher.mean() > 0.5 and (attacks >= MANY).all():
        return HOLDS, said
    return (PARTLY if near.mean() >= 0.5 else FAILS), said


USUAL = 100 * VictimSettings.poison_ratio  # percent poisoned
AXES = {  # axis -> its sweeps, and the column in which it runs
    "attack": (("single-target", "multi-target"), "attack"),
    "poison": (("poison-ratio",), "ratio"),
    "clean set": (("clean-size",), "clean"),
}


def c7(found: Evidence) -> tuple[str, str]:
    """Along each axis (attack, poison ratio, clean set), the cells at the goal, of those that both ran.

    A cell counts on one axis alone: at the usual ratio and size it is one of the attack axis. An axis is won
    where neither fine-tuning nor a baseline with at least 3 such cells, not all at one point of the axis, has
    more of them than the algorithm. Holds where all three axes are, in part where one is. Along the clean set
    only those count that use clean images.
    """
    won, said = [], []
    for axis, (names, along) in AXES.items():
        rows = found.of(*names)
        if axis == "poison":
            rows = rows[rows["ratio"] != USUAL]
        if axis == "clean set":
            fewer = rows["clean"] < rows["dataset"].map(CLEAN_SIZE)
            rows = rows[fewer & rows["defence"].isin(SIGHTED)]
        beside = _at_goal(rows, found.algorithm, along)
        if beside.empty:
            said.append(f"{axis}: not compared")
            continue
        won.append((beside["theirs"] <= beside["own"]).all())
        best = beside.loc[((beside["theirs"] - beside["own"]) / beside["n"]).idxmax()]
        said.append(f"{axis}: {found.algorithm} {best.own}, {best.name} {best.theirs} of {best.n}")
    if not won:
        return NOTHING
    verdict = HOLDS if sum(won) == len(AXES) else PARTLY if any(won) else FAILS
    return verdict, f"cells at the goal, beside the best of the others: {'; '.join(said)}"


def c8(found: Evidence) -> tuple[str, str]:
    """Seconds to take effect: the fastest baseline's over the algorithm's, a ratio a model.

    A run has taken effect when it first meets the goal on the watched images. Runs of the single-target
    sweep, on one kind of device with the same number of threads. Holds where the median is at least 13, the
    paper's figure; in part where it is at least 2: what else a machine does makes less of a difference. The
    same ratio of whole runs that meet the goal stands beside it.
    """
    rows = found.rows("single-target")
    whole = _fastest(rows, found.algorithm, "seconds")
    said = f"whole runs: {_times(whole)}" if len(whole) else ""
    effect = _fastest(rows, found.algorithm, "to_effect")
    if effect.empty:
        return (UNMEASURED, f"time to effect not measured; {said}") if said else NOTHING
    said = f"time to effect of the fastest baseline: {_times(effect)}{'; ' * bool(said)}{said}"
    middle = effect.median()
    return (HOLDS if middle >= 13 else PARTLY if middle >= 2 else FAILS), said


def _fastest(rows: pd.DataFrame, algorithm: str, of: str) -> pd.Series:
    """A ratio a model with LEAST baselines or more: the fastest of those at the goal over the algorithm."""
    times = ratios(rows, algorithm, of)
    times = times[times["defence"].isin(BASELINES) & (times["attack"] != "clean")]
    model = ["profile", "dataset", "attack", "seed", "device"]
    times = times[times.groupby(model)["times"].transform("size") >= LEAST]
    if of == "seconds":
        times = times[times["good"].astype(bool)]
    return times.groupby(model)["times"].min()


def _times(of_models: pd.Series) -> str:
    spread = f"{of_models.min():.1f} to {of_models.max():.1f} on {len(of_models)} models"
    return f"{of_models.median():.1f} times as long ({spread})"


def c9(found: Evidence) -> tuple[str, str]:
    """With 100 clean images, at the goal for so few (ACC down by 5 points at most, ASR 20% at most).

    Holds where the algorithm meets it on every model and no baseline that uses clean images on any; in part
    where it meets it on at least half, and on more than any baseline does of those that both ran.
    """
    few = found.of("clean-size")
    few = few[(few["clean"] == 100) & few["defence"].isin(SIGHTED)]
    beside = _at_goal(few, found.algorithm).drop(CONTROL, errors="ignore")
    if beside.empty:
        return NOTHING
    own = few[(few["defence"] == found.algorithm) & few["run"]]
    good, n = int(own["good"].sum()), len(own)
    best = beside.loc[(beside["theirs"] / beside["n"]).idxmax()]
    said = f"at the goal on {good} of {n} models; best baseline {best.name}, {best.theirs} of {best.n}"
    if good == n and not beside["theirs"].any():
        return HOLDS, said
    ahead = (beside["theirs"] < beside["own"]).all()
    return (PARTLY if good >= n / 2 and ahead else FAILS), said


def _at_goal(means: pd.DataFrame, algorithm: str, along: str = "") -> pd.DataFrame:
    """The algorithm beside fine-tuning and each baseline, a row each: `n` attacked models that both ran.

    LEAST of them or more.
    `own` of them are at the goal with the algorithm, `theirs` with the baseline. Baselines whose cells all
    have the same value in the column `along` do not count.
    """
    done = means[means["run"] & (means["attack"] != "clean")]
    wide = done.pivot(index=which(means, "defence"), columns="defence", values="good")
    wide = wide.reindex(columns=[algorithm, CONTROL, *BASELINES])
    lines = {}
    for label in (CONTROL, *BASELINES):
        both = wide[[algorithm, label]].dropna()
        if len(both) >= LEAST and (not along or len(both.index.unique(along)) > 1):
            lines[label] = (int(both[algorithm].sum()), int(both[label].sum()), len(both))
    return pd.DataFrame.from_dict(lines, orient="index", columns=["own", "theirs", "n"])


Interval = tuple[float, float, float]  # a mean, and the ends of its interval


def _difference(runs: pd.DataFrame, value: str, method: str, other: str) -> Interval | None:
    """Mean of method less other over victims that both met (Student's t); None for too few of them."""
    victims = ["dataset", "attack", "rounds", "outer_steps", "seed"]
    wide = runs.pivot(index=victims, columns="method", values=value).reindex(columns=[method, other])
    x = (wide[method] - wide[other]).dropna()
    if len(x) < LEAST:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std() / math.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def _shown(difference: Interval) -> bool | None:
    """Is the difference above 0 and large enough to matter? None where its interval leaves that open."""
    middle, low, high = difference
    return True if middle >= MATTERS and low > 0 else None if high >= MATTERS else False


def _interval(difference: Interval) -> str:
    middle, low, high = difference
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


# ---- the table


@dataclass(frozen=True)
class Claim:
    """What the paper says, in short; the function that judges it; and the notebooks to read."""

    says: str
    judge: Callable[[Evidence], tuple[str, str]]
    notebooks: str


CLAIMS = {
    "C1": Claim("removal is a minimax, on a small clean set", c1, "03, 04"),
    "C2": Claim("much of earlier work is a special case of it", c2, "03"),
    "C3": Claim("the implicit hypergradient solves it; the naive heuristic is unstable", c3, "12"),
    "C4": Claim("error and convergence are bounded", c4, "03, 12"),
    "C5": Claim("robustness on the clean set carries over to unseen images", c5, "03"),
    "C6": Claim("comparable to the best of six baselines, most often better", c6, "06, 07, 08"),
    "C7": Claim("more robust to attack, poison ratio and clean set", c7, "06, 09, 10"),
    "C8": Claim("more than 13 times faster than the most efficient baseline", c8, "11"),
    "C9": Claim("works with 100 clean images, where every baseline fails", c9, "10"),
}


def judged(found: Evidence) -> pd.DataFrame:
    """A row a claim: what it says, the verdict on I-BAU, its numbers and I-BAU+'s, the notebooks."""
    lines = []
    for claim in CLAIMS.values():
        verdict, measured = claim.judge(found)
        _, ours = claim.judge(found.on_ours())
        lines.append((claim.says, verdict, measured, ours, claim.notebooks))
    columns = ["the paper", "here", "measured", f"{IBAU_PLUS}, ours", "notebook"]
    return pd.DataFrame(lines, index=pd.Index(CLAIMS, name="claim"), columns=columns)
