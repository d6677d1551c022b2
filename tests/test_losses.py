"""Losses against loops over the paper's formulas, their gradients, masks, batches and memory."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refalign_ext import losses
from refalign_ext.losses import (
    alignment_by_block,
    average_errors,
    flow_matching_errors,
    flow_matching_target,
    real_references,
    reference_alignment_loss,
    unit_features,
)


def make(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return student.requires_grad_(True), teacher


def cosine(first, second):
    return (first * second).sum() / (first.norm() * second.norm())


def loop(student, teacher, mask=None, margin=1.0, negative_weight=1.0):
    """Eq. 8 to 10, one token pair at a time; samples averaged, one without references is 0."""
    batch, references, tokens, _ = student.shape
    positives, negatives = [], []
    for sample in range(batch):
        real = [index for index in range(references) if mask is None or mask[sample, index]]
        h, f = student[sample], teacher[sample]
        positive = [1 - cosine(h[m, n], f[m, n]) for m in real for n in range(tokens)]
        negative = [
            torch.relu(margin - (1 - cosine(h[m, n], f[other, k])))
            for m in real
            for other in real
            if other != m
            for n in range(tokens)
            for k in range(tokens)
        ]
        zero = torch.zeros((), dtype=student.dtype)
        positives.append(torch.stack(positive).mean() if positive else zero)
        negatives.append(torch.stack(negative).mean() if negative else zero)
    positive, negative = torch.stack(positives).mean(), torch.stack(negatives).mean()
    return positive + negative_weight * negative, positive, negative


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)[0]


@pytest.mark.parametrize("margin", [1.0, 0.7, 1.3, 2.5])
@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (2, 3, 4, 5), (1, 4, 5, 3), (3, 1, 4, 2), (1, 3, 1, 6)])
def test_equals_the_formula(shape, margin):
    student, teacher = make(shape)
    result = reference_alignment_loss(student, teacher, margin=margin, negative_weight=0.6)
    expected = loop(student, teacher, margin=margin, negative_weight=0.6)
    for value, reference in zip(result, expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-12, rtol=1e-12)
    for value, reference in zip(result, expected, strict=True):
        wanted = gradient(reference, student) if reference.requires_grad else torch.zeros_like(student)
        torch.testing.assert_close(gradient(value, student), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_blocks_of_any_size_give_the_same(monkeypatch, budget):
    student, teacher = make((2, 3, 7, 5))
    whole = reference_alignment_loss(student, teacher, margin=0.8)
    monkeypatch.setattr(losses, "_BLOCK_ELEMENTS_CPU", budget)
    cut = reference_alignment_loss(student, teacher, margin=0.8)
    torch.testing.assert_close(cut, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        gradient(cut.total, student), gradient(whole.total, student), atol=1e-12, rtol=1e-12
    )


def test_gradcheck():
    """Away from the hinge's kinks, each of the three outputs and a weighted mixture of blocks."""
    student, teacher = make((2, 3, 4, 5))
    unit = unit_features(teacher, torch.float64)
    unit_student = unit_features(student, torch.float64)
    for margin in (1.0, 1.2):
        similarity = torch.einsum("bmnd,bkld->bmnkl", unit_student, unit)
        assert (similarity - (1 - margin)).abs().min() > 1e-4, "choose a seed away from the kinks"
        mask = torch.tensor([[True, False, True], [True, True, True]])
        weights = torch.tensor([0.3, 0.9], dtype=torch.float64)

        def compute(value, margin=margin, mask=mask, weights=weights):
            return alignment_by_block(
                [value, value * 2 + 1e-3], teacher, mask=mask, margin=margin, sample_weight=weights
            )

        assert torch.autograd.gradcheck(compute, (student,), eps=1e-6, atol=1e-7)


def test_mask_removes_references_whatever_they_hold():
    student, teacher = make((2, 4, 3, 5))
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    with torch.no_grad():
        student[~mask] = float("nan")
        teacher[~mask] = float("nan")
    result = reference_alignment_loss(student, teacher, mask=mask)
    expected = loop(student, teacher, mask)
    torch.testing.assert_close(tuple(result), expected, atol=1e-12, rtol=1e-12)
    found = gradient(result.total, student)
    assert (found[~mask] == 0).all()
    assert (found[mask] != 0).any(-1).all()


