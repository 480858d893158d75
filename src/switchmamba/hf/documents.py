"""From Hugging Face's masks to document ids, which is how the native layers know padding and packing.

Native padding (id −1) stands to the left of a row's text. Masks may have it anywhere: the tokens of a row are then read
in another order, padding first and the text as it was, and put back (:class:`Documents`). So padding stands in no
context, what follows it goes on with the text before it, and routers do not see it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.models.backbone import check_document_ids
from switchmamba.models.state import ModelState


class Documents(NamedTuple):
    """How a chunk is read.

    Attributes:
        ids: (B, L) document ids in the order of reading; None: every row goes on with its document.
        padding: (B, L) bool in the order of reading; None: where ``ids`` are negative.
        order: (B, L) int64, the place of each token that is read; None: as it stands.
    """

    ids: Tensor | None
    padding: Tensor | None
    order: Tensor | None = None

    def reordered(self, x_BLD: Tensor) -> Tensor:
        """Return vectors in the order of reading."""
        if self.order is None:
            return x_BLD
        return x_BLD.take_along_dim(self.order.to(x_BLD.device)[..., None], dim=1)

    def put_back(self, x_BLD: Tensor) -> Tensor:
        """Return what was computed at each token; padding behind text repeats what the text ended with.

        So the last place of a row predicts the token behind its text, wherever its padding stands.
        """
        if self.order is None or self.ids is None:
            return x_BLD
        text_BL = torch.zeros_like(self.ids).scatter(1, self.order, (self.ids >= 0).long())
        padding_B1 = x_BLD.shape[1] - text_BL.sum(1, keepdim=True)
        place_BL = padding_B1 + text_BL.cumsum(1) - 1  # of the newest text, in the order of reading
        return x_BLD.take_along_dim(place_BL.clamp(min=0).to(x_BLD.device)[..., None], dim=1)


def documents(
    shape: tuple[int, int],
    state: ModelState | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
) -> Documents:
    """Say which document each of the (B, L) new tokens belongs to.

    Args:
        shape: (B, L).
        state: what was read before.
        attention_mask: (B, at least L), 0 at padding; its last L columns are the new tokens'. A row that has read text
            may have no more padding: what was read cannot be held while the others read.
        position_ids: (B, L), packed sequences: one begins at every 0. Not looked at beside a mask.
        document_ids: (B, L), packed sequences by number, not decreasing along a row; −1 is padding on the left.
    """
    if document_ids is not None:
        if attention_mask is not None:
            raise ConfigError("attention_mask and document_ids say the same twice; give one of them")
        check_document_ids(document_ids, shape)
        return Documents(document_ids, document_ids < 0)
    if attention_mask is not None:
        return _masked(shape, state, attention_mask)
    if position_ids is not None:
        return _packed(shape, state, position_ids)
    return Documents(None, None)


def _masked(shape: tuple[int, int], state: ModelState | None, attention_mask: Tensor) -> Documents:
    batch, length = shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ConfigError(
            f"attention_mask must be (B, L) with 0 at padding and at least {batch} × {length}, "
            f"got {tuple(attention_mask.shape)}"
        )
    text_BL = attention_mask[:, -length:].bool()
    if state is None:
        before_B1 = torch.full((batch, 1), -1, device=text_BL.device)
    else:
        before_B1 = state.document_id_B.to(text_BL.device)[:, None]
    goes_on_BL = text_BL if state is None else text_BL & (before_B1 >= 0)
    if bool(goes_on_BL.all()):
        return Documents(None, None)
    if bool((~text_BL & (before_B1 >= 0)).any()):
        raise ConfigError(
            "attention_mask has padding in a row that has read text already, whose state cannot be held meanwhile; "
            "give the rows whole, or padded on the left (without a mask, generate takes every pad_token_id for padding)"
        )
    order_BL = None
    if bool((text_BL[:, :-1] & ~text_BL[:, 1:]).any()):
        order_BL = text_BL.long().argsort(dim=1, stable=True)
        text_BL = text_BL.gather(1, order_BL)
    return Documents(torch.where(text_BL, before_B1.clamp(min=0), -1), ~text_BL, order_BL)


def _packed(shape: tuple[int, int], state: ModelState | None, position_ids: Tensor) -> Documents:
    if position_ids.shape[-1] != shape[1]:
        raise ConfigError(f"position_ids must be {shape[0]} × {shape[1]}, got {tuple(position_ids.shape)}")
    count_BL = (position_ids == 0).expand(shape).cumsum(1)
    if state is None:
        return Documents(count_BL - count_BL[:, :1], None)
    return Documents(state.document_id_B[:, None].to(count_BL.device).clamp(min=0) + count_BL, None)
