"""A model from outside: each form it comes in is written back alike, and bad input is one sentence."""

import copy
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ibau import CleanSettings, IBAUSettings, clean, cli, unlearn
from ibau.data.folders import load_folder, save_folder
from ibau.data.images import DataError, ImageSet
from ibau.measure.intervals import Rate
from ibau.networks import checkpoints
from ibau.networks.checkpoints import ModelError
from ibau.own_model.load import Normalised, build, check_folder, load_model, out_path, parse_normalize, split

CLASSES = ("ant", "bee", "cat")
LITTLE = {"rounds": 2, "outer_steps": 2, "inner_steps": 2, "inner_images": 8, "radius": 2.0}


def pictures(count=24, size=16, seed=0):
    """Random images, each class a little brighter than the one before."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    images = torch.rand(count, 3, size, size, generator=random) * 0.5 + labels.view(-1, 1, 1, 1) * 0.2
    return ImageSet((images * 255).to(torch.uint8), labels)


@pytest.fixture
def photos(tmp_path):
    save_folder(pictures(), tmp_path / "photos", CLASSES)
    return tmp_path / "photos"


class Tiny(nn.Module):
    """A convolution, a norm and a linear layer, with an activation that works in place."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(torch.relu_(self.norm(self.conv(x))).mean((2, 3)))


TINY = f"{__name__}:Tiny"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file as a module, under the name that TINY has."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Tiny.__module__])


def checkpoint(folder, wrapper=None, prefix="", dtype=torch.float32, suffix=".pth", num_classes=3):
    torch.manual_seed(0)
    state = {
        prefix + key: value.to(dtype) if value.is_floating_point() else value
        for key, value in Tiny(num_classes).state_dict().items()
    }
    path = folder / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path, {"format": "pt", "note": "kept"})
    else:
        torch.save({wrapper: state, "epoch": 7} if wrapper else state, path)
    return path


# ------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_read_as_it_was_written_in_sorted_order(photos):
    found = load_folder(photos, 0)
    assert found.classes == CLASSES and found.skipped == ()
    wanted = pictures()
    order = wanted.labels.argsort(stable=True)
    assert torch.equal(found.data.labels, wanted.labels[order])
    assert torch.equal(found.data.images, wanted.images[order])


def test_classes_are_those_of_torchvision(photos):
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(photos)
    found = load_folder(photos, 0)
    assert tuple(theirs.classes) == found.classes
    assert theirs.targets == found.data.labels.tolist()


def test_images_that_do_not_decode_are_skipped_and_named(photos):
    (photos / "bee" / "broken.png").write_bytes(b"not a picture")
    found = load_folder(photos, 8)
    assert [(os.path.basename(path), bool(reason)) for path, reason in found.skipped] == [
        ("broken.png", True)
    ]
    assert found.data.images.shape == (24, 3, 8, 8)


def test_sizes_that_differ_need_an_image_size(photos):
    save_folder(pictures(3, size=20), photos.parent / "more", CLASSES)
    (photos.parent / "more" / "ant" / "00000.png").rename(photos / "ant" / "larger.png")
    with pytest.raises(DataError, match="16, 20 pixels; give .* image_size"):
        load_folder(photos, 0)
    assert load_folder(photos, 16).data.images.shape[-1] == 16


