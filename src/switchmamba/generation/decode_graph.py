"""A decoding step captured once as a CUDA graph and replayed for every token: no launch waits for Python.

A step of a small model is dozens of kernels of a few microseconds; launched one by one, Python takes ten times as
long as the GPU. The graph reads and writes fixed memory: the tokens, the state, and the logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from switchmamba.models.language_model import LanguageModel
from switchmamba.models.state import ModelState
from switchmamba.ops.cuda_graph import capture
from switchmamba.ops.fused_step import argmax_step

_GREEDY_STEPS = 16
"""Steps of the graph that feeds itself: between two replays the GPU waits for several microseconds."""


class DecodeGraph:
    """One step of B rows, to be replayed.

    Attributes:
        logits_BV: (B, V), of the token after those read last; overwritten by the next replay.
        state: of all that was read; it changes in place, so clone what must last.
    """

    def __init__(self, model: LanguageModel, state: ModelState) -> None:
        """Capture the step for as many rows as ``state`` has, which stays as it is.

        Args:
            model: in ``eval()`` mode on a CUDA device; its state must not grow, and its weights not move afterwards.
            state: where decoding goes on from.

        Raises CannotCaptureError if the step waits for the device all the same.
        """
        assert self.serves(model)
        assert not model.training
        self._model = model
        self._tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
        self.state = model.state_from_tensors(self._tensors)
        self._tokens_B = torch.zeros_like(state.position_B)
        self._chosen_TB = self._tokens_B.repeat(_GREEDY_STEPS, 1)
        self._step, self.logits_BV = self._capture(self._one_step)
        self._greedy: torch.cuda.CUDAGraph | None = None
        self.load(state)

    @staticmethod
    def serves(model: LanguageModel) -> bool:
        """Say whether a model's decoding step can be captured.

        It can on a CUDA device, if the state does not grow and no layer waits for the device.
        """
        return (
            model.device.type == "cuda"
            and not model.state_grows
            and model.why_not_capturable(model.dtype, decoding=True) is None
        )

    @torch.inference_mode()
    def load(self, state: ModelState) -> None:
        """Go on from another state of as many rows."""
        for name, tensor in state.tensors().items():
            self._tensors[name].copy_(tensor)

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Read one token per row, (B,) int64 on any device; return the next logits (B, V), good until the next call."""
        self._tokens_B.copy_(tokens_B, non_blocking=True)
        self._step.replay()
        return self.logits_BV

    @torch.inference_mode()
    def greedy_steps(self, tokens_B: Tensor, count: int) -> Tensor:
        """Read ``tokens_B``, then ``count`` - 1 times the most probable token; return the tokens chosen, (count, B)."""
        if self._greedy is None and count >= _GREEDY_STEPS:
            before = {name: tensor.clone() for name, tensor in self._tensors.items()}
            self._greedy, _ = self._capture(self._feed_back)
            for name, tensor in before.items():
                self._tensors[name].copy_(tensor)
        self._tokens_B.copy_(tokens_B, non_blocking=True)
        chosen_TB = self._tokens_B.new_empty(count, len(self._tokens_B))
        place = 0
        while place < count:
            if self._greedy is not None and count - place >= _GREEDY_STEPS:
                self._greedy.replay()
                chosen_TB[place : place + _GREEDY_STEPS] = self._chosen_TB
                place += _GREEDY_STEPS
            else:
                self._step.replay()
                argmax_step(self.logits_BV, chosen_TB[place])
                self._tokens_B.copy_(chosen_TB[place])
                place += 1
        return chosen_TB

    def _one_step(self) -> Tensor:
        return self._model.decode_(self._tokens_B, self.state, allow_non_causal=True)

    def _feed_back(self) -> Tensor:
        tokens_B = self._tokens_B
        for chosen_B in self._chosen_TB:
            tokens_B = self._model.decode_greedily_(tokens_B, self.state, chosen_B, allow_non_causal=True)
        return self._tokens_B.copy_(tokens_B)

    @torch.inference_mode()
    def _capture(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return a graph of what ``run`` launches, and where its result will stand; the state moves on by one run."""
        device = self._tokens_B.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are compiled and libraries set up outside the graph
                run()
            torch.cuda.current_stream().wait_stream(stream)
            return capture(run, device)
