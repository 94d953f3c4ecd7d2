"""Victims and records are made once, named by all that made them, and never half written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, fields, replace

import pytest
import torch
from safetensors.torch import load_file

from ibau.attacks import ATTACKS, Trigger
from ibau.cleaning.recipe import CleanSettings
from ibau.data.images import ImageSet, Splits
from ibau.data.splits import DATASETS
from ibau.defences.base import Defence, Defended
from ibau.measure.intervals import Rate
from ibau.networks import checkpoints, models, training
from ibau.networks.checkpoints import ModelError
from ibau.networks.predict import predict
from ibau.networks.training import TrainSettings, to_float
from ibau.study import experiment, records
from ibau.study.experiment import defence_record, victim
from ibau.study.records import Records, key, once, read_record, write_json, write_record
from ibau.study.settings import PROFILES, STANDARD, VictimSettings, profile, standard_victims
from ibau.unlearning.ibau import IBAUSettings

TRAINING = TrainSettings(epochs=3, batch_size=16, precision="float32")
SETTINGS = VictimSettings(
    dataset="tint", target=2, width=0.125, train_size=60, training=TRAINING, poison_ratio=0.3
)
DEFENCE = CleanSettings(
    rounds=2, outer_steps=2, recovery_steps=0, batch_size=10, inner_steps=2, inner_images=4, K=1
)


def tint(seed, n):
    """Images of three classes: the class's channel is bright."""
    labels = torch.arange(n) % 3
    images = torch.randint(0, 120, (n, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
    images[torch.arange(n), labels] += 100
    return ImageSet(images.to(torch.uint8), labels)


@pytest.fixture(scope="module")
def splits():
    parts = {name: tint(i, n) for i, (name, n) in enumerate([("train", 60), ("clean", 15), ("heldout", 6)])}
    return Splits("tint", **parts, test=tint(9, 30), classes=("r", "g", "b"), fingerprint="0123456789abcdef")


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAU_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(experiment, "default_device", lambda: torch.device("cpu"))
    return tmp_path / "runs"


@pytest.fixture
def untrained(monkeypatch):
    """A function after whose call training and defending are errors."""

    def forbid():
        def fail(*_, **__):
            raise AssertionError("this was done before")

        monkeypatch.setattr(experiment, "train", fail)
        monkeypatch.setattr(Defence, "__call__", fail)

    return forbid


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- victims


def test_a_victim_is_trained_once(splits, runs, untrained):
    first = victim(SETTINGS, splits)
    kept = names(runs / "models")
    stem = kept[0].removesuffix(".badnets.trigger")
    assert kept == [f"{stem}.badnets.trigger", f"{stem}.json", f"{stem}.safetensors"]
    untrained()
    again = victim(SETTINGS, splits)
    assert same(again.model, first.model)
    assert not again.model.training
    assert [target for _, target in again.attacks] == [target for _, target in first.attacks] == [2]
    assert torch.equal(again.trigger.pattern, first.trigger.pattern)
    assert again.record == json.loads(json.dumps(first.record))
    assert names(runs / "models") == kept


def test_a_victims_record_says_how_converged_it_is(splits, runs):
    made = victim(SETTINGS, splits)
    poisoned = experiment.poison_with(made.attacks, SETTINGS, splits)
    right = predict(made.model, poisoned.data.images) == poisoned.data.labels
    carries = torch.zeros(len(right), dtype=torch.bool)
    carries[poisoned.indices] = True
    for name, chosen in (("clean", ~carries), ("poisoned", carries)):
        found = made.record["fit"][name]
        assert (found["hits"], found["n"]) == (int(right[chosen].sum()), int(chosen.sum()))
        logits = made.model(to_float(poisoned.data.images[chosen]))
        expected = torch.nn.functional.cross_entropy(logits, poisoned.data.labels[chosen]).item()
        assert found["loss"] == pytest.approx(expected, rel=1e-4)
    clean = victim(replace(SETTINGS, attack="none", target=0), splits)
    assert clean.record["fit"]["poisoned"] is None
    assert clean.record["fit"]["clean"]["n"] == len(splits.train)


def test_a_victims_record_says_what_made_it(splits, runs):
    made = victim(SETTINGS, splits)
    about = made.record["settings"]
    assert about["data"] == splits.fingerprint
    assert (about["train_images"], about["target"], about["training"]["epochs"]) == (60, 2, 3)
    (weights,) = (runs / "models").glob("*.safetensors")
    assert json.loads(checkpoints.read_metadata(weights)["settings"]) == about
    assert weights.name.startswith("tint-badnets-")
    measured = made.record["measured"]
    assert measured["acc"]["n"] == 30
    assert measured["asr"]["n"] == measured["ra"]["n"] == 20  # without the target class
    (about,) = made.record["attacks"]
    assert (about["attack"], about["target"], about["trigger"]["size"]) == ("badnets", 2, 4)
    assert {name: about[name] for name in ("asr", "ra")} == {name: measured[name] for name in ("asr", "ra")}
    assert about["stealth"]["l0"] == 16
    assert len(made.record["training"]) == 3
    assert {"device", "torch", "ibau", "commit", "date"} <= set(made.record["provenance"])


def test_a_clean_model_has_no_trigger_and_no_asr(splits, runs, untrained):
    settings = replace(SETTINGS, attack="none")
    made = victim(settings, splits)
    assert made.trigger is None and made.attacks == ()
    assert made.record["attacks"] == []
    assert made.record["measured"]["asr"] is made.record["measured"]["ra"] is None
    assert not list((runs / "models").glob("*.trigger"))
    untrained()
    assert victim(settings, splits).trigger is None


def test_an_attack_that_needs_a_model_gets_the_clean_one(splits, runs, monkeypatch):
    seen = {}

    def make(attack, image_size, *, model, **offered):
        seen.update(offered, model=model, image_size=image_size)
        return Trigger(attack, "replace", torch.ones(3, 32, 32), torch.zeros(1, 32, 32))

    monkeypatch.setattr(experiment, "make_trigger", make)
    victim(replace(SETTINGS, attack="l2_inv"), splits)
    clean = victim(replace(SETTINGS, attack="none", target=0), splits)
    assert same(seen["model"], clean.model)
    victim(replace(SETTINGS, attack="l2_inv", poison_ratio=0.1), splits)  # ... whatever the ratio
    assert len(list((runs / "models").glob("tint-none-*.json"))) == 1
    assert (seen["image_size"], seen["target"], seen["seed"]) == (32, 2, 0)


OTHER = {
    "dataset": "other",
    "attack": "blend",
    "target": "all-to-all",
    "poison_ratio": 0.1,
    "strength": 5,
    "architecture": "preact_resnet18",
    "width": 0.5,
    "train_size": 30,
    "training": replace(TRAINING, lr=2e-3),
    "seed": 1,
}


def test_every_setting_names_another_victim(splits, runs, monkeypatch):
    """No two settings may share a file; a setting added later must be added to OTHER."""
    assert set(OTHER) == {field.name for field in fields(VictimSettings)}
    monkeypatch.setattr(experiment, "train", lambda *_, **__: [])
    stems = set()
    variants = [SETTINGS, *(replace(SETTINGS, **{name: value}) for name, value in OTHER.items())]
    for field in fields(TrainSettings):
        value = getattr(TRAINING, field.name)
        other = {"schedule": "constant", "augment": "crop", "precision": "auto"}.get(field.name)
        variants.append(replace(SETTINGS, training=replace(TRAINING, **{field.name: other or 2 * value + 1})))
    for settings in variants:
        victim(settings, splits)
    victim(SETTINGS, replace(splits, fingerprint="f" * 16))
    victim(SETTINGS, replace(splits, train=splits.train.take(range(30))))
    victim(SETTINGS, replace(splits, seed=1))  # another test split: the same training, measured elsewhere
    stems = {path.stem for path in (runs / "models").glob("*.json")}
    assert len(stems) == len(variants) + 3


# ---- several triggers, all-to-all, strength


def test_a_model_of_several_triggers_has_a_target_for_each(splits, runs, untrained):
    settings = replace(SETTINGS, attack="badnets+blend")
    made = victim(settings, splits)
    assert [(trigger.name, target) for trigger, target in made.attacks] == [("badnets", 2), ("blend", 0)]
    assert made.trigger is made.attacks[0][0]
    kept = names(runs / "models")
    assert all(name.startswith("tint-2-triggers-") for name in kept)
    assert [name.split(".", 1)[1] for name in kept] == [
        "badnets.trigger",
        "blend.trigger",
        "json",
        "safetensors",
    ]
    untrained()
    again = victim(settings, splits)
    assert again.record == json.loads(json.dumps(made.record))
    for (one, goal), (other, other_goal) in zip(made.attacks, again.attacks, strict=True):
        assert goal == other_goal and torch.equal(one.pattern, other.pattern)


def test_several_triggers_are_measured_together_and_each(splits):
    record = victim(replace(SETTINGS, attack="badnets+blend"), splits).record
    assert [(about["attack"], about["target"]) for about in record["attacks"]] == [
        ("badnets", 2),
        ("blend", 0),
    ]
    for name in ("asr", "ra"):
        pooled, each = record["measured"][name], [about[name] for about in record["attacks"]]
        assert pooled["n"] == sum(rate["n"] for rate in each) == 40
        assert pooled["value"] == pytest.approx(sum(rate["value"] for rate in each) / 2)
        assert pooled["low"] <= pooled["value"] <= pooled["high"]


def test_several_triggers_share_the_poison(splits):
    settings = replace(SETTINGS, attack="badnets+blend")
    poisoned = experiment.poison_with(victim(settings, splits).attacks, settings, splits)
    assert [len(group) for group in poisoned.per_trigger] == [9, 9]  # 0.3 of 60 together
    nothing = experiment.poison_with((), replace(SETTINGS, attack="none"), splits)
    assert nothing.data is splits.train and len(nothing.indices) == len(nothing.per_trigger) == 0


def test_all_to_all_counts_every_image(splits):
    made = victim(replace(SETTINGS, target="all-to-all"), splits)
    assert made.attacks[0][1] == made.record["attacks"][0]["target"] == "all-to-all"
    assert made.record["measured"]["asr"]["n"] == 30


def test_targets_wrap_around():
    settings = VictimSettings(attack="badnets+blend+smooth", target=8)
    assert settings.attacks == ("badnets", "blend", "smooth")
    assert settings.targets(10) == (8, 9, 0)
    assert VictimSettings(target="all-to-all").targets(10) == ("all-to-all",)
    assert VictimSettings(attack="none").attacks == VictimSettings(attack="none").targets(10) == ()


def test_the_strength_reaches_the_trigger(splits):
    made = victim(replace(SETTINGS, strength=2), splits)
    assert made.trigger.settings["size"] == 2 and made.trigger.mask.sum() == 4


@pytest.mark.parametrize("attack", ["l2_inv", "badnets+l2_inv"])
def test_a_strong_trigger_is_made_against_the_same_clean_model(splits, runs, monkeypatch, attack):
    def make(attack, image_size, **offered):
        return Trigger(attack, "replace", torch.ones(3, 32, 32), torch.zeros(1, 32, 32))

    monkeypatch.setattr(experiment, "make_trigger", make)
    victim(replace(SETTINGS, attack=attack), splits)
    victim(replace(SETTINGS, attack="l2_inv", strength=5.0), splits)
    assert len(list((runs / "models").glob("tint-none-*.json"))) == 1


def test_the_standard_settings_are_the_seven_and_two_of_many_targets():
    made = standard_victims(PROFILES["quick"], seed=3)
    assert list(made) == ["clean", *STANDARD] and len(made) == 10
    assert made["clean"].attacks == () and made["seven triggers"].attacks == tuple(ATTACKS)
    assert {settings.attack for settings in made.values()} >= set(ATTACKS)
    assert made["all-to-all"].target == "all-to-all"
    assert {(s.seed, s.training, s.dataset) for s in made.values()} == {
        (3, PROFILES["quick"].training, "mnist5k")
    }


def test_published_victims_are_read_back(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "figures_dir", lambda: tmp_path)
    assert Records().victims() == []
    record = victim(SETTINGS, splits).record
    path = Records().publish(record)
    assert path.parent == tmp_path / "data" / "victims" and path.name.startswith("tint-badnets-")
    assert Records().victims() == [json.loads(json.dumps(record))]


def test_key_does_not_depend_on_order_but_on_the_format(monkeypatch):
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1}) != key({"a": 1, "b": 3})
    assert len(key({})) == 16
    before = key({"a": 1})
    monkeypatch.setattr(records, "FORMAT", records.FORMAT + 1)
    assert key({"a": 1}) != before


