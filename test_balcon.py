# SPDX-License-Identifier: MIT
"""Tests of balcon.py against independent oracles: float64 loops, torchvision, closed forms.

    pytest                                              # no network, no data
    python test_balcon.py benchmark --dataset cifar10   # where the time of a step goes

The claims; each is the name of a test:

Losses
- losses are their equations in float32 at least
- ntxent is simclrs and a regular simplex has the least balanced loss
- losses refuse nonsense
- two processes have the loss and gradients of one also when copied out

Views
- crops are those of random resized crop
- augmentations are torchvisions
- noise is gaussian with deviation a tenth and another for each image
- an augmentation changes its share of the images
- parameters are drawn from the stated distributions
- every rank sees its rows of the global batch of files
- recipes are the papers or ours
- bfloat16 is the default on gpus that compute in it

Data and model
- images of every kind come out right and upright
- folders are classes and hidden files and others are left out
- images that are not all in class folders have no labels
- a fixed tenth is held out and limit keeps the same images for every seed
- drawn patterns are balanced and no image is drawn twice
- torchvisions data sets are taken as they are
- the projector and the stem are the papers
- backbones are torchvisions and init takes the weights that fit

Evaluation
- knn is a majority vote by cosine and ties go to the nearest
- linear predict finds the minimum of its objective whatever the scale of an image
- crops classifier is a softmax regression by sgd or lars
- crops classifier sees a fresh crop of each image in every epoch
- crops classifier resumes after its last epoch and only with its backbone
- evaluation is in eval mode and counts each image once on two ranks

Theory
- eq16 is unbiased where the plain estimate is not and knows its error
- bias is eq 51 under one t for both images and eq 16 and relative to random pairs
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

Runs and resuming
- a run in a pipe prints a line at its first step and after each epoch
- a killed run goes on and ends bit identical
- a finished run is not trained again and gets the figures it lacks
- torchrun on two processes has the figures of its checkpoint

The demonstration
- the demonstration fails unless it leaves less than a quarter of the error

Bad input
- bad input is one sentence and exit code 2 and leaves no trace
- too few gpus or too little memory is one sentence
- a corrupt image is named and with a good one the same command goes on
- theory needs labels but no test images

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
- rounding of the study is that of autocast to bfloat16
"""
import inspect
import itertools
import json
import math
import os
import re
import shutil
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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

import balcon
from balcon import balanced_contrastive_loss, generalized_nt_xent_loss, nscl_loss

