"""The command line: one line and status 2 for what the user can mend, and what `--resume` needs."""

import sys

import pytest
from walk import Config, make

from spg.training import cli, records
from spg.training.records import RunError

SMALL = [
    "--num-envs=4", "--num-steps=8", "--num-minibatches=2", "--num-epochs=1", "--cell=linear",
    "--z-size=4", "--num-seeds=2", "--eval-episodes=1", "--env=MemoryChain-bsuite", "--observe=all",
]  # fmt: skip


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a script's command line in this process; its message on status 2."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

    def run(config_type, make, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(config_type, make)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env=CartPol-v1"], "did you mean 'CartPole-v1'"),
        (["--env=brax/antt"], "did you mean 'brax/ant'"),
        (["--env-params", "memory_lenght", "9"], "memory_length"),
        (["--observe=positions"], "no velocities to hide"),
        (["--num-minibatches=3"], "num_minibatches 3 does not divide the 32 segments"),
        (["--segment-length=5"], "1, 2, 4, 8 would"),
        (["--state-std=0"], "memory bptt is without noise"),
        (["--cell=gruu"], "gru"),
        (["--backend=sprong"], "spring"),
        (["--total-steps=10"], "less than one update"),
        (["--checkpoints=0"], "checkpoints is 0"),
        (["--action-std=0"], "action_std is 0"),
        (
            ["--shard=envs", "--num-envs=1"],
            "--shard envs: this training has no environments to share",
        ),
        (
            ["--coordinator-address=10.0.0.1", "--num-processes=2", "--process-id=0"],
            "coordinator_address is 10.0.0.1; it has to end in a port, as 10.0.0.1:1234",
        ),
        (
            ["--coordinator-address=10.0.0.1:1234", "--num-processes=2", "--process-id=2"],
            "process_id is 2; it has to be below num_processes 2",
        ),
        (["--num-processes=2"], "--num-processes needs --coordinator-address and --process-id too"),
    ],
)
def test_user_errors_are_one_line_and_status_2(arguments, message, refused, tmp_path):
    from scripts import ppo

    out = ["--out", str(tmp_path / "x")]
    assert message in refused(ppo.Config, ppo.make, *SMALL, *arguments, *out)
    assert not (tmp_path / "x").exists()


def test_running_over_a_run_diverging_and_resuming_otherwise_end_with_status_2(refused, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    start = [*out, "--num-seeds=2", "--diverge", "0", "3", "1", "1"]
    diverges = refused(Config, make, *start)
    assert "\nerror: every seed diverged: seed 0 at update 3, seed 1 at update 1; a" in diverges
    assert "holds a run" in refused(Config, make, *start)
    other = refused(Config, make, *out, "--resume", "--rate=0.1")
    assert "rate (was 0.5, now 0.1)" in other


START = ["--num-seeds=1", "--num-updates=4", "--checkpoints=2", "--diverge", "7", "3"]


def test_resumption_needs_the_directory_alone(tmp_path):
    out = str(tmp_path / "run")
    start = cli.parse(Config, [*START, "--sizes", "2", "3", "--out", out])
    records.open_run(start, "walk")
    for beside in ([], ["--num-updates=4"], ["--diverge", "7", "3"], ["--sizes", "2", "3"]):
        config = cli.parse(Config, ["--resume", "--out", out, *beside])
        assert config.resume
        assert vars(config) == vars(start) | {"resume": True}
        records.open_run(config, "walk")
    for beside, message in (
        (["--num-updates=5"], r"num_updates \(was 4, now 5\)"),
        (["--rate=0.25"], r"rate \(was 0.5, now 0.25\)"),
        (["--checkpoints=20"], r"checkpoints \(was 2, now 20\)"),
        (["--diverge", "7", "4"], "diverge"),
    ):
        config = cli.parse(Config, ["--resume", "--out", out, *beside])
        with pytest.raises(RunError, match=message):
            records.open_run(config, "walk")


def test_default_that_is_said_on_resumption_is_an_option_like_any_other(tmp_path):
    out = str(tmp_path / "run")
    records.open_run(cli.parse(Config, ["--rate=0.1", "--out", out]), "walk")
    config = cli.parse(Config, ["--resume", "--out", out, "--rate=0.5"])
    with pytest.raises(RunError, match=r"rate \(was 0.1, now 0.5\)"):
        records.open_run(config, "walk")


def test_resumption_of_what_is_no_run_is_one_line(refused, tmp_path):
    nothing = refused(Config, make, "--resume", "--out", str(tmp_path / "nothing"))
    assert "holds no run" in nothing
    assert "--resume needs --out" in refused(Config, make, "--resume")
    (tmp_path / "config.json").write_text('{"name": "walk", "ra')
    damaged = refused(Config, make, "--resume", "--out", str(tmp_path))
    assert f"error: {tmp_path / 'config.json'} cannot be read: " in damaged
    assert damaged.count("\n") == 1


def test_a_training_that_is_there_is_not_run_again(tmp_path):
    config = Config(num_seeds=1, num_updates=2)
    first = cli.train(make, config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.csv").stat().st_mtime_ns
    assert cli.train(make, config, tmp_path / "run") == first
    assert (tmp_path / "run" / "metrics.csv").stat().st_mtime_ns == before
