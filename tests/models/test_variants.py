"""Every variant of the paper is a configuration that builds, counts as published, trains and decodes."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
import torch

from switchmamba import LanguageModel, presets
from switchmamba.config import apply_overrides, validate
from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.models.accounting import account
from switchmamba.training.config import RunConfig
from tests.layers.test_contract import relative

PAGE = (Path(__file__).parents[2] / "docs" / "variants.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n# ([\w-]+): ([\d,]+) / ([\d,]+)\n(.*?)```", PAGE, flags=re.DOTALL)
COMBINATIONS = [
    list(chosen) for n in (1, 2, 3) for chosen in itertools.combinations(("conv", "gate", "out"), n)
]
V1 = {"context_length": 256, "batch_size": 256, "steps": 100_000, "learning_rate": 1e-3}


def dotted(tables: dict, prefix: str = "") -> list[tuple[str, object]]:
    pairs = []
    for name, value in tables.items():
        pairs += dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


def preset(name: str, changes: dict) -> RunConfig:
    return validate(RunConfig, apply_overrides(presets[name], dotted(changes)), source=name)


def inner_moe(projections: list[str], every_other: bool, experts: int, d_expert: int) -> dict:
    """What to change of a Mamba preset; ``experts`` for one projection in every layer, fewer if there are more."""
    layer = {
        "kind": "inner_moe_mamba",
        "projections": projections,
        "experts": {
            "num_experts": (1 + every_other) * experts // len(projections),
            "d_expert": d_expert,
            "activation": "relu",
            "capacity_factor": 1.0,
        },
    }
    return (
        {"pattern": ["mamba", "inner"], "layers": {"inner": layer}}
        if every_other
        else {"layers": {"mamba": layer}}
    )


TINY = {
    f"inner-moe-{'-'.join(chosen)}-{'every-other' if every_other else 'all'}": (
        "mamba-tiny",
        {"num_blocks": 2 - every_other} | inner_moe(chosen, every_other, 6, 11),
    )
    for chosen in COMBINATIONS
    for every_other in (False, True)
} | {
    f"ratio-{expand.replace('/', '-over-')}": (
        "moe-mamba-tiny",
        {"layers": {"mamba": {"expand": expand}, "moe": {"d_expert": d_expert, "num_experts": experts}}},
    )
    for expand, d_expert, experts in (("2/3", 160, 2), ("4/3", 128, 3), ("8/3", 64, 6), ("10/3", 32, 12))
}
TINY |= {
    "ratio-6-to-0": ("mamba-tiny", {"layers": {"mamba": {"expand": 4}}}),
    "one-expert": ("moe-mamba-tiny", {"layers": {"moe": {"num_experts": 1}}}),
    "256-experts": ("moe-mamba-tiny", {"layers": {"moe": {"num_experts": 256, "d_expert": 8}}}),
    "parallel": ("moe-mamba-tiny", {"pattern": [["mamba", "moe"]]}),
    "parallel-norms": ("moe-mamba-tiny", {"pattern": [["mamba", "moe"]], "norm_per_branch": True}),
    "mamba-mlp": (
        "mamba-tiny",
        {"pattern": ["mamba", "mlp"], "layers": {"mlp": {"kind": "mlp", "d_ff": 96, "activation": "relu"}}},
    ),
}


@pytest.fixture(params=TINY)
def model(request) -> LanguageModel:
    torch.manual_seed(0)
    name, changes = TINY[request.param]
    return LanguageModel(preset(name, {"model": changes}).model).double()


@pytest.mark.parametrize(("name", "total", "active", "block"), BLOCKS)
def test_a_configuration_on_the_page_builds_and_has_the_parameters_it_names(name, total, active, block):
    config = preset(name, tomllib.loads(block)).model
    with torch.device("meta"):
        built = LanguageModel(config)
    counted = account(config)
    assert sum(p.numel() for p in built.parameters()) == counted.parameters_with_embeddings
    assert f"{counted.parameters:,} / {counted.active_parameters:,}" == f"{total} / {active}"


def test_the_page_has_a_block_for_each_ratio_and_both_placements():
    inner = [width for *_, block in BLOCKS if (width := re.search(r'expand = "?([\d/]+)', block))]
    assert [found[1] for found in inner] == ["2/3", "4/3", "2", "8/3", "10/3", "4"]
    assert len(BLOCKS) == PAGE.count("```toml")


@pytest.mark.parametrize("every_other", [False, True])
@pytest.mark.parametrize("projections", COMBINATIONS, ids="-".join)
def test_inner_moe_has_as_many_experts_wherever_they_stand(projections, every_other):
    changes = {"num_blocks": 16 >> every_other} | inner_moe(projections, every_other, 24, 352)
    config = preset("mamba-25m", {"model": changes}).model
    with torch.device("meta"):
        built = LanguageModel(config)
    mixtures = [module for module in built.modules() if isinstance(module, MoE)]
    assert sum(moe.w1_EFD.numel() + moe.w2_EDF.numel() for moe in mixtures) == 16 * 24 * 540_672
    routers = sum(moe.router.weight.numel() for moe in mixtures)
    counted, replaced = account(config), 524_288 * len(mixtures)
    assert counted.parameters == 27_131_904 - replaced + 16 * 24 * 540_672 + routers
    assert counted.active_parameters == 27_131_904 - replaced + 540_672 * len(mixtures) + routers
    assert counted.parameters_with_embeddings == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(
    ("experts", "total"),
    [
        (1, 26),
        (2, 39),
        (4, 64),
        (8, 114),
        (16, 215),
        (32, 416),
        (42, 542),
        (64, 819),
        (128, 1625),
        (256, 3236),
    ],
)
def test_totals_over_experts_are_those_of_the_tables(experts, total):
    config = preset("moe-mamba-25m", {"model": {"layers": {"moe": {"num_experts": experts}}}}).model
    assert round(account(config).parameters / 1e6) == total
    assert f"| {total} " in PAGE and f"| {experts} " in PAGE


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("transformer-25m", 25_182_208),
        ("transformer-moe-25m", 545_406_976),
        ("mamba-25m", 27_131_904),
        ("moe-mamba-25m-e32", 416_358_400),
    ],
)
def test_the_models_of_the_first_version_build_with_its_recipe(name, total):
    training = {name: value for name, value in V1.items() if name != "context_length"}
    config = preset(name, {"data": {"context_length": V1["context_length"]}, "training": training})
    assert account(config.model).parameters == total
    assert config.training.batch_size * config.data.context_length * config.training.steps == 6_553_600_000


def test_no_later_token_reaches_an_earlier_logit(model):
    model.eval()
    embedded = []
    model.embedding.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    logits = model(torch.arange(22).view(2, 11)).logits
    (gradient,) = torch.autograd.grad(logits[:, :6].square().sum(), embedded[0])
    assert model.causal
    assert gradient[:, 6:].eq(0).all()
    assert gradient[:, :6].ne(0).any()


def test_chunks_and_steps_equal_the_whole(model):
    model.eval()
    tokens = torch.arange(22).view(2, 11)
    with torch.inference_mode():
        whole = model(tokens)
        first = model(tokens[:, :4])
        second = model(tokens[:, 4:9], state=first.state)
        assert relative(torch.cat([first.logits, second.logits], 1), whole.logits[:, :9]) < 1e-12
        ninth = model(tokens[:, 9:10], state=second.state)
        assert relative(ninth.logits[:, 0], whole.logits[:, 9]) < 1e-12
        tensors = {name: tensor.clone() for name, tensor in ninth.state.tensors().items()}
        assert (
            relative(model.decode_(tokens[:, 10], model.state_from_tensors(tensors)), whole.logits[:, 10])
            < 1e-12
        )


def test_packed_documents_equal_separate_ones(model):
    model.eval()
    tokens, ids = (
        torch.arange(22).view(2, 11),
        torch.tensor([[-1] * 2 + [0] * 4 + [1] * 5, [3] * 7 + [4] * 4]),
    )
    packed = model(tokens, ids).logits
    for row, pieces in enumerate(([(2, 6), (6, 11)], [(0, 7), (7, 11)])):
        for start, end in pieces:
            alone = model(tokens[row : row + 1, start:end]).logits
            assert relative(packed[row : row + 1, start:end], alone) < 1e-12


def test_it_trains_and_every_parameter_gets_a_gradient(model):
    model.train()
    tokens = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        output = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        # Of a router with one expert, whose probability is 1, only the z-loss has a gradient.
        auxiliary = sum(stats.load_balance_loss + stats.z_loss for stats in output.router_stats)
        optimizer.zero_grad()
        (loss + 0.01 * auxiliary).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.ne(0).any(), name
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_the_computed_count_is_the_built_one(model):
    assert account(model.config).parameters_with_embeddings == sum(p.numel() for p in model.parameters())
