# SPDX-License-Identifier: MIT
"""Tests of balcon.py against independent oracles: plain loops in float64, closed forms, torchvision.

    pytest                  # a few minutes on two cores, no network, no data
"""
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
    for arguments in ((z, z[:3], 1, 1), (z[:1], z[:1], 1, 1), (z, z, 0, 1), (z, z, 1, 1, "manhattan")):
        with pytest.raises(ValueError):
            balanced_contrastive_loss(*arguments)
    with pytest.raises(ValueError, match="class"):
        nscl_loss(z, z, torch.zeros(4, dtype=torch.long), 1, 1)


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
            results[kind, name] = [loss / world] + [p.grad for p in net.parameters()]
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
    got = balcon.gaussian_blur(square.clone(), sigma)
    assert torch.equal(got[0], square[0])
    for x, y, s in zip(square[1:], got[1:], sigma[1:].tolist()):
        assert torch.allclose(y, TF.gaussian_blur(x, [23, 23], [s, s]), atol=1e-5)
    turns = torch.tensor([0, 1, 2, 3, 1, 0])
    got = balcon.random_rotation(square.clone(), turns)
    assert all(torch.allclose(y, TF.rotate(x, 90.0 * k), atol=1e-5) for x, y, k in zip(square, got, turns.tolist()))
    centre = torch.tensor([[0.5, 0.5], [-1, -1], [0.0, 0.99], [0.99, 0.0], [0.33, 0.72], [0.72, 0.33]])
    mean = torch.tensor(balcon.MEAN)[:, None, None]
    for x, y, (a, b) in zip(square, balcon.random_cutout(square.clone(), centre), centre.tolist()):
        top, left = int(a * 20) - 5, int(b * 20) - 5
        i, j, i2, j2 = max(top, 0), max(left, 0), min(top + 10, 20), min(left + 10, 20)
        assert torch.allclose(y, TF.erase(x, i, j, i2 - i, j2 - j, mean) if a >= 0 else x)
    noise = 0.1 * torch.randn(square.shape, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    got = balcon.OPERATIONS["gaussian_noise"](square, noise)
    assert torch.allclose(got, TF.gaussian_noise(square, sigma=0.1), atol=1e-5)
    assert torch.allclose(balcon.normalize(images), TF.normalize(images, balcon.MEAN, balcon.STD), atol=1e-5)


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
    assert labels[rows].bincount().tolist() == [13, 13, 4] and torch.equal(rows, balcon.balanced_subset(labels, 30, "key"))
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


def _evaluation_on_a_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    g = torch.Generator().manual_seed(0)
    bank, queries, labels = torch.randn(41, 4, generator=g), torch.randn(30, 4, generator=g), torch.arange(41) % 5
    answers = [balcon.knn_predict(bank[rank::world], labels[rank::world], queries, k, split=True) for k in (1, 6, 41)]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten())
    for probe in ("crops", "cached"):  # batches of 9, 9 and 1: two of three ranks have nothing of the last
        cfg = SimpleNamespace(probe=probe, probe_batch=9, probe_epochs=4, probe_lr=5.0, probe_optimizer="sgd",
                              seed=0, size=2, k=3)
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
    cfg = SimpleNamespace(probe="cached", probe_batch=16, probe_epochs=5, probe_lr=20.0, probe_optimizer="sgd",
                          seed=3, size=2)
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
    cfg = SimpleNamespace(probe=probe, probe_batch=32, probe_epochs=20, probe_lr=5.0, probe_optimizer=optimizer,
                          seed=0, size=2)
    accuracy = balcon.linear_accuracy(net, blobs(90, 0, noise=20), blobs(30, 1, noise=20), cfg)
    assert accuracy > enough and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ------------------------------------------ command line, end to end ---------------------------
TINY = ("--limit 64 --batch-size 16 --epochs 2 --lr 0.1 --probe-epochs 3 --probe-lr 1").split()
MEASURED = ("knn", "linear", "untrained_knn", "untrained_linear")


def cli(*flags, processes=1, cwd=None):
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*start, str(HERE / "balcon.py"), *map(str, flags)], capture_output=True, text=True,
                          cwd=cwd, timeout=600)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def losses(folder):
    return {line["step"]: line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            if "step" in line}


