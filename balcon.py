#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""balcon: balanced contrastive learning in one file.

A reproduction of "Understanding Self-supervised Contrastive Learning through Supervised
Objectives" (TMLR 2025, arXiv 2510.10572). Equation, table and section numbers are the paper's.

    python balcon.py
        A demonstration on synthetic images, without download: a minute on two CPU cores. The kNN
        accuracy rises from 80 % (untrained) to 98 %, means of five seeds. Exit code 1 if it does
        not learn.
    python balcon.py --dataset cifar10
        The paper's CIFAR-10 recipe, for one GPU. The paper reports 86.1 % (linear).
    torchrun --nproc_per_node=8 balcon.py --dataset imagenet --alpha 4 --lam 2
        The paper's ImageNet recipe, for eight GPUs. The paper reports 67.4 % (linear).

Letters, as in the paper:
    m       images in the batch; within a loss, those of this process
    d       dimensions of a projection, or of the backbone's features
    z       projection of a view; z⁺ of the other view of its image, z⁻ of a view of another image
    s       similarity of two projections: cosine, unless --similarity says otherwise
    α       sharpness of the softmax over negatives, the inverse of the temperature τ
    λ       weight of repelling negatives against attracting the positive
    t ~ T   one augmentation, drawn from the distribution of augmentations
    ν       length of the shortest prototype (mean projection) of another class

The file has three parts. Part 1 is the method: the losses, then all that surrounds them in the
order of use: views, images, model, pretraining, evaluation. You may stop there. Part 2 measures the
paper's theory. Part 3 is the machinery: settings, checkpoints, processes, files, pictures. `cfg`
holds the settings, which the table at the start of part 3 explains, and what follows from them:
`cfg.trains`, whether there is anything to pretrain; `cfg.views`, the distribution of views; and
`cfg.images_digest`, a fingerprint of names and labels.
"""
import argparse
import contextlib
import copy
import difflib
import errno
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop, rgb_to_grayscale


# ==========================================================================================
# Part 1: the method. From the loss to an evaluated encoder. Of part 3 it uses `rng`, a random
# generator made from a key; `to_device`; `rank_share`, `gather_rows` and `distribute`, by which
# processes divide work and join its results; `progress`, the time left; `Session`, which logs,
# saves and resumes; `classifier_epochs`, which saves and resumes the classifier; `digest`, a
# fingerprint; and the optimizer `LARS`.
# ==========================================================================================

# ----------------------------------------- losses -----------------------------------------
def balanced_contrastive_loss(z1, z2, alpha, lam, similarity="cosine", *,
                              repel_positive=False, all_ranks=True):
    """Balanced contrastive loss, Eq. 17: −s(z, z⁺) + λ (1/α) log Σ_{z⁻} exp(α s(z, z⁻)).

    z1, z2: [m, d], projections of two views; row i of both shows the same image. Returns a scalar,
    the mean over all 2m anchors z. The 2(m−1) negatives z⁻ are the views of the other images: the
    positive z⁺ is not in the sum. `loss_floor` is the minimum for cosine similarity.

    similarity: "cosine"; or, without normalising the projections, "dot" or "euclidean" (negative
    squared distance, footnote 3). Computed in float32 at least, also under autocast.

    Under torch.distributed each of R ranks passes m images of its own, equally many on all. Its 2m
    anchors are their views; the 2(Rm−1) negatives come from all ranks. DDP's averaged gradient is
    that of one process with the whole batch. With all_ranks=False each rank computes alone.

    SimCLR's form, a cross-entropy of logits α s, is α times this scale, and so is its gradient:
    multiply an SGD learning rate from the SimCLR literature by α, and divide weight decay by α.

    With repel_positive=True this is generalized_nt_xent_loss. Raises ValueError for shapes other
    than [m, d], integers, two dtypes, other similarities, α ≤ 0, λ < 0, or a batch of one image.
    """
    if z1.shape != z2.shape or z1.dtype != z2.dtype or z1.dim() != 2 or not z1.is_floating_point():
        raise ValueError(f"z1 and z2 must be floating-point [m, d] of one dtype, not {z1.dtype} "
                         f"{[*z1.shape]} and {z2.dtype} {[*z2.shape]}")
    if similarity not in ("cosine", "dot", "euclidean"):
        raise ValueError(f"similarity must be cosine, dot or euclidean, not {similarity!r}")
    if not (0 < alpha < math.inf and 0 <= lam < math.inf):
        raise ValueError(f"alpha must be positive and lam at least 0, not {alpha} and {lam}")
    m = z1.shape[0]
    own_rank, ranks = 0, 1
    if all_ranks and dist.is_available() and dist.is_initialized():
        own_rank, ranks = dist.get_rank(), dist.get_world_size()
    if m * ranks < 2:
        raise ValueError("one image has no negatives: the batch must hold at least two")

    with torch.autocast("cpu" if z1.is_meta else z1.device.type, enabled=False):  # meta has none
        dtype = torch.promote_types(z1.dtype, torch.float32)
        z = [z1.to(dtype), z2.to(dtype)]
        if similarity == "cosine":
            z = [F.normalize(view, dim=1) for view in z]
        z = torch.cat(z)  # [2m, d]: the anchors; rows i and m + i show the same image
        candidates = z
        if ranks > 1:
            parts = [torch.empty_like(z) for _ in range(ranks)]
            dist.all_gather(parts, z.detach())
            parts[own_rank] = z  # my rows keep their graph; the others have none
            candidates = torch.cat(parts)  # [R · 2m, d]

            def sum_over_ranks(gradient):  # every rank's loss depends on my rows
                gradient = gradient.clone()
                dist.all_reduce(gradient)
                return gradient

            if z.requires_grad:
                candidates.register_hook(sum_over_ranks)
        s = z @ candidates.T  # [2m, R · 2m]
        if similarity == "euclidean":
            s = 2 * s - z.square().sum(1, keepdim=True) - candidates.square().sum(1)

        row = torch.arange(2 * m, device=z.device)
        itself = 2 * m * own_rank + row  # [2m]: the column of each anchor
        other_view = itself.roll(m)  # [2m]: the column of its positive
        attract = -s[row, other_view]  # [2m]
        left_out = [itself] if repel_positive else [itself, other_view]
        logits = (alpha * s).scatter(1, torch.stack(left_out, 1), -math.inf)  # exp(−∞) is 0
        repel = logits.logsumexp(1) / alpha
        return (attract + lam * repel).mean()


def generalized_nt_xent_loss(z1, z2, alpha, lam, similarity="cosine", *, all_ranks=True):
    """Generalized NT-Xent loss (Section 6): Eq. 17 with the positive also in the sum.

    Arguments, mean, ranks, scale and errors as in `balanced_contrastive_loss`. λ = 1 is SimCLR's
    NT-Xent (Eq. 15) with temperature τ = 1/α, divided by α.
    """
    return balanced_contrastive_loss(z1, z2, alpha, lam, similarity,
                                     repel_positive=True, all_ranks=all_ranks)


def loss_floor(m, alpha, lam):
    """Minimum of Eq. 17 for cosine similarity and m ≥ 2 images over all ranks; a lower bound if
    d < m − 1.

    The log-sum-exp is at least that of equal similarities (Jensen), and Σᵢⱼ zᵢ·zⱼ ≥ 0 keeps the
    mean negative similarity at −1/(m−1) or above. Both are equalities iff the two views of each
    image coincide and the m images form a regular simplex.
    """
    return -1 - lam / (m - 1) + lam / alpha * math.log(2 * (m - 1))


LOSSES = {"balanced": balanced_contrastive_loss, "ntxent": generalized_nt_xent_loss}


# ----------------------------------------- views ------------------------------------------
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, also for CIFAR (A.4.1)
# T, the distribution of views: a random crop, whose share of the image lies in crop_scale, resized
# to size × size, then the augmentations of these names, in order.
Views = namedtuple("Views", "names size crop_scale")


class Draw(namedtuple("Draw", "key views_in_batch places")):
    """The random numbers that make t ~ T for the views at `places` of a batch of `views_in_batch`.

    They depend only on the key (seed, purpose and step), a name and the view's place in the
    batch. So the same key gives the same t to other images (Eq. 51), and since each rank draws for
    the whole batch and takes its own rows, 1, 2 or 8 processes see the same views.
    """

    def uniform(self, name, low, high, *shape):
        """[len(places), *shape], on the CPU. Each name gives independent numbers."""
        numbers = torch.empty(self.views_in_batch, *shape)
        return numbers.uniform_(low, high, generator=rng(*self.key, name))[self.places]

    def only(self, chosen):
        """t of the chosen views."""
        return self._replace(places=self.places[chosen])


def random_crop_boxes(t, shape, scale):
    """Boxes [n, 4] (top, left, height, width) in whole pixels, as RandomResizedCrop draws them.

    shape: [n, 2], height and width of each image. Its box is the first of ten random ones that fits
    into it, or else the largest central one with an aspect ratio between 3/4 and 4/3.
    """
    shape = shape.float()
    area = t.uniform("area", *scale, 10) * shape[:, :1] * shape[:, 1:]  # [n, 10]
    ratio = t.uniform("ratio", math.log(3 / 4), math.log(4 / 3), 10).exp()  # width / height
    sides = torch.stack([area / ratio, area * ratio], 2).sqrt().round().clamp(min=1)  # [n, 10, 2]
    room = shape[:, None] - sides
    corner = (t.uniform("corner", 0, 1, 10, 2) * (room + 1)).floor()
    boxes = torch.cat([corner, sides], 2)  # [n, 10, 4]

    largest = shape.minimum((shape.flip(1) * 4 / 3).round())  # [n, 2]
    central = torch.cat([((shape - largest) / 2).floor(), largest], 1)
    boxes = torch.cat([boxes, central[:, None]], 1)  # [n, 11, 4]
    fits = (boxes[..., 2:] <= shape[:, None]).all(2)  # the eleventh always does
    first = fits.int().argmax(1)
    return boxes[torch.arange(len(boxes)), first].long()


def central_boxes(shape):
    """[n, 4]: the central square of 7/8 of the shorter side, as Resize(256) and CenterCrop(224)."""
    side = (0.875 * shape.amin(1, keepdim=True)).round().clamp(min=1)  # [n, 1]
    corner = ((shape - side) / 2).floor()
    return torch.cat([corner, side, side], 1).long()


def crop_resize(x, box, size):
    """x: [n, 3, H, H], box: [n, 4] -> [n, 3, size, size], antialiased bilinear.

    Resizing is linear along each axis, so two matrices per image crop and resize at once:
    weight[i, j] is what pixel j gives to pixel i of the result.
    """
    height = x.shape[-1]
    start, length = box[:, :2, None, None], box[:, 2:, None, None]  # [n, 2, 1, 1]: rows, columns
    stride = length / size
    pixel = torch.arange(0.5, height, device=x.device)  # [H], the centres of the pixels
    centre = start + stride * torch.arange(0.5, size, device=x.device)[:, None]  # [n, 2, size, 1]
    weight = (1 - (pixel - centre).abs() / stride.clamp(min=1)).clamp_(min=0)  # a triangle
    weight = weight * ((pixel > start) & (pixel < start + length))  # nothing beyond the crop
    rows, columns = (weight / weight.sum(-1, keepdim=True)).unbind(1)  # [n, size, H] each
    x = x.flatten(1, 2) @ columns.mT  # [n, 3·H, size]
    return rows[:, None] @ x.view(len(x), 3, height, size)


# An augmentation is a function f(x, t): x [n, 3, S, S] in [0, 1] on any device, t a Draw of n rows.
# To add one, write a function like these and one line in AUGMENTATIONS.
def flip(x, t):
    return x.flip(-1)


def grayscale(x, t):
    return rgb_to_grayscale(x, num_output_channels=3)


def color_jitter(x, t):
    """Brightness, contrast, saturation and hue, in an order drawn once for the batch.

    The first three move a pixel towards the colour named below, or away from it.
    """
    factor = to_device(t.uniform("jitter factor", 0.6, 1.4, 3, 1, 1, 1), x.device)
    turn = to_device(t.uniform("hue", -0.1, 0.1, 1, 1, 1), x.device)
    for change in torch.randperm(4, generator=rng(*t.key, "jitter order")).tolist():
        if change == 0:  # brightness: black
            x = (x * factor[:, 0]).clamp_(0, 1)
        elif change == 1:  # contrast: the image's mean grey
            grey = rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
            x = grey.lerp(x, factor[:, 1]).clamp_(0, 1)
        elif change == 2:  # saturation: each pixel's own grey
            x = rgb_to_grayscale(x).lerp(x, factor[:, 2]).clamp_(0, 1)
        else:
            x = turn_hue(x, turn)
    return x


def turn_hue(x, turn):
    """x: [n, 3, H, W]; turn: [n, 1, 1, 1], in turns of the colour circle, at most a sixth.

    Hue as in HSV, in sixths of the circle: red is 0, green 2, blue 4, red again 6. The brightest
    channel tells which of these is nearest, the difference of the other two how far away it is.
    """
    red, green, blue = x.split(1, 1)
    value, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - lowest
    hue = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    hue = torch.where(value == red, green - blue, hue) / chroma.clamp(min=1e-12)
    # Back to RGB: a channel is brightest up to a distance of 1 from its own hue, darkest from 2 on.
    own_hue = torch.arange(0, 6, 2, device=x.device)[:, None, None]
    distance = (hue + 6 * turn - own_hue).abs()  # [n, 3, H, W], at most 6
    distance = distance.minimum(6 - distance)  # the shorter way around the circle
    return value.lerp(lowest, (distance - 1).clamp_(0, 1))


def gaussian_blur(x, t):
    """σ from 0.1 to 2 pixels. The kernel's width is 23 (SimCLR's at 224: a tenth, made odd), but at
    most 2S − 1, which is all that reflection allows."""
    n = len(x)
    radius = min(11, x.shape[-1] - 1)
    sigma = to_device(t.uniform("sigma", 0.1, 2, 1), x.device)  # [n, 1]
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (offset / sigma) ** 2, 1)  # [n, width]
    kernel = kernel.repeat_interleave(3, 0)[:, None, None]  # [3n, 1, 1, width]: one a channel
    x = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)
    x = F.conv2d(x, kernel, groups=3 * n)  # horizontally
    x = F.conv2d(x, kernel.mT, groups=3 * n)  # vertically
    return x.unflatten(0, (n, 3))


# The paper names the next three without parameters; these are ours.
def random_cutout(x, t):
    """A square of half the side, clipped at the image's border, gets the colour MEAN."""
    side = x.shape[-1]
    centre = (side * t.uniform("cutout", 0, 1, 2, 1)).floor()  # [n, 2, 1]: row, column
    corner = centre - side // 4
    pixel = torch.arange(side)
    inside = (pixel >= corner) & (pixel < corner + side // 2)  # [n, 2, S]: rows, columns
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]  # [n, S, S]
    mean = to_device(torch.tensor(MEAN)[:, None, None], x.device)
    return torch.where(to_device(hole[:, None], x.device), mean, x)


