"""Long-tailed Fashion-MNIST with auxiliary classes: what they and neighbour silencing change. Guide: docs/auxiliary.md.

Seven target classes have 500 to 5 training images; three auxiliary ones have plenty, and are masked at test. Writes a
table (Markdown and JSON) and two pictures. Needs matplotlib and scipy.
"""

import argparse
import gzip
import itertools
import json
import os
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import stdtrit
from torch import nn

import ltkernels.functional as LF
from ltkernels import nn as lnn
from ltkernels.neighbors import NeighborMap

TARGETS = ["T-shirt/top", "Trouser", "Pullover", "Sneaker", "Shirt", "Bag", "Ankle boot"]
AUXILIARY = ["Dress", "Coat", "Sandal"]
FILE_ORDER = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
NEIGHBORS = {"T-shirt/top": ["Dress"], "Pullover": ["Coat"], "Shirt": ["Dress", "Coat"],
             "Sneaker": ["Sandal"], "Ankle boot": ["Sandal"]}  # fmt: skip
# A control, as many pairs and all of them wrong: what a right map gains over it is not due to silencing as such.
STRANGERS = {"T-shirt/top": ["Sandal"], "Shirt": ["Sandal"], "Bag": ["Coat"],
             "Sneaker": ["Dress", "Coat"], "Ankle boot": ["Dress"]}  # fmt: skip

COUNTS = [500, 232, 107, 50, 23, 10, 5]  # exponential, imbalance factor 100
GROUPS = {"all": slice(0, 7), "many": slice(0, 3), "medium": slice(3, 5), "few": slice(5, 7)}
DRAWN = 100  # images of each auxiliary class an epoch, drawn anew: more would drown the targets
VALIDATION = 500  # training images of each target class that are kept for choosing settings

# Arm: neighbour map, lambda, and the learning rate that --tune chose.
ARMS = {
    "CE": (None, None, 0.1),
    "logit adj.": (None, None, 0.02),
    "auxiliary, λ = 1": (NEIGHBORS, 1.0, 0.05),
    "auxiliary, λ = 0.1": (NEIGHBORS, 0.1, 0.02),
    "auxiliary, λ = 0": (NEIGHBORS, 0.0, 0.02),
    "λ = 0, wrong map": (STRANGERS, 0.0, 0.02),
}
LEARNING_RATES = [0.01, 0.02, 0.05, 0.1, 0.2]
# Reference, then the arm compared with it.
PAIRS = [("CE", "logit adj."), ("logit adj.", "auxiliary, λ = 1"), ("auxiliary, λ = 1", "auxiliary, λ = 0.1"),
         ("auxiliary, λ = 1", "auxiliary, λ = 0"), ("λ = 0, wrong map", "auxiliary, λ = 0")]  # fmt: skip


def read_idx(root: Path, name: str) -> torch.Tensor:
    for path in (folder / f"{name}{end}" for folder in (root, root / "fashion-mnist") for end in ("", ".gz")):
        if path.is_file():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)  # byte 3 is the number of dimensions
            return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())
    raise SystemExit(
        f"{root}: neither it nor its folder fashion-mnist has {name} or {name}.gz. Fetch the four IDX files of "
        "https://github.com/zalandoresearch/fashion-mnist, put them there, or name their folder by --data-root or "
        "LTKERNELS_DATA. On Debian and Ubuntu, apt install dataset-fashion-mnist puts them where this looks by default."
    )


def load(root: Path) -> dict[str, list[torch.Tensor]]:
    """Images of each class, in the order of TARGETS + AUXILIARY: training, validation and test."""
    split = {}
    for part, file in (("train", "train"), ("test", "t10k")):
        images, labels = read_idx(root, f"{file}-images-idx3-ubyte"), read_idx(root, f"{file}-labels-idx1-ubyte")
        images = images.flatten(1).float() / 127.5 - 1
        split[part] = [images[labels == FILE_ORDER.index(name)] for name in TARGETS + AUXILIARY]
    held_out, rest = zip(*((own[:VALIDATION], own[VALIDATION:]) for own in split["train"]), strict=True)
    return split | {"train": rest, "validation": held_out}


def counts_of(seed: int) -> list[int]:
    """Training images of each target class. Seeds shift them, so that seven seeds put every class in every place."""
    return [COUNTS[(k + seed) % len(TARGETS)] for k in range(len(TARGETS))]


def map_of(neighbors: dict[str, list[str]]) -> NeighborMap:
    return NeighborMap.from_names(neighbors, class_names=TARGETS, auxiliary_names=AUXILIARY)


