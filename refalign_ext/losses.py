"""Training losses: rectified flow (paper eq. 1 and 4) and reference alignment (paper eq. 8 to 10).

Both are built from per-sample sums and counts, without a configuration and without a process group. Ranks that share a
sample call `alignment_by_block` on the tokens that each holds, and their results add up to the whole.

How samples are averaged: every sample is first averaged over its own elements (its own references, its own ordered pairs,
its own latent), then the samples of the batch are averaged. A sample without a reference contributes 0 and still counts.
So a batch of two equals two accumulated batches of one, whatever numbers of references and sizes the samples have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one block of the similarity matrix: on a CPU it should stay in the cache, on a GPU it should fill the device.
_BLOCK_ELEMENTS_CPU = 1 << 19
_BLOCK_ELEMENTS_GPU = 1 << 24


class RALoss(NamedTuple):
    """Reference-alignment loss; scalars with `total == positive + negative_weight * negative`."""

    total: Tensor
    positive: Tensor
    negative: Tensor


def _inverse_row_norm(tokens: Tensor) -> Tensor:
    """1 / norm of every row, and 0 for rows of zeros, whose cosine with anything then is 0 and has no gradient."""
    norm = torch.linalg.vector_norm(tokens, dim=-1)
    return torch.where(norm > torch.finfo(norm.dtype).tiny ** 0.5, norm.reciprocal(), torch.zeros_like(norm))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _row_blocks(start: int, stop: int, tokens: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Cut the flat positions [start, stop) into (reference, first, last) with at most `rows` tokens of one reference."""
    position = start
    while position < stop:
        reference = position // tokens
        last = min(position + rows, (reference + 1) * tokens, stop)
        yield reference, position, last
        position = last


class _AlignmentSums(torch.autograd.Function):
    """Sums over the tokens and pairs of one sample, the numerators of eq. 8 and 9, and the student's gradient in one pass.

    Takes projected reference tokens [S, D] at the flat positions `start .. start + S` of the sample's M*N (S may be 0: both
    sums are 0 and stay connected to the projectors), and `unit_features` of all its references [M, N, D], which get no
    gradient.

    The gradient of sum relu(s - threshold) with respect to the normalised student is `active @ teacher`, `active` being 1
    where s > threshold. One block of similarities gives its rows' share of that product and is then overwritten by the
    next, and the sum itself is <student, active @ teacher> - threshold * number of active pairs. So neither the similarity
    matrix nor anything of its size lives on for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, start: int, margin: float
    ) -> tuple[Tensor, Tensor]:
        references, tokens, _ = teacher.shape
        flat_teacher = teacher.flatten(0, 1)  # [M*N, D]
        values = student.to(teacher.dtype)  # [S, D]
        stop = start + values.shape[0]
        inverse_norm = _inverse_row_norm(values)  # [S]
        cosine = values.new_empty(values.shape[0])  # [S]
        negative = values.new_zeros((), dtype=torch.float64 if values.device.type != "mps" else torch.float32)
        with_gradient = ctx.needs_input_grad[0]
        with_negative = references > 1
        gradient = torch.empty_like(values) if with_gradient and with_negative else None
        threshold = 1.0 - margin

        budget = _BLOCK_ELEMENTS_CPU if values.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
        columns = max(1, min(tokens * max(references - 1, 1), budget // min(max(tokens, 1), 256)))
        rows = max(1, budget // columns)
        for reference, first, last in _row_blocks(start, stop, tokens, rows):
            local = slice(first - start, last - start)
            unit = values[local] * inverse_norm[local, None]  # [R, D]
            cosine[local] = (unit * flat_teacher[first:last]).sum(-1)
            if not with_negative:
                continue
            pulled = torch.zeros_like(unit) if with_gradient else None  # [R, D]
            for begin, end in ((0, reference * tokens), ((reference + 1) * tokens, references * tokens)):
                for column in range(begin, end, columns):
                    others = flat_teacher[column : min(column + columns, end)]  # [C, D]
                    similarity = unit @ others.T  # [R, C]
                    if pulled is None:
                        negative += similarity.sub_(threshold).relu_().sum()
                        continue
                    active = similarity.gt_(threshold)
                    pulled.addmm_(active, others)
                    if threshold != 0.0:
                        negative -= threshold * active.sum()
            if pulled is not None:
                along = (unit * pulled).sum(-1)  # [R]
                negative += along.sum()
                # Through the normalisation: d unit / d value = (1 - unit unit^T) / norm.
                pulled.addcmul_(unit, along[:, None], value=-1.0)
                torch.mul(pulled, inverse_norm[local, None], out=gradient[local])

        ctx.start = start
        ctx.save_for_backward(student, teacher, inverse_norm, cosine, gradient)
        return (1.0 - cosine).sum(), negative.to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_positive: Tensor, grad_negative: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, inverse_norm, cosine, gradient = ctx.saved_tensors
        paired = teacher.flatten(0, 1)[ctx.start : ctx.start + student.shape[0]]  # [S, D]
        # d (1 - cos) / d value = (cos * unit - teacher) / norm, with unit = value / norm.
        result = student.to(teacher.dtype) * (grad_positive * cosine * inverse_norm.square())[:, None]
        result.addcmul_(paired, (grad_positive * inverse_norm)[:, None], value=-1.0)
        if gradient is not None:
            result.addcmul_(gradient, grad_negative)
        return result.to(student.dtype), None, None, None


def unit_features(teacher: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Teacher features normalised over the last axis in `dtype`, without gradient; rows of zeros stay zero."""
    values = teacher.detach().to(dtype)
    return values * _inverse_row_norm(values)[..., None]


