"""Tokenizers: the character one is exact in both directions; a missing one says which key to change."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grpo_mega.data.tokenizer import load_tokenizer, scratch_tokenizer
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import ModelBlock, ScratchModel

ASCII = [chr(code) for code in range(0x20, 0x7F)] + ["\n"]
TOKENIZER = scratch_tokenizer()


@settings(max_examples=60, deadline=None)
@given(st.text(ASCII, max_size=40))
def test_every_ascii_text_comes_back_unchanged(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    end, padding = 1, 0
    assert TOKENIZER.decode([*ids, end, padding], skip_special_tokens=True) == text


def test_specials_have_the_first_ids_and_are_never_added():
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (0, 1, 2)
    assert len(TOKENIZER) == 3 + 95 + 1  # specials, printable ASCII, newline
    assert set(TOKENIZER.encode(string.printable[:95])).isdisjoint({0, 1})


def test_a_special_token_spelt_out_in_a_prompt_is_only_characters():
    assert TOKENIZER.eos_token_id not in TOKENIZER.encode("a<eos>b")
    assert TOKENIZER.decode(TOKENIZER.encode("a<eos>b"), skip_special_tokens=True) == "a<eos>b"


def test_other_characters_are_unknown():
    assert TOKENIZER.encode("é") == [2]


def test_saving_and_loading_keeps_ids_text_and_template(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    text, chat = "3  1 'x <pad>\n", [{"role": "user", "content": "hi"}]
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
        load_tokenizer(ModelBlock(hf=str(tmp_path))),
        load_tokenizer(ModelBlock(scratch=ScratchModel(), tokenizer=str(tmp_path))),
    ):
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
        assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
        assert loaded.apply_chat_template(chat, tokenize=False) == TOKENIZER.apply_chat_template(
            chat, tokenize=False
        )


def test_a_scratch_model_has_the_character_tokenizer():
    assert len(load_tokenizer(ModelBlock(scratch=ScratchModel()))) == len(TOKENIZER)


@pytest.mark.parametrize("key", ["hf", "tokenizer"])
def test_a_missing_directory_names_its_key(tmp_path, key):
    missing = str(tmp_path / "nowhere")
    block = ModelBlock(hf=missing) if key == "hf" else ModelBlock(scratch=ScratchModel(), tokenizer=missing)
    with pytest.raises(UserError) as caught:
        load_tokenizer(block)
    assert missing in caught.value.what
    assert caught.value.where == f"model.{key}"
    assert f"model.{key}" in str(caught.value.remedy)


def test_a_directory_without_a_tokenizer_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be read"):
        load_tokenizer(ModelBlock(hf=str(tmp_path)))


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    tokenizer = scratch_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelBlock(hf=str(tmp_path))).pad_token_id == 1


def test_a_tokenizer_without_an_end_token_is_a_user_error(tmp_path):
    tokenizer = scratch_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(ModelBlock(hf=str(tmp_path)))
