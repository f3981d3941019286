"""The critic of a recipe: defaults, presets beneath what is given, and laws."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from grpo_mega.block import Block
from grpo_mega.recipe.critic_block import PRESETS, CriticBlock

DISCRIMINATOR = {"kind": "discriminator"}


def test_there_is_none_by_default() -> None:
    assert CriticBlock().kind == "none"


def test_defaults_are_those_of_warmup_2026_01() -> None:
    plain = CriticBlock(**DISCRIMINATOR)
    assert CriticBlock(**DISCRIMINATOR, preset="warmup_2026_01").model_copy(update={"preset": None}) == plain
    assert (plain.temperature, plain.batch_norm, plain.margin) == (5.0, True, 0.0)
    assert (plain.score_reg.threshold, plain.score_reg.weight) == (3.0, 0.01)


def test_presets() -> None:
    gad = CriticBlock(**DISCRIMINATOR, preset="gad")
    assert (gad.temperature, gad.score_reg.weight, gad.batch_norm) == (1.0, 0.0, False)
    before = CriticBlock(**DISCRIMINATOR, preset="before_fix")
    assert (before.temperature, before.adaptive_temperature, before.batch_norm) == (2.0, "ema", False)
    assert (before.score_reg.threshold, before.score_reg.weight) == (5.0, 0.001)


def test_a_range_can_be_written_in_a_file() -> None:
    """As json it is a list, which a strict reader of Python objects would not take for a pair of numbers."""
    text = '{"kind": "discriminator", "score_reg": {"range": {"teacher": [0.0, 3.0], "student": [-3, 0]}}}'
    bounds = CriticBlock.model_validate_json(text, strict=True).score_reg.range
    assert (bounds.teacher, bounds.student) == ((0.0, 3.0), (-3.0, 0.0))
    with pytest.raises(ValidationError):
        CriticBlock.model_validate_json(text.replace("3.0", '"3.0"'), strict=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_key_that_is_given_wins_over_the_preset(preset) -> None:
    given = {**DISCRIMINATOR, "preset": preset, "temperature": 5.0, "score_reg": {"weight": 0.25}}
    block = CriticBlock.model_validate(given)
    # 5.0 is also the key's default: what counts is that it is written down
    assert block.temperature == 5.0 and block.score_reg.weight == 0.25
    beneath = PRESETS[preset]["score_reg"].get("threshold", 3.0)
    assert block.score_reg.threshold == beneath
    assert {"temperature", "score_reg", "preset"} <= block.model_fields_set


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_dumped_block_reads_back_as_itself(preset) -> None:
    block = CriticBlock.model_validate({**DISCRIMINATOR, "preset": preset, "gap_max": 2.0})
    for mode in ("python", "json"):
        assert CriticBlock.model_validate(block.model_dump(mode=mode)) == block


def test_a_preset_leaves_what_it_is_given_alone() -> None:
    given = {**DISCRIMINATOR, "preset": "gad", "score_reg": {"threshold": 2.0}}
    CriticBlock.model_validate(given)
    assert given["score_reg"] == {"threshold": 2.0} and "temperature" not in given
    assert "threshold" not in PRESETS["gad"]["score_reg"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preset": "newest"}, "'gad', 'warmup_2026_01' or 'before_fix'"),
        ({"kind": "value", "preset": "gad"}, "set kind to discriminator"),
        ({"kind": "none", "preset": "gad"}, "or remove preset"),
        ({"kind": "none", "critic_warmup_steps": 3}, "needs a critic"),
        ({"ranking_weight": 0.0}, "nothing that prefers a teacher"),
        ({"margin": 2.0}, "lower it, or set batch_norm to false"),
        ({"score_reg": {"range": {"teacher": [1.0, 1.0]}}}, "1 is not below 1"),
        ({"adaptive": {"low": 3.0, "high": 2.0}}, "low .3. is above high .2."),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"temperatur": 1.0}, "not permitted"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
    ids=str,
)
def test_laws(keys, message) -> None:
    with pytest.raises(ValidationError, match=message):
        CriticBlock.model_validate({**DISCRIMINATOR, **keys})


def test_a_margin_is_free_without_batch_norm() -> None:
    assert CriticBlock(**DISCRIMINATOR, margin=3.0, batch_norm=False).margin == 3.0
    assert CriticBlock(**DISCRIMINATOR, gap_penalty=1.0, ranking_weight=0.0).gap_penalty == 1.0


def test_every_key_is_documented() -> None:
    for name, field in CriticBlock.model_fields.items():
        is_block = isinstance(field.default, Block)  # says of itself what it is
        assert field.description or (is_block and type(field.default).__doc__), name
