"""Prompt cleaning and tokenisation with a tokenizer built on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from wan.modules.tokenizers import HuggingfaceTokenizer, clean_text

PIECES = ["<pad>", "</s>", "<s>", "<unk>", "▁", "▁red", "▁Red", "▁cat", "s", "&"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder like google/umt5-xxl: Unigram, unknown token 3, declared as a T5 tokenizer."""
    path = tmp_path_factory.mktemp("google") / "umt5-tiny"
    path.mkdir()
    scores = [(piece, 0.0 if index < 4 else -1.0) for index, piece in enumerate(PIECES)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(PIECES[:4])
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **special}))
    return path


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A\tRed \n\n cat ", "A Red cat"),
        ("Tom &amp;amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("一只\u3000猫", "一只 猫"),
        (" \n ", ""),
    ],
)
def test_clean_text(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_pads_and_masks(folder: Path) -> None:
    tokenizer = HuggingfaceTokenizer(folder, seq_len=6)
    ids, mask = tokenizer(["red cats", ""], return_mask=True)
    assert ids.tolist() == [[5, 7, 8, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64
    assert tokenizer.vocab_size == len(PIECES)


def test_what_is_cut_off_a_prompt_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = HuggingfaceTokenizer(folder, seq_len=4)
    for _ in range(2):
        tokenizer(["red cat red", "red cat red Red cat", ""])
    (line,) = caplog.messages
    assert "reads 4 tokens" in line and "the last 2 of 6" in line and "red cat red'" in line
    HuggingfaceTokenizer(folder)("red cat red Red cat")
    assert len(caplog.messages) == 1


def test_truncation_keeps_the_end_token(folder: Path) -> None:
    ids, mask = HuggingfaceTokenizer(folder, seq_len=3)("red red red red", return_mask=True)
    assert ids.tolist() == [[5, 5, 1]]
    assert mask.tolist() == [[1, 1, 1]]


def test_cleans_but_keeps_the_case(folder: Path) -> None:
    text = " Red \n cat&amp;amp;s "
    assert HuggingfaceTokenizer(folder)(text).tolist() == [[6, 7, 9, 8, 1]]
    raw = HuggingfaceTokenizer(folder, clean=None)(text).tolist()
    assert raw != HuggingfaceTokenizer(folder)(text).tolist()


def test_unknown_characters_get_the_unknown_token_of_the_file(folder: Path) -> None:
    assert HuggingfaceTokenizer(folder)("red猫").tolist() == [[5, 3, 1]]


def test_agrees_with_the_tokenizer_file(folder: Path) -> None:
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("red cats", "Red  cat & cats", "猫 red", ""):
        assert HuggingfaceTokenizer(folder)(text).tolist() == [expected.encode(clean_text(text)).ids]


def test_options_reach_the_library(folder: Path) -> None:
    assert HuggingfaceTokenizer(folder)("red", add_special_tokens=False).tolist() == [[5]]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "google" / "umt5-xxl"
    with pytest.raises(ValueError, match=f"^{absent}: no such tokenizer folder; download"):
        HuggingfaceTokenizer(absent, seq_len=8)


def test_damaged_and_empty_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}: not a readable tokenizer folder") as caught:
        HuggingfaceTokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:100])
    with pytest.raises(ValueError, match=f"^{tmp_path}: not a readable tokenizer folder"):
        HuggingfaceTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="no padding token"):
        HuggingfaceTokenizer(tmp_path)


def test_unknown_cleaning(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown cleaning 'lower'"):
        HuggingfaceTokenizer(folder, clean="lower")
