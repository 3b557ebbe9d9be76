"""What the study measures beyond balcon.py. The instruments are functions of tensors.

z [m, 2, d]: projections of unit length of two views of each of m images; labels [m] or [N];
features [N, d].
"""
import itertools
import json
import math
from pathlib import Path

import balcon
import numpy as np
import objectives
import torch
import torch.nn.functional as F
from PIL import Image
from stats import best_positive_similarity, ntxent_floor


# ------------------------------------------ repulsion ----------------------------------------
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
    (λ/α) log K + λ mean s + (αλ/2) var s + …: repelling is all beyond log K and the mean,
    second_order the term with the variance.
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


# ------------------------------------------ the supervised end -------------------------------
def nscl(z, labels, alpha, lam):
    """The gap L − L_NSCL of one batch and its bound (λ/α) log(1 + (n_y − 1) e^{2α} / (m − n_y)),
    arXiv 2506.04411. A batch of one class has no negatives for L_NSCL: ValueError."""
    loss = balcon.balanced_contrastive_loss(z[:, 0], z[:, 1], alpha, lam)
    supervised = objectives.nscl_loss(z[:, 0], z[:, 1], labels, alpha, lam)
    n = labels.bincount()[labels].to(z.dtype)  # images of the class of each
    bound = F.softplus(2 * alpha + ((n - 1) / (len(z) - n)).log())
    return {"loss": loss.item(), "supervised": supervised.item(),
            "gap": (loss - supervised).item(), "bound": (lam / alpha * bound).mean().item()}


def cdnv(features, labels):
    """(CDNV, directional CDNV) of arXiv 2506.04411, means over ordered pairs of classes i ≠ j:
    variance of class i, whole or along the line of the two centres, over their squared distance."""
    centres = balcon.class_means(features, labels)  # [C, d]
    whole = []
    along = []
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
    classes = int(labels.max()) + 1
    found = []
    for draw in range(draws):
        rows = balcon.balanced_subset(labels.cpu(), shots * classes, "few-shot", seed, draw)
        bank = F.normalize(features[rows], dim=1)
        known = labels[rows]
        centre = nearest_centre(bank, known, F.normalize(queries, dim=1))
        linear = balcon.linear_predict(bank, known, queries, l2)
        right = torch.stack([centre, linear]) == answers  # [2, Q]
        found.append(100 * right.double().mean(1))
    return torch.stack(found)


# ------------------------------------------ bias with its error ------------------------------
def mean_norm_error(gaps):
    """Standard error of balcon.mean_norm(gaps), gaps [N, 2, d], by the delta method."""
    whole = gaps.mean(1).norm(dim=1)  # [N]
    half = gaps.norm(dim=2).mean(1)  # [N]
    square = 2 * whole.mean() ** 2 - half.mean() ** 2
    slope = 4 * whole.mean() * whole - 2 * half.mean() * half
    error = slope.std() / math.sqrt(len(gaps))  # of the square, which may be near 0
    return (error / (2 * square.maximum(error).sqrt())).item()


def eq16_error(halves, labels):
    """Standard error of balcon.eq16(halves, labels)."""
    return mean_norm_error(balcon.class_means(halves, labels)[labels] - halves)


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


def nscl_by_classes(z, labels, cfg):
    """Gap and bound over the number of classes: the first ones of a shuffled list."""
    classes = int(labels.max()) + 1
    place = torch.randperm(classes, generator=balcon.rng(cfg.seed, "classes")).to(z.device)[labels]
    found = {}
    for n in sorted({n for n in (2, 5, 10, 20, 50, 100) if n < classes} | {classes}):
        kept = place < n
        found[n] = mean_over_batches(nscl, z[kept], place[kept], cfg)
    return found


