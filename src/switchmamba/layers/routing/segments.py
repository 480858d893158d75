"""Routers that look at a whole sequence before they decide, and what a sequence is to them.

A segment is the part of one document that stands in one row of the batch, as far as it is given to the layer. No
segment sees another one, so rows and documents do not mix; but within a segment an earlier token's output depends on
later tokens, and on where the text was cut into chunks.
"""

from typing import ClassVar

import torch
from torch import Tensor

from switchmamba.layers.interface import SequenceInfo
from switchmamba.layers.routing.interface import Routing
from switchmamba.layers.routing.linear import LinearRouter


class SegmentRouter(LinearRouter):
    """A router that is not causal: it decides for all tokens of a segment together.

    Its ``forward(x_TD, padding_T, segment_T)`` takes (T,) int64 from :func:`segments`; None: one segment.
    """

    causal: ClassVar[bool] = False
    waits_for_device: ClassVar[bool] = True

    def route(self, x_BLD: Tensor, sequence: SequenceInfo) -> Routing:
        """Route x (B, L, D), each segment by itself."""
        segment_T = segments(sequence, x_BLD).flatten()
        padding_T = None if sequence.padding_BL is None else sequence.padding_BL.flatten()
        routing: Routing = self(x_BLD.flatten(0, 1), padding_T, segment_T)
        return routing


def segments(sequence: SequenceInfo, x_BLD: Tensor) -> Tensor:
    """Return the number of each token's segment, (B, L) int64, counted from 0 in the tokens' order; −1: padding."""
    batch, length, _ = x_BLD.shape
    if sequence.document_ids_BL is None:
        return torch.arange(batch, device=x_BLD.device)[:, None].expand(batch, length)
    ids_BL, padding_BL = sequence.document_ids_BL, sequence.padding_BL
    begins_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    begins_BL[:, 1:] = ids_BL.diff(dim=1) != 0
    if padding_BL is not None:
        begins_BL &= ~padding_BL
    segment_BL = begins_BL.flatten().cumsum(0).view(batch, length) - 1
    return segment_BL if padding_BL is None else segment_BL.masked_fill(padding_BL, -1)


def one_segment(padding_T: Tensor | None, x_TD: Tensor) -> Tensor:
    """Return what :func:`segments` would of tokens that all belong together."""
    segment_T = torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
    return segment_T if padding_T is None else segment_T.masked_fill(padding_T, -1)
