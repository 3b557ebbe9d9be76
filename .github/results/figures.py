"""Draws product.svg, bounds.svg and answer.svg. Needs matplotlib."""
import numpy as np
from page import CONTROLS, KINDS, tested_rows
from runs import HERE, LOSSES, NAMES, grid, method_of, row, select, spread, values
from stats import half_width


def save_figure(figure, name):
    """The same bytes every time, transparent."""
    figure.savefig(HERE / name, transparent=True, metadata={"Date": None})


def product_figure(new_figure):
    figure = new_figure((8, 3.2))
    titles = {"linear": "ours, 228 steps", "paper": "the paper, 200 epochs"}
    for axes, (field, title) in zip(figure.subplots(1, 2), titles.items()):
        for loss, marker in zip(LOSSES, "os"):
            a, b, y = grid(loss, field)
            axes.plot(2 ** (a + b), y, marker, label=NAMES[loss], alpha=0.8)
        axes.set(title=title, xlabel="αλ", ylabel="linear accuracy (%)")
        axes.set_xscale("log", base=2)
    axes.legend(loc="lower left", frameon=False)
    save_figure(figure, "product.svg")


def bounds_figure(new_figure):
    figure = new_figure((8, 3))
    both = figure.subplots(1, 2)
    for name, run in {"R, α = 2": row("long-balanced"), "H, α = 8": select(stage="bounds")}.items():
        epochs, *gaps = zip(*[measured[:3] for measured in run[0]["bounds"]])
        for axes, title, gap in zip(both, ("Eq. 8", "Eq. 10"), gaps):
            axes.plot(epochs, gap, "o-", label=name)
            axes.set(title=title, xlabel="epoch", ylabel="mean gap", ylim=(0, None))
    both[0].legend(frameon=False)
    save_figure(figure, "bounds.svg")


def answer_points():
    """[(label, colour, face, mean, half of the 95 % interval)]: preset H, 4 epochs, test; A2's rows
    in place of older ones of the same method. Filled: the rate was searched, three or six seeds."""
    points = []
    searched = {name for kind in KINDS.values() for name in tested_rows(kind)}
    for name in CONTROLS[::-1]:
        points.append((row(name)[0]["method"], "C7", "C7", values(name, "linear")[0], 0))
    chosen = {(run["loss"], run["alpha"], run["lam"]): run["row"]
              for run in select(preset="H", epochs=4)}  # later rows replace earlier ones
    for loss, alpha, lam in sorted(chosen, key=lambda cell: (cell[0] == "balanced", *cell[1:])):
        name = chosen[loss, alpha, lam]
        known = values(name, "linear")
        colour = "C0" if loss == "ntxent" else "C1"
        face = colour if name in searched else "none"
        points.append((method_of(row(name)[0]), colour, face, np.mean(known),
                       half_width(*spread(name, "linear"), len(known))))
    return points


def answer_figure(new_figure):
    points = answer_points()
    figure = new_figure((8, 0.3 * len(points) + 0.8))
    axes = figure.subplots()
    for place, (_, colour, face, mean, half) in enumerate(points):
        axes.errorbar(mean, place, xerr=half, fmt="o", color=colour, mfc=face, capsize=3)
        axes.annotate(f"{mean:.1f}", (mean + half, place), (6, -3), textcoords="offset points")
    axes.set_yticks(range(len(points)), [label for label, *_ in points])
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set(xlabel="linear accuracy (%) with 95 % interval, CIFAR-10 test, preset H, 4 epochs")
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, "answer.svg")


def figures():
    import matplotlib
    from matplotlib.figure import Figure
    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    matplotlib.rcParams.update(dict.fromkeys(parts, "#808080"))  # for light and dark pages
    matplotlib.rcParams.update({"svg.hashsalt": "balcon", "svg.fonttype": "none"})

    def new_figure(size):
        return Figure(size, layout="constrained")

    product_figure(new_figure)
    bounds_figure(new_figure)
    answer_figure(new_figure)
