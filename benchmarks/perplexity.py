"""Which outlier rule loses nothing? Perplexity of a real model whose linears run in int8.

    python benchmarks/perplexity.py [--model FOLDER] [--text FILE] [--rows 12] [--seeds 0 1]
        [--methods NAME ...] [--with hot16 hot16+head ...] [--calibrate random FILE ...]
        [--threads 2] [--json FILE]

The model is transformers' own, in fp32, with every linear but the head swapped by `convert`; the
figures come out of the same `Int8Linear` and ops that the runtime uses. Text: Python's help topics
(`pydoc_data.topics`), tokens 5,000 to 17,288 in 12 rows of 1,024, or any file. Each row of tokens
is one forward pass; perplexity is exp of the mean cross entropy. "features": the same model with
outlier features injected (`models/outlier_features.py`), one run a seed; that leaves its fp32
logits as they are to 1e-4, which is checked first. "+-" is the standard error of a change over the
rows.

`--with` runs each rule with more of the runtime: hotN, N hot columns of every linear, found as
`dist-int8 quantize --calibrate` finds them, for each of `--calibrate` (random tokens, or the
beginning of a file that is not the text measured); head, embedding: those in int8 too; joined by +.
"""

import collections
import math
import pydoc_data.topics
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from results import folder_of, make_parser, write_result
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_int8.checkpoint import calibration_of, find_hot_columns
from dist_int8.config import Settings
from dist_int8.int8 import ops, reference
from dist_int8.int8.convert import convert
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import describe, load_config, tensor_sources
from dist_int8.models.outlier_features import inject_outlier_features

# name -> (title, outlier rule, threshold): run by Int8Linear
RULES = {
    "none": ("naive W8A8 (no outliers)", "none", 0.0),
    "absolute-6": ("paper's rule, abs >= 6.0", "absolute", 6.0),
    "row_rms-6": ("row_rms 6.0", "row_rms", 6.0),
    "row_rms-5": ("row_rms 5.0", "row_rms", 5.0),
    "row_rms-4": ("row_rms 4.0", "row_rms", 4.0),
    "row_rms-3": ("row_rms 3.0", "row_rms", 3.0),
    "all": ("all (two full planes)", "all", 0.0),
}
# What else the table compares with; each replaces the linear.
OTHERS = {
    "weights-only": "int8 weights, exact activations",
    "paper": "paper: abs >= 6.0, outliers in floating point",
    "bitsandbytes": "bitsandbytes Linear8bitLt, 6.0",
}
DEFAULT_METHODS = [
    "weights-only", "none", "absolute-6", "row_rms-6", "row_rms-4", "all",
]  # fmt: skip
WINDOW = 1024
PLAIN = "plain"


class PaperLinear(nn.Module):
    """LLM.int8() as its paper has it, from the specification."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = reference.llm_int8_linear(x.reshape(-1, x.shape[-1]), self.weight)
        return y.reshape(*x.shape[:-1], -1)


def other_linear(method: str, linear: nn.Linear) -> nn.Module:
    """A stand-in for `linear` (fp32, no bias) that computes by `method`."""
    assert linear.bias is None, "this benchmark's models have no biases in their linears"
    if method == "paper":
        return PaperLinear(linear.weight.data)
    if method == "weights-only":
        exact = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        exact.weight = nn.Parameter(Int8Linear.from_linear(linear).dequantize())
        return exact
    import bitsandbytes

    theirs = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    theirs.weight = bitsandbytes.nn.Int8Params(
        linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
    )
    return theirs.to("cpu").eval()


def swap(model: nn.Module, linears: dict[str, nn.Linear], method: str) -> None:
    """Puts `method` in the place of every linear; "fp32" puts the linears back."""
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        new = linear if method == "fp32" else other_linear(method, linear)
        setattr(model.get_submodule(parent), child, new)


@torch.inference_mode()
def row_losses(model: nn.Module, rows: torch.Tensor) -> list[float]:
    """Mean cross entropy of the next token (nats) in each of rows [R, window] of token ids."""
    return [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in rows]


def perplexity(losses: list[float]) -> float:
    return math.exp(statistics.fmean(losses))


def change(losses: list[float], base: list[float]) -> tuple[float, float]:
    """Change of perplexity against `base` in percent, and its standard error over the rows."""
    differences = [loss - of_base for loss, of_base in zip(losses, base, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(base) > 1 else 0.0
    return 100 * math.expm1(statistics.fmean(differences)), 100 * error


@torch.inference_mode()
def second_plane(model: nn.Module, row: torch.Tensor) -> dict[str, float]:
    """What the second plane carries over one row of tokens, mean over the Int8Linears, in percent.

    elements: of all elements of x. features: of the K input features, those with at least one such
    element in a micro-batch of 16 tokens (the columns that a kernel cannot leave out).
    """
    shares: dict[str, list[float]] = collections.defaultdict(list)

    def look(layer: Int8Linear, arguments: tuple[torch.Tensor]) -> None:
        x = arguments[0].reshape(-1, layer.in_features)
        high = ops.quantize_rows(x, *layer.quantization).x_high != 0
        shares["elements"].append(high.float().mean().item())
        tiles = high[: len(high) // 16 * 16].view(-1, 16, layer.in_features)
        shares["features"].append(tiles.any(dim=1).float().mean().item())

    hooks = [
        layer.register_forward_pre_hook(look)
        for layer in model.modules()
        if isinstance(layer, Int8Linear)
    ]
    model(row[None])
    for hook in hooks:
        hook.remove()
    return {name: 100 * sum(values) / len(values) for name, values in shares.items()}


class EmbeddingTable(nn.Module):
    """An `Int8Embedding` where transformers has an embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.table = Int8Embedding(*embedding.weight.shape)
        weight_int8, col_scale = reference.quantize_weight(embedding.weight.data)
        self.table.weight_int8, self.table.col_scale = weight_int8, col_scale

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        flat = self.table(token_ids.flatten(), torch.float32)
        return flat.view(*token_ids.shape, -1)


