"""The defences: one signature, and each does what its equation says."""

import copy
import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ibau import CleanSettings, IBAUSettings
from ibau.data.images import ImageSet
from ibau.defences import DEFENCES, defence, quick
from ibau.defences.deepinspect import DeepInspectSettings
from ibau.defences.dp_sgd import DPSGDSettings, _private, afresh, epsilon, with_group_norm
from ibau.defences.fine_pruning import FinePruningSettings, last_channels, prune
from ibau.defences.finetune import FinetuneSettings
from ibau.defences.high_rate import HighRateSettings
from ibau.defences.nad import NADSettings, attention_loss, attention_map, outputs_of, stages_of
from ibau.defences.neural_cleanse import NeuralCleanseSettings
from ibau.defences.tabor import TaborSettings
from ibau.networks import checkpoints, models
from ibau.networks.training import LOOKS, TrainingError, TrainSettings, train
from ibau.unlearning.authors import AuthorsSettings

BRIEF = TrainSettings(epochs=2, batch_size=8)
REVERSE = {"steps": 2, "batch_size": 4, "patch_epochs": 1, "unflagged": "smallest"}
SMALL = {
    "finetune": FinetuneSettings(BRIEF),
    "high_rate": HighRateSettings(warm_up=1, high_steps=2, steps=4, batch_size=8, lr=0.01),
    "nc": NeuralCleanseSettings(batches=1, **REVERSE),
    "tabor": TaborSettings(batches=1, **REVERSE),
    "deepinspect": DeepInspectSettings(inverted=2, inversion_steps=2, **REVERSE),
    "fine_pruning": FinePruningSettings(tolerance=0.2, training=BRIEF),
    "nad": NADSettings(teacher_epochs=1, epochs=2, lr=0.01, batch_size=8, tolerance=1.0),
    "dp_sgd": DPSGDSettings(epochs=2, batch_size=10, noise=0.5, clip=1.0, chunk=4),
    "ibau_authors": AuthorsSettings(),
    "ibau": IBAUSettings(rounds=2, outer_steps=2, batch_size=8, inner_steps=3, inner_images=6),
    "ibau_plus": CleanSettings(
        rounds=2, outer_steps=2, recovery_steps=2, batch_size=8, inner_steps=3, inner_images=6
    ),
}
OURS = ("ibau_authors", "ibau", "ibau_plus")
TUNING = ["finetune", "high_rate", "fine_pruning", "nad", "dp_sgd", *OURS]


