"""Activation checkpointing: the same outputs, gradients and statistics as the plain network, in less memory."""

import copy

from halodet.backbones import TimmBackbone
from halodet.models import HaloNet
from halodet.models.act_checkpoint import run_blocks

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

ALL = ("res2", "res3", "res4", "res5")


def pass_through(net, x):
    """Return outputs, gradients and buffers after two training passes."""
    torch.manual_seed(3)
    for _ in range(2):
        maps = net(x)
        sum((m * m.detach().sign()).mean() for m in maps.values()).backward()
    return maps, {n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())


def halonet(stages, norm="BN"):
    torch.manual_seed(0)
    net = HaloNet("H0", norm=norm, drop_path_rate=0.5, use_act_checkpoint=stages)
    for module in net.modules():
        if isinstance(
            module, nn.BatchNorm2d | nn.SyncBatchNorm
        ):  # fresh blocks end in zeros, which would hide their insides
            nn.init.uniform_(module.weight, 0.2, 0.6)
    return net.train()


def sync_bn_halonet(stages):
    return halonet(stages, "SyncBN")


def timm_network(stages):
    pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return TimmBackbone("halonet26t", norm="BN", drop_path_rate=0.5, use_act_checkpoint=stages).train()


@pytest.mark.parametrize("make", [halonet, sync_bn_halonet, timm_network])
def test_outputs_gradients_and_statistics_equal_the_plain_network(make):
    x = torch.randn(2, 3, 65, 96)
    plain, saving = pass_through(make(()), x), pass_through(make(ALL), x)
    for what, other in zip(plain, saving, strict=True):
        assert what.keys() == other.keys() and what
        for name, value in what.items():
            assert torch.equal(value, other[name]), name
    counts = [value for name, value in saving[2].items() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 2 for count in counts)


def test_named_stages_save_fewer_activations():
    x = torch.randn(2, 3, 64, 64)

    def kept(stages):
        net, size = halonet(stages), 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x)
        return size

    plain, one, all_stages = kept(()), kept(("res2",)), kept(ALL)
    assert all_stages < one < plain and all_stages < 0.3 * plain


def test_naive_sync_batch_norm_counts_a_batch_once(monkeypatch):
    # with one process it is an ordinary batch norm; this is its own arithmetic
    monkeypatch.setattr("detectron2.layers.batch_norm.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.layers.batch_norm.dist.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.layers.batch_norm.differentiable_all_reduce", lambda tensor: 2 * tensor)
    torch.manual_seed(0)
    stage = nn.Sequential(NaiveSyncBatchNorm(3), NaiveSyncBatchNorm(3)).train()
    saving, x = copy.deepcopy(stage), 1 + torch.randn(2, 3, 4, 4)
    for net, recompute in ((stage, False), (saving, True)):
        ((run_blocks(net, x) if recompute else net(x)) ** 3).sum().backward()
    assert not torch.equal(stage[0].running_mean, torch.zeros(3))
    for (name, value), other in zip(stage.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(stage[0].weight.grad, saving[0].weight.grad)


def test_evaluation_is_unchanged():
    net = halonet(ALL).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert all(torch.equal(a, b) for a, b in zip(net(x).values(), halonet(()).eval()(x).values(), strict=True))


@pytest.mark.parametrize("stages", ["res2", ["res2", "stem"]])
def test_unknown_stages_raise(stages):
    with pytest.raises(ValueError, match="use_act_checkpoint"):
        HaloNet("H0", use_act_checkpoint=stages)
