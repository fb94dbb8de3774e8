from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from maskgit import PartitionTransformer2DModel
from maskgit.masking import MaskedDataset, masked_token_loss
from maskgit.schedulers.scheduling_maskgit_utils import MASKING_SCHEDULES, masking_ratio


GOLDEN = Path(__file__).parent / "golden"
ITEMS = [{"input_ids": torch.arange(64).view(8, 8)}] * 4000


@pytest.mark.parametrize("schedule, mean", [("arccos", 0.637), ("cosine", 0.637), ("linear", 0.5), ("square", 0.667)])
def test_share_of_masked_tokens_follows_the_schedule(schedule, mean):
    dataset = MaskedDataset(ITEMS, 64, schedule, label_drop=0.1, seed=0)
    items = [dataset[i] for i in range(len(dataset))]
    assert abs(torch.stack([item["mask"] for item in items]).float().mean() - mean) < 0.015
    assert abs(torch.stack([item["drop_label"] for item in items]).float().mean() - 0.1) < 0.015


def test_an_image_has_the_same_mask_in_the_same_epoch_only():
    dataset, again = (MaskedDataset(ITEMS, 64, "arccos", label_drop=0.1, seed=0) for _ in range(2))
    again[3]  # what else was drawn before does not matter
    assert torch.equal(dataset[7]["mask"], again[7]["mask"])
    assert not torch.equal(dataset[7]["mask"], dataset[8]["mask"])
    again.set_epoch(1)
    assert not torch.equal(dataset[7]["mask"], again[7]["mask"])


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="`masking_schedule` is 'cosin'.*cosine"):
        MaskedDataset(ITEMS, 64, "cosin", label_drop=0.1, seed=0)


@pytest.mark.parametrize("schedule", [*MASKING_SCHEDULES, "pow2.5"])
def test_masking_ratio_falls_from_all_to_none(schedule):
    ratio = masking_ratio(torch.linspace(0, 1, 101), schedule, num_tokens=256)
    assert ratio[-1] == 0 and ratio[0] > 0.99
    assert (ratio.diff() <= 0).all()


class Oracle(torch.nn.Module):
    """Predicts token 5 everywhere, with a logit of 3, over a vocabulary of 8 codes and the mask token."""

    def forward(self, input_ids, class_labels, full_vocabulary, return_dict):
        self.input_ids, self.class_labels = input_ids, class_labels
        logits = torch.zeros(*input_ids.shape, 8 + full_vocabulary)
        logits[..., 5] = 3.0
        return (logits,)


def test_loss_is_of_the_positions_asked_for_and_the_transformer_sees_no_masked_token():
    tokens = torch.tensor([[5, 5, 1, 2]])
    mask = torch.tensor([[True, False, True, False]])
    right = torch.log(torch.tensor(8 + torch.e**3)) - 3
    wrong = right + 3
    oracle = Oracle()
    arguments = {"codebook_size": 8, "num_classes": 10, "label_smoothing": 0.0}
    labels, drop = torch.tensor([4]), torch.tensor([True])

    loss, count, correct = masked_token_loss(oracle, tokens, labels, mask, drop, loss_on="all", **arguments)
    torch.testing.assert_close(loss, 2 * right + 2 * wrong)
    assert count == 4 and correct == 1
    assert oracle.input_ids.tolist() == [[8, 5, 8, 2]] and oracle.class_labels.tolist() == [10]

    loss, count, _ = masked_token_loss(oracle, tokens, labels, mask, ~drop, loss_on="masked", **arguments)
    torch.testing.assert_close(loss, right + wrong)
    assert count == 2 and oracle.class_labels.tolist() == [4]


def test_published_partition(monkeypatch):
    """The group of each token: the mask of the others, drawn as the published code draws it."""
    golden = load_file(GOLDEN / "pgm" / "partition.safetensors")
    torch.testing.assert_close(masking_ratio(golden["in.r"], "arccos", 16), golden["out.rate"])
    # Of BOS, at the start, there is no draw here: it is in group 0.
    draws = torch.cat([golden["in.r"][:, None], torch.zeros(6, 1), golden["in.uniform"][:, 1:]], dim=1).numpy()
    monkeypatch.setattr("numpy.random.default_rng", lambda seed: SimpleNamespace(random=lambda _: draws[seed[-1]]))
    dataset = MaskedDataset(ITEMS, 16, "arccos", label_drop=0.1, seed=0)
    groups = torch.stack([dataset[i]["mask"] for i in range(6)])
    assert torch.equal(groups.long(), golden["out.group_idxs"][:, 1:])


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_partition_transformer_is_given_all_tokens_and_the_groups(wrap, monkeypatch):
    model = PartitionTransformer2DModel(
        codebook_size=8,
        num_classes=10,
        sample_size=2,
        hidden_size=16,
        num_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
    )
    tokens = torch.tensor([[5, 5, 1, 2]])
    mask = torch.tensor([[True, False, True, False]])
    given = {}
    logits = torch.arange(9.0)
    monkeypatch.setattr(model, "forward", lambda **inputs: given.update(inputs) or (logits.expand(1, 4, 9),))
    loss, count, correct = masked_token_loss(
        wrap(model), tokens, torch.tensor([4]), mask, torch.tensor([True]), 8, 10, loss_on="all", label_smoothing=0.0
    )
    assert torch.equal(given["input_ids"], tokens) and torch.equal(given["group_ids"], mask)
    assert given["class_labels"].tolist() == [10] and given["full_vocabulary"]
    # All positions count, among the codes and BOS.
    torch.testing.assert_close(loss, 4 * logits.logsumexp(0) - logits[[5, 5, 1, 2]].sum())
    assert count == 4 and correct == 0