@pytest.fixture(scope="module")
def data():
    """Forty images of four classes, 32 x 32: a class is a bright quarter, on noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 128, (40, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.arange(40) % 4
    for image, label in zip(images, labels, strict=True):
        row, column = 16 * (label // 2), 16 * (label % 2)
        image[:, row : row + 16, column : column + 16] += 100
    return ImageSet(images, labels)


@pytest.fixture(scope="module")
def trained(data):
    model = models.build("small_vgg", 4, width=0.25)
    train(model, data, TrainSettings(epochs=15, batch_size=10, lr=5e-3))
    return model


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def given(name, data):
    """What this defence may see."""
    return None if DEFENCES[name].sees == "nothing" else data


# ---- the registry


def test_the_registry_has_its_order():
    order = ["finetune", "high_rate", "nc", "tabor", "deepinspect", "fine_pruning", "nad", "dp_sgd"]
    order += ["ibau_authors", "ibau", "ibau_plus"]
    assert list(DEFENCES) == order
    assert (DEFENCES["ibau"].label, DEFENCES["ibau_plus"].label) == ("I-BAU", "I-BAU+")
    assert {name: d.sees for name, d in DEFENCES.items() if d.sees != "clean"} == {
        "deepinspect": "nothing",
        "dp_sgd": "poisoned",
    }


def test_an_unknown_defence_is_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown defence 'magic'; valid: finetune, .*ibau"):
        defence("magic")


@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_has_published_and_quick_settings(name):
    assert isinstance(quick(name), DEFENCES[name].settings)
    assert isinstance(DEFENCES[name].settings(), DEFENCES[name].settings)


@pytest.mark.parametrize("name", [name for name in DEFENCES if name not in ("high_rate", *OURS)])
def test_a_baselines_desk_budget_is_smaller_than_the_published_one(name):
    published, desk = (asdict(make()) for make in (DEFENCES[name].settings, DEFENCES[name].settings.desk))
    published, desk = ({**found, **found.pop("training", {})} for found in (published, desk))
    sizes = ("epochs", "teacher_epochs", "steps", "batches", "batch_size", "inverted", "inversion_steps")
    assert all(desk[size] <= published[size] for size in sizes if size in desk)
    assert any(desk[size] < published[size] for size in sizes if size in desk)


# ---- what every defence keeps to


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_leaves_model_data_and_generator_alone_and_repeats(name, model, data):
    model.train()
    model.features[1].eval()
    before, modes = copy.deepcopy(model), [m.training for m in model.modules()]
    images, labels = data.images.clone(), data.labels.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = DEFENCES[name](model, given(name, data), settings=SMALL[name], seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, before) and [m.training for m in model.modules()] == modes
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)
    assert not any(m.training for m in found.model.modules())
    assert not same(found.model, before)
    torch.manual_seed(2)
    again = DEFENCES[name](model, given(name, data), settings=SMALL[name], seed=3)
    assert same(again.model, found.model)
    assert again.evidence == found.evidence
    other = DEFENCES[name](model, given(name, data), settings=SMALL[name], seed=4)
    assert not same(other.model, found.model)


def test_a_defence_leaves_an_accelerators_generators_alone(model, data, monkeypatch):
    """CUDA's and Apple's: torch.random.fork_rng does not restore both."""
    states, seeds = {"cuda": ["a"], "mps": "b"}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states["cuda"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: states.update(cuda=new))
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: states.update(cuda=[seed]) or seeds.append(seed)
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states["mps"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: states.update(mps=new))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: states.update(mps=seed))
    DEFENCES["finetune"](model, data, settings=SMALL["finetune"], seed=3)
    assert states == {"cuda": ["a"], "mps": "b"}
    assert seeds[0] == 3


@pytest.mark.parametrize("name", DEFENCES)
def test_to_watch_a_defence_changes_nothing(name, model, data):
    seen = []

    def watch(at_hand):
        assert not at_hand.training
        seen.append(at_hand(torch.zeros(1, 3, 32, 32)).argmax(1))

    found = DEFENCES[name](model, given(name, data), settings=SMALL[name], seed=3, watch=watch)
    alone = DEFENCES[name](model, given(name, data), settings=SMALL[name], seed=3)
    assert seen and same(found.model, alone.model)


@pytest.mark.parametrize("name", ["finetune", "high_rate", "fine_pruning", "nad", "dp_sgd"])
def test_a_long_enough_run_is_looked_at_ten_times(name, model, data):
    training = {"training": replace(BRIEF, epochs=4)} if hasattr(SMALL[name], "training") else {}
    steps = {"steps": 20} if name == "high_rate" else {} if training else {"epochs": 4}
    times = []
    settings = replace(SMALL[name], **steps, **training)
    DEFENCES[name](model, given(name, data), settings=settings, watch=lambda at_hand: times.append(1))
    assert len(times) >= LOOKS


def test_the_high_rate_warms_up_stays_and_falls_to_zero():
    settings = HighRateSettings()
    rates = [settings.rate(step) for step in range(settings.steps)]
    assert rates[0] == pytest.approx(0.03 / 20) and rates[19:160] == [0.03] * 141
    assert rates[160] == pytest.approx(0.02) and 0 < rates[-1] < 1e-5
    assert rates[160:] == sorted(rates[160:], reverse=True)
    with pytest.raises(ValueError, match="high_steps 400 and steps 360"):
        HighRateSettings(high_steps=400)


def test_the_high_rate_follows_batch_statistics_and_drops_nothing(model, data):
    before = copy.deepcopy(model)
    settings = replace(SMALL["high_rate"], lr=1e-12, shift=0)
    found = DEFENCES["high_rate"](model, data, settings=settings).model
    moved = [not torch.equal(a, b) for a, b in zip(before.buffers(), found.buffers(), strict=True)]
    assert any(moved)  # BatchNorm's running statistics
    for p, q in zip(before.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", DEFENCES)
def test_what_a_defence_tells_is_plain_and_complete(name, model, data):
    found = DEFENCES[name](model, given(name, data), settings=SMALL[name])
    assert json.loads(json.dumps(found.evidence, allow_nan=False)) == found.evidence
    json.dumps(found.history)
    assert found.history and found.seconds > 0
    assert all(isinstance(t, torch.Tensor) and not t.requires_grad for t in found.tensors.values())
    assert found.model(torch.rand(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_reports_progress_when_asked(name, model, data, capfd):
    DEFENCES[name](model, given(name, data), settings=SMALL[name])
    assert capfd.readouterr().err == ""
    DEFENCES[name](model, given(name, data), settings=SMALL[name], progress=True)
    assert "100%" in capfd.readouterr().err


@pytest.mark.parametrize("name", DEFENCES)
def test_data_that_a_defence_may_not_see_is_an_error(name, model, data):
    wrong = data if DEFENCES[name].sees == "nothing" else None
    with pytest.raises(ValueError, match=f"sees {DEFENCES[name].sees}; it was given"):
        DEFENCES[name](model, wrong, settings=SMALL[name])


@pytest.mark.parametrize("name", DEFENCES)
def test_settings_of_another_defence_are_an_error(name, model, data):
    other = BRIEF
    with pytest.raises(ValueError, match="takes settings of type .*, not TrainSettings"):
        DEFENCES[name](model, given(name, data), settings=other)


@pytest.mark.parametrize("name", TUNING)
@pytest.mark.parametrize("label", [4, -1])
def test_labels_the_model_has_no_class_for_are_an_error(name, label, model, data):
    labels = data.labels.clone()
    labels[7] = label
    with pytest.raises(ValueError, match="the model has 4 classes"):
        DEFENCES[name](model, ImageSet(data.images, labels), settings=SMALL[name])


@pytest.mark.parametrize("name", ["finetune", "high_rate", "fine_pruning", "nad", "ibau", "ibau_plus"])
def test_two_clean_images_a_class_are_enough_to_run(name, model, data):
    found = DEFENCES[name](model, data.take(range(8)), settings=SMALL[name])
    assert all(p.isfinite().all() for p in found.model.parameters())


@pytest.mark.parametrize("name", ["finetune", "fine_pruning", "nad"])
def test_too_few_clean_images_are_an_error(name, model, data):
    with pytest.raises(ValueError, match="cannot be held out"):
        DEFENCES[name](model, data.take([0, 1]), settings=SMALL[name])
    with pytest.raises(ValueError, match="1 of 2 clean images is left"):
        DEFENCES[name](model, data.take([0, 1]), settings=replace(SMALL[name], held_out=0.5))


@pytest.mark.parametrize(
    "settings, bad",
    [
        (FinePruningSettings, {"tolerance": -0.1}),
        (NADSettings, {"lr": 0}),
        (NADSettings, {"betas": ()}),
        (NADSettings, {"betas": (1.0, -1.0)}),
        (NADSettings, {"stages": ("a", "b")}),
        (NADSettings, {"augment": "mirror"}),
        (DPSGDSettings, {"clip": 0}),
        (DPSGDSettings, {"noise": -1}),
        (DPSGDSettings, {"noise": 1.0, "clip": math.inf}),
        (DPSGDSettings, {"chunk": 0}),
    ],
)
def test_bad_settings_are_named(settings, bad):
    with pytest.raises(ValueError, match=list(bad)[-1]):
        settings(**bad)


# ---- Fine-Pruning


def pruned_model(model, data, **settings):
    found = DEFENCES["fine_pruning"](model, data, settings=replace(SMALL["fine_pruning"], **settings))
    return found, found.evidence["order"][: found.evidence["pruned"]]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_pruned_channels_are_dead_after_fine_tuning_and_saving(weight_decay, model, data, tmp_path):
    training = replace(BRIEF, weight_decay=weight_decay)
    found, dead = pruned_model(model, data, tolerance=1.0, training=training)
    assert found.evidence["pruned"] == found.evidence["channels"] == 32
    found, dead = pruned_model(model, data, tolerance=0.3, training=training)
    assert 0 < len(dead) < 32
    path = checkpoints.save(found.model, tmp_path / "pruned.safetensors")
    loaded = checkpoints.load(path, models.build("small_vgg", 4, width=0.25))
    images = data.images[:4].float() / 255
    clean = loaded(images)

    def louder(channels):
        """The logits with these channels of the last convolution's BatchNorm shifted far up."""
        shifted = copy.deepcopy(loaded)
        last = [m for m in shifted.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        with torch.no_grad():
            last.bias[channels] += 10
            return shifted(images)

    assert torch.equal(louder(dead), clean)
    alive = [c for c in range(32) if c not in dead]
    assert all(not torch.equal(louder([c]), clean) for c in alive)


def test_pruning_takes_the_least_active_first_and_keeps_to_the_tolerance(model, data):
    found, _ = pruned_model(model, data, tolerance=0.2)
    evidence, activation = found.evidence, found.tensors["activation"]
    assert activation[evidence["order"]].diff().min() >= 0
    accuracies = [point["held_out_acc"] for point in evidence["curve"]]
    assert [point["pruned"] for point in evidence["curve"]] == list(range(len(accuracies)))
    assert all(accuracies[0] - a <= 0.2 + 1e-9 for a in accuracies[: evidence["pruned"] + 1])
    assert len(accuracies) == 33 or accuracies[0] - accuracies[-1] > 0.2


def test_the_activation_is_what_the_classifier_reads(model, data):
    reader, activation = last_channels(model.eval(), data.images, batch_size=7)
    assert reader is model.classifier
    with torch.no_grad():
        maps = model.features(data.images.float() / 255)  # (N, C, 4, 4)
    assert torch.allclose(activation, maps.mean(dim=(0, 2, 3)), atol=1e-5)


def test_channels_of_a_residual_network_and_of_one_with_a_flat_head():
    images = torch.randint(0, 256, (4, 3, 32, 32)).to(torch.uint8)
    model = models.build("preact_resnet18", 5, width=0.125).eval()
    reader, activation = last_channels(model, images)
    assert reader is model.classifier and len(activation) == 64 and activation.min() >= 0
    prune(reader, torch.tensor([3]), 64)
    assert (model.classifier.weight[:, 3] == 0).all() and (model.classifier.weight[:, 4] != 0).all()
    with pytest.raises(ValueError, match="the model has none"):
        last_channels(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), images)


