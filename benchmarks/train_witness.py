"""Trains a small BLOOM with a real perplexity, unlike test models with random weights.

    python benchmarks/train_witness.py [--to FOLDER] [--steps 2000] [--hidden 192] [--layers 4]
        [--tokens-per-step 1024] [--window 256] [--vocab 4096] [--lr 3e-3] [--seed 0] [--threads 1]
        [--llama-mlp N]

transformers' BloomForCausalLM on Shakespeare and Milton (`public_domain.py`), with a byte-level BPE
trained on the same text. Three plays are held out; the perplexity on them is compared with that of
a unigram and an interpolated bigram model (Witten-Bell) of the same tokens, which shows how much
was learned. --llama-mlp makes a Llama with that many features in its MLPs instead: it takes any
--hidden that is a multiple of 10, so that K can have few factors of two (`frontier.py`). The same
seed and number of threads give the same weights on the same machine.

FOLDER (default: witness-bloom in the cache of dist-int8) gets an ordinary fp32 checkpoint with its
tokenizer, `held_out.txt`, and `witness.json`, which records how it was made and its perplexity.
"""

import argparse
import json
import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from public_domain import HELD_OUT, works
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dist_int8.cli.demo_model import cache_folder

END = "</s>"  # between works; BLOOM's own name for it
PADDING = "<pad>"


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with `vocab_size` tokens, including END and PADDING."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text.split("\n\n"),  # paragraphs, so that threads can share the counting
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PADDING
    )


def new_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> BloomForCausalLM | LlamaForCausalLM:
    """Makes a model with random weights, drawn from the seed."""
    torch.manual_seed(args.seed)
    if args.llama_mlp:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=args.hidden,
                intermediate_size=args.llama_mlp,
                num_hidden_layers=args.layers,
                num_attention_heads=5,
                num_key_value_heads=5,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
                use_cache=False,
            )
        )
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            n_layer=args.layers,
            n_head=args.hidden // 32,
            seq_length=2048,  # ALiBi has no maximum context, but tools need one
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=False,
        )
    )


def train(model: nn.Module, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Runs AdamW on random windows, with matrix products in bfloat16.

    The learning rate warms up, then decays linearly to zero.
    """
    generator = torch.Generator().manual_seed(args.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    num_rows, warmup = args.tokens_per_step // args.window, max(1, args.steps // 20)
    start, recent = time.perf_counter(), 0.0
    model.train()
    for step in range(args.steps):
        factor = min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        first = torch.randint(len(ids) - args.window, (num_rows,), generator=generator)
        rows = torch.stack([ids[i : i + args.window + 1] for i in first.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{args.steps}  loss {recent:.3f}  {seconds:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def perplexity(model: nn.Module, ids: torch.Tensor, window: int) -> float:
    """Computes the perplexity over consecutive windows, all tokens but the first of each."""
    total, count = 0.0, 0
    for row in ids.split(window):
        if len(row) > 1:
            logits = model(row[None]).logits[0, :-1]
            total += F.cross_entropy(logits, row[1:], reduction="sum").item()
            count += len(row) - 1
    return math.exp(total / count)


def counted_perplexities(train_ids: list[int], ids: list[int], num: int) -> tuple[float, float]:
    """Computes perplexities of a unigram (add one) and a bigram (Witten-Bell) model."""
    singles, pairs = Counter(train_ids), Counter(pairwise(train_ids))
    followed = Counter(train_ids[:-1])
    kinds = Counter(first for first, _ in pairs)
    one = two = 0.0
    for before, token in pairwise(ids):
        alone = (singles[token] + 1) / (len(train_ids) + num)
        seen, different = followed[before], kinds[before]
        both = (pairs[before, token] + different * alone) / (seen + different) if seen else alone
        one, two = one - math.log(alone), two - math.log(both)
    count = len(ids) - 1
    return math.exp(one / count), math.exp(two / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--hidden",
        type=int,
        default=192,
        help="a multiple of 32; of 10 for a Llama, which has five heads",
    )
    parser.add_argument("--llama-mlp", type=int, default=0, metavar="N")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    folder = args.to or cache_folder() / "witness-bloom"
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    texts = works()
    held_out = "\n".join(texts.pop(name) for name in HELD_OUT)
    tokenizer = train_tokenizer("\n\n".join(texts.values()), args.vocab)
    end = [tokenizer.eos_token_id]
    train_ids = [id for text in texts.values() for id in end + tokenizer(text).input_ids]
    ids = tokenizer(held_out).input_ids
    model = new_model(args, tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f}M parameters, {len(train_ids)} tokens, {len(ids)} held out", flush=True)
    started = time.perf_counter()
    train(model, torch.tensor(train_ids), args)
    seconds = time.perf_counter() - started

    unigram, bigram = counted_perplexities(train_ids, ids, len(tokenizer))
    figures = {
        "unigram": unigram,
        "bigram": bigram,
        "witness": perplexity(model, torch.tensor(ids), args.window),
    }
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "held_out.txt").write_text(held_out)
    made = {name: value for name, value in vars(args).items() if name != "to"}
    made |= {"parameters": size, "train_tokens": len(train_ids), "held_out_tokens": len(ids)}
    made |= {"held_out": HELD_OUT, "seconds": round(seconds), "perplexity": figures}
    (folder / "witness.json").write_text(json.dumps(made, indent=2) + "\n")
    for name, value in figures.items():
        print(f"perplexity of the plays held out, {name}: {value:.2f}")
    print(folder)


if __name__ == "__main__":
    main()
