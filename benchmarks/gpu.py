"""One GPU: speed and MFU of MAE against the reference recipe, and one step of ViT-6.5B against its plan.

    python benchmarks/gpu.py --output $OUT                              # all of it, in less than ten minutes
    python benchmarks/gpu.py --device cpu --models atto --large atto   # tries the path; its figures say nothing

NOT RUN ON A GPU YET: only the CPU line above was tried.

    ours        maws/engine.py, ZeRO-3, bf16, blocks compiled (--compile none: not)
    reference   the same modules (timm's blocks) in float32 under autocast to bf16, torch's AdamW, nothing compiled

Each at its own best micro-batch, with made-up pictures, in a process of its own. Then one step of MAE and one of WSP
with the largest model, whose torch.cuda.max_memory_allocated is compared with `python -m maws plan`; the first of
--ds-configs whose states fit is taken. Prints a table and writes gpu.json, after every part, to --output.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.ending import leave
from maws import config, devices, optim, stages
from maws.data.batch import Batch
from maws.engine import Runtime
from maws.models import init
from maws.plan_memory import plan_memory

WARM_UP, STEPS = 3, 8
SYNSETS = 28_000  # of WSP's last layer, about MAWS's vocabulary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["vit_b16", "vit_l16", "vit_h14"])
    parser.add_argument("--large", default="vit_6.5b14", help="one step each of MAE and WSP; empty: none")
    parser.add_argument("--micro", type=int, nargs="+", default=[128, 256, 512], help="tried until memory is full")
    parser.add_argument("--large-micro", type=int, default=8)
    parser.add_argument("--compile", default="blocks", choices=["none", "blocks"])
    parser.add_argument("--ds-configs", nargs="+", default=["zero3", "zero3_offload"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=9.0, help="no part is begun after these")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one part, in a process of its own
    options = parser.parse_args()
    if options.case:
        print(json.dumps(CASES[json.loads(options.case)["kind"]](json.loads(options.case))))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; try the path with --device cpu --models atto --large atto")
    found = {"device": _device(), "torch": torch.__version__, "parts": list(parts(options))}
    _write(options.output, found)
    print(table(found["parts"]))
    return 0


def parts(options: argparse.Namespace) -> Any:
    """Results of the parts, one after another, as long as there is time."""
    until, cpu, done = time.monotonic() + 60 * options.minutes, options.device == "cpu", []
    micros = [2, 4] if cpu else options.micro
    wanted: list[dict[str, Any]] = [
        {"kind": kind, "model": m, "micros": micros, "compile": "none" if cpu else options.compile}
        for m in options.models
        for kind in ("ours", "reference")
    ]
    large = {"model": options.large, "micro": 2 if cpu else options.large_micro}
    stages_of_it = ("mae", "wsp") if options.large else ()
    files = ["zero3_cpu"] if cpu else options.ds_configs
    wanted += [{"kind": "large", "stage": stage, "files": files, **large} for stage in stages_of_it]
    for case in wanted:
        left = until - time.monotonic()
        if left < 10:
            result = {"error": "no time left"}
        else:
            result = in_a_process(case, options.device, left)
        print(json.dumps(case | result), file=sys.stderr, flush=True)
        done.append(case | result)
        _write(options.output, {"device": _device(), "parts": done})
        yield case | result


def in_a_process(case: dict[str, Any], device: str, seconds: float) -> dict[str, Any]:
    for file in case.get("files", [""]):
        command = [sys.executable, __file__, "--device", device, "--case", json.dumps(case | {"file": file})]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done in {seconds:.0f} s"}
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    return {"error": done.stderr.strip()[-600:]}


# --------------------------------------------------------------------------------------------------------------- parts


def setting(stage: str, model: str, *settings: str) -> Any:
    """A run's configuration: the preset of that name, or the debug one with another model."""
    presets = stages.load(stage).PRESETS
    cfg = presets[model] if model in presets else config.override(presets["debug"], [f"model.variant={model}"])
    cfg = config.override(cfg, ["optim.micro_batch=0", "engine.precision=bf16", *settings])
    return dataclasses.replace(cfg, synsets=SYNSETS) if stage == "wsp" else cfg


def made_up(stage: str, cfg: Any, images: int) -> Batch:
    """Random pictures, and what else the objective asks for."""
    side, patches = stages.image_side(cfg.model), stages.patch_count(cfg.model)
    random = torch.Generator().manual_seed(0)
    batch: Any = {
        "keys": [""] * images, "bad": [],
        "image": torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=random),
    }  # fmt: skip
    if stage == "mae":
        batch["ids_shuffle"] = torch.rand(images, patches, generator=random).argsort(dim=1)
    else:
        batch["synset_ids"] = torch.randint(0, SYNSETS, (images, 3), generator=random)
    if torch.cuda.is_available():
        batch = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return batch


def objective_of(stage: str, cfg: Any, runtime: Runtime | None) -> Any:
    objective: Any
    if runtime is None:
        objective = stages.load(stage).objective(cfg, None)  # type: ignore[arg-type]  # a shard set is not looked at
        init.fill(objective, objective.init_rules(), 0)
        return objective
    with runtime.partitioned():
        objective = stages.load(stage).objective(cfg, None)  # type: ignore[arg-type]
    init.fill(objective, objective.init_rules(), 0, runtime.gather)
    return objective


