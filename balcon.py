#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""balcon: balanced contrastive learning in one file.

Equation, table and section numbers refer to "Understanding Self-supervised Contrastive Learning
through Supervised Objectives" (TMLR 2025, arXiv 2510.10572), which this file reproduces.

    python balcon.py                                        # 2 minutes on a laptop, no download
    python balcon.py --dataset cifar10                      # one GPU: the paper's CIFAR-10 recipe
    torchrun --nproc_per_node=8 balcon.py --dataset imagenet --alpha 4 --lam 2      # eight GPUs

Measured (RESULTS.md; 2 CPU cores, no GPU so far): the first line in about 2 minutes, kNN error 27.5 % untrained,
4.5 % trained. On 5,000 CIFAR-10 images, 15 epochs, two seeds: linear 43.5 % by the balanced loss at (α, λ) = (2, 4),
40.1 % by NT-Xent at (2, 1), 36.7 % untrained; most of the difference is λ, not the loss. For λ ≥ 1
accuracy depends mostly on the product αλ: start from 8.

Letters, the paper's: m images give 2m views with projections z of d dimensions; α sharpens the
softmax over negatives (α = 1/τ, the inverse temperature), λ weighs repelling against attracting;
t ~ T is one augmentation out of the distribution of augmentations; f is the encoder.

Map, in the order of use:
    losses         Eq. 17, generalized NT-Xent, NSCL, the loss floor
    views          the augmentations, drawn and applied apart (A.3.1, A.4.1)
    data           images in memory or on disk, always read as a function of (seed, step)
    model          torchvision's ResNets and the projector
    distributed    what one process and N processes must share to be equal
    pretraining    SGD, checkpoints, resume
    evaluation     k nearest neighbours, linear probe
    theory         prototype bias, tightness of the bounds, assumptions, false negatives, the NSCL gap
    report         tables and figures over finished runs
    command line   the recipes, all defaults in one table
"""
import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

try:
    import fcntl
except ImportError:  # Windows: a run directory is not locked there
    fcntl = None


# ------------------------------------------ losses ---------------------------------------------
def balanced_contrastive_loss(z1, z2, alpha, lam, similarity="cosine", *, repel_positive=False,
                              labels=None, block=2 ** 22):
    """Balanced contrastive loss, Eq. 17: −s(z, z⁺) + λ (1/α) log Σ_{z⁻} exp(α s(z, z⁻)).

    z1, z2: [m, d], two views; row i of both shows the same image. Returns a scalar: the mean over
    all 2m anchors z. z⁺ is the other view of z's image; z⁻ are the 2(m−1) views of other images,
    so the positive is not in the log-sum-exp. It can be negative: `loss_floor` is its minimum.

    similarity: "cosine" (of l2-normalised rows), or of rows as they are "dot" or "euclidean", the
    negative squared distance (Table 1, footnote 3). Computed in float32 at least, also under autocast.

    Under torch.distributed the anchors are this rank's, the candidates are gathered from all ranks,
    and the gradient of a candidate is summed over ranks: the gradient that DDP averages is exactly
    the one of a single process with the whole batch. Every rank must bring the same m.

    The scale is the paper's: gradients are 1/α of those of the usual NT-Xent with temperature 1/α.
    A learning rate from the SimCLR literature must be multiplied by α to mean the same here.

    repel_positive=True puts z⁺ into the log-sum-exp too; labels [m] keep only the z⁻ of other
    classes: `generalized_nt_xent_loss` and `nscl_loss` are these two. block: no more than so many of the
    2m × 2M similarities are held at a time (16 MB, which allocators reuse); where they are more, they are made
    again in the backward pass, which torch.func's transforms refuse.
    """
    if z1.shape != z2.shape or z1.dim() != 2:
        raise ValueError(f"z1 and z2 must both be [m, d], not {[*z1.shape]} and {[*z2.shape]}")
    if similarity not in ("cosine", "dot", "euclidean"):
        raise ValueError(f"similarity must be cosine, dot or euclidean, not {similarity!r}")
    if not (0 < alpha < math.inf and 0 <= lam < math.inf):
        raise ValueError(f"alpha must be positive and lam not negative, both finite: got {alpha} and {lam}")
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    m = len(z1)
    if m * world < 2:
        raise ValueError("one image has no negatives: the batch must hold at least two")

    def gather(x):  # [n, ...] of each rank -> [world·n, ...]; the own rows keep their graph
        rows = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(rows, x.detach())
        return torch.cat([*rows[:rank], x, *rows[rank + 1:]])

    def sum_over_ranks(grad):  # each rank's anchors pull on all candidates; own rows alone lose that
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad

    with torch.autocast(z1.device.type, enabled=False):
        pair = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z1, z2)]
        if similarity == "cosine":
            pair = [F.normalize(x, dim=1) for x in pair]
        z = alpha ** 0.5 * torch.cat(pair)  # [2m, d] anchors; scaled, so that every similarity below is α s
        candidates = z if world == 1 else gather(z)  # [2M, d] with M = world·m
        if world > 1 and z.requires_grad:
            candidates.register_hook(sum_over_ranks)
        pair = z.view(2, m, -1)
        positive = torch.linalg.vecdot(*pair)  # [m]: an image's two views share it
        if similarity == "euclidean":
            positive = -(pair[0] - pair[1]).square().sum(1)

        # An anchor repels all candidates but those of its own group.
        view = torch.arange(2 * m * world, device=z.device)
        if labels is not None:
            group = labels.to(z.device).repeat(2)  # its class, so its image as well
            group = group if world == 1 else gather(group)
        elif repel_positive:
            group = view  # itself
        else:
            group = view // (2 * m) * m + view % m  # its image: itself and its positive

        def repelling(z, own):  # anchors [r, d], their groups [r] -> [r]
            s = z @ candidates.T  # [r, 2M]
            if similarity == "euclidean":  # −‖a − b‖² = 2a·b − ‖a‖² − ‖b‖²
                s = 2 * s - z.square().sum(1, keepdim=True) - candidates.square().sum(1)
            with torch.no_grad():  # in place: e^−∞ = 0 is their gradient as well, and no pass is spent on a copy
                s.masked_fill_(own[:, None] == group, -math.inf)
            return s.logsumexp(1)

        anchors = z, group[rank * 2 * m:(rank + 1) * 2 * m]
        rows = max(1, block // len(candidates))
        if rows >= 2 * m:
            repel = repelling(*anchors)
        else:
            repel = torch.cat([torch.utils.checkpoint.checkpoint(repelling, *part, use_reentrant=False,
                                                               preserve_rng_state=False)
                               for part in zip(*(x.split(rows) for x in anchors))])
        if labels is not None and repel.isneginf().any():
            raise ValueError("an image has no negatives: all others are of its class")
        return ((lam * repel - positive.repeat(2)) / alpha).mean()

def generalized_nt_xent_loss(z1, z2, alpha, lam, similarity="cosine"):
    """Generalized NT-Xent loss (Section 6): Eq. 17 with the positive also in the log-sum-exp.

    Arguments, mean, ranks and scale as in `balanced_contrastive_loss`. λ = 1 is SimCLR's NT-Xent
    (Eq. 15) with temperature τ = 1/α, divided by α.
    """
    return balanced_contrastive_loss(z1, z2, alpha, lam, similarity, repel_positive=True)

def nscl_loss(z1, z2, labels, alpha, lam, similarity="cosine"):
    """Negatives-only supervised loss (arXiv 2506.04411): Eq. 17, repelling other classes only.

    labels: [m] integers. Everything else as in `balanced_contrastive_loss`; an image without any
    image of another class in the batch is a ValueError.
    """
    return balanced_contrastive_loss(z1, z2, alpha, lam, similarity, labels=labels)

def loss_floor(m, alpha, lam, repel_positive=False):
    """A lower bound, mostly the minimum, of the loss of m ≥ 2 images under cosine similarity.

    Jensen bounds the log-sum-exp by the negatives' mean similarity, and Σ zᵢ·zⱼ ≥ 0 bounds that
    mean by −(1 + P)/K, where P is the mean positive similarity and K = 2(m−1). Balanced loss: it
    falls in P, so the floor is at P = 1, reached iff views coincide and the m images form a regular
    simplex (needs d ≥ m−1). With the positive repelled too, the best P can lie below 1 once λ > 1:
    that loss can prefer views that do not agree, which the balanced loss never does. There this is
    a bound, not shown to be reached.
    """
    K, P = 2 * (m - 1), best_positive_similarity(m, alpha, lam) if repel_positive else 1.0
    if not repel_positive:
        return -P + lam * (math.log(K) / alpha - (1 + P) / K)
    a, b = alpha * P, math.log(K) - alpha * (1 + P) / K  # log of the positive's and negatives' mass
    return -P + lam / alpha * (max(a, b) + math.log1p(math.exp(-abs(a - b))))

def best_positive_similarity(m, alpha, lam):
    """The mean positive similarity P at which NT-Xent's floor is lowest: more agreement raises it."""
    K = 2 * (m - 1)  # the derivative in P vanishes where e^{α(P + (1+P)/K)} = (K + λ)/(λ − 1)
    return min(1.0, (K / alpha * math.log((K + lam) / (lam - 1)) - 1) / (K + 1)) if lam > 1 else 1.0

LOSSES = {"balanced": balanced_contrastive_loss, "ntxent": generalized_nt_xent_loss}


# ------------------------------------------ views ----------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, also for CIFAR (A.4.1)
GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, as torchvision

class Views:
    """T, the distribution of augmentations: its parts, in their order of application.

    Drawing and applying are apart. So one t can be applied to two images (Eq. 51), and all ranks
    can draw the global batch's parameters and apply only their rows.
    """

    def __init__(self, parts, size, crop_scale):
        self.parts, self.size, self.crop_scale = parts, size, crop_scale

    def draw(self, n, generator, parts=None):
        """t₁ … tₙ ~ T: {part: [n, ...]} on the CPU. No pixel is touched, no image size is needed. parts: only these."""
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(n, *shape, generator=generator)

        def maybe(p, value, otherwise):  # `value` with probability p
            chosen = (uniform(0, 1) < p).view(n, *[1] * (value.dim() - 1))
            return torch.where(chosen, value, value.new_tensor(otherwise))

        draws = {
            # RandomResizedCrop: ten candidates (area, width/height, top, left), in fractions: [n, 10, 4]
            "crop": lambda: torch.stack([uniform(*self.crop_scale, 10),
                                         uniform(math.log(3 / 4), math.log(4 / 3), 10).exp(),
                                         uniform(0, 1, 10), uniform(0, 1, 10)], 2),
            "flip": lambda: uniform(0, 1) < 0.5,
            # factors of brightness, contrast, saturation, hue; and their order, −1 for none: [n, 2, 4]
            "color_jitter": lambda: torch.stack([
                torch.cat([uniform(0.6, 1.4, 3), uniform(-0.1, 0.1, 1)], 1),
                maybe(0.8, uniform(0, 1, 4).argsort(1), -1)], 1),
            "grayscale": lambda: uniform(0, 1) < 0.2,
            "gaussian_blur": lambda: maybe(0.5, uniform(0.1, 2.0), 0.0),  # σ in pixels
            # The paper names the next three without parameters: chosen here, see README.
            "random_cutout": lambda: maybe(0.5, uniform(0, 1, 2), -1.0),  # centre, in fractions
            "random_rotation": lambda: uniform(0, 4).long(),  # quarter turns
            "gaussian_noise": lambda: maybe(0.5, 0.1 * torch.randn(
                n, 3, self.size, self.size, generator=generator), 0.0),
        }
        return {part: draws[part]() for part in (self.parts if parts is None else parts)}

    def draw_batch(self, n, rows, mine, *key, parts=None):
        """n views of each of the rows, view by view, drawn for all and cut to `mine`: the same on 1 and N processes."""
        t = self.draw(n * len(rows), rng(*key), parts)
        return {part: value.unflatten(0, (n, len(rows)))[:, mine].flatten(0, 1) for part, value in t.items()}

    def apply(self, x, t):
        """x: [n, 3, H, W] uint8, t on the CPU -> t(x): [n, 3, size, size] float32, normalised."""
        x = x.float() / 255
        for part, value in t.items():
            if part == "crop":
                x = crop_resize(x, send(crop_box(value, *x.shape[-2:]), x.device), self.size)
            else:
                x = OPERATIONS[part](x, value)
        return normalize(x)

def send(x, device):
    """To the device, which is still at work on the last step: without waiting for it."""
    return x.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

def change(x, chosen, operation, *parameters):
    """x[i] = operation(x[i], parameters[i]) for the images i that are `chosen` [n]. They are found on the CPU, so
    that nothing waits for the device."""
    i = chosen.nonzero().squeeze(1)
    place = send(i, x.device)
    x[place] = operation(x[place], *(send(parameter[i], x.device) for parameter in parameters))
    return x

def normalize(x):
    mean, std = send(torch.tensor([MEAN, STD]), x.device)[..., None, None]
    return (x - mean) / std

