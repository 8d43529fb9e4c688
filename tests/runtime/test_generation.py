"""Generation for mixed tasks: every prompt gets what its task alone generates, with beams, samples and caches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import visadapt
from tests.models import enliven, stir
from tests.runtime.builds import BART, SIZES, T5
from visadapt import Biases, Bottleneck, Full, LoRA, TopLayers, VisadaptError

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags:UserWarning")

TASKS = ["a", "b", "b", "c", "a"]
BUILDS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=40,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, eos_token_id=1, bos_token_id=2)),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0, eos_token_id=1
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
}
METHODS = {
    "gpt2": Bottleneck(m=3),
    "llama": LoRA(r=2),
    "mamba": Bottleneck(m=3),
    "t5": Bottleneck(m=3),
    "bart": Biases(),
}
OWN_WEIGHTS = {"gpt2": Full(), "t5": Full(), "bart": TopLayers(1)}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "beams without a cache": {"num_beams": 2, "use_cache": False},
}
# every way on every model, and methods with weights of their own once on each
CASES = [
    *((name, method, way) for name, method in METHODS.items() for way in WAYS if way != "beams"),
    *((name, method, "beams") for name, method in OWN_WEIGHTS.items()),
]
NEW = 3
"""Tokens that are generated: with the six of a prompt, enough for a sequence to pass a power of two."""


@cache
def injected(name: str, method: Any) -> nn.Module:
    torch.manual_seed(0)
    model = enliven(BUILDS[name]()).eval()
    for seed, task in enumerate("abc"):
        visadapt.inject(model, method, task=task, norms="affine" if isinstance(method, Bottleneck | LoRA) else "frozen")
        stir(model, task, seed)
    return model


def prompts(name: str, n: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (n, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    # decoders take their padding on the left
    hidden = (0, slice(4, None)) if name in ("t5", "bart") else (0, slice(None, 2))
    ids[hidden] = mask[hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: nn.Module, given: dict[str, Tensor], task: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    with visadapt.using(model, task):
        return model.generate(**given, max_new_tokens=NEW, **options)


def trimmed(sequence: Tensor) -> list[int]:
    """Up to the end-of-text token: what comes after it depends on the length of the others."""
    tokens = sequence.tolist()
    start = len(tokens) - NEW
    return tokens[: tokens.index(1, start)] if 1 in tokens[start:] else tokens


@pytest.mark.parametrize(("name", "method", "way"), CASES, ids=str)
def test_each_prompt_gets_what_its_task_alone_generates(name, method, way):
    model, given = injected(name, method), prompts(name)
    times = WAYS[way].get("num_return_sequences", 1)
    mixed = generate(model, given, TASKS, **WAYS[way])
    assert len(mixed) == 5 * times
    for task in "abc":
        index = [i for i, each in enumerate(TASKS) if each == task]
        alone = generate(model, {key: value[index] for key, value in given.items()}, task, **WAYS[way])
        for number, i in enumerate(index):
            for k in range(times):
                assert trimmed(mixed[i * times + k]) == trimmed(alone[number * times + k])


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_samples_are_drawn_from_each_prompts_own_task(name):
    model, given = injected(name, Bottleneck(m=3)), prompts(name)
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    mixed = generate(model, given, TASKS, **options)
    # the likeliest of one token is that token
    greedy = generate(model, given, TASKS)
    assert [trimmed(row) for row in mixed[::2]] == [trimmed(row) for row in greedy]
    assert [trimmed(row) for row in mixed[1::2]] == [trimmed(row) for row in greedy]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tasks_are_named_per_prompt_not_per_beam(name):
    model, given = injected(name, Bottleneck(m=3)), prompts(name, n=2)
    with pytest.raises(VisadaptError, match="4 tasks were named for 2 prompts: name one per prompt"):
        generate(model, given, ["a", "b", "a", "b"], num_beams=2)
    assert visadapt.active(model) == "c"
    assert generate(model, given, ["a", "b"], num_beams=2).shape[0] == 2


def test_scores_are_those_of_each_prompts_task_or_refused():
    options = {"return_dict_in_generate": True, "output_scores": True}
    model, given = injected("t5", Bottleneck(m=3)), prompts("t5")
    mixed = generate(model, given, TASKS, **options)
    alone = generate(model, {key: value[1:3] for key, value in given.items()}, "b", **options)
    torch.testing.assert_close(mixed.scores[0][1:3], alone.scores[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(VisadaptError, match="leave out return_dict_in_generate"):
        generate(injected("bart", TopLayers(1)), prompts("bart"), TASKS, **options)


def test_ejected_model_generates_as_before():
    model, given = enliven(BUILDS["t5"]()).eval(), prompts("t5")
    expected = model.generate(**given, max_new_tokens=5, num_beams=2)
    visadapt.inject(model, m=3, task="a")
    generate(model, given, ["a", None, "a", None, None])
    visadapt.eject(model)
    assert type(model) is transformers.T5ForConditionalGeneration
    assert torch.equal(model.generate(**given, max_new_tokens=5, num_beams=2), expected)
