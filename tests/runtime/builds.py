"""Small backbones of every build: sequences first, windows, 1-D, 3-D, encoder–decoder, caches, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from visadapt.backbone.batch import leaves, take


@dataclass(frozen=True)
class Build:
    """One backbone.

    Attributes:
        name: of it.
        make: makes it.
        inputs: makes a batch of n samples: positional and keyword arguments.
        axes: where the samples lie in these, where that is not the first axis.
        outputs: axis of the samples in the outputs; "items" for a list with one element per sample.
        trains: whether it gives the same kind of output in train mode.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    axes: dict[Any, Any] = field(default_factory=dict)
    outputs: Any = 0
    trains: bool = True

    def batch(self, n: int = 5) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A batch; the same for the same n."""
        torch.manual_seed(1)
        return self.inputs(n)

    def part(self, given: Any, index: list[int]) -> Any:
        """Some samples of a batch."""
        cut = {key: self.axes.get(key, 0) for key, leaf in leaves(given) if isinstance(leaf, Tensor)}
        items = {key: axis for key, axis in self.axes.items() if axis == "items"}
        return take(given, {key: axis for key, axis in (cut | items).items() if axis is not None}, index)

    def samples(self, out: Any, n: int) -> list[list[Tensor]]:
        """The output of each sample: its floating-point tensors, without what is not of one sample."""
        if self.outputs == "items":
            return [[leaf for _, leaf in leaves(item) if leaf.is_floating_point()] for item in out]
        tensors = [leaf for _, leaf in leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        tensors = [t for t in tensors if t.ndim and t.shape[self.outputs] == n]
        return [[t.select(self.outputs, i) for t in tensors] for i in range(n)]


def images(side: int = 32) -> Any:
    return lambda n: ((torch.randn(n, 3, side, side),), {})


def texts(*names: str, length: int = 7, **more: Any) -> Any:
    def make(n: int) -> Any:
        ids = torch.randint(5, 50, (n, length))
        ids[:, -1] = 1
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
        return (), {**{name: given[name] for name in ("input_ids", *names)}, **more}

    return make


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}
BART = {"vocab_size": 50, "d_model": 16, "max_position_embeddings": 40, "dropout": 0.0, "num_labels": 3}
BART |= {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 2))}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
BART |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 1}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION |= {"image_size": 32, "patch_size": 8}


def hf(kind: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**options)
        model: nn.Module = getattr(transformers, f"{kind}{head}")(config)
        return model

    return build


def made(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **options)


def mixer() -> nn.Module:
    return timm.models.MlpMixer(4, img_size=64, patch_size=32, embed_dim=16, num_blocks=2)


class Encoder(nn.Module):
    """Sequence first inside, batch first outside, as CLIP's text model was and nn.Transformer is."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patch(x).flatten(2).permute(2, 0, 1)).mean(0))


class Translator(nn.Module):
    """nn.Transformer as it comes: both inputs and the output are sequence first."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0), nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0)
        encoder = nn.TransformerEncoder(layers[0], 1, nn.LayerNorm(16), enable_nested_tensor=False)
        decoder = nn.TransformerDecoder(layers[1], 1, nn.LayerNorm(16))
        self.net = nn.Transformer(16, 2, custom_encoder=encoder, custom_decoder=decoder)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.net(source, target)


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 5, 2, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1))
            for _ in range(2)
        )
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean(2))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1))
            for _ in range(2)
        )
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3, 4)))


def small() -> nn.Module:
    return timm.create_model("resnet18", channels=(8, 8, 8, 16), num_classes=4)


class Views(nn.Module):
    """Two views of each image, one after the other in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, x.flip(3)])).view(2, len(x), -1).mean(0)


class Clips(nn.Module):
    """Clips whose frames are images, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, clip: Tensor) -> Tensor:
        n, frames = clip.shape[:2]
        return self.net(clip.transpose(0, 1).flatten(0, 1)).view(frames, n, -1).mean(0)


class Packed(nn.Module):
    """Texts sorted by their length, in one packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.lstm, self.norm, self.fc = nn.LSTM(16, 16, batch_first=True), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True)
        x = self.project(self.embed(ids[order]))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True)
        _, (state, _) = self.lstm(packed)
        return self.fc(self.norm(state[-1]))[order.argsort()]


class Relative(nn.Module):
    """A table of relative positions that no sample has a part in, and an argument that says nothing of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16)
        self.table = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 16))
        self.mlp, self.fc = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)), nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.table(torch.arange(16.0)[:, None])
        return self.fc((x + self.mlp(self.norm(x)) * scale.mean()).mean(1))


class Answer(NamedTuple):
    logits: Tensor
    features: list[Tensor]


class Tuples(nn.Module):
    """A dict of a batch in, a named tuple with a list out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet18", channels=(8, 8, 8, 16), features_only=True, out_indices=(1, 2))
        self.fc = nn.Linear(8, 3)

    def forward(self, batch: dict[str, Any]) -> Answer:
        features = self.net(batch["image"] + batch["more"][0])
        return Answer(self.fc(features[-1].mean((2, 3))), features)


class Segmenter(nn.Module):
    """A small U-Net with a 1×1 convolution as its head; a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, 8), self._block(8, 16)
        self.up, self.merge = nn.ConvTranspose2d(16, 8, 2, 2), self._block(16, 8)
        self.classifier = nn.Conv2d(8, 4, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        return {"out": self.classifier(self.merge(torch.cat([self.up(second), first], 1)))}


def detector() -> nn.Module:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU()
    )
    backbone.out_channels = 8  # type: ignore[assignment]
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
    return torchvision.models.detection.RetinaNet(
        backbone, 3, min_size=32, max_size=32, anchor_generator=anchors, score_thresh=0.0, detections_per_img=4
    )


class Router(nn.Module):
    """Sends every sample to the expert that its features choose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.norm = nn.Linear(12, 16), nn.Linear(16, 2), nn.LayerNorm(16)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        chosen, y = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            index = (chosen == number).nonzero()[:, 0]
            y = y.index_add(0, index, expert(x[index]))
        return self.fc(x + y)


