"""A small GPT-2 with tied weights, trained by transformers' Trainer, and its checkpoints' subspace.

    pip install -r examples/requirements.txt
    python -m examples.language

The text, Python's help pages, comes with Python. The Trainer writes the folders checkpoint-N, which
`dldr.load_trajectory` reads; then P-SGD trains k numbers.

Bits per byte of test text, seeds 1 and 2 (torch 2.14, transformers 5.24, one core of a Xeon): 7.94
and 7.91 at the start, 3.75 and 3.72 after ten epochs of the Trainer. P-SGD with k = 8 reaches 3.74
and 3.72 in the span of its checkpoints, and 7.71 and 7.65 in a random one; n = 120,576.
"""

import math
import tempfile
from pydoc_data.topics import topics

import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import dldr

LENGTH, BATCH = 64, 32  # bytes of a sequence, sequences of a batch
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_text(sequences: int) -> tuple[Tensor, Tensor]:
    """Training sequences of bytes, (sequences, LENGTH), and a tenth as many for tests."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(list(text[: LENGTH * (sequences + sequences // 10)])).view(-1, LENGTH)
    return data[:sequences], data[sequences:]


def make_network(seed: int) -> GPT2LMHeadModel:
    """A GPT-2 on bytes; its embedding is also the weight of its last layer. n = 120,576."""
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))


def train_by_trainer(network: nn.Module, data: Tensor, epochs: int, seed: int, folder: str) -> None:
    """Train all parameters with AdamW; checkpoint-N is written after each epoch."""
    settings = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        save_strategy="epoch",
        save_only_model=True,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    rows = [{"input_ids": sequence, "labels": sequence} for sequence in data]
    trainer = Trainer(network, settings, train_dataset=rows)
    trainer.save_model(f"{folder}/checkpoint-0")  # θ_0, which the Trainer does not save
    trainer.train()


@torch.no_grad()
def bits_per_byte(module: nn.Module, data: Tensor) -> float:
    """The cross-entropy of the next byte, in bits."""
    return module.eval()(input_ids=data, labels=data).loss.item() / math.log(2)


def main(epochs: int = 10, sequences: int = 640, k: int = 8, seed: int = 1) -> dict[str, float]:
    """Print the bits per byte of test text, and return them by method."""
    data, test = load_text(sequences)
    network = make_network(seed)
    with tempfile.TemporaryDirectory() as folder:
        train_by_trainer(network, data, epochs, seed, folder)
        snapshots = dldr.load_trajectory(folder, model=network)
        basis, _ = dldr.pca(snapshots, n_components=k, model=network)
    results = {"before": bits_per_byte(make_network(seed), test)}
    results["Trainer"] = bits_per_byte(network, test)

    random = torch.linalg.qr(torch.randn(basis.shape[1], k)).Q.T
    for name, rows in {"P-SGD": basis, "P-SGD, random basis": random}.items():
        subspace = dldr.Subspace(make_network(seed), rows)
        optimizer = torch.optim.SGD([subspace.coordinates], lr=1.0, momentum=0.9)
        for _ in range(epochs):
            for batch in torch.randperm(len(data)).split(BATCH):
                optimizer.zero_grad()
                subspace(input_ids=data[batch], labels=data[batch]).loss.backward()
                optimizer.step()
        results[name] = bits_per_byte(subspace, test)

    print(f"bits per byte of test text; n = {basis.shape[1]:,}, k = {k}")
    for name, bits in results.items():
        print(f"{name:<22}{bits:6.3f}", flush=True)

    return results


if __name__ == "__main__":
    main()
