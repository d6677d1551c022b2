"""Prompt cleaning and tokenisation, as upstream's ``wan/modules/tokenizers.py``."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
_SHOWN = 40  # characters of what is kept, before the cut


def clean_text(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice escaped ones too) and collapse white space.

    Letter case stays: UMT5 is case-sensitive.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class HuggingfaceTokenizer:
    """Turns texts into token ids of one length.

    Args:
        name: folder of a tokenizer, such as ``google/umt5-xxl`` of a checkpoint folder.
        seq_len: length that every text is padded or cut to, end token kept; ``None`` pads and cuts nothing.
        clean: ``"whitespace"`` for :func:`clean_text`, ``None`` to take texts as they are.
        local_files_only: ``False`` also accepts a name on the Hugging Face hub. Remote code never runs.

    Raises:
        ValueError: ``name`` is not a folder with a tokenizer, or ``clean`` is unknown.
    """

    def __init__(
        self,
        name: str | Path,
        seq_len: int | None = None,
        clean: str | None = "whitespace",
        *,
        local_files_only: bool = True,
    ) -> None:
        if clean not in (None, "whitespace"):
            raise ValueError(f"tokenizer: unknown cleaning {clean!r}; use 'whitespace' or None")
        if local_files_only and not Path(name).is_dir():
            raise ValueError(f"{name}: no such tokenizer folder; download it with the checkpoint")
        self.name = str(name)
        self.seq_len = seq_len
        self.clean = clean
        self._told: set[str] = set()
        self.tokenizer = _load(self.name, local_files_only)
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"{name}: the tokenizer has no padding token; download it again")
        self.vocab_size: int = self.tokenizer.vocab_size

    def __call__(
        self, sequence: str | Sequence[str], return_mask: bool = False, **options: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            sequence: one text or several.
            return_mask: also return the attention mask.
            **options: passed on to the transformers tokenizer.

        Returns:
            Token ids [texts, seq_len]; with ``return_mask`` a pair with the mask, 0 for padding.
        """
        texts = [sequence] if isinstance(sequence, str) else list(sequence)
        if self.clean is not None:
            texts = [clean_text(text) for text in texts]
        for text in texts:
            self._tell_of_cut(text)
        fixed = {} if self.seq_len is None else {"padding": "max_length", "max_length": self.seq_len}
        settings = {"return_tensors": "pt", "truncation": self.seq_len is not None, **fixed, **options}
        tokens = self.tokenizer(texts, **settings)
        if return_mask:
            return tokens["input_ids"], tokens["attention_mask"]
        return tokens["input_ids"]

    def _tell_of_cut(self, text: str) -> None:
        """Warns, once for a text, of what lies beyond the tokens that are kept: it has no effect."""
        # A token stands for at least one byte, so most texts need not be counted.
        if self.seq_len is None or len(text.encode()) < self.seq_len or text in self._told:
            return
        ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(ids) <= self.seq_len:
            return
        self._told.add(text)
        kept = " ".join(self.tokenizer.decode(ids[: self.seq_len - 1]).replace("▁", " ").split())
        logger.warning(
            "the text encoder reads %d tokens of a prompt: the last %d of %d have no effect, all after %r",
            *(self.seq_len, len(ids) - self.seq_len, len(ids), f"...{kept[-_SHOWN:]}"),
        )


def _load(name: str, local_files_only: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer of transformers 5 rebuilds a T5 tokenizer from its vocabulary, with T5's unknown token and
    # splitting instead of UMT5's; the general class takes tokenizer.json as it is
    loader = PreTrainedTokenizerFast if (Path(name) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return loader.from_pretrained(name, local_files_only=local_files_only, trust_remote_code=False)
    except BaseException as error:  # the Rust parser raises nothing narrower on a damaged file, and panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: not a readable tokenizer folder ({reason}); download it again") from error
