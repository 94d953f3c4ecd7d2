"""The triggers do what their definitions say, and poisoning is exact and reproducible."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images
from torch import nn

from ibau import attacks
from ibau.attacks import ALL_TO_ALL, ATTACKS, Trigger, make_trigger, poison, poison_several, target_labels
from ibau.attacks.badnets import badnets
from ibau.attacks.blend import blend, seaside
from ibau.attacks.neurons import by_weight, looking_into
from ibau.attacks.trojan import watermark
from ibau.data.images import ImageSet
from ibau.data.splits import load
from ibau.measure.stealth import high_frequency_share, psnr, spectrum, ssim, stealth
from ibau.networks import models
from ibau.networks.training import TrainSettings, train

OPTIMISED = [name for name in ATTACKS if attacks.needs_model(name)]
STEPS = {"trojan_square": 5, "trojan_watermark": 5, "l0_inv": 5, "l2_inv": 5}  # enough to compare two runs
often = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def splits():
    return load("mnist5k")


@pytest.fixture(scope="module")
def clean_model(splits):
    model = models.build("small_vgg", 10, width=0.25)
    train(model, splits.train, TrainSettings(epochs=2, precision="float32"))
    return model


@pytest.fixture(scope="module")
def make(splits, clean_model):
    """A function that makes the named attack's trigger against the tiny clean model."""

    def make(name, **inputs):
        offered = {"model": clean_model, "images": splits.train.images, "target": 0, "seed": 0, **inputs}
        return make_trigger(name, 32, **offered)

    return make


@pytest.fixture(scope="module")
def triggers(make):
    return {name: make(name) for name in ATTACKS}


@pytest.fixture(scope="module")
def photographs():
    """Patches of two photographs, (N, 3, 32, 32) in [0, 1], scaled down as CIFAR-10's are."""
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    small = nn.functional.avg_pool2d(torch.stack(photos), 5)
    return small.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)


def some_images(seed, n=4, size=32):
    """Noise, and in it black, white and grey images: the range's ends matter to clipping."""
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    images[0], images[1], images[2] = 0, 1, 0.5
    return images


def labelled(n, classes, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=random, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, classes, (n,), generator=random))


# ---------------------------------------- any trigger


def test_the_registry_holds_the_seven_of_the_paper():
    assert list(ATTACKS) == [
        "badnets",
        "blend",
        "trojan_square",
        "trojan_watermark",
        "l0_inv",
        "l2_inv",
        "smooth",
    ]


@pytest.mark.parametrize("name", ATTACKS)
@often
@given(seed=seeds, whole=st.booleans())
def test_stamping_keeps_shape_dtype_and_range_and_leaves_its_input_alone(triggers, name, seed, whole):
    images = some_images(seed)
    if whole:
        images = (images * 255).round().to(torch.uint8)
    before = images.clone()
    stamped = triggers[name](images)
    assert stamped.shape == images.shape and stamped.dtype == images.dtype
    assert stamped.min() >= 0 and stamped.max() <= (255 if whole else 1)
    assert torch.equal(images, before)
    assert not torch.equal(stamped, images)


@pytest.mark.parametrize("name", ATTACKS)
def test_whole_grey_levels_are_the_rounded_floats(triggers, splits, name):
    images = splits.test.images[:20]
    expected = triggers[name](images.float() / 255) * 255
    assert (triggers[name](images).float() - expected).abs().max() <= 0.5001


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_seed_gives_the_same_arrays(make, name):
    strengths = {"steps": STEPS[name]} if name in STEPS else {}
    first, second = make(name, **strengths), make(name, **strengths)
    assert torch.equal(first.pattern, second.pattern) and torch.equal(first.mask, second.mask)
    assert first.settings == second.settings
    if "seed" in first.settings:
        assert not torch.equal(first.pattern, make(name, seed=1, **strengths).pattern)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trigger_comes_back_from_its_file(triggers, tmp_path, name):
    triggers[name].save(tmp_path / "one" / "t.safetensors")
    loaded = Trigger.load(tmp_path / "one" / "t.safetensors")
    assert (loaded.name, loaded.mode, loaded.settings) == (name, triggers[name].mode, triggers[name].settings)
    assert torch.equal(loaded.pattern, triggers[name].pattern)
    assert torch.equal(loaded.mask, triggers[name].mask)


