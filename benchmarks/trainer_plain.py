"""What the reference trainer is held against: the loop that repositories for long-tailed recognition share.

Written after LDAM's (Cao et al., arXiv:1906.07413): a data set of PIL images that worker processes crop, flip and
normalise one by one, contiguous float32 tensors, SGD as torch chooses it, LDAM by a one-hot mask, and loss and
accuracies read after every step. The learning rate is that of the recipe, so that both loops learn alike.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import seed_everything
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ltkernels.trainer.data import LabelledImages, Split
from ltkernels.trainer.data.datasets import ImageDataset
from ltkernels.trainer.fit import make_network
from ltkernels.trainer.image_recipes import ImageRecipe

WORKERS = 4  # worker processes of LDAM's repository
PREFETCHED = 2  # batches that a worker of torch prepares ahead


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Transform:
    """One image at a time, as torchvision's transforms do it: PIL for the geometry, torch for the numbers."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], padding: int | None) -> None:
        """``padding`` black pixels before a random crop and flip; None: neither of them."""
        self.mean, self.std, self.padding = mean, std, padding

    def __call__(self, picture: Image.Image) -> Tensor:
        if self.padding is not None:
            picture = self._flip(self._crop(picture, self.padding))
        return self._normalise(self._to_tensor(picture))

    @staticmethod
    def _crop(picture: Image.Image, padding: int) -> Image.Image:
        width, height = picture.size
        padded = ImageOps.expand(picture, border=padding, fill=0)
        top = int(torch.randint(0, 2 * padding + 1, (1,)))
        left = int(torch.randint(0, 2 * padding + 1, (1,)))
        return padded.crop((left, top, left + width, top + height))

    @staticmethod
    def _flip(picture: Image.Image) -> Image.Image:
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else picture

    @staticmethod
    def _to_tensor(picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, copy=True))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = torch.as_tensor(self.mean), torch.as_tensor(self.std)
        return pixels.clone().sub_(mean[:, None, None]).div_(std[:, None, None])


class Pictures(Dataset):
    """Images in colour and their classes, transformed when they are asked for."""

    def __init__(self, data: LabelledImages, transform: Transform) -> None:
        self._images, self._labels, self._transform = data.images, data.labels, transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), int(self._labels[index])


class LDAMByMask(nn.Module):
    """LDAM by the formula of its authors' code: a mask of all logits, and the margins through a matrix product."""

    def __init__(self, counts: Sequence[int], max_margin: float, scale: float, weight: Tensor | None) -> None:
        super().__init__()
        margins = torch.tensor(counts, dtype=torch.float64) ** -0.25
        self.register_buffer("margins", (margins * (max_margin / margins.max())).float())
        self.register_buffer("weight", weight)
        self.scale = scale

    def forward(self, cosines: Tensor, target: Tensor) -> Tensor:
        index = torch.zeros_like(cosines, dtype=torch.bool)
        index.scatter_(1, target.view(-1, 1), True)
        margins = self.margins.to(cosines.dtype)
        batch_margin = torch.matmul(margins[None, :], index.to(cosines.dtype).transpose(0, 1)).view(-1, 1)
        output = torch.where(index, cosines - batch_margin, cosines)
        return F.cross_entropy(self.scale * output, target, weight=self.weight)


def class_weight(counts: Sequence[int], beta: float) -> Tensor:
    """Class-balanced weights, normalised to sum C."""
    weight = (1 - beta) / (1 - beta ** np.array(counts, dtype=np.float64))
    return torch.from_numpy(weight / weight.sum() * len(counts)).float()


class Average:
    """A value and its mean over the samples so far."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float, count: int) -> None:
        self.sum += value * count
        self.count += count


def accuracies(logits: Tensor, target: Tensor, ranks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """Percent of the rows with the target among the first 1 and the first 5 classes."""
    right = logits.topk(max(ranks), dim=1).indices.eq(target[:, None])
    return [right[:, :rank].any(1).float().mean() * 100 for rank in ranks]


class PlainLoop:
    """LDAM-DRW for a recipe's network, data and optimiser.

    Args:
        recipe: Of method ``ldam-drw``.
        data: Constants of the normalisation.
        split: Training and evaluation images.
        device: Where the network is trained.
    """

    def __init__(self, recipe: ImageRecipe, data: ImageDataset, split: Split, device: torch.device) -> None:
        self.recipe, self.split, self.device = recipe, split, device
        self.workers = min(WORKERS, cores())
        self.transform = Transform(data.mean, data.std, recipe.augmentation.padding)
        self.plain_transform = Transform(data.mean, data.std, None)
        seed_everything(recipe.seed, verbose=False)
        self.network = make_network(recipe, 3, len(split.counts)).to(device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self._loader = DataLoader(
            Pictures(split.train, self.transform),
            batch_size=recipe.batch_size,
            shuffle=True,
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
        )
        self.steps_per_epoch = len(self._loader)
        self.step = 0
        self._steps = self._train()

    def criterion(self, epoch: int) -> nn.Module:
        """The loss of an epoch, counted from 0."""
        settings = self.recipe.settings
        start = round(settings.drw_start * self.recipe.steps / self.steps_per_epoch)
        weight = class_weight(self.split.counts, settings.beta) if epoch >= start else None
        return LDAMByMask(self.split.counts, settings.max_margin, settings.scale, weight).to(self.device)

    def advance(self, count: int) -> None:
        """Take so many steps; the batches that the workers have prepared wait for the next call."""
        for _ in range(count):
            next(self._steps)

    def block(self, warm: int, timed: int) -> float:
        """Seconds of a step: the mean of ``timed`` ones, after ``warm`` (at least 1) that are not timed."""
        self.advance(warm)
        synchronize(self.device)
        start = time.perf_counter()
        self.advance(timed)
        synchronize(self.device)
        return (time.perf_counter() - start) / timed

    def _train(self) -> Iterator[None]:
        for epoch in itertools.count():
            criterion = self.criterion(epoch)
            averages = [Average() for _ in range(3)]
            self.network.train()
            for images, target in self._loader:
                self._take_step(criterion, images, target, averages)
                yield

    def _take_step(self, criterion: nn.Module, images: Tensor, target: Tensor, averages: list[Average]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        images = images.to(self.device, non_blocking=True)
        target = target.to(self.device, non_blocking=True)
        logits = self.network(images)
        loss = criterion(logits, target)
        for average, value in zip(averages, (loss, *accuracies(logits, target)), strict=True):
            average.update(value.item(), len(target))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def accuracy(self) -> float:
        """Percent of the evaluation images."""
        self.network.eval()
        loader = DataLoader(Pictures(self.split.evaluate, self.plain_transform), 250, num_workers=self.workers)
        right = sum(int((self.network(x.to(self.device)).argmax(1).cpu() == y).sum()) for x, y in loader)
        self.network.train()
        return 100 * right / len(self.split.evaluate)

    # For the checks

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Training images without augmentation, and their classes."""
        images = [self.plain_transform(Image.fromarray(image)) for image in self.split.train.images[rows]]
        return torch.stack(images).to(self.device), torch.from_numpy(self.split.train.labels[rows]).to(self.device)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Of a batch of the first epoch."""
        return self.criterion(0)(self.network(images), target)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def augmented(self, images: np.ndarray) -> Tensor:
        """Any images (B, H, W, 3) uint8 as the loop would train on them."""
        return torch.stack([self.transform(Image.fromarray(image)) for image in images])
