"""Two models are the same function: the largest difference of their logits on generated tokens, in fp32.

    difference = ‖native − foreign‖ / ‖native‖        over all logits of a batch

No conversion is kept unless this is below the format's tolerance. Tokens are drawn from a seed over the whole
vocabulary; a single token and sequences longer than any convolution are among them. Where a router likes two experts
equally but for rounding, two right programs may choose differently; then other tokens, of another seed, decide.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from switchmamba.errors import CheckpointError
from switchmamba.layers.feed_forward.moe import mixtures
from switchmamba.models.language_model import LanguageModel

BATCHES = ((1, 1), (2, 33))
"""Rows and tokens of the generated batches."""


@dataclass(frozen=True)
class Foreign:
    """Another program's model.

    Attributes:
        logits: maps tokens (B, L) int64 to logits (B, L, V).
        streams: maps them to the residual stream (B, L, D) behind some of the native model's steps, by the step's
            number; -1 is the embedding's output, and numbers that the native model has not are ignored. It is asked
            only to find where two models part; None: it cannot say.
    """

    logits: Callable[[Tensor], Tensor]
    streams: Callable[[Tensor], Mapping[int, Tensor]] | None = None


@dataclass(frozen=True)
class Agreement:
    """How close two models are: relative difference (norms), largest difference of a logit, logits compared."""

    relative: float
    largest: float
    count: int
    tolerance: float


@torch.no_grad()
def verify(native: LanguageModel, foreign: Foreign, tolerance: float, what: str, seed: int = 0) -> Agreement:
    """Compare the logits of two models on generated tokens.

    Args:
        native: in fp32, on a CPU; it is put into ``eval()`` mode.
        foreign: the same model elsewhere.
        tolerance: largest relative difference that is only rounding.
        what: names the foreign model in the error.
        seed: of the tokens.

    Raises:
        CheckpointError: they differ by more; names the largest difference and the first layer that differs.
    """
    native.eval()
    worst, largest, count = 0.0, 0.0, 0
    for tokens_BL in generated_tokens(native.config.vocab_size, seed):
        ours = native(tokens_BL, observe_routers=False).logits
        theirs = foreign.logits(tokens_BL).to(ours.dtype)
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{what}: gives logits {tuple(theirs.shape)}, the native model {tuple(ours.shape)}"
            )
        difference = relative_difference(theirs, ours)
        if not difference <= tolerance:  # NaN is refused too
            raise CheckpointError(_disagreement(native, foreign, tokens_BL, ours, theirs, tolerance, what))
        worst = max(worst, difference)
        largest = max(largest, float((theirs - ours).abs().max()))
        count += ours.numel()
    return Agreement(worst, largest, count, tolerance)


def generated_tokens(vocab_size: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield the batches (B, L) int64 that models are compared on, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for shape in BATCHES:
        yield torch.randint(vocab_size, shape, generator=generator)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))


def residual_streams(model: LanguageModel, tokens_BL: Tensor) -> dict[int, Tensor]:
    """Return the residual stream (B, L, D) behind every step, by its number; −1 is the embedding's output."""
    streams: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[object, object, tuple[Tensor, Tensor]], None]:
        def hook(_module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            streams[number] = output[0] + output[1]

        return hook

    handles = [step.register_forward_hook(keep(i)) for i, step in enumerate(model.steps())]
    try:
        model(tokens_BL, observe_routers=False)
    finally:
        for handle in handles:
            handle.remove()
    return {-1: model.embedding(tokens_BL)} | streams


def _disagreement(
    native: LanguageModel,
    foreign: Foreign,
    tokens_BL: Tensor,
    ours: Tensor,
    theirs: Tensor,
    tolerance: float,
    what: str,
) -> str:
    difference = (theirs - ours).abs()
    row, position, token = (
        int(i) for i in torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), ours.shape)
    )
    return (
        f"{what}: is not the same model: its logits differ by {relative_difference(theirs, ours):.2g} (relative; "
        f"rounding explains {tolerance:.0e}), most at row {row}, position {position}, token {token}: "
        f"{float(theirs[row, position, token]):.6g} instead of {float(ours[row, position, token]):.6g}"
        f"{_first_layer(native, foreign, tokens_BL, tolerance)}; nothing was written"
    )


def _first_layer(native: LanguageModel, foreign: Foreign, tokens_BL: Tensor, tolerance: float) -> str:
    if foreign.streams is None:
        return ""
    ours, config = residual_streams(native, tokens_BL), native.config
    for number, theirs in sorted(foreign.streams(tokens_BL).items()):
        if number not in ours or relative_difference(theirs, ours[number]) <= tolerance:
            continue
        if number < 0:
            return "; the first to differ is what leaves the embedding"
        names = config.steps[number]
        routed = any(list(mixtures(config.layers[name])) for name in names)
        tie = " (if its router stands at a tie on these tokens, --seed draws others)" if routed else ""
        return f"; the first to differ is what leaves layers.{number}.{' + '.join(names)}{tie}"
    return "; all layers agree, so the final norm or the head differs"
