"""The command line as users and scripts meet it: processes, exit codes, one clear line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import pgt_diag
from commands.app import main
from pgt_diag.directory import seal_info

ROOT = Path(__file__).parent.parent
TINY = [
    "--dataset=synthetic",
    "--synthetic-images=64",
    "--image-size=16",
    "--stem=imagenet",
    "--batch-size=16",
    "--device=cpu",
    "--threads=1",
]


def pgt(*arguments: str | Path, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "pgt_diag", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_garbage_is_collected_again_once_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import gc, sys; from commands.app import main; main(sys.argv[1:])\n"
        "assert 'torch' in sys.modules and gc.isenabled() and gc.get_freeze_count()"
    )
    words = [sys.executable, "-c", code, "train", *TINY, "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True)


def test_train_twice_then_report_from_the_shell(tmp_path: Path) -> None:
    for method in ("baseline", "pgt"):
        result = pgt(
            "train", *TINY, "--epochs=2", "--warmup-epochs=1", f"--method={method}",
            f"--run-dir=runs/{method}", cwd=tmp_path,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, "")
        lines = result.stdout.splitlines()
        assert "4,800 filters" in lines[0]
        assert re.fullmatch(r"epoch 2: train loss .* %, .*images/s, \d+ dead filters", lines[-2])
        assert lines[-1].endswith(f"next: pgt-diag report runs/{method}")
    result = pgt("report", "runs", "-o", "out/report.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"out/report\.html \(\d+\.\d MB, 2 runs\)\n", result.stdout)
    assert "</html>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_json_is_the_only_thing_a_script_reads(tmp_path: Path) -> None:
    result = pgt("train", *TINY, "--epochs=1", "--warmup-epochs=0", "--json", cwd=tmp_path)
    assert result.returncode == 0
    answer = json.loads(result.stdout)
    run = pgt_diag.load_run(tmp_path / answer["run_dir"])
    assert answer["run_dir"].startswith("runs/baseline-synthetic-s0-")
    assert answer["test_accuracy"] == run.metrics["test_accuracy"].iloc[-1]
    assert run.info["command"][:3] == ["pgt-diag", "train", TINY[0]]


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path: Path) -> None:
    result = pgt("train", *TINY, "--dry-run", "--name=x", "--json", cwd=tmp_path)
    assert result.returncode == 0
    plan = json.loads(result.stdout)["plan"]
    assert (plan["filters"], plan["directory"]) == (4800, "runs/x")
    assert not any(tmp_path.iterdir())


def test_options_override_the_file_which_overrides_the_preset(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('epochs = 7\nlr = 0.125\nmethod = "agc"\n')
    result = pgt(
        "train", *TINY, "--config=run.toml", "--epochs=9", "--dry-run", "--json", cwd=tmp_path
    )
    config = json.loads(result.stdout)["plan"]["config"]
    assert (config["epochs"], config["lr"], config["method"]) == (9, 0.125, "agc")
    assert config["warmup_epochs"] == 4.0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_recorded_and_says_where(
    sent: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pgt_diag", "train", *TINY, "--epochs=5000", "--run-dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "epoch 2:" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(sent)
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler then shows where it hangs
        pytest.fail("".join(process.communicate(timeout=20)))
    assert process.returncode == 130
    assert errors == "stopping with a checkpoint; Ctrl-C again stops at once\n"
    assert "what was recorded is in run (pgt-diag report run)" in output
    assert "go on with: pgt-diag train --run-dir run --resume" in output
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.iteration_count >= 8
    assert run.iterations.index.tolist() == list(range(run.iteration_count))


def test_a_run_killed_without_warning_can_still_be_read(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pgt_diag", "train", *TINY, "--epochs=5000", "--run-dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run" / "iterations").glob("part-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    run = pgt_diag.load_run(tmp_path / "run")
    assert (run.status, run.info["message"]) == (
        "interrupted",
        "the process that recorded it was killed",
    )
    assert run.iteration_count > 0
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "report.html")]) == 0


def test_a_diverging_run_ends_with_code_1_and_stays_reportable(tmp_path: Path) -> None:
    result = pgt(
        "train", *TINY, "--epochs=9", "--warmup-epochs=0", "--lr=1e6", "--run-dir=run", cwd=tmp_path
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert re.search(r"NaN or infinite at iteration \d+; iterations 0 to \d+ are recorded", line)
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "report.html")]) == 0


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (9, 99, 199)).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    for split in ("train", "val"):
        picture(tmp_path / "one" / split / "cat" / "1.png")
        for name in ("cat", "dog"):
            for index in range(3):
                picture(tmp_path / "broken" / split / name / f"{index}.png")
    (tmp_path / "broken" / "train" / "dog" / "1.png").write_bytes(b"no picture")
    return tmp_path


FOLDER = ["train", "--dataset=imagefolder", "--device=cpu", "--image-size=16", "--workers=0"]
MISTAKES = {
    "unknown command": (["trian"], 2, "trian"),
    "unknown option": (["train", "--epohcs=1"], 2, "--epohcs; did you mean --epochs"),
    "an option that others have": (["train", "--learning-rate=1"], 2, "did you mean --lr\\?"),
    "an option of another command": (
        ["check", "--wd=1", "x"],
        2,
        "no such option: --wd; see",
    ),
    "unknown method": (["train", "--method=sgd"], 2, "agc\\+pgt"),
    "unknown data set": (["train", "--dataset=mnist"], 2, "fashion-mnist"),
    "unknown model": (["train", "--model=resnet19"], 2, "--model is 'resnet19'.*resnet18"),
    "alpha out of range": (
        ["train", "--method=pgt", "--alpha=1.5"],
        2,
        r"error: --alpha is 1\.5; .*\[0, 1\]",
    ),
    "no number": (["train", "--epochs=many"], 2, "--epochs"),
    "steps that are no numbers": (["train", "--step-epochs=a,b"], 2, "--step-epochs is 'a,b'"),
    "missing configuration file": (["train", "--config=no.toml"], 2, r"no\.toml"),
    "several record-every": (["train", "--record-every=1,2"], 2, "--record-every is '1,2'"),
    "alpha without PGT": (["train", "--alpha=0.5"], 2, "--alpha has no effect .* baseline"),
    "cool-down in steps": (
        ["train", "--schedule=step", "--cooldown-epochs=1"],
        2,
        "--cooldown-epochs has no effect with --schedule step",
    ),
    "momentum of 1": (["train", "--momentum=1"], 2, "--momentum is 1.0; it must be less"),
    "a name that is too long": (["train", *TINY, "--run-dir=" + "x" * 300], 3, "cannot be used"),
    "name and directory": (["train", "--name=a", "--run-dir=b"], 2, "--run-dir and --name"),
    "a name that is a path": (["train", "--name=../a"], 2, "plain name"),
    "GPU asked for and absent": (["train", "--device=cuda"], 2, "no CUDA GPU"),
    "decoding on a GPU that is absent": (
        [*FOLDER, "--data=one", "--decode=gpu"],
        2,
        "--decode is gpu, and training is on cpu: it needs a CUDA GPU",
    ),
    "batch larger than the data": (
        ["train", *TINY, "--batch-size=65"],
        2,
        "--batch-size is 65.*64",
    ),
    "missing folder": ([*FOLDER, "--data=nowhere"], 3, "nowhere"),
    "empty folder": ([*FOLDER, "--data=empty"], 3, "empty"),
    "folder with one class": (
        [*FOLDER, "--data=one", "--batch-size=1"],
        3,
        r"at least 2 class folders .*one/train",
    ),
    "unreadable image": ([*FOLDER, "--data=broken", "--batch-size=6"], 3, r"dog.*1\.png"),
    "report of nothing": (["report"], 2, "RUNS|runs"),
    "report of a missing run": (["report", "nowhere"], 3, "nowhere: no such directory"),
    "report of a folder without runs": (["report", "empty"], 3, "empty: no run here"),
    "report of an unknown layer": (["report", "run", "--layers=99"], 2, "99"),
    "report into a folder": (["report", "run", "-o", "empty"], 2, "empty: is a folder"),
    "a directory that holds a run": (["train", *TINY, "--run-dir=run"], 3, "already holds a run"),
    "a directory that holds other files": (["train", *TINY, "--run-dir=one"], 3, "other files"),
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "run"
    options = ["--epochs=1", "--warmup-epochs=0", f"--run-dir={path}"]
    assert main(["train", *TINY, *options]) == 0
    return path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_clear_line_and_its_exit_code(
    mistake: str,
    folders: Path,
    small_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "GPU" in mistake and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments, code, message = MISTAKES[mistake]
    (folders / "run").symlink_to(small_run)
    monkeypatch.chdir(folders)
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pgt-diag: error: ")
    assert re.search(message, line), line


@pytest.mark.parametrize("damage", ["not JSON", "other version", "bad part"])
def test_a_damaged_run_is_named_and_not_guessed_at(
    damage: str, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", small_run, copy], check=True)
    if damage == "bad part":
        (part,) = (copy / "iterations").iterdir()
        part.write_bytes(part.read_bytes()[:-9])
        expected = part.name
    else:
        other = seal_info({"schema_version": 99})
        (copy / "run.json").write_bytes(b"{" if damage == "not JSON" else other)
        expected = "run.json"
    assert main(["report", str(copy), "-o", str(tmp_path / "x.html")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("command", ["train", "report"])
def test_every_command_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"pgt-diag {command}" in capsys.readouterr().out.partition("Examples:")[2]


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_another_package_named_like_ours_is_told(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "__init__.py").write_text("")
    result = pgt("--help", cwd=tmp_path)
    assert result.returncode == 2
    assert "another package named 'reports'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_hostile_path_in_an_error_cannot_act_on_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report", "no\x1b]0;owned\x07such\x1b[2Jrun"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("pgt-diag: error: no�]0;owned�such�[2Jrun: ")
    assert "\x1b" not in error


def test_hostile_run_names_are_printed_as_they_are(tmp_path: Path) -> None:
    name = "[link=file:etc]x[/x][bold]"
    result = pgt("train", *TINY, "--dry-run", "--run-dir", name, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"run directory: {name}" in result.stdout
