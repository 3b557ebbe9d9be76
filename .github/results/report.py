"""One table of the runs below some directories: what they were, and what they reached."""
import json
import sys
from pathlib import Path

import numpy as np


def json_or(path, default):
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else default


def read_results(folder, config):
    """({figure: value} of the last backbone, the settings that the figures depend on)."""
    stages = json_or(folder / "results.json", {})
    last = stages.get("trained", {} if config["epochs"] else stages.get("untrained", {}))
    figures = {}
    for found in last.values():
        figures |= {name: value for name, value in found.items()
                    if isinstance(value, (int, float))}
    settings = {}
    for stage in ("untrained", "trained"):
        for found in stages.get(stage, {}).values():
            settings |= found.get("settings", {})
    known_before = (*config, "weights", "images")
    return figures, {name: settings[name] for name in settings if name not in known_before}


def read_run(log):
    """Its settings without the seed, those of its evaluation, and the figures of its last backbone:
    none if the run has not finished."""
    try:
        head = json.loads(log.open(encoding="utf8").readline())
        config = head["config"]
    except (ValueError, KeyError):
        sys.exit(f"{log} is not the log of a run")
    figures, settings = read_results(log.parent, config)
    config = {name: value for name, value in config.items() if name != "seed"}
    return {**config, "images": str(head.get("images"))[:8]}, settings, figures


def find_logs(folders):
    return sorted({log for folder in folders for log in Path(folder).rglob("log.jsonl")})


def group_seeds(runs):
    """[(settings, [figures of each run])]: runs that differ in the seed alone. A run that has not
    been evaluated at all counts with the first of those that agree otherwise."""
    groups = []
    for config, settings, figures in sorted(runs, key=lambda run: not run[2]):
        for known_config, known_settings, members in groups:
            if config == known_config and (settings == known_settings or not settings):
                members.append(figures)
                break
        else:
            groups.append((config, settings, [figures]))
    return [({**config, **settings}, members) for config, settings, members in groups]


def cell(members, name):
    """"93.1 ± 0.4": mean and standard deviation; the number of runs if some of them lack it."""
    known = [figures[name] for figures in members if name in figures]
    if not known:
        return "–"
    text = f"{np.mean(known):.4g}"
    if len(known) > 1:
        text += f" ± {np.std(known, ddof=1):.2g}"
    if len(known) < sum(map(bool, members)):
        text += f" (n = {len(known)})"
    return text


def markdown(rows):
    """Rows of text, the first one the head, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = [[text.ljust(width) for text, width in zip(row, widths)] for row in rows]
    padded.insert(1, ["---"] * len(widths))
    return "".join("| " + " | ".join(row) + " |\n" for row in padded)


def report(*folders):
    """Print the settings that differ, how many runs have finished, and each figure as mean ±
    standard deviation over the runs that differ in the seed alone."""
    groups = group_seeds([read_run(log) for log in find_logs(folders)])
    if not groups:
        sys.exit(f"there is no run in {' '.join(folders) or 'no folder'}")
    known = {}  # {setting: its values as text}
    for settings, _ in groups:
        for key, value in settings.items():
            known.setdefault(key, set()).add(str(value))
    differ = [key for key, texts in known.items() if len(texts) > 1]
    names = dict.fromkeys(name for _, members in groups for figures in members for name in figures)
    rows = [[*differ, "finished runs", *names]]
    for settings, members in groups:
        finished = f"{sum(map(bool, members))} of {len(members)}"
        rows.append([*(str(settings.get(key, "–")) for key in differ), finished,
                     *(cell(members, name) for name in names)])
    print(markdown(rows), end="")
