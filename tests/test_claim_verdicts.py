"""Verdicts on statements: at each criterion's limit and just beyond it, with synthetic figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from claims.rows import Row, Side, differences_told, judged
from claims.runs import CASES, HYBRID, TITLES, attention_layers, recipe_of
from claims.table import summary_table, write_claims
from claims.verdicts import (
    LEAST_SAVING,
    NO_SAVING,
    Criterion,
    Differs,
    Exactly,
    Saves,
    Verdict,
    Within,
    about,
    gigabytes,
    megabytes,
    share_between,
)
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.recipe import recipe_hash


@pytest.mark.parametrize(
    ("criterion", "figure", "verdict"),
    [
        (share_between(0.3, 0.4), 0.3, "true"),
        (share_between(0.3, 0.4), 0.4, "true"),
        (share_between(0.3, 0.4), 0.2999, "partly"),
        (share_between(0.3, 0.4), 0.24, "partly"),
        (share_between(0.3, 0.4), 0.2399, "false"),
        (share_between(0.3, 0.4), 0.48, "partly"),
        (share_between(0.3, 0.4), 0.4801, "false"),
        (about(0.5), 0.45, "true"),
        (about(0.5), 0.55, "true"),
        (about(0.5), 0.4499, "partly"),
        (about(0.5), 0.3599, "false"),
        (about(0.5), 0.6601, "false"),
        (megabytes(100, 200), 100_000_000, "true"),
        (megabytes(100, 200), 99_999_999, "partly"),
        (megabytes(100, 200), 79_999_999, "false"),
        (gigabytes(2, 3), 3_000_000_000, "true"),
        (gigabytes(2, 3), 3_000_000_001, "partly"),
        (gigabytes(2, 3), 3_600_000_001, "false"),
        (Within(0.5, 0.5, "half"), 0.5, "true"),
        (Within(0.5, 0.5, "half"), 0.5000001, "partly"),
        (Exactly(466), 466, "true"),
        (Exactly(466), 465, "false"),
        (Exactly(0), 1, "false"),
        (Differs(), 1, "true"),
        (Differs(), -1, "true"),
        (Differs(), 0, "false"),
        (Saves(), LEAST_SAVING, "true"),
        (Saves(), LEAST_SAVING - 1e-9, "partly"),
        (Saves(), NO_SAVING, "partly"),
        (Saves(), NO_SAVING - 1e-9, "false"),
        (Saves(), 0.0, "false"),
        (Saves(), -0.1, "false"),
    ],
)
def test_verdict(criterion: Criterion, figure: float, verdict: Verdict) -> None:
    assert criterion.judge(figure) == verdict


def _row(saved: float, reasons: dict[Verdict, str]) -> Row:
    sides = (Side("before", 1000), Side("after", int(1000 * (1 - saved))))
    return judged("topic", "it saves memory", "a model", Saves(), "saves memory", saved, f"{saved:.0%}", sides, reasons)


def test_a_reason_stands_beside_the_verdict_that_it_explains() -> None:
    reasons: dict[Verdict, str] = {"true": "much of it.", "partly": "some of it."}
    assert _row(0.5, reasons).reason == "much of it."
    assert _row(0.01, reasons).reason == "some of it."
    with pytest.raises(LookupError, match=r"makes it 'false'.*before: 1,000 B and after: 1,000 B"):
        _row(0.0, reasons)


def test_the_table_has_both_figures(tmp_path: Path) -> None:
    rows = [_row(0.5, {"true": "much of it."}), _row(0.01, {"partly": "some of it."})]
    write_claims(tmp_path, rows, provenance_record("some-card", "virtual"))
    text = (tmp_path / "claims.md").read_text()
    assert "2 rows: 1 true, 1 partly, 0 false." in text
    cells = [cell.strip() for cell in text.split("|")]
    assert {"before: 1,000 B", "after: 500 B", "after: 990 B", "**true**", "**partly**", "much of it."} <= set(cells)
    content = json.loads((tmp_path / "claims.json").read_text())
    assert [row["after_value"] for row in content["rows"]] == [500, 990]
    assert (tmp_path / "claims.csv").read_text().count("\n") == 3


def test_the_summary_has_statement_figures_and_verdict_and_no_reason() -> None:
    text = summary_table([_row(0.5, {"true": "much of it."}), _row(0.01, {"partly": "some of it."})])
    cells = [cell.strip() for cell in text.split("|")]
    assert {"it saves memory", "a model", "saves memory", "50%", "1%", "true", "partly"} <= set(cells)
    assert "much of it." not in text
    assert text.endswith("2 rows: 1 true, 1 partly, 0 false.")


def test_a_reason_says_where_a_model_differs_from_the_first() -> None:
    small = _row(0.01, {"partly": "some of it."})
    large = _row(0.5, {"true": "much of it."})
    told = differences_told(
        [small, replace(large, model="b"), replace(small, model="c"), replace(large, statement="d")]
    )
    assert [row.reason for row in told] == [
        "some of it.",
        "much of it; on a model it is partly: 1%.",
        "some of it.",
        "much of it.",
    ]


def test_every_case_is_a_recipe_of_its_own() -> None:
    """The changes are fields that a recipe has, and no two runs on a card are the same."""
    recipes = {key: recipe_of(key[0], case) for key, case in CASES.items()}
    assert all(recipe.base.model == model for (model, _), recipe in recipes.items())
    assert len({(recipe_hash(recipe), CASES[key].card) for key, recipe in recipes.items()}) == len(CASES)


def test_attention_layers() -> None:
    assert attention_layers(HYBRID) == (4, 40)
    assert [attention_layers(model) for model in list(TITLES)[1:]] == [(40, 40), (28, 28)]


def test_a_zero_checkpoint_has_every_weight_and_no_block(tmp_path: Path) -> None:
    """A true header, shapes included, over a body that the file system never had to store."""
    from safetensors import safe_open

    from claims.loading import write_zero_checkpoint

    size = write_zero_checkpoint(tmp_path, "smollm2-135m-instruct")
    file = tmp_path / "model.safetensors"
    assert size == 2 * 134_515_008
    assert file.stat().st_size > size
    assert file.stat().st_blocks * 512 < 2**20
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert weights.get_slice("model.layers.29.mlp.down_proj.weight").get_shape() == [576, 1536]
