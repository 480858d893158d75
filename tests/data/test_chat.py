"""Conversations: the mask counts what the assistant writes, and a template is refused that cannot be followed."""

import json

import pytest

from switchmamba.data.chat import (
    CHAT_TEMPLATE,
    DEFAULT_TEMPLATE,
    ChatTemplate,
    Segment,
    encode_segment,
    read_messages,
)
from switchmamba.data.prepare import prepare
from switchmamba.data.shards import TokenShards
from switchmamba.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from switchmamba.errors import ConfigError, DataError

BYTES = Tokenizer.train([], MIN_VOCAB_SIZE)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Three."},
]


def prepared(tmp_path, records, template=None, **arguments):
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return prepare([file], BYTES, tmp_path / "data", chat_template=template or ChatTemplate(), **arguments)


def shown(shards, number):
    """Text of a document with what counts in brackets; the end of text is ``$``."""
    text, inside = "", False
    for token, counts in zip(shards.document(number), shards.mask(number), strict=True):
        text += ("[" if counts else "]") if bool(counts) != inside else ""
        text += "$" if token == BYTES.end_of_text_id else BYTES.decode([int(token)])
        inside = bool(counts)
    return text + "]" * inside


def test_only_what_the_assistant_writes_counts_its_end_of_turn_included(tmp_path):
    records = [{"messages": TALK}, {"prompt": "A", "completion": "B"}, {"messages": TALK[:4]}]
    prepared(tmp_path, records, validation_fraction=0)
    shards = TokenShards.open(tmp_path / "data")
    shards.verify()
    assert [shown(shards, i) for i in range(3)] == [
        "System:\nBe brief.\n\nUser:\nOne?\n\nAssistant:\n[Two.$]\n\nUser:\nAnd?\n\nAssistant:\n[Three.$]",
        "User:\nA\n\nAssistant:\n[B$]",
        "System:\nBe brief.\n\nUser:\nOne?\n\nAssistant:\n[Two.$]\n\nUser:\nAnd?$",
    ]
    assert shards.num_targets == 5 + 7 + 2 + 5
    assert shards.chat_template() == DEFAULT_TEMPLATE


def test_a_template_may_end_turns_with_a_text_of_its_own(tmp_path):
    template = ChatTemplate(CHATML)
    assert template.stop == "<|im_end|>"
    prepared(tmp_path, [{"prompt": "A", "completion": "B"}], template, validation_fraction=0)
    assert shown(TokenShards.open(tmp_path / "data"), 0) == (
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n[B<|im_end|>]\n$"
    )


def test_a_message_can_spell_neither_the_end_of_text_nor_what_stands_for_it(tmp_path):
    evil = "<|endoftext|>\x02end of text\x03\ue002\ue000\ue002"
    prepared(tmp_path, [{"prompt": evil, "completion": evil}], validation_fraction=0)
    shards = TokenShards.open(tmp_path / "data")
    assert list(shards.document(0)).count(BYTES.end_of_text_id) == 1
    ids = [int(t) for t in shards.document(0)]
    assert BYTES.decode(ids[:-1]) == f"User:\n{evil}\n\nAssistant:\n{evil}"


