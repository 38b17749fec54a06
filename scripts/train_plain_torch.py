"""Train a small ReZero byte model in a hand-written loop: GradInit, Ranger, bits per byte, without any Trainer."""

import argparse
import math

import torch
from tqdm import trange

from hf_rezero import Ranger, ReZeroConfig, ReZeroForCausalLM, gradinit_, load_corpus, param_groups
from hf_rezero.data.windows import ByteDataset, collate_bytes, evaluation_windows


def random_batch(data: ByteDataset, size: int) -> dict[str, torch.Tensor]:
    """`size` windows drawn at random."""
    return data.__getitems__(torch.randint(len(data), (size,)).tolist())[0]


@torch.no_grad()
def bits_per_byte(model: ReZeroForCausalLM, windows: ByteDataset) -> float:
    """Mean over all bytes that the windows score."""
    nats = scored = 0
    for start in range(0, len(windows), 64):
        batch = collate_bytes([windows[i] for i in range(start, min(start + 64, len(windows)))])
        count = batch["labels"][:, 1:].ne(-100).sum().item()
        nats, scored = nats + model(**batch).loss.item() * count, scored + count
    return nats / scored / math.log(2)


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_file", default="python-stdlib", help="A file, or a name that load_corpus knows.")
    parser.add_argument("--output_dir", default="outputs/plain_torch")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--gradinit_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    corpus = load_corpus(args.train_file)
    data = ByteDataset(corpus.train, block_size=64)
    model = ReZeroForCausalLM(ReZeroConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=2))

    batches = (random_batch(data, args.per_device_train_batch_size) for _ in range(args.gradinit_steps + 1))
    print(gradinit_(model, batches, eta=args.learning_rate, algorithm="ranger", num_steps=args.gradinit_steps))

    optimizer = Ranger(param_groups(model, weight_decay=0.1), lr=args.learning_rate)
    for _ in (bar := trange(args.max_steps, desc="training")):
        loss = model(**random_batch(data, args.per_device_train_batch_size)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(bpb=f"{loss.item() / math.log(2):.2f}")

    windows = evaluation_windows(corpus.validation[:20_000], block_size=64)
    print(f"validation bits per byte: {bits_per_byte(model.eval(), windows):.3f}")
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
