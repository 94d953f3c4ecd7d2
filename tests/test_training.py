"""The training loop learns, repeats itself exactly, goes on after a kill, and stops when it must."""

import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from ibau.data.images import ImageSet
from ibau.hypergradient.layers import exact_float32
from ibau.measure.rates import accuracy
from ibau.networks import models, training
from ibau.networks.seeding import seeded
from ibau.networks.training import (
    TrainingError,
    TrainSettings,
    augmented,
    autocast,
    learning_rate,
    native_bfloat16,
    shifted,
    to_float,
    train,
)

SETTINGS = TrainSettings(epochs=3, batch_size=16, precision="float32", augment="crop-flip")


def tint(n=60, size=16):
    """Images of three classes: the class's channel is bright."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 120, (n, 3, size, size), generator=random, dtype=torch.uint8)
    images[torch.arange(n), labels] += 100
    return ImageSet(images, labels)


def tiny(seed=0):
    """A small network with the layers that make a resume hard: BatchNorm's statistics, dropout's numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ELU(),
            models.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 3),
        )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_seconds(history):
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]


@pytest.fixture(scope="module")
def undisturbed():
    model = tiny()
    return model, train(model, tint(), SETTINGS, seed=4)


def test_it_reports_every_epoch_and_ends_in_eval_mode(undisturbed):
    model, history = undisturbed
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert set(history[0]) == {"epoch", "loss", "accuracy", "seconds"}
    assert not model.training


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator(undisturbed):
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again = tiny()
    history = train(again, tint(), SETTINGS, seed=4)
    assert same(again, undisturbed[0])
    assert without_seconds(history) == without_seconds(undisturbed[1])
    assert torch.equal(torch.get_rng_state(), state)
    other = tiny()
    train(other, tint(), SETTINGS, seed=5)
    assert not same(other, undisturbed[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_it_learns_in_every_precision(precision, schedule):
    data, model = tint(120), tiny()
    settings = TrainSettings(epochs=8, batch_size=16, lr=1e-2, precision=precision, schedule=schedule)
    history = train(model, data, settings)
    assert history[-1]["loss"] < history[0]["loss"]
    assert accuracy(model, data.images, data.labels).value > 0.9
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_float_images_are_trained_on_as_uint8_ones_are(undisturbed):
    data, model = tint(), tiny()
    train(model, ImageSet(to_float(data.images), data.labels), SETTINGS, seed=4)
    assert same(model, undisturbed[0])


# ---- checkpoints


@pytest.mark.parametrize("finished", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_weights(undisturbed, tmp_path, monkeypatch, finished):
    checkpoint, real, done = tmp_path / "sub" / "run.checkpoint", training._epoch, []

    def interrupted(model, optimizer, images, labels, epoch, *rest):
        if epoch == finished:
            real(model, optimizer, images[:20], labels[:20], epoch, *rest)  # half an epoch is lost
            raise KeyboardInterrupt
        return real(model, optimizer, images, labels, epoch, *rest)

    def counted(*arguments):
        done.append(arguments[4])
        return real(*arguments)

    monkeypatch.setattr(training, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tint(), SETTINGS, seed=4, checkpoint=checkpoint)
    monkeypatch.setattr(training, "_epoch", counted)
    model = tiny(seed=99)  # whatever the model holds, the checkpoint counts
    history = train(model, tint(), SETTINGS, seed=4, checkpoint=checkpoint)
    assert done == list(range(finished, 3))
    assert same(model, undisturbed[0])
    assert without_seconds(history) == without_seconds(undisturbed[1])
    assert list(checkpoint.parent.iterdir()) == []


def test_a_killed_process_can_be_resumed(undisturbed, tmp_path):
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_training import SETTINGS, tint, tiny, train, training
        real = training._epoch
        def killed(*arguments):
            if arguments[4] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        training._epoch = killed
        train(tiny(), tint(), SETTINGS, seed=4, checkpoint={str(tmp_path / "c")!r})
    """
    # As many threads as here: another number may sum in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment)
    assert result.returncode == -signal.SIGKILL
    model = tiny()
    train(model, tint(), SETTINGS, seed=4, checkpoint=tmp_path / "c")
    assert same(model, undisturbed[0])


@pytest.fixture
def half_way(tmp_path, monkeypatch):
    """The checkpoint that a run leaves that was interrupted in its second epoch."""
    real = training._epoch

    def interrupted(*arguments):
        if arguments[4] == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tint(), SETTINGS, seed=4, checkpoint=tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("data", "settings", "seed"),
    [
        (tint(), SETTINGS, 5),
        (tint(30), SETTINGS, 4),
        (tint(), TrainSettings(epochs=4, batch_size=16, precision="float32", augment="crop-flip"), 4),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(half_way, data, settings, seed):
    model = tiny()
    with pytest.raises(TrainingError, match="of another run .* remove it"):
        train(model, data, settings, seed=seed, checkpoint=half_way)
    assert same(model, tiny())
    assert half_way.exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_damaged_checkpoint_counts_as_none(undisturbed, half_way, share):
    whole = half_way.read_bytes()
    half_way.write_bytes(whole[: int(share * len(whole))])
    model = tiny()
    history = train(model, tint(), SETTINGS, seed=4, checkpoint=half_way)
    assert len(history) == 3
    assert same(model, undisturbed[0])
    assert not half_way.exists()


# ---- errors and edges


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_stops_training(precision):
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, images):
            return images.mean((2, 3)) + self.weight / self.weight.detach()  # 0 / 0

    with pytest.raises(TrainingError, match=r"loss became nan in epoch 1; .* lr=0.5.*precision='float32'"):
        train(Overflowing(), tint(), TrainSettings(epochs=2, lr=0.5, precision=precision))


def test_a_rate_beyond_reason_stops_training():
    with pytest.raises(TrainingError, match="try a lower rate than lr=1e[+]30"):
        train(tiny(), tint(), TrainSettings(epochs=5, lr=1e30, precision="float32"))


@pytest.mark.parametrize(("n", "seen"), [(33, 32), (32, 32), (34, 34), (1, 1)])
def test_a_lone_straggler_is_left_out(n, seen, monkeypatch):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.batches = tiny(), []

        def forward(self, images):
            self.batches.append(len(images))
            return self.net(images)

    model = Counting()
    train(model, tint(n), TrainSettings(epochs=2, batch_size=16, precision="float32"))
    assert sum(model.batches) == 2 * seen


def test_batches_of_one_image_are_possible():
    history = train(tiny(), tint(4), TrainSettings(epochs=1, batch_size=1, precision="float32"))
    assert math.isfinite(history[0]["loss"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"augment": "flip"}, "augment is 'flip'; valid: none, crop, crop-flip"),
        ({"precision": "float16"}, "precision is 'float16'; valid: auto, float32, bfloat16"),
        ({"schedule": "step"}, "schedule is 'step'; valid: constant, cosine"),
        ({"epochs": 0}, "epochs is 0; it must be positive"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**bad)


# ---- the parts


def test_the_cosine_schedule_warms_up_and_ends_near_zero():
    settings = TrainSettings(lr=1.0)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(100, 100, settings) == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_short_schedules_have_positive_rates(total):
    for schedule in ("cosine", "constant"):
        assert all(
            0 < learning_rate(step, total, TrainSettings(lr=1.0, schedule=schedule)) <= 1
            for step in range(total)
        )


def test_the_constant_schedule():
    settings = TrainSettings(lr=0.3, schedule="constant")
    assert {learning_rate(step, 10, settings) for step in range(10)} == {0.3}


def test_no_augmentation_is_the_identity():
    images = torch.rand(4, 3, 8, 8)
    assert augmented(images, "none") is images


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
@pytest.mark.parametrize("shape", [(50, 3, 12, 12), (50, 3, 10, 14), (1, 3, 8, 8)])
def test_augmentation_keeps_shape_and_range(augment, shape):
    images = torch.rand(shape) * 0.5 + 0.5
    before = images.clone()
    out = augmented(images, augment)
    assert out.shape == images.shape
    assert torch.equal(images, before)
    assert set(out[out < 0.5].tolist()) <= {0}  # only what the padding brought in
    assert out.max() <= images.max()


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_every_augmented_image_is_a_shift_or_a_mirrored_shift(augment):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 6, 6) + 0.1
    padded = nn.functional.pad(image, (4,) * 4)
    shifts = [padded[0, :, i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    mirrored = [shift.flip(2) for shift in shifts]
    valid = torch.stack(shifts + mirrored)
    out = augmented(image.expand(2000, -1, -1, -1), augment)
    which = (out[:, None] == valid).flatten(2).all(2)
    assert which.any(1).all()
    assert which.any(0)[:81].all()  # every shift occurs
    share = which[:, 81:].any(1).float().mean()
    assert share == 0 if augment == "crop" else 0.45 < share < 0.55


def test_shifts_with_a_generator_repeat_themselves_and_mirror_the_edges():
    images = torch.rand(50, 3, 6, 8)
    draws = [shifted(images, (2, 3), "reflect", generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].shape == images.shape
    padded = torch.nn.functional.pad(images, (3, 3, 2, 2), "reflect")
    places = set()
    for image, whole in zip(draws[0], padded, strict=True):
        fits = [(i, j) for i in range(5) for j in range(7) if torch.equal(image, whole[:, i:, j:][:, :6, :8])]
        places |= set(fits)
        assert fits, "not a window of the padded image"
    assert {i for i, _ in places} == set(range(5)) and {j for _, j in places} == set(range(7))


def test_to_float():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(to_float(images), torch.tensor([0.0, 0.2, 1.0]))
    assert images.dtype == torch.uint8
    already = torch.rand(3)
    assert to_float(already) is already


# ---- random numbers


def test_seeded_numbers_are_those_of_manual_seed_and_the_generator_goes_on():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = torch.rand(3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), seeded(7):
        assert torch.equal(torch.rand(3), expected)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.initial_seed() == 1


class Accelerators:
    """Stands in for torch's functions on the generators of two CUDA devices and Apple's one."""

    def __init__(self, monkeypatch, started):
        self.cuda, self.mps, self.seeds = ["a", "b"], "c", []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(self.cuda))
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: self.set_cuda([seed, seed], seed))
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", self.set_cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: started)
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda: self.mps)
        monkeypatch.setattr(torch.mps, "manual_seed", self.set_mps)
        monkeypatch.setattr(torch.mps, "set_rng_state", self.set_mps)

    def set_cuda(self, states, seed=None):
        self.cuda, self.seeds = states, [*self.seeds, seed]

    def set_mps(self, state):
        self.mps = state


def test_accelerators_are_seeded_and_restored(monkeypatch):
    found = Accelerators(monkeypatch, started=True)
    with seeded(7):
        assert (found.cuda, found.mps) == ([7, 7], 7)
    assert (found.cuda, found.mps) == (["a", "b"], "c")


def test_a_model_and_its_training_leave_the_accelerators_generators_alone(monkeypatch):
    found = Accelerators(monkeypatch, started=True)
    train(models.build("small_vgg", 3, width=0.125, seed=5), tint(size=32), SETTINGS, seed=4)
    assert (found.cuda, found.mps) == (["a", "b"], "c")
    assert [seed for seed in found.seeds if seed is not None] == [5, 400_012, 400_013, 400_014]


def test_an_accelerator_that_is_not_in_use_is_not_started(monkeypatch):
    found = Accelerators(monkeypatch, started=False)
    with seeded(7):
        torch.rand(1)
    assert (found.cuda, found.mps, found.seeds) == (["a", "b"], "c", [])


# ---- precision


@pytest.mark.parametrize(("capability", "native"), [((7, 0), False), ((7, 5), False), ((8, 0), True)])
def test_bfloat16_that_a_gpu_only_emulates_is_not_native(monkeypatch, capability, native):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: asked.append(d) or capability)
    device = torch.device("cuda", 1)
    assert native_bfloat16(device) is native
    assert asked == [device]  # not the current one


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_apples_gpu_is_trained_on_in_float32_unless_told_otherwise(precision):
    device = torch.device("mps")
    assert not native_bfloat16(device)
    with autocast(device, precision):
        assert torch.is_autocast_enabled("mps") == (precision == "bfloat16")


def test_autocast_to_auto_on_an_old_gpu_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    with autocast(torch.device("cuda"), "auto"):
        assert not torch.is_autocast_enabled("cuda")


def tf32():
    backends = torch.backends
    flags = [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()]
    if hasattr(backends.cudnn, "conv"):
        flags += [m.fp32_precision for m in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]
    return flags


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolution", [True, False])
def test_exact_float32_switches_tf32_off_and_back(matmul, convolution):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
        set_so = tf32()
        with pytest.raises(KeyboardInterrupt), exact_float32():
            assert tf32()[:3] == [False, False, "highest"]
            assert set(tf32()[3:]) <= {"ieee"}
            with exact_float32():
                assert tf32()[:2] == [False, False]
            assert tf32()[:2] == [False, False]
            raise KeyboardInterrupt
        assert tf32() == set_so
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older flags alone")
def test_exact_float32_overrides_torchs_newer_switches():
    """In a process of its own: the older flags cannot be read once the newer ones disagree."""
    program = """
        import torch
        from ibau.hypergradient.layers import exact_float32
        switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
        for m in switches:
            m.fp32_precision = "tf32"
        with exact_float32():
            assert [m.fp32_precision for m in switches] == 3 * ["ieee"]
        assert [m.fp32_precision for m in switches] == 3 * ["tf32"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