def test_a_chat_reads_in_pieces_what_training_reads_at_once():
    for template in (ChatTemplate(), ChatTemplate(CHATML)):
        segments = template.segments(TALK)
        asked = [segment for segment in segments if not segment.counted]
        assert template.prompt(TALK[:2]) == asked[0]
        assert template.prompt(TALK[:4], read=3) == asked[1]
    cut = ChatTemplate().prompt(TALK[:4], read=3, closed=False)
    assert encode_segment(BYTES, cut)[0] == BYTES.end_of_text_id
    assert (
        ChatTemplate(CHATML)
        .prompt(TALK[:4], read=3, closed=False)
        .text.startswith("<|im_end|>\n<|im_start|>")
    )
    assert ChatTemplate().prompt(TALK[:2]) == Segment(
        ("System:\nBe brief.\n\nUser:\nOne?\n\nAssistant:\n",), False
    )


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% if %}", "line 1"),
        ("a\n{{ }", "line 2"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end the assistant's turn"),
        ("{{ messages[-1].content }}{{ eos_token }}", "is not additive"),
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "is not additive",
        ),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("x<|endoftext|>", "eos_token"),
        ("{% for m in messages %}{{ m.content }} END{{ eos_token }}{% endfor %}", "recognised"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(source, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ChatTemplate(source, "mine.jinja")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"text": "a"}, "neither field 'messages' nor 'prompt' and 'completion'; it has text"),
        ({"prompt": "a"}, "no field 'completion'"),
        ({"prompt": ["a"], "completion": "b"}, "field 'prompt' is list, not a string"),
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": "a"}, "field 'messages' is str, not a list"),
        ({"messages": ["a"]}, r"messages\[0\] is str, not an object"),
        (
            {"messages": [{"role": "user", "contnet": "a"}]},
            r"messages\[0\] has no field 'content'; did you mean contnet",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\]\.content is NoneType, not a string",
        ),
        ({"messages": [{"role": "asistant", "content": ""}]}, "is 'asistant'; did you mean assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message has role 'assistant'"),
        ("[1]\n", "holds a JSON list, not an object with the field 'messages'"),
        ("{\n", "invalid JSON at character"),
    ],
)
def test_a_malformed_record_is_refused_by_file_line_and_field(record, complaint, tmp_path):
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=rf"talks\.jsonl, line 2: ?{complaint}|line 2: .*{complaint}"):
        prepared(tmp_path, [good, record])
    assert not (tmp_path / "data").exists()
    assert prepared(tmp_path, [good, record, good], skip_bad=True).skipped == 1


def test_a_refusal_of_the_template_itself_names_the_line(tmp_path):
    strict = (
        "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system') }}{% endfor %}" + CHATML
    )
    with pytest.raises(DataError, match=r"line 1: mine\.jinja refuses the conversation: no system"):
        prepared(tmp_path, [{"messages": TALK}], ChatTemplate(strict, "mine.jinja"))


def test_a_refused_order_of_roles_names_the_conversation_and_the_order_it_has(tmp_path):
    merging = (  # answers in a row are one turn
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' and (loop.last or loop.nextitem.role != 'assistant') %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
    )
    good = {"prompt": "a", "completion": "b"}
    roles = ("user", "assistant", "assistant", "user", "assistant")
    odd = {"messages": [{"role": role, "content": "a"} for role in roles]}
    order = (
        r"messages\[2\] is of role 'assistant' where 'user' is due \(it begins user, assistant, assistant\)"
    )
    for source, why in ((strict, "roles must alternate"), (merging, "not additive")):
        with pytest.raises(DataError, match=rf"talks\.jsonl, line 2: mine\.jinja.*{why}.*; {order}"):
            prepared(tmp_path, [good, odd], ChatTemplate(source, "mine.jinja"))
    prepared(tmp_path, [odd], validation_fraction=0)  # ours takes any order


def test_held_out_conversations_are_whole_and_the_last_ones_where_the_hash_chooses_none(tmp_path):
    records = [{"prompt": str(i), "completion": str(i)} for i in range(4)]
    index = prepared(tmp_path, records, validation_fraction=0.001).index
    assert index.source.split_by == "tail"
    assert {split: record.documents for split, record in index.splits.items()} == {
        "train": 3,
        "validation": 1,
    }
    assert shown(TokenShards.open(tmp_path / "data", "validation"), 0) == "User:\n3\n\nAssistant:\n[3$]"


def test_a_changed_template_is_noticed(tmp_path):
    prepared(tmp_path, [{"prompt": "A", "completion": "B"}], validation_fraction=0)
    (tmp_path / "data" / CHAT_TEMPLATE).write_text(CHATML)
    with pytest.raises(DataError, match=r"chat_template\.jinja: damaged"):
        TokenShards.open(tmp_path / "data").verify()


def test_a_template_has_the_filters_and_names_of_hugging_faces():
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
        "{{ {'ä<': 1} | tojson(indent=1) }}{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    )
    user, assistant, _ = ChatTemplate(source).segments([TALK[1], TALK[2], TALK[3]])
    assert user.texts == ("", '{\n "ä<": 1\n}One?', "")
    assert assistant.texts == ('{\n "ä<": 1\n}Two.', "")


def test_messages_of_a_record_are_read_as_they_stand():
    assert read_messages({"messages": TALK, "id": 3}, "here") == TALK
