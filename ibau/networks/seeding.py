"""Random numbers from a seed that leave the caller's generators alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's random numbers, on every device, come from `seed`; then all generators are as before.

    `torch.manual_seed` within `torch.random.fork_rng` would not do: the one seeds every accelerator, which
    the other does not restore. An accelerator that this process has not used yet is not started for it.
    """
    generators = [(torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed)]
    for name, device in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if device.is_initialized() or torch.get_default_device().type == name:
            generators.append((device.get_rng_state_all, device.set_rng_state_all, device.manual_seed_all))
    if torch.backends.mps.is_available():
        generators.append((torch.mps.get_rng_state, torch.mps.set_rng_state, torch.mps.manual_seed))
    before = [get_state() for get_state, _, _ in generators]
    try:
        for _, _, set_seed in generators:
            set_seed(int(seed))
        yield
    finally:
        for (_, set_state, _), state in zip(generators, before, strict=True):
            set_state(state)