def test_end_to_end_again_and_on_two_processes(tmp_path):
    done = cli(*TINY, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    header, found = balcon.read_log(tmp_path / "one" / "log.jsonl")[0], results(tmp_path / "one")
    assert header["argv"][1:] == [*TINY, "--out", str(tmp_path / "one")] and header["config"]["alpha"] == 4
    assert {"git", "versions", "hardware", "world_size"} <= set(header) and found["config"] == header["config"]
    assert all(0 <= found[name] <= 100 for name in MEASURED) and found["seconds"] > 0
    assert sorted(os.listdir(tmp_path / "one")) == ["last.pt", "log.jsonl", "results.json"]
    assert re.search(r"untrained +trained", done.stdout) and f"{found['knn']:.2f}" in done.stdout

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
    cfg = balcon.parse_flags(["--limit", "64", "--out", f"{folder}/none"])
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


def test_sigkill_loses_nothing(tmp_path):
    flags = [*TINY, "--epochs", "6", "--eval", "knn"]
    reference = cli(*flags, "--out", tmp_path / "whole")
    run = subprocess.Popen([sys.executable, str(HERE / "balcon.py"), *flags, "--out", str(tmp_path / "killed")])
    while not (tmp_path / "killed" / "last.pt").exists() and run.poll() is None:
        time.sleep(0.05)
    run.kill()
    run.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    again = cli(*flags, "--out", tmp_path / "killed")
    assert again.returncode == reference.returncode == 0, again.stderr
    assert results(tmp_path / "killed")["knn"] == results(tmp_path / "whole")["knn"]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "last.pt")["backbone"] for name in ("killed", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def train_here(out, kill_at=None):
    flags = [*TINY, "--epochs", "3", "--out", str(out)]
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
    balcon.pretrain(encoder, train, cfg)
    return encoder.state_dict()


def test_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    reference = train_here(tmp_path / "whole")  # 12 steps, 4 an epoch
    monkeypatch.setattr(balcon, "SAVE_SECONDS", -1)  # checkpoints within epochs too
    for kill_at, saved in ((3, None), (6, 4), (7, 10)):  # counted from the step it starts at
        with pytest.raises(Killed):
            train_here(tmp_path / "killed", kill_at)
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
    with pytest.raises(balcon.UserError, match="nan at step 8: lower --lr"):
        train_here(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["backbone"].values())


BAD = {
    "--alpha 0": "alpha", "--alpha nan": "alpha", "--lam -1": "lam", "--epochs -1": "epochs", "--lr inf": "lr",
    "--alpha x": "alpha", "--loss triplet": "loss", "--similarity manhattan": "similarity",
    "--dataset mnist": "dataset",
    "--backbone resnet19": "resnet19", "--stem big": "stem", "--batch-size 1": "batch-size", "--limit 0": "limit",
    "--drop crop": "drop", "--add fog": "add", "--eval speed": "eval", "--limit 5000": "4096",
    "--limit 100 --batch-size 128": "--batch-size", "--backbone pixels": "--epochs 0", "--frobnicate": "frobnicate",
    "--dataset folder --data nowhere": "nowhere", "--dataset cifar10 --data empty": "empty",
    "--checkpoint missing.pt": "missing.pt", "--checkpoint README": "README", "--out README": "README",
    "--dataset folder --data hollow": "cat", "--dataset folder --data flat": "class folder",
    "--dataset folder --data foreign": "class cat",
    "--dataset cifar10 --data mixed": "big.png",
    "--dataset folder --data broken --backbone resnet10 --batch-size 2 --epochs 1": "broken.png",
}


@pytest.fixture(scope="module")
def troubles(tmp_path_factory):
    root = tmp_path_factory.mktemp("troubles")
    (root / "README").write_text("no checkpoint")
    (root / "empty").mkdir()
    picture = Image.new("RGB", (32, 32), "red")
    (root / "flat" / "train").mkdir(parents=True)
    for place in ("hollow/train/dog", "hollow/train/cat", "hollow/val/dog", "foreign/train/cat", "foreign/val/dog",
                  "mixed/train/cat", "mixed/test/cat", "broken/train/cat", "broken/val/cat"):
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
    cfg = balcon.parse_flags(["--dataset", dataset.lower(), "--data", str(tmp_path / "d"), "--limit", "6"])
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
