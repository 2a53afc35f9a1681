"""MNTP and patch loss against a few lines of numpy; the patch decoder sees everything and shares nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from cocoa.attention import bidirectional
from cocoa.reconstruction import PatchDecoder, patch_loss, predict_tokens

IGNORE = -100
MASK = 4
VOCABULARY, WIDTH = 7, 5

# (B, T): hidden tokens at (0, 1), (0, 4), (1, 2), (2, 1), (2, 2), (2, 3), (2, 4); row 3 has none
LABELS = torch.tensor(
    [
        [IGNORE, 3, IGNORE, IGNORE, 6],
        [IGNORE, IGNORE, 0, IGNORE, IGNORE],
        [IGNORE, 1, 2, 5, 3],
        [IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
)
ROWS = [0, 0, 1, 2, 2, 2, 2]
POSITIONS = [1, 4, 2, 1, 2, 3, 4]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class CountingHead(nn.Linear):
    """A language-model head that notes how many states it is applied to."""

    def __init__(self, width=WIDTH, vocabulary=VOCABULARY):
        super().__init__(width, vocabulary, bias=False)
        self.applied_to = 0

    def forward(self, states):
        self.applied_to += states.shape[:-1].numel()
        return super().forward(states)


@pytest.fixture
def states():
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def head():
    head = CountingHead()
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1)))
    return head


def numpy_mntp(states, weight, labels, mask_token_id, before=1):
    """The token at i from the state at i - before; softmax over all tokens but the mask token."""
    losses, correct = [], []
    others = [token for token in range(len(weight)) if token != mask_token_id]
    for b in range(labels.shape[0]):
        for i in range(1, labels.shape[1]):
            target = labels[b, i]
            if target == IGNORE:
                continue
            logits = weight @ states[b, i - before]
            normaliser = sum(np.exp(logits[token]) for token in others)
            losses.append(-np.log(np.exp(logits[target]) / normaliser))
            correct.append(max(others, key=lambda token: logits[token]) == target)
    return losses, correct


@pytest.mark.parametrize("shifted", [True, False])
def test_mntp_and_mlm_equal_numpy(states, head, shifted):
    found = predict_tokens(states, head, LABELS, [MASK], shifted)
    losses, correct = numpy_mntp(
        states.detach().double().numpy(), head.weight.detach().double().numpy(), LABELS.numpy(), MASK, int(shifted)
    )
    np.testing.assert_allclose(found.losses.detach().numpy(), losses, rtol=1e-5)
    assert found.correct.tolist() == correct
    assert found.rows.tolist() == ROWS
    assert found.positions.tolist() == POSITIONS
    assert found.losses.dtype == torch.float32


def test_the_head_is_applied_to_hidden_tokens_only(states, head):
    predict_tokens(states, head, LABELS, [MASK])
    assert head.applied_to == 7


def test_the_mask_token_is_not_in_the_softmax():
    """Its logit is the greatest by far, and changes nothing: two tokens are left, equally likely."""
    head = CountingHead(1, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [0.0], [50.0]]))
    labels = torch.tensor([[IGNORE, 0]])
    found = predict_tokens(torch.ones(1, 2, 1), head, labels, excluded_ids=[2])
    assert found.losses.item() == pytest.approx(0.693147, abs=1e-6)  # ln 2
    assert found.correct.tolist() == [True]
    found.losses.sum().backward()
    assert head.weight.grad[2].item() == 0


def test_a_prediction_is_read_one_position_earlier():
    """An identity head: the state at i - 1 says what stands at i, and the other states say something else."""
    head = CountingHead(4, 4)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
    states = 20 * torch.eye(4)[torch.tensor([[2, 1, 3, 3]])]  # (1, 4, 4): says 2, 1, 3, 3
    labels = torch.tensor([[IGNORE, 2, 1, 2]])
    found = predict_tokens(states, head, labels, excluded_ids=[0])
    assert found.correct.tolist() == [True, True, False]
    np.testing.assert_allclose(found.losses.detach().numpy(), [0, 0, 20], atol=1e-4)


def test_a_label_in_the_first_column_is_ignored(states, head):
    labels = LABELS.clone()
    labels[:, 0] = 2
    found = predict_tokens(states, head, labels, [MASK])
    assert found.rows.tolist() == ROWS
    assert found.positions.tolist() == POSITIONS
    assert head.applied_to == 7


def test_only_the_state_before_a_hidden_token_gets_a_gradient(states, head):
    predict_tokens(states, head, LABELS, [MASK]).losses.sum().backward()
    touched = states.grad.abs().sum(-1) > 0
    assert touched.int().tolist() == [
        [1, 0, 0, 1, 0],
        [0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]


def test_nothing_hidden_is_no_loss(states, head):
    found = predict_tokens(states, head, torch.full((4, 5), IGNORE), [MASK])
    assert [len(field) for field in found] == [0, 0, 0, 0, 0]
    found.losses.sum().backward()
    assert states.grad.abs().sum() == 0


def test_bfloat16_states_give_a_float32_loss(states, head):
    found = predict_tokens(states.bfloat16(), head.bfloat16(), LABELS, [MASK])
    assert found.losses.dtype == torch.float32


def test_patch_loss_equals_numpy():
    noise = np.random.default_rng(0)
    predicted, target = noise.normal(size=(3, 8)), noise.normal(size=(3, 8))
    expected = 0.0
    for unit in range(3):
        expected += sum((predicted[unit, i] - target[unit, i]) ** 2 for i in range(8)) / 8
    found = patch_loss(torch.tensor(predicted), torch.tensor(target))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_patch_loss_by_hand():
    predicted = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    target = torch.tensor([[0.0, 0.0], [4.0, 3.0]])
    assert patch_loss(predicted, target).item() == (1 + 4) / 2 + (16 + 0) / 2
    assert patch_loss(predicted.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert patch_loss(torch.zeros(0, 2), torch.zeros(0, 2)).item() == 0


# --- PatchDecoder ------------------------------------------------------------------------------------

UNIT = 4 * 1176


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def backbone(request, tiny_backbone):
    return tiny_backbone(request.param, attention="bidirectional")


def decode(decoder, states, attention_mask, hidden):
    """Text-like positions: 0, 1, 2, ... over the real tokens."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    return decoder(states, bidirectional(attention_mask), positions, hidden)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_decoder_is_not_causal(tiny_backbone, attention):
    """Also where it is copied from a causal backbone."""
    decoder = PatchDecoder(tiny_backbone(attention=attention).model.model.language_model, UNIT)
    states = torch.randn(1, 6, 64)
    hidden = torch.tensor([[True, False, False, False, False, False]])
    first = decode(decoder, states, torch.ones(1, 6, dtype=torch.long), hidden)
    states[0, -1] += 1
    changed = decode(decoder, states, torch.ones(1, 6, dtype=torch.long), hidden)
    assert first.shape == (1, UNIT)
    assert (first - changed).abs().max() > 1e-4