def crop_box(t, height, width):
    """t: [n, 10, 4] -> [n, 4] (top, left, height, width), whole pixels: the first candidate that
    fits into the image, else the largest central crop of an allowed shape, as torchvision."""
    area, ratio, top, left = t.unbind(-1)
    h = (area * height * width / ratio).sqrt().round().clamp(min=1)
    w = (area * height * width * ratio).sqrt().round().clamp(min=1)
    box = torch.stack([(top * (height - h + 1)).floor().minimum(height - h),  # float32 rounds up
                       (left * (width - w + 1)).floor().minimum(width - w), h, w], -1)
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    central = box.new_tensor([(height - h) // 2, (width - w) // 2, h, w])
    box = torch.cat([box, central.expand(len(t), 1, 4)], 1)  # an eleventh, which always fits
    fits = (box[..., 2] <= height) & (box[..., 3] <= width)
    return box[torch.arange(len(t)), fits.int().argmax(1)].long()

def crop_resize(x, box, size):
    """x: [n, 3, H, W], box: [n, 4] -> [n, 3, size, size], antialiased bilinear.

    Along each axis a resize is linear, so two small matrices per image do crop and resize at once.
    """
    def weights(start, length, total):  # [n], [n] -> [n, size, total]
        start, scale = start[:, None, None], length[:, None, None] / size
        pixel = torch.arange(total, device=x.device) + 0.5
        centre = start + scale * (torch.arange(size, device=x.device)[:, None] + 0.5)
        w = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)  # widens when shrinking
        w = w * ((pixel > start) & (pixel < start + length[:, None, None]))  # blind beyond the crop
        return w / w.sum(-1, keepdim=True)

    (n, _, height, width), (top, left, h, w) = x.shape, box.unbind(1)
    x = x.flatten(1, 2) @ weights(left, w, width).mT  # [n, 3·H, size]
    return weights(top, h, height)[:, None] @ x.view(n, 3, height, size)

def gray(x):
    return sum(weight * x[..., i:i + 1, :, :] for i, weight in enumerate(GRAY))  # [..., 1, H, W]

def blend(x, other, factor):
    return (factor * x + (1 - factor) * other).clamp(0, 1)

def shift_hue(x, shift):
    """x: [..., 3, H, W]; shift in turns of the colour circle (HSV, as torchvision)."""
    r, g, b = x.unbind(-3)
    value, chroma = x.amax(-3), x.amax(-3) - x.amin(-3)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == r, (g - b) / safe,
                      torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))  # sixths
    k = (torch.arange(5, 0, -2, device=x.device)[:, None, None] + (hue.unsqueeze(-3) + 6 * shift)) % 6
    return value.unsqueeze(-3) - chroma.unsqueeze(-3) * torch.minimum(k, 4 - k).clamp(0, 1)

def color_jitter(x, t):
    adjust = (lambda x, f: blend(x, 0, f),  # brightness
              lambda x, f: blend(x, gray(x).mean((-2, -1), keepdim=True), f),  # contrast
              lambda x, f: blend(x, gray(x), f),  # saturation
              shift_hue)
    factor, order = t.unbind(1)  # [n, 4] each
    for turn in range(4):
        for kind in range(4):
            x = change(x, order[:, turn] == kind, adjust[kind], factor[:, kind, None, None, None])
    return x

def gaussian_blur(x, sigma, radius=11):
    """x: [n, 3, S, S], sigma: [n]. Kernel of 2·radius + 1 pixels, reflected borders: one matrix per
    image, used on both axes. 23 pixels are SimCLR's tenth of 224; σ ≤ 2 needs 13."""
    row = torch.arange(x.shape[-1], device=x.device)[:, None]
    col, last = row.T, x.shape[-1] - 1
    radius = min(radius, last)

    def kernel(distance):
        return torch.exp(-0.5 * (distance / sigma[:, None, None]) ** 2) * (distance.abs() <= radius)

    total = kernel(torch.arange(-radius, radius + 1, device=x.device)).sum(-1, keepdim=True)
    blur = (kernel(row - col) + kernel(row + col) * (col > 0)  # reflected at the first pixel
            + kernel(2 * last - row - col) * (col < last)) / total  # and at the last
    return blur[:, None] @ x @ blur[:, None].mT