def hot_columns_of(
    model: nn.Module, folder: Path, calibrate: str, num_hot_columns: int
) -> dict[str, list[int]]:
    """Hot columns of a transformers model (its weights are those of bf16), by its own names."""
    with tempfile.TemporaryDirectory() as saved:
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        model.save_pretrained(saved, state_dict=state)
        spec = describe(load_config(saved))
        calibration = calibration_of(folder, spec, calibrate, num_hot_columns)
        found = find_hot_columns(saved, spec, calibration)
    sources = tensor_sources(spec, range(spec.num_blocks), first=False, last=False)
    return {
        name.removesuffix(".weight"): columns
        for linear, columns in found.items()
        for names in sources[f"{linear}.weight"].names
        for name in names
    }


def variants(names: list[str], calibrations: list[str]) -> list[tuple[str, str]]:
    """(variant, calibration): one of each without hot columns, all calibrations of the others."""
    return [
        (name, calibrate)
        for name in names
        for calibrate in (calibrations if "hot" in name else calibrations[:1])
    ]


def label(method: str, variant: str, calibrate: str) -> str:
    """What a rule with a variant is called in the figures."""
    parts = [method] if variant == PLAIN else [method, *variant.split("+")]
    return "+".join(
        f"{part} ({Path(calibrate).name})" if part.startswith("hot") else part for part in parts
    )


