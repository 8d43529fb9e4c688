"""Where the heads of many architectures are, and that all layers that give logits follow the number of classes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import visadapt
from visadapt import VisadaptError
from visadapt.backbone.facts import Facts
from visadapt.backbone.heads import find_head

# backbones as small as these have blocks smaller than an adapter
pytestmark = pytest.mark.filterwarnings("ignore:the bottleneck at:UserWarning")

IMAGES = {"image_size": 32, "patch_size": 16}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**SMALL, **IMAGES}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 40}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 60,
    "d_model": 32,
    **{f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2}
BOTH = {"vision_config": VIT, "text_config": SMALL}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DETR = {
    "use_timm_backbone": False,
    "backbone": None,
    **{key: value for key, value in BART.items() if key != "vocab_size"},
    "num_queries": 5,
}


def build(name: str, config: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    if config == "Detr":
        backbone = transformers.ResNetConfig(**RESNET, out_features=["stage2"])
        options = {**options, "backbone_config": backbone}
    if config == "UperNet":
        sizes = {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4}
        stages = [f"stage{i}" for i in range(1, 5)]
        backbone = transformers.ResNetConfig(embedding_size=8, **sizes, out_features=stages)
        options = {"backbone_config": backbone, "hidden_size": 16}
    made: nn.Module = getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options))
    return made.eval()


WITHOUT = {
    "BertModel": ("Bert", TEXT),
    "ViTModel": ("ViT", VIT),
    "CLIPVisionModel": ("CLIPVision", VIT),
    "CLIPTextModel": ("CLIPText", SMALL),
    "CLIPModel": ("CLIP", BOTH),
    "SiglipModel": ("Siglip", BOTH),
    "SiglipVisionModel": ("SiglipVision", VIT),
    "Dinov2Model": ("Dinov2", VIT),
    "Dinov2Backbone": ("Dinov2", VIT),
    "LlamaModel": ("Llama", {**TEXT, "num_key_value_heads": 2}),
    "GPT2Model": ("GPT2", GPT2),
    "T5Model": ("T5", T5),
    "T5EncoderModel": ("T5", T5),
    "BartModel": ("Bart", BART),
    "ResNetModel": ("ResNet", RESNET),
    "DetrModel": ("Detr", DETR),
    "LlamaForCausalLM": ("Llama", {**TEXT, "num_key_value_heads": 2}),
    "GPT2LMHeadModel": ("GPT2", GPT2),
    "BertForMaskedLM": ("Bert", TEXT),
    "T5ForConditionalGeneration": ("T5", T5),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_base_and_language_models_have_no_head_for_classes_and_adapt_by_default(name: str) -> None:
    model = build(name, *WITHOUT[name])
    whole = sum(p.numel() for p in model.parameters())
    assert visadapt.inject(model, m=4) is model
    row = visadapt.summary(model)["default"]
    assert (row.head, visadapt.tasks(model)["default"].head) == (0, "frozen")
    assert visadapt.summary(model).backbone == whole
    assert row.sites > 0
    assert 0 < row.fraction < 0.5
    with pytest.raises(VisadaptError, match=f"no head found in {name}"):
        visadapt.inject(model, m=4, task="b", num_classes=3)
    with pytest.raises(VisadaptError, match=r"Linear\(\) trains a head"):
        visadapt.inject(model, visadapt.Linear(), task="b", norms="frozen")
    assert list(visadapt.tasks(model)) == ["default"]


WITH = {
    "BertForSequenceClassification": ("Bert", TEXT, ("classifier",), {"classifier": 5}),
    "BertForTokenClassification": ("Bert", TEXT, ("classifier",), {"classifier": 5}),
    "RobertaForSequenceClassification": ("Roberta", TEXT, ("classifier",), {"classifier.out_proj": 5}),
    "T5ForSequenceClassification": ("T5", T5, ("classification_head",), {"classification_head.out_proj": 5}),
    "XLNetForSequenceClassification": (
        "XLNet",
        {"vocab_size": 60, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32},
        ("sequence_summary", "logits_proj"),
        {"logits_proj": 5},
    ),
    "ViTForImageClassification": ("ViT", VIT, ("classifier",), {"classifier": 5}),
    "DeiTForImageClassificationWithTeacher": (
        "DeiT",
        VIT,
        ("cls_classifier", "distillation_classifier"),
        {"cls_classifier": 5, "distillation_classifier": 5},
    ),
    "Dinov2ForImageClassification": ("Dinov2", VIT, ("classifier",), {"classifier": 5}),
    "CLIPForImageClassification": ("CLIP", BOTH, ("classifier",), {"classifier": 5}),
    "SiglipForImageClassification": ("Siglip", BOTH, ("classifier",), {"classifier": 5}),
    "ResNetForImageClassification": ("ResNet", RESNET, ("classifier",), {"classifier.1": 5}),
    "ConvNextForImageClassification": (
        "ConvNext",
        {"hidden_sizes": [8] * 4, "depths": [1] * 4},
        ("classifier",),
        {"classifier": 5},
    ),
    "TimmWrapperForImageClassification": (
        "TimmWrapper",
        {"architecture": "resnet18"},
        ("timm_model.fc",),
        {"timm_model.fc": 5},
    ),
    "SegformerForSemanticSegmentation": (
        "Segformer",
        {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8},
        ("decode_head",),
        {"decode_head.classifier": 5},
    ),
    "UperNetForSemanticSegmentation": (
        "UperNet",
        {},
        ("decode_head", "auxiliary_head"),
        {"decode_head.classifier": 5, "auxiliary_head.classifier": 5},
    ),
    # one output more, for no object; the boxes have four values whatever the classes are
    "DetrForObjectDetection": (
        "Detr",
        DETR,
        ("class_labels_classifier", "bbox_predictor"),
        {"class_labels_classifier": 6, "bbox_predictor.layers.2": 4},
    ),
    "YolosForObjectDetection": (
        "Yolos",
        {**VIT, "image_size": [32, 32]},
        ("class_labels_classifier", "bbox_predictor"),
        {"class_labels_classifier.layers.2": 6, "bbox_predictor.layers.2": 4},
    ),
}


def head_widths(model: nn.Module, task: str) -> dict[str, int]:
    """Outputs of the layers of a task's head, by their paths in the backbone."""
    spec = visadapt.tasks(model)[task]
    found = {}
    for path in spec.head_at.modules:
        part = model.get_submodule(path)._modules["visadapt"][task]["head"]
        for name, module in part.named_modules():
            width = getattr(module, "out_features", getattr(module, "out_channels", None))
            if width is not None:
                found[f"{path}.{name}" if name else path] = width
    return found


