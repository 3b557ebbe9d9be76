"""Objectives and recipes that are none of the paper's: `study.py train NAME [flags of balcon.py]`.

A loss here is a function (z1, z2, alpha, lam) of two views [m, d], as in balcon.py: a mean over
all views as anchors, of 1/α of the usual scale, for cosine similarity. One process only.
"""
import functools
import math

import balcon
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------ losses ------------------------------------------
def unit_views(z1, z2, alpha, lam):
    """[2m, d] of unit length, in float32 at least. Refuses what balcon's losses refuse: they check
    it on tensors without data."""
    shapes = [z.to("meta") for z in (z1, z2)]
    balcon.balanced_contrastive_loss(*shapes, alpha, lam, all_ranks=False)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError("the study's losses are for one process")
    dtype = torch.promote_types(z1.dtype, torch.float32)
    return F.normalize(torch.cat([z1, z2]).to(dtype), dim=1)


def exact(loss):
    """Computes the loss outside autocast."""
    @functools.wraps(loss)
    def without_autocast(z1, *rest, **settings):
        with torch.autocast(z1.device.type, enabled=False):
            return loss(z1, *rest, **settings)
    return without_autocast


def checked_labels(labels, m, device):
    labels = torch.as_tensor(labels, device=device)
    if labels.shape != (m,) or labels.is_floating_point():
        raise ValueError(f"labels must be {m} integers, not {labels.dtype} {[*labels.shape]}")
    if (labels < 0).any():
        raise ValueError("this loss needs the label of every image")
    if (labels == labels[0]).all():
        raise ValueError("no negatives: the whole batch is of one class")
    return labels


@exact
def nscl_loss(z1, z2, labels, alpha, lam):
    """Negatives-only supervised loss (arXiv 2506.04411): Eq. 17, repelling only other classes.

    labels: [m] integers, not all equal.
    """
    z = unit_views(z1, z2, alpha, lam)
    label = checked_labels(labels, len(z1), z.device).repeat(2)
    s = z @ z.T
    other_class = (alpha * s).masked_fill(label[:, None] == label, -math.inf)
    return lam / alpha * other_class.logsumexp(1).mean() - s.diagonal(len(z1)).mean()


@exact
def prototype_loss(z1, z2, labels, alpha, lam, surrogate=False):
    """Eq. 5, −s(z, μ_y) + λ max s(z, μ_y′), with the batch's class means as μ. surrogate: Eq. 7, in
    which an image's own target is the mean of its views. α is not used."""
    z = unit_views(z1, z2, alpha, lam)
    labels = checked_labels(labels, len(z1), z.device)
    label = labels.unique(return_inverse=True)[1].repeat(2)
    s = z @ F.normalize(balcon.class_means(z, label), dim=1).T  # [2m, C]
    own = label[:, None] == torch.arange(s.shape[1], device=z.device)
    target = s[own]
    if surrogate:
        mean_view = z.unflatten(0, (2, -1)).mean(0).repeat(2, 1)
        target = F.cosine_similarity(z, mean_view)
    return lam * s.masked_fill(own, -math.inf).amax(1).mean() - target.mean()


@exact
def eq14(z1, z2, alpha, lam):
    """Eq. 14 over α: the m − 1 negatives of an anchor are the other views of the other images, none
    of its own kind; λ weighs them."""
    z1, z2 = unit_views(z1, z2, alpha, lam).chunk(2)
    s = z1 @ z2.T  # [m, m]: first views along the rows, second views along the columns
    negatives = alpha * s - torch.diag(s.new_full((len(s),), math.inf))
    repelling = torch.cat([negatives.logsumexp(1), negatives.logsumexp(0)])
    return lam / alpha * repelling.mean() - s.diagonal().mean()


@exact
def mean_of_views(z1, z2, alpha, lam, n=4):
    """Eq. 17 with n views of each image: the positive is the mean of the n − 1 others (§5.5). s is
    linear in it, so this is Eq. 9 and 12 with |T̂| = n − 1. n = 2 is the balanced loss.

    z1, z2: [m·n/2, d], the first and the second half of the views, view by view. For as many views
    and steps as with n = 2, n = 4 takes half of --batch-size and half of --epochs.
    """
    z = unit_views(z1, z2, alpha, lam)
    m = len(z) // n
    if m < 2 or len(z) % n:
        raise ValueError(f"{len(z)} views are not {n} views of each of two or more images")
    s = z @ z.T  # [n·m, n·m]
    image = torch.arange(m, device=z.device).repeat(n)
    same = image[:, None] == image
    positive = (s * same).sum() - s.diagonal().sum()  # over n(n − 1)m pairs of views
    repelling = (alpha * s).masked_fill(same, -math.inf).logsumexp(1).mean()
    return lam / alpha * repelling - positive / (n * (n - 1) * m)


@exact
def quadratic(z1, z2, alpha, lam):
    """−s⁺ + (αλ/2) mean of s² over the negatives: what the balanced loss becomes to second order,
    and HaoChen et al.'s spectral contrastive loss on the sphere with μ = αλ."""
    m = len(z1)
    z = unit_views(z1, z2, alpha, lam)
    s = z @ z.T
    image = torch.arange(m, device=z.device).repeat(2)
    negatives = s[image[:, None] != image]
    return alpha * lam / 2 * negatives.square().mean() - s.diagonal(m).mean()


