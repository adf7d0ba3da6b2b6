"""Train a ViT on scikit-learn's handwritten digits in a plain loop with Accelerate.

    accelerate launch --config_file accelerate_vit.yaml accelerate_vit.py [--epochs 20] [--lr 3e-3]

Nothing is downloaded, and nothing is imported to train with AdamW2: DeepSpeed finds it by the name
in its JSON file.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DummyOptim, DummyScheduler, set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from weyl_megatron.engines.shutdown import shutdown


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The images (N, 1, 8, 8), standardised, with their classes.

    Three quarters are to train on, one is held out.
    """
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    classes = torch.tensor(loaded.target, dtype=torch.long)
    held_out, train = torch.randperm(len(images)).tensor_split([len(images) // 4])
    test = TensorDataset(images[held_out], classes[held_out])
    return TensorDataset(images[train], classes[train]), test


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images of a batch on each process"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    args = parser.parse_args()

    # Without a GPU accelerate takes all processes for one, unless it gets a backend.
    handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(kwargs_handlers=handlers)
    set_seed(0)
    train, held_out = digits()
    loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True)
    test = DataLoader(held_out, args.batch_size)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            num_labels=10,
        )
    )

    # Accelerate fills in the rate, the weight decay, the batch and the steps where the file says
    # "auto"; not these.
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["optimizer"]["params"] |= {"betas": [0.9, 0.95], "eps": 1e-8}
    optimizer = DummyOptim(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    # Accelerate divides the steps by the processes: it takes those of the unprepared loader.
    scheduler = DummyScheduler(optimizer, total_num_steps=args.epochs * len(loader))
    model, optimizer, loader, test, scheduler = accelerator.prepare(
        model, optimizer, loader, test, scheduler
    )

    for epoch in range(args.epochs):
        model.train()
        losses = []
        for images, classes in loader:
            loss = model(pixel_values=images, labels=classes).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
        lr = scheduler.get_last_lr()[0]
        accelerator.print(f"epoch {epoch + 1}: loss {mean:.4f}, lr {lr:.2e}")

    model.eval()
    right = []
    for images, classes in test:
        with torch.no_grad():
            guesses = model(pixel_values=images).logits.argmax(-1)
        right.append(accelerator.gather_for_metrics(guesses == classes))
    accuracy = torch.cat(right).float().mean()
    accelerator.print(f"accuracy on {len(held_out)} held-out digits: {accuracy:.3f}")
    stats = model.basic_optimizer.stats()
    clipped = f"{sum(entry.clipped for entry in stats.values())} of {len(stats)} matrices clipped"
    accelerator.print(f"AdamW2: {clipped} in the last step; the first three:")
    for name in list(stats)[:3]:
        accelerator.print(f"  {name}: {stats[name]}")


if __name__ == "__main__":
    main()
    shutdown()
