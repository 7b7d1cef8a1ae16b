"""Scores of one forward pass: tensors in, tensors out.

With logits z (C classes), head rows W_c, prediction k = argmax z and label y:

    distance    min over c ≠ k of (z_k − z_c) / ‖W_k − W_c‖₂    ≥ 0, Euclidean, in the space before the head
    margin      min over c ≠ y of (z_y − z_c) / ‖W_y − W_c‖₂    > 0 exactly when the prediction is right
    loss        −ln softmax(z)_y
    el2n        ‖softmax(z) − e_y‖₂
    entropy     −Σ p ln p, in nats
    confidence  max p

The distance is that of Emam et al. 2021 (arXiv 2111.12880), EL2N that of Paul et al. 2021 (arXiv 2107.07075).
Classes with equal head rows have no boundary between them: such pairs are skipped, and a sample with no boundary left
is infinitely far from one. A tie in argmax is the lower class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dynams_stream.errors import HeadError, UsageError

_KEPT_CLASSES = 4096
"""Up to this many classes the norms of all pairs are kept (128 MiB); beyond, they are computed for each batch."""
_BLOCK_CLASSES = 4096
_BLOCK_ELEMENTS = 1 << 22
_CANCELLED = 1e-6
"""Below this share of ‖W_k‖² + ‖W_c‖² the Gram matrix's ‖W_k − W_c‖² has lost too many digits for a float32 score."""
_LARGEST = torch.finfo(torch.float32).max


class BoundaryNorms:
    """‖W_k − W_c‖₂ for the pairs of classes of a head, computed once per pass.

    They come from the Gram matrix W Wᵀ in float64; pairs of nearly equal rows, where that cancels, are taken from the
    difference itself. Never a B×C×d tensor. Above 4096 classes only the rows that a batch asks for are computed.

    Args:
        weight: the last linear layer's weight, shape (C, d), C ≥ 2, any floating dtype and device.

    Raises:
        HeadError: the weight is not a matrix, has a single row, or holds values that are not finite.
    """

    def __init__(self, weight: Tensor) -> None:
        _require_head(weight)
        weight = weight.detach()
        if weight.device.type == "mps":  # no float64 there
            weight = weight.cpu()
        self.classes = int(weight.shape[0])
        self.device = weight.device
        self._table: Tensor | None = None
        self._weight: Tensor | None = None
        self._squares = torch.cat([block.double().square().sum(1) for block in torch.split(weight, _BLOCK_CLASSES)])
        if not bool(torch.isfinite(self._squares).all()):
            raise HeadError(f"the head's weight {tuple(weight.shape)} is too large for ‖W_c‖² in float64; rescale it")
        if self.classes <= _KEPT_CLASSES:
            step = max(1, _BLOCK_ELEMENTS // self.classes)
            every = torch.arange(self.classes, device=self.device)
            self._table = torch.cat([_norms(weight, self._squares, some) for some in torch.split(every, step)])
        else:
            self._weight = weight.clone()  # the model may go on training while a pass runs

    def rows(self, classes: Tensor) -> Tensor:
        """Norms between each of `classes` and every class.

        Args:
            classes: int64, shape (B,), values in [0, C).

        Returns:
            float64, shape (B, C), on the head's device; +inf where there is no boundary: the class itself and
            classes whose head row equals its own.
        """
        classes = classes.to(self.device)
        if self._table is not None:
            return self._table[classes]
        assert self._weight is not None
        return _norms(self._weight, self._squares, classes)


def _require_head(weight: Tensor) -> None:
    shape = tuple(weight.shape)
    if len(shape) != 2:
        raise HeadError(f"the head's weight has shape {shape}; a linear layer's (classes, features) is needed")
    if shape[0] < 2:
        raise HeadError(
            f"the head has {shape[0]} output(s); scores need one logit for each of 2 classes or more "
            f"(make a single-logit classifier a two-logit one)"
        )
    if not weight.is_floating_point():
        raise HeadError(f"the head's weight is {weight.dtype}; a floating-point weight is needed")
    if not bool(torch.isfinite(weight).all()):
        row = int((~torch.isfinite(weight)).any(1).nonzero()[0])
        raise HeadError(
            f"the head's weight holds NaN or infinity (first in the row of class {row}); the model diverged"
        )


def _norms(weight: Tensor, squares: Tensor, classes: Tensor) -> Tensor:
    """‖W_k − W_c‖₂ for k in `classes` and every c, (B, C) float64, +inf where the rows are equal."""
    rows = weight[classes].double()
    result = torch.empty(len(classes), len(weight), dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), _BLOCK_CLASSES):
        block = slice(start, start + _BLOCK_CLASSES)
        columns = weight[block].double()
        total = squares[classes, None] + squares[None, block]
        difference = torch.addmm(total, rows, columns.T, alpha=-2.0)
        _recompute_cancelled(difference, total, rows, columns)
        result[:, block] = difference.sqrt_()
    result[result == 0] = torch.inf
    return result