# ---- NAD


def test_the_attention_map_by_hand_and_its_norm():
    features = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, -3.0], [0.0, 0.0]]]])  # (1, 2, 2, 2)
    power = torch.tensor([[[1.0, 9.0], [0.0, 4.0]]])
    assert torch.allclose(attention_map(features), power / power.norm())
    assert torch.allclose(attention_map(torch.randn(5, 7, 4, 4), p=1).flatten(1).norm(dim=1), torch.ones(5))
    assert attention_map(torch.zeros(1, 2, 3, 3)).isfinite().all()


def test_the_attention_loss_is_zero_for_equal_maps_and_only_then():
    student = torch.randn(3, 8, 4, 4)
    assert attention_loss(student, student) == 0
    assert attention_loss(student, -2 * student) < 1e-12  # neither sign nor scale is attention
    assert attention_loss(student, student.flip(3)) > 1e-3
    assert attention_loss(student, student[:, torch.randperm(8)]) < 1e-12


def test_the_gradient_flows_to_the_student_alone():
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    attention_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_the_stages_of_our_networks():
    images = torch.zeros(1, 3, 32, 32)
    vgg = models.build("small_vgg", 4, width=0.25).eval()
    assert stages_of(vgg, images, 3) == ("features.6", "features.14", "features.22")
    with outputs_of(vgg, stages_of(vgg, images, 3)) as found:
        vgg(images)
    assert [tuple(x.shape[2:]) for x in found.values()] == [(16, 16), (8, 8), (4, 4)]
    resnet = models.build("preact_resnet18", 4, width=0.125).eval()
    assert stages_of(resnet, images, 3) == ("blocks.3", "blocks.5", "blocks")
    with pytest.raises(ValueError, match="found 4 stages .* for 5 betas"):
        stages_of(resnet, images, 5)


