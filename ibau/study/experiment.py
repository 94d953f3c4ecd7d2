"""Settings -> record: train a victim, defend it, measure both, and keep what was found.

A victim (a poisoned or clean model with its triggers) is trained once and kept under `runs/models`, named by
a hash of everything that made it; the records of defences go to `runs/records` in the same way. What was
finished outlives an interruption, and what is damaged is made again (see `records`).
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ibau import defences
from ibau.attacks import Poisoned, Trigger, make_trigger, needs_model, poison, poison_several, strength_of
from ibau.data.files import whole_file
from ibau.data.images import ImageSet, Splits
from ibau.defences.base import Defended
from ibau.measure.intervals import Rate
from ibau.measure.rates import accuracy, attack_rates, defence_effectiveness_rating
from ibau.measure.stealth import stealth
from ibau.networks import checkpoints, models
from ibau.networks.models import default_device
from ibau.networks.training import to_float, train
from ibau.study.effort import fitted
from ibau.study.records import once, provenance, runs
from ibau.study.settings import VictimSettings

WATCHED = 500  # test images of a defence's curve

Attacks = tuple[tuple[Trigger, int | str], ...]  # triggers and their targets


@dataclass(frozen=True, eq=False)
class Victim:
    """A trained model, the triggers it obeys with their targets, and the record of its making."""

    model: nn.Module
    attacks: Attacks  # empty for a clean model
    record: dict

    @property
    def trigger(self) -> Trigger | None:
        """The first trigger; None for a clean model."""
        return self.attacks[0][0] if self.attacks else None


def victim(settings: VictimSettings, splits: Splits, *, progress: bool = False) -> Victim:
    """The model these settings describe, trained now or read from an earlier run.

    `splits` must be the data set that the settings name, with its whole training set or the first
    `train_size` images of it. An interrupted training goes on where it stopped.
    """
    note = runs().path(describe(settings, splits))
    record = once(note, lambda: _make_victim(note, settings, splits, progress=progress))
    triggers = [Trigger.load(file) for file in _trigger_files(note, settings)]
    attacks = tuple(zip(triggers, settings.targets(len(splits.classes)), strict=True))
    model = checkpoints.load(note.with_suffix(".safetensors"), _untrained(settings, splits))
    return Victim(model.to(default_device()), attacks, record)


def _trigger_files(note: Path, settings: VictimSettings) -> list[Path]:
    return [note.with_suffix(f".{name}.trigger") for name in settings.attacks]


def _untrained(settings: VictimSettings, splits: Splits) -> nn.Module:
    return models.build(settings.architecture, len(splits.classes), settings.width, settings.seed)


def _make_victim(note: Path, settings: VictimSettings, splits: Splits, *, progress: bool) -> dict:
    """Train the victim, keep its weights and triggers; its record."""
    started, described = time.perf_counter(), describe(settings, splits)
    attacks = _make_attacks(settings, splits, progress=progress)
    trigger_seconds = time.perf_counter() - started
    for (trigger, _), file in zip(attacks, _trigger_files(note, settings), strict=True):
        trigger.save(file)
    poisoned = poison_with(attacks, settings, splits)
    model = _untrained(settings, splits).to(default_device())
    history = train(
        model,
        poisoned.data,
        settings.training,
        seed=settings.seed,
        checkpoint=note.with_suffix(".checkpoint"),
        progress=f"training ({settings.dataset}, {settings.attack})" if progress else None,
    )
    checkpoints.save(model, note.with_suffix(".safetensors"), described)
    rates = _rates(model, splits, attacks)
    return {
        "settings": described,
        "measured": _measured(model, splits, rates),
        "attacks": [_about(*attack, *rate, splits) for attack, rate in zip(attacks, rates, strict=True)],
        "fit": _fit(model, poisoned),
        "trigger_seconds": trigger_seconds,
        "training_seconds": sum(epoch["seconds"] for epoch in history),
        "training": history,
        "provenance": provenance(),
    }


def _fit(model: nn.Module, poisoned: Poisoned) -> dict:
    """How converged a model is: loss and accuracy on its clean and on its poisoned training images."""
    carries = torch.zeros(len(poisoned.data), dtype=torch.bool)
    carries[poisoned.indices] = True
    parts = {"clean": ~carries, "poisoned": carries}
    return {name: _fit_on(model, poisoned.data.take(part)) for name, part in parts.items()}


@torch.inference_mode()
def _fit_on(model: nn.Module, data: ImageSet) -> dict | None:
    """Mean cross-entropy and accuracy, by the labels of the training set; None without images."""
    if not len(data):
        return None
    device, loss, hits = default_device(), 0.0, 0
    for x, y in zip(data.images.split(500), data.labels.split(500), strict=True):
        logits = model(to_float(x.to(device))).float().cpu()
        loss += F.cross_entropy(logits, y.cpu(), reduction="sum").item()
        hits += int((logits.argmax(1) == y.cpu()).sum())
    return {"loss": loss / len(data), "hits": hits, "n": len(data), "accuracy": hits / len(data)}


def describe(settings: VictimSettings, splits: Splits) -> dict:
    """The settings with what identifies the data they were used on: what a victim's file is named by."""
    data = {"data": splits.fingerprint, "split_seed": splits.seed, "train_images": len(splits.train)}
    return {**asdict(settings), **data}