def test_the_decoder_predicts_hidden_units_in_row_major_order(backbone):
    decoder = PatchDecoder(backbone.model.model.language_model, UNIT)
    states = torch.randn(2, 4, 64)
    real = torch.ones(2, 4, dtype=torch.long)
    everything = decode(decoder, states, real, torch.ones(2, 4, dtype=torch.bool)).view(2, 4, UNIT)
    some = decode(decoder, states, real, torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.bool))
    torch.testing.assert_close(some, torch.stack([everything[0, 1], everything[0, 3], everything[1, 0]]))


def test_the_decoder_is_a_copy_of_the_middle_layer_and_shares_nothing(backbone):
    language_model = backbone.model.model.language_model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    decoder = PatchDecoder(language_model, UNIT)
    middle = language_model.layers[1].state_dict()  # of three
    copied = decoder.layer.state_dict()
    assert middle.keys() == copied.keys()
    assert all(torch.equal(middle[name], copied[name]) for name in middle)

    assert all(parameter.requires_grad for parameter in decoder.parameters()), "though the backbone is frozen"
    memory = {tensor.data_ptr() for tensor in (*backbone.model.parameters(), *backbone.model.buffers())}
    assert memory.isdisjoint(tensor.data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers()))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_decoder_does_not_see_padding(backbone, side):
    decoder = PatchDecoder(backbone.model.model.language_model, UNIT)
    states, padding = torch.randn(1, 5, 64), torch.randn(1, 3, 64)
    hidden = torch.tensor([[True, False, True, False, True]])
    plain = decode(decoder, states, torch.ones(1, 5, dtype=torch.long), hidden)

    def padded(sequence, fill):
        return torch.cat([fill, sequence] if side == "left" else [sequence, fill], dim=1)

    none = torch.zeros(1, 3, dtype=torch.long)
    found = decode(
        decoder,
        padded(states, padding),
        padded(torch.ones(1, 5, dtype=torch.long), none),
        padded(hidden, none.bool()),
    )
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)
