"""The runs of runs.jsonl: read, selected, grouped, merged with those of the lane.

Line 1 holds what is common, every other line is one run. Ids that differ only in "-sSEED" are
seeds of one row. argv holds the flags beyond those of the preset.
"""
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
from stats import half_width, pooled_sd, verdict

HERE = Path(__file__).resolve().parent
FILE = HERE / "runs.jsonl"
NAMES = {"balanced": "balanced", "ntxent": "NT-Xent", "uni": "uniform", "lt": "long-tailed",
         "full": "all 50,000", "resnet8": "ResNet-8", "resnet10": "ResNet-10",
         "resnet18": "ResNet-18", "eq14": "Eq. 14", "eq5": "Eq. 5", "eq7": "Eq. 7", "nscl": "NSCL",
         "mean4": "mean of 3 views"}
LOSSES = ("balanced", "ntxent")


# ------------------------------------------ reading ------------------------------------------
def parse(argv):
    """"--lam 4 --drop a b" -> {"lam": 4.0, "drop": "a b"}; a later flag wins."""
    settings = {}
    for flag in argv.split("--")[1:]:
        name, _, value = flag.strip().partition(" ")
        is_number = re.fullmatch(r"[\d.e-]+", value)
        settings[name] = float(value) if is_number else value
    return settings


def read(line, presets):
    """One run with the settings of its flags and what the tables derive from it."""
    run = {"loss": "balanced", "alpha": 2.0, "lam": 4.0, "lr": 0.1, "similarity": "cosine",
           "subset": "full", **parse(presets.get(line.get("preset"), "")),
           **parse(line.get("argv", "")), **line}
    run["row"] = re.sub(r"-s\d+$", "", run["id"])
    run["strategy"] = "+ " + run["add"] if "add" in run else "base"
    if "drop" in run:
        run["strategy"] = "− " + run["drop"]
    run["used"] = run.get("evaluated", run["subset"])
    loss = NAMES.get(run["loss"], run["loss"])
    run["method"] = run.get("label", f"{loss} ({run['alpha']:g}, {run['lam']:g})")
    if run.get("epochs") == 0:
        run.update(subset="–", strategy="–", lr="–")
        run["method"] = "raw pixels" if run.get("backbone") == "pixels" else "untrained"
    elif run["loss"] in PAPER and {run["alpha"], run["lam"]} <= set(PAPER["axis"]):
        place = PAPER["axis"].index(run["alpha"]), PAPER["axis"].index(run["lam"])
        run["paper"] = np.array(PAPER[run["loss"]])[place]
    if "seconds" in run:
        run.setdefault("minutes", run["seconds"] / 60)
    if "views" in run:
        run["views_percent"] = 100 * run["views"] / PAPER["views"]
    if run.get("views") and run.get("preset") in HEADER["gflop per view"]:
        run["pflop"] = run["views"] * HEADER["gflop per view"][run["preset"]] / 1e6
    if "pflop" in run:
        run["pflop_percent"] = 100 * run["pflop"] / PAPER["pflop"]
    if isinstance(run.get("bounds"), dict):  # of question C
        run.update(run["bounds"], violated=run["bounds"]["angle_over_90"])
    if "eq51" in run.get("bias", ()):
        bias = run["bias"]
        run.update(eq51=bias["eq51"], eq51_raw=bias["raw_eq51"], eq16=bias["eq16"],
                   relative=bias["eq16_relative"],
                   relative_features=bias["features_eq16_relative"])
    elif "bias" in run:
        unit = run["bias"]["projection"]
        run.update(eq51=unit[0], eq51_se=unit[1], eq16=unit[2], relative=unit[5])
        run["eq51_raw"] = run["bias"]["raw_projection"][0]
        run["relative_features"] = run["bias"]["features"][5]
    if "same_class" in run:
        own = run["same_class"][PAPER["axis"].index(run["alpha"])]
        run.update(lam_share=run["lam"] * own, own_share=own, over_chance=own / run["by_chance"])
    if "nu" in run:
        run["lam_nu"] = run["lam"] * run["nu"]
    return run


HEADER, *LINES = map(json.loads, FILE.read_text(encoding="utf8").splitlines())
PAPER = HEADER["paper"]
RUNS = [read(line, HEADER["presets"]) for line in LINES]


def select(**wanted):
    return [run for run in RUNS if all(run.get(key) == value for key, value in wanted.items())]