def _recompute_cancelled(difference: Tensor, total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Replace those squared norms of `difference` that cancellation spoiled by the directly computed ones."""
    pairs = (difference <= _CANCELLED * total).nonzero()
    for some in torch.split(pairs, max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))):
        row, column = some.unbind(1)
        difference[row, column] = (rows[row] - columns[column]).square_().sum(1)


@dataclass(frozen=True, eq=False)
class ScoreBatch:
    """Scores of B samples, each field of shape (B,), on the head's device.

    Where `finite` is false the logits held NaN or infinity (in float32): both classes are -1 and all scores NaN.
    Where `labelled` is false margin, loss and el2n are NaN. No other NaN occurs. Write both as null.
    """

    predicted: Tensor
    """int64, the class of the largest logit, the lowest such class on a tie."""
    runner_up: Tensor
    """int64, the class across the nearest boundary, the lowest such class on a tie; -1 where there is no boundary."""
    distance: Tensor
    """float32 ≥ 0, to the nearest boundary in feature space; +inf where there is none."""
    margin: Tensor
    """float32, the label's signed distance; +inf where the label's class has no boundary."""
    loss: Tensor
    """float32, cross-entropy in nats."""
    el2n: Tensor
    """float32 in [0, √2]."""
    entropy: Tensor
    """float32 in nats, in [0, ln C]."""
    confidence: Tensor
    """float32 in [1/C, 1], the largest probability."""
    labelled: Tensor
    """bool, the sample has a label."""
    finite: Tensor
    """bool, all its logits are finite."""

    def __len__(self) -> int:
        return len(self.predicted)

    def cpu(self) -> ScoreBatch:
        """The same scores in the host's memory."""
        return ScoreBatch(*(getattr(self, field.name).cpu() for field in fields(self)))


def join_scores(batches: Sequence[ScoreBatch]) -> ScoreBatch:
    """The scores of several batches, at least one, as those of one."""
    if len(batches) == 1:
        return batches[0]
    return ScoreBatch(*(torch.cat([getattr(one, field.name) for one in batches]) for field in fields(ScoreBatch)))


@torch.no_grad()
def score_batch(logits: Tensor, labels: Tensor, norms: BoundaryNorms) -> ScoreBatch:
    """Score the samples of one batch; each one's scores are its own, whatever its neighbours.

    Args:
        logits: floating, shape (B, C); B = 0 and B = 1 are fine. Computed in float64, returned in float32.
        labels: int64, shape (B,), values in [0, C), or -1 for a sample without a label.
        norms: of the head that made the logits.

    Raises:
        HeadError: the logits do not have one column for each class of the head.
        UsageError: the labels are not one class number per sample (soft and multi-label targets are refused).
    """
    if logits.dim() != 2 or logits.shape[1] != norms.classes:
        raise HeadError(
            f"logits of shape {tuple(logits.shape)} do not fit a head of {norms.classes} classes; "
            f"is the named head the last layer?"
        )
    _require_labels(labels, *logits.shape)
    logits, labels = logits.to(norms.device), labels.to(norms.device)
    # Bounded temporaries: at 10^5 classes a batch is scored some dozens of samples at a time.
    step = max(1, 4 * _BLOCK_ELEMENTS // norms.classes)
    batches = [_score(*both, norms) for both in zip(torch.split(logits, step), torch.split(labels, step), strict=True)]
    if len(batches) == 1:
        return batches[0]
    return ScoreBatch(*(torch.cat([getattr(one, field.name) for one in batches]) for field in fields(ScoreBatch)))


def _require_labels(labels: Tensor, samples: int, classes: int) -> None:
    if labels.dim() != 1 or len(labels) != samples:
        raise UsageError(
            f"labels of shape {tuple(labels.shape)} for {samples} samples; one class number per sample is needed "
            f"(multi-label and soft labels cannot be scored)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UsageError(f"labels are {labels.dtype}; class numbers (int64) are needed, soft labels cannot be scored")
    if samples and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = (labels < -1) | (labels >= classes)
        row = int(wrong.nonzero()[0])
        raise UsageError(f"label {int(labels[row])} of sample {row} of the batch is not in [0, {classes - 1}]")


def _score(logits: Tensor, labels: Tensor, norms: BoundaryNorms) -> ScoreBatch:
    finite = logits.float().abs().amax(1) < torch.inf  # amax hands a NaN on
    z = torch.where(finite[:, None], logits.double(), 0.0)
    labelled = labels >= 0
    label = labels.clamp(min=0)
    predicted = _first(z == z.amax(1, keepdim=True))

    quotients = _boundary_distances(z, predicted, norms)
    distance = quotients.amin(1)
    runner_up = torch.where(distance == torch.inf, -1, _first(quotients == distance[:, None]))
    margin = distance.clone()
    wrong = (label != predicted).nonzero().squeeze(1)
    if len(wrong):
        margin[wrong] = _boundary_distances(z[wrong], label[wrong], norms).amin(1)
    loss, el2n, entropy, confidence = _softmax_scores(z, predicted, label)

    def column(values: Tensor, known: Tensor) -> Tensor:
        # Adding 0.0 turns -0.0 into +0.0, so that equal scores have equal bits.
        return torch.where(known, values.float() + 0.0, torch.nan)

    return ScoreBatch(
        predicted=torch.where(finite, predicted, -1),
        runner_up=torch.where(finite, runner_up, -1),
        distance=column(distance, finite),
        margin=column(margin, finite & labelled),
        loss=column(loss, finite & labelled),
        el2n=column(el2n, finite & labelled),
        entropy=column(entropy, finite),
        confidence=column(confidence, finite),
        labelled=labelled,
        finite=finite,
    )


def _first(mask: Tensor) -> Tensor:
    """Column of the first true value of each row, 0 where there is none (torch's argmax leaves ties open)."""
    columns = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    first = torch.where(mask, columns, mask.shape[1]).amin(1).long()
    return torch.where(first < mask.shape[1], first, 0)


def _boundary_distances(z: Tensor, classes: Tensor, norms: BoundaryNorms) -> Tensor:
    """Signed distance from each sample to each boundary of its class in `classes`, (B, C); +inf where there is none."""
    between = norms.rows(classes)
    # A quotient too large for float32 must not look like "no boundary".
    quotients = ((z.gather(1, classes[:, None]) - z) / between).clamp_(-_LARGEST, _LARGEST)
    return quotients.masked_fill_(between == torch.inf, torch.inf)


def _softmax_scores(z: Tensor, predicted: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """Loss, EL2N, entropy and confidence, to full relative precision however sure the prediction is.

    All follow from e_c = exp(z_c − z_k) ≤ 1 and rest = Σ over c ≠ k of e_c, without subtracting close numbers:
    p_c = e_c / (1 + rest), 1 − p_k = rest / (1 + rest), −ln p_c = (z_k − z_c) + ln(1 + rest).
    """
    k, y = predicted[:, None], label[:, None]
    below = z.gather(1, k) - z
    e = (-below).exp_()
    rest = e.scatter(1, k, 0.0).sum(1, keepdim=True)
    total = 1 + rest
    surprise = below + rest.log1p()
    # e − total·e_y, whose entry at y is −rest when the label is the prediction
    residual = e.scatter(1, y, torch.where(k == y, rest, total - e.gather(1, y)))
    loss = surprise.gather(1, y).clamp_(max=_LARGEST)
    el2n = torch.linalg.vector_norm(residual, dim=1, keepdim=True) / total
    entropy = (e * surprise).sum(1, keepdim=True) / total
    confidence = 1 / total
    return loss.squeeze(1), el2n.squeeze(1), entropy.squeeze(1), confidence.squeeze(1)
