"""Losses over a vocabulary, alone and with the LM head before them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from published.cases import Setting, Step, case, leaf

BF16 = torch.bfloat16
IGNORED = -100


def _head(hidden_size: int, vocabulary: int) -> nn.Linear:
    return nn.Linear(hidden_size, vocabulary, bias=False, device="cuda", dtype=BF16)


@case("cross_entropy/huggingface")
def cross_entropy(row: Setting) -> Step:
    tokens = row.config["B"] * row.config["T"]
    logits = leaf(tokens, row.x)
    target = torch.randint(row.x, (tokens, 1), device="cuda").squeeze(1)

    def step() -> None:
        F.cross_entropy(logits, target).backward()

    return step


@case("kl_div/torch")
def kl_div(row: Setting) -> Step:
    """The leaf has no name, but the graph keeps it and its gradient alive."""
    tokens = row.config["B"] * row.config["T"]
    predicted = leaf(tokens, row.x).log_softmax(dim=-1)
    target = torch.randn(tokens, row.x, device="cuda").softmax(dim=-1)

    def step() -> None:
        loss = F.kl_div(predicted, target, reduction="batchmean")
        loss.backward(retain_graph=True)

    return step


@case("fused_linear_cross_entropy/huggingface")
def fused_linear_cross_entropy(row: Setting) -> Step:
    """The logits stay bf16 all the way into the loss."""
    hidden_size, vocabulary = row.config["H"], row.config["V"]
    head, other = _head(hidden_size, vocabulary), _head(hidden_size, vocabulary)
    hidden = leaf(row.x, hidden_size, dtype=BF16)
    target = torch.randint(vocabulary, (row.x, 1), device="cuda").squeeze(1)

    def forward() -> torch.Tensor:
        logits = head(hidden)
        return F.cross_entropy(logits, target)

    def step(_alive: Any = other) -> None:
        forward().backward()

    return step


def _log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean log-probability of the labels of each sequence."""
    mask = labels != IGNORED
    labels = torch.where(labels == IGNORED, 0, labels)
    each = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (each * mask).sum(-1) / mask.sum(-1)


def _preferred_and_not(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    half = hidden.shape[0] // 2
    output = hidden @ weight.t()
    logits = output.float()  # `output` (bf16) and `logits` both live until the end
    likelihood = F.cross_entropy(logits[:half].view(-1, logits.shape[-1]), target[:half].view(-1))
    scores = _log_probabilities(logits, target)
    return scores[:half], scores[half:], logits[:half], logits[half:], likelihood


@case("fused_linear_cpo_loss/huggingface")
def fused_linear_cpo_loss(row: Setting) -> Step:
    hidden_size, vocabulary, length = row.config["H"], row.config["V"], row.config["T"]
    head, other = _head(hidden_size, vocabulary), _head(hidden_size, vocabulary)
    hidden = leaf(row.x, length, hidden_size, dtype=BF16)
    target = torch.randint(vocabulary, (row.x, length), device="cuda")

    def forward(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        good, bad, _good_logits, _bad_logits, likelihood = _preferred_and_not(hidden, weight, target)
        margin = good - bad
        losses = F.logsigmoid(0.1 * margin) * 1.0 + F.logsigmoid(-0.1 * margin) * 0.0
        return likelihood - losses.mean()

    def step(_alive: Any = other) -> None:
        loss = forward(hidden, head.weight, target)
        loss.backward()

    return step


@case("fused_linear_grpo_loss_token/torch")
def fused_linear_grpo_loss_token(row: Setting) -> Step:
    hidden_size, vocabulary, length = row.config["H"], row.config["V"], row.config["T"]
    head, reference = _head(hidden_size, vocabulary), _head(hidden_size, vocabulary)
    others = [_head(hidden_size, vocabulary), _head(hidden_size, vocabulary)]
    hidden = leaf(row.x, length, hidden_size, dtype=BF16)
    ids = torch.randint(0, vocabulary, (row.x, length), device="cuda")
    mask = torch.ones(row.x, length, device="cuda")
    advantages = torch.randn(row.x, dtype=BF16, device="cuda")
    reference_hidden = torch.randn(row.x, length, hidden_size, dtype=BF16, device="cuda")

    def forward() -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = hidden @ head.weight.t()
        log_probabilities = F.log_softmax(logits.float(), dim=-1)
        of_ids = log_probabilities.gather(dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            reference_logits = reference_hidden @ reference.weight.t()
            reference_log_probabilities = F.log_softmax(reference_logits.float(), dim=-1)
            of_reference = reference_log_probabilities.gather(dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
        ratio = torch.exp(of_ids - of_ids.detach())
        clipped = torch.clamp(ratio, 0.8, 1.2)
        unclipped_gain, clipped_gain = ratio * advantages.unsqueeze(1), clipped * advantages.unsqueeze(1)
        by_token = -torch.min(unclipped_gain, clipped_gain)
        divergence = torch.exp(of_reference - of_ids) - (of_reference - of_ids) - 1.0
        by_token = by_token + 0.1 * divergence
        loss = (by_token * mask).sum() / torch.clamp(mask.sum(), min=1.0)
        return loss, [(divergence * mask).sum() / torch.clamp(mask.sum(), min=1.0)]

    def step(_alive: Any = others) -> None:
        loss = forward()[0]
        loss.backward()

    return step


@case("distill_cosine_loss/torch")
def distill_cosine_loss(row: Setting) -> Step:
    """A student of half the teacher's width; both implementations' heads and inputs are alive."""
    hidden_size, vocabulary = row.config["H"], row.config["V"]
    student, teacher = _head(hidden_size // 2, vocabulary), _head(hidden_size, vocabulary)
    others = [_head(hidden_size // 2, vocabulary), _head(hidden_size, vocabulary)]
    base = torch.rand(row.x, hidden_size // 2, device="cuda", dtype=BF16)
    other_input = base.detach().clone().requires_grad_(True)
    student_input = base.detach().clone().requires_grad_(True)
    teacher_input = torch.rand(row.x, hidden_size, device="cuda", dtype=BF16)
    target = torch.randint(0, vocabulary, (row.x,), device="cuda")

    def logits_and_hard_loss() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        student_output = student_input @ student.weight.t()
        with torch.no_grad():
            teacher_output = teacher_input @ teacher.weight.t()
        student_logits = student_output.view(row.x, -1).float()
        teacher_logits = teacher_output.view(row.x, -1).float()
        torch.all(target == IGNORED)
        return student_logits, teacher_logits, F.cross_entropy(student_logits, target)

    def forward() -> torch.Tensor:
        student_logits, teacher_logits, hard = logits_and_hard_loss()  # the bf16 logits are gone once it returns
        student_logits /= 1.0
        teacher_logits /= 1.0
        return 0.5 * hard + 0.5 * _cosine_loss(student_logits, teacher_logits)

    def step(_alive: Any = (others, base, other_input)) -> None:
        loss = forward()
        loss.backward()

    return step


def _cosine_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    a, b = F.normalize(student, p=2, dim=-1), F.normalize(teacher, p=2, dim=-1)
    return (1.0 * (1 - F.cosine_similarity(a, b, dim=-1))).mean()
