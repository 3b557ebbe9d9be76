# SPDX-License-Identifier: MIT
"""Tests of balcon.py against independent oracles: plain loops in float64, closed forms, torchvision.

    pytest                  # eight minutes on two cores, no network, no data
    pytest -m faults -s     # a campaign of faults on real runs, 20 minutes; prints what it did
    python test_balcon.py benchmark --dataset cifar10       # where the time of a training step goes
    python test_balcon.py page                              # RESULTS.md's tables, from its raw lines
"""
import collections
import contextlib
import copy
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import balcon
from balcon import balanced_contrastive_loss, generalized_nt_xent_loss, loss_floor, nscl_loss

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """A shell's background job ignores it, and so would all that these tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def unit(m, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(m, d, dtype=torch.float64, generator=g), dim=1) for _ in range(2)]


# ------------------------------------------ losses ---------------------------------------------
def similarity_of(a, b, kind):
    if kind == "cosine":
        return float(a @ b / (a.norm() * b.norm()))
    return float(a @ b) if kind == "dot" else -float(((a - b) ** 2).sum())


def loss_by_loops(z1, z2, alpha, lam, kind="cosine", positive_in=False, labels=None):
    """Eq. 17 read aloud: for each of the 2m anchors, its positive and the list of what it repels."""
    views = [(i, z) for z_ in (z1, z2) for i, z in enumerate(z_)]
    total = 0.0
    for a, (i, z) in enumerate(views):
        repelled = []
        for b, (j, other) in enumerate(views):
            if b == a:
                continue
            s = similarity_of(z, other, kind)
            if i == j:
                positive = s
            if (positive_in if i == j else labels is None or labels[i] != labels[j]):
                repelled.append(alpha * s)
        top = max(repelled)
        log_sum = top + math.log(sum(math.exp(v - top) for v in repelled))
        total += -positive + lam / alpha * log_sum
    return total / len(views)


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("alpha, lam", [(1, 1), (2, 4), (8, 0.5)])
def test_losses_are_their_equations(kind, alpha, lam):
    g = torch.Generator().manual_seed(1)
    z1, z2 = torch.randn(2, 7, 5, dtype=torch.float64, generator=g)
    labels = [0, 1, 2, 0, 1, 0, 2]
    for loss, oracle in (
            (balanced_contrastive_loss(z1, z2, alpha, lam, kind), loss_by_loops(z1, z2, alpha, lam, kind)),
            (generalized_nt_xent_loss(z1, z2, alpha, lam, kind), loss_by_loops(z1, z2, alpha, lam, kind, True)),
            (nscl_loss(z1, z2, torch.tensor(labels), alpha, lam, kind),
             loss_by_loops(z1, z2, alpha, lam, kind, labels=labels))):
        assert loss.item() == pytest.approx(oracle, rel=1e-10)


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("block", [1, 30, 196])  # one row, two rows, all 14
def test_losses_in_blocks(kind, block):
    z = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()

    def loss(z, **more):
        return balanced_contrastive_loss(*z, 3, 2, kind, block=block, **more)
    labels = [0, 1, 2, 0, 1, 0, 2]
    assert loss(z).item() == pytest.approx(loss_by_loops(*z.detach(), 3, 2, kind), rel=1e-10)
    assert loss(z, labels=torch.tensor(labels)).item() == pytest.approx(
        loss_by_loops(*z.detach(), 3, 2, kind, labels=labels), rel=1e-10)
    assert torch.autograd.gradcheck(loss, z)


def test_relation_to_eq_14_and_15_and_cross_entropy():
    z1, z2 = unit(6, 4)
    alpha, s = 3.0, lambda a, b: float(a @ b)
    eq15 = eq14_both_views = 0.0
    for u, v in ((z1, z2), (z2, z1)):
        for i in range(6):
            cross = [math.exp(alpha * s(u[i], v[j])) for j in range(6)]
            within = [math.exp(alpha * s(u[i], u[j])) for j in range(6) if j != i]
            eq15 -= math.log(cross[i] / (sum(cross) + sum(within))) / 12
            eq14_both_views -= math.log(cross[i] / (sum(cross) - cross[i] + sum(within))) / 12
    assert alpha * generalized_nt_xent_loss(z1, z2, alpha, 1.0).item() == pytest.approx(eq15)
    assert alpha * balanced_contrastive_loss(z1, z2, alpha, 1.0).item() == pytest.approx(eq14_both_views)  # DCL
    z = torch.cat([z1, z2])  # SimCLR's own form: cross-entropy over the other 2m − 1 views
    logits = (alpha * z @ z.T).fill_diagonal_(-math.inf)
    target = torch.arange(12).roll(6)
    assert F.cross_entropy(logits, target).item() == pytest.approx(eq15)


def test_to_second_order_only_the_product_counts():
    """What `one_dial` says of the repelling term: what is left over shrinks as α², the mean aside at one αλ."""
    z1, z2 = unit(16, 6)
    z, left = [*z1, *z2], []
    negatives = np.array([[float(u @ v) for j, v in enumerate(z) if j % 16 != i % 16] for i, u in enumerate(z)])
    positive, K = np.mean([float(u @ v) for u, v in zip(z1, z2)]), 30
    mean, variance = negatives.mean(), negatives.var(axis=1).mean()
    for alpha in (0.001, 0.002, 0.004):
        lam = 0.1 / alpha
        second = -positive + lam / alpha * math.log(K) + lam * mean + alpha * lam / 2 * variance
        left.append(balanced_contrastive_loss(z1, z2, alpha, lam).item() - second)
    assert left[1] / left[0] == pytest.approx(2, rel=.05) == left[2] / left[1]  # α²λ, and αλ is constant
    assert abs(left[2]) < 0.02 * alpha * lam / 2 * variance


def simplex(m):
    """m unit vectors whose pairwise similarity is −1/(m−1)."""
    return F.normalize(torch.eye(m, dtype=torch.float64) - 1 / m, dim=1)


@pytest.mark.parametrize("m", [2, 5, 16])
@pytest.mark.parametrize("alpha, lam", [(1, 1), (4, 2), (8, 8), (0.5, 0.3)])
def test_loss_floor_and_ceiling(m, alpha, lam):
    floor, K = loss_floor(m, alpha, lam), 2 * (m - 1)
    assert floor == pytest.approx(-1 - lam / (m - 1) + lam / alpha * math.log(K))  # (a)
    z = simplex(m)
    assert balanced_contrastive_loss(z, z, alpha, lam).item() == pytest.approx(floor)  # attained
    same = torch.ones(m, 3, dtype=torch.float64)  # (e) collapse
    assert balanced_contrastive_loss(same, same, alpha, lam).item() == pytest.approx(
        -1 + lam + lam / alpha * math.log(K))
    assert generalized_nt_xent_loss(same, same, alpha, lam).item() == pytest.approx(
        -1 + lam + lam / alpha * math.log(K + 1))
    for seed in range(30):
        z1, z2 = unit(m, 3, seed)
        loss = balanced_contrastive_loss(z1, z2, alpha, lam).item()
        P = (z1 * z2).sum(1).mean().item()
        assert floor - 1e-9 <= -P + lam * (math.log(K) / alpha - (1 + P) / K) - 1e-9 <= loss
        assert loss <= 1 + lam + lam / alpha * math.log(K)
        included = generalized_nt_xent_loss(z1, z2, alpha, lam).item()
        assert included >= loss_floor(m, alpha, lam, repel_positive=True) - 1e-9


def test_floor_with_the_positive_repelled():
    for m, alpha in ((4, 2.0), (256, 1.0), (256, 8.0)):  # (b) λ = 1, attained by the same simplex
        expected = math.log1p(2 * (m - 1) * math.exp(-alpha * m / (m - 1))) / alpha
        assert loss_floor(m, alpha, 1.0, repel_positive=True) == pytest.approx(expected)
        z = simplex(m)
        assert generalized_nt_xent_loss(z, z, alpha, 1.0).item() == pytest.approx(expected)
    for m, alpha, lam, best in ((256, 10, 2, .62), (512, 8, 2, .86), (256, 4, 2, 1.0)):  # (c), by search
        K, P = 2 * (m - 1), np.linspace(-1, 1, 200001)
        bound = -P + lam / alpha * np.logaddexp(alpha * P, np.log(K) - alpha * (1 + P) / K)
        assert loss_floor(m, alpha, lam, repel_positive=True) == pytest.approx(bound.min(), abs=1e-9)
        assert P[bound.argmin()] == pytest.approx(best, abs=.01)
        assert balcon.best_positive_similarity(m, alpha, lam) == pytest.approx(P[bound.argmin()], abs=1e-4)


def test_repelling_term_is_a_smooth_maximum():  # Lemma A.1, (d) and Eq. 18
    z1, z2 = unit(8, 4)
    z = torch.cat([z1, z2])
    s = [[float(z[i] @ z[j]) for j in range(16) if j % 8 != i % 8] for i in range(16)]
    hardest, mean = np.mean([max(row) for row in s]), np.mean(s)
    attract, spread, previous = -(z1 * z2).sum(1).mean().item(), math.log(14), -math.inf
    for alpha in (0.01, 0.1, 1.0, 5.0, 50.0, 5000.0):
        repel = balanced_contrastive_loss(z1, z2, alpha, 1.0).item() - attract
        assert hardest <= repel <= hardest + spread / alpha
        assert mean <= repel - spread / alpha + 1e-9 and previous <= repel - spread / alpha + 1e-9
        previous = repel - spread / alpha
    assert balanced_contrastive_loss(z1, z2, 1e7, 2.0).item() == pytest.approx(attract + 2 * hardest, abs=1e-6)


def test_nscl_gap():  # (f), and zero when every image has its own class
    for seed in range(20):
        z1, z2 = unit(12, 4, seed)
        labels, alpha, lam = torch.arange(12) % 3, 2.0, 1.5
        gap = (balanced_contrastive_loss(z1, z2, alpha, lam) - nscl_loss(z1, z2, labels, alpha, lam)).item()
        assert 0 <= gap <= lam / alpha * math.log(1 + (4 - 1) * math.exp(2 * alpha) / (12 - 4))
        alone = nscl_loss(z1, z2, torch.arange(12), alpha, lam)
        assert torch.equal(alone, balanced_contrastive_loss(z1, z2, alpha, lam))


@pytest.mark.parametrize("positive_in", [False, True])
def test_gradients_are_the_closed_form(positive_in):  # (g): −1 + λp⁺ on the positive, λp on negatives
    m, alpha, lam = 5, 3.0, 2.0
    g = torch.Generator().manual_seed(3)
    z1, z2 = (torch.randn(m, 4, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
    loss = generalized_nt_xent_loss if positive_in else balanced_contrastive_loss
    got = torch.cat(torch.autograd.grad(loss(z1, z2, alpha, lam, "dot"), (z1, z2)))
    z = torch.cat([z1, z2]).detach()
    pull = torch.zeros(2 * m, 2 * m, dtype=torch.float64)  # d loss of anchor i / d s_ij
    for i in range(2 * m):
        twin = (i + m) % (2 * m)
        repelled = [j for j in range(2 * m) if j != i and (positive_in or j != twin)]
        pull[i, repelled] = lam * torch.softmax(alpha * z[repelled] @ z[i], 0)
        pull[i, twin] -= 1
        assert pull[i].sum().item() == pytest.approx(lam - 1)
    assert torch.allclose(got, (pull + pull.T) @ z / (2 * m))
    # (h) the difference is a softplus, so the included form is never smaller
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, alpha, lam, "cosine"), (z1, z2))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, alpha, lam, "euclidean"), (z1, z2))


def test_what_including_the_positive_adds():  # (h)
    z1, z2 = unit(4, 3)
    alpha, lam, added = 2.0, 3.0, 0.0
    z = torch.cat([z1, z2])
    for i in range(8):
        negatives = [float(z[i] @ z[j]) for j in range(8) if j % 4 != i % 4]
        log_sum = math.log(sum(math.exp(alpha * s) for s in negatives))
        added += lam / alpha * math.log1p(math.exp(alpha * float(z[i] @ z[(i + 4) % 8]) - log_sum)) / 8
    difference = generalized_nt_xent_loss(z1, z2, alpha, lam) - balanced_contrastive_loss(z1, z2, alpha, lam)
    assert difference.item() == pytest.approx(added)


@pytest.mark.parametrize("loss", [balanced_contrastive_loss, generalized_nt_xent_loss])
def test_invariances(loss):
    z1, z2 = unit(9, 6)
    value, order = loss(z1, z2, 4, 2), torch.randperm(9)
    scale = torch.rand(9, 1, dtype=torch.float64) * 100 + 0.01
    for same in (loss(z2, z1, 4, 2), loss(z1[order], z2[order], 4, 2), loss(scale * z1, z2 / scale, 4, 2)):
        assert same.item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
def test_no_overflow(kind, dtype):
    g = torch.Generator().manual_seed(0)
    z1, z2 = ((1e3 * F.normalize(torch.randn(8, 16, generator=g), dim=1)).to(dtype) for _ in range(2))
    z1.requires_grad_()
    for loss in (balanced_contrastive_loss, generalized_nt_xent_loss):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(z1, z2, 8, 2, kind)
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite() and z1.grad.isfinite().all()
        oracle = loss_by_loops(z1.detach().double(), z2.double(), 8, 2, kind, loss is generalized_nt_xent_loss)
        assert value.item() == pytest.approx(oracle, rel=1e-5)


def test_loss_refuses_nonsense():
    z = torch.randn(4, 3)
    for arguments in ((z, z[:3], 1, 1), (z[:1], z[:1], 1, 1), (z[0], z[0], 1, 1), (z, z, 0, 1), (z, z, math.nan, 1),
                      (z, z, 1, -1), (z, z, 1, math.nan), (z, z, 1, 1, "manhattan")):
        with pytest.raises(ValueError):
            balanced_contrastive_loss(*arguments)
    with pytest.raises(ValueError, match="class"):
        nscl_loss(z, z, torch.zeros(4, dtype=torch.long), 1, 1)


@pytest.mark.parametrize("loss", [balanced_contrastive_loss, generalized_nt_xent_loss])
def test_losses_in_other_hands(loss):
    z = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(3))  # [view, batch, m, d]
    z1, z2 = z[:, 0]
    expected = loss(z1, z2, 4, 2)
    assert loss(z1.T.contiguous().T, z.permute(3, 2, 1, 0)[:, :, 0, 1].T, 4, 2) == expected  # any strides
    both, one = ([z1.clone().requires_grad_(), z2.clone().requires_grad_(second)] for second in (True, False))
    loss(*both, 4, 2).backward()
    loss(*one, 4, 2).backward()
    assert torch.equal(both[0].grad, one[0].grad) and one[1].grad is None
    for dtype in (torch.bfloat16, torch.float16):  # of half precision only the inputs are
        rounded = [x.to(dtype) for x in (z1, z2)]
        assert loss(*rounded, 4, 2) == loss(*(x.float() for x in rounded), 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(z1, z2, 4, 2) == expected
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    again = [x.clone().requires_grad_() for x in (z1, z2)]
    compiled(*again, 4, 2).backward()
    assert torch.allclose(compiled(z1, z2, 4, 2), expected) and torch.allclose(again[1].grad, both[1].grad, atol=1e-6)
    many = torch.vmap(lambda a, b: loss(a, b, 4, 2))(*z)
    assert torch.allclose(many, torch.stack([loss(*pair, 4, 2) for pair in z.transpose(0, 1)]))
    assert loss(z1, z2, torch.ones(1), torch.ones(1)).shape == () and loss(z1, z2, 1, 1).dtype == z1.dtype
    learned = torch.tensor(4.0, requires_grad=True)  # α may be a parameter, as CLIP's temperature
    loss(z1, z2, learned, 2).backward()
    h, (up, down) = 1e-3, (float(loss(z1.double(), z2.double(), 4 + e, 2)) for e in (1e-3, -1e-3))
    assert learned.grad.item() == pytest.approx((up - down) / (2 * h), rel=1e-3)


def test_losses_can_be_copied_out():
    names = {"math": math, "torch": torch, "F": F, "dist": dist}
    exec(inspect.getsource(balanced_contrastive_loss), names)
    z1, z2 = unit(5, 3)
    assert torch.equal(names["balanced_contrastive_loss"](z1, z2, 2, 4), balanced_contrastive_loss(z1, z2, 2, 4))
    for function in (generalized_nt_xent_loss, nscl_loss):
        exec(inspect.getsource(function), names)
    labels = torch.tensor([0, 1, 0, 1, 1])
    assert torch.equal(names["nscl_loss"](z1, z2, labels, 2, 4), nscl_loss(z1, z2, labels, 2, 4))
    assert torch.equal(names["generalized_nt_xent_loss"](z1, z2, 2, 4), generalized_nt_xent_loss(z1, z2, 2, 4))


def _losses_on_a_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    x, labels = torch.randn(2, 12, 6, dtype=torch.float64), torch.arange(12) % 5
    results = {}
    for kind in ("cosine", "dot", "euclidean"):
        for name in ("balanced_contrastive_loss", "generalized_nt_xent_loss", "nscl_loss"):
            torch.manual_seed(1)
            net = torch.nn.Linear(6, 4).double()
            if world > 1:
                net = torch.nn.parallel.DistributedDataParallel(net)
            z1, z2 = net(torch.cat([x[0, rank::world], x[1, rank::world]])).chunk(2)
            extra = (labels[rank::world],) if name == "nscl_loss" else ()
            loss = getattr(balcon, name)(z1, z2, *extra, 4.0, 2.0, kind)
            loss.backward()
            loss = loss.detach().clone()
            dist.all_reduce(loss)
            results[kind, name] = [loss / world] + [p.grad.clone() for p in net.parameters()]
        net.zero_grad()  # in blocks of similarities: the gradients of the last of these losses again
        z1, z2 = net(torch.cat([x[0, rank::world], x[1, rank::world]])).chunk(2)
        balanced_contrastive_loss(z1, z2, 4.0, 2.0, kind, labels=labels[rank::world], block=50).backward()
        results[kind, "blocks"] = [p.grad for p in net.parameters()]
        assert all(torch.allclose(a, b) for a, b in zip(results[kind, "blocks"], results[kind, "nscl_loss"][1:]))
    torch.manual_seed(2)  # the CPU's synchronised batch norm, against PyTorch's on the whole batch
    x, target = torch.randn(2, 12, 3, 4, 4, dtype=torch.float64)
    norm = balcon.BatchNorm(3).double()
    own = x[rank::world].clone().requires_grad_()
    ((norm(own) - target[rank::world]) ** 2).sum().backward()
    results["batch norm"] = [*balcon.gather(own.grad), norm.running_mean, norm.running_var]
    torch.save(results, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def spawn(function, world, folder):
    torch.multiprocessing.spawn(function, (world, str(folder)), nprocs=world)
    (folder / "store").unlink(missing_ok=True)
    return [torch.load(folder / f"{world}-{r}.pt") for r in range(world)]


def test_one_and_two_processes_agree(tmp_path):  # (j): losses and the gradients DDP averages
    (one,), two = spawn(_losses_on_a_rank, 1, tmp_path), spawn(_losses_on_a_rank, 2, tmp_path)
    for key in one:
        for r in range(2) if key != "batch norm" else ():
            for a, b in zip(one[key], two[r][key]):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), key
    grad, mean, var = one["batch norm"]
    torch.manual_seed(2)
    x, target = torch.randn(2, 12, 3, 4, 4, dtype=torch.float64)
    x.requires_grad_()
    norm = torch.nn.BatchNorm2d(3).double()
    ((norm(x) - target) ** 2).sum().backward()
    for a, b in zip(two[0]["batch norm"], (x.grad[0::2], x.grad[1::2], norm.running_mean, norm.running_var)):
        assert torch.allclose(a, b)


# ------------------------------------------ views ----------------------------------------------
@pytest.fixture
def images():
    return torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def test_crop_resize_is_torchvisions(images):
    boxes = torch.tensor([[0, 0, 20, 24], [3, 5, 9, 7], [1, 0, 1, 1], [0, 10, 20, 3], [7, 7, 13, 17], [2, 2, 16, 16]])
    for size in (5, 16, 32):  # shrinking and growing
        got = balcon.crop_resize(images, boxes, size)
        for x, y, box in zip(images, got, boxes.tolist()):
            assert torch.allclose(y, TF.resized_crop(x, *box, [size, size], antialias=True), atol=1e-5)


OPS = {  # part -> (its parameter for one image, torchvision's result)
    "brightness": ([1.3, 1, 1, 0], lambda x: TF.adjust_brightness(x, 1.3)),
    "contrast": ([1, 0.6, 1, 0], lambda x: TF.adjust_contrast(x, 0.6)),
    "saturation": ([1, 1, 1.4, 0], lambda x: TF.adjust_saturation(x, 1.4)),
    "hue": ([1, 1, 1, -0.1], lambda x: TF.adjust_hue(x, -0.1)),
}


@pytest.mark.parametrize("name", OPS)
def test_color_operations_are_torchvisions(name, images):
    factors, oracle = OPS[name]
    order = [-1, -1, -1, -1]
    order[2] = list(OPS).index(name)  # only this one, third in turn
    t = torch.tensor([factors, order])[None].expand(6, 2, 4).float()
    images[0] = 0.5  # grey: hue is undefined there
    images[1, 0] = images[1, 1]  # ties between channels
    got = balcon.color_jitter(images.clone(), t)
    assert torch.allclose(got, torch.stack([oracle(x) for x in images]), atol=1e-5)


def test_color_jitter_keeps_each_images_own_order(images):
    tv = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    t = balcon.Views(("color_jitter",), 8, (1, 1)).draw(6, torch.Generator().manual_seed(1))["color_jitter"]
    got = balcon.color_jitter(images.clone(), t)
    for x, y, (factor, order) in zip(images, got, t):
        for kind in order.long().tolist():
            x = tv[kind](x, factor[kind].item()) if kind >= 0 else x
        assert torch.allclose(y, x, atol=1e-5)
    assert {tuple(o) for o in t[:, 1].tolist() if o[0] >= 0} != {(0, 1, 2, 3)}


def test_other_operations_are_torchvisions(images):
    square = images[..., :20]
    chosen = torch.tensor([True, False] * 3)
    for op, oracle in ((balcon.OPERATIONS["flip"], TF.horizontal_flip),
                       (balcon.OPERATIONS["grayscale"], lambda x: TF.rgb_to_grayscale(x, num_output_channels=3))):
        got = op(images.clone(), chosen)
        assert all(torch.allclose(y, oracle(x) if c else x, atol=1e-5) for x, y, c in zip(images, got, chosen))
    sigma = torch.tensor([0.0, 0.1, 0.7, 1.3, 2.0, 2.0])
    got = balcon.OPERATIONS["gaussian_blur"](square.clone(), sigma)
    assert torch.equal(got[0], square[0])
    for x, y, s in zip(square[1:], got[1:], sigma[1:].tolist()):
        assert torch.allclose(y, TF.gaussian_blur(x, [23, 23], [s, s]), atol=1e-5)
    turns = torch.tensor([0, 1, 2, 3, 1, 0])
    got = balcon.random_rotation(square.clone(), turns)
    assert all(torch.allclose(y, TF.rotate(x, 90.0 * k), atol=1e-5) for x, y, k in zip(square, got, turns.tolist()))
    centre = torch.tensor([[0.5, 0.5], [-1, -1], [0.0, 0.99], [0.99, 0.0], [0.33, 0.72], [0.72, 0.33]])
    mean = torch.tensor(balcon.MEAN)[:, None, None]
    for x, y, (a, b) in zip(square, balcon.OPERATIONS["random_cutout"](square.clone(), centre), centre.tolist()):
        top, left = int(a * 20) - 5, int(b * 20) - 5
        i, j, i2, j2 = max(top, 0), max(left, 0), min(top + 10, 20), min(left + 10, 20)
        assert torch.allclose(y, TF.erase(x, i, j, i2 - i, j2 - j, mean) if a >= 0 else x)
    noise = 0.1 * torch.randn(square.shape, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    got = balcon.OPERATIONS["gaussian_noise"](square, noise)
    assert torch.allclose(got, TF.gaussian_noise(square, sigma=0.1), atol=1e-5)
    assert torch.allclose(balcon.normalize(images), TF.normalize(images, balcon.MEAN, balcon.STD), atol=1e-5)


def test_no_part_of_the_views_asks_what_the_device_has_computed():
    # tensors on "meta" have shapes and no values: what would have to wait for a GPU's values fails there
    views = balcon.Views(ALL_PARTS, 32, (0.08, 1))
    t = views.draw(8, balcon.rng(0))
    assert views.apply(torch.zeros(8, 3, 40, 40, dtype=torch.uint8, device="meta"), t).shape == (8, 3, 32, 32)
    with pytest.raises(NotImplementedError):
        torch.zeros(8, device="meta").nonzero()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_views_and_losses_never_wait_for_the_gpu():
    data = balcon.InMemory(torch.zeros(8, 3, 40, 40, dtype=torch.uint8), torch.zeros(8), [], torch.device("cuda"))
    batches = data.batches(((step, torch.arange(8)) for step in itertools.count()),
                           balcon.Views(ALL_PARTS, 32, (0.08, 1)), n=2)
    next(batches)  # the first time, libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        z1, z2 = next(batches)[0].flatten(1).requires_grad_().chunk(2)
        for loss in balcon.LOSSES.values():
            loss(z1, z2, 2, 4).backward(retain_graph=True)
        balanced_contrastive_loss(z1, z2, 2, 4, block=40).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("height, width", [(32, 32), (40, 300), (300, 41), (1, 1)])
def test_crop_box_follows_random_resized_crop(height, width):
    t = balcon.Views(("crop",), 8, (0.08, 1)).draw(500, torch.Generator().manual_seed(2))["crop"]
    fallbacks = 0
    for candidates, box in zip(t.tolist(), balcon.crop_box(t, height, width).tolist()):
        for area, ratio, top, left in candidates:  # RandomResizedCrop.get_params
            w, h = round(math.sqrt(area * height * width * ratio)), round(math.sqrt(area * height * width / ratio))
            if 0 < w <= width and 0 < h <= height:
                expected = [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
                break
        else:
            fallbacks += 1
            w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            expected = [(height - h) // 2, (width - w) // 2, h, w]
        assert box == pytest.approx(expected, abs=1 if height * width > 1e4 else 0)  # float32 near .5
    assert fallbacks > 0 or height == width


def test_draws_have_the_papers_distribution():
    n = 20000
    views = balcon.Views(("crop", "flip", "color_jitter", "grayscale", "gaussian_blur"), 8, (0.2, 1))
    t = views.draw(n, torch.Generator().manual_seed(0))
    assert list(t) == list(views.parts)
    area, ratio = t["crop"][..., 0], t["crop"][..., 1]
    assert 0.2 <= area.min() and area.max() <= 1 and abs(area.mean() - 0.6) < 0.01
    assert 0.75 <= ratio.min() and ratio.max() <= 4 / 3 + 1e-6 and abs(ratio.log().mean()) < 0.01
    factor, order = t["color_jitter"].unbind(1)
    assert factor[:, :3].min() >= 0.6 and factor[:, :3].max() <= 1.4 and factor[:, 3].abs().max() <= 0.1
    assert abs((order[:, 0] >= 0).float().mean() - 0.8) < 0.02
    counts = np.unique(order[order[:, 0] >= 0].numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 500  # 667 expected of each order
    assert abs(t["grayscale"].float().mean() - 0.2) < 0.02 and abs(t["flip"].float().mean() - 0.5) < 0.02
    sigma = t["gaussian_blur"]
    assert abs((sigma > 0).float().mean() - 0.5) < 0.02 and sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2


ALL_PARTS = ("crop", "flip", "color_jitter", "grayscale", *balcon.ADDABLE)


def test_same_t_on_other_images_and_in_other_batches():
    views, x = balcon.Views(ALL_PARTS, 16, (0.2, 1)), torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    t = views.draw(5, torch.Generator().manual_seed(0))
    y = views.apply(x, t)
    assert y.shape == (5, 3, 16, 16) and torch.equal(y, views.apply(x, t)) and y.isfinite().all()
    alone = [views.apply(x[i:i + 1], {part: value[i:i + 1] for part, value in t.items()}) for i in range(5)]
    assert torch.allclose(torch.cat(alone), y, atol=1e-5)
    assert not torch.allclose(views.apply(x.roll(1, 0), t).roll(-1, 0), y)  # each t is its own


@pytest.fixture
def photos(tmp_path):
    """Class folders of small pictures of several sizes and modes."""
    g = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for name in ("Katze", "犬", "ptak"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                small = g.integers(0, 256, (3, 4, 3) if i else (3, 4), dtype=np.uint8)  # the first one is greyscale
                picture = Image.fromarray(small).resize((40 - 2 * i, 20 + 3 * i), Image.Resampling.BICUBIC)
                picture.save(folder / f"{i}.{['jpg', 'png', 'webp'][i % 3]}")
    return tmp_path


def test_every_world_size_sees_the_same_views(monkeypatch, photos):
    paths, labels, classes = balcon.class_folders(photos, "train")
    memory = balcon.InMemory(torch.randint(0, 256, (18, 3, 8, 8), dtype=torch.uint8), labels, classes, CPU)
    disk = balcon.OnDisk(paths, labels, classes, CPU, 8, workers=0)
    views, order = balcon.Views(ALL_PARTS, 8, (0.2, 1)), [(7, torch.randperm(18)[:9]), (8, torch.arange(2))]
    for data in (memory, disk):
        whole = [(x.unflatten(0, (2, -1)), y) for x, y in data.batches(order, views, 2, ("key",), shared=True)]
        for world in (2, 4):
            shares = []
            for r in range(world):
                monkeypatch.setattr(balcon, "rank", lambda: r)
                monkeypatch.setattr(balcon, "world_size", lambda: world)
                shares.append(list(data.batches(order, views, 2, ("key",), shared=True)))
            for i, (x, y) in enumerate(whole):
                for r, (own, label) in enumerate(share[i] for share in shares):
                    rows = range(r, len(y), world) if r < len(y) else [0]  # [0]: nothing left, repeats
                    assert torch.allclose(own.unflatten(0, (2, -1)), x[:, rows], atol=1e-5)
                    assert torch.equal(label, y[rows])
            monkeypatch.undo()


# ------------------------------------------ data and model -------------------------------------
def test_images_on_disk(photos):
    paths, labels, classes = balcon.class_folders(photos, "train")
    assert classes == sorted(["Katze", "犬", "ptak"]) and labels.bincount().tolist() == [6, 6, 6]
    data = balcon.OnDisk(paths, labels, classes, CPU, 16, workers=2)
    (x, y), = data.batches([(0, torch.arange(18))])
    assert torch.equal(y, labels) and x.shape == (18, 3, 16, 16)
    for path, got in zip(paths, x):  # CenterCrop of 0.875 of the shorter side, resized once
        image = balcon.read_image(path)
        oracle = TF.resize(TF.center_crop(image, round(0.875 * min(image.size))), [16, 16])
        oracle = TF.to_dtype(TF.to_image(oracle), torch.float32, scale=True)
        assert torch.allclose(got, TF.normalize(oracle, balcon.MEAN, balcon.STD), atol=1e-5)


def test_batches_on_disk_are_a_function_of_the_step(photos, tmp_path):
    paths, labels, classes = balcon.class_folders(photos, "train")
    views = balcon.Views(ALL_PARTS, 16, (0.2, 1))

    def batches(workers, first=0):  # the workers are several steps ahead
        data = balcon.OnDisk(paths, labels, classes, CPU, 16, workers)
        order = ((step, torch.randperm(18, generator=balcon.rng(max(step, 1)))[:4]) for step in range(first, 7))
        return [x for x, _ in data.batches(order, views, 2, ("k",), shared=True)]

    alone, ahead, resumed = batches(0), batches(2), batches(2, first=3)
    assert len(alone) == 7 and all(map(torch.equal, alone, ahead)) and all(map(torch.equal, alone[3:], resumed))
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    square.save(tmp_path / "square.png")
    data = balcon.OnDisk([str(tmp_path / "square.png")] * 9, torch.zeros(9), ["a"], CPU, 16, 0)
    for part in ALL_PARTS[1:]:  # a crop of all of a square image is that image: only `part` differs between steps
        a, b = (x for x, _ in data.batches([(step, torch.arange(9)) for step in (0, 1)],
                                           balcon.Views(("crop", part), 16, (1, 1)), 2, ("k",)))
        assert not torch.equal(a, b), part
    a, b = (x for x, _ in data.batches([(step, torch.arange(9)) for step in (0, 1)],
                                       balcon.Views(("crop",), 16, (1, 1)), 2, ("k",)))
    assert torch.equal(a, b)


def test_crops_on_disk_are_the_crops_in_memory(photos):
    paths, labels, classes = balcon.class_folders(photos, "train")
    views = balcon.Views(("crop",), 16, (0.2, 1))
    (x, _), = balcon.OnDisk(paths, labels, classes, CPU, 16, 0).batches([(3, torch.tensor([4]))], views, 2, ("k",))
    t = views.draw(2, balcon.rng("k", 3, 4))
    pixels = torch.from_numpy(np.array(balcon.read_image(paths[4]))).permute(2, 0, 1)
    oracle = views.apply(pixels.expand(2, -1, -1, -1), t)
    assert (x - oracle).abs().max() < 0.02 / 0.22  # Pillow rounds to 8 bits twice


def test_limit_is_balanced_and_fixed():
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 4)
    rows = balcon.balanced_subset(labels, 30, "key")
    assert labels[rows].bincount().tolist() == [13, 13, 4]
    assert torch.equal(rows, balcon.balanced_subset(labels, 30, "key"))
    with pytest.raises(balcon.UserError, match="--limit 200"):
        balcon.balanced_subset(labels, 200, "key")


def test_patterns_are_fixed_and_balanced():
    x, y = balcon.draw_patterns(80, "train")
    again, other = balcon.draw_patterns(80, "train")[0], balcon.draw_patterns(80, "test")[0]
    assert x.shape == (80, 3, 32, 32) and x.dtype == torch.uint8 and y.bincount().tolist() == [10] * 8
    assert torch.equal(x, again) and not torch.equal(x, other)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backbone_fits_torchvision(name):
    net, width = balcon.build_backbone(name, "imagenet", 64)
    reference = torchvision.models.get_model(name, weights=None)
    missing, unexpected = reference.load_state_dict(net.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    reference.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(net.eval()(x), reference.eval()(x), atol=1e-5) and net(x).shape == (2, width)


def test_projectors_are_the_papers():
    def layers(recipe):
        r = balcon.RECIPES[recipe]
        net = balcon.Encoder(r["backbone"], r["stem"], r["projector"], r["size"])
        return net, [type(layer).__name__ + (f" {layer.in_features}→{layer.out_features}"
                                             if isinstance(layer, torch.nn.Linear) else "")
                     for layer in net.projector]
    net, projector = layers("cifar10")
    assert projector == ["Linear 512→2048", "BatchNorm", "ReLU", "Linear 2048→2048", "BatchNorm"]
    conv = net.backbone.conv1
    assert (conv.kernel_size, conv.stride, type(net.backbone.maxpool)) == ((3, 3), (1, 1), torch.nn.Identity)
    assert net.backbone.layer1(net.backbone.maxpool(net.backbone.conv1(torch.randn(1, 3, 32, 32)))).shape[-1] == 32
    linear = "Linear 2048→2048"
    assert layers("imagenet")[1] == [linear, "BatchNorm", "ReLU", linear, "BatchNorm", "ReLU", linear, "BatchNorm"]


# ------------------------------------------ evaluation -----------------------------------------
def knn_by_loops(bank, labels, queries, k):
    answers = []
    for q in queries:
        order = sorted(range(len(bank)), key=lambda i: -similarity_of(bank[i], q, "cosine"))[:k]
        votes = [int(labels[i]) for i in order]
        answers.append(min(votes, key=lambda c: (-votes.count(c), votes.index(c))))
    return answers


def probing(**more):
    return SimpleNamespace(**{**dict(out=Path("none"), save_every_minutes=10.0, probe_lr=5.0, probe_optimizer="sgd",
                                     seed=0, size=2), **more})


def _evaluation_on_a_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    g = torch.Generator().manual_seed(0)
    bank, queries, labels = torch.randn(41, 4, generator=g), torch.randn(30, 4, generator=g), torch.arange(41) % 5
    answers = [balcon.knn_predict(bank[rank::world], labels[rank::world], queries, k, split=True) for k in (1, 6, 41)]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten())
    for probe in ("crops", "cached"):  # batches of 9, 9 and 1: two of three ranks have nothing of the last
        cfg = probing(probe=probe, probe_batch=9, probe_epochs=4, k=3)
        answers += [balcon.linear_accuracy(net, blobs(19, 0), blobs(50, 1), cfg),
                    balcon.knn_accuracy(net, blobs(19, 0), blobs(50, 1), cfg)]
    torch.save(answers, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def test_knn_and_evaluation_on_three_processes(tmp_path):
    g = torch.Generator().manual_seed(0)
    bank, queries, labels = torch.randn(41, 4, generator=g), torch.randn(30, 4, generator=g), torch.arange(41) % 5
    split, (one,) = spawn(_evaluation_on_a_rank, 3, tmp_path), spawn(_evaluation_on_a_rank, 1, tmp_path)
    assert all(answers[3:] == one[3:] for answers in split) and all(30 < accuracy < 100 for accuracy in one[3:])
    for i, k in enumerate((1, 6, 41)):
        expected = knn_by_loops(bank.double(), labels, queries.double(), k)
        assert balcon.knn_predict(bank, labels, queries, k).tolist() == expected
        assert all(answers[i].tolist() == expected for answers in split)
    two_ties = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    assert balcon.knn_predict(two_ties, torch.tensor([3, 1, 1, 3]), torch.tensor([[1.0, 0.0]]), 4).tolist() == [3]
    with pytest.raises(ValueError):
        balcon.knn_predict(bank, labels, queries, 42)


def test_lars_against_its_formula():
    g = torch.Generator().manual_seed(0)
    w, b = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((3, 4), (3,)))
    optimizer = balcon.LARS([w, b], lr=0.7, weight_decay=0.1)
    mine, buffer = [w.detach().numpy().copy(), b.detach().numpy().copy()], [0.0, 0.0]
    for _ in range(5):
        x = torch.randn(8, 4, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        ((x @ w.T + b) ** 2).mean().backward()
        grads = [w.grad.numpy().copy() + 0.1 * mine[0], b.grad.numpy().copy()]
        grads[0] *= 0.001 * math.sqrt((mine[0] ** 2).sum()) / math.sqrt((grads[0] ** 2).sum())
        for i in range(2):
            buffer[i] = 0.9 * buffer[i] + grads[i]
            mine[i] = mine[i] - 0.7 * buffer[i]
        optimizer.step()
        assert np.allclose(w.detach(), mine[0]) and np.allclose(b.detach(), mine[1])


def blobs(n, seed, noise=60):
    """Two-pixel images in three noisy classes, which a linear classifier separates partly."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centre = torch.tensor([[90, 128, 128], [128, 90, 160], [160, 128, 90]])[labels]
    pixels = (centre[:, :, None, None] + noise * torch.randn(n, 3, 2, 2, generator=g)).clamp(0, 255).byte()
    return balcon.InMemory(pixels, labels, ["a", "b", "c"], CPU)