def engine_of(stage: str, cfg: Any) -> Any:
    runtime = Runtime(cfg.engine, cfg.optim, stages.shape_of(cfg.model).width)
    objective = objective_of(stage, cfg, runtime)
    rules = stages.load(stage).param_rules(cfg)
    return runtime.build(
        objective, optim.groups(objective, rules, cfg.optim.peak_lr, cfg.optim.weight_decay), cfg.optim
    )


def ours(case: dict[str, Any]) -> dict[str, Any]:
    first = case["micros"][0]
    cfg = setting("mae", case["model"], f"optim.batch_size={first}", f"engine.compile={case['compile']}")
    engine = engine_of("mae", cfg)

    def step(batch: Batch) -> None:
        engine.runtime.micro = len(batch["keys"])
        engine.step(batch)

    return best("mae", cfg, case["micros"], step)


def reference(case: dict[str, Any]) -> dict[str, Any]:
    cfg = setting("mae", case["model"], f"optim.batch_size={case['micros'][0]}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    objective = objective_of("mae", cfg, None).to(device)
    groups = optim.groups(objective, stages.load("mae").param_rules(cfg), cfg.optim.peak_lr, cfg.optim.weight_decay)
    adamw = torch.optim.AdamW(groups, betas=cfg.optim.betas)

    def step(batch: Batch) -> None:
        tensors: Any = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        with torch.autocast(device, torch.bfloat16):
            loss = objective(tensors)["loss"]
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    return best("mae", cfg, case["micros"], step)


def best(stage: str, cfg: Any, micros: list[int], step: Callable[[Batch], object]) -> dict[str, Any]:
    """The micro-batch with the most images a second, and what it reaches."""
    tried = {}
    for micro in micros:
        try:
            tried[micro] = speed(step, made_up(stage, cfg, micro))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    micro = max(tried, key=lambda m: tried[m]["images_per_second"])
    cost, peak = stages.load(stage).cost(cfg), None
    if torch.cuda.is_available():
        peak = devices.peak_flops(torch.cuda.get_device_name(), "bf16")
    rate = tried[micro]["images_per_second"]
    return {"micro": micro, **tried[micro], "mfu": rate * cost.training_flops / peak if peak else None, "tried": tried}


def speed(step: Callable[[Batch], object], batch: Batch) -> dict[str, Any]:
    for _ in range(WARM_UP):
        step(batch)
    _synchronise()
    begun = time.perf_counter()
    for _ in range(STEPS):
        step(batch)
    _synchronise()
    rate = STEPS * len(batch["keys"]) / (time.perf_counter() - begun)
    return {"images_per_second": rate, "peak_bytes": _peak_bytes()}


def large(case: dict[str, Any]) -> dict[str, Any]:
    """One step, the second one timed: the first makes the optimizer's states."""
    more = [f"optim.batch_size={case['micro']}", f"engine.ds_config={case['file']}", "model.checkpoint_blocks=all"]
    cfg = setting(case["stage"], case["model"], *more)
    engine, batch = engine_of(case["stage"], cfg), made_up(case["stage"], cfg, case["micro"])
    losses = engine.step(batch)
    _synchronise()
    begun = time.perf_counter()
    engine.step(batch)
    _synchronise()
    planned = plan_memory(case["stage"], cfg, ranks=1, micro_batch=case["micro"], device=engine.device.type)
    return {
        "file": case["file"], "loss": float(losses["loss"]), "step_seconds": time.perf_counter() - begun,
        "peak_bytes": _peak_bytes(), "planned_bytes": planned.allocated,
    }  # fmt: skip


CASES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"ours": ours, "reference": reference, "large": large}


# --------------------------------------------------------------------------------------------------------------- words


def table(found: list[dict[str, Any]]) -> str:
    rows = [("model", "way", "micro-batch", "images/s", "MFU", "GiB", "to reference")]
    rates = {(part["model"], part["kind"]): part.get("images_per_second") for part in found}
    for part in found:
        name = f"{part['model']} {part.get('stage', 'mae')}"
        if "error" in part:
            rows.append(
                (name, part["kind"], "", part["error"].splitlines()[-1][:60] if part["error"] else "", "", "", "")
            )
        elif part["kind"] == "large":
            plan = f"{part['peak_bytes'] / part['planned_bytes']:.2f} of the plan"
            gib, took = f"{part['peak_bytes'] / 2**30:.1f}", f"{part['step_seconds']:.2f} s/step"
            rows.append((name, part["file"], str(part["micro"]), took, "", gib, plan))
        else:
            other, rate = rates.get((part["model"], "reference")), part["images_per_second"]
            ratio = f"{rate / other:.2f}" if other and part["kind"] == "ours" else ""
            mfu = f"{part['mfu']:.1%}" if part["mfu"] else ""
            gib = f"{part['peak_bytes'] / 2**30:.1f}"
            rows.append((name, part["kind"], str(part["micro"]), f"{rate:.1f}", mfu, gib, ratio))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _write(folder: Path, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    leave(main())
