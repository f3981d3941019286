"""The prompt stream: a function of (seed, position), each problem once an epoch, every uid once a run."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.data.sources import Split, open_source
from grpo_mega.data.stream import Permutation, PromptStream
from grpo_mega.data.tokenizer import scratch_tokenizer
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock

TOKENIZER = scratch_tokenizer()


def stream(data, seed=0, split: Split = "train", tokenizer=TOKENIZER):
    return PromptStream(open_source(data, split, seed), tokenizer, data, seed, split)


def file_stream(tmp_path, rows, **keys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stream(DataBlock(source="jsonl", train=path, **keys))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**32))
def test_the_permutation_is_a_bijection(size, key):
    permutation = Permutation(size, key)
    assert sorted(permutation(position) for position in range(size)) == list(range(size))


def test_the_permutation_of_a_huge_source_costs_no_memory():
    permutation = Permutation(2**40, "key")
    values = [permutation(position) for position in range(200)]
    assert len(set(values)) == 200 and max(values) < 2**40
    assert (
        min(values) < 2**36 and max(values) > 2**40 - 2**36
    )  # spread out: P(miss) = (15/16)^200 < 1e-5 each


def test_small_permutations_are_fair():
    # Over 600 keys each of 3 problems comes first 200 times; standard deviation sqrt(600 * 1/3 * 2/3) = 11.5.
    firsts = Counter(Permutation(3, key)(0) for key in range(600))
    assert all(abs(firsts[value] - 200) < 5 * 12 for value in range(3))


def test_an_epoch_holds_each_problem_once_and_the_next_has_another_order():
    prompts = stream(DataBlock(task="add", train=12)).prompts_for_step(0, 24)
    epochs = [[prompt.index for prompt in prompts[start : start + 12]] for start in (0, 12)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(12))


def test_a_resumed_run_and_another_step_size_see_the_same_stream():
    data = DataBlock(task="add", train=10)
    whole = stream(data).prompts_for_step(0, 24)
    resumed = stream(data)
    assert resumed.prompts_for_step(3, 6) + resumed.prompts_for_step(2, 6) == whole[18:] + whole[12:18]


def test_the_seed_sets_the_order():
    orders = [
        [prompt.index for prompt in stream(DataBlock(task="add", train=10), seed).prompts_for_step(0, 10)]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_uids_are_unique_and_name_problem_and_epoch():
    prompts = stream(DataBlock(task="add", train=3, shuffle=False)).prompts_for_step(0, 7)
    uids = ["train-0", "train-1", "train-2", "train-0#2", "train-1#2", "train-2#2", "train-0#3"]
    assert [prompt.uid for prompt in prompts] == uids
    assert prompts[3].text == prompts[0].text
    assert stream(DataBlock(task="add", eval=3), split="eval").prompt(2).uid == "eval-2"


def test_a_raw_prompt_is_the_text_and_a_teacher_target_ends_with_eos():
    data = DataBlock(task="sort_digits", options={"teacher_accuracy": 1.0})
    prompts = stream(data)
    prompt = prompts.prompt(5)
    assert TOKENIZER.decode(list(prompt.token_ids)) == prompt.text
    assert prompts.teacher_tokens(prompt) == (*TOKENIZER.encode(prompt.answer), 1)


def test_chat_prompts_go_through_the_template_once(tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "d"}]
    rows = [{"prompt": "hi"}, {"prompt": turns}, {"prompt": own}]
    prompts = file_stream(tmp_path, rows, template="chat", system="Be brief.")
    rendered = [TOKENIZER.decode(list(prompts.prompt(index).token_ids)) for index in range(3)]
    assert rendered == [
        "system: Be brief.\nuser: hi\nassistant: ",
        "system: Be brief.\nuser: a\nassistant: b\nuser: c\nassistant: ",
        "system: own\nuser: d\nassistant: ",  # its own system message stays the only one
    ]


def test_templates_that_cannot_be_followed_are_refused():
    with pytest.raises(UserError, match="no place for a system message"):
        stream(DataBlock(task="add", system="Be brief."))
    strict = scratch_tokenizer()
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="System role not supported"):
        stream(DataBlock(task="add", template="chat", system="Be brief."), tokenizer=strict).prompt(0)
    bare = scratch_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        stream(DataBlock(task="add", template="chat"), tokenizer=bare)


def test_a_long_prompt_is_refused_with_its_place(tmp_path):
    prompts = file_stream(
        tmp_path, [{"prompt": "ok"}, {"prompt": "x" * 11}], max_prompt_tokens=10, shuffle=False
    )
    with pytest.raises(UserError, match="train-1 has 11 tokens") as caught:
        prompts.prompts_for_step(0, 2)
    assert str(caught.value.where).endswith("data.jsonl:2")


def test_a_long_prompt_can_be_replaced_by_the_next_one(tmp_path, caplog):
    rows = [{"prompt": "a"}, {"prompt": "x" * 11}, {"prompt": "y" * 11}]
    prompts = file_stream(tmp_path, rows, max_prompt_tokens=10, shuffle=False, on_bad_line="skip")
    with caplog.at_level(logging.WARNING):
        uids = [prompt.uid for prompt in prompts.prompts_for_step(0, 6)]
    assert uids == ["train-0", "train-0@1", "train-0@2", "train-0#2", "train-0@1#2", "train-0@2#2"]
    assert len(caplog.records) == 2  # each long prompt once, not once an epoch
    hopeless = file_stream(tmp_path, rows[1:], max_prompt_tokens=10, on_bad_line="skip")
    with pytest.raises(UserError, match="every train prompt is longer"):
        hopeless.prompts_for_step(0, 1)


def test_a_missing_teacher_response_names_the_key(tmp_path):
    prompts = file_stream(tmp_path, [{"prompt": "a"}], teacher_key="gold")
    with pytest.raises(UserError, match="no teacher response") as caught:
        prompts.teacher_tokens(prompts.prompt(0))
    assert "'gold'" in str(caught.value.remedy) and "data.teacher_key" in str(caught.value.remedy)
