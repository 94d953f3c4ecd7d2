"""Tidy frames -> tables and sentences: what was measured, what meets the goal, and what was not run."""

from collections.abc import Callable

import pandas as pd

from ibau.measure.intervals import wilson
from ibau.report.frame import BASELINES, IBAU, IBAU_PLUS, UNDEFENDED, good, over_seeds, which
from ibau.study.settings import STANDARD

LEAST = 3  # baselines beside an algorithm on a model: with fewer nothing is compared
NEAR = 2.0  # points of DER within which two defences are called comparable
WHOLE_GTSRB = 39_209  # images of its training split, out of which the defender's tracks are taken now
EARLIER_SPLIT = (
    "The GTSRB records are of an earlier split, in which the clean set and the test set were halves of the "
    "test split and show the same signs."
)


# ---- what was not run, and on which images


def ran(rows: pd.DataFrame) -> pd.DataFrame:
    """The `frame`'s rows of those defences that were run on any of its cells."""
    return rows[rows["defence"].isin(rows[rows["run"].astype(bool)]["defence"])]


def left_out(rows: pd.DataFrame) -> str:
    """A sentence that names the defences of which the `frame` has no record; "" where there is none."""
    labels = set(ran(rows)["defence"])
    missing = [label for label in rows["defence"].unique() if label not in labels]
    return f"Not run: {', '.join(missing)}." if missing else ""


def split_note(rows: pd.DataFrame) -> str:
    """A sentence where the `frame` has GTSRB records of the earlier split; "" where it has none.

    They are told by their training images: models of the earlier split were trained on the whole of it.
    """
    earlier = (rows["dataset"] == "gtsrb") & (rows["train_images"] == WHOLE_GTSRB)
    return EARLIER_SPLIT if earlier.any() else ""


# ---- tables


def rates_table(rows: pd.DataFrame, along: str = "attack") -> pd.DataFrame:
    """ACC / ASR in percent of a `frame`, seeds together: a row for each value of `along`, a column a defence.

    * marks what misses its goal, see `good`; the number of seeds is named where it is not 1. Cells that
    were never run say so; a defence without any record is left out, see `left_out`.
    """
    return _table(over_seeds(ran(rows)), along, "defence", _rates)


def removal_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Change of ACC in points / ASR after in percent: a row an attack, a column a data set and clean set.

    Of a `frame` of one defence: the largest clean set of each data set and the smallest; notebook 10 has
    those between. Seeds and marks as in `rates_table`; attacks of which there is no record are left out.
    """
    means = over_seeds(rows)
    sizes = means.groupby("dataset")["clean"]
    ends = means[(means["clean"] == sizes.transform("max")) | (means["clean"] == sizes.transform("min"))]
    ends = ends.sort_values(["dataset", "clean"], ascending=[True, False])
    ends = ends.assign(images=ends["dataset"] + ends["clean"].map(", {:,} clean".format))
    table = _table(ends, "attack", "images", _change)
    return table.reindex(label for label in ("clean", *STANDARD) if label in table.index)


def victims_table(rows: pd.DataFrame) -> pd.DataFrame:
    """ACC / ASR in percent of a frame of `of_victims`: a row an attack, a column each way of training."""
    means = rows.groupby(["attack", "trained"], sort=False)[["acc", "asr"]].mean().reset_index()
    return _table(means, "attack", "trained", _pair).reindex(["clean", *STANDARD], fill_value="not run")


def _table(rows: pd.DataFrame, index: str, columns: str, words: Callable) -> pd.DataFrame:
    """The rows in words, one below and beside the other by these two columns, in the order they come in."""
    table = rows.assign(words=[words(row) for row in rows.itertuples()])
    table = table.pivot(index=index, columns=columns, values="words").fillna("not run")
    table = table.reindex(index=rows[index].unique(), columns=rows[columns].unique())
    return table.rename_axis(index=None, columns=None)


def _rates(row) -> str:
    return f"{_pair(row)}{_marks(row)}" if row.run else "not run"


def _change(row) -> str:
    return f"{row.change:+.1f}{'' if pd.isna(row.asr) else f' / {row.asr:.1f}'}{_marks(row)}"


def _pair(row) -> str:
    return f"{row.acc:.1f}" if pd.isna(row.asr) else f"{row.acc:.1f} / {row.asr:.1f}"


def _marks(row) -> str:
    return f"{'*' * (row.good is False)}{f' (n = {row.n})' * (row.n > 1)}"


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a defence over the attacked models of a `frame`: on how many it was run, and what it did there.

    Models, those that meet the goal, mean ASR and the largest, mean change of ACC, mean DER, median seconds.
    """
    means = over_seeds(rows[rows["attack"] != "clean"])
    lines = {}
    for label, same in means.groupby("defence", sort=False):
        done = same[same["run"]]
        lines[label] = line = {"run": f"{len(done)} of {len(same)}"}
        if done.empty:
            continue
        worst = done.loc[done["asr"].idxmax()]
        line["mean ASR"] = f"{done['asr'].mean():.1f}"
        line["largest ASR"] = f"{worst['asr']:.1f} ({worst['attack']})"
        if label != UNDEFENDED:
            line["goal met"] = f"{int(done['good'].sum())} of {len(done)}"
            line["change of ACC"] = f"{done['change'].mean():+.1f}"
            line["mean DER"] = f"{done['der'].mean():.1f}"
            line["seconds"] = f"{done['seconds'].median():.0f}"
    columns = ["run", "goal met", "mean ASR", "largest ASR", "change of ACC", "mean DER", "seconds"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).fillna("")