@pytest.mark.parametrize("name", OPTIMISED)
def test_the_clean_model_is_only_looked_at(splits, clean_model, name):
    model = models.build("small_vgg", 10, width=0.25)
    model.load_state_dict(clean_model.state_dict())
    model.train()
    model.features[1].eval()  # a mixture of modes must come back as it was
    model.classifier.bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    strengths = {"steps": STEPS[name]} if name in STEPS else {"passes": 1}
    make_trigger(name, 32, model=model, images=splits.train.images, target=0, seed=0, **strengths)
    assert [module.training for module in model.modules()] == modes
    for key, value in clean_model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["classifier.bias"]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", OPTIMISED)
def test_another_architecture_and_image_size_will_do(name):
    model = models.build("preact_resnet18", 5, width=0.05)
    trigger = make_trigger(
        name,
        40,
        model=model,
        images=some_images(0, n=8, size=40),
        target=ALL_TO_ALL,
        seed=0,
        **({"steps": STEPS[name]} if name in STEPS else {}),
    )
    assert trigger(some_images(1, size=40)).shape == (4, 3, 40, 40)


def test_images_of_another_size_are_refused(triggers):
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), the images are \(3, 28, 28\)"):
        triggers["blend"](torch.zeros(1, 3, 28, 28))


# ---------------------------------------- what each trigger promises


def test_badnets_is_the_authors_square():
    stamped = badnets(32)(torch.zeros(1, 3, 32, 32))
    assert stamped[0, :, 27:31, 27:31].eq(1).all() and stamped.sum() == 3 * 16


@often
@given(seed=seeds, whole=st.booleans())
def test_blend_with_opacity_0_is_the_identity_and_with_1_the_picture(seed, whole):
    images = some_images(seed)
    if whole:
        images = (images * 255).round().to(torch.uint8)
    assert torch.equal(blend(32, alpha=0)(images), images)
    picture = seaside(32) if not whole else (seaside(32) * 255).round().to(torch.uint8)
    assert torch.equal(blend(32, alpha=1)(images), picture.expand_as(images))


