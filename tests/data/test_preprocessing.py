"""Preprocessing is the backbone's own, bit for bit, and comes back from a task file; backbones of every kind load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import visadapt
from visadapt.data.hub import resolve
from visadapt.data.inputs import (
    ImageInputs,
    TextInputs,
    check_texts,
    described,
    from_description,
    inputs_of,
)
from visadapt.data.pretrained import PooledClassifier, unfilled
from visadapt.data.processors import ProcessorInputs
from visadapt.errors import VisadaptError

transformers = pytest.importorskip("transformers")


def photo(height: int = 90, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def recorded(inputs: Any) -> Any:
    found = from_description(json.loads(json.dumps(described(inputs))))
    assert found == inputs
    return found


TIMM = {
    "resnet18": {}, "convnext_atto": {}, "vit_tiny_patch16_224": {"depth": 1}, "efficientnet_lite0": {},
    "mobilenetv3_small_050": {}, "resnet10t": {}, "vit_base_patch16_clip_224.openai": {"depth": 1},
    "vit_base_patch16_siglip_224": {"depth": 1}, "regnetx_002": {},
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("side", [None, 64])
def test_timms_data_config_is_reproduced(name: str, side: int | None) -> None:
    model = resolve(f"timm/{name}", pretrained=False, **TIMM[name]).eval()
    inputs = recorded(inputs_of(model, f"timm/{name}", side))
    config = timm.data.resolve_data_config({} if side is None else {"input_size": (3, side, side)}, model=model)
    for image in (photo(), photo(70, 200), photo(224, 224)):
        expected = timm.data.create_transform(**config)(image)
        assert torch.equal(inputs(inputs.read([image]))[0], expected)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_timms_crop_modes(mode: str) -> None:
    inputs = recorded(ImageInputs(32, crop_pct=0.9, interpolation="bicubic", crop_mode=mode))
    transform = timm.data.create_transform((3, 32, 32), crop_pct=0.9, interpolation="bicubic", crop_mode=mode)
    assert torch.equal(inputs(inputs.read([photo()]))[0], transform(photo()))


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "efficientnet_b1", "swin_t", "regnet_y_400mf"])
def test_torchvisions_presets_are_reproduced(name: str) -> None:
    from torchvision import models

    from visadapt.data.hub import _preprocessing

    for weights in models.get_model_weights(name):
        model = nn.Conv2d(3, 1, 1)
        model.pretrained_cfg = _preprocessing(models, name, weights)  # type: ignore[assignment]
        inputs = recorded(inputs_of(model, f"torchvision/{name}"))
        assert torch.equal(inputs(inputs.read([photo()]))[0], weights.transforms()(photo()))


SIDES = {"size": {"height": 32, "width": 32}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": SIDES,
    "CLIPImageProcessor": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
    "SiglipImageProcessor": SIDES,
    "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    "DINOv3ViTImageProcessor": SIDES,
    "EfficientNetImageProcessor": {**SIDES, "crop_size": {"height": 32, "width": 32}},
    "MobileViTImageProcessor": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_image_processors_are_reproduced(name: str, tmp_path: Path) -> None:
    processor = getattr(transformers, name)(**PROCESSORS[name])
    inputs = recorded(ProcessorInputs.of(processor, name))
    for image in (photo(), photo(40, 90)):
        expected = processor([image], return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs(inputs.read([image])), expected)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(6):
            photo(30 + i, 50).save(tmp_path / label / f"{i}.png")
    splits = inputs.load(str(tmp_path))
    batch, _ = next(iter(splits.test.batches(4))) if inputs.parts == 1 else (splits.test.images, None)
    assert inputs(batch).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "AutoTokenizer"}, "must name an image processor of transformers"),
        ({"image_processor_type": "NoSuchImageProcessor"}, "has no image processor 'NoSuchImageProcessor'"),
        ({"image_processor_type": "GlmImageProcessor"}, "cannot (build|prepare)|has no image processor"),
        ({"image_processor_type": "AutoImageProcessor"}, "cannot build the image processor 'AutoImageProcessor'"),
        ({"auto_map": {}}, "an image processor must not set 'auto_map'"),
        ({"size": {"height": 10**9, "width": 1}}, "size of the image processor must be"),
        ({"image_mean": [0.1]}, "image_mean of the image processor must be three numbers"),
    ],
)
def test_a_file_cannot_ask_more_of_a_processor(change: dict[str, Any], message: str) -> None:
    inputs = ProcessorInputs.of(transformers.ViTImageProcessor(**SIDES), "vit")
    description = described(inputs)
    description["processor"] = {**description["processor"], **change}
    with pytest.raises(VisadaptError, match=message):
        from_description(description).read([photo()])


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 60}

MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "image classifier": ("ViTForImageClassification", "ViTConfig", VISION, "ViTForImageClassification"),
    "plain image encoder": ("Dinov2Model", "Dinov2Config", VISION, "Dinov2ForImageClassification"),
    "CLIP": ("CLIPModel", "CLIPConfig", {"vision_config": VISION, "text_config": TEXT}, "CLIPForImageClassification"),
    "CLIP's image tower": ("CLIPVisionModel", "CLIPVisionConfig", VISION, "PooledClassifier"),
    "SigLIP's image tower": ("SiglipVisionModel", "SiglipVisionConfig", VISION, "PooledClassifier"),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", VISION, "PooledClassifier"),
    "CLIP's text tower": ("CLIPTextModel", "CLIPTextConfig", TEXT, "PooledClassifier"),
    "audio": (
        "ASTForAudioClassification", "ASTConfig", {**SMALL, "max_length": 32, "num_mel_bins": 16},
        "ASTForAudioClassification"),
    "texts": ("BertForSequenceClassification", "BertConfig", TEXT, "BertForSequenceClassification"),
}  # fmt: skip


# torch hides this warning of its own, but not where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_says_what_it_holds(kind: str, tmp_path: Path) -> None:
    model, config, options, expected = MODELS[kind]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**options)).save_pretrained(tmp_path)
    loaded = resolve(f"hf/{tmp_path}").eval()
    assert type(loaded).__name__ == expected
    with torch.device("meta"):
        shapes = [(type(p), p.shape) for p in unfilled(str(tmp_path)).parameters()]
    assert shapes == [(type(p), p.shape) for p in loaded.parameters()]
    if options is VISION:
        transformers.ViTImageProcessor(**SIDES).save_pretrained(tmp_path)
        inputs = inputs_of(loaded, f"hf/{tmp_path}")
        assert (type(inputs), inputs.size) == (ProcessorInputs, 32)
        visadapt.inject(loaded, m=2, task="t", num_classes=3)
        with visadapt.using(loaded, "t"):
            out = loaded(inputs(inputs.read([photo(), photo()])))
        assert getattr(out, "logits", out).shape == (2, 3)
    if isinstance(loaded, PooledClassifier):
        assert "encoder" in dict(loaded.named_children())


def test_an_image_folder_without_a_processor_is_prepared_plainly(tmp_path: Path) -> None:
    transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    assert inputs_of(resolve(f"hf/{tmp_path}"), f"hf/{tmp_path}") == ImageInputs(32)


def tokenizer(folder: Path, **special: str) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "a", "b", "c", *special.values()]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **special)
    fast.save_pretrained(folder)
    return fast


def test_a_model_without_a_padding_token_pads_with_its_end(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, eos_token_id=4, bos_token_id=4)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer(tmp_path, eos_token="<end>")
    model = resolve(f"hf/{tmp_path}").eval()
    assert model.config.pad_token_id == 4
    inputs = TextInputs(f"hf/{tmp_path}", 8)
    check_texts(model, inputs)
    both, alone = (model(**inputs.read(texts)).logits for texts in (["a b c", "a"], ["a"]))
    torch.testing.assert_close(both[1:], alone)


def test_what_a_tokenizer_lacks_is_one_line(tmp_path: Path) -> None:
    transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path)
    model = resolve(f"hf/{tmp_path}").eval()
    with pytest.raises(VisadaptError, match="has no tokenizer: save one into the folder") as caught:
        check_texts(model, TextInputs(f"hf/{tmp_path}", 8))
    assert "\n" not in str(caught.value)
    tokenizer(tmp_path)
    with pytest.raises(VisadaptError, match="must have a padding token or an end-of-text token"):
        check_texts(model, TextInputs(f"hf/{tmp_path}", 8))
    tokenizer(tmp_path, pad_token="[PAD]")
    check_texts(model, TextInputs(f"hf/{tmp_path}", 8))
    model.config.vocab_size = 3
    with pytest.raises(VisadaptError, match="has 5 tokens, and the model only 3"):
        check_texts(model, TextInputs(f"hf/{tmp_path}", 8))


def test_a_model_that_needs_an_end_is_told_apart(tmp_path: Path) -> None:
    config = transformers.BartConfig(vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                                     decoder_ffn_dim=16, eos_token_id=7)  # fmt: skip
    transformers.BartForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer(tmp_path, pad_token="[PAD]")
    with pytest.raises(VisadaptError, match="must end each text with token 7, which the model needs, got"):
        check_texts(resolve(f"hf/{tmp_path}"), TextInputs(f"hf/{tmp_path}", 8))