def spread(percent: pd.Series, n: pd.Series) -> str:
    """Mean ± standard deviation of several seeds; of one, a share of `n` images, its 95% interval."""
    if len(percent) > 1:
        return f"{percent.mean():.1f} ± {percent.std():.1f}"
    low, high = wilson(percent.iloc[0] / 100, n.iloc[0])
    return f"{percent.iloc[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# ---- an algorithm beside the six baselines


def beside_best(rows: pd.DataFrame, algorithm: str = IBAU) -> pd.DataFrame:
    """An algorithm beside the best of the six baselines by DER, seeds together: a row an attacked model.

    Of models with the algorithm and at least LEAST of the baselines: `own`, `best`, and `baselines`, how many
    were run; with the columns of the `frame` that say which model it is.
    """
    done = over_seeds(rows).dropna(subset="der")
    der = done.pivot(index=which(done, "defence"), columns="defence", values="der")
    der = der.reindex(columns=[algorithm, *BASELINES])
    others = der[[*BASELINES]]
    pairs = pd.DataFrame(
        {"own": der[algorithm], "best": others.max(axis=1), "baselines": others.count(axis=1)}
    )
    return pairs[pairs["own"].notna() & (pairs["baselines"] >= LEAST)].reset_index()


def ratios(rows: pd.DataFrame, algorithm: str = IBAU, of: str = "seconds") -> pd.DataFrame:
    """Seconds of each defence over the algorithm's, `times`: same model, seed, kind of device and threads.

    `of` is a column of the `frame`, such as "seconds", those of the whole run, or "to_effect".

    The `frame`'s rows for which the algorithm was run as well, and whether they meet the goal, `good`.
    """
    same = [*which(rows, "defence"), "device"]
    done = rows[rows[of].notna()]
    own = done[done["defence"] == algorithm][[*same, of]].rename(columns={of: "own"})
    both = done.merge(own, on=same)
    return both.assign(times=both[of] / both["own"], good=[good(row) for row in both.itertuples()])


# ---- in words


def in_words(rows: pd.DataFrame) -> str:
    """Sentences that say what a `frame` shows: what was run, who meets the goal, who is beside the best."""
    means = over_seeds(rows)
    done = means[means["run"] & (means["defence"] != UNDEFENDED)]
    asked = (means["defence"] != UNDEFENDED).sum()
    words = [f"{len(done)} of {asked} defended cells were run.", left_out(rows)]
    attacked = done[done["attack"] != "clean"].groupby("defence", sort=False)["good"].agg(["sum", "size"])
    if len(attacked):
        best = attacked["sum"] / attacked["size"]
        counts = [f"{label} {int(row['sum'])} of {row['size']}" for label, row in attacked.iterrows()]
        words.append(f"The goal is met on attacked models: {', '.join(counts)}.")
        if len(best) > 1:
            most = " and ".join(best.index[best == best.max()])
            words.append(f"The largest share is that of {most}.")
    for algorithm in (IBAU, IBAU_PLUS):
        pairs = beside_best(rows, algorithm)
        if pairs.empty:
            words.append(f"On no model were both {algorithm} and three or more of the six baselines run.")
            continue
        higher, near = (pairs["own"] > pairs["best"]).sum(), (pairs["own"] >= pairs["best"] - NEAR).sum()
        words += [
            f"On {len(pairs)} models {algorithm} and three or more of the six baselines were run: its DER is",
            f"higher than their best one's on {higher}, and no more than {NEAR:g} points lower on {near}.",
        ]
    return " ".join(filter(None, [*words, split_note(rows)]))
