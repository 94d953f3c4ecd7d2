"""Settings -> record: train a victim, defend it, measure both, and keep what was found.

A victim (a poisoned or clean model with its trigger) is trained once and kept under `runs/models`, keyed by
a hash of everything that made it; the records of defences go to `runs/records` in the same way. Both are
written atomically, so an interrupted run loses nothing that was finished, and bear a checksum, so a record
that was cut short or edited is noticed and made again. Of several processes that ask for the same one, one
makes it and the others wait (see `once`).
"""

import inspect
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
from ibau.defences.base import Defence, Defended
from ibau.measure.intervals import Rate
from ibau.measure.rates import accuracy, attack_rates, defence_effectiveness_rating
from ibau.measure.stealth import stealth
from ibau.networks import checkpoints, models
from ibau.networks.models import default_device
from ibau.networks.training import to_float, train
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
    described = describe(settings, splits)
    note = runs().path(described)
    record = once(note, lambda: _make_victim(note, settings, described, splits, progress=progress))
    triggers = [Trigger.load(file) for file in _trigger_files(note, settings)]
    attacks = tuple(zip(triggers, settings.targets(len(splits.classes)), strict=True))
    model = checkpoints.load(note.with_suffix(".safetensors"), _untrained(settings, splits))
    return Victim(model.to(default_device()), attacks, record)


def _trigger_files(note: Path, settings: VictimSettings) -> list[Path]:
    return [note.with_suffix(f".{name}.trigger") for name in settings.attacks]


def _untrained(settings: VictimSettings, splits: Splits) -> nn.Module:
    return models.build(settings.architecture, len(splits.classes), settings.width, settings.seed)


def _make_victim(
    note: Path, settings: VictimSettings, described: dict, splits: Splits, *, progress: bool
) -> dict:
    """Train the victim, keep its weights and triggers; its record."""
    started = time.perf_counter()
    targets = settings.targets(len(splits.classes))
    attacks = _make_attacks(settings, splits, targets, progress=progress)
    trigger_seconds = time.perf_counter() - started
    for (trigger, _), file in zip(attacks, _trigger_files(note, settings), strict=True):
        trigger.save(file)
    poisoned = poison_with(attacks, settings, splits)
    model = _untrained(settings, splits).to(default_device())
    history = train(
        model,
        poisoned.data if poisoned else splits.train,
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
        "fit": _fit(model, splits, poisoned),
        "trigger_seconds": trigger_seconds,
        "training_seconds": sum(epoch["seconds"] for epoch in history),
        "training": history,
        "provenance": provenance(),
    }


def _fit(model: nn.Module, splits: Splits, poisoned: Poisoned | None) -> dict:
    """How converged a model is: loss and accuracy on its clean and on its poisoned training images."""
    data = poisoned.data if poisoned else splits.train
    carries = torch.zeros(len(data), dtype=torch.bool)
    if poisoned:
        carries[poisoned.indices] = True
    parts = {
        "clean": data.take((~carries).nonzero().flatten()),
        "poisoned": data.take(carries.nonzero().flatten()),
    }
    return {name: _fit_on(model, part) if len(part) else None for name, part in parts.items()}


@torch.inference_mode()
def _fit_on(model: nn.Module, data: ImageSet) -> dict:
    """Mean cross-entropy and accuracy, by the labels of the training set, in evaluation mode."""
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


def poison_with(attacks: Attacks, settings: VictimSettings, splits: Splits) -> Poisoned | None:
    """The training set as the victim of these attacks sees it; None where there are none."""
    about = {"ratio": settings.poison_ratio, "num_classes": len(splits.classes), "seed": settings.seed}
    if len(attacks) > 1:
        triggers, targets = zip(*attacks, strict=True)
        return poison_several(splits.train, triggers, targets, **about)
    return poison(splits.train, attacks[0][0], target=attacks[0][1], **about) if attacks else None