def method_of(run):
    """A run's method by the name that it has elsewhere if λ = 1."""
    if run["lam"] == 1:
        return f"{'SimCLR' if run['loss'] == 'ntxent' else 'DCL'} at τ = 1/{run['alpha']:g}"
    return f"{NAMES[run['loss']]} ({run['alpha']:g}, {run['lam']:g})"


def by(runs, *fields):
    """{values of the fields: runs that share them}, in the order of the file."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[field] for field in fields), []).append(run)
    return groups


def row(name):
    """The runs of this row, or the one run of this id."""
    runs = select(row=name) or select(id=name)
    if not runs:
        raise KeyError(f"there is no run {name}")
    return runs


def values(name, field):
    runs = row(name)
    if any(field not in run for run in runs):
        raise KeyError(f"the run {name} has no {field}")
    return [run[field] for run in runs]


# ------------------------------------------ spread over seeds ----------------------------------
def comparable(run):
    length = run.get("stage", "").rstrip("bc") or run.get("epochs")  # a stage has one
    return run.get("preset"), length


@functools.cache
def spread(name, field):
    """Pooled SD of one run and its degrees of freedom: over all trained rows of the same preset,
    stage and number of epochs."""
    kind, stage = comparable(row(name)[0]), row(name)[0].get("stage", "")
    trained = [run for run in RUNS if comparable(run) == kind and run["epochs"] and field in run
               and run.get("stage", "") <= stage]  # A2b adds to A2, and changes no interval of it
    groups = by(trained, "row").values()
    return pooled_sd([[run[field] for run in runs] for runs in groups])


def difference(one, two, field):
    """(mean of row one − mean of row two, half of its 95 % interval)."""
    first = values(one, field)
    second = values(two, field)
    if comparable(row(one)[0]) != comparable(row(two)[0]):
        raise ValueError(f"{one} and {two} are not of one preset and number of epochs")
    later = max(one, two, key=lambda name: row(name)[0].get("stage", ""))
    return np.mean(first) - np.mean(second), half_width(*spread(later, field), len(first),
                                                        len(second))


def verdict_of(one, two, field):
    return verdict(*difference(one, two, field))


# ------------------------------------------ the grids ------------------------------------------
def grid_runs(loss):
    """Preset R over α and λ at the rate 0.1, which is Fig. 5 at our scale."""
    return select(preset="R", loss=loss, lr=0.1, epochs=12, similarity="cosine", strategy="base")


@functools.cache
def grid(loss, field, least=1):
    """log₂ α, log₂ λ and accuracy of the cells with λ ≥ least; the paper's: field "paper"."""
    cells = by(grid_runs(loss), "alpha", "lam").items()
    cells = [(*cell, np.mean([run[field] for run in runs])) for cell, runs in cells
             if cell[1] >= least and field in runs[0]]
    alpha, lam, y = np.array(cells).T
    return np.log2(alpha), np.log2(lam), y


# ------------------------------------------ commands ------------------------------------------
def command(name):
    """What trains a run again, at its commit: balcon.py, or `study.py train` for the runs that
    are no recipe."""
    run = row(name)[0]
    kind = HEADER["trained by"].get(run["preset"])
    if run["loss"] not in LOSSES:
        kind = run["loss"]
    program = "balcon.py"
    if kind:
        program = f".github/results/study.py train {kind}"
    argv = run["argv"].replace(f"--loss {kind}", "").split()
    if run.get("backbone") == "pixels":
        program = ".github/results/study.py pixels"
        argv = [word for word in argv if word not in ("--backbone", "pixels")]
    preset = HEADER["presets"][run["preset"]].split()
    flags = " ".join([*preset, *argv, "--seed", str(run["seed"])])
    return f"git checkout {run['git']} && python {program} {flags}"


def merge(rows_file):
    """Append the lane's new rows to runs.jsonl. A known id with other figures is refused."""
    known = {line["id"]: line for line in LINES}
    new = []
    for text in Path(rows_file).read_text(encoding="utf8").splitlines():
        line = json.loads(text)
        if line["id"] in known and known[line["id"]] != line:
            sys.exit(f"{line['id']} is in runs.jsonl with other figures")
        if line["id"] not in known:
            known[line["id"]] = line
            new.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    with open(FILE, "a", encoding="utf8") as file:
        file.writelines(new)
    print(f"{len(new)} new runs")
