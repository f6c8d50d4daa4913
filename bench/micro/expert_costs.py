"""Mixtures of experts: how evenly tokens use them, what a layer's call costs beside its products, and a checkpoint of
random weights to measure engines with.

    python -m bench.micro.expert_costs write DIRECTORY [--layers N --count N ...]
    python -m bench.micro.expert_costs balance MODEL [--text FILE --tokens N]
    python -m bench.micro.expert_costs calls [--hidden N --size N --count N --weights FORMAT]

`write` makes a Qwen3-MoE of 0.9 billion parameters, of which a token uses 0.2 (head included), with the default model's
tokenizer. Its texts are noise, and its experts are used more evenly than those of trained models.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.corpus import passages, read_text
from bench.format_flags import exits_on_error
from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.worker.kernels import choose_ops
from engine.worker.resolve import resolve
from kernels.ops import Experts
from kernels.reference_experts import LoopedExperts, choose_experts
from kernels.weights.matrix import DenseMatrix
from kernels.weights.weight_format import FORMATS
from models.config import parse_config
from models.decoder import DecoderModel
from models.default import default_model_dir, resolve_model
from models.loader import load_model
from models.parts.mixture import RoutedNetworks
from models.tokenizer import Tokenizer
from parallel.group import Group
from parallel.matrix_layer import Placement
from parallel.module import Module

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
CPU = torch.device("cpu")


def write(directory: Path, *, hidden: int, size: int, layers: int, count: int, per_token: int) -> int:
    """Write a checkpoint in bfloat16 with random weights. size: intermediate features of an expert. Returns the number
    of parameters."""
    source = default_model_dir()
    given = json.loads((source / "config.json").read_text(encoding="utf-8"))
    data = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": size,
        "num_hidden_layers": layers,
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": given["vocab_size"],
        "bos_token_id": given.get("bos_token_id"),
        "eos_token_id": given.get("eos_token_id"),
    }
    model = DecoderModel(parse_config(data), Placement(Group.single(), torch.bfloat16, torch.device("meta")), 1)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for slot in model.weight_slots():
        tensors[slot.source] = torch.ones(slot.full_shape, dtype=torch.bfloat16)
    for place in model.matrix_slots():
        drawn = torch.empty(place.full_shape, dtype=torch.bfloat16).normal_(generator=generator)
        tensors[place.source] = drawn.mul_(place.full_shape[1] ** -0.5)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copy(source / name, directory)
    return sum(tensor.numel() for tensor in tensors.values())


class Counting:
    """Counts the tokens of each expert, and passes calls on."""

    def __init__(self, inner: Experts, count: int, per_token: int) -> None:
        self._inner, self._count, self._per_token = inner, count, per_token
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.used: list[float] = []
        """Share of the experts that each call used, of those that so many tokens could."""

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        chosen, _ = choose_experts(scores, self._per_token, normalised=False)
        tokens = torch.bincount(chosen.flatten(), minlength=self._count)
        self.tokens += tokens
        self.used.append(int((tokens > 0).sum()) / min(self._count, chosen.numel()))
        return self._inner(x, scores)


def count_tokens(model: Module) -> list[Counting]:
    """Make the layers of a model count the tokens of their experts."""
    found = []
    for child in model.children():
        found += count_tokens(child)
        if isinstance(child, RoutedNetworks):
            assert child._experts is not None
            child._experts = Counting(child._experts, len(child._networks), child._per_token)
            found.append(child._experts)
    return found


def balance(name: str, text: str, tokens: int, rows: int) -> dict[str, list[Counting]]:
    """Count the tokens of experts in the rounds of a profile of `rows` rows, and in a text of `tokens` tokens."""
    found = {}
    for kind in ("profile", "text"):
        config = EngineConfig.model_validate({"model": name, "device": "cpu", "speculation": {"gamma": 0}})
        sizes = resolve(config, None)
        model = load_model(
            sizes.path, dtype=sizes.dtype, device=CPU, group=Group.single(), progress=False, ops=sizes.ops
        )
        engine = Engine(config, model=model, progress=False)
        found[kind] = count_tokens(model)
        if kind == "profile":
            engine.profiler.measure(min(rows, config.scheduler.max_rows), 64, 0)
        else:
            prompts = passages(Tokenizer(resolve_model(name)), text, count=4, length=tokens // 4)
            for number, prompt in enumerate(prompts):
                engine.add(AddRequest(str(number), prompt, SamplingParams(max_tokens=1)))
            while engine.has_work():
                engine.step()
        engine.close()
    return found


def describe(counts: list[Counting]) -> str:
    """Describe the balance, as means over layers."""
    shares = torch.stack([each.tokens.double() / each.tokens.sum() for each in counts]).sort(-1, descending=True).values
    count = shares.shape[1]
    top = ", ".join(f"{100 * float(share):.1f} %" for share in shares.mean(0)[:4])
    unused = float((shares == 0).double().sum(-1).mean())
    used = sum(sum(each.used) / len(each.used) for each in counts) / len(counts)
    return (
        f"largest shares {top} (even: {100 / count:.1f} %); {unused:.1f} of {count} unused; a call uses "
        f"{100 * used:.0f} % of those that its tokens could"
    )


def calls(*, hidden: int, size: int, count: int, per_token: int, weights: str, seconds: float = 0.5) -> None:
    """Print times of a layer's call, in one operator and in a loop of Python, beside those of its products alone."""
    ops = choose_ops("auto", CPU, torch.bfloat16, [64])
    networks = []
    for _ in range(count):
        gate_up, down = (
            FORMATS[weights].quantize(torch.randn(shape, dtype=torch.bfloat16) * shape[1] ** -0.5)
            if weights != "dense"
            else DenseMatrix(torch.randn(shape).mul_(shape[1] ** -0.5).bfloat16())
            for shape in ((2 * size, hidden), (hidden, size))
        )
        networks.append((ops.linear(gate_up, None, gated="silu"), ops.linear(down, None, wide=True)))
    one, loop = ops.experts(networks, per_token=per_token, normalised=True), LoopedExperts(networks, per_token, True)
    print(
        f"{count} experts of {hidden} x {size}, {per_token} per token, {weights}, {ops.name}; the fastest of many calls"
    )
    for rows in (1, 2, 4, 8, 16, 64):
        x, scores = torch.randn(rows, hidden, dtype=torch.bfloat16), torch.randn(16, rows, count)
        chosen = [torch.bincount(choose_experts(each, per_token, True)[0].flatten()) for each in scores]
        work = [[(i, x[:n].contiguous()) for i, n in enumerate(each.tolist()) if n] for each in chosen]

        def products(turn: int, work: list[list[tuple[int, Tensor]]] = work) -> None:
            for network, mine in work[turn % 16]:
                networks[network][1](networks[network][0](mine))

        run: dict[str, Callable[[int], object]] = {
            "products": products,
            "operator": lambda turn, x=x, scores=scores: one(x, scores[turn % 16]),  # type: ignore[misc]
            "loop": lambda turn, x=x, scores=scores: loop(x, scores[turn % 16]),  # type: ignore[misc]
        }
        taken = {name: _fastest_us(each, seconds) for name, each in run.items()}
        print(f"{rows:4} rows: " + ", ".join(f"{name} {time:.0f} us" for name, time in taken.items()), flush=True)