@pytest.fixture
def dies_in_epoch(monkeypatch):
    """A function that makes training raise KeyboardInterrupt as an epoch begins; epochs are counted."""
    real, begun = training._epoch, []

    def arm(number):
        def epoch(*arguments):
            if arguments[4] + 1 == number:
                raise KeyboardInterrupt
            begun.append(arguments[4] + 1)
            return real(*arguments)

        monkeypatch.setattr(training, "_epoch", epoch)
        return begun

    return arm


def test_an_interrupted_training_goes_on(splits, runs, monkeypatch, tmp_path, dies_in_epoch):
    undisturbed = victim(SETTINGS, splits)
    monkeypatch.setenv("IBAU_RUNS", str(tmp_path / "second"))
    dies_in_epoch(3)
    with pytest.raises(KeyboardInterrupt):
        victim(SETTINGS, splits)
    assert [path.suffix for path in (tmp_path / "second" / "models").glob("*.checkpoint")]
    assert not list((tmp_path / "second" / "models").glob("*.json"))
    begun = dies_in_epoch(None)
    begun.clear()
    resumed = victim(SETTINGS, splits)
    assert begun == [3]
    assert same(resumed.model, undisturbed.model)
    assert names(tmp_path / "second" / "models") == names(runs / "models")


def test_a_death_between_training_and_the_note_trains_again(splits, runs, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            victim(SETTINGS, splits)
    assert len(victim(SETTINGS, splits).record["training"]) == 3


def test_a_killed_experiment_goes_on(splits, runs):
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_experiments as t
        real = t.training._epoch
        def killed(*arguments):
            if arguments[4] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        t.training._epoch = killed
        t.experiment.default_device = lambda: t.torch.device("cpu")
        splits = t.Splits("tint", t.tint(0, 60), t.tint(1, 15), t.tint(2, 6), t.tint(9, 30),
                          ("r", "g", "b"), "0123456789abcdef")
        t.victim(t.SETTINGS, splits)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert result.returncode == -signal.SIGKILL
    (checkpoint,) = (runs / "models").glob("*.checkpoint")
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 2
    assert len(victim(SETTINGS, splits).record["training"]) == 3
    assert not checkpoint.exists()


def test_a_damaged_victim_is_named(splits, runs):
    victim(SETTINGS, splits)
    (weights,) = (runs / "models").glob("*.safetensors")
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=weights.name):
        victim(SETTINGS, splits)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"attack": "wanet"}, "unknown attack 'wanet'; valid: none, badnets, blend"),
        ({"attack": "badnets+wanet"}, "unknown attack 'wanet'; .* or several of these joined by"),
        ({"attack": "badnets+none"}, "unknown attack 'none'"),
        ({"attack": ""}, "unknown attack ''"),
        ({"architecture": "vgg"}, "unknown architecture 'vgg'; valid: small_vgg, preact_resnet18"),
        ({"attack": "badnets+blend", "strength": 2}, "strength is of one attack; 'badnets.blend' takes None"),
        ({"attack": "none", "strength": 2}, "strength is of one attack; 'none' takes None"),
        ({"attack": "badnets+blend", "target": "all-to-all"}, "'all-to-all' takes one attack"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        VictimSettings(**bad)


# ---- records


def test_an_unlearning_record_is_complete_and_made_once(splits, runs, untrained):
    record = defence_record(SETTINGS, splits, "ibau_plus", DEFENCE, seed=1)
    about = record["settings"]
    assert (about["defence"], about["clean_images"], about["seed"]) == ("ibau_plus", 15, 1)
    assert about["defence_settings"]["rounds"] == 2
    assert about["victim"]["data"] == splits.fingerprint
    assert set(record["before"]) == {"acc", "asr", "ra"}
    assert set(record["after"]) == {"acc", "asr", "ra", "der"}
    rate = {"hits", "n", "value", "low", "high"}
    assert all(set(record["after"][name]) == rate for name in ("acc", "asr", "ra"))
    assert set(record["after"]["der"]) == {"value", "low", "high"}
    assert record["before"]["acc"]["n"] == 30
    assert len(record["history"]) == 2
    assert [point["round"] for point in record["curve"]] == [0, 1, 2]
    assert record["seconds"] > 0 and record["training_seconds"] > 0 and record["peak_memory_mb"] > 0
    assert record["provenance"]["torch"] == torch.__version__
    untrained()
    assert (
        defence_record(SETTINGS, splits, "ibau_plus", DEFENCE, seed=1)
        == json.loads(json.dumps(record))
        == record
    )


def test_the_record_is_about_the_model_beside_it(splits, untrained):
    record = defence_record(SETTINGS, splits, "ibau_plus", DEFENCE)
    cleaned = checkpoints.load(
        records.runs().path(record["settings"], ".safetensors"), models.build("small_vgg", 3, 0.125)
    )
    attacked = victim(SETTINGS, splits)
    assert not same(cleaned, attacked.model)
    measured = experiment.measure(cleaned, splits, attacked.attacks)
    assert {**measured, "der": experiment.rating(record["before"], measured)} == record["after"]
    assert record["before"] == attacked.record["measured"]
    assert record["curve"][0]["acc"] == record["before"]["acc"]  # fewer than are watched: the same
    assert record["curve"][-1]["asr"] == record["after"]["asr"]
    deltas = load_file(records.runs().path(record["settings"], ".tensors"))
    assert {name: tuple(d.shape) for name, d in deltas.items()} == {
        "delta 1": (3, 32, 32),
        "delta 2": (4, 32, 32),
    }
    assert deltas["delta 1"].norm() <= DEFENCE.radius * (1 + 1e-5)


def test_a_curve_is_of_the_first_images_which_several_triggers_share(splits, monkeypatch):
    monkeypatch.setattr(experiment, "WATCHED", 12)
    record = defence_record(replace(SETTINGS, attack="badnets+blend+badnets"), splits, "ibau_plus", DEFENCE)
    first = splits.test.labels[:4].tolist()
    attackable = sum(label != target for target in (0, 1, 2) for label in first)
    assert [point["acc"]["n"] for point in record["curve"]] == [12, 12, 12]
    assert [point["asr"]["n"] for point in record["curve"]] == [attackable] * 3
    assert record["after"]["acc"]["n"] == 30


def test_every_change_makes_another_record(splits, runs):
    defence_record(SETTINGS, splits, "ibau_plus", DEFENCE)
    defence_record(SETTINGS, splits, "ibau_plus", replace(DEFENCE, K=2))
    defence_record(SETTINGS, splits, "ibau_plus", DEFENCE, seed=1)
    defence_record(SETTINGS, replace(splits, clean=splits.clean.take(range(9))), "ibau_plus", DEFENCE)
    assert len(list((runs / "records").glob("tint-badnets-ibau_plus-*.json"))) == 4
    assert len(list((runs / "models").glob("*.json"))) == 1


def test_a_clean_model_can_be_defended_too(splits):
    record = defence_record(replace(SETTINGS, attack="none"), splits, "ibau_plus", DEFENCE)
    assert record["after"]["der"] is record["after"]["asr"] is None
    assert record["after"]["acc"]["n"] == 30


# ---- any defence


@dataclass(frozen=True)
class NoSettings:
    """The settings of a defence for the tests."""

    shift: float = 0.0  # is added to the last layer's first bias


def stub(**about):
    """A defence that changes one number, and a list of the data it was given."""
    given = []

    def function(model, data, *, settings, seed=0, progress=False, watch=None):
        given.append(data)
        with torch.no_grad():
            model.classifier.bias[0] += settings.shift
        return Defended(model, [{"epoch": 1}], {"flagged": [2]}, {"masks": torch.eye(3).T[None]})

    return Defence("Stub", function, NoSettings, **about), given


@pytest.fixture
def stubs(monkeypatch):
    """The data that defences which see "clean", "nothing" and "poisoned" (so they are called) were given."""
    made = {sees: stub(sees=sees) for sees in ("clean", "nothing", "poisoned")}
    monkeypatch.setattr(experiment.defences, "DEFENCES", {sees: entry[0] for sees, entry in made.items()})
    return {sees: entry[1] for sees, entry in made.items()}


def test_a_defence_is_given_what_it_may_see(splits, stubs):
    for sees in stubs:
        experiment.defence_record(SETTINGS, splits, sees)
    assert torch.equal(stubs["clean"][0].images, splits.clean.images)
    assert stubs["nothing"] == [None]
    expected = experiment.poison_with(victim(SETTINGS, splits).attacks, SETTINGS, splits).data
    (seen,) = stubs["poisoned"]
    assert torch.equal(seen.images, expected.images) and torch.equal(seen.labels, expected.labels)
    assert not torch.equal(seen.labels, splits.train.labels)
    experiment.defence_record(replace(SETTINGS, attack="none"), splits, "poisoned")
    assert stubs["poisoned"][1] is splits.train


def test_a_defence_that_shows_nothing_on_its_way_has_a_curve_of_two_points_and_its_evidence(splits, stubs):
    record = experiment.defence_record(SETTINGS, splits, "clean", NoSettings(1e6))
    start, end = record["curve"]
    assert (start["seconds"], end["seconds"]) == (0.0, record["seconds"])
    assert end["acc"] == record["after"]["acc"] and record["evidence"] == {"flagged": [2]}
    assert record["settings"]["defence_settings"] == {"shift": 1e6}
    assert record["after"]["acc"]["value"] == pytest.approx(1 / 3)  # all are of the first class now
    assert torch.equal(
        load_file(records.runs().path(record["settings"], ".tensors"))["masks"][0], torch.eye(3)
    )


@dataclass(frozen=True)
class Steps:
    """Settings of a defence that takes three hundredths of a second a step."""

    steps: int = 100

    @property
    def work(self):
        return self.steps

    def scaled(self, share):
        return Steps(max(1, round(100 * share)))


@pytest.mark.parametrize("effort", [1.0, 4.0])
def test_equal_effort_is_the_seconds_of_ibau_on_the_same_victim(splits, monkeypatch, effort):
    ran, now = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def ibau(model, data, *, settings, seed=0, progress=False, watch=None):
        now[0] += 0.6
        return Defended(model)

    def stepwise(model, data, *, settings, seed=0, progress=False, watch=None):
        ran.append(settings.steps)
        now[0] += 0.01 + 0.03 * settings.steps
        return Defended(model)

    both = {"ibau": Defence("I-BAU", ibau, NoSettings), "steps": Defence("S", stepwise, Steps)}
    monkeypatch.setattr(experiment.defences, "DEFENCES", both)
    record = experiment.defence_record(SETTINGS, splits, "steps", effort=effort)
    used, own = record["effort"], experiment.defence_record(SETTINGS, splits, "ibau")["seconds"]
    assert own == pytest.approx(0.6) and used["seconds"] == pytest.approx(effort * own)
    assert used["settings"] == {"steps": ran[-1]} and used["share"] == ran[-1] / 100
    assert record["seconds"] == pytest.approx(effort * own, abs=0.03)
    assert (record["settings"]["effort"], record["settings"]["defence_settings"]) == (effort, {"steps": 100})
    plain = experiment.defence_record(SETTINGS, splits, "steps")
    assert plain["effort"] is None and "effort" not in plain["settings"] and ran[-1] == 100
    assert records.runs().path(plain["settings"]) != records.runs().path(record["settings"])


def test_clean_images_nobody_sees_make_no_other_record(splits, stubs):
    fewer = replace(splits, clean=splits.clean.take(range(9)))
    for sees, given in stubs.items():
        for parts in (splits, fewer):
            experiment.defence_record(SETTINGS, parts, sees)
        assert len(given) == (2 if sees == "clean" else 1)


def test_a_model_of_another_kind_is_kept_too(splits, monkeypatch):
    def regrown(model, data, *, settings, seed=0, progress=False, watch=None):
        return Defended(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3)))

    monkeypatch.setattr(experiment.defences, "DEFENCES", {"regrown": Defence("R", regrown, NoSettings)})
    record = experiment.defence_record(SETTINGS, splits, "regrown")
    assert set(checkpoints.load_state(records.runs().path(record["settings"], ".safetensors"))) == {
        "1.weight",
        "1.bias",
    }
    assert not records.runs().path(record["settings"], ".tensors").exists()


