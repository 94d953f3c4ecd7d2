"""A round of I-BAU keeps numbers of its outer steps, not their hypergradients, each twice the network."""

import gc
import weakref

import torch

from ibau.networks import models
from ibau.unlearning import ibau


def test_a_round_does_not_keep_the_hypergradients_of_its_steps(monkeypatch):
    taken, alive, step = [], [], ibau.outer_step

    def recorded(*arguments):
        found = step(*arguments)
        taken.append(weakref.ref(found))
        gc.collect()
        alive.append(sum(h() is not None for h in taken))
        return found

    monkeypatch.setattr(ibau, "outer_step", recorded)
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = ibau.IBAUSettings(rounds=2, outer_steps=5, K=1, inner_steps=2, inner_images=5, held_out=0.0)
    found = ibau.unlearn(models.build("small_vgg", 10, width=0.125), images, torch.arange(20) % 10, settings)
    assert len(taken) == 10
    assert max(alive) <= 2  # the step's own, and the one before it, until its name is given away
    gc.collect()
    assert not any(h() is not None for h in taken)  # nor does what is returned refer to any
    assert len(found.history) == 2
