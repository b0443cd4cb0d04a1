"""Messages -> tokens and media spans; tokens -> text.

The chat template is the checkpoint's own (jinja, through transformers' tokenizer). Text that a user wrote is data:
a ``<|im_start|>`` or ``<|image_pad|>`` in it is encoded as the characters it consists of, never as the special token,
so nobody can forge a turn or an image. Everything else equals what transformers' processor yields, token for token.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from tokenizers import Tokenizer

from vlcache_dist.errors import BadRequest, PromptTooLong, UnsupportedModel
from vlcache_dist.media import MediaRef
from vlcache_dist.types import ContentKey, MediaSpan
from vlcache_dist.wire import MediaMeta

IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Conversation(msgspec.Struct, frozen=True):
    """Messages reduced to what the template sees, and their media in order of appearance.

    ``messages``: ``{"role", "content"}`` with content a string or a list of ``{"type": "text", "text"}``,
    ``{"type": "image"}`` and ``{"type": "video"}``.
    """

    messages: tuple[dict[str, Any], ...]
    media: tuple[MediaRef, ...]


class Prompt(msgspec.Struct, frozen=True):
    """``token_ids`` with every image expanded to its vision tokens, which ``spans`` locate, in order."""

    token_ids: tuple[int, ...]
    spans: tuple[MediaSpan, ...]


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Read messages in OpenAI's format; ``video_url`` parts are an extension: ``{"type": "video_url", "video_url":
    {"url": animated GIF/WebP/PNG or list of frame URLs, "fps": 2.0}}``. Raises BadRequest, which names the place.

    ``developer`` is an alias of ``system``. Of ``image_url.detail``, ``auto`` and ``high`` mean what is done anyway;
    ``low`` is refused.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise BadRequest("messages: a list of at least one message is wanted")
    rendered: list[dict[str, Any]] = []
    media: list[MediaRef] = []
    for m, message in enumerate(messages):
        at = f"messages[{m}]"
        if not isinstance(message, Mapping):
            raise BadRequest(f"{at}: an object with role and content is wanted")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequest(f"{at}.role: {role!r} is not one of {', '.join(ROLES)}")
        if extra := sorted(
            key for key, value in message.items() if key not in ("role", "content") and value is not None
        ):
            raise BadRequest(f"{at}.{extra[0]} is not supported")
        content = message.get("content")
        if isinstance(content, str):
            rendered.append({"role": ROLES[role], "content": _text(content, f"{at}.content")})
            continue
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise BadRequest(f"{at}.content: a string or a list of parts is wanted")
        parts: list[dict[str, str]] = []
        for p, part in enumerate(content):
            found = _part(part, f"{at}.content[{p}]")
            if isinstance(found, MediaRef):
                media.append(found)
                parts.append({"type": found.modality})
            else:
                parts.append({"type": "text", "text": found})
        rendered.append({"role": ROLES[role], "content": parts})
    return Conversation(tuple(rendered), tuple(media))


def _part(part: Any, at: str) -> MediaRef | str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return _text(part.get("text"), f"{at}.text")
    if kind == "image_url":
        value = _object(part, "image_url", at, ("url", "detail"))
        if value.get("detail") not in (None, "auto", "high"):
            raise BadRequest(f"{at}.image_url.detail: {value['detail']!r} is not supported, only auto and high are")
        return MediaRef("image", (_url(value.get("url"), f"{at}.image_url.url"),), at)
    if kind == "video_url":
        value = _object(part, "video_url", at, ("url", "fps"))
        urls, fps = value.get("url"), value.get("fps")
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000):
            raise BadRequest(f"{at}.video_url.fps: {fps!r} is not a rate above 0 and up to 1000")
        listed = urls if isinstance(urls, list | tuple) else [urls]
        if not listed:
            raise BadRequest(f"{at}.video_url.url: a video has at least one frame")
        checked = tuple(_url(url, f"{at}.video_url.url") for url in listed)
        return MediaRef("video", checked, at, None if fps is None else float(fps))
    raise BadRequest(f"{at}.type: {kind!r} is not one of text, image_url, video_url")


def _text(text: Any, at: str) -> str:
    if not isinstance(text, str):
        raise BadRequest(f"{at}: a string is wanted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{at}: not valid Unicode ({error.reason})") from error
    return text


def _object(part: Mapping[str, Any], name: str, at: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    value = part.get(name)
    if isinstance(value, str):
        return {"url": value}
    if not isinstance(value, Mapping):
        raise BadRequest(f"{at}.{name}: an object with url is wanted")
    if extra := sorted(set(value) - set(keys)):
        raise BadRequest(f"{at}.{name}.{extra[0]} is not supported")
    return value


def _url(url: Any, at: str) -> str:
    if not isinstance(url, str) or not url:
        raise BadRequest(f"{at}: a URL is wanted")
    return url


ALONE = {
    "image": parse_messages([{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]),
    "video": parse_messages([{"role": "user", "content": [{"type": "video_url", "video_url": "data:,"}]}]),
}  #: canonical contexts: an item behind the model's default system prompt


class PromptBuilder:
    """Renders and encodes prompts of one model. Thread-safe."""

    def __init__(
        self, tokenizer: Any, *, chat_template: str | None = None, merge_size: int, max_model_len: int
    ) -> None:
        """``tokenizer``: a fast tokenizer of transformers. Raises UnsupportedModel if a needed token is missing."""
        self._tokenizer = tokenizer
        self._template = chat_template
        self.merge_size = merge_size
        self.max_model_len = max_model_len
        specials = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for needed in (IMAGE_PAD, VIDEO_PAD):
            if needed not in specials:
                raise UnsupportedModel(f"the tokenizer has no special token {needed}")
        self._specials = specials
        alternatives = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True))
        self._split = re.compile(f"({alternatives})")
        self._prefixes = frozenset(token[:n] for token in specials for n in range(1, len(token)))
        # A copy of our own: `encode_special_tokens` is a property of the object, and others use the original.
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_padding()
        self._plain.no_truncation()

    @classmethod
    def from_folder(cls, folder: str | Path, *, merge_size: int, max_model_len: int) -> PromptBuilder:
        """From a checkpoint folder. A ``chat_template.json`` beside the tokenizer wins, as in transformers."""
        from transformers import AutoTokenizer  # most processes import this module and never need a tokenizer

        folder = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        template = None
        legacy = folder / "chat_template.json"
        if legacy.exists() and not (folder / "chat_template.jinja").exists():
            template = json.loads(legacy.read_text())["chat_template"]
        return cls(tokenizer, chat_template=template, merge_size=merge_size, max_model_len=max_model_len)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def build(
        self,
        conversation: Conversation,
        keys: Sequence[ContentKey],
        metas: Sequence[MediaMeta],
        *,
        max_tokens: int = 1,
    ) -> Prompt:
        """``keys`` and ``metas`` belong to ``conversation.media``, in order. ``max_tokens``: the answer that must fit
        behind the prompt. Raises PromptTooLong, or BadRequest if the template rejects the messages."""
        if not len(keys) == len(metas) == len(conversation.media):
            raise ValueError(f"{len(conversation.media)} media items, {len(keys)} keys, {len(metas)} metas")
        text, mark = self._render(conversation)
        ids: list[int] = []
        spans: list[MediaSpan] = []
        for piece in self._split.split(text):
            special = self._specials.get(piece)
            if special is None:
                plain = piece.replace(mark, "")
                ids += self._plain.encode(plain, add_special_tokens=False).ids if plain else ()
            elif piece in (IMAGE_PAD, VIDEO_PAD):
                index = len(spans)
                modality = "image" if piece == IMAGE_PAD else "video"
                if index >= len(metas) or metas[index].modality != modality:
                    raise BadRequest(f"the model's chat template places no {modality} at item {index}")
                meta = metas[index]
                length = self.num_tokens(meta.grid)
                spans.append(
                    MediaSpan(keys[index], len(ids), length, meta.grid, meta.modality, meta.second_per_grid, index)
                )
                ids += [special] * length
            else:
                ids.append(special)
        if len(spans) != len(metas):
            raise BadRequest(f"the model's chat template shows {len(spans)} of {len(metas)} media items")
        if len(ids) + max_tokens > self.max_model_len:
            raise PromptTooLong(
                f"{len(ids)} prompt tokens ({sum(span.length for span in spans)} of them vision tokens) and "
                f"{max_tokens} for the answer exceed the model's {self.max_model_len}"
            )
        return Prompt(tuple(ids), tuple(spans))

    def alone(self, key: ContentKey, meta: MediaMeta) -> Prompt:
        """The canonical context of one item: nothing but what the template says. Raises PromptTooLong."""
        return self.build(ALONE[meta.modality], [key], [meta])

    def encode(self, text: str) -> list[int]:
        """Plain text to tokens; special tokens' spellings in it are characters."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def _render(self, conversation: Conversation) -> tuple[str, str]:
        """The template's output, and the mark that breaks special tokens' spellings in it; the mark is to be
        removed after splitting at the special tokens that the template itself wrote."""
        texts = [m["content"] for m in conversation.messages if isinstance(m["content"], str)]
        texts += [
            p["text"]
            for m in conversation.messages
            if not isinstance(m["content"], str)
            for p in m["content"]
            if "text" in p
        ]
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        while any(mark in text for text in texts):
            mark = f"\ue000{secrets.token_hex(8)}\ue001"
        messages = []
        for message in conversation.messages:
            content = message["content"]
            if isinstance(content, str):
                content = self._neutralize(content, mark)
            else:
                content = [
                    {"type": "text", "text": self._neutralize(part["text"], mark)} if "text" in part else part
                    for part in content
                ]
            messages.append({"role": message["role"], "content": content})
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise BadRequest(f"the model's chat template refuses the messages: {error}") from error
        return text, mark

    def _neutralize(self, text: str, mark: str) -> str:
        # At every place where a special token begins, and at the end where one might be completed by what follows.
        text = self._split.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        longest = max(map(len, self._prefixes))
        if any(text[-n:] in self._prefixes for n in range(1, min(longest, len(text)) + 1)):
            text += mark
        return text