def test_linear_probe_is_softmax_regression():
    train, test = blobs(50, 0), blobs(60, 1)
    cfg = probing(probe="cached", probe_batch=16, probe_epochs=5, probe_lr=20.0, seed=3)
    got = balcon.linear_accuracy(torch.nn.Flatten(), train, test, cfg)

    def features(data):
        mean, std = np.array(balcon.MEAN)[:, None, None], np.array(balcon.STD)[:, None, None]
        x = ((data.pixels.numpy() / 255 - mean) / std).reshape(len(data.labels), -1)
        return x / np.sqrt((x ** 2).sum(1, keepdims=True))

    x, y = features(train), train.labels.numpy()
    w, b = 0.01 * torch.randn(3, 12, generator=balcon.rng(3, "probe")).double().numpy(), np.zeros(3)
    vw, vb, step, total, peak = 0, 0, 0, 5 * 4, 20 * 16 / 256
    for epoch in range(5):
        order = torch.randperm(50, generator=balcon.rng(3, "probe order", epoch)).numpy()
        for rows in (order[:16], order[16:32], order[32:48], order[48:]):
            p = np.exp(x[rows] @ w.T + b)
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(rows)), y[rows]] -= 1
            vw, vb = 0.9 * vw + p.T @ x[rows] / len(rows), 0.9 * vb + p.mean(0)
            lr = peak * (1 + math.cos(math.pi * step / total)) / 2
            w, b, step = w - lr * vw, b - lr * vb, step + 1
    expected = 100 * ((features(test) @ w.T + b).argmax(1) == test.labels.numpy()).mean()
    assert got == pytest.approx(expected) and 40 < got < 100


