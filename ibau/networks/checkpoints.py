"""Weight files: written whole as safetensors, and read without running code they may hold."""

import json
import pickle
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ibau.data.files import whole_file
from ibau.data.images import some


class ModelError(Exception):
    """A checkpoint that cannot be used; the message says what was found and what was expected."""


def save(model: nn.Module, path: str | Path, settings: dict | None = None) -> Path:
    """Write the weights as safetensors, whole or not at all, with `settings` in the metadata as JSON."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"settings": json.dumps(settings or {}, sort_keys=True)})
    return Path(path)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors: safetensors, or a foreign `.pth`/`.pt` of plain tensors, see `read`.

    One level of wrapping is taken off, `{"net": ...}`, `{"state_dict": ...}` or `{"model": ...}`, and so is
    DataParallel's `module.`. Raises ModelError for a missing or damaged file, and one that holds more.
    """
    return unwrap(read(path), path)[0]


def read(path: str | Path) -> dict:
    """A checkpoint's content as it stands in the file.

    A pickle is only ever read with `weights_only=True`, so it cannot run code.

    Raises ModelError for a missing or damaged file, and for a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in torch's reader in as many ways as there are damages
        reason = str(error)
        found = next((line.strip() for line in reason.splitlines() if "unsupported" in line.lower()), None)
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ModelError(
                f"{path}: refused, because reading it would need more than plain tensors "
                f"({found.split('. Please use')[0]}). "
                "Expected: a state dict saved with torch.save(model.state_dict(), path), or safetensors."
            ) from None
        raise ModelError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def unwrap(content: object, path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in a checkpoint's content, with `bare` keys, and the key it lies under.

    That is None where the content itself is the state dict. `path` is for the message of a ModelError.
    """
    found = content if isinstance(content, dict) else {}
    wrapper = next((key for key in ("net", "state_dict", "model") if isinstance(found.get(key), dict)), None)
    state = content if wrapper is None else found[wrapper]
    if not isinstance(state, dict) or not state:
        raise ModelError(f"{path}: holds a {type(state).__name__}, expected a dict of named tensors")
    foreign = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ModelError(
            f"{path}: entries that are not tensors: {some(foreign)}; expected a state dict, bare or under "
            "'net', 'state_dict' or 'model'"
        )
    return {bare(key): value for key, value in state.items()}, wrapper


def bare(key: object) -> str:
    """A checkpoint's key as the model names it: without DataParallel's `module.`."""
    return str(key).removeprefix("module.")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors file's metadata."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill `model` with the weights at `path`, see `load_state` and `fill`, and return it in eval mode."""
    return fill(model, load_state(path), path)


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> nn.Module:
    """Fill `model` with `state`, which came from `path`, and return it in eval mode.

    Raises ModelError, listing them, where keys or shapes do not match; the model is then unchanged.
    """
    expected = model.state_dict()
    # A Norm's counter is bookkeeping that older checkpoints and other tools leave out.
    misfits = {
        "missing": [k for k in expected if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in expected],
        "wrong shape": [
            f"{k} is {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}"
            for k in expected
            if k in state and state[k].shape != expected[k].shape
        ],
    }
    problems = "; ".join(f"{what}: {some(keys)}" for what, keys in misfits.items() if keys)
    if problems:
        raise ModelError(f"{path}: does not fit {type(model).__name__}; {problems}")
    model.load_state_dict(state, strict=False)
    return model.eval()
