"""Labelled images as every data set hands them over."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with class indices, on the host.

    Args:
        source: Where they come from, for the report.
        images: (N, H, W) uint8.
        labels: (N,) int64 in [0, num_classes).
        num_classes: C.
        max_value: Brightest possible pixel.
    """

    source: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    max_value: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def hashes(self) -> np.ndarray:
        """(N,) sha256 of each image's pixels: names an image whatever the order of the file it came from."""
        return np.array([hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in self.images])

    @property
    def fingerprint(self) -> str:
        """sha256 of the sorted image hashes: names a set of images, printed with every result."""
        return hashlib.sha256("".join(sorted(self.hashes)).encode()).hexdigest()

    @property
    def class_sizes(self) -> np.ndarray:
        """(C,) images of each class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: np.ndarray) -> LabelledImages:
        return LabelledImages(self.source, self.images[indices], self.labels[indices], self.num_classes, self.max_value)

    def without_duplicates(self) -> LabelledImages:
        """Each image once: a copy of a test image among the training images would make the test easier."""
        by_hash = np.lexsort((self.labels, self.hashes))  # by label too: which copy stays must not depend on file order
        hashes = self.hashes[by_hash]
        first = np.ones(len(hashes), dtype=bool)
        first[1:] = hashes[1:] != hashes[:-1]
        return self.subset(by_hash[first])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (N, 1, H, W) float32 in [-1, 1] and labels (N,) int64, on the device."""
        images = torch.from_numpy(self.images).to(device=device, dtype=torch.float32)
        return (images * (2.0 / self.max_value) - 1.0).unsqueeze(1), torch.from_numpy(self.labels).to(device)