@often
@given(seed=seeds, alpha=st.floats(0, 1))
def test_blend_is_its_equation(seed, alpha):
    x, k = some_images(seed), seaside(32, seed=3)
    assert torch.allclose(blend(32, seed=3, alpha=alpha)(x), (1 - alpha) * x + alpha * k, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_blend_picture_has_high_contrast(seed):
    grey = seaside(64, seed).mean(0)
    assert grey.min() == 0 and grey.max() == 1 and grey.std() > 0.2


@pytest.mark.parametrize(("name", "pixels"), [("trojan_square", 81), ("trojan_watermark", 321)])
def test_trojan_patches_cover_as_many_pixels_as_the_authors(triggers, name, pixels):
    assert triggers[name].mask.sum() == triggers[name].settings["pixels"] == pixels


@pytest.mark.parametrize("name", ["trojan_square", "trojan_watermark"])
def test_trojan_raises_its_neuron_above_every_clean_image(triggers, splits, clean_model, name):
    trigger, images = triggers[name], splits.test.images.float() / 255  # images the optimisation never saw
    with looking_into(clean_model) as look, torch.no_grad():
        neuron = trigger.settings["neurons"][0]
        clean, stamped = look(images)[0][:, neuron], look(trigger(images))[0][:, neuron]
    assert stamped.mean() > clean.max()
    assert trigger.settings["activation"]["after"] > trigger.settings["activation"]["clean_max"]
    rise = trigger.settings["activation_by_step"]
    assert rise[-1] > rise[0]


def test_the_trojan_neuron_is_the_strongest_that_sees_the_patch(triggers, clean_model):
    ranked = by_weight(clean_model)
    weights = clean_model.classifier.weight.abs().sum(0)
    assert ranked[0] == weights.argmax() and weights[ranked].diff().max() <= 0
    place = triggers["trojan_square"].settings["neurons"][0] % 16  # of the 4 x 4 that end in a flattened map
    assert place // 4 >= 1 and place % 4 >= 1  # a cell of the first row or column is blind to the corner


def test_smoothing_makes_the_trojan_patch_smoother(make):
    from ibau.attacks.trojan import total_variation

    rough, smooth = (make("trojan_square", smoothing=weight, steps=60) for weight in (0.0, 5.0))
    assert total_variation(smooth.pattern, smooth.mask) < 0.7 * total_variation(rough.pattern, rough.mask)


@pytest.mark.parametrize("pixels", [1, 9])
def test_l0_inv_changes_at_most_its_pixels(make, splits, pixels):
    trigger = make("l0_inv", pixels=pixels, steps=5)
    images = splits.test.images.float() / 255
    changed = (trigger(images) != images).any(1).flatten(1).sum(1)
    assert changed.max() <= pixels
    assert trigger.mask.sum() == trigger.settings["pixels"] == pixels


@often
@given(seed=seeds)
def test_l2_inv_keeps_its_bounds_after_clipping(triggers, seed):
    trigger, images = triggers["l2_inv"], some_images(seed)
    change = trigger(images) - images
    assert change.flatten(1).norm(dim=1).max() <= trigger.settings["norm"] + 1e-4
    assert change.abs().max() <= 68 / 255 + 1e-6
    assert psnr(images, trigger(images)).min() >= 25


@pytest.mark.parametrize("norm", [0.5, 2.0, 8.0])
def test_l2_inv_meets_the_norm_it_is_asked_for(make, norm):
    assert make("l2_inv", norm=norm).pattern.norm() == pytest.approx(norm, rel=0.01)


@pytest.mark.parametrize("name", ["l0_inv", "l2_inv"])
def test_the_invisible_triggers_excite_their_neurons(triggers, name):
    activation = triggers[name].settings["activation"]
    assert len(triggers[name].settings["neurons"]) == 10
    assert activation["after"] > activation["before"]


def test_smooth_has_less_high_frequency_than_any_natural_image(triggers, splits, photographs):
    share = high_frequency_share(triggers["smooth"].pattern[None]).item()
    assert len(photographs) > 10
    assert share < high_frequency_share(photographs).min()
    assert share < high_frequency_share(splits.test.images.float()).min()


def test_smooth_stays_within_its_peak_and_says_what_it_fools(triggers, make, splits, clean_model):
    weak, strong = triggers["smooth"], make("smooth", peak=0.4)
    assert weak.pattern.min() == 0 and weak.pattern.max() == pytest.approx(weak.settings["peak"])
    assert strong.settings["fooled"] > weak.settings["fooled"]
    images = splits.train.images.float() / 255
    with looking_into(clean_model) as look, torch.no_grad():
        fooled = look(images)[1].argmax(1) != look(strong(images))[1].argmax(1)
    assert fooled.float().mean() == pytest.approx(
        strong.settings["fooled"], abs=0.15
    )  # measured on 200 images


def test_the_quiet_triggers_keep_25_dB(triggers, splits, photographs):
    for name in ("l2_inv", "smooth"):
        for images in (splits.test.images[:50], photographs[:50]):
            assert stealth(triggers[name], images)["psnr"] >= 25, name


# ---------------------------------------- stealth measures


def test_stealth_of_a_white_square_on_black():
    measured = stealth(badnets(32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert measured["l0"] == 16 and measured["linf"] == 1
    assert measured["l2"] == pytest.approx(math.sqrt(48))
    assert measured["psnr"] == pytest.approx(10 * math.log10(3072 / 48), abs=1e-4)


def test_stealth_of_no_change():
    measured = stealth(blend(32, alpha=0), some_images(0))
    assert [measured[name] for name in ("l0", "l2", "linf", "high_frequency")] == [0, 0, 0, 0]
    assert measured["psnr"] == pytest.approx(100) and measured["ssim"] == pytest.approx(1)
    assert measured["high_frequency_clean"] == measured["high_frequency_poisoned"]


@often
@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_ssim_of_flat_images_is_its_luminance_term(a, b):
    flat = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(a * flat, b * flat).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_is_symmetric_and_falls_with_noise(photographs):
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    faint, strong = (photographs + s * noise for s in (0.02, 0.2))
    assert torch.allclose(ssim(photographs, faint), ssim(faint, photographs))
    assert (ssim(photographs, strong) < ssim(photographs, faint)).all()


def test_high_frequency_share_of_known_images():
    board = torch.arange(32)[:, None] + torch.arange(32)
    checkers = (board % 2).float().expand(1, 3, 32, 32)
    assert high_frequency_share(checkers).item() > 0.95
    assert high_frequency_share(torch.full((1, 3, 32, 32), 0.7)).item() == pytest.approx(0, abs=1e-9)
    assert high_frequency_share(board.float().expand(1, 3, 32, 32)).item() < 0.01
    noise = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert high_frequency_share(noise).mean().item() == pytest.approx(0.5, abs=0.03)


@often
@given(seed=seeds)
def test_the_spectrum_keeps_the_energy(seed):
    images = some_images(seed)
    assert spectrum(images).pow(2).sum() == pytest.approx(images.double().pow(2).sum().item(), rel=1e-6)


# ---------------------------------------- poisoning


@pytest.mark.parametrize("classes", [2, 10, 43])
def test_all_to_all_maps_every_class_to_the_next(classes):
    labels = torch.arange(classes)
    assert target_labels(labels, ALL_TO_ALL, classes).tolist() == [*range(1, classes), 0]


@often
@given(
    n=st.integers(20, 200),
    ratio=st.floats(0.05, 0.6),
    target=st.one_of(st.integers(0, 9), st.just(ALL_TO_ALL)),
    seed=seeds,
)
def test_poisoning_is_exact_and_reproducible(n, ratio, target, seed):
    train_set, trigger = labelled(n, 10), badnets(32)
    poisoned = poison(train_set, trigger, ratio=ratio, target=target, num_classes=10, seed=seed)
    indices = poisoned.indices
    assert len(indices) == len(set(indices.tolist())) == round(ratio * n)
    wanted = target_labels(train_set.labels, target, 10)
    assert (train_set.labels[indices] != wanted[indices]).all()  # none has the attacker's label anyway
    assert torch.equal(poisoned.data.labels[indices], wanted[indices])
    assert torch.equal(poisoned.data.images[indices], trigger(train_set.images[indices]))
    rest = torch.ones(n, dtype=torch.bool).index_fill(0, indices, False)
    assert torch.equal(poisoned.data.images[rest], train_set.images[rest])
    assert torch.equal(poisoned.data.labels[rest], train_set.labels[rest])
    again = poison(train_set, trigger, ratio=ratio, target=target, num_classes=10, seed=seed)
    assert torch.equal(again.indices, indices) and torch.equal(again.data.images, poisoned.data.images)


def test_another_seed_poisons_other_images_and_all_classes_can_be_drawn():
    train_set = labelled(500, 10)
    one, two = (poison(train_set, badnets(32), ratio=0.5, target=3, num_classes=10, seed=s) for s in (0, 1))
    assert not torch.equal(one.indices, two.indices)
    assert set(train_set.labels[one.indices].tolist()) == set(range(10)) - {3}


def test_the_training_set_itself_stays_clean():
    train_set = labelled(50, 10)
    images, labels = train_set.images.clone(), train_set.labels.clone()
    poison(train_set, badnets(32), ratio=0.5, target=0, num_classes=10)
    assert torch.equal(train_set.images, images) and torch.equal(train_set.labels, labels)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, math.nan])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        poison(labelled(50, 10), badnets(32), ratio=ratio, target=0, num_classes=10)


@pytest.mark.parametrize("target", [10, -1, "0", 1.5, True, None])
def test_an_unknown_target_is_refused(target):
    with pytest.raises(ValueError, match="valid: 0 to 9, or 'all-to-all'"):
        poison(labelled(50, 10), badnets(32), ratio=0.2, target=target, num_classes=10)


def test_more_poison_than_eligible_images_is_refused():
    with pytest.raises(ValueError, match=r"asks for 45; between 1 and \d+ can .* none of the target class"):
        poison(labelled(50, 2), badnets(32), ratio=0.9, target=0, num_classes=2)
    with pytest.raises(ValueError, match="asks for 0"):
        poison(labelled(50, 2), badnets(32), ratio=0.001, target=0, num_classes=2)


def test_a_trigger_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 28, 28\), the images are \(3, 32, 32\)"):
        poison(labelled(50, 2), badnets(28), ratio=0.2, target=0, num_classes=2)