@pytest.mark.parametrize("probe, optimizer, enough", [
    ("crops", "sgd", 60), ("crops", "lars", 0), ("cached", "lars", 0)])
def test_probe_leaves_the_backbone_alone(probe, optimizer, enough):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cfg = probing(probe=probe, probe_batch=32, probe_epochs=20, probe_optimizer=optimizer)
    accuracy = balcon.linear_accuracy(net, blobs(90, 0, noise=20), blobs(30, 1, noise=20), cfg)
    assert accuracy > enough and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ------------------------------------------ command line, end to end ---------------------------
TINY = ("--limit 64 --batch-size 16 --epochs 2 --lr 0.1 --probe-epochs 3 --probe-lr 1").split()
MEASURED = ("knn", "linear", "untrained_knn", "untrained_linear")


def command(*flags, processes=1, restarts=0):
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        f"--max-restarts={restarts}"]
    return [*start, str(HERE / "balcon.py"), *map(str, flags)]


def cli(*flags, processes=1, **options):
    return subprocess.run(command(*flags, processes=processes), capture_output=True, text=True, timeout=600, **options)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def losses(folder):
    log = folder / "log.jsonl"
    lines = map(json.loads, log.read_text().splitlines() if log.exists() else [])
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def test_end_to_end_again_and_on_two_processes(tmp_path):
    done = cli(*TINY, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    header, found = balcon.read_log(tmp_path / "one" / "log.jsonl")[0], results(tmp_path / "one")
    assert header["argv"][1:] == [*TINY, "--out", str(tmp_path / "one")] and header["config"]["alpha"] == 4
    assert {"git", "versions", "hardware", "world_size"} <= set(header) and found["config"] == header["config"]
    assert all(0 <= found[name] <= 100 for name in MEASURED) and found["seconds"] > 0
    assert sorted(os.listdir(tmp_path / "one")) == [".lock", "last.pt", "log.jsonl", "previous.pt", "results.json"]
    assert re.search(r"untrained +\| trained", done.stdout) and f"{found['knn']:#.4g}" in done.stdout
    assert {at["epoch"]: at["loss"] for at in found["loss_over_epochs"]} == {
        step / 4: loss for step, loss in losses(tmp_path / "one").items()}

    before = {f.name: f.read_bytes() for f in (tmp_path / "one").iterdir()}
    again = cli(*TINY, "--out", tmp_path / "one")  # finished: not run again
    assert again.returncode == 0 and {f.name: f.read_bytes() for f in (tmp_path / "one").iterdir()} == before
    other = cli(*TINY, "--out", tmp_path / "one", "--alpha", "2")
    assert other.returncode == 2 and "alpha" in other.stderr and other.stderr.count("\n") == 1
    assert {f.name: f.read_bytes() for f in (tmp_path / "one").iterdir()} == before

    evaluated = cli("--checkpoint", tmp_path / "one" / "last.pt", "--out", tmp_path / "eval")
    assert evaluated.returncode == 0, evaluated.stderr
    assert results(tmp_path / "eval")["knn"] == found["knn"]
    assert results(tmp_path / "eval")["linear"] == found["linear"]

    two = cli(*TINY, "--out", tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "one").keys() == losses(tmp_path / "two").keys() == {4, 8}
    for name in ("untrained_knn", "untrained_linear"):  # two of 2,000 images may lie on a border
        assert results(tmp_path / "two")[name] == pytest.approx(found[name], abs=0.1)


def _steps_on_a_rank(rank, world, folder):
    """Twenty training steps of a small network in float64: in float32, batch norm amplifies rounding."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    cfg = balcon.parse_flags(["--limit", "64", "--epochs", "0", "--out", f"{folder}/none"])
    train, _ = balcon.load_data(cfg, CPU)
    torch.manual_seed(0)
    model = balcon.distribute(torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, 2), balcon.BatchNorm(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 5, 2),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64, 32), balcon.BatchNorm(32, affine=False),
    ).double(), CPU)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    order, curve = [(s, torch.randperm(64, generator=balcon.rng(s))[:16]) for s in range(20)], []
    for x, _ in train.batches(order, balcon.Views(cfg.parts, 32, cfg.crop_scale), 2, (0,), shared=True):
        loss = balanced_contrastive_loss(*model(x.double()).chunk(2), 4, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(torch.stack(balcon.gather(loss.detach())).mean())
    torch.save(torch.stack(curve), f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def test_training_is_the_same_on_one_two_and_four_processes(tmp_path):
    one, two, four = (spawn(_steps_on_a_rank, world, tmp_path)[0] for world in (1, 2, 4))
    assert torch.allclose(one, two, atol=1e-6) and torch.allclose(one, four, atol=1e-6)
    assert one.std() > 0.01  # and it moves


class Killed(Exception):
    pass


def train_here(out, kill_at=None, *more, asked=()):
    flags = [*TINY, "--epochs", "3", "--out", str(out), *more]
    cfg = balcon.parse_flags(flags)
    out.mkdir(exist_ok=True)
    train, _ = balcon.load_data(cfg, CPU)
    torch.manual_seed(cfg.seed)
    encoder = balcon.Encoder(cfg.backbone, cfg.stem, (32, 16), cfg.size)
    batches = train.batches

    def fragile(*arguments, **options):
        for i, batch in enumerate(batches(*arguments, **options)):
            if i == kill_at:
                raise Killed
            yield batch
    train.batches = fragile
    balcon.pretrain(encoder, train, cfg, asked)
    return encoder.state_dict()


def test_resumed_run_is_bit_identical(tmp_path):
    reference = train_here(tmp_path / "whole")  # 12 steps, 4 an epoch
    for kill_at, saved in ((3, None), (6, 4), (7, 10)):  # counted from the step it starts at
        with pytest.raises(Killed):
            train_here(tmp_path / "killed", kill_at, "--save-every-minutes", "1e-6")  # within epochs too
        last = tmp_path / "killed" / "last.pt"
        assert (torch.load(last)["step"] if last.exists() else None) == saved
    resumed = train_here(tmp_path / "killed")
    assert all(torch.equal(resumed[name], value) for name, value in reference.items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    log = balcon.read_log(tmp_path / "killed" / "log.jsonl")
    assert [line["resumed_at"] for line in log if "resumed_at" in line] == [0, 4, 10]


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    good = balcon.LOSSES["balanced"]
    calls = []

    def diverges(*arguments):
        calls.append(None)
        return good(*arguments) * (math.nan if len(calls) > 5 else 1)  # in the second epoch
    monkeypatch.setitem(balcon.LOSSES, "balanced", diverges)
    with pytest.raises(balcon.UserError, match="loss is nan at step 8: .*lower --lr"):
        train_here(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["backbone"].values())


BAD = {
    "--alpha 0": "alpha", "--alpha nan": "alpha", "--lam -1": "lam", "--epochs -1": "epochs", "--lr inf": "lr",
    "--alpha x": "alpha", "--loss triplet": "loss", "--similarity manhattan": "similarity",
    "--dataset mnist": "dataset",
    "--backbone resnet19": "resnet19", "--stem big": "stem", "--batch-size 1": "batch-size", "--limit 0": "limit",
    "--drop crop": "drop", "--add fog": "add", "--eval speed": "eval", "--limit 5000": "4096",
    "--limit 100 --batch-size 128": "--batch-size", "--out loop": "loop",
    "--backbone pixels": "--epochs 0", "--frobnicate": "frobnicate",
    "--dataset folder --data nowhere": "nowhere", "--dataset cifar10 --data empty": "empty",
    "--checkpoint missing.pt": "missing.pt", "--checkpoint README": "README", "--out README": "README",
    "--dataset cifar10 --drop gaussian_blur": "gaussian_blur",
    "--dataset imagenet --add gaussian_blur": "gaussian_blur",
    "--data flat": "--dataset", "--dataset imagenet --drop gaussian_blur --add gaussian_blur": "both",
    "--epochs 0 --save-every 2": "--save-every", "--subset lt --subset-file README": "--subset-file",
    "--limit 8 --subset-file README": "--subset-file",
    "--limit 8 --batch-size 16": "--limit 8", "--views 3": "odd", "--workers 1000": "workers",
    "--backbone pixels --epochs 0 --stem cifar --add fog": "fog", "--seed 99999999999999999999": "seed",
    "--dataset folder --data " + "x" * 300: "xxx", "--out " + "y" * 300: "too long",
    "--report flat": "results.json", "--report flat --alpha 2": "--report",
    "--dataset folder --data hollow": "cat", "--dataset folder --data flat": "class folder",
    "--dataset folder --data foreign": "class cat",
    "--dataset cifar10 --data mixed": "big.png",
    "--dataset folder --data broken --backbone resnet10 --batch-size 2 --epochs 1": "broken.png",
}


@pytest.fixture(scope="module")
def troubles(tmp_path_factory):
    root = tmp_path_factory.mktemp("troubles")
    (root / "README").write_text("no checkpoint")
    (root / "loop").symlink_to("nowhere")
    (root / "empty").mkdir()
    picture = Image.new("RGB", (32, 32), "red")
    (root / "flat" / "train").mkdir(parents=True)
    for place in ("hollow/train/dog", "hollow/train/cat", "hollow/val/dog", "foreign/train/cat", "foreign/val/dog",
                  "mixed/train/cat", "mixed/test/cat", "broken/train/cat", "broken/val/cat",
                  "broken/train/dog", "broken/val/dog"):
        (root / place).mkdir(parents=True)
        if place != "hollow/train/cat":
            picture.save(root / place / "a.png")
    Image.new("RGB", (40, 40)).save(root / "mixed/train/cat/big.png")
    for i in range(3):
        picture.save(root / f"broken/train/cat/{i}.png")
    (root / "broken/train/cat/broken.png").write_bytes((root / "broken/train/cat/a.png").read_bytes()[:60])
    return root


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, troubles, monkeypatch, capfd):
    monkeypatch.chdir(troubles)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: open("/no/network"))
    before = sorted(p for p in troubles.rglob("*") if "runs" not in p.parts)
    with pytest.raises(SystemExit) as stop:
        balcon.main(flags.split())
    message = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("balcon: ") and "\n" not in message
    assert BAD[flags] in message and "Traceback" not in message
    assert before == sorted(p for p in troubles.rglob("*") if "runs" not in p.parts)
    assert "broken" in flags or not (troubles / "runs").exists()  # nothing was begun


NUMERIC = re.findall(r'flag\("(--[\w-]+)", type=(whole|positive)', inspect.getsource(balcon.parse_flags))


@pytest.mark.parametrize("flag, kind", NUMERIC)
def test_numeric_flags_refuse_what_is_no_sensible_number(flag, kind, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    nonsense = ["nan", "inf", "-inf", "1e400", "-1", "-1e9", "", " ", "ten", "1,5", "0x10", "٣e", "1e9", "--", "1 2"]
    nonsense += ["2147483648", "0.5", "9" * 5000] if kind == "whole" else ["0", "-0.0", "1e-9", "9" * 400]
    for text in nonsense:
        with pytest.raises(SystemExit) as stop:
            balcon.main([flag, text])
        message = capfd.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and flag in message and "Traceback" not in message
    assert not list(tmp_path.iterdir())


def test_batch_size_must_divide(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stop:
        balcon.main(["--batch-size", "64"])
    assert stop.value.code == 2 and "--batch-size 64 does not divide by the 3 processes" in capfd.readouterr().err


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, capfd):
    cfg = balcon.parse_flags(["--out", str(tmp_path / "x")])
    backbone = balcon.Encoder("resnet10", "cifar", (8,), 32).backbone
    balcon.save_atomically(tmp_path / "other.pt", {"backbone": backbone.state_dict(), "config": balcon.public(cfg)})
    for flags in (["--backbone", "resnet18"], ["--alpha", "9"], []):  # named by a flag; found in the weights
        with pytest.raises(SystemExit) as stop:
            balcon.main(["--checkpoint", str(tmp_path / "other.pt"), "--out", str(tmp_path / "o"), *flags])
        assert stop.value.code == 2 and "other.pt" in capfd.readouterr().err and not (tmp_path / "o").exists()


# ------------------------------------------ faults ---------------------------------------------
def tensors(path):
    state = torch.load(path)
    momenta = state["optimizer"]["state"]
    return {**state["backbone"], **state["projector"], **{i: momenta[i]["momentum_buffer"] for i in momenta}}


def assert_same_run(a, b):
    """Bit-identical weights, momenta, losses and figures."""
    x, y = tensors(a / "last.pt"), tensors(b / "last.pt")
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert losses(a) == losses(b)
    x, y = ({k: v for k, v in results(run).items() if k not in ("seconds", "environment")} for run in (a, b))
    assert x == y


def wait_for(condition, run, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and run.poll() is None, run.communicate()
        time.sleep(0.02)


def children(pid):
    return [int(child) for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout.split()]


LONG = [*TINY, "--epochs", "8", "--eval", "knn", "--no-baseline"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of LONG that nothing interrupts, by their number of processes."""
    @functools.cache
    def run(processes):
        out = tmp_path_factory.mktemp("whole") / str(processes)
        done = cli(*LONG, "--out", out, processes=processes)
        assert done.returncode == 0, done.stderr
        return out
    return run


def test_sigkill_loses_nothing_and_a_second_process_is_refused(tmp_path, whole):
    run = subprocess.Popen(command(*LONG, "--out", tmp_path), stderr=subprocess.PIPE)
    wait_for((tmp_path / "last.pt").exists, run)
    run.send_signal(signal.SIGSTOP)  # so that it is not done before the second one looks
    second = cli(*LONG, "--out", tmp_path)
    assert second.returncode == 2 and "another process is at work there" in second.stderr
    run.kill()
    run.wait()
    assert not (tmp_path / "results.json").exists()
    assert cli(*LONG, "--out", tmp_path).returncode == 0
    assert_same_run(tmp_path, whole(1))


@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_ends(processes, number, tmp_path, whole):
    run = subprocess.Popen(command(*LONG, "--epochs", "2000", "--out", tmp_path, processes=processes),
                           stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "log.jsonl").exists() and losses(tmp_path), run)
        run.send_signal(number)
        message = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    step = int(re.search(r"balcon: stopped by a signal and saved at step (\d+) of 8000", message)[1])
    assert run.returncode == {signal.SIGTERM: 143, signal.SIGINT: -signal.SIGINT}[number] if processes == 1 else 1
    assert message.count("balcon: ") == 1 and (processes > 1 or "Traceback" not in message)
    assert torch.load(tmp_path / "last.pt")["step"] == max(losses(tmp_path)) == step


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    reference, asked = train_here(tmp_path / "whole"), [signal.SIGTERM]
    for step in (4, 8, 10):
        with pytest.raises(balcon.Stopped, match=f"at step {step} of 12"):
            train_here(tmp_path / "stopped", None, asked=asked)
    resumed = train_here(tmp_path / "stopped")
    assert all(torch.equal(resumed[name], value) for name, value in reference.items())


