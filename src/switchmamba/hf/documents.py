"""From Hugging Face's masks to document ids, which is how the native layers know padding and packing.

Here an even id is text and an odd one padding, the native −1 (padding before everything) included. The ids of a row
never decrease: 0 0 1 1 at a row padded on the right, −1 −1 0 0 at one padded on the left. Every change resets what a
layer remembers, so padding stands in no context, and routers do not see it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.models.state import ModelState


class Documents(NamedTuple):
    """Document ids and padding (B, L), or None where every row goes on with its document."""

    ids: Tensor | None
    padding: Tensor | None


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
        attention_mask: (B, at least L), 0 at padding; its last L columns are the new tokens'.
        position_ids: (B, L), packed sequences: one begins at every 0. Not looked at beside a mask.
        document_ids: (B, L), packed sequences by number, not decreasing along a row; −1 is padding on the left.
    """
    if document_ids is not None:
        if attention_mask is not None:
            raise ConfigError("attention_mask and document_ids say the same twice; give one of them")
        if document_ids.shape != shape:
            raise ConfigError(f"document_ids must be {shape}, as the tokens, got {tuple(document_ids.shape)}")
        return Documents(torch.where(document_ids < 0, -1, 2 * document_ids), document_ids < 0)
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
        before_B = torch.full((batch,), -1, device=text_BL.device)
    else:
        before_B = state.document_id_B.to(text_BL.device)
    text_before_B = before_B % 2 == 0
    # One token needs no check, which would make the host wait for the device at every step of generation.
    if length > 1 and bool(text_BL.all()) and (state is None or bool(text_before_B.all())):
        return Documents(None, None)
    changes_BL = text_BL != torch.cat([text_before_B[:, None], text_BL[:, :-1]], dim=1)
    return Documents(before_B[:, None] + changes_BL.cumsum(1), ~text_BL)


def _packed(shape: tuple[int, int], state: ModelState | None, position_ids: Tensor) -> Documents:
    if position_ids.shape[-1] != shape[1]:
        raise ConfigError(f"position_ids must be {shape[0]} × {shape[1]}, got {tuple(position_ids.shape)}")
    count_BL = (position_ids == 0).expand(shape).cumsum(1)
    if state is None:
        return Documents(2 * (count_BL - count_BL[:, :1]), None)
    return Documents(state.document_id_B[:, None] + 2 * count_BL, None)