def test_dropped_references_have_zero_teacher_features():
    """All-zero teacher features are no reference, as in the release: alone they give zero loss and gradient."""
    student, teacher = make((2, 3, 4, 5))
    teacher[0] = 0
    teacher[1, 2] = 0
    assert real_references(teacher).tolist() == [[False] * 3, [True, True, False]]
    result = reference_alignment_loss(student, teacher)
    mask = torch.tensor([[False] * 3, [True, True, False]])
    torch.testing.assert_close(tuple(result), loop(student, teacher, mask), atol=1e-12, rtol=1e-12)
    alone = reference_alignment_loss(student[:1], teacher[:1])
    assert alone.total == 0
    assert (gradient(alone.total, student) == 0).all()


@pytest.mark.parametrize("references", [0, 2])
def test_no_references_give_zero_and_zero_gradients(references):
    student, teacher = make((2, references, 3, 4))
    result = reference_alignment_loss(student, teacher, mask=torch.zeros(2, references, dtype=torch.bool))
    assert tuple(value.item() for value in result) == (0.0, 0.0, 0.0)
    result.total.backward()
    assert student.grad is not None
    assert student.grad.shape == student.shape
    assert (student.grad == 0).all()


def test_other_samples_are_no_negatives():
    """Twice the same single reference: across samples they would collide, within a sample they do."""
    student, teacher = make((1, 1, 3, 4))
    across = torch.cat([student, student]), torch.cat([teacher, teacher])
    within = torch.cat([teacher, teacher], 1)
    assert reference_alignment_loss(*across).negative == 0
    assert reference_alignment_loss(within, within).negative > 0.1


def test_a_batch_is_the_mean_of_its_samples():
    """Different numbers of references, gated: batch 2 equals two accumulated batches of 1, gradients too."""
    student, teacher = make((2, 3, 4, 5))
    mask = torch.tensor([[True, False, False], [True, True, True]])
    weights = torch.tensor([0.2, 0.7], dtype=torch.float64)
    together = reference_alignment_loss(student, teacher, mask=mask, sample_weight=weights)
    parts = [
        reference_alignment_loss(
            student[index : index + 1],
            teacher[index : index + 1],
            mask=mask[index : index + 1],
            sample_weight=weights[index : index + 1],
        )
        for index in range(2)
    ]
    for field in ("total", "positive", "negative"):
        accumulated = (getattr(parts[0], field) + getattr(parts[1], field)) / 2
        torch.testing.assert_close(getattr(together, field), accumulated, atol=1e-12, rtol=1e-12)
    accumulated = gradient(parts[0].total / 2, student) + gradient(parts[1].total / 2, student)
    torch.testing.assert_close(gradient(together.total, student), accumulated, atol=1e-12, rtol=1e-12)


def cut_points(total, cuts):
    """The flat tokens [0, total) of a sample, cut at shares of its length; shares may be empty."""
    edges = [0, *sorted(round(total * cut) for cut in cuts), total]
    return [(first, last - first) for first, last in itertools.pairwise(edges)]


def share_of(students, spans):
    """What a rank holds of students [B, M, N, D]: the tokens of its spans, sample after sample, [S, D]."""
    return [
        torch.cat(
            [
                sample.flatten(0, 1)[first : first + count]
                for sample, (first, count) in zip(student, spans, strict=True)
            ]
        )
        for student in students
    ]


CASES = {
    "all real": (None, ()),
    "padding": ([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], ()),
    "holes": ([[1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]], ()),
    "teachers of zeros": (None, ((0, 1), (2, 0), (2, 3))),
    "both": ([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], ((0, 0), (1, 3), (2, 0), (2, 1), (2, 2))),
}


