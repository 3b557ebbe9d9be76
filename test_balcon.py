# SPDX-License-Identifier: MIT
"""Tests of balcon.py against independent oracles: float64 loops, torchvision, closed forms.

    pytest                                              # no network, no data
    python test_balcon.py benchmark --dataset cifar10   # where the time of a step goes

The claims; each is the name of a test:

Losses
- losses are their equations in float32 at least
- losses obey their closed forms and bounds
- a regular simplex has the least loss
- losses refuse nonsense
- two processes have the loss and gradients of one also when copied out

Views
- crop and resize are torchvisions
- crops are the boxes of random resized crop
- color jitter is torchvisions in each images own order
- flip grayscale blur rotation and cutout are torchvisions
- noise is gaussian with deviation a tenth and another for each image
- an augmentation changes its share of the images
- parameters are drawn from the stated distributions
- every rank sees its rows of the global batch
- plain images in files are cut to their centre
- recipes are the papers or ours

Data and model
- images of every kind come out right and upright
- images that are not all in class folders have no labels
- a fixed tenth is held out and limit keeps the same images for every seed
- a missing class and an unreadable or misshapen image are named
- torchvisions data sets are taken as they are
- backbones are torchvisions without the last layer
- the projector and the stem are the papers
- init takes the weights that fit and refuses a file without any

Evaluation
- knn is a majority vote by cosine and ties go to the nearest
- lars scales the gradient of a matrix and not of a bias
- linear predict finds the minimum of its objective whatever the scale of an image
- crops classifier is a softmax regression on fresh crops
- crops classifier resumes after its last epoch and only with its backbone
- evaluation is in eval mode and counts each image once on any ranks

Theory
- eq16 is unbiased where the plain estimate is not and knows its error
- bias is eq 51 under one t for both images and eq 16 and relative to random pairs
- theorem sides are their equations
- theorem 4 6 holds where b is not negative and with max of b and b over nu always
- the counterexample to theorem 4 6
- bounds are the mean gaps and the shares that fail

Subsets
- long tail is that of imagenet lt and sums exactly elsewhere
- long tailed and uniform subsets have one size and depend on the seed
- subset file names training images after any folders

Output
- report pools seeds and nothing else
- views png shows each image beside two of its views
- neighbors png frames the neighbours of the right class
- neighbors png never shows an image beside itself
- exported features come with labels files and classes

Training
- pretraining is sgd with momentum decay and a cosine on the loss named
- training on two processes is that of one

Runs and resuming
- a run in a pipe prints a line at its first step and after each epoch
- a killed run goes on and ends bit identical
- a finished run is not trained again and gets the figures it lacks
- torchrun on two processes has the figures of its checkpoint

The demonstration
- the demonstration fails unless it leaves less than a quarter of the error
- progress is one line of 79 columns on a terminal and rare lines elsewhere

Bad input
- bad input is one sentence and exit code 2 and leaves no trace
- a corrupt image is named and with a good one the same command goes on

Benchmark
- the benchmark counts flops and writes nothing

The study
- results page is what the runs say
- a falsified results page is found out
- decimal figures of the results page name their source
- leave one out by leaving one out
- repulsion and nscl by loops
- ntxent can prefer views that differ
- class distances and few shots by loops
- losses of the study by loops
- the strong recipe has no batch norm in its projector
"""
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

import balcon
from balcon import balanced_contrastive_loss, generalized_nt_xent_loss, loss_floor, nscl_loss

HERE = Path(balcon.__file__).resolve().parent
CPU = torch.device("cpu")


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------- losses -----------------------------------------
LOSS_NAMES = {"balanced": "balanced_contrastive_loss", "ntxent": "generalized_nt_xent_loss",
              "nscl": "nscl_loss"}
KINDS = list(itertools.product(LOSS_NAMES, ["cosine", "dot", "euclidean"]))
CLASSES = torch.tensor([0, 0, 0, 1, 0, 2, 0, 1])  # of eight images, and of unlike size


def random_views(m, d):
    return torch.randn(2, m, d, dtype=torch.float64, generator=generator(m))


def loss_called(name, z, alpha, lam, kind, labels=CLASSES, place=vars(balcon)):
    more = [labels] if name == "nscl" else []
    return place[LOSS_NAMES[name]](*z, *more, alpha, lam, kind)


def loss_by_loops(name, z, alpha, lam, kind):
    """Eq. 17 read aloud: each of the 2m anchors, its positive, and the list of what it repels."""
    views, total = list(z.detach().double().flatten(0, 1).numpy()), 0.0
    for i, anchor in enumerate(views):
        repelled = []
        for j, view in enumerate(views):
            s = anchor @ view
            if kind == "cosine":
                s /= np.linalg.norm(anchor) * np.linalg.norm(view)
            if kind == "euclidean":
                s = -((anchor - view) ** 2).sum()
            same_image, same_class = (i - j) % 8 == 0, CLASSES[i % 8] == CLASSES[j % 8]
            if same_image and i != j:
                total -= s
            if not {"balanced": same_image, "ntxent": i == j, "nscl": same_class}[name]:
                repelled.append(alpha * s)
        total += lam / alpha * np.logaddexp.reduce(repelled)
    return total / len(views)


@pytest.mark.parametrize("name, kind", KINDS)
def test_losses_are_their_equations_in_float32_at_least(name, kind):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        z = (300 * F.normalize(random_views(8, 5), dim=2)).to(dtype)  # 300² is beyond float16
        for alpha, lam in ((1, 1), (2, 4), (8, 0.5), (3, 0)):
            with torch.autocast("cpu", torch.bfloat16):
                got = loss_called(name, z, alpha, lam, kind)
            assert got.shape == () and got.dtype == torch.promote_types(dtype, torch.float32)
            oracle = loss_by_loops(name, z, alpha, lam, kind)
            assert got.item() == pytest.approx(oracle, rel=1e-5, abs=1e-5)
    z = random_views(8, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_called(name, z, 3.0, 2.0, kind), z)


@pytest.mark.parametrize("m, alpha, lam", [(2, 1, 1), (4, 4, 2), (8, 8, 8), (12, 0.5, 0.3)])
def test_losses_obey_their_closed_forms_and_bounds(m, alpha, lam):
    z = F.normalize(random_views(m, 3), dim=2)
    s, image = z.flatten(0, 1) @ z.flatten(0, 1).T, torch.arange(m).repeat(2)
    negative = alpha * s[image[:, None] != image].view(2 * m, -1)
    positive, log_k = alpha * (z[0] * z[1]).sum(1).repeat(2), math.log(2 * m - 2)
    simclr = F.cross_entropy((alpha * s).fill_diagonal_(-math.inf), torch.arange(2 * m).roll(m))
    added = F.softplus(positive - negative.logsumexp(1)).mean()
    balanced, same = balanced_contrastive_loss(*z, alpha, lam), torch.ones(2, m, 3)
    for value, expected in (
        (alpha * generalized_nt_xent_loss(*z, alpha, 1), simclr),
        (generalized_nt_xent_loss(*z, alpha, lam) - balanced, lam / alpha * added),
        (balanced_contrastive_loss(*same, alpha, lam), lam - 1 + lam / alpha * log_k),
        (generalized_nt_xent_loss(*same, alpha, lam), lam - 1 + lam / alpha * math.log(2 * m - 1)),
    ):
        assert float(value) == pytest.approx(float(expected), abs=1e-6)
    P = positive.mean() / alpha
    least = lam / alpha * log_k - P - lam * (1 + P) / (2 * m - 2)
    assert loss_floor(m, alpha, lam) <= least + 1e-9
    assert least <= balanced + 1e-9 <= 1 + lam + lam / alpha * log_k
    repel = alpha * (balanced_contrastive_loss(*z, alpha, 1) + P)  # Lemma A.1
    hardest = negative.amax(1).mean()
    assert hardest <= repel + 1e-9 and negative.mean() <= repel - log_k + 1e-9 <= hardest + 2e-9


@pytest.mark.parametrize("m, alpha, lam", [(2, 1, 1), (3, 4, 2), (16, 8, 8)])
def test_a_regular_simplex_has_the_least_loss(m, alpha, lam):
    z = F.normalize(torch.eye(m, dtype=torch.float64) - 1 / m, dim=1)
    loss = balanced_contrastive_loss(z, z, alpha, lam)
    assert loss.item() == pytest.approx(loss_floor(m, alpha, lam))
    for step in (1e-3, 0.1, 1):
        near = z + step * random_views(m, m)
        assert balanced_contrastive_loss(*near, alpha, lam) > loss
    included = math.log1p(2 * (m - 1) * math.exp(-alpha * m / (m - 1))) / alpha
    assert generalized_nt_xent_loss(z, z, alpha, 1).item() == pytest.approx(included)


def test_losses_refuse_nonsense():
    for m, other, *arguments in (
        (4, 3, 1, 1), (1, 1, 1, 1), (4, 4, 0, 1), (4, 4, -1, 1), (4, 4, 1, -1),
        (4, 4, math.nan, 1), (4, 4, 1, math.nan), (4, 4, 1, 1, "manhattan"),
    ):
        for loss in (balanced_contrastive_loss, generalized_nt_xent_loss):
            with pytest.raises(ValueError):
                loss(torch.ones(m, 3), torch.ones(other, 3), *arguments)
    with pytest.raises(ValueError, match="class"):
        nscl_loss(torch.ones(4, 3), torch.ones(4, 3), torch.zeros(4), 1, 1)


def losses_and_gradients(mine):
    """{(loss, similarity, whether copied): [loss, gradients of a step]} of these images."""
    copied = {"math": math, "torch": torch, "F": F, "dist": dist}  # an empty file's imports
    for name in LOSS_NAMES.values():
        exec(inspect.getsource(getattr(balcon, name)), copied)
    found, x = {}, random_views(8, 6)[:, mine].flatten(0, 1)
    for (name, kind), place in itertools.product(KINDS, (vars(balcon), copied)):
        torch.manual_seed(1)
        net = torch.nn.Linear(6, 4).double()
        if dist.is_initialized():
            net = torch.nn.parallel.DistributedDataParallel(net)
        z = net(x).chunk(2)
        loss = loss_called(name, z, 4.0, 2.0, kind, CLASSES[mine], place)
        loss.backward()
        gradients = [p.grad for p in net.parameters()]
        found[name, kind, place is copied] = [loss.detach(), *gradients]
    return found


