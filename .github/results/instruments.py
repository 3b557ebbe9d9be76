"""What the study measures or trains beyond balcon.py; study.py has the commands.

The instruments are functions of tensors. z [m, 2, d]: projections of unit length of two views of
each of m images; labels [m] or [N]; features [N, d].
"""
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import balcon  # noqa: E402


# ------------------------------------------ instruments ------------------------------------------
def best_positive_similarity(m, alpha, lam):
    """P*, the mean positive similarity at which NT-Xent's lower bound over m images is lowest:
    where its derivative vanishes, e^{α(P + (1 + P)/K)} = (K + λ)/(λ − 1), and 1 if nowhere."""
    k = 2 * (m - 1)
    if lam <= 1:
        return 1.0
    return min(1.0, (k / alpha * math.log((k + lam) / (lam - 1)) - 1) / (k + 1))


def ntxent_floor(m, alpha, lam):
    """A lower bound of generalized NT-Xent over m images: by Jensen the negatives weigh at least
    as much as K times their mean similarity, and that is at least −(1 + P)/K."""
    k, p = 2 * (m - 1), best_positive_similarity(m, alpha, lam)
    negatives = math.log(k) - alpha * (1 + p) / k
    return -p + lam / alpha * np.logaddexp(alpha * p, negatives)


def pairs(z, labels):
    """Of all 2m views: similarities s, which pairs show one image, which one class; [2m, 2m]."""
    m = len(z)
    views = z.transpose(0, 1).flatten(0, 1)  # [2m, d], the second views after the first ones
    image = torch.arange(m, device=z.device).repeat(2)
    label = labels.repeat(2)
    return views @ views.T, image[:, None] == image, label[:, None] == label


def repulsion(z, labels, alpha, lam):
    """Where the repelling softmax of one batch lies, and what it does to second order.

    same_class_A: share of the softmax at α = A on the 2(n_y − 1) negatives of the anchor's own
    class, by_chance their share in number; ntxent_positive_A: NT-Xent's share on the positive.
    With s the similarities of an anchor's K negatives, (λ/α) log Σ exp(α s) =
    (λ/α) log K + λ mean s + (αλ/2) var s + …: repelling is all beyond the mean, second_order the
    term with the variance.
    """
    m = len(z)
    s, same_image, same_class = pairs(z, labels)
    positive = s.diagonal(m).repeat(2)  # [2m]
    own = (same_class & ~same_image).sum(1)
    found = {"by_chance": (own / (2 * m - 2)).mean(), "positive": positive.mean(),
             "best_positive": best_positive_similarity(m, alpha, lam),
             "ntxent_floor": ntxent_floor(m, alpha, lam)}
    for a in sorted({1.0, 2.0, 4.0, 8.0, alpha}):
        negatives = (a * s).masked_fill(same_image, -math.inf).logsumexp(1)
        others = (a * s).masked_fill(same_class, -math.inf).logsumexp(1)
        everything = torch.logaddexp(negatives, a * positive)
        share = -torch.expm1(others - negatives)
        found[f"same_class_{a:g}"] = share.mean()
        found[f"ntxent_positive_{a:g}"] = (a * positive - everything).exp().mean()
        if a == alpha:
            found["lam_share"] = lam * share.mean()
    s = s[~same_image].view(2 * m, -1)  # [2m, K]
    log_mean = ((alpha * s).logsumexp(1) - math.log(s.shape[1])) / alpha
    found["negative"] = s.mean()
    found["repelling"] = lam * (log_mean - s.mean(1)).mean()
    found["second_order"] = alpha * lam / 2 * s.var(1, correction=0).mean()
    return {name: float(figure) for name, figure in found.items()}


def nscl(z, labels, alpha, lam):
    """The gap L − L_NSCL of one batch and its bound (λ/α) log(1 + (n_y − 1) e^{2α} / (m − n_y)),
    arXiv 2506.04411. A batch of one class has no negatives for L_NSCL: ValueError."""
    loss = balcon.balanced_contrastive_loss(z[:, 0], z[:, 1], alpha, lam)
    supervised = balcon.nscl_loss(z[:, 0], z[:, 1], labels, alpha, lam)
    n = labels.bincount()[labels].to(z.dtype)  # images of the class of each
    bound = F.softplus(2 * alpha + ((n - 1) / (len(z) - n)).log())
    return {"gap": (loss - supervised).item(), "bound": (lam / alpha * bound).mean().item()}


