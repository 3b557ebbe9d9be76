# SPDX-License-Identifier: MIT
"""Tests of balcon.py against plain loops in float64, torchvision and closed forms.

`pytest` needs no network and no data. Each test's name is what it claims.
"""
import contextlib
import errno
import inspect
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as TF

import balcon
from balcon import balanced_contrastive_loss, generalized_nt_xent_loss

HERE = Path(balcon.__file__).resolve().parent
CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
torch.set_num_threads(1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def load(path):
    return torch.load(path, weights_only=True)


def assert_close(got, expected, tolerance=1e-5):
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < tolerance


def assert_uniform(values, low, high):
    """By Kolmogorov and Smirnov's test, which a sound draw fails once in 1,500 times."""
    values = values.flatten().double().sort().values
    expected = torch.linspace(low, high, len(values), dtype=torch.float64)
    assert_close(values, expected, 2 / math.sqrt(len(values)) * (high - low))


def contiguous_only(call):
    """`call`, which sends memory as it lies, so NCCL refuses other tensors."""
    def checked(*arguments, **keywords):
        tensors = [x for x in tree_leaves(arguments) if torch.is_tensor(x)]
        assert all(x.is_contiguous() for x in tensors)
        return call(*arguments, **keywords)
    return checked


def on_a_rank(rank, folder):
    for name in ("all_reduce", "all_gather", "broadcast"):
        setattr(dist, name, contiguous_only(getattr(dist, name)))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results = {"losses": losses_and_gradients(), "evaluated": evaluated(folder),
               "trained": train_tiny(folder), "with norm": train_tiny(folder, norm=True)}
    torchvision.datasets.CIFAR10 = TorchvisionData
    results["CIFAR"] = [data.pixels for data in loaded(folder, dataset="cifar10")]
    torch.save(results, folder / f"{rank}.results")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """[{job: what it returned} on each of two processes], which are started once for all jobs."""
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.multiprocessing.spawn(on_a_rank, [folder], nprocs=2)
    return [torch.load(folder / f"{rank}.results", weights_only=False) for rank in (0, 1)]


@pytest.fixture
def pretend_ranks(monkeypatch):
    def pretend(rank, world):
        monkeypatch.setattr(balcon, "rank", lambda: rank)
        monkeypatch.setattr(balcon, "world_size", lambda: world)
    return pretend


# ----------------------------------------- losses -----------------------------------------
LOSSES = {"balanced": "balanced_contrastive_loss", "ntxent": "generalized_nt_xent_loss"}
KINDS = list(itertools.product(LOSSES, ["cosine", "dot", "euclidean"]))


def random_views(m, d):
    return torch.randn(2, m, d, dtype=torch.float64, generator=generator(m))


def similarity(x, y, kind):
    if kind == "euclidean":
        return -(x - y).square().sum()
    return x @ y if kind == "dot" else x @ y / (x.norm() * y.norm())


def loss_by_loops(name, z1, z2, alpha, lam, kind="cosine"):
    """Eq. 17 read aloud: each of the 2m anchors, its positive, and the list of what it repels."""
    z, m, total = torch.cat([z1, z2]).double(), len(z1), 0
    for i, anchor in enumerate(z):
        s = torch.stack([similarity(anchor, view, kind) for view in z])
        positive = (i + m) % (2 * m)
        repelled = [j for j in range(2 * m) if j % m != i % m or name == "ntxent" and j == positive]
        total = total - s[positive] + lam / alpha * (alpha * s[repelled]).logsumexp(0)
    return total / (2 * m)


@pytest.mark.parametrize("name, kind", KINDS)
def test_losses_are_their_equations_in_every_dtype_under_autocast_and_differentiated_twice(
        name, kind):
    loss = getattr(balcon, LOSSES[name])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        z = (300 * F.normalize(random_views(8, 5), dim=2)).to(dtype)  # 300² is no float16
        for alpha, lam in ((1, 1), (2, 4), (8, 0.5), (3, 0)):
            expected = loss_by_loops(name, *z, alpha, lam, kind).item()
            for autocast in (True, False):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    got = loss(*z, alpha, lam, kind)
                assert got.shape == () and got.dtype == torch.promote_types(dtype, torch.float32)
                assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    z = random_views(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(*z, 3.0, 2.0, kind), z)
    assert torch.autograd.gradgradcheck(lambda z: loss(*z, 3.0, 2.0, kind), z)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore")
def test_losses_work_under_compile_func_export_and_on_the_meta_device(name):
    def loss(z1, z2):
        return getattr(balcon, LOSSES[name])(z1, z2, 4.0, 2.0)

    z1, z2 = random_views(6, 5)
    first = z1.clone().requires_grad_()
    expected = loss_by_loops(name, first, z2, 4, 2)
    gradient, = torch.autograd.grad(expected, first)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(first, z2)
    assert_close(compiled.detach(), expected.detach())
    assert_close(torch.autograd.grad(compiled, first)[0], gradient)
    assert_close(torch.func.grad(loss)(z1, z2), gradient)
    batches = torch.randn(2, 3, 6, 5, generator=generator(0)).double()
    expected = [loss_by_loops(name, *pair, 4, 2) for pair in zip(*batches)]
    assert_close(torch.func.vmap(loss)(*batches), torch.stack(expected))
    module = nn.Identity()
    module.forward = loss
    m = torch.export.Dim("m", min=2, max=4096)
    exported = torch.export.export(module, (z1, z2), dynamic_shapes=({0: m}, {0: m})).module()
    larger = random_views(9, 5)
    assert_close(exported(*larger), loss_by_loops(name, *larger, 4, 2))
    assert loss(z1.to("meta"), z2.to("meta")).is_meta


@pytest.mark.parametrize("m, alpha, lam", [(2, 1, 1), (4, 4, 2), (12, 0.5, 0.3)])
def test_ntxent_is_cross_entropy_and_a_regular_simplex_has_the_least_balanced_loss(m, alpha, lam):
    z = F.normalize(random_views(m, 3), dim=2)
    logits = alpha * z.flatten(0, 1) @ z.flatten(0, 1).T
    simclr = F.cross_entropy(logits.fill_diagonal_(-math.inf), torch.arange(2 * m).roll(m))
    assert_close(alpha * generalized_nt_xent_loss(*z, alpha, 1), simclr)
    simplex = torch.eye(m, dtype=torch.float64) - 1 / m
    least = balanced_contrastive_loss(simplex, simplex, alpha, lam)
    assert_close(least, balcon.loss_floor(m, alpha, lam))
    for step in (1e-3, 0.1, 1):
        near = F.normalize(simplex, dim=1) + step * random_views(m, m)
        assert balanced_contrastive_loss(*near, alpha, lam) > least


def test_a_gpus_autocast_is_off_in_the_loss(monkeypatch):
    monkeypatch.setattr(torch, "autocast", Mock(wraps=torch.autocast))
    # torch 2.5 asks the driver even about fake tensors, but after autocast.
    with torch._subclasses.FakeTensorMode(), contextlib.suppress(RuntimeError):
        z = torch.empty(2, 4, 3, device="cuda")
        balanced_contrastive_loss(*z, 2, 1)
    assert torch.autocast.call_args.args[0] == "cuda"


def test_losses_refuse_nonsense():
    z = torch.ones(4, 3)
    for z1, z2, *arguments in (
        (z, z[:3], 1, 1), (z[:1], z[:1], 1, 1), (z, z, 0, 1), (z, z, -1, 1), (z, z, 1, -1),
        (z, z, math.nan, 1), (z, z, 1, math.nan), (z, z, math.inf, 1), (z, z, 1, 1, "manhattan"),
        (z.long(), z.long(), 1, 1), (z, z.long(), 1, 1), (z, z.double(), 1, 1),
        (z[0], z[0], 1, 1), (z[None], z[None], 1, 1),
    ):
        for loss in (balanced_contrastive_loss, generalized_nt_xent_loss):
            with pytest.raises(ValueError):
                loss(z1, z2, *arguments)


def losses_and_gradients():
    """{(loss, similarity): (loss, gradient of a step)} of this rank's images, by pasted code."""
    pasted = {"math": math, "torch": torch, "F": F, "dist": dist}  # an empty file's imports
    for name in LOSSES.values():
        exec(inspect.getsource(getattr(balcon, name)), pasted)
    rank = dist.get_rank()
    x = random_views(8, 6)[:, rank::2]
    results = {}
    for name, kind in KINDS:
        torch.manual_seed(1)
        net = nn.parallel.DistributedDataParallel(nn.Linear(6, 4, bias=False).double())
        loss = pasted[LOSSES[name]](*net(x.flatten(0, 1)).chunk(2), 4.0, 2.0, kind)
        loss.backward()
        results[name, kind] = loss.detach(), next(net.parameters()).grad
        if rank == 0:  # would wait for ever if it asked rank 1
            results["alone", name, kind] = pasted[LOSSES[name]](*x, 4, 2, kind, all_ranks=False)
    return results


def test_two_processes_have_the_loss_and_gradients_of_one_unless_told_to_compute_alone(two_ranks):
    first, second = (results["losses"] for results in two_ranks)
    x = random_views(8, 6)
    torch.manual_seed(1)
    weight = nn.Linear(6, 4, bias=False).double().weight
    for name, kind in KINDS:
        loss = loss_by_loops(name, *(x @ weight.T), 4, 2, kind)
        gradient, = torch.autograd.grad(loss, weight)
        assert_close((first[name, kind][0] + second[name, kind][0]) / 2, loss.detach(), 1e-9)
        for results in (first, second):
            assert_close(results[name, kind][1], gradient, 1e-9)
        alone = loss_by_loops(name, *x[:, ::2], 4, 2, kind)
        assert_close(first["alone", name, kind], alone, 1e-9)


# ----------------------------------------- views ------------------------------------------
PROBABILITIES = {"flip": 0.5, "color_jitter": 0.8, "grayscale": 0.2, "gaussian_blur": 0.5,
                 "random_cutout": 0.5, "random_rotation": 0.75, "gaussian_noise": 0.5}


class Recorder:
    """A t whose numbers are drawn here and kept for the oracle: none of balcon's code."""

    def __init__(self, n, seed=0):
        self.n, self.key, self.generator = n, (seed,), generator(seed)
        self.numbers, self.ranges = [], []

    def uniform(self, name, low, high, *shape):
        self.ranges.append((low, high))
        drawn = torch.rand(self.n, *shape, generator=self.generator)
        self.numbers.append(low + (high - low) * drawn)
        return self.numbers[-1]


def pixels(n, size):
    x = torch.rand(n, 3, size, size, generator=generator(0))
    x[0] = 0.5  # grey has no hue
    x[1, 0] = x[1, 1]  # ties between channels
    return x


def applied(name, x, seed=0):
    """All of x after an augmentation, the numbers that it asked for, and their ranges."""
    t = Recorder(len(x), seed)
    return balcon.AUGMENTATIONS[name][0](x.clone(), t), t.numbers, t.ranges


def blur(image, sigma):
    kernel = min(23, 2 * image.shape[-1] - 1)
    return TF.gaussian_blur(image, [kernel, kernel], [float(sigma)] * 2)


def cutout(image, centre):
    size = image.shape[-1]
    top, left = (centre.flatten() * size).int() - size // 4
    image = image.clone()
    hole = image[:, max(top, 0):top + size // 2, max(left, 0):left + size // 2]
    hole[:] = torch.tensor(MEAN)[:, None, None]
    return image


BY_TORCHVISION = {  # name: (the ranges of its numbers, what it does to an image)
    "flip": ([], lambda image, _: TF.horizontal_flip(image)),
    "grayscale": ([], lambda image, _: TF.rgb_to_grayscale(image, 3)),
    "gaussian_blur": ([(0.1, 2)], blur), "random_cutout": ([(0, 1)], cutout),
    "random_rotation": ([(1, 4)], lambda image, turns: torch.rot90(image, int(turns), (1, 2)))}


@pytest.mark.parametrize("size", [32, 7])
@pytest.mark.parametrize("name", BY_TORCHVISION)
def test_augmentations_are_torchvisions(name, size):
    x = pixels(60, size)
    got, numbers, ranges = applied(name, x)
    expected_ranges, function = BY_TORCHVISION[name]
    assert ranges == expected_ranges
    for image, number, changed in zip(x, *(numbers or [range(60)]), got):
        assert_close(changed, function(image, number))


CHANGES = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def jitter_order(seed):
    """An order of torchvision's changes that gives balcon's jitter of a whole batch."""
    x = pixels(3, 5)
    got, numbers, ranges = applied("color_jitter", x, seed)
    assert dict(zip(ranges, map(torch.numel, numbers))) == {(0.6, 1.4): 9, (-0.1, 0.1): 3}
    factor, turn = sorted(numbers, key=torch.numel, reverse=True)
    amounts = torch.cat([factor.view(3, 3), turn.view(3, 1)], 1).tolist()
    for order in itertools.permutations(range(4)):
        expected = []
        for image, amount in zip(x, amounts):
            for change in order:
                image = CHANGES[change](image, amount[change])
            expected.append(image)
        if (got - torch.stack(expected)).abs().max() < 1e-5:
            return order
    pytest.fail("no order of torchvision's changes")


def test_color_jitter_is_torchvisions_in_one_order_a_batch_and_all_24_occur():
    assert len({jitter_order(seed) for seed in range(140)}) == 24


def test_noise_is_gaussian_with_deviation_a_tenth_and_another_for_each_image():
    grey = torch.full((200, 3, 16, 16), 0.5)
    noise = applied("gaussian_noise", grey)[0] - grey
    assert_close(applied("gaussian_noise", grey - 0.01)[0], grey - 0.01 + noise)
    assert_uniform(torch.special.ndtr(noise / 0.1), 0, 1)
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(200)).abs().max() < 0.25
    assert applied("gaussian_noise", 2 * grey)[0].max() == 1


def test_numbers_are_uniform_and_a_function_of_key_and_name_of_which_ranks_see_their_rows():
    def numbers(key, name="sigma", rows=slice(None)):
        return balcon.Draw(key, 3000, rows).uniform(name, -1, 3, 2)

    key = (5, "views", 7)
    first = numbers(key)
    assert_uniform(first, -1, 3)
    for other in (numbers((5, "views", 8)), numbers((6, "views", 7)), numbers(key, "area"),
                  first.flip(1), first.roll(1, 0)):
        pair = torch.stack([first.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.06
    rows = torch.tensor([2900, 4, 17])
    assert torch.equal(numbers(key, rows=rows), first[rows])
    chosen = balcon.Draw(key, 3000, rows).only(torch.tensor([2, 0]))
    assert torch.equal(chosen.uniform("sigma", -1, 3, 2), first[[17, 2900]])


def test_every_number_has_a_name_of_its_own(monkeypatch):
    names, uniform = [], balcon.Draw.uniform
    monkeypatch.setattr(balcon.Draw, "uniform", lambda t, name, *more:
                        names.append(name) or uniform(t, name, *more))
    t = balcon.Draw(("key",), 99, torch.arange(99))
    balcon.random_crop_boxes(t, torch.full((99, 2), 8), (0.2, 1))
    balcon.augment(pixels(99, 8), t, list(PROBABILITIES))
    assert len(names) == len(set(names)) == 3 + 7 + 6


def crop_box(shape, areas, log_ratios, corners):
    """RandomResizedCrop.make_params, had it drawn these."""
    height, width = shape
    for area, log_ratio, (top, left) in zip(areas, log_ratios, corners):
        w = round(math.sqrt(area * height * width * math.exp(log_ratio)))
        h = round(math.sqrt(area * height * width / math.exp(log_ratio)))
        if w <= width and h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [5, 16, 40])  # to shrink and to grow
def test_crops_are_those_of_random_resized_crop_inside_each_image_of_a_padded_batch(size):
    x, t = pixels(300, 24), Recorder(300)
    shape = torch.randint(9, 25, (300, 2), generator=generator(3))
    shape[::7, 0] = shape[1::7, 1] = 4  # strips, for the eleventh box
    boxes = balcon.random_crop_boxes(t, shape, (0.1, 1))
    got = balcon.crop_resize(x, boxes, size)
    log = math.log(4 / 3)
    assert t.ranges == [(0.1, 1), pytest.approx((-log, log)), (0, 1)]
    numbers = [number.reshape(300, 10, -1).squeeze(2).tolist() for number in t.numbers]
    for i, ((height, width), *drawn) in enumerate(zip(shape.tolist(), *numbers)):
        box = crop_box((height, width), *drawn)
        assert tuple(boxes[i].tolist()) == box
        assert_close(got[i], TF.resized_crop(x[i], *box, [size, size]))


def file_images(files, size, workers=0):
    cfg = SimpleNamespace(size=size, workers=workers, data="")
    names = np.array(list(map(str, files)))
    return balcon.ImageFiles(torch.arange(len(names)), names, [], cfg)


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_one_two_and_three_ranks_see_the_same_crops_and_augmentations_in_order(
        kind, tmp_path, pretend_ranks):
    images = [torch.randint(256, (3, *shape), generator=generator(i)).byte() / 255
              for i, shape in enumerate([(32, 32), (45, 92), (92, 41)] * 3)]
    for i, image in enumerate(images):
        TF.to_pil_image(image).save(tmp_path / f"{i}.png")
    data = file_images(sorted(tmp_path.iterdir()), 16)
    if kind == "memory":
        data = balcon.read_into_memory(data, 16)
    assert {name: share for name, (_, share) in balcon.AUGMENTATIONS.items()} == PROBABILITIES
    rows, views = torch.tensor([4, 0, 8, 1, 2]), balcon.Views([*PROBABILITIES][::-1], 16, (0.2, 1))
    t = balcon.Draw(("key", 3), 10, torch.arange(10))  # two views of each row, view by view
    x = views_of([images[row] for row in rows.repeat(2)], t, *views).unflatten(0, (2, 5))
    for rank, world in ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 1)):
        pretend_ranks(rank, world)
        (step, got), = data.batches([(3, rows)], views, 2, ("key",))
        difference = (got - x[:, rank::world].flatten(0, 1)).abs()
        # Pillow crops files, and rounds to grey levels.
        assert step == 3 and difference.mean((1, 2, 3)).max() < 0.02
        assert kind == "files" or difference.max() < 1e-4
        (_, got), = data.batches([(3, rows)])
        for row, centre in zip(rows[rank::world], got):
            expected = TF.center_crop(images[row], [round(0.875 * min(images[row].shape[1:]))])
            expected = TF.normalize(TF.resize(expected, [16, 16]), MEAN, STD)
            assert (centre - expected).abs().mean() < 0.02
    (_, seen), = data.select(rows).batches([(3, torch.arange(5))])
    assert torch.equal(seen, got)