@pytest.mark.parametrize("cuts", [(), (0.5,), (0.0, 0.3, 0.31, 1.0), (0.2, 0.4, 0.6, 0.8), (0.05, 0.95)])
@pytest.mark.parametrize("case", CASES)
def test_shares_of_any_cut_add_up_to_the_whole(case, cuts):
    """What ranks that share a sample compute, values and gradients; every sample is cut elsewhere."""
    shape = (3, 4, 5, 6)
    (first, teacher), (second, _) = make(shape, seed=3), make(shape, seed=4)
    rows, zeros = CASES[case]
    mask = None if rows is None else torch.tensor(rows, dtype=torch.bool)
    for place in zeros:
        teacher[place] = 0
    settings = {"mask": mask, "margin": 0.8, "sample_weight": torch.tensor([0.3, 1.0, 0.7]).double()}
    whole = alignment_by_block([first, second], teacher, **settings)
    assert [terms.shape for terms in whole] == [(2,), (2,)]

    tokens = shape[1] * shape[2]
    of_sample = [cut_points(tokens, [min(1.0, cut * stretch) for cut in cuts]) for stretch in (1.0, 0.9, 1.2)]
    ranks = list(zip(*of_sample, strict=True))
    assert len(ranks) == len(cuts) + 1
    parts = [
        alignment_by_block(share_of([first, second], spans), teacher, spans=spans, **settings)
        for spans in ranks
    ]
    for name, terms, shares in zip(("positive", "negative"), whole, zip(*parts, strict=True), strict=True):
        found = torch.stack(shares).sum(0)
        torch.testing.assert_close(found, terms, atol=1e-12, rtol=1e-12, msg=name)
        for student in (first, second):
            torch.testing.assert_close(
                gradient(found.sum(), student), gradient(terms.sum(), student), atol=1e-12, rtol=1e-12
            )
    reference = [loop_terms(student, teacher, mask, settings) for student in (first, second)]
    torch.testing.assert_close(whole[0], torch.stack([positive for positive, _ in reference]))
    torch.testing.assert_close(whole[1], torch.stack([negative for _, negative in reference]))


def loop_terms(student, teacher, mask, settings):
    """Positive and negative of one block by `loop`, a sample at a time, weighted."""
    real = real_references(teacher, mask)
    positive = negative = 0.0
    for index, weight in enumerate(settings["sample_weight"]):
        one = slice(index, index + 1)
        _, plus, minus = loop(student[one], teacher[one], real[one], margin=settings["margin"])
        positive, negative = positive + weight * plus / len(real), negative + weight * minus / len(real)
    return positive, negative


def test_a_share_without_tokens_is_zero_and_reaches_its_projector():
    teacher = make((2, 2, 3, 4))[1]
    projector = torch.nn.Linear(4, 4).double()
    spans = [(0, 0), (0, 0)]
    held = projector(torch.zeros(0, 4, dtype=torch.float64))
    positive, negative = alignment_by_block([held, held * 2], teacher, spans=spans)
    assert positive.tolist() == negative.tolist() == [0.0, 0.0]
    (positive + negative).sum().backward()
    assert not projector.weight.grad.any() and not projector.bias.grad.any()


def test_features_that_are_not_finite_are_not_taken_for_missing_ones():
    student, teacher = make((1, 2, 3, 4))
    for value in (float("nan"), float("inf")):
        teacher[0, 1, 2, 0] = value
        assert real_references(teacher).all()
        assert not torch.isfinite(reference_alignment_loss(student, teacher).total)


def test_zero_student_tokens_have_no_gradient():
    """Their cosine is undefined; a gradient of 1 / eps would wreck the projectors."""
    student, teacher = make((1, 2, 3, 4))
    with torch.no_grad():
        student[0, 1, 2] = 0
    result = reference_alignment_loss(student, teacher)
    found = gradient(result.total, student)
    assert torch.isfinite(result.total)
    assert torch.isfinite(found).all()
    assert (found[0, 1, 2] == 0).all()
    assert (found[0, 0] != 0).any()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_of_the_features_does_not_matter(scale):
    student, teacher = make((1, 2, 3, 4), dtype=torch.float32)
    result = reference_alignment_loss(student * scale, teacher * scale)
    torch.testing.assert_close(result, reference_alignment_loss(student, teacher), atol=1e-5, rtol=1e-5)


def test_bfloat16_features_are_reduced_in_float32():
    student, teacher = make((1, 3, 16, 32), dtype=torch.bfloat16)
    result = reference_alignment_loss(student, teacher)
    exact_student = student.detach().double().requires_grad_(True)
    exact = reference_alignment_loss(exact_student, teacher.double())
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total.double(), exact.total, atol=1e-5, rtol=1e-5)
    found = gradient(result.total, student)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), gradient(exact.total, exact_student), atol=1e-5, rtol=1e-2)


