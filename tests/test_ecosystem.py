"""What surrounds a model in practice goes on working: ONNX, FSDP2, transformers' Trainer, timm's EMA and optimisers."""

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import visadapt

IGNORED = "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"


def stirred(model, task):
    with torch.no_grad():
        for parameter in visadapt.parameters(model, task):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_onnx_agrees(merged, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    activation = None if merged else "gelu"
    model = torchvision.models.resnet18().eval()
    visadapt.inject(model, visadapt.Bottleneck(4, activation=activation), task="t", num_classes=5)
    stirred(model, "t")
    x = torch.randn(2, 3, 64, 64)
    expected = model(x).detach().numpy()
    exported = visadapt.merge(model, "t") if merged else model
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's, about its own parts
        torch.onnx.export(exported, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fsdp2_on_two_processes(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch, torch.distributed as dist, torch.multiprocessing as mp, torchvision, visadapt
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            def build():
                torch.manual_seed(0)
                model = torchvision.models.resnet18()
                visadapt.inject(model, m=4, task="t", num_classes=5)
                with torch.no_grad():
                    for p in visadapt.parameters(model, "t"):
                        p.add_(torch.randn_like(p) * 0.02)
                return model.train()

            def job(rank, folder):
                dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
                mesh = init_device_mesh("cpu", (2,))
                x, y = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])
                plain, sharded = build(), build()
                for layer in (sharded.layer1, sharded.layer2, sharded.layer3, sharded.layer4):
                    fully_shard(layer, mesh=mesh)
                fully_shard(sharded, mesh=mesh)
                for model in (plain, sharded):
                    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
                    for _ in range(2):
                        optimiser.zero_grad()
                        loss = torch.nn.functional.cross_entropy(model(x), y)
                        loss.backward()
                        optimiser.step()
                    print(rank, loss.item())
                    model.last = loss.item()
                assert abs(plain.last - sharded.last) < 1e-4 * abs(plain.last), (plain.last, sharded.last)
                dist.destroy_process_group()

            if __name__ == "__main__":
                mp.spawn(job, args=(sys.argv[1],), nprocs=2)
                print("both agree")
            """
        )
    )
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "both agree" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_ddp_on_two_processes(tmp_path):
    """One task, then a mixed batch, plain and lean: DDP, which refuses parameters without a gradient, finds none."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch, torch.distributed as dist, torch.multiprocessing as mp, visadapt
            from torch.nn.parallel import DistributedDataParallel
            from tests.models import ZOO

            def build(tasks):
                model = ZOO["tiny/resnet"].make()
                for seed, task in enumerate("ab"):
                    torch.manual_seed(seed)
                    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1), task=task, num_classes=5)
                visadapt.trainable(model, list(tasks))
                return model.train()

            def steps(model, plain, batch, tasks):
                optimiser = torch.optim.SGD([p for t in tasks for p in visadapt.parameters(plain, t)], lr=0.1)
                for x, y, chosen in batch:
                    optimiser.zero_grad()
                    with visadapt.using(plain, chosen):
                        torch.nn.functional.cross_entropy(model(x), y).backward()
                    optimiser.step()
                return {name: p.detach() for t in tasks for name, p in visadapt.named_parameters(plain, t)}

            def job(rank, folder):
                dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
                generator = torch.Generator().manual_seed(1)
                x, y = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 5
                mine = slice(4 * rank, 4 * rank + 4)
                for tasks, lean in (("a", False), ("ab", False), ("a", True), ("ab", True)):
                    names = ["a"] * 8 if tasks == "a" else list("abbaabba")
                    whole, half = build(tasks), build(tasks)
                    choose = lambda own: "a" if tasks == "a" else own
                    expected = steps(whole, whole, [(x, y, choose(names))] * 2, tasks)
                    shared = DistributedDataParallel(visadapt.lean(half) if lean else half)
                    found = steps(shared, half, [(x[mine], y[mine], choose(names[mine]))] * 2, tasks)
                    for name, value in expected.items():
                        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
                dist.destroy_process_group()

            if __name__ == "__main__":
                mp.spawn(job, args=(sys.argv[1],), nprocs=2)
                print("both agree")
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "both agree" in done.stdout, done.stderr[-3000:]


class Texts(Dataset):
    def __init__(self, classes):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 90, (16, 9), generator=generator)
        self.labels = torch.randint(0, classes, (16,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(9, dtype=torch.long), "labels": self.labels[i]}


@pytest.mark.filterwarnings(*IGNORED)
def test_transformers_trainer_trains_one_task_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config)
    visadapt.inject(model, m=4, task="other", num_classes=2)
    visadapt.inject(model, m=4, task="t", num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    result = Trainer(model=model, args=arguments, train_dataset=Texts(5)).train()
    assert np.isfinite(result.training_loss)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(".visadapt.t." in key for key in moved)
    assert {name for name in moved if ".bottleneck.up.weight" in name}


def test_timms_moving_average_follows_the_task():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    visadapt.inject(model, m=4, task="t", num_classes=5)
    average = ModelEmaV3(model, decay=0.5)
    stirred(model, "t")
    average.update(model)
    name = "layer1.0.bn2.visadapt.t.bottleneck.up.weight"
    found = dict(average.module.named_parameters())[name]
    torch.testing.assert_close(found, 0.5 * dict(model.named_parameters())[name])
    assert average.module(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_timms_optimiser_takes_the_task_alone():
    model = timm.create_model("resnet10t")
    visadapt.inject(model, m=4, task="other")
    visadapt.inject(model, m=4, task="t", num_classes=5)
    visadapt.trainable(model, "t")
    optimiser = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    taken = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert taken == {id(p) for p in visadapt.parameters(model, "t")}
    decayed = [p for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]]
    assert decayed
    assert all(p.ndim > 1 for p in decayed)
