"""One small architecture of every timm family, torchvision's and transformers' models, and what is checked on each.

The tests and docs/build/architectures.py share this file. Weights are random and every batch is tiny: what is checked
is not whether a model learns, but that adapters are in the right places and that nothing else moves.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visadapt
from visadapt.backbone.facts import Facts
from visadapt.backbone.fingerprint import backbone_tensors
from visadapt.backbone.trace import call


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        library: timm, torchvision or transformers.
        family: timm's module, or the model's name without its size.
        name: as the library spells it.
        size: side of the images that it is checked on; 0 for tokens.
        options: for the builder.
    """

    library: str
    family: str
    name: str
    size: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"

    @property
    def title(self) -> str:
        """Its name, and what makes it smaller than that."""
        smaller = [f"{key}={self.options[key]}" for key in ("depth",) if key in self.options]
        return f"{self.name}({', '.join(smaller)})" if smaller else self.name

    def build(self, seed: int = 0) -> nn.Module:
        """The backbone in eval mode; the same for the same seed."""
        torch.manual_seed(seed)
        return awaken(self._made()).eval()

    def blank(self) -> nn.Module:
        """The same without weights: for what only looks at its structure."""
        with torch.device("meta"):
            return self._made()

    def _made(self) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[self.library](self)

    def example(self, n: int = 2) -> Any:
        """A small batch, as :func:`visadapt.sites` takes it."""
        generator = torch.Generator().manual_seed(0)
        if self.size:
            images = torch.randn(n, 3, self.size, self.size, generator=generator)
            return {"pixel_values": images} if self.library == "transformers" else images
        mask = torch.ones(n, 9, dtype=torch.long)
        mask[0, 6:] = 0
        ids = torch.randint(5, 60, (n, 9), generator=generator)
        ids[:, -1] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _timm(architecture: Architecture) -> nn.Module:
    import timm

    return timm.create_model(architecture.name, num_classes=10, **architecture.options)


def _torchvision(architecture: Architecture) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(architecture.name, weights=None, **architecture.options)


def _transformers(architecture: Architecture) -> nn.Module:
    import transformers

    name = architecture.name
    config = getattr(transformers, f"{name}Config")(**architecture.options)
    kind = "ForImageClassification" if architecture.size else "ForSequenceClassification"
    return getattr(transformers, name + kind)(config)


def _t(family: str, name: str, size: int = 128, **options: Any) -> Architecture:
    return Architecture("timm", family, name, size, options)


