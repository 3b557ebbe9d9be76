"""The study behind RESULTS.md: its tables and figures, its instruments, its unusual runs.

    python .github/results/study.py tables            # fill in RESULTS.md from runs.jsonl
    python .github/results/study.py tables --check    # exit 1 if RESULTS.md says anything else
    python .github/results/study.py figures           # draw the *.svg beside this file
    python .github/results/study.py measure last.pt repulsion nscl fewshot cdnv [flags of balcon.py]
    python .github/results/study.py pixels [flags of balcon.py]
    python .github/results/study.py picture before/neighbors.png after/neighbors.png
    python .github/results/study.py train quadratic --alpha 2 --lam 4 [flags of balcon.py]

runs.jsonl: line 1 holds what is common, every other line is one run; ids that differ only in
"-sSEED" are seeds of one row. RESULTS.md: a table stands between <!-- table: NAME --> and
<!-- end -->; a figure in a sentence stands before its source, which is a run and a field,
44.37<!--balanced-a2-l8/linear-->, or a key of `derived`, 0.63<!--noise/linear-->.
"""
import functools
import math
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from runs import (HEADER, LOSSES, NAMES, PAPER, RUNS, by, exponent_scores, fit,  # noqa: E402
                  grid, grid_runs, models, p_of_alpha, p_value, select)

PAGE = HERE.parents[1] / "RESULTS.md"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"((?:[−\d.,]+ ± )?[^\s(|<>]*)<!--(\S+?)-->")  # whatever stands there
DIGITS = {
    "views": 0, "steps": 0, "minutes": 0, "seconds": 0, "b_negative": 0, "angle": 1, "paper": 2,
    "lr": 1, "size": 0, "positive": 3, "nu": 3, "gaps": 3, "bounds": 3, "same_class": 3,
    "lam_share": 3, "own_share": 3, "by_chance": 3, "ntxent_positive": 4,
    "eq51": 4, "eq51_se": 4, "eq16": 4, "relative": 4, "relative_features": 4}


# ------------------------------------------ text ------------------------------------------
def number(x, digits=2):
    text = f"{x + math.copysign(1e-9, x):,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def show(runs, field):
    """"44.85 ± 0.41": mean and standard deviation over seeds; "–" where it was not measured.
    A field such as "angle/1" is an entry of a list."""
    if field == "runs":
        return str(len(runs))
    name, *places = field.split("/")
    values = [run[name] for run in runs if name in run]
    for place in places:
        values = [value[int(place)] for value in values]
    if not values or isinstance(values[0], str):
        return NAMES.get(values[0], values[0]) if values else "–"
    digits = DIGITS.get(name, runs[0].get("digits", 2))
    spread = f" ± {number(np.std(values, ddof=1), digits)}" if len(set(values)) > 1 else ""
    return number(np.mean(values), digits) + spread