def test_unknown_stages_and_stages_without_maps_are_errors(model, data):
    for stages, message in (
        (("features.6", "tail"), "no module 'tail'"),
        (("features.6", "classifier"), "no map"),
    ):
        settings = replace(SMALL["nad"], betas=(1.0, 1.0), stages=stages)
        with pytest.raises(ValueError, match=message):
            DEFENCES["nad"](model, data, settings=settings)


def test_attention_pulls_the_student_to_the_teacher(model, data):
    def distance(betas):
        settings = replace(SMALL["nad"], betas=betas, epochs=4, lr=0.02)
        found = DEFENCES["nad"](model, data, settings=settings)
        stages, maps = found.evidence["stages"], found.tensors
        return found, sum((maps[f"after/{s}"] - maps[f"teacher/{s}"]).square().mean() for s in stages)

    taught, near = distance((500.0, 1000.0, 1000.0))
    control, far = distance((0.0, 0.0, 0.0))
    assert near < far
    assert all(line["attention_loss"] == 0 for line in control.history)
    assert all(line["attention_loss"] > 0 for line in taught.history)
    assert taught.evidence["rates"] == control.evidence["rates"]  # the control differs in nothing else


def test_a_rate_that_ruins_the_teacher_is_lowered(model, data):
    settings = replace(SMALL["nad"], lr=3.0, tolerance=0.1)
    found = DEFENCES["nad"](model, data, settings=settings).evidence
    rates = [tried["rate"] for tried in found["rates"]]
    assert len(rates) > 1
    assert all(a / b == pytest.approx(math.sqrt(10)) for a, b in zip(rates, rates[1:], strict=False))
    reached = {tried["rate"]: tried["held_out_acc"] for tried in found["rates"]}
    assert reached[found["rate"]] == max(reached.values())