def random_cutout(x, centre):
    """A square of half the side around `centre` [n, 2], cut at the border, becomes the mean colour."""
    size = x.shape[-1]
    inside = torch.arange(size, device=x.device) - (centre * size).floor()[..., None] + size // 4
    inside = (inside >= 0) & (inside < size // 2)  # [n, 2, S]
    hole = inside[:, None, 0, :, None] & inside[:, None, 1, None, :]
    return torch.where(hole, send(torch.tensor(MEAN), x.device)[:, None, None], x)

def random_rotation(x, quarter_turns):
    for turns in (1, 2, 3):
        x = change(x, quarter_turns == turns, lambda x: x.rot90(turns, (-2, -1)))
    return x

OPERATIONS = {  # images [n, 3, S, S] in [0, 1], which may be changed in place; parameters [n, ...], on the CPU
    "flip": lambda x, chosen: change(x, chosen, lambda x: x.flip(-1)),
    "color_jitter": color_jitter,
    "grayscale": lambda x, chosen: change(x, chosen, gray),
    "gaussian_blur": lambda x, sigma: change(x, sigma > 0, gaussian_blur, sigma),
    "random_cutout": lambda x, centre: change(x, centre[:, 0] >= 0, random_cutout, centre),
    "random_rotation": random_rotation,
    "gaussian_noise": lambda x, noise: (x + send(noise, x.device)).clamp(0, 1),
}
DROPPABLE = {"gaussian_blur": ("gaussian_blur",), "color_distortion": ("color_jitter", "grayscale")}
ADDABLE = ("random_cutout", "random_rotation", "gaussian_noise", "gaussian_blur")


# ------------------------------------------ data -----------------------------------------------
class UserError(Exception):
    """What a user can cause and mend: one sentence, exit code 2. All ranks of a machine see it, one says it."""

class ImageError(UserError):
    """One that only the rank with that image sees."""

class Damaged(UserError):
    """A file that is not what was written; another copy may be whole."""

class Stopped(Exception):
    """Stopped(text, number): a signal asked for an end, and the state is saved."""

def rng(*key):
    """A CPU generator that is a pure function of its key, so no generator state is ever saved."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

class InMemory:
    """Small images: uint8 pixels [N, 3, S, S] on the device, augmented there in batches."""

    def __init__(self, pixels, labels, classes, device):
        self.pixels, self.labels, self.classes, self.device = pixels.to(device), labels, classes, device

    def select(self, rows):
        return InMemory(self.pixels[rows.to(self.device)], self.labels[rows], self.classes, self.device)

    def batches(self, order, views=None, n=1, key=(), shared=False):
        """Yields (images [n·b, 3, S, S] normalised, labels [b]) for each (number, rows [b]) of `order`.

        n views of each image, view by view; views=None: the plain image. shared: only this rank's
        share of the rows. t is drawn for all of them from (key, number), whatever the world size.
        """
        for number, rows in order:
            mine = share(len(rows)) if shared else slice(None)
            x = self.pixels[send(rows[mine], self.device)]
            if views is None:
                x = normalize(x.float() / 255)
            else:
                x = views.apply(x.repeat(n, 1, 1, 1), views.draw_batch(n, rows, mine, *key, number))
            yield x.contiguous(memory_format=torch.channels_last), send(self.labels[rows[mine]], self.device)

class OnDisk(torch.utils.data.Dataset):
    """Large images in files: worker processes decode and crop, the device does the rest."""
    BY_WORKERS = ("crop", "gaussian_noise")  # needed there; of images' size

    def __init__(self, paths, labels, classes, device, size, workers):
        self.paths = np.array(paths)  # a million str objects would be copied into every worker, page by page
        self.labels, self.classes, self.device = labels, classes, device
        self.size, self.workers = size, workers

    def select(self, rows):
        return OnDisk(self.paths[rows], self.labels[rows], self.classes, self.device, self.size, self.workers)

    def batches(self, order, views=None, n=1, key=(), shared=False):
        """As InMemory.batches, but crops and noise are drawn by the workers, from (key, number, row)."""
        reader, (order, ahead) = copy.copy(self), itertools.tee(order)  # the workers run ahead
        reader.views, reader.n, reader.key = views, n, key
        rest = views and [part for part in views.parts if part not in self.BY_WORKERS]
        rows_of_rank = ([(number, row) for row in (rows[share(len(rows))] if shared else rows).tolist()]
                        for number, rows in ahead)
        loader = torch.utils.data.DataLoader(
            reader, batch_sampler=rows_of_rank, num_workers=self.workers, worker_init_fn=leave_process_group,
            pin_memory=self.device.type == "cuda")
        for (number, rows), (crops, t, labels) in zip(order, loader):  # [b, n, 3, S, S] uint8, {part: [b, n, ...]}, [b]
            x = send(crops, self.device).transpose(0, 1).flatten(0, 1)
            if views is None:
                x = normalize(x.float() / 255)
            else:
                t = {part: value.transpose(0, 1).flatten(0, 1) for part, value in t.items()}
                mine = share(len(rows)) if shared else slice(None)
                t.update(views.draw_batch(n, rows, mine, *key, number, parts=rest))
                x = views.apply(x, {part: t[part] for part in views.parts if part in t})
            yield x.contiguous(memory_format=torch.channels_last), send(labels, self.device)

    def __getitem__(self, number_and_row):  # one decode serves all n crops
        row = number_and_row[1]
        image, t = read_image(str(self.paths[row])), {}
        if self.views:
            mine = [part for part in self.views.parts if part in self.BY_WORKERS]
            t = self.views.draw(self.n, rng(*self.key, *number_and_row), mine)
            boxes = crop_box(t.pop("crop"), image.height, image.width).tolist()
        else:  # Resize(S / 0.875) and CenterCrop(S), in one resampling
            side = max(1, round(0.875 * min(image.size)))
            boxes = [(round((image.height - side) / 2), round((image.width - side) / 2), side, side)] * self.n
        crops = [image.crop((left, top, left + w, top + h)).resize((self.size, self.size), Image.Resampling.BILINEAR)
                 for top, left, h, w in boxes]  # antialiased
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), t, self.labels[row]

def leave_process_group(worker):
    """Ctrl-C and torchrun signal a whole group: decoding goes on while the main process saves and stops."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()

def read_image(path):
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("the scale of its floating-point pixels is not known")
            if image.mode.startswith("I"):  # 16 bits of grey, or 32: Pillow's conversion would cut at 255
                grey = np.asarray(image)
                grey = grey / 256 if image.mode != "I" or grey.max() > 255 else grey
                image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds on corrupt files
        raise ImageError(f"cannot read the image {path}: {error}") from None

def load_data(cfg, device):
    """[training images, test images] of cfg.dataset in cfg.data; the README shows the layouts.

    Label −1 marks an image without one (STL-10): pretraining uses it, evaluation does not.
    """
    root, on_disk = cfg.data, cfg.dataset in ("imagenet", "folder")
    if cfg.dataset == "patterns":
        parts = [(*draw_patterns(4096, "train"), list(PATTERNS)), (*draw_patterns(2000, "test"), list(PATTERNS))]
    elif on_disk or (root / "train").is_dir():
        parts = [class_folders(root, "train"), class_folders(root, "test" if (root / "test").is_dir() else "val")]
        if differ := set(parts[0][2]) ^ set(parts[1][2]):
            raise UserError(f"{root}: the class {min(differ)} is not among both the training and the test images")
    else:
        parts = torchvision_data(cfg.dataset, root)
    if cfg.limit or cfg.subset_file or cfg.subset != "full":
        images, labels, classes = parts[0]
        keep = training_subset(cfg, images, labels)
        parts[0] = [images[i] for i in keep] if isinstance(images, list) else images[keep], labels[keep], classes
    if on_disk:
        return [OnDisk(*part, device, cfg.size, cfg.workers) for part in parts]
    return [InMemory(decode_all(images, cfg.size) if isinstance(images, list) else images, labels, classes, device)
            for images, labels, classes in parts]

def training_subset(cfg, images, labels):
    """Rows of the training images that --subset, --subset-file and --limit keep (A.3.4), in their order."""
    if cfg.subset_file:
        return listed_rows(cfg.subset_file, images)
    if cfg.subset == "full":  # the same images whatever the seed
        return balanced_subset(labels, cfg.limit, "limit")
    sizes = labels[labels >= 0].bincount()
    total = cfg.limit or round(int(sizes.sum()) * 115_846 / 1_281_167)  # ImageNet-LT's share of ImageNet
    if cfg.subset == "uni":
        return balanced_subset(labels, total, "subset", cfg.seed)
    counts, generator = torch.zeros_like(sizes), rng("subset", cfg.seed)
    for count in long_tailed_counts(len(sizes), total, min(1280, int(sizes.max()))):  # the largest first
        able = ((sizes >= count) & (counts == 0)).nonzero().squeeze(1)
        if not len(able):
            raise UserError(f"no class is left that has {count} images: set a lower --limit than {total}")
        counts[able[torch.randint(len(able), [], generator=generator)]] = count
    return (turns(labels, generator) < counts[labels.clamp(min=0)]).nonzero().squeeze(1)

def long_tailed_counts(classes, total, largest=1280, smallest=5, shape=6):
    """ImageNet-LT's class sizes (A.3.4), the largest first: quantiles of a Pareto law (Lomax, from 0) above
    `smallest`, scaled and cut at `largest` so that they sum to `total`."""
    if not smallest * classes <= total <= largest * classes:
        raise UserError(f"{classes} classes of {smallest} to {largest} images cannot have {total} in all: see --limit")
    tail = ((np.arange(classes) + 0.5) / classes) ** (-1 / shape) - 1
    low, high = 0.0, largest / tail.min()
    for _ in range(100):  # bisection: the sum grows with the scale
        scale = (low + high) / 2
        sizes = np.minimum(smallest + scale * tail, largest)
        low, high = (scale, high) if sizes.sum() < total else (low, scale)
    return np.diff(sizes.cumsum().round().astype(int), prepend=0).tolist()  # integers with the same sum

def listed_rows(path, images):
    """The rows that a file lists, one a line: <class>/<file> of an image, after any folders and before
    any label (ImageNet-LT's own list); or, where images are not files, their numbers."""
    def name(place):
        return "/".join(str(place).split("/")[-2:])

    known = {name(image) if isinstance(images, list) else str(row): row for row, image in enumerate(images)}
    if len(known) < len(images):
        raise UserError("--subset-file needs images named by <class>/<file>, and here a name stands for several")
    try:
        lines = [name(line.strip()) for line in path.read_text().splitlines() if line.strip()]
        rows = [known[line if line in known else line.rsplit(None, 1)[0]] for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --subset-file {path}: {error}") from None
    except KeyError as error:
        raise UserError(f"--subset-file {path} names {error}, which is not among the training images") from None
    if not rows or len(set(rows)) < len(rows):
        raise UserError(f"--subset-file {path} " + ("names an image twice" if rows else "is empty"))
    return torch.tensor(rows).sort().values

def class_folders(root, split):
    """root/split/<class>/<image> -> (paths, labels [N], classes)."""
    if not (root / split).is_dir():
        raise UserError(f"{root / split} does not exist: put class folders into {root}/train and {root}/val (or "
                        f"test), or name another place with --data")
    try:
        found = torchvision.datasets.DatasetFolder(root / split, None, tuple(Image.registered_extensions()))
    except FileNotFoundError as error:  # no class, or one without an image
        raise UserError(f"{root / split}: {str(error).split('. Supported')[0]}") from None
    paths, labels = zip(*found.samples)
    return list(paths), torch.tensor(labels), found.classes

def decode_all(paths, size):
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for row, path in enumerate(paths):
        image = read_image(path)
        if image.size != (size, size):
            raise ImageError(f"{path} is {image.width}×{image.height}, the other images of this data set are "
                            f"{size}×{size}; --dataset folder takes any size")
        pixels[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels

def torchvision_data(dataset, root):
    """CIFAR-10, CIFAR-100 or STL-10 in torchvision's layout, downloaded if it is not there."""
    kind = getattr(torchvision.datasets, dataset.upper())
    splits, existed = ("train+unlabeled", "test") if dataset == "stl10" else (True, False), root.exists()
    try:
        if rank() > 0:  # rank 0 downloads, the others wait
            barrier()
        parts = [kind(root, split, download=rank() == 0) for split in splits]
        if rank() == 0:
            barrier()
    except (OSError, RuntimeError) as error:
        if root.is_dir() and not existed and not any(root.iterdir()):
            root.rmdir()  # torchvision made it
        raise UserError(f"{dataset} is not in {root} and cannot be downloaded ({error}): put torchvision's "
                        f"files, or class folders train/ and test/, there") from None
    if dataset == "stl10":
        return [(torch.from_numpy(p.data), torch.from_numpy(p.labels).long(), p.classes) for p in parts]
    return [(torch.from_numpy(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets), p.classes) for p in parts]

def balanced_subset(labels, n, *key):
    """Rows of n images, as equal in number per class as can be: a pure function of the key."""
    if n > len(labels):
        raise UserError(f"--limit {n} asks for more than the {len(labels)} training images")
    return turns(labels, rng(*key)).argsort(stable=True)[:n].sort().values

def turns(labels, generator):
    """Every class gives an image, then its second one, …: the turn of each image; ∞ without a label."""
    shuffled, counts = torch.randperm(len(labels), generator=generator), (labels + 1).bincount()
    order, turn = shuffled[labels[shuffled].argsort(stable=True)], torch.empty(len(labels))
    turn[order] = (torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)).float()
    return turn.masked_fill(labels < 0, math.inf)

PATTERNS = {  # by two coordinates u, v and a distance r, all in radians
    "stripes": lambda u, v, r: u.sin(),
    "checks": lambda u, v, r: u.sin() * v.sin(),
    "dots": lambda u, v, r: u.cos() + v.cos() - 0.8,
    "rings": lambda u, v, r: r.sin(),
    "zigzag": lambda u, v, r: (u + 1.3 * v.sin().asin()).sin(),
    "grid": lambda u, v, r: torch.maximum(u.cos(), v.cos()) - 0.6,
    "triangles": lambda u, v, r: (u / 5) % 2 - 2 * ((v / 5) % 2 - 1).abs(),
    "spokes": lambda u, v, r: (6 * torch.atan2(u, v)).sin(),
}

def draw_patterns(n, split):
    """n drawn images of eight kinds of pattern: uint8 [n, 3, 32, 32], labels [n].

    Orientation, frequency, phase, contrast, polarity and noise are random. All palettes are nearly
    the same grey: two views of an image share its palette, so with free colours the network would
    tell images apart by colour and never learn the patterns.
    """
    g = rng("patterns", split)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=g)

    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    angle, frequency = uniform(0, 2 * math.pi), uniform(6, 13)
    u = frequency * (x * angle.cos() + y * angle.sin()) + uniform(0, 2 * math.pi)
    v = frequency * (y * angle.cos() - x * angle.sin()) + uniform(0, 2 * math.pi)
    r = frequency * torch.hypot(x - uniform(-0.5, 0.5), y - uniform(-0.5, 0.5))
    labels = torch.arange(n) % len(PATTERNS)
    pattern = torch.stack([f(u, v, r) for f in PATTERNS.values()], 1)[torch.arange(n), labels]  # [n, 32, 32]
    contrast = uniform(0.25, 0.35) * uniform(-1, 1).sign()
    pixels = (uniform(0.45, 0.55) + contrast * torch.tanh(4 * pattern))[:, None]
    pixels = pixels + 0.01 * torch.randn(n, 3, 1, 1, generator=g) + 0.05 * torch.randn(n, 3, 32, 32, generator=g)
    return (255 * pixels.clamp(0, 1)).byte(), labels


# ------------------------------------------ model ----------------------------------------------
class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and 2d in one, over the global batch on CPU processes too.

    On CUDA, `distribute` makes it an nn.SyncBatchNorm, which has no CPU version.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        mean = SumOverRanks.apply(x.mean(dims)) / world_size()
        x = x - mean.view(shape)
        var = SumOverRanks.apply(x.square().mean(dims)) / world_size()
        count = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        x = x * (var + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x

class Encoder(nn.Module):
    """f: the backbone, which is evaluated, and the projector, whose output the loss sees."""

    def __init__(self, backbone, stem, widths, size):
        super().__init__()
        self.backbone, width = build_backbone(backbone, stem, size)
        layers = []
        for i, wider in enumerate(widths, 1):  # BN on all layers, ReLU on all but the last (A.3.1)
            layers += [nn.Linear(width, wider, bias=False), BatchNorm(wider, affine=i < len(widths))]
            layers += [nn.ReLU(inplace=True)] if i < len(widths) else []
            width = wider
        self.projector = nn.Sequential(*layers)

    def forward(self, x):
        return self.projector(self.backbone(x))

def build_backbone(name, stem, size):
    """(backbone, width of its features). Its weights fit torchvision.models.<name>, all but fc."""
    resnet = torchvision.models.resnet
    if name == "pixels":  # no network, for comparison
        return nn.Flatten(), 3 * size * size
    if name == "resnet10":  # one block a stage, for small machines; torchvision has none
        net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=BatchNorm)
    else:
        net = torchvision.models.get_model(name, weights=None, norm_layer=BatchNorm)
    if stem == "cifar":  # small images: no stride and no pooling before the first stage
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    width, net.fc = net.fc.in_features, nn.Identity()
    return net, width


# ------------------------------------------ distributed ----------------------------------------
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # which process of this machine, by torchrun

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

def rank():
    return dist.get_rank() if world_size() > 1 else 0

def barrier():
    if world_size() > 1:
        dist.barrier()

def share(n):
    """This rank's rows of n. If there is none for it, the first one again, which gather_rows drops."""
    return slice(rank(), n, world_size()) if rank() < n else slice(1)

def gather_rows(x, n):
    """The shares of all ranks -> the n rows in their order, on every rank."""
    longest = math.ceil(n / world_size())
    x = F.pad(x[:longest], [0, 0] * (x.dim() - 1) + [0, longest - len(x)])
    return torch.stack(gather(x), 1).flatten(0, 1)[:n]

def gather(x):
    """[x of rank 0, x of rank 1, …], without gradient; all of one shape."""
    if world_size() == 1:
        return [x]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts

class SumOverRanks(torch.autograd.Function):
    """all_reduce, forwards and backwards: where all ranks use a sum, their gradients sum as well."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward

def distribute(encoder, device):
    """The module whose forward trains `encoder`, whose parameters stay where they are."""
    if world_size() == 1:
        return encoder
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1×1 kernels, where strides mean nothing
    gpu = device.type == "cuda"
    encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder) if gpu else encoder
    return nn.parallel.DistributedDataParallel(encoder, [device] if gpu else None)


# ------------------------------------------ pretraining ----------------------------------------
def cosine_lr(peak, step, total):
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))

def autocast(device):
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")

def pretrain(encoder, data, cfg, asked=()):
    """Train `encoder` by SGD, continuing from last.pt in cfg.out if it is there. Returns the seconds taken.

    Saves after each epoch, every cfg.save_every_minutes, and when `asked` holds a signal that asks for an end.
    """
    m, per_epoch, images = cfg.batch_size, len(data.labels) // cfg.batch_size, fingerprint(data)
    total, collapsed = cfg.epochs * per_epoch, False
    model = distribute(encoder, data.device)
    model = torch.compile(model) if cfg.compile else model
    optimizer = torch.optim.SGD(encoder.parameters(), cfg.lr, momentum=0.9, weight_decay=1e-4)
    first, seconds = resume(encoder, optimizer, images, total, cfg)
    if rank() == 0 and first < total:
        log = open_log(cfg, first)
    floor = loss_floor(m, cfg.alpha, cfg.lam, repel_positive=cfg.loss == "ntxent")

    def order():  # one stream over all epochs: the workers know no seam, any step can be the first
        for step in range(first, total):
            epoch, place = divmod(step, per_epoch)
            if step == first or place == 0:
                shuffled = torch.randperm(len(data.labels), generator=rng(cfg.seed, "order", epoch))
            yield step, shuffled[place * m:][:m]

    def snapshot(**more):
        return {"backbone": encoder.backbone.state_dict(), "projector": encoder.projector.state_dict(),
                "step": step, "config": public(cfg), "images": images, **more}

    step = first
    if cfg.save_every and rank() == 0 and first == 0:
        save_atomically(cfg.out / "epoch0000.pt", snapshot())
    model.train()
    started = saved = time.perf_counter()
    logged, views = (first, started), Views(cfg.parts, cfg.size, cfg.crop_scale)
    # The views are a function of (seed, step), so that a resumed run sees what it would have seen.
    batches = data.batches(order(), views, n=2, key=(cfg.seed, "views"), shared=True)
    for step, (x, _) in enumerate(batches, first + 1):  # step: how many are done when this one is
        lr = cosine_lr(cfg.lr, step - 1, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(data.device):
            z1, z2 = model(x).chunk(2)  # both views in one pass: x [2·m/world, 3, S, S]
        loss = LOSSES[cfg.loss](z1, z2, cfg.alpha, cfg.lam, cfg.similarity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 and step % per_epoch:
            continue

        # All ranks know the same here, so they go on or end together.
        status = torch.stack([loss.detach(), loss.new_tensor(float(len(asked)))])
        loss, stopping = torch.stack(gather(status)).mean(0).tolist()
        if not math.isfinite(loss) or not nn.utils.get_total_norm(encoder.parameters()).isfinite():
            what = "weights are not finite" if math.isfinite(loss) else f"loss is {loss}"
            raise UserError(f"the {what} at step {step}: the steps are too long, so lower --lr (gradients grow with "
                            f"--lam, and without limit under dot and euclidean); {cfg.out} holds what was before")
        z = F.normalize(torch.cat(gather(z1.detach().float())), dim=1)  # [m, d]
        if not collapsed and z.var(0, correction=0).sum() < 1e-3:  # 1 if spread out, 0 if all are equal, or zero
            collapsed = True
            if rank() == 0:
                print(f"balcon: collapse: at step {step} the projections of all images are equal; the usual causes are "
                      f"too high an --lr and, far below 1, too small a --lam", file=sys.stderr)
        if rank() == 0:
            now = time.perf_counter()
            above = loss - floor if cfg.similarity == "cosine" else None
            speed, left = (step - logged[0]) * m / (now - logged[1]), (now - started) / (step - first) * (total - step)
            logged = step, now
            line = {"step": step, "epoch": step / per_epoch, "loss": loss, "above_floor": above, "lr": lr}
            log.write(json.dumps({**line, "images_per_second": round(speed, 1)}) + "\n")
            log.flush()
            if sys.stderr.isatty():
                gap = "" if above is None else f" ({above:.4f} above its floor)"
                print(f"\repoch {step / per_epoch:.1f}/{cfg.epochs}  loss {loss:.4f}{gap}  lr {lr:.4f}  "
                      f"{speed:.0f} images/s  {left / 60:.0f} min left  ",
                      end="" if step < total else "\n", file=sys.stderr, flush=True)
            if step % per_epoch == 0 or stopping or now - saved > 60 * cfg.save_every_minutes:
                saved, epoch = now, step // per_epoch
                if cfg.save_every and step % per_epoch == 0 and epoch % cfg.save_every == 0:  # kept for --eval bounds
                    save_atomically(cfg.out / f"epoch{epoch:04d}.pt", snapshot())
                state = snapshot(optimizer=optimizer.state_dict(), seconds=seconds + now - started)
                save_atomically(cfg.out / "last.pt", state, before=cfg.out / "previous.pt")
        if stopping:
            barrier()  # until rank 0 has saved
            raise Stopped(f"stopped by a signal and saved at step {step} of {total}: the same command goes on",
                          asked[0] if asked else signal.SIGTERM)
    return seconds + time.perf_counter() - started

def resume(encoder, optimizer, images, total, cfg):
    """(steps done, seconds taken) of last.pt, or where that is missing or damaged of the checkpoint before it."""
    last, before, damage = cfg.out / "last.pt", cfg.out / "previous.pt", None

    def restore(path):
        state = load_weights(encoder, path)
        try:
            refuse_another(state["config"], cfg)
            optimizer.load_state_dict(state["optimizer"])
            if any(o["momentum_buffer"].shape != p.shape for p, o in optimizer.state.items()):
                raise ValueError("momenta of another network")
            done = int(state["step"]), float(state["seconds"])
            if not 0 <= done[0] <= total:
                raise ValueError(f"step {done[0]} of {total}")
        except UserError as error:
            raise Damaged(f"{path}: {error}") from None
        except Exception as error:  # whatever is wrong in its contents
            raise Damaged(f"{path} cannot be resumed: {error!r}") from None
        if state.get("images", images) != images:
            raise UserError(f"{path} was trained on other images than {cfg.data} has now: choose another --out")
        return done

    done = 0, 0.0
    try:
        done = restore(last if last.exists() else before) if last.exists() or before.exists() else done
    except Damaged as error:
        if not last.exists() or not before.exists():
            raise
        try:
            damage, done = error, restore(before)
        except Damaged as as_well:
            raise Damaged(f"{error}; {as_well}") from None
    first = torch.tensor(done[:1], device=next(encoder.parameters()).device)
    if (torch.stack(gather(first)) != first).any():
        raise UserError(f"the processes do not see the same {last}: --out must be on a disk that all share")
    if damage and rank() == 0:
        print(f"balcon: {damage}. Going on from {before}", file=sys.stderr)
        os.replace(last, cfg.out / "last.pt.damaged")
    if first == 0 and rank() == 0 and len(read_log(cfg.out / "log.jsonl")) > 1:
        print(f"balcon: {cfg.out} has a log and no checkpoint: starting again", file=sys.stderr)
    return done

def fingerprint(data):
    """Which images these are, files by their names: every visit to a run must see the same ones."""
    names = data.paths.tolist() if isinstance(data, OnDisk) else []
    digest = hashlib.blake2b("\n".join("/".join(Path(name).parts[-2:]) for name in names).encode("utf8", "replace"))
    for tensor in (data.labels, *([] if names else [data.pixels])):
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]

@contextlib.contextmanager
def end_on_request():
    """A list that SIGTERM, Ctrl-C or a hang-up adds to instead of ending the process; a second one ends it at once."""
    asked, numbers = [], [getattr(signal, name, signal.SIGTERM) for name in ("SIGTERM", "SIGINT", "SIGHUP")]
    handlers = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}  # as nohup does

    def note(number, frame):
        asked.append(number)
        for n in handlers:
            signal.signal(n, signal.SIG_DFL)

    try:
        for n in handlers:
            signal.signal(n, note)
        yield asked
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    if asked:  # too late for pretraining, which is done
        signal.raise_signal(asked[0])

def save_atomically(path, value, before=None):
    """Text, or what torch.save takes. A kill or a full disk leaves the old file whole; it moves to `before`."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(value.encode()) if isinstance(value, str) else torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            draft.unlink()
        raise UserError(f"cannot write {path}, and what was there stays: {error.__context__ or error}") from None

def read_whole(path):
    """What torch.save wrote there, with its checksums, which torch.load does not look at; runs no code of the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"wrong checksum of {broken}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:  # of the disk, perhaps for a moment
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise Damaged(f"cannot read the checkpoint {path}: {type(error).__name__} {str(error):.200}") from None

def read_checkpoint(path):
    state = read_whole(path)
    config = state.get("config") if isinstance(state, dict) and "backbone" in state else None
    if not isinstance(config, dict) or str(config.get("dataset")) not in RECIPES:
        raise Damaged(f"{path} is not a checkpoint of balcon")
    for key, default in defaults(config["dataset"]).items():
        if default is not None and not isinstance(config.get(key, default), type(default)):
            raise Damaged(f"{path} has an impossible {key}: {config[key]}")
    return state

def load_weights(encoder, path):
    state = read_checkpoint(path)
    try:
        encoder.backbone.load_state_dict(state["backbone"])
        encoder.projector.load_state_dict(state["projector"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise Damaged(f"{path} does not fit: {str(error).splitlines()[-1].strip():.160}") from None
    return state

def open_log(cfg, first):
    """log.jsonl for appending after step `first`; lines of steps that will be made again are dropped."""
    path = cfg.out / "log.jsonl"
    lines = [line for line in read_log(path) if line.get("step", 0) <= first]
    lines.append({"resumed_at": first, **environment()} if lines else {**environment(), "config": public(cfg)})
    save_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return open(path, "a")

def read_log(path):
    """The lines of a log, but for a last one that a power cut broke off."""
    lines, texts = [], path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
        elif lines and number < len(texts):
            raise UserError(f"{path} is damaged in line {number} of {len(texts)}: mend it, or delete the rest")
    return lines if lines and isinstance(lines[0].get("config"), dict) else []

def environment():
    """What else decides the figures: in the first line of every log, and in results.json as of the last evaluation."""
    git = subprocess.run("git describe --always --abbrev=40 --dirty", shell=True, cwd=Path(__file__).resolve().parent,
                         capture_output=True, text=True)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"argv": sys.argv, "git": git.stdout.strip() or None, "world_size": world_size(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "hardware": gpus or f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


# ------------------------------------------ evaluation -----------------------------------------
@torch.no_grad()
def extract(backbone, data, batch=512):
    """Features [n, d] float32 and labels [n] of this rank's share of the plain images."""
    backbone.eval()
    rows = torch.arange(len(data.labels))[share(len(data.labels))]
    features, labels = [], []
    for x, y in data.batches(enumerate(rows.split(batch))):
        with autocast(data.device):
            features.append(backbone(x).float())
        labels.append(y)
    return torch.cat(features), torch.cat(labels)

@torch.no_grad()
def knn_predict(train_features, train_labels, test_features, k, *, split=False):
    """k-nearest-neighbour labels [Q] of test_features [Q, d] (A.4.2): the majority vote of the k most
    cosine-similar of train_features [N, d]; of equal votes, the class of the nearest neighbour wins.
    Holds blocks of the Q × N similarities, never all of them.

    split=True: under torch.distributed each rank brings its share of the training images and all the
    queries, and all ranks get the same answer.
    """
    bank, labels, split = F.normalize(train_features, dim=1), train_labels, split and world_size() > 1
    sizes = torch.stack([labels.max() + 1, labels.new_tensor(len(bank))])
    sizes = torch.stack(gather(sizes) if split else [sizes])  # [ranks, 2]
    (classes, longest), total = sizes.amax(0).tolist(), int(sizes[:, 1].sum())
    if not 1 <= k <= total:
        raise ValueError(f"k = {k} neighbours of {total} images")
    predicted, blocks = [], F.normalize(test_features, dim=1).split(max(1, 2 ** 25 // longest))
    memory = bank.new_empty(len(blocks[0]), len(bank))  # once: touching new memory for each block takes a tenth longer
    for queries in blocks:
        similarity = torch.mm(queries, bank.T, out=memory[:len(queries)])
        similarity, nearest = similarity.topk(min(k, len(bank)))  # [q, k], nearest first
        voters = labels[nearest]
        if split:  # the k nearest of all are among the k nearest of each rank
            missing = (0, k - similarity.shape[1])
            similarity = torch.cat(gather(F.pad(similarity, missing, value=-math.inf)), 1)
            nearest = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
            voters = torch.cat(gather(F.pad(voters, missing)), 1).gather(1, nearest)
        votes = voters.new_zeros(len(queries), classes).scatter_add(1, voters, torch.ones_like(voters))
        place = torch.arange(k, device=voters.device).expand_as(voters)
        first = torch.full_like(votes, k).scatter_reduce(1, voters, place, "amin")  # place of its nearest
        predicted.append((votes * (k + 1) - first).argmax(1))  # most votes, then the nearest
    return torch.cat(predicted)

def knn_accuracy(backbone, train, test, cfg):
    """Top-1 in % on the test images, with all training images as the bank, split over the ranks."""
    bank, labels = extract(backbone, train)
    queries, answers = (gather_rows(x, len(test.labels)) for x in extract(backbone, test))
    predicted = knn_predict(bank, labels, queries, min(cfg.k, len(train.labels)), split=True)
    return 100 * (predicted == answers).double().mean().item()

class LARS(torch.optim.Optimizer):
    """SGD with momentum, each weight matrix's step scaled by trust·‖w‖/‖gradient‖ (You et al., 2017).
    Biases and other 1-d parameters are neither scaled nor decayed."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.dim() > 1:
                    update = update + group["weight_decay"] * p
                    w, g = p.norm(), update.norm()
                    update = update * torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * buffer.mul_(group["momentum"]).add_(update))

def linear_accuracy(backbone, train, test, cfg):
    """Top-1 in % of a linear classifier on the frozen backbone (A.3.1, A.4.1).

    Each rank passes its share of a batch through the backbone, then all make the same step of the
    classifier with the gathered features: its accuracy does not depend on the number of ranks.
    """
    frozen = {name: value.clone() for name, value in backbone.eval().state_dict().items()}
    n, device, views = len(train.labels), train.device, Views(("crop", "flip"), cfg.size, (0.08, 1.0))
    queries, answers = extract(backbone, test)
    if cfg.probe == "cached":  # of unit length, so that one learning rate suits every backbone
        features, labels = (gather_rows(x, n) for x in extract(backbone, train))
        features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)

    def batches(epoch):  # features [b, d], labels [b]
        order = torch.randperm(n, generator=rng(cfg.seed, "probe order", epoch)).split(cfg.probe_batch)
        if cfg.probe == "cached":
            yield from ((features[rows], labels[rows]) for rows in order)
            return
        key = (cfg.seed, "probe views", epoch)
        for rows, (x, y) in zip(order, train.batches(enumerate(order), views, key=key, shared=True)):
            with torch.no_grad(), autocast(device):
                x = torch.cat([backbone(part).float() for part in x.split(512)])
            yield gather_rows(x, len(rows)), gather_rows(y, len(rows))

    digest = hashlib.blake2b(b"".join(v.cpu().numpy().tobytes() for v in frozen.values()), digest_size=8).hexdigest()
    probe = nn.Linear(queries.shape[1], len(train.classes)).to(device)
    train_probe(batches, probe, n, cfg, cfg.out / f"linear-{digest}.pt")  # of this backbone and no other
    correct = gather_rows(probe(queries).argmax(1) == answers, len(test.labels))
    assert all(torch.equal(v, frozen[name]) for name, v in backbone.state_dict().items()), "the probe changed it"
    return 100 * correct.double().mean().item()

def train_probe(batches, probe, n, cfg, path=None):
    """Train `probe`, an nn.Linear, for cfg.probe_epochs on n images: batches(epoch) gives features and labels.

    On ImageNet this takes a day: it saves itself to `path` every cfg.save_every_minutes, after an epoch, and goes on.
    """
    probe.weight.data = 0.01 * torch.randn(probe.weight.shape, generator=rng(cfg.seed, "probe")).to(probe.weight)
    probe.bias.data.zero_()
    per_epoch, batch = math.ceil(n / cfg.probe_batch), min(n, cfg.probe_batch)
    peak, total, first = cfg.probe_lr * batch / 256, cfg.probe_epochs * per_epoch, 0
    optimizer = {"sgd": torch.optim.SGD, "lars": LARS}[cfg.probe_optimizer](probe.parameters(), lr=peak, momentum=0.9)
    if path and path.exists():
        state = read_whole(path)
        try:
            probe.load_state_dict(state["probe"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["epoch"]
        except Exception as error:
            raise Damaged(f"{path} is damaged ({error!r}): remove it, and the classifier starts again") from None
    saved = time.perf_counter()
    for epoch in range(first, cfg.probe_epochs):
        for step, (x, y) in enumerate(batches(epoch), epoch * per_epoch):
            optimizer.param_groups[0]["lr"] = cosine_lr(peak, step, total)
            optimizer.zero_grad()
            F.cross_entropy(probe(x), y).backward()
            optimizer.step()
        if path and rank() == 0 and time.perf_counter() - saved > 60 * cfg.save_every_minutes:
            saved, state = time.perf_counter(), {"probe": probe.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(path, {"epoch": epoch + 1, **state})


# ------------------------------------------ theory ---------------------------------------------
# Each instrument measures what the paper assumes, bounds or explains, on training images and their labels.
# f(t(x)) below is the projection of unit length (Assumption 4.2), unless another space is named.
@torch.no_grad()
def embed(encoder, data, cfg, *key, n=1, groups=1):
    """(projections of unit length, raw projections, backbone features), on every rank: [N, groups, d] each,
    means over n/groups views of each of the N images. The same key gives the same t to the same row.

    Not in bfloat16 on CUDA: rounding would be a distance as well.
    """
    batches, views = torch.arange(len(data.labels)).split(max(1, 512 // n)), Views(cfg.parts, cfg.size, cfg.crop_scale)
    encoder.eval()
    means = []
    for rows, (x, _) in zip(batches, data.batches(enumerate(batches), views, n, (cfg.seed, *key), shared=True)):
        features = encoder.backbone(x)
        raw = encoder.projector(features)
        means.append([gather_rows(z.unflatten(0, (groups, n // groups, -1)).mean(1).transpose(0, 1), len(rows))
                      for z in (F.normalize(raw, dim=1), raw, features)])
    return [torch.cat(space) for space in zip(*means)]

def class_means(x, labels):
    """x [N, ...], labels [N] of 0 … C−1, all present -> [C, ...]."""
    sums = x.new_zeros(labels.max() + 1, *x.shape[1:]).index_add_(0, labels, x)
    return sums / labels.bincount().view(-1, *[1] * (x.dim() - 1))

def theory_images(train, cfg):
    """The training images to measure on, their labels numbered 0 … C−1 without gaps."""
    limit = min(cfg.theory_limit or len(train.labels), len(train.labels))
    data = train.select(balanced_subset(train.labels, limit, "theory"))
    names, data.labels = data.labels.unique(return_inverse=True)
    if data.labels.bincount().min() < 2:
        raise UserError(f"--eval {' '.join(cfg.eval)} compares images of a class, and one class has a single image "
                        f"among the {limit} it would use")
    return data, data.labels.to(train.device)

def mean_length(gaps):
    """Mean length of gaps [N, 2, d] between means over two halves of K views, as of infinitely many views, and its
    standard error. The noise of a mean over K views makes lengths too long: their squares by a term in 1/K, which
    half the views show twice. So we extrapolate the square of the mean length to K = ∞."""
    whole, half = gaps.mean(1).norm(dim=1), gaps.norm(dim=2).mean(1)  # [N] each
    square = 2 * whole.mean() ** 2 - half.mean() ** 2
    error = (4 * whole.mean() * whole - 2 * half.mean() * half).std() / math.sqrt(len(gaps))  # of the square
    return square.clamp(min=0).sqrt().item(), (error / (2 * square.maximum(error).sqrt())).item()

def eq16(halves, labels):
    """Prototype representation bias, Eq. 16: E‖E[f(T(X))|y] − E f(T(x))‖, and its standard error over images.

    halves: [N, 2, d], means over two halves of K views. The images are the population: an image is in its class's mean.
    """
    return mean_length(class_means(halves, labels)[labels] - halves)

def prototype_bias(encoder, train, test, cfg):
    """Eq. 51, the paper's estimate of the bias, and Eq. 16, the bias, in three spaces (Section 5.2, A.3.2).

    Eq. 51 moves the norm inside the expectations: by Jensen's inequality it is an upper bound of Eq. 16.
    Neither has a scale of its own: *_relative divides Eq. 51 by the mean distance of views of two random images, each
    under its own t, and Eq. 16 by that of two random images' mean views, which stronger augmentation shortens as well.
    """
    data, labels = theory_images(train, cfg)
    order, partner = torch.randperm(len(labels), generator=rng(cfg.seed, "pairs")), torch.empty_like(data.labels)
    for rows in (order[data.labels[order] == c] for c in data.labels.unique()):
        partner[rows] = rows.roll(1)  # x′, another image of the class
    samples = zip(embed(encoder, data, cfg, "bias"), embed(encoder, data.select(partner), cfg, "bias"),  # the same t
                  embed(encoder, data, cfg, "view means", n=cfg.views, groups=2))
    result = {}
    for space, (x, other, halves) in zip(("projection", "raw_projection", "features"), samples):
        distance, (bias, error) = (x - other).norm(dim=2), eq16(halves, labels)
        views = (x[order] - x[order.roll(1)]).norm(dim=2).mean().item() or math.nan  # collapse: no scale
        means = mean_length(halves[order] - halves[order.roll(1)])[0] or math.nan
        result[space] = {
            "eq51": distance.mean().item(), "eq51_se": distance.std().item() / math.sqrt(len(labels)),
            "eq16": bias, "eq16_se": error, "random_pairs": views, "random_mean_pairs": means,
            "eq51_relative": distance.mean().item() / views, "eq16_relative": bias / means}
    return result

def theorem_sides(anchor, mean_view, bank, labels, alpha):
    """Both sides of Theorems 4.4 and 4.6 for each anchor f(t(x)), all of unit length: {name: [N]}.

    anchor, bank: [N, d], one view of each image, drawn apart; mean_view: [N, d], E f(T(x)); labels: [N].
    repel_b is B = (1/α) log Σ_y E[exp(α s)|y], Eq. 46: with balanced classes Eq. 10's right side times ν, but
    that each image of the bank has its own t′, so E_T′ is inside the log (by Jensen, no less than outside).
    The paper bounds the left side by B/ν. Its proof divides by ν ≤ 1 (Eq. 38), which needs B ≥ 0, as it is for
    α ≤ log C: s ≥ −1. Where B < 0 the left side is at most B, so max(B, B/ν) always holds.
    """
    counts, prototypes = labels.bincount(), class_means(bank, labels)  # [C], [C, d]
    own = labels[:, None] == torch.arange(len(counts), device=labels.device)  # [N, C]
    weight = counts.to(anchor.dtype).log()[labels]
    B = torch.cat([torch.logsumexp(alpha * rows @ bank.T - weight, 1)
                   for rows in anchor.split(max(1, 2 ** 25 // len(bank)))]) / alpha
    nu = prototypes.norm(dim=1).expand_as(own).masked_fill(own, math.inf).amin(1)
    return {"attract_lhs": -F.cosine_similarity(anchor, mean_view), "attract_rhs": -(anchor * mean_view).sum(1),
            "repel_lhs": (anchor @ F.normalize(prototypes, dim=1).T).masked_fill(own, -math.inf).amax(1),
            "repel_rhs": B / nu, "repel_b": B, "nu": nu}  # nu: min over y′ ≠ y, as in the theorem

def measured_sides(encoder, train, cfg):
    data, labels = theory_images(train, cfg)
    anchor, mean_view, bank = (embed(encoder, data, cfg, "bounds", key, n=n)[0][:, 0]
                               for key, n in (("anchor", 1), ("mean", cfg.views), ("bank", 1)))
    return theorem_sides(anchor, mean_view, bank, labels, cfg.alpha)

def bounds(encoder, train, test, cfg):
    """How tight Theorems 4.4 (K views) and 4.6 (one view of each training image as bank) are: mean gaps
    RHS − LHS (A.4.5, Fig. 6), and the share in % of images where the bound does not hold."""
    side = measured_sides(encoder, train, cfg)
    result = {f"{name}_mean" if name == "nu" else name: value.mean().item() for name, value in side.items()}
    for which in ("attract", "repel"):
        gap = side[f"{which}_rhs"] - side[f"{which}_lhs"]
        result.update({f"{which}_gap": gap.mean().item(),
                       f"{which}_violated": 100 * (gap < -1e-6).double().mean().item()})
    return result

def assumptions(encoder, train, test, cfg):
    """What the theorems assume. Assumption 4.3: f(t(x)) and the mean view lie in one hemisphere. Theorem 4.6
    needs B ≥ 0 (enough, not necessary), which the paper does not say: see `theorem_sides`. ν is the smallest
    over all classes. Eq. 17's λ is Eq. 2's over ν: lam_times_nu is Eq. 2's if --lam is Eq. 17's, as it is here;
    lam_over_nu is Eq. 17's if --lam is Eq. 2's."""
    side = measured_sides(encoder, train, cfg)
    angle, nu = (-side["attract_lhs"]).clamp(-1, 1).acos().rad2deg(), side["nu"].min().item() or math.nan
    return {"angle_degrees": angle.mean().item(), "angle_95_percent": angle.quantile(0.95).item(),
            "assumption_4_3_violated": 100 * (angle > 90).double().mean().item(),
            "nu": nu, "lam_over_nu": cfg.lam / nu, "lam_times_nu": cfg.lam * nu,
            "condition_4_6_fails": 100 * (side["repel_b"] < 0).double().mean().item()}

def batches_of_views(z, labels, m, cfg):
    """z [N, 2, d] in shuffled batches of m images, the rest unused: similarities s [2m, 2m] of all views, and
    which of these pairs show the same image, the same class."""
    image = torch.arange(m, device=z.device).repeat(2)
    for rows in torch.randperm(len(z), generator=rng(cfg.seed, "theory batches")).split(m)[:len(z) // m]:
        views, y = z[rows].transpose(0, 1).flatten(0, 1), labels[rows].repeat(2)
        yield views @ views.T, image[:, None] == image, y[:, None] == y

def false_negatives(z, labels, m, cfg):
    """Means over the anchors of batches of m images, by α ("by_chance": for all). share: of the repelling
    softmax, on the 2(n_y − 1) negatives of the anchor's own class. positive: NT-Xent's share on the positive.
    loss and nscl: balanced and negatives-only supervised; their gap is −(λ/α) log(1 − share), and its bound
    (λ/α) log(1 + (n_y − 1) e^{2α} / (m − n_y)). Batches of one class are left out: NSCL has no negatives."""
    found = {}
    for s, same_image, same_class in batches_of_views(z, labels, m, cfg):
        n_y = same_class.sum(1).double() / 2
        if n_y.max() == m:
            continue
        positive = s.diagonal(m).repeat(2)  # [2m]
        for alpha in sorted({1.0, 2.0, 4.0, 8.0, cfg.alpha}):
            everything, others = ((alpha * s).masked_fill(kept_out, -math.inf).logsumexp(1)
                                  for kept_out in (same_image, same_class))
            share = -torch.expm1(others - everything)
            on_positive = torch.exp(alpha * positive - torch.logaddexp(everything, alpha * positive))
            bound = F.softplus(2 * alpha + torch.log((n_y - 1) / (m - n_y)))
            found.setdefault(f"alpha_{alpha:g}", []).append(torch.stack([
                share, on_positive, (1 - on_positive) * share, cfg.lam / alpha * everything - positive,
                cfg.lam / alpha * others - positive, cfg.lam / alpha * (everything - others),
                cfg.lam / alpha * bound, (n_y - 1) / (m - 1)]).double().mean(1))
    names = ("share", "positive", "share_beside_positive", "loss", "nscl", "gap", "bound", "by_chance")
    return {alpha: dict(zip(names, torch.stack(rows).mean(0).tolist())) for alpha, rows in found.items()}

def repulsion(encoder, train, test, cfg):
    """False negatives in batches as in training: which share of the repelling softmax lies on the anchor's own
    class, by α. Times λ it is the weight of their gradient, beside the positive's 1. NT-Xent has the positive
    in the softmax as well, and leaves the rest of its mass to the negatives.

    And whether α and λ are one dial: of an anchor's K negatives (λ/α) log Σ exp(α s) = (λ/α) log K + λ mean s +
    (αλ/2) var s + …, in which mean s comes close to 0. repelling: all beyond the mean; second_order: the term of var s.
    """
    data, labels = theory_images(train, cfg)
    z, m = embed(encoder, data, cfg, "two views", n=2, groups=2)[0], min(cfg.batch_size, len(labels))
    found = false_negatives(z, labels, m, cfg)
    best = best_positive_similarity(cfg.batch_size, cfg.alpha, cfg.lam) if cfg.loss == "ntxent" else 1.0
    moments = []
    for s, same_image, _ in batches_of_views(z, labels, m, cfg):
        s = s[~same_image].view(2 * m, -1)  # [2m, K]
        log_mean = (cfg.alpha * s).logsumexp(1) - math.log(s.shape[1])
        moments.append([s.mean().item(), (log_mean / cfg.alpha - s.mean(1)).mean().item(),
                        s.var(1, correction=0).mean().item()])
    mean, beyond, variance = np.mean(moments, 0)
    return {"batch": m, "by_chance": next(iter(found.values()), {}).get("by_chance"),
            "positive_similarity": (z[:, 0] * z[:, 1]).sum(-1).mean().item(),
            "best_positive_similarity": best if cfg.similarity == "cosine" else None,
            "negative_similarity": mean, "repelling": cfg.lam * beyond,
            "second_order": cfg.alpha * cfg.lam / 2 * variance, **{alpha: {
        "same_class": x["share"], "same_class_times_lam": cfg.lam * x["share"],
        "ntxent_positive": x["positive"], "ntxent_same_class": x["share_beside_positive"]}
        for alpha, x in found.items()}}

def class_distance_variance(features, labels):
    """(CDNV, directional CDNV) of arXiv 2506.04411, means over ordered pairs of classes: the variance of a
    class, whole or along the line to the other class's centre, over the squared distance of the centres."""
    centres = class_means(features, labels)  # [C, d]
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart, pairs = apart.fill_diagonal_(math.inf), len(centres) * (len(centres) - 1)
    own, rest = centres[labels], features - centres[labels]
    along = class_means((rest @ centres.T - (rest * own).sum(1, keepdim=True)).square(), labels) / apart
    spread = class_means(rest.square().sum(1), labels)[:, None]
    return ((spread / apart).sum() / pairs).item(), ((along / apart).sum() / pairs).item()

def nscl(encoder, train, test, cfg, draws=5):
    """Self-supervised against supervised (arXiv 2506.04411). The gap L − L_NSCL and its bound, for the first
    classes of a shuffled list. CDNV, directional CDNV. Top-1 in % by n labels a class, of the nearest class
    centre and a linear classifier on backbone features of unit length, mean and deviation over `draws`."""
    data, labels = theory_images(train, cfg)
    z, C, result = embed(encoder, data, cfg, "two views", n=2, groups=2)[0], int(labels.max()) + 1, {}
    number = torch.randperm(C, generator=rng(cfg.seed, "classes")).to(labels.device)[labels]
    for classes in sorted({c for c in (2, 5, 10, 20, 50, 100) if c < C} | {C}):
        some = number < classes
        found = false_negatives(z[some], number[some], min(cfg.batch_size, int(some.sum())), cfg)
        result.update({f"classes_{classes}_{alpha}": {key: x[key] for key in ("loss", "nscl", "gap", "bound")}
                       for alpha, x in found.items()})
    known = train.labels.unique().to(labels.device)  # names of the classes 0 … C−1 of `labels`
    features = gather_rows(extract(encoder.backbone, data)[0], len(labels))
    queries, answers = (gather_rows(x, len(test.labels)) for x in extract(encoder.backbone, test))
    result["cdnv"], result["directional_cdnv"] = class_distance_variance(features, labels)
    features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    cfg = SimpleNamespace(**{**vars(cfg), "probe_optimizer": "sgd", "probe_lr": 10.0, "probe_batch": 256})
    for shots in (n for n in (1, 5, 10, 100) if n <= labels.bincount().min()):
        accuracy = []
        for draw in range(draws):
            rows = balanced_subset(labels.cpu(), shots * C, "few-shot", cfg.seed, draw)
            x, y = features[rows], labels[rows]

            def batches(epoch):
                order = torch.randperm(len(rows), generator=rng(cfg.seed, "few-shot", draw, epoch))
                return ((x[part], y[part]) for part in order.split(cfg.probe_batch))

            probe = nn.Linear(x.shape[1], C).to(x.device)
            train_probe(batches, probe, len(rows), cfg)
            predicted = torch.cdist(queries, class_means(x, y)).argmin(1), probe(queries).argmax(1)
            accuracy.append([100 * (known[p] == answers).double().mean().item() for p in predicted])
        mean, sd = np.mean(accuracy, 0), np.std(accuracy, 0, ddof=1)
        result[f"{shots}_shot"] = {"centre": mean[0], "centre_sd": sd[0], "linear": mean[1], "linear_sd": sd[1]}
    return result

EVALUATIONS = {"knn": lambda encoder, *rest: knn_accuracy(encoder.backbone, *rest),
               "linear": lambda encoder, *rest: linear_accuracy(encoder.backbone, *rest),
               "bias": prototype_bias, "bounds": bounds, "assumptions": assumptions,
               "repulsion": repulsion, "nscl": nscl}


# ------------------------------------------ report ---------------------------------------------
SPACES = ("projection", "raw_projection", "features")
DIGITS = {"linear": 2, "knn": 2, "images": 0, "largest_class": 0, "smallest_class": 0}  # others: 3

def flat(tree, name=""):
    """{"bias": {"features": {"eq51": x}}} -> {"bias features eq51": x}"""
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{name} {key}".strip()).items()}

def read_results(dirs):
    """The results of all runs in `dirs`, figures under flat names; older configs are completed. `dirs` are directories
    with results.json in them or below, or pages with one such JSON object a line, as RESULTS.md."""
    runs, texts = [], {}
    for place in dirs:
        files = [place] if place.is_file() else place.rglob("results.json")
        found = {path.resolve(): path.read_text(errors="replace") for path in files}
        if place.is_file() and place.suffix != ".json":
            found = {f"{place}, line {number:05}": line for number, line in enumerate(found.popitem()[1].splitlines(), 1)
                     if line.startswith("{")}
        if not found:
            raise UserError(f"--report {place}: no results.json there, nor in a directory there, nor lines of a page")
        texts.update(found)
    for path, text in sorted(texts.items(), key=lambda item: str(item[0])):
        try:
            found = json.loads(text)
            config = {**COMMON, **RECIPES[found["config"]["dataset"]], **found.pop("config")}
            if not all(isinstance(x, (int, float)) for x in (found["seed"], config["alpha"], config["lam"])):
                raise TypeError("its seed, alpha and lam are not numbers")
            names = ["−" + part for part in sorted(config["drop"])] + ["+" + part for part in config["add"]]
            config.update(strategy=" ".join(names) or "base", parts=None, drop=None, add=None)  # as in Fig. 3
            if config["subset_file"]:  # comparable with a uniform subset
                config["subset"], config["subset_file"] = Path(config["subset_file"]).stem, None
            if config["trained_on"]:
                config.update(subset=f"{config['trained_on']}, evaluated with {config['subset']}", trained_on=None)
            config["checkpoint"] = Path(config["checkpoint"] or "last.pt").stem  # the end of a run, or an earlier epoch
            if counts := found.get("class_counts"):
                found.update(images=sum(counts), largest_class=max(counts), smallest_class=min(counts))
            if curve := found.get("loss_over_epochs"):
                found["above_floor"] = curve[-1]["above_floor"]
            runs.append({**flat(found), "config": config, "path": path})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"--report: {path} is not the results of a run: {error!r}") from None
    return runs

def comparable(runs, *varied, least=2):
    """Groups of runs alike in all but `varied` and the seed: {values of varied: [run, ...]}, `least` keys or more."""
    aside, groups = {*varied, *NOT_IDENTITY, "seed", "data", "baseline"}, {}
    for run in runs:
        alike = json.dumps({k: v for k, v in run["config"].items() if k not in aside}, sort_keys=True)
        groups.setdefault(alike, {}).setdefault(tuple(run["config"][key] for key in varied), []).append(run)
    return [cells for cells in groups.values() if len(cells) >= least]

def over_seeds(runs, name):
    """Mean of a figure over the runs that have it, nan if none has, and its text: with the sample standard
    deviation where there are several seeds."""
    values, digits = {}, DIGITS.get(name, 3)
    for run in runs:
        if run.get(name) is not None and values.setdefault(run["seed"], run[name]) != run[name]:
            raise UserError(f"--report: {run['path']} differs in {name} from a run of the same configuration and seed")
    values = list(values.values())
    mean = np.mean(values) if values else math.nan
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 and digits else ""
    return mean, f"{mean:.{digits}f}{spread}" if values else "–"

def correlation(x, y):
    """Pearson's r with its 95 % interval (Fisher's z) and Spearman's ρ, as text."""
    x, y = (np.array(values)[np.isfinite(x) & np.isfinite(y)] for values in (x, y))
    if len(x) < 4:
        return "–"
    ranks = [((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1)) for v in (x, y)]  # twice the mean rank of equals
    r, rho = (np.corrcoef(a, b)[0, 1] for a, b in ((x, y), ranks))
    low, high = np.tanh(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)) + np.array([-1.96, 1.96]) / math.sqrt(len(x) - 3))
    return f"r = {r:.2f} [{low:.2f}, {high:.2f}], ρ = {rho:.2f}"