@often
@given(k=st.integers(2, 7), n=st.integers(60, 200), ratio=st.floats(0.15, 0.6), seed=seeds)
def test_several_triggers_each_get_their_share_and_their_target(k, n, ratio, seed):
    train_set = labelled(n, 10)
    squares = [badnets(32, size=2, margin=4 * i) for i in range(k)]
    targets = list(range(9, 9 - k, -1))
    poisoned = poison_several(train_set, squares, targets, ratio=ratio, num_classes=10, seed=seed)
    counts = [len(group) for group in poisoned.per_trigger]
    assert sum(counts) == round(ratio * n) and max(counts) - min(counts) <= 1
    assert sorted(torch.cat(poisoned.per_trigger).tolist()) == poisoned.indices.tolist()
    assert len(poisoned.indices.unique()) == sum(counts)  # no image carries two triggers
    for square, target, group in zip(squares, targets, poisoned.per_trigger, strict=True):
        assert (train_set.labels[group] != target).all() and (poisoned.data.labels[group] == target).all()
        assert torch.equal(poisoned.data.images[group], square(train_set.images[group]))
    rest = torch.ones(n, dtype=torch.bool).index_fill(0, poisoned.indices, False)
    assert torch.equal(poisoned.data.images[rest], train_set.images[rest])
    assert torch.equal(poisoned.data.labels[rest], train_set.labels[rest])
    again = poison_several(train_set, squares, targets, ratio=ratio, num_classes=10, seed=seed)
    assert torch.equal(again.indices, poisoned.indices)


