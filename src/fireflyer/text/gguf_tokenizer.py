"""The tokenizer in a GGUF file's metadata. In: the metadata. Out: a Tokenizer, as from the model's own tokenizer.json.

llama.cpp keeps the vocabulary, the merges and the chat template, but only the name of the pre-tokenizer: its patterns
are those of the released tokenizers (src/llama-vocab.cpp of llama.cpp; tokenization_kimi.py of Kimi-K2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.text.special_tokens import HIDDEN
from fireflyer.text.tokenizer import CJK, WORDS, Tokenizer

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_WIDE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"

# Digits come one by one in the two older models.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": (r"\p{N}{1,3}", CJK, WORDS),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _WIDE,
        r"\p{N}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _WIDE, r"\p{N}"),
    "kimi-k2": (
        rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer | None:
    """The tokenizer that the metadata describe; None where they have none. Raises UserError for another kind."""
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return None
    if kind != "gpt2":
        raise UserError(f"{source}: tokenizer.ggml.model {shown(kind)} isn't read; only byte-level BPE (gpt2) is")
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PATTERNS:
        known = ", ".join(_PATTERNS)
        raise UserError(f"{source}: tokenizer.ggml.pre {shown(pre)} isn't known; known are {known}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    plain = {token: i for i, token in enumerate(tokens) if types[i] not in (_CONTROL, _USER_DEFINED, _UNUSED)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(plain, merges))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{source}: its vocabulary and merges don't belong together: {error}") from None
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    parsed = json.loads(tokenizer.to_str())
    parsed["added_tokens"] = [
        _added(i, tokens[i], types[i] == _CONTROL) for i in range(len(tokens)) if types[i] in (_CONTROL, _USER_DEFINED)
    ]
    return Tokenizer(json.dumps(parsed, ensure_ascii=False), _settings(metadata, tokens), source)


def _added(token_id: int, name: str, control: bool) -> dict[str, Any]:
    """llama.cpp's converter marks all of DeepSeek's own tokens as control tokens; in tokenizer.json those within an
    answer are not, since whoever reads it has to see them."""
    of_deepseek = name.startswith("<\uff5c") and name.endswith("\uff5c>")
    special = control and (name in HIDDEN or not of_deepseek)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **flags, "special": special}


def _settings(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id < len(tokens):
            settings[key] = tokens[token_id]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return settings
