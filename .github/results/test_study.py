"""Tests of the study: pytest .github/results/test_study.py. No network, no data."""
import itertools
import json
import math
import re
import statistics
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import balcon  # noqa: E402
import benchmark  # noqa: E402
import costs  # noqa: E402
import figures  # noqa: E402
import instruments  # noqa: E402
import lane  # noqa: E402
import objectives  # noqa: E402
import page  # noqa: E402
import question_c  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
import stats  # noqa: E402
import study  # noqa: E402
import versus  # noqa: E402

CPU = torch.device("cpu")


def assert_close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What `study.py train` changes in balcon is put back."""
    losses = dict(balcon.LOSSES)
    choices = list(balcon.SETTINGS["loss"][2])
    monkeypatch.setattr(balcon, "build_encoder", balcon.build_encoder)
    monkeypatch.setattr(balcon.Images, "batches", balcon.Images.batches)
    monkeypatch.setattr(objectives.Batch, "views", 2)
    monkeypatch.setattr(objectives.Batch, "labels", None)
    monkeypatch.setitem(balcon.AUGMENTATIONS, "grayscale", balcon.AUGMENTATIONS["grayscale"])
    yield
    balcon.LOSSES.clear()
    balcon.LOSSES.update(losses)
    balcon.SETTINGS["loss"][2][:] = choices


# ------------------------------------------ statistics ----------------------------------------
def density_beyond(t, freedom):
    """Two-sided p of Student's t by summing its density in z, where t = √freedom · tan z."""
    z = (np.arange(400_000) + 0.5) / 400_000 * math.pi / 2
    weight = np.cos(z) ** (freedom - 1)  # density · dt / dz, up to a constant
    return weight[math.sqrt(freedom) * np.tan(z) > t].sum() / weight.sum()


@pytest.mark.parametrize("freedom, t", [  # from a table of Student's t, two-sided 5 %
    (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (14, 2.145), (15, 2.131),
    (120, 1.980)])
def test_students_t_is_that_of_a_table_and_of_its_density(freedom, t):
    assert_close(stats.t_quantile(freedom), t, 3e-4)
    for x in (0.0, 0.7, t, 9.0):
        assert_close(stats.p_value(x, freedom), density_beyond(x, freedom), 2e-5)
        assert stats.p_value(-x, freedom) == stats.p_value(x, freedom)


def test_pooled_sd_weighs_variances_by_their_degrees_of_freedom():
    groups = [[1.0, 2.5, 3.0], [7.0], [5.0, 5.5], [0.0, 4.0, 4.5, 9.0]]
    shares = [(len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1]
    sd, freedom = stats.pooled_sd(groups)
    assert freedom == 6
    assert_close(sd, math.sqrt(sum(shares) / 6))
    assert stats.pooled_sd([[1.0], [2.0]])[1] == 0
    assert math.isnan(stats.half_width(*stats.pooled_sd([[1.0], [2.0]]), 1, 1))


def test_the_interval_holds_the_difference_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        groups = [rng.normal(3, 2, 2), rng.normal(1, 2, 4), rng.normal(7, 2, 3)]
        half = stats.half_width(*stats.pooled_sd(groups), 2, 4)
        hits += abs(groups[0].mean() - groups[1].mean() - 2) < half
    assert 0.935 < hits / 2000 < 0.965


@pytest.mark.parametrize("difference, half, expected", [
    (1.0, 0.9, "better"), (0.5, 0.4, "better"),  # where two hold, better is said
    (-1.0, 0.9, "worse"), (0.3, 0.7, "level"), (-0.3, 0.7, "level"), (0.3, 0.9, "open"),
    (-0.3, 0.9, "open"), (1.0, 1.5, "open"), (3.0, math.nan, "open")])
def test_verdicts_are_those_of_the_questions(difference, half, expected):
    assert stats.verdict(difference, half) == expected
    assert "±1.1" in (HERE / "QUESTIONS.md").read_text(encoding="utf8") and stats.MARGIN == 1.1


def least_squares(columns, y):
    """Weights, prediction and their covariance without the noise."""
    x = np.column_stack([np.ones(len(y)), *columns])
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    return weights, x @ weights, np.linalg.inv(x.T @ x)


def random_grid():
    rng = np.random.default_rng(0)
    a, b = (values.ravel().astype(float) for values in np.meshgrid(range(4), range(4)))
    return a, b, 5 - (a + 0.6 * b - 2) ** 2 + 0.3 * rng.normal(size=16)


def test_r2_is_the_share_of_variance_and_leave_one_out_leaves_one_out():
    a, b, y = np.random.default_rng(0).normal(size=(3, 9))
    errors = 0
    mean_errors = 0
    for i in range(9):
        kept = np.arange(9) != i
        weights, _, _ = least_squares([a[kept], b[kept]], y[kept])
        errors += (y[i] - weights @ [1, a[i], b[i]]) ** 2
        mean_errors += (y[i] - y[kept].mean()) ** 2
    r2, left_out = stats.fit([a, b], y)
    assert_close(r2, 1 - np.var(y - least_squares([a, b], y)[1]) / np.var(y))
    assert_close(left_out, 1 - errors / mean_errors)


def test_the_exponent_is_the_one_planted():
    a, b, y = random_grid()
    w, r2, left_out = stats.exponent_scores(a, b, y)
    assert abs(w - 0.6) < 0.06
    r2_of = {}
    for trial in np.arange(0.3, 1.31, 0.01):
        p = a + trial * b
        r2_of[trial] = 1 - np.var(y - least_squares([p, p ** 2], y)[1]) / np.var(y)
    assert_close([w, r2], [max(r2_of, key=r2_of.get), max(r2_of.values())])
    assert 0.8 < left_out < r2


def test_p_of_alpha_is_that_of_its_weight_in_a_regression():
    a, b, y = random_grid()
    p = a + b
    weights, predicted, covariance = least_squares([p, p ** 2, a], y)
    noise = ((y - predicted) ** 2).sum() / (16 - 4)
    t = abs(weights[3]) / math.sqrt(noise * covariance[3, 3])
    assert_close(stats.p_of_alpha(a, b, y), density_beyond(t, 12), 1e-4)


def test_correlation_by_loops():
    x, y = np.random.default_rng(1).normal(size=(2, 6))
    sums = [0.0, 0.0, 0.0]
    for i, j in zip(x - x.mean(), y - y.mean()):
        sums = [sums[0] + i * j, sums[1] + i * i, sums[2] + j * j]
    r = sums[0] / math.sqrt(sums[1] * sums[2])
    found = stats.correlation(x, y)
    assert_close(found[0], r)
    weights, predicted, covariance = least_squares([x], y)
    noise = ((y - predicted) ** 2).sum() / 4
    t = abs(weights[1]) / math.sqrt(noise * covariance[1, 1])
    assert_close(found[1], density_beyond(t, 4), 1e-4)


def test_ntxent_can_prefer_views_that_differ():
    p = np.linspace(-1, 1, 200_001)
    k = 2 * (512 - 1)
    for alpha, lam in (8, 2), (8, 4), (8, 8), (4, 8), (2, 1):
        bound = -p + lam / alpha * np.log(np.exp(alpha * p) + k * np.exp(-alpha * (1 + p) / k))
        assert_close(stats.best_positive_similarity(512, alpha, lam), p[bound.argmin()])
        assert_close(stats.ntxent_floor(512, alpha, lam), bound.min())
    z1, z2 = views_of_classes()[0].unbind(1)
    assert balcon.generalized_nt_xent_loss(z1, z2, 8, 4) > stats.ntxent_floor(7, 8, 4)


# ------------------------------------------ runs.jsonl ----------------------------------------
LINES = [json.loads(line) for line in open(HERE / "runs.jsonl", encoding="utf8")][1:]


def figures_of(start, field="linear"):
    """{seed: figure} of the lines whose id is `start` and a seed, without the study's reader."""
    return {line["id"][len(start):]: line[field] for line in LINES
            if re.fullmatch(re.escape(start) + r"(-s\d+)?", line["id"]) and field in line}


def test_every_id_is_there_once_and_has_a_preset_and_a_commit():
    ids = [line["id"] for line in LINES]
    assert len(set(ids)) == len(ids)
    for line in LINES:
        assert line["git"] and line.get("preset", "B") in runs.HEADER["presets"]


def test_differences_use_the_seeds_of_one_preset_and_number_of_epochs():
    names = ["four-balanced-a2-l4", "four-ntxent-a8-l1", "four-balanced-a2-l1", "four-ntxent-a2-l1"]
    groups = [list(figures_of(name).values()) for name in names]
    assert [len(group) for group in groups] == [2] * 4  # all other rows of this kind have one
    sd = math.sqrt(sum(statistics.variance(group) for group in groups) / 4)
    half = 2.776 * sd * math.sqrt(1 / 2 + 1 / 2)
    found = runs.difference(*names[:2], "linear")
    assert_close(found, [np.mean(groups[0]) - np.mean(groups[1]), half], 1e-3)
    single = runs.difference(names[0], "four-balanced-a4-l1", "linear")
    assert_close(single[1], 2.776 * sd * math.sqrt(1 / 2 + 1), 1e-3)
    with pytest.raises(ValueError, match="one preset"):
        runs.difference(names[0], "own-balanced-a2-l4", "linear")
    assert math.isnan(runs.difference("twenty-balanced-a2-l4", "twenty-ntxent-a2-l1", "linear")[1])


def test_a_run_is_trained_again_by_a_command():
    for name, start in {
            "four-ntxent-a8-l1-s1": "balcon.py --dataset cifar10 --backbone resnet8",
            "strong-a2-l4-s0": ".github/results/study.py train strong --dataset cifar10",
            "val-bf16-a2-l4-lr0.8-s0": ".github/results/study.py train bfloat16 --dataset",
            "new-quadratic-s0": ".github/results/study.py train quadratic --dataset cifar10",
            "new-wang-isola-s1": ".github/results/study.py train wang_isola --dataset cifar10",
            "pixels": ".github/results/study.py pixels --dataset cifar10"}.items():
        words = runs.command(name).split(" && ")
        line = next(line for line in LINES if line["id"] == name)
        assert words[0] == f"git checkout {line['git']}"
        assert words[1].startswith(f"python {start}")
        assert words[1].endswith(f"--seed {line['seed']}")
        assert f"--loss {line['argv'].split('--loss ')[-1].split()[0]}" in words[1] or (
            "study.py" in words[1] or "--loss" not in line["argv"])
    assert "pixels" not in runs.command("pixels").split(" pixels ", 1)[1]


@pytest.mark.parametrize("preset", ["R", "V", "H", "HS"])
def test_compute_is_that_of_the_presets_network(preset):
    cfg = balcon.parse_flags(runs.HEADER["presets"][preset].split())
    flop = benchmark.flop_of_a_view(balcon.build_encoder(cfg, CPU), cfg, CPU)
    assert runs.HEADER["gflop per view"][preset] == pytest.approx(flop / 1e9, rel=1e-3)
    run = next(run for run in runs.RUNS if run.get("preset") == preset and run.get("steps"))
    assert run["pflop"] == pytest.approx(run["views"] * flop / 1e15, rel=1e-3)


def test_merge_appends_what_is_new_and_refuses_other_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "FILE", tmp_path / "runs.jsonl")
    runs.FILE.write_text("{}\n")
    new = {"id": "A1-new-s0", "linear": 1.5}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in (LINES[0], new, new)))
    runs.merge(rows)
    assert [json.loads(line) for line in runs.FILE.read_text().splitlines()] == [{}, new]
    rows.write_text(json.dumps({**LINES[0], "linear": 0}))
    with pytest.raises(SystemExit, match=LINES[0]["id"]):
        runs.merge(rows)


