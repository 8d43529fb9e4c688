"""What pyright sees of other libraries' builders, before and after ``inject``."""

from __future__ import annotations

import transformers
from torchvision.models import ResNet, resnet18
from typing_extensions import assert_type

import visadapt


def builders() -> None:
    assert_type(visadapt.inject(resnet18(), m=4), ResNet)
    assert_type(visadapt.inject(resnet18, m=4), ResNet)
    bert = transformers.BertForSequenceClassification.from_pretrained("bert-base-uncased")
    assert_type(visadapt.inject(bert, m=4), transformers.BertForSequenceClassification)
    own = transformers.BertForSequenceClassification(transformers.BertConfig())
    assert_type(visadapt.inject(own, m=4), transformers.BertForSequenceClassification)
