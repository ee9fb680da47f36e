"""Empathy scorers: the model against a computation by loops, encoders, pairs and their split."""

import math
from pathlib import Path

import pytest
import torch
from empathy_scorers import KINDS, WORDS, save_encoder, scorer_of, tokenizer_of, write_csv
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    ByT5Tokenizer,
    GPT2Config,
    RobertaConfig,
    T5Config,
)

from relllm.evaluation.empathy.epitome import (
    Pair,
    PairCollator,
    encode_pairs,
    encode_posts,
    find_rationale,
    read_pairs,
    read_posts,
    split_pairs,
)
from relllm.evaluation.empathy.scorer import IGNORED, EmpathyScorer, EmpathyScorerConfig


def pair(line: int, seeker: str, response: str = "ok", level: int = 0, spans: tuple | None = ()) -> Pair:
    return Pair(line, seeker, response, level, spans)


PAIRS = [
    pair(2, "i feel sad and lost today", "so sorry . tell me more", 2, ((0, 8),)),
    pair(3, "i feel sad", "that is hard , what happened to you today so sorry . ok fine ?", 1, ((0, 12),)),
    pair(4, "lost", "ok", 0),
    pair(5, "today", "fine , sorry", 1, None),
]


def batch_of(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    return PairCollator(0)(encode_pairs(pairs, tokenizer_of(WORDS), 12))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_are_those_of_a_computation_by_loops(tmp_path: Path, kind: str) -> None:
    model = scorer_of(tmp_path, kind)
    with torch.no_grad():
        output = model(**batch_of(PAIRS))
        tokens, level_terms, token_terms = tokenizer_of(WORDS), [], []
        for index, one in enumerate(PAIRS):
            seeker, response = (
                tokens(text, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
                for text in (one.seeker_post, one.response_post)
            )
            keys = model.seeker_encoder(seeker).last_hidden_state[0]
            rows = model.response_encoder(response).last_hidden_state[0]
            fused = []
            for row in rows:
                query = model.attention.query(row)
                weights = [math.exp(float(query @ model.attention.key(key)) / math.sqrt(16)) for key in keys]
                value = sum(w * model.attention.value(key) for w, key in zip(weights, keys, strict=True)) / sum(
                    weights
                )
                fused.append(row + model.attention.output(value))
            head = model.level_head
            level = head.out_proj(torch.relu(head.dense(fused[0])))
            torch.testing.assert_close(output.level_logits[index], level, atol=1e-4, rtol=1e-4)
            level_terms.append(-float(torch.log_softmax(level, -1)[one.level]))
            offsets = tokens(one.response_post, truncation=True, max_length=12, return_offsets_mapping=True)
            for position in range(1, len(rows) - 1):
                found = model.rationale_head(fused[position])
                torch.testing.assert_close(output.rationale_logits[index, position], found, atol=1e-4, rtol=1e-4)
                if one.spans is not None:
                    begin, end = offsets["offset_mapping"][position]
                    inside = any(begin < stop and start < end for start, stop in one.spans)
                    token_terms.append(-float(torch.log_softmax(found, -1)[int(inside)]))
    assert float(output.level_loss) == pytest.approx(sum(level_terms) / len(level_terms), rel=1e-4)
    assert float(output.rationale_loss) == pytest.approx(sum(token_terms) / len(token_terms), rel=1e-4)
    assert float(output.loss) == pytest.approx(float(output.level_loss) + 0.5 * float(output.rationale_loss), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_its_pairs_give_one_by_one(tmp_path: Path, kind: str) -> None:
    model = scorer_of(tmp_path, kind)
    together = model(**batch_of(PAIRS))
    for index, one in enumerate(PAIRS):
        alone = model(**batch_of([one]))
        length = alone.rationale_logits.shape[1]
        torch.testing.assert_close(together.level_logits[index], alone.level_logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            together.rationale_logits[index, :length], alone.rationale_logits[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_a_scorer_is_exactly_the_same(tmp_path: Path, kind: str) -> None:
    model = scorer_of(tmp_path / "encoder", kind, mechanism="EX", rationale_loss_weight=0.25)
    model.save_pretrained(tmp_path / "scorer")
    again = AutoModel.from_pretrained(tmp_path / "scorer")
    assert type(again) is EmpathyScorer
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert str(tmp_path) not in (tmp_path / "scorer" / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "scorer").encoder_config.model_type == kind
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(again(**batch_of(PAIRS)).level_logits, model(**batch_of(PAIRS)).level_logits)


def test_both_encoders_start_as_the_pretrained_one(tmp_path: Path) -> None:
    model = EmpathyScorer.from_encoder(save_encoder(tmp_path), mechanism="IP", max_length=12)
    pretrained = AutoModel.from_pretrained(tmp_path).state_dict()
    for encoder in (model.seeker_encoder, model.response_encoder):
        assert all(torch.equal(pretrained[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not any("pooler" in name for name in model.state_dict())


def test_a_frozen_encoder_does_not_train_and_has_no_dropout(tmp_path: Path) -> None:
    model = scorer_of(tmp_path)
    model.freeze_seeker_encoder()
    model.train()
    assert not model.seeker_encoder.training and model.response_encoder.training and model.level_head.training
    model(**batch_of(PAIRS)).loss.backward()
    assert all(parameter.grad is None for parameter in model.seeker_encoder.parameters())
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "seeker" not in name)


def test_without_a_labelled_token_the_rationale_loss_is_zero_with_a_gradient(tmp_path: Path) -> None:
    output = scorer_of(tmp_path)(**batch_of(PAIRS[3:]))
    assert output.rationale_loss.item() == 0 and output.rationale_loss.requires_grad
    assert output.loss.item() == pytest.approx(output.level_loss.item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_config": GPT2Config()}, "'gpt2' model is no encoder"),
        ({"encoder_config": T5Config()}, "'t5' model is no encoder"),
        ({"encoder_config": BertConfig(max_position_embeddings=63)}, "the encoder's 63 positions, got 64"),
        ({"encoder_config": RobertaConfig(max_position_embeddings=65, pad_token_id=1)}, "63 positions, got 64"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmpathyScorerConfig(**settings)


def test_roberta_takes_as_many_tokens_as_the_limit_allows(tmp_path: Path) -> None:
    model = scorer_of(tmp_path, "roberta", max_length=39)  # 40 positions, of which padding takes one
    text = " ".join(["sad"] * 60)
    batch = PairCollator(0)(encode_posts([(text, text)], tokenizer_of(WORDS), 39))
    assert batch["response_input_ids"].shape == (1, 39) and model(**batch).level_logits.isfinite().all()


def test_rationales_are_labelled_by_the_characters_of_the_tokens() -> None:
    batch = batch_of(PAIRS)
    # <s> so sorry . tell me more </s>
    assert batch["rationale_labels"][0].tolist()[:8] == [IGNORED, 1, 1, 0, 0, 0, 0, IGNORED]
    assert (batch["rationale_labels"][0, 8:] == IGNORED).all()
    # <s> that is hard , what happened to you today so </s>: cut to 12 tokens
    assert batch["rationale_labels"][1].tolist() == [IGNORED, 1, 1, 1, *[0] * 7, IGNORED]
    assert (batch["rationale_labels"][3] == IGNORED).all()


def test_a_rationale_is_found_whatever_its_case_and_white_space() -> None:
    response = "Oh no (really?).  I am\nSORRY to hear that. i am sorry"
    assert find_rationale("i am sorry", response) == (len(response) - 10, len(response))  # as written goes before
    assert response[slice(*find_rationale("I am sorry to", response))] == "I am\nSORRY to"
    assert response[slice(*find_rationale("(really?).", response))] == "(really?)."
    assert find_rationale("not there", response) is None


def test_reading_removes_duplicates_and_counts_what_it_drops(tmp_path: Path) -> None:
    rows = [
        ("a", "1", "I am sad, today", "Sorry. I am too", "2.0", "Sorry|I am too|"),
        ("a", "1", "I am sad, today ", "Sorry. I am too", 1, "Sorry|"),  # a duplicate of another level
        ("a", "2", "I am sad, today", "Ok", 0, ""),
        ("b", "3", "Lost", "Ok", 0, ""),
        ("b", "3", "Lost", "Ok", 0, ""),
        ("c", "4", "  ", "Ok", 0, ""),
        ("d", "5", "Why", "", 0, ""),
        ("e", "6", "Two\nlines", "Tell me", 1, "Tell him|"),
        ("f", "7", "Help", "Tell me", 1, ""),
    ]
    pairs, report = read_pairs(write_csv(tmp_path / "pairs.csv", rows))
    assert [one.line for one in pairs] == [2, 4, 5, 10, 11]  # a post of two lines
    assert pairs[0] == Pair(2, "I am sad, today", "Sorry. I am too", 2, ((0, 5), (7, 15)))
    assert pairs[3].spans is None and pairs[4].spans is None and pairs[1].spans == ()
    assert report == {
        "num_rows": 9,
        "num_pairs": 5,
        "duplicates_removed": {"count": 2, "lines": [3, 6]},
        "duplicates_with_another_level": {"count": 1, "lines": [3]},
        "dropped": {
            "empty seeker_post": {"count": 1, "lines": [7]},
            "empty response_post": {"count": 1, "lines": [8]},
        },
        "rationale_not_known": {
            "rationale not in the response": {"count": 1, "lines": [10]},
            "level without a rationale": {"count": 1, "lines": [11]},
        },
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seeker_post,response_post,level\na,b,0\n", r"lacks the columns \['rationales'\]"),
        ("", "lacks the columns"),
        (
            "seeker_post,response_post,level,rationales\na,b,0,\na,c,3,\n",
            "bad.csv:3: level is '3', expected 0, 1 or 2",
        ),
        ("seeker_post,response_post,level,rationales\na,b,,\n", "bad.csv:2: level is '', expected"),
        ("seeker_post,response_post,level,rationales\na,b,nan,\n", "bad.csv:2: level is 'nan', expected"),
        ("seeker_post,response_post,level,rationales\na,b,c,0,\n", "bad.csv:2 has another number of fields"),
        ("seeker_post,response_post,level,rationales\na,b\n", "bad.csv:2 has another number of fields"),
        ('seeker_post,response_post,level,rationales\n"a"b,c,0,\n', "bad.csv: no CSV after line 1"),
        ("seeker_post,response_post,level,rationales\n\udcff,b,0,\n", "bad.csv is not UTF-8. Save it as UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_a_tokenizer_that_knows_no_characters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ByT5Tokenizer does not say .*a fast tokenizer \(tokenizer\.json\)"):
        encode_pairs(PAIRS, ByT5Tokenizer(), 12)


def many_pairs(count: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    levels = torch.multinomial(torch.tensor([0.6, 0.1, 0.3]), count, replacement=True, generator=generator)
    posts = torch.randint(0, count // 2, (count,), generator=generator)
    spelled = [f"Post {post}" if line % 2 else f"post  {post}" for line, post in enumerate(posts.tolist())]
    return [pair(line, spelled[line], f"response {line}", level) for line, level in enumerate(levels.tolist())]


@pytest.mark.parametrize("seed", range(5))
def test_no_seeker_post_is_in_two_splits_and_no_pair_is_lost(seed: int) -> None:
    pairs = many_pairs(300)
    splits = split_pairs(pairs, seed=seed)
    posts = {name: {one.seeker_post.lower().replace("  ", " ") for one in of} for name, of in splits.items()}
    assert not posts["train"] & posts["validation"] and not posts["train"] & posts["test"]
    assert not posts["validation"] & posts["test"]
    assert sorted(one.line for of in splits.values() for one in of) == list(range(300))
    assert all({one.level for one in of} == {0, 1, 2} for of in splits.values())
    assert 0.15 < len(posts["test"]) / sum(map(len, posts.values())) < 0.25


def test_the_split_follows_the_seed_and_not_the_order_of_the_rows() -> None:
    pairs = many_pairs(100)
    lines = [{one.line for one in split_pairs(of, seed=3)["test"]} for of in (pairs, pairs[::-1])]
    assert lines[0] == lines[1] != {one.line for one in split_pairs(pairs, seed=4)["test"]}


def test_too_few_posts_and_shares_without_a_rest_are_refused() -> None:
    with pytest.raises(ValueError, match="1 seeker posts are too few"):
        split_pairs([pair(1, "a"), pair(2, "a", "b")], seed=0)
    with pytest.raises(ValueError, match="the sum below 1"):
        split_pairs(many_pairs(50), seed=0, validation_share=0.5, test_share=0.5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "", "ends in .csv or .jsonl"),
        ("t.csv", "seeker_post,text\na,b\n", r"lacks the columns \['response_post'\]"),
        ("t.csv", "seeker_post,response_post\n ,b\n", "t.csv:2: seeker_post is empty"),
        ("t.csv", "seeker_post,response_post\n", "has no rows"),
        ("t.jsonl", '{"seeker_post": "a"}\n', "t.jsonl:1: response_post is None"),
        ("t.jsonl", '{"seeker_post": "a", "response_post": 3}\n', "t.jsonl:1: response_post is 3"),
        ("t.jsonl", '{"seeker_post": "a"\n', "t.jsonl, line 1 is not JSON"),
        ("t.jsonl", "[]\n", "t.jsonl, line 1 is list, expected one object"),
    ],
)
def test_a_table_that_cannot_be_scored_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_posts(tmp_path / name)


def test_attention_leaves_out_the_padding_of_the_seekers_post(tmp_path: Path) -> None:
    attention = scorer_of(tmp_path).attention
    response, seeker = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]])
    short = attention(response, seeker[:, :3], mask[:, :3])
    torch.testing.assert_close(attention(response, seeker, mask), short)
    assert not torch.allclose(attention(response, seeker, torch.ones_like(mask)), short)
    scores = attention.query(response) @ attention.key(seeker[:, :3]).mT / 4
    torch.testing.assert_close(short, attention.output(F.softmax(scores, -1) @ attention.value(seeker[:, :3])))
