"""Tiny empathy scorers, their encoders and tokenizers, and tables of pairs in the public format."""

import csv
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, DistilBertConfig, PreTrainedTokenizerFast, RobertaConfig

from relllm.evaluation.empathy.scorer import EmpathyScorer

WORDS = "i feel sad and lost today so sorry what happened that is hard tell me more ok fine , . ?"
SIZES = {
    "bert": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "roberta": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
}
KINDS = {"bert": BertConfig, "roberta": RobertaConfig, "distilbert": DistilBertConfig}


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *dict.fromkeys(text.split())])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_encoder(folder: Path, kind: str = "bert", **changes: object) -> str:
    """A tiny encoder with its tokenizer, in a folder."""
    tokenizer = tokenizer_of(WORDS)
    torch.manual_seed(1)
    config = KINDS[kind](
        vocab_size=len(tokenizer), pad_token_id=0, **{**SIZES[kind], "max_position_embeddings": 40, **changes}
    )
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scorer_of(folder: Path, kind: str = "bert", **settings: object) -> EmpathyScorer:
    settings = {"mechanism": "ER", "max_length": 12, **settings}
    model = EmpathyScorer.from_encoder(save_encoder(folder, kind), **settings)
    torch.manual_seed(ord(model.config.mechanism[-1]))
    for name, parameter in model.named_parameters():  # wide, so that a mistake shows
        if "encoder" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def save_scorers(
    folder: Path, mechanisms: tuple[str, ...] = ("ER", "EX"), kind: str = "bert", **level: object
) -> Path:
    """Trained scorers as `relllm empathy train` leaves them: weights, tokenizer, and how good they are."""
    for mechanism in mechanisms:
        model = scorer_of(folder / "encoder", kind, mechanism=mechanism)
        model.save_pretrained(folder / mechanism)
        AutoTokenizer.from_pretrained(folder / "encoder").save_pretrained(folder / mechanism)
        recall = {"0": 0.9, "1": 0.5, "2": 0.5}
        level = {"accuracy": 0.8, "macro_f1": 0.7, "recall": recall, "num_pairs": 9, **level}
        (folder / mechanism / "metrics.json").write_text(
            json.dumps({"test": {"level": level}, "bag_of_words": {"macro_f1": 0.6}})
        )
    return folder


def write_csv(
    path: Path, rows: list[tuple], header: str = "sp_id,rp_id,seeker_post,response_post,level,rationales"
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def imbalanced_csv(path: Path, count: int = 800) -> Path:
    """Pairs as unevenly spread over the levels as EPITOME's (66, 29 and 5 %), whose level one word decides."""
    rng = random.Random(0)
    rows = []
    for index in range(count):
        level = 2 if index % 20 == 0 else 1 if index % 20 < 7 else 0
        words = [
            *rng.choices(["that", "is", "hard", "tell", "me", "more", "fine"], k=3),
            ("ok", "sorry", "what")[level],
        ]
        rng.shuffle(words)
        words += rng.choices(["today", "so", "and", "i", "feel"], k=2)
        rows.append((f"s{index}", f"r{index}", f"i feel sad {index}", " ".join(words), level, ""))
    return write_csv(path, rows)
