"""Run a backbone once to learn its shapes: forwards that read values, and inputs that suit language models."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import visadapt
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