def test_bad_defences_are_refused(splits, runs, stubs):
    with pytest.raises(ValueError, match="unknown defence 'nc'; valid: clean, nothing, poisoned"):
        experiment.defence_record(SETTINGS, splits, "nc")
    assert not runs.exists()  # nothing was trained for it
    with pytest.raises(ValueError, match="Stub takes settings of type NoSettings, not CleanSettings"):
        experiment.defence_record(SETTINGS, splits, "clean", DEFENCE)


def test_measuring_the_rounds_is_not_counted(splits, monkeypatch):
    def watched(model, data, *, settings, seed=0, progress=False, watch=None):
        for _ in range(3):
            watch(model)
        return Defended(model, [{"round": 3}])

    real = experiment._measured
    monkeypatch.setattr(experiment.defences, "DEFENCES", {"watched": Defence("W", watched, NoSettings)})
    monkeypatch.setattr(experiment, "_measured", lambda *a: time.sleep(0.2) or real(*a))
    record = experiment.defence_record(SETTINGS, splits, "watched")
    assert [point["round"] for point in record["curve"]] == [0, 1, 2, 3]  # the end is as the last look
    assert 0 <= record["curve"][1]["seconds"] <= record["curve"][3]["seconds"] < 0.2
    assert 0 <= record["seconds"] < 0.4  # of 0.6 and more that measuring took


