"""Train a task with the Trainer of transformers: Houlsby's adapters in a frozen MiniLM, the sentiment of tweets.

python examples/trainer_transfer.py    # offline; writes tweets.visadapt
"""

import torch
import transformers

import visadapt
from visadapt.data import load_text, tokenizer_of

transformers.set_seed(0)
data = load_text("tweets")
tokenizer = tokenizer_of("bundled/minilm")
model = visadapt.inject("bundled/minilm", m=16, task="tweets", labels=data.classes, num_classes=len(data.classes))


class Tweets(torch.utils.data.Dataset):
    """Tokenised texts with their labels."""

    def __init__(self, split, count):
        self.tokens = tokenizer(split.texts[:count], truncation=True, max_length=32)
        self.labels = split.labels[:count].tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {**{key: column[i] for key, column in self.tokens.items()}, "labels": self.labels[i]}


def accuracy(evaluation):
    """The fraction of texts whose largest logit is that of the label."""
    logits, labels = evaluation
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(
        "trainer", num_train_epochs=2, learning_rate=3e-3, weight_decay=0.01, warmup_steps=3, use_cpu=True,
        per_device_train_batch_size=16, per_device_eval_batch_size=50, save_strategy="no", report_to="none",
    ),
    train_dataset=Tweets(data.train, 240),
    eval_dataset=Tweets(data.test, 100),
    data_collator=transformers.DataCollatorWithPadding(tokenizer),
    compute_metrics=accuracy,
)  # fmt: skip
before = trainer.evaluate()["eval_accuracy"]
trainer.train()
after = trainer.evaluate()["eval_accuracy"]
visadapt.save(model, "tweets", "tweets.visadapt")
print(f"accuracy before {before:.3f}, after {after:.3f}")
