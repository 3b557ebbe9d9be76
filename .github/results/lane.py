"""The runs of QUESTIONS.md, in their order, on one thread. The same command goes on after a kill.

    python .github/results/lane.py CLONE DATA OUT     # A and B; CLONE: balcon at the frozen commit
    python .github/results/lane.py CLONE DATA OUT C   # C, whose frozen commit is another

DATA holds cifar10/ and cifar10-val/ (made here) as class folders, for C cifar100/, too; OUT gets a
folder for each run and rows.jsonl. Several lanes may share OUT.
"""
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import question_c

FROZEN = "4f0682200393e8a1d871a743be3a79475af8d190"
H = ("--dataset cifar10 --backbone resnet8 --size 12 --stem cifar --batch-size 256 "
     "--weight-decay 5e-4 --crop-scale 0.2 1 --probe features --no-baseline")
PRESETS = {"H": (H, "cifar10"), "HV": (H, "cifar10-val")}
PFLOP_PER_VIEW = 0.076 / 399_360  # of preset H
METHODS = {  # stage A1: the middle one of the first three rates
    ("ntxent", 8, 1): 0.4, ("balanced", 2, 4): 0.8, ("ntxent", 4, 1): 0.8,
    ("balanced", 4, 2): 0.4, ("ntxent", 16, 1): 0.2, ("ntxent", 2, 1): 0.8,
    ("balanced", 4, 1): 0.8}
ADDED = {  # stage A1b, added when A1 was known: αλ = 16 and 32, and the decoupled loss
    ("ntxent", 32, 1): 0.4, ("balanced", 8, 2): 0.8, ("balanced", 4, 4): 0.8,
    ("balanced", 16, 1): 0.8, ("balanced", 8, 1): 0.8}
EXTRA = {("balanced", 32, 1): 0.4}  # stage A1c, added when A2b had two rows: 16 was an edge
EDGES = {("balanced", 16, 2): 0.8, ("balanced", 64, 1): 1.6}  # stage A1d: both edges, once more
WARMER = [("balanced", 8, 1), ("ntxent", 8, 1), ("balanced", 4, 1)]  # stage A2c, added after A2b
SEARCHES = {"A1": METHODS, "A1b": ADDED, "A1c": EXTRA, "A1d": EDGES}


def run_of(stage, method, rate, seed, epochs, more=""):
    loss, alpha, lam = method
    return {"id": f"{stage}-{loss}-a{alpha}-l{lam}-lr{rate:g}-s{seed}", "stage": stage,
            "preset": "HV" if stage in SEARCHES else "H", "seed": seed,
            "argv": f"--loss {loss} --alpha {alpha} --lam {lam} --lr {rate:g} --epochs {epochs}"
                    + more}


def rates_of(method, rows):
    """{rate: validation accuracy} in the stage that searches this method's."""
    loss, alpha, lam = method
    stage, = [stage for stage, methods in SEARCHES.items() if method in methods]
    prefix = f"{stage}-{loss}-a{alpha}-l{lam}-lr"
    return {float(name[len(prefix):-3]): row["linear"] for name, row in rows.items()
            if name.startswith(prefix)}


def best_rate(method, rows):
    rates = rates_of(method, rows)
    return max(rates, key=rates.get)


def search(stage, rows):
    """The missing rates: three for each method, then beyond an edge as long as it is the best."""
    methods = SEARCHES[stage]
    first = [run_of(stage, method, middle * factor, 0, 2)
             for factor in (1, 0.5, 2) for method, middle in methods.items()]
    missing = [run for run in first if run["id"] not in rows]
    for method in methods:
        rates = rates_of(method, rows)
        if len(rates) < 3:
            continue
        best = max(rates, key=rates.get)
        if best == max(rates):
            missing.append(run_of(stage, method, 2 * best, 0, 2))
        if best == min(rates):
            missing.append(run_of(stage, method, best / 2, 0, 2))
    return missing


def methods_until(last):
    """Those of the searches up to this stage."""
    return [method for stage, methods in SEARCHES.items() if stage <= last for method in methods]


def finalists(methods, rows):
    """{(loss, λ = 1): (method, rate) of the best}: SimCLR, balanced, and the decoupled loss."""
    best = {}
    for method in methods:
        rate = best_rate(method, rows)
        kind = method[0], method[2] == 1
        best[kind] = max(best.get(kind, (0,)), (rates_of(method, rows)[rate], method, rate))
    return {kind: found[1:] for kind, found in best.items()}


def second_seeds(pairs, known):
    """Six seeds of each (method, rate), in A2b unless A2 has its first; without the known ones."""
    runs = []
    for seed in range(6):
        for pair in pairs:
            in_a2 = run_of("A2", *pair, 0, 4)["id"] in known
            runs.append(run_of("A2" if in_a2 else "A2b", *pair, seed, 4))
    return [run for run in runs if run["id"] not in known]


