"""A checkpoint with everything that turns dialogues into tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlcache_dist.config import MediaSettings, ModelSettings
from vlcache_dist.engine.build import Placement
from vlcache_dist.evaluate.cases import Dialogue, Shown
from vlcache_dist.evaluate.dense import DenseModel
from vlcache_dist.media import MediaItem, MediaProcessor, MediaRef
from vlcache_dist.model.rope import mrope_positions
from vlcache_dist.model.weights import Checkpoint
from vlcache_dist.prompt import Conversation, PromptBuilder, TokenText
from vlcache_dist.types import MediaSpan
from vlcache_dist.wire import MediaMeta

if TYPE_CHECKING:
    from vlcache_dist.evaluate.cases import Case
    from vlcache_dist.evaluate.trial import Trial

ENCODE_TOKENS = 2048  #: vision tokens per pass of the tower


@dataclass(frozen=True, slots=True)
class Tokens:
    """A dialogue as the model sees it: ids int64 [n], M-RoPE positions int32 [3, n], spans in order. Generated token i
    (from 0) has position ``n + i + delta`` on every axis."""

    ids: np.ndarray
    positions: np.ndarray
    delta: int
    spans: tuple[MediaSpan, ...]
    pictures: tuple[Shown, ...]


class Workbench:
    """``model`` as in ``LLM``. Encoder outputs of the pictures asked for are kept until ``forget``. ``max_answer``:
    tokens of an answer, the end-of-sequence token included. ``trials``: how many batches are kept as they were recorded
    and computed in full (``trial.of``)."""

    def __init__(
        self, model: str = "tiny", *, device: str = "auto", dtype: str = "auto", max_answer: int = 12, trials: int = 1
    ) -> None:
        settings = ModelSettings.of(model=model, device=device, dtype=dtype)
        placement = Placement.of(settings)
        checkpoint = Checkpoint.open(settings.model, settings.revision)
        self.config, self.fingerprint, self.device = checkpoint.config, checkpoint.fingerprint, placement.device
        self.dense = DenseModel(checkpoint.load_language_model(placement.device, placement.torch_dtype))
        self._tower = checkpoint.load_vision_tower(placement.device, placement.torch_dtype)
        self._processor = MediaProcessor.from_folder(checkpoint.folder, MediaSettings())
        self._prompts = PromptBuilder.from_folder(
            checkpoint.folder, merge_size=self.config.vision.spatial_merge_size, max_model_len=1 << 20
        )
        self._text = TokenText(self._prompts.tokenizer)
        self.max_answer, self.max_trials = max_answer, trials
        self.trials: dict[tuple[Case, ...], Trial] = {}
        self._seen: dict[Shown, tuple[MediaMeta, torch.Tensor]] = {}

    def encode(self, pictures: Iterable[Shown]) -> None:
        """Have the vision tower's output of these pictures at hand."""
        todo, tokens = [], 0
        for picture in dict.fromkeys(pictures):
            if picture in self._seen:
                continue
            item = MediaItem.of("image", (picture.pixels(),), where=picture.path or "picture")
            patches = self._processor.patches(item)
            todo.append((picture, patches))
            tokens += self._processor.num_tokens(patches.grid)
            if tokens >= ENCODE_TOKENS:
                self._forward(todo)
                todo, tokens = [], 0
        if todo:
            self._forward(todo)

    def forget(self) -> None:
        """Drop all encoder outputs."""
        self._seen.clear()

    def embedding(self, picture: Shown) -> torch.Tensor:
        """[n, C]; the picture must have been encoded."""
        return self._seen[picture][1]

    def tokens(self, dialogue: Dialogue) -> Tokens:
        """The prompt of a dialogue whose pictures have been encoded."""
        pictures = dialogue.pictures
        metas = [self._seen[picture][0] for picture in pictures]
        media = tuple(MediaRef("image", (), f"picture {i}") for i in range(len(pictures)))
        keys = [i.to_bytes(32, "big") for i in range(len(pictures))]
        prompt = self._prompts.build(Conversation(dialogue.messages(), media), keys, metas)
        positions, delta = mrope_positions(len(prompt.token_ids), prompt.spans, self.config)
        return Tokens(np.array(prompt.token_ids, np.int64), positions, delta, prompt.spans, pictures)

    def text(self, token_ids: Iterable[int]) -> str:
        """An answer's text, up to the end-of-sequence token."""
        kept: list[int] = []
        for token in token_ids:
            if token in self.config.eos_token_ids:
                break
            kept.append(int(token))
        return self._text.decode(kept).strip()

    def _forward(self, todo: list) -> None:
        rows = self._tower.forward(
            torch.from_numpy(np.concatenate([patches.values for _, patches in todo])),
            [patches.grid for _, patches in todo],
        )
        counts = [self._processor.num_tokens(patches.grid) for _, patches in todo]
        for (picture, patches), part in zip(todo, rows.split(counts), strict=True):
            self._seen[picture] = (MediaMeta("image", patches.grid), part)