def poison_with(attacks: Attacks, settings: VictimSettings, splits: Splits) -> Poisoned:
    """The training set as the victim of these attacks sees it; as it is where there are none."""
    if not attacks:
        return Poisoned(splits.train, torch.arange(0), ())
    about = {"ratio": settings.poison_ratio, "num_classes": len(splits.classes), "seed": settings.seed}
    triggers, targets = zip(*attacks, strict=True)
    if len(attacks) == 1:
        return poison(splits.train, *triggers, target=targets[0], **about)
    return poison_several(splits.train, triggers, targets, **about)


def _make_attacks(settings: VictimSettings, splits: Splits, *, progress: bool) -> Attacks:
    """The triggers these settings ask for; those that are optimised get the clean model trained alike."""
    clean_model, targets = None, settings.targets(len(splits.classes))
    if any(map(needs_model, settings.attacks)):
        clean = replace(settings, attack="none", target=0, strength=None)
        clean_model = victim(clean, splits, progress=progress).model
    triggers = [
        make_trigger(
            name,
            splits.train.images.shape[-1],
            model=clean_model,
            images=splits.train.images,
            labels=splits.train.labels,
            target=target,
            seed=settings.seed,
            **strength_of(name, settings.strength),
        )
        for name, target in zip(settings.attacks, targets, strict=True)
    ]
    return tuple(zip(triggers, targets, strict=True))


def _about(trigger: Trigger, target: int | str, asr: Rate, ra: Rate, splits: Splits) -> dict:
    """One trigger's part of a victim's record: its settings, what it does to the model, how it hides."""
    return {
        "attack": trigger.name,
        "target": target,
        "asr": asr.as_dict(),
        "ra": ra.as_dict(),
        "stealth": stealth(trigger, splits.test.images[:1000]),
        "trigger": trigger.settings,
    }


def measure(model: nn.Module, splits: Splits, attacks: Attacks) -> dict:
    """ACC, ASR and RA on the test images, as plain dicts; ASR and RA are None without an attack.

    Of several attacks, ASR and RA are over the images of all: each trigger on each image it can attack.
    """
    return _measured(model, splits, _rates(model, splits, attacks))


def _rates(model: nn.Module, splits: Splits, attacks: Attacks) -> list[tuple[Rate, Rate]]:
    """ASR and RA of each attack."""
    images, labels, n = splits.test.images, splits.test.labels, len(splits.classes)
    return [attack_rates(model, images, labels, *attack, n) for attack in attacks]


def _measured(model: nn.Module, splits: Splits, rates: list[tuple[Rate, Rate]]) -> dict:
    acc = accuracy(model, splits.test.images, splits.test.labels)
    asr, ra = (Rate.pooled(same).as_dict() for same in zip(*rates, strict=True)) if rates else (None, None)
    return {"acc": acc.as_dict(), "asr": asr, "ra": ra}


