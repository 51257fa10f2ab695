"""What a model is for planning: its shapes, from wherever they are, and no download of weights."""

import json
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from qlora_lowmem.errors import UsageError
from qlora_lowmem.lean.families import takes_tiles
from qlora_lowmem.models import sources
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.plan.asked import planned_model
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_fields
from qlora_lowmem.run.preflight import inputs_of, preflight

START = Recipe(name="start")


@pytest.mark.parametrize(
    ("model", "context", "tiles"),
    [("granite-4.0-h-1b", 131_072, True), ("meta-llama/Llama-3.2-3B", 131_072, True),
     ("smollm2-135m-instruct", 8192, True)],
)  # fmt: skip
def test_a_known_architecture(model: str, context: int, tiles: bool) -> None:
    asked = replace_fields(START, {"model": model, "data": "mine.jsonl"})
    found = planned_model(asked)
    assert (found.context_length, found.tiles) == (context, tiles)
    assert (found.recipe.base.weights, found.recipe.data.data) == ("random", "synthetic")
    assert found.asked == asked
    assert found.as_asked(found.recipe, "t4-16gb").base == asked.base


def test_a_local_folder_without_weights(tiny_hybrid: Path) -> None:
    found = planned_model(replace_fields(START, {"model": str(tiny_hybrid)}))
    assert found.recipe.base.weights == "random"
    assert found.tiles


def test_of_a_model_on_the_hub_only_the_configuration_is_fetched(
    tiny_hybrid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def download(hub_id: str, name: str, revision: str | None) -> str:
        fetched.append((hub_id, name, revision))
        return str(tiny_hybrid / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    asked = replace_fields(START, {"model": "someone/some-model", "revision": "v2"})
    found = planned_model(asked)
    assert fetched == [("someone/some-model", "config.json", "v2")]
    assert found.recipe.base.model == str(tiny_hybrid)
    assert found.recipe.base.weights == "random"
    back = found.as_asked(found.recipe, "t4-16gb")
    assert (back.base.model, back.base.revision, back.base.weights) == ("someone/some-model", "v2", "pretrained")


def test_random_weights_of_a_model_on_the_hub_are_asked_for_by_its_revision(
    tiny_hybrid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains such a recipe resolves it like a plan does; pretrained weights fetch nothing here."""
    fetched: list[str | None] = []

    def download(_hub_id: str, name: str, revision: str | None) -> str:
        fetched.append(revision)
        return str(tiny_hybrid / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    asked = replace_fields(START, {"model": "someone/some-model", "revision": "v2", "target_modules": "all-linear"})
    source = resolve_model(asked.base.model, "random", "v2")
    assert (source.name, source.hub_id, source.folder) == ("some-model", "someone/some-model", tiny_hybrid)
    assert source.architecture == json.loads((tiny_hybrid / "config.json").read_text())
    assert resolve_model(asked.base.model, "pretrained", "v2").architecture is None
    checked = preflight(inputs_of(replace_fields(asked, {"weights": "random"})))
    assert min(len(checked.adapted.modules), checked.adapted.parameters) > 0
    assert takes_tiles(resolve_model(asked.base.model, "random", "v2").text_config)
    assert fetched == ["v2"] * 3


@pytest.mark.parametrize("fault", [OSError("no route"), ValueError("offline")])
def test_a_hub_that_cannot_be_reached(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_arguments: object, **_options: object) -> str:
        raise fault

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(sources, "hub_out_of_reach", lambda: None)
    with pytest.raises(UsageError, match=rf"someone/some-model.*\({fault}\).*a local folder that holds config.json"):
        planned_model(replace_fields(START, {"model": "someone/some-model"}))
    assert issubclass(HfHubHTTPError, OSError), "so one is caught with the other"


def test_a_hub_out_of_reach_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sources.hub_out_of_reach.cache_clear()
    started = time.monotonic()
    try:
        for model in ("someone/some-model", "someone/another"):
            asked = replace_fields(START, {"model": model})
            with pytest.raises(
                UsageError, match=r"127\.0\.0\.1:9 cannot be reached: .*a local folder that holds config"
            ):
                planned_model(asked)
            with pytest.raises(UsageError, match=r"could not be loaded \(http://127\.0\.0\.1:9 cannot be reached: "):
                preflight(inputs_of(asked))
    finally:
        sources.hub_out_of_reach.cache_clear()
    assert "Retry" not in "".join(capfd.readouterr())
    assert time.monotonic() - started < 10, "five retries of one file take 23 s"


def test_a_text_models_length_inside_a_larger_one(tiny_hybrid: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_hybrid / "config.json").read_text())
    outer = {"model_type": "some_vision_model", "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    found = planned_model(replace_fields(START, {"model": str(tmp_path)}))
    assert found.context_length == config["max_position_embeddings"]
    assert not found.tiles, "a wrapper takes lean's general ideas"


def test_no_such_model() -> None:
    with pytest.raises(UsageError, match=r"granite-4\.0-h-2b.*Did you mean"):
        planned_model(replace_fields(START, {"model": "granite-4.0-h-2b"}))