# ------------------------------------------ the pages -----------------------------------------
def test_the_pages_are_what_the_templates_and_the_runs_say():
    study.main("tables", "--check")


def falsified(tmp_path, monkeypatch, name, change):
    """Point the page at a copy with one change."""
    template = f"{name}.template.md"
    text = page.PAGES[template].read_text(encoding="utf8")
    changed = change(text)
    assert changed != text
    copy = tmp_path / f"{name}.md"
    copy.write_text(changed, encoding="utf8")
    monkeypatch.setitem(page.PAGES, template, copy)


@pytest.mark.parametrize("name, pattern, replacement", [
    ("RESULTS", r"63\.57( +\| 70)", r"63.75\1"),  # a figure of a table
    ("RESULTS", r"\[4\.75, 6\.68\]", "[4.75, 6.86]"),  # an interval
    ("RESULTS", r"−0\.577", "−0.477"), ("RESULTS", r"\| level \|", "| better |"),
    ("RESULTS", r"\| untrained .*\n", ""), ("RESULTS", r"\Z", "more\n"),
    ("APPENDIX", r"(\| base +\| 2 \| )34\.22( +\| )44\.85", r"\g<1>44.85\g<2>34.22"),
    ("APPENDIX", r"R² is 0\.20", "R² is high")])
def test_a_falsified_page_is_found_out(name, pattern, replacement, tmp_path, monkeypatch):
    falsified(tmp_path, monkeypatch, name, lambda text: re.sub(pattern, replacement, text, count=1))
    with pytest.raises(SystemExit, match="should be"):
        page.tables("--check")


def test_a_falsified_run_changes_the_page(monkeypatch):
    monkeypatch.setitem(runs.row("four-balanced-a2-l4")[0], "linear", 99.0)
    with pytest.raises(SystemExit, match="should be"):
        page.tables("--check")


@pytest.mark.parametrize("text, problem", [
    ("{four-no-such/linear}", "four-no-such"), ("{own-untrained/no-such}", "no-such"),
    ("{own-untrained over no-such/linear}", "no-such"), ("{table no-such}", "no-such"),
    ("{four-balanced-a2-l4 over own-balanced-a2-l4/linear}", "one preset"),
    ("{no-such}", "no-such"), ("{sd of no-such/linear}", "no-such")])
def test_a_template_that_names_what_is_not_there_fails_with_its_name(
        text, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "HERE", tmp_path)
    (tmp_path / "RESULTS.template.md").write_text(text)
    with pytest.raises(SystemExit, match=f"RESULTS.template.md.*{problem}"):
        page.filled("RESULTS.template.md")


def test_figures_in_the_templates_are_settings_or_placeholders():
    settings = {"0.1", "0.2", "0.4", "0.8", "1.6", "0.05", "0.0101",  # rates, criterion, example
                "1.1", "1.5", "1.8", "2.5", "3.3",  # margins, old thresholds, 1902.00423's figure
                "84.0", "84.8",  # lightly's benchmark of CIFAR-10
                "3.10", "3.11", "2.14", "12.85", "2510.10572"}  # versions, a floor, the paper
    for template in page.PAGES:
        text = (HERE / template).read_text(encoding="utf8")
        for pattern in (page.PLACEHOLDER.pattern, r"(?m:^ {4}.*$)", r"`[^`\n]*`", r"\]\([^)]*\)",
                        r"(Theorem|Assumption|arXiv|A|§)[ .]?[\d.]+(, [\d.]+)*"
                        r"( and [\d.]+)?", r"[\d.]+ GB"):  # memory is not a figure of runs.jsonl
            text = re.sub(pattern, "", text)
        assert set(re.findall(r"\d+\.\d+", text)) <= settings


def test_the_pages_are_readable():
    text = page.PAGES["RESULTS.template.md"].read_text(encoding="utf8")
    assert len(text.splitlines()) <= 160 and "<!--" not in text
    for path in page.PAGES.values():
        assert max(map(len, path.read_text(encoding="utf8").splitlines())) <= 300
        for target in re.findall(r"\]\(([^)#]+)[)#]", path.read_text(encoding="utf8")):
            assert target.startswith("https:") or (path.parent / target).exists(), target


def test_figures_of_the_page_by_other_means():
    found = page.derived()
    apart = [figures_of(f"balanced-a{alpha}-l{lam}")["-s0"] - figures_of(
        f"ntxent-a{alpha}-l{lam}")["-s0"] for alpha in (1, 2, 4, 8) for lam in (1, 2, 4, 8)]
    half = 2.131 * statistics.stdev(apart) / 4
    mean = statistics.mean(apart)
    expected = f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]".replace("-", "−")
    assert found["loss/mean"] == expected

    bias = [np.mean([line[0] for line in figures_of_bias(name)]) for name in (
        "balanced-a2-l4", "blur", "noise", "cutout", "rotation", "nocolor")]
    accuracy = [np.mean(list(figures_of(name).values())) for name in (
        "balanced-a2-l4", "blur", "noise", "cutout", "rotation", "nocolor")]
    for n in (6, 5):
        r = statistics.correlation(bias[:n], accuracy[:n])
        assert found[f"eq51/linear/{n}"] == f"{r:.2f}".replace("-", "−")

    ones = apart[::4]  # λ = 1
    half = 3.1824 * statistics.stdev(ones) / 2
    assert found["loss/one"] == page.show_interval(statistics.mean(ones), half)
    assert found["loss/one/verdict"] == "open"

    tail = [np.mean(list(figures_of(f"sub-untrained-{kind}").values())) for kind in ("uni", "lt")]
    assert found["gap/untrained"] == f"{tail[0] - tail[1]:.2f}"
    grid = {(alpha, lam): page.PAPER["balanced"][i][j] for i, alpha in enumerate((1, 2, 4, 8))
            for j, lam in enumerate((1, 2, 4, 8))}
    for name, least, most in (("r2", 1, 64), ("middle", 4, 32)):
        cells = [(math.log2(a * b), y) for (a, b), y in grid.items() if least <= a * b <= most]
        p, y = np.array(cells).T
        r2 = 1 - np.var(y - least_squares([p, p ** 2], y)[1]) / np.var(y)
        texts = [found[f"{name}/high"]] if name == "r2" else [found["paper/balanced/middle"]]
        assert f"{r2:.2f}" in texts
    trained = [line for line in LINES if line.get("steps", 0) > 0]
    assert found["runs/trained"] == str(len(trained))
    assert found["runs/no-seconds"] == str(len([x for x in trained if "seconds" not in x]))


def figures_of_bias(start):
    return [bias["projection"] for bias in figures_of(start, "bias").values()]


def text_of(figure, digits=2):
    return f"{figure:.{digits}f}".replace("-", "−")


def test_rows_of_the_main_table_by_other_means():
    head, *rows = page.main_rows()
    assert head[4].endswith("kNN 10") and head[5] == "linear" and head[6].endswith("kNN 10")
    assert "0.11 % of the compute" in head[4] and "10.1 % of the views" in head[6]
    for cells, start in zip(rows, ("balanced-a2-l4", "balanced-a4-l1", "ntxent-a8-l1")):
        knn, linear = (figures_of(f"four-{start}", field) for field in ("knn10", "linear"))
        assert cells[3:6] == [str(len(knn)), *(page.number(np.mean(list(found.values())))
                                               for found in (knn, linear))]
    assert rows[0][6:8] == ["70.72", "71.54"] and rows[0][8] == "86.08"
    assert rows[-2][4:6] == ["39.40", "44.02"] and rows[-1][4:6] == ["37.23", "41.76"]


def test_more_figures_of_the_page_by_other_means():
    found = page.derived()
    best = {}  # {αλ: {rate and cell: accuracies}}
    for line in LINES:
        flags = line.get("argv", "").replace("--", "").split()
        if line.get("preset") == "V" and "drop" not in flags and "epochs" not in flags:
            setting = {"alpha": "2", "lam": "4", **dict(zip(flags[::2], flags[1::2]))}
            cell = best.setdefault(float(setting["alpha"]) * float(setting["lam"]), {})
            cell.setdefault(line["argv"], []).append(line["linear"])
    for product in (2, 4, 8, 16, 32, 64):
        highest = max(map(np.mean, best[product].values()))
        assert found[f"val/best/{product}"] == text_of(highest)

    ratios = []
    for gaps in figures_of("c100", "nscl").values():
        for _, *pairs in gaps:
            ratios += [pairs[i + 1] / pairs[i] for i in range(0, len(pairs), 2)]
    assert [found["nscl/low"], found["nscl/high"]] == [text_of(f(ratios), 0) for f in (min, max)]

    second = []
    for line in LINES:
        if re.fullmatch(r"(balanced|ntxent)-a\d+-l\d+-s\d", line["id"]):
            second.append(100 * line["second_order"] / line["repelling"])
    assert [found["second/low"], found["second/high"]] == [text_of(f(second), 0)
                                                          for f in (min, max)]
    p = np.array([[i + j for j in range(4)] for i in range(4)]).ravel()
    x = np.linspace(0, 6, 60_001)
    for loss in ("balanced", "ntxent"):
        curve = np.polyval(np.polyfit(p, np.ravel(page.PAPER[loss]), 2), x)
        assert found[f"paper/{loss}/best"] == text_of(2 ** x[curve.argmax()], 0)
    assert [found["paper/8-4"], found["paper/gain"], found["paper/headline"]] == [
        text_of(82.95 - 75.23), text_of(86.08 - 84.07), text_of(86.08 - 84.95)]

    bias = np.mean([line[2] for line in figures_of_bias("balanced-a2-l4")])
    relative = np.mean([line[5] for line in figures_of_bias("rotation")])
    assert page.evaluated("balanced-a2-l4/eq16") == text_of(bias, 4)
    assert page.evaluated("rotation/relative") == text_of(relative, 4)
    share = figures_of("balanced-a2-l4", "same_class")["-s0"][1]
    assert page.evaluated("balanced-a2-l4-s0/lam_share") == text_of(4 * share, 3)

    grids = []
    for loss in ("balanced", "ntxent"):
        cells = [(math.log2(a), math.log2(b), figures_of(f"{loss}-a{a}-l{b}", "knn1"))
                 for a, b in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8))]
        a, b, y = np.array([(a, b, np.mean(list(seeds.values()))) for a, b, seeds in cells
                            if seeds]).T
        if loss == "balanced":
            a, b, y = np.append(a, -1), np.append(b, 4), np.append(
                y, figures_of("balanced-a0.5-l16", "knn1")["-s0"])
        grids.append(stats.p_of_alpha(a, b, y))  # which has an oracle of its own
    assert found["p/knn"] == text_of(max(grids), 3)