def test_folders_that_cannot_be_used_are_named(photos, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere", 0)
    with pytest.raises(DataError, match="at least two class folders, found none"):
        load_folder(photos / "ant", 0)
    with pytest.raises(DataError, match="class folders bee, cat; expected some of ant, dog"):
        load_folder(photos, 0, ("ant", "dog"))
    assert load_folder(photos, 0, ("a", *CLASSES)).data.labels.unique().tolist() == [1, 2, 3]
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of its 24 images decodes .*00000.png"):
        load_folder(photos, 0)


def test_a_class_with_one_image_is_named_with_what_was_skipped(photos):
    for file in sorted((photos / "cat").iterdir())[1:]:
        file.write_bytes(b"no")
    with pytest.raises(
        DataError, match=r"fewer than 2 images in 1 of 3 classes: cat \(1\); 7 do not decode: "
    ):
        check_folder(load_folder(photos, 0))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_a_split_has_every_class_on_both_sides_and_shares_no_image(share):
    data = pictures()
    data = ImageSet(data.images, data.labels)
    data.images[:, 0, 0, 0] = torch.arange(24)  # names the image
    clean, held = split(data, share, seed=3)
    names = [set(part.images[:, 0, 0, 0].tolist()) for part in (clean, held)]
    assert names[0] | names[1] == set(range(24)) and not names[0] & names[1]
    assert set(clean.labels.tolist()) == set(held.labels.tolist()) == {0, 1, 2}
    assert torch.equal(split(data, share, seed=3)[1].images, held.images)


@pytest.mark.parametrize("share", [0, 1, -0.2, float("nan")])
def test_a_share_outside_0_and_1_is_refused(share):
    with pytest.raises(DataError, match="held_out is"):
        split(pictures(), share)


# ------------------------------------------------------------------------------------------------------------
# Reading and building


def test_a_normalised_model_gives_what_the_model_gives_on_normalised_images(tmp_path):
    path = checkpoint(tmp_path)
    plain = load_model(path, TINY, 3, 16).model
    x = torch.rand(4, 3, 16, 16)
    for text, mean, std in (
        ("0.1,0.2,0.3/0.5,0.6,0.7", [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),
        ("0.5/0.25", [0.5], [0.25]),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ):
        mean, std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        model = load_model(path, TINY, 3, 16, text).model
        assert torch.allclose(model(x), plain((x - mean) / std), atol=1e-6)


@pytest.mark.parametrize("text", ["0.5", "0.5/0", "a/b", "1,2/1,2", "0.5/0.5/0.5", "nan/1"])
def test_a_normalisation_of_another_form_is_refused(text):
    with pytest.raises(ModelError, match="normalize is .*expected mean/std"):
        parse_normalize(text)


def test_options_reach_the_architecture():
    narrow = build("small_vgg?width=0.25", 5)
    assert narrow.features[0].out_channels == 8 and narrow.classifier.out_features == 5
    vit = "torchvision.models:VisionTransformer?image_size=32&patch_size=16&num_layers=1&num_heads=2"
    model = build(vit + "&hidden_dim=8&mlp_dim=8", 4)
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize(
    "architecture, message",
    [
        ("vgg", "small_vgg, preact_resnet18"),
        ("torchvision:resnet19", "no classifier 'resnet19'; valid: alexnet, .*resnet18"),
        ("no_such_module:Net", "cannot import no_such_module:Net .*PYTHONPATH"),
        ("torch:NoSuchNet", "cannot import torch:NoSuchNet .module 'torch' has no"),
        ("fractions:Fraction?numerator=3", "gave a Fraction; expected a torch.nn.Module"),
        ("small_vgg?width", "option 'width' should be name=value"),
        ("small_vgg?depth=3", "cannot be built .*depth"),
        ("small_vgg?width=-1", "cannot be built .*width is -1"),
    ],
)
def test_an_architecture_that_does_not_exist_is_refused(architecture, message):
    with pytest.raises(ModelError, match=message):
        build(architecture, 3)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"net": Evil()}, protocol=2))
    zipped = tmp_path / "evil2.pth"
    torch.save({"net": Evil()}, zipped)
    for file in (path, zipped):
        with pytest.raises(ModelError, match=f"{file.name}: refused|{file.name}: not a readable"):
            load_model(file, TINY, 3, 16)
    assert not (tmp_path / "was-run").exists()


def test_a_whole_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ModelError, match="refused, because reading it would need more than plain tensors"):
        load_model(tmp_path / "whole.pth", TINY, 3, 16)


def test_keys_that_are_missing_or_strange_are_listed(tmp_path):
    path = checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)
    state["body.weight"] = state.pop("head.weight")
    torch.save(state, path)
    with pytest.raises(ModelError, match="missing: head.weight; unexpected: body.weight"):
        load_model(path, TINY, 3, 16)


