"""Several ranks see what one process sees, to the bit; nobody waits for ever, and what fails is said once."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from training import ROOT, Training

from data_pipeline.errors import UsageError
from data_pipeline.images import decode
from eval import distributed, features
from eval.datasets import Dataset
from eval.decode import batches_of
from eval.features import Encoder, extract, open_encoder
from eval.texts import embed
from maws import ds_config
from maws.data.transforms import Preprocess
from maws.launchers import free_port
from tests.eval.conftest import SIDE, atto

B, W, K = 3, 2, 2  # pictures of a batch, ranks, rounds


def pictures_of(number: int, name: str = "x", damaged: tuple[int, ...] = ()) -> tuple[Dataset, list[int]]:
    """Noise, and the positions that were read so far."""
    read: list[int] = []

    def of(position: int) -> bytes:
        read.append(position)
        pixels = np.random.default_rng(position).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()[: 60 if position in damaged else None]

    keys = tuple(f"{name}-{position}" for position in range(number))
    return Dataset(name, keys, np.arange(number), of, f"{name}{number}", {}), read


def one_by_one(encode: Encoder, dataset: Dataset, kind: str = "cls") -> torch.Tensor:
    """The batches one process would have, in order."""
    images = torch.stack([encode.preprocess(decode(dataset.read(row))) for row in range(len(dataset))])
    return torch.cat([encode(images[list(rows)], kind) for rows in batches_of(range(len(dataset)), B)])


# --------------------------------------------------------------------------------------------------------- in the ranks


def cases(run: str, lit: str) -> dict[str, object]:
    """Everything that needs two ranks and goes well; what went wrong is in the values."""
    device = distributed.start("cpu")
    whole = Encoder(atto(), Preprocess(SIDE), batch=B)
    found = {
        "remainders": every_remainder(whole),
        "broken": broken_on_one_rank(whole),
        "cache": cache(Path(run)),
        "zero3": split_towers(Path(run), Path(lit)),
        "tell": who_disagrees(),
        "device": str(device),
    }
    here = distributed.company()
    assert here is not None
    here.done()
    return found


def every_remainder(encode: Encoder) -> list[str]:
    wrong = []
    for number in range(1, B * W * K + B * W):  # the first are fewer than ranks, then fewer than a round
        data, read = pictures_of(number)
        got = extract(encode, data)
        seen = Counter(position for own in distributed.gather(read) for position in own)
        if seen != Counter(range(number)):
            wrong.append(f"{number} pictures were read so often: {seen}")
        if got.rows.tolist() != list(range(number)) or got.labels.tolist() != list(range(number)):
            wrong.append(f"{number} pictures: {got.rows.tolist()}")
        if not torch.equal(got.features, one_by_one(encode, data)):
            wrong.append(f"{number} pictures: other features")
    return wrong


def broken_on_one_rank(encode: Encoder) -> dict[str, object]:
    """Single ones, and a whole batch; both of the second rank."""
    features.MAX_BAD = 0.9  # type: ignore[misc]
    data, _ = pictures_of(14, damaged=(3, 9, 10, 11))
    got = extract(encode, data)
    features.MAX_BAD = 0.01  # type: ignore[misc]
    good = [row for row in range(14) if row not in (3, 9, 10, 11)]
    whole, _ = pictures_of(14)
    exact = one_by_one(encode, whole)
    try:
        extract(encode, data)
        refused = ""
    except Exception as error:
        refused = str(error)
    # the rank that has none of them comes to know it from the others
    return {
        "rows": got.rows.tolist() == good,
        "close": bool(torch.allclose(got.features, exact[good], atol=1e-6)),
        "broken": got.broken,
        "refused": refused,
    }


def cache(run: Path) -> dict[str, object]:
    encode = open_encoder(run, torch.device("cpu"), batch=B)
    data, read = pictures_of(11, "cached")
    first = extract(encode, data)
    distributed.gather("written")
    files = [file.name for file in (run / "features").iterdir()]
    before = len(read)
    again = extract(open_encoder(run, torch.device("cpu"), batch=B), data, "mean")
    own = [file.name for file in (run / "features").iterdir()]
    return {
        "files": len(files) == len(own) == 1,
        "not read again": len(read) == before,
        "same": bool(torch.equal(again.features, one_by_one(encode, data, "mean"))) and again.keys == first.keys,
    }


def split_towers(run: Path, lit: Path) -> dict[str, object]:
    cpu, found = torch.device("cpu"), {}
    chosen = ds_config.ds_config

    def nothing_stays_whole(*given, **more) -> dict:
        config = chosen(*given, **more)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    ds_config.ds_config = nothing_stays_whole  # small parameters stay whole otherwise, and all of these are small
    for name, path in (("tower", run), ("two towers", lit)):
        whole, split = (open_encoder(path, cpu, batch=B, partition=how) for how in ("none", "zero3"))
        split.cache = None
        kinds = ("cls", "mean") if name == "tower" else ("cls", "joint")
        assert split.partition is not None
        held = sum(p.numel() for p in split.partition.module.parameters())
        for number in (1, 4, 7):  # less than a rank each; a last batch on one rank alone; and of both
            data, _ = pictures_of(number, name)
            for kind in kinds:
                same = torch.equal(extract(split, data, kind).features, one_by_one(whole, data, kind))
                found[f"{name} {kind} {number}"] = same
        if name == "two towers":
            texts = ["a red thing", "a photo of a blue thing #blue", "grey"]
            found["texts"] = torch.equal(embed(split, texts), embed(whole, texts))
            found["scale"] = torch.equal(split.two_tower.scale(), whole.two_tower.scale())
        else:
            found["less than all is held"] = held < sum(p.numel() for p in whole.tower.parameters()) / 2
            found["refused"] = refusal(torch.no_grad()(partial(split.tower.embed, torch.zeros(1, 3, SIDE, SIDE))))
            found["not trained in"] = "trains in it" in refusal(partial(split.tower, torch.zeros(1, 3, SIDE, SIDE)))
    return found


def who_disagrees() -> str:
    return refusal(lambda: distributed.same_everywhere({"weights": "same", "data": str(distributed.is_first())}))


def refusal(call) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def command(*arguments: str) -> int:
    from eval.__main__ import main

    return main(list(arguments))


def failing(how: str, *arguments: str) -> int:
    """The same, but the second rank's second batch goes wrong."""
    ordinary, calls = features._forward, []

    def forward(*given):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UsageError("only this rank has no memory left") if how == "told" else ZeroDivisionError("a fault")
        return ordinary(*given)

    features._forward = forward
    return command(*arguments)