def test_the_gain_of_lambda_depends_on_the_recipe():
    gains = [np.mean([figure for name in names for figure in figures_of(name).values()])
             for names in (["val-a2-l4-lr0.8"], ["val-a2-l1-lr0.8"], ["strong-lr0.03-a2-l4"],
                           ["strong-lr0.1-a2-l1"])]
    gain = gains[0] - gains[1] - (gains[2] - gains[3])
    assert page.derived()["gain/difference"].startswith(f"{gain:.2f} [")
    assert stats.welch_half_width((3, 5), (1, 5)) == pytest.approx(2 * stats.t_quantile(8), 1e-6)
    assert stats.welch_half_width((4, 9), (1e-9, 1)) == pytest.approx(2 * 2.2622, 1e-4)


def test_leads_of_lambda_are_all_there():
    head, *rows = page.lead_rows()
    assert head[0] == "preset" and len({tuple(cells[:3]) for cells in rows}) == len(rows)
    found = {(*cells[:2], cells[2].removesuffix(", best of each")): cells[4] for cells in rows}
    rates = {lam: {line["argv"].split("--lr ")[1] for line in LINES if line.get("preset") == "V"
                   and re.fullmatch(rf"val-a2-l{lam}-lr[\d.]+-s0", line["id"])} for lam in (1, 4)}
    common = {("V", "12", f"{rate}, {rate}") for rate in rates[1] & rates[4]}
    assert len(common) == 4 and common <= set(found)
    for rate, start in (("0.1", ""), ("0.2", "lr0.2-"), ("0.4", "lr0.4-")):
        four, one = (np.mean(list(figures_of(f"{start}balanced-a2-l{lam}").values()))
                     for lam in (4, 1))
        assert found["R", "12", f"{rate}, {rate}"].startswith(f"{four - one:.2f} [")


def test_the_p_of_a_difference_is_that_of_its_t():
    names = "four-balanced-a2-l4", "four-ntxent-a8-l1"
    apart, half = runs.difference(*names, "linear")
    t = apart / (half / 2.7764)
    found = page.evaluated(f"{names[0]} over {names[1]}/linear/p")
    assert found == text_of(density_beyond(t, 4), 3)


# ------------------------------------------ the paper, item by item ---------------------------
def test_every_item_of_the_paper_is_listed():
    covered = [name for item in page.ITEMS for name in item["covers"]]
    wanted = [f"Eq. {n}" for n in range(1, 52)] + [f"Table {n}" for n in range(1, 6)]
    wanted += [f"Fig. {n}" for n in range(1, 7)] + [f"Lemma A.{n}" for n in range(1, 4)]
    wanted += ["Theorem 4.4", "Theorem 4.6", "Footnote 3", "Section 5.1", "Section 5.5"]
    wanted += [f"Assumption 4.{n}" for n in (1, 2, 3, 5)]
    wanted += [f"Next check {n}" for n in range(1, 4)]
    assert set(wanted) <= set(covered)


def check_command(command):
    program, *words = command.split()
    if program == "pytest":
        name = words[words.index("-k") + 1]
        assert any(name in test for test in globals() if test.startswith("test_")), name
    elif program == "balcon.py":
        balcon.check_settings(balcon.parse_flags(words))
    elif words[0] == "train":
        assert words[1] in {**objectives.LOSSES, **objectives.RECIPES}
    else:
        assert words[0] == "measure" and set(words[2:]) <= set(instruments.INSTRUMENTS)


@pytest.mark.parametrize("item", page.ITEMS, ids=lambda item: item["item"])
def test_an_item_has_code_and_a_command_or_a_run(item):
    assert item["command"] or item["runs"], item["item"]
    module, name = item["code"].split(".")
    assert hasattr(sys.modules[module], name)
    if item["command"]:
        check_command(item["command"])
    for name in item["runs"]:
        runs.row(name)
    judged = item["verdict"]
    if judged.startswith("{C"):  # question C fills it in
        judged = page.evaluated(judged[1:-1])
    elif judged in ("not run", "not tested at scale"):
        assert bool(item["runs"]) == (judged == "not tested at scale")
    assert judged in ("agrees", "conflicts", "not run", "not tested at scale", "no claim")
    legend = (HERE / "RESULTS.template.md").read_text(encoding="utf8")
    assert f"*{judged}*" in legend
    if judged in ("agrees", "conflicts"):
        assert item["runs"] or item["command"].startswith("pytest")
    for name in page.PLACEHOLDER.findall(item["here"]):
        kind, _, rest = name.partition("/")
        for row in kind.split(" over "):
            assert name in page.derived() or row in item["runs"] + ["untrained"], name


# ------------------------------------------ questions A and B ---------------------------------
def lane_rows(stage, epochs, **figures):
    """Runs of the stage: {method: (rate, accuracies of the seeds)}."""
    rows = []
    for method, (rate, accuracies) in figures.items():
        loss, alpha, lam = method.split("_")
        for seed, accuracy in enumerate(accuracies):
            line = {"id": f"{stage}-{loss}-a{alpha}-l{lam}-lr{rate}-s{seed}", "stage": stage,
                    "preset": "HV" if stage[:2] == "A1" else "H", "seed": seed, "git": "x",
                    "argv": f"--loss {loss} --alpha {alpha} --lam {lam} --lr {rate} "
                            f"--epochs {epochs}",
                    "steps": 1, "linear": accuracy, "knn1": 1.0, "knn10": 2.0, "pflop": 0.1}
            rows.append(runs.read(line, runs.HEADER["presets"]))
    return rows


@pytest.fixture
def with_rows(monkeypatch):
    """Replaces the rows of a question by others."""
    known = list(runs.RUNS)

    def replace(*rows, question="AB"):
        others = [run for run in known if run.get("stage", "-")[0] not in question]
        for module in (runs, page):
            monkeypatch.setattr(module, "RUNS", others + list(itertools.chain(*rows)))
        runs.spread.cache_clear()
        page.derived.cache_clear()

    yield replace
    monkeypatch.undo()
    runs.spread.cache_clear()
    page.derived.cache_clear()


def test_stages_say_that_they_have_not_run(with_rows):
    with_rows()
    for stage in ("A1", "A1b", "A1c", "A1d", "A2", "A2b", "A2c", "A3", "A3b", "B"):
        assert page.TABLES[stage]() == page.NOT_YET


def test_rates_fill_themselves_in_and_say_whether_the_best_is_interior(with_rows):
    with_rows(lane_rows("A1", 2, ntxent_8_1=(0.4, [56.5])), lane_rows("A1", 2, ntxent_8_1=(
        0.2, [55.5])), lane_rows("A1", 2, balanced_2_4=(0.8, [50])))
    rows = {cells[0]: cells[1:] for cells in page.validation_rows("A1")}
    assert rows[""] == ["0.2", "0.4", "0.8", "best is interior"]
    assert rows["NT-Xent (8, 1)"] == ["55.50", "56.50", "–", "not known yet"]
    assert rows["NT-Xent (2, 1)"] == ["–"] * 3 + ["not known yet"]
    for last, expected in ((56.0, "yes"), (57.0, "no")):
        with_rows(*(lane_rows("A1", 2, ntxent_8_1=(rate, [y])) for rate, y in (
            (0.2, 55.5), (0.4, 56.5), (0.8, last))))
        rows = {cells[0]: cells[1:] for cells in page.validation_rows("A1")}
        assert rows["NT-Xent (8, 1)"][-1] == expected


def searched(stage, best):
    """Runs of a search: half the middle rate, itself (the best) and double; 50 if unsaid."""
    return [line for (loss, alpha, lam), middle in lane.SEARCHES[stage].items()
            for factor, less in ((0.5, 1), (1, 0), (2, 2))
            for line in lane_rows(stage, 2, **{f"{loss}_{alpha}_{lam}": (
                f"{middle * factor:g}", [best.get((loss, alpha, lam), 50) - less])})]


PLANNED = searched("A1", {("ntxent", 16, 1): 61, ("balanced", 4, 2): 60})
TWO = lane_rows("A2", 4, ntxent_16_1=("0.2", [60, 61, 62, 60, 61, 62]),
                balanced_4_2=("0.4", [63, 64, 65, 63, 64, 65]),
                ntxent_4_2=("0.4", [60, 61, 62]), balanced_16_1=("0.2", [60, 61, 62]))
WIDER = searched("A1b", {("balanced", 8, 2): 62, ("balanced", 8, 1): 60.5})
SECOND = lane_rows("A2b", 4, balanced_8_2=("0.8", [65.0] * 6), balanced_8_1=("0.8", [60.0] * 6))


def test_the_answer_compares_the_best_of_each_kind_once_all_seeds_are_there(with_rows):
    assert page.method_of(TWO[0]) == "SimCLR at τ = 1/16"
    with_rows(PLANNED, TWO[:11])  # the last seed of balanced (4, 2) is missing
    found = page.pair_figures()
    assert set(found.values()) == {"not run yet", "open"} and found["A2/verdict"] == "open"
    with_rows(PLANNED, TWO)
    squares = 2 * 2 * 2 + 2 * 2  # of 6 + 6 + 3 + 3 accuracies around their means
    half = 2.145 * math.sqrt(squares / 14) * math.sqrt(1 / 6 + 1 / 6)
    found, interval = page.pair_figures(), f"3.00 [{3 - half:.2f}, {3 + half:.2f}]"
    assert found["A2/evidence"] == "balanced (4, 2) over SimCLR at τ = 1/16"
    assert (found["A2/n"], found["A2/interval"], found["A2/verdict"]) == (
        "6, 6", interval, "better")
    assert found["A2b/difference"] == found["A2/difference"] + (
        " (provisional: planned runs are missing)")
    assert found["A2b/DCL/interval"] == found["A3/interval"] == "not run yet"
    points = {label: point for label, *point in figures.answer_points()}
    assert points["balanced (4, 2)"][:3] == ["C1", "C1", 64]
    assert points["SimCLR at τ = 1/16"][:3] == ["C0", "C0", 61]
    assert points["NT-Xent (4, 2)"][:3] == ["C0", "none", 61]


