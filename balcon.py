#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""balcon: balanced contrastive learning in one file.

A reproduction of "Understanding Self-supervised Contrastive Learning through Supervised
Objectives" (TMLR 2025, arXiv 2510.10572). Equation, table and section numbers are the paper's.

    python balcon.py                               # a laptop: a minute or two, no download
    python balcon.py --dataset cifar10             # one GPU: the paper's CIFAR-10 recipe
    torchrun --nproc_per_node=8 balcon.py --dataset imagenet --alpha 4 --lam 2

Letters, as in the paper:
    m, d    images in the batch, dimensions of a projection; two views of each image make 2m views
    z       projection of a view; z⁺ of the other view of its image, z⁻ of a view of another image
    s       similarity of two projections: cosine, unless --similarity says otherwise
    α       sharpness of the softmax over negatives, the inverse of the temperature τ
    λ       weight of repelling negatives against attracting the positive
    t ~ T   one augmentation, drawn from the distribution of augmentations
    ν       length of the shortest prototype (mean projection) of another class

Map, in the order of this file:
    losses        Eq. 17, generalized NT-Xent, NSCL, the minimum of Eq. 17
    views         augmentations, whose parameters are drawn first and applied later
    data          images in memory or on disk
    model         a ResNet of torchvision and the projector
    distributed   communication: N processes share each batch
    pretraining   SGD, checkpoints, resuming
    evaluation    nearest neighbours, linear classifier
    theory        prototype representation bias, the bounds of Theorems 4.4 and 4.6
    more data     folders, torchvision's data sets, subsets, drawn patterns
    output        progress, pictures, features, tables
    command line  every flag and recipe in one block, main
"""
import os

if __name__ == "__main__":  # OpenMP threads that wait should not keep a busy machine's cores
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import argparse
import glob
import hashlib
import json
import math
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2.functional import rgb_to_grayscale


# ----------------------------------------- losses -----------------------------------------
def balanced_contrastive_loss(z1, z2, alpha, lam, similarity="cosine", *,
                              repel_positive=False, labels=None):
    """Balanced contrastive loss, Eq. 17: −s(z, z⁺) + λ (1/α) log Σ_{z⁻} exp(α s(z, z⁻)).

    z1, z2: [m, d], projections of two views; row i of both shows the same image. Returns a scalar,
    the mean over all 2m anchors z. The 2(m−1) negatives z⁻ are the views of the other images: the
    positive z⁺ is not in the sum. It can be negative; `loss_floor` is its minimum for cosine.

    similarity: "cosine", or "dot" or "euclidean" (negative squared distance, footnote 3) of the
    projections as they are. Computed in float32 at least, also under autocast.

    Under torch.distributed the anchors are this rank's m images, the negatives come from all
    ranks, and m must be equal on all; DDP's averaged gradient is that of one process with the
    whole batch. Gradients are 1/α of those of NT-Xent as usually written, with temperature 1/α:
    multiply an SGD learning rate from the SimCLR literature by α, and divide its decay by α.

    repel_positive and labels [m] make the two losses below. Raises ValueError for other shapes of
    z1 and z2, other similarities, α ≤ 0, λ < 0, or a batch of one image.
    """
    if z1.shape != z2.shape or z1.dim() != 2:
        raise ValueError(f"z1 and z2 must both be [m, d], not {[*z1.shape]} and {[*z2.shape]}")
    if similarity not in ("cosine", "dot", "euclidean"):
        raise ValueError(f"similarity must be cosine, dot or euclidean, not {similarity!r}")
    if not (0 < alpha < math.inf and 0 <= lam < math.inf):
        raise ValueError(f"alpha must be positive and lam at least 0, not {alpha} and {lam}")
    m, rank, world = len(z1), 0, 1
    if dist.is_available() and dist.is_initialized():  # spelt out, so that it can be pasted
        rank, world = dist.get_rank(), dist.get_world_size()
    if m * world < 2:
        raise ValueError("one image has no negatives: the batch must hold at least two")

    def sum_over_ranks(grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad

    def gather_with_gradient(x):  # [n, ...] of each rank -> [world·n, ...]
        if world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x.detach())
        parts[rank] = x
        everything = torch.cat(parts)
        if x.requires_grad:  # other ranks' losses depend on my rows, too: sum their gradients
            everything.register_hook(sum_over_ranks)
        return everything

    with torch.autocast(z1.device.type, enabled=False):
        dtype = torch.promote_types(z1.dtype, torch.float32)
        z1, z2 = z1.to(dtype), z2.to(dtype)
        if similarity == "cosine":
            z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        z = torch.cat([z1, z2])  # [2m, d]: the anchors
        candidates = gather_with_gradient(z)  # [2M, d], where M = world · m
        s = z @ candidates.T  # [2m, 2M]
        positive = (z1 * z2).sum(1).repeat(2)  # [2m]: both views of an image share it
        if similarity == "euclidean":
            s = 2 * s - z.square().sum(1, keepdim=True) - candidates.square().sum(1)
            positive = -(z1 - z2).square().sum(1).repeat(2)

        # An anchor repels every candidate outside its own group: other images, views or classes.
        if labels is not None:
            group = labels.to(z.device).repeat(2)  # the class
        elif repel_positive:
            group = 2 * rank * m + torch.arange(2 * m, device=z.device)  # the view itself
        else:
            group = rank * m + torch.arange(m, device=z.device).repeat(2)  # the image it shows
        same_group = group[:, None] == gather_with_gradient(group)  # [2m, 2M]
        logits = alpha * s
        with torch.no_grad():  # outside the graph: the softmax gives −∞ no gradient
            logits.masked_fill_(same_group, -math.inf)
        repel = logits.logsumexp(1)  # [2m]
        if labels is not None and repel.isneginf().any():
            raise ValueError("no negatives: the whole batch is of one class")
        return (lam / alpha * repel - positive).mean()


def generalized_nt_xent_loss(z1, z2, alpha, lam, similarity="cosine"):
    """Generalized NT-Xent loss (Section 6): Eq. 17 with the positive also in the sum.

    Arguments, mean, ranks, scale and errors as in `balanced_contrastive_loss`. λ = 1 is SimCLR's
    NT-Xent (Eq. 15) with temperature τ = 1/α, divided by α.
    """
    return balanced_contrastive_loss(z1, z2, alpha, lam, similarity, repel_positive=True)


def nscl_loss(z1, z2, labels, alpha, lam, similarity="cosine"):
    """Negatives-only supervised loss (arXiv 2506.04411): Eq. 17, repelling only other classes.

    labels: [m] integers, not all equal. All else as in `balanced_contrastive_loss`.
    """
    return balanced_contrastive_loss(z1, z2, alpha, lam, similarity, labels=labels)


def loss_floor(m, alpha, lam):
    """Minimum of Eq. 17 for cosine similarity and m ≥ 2 images; a lower bound if d < m − 1.

    The log-sum-exp is at least that of equal similarities (Jensen), and Σᵢⱼ zᵢ·zⱼ ≥ 0 keeps the
    mean negative similarity at −1/(m−1) or above. Both are equalities iff the two views of each
    image coincide and the m images form a regular simplex.
    """
    return -1 - lam / (m - 1) + lam / alpha * math.log(2 * (m - 1))


LOSSES = {"balanced": balanced_contrastive_loss, "ntxent": generalized_nt_xent_loss}


# ----------------------------------------- views ------------------------------------------
# An augmentation draws its parameters for n images, a few numbers each, on the CPU, and applies
# them to x [n, 3, S, S] in [0, 1], on any device. The two are apart so that one t can be applied
# to two images (Eq. 51), and every rank can draw for the global batch and apply its own rows.
#
# To add an augmentation, write one more class like these: its name becomes a choice of --add.
class Augmentation:
    p = 0.5  # probability that it is applied to an image

    def draw(self, n, generator):
        return torch.empty(n, 0)  # no parameters


class Flip(Augmentation):
    name = "flip"

    def apply(self, x, t):
        return x.flip(-1)


class Grayscale(Augmentation):
    name, p = "grayscale", 0.2

    def apply(self, x, t):
        return rgb_to_grayscale(x, num_output_channels=3)


class ColorJitter(Augmentation):
    """Brightness, contrast, saturation and hue, in an order of its own for each image."""
    name, p = "color_jitter", 0.8
    strength, hue = 0.4, 0.1

    def draw(self, n, generator):
        factor = 1 + torch.empty(n, 3).uniform_(-self.strength, self.strength, generator=generator)
        shift = torch.empty(n, 1).uniform_(-self.hue, self.hue, generator=generator)
        order = torch.rand(n, 4, generator=generator).argsort(1)  # 0 to 2: a factor; 3: the hue
        return torch.cat([factor, shift, order], 1)  # [n, 8]

    def apply(self, x, t):
        # Hue is slow, so the whole batch has it once. The first loop makes the changes that come
        # before an image's hue, the second those after it; a factor of 1 changes nothing.
        factor, shift, order = t.split([3, 1, 4], 1)
        factor = factor.gather(1, order.long().clamp(max=2))  # [n, 4], by place; hue's is not used
        place, hue_place = torch.arange(4), order.argmax(1, keepdim=True)
        before, after = factor.where(place < hue_place, 1), factor.where(place > hue_place, 1)
        table = torch.stack([before, after, order == 1, order == 2])  # [4, n, 4]
        before, after, contrast, saturation = to_device(table, x.device)[..., None, None, None]
        for i in range(3):
            x = blend(x, before[:, i], contrast[:, i], saturation[:, i])
        x = shift_hue(x, to_device(shift, x.device)[..., None, None])
        for i in range(1, 4):
            x = blend(x, after[:, i], contrast[:, i], saturation[:, i])
        return x


def blend(x, factor, contrast, saturation):
    """x mixed with its mean grey (contrast), its own grey version (saturation) or, where both are
    0, with black (brightness). All but x: [n, 1, 1, 1]. A factor of 1 gives x back."""
    grey = rgb_to_grayscale(x)  # [n, 1, S, S]
    mean = grey.mean((1, 2, 3), keepdim=True)
    return torch.addcmul(mean * contrast, grey, saturation).lerp(x, factor).clamp_(0, 1)


def shift_hue(x, shift):
    """x: [n, 3, H, W]; shift: [n, 1, 1, 1], in turns of the colour circle, at most a third (HSV).

    Hue in sixths of the circle is 0 for red, 2 for green, 4 for blue. The brightest channel gives
    the sector, the difference of the other two the place in it.
    """
    red, green, blue = x.split(1, 1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    hue = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    hue = torch.where(value == red, green - blue, hue) / chroma.clamp(min=1e-12)
    # And back: a channel is at its brightest up to one sixth from its own hue, and at its darkest
    # from two sixths on. On the circle, 5 sixths away is as far as 1.
    own = torch.arange(0, 6, 2, device=x.device)[:, None, None]
    away = (hue + (6 * shift - own)).abs()  # [n, 3, H, W]
    return value - chroma * (2 - (away - 3).abs()).clamp_(0, 1)


class GaussianBlur(Augmentation):
    """σ from 0.1 to 2 pixels. The kernel has at most 23 pixels, SimCLR's tenth of 224."""
    name = "gaussian_blur"

    def draw(self, n, generator):
        return torch.empty(n).uniform_(0.1, 2.0, generator=generator)

    def apply(self, x, sigma):
        # One matrix for each image blurs along both axes. It reflects the image at its borders.
        n, last = len(x), x.shape[-1] - 1
        radius, sigma = min(11, last), to_device(sigma, x.device)[:, None]
        offset = torch.arange(-radius, radius + 1, device=x.device)
        kernel = torch.softmax(-0.5 * (offset / sigma) ** 2, 1)[:, None]  # [n, 1, 23]
        target = torch.arange(last + 1, device=x.device)[:, None] + offset  # [S, 23]
        target = last - (last - target.abs()).abs()
        blur = x.new_zeros(n, last + 1, last + 1).scatter_add_(
            2, target.expand(n, -1, -1), kernel.expand(-1, last + 1, -1))
        return blur[:, None] @ x @ blur[:, None].mT