def random_rotation(x, t):
    """A quarter, a half or three quarters of a turn."""
    quarters = to_device(t.uniform("quarters", 1, 4, 1, 1, 1).floor(), x.device)
    x = torch.where(quarters >= 2, x.flip(-2, -1), x)
    return torch.where(quarters % 2 == 1, x.rot90(1, (-2, -1)), x)


def gaussian_noise(x, t):
    """Standard deviation 0.1. Drawn on the CPU, so that every device gets the same noise."""
    seeds = t.uniform("noise seed", 0, 2 ** 24).long().tolist()  # float32 holds these exactly
    noise = torch.stack([torch.randn(x.shape[1:], generator=rng(seed)) for seed in seeds])
    return (x + 0.1 * to_device(noise, x.device)).clamp(0, 1)


AUGMENTATIONS = {  # name: (the function, the probability that it is applied to a view)
    "flip": (flip, 0.5),
    "color_jitter": (color_jitter, 0.8),
    "grayscale": (grayscale, 0.2),
    "gaussian_blur": (gaussian_blur, 0.5),
    "random_cutout": (random_cutout, 0.5),
    "random_rotation": (random_rotation, 0.75),  # 0, 1, 2 and 3 quarters are equally likely
    "gaussian_noise": (gaussian_noise, 0.5),
}


def augment(x, t, names):
    """x: [n, 3, S, S] in [0, 1], changed in place by the augmentations of these names, in order."""
    for name in names:
        function, probability = AUGMENTATIONS[name]
        chosen = (t.uniform(f"apply {name}", 0, 1) < probability).nonzero().squeeze(1)
        if len(chosen):
            rows = to_device(chosen, x.device)
            x[rows] = function(x.index_select(0, rows), t.only(chosen))
    return x


# ----------------------------------------- images -----------------------------------------
@dataclass(eq=False)
class Images:
    """N images in memory. One smaller than S × S lies in the upper left corner. Without views an
    image is plain: its central square, resized to `size`, or if that is None the whole image."""
    pixels: torch.Tensor  # uint8 [N, 3, S, S] on the device; all else is on the CPU
    shapes: torch.Tensor  # [N, 2], height and width
    labels: torch.Tensor  # [N], −1 if unknown
    names: np.ndarray  # [N], of files
    classes: list  # names of the labels
    size: int | None = None
    device = torch.device("cpu")

    def __len__(self):
        return len(self.labels)

    def __getstate__(self):  # for other ranks: load_data sends them the pixels
        return {**vars(self), "pixels": None}

    def to(self, device):
        self.device = device
        if self.pixels is not None:
            self.pixels = self.pixels.to(device)
        return self

    def select(self, rows):
        """The images of these rows: numbers, or a mask."""
        chosen = copy.copy(self)
        chosen.labels, chosen.names = self.labels[rows], self.names[rows.numpy()]
        if self.pixels is not None:
            chosen.pixels = self.pixels[to_device(rows, self.device)]
            chosen.shapes = self.shapes[rows]
        return chosen

    def batches(self, plan, views=None, n=1, key=(), one_t=False):
        """Yields step, x for each (step, rows) of `plan`; rows: [m], which images make the batch.

        x: [n·b, 3, size, size], normalised. It holds n views of each of this rank's b images,
        first the first view of all, then the second. Without `views` it holds the b images. With
        one_t there is one t for all images of all steps.
        """
        def requests():
            for step, rows in plan:
                own = rank_share(len(rows))
                # Where this rank's views lie among the n·m views of the batch.
                places = torch.arange(n * len(rows)).view(n, -1)[:, own].flatten()  # [n·b]
                t = Draw((*key, step), n * len(rows), places)
                if one_t:
                    t = Draw(key, 1, torch.zeros_like(places))
                yield step, rows[own], t

        mean, std = to_device(torch.tensor([MEAN, STD]), self.device)[..., None, None]
        for step, x, t in self.read(requests(), views):
            x = to_device(x, self.device).float() / 255
            if views:
                x = augment(x, t, views.names)
            yield step, ((x - mean) / std).contiguous(memory_format=torch.channels_last)

    def read(self, requests, views):
        """Yields step, x, t of each request; x: [n·b, 3, size, size], 0 to 255, cropped only."""
        for step, rows, t in requests:
            x = self.pixels.index_select(0, to_device(rows, self.device)).float()
            shape = self.shapes[rows]
            if views:
                n = len(t.places) // len(rows)
                boxes = random_crop_boxes(t, shape.repeat(n, 1), views.crop_scale)
                boxes = to_device(boxes, self.device).chunk(n)
                x = torch.cat([crop_resize(x, box, views.size) for box in boxes])
            elif self.size:
                x = crop_resize(x, to_device(central_boxes(shape), self.device), self.size)
            yield step, x, t


# ----------------------------------------- model ------------------------------------------
class Encoder(nn.Module):
    """f: the backbone, which is evaluated, and the projector, whose output the loss sees."""

    def __init__(self, backbone, stem, widths):
        super().__init__()
        resnet = torchvision.models.resnet
        if backbone in ("resnet8", "resnet10"):  # one block a stage; torchvision has none
            net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
        else:
            net = torchvision.models.get_model(backbone, weights=None)
        width = net.fc.in_features
        net.fc = nn.Identity()
        if backbone == "resnet8":  # three stages: a fourth would see one pixel of a small image
            net.layer4 = nn.Identity()
            width = 256
        if stem == "cifar":  # small images: no stride and no pooling before the first stage
            net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        layers = []
        for inputs, outputs in zip([width, *widths], widths):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.backbone = net
        # The last layer has no ReLU (A.3.1), nor a learned scale and shift (ours).
        self.projector = nn.Sequential(*layers[:-2], nn.BatchNorm1d(widths[-1], affine=False))

    def forward(self, x):
        return self.projector(self.backbone(x))


# ----------------------------------------- pretraining ------------------------------------
def cosine_lr(peak, step, total):
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))


