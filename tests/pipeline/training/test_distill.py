"""The losses of distillation against SciPy, their own formulas and autograd."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import rel_entr, softmax
from torch.autograd import gradcheck

from pipeline.models.source import ModelConfig
from pipeline.training.distill import DistillConfig, hidden_loss, output_loss, soft_target_loss


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_soft_targets_are_t_squared_times_the_divergence(temperature):
    student, teacher = draw(5, 4), draw(5, 4, seed=1)
    p, q = (softmax(t.numpy() / temperature, axis=1) for t in (teacher, student))
    expected = temperature**2 * rel_entr(p, q).sum(axis=1).mean()
    loss = soft_target_loss(student, teacher, temperature=temperature)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert soft_target_loss(teacher, teacher, temperature=temperature).item() == 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_soft_targets_is_t_times_the_difference_of_probabilities(temperature):
    student = draw(5, 4).requires_grad_()
    teacher = draw(5, 4, seed=1).requires_grad_()
    soft_target_loss(student, teacher, temperature=temperature).backward()
    q, p = (softmax(t.detach().numpy() / temperature, axis=1) for t in (student, teacher))
    np.testing.assert_allclose(student.grad.numpy(), temperature * (q - p) / 5, atol=1e-14)
    assert teacher.grad is None
    assert gradcheck(
        lambda s: soft_target_loss(s, teacher.detach(), temperature=temperature), student
    )


def test_the_gradient_does_not_shrink_with_temperature():
    teacher = draw(5, 4, seed=1)

    def norm(temperature):
        student = draw(5, 4).requires_grad_()
        soft_target_loss(student, teacher, temperature=temperature).backward()
        return student.grad.norm().item()

    assert norm(40.0) == pytest.approx(norm(80.0), rel=0.02)  # without T^2 a quarter
    # In the limit it is the difference of centred logits over the number of choices.
    difference = draw(5, 4) - teacher
    limit = (difference - difference.mean(dim=1, keepdim=True)).norm().item() / 4 / 5
    assert norm(1000.0) == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_low_precision_are_taken_in_float32(dtype):
    student, teacher = draw(5, 4, dtype=dtype), draw(5, 4, seed=1, dtype=dtype)
    mask = torch.ones(2, 3)
    layers = [draw(2, 3, 8, seed=seed, dtype=dtype) for seed in range(2)]
    for loss, exact in (
        (
            soft_target_loss(student, teacher, temperature=2.0),
            soft_target_loss(student.double(), teacher.double(), temperature=2.0),
        ),
        (output_loss(student, teacher), output_loss(student.double(), teacher.double())),
        (
            hidden_loss(layers[:1], layers[1:], mask),
            hidden_loss([layers[0].double()], [layers[1].double()], mask),
        ),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_nothing_predicted_teaches_nothing():
    student = draw(0, 4).requires_grad_()
    loss = soft_target_loss(student, draw(0, 4), temperature=2.0)
    loss.backward()
    assert loss.item() == 0


def test_hidden_states_are_held_together_by_direction():
    """2 - 2 cos of each token that counts, by plain loops."""
    student, teacher = ([draw(2, 3, 8, seed=s) for s in seeds] for seeds in ((0, 1), (2, 3)))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = []
    for ours, theirs in zip(student, teacher, strict=True):
        for row, token in ((0, 0), (0, 1), (1, 0)):
            a, b = ours[row, token].numpy(), theirs[row, token].numpy()
            found.append(2 - 2 * a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for layer in student:
        layer[1, 2] = torch.nan  # padding may hold anything
        layer.requires_grad_()
    loss = hidden_loss(student, teacher, mask)
    assert loss.item() == pytest.approx(np.mean(found), rel=1e-12)
    loss.backward()
    assert all(torch.isfinite(layer.grad).all() for layer in student)
    assert hidden_loss(teacher, [5 * layer for layer in teacher], mask).item() < 1e-28
    assert hidden_loss(student, teacher, 0 * mask).item() == 0


def test_shapes_that_differ_are_refused_with_both():
    with pytest.raises(ValueError, match=r"student's outputs are \(5, 4\), the teacher's \(5, 3\)"):
        soft_target_loss(draw(5, 4), draw(5, 3), temperature=1.0)
    with pytest.raises(ValueError, match=r"\(5, 1\)"):
        output_loss(draw(5, 4), draw(5, 1))
    layer, narrow, mask = draw(2, 3, 8), draw(2, 3, 6), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3, 8\)\], the teacher's \[\(2, 3, 6\)\]"):
        hidden_loss([layer], [narrow], mask)
    with pytest.raises(ValueError, match="same depth and width"):
        hidden_loss([layer], [layer, layer], mask)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"weight": 1.5}, "weight"),
        ({"temperature": 0}, "temperature"),
        ({"weight": 0}, "would teach nothing"),
        ({"revision": "main"}, "a teacher on the hub"),
        ({"alpha": 0.5}, "alpha"),
    ],
)
def test_settings_that_make_no_sense(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        DistillConfig(**settings)


def test_the_teacher_is_the_dense_fine_tune_or_a_model():
    student = ModelConfig(path="student", revision="1", attention="eager", random_init=True)
    assert DistillConfig().model(student) is None
    teacher = DistillConfig(teacher="org/teacher", revision="2").model(student)
    assert teacher == ModelConfig(path="org/teacher", revision="2", attention="eager")