# The paper names the next three without parameters; these are ours.
class RandomCutout(Augmentation):
    """A square of half the side, cut at the border, becomes the mean colour."""
    name = "random_cutout"

    def draw(self, n, generator):
        return torch.rand(n, 2, generator=generator)  # the centre, as fractions of the sides

    def apply(self, x, centre):
        size, centre = x.shape[-1], to_device(centre, x.device)
        distance = torch.arange(size, device=x.device) - (centre * size).floor()[..., None]
        inside = (distance >= -(size // 4)) & (distance < size // 2 - size // 4)  # [n, 2, S]
        hole = inside[:, 0, :, None] & inside[:, 1, None, :]
        return torch.where(hole[:, None], mean_and_std(x.device)[0], x)


class RandomRotation(Augmentation):
    name, p = "random_rotation", 0.75  # 0, 1, 2 and 3 turns are equally likely

    def draw(self, n, generator):
        return torch.randint(1, 4, [n], generator=generator)  # quarter turns

    def apply(self, x, turns):
        turns = to_device(turns, x.device)[:, None, None, None]
        x = torch.where(turns >= 2, x.flip(-2, -1), x)
        return torch.where(turns % 2 == 1, x.rot90(1, (-2, -1)), x)


class GaussianNoise(Augmentation):
    """σ = 0.1. Only a seed is drawn, so that t stays a few numbers for each view."""
    name = "gaussian_noise"
    sigma = 0.1

    def draw(self, n, generator):
        return torch.randint(2 ** 31, (n,), generator=generator)

    def apply(self, x, seeds):  # the noise of a seed is the same on every device
        noise = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
                 for seed in seeds.tolist()]
        return (x + self.sigma * to_device(torch.stack(noise), x.device)).clamp(0, 1)


AUGMENTATIONS = {kind.name: kind() for kind in Augmentation.__subclasses__()}
DROPPABLE = {"gaussian_blur": ["gaussian_blur"], "color_distortion": ["color_jitter", "grayscale"]}


class Views:
    """T, the distribution of augmentations: RandomResizedCrop, then those of `names` in order."""

    def __init__(self, names, size, crop_scale):
        self.names, self.size, self.crop_scale = names, size, crop_scale

    def draw(self, n, generator):
        """t₁ … tₙ ~ T: {name: [n, ...]}, on the CPU."""
        # Ten candidates for the crop: see crop_box.
        area = torch.empty(n, 10, 1).uniform_(*self.crop_scale, generator=generator)
        shape = torch.empty(n, 10, 1).uniform_(math.log(3 / 4), math.log(4 / 3),
                                               generator=generator).exp()  # width / height
        corner = torch.rand(n, 10, 2, generator=generator)  # top left, shares of the room there is
        t = {"crop": torch.cat([area, shape, corner], 2)}
        for name in self.names:
            augmentation = AUGMENTATIONS[name]
            t[name + "?"] = torch.rand(n, generator=generator) < augmentation.p
            t[name] = augmentation.draw(n, generator)
        return t

    def apply(self, x, t):
        """x: [n, 3, H, H] in [0, 1] -> t(x): [n, 3, size, size]. Without a crop in t, H is size."""
        if "crop" in t:
            x = crop_resize(x, to_device(crop_box(t["crop"], *x.shape[-2:]), x.device), self.size)
        for name in self.names:
            rows = t[name + "?"].nonzero().squeeze(1)  # on the CPU: avoids a GPU sync
            if len(rows):
                place = to_device(rows, x.device)
                x[place] = AUGMENTATIONS[name].apply(x[place], t[name][rows])
        return x


def crop_box(t, height, width):
    """t: [n, 10, 4] -> [n, 4] (top, left, height, width) in whole pixels: the first of ten
    candidates that fits into the image, else the largest central one, as in torchvision."""
    area, shape, top, left = t.unbind(-1)  # [n, 10] each
    h = (area * height * width / shape).sqrt().round().clamp(min=1)
    w = (area * height * width * shape).sqrt().round().clamp(min=1)
    top = (top * (height - h + 1)).floor().minimum(height - h)  # float32 may round up
    left = (left * (width - w + 1)).floor().minimum(width - w)
    box = torch.stack([top, left, h, w], -1)
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    central = box.new_tensor([(height - h) // 2, (width - w) // 2, h, w])
    box = torch.cat([box, central.expand(len(t), 1, 4)], 1)  # the eleventh always fits
    fits = (box[..., 2] <= height) & (box[..., 3] <= width)
    return box[torch.arange(len(t)), fits.int().argmax(1)].long()


def crop_resize(x, box, size):
    """x: [n, 3, H, H], box: [n, 4] -> [n, 3, size, size], antialiased bilinear.

    Resizing is linear along each axis, so two matrices per image crop and resize at once.
    """
    height = x.shape[-1]
    start, length = box[:, :2, None, None], box[:, 2:, None, None]  # [n, 2, 1, 1]: rows, columns
    scale = length / size
    pixel = torch.arange(0.5, height, device=x.device)  # [H], the centres of the pixels
    centre = start + scale * torch.arange(0.5, size, device=x.device)[:, None]  # [n, 2, size, 1]
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp_(min=0)  # wider to shrink
    weight = weight * ((pixel > start) & (pixel < start + length))  # nothing beyond the crop
    rows, columns = (weight / weight.sum(-1, keepdim=True)).unbind(1)  # [n, size, H] each
    x = x.flatten(1, 2) @ columns.mT  # [n, 3·H, size]
    return rows[:, None] @ x.view(len(x), 3, height, size)


def mean_and_std(device):  # of ImageNet, also for CIFAR (A.4.1): [3, 1, 1] each
    values = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return to_device(values, device)[..., None, None]


def to_device(x, device):
    """x on the device. Asynchronous: the host does not wait for a GPU that is busy."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


# ----------------------------------------- data -------------------------------------------
class UserError(Exception):
    """What the user can correct: printed as one sentence, exit code 2."""


def refuse(message):
    raise UserError(message)


class ImageError(UserError):
    """A bad image. Under torchrun only the rank that read it knows."""


def rng(*key):
    """A CPU generator that is a pure function of its key, so no generator state is ever saved."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Images:
    """Images in memory, uint8 [N, 3, S, S] on the device, or the names of N files.

    labels: [N] on the CPU; −1 marks an image without one.
    """

    def __init__(self, images, labels, classes, cfg, device):
        self.in_memory = torch.is_tensor(images)
        self.images = images.to(device) if self.in_memory else np.array(images)
        self.labels, self.classes, self.cfg, self.device = labels, classes, cfg, device

    def __len__(self):
        return len(self.labels)

    def select(self, rows):
        images, labels = self.images[rows.numpy()], self.labels[rows]
        return Images(images, labels, self.classes, self.cfg, self.device)

    def batches(self, order, views=None, n=1, key=()):
        """Yields step, x for each (step, rows) of `order`.

        x [n·b, 3, S, S], normalised, shows this rank's b of the rows: n views of each, view by
        view, or the plain images if there are no `views`. What is seen depends only on key, step
        and rows, not on the number of ranks.
        """
        def requests():
            for step, rows in order:
                mine = share(len(rows))
                t = views.draw(n * len(rows), rng(*key, step)) if views else {}
                # A parameter is [n · len(rows), ...], view by view: keep this rank's rows.
                t = {name: p.unflatten(0, (n, -1))[:, mine].flatten(0, 1) for name, p in t.items()}
                yield step, rows[mine], n, t

        read = map(self.__getitem__, requests())
        if not self.in_memory:  # worker processes; a request is a whole batch
            read = torch.utils.data.DataLoader(self, batch_size=None, sampler=requests(),
                                               num_workers=self.cfg.workers)
        for step, x, t in read:
            x = to_device(x, self.device).float() / 255
            x = views.apply(x, t) if views else x
            mean, std = mean_and_std(self.device)
            yield step, ((x - mean) / std).contiguous(memory_format=torch.channels_last)

    def __getitem__(self, request):
        """step, rows [b], n, t -> step, x uint8 [n·b, 3, S, S], what is left of t."""
        step, rows, n, t = request
        if self.in_memory:
            return step, self.images[to_device(rows, self.device)].repeat(n, 1, 1, 1), t
        size, crops = self.cfg.size, []  # image by image; put view by view at the end
        for i, file in enumerate(self.images[rows.numpy()]):
            image = read_image(file)
            side = max(1, round(0.875 * min(image.size)))  # plain: Resize(S / .875), CenterCrop(S)
            boxes = [[(image.height - side) // 2, (image.width - side) // 2, side, side]]
            if "crop" in t:  # every len(rows)-th is of this image
                boxes = crop_box(t["crop"][i::len(rows)], image.height, image.width).tolist()
            for top, left, height, width in boxes:
                crop = image.crop((left, top, left + width, top + height))
                crop = crop.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
                crops.append(torch.from_numpy(np.array(crop)))
        x = torch.stack(crops).unflatten(0, (len(rows), n)).transpose(0, 1).flatten(0, 1)
        t.pop("crop", None)
        return step, x.permute(0, 3, 1, 2), t


def read_image(file):
    """An upright RGB image of any kind that Pillow reads."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey: Pillow would cut them at 255
                grey = np.asarray(image)
                image = Image.fromarray((grey / (256 if grey.max() > 255 else 1)).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for corrupt files
        raise ImageError(f"cannot read the image {file}: {error}") from None


def load_data(cfg, device):
    """[training images, test images] of cfg.dataset, from cfg.data; a folder may have no test."""
    on_disk = cfg.dataset in ("imagenet", "folder")
    if cfg.dataset == "patterns":
        splits = [draw_patterns(4096, "train"), draw_patterns(2000, "test")]
    elif on_disk or (cfg.data / "train").is_dir():
        splits = read_folders(cfg)
    else:
        splits = read_torchvision(cfg.dataset, cfg.data)
    images, labels, classes = splits[0]
    if cfg.limit or cfg.subset_file or cfg.subset != "full":
        keep = training_subset(cfg, images, labels)
        splits[0] = images[keep.numpy()], labels[keep], classes
    if not on_disk and not torch.is_tensor(images):
        side = 96 if cfg.dataset == "stl10" else 32
        splits = [(read_all(files, side), *others) for files, *others in splits]
    return [Images(*split, cfg, device) for split in splits]


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
        if stem == "cifar":  # small images: no stride and no pooling before the first stage
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        width, net.fc = net.fc.in_features, nn.Identity()
        if backbone == "resnet8":  # three stages: a fourth would see one pixel of a small image
            net.layer4, width = nn.Identity(), 256
        layers = []
        for inputs, outputs in zip([width, *widths], widths):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        layers[-2:] = [nn.BatchNorm1d(outputs, affine=False)]  # no ReLU (A.3.1)
        self.backbone, self.projector = net, nn.Sequential(*layers)

    def forward(self, x):
        return self.projector(self.backbone(x))


def build_encoder(cfg, device):
    torch.manual_seed(cfg.seed)
    encoder = Encoder(cfg.backbone, cfg.stem, cfg.projector)
    if cfg.init:  # a balcon checkpoint, or a state dict of torchvision
        given, own = load_file(cfg.init), encoder.backbone.state_dict()
        given = given.get("backbone", given)
        fits = {name: weight for name, weight in given.items()
                if name in own and own[name].shape == weight.shape}
        if len(fits) < len(own) / 2:
            refuse(f"--init {cfg.init}: most of its weights do not fit the backbone")
        encoder.backbone.load_state_dict(fits, strict=False)
        misfits = sorted((own.keys() | given.keys()) - fits.keys())
        say(f"backbone from {cfg.init}; what does not fit: {' '.join(misfits) or 'nothing'}")
    return encoder.to(device, memory_format=torch.channels_last)


# ----------------------------------------- distributed ------------------------------------
def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def say(text):
    if rank() == 0:
        print(f"balcon: {text}", flush=True)


def start_processes():
    """The device of this process, which joins the others if torchrun started it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))  # rank 0 may have to download first
    return device


def share(n):
    """This rank's rows of n. Two ranks share 5 rows as 0 2 4 and 1 3. A rank left without rows
    works on the first one, since batches must not be empty; gather_rows drops the result."""
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
    if device.type == "cuda":  # on CPUs nn.SyncBatchNorm does not exist
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    return nn.parallel.DistributedDataParallel(encoder)


# ----------------------------------------- pretraining ------------------------------------
def cosine_lr(peak, step, total):
    return peak * 0.5 * (1 + math.cos(math.pi * step / total))


def autocast(device, cfg):  # of the network; the losses compute in float32 even then
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


def pretrain(encoder, train, cfg):
    """Train `encoder` by SGD, from the last checkpoint if there is one. Returns the seconds."""
    m, per_epoch = cfg.batch_size, len(train) // cfg.batch_size
    optimizer = torch.optim.SGD(encoder.parameters(), cfg.lr, cfg.momentum,
                                weight_decay=cfg.weight_decay)
    session = Pretraining(encoder, optimizer, per_epoch, cfg)
    model = distribute(encoder, train.device).train()
    for epoch in range(session.step // per_epoch, cfg.epochs):
        order = torch.randperm(len(train), generator=rng(cfg.seed, "order", epoch))
        batches = list(enumerate(order[:m * per_epoch].split(m), epoch * per_epoch))
        left = batches[session.step % per_epoch:]  # all, unless the run was killed in this epoch
        for step, x in train.batches(left, cfg.views, n=2, key=(cfg.seed, "views")):
            lr = cosine_lr(cfg.lr, step, session.total)
            optimizer.param_groups[0]["lr"] = lr
            with autocast(train.device, cfg):
                z1, z2 = model(x).chunk(2)  # both views in one pass; [m / ranks, d] each
            loss = LOSSES[cfg.loss](z1, z2, cfg.alpha, cfg.lam, cfg.similarity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.after(step + 1, loss.detach(), lr, z1.detach())
    if world_size() > 1:
        for statistic in encoder.buffers():
            dist.broadcast(statistic, 0)  # without SyncBatchNorm the ranks' batch norms differ
    return session.seconds


class Pretraining:
    """What surrounds the steps: log.jsonl, the line on the screen, and last.pt to resume from."""

    def __init__(self, encoder, optimizer, per_epoch, cfg):
        self.encoder, self.optimizer, self.cfg = encoder, optimizer, cfg
        self.per_epoch, self.total = per_epoch, cfg.epochs * per_epoch
        self.step, self.seconds = 0, 0.0
        if (cfg.out / "last.pt").exists():
            state = load_checkpoint(cfg.out / "last.pt", encoder)
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            done = self.step == self.total
            say("already trained" if done else f"resuming at step {self.step} of {self.total}")
        elif cfg.save_every:
            self.save("epoch0000.pt")
        self.first, self.started = self.step, time.perf_counter()
        self.saved = self.started
        self.progress = Progress("pretraining", self.step)

    def after(self, step, loss, lr, z1):
        """Log and save after `step` steps; loss and z1 [m / ranks, d] are this rank's."""
        cfg, self.step, epoch_ends = self.cfg, step, step % self.per_epoch == 0
        if not (epoch_ends or step % 10 == 0 or step == self.first + 1):
            return
        loss = gather_rows(loss[None], world_size()).mean().item()
        if not math.isfinite(loss):
            refuse(f"the loss is {loss} at step {step}: lower --lr")
        if rank() > 0:
            return
        now, epoch = time.perf_counter(), step / self.per_epoch
        speed = (step - self.first) * cfg.batch_size / (now - self.started)
        spread = F.normalize(z1.float(), dim=1).var(0, correction=0).sum().item()  # 0: collapse
        line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "spread": spread,
                "images_per_second": round(speed, 1)}
        if cfg.loss == "balanced" and cfg.similarity == "cosine":
            line["above_floor"] = loss - loss_floor(cfg.batch_size, cfg.alpha, cfg.lam)
        floor = f" (floor +{line['above_floor']:.3f})" if "above_floor" in line else ""
        with open(cfg.out / "log.jsonl", "a") as log:  # steps repeated after a kill appear twice
            log.write(json.dumps(line) + "\n")
        self.progress(step, self.total, f"epoch {epoch:.1f}/{cfg.epochs}  loss {loss:.3f}{floor}  "
                      f"lr {lr:.3g}  {speed:.0f} img/s", epoch_ends or step == self.first + 1)
        if cfg.save_every and epoch_ends and epoch % cfg.save_every == 0:
            self.save(f"epoch{epoch:04.0f}.pt")  # is kept, for the bounds over epochs (Fig. 6)
        if epoch_ends or now - self.saved > 60 * cfg.save_minutes:
            self.seconds, self.saved = self.seconds + now - self.saved, now
            self.save("last.pt", optimizer=self.optimizer.state_dict(), seconds=self.seconds)

    def save(self, name, **more):
        if rank() == 0:
            backbone, projector = self.encoder.backbone, self.encoder.projector
            save_file(self.cfg.out / name, {
                "backbone": backbone.state_dict(), "projector": projector.state_dict(),
                "step": self.step, "config": identity(self.cfg), **more})


def save_file(path, content):
    """Text, or a state for load_file. A kill at any moment leaves the old file or the new one."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def load_file(path):
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))  # runs no code of it
    except Exception as error:  # a damaged file makes the unpickler raise anything
        reason = str(error).split("\n")[0][:160] or type(error).__name__
        refuse(f"cannot read {path} as a checkpoint: {reason}")


def load_checkpoint(path, encoder):
    """Put the weights of a checkpoint into `encoder`. Returns all that the checkpoint holds."""
    state = load_file(path)
    try:
        encoder.backbone.load_state_dict(state["backbone"])
        encoder.projector.load_state_dict(state["projector"])
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        refuse(f"{path} does not fit this network ({reason}); --init takes what does")
    return state


# ----------------------------------------- evaluation -------------------------------------
@torch.no_grad()
def extract(backbone, data, cfg):
    """Features [N, d] float32 and labels [N] of the plain images, on every rank."""
    backbone.eval()
    rows = torch.arange(len(data)).split(512)
    features, progress = [], Progress("features")
    for step, x in data.batches(enumerate(rows)):
        with autocast(data.device, cfg):
            x = backbone(x).float()
        features.append(gather_rows(x, len(rows[step])))
        progress(step + 1, len(rows))
    return torch.cat(features), data.labels.to(data.device)


def nearest(bank, queries, k):
    """[Q, k]: the rows of bank [N, d] most cosine-similar to queries [Q, d], nearest first."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    return torch.cat([(some @ bank.T).topk(k).indices for some in queries.split(256)])


def knn_predict(train_features, train_labels, test_features, k):
    """Labels [Q] of test_features [Q, d] by the majority of the k most cosine-similar of
    train_features [N, d] (A.4.2); of equal votes, the class of the nearest neighbour wins."""
    voters = train_labels[nearest(train_features, test_features, k)]  # [Q, k], nearest first
    votes = [(voters == label[:, None]).sum(1) for label in voters.T]  # of the j-th one's label
    winner = torch.stack(votes, 1).argmax(1, keepdim=True)  # first maximum: the nearest of equals
    return voters.gather(1, winner).squeeze(1)


def percent(chosen):
    return 100 * chosen.double().mean().item()


def knn(encoder, train, features, cfg):
    """Top-1 accuracy in % by the k nearest training images, for each k."""
    (bank, labels), (queries, answers) = features
    found = {}
    for k in cfg.k:
        k = min(k, len(bank))
        found[f"knn{k}"] = percent(knn_predict(bank, labels, queries, k) == answers)
    return found


def linear(encoder, train, features, cfg):
    """Top-1 accuracy in % of a linear classifier on the frozen backbone (A.3.1, A.4.1)."""
    (bank, labels), (queries, answers) = features
    if cfg.probe == "features":
        predicted = linear_predict(bank, labels, queries, cfg.probe_l2)
    else:
        predicted = train_on_crops(encoder.backbone, train, bank.shape[1], cfg)(queries).argmax(1)
    return {"linear": percent(predicted == answers)}


def checksum(module):
    return [value.double().sum().item() for value in module.state_dict().values()]


def linear_predict(train_features, train_labels, test_features, l2):
    """Labels [Q] by multinomial logistic regression: cross-entropy + (l2 / 2)‖W‖², by L-BFGS, which
    has no learning rate to tune. Features get unit length, then each dimension is standardised.
    """
    bank, queries = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    mean, std = bank.mean(0), bank.std(0).clamp(min=1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    weight = bank.new_zeros(int(train_labels.max()) + 1, bank.shape[1], requires_grad=True)
    offset = bank.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, offset], max_iter=100, line_search_fn="strong_wolfe")
    progress = Progress("linear classifier")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(bank, weight, offset), train_labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        evaluated = optimizer.state[weight].get("func_evals", 0)  # L-BFGS counts them there
        progress(evaluated + 1, optimizer.defaults["max_eval"])
        return loss

    optimizer.step(closure)
    progress(1, 1)  # L-BFGS may stop early
    return F.linear(queries, weight, offset).argmax(1)


class LARS(torch.optim.Optimizer):
    """SGD with momentum; the step of a weight matrix is scaled by trust·‖w‖/‖gradient‖ (You et al.,
    2017). Biases and other 1-d parameters are not scaled. No weight decay, as in SimSiam."""

    def __init__(self, params, lr, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                ratio = group["trust"] * p.norm() / p.grad.norm() if p.dim() > 1 else 1
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * buffer.mul_(group["momentum"]).add_(ratio * p.grad))


def train_on_crops(backbone, train, width, cfg):
    """A linear classifier trained on a fresh crop and flip of each image in every epoch. Each rank
    passes its share of a batch through the backbone, then all make the same step. On ImageNet
    this is long, so it resumes after its last finished epoch."""
    backbone.eval()
    torch.manual_seed(cfg.seed)
    classifier = nn.Linear(width, len(train.classes)).to(train.device)
    batch = min(cfg.probe_batch, len(train))
    per_epoch, peak = math.ceil(len(train) / batch), cfg.probe_lr * batch / 256
    kind = {"sgd": torch.optim.SGD, "lars": LARS}[cfg.probe_optimizer]
    optimizer = kind(classifier.parameters(), lr=peak, momentum=0.9)
    first, frozen, path = 0, checksum(backbone), cfg.out / "classifier.pt"
    state = load_file(path) if path.exists() else {}
    if state.get("backbone") == frozen:
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    size = train.images.shape[-1] if train.in_memory else cfg.size  # as the test images have it
    views = Views(["flip"], size, (0.08, 1.0))
    progress = Progress("linear classifier", first * per_epoch)
    for epoch in range(first, cfg.probe_epochs):
        order = torch.randperm(len(train), generator=rng(cfg.seed, "classifier", epoch))
        batches = order.split(batch)
        steps = enumerate(batches, epoch * per_epoch)
        for step, x in train.batches(steps, views, key=(cfg.seed, "classifier views")):
            with torch.no_grad(), autocast(train.device, cfg):
                x = torch.cat([backbone(some).float() for some in x.split(512)])
            y = train.labels[batches[step % per_epoch]]
            loss = F.cross_entropy(classifier(gather_rows(x, len(y))), to_device(y, x.device))
            optimizer.param_groups[0]["lr"] = cosine_lr(peak, step, cfg.probe_epochs * per_epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress(step + 1, cfg.probe_epochs * per_epoch)
        if rank() == 0:
            save_file(path, {"backbone": frozen, "epoch": epoch + 1,
                             "classifier": classifier.state_dict(),
                             "optimizer": optimizer.state_dict()})
    assert checksum(backbone) == frozen, "the classifier's training changed the backbone"
    return classifier


# ----------------------------------------- theory -----------------------------------------
# What the paper assumes, bounds or explains, measured on training images and their labels.
# f(t(x)) is the projection of unit length (Assumption 4.2), unless another space is named.
@torch.no_grad()
def embed(encoder, data, cfg, *key, n=1, groups=1):
    """(unit projections, raw projections, backbone features), each [N, groups, d]: means over
    n / groups views of each image, on every rank. The same key gives the same t to the same row.

    In float32 even where training is not: rounding would be a distance, too.
    """
    encoder.eval()
    rows = torch.arange(len(data)).split(max(1, 512 // n))
    progress = Progress(f"theory, {key[0]}")
    spaces = [], [], []
    for step, x in data.batches(enumerate(rows), cfg.views, n, (cfg.seed, *key)):
        features = encoder.backbone(x)
        raw = encoder.projector(features)
        for space, z in zip(spaces, (F.normalize(raw, dim=1), raw, features)):
            z = z.unflatten(0, (groups, n // groups, -1)).mean(1).transpose(0, 1)  # [b, groups, d]
            space.append(gather_rows(z.contiguous(), len(rows[step])))
        progress(step + 1, len(rows))
    return [torch.cat(space) for space in spaces]


def theory_images(train, cfg):
    """The training images to measure on, their labels renumbered 0 … C−1 without gaps."""
    n = min(cfg.theory_images, len(train))
    data = train.select(balanced_subset(train.labels, n, "theory"))
    data.labels = data.labels.unique(return_inverse=True)[1]
    if data.labels.bincount().min() < 2:
        refuse("bias and bounds compare images of a class, and some class has one image only: "
               "raise --theory-images or --limit")
    return data, data.labels.to(train.device)


def class_means(x, labels):
    """x [N, ...], labels [N] of 0 … C−1, all present -> [C, ...]."""
    sums = x.new_zeros(int(labels.max()) + 1, *x.shape[1:]).index_add_(0, labels, x)
    return sums / labels.bincount().view(-1, *[1] * (x.dim() - 1))


def mean_length(gaps):
    """Mean distance between two expectations over T, and its standard error.

    gaps: [N, 2, d], their difference, estimated from each half of K views. An estimate from K views
    has a squared length too large by about c/K, one from K/2 views by 2c/K. So twice the former
    minus the latter is free of c (Richardson extrapolation), if the N lengths are similar.
    """
    whole = gaps.mean(1).norm(dim=1)  # [N]
    half = gaps.norm(dim=2).mean(1)  # [N]
    square = 2 * whole.mean() ** 2 - half.mean() ** 2
    slope = 4 * whole.mean() * whole - 2 * half.mean() * half  # of the square: delta method
    error = slope.std() / math.sqrt(len(gaps))  # of the square, which may be near 0
    return square.clamp(min=0).sqrt().item(), (error / (2 * square.maximum(error).sqrt())).item()


def eq16(halves, labels):
    """Prototype representation bias, Eq. 16: E‖E[f(T(X))|y] − E f(T(x))‖, and its standard error.

    halves: [N, 2, d], means over two halves of K views. An image is part of its class's mean.
    """
    return mean_length(class_means(halves, labels)[labels] - halves)


def bias(encoder, train, features, cfg):
    """Eq. 51, the paper's estimate of the bias, and Eq. 16, the bias, in three spaces (A.3.2).

    Eq. 51 applies the same t to an image and to another one of its class; by Jensen's inequality
    it is an upper bound of Eq. 16. Neither has a scale of its own. So `relative` divides Eq. 51 by
    the mean distance of two random views, and Eq. 16 by that of two random images' mean views.
    """
    data, labels = theory_images(train, cfg)
    order = torch.randperm(len(data), generator=rng(cfg.seed, "pairs"))
    other = torch.empty_like(order)
    for label in data.labels.unique():
        rows = order[data.labels[order] == label]
        other[rows] = rows.roll(1)  # x′, another image of the class
    views = embed(encoder, data, cfg, "bias")
    other_views = embed(encoder, data.select(other), cfg, "bias")  # the same key: the same t
    means = embed(encoder, data, cfg, "mean views", n=cfg.theory_views, groups=2)
    found = {}
    for space, x, x_other, halves in zip(("", "raw_", "features_"), views, other_views, means):
        distance = (x - x_other).norm(dim=2)  # [N, 1]
        eq51, eq51_error = distance.mean().item(), distance.std().item() / math.sqrt(len(data))
        eq16_value, eq16_error = eq16(halves, labels)
        random_views = (x[order] - x[order.roll(1)]).norm(dim=2).mean().item()
        random_means = mean_length(halves[order] - halves[order.roll(1)])[0]
        found |= {f"{space}eq51": eq51, f"{space}eq51_error": eq51_error,
                  f"{space}eq16": eq16_value, f"{space}eq16_error": eq16_error,
                  f"{space}eq51_relative": eq51 / random_views if random_views else None,
                  f"{space}eq16_relative": eq16_value / random_means if random_means else None}
    return found


def theorem_sides(anchor, mean_view, bank, labels, alpha):
    """Both sides of Theorems 4.4 and 4.6 for each anchor f(t(x)) of unit length: {name: [N]}.

    anchor, bank: [N, d], one view of each image, drawn independently; mean_view: [N, d], E f(T(x)).
    B = (1/α) log Σ_y E[exp(α s) | y] (Eq. 46). Each image of the bank has its own t′; in a large
    bank, by Jensen, that B is no smaller than with one t′ for all.

    The paper bounds max over y′ ≠ y of s(f, prototype of y′) by B/ν. Its Case 1 (Eq. 38) replaces
    a prototype's length by the smaller ν, which makes a negative number smaller. So the bound
    holds where B ≥ 0 (sufficient, not necessary; α ≤ log C is enough), and max(B, B/ν) always.
    """
    classes = torch.arange(int(labels.max()) + 1, device=labels.device)
    own = labels[:, None] == classes  # [N, C]
    prototypes = class_means(bank, labels)  # [C, d]
    log_count = labels.bincount().to(anchor.dtype).log()[labels]  # [N], of each bank image's class
    parts = [(alpha * rows @ bank.T - log_count).logsumexp(1) for rows in anchor.split(1024)]
    b = torch.cat(parts) / alpha
    nu = prototypes.norm(dim=1).expand(own.shape).masked_fill(own, math.inf).amin(1)
    to_prototypes = anchor @ F.normalize(prototypes, dim=1).T  # [N, C]
    return {"attract_left": -F.cosine_similarity(anchor, mean_view),  # Eq. 8
            "attract_right": -(anchor * mean_view).sum(1),
            "repel_left": to_prototypes.masked_fill(own, -math.inf).amax(1),  # Eq. 10
            "repel_right": b / nu, "b": b, "nu": nu}


def bounds(encoder, train, features, cfg):
    """How tight Theorems 4.4 (K views) and 4.6 (one view of each image as bank) are: mean gaps,
    right minus left side (A.4.5, Fig. 6), and the share of images where a bound fails.

    Also what they assume: the angle between f(t(x)) and the mean view, at most 90° by Assumption
    4.3; ν; how often B < 0. Eq. 17's λ is Eq. 2's over ν.
    """
    data, labels = theory_images(train, cfg)
    anchor = embed(encoder, data, cfg, "anchors")[0][:, 0]
    mean_view = embed(encoder, data, cfg, "mean views", n=cfg.theory_views)[0][:, 0]
    bank = embed(encoder, data, cfg, "bank")[0][:, 0]
    side = theorem_sides(anchor, mean_view, bank, labels, cfg.alpha)
    angle = (-side["attract_left"]).clamp(-1, 1).acos().rad2deg()
    found = {"angle": angle.mean().item(), "angle_over_90": percent(angle > 90),
             "nu": side["nu"].min().item(), "b_negative": percent(side["b"] < 0)}
    for name in ("attract", "repel"):
        gap = side[f"{name}_right"] - side[f"{name}_left"]
        found |= {f"{name}_gap": gap.mean().item(), f"{name}_fails": percent(gap < -1e-6)}
    return found


EVALUATIONS = {"knn": knn, "linear": linear, "bias": bias, "bounds": bounds}


# ----------------------------------------- more data --------------------------------------
def read_folders(cfg):
    """[(files, labels, classes)] of the training and, if there are any, the test images."""
    places = [cfg.data / name for name in ("train", "val", "test") if (cfg.data / name).is_dir()]
    places = places[:2] if cfg.data / "train" in places else [cfg.data]
    splits = [read_folder(place) for place in places]
    files, labels, classes = splits[0]
    odd = sorted(set(classes) ^ set(splits[-1][2]))
    if odd:
        refuse(f"the class {odd[0]} is not in both {places[0]} and {places[1]}")
    if len(splits) == 2 or not classes or cfg.dataset != "folder":
        return splits
    tenth = (labels.bincount() / 10).ceil().minimum(labels.bincount() - 1)
    test = rank_within_class(labels, "held out") < tenth[labels]
    if not test.any():  # one image a class
        return splits
    say(f"no test images: a fixed tenth of each class is held out ({test.sum()} images)")
    return [(files[chosen], labels[chosen], classes) for chosen in (~test, test)]


def read_folder(folder):
    """(files, labels [N], classes) of folder/<class>/…, all that Pillow reads and is not hidden.
    Images beside the class folders, or fewer than two of these: no labels, all are −1."""
    kinds = Image.registered_extensions().items()
    never = "BUFR", "GRIB", "HDF5", "MPEG"  # Pillow knows their names only
    readable = tuple(end for end, kind in kinds if kind in Image.OPEN and kind not in never)
    names = glob.glob("**", root_dir=folder, recursive=True)  # hidden files are not among them
    names = sorted(name for name in names if name.lower().endswith(readable))
    if not names:
        refuse(f"there is no image in {folder}: --data names a folder of images, or one that holds "
               "train/<class>/ and val/<class>/")
    files = np.array([os.path.join(folder, name) for name in names])
    classes, labels = np.unique([name.split(os.sep)[0] for name in names], return_inverse=True)
    if len(classes) < 2 or not all(os.sep in name for name in names):
        return files, torch.full([len(files)], -1), []
    return files, torch.from_numpy(labels), classes.tolist()


def read_all(files, size):
    """Small images, which fit into memory: uint8 [N, 3, size, size]."""
    pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    progress = Progress("reading images")
    for row, file in enumerate(files):
        image = read_image(file)
        if image.size != (size, size):
            raise ImageError(f"{file} is not {size}×{size} pixels: --dataset folder takes any size")
        pixels[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        progress(row + 1, len(files))
    return pixels


def read_torchvision(dataset, root):
    """CIFAR-10, CIFAR-100 or STL-10 in torchvision's layout, downloaded if they are not there."""
    kind, stl = getattr(torchvision.datasets, dataset.upper()), dataset == "stl10"
    try:
        if rank() > 0:
            dist.barrier()  # rank 0 downloads, the others wait
        parts = [kind(root, split, download=rank() == 0)
                 for split in (["train+unlabeled", "test"] if stl else [True, False])]
        if rank() == 0 and world_size() > 1:
            dist.barrier()
    except (OSError, RuntimeError) as error:
        refuse(f"{dataset} is not in {root} and cannot be downloaded ({error}): put torchvision's "
               f"files or class folders train/ and test/ there")
    return [(torch.tensor(part.data if stl else part.data.transpose(0, 3, 1, 2)),
             torch.tensor(part.labels if stl else part.targets).long(), part.classes)
            for part in parts]


def rank_within_class(labels, *key):
    """[N]: 0 for the first image of its class in a random order, 1 for the second, and so on."""
    place, shuffled = torch.empty_like(labels), torch.randperm(len(labels), generator=rng(*key))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.unique(return_counts=True)[1].tolist()
    place[by_class] = torch.cat([torch.arange(count) for count in counts])
    return place


def balanced_subset(labels, n, *key):
    """Rows of n images, as equal in number per class as possible: a pure function of the key."""
    if n > len(labels):
        refuse(f"{n} images are more than the {len(labels)} that there are")
    return rank_within_class(labels, *key).argsort(stable=True)[:n].sort().values


def training_subset(cfg, images, labels):
    """Rows that --subset-file, --subset and --limit keep (A.3.4)."""
    if cfg.subset_file:  # a line: <class>/<file>, perhaps folders before it and a label after it
        files = [] if torch.is_tensor(images) else images
        row_of = {"/".join(Path(name).parts[-2:]): row for row, name in enumerate(files)}
        lines = [line.strip() for line in open(cfg.subset_file) if line.strip()]
        names = ["/".join(Path(line).parts[-2:]) for line in lines]
        names = [name if name in row_of else name.rsplit(None, 1)[0] for name in names]
        if not names or not row_of.keys() >= set(names):
            refuse(f"--subset-file {cfg.subset_file} must list files of training images")
        return torch.tensor(sorted({row_of[name] for name in names}))
    if cfg.subset == "full":
        return balanced_subset(labels, cfg.limit, "limit")  # the same images for every seed
    rows = (labels >= 0).nonzero().squeeze(1)
    if not len(rows):
        refuse(f"--subset {cfg.subset} needs labels")
    labels, sizes = labels[rows], labels[rows].bincount()
    total = cfg.limit or round(len(rows) * 115_846 / 1_281_167)  # ImageNet-LT's share
    if cfg.subset == "uni":
        return rows[balanced_subset(labels, total, "subset", cfg.seed)]
    counts, generator = torch.zeros_like(sizes), rng("subset", cfg.seed)
    for count in long_tailed_counts(len(sizes), total, min(1280, int(sizes.max()))):
        free = ((sizes >= count) & (counts == 0)).nonzero().squeeze(1)  # large enough, unused
        if not len(free):
            refuse(f"no class is left that has {count} images: lower --limit")
        counts[free[torch.randint(len(free), [], generator=generator)]] = count
    return rows[rank_within_class(labels, "subset", cfg.seed) < counts[labels]]


def long_tailed_counts(classes, total, largest=1280, smallest=5, shape=6):
    """ImageNet-LT's class sizes (A.3.4), the largest first: `smallest` plus quantiles of a Pareto
    law (Lomax, from 0), scaled and clipped at `largest` so that the sum is `total`."""
    if not smallest * classes <= total <= largest * classes:
        refuse(f"{classes} classes of {smallest} to {largest} images cannot have {total} "
               f"images: change --limit")
    tail = ((np.arange(classes) + 0.5) / classes) ** (-1 / shape) - 1
    low, high = 0.0, largest / tail.min()
    for _ in range(100):  # bisection: the sum grows with the scale
        scale = (low + high) / 2
        sizes = np.minimum(smallest + scale * tail, largest)
        low, high = (scale, high) if sizes.sum() < total else (low, scale)
    return np.diff(sizes.cumsum().round().astype(int), prepend=0).tolist()  # integers, same sum


PATTERNS = {  # kinds of drawn pattern, by two coordinates u, v and a distance r; a period is 2π
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
    """n drawn images of eight kinds of pattern: uint8 [n, 3, 32, 32], labels [n], class names.

    All palettes are nearly the same grey: two views of an image share its palette, so with free
    colours the network would tell images apart by colour and never learn the patterns.
    """
    generator = rng("patterns", split)

    def random(low, high):
        return torch.empty(n, 1, 1).uniform_(low, high, generator=generator)

    axis = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle, frequency = random(0, 2 * math.pi), random(6, 13)
    u = frequency * (x * angle.cos() + y * angle.sin()) + random(0, 2 * math.pi)
    v = frequency * (y * angle.cos() - x * angle.sin()) + random(0, 2 * math.pi)
    r = frequency * torch.hypot(x - random(-0.5, 0.5), y - random(-0.5, 0.5))
    labels = torch.arange(n) % len(PATTERNS)
    drawn = torch.stack([pattern(u, v, r) for pattern in PATTERNS.values()], 1)  # [n, 8, 32, 32]
    contrast = random(0.25, 0.35) * random(-1, 1).sign()
    pixels = random(0.45, 0.55) + contrast * torch.tanh(4 * drawn[torch.arange(n), labels])
    pixels = pixels[:, None] + 0.01 * torch.randn(n, 3, 1, 1, generator=generator)  # the palette
    pixels = pixels + 0.05 * torch.randn(n, 3, 32, 32, generator=generator)  # noise
    return (255 * pixels.clamp(0, 1)).byte(), labels, list(PATTERNS)


# ----------------------------------------- output -----------------------------------------
class Progress:
    """The stage of the work and the time left: on a terminal in one line that rewrites itself,
    elsewhere in a new line once a minute, and whenever `always` asks for it."""

    def __init__(self, stage, first=0):
        self.stage, self.first, self.started = stage, first, time.perf_counter()
        self.due = self.started + 1

    def __call__(self, done, total, text="", always=False):
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        if rank() > 0 or not (always or now > self.due or terminal and done == total):
            return
        self.due = now + (0.2 if terminal else 60)
        left = (now - self.started) / (done - self.first) * (total - done)
        text = text or f"{self.stage} {100 * done / total:.0f} %"
        line = f"{text}  {timedelta(seconds=round(left))} left"
        if terminal:  # wipe the line; the end leaves it empty
            line = "\x1b[2K" + (line[:79] if done < total else "")
        print(line, end="\r" if terminal else "\n", file=sys.stderr, flush=True)


def tiles_of(data, rows, views=None, n=1, side=64):
    """The images of these rows, or n views of each, view by view: [.., 3, side, side] in [0, 1]."""
    order = [(0, rows.repeat_interleave(world_size()))]  # only rank 0 draws: its share is all rows
    _, x = next(data.batches(order, views, n, ("picture",)))
    mean, std = mean_and_std(x.device)
    return F.interpolate(x * std + mean, (side, side), mode="bilinear", antialias=True).cpu()


def draw_views(data, cfg):
    """views.png: 12 images, each followed by two of its views, which the network is to match."""
    rows = balanced_subset(data.labels, min(12, len(data)), "picture")
    tiles = torch.stack([tiles_of(data, rows), *tiles_of(data, rows, cfg.views, 2).chunk(2)], 1)
    torchvision.utils.save_image(tiles.flatten(0, 1), cfg.out / "views.png", nrow=12, pad_value=1)


def draw_neighbors(train, test, backbones, cfg):
    """neighbors.png: 8 test images, each followed by its 8 nearest training images, by features of
    the untrained backbone (if measured) in the upper row and of the trained one below. The right
    class has a green frame. Without test images, training images look among the others.

    backbones: for each, the (features, labels) of the training and of the test images.
    """
    rows, lines = balanced_subset(test.labels, min(8, len(test)), "picture"), []
    for features in backbones:
        bank, queries = features[0][0], features[-1][0][rows.numpy()]
        near = nearest(bank, queries, min(9, len(train))).cpu()  # [q, 9]
        if train is test:  # the image itself comes last
            itself = (near == rows[:, None]).int()
            near = near.gather(1, itself.argsort(dim=1, stable=True))[:, :-1]
        near = near[:, :8]
        right = (train.labels[near] == test.labels[rows, None]) & (train.labels[near] >= 0)
        colour = torch.where(F.pad(right, [1, 0])[..., None], torch.tensor([0.1, 0.7, 0.2]), 1.0)
        tiles = colour[..., None, None].repeat(1, 1, 1, 72, 72)  # [q, 9, 3, 72, 72]: the frames
        tiles[:, 0, :, 4:-4, 4:-4] = tiles_of(test, rows)
        tiles[:, 1:, :, 4:-4, 4:-4] = tiles_of(train, near.flatten()).unflatten(0, near.shape)
        lines.append(tiles)
    tiles, path = torch.stack(lines, 1), cfg.out / "neighbors.png"  # [q, backbones, 9, 3, 72, 72]
    torchvision.utils.save_image(tiles.flatten(0, 2), path, nrow=tiles.shape[2], pad_value=1)


def export(path, features, parts):
    """FILE.npz: features of the backbone, labels, file names (if any) and names of the classes."""
    arrays = {"classes": np.array(parts[0].classes)}
    for name, (x, labels), data in zip(("train", "test"), features, parts):
        arrays |= {f"{name}_features": x.cpu().numpy(), f"{name}_labels": labels.cpu().numpy()}
        if not data.in_memory:
            arrays[f"{name}_files"] = data.images
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    say(f"{path} holds the features of {' + '.join(str(len(data)) for data in parts)} images")


MEANINGS = {  # the figures that are printed; results.json has more
    "linear": "linear classifier, % right",
    "eq51_relative": "bias, Eq. 51 relative (lower is better)",
    "eq16_relative": "bias, Eq. 16 relative (lower is better)",
    "attract_gap": "gap of Theorem 4.4's bound (lower is tighter)",
    "repel_gap": "gap of Theorem 4.6's bound (lower is tighter)",
    "repel_fails": "images where that bound fails, %",
    "angle_over_90": "images that break Assumption 4.3, %",
    "nu": "shortest class prototype, ν (0 to 1)",
}


def read_figures(folder):
    """{stage: {name: value}} of the run in this folder: what is printed of its results.json."""
    path, stages = folder / "results.json", {}
    results = json.loads(path.read_text()) if path.exists() else {}
    for stage in ("untrained", "trained"):
        for figures in results.get(stage, {}).values():
            known = {name: value for name, value in figures.items() if value is not None
                     and (name in MEANINGS or name.startswith("knn"))}
            stages[stage] = stages.get(stage, {}) | known
    return stages


def markdown(rows):
    """Print a table; rows[0] is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def first_line(log):
    """{"config": …, "images": …}: what a run logs before its first step."""
    try:
        line = json.loads(open(log).readline())
    except ValueError:
        line = {}
    if "config" not in line:
        refuse(f"{log} is not the log of a run")
    return line


def report(folders):
    """Print one table of the runs below these folders: the settings that differ, then figures of
    the last backbone, as mean ± standard deviation over the runs that differ in their seed only."""
    groups, names = {}, {}
    for log in sorted({log for place in folders for log in place.rglob("log.jsonl")}):
        config, stages = first_line(log)["config"], read_figures(log.parent)
        figures = stages.get("trained", {} if config["epochs"] else stages.get("untrained", {}))
        config.pop("seed")
        groups.setdefault(json.dumps(config), []).append(figures)
        names |= figures
    if not groups:
        refuse(f"--report: there is no run in {' '.join(map(str, folders))}")
    configs = [json.loads(text) for text in groups]
    differ = [key for key in configs[0] if any(c.get(key) != configs[0][key] for c in configs)]
    rows = [[*differ, "finished runs", *names]]
    for config, runs in zip(configs, groups.values()):
        row = [str(config.get(key)) for key in differ]
        row.append(f"{sum(map(bool, runs))} of {len(runs)}")
        for name in names:
            values = [figures[name] for figures in runs if name in figures]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            row.append(f"{np.mean(values):.4g}{spread}" if values else "–")
        rows.append(row)
    markdown(rows)


# ----------------------------------------- command line -----------------------------------
RESNETS = ["resnet8", "resnet10",
           *torchvision.models.list_models(torchvision.models, "*resne[tx]*")]
# Every flag: its default, what it is, and its choices. Defaults are the CIFAR-10 recipe (A.4.1);
# a type in place of a default means that there is none.
FLAGS = {
    "data": (Path, "where the images are"),
    "alpha": (2.0, "α, sharpness of the softmax over negatives: 1 / temperature"),
    "lam": (4.0, "λ, weight of repelling against attracting"),
    "loss": ("balanced", "Eq. 17, or generalized NT-Xent", LOSSES),
    "similarity": ("cosine", "of projections (Table 1)", ["cosine", "dot", "euclidean"]),
    "epochs": (200, "of pretraining; 0 evaluates the untrained backbone"),
    "batch_size": (512, "images per step over all processes; twice as many views"),
    "lr": (0.1, "SGD's peak, then a cosine; gradients are 1/α of the usual NT-Xent's"),
    "momentum": (0.9, "of SGD"),
    "weight_decay": (1e-4, "of SGD, on all parameters"),
    "backbone": ("resnet18", "a ResNet of torchvision, or one block a stage", RESNETS),
    "stem": ("cifar", "cifar: 3×3, no stride, no pooling", ["cifar", "imagenet"]),
    "projector": ([2048, 2048], "widths of its layers"),
    "size": (32, "pixels of a crop's side; images in memory are evaluated at their own size"),
    "crop_scale": ([0.08, 1.0], "smallest and largest share of the image in a crop"),
    "augmentations": (["flip", "color_jitter", "grayscale"], "after the crop, in this order",
                      AUGMENTATIONS),
    "drop": ([], "augmentations to leave out (Fig. 3)", DROPPABLE),
    "add": ([], "augmentations to append (Fig. 3)", AUGMENTATIONS),
    "precision": ("float32", "of the network; on CUDA bfloat16", ["float32", "bfloat16"]),
    "seed": (0, "of weights, order and views"),
    "init": (Path, "start from this checkpoint or torchvision state dict"),
    "checkpoint": (Path, "evaluate this checkpoint instead of pretraining"),
    "limit": (0, "train on this many images, without --subset the same for every seed; 0: all"),
    "subset": ("full", "long-tailed as ImageNet-LT, or uniform of that size (A.3.4)",
               ["full", "lt", "uni"]),
    "subset_file": (Path, "train on the images that this file lists"),
    "k": ([1, 10], "nearest neighbours that vote"),
    "probe": ("crops", "linear classifier on fresh crops, or on features made once",
              ["crops", "features"]),
    "probe_optimizer": ("sgd", "on crops", ["sgd", "lars"]),
    "probe_lr": (30.0, "on crops, for a batch of 256"),
    "probe_batch": (256, "on crops"),
    "probe_epochs": (90, "on crops"),
    "probe_l2": (0.03, "on features: weight of ‖W‖²/2 beside the mean cross-entropy"),
    "theory_images": (50_000, "training images that theory is measured on, at most"),
    "theory_views": (10, "K, even: views of an image that stand for E_T"),
    # What follows may change without making it a different run.
    "out": (Path, "run directory, by default under runs/; the same command resumes it"),
    "eval": (["knn", "linear"], "what to measure; with no names nothing", EVALUATIONS),
    "baseline": (True, "evaluate the untrained backbone, too"),
    "export": (Path, "write features to this .npz file"),
    "save_every": (0, "keep a checkpoint of every Nth epoch (Fig. 6); 0: only the last"),
    "save_minutes": (10.0, "save within long epochs, too"),
    "workers": (8, "processes of each rank that read files, at most one a core"),
}
# What makes a run this run: the data set and the flags above "out".
IDENTITY = ["dataset", *list(FLAGS)[:list(FLAGS).index("out")]]
RECIPES = {  # what differs from the above
    "patterns": dict(  # ours: drawn images, for the demonstration
        alpha=4.0, lam=2.0, epochs=7, batch_size=128, lr=0.5, backbone="resnet8", stem="imagenet",
        projector=[512, 128], crop_scale=[0.3, 1.0], k=[5], probe="features", theory_images=256,
        eval=["knn", "linear", "bias", "bounds"]),
    "cifar10": {}, "cifar100": {},
    "stl10": dict(stem="imagenet", size=96),  # ours
    "imagenet": dict(  # A.3.1; LARS as in SimSiam
        alpha=4.0, lam=2.0, epochs=100, backbone="resnet50", stem="imagenet",
        projector=[2048, 2048, 2048], size=224, crop_scale=[0.2, 1.0],
        augmentations=["color_jitter", "grayscale", "gaussian_blur", "flip"], k=[200],
        probe_optimizer="lars", probe_lr=0.1, probe_batch=4096, baseline=False),
    "folder": dict(  # ours: own photographs
        alpha=4.0, lam=2.0, epochs=100, batch_size=128, backbone="resnet18", stem="imagenet",
        projector=[512, 128], size=128, crop_scale=[0.2, 1.0], k=[5], probe="features",
        augmentations=["color_jitter", "grayscale", "gaussian_blur", "flip"]),
}


def identity(cfg):
    """What makes a run this run, as JSON gives it back."""
    config = {key: vars(cfg)[key] for key in IDENTITY}
    return json.loads(json.dumps(config, default=str))


def recipe_of(dataset):
    recipe = {name: None if isinstance(default, type) else default
              for name, (default, *_) in FLAGS.items()} | RECIPES[dataset]
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        recipe["precision"] = "bfloat16"
    return {**recipe, "dataset": dataset, "data": Path("data", dataset)}


def parse_flags(argv=None):
    """The configuration: the recipe of the data set, or a checkpoint's own, changed by flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=False,
                                     allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--report", nargs="+", type=Path, metavar="DIR",
                        help="compare the runs in these directories, and do nothing else")
    parser.add_argument("--dataset", choices=RECIPES, help="selects the recipe")
    for name, (default, meaning, *choices) in FLAGS.items():
        kind = default if isinstance(default, type) else type(default)
        meaning += " (default: %(default)s)"
        options = {"help": meaning, "choices": choices[0] if choices else None, "type": kind}
        if kind is list:
            options |= {"nargs": "*", "type": type(default[0]) if default else str}
        elif kind is bool:
            options = {"help": meaning, "action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + name.replace("_", "-"), **options)
    first = parser.parse_known_args(argv)[0]  # --dataset and --checkpoint choose the defaults
    saved = load_file(first.checkpoint).get("config", {}) if first.checkpoint else {}
    if saved and saved.keys() != set(IDENTITY):
        refuse(f"--checkpoint {first.checkpoint} is of another version; --init takes its weights")
    dataset = first.dataset or saved.get("dataset", "patterns")
    foreign = ["data", "limit", "subset", "subset_file"] if dataset != saved.get("dataset") else []
    for key in ["init", *foreign]:  # the weights it began with; what belongs to other images
        saved.pop(key, None)
    parser.set_defaults(**{**recipe_of(dataset), **saved, "dataset": dataset})
    parser.add_argument("-h", "--help", action="help")
    cfg = parser.parse_args(argv)

    dropped = sum((DROPPABLE[name] for name in cfg.drop), [])
    names = [name for name in cfg.augmentations if name not in dropped] + cfg.add
    cfg.views = Views(names, cfg.size, cfg.crop_scale)
    cfg.workers = min(cfg.workers, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if cfg.checkpoint and cfg.out is None:
        cfg.out = cfg.checkpoint.with_name(f"{cfg.checkpoint.stem}-on-{cfg.dataset}")
    cfg.out = cfg.out or Path("runs", "_".join([cfg.dataset, *changes(cfg)]))
    return cfg


def changes(cfg):
    """["lr-0.2", …]: what differs from the recipe, but for the place of the data."""
    named, recipe = [], recipe_of(cfg.dataset)
    for key in IDENTITY:
        value = vars(cfg)[key]
        if value != recipe[key] and key != "data":
            value = value.stem if isinstance(value, Path) else value
            named.append(f"{key}-{'+'.join(map(str, value)) if isinstance(value, list) else value}")
    return named


def check(cfg):
    """Refuse, before any work is done, what would fail late."""
    processes, log = int(os.environ.get("WORLD_SIZE", 1)), cfg.out / "log.jsonl"
    may_be_zero = {"lam", "epochs", "momentum", "weight_decay", "seed", "limit", "probe_l2",
                   "save_every", "workers"}
    for name, value in vars(cfg).items():
        least = 0 if name in may_be_zero else 1e-9
        if type(value) in (int, float) and not least <= value < 2 ** 63:
            refuse(f"--{name.replace('_', '-')} {value} is too small or too large")
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < local:
        refuse(f"torchrun started {local} processes, but there are {gpus} GPUs")
    if cfg.batch_size % processes or cfg.batch_size < 2:
        refuse(f"--batch-size {cfg.batch_size} must be 2 or more and divisible by the number of "
               f"processes, {processes}")
    if min(cfg.k, default=0) < 1 or min(cfg.projector, default=0) < 1:
        refuse("--k and --projector need numbers of at least 1")
    if len(cfg.crop_scale) != 2 or not 0 < cfg.crop_scale[0] <= cfg.crop_scale[1] <= 1:
        refuse("--crop-scale takes two shares between 0 and 1, the smaller first")
    if len(set(cfg.views.names)) < len(cfg.views.names):
        refuse(f"an augmentation comes twice: {' '.join(cfg.views.names)}")
    for name in cfg.drop:
        if not set(DROPPABLE[name]) & set(cfg.augmentations):
            refuse(f"--drop {name}: the recipe has none")
    if cfg.subset_file and (cfg.limit or cfg.subset != "full"):
        refuse("--subset-file leaves nothing to choose to --subset and --limit")
    if cfg.theory_views % 2:
        refuse(f"--theory-views {cfg.theory_views} must be even")
    config = first_line(log)["config"] if log.exists() else identity(cfg)
    for key, value in identity(cfg).items():
        if config.get(key) != value:
            refuse(f"--out {cfg.out} holds another run, with {key} {config.get(key)}, not {value}")


def check_images(cfg, train, test, labelled):
    """Which evaluations the images allow. Refuses what would fail late."""
    steps = len(train) // cfg.batch_size * cfg.epochs
    if cfg.epochs and not cfg.checkpoint:
        if not steps:
            refuse(f"--batch-size {cfg.batch_size} is more than the {len(train)} training images")
        if steps < 100 or cfg.batch_size < 32:
            say(f"warning: {steps} steps of {cfg.batch_size} images are too few to learn much")
    no_test = not test and {"knn", "linear"} & set(cfg.eval)
    if cfg.eval and (no_test or len(labelled.labels.unique()) < 2):
        if cfg.eval != recipe_of(cfg.dataset)["eval"]:
            refuse(f"--eval {' '.join(cfg.eval)} needs labels and test images: class folders "
                   f"{cfg.data}/train/<class>/ and {cfg.data}/val/<class>/")
        say("too few labels or no test images: no accuracy to measure; see neighbors.png")
        return []
    if {"bias", "bounds"} & set(cfg.eval):
        theory_images(labelled, cfg)
    return cfg.eval


def run(cfg):
    """Pretrain or resume, evaluate, write results.json and the pictures. Returns the exit code."""
    device = start_processes()
    train, *test = load_data(cfg, device)
    labelled = train.select((train.labels >= 0).nonzero().squeeze(1))
    wanted = check_images(cfg, train, test, labelled)
    parts = [labelled if wanted else train, *test]
    encoder = build_encoder(cfg, device)
    step = load_checkpoint(cfg.checkpoint, encoder)["step"] if cfg.checkpoint else None
    if cfg.export:
        open(cfg.export, "ab").close()  # complains now rather than after pretraining
    start_log(cfg, parts, train, encoder)
    path, features = cfg.out / "results.json", {}
    results = json.loads(path.read_text()) if path.exists() else {"config": identity(cfg)}
    if results.setdefault("step", step) != step:  # the file was replaced since
        refuse(f"{cfg.out} measured step {results['step']} of {cfg.checkpoint}, which is "
               f"now at step {step}: choose another --out")
    undrawn = cfg.eval and not (cfg.out / "neighbors.png").exists()

    def save_results():
        if rank() == 0:
            save_file(path, json.dumps(results, indent=1) + "\n")

    def evaluate(stage, keep_features):
        found = results.setdefault(stage, {})
        missing = [name for name in wanted if name not in found]
        if keep_features or {"knn", "linear"} & set(missing):
            features[stage] = [extract(encoder.backbone, part, cfg) for part in parts]
        for name in missing:
            found[name] = EVALUATIONS[name](encoder, parts[0], features.get(stage), cfg)
            save_results()  # at once: on ImageNet, each is long

    if cfg.epochs and not cfg.checkpoint:
        if rank() == 0:
            draw_views(train, cfg)
        if cfg.baseline:
            evaluate("untrained", undrawn)
        results["seconds"] = round(pretrain(encoder, train, cfg), 1)
    stage = "trained" if cfg.epochs or cfg.checkpoint else "untrained"
    evaluate(stage, undrawn or cfg.export)
    save_results()
    if undrawn and rank() == 0:
        draw_neighbors(parts[0], parts[-1], features.values(), cfg)
    if cfg.export and rank() == 0:
        export(cfg.export, features[stage], parts)
    code = conclude(cfg) if rank() == 0 else 0
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return code


def start_log(cfg, parts, train, encoder):
    """Say what is about to happen. The first line of log.jsonl has all that decides the figures."""
    weights = sum(weight.numel() for weight in encoder.backbone.parameters()) / 1e6
    tests = len(parts[1]) if len(parts) > 1 else "no"
    say(f"{cfg.dataset}, {len(train)} training and {tests} test images -> {cfg.out}")
    say(f"{cfg.backbone}, {weights:.1f} million weights; {train.device}, {cfg.precision}, "
        f"processes: {world_size()}")
    say(f"evaluating {cfg.checkpoint}" if cfg.checkpoint else
        f"{cfg.loss} loss, alpha {cfg.alpha:g}, lambda {cfg.lam:g}; {cfg.epochs} epochs, batch "
        f"{cfg.batch_size}, lr {cfg.lr:g}, seed {cfg.seed}")
    bf16 = [name for name, has in torch.cpu.get_capabilities().items() if has and "bf16" in name]
    if cfg.precision == "bfloat16" and train.device.type == "cpu" and not bf16:
        say("warning: this CPU has no bfloat16 arithmetic, so float32 would be faster")
    images, log = [len(part) for part in parts], cfg.out / "log.jsonl"
    before = first_line(log).get("images", images) if log.exists() else images
    if before != images:
        refuse(f"{cfg.out} was begun with {before} training and test images, and now there are "
               f"{images}: choose another --out")
    if rank() > 0 or log.exists():
        return
    cfg.out.mkdir(parents=True, exist_ok=True)
    git = subprocess.run("git describe --always --abbrev=40 --dirty", shell=True, text=True,
                         cwd=Path(__file__).resolve().parent, capture_output=True).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    line = {"config": identity(cfg), "argv": sys.argv, "git": git, "processes": world_size(),
            "images": images, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "hardware": gpus or f"{os.cpu_count()} CPU cores", "threads": torch.get_num_threads()}
    save_file(log, json.dumps(line) + "\n")


def conclude(cfg):
    """Print the table and where the files are. The demonstration fails if it did not learn."""
    stages = read_figures(cfg.out)
    names = stages.get("untrained", {}) | stages.get("trained", {})
    rows = [["top-1 on test images, theory on training images", *stages]]
    for name in names:
        meaning = MEANINGS.get(name, f"kNN, k = {name[3:]}, % right (cosine, majority)")
        values = [figures.get(name) for figures in stages.values()]
        rows.append([meaning, *("–" if value is None else f"{value:.4g}" for value in values)])
    if names:
        markdown(rows)
    say(f"{cfg.out} holds {' '.join(sorted(path.name for path in cfg.out.iterdir()))}")
    if not cfg.checkpoint and cfg.epochs:
        say(f"next: python balcon.py --checkpoint {cfg.out / 'last.pt'} --export features.npz")
    others = [change for change in changes(cfg) if not change.startswith("seed")]
    if cfg.dataset != "patterns" or others or len(stages) < 2 or "knn5" not in names:
        return 0
    before, after = 100 - stages["untrained"]["knn5"], 100 - stages["trained"]["knn5"]
    learned = after < before / 4
    print(f"kNN error: {after:.1f} % trained, {before:.1f} % untrained: "
          + ("it learned." if learned else "FAILED, it should be less than a quarter."))
    return 0 if learned else 1


def main(argv=None):
    try:
        cfg = parse_flags(argv)
        if cfg.report:
            return report(cfg.report)
        check(cfg)
        sys.exit(run(cfg))
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).split("ImageError: ")[-1]  # without a reading process's traceback
        if type(error) is not UserError or os.environ.get("LOCAL_RANK", "0") == "0":
            print("balcon:", " ".join(message.split()), file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
