"""Settings of a run: recipes, flags, and what may change when a run is resumed."""

from __future__ import annotations

import dataclasses

import pytest

from ossia.errors import ConfigError
from ossia.train.config import TrainConfig, as_dict, changed_settings, read_settings

NEEDED = {"model": "gpt-oss-20b", "out": "runs/one"}


def _recipe(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_flags_stand_above_the_recipe_and_the_recipe_above_the_defaults(tmp_path):
    recipe = _recipe(tmp_path, 'model = "a"\nout = "o"\nrank = 8\nlearning_rate = 1\ntargets = ["q", "v"]\n')
    settings = read_settings(TrainConfig, recipe, {"model": "b", "rank": None, "recompute": False})
    assert (settings.model, settings.out, settings.rank) == ("b", "o", 8)
    assert (settings.learning_rate, settings.targets, settings.recompute) == (1.0, ("q", "v"), False)
    assert settings.alpha == TrainConfig().alpha


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("leaning_rate = 1e-4", ["recipe.toml", "'leaning_rate'", "did you mean 'learning_rate'"]),
        ("rank = 0", ["rank is 0", "1 to 4096"]),
        ("rank = 1.5", ["rank is 1.5", "a whole number"]),
        ("rank = true", ["rank is True", "a whole number"]),
        ("clip = nan", ["clip is nan", "a number"]),
        ("clip = -1", ["clip is -1.0", "0 or more"]),
        ('trainable = "all"', ["'all'", "lora, full"]),
        ('recompute = "yes"', ["'yes'", "true or false"]),
        ("targets = [1]", ["targets is [1]", "list of texts"]),
        ("targets = []", ["targets is empty"]),
        ("epochs = 0", ["steps and epochs are both 0"]),
        ("patience = 2\neval_every = 0", ["patience is 2 and eval_every 0"]),
        ("rank = ", ["not valid TOML"]),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place_and_what_would_fit(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        read_settings(TrainConfig, _recipe(tmp_path, text), NEEDED)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml: there is no such recipe"):
        read_settings(TrainConfig, tmp_path / "nothing.toml", NEEDED)


@pytest.mark.parametrize("missing", ["model", "out"])
def test_a_setting_that_a_run_needs_is_asked_for(missing):
    with pytest.raises(ConfigError, match=f"{missing} is not set.*--{missing}"):
        read_settings(TrainConfig, None, NEEDED | {missing: None})


def test_texts_with_commas_make_a_list():
    assert read_settings(TrainConfig, None, NEEDED | {"targets": "q, experts"}).targets == ("q", "experts")


def test_what_cannot_change_the_curve_may_change_and_the_rest_is_named():
    before = as_dict(read_settings(TrainConfig, None, NEEDED))
    now = read_settings(TrainConfig, None, NEEDED | {"keep": 5, "threads": 1, "rank": 8, "schedule": "wsd"})
    assert changed_settings(before, now) == ["rank was 16, now 8", "schedule was 'cosine', now 'wsd'"]
    del before["clip"]
    # What there was no setting for has its default.
    del before["targets"]
    assert len(changed_settings(before, now)) == 2
    before["gone"] = 1
    assert "gone was 1, now not known" in changed_settings(before, now)
    assert "clip was 1.0, now 0.5" in changed_settings(before, dataclasses.replace(now, clip=0.5))


def test_the_balance_loss_is_on_only_where_routers_train():
    def weight(**flags):
        return read_settings(TrainConfig, None, NEEDED | flags).balance_weight

    assert weight() == 0
    assert weight(targets="q,router") == 1e-3
    assert weight(trainable="full") == 1e-3
    assert weight(trainable="full", router_balance=0) == 0
    assert weight(router_balance=0.02) == 0.02