def markdown(rows):
    """Rows of text, the first one the head, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    padded.insert(1, ["---"] * len(widths))
    return "".join("| " + " | ".join(row) + " |\n" for row in padded)


# ------------------------------------------ tables ------------------------------------------
# {table: (rows, {head: field})}; rows are ids without seeds, those without a run are left out
ACCURACY = {"runs": "runs", "kNN, k = 1": "knn1", "linear": "linear"}
THREE = "ntxent-a2-l1 balanced-a2-l4 balanced-a4-l2"
RUN_TABLES = {
    "board": ("", {"network": "backbone", "crops": "size", "": "method", "rate": "lr",
                   "minutes": "minutes", "views": "views", "kNN, k = 10": "knn10",
                   "linear": "linear"}),
    "bias": ("balanced-a2-l4 blur noise cutout rotation nocolor", {
        "": "strategy", **ACCURACY, "Eq. 51": "eq51", "Eq. 16": "eq16",
        "Eq. 16 / distance": "relative", "the same, features": "relative_features"}),
    "distributions": ("sub-pixels-uni sub-pixels-lt sub-untrained-uni sub-untrained-lt "
                      "sub-ntxent-uni sub-ntxent-lt sub-balanced-a2-l1-uni "
                      "sub-balanced-a2-l1-lt sub-balanced-uni sub-balanced-lt "
                      "sub-pixels-full sub-untrained-full sub-ntxent-uni-full "
                      "sub-ntxent-lt-full sub-balanced-uni-full sub-balanced-lt-full", {
                          "": "method", "pretrained on": "subset",
                          "classifier and kNN use": "used", **ACCURACY}),
    "assumptions": (THREE, {
        "": "method", "angle: mean, °": "angle/0", "95 %, °": "angle/1",
        "Assumption 4.3 violated, %": "violated", "ν": "nu", "λν": "lam_nu",
        "B < 0, %": "b_negative", "gap of Eq. 8": "gaps/0", "gap of Eq. 10": "gaps/1"}),
    "false-negatives": (THREE + " untrained-pairs", {
        "": "method", "share at α = 1": "same_class/0", "α = 2": "same_class/1",
        "α = 4": "same_class/2", "α = 8": "same_class/3", "own α: share / chance": "over_chance",
        "λ × share": "lam_share", "positive's share at α = 2": "ntxent_positive/1"}),
    "limit": ("", {"": "method", "runs": "runs", "kNN, k = 1": "knn1", "kNN, k = 10": "knn10",
                   "linear": "linear", "views": "views"}),
    "speed": ("", {"": "label", "ratio": "ratio", "commit": "git"}),
}


def run_rows(name):
    """A table's runs are those of its kind, or those that it lists."""
    listed, columns = RUN_TABLES[name]
    found = by(RUNS, "row")
    groups = [found[row,] for row in listed.split() if (row,) in found]
    groups += by(select(kind=name), "row").values()
    return [list(columns), *([show(runs, field) for field in columns.values()] for runs in groups)]


def bounds_rows():
    rows = [["epoch", "gap of Eq. 8", "gap of Eq. 10", "mean ν", "B", "Eq. 8 violated, %"]]
    measured = select(row="long-balanced")[0]["bounds"]
    for place in (0, 1, 10):
        rows.append([number(x, n) for x, n in zip(measured[place], (0, 3, 2, 3, 3, 2))])
    return rows


def nscl_rows():
    """Gap, gap of an untrained network and bound, at the smallest and the largest α."""
    rows = [["classes", *(f"{what}, α = {alpha}" for alpha in (1, 8)
                          for what in ("gap", "untrained", "bound"))]]
    networks = [select(row=row)[0]["nscl"] for row in ("c100", "c100-untrained")]
    for (classes, *trained), (_, *untrained) in zip(*networks):
        if classes in (2, 10, 100):
            figures = [trained[0], untrained[0], trained[1], trained[-2], untrained[-2], trained[-1]]
            rows.append([str(classes), *map(number, figures, (4, 4, 3) * 2)])
    return rows


def seed_pairs(*presets):
    """Training runs of these presets that differ in nothing but the seed."""
    groups = by([run for run in RUNS if run.get("preset") in presets], "row").values()
    return [runs[:2] for runs in groups if len(runs) > 1 and runs[0]["epochs"]]


def rate_rows(preset):
    """Each method over its rates."""
    runs = select(preset=preset, epochs=12, strategy="base")
    rates = sorted({run["lr"] for run in runs})
    rows = [["", *(f"{what}, {rate}" for what in ("linear", "kNN") for rate in rates)]]
    cells = sorted(runs, key=lambda run: (run["alpha"] * run["lam"], run["alpha"]))
    for (method,), runs in by(cells, "method").items():
        at = by(runs, "lr")
        rows.append([method, *(show(at.get((rate,), []), field)
                               for field in ("linear", "knn10") for rate in rates)])
    return rows


OWN = ("balanced-a2-l4 balanced-a4-l1 ntxent-a8-l1 balanced-a8-l4 ntxent-a8-l4 balanced-a2-l1 "
       "ntxent-a2-l1 untrained").split()
SCALES = {"own": 2, "four": 4, "twenty": 20}  # epochs of preset H