def test_the_pairs_follow_the_search(with_rows, monkeypatch):
    with_rows(PLANNED, TWO, WIDER)
    assert page.best_of_search("A1b")["balanced"] == (("balanced", 8, 2), 0.8)
    assert page.tested() == page.tested("A1")  # the seeds of (8, 2) are missing
    assert page.tested("A1") == {"SimCLR": "A2-ntxent-a16-l1-lr0.2",
                                 "balanced": "A2-balanced-a4-l2-lr0.4"}
    with_rows(PLANNED, TWO, WIDER, SECOND)
    half = page.t_quantile(24) * math.sqrt(12 / 24 / 3)  # the squares of A2, over 24 freedoms
    found = page.pair_figures()
    late = "better (provisional: planned runs are missing)"
    assert found["A2b/difference"] == ("balanced (8, 2) over SimCLR at τ = 1/16: "
                                       f"4.00 [{4 - half:.2f}, {4 + half:.2f}], {late}")
    assert found["A2/interval"].startswith("3.00 [") and found["A2/verdict"] == "better"
    assert found["A2b/DCL/difference"].startswith("balanced (8, 2) over DCL at τ = 1/8: 5.00 [")
    rows = page.first_rows()
    assert rows[1][0] == "untrained" and [cells[:5] for cells in rows[2:]] == [
        ["DCL", "1/8", "1", "6", "60.00"], ["SimCLR", "1/16", "1", "6", "61.00"],
        ["balanced", "1/4", "2", "6", "64.00"], ["balanced", "1/8", "2", "6", "65.00"]]
    assert rows[0][5] == "minus DCL at τ = 1/8 [95 %]" and not rows[2][5]
    assert rows[3][5].startswith("1.00 [") and rows[3][5].endswith("better")
    ended = [searched(stage, {}) for stage in ("A1c", "A1d")]
    with_rows(PLANNED, TWO, WIDER, SECOND, *ended)
    assert page.pair_figures()["A2b/DCL/verdict"] == "better"
    monkeypatch.setattr(page, "MARGIN", 9)
    assert page.pair_figures()["A2b/DCL/verdict"] == "better, within ±9"
    monkeypatch.undo()
    ended[1] = searched("A1d", {("balanced", 64, 1): 63})
    with_rows(PLANNED, TWO, WIDER, SECOND, *ended)
    assert page.pair_figures()["A2b/DCL/verdict"] == late  # its seeds are to come
    assert page.tested()["DCL"] == "A2b-balanced-a8-l1-lr0.8"
    cold = lane_rows("A2b", 4, balanced_64_1=("1.6", [66.0] * 6))
    twenty = lane_rows("A3", 20, ntxent_16_1=("0.2", [70, 70.1, 70.2]),
                       balanced_8_2=("0.8", [70.1, 70.2, 70.3]))
    third = lane_rows("A3b", 20, balanced_8_1=("0.8", [80, 80.1, 80.2]))
    with_rows(PLANNED, TWO, WIDER, SECOND, *ended, cold, twenty, third)
    found = page.pair_figures()
    assert found["A2b/DCL/interval"].startswith("−1.00 [") and found["A2b/DCL/verdict"] == "worse"
    assert found["A3/difference"].startswith("balanced (8, 2) over SimCLR at τ = 1/16: 0.10 [")
    assert found["A3/verdict"] == "level" and found["A3/n"] == "3, 3"
    assert ["DCL", "1/64", "1", "6", "66.00"] in [cells[:5] for cells in page.first_rows()]
    assert found["A3b/verdict"] == "worse" and len(page.stage_rows("A3")) == 3
    cold = lane_rows("A2b", 4, balanced_64_1=("1.6", [59.0] * 6))  # below DCL at 1/8
    with_rows(PLANNED, TWO, WIDER, SECOND, *ended, cold)
    found = page.pair_figures()
    assert found["A2b/DCL/difference"].startswith("balanced (8, 2) over DCL at τ = 1/64: 6.00 [")
    assert found["strongest/difference"].startswith("balanced (8, 2) over DCL at τ = 1/8: 5.00 [")
    assert found["DCL/difference"].startswith("DCL at τ = 1/8 over SimCLR at τ = 1/16: −1.00 [")


def test_the_words_of_the_pages_beside_their_figures_are_true():
    """What README's first screen and RESULTS' answer say of the order of the runs."""
    found = page.pair_figures()
    assert page.strongest("balanced") == "A2b-balanced-a8-l2-lr0.8"
    assert page.strongest("DCL") == "A2-balanced-a16-l1-lr0.8"
    assert page.strongest("SimCLR") == "A2-ntxent-a16-l1-lr0.8"
    assert len(page.tested_rows("balanced")) == 3  # "the other two trail that DCL"
    dcl = np.mean(runs.values(page.strongest("DCL"), "linear"))
    assert all(np.mean(runs.values(name, "linear")) < dcl
               for name in page.tested_rows("balanced")[1:])
    assert found["A2/verdict"] == "level" and found["A2b/verdict"].startswith("better")
    assert page.best_of_search("A1d")["balanced"][0] == ("balanced", 16, 2)
    assert page.best_of_search("A1d")["DCL"][0] == ("balanced", 32, 1)
    assert (len(runs.select(stage="A3")), len(runs.select(stage="A3b"))) == (2, 1)


def test_lam_alone_is_compared_at_one_temperature_each_cell_at_its_best_rate(with_rows):
    alone = lane_rows("A2c", 4, balanced_8_1=("0.8", [64, 65, 66]), balanced_4_1=("0.8", [60, 61]))
    planned = searched("A1", {("ntxent", 16, 1): 61, ("balanced", 4, 2): 60,
                              ("balanced", 4, 1): 59})
    second = lane_rows("A2b", 4, balanced_8_2=("0.8", [65.0] * 6))
    with_rows(planned, TWO, WIDER, second, alone, searched("A1d", {}))
    found = page.lam_alone()
    # The squares of A2, of A2b (none) and of A2c, 2 + 0.5, and their degrees of freedom, by rows.
    half = page.t_quantile(14 + 5 + 3) * math.sqrt((12 + 2.5) / 22 * (1 / 6 + 1 / 3))
    assert found["alone/8"] == f"0.00 [−{half:.2f}, {half:.2f}], open"
    assert found["alone/4"] == found["alone/16"] == "not run yet"  # two seeds, and none of (16, 2)


def test_what_was_noticed_is_confirmed_by_new_seeds_alone(with_rows):
    two = lane_rows("A2", 4, ntxent_16_1=("0.2", [0, 0, 0, 60, 61, 62]),
                    balanced_4_2=("0.4", [0, 0, 0, 60.5, 60.5, 60.5]),
                    balanced_16_1=("0.8", [0, 0, 0, 63, 62, 64]), ntxent_4_2=("0.4", [0, 99, 50]))
    wider = searched("A1b", {("balanced", 16, 1): 63})
    colder = searched("A1c", {("balanced", 32, 1): 70})
    with_rows(PLANNED, two, wider, colder,
              lane_rows("A2b", 4, balanced_32_1=("0.4", [90, 90, 90, 99, 98, 97])))
    half = page.t_quantile(6) * math.sqrt((2 + 0 + 2) / 6) * math.sqrt(1 / 3 + 1 / 3)
    found = page.new_seeds()
    assert found["new/SimCLR"] == f"2.00 [{2 - half:.2f}, {2 + half:.2f}]"
    assert found["new/SimCLR/verdict"] == "better" and found["new/balanced"].startswith("2.50 [")


def c_lines(stage="C", preset="C", more="", **figures):
    """Runs of question C: {row: figures of its seeds}."""
    return [runs.read({"id": f"{stage}-{name}-s{seed}", "stage": stage, "preset": preset,
                       "seed": seed, "git": "x", "steps": 1, "argv": argv, **figure},
                      runs.HEADER["presets"])
            for name, (argv, seeds) in figures.items() for seed, figure in enumerate(seeds)]


def test_question_c_compares_methods_with_all_their_seeds(with_rows):
    with_rows(question="C")
    assert page.evaluated("table C") == page.evaluated("table C bias") == "*Not run yet.*"
    assert page.evaluated("C1/8/positive") == page.evaluated("C4/eq51/6") == "not run yet"
    assert page.evaluated("C2/state") == page.evaluated("C4/state") == "not run"
    theory = [{}, {}, {"bounds": {"nu": 0.2, "b": -0.1, "b_negative": 40.0, "angle_over_90": 0.0}},
              {"bounds": {"nu": 0.4, "b": 0.3, "b_negative": 20.0, "angle_over_90": 0.0}}]
    with_rows(c_lines(
        one=("--alpha 8 --lam 1 --lr 0.4", [{"linear": y, "knn10": 1.0, "knn1": 2.0, **more}
                                            for y, more in zip((90, 50, 51, 52), theory)]),
        two=("--loss ntxent --alpha 8 --lam 1 --lr 0.2", [{"linear": y, "knn10": 1.0, "knn1": 2.0}
                                                          for y in (90, 47, 48, 49)]),
        half=("--loss eq14 --alpha 8 --lam 1 --lr 0.2", [{"linear": 40}] * 3)), question="C")
    half = 2.776 * math.sqrt((2 + 2) / 4) * math.sqrt(2 / 3)  # without seed 0, which chose
    expected = f"3.00 [{3 - half:.2f}, {3 + half:.2f}], better (provisional)"
    assert page.evaluated("C1/8/positive") == expected
    assert page.c_rows()[1] == ["balanced (8, 1)", "0.4", "3", "2.00", "1.00", "51.00"]
    assert page.evaluated("C1/8/negatives") == "not run yet"  # the third seed is missing
    assert [cells[0] for cells in page.c_rows()[1:]] == ["balanced (8, 1)", "NT-Xent (8, 1)"]
    assert page.evaluated("C1/negatives/state") == "not run"  # of Eq. 14, and of α = 2
    assert page.c_theory_rows()[1][:5] == ["balanced (8, 1)", "3", "0.300", "0.100", "30.00"]
    measured = runs.read({"id": "C2-measured", "git": "x", "supervised": [10.0, 8.0, 6.0]}, {})
    with_rows([measured], question="C")
    assert page.evaluated("C2/supervised").endswith("makes 50.0 % of the fall")