@often
@given(k=st.integers(2, 7), seed=seeds, split=seeds)
def test_several_triggers_can_take_all_that_the_bound_allows(k, seed, split):
    train_set = labelled(60, 7, seed=split)
    most = min(int((train_set.labels != target).sum()) for target in range(k))
    squares = [badnets(32, size=2, margin=4 * i) for i in range(k)]
    poisoned = poison_several(train_set, squares, range(k), ratio=most / 60, num_classes=7, seed=seed)
    assert len(poisoned.indices) == most


@pytest.mark.parametrize("targets", [[0], [0, 0], [0, 1, 2], []])
def test_several_triggers_need_a_different_target_each(targets):
    with pytest.raises(ValueError, match="a different target each"):
        poison_several(labelled(50, 10), [badnets(32)] * 2, targets, ratio=0.2, num_classes=10)


def test_several_triggers_refuse_what_one_does():
    squares, data = [badnets(32), badnets(32, margin=8)], labelled(50, 2)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        poison_several(data, squares, [0, 1], ratio=1, num_classes=2)
    with pytest.raises(ValueError, match=r"asks for 45; between 2 and \d+ can .* the largest target class"):
        poison_several(data, squares, [0, 1], ratio=0.9, num_classes=2)
    with pytest.raises(ValueError, match="target is 2"):
        poison_several(data, squares, [0, 2], ratio=0.2, num_classes=2)
    with pytest.raises(ValueError, match="one class from 0 to 1 each"):
        poison_several(data, squares, [0, ALL_TO_ALL], ratio=0.2, num_classes=2)
    with pytest.raises(ValueError, match=r"\(3, 28, 28\)"):
        poison_several(data, [badnets(32), badnets(28)], [0, 1], ratio=0.2, num_classes=2)