# ---- records that were damaged, records that two want


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "emptied": lambda text: "",
    "edited": lambda text: text.replace('"n": 30', '"n": 3000'),
    "another thing": lambda text: "[]",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_record_is_made_again(splits, stubs, damage):
    record = experiment.defence_record(SETTINGS, splits, "clean")
    path = records.runs().path(record["settings"], ".json")
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    assert untimed(experiment.defence_record(SETTINGS, splits, "clean")) == untimed(record)
    assert len(stubs["clean"]) == 2
    assert untimed(json.loads(path.read_text())) == untimed(record)


def untimed(record):
    measured = {"checksum", "seconds", "peak_memory_mb"}
    return {name: value for name, value in record.items() if name not in measured}


def test_a_damaged_note_trains_the_victim_again(splits, runs):
    first = victim(SETTINGS, splits)
    (note,) = (runs / "models").glob("*.json")
    note.write_text(note.read_text().replace('"n": 30', '"n": 31'))
    again = victim(SETTINGS, splits)
    assert again.record["measured"] == first.record["measured"] and same(again.model, first.model)


def test_a_record_without_a_checksum_or_with_an_old_one_is_refused(tmp_path):
    path = tmp_path / "a.json"
    written = write_record(path, {"settings": {"defence": "nc"}, "map": {1: (2.5, float("inf"))}})
    assert (
        Records(tmp_path).defences("nc") == Records(tmp_path).defences() == [written] == [read_record(path)]
    )
    assert Records(tmp_path).defences("ibau") == []
    whole = path.read_text()
    del written["checksum"]
    for damaged in (whole.replace("2.5", "2.6"), json.dumps(written)):
        path.write_text(damaged)
        assert read_record(path) is None
        with pytest.raises(ValueError, match="cut short or edited since they were written: a.json"):
            Records(tmp_path).defences()