def real_references(teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, M], True where a reference counts: allowed by `mask` and its teacher features are not all zero.

    A dropped reference has all-zero teacher features in the release and then has no alignment loss.
    """
    present = (teacher.detach() != 0).any(-1).any(-1)  # features that are not finite count, and show
    return present if mask is None else present & mask.to(present.device)


def alignment_by_block(
    students: Sequence[Tensor],
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    margin: float = 1.0,
    sample_weight: Tensor | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Positive (eq. 8) and negative (eq. 9) terms of every block, weighted and averaged over the samples.

    Args:
        students: K projected student features, each [B, M, N, D], or [S, D] with `spans`; any floating dtype, computed in
            float32 at least.
        teacher: teacher features, [B, M, N, D]; normalised once, never gets a gradient.
        mask: [B, M] boolean, True where a real reference is; padding may hold anything. None: all are real.
        margin: delta of eq. 9. The paper does not give it, the release uses 1.0.
        sample_weight: [B], multiplies each sample's terms, for example the release's gate (t/1000)^3. It is not
            normalised: the batch is divided by B.
        spans: per sample (first, count): `students` hold only these of its M*N reference tokens, sample after sample.
            The result is then this share of the terms: shares whose spans cover all tokens once add up to the whole.

    Returns:
        positive [K] and negative [K].

    Raises:
        ValueError: shapes that do not fit, a mask that is not boolean, or no student at all.
    """
    _check_shapes(students, teacher, mask, sample_weight, spans)
    batch, references, tokens, _ = teacher.shape
    dtype = _compute_dtype(students[0])
    device = students[0].device
    real = real_references(teacher, mask).tolist()
    weights = torch.ones(batch) if sample_weight is None else sample_weight
    weights = weights.to(device, dtype)
    if spans is None:
        spans = [(0, references * tokens)] * batch
        students = [student.flatten(0, 2) for student in students]  # each [B*M*N, D]
    # Adding a sum over nothing keeps the projectors in the graph of a rank or batch that holds no reference.
    positive = [student.sum().to(dtype) * 0.0 if not len(student) else 0.0 for student in students]
    negative = [0.0] * len(students)
    offset = 0
    for sample, (first, count) in enumerate(spans):
        kept = [index for index, flag in enumerate(real[sample]) if flag]
        own = teacher[sample] if len(kept) == references else teacher[sample, kept]  # the latter is a copy
        features = unit_features(own.to(device), dtype)  # [kept, N, D]
        rows, start = _rows_of(kept, tokens, first, count)
        positive_count = len(kept) * tokens
        negative_count = len(kept) * (len(kept) - 1) * tokens * tokens  # ordered pairs
        scale = weights[sample] / batch
        for block, student in enumerate(students):
            held = student[offset : offset + count]
            parts = [held[begin:end] for begin, end in rows]
            held = torch.cat(parts) if len(parts) > 1 else parts[0]
            with torch.autocast(device.type, enabled=False):
                positive_sum, negative_sum = _AlignmentSums.apply(held, features, start, float(margin))
            positive[block] = positive[block] + scale * positive_sum / max(positive_count, 1)
            negative[block] = negative[block] + scale * negative_sum / max(negative_count, 1)
        offset += count
    return torch.stack(positive), torch.stack(negative)


