"""A decoding step captured once as a CUDA graph and replayed for every token: no launch waits for Python.

A step of a small model is dozens of kernels of a few microseconds; launched one by one, Python takes ten times as
long as the GPU. The graph reads and writes fixed memory: the tokens, the state, and the logits.
"""

import torch
from torch import Tensor

from switchmamba.models.language_model import LanguageModel
from switchmamba.models.state import ModelState
from switchmamba.ops.fused_step import argmax_step


class DecodeGraph:
    """One step of B rows, to be replayed.

    Attributes:
        tokens_B: (B,) int64, the tokens the next replay reads.
        logits_BV: (B, V), of the token after those; overwritten by the next replay.
        greedy_B: (B,) int64, the first most probable token.
        state: of all that was read; it changes in place, so clone what must last.
    """

    def __init__(self, model: LanguageModel, state: ModelState) -> None:
        """Capture the step for as many rows as ``state`` has, which stays as it is.

        Args:
            model: in ``eval()`` mode on a CUDA device; its state must not grow, and its weights not move afterwards.
            state: where decoding goes on from.
        """
        assert self.serves(model)
        assert not model.training
        device = model.head_weight.device
        self._tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
        self.state = model.state_from_tensors(self._tensors)
        self.tokens_B = torch.zeros_like(state.position_B)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are compiled and libraries set up outside the graph
                for _ in range(2):
                    argmax_step(model.decode_(self.tokens_B, self.state))
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self.logits_BV = model.decode_(self.tokens_B, self.state)
                self.greedy_B = argmax_step(self.logits_BV)
        self.load(state)

    @staticmethod
    def serves(model: LanguageModel) -> bool:
        """Say whether a model's decoding step can be captured: it is on a CUDA device and its state does not grow."""
        return model.head_weight.device.type == "cuda" and not model.state_grows

    @torch.inference_mode()
    def load(self, state: ModelState) -> None:
        """Go on from another state of as many rows."""
        for name, tensor in state.tensors().items():
            self._tensors[name].copy_(tensor)

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Read one token per row, (B,) int64 on any device; return the next logits (B, V), valid until the next call."""
        self.tokens_B.copy_(tokens_B, non_blocking=True)
        self._graph.replay()
        return self.logits_BV

    @torch.inference_mode()
    def greedy_steps(self, tokens_B: Tensor, count: int) -> Tensor:
        """Read ``tokens_B``, then ``count`` - 1 times the most probable token; return the tokens chosen, (count, B)."""
        chosen_TB = torch.empty(count, len(self.tokens_B), dtype=torch.int64, device=self.tokens_B.device)
        self.tokens_B.copy_(tokens_B, non_blocking=True)
        for place in range(count):
            self._graph.replay()
            chosen_TB[place].copy_(self.greedy_B)
            self.tokens_B.copy_(self.greedy_B)
        return chosen_TB