def test_two_ranks_have_what_one_process_has(run, lit_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "out").mkdir()
    module = "tests.eval.test_distributed"
    ranks = run_ranks(module, "cases", tmp_path / "out", run=str(run), lit=str(lit_run))
    for rank, found in enumerate(ranks):
        assert found["remainders"] == []
        assert found["broken"]["rows"] and found["broken"]["close"]
        assert found["broken"]["broken"] == {"truncated": 4}
        assert "more than 1% of the 14 pictures" in found["broken"]["refused"], rank
        assert all(found["cache"].values()), found["cache"]
        refused = found["zero3"].pop("refused")
        assert "give --partition none" in refused
        assert all(found["zero3"].values()), found["zero3"]
        assert "rank 1 on" in found["tell"] and "another data" in found["tell"]
    assert len(list((run / "features").iterdir())) == 1


# ------------------------------------------------------------------------------------------------ the command, on ranks


def on_ranks(folder: Path, function: str, *arguments: object, ranks: int = 2) -> tuple[list[int], list[str]]:
    """Exit codes, and what each rank printed."""
    started = Training([str(a) for a in arguments], ranks, target=f"tests.eval.test_distributed:{function}")
    codes, _ = started.wait(120)
    return codes, [process.printed() for process in started.processes]


@pytest.fixture
def asked(run, files, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    data = ("--data", files.test, "--train", files.train, "--classes", files.classes)
    return ("knn", "--run", run, *data, "--batch", "4")


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["none", "zero3"])
def test_the_command_on_two_ranks_prints_and_writes_once(run, files, asked, partition, evaluate):
    codes, printed = on_ranks(run, "command", *asked, "--partition", partition)
    assert codes == [0, 0], printed
    assert printed[0].count("encoder: wsp") == 1 and "on 2 ranks" in printed[0] and not printed[1]
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["extraction"] == {"batch": 4, "ranks": 2, "partition": partition}
    shutil.rmtree(run / "features")
    assert evaluate(*asked).code == 0
    alone = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()][len(lines) :]
    assert [line["value"] for line in alone] == [line["value"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message", "code"),
    [
        ("told", "only this rank has no memory left", 2),
        ("fault", "ZeroDivisionError: a fault", 1),
        ("killed", "died", -9),
    ],
)
def test_what_happens_to_one_rank_ends_all_with_one_message(run, asked, how, message, code):
    begin = time.monotonic()
    codes, printed = on_ranks(run, "failing", how, *asked)
    assert time.monotonic() - begin < 60
    assert codes == [1, code], printed
    errors = [line for text in printed for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rank 1 (host" in errors[0] and message in errors[0]
    assert errors[0] in printed[0]
    assert not (run / "results.jsonl").exists() and not list(run.glob("features/*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--image-size", "33"), "--image-size 33 is not a multiple"),
        (("--device", "cuda:1"), "every rank has a device of its own"),
        (("--set", "knn.k=0"), "k must be one or more"),
    ],
)
def test_a_wrong_flag_is_told_once(run, asked, change, message):
    codes, printed = on_ranks(run, "command", *asked, *change)
    assert codes == [2, 2]
    assert "".join(printed).count("error: ") == 1 and message in printed[0]


@pytest.mark.slow
def test_the_report_is_no_work_for_several_ranks(run, asked):
    codes, printed = on_ranks(run, "command", "report", str(run))
    assert codes == [2, 2] and "".join(printed).count("`python -m eval report` is one process") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_every_launcher_starts_it(run, asked, launcher, tmp_path):
    words = [str(word) for word in asked]
    base = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    port, tools = str(free_port()), Path(sys.executable).parent
    if launcher == "srun":
        of_step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": port,
                   "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}  # fmt: skip
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "eval", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                env=base | of_step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
        said = "".join(one.communicate(timeout=150)[1] for one in started)
        codes = [one.returncode for one in started]
    else:
        line = {
            "torchrun": [tools / "torchrun", "--nproc_per_node", "2", "--master_port", port, "-m", "--", "eval"],
            "deepspeed": [tools / "deepspeed", "--num_gpus", "2", "--master_port", port, "--module", "eval"],
        }[launcher]
        env = base | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        if launcher == "deepspeed":
            del env["CUDA_VISIBLE_DEVICES"]  # it would be its list of devices
        done = subprocess.run(
            [*map(str, line), *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=150
        )  # fmt: skip
        codes, said = [done.returncode], done.stderr
    assert not any(codes), said
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and lines[0]["config"]["extraction"]["ranks"] == 2
