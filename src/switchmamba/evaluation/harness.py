"""A checkpoint as a model of the lm-evaluation-harness (Gao et al., EleutherAI), whose tasks then measure it.

The harness asks three things: log p of a continuation after a context, log p of a whole text, and text generated until
a stop text appears. All are answered in batches of like length; no answer depends on its batch beyond rounding.

This module needs the extra ``eval``: ``pip install "switchmamba[eval]"``.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lm_eval
import yaml
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from switchmamba.config import nearest
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError, DataError, SwitchMambaError
from switchmamba.evaluation.continuations import Pair, score_continuations
from switchmamba.generation.generate import generate, refuse_unsuitable
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.language_model import LanguageModel

_SAMPLING = {"temperature", "top_k", "top_p", "min_p"}
_UNDERSTOOD = _SAMPLING | {"until", "max_gen_toks", "do_sample"}


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """What ``lm_eval.simple_evaluate(model=…)`` takes.

    Args:
        model: in ``eval()`` mode, causal and batch invariant; ConfigError otherwise.
        tokenizer: the model's own.
        batch_size: rows computed at once; changes time and memory only.
        context_length: longest input, counted in tokens: contexts are cut on the left, whole texts are read in windows
            that overlap by one token. None: whatever a task asks. Give attention the length that it was trained on.
        progress: called with the number of answers given, and of those asked for.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        context_length: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        refuse_unsuitable(model, tokenizer, allow_non_causal=False, allow_batch_dependence=False)
        for name, value in {"batch_size": batch_size, "context_length": context_length}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1")
        self._model, self._tokens, self._batch_size = model, tokenizer, batch_size
        self._context_length, self._progress = context_length, progress

    @property
    def eot_token_id(self) -> int:
        """The end of text: also what comes before a text that has no context."""
        return self._tokens.end_of_text_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return the ids of a text; there are no special tokens to add."""
        return self._tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, Sequence[int], Sequence[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        return [(score.log_probability, score.greedy) for score in self._score(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each text as a document: its first token is predicted from the end of text."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = self._tokens.encode(request.args[0])
            windows = get_rolling_token_windows(
                ids,
                prefix_token=self.eot_token_id,
                max_seq_len=self._context_length or len(ids),
                context_len=1,
            )
            for inputs, targets in windows if ids else ():
                pairs.append(Pair(tuple(inputs[: len(inputs) - len(targets) + 1]), tuple(targets)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, score in zip(owners, self._score(pairs), strict=True):
            sums[i] += score.log_probability
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context until a stop text, the end of text or the longest length."""
        prompts = [self._tokens.encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        texts: dict[int, str] = {}
        for group in groups.values():
            wishes = _wishes(requests[group[0]].args[1])
            group.sort(key=lambda i: len(prompts[i]), reverse=True)
            for start in range(0, len(group), self._batch_size):
                part = group[start : start + self._batch_size]
                result = generate(
                    self._model,
                    self._tokens,
                    [self._cut_prompt(prompts[i], wishes["max_gen_toks"]) for i in part],
                    SamplingSettings(**{name: wishes[name] for name in _SAMPLING & wishes.keys()}),
                    max_tokens=wishes["max_gen_toks"],
                    stop=[text for text in wishes["until"] if text],
                    first_row=start,
                ).result
                texts |= {i: c.text for i, c in zip(part, result.completions, strict=True)}
                if self._progress is not None:
                    self._progress(len(texts), len(requests))
        return [texts[i] for i in range(len(requests))]

    def _score(self, pairs: Sequence[Pair]) -> Any:
        return score_continuations(self._model, pairs, batch_size=self._batch_size, progress=self._progress)

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> Pair:
        """Keep the end of the context, so that input and last target are no further apart than the longest input.

        The harness moves spaces at a context's end to the continuation; where nothing is left, the end of text stands.
        """
        context = context or (self.eot_token_id,)
        if self._context_length is None:
            return Pair(tuple(context), tuple(continuation))
        kept = self._context_length + 1 - len(continuation)
        if kept < 1:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens, --context-length {self._context_length} is too short"
            )
        return Pair(tuple(context[-kept:]), tuple(continuation))

    def _cut_prompt(self, prompt: Sequence[int], max_tokens: int) -> Sequence[int]:
        if self._context_length is None:
            return prompt
        kept = self._context_length - max_tokens
        if kept < 1:
            raise ConfigError(
                f"a task generates {max_tokens} tokens, which leave no room in --context-length {self._context_length}"
            )
        return prompt[-kept:]