def markdown(title, rows):
    """Print a table, unless it is empty; rows[0] is its head."""
    if any(text != "–" for row in rows[1:] for text in row[1:]):
        widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
        rows = [[str(x).ljust(width) for x, width in zip(row, widths)] for row in rows]
        print(f"\n{title}\n")
        for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
            print("| " + " | ".join(row) + " |")

def number(x):
    return "–" if x is None else f"{x:#.4g}"

def bounds_table(title, kept):
    heads = {"attract_gap": "gap of Eq. 8, attracting", "repel_gap": "gap of Eq. 10, repelling", "nu_mean": "ν, mean",
             "attract_violated": "Eq. 8 violated, %", "repel_violated": "Eq. 10 violated, %"}
    markdown(title, [["epoch", *heads.values()]] + [
        [at["epoch"], *(number(at.get(key)) for key in heads)] for at in kept])

FIG_5_AXIS = [1, 2, 4, 8]
FIG_5 = {  # the paper's linear accuracies on CIFAR-10, 200 epochs; rows α, columns λ
    "balanced": [[82.92, 84.43, 84.76, 84.43], [84.07, 85.26, 86.08, 85.13],
                 [86.02, 85.83, 84.48, 83.83], [85.26, 84.51, 82.95, 80.41]],
    "ntxent": [[82.38, 84.38, 85.03, 83.63], [84.95, 84.99, 85.85, 84.05],
               [84.83, 84.89, 84.05, 77.95], [82.99, 77.67, 75.23, 70.42]]}