def autocast(device, cfg):
    """For the network. The losses compute in float32 even then."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


def pretrain(encoder, train, cfg):
    """Train `encoder` by SGD, from the last finished epoch of this run if there is one.

    What a step sees is a function of the seed and the step, so no generator's state is saved.
    """
    m = cfg.batch_size
    per_epoch = len(train) // m
    optimizer = torch.optim.SGD(encoder.parameters(), cfg.lr, cfg.momentum,
                                weight_decay=cfg.weight_decay)
    session = Session(encoder, optimizer, train, cfg)  # resumes, logs and saves: part 3
    model = distribute(encoder, train.device).train()
    for epoch in range(session.first_epoch, cfg.epochs):
        order = torch.randperm(len(train), generator=rng(cfg.seed, "order", epoch))
        plan = enumerate(order[:m * per_epoch].split(m), epoch * per_epoch)
        for step, x in train.batches(plan, cfg.views, n=2, key=(cfg.seed, "views")):
            lr = cosine_lr(cfg.lr, step, cfg.epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = lr
            with autocast(train.device, cfg):
                z1, z2 = model(x).chunk(2)  # both views in one pass; [m / ranks, d] each
            loss = LOSSES[cfg.loss](z1, z2, cfg.alpha, cfg.lam, cfg.similarity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.log(step + 1, loss.detach(), lr, z1.detach())
        session.save(epoch + 1)


# ----------------------------------------- evaluation -------------------------------------
def in_chunks(network, x):
    """network(x), in parts that the cache of a CPU or the memory of a GPU holds."""
    return torch.cat([network(part) for part in x.split(64 if x.device.type == "cpu" else 512)])


@torch.no_grad()
def extract(backbone, data, cfg):
    """Features [N, d] float32 of the plain images, on every rank."""
    backbone.eval()
    chunks = torch.arange(len(data)).split(512)
    features = None  # filled in place: joining parts would need ImageNet's 10 GB twice
    for step, x in progress("features", data.batches(enumerate(chunks)), len(chunks)):
        with autocast(data.device, cfg):
            x = in_chunks(backbone, x).float()
        rows = chunks[step]
        if features is None:
            features = x.new_empty(len(data), x.shape[1])
        features[rows[0]:rows[-1] + 1] = gather_rows(x, len(rows))
    return features


def nearest(bank, queries, k):
    """[Q, k]: the rows of bank [N, d] most cosine-similar to queries [Q, d], nearest first."""
    length = bank.norm(dim=1).clamp(min=1e-12)  # dividing by a query's length changes no ranking
    return torch.cat([(part @ bank.T).div_(length).topk(k).indices for part in queries.split(128)])


def knn_predict(train_features, train_labels, test_features, k):
    """Labels [Q] of test_features [Q, d] by the majority of the k most cosine-similar of
    train_features [N, d]. Ties go to the class of the nearest neighbour among them."""
    voters = train_labels[nearest(train_features, test_features, k)]  # [Q, k], nearest first
    # How many of the k neighbours share the label of the j-th: labels 3 5 3 have the votes 2 1 2.
    votes = torch.stack([(voters == jth[:, None]).sum(1) for jth in voters.T], 1)  # [Q, k]
    winner = votes.argmax(1, keepdim=True)  # the first of equal maxima, so the nearest
    return voters.gather(1, winner).squeeze(1)


def linear_predict(train_features, train_labels, test_features, l2):
    """Labels [Q] by multinomial logistic regression: cross-entropy + (l2 / 2)‖W‖², by L-BFGS, which
    has no learning rate to tune. Features get unit length, then each dimension is standardised.
    """
    bank = F.normalize(train_features, dim=1)
    std, mean = torch.std_mean(bank, 0)
    std = std.clamp(min=1e-6)
    bank = (bank - mean) / std
    queries = (F.normalize(test_features, dim=1) - mean) / std
    weight = bank.new_zeros(int(train_labels.max()) + 1, bank.shape[1], requires_grad=True)
    offset = bank.new_zeros(len(weight), requires_grad=True)  # a bias means Eq. 16 in this file
    optimizer = torch.optim.LBFGS([weight, offset], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(bank, weight, offset), train_labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(queries, weight, offset).argmax(1)


def train_classifier(backbone, width, train, cfg):
    """A linear classifier on the frozen backbone (A.3.1, A.4.1), trained in every epoch on a fresh
    crop and flip of each image (ours: the paper names no views here).

    Each rank passes its share of a batch through the backbone, then all make the same step.
    """
    backbone.eval()
    before = digest(backbone)
    torch.manual_seed(cfg.seed)
    classifier = nn.Linear(width, len(train.classes)).to(train.device)
    batch = min(cfg.probe_batch, len(train))
    per_epoch = math.ceil(len(train) / batch)
    peak = cfg.probe_lr * batch / 256
    optimizer_class = {"sgd": torch.optim.SGD, "lars": LARS}[cfg.probe_optimizer]
    optimizer = optimizer_class(classifier.parameters(), lr=peak, momentum=0.9)
    side = train.size or train.pixels.shape[-1]  # CIFAR and STL-10 are evaluated as they are
    views = Views(["flip"], side, (0.08, 1.0))
    for epoch in classifier_epochs(cfg, before, classifier=classifier, optimizer=optimizer):
        order = torch.randperm(len(train), generator=rng(cfg.seed, "classifier", epoch))
        chunks = order.split(batch)
        batches = train.batches(enumerate(chunks), views,
                                key=(cfg.seed, "classifier views", epoch))
        stage = f"linear classifier, epoch {epoch + 1} of {cfg.probe_epochs}:"
        for step, x in progress(stage, batches, per_epoch):
            with torch.no_grad(), autocast(train.device, cfg):
                features = in_chunks(backbone, x).float()
            labels = train.labels[chunks[step]]
            logits = classifier(gather_rows(features, len(labels)))
            loss = F.cross_entropy(logits, to_device(labels, x.device))
            done = epoch * per_epoch + step
            optimizer.param_groups[0]["lr"] = cosine_lr(peak, done, cfg.probe_epochs * per_epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert digest(backbone) == before, "the classifier's training changed the backbone"
    return classifier


# ==========================================================================================
# Part 2: the theory, measured on training images and their labels. f(t(x)) is the projection of
# unit length (Assumption 4.2), unless another space is named.
# ==========================================================================================
@torch.no_grad()
def embed(encoder, data, cfg, name, n=1, groups=1, one_t=False):
    """(unit projections, raw projections, backbone features), each [N, groups, d], on every rank:
    means over n / groups views of each image.

    The same name and n give the same t to the same row; with one_t all images get the same t. In
    float32 even where training is not: bfloat16's rounding would add to the distances.
    """
    encoder.eval()
    chunks = torch.arange(len(data)).split(max(1, 512 // n))
    views = data.batches(enumerate(chunks), cfg.views, n, (cfg.seed, name), one_t)
    spaces = [], [], []
    for step, x in progress(f"theory, {name}", views, len(chunks)):
        features = in_chunks(encoder.backbone, x)
        raw = encoder.projector(features)
        for space, z in zip(spaces, (F.normalize(raw, dim=1), raw, features)):
            z = z.unflatten(0, (groups, n // groups, -1))  # [groups, views, b, d]
            z = z.mean(1).transpose(0, 1)  # [b, groups, d]
            space.append(gather_rows(z.contiguous(), len(chunks[step])))
    return [torch.cat(space) for space in spaces]


def theory_images(train, cfg):
    """The training images to measure on, and their labels renumbered 0 … C−1 without gaps."""
    n = min(cfg.theory_images, len(train))
    data = train.select(balanced_subset(train.labels, n, "theory"))
    labels = data.labels.unique(return_inverse=True)[1]
    return data, to_device(labels, data.device)


def class_means(x, labels):
    """x [N, ...], labels [N] of 0 … C−1, all present -> [C, ...]."""
    sums = x.new_zeros(int(labels.max()) + 1, *x.shape[1:]).index_add_(0, labels, x)
    return sums / labels.bincount().view(-1, *[1] * (x.dim() - 1))


def mean_norm(differences):
    """Mean length L of the difference of two expectations over T, as if from infinitely many views.

    differences: [N, 2, d], of each of N images, from the first and from the second half of its K
    views. With K views noise adds about c/K to L², for some c, with K/2 views 2c/K. So
    2(L² + c/K) − (L² + 2c/K) is L² (Richardson extrapolation), if the N lengths are similar.
    """
    whole = differences.mean(1).norm(dim=1).mean()
    half = differences.norm(dim=2).mean()
    return (2 * whole ** 2 - half ** 2).clamp(min=0).sqrt().item()


def eq16(halves, labels):
    """Prototype representation bias, Eq. 16: E‖E[f(T(X))|y] − E f(T(x))‖.

    halves: [N, 2, d], means over two halves of K views. An image is part of its class's mean.
    """
    return mean_norm(class_means(halves, labels)[labels] - halves)


def measure_bias(encoder, train, cfg):
    """eq16, the bias itself, and eq51, the paper's estimate of it (A.3.2), in three spaces: unit
    projections, raw projections (raw_…) and the backbone's features (features_…).

    Eq. 51 applies the same t to an image and to another one of its class; by Jensen's inequality
    it is an upper bound of Eq. 16. Both grow with the scale of the space, so there are
    eq51_relative: Eq. 51 over the mean distance of two random views, and
    eq16_relative: Eq. 16 over the mean distance of the mean views of two random images.
    """
    data, labels = theory_images(train, cfg)
    shuffled = torch.randperm(len(data), generator=rng(cfg.seed, "pairs"))
    other = torch.empty_like(shuffled)  # [N]: x′, another image of the class
    for label in data.labels.unique():  # of the CPU, as shuffled is
        rows = shuffled[data.labels[shuffled] == label]
        other[rows] = rows.roll(1)
    pairs = to_device(torch.stack([shuffled, shuffled.roll(1)]), data.device)  # random images
    spaces = embed(encoder, data, cfg, "bias")
    others = embed(encoder, data.select(other), cfg, "bias")  # the same name: the same t
    means = embed(encoder, data, cfg, "mean views", n=cfg.theory_views, groups=2)
    metrics = {}
    for space, z, z_other, halves in zip(("", "raw_", "features_"), spaces, others, means):
        random_views = (z[pairs[0]] - z[pairs[1]]).norm(dim=2).mean().item()
        random_means = mean_norm(halves[pairs[0]] - halves[pairs[1]])
        metrics[f"{space}eq51"] = (z - z_other).norm(dim=2).mean().item()
        metrics[f"{space}eq16"] = eq16(halves, labels)
        metrics[f"{space}eq51_relative"] = metrics[f"{space}eq51"] / max(random_views, 1e-12)
        metrics[f"{space}eq16_relative"] = metrics[f"{space}eq16"] / max(random_means, 1e-12)
    return metrics


def repulsion_bound(anchor, bank, labels, alpha):
    """B = (1/α) log Σ_y E[exp(α s) | y] for each anchor (Eq. 46). anchor, bank: [N, d]."""
    # E[· | y] is a sum over the images of y, divided by their number. So the log of that number is
    # subtracted from each image's exponent.
    log_count = labels.bincount().to(anchor.dtype).log()[labels]  # [N], of each bank image's class
    parts = [(alpha * rows @ bank.T - log_count).logsumexp(1) for rows in anchor.split(1024)]
    return torch.cat(parts) / alpha


def theorem_sides(anchor, mean_view, bank, labels, alpha):
    """Both sides of Theorems 4.4 and 4.6 for each anchor f(t(x)) of unit length: {name: [N]}.

    anchor, bank: [N, d], one view of each image, drawn independently; mean_view: [N, d], E f(T(x)).
    Each image of the bank has its own t′.

    Theorem 4.6 bounds max over y′ ≠ y of s(f, prototype of y′) by B/ν. Its proof multiplies the
    largest product with a prototype by 1/ν ≥ 1 (Eq. 38), as if that could not make it smaller. But
    in Case 1 this product is at most 0. The bound holds where B ≥ 0 (sufficient, not
    necessary; α ≤ log C implies B ≥ 0), and with max(B, B/ν) always.
    """
    prototypes = class_means(bank, labels)  # [C, d]
    own_class = F.one_hot(labels, len(prototypes)).bool()  # [N, C]
    b = repulsion_bound(anchor, bank, labels, alpha)
    nu = prototypes.norm(dim=1).expand(own_class.shape).masked_fill(own_class, math.inf).amin(1)
    to_prototypes = anchor @ F.normalize(prototypes, dim=1).T  # [N, C]
    return {"attract_left": -F.cosine_similarity(anchor, mean_view),  # Eq. 8
            "attract_right": -(anchor * mean_view).sum(1),
            "repel_left": to_prototypes.masked_fill(own_class, -math.inf).amax(1),  # Eq. 10
            "repel_right": b / nu, "b": b, "nu": nu}


def measure_bounds(encoder, train, cfg):
    """How tight Theorems 4.4 and 4.6 are: mean gaps, right minus left side (A.4.5, Fig. 6), and in
    % of images where a bound fails. The mean over t′ is over K = cfg.theory_views views of the
    image in Theorem 4.4, and over the bank, one view of each image, in Theorem 4.6.

    attract_gap, attract_fails    Eq. 8, Theorem 4.4
    repel_gap, repel_fails        Eq. 10, Theorem 4.6, with a t′ of its own for each bank image: the
                                  mean over t′ is inside the log, so this bound is a weaker one
    printed_gap, printed_fails    Eq. 10 as printed: one t′ for the whole bank, B's mean over K t′
    angle                         mean angle between f(t(x)) and the mean view, in degrees
    angle_over_90                 % of images with more than 90°, which break Assumption 4.3
    nu                            smallest ν of all images: λ of Eq. 17 absorbs the factor 1/ν
    b, b_negative                 B, and % of images with B < 0
    """
    data, labels = theory_images(train, cfg)

    def projections(name, n=1, one_t=False):
        return embed(encoder, data, cfg, name, n, one_t=one_t)[0][:, 0]  # [N, d], means of n

    anchor = projections("anchors")
    mean_view = projections("mean views", cfg.theory_views)
    sides = theorem_sides(anchor, mean_view, projections("bank"), labels, cfg.alpha)
    printed = torch.zeros_like(sides["b"])
    for k in range(cfg.theory_views):
        bank = projections(f"bank {k + 1}", one_t=True)
        printed += repulsion_bound(anchor, bank, labels, cfg.alpha) / cfg.theory_views
    angle = (-sides["attract_left"]).clamp(-1, 1).acos().rad2deg()
    gaps = {"attract": sides["attract_right"] - sides["attract_left"],
            "repel": sides["repel_right"] - sides["repel_left"],
            "printed": printed / sides["nu"] - sides["repel_left"]}
    metrics = {"angle": angle.mean().item(), "angle_over_90": percent(angle > 90),
               "nu": sides["nu"].min().item(), "b": sides["b"].mean().item(),
               "b_negative": percent(sides["b"] < 0)}
    for name, gap in gaps.items():
        metrics[f"{name}_gap"] = gap.mean().item()
        metrics[f"{name}_fails"] = percent(gap < -1e-6)  # more than rounding
    return metrics


# ==========================================================================================
# Part 3: the machinery. The method is above; look up here what you need.
# ==========================================================================================

# ----------------------------------------- settings ---------------------------------------
RESNETS = ["resnet8", "resnet10",
           *torchvision.models.list_models(torchvision.models, "*resne[tx]*")]
DROPPABLE = {"gaussian_blur": ["gaussian_blur"], "color_distortion": ["color_jitter", "grayscale"]}
# Every flag: its default, what it is, its choices or its least value. The default is that of the
# paper's CIFAR-10 recipe (A.4.1), if it has one; "" means that there is none.
WEIGHT_SETTINGS = {
    "alpha": (2.0, "α, sharpness of the softmax over negatives: 1 / temperature", 1e-6),
    "lam": (4.0, "λ, weight of repelling against attracting", 0),
    "loss": ("balanced", "Eq. 17, or generalized NT-Xent", list(LOSSES)),
    "similarity": ("cosine", "of projections (Table 1)", ["cosine", "dot", "euclidean"]),
    "epochs": (200, "of pretraining; 0 evaluates the untrained backbone", 0),
    "batch_size": (512, "images per step over all processes; twice as many views", 2),
    "lr": (0.1, "SGD's peak, then a cosine; gradients are 1/α of the usual NT-Xent's", 1e-6),
    "momentum": (0.9, "of SGD", 0),
    "weight_decay": (1e-4, "of SGD, on all parameters", 0),
    "backbone": ("resnet18", "a ResNet of torchvision, or resnet8, resnet10", RESNETS),
    "stem": ("cifar", "cifar: 3×3, no stride, no pooling", ["cifar", "imagenet"]),
    "projector": ([2048, 2048], "widths of its layers", 1),
    "size": (32, "pixels of a crop's side", 1),
    "crop_scale": ([0.08, 1.0], "smallest and largest share of the image in a crop", 1e-6),
    "augmentations": (["flip", "color_jitter", "grayscale"],
                      "after the crop, in this order", list(AUGMENTATIONS)),
    "drop": ([], "augmentations to leave out (Fig. 3)", list(DROPPABLE)),
    "add": ([], "augmentations to append (Fig. 3)", list(AUGMENTATIONS)),
    "precision": ("float32", "of the network; bfloat16 on GPUs that compute in it",
                  ["float32", "bfloat16"]),
    "seed": (0, "of weights, order and views", 0),
    "init": ("", "start from the backbone in this file, of balcon or another library", None),
    "limit": (0, "train on this many images, chosen by --seed only with --subset", 0),
    "subset": ("full", "lt: long-tailed as ImageNet-LT; uni: uniform of that size (A.3.4); "
               "or a file that lists class/image in each line", None)}
SETTING_GROUPS = {
    "What makes the weights; must match when a run is resumed": WEIGHT_SETTINGS,
    "Evaluation": {
        "eval": (["knn", "linear"], "what to measure; no name: nothing",
                 ["knn", "linear", "bias", "bounds"]),
        "baseline": (True, "evaluate the untrained backbone, too", None),
        "checkpoint": ("", "evaluate this checkpoint instead of pretraining", None),
        "k": ([1, 10], "nearest neighbours that vote", 1),
        "probe": ("crops", "linear classifier on fresh crops, or on features computed once",
                  ["crops", "features"]),
        "probe_optimizer": ("sgd", "of the classifier on crops", ["sgd", "lars"]),
        "probe_lr": (30.0, "its peak learning rate, for a batch of 256", 1e-6),
        "probe_batch": (256, "its images per step", 1),
        "probe_epochs": (90, "its epochs", 1),
        "probe_l2": (0.03, "on features: weight of ‖W‖²/2 beside the mean cross-entropy", 0),
        "theory_images": (50_000, "training images for bias and bounds, at most", 2),
        "theory_views": (10, "K, even: Monte Carlo views of an image", 2)},
    "Files and processes": {
        "data": ("", "where the images are; by default data/DATASET", None),
        "out": ("", "run directory, by default in runs/; the same command resumes it", None),
        "export": ("", "write features to this .npz file", None),
        "save_every": (0, "keep every Nth epoch's checkpoint (Fig. 6); 0: only the last", 0),
        "workers": (8, "threads of each rank that read ImageNet", 0)}}
SETTINGS = {name: entry for group in SETTING_GROUPS.values() for name, entry in group.items()}
MAKES_WEIGHTS = ["dataset", *WEIGHT_SETTINGS]  # must match on resume
PHOTOS = dict(alpha=4.0, lam=2.0, epochs=100, stem="imagenet", crop_scale=[0.2, 1.0],
              augmentations=["color_jitter", "grayscale", "gaussian_blur", "flip"])
RECIPES = {  # what differs from the above
    "patterns": dict(  # ours: synthetic images, for the demonstration
        alpha=4.0, lam=2.0, epochs=5, batch_size=64, lr=0.5, backbone="resnet8", stem="imagenet",
        projector=[512, 128], size=24, crop_scale=[0.4, 1.0], k=[5], probe="features",
        theory_images=256, theory_views=4, eval=["knn", "linear", "bias", "bounds"]),
    "cifar10": {}, "cifar100": {},
    "stl10": dict(stem="imagenet", size=96),  # ours
    "imagenet": PHOTOS | dict(  # A.3.1; LARS as in SimSiam
        backbone="resnet50", projector=[2048, 2048, 2048], size=224, k=[200],
        probe_optimizer="lars", probe_lr=0.1, probe_batch=4096, baseline=False),
    "folder": PHOTOS | dict(  # ours: own photographs
        batch_size=128, projector=[512, 128], size=128, k=[5], probe="features"),
}
THEORY_SETTINGS = ["theory_images", "theory_views", "seed", "size", "crop_scale", "augmentations",
                   "drop", "add"]
DEPENDS = {  # settings that a figure depends on, beside the weights and the images
    "knn": ["size", "precision", "k"],
    "linear": ["size", "precision", "seed", *(key for key in SETTINGS if key.startswith("probe"))],
    "bias": THEORY_SETTINGS, "bounds": [*THEORY_SETTINGS, "alpha"],
    "neighbors": ["size", "precision"]}
HINTS = {  # what people type, and what they mean
    "--temperature": "--alpha, which is 1 / temperature", "--tau": "--alpha, which is 1 / tau",
    "simclr": "ntxent with --lam 1", "dcl": "balanced with --lam 1"}


def recipe_of(dataset):
    recipe = {name: default for name, (default, *_) in SETTINGS.items()} | RECIPES[dataset]
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        recipe["precision"] = "bfloat16"
    return recipe | {"dataset": dataset}


def values_of(cfg, names):
    return {name: vars(cfg)[name] for name in names}


def require_one_of(known, word, sentence):
    if word not in known:
        near = HINTS.get(word) or next(iter(difflib.get_close_matches(word, known, 1)), "")
        refuse(sentence + (f"; did you mean {near}?" if near else f": {', '.join(known)}"))


def parse_flags(argv=None):
    """The configuration: the recipe of the data set, or a checkpoint's own, changed by flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=False,
                                     allow_abbrev=False, usage="python balcon.py [flags]")
    parser.error = refuse
    parser.add_argument("--dataset", help="selects the recipe: " + ", ".join(RECIPES))
    for title, group in SETTING_GROUPS.items():
        section = parser.add_argument_group(title)
        for name, (default, meaning, rule) in group.items():
            options = {"type": type(default), "metavar": name.upper()}
            if isinstance(default, list):
                options |= {"type": type(default[0]) if default else str, "nargs": "*"}
            if isinstance(default, bool):
                options = {"action": argparse.BooleanOptionalAction}
            if isinstance(rule, list) and len(rule) < 8:
                meaning += f" {{{', '.join(rule)}}}"
            section.add_argument(as_flag(name), **options, help=meaning + " (default: %(default)s)")
    # The first pass finds --dataset and --checkpoint, which choose the defaults; --help shows them.
    first = parser.parse_known_args(argv)[0]
    saved = load_file(first.checkpoint).get("config") or {} if first.checkpoint else {}
    if first.checkpoint and set(saved) != set(MAKES_WEIGHTS):
        refuse(f"{first.checkpoint} is no checkpoint of this version; --init takes its weights")
    dataset = saved.get("dataset", "patterns") if first.dataset is None else first.dataset
    require_one_of(RECIPES, dataset, f"--dataset {dataset} is unknown")
    # A checkpoint holds the weights of its own --init, and its own images were chosen by --limit.
    defaults = recipe_of(dataset) | saved | {"dataset": dataset, "init": ""}
    if dataset != saved.get("dataset"):
        defaults |= {"limit": 0, "subset": "full"}
    parser.set_defaults(**defaults)
    parser.add_argument("-h", "--help", action="help", help="show this")
    cfg, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        require_one_of(["--dataset", *map(as_flag, SETTINGS)], flag, f"there is no flag {flag}")

    dropped = sum((DROPPABLE.get(name, []) for name in cfg.drop), [])
    names = [name for name in cfg.augmentations if name not in dropped] + cfg.add
    cfg.views = Views(names, cfg.size, cfg.crop_scale)
    cfg.trains = cfg.epochs > 0 and not cfg.checkpoint
    cfg.data = Path(cfg.data or f"data/{dataset}")
    cfg.out = Path(cfg.out or default_out(cfg))
    return cfg