HERE = Path(balcon.__file__).resolve().parent
CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
if __name__ != "__main__":  # the benchmark takes all cores
    torch.set_num_threads(1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_close(got, expected, tolerance=1e-5):
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < tolerance


def on_a_rank(rank, folder):
    store, results = f"file://{folder}/store", {}
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for job in (losses_and_gradients, evaluated, train_tiny):
        results[job] = job(folder)
    torch.save(results, folder / f"{rank}.results")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """[{job: what it returns} on each of two processes], which are started once for all jobs."""
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.multiprocessing.spawn(on_a_rank, [folder], nprocs=2)
    return [torch.load(folder / f"{rank}.results", weights_only=False) for rank in (0, 1)]


# ----------------------------------------- losses -----------------------------------------
LOSS_NAMES = {"balanced": "balanced_contrastive_loss", "ntxent": "generalized_nt_xent_loss",
              "nscl": "nscl_loss"}
KINDS = list(itertools.product(LOSS_NAMES, ["cosine", "dot", "euclidean"]))
CLASSES = torch.tensor([0, 0, 0, 1, 0, 2, 0, 1])  # of eight images, and of unlike size


def random_views(m, d):
    return torch.randn(2, m, d, dtype=torch.float64, generator=generator(m))


def loss_called(name, z, alpha, lam, kind, labels=CLASSES, place=vars(balcon)):
    function = place[LOSS_NAMES[name]]
    if name == "nscl":
        return function(*z, labels, alpha, lam, kind)
    return function(*z, alpha, lam, kind)


def similarity(x, y, kind):
    if kind == "euclidean":
        return -(x - y).square().sum()
    return x @ y if kind == "dot" else x @ y / (x.norm() * y.norm())


def repels(name, i, j, m):
    """Whether anchor i repels view j; views i and i + m are of image i."""
    if name == "nscl":
        return CLASSES[i % m] != CLASSES[j % m]
    return i != j if name == "ntxent" else i % m != j % m


def loss_by_loops(name, z1, z2, alpha, lam, kind="cosine"):
    """Eq. 17 read aloud: each of the 2m anchors, its positive, and the list of what it repels."""
    z, m, total = torch.cat([z1, z2]).double(), len(z1), 0
    for i, anchor in enumerate(z):
        repelled = []
        for j, view in enumerate(z):
            s = similarity(anchor, view, kind)
            if repels(name, i, j, m):
                repelled.append(alpha * s)
            if i % m == j % m and i != j:
                total = total - s
        total = total + lam / alpha * torch.stack(repelled).logsumexp(0)
    return total / (2 * m)


@pytest.mark.parametrize("name, kind", KINDS)
def test_losses_are_their_equations_in_float32_at_least(name, kind):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        z = (300 * F.normalize(random_views(8, 5), dim=2)).to(dtype)  # 300²: not a float16
        for alpha, lam in ((1, 1), (2, 4), (8, 0.5), (3, 0)):
            with torch.autocast("cpu", torch.bfloat16):
                got = loss_called(name, z, alpha, lam, kind)
            assert got.shape == () and got.dtype == torch.promote_types(dtype, torch.float32)
            expected = loss_by_loops(name, *z, alpha, lam, kind)
            assert got.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    z = random_views(8, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_called(name, z, 3.0, 2.0, kind), z)


@pytest.mark.parametrize("m, alpha, lam", [(2, 1, 1), (4, 4, 2), (12, 0.5, 0.3)])
def test_ntxent_is_simclrs_and_a_regular_simplex_has_the_least_balanced_loss(m, alpha, lam):
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


def test_losses_refuse_nonsense():
    z = torch.ones(4, 3)
    for z1, z2, *arguments in (
        (z, z[:3], 1, 1), (z[:1], z[:1], 1, 1), (z, z, 0, 1), (z, z, -1, 1), (z, z, 1, -1),
        (z, z, math.nan, 1), (z, z, 1, math.nan), (z, z, 1, 1, "manhattan"),
    ):
        with pytest.raises(ValueError):
            balanced_contrastive_loss(z1, z2, *arguments)
    with pytest.raises(ValueError, match="class"):
        nscl_loss(z, z, torch.zeros(4), 1, 1)


def losses_and_gradients(folder):
    """{(loss, similarity): (loss, gradient of a step)} of this rank's images, by copied code."""
    copied = {"math": math, "torch": torch, "F": F, "dist": dist}  # an empty file's imports
    for name in LOSS_NAMES.values():
        exec(inspect.getsource(getattr(balcon, name)), copied)
    mine = slice(balcon.rank(), None, balcon.world_size())
    x, found = random_views(8, 6)[:, mine].flatten(0, 1), {}
    for name, kind in KINDS:
        torch.manual_seed(1)
        net = nn.Linear(6, 4, bias=False).double()
        if dist.is_initialized():
            net = nn.parallel.DistributedDataParallel(net)
        loss = loss_called(name, net(x).chunk(2), 4.0, 2.0, kind, CLASSES[mine], copied)
        loss.backward()
        found[name, kind] = loss.detach(), next(net.parameters()).grad
    return found


def test_two_processes_have_the_loss_and_gradients_of_one_also_when_copied_out(two_ranks):
    first, second = (results[losses_and_gradients] for results in two_ranks)
    for key, (loss, gradient) in losses_and_gradients(None).items():
        assert_close((first[key][0] + second[key][0]) / 2, loss, 1e-9)
        for rank in (first, second):
            assert_close(rank[key][1], gradient, 1e-9)


# ----------------------------------------- views ------------------------------------------
RATES = {"flip": 0.5, "color_jitter": 0.8, "grayscale": 0.2, "gaussian_blur": 0.5,
         "random_cutout": 0.5, "random_rotation": 0.75, "gaussian_noise": 0.5}


def pixels(n, size):
    return torch.rand(n, 3, size, size, generator=generator(0))


def drawn(name, n=4000):
    return balcon.Views([name], 8, (0.08, 1)).draw(n, generator(1))[name]


def augmented(name, x, t):
    """x after this augmentation with parameters t, applied to each image."""
    views = balcon.Views([name], x.shape[-1], (1, 1))
    return views.apply(x.clone(), {name + "?": torch.ones(len(x), dtype=torch.bool), name: t})


def assert_uniform(values, low, high):
    """By Kolmogorov and Smirnov's test, which a sound draw fails once in 1,500 times."""
    values = values.flatten().double().sort().values
    expected = torch.linspace(low, high, len(values), dtype=torch.float64)
    assert_close(values, expected, 2 / math.sqrt(len(values)) * (high - low))
    assert low - 1e-6 < values[0] and values[-1] < high + 1e-6


def crop_by_torchvision(image, candidates, size):
    """What RandomResizedCrop does, had it drawn these (area, ratio, top, left)."""
    height, width = image.shape[1:]
    for area, ratio, top, left in candidates.tolist():
        h = round(math.sqrt(area * height * width / ratio))
        w = round(math.sqrt(area * height * width * ratio))
        if h <= height and w <= width:
            top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
            break
    else:
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    return TF.resized_crop(image, top, left, h, w, [size, size])


@pytest.mark.parametrize("size", [5, 16, 40])  # to shrink and to grow
def test_crops_are_those_of_random_resized_crop(size):
    x, views = pixels(300, 24), balcon.Views([], size, (0.002, 1))
    t = views.draw(300, generator(2))
    for image, candidates, got in zip(x, t["crop"], views.apply(x, t)):
        assert_close(got, crop_by_torchvision(image, candidates, size))


def color_jitter(image, t):
    parts = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for part in t[4:].int():
        image = parts[part](image, t[part])
    return image


def random_cutout(image, centre):
    size, image = image.shape[-1], image.clone()
    top, left = (centre * size).int() - size // 4
    hole = image[:, max(top, 0):top + size // 2, max(left, 0):left + size // 2]
    hole[:] = torch.tensor(MEAN)[:, None, None]
    return image


BY_TORCHVISION = {
    "flip": lambda image, t: TF.horizontal_flip(image),
    "grayscale": lambda image, t: TF.rgb_to_grayscale(image, 3),
    "gaussian_blur": lambda image, sigma: TF.gaussian_blur(image, [23, 23], [float(sigma)] * 2),
    "random_rotation": lambda image, turns: TF.rotate(image, 90.0 * int(turns)),
    "color_jitter": color_jitter, "random_cutout": random_cutout}


@pytest.mark.parametrize("name", BY_TORCHVISION)
def test_augmentations_are_torchvisions(name):
    x, t = pixels(60, 32), drawn(name, 60)
    x[0] = 0.5  # grey has no hue
    x[1, 0] = x[1, 1]  # ties between channels
    for image, its_t, got in zip(x, t, augmented(name, x, t)):
        assert_close(got, BY_TORCHVISION[name](image, its_t))


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
    crop = balcon.Views([], 8, (0.08, 1)).draw(4000, generator(0))["crop"]
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


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_sees_its_rows_of_the_global_batch_of_files(world, tmp_path, monkeypatch):
    images, files = [], [str(tmp_path / f"{i}.png") for i in range(9)]
    for i, shape in enumerate([(32, 32), (40, 300), (300, 41)] * 3):
        x = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=generator(i))
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(files[i])
        images.append(x / 255)
    cfg, rows = SimpleNamespace(size=16, workers=0), torch.tensor([4, 0, 8, 1, 2])
    data = balcon.Images(files, torch.arange(9), [], cfg, CPU)
    views = balcon.Views(list(RATES), 16, (0.2, 1))
    t = views.draw(10, balcon.rng("key", 3))  # two views of each row, first all the first ones
    crops = [crop_by_torchvision(images[row], candidates, 16)
             for row, candidates in zip(rows.repeat(2), t.pop("crop"))]
    x = TF.normalize(views.apply(torch.stack(crops), t), MEAN, STD).unflatten(0, (2, 5))
    monkeypatch.setattr(balcon, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(balcon, "rank", lambda: rank)
        (_, got), = data.batches([(3, rows)], views, 2, ("key",))
        difference = got - x[:, rank::world].flatten(0, 1)
        assert difference.abs().mean((1, 2, 3)).max() < 0.02  # a grey level: Pillow rounds
        (_, got), = data.batches([(3, rows)])
        for row, centre in zip(rows[rank::world], got):
            side = round(0.875 * min(images[row].shape[1:]))
            expected = TF.resize(TF.center_crop(images[row], [side]), [16, 16])
            assert (centre - TF.normalize(expected, MEAN, STD)).abs().mean() < 0.02


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
    cfg = vars(balcon.parse_flags(["--dataset", dataset]))
    assert {name: cfg[name] for name in RECIPES[dataset]} == RECIPES[dataset]


@pytest.mark.parametrize("gpu, precision", [("new", "bfloat16"), ("old", "float32")])
def test_bfloat16_is_the_default_on_gpus_that_compute_in_it(gpu, precision, monkeypatch):
    def supported(including_emulation=True):  # torch counts emulation unless told
        return gpu == "new" or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert balcon.recipe_of("cifar10")["precision"] == precision


# ----------------------------------------- data and model ---------------------------------
def put_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name, "png")


def loaded(root, *flags, dataset="folder"):
    cfg = balcon.parse_flags(["--dataset", dataset, "--data", str(root), *flags])
    return balcon.load_data(cfg, CPU)


def test_images_of_every_kind_come_out_right_and_upright(tmp_path):
    across, down = np.meshgrid(8 * np.arange(30), 6 * np.arange(40))
    photo = Image.fromarray(np.dstack([across, down, 255 - across]).astype(np.uint8))
    grey, turned = photo.convert("L"), Image.Exif()
    turned[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a 🌇 [1].jpg", exif=turned)
    photo.convert("CMYK").save(tmp_path / "b.jpg")
    photo.save(tmp_path / "c.gif")
    grey.convert("LA").save(tmp_path / "e.tif")
    Image.fromarray(257 * np.asarray(grey).astype(np.uint16)).save(tmp_path / "f.png")
    for file in tmp_path.iterdir():
        expected = grey if file.suffix in (".tif", ".png") else photo
        got = balcon.read_image(file)
        assert got.mode == "RGB" and got.size == (30, 40)
        difference = np.array(got, float) - np.array(expected.convert("RGB"))
        assert abs(difference).mean() < 6, file


def test_folders_are_classes_and_hidden_files_and_others_are_left_out(tmp_path):
    put_images(tmp_path / "train", "снег/a.png", "猫/b.GIF", "猫/c/d.jpg", "猫/.e.png", ".f/g.png")
    put_images(tmp_path / "train", "猫/notes.txt", "猫/film.mpg", "猫/x.h5", "猫/scan.pdf")
    put_images(tmp_path / "val", "猫/a.png", "снег/b.png")
    put_images(tmp_path / "test", "without a label.png")  # ImageNet's
    train, test = loaded(tmp_path)
    assert train.classes == ["снег", "猫"] and test.labels.tolist() == [0, 1]
    assert train.labels.tolist() == [0, 1, 1] and train.classes[1] in train.images[2]
    put_images(tmp_path, "val/bird/a.png")
    with pytest.raises(balcon.UserError, match="bird"):
        loaded(tmp_path)


@pytest.mark.parametrize("names", ["a.png b.png", "x/a.png x/y/b.png", "x/a.png y/b.png c.png"])
def test_images_that_are_not_all_in_class_folders_have_no_labels(names, tmp_path):
    put_images(tmp_path, *names.split())
    train, *test = loaded(tmp_path)
    assert train.labels.tolist() == [-1] * len(names.split())
    assert train.classes == [] and test == []


def test_a_fixed_tenth_is_held_out_and_limit_keeps_the_same_images_for_every_seed(tmp_path):
    put_images(tmp_path, *(f"test/{i}.png" for i in range(5)))  # without train/, a class
    put_images(tmp_path, *(f"many/{i}.png" for i in range(20)))
    train, test = loaded(tmp_path)
    assert test.labels.bincount().tolist() == [2, 1]
    assert len({*train.images, *test.images}) == 25
    some, again = (loaded(tmp_path, "--limit", "12", "--seed", seed) for seed in "01")
    assert some[0].labels.bincount().tolist() == [8, 4]
    assert all((a.images == b.images).all() for a, b in zip(some, again))
    put_images(tmp_path / "one image a class", "x/a.png", "y/b.png")
    assert len(loaded(tmp_path / "one image a class")) == 1
    labels = torch.tensor([1, 0]).repeat(50)
    places = [balcon.rank_within_class(labels, key).view(50, 2).T for key in "aab"]
    assert all(place.sort().values.equal(torch.arange(50).repeat(2, 1)) for place in places)
    assert places[0].equal(places[1]) and not places[0].equal(places[2])
    assert not places[0][0].equal(places[0][1])


def test_drawn_patterns_are_balanced_and_no_image_is_drawn_twice():
    (train, labels, classes), (test, *_) = (balcon.draw_patterns(80, x) for x in ("train", "test"))
    assert labels.bincount().tolist() == [10] * 8 == [10] * len(classes)
    assert len(torch.cat([train, test]).unique(dim=0)) == 160


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
    side = {"cifar10": 32, "stl10": 96}[dataset]
    put_images(tmp_path, "train/a/1.png")  # class folders in its place
    with pytest.raises(balcon.UserError, match=f"1.png is not {side}×{side}"):
        loaded(tmp_path, dataset=dataset)


def test_the_projector_and_the_stem_are_the_papers():  # A.3.1, A.4.1
    encoder = balcon.Encoder("resnet10", "cifar", [32, 16, 8])
    names = [type(layer).__name__ for layer in encoder.projector]
    assert names == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    shapes = [list(weight.shape) for weight in encoder.projector.parameters()]
    # Linear layers have no bias, and the last batch norm has no parameters.
    assert shapes == [[32, 512], [32], [32], [16, 32], [16], [16], [8, 16]]
    conv, x = encoder.backbone.conv1, torch.zeros(1, 3, 32, 32)
    assert conv.kernel_size == (3, 3) and conv.bias is None
    assert encoder.backbone.maxpool(conv(x)).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("name, blocks", [("resnet8", 1), ("resnet10", 1), ("resnet18", 2)])
def test_backbones_are_torchvisions_and_init_takes_the_weights_that_fit(name, blocks, tmp_path):
    resnet, cfg = torchvision.models.resnet, balcon.parse_flags(["--projector", "8"])
    given, x = resnet.ResNet(resnet.BasicBlock, [blocks] * 4), torch.randn(2, 3, 32, 32)
    if name == "resnet8":
        given.layer4, given.fc.in_features = nn.Identity(), 256
    weights, given.fc = given.state_dict(), nn.Identity()
    cfg.init, cfg.backbone = tmp_path / "given.pt", name
    for content in (weights, {"backbone": given.state_dict(), "projector": {}, "step": 3}):
        torch.save(content, cfg.init)
        own = balcon.build_encoder(cfg, CPU).backbone
        assert str(own) == str(given)
        assert_close(own.eval()(x), given.eval()(x))
    cfg.stem = "cifar"
    taken = balcon.build_encoder(cfg, CPU).backbone.state_dict()
    assert taken.pop("conv1.weight").shape[-1] == 3  # which does not fit
    assert all(torch.equal(weight, weights[name]) for name, weight in taken.items())
    cfg.backbone = "resnet50"  # some of its batch norms have the same shapes
    with pytest.raises(balcon.UserError, match="most of its weights do not fit"):
        balcon.build_encoder(cfg, CPU)


# ----------------------------------------- evaluation -------------------------------------
def stub(patience=None):
    """An encoder that keeps what it sees, `patience` batches of it, and whose batch norms tell
    whether it is in eval mode."""
    torch.manual_seed(0)
    encoder, norms = nn.Module(), (nn.BatchNorm2d(3), nn.BatchNorm1d(5))
    encoder.backbone = nn.Sequential(norms[0], nn.Flatten())
    encoder.projector = nn.Sequential(nn.Linear(12, 5), norms[1])
    encoder.seen = []

    def see(module, inputs):
        if len(encoder.seen) == patience:
            raise KeyboardInterrupt
        encoder.seen.extend(inputs)

    encoder.backbone.register_forward_pre_hook(see)
    return encoder


def pictures(n, size=2, seed=0):
    """Images of three classes, whose red says which image it is, also in crops."""
    labels, centres = torch.arange(n) % 3, torch.randn(3, 3, size, size, generator=generator(9))
    noise = torch.randn(n, 3, size, size, generator=generator(seed))
    x = 128 + 40 * centres[labels] + 60 * noise
    x[:, 0] = 2 * torch.arange(n)[:, None, None]
    return balcon.Images(x.clamp(0, 255).byte(), labels, ["a", "b", "c"], None, CPU)


def plain(data):
    return TF.normalize(data.images / 255, MEAN, STD)


def rows_of(x):
    red = x[:, 0].mean((1, 2)) * STD[0] + MEAN[0]
    return (255 / 2 * red).round().long()


def settings(**changes):
    cfg = balcon.parse_flags([])
    small = dict(views=balcon.Views(["flip"], 2, [1.0, 1.0]), size=2, precision="float32",
                 alpha=2.0, k=[1, 5, 99], theory_images=1000, theory_views=4, probe="features",
                 probe_l2=0.01, probe_lr=5.0, probe_batch=9, probe_epochs=3)
    vars(cfg).update(small | changes)
    return cfg


def test_knn_is_a_majority_vote_by_cosine_and_ties_go_to_the_nearest():
    g = generator(0)
    bank = torch.randn(41, 4, generator=g) * 10 ** torch.randn(41, 1, generator=g)
    labels, queries = torch.randint(5, [41], generator=g), torch.randn(300, 4, generator=g)
    near = [F.cosine_similarity(bank, query[None]).argsort(descending=True) for query in queries]
    for k in range(1, 42):
        votes = [labels[rows[:k]].tolist() for rows in near]
        expected = [max(vote, key=vote.count) for vote in votes]  # the first, so the nearest
        assert balcon.knn_predict(bank, labels, queries, k).tolist() == expected


def test_linear_predict_finds_the_minimum_of_its_objective_whatever_the_scale_of_an_image():
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
        got = balcon.linear_predict(scale * bank, labels, 3 * queries, 0.1)
        assert (got != (q @ w.T + b).argmax(1)).sum() <= 3  # on the border of two classes


def crops_classifier(out, patience=None, moved=0.0, **flags):
    """The classifier after 3 epochs (batches of 9, 9, 1 images), and what its backbone saw."""
    encoder, cfg = stub(patience), settings(out=out, **flags)
    encoder.backbone[0].running_mean += moved
    classifier = balcon.train_on_crops(encoder.backbone, pictures(19, 8), 192, cfg)
    (out / "classifier.pt").unlink()  # else the next call would find it finished
    return classifier, encoder.seen


@pytest.mark.parametrize("name, lr", [("sgd", 5.0), ("lars", 500.0)])
def test_crops_classifier_is_a_softmax_regression_by_sgd_or_lars(name, lr, tmp_path):
    start, _ = crops_classifier(tmp_path, probe_lr=1e-30)  # does not move
    got, inputs = crops_classifier(tmp_path, probe_lr=lr, probe_optimizer=name)
    weights, velocity = [*start.parameters()], [0, 0]
    for step, x in enumerate(inputs):
        features = x.flatten(1) / math.sqrt(1 + 1e-5)  # of the batch norm in eval mode
        loss = F.cross_entropy(F.linear(features, *weights), rows_of(x) % 3)
        rate = lr * 9 / 256 * (1 + math.cos(math.pi * step / 9)) / 2
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            if name == "lars" and i == 0:  # the matrix; the bias is not scaled
                gradient = gradient * 0.001 * weights[0].norm() / gradient.norm()
            velocity[i] = 0.9 * velocity[i] + gradient
            weights[i] = (weights[i] - rate * velocity[i]).detach().requires_grad_()
    assert_close(got.weight, weights[0], 1e-4)
    assert_close(got.bias, weights[1], 1e-4)


def test_crops_classifier_sees_a_fresh_crop_of_each_image_in_every_epoch(tmp_path):
    _, inputs = crops_classifier(tmp_path)
    assert [len(x) for x in inputs] == 3 * [9, 9, 1]
    epochs = [torch.cat(inputs[i:i + 3]) for i in (0, 3, 6)]
    orders = [rows_of(x).tolist() for x in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert all(sorted(order) == list(range(19)) for order in orders)
    crops = [x[rows_of(x).argsort()] for x in epochs]
    for a, b in itertools.combinations(crops, 2):
        assert ((a - b).abs().amax((1, 2, 3)) > 0.01).sum() > 14


def test_crops_classifier_resumes_after_its_last_epoch_and_only_with_its_backbone(tmp_path):
    whole, inputs = crops_classifier(tmp_path)
    for moved, left in ((0.0, 6), (0.1, 9)):  # batches: of two epochs, of all three
        with pytest.raises(KeyboardInterrupt):
            crops_classifier(tmp_path, patience=5)
        again, seen = crops_classifier(tmp_path, moved=moved)
        assert len(seen) == left and torch.equal(seen[-1], inputs[-1])
        assert torch.equal(again.weight, whole.weight) == (moved == 0)


def evaluated(folder):
    """Every figure, and the features of the training and the test images."""
    train, test, encoder = pictures(19), pictures(60, seed=1), stub()
    cfg, figures = settings(out=folder), {}
    features = [balcon.extract(encoder.backbone, data, cfg) for data in (train, test)]
    for evaluation in balcon.EVALUATIONS.values():
        figures |= evaluation(encoder, train, features, cfg)
    cfg.probe = "crops"
    crops = balcon.EVALUATIONS["linear"](encoder, train, features, cfg)
    return {**figures, "crops": crops["linear"]}, features


def test_evaluation_is_in_eval_mode_and_counts_each_image_once_on_two_ranks(tmp_path, two_ranks):
    train, test = pictures(19), pictures(60, seed=1)
    one, features = evaluated(tmp_path)
    for data, (x, labels) in zip((train, test), features):
        assert torch.equal(labels, data.labels) and x.dtype == torch.float32
        assert_close(x, plain(data).flatten(1), 1e-4)
    nearest = F.cosine_similarity(plain(test).flatten(1)[:, None], plain(train).flatten(1), dim=2)
    right = train.labels[nearest.argmax(1)] == test.labels
    assert one["knn1"] == 100 * right.double().mean()
    assert 40 < one["linear"] < 100 and 40 < one["crops"] < 100
    for figures, its_features in (results[evaluated] for results in two_ranks):
        assert figures == pytest.approx(one, rel=1e-4, abs=1e-5)
        assert_close(its_features[1][0], features[1][0])


# ----------------------------------------- theory -----------------------------------------
def extrapolated(whole, *halves):
    """From mean lengths at K views and at K/2 to infinitely many."""
    return math.sqrt(2 * whole.mean() ** 2 - torch.stack(halves).mean() ** 2)


def to_class_mean(x, labels):  # [N]
    means = [x[labels == label].mean(0) for label in labels]
    return (torch.stack(means) - x).norm(dim=1)


def test_eq16_is_unbiased_where_the_plain_estimate_is_not_and_knows_its_error():
    g, labels, found = generator(0), torch.arange(60) % 3, []
    for _ in range(80):
        offset = F.normalize(torch.randn(60, 16, generator=g).double(), dim=1)
        offset *= 0.8 + 0.4 * torch.rand(60, 1, generator=g)
        noise = 0.3 * torch.randn(60, 2, 16, generator=g)
        halves = 5 * torch.eye(3, 16)[labels][:, None] + offset[:, None] + noise
        truth = to_class_mean(offset, labels).mean()
        excess = to_class_mean(halves.mean(1), labels).mean() - truth  # about a third
        estimate, error = balcon.eq16(halves, labels)
        found.append([estimate, error, estimate - truth, excess])
    _, error, bias, excess = torch.tensor(found).mean(0)
    assert abs(bias) < 0.02 < excess / 10
    assert error == pytest.approx(np.std(found, 0)[0], rel=0.25)


def test_bias_is_eq_51_under_one_t_for_both_images_and_eq_16_and_relative_to_random_pairs():
    data, encoder = pictures(120), stub()
    data.labels = 2 * data.labels + 3  # with gaps
    cfg = settings(theory_images=100, precision="bfloat16")  # of which theory makes no use
    found = balcon.bias(encoder, data, None, cfg)
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
        halves = [(views[0] + views[1]) / 2, (views[2] + views[3]) / 2]
        means, distance = [sum(halves) / 2, *halves], (x - other).norm(dim=1)
        eq16 = extrapolated(*(to_class_mean(mean, labels) for mean in means))
        expected = {"eq51": distance.mean(), "eq51_error": distance.std() / 10, "eq16": eq16}
        for name, value in expected.items():
            assert_close(found[space + name], value, 1e-4)
        random_pairs, random_means = torch.pdist(z).mean(), extrapolated(*map(torch.pdist, means))
        assert_close(found[space + "eq51_relative"], distance.mean() / random_pairs, 0.05)
        assert_close(found[space + "eq16_relative"], eq16 / random_means, 0.05)
        assert random_means < 0.9 * random_pairs


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


def hard_case(seed):
    """Classes in one corner or anywhere, tight or loose; anchors among or opposite their own."""
    rng = np.random.default_rng(seed)
    classes, d = rng.integers(2, (7, 9))
    labels = np.append(np.arange(classes), rng.integers(classes, size=15))
    centres = rng.normal(size=(classes, d)) + 2 * (seed % 2)
    spread = rng.choice([0.05, 0.3, 1, 10], (classes, 1))[labels]

    def around(x, spread):
        return F.normalize(torch.tensor(x + spread * rng.normal(size=x.shape)), dim=1)

    anchor = around(rng.choice([-1, 1]) * centres[labels], rng.choice([0.1, 3]))
    mean_view = (anchor + 2 * around(rng.choice([-1, 1]) * anchor.numpy(), spread)) / 3
    bank, alpha = around(centres[labels], spread), 10 ** rng.uniform(-1, 2.3)
    return anchor, mean_view, bank, torch.tensor(labels), alpha


def test_theorem_4_6_holds_where_b_is_not_negative_and_with_max_of_b_and_b_over_nu_always():
    fails = 0
    for seed in range(500):
        anchor, mean_view, bank, labels, alpha = case = hard_case(seed)
        side = balcon.theorem_sides(*case)
        left, right, b = side["repel_left"] - 1e-9, side["repel_right"], side["b"]
        holds, classes = left < right, len(labels.unique())
        assert holds[b >= 0].all() and (left < torch.maximum(b, right)).all()
        own = torch.stack([bank[labels == label].mean(0) for label in labels])
        assert (b[(anchor * own).sum(1) >= 0] > -1e-9).all()  # in its class mean's hemisphere
        assert (b > -1e-9).all() or alpha > math.log(classes)
        assert holds.all() or classes > 2
        assumed = (anchor * mean_view).sum(1) >= 0  # Assumption 4.3, for Theorem 4.4
        assert (side["attract_left"] - 1e-9 < side["attract_right"])[assumed].all()
        fails += (~holds).sum()
    assert fails > 5  # so the cases are hard enough


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
    data.images[0] = torch.tensor([190, 5])  # its columns: flipped, it looks away from all others
    data.labels = torch.arange(12) // 5  # classes of 5, 5 and 2 images
    encoder.projector = nn.Identity()
    found = balcon.bounds(encoder, data, None, cfg)
    z = F.normalize(torch.cat(encoder.seen).flatten(1).double(), dim=1)
    anchor, *views, bank = z.split(12)
    side = sides_by_loops(anchor, sum(views) / 4, bank, data.labels, 30.0)
    attract = side["attract_right"] - side["attract_left"]
    repel = side["repel_right"] - side["repel_left"]
    angle = side["attract_left"].neg().clamp(max=1).acos().rad2deg()
    assert found.pop("nu") == pytest.approx(side["nu"].min().item())
    assert found.pop("angle") == pytest.approx(angle.mean().item(), abs=0.05)
    expected = {
        "attract_gap": attract, "attract_fails": 100 * (attract < -1e-6),
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
    for text in ("n01/b.png\nn01/z.JPEG 0", "a.JPEG", " \n\n"):
        file.write_text(text)
        with pytest.raises(balcon.UserError, match="list.txt"):
            subset(torch.arange(4), "full", images=files, file=file)


# ----------------------------------------- output -----------------------------------------
def put_run(folder, stage=None, knn=None, linear=50.0, **changes):
    config = balcon.identity(balcon.parse_flags(["--dataset", "cifar10"])) | changes
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
    put_run(tmp_path / "checkpoint", "trained", 40, epochs=0, lr=2)
    put_run(tmp_path / "null", "trained", 20, None, lr=0.5)  # NaN in results.json
    balcon.report([tmp_path, tmp_path / "seed 0"])
    lines = capsys.readouterr().out.splitlines()
    head, _, *rows = [line.strip("| ").replace(" ", "").split("|") for line in lines]
    assert sorted(head[:4]) == ["alpha", "data", "epochs", "lr"] and head[4] == "finishedruns"
    assert head[5:] == ["knn5", "linear"]
    assert sorted(row[4:] for row in rows) == [
        ["0of1", "–", "–"], ["1of1", "20", "–"], ["1of1", "30", "50"], ["1of1", "40", "50"],
        ["1of1", "70", "50"], ["3of4", "93±3.6", "50±0"]]


def tiles_of_picture(path, rows, columns, side):
    """[rows, columns, side, side, 3], without the two pixels between them."""
    picture = np.array(Image.open(path)).astype(int)
    assert picture.shape == (rows * (side + 2) + 2, columns * (side + 2) + 2, 3)
    tiles = picture[2:, 2:].reshape(rows, side + 2, columns, side + 2, 3)
    return tiles.transpose(0, 2, 1, 3, 4)[:, :, :side, :side]


def test_views_png_shows_each_image_beside_two_of_its_views(tmp_path):
    data = pictures(12)
    balcon.draw_views(data, settings(out=tmp_path))
    tiles = tiles_of_picture(tmp_path / "views.png", 3, 12, 64)
    # One pixel of each quarter, since a tile shows an image of 2×2 pixels.
    tiles = tiles[:, :, [15, 48]][:, :, :, [15, 48]].reshape(12, 3, 2, 2, 3)
    images = data.images.permute(0, 2, 3, 1).numpy().astype(int)[:, None]
    same = abs(tiles - images).max((2, 3, 4)) <= 1
    flipped = abs(tiles - images[..., ::-1, :]).max((2, 3, 4)) <= 1
    assert same[:, 0].all() and (same ^ flipped).all()
    assert 4 < flipped[:, 1:].sum() < 20 and (flipped[:, 1] != flipped[:, 2]).any()


def lines_of_neighbors(path, backbones, images):
    """[8, backbones, images]: the red of the tiles in a line, and which have a green frame."""
    tiles = tiles_of_picture(path, 8 * backbones, images, 72)
    tiles = tiles.reshape(8, backbones, images, 72, 72, 3)
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
    red, framed = lines_of_neighbors(tmp_path / "neighbors.png", 2, 9)
    for i, stage in itertools.product(range(8), (0, 1)):
        similar = F.cosine_similarity(bank[stage], queries[stage, i], dim=1)
        near = similar.argsort(descending=True)[:8]
        assert red[i, stage].tolist() == [2 * i, *(2 * near).tolist()]
        right = train.labels[near] == test.labels[i]
        assert framed[i, stage].tolist() == [False, *right.tolist()]


def test_neighbors_png_never_shows_an_image_beside_itself(tmp_path):
    data, features = pictures(8, 1), torch.ones(8, 3)  # of a collapsed backbone
    balcon.draw_neighbors(data, data, [[(features, data.labels)]], settings(out=tmp_path))
    red, framed = lines_of_neighbors(tmp_path / "neighbors.png", 1, 8)
    for line, i in zip(red[:, 0].tolist(), range(0, 16, 2)):
        assert line[0] == i and sorted(line) == [*range(0, 16, 2)]
    assert framed.sum(2).flatten().tolist() == [2, 2, 1, 2, 2, 1, 2, 2]  # others of the class


def test_exported_features_come_with_labels_files_and_classes(tmp_path):
    x, labels, files = torch.randn(5, 3), torch.arange(5) % 2, [f"é/{i}.png" for i in range(5)]
    disk = balcon.Images(files, labels, ["ä", "b"], None, CPU)
    balcon.export(tmp_path / "x", [(x, labels), (x + 1, 1 - labels)], [disk, pictures(5)])
    found = {name: array.tolist() for name, array in np.load(tmp_path / "x").items()}
    assert found == {
        "classes": ["ä", "b"], "train_files": files,
        "train_features": x.tolist(), "train_labels": labels.tolist(),
        "test_features": (x + 1).tolist(), "test_labels": (1 - labels).tolist()}


# ----------------------------------------- training ---------------------------------------
class TinyEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        convolution = nn.Conv2d(3, 6, 5, 3)
        self.backbone = nn.Sequential(convolution, nn.Tanh(), nn.Flatten())
        self.projector = nn.Linear(24, 5)
        self.double()  # so that rounding hides no difference

    def forward(self, x):
        return self.projector(self.backbone(x.double()))


TINY = """--dataset cifar10 --size 8 --batch-size 4 --epochs 2 --lr 0.3 --momentum 0.7 --seed 5
    --weight-decay 0.05 --alpha 3 --lam 1.5 --precision float32 --save-every 1"""
TINY_PIXELS = torch.randint(256, (13, 3, 8, 8), dtype=torch.uint8, generator=generator(1))


def train_tiny(folder, loss="balanced"):
    """Two epochs of three steps, with one image of 13 left over in each: log, checkpoints."""
    cfg = balcon.parse_flags([*TINY.split(), "--loss", loss, "--out", str(folder)])
    train = balcon.Images(TINY_PIXELS, torch.arange(13), [], cfg, CPU)
    balcon.pretrain(TinyEncoder(), train, cfg)
    return logged(folder), {path.name: torch.load(path) for path in folder.glob("[!c]*.pt")}


def logged(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line]


def weights_in(checkpoint):
    weights = {}
    for part in ("backbone", "projector"):
        weights |= {f"{part}.{name}": value for name, value in checkpoint[part].items()}
    return weights


def replay_tiny(loss):
    """{name: weight} before each step and after the last, the losses and the learning rates."""
    views = balcon.Views(["flip", "color_jitter", "grayscale"], 8, [0.08, 1.0])
    weights = {name: value.detach() for name, value in TinyEncoder().named_parameters()}
    velocity, history, losses, rates = dict.fromkeys(weights, 0), [weights], [], []
    for step in range(6):
        order = torch.randperm(13, generator=balcon.rng(5, "order", step // 3))
        x = TINY_PIXELS[order[4 * (step % 3):][:4]].repeat(2, 1, 1, 1) / 255
        x = views.apply(x, views.draw(8, balcon.rng(5, "views", step)))
        x = TF.normalize(x, MEAN, STD)
        weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
        z1, z2 = torch.func.functional_call(TinyEncoder(), weights, x).chunk(2)
        value = loss_by_loops(loss, z1, z2, 3, 1.5)
        value.backward()
        rate = 0.3 * (1 + math.cos(math.pi * step / 6)) / 2
        for name, w in weights.items():
            velocity[name] = 0.7 * velocity[name] + w.grad + 0.05 * w.detach()
            weights[name] = w.detach() - rate * velocity[name]
        history.append(weights)
        losses.append(value.item())
        rates.append(rate)
    return history, losses, rates


@pytest.mark.parametrize("loss, ranks", [("ntxent", 1), ("balanced", 2)])
def test_pretraining_is_sgd_with_momentum_decay_and_a_cosine_on_the_loss_named(
        loss, ranks, tmp_path, two_ranks):
    log, files = two_ranks[0][train_tiny] if ranks == 2 else train_tiny(tmp_path, loss)
    history, losses, rates = replay_tiny(loss)
    assert [line["step"] for line in log] == [1, 3, 6]  # the first, ends of epochs
    for line in log:
        assert_close(line["lr"], rates[line["step"] - 1], 1e-9)
        assert_close(line["loss"], losses[line["step"] - 1], 1e-6)
        if loss == "balanced":
            assert_close(line["above_floor"], line["loss"] - balcon.loss_floor(4, 3, 1.5))
    steps = {"epoch0000.pt": 0, "epoch0001.pt": 3, "epoch0002.pt": 6, "last.pt": 6}
    assert files.keys() == steps.keys()  # of --save-every 1
    for name, step in steps.items():
        weights = weights_in(files[name])
        assert files[name]["step"] == step and weights.keys() == history[step].keys()
        for part, weight in weights.items():
            assert_close(weight, history[step][part], 1e-6)


# ----------------------------------------- runs and resuming ------------------------------
SMALL = """--dataset folder --data photos --size 16 --backbone resnet10 --projector 16 --epochs 2
    --batch-size 4 --no-baseline --workers 0 --save-minutes 1e-6 --eval knn bias
    --theory-images 16 --theory-views 4""".split()
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
MORTAL = """# dies by SIGKILL when it replaces a file for the fourth time
import itertools, os, signal, balcon
replace, calls = os.replace, itertools.count(1)
def deadly(*paths):
    os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 4 else replace(*paths)
os.replace = deadly
balcon.main()
"""


def launch(place, processes, program, out):
    """Run a program on the CPU with the flags SMALL, under torchrun if in two processes."""
    surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(HERE)}
    command = [sys.executable, *(TORCHRUN if processes == 2 else []), program, *SMALL]
    return subprocess.run([*command, "--out", out], cwd=place, env=surroundings,
                          capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of small images, of things that are wrong, and of finished runs of SMALL."""
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
    (root / "else").mkdir()
    (root / "else/log.jsonl").write_text("no JSON")
    (root / "mortal.py").write_text(MORTAL)
    torch.save({"backbone": {"weight": torch.zeros(3)}}, root / "foreign.pt")
    for processes in (1, 2):
        done = launch(root, processes, HERE / "balcon.py", f"run{processes}")
        assert done.returncode == 0, done.stderr
        (root / f"screen{processes}").write_text(done.stderr)
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


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_in_a_pipe_prints_a_line_at_its_first_step_and_after_each_epoch(place):
    screen = (place / "screen1").read_text()
    lines = [line.split() for line in screen.splitlines() if line.startswith("epoch")]
    assert [line[1] for line in lines] == ["0.1/2", "1.0/2", "2.0/2"]
    assert "loss" in lines[0] and "(floor" in lines[0] and "\r" not in screen
    kept = ["last.pt", "log.jsonl", "neighbors.png", "results.json", "views.png"]
    assert sorted(path.name for path in (place / "run1").iterdir()) == kept
    first = json.loads((place / "run1/log.jsonl").read_text().split("\n")[0])
    assert first["argv"][1:] == [*SMALL, "--out", "run1"] and first["config"]["epochs"] == 2
    assert {"git", "torch", "hardware", "processes"} < first.keys()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_and_ends_bit_identical(processes, place):
    whole, out = place / f"run{processes}", place / f"killed{processes}"
    # While the checkpoint of step 11 takes the place of that of step 10; an epoch has 11 steps.
    died = launch(place, processes, "mortal.py", out)
    assert died.returncode and (out / "last.pt.tmp").exists(), died.stderr
    done = launch(place, processes, HERE / "balcon.py", out)
    assert done.returncode == 0 and "resuming at step 10 of 22" in done.stdout, done.stderr
    resumed = weights_in(torch.load(out / "last.pt"))
    for name, value in weights_in(torch.load(whole / "last.pt")).items():
        assert torch.equal(value, resumed[name]), name
    expected, results = results_of(whole), results_of(out)
    expected["seconds"] = results["seconds"]
    assert results == expected
    losses, again = ({line["step"]: line["loss"] for line in logged(run)} for run in (whole, out))
    assert again.items() >= losses.items()


def test_a_finished_run_is_not_trained_again_and_gets_the_figures_it_lacks(place, run_here):
    again = shutil.copytree(place / "run1", place / "again")
    files = [again / name for name in ("last.pt", "log.jsonl", "views.png")]
    before = [path.read_bytes() for path in files]
    code, said, _ = run_here(*SMALL, "--eval", "knn", "bias", "linear", "--out", again)
    assert code == 0 and "already trained" in said
    assert [path.read_bytes() for path in files] == before
    found = results_of(again)
    assert found["trained"].pop("linear").keys() == {"linear"}
    assert found == results_of(place / "run1")


def test_torchrun_on_two_processes_has_the_figures_of_its_checkpoint(place, run_here):
    flags = SMALL[SMALL.index("--eval"):]
    assert run_here("--checkpoint", "run2/last.pt", *flags, "--out", "one")[0] == 0
    two, one = (results_of(place / run)["trained"] for run in ("run2", "one"))
    assert two["knn"] == one["knn"] and two["bias"] == pytest.approx(one["bias"], rel=1e-3)


# ----------------------------------------- the demonstration ------------------------------
@pytest.mark.parametrize("trained, flags, code, said", [
    (90.1, "", 0, "it learned"), (90.0, "", 1, "FAILED"),
    (20.0, "--seed 1", 1, "FAILED"), (20.0, "--lr 0.1", 0, "holds")])
def test_the_demonstration_fails_unless_it_leaves_less_than_a_quarter_of_the_error(
        trained, flags, code, said, run_here, monkeypatch, tmp_path):
    draw = balcon.draw_patterns
    monkeypatch.setattr(balcon, "draw_patterns", lambda n, split: draw(160, split))
    monkeypatch.setattr(balcon, "pretrain", lambda *arguments: 1.0)
    figures = {"untrained": {"knn": {"knn5": 60.0}}, "trained": {"knn": {"knn5": trained}}}
    (tmp_path / "results.json").write_text(json.dumps(figures))
    found, screen, _ = run_here(*flags.split(), "--eval", "--out", tmp_path)
    assert found == code and said in screen and f" {trained:.4g} " in screen
    assert ("FAILED" in screen) == (code == 1)


# ----------------------------------------- bad input --------------------------------------
BAD = {  # words, after "WORLD_SIZE=2" in the environment or nothing: what the sentence names
    "--loss softmax": "--loss", "--alpha -1": "--alpha -1", "--lam nan": "--lam nan",
    "--batch-size 4.5": "--batch-size", "--add flip": "twice: flip", "--theory-views 3": "views 3",
    "--report else": "else/log.jsonl", "--out else": "else/log.jsonl",
    f"--seed {2 ** 64}": "--seed",
    "--k 5 0": "--k", "--crop-scale 0.5": "--crop-scale", "--crop-scale 1 0.5": "--crop-scale",
    "--dataset folder --data nowhere --export features.npz": "nowhere",
    "--dataset cifar10 --data broken": "broken/train/0.png",
    "--dataset folder --data photos --out run1": "run1 holds another run, with epochs 2, not 100",
    "--checkpoint run1/last.pt --projector 8": "run1/last.pt",
    "--checkpoint else/log.jsonl": "else/log.jsonl", "--init foreign.pt": "--init foreign.pt",
    "--export nowhere/features.npz": "nowhere", "--report nowhere": "nowhere",
    "WORLD_SIZE=2 --batch-size 63": "--batch-size 63",
    "--dataset folder --data photos --batch-size 64": "64 is more than the 44 training images",
    "--dataset folder --data flat --batch-size 16 --eval knn": "--eval knn",
}


def files_in(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2_and_leaves_no_trace(
        words, place, run_here, monkeypatch):
    before = files_in(place)
    monkeypatch.setattr(balcon, "pretrain", None)  # it must not come so far
    flags = words.split()
    if flags[0].startswith("WORLD_SIZE"):
        monkeypatch.setenv(*flags.pop(0).split("="))
    code, _, sentence = run_here(*flags)
    assert code == 2 and sentence.startswith("balcon: ") and sentence.count("\n") == 1
    assert BAD[words] in sentence
    assert files_in(place) == before


def test_too_few_gpus_or_too_little_memory_is_one_sentence(run_here, monkeypatch):
    def out_of_memory(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(balcon, "run", out_of_memory)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    code, _, sentence = run_here()
    assert code == 2 and "8 processes, but there are 4 GPUs" in sentence
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")  # which alone may know
    assert run_here()[::2] == (2, "balcon: CUDA out of memory\n")


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
    new = place / "photos/train/a/new.png"
    new.write_bytes(good)
    code, _, sentence = run_here(*flags)  # another image would move what a step sees
    new.unlink()
    assert code == 2 and "[44, 12] training and test images, and now there are [45, 12]" in sentence


def test_theory_needs_labels_but_no_test_images():
    train, cfg = pictures(6), settings(epochs=0, eval=["bias"])
    assert balcon.check_images(cfg, train, [], train) == ["bias"]
    cfg.eval = ["bias", "knn"]
    with pytest.raises(balcon.UserError, match="--eval bias knn needs labels and test images"):
        balcon.check_images(cfg, train, [], train)


# ----------------------------------------- benchmark --------------------------------------
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
    """Medians over the rounds that fit into `budget` seconds. All calls take turns, so that noise
    hits all alike; the first round warms up."""
    rounds, end = [], time.perf_counter() + budget
    while len(rounds) < 2 or time.perf_counter() < end:
        rounds.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            torch.cuda.synchronize() if cuda else None
            rounds[-1].append(time.perf_counter() - start)
    return np.median(rounds[1:], 0)


def benchmark(argv, budget=20):
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
    orders = ((step, torch.randperm(len(train))[:m]) for step in itertools.count())
    batches = train.batches(orders, cfg.views, 2, ("benchmark",))
    x, z = next(batches)[1], torch.randn(2 * m, cfg.projector[-1], device=device)
    side = train.images.shape[-1] if train.in_memory else cfg.size
    pixels = torch.rand(2 * m, 3, side, side, device=device)
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

    step, network, losing, augmenting = seconds_of([
        lambda: [update(next(batches)[1], loss) for _ in range(k)],
        lambda: update(x, lambda z: z.backward(torch.ones_like(z))),
        lambda: loss(z.requires_grad_()),
        lambda: cfg.views.apply(pixels, cfg.views.draw(2 * m, generator(0)))], budget, cuda)
    rate, total = 2 * m * k / step, 2 * cfg.epochs * (n - n % cfg.batch_size)
    for name, value, meaning in (
        ("training step", rate, f"views/s, from pixels to update; {m} images a step"),
        ("bare network", 2 * m / network, "views/s: forward, backward, SGD on ready tensors"),
        ("step / network", k * network / step, "of these two rates; 1 would be ideal"),
        ("views", k * augmenting / step, "seconds of augmenting / of a step"),
        ("loss", k * losing / step, "seconds of the loss and its gradient / of a step"),
        ("PFLOP", total * flop / 1e15, "of the recipe: three forward passes a view"),
        ("hours", total / rate / 3600, "of the recipe on this machine"),
        ("TFLOP/s", rate * flop / 1e12, "of a step; an H100 has 989 by its data sheet"),
    ):
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
    assert not list(tmp_path.iterdir())


# ----------------------------------------- the study --------------------------------------
sys.path.insert(0, str(HERE / ".github" / "results"))
import instruments  # noqa: E402
import study  # noqa: E402


def test_results_page_is_what_the_runs_say():
    study.tables(check=True)


@pytest.mark.parametrize("pattern, change", [
    # two figures of a row swapped, in a generated table and in one written by hand
    (r"(\| base +\| 2 .*?)(34\.22 ± 0\.73)(.*?)(44\.85 ± 0\.41)", r"\1\4\3\2"),
    (r"(cosine )([\d.]+)(<!--\S+?-->, Euclidean )([\d.]+)", r"\1\4\3\2"),
    # a figure of a sentence, changed or replaced by a word; a row left out
    (r"58\.44(<!--all-balanced-a8-l4/linear-->)", r"54.84\1"),
    (r"−0\.03(<!--loss/mean-->)", r"−3.00\1"),
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
    x = np.column_stack([np.ones(9), a, b])
    errors, mean_errors = 0, 0
    for i in range(9):
        kept = np.arange(9) != i
        weights = np.linalg.lstsq(x[kept], y[kept], rcond=None)[0]
        errors += (y[i] - x[i] @ weights) ** 2
        mean_errors += (y[i] - y[kept].mean()) ** 2
    assert_close(study.fit([a, b], y)[1], 1 - errors / mean_errors)
    assert_close(study.p_value(2.228, 10), 0.05, 2e-4)  # from a table of Student's t


def views_of_classes(m=7):
    """z [m, 2, 5] of unit length, labels [m]."""
    z = torch.randn(m, 2, 5, dtype=torch.float64, generator=generator(0))
    return F.normalize(z, dim=2), torch.arange(m) % 3


def anchors(z, labels):
    """(positive similarity, negatives' similarities, whether they are of its class) by loops."""
    for i, j in itertools.product(range(len(z)), range(2)):
        s, own = [], []
        for k, v in itertools.product(range(len(z)), range(2)):
            if k != i:
                s.append(float(z[i, j] @ z[k, v]))
                own.append(bool(labels[i] == labels[k]))
        yield float(z[i, 0] @ z[i, 1]), np.array(s), np.array(own)


def test_repulsion_and_nscl_by_loops():
    (z, labels), alpha, lam, rows = views_of_classes(), 3.0, 2.5, []
    for positive, s, own in anchors(z, labels):
        e, e4, n = np.exp(alpha * s), np.exp(4 * s), own.sum() / 2 + 1
        odds = (n - 1) * np.exp(2 * alpha) / (len(z) - n)
        rows.append({
            "positive": positive, "negative": s.mean(), "by_chance": own.mean(),
            "lam_share": lam * e[own].sum() / e.sum(), "same_class_4": e4[own].sum() / e4.sum(),
            "ntxent_positive_4": 1 / (1 + e4.sum() / np.exp(4 * positive)),
            "repelling": lam * (np.log(e.mean()) / alpha - s.mean()),
            "second_order": alpha * lam / 2 * s.var(),
            "gap": lam / alpha * np.log(e.sum() / e[~own].sum()),
            "bound": lam / alpha * np.log(1 + odds)})
    found = instruments.repulsion(z, labels, alpha, lam) | instruments.nscl(z, labels, alpha, lam)
    for name in rows[0]:
        assert_close(found[name], np.mean([row[name] for row in rows]))


def test_ntxent_can_prefer_views_that_differ():
    p, k = np.linspace(-1, 1, 200_001), 2 * (512 - 1)
    for alpha, lam in (8, 2), (8, 4), (8, 8), (4, 2), (2, 1):
        bound = -p + lam / alpha * np.log(np.exp(alpha * p) + k * np.exp(-alpha * (1 + p) / k))
        assert_close(instruments.best_positive_similarity(512, alpha, lam), p[bound.argmin()])
        assert_close(instruments.ntxent_floor(512, alpha, lam), bound.min())
    z1, z2 = views_of_classes()[0].unbind(1)
    assert balcon.generalized_nt_xent_loss(z1, z2, 8, 4) > instruments.ntxent_floor(7, 8, 4)


def test_class_distances_and_few_shots_by_loops():
    z, labels = views_of_classes(12)
    x, queries = z.unbind(1)
    centres = [x[labels == c].mean(0) for c in range(3)]
    whole, along = [], []
    for i, j in itertools.permutations(range(3), 2):
        line, rest = centres[j] - centres[i], x[labels == i] - centres[i]
        whole.append((rest ** 2).sum(1).mean() / (line @ line))
        along.append(((rest @ (line / line.norm())) ** 2).mean() / (line @ line))
    assert_close(instruments.cdnv(x, labels), [np.mean(whole), np.mean(along)])
    nearest = [min(range(3), key=lambda c: float((row - centres[c]).norm())) for row in queries]
    assert instruments.nearest_centre(x, labels, queries).tolist() == nearest
    corners = torch.eye(3)[labels] + 0.01 * torch.rand(12, 3, generator=generator(0))
    assert (instruments.few_shot(corners, labels, corners, labels, 2, 3, 0) == 100).all()


def test_rounding_of_the_study_is_that_of_autocast_to_bfloat16():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
              nn.Linear(8 * 6 * 6, 4, bias=False))
    network, x = nn.Sequential(*layers), torch.randn(32, 3, 8, 8)

    def outcome(bfloat16=False):  # the output, and the gradient of each weight
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            z = network(x).float()
        return [z, *torch.autograd.grad(z.tanh().sum(), [*network.parameters()])]

    exact, autocast = outcome(), outcome(bfloat16=True)
    instruments.round_to_bfloat16(network)
    for a, b, c in zip(exact, autocast, outcome()):
        assert 0 < (a - b).norm() and (c - b).norm() < 0.3 * (a - b).norm()


def test_losses_of_the_study_by_loops():
    z, labels = views_of_classes()
    z1, z2 = 3 * z[:, 0], 2 * z[:, 1]  # lengths do not matter
    rows = [3 * (s ** 2).mean() - positive for positive, s, _ in anchors(z, labels)]
    assert_close(instruments.quadratic(z1, z2, 3, 2), np.mean(rows))
    loss = np.mean([float((x - y) @ (x - y)) for x, y in z])
    for view in z.unbind(1):
        pairs = [(x - y).square().sum() for x, y in itertools.combinations(view, 2)]
        loss += float(torch.stack(pairs).mul(-2).exp().mean().log()) / 2
    assert_close(instruments.wang_isola(z1, z2, 4, 2), loss / 2)


def test_the_strong_recipe_has_no_batch_norm_in_its_projector(monkeypatch):
    monkeypatch.setattr(balcon, "build_encoder", balcon.build_encoder)  # put back afterwards
    monkeypatch.setattr(balcon.AUGMENTATIONS["grayscale"], "p", 0.2)
    cfg = balcon.parse_flags(["--dataset", "cifar10", *instruments.strong_recipe()])
    layers = balcon.build_encoder(cfg, CPU).projector
    assert [list(p.shape) for p in layers.parameters()] == [[1024, 512], [1024], [128, 1024], [128]]
    assert balcon.AUGMENTATIONS["grayscale"].p == 0.1


if __name__ == "__main__":
    if sys.argv[1:2] != ["benchmark"]:
        sys.exit("usage: pytest, or: python test_balcon.py benchmark [flags of balcon.py]")
    benchmark(sys.argv[2:])