def cdnv(features, labels):
    """(CDNV, directional CDNV) of arXiv 2506.04411, means over ordered pairs of classes i ≠ j:
    variance of class i, whole or along the line of the two centres, over their squared distance."""
    centres = balcon.class_means(features, labels)  # [C, d]
    whole, along = [], []
    for i, centre in enumerate(centres):
        own = features[labels == i] - centre
        lines = torch.cat([centres[:i], centres[i + 1:]]) - centre  # [C − 1, d]
        apart = lines.square().sum(1)
        whole.append(own.square().sum(1).mean() / apart)
        along.append((own @ lines.T).square().mean(0) / apart.square())
    return torch.stack(whole).mean().item(), torch.stack(along).mean().item()


def nearest_centre(features, labels, queries):
    """Labels [Q] of the nearest class mean."""
    return torch.cdist(queries, balcon.class_means(features, labels)).argmin(1)


def few_shot(features, labels, queries, answers, shots, draws, seed, l2=1e-3):
    """Top-1 in % of nearest class centre and linear classifier by `shots` labels a class, on
    features of unit length: [draws, 2]."""
    classes, found = int(labels.max()) + 1, []
    for draw in range(draws):
        rows = balcon.balanced_subset(labels.cpu(), shots * classes, "few-shot", seed, draw)
        bank, known = F.normalize(features[rows], dim=1), labels[rows]
        centre = nearest_centre(bank, known, F.normalize(queries, dim=1))
        linear = balcon.linear_predict(bank, known, queries, l2)
        right = torch.stack([centre, linear]) == answers  # [2, Q]
        found.append(100 * right.double().mean(1))
    return torch.stack(found)