def test_another_number_of_classes_is_told_in_those_words(tmp_path):
    path = checkpoint(tmp_path, num_classes=7)
    with pytest.raises(ModelError, match="has 7 classes, but there are 3 class folders"):
        load_model(path, TINY, 3, 16)


def test_an_output_of_another_shape_is_refused(tmp_path):
    torch.save(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "maps.pth")
    with pytest.raises(ModelError, match=r"output for 2 images is \(2, 3, 16, 16\); expected \(2, 3\)"):
        load_model(tmp_path / "maps.pth", "torch.nn:Conv2d?in_channels=3&out_channels=3&kernel_size=1", 3, 16)


def test_a_model_that_fails_on_such_images_says_so(tmp_path):
    name = "torchvision.models:VisionTransformer?image_size=32&patch_size=16&num_layers=1&num_heads=2"
    name += "&hidden_dim=8&mlp_dim=8"
    torch.save(build(name, 3).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ModelError, match="fails on images of 16x16 .*Wrong image height"):
        load_model(tmp_path / "vit.pth", name, 3, 16)


# ------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("wrapper", [None, "net", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pth_is_written_as_it_was_read(tmp_path, wrapper, prefix, dtype):
    path = checkpoint(tmp_path, wrapper, prefix, dtype)
    given = load_model(path, TINY, 3, 16, "0.5/0.5")
    changed = copy.deepcopy(given.model)
    with torch.no_grad():
        changed.model.head.bias += 1
    saved = given.save(changed, tmp_path / "model.cleaned.pth")

    old, new = (torch.load(p, weights_only=True) for p in (path, saved))
    assert list(old) == list(new) and (wrapper is None or new["epoch"] == 7)
    old, new = (content[wrapper] if wrapper else content for content in (old, new))
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
    differs = [key for key in old if not torch.equal(old[key], new[key])]
    assert differs == [prefix + "head.bias"]
    again = load_model(saved, TINY, 3, 16, "0.5/0.5").model
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(again(x), changed(x), atol=1e-2)


def test_safetensors_stay_safetensors_with_their_metadata(tmp_path):
    path = checkpoint(tmp_path, suffix=".safetensors", prefix="module.", dtype=torch.bfloat16)
    given = load_model(path, TINY, 3, 16)
    saved = given.save(given.model, out_path(path))
    assert saved.name == "model.cleaned.safetensors"
    assert checkpoints.read_metadata(saved) == {"format": "pt", "note": "kept"}
    with safe_open(path, "pt") as old, safe_open(saved, "pt") as new:
        assert set(old.keys()) == set(new.keys())
        assert all(torch.equal(old.get_tensor(k), new.get_tensor(k)) for k in old.keys())  # noqa: SIM118


def test_a_checkpoint_without_counters_is_written_without_them(tmp_path):
    path = checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)
    del state["norm.num_batches_tracked"]
    torch.save(state, path)
    given = load_model(path, TINY, 3, 16)
    saved = given.save(given.model, tmp_path / "out.pth")
    assert list(torch.load(saved, weights_only=True)) == list(state)


def test_a_state_dict_keeps_the_versions_torch_notes_in_it(tmp_path):
    torch.save(Tiny().state_dict(), tmp_path / "model.pth")
    given = load_model(tmp_path / "model.pth", TINY, 3, 16)
    old, new = (
        torch.load(p, weights_only=True)
        for p in (given.path, given.save(given.model, tmp_path / "cleaned.pth"))
    )
    assert type(old) is type(new) and old._metadata == new._metadata != {}
    Tiny().load_state_dict(new)