def test_autocast_does_not_reach_the_loss():
    student, teacher = make((1, 3, 16, 32), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reference_alignment_loss(student, teacher)
        inside_gradient = gradient(inside.total, student)
    outside = reference_alignment_loss(student, teacher)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    torch.testing.assert_close(inside_gradient, gradient(outside.total, student), rtol=0, atol=0)


def test_teacher_gets_no_gradient():
    student, teacher = make((1, 2, 3, 4))
    teacher.requires_grad_(True)
    reference_alignment_loss(student, teacher).total.backward()
    assert teacher.grad is None


def test_without_gradient_the_values_are_the_same():
    student, teacher = make((2, 3, 4, 5))
    with torch.no_grad():
        evaluated = reference_alignment_loss(student, teacher, margin=1.2)
    assert not evaluated.total.requires_grad
    torch.testing.assert_close(
        evaluated,
        losses.RALoss(*(value.detach() for value in reference_alignment_loss(student, teacher, margin=1.2))),
    )


def test_inputs_are_left_as_they_are():
    student, teacher = make((1, 3, 4, 5))
    copies = student.detach().clone(), teacher.clone()
    total = reference_alignment_loss(student, teacher).total
    first = gradient(total, student)
    torch.testing.assert_close(gradient(total, student), first, rtol=0, atol=0)
    torch.testing.assert_close((student.detach(), teacher), copies, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_the_similarity_matrix_is_never_made(monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK_ELEMENTS_CPU", 1024)
    student, teacher = make((1, 4, 100, 8), dtype=torch.float32)
    with LargestTensor() as largest:
        reference_alignment_loss(student, teacher).total.backward()
    assert largest.elements == student.numel()  # 3,200; the matrix has 160,000 elements


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": torch.ones(1, 2, 3, 5)}, "width"),
        ({"student": torch.ones(2, 3, 4)}, "width"),
        ({"mask": torch.ones(1, 2)}, "boolean"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, "boolean"),
        ({"sample_weight": torch.ones(2)}, "sample_weight"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"student": torch.ones(1, 2, 3, 4), "teacher": torch.ones(1, 2, 3, 4), **changes}
    with pytest.raises(ValueError, match=message) as error:
        reference_alignment_loss(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("students", "spans", "message"),
    [
        ([], None, "at least one block"),
        ([torch.ones(3, 4)], [(0, 2)], "must be"),  # three tokens held, two said
        ([torch.ones(2, 4)], [(0, 1), (0, 1)], "2 spans for 1 samples"),
        ([torch.ones(2, 5)], [(0, 2)], "width"),
        ([torch.ones(1, 2, 3, 4)], [(0, 6)], "must be"),  # not flat
    ],
)
def test_bad_parts(students, spans, message):
    with pytest.raises(ValueError, match=message):
        alignment_by_block(students, torch.ones(1, 2, 3, 4), spans=spans)


def flow_matching_loss(predictions, targets, sample_weight):
    return average_errors(flow_matching_errors(predictions, targets), sample_weight)


def test_flow_matching_target_is_the_velocity():
    latents, noise = [torch.full((1, 2), 3.0)], [torch.full((1, 2), 5.0)]
    torch.testing.assert_close(flow_matching_target(latents, noise), [torch.full((1, 2), 2.0)])
    assert flow_matching_target([latents[0].bfloat16()], [noise[0].bfloat16()])[0].dtype == torch.float32


def test_flow_matching_averages_each_sample_alone():
    predictions = [torch.zeros(2, 3), torch.zeros(5, 7, 2)]
    targets = [torch.full((2, 3), 2.0), torch.full((5, 7, 2), 3.0)]
    torch.testing.assert_close(flow_matching_errors(predictions, targets), torch.tensor([4.0, 9.0]))
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(
        flow_matching_loss(predictions, targets, sample_weight=weights), torch.tensor(10.0)
    )


def test_flow_matching_bad_input():
    with pytest.raises(ValueError, match="differ in shape"):
        flow_matching_loss([torch.zeros(2, 3)], [torch.zeros(3, 2)], torch.ones(1))
    with pytest.raises(ValueError, match="sample_weight"):
        flow_matching_loss([torch.zeros(2)], [torch.zeros(2)], sample_weight=torch.ones(3))