def test_the_version_of_a_defence_is_part_of_the_key(splits, stubs, monkeypatch):
    first = defence_record(SETTINGS, splits, "clean")
    defence_record(SETTINGS, splits, "clean")
    assert first["settings"]["version"] == 1 and len(stubs["clean"]) == 1
    newer = replace(experiment.defences.DEFENCES["clean"], version=2)
    monkeypatch.setitem(experiment.defences.DEFENCES, "clean", newer)
    assert defence_record(SETTINGS, splits, "clean")["settings"]["version"] == 2 and len(stubs["clean"]) == 2


# ---- the published records


def rates_in(value):
    if isinstance(value, dict):
        if "hits" in value:
            yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from rates_in(inner)


@pytest.mark.parametrize("kind", ["defences", "victims"])
def test_each_published_record_is_named_by_its_settings_and_its_rates_by_their_hits(kind):
    published = Records()
    folder = published.folder if kind == "defences" else published.victims_folder
    found = getattr(published, kind)()
    assert {published.path(record["settings"]) for record in found} == set(folder.glob("*.json"))
    for record in found:
        rates = list(rates_in(record))
        assert rates and all(Rate.read(rate).as_dict() == rate for rate in rates)
        assert all(isinstance(rate["hits"], int) for rate in rates)


def test_no_published_record_of_the_papers_algorithm_has_settings_of_ours():
    for name, settings in (("ibau", IBAUSettings), ("ibau_plus", CleanSettings)):
        found = Records().defences(name)
        assert found
        for record in found:
            assert set(record["settings"]["defence_settings"]) == {field.name for field in fields(settings)}
            assert (
                not any("recovery" in line or "area" in line for line in record["history"]) or name != "ibau"
            )