def _wishes(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Read a task's settings of generation; ConfigError names one that is not known here."""
    try:
        wishes = dict(normalize_gen_kwargs(dict(asked)))
    except ValueError as error:
        raise ConfigError(f"a task's settings of generation cannot be used: {error}") from None
    unknown = sorted(wishes.keys() - _UNDERSTOOD)
    if unknown:
        raise ConfigError(f"a task asks for generation with {unknown[0]}, which is not known here")
    if not wishes.get("do_sample"):
        wishes["temperature"] = 0.0
    return {name: value for name, value in wishes.items() if value is not None}


def open_tasks(names: Sequence[str], directory: Path | None = None) -> TaskManager:
    """Return a manager of the harness's tasks and those that YAML files in ``directory`` define.

    ConfigError for a file that is no YAML, which the harness would pass over, and for a name that is no task.
    """
    files = () if directory is None else _yaml_files(directory)
    manager = TaskManager(include_path=None if directory is None else str(directory.resolve()))
    for name in names:
        if not manager.match_tasks([name]):
            known = {entry.yaml_path for entry in manager.task_index.values()}
            without = ", ".join(str(file) for file in files if file.resolve() not in known)
            raise ConfigError(
                f"--harness {name}: no such task{nearest(name, manager.all_tasks)}; `lm-eval ls tasks` lists the "
                "harness's own, --tasks DIR adds yours"
                + (
                    f"; none stands in {without} (it needs the key 'task', and what it includes)"
                    if without
                    else ""
                )
            )
    return manager


def _yaml_files(directory: Path) -> Sequence[Path]:
    """Return the YAML files that the harness looks for tasks in; ConfigError for one that cannot be read."""
    if not directory.is_dir():
        raise ConfigError(f"--tasks {directory} is not a directory; put the tasks' YAML files into one")
    files = sorted(directory.glob("**/*.yaml"))
    for file in files:
        try:
            for _ in yaml.parse(file.read_text(encoding="utf-8")):  # the syntax alone: nothing is constructed
                pass
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise ConfigError(f"{file}{line}: not valid YAML: {error.problem}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
    return files


def run_tasks(
    model: HarnessModel,
    names: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the tasks; return the harness's results, without the single answers.

    Args:
        num_fewshot: solved examples before each question; None: as the task says.
        limit: only the first so many questions of each task.
        seed: of the choice of examples and of the bootstrap.

    Raises DataError where a task's data cannot be had, ConfigError where a task cannot be run as it is written. What
    goes wrong in the model itself is raised as it is.
    """
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[task for name in names for task in manager.match_tasks([name])],
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, FileNotFoundError) as error:
        if _is_the_models(error):
            raise
        raise DataError(f"a task's data cannot be had: {error}") from error
    except (ValueError, TemplateError) as error:
        if isinstance(error, SwitchMambaError) or _is_the_models(error):
            raise
        raise ConfigError(
            f"a task among {', '.join(names)} cannot be run as it is written: {error}"
        ) from error
    assert results is not None
    return dict(results)


def _is_the_models(error: Exception) -> bool:
    """Say whether an error passed through this module below :func:`run_tasks`: the harness calls the model only."""
    below = islice(walk_tb(error.__traceback__), 1, None)
    return any(frame.f_globals["__name__"] == __name__ for frame, _ in below)