def test_the_original_is_never_overwritten(tmp_path):
    path = checkpoint(tmp_path)
    os.link(path, tmp_path / "hard.pth")
    (tmp_path / "soft.pth").symlink_to(path)
    for out in (path, tmp_path / "." / "model.pth", tmp_path / "hard.pth", tmp_path / "soft.pth"):
        with pytest.raises(ModelError, match="would overwrite the model that was given"):
            out_path(path, out)
    given = load_model(path, TINY, 3, 16)
    with pytest.raises(ModelError, match="would overwrite"):
        given.save(given.model, path)


def test_an_out_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    path = checkpoint(tmp_path)
    with pytest.raises(ModelError, match="should end in '.pth'"):
        out_path(path, tmp_path / "out.safetensors")
    with pytest.raises(ModelError, match="its folder does not exist"):
        out_path(path, tmp_path / "nowhere" / "out.pth")
    with pytest.raises(ModelError, match="no such checkpoint file"):
        out_path(tmp_path / "none.pth")
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match="no room to write it; it takes .* bytes, 10 are free"):
        out_path(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = checkpoint(tmp_path, suffix=suffix)
    given = load_model(path, TINY, 3, 16)
    out = tmp_path / f"out{suffix}"
    out.write_bytes(b"the old one")
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(ModelError, match="cannot be written .*nothing was saved"):
            given.save(given.model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(tmp_path.iterdir()) == before
    assert out.read_bytes() == b"the old one"


def test_a_run_killed_while_saving_leaves_the_old_file_or_the_new(tmp_path):
    """It saves two models in turns, without end; whenever it is killed, the file is one of the two."""
    path = checkpoint(tmp_path)
    script = tmp_path / "saves.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, torch
        from ibau.own_model.load import load_model
        given = load_model({str(path)!r}, "small_vgg?width=0.5", 3, 32)
        for value in [1.0, 2.0] * 10**6:
            with torch.no_grad():
                for p in given.model.parameters():
                    p.fill_(value)
            given.save(given.model, {str(tmp_path / "out.pth")!r})
            if value == 2.0:
                print("saved", flush=True)
        """)
    )
    torch.save(build("small_vgg?width=0.5", 3).state_dict(), path)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # both were saved at least once
        time.sleep(0.05)
        process.kill()
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    values = {state[key].unique().item() for key in state if key.endswith("weight")}
    assert values in ({1.0}, {2.0})


def test_a_file_system_without_room_is_one_sentence(tmp_path, monkeypatch):
    path = checkpoint(tmp_path)
    given = load_model(path, TINY, 3, 16)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ModelError, match="No space left on device"):
        given.save(given.model, tmp_path / "out.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


# ------------------------------------------------------------------------------------------------------------
# Networks that are not ours


ALGORITHMS = {
    "I-BAU": lambda *given: unlearn(*given, IBAUSettings(**LITTLE)),
    "I-BAU+": lambda *given: clean(*given, CleanSettings(**LITTLE, recovery_steps=2)),
    "I-BAU+ with the implicit term": lambda *given: clean(
        *given, CleanSettings(**LITTLE, recovery_steps=0, K=2)
    ),
}


@pytest.mark.parametrize("remove", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize(
    "architecture, size",
    [
        ("torchvision:mobilenet_v3_small", 32),  # hardswish, squeeze and excite, working in place
        ("torchvision:resnet18", 32),
        (
            "torchvision.models:VisionTransformer?image_size=32&patch_size=16&num_layers=2&num_heads=2"
            "&hidden_dim=16&mlp_dim=16",
            32,
        ),
        (TINY, 16),
    ],
    ids=["mobilenet", "resnet", "transformer", "tiny"],
)
def test_networks_from_outside_are_cleaned_and_load_where_they_came_from(
    tmp_path, architecture, size, remove
):
    torch.manual_seed(0)
    theirs = build(architecture, 3)
    for weight in theirs.parameters():  # torchvision's transformer has a head of zeros, which stops gradients
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    data = pictures(30, size)
    given = load_model(tmp_path / "model.pth", architecture, 3, size, "imagenet")
    result = remove(given.model, data.images, data.labels)
    saved = given.save(result.model, tmp_path / "cleaned.pth")
    before = copy.deepcopy(theirs.state_dict())
    theirs.load_state_dict(torch.load(saved, weights_only=True))
    after = theirs.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before), "nothing was learnt"
    assert all(value.isfinite().all() for value in after.values())
    again = Normalised(theirs.eval(), *parse_normalize("imagenet"))
    x = data.images[:4] / 255
    assert torch.allclose(again(x), result.model(x), atol=1e-4)


@pytest.mark.parametrize("field", ["settings", "measured"])
def test_the_recorded_runs_on_real_networks_are_readable(root, field):
    paths = sorted((root / "figures" / "data" / "foreign").glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        if field == "settings":
            assert CleanSettings(**record["settings"]["cleaning"]).search in path.stem + "alternating"
        else:
            rates = [record["measured"][when]["acc"] for when in ("before", "after")]
            assert [Rate.read(rate).value for rate in rates] == [rate["value"] for rate in rates]


# ------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_has_the_notebook_s_parameters(root):
    from ibau.reproduce import find_notebooks

    (notebook,) = [n for n in find_notebooks() if n.name == "13_clean_your_model"]
    assert set(cli.CLEAN) <= set(notebook.defaults)
    left_out = set(notebook.defaults) - set(cli.CLEAN)
    assert left_out == {"profile", "dataset", "data_dir", "search_steps", "search_images"}


def test_a_call_that_cannot_work_ends_with_one_sentence_and_nothing_written(tmp_path, photos, capsys):
    path = checkpoint(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    call = ["clean", "--architecture", "torchvision:resnet18", "--clean-dir", str(photos)]
    assert cli.main([*call, "--checkpoint", str(tmp_path / "none.pth")]) == 2
    assert cli.main([*call, "--checkpoint", str(path), "--out", str(path)]) == 2
    assert cli.main([*call, "--checkpoint", str(path), "--rounds", "many"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("ibau: ") for line in said)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_notebook_refuses_is_one_sentence_too(tmp_path, photos, capsys):
    path = checkpoint(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    call = ["clean", "--checkpoint", str(path), "--architecture", "torchvision:resnet18"]
    assert cli.main([*call, "--clean-dir", str(photos)]) == 2
    assert cli.main([*call, "--clean-dir", str(photos), "--radius", "-1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "does not fit ResNet; missing: conv1.weight" in said[0]
    assert "radius is -1 and rounds 0; they must be positive" in said[1]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_leaves_the_model_a_page_and_its_figures(tmp_path, capsys):
    data = pictures(30, 32)
    save_folder(data, tmp_path / "photos", CLASSES)
    save_folder(pictures(9, 32, seed=1), tmp_path / "triggered", CLASSES)
    (tmp_path / "photos" / "bee" / "broken.png").write_bytes(b"no picture")
    path = tmp_path / "model.pth"
    torch.save({"net": build("small_vgg?width=0.1", 3).state_dict()}, path)
    original = path.read_bytes()
    call = ["clean", "--checkpoint", str(path), "--architecture", "small_vgg?width=0.1", "--rounds", "1"]
    call += ["--clean-dir", str(tmp_path / "photos"), "--triggered-dir", str(tmp_path / "triggered")]
    assert cli.main([*call, "--target", "cat"]) == 0
    assert "model.cleaned.pth" in capsys.readouterr().out
    assert path.read_bytes() == original
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
        "model.pth",
        "model.cleaned.pth",
        "model.cleaned.ipynb",
        "model.cleaned.html",
        "model.cleaned.json",
    }
    load_model(tmp_path / "model.cleaned.pth", "small_vgg?width=0.1", 3, 32)
    page = (tmp_path / "model.cleaned.html").read_text()
    assert "skipped bee/broken.png" in page and "target: cat" in page
    record = json.loads((tmp_path / "model.cleaned.json").read_text())
    assert record["settings"]["skipped_images"] == 1 and record["settings"]["cleaning"]["rounds"] == 1
    assert record["before"]["asr"]["n"] == 6 and len(record["after"]["norms"]) == 3