# the smallest of each of timm's modules by number of parameters, timm's own test models aside; where it is huge, two
# layers of it are enough
TIMM = (
    _t("beit", "beit_base_patch16_224", 224, depth=2),
    _t("byoanet", "halonet_h1", 256),
    _t("byobnet", "mobileone_s1"),
    _t("cait", "cait_xxs24_224", 224),
    _t("coat", "coat_tiny", 224),
    _t("convit", "convit_tiny", 224),
    _t("convmixer", "convmixer_768_32"),
    _t("convnext", "convnext_zepto_rms"),
    _t("cpubone", "cpubone_nano"),
    _t("crossvit", "crossvit_tiny_240", 240),
    _t("csatv2", "csatv2"),
    _t("cspnet", "cs3darknet_focus_s"),
    _t("cspnext", "cspnext_tiny"),
    _t("davit", "davit_tiny"),
    _t("deepseek_vit", "deepseek_vit_412m", 126, depth=2),
    _t("deit", "deit_tiny_patch16_224", 224),
    _t("densenet", "densenet121"),
    _t("dla", "dla46x_c"),
    _t("dpn", "dpn48b"),
    _t("edgenext", "edgenext_xx_small"),
    _t("efficientformer", "efficientformer_l1", 224),
    _t("efficientformer_v2", "efficientformerv2_s0", 224),
    _t("efficientnet", "mnasnet_small"),
    _t("efficientvim", "efficientvim_m1"),
    _t("efficientvit_mit", "efficientvit_b0"),
    _t("efficientvit_msra", "efficientvit_m0", 224),
    _t("eva", "eva02_tiny_patch14_224", 224),
    _t("fasternet", "fasternet_t0"),
    _t("fastvit", "fastvit_t8"),
    _t("focalnet", "focalnet_tiny_srf"),
    _t("gcvit", "gcvit_xxtiny", 224),
    _t("gemma4_vit", "gemma4_vit_167m", 96, depth=2),
    _t("ghostnet", "ghostnet_050"),
    _t("hardcorenas", "hardcorenas_b"),
    _t("hgnet", "hgnetv2_b0"),
    _t("hiera", "hiera_tiny_224", 224),
    _t("hieradet_sam2", "sam2_hiera_tiny", 224),
    _t("hrnet", "hrnet_w18_small"),
    _t("iformer", "iformer_t"),
    _t("inception_next", "inception_next_atto"),
    _t("inception_resnet_v2", "inception_resnet_v2", 139),
    _t("inception_v3", "inception_v3", 139),
    _t("inception_v4", "inception_v4", 139),
    _t("lcnetv2", "lcnetv2_small"),
    _t("levit", "levit_128s", 224),
    _t("lowformer", "lowformer_b0"),
    _t("mambaout", "mambaout_femto"),
    _t("maxxvit", "maxvit_pico_rw_256", 256),
    _t("metaformer", "poolformerv2_s12"),
    _t("mlp_mixer", "mixer_s32_224", 224),
    _t("mobilenetv3", "mobilenetv3_small_050"),
    _t("mobilenetv5", "mobilenetv5_300m"),
    _t("mobilevit", "mobilevit_xxs"),
    _t("mvitv2", "mvitv2_tiny", 224),
    _t("naflexvit", "naflexvit_base_patch16_parfac_gap", depth=2),
    _t("nasnet", "nasnetalarge"),
    _t("nest", "nest_tiny", 224),
    _t("nextvit", "nextvit_small"),
    _t("nfnet", "nf_regnet_b0"),
    _t("pit", "pit_ti_224", 224),
    _t("pnasnet", "pnasnet5large"),
    _t("pvt_v2", "pvt_v2_b0"),
    _t("qwen3_vit", "qwen3_vit_88m", depth=2),
    _t("rdnet", "rdnet_tiny"),
    _t("regnet", "regnetx_002"),
    _t("repghost", "repghostnet_050"),
    _t("repvit", "repvit_m1"),
    _t("res2net", "res2next50"),
    _t("resnest", "resnest14d"),
    _t("resnet", "resnet10t"),
    _t("resnetv2", "resnetv2_18"),
    _t("rexnet", "rexnet_100"),
    _t("selecsls", "selecsls42"),
    _t("senet", "legacy_seresnet18"),
    _t("sequencer", "sequencer2d_s", 224),
    _t("shvit", "shvit_s1"),
    _t("sknet", "skresnet18"),
    _t("starnet", "starnet_s050"),
    _t("swiftformer", "swiftformer_xs", 224),
    _t("swin_transformer", "swin_tiny_patch4_window7_224", 224),
    _t("swin_transformer_v2", "swinv2_tiny_window8_256", 256),
    _t("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 224),
    _t("tiny_vit", "tiny_vit_5m_224"),
    _t("tnt", "tnt_s_legacy_patch16_224", 224),
    _t("tresnet", "tresnet_m"),
    _t("twins", "twins_svt_small", 224),
    _t("vgg", "vgg11"),
    _t("visformer", "visformer_tiny", 224),
    _t("vision_transformer", "vit_tiny_patch16_224", 224),
    _t("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 224),
    _t("vision_transformer_relpos", "vit_srelpos_small_patch16_224", 224),
    _t("vision_transformer_sam", "samvit_base_patch16_224", 224),
    _t("vitamin", "vitamin_small_224", 224),
    _t("volo", "volo_d1_224", 224),
    _t("vovnet", "ese_vovnet19b_slim_dw"),
    _t("xception", "legacy_xception"),
    _t("xception_aligned", "xception41p"),
    _t("xcit", "xcit_nano_12_p16_224", 224),
)

TORCHVISION = tuple(
    Architecture("torchvision", family, name, size, options)
    for family, name, size, options in (
        ("alexnet", "alexnet", 64, {}),
        ("vgg", "vgg11", 32, {}),
        ("vgg", "vgg11_bn", 32, {}),
        ("resnet", "resnet18", 64, {}),
        ("resnet", "resnext50_32x4d", 64, {}),
        ("squeezenet", "squeezenet1_1", 64, {}),
        ("googlenet", "googlenet", 64, {"aux_logits": False, "init_weights": False}),
        ("inception", "inception_v3", 96, {"aux_logits": False, "init_weights": False}),
        ("densenet", "densenet121", 64, {}),
        ("mnasnet", "mnasnet0_5", 64, {}),
        ("mobilenetv2", "mobilenet_v2", 64, {}),
        ("mobilenetv3", "mobilenet_v3_small", 64, {}),
        ("shufflenetv2", "shufflenet_v2_x0_5", 64, {}),
        ("efficientnet", "efficientnet_b0", 64, {}),
        ("efficientnet", "efficientnet_v2_s", 64, {}),
        ("regnet", "regnet_y_400mf", 64, {}),
        ("vision_transformer", "vit_b_32", 64, {"image_size": 64}),
        ("swin_transformer", "swin_t", 64, {}),
        ("swin_transformer", "swin_v2_t", 64, {}),
        ("convnext", "convnext_tiny", 64, {}),
        ("maxvit", "maxvit_t", 224, {}),
    )
)

_BERT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
_T5 = {"d_model": 48, "d_ff": 96, "d_kv": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 100, "num_labels": 3}
_VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 32}

TRANSFORMERS = tuple(
    Architecture("transformers", name, name, size, options)
    for name, size, options in (
        ("Bert", 0, _BERT),
        ("Roberta", 0, _BERT),
        ("XLMRoberta", 0, _BERT),
        ("Electra", 0, _BERT | {"embedding_size": 16}),
        ("Albert", 0, _BERT | {"embedding_size": 16}),
        (
            "DistilBert",
            0,
            {"dim": 48, "n_layers": 2, "n_heads": 2, "hidden_dim": 96, "vocab_size": 100, "num_labels": 3},
        ),
        ("Deberta", 0, _BERT),
        ("DebertaV2", 0, _BERT),
        ("MPNet", 0, _BERT),
        (
            "ModernBert",
            0,
            _BERT | dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0),
        ),
        (
            "GPT2",
            0,
            {"n_embd": 48, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 40, "num_labels": 3}
            | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        ),
        ("Llama", 0, _BERT | {"pad_token_id": 0}),
        ("T5", 0, _T5 | {"pad_token_id": 0, "decoder_start_token_id": 0}),
        ("ViT", 32, _VIT | {"patch_size": 8, "num_labels": 3}),
        (
            "Swin",
            64,
            {
                "embed_dim": 24,
                "depths": [1, 1],
                "num_heads": [1, 2],
                "image_size": 64,
                "window_size": 4,
                "num_labels": 3,
            },
        ),
        (
            "ResNet",
            64,
            {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
        ),
        ("ConvNext", 64, {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 3}),
    )
)


ALL = (*TIMM, *TORCHVISION, *TRANSFORMERS)


@torch.no_grad()
def awaken(model: nn.Module) -> nn.Module:
    """Fills scales that libraries start at zero or near it: behind them no branch would say or learn anything."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("bias") or not p.is_floating_point() or p.abs().max() > 1e-2:
            continue
        if p.ndim < 2 or p.numel() == max(p.shape):
            p.uniform_(0.5, 1.0, generator=generator)
        else:
            p.normal_(0, (1.0 / p[0].numel()) ** 0.5, generator=generator)
    return model


@dataclass
class Report:
    """What was found on one architecture; ``error`` is empty if everything held."""

    library: str
    family: str
    name: str
    title: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    layouts: str = ""
    traced: bool = False
    adapters: int = 0
    backbone: int = 0
    identity: bool = False
    head: bool = False
    gradient: bool = False
    frozen: bool = False
    file: bool = False
    seconds_inject: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return not self.error and all((self.identity, self.head, self.gradient, self.frozen, self.file))


def logits_of(model: nn.Module, example: Any) -> Tensor:
    """The model's answer as one tensor, whatever it is wrapped in."""
    out = call(model, example)
    out = getattr(out, "logits", out)
    return out[0] if isinstance(out, tuple | list) else out


def check(architecture: Architecture, folder: Path, m: int = 32) -> Report:
    """Everything that ``inject(model, m=32)`` promises without a word about where, on one architecture.

    Args:
        architecture: which.
        folder: for the task's file.
        m: width of the bottlenecks.

    Returns:
        What held; the first error in words.
    """
    report = Report(architecture.library, architecture.family, architecture.name, architecture.title)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(architecture, folder, m, report)
    except visadapt.VisadaptError as error:
        report.error = str(error)
    report.seconds = round(time.perf_counter() - begin, 1)
    return report


def _check(architecture: Architecture, folder: Path, m: int, report: Report) -> None:
    model, example = architecture.build(), architecture.example()
    fresh = copy.deepcopy(model)
    # on some processors torch picks other kernels, which round differently, for weights that ask for a gradient; inject
    # freezes them, so the output before is that of frozen weights too
    model.requires_grad_(False)
    with torch.no_grad():
        before = logits_of(model, example)
    report.backbone = Facts(model).size

    begin = time.perf_counter()
    visadapt.inject(model, m=m, task="same", head="frozen", norms="frozen")
    report.seconds_inject = round(time.perf_counter() - begin, 3)
    found = visadapt.sites(model)
    report.kinds = dict(Counter(site.kind for site in found))
    report.layouts = " ".join(sorted({site.layout for site in found if site.kind != "conv3x3"}))
    report.traced = any(site.traced for site in found)
    report.adapters = visadapt.summary(model)["same"].adapters
    with torch.no_grad():
        report.identity = torch.equal(logits_of(model, example), before) and bool(before.isfinite().all())

    visadapt.inject(model, m=m, task="seven", num_classes=7)
    backbone = {name: tensor.clone() for name, tensor in backbone_tensors(model).items()}
    buffers = {n: b.clone() for n, b in model.named_buffers() if "visadapt" not in n.split(".")}
    model.train()
    with torch.no_grad():
        report.head = tuple(logits_of(model, example).shape) == (2, 7)
    report.gradient = _learns(model, example)
    model.eval()
    now = backbone_tensors(model)
    after = {n: b for n, b in model.named_buffers() if "visadapt" not in n.split(".")}
    still = all(torch.equal(tensor, now[name]) for name, tensor in backbone.items())
    still &= all(torch.equal(b, after[n]) for n, b in buffers.items())
    with torch.no_grad(), visadapt.using(model, None):
        report.frozen = still and torch.equal(logits_of(model, example), before)
    del backbone, buffers

    path = visadapt.save(model, "seven", folder / f"{architecture.name}.visadapt")
    visadapt.load(fresh, path)
    path.unlink()
    with torch.no_grad():
        report.file = torch.equal(logits_of(fresh, example), logits_of(model, example))


def _learns(model: nn.Module, example: Any, steps: int = 6) -> bool:
    """Whether both projections of every adapter get a gradient, from the second step on, in train mode.

    A drop-path may leave a branch out of one step: several are looked at.
    """
    optimizer = torch.optim.AdamW(visadapt.parameters(model, "seven"), lr=1e-3)
    waiting = {
        name
        for name, _ in visadapt.named_parameters(model, "seven")
        if name.endswith((".bottleneck.down.weight", ".bottleneck.up.weight"))
    }
    assert waiting, "no adapter was found by its name"
    target = torch.tensor([1, 5])
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(logits_of(model, example).float(), target).backward()
        optimizer.step()
        if step:
            for name, p in visadapt.named_parameters(model, "seven"):
                if p.grad is not None and p.grad.isfinite().all() and p.grad.any():
                    waiting.discard(name)
            if not waiting:
                return True
    return False
