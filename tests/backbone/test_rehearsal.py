"""Run a backbone once to learn its shapes: forwards that read values, and inputs that suit language models."""

import functools

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import visadapt
from visadapt.backbone import trace
from visadapt.backbone.trace import trace_flow


def repeat(h):
    for _ in range(int(h.abs().sum() > 0)):
        h = h + 1
    return h


READS = {
    "item": lambda h: h * 0 if h.mean().item() > 1e9 else h,
    "bool": lambda h: h * 0 if h.sum() > 1e9 else h,
    "numpy": lambda h: h + float(h.detach().numpy().sum() * 0),
    "from_numpy": lambda h: h + torch.from_numpy(np.asarray(h.detach())),
    "mask": lambda h: h[h.abs().flatten(1).sum(1) > -1],
    "nonzero": lambda h: h * len(h.nonzero()),
    "unique": lambda h: h * len(torch.unique(h)),
    "tolist": lambda h: h * len(h.flatten().tolist()),
    "range": repeat,
    "format": lambda h: (f"{h.sum():.2f}", h)[1],
    "memory": lambda h: h if h.data_ptr() else None,
    "finite": lambda h: h if torch.isfinite(h).all() else None,
}


class Reader(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read = read
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x):
        h = torch.relu(self.c1(x))
        return self.read(h + self.c3(torch.relu(self.c2(h))))


@pytest.mark.parametrize("kind", READS)
def test_forward_that_reads_values(kind):
    x = torch.randn(2, 3, 16, 16)
    found = visadapt.sites(Reader(READS[kind]), example=x)
    assert [site.full_name for site in found] == [
        site.full_name for site in visadapt.sites(Reader(lambda h: h), example=x)
    ]
    assert any(site.kind == "block" for site in found)


def test_message_is_that_of_the_run_on_real_tensors():
    with pytest.raises(visadapt.VisadaptError, match="Expected size for first two dimensions"):
        visadapt.sites(Reader(lambda h: h @ h), example=torch.randn(2, 3, 8, 9))


SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60}
SMALL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
LANGUAGE = {
    "bart": ("Bart", SMALL | {"eos_token_id": 2, "pad_token_id": 1}),
    "bart with other ids": ("Bart", SMALL | {"eos_token_id": 7, "pad_token_id": 3, "decoder_start_token_id": 7}),
    "mbart": ("MBart", SMALL),
    "t5": ("T5", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 60}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 with padding": ("GPT2", GPT2 | {"pad_token_id": 0}),
    "llama": ("Llama", LLAMA),
    "llama with two ends": ("Llama", LLAMA | {"eos_token_id": [2, 3]}),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_guessed_tokens_suit_the_model(name):
    kind, options = LANGUAGE[name]
    config = getattr(transformers, f"{kind}Config")(**options, num_labels=3)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    flow, given = trace_flow(model)
    assert flow.calls
    # two rows, unless the model cannot tell where a row ends
    assert len(given["input_ids"]) == (1 if config.pad_token_id is None else 2)
    with torch.no_grad():
        assert model(**given).logits.shape[-1] == 3


def test_tokens_are_guessed_where_the_config_has_the_size_of_images():
    config = transformers.PerceiverConfig(
        vocab_size=50, d_model=16, d_latents=16, num_latents=4, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    _, given = trace_flow(transformers.PerceiverForSequenceClassification(config))
    assert given.dtype == torch.long


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MEDIA = {
    "vivit": ("VivitForVideoClassification", TINY | {"image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "whisper": ("WhisperForConditionalGeneration", SMALL | {"num_mel_bins": 8, "max_source_positions": 20}),
    "ast": ("ASTForAudioClassification", TINY | {"patch_size": 8, "max_length": 32, "num_mel_bins": 16}),
    "speech to text": ("Speech2TextForConditionalGeneration", SMALL | {"input_feat_per_channel": 8}),
}


@pytest.mark.parametrize("name", MEDIA)
def test_guessed_clips_and_spectrograms_suit_the_model(name):
    kind, options = MEDIA[name]
    options = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2} | options
    config = getattr(transformers, kind.partition("For")[0] + "Config")(**options)
    flow, _ = trace_flow(getattr(transformers, kind)(config))
    assert flow.calls


@functools.lru_cache(maxsize=4)
def cached_table(length: int) -> torch.Tensor:
    return torch.arange(length).float()


class Cached(nn.Module):
    """Keeps tables of positions in caches: of a function, of a function without a limit, and of its own method."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        if not hasattr(self, "_table"):
            # as transformers' detectors do
            self._table = functools.lru_cache(self.table)
        x = x + self.a(torch.relu(self.b(x + self._table(4) + cached_table(4))))
        return self.c(x)

    def table(self, length):
        return (torch.ones(length), [torch.ones(length)])[0]


@pytest.mark.parametrize("called_before", [True, False])
def test_no_fake_tensor_stays_in_a_cache(called_before):
    model, x = Cached().eval(), torch.randn(2, 4)
    cached_table.cache_clear()
    expected = model(x) if called_before else None
    cached_table.cache_clear()
    if called_before:
        model._table.cache_clear()
    trace_flow(model, x)
    found = model(x)
    assert type(found) is torch.Tensor
    assert expected is None or torch.equal(found, expected)
    assert type(cached_table(4)) is torch.Tensor


def test_runs_that_fail_on_fake_tensors_let_go_of_them(monkeypatch):
    searches = []
    monkeypatch.setattr(trace, "forget_fakes", lambda: searches.append(None))
    for read in READS.values():
        trace_flow(Reader(read), torch.randn(2, 3, 16, 16))
    # one may wait for the garbage collector; when errors held what was recorded, nearly all did
    assert len(searches) <= 2


def test_caches_are_searched_only_if_a_fake_tensor_stayed(monkeypatch):
    searches = []
    monkeypatch.setattr(trace, "forget_fakes", lambda: searches.append(None))
    trace_flow(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 4))
    assert not searches
    cached_table.cache_clear()
    trace_flow(Cached().eval(), torch.randn(2, 4))
    assert searches
    cached_table.cache_clear()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = self.stem(x)
        return x + self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("on_meta", ["model", "example"])
def test_a_model_without_values_and_an_example_with_some(on_meta):
    with torch.device("meta" if on_meta == "model" else "cpu"):
        model = Residual()
    example = torch.randn(2, 6)
    example = example if on_meta == "model" else example.to("meta")
    pattern = "example has values, and Residual is on" if on_meta == "model" else "example is on the meta device, and"
    for call in (visadapt.sites, lambda m, example: visadapt.inject(m, visadapt.Bottleneck(m=1), example=example)):
        with pytest.raises(visadapt.VisadaptError, match=pattern):
            call(model, example=example)
    assert not hasattr(model, "_visadapt")
    visadapt.inject(model, visadapt.LoRA(r=1), where="one", example=torch.zeros(2, 6, device=model.one.weight.device))
    if on_meta == "model":
        with pytest.raises(visadapt.VisadaptError, match="cannot be merged on the meta device"):
            visadapt.merge(model, "default")
