"""What experts specialise in: which tokens of held-out text each expert of a trained model is given.

The lift of a token at an expert is P(token | expert) / P(token): 1 if the router does not care, E if the
expert takes every one of them and its fair share of the rest. Suffixes: T tokens, K top_k, V vocabulary, E
experts, C token classes.
"""

import keyword
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from switchmamba.config import Config
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.layers.routing import Router, Routing
from switchmamba.models.language_model import LanguageModel

TOKEN_CLASSES = ("keyword", "word", "word piece", "number", "punctuation", "space, line end")
"""What :func:`token_class` returns."""


class TokenLift(Config):
    """A token that an expert is given more often than others are.

    Attributes:
        text: the token, decoded.
        lift: P(token | expert) / P(token).
        count: how often this expert was given it.
    """

    text: str
    lift: float
    count: int


class ExpertProfile(Config):
    """What one expert was given.

    Attributes:
        share: its fraction of all assignments of the layer.
        class_shares: class of tokens → fraction of that class's assignments that this expert took.
        tokens: those with the highest lift, highest first.
    """

    share: float
    class_shares: dict[str, float]
    tokens: list[TokenLift]


class LayerProfile(Config):
    """The experts of one layer.

    Attributes:
        layer: index of the router among the model's routers, from 0.
        assignments: how many assignments were counted.
        information: mutual information of token and expert over the entropy of the expert: how much of the
            choice is known from the token alone; 0 is nothing, 1 everything.
        experts: one profile each.
    """

    layer: int
    assignments: int
    information: float = Field(ge=0, le=1)
    experts: list[ExpertProfile]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[list[Routing]]]:
    """Record what every router decides while the context is open.

    Yields a list with an entry for each router in the order of the model; each entry collects one
    :class:`Routing` for each forward pass, from before capacity drops anything. The model itself is not
    changed.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    recorded: list[list[Routing]] = [[] for _ in routers]

    def recorder(own: list[Routing]) -> Callable[[nn.Module, object, Routing], None]:
        def record(module: nn.Module, inputs: object, routing: Routing) -> None:
            own.append(routing)

        return record

    hooks = [
        router.register_forward_hook(recorder(own)) for router, own in zip(routers, recorded, strict=True)
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def count_assignments(model: LanguageModel, batches: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Count which token goes to which expert.

    Args:
        model: in ``eval()`` mode, so that no token is dropped.
        batches: (tokens (B, L), document_ids (B, L) or None).

    Returns one (V, E) int64 tensor for each router.
    """
    vocab_size = model.config.vocab_size
    counts: dict[int, Tensor] = {}
    for tokens_BL, document_ids_BL in batches:
        with torch.inference_mode(), record_routing(model) as recorded:
            model.hidden_states(tokens_BL, document_ids_BL)
        for layer, [routing] in enumerate(recorded):
            experts, index_TK = routing.num_experts, routing.expert_index_TK.cpu()
            token_T = tokens_BL.flatten().cpu()
            if routing.token_S is not None:
                token_T = token_T[routing.token_S.cpu()]
            token_TK = token_T[:, None].expand_as(index_TK)
            kept_TK = index_TK < experts
            pair_M = token_TK[kept_TK] * experts + index_TK[kept_TK]
            count_VE = torch.bincount(pair_M, minlength=vocab_size * experts).view(vocab_size, experts)
            counts[layer] = counts.get(layer, 0) + count_VE
    return [counts[layer] for layer in sorted(counts)]


def profile_layer(
    counts_VE: Tensor, texts: Sequence[str], layer: int, *, top: int = 8, minimum: int = 20
) -> LayerProfile:
    """Describe a layer's experts from its counts (V, E).

    Args:
        counts_VE: how often each token went to each expert.
        texts: the tokens, decoded.
        layer: index of the router.
        top: tokens to name for each expert.
        minimum: how often a token must have reached the expert to be named: rarer ones are chance.
    """
    counts_VE = counts_VE.double()
    total = counts_VE.sum().clamp(min=1)
    token_V, expert_E = counts_VE.sum(1), counts_VE.sum(0)
    lift_VE = counts_VE * total / (token_V[:, None] * expert_E[None, :]).clamp(min=1)
    ranked_VE = lift_VE.masked_fill(counts_VE < minimum, 0)
    class_of = [TOKEN_CLASSES.index(token_class(text)) for text in texts]
    class_CE = torch.zeros(len(TOKEN_CLASSES), counts_VE.shape[1], dtype=torch.float64)
    class_CE.index_add_(0, torch.tensor(class_of), counts_VE)
    class_shares_CE = class_CE / class_CE.sum(1, keepdim=True).clamp(min=1)
    lift_KE, token_KE = ranked_VE.topk(min(top, len(texts)), dim=0)
    experts = [
        ExpertProfile(
            share=float(expert_E[e] / total),
            class_shares={name: float(class_shares_CE[c, e]) for c, name in enumerate(TOKEN_CLASSES)},
            tokens=[
                TokenLift(text=texts[v], lift=lift, count=int(counts_VE[v, e]))
                for v, lift in zip(token_KE[:, e].tolist(), lift_KE[:, e].tolist(), strict=True)
                if lift > 1
            ],
        )
        for e in range(counts_VE.shape[1])
    ]
    return LayerProfile(
        layer=layer, assignments=int(total), information=_information(counts_VE), experts=experts
    )


def specialisation(
    model: LanguageModel,
    tokenizer: Tokenizer,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    top: int = 8,
    minimum: int = 20,
) -> list[LayerProfile]:
    """Describe what the experts of ``model`` (in ``eval()`` mode) are given in ``batches`` of held-out text.

    The arguments are those of :func:`count_assignments` and :func:`profile_layer`. A model without routers
    gives ``[]``.
    """
    counts = count_assignments(model, batches)
    # The model's vocabulary may be larger than the tokenizer's: its last ids are no tokens.
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    texts += [""] * (model.config.vocab_size - tokenizer.vocab_size)
    return [profile_layer(c, texts, layer, top=top, minimum=minimum) for layer, c in enumerate(counts)]


def token_class(text: str) -> str:
    """Sort a decoded token into one of :data:`TOKEN_CLASSES`; keywords are Python's."""
    bare = text.strip()
    if not bare:
        return "space, line end"
    if keyword.iskeyword(bare):
        return "keyword"
    if bare.isdigit():
        return "number"
    if any(character.isalnum() for character in bare):
        return "word" if text[0].isspace() or text[0].isupper() else "word piece"
    return "punctuation"


def _information(counts_VE: Tensor) -> float:
    """Mutual information I(token; expert) / H(expert)."""
    joint_VE = counts_VE / counts_VE.sum().clamp(min=1)
    entropy = torch.special.entr(joint_VE.sum(0)).sum()
    if entropy <= 0:
        return 0.0
    mutual = torch.special.entr(joint_VE.sum(1)).sum() + entropy - torch.special.entr(joint_VE).sum()
    return float((mutual / entropy).clamp(0, 1))