def default_out(cfg):
    """Name of the run directory: the data set, then what differs from its recipe, or the checkpoint
    that is evaluated."""
    recipe = recipe_of(cfg.dataset)
    words = [cfg.dataset]
    if cfg.dataset == "folder":
        words.append(cfg.data.resolve().name)
    if cfg.checkpoint:
        words += ["by", *Path(cfg.checkpoint).with_suffix("").parts[-2:]]
    else:
        words += [f"{key}-{vars(cfg)[key]}" for key in MAKES_WEIGHTS
                  if vars(cfg)[key] != recipe[key]]
    name = re.sub(r"[^\w.]+", "-", "_".join(words))
    if len(name.encode()) > 100:  # file systems take 255 bytes
        name = f"{name[:60]}-{digest([np.array(words)])[:9]}"
    return f"runs/{name}"


def as_flag(name):
    return "--" + name.replace("_", "-")


def check_settings(cfg):
    """Refuse, before any work is done, what would fail late."""
    for name, (_, _, rule) in SETTINGS.items():
        value = vars(cfg)[name]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(rule, list):
                require_one_of(rule, item, f"{as_flag(name)} {item} is unknown")
            elif rule is not None:
                require(rule <= item < 2 ** 63,
                        f"{as_flag(name)} {item} must be at least {rule} and below 2^63")
    present, processes = set(cfg.augmentations), int(os.environ.get("WORLD_SIZE", 1))
    export = Path(cfg.export)
    require(not cfg.trains or cfg.batch_size % processes == 0,
            f"--batch-size {cfg.batch_size} is not divisible by the {processes} processes")
    require(cfg.k and cfg.projector, "--k and --projector need at least one number")
    require(len(cfg.crop_scale) == 2 and cfg.crop_scale[0] <= cfg.crop_scale[1] <= 1,
            "--crop-scale takes two shares between 0 and 1, the smaller one first")
    require(len(set(cfg.views.names)) == len(cfg.views.names),
            f"an augmentation comes twice: {' '.join(cfg.views.names)}")
    require(all(present & set(DROPPABLE[name]) for name in cfg.drop),
            f"--drop {' '.join(cfg.drop)}: the recipe has none")
    require(not cfg.limit or cfg.subset in ("full", "lt", "uni"),
            "--limit and a list of files in --subset exclude each other")
    require(cfg.theory_views % 2 == 0, f"--theory-views {cfg.theory_views} must be even")
    require(not (cfg.init and cfg.checkpoint), "--init and --checkpoint exclude each other")
    require(not cfg.export or export.parent.is_dir() and not export.is_dir(),
            f"--export {cfg.export} is a folder, or its folder does not exist")
    require(cfg.out.is_dir() or not cfg.out.exists(), f"--out {cfg.out} is not a folder")
    require(cfg.out.resolve() != cfg.data.resolve(), "--out and --data name the same folder")