def clip() -> nn.Module:
    text = {key: SIZES[key] for key in SIZES if key != "num_labels"} | {"eos_token_id": 1, "bos_token_id": 2}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=8))


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 40, "num_labels": 3}
GPT2 |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 50, "num_labels": 3}
T5 |= {"pad_token_id": 0, "decoder_start_token_id": 0, "dropout_rate": 0.0, "eos_token_id": 1}
XLNET = {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "num_labels": 3, "dropout": 0.0}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 4,
    "drop_path_rate": 0.0,
}

BUILDS = (
    Build("resnet", made("resnet18", channels=(8, 8, 8, 16), num_classes=4), images()),
    Build("mobilenet", made("mobilenetv2_035", num_classes=4), images()),
    Build("convnext", made("convnext_atto", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_classes=4), images(64)),
    Build("features", made("resnet18", channels=(8, 8, 8, 16), features_only=True, out_indices=(1, 2)), images()),
    Build(
        "vit", made("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=4), images()
    ),
    Build("swin", made("swin_tiny_patch4_window7_224", num_classes=4, **SWIN), images()),
    Build("swinv2", made("swinv2_tiny_window8_256", num_classes=4, **SWIN), images()),
    Build("mixer", mixer, images(64)),
    Build("hf vit", hf("ViT", "ForImageClassification", **VISION), lambda n: ((), {"pixel_values": images()(n)[0][0]})),
    Build(
        "yolos",
        hf("Yolos", "ForObjectDetection", **VISION | {"image_size": [32, 32], "num_detection_tokens": 3}),
        lambda n: ((), {"pixel_values": images()(n)[0][0]}),
    ),
    Build(
        "segformer",
        hf(
            "Segformer",
            "ForSemanticSegmentation",
            hidden_sizes=[8, 8, 16, 16],
            depths=[1] * 4,
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=8,
            drop_path_rate=0.0,
        ),
        lambda n: ((), {"pixel_values": images(64)(n)[0][0]}),
    ),
    Build("bert", hf("Bert", "ForSequenceClassification", **SIZES), texts("attention_mask")),
    Build("roberta", hf("Roberta", "ForTokenClassification", **SIZES), texts("attention_mask")),
    Build(
        "deberta",
        hf(
            "DebertaV2",
            "ForSequenceClassification",
            **SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
        ),
        texts("attention_mask"),
    ),
    Build("gpt2", hf("GPT2", "ForSequenceClassification", **GPT2), texts("attention_mask", use_cache=False)),
    Build("llama", hf("Llama", "ForCausalLM", **SIZES), texts("attention_mask", use_cache=False)),
    Build("llama cache", hf("Llama", "ForSequenceClassification", **SIZES), texts("attention_mask")),
    Build("t5", hf("T5", "ForSequenceClassification", **T5), texts("attention_mask")),
    Build("t5 lm", hf("T5", "ForConditionalGeneration", **T5), texts("decoder_input_ids", use_cache=False)),
    Build("bart", hf("Bart", "ForConditionalGeneration", **BART), texts("decoder_input_ids", use_cache=False)),
    Build("xlnet", hf("XLNet", "ForSequenceClassification", **XLNET), texts("attention_mask")),
    Build(
        "clip text",
        lambda: transformers.CLIPTextModelWithProjection(clip().config.text_config),
        texts("attention_mask"),
    ),
    Build(
        "mixtral",
        hf("Mixtral", "ForSequenceClassification", **SIZES, num_key_value_heads=2, num_local_experts=2),
        texts("attention_mask", use_cache=False),
    ),
    Build(
        "wav2vec2",
        hf(
            "Wav2Vec2",
            "ForSequenceClassification",
            **{k: v for k, v in SIZES.items() if "max" not in k},
            conv_dim=[8, 8],
            conv_stride=[4, 4],
            conv_kernel=[8, 4],
            num_feat_extract_layers=2,
            mask_time_prob=0.0,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            layerdrop=0.0,
        ),
        lambda n: ((torch.randn(n, 640),), {}),
    ),
    Build("encoder", Encoder, images()),
    Build(
        "translator",
        Translator,
        lambda n: ((torch.randn(6, n, 16), torch.randn(4, n, 16)), {}),
        {(0, 0): 1, (0, 1): 1},
        1,
    ),
    Build("audio", Audio, lambda n: ((torch.randn(n, 2, 40),), {})),
    Build("volume", Volume, lambda n: ((torch.randn(n, 1, 8, 12, 10),), {})),
    Build("views", Views, images()),
    Build("clips", Clips, lambda n: ((torch.randn(n, 3, 3, 32, 32),), {})),
    Build("packed", Packed, lambda n: ((torch.randint(0, 50, (n, 6)), torch.arange(n) % 4 + 3), {})),
    Build("relative", Relative, lambda n: ((torch.randn(n, 3, 32, 32), torch.rand(5)), {}), {(0, 1): None}),
    Build("tuples", Tuples, lambda n: (({"image": images()(n)[0][0], "more": (torch.randn(n, 3, 32, 32), 1)},), {})),
    Build("segmenter", Segmenter, images()),
    Build(
        "detector",
        detector,
        lambda n: (([torch.rand(3, 32, 32) for _ in range(n)],), {}),
        {(0, 0): "items"},
        "items",
        False,
    ),
    Build("router", Router, lambda n: ((torch.randn(n, 12),), {})),
)
