"""Where the time of a training step goes: `study.py benchmark [flags of balcon.py]`.

It writes nothing, and ends within a minute: the images are few, and rounds are made for a time.
"""
import itertools
import subprocess
import time
from pathlib import Path

import balcon
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

SIZES = {"cifar10": (50_000, 32), "cifar100": (50_000, 32), "stl10": (105_000, 96),
         "imagenet": (1_281_167, 256)}  # training images, and pixels of their side
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12,
        "V100": 125e12}  # FLOP/s in bfloat16 (V100: float16), dense, by the data sheets
START = time.perf_counter()
SAMPLE = 2048  # images in memory; the time of a step does not depend on how many there are


def commit():
    return subprocess.run("git describe --always --dirty=+", shell=True, cwd=Path(__file__).parent,
                          capture_output=True, text=True).stdout.strip()


def images_to_time(cfg, device):
    """Some of the images, and how many the recipe has. Random pixels where there is no data."""
    known = cfg.dataset in SIZES and cfg.subset == "full"
    if known and not cfg.data.is_dir():
        print(f"there is no {cfg.data}: random pixels replace the images")
        n, side = SIZES[cfg.dataset]
        pixels = torch.randint(256, (SAMPLE, 3, side, side), dtype=torch.uint8)
        images = balcon.Images(pixels, torch.full((SAMPLE, 2), side), torch.zeros(SAMPLE).long(),
                               np.arange(SAMPLE).astype(str), ["random"])
        return images.to(device), cfg.limit or n
    n = cfg.limit or SIZES.get(cfg.dataset, [0])[0]
    if known:
        cfg.limit = min(n, SAMPLE)
    train = balcon.load_data(cfg, device)[0]
    return train, n if known else len(train)


def seconds_of(calls, budget, cuda):
    """Medians over the rounds that fit into `budget` seconds. All calls take turns, so that noise
    hits all alike; the first round warms up."""
    rounds = []
    end = time.perf_counter() + budget
    while len(rounds) < 2 or time.perf_counter() < end:
        rounds.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            rounds[-1].append(time.perf_counter() - start)
    return np.median(rounds[1:], 0)


def flop_of_a_view(encoder, cfg, device):
    """Three forward passes: backward takes twice the forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.eval()(torch.zeros(1, 3, cfg.size, cfg.size, device=device))
    return 3 * counter.get_total_flops()


def time_step(encoder, train, cfg, m, budget):
    """Median seconds of a training step of m images, of the network, of the loss, of the views."""
    device = train.device
    cuda = device.type == "cuda"
    in_memory = getattr(train, "pixels", None) is not None
    steps = 1 if in_memory else 4  # more than what is read ahead

    def batches():
        orders = ((step, torch.randperm(len(train))[:m]) for step in itertools.count())
        return train.batches(orders, cfg.views, 2, (cfg.seed, "benchmark"))

    for_steps = batches()
    for_views = batches()
    x = next(for_steps)[1]
    crops = torch.rand(2 * m, 3, cfg.size, cfg.size).to(device)
    z = torch.randn(2 * m, cfg.projector[-1]).to(device)
    optimizer = torch.optim.SGD(encoder.train().parameters(), 1e-6, cfg.momentum)

    def update(x, backward):
        with balcon.autocast(device, cfg):
            z = encoder(x)
        optimizer.zero_grad()
        backward(z)
        optimizer.step()

    def loss(z):
        z1, z2 = z.chunk(2)
        balcon.LOSSES[cfg.loss](z1, z2, cfg.alpha, cfg.lam, cfg.similarity).backward()

    def train_steps():
        for _ in range(steps):
            update(next(for_steps)[1], loss)

    def network():
        update(x, lambda z: z.backward(torch.ones_like(z)))

    def views():
        if in_memory:
            next(for_views)
        else:  # threads decode and crop at the same time
            balcon.augment(crops, balcon.Draw((0,), 2 * m, torch.arange(2 * m)), cfg.views.names)

    calls = [train_steps, network, lambda: loss(z.requires_grad_()), views]
    seconds = seconds_of(calls, budget, cuda)
    return seconds[0] / steps, *seconds[1:]


def benchmark(*argv, budget=12):
    """budget: seconds of the rounds, less where reading has taken long."""
    cfg = balcon.parse_flags(list(argv))
    balcon.check_settings(cfg)
    device = balcon.start_processes()
    cuda = device.type == "cuda"
    if not cuda:
        cfg.workers = 1  # more would take the network's cores
    encoder = balcon.build_encoder(cfg, device)
    flop = flop_of_a_view(encoder, cfg, device)
    train, n = images_to_time(cfg, device)
    m = min(cfg.batch_size, len(train))
    if not cuda:
        m = min(m, max(2, int(1e10 / flop)))  # about a second
    budget = min(budget, 30 - (time.perf_counter() - START))
    step, network, losing, viewing = time_step(encoder, train, cfg, m, budget)
    rate = 2 * m / step
    total = 2 * cfg.epochs * (n - n % cfg.batch_size)
    lines = [
        ("training step", rate, f"views/s, from pixels to update; {m} images a step"),
        ("bare network", 2 * m / network, "views/s: forward, backward, SGD on ready tensors"),
        ("step / network", network / step, "of these two rates; 1 would be ideal"),
        ("views", viewing / step, "seconds of the views' making / of a step"),
        ("loss", losing / step, "seconds of the loss and its gradient / of a step"),
        ("PFLOP", total * flop / 1e15, "of the recipe: three forward passes a view"),
        ("hours", total / rate / 3600, "of the recipe on this machine"),
        ("TFLOP/s", rate * flop / 1e12, "of a step")]
    if cuda:
        name = torch.cuda.get_device_name()
        peak = next((peak for part, peak in PEAK.items() if part in name), None)
        if peak:
            lines.append(("share of peak", rate * flop / peak, f"{name}: {peak / 1e12:g} TFLOP/s"))
        else:
            print(f"{name}: its peak is not known")
        lines.append(("peak memory", torch.cuda.max_memory_allocated() / 2 ** 30, "GiB"))
    for name, value, meaning in lines:
        print(f"{name:16}{value:10.4g}  {meaning}")