# ----------------------------------------- the experiment ---------------------------------
def build_encoder(cfg, device):
    torch.manual_seed(cfg.seed)
    encoder = Encoder(cfg.backbone, cfg.stem, cfg.projector)
    if cfg.init:
        load_backbone(cfg.init, encoder.backbone)
    if cfg.checkpoint:
        state = load_file(cfg.checkpoint)
        load_parts(cfg.checkpoint, state, **dict(encoder.named_children()))
    return encoder.to(device, memory_format=torch.channels_last)


def run(cfg):
    """Pretrain or resume, evaluate, write results.json and the pictures. Returns the exit code."""
    device = start_processes()
    check_same_run(cfg)
    encoder = build_encoder(cfg, device)
    train, test = load_data(cfg, device)
    cfg.images_digest = "".join(digest([data.names, data.labels]) for data in (train, test) if data)
    gallery = train  # the images that are searched, and that classifiers learn from
    if (train.labels < 0).any() and (train.labels >= 0).any():
        gallery = train.select(train.labels >= 0)
    wanted = from_rank_0(lambda: choose_evaluations(cfg, train, gallery, test))
    check_same_run(cfg, cfg.images_digest)
    start_log(cfg, train, test)
    path = cfg.out / "results.json"
    results = from_rank_0(lambda: json.loads(path.read_text()) if path.exists() else {})
    results["config"] = values_of(cfg, MAKES_WEIGHTS)

    if cfg.trains:
        draw_views(train, cfg)
        if cfg.baseline:
            evaluate("untrained", encoder, gallery, test, wanted, results, cfg)
        pretrain(encoder, train, cfg)
    stage = "trained" if cfg.trains or cfg.checkpoint else "untrained"
    features = evaluate(stage, encoder, gallery, test, wanted, results, cfg)
    if not cfg.baseline or not cfg.trains:  # results.json may hold an earlier stage
        results = {stage: results[stage]}
    draw_neighbors(gallery, test, results, cfg)
    if cfg.export:
        export(cfg.export, features, [gallery, test] if test else [gallery])
    code = conclude(results, wanted, cfg)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return code


def choose_evaluations(cfg, train, gallery, test):
    """--eval, or nothing where the images have no labels. Refuses what would fail late."""
    require(len(train) > 1, "there is only one training image")
    steps = len(train) // cfg.batch_size * cfg.epochs
    if cfg.trains:
        if not steps:
            refuse(f"--batch-size {cfg.batch_size} is more than the {len(train)} training images")
        if steps < 100 or cfg.batch_size < 32:
            say(f"warning: {steps} steps of {cfg.batch_size} images are too few to learn much; "
                "--init starts from weights that were trained on more, such as torchvision's")
    no_test = test is None and {"knn", "linear"} & set(cfg.eval)
    if cfg.eval and (no_test or len(gallery.labels.unique()) < 2):
        if cfg.eval != recipe_of(cfg.dataset)["eval"]:  # the user asked for these
            refuse(f"--eval {' '.join(cfg.eval)} needs labels and test images: class folders "
                   f"{cfg.data}/train/<class>/ and {cfg.data}/val/<class>/")
        say("without labels there is no accuracy to measure; neighbors.png shows what is learned")
        return []
    if {"bias", "bounds"} & set(cfg.eval) and (theory_images(gallery, cfg)[1].bincount() < 2).any():
        refuse("bias and bounds compare images of a class, and some class has one image only: "
               "leave them out of --eval, or raise --theory-images or --limit")
    return cfg.eval


def percent(mask):
    return 100 * mask.double().mean().item()


def knn_accuracy(features, train, test, cfg):
    """{metric: top-1 accuracy in %}. features: a function of train or test, [N, d]."""
    metrics = {}
    for k in cfg.k:
        predicted = knn_predict(features(train), to_device(train.labels, train.device),
                                features(test), min(k, len(train)))
        metrics[f"knn{k}"] = percent(predicted.cpu() == test.labels)
    return metrics


def linear_accuracy(backbone, features, train, test, cfg):
    if cfg.probe == "features":
        predicted = linear_predict(features(train), to_device(train.labels, train.device),
                                   features(test), cfg.probe_l2)
    else:
        classifier = train_classifier(backbone, features(test).shape[1], train, cfg)
        predicted = classifier(features(test)).argmax(1)
    return {"linear": percent(predicted.cpu() == test.labels)}


def evaluate(stage, encoder, gallery, test, wanted, results, cfg):
    """Measure what is not in `results` yet; write results.json after each evaluation.

    results: {stage: {evaluation: {"settings": those that its figures depend on, figure: value}}}.
    Returns a function that gives the features of the gallery or the test images.
    """
    weights_digest = from_rank_0(lambda: digest(encoder))
    extracted = {}

    def features(data):
        if data not in extracted:
            extracted[data] = extract(encoder.backbone, data, cfg)
        return extracted[data]

    measure = {"knn": lambda: knn_accuracy(features, gallery, test, cfg),
               "linear": lambda: linear_accuracy(encoder.backbone, features, gallery, test, cfg),
               "bias": lambda: measure_bias(encoder, gallery, cfg),
               "bounds": lambda: measure_bounds(encoder, gallery, cfg),
               "neighbors": lambda: find_neighbors(encoder.backbone, extracted, gallery, test, cfg)}
    for name in [*wanted, "neighbors"]:  # last: it searches the features that others extracted
        settings = values_of(cfg, DEPENDS[name])
        settings |= {"weights": weights_digest, "images": cfg.images_digest}
        known = results.setdefault(stage, {})
        if known.get(name, {}).get("settings") != settings:
            known[name] = {"settings": settings, **measure[name]()}
            save_file(cfg.out / "results.json",
                      lambda file: file.write(json.dumps(results, indent=1).encode() + b"\n"))
    return features


MEANINGS = {  # the figures that are printed, beside kNN's; results.json has more
    "linear": "linear classifier, top-1 accuracy, %",
    "eq51_relative": "bias, Eq. 51, over the distance of random views",
    "eq16_relative": "bias, Eq. 16, over the distance of random images",
    "attract_gap": "gap of Theorem 4.4 (0 is tight)",
    "repel_gap": "gap of Theorem 4.6 (0 is tight)",
    "repel_fails": "images where the bound of Theorem 4.6 fails, %",
    "angle_over_90": "images that break Assumption 4.3, %",
    "nu": "ν, length of the shortest class prototype",
}


def conclude(results, wanted, cfg):
    """Print the table. Returns 1 if the demonstration did not learn."""
    columns = {stage: {} for stage in ("untrained", "trained") if stage in results}
    for stage, column in columns.items():
        for name in wanted:
            column |= results[stage][name]
    meanings = {f"knn{k}": f"kNN, k = {k}, top-1 accuracy, %" for k in cfg.k} | MEANINGS
    if any(columns.values()):
        say(" " * 52 + "".join(f"{stage:>12}" for stage in columns))
    for name, meaning in meanings.items():
        values = [column.get(name, math.nan) for column in columns.values()]
        if not all(map(math.isnan, values)):
            say(f"{meaning:52}" + "".join(f"{value:12.4g}" for value in values))
    if rank() == 0:
        say(f"{cfg.out} holds {', '.join(sorted(path.name for path in cfg.out.iterdir()))}")
    own = recipe_of("patterns") | {"seed": cfg.seed}
    is_demo = all(vars(cfg)[key] == own[key] for key in MAKES_WEIGHTS)
    errors = [100 - column["knn5"] for column in columns.values() if "knn5" in column]
    if not is_demo or len(errors) < 2:
        return 0
    before, after = errors
    learned = after < before / 4
    say(f"kNN error: {after:.1f} % trained, {before:.1f} % untrained: "
        + ("it learned." if learned else "FAILED, it should be less than a quarter."))
    return int(not learned)


