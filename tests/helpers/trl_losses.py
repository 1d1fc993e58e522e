"""TRL's own losses of preferences, called without its trainers: on stand-ins that hold what their code reads."""

import collections
from types import SimpleNamespace

import pytest


def _same(x):
    return x


def _accelerator():
    return SimpleNamespace(device="cpu", gather=_same, gather_for_metrics=_same)


def dpo(loss_type, log_probs, counts, reference, beta, label_smoothing=0.0):
    """The loss of `DPOTrainer._compute_loss`, its gradient and its metrics.

    Args:
        loss_type: TRL's name.
        log_probs: [B, 2, T].
        counts: [B, 2, T], 1 at tokens of answers.
        reference: [B, 2], sums.
        beta: as in TRL.
        label_smoothing: as in TRL.

    Returns:
        `(loss, gradient [B, 2, T], metrics)`.
    """
    trainer = pytest.importorskip("trl").DPOTrainer
    import torch

    tokens = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
    flat = tokens.transpose(0, 1).reshape(-1, tokens.shape[2])  # all chosen, then all rejected
    mask = torch.tensor(counts).long().transpose(0, 1).reshape(flat.shape)
    metrics = collections.defaultdict(list)
    self = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"eval": metrics},
        _total_train_tokens=0,
    )
    ids = torch.nn.functional.pad(mask, (1, 0))  # a prompt of one token
    references = torch.tensor(reference, dtype=torch.float64)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": ids,
        "ref_chosen_logps": references[:, 0],
        "ref_rejected_logps": references[:, 1],
    }
    loss = trainer._compute_loss(self, lambda **_: _outputs(flat * mask), inputs, return_outputs=False)
    loss.backward()
    return loss.item(), tokens.grad.numpy(), {name: values[-1] for name, values in metrics.items()}


def kto(log_probs, counts, reference, desirable, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """`dpo` by `KTOTrainer._compute_loss`: answers in column 0, mismatched ones in column 1; `desirable` bool [B]."""
    trainer = pytest.importorskip("trl").KTOTrainer
    import torch

    tokens = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
    masked = tokens * torch.tensor(counts)
    references = torch.tensor(reference, dtype=torch.float64)
    metrics = collections.defaultdict(list)
    self = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda *_: masked[:, 1].sum(-1).detach(),
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        _metrics={"eval": metrics},
        _total_train_tokens=0,
    )
    ids = torch.nn.functional.pad(torch.tensor(counts)[:, 0].long(), (1, 0))
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": ids,
        "label": torch.tensor(desirable),
        "ref_logps": references[:, 0],
        "ref_KL_logps": references[:, 1],
    }
    loss = trainer._compute_loss(self, lambda **_: _outputs(masked[:, 0]), inputs, return_outputs=False)
    loss.backward()
    return loss.item(), tokens.grad.numpy(), {name: values[-1] for name, values in metrics.items()}


def cpo(loss_type, scores, beta, gamma=0.5, label_smoothing=0.0):
    """The mean of `CPOTrainer.cpo_loss` of scores [B, 2], and its gradient."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    self = SimpleNamespace(
        beta=beta,
        loss_type=loss_type,
        alpha=0.0,
        simpo_gamma=gamma,
        label_smoothing=label_smoothing,
        accelerator=_accelerator(),
    )
    return _of_scores(lambda chosen, rejected: trainer.cpo_loss(self, chosen, rejected)[0], scores)


def odds_ratio(means, beta):
    """The mean of `-ORPOTrainer.odds_ratio_loss` of means [B, 2], and its gradient."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    self = SimpleNamespace(beta=beta, accelerator=_accelerator())
    return _of_scores(lambda chosen, rejected: -trainer.odds_ratio_loss(self, chosen, rejected)[0], means)


def _of_scores(function, scores):
    import torch

    scores = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    loss = function(scores[:, 0], scores[:, 1]).mean()
    loss.backward()
    return loss.item(), scores.grad.numpy()


def _outputs(log_probs):
    import torch

    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
