"""The byte-level tokenizer: the id of a byte is its value."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


__all__ = ["byte_tokenizer"]

SPECIAL_TOKENS = {f"{role}_token": f"<|{role}|>" for role in ("bos", "eos", "sep", "pad", "cls", "mask")}


def byte_tokenizer(model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Makes the tokenizer whose ids are the UTF-8 bytes of the text, ids 0 ... 255 being the byte values.

    Special tokens follow in a fixed order: `<|bos|>` 256, `<|eos|>` 257, `<|sep|>` 258, `<|pad|>` 259, `<|cls|>` 260,
    `<|mask|>` 261; 262 ids in all. None is added to a text by default. The text of a special token is read as that
    token, which fill-mask needs; `tokenizer(text, split_special_tokens=True)` gives the plain bytes of any text.
    Decoding is exact; bytes that are not UTF-8 become U+FFFD and leave their neighbours alone. Padding is on the left,
    where generating from a batch of prompts needs it.

    `save_pretrained` writes an ordinary `tokenizer.json`, which AutoTokenizer loads without remote code. This is for
    prompts and pipelines: at about 1 MB/s it is hundreds of times slower than reading the bytes of a corpus as they
    are, so training and evaluation go through `hf_rezero.data` instead, to the same ids.

    Args:
        model_max_length: where `truncation=True` cuts, in bytes; None for no limit.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("é!").input_ids
        [195, 169, 33]
        >>> tokenizer.decode([195, 169, 33])
        'é!'
    """
    # GPT-2's alphabet: a printable byte is its own character, the others have stand-ins from 256 up, in byte order.
    characters = set(pre_tokenizers.ByteLevel.alphabet())
    stand_ins = iter(sorted(character for character in characters if ord(character) > 255))
    vocab = {chr(byte) if chr(byte) in characters else next(stand_ins): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # Numbered here, so that their ids do not hang on the order in which transformers would add them.
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS.values()])
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
        **limit,
    )
