"""Writes the files here with the tools themselves, and what their own loaders read from them.

    pip install torch lightning transformers accelerate timm peft
    python tests/files/make.py

Networks are trained for a few steps on random numbers. expected.npz holds the names and the values
of their parameters and buffers.
"""

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import lightning
import numpy as np
import peft
import timm.models
import timm.utils
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

HERE = Path(__file__).parent
expected: dict[str, np.ndarray] = {}


def expect(folder: str, snapshot: str, state: Mapping[str, Tensor]) -> None:
    """Keep what a tool's own loader has read, tied weights once: names, and values in a row."""
    once = {value.data_ptr(): name for name, value in reversed(state.items())}
    names = sorted(once.values())
    expected[f"{folder}/{snapshot}/names"] = np.array(names)
    values = torch.cat([state[name].detach().double().flatten() for name in names])
    expected[f"{folder}/{snapshot}/values"] = values.numpy()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


class Classifier(lightning.LightningModule):
    """What a LightningModule usually looks like: the network is its attribute."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = network()

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


def use_lightning(folder: Path) -> None:
    """Checkpoints of each epoch, and last.ckpt."""
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, 4))
    for file in folder.glob("epoch*"):
        loaded = Classifier.load_from_checkpoint(file, map_location="cpu", weights_only=False)
        expect(folder.name, file.name, loaded.state_dict())


def train(model: nn.Module) -> torch.optim.Optimizer:
    """A step on random numbers."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def use_timm(folder: Path) -> None:
    """Checkpoints as timm's train.py writes them, with its options and an average."""
    folder.mkdir()
    model = network()
    average = timm.utils.ModelEmaV2(model, 0.5)
    arguments = argparse.Namespace(model="tiny", lr=0.1, data_dir=Path("data"))
    saver = timm.utils.CheckpointSaver(
        model,
        train(model),
        arguments,
        model_ema=average,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        max_history=9,
    )
    for epoch in range(2):
        train(model)
        average.update(model)
        saver.save_checkpoint(epoch, metric=np.float64(epoch))
    for name in ("last.pth.tar", "model_best.pth.tar"):
        (folder / name).unlink()
    for file in folder.iterdir():
        state = timm.models.load_state_dict(file, use_ema=False, weights_only=False)
        expect(folder.name, file.name, state)
        state = timm.models.load_state_dict(file, use_ema=True, weights_only=False)
        expect(f"{folder.name}, ema", file.name, state)


def gpt() -> nn.Module:
    """A transformer with tied weights."""
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def use_transformers(folder: Path) -> None:
    """Folders as the Trainer writes them, with the last model beside them."""
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]
    options = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        optim="sgd",
    )
    trainer = transformers.Trainer(gpt(), options, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    for part in folder.glob("checkpoint-*"):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(part)
        expect(folder.name, part.name, loaded.state_dict())
    for kind in ("rng_state.pth", "optimizer.pt", "scheduler.pt"):
        for file in folder.rglob(kind):
            file.unlink()


def use_shards(folder: Path) -> None:
    """A model in several files."""
    for number in range(2):
        part = folder / f"step_{number}"
        gpt().save_pretrained(part, max_shard_size="2KB")
        loaded = transformers.GPT2LMHeadModel.from_pretrained(part)
        expect(folder.name, part.name, loaded.state_dict())


def use_peft(folder: Path) -> None:
    """Adapters without the model that they adapt."""
    settings = peft.LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights=False)
    for number in range(2):
        model = peft.get_peft_model(network(), settings)
        model.save_pretrained(folder / f"adapter_{number}")
        loaded = peft.PeftModel.from_pretrained(network(), folder / f"adapter_{number}")
        state = peft.get_peft_model_state_dict(loaded)
        expect(folder.name, f"adapter_{number}", state)
        (folder / f"adapter_{number}" / "README.md").unlink()


def main() -> None:
    """Write all folders anew."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        for name, use in {
            "lightning": use_lightning,
            "timm": use_timm,
            "transformers": use_transformers,
            "shards": use_shards,
            "peft": use_peft,
        }.items():
            use(Path(made) / name)
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.copytree(Path(made) / name, HERE / name)
    np.savez_compressed(HERE / "expected.npz", **expected)


if __name__ == "__main__":
    main()