def own_rows():
    """Preset H: every method after each number of epochs; raw pixels."""
    places = [(scale, field) for scale in SCALES for field in ("knn1", "knn10", "linear")][1:]
    names = {"knn1": "kNN 1", "knn10": "kNN 10", "linear": "linear"}
    rows = [["", "rate", *(f"{SCALES[scale]}: {names[field]}" for scale, field in places), "paper"]]
    for row in (*OWN, "pixels"):
        first = select(row="all-pixels") if row == "pixels" else [
            run for scale in SCALES for run in select(row=f"{scale}-{row}")][:1]
        control = first if first[0]["epochs"] == 0 else []  # the same after any number of epochs
        runs = {scale: select(row=f"{scale}-{row}") or control for scale in SCALES}
        rows.append([show(first, "method"), show(first, "lr"),
                     *(show(runs[scale], field) for scale, field in places), show(first, "paper")])
    return rows


def product_rows():
    heads = [f"{loss}: {what}" for loss in ("balanced", "NT-Xent")
             for what in ("linear", "kNN", "s⁺", "paper")]
    rows = [["αλ", "α, λ", *heads]]
    cells = {loss: by(grid_runs(loss), "alpha", "lam") for loss in LOSSES}
    for alpha, lam in sorted(cells["balanced"], key=lambda cell: (cell[0] * cell[1], cell)):
        figures = [show(cells[loss].get((alpha, lam), []), field) for loss in LOSSES
                   for field in ("linear", "knn1", "positive", "paper")]
        rows.append([f"{alpha * lam:g}", f"{alpha:g}, {lam:g}", *figures])
    return rows


@functools.cache
def model_rows():
    """R² / leave-one-out R² of each model on each grid."""
    grids = {"ours, balanced": ("balanced", "linear"), "ours, NT-Xent": ("ntxent", "linear"),
             "paper, balanced": ("balanced", "paper"), "paper, NT-Xent": ("ntxent", "paper"),
             "kNN, balanced": ("balanced", "knn1"), "kNN, NT-Xent": ("ntxent", "knn1")}
    rows = [["model of accuracy (parameters)", *grids]]
    grids = [grid(*key) for key in grids.values()]
    for name in models(*grids[0][:2]):
        scores = [fit(models(a, b)[name], y) for a, b, y in grids]
        rows.append([name, *(" / ".join(map(number, pair)) for pair in scores)])
    exponents = [exponent_scores(*cells) for cells in grids]
    rows.append(["log αλʷ, quadratic (4)",
                 *(" / ".join(map(number, pair)) for _, *pair in exponents)])
    rows.append(["its exponent w", *(number(w) for w, _, _ in exponents)])
    rows.append(["p of log α beyond αλ", *(number(p_of_alpha(*cells), 3) for cells in grids)])
    return rows


SPECIAL = {"own": own_rows, "validation": functools.partial(rate_rows, "V"), "product": product_rows,
           "strong": functools.partial(rate_rows, "VS"), "models": model_rows,
           "bounds": bounds_rows, "nscl": nscl_rows}


# ------------------------------------------ figures in sentences ---------------------------
def linear(row, seed=0):
    return select(row=row, seed=seed)[0]["linear"]


def noise_figures():
    pairs = seed_pairs("R", "S")
    found = {"noise/pairs": str(len(pairs)), "noise/H/pairs": str(len(seed_pairs("H")))}

    def spread_of(pairs, field):
        return math.sqrt(np.mean([(one[field] - two[field]) ** 2 for one, two in pairs]) / 2)

    for field in ("linear", "knn10"):
        found[f"noise/H/{field}"] = number(spread_of(seed_pairs("H"), field))
    for field in ("linear", "knn1"):
        spread = spread_of(pairs, field)
        found[f"noise/{field}"] = number(spread)
        for n in (1, 2, 4):  # two means of n runs, resolved at 5 % in 80 % of cases
            found[f"noise/{field}/{n}"] = number(2.8 * spread * math.sqrt(2 / n), 1)
    return found