def test_a_dead_rank_ends_all(tmp_path):
    run = subprocess.Popen(command(*LONG, "--epochs", "2000", "--out", tmp_path, processes=2), stderr=subprocess.PIPE)
    wait_for((tmp_path / "last.pt").exists, run)
    first, second = children(run.pid)
    os.kill(second, signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode != 0 and not os.path.exists(f"/proc/{first}")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path):  # in the middle of the weights
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def poison(path):
    torch.save({"backbone": {}, "config": Trap()}, path)


def pickle_trap(path):
    path.write_bytes(pickle.dumps(Trap()))


def foreign(path):
    torch.save({"backbone": {}, "config": {"dataset": "patterns", "alpha": 99}, "projector": {}}, path)


def edit(**more):
    def damage(path):
        torch.save({**torch.load(path), **more}, path)
    return damage


@pytest.mark.parametrize("damage", [
    cut, flip_a_bit, poison, pickle_trap, foreign, Path.unlink, edit(optimizer=None), edit(step="x"),
    edit(step=10 ** 6), edit(backbone=3), edit(config={"dataset": []}),
    edit(config={"dataset": "patterns", "alpha": "x"}), edit(config={"dataset": "patterns", "seed": 1})])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    reference = train_here(tmp_path / "run")
    last, before = tmp_path / "run" / "last.pt", tmp_path / "run" / "previous.pt"
    good = before.read_bytes()
    assert torch.load(before)["step"] == 8
    damage(last)
    left = last.read_bytes() if last.exists() else None
    resumed = train_here(tmp_path / "run")
    assert all(torch.equal(resumed[name], value) for name, value in reference.items())
    assert ("last.pt" in capfd.readouterr().err) == (left is not None) and not Path("sprung").exists()
    assert left is None or (tmp_path / "run" / "last.pt.damaged").read_bytes() == left
    assert before.read_bytes() == good  # not pushed out by the damaged one
    if left:
        last.write_bytes(left)
        before.unlink()
        with pytest.raises(balcon.UserError, match="last.pt"):
            train_here(tmp_path / "run")
        assert last.read_bytes() == left and not Path("sprung").exists()


def test_other_images_are_refused(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        train_here(tmp_path / "run", 6)
    drawn = balcon.draw_patterns

    def one_pixel_changed(n, split):
        pixels, labels = drawn(n, split)
        pixels[:, 0, 0, 0] ^= 1
        return pixels, labels
    monkeypatch.setattr(balcon, "draw_patterns", one_pixel_changed)
    with pytest.raises(balcon.UserError, match="other images"):
        train_here(tmp_path / "run")


def test_figures_of_other_images_or_weights_are_not_mixed(tmp_path, monkeypatch, capfd):
    drawn, seeds = balcon.draw_patterns, iter((0, 0, 1, 1, 1))

    def draw(n, split):
        pixels, labels = drawn(80, split)
        return (pixels ^ (next(seeds) if split == "test" else 0)), labels
    monkeypatch.setattr(balcon, "draw_patterns", draw)
    flags = ["--epochs", "0", "--backbone", "pixels", "--eval", "knn", "--out", tmp_path / "run"]
    assert main(*flags) == main(*flags) == 0
    with pytest.raises(SystemExit):
        balcon.main([*map(str, flags)])
    assert "figures of other images" in capfd.readouterr().err
    encoder = balcon.Encoder("resnet10", "imagenet", (512, 128), 32)
    config = balcon.public(balcon.parse_flags([]))
    flags = ["--checkpoint", tmp_path / "x.pt", "--eval", "knn", "--no-baseline", "--out", tmp_path / "of"]
    for step in (1, 2):
        torch.save({"backbone": encoder.backbone.state_dict(), "projector": encoder.projector.state_dict(),
                    "step": step, "config": config}, tmp_path / "x.pt")
        if step == 1:
            assert main(*flags) == 0
    with pytest.raises(SystemExit):
        balcon.main([*map(str, flags)])
    assert "figures of other weights" in capfd.readouterr().err


@pytest.mark.parametrize("name, text", [
    *(("results.json", text) for text in ("[]", "3", "null", '{"knn"', "[" * 10 ** 5)),
    *(("log.jsonl", text) for text in ("", "3", "[]", '{"config": 3}', '{"config": []}', "\0", "x\ny\n"))])
def test_damaged_texts_are_refused(name, text, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    flags = [*TINY, "--epochs", "0", "--backbone", "pixels", "--eval", "knn", "--out", str(tmp_path / "run")]
    if name == "results.json":
        assert main(*flags) == 0
    (tmp_path / "run" / name).write_text(text)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        balcon.main(flags)
    message = capfd.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "damaged" in message
    assert (tmp_path / "run" / name).read_text() == text


def test_a_late_signal_still_ends_the_run():
    with pytest.raises(KeyboardInterrupt), balcon.end_on_request() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("odd", [{"env": {**os.environ, "PYTHONIOENCODING": "ascii"}},
                                 {"preexec_fn": lambda: os.close(2)}])
def test_odd_surroundings(odd, tmp_path):
    run = [*command(*TINY, "--epochs", "1", "--eval", "knn", "--no-baseline", "--out", tmp_path)]
    done = subprocess.run(run, stdout=subprocess.PIPE, **odd)
    assert done.returncode == 0 and results(tmp_path)["knn"] > 0


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    with pytest.raises(Killed):
        train_here(tmp_path, 6)
    before, limits = (tmp_path / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, limits[1]))  # no file above a megabyte
    try:
        with pytest.raises(balcon.UserError, match="cannot write .*last.pt, and what was there .*File too large"):
            train_here(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_log_damaged_in_the_middle_is_not_cut(tmp_path):
    train_here(tmp_path)
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text + '{"step": 1')  # a power cut
    assert len(balcon.read_log(tmp_path / "log.jsonl")) == text.count("\n")
    (tmp_path / "log.jsonl").write_text(text.replace('"step": 8', '"step" 8'))
    with pytest.raises(balcon.UserError, match="line 3 of 5"):
        balcon.read_log(tmp_path / "log.jsonl")


def test_an_interrupted_probe_goes_on(tmp_path):
    net, train, test = torch.nn.Flatten(), blobs(50, 0), blobs(60, 1)
    made, select = [], train.batches

    def fragile(order, views=None, **options):
        for batch in select(order, views, **options):
            if views is not None:
                made.append(options["key"][-1])  # epoch
                if len(made) == 10:
                    raise Killed
            yield batch
    train.batches = fragile
    cfg = probing(probe="crops", probe_batch=16, probe_epochs=5, out=tmp_path, save_every_minutes=1e-9)
    with pytest.raises(Killed):
        balcon.linear_accuracy(net, train, test, cfg)
    assert made == [0] * 4 + [1] * 4 + [2] * 2 and len(list(tmp_path.glob("linear-*.pt"))) == 1
    other = balcon.linear_accuracy(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12)), train, test, cfg)
    assert made[10:14] == [0] * 4 and other > 0  # another backbone begins anew
    resumed = balcon.linear_accuracy(net, train, test, cfg)
    assert made[30:] == [2] * 4 + [3] * 4 + [4] * 4  # the third epoch again
    cfg.out = tmp_path / "none"
    cfg.save_every_minutes = 10
    assert resumed == balcon.linear_accuracy(net, train, test, cfg)


def test_collapse_is_reported_once(tmp_path, monkeypatch, capfd):
    class Constant(torch.nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            self.backbone, self.projector = torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4)
            self.projector.weight.data.zero_()
            self.projector.requires_grad_()
            self.projector.weight.requires_grad_(False)

        def forward(self, x):
            return self.projector(self.backbone(x))
    monkeypatch.setattr(balcon, "Encoder", Constant)
    train_here(tmp_path)
    assert capfd.readouterr().err.count("collapse") == 1
    m, alpha, lam = 16, 4, 2  # all similarities are 1
    assert all(loss == pytest.approx(-1 + lam * (1 + math.log(2 * (m - 1)) / alpha), abs=1e-5)
               for loss in losses(tmp_path).values())


def test_images_of_every_kind(tmp_path, monkeypatch, capfd):
    g = np.random.default_rng(0)
    rgb = Image.fromarray(g.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    kinds = {"grey.png": rgb.convert("L"), "cmyk.jpg": rgb.convert("CMYK"), "alpha.png": rgb.convert("RGBA"),
             "palette.gif": rgb.convert("P"), "bits.png": rgb.convert("1"), "grey alpha.png": rgb.convert("LA"),
             "tall.png": rgb.resize((3, 500)), "one pixel.png": rgb.resize((1, 1)), "lab.tif": rgb.convert("LAB"),
             "16 bits.png": Image.fromarray(np.full((20, 20), 0x8123, np.uint16)), "emoji 🌇.png": rgb}
    for place in ("train/снег", "train/猫", "val/снег", "val/猫"):
        (tmp_path / place).mkdir(parents=True)
        for name, image in kinds.items():
            image.save(tmp_path / place / name)
        rgb.save(tmp_path / place / "film.gif", save_all=True, append_images=[rgb.rotate(90)])
        (tmp_path / place / "notes.txt").write_text("no image")
    assert set(np.unique(balcon.read_image(str(tmp_path / "val/猫/16 bits.png")))) == {0x81}
    scale = np.linspace(0, 1, 4, dtype=np.float32)[None]
    Image.fromarray(scale).save(tmp_path / "float.tif")
    with pytest.raises(balcon.ImageError, match="floating"):
        balcon.read_image(str(tmp_path / "float.tif"))
    Image.fromarray((200 * scale).astype(np.int32)).save(tmp_path / "int.tif")  # 32 bits that need only 8
    assert np.asarray(balcon.read_image(str(tmp_path / "int.tif")))[0, :, 0].tolist() == [0, 66, 133, 200]
    done = main("--dataset", "folder", "--data", tmp_path, "--backbone", "resnet10", "--epochs", "1", "--workers", "2",
                "--batch-size", "12", "--eval", "knn", "--out", tmp_path / "run")
    assert done == 0 and sum(results(tmp_path / "run")["class_counts"]) == 2 * (len(kinds) + 1)


def test_nothing_is_written_outside(tmp_path):
    for place in ("home", "tmp", "here"):
        (tmp_path / place).mkdir()
    env = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    done = cli(*TINY, "--eval", "knn", "--out", tmp_path / "run", cwd=tmp_path / "here", env=env)
    assert done.returncode == 0, done.stderr
    assert not [*tmp_path.glob("home/*"), *tmp_path.glob("tmp/*"), *tmp_path.glob("here/*")]


def test_what_is_no_bug_is_explained():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 55)
    assert balcon.explain(error.value) == ("out of memory: lower --batch-size, or --views for theory", 2)
    for error in (RuntimeError("shapes"), ValueError("Caught ValueError in DataLoader worker process 0.\n a bug"),
                  KeyError("y"), AssertionError()):
        assert balcon.explain(error)[1] is None  # a bug keeps its traceback


MOMENTS = {  # when a fault comes
    "at random": lambda out: False,
    "in training": lambda out: losses(out),
    "while a file is written": lambda out: losses(out) and any(out.glob("*.tmp")),
    "in the linear classifier": lambda out: any(out.glob("linear-*.pt")),
}


