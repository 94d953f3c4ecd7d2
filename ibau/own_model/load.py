"""A model from outside: read it, and save the cleaned one so that it loads where the old one did.

    folder = load_folder("photos/", image_size=224)  # from ibau.data
    given = load_model("model.pth", "torchvision:resnet18", len(folder.classes), 224, normalize="imagenet")
    result = ibau.clean(given.model, folder.data.images, folder.data.labels)
    given.save(result.model, "model.cleaned.pth")

Nothing in a checkpoint is ever executed. A `module:callable` is: it is the user's own code.
"""

import ast
import copy
import inspect
import os
import pkgutil
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ibau.data.files import whole_file
from ibau.data.folders import Folder
from ibau.data.images import DataError, ImageSet, some
from ibau.networks import checkpoints, models
from ibau.networks.checkpoints import ModelError

NORMALIZE = {"imagenet": "0.485,0.456,0.406/0.229,0.224,0.225"}


class Normalised(nn.Module):
    """A model of normalised input as a model of images in [0, 1]: (x - mean) / std is its first layer."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


@dataclass(frozen=True, eq=False)
class Given:
    """A model that was given, ready to be cleaned, and the file it came from.

    model    takes images in [0, 1]; in eval mode, on the CPU
    content  what the file holds, as it stands; the state dict lies under `wrapper`, or is all of it (None)
    """

    model: nn.Module
    path: Path
    content: dict
    wrapper: str | None

    def save(self, model: nn.Module, path: str | Path) -> Path:
        """Write `model`, a cleaned copy of `self.model`, so that it loads where the old file did.

        Same format, keys, wrapping and dtypes; whatever else the file held is kept as it was. The file
        appears whole or not at all. Raises ModelError where it cannot be written, or would overwrite the
        file the model came from.
        """
        path = out_path(self.path, path)
        cleaned = (model.model if isinstance(model, Normalised) else model).state_dict()
        old = self.content if self.wrapper is None else self.content[self.wrapper]
        state = copy.copy(old)  # keeps the kind of dict, and the versions torch notes in it
        for key, value in old.items():
            state[key] = cleaned[checkpoints.bare(key)].to("cpu", value.dtype, copy=True).contiguous()
        content = state if self.wrapper is None else {**self.content, self.wrapper: state}
        try:
            with whole_file(path, like=self.path) as temporary:
                if path.suffix == ".safetensors":
                    save_file(content, temporary, checkpoints.read_metadata(self.path) or None)
                else:
                    torch.save(content, temporary)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises each of the three
            raise ModelError(f"{path}: cannot be written ({_first_line(error)}); nothing was saved") from None
        return path


def load_model(
    checkpoint: str | Path, architecture: str, num_classes: int, image_size: int, normalize: str = ""
) -> Given:
    """Build `architecture` for `num_classes` classes and fill it with the weights in `checkpoint`.

    architecture  as `build` takes it
    image_size    height and width of the images it is to classify, tried on two of them
    normalize     as `parse_normalize` takes it

    Raises ModelError for a checkpoint that cannot be read or does not fit, an unknown architecture, and a
    model that does not map such images to (N, num_classes).
    """
    normal = parse_normalize(normalize)
    content = checkpoints.read(checkpoint)
    state, wrapper = checkpoints.unwrap(content, checkpoint)
    model = build(architecture, num_classes)
    _check_classes(state, model.state_dict(), num_classes, checkpoint)
    checkpoints.fill(model, state, checkpoint)
    if normal:
        model = Normalised(model, *normal)
    model.eval().requires_grad_(True)
    _check_output(model, architecture, num_classes, image_size)
    return Given(model, Path(checkpoint), content, wrapper)


def build(architecture: str, num_classes: int) -> nn.Module:
    """A model by its name: one of ours, `torchvision:<name>`, or `module:callable`.

    Options follow a question mark: `torchvision:vit_b_16?image_size=64`, `small_vgg?width=0.5`. A callable is
    given num_classes=... where it takes it. Raises ModelError for an unknown one, and wrong options.
    """
    name, _, query = architecture.partition("?")
    options = _options(architecture, query)
    kind, colon, rest = name.partition(":")
    try:
        if not colon:
            return models.build(name, num_classes, **options)
        if kind == "torchvision":
            return _torchvision(rest, num_classes, options)
        return _imported(kind, rest, num_classes, options)
    except ModelError:
        raise
    except Exception as error:  # whatever a constructor raises is about what it was given
        raise ModelError(
            f"architecture {architecture!r} cannot be built ({_first_line(error)}); "
            f"valid: {', '.join(models.MODELS)}, torchvision:<name>, module:callable"
        ) from error


def _options(architecture: str, query: str) -> dict:
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, text = part.partition("=")
        if not (key.isidentifier() and equals and text):
            raise ModelError(f"architecture {architecture!r}: option {part!r} should be name=value")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def _torchvision(name: str, num_classes: int, options: dict) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(f"torchvision has no classifier {name!r}; valid: {', '.join(known)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some warn that their random weights will change; they are replaced
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def _imported(module: str, name: str, num_classes: int, options: dict) -> nn.Module:
    try:
        make = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError) as error:
        reason = _first_line(error)
        raise ModelError(f"cannot import {module}:{name} ({reason}); put its folder on PYTHONPATH") from None
    takes = inspect.signature(make).parameters
    if "num_classes" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        options = {"num_classes": num_classes, **options}
    model = make(**options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{module}:{name} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def parse_normalize(text: str) -> tuple[Tensor, Tensor] | None:
    """(mean, std) from "0.485,0.456,0.406/0.229,0.224,0.225", "0.5/0.5" or "imagenet"; None from "".

    Raises ModelError for any other form, and a std that is not positive.
    """
    if not text:
        return None
    try:
        parts = NORMALIZE.get(text, text).split("/")
        mean, std = (torch.tensor([float(number) for number in part.split(",")]) for part in parts)
        if not (len(mean) in (1, 3) and len(std) in (1, 3) and (std > 0).all() and mean.isfinite().all()):
            raise ValueError
    except ValueError:
        raise ModelError(
            f"normalize is {text!r}; expected mean/std of the channels in [0, 1], such as "
            f"{NORMALIZE['imagenet']!r} or '0.5/0.5', or 'imagenet', or nothing"
        ) from None
    return mean, std


def _check_classes(state: dict, expected: dict, num_classes: int, path) -> None:
    """One clear sentence where all that differs is the number of classes."""
    shapes = [(state[key].shape, value.shape) for key, value in expected.items() if key in state]
    misfits = [(has, wanted) for has, wanted in shapes if has != wanted]
    found = {has[:1] for has, wanted in misfits if wanted[:1] == (num_classes,)}
    if len(found) == 1 and all(has and has[1:] == wanted[1:] for has, wanted in misfits):
        raise ModelError(
            f"{path}: has {found.pop()[0]} classes, but there are {num_classes} class folders; every class "
            "needs a folder, and their sorted order is that of the model's outputs"
        )


def _check_output(model: nn.Module, architecture: str, num_classes: int, image_size: int) -> None:
    try:
        with torch.no_grad():
            output = model(torch.rand(2, 3, image_size, image_size))
    except Exception as error:  # the model is not ours: it may fail in any way
        size = f"{image_size}x{image_size}"
        raise ModelError(f"{architecture} fails on images of {size} ({_first_line(error)})") from error
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != (2, num_classes):
        raise ModelError(f"{architecture}: the output for 2 images is {found}; expected (2, {num_classes})")


def out_path(checkpoint: str | Path, out: str | Path = "") -> Path:
    """Where the cleaned model goes: `out`, or <name>.cleaned<suffix> beside the checkpoint.

    Raises ModelError where that is the checkpoint itself, of another format, or has no room.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise ModelError(f"{checkpoint}: no such checkpoint file")
    path = Path(out) if str(out) else checkpoint.with_name(f"{checkpoint.stem}.cleaned{checkpoint.suffix}")
    if path.exists() and path.samefile(checkpoint):
        raise ModelError(f"{path}: would overwrite the model that was given; name another file as out")
    if path.suffix != checkpoint.suffix:
        raise ModelError(f"{path}: should end in {checkpoint.suffix!r}, the format of {checkpoint.name}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ModelError(f"{path}: its folder does not exist or is read-only; name another file as out")
    free, needed = shutil.disk_usage(path.parent).free, checkpoint.stat().st_size
    if free < needed:
        raise ModelError(f"{path}: no room to write it; it takes {needed:,} bytes, {free:,} are free")
    return path


def check_folder(folder: Folder) -> None:
    """Raise DataError where a class has fewer than two images: one to clean with, one to measure on."""
    counts = folder.data.labels.bincount(minlength=len(folder.classes))
    few = [f"{name} ({n})" for name, n in zip(folder.classes, counts.tolist(), strict=True) if n < 2]
    if few:
        skipped = [f"{path} ({reason})" for path, reason in folder.skipped]
        raise DataError(
            f"fewer than 2 images in {len(few)} of {len(folder.classes)} classes: {some(few)}; "
            f"{len(skipped)} do not decode: {some(skipped)}"
        )


def split(data: ImageSet, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """(clean, held out): `share` of each class is held out, at least one image, and at least one is not.

    Raises DataError for a share outside (0, 1). A class needs two images, see `check_folder`.
    """
    if not 0 < share < 1:
        raise DataError(f"held_out is {share}; it must lie in (0, 1)")
    random = torch.Generator().manual_seed(seed)
    clean, held = [], []
    for label in data.labels.unique():
        members = (data.labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=random)]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[:count])
        clean.append(members[count:])
    return data.take(torch.cat(clean)), data.take(torch.cat(held))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
