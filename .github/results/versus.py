"""Side by side with other libraries: `study.py versus [flags of balcon.py]`, from pixels to update.

Needs lightly (pip install lightly). Its loop is the documented one of SimCLR: transforms per image
in two worker processes, a pass for each view, NTXentLoss, SGD. torchvision: its transforms in
place of lightly's, the rest as in balcon. All have the same network, images and batch, and take
turns. Prints one JSON object a line; writes nothing.
"""
import importlib.util
import itertools
import json
import time

import balcon
import numpy as np
import torch
from benchmark import commit, images_to_time
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

WORKERS = 2
READ_AHEAD = 2 * WORKERS  # batches of a DataLoader that are ready when its first one is asked for


class TwoViews(Dataset):
    """Pairs of views as a DataLoader's workers make them."""

    def __init__(self, data, transform):
        self.images = [Image.fromarray(x) for x in data.pixels.permute(0, 2, 3, 1).numpy()]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        views = self.transform(self.images[i])
        return views[0], views[1]


def endless(dataset, m):
    """One epoch without end: at the end of an epoch a DataLoader starts its workers anew."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=10 ** 9)
    return DataLoader(dataset, m, sampler=sampler, num_workers=WORKERS)


def of_balcon(data, cfg):
    orders = ((step, torch.randperm(len(data))[:cfg.batch_size]) for step in itertools.count())
    for _, x in data.batches(orders, cfg.views, 2, (cfg.seed, "versus")):
        yield lambda encoder, x=x: loss_of_both(encoder, x, cfg)


def loss_of_both(encoder, x, cfg):
    return balcon.LOSSES[cfg.loss](*encoder(x).chunk(2), cfg.alpha, cfg.lam)


def of_torchvision(data, cfg):
    view = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(cfg.size, cfg.crop_scale),
                       v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(.4, .4, .4, .1)],
                                                                 0.8), v2.RandomGrayscale(0.2),
                       v2.ToDtype(torch.float32, True), v2.Normalize(balcon.MEAN, balcon.STD)])
    for pair in endless(TwoViews(data, lambda image: (view(image), view(image))), cfg.batch_size):
        x = torch.cat(pair).contiguous(memory_format=torch.channels_last)
        yield lambda encoder, x=x: loss_of_both(encoder, x, cfg)


def of_lightly(data, cfg):
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    criterion = NTXentLoss(temperature=1 / cfg.alpha)
    transform = SimCLRTransform(cfg.size, cj_strength=0.5, min_scale=cfg.crop_scale[0],
                                gaussian_blur=0.0)
    for x1, x2 in endless(TwoViews(data, transform), cfg.batch_size):
        yield lambda encoder, x1=x1, x2=x2: criterion(encoder(x1), encoder(x2))


def libraries():
    if importlib.util.find_spec("lightly"):
        return [of_balcon, of_lightly, of_torchvision]
    print("lightly is not installed (pip install lightly) and left out")
    return [of_balcon, of_torchvision]


def images_per_second(steps, encoder, cfg, seconds):
    """Of one library, without the batches that were made before the clock started."""
    optimizer = torch.optim.SGD(encoder.train().parameters(), cfg.lr, cfg.momentum,
                                weight_decay=cfg.weight_decay)
    done = -READ_AHEAD - 1
    for loss in steps:
        optimizer.zero_grad()
        loss(encoder).backward()
        optimizer.step()
        done += 1
        if done == 0:
            start = time.perf_counter()
        elif done > 0 and time.perf_counter() - start > seconds:
            return cfg.batch_size * done / (time.perf_counter() - start)


def versus(*argv, rounds=3, seconds=20):
    cfg = balcon.parse_flags(["--dataset", "cifar10", *argv])
    balcon.check_settings(cfg)
    data = images_to_time(cfg, balcon.start_processes())[0]
    cfg.batch_size = min(cfg.batch_size, len(data))
    taking_turns = libraries()
    rates = {}
    for _ in range(rounds):
        for library in taking_turns:
            encoder = balcon.build_encoder(cfg, data.device)
            if library.__name__ == "of_lightly":  # as documented
                encoder = encoder.to(memory_format=torch.contiguous_format)
            rate = images_per_second(library(data, cfg), encoder, cfg, seconds)
            rates.setdefault(library.__name__.removeprefix("of_"), []).append(rate)
    own = np.median(rates.pop("balcon"))
    what = f"{cfg.backbone}, {cfg.stem} stem, {cfg.size} pixels, batch {cfg.batch_size}"
    for library, rate in rates.items():
        print(json.dumps({
            "id": f"versus-{library}-{cfg.backbone}-{cfg.size}", "kind": "speed", "git": commit(),
            "label": f"{what}, from pixels to update: images/s / {library}'s",
            "ratio": round(own / np.median(rate), 2)}))
    print(f"images/s: balcon {own:.1f}; {rates}")
