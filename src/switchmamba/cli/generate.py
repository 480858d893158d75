"""``switchmamba generate``: continue a text, or every prompt of a file."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from switchmamba.cli.model_options import (
    AllowBatchDependence,
    AllowNonCausal,
    Checkpoint,
    Device,
    Greedy,
    MinP,
    Quantization,
    Temperature,
    Threads,
    TopK,
    TopP,
    counted,
    load_checkpoint,
    require_checkpoint,
)
from switchmamba.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from switchmamba.generation.generate import Completion, Generation, Piece, Result
    from switchmamba.generation.settings import SamplingSettings

logger = logging.getLogger("switchmamba")

RESULT_FIELDS = ("text", "finish_reason", "token_ids")
"""What a completion adds to the record of its prompt."""


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; by default a document is begun.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File whose whole text is the prompt; - is stdin.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON Lines, one {"prompt": …} each; other fields are copied to the result.',
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --prompts: new file for the results.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens to draw per prompt; 0 only reads.")
    ] = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    greedy: Greedy = False,
    seed: Annotated[
        int | None, typer.Option(help="Default: a new one, which is logged.", show_default=False)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the sample; may be repeated.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --prompts: how many at once.")] = 8,
    chunk_size: Annotated[int, typer.Option(min=1, help="Prompt tokens read at once.")] = 1024,
    load_state: Annotated[
        Path | None,
        typer.Option(help="Go on where --save-state stopped; --prompt is added.", show_default=False),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(help="New directory for the state after the last token.", show_default=False),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    quantization: Quantization = None,
    allow_non_causal: AllowNonCausal = False,
    allow_batch_dependence: AllowBatchDependence = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Continue a text, and print it as it comes; the speed goes to stderr.

    \b
      switchmamba generate runs/mine --prompt "import " --max-tokens 100 --temperature 0.8 --top-p 0.95
      switchmamba generate runs/mine --prompts questions.jsonl --out answers.jsonl --greedy --stop "Q:"

    A long text is read once and continued many times, by other processes too:

    \b
      switchmamba generate runs/mine --prompt-file book.txt --max-tokens 0 --save-state book
      switchmamba generate runs/mine --load-state book --prompt "Chapter 2"
    """
    settings = sampling_settings(temperature, top_k, top_p, min_p, greedy, seed)
    requests = _read_prompts(prompt, prompt_file, prompts)
    _check_paths(checkpoint, prompts, out, load_state, save_state)
    loaded = load_checkpoint(checkpoint, device, threads, quantization)

    from switchmamba.generation import generate as generation
    from switchmamba.generation import saved_state
    from switchmamba.generation.sampling import row_generator

    start = partial(
        generation.generate,
        loaded.model,
        loaded.tokenizer,
        settings=settings,
        max_tokens=max_tokens,
        stop=stop or (),
        chunk_size=chunk_size,
        allow_non_causal=allow_non_causal,
        allow_batch_dependence=allow_batch_dependence,
    )
    list(start([""], max_tokens=2))  # loads compiled kernels before the clock runs
    if prompts is not None:
        records, cost = _complete_all(start, requests, batch_size, out, print_lines=not as_json)
    else:
        continuations = None
        if load_state is not None:
            before = saved_state.load_state(load_state, loaded.model)
            continuations = [before if seed is None else replace(before, generator=row_generator(seed, 0))]
        running = start([requests[0]["prompt"]], continuations=continuations)
        if not as_json:
            _print_pieces(running)
        cost = running.result
        records = [_record(requests[0], cost.completions[0])]
        if save_state is not None:
            saved_state.save_state(save_state, loaded.model, cost.completions[0].continuation)
    # Nothing is random in a greedy choice, and a state goes on with the random numbers it was saved with.
    used_seed = None if settings.temperature == 0 or (load_state and seed is None) else settings.seed
    if as_json:
        shown = loaded.source() | {"seed": used_seed} | _speed(cost)
        typer.echo(json.dumps(shown if out is not None else {"completions": records} | shown, indent=2))
    logger.info("%s", _summary(cost, used_seed if cost.drawn_tokens or save_state else None))


def sampling_settings(
    temperature: float | None,
    top_k: int | None,
    top_p: float,
    min_p: float,
    greedy: bool,
    seed: int | None,
) -> "SamplingSettings":
    """Return what the options say: --greedy is temperature 0, the default 1; without a seed a new one."""
    from switchmamba.generation.settings import SamplingSettings

    if greedy and temperature:
        raise ConfigError(f"--greedy and --temperature {temperature} exclude each other")
    if temperature is None:
        temperature = 0.0 if greedy else 1.0
    return SamplingSettings(temperature, top_k, top_p, min_p, secrets.randbits(32) if seed is None else seed)


