"""Where attention and experts stand is said by a period and an offset, if it can be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmamba.config import validate
from switchmamba.errors import ConfigError
from switchmamba.interop.jamba_shape import jamba_shape
from switchmamba.models.config import ModelConfig

LAYERS = {
    "mamba": {"kind": "mamba", "inner_norm_eps": 1e-6},
    "attention": {"kind": "attention", "num_heads": 2, "rope_base": None},
    "mlp": {"kind": "mlp", "d_ff": 8},
    "moe": {"kind": "moe", "num_experts": 2, "d_expert": 8},
}


def config(mixers: list[str], feed_forwards: list[str]) -> ModelConfig:
    pattern = [name for pair in zip(mixers, feed_forwards, strict=True) for name in pair]
    tables = {
        "vocab_size": 9,
        "d_model": 8,
        "num_blocks": 1,
        "norm_eps": 1e-6,
        "pattern": pattern,
        "layers": {name: LAYERS[name] for name in set(pattern)},
    }
    return validate(ModelConfig, tables, source="test")


@given(st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=80)
def test_period_and_offset_give_back_the_layers_and_an_added_one_stands_behind_them(
    count: int, data: st.DataObject
) -> None:
    attention = data.draw(st.integers(2, 12).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p - 1))))
    experts = data.draw(st.integers(1, 12).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p - 1))))
    mixers = ["attention" if i % attention[0] == attention[1] else "mamba" for i in range(count)]
    feed_forwards = ["moe" if i % experts[0] == experts[1] else "mlp" for i in range(count)]
    if "mamba" not in mixers:
        return
    shape = jamba_shape(config(mixers, feed_forwards))
    assert shape.adds_attention == ("attention" not in mixers)
    period, offset = shape.attention
    assert offset < period
    at = [i for i in range(shape.num_layers) if i % period == offset]
    assert at == [
        i for i, mixer in enumerate([*mixers, "attention"][: shape.num_layers]) if mixer == "attention"
    ]
    period, offset = shape.experts
    assert offset < period
    assert [feed_forward for _, feed_forward in shape.all_layers] == [
        "moe" if shape.num_experts > 1 and i % period == offset else "mlp" for i in range(shape.num_layers)
    ]
    assert shape.native("test").steps == config(mixers, feed_forwards).steps


@given(st.lists(st.booleans(), min_size=3, max_size=8))
@settings(deadline=None, max_examples=60)
def test_experts_at_no_period_are_refused_and_only_those(has_experts: list[bool]) -> None:
    at = [i for i, has in enumerate(has_experts) if has]
    periodic = not at or any(
        [i for i in range(len(has_experts)) if i % period == at[0]] == at for period in range(at[0] + 1, 20)
    )
    model = config(["mamba"] * len(has_experts), ["moe" if has else "mlp" for has in has_experts])
    if periodic:
        jamba_shape(model)
    else:
        with pytest.raises(ConfigError, match="experts do not stand at a fixed period"):
            jamba_shape(model)


def test_the_added_layer_has_no_experts_where_the_period_allows_it() -> None:
    assert jamba_shape(config(["mamba"] * 3, ["mlp", "moe", "mlp"])).all_layers[-1] == ("attention", "mlp")
    assert jamba_shape(config(["mamba"] * 2, ["moe", "moe"])).all_layers[-1] == ("attention", "moe")
