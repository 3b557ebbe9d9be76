"""The study behind RESULTS.md. Its commands:

    python .github/results/study.py tables            # make RESULTS.md and APPENDIX.md anew
    python .github/results/study.py tables --check    # exit 1 if they say anything else
    python .github/results/study.py figures           # draw the *.svg beside this file
    python .github/results/study.py report DIR…       # one table of the runs below directories
    python .github/results/study.py measure CHECKPOINT… INSTRUMENT… [flags of balcon.py]
    python .github/results/study.py train NAME [flags of balcon.py]      # another objective
    python .github/results/study.py pixels [flags of balcon.py]          # the control of raw pixels
    python .github/results/study.py picture BEFORE/neighbors.png AFTER/neighbors.png
    python .github/results/study.py benchmark [flags of balcon.py]       # where a step's time goes
    python .github/results/study.py versus [flags of balcon.py]          # beside other libraries
    python .github/results/study.py costs [--data PHOTOGRAPHS]           # cost as the work grows
    python .github/results/study.py command RUN       # what trains a run of runs.jsonl again
    python .github/results/study.py merge ROWS.jsonl  # append the lane's new rows to runs.jsonl

runs.py: the runs of runs.jsonl. stats.py: statistics. page.py: the pages. report.py: run folders.
instruments.py: what is measured beyond balcon.py. objectives.py: what is trained beyond it.
"""
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from balcon import UserError  # noqa: E402
from objectives import nscl_loss  # noqa: E402

__all__ = ["main", "nscl_loss"]
MODULES = {"tables": "page", "figures": "figures", "report": "report", "measure": "instruments",
           "train": "objectives", "pixels": "instruments", "picture": "instruments",
           "benchmark": "benchmark", "versus": "versus", "costs": "costs",
           "command": "runs", "merge": "runs"}


def main(name="", *rest):
    if name not in MODULES:
        raise SystemExit(__doc__)
    try:
        result = getattr(importlib.import_module(MODULES[name]), name)(*rest)
    except UserError as error:
        raise SystemExit(f"study: {error}") from None
    if result is not None:
        print(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
