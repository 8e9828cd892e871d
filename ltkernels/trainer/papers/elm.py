r"""ELM, "Embedding and Logit Margins for Long-Tail Learning" (arXiv:2204.13208): a margin loss of logits plus a loss of
embeddings that draws rare classes together.

The four embedding losses here are a reconstruction; the paper's code is not public. The paper describes a term that
regularises the distribution of embeddings, tied to metric learning and contrastive losses; its formula, its weight and
the choices below are ours.

What the forms share. z are embeddings of length 1; the keys are the batch, both views of every image, and one learned
prototype of each class, so that every class has a key and every row a positive. No row is its own key.
:math:`s_{ia} = \langle z_i, z_a \rangle / T`, :math:`n_c` are training images, :math:`\pi_c` their shares,
:math:`\rho_{yc} = \tau_e \log(\pi_c / \pi_y)` and :math:`\lambda_y = (n_{\max} / n_y)^g`, scaled to mean 1 over the
batch.

A, the mirror of the logit margin loss: the *mean* over the keys of a class stands where the loss of logits has the
exponential of a logit. A sum would count the prior twice: the batch holds classes in proportion to it already.

.. math:: L_i = \frac{\lambda_{y_i}}{|P_i|} \sum_{p \in P_i} \log\Bigl[1 + \sum_{c \ne y_i} e^{\rho_{y_i c}}
    \operatorname{mean}_{a : y_a = c} e^{s_{ia} - s_{ip}}\Bigr]

B, supervised contrast with weights :math:`\omega_c`, one over the keys of class c, the row itself among them:

.. math:: L_i = \lambda_{y_i} \Bigl[\log \sum_{a \ne i} \omega_{y_a} e^{s_{ia}} -
    \operatorname{mean}_{p \in P_i} s_{ip}\Bigr]

C, cross-entropy over logits pooled by class, the keys of the own class without the row itself:

.. math:: o_{ic} = \log \operatorname{mean}_{a \ne i : y_a = c} e^{s_{ia}} + \tau_e \log \pi_c, \qquad
    L_i = \lambda_{y_i} \Bigl[\log \sum_c e^{o_{ic}} - o_{i y_i}\Bigr]

D, attraction only: squared distances to the prototype of the class, averaged over the rows of each class, then over
the classes in the batch with weights :math:`\lambda_y`. T has no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

import ltkernels.functional as LF
from ltkernels import margins
from ltkernels.nn import MarginCrossEntropyLoss
from ltkernels.trainer import TrainerError

Form = Literal["A", "B", "C", "D"]
WITH_PRIOR: tuple[Form, ...] = ("A", "C")


class _Keys(NamedTuple):
    """The B rows of the batch, then the C prototypes: K = B + C keys of length 1, float32 or float64."""

    embedding: Tensor  # (K, D)
    label: Tensor  # (K,) int64
    weight: Tensor  # (K,) weight of each as an anchor: 0 for prototypes
    class_size: Tensor  # (K,) keys of the class of each key, itself and the prototype included


class EmbeddingMarginLoss(nn.Module):
    """The embedding loss of ELM: a reconstruction; the paper's code is not public. The module's text has the formulas.

    Args:
        class_counts: (C,) training images of each class.
        embedding_dim: D.
        form: ``"A"`` mirror of the logit loss, ``"B"`` weighted supervised contrast, ``"C"`` class-pooled logits,
            ``"D"`` attraction only.
        temperature: T > 0.
        tau_e: Strength of the prior, not negative; forms B and D have none, for them it has to be 0.
        g: Strength of the class weights, not negative.

    ``prototypes`` (C, D) is a parameter: give ``parameters()`` to the optimiser, without weight decay, which would
    change how fast their directions turn and nothing else.

    Raises:
        TrainerError: an option out of range.
        ValueError, TypeError: class counts that are not C positive numbers.
    """

    log_prior: Tensor
    pair_margin: Tensor
    class_weight: Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        embedding_dim: int,
        form: Form = "A",
        temperature: float = 0.1,
        tau_e: float = 0.0,
        g: float = 0.0,
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise TrainerError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
        if embedding_dim < 1:
            raise TrainerError(f"embedding_dim: expected at least 1, got {embedding_dim}")
        if not 0 < temperature < math.inf:
            raise TrainerError(f"temperature: expected a finite number > 0, got {temperature:g}")
        for name, value in (("tau_e", tau_e), ("g", g)):
            if not 0 <= value < math.inf:
                raise TrainerError(f"{name}: expected a finite number >= 0, got {value:g}")
        if tau_e and form not in WITH_PRIOR:
            raise TrainerError(f"tau_e: form {form} has no prior, expected 0, got {tau_e:g}")
        self.form = form
        self.temperature = temperature
        self.tau_e = tau_e
        self.g = g
        prior = margins.logit_adjustment(class_counts).logit_bias
        self.prototypes = nn.Parameter(F.normalize(torch.randn(len(prior), embedding_dim), dim=1).to(prior.device))
        self.register_buffer("log_prior", prior)
        self.register_buffer("pair_margin", margins.pairwise_logit_adjustment(class_counts, tau_e).pairwise_margin)
        self.register_buffer("class_weight", (g * (prior.max() - prior)).exp())

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar: float32, or float64 for float64 embeddings. Its gradients go to them and the prototypes.

        Args:
            embedding: (B, D) of any floating dtype and length: both views of every image, in any order.
            target: (B,) classes, of an integer dtype.

        Raises:
            TrainerError: wrong shapes, or a class out of range (checked on CPUs).
        """
        self._check(embedding, target)
        keys = self._keys(embedding, target.long())
        if self.form == "A":
            return self._mirror(keys)
        if self.form == "B":
            return self._weighted_contrast(keys)
        if self.form == "C":
            return self._class_pooled(keys, len(target))
        return self._attraction(keys, len(target))

    # The batch and the prototypes are contrasted with each other as one set, in which the kernel leaves out each row
    # itself; as anchors, prototypes get weight 0 or are cut off. Explicit keys would need a (B, K) mask for that.

    def _mirror(self, keys: _Keys) -> Tensor:
        """Form A: each positive beside the negatives, -log of the class size makes their sums means over classes."""
        return LF.contrastive_loss(
            keys.embedding,
            temperature=self.temperature,
            labels=keys.label,
            key_bias=-keys.class_size.log(),
            pair_margin=self.pair_margin,
            sample_weight=keys.weight,
            denominator="own",
        )

    def _weighted_contrast(self, keys: _Keys) -> Tensor:
        """Form B."""
        return LF.contrastive_loss(
            keys.embedding,
            temperature=self.temperature,
            labels=keys.label,
            key_bias=-keys.class_size.log(),
            sample_weight=keys.weight,
        )

    def _class_pooled(self, keys: _Keys, rows: int) -> Tensor:
        """Form C. The cross-entropy needs the own class's logit and the log-sum-exp of all others: no (B, C) matrix."""

        def log_sum(exclude: str, key_bias: Tensor) -> Tensor:
            return LF.similarity_logsumexp(
                keys.embedding,
                temperature=self.temperature,
                labels=keys.label,
                key_bias=key_bias,
                exclude=exclude,
            )[:rows]

        prior = self.tau_e * self.log_prior[keys.label]
        others = log_sum("same_label", prior - keys.class_size.log())
        # Without the row itself; a class of one key is a prototype's, which is no anchor.
        own = log_sum("different_label", prior - (keys.class_size - 1).clamp(min=1).log())
        return _weighted_mean(-F.logsigmoid(own - others), keys.weight[:rows])

    def _attraction(self, keys: _Keys, rows: int) -> Tensor:
        """Form D."""
        prototype = keys.embedding[rows:][keys.label[:rows]]
        distance = (keys.embedding[:rows] - prototype).square().sum(1)
        return _weighted_mean(distance, (keys.weight / (keys.class_size - 1).clamp(min=1))[:rows])

    def _keys(self, embedding: Tensor, target: Tensor) -> _Keys:
        # In 16 bits the rounding of an embedding would be 1 / T times as large in the similarities.
        dtype = torch.promote_types(embedding.dtype, torch.promote_types(self.prototypes.dtype, torch.float32))
        classes = len(self.prototypes)
        both = torch.cat([embedding.to(dtype), self.prototypes.to(dtype)])
        label = torch.cat([target, torch.arange(classes, device=target.device)])
        size = both.new_zeros(classes).index_add(0, label, both.new_ones(len(label)))  # bincount synchronises on GPUs
        weight = self.class_weight.to(dtype)[target]
        return _Keys(
            embedding=_directions(both),
            label=label,
            weight=torch.cat([weight, weight.new_zeros(classes)]),
            class_size=size[label],
        )

    def _check(self, embedding: Tensor, target: Tensor) -> None:
        classes, width = self.prototypes.shape
        if embedding.dim() != 2 or embedding.shape[1] != width or not len(embedding):
            raise TrainerError(f"embedding: expected shape (B, {width}) with B > 0, got {tuple(embedding.shape)}")
        if target.shape != embedding.shape[:1] or target.is_floating_point():
            found = f"{tuple(target.shape)} of {target.dtype}"
            raise TrainerError(f"target: expected integers of shape ({len(embedding)},), got {found}")
        if target.is_cpu and not is_compiling() and ((target < 0) | (target >= classes)).any():
            found = f"{int(target.min())} to {int(target.max())}"
            raise TrainerError(f"target: expected classes from 0 to {classes - 1}, got {found}")

    def extra_repr(self) -> str:
        classes, width = self.prototypes.shape
        settings = f"form={self.form!r}, temperature={self.temperature}, tau_e={self.tau_e}, g={self.g}"
        return f"classes={classes}, embedding_dim={width}, {settings}"


