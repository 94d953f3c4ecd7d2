"""How long one training epoch of SmallVGG takes, and what each measure buys: `make bench-training`.

Every variant trains on the same random images, in turn and repeatedly, so that a busy machine slows all of
them alike. Writes `figures/data/training_speed.csv`.
"""

import time
from contextlib import nullcontext

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ibau.networks.models import Dropout, SmallVGG
from ibau.study.experiment import default_device
from ibau.study.records import figures_dir, provenance

VARIANTS = {  # name: channels-last, bfloat16, our dropout masks
    "float32": (False, False, False),
    "channels-last": (True, False, False),
    "bfloat16": (False, True, False),
    "both": (True, True, False),
    "both, byte-wise dropout": (True, True, True),
}


def stepper(channels_last: bool, bfloat16: bool, fast_dropout: bool, batch_size: int = 128):
    """A function that takes one training step."""
    device = default_device()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = SmallVGG(10)
    if not fast_dropout:
        for index, layer in enumerate(model.features):
            if isinstance(layer, Dropout):
                model.features[index] = nn.Dropout(layer.p)
    model.to(device, memory_format=layout)
    images = torch.rand(batch_size, 3, 32, 32, device=device).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch_size,), device=device)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext():
            logits = model(images)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main(rounds: int = 5, steps: int = 10, epoch_steps: int = 391) -> None:
    """Print and write seconds per epoch of 50,000 images, median and range over the rounds."""
    timed = {name: [] for name in VARIANTS}
    steppers = {name: stepper(*flags) for name, flags in VARIANTS.items()}
    for step in steppers.values():
        step()
    for _ in range(rounds):
        for name, step in steppers.items():
            started = time.perf_counter()
            for _ in range(steps):
                step()
            timed[name].append((time.perf_counter() - started) / steps * epoch_steps)
    table = pd.DataFrame(timed).agg(["median", "min", "max"]).T.round(1)
    table["speed-up"] = (table["median"].iloc[0] / table["median"]).round(2)
    table.insert(0, "n", rounds)
    print(table.to_string())
    about = provenance()
    for name in ("device", "threads", "torch", "commit", "date"):
        table[name] = about[name]
    table.to_csv(figures_dir() / "data" / "training_speed.csv", index_label="variant")


if __name__ == "__main__":
    main()
