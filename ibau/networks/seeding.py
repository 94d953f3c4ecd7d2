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
    accelerators = [
        getattr(torch, name)
        for name in ("cuda", "xpu")
        if getattr(torch, name).is_initialized() or torch.get_default_device().type == name
    ]
    apple = torch.backends.mps.is_available()
    state = torch.get_rng_state()
    states = [accelerator.get_rng_state_all() for accelerator in accelerators]
    apples = torch.mps.get_rng_state() if apple else None
    try:
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed without the accelerators
        for accelerator in accelerators:
            accelerator.manual_seed_all(seed)
        if apple:
            torch.mps.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
        for accelerator, before in zip(accelerators, states, strict=True):
            accelerator.set_rng_state_all(before)
        if apple:
            torch.mps.set_rng_state(apples)