@torch.inference_mode()
def _fastest_us(run: Callable[[int], object], seconds: float) -> float:
    """Return the least time of a call in microseconds: other processes only ever add to it."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 10:
        began = perf_counter()
        run(len(times))
        times.append(perf_counter() - began)
    return 1e6 * min(times)


@exits_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing, counting, timing = (commands.add_parser(name) for name in ("write", "balance", "calls"))
    for command in (writing, timing):
        for name, value in (("hidden", 1024), ("size", 256), ("count", 64), ("per-token", 8)):
            command.add_argument(f"--{name}", type=int, default=value)
    writing.add_argument("directory", type=Path)
    writing.add_argument("--layers", type=int, default=16)
    timing.add_argument("--weights", choices=FORMATS, default="dense")
    counting.add_argument("model")
    counting.add_argument("--text", type=Path)
    counting.add_argument("--tokens", type=int, default=2048)
    counting.add_argument("--rows", type=int, default=16)
    given = vars(parser.parse_args())
    command = given.pop("command")
    if command == "write":
        print(f"{write(given.pop('directory'), **given) / 1e6:.0f} million parameters")
    elif command == "calls":
        calls(**given)
    else:
        for kind, counts in balance(given["model"], read_text(given["text"]), given["tokens"], given["rows"]).items():
            print(f"{kind}: {describe(counts)}")


if __name__ == "__main__":
    main()