# ---- DP-SGD


def still(model):
    """Without dropout, which would make two passes differ."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("clip", [0.5, 1e6])
@pytest.mark.parametrize("architecture", ["small_vgg", "preact_resnet18"])
def test_the_clipped_step_is_that_of_one_image_at_a_time(architecture, clip, data):
    torch.manual_seed(0)
    model = still(with_group_norm(models.build(architecture, 4, width=0.125))).train()
    images, labels = data.images[:5].float() / 255, data.labels[:5]
    total = [torch.zeros_like(p) for p in model.parameters()]
    norms = []
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradient]).norm().item())
        for t, g in zip(total, gradient, strict=True):
            t += g * min(1, clip / norms[-1])
    assert min(norms) > 0.5  # so that the small norm cuts and the large one does not
    before = [p.detach().clone() for p in model.parameters()]
    settings = DPSGDSettings(batch_size=8, noise=0.0, clip=clip, chunk=2)
    step, unwrap = _private(model, torch.optim.SGD(model.parameters(), lr=1.0), settings)
    step(images, labels)
    unwrap()
    for old, new, t in zip(before, model.parameters(), total, strict=True):
        assert torch.allclose(old - new, t / 8, atol=1e-5)


def test_noise_is_sigma_times_the_clipping_norm_over_the_batch(data):
    torch.manual_seed(0)
    model = still(with_group_norm(models.build("small_vgg", 4, width=0.25))).train()
    moved = []
    for noise in (0.0, 3.0):
        copied = copy.deepcopy(model)
        settings = DPSGDSettings(batch_size=8, noise=noise, clip=0.5, chunk=8)
        step, unwrap = _private(copied, torch.optim.SGD(copied.parameters(), lr=1.0), settings)
        step(data.images[:8].float() / 255, data.labels[:8])
        moved.append(torch.cat([p.detach().flatten() for p in copied.parameters()]))
    assert (moved[1] - moved[0]).std().item() == pytest.approx(3.0 * 0.5 / 8, rel=0.03)


def test_the_control_takes_the_private_step_without_clipping(model, data):
    """A clipping norm that nothing reaches, without noise, is the control."""
    still(model)
    settings = replace(SMALL["dp_sgd"], noise=0.0, clip=1e9)
    unclipped = DEFENCES["dp_sgd"](model, data, settings=settings)
    control = DEFENCES["dp_sgd"](model, data, settings=settings.control())
    for a, b in zip(unclipped.model.parameters(), control.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert control.evidence["epsilon"] is None and control.evidence["clip"] is None


def test_more_noise_spends_less_privacy_and_more_steps_more(model, data):
    spent = [epsilon(noise, 0.01, 100, 1e-4) for noise in (0.5, 1.0, 2.0)]
    assert spent[0] > spent[1] > spent[2] > 0
    assert epsilon(1.0, 0.01, 200, 1e-4) > spent[1]
    found = DEFENCES["dp_sgd"](model, data, settings=SMALL["dp_sgd"]).evidence
    assert (found["steps"], found["sample_rate"], found["delta"]) == (8, 0.25, 1 / 40)
    assert found["epsilon"] == epsilon(0.5, 0.25, 8, 1 / 40)


def test_the_private_model_owes_nothing_to_the_poisoned_weights(model, data):
    found = DEFENCES["dp_sgd"](model, data, settings=SMALL["dp_sgd"])
    other = models.build("small_vgg", 4, width=0.25, seed=9)
    again = DEFENCES["dp_sgd"](other, data, settings=SMALL["dp_sgd"])
    assert same(found.model, again.model)
    rebuilt = with_group_norm(models.build("small_vgg", 4, width=0.25))
    rebuilt.load_state_dict(found.model.state_dict())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in found.model.modules())
    images = data.images[:3].float() / 255
    assert torch.equal(rebuilt.eval()(images), found.model(images))


def test_a_model_that_cannot_be_drawn_anew_or_a_batch_too_large_is_an_error(model, data):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="1 \\(Scaled\\) has no reset_parameters"):
        afresh(nn.Sequential(nn.Linear(2, 2), Scaled()))
    with pytest.raises(ValueError, match="batch_size is 41; there are 40 images"):
        DEFENCES["dp_sgd"](model, data, settings=replace(SMALL["dp_sgd"], batch_size=41))


@pytest.mark.parametrize("name", ["nad", "dp_sgd"])
def test_a_loss_that_is_not_finite_is_never_returned_silently(name, model, data):
    settings = replace(SMALL[name], lr=1e30)
    if name == "dp_sgd":
        settings = settings.control()
    with pytest.raises(TrainingError, match="became .*nan|inf"):
        DEFENCES[name](model, data, settings=settings)


def test_without_opacus_the_remedy_is_said(model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ModuleNotFoundError, match="pip install opacus"):
        DEFENCES["dp_sgd"](model, data, settings=SMALL["dp_sgd"])


def test_a_frozen_model_and_a_caller_without_gradients_do_not_matter(model, data):
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        found = DEFENCES["finetune"](frozen, data, settings=SMALL["finetune"])
    expected = DEFENCES["finetune"](model, data, settings=SMALL["finetune"])
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in frozen.parameters())