@pytest.mark.parametrize("name", WITH)
def test_what_transformers_makes_for_the_classes_follows_them(name: str) -> None:
    config, options, modules, widths = WITH[name]
    model = build(name, config, options)
    outside = [p for n, p in model.named_parameters() if not n.startswith(tuple(f"{m}." for m in modules))]
    visadapt.inject(model, visadapt.Linear(), norms="frozen", num_classes=5, task="five")
    assert visadapt.tasks(model)["five"].head_at.modules == modules
    assert head_widths(model, "five").items() >= widths.items()
    assert visadapt.summary(model).backbone == sum(p.numel() for p in outside)
    # made for the problem, so trained without a word about it
    visadapt.inject(model, visadapt.Linear(), norms="frozen", task="copy")
    assert visadapt.tasks(model)["copy"].head == "copy"
    own = sum(p.numel() for p in visadapt.parameters(model, "copy"))
    assert own == sum(p.numel() for path in modules for n, p in model.get_submodule(path).named_parameters()
                      if "visadapt" not in n.split("."))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("BertForMultipleChoice", "Bert", TEXT),
        ("BertForNextSentencePrediction", "Bert", TEXT),
        ("BertForQuestionAnswering", "Bert", TEXT),
    ],
)
def test_a_problems_head_of_fixed_width_is_trained_but_follows_no_classes(name: str, config: str, options: Any) -> None:
    model = visadapt.inject(build(name, config, options), m=4)
    assert visadapt.tasks(model)["default"].head == "copy"
    with pytest.raises(
        VisadaptError, match=r"cannot have num_classes=3: (no layer of (classifier|cls) follows|it answers)"
    ):
        visadapt.inject(model, m=4, task="b", num_classes=3)


def test_a_pretrained_projection_is_not_trained_by_default() -> None:
    model = visadapt.inject(build("CLIPVisionModelWithProjection", "CLIPVision", VIT), m=4)
    assert visadapt.summary(model)["default"].head == 0