class TokenText:
    """What tokens spell. Byte-level BPE only, which is Qwen's. Immutable after construction, thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        alphabet = _byte_alphabet()
        self._bytes: list[bytes] = [b""] * len(tokenizer)
        self.special: frozenset[int] = frozenset(
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        for token, i in tokenizer.get_vocab().items():
            if i in added:
                self._bytes[i] = added[i].encode()
                continue
            try:
                self._bytes[i] = bytes(alphabet[char] for char in token)
            except KeyError:
                raise UnsupportedModel(f"token {i} ({token!r}) is not byte-level BPE") from None

    def raw(self, token_id: int) -> bytes:
        """The token's bytes (a special token's: its spelling); empty for ids beyond the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def visible(self, token_id: int) -> bytes:
        """As ``raw``, but special tokens are silent, as in an answer."""
        return b"" if token_id in self.special else self.raw(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """An answer's text without special tokens; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.visible(i) for i in token_ids).decode("utf-8", "replace")


class Detokenizer:
    """Tokens of one answer to text, as they come.

    Text is held back while it may still be the start of a stop string or half a character. ``stopped``: a stop
    string was found; it and what follows is not returned.
    """

    def __init__(self, tokens: TokenText, stop: Sequence[str] = ()) -> None:
        self._tokens = tokens
        self._stop = tuple(s for s in stop if s)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token."""
        return self._advance(self._utf8.decode(self._tokens.visible(token_id)))

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        text = self._advance(self._utf8.decode(b"", final=True))
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [i for i in (text.find(s) for s in self._stop) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper start of ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's mapping of printable characters to the bytes they stand for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(b): b for b in printable}
    missing = [b for b in range(256) if b not in printable]
    return alphabet | {chr(256 + i): b for i, b in enumerate(missing)}