def compare_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    expected, store = losses_and_gradients(slice(None)), f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for key, (loss, *gradients) in losses_and_gradients(slice(rank, None, 2)).items():
        dist.all_reduce(loss)
        for got, one in zip([loss / 2, *gradients], expected[key]):
            assert torch.allclose(got, one, rtol=1e-9, atol=1e-12), key
    rows = balcon.gather_rows(torch.arange(5)[balcon.share(5)], 5)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one_also_when_copied_out(tmp_path):
    torch.multiprocessing.spawn(compare_on_a_rank, (str(tmp_path),), nprocs=2)


# ----------------------------------------- views ------------------------------------------
RATES = {"flip": 0.5, "color_jitter": 0.8, "grayscale": 0.2, "gaussian_blur": 0.5,
         "random_cutout": 0.5, "random_rotation": 0.75, "gaussian_noise": 0.5}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pixels(n, size):
    return torch.rand(n, 3, size, size, generator=generator(0))


def drawn(name, n=4000):
    return balcon.Views([name], 8, (0.08, 1)).draw(n, generator(1))[name]


def augmented(name, x, t):
    """x after this augmentation with parameters t, chosen for each image."""
    chosen = torch.ones(len(x), dtype=torch.bool)
    views = balcon.Views([name], x.shape[-1], (1, 1))
    return views.apply(x.clone(), {name + "?": chosen, name: t})


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-5


def assert_uniform(values, low, high):
    """By Kolmogorov and Smirnov's test, which a sound draw fails once in 1,500 times."""
    values = torch.as_tensor(values).flatten().double().sort().values
    expected = torch.linspace(low, high, len(values), dtype=torch.float64)
    assert (values - expected).abs().max() < 2 / math.sqrt(len(values)) * (high - low)
    assert low - 1e-6 < values[0] and values[-1] < high + 1e-6


@pytest.mark.parametrize("size", [5, 16, 40])  # to shrink and to grow
def test_crop_and_resize_are_torchvisions(size):
    boxes = [[0, 0, 24, 24], [3, 5, 9, 7], [1, 0, 1, 1], [0, 10, 24, 3], [7, 2, 9, 9]]
    x = pixels(5, 24)
    for image, box, got in zip(x, boxes, balcon.crop_resize(x, torch.tensor(boxes), size)):
        assert_close(got, TF.resized_crop(image, *box, [size, size], antialias=True))