def comparable_to_fig_5(cells):
    config = next(iter(cells.values()))[0]["config"]
    theirs = {"dataset": "cifar10", "similarity": "cosine", "strategy": "base", "subset": "full"}
    return all(config[key] == value for key, value in theirs.items())

def quadratic(x, y):
    """R² of the least-squares quadratic of y in x, and the x of its maximum; nan where there is none among the x."""
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 6 or len(set(x[known])) < 3:
        return math.nan, math.nan
    x, y = x[known], y[known]
    a, b, c = np.polyfit(x, y, 2)
    best = -b / (2 * a) if a < 0 else math.nan
    return 1 - (y - (a * x + b) * x - c).var() / y.var(), best if x.min() <= best <= x.max() else math.nan

def one_dial(cells, about):
    """Is the α × λ grid one-dimensional? Prints tables, returns figures; `repulsion` says why.

    cells: {(loss, α, λ): [run, ...]}.
    """
    names = {"linear": "linear", "similarity of positives": "repulsion positive_similarity",
             "floor lowest at": "repulsion best_positive_similarity", "loss − floor": "above_floor",
             "mean s of negatives": "repulsion negative_similarity", "repelling beyond it": "repulsion repelling",
             "(αλ/2) var s": "repulsion second_order"}
    points, head = {}, ["αλ", "α, λ", *names]
    for loss in sorted({loss for loss, *_ in cells}):
        rows = []
        for alpha, lam in sorted((cell for of, *cell in cells if of == loss), key=lambda cell: (math.prod(cell), cell)):
            found = [over_seeds(cells[loss, alpha, lam], key) for key in names.values()]
            rows.append([f"{alpha * lam:g}", f"{alpha:g}, {lam:g}", *(text for _, text in found)])
            points.setdefault(loss, []).append((alpha, lam, found[0][0], found[1][0]))
        markdown(f"{loss} loss, one dial: {about}", [head, *rows])
    papers = {f"Fig. 5, {loss}": [(alpha, lam, FIG_5[loss][i][j], math.nan) for i, alpha in enumerate(FIG_5_AXIS)
                                  for j, lam in enumerate(FIG_5_AXIS)] for loss in FIG_5 if comparable_to_fig_5(cells)}
    fits = [["", "cells, λ ≥ 1", "log α", "log λ", "log αλ", "best αλ", "similarity of positives", "best similarity"]]
    both = {"both": sum(points.values(), [])} if len(points) > 1 else {}
    for name, some in {**points, **both, **papers}.items():
        alpha, lam, linear, similarity = np.array([x for x in some if x[1] >= 1]).reshape(-1, 4).T  # below, mean s > 0
        by = [quadratic(x, linear) for x in (np.log2(alpha), np.log2(lam), np.log2(alpha * lam), similarity)]
        fits.append([name, np.isfinite(linear).sum(), *("–" if math.isnan(x) else f"{x:.2f}" for x in (
            *(r2 for r2, _ in by[:3]), 2 ** by[2][1], *by[3]))])
    markdown(f"R² of a quadratic for linear accuracy: {about}", fits)
    curves = [(loss, alpha * lam, of[0]["loss_over_epochs"]) for (loss, alpha, lam), of in sorted(cells.items())
              if of[0].get("loss_over_epochs")]
    return [("dial", f"one dial: {about}", {**points, **papers}),
            *([("floor", f"loss above its floor: {about}", curves)] if curves else [])]

