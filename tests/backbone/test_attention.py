"""Attention, forward and backward, against the formula; and that of the class tokens alone against all of it."""

import pytest
import torch
from torch import Tensor

from dino.backbone.attention import Attention, Sequences, packed, unpacked

LAYOUT = [Sequences(3, 7), Sequences(5, 4), Sequences(2, 1)]
NUM_ROWS = sum(images * length for images, length in LAYOUT)


def made(num_heads: int) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    attention = Attention(12, num_heads).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention, torch.randn(NUM_ROWS, 12, dtype=torch.float64)


def formula(attention: Attention, tokens: Tensor) -> Tensor:
    """Image by image and head by head."""
    outputs = []
    for batch in unpacked(tokens, LAYOUT):
        for image in batch:
            query, key, value = torch.nn.functional.linear(image, attention.qkv.weight, attention.qkv.bias).chunk(3, 1)
            heads = []
            for q, k, v in zip(*(one.chunk(attention.num_heads, 1) for one in (query, key, value)), strict=True):
                heads.append((q @ k.T / q.shape[1] ** 0.5).softmax(dim=1) @ v)
            outputs.append(torch.nn.functional.linear(torch.cat(heads, 1), attention.proj.weight, attention.proj.bias))
    return torch.cat(outputs)


def gradients(output: Tensor, attention: Attention, tokens: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    named = {"tokens": tokens, **dict(attention.named_parameters())}
    found = torch.autograd.grad((output.double() * weights).sum(), list(named.values()))
    return {name: one.double() for name, one in zip(named, found, strict=True)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_it_is_the_formula(num_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    attention, tokens = made(num_heads)
    attention, tokens = attention.to(dtype), tokens.to(dtype).requires_grad_()
    found, expected = attention(tokens, LAYOUT), formula(attention, tokens)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    expected_gradients = gradients(expected, attention, tokens)
    for name, gradient in gradients(found, attention, tokens).items():
        scale = 10 * tolerance * float(expected_gradients["tokens"].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=100 * tolerance, atol=scale, msg=name)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_that_of_the_class_tokens_is_a_part_of_it(num_heads: int) -> None:
    attention, tokens = made(num_heads)
    tokens.requires_grad_()
    found = attention.of_class_tokens(tokens, LAYOUT)
    expected = torch.cat([batch[:, 0] for batch in unpacked(attention(tokens, LAYOUT), LAYOUT)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected_gradients = gradients(expected, attention, tokens)
    for name, gradient in gradients(found, attention, tokens).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("num_heads", [1, 3])
def test_compiled_it_is_the_same_in_one_piece(num_heads: int) -> None:
    attention, tokens = made(num_heads)
    tokens.requires_grad_()
    found, expected = torch.compile(attention, fullgraph=True)(tokens, LAYOUT), attention(tokens, LAYOUT)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected_gradients = gradients(expected, attention, tokens)
    for name, gradient in gradients(found, attention, tokens).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("lengths", [(50, 10), (17, 31), (16, 32)])
@pytest.mark.parametrize("class_tokens", [False, True])
def test_bf16_is_no_further_from_float64_than_plain_autocast(class_tokens: bool, lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layout = [Sequences(8, length) for length in lengths]
    exact = Attention(64, 4).double()
    tokens = torch.randn(8 * sum(lengths), 64, dtype=torch.float64)
    first = torch.cat([batch[:, 0] for batch in unpacked(torch.arange(len(tokens))[:, None], layout)]).flatten()
    attention = Attention(64, 4)
    attention.load_state_dict(exact.state_dict())

    def plain(module: Attention, rows: Tensor) -> Tensor:
        mixed = []
        for part in unpacked(torch.nn.functional.linear(rows, module.qkv.weight, module.qkv.bias), layout):
            query, key, value = part.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)).softmax(dim=-1)
            mixed.append((weights @ value).transpose(1, 2).flatten(2))
        output = torch.nn.functional.linear(packed(mixed)[0], module.proj.weight, module.proj.bias)
        return output[first] if class_tokens else output

    def ours(module: Attention, rows: Tensor) -> Tensor:
        return module.of_class_tokens(rows, layout) if class_tokens else module(rows, layout)

    def all_of(output: Tensor, module: Attention, rows: Tensor) -> dict[str, Tensor]:
        return {"output": output.double(), **gradients(output, module, rows)}

    rows = tokens.requires_grad_()
    expected = all_of(plain(exact, rows), exact, rows)
    rows = tokens.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ours(attention, rows), plain(attention, rows)
    found, of_plain = (all_of(output, attention, rows) for output in outputs)
    for name, of_exact in expected.items():
        far, of_plain_far = ((one[name] - of_exact).norm() / of_exact.norm() for one in (found, of_plain))
        assert far < 1.1 * of_plain_far + 1e-3, name