def views_of(images, t, names, size, scale):
    """A view of each of these images, with the numbers of t."""
    numbers = [t.uniform("area", *scale, 10), t.uniform("corner", 0, 1, 10, 2),
               t.uniform("ratio", math.log(3 / 4), math.log(4 / 3), 10)]
    crops = []
    for image, area, corner, ratio in zip(images, *(number.tolist() for number in numbers)):
        box = crop_box(image.shape[1:], area, ratio, corner)
        crops.append(TF.resized_crop(image, *box, [size, size]))
    x = torch.stack(crops)
    for name in names:
        chosen = t.uniform(f"apply {name}", 0, 1) < PROBABILITIES[name]
        if chosen.any():
            x[chosen] = balcon.AUGMENTATIONS[name][0](x[chosen], t.only(chosen))
    return TF.normalize(x, MEAN, STD)


def test_one_t_is_that_of_all_images_and_steps_but_of_one_key_only():
    image = torch.randint(256, (1, 3, 9, 9), generator=generator(0)).byte()
    same = balcon.in_memory(image.expand(3, 3, 9, 9), torch.zeros(3), ["a"])
    views = balcon.Views(list(PROBABILITIES), 8, (0.2, 1))
    steps = [(step, torch.arange(3)) for step in (0, 1)]
    first, other = (torch.cat([x for _, x in same.batches(steps, views, key=key, one_t=True)])
                    for key in "ab")
    assert len(first.unique(dim=0)) == 1 and not torch.equal(first, other)


def test_images_on_disk_stay_there_and_pixels_are_not_pickled(tmp_path, pretend_ranks, monkeypatch):
    put_images(tmp_path, "train/a/1.png  train/b/2.png  val/a/3.png  val/b/4.png")
    pretend_ranks(0, 2)
    monkeypatch.setattr(balcon, "from_rank_0", lambda decide: decide())
    assert loaded(tmp_path, dataset="imagenet")[0].pixels is None
    assert pictures(4).__getstate__()["pixels"] is None


def test_views_are_made_on_the_device_of_their_images():
    data = pictures(4, 32).to(torch.device("meta"))
    names = [name for name in PROBABILITIES if name != "gaussian_noise"]
    (_, x), = data.batches([(0, torch.arange(4))], balcon.Views(names, 16, (0.2, 1)), 2, ("key",))
    assert x.is_meta


def test_a_selection_stays_on_the_device_of_its_images():
    for data in (file_images(["a.png", "b.png"], 8), pictures(4)):
        assert data.to(torch.device("meta")).select(torch.tensor([0])).device.type == "meta"


# ----------------------------------------- recipes ----------------------------------------
CIFAR = dict(
    alpha=2, lam=4, epochs=200, batch_size=512, lr=0.1, momentum=0.9, weight_decay=1e-4, size=32,
    backbone="resnet18", stem="cifar", projector=[2048, 2048], crop_scale=[0.08, 1],
    augmentations=["flip", "color_jitter", "grayscale"], k=[1, 10], probe="crops",
    probe_epochs=90, probe_optimizer="sgd", probe_lr=30, probe_batch=256, probe_l2=0.03,
    theory_images=50_000, theory_views=10, eval=["knn", "linear"], baseline=True)
IMAGENET = CIFAR | dict(
    alpha=4, lam=2, epochs=100, backbone="resnet50", stem="imagenet", projector=[2048] * 3,
    size=224, crop_scale=[0.2, 1], k=[200], probe_optimizer="lars", probe_lr=0.1, probe_batch=4096,
    augmentations=["color_jitter", "grayscale", "gaussian_blur", "flip"], baseline=False)
RECIPES = {
    "cifar10": CIFAR, "cifar100": CIFAR, "imagenet": IMAGENET,
    "stl10": CIFAR | {"stem": "imagenet", "size": 96},
    "folder": IMAGENET | dict(
        backbone="resnet18", size=128, batch_size=128, projector=[512, 128], k=[5], baseline=True,
        probe="features", probe_optimizer="sgd", probe_lr=30, probe_batch=256),
    "patterns": CIFAR | dict(
        alpha=4, lam=2, size=24, epochs=5, batch_size=64, lr=0.5, backbone="resnet8",
        stem="imagenet", projector=[512, 128], crop_scale=[0.4, 1], k=[5], probe="features",
        theory_images=256, theory_views=4, eval=["knn", "linear", "bias", "bounds"])}


@pytest.mark.parametrize("dataset", RECIPES)
def test_recipes_are_the_papers_or_ours(dataset):  # A.3.1, A.4.1, A.4.2
    cfg = vars(balcon.parse_flags(["--dataset", dataset]))
    assert {name: cfg[name] for name in RECIPES[dataset]} == RECIPES[dataset]


@pytest.mark.parametrize("flags, names", {
    "--drop color_distortion": "gaussian_blur flip",
    "--drop gaussian_blur color_distortion": "flip",
    "--drop gaussian_blur --add random_cutout gaussian_noise":
        "color_jitter grayscale flip random_cutout gaussian_noise"}.items())
def test_drop_leaves_out_both_parts_of_color_distortion_and_add_appends(flags, names):
    cfg = balcon.parse_flags(f"--dataset imagenet {flags}".split())
    assert cfg.views == (names.split(), 224, [0.2, 1.0])


@pytest.mark.parametrize("gpu, precision", [("new", "bfloat16"), ("old", "float32")])
def test_bfloat16_is_the_default_on_gpus_that_compute_in_it(gpu, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        gpu == "new" or including_emulation)  # torch counts it unless told
    assert balcon.recipe_of("cifar10")["precision"] == precision


# ----------------------------------------- photographs ------------------------------------
def put_images(root, names):
    """Small files, each of its own grey."""
    for i, name in enumerate(names.split("  ")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9 * i, 9 * i, 9 * i)).save(root / name, "png")


def loaded(root, *flags, dataset="folder"):
    cfg = balcon.parse_flags(["--dataset", dataset, "--data", str(root), *flags])
    return balcon.load_data(cfg, CPU)


def refused(*arguments, **keywords):
    """What `loaded` says when it refuses."""
    with pytest.raises(balcon.UserError) as error:
        loaded(*arguments, **keywords)
    return str(error.value)


def ramps():
    """uint8 [40, 30, 3]: no axis and no channel is like another."""
    across, down = np.meshgrid(8 * np.arange(30), 6 * np.arange(40))
    return np.dstack([across, down, 255 - across]).astype(np.uint8)