def _make_attacks(settings: VictimSettings, splits: Splits, targets, *, progress: bool) -> Attacks:
    """The triggers these settings ask for; those that are optimised get the clean model trained alike."""
    clean_model = None
    if any(needs_model(name) for name in settings.attacks):
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
    progress: bool = False,
) -> dict:
    """Defend the victim of `settings` by the named defence; record ACC, ASR, RA and DER, before and after.

    `defence` is one of `ibau.defences.DEFENCES`, `defence_settings` its settings (None: the default ones).
    Everything is measured on `splits.test`, which no defence sees. Of a defence that takes `on_round` there
    is the curve over its rounds, on the first WATCHED test images; that time does not count. The defended
    model and the tensors behind the evidence, if any, are kept beside the record, as `<record>.safetensors`
    and `<record>.tensors`. A record that exists already is read instead.

    Raises ValueError for an unknown defence, or settings of another one.
    """
    chosen = defences.defence(defence)
    chosen_settings = defence_settings or chosen.settings()
    about = describe_defence(settings, splits, defence, chosen_settings, seed=seed)

    def make() -> dict:
        attacked = victim(settings, splits, progress=progress)
        data = _seen_by(chosen, attacked, settings, splits)
        watch = _Watch(attacked, splits)
        result = chosen(
            attacked.model,
            data,
            settings=chosen_settings,
            seed=seed,
            progress=progress,
            **watch.if_taken(chosen),
        )
        return _write_defended(about, attacked, result, watch, splits)

    return once(runs().path(about), make)


def describe_defence(
    settings: VictimSettings, splits: Splits, defence: str, defence_settings, *, seed: int
) -> dict:
    """Everything that makes a defence's record: what its file is named by.

    A defence that sees no clean images has one record whatever their number, so theirs is 0.
    """
    return {
        "victim": describe(settings, splits),
        "defence": defence,
        "version": defences.defence(defence).version,
        "defence_settings": asdict(defence_settings),
        "clean_images": len(splits.clean) if defences.defence(defence).sees == "clean" else 0,
        "seed": seed,
    }


def _seen_by(defence: Defence, attacked: Victim, settings: VictimSettings, splits: Splits) -> ImageSet | None:
    """The images this defence sees."""
    if defence.sees == "poisoned":
        poisoned = poison_with(attacked.attacks, settings, splits)
        return poisoned.data if poisoned else splits.train
    return splits.clean if defence.sees == "clean" else None


class _Watch:
    """Measures the model after each round of a defence, on the first WATCHED test images, and its own time.

    Several triggers share the images, so that watching does not take longer than unlearning.
    """

    def __init__(self, attacked: Victim, splits: Splits):
        self.few = _first(splits, WATCHED)
        self.triggered = _first(splits, WATCHED // max(1, len(attacked.attacks)))
        self.attacked, self.seconds = attacked, 0.0
        self.curve: list[dict] = []

    def if_taken(self, defence: Defence) -> dict:
        """The argument `on_round`, for a defence that takes one."""
        if "on_round" not in inspect.signature(defence.function).parameters:
            return {}
        self.curve = [{"round": 0, **self._measured(self.attacked.model)}]
        return {"on_round": self}

    def __call__(self, model: nn.Module, history: list[dict]) -> None:
        started = time.perf_counter()
        self.curve.append({"round": history[-1]["round"], **self._measured(model)})
        self.seconds += time.perf_counter() - started

    def _measured(self, model: nn.Module) -> dict:
        return _measured(model, self.few, _rates(model, self.triggered, self.attacked.attacks))


def _first(splits: Splits, count: int) -> Splits:
    """The same splits with the first test images alone."""
    return replace(splits, test=splits.test.take(torch.arange(min(count, len(splits.test)))))


def _write_defended(about: dict, attacked: Victim, result: Defended, watch: _Watch, splits: Splits) -> dict:
    """Measure the defended model, keep it and its tensors; the record."""
    before = attacked.record["measured"]
    after = measure(result.model, splits, attacked.attacks)
    checkpoints.save(result.model, runs().path(about, ".safetensors"), about)
    if result.tensors:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in result.tensors.items()}
        with whole_file(runs().path(about, ".tensors")) as temporary:
            save_file(tensors, temporary)
    return {
        "settings": about,
        "before": before,
        "after": {**after, "der": rating(before, after)},
        "seconds": result.seconds - watch.seconds,
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
