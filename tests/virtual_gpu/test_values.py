"""Values do not exist on a virtual GPU: every row of the table of what is answered instead, evaluated."""

import tomllib
from pathlib import Path

import pytest

import qlora_lowmem.virtual_gpu

TABLE = tomllib.loads(Path(qlora_lowmem.virtual_gpu.__file__).with_name("values.toml").read_text())
VALUES = [row for group in TABLE["values"] for row in group["gives"]]


@pytest.fixture(scope="module")
def answers(server, laptop):
    asked = {"given": TABLE["given"], "expressions": [row[0] for row in VALUES]}
    result = server.submit("virtual_gpu.jobs:evaluate", asked, laptop, timeout=60).result()
    assert result.error is None, result.output_tail
    return result


@pytest.mark.parametrize(("expression", "answer"), [row[:2] for row in VALUES], ids=[row[0] for row in VALUES])
def test_the_documented_answer_is_given(answers, expression, answer):
    assert answers.value[expression] == answer


def test_a_program_that_reads_values_is_told_once(answers):
    assert answers.report.values_read
    assert answers.output_tail.count("they are not real (zeros)") == 1


def test_all_may_be_asked_by_keyword(job):
    expression = "bool(torch.all(input=mask))"
    assert job("evaluate", given=TABLE["given"], expressions=[expression]).value == {expression: "False"}


def test_every_row_has_its_reason():
    assert all(group["why"] for group in TABLE["values"])
    assert all(reason for *_, reason in TABLE["facts"])


def test_what_the_host_wrote_and_only_sent_around_can_be_read(job):
    """DistributedDataParallel and Accelerate plan with it; anything that a kernel may have changed is zero."""
    assert job("host_values_sent_around").value == {
        "sent": [5, 6],
        "part": [6],
        "never sent": [5, 6],
        "multiplied since": [[0, 0], [0, 0]],
        "computed since": [0, 0],
        "reduced since": [0, 0],
    }


def test_what_needs_a_value_is_refused_by_name(job):
    (said,) = job("evaluate", given="", expressions=["torch.mode(torch.ones(3000, device='cuda'))"]).value.values()
    assert said.startswith("NotImplementedError: torch.mode of more than 2,048 values a row")


def test_operators_that_check_their_values_keep_their_gradients(job):
    made = "a = torch.ones(2, 8, device='cuda', requires_grad=True); torch.cov(a, fweights=a.new_ones(8).int()).sum()"
    given = f"{made}.backward()"
    assert job("evaluate", given=given, expressions=["a.grad.shape"]).value == {"a.grad.shape": "torch.Size([2, 8])"}