def test_a_subclass_with_a_constructor_of_its_own_is_run_to_see_its_head() -> None:
    class Classifier(transformers.BertPreTrainedModel):
        def __init__(self, config: Any, width: int) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.hidden = nn.Linear(32, width)
            self.out = nn.Linear(width, 4)
            self.post_init()

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            return self.out(self.hidden(self.bert(input_ids, attention_mask).pooler_output))

    model = Classifier(transformers.BertConfig(**TEXT), 8).eval()
    visadapt.inject(model, m=4, num_classes=5)
    assert head_widths(model, "default") == {"hidden": 8, "out": 5}
    visadapt.inject(model, m=4, task="copy")
    assert visadapt.tasks(model)["copy"].head == "copy"


TORCHVISION = {
    "alexnet": {"classifier.6": 5},
    "convnext_tiny": {"classifier.2": 5},
    "densenet121": {"classifier": 5},
    "efficientnet_b0": {"classifier.1": 5},
    "googlenet": {"fc": 5, "aux1.fc2": 5, "aux2.fc2": 5},
    "inception_v3": {"fc": 5, "AuxLogits.fc": 5},
    "maxvit_t": {"classifier.5": 5},
    "mobilenet_v3_small": {"classifier.3": 5},
    "resnet18": {"fc": 5},
    "shufflenet_v2_x0_5": {"fc": 5},
    "squeezenet1_0": {"classifier.1": 5},
    "swin_t": {"head": 5},
    "vit_b_16": {"heads.head": 5},
    "r3d_18": {"fc": 5},
    "s3d": {"classifier.1": 5},
    "mvit_v1_b": {"head.1": 5},
    "swin3d_t": {"head": 5},
    "deeplabv3_mobilenet_v3_large": {"classifier.4": 5, "aux_classifier.4": 5},
    "fcn_resnet50": {"classifier.4": 5, "aux_classifier.4": 5},
    "lraspp_mobilenet_v3_large": {"classifier.low_classifier": 5, "classifier.high_classifier": 5},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        "roi_heads.box_predictor.cls_score": 5,
        "roi_heads.box_predictor.bbox_pred": 20,
    },
    "maskrcnn_resnet50_fpn": {
        "roi_heads.box_predictor.cls_score": 5,
        "roi_heads.box_predictor.bbox_pred": 20,
        "roi_heads.mask_predictor.mask_fcn_logits": 5,
    },
    "retinanet_resnet50_fpn": {"head.classification_head.cls_logits": 45},
    "fcos_resnet50_fpn": {"head.classification_head.cls_logits": 5},
    "ssd300_vgg16": {f"head.classification_head.module_list.{i}": w for i, w in enumerate((20, 30, 30, 30, 20, 20))},
    "ssdlite320_mobilenet_v3_large": {f"head.classification_head.module_list.{i}.1": 30 for i in range(6)},
}


def torchvision_model(name: str) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": True}
    if name.startswith(("deeplab", "fcn")):
        options |= {"aux_loss": True}
    if name.startswith(("deeplab", "fcn_", "lraspp", "faster", "mask", "retina", "fcos", "ssd")):
        options |= {"weights_backbone": None}
    if name.startswith(("deeplab", "retina", "ssdlite", "faster")) or name in ("fcos_resnet50_fpn",):
        # their constructors fill in values that the meta device has not
        return torchvision.models.get_model(name, **options)
    with torch.device("meta"):
        return torchvision.models.get_model(name, **options)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_class_head_of_torchvisions_models_follows_and_no_other(name: str) -> None:
    model = torchvision_model(name)
    before = {n: getattr(m, "out_features", getattr(m, "out_channels", None)) for n, m in model.named_modules()}
    visadapt.inject(model, visadapt.Linear(), norms="frozen", num_classes=5)
    own = head_widths(model, "default")
    assert own.items() >= TORCHVISION[name].items()
    assert {n: w for n, w in own.items() if n not in TORCHVISION[name]}.items() <= before.items()
    assert visadapt.summary(model).backbone > visadapt.summary(model)["default"].head


