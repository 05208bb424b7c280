"""`verify-resume`: a sound resume is certified, one that loses something is not."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from training import BEFORE, forked

from maws import stages
from maws.__main__ import main
from maws.compare_runs import Tolerance, compare
from maws.verify_resume import Asked, moments, text, verify

pytestmark = pytest.mark.timeout(600)  # real processes: seconds on an idle machine, minutes on a busy one


@pytest.fixture(scope="module")
def proof(tmp_path_factory, shards_path):
    output = tmp_path_factory.mktemp("proof")
    asked = Asked(
        stage="mae", preset="debug", output=output, ranks=(1, 4, 2), seed=2,
        settings=(f"data.shards={shards_path}", "optim.length=24 steps", "checkpoint.every=4 steps"),
    )  # fmt: skip
    return verify(asked, forked)


def test_a_run_killed_on_1_and_4_ranks_and_resumed_on_2_ends_as_the_straight_one(proof):
    assert proof.passed, "\n".join(text(proof))
    assert proof.found.steps == 24 and not proof.found.samples
    assert proof.found.lr.largest == 0 and proof.found.loss.largest < 2e-5
    starts = proof.starts
    assert len(starts) >= 2 and [s.ranks for s in starts] == [1, 4, 2][: len(starts)]
    for before, after in itertools.pairwise(starts):
        assert before.killed_at >= after.begun_at > before.killed_at - 9  # at most two intervals: one save is cut
        assert after.begun_at % 4 == 0
    assert starts[-1].killed_at is None


def test_the_certificate_says_what_was_done(proof):
    written = json.loads((proof.asked.output / "certificate.json").read_text())
    assert written["verdict"] == "PASSED" and written["asked"]["stage"] == "mae"
    assert [s["ranks"] for s in written["starts"]] == [s.ranks for s in proof.starts]
    printed = text(proof)
    assert printed[-1] == "PASSED" and "samples        the same in each of 24 steps" in printed


class TestWhatIsNotTheSame:
    """The comparison, on a copy of a run that was changed in one place."""

    ALLOWED = Tolerance(loss=1e-4, grad_norm=1e-2, weights=1e-2)

    @pytest.fixture
    def runs(self, proof, tmp_path: Path) -> tuple[Path, Path]:
        straight = proof.asked.output / "straight"
        shutil.copytree(straight, tmp_path / "copy")
        return straight, tmp_path / "copy"

    def beyond(self, runs: tuple[Path, Path]) -> str:
        (found,) = compare(*runs).beyond(self.ALLOWED)
        return found

    def edit(self, path: Path, number: int, **values) -> None:
        lines = path.read_text().splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | values)
        path.write_text("\n".join(lines) + "\n")

    def test_a_copy_is_the_same_to_the_bit(self, runs):
        found = compare(*runs)
        assert found.same() and not found.beyond(Tolerance())

    def test_a_swapped_key(self, runs):
        path = runs[1] / "keys" / "rank_00000.jsonl"
        keys = json.loads(path.read_text().splitlines()[11])["keys"]
        self.edit(path, 11, keys=["stranger", *keys[1:]])
        assert self.beyond(runs) == f"step 12 has other samples: stranger for {keys[0]}"

    def test_a_sample_that_a_step_has_twice(self, runs):
        path = runs[1] / "keys" / "rank_00000.jsonl"
        keys = json.loads(path.read_text().splitlines()[3])["keys"]
        self.edit(path, 3, keys=[*keys, keys[0]])
        assert self.beyond(runs) == f"step 4 has other samples: {keys[0]} for "

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("train/lr", 1.9e-3, "lr differs by"),
            ("train/loss", 0.9, "loss differs by"),
            ("train/loss", None, "loss differs by inf (step 8, loss), 0.0001 is allowed"),
            ("train/grad_norm", 100.0, "grad_norm differs by"),
            ("step", 9, "lacks or adds step 8"),
        ],
    )
    def test_a_changed_line_of_metrics(self, runs, name, value, message):
        self.edit(runs[1] / "metrics.jsonl", 7, **{name: value})
        assert message in "; ".join(compare(*runs).beyond(self.ALLOWED))

    def test_a_step_that_was_logged_twice(self, runs):
        path = runs[1] / "metrics.jsonl"
        path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
        assert self.beyond(runs) == f"metrics.jsonl of {runs[1]} has step 24 2 times"

    def test_a_weight(self, runs):
        path = runs[1] / "release" / "model.safetensors"
        weights = load_file(path)
        weights["norm.bias"][3] += 0.25
        save_file(weights, path)
        assert self.beyond(runs) == "weights differs by 0.25 (norm.bias), 0.01 is allowed"

    def test_a_moment_that_only_the_checkpoint_has(self, runs):
        path = runs[1] / "checkpoints" / "step_0000024" / "rank_00000.safetensors"
        state = load_file(path)
        name = next(name for name in state if name.startswith("exp_avg_sq/"))
        state[name] += 1
        save_file(state, path)
        found = compare(*runs)
        assert found.state.largest == pytest.approx(1) and found.state.where == name and not found.same()


def test_every_start_has_steps_to_take_and_one_kill_falls_into_a_save(tmp_path):
    for seed in range(50):
        asked = Asked(stage="mae", preset="debug", output=tmp_path, ranks=(2, 1), kills=5, seed=seed)
        found = moments(asked, 100)
        steps = [step for step, _ in found]
        assert all(a <= step < a + 20 for a, step in zip((1, 20, 40, 60, 80), steps, strict=True)), found
        assert "save" in [kind for _, kind in found]
    assert moments(Asked(stage="mae", preset="debug", output=tmp_path, kills=0), 9) == []


def test_a_list_of_ranks_and_a_used_folder_are_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    asked = ["verify-resume", "--stage", "mae", "--preset", "debug", "--output", str(tmp_path)]
    assert main([*asked, "--ranks", "4,two"]) == 2
    assert "--ranks 4,two is not a list of numbers of ranks" in capsys.readouterr().err
    assert main([*asked, "data.shards=nowhere"]) == 2
    assert "is not empty; choose another --output" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", stages.names())
@pytest.mark.parametrize("ranks", [(2, 2, 2), (4, 2, 1, 2)], ids=str)
def test_every_stage_is_certified(stage, ranks, trained, sets, tmp_path):
    source = str(trained[BEFORE[stage]]) if BEFORE[stage] else ""
    settings = (f"data.shards={sets[stage]}",)
    certificate = verify(
        Asked(stage=stage, preset="debug", output=tmp_path, ranks=ranks, init_from=source, settings=settings), forked
    )
    assert certificate.passed, "\n".join(text(certificate))
    assert len(set(ranks)) > 1 or (certificate.found and certificate.found.same())


@pytest.mark.slow
def test_the_command_with_real_processes(shards_path, tmp_path, capsys):
    asked = ["verify-resume", "--stage", "mae", "--preset", "debug", "--output", str(tmp_path / "proof")]
    assert main([*asked, f"data.shards={shards_path}", "--ranks", "2,2"]) == 0
    assert capsys.readouterr().out.endswith("PASSED\n")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["moments", "step", "samples"])
def test_a_resume_that_loses_something_is_found(lost, shards_path, tmp_path):
    """Patched in the processes that resume: see tests/sabotage.py."""
    from sabotage import forgetful

    settings = (f"data.shards={shards_path}",)
    certificate = verify(
        Asked(stage="mae", preset="debug", output=tmp_path, ranks=(1, 1), settings=settings), forgetful(lost)
    )
    assert not certificate.passed and text(certificate)[-1] == "FAILED"
    expected = {"moments": "loss differs by", "step": "lr differs by", "samples": "has other samples"}[lost]
    assert expected in "; ".join(certificate.failures)