def processes_of(pid):
    """The process, its children and theirs."""
    return [pid, *(grandchild for child in children(pid) for grandchild in processes_of(child))]


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_fault_campaign(processes, tmp_path):
    """Every trial is killed twice, then goes on to its end, and must equal the uninterrupted run to the bit."""
    flags = [*TINY, "--epochs", "10", "--probe", "crops", "--no-baseline", "--save-every-minutes", "1e-5",
             "--eval", "knn", "linear"]
    begun = time.time()
    assert cli(*flags, "--out", tmp_path / "whole", processes=processes).returncode == 0
    length, choose, count = time.time() - begun, random.Random(processes), collections.Counter()
    ways = [("all", signal.SIGKILL), ("main", signal.SIGTERM), ("one rank", signal.SIGKILL)][:1 + processes]
    for trial in range(4 * len(ways)):
        out = tmp_path / str(trial)
        for fault in range(2):
            (who, number), moment = ways[(trial + fault) % len(ways)], [*MOMENTS][0 if fault else trial // len(ways)]
            end = time.time() + choose.uniform(0.1, 0.6) * length if moment == "at random" else math.inf
            run = subprocess.Popen(command(*flags, "--out", out, processes=processes), stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL)
            while run.poll() is None and not MOMENTS[moment](out) and time.time() < end:
                time.sleep(0.002)
            if run.poll() is not None:  # it was done before the moment came
                continue
            for pid in {"all": processes_of(run.pid), "main": [run.pid], "one rank": children(run.pid)[-1:]}[who]:
                os.kill(pid, number)
            message = run.communicate(timeout=60)[1].decode()
            count[f"{who} {number.name}, {moment}"] += 1
            assert run.returncode != 0 and (processes > 1 or "Traceback" not in message), message
            for file in [*out.glob("*.json"), *out.glob("*.jsonl")]:  # always parse
                [json.loads(line) for line in ([file.read_text()] if file.suffix == ".json" else open(file))]
            done = max(losses(out), default=0)
            kept = [torch.load(out / name)["step"] for name in ("last.pt", "previous.pt") if (out / name).exists()]
            count["faults"] += 1
            count["logged steps to make again"] += done - max(kept, default=0)
        last = cli(*flags, "--out", out, processes=processes)
        assert last.returncode == 0, last.stderr
        assert_same_run(out, tmp_path / "whole")
        count["trials recovered to the bit"] += 1
    print(f"\n{processes} processes, a whole run takes {length:.0f} s:", dict(count))


@pytest.mark.faults
def test_torchrun_restarts_after_a_rank_was_killed(tmp_path, whole):
    run = subprocess.Popen(command(*LONG, "--out", tmp_path, processes=2, restarts=3), stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "last.pt").exists, run)
    os.kill(children(run.pid)[1], signal.SIGKILL)
    try:
        assert run.wait(timeout=300) == 0  # if not: gloo's processes did not find one another again
    finally:
        for pid in processes_of(run.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert_same_run(tmp_path, whole(2))


def _one_trajectory_on_a_rank(rank, world, folder):
    """Float32 losses of 20 steps, each from the weights that one process had there, and the last gradient."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    cfg = balcon.parse_flags(["--limit", "1280", "--batch-size", "128", "--out", f"{folder}/none"])
    train, test = balcon.load_data(cfg, CPU)
    torch.manual_seed(0)
    encoder = balcon.Encoder(cfg.backbone, cfg.stem, cfg.projector, cfg.size)
    model, curve = balcon.distribute(encoder, CPU), []
    optimizer = torch.optim.SGD(encoder.parameters(), cfg.lr, momentum=0.9)
    order = [(s, torch.randperm(1280, generator=balcon.rng(s))[:128]) for s in range(20)]
    views = balcon.Views(cfg.parts, 32, cfg.crop_scale)
    for step, (x, _) in enumerate(train.batches(order, views, 2, (0,), shared=True)):
        if world == 1:
            torch.save(encoder.state_dict(), f"{folder}/step{step}.pt")
        encoder.load_state_dict(torch.load(f"{folder}/step{step}.pt"))
        loss = balanced_contrastive_loss(*model(x).chunk(2), cfg.alpha, cfg.lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(torch.stack(balcon.gather(loss.detach())).mean())
    gradient = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    encoder.load_state_dict(torch.load(f"{folder}/step19.pt"))
    test, cfg.probe_epochs = test.select(torch.arange(1999)), 3  # 1999: neither 2 nor 4 divides it
    figures = [f(encoder.backbone, train, test, cfg) for f in (balcon.knn_accuracy, balcon.linear_accuracy)]
    torch.save((torch.stack(curve), gradient, figures), f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.faults
def test_the_same_run_on_one_two_and_four_processes(tmp_path):
    one, *others = (spawn(_one_trajectory_on_a_rank, world, tmp_path)[0] for world in (1, 2, 4))
    for (curve, gradient, figures), n in zip(others, (2, 4)):
        loss_apart, gradient_apart = (curve - one[0]).abs().max(), (gradient - one[1]).norm() / one[1].norm()
        print(f"\n{n} processes: losses within {loss_apart:.1e}, gradient within {gradient_apart:.1e}, {figures}")
        assert loss_apart < 1e-4 and gradient_apart < 1e-3 and figures == one[2]


# ------------------------------------------ the demo -------------------------------------------
@pytest.mark.parametrize("trained, code", [(95.0, 0), (80.0, 1)])
def test_the_demo_fails_if_nothing_was_learned(tmp_path, monkeypatch, capfd, trained, code):
    figures = iter([60.0, trained])  # untrained first: a quarter of its error is 10 %
    monkeypatch.setattr(balcon, "pretrain", lambda *arguments: 1.0)
    monkeypatch.setitem(balcon.EVALUATIONS, "knn", lambda *arguments: next(figures))
    with pytest.raises(SystemExit) as stop:
        balcon.main(["--out", str(tmp_path / "run"), "--eval", "knn"])
    assert stop.value.code == code and ("FAILED" in capfd.readouterr().out) == bool(code)


def test_recipes_are_the_papers():  # A.3.1, A.4.1, A.4.2
    def recipe(*flags):
        return vars(balcon.parse_flags([*flags, "--out", "nowhere"]))
    cifar, imagenet = recipe("--dataset", "cifar10"), recipe("--dataset", "imagenet")
    for r, expected in ((cifar, dict(alpha=2, lam=4, epochs=200, batch_size=512, lr=0.1, backbone="resnet18",
                                     stem="cifar", crop_scale=(0.08, 1), k=1, probe_optimizer="sgd", probe_lr=30,
                                     probe_batch=256, probe_epochs=90, size=32,
                                     parts=("crop", "flip", "color_jitter", "grayscale"))),
                        (imagenet, dict(alpha=4, lam=2, epochs=100, batch_size=512, lr=0.1, backbone="resnet50",
                                        stem="imagenet", crop_scale=(0.2, 1), k=200, probe_optimizer="lars",
                                        probe_batch=4096, probe_epochs=90, size=224,
                                        parts=("crop", "color_jitter", "grayscale", "gaussian_blur", "flip")))):
        assert {key: r[key] for key in expected} == expected
    dropped = recipe("--dataset", "imagenet", "--drop", "color_distortion", "gaussian_blur")["parts"]
    assert dropped == ("crop", "flip")
    assert recipe("--dataset", "cifar10", "--add", "random_cutout")["parts"][-1] == "random_cutout"
    assert recipe("--dataset", "cifar10", "--loss", "ntxent")["out"] == Path("nowhere")
    outs = {str(balcon.parse_flags(flags.split()).out) for flags in (
        "--seed 1", "--drop color_distortion", "--dataset folder --data /a", "--dataset folder --data /b")}
    assert len(outs) == 4  # different runs do not meet in one directory


@pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100", "STL10"])
def test_torchvisions_layout(dataset, monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 96, 96, 3) if dataset == "STL10" else (12, 32, 32, 3))
    pixels = pixels.astype(np.uint8)

    class Fake:  # with the attributes of torchvision's
        def __init__(self, root, split, download):
            self.classes = ["a", "b", "c"]
            self.data, self.targets = pixels, list(range(3)) * 4
            if dataset == "STL10":  # channels first; some images without a label
                self.data, self.labels = pixels.transpose(0, 3, 1, 2), np.array([0, 1, 2, 0, 1, 2] + [-1] * 6)

    monkeypatch.setattr(torchvision.datasets, dataset, Fake)
    cfg = balcon.parse_flags([
        "--dataset", dataset.lower(), "--data", str(tmp_path / "d"), "--limit", "6", "--epochs", "0"])
    train, test = balcon.load_data(cfg, CPU)
    assert train.labels.bincount().tolist() == [2, 2, 2] and len(test.labels) == 12
    assert torch.equal(test.pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))


# ------------------------------------------ on a GPU -------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_views_and_losses_on_cuda_are_those_of_the_cpu():
    views, x = balcon.Views(ALL_PARTS, 32, (0.2, 1)), torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    t = views.draw(64, torch.Generator().manual_seed(0))
    assert torch.allclose(views.apply(x.cuda(), t).cpu(), views.apply(x, t), atol=1e-4)
    z1, z2 = unit(32, 16)
    for loss in (balanced_contrastive_loss, generalized_nt_xent_loss):
        assert loss(z1.cuda(), z2.cuda(), 4, 2).item() == pytest.approx(loss(z1, z2, 4, 2).item(), abs=1e-9)
        with torch.autocast("cuda", torch.bfloat16):
            assert loss(z1.cuda().float(), z2.cuda().float(), 4, 2).item() == pytest.approx(
                loss(z1, z2, 4, 2).item(), abs=1e-5)


# ------------------------------------------ theory ---------------------------------------------
class Reader(torch.nn.Module):
    """A backbone whose feature is the vector that an image's 12 pixel values spell; it keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        mean, std = (torch.tensor(v)[:, None, None] for v in (balcon.MEAN, balcon.STD))
        self.seen.append(((x * std + mean) * 255).round() - 128)
        return self.seen[-1].flatten(1)


def stub(projector=None):
    projector = projector or torch.nn.Identity()
    return SimpleNamespace(backbone=Reader(), projector=projector, eval=lambda: projector.eval())


def pictures(vectors, labels):
    """vectors [N, 12] of −128 … 127 as images of 2×2 pixels."""
    vectors = torch.as_tensor(vectors).round().clamp(-127, 127)
    labels = torch.as_tensor(labels)
    return balcon.InMemory((vectors + 128).byte().view(-1, 3, 2, 2), labels, [str(c) for c in labels.unique()], CPU)


def settings(**more):
    return SimpleNamespace(**{**dict(
        parts=("flip",), size=2, crop_scale=(1, 1), seed=0, views=4, theory_limit=None, alpha=2.0, lam=3.0,
        loss="balanced", similarity="cosine",
        eval=["bias"], batch_size=1000, probe_epochs=30, probe_batch=16, probe_lr=10.0, probe_optimizer="sgd"), **more})


def clustered(sizes, spread, seed):
    """Vectors around a random centre of each class, and labels with gaps: 3, 5, 7, …"""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=g)]
    centres = 50 * torch.randn(len(sizes), 12, generator=g)
    return centres[labels] + spread * torch.randn(len(labels), 12, generator=g), 2 * labels + 3


def length(v):
    return math.sqrt(sum(float(x) ** 2 for x in v))


def eq16_by_loops(halves, labels, kept=(0, 1)):
    """Mean distance of each image's mean over the halves `kept` from the same of its class."""
    own = halves[:, list(kept)].mean(1)
    prototype = {c: np.mean([x for x, y in zip(own, labels) if y == c], 0) for c in set(labels)}
    return np.array([length(prototype[y] - x) for x, y in zip(own, labels)])


def extrapolated(lengths):
    """lengths(halves kept) of N gaps: the square of their mean at K and at K/2 views, drawn on to 1/K = 0; its error by
    leaving images out."""
    whole, half = lengths((0, 1)), (lengths([0]) + lengths([1])) / 2

    def line(w, h):  # through (1/K, w²) and (2/K, h²)
        return math.sqrt(w ** 2 - (h ** 2 - w ** 2))

    N = len(whole)
    without = [line((whole.sum() - w) / (N - 1), (half.sum() - h) / (N - 1)) for w, h in zip(whole, half)]
    return line(whole.mean(), half.mean()), math.sqrt((N - 1) * np.var(without))


def test_eq16_is_unbiased_where_the_plain_estimate_is_not():
    """f = class mean + offset of the image, of length .8 to 1.2, + noise of the view: Eq. 16 is the mean distance of
    the offsets from their class mean. Ten views leave 3, 7 and 40 % in the plain distance."""
    rng, K, d, labels = np.random.default_rng(0), 10, 16, [0, 1, 2] * 40
    for sigma in (.2, .3, .8):
        error, plain, estimates, reported = [], [], [], []
        for _ in range(150):
            offset = rng.normal(size=(120, d))
            offset *= rng.uniform(.8, 1.2, (120, 1)) / np.linalg.norm(offset, axis=1, keepdims=True)
            noise = sigma / math.sqrt(K / 2) * rng.normal(size=(120, 2, d))
            halves = 5 * np.eye(3, d)[labels][:, None] + offset[:, None] + noise
            truth = eq16_by_loops(np.stack([offset, offset], 1), labels).mean()
            estimate, se = balcon.eq16(torch.tensor(halves), torch.tensor(labels))
            error.append(estimate - truth)
            plain.append(eq16_by_loops(halves, labels).mean() - truth)
            estimates.append(estimate)
            reported.append(se)
        assert abs(np.mean(error)) < 4 * np.std(error) / math.sqrt(150) + .003 < np.mean(plain) / 3
        assert np.mean(reported) == pytest.approx(np.std(estimates), rel=.25)


def test_eq16_of_nothing_but_noise_says_so():
    halves = torch.randn(200, 2, 30, generator=torch.Generator().manual_seed(0))
    bias, error = balcon.eq16(halves, torch.arange(200) % 4)
    assert 0 <= bias < 1.5 and bias < 10 * error < 20  # the views are 5.5 long, half the mean of two


