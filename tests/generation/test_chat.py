"""A chat reads every message once and writes what the whole conversation at once would have made it write."""

from pathlib import Path

import pytest
import torch

from switchmamba.data.chat import ChatTemplate, encode_conversations
from switchmamba.errors import CheckpointError, DataError
from switchmamba.generation.chat import Chat
from switchmamba.generation.generate import generate
from switchmamba.generation.saved_state import save_state
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.language_model import LanguageModel
from tests.generation.tiny_models import PRESETS, next_logits, relative_difference, tiny_model, tiny_tokenizer

GREEDY = SamplingSettings(temperature=0)
TEXT_END = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def begin(model: LanguageModel | None = None, template: str | None = None, **arguments: object) -> Chat:
    own = ChatTemplate() if template is None else ChatTemplate(template)
    settings = {"settings": GREEDY, "max_tokens": 12, **arguments}
    return Chat(model or tiny_model(), tiny_tokenizer(), own, **settings)


def say(talk: Chat, text: str) -> str:
    return "".join(talk.answer(text))


def ends_after(count: int, model: LanguageModel, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model draw ``token`` as every ``count``-th token of an answer."""
    from switchmamba.generation import generate as module

    drawn = iter(range(10**6))
    choose = module.choose

    def chosen(logits, settings, generators):
        tokens = choose(logits, settings, generators)
        return torch.full_like(tokens, token) if next(drawn) % count == count - 1 else tokens

    monkeypatch.setattr(module, "choose", chosen)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("closed", [True, False])
def test_three_turns_leave_the_state_that_the_whole_conversation_leaves(preset, closed, monkeypatch):
    model, tokenizer = tiny_model(preset), tiny_tokenizer()
    talk = begin(model, system="Be calm.")
    if closed:
        ends_after(5, model, tokenizer.end_of_text_id, monkeypatch)
    answers = []
    for text in ("The sea?", "And the ship?", "Nobody?"):
        assert say(talk, text) == talk.completion.text
        assert talk.completion.finish_reason == ("end_of_text" if closed else "length")
        answers.append(list(talk.completion.token_ids))
    template = ChatTemplate()
    end = [tokenizer.end_of_text_id]
    ids: list[int] = []
    read = [m for m in talk.messages if m["role"] != "assistant"]
    for turn, answer in enumerate(answers):
        history = [{"role": "system", "content": "Be calm."}]
        for i in range(turn):
            history += [read[1 + i], {"role": "assistant", "content": "x"}]
        segment = template.prompt([*history, read[1 + turn]], read=len(history) if turn else 0)
        ids += encode_conversations(tokenizer, [[segment]])[0][0].tolist() + answer
        if turn < 2 or closed:
            ids += end
    with torch.no_grad():
        whole = model(torch.tensor([ids])).logits[0, -1]
    assert relative_difference(next_logits(model, talk.completion.continuation), whole) < 1e-9
    reads = sum(len(answer) for answer in answers) + 3 * closed + 2 * (not closed)
    assert talk.tokens_read == len(ids) - reads + 2 * (not closed)


def test_a_turn_that_ends_with_a_text_stops_there_and_goes_on_behind_it(monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    talk = begin(model, TEXT_END)
    end = tokenizer.encode("[/]")
    assert len(end) == 3
    script = iter([*tokenizer.encode("Aye"), *end, *tokenizer.encode("No"), *end])
    from switchmamba.generation import generate as module

    monkeypatch.setattr(module, "choose", lambda logits, *_: torch.tensor([next(script)]))
    assert say(talk, "Calm?") == "Aye"
    assert talk.completion.finish_reason == "stop"
    assert say(talk, "Still?") == "No"
    seen = "[user]Calm?[/][assistant]", "Aye[/]", "[user]Still?[/][assistant]", "No[/]"
    ids = [token for part in seen for token in tokenizer.encode(part)]
    with torch.no_grad():
        whole = model(torch.tensor([ids])).logits[0, -1]
    assert relative_difference(next_logits(model, talk.completion.continuation), whole) < 1e-9


def test_an_interrupted_answer_counts_as_far_as_it_came_and_is_closed_before_the_next_message():
    talk, pieces = begin(max_tokens=40), []
    for piece in talk.answer("The sea?"):
        pieces.append(piece)
        if len(pieces) == 3:
            talk.interrupt()
    assert talk.completion.finish_reason == "interrupted"
    assert len(talk.completion.token_ids) < 40
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces).rstrip()}
    before = talk.tokens_read
    say(talk, "And?")
    closing = ChatTemplate().prompt(talk.messages[:-1], read=2, closed=False)
    assert talk.tokens_read - before == len(encode_conversations(tiny_tokenizer(), [[closing]])[0][0])


def test_an_answer_that_is_given_up_leaves_the_conversation_as_it_was():
    talk = begin()
    first = say(talk, "The sea?")
    for _ in talk.answer("And?"):
        break
    assert [m["content"] for m in talk.messages] == ["The sea?", first.rstrip()]
    again = begin()
    say(again, "The sea?")
    assert say(talk, "Nobody?") == say(again, "Nobody?")


def test_reset_forgets_and_a_new_system_message_begins_the_next_conversation():
    talk = begin()
    first = say(talk, "The sea?")
    talk.reset()
    assert talk.messages == [] and talk.tokens_read == 0
    assert say(talk, "The sea?") == first
    talk.system = "Be brief."
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_saved_conversation_goes_on_without_being_read_again(tmp_path: Path):
    settings = SamplingSettings(seed=3)
    talk = begin(settings=settings, system="Be calm.")
    with pytest.raises(DataError, match="nothing has been said"):
        talk.save(tmp_path / "early")
    say(talk, "The sea?")
    talk.save(tmp_path / "talk")
    other = begin(settings=settings)
    other.load(tmp_path / "talk")
    assert (other.messages, other.tokens_read, other.system) == (talk.messages, talk.tokens_read, "Be calm.")
    assert say(other, "And?") == say(talk, "And?")


def test_another_state_template_or_model_is_no_conversation_to_go_on_with(tmp_path: Path):
    model = tiny_model()
    state = generate(model, tiny_tokenizer(), ["a"], GREEDY, max_tokens=1).result.completions[0].continuation
    save_state(tmp_path / "state", model, state)
    talk = begin(model)
    with pytest.raises(CheckpointError, match="not a conversation"):
        talk.load(tmp_path / "state")
    for nothing in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no saved conversation; /save makes one"):
            talk.load(nothing)
    say(talk, "The sea?")
    talk.save(tmp_path / "talk")
    with pytest.raises(CheckpointError, match="another template"):
        begin(model, TEXT_END).load(tmp_path / "talk")
    with pytest.raises(CheckpointError, match="another model"):
        begin(tiny_model(seed=1)).load(tmp_path / "talk")