def _rows_of(kept: list[int], tokens: int, first: int, count: int) -> tuple[list[tuple[int, int]], int]:
    """Which of the held tokens [first, first + count) belong to kept references.

    Returns:
        ranges of rows relative to `first` (at least one, perhaps empty), and the position of the first such token among
        the tokens of the kept references: leaving references out keeps the rest in one piece there.
    """
    rows, start = [], None
    for place, reference in enumerate(kept):
        begin, end = max(first, reference * tokens), min(first + count, (reference + 1) * tokens)
        if begin < end:
            start = place * tokens + begin - reference * tokens if start is None else start
            if rows and rows[-1][1] == begin - first:
                rows[-1] = (rows[-1][0], end - first)
            else:
                rows.append((begin - first, end - first))
    return rows or [(0, 0)], start or 0


def reference_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    margin: float = 1.0,
    negative_weight: float = 1.0,
    sample_weight: Tensor | None = None,
) -> RALoss:
    """Reference-alignment loss of one block: positive (eq. 8) + negative_weight * negative (eq. 9).

    Negatives are formed only within a sample; a sample with fewer than two references has negative 0, and a batch
    without references has total 0 and zero (not missing) gradients. `alignment_by_block` does this for the K blocks of
    eq. 10.

    Args:
        student: projected student features, [B, M, N, D].
        teacher, mask, margin, sample_weight: see `alignment_by_block`.
        negative_weight: lambda of eq. 10.

    Returns:
        `RALoss`, each term already weighted and averaged over the samples.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not boolean.
    """
    positive, negative = alignment_by_block(
        [student], teacher, mask=mask, margin=margin, sample_weight=sample_weight
    )
    return RALoss((positive + negative_weight * negative)[0], positive[0], negative[0])


def _check_shapes(
    students: Sequence[Tensor],
    teacher: Tensor,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    spans: Sequence[tuple[int, int]] | None,
) -> None:
    if not students:
        raise ValueError("reference alignment needs at least one block: set the depth K to 1 or more")
    expected = tuple(teacher.shape)
    if spans is not None:
        expected = (sum(count for _, count in spans), teacher.shape[-1])
        if len(spans) != len(teacher):
            raise ValueError(f"{len(spans)} spans for {len(teacher)} samples: give one for each")
    for student in students:
        if student.shape != expected or teacher.ndim != 4:
            raise ValueError(
                f"student {tuple(student.shape)} must be {expected} for the teacher {tuple(teacher.shape)} [B, M, N, D]: "
                "project it to the teacher's width, and resize the teacher to the token grid"
            )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != teacher.shape[:2]):
        raise ValueError(
            f"mask must be boolean of shape {tuple(teacher.shape[:2])} [B, M], got {mask.dtype} {tuple(mask.shape)}"
        )
    if sample_weight is not None and sample_weight.shape != teacher.shape[:1]:
        raise ValueError(
            f"sample_weight must have shape [{teacher.shape[0]}], got {tuple(sample_weight.shape)}"
        )


def flow_matching_target(latents: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
    """Velocity eps - z_0 that the model predicts (eq. 4), per sample, in float32 at least."""
    pairs = zip(latents, noise, strict=True)
    return [eps.to(_compute_dtype(sample)) - sample.to(_compute_dtype(sample)) for sample, eps in pairs]


def flow_matching_errors(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean squared error of each sample over its own elements, [B]; the samples may have different sizes."""
    errors = []
    for prediction, target in zip(predictions, targets, strict=True):
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
            )
        dtype = _compute_dtype(prediction)
        errors.append((prediction.to(dtype) - target.to(dtype)).square().mean())
    return torch.stack(errors)


def average_errors(errors: Tensor, sample_weight: Tensor) -> Tensor:
    """The rectified-flow loss (eq. 4) of a batch: errors [B], times the recipe's timestep weights [B], averaged."""
    if sample_weight.shape != errors.shape:
        raise ValueError(f"sample_weight must have shape [{len(errors)}], got {tuple(sample_weight.shape)}")
    return (errors * sample_weight.to(errors)).mean()