def plan(rows):
    """All runs, stage by stage; a stage needs the rows of the one before it that can change it."""
    missing = search("A1", rows)
    if any(not run["id"].startswith("A1-balanced-a4-l1-") for run in missing):  # not in A2
        return missing
    best = finalists(METHODS, rows)
    simclr, simclr_rate = best["ntxent", True]
    balanced, balanced_rate = best["balanced", False]
    checks = [(("ntxent", *balanced[1:]), balanced_rate), (("balanced", *simclr[1:]), simclr_rate)]
    runs = [run_of("A2", *pair, seed, 4) for seed in range(6)
            for pair in ((simclr, simclr_rate), (balanced, balanced_rate))]
    runs += [run_of("A2", *pair, seed, 4) for seed in range(3) for pair in checks]
    added = search("A1b", rows)
    if added or missing:
        return [run for run in missing + runs + added if run["id"] not in rows]
    best = finalists(methods_until("A1b"), rows)
    final, decoupled = [best["ntxent", True], best["balanced", False]], best["balanced", True]
    runs += second_seeds([*final, decoupled], {run["id"] for run in runs})
    for stage in ("A1c", "A1d"):
        more = search(stage, rows)
        if more:
            runs += more
            break
        best = finalists(methods_until(stage), rows)
        winners = [best["balanced", False], best["balanced", True]]
        runs += second_seeds(winners, {run["id"] for run in runs})
    twenty = [run_of("A3", *pair, seed, 20) for seed in range(3) for pair in final]
    twenty[1]["argv"] += " --save-every 2"  # for Fig. 6
    b = [run_of("B", (loss, 8, 4), rate, 0, 20, " --save-every 2")
         for rate in (0.4, 0.2) for loss in ("ntxent", "balanced")]
    third = [run_of("A3b", *decoupled, seed, 20) for seed in range(3)]
    warmer = [run_of("A2c", method, best_rate(method, rows), seed, 4)
              for method in WARMER for seed in range(3)]
    runs += twenty[:2] + third[:1] + warmer + twenty[2:] + third[1:] + b
    return [run for run in runs if run["id"] not in rows]


def split_validation(data):
    """cifar10-val: every tenth training file of each class becomes a test file. Hard links."""
    if (data / "cifar10-val" / "done").exists():
        return
    for folder in sorted((data / "cifar10" / "train").iterdir()):
        for place, file in enumerate(sorted(folder.iterdir())):
            split = "test" if place % 10 == 9 else "train"
            target = data / "cifar10-val" / split / folder.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(file, target)
    (data / "cifar10-val" / "done").touch()


def read_rows(out):
    path = out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["id"]: row for row in map(json.loads, lines)}


def command(run):
    """What trains it, without data and run directory."""
    flags = f"{PRESETS[run['preset']][0]} {run['argv']} --workers 0"
    return ["balcon.py", *flags.split()]


def figures(results):
    """Those of results.json that a row holds."""
    found = results["trained"]["knn"] | results["trained"]["linear"]
    return {"pflop": None, "seconds": results["seconds"],
            **{name: round(value, 2) for name, value in found.items()}}


def train(run, clone, data, out, question):
    images = question.PRESETS[run["preset"]][1]
    folder, started = out / run["id"], time.time()
    words = [sys.executable, *question.command(run), "--seed", str(run["seed"]), "--data",
             str(data / images), "--out", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "screen.txt", "a") as screen:
        subprocess.run(words, cwd=clone, stdout=screen, stderr=screen, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = [json.loads(line) for line in open(folder / "log.jsonl")]
    views = 2 * 256 * log[-1]["step"]
    row = {**run, "git": question.FROZEN[:7], "steps": log[-1]["step"], "views": views,
           "minutes_since_the_last_start": round((time.time() - started) / 60, 1),
           **question.figures(json.loads((folder / "results.json").read_text()))}
    row.setdefault("seconds", round(log[-1].get("seconds", 0), 1))
    if "pflop" in row:
        row["pflop"] = round(views * PFLOP_PER_VIEW, 4)
    if "above_floor" in log[-1]:
        row["above_floor"] = round(log[-1]["above_floor"], 4)
    return row


def main(clone, data, out, question="A"):
    clone, data, out = map(Path, (clone, data, out))
    question = {"A": sys.modules[__name__], "C": question_c}[question]
    head = subprocess.run("git describe --always --abbrev=40 --dirty", shell=True, cwd=clone,
                          capture_output=True, text=True).stdout.strip()
    if head != question.FROZEN:
        sys.exit(f"{clone} is at {head or 'no commit'}, and the question is for {question.FROZEN}")
    split_validation(data)
    out.mkdir(parents=True, exist_ok=True)
    while True:
        for run in question.plan(read_rows(out)):
            lock = open(out / f"{run['id']}.lock", "w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another lane trains it
                continue
            if run["id"] in read_rows(out):
                continue
            row = train(run, clone, data, out, question)
            with open(out / "rows.jsonl", "a") as rows:
                rows.write(json.dumps(row) + "\n")
            break
        else:
            if not question.plan(read_rows(out)):
                break
            time.sleep(30)  # the other lane has the last runs of this stage


if __name__ == "__main__":
    main(*sys.argv[1:])