@exact
def wang_isola(z1, z2, alpha, lam):
    """Half of Wang & Isola's ‖x − y‖² + log E exp(−t‖x − x′‖²), t = 2, so that the positive weighs
    as in Eq. 17: up to a constant (4, 2) with the log outside the mean. α, λ are not used."""
    z1, z2 = unit_views(z1, z2, alpha, lam).chunk(2)
    alignment = (z1 - z2).square().sum(1).mean()
    uniformity = [(-2 * torch.pdist(z).square()).exp().mean().log() for z in (z1, z2)]
    return (alignment + sum(uniformity) / 2) / 2


# ------------------------------------------ labels and more views ----------------------------
class Batch:
    """What the losses need to know of pretraining's present batch beside its projections."""
    labels = None
    views = 2


def watch_batches():
    """balcon.pretrain asks for the batches of the name "views": remember the labels of each, and
    make Batch.views views of each image."""
    batches = balcon.Images.batches

    def watched(self, order, views=None, n=1, key=(), one_t=False):
        if key[1:] != ("views",):
            yield from batches(self, order, views, n, key, one_t)
            return
        rows = {}

        def remembered():
            for step, chosen in order:
                rows[step] = chosen
                yield step, chosen

        for step, x in batches(self, remembered(), views, Batch.views, key, one_t):
            Batch.labels = self.labels[rows.pop(step)]
            yield step, x

    balcon.Images.batches = watched


def with_labels(loss, **settings):
    return lambda z1, z2, alpha, lam: loss(z1, z2, Batch.labels, alpha, lam, **settings)


LOSSES = {
    "nscl": with_labels(nscl_loss),
    "eq5": with_labels(prototype_loss),
    "eq7": with_labels(prototype_loss, surrogate=True),
    "eq14": eq14,
    "mean2": functools.partial(mean_of_views, n=2),
    "mean4": functools.partial(mean_of_views, n=4),
    "quadratic": quadratic,
    "wang_isola": wang_isola,
}


def register_losses():
    """Let balcon's --loss take these names, also where a checkpoint's settings are read."""
    def for_balcon(loss):
        def of_cosine(z1, z2, alpha, lam, similarity="cosine"):
            if similarity != "cosine":
                raise balcon.UserError("the study's losses are for --similarity cosine")
            try:
                return loss(z1, z2, alpha, lam)
            except ValueError as error:
                raise balcon.UserError(str(error)) from error
        return of_cosine

    choices = balcon.SETTINGS["loss"][2]
    for name, loss in LOSSES.items():
        balcon.LOSSES[name] = for_balcon(loss)
        if name not in choices:
            choices.append(name)


# ------------------------------------------ recipes ------------------------------------------
def change_encoder(change):
    """change(encoder, cfg, device) is called on what balcon.build_encoder returns."""
    build = balcon.build_encoder

    def build_and_change(cfg, device):
        encoder = build(cfg, device)
        change(encoder, cfg, device)
        return encoder

    balcon.build_encoder = build_and_change


def drop_batch_norm(encoder, cfg, device):
    layers = []
    width = encoder.projector[0].in_features
    for wider in cfg.projector:
        layers += [nn.Linear(width, wider), nn.ReLU(inplace=True)]
        width = wider
    encoder.projector = nn.Sequential(*layers[:-1]).to(device)


def strong_recipe():
    """dkobak/simclr-cifar10: weak grayscale, and a projector without batch norm. Returns flags."""
    change_encoder(drop_batch_norm)
    balcon.AUGMENTATIONS["grayscale"] = (balcon.grayscale, 0.1)
    return ["--weight-decay", "5e-4", "--crop-scale", "0.2", "1", "--projector", "1024", "128"]


class RoundToBFloat16(torch.autograd.Function):
    """Values and gradients as bfloat16 holds them, kept in float32."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().float()


def round_to_bfloat16(network):
    """What autocast to bfloat16 does to a network, on a CPU that computes in float32 only: inputs,
    outputs and gradients of every layer are rounded, and the weights of those that multiply."""
    rounded = RoundToBFloat16.apply

    def convolve(layer, x):
        return rounded(layer._conv_forward(rounded(x), rounded(layer.weight), layer.bias))

    def multiply(layer, x):
        return rounded(F.linear(rounded(x), rounded(layer.weight), layer.bias))

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.forward = functools.partial(convolve, layer)
        elif isinstance(layer, nn.Linear):
            layer.forward = functools.partial(multiply, layer)
        elif not list(layer.children()):
            layer.register_forward_hook(lambda layer, x, output: rounded(output))


def bfloat16_recipe():
    change_encoder(lambda encoder, cfg, device: round_to_bfloat16(encoder))
    return []


RECIPES = {"strong": strong_recipe, "bfloat16": bfloat16_recipe}


def train(kind="", *flags):
    """balcon.main with another loss, another recipe or another precision; later flags win."""
    register_losses()
    if kind in RECIPES:
        flags = [*RECIPES[kind](), *flags]
    elif kind in LOSSES:
        if kind == "mean4":
            Batch.views = 4
        watch_batches()
        flags = ["--loss", kind, *flags]
    else:
        raise SystemExit(f"study.py train takes one of {', '.join([*LOSSES, *RECIPES])}")
    balcon.main(["--dataset", "cifar10", *flags])