def defence_record(
    settings: VictimSettings,
    splits: Splits,
    defence: str,
    defence_settings=None,
    *,
    seed: int = 0,
    effort: float = 0.0,
    progress: bool = False,
) -> dict:
    """Defend the victim of `settings` by the named defence; record ACC, ASR, RA and DER, before and after.

    defence           one of `ibau.defences.DEFENCES`
    defence_settings  its settings; None: the default ones
    effort            0: with these settings; else they are scaled so that the defence takes this many times
                      the seconds of I-BAU on the same victim with the same clean images

    Everything is measured on `splits.test`, which no defence sees. The curve is along the run, on the first
    WATCHED test images; that time does not count. The defended model and the tensors behind the evidence, if
    any, are kept beside the record, as `<record>.safetensors` and `<record>.tensors`. A record that exists
    already is read instead.

    Raises ValueError for an unknown defence, settings of another one, or a schedule that cannot be scaled.
    """
    chosen = defences.defence(defence)
    chosen_settings = defence_settings or chosen.settings()
    about = describe_defence(settings, splits, defence, chosen_settings, seed=seed, effort=effort)

    def make() -> dict:
        attacked = victim(settings, splits, progress=progress)
        data = splits.clean if chosen.sees == "clean" else None
        if chosen.sees == "poisoned":
            data = poison_with(attacked.attacks, settings, splits).data

        def run(with_settings, **more) -> Defended:
            return chosen(attacked.model, data, settings=with_settings, seed=seed, **more)

        used, effort_of = chosen_settings, None
        if effort:
            most = effort * defence_record(settings, splits, "ibau", seed=seed, progress=progress)["seconds"]
            fit = fitted(chosen_settings, most, lambda tried: run(tried).seconds)
            used, effort_of = fit.settings, fit.as_dict()
        watch = _Watch(attacked, splits)
        result = run(used, progress=progress, watch=watch)
        return {**_write_defended(about, attacked, result, watch, splits), "effort": effort_of}

    return once(runs().path(about), make)


def describe_defence(
    settings: VictimSettings,
    splits: Splits,
    defence: str,
    defence_settings,
    *,
    seed: int,
    effort: float = 0.0,
) -> dict:
    """Everything that makes a defence's record: what its file is named by.

    A defence that sees no clean images has one record whatever their number, so theirs is 0.
    """
    chosen = defences.defence(defence)
    return {
        **({"effort": effort} if effort else {}),
        "victim": describe(settings, splits),
        "defence": defence,
        "version": chosen.version,
        "defence_settings": asdict(defence_settings),
        "clean_images": len(splits.clean) if chosen.sees == "clean" else 0,
        "seed": seed,
    }


class _Watch:
    """Measures the model along a defence's run, on the first WATCHED test images, and its own time.

    Several triggers share the images, so that watching does not take longer than unlearning.
    """

    def __init__(self, attacked: Victim, splits: Splits):
        self.few = _first(splits, WATCHED)
        self.triggered = _first(splits, WATCHED // max(1, len(attacked.attacks)))
        self.attacked, self.away = attacked, 0.0
        self.curve = [{"round": 0, "seconds": 0.0, **self._measured(attacked.model)}]
        self.started = time.perf_counter()

    def __call__(self, model: nn.Module) -> None:
        arrived = time.perf_counter()
        self.add(model, arrived - self.started - self.away)
        self.away += time.perf_counter() - arrived

    def add(self, model: nn.Module, seconds: float, *, ended: bool = False) -> None:
        """A point of the curve: this model, after so many seconds of the defence's own.

        At the end of the run there is none where the last look found the same rates.
        """
        point = {"round": len(self.curve), "seconds": seconds, **self._measured(model)}
        last = {**self.curve[-1], "round": point["round"], "seconds": seconds}
        if not ended or point != last:
            self.curve.append(point)

    def _measured(self, model: nn.Module) -> dict:
        return _measured(model, self.few, _rates(model, self.triggered, self.attacked.attacks))


def _first(splits: Splits, count: int) -> Splits:
    """The same splits with the first test images alone."""
    return replace(splits, test=splits.test.take(range(min(count, len(splits.test)))))


def _write_defended(about: dict, attacked: Victim, result: Defended, watch: _Watch, splits: Splits) -> dict:
    """Measure the defended model, keep it and its tensors; the record."""
    before, seconds = attacked.record["measured"], result.seconds - watch.away
    after = measure(result.model, splits, attacked.attacks)
    watch.add(result.model, seconds, ended=True)
    checkpoints.save(result.model, runs().path(about, ".safetensors"), about)
    if result.tensors:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in result.tensors.items()}
        with whole_file(runs().path(about, ".tensors")) as temporary:
            save_file(tensors, temporary)
    return {
        "settings": about,
        "before": before,
        "after": {**after, "der": rating(before, after)},
        "seconds": seconds,
        "training_seconds": attacked.record["training_seconds"],
        "peak_memory_mb": result.peak_memory_mb,
        "history": result.history,
        "evidence": result.evidence,
        "curve": watch.curve,
        "provenance": provenance(),
        "victim_provenance": attacked.record["provenance"],
    }


def rating(before: dict, after: dict) -> dict | None:
    """DER of two measurements that `measure` made; None without a trigger."""
    if before["asr"] is None:
        return None
    rates = [Rate.read(m[name]) for name in ("acc", "asr") for m in (before, after)]
    return asdict(defence_effectiveness_rating(*rates))