def test_collapse_is_measured_without_an_exception(tmp_path):
    vectors, labels = clustered((8, 8, 8), 30, seed=0)
    data = pictures(vectors, (labels - 3) // 2)
    for constant in (0.0, 1.0):  # all projections are zero, or the same
        projector = torch.nn.Linear(12, 5)
        projector.weight.data.zero_()
        projector.bias.data.fill_(constant)
        for word in ("bias", "bounds", "assumptions", "repulsion", "nscl"):
            assert balcon.EVALUATIONS[word](stub(projector), data, data, settings(probe_epochs=1))


def shown(vectors):
    """{what the backbone saw: (image, flipped)}."""
    images = torch.as_tensor(vectors).round().clamp(-127, 127).view(-1, 3, 2, 2)
    return {tuple(x.flatten().tolist()): (i, flipped) for i, image in enumerate(images)
            for flipped, x in ((False, image), (True, image.flip(-1)))}


@pytest.mark.parametrize("sizes, theory_limit", [((30, 40, 50), None), ((2, 2, 2, 2), None), ((6, 6, 6, 7), 24)])
def test_bias_is_its_equations(sizes, theory_limit):
    vectors, labels = clustered(sizes, 25, seed=1)
    torch.manual_seed(0)
    encoder, cfg = stub(torch.nn.Linear(12, 5)), settings(theory_limit=theory_limit)
    found = balcon.prototype_bias(encoder, pictures(vectors, labels), None, cfg)
    which = shown(vectors)
    x, other, views = ([which[tuple(v.flatten().tolist())] for v in seen] for seen in encoder.backbone.seen)
    N = len(x)
    images = [i for i, _ in x]
    assert N == (theory_limit or sum(sizes)) == len(set(images)) and {flip for _, flip in x} == {False, True}
    for (i, t), (j, t_other) in zip(x, other):  # x′ ∼ X|y is another image, under the same t
        assert i != j and labels[i] == labels[j] and t == t_other
    assert [i for i, _ in views] == 4 * images and {sum(t for _, t in views[n::N]) for n in range(N)} >= {1, 3}
    weight, bias = (p.detach().double().numpy() for p in encoder.projector.parameters())
    spaces = {"features": lambda v: v, "raw_projection": lambda v: weight @ v + bias,
              "projection": lambda v: (weight @ v + bias) / length(weight @ v + bias)}
    for space, f in spaces.items():
        a, b, c = ([f(v.double().flatten().numpy()) for v in seen] for seen in encoder.backbone.seen)
        distance = [length(p - q) for p, q in zip(a, b)]
        halves = np.array(c).reshape(2, 2, N, -1).mean(1).transpose(1, 0, 2)  # view by view
        y = labels[images].tolist()
        expected = {"eq51": np.mean(distance), "eq51_se": np.std(distance, ddof=1) / math.sqrt(N)}
        expected["eq16"], expected["eq16_se"] = extrapolated(lambda kept: eq16_by_loops(halves, y, kept))
        got = found[space]
        assert got["eq16_se"] == pytest.approx(expected.pop("eq16_se"), rel=.08 if N > 20 else .5)  # both first-order
        assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for eq, scale in (("eq51", "random_pairs"), ("eq16", "random_mean_pairs")):
            assert got[f"{eq}_relative"] * got[scale] == pytest.approx(got[eq])
        if N > 100:  # a random pairing of all images: neither within classes nor only across them
            pairs = [length(a[i] - a[j]) for i in range(N) for j in range(i)]
            assert got["random_pairs"] == pytest.approx(np.mean(pairs), rel=.06) and got["eq51"] < .8 * np.mean(pairs)
            means, _ = extrapolated(lambda kept: np.array([length((halves[i] - halves[j])[list(kept)].mean(0))
                                                           for i in range(N) for j in range(i)]))
            assert got["random_mean_pairs"] == pytest.approx(means, rel=.06) and means < .9 * np.mean(pairs)


def test_selected_rows_get_the_same_t(tmp_path):
    """Copies of one picture: if a row's t does not depend on which image it holds, selections look alike."""
    pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    views = balcon.Views(("crop", "color_jitter", "flip"), 40, (0.2, 1.0))
    labels, rows = torch.arange(4) % 2, torch.tensor([2, 3, 0, 1])
    for data in (balcon.InMemory(pixels.permute(2, 0, 1).repeat(4, 1, 1, 1), labels, ["a", "b"], CPU),
                 balcon.OnDisk([str(tmp_path / f"{i}.png") for i in range(4)], labels, ["a", "b"], CPU, 40, 0)):
        x, other = (next(iter(of.batches([(0, torch.arange(4))], views, 2, ("key",))))[0]
                    for of in (data, data.select(rows)))
        assert torch.equal(x, other) and not torch.equal(x[0], x[1])
    assert data.select(rows).paths.tolist() == [str(tmp_path / f"{i}.png") for i in rows]


def test_bias_of_a_known_view_offset():
    """Pairs of images s ± a, where a flip only turns a round: the same t leaves Eq. 51 without a, and E_T too."""
    g = torch.Generator().manual_seed(0)
    column = 40 * torch.randn(40, 6, 1, generator=g)
    vectors = (column + torch.tensor([8, -8])).round().flatten(1)
    truth = [length(2 ** .5 * (column[i] - column[i + 1]).round().flatten()) for i in range(0, 40, 2)]
    data = pictures(vectors, torch.arange(40) // 2)
    found = balcon.prototype_bias(stub(), data, None, settings(views=40))["features"]
    assert found["eq51"] == pytest.approx(np.mean(truth), rel=.01)
    assert found["eq16"] == pytest.approx(np.mean(truth) / 2, rel=.02)


def test_eq51_is_at_least_eq16():
    """Where images of a class differ as much as views of an image do; where they hardly differ, noise can win."""
    for seed in range(60):
        vectors, labels = clustered([4 + seed % 3, 6, 8], [30, 50, 80][seed % 3], seed)
        torch.manual_seed(seed)
        cfg = settings(views=[2, 4, 10][seed // 3 % 3], seed=seed, parts=("flip", "gaussian_noise")[:1 + seed % 2])
        for found in balcon.prototype_bias(stub(torch.nn.Linear(12, 4)), pictures(vectors, labels), None, cfg).values():
            assert found["eq51"] >= found["eq16"]


def sides_by_loops(anchor, views, bank, labels, alpha):
    """Eq. 8 and Eq. 10 (Eq. 46 where classes are unequal) read aloud; views: [K, N, d]."""
    def s(a, b):
        product = float((a * b).sum())
        return product / (length(a) * length(b)) if product else 0.0

    classes, rows = sorted(set(labels)), []
    members = {c: [bank[j] for j in range(len(bank)) if labels[j] == c] for c in classes}
    for i, z in enumerate(anchor):
        others = [sum(members[c]) / len(members[c]) for c in classes if c != labels[i]]
        nu = min(length(mu) for mu in others)
        if len({len(m) for m in members.values()}) == 1:
            log = math.log(np.mean([math.exp(alpha * s(z, b)) for b in bank])) + math.log(len(classes))
        else:
            log = math.log(sum(np.mean([math.exp(alpha * s(z, b)) for b in members[c]]) for c in classes))
        rows.append({"attract_lhs": -s(z, sum(v[i] for v in views) / len(views)),
                     "attract_rhs": -np.mean([s(z, v[i]) for v in views]),
                     "repel_lhs": max(s(z, mu) for mu in others), "repel_rhs": log / (nu * alpha),
                     "repel_b": log / alpha, "nu": nu})
    return {name: [row[name] for row in rows] for name in rows[0]}


def random_sides(seed):
    """A random trial for Theorems 4.4 and 4.6: several classes, dimensions, α and degrees of clustering."""
    g = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, [], generator=g))

    def around(centre, how):  # unit vectors
        return F.normalize(centre + how * torch.randn(N, d, generator=g, dtype=torch.float64), dim=1)

    C, d, K, each = number(2, 6), number(2, 8), number(1, 4), number(2, 4)
    labels = torch.arange(C * each) % C
    if seed % 3 == 0:  # unequal classes
        labels = torch.cat([labels, torch.randint(C, [2 * C], generator=g)])
    N, alpha = len(labels), math.exp(float(torch.rand([], generator=g)) * math.log(2000)) / 10
    centres = torch.randn(C, d, generator=g, dtype=torch.float64) + 2 * (seed % 2)  # all in one corner, or anywhere
    spread = torch.tensor([.05, .3, 1, 10])[torch.randint(4, [C], generator=g)][labels][:, None]  # of each class
    bank = around(centres[labels], spread)
    anchor = around((-1) ** number(0, 1) * centres[labels], [.1, 3][seed % 5 > 2])
    views = torch.stack([around(anchor * (-1) ** number(0, 1), spread) for _ in range(K)])
    return anchor, views, bank, labels, alpha


def test_theorem_sides_are_their_equations():
    for seed in range(30):
        anchor, views, bank, labels, alpha = random_sides(seed)
        got = balcon.theorem_sides(anchor, views.mean(0), bank, labels, alpha)
        expected = sides_by_loops(anchor, views, bank, labels.tolist(), alpha)
        assert got.keys() == expected.keys()
        for name in got:
            assert got[name].tolist() == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def test_theorems_hold_under_their_conditions_and_only_there():
    kept = {"4.4": 0, "4.4 without": 0, "4.6": 0, "4.6 without": 0}
    for seed in range(600):
        anchor, views, bank, labels, alpha = random_sides(seed)
        side = balcon.theorem_sides(anchor, views.mean(0), bank, labels, alpha)
        attract, repel = (side[f"{which}_rhs"] - side[f"{which}_lhs"] for which in ("attract", "repel"))
        assumed, condition = (anchor * views.mean(0)).sum(1) >= 0, side["repel_b"] >= 0
        assert (attract[assumed] > -1e-9).all() and (repel[condition] > -1e-9).all()
        assert (torch.maximum(side["repel_b"], side["repel_rhs"]) - side["repel_lhs"] > -1e-9).all()
        assert (side["repel_b"] >= math.log(labels.max() + 1) / alpha - 1 - 1e-9).all()  # so α ≤ log C is enough
        kept["4.4"] += int(assumed.sum())
        kept["4.6"] += int(condition.sum())
        kept["4.4 without"] += int((attract < -1e-6).sum())
        kept["4.6 without"] += int((repel < -1e-6).sum())
    assert kept["4.4"] > 4000 and kept["4.6"] > 4000 and kept["4.4 without"] > 500 and kept["4.6 without"] > 30, kept


def test_attracting_bound_is_equality_for_invariant_views():
    z, _ = unit(20, 6)
    labels = torch.arange(20) % 4
    equal = balcon.theorem_sides(z, z, z, labels, 2.0)
    assert torch.allclose(equal["attract_lhs"], equal["attract_rhs"], atol=1e-12)
    apart = balcon.theorem_sides(z, 0.9 * z, z, labels, 2.0)  # views around z, whose mean is shorter
    assert torch.allclose(apart["attract_rhs"] - apart["attract_lhs"], torch.tensor(.1, dtype=torch.float64))


def test_counterexample_to_theorem_4_6():
    """Class 1 constant at s = −.05, class 2 opposite vectors and a common −.005 z, so ν ≈ .005, own class at −.9."""
    def beside(s, *rest):
        rest = torch.tensor(rest, dtype=torch.float64)
        return torch.cat([torch.tensor([s]).double(), rest * math.sqrt(1 - s * s)])

    bank = torch.stack([beside(-.9, 1, 0, 0), beside(-.9, 1, 0, 0), beside(-.05, 0, 1, 0), beside(-.05, 0, 1, 0),
                        beside(-.005, 0, 0, 1), beside(-.005, 0, 0, -1)])
    z = torch.tensor([[1.0, 0, 0, 0]] * 6, dtype=torch.float64)
    side = {name: float(v[0]) for name, v in balcon.theorem_sides(
        z, z, bank, torch.tensor([0, 0, 1, 1, 2, 2]), 200.0).items()}
    assert side["nu"] == pytest.approx(.005) and side["repel_lhs"] == pytest.approx(-.05)
    assert side["repel_rhs"] == pytest.approx(-1, abs=.001)  # so the theorem's inequality fails …
    assert side["repel_lhs"] < max(side["repel_b"], side["repel_rhs"]) < 0  # … and this one does not


def test_bounds_and_assumptions_summarise_the_sides():
    """A flip turns one picture nearly round, so that it can be more than 90° from its mean view, and have B < 0 where
    the bank holds it the other way round: all else lies in the opposite hemisphere."""
    g = torch.Generator().manual_seed(4)
    vectors = 60 + 25 * torch.randn(12, 12, generator=g)
    vectors[0] = -30 + (70 * torch.randn(6, 1, generator=g) * torch.tensor([1, -1])).flatten()
    data = pictures(vectors, torch.arange(12) % 3)
    failures = set()
    for alpha, K, seed in ((1.0, 2, 0), *((30.0, 4, seed) for seed in range(12))):
        cfg, encoder = settings(alpha=alpha, views=K, seed=seed), stub()
        found = {**balcon.bounds(encoder, data, None, cfg), **balcon.assumptions(encoder, data, None, cfg)}
        anchor, views, bank, *again = (x.flatten(1).double() / x.flatten(1).double().norm(dim=1, keepdim=True)
                                       for x in encoder.backbone.seen)
        assert all(torch.equal(a, b) for a, b in zip(again, (anchor, views, bank)))  # both words measure the same
        if seed == 0:  # drawn apart
            assert not torch.equal(anchor, bank) and not torch.equal(anchor, views[:12])
        side = sides_by_loops(anchor, views.view(K, 12, -1), bank, data.labels.tolist(), alpha)
        angle = [math.degrees(math.acos(min(1, max(-1, -s)))) for s in side["attract_lhs"]]
        gap = {w: np.subtract(side[f"{w}_rhs"], side[f"{w}_lhs"]) for w in ("attract", "repel")}
        expected = {**{name.replace("nu", "nu_mean"): np.mean(values) for name, values in side.items()},
                    "nu": min(side["nu"]),
                    "attract_gap": gap["attract"].mean(), "attract_violated": 100 * (gap["attract"] < -1e-6).mean(),
                    "repel_gap": gap["repel"].mean(), "repel_violated": 100 * (gap["repel"] < -1e-6).mean(),
                    "angle_degrees": np.mean(angle), "angle_95_percent": np.quantile(angle, .95),
                    "assumption_4_3_violated": 100 * np.mean([a > 90 + 1e-9 for a in angle]),
                    "lam_over_nu": 3 / min(side["nu"]), "lam_times_nu": 3 * min(side["nu"]),
                    "condition_4_6_fails": 100 * np.mean([b < 0 for b in side["repel_b"]])}
        assert found.keys() == expected.keys()
        for name in expected:  # acos is blunt near 0°
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=.05 if "angle" in name else 1e-5), name
        failures |= {name for name in ("assumption_4_3_violated", "condition_4_6_fails") if found[name]}
    assert len(failures) == 2
    still = balcon.bounds(stub(), data, None, settings(parts=()))
    assert abs(still["attract_gap"]) < 1e-6 and still["attract_violated"] == 0  # equality under view invariance


def test_assumptions_of_known_angles(monkeypatch):
    angle = torch.tensor([0.0, 60, 89, 91, 120, 180])
    side = {"attract_lhs": -angle.deg2rad().cos(), "nu": angle / 90 + .5,
            "repel_b": torch.tensor([1, .001, -.001, 0, 2, 1])}
    monkeypatch.setattr(balcon, "measured_sides", lambda *arguments: side)
    assert balcon.assumptions(None, None, None, settings(lam=3.0)) == pytest.approx({
        "angle_degrees": 90, "angle_95_percent": 165, "assumption_4_3_violated": 50, "nu": .5, "lam_over_nu": 6,
        "lam_times_nu": 1.5, "condition_4_6_fails": 100 / 6}, abs=.02)


def test_repulsion_is_the_softmax_and_the_gradient():
    vectors, labels = clustered((4, 2), 30, seed=2)
    encoder = stub()
    cfg = settings(parts=("flip", "gaussian_noise"), alpha=3.0, seed=28, loss="ntxent")
    found = balcon.repulsion(encoder, pictures(vectors, labels), None, cfg)
    z, y, lam = encoder.backbone.seen[0].flatten(1).double(), labels.repeat(2).tolist(), 3.0
    z = z / z.norm(dim=1, keepdim=True)
    assert found["batch"] == 6 and torch.linalg.matrix_rank(z, tol=1e-3) == 12  # so that similarities are free
    same, twin = ([[bool(a == b) if by_class else i % 6 == j % 6 and i != j for j, b in enumerate(y)]
                   for i, a in enumerate(y)] for by_class in (True, False))
    same = torch.tensor(same) & (torch.arange(12)[:, None] % 6 != torch.arange(12) % 6)
    assert found["by_chance"] == pytest.approx(same.double().sum(1).mean().item() / 10)
    assert found["positive_similarity"] == pytest.approx(sum(float(z[i] @ z[i + 6]) for i in range(6)) / 6, rel=1e-4)
    assert found["best_positive_similarity"] == balcon.best_positive_similarity(cfg.batch_size, 3.0, lam)
    repelled = [[float(z[i] @ z[j]) for j in range(12) if j % 6 != i % 6] for i in range(12)]
    assert found["negative_similarity"] == pytest.approx(np.mean(repelled), rel=1e-4)
    assert found["second_order"] == pytest.approx(3 * lam / 2 * np.var(repelled, axis=1).mean(), rel=1e-4)
    beyond = lam * np.mean([math.log(np.mean(np.exp(3 * np.array(s)))) / 3 - np.mean(s) for s in repelled])
    assert found["repelling"] == pytest.approx(beyond, rel=1e-4)
    for alpha in (1.0, 2.0, 3.0, 8.0):
        shares = {"same_class": 0.0, "ntxent_positive": 0.0, "ntxent_same_class": 0.0}
        for i in range(12):
            e = [math.exp(alpha * float(z[i] @ z[j])) for j in range(12)]
            others = sum(e[j] for j in range(12) if j % 6 != i % 6)
            own, positive = sum(e[j] for j in range(12) if same[i, j]), e[(i + 6) % 12]
            shares["same_class"] += own / others / 12
            shares["ntxent_positive"] += positive / (others + positive) / 12
            shares["ntxent_same_class"] += own / (others + positive) / 12
        got = found[f"alpha_{alpha:g}"]
        assert {key: got[key] for key in shares} == pytest.approx(shares, rel=1e-4)
        assert got["same_class_times_lam"] == pytest.approx(lam * shares["same_class"], rel=1e-4)
        # (g): d loss / d z = (G + Gᵀ) z with G = d loss / d s, summed over pairs of a kind
        for loss, own, positive in ((balcon.balanced_contrastive_loss, "same_class", 0.0),
                                    (balcon.generalized_nt_xent_loss, "ntxent_same_class", shares["ntxent_positive"])):
            z1, z2 = z[:6].clone().requires_grad_(), z[6:].clone().requires_grad_()
            gradient = torch.cat(torch.autograd.grad(loss(z1, z2, alpha, lam, "dot"), (z1, z2)))
            pull = gradient @ torch.linalg.inv(z) / 2
            assert pull[same].sum().item() == pytest.approx(lam * got[own], rel=1e-4)
            assert pull[torch.tensor(twin)].sum().item() == pytest.approx(-1 + lam * positive, rel=1e-4)
    constant = balcon.repulsion(stub(), pictures(torch.full([17, 12], 9), torch.arange(17) % 3), None,
                                settings(batch_size=8))  # a uniform softmax, in two batches of 8
    assert constant["positive_similarity"] == pytest.approx(1) and constant["best_positive_similarity"] == 1
    assert constant["batch"] == 8 and constant["alpha_8"]["ntxent_positive"] == pytest.approx(1 / 15)
    assert constant["alpha_8"]["same_class"] == pytest.approx(constant["by_chance"])


def cdnv_by_loops(features, labels):
    whole, along, classes = [], [], sorted(set(labels))
    centre = {c: np.mean([x for x, y in zip(features, labels) if y == c], 0) for c in classes}
    for a in classes:
        for b in classes:
            line = centre[a] - centre[b]
            rest = [x - centre[a] for x, y in zip(features, labels) if y == a]
            if a != b:
                whole.append(np.mean([length(r) ** 2 for r in rest]) / length(line) ** 2)
                along.append(np.mean([(r @ line / length(line)) ** 2 for r in rest]) / length(line) ** 2)
    return np.mean(whole), np.mean(along)


def test_nscl_gap_of_an_encoder():
    vectors, labels = clustered((5, 4, 3), 40, seed=3)
    train, test = pictures(vectors, labels), pictures(*clustered((3, 3, 3), 40, seed=3))
    train.classes, encoder = list(range(8)), stub()
    found = balcon.nscl(encoder, train, test, settings(alpha=3.0, probe_epochs=1))
    z = encoder.backbone.seen[0].flatten(1).double()
    z1, z2 = (z / z.norm(dim=1, keepdim=True)).chunk(2)
    entries = [key for key in found if key.startswith("classes_")]
    assert entries == [f"classes_{C}_alpha_{alpha}" for C in (2, 3) for alpha in (1, 2, 3, 4, 8)]
    for key in entries:
        C, alpha, candidates = int(key.split("_")[1]), float(key.split("_")[3]), []
        for kept in itertools.combinations((3, 5, 7), C):  # which two classes are the first is the seed's affair
            rows = [i for i, y in enumerate(labels.tolist()) if y in kept]
            y, m = labels[rows].tolist(), len(rows)
            bound = np.mean([math.log(1 + (y.count(c) - 1) * math.exp(2 * alpha) / (m - y.count(c))) for c in y])
            loss, supervised = (loss_by_loops(z1[rows], z2[rows], alpha, 3.0, labels=of) for of in (None, y))
            candidates.append({"loss": loss, "nscl": supervised, "gap": loss - supervised, "bound": 3 / alpha * bound})
        assert any(found[key] == pytest.approx(c, rel=1e-4) for c in candidates)
        assert 0 <= found[key]["gap"] <= found[key]["bound"]
    whole, along = cdnv_by_loops(vectors.round().clamp(-127, 127).double().numpy(), labels.tolist())
    assert [found["cdnv"], found["directional_cdnv"]] == pytest.approx([whole, along], rel=1e-5)
    for seed in range(10):  # batches with other numbers of each class
        found = balcon.nscl(stub(), train, test, settings(alpha=.5, lam=.5, batch_size=6, seed=seed, probe_epochs=1))
        assert all(-1e-6 <= found[key]["gap"] <= found[key]["bound"] + 1e-6 for key in found if "classes" in key)


def test_nscl_of_a_large_alpha():  # e^{2α} does not fit a float
    vectors, labels = clustered((5, 4, 3), 40, seed=3)
    data = pictures(vectors, (labels - 3) // 2)
    found = balcon.nscl(stub(), data, data, settings(alpha=400.0, lam=2.0, probe_epochs=1))["classes_3_alpha_400"]
    bound = sum(n * (800 + math.log((n - 1) / (12 - n))) for n in (5, 4, 3)) / 12 * 2 / 400
    assert found["bound"] == pytest.approx(bound) and 0 <= found["gap"] <= bound


def test_few_shots():
    rng, labels = np.random.default_rng(0), np.arange(20) % 4
    answers = torch.arange(400) % 4
    for centre, noise in ((90, 3), (0, 40), (25, 25)):  # separable, pure noise, between
        def draw(y):
            return pictures(centre * np.eye(4, 12)[y] + noise * rng.normal(size=(len(y), 12)), y)
        train, test = draw(labels), draw(answers.numpy())
        found = balcon.nscl(stub(), train, test, settings())
        assert [key for key in found if "shot" in key] == ["1_shot", "5_shot"]
        accuracy = [found[key][by] for key in ("1_shot", "5_shot") for by in ("centre", "linear")]
        if noise < 25:
            assert accuracy == [100] * 4 and found["1_shot"]["linear_sd"] == 0
        elif not centre:
            assert all(19 < a < 31 for a in accuracy)
        else:  # more labels help; five are all there are, so no draw differs from another
            assert 30 < accuracy[0] + 5 < accuracy[2] < 100 and 30 < accuracy[1] + 5 < accuracy[3] < 100
        x, queries = (part.pixels.flatten(1).double().numpy() - 128 for part in (train, test))
        x, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, queries))
        means = [x[labels == c].mean(0) for c in range(4)]
        nearest = [min(range(4), key=lambda c: length(q - means[c])) for q in queries]
        assert found["5_shot"]["centre"] == pytest.approx(100 * np.mean(np.array(nearest) == answers.numpy()), abs=.26)
        assert found["5_shot"]["centre_sd"] < .01


# ------------------------------------------ subsets --------------------------------------------
def test_long_tail_is_imagenet_lts():
    sizes = np.array(balcon.long_tailed_counts(1000, 115_846))
    assert (sizes.sum(), sizes.max(), sizes.min()) == (115_846, 1280, 5)
    official = np.array([385, 479, 136])  # > 100 images, 20 to 100, < 20
    assert (abs(np.histogram(sizes, [0, 20, 101, 9999])[0] - official[::-1]) <= 10).all()
    for classes, total, largest in ((8, 370, 512), (10, 4521, 1280), (100, 500, 500), (7, 700, 100), (2, 11, 6)):
        sizes = balcon.long_tailed_counts(classes, total, largest)
        assert len(sizes) == classes and sum(sizes) == total and 5 <= min(sizes) and max(sizes) <= largest
    for classes, total, largest in ((10, 49, 100), (10, 1001, 100)):
        with pytest.raises(balcon.UserError, match="--limit"):
            balcon.long_tailed_counts(classes, total, largest)


def subset(labels, seed=0, kind="lt", limit=None, file=None, images=()):
    cfg = SimpleNamespace(subset=kind, seed=seed, limit=limit, subset_file=file)
    return balcon.training_subset(cfg, images, labels)