@pytest.mark.parametrize("height, width", [(32, 32), (40, 300), (300, 41)])
def test_crops_are_the_boxes_of_random_resized_crop(height, width):
    t = balcon.Views([], 8, (0.08, 1)).draw(300, generator(2))["crop"].double()
    fallbacks, largest = 0, [min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))]
    for candidates, box in zip(t.tolist(), balcon.crop_box(t, height, width).tolist()):
        for area, ratio, top, left in candidates:  # as RandomResizedCrop.get_params does
            area *= height * width
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if h <= height and w <= width:
                assert box == [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
                break
        else:
            fallbacks += 1
            assert box == [(height - largest[0]) // 2, (width - largest[1]) // 2, *largest]
    assert (fallbacks > 0) == (height != width)


def test_color_jitter_is_torchvisions_in_each_images_own_order():
    parts = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    x, t = pixels(60, 12), drawn("color_jitter", 60)
    x[0] = 0.5  # grey has no hue
    x[1, 0] = x[1, 1]  # ties between channels
    for image, row, got in zip(x, t.tolist(), augmented("color_jitter", x, t)):
        for part in map(int, row[4:]):
            image = parts[part](image, row[part])
        assert_close(got, image)


@pytest.mark.parametrize("size", [32, 40])
def test_flip_grayscale_blur_rotation_and_cutout_are_torchvisions(size):
    x, none = pixels(6, size), torch.empty(6, 0)
    assert_close(augmented("flip", x, none), TF.horizontal_flip(x))
    assert_close(augmented("grayscale", x, none), TF.rgb_to_grayscale(x, 3))
    sigmas, turns = [0.1, 0.3, 0.7, 1.3, 1.9, 2.0], [1, 2, 3, 1, 2, 3]
    blurred = augmented("gaussian_blur", x, torch.tensor(sigmas))
    turned = augmented("random_rotation", x, torch.tensor(turns))
    centres = torch.rand(6, 2, generator=generator(1))
    cut = augmented("random_cutout", x, centres)
    for i, centre in enumerate((size * centres).int()):
        assert_close(blurred[i], TF.gaussian_blur(x[i], [23, 23], [sigmas[i]] * 2))
        assert_close(turned[i], TF.rotate(x[i], 90.0 * turns[i]))
        (top, left), (bottom, right) = (centre - size // 4).clamp(min=0), centre + size // 4
        x[i, :, top:bottom, left:right] = torch.tensor(MEAN)[:, None, None]
        assert_close(cut[i], x[i])


def test_noise_is_gaussian_with_deviation_a_tenth_and_another_for_each_image():
    grey, t = torch.full((300, 3, 16, 16), 0.5), drawn("gaussian_noise", 300)
    noise = augmented("gaussian_noise", grey, t) - grey
    assert_close(augmented("gaussian_noise", grey - 0.01, t), grey - 0.01 + noise)
    assert_uniform(torch.special.ndtr(noise / 0.1), 0, 1)
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(300)).abs().max() < 0.25
    assert augmented("gaussian_noise", 2 * grey, t).max() == 1


@pytest.mark.parametrize("name", RATES)
def test_an_augmentation_changes_its_share_of_the_images(name):
    x, views = pixels(3000, 6), balcon.Views([name], 6, (1, 1))
    t = views.draw(3000, generator(3))
    del t["crop"]
    changed = (views.apply(x.clone(), t) != x).flatten(1).any(1)
    assert changed.double().mean().item() == pytest.approx(RATES[name], abs=0.03)


def test_parameters_are_drawn_from_the_stated_distributions():
    crop_scale = balcon.recipe_of("cifar10")["crop_scale"]
    crop = balcon.Views([], 8, crop_scale).draw(4000, generator(0))["crop"]
    assert_uniform(crop[..., 0], 0.08, 1)  # area
    assert_uniform(crop[..., 1].log(), -math.log(4 / 3), math.log(4 / 3))
    assert_uniform(crop[..., 2:], 0, 1)
    assert_uniform(drawn("gaussian_blur"), 0.1, 2)
    assert_uniform(drawn("random_cutout"), 0, 1)
    jitter = drawn("color_jitter")
    assert_uniform(jitter[:, :3], 0.6, 1.4)
    assert_uniform(jitter[:, 3], -0.1, 0.1)  # hue
    orders, counts = jitter[:, 4:].unique(dim=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 110  # 167 ± 13 of each
    turns = drawn("random_rotation").bincount()
    assert len(turns) == 4 and turns[0] == 0 and turns[1:].min() > 1230  # 1333 ± 30 of each


def squares(place):
    """Nine square images of 24 pixels, in memory and in files."""
    x = torch.randint(256, (9, 3, 24, 24), dtype=torch.uint8, generator=generator(0))
    files = [str(place / f"{i}.png") for i in range(9)]
    for image, file in zip(x, files):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    cfg = SimpleNamespace(size=16, workers=0)
    return [balcon.Images(images, torch.arange(9), [], cfg, CPU) for images in (x, files)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_sees_its_rows_of_the_global_batch(world, tmp_path, monkeypatch):
    memory, files = squares(tmp_path)
    views, rows = balcon.Views(list(RATES), 16, (0.2, 1)), torch.tensor([4, 0, 8, 1, 2])
    t = views.draw(10, balcon.rng("key", 3))  # two views of each row, first all the first ones
    x = views.apply(memory.images[rows].repeat(2, 1, 1, 1) / 255, t)
    x = TF.normalize(x, MEAN, STD).unflatten(0, (2, 5))
    monkeypatch.setattr(balcon, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(balcon, "rank", lambda: rank)
        for data, tolerance in ((memory, 1e-5), (files, 0.02)):  # Pillow rounds to 8 bits
            (_, got, labels), = data.batches([(3, rows)], views, 2, ("key",))
            difference = got - x[:, rank::world].flatten(0, 1)
            assert difference.abs().mean() < tolerance
            assert labels.tolist() == rows[rank::world].tolist()


def test_plain_images_in_files_are_cut_to_their_centre(tmp_path):
    memory, files = squares(tmp_path)
    (_, got, _), = files.batches([(0, torch.arange(9))])
    centre = TF.resized_crop(memory.images / 255, 1, 1, 21, 21, [16, 16])  # 0.875 of the side
    assert (got - TF.normalize(centre, MEAN, STD)).abs().max() < 0.02


SGD = dict(batch_size=512, lr=0.1, momentum=0.9, weight_decay=1e-4, probe="crops", probe_epochs=90)
CIFAR = dict(
    SGD, alpha=2, lam=4, epochs=200, backbone="resnet18", stem="cifar", projector=[2048, 2048],
    size=32, crop_scale=[0.08, 1], augmentations=["flip", "color_jitter", "grayscale"],
    probe_optimizer="sgd", probe_lr=30, probe_batch=256, k=[1, 10])
IMAGENET = dict(
    SGD, alpha=4, lam=2, epochs=100, backbone="resnet50", stem="imagenet", projector=[2048] * 3,
    size=224, crop_scale=[0.2, 1], probe_optimizer="lars", probe_batch=4096, k=[200],
    augmentations=["color_jitter", "grayscale", "gaussian_blur", "flip"])
RECIPES = {
    "cifar10": CIFAR, "cifar100": CIFAR, "imagenet": IMAGENET,
    "stl10": {**CIFAR, "stem": "imagenet", "size": 96},
    "folder": {"backbone": "resnet18", "size": 128, "probe": "features", "k": [5]},
    "patterns": {"alpha": 4, "lam": 2, "size": 32, "probe": "features", "k": [5]},
}


@pytest.mark.parametrize("dataset", RECIPES)
def test_recipes_are_the_papers_or_ours(dataset):  # A.3.1, A.4.1, A.4.2
    for name, expected in RECIPES[dataset].items():
        assert balcon.recipe_of(dataset)[name] == expected


# ----------------------------------------- data and model ---------------------------------
def put_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


def loaded(root, *flags, dataset="folder"):
    cfg = balcon.parse_flags(["--dataset", dataset, "--data", str(root), *flags])
    return balcon.load_data(cfg, CPU)


def test_images_of_every_kind_come_out_right_and_upright(tmp_path):
    across, down = np.meshgrid(8 * np.arange(30), 6 * np.arange(40))
    photo = Image.fromarray(np.dstack([across, down, 255 - across]).astype(np.uint8))
    grey, turned = photo.convert("L"), Image.Exif()
    turned[0x0112] = 6
    put_images(tmp_path / "train", "снег/a.png", "猫/b.png", "猫/.c.png", ".d/e.png")
    deep = Image.fromarray(257 * np.asarray(grey).astype(np.uint16))
    on_its_side = photo.transpose(Image.Transpose.ROTATE_90)
    for name, image, expected, error, more in (
        ("a 🌇 [1].jpg", photo.convert("CMYK"), photo, 6, {}), ("b.gif", photo, photo, 6, {}),
        ("c.WEBP", photo.convert("RGBA"), photo, 6, {}), ("d.png", deep, grey, 0, {}),
        ("e.tif", grey.convert("LA"), grey, 0, {}),
        ("f.jpg", on_its_side, photo, 6, {"exif": turned}),
    ):
        image.save(tmp_path / "train/猫" / name, **more)
        got = balcon.read_image(tmp_path / "train/猫" / name)
        assert got.mode == "RGB" and got.size == (30, 40)
        difference = np.asarray(got) - np.asarray(expected.convert("RGB")).astype(float)
        assert abs(difference).mean() <= error, name
    (tmp_path / "train/猫/notes.txt").write_text("no image")
    put_images(tmp_path / "val", "猫/a.png", "снег/deep/er/b.png", "снег/c.png")
    train, test = loaded(tmp_path, "--workers", "0")
    assert train.classes == ["снег", "猫"] and train.labels.bincount().tolist() == [1, 7]
    assert test.labels.tolist() == [0, 0, 1]
    assert all(train.classes[y] in file for file, y in zip(train.images, train.labels))


@pytest.mark.parametrize("names", ["a.png b.png", "x/a.png x/y/b.png", "x/a.png y/b.png c.png"])
def test_images_that_are_not_all_in_class_folders_have_no_labels(names, tmp_path):
    put_images(tmp_path, *names.split())
    train, test = loaded(tmp_path)
    assert train.labels.tolist() == [-1] * len(names.split())
    assert train.classes == [] and test is None


def test_a_fixed_tenth_is_held_out_and_limit_keeps_the_same_images_for_every_seed(tmp_path):
    put_images(tmp_path, *(f"seldom/{i}.png" for i in range(5)))
    put_images(tmp_path, *(f"many/{i}.png" for i in range(20)))
    train, test = loaded(tmp_path)
    assert test.labels.bincount().tolist() == [2, 1]
    assert len({*train.images, *test.images}) == 25
    for dataset, limit, counts in (("folder", "12", [8, 4]), ("patterns", "80", [10] * 8)):
        some, again = (loaded(tmp_path, "--limit", limit, "--seed", seed, dataset=dataset)
                       for seed in "01")
        assert some[0].labels.bincount().tolist() == counts
        assert all((a.images == b.images).all() for a, b in zip(some, again))
    assert some[1].labels.bincount().tolist() == [250] * 8
    assert len(torch.cat([some[0].images, some[1].images]).unique(dim=0)) == 2080


def test_a_missing_class_and_an_unreadable_or_misshapen_image_are_named(tmp_path):
    put_images(tmp_path, "train/bird/1.png", "train/cat/2.png", "train/cat/3.png", "val/cat/4.png")
    with pytest.raises(balcon.UserError, match="bird"):
        loaded(tmp_path)
    put_images(tmp_path, "val/bird/5.png")
    with pytest.raises(balcon.UserError, match="1.png is not 32×32"):
        loaded(tmp_path, dataset="cifar10")
    bad = tmp_path / "train/cat/3.png"
    bad.write_bytes(bad.read_bytes()[:45])
    for workers in "01":
        train, _ = loaded(tmp_path, "--workers", workers)
        with pytest.raises(balcon.UserError, match="cat/3.png"):
            list(train.batches([(0, torch.arange(2)), (1, torch.arange(3))]))


@pytest.mark.parametrize("dataset", ["cifar10", "stl10"])
def test_torchvisions_data_sets_are_taken_as_they_are(dataset, monkeypatch, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    found = SimpleNamespace(data=x.transpose(0, 2, 3, 1), targets=[0, 1, 1, 0], classes=["a", "b"])
    if dataset == "stl10":  # channels first, and some without a label
        found = SimpleNamespace(data=x, labels=np.array([0, 1, -1, 0]), classes=["a", "b"])
    monkeypatch.setattr(torchvision.datasets, dataset.upper(), lambda *_, **__: found)
    train, test = loaded(tmp_path, dataset=dataset)
    assert torch.equal(train.images, torch.tensor(x)) and len(test) == 4
    assert train.labels.tolist() == [0, 1, 1 if dataset == "cifar10" else -1, 0]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backbones_are_torchvisions_without_the_last_layer(name):
    with torch.device("meta"):
        own = balcon.Encoder(name, "imagenet", [8]).backbone
        reference = torchvision.models.get_model(name)
    reference.fc = torch.nn.Identity()
    assert str(own) == str(reference)
    assert own.state_dict().keys() == reference.state_dict().keys()


def test_the_projector_and_the_stem_are_the_papers():  # A.3.1, A.4.1
    encoder = balcon.Encoder("resnet10", "cifar", [32, 16, 8])
    layers = [layer for layer in encoder.projector if not isinstance(layer, torch.nn.Identity)]
    names = [type(layer).__name__ for layer in layers]
    assert names == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert [layer.affine for layer in layers[1::3]] == [True, True, False]
    shapes = [list(weight.shape) for weight in encoder.projector.parameters()]
    assert shapes == [[32, 512], [32], [32], [16, 32], [16], [16], [8, 16]]  # no biases
    conv, x = encoder.backbone.conv1, torch.zeros(1, 3, 32, 32)
    assert conv.kernel_size == (3, 3) and conv.bias is None
    assert encoder.backbone.maxpool(conv(x)).shape == (1, 64, 32, 32)


def test_init_takes_the_weights_that_fit_and_refuses_a_file_without_any(tmp_path):
    resnet, file = torchvision.models.resnet, tmp_path / "given.pt"
    given, x = resnet.ResNet(resnet.BasicBlock, [1] * 4).eval(), torch.randn(2, 3, 32, 32)
    weights, given.fc = given.state_dict(), torch.nn.Identity()
    cfg = SimpleNamespace(seed=0, backbone="resnet10", projector=[8], stem="imagenet", init=file)
    for content in (weights, {"backbone": given.state_dict(), "projector": {}, "step": 3}):
        torch.save(content, file)
        assert_close(balcon.build_encoder(cfg, CPU).backbone.eval()(x), given(x))
    cfg.stem = "cifar"
    taken = balcon.build_encoder(cfg, CPU).backbone.state_dict()
    assert taken.pop("conv1.weight").shape[-1] == 3  # which does not fit
    assert all(torch.equal(weight, weights[name]) for name, weight in taken.items())
    torch.save({"elsewhere": torch.zeros(3)}, file)
    with pytest.raises(balcon.UserError, match="given.pt"):
        balcon.build_encoder(cfg, CPU)


# ----------------------------------------- evaluation -------------------------------------
class Seen(torch.nn.Module):
    """Keeps its inputs and hands them on, `patience` times."""

    def __init__(self, patience=None):
        super().__init__()
        self.inputs, self.patience = [], patience

    def forward(self, x):
        if len(self.inputs) == self.patience:
            raise KeyboardInterrupt
        self.inputs.append(x)
        return x


def stub(patience=None):
    """An encoder that tells what it sees, and by its norms whether it is in eval mode."""
    torch.manual_seed(0)
    encoder, norms = torch.nn.Module(), (torch.nn.BatchNorm2d(3), torch.nn.BatchNorm1d(5))
    encoder.backbone = torch.nn.Sequential(Seen(patience), norms[0], torch.nn.Flatten())
    encoder.projector = torch.nn.Sequential(torch.nn.Linear(12, 5), norms[1])
    return encoder


def pictures(n, size=2, seed=0):
    """Images of three classes, whose red says which image it is, also in crops."""
    labels, centres = torch.arange(n) % 3, torch.randn(3, 3, size, size, generator=generator(9))
    noise = torch.randn(n, 3, size, size, generator=generator(seed))
    pixels = 128 + 40 * centres[labels] + 60 * noise
    pixels[:, 0] = 2 * torch.arange(n)[:, None, None]
    return balcon.Images(pixels.clamp(0, 255).byte(), labels, ["a", "b", "c"], None, CPU)


def plain(data):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (data.images / 255 - mean) / std


def rows_of(x):
    return (255 / 2 * (x[:, 0].mean((1, 2)) * 0.229 + 0.485)).round().long()


def settings(**more):
    return SimpleNamespace(**{**dict(
        parts=["flip"], size=2, crop_scale=[1.0, 1.0], seed=0, precision="float32", k=[1, 5, 99],
        theory_images=1000, theory_views=4, alpha=2.0, eval=["bias"], probe_l2=0.01,
        probe="features", probe_batch=9, probe_epochs=3, probe_optimizer="sgd", probe_lr=5.0,
    ), **more})


def on_ranks(world, job, monkeypatch):
    """[what job() returns on each rank]. A rank is a thread; between exchanges one has its turn."""
    turn, meeting = threading.Lock(), threading.Barrier(world)
    here, sent = threading.local(), {}

    def meet():
        turn.release()
        meeting.wait(30)
        turn.acquire()

    def all_gather(parts, x):
        sent[here.rank] = x.clone()
        meet()
        for r, part in enumerate(parts):
            part.copy_(sent[r])
        meet()

    def work(rank):
        here.rank = rank
        with turn:
            return job()

    with monkeypatch.context() as patch, ThreadPoolExecutor(world) as pool:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda: world)
        patch.setattr(dist, "get_rank", lambda: here.rank)
        patch.setattr(dist, "all_gather", all_gather)
        patch.setattr(dist, "barrier", meet)
        return list(pool.map(work, range(world)))


def test_knn_is_a_majority_vote_by_cosine_and_ties_go_to_the_nearest():
    g = generator(0)
    bank = torch.randn(41, 4, generator=g) * 10 ** torch.randn(41, 1, generator=g)
    labels, queries = torch.randint(5, [41], generator=g), torch.randn(300, 4, generator=g)
    near = [F.cosine_similarity(bank, query[None]).argsort(descending=True) for query in queries]
    for k in range(1, 42):
        votes = [labels[rows[:k]].tolist() for rows in near]
        expected = [max(vote, key=vote.count) for vote in votes]  # the first, so the nearest
        assert balcon.knn_predict(bank, labels, queries, k).tolist() == expected
    for k in (-1, 0, 42):
        with pytest.raises(ValueError):
            balcon.knn_predict(bank, labels, queries, k)


def test_lars_scales_the_gradient_of_a_matrix_and_not_of_a_bias():
    x = torch.randn(5, 8, 4, generator=generator(0)).double()
    w, b = torch.eye(3, 4).double().requires_grad_(), torch.ones(3).double().requires_grad_()
    mine, buffer = [w.detach().clone(), b.detach().clone()], [0, 0]
    optimizer = balcon.LARS([w, b], lr=0.7)
    for batch in x:
        optimizer.zero_grad()
        (batch @ w.T + b).square().mean().backward()
        ratio = 0.001 * mine[0].square().sum().sqrt() / w.grad.square().sum().sqrt()
        buffer = [0.9 * buffer[0] + ratio * w.grad, 0.9 * buffer[1] + b.grad]
        mine = [value - 0.7 * moved for value, moved in zip(mine, buffer)]
        optimizer.step()
        assert torch.allclose(w, mine[0]) and torch.allclose(b, mine[1])


def test_linear_predict_finds_the_minimum_of_its_objective_whatever_the_scale_of_an_image():
    g, labels = generator(0), torch.arange(90) % 3
    bank = torch.eye(3, 4)[labels] + torch.randn(90, 4, generator=g) + 1
    queries = torch.randn(3000, 4, generator=g) + 1
    x, q = F.normalize(bank.double(), dim=1), F.normalize(queries.double(), dim=1)
    q, x = (q - x.mean(0)) / x.std(0), (x - x.mean(0)) / x.std(0)
    w, b = torch.zeros(3, 4).double(), torch.zeros(3).double()
    for _ in range(1000):  # plain gradient descent
        error = (x @ w.T + b).softmax(1) - F.one_hot(labels)
        slope, drift = error.T @ x / 90 + 0.1 * w, error.mean(0)
        w, b = w - slope, b - drift
    assert slope.abs().max() < 1e-9 and drift.abs().max() < 1e-9
    for scale in (torch.ones(90, 1), torch.rand(90, 1, generator=g) + 0.1):
        got = balcon.linear_predict(scale * bank, labels, 3 * queries, 0.1)
        assert (got != (q @ w.T + b).argmax(1)).sum() <= 3  # on the border of two classes


def crops_classifier(out, patience=None, moved=0.0, **flags):
    """The classifier that was trained on 19 images of 8×8 pixels, and what its backbone saw."""
    backbone = stub(patience).backbone
    backbone[1].running_mean += moved
    before = [value.clone() for value in backbone.state_dict().values()]
    cfg = settings(out=out, size=8, **flags)
    classifier = balcon.train_on_crops(backbone, pictures(19, 8), 192, cfg)
    assert not any(module.training for module in backbone.modules()) and not any(out.iterdir())
    assert all(map(torch.equal, before, backbone.state_dict().values()))
    return classifier, backbone[0].inputs


@pytest.mark.parametrize("name, lr", [("sgd", 5.0), ("lars", 5000.0)])
def test_crops_classifier_is_a_softmax_regression_on_fresh_crops(name, lr, tmp_path):
    replay, _ = crops_classifier(tmp_path, probe_lr=1e-30)  # where it starts
    got, inputs = crops_classifier(tmp_path, probe_lr=lr, probe_optimizer=name)
    kind = {"sgd": torch.optim.SGD, "lars": balcon.LARS}[name]
    optimizer = kind(replay.parameters(), lr=lr, momentum=0.9)
    for step, x in enumerate(inputs):
        optimizer.zero_grad()
        F.cross_entropy(replay(x.flatten(1)), rows_of(x) % 3).backward()
        optimizer.param_groups[0]["lr"] = lr * 9 / 256 * (1 + math.cos(math.pi * step / 9)) / 2
        optimizer.step()
    for mine, its in zip(replay.parameters(), got.parameters()):
        assert torch.allclose(mine, its, rtol=1e-3, atol=1e-4)
    epochs = [torch.cat(inputs[i:i + 3]) for i in (0, 3, 6)]
    orders = [rows_of(x).tolist() for x in epochs]
    assert [len(x) for x in inputs] == 3 * [9, 9, 1] and orders[0] != orders[1] != orders[2]
    assert all(sorted(order) == list(range(19)) for order in orders)
    crops = [x[rows_of(x).argsort()] for x in epochs]
    for a, b in itertools.combinations(crops, 2):
        assert ((a - b).abs().amax((1, 2, 3)) > 0.01).sum() > 14


def test_crops_classifier_resumes_after_its_last_epoch_and_only_with_its_backbone(tmp_path):
    whole, inputs = crops_classifier(tmp_path)
    for moved, left in ((0.0, 6), (0.1, 9)):
        with pytest.raises(KeyboardInterrupt):
            crops_classifier(tmp_path, patience=5)
        again, seen = crops_classifier(tmp_path, moved=moved)
        assert len(seen) == left and torch.equal(seen[-1], inputs[-1])
        assert torch.equal(again.weight, whole.weight) == (moved == 0)


def test_evaluation_is_in_eval_mode_and_counts_each_image_once_on_any_ranks(tmp_path, monkeypatch):
    train, test = pictures(19), pictures(60, seed=1)

    def job():
        encoder, cfg, found = stub(), settings(out=tmp_path), {}
        features = [balcon.extract(encoder.backbone, data, cfg) for data in (train, test)]
        for name in ("knn", "linear", "bias", "bounds"):
            found |= balcon.EVALUATIONS[name](encoder, train, test, features, cfg)
        cfg.probe = "crops"
        found["crops"] = balcon.linear(encoder, train, test, features, cfg)["linear"]
        for data, (x, labels) in zip((train, test), features):
            assert torch.equal(labels, data.labels) and x.dtype == torch.float32
            assert torch.allclose(x, plain(data).flatten(1), atol=1e-4)
        return found

    one = job()
    nearest = F.cosine_similarity(plain(test).flatten(1)[:, None], plain(train).flatten(1), dim=2)
    right = train.labels[nearest.argmax(1)] == test.labels
    assert one["knn1"] == 100 * right.double().mean()
    assert 40 < one["linear"] < 100 and 40 < one["crops"] < 100
    for found in (*on_ranks(2, job, monkeypatch), *on_ranks(3, job, monkeypatch)):
        assert found == pytest.approx(one, rel=1e-4, abs=1e-5)


# ----------------------------------------- theory -----------------------------------------
def extrapolated(whole, *halves):
    """From mean lengths at K views and at K/2 to infinitely many."""
    return math.sqrt(2 * whole.mean() ** 2 - torch.stack(halves).mean() ** 2)


def to_class_mean(x, labels):  # [N]
    same = (labels[:, None] == labels).double()
    return (same @ x / same.sum(1, keepdim=True) - x).norm(dim=1)


def test_eq16_is_unbiased_where_the_plain_estimate_is_not_and_knows_its_error():
    g, labels, found = generator(0), torch.arange(120) % 3, []
    for _ in range(40):
        offset = F.normalize(torch.randn(120, 16, generator=g).double(), dim=1)
        offset *= 0.8 + 0.4 * torch.rand(120, 1, generator=g)
        noise = 0.3 * torch.randn(120, 2, 16, generator=g)  # which leaves 30 % in the plain one
        halves = 5 * torch.eye(3, 16)[labels][:, None] + offset[:, None] + noise
        truth = to_class_mean(offset, labels).mean()
        excess = to_class_mean(halves.mean(1), labels).mean() - truth
        estimate, error = balcon.eq16(halves, labels)
        found.append([estimate - truth, estimate, error, excess])
    bias, _, error, excess = torch.tensor(found).mean(0)
    assert abs(bias) < 0.02 < excess / 10
    assert error == pytest.approx(np.std(found, 0)[1], rel=0.25)


def test_bias_is_eq_51_under_one_t_for_both_images_and_eq_16_and_relative_to_random_pairs():
    data, encoder = pictures(120), stub()
    data.labels = 2 * data.labels + 3  # with gaps
    cfg = settings(theory_images=100, precision="bfloat16")  # of which theory makes no use
    found = balcon.bias(encoder, data, None, None, cfg)
    seen = torch.cat(encoder.backbone[0].inputs)
    row = rows_of(seen)
    flipped = (seen - plain(data)[row]).abs().amax((1, 2, 3)) > 1e-4
    x, other, *views = row.split(100)
    assert len(x.unique()) == 100 and (x != other).all() and all(torch.equal(x, v) for v in views)
    labels = data.labels[x]
    assert torch.equal(labels, data.labels[other]) and labels.bincount().max() == 34
    t, t_other, *t_views = flipped.split(100)
    assert torch.equal(t, t_other) and t.any() and not t.all()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(t_views, 2))
    features = seen.flatten(1).double()
    raw = encoder.double().eval().projector(features).detach()
    for space, z in {"features_": features, "raw_": raw, "": F.normalize(raw, dim=1)}.items():
        z, z_other, *views = z.split(100)
        halves = [(views[0] + views[1]) / 2, (views[2] + views[3]) / 2]
        means, distance = [sum(halves) / 2, *halves], (z - z_other).norm(dim=1)
        eq16 = extrapolated(*(to_class_mean(mean, labels) for mean in means))
        random_pairs, random_means = torch.pdist(z).mean(), extrapolated(*map(torch.pdist, means))
        assert random_means < 0.9 * random_pairs
        for name, expected, tolerance in (
                ("eq51", distance.mean(), 1e-4), ("eq51_error", distance.std() / 10, 1e-4),
                ("eq16", eq16, 1e-4), ("eq51_relative", distance.mean() / random_pairs, 0.06),
                ("eq16_relative", eq16 / random_means, 0.06)):
            assert found[space + name] == pytest.approx(float(expected), rel=tolerance), name


def sides_by_loops(anchor, mean_view, bank, labels, alpha):
    """Eq. 8, 10 and 46 read aloud."""
    rows, names = [], ["attract_left", "attract_right", "repel_left", "repel_right", "b", "nu"]
    for z, view, y in zip(anchor, mean_view, labels):
        classes = {int(c): bank[labels == c] for c in labels}
        b = sum((alpha * members @ z).exp().mean() for members in classes.values()).log() / alpha
        others = [members.mean(0) for c, members in classes.items() if c != y]
        nu, attract = min(prototype.norm() for prototype in others), F.cosine_similarity(z, view, 0)
        left = max(F.cosine_similarity(z, prototype, 0) for prototype in others)
        rows.append([-attract, -z @ view, left, b / nu, b, nu])
    return dict(zip(names, torch.tensor(rows).double().T))


def hard_case(seed):
    """Classes in one corner or anywhere, tight or loose; anchors among or opposite their own."""
    rng = np.random.default_rng(seed)
    classes, d, more = rng.integers(2, (7, 9, 20))
    labels = np.append(np.arange(classes), rng.integers(classes, size=more))
    spread = rng.choice([0.05, 0.3, 1, 10], classes)[labels][:, None]
    centre = (rng.normal(size=(classes, d)) + 2 * (seed % 2))[labels]

    def around(centre, spread):
        return F.normalize(torch.tensor(centre + spread * rng.normal(size=centre.shape)), dim=1)

    anchor = around(rng.choice([-1, 1]) * centre, rng.choice([0.1, 3]))
    mean_view = (anchor + 2 * around(rng.choice([-1, 1]) * anchor.numpy(), spread)) / 3
    alpha = 10 ** rng.uniform(-1, 2.3)
    return anchor, mean_view, around(centre, spread), torch.tensor(labels), alpha


def test_theorem_sides_are_their_equations():
    for case in map(hard_case, range(12)):
        got, expected = balcon.theorem_sides(*case), sides_by_loops(*case)
        assert got.keys() == expected.keys()
        for name in got:
            assert torch.allclose(got[name], expected[name], atol=1e-6), name


def test_theorem_4_6_holds_where_b_is_not_negative_and_with_max_of_b_and_b_over_nu_always():
    fails = 0
    for anchor, mean_view, bank, labels, alpha in map(hard_case, range(500)):
        side = balcon.theorem_sides(anchor, mean_view, bank, labels, alpha)
        left, right, b = side["repel_left"], side["repel_right"], side["b"] + 1e-9
        holds, classes = right - left > -1e-9, len(labels.unique())
        own = torch.stack([bank[labels == label].mean(0) for label in labels])
        assert holds[b >= 0].all() and (torch.maximum(b, right) - left > -1e-9).all()
        assert (b[(anchor * own).sum(1) >= 0] >= 0).all()  # in its class mean's hemisphere
        assert ((b >= 0).all() or alpha > math.log(classes)) and (holds.all() or classes > 2)
        assumed = (anchor * mean_view).sum(1) >= 0  # Assumption 4.3, for Theorem 4.4
        assert (side["attract_right"] - side["attract_left"] > -1e-9)[assumed].all()
        fails += (~holds).sum()
    assert fails > 20


def test_the_counterexample_to_theorem_4_6():
    z, e1, e2 = torch.eye(3).double()
    bank, anchor = -z.repeat(20, 1), z.repeat(20, 1)
    bank[2:4] = -z / 2 + math.sqrt(0.75) * torch.stack([e1, -e1])
    bank[4:6] = -z / 2 + math.sqrt(0.75) * e2
    side = balcon.theorem_sides(anchor, anchor, bank, torch.arange(20) // 2, 8.0)
    left, right, b = (side[name][0].item() for name in ("repel_left", "repel_right", "b"))
    assert (round(left, 3), round(right, 3)) == (-0.5, -0.809) and left < max(b, right)


@pytest.mark.parametrize("seed", [1, 12])
def test_bounds_are_the_mean_gaps_and_the_shares_that_fail(seed):
    data, encoder, cfg = pictures(12), stub(), settings(alpha=30.0, seed=seed)
    data.images = (190 + 25 * torch.randn(12, 3, 2, 2, generator=generator(4))).clamp(0, 255).byte()
    data.images[0] = torch.tensor([190, 5])  # flipped, it looks away from all others
    encoder.projector = torch.nn.Identity()
    found = balcon.bounds(encoder, data, None, None, cfg)
    z = F.normalize(torch.cat(encoder.backbone[0].inputs).flatten(1).double(), dim=1)
    anchor, *views, bank = z.split(12)
    side = sides_by_loops(anchor, sum(views) / 4, bank, data.labels, 30.0)
    attract = side["attract_right"] - side["attract_left"]
    repel = side["repel_right"] - side["repel_left"]
    angle = side["attract_left"].neg().clamp(max=1).acos().rad2deg()
    assert found.pop("nu") == pytest.approx(side["nu"].min().item())
    assert found.pop("angle") == pytest.approx(angle.mean().item(), abs=0.05)
    expected = {"attract_gap": attract, "attract_fails": 100 * (attract < -1e-6),
                "repel_gap": repel, "repel_fails": 100 * (repel < -1e-6),
                "angle_over_90": 100 * (angle > 90), "b_negative": 100 * (side["b"] < 0)}
    expected = {name: values.double().mean().item() for name, values in expected.items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected["b_negative"] > 0 and (seed == 1 or expected["angle_over_90"] > 0)


# ----------------------------------------- subsets ----------------------------------------
def subset(labels, kind="lt", seed=0, limit=0, file=None, images=()):
    cfg = SimpleNamespace(subset=kind, seed=seed, limit=limit, subset_file=file)
    return balcon.training_subset(cfg, images, labels)


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
    for kind, seed in itertools.product(("lt", "uni"), (0, 1)):
        rows = subset(labels, kind, seed)
        assert torch.equal(rows, subset(labels, kind, seed)) and labels[rows].min() >= 0
        assert len(rows.unique()) == len(rows) == round(50_000 * 115_846 / 1_281_167)
        counts[kind, seed] = labels[rows].bincount(minlength=100)
    assert counts["uni", 0].max() - counts["uni", 0].min() <= 1
    assert 5 <= counts["lt", 0].min() < 10 and counts["lt", 0].max() > 200
    assert not torch.equal(counts["lt", 0], counts["lt", 1])
    there = torch.tensor([6, 9, 40, 300, 5, 100, 7])  # no class gives more than it has
    labels = torch.arange(7).repeat_interleave(there)
    for seed in range(9):
        found = labels[subset(labels, seed=seed, limit=60)].bincount(minlength=7)
        assert found.sum() == 60 and (found <= there).all() and found.min() >= 5


def test_subset_file_names_training_images_after_any_folders(tmp_path):
    file = tmp_path / "list.txt"
    files = ["d/n01/a.JPEG", "d/n01/b.png", "d/n02/a.JPEG", "n3/c d.gif"]
    for text, rows in (("train/n02/a.JPEG 1\n\ntrain/n01/a.JPEG 0\n", [0, 2]),  # as ImageNet-LT
                       ("n01/b.png\nx/y/n02/a.JPEG 7", [1, 2]), ("n3/c d.gif\nn01/b.png", [1, 3])):
        file.write_text(text)
        assert subset(torch.arange(4), "full", images=files, file=file).tolist() == rows
    for text, images in (("n01/b.png\nn01/z.JPEG 0", files), ("a.JPEG", files), (" \n\n", files),
                         ("n01/b.png", torch.zeros(4, 3))):  # images in memory have no names
        file.write_text(text)
        with pytest.raises(balcon.UserError, match="list.txt|--subset-file"):
            subset(torch.arange(4), "full", images=images, file=file)


# ----------------------------------------- output -----------------------------------------
def put_run(folder, stage=None, knn=None, linear=50.0, **changes):
    config = balcon.public(balcon.parse_flags(["--dataset", "cifar10"])) | changes
    folder.mkdir()
    (folder / "log.jsonl").write_text(json.dumps({"config": config}) + '\n{"step": 1}\n')
    if stage:
        results = {stage: {"knn": {"knn5": knn}, "linear": {"linear": linear}}}
        (folder / "results.json").write_text(json.dumps({"config": config, **results}))


def test_report_pools_seeds_and_nothing_else(tmp_path, capsys):
    for seed, figure in enumerate((90, 92, 97)):
        put_run(tmp_path / f"seed {seed}", "trained", figure, seed=seed)
    put_run(tmp_path / "stopped", "untrained", 11, seed=3)
    put_run(tmp_path / "killed", alpha=4)
    put_run(tmp_path / "elsewhere", "trained", 70, data="elsewhere")
    put_run(tmp_path / "untrained", "untrained", 30, epochs=0)
    put_run(tmp_path / "null", "trained", 20, None, lr=0.5)  # NaN in results.json
    balcon.report([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    head, _, *rows = [line.strip("| ").replace(" ", "").split("|") for line in lines]
    assert sorted(head[:4]) == ["alpha", "data", "epochs", "lr"] and head[4] == "finishedruns"
    assert head[5:] == ["knn5", "linear"]
    assert sorted(row[4:] for row in rows) == [
        ["0of1", "–", "–"], ["1of1", "20", "–"], ["1of1", "30", "50"], ["1of1", "70", "50"],
        ["3of4", "93±3.6", "50±0"]]
    with pytest.raises(balcon.UserError, match="nowhere"):
        balcon.report([str(tmp_path / "nowhere")])


def tiles_of_picture(path, rows, columns, side):
    """[rows, columns, side, side, 3], without the two pixels between them."""
    picture = np.array(Image.open(path)).astype(int)
    assert picture.shape == (rows * (side + 2) + 2, columns * (side + 2) + 2, 3)
    tiles = picture[2:, 2:].reshape(rows, side + 2, columns, side + 2, 3)
    return tiles.transpose(0, 2, 1, 3, 4)[:, :, :side, :side]


def test_views_png_shows_each_image_beside_two_of_its_views(tmp_path):
    data = pictures(12)
    balcon.draw_views(data, settings(out=tmp_path))
    tiles = tiles_of_picture(tmp_path / "views.png", 3, 12, 64)[:, :, 16::32, 16::32]
    tiles = tiles.reshape(12, 3, 2, 2, 3)
    images = data.images.permute(0, 2, 3, 1).numpy().astype(int)[:, None]
    same = abs(tiles - images).max((2, 3, 4)) <= 1
    flipped = abs(tiles - images[..., ::-1, :]).max((2, 3, 4)) <= 1
    assert same[:, 0].all() and (same ^ flipped).all()
    assert 4 < flipped[:, 1:].sum() < 20 and (flipped[:, 1] != flipped[:, 2]).any()


def lines_of_neighbors(path, backbones):
    """[8, backbones, 10]: the red of the tiles in each line, and which have a green frame."""
    tiles = tiles_of_picture(path, 4 * backbones, 20, 72)
    tiles = np.stack([tiles[:, :10], tiles[:, 10:]]).reshape(8, backbones, 10, 72, 72, 3)
    green = (tiles == (26, 179, 51)).all(-1).sum((3, 4))
    assert set(green.flat) <= {0, 72 ** 2 - 64 ** 2}  # a whole frame, or none
    return tiles[..., 36, 36, 0], green > 0


def test_neighbors_png_frames_the_neighbours_of_the_right_class(tmp_path):
    train, test = pictures(20, 1), pictures(8, 1)
    test.labels = torch.tensor([0, 1, 2, 0, 0, 0, 0, -1])
    bank = torch.randn(2, 20, 3, generator=generator(0))
    queries = torch.randn(2, 8, 3, generator=generator(1))
    backbones = [[(x, train.labels), (q, test.labels)] for x, q in zip(bank, queries)]
    balcon.draw_neighbors(train, test, backbones, settings(out=tmp_path))
    red, framed = lines_of_neighbors(tmp_path / "neighbors.png", 2)
    for i, stage in itertools.product(range(8), (0, 1)):
        similar = F.cosine_similarity(bank[stage], queries[stage, i], dim=1)
        near = similar.argsort(descending=True)[:8]
        assert red[i, stage].tolist() == [2 * i, *(2 * near).tolist(), 255]
        right = train.labels[near] == test.labels[i]
        assert framed[i, stage].tolist() == [False, *right.tolist(), False]


def test_neighbors_png_never_shows_an_image_beside_itself(tmp_path):
    data, features = pictures(8, 1), torch.ones(8, 3)  # of a collapsed backbone
    balcon.draw_neighbors(data, data, [[(features, data.labels)]], settings(out=tmp_path))
    red, framed = lines_of_neighbors(tmp_path / "neighbors.png", 1)
    assert red[:, 0, 0].tolist() == list(range(0, 16, 2)) and (red[:, 0, 8:] == 255).all()
    assert (np.sort(red[:, 0, :8]) == np.arange(0, 16, 2)).all()
    assert framed.sum(2).flatten().tolist() == [2, 2, 1, 2, 2, 1, 2, 2]


def test_exported_features_come_with_labels_files_and_classes(tmp_path):
    x, labels, files = torch.randn(5, 3), torch.arange(5) % 2, [f"é/{i}.png" for i in range(5)]
    disk = balcon.Images(files, labels, ["ä", "b"], None, CPU)
    balcon.export(tmp_path / "x", [(x, labels), (x[:3] + 1, labels[:3])], [disk, disk])
    found = {name: array.tolist() for name, array in np.load(tmp_path / "x").items()}
    assert found == {
        "classes": ["ä", "b"], "train_features": x.tolist(), "train_labels": labels.tolist(),
        "train_files": files, "test_files": files, "test_labels": labels[:3].tolist(),
        "test_features": (x[:3] + 1).tolist()}
    balcon.export(tmp_path / "x", [(x, labels)], [pictures(5)])
    assert sorted(np.load(tmp_path / "x")) == ["classes", "train_features", "train_labels"]


# ----------------------------------------- training ---------------------------------------
def summed_over_ranks(x):
    x = x.detach().clone()
    if balcon.world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x):
    """Differentiable; the losses of all ranks depend on it, so their gradients are summed."""
    own = x.mean(0)
    mean = (summed_over_ranks(own) + own - own.detach()) / balcon.world_size()
    mean.register_hook(summed_over_ranks)
    return mean


class SyncNorm(torch.nn.Module):
    """Batch norm over the batch of all ranks, which nn.SyncBatchNorm refuses to do on a CPU."""

    def forward(self, x):
        x = x - mean_over_ranks(x)
        return x / (mean_over_ranks(x.square()) + 1e-5).sqrt()


class TinyEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        convolution, linear = torch.nn.Conv2d(3, 6, 5, 3), torch.nn.Linear(24, 5)
        self.backbone = torch.nn.Sequential(convolution, torch.nn.Tanh(), torch.nn.Flatten())
        self.projector = torch.nn.Sequential(linear, SyncNorm())
        self.double()  # so that rounding hides no difference

    def forward(self, x):
        return self.projector(self.backbone(x.double()))


TINY = """--dataset cifar10 --size 8 --batch-size 4 --epochs 2 --lr 0.3 --momentum 0.7 --seed 5
    --weight-decay 0.05 --alpha 3 --lam 1.5 --precision float32 --save-every 1"""
TINY_PIXELS = torch.randint(256, (13, 3, 8, 8), dtype=torch.uint8, generator=generator(1))


def train_tiny(out, loss="balanced"):
    """Two epochs of three steps, and one image of 13 is left over in each."""
    cfg = balcon.parse_flags([*TINY.split(), "--loss", loss, "--out", str(out)])
    out.mkdir(exist_ok=True)
    train = balcon.Images(TINY_PIXELS, torch.arange(13), [], cfg, CPU)
    balcon.pretrain(TinyEncoder(), train, cfg)


def loss_of_views(z1, z2, alpha, lam, loss):
    """Eq. 17 anchor by anchor; generalized NT-Xent repels the positive, too."""
    z, m, total = F.normalize(torch.cat([z1, z2]), dim=1), len(z1), 0
    for i, anchor in enumerate(z):
        positive = (i + m) % (2 * m)
        kept = [j for j in range(2 * m) if j != i and (j != positive or loss == "ntxent")]
        repelling = (alpha * z[kept] @ anchor).exp().sum().log()
        total = total + lam / alpha * repelling - z[positive] @ anchor
    return total / (2 * m)


def weights_in(path):
    state, found = torch.load(path), {}
    for part in ("backbone", "projector"):
        found |= {f"{part}.{name}": value for name, value in state[part].items()}
    return found


def logged(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line]


@pytest.mark.parametrize("loss", ["balanced", "ntxent"])
def test_pretraining_is_sgd_with_momentum_decay_and_a_cosine_on_the_loss_named(loss, tmp_path):
    train_tiny(tmp_path, loss)
    views = balcon.Views(["flip", "color_jitter", "grayscale"], 8, [0.08, 1.0])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    names, start = zip(*TinyEncoder().named_parameters())
    history, velocity, rates, values = [[w.detach() for w in start]], [0] * len(names), [], []
    for step in range(6):
        order = torch.randperm(13, generator=balcon.rng(5, "order", step // 3))
        x = TINY_PIXELS[order[4 * (step % 3):][:4]].repeat(2, 1, 1, 1) / 255
        x = (views.apply(x, views.draw(8, balcon.rng(5, "views", step))) - mean) / std
        now = [weight.requires_grad_() for weight in history[-1]]
        z = torch.func.functional_call(TinyEncoder(), dict(zip(names, now)), x)
        values.append(loss_of_views(*z.chunk(2), 3, 1.5, loss))
        rates.append(0.3 * (1 + math.cos(math.pi * step / 6)) / 2)
        for i, gradient in enumerate(torch.autograd.grad(values[-1], now)):
            velocity[i] = 0.7 * velocity[i] + gradient + 0.05 * now[i].detach()
        history.append([w.detach() - rates[-1] * v for w, v in zip(now, velocity)])
    assert [line["step"] for line in logged(tmp_path)] == [1, 3, 6]  # the first, ends of epochs
    for line in logged(tmp_path):
        assert line["lr"] == pytest.approx(rates[line["step"] - 1], rel=1e-9)
        assert line["loss"] == pytest.approx(values[line["step"] - 1].item(), rel=1e-6)
        if loss == "balanced":
            assert line["above_floor"] == pytest.approx(line["loss"] - loss_floor(4, 3, 1.5))
    files = {"epoch0000.pt": 0, "epoch0001.pt": 3, "epoch0002.pt": 6, "last.pt": 6}
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [*files]  # of --save-every 1
    for file, step in files.items():
        found = weights_in(tmp_path / file)
        assert torch.load(tmp_path / file)["step"] == step and len(found) == len(names)
        for name, weight in zip(names, history[step]):
            assert torch.allclose(found[name], weight, rtol=1e-6, atol=1e-8), (file, name)


def train_tiny_on_a_rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    train_tiny(Path(folder, "two"))
    dist.destroy_process_group()


def test_training_on_two_processes_is_that_of_one(tmp_path):
    train_tiny(tmp_path / "one")
    torch.multiprocessing.spawn(train_tiny_on_a_rank, (str(tmp_path),), nprocs=2)
    one, two = weights_in(tmp_path / "one/last.pt"), weights_in(tmp_path / "two/last.pt")
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], rtol=0, atol=1e-6), name
    for line, same in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert line["loss"] == pytest.approx(same["loss"], abs=1e-6)


# ----------------------------------------- runs and resuming ------------------------------
SMALL = """--dataset folder --data photos --size 16 --backbone resnet10 --projector 16 --epochs 2
    --batch-size 4 --no-baseline --workers 0 --save-minutes 1e-6 --eval knn""".split()
MORTAL = """if True:  # dies by SIGKILL when it replaces a file for the fourth time
    import os, signal, balcon
    replace, calls = os.replace, []
    def deadly(*paths):
        calls.append(paths)
        os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else replace(*paths)
    os.replace = deadly
    balcon.main()
"""


def launch(place, *words):
    """Run Python on these words in a process of its own, on the CPU."""
    surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *map(str, words)], cwd=place, env=surroundings,
                          capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of small images, of things that are wrong, and of a finished run of SMALL."""
    root = tmp_path_factory.mktemp("place")
    for i in range(56):  # stripes along one axis or the other, 44 to train on
        split, noise = "train" if i < 44 else "val", np.random.default_rng(i).random((16, 16))
        wave = np.sin(np.arange(16) * (0.5 + noise[0, 0]))[:, None] + noise
        grey = Image.fromarray((60 * (wave.T if i % 2 else wave) + 64).astype(np.uint8))
        for folder in (root / "photos" / split / "ab"[i % 2], root / "flat"):
            folder.mkdir(parents=True, exist_ok=True)
            grey.save(folder / f"{i}.png")
    (root / "broken/train").mkdir(parents=True)
    (root / "broken/train/0.png").write_bytes((root / "flat/0.png").read_bytes()[:60])
    (root / "README").write_text("no checkpoint")
    torch.save({"backbone": {"weight": torch.zeros(3)}}, root / "foreign.pt")
    done = launch(root, HERE / "balcon.py", *SMALL, "--out", "run")
    assert done.returncode == 0, done.stderr
    (root / "screen").write_text(done.stderr)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def run_here(place, monkeypatch, capfd):
    """Run balcon.main on the CPU, in `place`, with the words: exit code, stdout, stderr."""
    def run(*words):
        with pytest.raises(SystemExit) as stop:
            balcon.main([*map(str, words)])
        return stop.value.code, *capfd.readouterr()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(place)
    return run


def results_of(out):
    return json.loads((out / "results.json").read_text())


def test_a_run_in_a_pipe_prints_a_line_at_its_first_step_and_after_each_epoch(place):
    screen = (place / "screen").read_text()
    lines = [line.split() for line in screen.splitlines() if line.startswith("epoch")]
    assert [line[1] for line in lines] == ["0.1/2", "1.0/2", "2.0/2"]
    assert "loss" in lines[0] and "(floor" in lines[0] and "\r" not in screen
    kept = ["last.pt", "log.jsonl", "neighbors.png", "results.json", "views.png"]
    assert sorted(path.name for path in (place / "run").iterdir()) == kept
    first = json.loads((place / "run/log.jsonl").read_text().split("\n")[0])
    assert first["argv"][1:] == [*SMALL, "--out", "run"] and first["config"]["epochs"] == 2
    assert {"git", "torch", "hardware", "processes"} < first.keys()


def test_a_killed_run_goes_on_and_ends_bit_identical(place):
    flags, out = [*SMALL, "--out", "killed"], place / "killed"
    # While the checkpoint of step 11 takes the place of that of step 10; an epoch has 11 steps.
    died = launch(place, "-c", MORTAL, *flags)
    assert died.returncode == -9 and (out / "last.pt.tmp").exists(), died.stderr
    done = launch(place, HERE / "balcon.py", *flags)
    assert done.returncode == 0 and "resuming at step 10 of 22" in done.stdout, done.stderr
    files = place / "run/last.pt", out / "last.pt"
    whole, resumed = map(weights_in, files)  # the momenta of epoch 1 move the weights of epoch 2
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    found = [results_of(folder) for folder in (place / "run", out)]
    assert all(each.pop("seconds") > 0 for each in found) and found[0] == found[1]
    losses, again = ({line["step"]: line["loss"] for line in logged(file.parent)} for file in files)
    assert again.items() >= losses.items()
    shutil.rmtree(out)


def test_a_finished_run_is_not_trained_again_and_gets_the_figures_it_lacks(place, run_here):
    shutil.copytree(place / "run", place / "again")
    files = [place / "again" / name for name in ("last.pt", "log.jsonl", "views.png")]
    before, old = [path.read_bytes() for path in files], results_of(place / "run")
    code, said, _ = run_here(*SMALL, "linear", "--out", "again")
    assert code == 0 and "already trained" in said
    assert [path.read_bytes() for path in files] == before
    found = results_of(place / "again")
    assert 0 <= found["trained"].pop("linear")["linear"] <= 100 and found == old
    shutil.rmtree(place / "again")


def test_torchrun_on_two_processes_has_the_figures_of_its_checkpoint(place, run_here):
    more = "--eval knn bias --theory-images 16 --theory-views 2 --epochs 1".split()
    start = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = launch(place, *start, HERE / "balcon.py", *SMALL, *more, "--out", "two")
    assert done.returncode == 0, done.stderr
    assert run_here("--checkpoint", "two/last.pt", *more[:3], "--out", "one")[0] == 0
    two, one = (results_of(place / name)["trained"] for name in ("two", "one"))
    assert two["knn"] == one["knn"] and two["bias"] == pytest.approx(one["bias"], rel=1e-3)
    shutil.rmtree(place / "two")


# ----------------------------------------- the demonstration ------------------------------
@pytest.mark.parametrize("trained, flags, code, said", [
    (90.1, "", 0, "it learned"), (90.0, "", 1, "FAILED"),
    (20.0, "--seed 1", 1, "FAILED"), (20.0, "--lr 0.1", 0, "holds")])
def test_the_demonstration_fails_unless_it_leaves_less_than_a_quarter_of_the_error(
        trained, flags, code, said, run_here, monkeypatch, tmp_path):
    draw, others = balcon.draw_patterns, {"linear": {}, "bias": {}, "bounds": {}}
    monkeypatch.setattr(balcon, "draw_patterns", lambda n, split: draw(160, split))
    monkeypatch.setattr(balcon, "pretrain", lambda *arguments: 1.0)
    figures = {"untrained": {"knn": {"knn5": 60.0}, **others},
               "trained": {"knn": {"knn5": trained}, **others}}
    (tmp_path / "results.json").write_text(json.dumps(figures))
    (tmp_path / "neighbors.png").touch()  # drawn before
    found = run_here(*flags.split(), "--out", tmp_path)
    assert found[0] == code and said in found[1] and f"{trained:.4g}" in found[1]
    assert ("FAILED" in found[1]) == (code == 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_of_79_columns_on_a_terminal_and_rare_lines_elsewhere(
        terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    progress = balcon.Progress("stage")
    for done, text in ((1, ""), (2, "x" * 200), (3, "short"), (4, "")):
        progress(done, 4, text, always=done < 3)
    written = capsys.readouterr().err
    lines = written.split("\r" if terminal else "\n")
    assert lines[0].startswith("stage 25 %") and lines[1] == 79 * "x"
    assert max(map(len, lines)) == 79 and ("\n" in written) != terminal
    assert "".join(lines[-2:]).isspace() if terminal else len(lines) == 3  # wiped; too soon


# ----------------------------------------- bad input --------------------------------------
BAD = {  # words, after "WORLD_SIZE=2" in the environment or nothing: what the sentence names
    "--loss softmax": "--loss", "--alpha -1": "--alpha -1", "--lam nan": "--lam nan",
    "--batch-size 4.5": "--batch-size", "--add flip": "--add flip", "--theory-views 3": "views 3",
    "--k 5 0": "--k", "--crop-scale 0.5": "--crop-scale", "--crop-scale 1 0.5": "--crop-scale",
    "--dataset folder --data nowhere": "nowhere",
    "--dataset folder --data nowhere --export features.npz": "nowhere",
    "--dataset cifar10 --data broken": "broken/train/0.png",
    "SMALL --alpha 9 --out run": "--out run holds another run, with alpha 4.0, not 9.0",
    "--checkpoint run/last.pt --projector 8": "run/last.pt",
    "--checkpoint README": "README", "--checkpoint missing.pt": "missing.pt",
    "--init foreign.pt": "--init foreign.pt", "--export nowhere/features.npz": "nowhere",
    "WORLD_SIZE=2 --batch-size 63": "--batch-size 63",
    "--dataset folder --data photos --batch-size 64": "--batch-size 32 would fit",
    "--dataset folder --data flat --batch-size 16 --eval knn": "--eval knn",
    "--report nowhere": "nowhere",
}


def files_in(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2_and_leaves_no_trace(
        words, place, run_here, monkeypatch):
    before = files_in(place)
    monkeypatch.setattr(balcon, "pretrain", None)  # it must not come so far
    flags = words.replace("SMALL", " ".join(SMALL)).split()
    if flags[0].startswith("WORLD_SIZE"):
        monkeypatch.setenv(*flags.pop(0).split("="))
    code, _, sentence = run_here(*flags)
    assert code == 2 and sentence.startswith("balcon: ") and sentence.count("\n") == 1
    assert BAD[words] in sentence and "Traceback" not in sentence
    assert files_in(place) == before


def test_a_corrupt_image_is_named_and_with_a_good_one_the_same_command_goes_on(place, run_here):
    bad = place / "photos/train/a/12.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    flags = [*SMALL, "--epochs", "0", "--workers", "1", "--out", "own"]
    code, _, sentence = run_here(*flags)
    bad.write_bytes(good)
    assert code == 2 and sentence.count("\n") == 1
    assert sentence.startswith("balcon: cannot read the image photos/train/a/12.png")
    assert run_here(*flags)[0] == 0 and results_of(place / "own")["untrained"]["knn"]


# ----------------------------------------- benchmark --------------------------------------
PEAK = 989e12  # FLOP/s, by the data sheet
DOWNLOADS = {"cifar10": (50_000, 32), "cifar100": (50_000, 32), "stl10": (105_000, 96),
             "imagenet": (1_281_167, 256)}


def images_to_time(cfg, device):
    """Images, and how many the recipe has. Random pixels where they would be downloaded."""
    if cfg.dataset not in DOWNLOADS or cfg.data.is_dir():
        train = balcon.load_data(cfg, device)[0]
        return train, len(train)
    print(f"there is no {cfg.data}: random pixels in memory stand for the images")
    n, side = DOWNLOADS[cfg.dataset]
    pixels = torch.randint(256, (1024, 3, side, side), dtype=torch.uint8)
    return balcon.Images(pixels, torch.zeros(1024).long(), [], cfg, device), n


def seconds_of(calls, budget, cuda):
    """Medians. All take turns, so that noise hits all alike; the first round warms up."""
    rounds, end = [], time.perf_counter() + budget
    while len(rounds) < 2 or len(rounds) < 10 and time.perf_counter() < end:
        rounds.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            torch.cuda.synchronize() if cuda else None
            rounds[-1].append(time.perf_counter() - start)
    return np.median(rounds[1:], 0)


def benchmark(argv, budget=25):
    """python test_balcon.py benchmark [flags of balcon.py]: where the time of a step goes."""
    cfg, device = balcon.parse_flags(argv), balcon.start_processes()
    cuda, encoder = device.type == "cuda", balcon.build_encoder(cfg, device)
    cfg.workers *= cuda  # on a CPU they would take the network's cores
    train, n = images_to_time(cfg, device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.eval()(torch.zeros(1, 3, cfg.size, cfg.size, device=device))
    flop = 3 * counter.get_total_flops()  # of a view: backward takes twice the forward pass
    m = min(cfg.batch_size, len(train))
    if not cuda:
        m = min(m, max(2, int(4e10 / flop)))  # about a second
    views, rows = balcon.Views(cfg.parts, cfg.size, cfg.crop_scale), torch.arange(m)
    sample = ((i, torch.randperm(len(train))[:m]) for i in itertools.count())
    batches = train.batches(sample, views, 2, ("benchmark",))
    x, z = next(batches)[1], torch.randn(2 * m, cfg.projector[-1], device=device)
    pixels, left = train[0, rows, 2, views.draw(2 * m, generator(0))][2:]
    k = 1 if train.in_memory else 1 + 2 * cfg.workers  # more than what is ready
    optimizer = torch.optim.SGD(encoder.train().parameters(), 1e-6, 0.9)

    def update(x, backward):
        with balcon.autocast(device, cfg):
            z = encoder(x)
        optimizer.zero_grad()
        backward(z)
        optimizer.step()

    def loss(z):
        balcon.LOSSES[cfg.loss](*z.chunk(2), cfg.alpha, cfg.lam, cfg.similarity).backward()

    def augment():
        drawn = views.draw(2 * m, generator(0))
        t = {name: drawn[name] for name in left}  # crops of files are part of reading them
        views.apply(balcon.to_device(pixels, device).float() / 255, t)

    calls = [lambda: [update(next(batches)[1], loss) for _ in range(k)], augment,
             lambda: update(x, lambda z: z.backward(torch.ones_like(z))),
             lambda: loss(z.requires_grad_()),
             lambda: train[0, rows, 2, views.draw(2 * m, generator(0))]]
    step, view, network, losing, reading = seconds_of(calls, budget, cuda)
    step, reading = step / k, reading / max(1, cfg.workers)
    total = 2 * cfg.epochs * (n - n % cfg.batch_size)
    table = [
        ("training step", 2 * m / step, f"views/s, from pixels to update; {m} images a step"),
        ("bare network", 2 * m / network, "views/s: forward, backward, SGD on ready tensors"),
        ("step / network", network / step, "of these two rates; 1 would be ideal"),
        ("views", view / step, "seconds of augmenting / of a step"),
        ("loss", losing / step, "seconds of the loss and its gradient / of a step"),
        ("reading", reading / step, "seconds of reading and cropping / of a step"),
        ("PFLOP", total * flop / 1e15, "of the recipe: three forward passes a view"),
        ("hours", total / 2 / m * step / 3600, "of the recipe on this machine"),
        ("share of peak", 2 * m / step * flop / PEAK, "of an H100: 989 TFLOP/s, bfloat16, dense"),
        ("memory", torch.cuda.max_memory_allocated() / 1e9, "GB of the GPU at most")]
    for name, value, meaning in table[:None if cuda else -2]:
        print(f"{name:16}{value:10.4g}  {meaning}")


def test_the_benchmark_counts_flops_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    flags = "--dataset stl10 --batch-size 2 --size 32 --projector 1 --epochs 3"
    benchmark(flags.split(), budget=0)
    lines = capsys.readouterr().out.splitlines()[1:]
    value = {line[:16].strip(): float(line[16:26]) for line in lines}
    # torchvision states 1.814 G multiply-adds of its ResNet-18 for 224 = 7 · 32 pixels, of which
    # 1000 · 512 are in the last layer.
    flop = 2 * (1.814e9 - 1000 * 512) / 7 ** 2
    assert value["PFLOP"] == pytest.approx(3 * 2 * 3 * 105_000 * flop / 1e15, rel=1e-3)
    assert value["hours"] == pytest.approx(63e4 / value["training step"] / 3600, rel=1e-2)
    assert value["views"] > 0 and value["loss"] > 0 and not list(tmp_path.iterdir())


# ----------------------------------------- the study --------------------------------------
sys.path.insert(0, str(Path(__file__).resolve().parent / ".github" / "results"))
import instruments  # noqa: E402
import study  # noqa: E402


def test_results_page_is_what_the_runs_say():
    study.tables(check=True)


@pytest.mark.parametrize("pattern, change", [
    # two figures of a row swapped, in a generated table and in one written by hand
    (r"(\| balanced \(2, 4\) +\| ResNet-10 .*?)(34\.22 ± 0\.73)(.*?)(44\.85 ± 0\.41)", r"\1\4\3\2"),
    (r"(cosine )([\d.]+)(<!--\S+?-->, Euclidean )([\d.]+)", r"\1\4\3\2"),
    # a figure of a sentence, changed or replaced by a word; a row left out
    (r"63\.6(<!--trial-2/linear-->)", r"66.3\1"), (r"−0\.03(<!--loss/mean-->)", r"−3.00\1"),
    (r"0\.20(<!--r2/all-->)", r"high\1"), (r"\| base .*\n", ""),
])
def test_a_falsified_results_page_is_found_out(pattern, change, tmp_path, monkeypatch):
    text, n = re.subn(pattern, change, study.PAGE.read_text(encoding="utf8"), count=1)
    assert n == 1
    (tmp_path / "RESULTS.md").write_text(text, encoding="utf8")
    monkeypatch.setattr(study, "PAGE", tmp_path / "RESULTS.md")
    with pytest.raises(SystemExit, match="should be"):
        study.tables(check=True)


def test_decimal_figures_of_the_results_page_name_their_source():
    text = study.PAGE.read_text(encoding="utf8")
    needs_none = (r"```.*?```", r"(?m:^ {4}.*?$)", r"`[^`\n]*`", r"\]\([^)]*\)", r"<!--.*?-->",
                  r"(Theorem|Assumption|PyTorch|arXiv) \S+")
    for pattern in (study.TABLE.pattern, study.FIGURE.pattern, *needs_none):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+", text) == []


def test_leave_one_out_by_leaving_one_out():
    a, b, y = np.random.default_rng(0).normal(size=(3, 9))
    errors, mean_errors = [], []
    for i in range(9):
        kept = np.arange(9) != i
        x = np.column_stack([np.ones(9), a, b])
        weights = np.linalg.lstsq(x[kept], y[kept], rcond=None)[0]
        errors.append((y[i] - x[i] @ weights) ** 2)
        mean_errors.append((y[i] - y[kept].mean()) ** 2)
    assert study.fit([a, b], y)[1] == pytest.approx(1 - sum(errors) / sum(mean_errors))
    assert study.p_value(2.228, 10) == pytest.approx(0.05, abs=2e-4)  # from a table of Student's t


def views(m=7, d=5, classes=3):
    z = F.normalize(torch.randn(m, 2, d, dtype=torch.float64, generator=balcon.rng("study")), dim=2)
    return z, torch.arange(m) % classes


def anchors(z, labels):
    """(positive similarity, negatives' similarities, whether they are of its class) by loops."""
    for i, j in itertools.product(range(len(z)), range(2)):
        negatives = [(float(z[i, j] @ z[k, v]), bool(labels[i] == labels[k]))
                     for k in range(len(z)) if k != i for v in range(2)]
        yield float(z[i, 0] @ z[i, 1]), *map(np.array, zip(*negatives))


def test_repulsion_and_nscl_by_loops():
    (z, labels), alpha, lam, rows = views(), 3.0, 2.5, []
    found = {**instruments.repulsion(z, labels, alpha, lam),
             **instruments.nscl(z, labels, alpha, lam)}
    for positive, s, own in anchors(z, labels):
        e, e4 = np.exp(alpha * s), np.exp(4 * s)
        n = own.sum() / 2 + 1
        rows.append([positive, s.mean(), own.mean(), lam * e[own].sum() / e.sum(),
                     e4[own].sum() / e4.sum(), 1 / (1 + e4.sum() / np.exp(4 * positive)),
                     lam * (np.log(e.mean()) / alpha - s.mean()), alpha * lam / 2 * s.var(),
                     lam / alpha * np.log(e.sum() / e[~own].sum()),
                     lam / alpha * np.log(1 + (n - 1) * np.exp(2 * alpha) / (len(z) - n))])
    names = ("positive", "negative", "by_chance", "lam_share", "same_class_4", "ntxent_positive_4",
             "repelling", "second_order", "gap", "bound")
    assert [found[name] for name in names] == pytest.approx(np.mean(rows, 0).tolist(), rel=1e-5)


def test_ntxent_can_prefer_views_that_differ():
    for alpha, lam, best in (8, 2, 0.86), (8, 4, 0.73), (8, 8, 0.62), (4, 2, 1), (2, 1, 1):
        found = instruments.best_positive_similarity(512, alpha, lam)
        assert found == pytest.approx(best, abs=0.005)
    p, k = np.linspace(-1, 1, 200_001), 2 * (512 - 1)
    bound = -p + 4 / 8 * np.log(np.exp(8 * p) + k * np.exp(-8 * (1 + p) / k))
    assert instruments.ntxent_floor(512, 8, 4) == pytest.approx(bound.min())
    z1, z2 = views()[0].unbind(1)
    assert balcon.generalized_nt_xent_loss(z1, z2, 8, 4) > instruments.ntxent_floor(7, 8, 4)


def test_class_distances_and_few_shots_by_loops():
    z, labels = views(12, 4)
    x = z[:, 0]
    centres = [x[labels == c].mean(0) for c in range(3)]
    whole, along = [], []
    for i, j in itertools.permutations(range(3), 2):
        line, rest = centres[j] - centres[i], x[labels == i] - centres[i]
        whole.append((rest ** 2).sum(1).mean() / (line @ line))
        along.append(((rest @ (line / line.norm())) ** 2).mean() / (line @ line))
    assert instruments.cdnv(x, labels) == pytest.approx((np.mean(whole), np.mean(along)))
    nearest = [min(range(3), key=lambda c: float((row - centres[c]).norm())) for row in z[:, 1]]
    assert instruments.nearest_centre(x, labels, z[:, 1]).tolist() == nearest
    corners = torch.eye(3)[labels] + 0.01 * torch.rand(12, 3, generator=balcon.rng(0))
    assert (instruments.few_shot(corners, labels, corners, labels, 2, 3, 0) == 100).all()


def test_losses_of_the_study_by_loops():
    z, labels = views()
    z1, z2 = 3 * z[:, 0], 2 * z[:, 1]  # lengths do not matter
    rows = [3 * (s ** 2).mean() - positive for positive, s, _ in anchors(z, labels)]
    assert instruments.quadratic(z1, z2, 3, 2).item() == pytest.approx(np.mean(rows), rel=1e-5)
    loss = np.mean([float((x - y) @ (x - y)) for x, y in z])
    for v in range(2):
        pairs = [z[i, v] - z[j, v] for i, j in itertools.combinations(range(len(z)), 2)]
        loss += np.log(np.mean([math.exp(-2 * float(x @ x)) for x in pairs])) / 2
    assert instruments.wang_isola(z1, z2, 4, 2).item() == pytest.approx(loss / 2, rel=1e-5)


def test_the_strong_recipe_has_no_batch_norm_in_its_projector(monkeypatch):
    monkeypatch.setattr(balcon, "build_encoder", balcon.build_encoder)
    monkeypatch.setattr(balcon.AUGMENTATIONS["grayscale"], "p", 0.2)
    cfg = balcon.parse_flags(["--dataset", "cifar10", *instruments.strong_recipe()])
    layers = balcon.build_encoder(cfg, torch.device("cpu")).projector
    assert [list(p.shape) for p in layers.parameters()] == [[1024, 512], [1024], [128, 1024], [128]]
    assert balcon.AUGMENTATIONS["grayscale"].p == 0.1


if __name__ == "__main__":
    if sys.argv[1:2] != ["benchmark"]:
        sys.exit("usage: pytest, or: python test_balcon.py benchmark [flags of balcon.py]")
    benchmark(sys.argv[2:])
