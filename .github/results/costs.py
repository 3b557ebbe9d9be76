"""How the cost grows with the work: `study.py costs`. One thread a process; it writes nothing and
prints one JSON object a line, for runs.jsonl. Photographs: --data DIR, else they are left out.
"""
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import balcon
import numpy as np
import torch
import torch.distributed as dist
from benchmark import commit

SELF = Path(__file__).with_name("study.py")
RESNET18 = 11_200_000  # weights whose gradients DDP averages in each step


def median_ms(call, seconds=2):
    """Of calls in this time, without the first."""
    call()
    times = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - before))
    return float(np.median(times))


def print_row(name, label, **figures):
    print(json.dumps({"id": f"cost-{name}", "kind": "cost", "git": commit(), "label": label,
                      **{key: float(f"{x:.3g}") for key, x in figures.items()}}), flush=True)


def loss_and_gradient(z1, z2):
    balcon.balanced_contrastive_loss(z1, z2, 2, 4).backward()


def loss_cost(m):
    """In a process of its own, whose peak is that of the loss."""
    views = [torch.randn(m, 128, requires_grad=True) for _ in range(2)]
    loss_and_gradient(*(torch.randn(8, 128, requires_grad=True) for _ in range(2)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss_and_gradient(*views)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print_row(f"loss-{m}", f"loss and gradient, m = {m:,} images, d = 128",
              ms=median_ms(lambda: loss_and_gradient(*views)), mb=peak)


def knn_cost(n):
    bank, queries = torch.randn(n, 512), torch.randn(512, 512)
    took = median_ms(lambda: balcon.nearest(bank, queries, 10))
    print_row(f"knn-{n}", f"kNN, {n:,} features of 512, a query", ms=took / len(queries))


def views_cost(size):
    m = max(2, 2 ** 20 // size ** 2 // 8)
    side = max(32, size)
    pixels = torch.randint(256, (m, 3, side, side), dtype=torch.uint8)
    data = balcon.Images(pixels, torch.full((m, 2), side), torch.zeros(m).long(),
                         np.arange(m).astype(str), ["random"])
    names = balcon.parse_flags(["--dataset", "cifar10"]).views.names
    views = balcon.Views(names, size, (0.2, 1.0))
    batches = data.batches(((step, torch.arange(m)) for step in itertools.count()), views, 2, (0,))
    print_row(f"views-{size}", f"views of {size} pixels (CIFAR's augmentations), a view",
              ms=median_ms(lambda: next(batches)) / (2 * m))


def rank_cost(processes):
    """Called on each rank. The batch is 512 images in all, so the arithmetic of all ranks together
    stays the same: what grows on two cores is communication."""
    device = balcon.start_processes()
    torch.set_num_threads(1)
    m = 512 // processes
    views = [torch.randn(m, 128, device=device, requires_grad=True) for _ in range(2)]
    gradients = torch.zeros(RESNET18)
    average = 0.0
    if processes > 1:
        average = median_over_ranks(lambda: dist.all_reduce(gradients))
    loss = median_over_ranks(lambda: loss_and_gradient(*views))
    if balcon.rank() == 0:
        print_row(f"ranks-{processes}", f"{processes} gloo processes on {os.cpu_count()} cores, "
                  "512 images in all: loss and gradient; all_reduce of 11.2 million floats",
                  ms=loss, average_ms=average)


def median_over_ranks(call, calls=20):
    """All ranks make the same number of calls."""
    call()
    times = []
    for _ in range(calls):
        before = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - before))
    return float(np.median(times))


def photographs_cost(folder):
    """ImageNet's pipeline reads each file anew in every epoch: two crops of 224 pixels of each."""
    cfg = balcon.parse_flags(["--dataset", "imagenet", "--data", folder, "--workers", "1"])
    train = balcon.load_data(cfg, torch.device("cpu"))[0]
    m = min(32, len(train))
    orders = ((step, torch.randperm(len(train))[:m]) for step in itertools.count())
    requests = train.batches(orders, balcon.Views([], 224, (0.2, 1.0)), 2, (0,))
    print_row("photographs", "ImageNet's photographs, one thread: an image read, two crops of 224",
              ms=median_ms(lambda: next(requests), 10) / m)


def costs(what="", size="", *flags):
    torch.set_num_threads(1)
    parts = {"loss": loss_cost, "knn": knn_cost, "views": views_cost, "ranks": rank_cost}
    if what in parts:
        parts[what](int(size))
        return
    alone = [sys.executable, SELF, "costs"]
    for m in (128, 512, 2048, 4096):
        subprocess.run([*alone, "loss", str(m)], check=True)
    for n in (10_000, 50_000, 200_000):
        knn_cost(n)
    for pixels in (12, 32, 64, 128, 224):
        views_cost(pixels)
    for processes in (1, 2, 4, 8):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={processes}"]
        subprocess.run([*torchrun, *alone[1:], "ranks", str(processes)], check=True,
                       stderr=subprocess.DEVNULL)
    if what == "--data":
        photographs_cost(size)