def measure(
    folder: Path,
    seed: int | None,
    rows: torch.Tensor,
    methods: list[str],
    base: list[float] | None,
    asked: list[tuple[str, str]],
) -> dict:
    """Losses by method on the model with the outlier features of `seed` (None: as it is).

    `base` are the fp32 losses of the plain model, which stand for the model with features too: it
    computes the same function, and that is checked on the first row.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict = {"seed": seed}
    if seed is not None:
        with torch.inference_mode():
            before = model(rows[:1]).logits
            inject_outlier_features(model, seed)
            found["fp32_logits_moved"] = (model(rows[:1]).logits - before).abs().max().item()
            found["fp32_logits_absmax"] = before.abs().max().item()
        assert found["fp32_logits_moved"] < 1e-4, found
    if base is None:
        base = row_losses(model, rows)
    print(f"seed {seed}  fp32 {perplexity(base):.4f}", flush=True)
    found["row_losses"] = {"fp32": base}
    found["perplexity"] = {"fp32": perplexity(base)}
    found["change_percent"] = {}
    found["second_plane_percent"] = {}

    def note(method: str) -> None:
        losses = row_losses(model, rows)
        found["row_losses"][method] = losses
        found["perplexity"][method] = perplexity(losses)
        percent, error = found["change_percent"][method] = change(losses, base)
        print(f"seed {seed}  {method:28s} {percent:+.3f}% +- {error:.3f}", flush=True)

    linears = {
        name: child
        for name, child in model.named_modules()
        if isinstance(child, nn.Linear) and name != "lm_head"
    }
    for method in methods:
        if method in OTHERS:
            swap(model, linears, method)
            note(method)
    swap(model, linears, "fp32")
    rules = [method for method in methods if method in RULES]
    edges = {"lm_head": model.lm_head, "model.embed_tokens": model.get_input_embeddings()}
    for variant, calibrate in asked if rules else ():
        columns: dict[str, list[int]] = {}
        for part in variant.split("+"):
            if part.startswith("hot"):
                columns = hot_columns_of(model, folder, calibrate, int(part[3:]))
        convert(model, hot_columns=columns)
        if "head" in variant:
            model.lm_head = Int8Linear.from_linear(edges["lm_head"])
        if "embedding" in variant:
            model.set_input_embeddings(EmbeddingTable(edges["model.embed_tokens"]))
        layers = [child for child in model.modules() if isinstance(child, Int8Linear)]
        assert len(layers) == len(linears) + ("head" in variant)
        for method in rules:
            _, rule, threshold = RULES[method]
            for layer in layers:
                layer.outlier_rule, layer.outlier_threshold = rule, threshold
            name = label(method, variant, calibrate)
            note(name)
            found["second_plane_percent"][name] = second_plane(model, rows[0])
        swap(model, linears, "fp32")
        model.lm_head = edges["lm_head"]
        model.set_input_embeddings(edges["model.embed_tokens"])
    return found


def table(runs: list[dict], default: str) -> str:
    """A markdown table: change against fp32 per run, and what the second plane carries."""
    heads = ["plain" if run["seed"] is None else f"features, seed {run['seed']}" for run in runs]
    base = [f"{run['perplexity']['fp32']:.3f}" for run in runs]
    lines = [
        f"| method | {' | '.join(heads)} | second plane: elements | features |",
        "|---" * (len(heads) + 3) + "|",
        f"| fp32 | {' | '.join(base)} | | |",
    ]
    for method in runs[0]["change_percent"]:
        rule, *parts = method.split("+")
        title = OTHERS.get(rule) or ", ".join([RULES[rule][0], *parts])
        title = f"**{title}** (default)" if method == default else title
        changes = [run["change_percent"][method] for run in runs]
        cells = [f"{percent:+.2f}% +- {error:.2f}" for percent, error in changes]
        share = runs[0]["second_plane_percent"].get(method)
        carried = f"{share['elements']:.2f}% | {share['features']:.1f}%" if share else " | "
        lines.append(f"| {title} | {' | '.join(cells)} | {carried} |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--text", type=Path, help="a text file (default: Python's help topics)")
    parser.add_argument("--first-token", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=12, help="rows of 1,024 tokens")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--methods", nargs="*", default=DEFAULT_METHODS, choices=[*RULES, *OTHERS])
    parser.add_argument("--with", dest="variants", nargs="*", default=[PLAIN, "hot16"])
    parser.add_argument("--calibrate", nargs="*", default=["random"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = Path(folder_of(args))
    torch.set_num_threads(args.threads)

    text = args.text.read_text() if args.text else "\n".join(pydoc_data.topics.topics.values())
    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
    tokens = tokens[args.first_token :][: args.rows * WINDOW]
    if len(tokens) < args.rows * WINDOW:
        parser.error(
            f"--text must hold {args.first_token + args.rows * WINDOW} tokens, got "
            f"{args.first_token + len(tokens)}; take a longer text, fewer --rows or --first-token 0"
        )
    rows = tokens.view(args.rows, WINDOW)

    asked = variants(args.variants, args.calibrate)
    runs = [measure(model, None, rows, args.methods, None, asked)]
    base = runs[0]["row_losses"]["fp32"]
    runs += [measure(model, seed, rows, args.methods, base, asked) for seed in args.seeds]
    settings = Settings.model_fields
    rule, threshold = settings["outlier_rule"].default, settings["outlier_threshold"].default
    default = next(m for m, (_, *r) in RULES.items() if r == [rule, threshold])
    default = label(default, "hot16", "random")
    path = write_result(
        "perplexity",
        {
            "model": model.name,
            "text": args.text.name if args.text else "pydoc_data.topics",
            "tokens": rows.numel(),
            "first_token": args.first_token,
            "threads": args.threads,
            "int8_ops": ops.library_info()["cpu_instruction_set"],
            "default": default,
            "runs": runs,
        },
        args.json,
    )
    print(f"\n{table(runs, default)}\n\n{path}")


if __name__ == "__main__":
    main()
