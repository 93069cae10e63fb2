import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.exchange.codec import QSGD, Cast, Draws, Identity, RandomK, Sign, TopK, packed, unpacked

SIZES = [12, 5, 40]
CODECS = [Identity(), Cast(torch.bfloat16, torch.float64), TopK(0.2), RandomK(0.2), Sign(), QSGD(7), QSGD(1)]


def draws(seed=0, clients=3):
    return Draws(
        lambda: torch.Generator().manual_seed(seed),
        lambda: [torch.Generator().manual_seed(seed + i) for i in range(clients)],
    )


def values(seed=0, clients=3):
    return torch.randn(clients, sum(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def applied(codec, x, seed=0):
    return codec.decode(codec.encode(x, SIZES, draws(seed, len(x))), SIZES, draws(seed, len(x)))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_nothing_stays_nothing_and_shapes_are_kept(codec):
    x = values()
    assert applied(codec, x).shape == x.shape and applied(codec, x).dtype == x.dtype
    assert (applied(codec, torch.zeros_like(x)) == 0).all()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_every_codec_is_a_contraction_of_every_tensor(codec, seed):
    x = values(seed)
    if isinstance(codec, RandomK | QSGD):  # in the mean over draws
        lost = torch.stack([x - applied(codec, x, 1000 * seed + draw) for draw in range(60)])
    else:
        lost = (x - applied(codec, x, seed))[None]
    for part, left in zip(x.split(SIZES, 1), lost.split(SIZES, 2), strict=True):
        assert (left.square().sum(2).mean(0) < part.square().sum(1)).all()


def test_top_k_keeps_the_largest_of_each_tensor():
    x = torch.tensor([[3.0, -4.0, 1.0, 0.0, 0.1, -0.2]])
    codec = TopK(0.5)
    message = codec.encode(x, [4, 2], draws())
    assert message["value"].tolist() == [[-4.0, 3.0, pytest.approx(-0.2)]]
    assert (message["place"].dtype, message["place"].tolist()) == (torch.uint16, [[1, 0, 1]])
    assert codec.decode(message, [4, 2], draws()).tolist() == [[3.0, -4.0, 0.0, 0.0, 0.0, pytest.approx(-0.2)]]


def test_places_of_large_tensors_take_four_bytes():
    x = torch.zeros(1, 70_000)
    x[0, 69_999] = 1.0
    codec = TopK(1e-5)
    message = codec.encode(x, [70_000], draws())
    assert message["place"].dtype == torch.int32
    assert torch.equal(codec.decode(message, [70_000], draws()), x)


def test_random_k_sends_values_alone_at_places_all_clients_share():
    x, codec = values(), RandomK(0.2)
    message = codec.encode(x, SIZES, draws())
    assert {name: tuple(value.shape) for name, value in message.items()} == {"value": (3, 3 + 1 + 8)}
    sent = codec.decode(message, SIZES, draws()) != 0
    assert (sent == sent[0]).all() and torch.equal(codec.decode(message, SIZES, draws())[sent], x[sent])
    assert not torch.equal(codec.places(SIZES, draws(0)), codec.places(SIZES, draws(1)))


def test_sign_by_hand():
    message = Sign().encode(torch.tensor([[1.0, -3.0, 2.0]]), [2, 1], draws())
    assert message["scale"].tolist() == [[2.0, 2.0]]
    assert message["bits"].tolist() == [[0b101]]
    assert Sign().decode(message, [2, 1], draws()).tolist() == [[2.0, -2.0, 2.0]]


def test_qsgd_is_unbiased_up_to_its_scale_and_clients_round_by_themselves():
    x = torch.tensor([[3.0, -4.0, 0.5]], dtype=torch.float64).repeat(2, 1)
    codec, tau = QSGD(4), 1 + min(3 / 16, 3**0.5 / 4)
    seen = []
    for seed in range(1500):
        own = draws(10 * seed, 2)
        seen.append(codec.decode(codec.encode(x, [3], own), [3], own))
    assert (torch.stack(seen).mean(0) * tau - x).abs().max() < 0.12
    assert any(not torch.equal(each[0], each[1]) for each in seen)


@given(st.integers(1, 8), st.integers(1, 30), st.integers(0, 100))
@settings(max_examples=30)
def test_packing_is_undone(bits, size, seed):
    x = torch.randint(2**bits, (2, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    data = packed(x, bits)
    assert data.shape == (2, -(-size * bits // 8)) and torch.equal(unpacked(data, bits, size), x)
