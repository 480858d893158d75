"""Top-1 routing in torch's own operations: the truth that other backends are tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def switch_router_reference(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, ...]:
    """Return index, weight, the sums and x of :func:`switchmamba.ops.switch_router.switch_router`."""
    with torch.autocast(x_TD.device.type, enabled=False):
        logits_TE = F.linear(x_TD.to(weight_ED.dtype), weight_ED)
    probability_TE = logits_TE.softmax(-1)
    index_T1 = probability_TE.detach().argmax(-1, keepdim=True)
    logsumexp_T = logits_TE.logsumexp(-1)
    entropy_T = logsumexp_T - (probability_TE * logits_TE).sum(-1)
    return (
        index_T1,
        probability_TE.gather(1, index_T1),
        probability_TE.sum(0),
        logsumexp_T.square().sum(),
        entropy_T.detach().sum(),
        F.one_hot(index_T1[:, 0], weight_ED.shape[0]).sum(0),
        x_TD,
    )