class ELMLoss(nn.Module):
    """ELM: margin loss of the logits plus ``weight`` times the loss of the embeddings.

    The embedding loss is a reconstruction; the paper's code is not public.

    Args:
        logit_loss: Any margin loss of :mod:`ltkernels.nn`; it is called with logits and classes.
        embedding_loss: :class:`EmbeddingMarginLoss` with the prototypes.
        weight: lambda, not negative. 0 is the logit loss alone, to the last bit, and prototypes get no gradient.

    Raises:
        TrainerError: a weight out of range.
    """

    def __init__(self, logit_loss: MarginCrossEntropyLoss, embedding_loss: EmbeddingMarginLoss, weight: float) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise TrainerError(f"weight: expected a finite number >= 0, got {weight:g}")
        self.logit_loss = logit_loss
        self.embedding_loss = embedding_loss
        self.weight = weight

    def set_epoch(self, epoch: int) -> None:
        """Of the logit loss: deferred re-weighting starts at an epoch (counted from 0)."""
        self.logit_loss.set_epoch(epoch)

    def forward(self, logits: Tensor, embedding: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (B, C) and embeddings (B, D) of classes (B,), both views of every image; a scalar."""
        loss = self.logit_loss(logits, target)
        return loss + self.weight * self.embedding_loss(embedding, target) if self.weight else loss

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


def _directions(x: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros, as a dead ReLU layer gives, stays 0 and gets no gradient."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(length > 1e-8, length, torch.inf)


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()
