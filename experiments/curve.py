"""Draws the reward and the held-out accuracy of finished runs on a --dataset-name. Needs matplotlib.

    python experiments/curve.py FIGURE.png RUN_DIR [RUN_DIR ...]      # folders with metrics.jsonl and results.json
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(target, *folders):
    figure, axes = plt.subplots(1, len(folders), figsize=(5.5 * len(folders), 3.6), squeeze=False)
    for ax, folder in zip(axes[0], map(Path, folders)):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results = json.loads((folder / "results.json").read_text())
        ax.plot([row["iteration"] for row in rows], [row["objective/scores"] for row in rows], color="0.6", label="training batches, sampled")
        for mode, colour in (("greedy", "#2c3e50"), ("sampled", "#c0392b")):
            points = {0: results["before"][f"held out, {mode}"]}
            points |= {row["iteration"]: row[f"eval/held_out/{mode}"] for row in rows if f"eval/held_out/{mode}" in row}
            points[rows[-1]["iteration"]] = results["after"][f"held out, {mode}"]
            ax.plot(list(points), list(points.values()), "o-", color=colour, label=f"held out, {mode}")
        ax.set(title=folder.name, xlabel="iteration", ylabel="accuracy", ylim=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    print(f"written: {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