def product_figures():
    found, scores = {}, []
    for loss in LOSSES:
        for field in ("linear", "paper"):
            a, b, y = grid(loss, field)
            p = a + b
            curvature, slope, _ = np.polyfit(p, y, 2)
            found[f"{field}/{loss}/best"] = number(2 ** (-slope / curvature / 2), 0)
            found[f"{field}/{loss}/span"] = number(np.ptp(y[p == 3]))  # of the cells at αλ = 8
            scores.append((*fit([p, p ** 2], y), fit([a, a ** 2, b, b ** 2], y)[1]))
    for name, column in zip(("r2", "left-out", "additive"), zip(*scores)):
        found[f"{name}/low"], found[f"{name}/high"] = number(min(column)), number(max(column))
    a, b, y = grid("balanced", "linear", 0)
    found["r2/all"] = number(fit([a + b, (a + b) ** 2], y)[0])
    runs = [run for run in grid_runs("balanced") + grid_runs("ntxent") if run["lam"] >= 1]
    shares = [100 * run["second_order"] / run["repelling"] for run in runs]
    found["second/low"], found["second/high"] = number(min(shares), 0), number(max(shares), 0)
    w, r2, _ = exponent_scores(*grid("ntxent", "paper"))
    found["exponent/w"], found["exponent/r2"] = number(w), number(r2)
    found["p/knn"] = number(max(p_of_alpha(*grid(loss, "knn1")) for loss in LOSSES), 3)
    found["mean/largest"] = number(max(abs(run["negative"]) for run in runs), 3)
    return found


def loss_figures():
    """Balanced minus NT-Xent over the 16 cells, seed 0. What λ = 4 gains over λ = 1 at each rate,
    and both at their best rate."""
    pairs = [by(grid_runs(loss), "alpha", "lam") for loss in LOSSES]
    apart = [pairs[0][cell][0]["linear"] - pairs[1][cell][0]["linear"] for cell in pairs[1]]
    spread = np.std(apart, ddof=1)
    half = 2.131 * spread / math.sqrt(len(apart))  # 95 % of Student's t with 15 degrees of freedom
    found = {"loss/mean": number(np.mean(apart)), "loss/interval": number(half),
             "loss/sd": number(spread)}
    gains = []
    for loss in LOSSES:
        one, four = ([linear(f"{rate}{loss}-a2-l{lam}") for rate in ("", "lr0.2-", "lr0.4-")]
                     for lam in (1, 4))
        gains += np.subtract(four, one).tolist()
        found[f"best/{loss}/1"], found[f"best/{loss}/4"] = number(max(one)), number(max(four))
    return {**found, "gain/low": number(min(gains), 1), "gain/high": number(max(gains), 1)}


def bias_figures():
    """Ranges without the last strategy, which drops colour; correlations with and without it."""
    found = {}
    rows = [select(row=row) for row in RUN_TABLES["bias"][0].split()]
    for field in ("eq51", "eq16", "relative", "relative_features"):
        bias = np.array([np.mean([run[field] for run in runs]) for runs in rows])
        found[f"{field}/range"] = number(np.ptp(bias[:-1]), 4)
        for accuracy in ("linear", "knn1"):
            y = [np.mean([run[accuracy] for run in runs]) for runs in rows]
            for n in (6, 5):
                r = np.corrcoef(bias[:n], y[:n])[0, 1]
                p = p_value(r * math.sqrt((n - 2) / (1 - r * r)), n - 2)
                found[f"{field}/{accuracy}/{n}"] = number(r)
                found[f"{field}/{accuracy}/{n}/p"] = number(p)
    return found