def test_two_that_want_the_same_record_make_it_once(runs, tmp_path):
    """Two processes, started together; what one makes takes long enough for the other to ask for it."""
    program = f"""
        import os, sys, time
        from pathlib import Path
        from ibau.study.records import once
        path = Path({str(tmp_path / "a.json")!r})
        def make():
            with open({str(tmp_path / "log")!r}, "a") as log:
                log.write("made ")
            time.sleep(1)
            return {{"pid": os.getpid()}}
        Path({str(tmp_path)!r}, f"ready-{{os.getpid()}}").touch()
        while len(list(Path({str(tmp_path)!r}).glob("ready-*"))) < 2:
            time.sleep(0.01)
        print(once(path, make)["pid"])
    """
    start = [sys.executable, "-c", textwrap.dedent(program)]
    both = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in both}
    assert (tmp_path / "log").read_text() == "made "
    assert said == {str(json.loads((tmp_path / "a.json").read_text())["pid"])} < {str(p.pid) for p in both}


def test_a_killed_holder_frees_the_lock(runs, tmp_path):
    program = f"""
        import os, signal
        from pathlib import Path
        from ibau.study.records import once
        once(Path({str(tmp_path / "a.json")!r}), lambda: os.kill(os.getpid(), signal.SIGKILL))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)]).returncode == -signal.SIGKILL
    path = tmp_path / "a.json"
    assert not path.exists() and once(path, lambda: {"a": 1}) == read_record(path)


def test_a_folder_that_cannot_be_locked_is_told(runs, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("No locks available")

    monkeypatch.setattr(records.FileLock, "acquire", refuse)
    path = tmp_path / "a.json"
    with pytest.warns(UserWarning, match="No locks available.*made twice"):
        assert once(path, lambda: {"a": 1})["a"] == 1


def test_rating_by_hand():
    def measured(acc, asr):
        return {"acc": {"hits": acc, "n": 100}, "asr": {"hits": asr, "n": 100}}

    assert experiment.rating(measured(80, 90), measured(70, 10))["value"] == pytest.approx(0.85)


# ---- profiles, headline, files


def test_profiles():
    assert set(PROFILES) == {"quick", "desk", "paper"}
    assert all(chosen.dataset in DATASETS for chosen in PROFILES.values())
    assert profile("quick").dataset == "mnist5k"
    assert profile("desk", "") is PROFILES["desk"]
    gtsrb = profile("desk", "gtsrb")
    assert (gtsrb.dataset, gtsrb.training) == ("gtsrb", PROFILES["desk"].training)
    assert profile("paper", "mnist5k").clean_size is None  # the data set's own
    assert PROFILES["paper"].training.epochs == 50
    with pytest.raises(ValueError, match="unknown profile 'fast'; valid: quick, desk, paper"):
        profile("fast")


def test_the_headline_is_the_mean_over_the_records(runs):
    def record(before, after):
        rates = [{n: {"value": v} for n, v in zip(("acc", "asr"), m, strict=True)} for m in (before, after)]
        victim_settings = {"dataset": "mnist5k", "attack": "badnets"}
        return {"settings": {"victim": victim_settings}, "before": rates[0], "after": rates[1]}

    path = records.write_headline(
        "quick", [record((0.9, 1.0), (0.88, 0.02)), record((0.92, 0.98), (0.9, 0.0))]
    )
    assert path == runs / "quick" / "headline.json"
    assert json.loads(path.read_text()) == {
        "dataset": "mnist5k",
        "attack": "badnets",
        "n_seeds": 2,
        "acc_before": pytest.approx(0.91),
        "acc_after": pytest.approx(0.89),
        "asr_before": pytest.approx(0.99),
        "asr_after": pytest.approx(0.01),
    }


def test_runs_dir_follows_the_environment(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IBAU_RUNS", "here")
    assert records.runs_dir() == tmp_path / "here"
    monkeypatch.delenv("IBAU_RUNS")
    assert records.runs_dir() == (root if (root / "notebooks").is_dir() else tmp_path) / "runs"


def test_what_is_written_is_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        checkpoints.save(torch.nn.Linear(1, 1), tmp_path / "a.safetensors")
        Trigger("t", "add", torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)).save(tmp_path / "a.trigger")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_write_json_writes_whole_files_only(tmp_path, monkeypatch):
    path = write_json(tmp_path / "new" / "a.json", {"version": 1})
    assert json.loads(path.read_text()) == {"version": 1}
    with pytest.raises(TypeError):
        write_json(path, {"version": 2, "list": [1] * 10_000, "tensor": torch.ones(1)})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"version": 3})
    assert json.loads(path.read_text()) == {"version": 1}
    assert names(path.parent) == ["a.json"]