def test_pixels_of_every_mode_come_out_right(tmp_path):
    photo = Image.fromarray(ramps())
    alpha = np.tile(np.linspace(0, 255, 30).astype(np.uint8), (40, 1))
    share = alpha[..., None] / 255.0
    palette = photo.quantize(64)
    images = {"rgb.png": photo, "grey.png": photo.convert("L"), "1.png": photo.convert("1"),
              "la.png": photo.convert("L"), "rgba.png": photo.copy(), "palette.png": palette}
    expected = {name: np.asarray(image.convert("RGB"), float) for name, image in images.items()}
    for name in ("la.png", "rgba.png"):
        images[name].putalpha(Image.fromarray(alpha))
        expected[name] = share * expected[name] + (1 - share) * 255
    palette.info["transparency"] = 3
    expected["palette.png"][np.asarray(palette) == 3] = 255
    images["cmyk.tif"], expected["cmyk.tif"] = photo.convert("CMYK"), ramps()
    for name, image in images.items():
        image.save(tmp_path / name)
        got = np.asarray(balcon.read_image(tmp_path / name), float)
        assert got.shape == (40, 30, 3) and abs(got - expected[name]).max() <= 1, name
    for dtype in (np.uint16, np.int32, np.float32):
        Image.fromarray(ramps()[..., 0].astype(dtype)).save(tmp_path / "a.tif")
        with pytest.raises(balcon.UserError, match="more than 8 bits"):
            balcon.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_come_out_upright_whatever_else_their_exif_holds(orientation, tmp_path):
    stored = np.asarray([
        ramps(), np.fliplr(ramps()), np.rot90(ramps(), 2), np.flipud(ramps()),
        ramps().transpose(1, 0, 2), np.rot90(ramps(), 1),
        np.rot90(ramps(), 2).transpose(1, 0, 2), np.rot90(ramps(), -1)][orientation - 1])
    # 0x112 is the orientation. The other tag holds a negative number as an unsigned one.
    tags = b"\x00\x01\x08\x00\x01\0\0\0\xff\xff\0\0\x12\x01\x03\x00\x01\0\0\0%c\0\0\0" % orientation
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + b"\0\0\0\0"
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    got = np.asarray(balcon.read_image(tmp_path / "a.jpg"), int)
    assert got.shape == (40, 30, 3) and abs(got - ramps()).max() < 6
    small = np.asarray(balcon.read_image(tmp_path / "a.jpg", 15), int)  # decoded to a half
    assert small.shape == (20, 15, 3)
    assert abs(small - ramps().reshape(20, 2, 15, 2, 3).mean((1, 3))).max() < 9


def test_large_images_are_reduced_without_aliasing(tmp_path):
    columns = (np.arange(60) % 2 * 255).astype(np.uint8)
    Image.fromarray(np.tile(columns, (80, 1))).save(tmp_path / "a.png")
    data = balcon.read_into_memory(file_images([tmp_path / "a.png"], 16), 16, math.sqrt(1200))
    assert data.shapes.tolist() == [[40, 30]]
    assert (data.pixels[0, :, :, 1:29].int() - 127).abs().max() < 40


def test_threads_deliver_batches_in_order(tmp_path):
    put_images(tmp_path, "  ".join(f"{i:02}.png" for i in range(24)))
    order = list(enumerate(torch.arange(24).split(2)))
    batches = file_images(sorted(tmp_path.iterdir()), 4, workers=2).batches(order)
    for place, (step, x) in enumerate(batches):
        grey = (x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255 / 9
        assert step == place and grey.round().tolist() == [2 * place, 2 * place + 1]


@pytest.mark.parametrize("shape", [(300, 400), (400, 267), (120, 900), (1500, 100), (50, 60)])
@pytest.mark.parametrize("scale", [(0.2, 1), (1, 1)])
def test_reading_at_reduced_size_never_enlarges_a_crop(shape, scale, tmp_path):
    Image.new("RGB", shape[::-1]).save(tmp_path / "a.png")
    train, _ = loaded(tmp_path, "--size", "32", "--crop-scale", *map(str, scale))

    def least_sides(shape):
        boxes = balcon.random_crop_boxes(Recorder(2000), shape.expand(2000, 2), scale)
        return boxes[:, 2:].min().item(), balcon.central_boxes(shape)[0, 2].item()

    for reduced, whole in zip(least_sides(train.shapes), least_sides(torch.tensor([shape]))):
        assert reduced >= min(32, whole) - 1  # a side is rounded
    assert train.shapes.prod() < 32 ** 2 * 9 or train.shapes.amin() < 40


def test_a_panorama_loses_its_ends_and_does_not_enlarge_the_memory_of_all(tmp_path):
    ramp = np.arange(900, dtype=np.uint32).repeat(30).reshape(900, 30) * 255 // 899
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    train, _ = loaded(tmp_path, "--size", "32")
    assert train.pixels.shape[-1] == 90 and train.shapes.tolist() == [[90, 30], [30, 40]]
    assert_close(train.pixels[0, :, :, 0].float().mean(1), torch.full((3,), 127.5), 2)
    (_, x), = train.batches([(0, torch.arange(2))])
    assert x.shape[2:] == (32, 32)


def test_unreadable_files_are_left_out_and_named_up_to_a_tenth(tmp_path, capsys):
    put_images(tmp_path, "  ".join(f"{'ab'[i % 2]}/{i:02}.png" for i in range(40)))
    broken = {"a/00.png": (tmp_path / "a/02.png").read_bytes()[:50], "a/04.png": b"",
              "b/01.png": b"<!DOCTYPE html><html>404</html>"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    train, test = loaded(tmp_path)
    names = {*train.names, *test.names}
    assert len(names) == 37 and not names & broken.keys()
    for data in (train, test):
        assert all(data.classes[label] == name[0] for label, name in zip(data.labels, data.names))
    screen = capsys.readouterr().out
    assert all(name in screen for name in broken)
    for i in range(6, 16, 2):
        (tmp_path / f"a/{i:02}.png").write_bytes(b"")
    assert "are unreadable" in refused(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "a/04.png").rename(tmp_path / "one/04.png")
    assert "1 of 1 images are unreadable" in refused(tmp_path / "one")


def test_ctrl_c_while_images_are_read_does_not_wait_for_all_of_them(monkeypatch):
    seen = []

    def slowly(file, side):
        seen.append(file)
        time.sleep(0.01)
        if len(seen) > 2:  # as where the main thread waits
            raise KeyboardInterrupt
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(balcon, "read_image", slowly)
    with pytest.raises(KeyboardInterrupt):
        balcon.read_into_memory(file_images(range(200), 16), 16)
    assert len(seen) < 100


@pytest.mark.parametrize("train, test", [
    ("train", "val"), ("Training", "Testing"), ("train", "valid"), ("TRAIN", "Validation"),
    ("train", "TEST")])
def test_folders_named_like_splits_are_splits_and_their_folders_classes(
        train, test, tmp_path, capsys):
    put_images(tmp_path / train, "снег/a.png  猫/b.GIF  猫/c/d.jpg  猫/.e.png  .f/g.png")
    put_images(tmp_path / train, "猫/notes.txt  猫/film.mpg  猫/x.h5  猫/scan.pdf")
    put_images(tmp_path / test, "猫/a.png  снег/b.png")
    data = loaded(tmp_path)
    assert [part.classes for part in data] == [["снег", "猫"]] * 2
    assert [part.labels.tolist() for part in data] == [[0, 1, 1], [0, 1]]
    assert data[0].names.tolist() == [f"{train}/{name}" for name in
                                      ("снег/a.png", "猫/b.GIF", "猫/c/d.jpg")]
    screen = capsys.readouterr().out
    assert "3 images of 2 classes: снег, 猫" in screen and "1 .pdf" in screen
    put_images(tmp_path, f"{test}/bird/a.png")
    assert "bird" in refused(tmp_path)


ALBUMS = {  # files: [(labels, names) of the training and test images], what is said
    "train/cover.png  train/a/1.png  train/b/2.png  val/a/3.png  val/b/4.png  extra/5.png":
        ("train/a/1.png train/b/2.png", [0, 1], "val/a/3.png val/b/4.png", "cover.png extra"),
    "train/a/1.png  train/b/2.png  val/3.png  test/a/4.png  test/b/5.png":
        ("train/a/1.png train/b/2.png", [0, 1], "test/a/4.png test/b/5.png",
         "val no|folders|of|the|same|classes"),
    "train/a/1.png  train/b/2.png  val/a/3.png":
        ("train/a/1.png train/b/2.png", [0, 1], None, "val no|folders|of|the|same|classes"),
    "train/a/1.png  train/b/2.png  val/a/3.png  val/b/4.png  test/a/5.png":
        ("train/a/1.png train/b/2.png", [0, 1], "val/a/3.png val/b/4.png", ""),
    "2024-05 München/1.png  2024-06/2.png  loose.png":
        ("2024-05|München/1.png 2024-06/2.png loose.png", [-1] * 3, None, "no|labels loose.png"),
    "1.png  2.png": ("1.png 2.png", [-1, -1], None, ""),
    "x/1.png  y/2.png": ("x/1.png y/2.png", [0, 1], None, "classes:|x,|y"),  # one image a class
    "x/1.png  x/y/2.png": ("x/1.png x/y/2.png", [-1, -1], None, ""),
    "train/1.png  train/2.png": ("train/1.png train/2.png", [-1, -1], None, ""),
    "a/1.ppm  b/2.jfif": ("a/1.ppm b/2.jfif", [0, 1], None, "")}


@pytest.mark.parametrize("names", ALBUMS)
def test_messy_folders_are_read_as_meant_and_named_for_what_they_are(names, tmp_path, capsys):
    put_images(tmp_path, names)
    train, test = loaded(tmp_path)
    train_names, labels, test_names, said = ALBUMS[names]
    assert train.names.tolist() == [name.replace("|", " ") for name in train_names.split()]
    assert train.labels.tolist() == labels and bool(train.classes) == (labels[0] == 0)
    assert (test and test.names.tolist()) == (test_names and test_names.split())
    screen = capsys.readouterr().out
    assert all(word.replace("|", " ") in screen for word in said.split())


def test_a_class_that_is_called_like_a_split_is_no_split(tmp_path):
    put_images(tmp_path, "apple/1.png  bear/2.png  train/3.png")
    for dataset in ("folder", "cifar100"):
        assert "apple/1.png" in refused(tmp_path, dataset=dataset)


@pytest.mark.parametrize("orientation", [0, 6])
def test_a_damaged_photograph_is_unreadable_and_not_partly_black(orientation, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif if orientation else None)
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError):
        Image.open(tmp_path / "a.png").load()
    with pytest.raises(balcon.UserError, match="cannot read"):
        balcon.read_image(tmp_path / "a.png")


def test_links_directories_hidden_files_and_runs_are_no_photographs(tmp_path, capsys):
    put_images(tmp_path, "a/1.png  a/2.png  b/3.png  a/IMG_4.HEIC  b/IMG_5.heic  b/.6.png")
    put_images(tmp_path, "a/x.png/@eaDir/7.png  b/runs/one/views.png  runs/views.png")
    for run in ("b/runs/one", "runs"):
        (tmp_path / run / "log.jsonl").write_text("{}")
    (tmp_path / "a/up").symlink_to("..", target_is_directory=True)
    (tmp_path / "b/itself").symlink_to(".", target_is_directory=True)
    put_images(tmp_path, ".hidden/8.png")
    (tmp_path / "b/link").symlink_to("../.hidden", target_is_directory=True)
    expected = ["a/1.png", "a/2.png", "a/x.png/@eaDir/7.png", "b/3.png", "b/link/8.png"]
    if ".heic" in Image.registered_extensions():  # pillow-heif is installed
        expected = sorted([*expected, "a/IMG_4.HEIC", "b/IMG_5.heic"])
    assert balcon.list_images(tmp_path) == expected
    assert len(expected) == 7 or "2 .heic" in capsys.readouterr().out


def test_too_many_photographs_for_memory_name_the_data_set_that_streams(tmp_path, monkeypatch):
    put_images(tmp_path, "a/1.png  b/2.png")
    monkeypatch.setattr(os, "sysconf", lambda name: 40)  # 533 bytes, and 2 · 3 · 8² are needed
    assert len(loaded(tmp_path)[0]) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # each rank holds all images
    assert "--dataset imagenet" in refused(tmp_path)


def test_a_fixed_tenth_is_held_out_and_limit_keeps_the_same_images_for_every_seed(tmp_path):
    put_images(tmp_path, "  ".join(f"{'many' if i < 20 else 'few'}/{i}.png" for i in range(25)))
    train, test = loaded(tmp_path)
    assert test.labels.bincount().tolist() == [1, 2]
    assert len({*train.names, *test.names}) == len(train) + len(test) == 25
    limited = [loaded(tmp_path, "--limit", "12", "--seed", seed)[0] for seed in "01"]
    assert limited[0].labels.bincount().tolist() == [4, 8]
    assert (limited[0].names == limited[1].names).all()
    assert not {*limited[0].names} & {*test.names}


# ----------------------------------------- other images, and the model --------------------
def test_patterns_are_balanced_and_those_of_the_test_are_others():
    train, test = (balcon.draw_patterns(80, split) for split in ("train", "test"))
    assert train.labels.bincount().tolist() == [10] * 8 == [10] * len(train.classes)
    near = torch.cdist(*(data.pixels.flatten(1).float() for data in (test, train))).amin(1)
    assert near.min() > 255 * 0.05 * math.sqrt(2 * 3072) * 0.7  # they differ by noise at least


class TorchvisionData:
    """CIFAR or STL-10 of four images a split; the splits differ."""

    def __init__(self, root, part, download):
        assert download
        seed = {True: 1, False: 2, "train+unlabeled": 1, "test": 2}[part]
        self.data = np.random.default_rng(seed).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        self.labels = self.targets = np.array([0, 1, -1 if seed == 1 else 1, 0])
        self.classes = ["a", "b"]
        if isinstance(part, bool):
            self.data = self.data.transpose(0, 2, 3, 1).copy()  # channels last also in memory


@pytest.mark.parametrize("dataset, side", [("cifar10", 32), ("cifar100", 32), ("stl10", 96)])
def test_torchvisions_data_sets_are_taken_as_they_are(dataset, side, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, dataset.upper(), TorchvisionData)
    for data, seed, label in zip(loaded(tmp_path, dataset=dataset), (1, 2), (-1, 1)):
        expected = np.random.default_rng(seed).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        assert torch.equal(data.pixels, torch.tensor(expected))
        assert data.labels.tolist() == [0, 1, label, 0]
    monkeypatch.setattr(torchvision.datasets, dataset.upper(), Mock(side_effect=OSError))
    assert str(tmp_path) in refused(tmp_path, dataset=dataset)
    # Class folders in its place: their images must have one size, and are evaluated whole.
    put_images(tmp_path, "train/a/1.png  train/b/2.png  test/a/3.png  test/b/4.png")
    for shape in ((8, 9), (9, 9)):
        Image.new("RGB", shape).save(tmp_path / "test/b/4.png")
        Image.new("RGB", (9, shape[1])).save(tmp_path / "test/a/3.png")
        assert "squares of one size" in refused(tmp_path, dataset=dataset)
    x = torch.randint(256, (3, side, side), generator=generator(0)).byte()
    for file in tmp_path.rglob("*.png"):
        TF.to_pil_image(x).save(file)
    for data in loaded(tmp_path, dataset=dataset):
        (_, got), = data.batches([(0, torch.arange(2))])
        assert_close(got[1], TF.normalize(x / 255, MEAN, STD))


def test_each_rank_has_the_pixels_of_the_file_whatever_its_order_in_memory(two_ranks):
    for results in two_ranks:
        for pixels, seed in zip(results["CIFAR"], (1, 2)):
            expected = np.random.default_rng(seed).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
            assert torch.equal(pixels, torch.tensor(expected))


def test_the_projector_and_the_stem_are_the_papers():  # A.3.1, A.4.1
    encoder = balcon.Encoder("resnet10", "cifar", [32, 16, 8])
    x = torch.randn(2, 3, 32, 32)
    assert_close(encoder(x), encoder.projector(encoder.backbone(x)))
    assert str(encoder.projector) == str(nn.Sequential(
        nn.Linear(512, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8, affine=False)))
    stem = [encoder.backbone.conv1, encoder.backbone.maxpool]
    assert str(stem) == str([nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()])
    # As torchvision's convolutions: normal, of He's variance by outputs.
    assert_uniform(torch.special.ndtr(stem[0].weight / math.sqrt(2 / (64 * 9))), 0, 1)


def test_weights_are_a_function_of_the_seed():
    states = [balcon.build_encoder(balcon.parse_flags(["--seed", seed]), CPU).state_dict()
              for seed in "001"]
    for name in ("backbone.layer1.0.conv1.weight", "projector.0.weight"):
        first, again, other = (state[name] for state in states)
        assert torch.equal(first, again) and not torch.equal(first, other)


def built_from(content, folder, *flags):
    """The backbone that --init makes of a file with this content."""
    torch.save(content, folder / "given.pt")
    flags = ["--projector", "8", "--init", str(folder / "given.pt"), *flags]
    return balcon.build_encoder(balcon.parse_flags(flags), CPU).backbone


@pytest.mark.parametrize("name, blocks", [("resnet8", 1), ("resnet10", 1), ("resnet18", 2)])
def test_backbones_are_torchvisions_and_init_takes_the_weights_that_fit(name, blocks, tmp_path):
    resnet, x = torchvision.models.resnet, torch.randn(2, 3, 32, 32)
    given = resnet.ResNet(resnet.BasicBlock, [blocks] * 4)
    if name == "resnet8":
        given.layer4, given.fc.in_features = nn.Identity(), 256
    weights, numbers = given.state_dict(), nn.Sequential(*list(given.children())[:-1]).state_dict()
    given.fc = nn.Identity()
    prefixed = [{f"{prefix}{key}": weight for key, weight in weights.items()} for prefix in
                ("module.", "backbone.", "encoder.", "module.encoder_q.", "1.", "backbone.0.")]
    prefixed += [{f"{prefix}{key}": weight for key, weight in numbers.items()} for prefix in
                 ("backbone.", "model.backbone.", "")]  # lightly
    before = {"head.bn1.weight": torch.zeros(64), "projector.1.bias": torch.zeros(64)}
    more = {"projection_head.0.weight": torch.zeros(3, 3), "queue": torch.zeros(2),
            **{f"module.encoder_k.{key}": 0 * weight for key, weight in weights.items()}}
    own = {"backbone": given.state_dict(), "projector": {}, "epoch": 3}
    for content in (weights, own, {"model": weights},
                    *({"state_dict": before | state | more} for state in prefixed)):
        backbone = built_from(content, tmp_path, "--backbone", name)
        assert str(backbone) == str(given)
        assert_close(backbone.eval()(x), given.eval()(x))
    taken = built_from(weights, tmp_path, "--backbone", name, "--stem", "cifar").state_dict()
    assert taken.pop("conv1.weight").shape[-1] == 3  # which does not fit
    assert all(torch.equal(weight, weights[name]) for name, weight in taken.items())
    with pytest.raises(balcon.UserError, match="most of its weights do not fit"):
        # Some of its batch norms have the same shapes.
        built_from(weights, tmp_path, "--backbone", "resnet50")


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert balcon.load_file(tmp_path / "a.pt")["a"].device.type == "cpu"


@pytest.mark.parametrize("flag", ["--init", "--checkpoint"])
def test_a_file_of_weights_runs_no_code(flag, tmp_path):
    class Trap:
        def __reduce__(self):  # what the unpickler calls
            return Path.touch, (tmp_path / "ran",)

    torch.save({"backbone": Trap()}, tmp_path / "a.pt")
    with pytest.raises(balcon.UserError, match="cannot read"):
        balcon.build_encoder(balcon.parse_flags([flag, str(tmp_path / "a.pt")]), CPU)
    assert not (tmp_path / "ran").exists()


# ----------------------------------------- evaluation -------------------------------------
def stub(patience=None):
    """An encoder that keeps what it sees, `patience` batches of it, and whose batch norms tell
    whether it is in eval mode."""
    torch.manual_seed(0)
    encoder = nn.Module()
    encoder.backbone = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    encoder.projector = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5))
    encoder.seen = []

    def see(module, inputs):
        if len(encoder.seen) == patience:
            raise KeyboardInterrupt
        encoder.seen.extend(inputs)

    encoder.backbone.register_forward_pre_hook(see)
    return encoder