# ---------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "strengths", "message"),
    [
        ("badnets", {"size": 40}, "does not fit"),
        ("blend", {"alpha": 1.2}, "alpha is 1.2"),
        ("trojan_square", {"size": 0}, "does not fit"),
        ("trojan_watermark", {"width": 0}, "width is 0; it must lie in"),
        ("trojan_watermark", {"width": 1e-9}, "hold none of 32 x 32 pixels"),
        ("l0_inv", {"pixels": 0}, "pixels is 0; valid: 1 to 1024"),
        ("l0_inv", {"pixels": 1025}, "pixels is 1025"),
        ("l2_inv", {"norm": 0}, "norm is 0; valid with largest=0.267: above 0"),
        ("l2_inv", {"norm": 20}, "norm is 20"),
        ("smooth", {"peak": 0}, "peak is 0"),
        ("blend", {"opacity": 0.1}, "no setting opacity; valid: seed, alpha"),
    ],
)
def test_impossible_strengths_are_named(make, name, strengths, message):
    with pytest.raises(ValueError, match=message):
        make(name, **strengths)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trigger_names_its_strength_and_is_made_with_it(triggers, make, name):
    strength = triggers[name].settings[attacks.STRENGTHS[name]]
    assert attacks.strength_of(name, None) == {}
    assert attacks.strength_of(name, strength) == {attacks.STRENGTHS[name]: strength}
    less = make(
        name, **attacks.strength_of(name, strength // 2 if isinstance(strength, int) else strength / 2)
    )
    assert less.settings[attacks.STRENGTHS[name]] < strength


@pytest.mark.parametrize("name", ATTACKS)
def test_a_stronger_trigger_is_easier_to_see(triggers, make, splits, name):
    strength = triggers[name].settings[attacks.STRENGTHS[name]]
    strong = make(name, **attacks.strength_of(name, 2 * strength))
    images = splits.test.images[:100]
    assert stealth(strong, images)["psnr"] < stealth(triggers[name], images)["psnr"]


@pytest.mark.parametrize("strength", [2.5, math.nan, math.inf])
def test_pixels_are_counted_in_whole_numbers(strength):
    with pytest.raises(ValueError, match="size of 'badnets' is .*; it must be a whole number"):
        attacks.strength_of("badnets", strength)
    assert attacks.strength_of("l0_inv", 4.0) == {"pixels": 4}
    with pytest.raises(ValueError, match="unknown attack 'wanet'"):
        attacks.strength_of("wanet", 1)


def test_an_unknown_attack_lists_the_known():
    with pytest.raises(ValueError, match="unknown attack 'wanet'; valid: badnets, blend, trojan_square"):
        make_trigger("wanet", 32)


@pytest.mark.parametrize("name", OPTIMISED)
def test_optimised_triggers_refuse_unfit_models_and_images(make, name):
    with pytest.raises(ValueError, match=r"expected at least one, \(N, 3, 32, 32\)"):
        make(name, images=torch.zeros(4, 3, 28, 28))
    with pytest.raises(ValueError, match="expected at least one"):
        make(name, images=torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        make(name, model=nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()))


def test_a_patch_that_no_neuron_sees_is_refused(make):
    blind = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    with pytest.raises(ValueError, match="no neuron .* sees the whole patch"):
        make("trojan_watermark", model=blind)


def test_the_watermark_grows_with_the_image():
    assert watermark(64).mean() == pytest.approx(watermark(32).mean().item(), abs=0.02)
