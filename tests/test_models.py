"""The networks are the ones described, and a checkpoint is read whole, safely, or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ibau.networks import checkpoints, models
from ibau.networks.checkpoints import ModelError
from ibau.networks.models import Dropout, PreActResNet18, SmallVGG

CONVOLUTIONS = (0, 3, 8, 11, 16, 19)  # their places in `features`; the BatchNorm comes right after
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def model():
    return models.build("small_vgg", 3, width=0.125, seed=1)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_small_vgg_has_the_authors_keys():
    expected = {"classifier.weight", "classifier.bias"}
    for i in CONVOLUTIONS:
        expected |= {f"features.{i}.weight", f"features.{i}.bias"}
        expected |= {f"features.{i + 1}.{name}" for name in NORM}
    assert set(SmallVGG(10).state_dict()) == expected


def test_small_vgg_has_the_parameters_counted_by_hand():
    # 3 -> 32 -> 32 -> 64 -> 64 -> 128 -> 128 by 3x3 kernels, biases, two BatchNorm vectors, Linear(2048, 10)
    kernels = 9 * (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    vectors = 3 * (32 + 32 + 64 + 64 + 128 + 128)
    assert sum(p.numel() for p in SmallVGG(10).parameters()) == kernels + vectors + 2048 * 10 + 10 == 308_394


def test_small_vgg_layers_follow_the_plan():
    features = SmallVGG(10).features
    assert [type(layer).__name__ for layer in features[:8]] == [
        *("Conv2d", "BatchNorm2d", "ELU") * 2,
        "MaxPool2d",
        "Dropout",
    ]
    assert [layer.p for layer in features if isinstance(layer, Dropout)] == [0.3, 0.4, 0.4]
    assert {features[i].padding for i in CONVOLUTIONS} == {(1, 1)}


def test_preact_resnet18_has_the_published_size():
    # The widely used pytorch-cifar form has 11,171,146 and no BatchNorm before its classifier; ours has one.
    assert sum(p.numel() for p in PreActResNet18(10).parameters()) == 11_171_146 + 2 * 512


@pytest.mark.parametrize("architecture", models.MODELS)
@pytest.mark.parametrize("num_classes", [2, 43])
def test_output_is_one_logit_a_class(architecture, num_classes):
    model = models.build(architecture, num_classes, width=0.125).eval()
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, num_classes)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("architecture", models.MODELS)
def test_build_is_set_by_its_seed_alone(architecture):
    before = torch.get_rng_state()
    first, again, other = (models.build(architecture, 3, 0.125, seed).state_dict() for seed in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match="'vgg'; valid: small_vgg, preact_resnet18"):
        models.build("vgg", 10)
    for architecture in models.MODELS:
        with pytest.raises(ValueError, match="num_classes is 1"):
            models.build(architecture, 1)
        for width in (0, -1, 0.001):
            with pytest.raises(ValueError, match="width is"):
                models.build(architecture, 10, width)


def test_device_of():
    assert models.device_of(nn.ReLU()) == torch.device("cpu")
    assert models.device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")


@pytest.mark.parametrize(
    "cuda, mps, wanted",
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_default_device_is_the_fastest_there_is(monkeypatch, cuda, mps, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert models.default_device() == torch.device(wanted)


# ---- dropout


@pytest.mark.parametrize("p", [0.3, 0.4, 0.5])
def test_dropout_drops_its_rate_and_keeps_the_mean(p):
    torch.manual_seed(0)
    out = Dropout(p).train()(torch.ones(1_000_001))  # not a multiple of eight
    dropped = (out == 0).float().mean().item()
    rate = round(256 * p) / 256
    assert abs(rate - p) <= 1 / 512
    assert dropped == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 1e6) ** 0.5)
    assert out.mean().item() == pytest.approx(1, abs=5e-3)
    assert torch.unique(out).tolist() == pytest.approx([0, 1 / (1 - rate)])


def test_dropout_elements_are_independent():
    torch.manual_seed(0)
    kept = (Dropout(0.5).train()(torch.ones(2**17, 8)) != 0).float()
    correlation = torch.corrcoef(kept.T) - torch.eye(8)  # the eight share one 64-bit number
    assert correlation.abs().max() < 5 / 2**8.5


def test_dropout_is_the_identity_in_eval_mode():
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(Dropout(0.5).eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    assert torch.equal(Dropout(p).train()(torch.ones(100)), torch.full((100,), 1 - p))


def test_dropout_keeps_layout_values_and_gradient():
    torch.manual_seed(0)
    x = torch.rand(4, 8, 6, 6).add(1).to(memory_format=torch.channels_last).requires_grad_()
    out = Dropout(0.5).train()(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    scale = (out != 0) * 2.0
    assert torch.equal(out, x * scale)
    assert 0.4 < scale.mean() / 2 < 0.6
    weight = torch.rand_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(gradient, weight * scale)


def test_dropout_takes_a_strided_view():
    torch.manual_seed(0)
    out = Dropout(0.5).train()(torch.ones(64, 64)[:, ::2])
    assert out.shape == (64, 32)
    assert set(out.unique().tolist()) == {0, 2}


# ---- checkpoints


def test_save_and_load_give_the_same_model_back(model, tmp_path):
    model.to(memory_format=torch.channels_last)(torch.rand(4, 3, 32, 32))  # moves the running statistics
    settings = {"attack": "badnets", "target": 8, "lr": 1e-3, "nested": {"list": [1, None, "é"]}}
    path = checkpoints.save(model, tmp_path / "new" / "m.safetensors", settings)
    other = models.build("small_vgg", 3, width=0.125, seed=2).train()
    assert checkpoints.load(path, other) is other
    assert same(other.state_dict(), model.state_dict())
    assert not other.training
    assert settings_in(path) == settings
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def settings_in(path):
    return json.loads(checkpoints.read_metadata(path).get("settings", "{}"))


def test_settings_of_a_file_without_any(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    assert settings_in(tmp_path / "m.safetensors") == {}


@pytest.mark.parametrize("wrapper", [None, "net", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_foreign_checkpoints_are_unwrapped(model, tmp_path, wrapper, prefix):
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3, "acc": 0.9} if wrapper else state, tmp_path / "m.pth")
    other = checkpoints.load(tmp_path / "m.pth", models.build("small_vgg", 3, width=0.125, seed=2))
    assert same(other.state_dict(), model.state_dict())


def test_old_zipless_checkpoints_are_read(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    assert same(checkpoints.load_state(tmp_path / "m.pth"), model.state_dict())


def test_a_checkpoint_without_batch_counters_fits(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "m.pth")
    checkpoints.load(tmp_path / "m.pth", model)


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(model, tmp_path, zipped):
    touched, path = tmp_path / "touched", tmp_path / "m.pth"
    content = {"net": model.state_dict(), "extra": Malicious(touched)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"m\.pth: refused, .*mkdir.*Expected: a state dict") as caught:
        checkpoints.load(path, model)
    assert "add_safe_globals" not in str(caught.value)  # torch's advice is not ours
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # the file would have done it


def test_a_pickled_module_is_refused(model, tmp_path):
    torch.save(model, tmp_path / "m.pth")
    with pytest.raises(ModelError, match="SmallVGG"):
        checkpoints.load_state(tmp_path / "m.pth")


def test_what_does_not_fit_is_listed_and_the_model_left_alone(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state["features.99.weight"] = state.pop("features.0.bias")
    state["classifier.weight"] = torch.zeros(43, 256)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ModelError) as caught:
        checkpoints.load(tmp_path / "m.pth", model)
    message = str(caught.value)
    assert "m.pth: does not fit SmallVGG" in message
    assert "missing: features.0.bias" in message
    assert "unexpected: features.99.weight" in message
    assert "wrong shape: classifier.weight is (43, 256), expected (3, 256)" in message
    assert same(model.state_dict(), before)


def test_a_long_list_of_misfits_is_cut(model, tmp_path):
    path = checkpoints.save(nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(
        ModelError, match=r"missing: .*, \.\.\. \(38 in all\); unexpected: (weight, bias|bias, weight)"
    ):
        checkpoints.load(path, model)


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(model, tmp_path, name, share):
    path = tmp_path / name
    checkpoints.save(model, path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=rf"{name}: not a readable"):
        checkpoints.load(path, model)


def test_text_is_no_checkpoint(model, tmp_path):
    (tmp_path / "m.pth").write_text("hello world\n")
    with pytest.raises(ModelError, match=r"m\.pth: not a readable checkpoint"):
        checkpoints.load(tmp_path / "m.pth", model)


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_missing_file_is_named(model, tmp_path, name):
    with pytest.raises(ModelError, match=rf"{name}: no such checkpoint file"):
        checkpoints.load(tmp_path / name, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a dict of named tensors"),
        ({}, "holds a dict"),
        ({"epoch": 3, "lr": 0.1}, "not tensors: epoch, lr; expected a state dict, bare or under 'net'"),
        ({0: torch.ones(1)}, "unexpected: 0"),
    ],
)
def test_other_content_is_named(model, tmp_path, content, message):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ModelError, match=message):
        checkpoints.load(tmp_path / "m.pth", model)


def test_a_failing_save_leaves_the_old_file_whole(model, tmp_path, monkeypatch):
    path = checkpoints.save(model, tmp_path / "m.safetensors", {"version": 1})

    def full_disk(tensors, file, metadata):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(models.build("small_vgg", 3, 0.125, seed=9), path, {"version": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert settings_in(path) == {"version": 1}
    assert same(checkpoints.load_state(path), model.state_dict())