@functools.cache
def derived():
    found = {**noise_figures(), **product_figures(), **loss_figures(), **bias_figures()}
    for scale in SCALES:
        for field in ("linear", "knn1", "knn10"):
            value = {row: np.mean([run[field] for run in select(row=f"{scale}-{row}")])
                     for row in OWN if select(row=f"{scale}-{row}")}
            for row in value:  # (2, 4) over the other rows
                lead = value["balanced-a2-l4"] - value[row]
                found[f"{scale}-{row}/behind/{field}"] = number(lead, 1)
    best = {}
    for cell, runs in by(select(preset="V", epochs=12, strategy="base"), "alpha", "lam").items():
        best[cell] = max(np.mean([run["linear"] for run in seeds])
                         for seeds in by(runs, "row").values())
    found["val/gain"] = number(best[2, 4] - best[2, 1], 1)
    for product in (2, 4, 8, 16, 32, 64):
        highest = max(y for (alpha, lam), y in best.items() if alpha * lam == product)
        found[f"val/best/{product}"] = number(highest)
    found["paper/4-1"] = number(PAPER["balanced"][2][0])
    found["paper/gain"] = number(PAPER["balanced"][1][2] - PAPER["balanced"][1][0])
    found["paper/headline"] = number(PAPER["balanced"][1][2] - PAPER["ntxent"][1][0])
    for name, row in {"scale": "balanced-a2-l4", "half-hour": "half-hour"}.items():
        views = select(row=row)[0]["views"]
        found[f"{name}/percent"] = number(100 * views / PAPER["views"], 1)
    found.update({f"quoted/{name}": figure for name, figure in HEADER["quoted"].items()})
    for name in ("untrained", "ntxent", "balanced", "balanced-a2-l1"):
        uniform, tail = (np.mean([run["linear"] for run in select(row=f"sub-{name}-{subset}")])
                         for subset in ("uni", "lt"))
        found[f"gap/{name}"] = number(uniform - tail)
    # Figures: gap, bound, gap, bound, … by α
    gaps, control = (np.array(select(row=row)[0]["nscl"])[:, 1:] for row in
                     ("c100", "c100-untrained"))
    for name, ratios in {"nscl": gaps[:, 1::2] / gaps[:, ::2],
                         "nscl-control": control[:, ::2] / gaps[:, ::2]}.items():
        digits = 0 if name == "nscl" else 2
        found[f"{name}/low"] = number(ratios.min(), digits)
        found[f"{name}/high"] = number(ratios.max(), digits)
    gaps = select(row="long-balanced")[0]["bounds"]
    found["bounds/growth"] = number(gaps[-1][1] / gaps[0][1], 1)
    return found


# ------------------------------------------ the page ------------------------------------------
def sourced(match):
    key = match[2]
    row, _, field = key.partition("/")
    runs = [run for run in RUNS if row in (run["id"], run["row"])]
    if key not in derived() and not runs:
        raise KeyError(f"<!--{key}-->: no such run or figure")
    return f"{derived().get(key) or show(runs, field)}<!--{key}-->"


def table(match):
    name = match[2]
    if name in SPECIAL:
        rows = SPECIAL[name]()
    else:
        rows = run_rows(name)
    return match[1] + markdown(rows) + match[3]


def tables(check):
    """Fill in RESULTS.md, or exit with the first line that says anything else."""
    text = PAGE.read_text(encoding="utf8")
    filled = FIGURE.sub(sourced, TABLE.sub(table, text))
    if not check:
        PAGE.write_text(filled, encoding="utf8")
    elif text != filled:
        is_now, should_be = text.split("\n"), filled.split("\n")
        n = [a == b for a, b in zip(is_now, should_be)].index(False)
        sys.exit(f"RESULTS.md, line {n + 1}:\n{is_now[n]}\nshould be\n{should_be[n]}")


def figures():
    """SVG files with the same bytes every time, transparent, with grey text for any page."""
    import matplotlib
    from matplotlib.figure import Figure
    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    matplotlib.rcParams.update(dict.fromkeys(parts, "#808080"))
    matplotlib.rcParams.update({"svg.hashsalt": "balcon", "svg.fonttype": "none"})

    figure = Figure((8, 3.2), layout="constrained")
    titles = {"linear": "ours, 228 steps", "paper": "the paper, 200 epochs"}
    for axes, (field, title) in zip(figure.subplots(1, 2), titles.items()):
        for loss, marker in zip(LOSSES, "os"):
            a, b, y = grid(loss, field)
            axes.plot(2 ** (a + b), y, marker, label=NAMES[loss], alpha=0.8)
        axes.set(title=title, xlabel="αλ", ylabel="linear accuracy (%)")
        axes.set_xscale("log", base=2)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(HERE / "product.svg", transparent=True, metadata={"Date": None})

    figure = Figure((8, 3), layout="constrained")
    epochs, *gaps = zip(*[row[:3] for row in select(row="long-balanced")[0]["bounds"]])
    for axes, title, gap in zip(figure.subplots(1, 2), ("Eq. 8", "Eq. 10"), gaps):
        axes.plot(epochs, gap, "o-")
        axes.set(title=title, xlabel="epoch", ylabel="mean gap", ylim=(0, None))
    figure.savefig(HERE / "bounds.svg", transparent=True, metadata={"Date": None})


def main(command, *rest):
    if command == "tables":
        tables("--check" in rest)
    elif command == "figures":
        figures()
    else:
        import instruments
        getattr(instruments, command)(*rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