def pictures(n, size=2, seed=0):
    """Images of three classes, whose red says which image it is, also in crops."""
    labels = torch.arange(n) % 3
    x = 128 + 40 * torch.randn(3, 3, size, size, generator=generator(9))[labels]
    x += 60 * torch.randn(n, 3, size, size, generator=generator(seed))
    x[:, 0] = 2 * torch.arange(n)[:, None, None] % 256
    return balcon.in_memory(x.clamp(0, 255).byte(), labels, ["a", "b", "c"])


def plain(data):
    return TF.normalize(data.pixels / 255, MEAN, STD)


def rows_of(x):
    red = x[:, 0].mean((1, 2)) * STD[0] + MEAN[0]
    return (255 / 2 * red).round().long()


def settings(**changes):
    cfg = balcon.parse_flags([])
    small = dict(views=balcon.Views(["flip"], 2, [1.0, 1.0]), size=2, precision="float32",
                 alpha=2.0, k=[1, 5, 99], theory_images=1000, theory_views=4, probe="features",
                 probe_l2=0.01, probe_lr=5.0, probe_batch=9, probe_epochs=3, images_digest="these")
    vars(cfg).update(small | changes)
    return cfg


def test_knn_is_a_majority_vote_by_cosine_and_ties_go_to_the_nearest():
    g = generator(0)
    bank = torch.randn(41, 4, generator=g) * 10 ** torch.randn(41, 1, generator=g)
    bank[7] = 0
    labels, queries = torch.randint(5, [41], generator=g), torch.randn(300, 4, generator=g)
    near = [F.cosine_similarity(bank, query[None]).argsort(descending=True) for query in queries]
    for k in range(1, 42):
        votes = [labels[rows[:k]].tolist() for rows in near]
        expected = [max(vote, key=vote.count) for vote in votes]  # the first, so the nearest
        assert balcon.knn_predict(bank, labels, queries, k).tolist() == expected


def test_linear_predict_finds_the_minimum_of_its_objective_whatever_the_scale_of_an_image(
        monkeypatch):
    monkeypatch.setattr(torch.optim, "LBFGS", Mock(wraps=torch.optim.LBFGS))
    g, labels = generator(0), torch.arange(90) % 3
    bank = torch.eye(3, 4)[labels] + torch.randn(90, 4, generator=g) + 1
    queries = torch.randn(3000, 4, generator=g) + 1
    x, q = F.normalize(bank.double(), dim=1), F.normalize(queries.double(), dim=1)
    q, x = (q - x.mean(0)) / x.std(0), (x - x.mean(0)) / x.std(0)
    w, b = torch.zeros(3, 4).double(), torch.zeros(3).double()
    for _ in range(1000):  # plain gradient descent
        error = (x @ w.T + b).softmax(1) - F.one_hot(labels)
        w = w - (error.T @ x / 90 + 0.1 * w)
        b = b - error.mean(0)
    for scale in (1, torch.rand(90, 1, generator=g) + 0.1):
        seen, asked = F.pad(scale * bank, [0, 1]), F.pad(3 * queries, [0, 1])  # a dead feature
        got = balcon.linear_predict(seen, labels, asked, 0.1)
        assert (got != (q @ w.T + b).argmax(1)).sum() <= 3  # on the border of two classes
    assert torch.optim.LBFGS.call_args.kwargs["max_iter"] >= 100  # for hundreds of features


def crops_classifier(out, patience=None, moved=0.0, **flags):
    """The classifier after 3 epochs (batches of 9, 9, 1 images), and what its backbone saw."""
    encoder = stub(patience)
    encoder.backbone[0].running_mean += moved
    cfg = settings(out=out, **{"seed": 5} | flags)
    classifier = balcon.train_classifier(encoder.backbone, 192, pictures(19, 8), cfg)
    (out / "classifier.pt").unlink()  # else the next call would find it finished
    assert all(weight.grad is None for weight in encoder.parameters())
    return classifier, encoder.seen


