"""Text in, token ids out, and back: byte-level BPE on the `tokenizers` library (DeepSeek-V3 report, section 4.1).

A tokenizer is trained on the run's own text or read from any byte-level tokenizer.json, DeepSeek's own among them. It
is always read with `tokenizers` directly: the class that published configs name (LlamaTokenizerFast) has dropped spaces
(huggingface/transformers#45488).

Plain text never turns into a control token: a document that contains the letters of the end token is still text.
Only allow_special and encode_chat read them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from fireflyer.errors import UserError
from fireflyer.text.chat import chat_prompt
from fireflyer.text.dialects import Dialect, detect_dialect
from fireflyer.text.messages import shield
from fireflyer.text.special_tokens import ASSISTANT, BEGIN, END, HIDDEN, PAD, RESERVED, USER
from fireflyer.text.templates import CHAT_TEMPLATE, Message, Tool
from fireflyer.text.tokenizer_file import (
    bytes_of_tokens,
    chat_template_of,
    control_pattern,
    parse,
    read_text,
    without_controls,
)

# Training reads at most this much text; more moves few merges and costs minutes and memory.
TRAINING_BYTES = 32 * 2**20

# Single digits, CJK runs, then letters, punctuation and white space as in DeepSeek-V3's tokenizer.json, which takes up
# to three digits together: one digit a token is what lets a small model learn to count.
_DIGIT = r"\p{N}"
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Names looked for when no tokenizer_config.json says which tokens begin and end a text.
_BEGIN_NAMES = (BEGIN, "[BOS]", "<s>", "<|begin_of_text|>", "<bos>")
_END_NAMES = (END, "[EOS]", "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
_PAD_NAMES = (PAD, "[PAD]", "<pad>", "<|pad|>")

# In tokenizer_config.json: the model was post-trained on chats (SFT, DPO). Having a chat template proves nothing, since
# every tokenizer trained here ships one.
_TAUGHT = "taught_chat"


class Tokenizer:
    """One vocabulary, its special tokens and its chat template. Build it with from_file or train.

    Attributes: bos_id, eos_id (int), pad_id (int, or None where the vocabulary has no token to spare: never equal to
    eos_id, or the stop token would be masked out of every loss), chat_template (jinja2 text or None), vocab_size (the
    highest id + 1, added tokens counted), taught_chat (whether the model was post-trained on chats here).
    """

    def __init__(self, tokenizer_json: str, settings: Mapping[str, Any], source: str) -> None:
        """`tokenizer_json`: the file's text; `settings`: the contents of tokenizer_config.json (may be empty);
        `source`: where it came from, for messages. Raises UserError if it can't be used."""
        self._json = tokenizer_json
        self._source = source
        parsed = parse(tokenizer_json, source)
        controls = [token for token in parsed.get("added_tokens") or [] if token["content"].strip()]
        self._ids = {token["content"]: int(token["id"]) for token in controls}
        self._hidden = {int(token["id"]) for token in controls if token.get("special")}
        self._control_pattern = control_pattern(controls)
        self._plain = without_controls(parsed, source)
        self._token_bytes = bytes_of_tokens(self._plain.get_vocab(with_added_tokens=True), self._ids)
        self.vocab_size = len(self._token_bytes)

        bos_id = self._named_token("bos_token", settings, _BEGIN_NAMES)
        eos_id = self._named_token("eos_token", settings, _END_NAMES)
        if bos_id is None or eos_id is None:
            missing = [name for name, i in (("begin", bos_id), ("end", eos_id)) if i is None]
            raise UserError(
                f"{source}: no {' and no '.join(missing)} token; name bos_token and eos_token in a "
                f"tokenizer_config.json beside it, or add {BEGIN} and {END} to its added_tokens"
            )
        self.bos_id: int = bos_id
        self.eos_id: int = eos_id
        self.pad_id = self._named_token("pad_token", settings, _PAD_NAMES)
        if self.pad_id == self.eos_id:  # DeepSeek-V3's own tokenizer_config.json says so, though a pad token exists
            self.pad_id = self._named_token("pad_token", {}, _PAD_NAMES)
        self.chat_template = chat_template_of(settings) or (
            CHAT_TEMPLATE if {BEGIN, END, USER, ASSISTANT} <= self._ids.keys() else None
        )
        self.taught_chat = settings.get(_TAUGHT) is True
        self._settings = dict(settings)

    @property
    def dialect(self) -> Dialect:
        """How the chat template talks: its form of thinking and of tool calls."""
        return detect_dialect(self.chat_template)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder, with the tokenizer_config.json and chat_template.jinja beside
        it if there are any. Raises UserError."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: give a tokenizer.json or a folder that holds one")
        settings: dict[str, Any] = {}
        config_path = path.with_name("tokenizer_config.json")
        if config_path.is_file():
            try:
                settings = json.loads(read_text(config_path))
            except json.JSONDecodeError as error:
                raise UserError(f"{config_path} is not JSON: {error}") from error
        template_path = path.with_name("chat_template.jinja")
        if template_path.is_file():
            settings["chat_template"] = read_text(template_path)
        return cls(read_text(path), settings, str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_bytes: int = TRAINING_BYTES) -> "Tokenizer":
        """Train byte-level BPE on the first `max_bytes` UTF-8 bytes of `texts`; the same texts give the same bytes.

        Ids: RESERVED from 0 on, then the 256 bytes, then the merges. Every byte is a token, so that no text is out of
        reach. vocab_size is met exactly unless the texts hold fewer pairs that occur twice: read .vocab_size after.
        """
        smallest = len(RESERVED) + 256
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small: {len(RESERVED)} special tokens and 256 bytes need {smallest}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGIT, CJK, WORDS)]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(name, normalized=False, special=True) for name in RESERVED],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_first_bytes(texts, max_bytes), trainer)
        # Other programs that load the exported file begin each text as training did.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, RESERVED.index(BEGIN))]
        )
        parsed = json.loads(tokenizer.to_str())
        for token in parsed["added_tokens"]:
            token["special"] = token["content"] in HIDDEN
        return cls(json.dumps(parsed, ensure_ascii=False, indent=2), {}, "the tokenizer trained here")

    def of_taught_model(self) -> "Tokenizer":
        """The same, marked as that of a model which was taught to chat; the mark is saved with it."""
        return Tokenizer(self._json, {**self._all_settings(), _TAUGHT: True}, self._source)

    def is_same(self, other: "Tokenizer") -> bool:
        """Whether both cut any text into the same ids; templates and other settings don't count."""
        return self._json == other._json or json.loads(self._json) == json.loads(other._json)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (as it was read) and tokenizer_config.json into an existing folder."""
        config = json.dumps(self._all_settings(), ensure_ascii=False, indent=2) + "\n"
        for name, text in (("tokenizer.json", self._json), ("tokenizer_config.json", config)):
            (Path(folder) / name).write_bytes(text.encode("utf-8"))

    def _all_settings(self) -> dict[str, Any]:
        settings = self._settings or {
            # The class that takes tokenizer.json as it is, known to transformers 4 and 5 alike.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.token_text(self.bos_id),
            "eos_token": self.token_text(self.eos_id),
            "pad_token": self.token_text(self.eos_id if self.pad_id is None else self.pad_id),
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None and "chat_template" not in settings:
            settings = {**settings, "chat_template": self.chat_template}
        return settings

    def encode(self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """The ids of a text. The names of special tokens inside it are plain text unless allow_special is set."""
        ids = self._encode_marked(text, "") if allow_special else self.encode_batch([text])[0]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many plain texts at once; the library spreads them over the cores."""
        encodings = self._guard(self._plain.encode_batch_fast, texts)
        return [encoding.ids for encoding in encodings]

    def encode_batch_from(self, texts: Sequence[str], characters: Sequence[int]) -> list[tuple[list[int], int]]:
        """As encode_batch, each with the place of the first token that starts at or after the given character
        (the number of tokens if none does). Slower than encode_batch."""
        encodings = self._guard(self._plain.encode_batch, texts)
        return [
            (
                encoding.ids,
                next((i for i, (start, _) in enumerate(encoding.offsets) if start >= character), len(encoding)),
            )
            for encoding, character in zip(encodings, characters, strict=True)
        ]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to go on with: special tokens in it count, and it has one begin token in front, however
        many it brings."""
        return self._with_one_begin(self.encode(text, allow_special=True))

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of a conversation in this tokenizer's chat template, with exactly one begin token, the first.

        Special tokens that a user, a tool or a system text spells out stay plain text. `tools` as in the OpenAI API;
        `variables`: the template's own switches (V3.1's `thinking`). `continue_final_message`: end inside the last
        message, the assistant's, so that the answer goes on with it (add_generation_prompt has then no say).
        Raises UserError, which names the message.
        """
        shielded, shielded_tools, mark = self.shield_chat(messages, tools)
        text = self.render_chat(shielded, add_generation_prompt, shielded_tools, variables, continue_final_message)
        return self.encode_pieces([text], mark)[0]

    def shield_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None
    ) -> tuple[list[Any], list[Any], str]:
        """Messages and tools with this vocabulary's control tokens broken by a mark, and the mark; see `shield`."""
        ends = [self.token_text(i) for i in {self.bos_id, self.eos_id, self.pad_id} - {None}]
        return shield(messages, tools or (), self._ids, ends)

    def encode_pieces(self, pieces: Sequence[str], mark: str) -> list[list[int]]:
        """The ids of a shielded chat's rendering, each piece of it by itself; one begin token, the first of all."""
        encoded = [self._encode_marked(piece, mark) for piece in pieces]
        if self.bos_id != self.eos_id:  # a template may write begin tokens where it likes
            encoded = [[token_id for token_id in ids if token_id != self.bos_id] for ids in encoded]
        return [self._with_one_begin(encoded[0]), *encoded[1:]]

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as text, to be shown; encode_chat is the safe way to its ids."""
        if self.chat_template is None:
            raise UserError(f"{self._source}: no chat template and no {USER} token; only plain prompts can be used")
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return chat_prompt(
            self.dialect,
            messages,
            special_tokens={name: "" if i is None else self.token_text(i) for name, i in names.items()},
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
            continue_final_message=continue_final_message,
        )

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; bytes that form no character are U+FFFD."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def special_id(self, name: str) -> int:
        """The id of a special token by its name. Raises UserError if this vocabulary lacks it."""
        if name not in self._ids:
            raise UserError(f"{self._source}: has no special token {name}")
        return self._ids[name]

    def token_text(self, token_id: int) -> str:
        """How a token reads, control tokens by their name."""
        return self.token_bytes(token_id, skip_special=False).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes a token adds to the text: b"" for hidden special tokens (begin, end, pad; unless skip_special is
        off) and for ids past the vocabulary, which a model with padded embeddings may choose."""
        if token_id >= len(self._token_bytes) or (skip_special and token_id in self._hidden):
            return b""
        return self._token_bytes[token_id]

    def byte_lengths(self) -> list[int]:
        """Bytes of plain text each id stands for (0 for every control token), for bits per byte."""
        lengths = [len(token) for token in self._token_bytes]
        for token_id in self._ids.values():
            lengths[token_id] = 0
        return lengths

    def _named_token(self, key: str, settings: Mapping[str, Any], names: Sequence[str]) -> int | None:
        given = settings.get(key)
        name = given.get("content") if isinstance(given, dict) else given
        if name is not None and name not in self._ids:
            raise UserError(
                f"{self._source}: tokenizer_config.json has {key} {name!r}, but tokenizer.json no such token"
            )
        if name is None:
            name = next((candidate for candidate in names if candidate in self._ids), None)
        return None if name is None else self._ids[name]

    def _with_one_begin(self, ids: list[int]) -> list[int]:
        begins = next((i for i, token_id in enumerate(ids) if token_id != self.bos_id), len(ids))
        return [self.bos_id, *ids[begins:]]

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode text whose control tokens count; `mark` is taken out of what lies between them."""
        ids: list[int] = []
        position = 0
        for match in self._control_pattern.finditer(text):
            ids += self._encode_between(text[position : match.start()], mark)
            ids.append(self._ids[match.group().strip()])
            position = match.end()
        return ids + self._encode_between(text[position:], mark)

    def _encode_between(self, text: str, mark: str) -> list[int]:
        return self.encode(text.replace(mark, "") if mark else text) if text else []

    def _guard(self, encode: Any, texts: Sequence[str]) -> list[Any]:
        try:
            return encode(texts, add_special_tokens=False)
        except TypeError as error:
            for text in texts:
                if not isinstance(text, str):
                    raise
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as bad:
                    raise UserError(
                        f"text has half a surrogate pair at character {bad.start}, which is no Unicode text"
                    ) from error
            raise


def _first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        size = len(text.encode("utf-8"))
        if size >= left:
            yield text.encode("utf-8")[:left].decode("utf-8", errors="ignore")
            return
        left -= size
        yield text