# ----------------------------------------- runs that resume -------------------------------
class Session:
    """What surrounds the steps of pretraining: resuming, log.jsonl, the screen, checkpoints."""

    def __init__(self, encoder, optimizer, train, cfg):
        self.cfg = cfg
        self.per_epoch = len(train) // cfg.batch_size
        self.encoder = dict(encoder.named_children())  # backbone, projector
        self.statistics = list(encoder.buffers())  # of batch norms
        self.optimizer = optimizer
        self.made_by = {"config": values_of(cfg, MAKES_WEIGHTS), "images": cfg.images_digest}
        state = resume(cfg.out / "last.pt", self.made_by, **self.encoder, optimizer=optimizer)
        self.first_epoch = state["epoch"]
        self.seconds_before = state.get("seconds", 0.0)
        if self.first_epoch == cfg.epochs:
            say("already trained")
        elif self.first_epoch:
            say(f"resuming after epoch {self.first_epoch}")
            processes = state.get("processes", world_size())
            if processes != world_size() and train.device.type == "cpu":
                say(f"warning: processes that began this run: {processes}; on CPUs each has its "
                    "own batch norm")
        elif cfg.save_every:
            save(cfg.out / "epoch0000.pt", {**self.made_by, "epoch": 0}, **self.encoder)
        self.started = self.said = time.perf_counter()

    def log(self, step, loss, lr, z1):
        """After `step` steps; loss and z1 [m / ranks, d] are this rank's."""
        cfg = self.cfg
        epoch = step / self.per_epoch
        steps_here = step - self.first_epoch * self.per_epoch
        epoch_ends = step % self.per_epoch == 0
        if not (epoch_ends or step % 10 == 0 or steps_here == 1):
            return
        loss = gather_rows(loss[None], world_size()).mean().item()  # one row a rank
        require(math.isfinite(loss), f"the loss is {loss} at step {step}: lower --lr")
        now = time.perf_counter()
        seconds = now - self.started
        # How far the projections differ, from 0 (collapse) to 1: the variance of unit vectors.
        spread = F.normalize(z1.float(), dim=1).var(0, correction=0).sum().item()
        line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "spread": spread,
                "images_per_second": steps_here * cfg.batch_size / seconds,
                "seconds": self.seconds_before + seconds}
        floor = ""
        if cfg.loss == "balanced" and cfg.similarity == "cosine":
            line["above_floor"] = loss - loss_floor(cfg.batch_size, cfg.alpha, cfg.lam)
            floor = f" (floor +{line['above_floor']:.3f})"
        if rank() == 0:
            with open(cfg.out / "log.jsonl", "a") as log:  # an unfinished epoch is logged again
                log.write(json.dumps(line) + "\n")
        if epoch_ends or steps_here == 1 or now > self.said + 10:
            self.said = now
            left = (cfg.epochs * self.per_epoch - step) * seconds / steps_here
            say(f"epoch {epoch:.1f}/{cfg.epochs}  loss {loss:.3f}{floor}  lr {lr:.3g}  "
                f"{line['images_per_second']:.0f} images/s  {timedelta(seconds=round(left))} left")

    def save(self, epoch):
        """last.pt to resume from; every --save-every epochs a file that stays (Fig. 6)."""
        if world_size() > 1:  # without SyncBatchNorm the ranks' differ: all take those of rank 0
            for statistic in self.statistics:
                dist.broadcast(statistic, 0)
        state = {**self.made_by, "epoch": epoch, "processes": world_size(),
                 "seconds": self.seconds_before + time.perf_counter() - self.started}
        if self.cfg.save_every and epoch % self.cfg.save_every == 0:
            save(self.cfg.out / f"epoch{epoch:04}.pt", state, **self.encoder)
        save(self.cfg.out / "last.pt", state, **self.encoder, optimizer=self.optimizer)


def classifier_epochs(cfg, backbone_digest, **parts):
    """Yields the epochs that the classifier on crops still needs; saves its parts after each."""
    path = cfg.out / "classifier.pt"
    made_by = {"settings": values_of(cfg, DEPENDS["linear"]), "backbone": backbone_digest,
               "images": cfg.images_digest}
    for epoch in range(resume(path, made_by, **parts)["epoch"], cfg.probe_epochs):
        yield epoch
        save(path, {**made_by, "epoch": epoch + 1}, **parts)


def save(path, state, **parts):
    """Save `state`, and each part's state_dict under its name."""
    state = state | {name: part.state_dict() for name, part in parts.items()}
    save_file(path, lambda file: torch.save(state, file))


def resume(path, made_by, **parts):
    """Load the parts from the checkpoint `path` if all of made_by is in it. Returns what it holds,
    or {"epoch": 0}."""
    state = from_rank_0(lambda: load_file(path) if path.exists() else {})
    if any(state.get(key) != value for key, value in made_by.items()):
        return {"epoch": 0}
    load_parts(path, state, **parts)
    return state


def load_parts(path, state, **parts):
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[-1].strip()
            refuse(f"{path} does not fit this network ({reason}); --init takes what does")


def check_same_run(cfg, images=None):
    """Refuse to go on with weights that other settings or other images made. Until the first epoch
    is saved, anything may change."""
    path = cfg.out / "last.pt"
    if rank() > 0 or cfg.checkpoint or not path.exists():
        return
    before = load_file(path)
    fresh = f"choose another --out; --init {path} starts from its weights"
    old, new = before.get("config", {}), values_of(cfg, MAKES_WEIGHTS)
    for key in new | old:
        if old.get(key) != new.get(key):
            refuse(f"--out {cfg.out} holds a run with {key} {old.get(key)}, not {new.get(key)}: "
                   f"{fresh}")
    if images and before["images"] != images:
        refuse(f"--out {cfg.out} holds a run on other images or labels: {fresh}")


def start_log(cfg, train, test):
    """Say what is about to happen. A line of log.jsonl holds settings, versions and hardware."""
    say(f"{cfg.dataset}, {len(train)} training and {len(test) if test else 'no'} test images; "
        f"{cfg.backbone} on {train.device}, {cfg.precision}, processes: {world_size()}")
    if cfg.trains:
        say(f"{cfg.loss} loss, alpha {cfg.alpha:g}, lambda {cfg.lam:g}; {cfg.epochs} epochs, batch "
            f"{cfg.batch_size}, lr {cfg.lr:g}, seed {cfg.seed} -> {cfg.out}")
    if rank() > 0:
        return
    cfg.out.mkdir(parents=True, exist_ok=True)
    git = subprocess.run("git describe --always --abbrev=40 --dirty", shell=True, text=True,
                         cwd=Path(__file__).resolve().parent, capture_output=True).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    line = {"config": values_of(cfg, MAKES_WEIGHTS), "images": cfg.images_digest, "argv": sys.argv,
            "git": git, "processes": world_size(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "hardware": gpus or f"{os.cpu_count()} CPU cores"}
    with open(cfg.out / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


# ----------------------------------------- processes --------------------------------------
class UserError(Exception):
    """What the user can correct: printed as one sentence, exit code 2."""


def refuse(sentence):
    raise UserError(sentence)


def require(condition, sentence):
    if not condition:
        refuse(sentence)


def rng(*key):
    """A CPU generator that is a pure function of its key, so no generator state is ever saved."""
    number = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(number, "little"))


def to_device(x, device):
    """x on the device. Asynchronous: the host does not wait for a GPU that is busy."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def start_processes():
    """The device of this process, which joins the others if torchrun started it."""
    by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    others = "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"
    several = "RANK" in os.environ or any(int(os.environ.get(name, 1)) > 1 for name in others)
    require(by_torchrun or not several,
            "without torchrun --nproc_per_node several processes would all do the same work")
    device, local = torch.device("cpu"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        require(gpus >= local, f"torchrun started {local} processes, but there are {gpus} GPUs")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if by_torchrun:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))  # rank 0 may have to download first
    return device


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def from_rank_0(decide):
    """What decide() returns on rank 0, on every rank."""
    answer = [decide() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def rank_share(n):
    """This rank's rows of n. Two ranks share 5 rows as 0 2 4 and 1 3. A rank left without rows
    repeats the first one, since batches must not be empty; gather_rows drops the result."""
    return slice(rank(), n, world_size()) if rank() < n else slice(1)


def gather_rows(x, n):
    """The ranks' shares of n rows -> all n rows in their order, on every rank. No gradient."""
    if world_size() == 1:
        return x
    padded = x.new_zeros(math.ceil(n / world_size()), *x.shape[1:])
    padded[:len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def distribute(encoder, device):
    """The module whose forward pass trains `encoder`; `encoder` still holds the parameters."""
    if world_size() == 1:
        return encoder
    if device.type == "cuda":  # nn.SyncBatchNorm refuses CPUs
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    return nn.parallel.DistributedDataParallel(encoder)


class LARS(torch.optim.SGD):
    """SGD whose gradient of a weight matrix is scaled to 0.001 of that matrix's norm (You et al.,
    2017). Biases and other 1-d parameters are not scaled. No weight decay, as in SimSiam."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() > 1:
                    p.grad.mul_(0.001 * p.norm() / p.grad.norm().clamp(min=1e-12))
        super().step()


def say(text):
    if rank() == 0:
        print(f"balcon: {text}", flush=True)


def progress(stage, items, total):
    """Yields the items; says which share is done and the time left, after 3 s, then every 10 s."""
    started = time.perf_counter()
    due = started + 3
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now > due and done < total:
            due = now + 10
            left = (now - started) / done * (total - done)
            say(f"{stage} {100 * done / total:.0f} %, {timedelta(seconds=round(left))} left")


# ----------------------------------------- files ------------------------------------------
def digest(content):
    """A fingerprint of a module's weights, or of a list of tensors and arrays of names."""
    if isinstance(content, nn.Module):
        content = [weight.cpu() for weight in content.state_dict().values()]
    state = hashlib.blake2b(digest_size=16)
    for part in content:
        state.update(np.asarray(part).tobytes())
    return state.hexdigest()


def save_file(path, write):
    """Rank 0 saves what write(file) writes. A kill at any moment leaves the old file or the new."""
    if rank() > 0:
        return
    content = io.BytesIO()  # torch.save into a file of a full disk raises a RuntimeError
    write(content)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        refuse(f"cannot write {path}: {error.strerror}")


def load_file(path):
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))  # runs no code in it
    except Exception as error:  # a damaged or foreign file makes the unpickler raise anything
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        refuse(f"cannot read {path} as a checkpoint: {reason}")


def load_backbone(path, backbone):
    """Load what fits of the ResNet in a file: balcon's, torchvision's, or one with its names after
    a prefix, as of DistributedDataParallel, MoCo or lightly."""
    given = load_file(path)
    for key in ("state_dict", "model", "backbone"):
        given = given[key] if isinstance(given.get(key), dict) else given
    # Names are like "module.encoder_q.layer1.0.conv1.weight", or "backbone.4.0.conv1.weight", of
    # nn.Sequential(*resnet.children()), with numbers in place of names. The first block's first
    # convolution tells the prefix of all.
    first_block = re.compile(r"(.*\.|)(layer1|4)\.0\.conv1\.weight")
    found = filter(None, (first_block.fullmatch(str(key)) for key in given))
    prefix = next((match[1] for match in found), "")
    names = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    own, fits = backbone.state_dict(), {}
    for key, weight in given.items():
        first, _, rest = str(key).removeprefix(prefix).partition(".")
        name = f"{names.get(first, first)}.{rest}"
        if str(key).startswith(prefix) and name in own and own[name].shape == weight.shape:
            fits[name] = weight
    require(len(fits) >= len(own) / 2, f"--init {path}: most of its weights do not fit")
    backbone.load_state_dict(fits, strict=False)
    misfits = ", ".join(sorted(own.keys() - fits.keys()))
    say(f"backbone from {path}; not in it or of another shape: {misfits or 'nothing'}")