def _read_prompts(prompt: str | None, prompt_file: Path | None, prompts: Path | None) -> list[dict[str, Any]]:
    """Return what is to be continued: records with a text in the field "prompt", and perhaps others."""
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other")
    if prompt_file is not None:
        data = sys.stdin.buffer.read() if prompt_file == Path("-") else _read_bytes(prompt_file)
        return [{"prompt": _decode(data, str(prompt_file))}]
    if prompts is None:
        return [{"prompt": prompt or ""}]
    lines = enumerate(_read_bytes(prompts).split(b"\n"), start=1)
    requests = [_request(line, f"{prompts}, line {number}") for number, line in lines if line.strip()]
    if not requests:
        raise DataError(f"{prompts}: no prompt in it")
    replaced = [name for name in RESULT_FIELDS if any(name in request for request in requests)]
    if replaced:
        logger.warning("%s: the results take the place of its %s", prompts, ", ".join(replaced))
    return requests


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start}") from None


def _request(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(_decode(line, place))
    except (ValueError, RecursionError):
        raise DataError(f"{place}: not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(f'{place}: no text in field "prompt"')
    return record


def _check_paths(
    checkpoint: Path, prompts: Path | None, out: Path | None, load_state: Path | None, save_state: Path | None
) -> None:
    """Refuse what cannot work before torch is imported."""
    if prompts is None and out is not None:
        raise ConfigError("--out needs --prompts; the continuation of one prompt goes to stdout")
    if prompts is not None and (load_state or save_state):
        raise ConfigError("--load-state and --save-state are for one prompt, not for --prompts")
    for name, path in (("--out", out), ("--save-state", save_state)):
        if path is not None and path.exists():
            raise ConfigError(f"{name} {path} exists; choose another name")
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{name} {path}: there is no directory {path.parent}")
    if load_state is not None and not load_state.is_dir():
        raise CheckpointError(f"{load_state}: no saved state; make one with --save-state")
    require_checkpoint(checkpoint)


def _print_pieces(pieces: Iterable["Piece"]) -> None:
    for piece in pieces:
        typer.echo(piece.text, nl=False)
    typer.echo()


def _complete_all(
    start: Callable[..., "Generation"],
    requests: list[dict[str, Any]],
    batch_size: int,
    out: Path | None,
    print_lines: bool,
) -> "tuple[list[dict[str, Any]], Result]":
    """Complete all prompts, a line for each to ``out`` or stdout; return the lines' records and the cost.

    The records stay out of memory if they go to a file; the states of finished rows always do.
    """
    records: list[dict[str, Any]] = []
    costs: list[Result] = []
    with nullcontext() if out is None else _appearing_whole(out) as file:
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            result = start([request["prompt"] for request in batch], first_row=first).result
            costs.append(replace(result, completions=()))
            for request, completion in zip(batch, result.completions, strict=True):
                record = _record(request, completion)
                if file is not None:
                    file.write(json.dumps(record) + "\n")
                else:
                    records.append(record)
                    if print_lines:
                        typer.echo(json.dumps(record))
            logger.info("%d of %d prompts", first + len(batch), len(requests))
    return records, reduce(add, costs)


@contextmanager
def _appearing_whole(path: Path) -> Iterator[TextIO]:
    """Open a new file that bears the name ``path`` once all is written, and not before."""
    partial_path = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with partial_path.open("x", encoding="utf-8") as file:
            yield file
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def _record(request: dict[str, Any], completion: "Completion") -> dict[str, Any]:
    return request | {name: getattr(completion, name) for name in RESULT_FIELDS}


def _speed(cost: "Result") -> dict[str, float]:
    names = (
        "prompt_tokens",
        "prompt_tokens_per_second",
        "drawn_tokens",
        "decoded_tokens",
        "decode_tokens_per_second",
    )
    return {name: getattr(cost, name) for name in names}


def _summary(cost: "Result", seed: int | None) -> str:
    parts = [f"read {counted(cost.prompt_tokens, 'token')}, {cost.prompt_tokens_per_second:.0f} tok/s"]
    if cost.drawn_tokens:
        speed = f", {cost.decode_tokens_per_second:.0f} tok/s" if cost.decoded_tokens else ""
        parts.append(f"drew {cost.drawn_tokens}{speed}")
    if seed is not None:
        parts.append(f"seed {seed}")
    return "; ".join(parts)