def test_question_c_correlates_bias_and_accuracy_over_the_strategies(with_rows):
    numbers = {"base": (1.0, 30.0), "noblur": (1.1, 29.0), "nocolor": (0.5, 20.0),
               "cutout": (1.2, 28.5), "rotation": (1.3, 27.0), "noise": (1.4, 26.0)}

    def bias(eq51):
        return {"eq51": eq51, "raw_eq51": 2 * eq51, "eq16": 1.0 - eq51, "eq16_relative": 0.0,
                "features_eq16_relative": 0.0}

    with_rows(c_lines("C4", "V100", **{
        name: ("--lr 0.8", [{"linear": y + seed, "bias": bias(x)} for seed in (0, 1)])
        for name, (x, y) in numbers.items()}), question="C")
    r = statistics.correlation(*zip(*numbers.values()))
    assert page.evaluated("C4/state") == "not tested at scale"
    assert page.evaluated("C4/eq51/6") == page.evaluated("C4/eq51_raw/6")
    assert float(page.evaluated("C4/eq51/6").replace("−", "-")) == pytest.approx(r, abs=0.005)
    del numbers["nocolor"]
    r = statistics.correlation(*zip(*numbers.values()))
    assert float(page.evaluated("C4/eq16/5").replace("−", "-")) == pytest.approx(-r, abs=0.005)


def planned(rows):
    return [run["id"] for run in question_c.plan(rows)]


def test_question_c_extends_rates_until_the_best_is_interior_and_then_adds_seeds():
    assert planned({})[:3] == [f"C-balanced-a2-l4-lr{rate}-s0" for rate in ("0.8", "0.4", "1.6")]
    assert not any(name.endswith("-s1") or name.startswith("C4") for name in planned({}))
    rows = {f"C-balanced-a2-l4-lr{rate}-s0": {"linear": y}
            for rate, y in (("0.4", 50), ("0.8", 51), ("1.6", 52))}
    own = [name for name in planned(rows) if "balanced-a2-l4" in name]
    assert own == ["C-balanced-a2-l4-lr3.2-s0"]
    rows["C-balanced-a2-l4-lr3.2-s0"] = {"linear": 49}
    own = [name for name in planned(rows) if "balanced-a2-l4" in name]
    assert own == [f"C-balanced-a2-l4-lr1.6-s{seed}" for seed in (1, 2, 3)]
    assert sum(name.startswith("C4-") for name in planned(rows)) == 12
    assert all("--lr 1.6" in run["argv"] for run in question_c.plan(rows)
               if run["stage"] == "C4")  # the rate of question C2
    rows["C-balanced-a2-l4-lr0.4-s1"] = {"linear": 90}  # seeds do not choose rates
    assert "C-balanced-a2-l4-lr1.6-s2" in planned(rows)
    falling = {f"C-nscl-a2-l4-lr{rate}-s0": {"linear": -rate} for rate in (0.4, 0.8, 1.6)}
    own = [name for name in planned(falling) if "nscl" in name]
    assert own == ["C-nscl-a2-l4-lr0.2-s0"]
    falling |= {f"C-nscl-a2-l4-lr{rate}-s0": {"linear": -rate} for rate in (0.2, 0.1, 0.05, 0.025)}
    own = [name for name in planned(falling) if "nscl" in name]
    assert own[0] == "C-nscl-a2-l4-lr0.025-s1"  # no training at all would be its best


def test_commands_of_question_c_are_balcons_or_the_studys():
    for run in [run for rows in ({}, {f"C-balanced-a2-l4-lr{rate}-s0": {"linear": -abs(rate - 0.8)}
                                      for rate in (0.4, 0.8, 1.6)}) for run in
                question_c.plan(rows)]:
        program, *words = question_c.command(run)
        if program == "balcon.py":
            flags = words
        else:
            objective = words[1]
            assert words[0] == "train" and objective in objectives.LOSSES
            flags = ["--loss", objective, *words[2:]]
            objectives.register_losses()
        cfg = balcon.parse_flags(flags)
        balcon.check_settings(cfg)
        assert (cfg.probe, cfg.batch_size * cfg.epochs // 12 * (2 if cfg.epochs == 6 else 1)) == (
            "features", 256 if cfg.epochs == 12 else 128)
        if run["stage"] == "C4":
            assert cfg.dataset == "cifar100" and {"bias", "bounds"} < set(cfg.eval)
            assert ("gaussian_blur" in cfg.views.names) == ("C4-noblur" not in run["id"])
            name = page.question_c.STRATEGIES[run["id"].split("-")[1]][0]
            sign, _, what = name.partition(" ")
            flags = {"+": cfg.add, "−": cfg.drop + ["gaussian_blur"] * (not cfg.add)}
            assert name == "base" or what in flags[sign]
        else:
            assert run["id"].startswith(f"C-{cfg.loss}-a{cfg.alpha:g}-l{cfg.lam:g}-lr{cfg.lr:g}-")