def test_subsets_of_training_images():
    labels = torch.arange(50_000) % 100
    rows, total = subset(labels), round(50_000 * 115_846 / 1_281_167)
    counts = labels[rows].bincount(minlength=100)
    assert len(rows.unique()) == len(rows) == total and 5 <= counts.min() < 10 and counts.max() > 200
    assert torch.equal(rows, subset(labels)) and torch.equal(rows, rows.sort().values)
    other = subset(labels, seed=1)
    assert not torch.equal(labels[other].bincount(minlength=100), counts)  # other classes are the large ones
    even = subset(labels, kind="uni")
    assert len(even.unique()) == len(even) == total and (labels[even].bincount() - total / 100).abs().max() < 1
    assert not torch.equal(even, subset(labels, 1, "uni")) and torch.equal(even, subset(labels, 0, "uni"))
    there = torch.tensor([6, 9, 40, 300, 5, 100, 7])  # unequal classes give no more than they have
    labels = torch.arange(7).repeat_interleave(there)[torch.randperm(467, generator=balcon.rng("any"))]
    for seed in range(20):
        counts = labels[subset(labels, seed, limit=60)].bincount(minlength=7)
        assert counts.sum() == 60 and (counts <= there).all() and counts.min() >= 5
    for limit in (34, 2100, 400):  # below 5 a class; more than 7 · 300; sizes that these classes do not have
        with pytest.raises(balcon.UserError, match="--limit"):
            subset(labels, limit=limit)


PATHS = ["d/train/n01/a.JPEG", "d/train/n01/b c.png", "d/train/n02/a.JPEG", "d/train/big dog/a 1.jpg",
         "d/train/n03/x.png"]


@pytest.mark.parametrize("text, images, expected", [
    ("train/n02/a.JPEG 1\ntrain/n01/a.JPEG 0\n", PATHS, [0, 2]),  # ImageNet-LT's form
    ("n01/b c.png\n\n  big dog/a 1.jpg  \n", PATHS, [1, 3]), ("x/big dog/a 1.jpg 7\nn01/b c.png 0", PATHS, [1, 3]),
    ("3\n0\n", torch.zeros(4, 1), [0, 3]), ("2 9\n", torch.zeros(4, 1), [2]),
    ("n01/z.JPEG 0", PATHS, "names 'n01/z.JPEG'"), ("n03/a.JPEG", PATHS, "n03/a.JPEG"), ("a.JPEG", PATHS, "a.JPEG"),
    ("n01/a.JPEG 0\ntrain/n01/a.JPEG 1", PATHS, "twice"), ("1\n1", torch.zeros(4, 1), "twice"),
    (" \n\n", PATHS, "empty"), ("cat/sub/a.png", ["cat/sub/a.png", "dog/sub/a.png"], "several"),
    ("4", torch.zeros(4, 1), "'4'"), ("-1", torch.zeros(4, 1), "-1"), (None, PATHS, "read")])
def test_subset_file(text, images, expected, tmp_path):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    if isinstance(expected, list):
        assert subset(None, images=images, file=tmp_path / "list.txt").tolist() == expected
    else:
        with pytest.raises(balcon.UserError, match=expected) as error:
            subset(None, images=images, file=tmp_path / "list.txt")
        assert "--subset-file" in str(error.value)


def test_checkpoint_with_its_own_flags_again(tmp_path):
    (tmp_path / "list.txt").write_text("1\n2\n")
    flags = ["--subset-file", str(tmp_path / "list.txt"), "--views", "4", "--out", str(tmp_path / "x")]
    balcon.save_atomically(tmp_path / "a.pt", {"backbone": {}, "config": balcon.public(balcon.parse_flags(flags))})
    again = balcon.parse_flags(["--checkpoint", str(tmp_path / "a.pt"), *flags])
    assert again.subset_file == tmp_path / "list.txt" and again.views == 4 and again.trained_on is None


@pytest.mark.parametrize("trained, evaluated, said", [
    ("--subset lt --limit 200", "--subset full", "subset=lt limit=200"), ("--subset uni", "--subset uni", None),
    ("", "--limit 200", "subset=full"), ("--limit 200", "--subset lt", "limit=200"), ("--subset lt", "--k 1", None)])
def test_an_evaluation_with_other_images_says_what_was_trained_on(trained, evaluated, said, tmp_path):
    balcon.save_atomically(tmp_path / "a.pt", {"backbone": {}, "config": balcon.public(balcon.parse_flags(trained.split()))})
    cfg = balcon.parse_flags(["--checkpoint", str(tmp_path / "a.pt"), *evaluated.split()])
    assert cfg.trained_on == said
    if evaluated == "--subset full":
        assert cfg.subset == "full" and cfg.limit is None

# ------------------------------------------ kept checkpoints -----------------------------------
DRAWN = functools.cache(balcon.draw_patterns)


def main(*flags):
    with pytest.raises(SystemExit) as stop:
        balcon.main([*map(str, flags)])
    return stop.value.code


KEPT = ("--limit 48 --batch-size 16 --epochs 4 --lr 0.1 --save-every 2 --eval bounds --views 2 "
        "--theory-limit 32").split()