# ------------------------------------------ measure ------------------------------------------
def mean_over_batches(instrument, z, labels, cfg):
    """The instrument's figures on shuffled batches of the size used in training."""
    order = torch.randperm(len(z), generator=balcon.rng(cfg.seed, "batches")).to(z.device)
    size = min(cfg.batch_size, len(z))
    sums = {}
    for rows in order.split(size)[:len(z) // size]:
        found = instrument(z[rows].double(), labels[rows], cfg.alpha, cfg.lam)
        for name, figure in found.items():
            sums[name] = sums.get(name, 0) + figure
    return {name: figure / (len(z) // size) for name, figure in sums.items()}


def measure(checkpoint, *argv):
    """Prints one JSON object: the instruments named before the first flag, on a checkpoint, or on
    the "untrained" network of these flags."""
    flags = list(itertools.dropwhile(lambda word: not word.startswith("--"), argv))
    wanted = argv[:len(argv) - len(flags)]
    if checkpoint != "untrained":
        flags = ["--checkpoint", checkpoint, *flags]
    cfg = balcon.parse_flags(flags)
    device = balcon.start_processes()
    train, test = balcon.load_data(cfg, device)
    encoder = balcon.build_encoder(cfg, device)
    if cfg.checkpoint:
        balcon.load_checkpoint(cfg.checkpoint, encoder)
    data, labels = balcon.theory_images(train.select((train.labels >= 0).nonzero()[:, 0]), cfg)
    result = {"images": len(data), "alpha": cfg.alpha, "lam": cfg.lam, "seed": cfg.seed}
    with torch.no_grad():
        if {"repulsion", "nscl"} & set(wanted):
            z = balcon.embed(encoder, data, cfg, "two views", n=2, groups=2)[0]
        if "repulsion" in wanted:
            result["repulsion"] = mean_over_batches(repulsion, z, labels, cfg)
        if "nscl" in wanted:
            result["nscl"] = nscl_by_classes(z, labels, cfg)
        if {"fewshot", "cdnv"} & set(wanted):
            features = balcon.extract(encoder.backbone, data, cfg)[0]
    if "cdnv" in wanted:
        result["cdnv"] = cdnv(features, labels)
    if "fewshot" in wanted:
        queries, answers = balcon.extract(encoder.backbone, test, cfg)
        answers = torch.searchsorted(train.labels.unique().to(answers.device), answers)
        result["fewshot"] = {}
        for shots in (n for n in (1, 5, 10, 100) if n <= labels.bincount().min()):
            accuracy = few_shot(features, labels, queries, answers, shots, 5, cfg.seed)
            result["fewshot"][shots] = [accuracy.mean(0).tolist(), accuracy.std(0).tolist()]
    print(json.dumps(result))


def nscl_by_classes(z, labels, cfg):
    """Gap and bound over the number of classes: the first ones of a shuffled list."""
    classes = int(labels.max()) + 1
    place = torch.randperm(classes, generator=balcon.rng(cfg.seed, "classes")).to(z.device)[labels]
    found = {}
    for n in sorted({n for n in (2, 5, 10, 20, 50, 100) if n < classes} | {classes}):
        kept = place < n
        found[n] = mean_over_batches(nscl, z[kept], place[kept], cfg)
    return found


def pixels(*flags):
    """Prints the accuracies of raw pixels: the control that needs no network."""
    cfg = balcon.parse_flags([*flags, "--probe", "features"])
    train, test = balcon.load_data(cfg, torch.device("cpu"))
    features = [(data.images.flatten(1).float() / 255, data.labels) for data in (train, test)]
    print(json.dumps({**balcon.knn(None, train, features, cfg),
                      **balcon.linear(None, train, features, cfg)}))


# ------------------------------------------ runs that are no recipe ---------------------------
def quadratic(z1, z2, alpha, lam, similarity="cosine"):
    """−s⁺ + (αλ/2) mean of s² over the negatives: what the balanced loss becomes to second order,
    and HaoChen et al.'s spectral contrastive loss on the sphere with μ = αλ. One process only."""
    m = len(z1)
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    s = z @ z.T
    image = torch.arange(m, device=z.device).repeat(2)
    negatives = s[image[:, None] != image].view(2 * m, -1)
    return alpha * lam / 2 * negatives.square().mean() - s.diagonal(m).mean()


def wang_isola(z1, z2, alpha, lam, similarity="cosine"):
    """Half of Wang & Isola's ‖x − y‖² + log E exp(−t‖x − x′‖²), t = 2, so that the positive weighs
    as in Eq. 17: up to a constant (4, 2) with the log outside the mean. One process only."""
    z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
    alignment = (z1 - z2).square().sum(1).mean()
    uniformity = [(-2 * torch.pdist(z).square()).exp().mean().log() for z in (z1, z2)]
    return (alignment + sum(uniformity) / 2) / 2


def strong_recipe():
    """dkobak/simclr-cifar10: weak grayscale, and a projector without batch norm. Returns flags."""
    build = balcon.build_encoder

    def build_without_norm(cfg, device):
        encoder = build(cfg, device)
        layers, width = [], next(encoder.projector.parameters()).shape[1]
        for wider in cfg.projector:
            layers += [nn.Linear(width, wider), nn.ReLU(inplace=True)]
            width = wider
        encoder.projector = nn.Sequential(*layers[:-1]).to(device)
        return encoder

    balcon.build_encoder = build_without_norm
    balcon.AUGMENTATIONS["grayscale"].p = 0.1
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
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.forward = lambda x, layer=layer: rounded(
                layer._conv_forward(rounded(x), rounded(layer.weight), layer.bias))
        elif isinstance(layer, nn.Linear):
            layer.forward = lambda x, layer=layer: rounded(
                F.linear(rounded(x), rounded(layer.weight), layer.bias))
        elif not list(layer.children()):
            layer.register_forward_hook(lambda layer, x, output: rounded(output))
    return network


def bfloat16_recipe():
    build = balcon.build_encoder
    balcon.build_encoder = lambda cfg, device: round_to_bfloat16(build(cfg, device))
    return []


def train(kind, *flags):
    """balcon.main with another loss, another recipe or another precision; later flags win."""
    if kind in ("strong", "bfloat16"):
        recipe = {"strong": strong_recipe, "bfloat16": bfloat16_recipe}[kind]
        flags = [*recipe(), *flags]
    else:
        balcon.LOSSES[kind] = {"quadratic": quadratic, "wang_isola": wang_isola}[kind]
        flags = ["--loss", kind, *flags]
    balcon.main(["--dataset", "cifar10", *flags])


def picture(before, after):
    """README's picture from two runs' neighbors.png: a test image, its five neighbours in the
    first run, its five neighbours in the second."""
    pictures = (Image.open(path).convert("RGB") for path in (before, after))
    before, after = map(np.asarray, pictures)
    side, gap = 74, np.full_like(before[:, :20], 255)
    joined = np.hstack([before[:, :6 * side], gap, after[:, side:6 * side + 2]])
    Image.fromarray(joined).save(Path(__file__).with_name("neighbors.png"), optimize=True)