@pytest.mark.parametrize("name, lr", [("sgd", 5.0), ("lars", 500.0)])
def test_crops_classifier_is_a_softmax_regression_by_sgd_or_lars_on_fresh_crops_of_all_images(
        name, lr, tmp_path):
    start, _ = crops_classifier(tmp_path, probe_lr=1e-30)  # does not move
    other, others = crops_classifier(tmp_path, probe_lr=1e-30, seed=0)
    got, inputs = crops_classifier(tmp_path, probe_lr=lr, probe_optimizer=name)
    assert not torch.equal(start.weight, other.weight)
    assert not torch.equal(rows_of(inputs[0]), rows_of(others[0]))
    assert [len(x) for x in inputs] == 3 * [9, 9, 1]
    orders = [rows_of(torch.cat(inputs[i:i + 3])).tolist() for i in (0, 3, 6)]
    assert orders[0] != orders[1] != orders[2]
    assert all(sorted(order) == list(range(19)) for order in orders)
    weights, velocity = [*start.parameters()], [0, 0]
    for step, x in enumerate(inputs):
        rows, n = rows_of(x), len(x)
        t = balcon.Draw((5, "classifier views", step // 3, step % 3), n, torch.arange(n))
        views = views_of(pictures(19, 8).pixels[rows] / 255, t, ["flip"], 8, (0.08, 1))
        assert_close(x, views, 1e-4)
        features = views.flatten(1) / math.sqrt(1 + 1e-5)  # of the batch norm in eval mode
        loss = F.cross_entropy(F.linear(features, *weights), rows % 3)
        rate = lr * 9 / 256 * (1 + math.cos(math.pi * step / 9)) / 2
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            if name == "lars" and i == 0:  # the matrix; the bias is not scaled
                gradient = gradient * 0.001 * weights[0].norm() / gradient.norm()
            velocity[i] = 0.9 * velocity[i] + gradient
            weights[i] = (weights[i] - rate * velocity[i]).detach().requires_grad_()
    assert_close(got.weight, weights[0], 1e-4)
    assert_close(got.bias, weights[1], 1e-4)
    whole, more = (crops_classifier(tmp_path, probe_batch=n)[0] for n in (19, 99))
    assert_close(more.weight, whole.weight)  # the rate is that of 19 images


def test_lars_survives_a_gradient_of_zero():
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.zeros(2, 3)
    balcon.LARS([weight], lr=1.0).step()
    assert torch.equal(weight, torch.ones(2, 3))


def test_crops_classifier_resumes_only_with_its_backbone_settings_and_images(tmp_path):
    whole, inputs = crops_classifier(tmp_path)
    for changes, batches in (({}, 6), ({"moved": 0.1}, 9), ({"probe_lr": 4.0}, 9),
                             ({"images_digest": "others"}, 9)):
        with pytest.raises(KeyboardInterrupt):
            crops_classifier(tmp_path, patience=5)  # in the second of three epochs
        resumed, seen = crops_classifier(tmp_path, **changes)
        assert len(seen) == batches and torch.equal(seen[-1], inputs[-1])
        is_whole = not changes or "images_digest" in changes
        assert torch.equal(resumed.weight, whole.weight) == is_whole


def evaluated(folder):
    """Every figure, neighbours, and the features of the training and the test images."""
    train, test, results = pictures(19), pictures(60, seed=1), {}
    names = ["knn", "linear", "bias", "bounds"]
    features = balcon.evaluate("trained", stub(), train, test, names, results, settings(out=folder))
    balcon.evaluate("crops", stub(), train, test, ["linear"], results,
                    settings(out=folder, probe="crops"))
    figures = {"crops": results["crops"]["linear"]["linear"]}
    for name in names:
        figures |= results["trained"][name]
    del figures["settings"]
    return figures, results["trained"]["neighbors"]["rows"], features(train), features(test)


def test_the_classifier_on_features_has_the_penalty_named(monkeypatch):
    monkeypatch.setattr(balcon, "linear_predict", lambda *_: torch.full([9], _[-1]))
    found = balcon.linear_accuracy(None, plain, pictures(9), pictures(9), settings(probe_l2=2.0))
    assert found["linear"] == pytest.approx(100 / 3)  # of three classes, the third


def test_evaluation_is_in_eval_mode_and_counts_each_image_once_on_two_ranks(tmp_path, two_ranks):
    train, test = pictures(19), pictures(60, seed=1)
    one, rows, *features = evaluated(tmp_path)
    for data, x in zip((train, test), features):
        assert_close(x, plain(data).flatten(1), 1e-4)
    similar = F.cosine_similarity(plain(test).flatten(1)[:, None], plain(train).flatten(1), dim=2)
    votes = train.labels[similar.topk(5).indices].tolist()
    predicted = torch.tensor([max(vote, key=vote.count) for vote in votes])
    assert one["knn5"] == 100 * (predicted == test.labels).double().mean()
    assert one["eq51"] == pytest.approx(balcon.measure_bias(stub(), train, settings())["eq51"])
    assert 40 < one["linear"] < 100 and one["crops"] != one["linear"]  # two kinds of classifier
    for results in two_ranks:
        figures, its_rows, *its_features = results["evaluated"]
        assert figures == pytest.approx(one, rel=1e-4, abs=1e-5) and its_rows == rows
        for x, expected in zip(its_features, features):
            assert_close(x, expected)


MEASURES = {"knn": "knn_accuracy", "linear": "linear_accuracy", "bias": "measure_bias",
            "bounds": "measure_bounds", "neighbors": "find_neighbors"}
ALL = {*MEASURES}
DEPENDS = {  # a setting, another value: what is measured again
    ("k", (1, 20)): {"knn"}, ("probe_l2", 0.5): {"linear"}, ("probe", "crops"): {"linear"},
    ("probe_lr", 1.0): {"linear"}, ("theory_images", 7): {"bias", "bounds"}, ("size", 4): ALL,
    ("theory_views", 2): {"bias", "bounds"}, ("alpha", 3.0): {"bounds"}, ("lr", 3.0): set(),
    ("seed", 3): {"linear", "bias", "bounds"}, ("add", ("flip",)): {"bias", "bounds"},
    ("crop_scale", (0.5, 1.0)): {"bias", "bounds"}, ("drop", ("x",)): {"bias", "bounds"},
    ("augmentations", ("flip",)): {"bias", "bounds"}, ("workers", 1): set(), ("lam", 1.0): set(),
    ("data", "elsewhere"): set(), ("precision", "bfloat16"): {"knn", "linear", "neighbors"},
    ("images_digest", "others"): ALL}


@pytest.mark.parametrize("setting, value", DEPENDS)
def test_a_figure_is_measured_again_when_what_it_depends_on_changes(
        setting, value, tmp_path, monkeypatch):
    def evaluate(stage="trained", **changes):
        measured.clear()
        cfg = settings(out=tmp_path, **changes)
        balcon.evaluate(stage, encoder, pictures(3), pictures(3), ALL - {"neighbors"}, results, cfg)
        return set(measured)

    measured, encoder, results = [], stub(), {}
    for name, function in MEASURES.items():
        monkeypatch.setattr(balcon, function, lambda *_, name=name: measured.append(name) or {})
    assert evaluate() == ALL and evaluate() == set()
    change = {setting: value}
    assert evaluate(**change) == DEPENDS[setting, value]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    encoder.projector[0].weight.data += 1  # as a replaced checkpoint
    assert evaluate(**change) == evaluate("untrained", **change) == ALL


def test_neighbors_searches_what_is_extracted_or_else_5000_images_also_after_bounds(tmp_path):
    encoder, bank, test = stub(), pictures(5200), pictures(9, seed=1)
    x = plain(bank).flatten(1)
    for extracted, images in (({}, 5008), ({bank: x}, 8)):
        encoder.seen.clear()
        found = balcon.find_neighbors(encoder.backbone, extracted, bank, test, settings())
        assert sum(map(len, encoder.seen)) == images
        for query, rows in zip(found["queries"], found["rows"]):
            similar = F.cosine_similarity(x, plain(test)[query].flatten()[None])
            nearest = similar.topk(8 + 5200 // 20)  # some may be among those left out
            assert len(set(rows)) == 8 and set(rows) < set(nearest.indices.tolist())
            assert (similar[rows].diff() < 1e-6).all()
            if extracted:
                assert_close(similar[rows], nearest.values[:8])
    few = pictures(8)
    found = balcon.find_neighbors(encoder.backbone, {few: torch.ones(8, 12)}, few, None, settings())
    for query, rows in zip(found["queries"], found["rows"]):  # of a collapsed backbone
        assert sorted([query, *rows]) == [*range(8)]
    encoder.seen.clear()
    cfg = settings(out=tmp_path, theory_images=9, theory_views=2)
    balcon.evaluate("trained", encoder, bank, test, ["bounds"], {}, cfg)
    theory = 9 * (1 + 2 + 1 + 2)  # anchors, mean views, the bank, banks of one t
    assert sum(map(len, encoder.seen)) == theory + 5008


# ----------------------------------------- theory -----------------------------------------
def test_bias_is_extrapolated_and_relative_to_random_pairs_in_closed_form(monkeypatch):
    """Image i has the mean view 3·eᵢ in a direction of its own, and noise in others."""
    own, noise = 3 * torch.eye(12, 36), 2 * torch.eye(36)[12:].view(2, 12, 36).transpose(0, 1)
    seen = []

    def embed(encoder, data, cfg, name, n=1, groups=1, one_t=False):
        seen.append(name)
        rows = data.pixels[:, 0, 0, 0].long() // 2  # what `pictures` put there
        x = own[rows][:, None]
        if len(seen) == 2:  # x′, which lies twice as far away
            x = 2 * x
        return [x + noise[rows] if groups == 2 else x] * 3

    monkeypatch.setattr(balcon, "embed", embed)
    found = balcon.measure_bias(None, pictures(12), settings())
    expected = {"eq51_relative": math.sqrt((9 + 36) / 18),
                "eq16_relative": math.sqrt(9 * 3 / 4 / 18)}  # four images in a class
    for space in ("", "raw_", "features_"):
        got = {name: found[space + name] for name in expected}
        assert got == pytest.approx(expected, rel=1e-4)


def test_bias_has_one_t_for_two_images_of_a_class_and_every_image_its_own_mean_views():
    data, encoder = pictures(120), stub()
    data.labels = 2 * data.labels + 3  # with gaps
    cfg = settings(theory_images=100, precision="bfloat16")  # of which theory makes no use
    found = balcon.measure_bias(encoder, data, cfg)
    seen = torch.cat(encoder.seen)
    row, other_row, *view_rows = rows_of(seen).split(100)
    labels = data.labels[row]
    assert len(row.unique()) == 100 and labels.bincount().max() == 34
    assert (row != other_row).all() and torch.equal(labels, data.labels[other_row])
    assert all(torch.equal(row, rows) for rows in view_rows)
    flipped = (seen - plain(data)[rows_of(seen)]).abs().amax((1, 2, 3)) > 1e-4
    t, other_t, *view_ts = flipped.split(100)
    assert torch.equal(t, other_t) and t.any() and not t.all()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(view_ts, 2))
    features = seen.flatten(1).double()
    raw = encoder.double().eval().projector(features).detach()
    for space, z in {"features_": features, "raw_": raw, "": F.normalize(raw, dim=1)}.items():
        x, other, *views = z.split(100)
        halves = torch.stack(views).unflatten(0, (2, 2)).mean(1)
        lengths = []
        for mean in (halves.mean(0), *halves):
            class_mean = torch.stack([mean[labels == label].mean(0) for label in labels])
            lengths.append((class_mean - mean).norm(dim=1).mean())
        eq16 = math.sqrt(2 * lengths[0] ** 2 - ((lengths[1] + lengths[2]) / 2) ** 2)
        expected = {"eq51": (x - other).norm(dim=1).mean().item(), "eq16": eq16}
        assert {name: found[space + name] for name in expected} == pytest.approx(expected, 1e-4)


def test_random_pairs_are_of_all_classes_and_collapse_is_measured(monkeypatch):
    assert balcon.mean_norm(torch.tensor([[[1.0], [-1.0]]])) == 0  # less than its noise
    encoder = stub()
    nn.init.zeros_(encoder.projector[0].weight)
    found = balcon.measure_bias(encoder, pictures(12), settings())
    assert found["eq51_relative"] == found["eq16_relative"] == 0
    means = []

    def embed(encoder, data, cfg, name, n=1, groups=1, one_t=False):
        return [torch.eye(3)[data.labels][:, None].repeat(1, groups, 1)] * 3  # all alike

    monkeypatch.setattr(balcon, "embed", embed)
    monkeypatch.setattr(balcon, "mean_norm", lambda gaps: means.append(gaps) or 1.0)
    balcon.measure_bias(None, pictures(900), settings())
    apart = (means[0][:, 0].norm(dim=1) > 1).double().mean()
    assert apart.item() == pytest.approx(2 / 3, abs=0.06)


def sides_by_loops(anchor, mean_view, bank, labels, alpha):
    """Eq. 8, 10 and 46 read aloud."""
    rows, names = [], ["attract_left", "attract_right", "repel_left", "repel_right", "b", "nu"]
    for z, view, y in zip(anchor, mean_view, labels):
        classes = {int(c): bank[labels == c] for c in labels}
        means = [(alpha * members @ z).exp().mean() for members in classes.values()]
        b = sum(means).log() / alpha
        others = [members.mean(0) for c, members in classes.items() if c != y]
        nu = min(prototype.norm() for prototype in others)
        left = max(F.cosine_similarity(z, prototype, 0) for prototype in others)
        rows.append([-F.cosine_similarity(z, view, 0), -z @ view, left, b / nu, b, nu])
    return dict(zip(names, torch.tensor(rows).double().T))


def test_bounds_are_the_mean_gaps_and_the_shares_that_fail():
    data, encoder, cfg = pictures(12), stub(), settings(alpha=30.0, seed=16)
    noise = torch.randn(12, 3, 2, 2, generator=generator(4))
    data.pixels = (190 + 25 * noise).clamp(0, 255).byte()
    data.pixels[0] = torch.tensor([190, 5])  # its columns: flipped, it looks away from all others
    data.labels = torch.arange(12) // 5  # classes of 5, 5 and 2 images
    encoder.projector = nn.Identity()
    found = balcon.measure_bounds(encoder, data, cfg)
    seen = torch.cat(encoder.seen)
    flipped = (seen.view(10, 12, 3, 2, 2) - plain(data)).abs().amax((2, 3, 4)) > 1e-4
    assert 0 < flipped[5].sum() < 12  # the bank: each image has its own t
    assert len(flipped[:6].unique(dim=0)) == 6  # anchors, four views, the bank
    assert 0 < flipped[6:, 0].sum() < 4  # one t for each printed bank, not one for all
    assert not any(z.requires_grad for z in balcon.embed(encoder, data, cfg, "x"))
    assert (flipped[6:].all(1) | ~flipped[6:].any(1)).all()  # the printed ones: one t
    z = F.normalize(seen.flatten(1).double(), dim=1).split(12)
    (anchor, *views, bank), printed = z[:6], z[6:]
    side = sides_by_loops(anchor, sum(views) / 4, bank, data.labels, 30.0)
    printed = [sides_by_loops(anchor, bank, x, data.labels, 30.0)["b"] for x in printed]
    angle = side["attract_left"].neg().clamp(max=1).acos().rad2deg()
    assert found.pop("nu") == pytest.approx(side["nu"].min().item())
    assert found.pop("angle") == pytest.approx(angle.mean().item(), abs=0.05)
    expected = {"angle_over_90": 100 * (angle > 90), "b_negative": 100 * (side["b"] < 0),
                "b": side["b"], "attract_gap": side["attract_right"] - side["attract_left"],
                "repel_gap": side["repel_right"] - side["repel_left"],
                "printed_gap": sum(printed) / 4 / side["nu"] - side["repel_left"]}
    for name in ("attract", "repel", "printed"):
        expected[f"{name}_fails"] = 100 * (expected[f"{name}_gap"] < -1e-6)
    expected = {name: values.double().mean().item() for name, values in expected.items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert min(expected[name] for name in ("b_negative", "angle_over_90", "attract_fails")) > 0


# ----------------------------------------- subsets ----------------------------------------
def subset(labels, kind="lt", seed=0, limit=0, names=()):
    cfg = SimpleNamespace(subset=str(kind), seed=seed, limit=limit)
    return balcon.training_subset(cfg, names, labels)


def test_long_tail_is_that_of_imagenet_lt_and_sums_exactly_elsewhere():
    sizes = np.array(balcon.long_tailed_counts(1000, 115_846))
    assert (sizes.sum(), sizes.max(), sizes.min()) == (115_846, 1280, 5)
    few, many = (sizes < 20).sum(), (sizes > 100).sum()
    assert abs(few - 136) <= 10 and abs(many - 385) <= 10  # of the official list
    for classes, total, largest in ((8, 370, 512), (10, 4521, 1280), (100, 500, 500), (2, 11, 6)):
        sizes = balcon.long_tailed_counts(classes, total, largest)
        assert len(sizes) == classes and sum(sizes) == total
        assert 5 <= min(sizes) and max(sizes) <= largest
    for total in (49, 1001):
        with pytest.raises(balcon.UserError, match="--limit"):
            balcon.long_tailed_counts(10, total, 100)


def test_long_tailed_and_uniform_subsets_have_one_size_and_depend_on_the_seed():
    labels, counts = torch.cat([torch.arange(50_000) % 100, torch.full([1000], -1)]), {}
    for kind in ("lt", "uni"):
        first, again, other = (subset(labels, kind, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again) and labels[first].min() >= 0
        assert len(first.unique()) == len(other) == round(50_000 * 115_846 / 1_281_167)
        assert len(np.intersect1d(first, other)) < len(first) / 2
        counts[kind] = labels[first].bincount(minlength=100)
    assert counts["uni"].max() - counts["uni"].min() <= 1
    assert 5 <= counts["lt"].min() < 10 and counts["lt"].max() > 200
    assert not torch.equal(counts["lt"], labels[subset(labels, seed=1)].bincount(minlength=100))
    there = torch.tensor([6, 9, 40, 300, 5, 100, 7])  # no class gives more than it has
    labels = torch.arange(7).repeat_interleave(there)
    for seed in range(9):
        found = labels[subset(labels, seed=seed, limit=60)].bincount(minlength=7)
        assert found.sum() == 60 and (found <= there).all() and found.min() >= 5


LISTS = {  # content of a list: the rows that it names, or what the refusal says
    b"train/n02/a.JPEG 1\n\ntrain/n01/a.JPEG 0\n": [0, 2],  # as ImageNet-LT's
    b"n01/b.png\nx/y/n02/a.JPEG 7": [1, 2], b"\xef\xbb\xbfn01/a.JPEG 0\r\nn01/b.png 0\r\n": [0, 1],
    b"n01/b.png\nn01/z.JPEG 0": "n01/z.JPEG", b"a.JPEG": "a.JPEG", b" \n\n": "list.txt",
    b"n02/c.png 3": "names 2", b".": "list.txt", bytes(range(256)): "list.txt"}


def test_a_list_of_files_names_training_images_by_folder_and_file(tmp_path):
    file = tmp_path / "list.txt"
    names = ["d/n01/a.JPEG", "d/n01/b.png", "d/n02/a.JPEG", "e/n02/c.png", "f/n02/c.png"]
    for content, expected in LISTS.items():
        file.write_bytes(content)
        if isinstance(expected, str):
            with pytest.raises(balcon.UserError, match=expected):
                subset(torch.arange(5), file, names=names)
        else:
            assert subset(torch.arange(5), file, names=names).tolist() == expected


# ----------------------------------------- pictures ---------------------------------------
def tiles_of_picture(path, columns, side):
    """[rows, columns, side, side, 3], without the two pixels between them."""
    picture = np.array(Image.open(path)).astype(int)[2:, 2:]
    tiles = picture.reshape(-1, side + 2, columns, side + 2, 3)
    return tiles.transpose(0, 2, 1, 3, 4)[:, :, :side, :side]


def test_views_png_shows_each_image_beside_two_of_its_views(tmp_path):
    data = pictures(12)
    balcon.draw_views(data, settings(out=tmp_path))
    tiles = tiles_of_picture(tmp_path / "views.png", 3, 64)
    # One pixel of each quarter, since a tile shows an image of 2×2 pixels.
    tiles = tiles[:, :, [15, 48]][:, :, :, [15, 48]]
    images = data.pixels.permute(0, 2, 3, 1).numpy().astype(int)[:, None]
    same = abs(tiles - images).max((2, 3, 4)) <= 1
    flipped = abs(tiles - images[..., ::-1, :]).max((2, 3, 4)) <= 1
    assert same[:, 0].all() and (same ^ flipped).all()
    assert 4 < flipped[:, 1:].sum() < 20 and (flipped[:, 1] != flipped[:, 2]).any()


@pytest.mark.parametrize("with_test", [True, False])
def test_neighbors_png_frames_the_right_class_below_the_untrained_row(
        with_test, tmp_path, capsys):
    train, test = pictures(20, 1), pictures(8, 1) if with_test else None
    asked, queries, results = test or train, [0, 1, 2, 7], {}
    asked.labels[7] = -1
    train.labels[8:16] = -1
    own = 100 if with_test else 0  # how much lighter the test images are
    asked.pixels += own
    for stage in ("trained", "untrained"):
        rows = [torch.randperm(20, generator=generator(len(stage) + i))[:8].tolist()
                for i in queries]
        results[stage] = {"neighbors": {"queries": queries, "rows": rows}}
    balcon.draw_neighbors(train, test, results, settings(out=tmp_path))
    tiles = tiles_of_picture(tmp_path / "neighbors.png", 9, 72)
    green = (abs(tiles - (25, 178, 51)).max(-1) <= 1).sum((2, 3))
    assert len(tiles) == 8 and set(green.flat) <= {0, 72 ** 2 - 64 ** 2}  # whole frames or none
    for line, (i, stage) in enumerate(itertools.product(range(4), ("untrained", "trained"))):
        rows = torch.tensor(results[stage]["neighbors"]["rows"][i])
        expected = np.array([own + 2 * queries[i], *(2 * rows).tolist()])
        assert abs(tiles[line, :, 36, 36, 0] - expected).max() <= 1
        label = asked.labels[queries[i]]
        right = (train.labels[rows] == label) & (label >= 0)
        assert (green[line] > 0).tolist() == [False, *right.tolist()]
    assert "above the trained one" in capsys.readouterr().out


# ----------------------------------------- training ---------------------------------------
class TinyEncoder(nn.Module):
    """In float64, so that rounding hides no difference."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Conv2d(3, 6, 5, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten()]
        self.backbone = nn.Sequential(*(layers if norm else [layers[0], *layers[2:]]))
        self.projector = nn.Linear(24, 5)
        self.double()
        self.autocast = set()

    def forward(self, x):
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", enabled=False):
            return self.projector(self.backbone(x.double()))


TINY = """--dataset cifar10 --size 8 --batch-size 4 --epochs 4 --lr 0.3 --momentum 0.7 --seed 5
    --weight-decay 0.05 --alpha 3 --lam 1.5 --precision float32 --save-every 2"""
TINY_PIXELS = torch.randint(256, (13, 3, 8, 8), dtype=torch.uint8, generator=generator(1))
TINY_IMAGES = balcon.in_memory(TINY_PIXELS, torch.arange(13), [])


def tiny_settings(folder, *flags):
    cfg = balcon.parse_flags([*TINY.split(), "--out", str(folder), *flags])
    cfg.images_digest = "these"
    cfg.out.mkdir(exist_ok=True)
    return cfg


def logged(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line]


def train_tiny(folder, norm=False, *flags):
    """Four epochs of three steps, with one image of 13 left out in each: weights, log, files."""
    cfg = tiny_settings(folder / f"tiny {norm}", *flags)
    encoder = TinyEncoder(norm).eval()  # as an evaluation leaves it
    balcon.pretrain(encoder, TINY_IMAGES, cfg)
    files = {path.name: load(path) for path in cfg.out.glob("*.pt")}
    return encoder.state_dict(), logged(cfg.out), files


def weights_in(checkpoint):
    return {f"{part}.{name}": value for part in ("backbone", "projector")
            for name, value in checkpoint[part].items()}


def replay_tiny(loss, norm, kind="cosine"):
    """Weights before each step and after the last; losses, rates and spreads, by hand."""
    net = TinyEncoder(norm)
    parameters, states, figures = dict(net.named_parameters()), [], []
    velocity = dict.fromkeys(parameters, 0)
    for step in range(12):
        states.append({name: value.clone() for name, value in net.state_dict().items()})
        order = torch.randperm(13, generator=balcon.rng(5, "order", step // 3))
        rows = order[4 * (step % 3):][:4].repeat(2)
        t = balcon.Draw((5, "views", step), 8, torch.arange(8))
        x = views_of(TINY_PIXELS[rows] / 255, t, CIFAR["augmentations"], 8, (0.08, 1))
        z1, z2 = net(x).chunk(2)
        value = loss_by_loops(loss, z1, z2, 3, 1.5, kind)
        rate = 0.3 * (1 + math.cos(math.pi * step / 12)) / 2
        spread = 1 - F.normalize(z1, dim=1).mean(0).square().sum().item()
        figures.append({"loss": value.item(), "lr": rate, "spread": spread})
        gradients = torch.autograd.grad(value, parameters.values())
        for (name, w), gradient in zip(parameters.items(), gradients):
            velocity[name] = 0.7 * velocity[name] + gradient + 0.05 * w.detach()
            w.data -= rate * velocity[name]
    return [*states, net.state_dict()], figures


def train_in_two_sessions(folder, loss, monkeypatch):
    """By a clock that goes on by a second whenever somebody looks at it."""
    monkeypatch.setattr(balcon.time, "perf_counter", itertools.count(1000).__next__)
    save = balcon.Session.save

    def stop_at_2(session, epoch):
        save(session, epoch)
        if epoch == 2 and session.first_epoch == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(balcon.Session, "save", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(folder, True, "--loss", loss)
    before = load(folder / "tiny True/last.pt")["seconds"]
    weights, log, files = train_tiny(folder, True, "--loss", loss)
    times = [line["seconds"] for line in log]
    assert times == sorted(set(times)) and times[2] < before < times[3]
    assert times[-1] < files["last.pt"]["seconds"] < 30
    for line in log[3:]:  # four images a step since the second start
        speed = 4 * (line["step"] - 6) / (line["seconds"] - before)
        assert line["images_per_second"] == pytest.approx(speed)
    return weights, log, files


@pytest.mark.parametrize("loss, ranks", [("ntxent", 1), ("balanced", 1), ("balanced", 2)])
def test_pretraining_is_sgd_with_momentum_decay_and_a_cosine_on_the_loss_named(
        loss, ranks, tmp_path, two_ranks, monkeypatch):
    if ranks == 1:
        trained, log, files = train_in_two_sessions(tmp_path, loss, monkeypatch)
    else:  # without a batch norm: on CPUs each rank has its own
        trained, log, files = two_ranks[0]["trained"]
    states, figures = replay_tiny(loss, norm=ranks == 1)
    logged_steps = [1, 3, 6, 7, 9, 10, 12] if ranks == 1 else [1, 3, 6, 9, 10, 12]
    assert [line["step"] for line in log] == logged_steps  # first, tens, ends of epochs
    for line in log:
        expected = figures[line["step"] - 1] | {"epoch": line["step"] / 3}
        if loss == "balanced":  # the least value of Eq. 17 for four images
            expected["above_floor"] = expected["loss"] + 1 + 1.5 / 3 - 1.5 / 3 * math.log(6)
        if ranks == 2:  # the spread is of a rank's own images
            del expected["spread"]
        assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    epochs = {"epoch0000.pt": 0, "epoch0002.pt": 2, "epoch0004.pt": 4, "last.pt": 4}
    assert {name: file["epoch"] for name, file in files.items()} == epochs
    for weights, epoch in [*((weights_in(files[name]), epochs[name]) for name in epochs),
                           (trained, 4)]:
        torch.testing.assert_close(weights, states[3 * epoch], rtol=0, atol=1e-4)
    # Also the running statistics, where they trained apart.
    first, second = (results["with norm"][0] for results in two_ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_pretraining_has_the_similarity_named(tmp_path):
    _, log, _ = train_tiny(tmp_path, True, "--similarity", "dot")
    assert log[0]["loss"] == pytest.approx(replay_tiny("balanced", True, "dot")[1][0]["loss"])


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(balcon.UserError, match="lower --lr"):
        train_tiny(tmp_path, False, "--lr", "1e300")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_is_on_for_bfloat16_and_off_for_float32(precision, tmp_path, monkeypatch):
    cfg = tiny_settings(tmp_path, "--precision", precision, "--epochs", "1")
    encoder, images = TinyEncoder(True), pictures(6)
    balcon.pretrain(encoder, TINY_IMAGES, cfg)
    assert encoder.autocast == {precision == "bfloat16"}
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 12, bias=False))
    nn.init.eye_(linear[1].weight)
    exact = plain(images).flatten(1)
    features = balcon.extract(linear, images, cfg)
    assert features.dtype == torch.float32
    assert_close(features, exact.to(getattr(torch, precision)).float(), 1e-6)
    # The classifier itself is trained in float32, on such features.
    balcon.train_classifier(linear, 12, images, settings(out=tmp_path, precision=precision))
    monkeypatch.setattr(torch, "autocast", Mock())
    balcon.autocast(torch.device("cuda"), cfg)
    assert torch.autocast.call_args.args[0] == "cuda"


@pytest.mark.parametrize("device, kinds", [
    ("cuda", {"SyncBatchNorm"}), ("cpu", {"BatchNorm1d", "BatchNorm2d"})])
def test_batch_norm_is_synchronised_on_gpus(device, kinds, monkeypatch, pretend_ranks):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda module: module)
    pretend_ranks(0, 2)
    encoder = balcon.Encoder("resnet8", "cifar", [8, 4])
    weights = {weight.data_ptr() for weight in encoder.parameters()}
    model = balcon.distribute(encoder, torch.device(device))
    found = {type(module).__name__ for module in model.modules()}
    assert {name for name in found if "BatchNorm" in name} == kinds
    assert {weight.data_ptr() for weight in model.parameters()} == weights


# ----------------------------------------- runs and resuming ------------------------------
SMALL = """--dataset folder --data photos --size 16 --backbone resnet8 --projector 16 --epochs 3
    --batch-size 8 --no-baseline --workers 0 --eval knn bounds --theory-images 16
    --theory-views 2""".split()
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
MORTAL = """# Dies by SIGKILL when last.pt is about to be replaced.
import os, pathlib, signal, balcon
replace = os.replace
def deadly(draft, path):
    if path.name == "last.pt" and path.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    replace(draft, path)
os.replace = deadly
balcon.main()
"""


def launch(place, processes, program, out, *flags):
    """Run a program on the CPU with the flags SMALL, under torchrun if in two processes."""
    surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(HERE), "PYTHONIOENCODING": ["cp1252", "ascii"][processes - 1]}
    command = [sys.executable, *(TORCHRUN if processes == 2 else []), program, *SMALL]
    return subprocess.run([*command, "--out", out, *flags], cwd=place, env=surroundings,
                          capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of small images, of things that are wrong, and of finished runs of SMALL."""
    root = tmp_path_factory.mktemp("place")
    for i in range(56):  # stripes along one axis or the other, 44 to train on
        split = "train" if i < 44 else "val"
        noise = np.random.default_rng(i).random((16, 16))
        wave = np.sin(np.arange(16) * (0.5 + noise[0, 0]))[:, None] + noise
        grey = Image.fromarray((60 * (wave.T if i % 2 else wave) + 64).astype(np.uint8))
        for folder in (root / "photos" / split / "ab"[i % 2], root / "flat"):
            folder.mkdir(parents=True, exist_ok=True)
            grey.save(folder / f"{i}.png")
    put_images(root, "wrong size/train/a/0.png  wrong size/train/b/1.png  no train/test/a/2.png")
    Image.new("RGB", (8, 9)).save(root / "wrong size/train/b/1.png")
    (root / "text.jsonl").write_text("no JSON")
    (root / "mortal.py").write_text(MORTAL)
    torch.save({"backbone": {"weight": torch.zeros(3)}}, root / "foreign.pt")
    config = balcon.values_of(balcon.parse_flags(["--precision", "float32"]), balcon.MAKES_WEIGHTS)
    (root / "newer").mkdir()
    torch.save({"config": config | {"warmup": 3}}, root / "newer/last.pt")
    torch.save({"config": None, 1: torch.zeros(3)}, root / "odd.pt")
    for processes in (1, 2):
        done = launch(root, processes, HERE / "balcon.py", f"run{processes}")
        assert done.returncode == 0, done.stderr
        (root / f"screen{processes}").write_text(done.stdout)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def run_here(place, monkeypatch, capfd):
    """Run balcon.main on the CPU, in `place`, with the words: its screen, or with code=2 the one
    sentence that it ends with."""
    def run(*words, code=0):
        words = [*map(str, words)]
        monkeypatch.setattr(sys, "argv", ["balcon.py", *words])
        with pytest.raises(SystemExit) as stop:
            balcon.main(words)
        screen, sentence = capfd.readouterr()
        assert stop.value.code == code, sentence
        assert code < 2 or sentence.startswith("balcon: ") and sentence.count("\n") == 1
        return sentence if code == 2 else screen

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(place)
    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def assert_same_weights(run, other):
    first, second = (weights_in(load(folder / "last.pt")) for folder in (run, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_run_in_a_pipe_prints_a_line_at_its_first_step_and_after_each_epoch(place):
    screen = (place / "screen1").read_text()
    lines = [line.split() for line in screen.splitlines() if "epoch " in line]
    assert [line[2] for line in lines] == ["0.2/3", "1.0/3", "2.0/3", "3.0/3"]
    assert "loss" in lines[0] and "(floor" in lines[0] and "\r" not in screen
    assert "2 classes: a, b" in screen and "?, length of the shortest" in screen  # no ν in cp1252
    kept = ["last.pt", "log.jsonl", "neighbors.png", "results.json", "views.png"]
    assert sorted(path.name for path in (place / "run1").iterdir()) == kept
    first = json.loads((place / "run1/log.jsonl").read_text().split("\n")[0])
    assert first["argv"][1:] == [*SMALL, "--out", "run1"] and first["config"]["epochs"] == 3
    assert {"git", "torch", "hardware", "processes"} < first.keys()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_and_ends_bit_identical(processes, place):
    whole = place / f"run{processes}"
    out = place / f"killed{processes}"
    died = launch(place, processes, "mortal.py", out)
    assert died.returncode and list(out.glob("last.pt.*.tmp")), died.stderr
    done = launch(place, processes, HERE / "balcon.py", out)
    assert done.returncode == 0 and "resuming after epoch 1" in done.stdout, done.stderr
    assert_same_weights(whole, out)
    assert results_of(out) == results_of(whole) and len(logged(whole)) == 4  # by one rank
    losses, again = ({line["step"]: line["loss"] for line in logged(run)} for run in (whole, out))
    assert again.items() >= losses.items()


def test_a_finished_run_measures_only_what_changed_and_makes_no_step(
        place, run_here, monkeypatch):
    counted, in_chunks = [], balcon.in_chunks  # how many images or views the backbone sees at once
    monkeypatch.setattr(balcon, "in_chunks", lambda network, x:
                        counted.append(len(x)) or in_chunks(network, x))
    again = shutil.copytree(place / "run1", place / "again")
    monkeypatch.setattr(torch.optim.SGD, "step", None)  # it must make no step
    files = [again / name for name in ("last.pt", "results.json")]
    before = [path.read_bytes() for path in files]
    assert "already trained" in run_here(*SMALL, "--out", again) and counted == []
    assert [path.read_bytes() for path in files] == before
    assert logged(again) == logged(place / "run1")
    known = results_of(again)["trained"]
    flags = [*SMALL, "--out", again, "--eval", "knn", "linear", "bounds"]
    for more, name, images in (
        ("--probe features", "linear", {12, 44}), ("--k 1 20", "knn", {12, 44}),
        ("--theory-images 20", "bounds", {20, 40}), ("--probe-l2 0.5", "linear", {12, 44}),
    ):
        flags += more.split()
        counted.clear()
        run_here(*flags)
        assert set(counted) == images
        found = results_of(again)["trained"]
        assert {key for key in found if found[key] != known.get(key)} == {name}
        known = found
    assert "knn20" in known["knn"] and files[0].read_bytes() == before[0]


@pytest.fixture
def stopped(place, run_here, monkeypatch, tmp_path):
    """A function that runs SMALL until it is stopped in this epoch; the run's folder."""
    def stop(epoch, *flags):
        save = balcon.Session.save

        def stop_before(session, number):
            if number == epoch:
                raise KeyboardInterrupt
            save(session, number)

        with monkeypatch.context() as patch:
            patch.setattr(balcon.Session, "save", stop_before)
            sentence = run_here(*SMALL, "--out", tmp_path / "run", *flags, code=2)
        assert sentence == "balcon: stopped; the same command resumes\n"
        return tmp_path / "run"

    return stop


def test_a_run_resumes_after_its_data_moved_and_with_other_workers(
        place, run_here, stopped, tmp_path):
    out = stopped(epoch=2)
    shutil.copytree(place / "photos", tmp_path / "moved here")
    screen = run_here(*SMALL, "--data", tmp_path / "moved here", "--workers", "2", "--k", "3",
                      "--out", out)
    assert "resuming after epoch 1" in screen
    assert_same_weights(place / "run1", out)
    sentence = run_here(*SMALL, "--epochs", "4", "--out", out, code=2)
    assert "epochs 3, not 4" in sentence and f"--init {out}/last.pt" in sentence


@pytest.mark.parametrize("old, new", [
    ("*/b", "c"), ("val/a/44.png", "new.png"), ("train/a/0.png", "../b/0.png")])
def test_other_images_are_refused_once_an_epoch_is_finished_and_not_before(
        old, new, place, run_here, stopped, tmp_path):
    data = shutil.copytree(place / "photos", tmp_path / "photos")
    for path in data.glob(old):
        path.rename(path.parent / new)
    stopped(epoch=1)
    out = stopped(2, "--data", data)  # until an epoch is finished, images may change
    before = files_in(out)
    sentence = run_here(*SMALL, "--out", out, code=2)
    assert "other images or labels" in sentence and "--init" in sentence
    assert files_in(out) == before


def test_baseline_training_export_and_workers_in_one_run(place, run_here):
    run_here(*"""--dataset imagenet --data photos --size 16 --backbone resnet8 --projector 16
        --epochs 2 --batch-size 8 --baseline --workers 2 --k 1 3 5 7 9 --probe-epochs 2
        --probe-batch 16 --lr 0.5 --export streamed.npz --out streamed""".split())
    exported, results = np.load("streamed.npz"), results_of(place / "streamed")
    assert exported["classes"].tolist() == ["a", "b"]
    torch.manual_seed(0)
    backbone = balcon.Encoder("resnet8", "imagenet", [16]).backbone
    for stage in ("untrained", "trained"):
        if stage == "trained":
            backbone.load_state_dict(load(place / "streamed/last.pt")["backbone"])
        features, labels = {}, {}
        for split, n in (("train", 44), ("test", 12)):
            files = [place / "photos" / name for name in exported[f"{split}_files"].tolist()]
            assert len(set(files)) == n
            labels[split] = torch.tensor([int(file.parent.name == "b") for file in files])
            assert exported[f"{split}_labels"].tolist() == labels[split].tolist()
            crops = [TF.center_crop(Image.open(file).convert("RGB"), [14]) for file in files]
            x = torch.stack([TF.pil_to_tensor(TF.resize(crop, [16, 16])) for crop in crops]) / 255
            with torch.no_grad():  # 14: 7/8 of 16
                features[split] = backbone.eval()(TF.normalize(x, MEAN, STD))
            difference = np.abs(exported[f"{split}_features"] - features[split].numpy()).max()
            assert (difference < 1e-4) == (stage == "trained")
        similar = F.cosine_similarity(features["test"][:, None], features["train"], dim=2)
        for k in (1, 3, 5, 7, 9):
            voters = labels["train"][similar.topk(k).indices].double()
            right = (voters.mean(1) > 0.5) == labels["test"]
            expected = 100 * right.double().mean().item()
            assert results[stage]["knn"][f"knn{k}"] == pytest.approx(expected)
        assert results[stage]["linear"].keys() == {"settings", "linear"}


def test_a_checkpoints_limit_and_subset_do_not_apply_to_another_data_set(tmp_path):
    cfg = balcon.parse_flags("--dataset cifar10 --limit 20 --subset uni --lr 0.3 --k 7".split())
    torch.save({"config": balcon.values_of(cfg, balcon.MAKES_WEIGHTS)}, tmp_path / "a.pt")
    flags = ["--checkpoint", str(tmp_path / "a.pt")]
    own = balcon.parse_flags(flags)
    assert (own.dataset, own.limit, own.subset, own.lr) == ("cifar10", 20, "uni", 0.3)
    other = balcon.parse_flags([*flags, "--dataset", "cifar100"])
    assert (other.dataset, other.limit, other.subset, other.lr) == ("cifar100", 0, "full", 0.3)
    assert balcon.parse_flags([*flags, "--limit", "5"]).limit == 5
    long = tmp_path / (90 * "a")
    long.mkdir()
    outs = {own.out}
    for name in ("b.pt", long / "epoch0001.pt", long / "epoch0002.pt"):
        shutil.copy(tmp_path / "a.pt", tmp_path / name)
        outs.add(balcon.parse_flags(["--checkpoint", str(tmp_path / name)]).out)
    assert len(outs) == 4


def test_a_checkpoint_is_evaluated_as_it_is_also_one_that_began_with_init(
        run_here, monkeypatch, tmp_path):
    given = balcon.Encoder("resnet8", "imagenet", [8])
    cfg = balcon.parse_flags(["--projector", "8", "--init", "weights.pt"])
    torch.save({"config": balcon.values_of(cfg, balcon.MAKES_WEIGHTS),
                **{name: part.state_dict() for name, part in given.named_children()}},
               tmp_path / "a.pt")
    monkeypatch.setattr(balcon, "draw_patterns", lambda n, split: pictures(16, 32))
    monkeypatch.setattr(balcon, "pretrain", None)
    monkeypatch.setattr(balcon, "conclude", lambda *arguments: 1)  # the exit code
    run_here("--checkpoint", tmp_path / "a.pt", "--eval", "knn", "--export", tmp_path / "a.npz",
             "--out", tmp_path / "run", code=1)
    assert results_of(tmp_path / "run").keys() == {"trained", "config"}
    with torch.no_grad():
        expected = given.backbone.eval()(plain(pictures(16, 32)))
    assert_close(np.load(tmp_path / "a.npz")["test_features"], expected, 1e-4)


def test_unlabelled_images_train_and_are_shown_but_do_not_vote_and_old_figures_are_not_printed(
        run_here, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torchvision.datasets, "STL10", TorchvisionData)
    monkeypatch.setattr(balcon, "pretrain", lambda encoder, train, cfg: seen.append(len(train)))
    flags = f"--backbone resnet8 --size 16 --export x.npz --out {tmp_path} --epochs".split()
    stl10 = "--dataset stl10 --k 9 --eval knn linear --probe features --no-baseline".split()
    screen = run_here(*stl10, *flags, 0)
    assert "top-1" in screen and "  untrained\n" in screen
    assert np.load("x.npz")["train_labels"].tolist() == [0, 1, 0]  # of four
    screen = run_here(*stl10, "--batch-size", 2, *flags, 1)
    assert seen == [4] and "  trained\n" in screen and "untrained" not in screen
    run_here(*stl10, "--baseline", "--probe-l2", 1, "--batch-size", 2, *flags, 1)
    (tmp_path / "neighbors.png").unlink()
    screen = run_here("--dataset", "folder", "--data", "flat", *flags, 0)
    assert "without labels" in screen and "top-1" not in screen
    assert (tmp_path / "neighbors.png").exists()
    assert np.load("x.npz")["train_features"].shape == (56, 256)


def test_other_weights_have_another_folder_with_a_name_of_bearable_length():
    runs = ["", "--alpha 3", "--dataset cifar100", "--dataset folder --data a", "--seed 1",
            "--dataset folder --data b", "--dataset folder --data " + 85 * "猫",
            *("--projector" + 30 * " 2048" + more for more in ("", " 2048", " --seed 1"))]
    folders = [str(balcon.parse_flags(flags.split()).out) for flags in runs]
    assert len(set(folders)) == len(runs)
    assert max(len(folder.encode()) for folder in folders) < 255
    assert str(balcon.parse_flags(["--k", "9", "--workers", "0"]).out) == folders[0]


# ----------------------------------------- the demonstration ------------------------------
@pytest.mark.parametrize("trained, flags, code, said", [
    (90.1, "", 0, "it learned"), (90.0, "", 1, "FAILED"),
    (20.0, "--seed 1", 1, "FAILED"), (20.0, "--lr 0.1", 0, "holds")])
def test_the_demonstration_fails_unless_it_leaves_less_than_a_quarter_of_the_error(
        trained, flags, code, said, tmp_path, capsys):
    cfg = balcon.parse_flags([*flags.split(), "--precision", "float32", "--out", str(tmp_path)])
    results = {"untrained": {"knn": {"knn5": 60.0}}, "trained": {"knn": {"knn5": trained}}}
    assert balcon.conclude(results, ["knn"], cfg) == code
    screen = capsys.readouterr().out
    assert said in screen and ("FAILED" in screen) == (code == 1)


def test_the_table_names_its_figures(tmp_path, capsys):
    rows = {"knn1": "k = 1,", "knn10": "k = 10,", "linear": "linear classifier",
            "eq51_relative": "Eq. 51", "eq16_relative": "Eq. 16",
            "attract_gap": "gap of Theorem 4.4", "repel_gap": "gap of Theorem 4.6",
            "repel_fails": "bound of Theorem 4.6 fails"}
    results = {stage: {name: {name: shift + i, "eq51": 9e9} for i, name in enumerate(rows)}
               for shift, stage in ((0, "untrained"), (100, "trained"))}
    balcon.conclude(results, [*rows], settings(out=tmp_path, k=[1, 10]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["untrained", "trained"]
    for i, (line, words) in enumerate(zip(lines[1:], rows.values())):
        assert words in line and line.split()[-2:] == [str(i), str(100 + i)]


# ----------------------------------------- bad input --------------------------------------
BAD = {  # words, after NAME=value for the environment: what the sentence names
    "--loss softmax": "--loss softmax", "--loss simclr": "ntxent with --lam 1",
    "--loss dcl": "balanced with --lam 1", "--checkpoint newer/last.pt": "of this version",
    "--checkpoint odd.pt": "of this version", "--init odd.pt": "most of its weights",
    f"--out {300 * 'a'}": "name too long",
    "--lambda 4": "--lam", "--lambda=4": "--lam", "--alpah 4": "did you mean --alpha",
    "--datset cifar10": "did you mean --dataset", "--limit 5 --subset text.jsonl": "exclude",
    "--temperature=0.5": "1 / temperature", "--init resnet18": "cannot read resnet18",
    "--alpha 0": "--alpha 0.0 must be at least 1e-06", "--alpha -1": "--alpha -1.0 must be",
    "--lam nan": "--lam nan must be at least 0", "--lr inf": "--lr inf", "--weight-decay -1": "-1",
    "--batch-size 4.5": "--batch-size", "--batch-size 1": "at least 2", "--size 0": "--size 0",
    "--add flip": "twice: flip", "--add gaussian_blurr": "did you mean gaussian_blur",
    "--drop gaussian_blur": "--drop", "--theory-views 3": "views 3", f"--seed {2 ** 64}": "--seed",
    "--k 5 0": "--k 0", "--k": "--k", "--projector": "--projector",
    "--crop-scale 0.5": "--crop-scale", "--crop-scale 1 0.5": "--crop-scale",
    "--crop-scale 0.2 1.5": "--crop-scale", "--eval accuracy": "--eval accuracy",
    "--backbone resnet19": "did you mean resnet18", "--dataset imagnet": "did you mean imagenet",
    "--dataset=": "--dataset", "--dataset folder --data=": "--data",
    "--dataset folder --data nowhere": "nowhere",
    "--dataset cifar10 --data wrong{space}size": "wrong size are not squares of one size",
    "--dataset folder --data photos --out run1": "run1 holds a run with",
    "--dataset folder --data photos --out photos": "the same folder",
    "--dataset folder --data no{space}train": "no train/train",
    "--dataset imagenet --data photos/train": "photos/train/train",
    "--checkpoint run1/last.pt --projector 8": "run1/last.pt does not fit",
    "--checkpoint text.jsonl": "text.jsonl", "--checkpoint nowhere.pt": "nowhere.pt",
    "--checkpoint foreign.pt": "--init takes its weights", "--out newer": "warmup 3, not None",
    "--checkpoint run1/last.pt --init run1/last.pt": "exclude each other",
    "--init text.jsonl": "text.jsonl", "--init foreign.pt": "--init foreign.pt",
    "--export nowhere/features.npz": "nowhere", "--export run1": "run1",
    "--out text.jsonl": "text.jsonl", "--out text.jsonl/run": "text.jsonl/run",
    "--dataset folder --data photos --subset nowhere.txt": "nowhere.txt",
    "--dataset folder --data flat --subset lt": "needs labels",
    "--dataset folder --data photos --limit 99": "99 images are more than the 44",
    "--dataset folder --data photos --batch-size 64": "64 is more than the 44 training images",
    "--dataset folder --data flat --batch-size 16 --eval knn": "--eval knn",
    "--dataset folder --data photos --epochs 0 --theory-images 2 --eval bias": "--theory-images",
    "WORLD_SIZE=2 --batch-size 63": "--batch-size 63", "RANK=0": "torchrun",
    "SLURM_STEP_NUM_TASKS=8": "torchrun", "OMPI_COMM_WORLD_SIZE=2": "torchrun",
}


def files_in(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2_and_leaves_no_trace(
        words, place, run_here, monkeypatch):
    before = files_in(place)
    monkeypatch.setattr(balcon, "pretrain", None)  # it must not come so far
    flags = [word.replace("{space}", " ") for word in words.split()]
    if flags[0][0] != "-":
        monkeypatch.setenv(*flags.pop(0).split("="))
    assert BAD[words] in run_here(*flags, code=2)
    assert files_in(place) == before


def test_on_two_ranks_a_mistake_is_one_sentence_and_another_number_of_processes_a_warning(
        place, tmp_path, monkeypatch, stopped):
    done = launch(place, 2, HERE / "balcon.py", tmp_path / "new", "--data", "nowhere")
    assert done.returncode and "[rank" not in done.stderr
    assert done.stderr.count("balcon: ") == done.stderr.count("nowhere") == 1
    done = launch(place, 2, HERE / "balcon.py", stopped(epoch=2))
    assert done.returncode == 0 and "began this run: 1;" in done.stdout
    assert "began this run" not in (place / "screen2").read_text()
    monkeypatch.setenv("WORLD_SIZE", "3")  # the batch is of no matter where nothing is trained
    balcon.check_settings(balcon.parse_flags(["--epochs", "0"]))


def test_each_rank_has_its_own_gpu_which_computes_float32_as_float32(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *backend_and, timeout: calls.append(
        (*backend_and, timeout.total_seconds() > 3600)))
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, True)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "13")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert balcon.start_processes() == torch.device("cuda", 5)
    assert calls == [torch.device("cuda", 5), ("nccl", True)]
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(balcon.UserError, match="9 processes, but there are 8 GPUs"):
        balcon.start_processes()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_too_little_memory_is_one_sentence(error, run_here, monkeypatch):
    monkeypatch.setattr(balcon, "run", Mock(side_effect=error))
    assert "memory" in run_here(code=2).lower()


@pytest.mark.parametrize("error", [
    ValueError("a bug"), RuntimeError("a bug"), OSError(errno.EBADF, "a bug"), KeyError("a bug")])
def test_genuine_bugs_keep_their_traceback(error, run_here, monkeypatch):
    monkeypatch.setattr(balcon, "run", Mock(side_effect=error))
    with pytest.raises(type(error), match="a bug"):
        balcon.main([])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file_and_no_draft(
        call, run_here, monkeypatch, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    flags = "--dataset folder --data photos --epochs 0 --size 16 --backbone resnet8".split()
    assert "No space left" in run_here(*flags, "--out", tmp_path, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "results.json"]
    assert (tmp_path / "results.json").read_text() == "{}"


def test_an_unreadable_image_of_imagenet_is_one_sentence(place, run_here, tmp_path):
    data = shutil.copytree(place / "photos", tmp_path / "photos")
    (data / "train/a/12.png").write_bytes(b"broken")
    flags = "--dataset imagenet --size 16 --backbone resnet8 --epochs 0 --workers 2".split()
    sentence = run_here(*flags, "--data", data, "--out", tmp_path / "run", code=2)
    assert "train/a/12.png" in sentence
