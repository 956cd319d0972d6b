"""Warnings before global operators allocate much memory."""

import warnings

from halodet.mixers import BoTNetMixer, LesaMixer, memory

import pytest
import torch


@pytest.fixture(autouse=True)
def no_earlier_warnings(monkeypatch):
    monkeypatch.setattr(memory, "_warned", set())


@pytest.mark.parametrize(
    ("mixer", "text"),
    [
        (LesaMixer(8, 6, num_heads=2, binary="global"), "lesa.*482.8 GiB.*Fix: "),
        (BoTNetMixer(8, 6, num_heads=2, table_size=(8, 8), backend="unfold"), "botnet.*181.0 GiB.*Fix: "),
        (BoTNetMixer(8, 6, num_heads=2, table_size=(8, 8)), "botnet.*120.7 GiB.*Fix: "),
    ],
    ids=["lesa", "botnet, unfold", "botnet"],
)
def test_warns_before_allocating(mixer, text):
    """The warning is an error here, which keeps the mixer from allocating the memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=text):
            mixer(torch.zeros(1, 8, 300, 300))


def test_warns_once_for_each_power_of_two():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for gib in (1, 1.5, 1.6, 2.1, 1.5):
            memory.warn_memory("mixer", int(gib * 2**30))
    assert ["1.5 GiB" in str(w.message) for w in caught] == [True, False]