def test_the_lane_trains_its_runs_at_their_commit_only(tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    for question, frozen, other in (("A", lane.FROZEN, question_c.FROZEN),
                                    ("C", question_c.FROZEN, lane.FROZEN)):
        monkeypatch.setattr(lane.subprocess, "run",
                            lambda *_, head=other, **__: types.SimpleNamespace(stdout=head))
        with pytest.raises(SystemExit, match=f"is at {other}, .* {frozen}"):
            lane.main(tmp_path, tmp_path, tmp_path / "out", question)


def test_the_lane_searches_rates_then_trains_the_finalists_then_looks_at_added_cells():
    def names():
        return [run["id"] for run in lane.plan(rows)]

    def search(stage, methods, best):
        for (loss, alpha, lam), middle in methods.items():
            for factor, less in ((0.5, 1), (1, 0), (2, 2)):
                rows[f"{stage}-{loss}-a{alpha}-l{lam}-lr{middle * factor:g}-s0"] = {
                    "linear": best.get((loss, alpha, lam), 50) - less}

    rows = {}
    assert len(names()) == 21 and all(name.startswith("A1-") for name in names())
    search("A1", lane.METHODS, {
        ("ntxent", 8, 1): 60, ("balanced", 4, 2): 59, ("balanced", 4, 1): 70})
    rows["A1-ntxent-a8-l1-lr0.8-s0"] = {"linear": 61}
    assert names() == ["A1-ntxent-a8-l1-lr1.6-s0"]  # beyond the edge
    rows["A1-ntxent-a8-l1-lr1.6-s0"] = {"linear": 60}
    pair = "A2-ntxent-a8-l1-lr0.8-s{}", "A2-balanced-a4-l2-lr0.4-s{}"
    checks = "A2-ntxent-a4-l2-lr0.4-s{}", "A2-balanced-a8-l1-lr0.8-s{}"
    expected = [name.format(seed) for names in (pair, checks)
                for seed in range(6 if names is pair else 3) for name in names]
    assert names()[:18] == expected
    assert len(names()) == 18 + 15 and all(name.startswith("A1b-") for name in names()[18:])
    del rows["A1-balanced-a4-l1-lr1.6-s0"]  # λ = 1 is no finalist: A2 does not wait for it
    assert names()[:19] == ["A1-balanced-a4-l1-lr1.6-s0", *expected]
    rows["A1-balanced-a4-l1-lr1.6-s0"] = {"linear": 0}
    search("A1b", lane.ADDED, {("ntxent", 32, 1): 60.5, ("balanced", 8, 2): 60})
    rest = names()[18:]
    assert rest[:12] == [f"A2b-{name}-s{seed}" for seed in range(6)
                         for name in ("balanced-a8-l2-lr0.8", "balanced-a4-l1-lr0.8")]
    assert rest[12:15] == [f"A1c-balanced-a32-l1-lr{rate}-s0" for rate in ("0.4", "0.2", "0.8")]
    assert rest[15:17] == ["A3-ntxent-a8-l1-lr0.8-s0", "A3-balanced-a8-l2-lr0.8-s0"]
    assert rest[17] == "A3b-balanced-a4-l1-lr0.8-s0"
    assert rest[18:27] == [f"A2c-{name}-l1-lr0.8-s{seed}" for name in (
        "balanced-a8", "ntxent-a8", "balanced-a4") for seed in range(3)]
    assert [name[:2] for name in rest[27:]] == ["A3"] * 6 + ["B-"] * 4
    seeds = "A2b-balanced-a32-l1-lr0.4-s{0} A2b-balanced-a16-l2-lr0.8-s{0}".split()
    for best, more in ((60, []), (71, [seeds[0].format(seed) for seed in range(6)])):
        search("A1c", lane.EXTRA, {("balanced", 32, 1): best})
        now = names()[18:]
        assert now[:12] == rest[:12] and now[12:-28] == more
        assert now[-28:-22] == [run["id"] for run in lane.search("A1d", rows)]
    search("A1d", lane.EDGES, {("balanced", 16, 2): 61, ("balanced", 64, 1): 70})
    now = names()[18:]
    assert now[12:-22] == more + [seeds[1].format(seed) for seed in range(6)]
    assert now[-22:] == rest[-22:]  # those of 20 epochs are the best of A1 and A1b


@pytest.mark.parametrize("question", [lane, question_c])
def test_a_row_of_the_lane_holds_the_runs_figures(question, tmp_path, monkeypatch):
    old = question is lane
    run = next(iter(question.plan({})))
    found = {"knn": {"knn1": 1.234, "knn10": 2.0}, "linear": {"linear": 3.0}}
    if not old:
        found = {name: {"settings": {}, **figure} for name, figure in found.items()}
        found["bounds"] = {"settings": {}, "nu": 0.25}

    def trained(words, cwd, **_):
        out = Path(words[words.index("--out") + 1])
        assert cwd == "clone" and words[1] == "balcon.py" and str(run["seed"]) in words
        assert words[words.index("--data") + 1] == str(tmp_path / "cifar10-val")
        (out / "log.jsonl").write_text('{"config": 0}\n{"step": 228, "seconds": 7.04}\n')
        (out / "results.json").write_text(json.dumps({"trained": found, "seconds": 9.0}))

    monkeypatch.setattr(lane.subprocess, "run", trained)
    row = lane.train(run, "clone", tmp_path, tmp_path, question)
    assert row["views"] == 2 * 256 * 228 and (row["knn1"], row["linear"]) == (1.23, 3)
    assert row["seconds"] == (9 if old else 7) and row["git"] == question.FROZEN[:7]
    if old:
        assert row["pflop"] == pytest.approx(2 * 256 * 228 * 0.076 / 399_360, abs=1e-4)
    else:
        assert row["bounds"] == {"nu": 0.25} and "pflop" not in row


def test_the_commands_of_readme_are_understood():
    readme = (HERE.parents[1] / "README.md").read_text(encoding="utf8").replace("\\\n", " ")
    commands = re.findall(r"balcon\.py( --[^`#\n]*)", readme + balcon.__doc__)
    commands = [words.split() for words in commands if not re.search("--(checkpoint|help)", words)]
    assert len(commands) >= 10
    for words in commands:
        balcon.check_settings(balcon.parse_flags(words))
    for text in re.findall("`(--[a-z-]+ [^`]+)`", readme):
        balcon.parse_flags(text.split())


def test_the_picture_of_the_answer_shows_the_runs():
    texts = re.findall(r">([^<]*)</text>", (HERE / "answer.svg").read_text(encoding="utf8"))
    for label, _, _, mean, _ in figures.answer_points():
        assert label in texts and f"{mean:.1f}" in texts, "study.py figures draws it anew"


# ------------------------------------------ report --------------------------------------------
def put_run(folder, stage=None, knn=None, linear=50.0, images="a", k=5, **changes):
    config = {"dataset": "cifar10", "alpha": 2.0, "epochs": 9, "lr": 0.1, "seed": 0} | changes
    folder.mkdir()
    (folder / "log.jsonl").write_text(
        json.dumps({"config": config, "images": images}) + '\n{"step": 1}\n')
    if stage:
        settings = {"weights": str(folder), "images": images, "seed": config["seed"]}
        results = {stage: {"knn": {"settings": {**settings, "k": [k]}, "knn5": knn},
                           "linear": {"settings": settings, "linear": linear}}}
        (folder / "results.json").write_text(json.dumps({"config": config, **results}))


def test_report_pools_seeds_and_nothing_else(tmp_path, capsys):
    for seed, figure in enumerate((90, 92, 97)):
        put_run(tmp_path / f"seed {seed}", "trained", figure, seed=seed)
    put_run(tmp_path / "stopped", "untrained", 11, seed=3)  # after the baseline
    put_run(tmp_path / "killed", alpha=4.0)
    put_run(tmp_path / "elsewhere", "trained", 70, images="b")
    put_run(tmp_path / "other k", "trained", 60, k=7)
    put_run(tmp_path / "untrained", "untrained", 30, epochs=0)
    put_run(tmp_path / "checkpoint", "trained", 40, epochs=0, lr=2.0)
    put_run(tmp_path / "null", "trained", None, lr=0.5)
    study.main("report", str(tmp_path), str(tmp_path / "seed 0"))
    lines = capsys.readouterr().out.splitlines()
    head, _, *rows = [line.strip("| ").replace(" ", "").split("|") for line in lines]
    assert sorted(head[:5]) == ["alpha", "epochs", "images", "k", "lr"]
    assert head[5:] == ["finishedruns", "knn5", "linear"]
    assert sorted(row[5:] for row in rows) == [
        ["0of1", "–", "–"], ["1of1", "30", "50"], ["1of1", "40", "50"], ["1of1", "60", "50"],
        ["1of1", "70", "50"], ["1of1", "–", "50"], ["3of4", "93±3.6", "50±0"]]
    with pytest.raises(SystemExit, match="no run"):
        report.report(str(tmp_path / "nothing"))
    (tmp_path / "killed" / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit, match="killed/log.jsonl is not"):
        report.report(str(tmp_path))


# ------------------------------------------ losses --------------------------------------------
def views_of_classes(m=7, n=2):
    """z [m, n, 5] of unit length, labels [m]."""
    z = torch.randn(m, n, 5, dtype=torch.float64, generator=generator(0))
    return F.normalize(z, dim=2), torch.arange(m) % 3


def anchors(z, labels):
    """(positive similarity, negatives' similarities, whether they are of its class) by loops."""
    for i, j in itertools.product(range(len(z)), range(2)):
        s = []
        own = []
        for k, v in itertools.product(range(len(z)), range(2)):
            if k != i:
                s.append(float(z[i, j] @ z[k, v]))
                own.append(bool(labels[i] == labels[k]))
        yield float(z[i, 0] @ z[i, 1]), np.array(s), np.array(own)


def lengthened(z):
    """z1, z2 with other lengths, which must not matter."""
    return 3 * z[:, 0], 2 * z[:, 1]


def test_nscl_loss_by_loops_also_when_compiled():
    z, labels = views_of_classes()
    rows = [2.5 / 3 * np.log(np.exp(3 * s[~own]).sum()) - positive
            for positive, s, own in anchors(z, labels)]
    z1, z2 = lengthened(z)
    assert_close(study.nscl_loss(z1, z2, labels, 3.0, 2.5), np.mean(rows))
    compiled = torch.compile(study.nscl_loss, backend="eager")
    assert_close(compiled(z1, z2, labels, 3.0, 2.5), np.mean(rows))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(study.nscl_loss(z1.float(), z2.float(), labels, 3.0, 2.5), np.mean(rows))
    z1 = z1.requires_grad_()
    assert torch.autograd.gradcheck(lambda z1: study.nscl_loss(z1, z2, labels, 3.0, 2.5), z1)


def test_eq_14_by_loops():
    z, _ = views_of_classes()
    m = len(z)
    rows = []
    for i, (own, other) in itertools.product(range(m), ((0, 1), (1, 0))):
        s = [float(z[i, own] @ z[j, other]) for j in range(m)]
        top = math.exp(3 * s[i])
        bottom = sum(math.exp(3 * s[j]) for j in range(m) if j != i)
        rows.append(-math.log(top / bottom) / 3)
    assert_close(objectives.eq14(*lengthened(z), 3.0, 1.0), np.mean(rows))
    positives = np.mean([float(z[i, 0] @ z[i, 1]) for i in range(m)])
    assert_close(objectives.eq14(*lengthened(z), 3.0, 2.5),
                 2.5 * (np.mean(rows) + positives) - positives)


@pytest.mark.parametrize("n", [2, 4])
def test_mean_of_views_by_loops(n):
    z, _ = views_of_classes(5, n)
    rows = []
    for i, v in itertools.product(range(5), range(n)):
        target = sum(z[i, w] for w in range(n) if w != v) / (n - 1)
        negatives = sum(math.exp(3 * float(z[i, v] @ z[j, w]))
                        for j in range(5) for w in range(n) if j != i)
        rows.append(2.5 / 3 * math.log(negatives) - float(z[i, v] @ target))
    first, second = (z.transpose(0, 1).flatten(0, 1)).chunk(2)
    assert_close(objectives.mean_of_views(3 * first, 2 * second, 3.0, 2.5, n), np.mean(rows))
    if n == 2:
        balanced = balcon.balanced_contrastive_loss(first, second, 3.0, 2.5)
        assert_close(objectives.mean_of_views(first, second, 3.0, 2.5, n), balanced)
    with pytest.raises(ValueError, match="views"):
        objectives.mean_of_views(first[:2], second[:2], 3.0, 2.5, n=3)


@pytest.mark.parametrize("surrogate", [False, True])
def test_prototype_losses_by_loops(surrogate):
    z, labels = views_of_classes()
    prototypes = [z[labels == c].flatten(0, 1).mean(0) for c in range(3)]
    rows = []
    for i, v in itertools.product(range(7), range(2)):
        s = [float(F.cosine_similarity(z[i, v], p, dim=0)) for p in prototypes]
        own = s[labels[i]]
        if surrogate:
            own = float(F.cosine_similarity(z[i, v], z[i].mean(0), dim=0))
        rows.append(2.5 * max(s[c] for c in range(3) if c != labels[i]) - own)
    found = objectives.prototype_loss(*lengthened(z), 4 + 3 * labels, 3.0, 2.5, surrogate)
    assert_close(found, np.mean(rows))


def test_quadratic_limit_and_wang_isola_by_loops():
    z, labels = views_of_classes()
    rows = [3 * (s ** 2).mean() - positive for positive, s, _ in anchors(z, labels)]
    assert_close(objectives.quadratic(*lengthened(z), 3, 2), np.mean(rows))
    loss = np.mean([float((x - y) @ (x - y)) for x, y in z])
    for view in z.unbind(1):
        pairs = [(x - y).square().sum() for x, y in itertools.combinations(view, 2)]
        loss += float(torch.stack(pairs).mul(-2).exp().mean().log()) / 2
    assert_close(objectives.wang_isola(*lengthened(z), 4, 2), loss / 2)


def loss_named(name):
    def with_some_labels(z1, z2, alpha, lam):
        objectives.Batch.labels = torch.arange(len(z1)) % 2
        return objectives.LOSSES[name](z1, z2, alpha, lam)
    return with_some_labels


@pytest.mark.parametrize("name", objectives.LOSSES)
def test_objectives_refuse_what_the_losses_refuse(name):
    z = torch.randn(4, 3, generator=generator(0))
    loss = loss_named(name)
    assert loss(z, z + 1, 2.0, 1.0).isfinite()
    for arguments in ((z, z[:3], 2.0, 1.0), (z[0], z[0], 2.0, 1.0), (z[:1], z[:1], 2.0, 1.0),
                      (z, z, 0.0, 1.0), (z, z, 2.0, -1.0), (z, z, math.nan, 1.0),
                      (z.long(), z.long(), 2.0, 1.0)):
        with pytest.raises(ValueError):
            loss(*arguments)


@pytest.mark.parametrize("labels", [torch.zeros(4).long(), torch.arange(3), torch.rand(4),
                                    torch.tensor([0, 1, -1, 1])])
def test_losses_of_labels_refuse_one_class_and_unknown_labels(labels):
    z = torch.randn(4, 3, generator=generator(0))
    for loss in objectives.nscl_loss, objectives.prototype_loss:
        with pytest.raises(ValueError, match="class|integers|label"):
            loss(z, z, labels, 2.0, 1.0)


# ------------------------------------------ training ------------------------------------------
@pytest.fixture
def few_images(monkeypatch):
    """64 training and 24 test images of eight classes in place of any data set."""
    def images(n):
        pixels = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator(n))
        return balcon.Images(pixels, torch.full((n, 2), 8), torch.arange(n) % 8,
                             np.arange(n).astype(str), list("abcdefgh"))
    monkeypatch.setattr(balcon, "load_data", lambda cfg, device: (images(64), images(24)))


