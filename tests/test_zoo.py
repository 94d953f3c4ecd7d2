"""The poisoned models in zoo/ load by name, with triggers that work, as good as before they were rounded."""

import copy

import pytest
import torch

from ibau.data.splits import load
from ibau.networks import checkpoints
from ibau.study import experiment, records, zoo
from ibau.study.zoo import ZooError


@pytest.fixture(scope="module")
def digits():
    return load("mnist5k", "", clean_size=500)


def test_the_zoo_is_the_tables_models():
    assert zoo.names() == sorted(zoo.standard())
    assert "cifar10-badnets" in zoo.names() and "gtsrb-seven-triggers" in zoo.names()


def test_the_zoo_is_small():
    assert sum(file.stat().st_size for file in zoo.ZOO.iterdir()) <= zoo.MOST <= 25 * 2**20


@pytest.mark.parametrize("name", zoo.names())
def test_each_entry_loads_with_its_triggers(name):
    victim, published = zoo.load(name), zoo.standard()[name]
    assert victim.record["measured"] == published["measured"]
    assert not victim.model.training
    assert {p.dtype for p in victim.model.parameters()} == {torch.float32}
    assert [target for _, target in victim.attacks] == [one["target"] for one in victim.record["attacks"]]
    assert [trigger.name for trigger, _ in victim.attacks] == [
        one["attack"] for one in victim.record["attacks"]
    ]
    assert (victim.attacks == ()) == name.endswith("-clean")
    with torch.no_grad():
        logits = victim.model(torch.rand(2, 3, 32, 32))
    assert logits.shape[0] == 2 and torch.isfinite(logits).all()


@pytest.mark.parametrize("name", zoo.names(zoo.CONVERGED))
def test_the_converged_models_are_runs_that_were_trained_to_the_end(name):
    victim = zoo.load(name, zoo.CONVERGED)
    assert records.runs().path(victim.record["settings"]).stem == name
    assert len(victim.record["training"]) == 50
    fit = victim.record["fit"]
    assert fit["clean"]["accuracy"] > 0.95 and (not victim.attacks or fit["poisoned"]["accuracy"] > 0.99)
    with torch.no_grad():
        assert torch.isfinite(victim.model(torch.rand(2, 3, 32, 32))).all()


@pytest.mark.parametrize("name", [name for name in zoo.names() if name.startswith("mnist5k")])
def test_half_precision_costs_less_than_a_fifth_of_a_point(name, digits):
    victim = zoo.load(name)
    before, now = victim.record["measured"], experiment.measure(victim.model, digits, victim.attacks)
    for rate in ("acc", "asr"):
        if before[rate]:
            assert now[rate]["n"] == before[rate]["n"]
            assert abs(now[rate]["value"] - before[rate]["value"]) < 0.002


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ZooError, match="no model 'cifar10'.*mnist5k-badnets"):
        zoo.load("cifar10")
    with pytest.raises(ZooError):
        zoo.load("../zoo/cifar10-badnets")


def test_an_empty_zoo_says_so(tmp_path):
    assert zoo.names(tmp_path) == []
    with pytest.raises(ZooError, match="there are none"):
        zoo.load("x", tmp_path)


# ---- making it


@pytest.fixture
def one_victim(tmp_path, monkeypatch):
    """A zoo of one model, which lies in `runs` under the name and in the precision it was trained with."""
    monkeypatch.setenv("IBAU_RUNS", str(tmp_path / "runs"))
    victim = zoo.load("mnist5k-badnets")
    note = records.runs().path(victim.record["settings"])
    checkpoints.save(victim.model, note.with_suffix(".safetensors"))
    victim.trigger.save(note.with_suffix(".badnets.trigger"))
    records.write_record(note, victim.record)
    monkeypatch.setattr(zoo, "standard", lambda: {"one": victim.record})
    return victim


def test_the_zoo_is_made_from_the_runs(one_victim, tmp_path):
    folder = tmp_path / "zoo"
    assert zoo.make(folder) == ["one"] == zoo.make(folder)  # and made anew
    made = zoo.load("one", folder)
    for key, value in one_victim.model.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[key], value)
    assert torch.equal(made.trigger.pattern, one_victim.trigger.pattern) and made.attacks[0][1] == 8
    weights = checkpoints.load_state(folder / "one.safetensors")
    assert weights["classifier.weight"].dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "zoo"]


def test_another_model_than_the_published_one_is_refused(one_victim, tmp_path, monkeypatch):
    other = copy.deepcopy(one_victim.record)
    other["measured"]["acc"]["value"] = 0.5
    folder = tmp_path / "zoo"
    zoo.make(folder)
    monkeypatch.setattr(zoo, "standard", lambda: {"one": other})
    with pytest.raises(ZooError, match="one: the model of the published record is not in"):
        zoo.make(folder)
    assert zoo.names(folder) == ["one"]  # the old zoo


def test_weights_that_half_precision_cannot_hold_are_refused(one_victim, tmp_path):
    note = records.runs().path(one_victim.record["settings"])
    with torch.no_grad():
        one_victim.model.classifier.bias[0] = 1e6
    checkpoints.save(one_victim.model, note.with_suffix(".safetensors"))
    with pytest.raises(ZooError, match="half precision"):
        zoo.make(tmp_path / "zoo")


def test_a_zoo_that_is_too_large_is_refused(one_victim, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MOST", 1000)
    with pytest.raises(ZooError, match="1,000 at most"):
        zoo.make(tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