def report(dirs, out):
    """Print Markdown tables that compare finished runs; with matplotlib, draw them as SVG into `out`.

    Runs share a table if they differ only in what it varies and in the seed.
    """
    runs, figures = read_results(dirs), []  # figures: (file name, title, what is drawn)
    keys = ("dataset", "loss", "alpha", "lam", "similarity", "strategy", "subset", "backbone", "epochs", "lr",
            "checkpoint")
    markdown("all runs", [[*keys, "seeds", "linear", "knn"]] + [
        [*(of[0]["config"][key] for key in keys), len({run["seed"] for run in of}),
         over_seeds(of, "linear")[1], over_seeds(of, "knn")[1]] for cells in comparable(runs, least=1)
        for of in cells.values()])

    def about(runs, varied=None):
        c, seeds = runs[0]["config"], sorted({run["seed"] for run in runs})
        images = "" if varied == "subset" else f"{runs[0].get('images') or c['limit'] or 'all'} images, "
        rate = "" if varied == "lr" else f"lr {c['lr']:g}, "
        return (f"{c['dataset']}, {images}{c['backbone']}, {c['epochs']} epochs, batch {c['batch_size']}, "
                f"{rate}seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")

    for metric in ("linear", "knn"):
        for cells in comparable(runs, "alpha", "lam", least=3):  # Figs. 4 and 5
            alphas, lams = (sorted(set(values)) for values in zip(*cells))
            if cells.keys() >= {(alpha, lam) for alpha in FIG_5_AXIS for lam in FIG_5_AXIS}:
                alphas, lams = FIG_5_AXIS, FIG_5_AXIS  # cells beyond it are in the next table
            grid = [[over_seeds(cells.get((alpha, lam), []), metric) for lam in lams] for alpha in alphas]
            means = np.array([[mean for mean, _ in row] for row in grid])
            if np.isnan(means).all():
                continue
            group = sum(cells.values(), [])
            loss = group[0]["config"]["loss"]
            title = f"{loss} loss, {metric} accuracy (%): {about(group)}"
            markdown(title, [["", *(f"λ = {lam:g}" for lam in lams)]] + [
                [f"α = {alpha:g}", *(f"**{text}**" if mean == np.nanmax(means) else text for mean, text in row)]
                for alpha, row in zip(alphas, grid)])
            paper = FIG_5[loss] if alphas == lams == FIG_5_AXIS and comparable_to_fig_5(cells) else None
            if paper and not np.isnan(means).any():
                print(f"\nwith the paper's grid (Fig. 5, linear): {correlation(means.flatten(), np.ravel(paper))}")
            figures.append((f"grid_{loss}_{metric}", title, (alphas, lams, means, paper)))
    for cells in comparable(runs, "loss", "alpha", "lam", least=8):
        figures += one_dial(cells, about(sum(cells.values(), [])))

    for cells in comparable(runs, "loss", "alpha", "lam", "lr"):  # a control that the paper lacks
        rates, methods = sorted({cell[3] for cell in cells}), sorted({cell[:3] for cell in cells})
        methods = [method for method in methods if sum((*method, rate) in cells for rate in rates) > 1]
        group = [run for cell, of in cells.items() if cell[:3] in methods for run in of]
        for metric in ("linear", "knn") if group else ():
            markdown(f"{metric} accuracy (%) by learning rate: {about(group, 'lr')}", [
                ["", *(f"{rate:g}" for rate in rates)]] + [["{} ({:g}, {:g})".format(*method), *(
                    over_seeds(cells.get((*method, rate), []), metric)[1] for rate in rates)] for method in methods])

    for varied in ("strategy", "similarity", "subset"):  # Fig. 3, Table 1, Tables 2 and 5
        for cells in comparable(runs, varied):
            group, accuracies = sum(cells.values(), []), ["linear", "knn"]
            method = "{loss} ({alpha:g}, {lam:g})".format(**group[0]["config"])
            title = f"by {varied}: {method}, {about(group, varied)}"
            if varied == "strategy":
                title += f", theory on {group[0]['config']['theory_limit'] or 'all'} images"
            names = [name for name, in sorted(cells, reverse=True, key=lambda key: np.nan_to_num(
                over_seeds(cells[key], "linear")[0], nan=-1))]  # without a figure: last
            biases = [f"bias {space} {eq}" for eq in ("eq51", "eq16", "eq51_relative", "eq16_relative")
                      for space in SPACES] if varied == "strategy" else []
            sizes = ["images", "largest_class", "smallest_class"] if varied == "subset" else []
            for columns in (sizes + accuracies, biases[:6], biases[6:]):
                markdown(title, [[varied, *columns]] + [
                    [name, *(over_seeds(cells[name,], key)[1] for key in columns)] for name in names])
            mean = {key: [over_seeds(cells[name,], key)[0] for name in names] for key in accuracies + biases}
            worst = np.isfinite(mean["linear"]).sum() - 1
            markdown(f"bias against accuracy, {len(names)} strategies as points, {title}", [
                ["", *accuracies, *(f"{of}, without {names[worst]}" for of in accuracies)]] + [
                [key, *(correlation(mean[key][:end], mean[of][:end]) for end in (None, worst) for of in accuracies)]
                for key in biases])
            if np.isfinite(mean.get(f"bias {SPACES[0]} eq51", math.nan)).any():
                shown = [key for key in biases if "raw" not in key and "eq51_relative" not in key
                         and np.isfinite(mean[key]).any()]
                figures.append(("bias", title, (names, mean["linear"], {key: mean[key] for key in shown})))

    for run in (run for run in runs if "bounds_over_epochs" in run):  # Fig. 6
        title = f"bounds over epochs: {about([run])}"
        bounds_table(title, run["bounds_over_epochs"])
        figures.append(("bounds", title, run["bounds_over_epochs"]))
    if figures:
        draw(figures, out)