def test_auxiliary_outputs_in_train_mode_have_the_classes_too() -> None:
    model = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True)
    visadapt.inject(model, m=4, num_classes=5)
    out = model.train()(torch.randn(2, 3, 96, 96))
    assert out.logits.shape == out.aux_logits1.shape == out.aux_logits2.shape == (2, 5)
    sum(o.sum() for o in out).backward()
    assert all(p.grad is not None for n, p in visadapt.named_parameters(model, "default") if ".head." in n)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn"])
def test_a_detector_detects_and_learns_the_tasks_classes(name: str, tmp_path) -> None:
    """Its forward folds the outputs by the number of classes, which the task's own copy knows."""
    torch.manual_seed(0)
    builder = getattr(torchvision.models.detection, name)
    sizes = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    model = builder(weights=None, weights_backbone=None, num_classes=7, **sizes).eval()
    images = [torch.rand(3, 64, 64)]
    visadapt.inject(model, visadapt.Linear(), task="three", norms="frozen", num_classes=3)
    with torch.no_grad():
        assert (model(images)[0]["labels"] < 3).all()
        maps = list(model.backbone(torch.rand(1, 3, 64, 64)).values())
        assert model.head.classification_head(maps).shape[-1] == 3
        with visadapt.using(model, None):
            assert model.head.classification_head(maps).shape[-1] == 7
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([2])}]
    losses = model.train()(2 * images, 2 * targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in visadapt.parameters(model, "three"))
    visadapt.save(model.eval(), "three", tmp_path / "three")
    expected = model(images)[0]
    visadapt.eject(model)
    visadapt.load(model, tmp_path / "three")
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), model(images)[0].values(), strict=True))