def export(path, features, parts):
    """FILE.npz: features of the backbone, labels, names (of files) and names of the classes."""
    arrays = {"classes": np.array(parts[0].classes)}
    for name, data in zip(("train", "test"), parts):
        arrays[f"{name}_features"] = features(data).cpu().numpy()
        arrays[f"{name}_labels"] = data.labels.numpy()
        arrays[f"{name}_files"] = data.names
    save_file(Path(path), lambda file: np.savez(file, **arrays))
    say(f"{path} holds the features of {' + '.join(str(len(data)) for data in parts)} images")


# ----------------------------------------- photographs ------------------------------------
with contextlib.suppress(ImportError):  # photographs of iPhones
    from pillow_heif import register_heif_opener
    register_heif_opener()
Image.MAX_IMAGE_PIXELS = None  # photographs of any size
# In memory all images get the square of the largest one. So a panorama that is longer than this
# multiple of its shorter side loses its ends.
LONGEST = 3
ENDINGS = set(".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .avif .heic .heif .jp2 .tga "
              ".ppm .pgm .pbm".split())
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val",
          "validation": "val", "test": "test", "testing": "test"}


def find_photographs(cfg):
    """[training, test ImageFiles if there are any]. A folder with a name of SPLITS holds a split,
    and the folders in it are classes. Without splits the folders of cfg.data are classes."""
    splits = {"train": [], "val": [], "test": [], "": []}  # names of files
    for name in list_images(cfg.data):
        splits[SPLITS.get(name.split("/")[0].lower(), "")].append(name)
    beside = splits.pop("")
    depth = int(any(splits.values()) or cfg.dataset != "folder")  # of the class folders
    if depth == 0:
        splits["train"], beside = beside, []
    require(splits["train"], f"there is no image in {cfg.data / 'train' if depth else cfg.data}: "
            "--data names a folder of images, or one that holds train/<class>/ and val/<class>/")
    if beside:
        has_classes = any(name.count("/") > 1 for name in sum(splits.values(), []))
        require(has_classes or not any("/" in name for name in beside),
                f"{cfg.data}: is every folder a class? Then rename the one that is called like a "
                f"split; {beside[0]} lies beside it")
        say(f"left out: {len(beside)} images beside the splits: {beside[0]}")
    train = find_classes(splits["train"], depth, cfg)
    for split in ("val", "test"):
        if splits[split]:
            test = find_classes(splits[split], depth, cfg)
            odd = sorted({*train.classes} ^ {*test.classes})
            if not odd:
                return [train, test]
            if test.classes:
                refuse(f"the class {odd[0]} is not in both train and {split} of {cfg.data}")
            say(f"{split} has no folders of the same classes, so it is not used")
    held_out = place_within_class(train.labels, "held out") % 10 == 1  # none of a single image
    if not train.classes or not held_out.any():
        return [train]
    say(f"no test images: a fixed tenth of each class is held out ({held_out.sum()} images)")
    return [train.select(~held_out), train.select(held_out)]


def find_classes(names, depth, cfg):
    """ImageFiles, whose classes are the folders at this depth. Without them all labels are −1."""
    loose = [name for name in names if name.count("/") == depth]
    if depth and 0 < len(loose) < len(names):
        say(f"left out: {len(loose)} images beside class folders: {loose[0]}")
        names = [name for name in names if name.count("/") > depth]
        loose = []
    classes, labels = np.unique([name.split("/")[depth] for name in names], return_inverse=True)
    if loose:
        say(f"no labels: {loose[0]} lies in no class folder")
    if loose or len(classes) < 2:
        classes, labels = classes[:0], np.full(len(names), -1)
    else:
        shown = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
        folder = cfg.data.joinpath(*names[0].split("/")[:depth])
        say(f"{folder}: {len(names)} images of {len(classes)} classes: {shown}")
    return ImageFiles(torch.tensor(labels), np.array(names), classes.tolist(), cfg)


def list_images(root):
    """Names, with slashes, of the images below root. Each directory is visited once, also through
    links; hidden ones and run directories are left out."""
    readable = ENDINGS & Image.registered_extensions().keys()
    names, visited, left_out = [], set(), Counter()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in visited or "log.jsonl" in files:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in files:
            end = os.path.splitext(name)[1].lower()
            if name[0] != "." and end in readable:
                names.append(Path(place, name).relative_to(root).as_posix())
            elif name[0] != ".":
                left_out[end or "no ending"] += 1
    if left_out:
        ends = ", ".join(f"{count} {end}" for end, count in left_out.most_common(5))
        heic = "; pip install pillow-heif to read HEIC" if left_out[".heic"] else ""
        say(f"left out of {root}, by ending: {ends}{heic}")
    return sorted(names)


def read_image(file, side=10 ** 6):
    """An upright RGB image. Transparency becomes white. A JPEG file whose shorter side is several
    times `side` is decoded directly to a half, a quarter or an eighth, but to no less than `side`.

    Greys of more than 8 bits are refused: which value is white is not in the file.
    """
    try:
        with Image.open(file) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise ValueError(f"{image.mode}: more than 8 bits per channel; convert it to 8")
            image.draft("RGB", (side, side))
            image.load()  # a damaged file raises here, not below, where odd EXIF may
            with contextlib.suppress(Exception):  # odd EXIF must not reject a photograph
                image.getexif()
                image.info.pop("exif", None)  # else it is written anew, which may fail
                image = ImageOps.exif_transpose(image)
            if image.mode[-1] in "Aa" or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for corrupt files
        refuse(f"cannot read {file} ({type(error).__name__}: {error})")


def read_into_memory(files, size, side=10 ** 6):
    """Images of about side² pixels at most, or as large as they are. Threads read each file once.
    Unreadable files are left out, unless they are more than a tenth."""
    limit = math.inf  # in bytes: each rank will hold all images, this one twice for a moment
    if hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 3
        limit /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def read(name):
        """Pixels [3, height, width], or why there are none."""
        try:
            image = read_image(os.path.join(files.cfg.data, name), side)
        except UserError as error:
            return str(error)
        middle = [min(length, LONGEST * min(image.size)) for length in image.size]
        factor = min(1, side / math.sqrt(math.prod(middle)))
        shape = [round(factor * length) for length in middle]
        if len(files) * 3 * max(shape) ** 2 > limit:
            refuse(f"{len(files)} images of {max(shape)}×{max(shape)} pixels do not fit into "
                   "memory: --dataset imagenet reads them from disk, in every epoch")
        return pil_to_tensor(ImageOps.fit(image, shape, Image.Resampling.BILINEAR))

    with ThreadPoolExecutor() as threads:  # Pillow decodes without Python's lock
        results = threads.map(read, files.names)
        results = list(progress("reading images", results, len(files)))
    unreadable = [result for result in results if isinstance(result, str)]
    if len(unreadable) > max(1, len(files) / 10) or len(unreadable) == len(files):
        refuse(f"{len(unreadable)} of {len(files)} images are unreadable: {unreadable[0]}")
    if unreadable:
        say(f"left out, {len(unreadable)} of {len(files)} images: {'; '.join(unreadable)}")
    kept = files.select(torch.tensor([not isinstance(result, str) for result in results]))
    images = [result for result in results if not isinstance(result, str)]
    shapes = torch.tensor([image.shape[1:] for image in images])
    longest = int(shapes.max())
    pixels = torch.zeros(len(images), 3, longest, longest, dtype=torch.uint8)
    for square, image in zip(pixels, images):
        square[:, :image.shape[1], :image.shape[2]] = image
    return Images(pixels, shapes, kept.labels, kept.names, kept.classes, size)


class ImageFiles(Images):
    """Images that stay on disk: threads decode, crop and resize them, two batches ahead."""

    def __init__(self, labels, names, classes, cfg):
        super().__init__(None, None, labels, names, classes, cfg.size)
        self.cfg = cfg

    def read(self, requests, views):
        ahead = deque()
        with ThreadPoolExecutor(max(1, self.cfg.workers)) as threads, ThreadPoolExecutor(2) as jobs:
            for request in requests:
                ahead.append(jobs.submit(self.read_batch, threads, views, *request))
                if len(ahead) > 2:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def read_batch(self, threads, views, step, rows, t):
        """step, x uint8 [n·b, 3, size, size], t for a request (step, rows [b], t)."""
        def crop(image, box):  # Pillow's bilinear is antialiased
            return pil_to_tensor(resized_crop(image, *box, [self.size, self.size]))

        paths = [os.path.join(self.cfg.data, name) for name in self.names[rows.numpy()]]
        images = list(threads.map(read_image, paths))
        images *= len(t.places) // len(rows)  # n views of each: first the first view of all
        shapes = torch.tensor([[image.height, image.width] for image in images])
        boxes = central_boxes(shapes)
        if views:
            boxes = random_crop_boxes(t, shapes, views.crop_scale)
        return step, torch.stack(list(threads.map(crop, images, boxes.tolist()))), t


# ----------------------------------------- data sets --------------------------------------
def load_data(cfg, device):
    """[training images, test images or None] of cfg.dataset in cfg.data. Rank 0 reads them."""
    splits = from_rank_0(lambda: read_data(cfg))
    for data in splits:
        data.to(device)
        if world_size() > 1 and not isinstance(data, ImageFiles):
            if rank() > 0:
                sides = len(data), 3, data.shapes.max(), data.shapes.max()
                data.pixels = torch.empty(sides, dtype=torch.uint8, device=device)
            data.pixels = data.pixels.contiguous()  # CIFAR's are not; memory is sent as it lies
            dist.broadcast(data.pixels, 0)
    return [*splits, None][:2]


def read_data(cfg):
    """[training, test Images if there are any]."""
    if cfg.dataset == "patterns":
        splits = [draw_patterns(4096, "train"), draw_patterns(2000, "test")]
    elif cfg.dataset in ("imagenet", "folder") or (cfg.data / "train").is_dir():
        splits = find_photographs(cfg)
    else:
        splits = read_torchvision(cfg.dataset, cfg.data)
    if cfg.limit or cfg.subset != "full":
        splits[0] = splits[0].select(training_subset(cfg, splits[0].names, splits[0].labels))
    if cfg.dataset == "imagenet" or not isinstance(splits[0], ImageFiles):
        return splits
    if cfg.dataset == "folder":  # so large that no crop is enlarged, be it random or central
        side = cfg.size * math.sqrt(max(1 / (0.75 * cfg.crop_scale[0]), LONGEST / 0.875 ** 2))
        return [read_into_memory(files, cfg.size, math.ceil(side)) for files in splits]
    splits = [read_into_memory(files, None) for files in splits]
    if any((data.shapes != splits[0].pixels.shape[-1]).any() for data in splits):
        refuse(f"the images in {cfg.data} are not squares of one size: --dataset folder takes any")
    return splits