def train(arm: str, split: dict, seed: int, epochs: int, lr: float, evaluate: str) -> list[float]:
    """Accuracy, in percent, of the target class with 500 training images, with 232, ... with 5."""
    neighbors, weight, _ = ARMS[arm]
    counts, C, A = counts_of(seed), len(TARGETS), len(AUXILIARY) if neighbors else 0
    # A seed gives all arms the same images, hidden layer and batches of target images. Auxiliary images come on top.
    images, aux_images = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    own = [split["train"][k][torch.randperm(len(split["train"][k]), generator=images)[: counts[k]]] for k in range(C)]
    x, y = torch.cat(own), torch.arange(C).repeat_interleave(torch.tensor(counts))
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, C + A))
    if neighbors:
        prior = counts + [DRAWN] * A  # auxiliary images as often as they are drawn in an epoch
        criterion = lnn.NeighborSilencingLoss(map_of(neighbors), neighbor_weight=weight, prior_counts=prior)
    else:
        criterion = lnn.MarginCrossEntropyLoss() if arm == "CE" else lnn.LogitAdjustedLoss(counts)
    steps = -(-len(x) // 64)  # rounded up
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    for _ in range(epochs):
        extra = [own[torch.randperm(len(own), generator=aux_images)[:DRAWN]] for own in split["train"][C : C + A]]
        epoch_x = torch.cat([x, *extra])
        epoch_y = torch.cat([y, torch.arange(C, C + A).repeat_interleave(DRAWN)])
        order = torch.randperm(len(x), generator=images).tensor_split(steps)
        aux_order = (len(x) + torch.randperm(DRAWN * A, generator=aux_images)).tensor_split(steps)
        for rows in map(torch.cat, zip(order, aux_order, strict=True)):
            optimizer.zero_grad()
            criterion(network(epoch_x[rows]), epoch_y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():  # the largest raw logit of the target classes: no prior, no auxiliary class
        predicted = [LF.auxiliary_predict(network(own), num_classes=C) for own in split[evaluate][:C]]
    return [round(100 * (predicted[k] == k).float().mean().item(), 1) for k in map(counts.index, COUNTS)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def group_means(runs: list[list[float]], group: str) -> list[float]:
    return [mean(run[GROUPS[group]]) for run in runs]


def table(results: dict[str, list[list[float]]]) -> str:
    lines = [["arm", *GROUPS], ["---"] * 5]
    for arm, runs in results.items():
        lines.append([arm, *("{:.1f} ±{:.1f}".format(*mean_and_error(group_means(runs, group))) for group in GROUPS)])
    lines += [[], ["paired difference", *GROUPS], ["---"] * 5]
    for reference, arm in PAIRS:
        cells = [f"{arm} minus {reference}"]
        for group in GROUPS:
            a, b = group_means(results[arm], group), group_means(results[reference], group)
            middle, error = mean_and_error([p - q for p, q in zip(a, b, strict=True)])
            half = float(stdtrit(max(len(a) - 1, 1), 0.975)) * error
            cells.append(f"{middle:+.1f} ±{error:.1f} ({middle - half:+.1f} to {middle + half:+.1f})")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" if line else "\n" for line in lines)


def picture(results: dict[str, list[list[float]]], path: Path) -> None:
    """Accuracy over class counts; beside it the paired differences, in which the classes' own difficulty cancels."""
    figure = Figure(figsize=(12, 4.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ("#4d4d4d", "#0072b2", "#e69f00", "#cc79a7", "#d55e00", "#009e73")  # told apart by colour-blind readers
    for index, (arm, runs) in enumerate(results.items()):
        style = {"label": arm, "color": colors[index], "marker": "os^vDP"[index]}
        left.plot(COUNTS, np.mean(runs, axis=0), **style)
        if ARMS[arm][0]:
            side = 1.025 ** (7 - 2 * index)  # side by side, or error bars would hide each other
            middle, error = zip(*map(mean_and_error, np.subtract(runs, results["logit adj."]).T.tolist()), strict=True)
            right.errorbar([n * side for n in COUNTS], middle, error, capsize=2, **style)
    right.axhline(0, color=colors[1], lw=1)
    left.set(ylabel="test accuracy of the class, %", title=f"Mean over {len(runs)} seeds")
    right.set(ylabel="percentage points", title="Minus logit adjustment, paired, ± standard error")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="training images of the target class")
        axes.invert_xaxis()
        axes.set_xticks(COUNTS, map(str, COUNTS))
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.grid(axis="y", color="0.9")
        axes.legend(loc="lower left" if axes is left else "upper left")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(os.environ.get("LTKERNELS_DATA", "/usr/share/datasets"))
    parser.add_argument("--data-root", type=Path, default=root, help="folder of the four IDX files, or above it")
    parser.add_argument("--seeds", type=int, default=14, help="a multiple of 7 puts every class in every place")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/auxiliary"))
    parser.add_argument("--tune", action="store_true", help="score the grid on validation images instead")
    options = parser.parse_args()
    torch.set_num_threads(1)  # batches this small are faster without a second thread
    split = load(options.data_root)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tune:
        lines = ["| arm | learning rate | all |", "| --- | --- | --- |"]
        for arm, rate in itertools.product(ARMS, LEARNING_RATES):
            runs = [train(arm, split, 100 + s, options.epochs, rate, "validation") for s in range(options.seeds)]
            lines.append("| {} | {} | {:.2f} ±{:.2f} |".format(arm, rate, *mean_and_error(group_means(runs, "all"))))
            print(lines[-1], flush=True)
        (options.out / "tuning.md").write_text("\n".join(lines) + "\n")
        print(f"written: {options.out / 'tuning.md'}")
        return
    results = {}
    for arm, (*_, rate) in ARMS.items():
        results[arm] = [train(arm, split, s, options.epochs, rate, "test") for s in range(options.seeds)]
        print("{}: {:.1f} % ±{:.1f}".format(arm, *mean_and_error(group_means(results[arm], "all"))), flush=True)
    (options.out / "results.md").write_text(table(results))
    record = {"epochs": options.epochs, "torch": torch.__version__, "training_images": COUNTS, "accuracy": results}
    (options.out / "results.json").write_text(json.dumps(record, ensure_ascii=False))
    picture(results, options.out / "accuracy.png")
    print(f"written: {options.out}")
    map_of(NEIGHBORS).plot(options.out / "map.png", class_counts=counts_of(0), class_names=TARGETS)


if __name__ == "__main__":
    main()
