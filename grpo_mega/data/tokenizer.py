"""Tokenizers: the model's own from a directory, or one token per character for models made from nothing."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import ModelBlock

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = (*(chr(code) for code in range(0x20, 0x7F)), "\n")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def scratch_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character and the newline: 99 in all; <pad> is 0 and <eos> is 1."""
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "<eos>" written in a prompt is five characters, not the end
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(model: ModelBlock) -> PreTrainedTokenizerBase:
    """The tokenizer a model block asks for, from local files only: a run must not depend on a network."""
    key, origin = (
        ("model.tokenizer", model.tokenizer) if model.tokenizer is not None else ("model.hf", model.hf)
    )
    if origin is None:
        return scratch_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(origin, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer can be read from {origin!r} ({(str(error) or repr(error)).splitlines()[0]})",
            where=key,
            law="a tokenizer comes from a local directory, or a name already in the local Hugging Face cache",
            remedy=f"set {key} to a directory that holds tokenizer.json, or download it there first",
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {origin!r} has no end-of-sequence token",
            where=key,
            law="a response ends with the end-of-sequence token",
            remedy='add "eos_token" to its tokenizer_config.json',
        )
    if tokenizer.pad_token_id is None:
        # Padding is always masked, so any token will do; many causal models ship without one.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