def few_shot_by_labels(features, labels, queries, answers, seed):
    """{labels a class: [mean, standard deviation] of both classifiers over five draws}."""
    found = {}
    for shots in (1, 5, 10, 100):
        if shots <= labels.bincount().min():
            accuracy = few_shot(features, labels, queries, answers, shots, 5, seed)
            found[shots] = [accuracy.mean(0).tolist(), accuracy.std(0).tolist()]
    return found


def measure_checkpoint(wanted, cfg):
    """{instrument: its figures} of cfg.checkpoint, or of the untrained network."""
    device = balcon.start_processes()
    train, test = balcon.load_data(cfg, device)
    encoder = balcon.build_encoder(cfg, device)
    labelled = train.select(train.labels >= 0)
    data, labels = balcon.theory_images(labelled, cfg)
    found = {"images": len(data), "alpha": cfg.alpha, "lam": cfg.lam, "seed": cfg.seed}
    z = None
    if {"repulsion", "nscl"} & set(wanted):
        z = balcon.embed(encoder, data, cfg, "two views", n=2, groups=2)[0]
    if "repulsion" in wanted:
        found["repulsion"] = mean_over_batches(repulsion, z, labels, cfg)
    if "nscl" in wanted:
        found["nscl"] = nscl_by_classes(z, labels, cfg)
    if "eq16" in wanted:
        halves = balcon.embed(encoder, data, cfg, "mean views", n=cfg.theory_views, groups=2)[0]
        found["eq16"] = [balcon.eq16(halves, labels), eq16_error(halves, labels)]
    features = None
    if {"fewshot", "cdnv"} & set(wanted):
        features = balcon.extract(encoder.backbone, data, cfg)
    if "cdnv" in wanted:
        found["cdnv"] = cdnv(features, labels)
    if "fewshot" in wanted:
        answers = torch.searchsorted(labelled.labels.unique(), test.labels).to(device)
        queries = balcon.extract(encoder.backbone, test, cfg)
        found["fewshot"] = few_shot_by_labels(features, labels, queries, answers, cfg.seed)
    return found


INSTRUMENTS = ("repulsion", "nscl", "fewshot", "cdnv", "eq16")


def measure(*argv):
    """Print one JSON object a line for each checkpoint, or for the "untrained" network: what the
    instruments find, which are named after the checkpoints and before the first flag."""
    flags = list(itertools.dropwhile(lambda word: not word.startswith("--"), argv))
    words = argv[:len(argv) - len(flags)]
    wanted = [word for word in words if word in INSTRUMENTS]
    checkpoints = [word for word in words if word not in INSTRUMENTS]
    if not wanted or not checkpoints:
        raise SystemExit("study.py measure CHECKPOINT… and some of " + ", ".join(INSTRUMENTS))
    objectives.register_losses()  # a checkpoint's settings may name one of them
    for checkpoint in checkpoints:
        source = [] if checkpoint == "untrained" else ["--checkpoint", checkpoint]
        with torch.no_grad():
            found = measure_checkpoint(wanted, balcon.parse_flags([*source, *flags]))
        print(json.dumps({"checkpoint": checkpoint, **found}))


def pixels(*flags):
    """Print the accuracies of raw pixels: the control that needs no network."""
    cfg = balcon.parse_flags([*flags, "--probe", "features"])
    train, test = balcon.load_data(cfg, torch.device("cpu"))

    def features(data):
        return data.pixels.flatten(1).float() / 255

    print(json.dumps({**balcon.knn_accuracy(features, train, test, cfg),
                      **balcon.linear_accuracy(None, features, train, test, cfg)}))


def picture(before, after):
    """README's picture from two runs' neighbors.png: a test image, its five neighbours in the
    first run, its five neighbours in the second."""
    pictures = (Image.open(path).convert("RGB") for path in (before, after))
    before, after = map(np.asarray, pictures)
    side = 74
    gap = np.full_like(before[:, :20], 255)
    joined = np.hstack([before[:, :6 * side], gap, after[:, side:6 * side + 2]])
    Image.fromarray(joined).save(Path(__file__).with_name("neighbors.png"), optimize=True)