@pytest.mark.parametrize(
    "name", ["crossvit_tiny_240", "levit_128s", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"]
)
def test_timms_heads_are_known_without_a_run(name: str) -> None:
    with torch.device("meta"):
        facts = Facts(timm.create_model(name, num_classes=10))
    assert facts.known_head.classes(facts.modules) == 10
    assert len(facts.known_head.finals) == (1 if name.startswith("vit") else 2)


@pytest.mark.parametrize("name", ["efficientvit_m0", "vit_tiny_patch16_224", "resnet18", "convnext_atto"])
def test_a_timm_model_without_its_head_has_none(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    assert Facts(model).head is None
    assert Facts(model).size == sum(p.numel() for p in model.parameters())


def test_timms_auxiliary_head_follows() -> None:
    with torch.device("meta"):
        model = timm.create_model("inception_v3", aux_logits=True, num_classes=10)
    visadapt.inject(model, visadapt.Linear(), norms="frozen", num_classes=5)
    assert head_widths(model, "default") == {"fc": 5, "AuxLogits.fc": 5}


class Wrapped(nn.Module):
    """A timm backbone with heads of the user's own."""

    def __init__(self, heads: nn.Module, join: Any) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", num_classes=0, channels=(8, 8, 8, 16))
        self.out = heads
        self.join = join

    def forward(self, x: torch.Tensor) -> Any:
        return self.join(self.out, self.body(x))


def two(second: int) -> nn.ModuleDict:
    return nn.ModuleDict({"age": nn.Linear(16, 3), "sex": nn.Linear(16, second)})


def test_two_outputs_are_two_heads() -> None:
    model = Wrapped(two(3), lambda heads, f: {name: head(f) for name, head in heads.items()}).eval()
    visadapt.inject(model, m=2, head="copy", task="both")
    assert visadapt.tasks(model)["both"].head_at.modules == ("out.age", "out.sex")
    with pytest.raises(VisadaptError, match=r"several outputs.*'out.age' of 3, 'out.sex' of 3.*head='out.age'"):
        visadapt.inject(model, m=2, num_classes=5, task="b")
    visadapt.inject(model, m=2, num_classes=5, task="b", head="out.age")
    out = model(torch.randn(2, 3, 32, 32))
    assert (out["age"].shape, out["sex"].shape) == ((2, 5), (2, 3))
    visadapt.inject(model, m=2, num_classes=5, task="c", head="out")
    out = model(torch.randn(2, 3, 32, 32))
    assert out["age"].shape == out["sex"].shape == (2, 5)


def test_layers_whose_outputs_are_added_follow_together() -> None:
    model = Wrapped(two(3), lambda heads, f: (heads["age"](f) + heads["sex"](f)).softmax(-1)).eval()
    visadapt.inject(model, m=2, num_classes=5)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_the_output_shows_the_head_and_not_its_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)
            self.act = nn.ReLU()
            self.answer = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.answer(self.act(self.fc(x)))

    assert Facts(Net()).head.modules == ("answer",)


class Residual(nn.Module):
    """An encoder whose last block adds a linear's output: that linear is not a head."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.classifier = last

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x.relu())
        return self.classifier(x)


@pytest.mark.parametrize("last", [nn.Identity(), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))])
def test_what_is_not_followed_by_the_output_alone_is_not_a_head(last: nn.Module) -> None:
    assert Facts(Residual(last).eval()).head is None


def test_a_replaced_head_of_a_librarys_model_is_read_from_what_stands_there() -> None:
    model = torchvision.models.resnet18(weights=None)
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 4), nn.Softmax(-1))
    assert Facts(model).head.modules == ("fc.2",)
    model.fc = nn.Identity()
    assert Facts(model).head is None
    assert Facts(model).size == sum(p.numel() for p in model.parameters())


def test_a_forward_of_ones_own_is_run_and_not_believed() -> None:
    class Scorer(torchvision.models.ResNet):
        def __init__(self) -> None:
            super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=8)
            self.rank = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rank(super().forward(x).relu())

    assert Facts(Scorer().eval()).head.modules == ("rank",)


def test_a_forward_that_wraps_the_librarys_is_the_librarys() -> None:
    model = torchvision.models.resnet18(weights=None)
    model.forward = functools.update_wrapper(
        functools.partial(lambda m, x: type(m).forward(m, x), model), model.forward
    )
    assert find_head(model).modules == ("fc",)
    model.forward = lambda x: torch.relu(model.fc(x))
    assert find_head(model) is None


def test_one_layer_is_not_a_head_on_nothing() -> None:
    assert Facts(nn.Linear(4, 3)).head is None
    assert Facts(nn.Sequential(nn.Flatten(), nn.Linear(4, 3))).size == 15


class Restored(nn.Module):
    """An image plus what is added to it, where the sizes differ or not."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        x = nn.functional.interpolate(x, scale_factor=self.factor)
        return x + self.last(self.body(x))


@pytest.mark.parametrize("factor", [1, 2])
def test_what_is_added_to_an_image_is_not_a_head(factor: int) -> None:
    assert Facts(Restored(factor)).head is None


def test_an_input_may_scale_or_mask_the_logits() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.tag = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.tag(self.body(x).relu()) * mask[..., None]

    facts = Facts(Masked())
    assert facts.head is None
    assert facts.look_for_head((torch.randn(2, 5, 4), torch.ones(2, 5))).modules == ("tag",)


@pytest.mark.parametrize("refined", [False, True])
def test_heads_in_lists_that_are_never_called(refined) -> None:
    """Deformable DETR keeps one head per layer of the decoder in a list, and its second stage reads the same list."""
    options = DETR | {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "two_stage": refined}
    options |= {"with_box_refine": refined, "two_stage_num_proposals": 4, "num_queries": 4, "num_labels": 3}
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.DeformableDetrConfig(**options, backbone_config=backbone)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    visadapt.inject(model, m=2, num_classes=7, task="t")
    with torch.no_grad():
        assert model(torch.randn(2, 3, 128, 128)).logits.shape == (2, 4, 7)
    assert {path for path in visadapt.tasks(model)["t"].owned if path.startswith("class_embed.")} == {
        f"class_embed.{layer}" for layer in range(3 if refined else 2)
    }


def test_a_class_is_built_once_per_config(monkeypatch) -> None:
    built = []
    init = transformers.BertForSequenceClassification.__init__
    monkeypatch.setattr(
        transformers.BertForSequenceClassification,
        "__init__",
        lambda self, config: built.append(config.num_labels) or init(self, config),
    )
    sizes = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.BertConfig(**sizes, hidden_size=8, num_labels=3)
    for _ in range(3):
        assert Facts(transformers.BertForSequenceClassification(config)).head.modules == ("classifier",)
    assert built == [3, 4, 5, 3, 3]
    model = transformers.BertForSequenceClassification(config)
    model.config.num_labels = 6
    assert Facts(model).head.modules == ("classifier",)
    assert built[-2:] == [7, 8]
