"""Question C of QUESTIONS.md: which runs, at which commit, and their rows. lane.py trains them."""
FROZEN = "2759a235e759e0f66b00e0c91ba99049eb31d24e"
V = ("--limit 5000 --backbone resnet8 --stem imagenet --epochs 12 --batch-size 256 "
     "--probe features --no-baseline --eval knn linear")
PRESETS = {"C": ("--dataset cifar10 " + V, "cifar10-val"),
           "V100": ("--dataset cifar100 " + V.replace("5000", "10000"), "cifar100")}
METHODS = {  # (objective, α, λ): the middle one of the first three rates
    ("balanced", 2, 4): 0.8, ("nscl", 2, 4): 0.8,
    ("balanced", 2, 1): 0.8, ("eq14", 2, 1): 0.8, ("ntxent", 2, 1): 0.8,
    ("balanced", 8, 1): 0.4, ("eq14", 8, 1): 0.4, ("ntxent", 8, 1): 0.4,
    ("mean4", 2, 4): 0.8, ("eq5", 1, 1): 0.8, ("eq7", 1, 1): 0.8, ("balanced", 8, 4): 0.4}
MORE = {"mean4": " --batch-size 128 --epochs 6"}  # as many views and steps
STRATEGIES = {  # of C4, whose base has blur: its name on the page, its flags
    "base": ("base", "--add gaussian_blur"),
    "noblur": ("− gaussian_blur", ""),
    "nocolor": ("− color_distortion", "--add gaussian_blur --drop color_distortion"),
    "cutout": ("+ random_cutout", "--add gaussian_blur random_cutout"),
    "rotation": ("+ random_rotation", "--add gaussian_blur random_rotation"),
    "noise": ("+ gaussian_noise", "--add gaussian_blur gaussian_noise")}
SEEDS = (1, 2, 3)  # that are reported; seed 0 chooses the rate
LOWEST = 1 / 32  # of the first rate: an objective whose best is no training at all ends there


def run_of(method, rate, seed):
    """Seed 0 chooses the rate; on the others theory is measured at α = 8, where B may be < 0."""
    objective, alpha, lam = method
    argv = f"--loss {objective} --alpha {alpha} --lam {lam} --lr {rate:g}" + MORE.get(objective, "")
    if alpha == 8 and seed:
        argv += " --eval knn linear bounds"
    return {"id": f"C-{objective}-a{alpha}-l{lam}-lr{rate:g}-s{seed}", "stage": "C",
            "preset": "C", "seed": seed, "argv": argv}


def rates_of(method, rows):
    """{rate: validation accuracy} of seed 0."""
    prefix = "C-{}-a{}-l{}-lr".format(*method)
    return {float(name.removeprefix(prefix)[:-3]): row["linear"] for name, row in rows.items()
            if name.startswith(prefix) and name.endswith("-s0")}


def best_rate(method, rows):
    """The best rate so far, and the rates that are missing before it is known to be interior."""
    middle = METHODS[method]
    tried = rates_of(method, rows)
    missing = [rate for rate in (middle, middle / 2, 2 * middle) if rate not in tried]
    if missing:
        return None, missing
    best = max(tried, key=tried.get)
    lower = [best / 2] * (best == min(tried) and best > LOWEST * middle)
    return best, lower + [2 * best] * (best == max(tried))


def plan(rows):
    runs = []
    for method in METHODS:
        rate, missing = best_rate(method, rows)
        runs += [run_of(method, rate, 0) for rate in missing]
        if not missing:
            runs += [run_of(method, rate, seed) for seed in SEEDS]
    rate, missing = best_rate(("balanced", 2, 4), rows)
    if not missing:
        runs += [{"id": f"C4-{name}-s{seed}", "stage": "C4", "preset": "V100", "seed": seed,
                  "argv": f"--lr {rate:g} {flags} --eval knn linear bias bounds"}
                 for seed in (0, 1) for name, (_, flags) in STRATEGIES.items()]
    return [run for run in runs if run["id"] not in rows]


def command(run):
    """What trains it, without data and run directory."""
    words = run["argv"].split()
    program = ["balcon.py"]
    if "--loss" in words and words[1] not in ("balanced", "ntxent"):
        program = [".github/results/study.py", "train", words[1]]
        words = words[2:]
    return [*program, *PRESETS[run["preset"]][0].split(), *words]


def figures(results):
    """Those of results.json that a row holds."""
    found = results["trained"]
    row = {}
    for name in ("knn", "linear"):
        row |= {key: round(value, 2) for key, value in found[name].items() if key != "settings"}
    for name in ("bias", "bounds"):
        if name in found:
            row[name] = {key: value for key, value in found[name].items() if key != "settings"}
    return row