def test_the_loss_gets_the_labels_of_its_batch_and_n_views():
    labels = torch.arange(12) % 5
    pixels = (40 * labels).byte()[:, None, None, None].expand(12, 3, 8, 8).contiguous()
    names = np.arange(12).astype(str)
    data = balcon.Images(pixels, torch.full((12, 2), 8), labels, names, ["class"] * 5)
    views = balcon.Views([], 8, [0.5, 1.0])
    objectives.watch_batches()
    objectives.Batch.views = 4
    order = torch.randperm(12, generator=generator(1)).split(6)
    for step, x in data.batches(enumerate(order), views, n=2, key=(0, "views")):
        brightness = (x * torch.tensor(balcon.STD)[:, None, None]
                      + torch.tensor(balcon.MEAN)[:, None, None]).mean((1, 2, 3))
        assert_close(brightness, (40 * objectives.Batch.labels / 255).repeat(4), 1e-3)
        assert (objectives.Batch.labels == labels[order[step]]).all()
    assert len(next(data.batches([(0, order[0])], views, 2, ("picture",)))[1]) == 12


@pytest.mark.parametrize("name, kinds", [("nscl", 2), ("mean4", 4)])
def test_train_trains_with_its_loss(name, kinds, tmp_path, monkeypatch, few_images):
    seen = []

    def recording(z1, z2, alpha, lam, loss=objectives.LOSSES[name]):
        seen.append((len(z1), loss(z1, z2, alpha, lam).item()))
        return loss(z1, z2, alpha, lam)

    monkeypatch.setitem(objectives.LOSSES, name, recording)
    with pytest.raises(SystemExit) as ended:
        study.main("train", name, *(
            "--dataset patterns --epochs 1 --batch-size 16 --size 8 --projector 8 --no-baseline "
            "--eval --out").split(), str(tmp_path / "run"))
    assert not ended.value.code
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert lines[0]["config"]["loss"] == name
    assert [size for size, _ in seen] == [16 * kinds // 2] * 4
    assert_close([lines[1]["loss"], lines[-1]["loss"]], [seen[0][1], seen[-1][1]])


def test_train_names_what_it_can_train():
    with pytest.raises(SystemExit, match="nscl.*eq14.*strong"):
        study.main("train", "simclr")
    with pytest.raises(SystemExit, match="study.py tables"):
        study.main("no-such")
    with pytest.raises(SystemExit, match="study: .*--lamm"):
        study.main("benchmark", "--lamm", "4")


def test_rounding_of_the_study_is_that_of_autocast_to_bfloat16():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
              nn.Linear(8 * 6 * 6, 4, bias=False))
    network = nn.Sequential(*layers)
    x = torch.randn(32, 3, 8, 8)

    def outcome(bfloat16=False):  # the output, and the gradient of each weight
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            z = network(x).float()
        return [z, *torch.autograd.grad(z.tanh().sum(), [*network.parameters()])]

    exact = outcome()
    autocast = outcome(bfloat16=True)
    objectives.round_to_bfloat16(network)
    for a, b, c in zip(exact, autocast, outcome()):
        assert 0 < (a - b).norm() and (c - b).norm() < 0.3 * (a - b).norm()


def test_the_strong_recipe_has_no_batch_norm_in_its_projector():
    cfg = balcon.parse_flags(["--dataset", "cifar10", *objectives.strong_recipe()])
    layers = balcon.build_encoder(cfg, CPU).projector
    assert [list(p.shape) for p in layers.parameters()] == [[1024, 512], [1024], [128, 1024], [128]]
    assert balcon.AUGMENTATIONS["grayscale"] == (balcon.grayscale, 0.1)
    assert (cfg.weight_decay, cfg.crop_scale) == (5e-4, [0.2, 1.0])


# ------------------------------------------ instruments ---------------------------------------
def test_repulsion_and_nscl_by_loops():
    (z, labels), alpha, lam = views_of_classes(), 3.0, 2.5
    rows = []
    for positive, s, own in anchors(z, labels):
        e, e4, n = np.exp(alpha * s), np.exp(4 * s), own.sum() / 2 + 1
        odds = (n - 1) * np.exp(2 * alpha) / (len(z) - n)
        rows.append({
            "positive": positive, "negative": s.mean(), "by_chance": own.mean(),
            "lam_share": lam * e[own].sum() / e.sum(), "same_class_4": e4[own].sum() / e4.sum(),
            "ntxent_positive_4": 1 / (1 + e4.sum() / np.exp(4 * positive)),
            "repelling": lam * (np.log(e.mean()) / alpha - s.mean()),
            "second_order": alpha * lam / 2 * s.var(),
            "gap": lam / alpha * np.log(e.sum() / e[~own].sum()),
            "supervised": lam / alpha * np.log(e[~own].sum()) - positive,
            "bound": lam / alpha * np.log(1 + odds)})
    found = instruments.repulsion(z, labels, alpha, lam) | instruments.nscl(z, labels, alpha, lam)
    for name in rows[0]:
        assert_close(found[name], np.mean([row[name] for row in rows]))


def test_class_distances_and_few_shots_by_loops():
    z, labels = views_of_classes(12)
    x, queries = z.unbind(1)
    centres = [x[labels == c].mean(0) for c in range(3)]
    whole = []
    along = []
    for i, j in itertools.permutations(range(3), 2):
        line = centres[j] - centres[i]
        rest = x[labels == i] - centres[i]
        whole.append((rest ** 2).sum(1).mean() / (line @ line))
        along.append(((rest @ (line / line.norm())) ** 2).mean() / (line @ line))
    assert_close(instruments.cdnv(x, labels), [np.mean(whole), np.mean(along)])
    nearest = [min(range(3), key=lambda c: float((row - centres[c]).norm())) for row in queries]
    assert instruments.nearest_centre(x, labels, queries).tolist() == nearest
    corners = torch.eye(3)[labels] + 0.01 * torch.rand(12, 3, generator=generator(0))
    wrong = (labels + 1) % 3  # a third of the answers is changed
    answers = torch.where(torch.arange(12) < 4, wrong, labels)
    found = instruments.few_shot(corners, labels, corners, answers, 2, 3, 0)
    assert_close(found, torch.full((3, 2), 200 / 3))


def test_the_error_of_eq_16_is_its_spread_over_images():
    labels = torch.arange(200) % 4
    centres = torch.randn(4, 1, 6, generator=generator(0))
    found = []
    for seed in range(60):
        image = torch.randn(200, 1, 6, generator=generator(100 + seed))
        noise = torch.randn(200, 2, 6, generator=generator(500 + seed))
        halves = centres[labels] + image + noise
        found.append((balcon.eq16(halves, labels), instruments.eq16_error(halves, labels)))
    values, errors = np.array(found).T
    assert 0.8 < errors.mean() / values.std(ddof=1) < 1.25