def read_torchvision(dataset, root):
    """CIFAR-10, CIFAR-100 or STL-10 in torchvision's layout, downloaded if they are not there."""
    kind = getattr(torchvision.datasets, dataset.upper())
    names = ["train+unlabeled", "test"] if dataset == "stl10" else [True, False]
    try:
        parts = [kind(root, name, download=True) for name in names]
    except (OSError, RuntimeError) as error:
        refuse(f"{dataset} is not in {root} and cannot be downloaded ({error}): put torchvision's "
               f"files or class folders train/ and test/ there")
    if dataset == "stl10":
        return [in_memory(part.data, part.labels, part.classes) for part in parts]
    return [in_memory(part.data.transpose(0, 3, 1, 2), part.targets, part.classes)
            for part in parts]


def in_memory(pixels, labels, classes):
    """Images of equal size, pixels [N, 3, S, S], named by their numbers."""
    shapes = torch.tensor(pixels.shape[2:]).expand(len(pixels), 2)
    names = np.arange(len(pixels)).astype(str)
    return Images(torch.as_tensor(pixels), shapes, torch.as_tensor(labels).long(), names, classes)


def place_within_class(labels, *key):
    """[N]: 0 for the first image of its class in a random order, 1 for the second, and so on."""
    place = torch.empty_like(labels)
    shuffled = torch.randperm(len(labels), generator=rng(*key))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.unique(return_counts=True)[1].tolist()
    place[by_class] = torch.cat([torch.arange(count) for count in counts])
    return place


def balanced_subset(labels, n, *key):
    """Rows of n images, as equal in number per class as possible: a function of labels and key."""
    require(n <= len(labels), f"{n} images are more than the {len(labels)} that there are")
    return place_within_class(labels, *key).argsort(stable=True)[:n].sort().values


def training_subset(cfg, names, labels):
    """Rows that --subset and --limit keep (A.3.4)."""
    if cfg.subset == "full":
        return balanced_subset(labels, cfg.limit, "limit")  # the same images for every seed
    if cfg.subset not in ("lt", "uni"):
        return listed_rows(cfg.subset, names)
    rows = (labels >= 0).nonzero().squeeze(1)
    require(len(rows), f"--subset {cfg.subset} needs labels")
    labels = labels[rows]
    sizes = labels.bincount()
    total = cfg.limit or round(len(rows) * 115_846 / 1_281_167)  # ImageNet-LT's share
    if cfg.subset == "uni":
        return rows[balanced_subset(labels, total, "subset", cfg.seed)]
    counts = torch.zeros_like(sizes)
    generator = rng("subset", cfg.seed)
    for count in long_tailed_counts(len(sizes), total, min(1280, int(sizes.max()))):
        free = ((sizes >= count) & (counts == 0)).nonzero().squeeze(1)  # large enough, unused
        require(len(free), f"no class is left that has {count} images: lower --limit")
        counts[free[torch.randint(len(free), [], generator=generator)]] = count
    return rows[place_within_class(labels, "subset", cfg.seed) < counts[labels]]


def listed_rows(path, names):
    """Rows of the images in a list such as ImageNet-LT's: the first word of each line ends in
    class/file."""
    def key(name):
        return tuple(name.split("/")[-2:])

    try:
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError as error:
        refuse(f"--subset {path} is neither full, lt, uni nor a list of files ({error.strerror})")
    listed = {key(line.split()[0]): line for line in lines if line.strip()}
    there = Counter(map(key, names))
    for wanted, line in listed.items():
        if there[wanted] != 1:
            refuse(f"--subset {path}: the line {line[:80]!r} names {there[wanted]} training "
                   "images, not one, by the folder and name of a file")
    require(listed, f"--subset {path} lists no file")
    return torch.tensor([row for row, name in enumerate(names) if key(name) in listed])


def long_tailed_counts(classes, total, largest=1280, smallest=5, shape=6):
    """ImageNet-LT's class sizes (A.3.4), the largest first: `smallest` plus quantiles of a Pareto
    law (Lomax, from 0), scaled and clipped at `largest` so that the sum is `total`."""
    require(smallest * classes <= total <= largest * classes,
            f"{classes} classes of {smallest} to {largest} images cannot have {total}: --limit")
    tail = ((np.arange(classes) + 0.5) / classes) ** (-1 / shape) - 1
    low, high = 0.0, largest / tail.min()
    for _ in range(100):  # bisection for the scale at which the sizes sum to `total`
        scale = (low + high) / 2
        sizes = np.minimum(smallest + scale * tail, largest)
        low, high = (scale, high) if sizes.sum() < total else (low, scale)
    return np.diff(sizes.cumsum().round().astype(int), prepend=0).tolist()  # integers, same sum


PATTERNS = {  # kinds of pattern, by two coordinates u, v and a distance r
    "stripes": lambda u, v, r: u.sin(),
    "checks": lambda u, v, r: u.sin() * v.sin(),
    "dots": lambda u, v, r: u.cos() + v.cos() - 0.8,
    "rings": lambda u, v, r: r.sin(),
    "zigzag": lambda u, v, r: (u + 2 * (v / 2).sin().asin()).sin(),
    "grid": lambda u, v, r: torch.maximum(u.cos(), v.cos()) - 0.6,
    "triangles": lambda u, v, r: (u / 5) % 2 - 2 * ((v / 5) % 2 - 1).abs(),
    "spokes": lambda u, v, r: (6 * torch.atan2(u, v)).sin(),
}


def draw_patterns(n, split):
    """n synthetic images of eight kinds of pattern, 32×32.

    All palettes are nearly the same grey: two views of an image share its palette, so with free
    colours the network would tell images apart by colour and never learn the patterns.
    """
    generator = rng("patterns", split)

    def random(low, high):
        return torch.empty(n, 1, 1).uniform_(low, high, generator=generator)

    axis = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = random(0, 2 * math.pi)
    frequency = random(6, 13)
    u = frequency * (x * angle.cos() + y * angle.sin()) + random(0, 2 * math.pi)
    v = frequency * (y * angle.cos() - x * angle.sin()) + random(0, 2 * math.pi)
    r = frequency * torch.hypot(x - random(-0.5, 0.5), y - random(-0.5, 0.5))
    labels = torch.arange(n) % len(PATTERNS)
    drawn = torch.stack([pattern(u, v, r) for pattern in PATTERNS.values()], 1)  # [n, 8, 32, 32]
    contrast = random(0.25, 0.35) * random(-1, 1).sign()
    pixels = random(0.45, 0.55) + contrast * torch.tanh(4 * drawn[torch.arange(n), labels])
    pixels = pixels[:, None] + 0.01 * torch.randn(n, 3, 1, 1, generator=generator)  # the palette
    pixels = pixels + 0.05 * torch.randn(n, 3, 32, 32, generator=generator)  # noise
    return in_memory((255 * pixels.clamp(0, 1)).byte(), labels, list(PATTERNS))


# ----------------------------------------- pictures ---------------------------------------
def tiles_of(data, rows, views=None, n=1):
    """[rows, n, 3, 64, 64] in [0, 1]: n views of these images, or the plain images."""
    _, x = next(data.batches([(0, rows)], views, n, ("picture",)))
    mean, std = torch.tensor([MEAN, STD], device=x.device)[..., None, None]
    x = F.interpolate(x * std + mean, (64, 64), mode="bilinear", antialias=True)
    return gather_rows(x.unflatten(0, (n, -1)).transpose(0, 1).contiguous(), len(rows)).cpu()


def save_picture(path, tiles):
    """tiles [R, columns, 3, H, W] in [0, 1]."""
    grid = {"nrow": tiles.shape[1], "pad_value": 1, "format": "png"}
    save_file(path, lambda file: torchvision.utils.save_image(tiles.flatten(0, 1), file, **grid))


def draw_views(data, cfg):
    """views.png: up to 12 images, each beside two of its views, which the network is to match."""
    rows = balanced_subset(data.labels, min(12, len(data)), "picture")
    tiles = torch.cat([tiles_of(data, rows), tiles_of(data, rows, cfg.views, 2)], 1)
    save_picture(cfg.out / "views.png", tiles)


def find_neighbors(backbone, extracted, gallery, test, cfg):
    """For 8 test images, or training images if there are none, the rows of their 8 nearest
    training images. Searches all if `extracted` {images: features} has theirs, else 5,000."""
    asked = test or gallery
    queries = balanced_subset(asked.labels, min(8, len(asked)), "picture")
    if gallery in extracted:
        searched = torch.arange(len(gallery))
        features = extracted[gallery]
    else:
        searched = balanced_subset(gallery.labels, min(5000, len(gallery)), "neighbors")
        features = extract(backbone, gallery.select(searched), cfg)
    query_features = extract(backbone, asked.select(queries), cfg)
    near = searched[nearest(features, query_features, min(9, len(searched))).cpu()]  # [q, 9]
    found = []
    for query, candidates in zip(queries.tolist(), near.tolist()):
        found.append([row for row in candidates if test or row != query][:8])
    return {"queries": queries.tolist(), "rows": found}


def draw_neighbors(gallery, test, results, cfg):
    """neighbors.png: each query beside its neighbours, by the untrained backbone (if measured) in
    the upper row and by the trained one below. A green frame: the right class."""
    asked = test or gallery
    stages = [stage for stage in ("untrained", "trained") if stage in results]
    drawn = []  # of each stage [q, 9, 3, 72, 72]
    for stage in stages:
        queries = torch.tensor(results[stage]["neighbors"]["queries"])  # [q]
        rows = torch.tensor(results[stage]["neighbors"]["rows"])  # [q, 8]
        labels = gallery.labels[rows]
        right = (labels == asked.labels[queries, None]) & (labels >= 0)
        colour = torch.where(F.pad(right, [1, 0])[..., None], torch.tensor([0.1, 0.7, 0.2]), 1.0)
        tiles = colour[..., None, None].repeat(1, 1, 1, 72, 72)  # the frames
        tiles[:, :1, :, 4:-4, 4:-4] = tiles_of(asked, queries)
        tiles[:, 1:, :, 4:-4, 4:-4] = tiles_of(gallery, rows.flatten()).view(*rows.shape, 3, 64, 64)
        drawn.append(tiles)
    save_picture(cfg.out / "neighbors.png", torch.stack(drawn, 1).flatten(0, 1))
    if len(stages) == 2:
        say("neighbors.png: in each pair of rows the untrained network is above the trained one")


# ----------------------------------------- main -------------------------------------------
def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Greek letters prints "?"
            stream.reconfigure(errors="replace")
    user_errnos = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT,
                   errno.ENOTDIR, errno.ENAMETOOLONG)
    try:
        cfg = parse_flags(argv)
        check_settings(cfg)
        sys.exit(run(cfg))
    except KeyboardInterrupt:
        sentence = "stopped; the same command resumes"
    except (UserError, RuntimeError, MemoryError, OSError) as error:
        sentence = " ".join(str(error).split()) or "not enough memory"
        if world_size() > 1 and re.search("(closed|reset) by peer", sentence):
            sys.exit(2)  # another rank ended first, and has said why
        is_users = isinstance(error, (UserError, MemoryError)) or (
            getattr(error, "errno", None) in user_errnos)
        if not is_users and not re.search("out of memory|allocate memory", sentence):
            raise  # a bug
    # Before the ranks have joined, all meet the same error: one of them says it.
    if world_size() > 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        print("balcon:", sentence, file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
