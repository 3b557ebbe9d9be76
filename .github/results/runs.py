"""The runs of runs.jsonl, their grids over α and λ, and how well models explain a grid.

runs.jsonl: line 1 holds what is common, every other line is one run; ids that differ only in
"-sSEED" are seeds of one row. argv holds the flags beyond those of the preset.
"""
import functools
import json
import math
import re
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
NAMES = {"balanced": "balanced", "ntxent": "NT-Xent", "quadratic": "quadratic limit",
         "wang_isola": "Wang & Isola", "resnet8": "ResNet-8", "resnet10": "ResNet-10",
         "resnet18": "ResNet-18", "uni": "uniform", "lt": "long-tailed", "full": "all 50,000"}


# ------------------------------------------ runs ------------------------------------------
def parse(argv):
    """"--lam 4 --drop a b" -> {"lam": 4.0, "drop": "a b"}."""
    settings = {}
    for flag in argv.split("--")[1:]:
        name, _, value = flag.strip().partition(" ")
        is_number = re.fullmatch(r"[\d.e-]+", value)
        settings[name] = float(value) if is_number else value
    return settings


def read(line, presets):
    """One run with the settings of its flags and what tables derive from it."""
    run = {"loss": "balanced", "alpha": 2.0, "lam": 4.0, "lr": 0.1, "similarity": "cosine",
           "subset": "full", **parse(presets.get(line.get("preset"), "")),
           **parse(line.get("argv", "")), **line}
    run["strategy"] = "+ " + run["add"] if "add" in run else "base"
    if "drop" in run:
        run["strategy"] = "− " + run["drop"]
    run["row"] = re.sub(r"-s\d+$", "", run["id"])
    loss = NAMES.get(run["loss"], run["loss"])
    run["method"] = run.get("label", f"{loss} ({run['alpha']:g}, {run['lam']:g})")
    run["used"] = run.get("evaluated", run["subset"])
    if run.get("epochs") == 0:
        run.update(subset="–", strategy="–", lr="–")
        run["method"] = "raw pixels" if run.get("backbone") == "pixels" else "untrained"
    elif run["loss"] in PAPER and {run["alpha"], run["lam"]} <= set(PAPER["axis"]):
        place = PAPER["axis"].index(run["alpha"]), PAPER["axis"].index(run["lam"])
        run["paper"] = np.array(PAPER[run["loss"]])[place]
    if "seconds" in run:
        run.setdefault("minutes", run["seconds"] / 60)
    if "bias" in run:
        unit = run["bias"]["projection"]
        run.update(eq51=unit[0], eq51_se=unit[1], eq16=unit[2], relative=unit[5])
        run["relative_features"] = run["bias"]["features"][5]
    if "same_class" in run:
        own = run["same_class"][PAPER["axis"].index(run["alpha"])]
        run.update(lam_share=run["lam"] * own, own_share=own, over_chance=own / run["by_chance"])
    if "nu" in run:
        run["lam_nu"] = run["lam"] * run["nu"]
    return run


HEADER, *LINES = map(json.loads, (HERE / "runs.jsonl").read_text(encoding="utf8").splitlines())
PAPER = HEADER["paper"]
RUNS = [read(line, HEADER["presets"]) for line in LINES]


def select(**wanted):
    return [run for run in RUNS if all(run.get(key) == value for key, value in wanted.items())]


def by(runs, *fields):
    """{values of the fields: runs that share them}, in the order of the file."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[field] for field in fields), []).append(run)
    return groups


# ------------------------------------------ the grids ------------------------------------------
LOSSES = ("balanced", "ntxent")


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


# ------------------------------------------ models ------------------------------------------
def fit(columns, y):
    """R² of least squares with a constant; leave-one-out R², in which both the model and the mean
    know the other cells only."""
    n = len(y)
    x = np.column_stack([np.ones(n), *columns])
    hat = x @ np.linalg.pinv(x)
    residual = y - hat @ y
    left_out = residual / (1 - hat.diagonal()) * (1 - 1 / n)
    total = ((y - y.mean()) ** 2).sum()
    return 1 - (residual ** 2).sum() / total, 1 - (left_out ** 2).sum() / total


def models(a, b):
    """The columns of each model, for a = log α and b = log λ."""
    p = a + b
    return {"log α, quadratic (3)": [a, a ** 2],
            "**log αλ, quadratic (3)**": [p, p ** 2],
            "log α + log λ, both quadratic (5)": [a, a ** 2, b, b ** 2]}


def best_exponent(a, b, y):
    """The w for which a quadratic in log αλʷ explains most, and that quadratic."""
    fits = {}
    for w in np.arange(0.3, 1.31, 0.01):
        quadratic, residual, *_ = np.polyfit(a + w * b, y, 2, full=True)
        fits[residual[0]] = w, quadratic
    return fits[min(fits)]


def exponent_scores(a, b, y):
    """w, R² and leave-one-out R²; each left-out cell is unknown to its w as well."""
    n, errors = len(y), []
    for i in range(n):
        others = np.arange(n) != i
        w, quadratic = best_exponent(a[others], b[others], y[others])
        errors.append((y[i] - np.polyval(quadratic, a[i] + w * b[i])) * (1 - 1 / n))
    w = best_exponent(a, b, y)[0]
    left_out = 1 - np.square(errors).sum() / ((y - y.mean()) ** 2).sum()
    return w, fit([a + w * b, (a + w * b) ** 2], y)[0], left_out


def p_value(t, freedom):
    """Two-sided, of Student's t, by summing its density."""
    x = np.linspace(0, 200, 400_001)
    density = (1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
    return density[x >= abs(t)].sum() / density.sum()


def p_of_alpha(a, b, y):
    """p of a term log α beside the quadratic in log αλ."""
    p, freedom = a + b, len(y) - 4
    without, with_alpha = fit([p, p ** 2], y)[0], fit([p, p ** 2, a], y)[0]
    return p_value(math.sqrt((with_alpha - without) * freedom / (1 - with_alpha)), freedom)