def test_measure_prints_the_figures_of_each_network(capsys, few_images, monkeypatch):
    monkeypatch.setattr(balcon, "linear_predict",  # slow, and tested elsewhere
                        lambda bank, labels, queries, l2: labels[:1].expand(len(queries)))
    study.main("measure", "untrained", "repulsion", "nscl", "fewshot", "cdnv", "eq16", *(
        "--dataset patterns --theory-images 64 --batch-size 32 --size 8 --projector 8 "
        "--theory-views 2").split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["checkpoint"] == "untrained" and found["images"] == 64
    assert set(found["nscl"]) == {"2", "5", "8"} and set(found["fewshot"]) == {"1", "5"}
    nscl = found["nscl"]["8"]
    assert 0 < nscl["gap"] < nscl["bound"]
    assert_close(nscl["loss"] - nscl["supervised"], nscl["gap"])
    assert 0.05 < found["repulsion"]["by_chance"] < 0.2 and found["eq16"][0] > found["eq16"][1] > 0
    with pytest.raises(SystemExit, match="repulsion"):
        study.main("measure", "untrained")


def test_raw_pixels_are_compared_as_they_are(monkeypatch, capsys):
    images = torch.zeros(6, 3, 1, 2, dtype=torch.uint8)
    images[::2, :, 0, 0] = 200
    images[1::2, :, 0, 1] = 100
    labels = torch.arange(6) % 2
    data = balcon.Images(images, torch.ones(6, 2), labels, np.arange(6).astype(str), ["a", "b"])
    monkeypatch.setattr(balcon, "load_data", lambda cfg, device: (data, data))
    study.main("pixels", "--dataset", "cifar10", "--k", "1")
    assert json.loads(capsys.readouterr().out) == {"knn1": 100, "linear": 100}


# ------------------------------------------ benchmark -----------------------------------------
def test_the_benchmark_counts_flops_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    flags = "--dataset stl10 --batch-size 2 --size 32 --projector 1 --epochs 3"
    benchmark.benchmark(*flags.split(), budget=0)
    first, *lines = capsys.readouterr().out.splitlines()
    assert "no data/stl10" in first and "random pixels" in first
    value = {line[:16].strip(): float(line[16:26]) for line in lines}
    # torchvision states 1.814 G multiply-adds of its ResNet-18 for 224 = 7 · 32 pixels, of which
    # 1000 · 512 are in the last layer.
    flop = 2 * (1.814e9 - 1000 * 512) / 7 ** 2
    assert value["PFLOP"] == pytest.approx(3 * 2 * 3 * 105_000 * flop / 1e15, rel=1e-3)
    assert value["hours"] == pytest.approx(63e4 / value["training step"] / 3600, rel=1e-2)
    rates = value["training step"] / value["bare network"]
    assert value["step / network"] == pytest.approx(rates, rel=1e-2)
    assert not list(tmp_path.iterdir())


def test_median_seconds_of_calls_that_take_turns(monkeypatch):
    clock = iter(range(10 ** 6))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    turns = []
    found = benchmark.seconds_of([lambda: turns.append("a"), lambda: turns.append("b")], 12, False)
    assert "".join(turns[:4]) == "abab" and found.tolist() == [1, 1]


def test_costs_prints_a_row_of_each(monkeypatch, capsys):
    monkeypatch.setattr(costs, "median_ms", lambda call, seconds=2: [call(), 512.0][1])
    for what, size in (("loss", "16"), ("knn", "64"), ("views", "8"), ("ranks", "1")):
        costs.costs(what, size)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == ["cost-loss-16", "cost-knn-64", "cost-views-8",
                                           "cost-ranks-1"]
    assert rows[1]["ms"] == 1  # of one of 512 queries
    assert rows[2]["ms"] == pytest.approx(512 / 2 / (2 ** 17 // 64), rel=0.01)  # of one view
    assert all(row["git"] and row["kind"] == "cost" for row in rows)


def test_versus_trains_each_library_on_the_same_images(monkeypatch, capsys):
    monkeypatch.setattr(versus, "WORKERS", 0)
    monkeypatch.setattr(versus, "READ_AHEAD", 0)

    def of_lightly(data, cfg):  # which tests do not install
        x = torch.randn(cfg.batch_size, 3, cfg.size, cfg.size)
        return itertools.repeat(lambda encoder: encoder(x).square().sum())

    monkeypatch.setattr(versus, "libraries",
                        lambda: [versus.of_balcon, of_lightly, versus.of_torchvision])
    clock = itertools.count()
    monkeypatch.setattr(versus.time, "perf_counter", lambda: next(clock))
    versus.versus("--backbone", "resnet8", "--size", "8", "--batch-size", "4", "--projector", "4",
                  "--data", "nowhere", rounds=1, seconds=0)
    *_, first, second, last = capsys.readouterr().out.splitlines()
    first, second = json.loads(first), json.loads(second)
    assert first["id"] == "versus-lightly-resnet8-8"
    assert second["id"] == "versus-torchvision-resnet8-8"
    # All take the same ticks of the clock, whatever they do between them.
    assert first["ratio"] == second["ratio"] == 1 and "batch 4" in first["label"]


def test_versus_does_not_count_batches_that_were_ready_before_the_clock_started(monkeypatch):
    monkeypatch.setattr(versus, "READ_AHEAD", 2)
    clock = itertools.count()
    monkeypatch.setattr(versus.time, "perf_counter", lambda: next(clock))
    encoder = nn.Linear(1, 1)
    steps = iter([lambda encoder: encoder.weight.sum()] * 9)
    cfg = types.SimpleNamespace(lr=0.1, momentum=0.9, weight_decay=0, batch_size=6)
    assert versus.images_per_second(steps, encoder, cfg, 0) == 6 / 2  # one step, two ticks
    assert len(list(steps)) == 9 - 2 - 2  # the one that starts the clock, and the timed one


# ------------------------------------------ lemmas and theorems -------------------------------
def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator(seed)), dim=-1)


def repelling_term(z1, z2, alpha):
    """Eq. 17's, by the loss itself."""
    return (balcon.balanced_contrastive_loss(z1, z2, alpha, 1.0)
            - balcon.balanced_contrastive_loss(z1, z2, alpha, 0.0)).item()


def test_lemma_a_1_and_eq_18_the_repelling_term_tends_to_the_maximum():
    z = torch.stack([unit(6, 4, seed=1), unit(6, 4, seed=2)], 1)
    largest = np.mean([s.max() for _, s, _ in anchors(z, torch.zeros(6))])
    for alpha in (0.1, 1.0, 8.0, 100.0, 1e4):
        term = repelling_term(*z.unbind(1), alpha)
        assert largest - 1e-9 <= term <= largest + math.log(10) / alpha + 1e-9
    assert_close(repelling_term(*z.unbind(1), 1e6), largest)
    same = unit(1, 4).repeat(6, 1)  # equal similarities: the upper bound is reached
    assert_close(repelling_term(same, same, 3.0), 1 + math.log(10) / 3)


def test_lemma_a_2_log_sum_exp_is_convex():
    for seed in range(20):
        x, y = torch.randn(2, 5, dtype=torch.float64, generator=generator(seed))
        for alpha, share in itertools.product((0.3, 2.0, 9.0), (0.1, 0.5)):
            def u(x, alpha=alpha):
                return (alpha * x).logsumexp(0) / alpha
            assert u(share * x + (1 - share) * y) <= share * u(x) + (1 - share) * u(y) + 1e-12
            curvature = torch.func.hessian(u)(x)
            assert torch.linalg.eigvalsh(curvature).min() > -1e-12


def test_lemma_a_3_the_maximum_of_a_product():
    fails = 0
    for seed in range(200):
        g1, g2 = torch.randn(2, 6, generator=generator(seed))
        product = g1.abs() * g2
        if (g2 >= 0).any():
            assert product.max() <= g1.abs().max() * g2.max() + 1e-6
        below = -g2.abs()  # as in Eq. 38: without a value of at least 0 it can fail
        fails += bool((g1.abs() * below).max() > g1.abs().max() * below.max())
    assert fails > 100


def test_footnote_3_on_unit_vectors_the_similarities_are_equivalent():
    z1, z2 = unit(6, 4, seed=1), unit(6, 4, seed=2)
    for loss in balcon.balanced_contrastive_loss, balcon.generalized_nt_xent_loss:
        for alpha, lam in (2.0, 4.0), (0.5, 0.3):
            assert_close(loss(z1, z2, alpha, lam, "dot"), loss(z1, z2, alpha, lam))
            # −‖a − b‖² = 2 a·b − 2: twice the loss at 2α, up to a constant
            assert_close(loss(z1, z2, alpha, lam, "euclidean"),
                         2 * loss(z1, z2, 2 * alpha, lam) + 2 - 2 * lam)


def attracting_sides(anchor, mean_view):
    labels = torch.arange(len(anchor)) % 2
    side = balcon.theorem_sides(anchor, mean_view, unit(len(anchor), 4, seed=9), labels, 2.0)
    return side["attract_left"], side["attract_right"]


def test_theorem_4_4_and_its_equality_conditions():
    views = unit(50, 7, 4, seed=1)
    anchor = views[:, 0]
    mean_view = views.mean(1)
    left, right = attracting_sides(anchor, mean_view)
    by_loops = [-np.mean([float(anchor[i] @ view) for view in views[i]]) for i in range(50)]
    assert_close(right, by_loops)  # −E s(f(t(x)), f(T(x)))
    assumed = (anchor * mean_view).sum(1) > 0  # Assumption 4.3
    assert 5 < assumed.sum() < 50
    assert (left < right)[assumed].all()
    assert (left > right)[~assumed].all()  # so the assumption is needed
    assert_close(*attracting_sides(anchor, anchor))  # all views of an image coincide
    turned = F.normalize(anchor.roll(1, 1) * torch.tensor([1, -1, 1, -1]), dim=1)
    across = turned - (turned * anchor).sum(1, keepdim=True) * anchor
    assert_close(*attracting_sides(anchor, 0.3 * across))  # or z ⟂ its mean view


def hard_case(seed):
    """Classes in one corner or anywhere, tight or loose; anchors among or opposite their own."""
    rng = np.random.default_rng(seed)
    classes, d = rng.integers(2, (7, 9))
    labels = np.append(np.arange(classes), rng.integers(classes, size=15))
    centres = rng.normal(size=(classes, d)) + 2 * (seed % 2)
    spread = rng.choice([0.05, 0.3, 1, 10], (classes, 1))[labels]

    def around(x, spread):
        return F.normalize(torch.tensor(x + spread * rng.normal(size=x.shape)), dim=1)

    anchor = around(rng.choice([-1, 1]) * centres[labels], rng.choice([0.1, 3]))
    bank = around(centres[labels], spread)
    return anchor, bank, torch.tensor(labels), 10 ** rng.uniform(-1, 2.3)


def test_theorem_4_6_holds_where_b_is_not_negative_and_with_max_of_b_and_b_over_nu_always():
    fails = 0
    for seed in range(200):
        anchor, bank, labels, alpha = hard_case(seed)
        side = balcon.theorem_sides(anchor, anchor, bank, labels, alpha)
        left = side["repel_left"] - 1e-9
        right = side["repel_right"]
        b = side["b"]
        holds = left < right
        classes = len(labels.unique())
        assert holds[b >= 0].all()
        assert (left < torch.maximum(b, right)).all()
        own = torch.stack([bank[labels == label].mean(0) for label in labels])
        assert (b[(anchor * own).sum(1) >= 0] > -1e-9).all()  # in its class mean's hemisphere
        assert (b > -1e-9).all() or alpha > math.log(classes)
        assert holds.all() or classes > 2
        fails += (~holds).sum()
    assert fails > 5  # so the cases are hard enough


def test_theorem_4_6_has_a_counterexample_that_respects_assumption_4_3():
    z, e1, e2, e3 = torch.eye(4).double()
    u = -0.0101 * z + math.sqrt(1 - 0.0101 ** 2) * e3
    assert 0.01 + 0.99 * (u @ z) >= 0  # Assumption 4.3, for the views z (1 %) and u (99 %)
    others = [-z / 2 + math.sqrt(0.75) * e1, -z / 2 - math.sqrt(0.75) * e1,
              *[-z / 2 + math.sqrt(0.75) * e2] * 2, *[-z] * 14]  # nine classes of two
    own = [z, *[u] * 99, *[-z] * 51_100]  # 512 images with 100 views each
    bank = torch.stack(others + own)
    labels = torch.cat([torch.arange(18) // 2, torch.full((51_200,), 9)])
    b = balcon.repulsion_bound(z[None], bank, labels, 8.0).item()
    prototypes = balcon.class_means(bank, labels)[:9]
    left = (prototypes @ z / prototypes.norm(dim=1)).max().item()
    right = b / prototypes.norm(dim=1).min().item()
    found = [page.number(figure, 3) for figure in (left, right, b)]
    assert found == [page.derived()[f"theorem/{name}"] for name in ("left", "right", "b")]
    assert found[:2] == ["−0.500", "−0.577"] and max(b, right) > left > right


def test_theorem_4_6_fails_as_printed_in_balcons_own_measurement():
    """The same with four classes, α = 4 and an anchor's class of 100 images with 50 views each."""
    z, e1, e2, e3 = torch.eye(4).double()
    u = -0.02 * z + math.sqrt(1 - 0.02 ** 2) * e3
    own = [z, *[u] * 49, *[-z] * 4950]
    others = [-z / 2 + math.sqrt(0.75) * e1, -z / 2 - math.sqrt(0.75) * e1,
              *[-z / 2 + math.sqrt(0.75) * e2] * 2, *[-z] * 2]
    bank = torch.stack(own + others)
    labels = torch.cat([torch.zeros(5000).long(), 1 + torch.arange(6) // 2])
    mean_view = (0.02 * z + 0.98 * u).expand(5006, 4)
    side = balcon.theorem_sides(z.expand(5006, 4), mean_view, bank, labels, 4.0)
    left, right, b = (side[name][0] for name in ("repel_left", "repel_right", "b"))
    assert side["attract_left"][0] <= 0 and b < 0  # Assumption 4.3 holds
    assert right < left < max(b, right)