def test_kept_checkpoints_and_their_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(balcon, "draw_patterns", DRAWN)
    assert main(*KEPT, "--out", tmp_path / "whole") == 0
    kept = ["epoch0000.pt", "epoch0002.pt", "epoch0004.pt"]
    assert sorted(os.listdir(tmp_path / "whole")) == [
        ".lock", *kept, "last.pt", "log.jsonl", "previous.pt", "results.json"]
    found = results(tmp_path / "whole")
    rows = [{**row} for row in found["bounds_over_epochs"]]
    assert [row.pop("epoch") for row in rows] == [0, 2, 4]
    assert rows[0] == found["untrained_bounds"] and rows[2] == found["bounds"] and rows[1] not in rows[::2]

    batches, left = balcon.InMemory.batches, [None]

    def fragile(self, order, views=None, n=1, key=(), shared=False):
        for batch in batches(self, order, views, n, key, shared):
            if key == (0, "views"):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            yield batch
    monkeypatch.setattr(balcon.InMemory, "batches", fragile)
    for left[0], expected in ((2, kept[:1]), (7, kept[:2]), (4, kept[:2])):  # in epochs 1, 3 and 4, of 3 steps
        with pytest.raises(Killed):
            balcon.main([*KEPT, "--out", str(tmp_path / "killed")])
        assert sorted(p.name for p in (tmp_path / "killed").glob("epoch*")) == expected
    left[0] = 100
    assert main(*KEPT, "--out", tmp_path / "killed") == 0
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))
    for name in kept:
        a, b = (torch.load(tmp_path / run / name)["backbone"] for run in ("whole", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert results(tmp_path / "killed")["bounds_over_epochs"] == found["bounds_over_epochs"]


def leaves(tree, name=""):
    return {k: v for key, value in tree.items() for k, v in leaves(value, f"{name} {key}").items()} \
        if isinstance(tree, dict) else {name: tree}


def test_theory_on_two_processes(tmp_path):
    words = ["bias", "bounds", "assumptions", "repulsion", "nscl"]
    flags = ["--epochs", 0, "--limit", 39, "--views", 4, "--batch-size", 64, "--probe-epochs", 1, "--eval", *words]
    found = []
    for processes in (1, 2):
        done = cli(*flags, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
        found.append(leaves({word: results(tmp_path / str(processes))[word] for word in words}))
    one, two = found
    assert one.keys() == two.keys() and len(one) > 100
    for name in one:  # of 2,000 test images one may lie on a border
        tolerance = dict(abs=.06) if "shot" in name else dict(rel=1e-5, abs=2e-6)
        assert two[name] == pytest.approx(one[name], **tolerance), name


# ------------------------------------------ bad input ------------------------------------------
BAD_THEORY = {
    "--dataset folder --data single --batch-size 2 --eval bias": "two classes",
    "--theory-limit 4 --eval bounds": "a single image", "--theory-limit 15 --eval nscl": "a single image",
    "--limit 8 --batch-size 4 --eval repulsion": "a single image", "--theory-limit 3": "theory-limit",
    "--views 1 --eval bias": "views", "--views 3 --eval bias": "--views 3", "--views 0": "views",
    "--checkpoint patterns.pt --dataset cifar10": "was made with --dataset patterns, not cifar10",
    "--dataset stl10 --batch-size 4 --eval assumptions": "labels", "--save-every 0": "save-every",
    "--subset lt --limit 20": "--limit", "--subset tail": "subset", "--subset-file gone.txt": "gone.txt",
    "--subset-file list.txt --limit 32": "--limit", "--subset-file list.txt --subset uni": "--subset",
    "--subset-file list.txt": "'4096'", "--save-every x": "save-every",
}


@pytest.mark.parametrize("flags", BAD_THEORY)
def test_bad_theory_is_one_sentence_and_exit_code_2(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for place in ("single/train/cat", "single/test/cat"):
        Path(place).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(f"{place}/{i}.png")
    Path("list.txt").write_text("1\n4096\n")
    balcon.save_atomically(Path("patterns.pt"), {
        "backbone": {}, "config": balcon.public(balcon.parse_flags(["--out", "x"]))})
    if "stl10" in flags:  # images without labels
        unlabelled = torch.zeros(8, 3, 96, 96, dtype=torch.uint8), torch.full([8], -1), ["a", "b"]
        monkeypatch.setattr(balcon, "load_data", lambda cfg, device: [balcon.InMemory(*unlabelled, device)] * 2)

    def never(*arguments):
        raise AssertionError("long work has begun")
    monkeypatch.setattr(balcon, "draw_patterns", DRAWN)
    monkeypatch.setattr(balcon, "pretrain", never)
    monkeypatch.setattr(balcon, "embed", never)
    assert main(*flags.split()) == 2
    message = capfd.readouterr().err.strip()
    assert message.startswith("balcon: ") and "\n" not in message and BAD_THEORY[flags] in message
    assert not Path("runs").exists()


# ------------------------------------------ report ---------------------------------------------
def put_results(folder, seed=0, bias=None, **more):
    """A finished run's results.json with invented figures; keywords that are flags go to its config."""
    config = {**balcon.COMMON, "dataset": "cifar10", "alpha": 2.0, "lam": 4.0, "epochs": 12, "limit": 5000, "lr": 0.1,
              "batch_size": 256, "backbone": "resnet10", "seed": seed}
    config.update({key: more.pop(key) for key in list(more) if key in config})
    spaces = {"projection": 1, "raw_projection": 10, "features": 5}
    if bias is not None:
        more["bias"] = {space: {"eq51": bias * scale, "eq16": bias * scale / 2, "eq51_relative": bias,
                                "eq16_relative": -bias} for space, scale in spaces.items()}
    folder.mkdir(parents=True)
    more = {"config": config, "seed": seed, "class_counts": [300, 200], **more}
    (folder / "results.json").write_text(json.dumps(more))


def tables(text):
    """The Markdown tables of a text: {title: rows}, the rule below the head left out."""
    found = {}
    for block in re.findall(r"(.+)\n\n((?:\|.*\n)+)", text):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines()]
        assert len({len(row) for row in rows}) == 1 and set("".join(rows.pop(1))) == {"-"}
        found.setdefault(block[0], []).append(rows)
    return found


def test_report_grid(tmp_path, capsys):
    for loss in ("balanced", "ntxent"):
        for alpha, lam, linear in ((8, 1, 40.0), (1, 1, 41.126), (1, 2, 43.0)):
            put_results(tmp_path / f"{loss}{alpha}{lam}", alpha=alpha, lam=lam, loss=loss,
                        linear=linear + (loss == "ntxent"))
    put_results(tmp_path / "second seed", seed=1, alpha=1, lam=2, linear=46.0)
    put_results(tmp_path / "another scale", alpha=1, lam=2, linear=99.0, epochs=100)
    balcon.report([tmp_path], tmp_path / "figures")
    found = tables(capsys.readouterr().out)
    balanced, ntxent = [[rows for title, (rows,) in found.items() if title.startswith(loss)]
                        for loss in ("balanced", "ntxent")]
    assert balanced == [[["", "λ = 1", "λ = 2"], ["α = 1", "41.13", "**44.50 ± 2.12**"], ["α = 8", "40.00", "–"]]]
    assert ntxent == [[["", "λ = 1", "λ = 2"], ["α = 1", "42.13", "**44.00**"], ["α = 8", "41.00", "–"]]]


def test_report_strategies_similarities_and_subsets(tmp_path, capsys):
    linear, bias = [42.0, 39.5, 41.0, 38.0, 40.0], [0.9, 1.1, 1.2, 1.5, 1.0]
    strategies = [{}, {"drop": ["color_distortion"]}, *({"add": [part]} for part in balcon.ADDABLE[:3])]
    for i, strategy in enumerate(strategies):
        put_results(tmp_path / f"strategy{i}", linear=linear[i], knn=30.0 + i, bias=bias[i], **strategy)
    put_results(tmp_path / "dot", similarity="dot", linear=10.0)
    for subset in ("lt", "uni"):
        put_results(tmp_path / subset, subset=subset, epochs=7, linear=20.0,
                    class_counts=[90, 10] if subset == "lt" else [50, 50])
    put_results(tmp_path / "lt again", subset="full", epochs=7, linear=25.0, trained_on="subset=lt",
                class_counts=[500, 500])
    balcon.report([tmp_path], tmp_path / "figures")
    text = capsys.readouterr().out
    found = [rows for group in tables(text).values() for rows in group]
    by = {rows[0][0]: rows for rows in reversed(found)}  # the first of each kind
    assert by["strategy"][1] == ["base", "42.00", "30.00"] and by["strategy"][-1][0] == "+random_rotation"
    assert ["−color_distortion", "39.50", "31.00"] in by["strategy"]
    assert by["similarity"] == [["similarity", "linear", "knn"], ["cosine", "42.00", "30.00"], ["dot", "10.00", "–"]]
    assert ["lt", "100", "90", "10", "20.00", "–"] in by["subset"]
    assert by["subset"][1] == ["subset=lt, evaluated with full", "1000", "500", "500", "25.00", "–"]
    n, r = len(linear), statistics.correlation(linear, bias)
    rest = [i for i in range(n) if linear[i] > min(linear)]  # without the worst strategy
    (head, *correlations), without = by[""], statistics.correlation(*([x[i] for i in rest] for x in (linear, bias)))
    assert head[3] == "linear, without +random_rotation" and correlations[0][3].startswith(f"r = {without:.2f} [")
    ranks = [[sorted(values).index(v) for v in values] for values in (linear, bias)]
    low, high = (math.tanh(math.atanh(r) + sign * 1.96 / math.sqrt(n - 3)) for sign in (-1, 1))
    expected = f"r = {r:.2f} [{low:.2f}, {high:.2f}], ρ = {statistics.correlation(*ranks):.2f}"
    assert ["bias features eq51", expected] == next(row for row in by[""] if row[0] == "bias features eq51")[:2]
    assert any(row[0] == "bias features eq16_relative" and row[1].startswith(f"r = {-r:.2f}") for row in by[""])


def test_report_keeps_epochs_apart_and_refuses_two_answers(tmp_path, capsys):
    put_results(tmp_path / "run", linear=40.0)
    put_results(tmp_path / "other", linear=41.0, lam=1.0)
    put_results(tmp_path / "third", linear=42.0, lam=8.0)
    put_results(tmp_path / "early", linear=20.0, checkpoint="runs/run/epoch0010.pt")
    put_results(tmp_path / "end", knn=30.0, checkpoint="runs/run/last.pt")  # the same network, another word
    balcon.report([tmp_path], tmp_path / "figures")
    found = tables(capsys.readouterr().out)
    (grid,), = [rows for title, rows in found.items() if "linear accuracy" in title]
    assert grid == [["", "λ = 1", "λ = 4", "λ = 8"], ["α = 2", "41.00", "40.00", "**42.00**"]]
    assert sorted(row[-4:] for row in found["all runs"][0][1:]) == [
        ["epoch0010", "1", "20.00", "–"], ["last", "1", "40.00", "30.00"], ["last", "1", "41.00", "–"], ["last", "1", "42.00", "–"]]
    put_results(tmp_path / "again", linear=40.5)
    with pytest.raises(balcon.UserError, match="the same configuration and seed"):
        balcon.report([tmp_path], tmp_path / "figures")


def test_report_bounds_and_figures(tmp_path, capsys, monkeypatch):
    kept = [{"epoch": epoch, "attract_gap": 0.5 / (epoch + 1), "repel_gap": 2.0, "nu_mean": 0.25, "repel_lhs": 7.0,
             "attract_violated": 1.5, "repel_violated": 0.0} for epoch in (0, 10)]
    put_results(tmp_path / "runs" / "a", bounds_over_epochs=kept, linear=40.0, bias=1.0)
    for name, lam in (("b", 1.0), ("d", 8.0)):
        put_results(tmp_path / "runs" / name, lam=lam, linear=41.0)
    put_results(tmp_path / "runs" / "c", add=["random_cutout"], linear=41.0, bias=2.0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    balcon.report([tmp_path / "runs"], tmp_path / "figures")
    text = capsys.readouterr().out
    assert [[epoch, gap, "2.000", "0.2500", "1.500", "0.000"] for epoch, gap in (("0", "0.5000"), ("10", "0.04545"))] in [
        rows[1:] for of in tables(text).values() for rows in of]
    assert "no matplotlib: no figures" in text and not (tmp_path / "figures").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    for _ in range(2):
        balcon.report([tmp_path / "runs" / name for name in "abcd"], tmp_path / "figures")
        files = {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    assert sorted(files) == ["00_grid_balanced_linear.svg", "01_bias.svg", "02_bounds.svg"]
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") and b"<dc:date>" not in svg for svg in files.values())


def test_report_compares_with_the_papers_grid(tmp_path, capsys):
    rows = [[82.92, 84.43, 84.76, 84.43], [84.07, 85.26, 86.08, 85.13],  # Fig. 5, balanced
            [86.02, 85.83, 84.48, 83.83], [85.26, 84.51, 82.95, 80.41]]
    for i, row in enumerate(rows):
        for j, linear in enumerate(row):
            put_results(tmp_path / "same" / f"{i}{j}", alpha=float(2 ** i), lam=float(2 ** j), linear=linear / 2,
                        repulsion={"positive_similarity": 0.5, "best_positive_similarity": 1.0})
            put_results(tmp_path / "transposed" / f"{i}{j}", alpha=float(2 ** i), lam=float(2 ** j), linear=rows[j][i])
    balcon.report([tmp_path / "same"], tmp_path / "figures")
    text = capsys.readouterr().out
    assert "with the paper's grid (Fig. 5, linear): r = 1.00 [1.00, 1.00], ρ = 1.00" in text
    assert ["16", "2, 8", "42.56", "0.500", "1.000"] in [row[:5] for of in tables(text).values() for rows in of for row in rows]
    balcon.report([tmp_path / "transposed"], tmp_path / "figures")
    flat, other = np.ravel(rows), np.ravel(np.transpose(rows))
    rank = [[np.mean([k + 1 for k, w in enumerate(sorted(x)) if w == v]) for v in x] for x in (flat, other)]
    assert f"ρ = {statistics.correlation(*rank):.2f}" in capsys.readouterr().out  # 84.43 is there twice


def test_report_finds_the_dial(tmp_path, capsys):
    """Accuracies made from αλ, similarities from α: which of them explains the accuracies is in the table."""
    for loss in ("balanced", "ntxent"):
        for i, j in itertools.product(range(4), repeat=2):
            alpha, lam, off = float(2 ** i), float(2 ** j), 0.5 * (-1) ** (i * j)
            curve = [{"epoch": 1.0, "loss": 9.0, "above_floor": 2.0}, {"epoch": 2.0, "loss": 8.0, "above_floor": i + j / 8}]
            put_results(tmp_path / f"{loss}{i}{j}", alpha=alpha, lam=lam, loss=loss, loss_over_epochs=curve,
                        linear=50 - (i + j - 2.5) ** 2 + off, repulsion={
                            "positive_similarity": 1 - i / 9, "best_positive_similarity": 0.5,
                            "negative_similarity": 0.01, "repelling": 0.2, "second_order": 0.1})
    put_results(tmp_path / "beyond", alpha=16.0, lam=0.5, linear=50 - 0.5 ** 2)
    balcon.report([tmp_path], tmp_path / "figures")
    found = {title.split(":")[0]: rows for title, (rows,) in tables(capsys.readouterr().out).items()}
    dial = found["balanced loss, one dial"]
    assert ["8", "4, 2", "50.25", "0.778", "0.500", "2.125", "0.010", "0.200", "0.100"] in dial and len(dial) == 18
    assert ["8", "16, 0.5", "49.75", *6 * ["–"]] in dial and len(found["ntxent loss, one dial"]) == 17
    assert [row[0] for row in found["balanced loss, linear accuracy (%)"]] == ["", *(f"α = {a}" for a in (1, 2, 4, 8))]
    i, j = (np.array(x) for x in zip(*itertools.product(range(4), repeat=2)))
    y = 50 - (i + j - 2.5) ** 2 + 0.5 * (-1.0) ** (i * j)

    def r2(x):  # by the normal equations
        X = np.stack([np.ones(16), x, x * x], 1)
        b = np.linalg.solve(X.T @ X, X.T @ y)
        return 1 - ((y - X @ b) ** 2).sum() / ((y - y.mean()) ** 2).sum(), -b[1] / (2 * b[2])

    (by_product, log), (by_similarity, best) = r2(i + j), r2(1 - i / 9)
    rows = {row[0]: row[1:] for row in found["R² of a quadratic for linear accuracy"]}
    assert rows["ntxent"] == ["16", *(f"{x:.2f}" for x in (
        r2(i)[0], r2(j)[0], by_product, 2 ** log, by_similarity, best))] and by_product > .9 > by_similarity + .5
    assert rows["Fig. 5, balanced"][1:] == ["0.30", "0.17", "0.88", "6.11", "–", "–"]  # by hand from Fig. 5
    assert rows["balanced"][0] == "16" and rows["both"][0] == "32"  # those with λ ≥ 1


def test_report_by_learning_rate(tmp_path, capsys):
    for lr in (0.1, 0.4):
        put_results(tmp_path / str(lr), lr=lr, linear=40 + lr)
    put_results(tmp_path / "other", lr=0.2, lam=1.0, linear=50.0)
    put_results(tmp_path / "seed", lr=0.4, linear=41.4, seed=1)
    put_results(tmp_path / "ntxent", lr=0.4, loss="ntxent", linear=30.0)
    put_results(tmp_path / "ntxent again", lr=0.2, loss="ntxent", linear=31.0, knn=20.0)
    balcon.report([tmp_path], tmp_path / "figures")
    found = {title: rows for title, (rows,) in tables(capsys.readouterr().out).items() if "by learning rate" in title}
    linear, knn = found.values()
    assert linear == [["", "0.1", "0.2", "0.4"], ["balanced (2, 4)", "40.10", "–", "40.90 ± 0.71"],
                      ["ntxent (2, 4)", "–", "31.00", "30.00"]]  # (2, 1) has one rate only
    assert knn[2] == ["ntxent (2, 4)", "–", "20.00", "–"] and "lr 0" not in "".join(found)


def results_page(out):
    """RESULTS.md as it should be: between <!-- report: REGEX --> and <!-- end -->, the tables that --report makes of
    the page's own raw lines and whose titles begin so. `python test_balcon.py page` writes it."""
    path, said = Path(__file__).with_name("RESULTS.md"), io.StringIO()
    with contextlib.redirect_stdout(said):
        balcon.report([path], out)
    blocks = re.findall(r"^(.+\n\n(?:\|.*\n)+(?:\nwith the paper's.*\n)?)", said.getvalue(), re.M)

    def fill(match):
        mine = [block for block in blocks if re.match(match[1], block)]
        assert mine, f"no table begins with {match[1]}"
        blocks[:] = [block for block in blocks if block not in mine]
        return f"<!-- report: {match[1]} -->\n\n" + "\n".join(mine) + "\n<!-- end -->"

    text = re.sub(r"<!-- report: ([^\n]*) -->\n.*?<!-- end -->", fill, path.read_text(), flags=re.S)
    assert not blocks, f"no place for: {[block.splitlines()[0] for block in blocks]}"
    return text


def test_the_results_page_agrees_with_its_raw_lines(tmp_path):
    page = Path(__file__).with_name("RESULTS.md")
    assert results_page(tmp_path) == page.read_text()
    raw, checked = {f"{run[key]:.2f}" for run in balcon.read_results([page]) for key in run
                    if re.fullmatch("(untrained_)?(knn|linear)", key)}, 0
    by_hand = re.sub(r"<!-- report: .*?<!-- end -->", "", page.read_text(), flags=re.S)
    for rows in (rows for of in tables(by_hand).values() for rows in of):
        columns = [i for i, head in enumerate(rows[0]) if re.match(r"(kNN|linear)($|, k =|: )", head)]
        for accuracy in re.findall(r"\d+\.\d\d", " ".join(row[i] for row in rows[1:] for i in columns)):
            assert accuracy in raw, rows[0]
            checked += 1
    assert checked > 50


def test_report_refuses_what_is_no_run(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("[1, 2")
    for folder, said in ((tmp_path / "nothing", "no results.json"), (tmp_path / "broken", "not the results of a run")):
        with pytest.raises(SystemExit) as exit:
            balcon.main(["--report", str(folder)])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and said in error and error.count("\n") == 1


# ------------------------------------------ benchmark ------------------------------------------
def test_benchmark_says_in_one_sentence_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(balcon.UserError, match="is more than the 4096"):
        benchmark(["--batch-size", "5000", "--out", str(tmp_path / "x")])
    with pytest.raises(balcon.UserError, match="train does not exist"):
        benchmark(["--dataset", "folder", "--data", str(tmp_path), "--out", str(tmp_path / "x")])
    whole = balcon.Encoder.forward

    def on_a_small_machine(self, x):
        if len(x) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, x)

    monkeypatch.setattr(balcon.Encoder, "forward", on_a_small_machine)
    with pytest.raises(balcon.UserError, match="--batch-size 64 does not fit into the memory, 16 does"):
        benchmark(["--batch-size", "64", "--out", str(tmp_path / "x")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, Triton compiles")
def test_compile_without_a_compiler_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, balcon.__file__, "--limit", "64", "--batch-size", "32", "--epochs", "1",
                           "--compile", "--out", str(tmp_path / "x")], capture_output=True, text=True,
                          env={**os.environ, "CXX": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 2 and "--compile does not work here, leave it out" in done.stderr
    assert "Traceback" not in done.stderr


def torchvision_pipeline(cfg):
    """The same augmentation, one image after another, by torchvision.transforms.v2."""
    T = torchvision.transforms.v2
    parts = {
        "crop": T.RandomResizedCrop(cfg.size, cfg.crop_scale, antialias=True), "flip": T.RandomHorizontalFlip(),
        "color_jitter": T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), "grayscale": T.RandomGrayscale(0.2),
        "gaussian_blur": T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], 0.5)}
    return T.Compose([*(parts[part] for part in cfg.parts), T.ToImage(), T.ToDtype(torch.float32, scale=True),
                      T.Normalize(balcon.MEAN, balcon.STD)])


def seconds(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(calls, device, repeats=7):
    """Median seconds of each call, after one warm-up of each; the calls take turns, so that noise hits all alike."""
    times = [[seconds(call, device) for call in calls.values()] for _ in range(repeats + 1)][1:]
    return dict(zip(calls, map(statistics.median, zip(*times))))


def _loss_on_its_own(_, size, dim, path):
    """Seconds and peak memory in MB of the loss and its gradient, in a process that does nothing else."""
    cuda = torch.cuda.is_available()
    z = torch.randn(2, size // 2, dim, device="cuda" if cuda else "cpu", requires_grad=True)
    for block in (1, 2 ** 22):  # warm up both ways
        balanced_contrastive_loss(*z[:, :8], 2, 4, block=block).backward()

    def peak():
        if cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        status = Path("/proc/self/status").read_text()  # Linux; getrusage counts what the parent had as well
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e6

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    before, times = peak(), []
    for _ in range(5 if size < 20_000 or cuda else 1):
        z.grad = None
        times.append(seconds(lambda: balanced_contrastive_loss(*z, 2, 4).backward(), z.device))
    torch.save((statistics.median(times), peak() - before), path)


def benchmark(argv):
    """Print and store where the time of a training step goes: python test_balcon.py benchmark [flags of balcon.py]

    Every ratio is of medians that were measured in turns in this run. Shares of a step are of parts timed by themselves.
    For images on disk, "reader" is the work of balcon's workers (decoding, crops), "pillow" the usual pipeline (all of
    the augmentation, one image after another), both on one core; "features" includes the start of the workers.
    """
    cfg = balcon.parse_flags(argv)
    device = torch.device("cuda", balcon.LOCAL_RANK) if torch.cuda.is_available() else CPU
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train, _ = balcon.load_data(cfg, device)
    n, m, lead = len(train.labels), cfg.batch_size, balcon.rank() == 0
    if m > n:
        raise balcon.UserError(f"--batch-size {m} is more than the {n} training images")
    views, plain = balcon.Views(cfg.parts, cfg.size, cfg.crop_scale), torchvision_pipeline(cfg)
    encoder = balcon.Encoder(cfg.backbone, cfg.stem, cfg.projector, cfg.size)
    encoder = encoder.to(device, memory_format=torch.channels_last).train()
    model = balcon.distribute(encoder, device)
    model = torch.compile(model) if cfg.compile else model
    optimizer = torch.optim.SGD(encoder.parameters(), 1e-6, momentum=0.9, weight_decay=1e-4)

    def update(x, backward):
        encoder.train()
        with balcon.autocast(device):
            out = model(x)
        optimizer.zero_grad(set_to_none=True)
        backward(out)
        optimizer.step()

    def loss(z):
        balcon.LOSSES[cfg.loss](*z.chunk(2), cfg.alpha, cfg.lam, cfg.similarity).backward()

    def fits(m):
        try:
            x = torch.zeros(2 * m // balcon.world_size(), 3, cfg.size, cfg.size, device=device)
            update(x.contiguous(memory_format=torch.channels_last), lambda out: loss(out.float()))
            return True
        except (RuntimeError, MemoryError) as error:
            if "out of memory" not in balcon.explain(error)[0]:
                raise
        torch.cuda.empty_cache()
        return False

    most = next((size for size in (m >> i for i in range(m.bit_length() - 1)) if fits(size)), 0)
    if most < m:
        raise balcon.UserError(f"--batch-size {m} does not fit into the memory, {most} does")
    order = ((step, torch.randperm(n, generator=balcon.rng(step))[:m]) for step in itertools.count())
    batches = train.batches(order, views, n=2, key=("benchmark",), shared=True)
    x = next(batches)[0]
    z = torch.randn(len(x), cfg.projector[-1], device=device)

    def whole_steps(k):
        for _ in range(k):
            update(next(batches)[0], loss)

    @torch.no_grad()
    def forward():
        with balcon.autocast(device):
            encoder.backbone.eval()(x[:m // balcon.world_size()])

    rows, key = torch.arange(m), itertools.count()
    calls = {"network": (2 * m, lambda: update(x, lambda out: out.float().backward(z))),
             "loss": (2 * m, lambda: loss(z.detach().requires_grad_())),
             "gather": (2 * m, lambda: balcon.gather(z)),
             "forward": (m, forward),
             "features": (m, lambda: balcon.extract(encoder.backbone, train.select(rows), batch=m))}
    if isinstance(train, balcon.InMemory):
        some = train.pixels[:128].cpu()
        calls["step"] = 2 * m, lambda: whole_steps(1)
        calls["views"] = 2 * m, lambda: next(train.batches([(next(key), rows)], views, n=2, shared=True))
        calls["views_by_torchvision"] = 256, lambda: [(plain(image), plain(image)) for image in some]
    else:  # the workers run ahead while others are timed, so several steps
        k, alone = 2 * cfg.workers + 3, copy.copy(train)
        alone.workers, some = 0, [str(path) for path in train.paths[:32]]
        alone.views, alone.n, alone.key = views, 2, ()

        def on_one_core(call):
            def timed():
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                call()
                torch.set_num_threads(threads)
            return timed

        def by_pillow():
            for path in some:
                image = Image.open(path).convert("RGB")
                plain(image), plain(image)

        calls["step"] = 2 * m * k, lambda: whole_steps(k)
        calls["views"] = 64, lambda: next(alone.batches([(next(key), torch.arange(32))], views, n=2))
        calls["reader_per_core"] = 64, on_one_core(lambda: [alone[next(key), row] for row in range(32)])
        calls["pillow_per_core"] = 64, on_one_core(by_pillow)
        calls["views_by_torchvision"] = 64, by_pillow
    times = in_turns({name: call for name, (_, call) in calls.items()}, device)
    per_second = {name: count / times[name] for name, (count, _) in calls.items()}
    step = 2 * m / per_second["step"]
    report = {"views_per_second": per_second, "step_over_network": per_second["step"] / per_second["network"],
              "share_of_step": {name: 2 * m / per_second[name] / step for name in ("views", "loss", "gather")},
              "views_over_torchvision": per_second["views"] / per_second["views_by_torchvision"],
              "features_over_forward": per_second["features"] / per_second["forward"],
              "recipe_hours": cfg.epochs * (n // m) * step / 3600}
    if "reader_per_core" in per_second:
        report["reader_over_pillow"] = per_second["reader_per_core"] / per_second["pillow_per_core"]
        report["cores_per_device"] = per_second["network"] / balcon.world_size() / per_second["reader_per_core"]
    if device.type == "cuda":
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            calls["network"][1]()
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        reach = 2 * 8192 ** 3 / in_turns({"": lambda: a @ a}, device)[""] / 1e12
        achieved = counter.get_total_flops() / times["step"] / 1e12
        report.update(tflops=achieved, share_of_matmul=achieved / reach,
                      peak_step_mb=torch.cuda.max_memory_allocated() / 1e6)
    else:
        report["peak_process_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    def store():
        path = cfg.out / "benchmark.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**report, "config": balcon.public(cfg), "environment": balcon.environment()},
                                   indent=1) + "\n")
        return path

    if lead:
        for name, value in balcon.flat(report).items():
            print(f"{name:45} {value:.4g}", flush=True)
        store()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # else freed blocks stay, and look like a peak of the loss
    sizes = [(1024, 128), (1024, 2048), (8192, 128), (8192, 2048), (32768, 128), (32768, 2048)]
    for size, dim in sizes[:None if device.type == "cuda" else -1] if balcon.world_size() == 1 else ():
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_loss_on_its_own, (size, dim, f"{folder}/x"))
            report[f"loss_{size}x{dim}"] = took, peak = torch.load(f"{folder}/x")  # seconds, MB
        print(f"loss_{size}x{dim}".ljust(45), f"{took:.4g} s, {peak:.0f} MB", flush=True)
    if lead:
        print(store())


if __name__ == "__main__":
    if sys.argv[1:] == ["page"]:
        Path(__file__).with_name("RESULTS.md").write_text(results_page(Path("runs/report")))
        sys.exit()
    if sys.argv[1:2] != ["benchmark"]:
        sys.exit("usage: pytest, or: python test_balcon.py benchmark [flags of balcon.py], or: python test_balcon.py page")
    try:
        benchmark(sys.argv[2:])
    except Exception as error:
        sentence, code = balcon.explain(error)
        if code is None:
            raise
        sys.exit(f"balcon: {sentence}")