def draw(figures, out):
    """SVG files, the same bytes every time; white behind, for light and dark pages."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot nothing looks for a display
    except ImportError:
        print("\nno matplotlib: no figures")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from None
    for number, (name, title, data) in enumerate(figures):
        figure = Figure((12, 7) if name == "bias" else (5, 4), layout="constrained")
        figure.suptitle(title, fontsize=7, wrap=True)
        if name == "dial":
            figure.set_size_inches(13, 4)
            panels = figure.subplots(1, 3 if any("Fig. 5" in loss for loss in data) else 2)
            for axes, label in zip(panels, ("αλ", "similarity of positives", "αλ (the paper's Fig. 5, 200 epochs)")):
                axes.set(xlabel=label, ylabel="linear accuracy (%)")
            for (loss, points), marker in zip(data.items(), itertools.cycle("os^v")):
                alpha, lam, linear, similarity = np.array(points).T
                for axes, x in [(panels[2], alpha * lam)] if "Fig. 5" in loss else [
                        (panels[0], alpha * lam), (panels[1], similarity)]:
                    dots = axes.scatter(x, linear, c=np.log2(alpha), marker=marker, label=loss, vmin=-1, vmax=4)
            for axes in panels:
                axes.legend(loc="lower left")
            for axes in panels[::2]:
                axes.set_xscale("log", base=2)
            figure.colorbar(dots, label="log₂ α")
        elif name == "floor":
            losses, products = (sorted(set(values)) for values in list(zip(*data))[:2])
            figure.set_size_inches(5 * len(losses), 4)
            colour = matplotlib.cm.ScalarMappable(matplotlib.colors.LogNorm(products[0], products[-1]))
            panels = dict(zip(losses, np.ravel(figure.subplots(1, len(losses), sharey=True))))
            for loss, product, curve in data:
                panels[loss].set(title=loss, xlabel="epoch", ylabel="loss − floor")
                panels[loss].plot([at["epoch"] for at in curve], [at["above_floor"] for at in curve],
                                  color=colour.to_rgba(product))
            figure.colorbar(colour, ax=panels[losses[-1]], label="αλ")
        elif name == "bounds":
            axes = figure.subplots()
            for key, label in (("attract_gap", "attracting, Eq. 8"), ("repel_gap", "repelling, Eq. 10")):
                axes.plot([at["epoch"] for at in data], [at[key] for at in data], "o-", label=label)
            axes.set(xlabel="epoch", ylabel="mean gap", ylim=(0, None))
            axes.legend()
        elif name == "bias":
            names, accuracy, biases = data
            for axes, (key, bias) in zip(figure.subplots(2, 3, sharey=True).T.flat, biases.items()):
                axes.set(xlabel=key, ylabel="linear accuracy (%)")
                axes.margins(0.12)
                axes.scatter(bias, accuracy)
                for label, *point in zip(names, bias, accuracy):
                    axes.annotate(label, point, (0, 5), textcoords="offset points", fontsize=7,
                                  ha="left" if point[0] < np.nanmean(bias) else "right")
        else:  # the layout of Figs. 4 and 5; beside it the paper's
            alphas, lams, means, paper = data
            grids = {"measured": means, **({"the paper's, linear, 200 epochs": np.array(paper)} if paper else {})}
            figure.set_size_inches(5 * len(grids), 4)
            for axes, (label, grid) in zip(np.ravel(figure.subplots(1, len(grids))), grids.items()):
                figure.colorbar(axes.imshow(np.ma.masked_invalid(grid), cmap="Blues"), label="accuracy (%)")
                axes.set(title=label, xticks=range(len(lams)), xticklabels=[f"λ={lam:g}" for lam in lams],
                         yticks=range(len(alphas)), yticklabels=[f"α={alpha:g}" for alpha in alphas])
                for (row, column), mean in np.ndenumerate(grid):
                    axes.text(column, row, f"{mean:.2f}" if np.isfinite(mean) else "–", ha="center", fontweight="bold",
                              color="white" if mean > (np.nanmin(grid) + np.nanmax(grid)) / 2 else "black")
        path = out / f"{number:02}_{name}.svg"
        with matplotlib.rc_context({"svg.hashsalt": "balcon", "svg.fonttype": "none"}):
            figure.savefig(path, metadata={"Date": None})
        print(path)


# ------------------------------------------ command line ---------------------------------------
CIFAR = dict(  # A.4.1. The paper's figures: kNN 80.32, linear 86.08
    alpha=2.0, lam=4.0, epochs=200, batch_size=512, lr=0.1, backbone="resnet18", stem="cifar",
    projector=(2048, 2048), size=32, crop_scale=(0.08, 1.0), parts=("crop", "flip", "color_jitter", "grayscale"),
    k=1, probe="crops", probe_optimizer="sgd", probe_lr=30.0, probe_batch=256, probe_epochs=90, baseline=True)
IMAGENET = dict(  # A.3.1. The paper's figures: kNN 51.00, linear 67.40
    alpha=4.0, lam=2.0, epochs=100, batch_size=512, lr=0.1, backbone="resnet50", stem="imagenet",
    projector=(2048, 2048, 2048), size=224, crop_scale=(0.2, 1.0),
    parts=("crop", "color_jitter", "grayscale", "gaussian_blur", "flip"),
    k=200, probe="crops", probe_optimizer="lars", probe_lr=0.1, probe_batch=4096, probe_epochs=90, baseline=False,
    theory_limit=50_000)
PATTERNS_RECIPE = {**CIFAR, **dict(  # ours
    alpha=4.0, lam=2.0, epochs=7, batch_size=128, lr=0.5, backbone="resnet10", stem="imagenet",
    projector=(512, 128), crop_scale=(0.3, 1.0), k=5, probe="cached", probe_lr=10.0,
    eval=["knn", "linear", "bias", "bounds"], theory_limit=512)}
RECIPES = {"patterns": PATTERNS_RECIPE, "cifar10": CIFAR, "cifar100": CIFAR, "imagenet": IMAGENET, "folder": IMAGENET,
           "stl10": {**CIFAR, "stem": "imagenet", "size": 96}}  # ours
COMMON = dict(loss="balanced", similarity="cosine", drop=[], add=[], limit=None, subset="full", subset_file=None,
              trained_on=None, seed=0, checkpoint=None, save_every=0, save_every_minutes=10.0, views=10,
              theory_limit=None, compile=False, report=None, eval=["knn", "linear"])
NOT_IDENTITY = ("out", "eval", "workers", "compile", "save_every", "save_every_minutes", "report")  # may change

def public(cfg):
    """What makes a run this run, as it is logged."""
    return json.loads(json.dumps({key: value for key, value in vars(cfg).items() if key not in NOT_IDENTITY},
                      default=str))

def whole(low, high=2 ** 31 - 1):
    return bounded(int, low, high)

def bounded(kind, low, high):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # nan is not
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own "invalid int value"
    return parse

def parse_flags(argv=None):
    """The configuration: the recipe of the data set (or the checkpoint's), overridden by the flags given."""
    def refuse(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS,
        epilog="Defaults are the paper's recipe for the data set, where it has one.")
    parser.error, flag, positive = refuse, parser.add_argument, bounded(float, 1e-6, 1e6)
    flag("--dataset", choices=RECIPES, help="default: patterns, drawn in memory")
    flag("--data", type=Path, metavar="DIR", help="where the images are, default: data/<dataset>")
    flag("--out", type=Path, metavar="DIR", help="run directory; the same command resumes what is there")
    flag("--loss", choices=LOSSES, help="default: balanced (Eq. 17)")
    flag("--alpha", type=positive, help="sharpness of the repelling softmax, 1/temperature")
    flag("--lam", type=positive, help="weight of repelling against attracting")
    flag("--similarity", choices=("cosine", "dot", "euclidean"), help="default: cosine")
    flag("--drop", nargs="+", choices=DROPPABLE, help="augmentations to leave out of the recipe's")
    flag("--add", nargs="+", choices=ADDABLE, help="augmentations to append to the recipe's")
    flag("--epochs", type=whole(0), help="0: evaluate the untrained backbone")
    flag("--batch-size", type=whole(2), help="images a step over all processes; twice as many views")
    flag("--lr", type=positive, help="SGD's peak; gradients are 1/α of the usual NT-Xent's")
    flag("--backbone", metavar="NAME", help="resnet10, any ResNet of torchvision, or pixels (none)")
    flag("--stem", choices=("cifar", "imagenet"), help="cifar: 3×3, no stride, no pooling")
    flag("--seed", type=whole(0), help="default: 0")
    flag("--limit", type=whole(1), metavar="N", help="use N training images: class-balanced, or of --subset")
    flag("--subset", choices=("full", "lt", "uni"), help="long-tailed as ImageNet-LT, or uniform of the same size")
    flag("--subset-file", type=Path, metavar="FILE", help="train on the images listed there, one <class>/<file> a line")
    flag("--save-every", type=whole(1), metavar="N", help="keep a checkpoint of every Nth epoch as well")
    flag("--save-every-minutes", type=positive, metavar="X", help="save within long epochs as well, default: 10")
    flag("--workers", type=whole(0, 256), help="decoding processes of each rank, for images on disk")
    flag("--compile", action="store_true", help="torch.compile the network")
    flag("--checkpoint", type=Path, metavar="FILE", help="evaluate this last.pt instead of pretraining")
    flag("--eval", nargs="*", choices=EVALUATIONS, help="default: knn linear; patterns: bias bounds as well")
    flag("--views", type=whole(2, 1000), metavar="K", help="views of an image that stand for E_T in theory, even")
    flag("--theory-limit", type=whole(4), metavar="N", help="training images that theory is measured on")
    flag("--baseline", action=argparse.BooleanOptionalAction, help="evaluate the untrained backbone as well")
    flag("--report", nargs="+", type=Path, metavar="DIR",
         help="compare finished runs, or those of a page such as RESULTS.md; figures go to --out")
    flag("--k", type=whole(1), help="nearest neighbours that vote")
    flag("--probe", choices=("crops", "cached"), help="linear classifier on fresh crops, or on features made once")
    flag("--probe-optimizer", choices=("sgd", "lars"), help="of the linear classifier")
    flag("--probe-epochs", type=whole(1), help="of the linear classifier")
    flag("--probe-batch", type=whole(1), help="of the linear classifier, over all processes")
    flag("--probe-lr", type=positive, help="for a batch of 256, scaled with --probe-batch")
    given, saved = vars(parser.parse_args(argv)), {}

    if "report" in given:
        if set(given) - {"report", "out"}:
            raise UserError("--report takes directories and --out, no other flag")
        return SimpleNamespace(report=given["report"], out=given.get("out", Path("runs/report")))
    if "checkpoint" in given:
        saved = read_checkpoint(given["checkpoint"])["config"]
        saved = {key: value for key, value in saved.items() if key not in NOT_IDENTITY}
        free = {"checkpoint", "data", "limit", "subset", "subset_file", "k", "baseline", "views", "theory_limit"}
        for key in set(given) & set(saved) - free:
            if str(given[key]) != str(saved[key]) and not key.startswith("probe"):
                raise UserError(f"{given['checkpoint']} was made with --{key.replace('_', '-')} {saved[key]}, "
                                f"not {given[key]}")
        images = {key: COMMON[key] for key in ("subset", "subset_file", "limit")}
        if set(images) & set(given):  # one of these replaces all three
            was = {key: str(saved.pop(key, default)) for key, default in images.items()}
            if was != {key: str(given.get(key, default)) for key, default in images.items()}:
                changed = [f"{key}={was[key]}" for key in images if was[key] != str(images[key])]
                saved["trained_on"] = " ".join(changed) or "subset=full"
    dataset = given.get("dataset", saved.get("dataset", "patterns"))
    cfg = SimpleNamespace(**{
        "data": Path("data", dataset), "workers": min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        **COMMON, **RECIPES[dataset], **saved, "dataset": dataset, **given})
    cfg.data, cfg.subset_file = Path(cfg.data), cfg.subset_file and Path(cfg.subset_file)
    cfg.eval = list(dict.fromkeys(cfg.eval))
    dropped = [part for name in cfg.drop for part in DROPPABLE[name]]
    cfg.parts = (*(part for part in RECIPES[dataset]["parts"] if part not in dropped), *cfg.add)
    if "out" not in given:  # named by the flags that make the run what it is
        named = {k: v for k, v in given.items() if k not in ("dataset", "checkpoint", *NOT_IDENTITY)}
        named.update({"of": "-".join(cfg.checkpoint.resolve().with_suffix("").parts[-2:])} if cfg.checkpoint else {})
        name = "_".join([dataset, *(f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in named.items())])
        cfg.out = Path("runs", name.replace("/", "-"))
        if len(os.fsencode(name)) > 200:  # file systems take 255 bytes
            cfg.out = Path("runs", f"{dataset}_{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}")
    check(cfg, given)
    return cfg

def check(cfg, given):
    """Refuse what is wrong whatever the images are, before any work is done."""
    known, world = torchvision.models.list_models(torchvision.models, "*resne*"), int(os.environ.get("WORLD_SIZE", 1))
    place = next(p for p in (cfg.out, *cfg.out.absolute().parents) if os.path.lexists(p))
    files = [cfg.out / name for name in ("log.jsonl", "last.pt", "previous.pt", "results.json")]
    header, gpus = read_log(files[0])[:1], torch.cuda.device_count()
    for wrong, message in (
            (cfg.backbone not in (*known, "resnet10", "pixels"),
             f"--backbone {cfg.backbone} is none of resnet10, pixels, {', '.join(known)}"),
            (any(not set(DROPPABLE[name]) & set(RECIPES[cfg.dataset]["parts"]) for name in cfg.drop),
             f"--drop {' '.join(cfg.drop)}: the {cfg.dataset} recipe lacks one of these"),
            (set(cfg.drop) & set(cfg.add), f"--drop and --add both name {' '.join(set(cfg.drop) & set(cfg.add))}"),
            (cfg.dataset == "patterns" and "data" in given, "--data: patterns are drawn, choose another --dataset"),
            (cfg.save_every and (cfg.checkpoint or not cfg.epochs), "--save-every: nothing is pretrained here"),
            (cfg.views % 2, f"--views {cfg.views} is odd: the bias compares two halves"),
            (len(set(cfg.parts)) < len(cfg.parts),
             f"--add {' '.join(cfg.add)}: one is there twice, or in the recipe already"),
            (cfg.subset_file and (cfg.limit or cfg.subset != "full"),
             "--subset-file says which images to use: leave out --subset and --limit"),
            (cfg.backbone == "pixels" and cfg.epochs, "--backbone pixels has nothing to pretrain: add --epochs 0"),
            (cfg.epochs and not cfg.checkpoint and (cfg.limit or math.inf) < cfg.batch_size,
             f"--limit {cfg.limit} leaves fewer images than --batch-size {cfg.batch_size}"),
            (cfg.batch_size % world, f"--batch-size {cfg.batch_size} does not divide by the {world} processes"),
            (0 < gpus <= LOCAL_RANK, f"--nproc_per_node is more than the {gpus} GPUs of this machine"),
            (not place.is_dir() or not os.access(place, os.W_OK),
             f"--out {cfg.out} cannot be made: {place} is not a directory that can be written to"),
            (not header and any(file.exists() for file in files),
             f"--out {cfg.out} holds files of another program or of a damaged run: choose another directory")):
        if wrong:
            raise UserError(message)
    for line in header:
        refuse_another(line["config"], cfg)

def defaults(dataset):
    """As they come back from a file: tuples are lists."""
    return json.loads(json.dumps({**COMMON, **RECIPES[dataset]}))

def refuse_another(config, cfg):
    was = {**defaults(cfg.dataset), **config}
    for key, value in public(cfg).items():
        if was.get(key, value) != value:
            raise UserError(f"--out {cfg.out} holds a run with {key} {was[key]}, not {value}: choose another directory")

def lock(out):
    """Keep a second process from writing there; the lock ends with this process, however that ends."""
    with contextlib.suppress(OSError):  # a file system without locks
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl and fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out {out}: another process is at work there") from None

def run(cfg):
    """Pretrain or resume, evaluate, write results.json, print the table. Returns the exit code."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", LOCAL_RANK), "nccl"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:  # started by torchrun
        try:
            dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the processes cannot meet: {error}") from None
    try:
        train, test = load_data(cfg, device)
        if cfg.epochs and not cfg.checkpoint and len(train.labels) < cfg.batch_size:
            raise UserError(f"--batch-size {cfg.batch_size} is more than the {len(train.labels)} training images")
        has_label = train.labels >= 0  # not all of STL-10's images have one
        labeled = train if has_label.all() else train.select(has_label.nonzero().squeeze(1))
        if cfg.eval and len(labeled.labels.unique()) < 2:
            raise UserError(f"--eval {' '.join(cfg.eval)} needs training images with labels of at least two classes")
        if set(cfg.eval) - {"knn", "linear"}:
            theory_images(labeled, cfg)  # complains now, not after pretraining
    except UserError:
        if LOCAL_RANK > 0:  # all processes of a machine see the same: one complaint is enough
            sys.exit(2)
        raise

    def new_encoder():
        torch.manual_seed(cfg.seed)
        encoder = Encoder(cfg.backbone, cfg.stem, cfg.projector, cfg.size)
        return encoder.to(device, memory_format=torch.channels_last)

    def save():
        if lead:
            text = json.dumps({**results, "environment": environment()})
            finite = json.loads(text, parse_constant=lambda _: None)  # JSON has no nan
            save_atomically(path, json.dumps(finite, indent=1) + "\n")

    class_counts = labeled.labels.bincount(minlength=len(train.classes)).tolist()
    encoder, lead, path = new_encoder(), rank() == 0, cfg.out / "results.json"
    if cfg.checkpoint:
        load_weights(encoder, cfg.checkpoint)
    if lead:
        print(f"balcon: {cfg.dataset}, {len(train.labels)} training and {len(test.labels)} test images, "
              f"{cfg.backbone}, {cfg.loss} loss (α={cfg.alpha:g}, λ={cfg.lam:g}), "
              f"{cfg.checkpoint or f'{cfg.epochs} epochs'} -> {cfg.out}", flush=True)
        spread = class_counts if len(class_counts) <= 10 else f"{min(class_counts)} to {max(class_counts)}"
        print(f"balcon: labelled training images per class: {spread}", flush=True)
        try:
            cfg.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {cfg.out} cannot be made: {error.strerror}") from None
        lock(cfg.out)
        for line in read_log(cfg.out / "log.jsonl")[:1]:  # by a run that was faster
            refuse_another(line["config"], cfg)

    # Figures of the trained backbone stand in results.json under their names, those of the untrained
    # one beside it with a prefix; with --epochs 0 there is only the untrained one, without prefix.
    results = {"config": public(cfg), "seed": cfg.seed, "class_counts": class_counts,
               "images": [fingerprint(train), fingerprint(test)],
               "weights": cfg.checkpoint and hashlib.blake2b(cfg.checkpoint.read_bytes(), digest_size=8).hexdigest()}
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        for key in ("images", "weights"):
            if found.get(key, results[key]) != results[key]:
                raise UserError(f"{path} has figures of other {key} than there are now: choose another --out")
        results = {"seconds": 0.0, **found, **results}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: remove it, and the evaluations are made again") from None
    stages = {"untrained_": "untrained", "": "trained"} if cfg.baseline else {"": "trained"}
    stages = stages if cfg.epochs else {"": "untrained"}
    missing = [(stage, name) for name in cfg.eval for stage in stages if stage + name not in results]
    if cfg.epochs and not cfg.checkpoint and (missing or not path.exists()):
        with end_on_request() as asked:
            results["seconds"] = round(pretrain(encoder, train, cfg, asked), 1)
    elif lead and not path.exists():
        open_log(cfg, 0).close()
    if curve := [line for line in read_log(cfg.out / "log.jsonl") if line.get("epoch", 0.5) % 1 == 0]:
        results["loss_over_epochs"] = [{key: line[key] for key in ("epoch", "loss", "above_floor")} for line in curve]
    for stage, name in missing:
        results[stage + name] = EVALUATIONS[name](new_encoder() if stage else encoder, labeled, test, cfg)
        save()  # each time: on ImageNet an evaluation takes hours
        for probe in cfg.out.glob("linear-" + 16 * "[0-9a-f]" + ".pt") if lead and name == "linear" else ():
            probe.unlink()  # its accuracy is saved
    kept = cfg.out.glob("epoch[0-9]*.pt") if "bounds" in cfg.eval and not cfg.checkpoint else ()
    measured = {at["epoch"] for at in results.get("bounds_over_epochs", [])}
    for epoch, file in sorted((int(file.stem[5:]), file) for file in kept):
        if epoch not in measured:
            load_weights(encoder, file)
            results.setdefault("bounds_over_epochs", []).append(
                {"epoch": epoch, **bounds(encoder, labeled, test, cfg)})
            save()
    if not path.exists():
        save()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if not lead:
        return 0
    columns = {title: flat({name: results[stage + name] for name in cfg.eval}) for stage, title in stages.items()}
    markdown(f"top-1 in % on {len(test.labels)} test images (kNN of k={min(cfg.k, len(labeled.labels))}), and theory", [
        ["", *columns]] + [[name, *(number(of.get(name)) for of in columns.values())]
                           for name in next(iter(columns.values()))
                           if not name.endswith(("_se", "_sd", "_lhs", "_rhs", "_b", "_pairs"))])  # in results.json
    bounds_table("bounds over epochs", results.get("bounds_over_epochs", []))
    recipe = {**COMMON, **RECIPES["patterns"], "dataset": "patterns", "seed": cfg.seed, "eval": cfg.eval}
    if "knn" not in cfg.eval or any(getattr(cfg, key) != recipe[key] for key in recipe):
        return 0
    error, untrained = 100 - results["knn"], 100 - results["untrained_knn"]  # the demo is a test
    print(f"kNN error: {error:.1f} % trained, {untrained:.1f} % untrained: " +
          ("it learned." if error < untrained / 4 else "FAILED, it should be less than a quarter."))
    return 0 if error < untrained / 4 else 1

def main(argv=None):
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed ones
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # where α cannot be printed
    try:
        cfg = parse_flags(argv)
        sys.exit(report(cfg.report, cfg.out) if cfg.report else run(cfg))
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        if code is None:
            raise
        of_all = isinstance(error, (UserError, Stopped, KeyboardInterrupt)) and not isinstance(error, ImageError)
        if LOCAL_RANK == 0 or not of_all:  # once on each machine
            print("\n" * sys.stderr.isatty() + "balcon:", " ".join(message.split()), file=sys.stderr, flush=True)
        if code == 130:  # to end by the signal itself ends a shell's loop as well
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        sys.exit(code)

def explain(error):
    """(one sentence, exit code) for what a user or the machine can cause; the code is None for a bug."""
    text = str(error)
    if isinstance(error, UserError):
        return text.split("ImageError: ")[-1], 2  # a DataLoader worker wraps it in a traceback
    if isinstance(error, Stopped):
        return error.args[0], 128 + error.args[1]  # as a shell reports a signal
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from what is saved", 130
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "out of memory: lower --batch-size, or --views for theory", 2
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return f"{text.splitlines()[0]} Fewer --workers need less memory", 2
    if isinstance(error, OSError):
        return text, 2
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile does not work here, leave it out: {text.split(chr(10))[0]}", 2
    if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in text):
        return f"rank {rank()} has lost another rank, whose own error says why", 1
    return text, None

if __name__ == "__main__":
    main()
