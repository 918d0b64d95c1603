"""The tiny model's text encoder: words to tokens to vectors."""

import pytest
import torch

from davae_core.text_encoder import PAD, UNKNOWN, TextEncoder, TextEncoderConfig


@pytest.fixture
def encoder() -> TextEncoder:
    model = TextEncoder(TextEncoderConfig(("red", "blue", "circle", "2"), length=5, context=12, pooled=7)).eval()
    torch.nn.init.normal_(model.position_embedding)
    return model


def encode(encoder: TextEncoder, *texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder(torch.tensor([encoder.pad(encoder.tokenize(text)) for text in texts]))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("red circle", [2, 4]),
        ("  RED,circle!!", [2, 4]),
        ("a blue 2", [UNKNOWN, 3, 5]),
        ("redcircle", [UNKNOWN]),
        ("", []),
        ("?!", []),
    ],
)
def test_words_are_found_whatever_their_case_and_punctuation(
    encoder: TextEncoder, text: str, tokens: list[int]
) -> None:
    assert encoder.tokenize(text) == tokens


def test_prompts_are_filled_and_cut_to_their_length(encoder: TextEncoder) -> None:
    assert encoder.pad([2, 3]) == [2, 3, PAD, PAD, PAD]
    assert encoder.pad([]) == [PAD] * 5
    assert encoder.pad([2, 3, 4, 5, 2, 3]) == [2, 3, 4, 5, 2]


def test_context_and_pooled_have_their_widths(encoder: TextEncoder) -> None:
    context, pooled = encode(encoder, "red circle", "")
    assert context.shape == (2, 5, 12)
    assert pooled.shape == (2, 7)


def test_pooled_is_a_linear_map_of_the_mean_word(encoder: TextEncoder) -> None:
    _, pooled = encode(encoder, "red circle", "red", "circle")
    words = encoder.token_embedding.weight[[2, 4]]
    assert torch.allclose(pooled[0], encoder.pool(words.mean(dim=0)), atol=1e-6)
    assert torch.allclose(pooled[1:].mean(dim=0), pooled[0], atol=1e-6)


def test_padding_does_not_count_and_an_empty_prompt_is_finite(encoder: TextEncoder) -> None:
    before = encode(encoder, "red", "")
    encoder.token_embedding.weight[PAD] += 100
    after = encode(encoder, "red", "")
    assert torch.equal(after[1], before[1])
    assert torch.allclose(after[1][1], encoder.pool.bias)


def test_context_tells_where_a_word_stands(encoder: TextEncoder) -> None:
    context, _ = encode(encoder, "red blue", "blue red")
    assert torch.allclose(
        context[0, 0] - context[1, 1], encoder.position_embedding[0] - encoder.position_embedding[1], atol=1e-6
    )
    assert not torch.allclose(context[0], context[1])
